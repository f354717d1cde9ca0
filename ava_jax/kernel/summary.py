"""From sums over a row's logits to `TokenStats`."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ava_jax.kernel.logits import LOG_NOTHING
from ava_jax.kernel.stats import Query, TokenStats


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
        is_top=top == query.targets,
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
