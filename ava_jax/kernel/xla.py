"""The kernel for TPUs and GPUs: every sum is a reduction over the whole axis.

Two passes: the largest logit, and all sums relative to it. Nothing has the shape of a
block but the logits and their gradient, and nothing is laid out anew.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ava_jax.kernel.collectives import (
    add_up,
    find_largest,
    first_id,
    merge_rest,
    num_shards,
)
from ava_jax.kernel.cpu import scatter_add
from ava_jax.kernel.gradient import bounded, gradient_of_logits
from ava_jax.kernel.logits import (
    capped,
    column_ids,
    has_padding,
    pick_all,
    possible_logits,
    raw_logits,
)
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary
from ava_jax.kernel.summary import RowSums, summarize
from ava_jax.reduce import as_float

# Sums of exponentials below this are made again, relative to the second largest: their
# parts may be near the smallest number of float32, 1e-38.
_FAINT = 1e-30
# No other logit of such a row is as near to the largest one.
_FAR = -50.0
# Comparing with every id is one more operation per logit and id, but needs no atomic
# addition; with many ids a scatter, or a gather, is cheaper on any device.
MOST_COMPARED = 16


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
    sums: dict[str, Any] = plain_sums(is_all, z, relative, e, -1)
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
        put=put,
    )


def plain_sums(is_all: bool, z, relative, e, axis: int) -> dict[str, Array]:
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
    if columns.shape[-1] > MOST_COMPARED:
        return scatter_add(grad, columns, values)
    every = column_ids(grad)
    for q in range(columns.shape[-1]):
        here = every == columns[..., q : q + 1]
        grad += jnp.where(here, values[..., q : q + 1], jnp.zeros_like(grad))
    return grad


def put(grad: Array, columns: Array, values: Array) -> Array:
    """Sets grad [..., W] to values [...] at those columns that it has."""
    return jnp.where(column_ids(grad) == columns[..., None], values[..., None], grad)
