"""From logits to a handful of numbers per token, and back to the logits' gradient.

The reduction to `TokenStats` reads the logits a few times and exponentiates them once;
its gradient is one expression that uses the same exponentials, so that a block of
logits that fits a cache is read from memory once for both.
"""

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from ava_jax.reduce import as_float
from ava_jax.shards import (
    Summit,
    add_scalar,
    add_up,
    find_summit,
    first_id,
    num_shards,
)
from ava_jax.stats import Query, TokenStats, Vocabulary

# 1 − p is 0 in any precision when no other class is possible; its logarithm stays
# finite, so that a product with 0 is 0.
_LOG_NOTHING = -1e30
# Far below where an exponential is 0 in any precision.
_LOWEST = -1e15
# Below this the other classes' exponentials would leave float32's range.
_FAR = -60.0
# Comparing with every id is one more operation per logit and id, but needs no atomic
# addition; with many ids a scatter is cheaper on any device.
_MOST_COMPARED = 16


def token_statistics(
    logits: Float[Array, "*n V"],
    query: Query,
    vocabulary: Vocabulary,
    temperature: Float[Array, ""] | None = None,
) -> TokenStats:
    """Reduces logits to the numbers per token that all token losses share.

    Columns from `vocabulary.size` on are padding; −inf entries have probability 0; the
    logits of inactive tokens may hold anything. All of these get a gradient of 0.

    Args:
      logits: any float dtype; statistics are float32 (float64 under x64).
      query: targets, active tokens and further ids.
      vocabulary: the true vocabulary size and the soft-cap.
      temperature: T > 0, a scalar; 1 if None.

    Returns:
      TokenStats. Its gradient is one fused expression over the logits, which are kept
      in their own dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import Query, Vocabulary, token_statistics
      >>> query = Query(targets=jnp.array([0]), active=jnp.array([True]))
      >>> stats = token_statistics(jnp.zeros((1, 4)), query, Vocabulary(4))
      >>> round(float(stats.nll[0]), 4)
      1.3863
    """
    query = dataclasses.replace(
        query,
        targets=query.targets.astype(jnp.int32),
        candidates={k: c.astype(jnp.int32) for k, c in query.candidates.items()},
    )
    tempered = temperature is not None
    scale = as_float(1.0) if temperature is None else as_float(temperature)
    # XLA's CPU loops over an axis of size one are several times slower.
    lead = logits.shape[:-1]
    long = tuple(size for size in lead if size != 1)
    squeezed, query = jax.tree.map(
        lambda x: x.reshape(*long, *x.shape[len(lead) :]), (logits, query)
    )
    stats = cast(
        TokenStats, _token_statistics(vocabulary, tempered, squeezed, query, scale)
    )
    whole = jax.tree.map(
        lambda x: x.reshape(*lead, *x.shape[len(long) :]),
        dataclasses.replace(stats, temperature=stats.shift),
    )
    return dataclasses.replace(whole, temperature=stats.temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_statistics(vocabulary, tempered, logits, query, temperature):
    return _forward(vocabulary, tempered, logits, query, temperature)


def _possible_logits(vocabulary: Vocabulary, logits, ids=None):
    """The logits in the arithmetic dtype; −inf where a class is not possible."""
    z = as_float(logits)
    if vocabulary.soft_cap is not None:
        capped = vocabulary.soft_cap * jnp.tanh(z / vocabulary.soft_cap)
        z = jnp.where(z == -jnp.inf, z, capped)
    if ids is None:
        if z.shape[-1] * num_shards(vocabulary.axis) == vocabulary.size:
            return z
        ids = _ids(z) + first_id(vocabulary.axis, z.shape[-1])
    return jnp.where(_is_class(vocabulary, ids), z, -jnp.inf)


def _is_class(vocabulary: Vocabulary, ids):
    return (ids >= 0) & (ids < vocabulary.size)


def _ids(z):
    return lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)


def _columns(axis, ids, width: int):
    """The columns of ids on this shard; `width` where they are on another."""
    if axis is None:
        return ids
    local = ids - first_id(axis, width)
    return jnp.where((local >= 0) & (local < width), local, width)


def _num_segments(width: int) -> int:
    """How many equal parts a row falls into; what is found per part is small."""
    count = 1
    while width % (2 * count) == 0 and count < 128 and width // (2 * count) >= 64:
        count *= 2
    return count


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


