"""The gradient of the logits: one expression over a block, for all implementations."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from ava_jax.kernel.collectives import add_scalar
from ava_jax.kernel.logits import (
    LOG_NOTHING,
    LOWEST,
    columns_of,
    has_padding,
    possible_logits,
)
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary

# Adds values [..., Q] to, or sets values [...] in, an array [..., W] at columns.
Put = Callable[[Array, Array, Array], Array]


def is_zero_cotangent(cotangent: object) -> bool:
    """Says whether a cotangent is known, while tracing, to be zero."""
    return cotangent is None or isinstance(cotangent, SymbolicZero)


def gradient_of_logits(
    vocabulary: Vocabulary,
    logits: Float[Array, "*n W"],
    query: Query,
    stats: TokenStats,
    cotangents: TokenStats,
    *,
    tempered: bool,
    of_temperature: bool,
    add: Put,
    put: Put,
) -> tuple[Float[Array, "*n W"], Float[Array, ""] | None]:
    """Computes the cotangents of the logits, and of the temperature if it is wanted.

    `e·(a + b·(z − shift)) + c·e_T + d` with one a, b, c and d per token, its value at
    the largest logit, and what reaches single ids.

    Args:
      vocabulary: the static facts.
      logits: the block.
      query: what `stats` answers.
      stats: from `reduce`.
      cotangents: of the stats; None where they are known to be zero.
      tempered: whether the temperature can differ from 1.
      of_temperature: whether its cotangent is wanted.
      add: adds values at the columns of ids.
      put: replaces the value at one column.

    Returns:
      The logits' cotangent in their own dtype, and the temperature's.
    """
    cotangents = of_active(cotangents, query.active, tempered=tempered)
    z = possible_logits(vocabulary, logits)
    relative = z - stats.shift[..., None]
    e = exponentials(relative, stats.pivot, query.complements)
    is_finite = vocabulary.finite and not has_padding(vocabulary, z.shape[-1])
    grad, at_top = through_sums(e, relative, stats, cotangents, is_finite=is_finite)
    temperature = None
    if of_temperature and not is_zero_cotangent(cotangents.log_sum_tempered):
        temperature = _through_temperature(
            vocabulary, query, relative, stats, cotangents
        )
    grad = _where_possible(vocabulary, z, query, grad)
    if query.complements:
        top = columns_of(vocabulary.axis, stats.top, z.shape[-1])
        exists = stats.count > 0
        grad = put(grad, top, jnp.where(exists, at_top, jnp.zeros_like(at_top)))
    picks = cotangents_of_picks(query, stats, cotangents)
    if picks is not None:
        ids, values = picks
        grad = add(grad, columns_of(vocabulary.axis, ids, grad.shape[-1]), values)
    grad = _through_soft_cap(vocabulary, z, query, grad)
    if of_temperature and not is_zero_cotangent(cotangents.temperature):
        direct = cotangents.temperature
        temperature = direct if temperature is None else temperature + direct
    return grad.astype(logits.dtype), temperature


def _through_temperature(vocabulary: Vocabulary, query, relative, stats, cotangents):
    """The temperature's cotangent through the tempered sums."""
    of_sum = cotangents.log_sum_tempered * jnp.exp(-stats.log_sum_tempered)
    moments = jnp.exp(relative * (1 / stats.temperature)) * bounded(relative)
    mean = of_sum * jnp.sum(moments, -1)
    mean = jnp.where(query.active, mean, jnp.zeros_like(mean))
    return -add_scalar(vocabulary.axis, jnp.sum(mean)) / stats.temperature**2


def of_active(cotangents: TokenStats, active: Array, *, tempered: bool) -> TokenStats:
    """Returns cotangents with zeros for inactive tokens.

    Args:
      cotangents: None where they are known to be zero.
      active: tokens that count.
      tempered: whether the temperature can differ from 1; if not, its sum's cotangent
        joins that of the other sum.
    """
    if not tempered:
        cotangents = _at_temperature_one(cotangents)

    def keep(c: Array) -> Array:
        if c.ndim < active.ndim:
            return c
        mask = active.reshape(*active.shape, *[1] * (c.ndim - active.ndim))
        return jnp.where(mask, c, jnp.zeros_like(c))

    numbers = {k: v for k, v in vars(cotangents).items() if k != "temperature"}
    return dataclasses.replace(cotangents, **jax.tree.map(keep, numbers))


