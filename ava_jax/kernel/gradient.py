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
    if not tempered:
        cotangents = _at_temperature_one(cotangents)
    cotangents = _of_active(cotangents, query.active)
    z = possible_logits(vocabulary, logits)
    relative, e = exponentials(z, stats.shift, stats.pivot, query.complements)
    grad, at_top = _through_exponentials(e, relative, stats, cotangents, vocabulary)
    temperature = None
    if not is_zero_cotangent(cotangents.log_sum_tempered):
        inverse = 1 / stats.temperature
        cooled = jnp.exp(relative * inverse)
        of_sum = cotangents.log_sum_tempered * jnp.exp(-stats.log_sum_tempered)
        grad += (of_sum * inverse)[..., None] * cooled
        at_top += of_sum * inverse
        if of_temperature:
            temperature = _through_temperature(
                vocabulary, query, stats, of_sum, cooled * bounded(relative)
            )
    if not is_zero_cotangent(cotangents.total):
        grad += cotangents.total[..., None]
        at_top += cotangents.total
    grad = _where_possible(vocabulary, z, query, grad)
    if query.complements:
        top = columns_of(vocabulary.axis, stats.top, z.shape[-1])
        exists = stats.count > 0
        grad = put(grad, top, jnp.where(exists, at_top, jnp.zeros_like(at_top)))
    grad = _through_picks(vocabulary.axis, grad, query, stats, cotangents, add)
    grad = _through_soft_cap(vocabulary, z, query, grad)
    if of_temperature and not is_zero_cotangent(cotangents.temperature):
        direct = cotangents.temperature
        temperature = direct if temperature is None else temperature + direct
    return grad.astype(logits.dtype), temperature


def _through_temperature(vocabulary: Vocabulary, query, stats, of_sum, moments):
    """The temperature's cotangent through the tempered sums."""
    mean = of_sum * jnp.sum(moments, -1)
    mean = jnp.where(query.active, mean, jnp.zeros_like(mean))
    return -add_scalar(vocabulary.axis, jnp.sum(mean)) / stats.temperature**2


def _of_active(cotangents: TokenStats, active: Array) -> TokenStats:
    """Zeros in place of the cotangents of inactive tokens."""

    def keep(c: Array) -> Array:
        if c.ndim < active.ndim:
            return c
        mask = active.reshape(*active.shape, *[1] * (c.ndim - active.ndim))
        return jnp.where(mask, c, jnp.zeros_like(c))

    numbers = {k: v for k, v in vars(cotangents).items() if k != "temperature"}
    return dataclasses.replace(cotangents, **jax.tree.map(keep, numbers))


def exponentials(
    z: Array, shift: Array, pivot: Array, complements: bool
) -> tuple[Array, Array]:
    """Returns z relative to the largest logit, and its exponential, to the pivot.

    Where the pivot is not 0, the largest logit's own exponential is not meant.
    """
    relative = z - shift[..., None]
    if not complements:
        return relative, jnp.exp(relative)
    return relative, jnp.exp(jnp.minimum(relative - pivot[..., None], 0))


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


def _through_exponentials(e, relative, stats, cotangents: TokenStats, vocabulary):
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
        is_finite = vocabulary.finite and not has_padding(vocabulary, e.shape[-1])
        factor += curve[..., None] * (relative if is_finite else bounded(relative))
    return e * factor, of_p * jnp.exp(-stats.log_sum)


def _through_picks(axis, grad, query, stats, cotangents: TokenStats, add: Put):
    """Adds what reaches the logits at single ids, all at once."""
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
        return grad
    ids, logits, given = (jnp.concatenate(x, -1) for x in zip(*picks, strict=True))
    values = jnp.where(logits != -jnp.inf, given, jnp.zeros_like(given))
    return add(grad, columns_of(axis, ids, grad.shape[-1]), values)


def _through_soft_cap(vocabulary: Vocabulary, z, query: Query, grad):
    if vocabulary.soft_cap is None:
        return grad
    capped = jnp.where(z != -jnp.inf, z, jnp.zeros_like(z)) / vocabulary.soft_cap
    slope = jnp.where(query.active[..., None], 1 - capped**2, jnp.zeros_like(z))
    return grad * slope
