"""What a run writes beside the loss's terms: experts' load, heads, samples."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.typing import VariableDict
from rich.console import Console
from run_helpers import (
    TWO_LAYERS,
    names_of_metrics,
    random_params,
    train,
    with_flags,
)

import ava_jax
from ava_jax import heads
from train_tpu import Run
from trainer.decode.decoder import Decoder
from trainer.errors import TrainingError
from trainer.model.expert_load import count_choices, relative_load
from trainer.model.language_model import LanguageModel, hidden_and_head, loss_inputs
from trainer.model.layers import Batch, ModelConfig
from trainer.model.temperature import fold_own_temperature, is_tempered
from trainer.report.metrics import Metrics
from trainer.report.samples import Sample, keep_sample, read_samples
from trainer.run.devices import make_mesh
from trainer.run.evaluate import evaluate
from trainer.run.settings import LossFields, parse_settings

V, ROWS, LENGTH, K = 11, 4, 12, 2
KINDS: dict[str, LossFields] = {
    "parallel": {"use_mtp": True, "mtp_type": "parallel"},
    "sequential": {"use_mtp": True, "mtp_type": "sequential"},
    "adaptive": {"primary_loss_type": "adaptive_mtp"},
}


INPUTS = jax.jit(loss_inputs, static_argnums=0)
STATE = ava_jax.unified_loss(ava_jax.UnifiedLossConfig(vocab_size=V)).init()


def test_choices_are_counted_per_layer_and_expert_without_padding() -> None:
    rng = np.random.default_rng(0)
    layers, experts, tokens, k = 2, 4, 15, 2
    unmasked = rng.random((3, 5)) < 0.6
    chosen = rng.integers(0, experts, (layers, tokens, k)).astype(np.int32)
    # A dropped token chooses nobody.
    chosen[0, 0, 0] = experts
    expected = np.zeros((layers, experts), int)
    for layer, token, choice in itertools.product(*map(range, chosen.shape)):
        if unmasked.reshape(-1)[token] and chosen[layer, token, choice] < experts:
            expected[layer, chosen[layer, token, choice]] += 1
    inputs: ava_jax.LossInputs = {
        "targets": jnp.zeros((3, 5), int),
        "expert_indices": jnp.asarray(chosen),
        "attention_mask": jnp.asarray(unmasked),
    }
    counts = count_choices(inputs, experts)
    np.testing.assert_array_equal(counts, expected)
    assert counts is not None
    load = relative_load(counts)
    np.testing.assert_allclose(load, 4 * expected / expected.sum(1, keepdims=True))
    np.testing.assert_array_equal(relative_load(jnp.zeros((1, 3), int)), [[0, 0, 0]])
    assert count_choices({"targets": jnp.zeros((3, 5), int)}, 0) is None


def test_arrays_of_layers_and_experts_have_names_that_say_so() -> None:
    load = jnp.arange(6.0).reshape(2, 3)
    record = Metrics.pack({"a": jnp.array(7), "load": load}).fetch()
    assert record == {"a": 7} | {
        f"load_L{layer}_E{expert}": 3.0 * (layer - 1) + expert - 1
        for layer in (1, 2)
        for expert in (1, 2, 3)
    }


def first_step(arguments: list[str]) -> dict[str, float]:
    run = Run(*parse_settings(arguments), Console(quiet=True))
    _, metrics = run.train_step(run.state, run.share.put(next(run.batches)))
    return metrics.fetch()


@pytest.mark.parametrize(
    "flags",
    [
        ["--microbatches", "4"],
        pytest.param(["--mesh", "data=2,tensor=2"], marks=pytest.mark.slow),
    ],
)
def test_micro_batches_and_meshes_count_the_same_choices(
    tiny: list[str], tmp_path: Path, flags: list[str]
) -> None:
    moe = "--preset", "moe", *TWO_LAYERS
    whole = with_flags(tiny, *moe, "--out", str(tmp_path / "a"))
    parts = with_flags(whole, "--out", str(tmp_path / "b"), *flags)
    expected, found = first_step(whole), first_step(parts)
    names = [f"expert_load_L1_E{expert}" for expert in range(1, 9)]
    # One layer of the two has experts. Eight of them, and 128 tokens choose two each.
    assert [name for name in found if name.startswith("expert_load")] == names
    loads = [found[name] for name in names]
    assert loads == [expected[name] for name in names]
    assert sum(loads) == pytest.approx(8)
    assert max(loads) == pytest.approx(1 + found["moe_max_violation"])
    assert max(loads) > 1


@pytest.mark.parametrize(
    "flags", [[], ["--loss.use-moe-balancing"], ["--loss.use-auxiliary-loss"]]
)
def test_every_way_to_balance_logs_the_load(tiny: list[str], flags: list[str]) -> None:
    sizes = ("--model.layers", "1", "--model.dense-layers", "0", "--model.experts", "4")
    names = names_of_metrics([*with_flags(tiny, *sizes), *flags])
    assert "expert_load_L1_E4" in names
    assert "expert_load_L1_E5" not in names


def make_batch() -> Batch:
    """Rows of several segments, the last tokens padding that holds garbage."""
    rng = np.random.default_rng(1)
    inputs, targets = rng.integers(0, V, (2, ROWS, LENGTH)).astype(np.int32)
    segments = np.repeat([[1] * 5 + [2] * 4 + [0] * 3], ROWS, axis=0).astype(np.int32)
    segments[1] = 1
    positions = np.array([[list(row).index(s) for s in row] for row in segments])
    positions = np.arange(LENGTH) - positions
    return Batch(*map(jnp.asarray, (inputs, targets, segments, positions)))


def make_model(kind: str) -> tuple[LanguageModel, optax.Params]:
    fields = {"vocab_size": V, "hidden_size": 16, "num_future_tokens": K}
    model = LanguageModel(
        config=ModelConfig(layers=1, width=16, heads=2),
        loss=ava_jax.create_unified_loss(fields | KINDS[kind]).config,
        columns=V + 5,
        dtype=jnp.float32,
        fused=False,
    )
    return model, random_params(model, make_batch(), 0.5)


def head_logits(model: LanguageModel, params: optax.Params, kind: str) -> np.ndarray:
    """All heads' logits [K, B, S, V], as the heads' own modules make them."""
    batch = make_batch()
    inputs = INPUTS(model, params, batch, None)
    if kind == "sequential":
        depths, head = inputs.get("mtp_hidden_states"), inputs.get("lm_head")
        assert depths is not None
        assert head is not None
        return np.asarray(depths @ head)[..., :V]
    own = cast(dict[str, dict], params)["mtp"]
    own = own["heads"] if kind == "adaptive" else own
    module = heads.MTPHeads(num_heads=K, vocab_size=V + 5)
    variables = cast(VariableDict, {"params": own})
    return np.asarray(module.apply(variables, inputs.get("hidden_states")))[..., :V]


def accuracy_by_loops(logits: np.ndarray, head: int, *, cross: bool = False) -> float:
    """How often a head is right; `cross` also looks into other segments."""
    batch = jax.tree.map(np.asarray, make_batch())
    right = total = 0
    for row, place in itertools.product(range(ROWS), range(LENGTH - head)):
        own, other = batch.segment_ids[row, [place, place + head]]
        if own > 0 and other > 0 and (own == other or cross):
            guess = logits[head - 1, row, place].argmax()
            right += int(guess == batch.targets[row, place + head])
            total += 1
    return right / total


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_right_as_often_as_loops_say(kind: str) -> None:
    model, params = make_model(kind)
    logits = head_logits(model, params, kind)
    batches = [make_batch(), make_batch()]
    record = evaluate(model, params, STATE, batches, make_mesh("data=1", ROWS))
    given = [
        "nll",
        "accuracy",
        *["tempered_nll"] * is_tempered(model.loss),
        "perplexity",
    ]
    given += ["tempered_perplexity"] * is_tempered(model.loss)
    assert list(record) == [*given, "head_accuracy_1", "head_accuracy_2"]
    expected = [accuracy_by_loops(logits, head) for head in (1, 2)]
    wrong = [accuracy_by_loops(logits, head, cross=True) for head in (1, 2)]
    assert expected != wrong
    found = [record["head_accuracy_1"], record["head_accuracy_2"]]
    assert found == pytest.approx(expected, abs=1e-6)


def test_adaptive_heads_are_asked_behind_a_closed_gate() -> None:
    model, params = make_model("adaptive")
    mesh = make_mesh("data=1", ROWS)

    def gated(bias: float) -> optax.Params:
        def change(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return leaf + bias if name == "mtp/gate/dense_2/bias" else leaf

        return jax.tree.map_with_path(change, params)

    inputs = [INPUTS(model, gated(x), make_batch(), None) for x in (-1e3, 1e3)]
    assert [bool(x.get("mtp_active")) for x in inputs] == [False, True]
    records = [
        evaluate(model, gated(x), STATE, [make_batch()], mesh) for x in (-1e3, 1e3)
    ]
    assert records[0] == records[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_gives_the_same_head_accuracies(kind: str) -> None:
    model, params = make_model(kind)
    alone, shared = (
        evaluate(model, params, STATE, [make_batch()], make_mesh(mesh, ROWS))
        for mesh in ("data=1", "data=2,tensor=2")
    )
    assert shared == pytest.approx(alone, rel=1e-5)


def test_a_head_that_never_has_a_target_has_no_accuracy() -> None:
    model, params = make_model("parallel")
    alone = make_batch()._replace(
        segment_ids=jnp.arange(1, LENGTH + 1)[None].repeat(ROWS, 0)
    )
    record = evaluate(model, params, STATE, [alone], make_mesh("data=1", ROWS))
    assert np.isfinite(record["accuracy"])
    assert np.isnan(record["head_accuracy_1"])


def own_likelihood(cap: float | None) -> tuple[dict[str, float], float, float]:
    """The record at T = 0.6; and by hand the nll at 1, and at 1 with T folded in."""
    model, params = make_model("parallel")
    loss = dataclasses.replace(model.loss, logit_soft_cap=cap)
    model, batch = model.clone(loss=loss, fused=True), make_batch()
    state = dataclasses.replace(STATE, temperature=jnp.asarray(0.6))
    record = evaluate(model, params, state, [batch], make_mesh("data=1", ROWS))

    @functools.partial(jax.jit, static_argnums=0)
    def nll(model: LanguageModel, params: optax.Params) -> jax.Array:
        hidden, _ = hidden_and_head(model, params, batch, None)
        shares = jax.nn.log_softmax(Decoder(model).logits(params, hidden))
        found = jnp.take_along_axis(shares, batch.targets[..., None], -1)[..., 0]
        return -jnp.mean(found, where=batch.segment_ids > 0)

    own = nll(*fold_own_temperature(model, params, state))
    return record, float(nll(model, params)), float(own)


@pytest.mark.parametrize("cap", [None, 1.5])
def test_held_out_text_is_judged_at_one_and_at_the_models_temperature(
    cap: float | None,
) -> None:
    record, at_one, own = own_likelihood(cap)
    assert abs(at_one - own) > 0.05
    assert record["nll"] == pytest.approx(at_one, rel=1e-5)
    assert record["tempered_nll"] == pytest.approx(own, rel=1e-5)
    assert record["tempered_perplexity"] == pytest.approx(np.exp(own), rel=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"primary_loss_type": "standard"},
        {"use_focal_loss": True},
        {"adaptive_temperature": False},
    ],
)
def test_a_model_at_temperature_one_is_left_as_it_is(fields: LossFields) -> None:
    model, params = make_model("parallel")
    loss = ava_jax.create_unified_loss({"vocab_size": V} | dict(fields)).config
    state = dataclasses.replace(STATE, temperature=jnp.asarray(0.6))
    assert not is_tempered(loss)
    _, folded = fold_own_temperature(model.clone(loss=loss), params, state)
    assert folded is params


def test_samples_are_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    first = Sample(3, "def ", 'def "ü"\n<b>')
    other = first._replace(prompt="x", text="xy")
    assert read_samples(path) == []
    for sample in (first, first, other, first):
        keep_sample(path, sample)
    assert read_samples(path) == [first, other]
    path.write_text(path.read_text()[:-5])
    assert read_samples(path) == [first]
    path.write_text('{"step": 1, "prompt": 2, "text": "x"}\n')
    with pytest.raises(TrainingError, match="a prompt and a text"):
        read_samples(path)


def test_a_run_keeps_its_sample_and_hides_the_load_from_the_table(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--steps", "2", "--sample-tokens", "4"]
    records, again = (train(tiny, tmp_path, *flags, preset="moe") for _ in range(2))
    assert "expert_load_L1_E1" in records[0]
    assert again == records
    (sample,) = read_samples(tmp_path / "samples.jsonl")
    assert (sample.step, sample.prompt) == (2, "def ")
    assert sample.text.startswith("def ")
    screen = capsys.readouterr().out
    assert "moe_max_violation" in screen
    assert "expert_load" not in screen
    assert f"show_run.py {tmp_path}" in screen