def exponentials(relative: Array, pivot: Array, complements: bool) -> Array:
    """Returns exponentials of relative logits, to the pivot if that may not be 0.

    Where it is not, the largest logit's own exponential is not meant.
    """
    if complements:
        relative = jnp.minimum(relative - pivot[..., None], 0)
    return jnp.exp(relative)


def bounded(relative: Array) -> Array:
    """Keeps −inf out of products with its exponential, 0."""
    return jnp.maximum(relative, LOWEST)


def _where_possible(vocabulary: Vocabulary, z, query: Query, grad):
    """Zeros at impossible classes and in the rows of inactive tokens."""
    if not vocabulary.finite:
        kept = (z != -jnp.inf) & query.active[..., None]
    elif has_padding(vocabulary, z.shape[-1]):
        kept = z != -jnp.inf
    else:
        # An inactive token has finite logits and cotangents of 0.
        return grad
    return jnp.where(kept, grad, jnp.zeros_like(grad))


def _at_temperature_one(cotangents: TokenStats) -> TokenStats:
    """`log_sum_tempered` is `log_sum` then; their cotangents add up."""
    both = [
        c
        for c in (cotangents.log_sum, cotangents.log_sum_tempered)
        if not is_zero_cotangent(c)
    ]
    total = functools.reduce(jnp.add, both) if both else cotangents.log_sum
    return dataclasses.replace(cotangents, log_sum=total, log_sum_tempered=None)


def through_sums(
    e: Array,
    relative: Array,
    stats: TokenStats,
    cotangents: TokenStats,
    *,
    is_finite: bool,
) -> tuple[Array, Array]:
    """Computes the gradient through all sums over the vocabulary.

    Args:
      e: what `exponentials` returns, [..., W].
      relative: the logits, relative to the largest one.
      stats: from `reduce`.
      cotangents: from `of_active`.
      is_finite: whether no logit is −inf.

    Returns:
      The gradient, and what it is at the largest logit, where `e` may not be meant.
    """
    grad, at_top = _through_exponentials(e, relative, stats, cotangents, is_finite)
    if not is_zero_cotangent(cotangents.log_sum_tempered):
        inverse = 1 / stats.temperature
        of_sum = cotangents.log_sum_tempered * jnp.exp(-stats.log_sum_tempered)
        grad += (of_sum * inverse)[..., None] * jnp.exp(relative * inverse)
        at_top += of_sum * inverse
    if not is_zero_cotangent(cotangents.total):
        grad += cotangents.total[..., None]
        at_top += cotangents.total
    return grad, at_top


def _through_exponentials(e, relative, stats, cotangents: TokenStats, is_finite: bool):
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
        known = rest > LOG_NOTHING
        slope = of_rest * jnp.exp(-jnp.where(known, rest, zero))
        slope = jnp.where(known, slope, zero)
    factor = (slope + of_p * scale)[..., None]
    if curve is not None:
        factor += curve[..., None] * (relative if is_finite else bounded(relative))
    return e * factor, of_p * jnp.exp(-stats.log_sum)


def cotangents_of_picks(
    query: Query, stats: TokenStats, cotangents: TokenStats
) -> tuple[Array, Array] | None:
    """Returns ids and what reaches their logits, [..., Q]; None if nothing does."""
    picks = [
        (query.candidates[name], stats.candidates[name], cotangent)
        for name, cotangent in cotangents.candidates.items()
    ]
    target = cotangents.target
    if not is_zero_cotangent(target):
        of_target = query.targets[..., None], stats.target[..., None]
        picks.append((*of_target, target[..., None]))
    picks = [pick for pick in picks if not is_zero_cotangent(pick[2])]
    if not picks:
        return None
    ids, logits, given = (jnp.concatenate(x, -1) for x in zip(*picks, strict=True))
    return ids, jnp.where(logits != -jnp.inf, given, jnp.zeros_like(given))


def _through_soft_cap(vocabulary: Vocabulary, z, query: Query, grad):
    if vocabulary.soft_cap is None:
        return grad
    capped = jnp.where(z != -jnp.inf, z, jnp.zeros_like(z)) / vocabulary.soft_cap
    slope = jnp.where(query.active[..., None], 1 - capped**2, jnp.zeros_like(z))
    return grad * slope
