"""The head modules in NNX, through Flax's own bridge."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.head_checks import B, CausalBlock, D, K, S, V, adaptive, apply, normal

from ava_jax.heads import ConfidenceGate, MTPHeads, SequentialMTP

Inputs = dict[str, Any]


def positional(count: int) -> list[jax.Array]:
    return [normal(B, S, D, seed=i) for i in range(count)]


MODULES: dict[str, tuple[nn.Module, int, Inputs]] = {
    "linear": (MTPHeads(K, V), 1, {}),
    "mlp": (MTPHeads(K, V, "mlp", intermediate_size=5), 1, {}),
    "gate": (ConfidenceGate((5,), use_attention_pooling=True), 1, {}),
    "adaptive": (adaptive(confidence_threshold=0.0, warmup_steps=2), 1, {"step": 2}),
    "sequential": (SequentialMTP(2, CausalBlock), 2, {}),
}


def bridged(name: str, **rngs: int) -> tuple[nnx.bridge.ToNNX, list[jax.Array], Inputs]:
    module, count, kwargs = MODULES[name]
    arrays = positional(count)
    model = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0, **rngs))
    model.lazy_init(*arrays, **kwargs)
    return model, arrays, kwargs


def loss_of(output: Any) -> jax.Array:
    floats = [
        x for x in jax.tree.leaves(output) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return sum((jnp.mean(jnp.square(x - 0.3)) for x in floats), jnp.zeros(()))


@pytest.mark.parametrize("name", MODULES)
def test_gradients_in_nnx_equal_those_in_linen(name: str) -> None:
    model, arrays, kwargs = bridged(name)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def linen_loss(params: Any) -> jax.Array:
        return loss_of(apply(MODULES[name][0], {"params": params}, *arrays, **kwargs))

    @nnx.jit
    @nnx.value_and_grad
    def nnx_loss(model: nnx.bridge.ToNNX) -> jax.Array:
        return loss_of(model(*arrays, **kwargs))

    value, grads = nnx_loss(model)
    want_value, want = jax.jit(jax.value_and_grad(linen_loss))(params)
    got = nnx.to_pure_dict(grads)
    chex.assert_trees_all_close((value, got), (want_value, want), rtol=1e-4, atol=1e-6)
    assert max(np.abs(x).max() for x in jax.tree.leaves(got)) > 1e-3


@pytest.mark.parametrize("name", MODULES)
def test_train_steps_in_nnx_lower_the_loss(name: str) -> None:
    model, arrays, kwargs = bridged(name)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    traces = []

    @nnx.jit
    def train_step(
        model: nnx.bridge.ToNNX, optimizer: nnx.Optimizer, step: jax.Array
    ) -> jax.Array:
        traces.append(step)
        extra = {"step": step} if "step" in kwargs else {}
        loss, grads = nnx.value_and_grad(lambda m: loss_of(m(*arrays, **extra)))(model)
        optimizer.update(model, grads)
        return loss

    # From step 2, where the warm-up of the adaptive heads ends.
    losses = [float(train_step(model, optimizer, jnp.asarray(2 + i))) for i in range(8)]
    assert losses[-1] < losses[0] * 0.99
    assert len(traces) == 1


def test_dropout_in_nnx_draws_anew_at_every_call() -> None:
    module, h = MTPHeads(K, V, "mlp", dropout_rate=0.5), normal(B, S, D)
    model = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(params=0, dropout=1)).lazy_init(h)
    first, second = (model(h, deterministic=False) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3
    chex.assert_trees_all_equal(model(h), model(h))
