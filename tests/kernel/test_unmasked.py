"""Masked tokens cost nothing: unmasked ones are brought together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.sharding import AxisType

import ava_jax
from ava_jax.kernel.unmasked import fold_unmasked

G, B, S, X = 2, 3, 11, 4


def arrays(groups=G):
    rng = np.random.default_rng(0)
    active = rng.random((groups, B, S)) < 0.4
    source = rng.normal(size=(groups, B, S, X)).astype(np.float32)
    weights = rng.random((groups, B, S), np.float32) + np.float32(0.5)
    return source, {"weights": np.where(active, weights, np.float32(0))}, active


def visit(source, inputs, active, size, is_open=False, first_apart=False):
    """The sum, the order of the weights, and what came back."""
    seen = []

    def body(total, chunk, inputs):
        assert chunk.shape == (B, min(size, S), X)
        weights = inputs["weights"]
        io_callback(lambda w: seen.append(np.array(w)), None, weights, ordered=False)
        twice = weights[..., None] * chunk
        of_chunk = jnp.sum(twice)
        total = of_chunk if total is None else total + of_chunk
        return total, {"scaled": twice, "weights": 2 * weights}

    @jax.jit
    def fold(source, inputs, active):
        like = {"scaled": source, "weights": inputs["weights"]}
        start = None if first_apart else jnp.zeros(())
        loop = {"is_open": is_open, "first_apart": first_apart}
        return fold_unmasked(body, start, source, inputs, active, size, like, **loop)

    out = fold(source, inputs, active)
    jax.block_until_ready(out)
    jax.effects_barrier()
    return *out, seen


@pytest.mark.parametrize(
    "loop", [(False, False), (True, False), (True, True)], ids=["all", "open", "apart"]
)
@pytest.mark.parametrize("groups", [1, G])
@pytest.mark.parametrize("size", [1, 3, 4, 10, 11, 20])
def test_it_visits_unmasked_tokens_once_and_puts_outputs_back(size, groups, loop):
    source, inputs, active = arrays(groups)
    # A masked token may hold anything.
    source = np.where(active[..., None], source, np.float32(np.nan))
    total, outputs, seen = visit(source, inputs, active, size, *loop)
    want = np.where(active[..., None], inputs["weights"][..., None] * source, 0.0)
    np.testing.assert_allclose(total, np.sum(want), rtol=1e-5)
    np.testing.assert_array_equal(outputs["scaled"], want)
    np.testing.assert_array_equal(outputs["weights"], 2 * inputs["weights"])
    most = np.max(np.sum(active, 2), 1)
    if groups > 1 or size < S:
        assert len(seen) == sum(-(-int(count) // size) for count in most)


def test_a_first_group_without_a_token_costs_one_chunk():
    source, inputs, active = arrays()
    active[0] = False
    inputs = {"weights": np.where(active, inputs["weights"], np.float32(0))}
    *_, seen = visit(source, inputs, active, 3)
    most = int(np.max(np.sum(active[1], 1)))
    assert len(seen) == 1 + -(-most // 3)


def test_the_order_of_a_row_is_kept():
    source, inputs, active = arrays(1)
    *_, seen = visit(source, inputs, active, 3)
    visited = np.concatenate(seen, 1)
    for row, weights in enumerate(inputs["weights"][0]):
        own = weights[weights != 0]
        np.testing.assert_array_equal(visited[row][: len(own)], own)


@pytest.mark.parametrize("groups", [1, G])
def test_without_an_unmasked_token_only_the_first_chunk_is_visited(groups):
    source, inputs, active = arrays(groups)
    none = np.zeros_like(active)
    total, outputs, seen = visit(source, inputs, none, 3)
    assert float(total) == 0
    assert len(seen) == 1
    np.testing.assert_array_equal(outputs["scaled"], np.zeros_like(source))


# Whole losses ---------------------------------------------------------------------

D, V = 6, 23
MASKS = {
    "ends": np.arange(24) >= 18,
    "starts": np.arange(24) < 5,
    "scattered": np.arange(24) % 4 == 1,
    "one row": np.stack([np.zeros(24, bool), np.ones(24, bool)]),
    "all": np.ones(24, bool),
    "none": np.zeros(24, bool),
}


@functools.cache
def program(loss_fn):
    """Returns the jitted loss, aux and gradients; masks are arguments."""
    state = loss_fn.init()

    def loss(floats, targets, mask):
        total, aux, _ = loss_fn(state, targets=targets, attention_mask=mask, **floats)
        return total, aux

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def loss_and_gradients(mask, loss_fn):
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(2, 24, D))
    floats = {
        "hidden_states": np.where(mask[..., None], hidden, np.nan),
        "lm_head": rng.normal(size=(D, V)),
        "lm_head_bias": rng.normal(size=V),
    }
    floats = {k: x.astype(np.float32) for k, x in floats.items()}
    return program(loss_fn)(floats, rng.integers(0, 5, (2, 24), np.int32), mask)


def config_of(chunk_size, unlikelihood):
    return ava_jax.UnifiedLossConfig(
        vocab_size=V - 2,
        chunk_size=chunk_size,
        block_size=2,
        unlikelihood_weight=unlikelihood,
        eos_token_id=3,
    )


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("unlikelihood", [0.0, 0.3])
def test_values_and_gradients_are_those_of_one_chunk(mask, unlikelihood):
    mask = np.broadcast_to(mask, (2, 24))
    want, got = (
        loss_and_gradients(mask, ava_jax.unified_loss(config_of(size, unlikelihood)))
        for size in (24, 5)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    assert np.all(np.array(got[1]["hidden_states"])[~mask] == 0)


@pytest.mark.parametrize("unlikelihood", [0.0, 0.3])
@pytest.mark.parametrize("axes", [{"batch_axes": "data"}, {"sequence_axis": "data"}])
def test_on_a_mesh_too(axes, unlikelihood):
    """A device's rows are one row, unless a term needs them as they are."""
    kinds = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((2, 2), ("data", "model"), kinds, devices=jax.devices()[:4])
    mask = np.stack([MASKS["starts"], MASKS["scattered"]])
    whole = ava_jax.unified_loss(config_of(24, unlikelihood))
    sharded = ava_jax.unified_loss(
        config_of(5, unlikelihood), mesh=mesh, vocab_axis="model", **axes
    )
    want, got = (loss_and_gradients(mask, loss_fn) for loss_fn in (whole, sharded))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
