"""Distillation from a teacher: numbers, masks, widths, meshes, flops, errors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import distillation_oracles as oracles
from support.distillation_batches import (
    CPU,
    PATHS,
    B,
    D,
    E,
    S,
    V,
    batch,
    logits_of,
    on,
    run,
    top_k,
)
from support.kernel_batches import compile_for
from support.loss_checks import check_gradient
from support.programs import arrays_of, dot_flops
from support.trees import assert_trees_close

import ava_jax

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
CAPS: dict[str, Any] = {"logit_soft_cap": 3.0, "teacher_logit_soft_cap": 2.0}


def oracle(x, **options):
    """Of the batch's hidden states."""
    return oracles.distillation(
        logits_of(x), logits_of(x, "teacher_"), x["attention_mask"], **options
    )


# Numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("beta", BETAS)
def test_it_is_the_oracles(path, beta):
    x, temperature = batch(), 0.7
    options = {"beta": beta, "temperature": temperature}
    loss, aux, _ = run(on(path, x), **options, **CAPS)
    want = functools.partial(oracle, x, vocab_size=V)
    right = want(**options, soft_cap=3.0, teacher_soft_cap=2.0)
    np.testing.assert_allclose(loss, right, rtol=2e-5)
    np.testing.assert_allclose(aux["divergence"], right / temperature**2, rtol=2e-5)
    assert int(aux["num_tokens"]) == np.sum(x["attention_mask"] != 0)
    for wrong in (
        want(beta=beta, soft_cap=3.0, teacher_soft_cap=2.0),
        want(**options, soft_cap=2.0, teacher_soft_cap=3.0),
        want(**options, soft_cap=3.0),
        want(**options, teacher_soft_cap=2.0),
    ):
        assert abs(wrong - right) > 0.01 * right


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_gradient_is_that_of_numerical_differentiation(beta):
    x = batch(1)
    names = ("hidden_states", "lm_head", "lm_head_bias")
    options = {"beta": beta, "temperature": 1.3, **CAPS, **CPU}

    def loss(*student):
        wide = {name: jnp.asarray(v, float) for name, v in x.items()}
        given = {**wide, **dict(zip(names, student, strict=True))}
        return ava_jax.distillation_loss(**given, **options)[0]

    check_gradient(loss, *(x[name] for name in names))


def test_both_paths_have_one_gradient():
    x, options = batch(2), {"beta": 0.3, "temperature": 2.0, **CAPS}
    _, _, got = run(x, **options)
    given = on("logits", x)
    of_logits = run(given, **options)[2]["logits"]
    wide = np.asarray(of_logits, np.float64)
    wanted = {
        "hidden_states": wide @ x["lm_head"].T,
        "lm_head": np.einsum("bsd,bsv->dv", x["hidden_states"], wide),
        "lm_head_bias": np.sum(wide, (0, 1)),
    }
    assert_trees_close({name: got[name] for name in wanted}, wanted, 2e-5)


@pytest.mark.parametrize("path", PATHS)
def test_the_teacher_has_no_gradient(path):
    _, _, grads = run(on(path, batch(3)), beta=0.5, temperature=2.0)
    for name, gradient in grads.items():
        is_zero = not np.any(gradient)
        assert is_zero == name.startswith("teacher_"), name


