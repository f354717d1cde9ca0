"""Preference losses: the oracle's numbers, gradients, extremes, errors."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray
from support import post_training_oracles as oracles
from support.loss_checks import check_gradient

from ava_jax import losses

P = 5
SMOOTHED = {"robust": 0.2, "exo_pair": 0.05}
KINDS = (
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)
NAMES = ("chosen", "rejected", "ref_chosen", "ref_rejected")
REPORTED = ("accuracy", "chosen_rewards", "margin", "rejected_rewards")


def rows(count: int = 4, pairs: int = P, seed: int = 0) -> list[NDArray]:
    """Log-probabilities of `count` sets of rows."""
    rng = np.random.default_rng(seed)
    return [-rng.exponential(4, pairs).astype(np.float32) for _ in range(count)]


def options_of(kind: str) -> dict[str, Any]:
    return {"label_smoothing": SMOOTHED[kind]} if kind in SMOOTHED else {}


Result = tuple[jax.Array, dict[str, jax.Array]]


@functools.partial(jax.jit, static_argnames=("loss", "kind"))
def run(loss: Callable[..., Result], *arrays: jax.Array, **options: Any) -> Any:
    """The losses, `aux`, and the gradients of the sum for all arrays."""

    def total(*arrays: jax.Array) -> tuple[jax.Array, Any]:
        pairs, aux = loss(*arrays, **options)
        return jnp.sum(pairs), (pairs, aux)

    numbers = tuple(range(len(arrays)))
    grads, (pairs, aux) = jax.grad(total, numbers, has_aux=True)(*arrays)
    return pairs, aux, grads


@functools.cache
def with_options(loss: Callable[..., Result], **options: Any) -> Callable[..., Result]:
    """The same object for the same options, so that `run` compiles it once."""
    return functools.partial(loss, **options)


def on_device(arrays: Sequence[NDArray]) -> list[jax.Array]:
    return [jax.device_put(x) for x in arrays]


def dpo(kind: str, arrays: list[NDArray], **options: Any) -> Any:
    """`dpo_loss` and its oracle's losses."""
    options = {**options_of(kind), **options}
    # Numbers, not traced: the checks see them.
    loss = with_options(losses.dpo_loss, kind=kind, **options)
    pairs = zip(*arrays, strict=True)
    want = [oracles.dpo(kind, *map(float, pair), **options) for pair in pairs]
    return *run(loss, *on_device(arrays)), want


@pytest.mark.parametrize("kind", KINDS)
def test_dpo(kind: str) -> None:
    for beta in (0.1, 0.7):
        pairs, aux, _, want = dpo(kind, rows(), beta=beta)
        np.testing.assert_allclose(pairs, want, rtol=2e-5)
        chosen, rejected, ref_chosen, ref_rejected = rows()
        a, b = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
        assert tuple(sorted(aux)) == REPORTED
        np.testing.assert_allclose(aux["chosen_rewards"], a, rtol=1e-5)
        np.testing.assert_allclose(aux["rejected_rewards"], b, rtol=1e-5)
        np.testing.assert_allclose(aux["margin"], a - b, rtol=1e-5)
        np.testing.assert_array_equal(aux["accuracy"], a > b)
        assert 0 < np.mean(a > b) < 1


def test_kinds_differ() -> None:
    sums = {kind: float(np.sum(dpo(kind, rows(), beta=0.1)[0])) for kind in KINDS}
    assert len({round(value, 4) for value in sums.values()}) == len(KINDS)


def test_temperature_of_discopop() -> None:
    pairs, _, _, want = dpo("discopop", rows(), discopop_temperature=0.5)
    np.testing.assert_allclose(pairs, want, rtol=2e-5)
    default = dpo("discopop", rows())[0]
    np.testing.assert_array_equal(
        default, dpo("discopop", rows(), discopop_temperature=0.05)[0]
    )
    assert abs(np.sum(default) - np.sum(pairs)) > 1e-2


