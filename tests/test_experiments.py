"""The experiments: what a variant changes and what not; their results and the page."""

import dataclasses
import functools
import importlib
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ava_jax
from experiments import (
    additions,
    batch_noise,
    call_cost,
    experts,
    lab,
    records,
    repetition,
    run,
    tables,
    variants,
)
from experiments.sizes import Sizes
from experiments.variants import Variant
from trainer.data.corpus import Corpus
from trainer.data.text import TextData, prepare_data
from trainer.model.language_model import LanguageModel, loss_inputs
from trainer.model.layers import Batch, ModelConfig

TINY = Sizes(
    model=ModelConfig(layers=1, width=16, heads=2),
    vocab_size=300,
    length=32,
    rows=2,
    steps=3,
    warmup=1,
    heldout=0.3,
    heldout_batches=2,
    prompts=4,
    prompt_length=6,
    continuation=5,
)
ONE_STEP = dataclasses.replace(TINY, steps=1, warmup=0)


RESULTS = sorted(records.RESULTS.glob("*.json"))


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Optax's Adam raises a Python float to an int32 power, which strict refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> TextData:
    rng = np.random.default_rng(0)
    words = np.array(["alpha", "beta", "gamma", "delta", "omega"])
    documents = tuple(" ".join(rng.choice(words, 150)) for _ in range(6))
    corpus = Corpus("words", documents, "0" * 64, 1000)
    return prepare_data(
        corpus, tmp_path_factory.mktemp("cache"), 300, TINY.length, TINY.heldout
    )


def context(
    text: TextData, variant: Variant, seed: int = 0, sizes: Sizes = TINY
) -> additions.StepContext:
    """A first step of a variant."""
    model = lab.build(sizes, variant, text)
    batch = lab.Batch(*map(jnp.asarray, next(text.batches(TINY.rows, seed))))
    params, inputs, aux = begin(model, batch, jax.random.key(seed))
    step = jnp.asarray(0, jnp.int32)
    key = jax.random.key(seed)
    return additions.StepContext(model, params, batch, inputs, aux, None, step, key)


@functools.partial(jax.jit, static_argnums=0)
def begin(
    model: LanguageModel, batch: Batch, key: jax.Array
) -> tuple[optax.Params, ava_jax.LossInputs, dict[str, jax.Array]]:
    """The parameters of a model, and what it and its loss make of a batch."""
    params = model.init(key, batch)["params"]
    inputs = loss_inputs(model, params, batch, None)
    loss_fn = ava_jax.unified_loss(model.loss)
    _, aux, _ = loss_fn(loss_fn.init(), **loss_fn.select(inputs))
    return params, inputs, aux


@pytest.fixture(scope="module")
def plain(text: TextData) -> lab.Trained:
    """The plain variant after three steps."""
    with jax.numpy_dtype_promotion("standard"):
        return lab.train(TINY, Variant(), 0, text)


@pytest.fixture(scope="module")
def plain_step(text: TextData) -> lab.Trained:
    """The plain variant after one step."""
    with jax.numpy_dtype_promotion("standard"):
        return lab.train(ONE_STEP, Variant(), 0, text)


def test_variants_share_their_initial_weights_and_their_rows(text, plain_step):
    one = plain_step
    heads = Variant({"use_mtp": True, "num_future_tokens": 2, "mtp_weight": 0.0})
    two = lab.train(ONE_STEP, heads, 0, text)
    other = lab.train(ONE_STEP, Variant(), 1, text)
    np.testing.assert_array_equal(one.paths["nll"], two.paths["nll"])
    assert one.paths["nll"] != other.paths["nll"]
    trunk = jax.tree_util.tree_leaves_with_path(one.params)
    with_heads = dict(jax.tree_util.tree_leaves_with_path(two.params))
    for path, leaf in trunk:
        np.testing.assert_allclose(leaf, with_heads[path], rtol=1e-6, atol=1e-7)


def test_penalties_on_targets_train_nothing(text, plain):
    fields = {
        "penalty_source": "targets",
        "use_immediate_repetition_penalty": True,
        "ngram_penalty_weight": 0.0,
        "immediate_repetition_weight": 5.0,
    }
    same = lab.train(TINY, Variant(fields), 0, text)
    jax.tree.map(np.testing.assert_array_equal, plain.params, same.params)
    assert same.paths["immediate_repetition_penalty"]


