"""Random inputs of a loss call, and jitted baselines on them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.shapes import Shape
from benchmarks.timing import Implementation

Floats = dict[str, jax.Array]


class Batch(NamedTuple):
    """Inputs of one call.

    Attributes:
      floats: the differentiated arrays by the loss's argument names: logits [B, S, V],
        or hidden_states [B, S, D] with lm_head [D, V] and, for K depths,
        mtp_hidden_states [K, B, S, D].
      targets: ids [B, S].
    """

    floats: Floats
    targets: jax.Array


def make_batch(shape: Shape) -> Batch:
    """Draws random inputs of a shape; the logits have variance 1."""
    keys = jax.random.split(jax.random.key(0), 4)
    rows = (shape.batch, shape.length)
    # Ids are drawn by Zipf's law, so that they repeat about as often as in text.
    uniform = jax.random.uniform(keys[0], rows)
    targets = jnp.float32(shape.vocab) ** uniform
    targets = jnp.minimum(targets.astype(jnp.int32), shape.vocab - 1)
    if not shape.width:
        logits = jax.random.normal(keys[1], (*rows, shape.vocab), shape.dtype)
        return Batch({"logits": logits}, targets)
    hidden = (*rows, shape.width)
    head = jax.random.normal(keys[2], (shape.width, shape.vocab), shape.dtype)
    floats = {
        "hidden_states": jax.random.normal(keys[1], hidden, shape.dtype),
        "lm_head": head * shape.width**-0.5,
    }
    if shape.depths:
        depths = jax.random.normal(keys[3], (shape.depths, *hidden), shape.dtype)
        floats["mtp_hidden_states"] = depths
    return Batch(floats, targets)


def baseline(
    function: Callable[..., object], batch: Batch, *, gradient: bool = True
) -> Implementation:
    """Returns `function(targets, **floats)`, jitted, with or without its gradient."""

    def objective(floats: Floats, targets: jax.Array) -> object:
        return function(targets, **floats)

    called = jax.value_and_grad(objective) if gradient else objective
    return Implementation(jax.jit(called), tuple(batch))
