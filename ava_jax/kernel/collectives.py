"""Collectives over the shards of a vocabulary: a few numbers per token.

Inside `jax.shard_map` each device holds a slice of the vocabulary's columns. One
`all_gather` of the row maxima and one `psum` of the stacked sums turn the numbers of
the slices into those of whole rows. With `axis=None` the slice is the whole row, and
every function returns its argument.
"""

import functools
from typing import NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ava_jax.reduce import as_float

Tree = TypeVar("Tree")


class RowMax(NamedTuple):
    """The global maximum of each row's logits.

    Attributes:
      largest: the largest logit.
      second: the second largest logit; None if it was not requested.
      is_local: whether `largest` is among this shard's columns; if several shards hold
        that value, it belongs to the first. None without other shards.
    """

    largest: Float[Array, "*n"]
    second: Float[Array, "*n"] | None
    is_local: Bool[Array, "*n"] | None


def num_shards(axis: str | None) -> int:
    """Returns the number of the vocabulary's shards."""
    return 1 if axis is None else lax.axis_size(axis)


def first_id(axis: str | None, width: int) -> int | Int[Array, ""]:
    """Returns the id of this shard's first column."""
    return 0 if axis is None else lax.axis_index(axis).astype(jnp.int32) * width


def global_row_max(
    axis: str | None, largest: Float[Array, "*n"], second: Float[Array, "*n"] | None
) -> RowMax:
    """Computes the global row maxima from the local ones."""
    if axis is None:
        return RowMax(largest, second, None)
    local = [x for x in (largest, second) if x is not None]
    gathered = lax.all_gather(jnp.stack(local), axis, axis=1)
    owner = jnp.argmax(gathered[0], 0)
    top = jnp.max(gathered[0], 0)
    is_local = owner == lax.axis_index(axis).astype(owner.dtype)
    if second is None:
        return RowMax(top, None, is_local)
    shard = lax.broadcasted_iota(owner.dtype, gathered[0].shape, 0)
    others = jnp.where(shard == owner, gathered[1], gathered[0])
    return RowMax(top, jnp.max(others, 0), is_local)


def max_over_shards(axis: str | None, x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns the elementwise maximum over the shards."""
    return x if axis is None else lax.pmax(x, axis)


def add_up(axis: str | None, sums: Tree, lead: int) -> Tree:
    """Sums arrays over the shards, stacked into one collective.

    Args:
      axis: the vocabulary's mesh axis.
      sums: a pytree of arrays with the same `lead` leading axes; integers among them
        must be below 2²⁴.
      lead: the number of token axes.
    """
    if axis is None:
        return sums
    leaves, treedef = jax.tree.flatten(sums)
    flat = [as_float(x).reshape(*x.shape[:lead], -1) for x in leaves]
    ends = [sum(x.shape[-1] for x in flat[: i + 1]) for i in range(len(flat) - 1)]
    total = lax.psum(jnp.concatenate(flat, -1), axis)
    parts = jnp.split(total, ends, -1)
    pairs = zip(parts, leaves, strict=True)
    return treedef.unflatten([p.reshape(x.shape).astype(x.dtype) for p, x in pairs])


def add_scalar(axis: str | None, x: Float[Array, ""]) -> Float[Array, ""]:
    """Sums one number over the shards."""
    return x if axis is None else lax.psum(x, axis)


def shared_scalar(axis: str | None, x: Float[Array, ""]) -> Float[Array, ""]:
    """Returns a number that all shards hold; adds up the gradients of their columns."""
    return x if axis is None else cast(Array, _shared(axis, x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shared(axis: str, x: Float[Array, ""]) -> Float[Array, ""]:
    del axis
    return x


def _shared_forward(axis, x):
    return _shared(axis, x), None


def _shared_backward(axis, _, cotangent):
    return (add_scalar(axis, cotangent),)


_shared.defvjp(_shared_forward, _shared_backward)


def merge_shifted_sums(
    axis: str | None, shift: Float[Array, "*n"], exp_sum: Float[Array, "*n"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Adds up the shards' sums `exp(shift)·exp_sum`, which may underflow.

    Returns:
      The largest of the shards' shifts, and the sum relative to it.
    """
    if axis is None:
        return shift, exp_sum
    shifts, sums = lax.all_gather(jnp.stack([shift, exp_sum]), axis, axis=1)
    known = sums > 0
    shift = jnp.max(jnp.where(known, shifts, -jnp.inf), 0)
    shift = jnp.where(shift == -jnp.inf, jnp.zeros_like(shift), shift)
    scaled = jnp.where(known, sums * jnp.exp(shifts - shift), jnp.zeros_like(sums))
    return shift, jnp.sum(scaled, 0)
