"""Computing `TokenStats` from sums over whole rows of logits."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ava_jax.kernel.gradient import bounded
from ava_jax.kernel.logits import LOG_NOTHING, by_query, capped, ids_of
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary
from ava_jax.reduce import as_float

# In place of `top` where it is none of the query's ids; never a valid id.
NOT_QUERIED = -(2**31)


@flax.struct.dataclass
class RowSums:
    """The sums over whole rows that every implementation computes.

    Attributes:
      shift: the largest logit; 0 for tokens that are masked or have no class.
      second_shift: see `TokenStats`.
      exp_sum: `Σ exp(z − shift)`; None if it follows from `second_exp_sum`.
      second_exp_sum: `Σ exp(z − shift − second_shift)` over all classes except the top
        one; None if not requested.
      tempered: `Σ exp((z − shift)/T)`; None at temperature 1.
      tempered_moment: `Σ exp((z − shift)/T)·(z − shift)`; None at temperature 1, or if
        not requested.
      total: `Σ (z − shift)` over the possible classes.
      count: the number of possible classes.
      expected: `Σ exp(z − shift)·(z − shift)`.
      top: the id of the largest logit.
      target: `z_y − shift`.
      candidates: `z_c − shift` of the candidates, by name.
      is_top: whether the target is the top class; None if it follows from `top`.
    """

    shift: Float[Array, "*n"]
    second_shift: Float[Array, "*n"]
    exp_sum: Float[Array, "*n"] | None
    second_exp_sum: Float[Array, "*n"] | None
    tempered: Float[Array, "*n"] | None
    tempered_moment: Float[Array, "*n"] | None
    total: Float[Array, "*n"]
    count: Float[Array, "*n"]
    expected: Float[Array, "*n"]
    top: Int[Array, "*n"]
    target: Float[Array, "*n"]
    candidates: dict[str, Float[Array, "*n Q"]]
    is_top: Bool[Array, "*n"] | None = None


def plain_sums(is_all: bool, z, relative, e, axis: int) -> dict[str, Array]:
    """Computes the sums over all possible classes: those whose logit is not −inf.

    Args:
      is_all: whether all classes are possible.
      z: the logits, −inf where a class is impossible.
      relative: the logits relative to the shift.
      e: the exponentials of these.
      axis: the axis of classes.

    Returns:
      `total` and `expected` of `RowSums`.
    """
    if is_all:
        known = bound = relative
    else:
        known = jnp.where(z != -jnp.inf, relative, jnp.zeros_like(relative))
        bound = bounded(relative)
    return {"total": jnp.sum(known, axis), "expected": jnp.sum(e * bound, axis)}


def tempered_sums(
    query: Query,
    relative,
    temperature: Float[Array, ""] | None,
    axis: int | tuple[int, ...],
    keep: Callable[[Array], Array] = lambda e: e,
) -> dict[str, Array | None]:
    """Computes the sums at a temperature.

    Args:
      query: says whether the moment is requested.
      relative: the logits relative to the shift.
      temperature: T, or None for 1.
      axis: the axis of classes, or the axes that they are split to.
      keep: replaces exponentials that do not belong to the sums by 0.

    Returns:
      `tempered` and `tempered_moment` of `RowSums`.
    """
    if temperature is None:
        return {"tempered": None, "tempered_moment": None}
    e, moment = keep(jnp.exp(relative * (1 / temperature))), None
    if query.tempered_entropy:
        moment = jnp.sum(e * bounded(relative), axis)
    return {"tempered": jnp.sum(e, axis), "tempered_moment": moment}


def count_possible(is_all: bool, z: Float[Array, "*n W"]) -> Float[Array, "*n"]:
    """Counts the possible classes of each row."""
    if is_all:
        return jnp.full(z.shape[:-1], z.shape[-1], z.dtype)
    return jnp.sum(as_float(z != -jnp.inf), -1)


def with_queried(
    others: dict[str, Any],
    maxima: Float[Array, "2 *n"],
    shift: Float[Array, "*n"],
    raw: Float[Array, "*n Q"],
    is_left_out: Bool[Array, "*n Q"],
    query: Query,
    vocabulary: Vocabulary,
    temperature: Float[Array, ""] | None,
) -> RowSums:
    """Computes the sums of whole rows from sums that leave out ids of the query.

    Args:
      others: the sums over all other classes, relative to `shift`; `total` includes
        all. And `count`, the number of possible classes.
      maxima: of raw logits: the largest one of the other classes, and the largest one
        at an id below the target.
      shift: a number near the former.
      raw: the raw logits of `ids_of(query)`.
      is_left_out: marks those ids that the sums leave out, each once; among them is the
        one with the largest logit, the first one if several are equal.
      query: the query.
      vocabulary: the soft-cap.
      temperature: T, or None for 1.

    Returns:
      The sums of whole rows, relative to the largest logit.
    """
    ids = ids_of(query)
    best = jnp.max(raw, -1)
    largest, row_max, is_queried = _row_max(vocabulary, best, maxima[0])
    z = capped(vocabulary, raw)
    top = jnp.where(is_queried, first_of(ids, raw == best[..., None]), NOT_QUERIED)
    is_added = (raw != -jnp.inf) & is_left_out
    relative = z - row_max[..., None]
    e = _exp_where(is_added, relative)
    # Where no other class is possible, nothing has corrected the shift.
    near = jnp.where(maxima[0] != -jnp.inf, shift, row_max)
    offset = near - row_max
    scale = jnp.exp(offset)
    exp_sum = others["exp_sum"] * scale + jnp.sum(e, -1)
    moments = others["expected"] + offset * others["exp_sum"]
    tempered = moment = None
    if temperature is not None:
        lead = jnp.exp(offset / temperature)
        own = _exp_where(is_added, relative / temperature)
        tempered = others["tempered"] * lead + jnp.sum(own, -1)
        if query.tempered_entropy:
            moment = others["tempered_moment"] + offset * others["tempered"]
            moment = moment * lead + jnp.sum(own * bounded(relative), -1)
    second_shift, second_exp_sum = jnp.zeros_like(shift), None
    if query.log_one_minus_p:
        is_other = is_added & (ids != top[..., None])
        second, second_exp_sum = _sum_without_top(
            others["exp_sum"], near, capped(vocabulary, maxima[0]), is_other, z
        )
        second_shift = jnp.where(is_queried, second - row_max, second_shift)
        second_exp_sum = jnp.where(is_queried, second_exp_sum, exp_sum - 1)
    target, candidates = by_query(query, relative)
    # Two programs may cap equal logits to different numbers, and different ones alike.
    is_largest = (raw[..., 0] == largest) | (z[..., 0] >= row_max)
    return RowSums(
        shift=row_max,
        second_shift=second_shift,
        exp_sum=None if query.log_one_minus_p else exp_sum,
        second_exp_sum=second_exp_sum,
        tempered=tempered,
        tempered_moment=moment,
        total=others["total"] + others["count"] * (shift - row_max),
        count=jnp.broadcast_to(others["count"], shift.shape),
        expected=moments * scale + jnp.sum(e * bounded(relative), -1),
        top=top,
        target=target,
        candidates=candidates,
        is_top=is_largest & (capped(vocabulary, maxima[1]) < z[..., 0]),
    )


def _row_max(vocabulary: Vocabulary, queried, other):
    """Computes the row max from the largest queried and the largest other logit.

    Returns:
      The raw row max, the soft-capped one (0 without a possible class), and whether its
      id is queried.
    """
    largest = jnp.maximum(queried, other)
    exists = largest != -jnp.inf
    row_max = jnp.where(exists, capped(vocabulary, largest), jnp.zeros_like(largest))
    return largest, row_max, exists & (queried >= other)


def _sum_without_top(exp_sum, shift, largest, is_other, z):
    """Sums the exponentials of all classes except the top one, a queried id.

    Args:
      exp_sum: the sum over the classes that are not queried, relative to the shift.
      shift: that number.
      largest: the largest logit of those classes.
      is_other: marks the queried ids that are not the top class.
      z: the logits of the queried ids.

    Returns:
      The largest of all these logits, and the sum relative to it.
    """
    second = jnp.maximum(largest, jnp.max(jnp.where(is_other, z, -jnp.inf), -1))
    # With a single possible class the sum is 0, relative to any number.
    second = jnp.where(second == -jnp.inf, shift, second)
    lead = jnp.where(largest == -jnp.inf, jnp.zeros_like(shift), shift - second)
    total = exp_sum * jnp.exp(lead)
    return second, total + jnp.sum(_exp_where(is_other, z - second[..., None]), -1)


def first_of(ids: Int[Array, "*n Q"], chosen: Bool[Array, "*n Q"]):
    """Returns the smallest of the chosen ids."""
    return jnp.min(jnp.where(chosen, ids, jnp.iinfo(jnp.int32).max), -1)


def is_first(ids: Int[Array, "*n Q"]) -> Bool[Array, "*n Q"]:
    """Marks the first occurrence of every id."""
    index = jnp.arange(ids.shape[-1])
    is_earlier = index[:, None] > index[None]
    is_same = ids[..., None] == ids[..., None, :]
    is_earlier = jnp.expand_dims(is_earlier, range(ids.ndim - 1))
    return ~jnp.any(is_same & is_earlier, -1)


def _exp_where(mask, x):
    return jnp.where(mask, jnp.exp(x), jnp.zeros_like(x))


def summarize(sums: RowSums, query: Query, temperature: Float[Array, ""]) -> TokenStats:
    """Computes the statistics; those of masked tokens are finite but meaningless."""
    second_log_sum = None
    if sums.second_exp_sum is not None:
        exists, log = sums.second_exp_sum > 0, jnp.log(sums.second_exp_sum)
        second_log_sum = jnp.where(exists, log, LOG_NOTHING)
        log_sum = jnp.log1p(jnp.exp(sums.second_shift + second_log_sum))
    else:
        assert sums.exp_sum is not None
        log_sum = _log_or_zero(sums.exp_sum)
    expected = sums.expected * jnp.exp(-log_sum)
    tempered, of_tempered = log_sum, expected
    if sums.tempered is not None:
        tempered, of_tempered = _log_or_zero(sums.tempered), None
    if sums.tempered_moment is not None:
        of_tempered = sums.tempered_moment * jnp.exp(-tempered)
    top = sums.top
    stats = TokenStats(
        shift=sums.shift,
        log_sum=log_sum,
        second_shift=sums.second_shift,
        second_log_sum=second_log_sum,
        log_sum_tempered=tempered,
        expected_tempered=of_tempered if query.tempered_entropy else None,
        temperature=temperature,
        target=sums.target,
        total=sums.total,
        count=sums.count,
        expected=expected,
        top=top,
        is_top=top == query.targets if sums.is_top is None else sums.is_top,
        candidates=sums.candidates,
        candidate_is_top={k: top[..., None] == c for k, c in query.candidates.items()},
    )
    return _without_inactive(stats, query.active)


def _log_or_zero(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns the logarithm; 0 for a row without a possible class (infinite nll)."""
    exists = x > 0
    return jnp.where(exists | jnp.isnan(x), jnp.log(x), jnp.zeros_like(x))


def _without_inactive(stats: TokenStats, active: Array) -> TokenStats:
    """Replaces the statistics of masked tokens by finite constants."""

    def keep(x: Array, other: float = 0.0) -> Array:
        mask = active if x.ndim == active.ndim else active[..., None]
        return jnp.where(mask, x, jnp.full_like(x, other))

    second, of_tempered = stats.second_log_sum, stats.expected_tempered
    return dataclasses.replace(
        stats,
        # Any positive number: p < 1 keeps log(1 − p) finite.
        log_sum=keep(stats.log_sum, 1.0),
        log_sum_tempered=keep(stats.log_sum_tempered, 1.0),
        second_log_sum=None if second is None else keep(second),
        expected_tempered=None if of_tempered is None else keep(of_tempered),
        target=keep(stats.target),
        total=keep(stats.total),
        expected=keep(stats.expected),
        candidates=jax.tree.map(keep, stats.candidates),
    )