@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_equal_to_the_student_is_no_loss(beta):
    z = logits_of(batch(4)).astype(np.float32)
    loss, _, grads = run({"logits": z, "teacher_logits": z}, beta=beta, temperature=2.0)
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    np.testing.assert_allclose(grads["logits"], 0, atol=1e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_extreme_logits_are_finite(beta):
    """Both are certain, of classes that differ in every other token."""
    z = np.full((B, S, V), -4e4, np.float32)
    z[..., 3] = 4e4
    y = z.copy()
    y[:, ::2] = np.roll(z, 1, -1)[:, ::2]
    given = {"logits": z, "teacher_logits": y}
    loss, _, grads = run(given, beta=beta, temperature=2.0)
    ones = np.ones((B, S))
    want = oracles.distillation(z, y, ones, vocab_size=V, beta=beta, temperature=2.0)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert np.all(np.isfinite(grads["logits"]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_impossible_classes(beta, temperature):
    """The teacher lacks one class, and both lack another."""
    given = on("logits", batch(5))
    given["teacher_logits"][..., [2, 5]] = -np.inf
    given["logits"][..., 5] = -np.inf
    options = {"beta": beta, "temperature": temperature}
    loss, _, grads = run(given, **options)
    arrays = (given[k] for k in ("logits", "teacher_logits", "attention_mask"))
    want = oracles.distillation(*arrays, vocab_size=V, **options)
    np.testing.assert_allclose(loss, want, rtol=2e-5)
    np.testing.assert_array_equal(grads["logits"][..., 5], 0)
    assert np.any(grads["logits"][..., 2])


def test_a_class_that_the_student_alone_lacks_has_no_gradient():
    """The loss is infinite, whatever the temperature."""
    given = on("logits", batch(5))
    given["logits"][..., 5] = -np.inf
    for temperature in (1.0, 2.0):
        loss, _, grads = run(given, beta=0.0, temperature=temperature)
        assert loss == np.inf
        np.testing.assert_array_equal(grads["logits"][..., 5], 0)


def test_operands_of_half_precision():
    x = batch(6)
    half = {name: v.astype(jnp.bfloat16) for name, v in x.items()}
    rounded = {name: np.asarray(v, np.float32) for name, v in half.items()}
    loss, aux, grads = run(half, beta=0.5, temperature=2.0)
    assert loss.dtype == aux["divergence"].dtype == jnp.float32
    assert {g.dtype for g in grads.values()} == {jnp.dtype(jnp.bfloat16)}
    # Products of bfloat16 are exact in float32, and so are their sums here, nearly.
    want = run(rounded, beta=0.5, temperature=2.0)
    np.testing.assert_allclose(loss, want[0], rtol=2e-5)
    assert_trees_close(grads, want[2], 2e-2)
    mixed = {**x, "hidden_states": half["hidden_states"]}
    mixed["teacher_lm_head"] = half["teacher_lm_head"]
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(run(mixed)[0], run(x)[0], rtol=2e-2)


# Masks and widths ------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_masked_tokens_may_hold_anything(path, beta):
    given = on(path, batch(7))
    masked = given["attention_mask"] == 0
    spoilt = dict(given)
    values = np.array([np.nan, np.inf, -np.inf], np.float32)
    for name, value in given.items():
        if value.ndim == 3:
            spoilt[name] = value.copy()
            spoilt[name][masked] = np.resize(values, spoilt[name][masked].shape)
    want = run(given, beta=beta, temperature=2.0)
    got = run(spoilt, beta=beta, temperature=2.0)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for name, gradient in got[2].items():
        if gradient.ndim == 3:
            np.testing.assert_array_equal(gradient[masked], 0)
            assert name.startswith("teacher_") or np.any(gradient[~masked])


@pytest.mark.parametrize("path", PATHS)
def test_without_an_unmasked_token_it_is_zero(path):
    given = on(path, batch(8))
    given["attention_mask"][:] = 0
    loss, aux, grads = run(given)
    assert float(loss) == float(aux["divergence"]) == int(aux["num_tokens"]) == 0
    assert not any(np.any(g) for g in grads.values())


def test_a_mask_of_bools_and_no_mask():
    x = batch(9)
    mask = x["attention_mask"] != 0
    bools = run({**x, "attention_mask": mask})
    floats = run({**x, "attention_mask": mask.astype(np.float32)})
    assert_trees_close(bools, floats, 1e-6)
    del x["attention_mask"]
    ones = {**x, "attention_mask": np.ones((B, S), np.float32)}
    assert_trees_close(run(x), run(ones), 1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "widths",
    [(V + 2, V), (V, V + 3), (V + 5, V + 2)],
    ids=["student", "teacher", "both"],
)
def test_padded_columns_take_no_part(path, widths):
    """Whichever of both is wider; on the logits path they may hold NaN."""
    x = batch(10, *widths)
    given = on(path, x)
    if path == "logits":
        given["logits"][..., V:] = np.nan
        given["teacher_logits"][..., V:] = np.nan
    loss, _, grads = run(given, vocab_size=V, beta=0.5, temperature=2.0)
    want = oracle(x, vocab_size=V, beta=0.5, temperature=2.0)
    np.testing.assert_allclose(loss, want, rtol=2e-5)
    for name in ("lm_head", "lm_head_bias", "logits"):
        if name in grads:
            np.testing.assert_array_equal(grads[name][..., V:], 0)
            assert np.all(np.isfinite(grads[name]))
    for name, gradient in grads.items():
        assert gradient.shape == given[name].shape


# How the pass goes -----------------------------------------------------------------


def forms(seed=20, **widths):
    x = batch(seed, **widths)
    return {"fused": x, "logits": on("logits", x), "top k": top_k(x)}


FORMS = tuple(forms())


def beta_of(form):
    return {} if form == "top k" else {"beta": 0.3}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": 3},
        {"chunk_size": 5, "block_size": 2},
        {"implementation": "xla"},
        {"implementation": "xla", "chunk_size": 4, "block_size": 2},
        {"implementation": "reference"},
        {"implementation": None},
    ],
    ids=str,
)
def test_how_it_is_computed_changes_nothing(form, options):
    given, common = forms()[form], {"temperature": 2.0, **beta_of(form)}
    assert_trees_close(run(given, **common, **options), run(given, **common), 2e-5)


@pytest.mark.parametrize(
    ("platform", "rounds", "chunk"),
    [("gpu", False, 7), ("tpu", False, 5), ("tpu", True, 6)],
)
@pytest.mark.parametrize("form", FORMS)
def test_the_programs_of_accelerators(monkeypatch, platform, rounds, chunk, form):
    """Whole logits are needed, so that a TPU rounds no exponentials, but of top k."""
    given, common = forms()[form], {"temperature": 2.0, **beta_of(form)}
    want = run(given, **common)
    compile_for(monkeypatch, platform, rounds=rounds)
    # No other test has this size: what is compiled for a CPU is not what is meant.
    got = run(given, **common, chunk_size=chunk, implementation="xla")
    is_rounded = rounds and form == "top k"
    assert_trees_close(got[:2], want[:2], 2e-5)
    assert_trees_close(got[2], want[2], 2**-9 if is_rounded else 2e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "axes",
    [
        {"vocab_axis": "a"},
        {"batch_axes": "a", "vocab_axis": "b"},
        {"batch_axes": "a", "sequence_axis": "b"},
        {"sequence_axis": "a", "vocab_axis": "b"},
    ],
    ids=lambda axes: "-".join(axes),
)
def test_on_a_mesh(kind, form, axes):
    """V is no multiple of the axis, and the teacher's width not the student's."""
    given = forms(21, width=V + 2, teacher_width=V + 1)[form]
    options = {"temperature": 2.0, "vocab_size": V, **beta_of(form)}
    want = run(given, **options)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind))
    rows, length = axes.get("batch_axes"), axes.get("sequence_axis")
    with jax.set_mesh(mesh):
        spread = {
            name: jax.device_put(
                x, NamedSharding(mesh, P(rows, length) if x.ndim > 2 else P())
            )
            for name, x in given.items()
        }
        got = run(spread, mesh=mesh, **axes, **options)
    assert_trees_close(jax.device_get(got), jax.device_get(want), 2e-5)


