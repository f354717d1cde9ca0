"""What the shards of a vocabulary tell each other: a few numbers per token.

Inside `jax.shard_map` each device holds a slice of the vocabulary's columns. One
`all_gather` of the largest logits and one `psum` of the stacked sums make the numbers
of whole rows out of those of the slices. With `axis=None` the slice is all there is,
and every function returns what it was given.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ava_jax.reduce import as_float

Tree = TypeVar("Tree")


class Largest(NamedTuple):
    """The largest logit of each whole row.

    Attributes:
      largest: the logit.
      second: the largest one of the others; None if it was not asked for.
      is_here: whether it is among this shard's columns, the first ones if several are
        equal; None where there are no other shards.
    """

    largest: Float[Array, "*n"]
    second: Float[Array, "*n"] | None
    is_here: Bool[Array, "*n"] | None


def num_shards(axis: str | None) -> int:
    """Returns in how many slices the vocabulary falls."""
    return 1 if axis is None else lax.axis_size(axis)


def first_id(axis: str | None, width: int) -> int | Int[Array, ""]:
    """Returns the id of this shard's first column."""
    return 0 if axis is None else lax.axis_index(axis).astype(jnp.int32) * width


def find_largest(
    axis: str | None, largest: Float[Array, "*n"], second: Float[Array, "*n"] | None
) -> Largest:
    """Finds the whole rows' largest logits from those of the slices."""
    if axis is None:
        return Largest(largest, second, None)
    told = [x for x in (largest, second) if x is not None]
    gathered = lax.all_gather(jnp.stack(told), axis, axis=1)
    owner = jnp.argmax(gathered[0], 0)
    top = jnp.max(gathered[0], 0)
    is_here = owner == lax.axis_index(axis).astype(owner.dtype)
    if second is None:
        return Largest(top, None, is_here)
    shard = lax.broadcasted_iota(owner.dtype, gathered[0].shape, 0)
    others = jnp.where(shard == owner, gathered[1], gathered[0])
    return Largest(top, jnp.max(others, 0), is_here)


def largest_anywhere(axis: str | None, x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns the largest of the slices' numbers."""
    return x if axis is None else lax.pmax(x, axis)


def add_up(axis: str | None, sums: Tree, lead: int) -> Tree:
    """Adds up the slices' numbers, stacked into one collective.

    Args:
      axis: the vocabulary's axis.
      sums: arrays with the same `lead` leading axes; integers below 2²⁴.
      lead: how many axes tokens have.
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
    """Adds up one number over the slices."""
    return x if axis is None else lax.psum(x, axis)


def merge_rest(
    axis: str | None, pivot: Float[Array, "*n"], rest: Float[Array, "*n"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Adds up the slices' sums `exp(pivot)·rest`, which may be too small for a float.

    Returns:
      What the sum is relative to, the largest of the slices' pivots, and the sum.
    """
    if axis is None:
        return pivot, rest
    pivots, rests = lax.all_gather(jnp.stack([pivot, rest]), axis, axis=1)
    known = rests > 0
    pivot = jnp.max(jnp.where(known, pivots, -jnp.inf), 0)
    pivot = jnp.where(pivot == -jnp.inf, jnp.zeros_like(pivot), pivot)
    scaled = jnp.where(known, rests * jnp.exp(pivots - pivot), jnp.zeros_like(rests))
    return pivot, jnp.sum(scaled, 0)
