"""The kernel for TPUs and GPUs: every sum is a reduction over the whole axis.

Given logits take two passes: the largest logit, and all sums relative to it. Logits
that are a product take one, which a TPU makes with the product: all sums relative to a
number near the largest logit. Nothing has the shape of a block but the logits and their
gradient, and nothing is laid out anew.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ava_jax.kernel.collectives import (
    add_up,
    find_largest,
    first_id,
    largest_anywhere,
    merge_rest,
    num_shards,
)
from ava_jax.kernel.cpu import scatter_add
from ava_jax.kernel.gradient import bounded, gradient_of_logits
from ava_jax.kernel.logits import (
    capped,
    column_ids,
    columns_of,
    has_padding,
    ids_of,
    pick,
    pick_all,
    possible_logits,
    raw_logits,
)
from ava_jax.kernel.product import Product
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary
from ava_jax.kernel.summary import RowSums, summarize, with_picks
from ava_jax.reduce import as_float

# Sums of exponentials below this are made again, relative to the second largest: their
# parts may be near the smallest number of float32, 1e-38.
_FAINT = 1e-30
# No other logit of such a row is as near to the largest one.
_FAR = -50.0
# A shift is good where the largest logit is so far from it, over the temperature: the
# exponentials are far from the ends of float32, the rounding of the distance is small.
_LOWEST_SHIFT, _HIGHEST_SHIFT = -20.0, 60.0
# Comparing with every id is one more operation per logit and id, but needs no atomic
# addition; with many ids a scatter is cheaper on any device.
_MOST_COMPARED = 16


def reduce(
    logits: Float[Array, "*n W"],
    query: Query,
    vocabulary: Vocabulary,
    temperature: Float[Array, ""] | None,
) -> TokenStats:
    """Computes the statistics of a block, see `token_statistics`."""
    axis, width = vocabulary.axis, logits.shape[-1]
    raw = raw_logits(vocabulary, logits)
    if not vocabulary.finite:
        # A maximum of something made on the way is fused; a bare one is slow on TPUs.
        raw = jnp.where(query.active[..., None], raw, -jnp.inf)
    own = jnp.max(raw, -1)
    # Without it the compiler would make the logits once for the largest and once more.
    logits, own = lax.optimization_barrier((logits, own))
    whole = find_largest(axis, capped(vocabulary, own), None)
    exists = whole.largest != -jnp.inf
    shift = jnp.where(exists, whole.largest, jnp.zeros_like(own))
    z = possible_logits(vocabulary, logits)
    compared = _compare(vocabulary, logits, z, own, shift)
    relative = z - shift[..., None]
    e = jnp.exp(relative)
    is_all = vocabulary.finite and not has_padding(vocabulary, width)
    sums: dict[str, Any] = _plain_sums(is_all, z, relative, e, -1)
    sums["count"] = (
        jnp.full(shift.shape, width, z.dtype)
        if is_all
        else jnp.sum(as_float(z != -jnp.inf), -1)
    )
    sums |= {"every": None, "tempered": None}
    sums["target"], sums["candidates"] = pick_all(vocabulary, logits, shift, query)
    # As floats, the ids join the other reductions in one pass.
    first = as_float(column_ids(z) + first_id(axis, width))
    size = as_float(num_shards(axis) * width)
    top = jnp.min(jnp.where(compared.is_equal, first, size), -1)
    if whole.is_here is not None:
        top = jnp.where(whole.is_here, top, jnp.zeros_like(top))
    sums["top"] = jnp.where(exists, top, jnp.zeros_like(top)).astype(jnp.int32)
    pivot, rest = jnp.zeros_like(shift), None
    if query.complements:
        rest = _rest(compared, e, exists, whole.is_here)
        counts = exists & query.active
        pivot, rest = _without_underflow(vocabulary, logits, shift, counts, rest)
        pivot, rest = merge_rest(axis, pivot, rest)
    else:
        sums["every"] = jnp.sum(e, -1)
    if temperature is not None:
        sums["tempered"] = jnp.sum(jnp.exp(relative * (1 / temperature)), -1)
    added = add_up(axis, sums, shift.ndim)
    given = jnp.ones_like(as_float(1.0)) if temperature is None else temperature
    row_sums = RowSums(shift=shift, pivot=pivot, rest=rest, **added)
    return summarize(row_sums, query, given)


def reduce_product(
    product: Product,
    query: Query,
    vocabulary: Vocabulary,
    temperature: Float[Array, ""] | None,
) -> tuple[TokenStats, Float[Array, "N W"]]:
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

    Returns:
      The statistics, and the logits. Of `top`, what is asked for is known: whether it
      is one of the query's ids, and which; it is `NOT_ASKED` otherwise.
    """
    ids = ids_of(query)
    if ids.shape[-1] > _MOST_COMPARED:
        logits = product.by_token(product.make())
        return reduce(logits, query, vocabulary, temperature), logits
    columns = columns_of(vocabulary.axis, ids, product.kernel.shape[1])
    made = _make(product, vocabulary, columns, query.targets, temperature)
    logits = product.by_token(made.logits)
    picked = pick(vocabulary, logits, ids)
    sums, picked = add_up(vocabulary.axis, (made.sums, picked), 1)
    row_sums = with_picks(
        sums, made.maxima, made.shift, picked, query, vocabulary, temperature
    )
    given = jnp.ones_like(as_float(1.0)) if temperature is None else temperature
    return summarize(row_sums, query, given), logits


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
    """Computes the cotangents of logits and temperature; ids are compared with."""
    return gradient_of_logits(
        vocabulary,
        # Otherwise XLA would keep what both passes need, a mask of all logits, say.
        lax.optimization_barrier(logits),
        query,
        stats,
        cotangents,
        tempered=tempered,
        of_temperature=of_temperature,
        add=_add,
        put=_put,
    )


