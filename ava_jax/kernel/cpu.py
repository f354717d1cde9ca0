"""The kernel for processors: a block of logits fits the caches.

A row is read as up to 128 equal parts. Their maxima give the largest logit; the first
index of it, the second largest and the sum of all other exponentials then look at the
one part it lies in. The logits are read from memory once and exponentiated once.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ava_jax.kernel.collectives import Largest, add_up, find_largest, first_id
from ava_jax.kernel.gradient import bounded, exponentials, gradient_of_logits
from ava_jax.kernel.logits import column_ids, pick_all, possible_logits
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary
from ava_jax.kernel.summary import RowSums, summarize
from ava_jax.reduce import as_float

# Below this the other classes' exponentials would leave float32's range.
_FAR = -60.0


class _Peak(NamedTuple):
    """The largest logit of each row and its part of the row.

    Attributes:
      largest: the logit.
      top: its column.
      segment: the part it lies in.
      second: the largest one of the others.
      beside: the others of its part.
    """

    largest: Float[Array, "*n"]
    top: Int[Array, "*n"]
    segment: Int[Array, "*n"]
    second: Float[Array, "*n"]
    beside: Float[Array, "*n L"]


def reduce(
    logits: Float[Array, "*n W"],
    query: Query,
    vocabulary: Vocabulary,
    temperature: Float[Array, ""] | None,
) -> TokenStats:
    """Computes the statistics of a block, see `token_statistics`."""
    axis = vocabulary.axis
    z = possible_logits(vocabulary, logits)
    peak = _find_peak(z)
    asked = peak.second if query.complements else None
    largest = find_largest(axis, peak.largest, asked)
    exists = largest.largest != -jnp.inf
    if not vocabulary.finite:
        exists &= query.active
    shift = jnp.where(exists, largest.largest, jnp.zeros_like(largest.largest))
    pivot = jnp.zeros_like(shift)
    if largest.second is not None:
        second = largest.second - shift
        far = (second < _FAR) & (second != -jnp.inf)
        pivot = jnp.where(far, second, pivot)
    relative = z - shift[..., None]
    e = exponentials(relative, pivot, query.complements)
    possible = z != -jnp.inf
    sums: dict[str, Any] = {
        "total": jnp.sum(jnp.where(possible, relative, jnp.zeros_like(relative)), -1),
        "count": jnp.sum(as_float(possible), -1),
        "expected": jnp.exp(pivot) * jnp.sum(e * bounded(relative), -1),
        "top": _top_id(axis, peak, largest, z.shape[-1]),
        "every": None,
        "rest": None,
        "tempered": None,
    }
    sums["target"], sums["candidates"] = pick_all(vocabulary, logits, shift, query)
    if query.complements:
        sums["rest"] = _rest(peak, largest, shift, pivot, e)
    else:
        sums["every"] = jnp.sum(_split(e), (-2, -1))
    if temperature is not None:
        cooled = jnp.exp(relative * (1 / temperature))
        sums["tempered"] = jnp.sum(_split(cooled), (-2, -1))
    added = add_up(axis, sums, shift.ndim)
    given = jnp.ones_like(as_float(1.0)) if temperature is None else temperature
    return summarize(RowSums(shift=shift, pivot=pivot, **added), query, given)


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
    """Computes the cotangents of logits and temperature; single ids are scattered."""
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
    """Adds values [..., Q] to grad [..., W] at those columns that it has."""
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
    """How many equal parts a row falls into; what is found per part is small."""
    count = 1
    while width % (2 * count) == 0 and count < 128 and width // (2 * count) >= 64:
        count *= 2
    return count


def _split(z):
    return z.reshape(*z.shape[:-1], _num_segments(z.shape[-1]), -1)


def _find_peak(z) -> _Peak:
    """Reads the logits once: all but the maxima per part looks at one part only."""
    parts = _split(z)
    maxima = jnp.max(parts, -1)
    segment = jnp.argmax(maxima, -1).astype(jnp.int32)
    own = jnp.take_along_axis(parts, segment[..., None, None], -2)[..., 0, :]
    largest = jnp.max(maxima, -1)
    here = own == largest[..., None]
    offset = jnp.min(jnp.where(here, column_ids(own), own.shape[-1]), -1)
    beside = jnp.where(column_ids(own) == offset[..., None], -jnp.inf, own)
    elsewhere = jnp.where(column_ids(maxima) == segment[..., None], -jnp.inf, maxima)
    return _Peak(
        largest=largest,
        top=segment * own.shape[-1] + offset,
        segment=segment,
        second=jnp.maximum(jnp.max(beside, -1), jnp.max(elsewhere, -1)),
        beside=beside,
    )


def _rest(peak: _Peak, whole: Largest, shift, pivot, exponentials):
    """Sums all exponentials but the largest logit's, without cancellation."""

    def relative(logits):
        return jnp.exp(jnp.minimum(logits - shift[..., None] - pivot[..., None], 0))

    sums = jnp.sum(_split(exponentials), -1)
    is_own = column_ids(sums) == peak.segment[..., None]
    others = jnp.where(is_own, jnp.zeros_like(sums), sums)
    rest = jnp.sum(others, -1) + jnp.sum(relative(peak.beside), -1)
    if whole.is_here is None:
        return rest
    own = relative(peak.largest[..., None])[..., 0]
    return jnp.where(whole.is_here, rest, rest + own)


def _top_id(axis, peak: _Peak, whole: Largest, width: int):
    """The id of the row's largest logit, 0 on the shards that do not hold it."""
    if whole.is_here is None:
        return peak.top
    top = peak.top + first_id(axis, width)
    return jnp.where(whole.is_here, top, jnp.zeros_like(top))
