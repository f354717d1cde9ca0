"""Distillation terms in a loss with others: numbers, denominators, errors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.distillation_batches import B, D, E, S, V, batch, on, top_k
from support.distillation_batches import run as run_function
from support.loss_checks import untyped
from support.programs import arrays_of, dot_flops
from support.trees import assert_trees_close

import ava_jax
from ava_jax import terms

EXTRA = ("teacher_logits", "teacher_hidden_states", "teacher_ids", "teacher_log_probs")
STUDENT = ("logits", "hidden_states", "lm_head", "lm_head_bias")
OPTIONS: dict[str, Any] = {"beta": 0.3, "logits_temperature": 2.0}


def call_of(x: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call from those of `distillation_loss`."""
    given: Any = {k: jax.device_put(v) for k, v in x.items() if k not in EXTRA}
    given["extra_inputs"] = {k: jax.device_put(x[k]) for k in EXTRA if k in x}
    targets = np.random.default_rng(0).integers(0, V, (B, S))
    return {**given, "targets": jnp.asarray(targets, jnp.int32)}


def forms(seed: int = 0, **widths: int) -> dict[str, Any]:
    """By how the teacher is given: the arguments of a call."""
    x = batch(seed, **widths)
    given = {"fused": x, "logits": on("logits", x), "top k": top_k(x)}
    return {form: call_of(arrays) for form, arrays in given.items()}


FORMS = tuple(forms())


def term_of(form: str, **options: Any) -> ava_jax.TokenTerm:
    if form == "top k":
        return terms.TopKDistillation(V, logits_temperature=2.0, **options)
    return terms.Distillation(**OPTIONS, **options)


def composed(*parts: Any, **options: Any) -> ava_jax.UnifiedLoss:
    given = {"implementation": "cpu", **options}
    return ava_jax.compose(parts, vocab_size=V, **given)


@functools.partial(jax.jit, static_argnums=0)
def run(loss_fn: ava_jax.UnifiedLoss, x: dict[str, Any]) -> Any:
    """The loss, `aux`, and the gradients of the student's arrays."""
    rest = {name: value for name, value in x.items() if name not in STUDENT}

    def loss(trained):
        return loss_fn(loss_fn.init(), **trained, **rest)[:2]

    trained = {name: x[name] for name in STUDENT if name in x}
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    return value, aux, grads


