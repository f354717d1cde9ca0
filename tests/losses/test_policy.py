"""Policy losses: the oracle's numbers, gradients, masks, micro-batches, errors."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.loss_checks import check_explicit_axes, check_gradient
from support.policy_batches import (
    ARRAYS,
    EVERYTHING,
    KINDS,
    B,
    Batch,
    S,
    batch,
    needed,
    on_device,
    run,
)
from support.post_training_oracles import CLIPPED, MEANS_OF_ROWS, PolicyOracle

from ava_jax import losses


def check(x: Batch, **options: Any) -> None:
    """Compares loss and `aux` with the oracle's."""
    loss, aux, _ = run(on_device(x), **options)
    oracle = PolicyOracle(x, **options)
    np.testing.assert_allclose(loss, oracle.loss(), rtol=2e-5, atol=1e-6)
    want = oracle.aux()
    assert sorted(aux) == sorted(want)
    for name, value in want.items():
        np.testing.assert_allclose(aux[name], value, 2e-5, 1e-6, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_oracle(kind: str) -> None:
    for seed in range(3):
        check(batch(seed), kind=kind, **EVERYTHING, **needed(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_with_nothing_but_the_policy(kind: str) -> None:
    x = {name: batch()[name] for name in ("log_probs", "advantages", "mask")}
    check(x, kind=kind, **needed(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_of_tokens(kind: str) -> None:
    x = batch()
    x["advantages"] = np.random.default_rng(1).normal(size=(B, S)).astype(np.float32)
    check(x, kind=kind, **EVERYTHING, **needed(kind))


@pytest.mark.parametrize("kind", CLIPPED)
def test_bounds(kind: str) -> None:
    options = {"clip_low": 0.1, "clip_high": 0.28, **needed(kind)}
    x = batch()
    check(x, kind=kind, **options)
    check(x, kind=kind, ratio_cap=1.1, **options)
    check(x, kind=kind, ratio_cap=1.5, **options)
    wide = run(on_device(x), kind=kind, **needed(kind), clip_low=9.0, clip_high=9.0)
    narrow = run(on_device(x), kind=kind, **options)
    assert abs(wide[0] - narrow[0]) > 1e-3
    assert wide[1]["clip_fraction"] == 0 < narrow[1]["clip_fraction"]


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_ratio_of_the_row(kind: str) -> None:
    options = {"ratio_level": "sequence", **needed(kind)}
    check(batch(), kind=kind, **EVERYTHING, **options)
    x = on_device(batch())
    ratios = [run(x, kind=kind, **needed(kind))[1]["mean_ratio"]]
    ratios.append(run(x, kind=kind, **options)[1]["mean_ratio"])
    assert abs(ratios[0] - ratios[1]) > 1e-2


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_divergence(estimator: str) -> None:
    options = {"kl_weight": 0.5, "kl_estimator": estimator}
    if estimator != "k1":
        check(batch(), **options)
    check(batch(), kl_estimator=estimator)
    check(batch(), **options, kl_importance_weighting=True)
    check(batch(), **options, kl_importance_weighting=True, ratio_level="sequence")


def test_options_of_single_kinds() -> None:
    check(batch(), kind="cispo", clip_high=1.2)
    check(batch(), kind="sapo", sapo_temperatures=(0.7, 2.0))


def test_cispo_caps_the_ratio_itself() -> None:
    x = {name: batch()[name] for name in ("log_probs", "advantages", "mask")}
    want = run(on_device(x), kind="cispo")[0]
    got = run(on_device(x), kind="cispo", clip_high=0.2)[0]
    np.testing.assert_allclose(got, 0.2 * want, rtol=1e-6)


def test_vespo_bounds_each_ratio_and_the_weight() -> None:
    """The first row's ratios end at a product of 1, the third row's below 1e-8."""
    log_ratio = np.array([[30, -25], [0, 0], [-15, -15], [0.4, 19]], np.float32)
    x = {
        "log_probs": np.full((4, 2), -1, np.float32),
        "old_log_probs": -1 - log_ratio,
        "advantages": np.array([1, 1, -1, -1], np.float32),
        "mask": np.ones((4, 2), np.float32),
    }
    for row in range(4):
        alone = {name: y[row : row + 1] for name, y in x.items()}
        loss = run(on_device(alone), kind="vespo")[0]
        want = PolicyOracle(alone, kind="vespo").loss()
        np.testing.assert_allclose(loss, want, rtol=1e-4)
    # φ is 1 at w = 1, and at the lower bound that of w = 1e-8.
    rows = [
        run(on_device({k: y[i : i + 1] for k, y in x.items()}), kind="vespo")[0]
        for i in (0, 2)
    ]
    np.testing.assert_allclose(rows, [1, -math.exp(2) * 1e-24], rtol=1e-4)


def test_aux_has_no_gradient() -> None:
    x = on_device(batch())

    def reported(log_probs: jax.Array) -> jax.Array:
        arrays: dict[str, Any] = {name: x[name] for name in ARRAYS}
        _, aux = losses.policy_loss(log_probs, x["advantages"], x["mask"], **arrays)
        return sum(aux.values(), jnp.zeros(()))

    assert not np.any(jax.jit(jax.grad(reported))(x["log_probs"]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient(kind: str) -> None:
    """Finite differences, with what has no gradient held fixed."""
    x = batch(3)
    names = [name for name in ARRAYS if name != "entropy"]
    options = {**EVERYTHING, **needed(kind)}

    def loss(log_probs: jax.Array, entropy: jax.Array) -> jax.Array:
        constants: dict[str, Any] = {name: jax.device_put(x[name]) for name in names}
        return losses.policy_loss(
            log_probs,
            jax.device_put(x["advantages"]),
            jax.device_put(x["mask"]),
            kind=kind,
            entropy=entropy,
            **constants,
            **options,
        )[0]

    if kind not in ("cispo", "vespo"):
        check_gradient(loss, x["log_probs"], x["entropy"])
        return
    # φ and the ratio of these have no gradient: the loss is linear in log_probs.
    loss_of, aux, grads = run(
        on_device(x), **{**options, "kl_weight": 0.0, "kind": kind}
    )
    total = np.sum(np.asarray(grads["log_probs"]) * x["log_probs"])
    np.testing.assert_allclose(total, aux["policy_loss"], rtol=1e-5)
    assert np.isfinite(loss_of)


def test_the_ratio_of_an_unknown_old_policy_has_a_gradient() -> None:
    x = {name: batch()[name] for name in ("log_probs", "advantages", "mask")}
    for bounds in ({}, {"clip_low": 0.0, "clip_high": 0.0}):
        _, aux, grads = run(on_device(x), kind="dapo", **bounds)
        want = -x["advantages"][:, None] * x["mask"] / x["mask"].sum()
        np.testing.assert_allclose(grads["log_probs"], want, rtol=1e-5)
        assert aux["mean_ratio"] == 1
        assert aux["clip_fraction"] == 0


def test_a_clipped_ratio_has_no_gradient() -> None:
    """A positive advantage ends above the range, a negative one below it."""
    log_ratio = np.log(np.array([[1.5, 0.5], [1.5, 0.5]], np.float32))
    x = {
        "log_probs": log_ratio,
        "old_log_probs": np.zeros((2, 2), np.float32),
        "advantages": np.array([1, -1], np.float32),
        "mask": np.ones((2, 2), np.float32),
    }
    _, aux, grads = run(on_device(x), kind="dapo")
    np.testing.assert_array_equal(
        np.asarray(grads["log_probs"]) != 0, [[False, True], [True, False]]
    )
    assert aux["clip_fraction"] == 0.5
    capped = run(on_device(x), kind="dapo", ratio_cap=1.4)[2]["log_probs"]
    np.testing.assert_array_equal(
        np.asarray(capped) != 0, [[False, True], [False, False]]
    )


def test_constants_have_no_gradient() -> None:
    x = on_device(batch())
    names = ("advantages", "old_log_probs", "ref_log_probs", "sampler_weights")

    def loss(constants: dict[str, jax.Array]) -> jax.Array:
        y = {**x, **constants}
        arrays: dict[str, Any] = {name: y[name] for name in ARRAYS}
        return losses.policy_loss(
            y["log_probs"], y["advantages"], y["mask"], **arrays, kl_weight=0.5
        )[0]

    for grad in jax.jit(jax.grad(loss))({name: x[name] for name in names}).values():
        assert not np.any(grad)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_positions_may_hold_anything(kind: str) -> None:
    x, dirty = batch(), batch()
    x["advantages"] = dirty["advantages"] = x["advantages"][:, None] * np.ones((1, S))
    dirty["advantages"] = dirty["advantages"].copy()
    masked = x["mask"] == 0
    for index, name in enumerate(("log_probs", "advantages", *ARRAYS)):
        dirty[name][masked] = (np.nan, np.inf, -np.inf)[index % 3]
    options = {**EVERYTHING, **needed(kind), "kind": kind}
    want, got = run(on_device(x), **options), run(on_device(dirty), **options)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b)
    for grad in got[2].values():
        assert not np.any(np.asarray(grad)[masked])


def test_an_advantage_of_a_masked_row_may_be_nan() -> None:
    x, dirty = batch(), batch()
    dirty["advantages"][1] = np.nan
    for kind in KINDS:
        want = run(on_device(x), kind=kind, **needed(kind))
        got = run(on_device(dirty), kind=kind, **needed(kind))
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_unmasked_is_zero(kind: str) -> None:
    x = {**batch(), "mask": np.zeros((B, S), np.float32)}
    loss, aux, grads = run(on_device(x), kind=kind, **EVERYTHING, **needed(kind))
    assert loss == 0
    assert not any(jax.tree.leaves(aux))
    assert not any(np.any(grad) for grad in grads.values())


@pytest.mark.parametrize("dtype", [bool, np.int32])
def test_masks_of_other_types(dtype: type) -> None:
    x = batch()
    x["mask"] = (x["mask"] != 0).astype(np.float32)
    y = {**x, "mask": x["mask"].astype(dtype)}
    assert run(on_device(x))[0] == run(on_device(y))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up(kind: str) -> None:
    """Rows fall unevenly, and one micro-batch has a row without tokens."""
    x = batch(5, rows=6)
    whole = run(on_device(x), kind=kind, **EVERYTHING, **needed(kind))
    counts = {"num_tokens": jax.device_put(x["mask"].sum())}
    if kind in MEANS_OF_ROWS:
        counts["num_rows"] = jnp.asarray(6.0)
    options = {**EVERYTHING, **needed(kind), **counts, "kind": kind}
    parts = [
        run(on_device({name: y[rows] for name, y in x.items()}), **options)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    for name in ("log_probs", "entropy"):
        grad = np.concatenate([part[2][name] for part in parts])
        np.testing.assert_allclose(grad, whole[2][name], rtol=1e-5, atol=1e-7)
    sums = jax.tree.map(lambda a, b: a + b, parts[0][:2], parts[1][:2])
    for a, b in zip(jax.tree.leaves(sums), jax.tree.leaves(whole[:2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    alone = [run(on_device(x), kind=kind, **needed(kind))[0]] * 2
    assert abs(sum(alone) / 2 - sums[0]) > 1e-3


def test_counts_may_be_numbers() -> None:
    x = on_device(batch())
    rows = jnp.asarray(6, jnp.int32)
    want = run(x, num_tokens=jnp.asarray(9.0), num_rows=jnp.asarray(6.0))[0]
    assert run(x, num_tokens=jnp.asarray(9, jnp.int32), num_rows=rows)[0] == want

    @jax.jit
    def with_numbers(x: dict[str, jax.Array]) -> jax.Array:
        arrays: dict[str, Any] = {name: x[name] for name in ARRAYS}
        given = (x["log_probs"], x["advantages"], x["mask"])
        return losses.policy_loss(*given, **arrays, num_tokens=9, num_rows=6)[0]

    loss = with_numbers(x)
    np.testing.assert_allclose(loss, want, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_huge_ratios(kind: str) -> None:
    """Log ratios of ±100 and ±1e4, which overflow a float32, with either sign of A."""
    gaps = np.array([[100.0, -100.0, 1e4, -1e4, 0.0]] * 3, np.float32)
    x = {
        "log_probs": gaps,
        "old_log_probs": np.zeros_like(gaps),
        "ref_log_probs": np.zeros_like(gaps),
        "advantages": np.array([1, -1, 0], np.float32),
        "mask": np.ones_like(gaps),
    }
    levels = ("token", "sequence") if kind not in ("luspo", "vespo") else (None,)
    for level in levels:
        options = {"kind": kind, "ratio_level": level, **needed(kind)}
        loss, aux, grads = run(on_device(x), kl_weight=0.1, **options)
        for leaf in jax.tree.leaves((loss, aux, grads)):
            assert np.isfinite(leaf).all()
    _, _, grads = run(on_device(x), kind=kind, **needed(kind))
    if kind in ("grpo", "bnpo", "dr_grpo", "dapo"):
        # Where a huge ratio belongs to a bad token, its gradient still points away.
        assert grads["log_probs"][1, 0] > 0
        assert grads["log_probs"][1, 2] > 0


def test_bfloat16_gives_float32() -> None:
    low = {name: jnp.asarray(y, jnp.bfloat16) for name, y in batch().items()}
    loss, aux, grads = run(low, **EVERYTHING)
    assert {leaf.dtype for leaf in jax.tree.leaves((loss, aux))} == {jnp.dtype("f4")}
    assert {grad.dtype for grad in grads.values()} == {jnp.dtype(jnp.bfloat16)}
    wide = {name: y.astype(jnp.float32) for name, y in low.items()}
    np.testing.assert_allclose(loss, run(wide, **EVERYTHING)[0], rtol=1e-6)


def test_vmap() -> None:
    stacked = [on_device(batch(seed)) for seed in range(3)]
    many = jax.tree.map(lambda *y: jnp.stack(y), *stacked)
    got = jax.jit(jax.vmap(lambda x: run(x, **EVERYTHING)[0]))(many)
    want = [run(x, **EVERYTHING)[0] for x in stacked]
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "luspo", "vespo"])
def test_rows_on_eight_devices(kind: str) -> None:
    x = on_device(batch(rows=8))
    mesh = jax.make_mesh((8,), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    split = {name: jax.device_put(y, rows) for name, y in x.items()}
    want, got = run(x, kind=kind, **EVERYTHING), run(split, kind=kind, **EVERYTHING)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_explicit_axes() -> None:
    x = on_device(batch())
    advantages, mask = x["advantages"], x["mask"]

    def loss(log_probs: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
        return losses.policy_loss(log_probs, advantages, mask, kind="luspo")[0]

    check_explicit_axes(loss, x["log_probs"], advantages, mask)


# Errors --------------------------------------------------------------------------

ERRORS = [
    ({"kind": "grop"}, "did you mean 'grpo'"),
    ({"kind": "dr_grpo"}, "dr_grpo.* needs max_length"),
    ({"max_length": 3}, "max_length is given, but kind='grpo'.*dr_grpo"),
    ({"kind": "dapo", "num_rows": 3}, "num_rows is given, but kind='dapo'"),
    ({"kind": "cispo", "ratio_cap": 2.0}, "ratio_cap is given, but kind='cispo'"),
    ({"sapo_temperatures": (1.0, 1.0)}, "sapo_temperatures is given"),
    ({"kind": "luspo", "ratio_level": "token"}, "ratio_level='token'.*'luspo'"),
    ({"kind": "vespo", "ratio_level": "sequence"}, "ratio_level='sequence'.*'vespo'"),
    ({"ratio_level": "row"}, "unknown ratio_level 'row'"),
    ({"kl_weight": 0.1}, "kl_weight needs ref_log_probs"),
    ({"kl_estimator": "k3"}, "kl_estimator needs ref_log_probs"),
    ({"kl_importance_weighting": True}, "kl_importance_weighting needs ref_log_probs"),
    ({"kl_estimator": "k4"}, "unknown kl_estimator 'k4'"),
    ({"entropy_weight": 0.1}, "entropy_weight needs entropy"),
    ({"clip_low": -0.1}, r"clip_low must be in \[0, 1\], got -0.1"),
    ({"clip_high": -0.1}, r"clip_high must be in \[0"),
    ({"ratio_cap": 0.0}, r"ratio_cap must be in \(0, inf\), got 0.0"),
    ({"kind": "sapo", "sapo_temperatures": (1.0, 0.0)}, "sapo_temperatures must be"),
    ({"kind": "dr_grpo", "max_length": 0}, r"max_length must be in \(0"),
    ({"num_tokens": -1}, r"num_tokens must be in \[0"),
    ({"num_rows": -1}, r"num_rows must be in \[0"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS, ids=lambda x: str(x)[:40])
def test_errors(options: dict[str, Any], message: str) -> None:
    x = jnp.zeros((B, S))
    with pytest.raises(ValueError, match=message):
        losses.policy_loss(x, jnp.zeros(B), x, **options)


@pytest.mark.parametrize("kind", ["sapo", "vespo", "cispo"])
def test_bounds_that_a_kind_does_not_clip_at_are_only_counted(kind: str) -> None:
    log_probs = jnp.log(jnp.array([[0.5, 1.0, 2.0, 1.0]]))
    arrays = (log_probs, jnp.ones(1), jnp.ones((1, 4)))
    old = {"old_log_probs": jnp.zeros((1, 4)), "kind": kind}
    loss, aux = losses.policy_loss(*arrays, **old)
    same, low = losses.policy_loss(*arrays, clip_low=0.2, **old)
    assert (float(loss), float(aux["clip_fraction"])) == (float(same), 0.0)
    assert float(low["clip_fraction"]) == 0.25
    if kind != "cispo":
        same, both = losses.policy_loss(*arrays, clip_low=0.2, clip_high=0.3, **old)
        assert (float(loss), float(both["clip_fraction"])) == (float(same), 0.5)


def test_a_traced_weight_needs_its_array() -> None:
    x = jnp.zeros((B, S))
    for name, array in (("kl_weight", "ref_log_probs"), ("entropy_weight", "entropy")):
        options: dict[str, Any] = {name: jnp.asarray(0.0)}
        with pytest.raises(ValueError, match=f"{name} needs {array}"):
            losses.policy_loss(x, jnp.zeros(B), x, **options)


@pytest.mark.usefixtures("unannotated")
def test_shapes_are_named() -> None:
    x, other = jnp.zeros((B, S)), jnp.zeros((B, S + 1))
    message = r"{} must have the shape \(4, 5\) of log_probs, got \(4, 6\)"
    for name in ARRAYS:
        options: dict[str, Any] = {name: other}
        with pytest.raises(ValueError, match=message.format(name)):
            losses.policy_loss(x, jnp.zeros(B), x, **options)
    with pytest.raises(ValueError, match=message.format("mask")):
        losses.policy_loss(x, jnp.zeros(B), other)
    with pytest.raises(ValueError, match=r"advantages must be \(4,\).*got \(5,\)"):
        losses.policy_loss(x, jnp.zeros(S), x)
    with pytest.raises(ValueError, match=r"log_probs must be \[B, S\], got float32"):
        losses.policy_loss(x[0], jnp.zeros(B), x[0])
    with pytest.raises(TypeError, match="log_probs must be floating point, got int32"):
        losses.policy_loss(x.astype(jnp.int32), jnp.zeros(B), x)
    with pytest.raises(ValueError, match=message.format("advantages")):
        losses.policy_values(x, other)