def _split(z):
    return z.reshape(*z.shape[:-1], _num_segments(z.shape[-1]), -1)


def _find_peak(z) -> _Peak:
    """Reads the logits once: all but the maxima per part looks at one part only."""
    parts = _split(z)
    maxima = jnp.max(parts, -1)
    segment = jnp.argmax(maxima, -1).astype(jnp.int32)
    own = jnp.take_along_axis(parts, segment[..., None, None], -2)[..., 0, :]
    largest = jnp.max(maxima, -1)
    place = jnp.min(jnp.where(own == largest[..., None], _ids(own), own.shape[-1]), -1)
    beside = jnp.where(_ids(own) == place[..., None], -jnp.inf, own)
    elsewhere = jnp.where(_ids(maxima) == segment[..., None], -jnp.inf, maxima)
    return _Peak(
        largest=largest,
        top=segment * own.shape[-1] + place,
        segment=segment,
        second=jnp.maximum(jnp.max(beside, -1), jnp.max(elsewhere, -1)),
        beside=beside,
    )


def _exponentials(z, shift, pivot, complements: bool):
    """z relative to the largest logit, and its exponential relative to the pivot.

    Where the pivot is not 0, the largest logit's own exponential is not meant.
    """
    relative = z - shift[..., None]
    if not complements:
        return relative, jnp.exp(relative)
    return relative, jnp.exp(jnp.minimum(relative - pivot[..., None], 0))


def _bounded(relative):
    """Keeps −inf out of products with its exponential, 0."""
    return jnp.maximum(relative, _LOWEST)


def _rest(peak: _Peak, summit: Summit, shift, pivot, exponentials):
    """Sums all exponentials but the largest logit's, without cancellation."""

    def relative(logits):
        return jnp.exp(jnp.minimum(logits - shift[..., None] - pivot[..., None], 0))

    sums = jnp.sum(_split(exponentials), -1)
    others = jnp.where(
        _ids(sums) == peak.segment[..., None], jnp.zeros_like(sums), sums
    )
    rest = jnp.sum(others, -1) + jnp.sum(relative(peak.beside), -1)
    if summit.is_here is None:
        return rest
    own = relative(peak.largest[..., None])[..., 0]
    return jnp.where(summit.is_here, rest, rest + own)


def _reduce(vocabulary, tempered, logits, query, temperature):
    """The largest logit, what the rest is relative to, and the sums over the row."""
    axis = vocabulary.axis
    z = _possible_logits(vocabulary, logits)
    peak = _find_peak(z)
    asked = peak.second if query.complements else None
    summit = find_summit(axis, peak.largest, asked)
    exists = query.active & (summit.largest != -jnp.inf)
    shift = jnp.where(exists, summit.largest, jnp.zeros_like(summit.largest))
    pivot = jnp.zeros_like(shift)
    if summit.second is not None:
        second = summit.second - shift
        far = (second < _FAR) & (second != -jnp.inf)
        pivot = jnp.where(far, second, pivot)
    relative, e = _exponentials(z, shift, pivot, query.complements)
    possible = z != -jnp.inf

    def pick(ids):
        columns = _columns(axis, ids, z.shape[-1])
        picked = jnp.take_along_axis(logits, columns, -1)
        picked = _possible_logits(vocabulary, picked, ids) - shift[..., None]
        if axis is None:
            return picked
        elsewhere = (columns == z.shape[-1]) & _is_class(vocabulary, ids)
        return jnp.where(elsewhere, jnp.zeros_like(picked), picked)

    sums = {
        "total": jnp.sum(jnp.where(possible, relative, jnp.zeros_like(relative)), -1),
        "count": jnp.sum(as_float(possible), -1),
        "expected": jnp.sum(e * _bounded(relative), -1),
        "top": _top_id(axis, peak, summit, z.shape[-1]),
        "target": pick(query.targets[..., None])[..., 0],
        "candidates": {k: pick(c) for k, c in query.candidates.items()},
    }
    if query.complements:
        sums["rest"] = _rest(peak, summit, shift, pivot, e)
    else:
        sums["all"] = jnp.sum(_split(e), (-2, -1))
    if tempered:
        cooled = jnp.exp(relative * (1 / temperature))
        sums["tempered"] = jnp.sum(_split(cooled), (-2, -1))
    return shift, pivot, add_up(axis, sums, shift.ndim)


