"""Iterating over blocks visits every token once, for any size of the blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ava_jax.kernel.blocks import fold, transform

G, B, S, X = 2, 3, 7, 4


def arrays(dtype=jnp.float32, groups=G):
    rng = np.random.default_rng(0)
    source = rng.standard_normal((groups, B, S, X), np.float32).astype(dtype)
    weights = rng.random((groups, B, S), np.float32) + np.float32(0.5)
    return source, {"weights": weights}


@pytest.mark.parametrize("size", range(1, S + 1))
def test_a_fold_visits_every_token_once(size):
    source, inputs = arrays()

    def body(total, block, inputs):
        assert block.shape == (B, size, X)
        return total + jnp.sum(inputs["weights"][..., None] * block)

    @jax.jit
    def run(source, inputs):
        return fold(body, jnp.zeros(()), source, inputs, size)

    got = run(source, inputs)
    want = np.sum(inputs["weights"][..., None] * source)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("groups", [1, G])
@pytest.mark.parametrize("size", range(1, S + 1))
def test_new_blocks_and_outputs_keep_their_positions(size, groups, dtype):
    source, inputs = arrays(dtype, groups)

    def body(count, block, inputs):
        weights = inputs["weights"]
        new = (block * weights[..., None].astype(dtype)).astype(dtype)
        return count + jnp.sum(weights != 0), new, {"twice": 2 * weights}

    @jax.jit
    def run(source, inputs):
        return transform(body, jnp.zeros((), jnp.int32), source, inputs, size)

    count, new, outputs = run(source, inputs)
    want = source * inputs["weights"][..., None].astype(dtype)
    assert new is not None
    assert new.dtype == dtype
    assert int(count) == groups * B * S
    np.testing.assert_array_equal(new, want)
    np.testing.assert_array_equal(outputs["twice"], 2 * inputs["weights"])
