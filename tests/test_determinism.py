"""The same program on the same devices gives the same bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ava_jax

B, S, D, V = 4, 64, 32, 3000
CONFIG: dict[str, Any] = {
    "vocab_size": V,
    "eos_token_id": 2,
    "z_loss_weight": 1e-3,
    "unlikelihood_weight": 0.1,
}


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("path", ["logits", "fused"])
def test_twenty_runs_give_the_same_gradient(path):
    """Large enough for several threads to share the work, with ids that repeat."""
    loss_fn = ava_jax.create_unified_loss(CONFIG)
    rng = np.random.default_rng(0)
    shapes = (B, S, D), (D, V)
    arrays = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    targets = jnp.asarray(rng.integers(0, 9, (B, S), np.int32))

    @jax.jit
    @jax.grad
    def gradient(arrays):
        hidden, head = arrays
        given: dict[str, Any] = {"hidden_states": hidden, "lm_head": head}
        if path == "logits":
            given = {"logits": hidden @ head}
        return loss_fn(loss_fn.init(), targets=targets, **given)[0]

    first = [np.asarray(g).tobytes() for g in gradient(arrays)]
    assert any(bytes(len(b)) != b for b in first)
    for _ in range(19):
        assert [np.asarray(g).tobytes() for g in gradient(arrays)] == first


def test_the_gradient_of_an_accelerator_scatters_nothing():
    """Scatters add in any order; unlikelihood looks at too many ids to compare."""
    default = {**CONFIG, "unlikelihood_weight": 0.0, "implementation": "xla"}

    def scatters(config):
        loss_fn = ava_jax.create_unified_loss(config)

        def loss(logits):
            targets = jnp.ones((B, S), int)
            return loss_fn(loss_fn.init(), targets=targets, logits=logits)[0]

        text = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((B, S, 16))))
        return text.count("scatter-add[")

    config = {**default, "vocab_size": 16}
    assert scatters(config) == 0
    assert scatters({**config, "unlikelihood_weight": 0.1}) > 0