def test_robust_without_smoothing_is_sigmoid() -> None:
    robust = dpo("robust", rows(), label_smoothing=0.0)[0]
    np.testing.assert_allclose(robust, dpo("sigmoid", rows())[0], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_dpo(kind: str) -> None:
    chosen, rejected, ref_chosen, ref_rejected = rows(seed=2)

    def loss(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
        refs = jax.device_put(ref_chosen), jax.device_put(ref_rejected)
        pairs, _ = losses.dpo_loss(
            chosen, rejected, *refs, kind=kind, **options_of(kind)
        )
        return jnp.sum(pairs)

    check_gradient(loss, chosen, rejected)
    grads = dpo(kind, rows(seed=2), beta=0.1)[2]
    assert np.any(grads[0])
    assert not np.any(grads[2])
    assert not np.any(grads[3])


@pytest.mark.parametrize("kind", KINDS)
def test_extremes_of_dpo(kind: str) -> None:
    """Log-ratios up to ±1e4, where e^h overflows."""
    ends = np.array([1e4, -1e4, 0.0, 1.0, -1.0], np.float32)
    none = np.zeros_like(ends)
    for beta in (0.1, 1.0):
        loss = with_options(losses.dpo_loss, kind=kind, **options_of(kind), beta=beta)
        for arrays in ([ends, -ends, none, none], [ends, none, none, -ends]):
            for leaf in jax.tree.leaves(run(loss, *on_device(arrays))):
                assert np.isfinite(leaf).all()


def without_reference(name: str) -> tuple[Callable[..., Result], Callable[..., float]]:
    """A loss and its oracle."""
    if name == "orpo":
        return losses.orpo_loss, oracles.orpo
    if name == "cpo":
        loss = with_options(losses.cpo_loss, label_smoothing=0.1)
        return loss, functools.partial(oracles.smoothed, gamma=0.0, eps=0.1)
    loss = with_options(losses.simpo_loss, gamma=0.7, label_smoothing=0.1)
    return loss, functools.partial(oracles.smoothed, gamma=0.7, eps=0.1)


@pytest.mark.parametrize("name", ["orpo", "cpo", "simpo"])
def test_losses_without_a_reference(name: str) -> None:
    loss, oracle = without_reference(name)
    chosen, rejected = rows(2)
    for beta in (0.1, 2.0):
        loss_of = functools.partial(loss, beta=beta)
        pairs, aux, _ = run(loss_of, *on_device([chosen, rejected]))
        want = [
            oracle(float(a), float(b), beta=beta)
            for a, b in zip(chosen, rejected, strict=True)
        ]
        np.testing.assert_allclose(pairs, want, rtol=2e-5)
        assert tuple(sorted(aux)) == REPORTED
        np.testing.assert_allclose(aux["margin"], beta * (chosen - rejected), rtol=1e-5)
        np.testing.assert_array_equal(aux["accuracy"], chosen > rejected)


@pytest.mark.parametrize("name", ["orpo", "cpo", "simpo"])
def test_gradients_without_a_reference(name: str) -> None:
    loss, _ = without_reference(name)
    check_gradient(lambda a, b: jnp.sum(loss(a, b)[0]), *rows(2))


@pytest.mark.parametrize("name", ["orpo", "cpo", "simpo"])
def test_extremes_without_a_reference(name: str) -> None:
    loss, _ = without_reference(name)
    low = np.array([-1e4, -1e4, -1e-30, 0.0, -1e4], np.float32)
    for chosen, rejected in ((low, low[::-1]), (low, low), (low, 0 * low - 1)):
        for leaf in jax.tree.leaves(run(loss, chosen, rejected)):
            assert np.isfinite(leaf).all()


def test_defaults() -> None:
    a, b = on_device(rows(2))
    for got, want in (
        (losses.orpo_loss(a, b), losses.orpo_loss(a, b, beta=0.1)),
        (losses.cpo_loss(a, b), losses.cpo_loss(a, b, beta=0.1, label_smoothing=0.0)),
        (losses.simpo_loss(a, b), losses.simpo_loss(a, b, beta=2.0, gamma=0.5)),
        (losses.dpo_loss(a, b, b, b), losses.dpo_loss(a, b, b, b, beta=0.1)),
    ):
        np.testing.assert_array_equal(got[0], want[0])


def test_orpo_is_exact_next_to_certainty() -> None:
    """Where p rounds to 1 in float32, against the same in float64."""
    near = np.array([-1e-3, -1e-6, -1e-9, -1e-20, -1e-30, -0.5, -0.7, -0.8])
    for chosen, rejected in ((near, near[::-1]), (near, np.full(8, -1.0))):
        arrays = [chosen.astype(np.float32), rejected.astype(np.float32)]
        pairs, _, grads = jax.device_get(run(losses.orpo_loss, *arrays))
        for i in range(8):
            a, b = (float(x[i]) for x in arrays)
            np.testing.assert_allclose(pairs[i], oracles.orpo(a, b, 0.1), rtol=2e-5)
            slope = 0.1 * oracles.sigma(oracles.log_odds(b) - oracles.log_odds(a))
            np.testing.assert_allclose(grads[0][i], slope / math.expm1(a), rtol=2e-5)
            np.testing.assert_allclose(grads[1][i], -slope / math.expm1(b), rtol=2e-5)


def test_orpo_takes_a_rounded_zero_for_the_largest_number_below() -> None:
    at = jnp.array([0.0, 1e-6, -float(jnp.finfo(jnp.float32).tiny)])
    chosen = jnp.array([-1.0, -1.0, -1.0])
    pairs, _, grads = jax.device_get(run(losses.orpo_loss, chosen, at))
    np.testing.assert_array_equal(pairs, pairs[2])
    assert grads[1][0] == grads[1][1] == 0


def test_aux_has_no_gradient() -> None:
    arrays = on_device(rows())

    def reported(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(jnp.stack([*losses.dpo_loss(*arrays)[1].values()]))

    def rewards(*arrays: jax.Array) -> jax.Array:
        flags = jnp.ones(P, bool)
        return jnp.sum(losses.kto_loss(arrays[0], arrays[1], flags)[1]["rewards"])

    for function in (reported, rewards):
        assert not np.any(jax.jit(jax.grad(function))(*arrays))


@pytest.mark.parametrize("shape", [(), (P,)])
def test_kto(shape: tuple[int, ...]) -> None:
    s, ref = rows(2)
    desirable = np.array([True, False, True, True, False])
    kl = np.abs(np.random.default_rng(0).normal(size=shape)).astype(np.float32)
    loss = functools.partial(
        losses.kto_loss, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5
    )

    def both(s: jax.Array, ref: jax.Array, kl: jax.Array) -> Result:
        return loss(s, ref, jax.device_put(desirable), kl)

    got, aux, grads = run(both, *on_device([s, ref, kl]))
    each = np.broadcast_to(kl, s.shape)
    want = [
        (1.5 if good else 0.5)
        * oracles.kto(float(a), float(b), bool(good), float(k), 0.3)
        for a, b, good, k in zip(s, ref, desirable, each, strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=2e-5)
    np.testing.assert_allclose(aux["rewards"], 0.3 * (s - ref), rtol=1e-5)
    np.testing.assert_array_equal(np.sign(grads[0]), np.where(desirable, -1, 1))
    assert not np.any(grads[1])
    assert not np.any(grads[2])


def test_kto_defaults_and_gradient() -> None:
    s, ref = rows(2)
    flags = jnp.array([True, False, True, True, False])
    x, y = on_device([s, ref])
    want = losses.kto_loss(x, y, flags, 0.0, beta=0.1)[0]
    np.testing.assert_array_equal(losses.kto_loss(x, y, flags)[0], want)
    check_gradient(lambda s: jnp.sum(losses.kto_loss(s, y, flags, 0.3)[0]), s)
    far = jnp.array([1e4, -1e4, 1e4, -1e4, 0.0])
    _, _, grads = run(lambda s, ref: losses.kto_loss(s, ref, flags), far, -far)
    assert np.isfinite(grads[0]).all()


@pytest.mark.parametrize("average", [False, True])
def test_sequence_log_probs(average: bool) -> None:
    rng = np.random.default_rng(0)
    x = -rng.exponential(1, (4, 6)).astype(np.float32)
    mask = ((rng.random((4, 6)) < 0.6) * rng.uniform(0.5, 2, (4, 6))).astype(np.float32)
    mask[2] = 0
    want = [
        sum(float(w * y) for w, y in zip(weights, row, strict=True))
        / ((float(sum(weights)) or 1.0) if average else 1.0)
        for weights, row in zip(mask, x, strict=True)
    ]
    dirty = np.where(mask == 0, np.nan, x)

    @jax.jit
    @jax.grad
    def gradient(x: jax.Array) -> jax.Array:
        return jnp.sum(
            losses.sequence_log_probs(x, jax.device_put(mask), average=average)
        )

    got = losses.sequence_log_probs(
        jax.device_put(dirty), jax.device_put(mask), average=average
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    sums = mask.sum(1, keepdims=True)
    slope = mask / np.where(sums == 0, 1, sums) if average else mask
    np.testing.assert_allclose(gradient(jax.device_put(dirty)), slope, rtol=1e-6)


@pytest.mark.parametrize("dtype", [bool, np.int32])
def test_masks_of_other_types(dtype: type) -> None:
    x = jnp.asarray([[-1.0, -2.0, -4.0]])
    mask = jax.device_put(np.array([[0, 1, 1]], dtype))
    assert losses.sequence_log_probs(x, mask, average=True).tolist() == [-3.0]


def test_bfloat16_gives_float32() -> None:
    low = [jnp.asarray(x, jnp.bfloat16) for x in rows()]
    for loss, arrays in (
        (losses.dpo_loss, low),
        (losses.orpo_loss, low[:2]),
        (losses.cpo_loss, low[:2]),
        (losses.simpo_loss, low[:2]),
    ):
        pairs, aux, grads = jax.eval_shape(functools.partial(run, loss), *arrays)
        dtypes = {leaf.dtype for leaf in jax.tree.leaves((pairs, aux))}
        assert dtypes == {jnp.dtype("float32")}
        assert {grad.dtype for grad in grads} == {jnp.dtype(jnp.bfloat16)}
    kto, _ = jax.eval_shape(losses.kto_loss, low[0], low[1], np.ones(P, bool))
    assert kto.dtype == jnp.float32
    tokens = np.zeros((2, 3), jnp.bfloat16)
    sums = jax.eval_shape(losses.sequence_log_probs, tokens, tokens)
    assert sums.dtype == jnp.float32


def test_vmap() -> None:
    stacked = [np.stack(x) for x in zip(rows(), rows(seed=1), strict=True)]
    got = jax.jit(jax.vmap(lambda *x: losses.dpo_loss(*x)[0]))(*stacked)
    want = [run(losses.dpo_loss, *(x[i] for x in stacked))[0] for i in range(2)]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_pairs_on_eight_devices() -> None:
    arrays = on_device(rows(pairs=8))
    mesh = jax.make_mesh((8,), ("data",))
    place = NamedSharding(mesh, PartitionSpec("data"))
    split = [jax.device_put(x, place) for x in arrays]
    want, got = run(losses.dpo_loss, *arrays), run(losses.dpo_loss, *split)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert got[0].sharding.is_equivalent_to(place, 1)


# Errors --------------------------------------------------------------------------

X = jnp.zeros(P)
ERRORS = [
    ({"kind": "sigmod"}, "unknown kind 'sigmod'; did you mean 'sigmoid'"),
    ({"label_smoothing": 0.1}, "label_smoothing.*kind='sigmoid'.*robust, exo_pair"),
    ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing.*kind='ipo'"),
    ({"kind": "exo_pair"}, "exo_pair.* needs label_smoothing in .*1e-3"),
    (
        {"kind": "exo_pair", "label_smoothing": 1.0},
        r"label_smoothing must be in \[0, 1\), got 1.0",
    ),
    (
        {"kind": "robust", "label_smoothing": 0.5},
        r"label_smoothing must be in \[0, 0.5\), got 0.5",
    ),
    ({"kind": "robust", "label_smoothing": -0.1}, "label_smoothing must be in"),
    ({"discopop_temperature": 0.1}, "discopop_temperature.*kind='sigmoid'.*discopop"),
    (
        {"kind": "discopop", "discopop_temperature": 0.0},
        r"discopop_temperature must be in \(0",
    ),
    ({"beta": 0.0}, r"beta must be in \(0, inf\), got 0.0"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS, ids=lambda x: str(x)[:40])
def test_errors_of_dpo(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.dpo_loss(X, X, X, X, **options)


def test_errors_of_numbers() -> None:
    flags = jnp.ones(P, bool)
    for loss in (losses.orpo_loss, losses.cpo_loss, losses.simpo_loss):
        with pytest.raises(ValueError, match="beta must be"):
            loss(X, X, beta=-1.0)
    for smoothed in (losses.cpo_loss, losses.simpo_loss):
        with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\)"):
            smoothed(X, X, label_smoothing=1.0)
    with pytest.raises(ValueError, match="gamma must be"):
        losses.simpo_loss(X, X, gamma=-1.0)
    for name in ("beta", "desirable_weight", "undesirable_weight"):
        options: dict[str, Any] = {name: -1.0}
        with pytest.raises(ValueError, match=f"{name} must be"):
            losses.kto_loss(X, X, flags, **options)


@pytest.mark.usefixtures("unannotated")
def test_shapes_are_named() -> None:
    other, flags = jnp.zeros(P + 1), jnp.ones(P, bool)
    for place, name in enumerate(NAMES[1:], 1):
        arrays = [X, X, X, X]
        arrays[place] = other
        message = rf"{name} must have the shape \(5,\) of chosen, got \(6,\)"
        with pytest.raises(ValueError, match=message):
            losses.dpo_loss(*arrays)
    for loss in (losses.orpo_loss, losses.cpo_loss, losses.simpo_loss):
        with pytest.raises(ValueError, match=r"rejected must .* \(5,\).* got \(6,\)"):
            loss(X, other)
        with pytest.raises(ValueError, match=r"chosen must be \[P\], got .* \(5, 1\)"):
            loss(X[:, None], X[:, None])
        with pytest.raises(TypeError, match="chosen must be floating point, got bool"):
            loss(flags, X)
    with pytest.raises(ValueError, match=r"desirable must .*\(5,\).* got \(1,\)"):
        losses.kto_loss(X, X, flags[:1])
    with pytest.raises(ValueError, match=r"kl must .*\(5,\) of log_probs, got \(6,\)"):
        losses.kto_loss(X, X, flags, other)
    with pytest.raises(TypeError, match="desirable must be bool, got float32"):
        losses.kto_loss(X, X, X)
    with pytest.raises(ValueError, match=r"mask must .*\(2, 3\).* got \(3, 2\)"):
        losses.sequence_log_probs(jnp.zeros((2, 3)), jnp.zeros((3, 2)))
    with pytest.raises(TypeError, match="log_probs must be floating point, got int32"):
        losses.sequence_log_probs(jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3)))
