"""Micro-batches add up to the whole batch, ragged masks and empty ones included."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.scenes import (
    ADAPTIVE,
    EVERYTHING,
    B,
    S,
    adaptive_floats,
    floats,
    integers,
    jitted,
    through,
    value_and_grads,
)
from support.trees import assert_trees_close

import ava_jax

# Terms that couple the whole batch are averages over micro-batches instead.
ADDITIVE = {
    **EVERYTHING,
    "moe_balancing_type": "bias",
    "use_auxiliary_loss": False,
    "use_diversity_loss": False,
    "use_contrastive_loss": False,
}
ROWS = 8
BY_ROW = ("hidden_states", "gate_logits", "logits", "confidence_scores")


def cut(arrays, ints, rows):
    """The micro-batch of the given rows."""
    part = {k: v[rows] if k in BY_ROW else v for k, v in arrays.items()}
    for name in ("additional_logits", "expert_outputs"):
        if name in part:
            part[name] = part[name][:, rows]
    return part, {k: v[rows] for k, v in ints.items()}


def added(shares):
    return jax.tree.map(lambda *x: sum(x[1:], start=x[0]), *shares)


@functools.partial(jax.jit, static_argnames="loss_fn")
def normalizers_of(loss_fn, ints):
    return loss_fn.normalizers(
        targets=ints["targets"], attention_mask=ints["attention_mask"]
    )


@functools.partial(jax.jit, static_argnames=("loss_fn", "path"))
def share(loss_fn, state, arrays, ints, rows, normalizers, path):
    """((loss, sums), gradients) of the micro-batch of the given rows."""

    def loss(arrays: dict[str, Any]):
        part, own = cut(arrays, ints, rows)
        total, _, stats = loss_fn.accumulate(
            state, **through(path, part), **own, normalizers=normalizers
        )
        return total, stats

    return jax.value_and_grad(loss, has_aux=True)(arrays)


@functools.partial(jax.jit, static_argnames="loss_fn")
def add_up(loss_fn, state, shares):
    """What a plain call would return, and its gradients."""
    (total, stats), grads = added(shares)
    after = loss_fn.commit(state, stats)
    return (total, (loss_fn.summary(after, stats), after)), grads


def parts_of(config, arrays, ints, path, count):
    """The results of so many micro-batches."""
    loss_fn = ava_jax.create_unified_loss(config)
    state = loss_fn.init()
    normalizers = normalizers_of(loss_fn, ints)
    shares = [
        share(loss_fn, state, arrays, ints, rows, normalizers, path)
        for rows in np.arange(len(ints["targets"])).reshape(count, -1)
    ]
    return add_up(loss_fn, state, shares)


def whole(config, arrays, ints):
    """The results of a plain call, of the hidden states where there are any."""
    loss_fn = ava_jax.create_unified_loss(config)
    return value_and_grads(loss_fn, loss_fn.init(), arrays, ints, "fused")


DEFAULT = [
    ("logits", "predictions", 2),
    ("logits", "targets", 8),
    ("fused", "predictions", 4),
    ("fused", "targets", 1),
    ("fused", "predictions", 8),
]
REST = [
    pytest.param(path, source, count, marks=pytest.mark.slow)
    for path in ("logits", "fused")
    for source in ("predictions", "targets")
    for count in (1, 2, 4, 8)
    if (path, source, count) not in DEFAULT
]


@pytest.mark.parametrize(("path", "source", "count"), [*DEFAULT, *REST])
def test_micro_batches_add_up(path, source, count):
    ints = integers(rows=ROWS)
    ints["attention_mask"] = ints["attention_mask"].at[2:4].set(False)  # empty ones
    config = {**ADDITIVE, "penalty_source": source}
    arrays = floats(rows=ROWS)
    got = parts_of(config, arrays, ints, path, count)
    assert_trees_close(got, whole(config, arrays, ints), 2e-5)


@pytest.mark.parametrize(
    ("path", "count"), [("fused", 4), pytest.param("logits", 8, marks=pytest.mark.slow)]
)
def test_micro_batches_add_up_in_float64(path, count):
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda x: np.asarray(x, float), floats(rows=ROWS))
        arrays, ints = jax.device_put(arrays), integers(rows=ROWS)
        got = parts_of(ADDITIVE, arrays, ints, path, count)
        assert_trees_close(got, whole(ADDITIVE, arrays, ints), 1e-10)


def test_the_routing_bias_moves_by_the_sign_of_the_sum():
    """The sum of the micro-batches' signs would move the first expert up."""
    config = {
        "vocab_size": 8,
        "num_experts": 3,
        "use_moe_balancing": True,
        "moe_balancing_type": "bias",
        "bias_update_rate": 0.5,
    }
    loss_fn = ava_jax.create_unified_loss(config)
    # Loads of the micro-batches: (5, 1, 0), (1, 2, 3), (1, 3, 2).
    chosen = np.array([[0, 0, 0, 0, 0, 1], [0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 2, 2]])
    given: dict[str, Any] = {
        "logits": jnp.zeros((1, 6, 8)),
        "targets": jnp.ones((1, 6), int),
        "gate_logits": jnp.zeros((1, 6, 3)),
    }
    state = loss_fn.init()
    normalizers = jax.jit(loss_fn.normalizers)(targets=np.ones((3, 6), np.int32))

    @jax.jit
    def share(chosen):
        return loss_fn.accumulate(
            state,
            **given,
            expert_indices=chosen[None, :, None],
            normalizers=normalizers,
        )[2]

    shares = [share(c) for c in chosen]
    stats = jax.jit(added)(shares)

    @jax.jit
    def bias(stats):
        balance = loss_fn.commit(state, stats).moe_balancing
        assert isinstance(balance, ava_jax.BiasBalanceState)
        return balance.bias

    np.testing.assert_allclose(bias(stats), [-0.5, 0.0, 0.5])
    signs = np.sum([np.sign(bias(share)) for share in shares], axis=0)
    assert np.sign(signs[0]) == 1