def test_rows_of_repetition_decay_repeat_a_span_of_the_text(text, monkeypatch):
    seen = []

    def record(logits, targets, *, span_length, decay):
        seen.append((np.asarray(targets), np.asarray(span_length)))
        return jnp.sum(logits) * 0 + 2.0

    monkeypatch.setattr(additions.losses, "repetition_decay_loss", record)
    found = context(text, Variant())
    addition = additions.RepetitionDecay(weight=0.5, rows=2, spans=(2, 5))
    loss, report = addition.apply({}, jnp.asarray(1.0), found)
    assert float(loss) == 2.0
    assert float(report["repetition_decay"]) == 2.0
    ((targets, sizes),) = seen
    for row, size, source in zip(targets, sizes, found.batch.inputs, strict=True):
        assert 2 <= size <= 5
        np.testing.assert_array_equal(row[size:], row[:-size])
        span = ",".join(map(str, row[:size]))
        # The first target is the span's second token.
        start = np.roll(row[:size], 1)
        text_of = ",".join(map(str, np.asarray(source)))
        assert ",".join(map(str, start)) in text_of or span in text_of


def test_sequence_unlikelihood_waits_for_its_start(text):
    addition = additions.SequenceUnlikelihood(
        weight=2.0, rows=2, prompt=4, count=12, start=3, ngram_size=1
    )
    found = context(text, Variant())
    before, report = addition.apply({}, jnp.asarray(1.0), found)
    assert float(before) == 1.0
    assert float(report["sequence_unlikelihood"]) == 0.0
    now = found._replace(step=jnp.asarray(3, jnp.int32))
    after, report = addition.apply({}, jnp.asarray(1.0), now)
    value = float(report["sequence_unlikelihood"])
    assert value > 0
    np.testing.assert_allclose(float(after), 1.0 + 2.0 * value, rtol=1e-6)


def test_the_gate_is_taught_what_the_main_head_will_say(text):
    variant = Variant(
        {"use_mtp": True, "mtp_type": "adaptive", "num_future_tokens": 1},
        confidence_threshold=0.0,
    )
    found = context(text, variant)
    later = jnp.roll(jnp.asarray(found.inputs.get("logits")), -1, axis=1)
    odd = (jnp.arange(TINY.length) % 2 == 1)[:, None]
    ahead = jnp.asarray(found.inputs.get("additional_logits"))
    drafted = jnp.where(odd, later, ahead)
    found = found._replace(inputs=found.inputs | {"additional_logits": drafted})
    loss, report = additions.GateCalibration(weight=3.0).apply(
        {}, jnp.asarray(1.0), found
    )
    logits, ahead, sure = (
        np.asarray(found.inputs.get(name), np.float64)
        for name in ("logits", "additional_logits", "confidence_scores")
    )
    logits, ahead = logits[..., : text.vocab_size], ahead[0, ..., : text.vocab_size]
    segments, terms = np.asarray(found.batch.segment_ids), []
    for b, s in np.ndindex(TINY.rows, TINY.length - 1):
        if segments[b, s] and segments[b, s] == segments[b, s + 1]:
            right = ahead[b, s].argmax() == logits[b, s + 1].argmax()
            terms.append(-np.log(sure[b, s, 0] if right else 1 - sure[b, s, 0]))
            assert right or not s % 2
    assert 0 < len(terms) < TINY.rows * TINY.length
    np.testing.assert_allclose(
        float(report["gate_calibration"]), np.mean(terms), rtol=1e-5
    )
    np.testing.assert_allclose(float(loss), 1 + 3 * np.mean(terms), rtol=1e-5)
    with pytest.raises(ValueError, match="only adaptive heads have a gate"):
        additions.GateCalibration(weight=1.0).apply({}, loss, context(text, Variant()))


def test_learned_weights_replace_the_sum(text):
    variant = Variant({"use_mtp": True, "num_future_tokens": 1})
    addition = additions.LearnedWeights(terms=("main_loss", "mtp_loss"))
    found = context(text, variant)
    own = {"bias": jnp.array([0.0, 1.0])}
    loss, report = addition.apply(own, jnp.asarray(99.0), found)
    main, ahead = float(found.aux["main_loss"]), float(found.aux["mtp_loss"])
    np.testing.assert_allclose(float(loss), main + ahead / np.e + 0.5, rtol=1e-5)
    np.testing.assert_allclose(report["learned_weights"], [1, 1 / np.e], rtol=1e-6)


def test_prompts_lie_in_one_document_and_go_on_as_the_text_does(text):
    found = lab.heldout_prompts(TINY, text)
    assert found.prompts.shape == (4, 6)
    assert found.continuations.shape == (4, 5)
    rows = [text.heldout[i] for i in range(len(text.heldout))]
    whole = [row.inputs[:11] for row in rows if np.sum(row.segment_ids == 1) >= 11]
    joined = np.concatenate([found.prompts, found.continuations], 1)
    np.testing.assert_array_equal(joined[[0, -1]], [whole[0], whole[-1]])
    with pytest.raises(ValueError, match="rows are wanted"):
        lab.heldout_prompts(dataclasses.replace(TINY, prompts=10_000), text)


