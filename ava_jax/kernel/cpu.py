"""The kernel for CPUs: a block of logits fits the caches.

A row is read as up to 128 segments of equal length, whose maxima give the row max. Its
first index, the second largest logit and the sum of all other exponentials then need
only the one segment that holds it. The logits are read from memory once and
exponentiated once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ava_jax.kernel.collectives import RowMax, add_up, first_id, global_row_max
from ava_jax.kernel.gradient import exponentials, gradient_of_logits
from ava_jax.kernel.logits import column_ids, has_padding, pick_all, possible_logits
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary
from ava_jax.kernel.summary import (
    RowSums,
    count_possible,
    plain_sums,
    summarize,
    tempered_sums,
)
from ava_jax.reduce import as_float

# Below this, the exponentials of the other classes would leave float32's range.
_FAR = -60.0


class _LocalMax(NamedTuple):
    """The maximum of each row's local columns, and its segment of the row.

    Attributes:
      largest: the largest logit.
      top: its column.
      segment: the index of its segment.
      second: the second largest logit.
      others: its segment, with −inf in its place.
    """

    largest: Float[Array, "*n"]
    top: Int[Array, "*n"]
    segment: Int[Array, "*n"]
    second: Float[Array, "*n"]
    others: Float[Array, "*n L"]


def reduce(
    logits: Float[Array, "*n W"],
    query: Query,
    vocabulary: Vocabulary,
    temperature: Float[Array, ""] | None,
) -> TokenStats:
    """Computes the statistics of a block; see `token_statistics`."""
    axis = vocabulary.axis
    z = possible_logits(vocabulary, logits)
    local = _local_max(z, needs_second=query.log_one_minus_p)
    second = local.second if query.log_one_minus_p else None
    row_max = global_row_max(axis, local.largest, second)
    exists = row_max.largest != -jnp.inf
    if not vocabulary.finite:
        exists &= query.active
    shift = jnp.where(exists, row_max.largest, jnp.zeros_like(row_max.largest))
    second_shift = _second_shift(row_max, shift)
    relative = z - shift[..., None]
    e = exponentials(relative, second_shift, query.log_one_minus_p)
    sums: dict[str, Any] = {
        **_plain_sums(vocabulary, z, relative, e),
        "top": _top_id(axis, local, row_max, z.shape[-1]),
        "exp_sum": None,
        "second_exp_sum": None,
    }
    sums["expected"] *= jnp.exp(second_shift)
    sums["target"], sums["candidates"] = pick_all(vocabulary, logits, shift, query)
    if query.log_one_minus_p:
        sums["second_exp_sum"] = _sum_without_top(
            local, row_max, shift, second_shift, e
        )
    else:
        sums["exp_sum"] = jnp.sum(_split(e), (-2, -1))
    sums |= tempered_sums(query, _split(relative), temperature, (-2, -1))
    added = add_up(axis, sums, shift.ndim)
    given = jnp.ones_like(as_float(1.0)) if temperature is None else temperature
    row_sums = RowSums(shift=shift, second_shift=second_shift, **added)
    return summarize(row_sums, query, given)


def logits_gradient(
    logits: Float[Array, "*n W"],
    query: Query,
    vocabulary: Vocabulary,
    stats: TokenStats,
    cotangents: TokenStats,
    *,
    tempered: bool,
    of_temperature: bool,
) -> tuple[Float[Array, "*n W"], Float[Array, ""] | None]:
    """Computes the cotangents of logits and temperature; ids are scattered to."""
    return gradient_of_logits(
        vocabulary,
        logits,
        query,
        stats,
        cotangents,
        tempered=tempered,
        of_temperature=of_temperature,
        add=scatter_add,
        put=_scatter_set,
    )


def scatter_add(grad: Array, columns: Array, values: Array) -> Array:
    """Adds values [..., Q] to grad [..., W] at the columns within range."""
    return grad.at[_indices(columns)].add(values, mode="drop")


def _scatter_set(grad, columns, values):
    return grad.at[_indices(columns[..., None])].set(values[..., None], mode="drop")


def _indices(columns):
    lead = range(columns.ndim - 1)
    return (
        *(lax.broadcasted_iota(jnp.int32, columns.shape, k) for k in lead),
        columns,
    )


def _num_segments(width: int) -> int:
    """Returns the number of equal segments of a row."""
    count = 1
    while width % (2 * count) == 0 and count < 128 and width // (2 * count) >= 64:
        count *= 2
    return count


def _split(z):
    *lead, width = z.shape
    count = _num_segments(width)
    return z.reshape(*lead, count, width // count)


def _plain_sums(vocabulary: Vocabulary, z, relative, e) -> dict[str, Array]:
    """Computes the sums over all possible classes, and their number.

    Masks of −inf entries take as long as the sums. They are left out of a block that
    has none, which its sums show.
    """
    is_padded = has_padding(vocabulary, z.shape[-1])
    if vocabulary.finite or is_padded:
        return _sums_of(not is_padded, z, relative, e)
    total = jnp.sum(relative, -1)
    is_all = jnp.all(total > -jnp.inf)
    return lax.cond(is_all, _sums_of_all, _sums_by_rows, relative, e, total)


# Of the module, so that outside of jit one program of them serves all calls.
def _sums_of(is_all: bool, z, relative, e) -> dict[str, Array]:
    count = count_possible(is_all, z)
    return plain_sums(is_all, z, relative, e, -1) | {"count": count}


def _sums_of_all(relative, e, total) -> dict[str, Array]:
    return _sums_of(True, relative, relative, e) | {"total": total}


def _sums_of_row(row) -> dict[str, Array]:
    relative, e = row
    return _sums_of(False, relative, relative, e)


def _sums_by_rows(relative, e, _) -> dict[str, Array]:
    # Otherwise the masks, which few blocks need, would double the memory.
    rows = [x.reshape(-1, x.shape[-1]) for x in (relative, e)]
    found = lax.map(_sums_of_row, tuple(rows))
    return jax.tree.map(lambda x: x.reshape(relative.shape[:-1]), found)


def _local_max(z, *, needs_second: bool) -> _LocalMax:
    """Finds the row max and the second largest logit in one read of the logits."""
    segments = _split(z)
    maxima = jnp.max(segments, -1)
    segment = jnp.argmax(maxima, -1).astype(jnp.int32)
    own = jnp.take_along_axis(segments, segment[..., None, None], -2)[..., 0, :]
    # XLA makes the maximum of maxima that are needed a second read of all logits.
    largest = jnp.max(own if needs_second else maxima, -1)
    is_largest = own == largest[..., None]
    offset = jnp.min(jnp.where(is_largest, column_ids(own), own.shape[-1]), -1)
    others = jnp.where(column_ids(own) == offset[..., None], -jnp.inf, own)
    elsewhere = jnp.where(column_ids(maxima) == segment[..., None], -jnp.inf, maxima)
    return _LocalMax(
        largest=largest,
        top=segment * own.shape[-1] + offset,
        segment=segment,
        second=jnp.maximum(jnp.max(others, -1), jnp.max(elsewhere, -1)),
        others=others,
    )


def _second_shift(row_max: RowMax, shift):
    """Returns the second largest logit where the others would underflow, else 0."""
    zero = jnp.zeros_like(shift)
    if row_max.second is None:
        return zero
    second = row_max.second - shift
    underflows = (second < _FAR) & (second != -jnp.inf)
    return jnp.where(underflows, second, zero)


def _sum_without_top(
    local: _LocalMax, row_max: RowMax, shift, second_shift, exponentials
):
    """Sums all exponentials except that of the row max, without cancellation."""

    def exp(logits):
        shifted = logits - shift[..., None] - second_shift[..., None]
        return jnp.exp(jnp.minimum(shifted, 0))

    sums = jnp.sum(_split(exponentials), -1)
    is_own = column_ids(sums) == local.segment[..., None]
    elsewhere = jnp.where(is_own, jnp.zeros_like(sums), sums)
    total = jnp.sum(elsewhere, -1) + jnp.sum(exp(local.others), -1)
    if row_max.is_local is None:
        return total
    of_largest = exp(local.largest[..., None])[..., 0]
    return jnp.where(row_max.is_local, total, total + of_largest)


def _top_id(axis, local: _LocalMax, row_max: RowMax, width: int):
    """Returns the id of the row max, and 0 on the shards that do not hold it."""
    if row_max.is_local is None:
        return local.top
    top = local.top + first_id(axis, width)
    return jnp.where(row_max.is_local, top, jnp.zeros_like(top))
