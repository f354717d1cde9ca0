"""Masked tokens cost nothing: unmasked ones are brought together."""

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
    keys = jax.random.split(jax.random.key(0), 3)
    active = jax.random.bernoulli(keys[0], 0.4, (groups, B, S))
    source = jax.random.normal(keys[1], (groups, B, S, X))
    weights = jax.random.uniform(keys[2], (groups, B, S)) + 0.5
    return source, {"weights": jnp.where(active, weights, 0.0)}, active


def visit(source, inputs, active, size):
    """The sum, the order of the weights, and what came back."""
    seen = []

    def body(total, chunk, inputs):
        assert chunk.shape == (B, min(size, S), X)
        weights = inputs["weights"]
        io_callback(lambda w: seen.append(np.array(w)), None, weights, ordered=False)
        twice = weights[..., None] * chunk
        return total + jnp.sum(twice), {"scaled": twice, "weights": 2 * weights}

    like = {"scaled": source, "weights": inputs["weights"]}
    out = fold_unmasked(body, jnp.zeros(()), source, inputs, active, size, like)
    jax.block_until_ready(out)
    jax.effects_barrier()
    return *out, seen


@pytest.mark.parametrize("groups", [1, G])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 10, 11, 20])
def test_it_visits_unmasked_tokens_once_and_puts_outputs_back(size, groups):
    source, inputs, active = arrays(groups)
    # A masked token may hold anything.
    source = jnp.where(active[..., None], source, jnp.nan)
    total, outputs, seen = visit(source, inputs, active, size)
    want = jnp.where(active[..., None], inputs["weights"][..., None] * source, 0.0)
    np.testing.assert_allclose(total, jnp.sum(want), rtol=1e-5)
    np.testing.assert_array_equal(outputs["scaled"], want)
    np.testing.assert_array_equal(outputs["weights"], 2 * inputs["weights"])
    most = np.max(np.sum(np.array(active), 2), 1)
    if groups > 1 or size < S:
        assert len(seen) == sum(-(-int(count) // size) for count in most)


def test_a_first_group_without_a_token_costs_one_chunk():
    source, inputs, active = arrays()
    active = active.at[0].set(False)
    inputs = {"weights": jnp.where(active, inputs["weights"], 0.0)}
    *_, seen = visit(source, inputs, active, 3)
    most = int(np.max(np.sum(np.array(active[1]), 1)))
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
    none = jnp.zeros_like(active)
    total, outputs, seen = visit(source, inputs, none, 3)
    assert float(total) == 0
    assert len(seen) == 1
    np.testing.assert_array_equal(outputs["scaled"], jnp.zeros_like(source))


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


def loss_and_gradients(mask, chunk_size, loss_fn=None, **options):
    keys = jax.random.split(jax.random.key(1), 4)
    hidden = jax.random.normal(keys[0], (2, 24, D))
    hidden = jnp.where(mask[..., None], hidden, jnp.nan)
    head, bias = jax.random.normal(keys[1], (D, V)), jax.random.normal(keys[2], (V,))
    targets = jax.random.randint(keys[3], (2, 24), 0, 5)
    loss_fn = loss_fn or ava_jax.create_unified_loss(
        vocab_size=V - 2, chunk_size=chunk_size, block_size=2, **options
    )
    state = loss_fn.init()

    def loss(hidden, head, bias):
        total, aux, _ = loss_fn(
            state,
            targets=targets,
            hidden_states=hidden,
            lm_head=head,
            lm_head_bias=bias,
            attention_mask=mask,
        )
        return total, aux

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    return step(hidden, head, bias)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("unlikelihood", [0.0, 0.3])
def test_values_and_gradients_are_those_of_one_chunk(mask, unlikelihood):
    mask = jnp.broadcast_to(mask, (2, 24))
    options = {"unlikelihood_weight": unlikelihood, "eos_token_id": 3}
    want = loss_and_gradients(mask, 24, **options)
    got = loss_and_gradients(mask, 5, **options)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    assert np.all(np.array(got[1][0])[~np.array(mask)] == 0)


@pytest.mark.parametrize("unlikelihood", [0.0, 0.3])
@pytest.mark.parametrize("axes", [{"batch_axes": "data"}, {"sequence_axis": "data"}])
def test_on_a_mesh_too(axes, unlikelihood):
    """A device's rows are one row, unless a term needs them as they are."""
    kinds = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((2, 2), ("data", "model"), kinds, devices=jax.devices()[:4])
    mask = jnp.stack([MASKS["starts"], MASKS["scattered"]]).astype(bool)
    options = {"unlikelihood_weight": unlikelihood, "eos_token_id": 3}
    config = ava_jax.UnifiedLossConfig(
        vocab_size=V - 2, chunk_size=5, block_size=2, **options
    )
    loss_fn = ava_jax.unified_loss(config, mesh=mesh, vocab_axis="model", **axes)
    want = loss_and_gradients(mask, 24, **options)
    got = loss_and_gradients(mask, 5, loss_fn=loss_fn)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