def _top_id(axis, peak: _Peak, summit: Summit, width: int):
    """The id of the row's largest logit, 0 on the shards that do not hold it."""
    if summit.is_here is None:
        return peak.top
    top = peak.top + first_id(axis, width)
    return jnp.where(summit.is_here, top, jnp.zeros_like(top))


def _forward(vocabulary, tempered, logits, query, temperature):
    shift, pivot, sums = _reduce(vocabulary, tempered, logits, query, temperature)
    log_rest_sum = None
    if query.complements:
        rest = sums["rest"]
        log_rest_sum = jnp.where(rest > 0, jnp.log(rest), _LOG_NOTHING)
        log_sum = jnp.log1p(jnp.exp(pivot + log_rest_sum))
    else:
        log_sum = jnp.log(sums["all"])
    top = sums["top"]
    stats = TokenStats(
        shift=shift,
        log_sum=log_sum,
        pivot=pivot,
        log_rest_sum=log_rest_sum,
        log_sum_tempered=jnp.log(sums["tempered"]) if tempered else log_sum,
        temperature=temperature,
        target=sums["target"],
        total=sums["total"],
        count=sums["count"],
        expected=sums["expected"] * jnp.exp(pivot - log_sum),
        top=top,
        is_top=top == query.targets,
        candidates=sums["candidates"],
        candidate_is_top={k: top[..., None] == c for k, c in query.candidates.items()},
    )
    return _without_inactive(stats, query.active)


def _without_inactive(stats: TokenStats, active) -> TokenStats:
    """Finite numbers in place of what the logits of inactive tokens gave."""

    def keep(x, other=0.0):
        mask = active if x.ndim == active.ndim else active[..., None]
        return jnp.where(mask, x, jnp.full_like(x, other))

    rest = stats.log_rest_sum
    return dataclasses.replace(
        stats,
        # Any positive number: p < 1 keeps the complement finite.
        log_sum=keep(stats.log_sum, 1.0),
        log_sum_tempered=keep(stats.log_sum_tempered, 1.0),
        log_rest_sum=None if rest is None else keep(rest),
        target=keep(stats.target),
        total=keep(stats.total),
        expected=keep(stats.expected),
        candidates={k: keep(c) for k, c in stats.candidates.items()},
    )


def _forward_with_residuals(vocabulary, tempered, logits, query, temperature):
    logits, query, temperature = jax.tree.map(
        lambda primal: primal.value, (logits, query, temperature)
    )
    stats = _forward(vocabulary, tempered, logits, query, temperature)
    return stats, (logits, query, stats)


def is_zero_cotangent(cotangent: object) -> bool:
    """Says whether a cotangent is known, while tracing, to be zero."""
    return cotangent is None or isinstance(cotangent, SymbolicZero)


def _backward(vocabulary, tempered, residuals, cotangents: TokenStats):
    logits, query, stats = residuals
    if not tempered:
        cotangents = _at_temperature_one(cotangents)
    z = _possible_logits(vocabulary, logits)
    relative, e = _exponentials(z, stats.shift, stats.pivot, query.complements)
    grad, at_top = _through_exponentials(e, relative, stats, cotangents)
    of_temperature = jnp.zeros_like(stats.temperature)
    if not is_zero_cotangent(cotangents.temperature):
        of_temperature += cotangents.temperature
    if not is_zero_cotangent(cotangents.log_sum_tempered):
        inverse = 1 / stats.temperature
        cooled = jnp.exp(relative * inverse)
        of_sum = cotangents.log_sum_tempered * jnp.exp(-stats.log_sum_tempered)
        grad += (of_sum * inverse)[..., None] * cooled
        at_top += of_sum * inverse
        mean = of_sum * jnp.sum(cooled * _bounded(relative), -1)
        mean = jnp.where(query.active, mean, jnp.zeros_like(mean))
        of_temperature -= inverse**2 * add_scalar(vocabulary.axis, jnp.sum(mean))
    if not is_zero_cotangent(cotangents.total):
        grad += cotangents.total[..., None]
        at_top += cotangents.total
    possible = z != -jnp.inf
    grad = jnp.where(possible & query.active[..., None], grad, jnp.zeros_like(grad))
    if query.complements:
        top = _columns(vocabulary.axis, stats.top, z.shape[-1])
        kept = query.active & (stats.count > 0)
        grad = _put(grad, top, jnp.where(kept, at_top, jnp.zeros_like(at_top)))
    grad = _through_picks(vocabulary.axis, grad, query, stats, cotangents)
    if vocabulary.soft_cap is not None:
        capped = jnp.where(possible, z, jnp.zeros_like(z)) / vocabulary.soft_cap
        slope = jnp.where(query.active[..., None], 1 - capped**2, jnp.zeros_like(z))
        grad *= slope
    return grad.astype(logits.dtype), None, of_temperature