def test_adaptive_heads_add_up():
    config = {**ADAPTIVE, "use_confidence_weighting": False}
    arrays, ints = adaptive_floats(), integers(experts=False)
    got = parts_of(config, arrays, ints, "given", 4)
    assert_trees_close(got, whole(config, arrays, ints), 2e-5)


def test_one_micro_batch_is_a_plain_call_with_every_term():
    arrays, ints = floats(), integers()
    got = parts_of(EVERYTHING, arrays, ints, "logits", 1)
    assert_trees_close(got, whole(EVERYTHING, arrays, ints), 2e-5)


def test_terms_that_couple_the_batch_are_averaged():
    """Two equal micro-batches are worth as much as one, term by term."""
    arrays, ints = floats(), integers()
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    state = loss_fn.init()
    twice = jax.jit(loss_fn.normalizers)(
        targets=np.stack([ints["targets"]] * 2),
        attention_mask=np.stack([ints["attention_mask"]] * 2),
    )
    step = jax.jit(lambda given, n: loss_fn.accumulate(state, normalizers=n, **given))
    given = {**arrays, **ints}
    half, _, stats = step(given, twice)
    whole, _, once = step(given, None)
    np.testing.assert_allclose(2 * half, whole, rtol=1e-6)
    counted = ("num_tokens", "num_invalid_targets", "num_invalid_weights")
    means = {k: v for k, v in stats.aux.items() if k not in counted}
    for name, value in means.items():
        np.testing.assert_allclose(2 * value, once.aux[name], rtol=1e-5, err_msg=name)


def test_the_mean_of_means_is_far_off():
    """The usual mistake, on the same ragged batch."""
    ints = integers()
    weights = np.zeros((B, S), np.float32)
    weights[0], weights[1:, 0] = 1, 1
    arrays, ints = jax.device_get((floats(), {**ints, "attention_mask": weights}))
    loss_fn = ava_jax.create_unified_loss(ADDITIVE)
    state = loss_fn.init()
    step = jitted(loss_fn)
    exact, _, _ = step(state, {**arrays, **ints})
    rows = (cut(arrays, ints, np.array([row])) for row in range(B))
    means = [step(state, {**part, **own})[0] for part, own in rows]
    assert abs(float(np.mean(means)) - float(exact)) > 0.1


def test_normalizers_take_any_leading_axes():
    ints = integers()
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    names = ("targets", "attention_mask")
    normalizers = jax.jit(loss_fn.normalizers)
    flat = normalizers(**{k: ints[k] for k in names})
    stacked = normalizers(**{k: ints[k].reshape(2, B // 2, S) for k in names})
    chex.assert_trees_all_equal(flat, stacked)


def test_too_few_normalizers_are_an_error():
    loss_fn = ava_jax.create_unified_loss(ADAPTIVE, num_future_tokens=1)
    ints = integers(experts=False)
    normalizers = jax.jit(loss_fn.normalizers)(targets=ints["targets"])
    with pytest.raises(ValueError, match="num_future_tokens"):
        jitted(loss_fn)(
            loss_fn.init(), {"normalizers": normalizers, **adaptive_floats(), **ints}
        )
