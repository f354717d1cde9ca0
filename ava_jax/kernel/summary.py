"""From sums over a row's logits to `TokenStats`."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ava_jax.kernel.gradient import bounded
from ava_jax.kernel.logits import LOG_NOTHING, by_query, capped, ids_of
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary

# In place of the largest logit's id where it is none of the query's; no id is as small.
NOT_ASKED = -(2**31)


@flax.struct.dataclass
class RowSums:
    """What an implementation finds out of whole rows, relative to the shift.

    Attributes:
      shift: the largest logit; 0 for tokens that do not count or have no class.
      pivot: what `rest` is relative to, see `TokenStats`.
      every: `Σ exp(z − shift)`; None if it follows from `rest`.
      rest: `Σ exp(z − shift − pivot)` over all but the largest; None if not asked for.
      tempered: `Σ exp((z − shift)/T)`; None at temperature 1.
      total: `Σ (z − shift)` over the possible classes.
      count: how many classes are possible.
      expected: `Σ exp(z − shift)·(z − shift)`.
      top: the id of the largest logit.
      target: the target's logit.
      candidates: the candidates' logits, by name.
      is_top: whether the target is the largest; None if `top` tells.
    """

    shift: Float[Array, "*n"]
    pivot: Float[Array, "*n"]
    every: Float[Array, "*n"] | None
    rest: Float[Array, "*n"] | None
    tempered: Float[Array, "*n"] | None
    total: Float[Array, "*n"]
    count: Float[Array, "*n"]
    expected: Float[Array, "*n"]
    top: Int[Array, "*n"]
    target: Float[Array, "*n"]
    candidates: dict[str, Float[Array, "*n Q"]]
    is_top: Bool[Array, "*n"] | None = None


def with_picks(
    others: dict[str, Array],
    maxima: Float[Array, "2 *n"],
    shift: Float[Array, "*n"],
    raw: Float[Array, "*n Q"],
    query: Query,
    vocabulary: Vocabulary,
    temperature: Float[Array, ""] | None,
) -> RowSums:
    """Joins the sums over the classes that are not asked for with those that are.

    Args:
      others: the former, relative to the shift; `total` is of all classes.
      maxima: of raw logits, the largest one not asked for, and the largest one before
        the target.
      shift: near the former.
      raw: the raw logits of `ids_of(query)`.
      query: the ids.
      vocabulary: the soft-cap and how many classes there are, all of them possible.
      temperature: T, or None for 1.

    Returns:
      The sums of whole rows, relative to the largest logit.
    """
    ids = ids_of(query)
    best = jnp.max(raw, -1)
    largest = jnp.maximum(best, maxima[0])
    exists = largest != -jnp.inf
    z, second = capped(vocabulary, raw), capped(vocabulary, maxima[0])
    top_logit = jnp.where(exists, capped(vocabulary, largest), jnp.zeros_like(shift))
    is_asked = exists & (best >= maxima[0])
    top = jnp.where(is_asked, _first_of(ids, raw == best[..., None]), NOT_ASKED)
    counts = (raw != -jnp.inf) & _is_first(ids)
    relative = z - top_logit[..., None]
    e = _exp_where(counts, relative)
    # Where nothing else is possible, nothing has corrected the shift.
    has_others = maxima[0] != -jnp.inf
    near = jnp.where(has_others, shift, top_logit)
    offset = near - top_logit
    scale = jnp.exp(offset)
    every = others["every"] * scale + jnp.sum(e, -1)
    moments = others["expected"] + offset * others["every"]
    tempered = None
    if temperature is not None:
        cooled = _exp_where(counts, relative / temperature)
        tempered = others["tempered"] * jnp.exp(offset / temperature)
        tempered += jnp.sum(cooled, -1)
    pivot, rest = jnp.zeros_like(shift), None
    if query.complements:
        is_other = counts & (ids != top[..., None])
        pivot, rest = _besides_top(others["every"], near, second, is_other, z)
        pivot = jnp.where(is_asked, pivot - top_logit, jnp.zeros_like(pivot))
        rest = jnp.where(is_asked, rest, every - 1)
    target, candidates = by_query(query, relative)
    # Two programs may cap equal logits to different ones, and cap different ones alike.
    is_largest = (raw[..., 0] == largest) | (z[..., 0] >= top_logit)
    return RowSums(
        shift=top_logit,
        pivot=pivot,
        every=None if query.complements else every,
        rest=rest,
        tempered=tempered,
        total=others["total"] + vocabulary.size * (shift - top_logit),
        count=jnp.full_like(shift, vocabulary.size),
        expected=moments * scale + jnp.sum(e * bounded(relative), -1),
        top=top,
        target=target,
        candidates=candidates,
        is_top=is_largest & (capped(vocabulary, maxima[1]) < z[..., 0]),
    )


def _besides_top(every, shift, largest, is_other, z):
    """Sums the exponentials of all classes but the largest, which is asked for.

    Args:
      every: the sum over the classes that are not asked for, relative to the shift.
      shift: that number.
      largest: of those classes.
      is_other: which of those asked for are not the largest.
      z: the logits of those.

    Returns:
      The largest of all these logits, and the sum relative to it.
    """
    second = jnp.maximum(largest, jnp.max(jnp.where(is_other, z, -jnp.inf), -1))
    # A class alone has nothing besides it: the sum is 0, relative to anything.
    second = jnp.where(second == -jnp.inf, shift, second)
    lead = jnp.where(largest == -jnp.inf, jnp.zeros_like(shift), shift - second)
    rest = every * jnp.exp(lead)
    return second, rest + jnp.sum(_exp_where(is_other, z - second[..., None]), -1)


def _first_of(ids: Int[Array, "*n Q"], chosen: Bool[Array, "*n Q"]):
    """The smallest of the chosen ids."""
    return jnp.min(jnp.where(chosen, ids, jnp.iinfo(jnp.int32).max), -1)


def _is_first(ids: Int[Array, "*n Q"]) -> Bool[Array, "*n Q"]:
    """Says which ids have not come before."""
    place = jnp.arange(ids.shape[-1])
    is_earlier = place[:, None] > place
    return ~jnp.any((ids[..., None] == ids[..., None, :]) & is_earlier, -1)


def _exp_where(counts, x):
    return jnp.where(counts, jnp.exp(x), jnp.zeros_like(x))


def summarize(sums: RowSums, query: Query, temperature: Float[Array, ""]) -> TokenStats:
    """Returns the statistics; those of inactive tokens are finite and mean nothing."""
    log_rest_sum = None
    if sums.rest is not None:
        log_rest_sum = jnp.where(sums.rest > 0, jnp.log(sums.rest), LOG_NOTHING)
        log_sum = jnp.log1p(jnp.exp(sums.pivot + log_rest_sum))
    else:
        assert sums.every is not None
        log_sum = _log_or_zero(sums.every)
    tempered = log_sum if sums.tempered is None else _log_or_zero(sums.tempered)
    top = sums.top
    stats = TokenStats(
        shift=sums.shift,
        log_sum=log_sum,
        pivot=sums.pivot,
        log_rest_sum=log_rest_sum,
        log_sum_tempered=tempered,
        temperature=temperature,
        target=sums.target,
        total=sums.total,
        count=sums.count,
        expected=sums.expected * jnp.exp(-log_sum),
        top=top,
        is_top=top == query.targets if sums.is_top is None else sums.is_top,
        candidates=sums.candidates,
        candidate_is_top={k: top[..., None] == c for k, c in query.candidates.items()},
    )
    return _without_inactive(stats, query.active)


def _log_or_zero(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The logarithm; 0 for a row without a possible class, whose nll is infinite."""
    exists = x > 0
    return jnp.where(exists | jnp.isnan(x), jnp.log(x), jnp.zeros_like(x))


def _without_inactive(stats: TokenStats, active: Array) -> TokenStats:
    """Finite numbers in place of what the logits of inactive tokens gave."""

    def keep(x: Array, other: float = 0.0) -> Array:
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
        candidates=jax.tree.map(keep, stats.candidates),
    )