def test_tables_of_characters_are_left_out():
    kept = 'def f():\n    return "Character"\n'
    tables_of = [f'"""{title} iso_1' for title in lab.TABLES]
    corpus = Corpus("x", (kept, *tables_of), "0" * 64, 999)
    found = lab.without_tables(corpus)
    assert found.documents == (kept,)
    assert found.size == len(kept)
    assert found.sha256 != corpus.sha256


def test_evaluation_is_the_mean_over_tokens(text, plain_step):
    trained = plain_step
    found = lab.evaluate(TINY, trained, text)
    nll, right, count = 0.0, 0, 0
    for batch in lab.heldout_batches(TINY, text):
        inputs = loss_inputs(trained.model, trained.params, batch, None)
        logits = np.asarray(inputs.get("logits"), np.float64)[..., : text.vocab_size]
        for b, s in np.argwhere(np.asarray(batch.segment_ids) > 0):
            row, target = logits[b, s], int(batch.targets[b, s])
            nll += np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[target]
            right += int(row.argmax() == target)
            count += 1
    np.testing.assert_allclose(found["nll"], nll / count, rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], right / count, rtol=1e-6)
    np.testing.assert_allclose(found["perplexity"], np.exp(nll / count), rtol=1e-5)


EVERY_KIND = [
    pytest.param("heads", "sequential", id="heads-sequential"),
    pytest.param("heads", "parallel", marks=pytest.mark.slow),
    pytest.param("heads", "adaptive", marks=pytest.mark.slow),
    pytest.param("heads", "adaptive, taught gate", marks=pytest.mark.slow),
    pytest.param("repetition", "token and sequence", marks=pytest.mark.slow),
    pytest.param("repetition", "contrastive 0.3, 120, late", marks=pytest.mark.slow),
    pytest.param("experts", "bias + sequence", marks=pytest.mark.slow),
    pytest.param("experts", "quantile", marks=pytest.mark.slow),
    pytest.param("ablation", "parallel heads, learned weights", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "variant"), EVERY_KIND)
def test_a_variant_is_trained_measured_kept_and_drawn(
    name, variant, text, monkeypatch, tmp_path
):
    experiment = importlib.import_module(f"experiments.{name}")
    module = repetition if name == "ablation" else experiment
    monkeypatch.setattr(module, "load_text", lambda sizes: text)
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    sizes = TINY
    if name == "experts":
        small = ModelConfig(layers=2, width=16, heads=2, experts=4)
        sizes = dataclasses.replace(TINY, model=small)
    given = experiment.VARIANTS[variant]
    short = tuple(
        dataclasses.replace(addition, prompt=4, count=6, start=1, rows=2)
        if isinstance(addition, additions.SequenceUnlikelihood)
        else addition
        for addition in given.additions
    )
    found = results()
    record: records.RunRecord = experiment.measure(
        sizes, dataclasses.replace(given, additions=short), 0
    )
    record["variant"] = variant
    found["runs"] += [record, {**record, "variant": "plain"}]
    found["experiment"] = name
    records.save(records.path_of(name, "cpu"), found)
    experiment.plot(records.load(records.path_of(name, "cpu")))
    assert records.picture(found).stat().st_size > 5000
    assert all(np.isfinite(list(record["numbers"].values())))
    if name == "heads":
        assert record["numbers"]["identical"] == 1
        assert 1 <= record["numbers"]["tokens_per_call"] <= 4


@pytest.mark.slow
def test_what_a_call_with_drafts_costs(text, monkeypatch):
    monkeypatch.setattr(call_cost, "load_text", lambda sizes: text)
    found = call_cost.cost(TINY, "sequential")
    assert np.isfinite(found)
    assert found > 0


def results(*runs: tuple[str, int, float]) -> records.Results:
    return {
        "experiment": "repetition",
        "preset": "cpu",
        "date": "2026-01-01",
        "machine": {"processor": "", "cores": 2, "memory": None, "device": "cpu"},
        "versions": {},
        "sizes": {},
        "runs": [
            {"variant": a, "seed": s, "numbers": {"nll": v}, "paths": {}}
            for a, s, v in runs
        ],
    }


def test_changes_are_taken_seed_by_seed(tmp_path):
    found = results(("plain", 0, 2.0), ("x", 0, 1.0), ("plain", 1, 4.0), ("x", 1, 6.0))
    change = records.changes(found, "nll", "plain")
    assert change["x"] == {"mean": 0.0, "low": -0.5, "high": 0.5, "seeds": 2}
    assert records.by_variant(found, "nll")["x"]["mean"] == 3.5
    records.save(tmp_path / "x.json", found)
    assert records.load(tmp_path / "x.json") == found


