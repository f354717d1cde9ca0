"""Reading logits, in every implementation: soft-capped, −inf where no class exists."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from ava_jax.kernel.collectives import first_id, num_shards, shared_scalar
from ava_jax.kernel.stats import Query, Vocabulary
from ava_jax.reduce import as_float

# In place of log 0 where no other class is possible and 1 − p is 0: finite, so that its
# product with 0 is 0.
LOG_NOTHING = -1e30
# Its exponential is 0 in any precision.
LOWEST = -1e15


def possible_logits(
    vocabulary: Vocabulary,
    logits: Float[Array, "*n W"],
    ids: Int[Array, "*n W"] | None = None,
) -> Float[Array, "*n W"]:
    """Returns soft-capped logits in the arithmetic dtype; −inf for impossible classes.

    Args:
      vocabulary: the soft-cap and which columns are classes.
      logits: this shard's columns, or gathered ones.
      ids: the ids of gathered logits; None if the logits are all columns.
    """
    return capped(vocabulary, raw_logits(vocabulary, logits, ids))


def raw_logits(
    vocabulary: Vocabulary,
    logits: Float[Array, "*n W"],
    ids: Int[Array, "*n W"] | None = None,
) -> Float[Array, "*n W"]:
    """Returns `possible_logits` without the soft-cap."""
    z = as_float(logits)
    if ids is None:
        if not has_padding(vocabulary, z.shape[-1]):
            return z
        ids = column_ids(z) + first_id(vocabulary.axis, z.shape[-1])
    return jnp.where(is_class(vocabulary, ids), z, -jnp.inf)


def capped(vocabulary: Vocabulary, z: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Applies the soft-cap; −inf stays −inf."""
    if vocabulary.soft_cap is None:
        return z
    soft = vocabulary.soft_cap * jnp.tanh(z / vocabulary.soft_cap)
    return jnp.where(z == -jnp.inf, z, soft)


def at_temperature(
    logits: Float[Array, "*n W"],
    active: Bool[Array, "*n"],
    vocabulary: Vocabulary,
    temperature: Float[Array, ""] | None,
) -> Float[Array, "*n W"]:
    """Computes `possible_logits` divided by a temperature, with their derivatives.

    Args:
      logits: this shard's columns; those of masked tokens may hold anything.
      active: marks the unmasked tokens.
      vocabulary: the soft-cap and which columns are classes.
      temperature: T, or None for 1.
    """
    kept = jnp.where(active[..., None], logits, jnp.zeros_like(logits))
    z = possible_logits(vocabulary, kept)
    if temperature is None:
        return z
    exists = z != -jnp.inf
    shared = shared_scalar(vocabulary.axis, temperature)
    return jnp.where(exists, jnp.where(exists, z, jnp.zeros_like(z)) / shared, z)


def has_padding(vocabulary: Vocabulary, width: int) -> bool:
    """Returns whether shards of that width have columns beyond the vocabulary."""
    return width * num_shards(vocabulary.axis) != vocabulary.size


def is_class(vocabulary: Vocabulary, ids: Int[Array, "*n"]) -> Bool[Array, "*n"]:
    """Marks the ids in `[0, V)`."""
    return (ids >= 0) & (ids < vocabulary.size)


def column_ids(z: Shaped[Array, "*n W"]) -> Int[Array, "*n W"]:
    """Returns the column of every element."""
    return lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)


def columns_of(axis: str | None, ids: Int[Array, "*n"], width: int) -> Array:
    """Returns the columns of ids on this shard; `width` for ids of other shards."""
    if axis is None:
        return ids
    local = ids - first_id(axis, width)
    return jnp.where((local >= 0) & (local < width), local, width)


def pick(
    vocabulary: Vocabulary,
    logits: Float[Array, "*n W"],
    ids: Int[Array, "*n Q"],
    shift: Float[Array, "*n"] | None = None,
    bias: Float[Array, "W"] | None = None,
) -> Float[Array, "*n Q"]:
    """Returns the logits at ids; 0 for ids of other shards.

    Args:
      vocabulary: the soft-cap and which ids are classes.
      logits: this shard's columns.
      ids: any integers; −inf for those outside `[0, V)`.
      shift: subtracted from the soft-capped logits; None returns raw logits.
      bias: added to the raw logits.
    """
    columns = columns_of(vocabulary.axis, ids, logits.shape[-1])
    picked = jnp.take_along_axis(logits, columns, -1)
    if bias is not None:
        picked += as_float(jnp.take(bias, columns, mode="clip"))
    picked = raw_logits(vocabulary, picked, ids)
    if shift is not None:
        picked = capped(vocabulary, picked) - shift[..., None]
    if vocabulary.axis is None:
        return picked
    elsewhere = (columns == logits.shape[-1]) & is_class(vocabulary, ids)
    return jnp.where(elsewhere, jnp.zeros_like(picked), picked)


def pick_all(
    vocabulary: Vocabulary,
    logits: Float[Array, "*n W"],
    shift: Float[Array, "*n"],
    query: Query,
) -> tuple[Float[Array, "*n"], dict[str, Float[Array, "*n Q"]]]:
    """Returns the relative logits of targets and candidates from one gather."""
    return by_query(query, pick(vocabulary, logits, ids_of(query), shift))


def ids_of(query: Query) -> Int[Array, "*n _"]:
    """Returns the targets and all candidates."""
    return jnp.concatenate(
        [query.targets[..., None], *query.candidates.values()], axis=-1
    )


def by_query(
    query: Query, picked: Float[Array, "*n _"]
) -> tuple[Float[Array, "*n"], dict[str, Float[Array, "*n _"]]]:
    """Splits values at `ids_of(query)` into the targets' and the candidates'."""
    named = list(query.candidates.items())
    ends = [1]
    for _, candidates in named:
        ends.append(ends[-1] + candidates.shape[-1])
    target, *parts = jnp.split(picked, ends[:-1], -1) if named else [picked]
    by_name = {name: part for (name, _), part in zip(named, parts, strict=True)}
    return target[..., 0], by_name