class _Made(NamedTuple):
    """A block and sums over it.

    Attributes:
      logits: the block, as `Product.make` returns it.
      sums: over this shard's classes that are not asked for.
      maxima: see `_sums_besides`.
      shift: what the sums ought to be relative to.
      is_off: whether they are relative to something else.
    """

    logits: Float[Array, "..."]
    sums: dict[str, Array]
    maxima: Float[Array, "2 N"]
    shift: Float[Array, "N"]
    is_off: Bool[Array, ""]


def _make(
    product: Product, vocabulary: Vocabulary, columns, targets, temperature
) -> _Made:
    """Makes a block and its sums, once or, where the shift was far off, twice."""
    axis = vocabulary.axis
    steepest = as_float(1.0)
    if temperature is not None:
        steepest = jnp.maximum(steepest, 1 / temperature)

    def sum_up(logits, shift) -> _Made:
        sums, maxima = _sums_besides(
            vocabulary, logits, product.class_axis, shift, columns, targets, temperature
        )
        maxima = largest_anywhere(axis, maxima)
        largest = capped(vocabulary, maxima[0])
        distance = (largest - shift) * steepest
        is_off = (distance < _LOWEST_SHIFT) | (distance > _HIGHEST_SHIFT)
        is_off &= largest != -jnp.inf
        shift = jnp.where(is_off, largest, shift)
        return _Made(logits, sums, maxima, shift, jnp.any(is_off))

    def until_near(turn: Callable[[Array], _Made]) -> _Made:
        near = capped(vocabulary, largest_anywhere(axis, product.near))
        shapes = jax.eval_shape(turn, near)
        start = jax.tree.map(lambda x: lax.empty(x.shape, x.dtype), shapes)
        start = start._replace(shift=near, is_off=jnp.ones_like(shapes.is_off))
        return lax.while_loop(
            lambda made: made.is_off, lambda made: turn(made.shift), start
        )

    def make_again(shift):
        # Otherwise XLA would take the product, always the same, out of the loop.
        hidden, shift = lax.optimization_barrier((product.hidden, shift))
        return sum_up(dataclasses.replace(product, hidden=hidden).make(), shift)

    if product.by_columns:
        return until_near(make_again)
    # GPUs make no sums with a product, which then need not be made again.
    logits = product.make()
    nothing = jnp.zeros((), logits.dtype)
    made = until_near(lambda shift: sum_up(logits, shift)._replace(logits=nothing))
    return made._replace(logits=logits)


def _sums_besides(
    vocabulary: Vocabulary, logits, axis: int, shift, columns, targets, temperature
):
    """Sums over this shard's classes but those asked for, in one pass.

    Args:
      vocabulary: the static facts.
      logits: the block, with the classes along an axis.
      axis: that one.
      shift: what sums are relative to, [N].
      columns: asked for, [N, K].
      targets: their ids, [N].
      temperature: T, or None for 1.

    Returns:
      The sums, relative to the shift; of raw logits the largest one that is not asked
      for, and the largest one before the target.
    """
    width = logits.shape[axis]
    every = lax.broadcasted_iota(jnp.int32, logits.shape, axis)
    ids = every + first_id(vocabulary.axis, width)
    is_padded = has_padding(vocabulary, width)
    raw = raw_logits(vocabulary, logits, ids) if is_padded else as_float(logits)

    def spread(x):
        return jnp.expand_dims(x, axis)

    hits = [every == spread(columns[:, k]) for k in range(columns.shape[1])]

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
    e = besides(jnp.exp(relative), 0.0)
    sums = _plain_sums(not is_padded, z, relative, e, axis)
    sums["every"] = jnp.sum(e, axis)
    if temperature is not None:
        cooled = besides(jnp.exp(relative * (1 / temperature)), 0.0)
        sums["tempered"] = jnp.sum(cooled, axis)
    largest = jnp.max(besides(raw, -jnp.inf), axis)
    is_before = ids < spread(targets)
    before = jnp.max(jnp.where(is_before, raw, jnp.full_like(raw, -jnp.inf)), axis)
    return sums, jnp.stack([largest, before])