def test_a_table_has_the_mean_and_the_range():
    columns = (
        tables.Column("nll", "nll", ".1f"),
        tables.Column("change", "nll", "+.0%", "plain"),
    )
    found = results(("plain", 0, 2.0), ("x", 0, 1.0), ("x", 1, 4.0))
    assert tables.table(found, columns).splitlines() == [
        "| variant | nll | change |",
        "|---|---:|---:|",
        "| plain (1 seed) | 2.0 | +0% |",
        "| x | 2.5 (1.0…4.0) | -50% |",
    ]


def test_a_table_says_which_variants_have_fewer_seeds():
    columns = (tables.Column("nll", "nll", ".1f"),)
    found = results(("x", 0, 2.0), ("y", 0, 1.0), ("y", 1, 1.0), ("y", 2, 1.0))
    assert tables.table(found, columns).splitlines()[2:] == [
        "| x (1 seed) | 2.0 |",
        "| y | 1.0 |",
    ]
    found["runs"].append({**found["runs"][0], "seed": 1})
    assert "| x (2 seeds) |" in tables.table(found, columns)


def test_a_variant_has_its_own_number_of_seeds():
    known = results(("b", 0, 1.0))
    own = {"a": Variant(seeds=1), "b": Variant()}
    assert run.missing(own, known, 2) == [("a", 0), ("b", 1)]
    assert run.missing(own, known, 5) == [("a", 0), ("b", 1), ("b", 2)]


def test_fields_change_over_the_steps():
    def values(field: object) -> np.ndarray:
        schedule = cast(optax.Schedule, variants.over_steps(field, 10))
        return np.array([schedule(step) for step in range(11)], float)

    np.testing.assert_allclose(values(variants.Late(0.3, 0.5)), [0] * 5 + [0.3] * 6)
    falling = np.linspace(1, 0, 11)
    np.testing.assert_allclose(values(variants.Falling(1.0)), falling, atol=1e-6)
    assert variants.over_steps(0.3, 10) == 0.3


def test_a_late_term_trains_nothing_before_its_start(text, plain):
    fields = {
        "contrastive_token_weight": variants.Late(50.0, 2 / 3),
        "contrastive_token_window": 8,
    }
    late = lab.train(TINY, Variant(fields), 0, text)
    np.testing.assert_array_equal(late.paths["nll"], plain.paths["nll"])
    term = np.asarray(late.paths["contrastive_token"], float)
    np.testing.assert_array_equal(term > 0, [False, False, True])
    moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), late.params, plain.params)
    assert any(jax.tree.leaves(moved))


def test_violation_of_the_training_batches_leaves_out_the_first_steps():
    even, odd = [[1.0, 1.0], [0.5, 1.5]], [[0.0, 2.0], [0.0, 2.0]]
    paths = {"step": [10, 20, 30], "expert_load": [odd, even, even]}
    np.testing.assert_allclose(experts.training_violation(paths), 0.25)
    short = {"step": [1, 2], "expert_load": [odd, even]}
    np.testing.assert_allclose(experts.training_violation(short), 0.625)


def test_noise_of_a_batch_falls_with_its_tokens():
    few, many = (
        float(batch_noise.next_violation(jax.random.key(0), n, 4)) for n in (128, 4096)
    )
    assert 0 < many < 0.12 < few


def test_sequence_balance_takes_logits_or_scores(text):
    small = ModelConfig(layers=2, width=16, heads=2, experts=4)
    sizes, values = dataclasses.replace(TINY, model=small), []
    for fields in (experts.BIAS, experts.QUANTILE):
        found = context(text, Variant(fields), sizes=sizes)
        loss = jnp.asarray(0.0)
        balance = functools.partial(additions.SequenceBalance(weight=1.0).apply, {})
        _, report = jax.jit(functools.partial(balance, context=found))(loss)
        values.append(float(report["sequence_balance"]))
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_the_page_shows_the_results():
    page = tables.PAGE.read_text()
    assert tables.fill(page) == page
    for path in RESULTS:
        assert f"<!-- table: {path.stem} -->" in page


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_are_complete_and_of_these_sizes(path):
    found = records.load(path)
    assert found is not None
    assert path == records.path_of(found["experiment"], found["preset"])
    experiment = run.load_experiment(found["experiment"])
    assert found["sizes"] == run.sizes_record(experiment.SIZES[found["preset"]])
    made = {(record["variant"], record["seed"]) for record in found["runs"]}
    assert made == {
        (name, seed)
        for name, variant in experiment.VARIANTS.items()
        for seed in range(variant.seeds)
    }


def test_the_command_refuses_what_it_does_not_know(capsys):
    for arguments in (
        ["nothing"],
        ["heads", "--jobs", "0"],
        ["heads", "--variants", "x"],
    ):
        with pytest.raises(SystemExit):
            run.main(arguments)
    assert "x" in capsys.readouterr().err