def _at_temperature_one(cotangents: TokenStats) -> TokenStats:
    """`log_sum_tempered` is `log_sum` then; their cotangents add up."""
    both = [
        c
        for c in (cotangents.log_sum, cotangents.log_sum_tempered)
        if not is_zero_cotangent(c)
    ]
    total = functools.reduce(jnp.add, both) if both else cotangents.log_sum
    return dataclasses.replace(cotangents, log_sum=total, log_sum_tempered=None)


def _through_exponentials(e, relative, stats, cotangents: TokenStats):
    """The gradient through `log_sum`, `log_rest_sum` and `expected`: e·(a + b·z).

    Returns:
      The gradient, and what it is at the largest logit, where e may not be meant.
    """
    zero = jnp.zeros_like(stats.log_sum)
    scale = jnp.exp(stats.pivot - stats.log_sum)
    of_p, slope, curve = zero, zero, None
    if not is_zero_cotangent(cotangents.log_sum):
        of_p += cotangents.log_sum
    if not is_zero_cotangent(cotangents.expected):
        of_p += cotangents.expected * (1 - stats.expected)
        curve = cotangents.expected * scale
    of_rest, rest = cotangents.log_rest_sum, stats.log_rest_sum
    if rest is not None and of_rest is not None and not is_zero_cotangent(of_rest):
        known = rest > _LOG_NOTHING
        slope = of_rest * jnp.exp(-jnp.where(known, rest, zero))
        slope = jnp.where(known, slope, zero)
    factor = (slope + of_p * scale)[..., None]
    if curve is not None:
        factor += curve[..., None] * _bounded(relative)
    return e * factor, of_p * jnp.exp(-stats.log_sum)


def _through_picks(axis, grad, query, stats, cotangents: TokenStats):
    """Adds what reaches the logits at single ids."""
    picks = [
        (query.candidates[name], stats.candidates[name], cotangent)
        for name, cotangent in cotangents.candidates.items()
    ]
    if not is_zero_cotangent(cotangents.target):
        picks.append(
            (
                query.targets[..., None],
                stats.target[..., None],
                cotangents.target[..., None],
            )
        )
    for ids, logit, cotangent in picks:
        if is_zero_cotangent(cotangent):
            continue
        kept = query.active[..., None] & (logit != -jnp.inf)
        values = jnp.where(kept, cotangent, jnp.zeros_like(cotangent))
        grad = _place(grad, _columns(axis, ids, grad.shape[-1]), values)
    return grad


def _place(grad, columns, values):
    """Adds values [..., Q] to grad [..., V] at those columns that it has."""
    if _compares(columns.shape[-1]):
        every = _ids(grad)
        for q in range(columns.shape[-1]):
            here = every == columns[..., q : q + 1]
            grad += jnp.where(here, values[..., q : q + 1], jnp.zeros_like(grad))
        return grad
    return grad.at[_indices(columns)].add(values, mode="drop")


def _put(grad, columns, values):
    """Sets grad [..., V] to values [...] at those columns that it has."""
    if _compares(1):
        return jnp.where(_ids(grad) == columns[..., None], values[..., None], grad)
    return grad.at[_indices(columns[..., None])].set(values[..., None], mode="drop")


def _compares(num_ids: int) -> bool:
    return jax.default_backend() != "cpu" and num_ids <= _MOST_COMPARED


def _indices(columns):
    lead = range(columns.ndim - 1)
    return (
        *(lax.broadcasted_iota(jnp.int32, columns.shape, k) for k in lead),
        columns,
    )


_token_statistics.defvjp(_forward_with_residuals, _backward, symbolic_zeros=True)
