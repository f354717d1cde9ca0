"""The gradient of the logits: one expression per block, for all implementations."""

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

# Adds values [..., Q] to an array [..., W] at columns, or sets values [...] there.
Put = Callable[[Array, Array, Array], Array]


def is_zero_cotangent(cotangent: object) -> bool:
    """Returns whether a cotangent is known to be zero at trace time."""
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
    """Computes the cotangents of the logits and, on request, of the temperature.

    `e·(a + b·(z − shift)) + c·e_T + d` with one a, b, c and d per token; the value at
    the largest logit is set separately, and the cotangents of single ids are added.

    Args:
      vocabulary: the static facts.
      logits: the block.
      query: the query of `stats`.
      stats: from `reduce`.
      cotangents: of the stats; None where they are known to be zero.
      tempered: whether the temperature can differ from 1.
      of_temperature: whether to compute the temperature's cotangent.
      add: adds values at the columns of ids.
      put: replaces the value at one column.

    Returns:
      The logits' cotangent in their own dtype, and the temperature's.
    """
    cotangents = of_active(cotangents, query.active, tempered=tempered)
    z = possible_logits(vocabulary, logits)
    relative = z - stats.shift[..., None]
    e = exponentials(relative, stats.second_shift, query.log_one_minus_p)
    is_finite = vocabulary.finite and not has_padding(vocabulary, z.shape[-1])
    grad, at_top = through_sums(e, relative, stats, cotangents, is_finite=is_finite)
    temperature = None
    tempered_sums = cotangents.log_sum_tempered, cotangents.expected_tempered
    if of_temperature and not all(map(is_zero_cotangent, tempered_sums)):
        temperature = _through_temperature(
            vocabulary, query, relative, stats, cotangents
        )
    grad = _where_possible(vocabulary, z, query, grad)
    if query.log_one_minus_p:
        top = columns_of(vocabulary.axis, stats.top, z.shape[-1])
        exists = stats.count > 0
        grad = put(grad, top, jnp.where(exists, at_top, jnp.zeros_like(at_top)))
    at_ids = cotangents_at_ids(query, stats, cotangents)
    if at_ids is not None:
        ids, values = at_ids
        grad = add(grad, columns_of(vocabulary.axis, ids, grad.shape[-1]), values)
    grad = _through_soft_cap(vocabulary, z, query, grad)
    if of_temperature and not is_zero_cotangent(cotangents.temperature):
        direct = cotangents.temperature
        temperature = direct if temperature is None else temperature + direct
    return grad.astype(logits.dtype), temperature


def _through_temperature(vocabulary: Vocabulary, query, relative, stats, cotangents):
    """Computes the temperature's cotangent through the tempered sums."""
    e = jnp.exp(relative * (1 / stats.temperature))
    scale, relative = jnp.exp(-stats.log_sum_tempered), bounded(relative)
    total = jnp.zeros_like(scale)
    if not is_zero_cotangent(cotangents.log_sum_tempered):
        total += cotangents.log_sum_tempered * scale * jnp.sum(e * relative, -1)
    if not is_zero_cotangent(cotangents.expected_tempered):
        distance = relative - stats.expected_tempered[..., None]
        variance = scale * jnp.sum(e * relative * distance, -1)
        total += cotangents.expected_tempered * variance
    total = jnp.where(query.active, total, jnp.zeros_like(total))
    return -add_scalar(vocabulary.axis, jnp.sum(total)) / stats.temperature**2