@pytest.mark.parametrize("form", FORMS)
def test_a_term_alone_is_the_function(form):
    x = batch(1)
    arrays = {"fused": x, "logits": on("logits", x), "top k": top_k(x)}[form]
    beta = {} if form == "top k" else {"beta": 0.3}
    want, _, wanted = run_function(arrays, temperature=2.0, **beta)
    value, aux, grads = run(composed(term_of(form, weight=0.5)), call_of(arrays))
    np.testing.assert_allclose(value, 0.5 * want, rtol=1e-6)
    np.testing.assert_allclose(aux["distillation"], value, rtol=1e-6)
    np.testing.assert_allclose(aux["main_loss"], value, rtol=1e-6)
    half = {name: 0.5 * np.asarray(wanted[name]) for name in grads}
    assert_trees_close(grads, half, 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_beside_cross_entropy_with_a_temperature_in_the_state(form):
    config = ava_jax.UnifiedLossConfig(
        vocab_size=V,
        primary_loss_type="deepseek",
        initial_temperature=1.6,
        z_loss_weight=1e-2,
        implementation="cpu",
    )
    x, term = forms(2)[form], term_of(form, weight=0.5)
    left_out = ("extra_inputs", "teacher_lm_head", "teacher_lm_head_bias")
    plain = {name: value for name, value in x.items() if name not in left_out}
    value, aux, grads = run(ava_jax.unified_loss(config, (term,)), x)
    own, main = run(composed(term), x), run(ava_jax.unified_loss(config), plain)
    np.testing.assert_allclose(value, own[0] + main[0], rtol=2e-5)
    np.testing.assert_allclose(aux["distillation"], own[0], rtol=2e-5)
    np.testing.assert_allclose(aux["z_loss"], main[1]["z_loss"], rtol=2e-5)
    assert_trees_close(
        grads, jax.tree.map(np.add, *jax.device_get((own[2], main[2]))), 2e-5
    )


def test_two_divergences_from_one_teacher():
    """Both directions, in one pass, each with a name and a temperature of its own."""
    x = forms(3)["fused"]
    parts = [
        terms.Distillation(name="forward"),
        terms.Distillation(1.0, 2.0, name="reverse", weight=0.3),
    ]
    value, aux, grads = run(composed(*parts), x)
    apart = [run(composed(part), x) for part in parts]
    np.testing.assert_allclose(value, sum(one[0] for one in apart), rtol=1e-5)
    for part, one in zip(parts, apart, strict=True):
        np.testing.assert_allclose(aux[part.name], one[0], rtol=1e-5)
    of_each = jax.device_get([one[2] for one in apart])
    wanted = jax.tree.map(lambda *g: sum(g), *of_each)
    assert_trees_close(grads, wanted, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_add_up(form):
    x, loss_fn = forms(4)[form], composed(terms.CrossEntropy(), term_of(form))
    state = loss_fn.init()
    integers = {name: x[name] for name in ("targets", "attention_mask")}
    counts = jax.jit(loss_fn.normalizers)(**integers)

    @jax.jit
    def share(x):
        value, _, stats = loss_fn.accumulate(state, normalizers=counts, **x)
        return value, stats

    rows = jax.device_get(x)
    cuts = [
        jax.tree.map(lambda v, i=i: v[i : i + 1] if v.shape[:1] == (B,) else v, rows)
        for i in range(B)
    ]
    parts = [jax.device_get(share(cut)) for cut in cuts]
    value, stats = jax.tree.map(lambda *v: jax.device_put(sum(v)), *parts)
    want, aux, _ = run(loss_fn, x)
    np.testing.assert_allclose(value, want, rtol=1e-5)

    @jax.jit
    def commit_and_summary(stats):
        after = loss_fn.commit(state, stats)
        return after, loss_fn.summary(after, stats)

    after, summary = commit_and_summary(stats)
    assert int(after.step) == 1
    assert_trees_close(summary, aux, 1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_on_a_mesh(kind, form):
    """The teacher's arrays are sharded as the student's; V is no multiple of both."""
    x = forms(5, width=V + 2, teacher_width=V + 1)[form]
    parts = terms.CrossEntropy(), term_of(form)
    want = run(composed(*parts), x)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind))
    loss_fn = composed(*parts, mesh=mesh, batch_axes="a", vocab_axis="b")

    def place(v):
        spec = P("a") if v.shape[:1] == (B,) else P()
        return jax.device_put(v, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        got = run(loss_fn, jax.tree.map(place, x))
    assert_trees_close(jax.device_get(got), jax.device_get(want), 2e-5)


def test_one_pass_does_cross_entropy_and_distillation():
    """6·N·D·V flops for the student, 2·N·E·V for the teacher; no array of N·V."""
    length, width = 48, 37
    loss_fn = ava_jax.compose(
        [terms.CrossEntropy(), terms.Distillation(0.5, 2.0)],
        vocab_size=width,
        chunk_size=8,
        block_size=8,
        implementation="cpu",
    )
    ones = functools.partial(jnp.ones, dtype=jnp.float32)

    def loss(hidden, head):
        return loss_fn(
            loss_fn.init(),
            targets=jnp.ones((B, length), jnp.int32),
            hidden_states=hidden,
            lm_head=head,
            teacher_lm_head=ones((E, width)),
            extra_inputs={"teacher_hidden_states": ones((B, length, E))},
        )[0]

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(ones((B, length, D)), ones((D, 37)))
    count = B * length * width
    assert dot_flops(jaxpr.jaxpr) == count * (6 * D + 2 * E)
    assert max(np.prod(shape) for shape, _ in arrays_of(jaxpr.jaxpr)) < count


def test_equal_terms_share_a_program():
    calls = 0

    @functools.partial(jax.jit, static_argnums=0)
    def step(loss_fn, state, x):
        nonlocal calls
        calls += 1
        return loss_fn(state, **x)

    state = composed(term_of("fused")).init()
    for seed in range(3):
        _, _, state = step(composed(term_of("fused")), state, forms(seed)["fused"])
    assert calls == 1
    assert terms.Distillation(0.5) == terms.Distillation(0.5) != terms.Distillation()
    assert len({terms.TopKDistillation(V), terms.TopKDistillation(V)}) == 1


@pytest.mark.parametrize("form", FORMS)
def test_select_and_checked(form):
    x, loss_fn = forms(6)[form], composed(terms.CrossEntropy(), term_of(form))
    offered: Any = {**x, "labels": np.ones(3)}
    offered["extra_inputs"] = {**x["extra_inputs"], "advantages": np.ones((B, S))}
    kept = loss_fn.select(offered)
    assert set(kept) == set(x)
    assert set(kept.get("extra_inputs") or {}) == set(x["extra_inputs"])
    state, checked = loss_fn.init(), ava_jax.checked(loss_fn)
    step = jax.jit(checkify.checkify(lambda x: checked(state, **x)[0]))
    error, value = step(kept)
    error.throw()
    np.testing.assert_allclose(value, run(loss_fn, x)[0], rtol=1e-6)


def test_a_loss_without_distillation_selects_no_teacher():
    loss_fn = composed(terms.CrossEntropy())
    kept = loss_fn.select(forms()["fused"])
    assert not [name for name in kept if "teacher" in name or "extra" in name]


def test_its_name_is_reserved():
    config = ava_jax.UnifiedLossConfig(vocab_size=V)
    term = terms.ZLoss(1.0, name="distillation")
    with pytest.raises(ValueError, match=r"'distillation'.*taken"):
        ava_jax.unified_loss(config, (term,))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: terms.Distillation(1.5), r"beta must be in \[0, 1\], got 1.5"),
        (lambda: terms.Distillation(-0.5), r"beta must be in \[0, 1\], got -0.5"),
        (lambda: terms.Distillation(0.0, 0.0), "logits_temperature must be .* got 0"),
        (lambda: terms.Distillation(0.0, float("nan")), "logits_temperature must be"),
        (lambda: terms.Distillation(0.0, 1.0, -2.0), "teacher_logit_soft_cap must be"),
        (lambda: terms.TopKDistillation(V, True, -1.0), "logits_temperature must be"),
    ],
)
def test_a_bad_term_is_an_error(make, words):
    with untyped(), pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("fused", {"extra_inputs": None}, "needs one of teacher_hidden_states"),
        ("fused", {"extra_inputs": {}}, "needs one of teacher_hidden_states"),
        ("fused", {"teacher_lm_head": None}, "teacher_hidden_states need teacher_lm"),
        ("logits", {"teacher_lm_head": jnp.ones((E, V))}, "teacher_lm_head and its b"),
        ("logits", {"teacher_lm_head_bias": jnp.ones(V)}, "leave them out"),
        ("top k", {"extra_inputs": None}, r"needs extra_inputs\['teacher_ids'\]"),
        ("top k", {"teacher_lm_head": jnp.ones((E, V))}, "teacher_lm_head is given"),
    ],
)
def test_what_does_not_fit_is_an_error(form, change, words):
    loss_fn = composed(terms.CrossEntropy(), term_of(form))
    with untyped(), pytest.raises(ValueError, match=words):
        loss_fn(loss_fn.init(), **{**forms()[form], **change})


def test_both_teachers_unread_entries_and_other_vocabularies_are_errors():
    given = forms()
    loss_fn = composed(term_of("fused"))
    both: Any = dict(given["fused"])
    both["extra_inputs"] = both["extra_inputs"] | given["logits"]["extra_inputs"]
    more: Any = dict(given["fused"])
    more["extra_inputs"] = more["extra_inputs"] | {"reward": jnp.ones((B, S))}
    other = composed(terms.TopKDistillation(V - 1))
    with untyped():
        with pytest.raises(ValueError, match=r"needs one of .*'teacher_logits'"):
            loss_fn(loss_fn.init(), **both)
        with pytest.raises(ValueError, match=r"\['reward'\] is given, .* leave it out"):
            loss_fn(loss_fn.init(), **more)
        with pytest.raises(ValueError, match="vocab_size=18, the loss 19"):
            other(other.init(), **given["top k"])


def test_a_teacher_without_its_term_is_an_error():
    loss_fn = composed(terms.CrossEntropy())
    given = {**forms()["fused"], "extra_inputs": None}
    with pytest.raises(ValueError, match=r"teacher_lm_head is given.*Distillation"):
        loss_fn(loss_fn.init(), **given)