def test_micro_batches_add_up():
    x, options = batch(22), {"beta": 0.5, "temperature": 2.0}
    want = run(x, **options)
    total = float(np.sum(x["attention_mask"]))
    parts = []
    for row in range(B):
        own = {k: v[row : row + 1] if v.shape[:1] == (B,) else v for k, v in x.items()}
        loss, aux, grads = run(own, num_tokens=total, **options)
        parts.append((loss, aux["divergence"], aux["num_tokens"], grads["lm_head"]))
    got = jax.tree.map(lambda *x: sum(x), *jax.device_get(parts))
    _, aux, grads = want
    wanted = (want[0], aux["divergence"], aux["num_tokens"], grads["lm_head"])
    assert_trees_close(got, wanted, 1e-6)


LONG, WIDE = 64, 41


def program(x, differentiated, **options):
    rest = {k: jax.device_put(v) for k, v in x.items() if k not in differentiated}

    def loss(trained):
        given = {**rest, **trained, **CPU, **options}
        return ava_jax.distillation_loss(**given)[0]

    trained = {k: jax.device_put(x[k]) for k in differentiated}
    function = jax.grad(loss) if differentiated else loss
    return jax.make_jaxpr(function)(trained).jaxpr


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize(
    ("differentiated", "factor"),
    [(("hidden_states", "lm_head"), 6), (("lm_head",), 4), ((), 2)],
)
def test_flops_and_memory(implementation, differentiated, factor):
    """From hidden states of both; no array has the size of all logits."""
    rng = np.random.default_rng(0)
    shapes = {
        "hidden_states": (B, LONG, D),
        "lm_head": (D, WIDE),
        "teacher_hidden_states": (B, LONG, E),
        "teacher_lm_head": (E, WIDE),
    }
    x = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    options = {"chunk_size": 8, "block_size": 8, "implementation": implementation}
    jaxpr = program(x, differentiated, beta=0.5, **options)
    count = B * LONG * WIDE
    # One column is sampled for a shift of all logits.
    sampled = 2 * B * LONG * D if implementation == "xla" else 0
    assert dot_flops(jaxpr) == count * (factor * D + 2 * E) + sampled
    assert max(np.prod(shape) for shape, _ in arrays_of(jaxpr)) < count


def test_a_second_step_does_not_recompile():
    calls = 0

    @jax.jit
    def step(x):
        nonlocal calls
        calls += 1
        return ava_jax.distillation_loss(**x, **CPU)[0]

    for seed in range(3):
        step({k: jax.device_put(v) for k, v in batch(seed).items()})
    assert calls == 1