def of_active(cotangents: TokenStats, active: Array, *, tempered: bool) -> TokenStats:
    """Returns the cotangents with zeros for masked tokens.

    Args:
      cotangents: None where they are known to be zero.
      active: marks the unmasked tokens.
      tempered: whether the temperature can differ from 1; if not, the cotangents of
        what depends on it are added to those of the same at 1.
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


def exponentials(relative: Array, second_shift: Array, log_one_minus_p: bool) -> Array:
    """Computes `exp(relative − second_shift)`; the second shift is 0 if not requested.

    Where it is not 0, the value at the largest logit would overflow; it is clipped to 1
    and must not be used.
    """
    if log_one_minus_p:
        relative = jnp.minimum(relative - second_shift[..., None], 0)
    return jnp.exp(relative)


def bounded(relative: Array) -> Array:
    """Replaces −inf by a large negative number: its product with exp(−inf) is 0."""
    return jnp.maximum(relative, LOWEST)


def _where_possible(vocabulary: Vocabulary, z, query: Query, grad):
    """Zeroes the gradient at impossible classes and for masked tokens."""
    if not vocabulary.finite:
        kept = (z != -jnp.inf) & query.active[..., None]
    elif has_padding(vocabulary, z.shape[-1]):
        kept = z != -jnp.inf
    else:
        # A masked token has finite logits and cotangents of 0.
        return grad
    return jnp.where(kept, grad, jnp.zeros_like(grad))


def _at_temperature_one(cotangents: TokenStats) -> TokenStats:
    """Adds the cotangents of tempered numbers to those of the numbers they equal."""

    def add(*parts):
        known = [c for c in parts if not is_zero_cotangent(c)]
        return functools.reduce(jnp.add, known) if known else None

    return dataclasses.replace(
        cotangents,
        log_sum=add(cotangents.log_sum, cotangents.log_sum_tempered),
        expected=add(cotangents.expected, cotangents.expected_tempered),
        log_sum_tempered=None,
        expected_tempered=None,
    )


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
      e: from `exponentials`, [..., W].
      relative: the logits relative to the largest one.
      stats: from `reduce`.
      cotangents: from `of_active`.
      is_finite: whether no logit is −inf.

    Returns:
      The gradient, and its value at the largest logit, where `e` may be clipped.
    """
    grad, at_top = _through_exponentials(e, relative, stats, cotangents, is_finite)
    if not is_zero_cotangent(cotangents.log_sum_tempered):
        inverse = 1 / stats.temperature
        of_sum = cotangents.log_sum_tempered * jnp.exp(-stats.log_sum_tempered)
        grad += (of_sum * inverse)[..., None] * jnp.exp(relative * inverse)
        at_top += of_sum * inverse
    if not is_zero_cotangent(cotangents.expected_tempered):
        of_tempered = _through_expected_tempered(
            relative, stats, cotangents, is_finite=is_finite
        )
        grad, at_top = grad + of_tempered[0], at_top + of_tempered[1]
    if not is_zero_cotangent(cotangents.total):
        grad += cotangents.total[..., None]
        at_top += cotangents.total
    return grad, at_top


def _through_expected_tempered(relative, stats, cotangents, *, is_finite: bool):
    """Computes the gradient through `expected_tempered`, and that at the top."""
    inverse, mean = 1 / stats.temperature, stats.expected_tempered
    scale = cotangents.expected_tempered * jnp.exp(-stats.log_sum_tempered)
    distance = (relative if is_finite else bounded(relative)) - mean[..., None]
    factor = scale[..., None] * (1 + inverse * distance)
    return jnp.exp(relative * inverse) * factor, scale * (1 - inverse * mean)


def _through_exponentials(e, relative, stats, cotangents: TokenStats, is_finite: bool):
    """Computes the gradient through `log_sum`, `second_log_sum` and `expected`.

    Returns:
      The gradient `e·(a + b·z)`, and its value at the largest logit, where e may be
      clipped.
    """
    zero = jnp.zeros_like(stats.log_sum)
    scale = jnp.exp(stats.second_shift - stats.log_sum)
    of_p, slope, curve = zero, zero, None
    if not is_zero_cotangent(cotangents.log_sum):
        of_p += cotangents.log_sum
    if not is_zero_cotangent(cotangents.expected):
        of_p += cotangents.expected * (1 - stats.expected)
        curve = cotangents.expected * scale
    given, second = cotangents.second_log_sum, stats.second_log_sum
    if second is not None and given is not None and not is_zero_cotangent(given):
        known = second > LOG_NOTHING
        slope = given * jnp.exp(-jnp.where(known, second, zero))
        slope = jnp.where(known, slope, zero)
    factor = (slope + of_p * scale)[..., None]
    if curve is not None:
        factor += curve[..., None] * (relative if is_finite else bounded(relative))
    return e * factor, of_p * jnp.exp(-stats.log_sum)


def cotangents_at_ids(
    query: Query, stats: TokenStats, cotangents: TokenStats
) -> tuple[Array, Array] | None:
    """Returns ids and the cotangents of their logits, [..., Q]; None if all are 0."""
    known = [
        (query.candidates[name], stats.candidates[name], cotangent)
        for name, cotangent in cotangents.candidates.items()
    ]
    target = cotangents.target
    if not is_zero_cotangent(target):
        of_target = query.targets[..., None], stats.target[..., None]
        known.append((*of_target, target[..., None]))
    known = [entry for entry in known if not is_zero_cotangent(entry[2])]
    if not known:
        return None
    ids, logits, given = (jnp.concatenate(x, -1) for x in zip(*known, strict=True))
    return ids, jnp.where(logits != -jnp.inf, given, jnp.zeros_like(given))


def _through_soft_cap(vocabulary: Vocabulary, z, query: Query, grad):
    if vocabulary.soft_cap is None:
        return grad
    capped = jnp.where(z != -jnp.inf, z, jnp.zeros_like(z)) / vocabulary.soft_cap
    slope = jnp.where(query.active[..., None], 1 - capped**2, jnp.zeros_like(z))
    return grad * slope