def _plain_sums(is_all: bool, z, relative, e, axis: int) -> dict[str, Array]:
    """The sums over all possible classes: those whose logit is not −inf."""
    if is_all:
        return {
            "total": jnp.sum(relative, axis),
            "expected": jnp.sum(e * relative, axis),
        }
    known = jnp.where(z != -jnp.inf, relative, jnp.zeros_like(relative))
    return {
        "total": jnp.sum(known, axis),
        "expected": jnp.sum(e * bounded(relative), axis),
    }


class _Comparison(NamedTuple):
    """How logits compare with the largest one of their row.

    Three answers that are one: of a single comparison with many readers, XLA would make
    an array on GPUs.
    """

    is_below: Bool[Array, "*n W"]
    is_not_below: Bool[Array, "*n W"]
    is_equal: Bool[Array, "*n W"]


def _compare(vocabulary: Vocabulary, logits, z, own, shift) -> _Comparison:
    shift = shift[..., None]
    if vocabulary.soft_cap is None:
        return _Comparison(z < shift, z >= shift, z == shift)
    # Capped by two programs, a logit may not equal itself; the raw one does.
    is_top = capped(vocabulary, own)[..., None] >= shift
    is_top &= raw_logits(vocabulary, logits) == own[..., None]
    is_below = (z < shift) & ~is_top
    return _Comparison(is_below, ~is_below, ~is_below)


def _rest(compared: _Comparison, e, exists, is_here):
    """Sums this shard's exponentials but the largest logit's, without cancellation."""
    equals = jnp.sum(as_float(compared.is_not_below), -1)
    top = jnp.ones_like(equals) if is_here is None else as_float(is_here)
    rest = jnp.sum(jnp.where(compared.is_below, e, jnp.zeros_like(e)), -1)
    # All equal logits but the first have exponentials of 1.
    return rest + jnp.where(exists, equals - top, jnp.zeros_like(equals))


def _without_underflow(vocabulary: Vocabulary, logits, shift, exists, rest):
    """Sums again, relative to the second largest logit, what is too small for a float.

    One position of the rows after the other, because there is hardly ever any: devices
    that share the rows then have their own at hand.

    Returns:
      What the sums are relative to, and the sums.
    """
    if not shift.ndim:
        arrays = jax.tree.map(lambda x: x[None], (logits, shift, exists, rest))
        found = _without_underflow(vocabulary, *arrays)
        return jax.tree.map(lambda x: x[0], found)
    axis = shift.ndim - 1

    def at(x, index):
        return lax.dynamic_index_in_dim(x, index, axis, keepdims=False)

    def is_left(state):
        return jnp.any(state[0])

    def sum_again(state):
        left, pivots, sums = state
        index = jnp.argmax(jnp.any(left, range(axis)))
        relative = possible_logits(vocabulary, at(logits, index))
        relative -= at(shift, index)[..., None]
        # The largest logit is far above all others, however it is rounded.
        others = jnp.where(relative > _FAR, -jnp.inf, relative)
        second = jnp.max(others, -1)
        pivot = jnp.where(second == -jnp.inf, jnp.zeros_like(second), second)
        total = jnp.sum(jnp.exp(others - pivot[..., None]), -1)
        is_faint = at(left, index)
        pivot = jnp.where(is_faint, pivot, at(pivots, index))
        total = jnp.where(is_faint, total, at(sums, index))
        new = zip(state, (jnp.zeros_like(is_faint), pivot, total), strict=True)
        put = lax.dynamic_update_index_in_dim
        return tuple(put(x, y, index, axis) for x, y in new)

    start = (exists & (rest < _FAINT), jnp.zeros_like(rest), rest)
    return lax.while_loop(is_left, sum_again, start)[1:]


def _add(grad, columns, values):
    """Adds values [..., Q] to grad [..., W] at those columns that it has."""
    if columns.shape[-1] > _MOST_COMPARED:
        return scatter_add(grad, columns, values)
    every = column_ids(grad)
    for q in range(columns.shape[-1]):
        here = every == columns[..., q : q + 1]
        grad += jnp.where(here, values[..., q : q + 1], jnp.zeros_like(grad))
    return grad


def _put(grad, columns, values):
    """Sets grad [..., W] to values [...] at those columns that it has."""
    return jnp.where(column_ids(grad) == columns[..., None], values[..., None], grad)
