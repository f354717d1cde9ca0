"""Helpers of the tests of the head modules."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from ava_jax.heads import AdaptiveMTPHeads

Layer = dict[str, NDArray]
Params = dict[str, Layer]

KEY = jax.random.key(0)
B, S, D, V, K = 2, 6, 4, 7, 3


class CausalBlock(nn.Module):
    """Sums over the past; `gain` is an example of a block's further arguments."""

    @nn.compact
    def __call__(
        self, x: jax.Array, gain: float = 1.0, *, shift: float = 0.0
    ) -> jax.Array:
        past = jnp.cumsum(jnp.tanh(x), axis=1)
        return x + nn.Dense(x.shape[-1], dtype=x.dtype)(past) * gain + shift


class DenseBlock(nn.Module):
    """A dense layer in the dtype of its input."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(x.shape[-1], dtype=x.dtype)(x)


def adaptive(**options: Any) -> AdaptiveMTPHeads:
    return AdaptiveMTPHeads(K, V, gate_hidden_dims=(8, 5), **options)


def randomized(params: Any, seed: int, dtype: str = "float32") -> Any:
    """Returns the tree with every entry random, so that no bias is 0 and no scale 1."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    drawn = [rng.normal(size=leaf.shape).astype(jnp.dtype(dtype)) for leaf in leaves]
    return jax.device_put(jax.tree.unflatten(tree, drawn))


def in_numpy(params: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> jax.Array:
    drawn = np.random.default_rng(seed).normal(size=shape)
    return jax.device_put(drawn.astype(jnp.dtype(dtype)))


@functools.partial(jax.jit, static_argnames=("module", "deterministic"))
def apply(
    module: nn.Module, *args: Any, deterministic: bool | None = None, **kwargs: Any
) -> Any:
    """`module.apply`, compiled once per module and shape."""
    if deterministic is not None:
        kwargs["deterministic"] = deterministic
    return module.apply(*args, **kwargs)


def made(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The shapes and dtypes of the parameters that the module makes."""
    return jax.eval_shape(functools.partial(module.init, **kwargs), KEY, *args)[
        "params"
    ]


def fresh(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The parameters that the module makes; `init` is cheaper where any will do."""
    return jax.jit(functools.partial(module.init, **kwargs))(KEY, *args)["params"]


def init(module: nn.Module, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """Returns random variables in the shapes of the module's own."""
    dtype = "float64" if jax.config.read("jax_enable_x64") else "float32"
    return {"params": randomized(made(module, *args, **kwargs), seed, dtype)}


# NumPy oracles, in float64, from the formulas ------------------------------------


def oracle_layer_norm(x: NDArray, p: Layer) -> NDArray:
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def oracle_rms_norm(x: NDArray, p: Layer) -> NDArray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]


def oracle_gelu(x: NDArray) -> NDArray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


ACTIVATIONS: dict[str, Callable[[NDArray], NDArray]] = {
    "gelu": oracle_gelu,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def oracle_dense(x: NDArray, p: Layer) -> NDArray:
    return x @ p["kernel"] + p["bias"]
