"""The kernel for TPUs and GPUs, of logits that are not made yet.

One pass makes all sums, on a TPU together with the product that makes the logits: they
are relative to a number near the largest logit.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ava_jax.kernel import xla
from ava_jax.kernel.collectives import add_up, first_id, largest_anywhere
from ava_jax.kernel.logits import (
    capped,
    columns_of,
    has_padding,
    ids_of,
    is_class,
    pick,
    raw_logits,
)
from ava_jax.kernel.product import Product
from ava_jax.kernel.rounded import Exponentials
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary
from ava_jax.kernel.summary import summarize, with_picks
from ava_jax.reduce import as_float

# A shift is good where the largest logit is so far from it, over the temperature: the
# exponentials are far from the ends of float32, the rounding of the distance is small.
_LOWEST_SHIFT, _HIGHEST_SHIFT = -20.0, 60.0


def reduce(
    product: Product,
    query: Query,
    vocabulary: Vocabulary,
    temperature: Float[Array, ""] | None,
    *,
    keep: Literal["logits", "exponentials"] | None = None,
) -> tuple[TokenStats, Float[Array, "N W"] | Exponentials | None]:
    """Computes the statistics of a block whose logits are not made yet.

    The sums leave out the ids of the query, whose logits are then added one by one: so
    `log(1 − p)` of each is exact in one pass. All sums are relative to a number near
    the largest logit. Where that turns out to be far off, they are made again, relative
    to the logit itself; and so is the product, with which a TPU makes them.

    Args:
      product: the logits to be.
      query: per token, [N, ...].
      vocabulary: the static facts; the logits are finite.
      temperature: T, or None for 1.
      keep: what of the block to return for the gradient. Exponentials need logits that
        lie by columns, and at most `xla.MOST_COMPARED` ids.

    Returns:
      The statistics, and what was to be kept. Of `top`, what is asked for is known:
      whether it is one of the query's ids, and which; it is `NOT_ASKED` otherwise.
    """
    ids = ids_of(query)
    if ids.shape[-1] > xla.MOST_COMPARED:
        logits = product.by_token(product.make())
        stats = xla.reduce(logits, query, vocabulary, temperature)
        return stats, logits
    request = _Request(
        columns=columns_of(vocabulary.axis, ids, product.kernel.shape[1]),
        targets=query.targets,
        temperature=temperature,
        writes_logits=keep == "logits" or not product.by_columns,
        writes_exponentials=keep == "exponentials",
    )
    made = _make(product, vocabulary, request)
    kept, asked = None, made.picked
    if asked is None:
        assert made.logits is not None
        kept = product.by_token(made.logits)
        asked = pick(vocabulary, kept, ids)
    sums, picked = add_up(vocabulary.axis, (made.sums, asked), 1)
    picked = jnp.where(is_class(vocabulary, ids), picked, -jnp.inf)
    row_sums = with_picks(
        sums, made.maxima, made.shift, picked, query, vocabulary, temperature
    )
    given = jnp.ones_like(as_float(1.0)) if temperature is None else temperature
    if made.rounded is not None:
        kept = Exponentials(product.by_token(made.rounded), made.shift)
    return summarize(row_sums, query, given), kept


class _Request(NamedTuple):
    """What is wanted of a block.

    Attributes:
      columns: of the ids that are asked for, [N, K].
      targets: their ids, [N].
      temperature: T, or None for 1.
      writes_logits: whether the logits are; those asked for are summed up on the way
        otherwise.
      writes_exponentials: whether these are.
    """

    columns: Int[Array, "N K"]
    targets: Int[Array, "N"]
    temperature: Float[Array, ""] | None
    writes_logits: bool
    writes_exponentials: bool


class _Made(NamedTuple):
    """A block and sums over it.

    Attributes:
      logits: the block, as `Product.make` returns it, if it is written.
      rounded: its exponentials in bfloat16, if they are.
      sums: over this shard's classes that are not asked for.
      picked: the logits that are asked for, unless all are written; 0 where another
        shard has them.
      maxima: of raw logits, the largest one that is not asked for, and the largest one
        before the target.
      shift: what the sums ought to be relative to.
      is_off: whether they are relative to something else.
    """

    logits: Float[Array, "..."] | None
    rounded: Float[Array, "..."] | None
    sums: dict[str, Array]
    picked: Float[Array, "N K"] | None
    maxima: Float[Array, "2 N"]
    shift: Float[Array, "N"]
    is_off: Bool[Array, ""]


def _make(product: Product, vocabulary: Vocabulary, request: _Request) -> _Made:
    """Makes a block and its sums, once or, where the shift was far off, twice."""

    def until_near(turn: Callable[[Array], _Made]) -> _Made:
        near = capped(vocabulary, largest_anywhere(vocabulary.axis, product.near))
        shapes = jax.eval_shape(turn, near)
        start = jax.tree.map(lambda x: lax.empty(x.shape, x.dtype), shapes)
        start = start._replace(shift=near, is_off=jnp.ones_like(shapes.is_off))
        return lax.while_loop(
            lambda made: made.is_off, lambda made: turn(made.shift), start
        )

    def sum_up(logits: Array, shift: Array) -> _Made:
        return _sum_up(vocabulary, logits, product.class_axis, shift, request)

    def make_again(shift: Array) -> _Made:
        # Otherwise XLA would take the product, always the same, out of the loop.
        hidden, shift = lax.optimization_barrier((product.hidden, shift))
        logits = dataclasses.replace(product, hidden=hidden).make()
        made = sum_up(logits, shift)
        return made._replace(logits=logits) if request.writes_logits else made

    if product.by_columns:
        return until_near(make_again)
    # GPUs make no sums with a product, which then need not be made again.
    logits = product.make()
    return until_near(lambda shift: sum_up(logits, shift))._replace(logits=logits)


def _sum_up(
    vocabulary: Vocabulary, logits, axis: int, shift, request: _Request
) -> _Made:
    """Sums over this shard's classes but those asked for, in one pass.

    Args:
      vocabulary: the static facts.
      logits: the block, with the classes along an axis.
      axis: that one.
      shift: what sums are relative to, [N].
      request: what is wanted.
    """
    width = logits.shape[axis]
    every = lax.broadcasted_iota(jnp.int32, logits.shape, axis)
    ids = every + first_id(vocabulary.axis, width)
    is_padded = has_padding(vocabulary, width)
    raw = raw_logits(vocabulary, logits, ids) if is_padded else as_float(logits)

    def spread(x):
        return jnp.expand_dims(x, axis)

    hits = [every == spread(column) for column in request.columns.T]

    def besides(terms, nothing):
        """The terms of classes that are not asked for."""
        rest = jnp.full_like(terms, nothing)
        if axis == 0:
            return jnp.where(functools.reduce(jnp.logical_or, hits), rest, terms)
        # One mask of them all would become an array on GPUs.
        for hit in hits:
            terms = jnp.where(hit, rest, terms)
        return terms

    z = capped(vocabulary, raw)
    relative = z - spread(shift)
    exponentials = jnp.exp(relative)
    e = besides(exponentials, 0.0)
    sums = xla.plain_sums(not is_padded, z, relative, e, axis)
    sums["every"] = jnp.sum(e, axis)
    if request.temperature is not None:
        cooled = besides(jnp.exp(relative * (1 / request.temperature)), 0.0)
        sums["tempered"] = jnp.sum(cooled, axis)
    picked = rounded = None
    if not request.writes_logits:
        asked = [jnp.where(hit, raw, jnp.zeros_like(raw)) for hit in hits]
        picked = jnp.stack([jnp.sum(x, axis) for x in asked], -1)
    if request.writes_exponentials:
        rounded = exponentials.astype(jnp.bfloat16)
    largest = jnp.max(besides(raw, -jnp.inf), axis)
    is_before = ids < spread(request.targets)
    before = jnp.max(jnp.where(is_before, raw, jnp.full_like(raw, -jnp.inf)), axis)
    maxima = largest_anywhere(vocabulary.axis, jnp.stack([largest, before]))
    shift, is_off = _next_shift(vocabulary, shift, maxima[0], request.temperature)
    return _Made(None, rounded, sums, picked, maxima, shift, is_off)


def _next_shift(vocabulary: Vocabulary, shift, largest, temperature):
    """Returns what sums should be relative to, and whether that is another number."""
    steepest = as_float(1.0)
    if temperature is not None:
        steepest = jnp.maximum(steepest, 1 / temperature)
    largest = capped(vocabulary, largest)
    distance = (largest - shift) * steepest
    is_off = (distance < _LOWEST_SHIFT) | (distance > _HIGHEST_SHIFT)
    is_off &= largest != -jnp.inf
    return jnp.where(is_off, largest, shift), jnp.any(is_off)
