"""The kernel for TPUs and GPUs: every sum is a reduction over the whole axis.

Here it makes two passes: the row max, then all sums relative to it. They give the id of
the largest logit wherever it is; `xla_product` needs one pass where that is not wanted.
Only the logits and their gradient have the shape of a block, and neither is copied to
another layout.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ava_jax.kernel.collectives import (
    RowMax,
    add_up,
    first_id,
    global_row_max,
    merge_shifted_sums,
    num_shards,
)
from ava_jax.kernel.cpu import scatter_add
from ava_jax.kernel.gradient import gradient_of_logits
from ava_jax.kernel.logits import (
    capped,
    column_ids,
    has_padding,
    pick_all,
    possible_logits,
    raw_logits,
)
from ava_jax.kernel.product import finished
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary
from ava_jax.kernel.summary import (
    RowSums,
    count_possible,
    plain_sums,
    summarize,
    tempered_sums,
)
from ava_jax.reduce import as_float

# A sum of exponentials below this is recomputed relative to the second largest logit:
# its terms may be near the smallest float32, 1e-38.
_UNDERFLOW = 1e-30
# In such a row, every logit but the largest is further than this from it.
_FAR = -50.0
# Comparing with every id costs one more operation per logit and id, but no atomic
# addition; with many ids a scatter or gather is cheaper on any device.
MOST_COMPARED = 16


def reduce(
    logits: Float[Array, "*n W"],
    query: Query,
    vocabulary: Vocabulary,
    temperature: Float[Array, ""] | None,
) -> TokenStats:
    """Computes the statistics of a block; see `token_statistics`."""
    axis, width = vocabulary.axis, logits.shape[-1]
    raw = raw_logits(vocabulary, logits)
    if not vocabulary.finite:
        # A max of a computed array is fused; one of a bare parameter is slow on TPUs.
        raw = jnp.where(query.active[..., None], raw, -jnp.inf)
    own = jnp.max(raw, -1)
    # Without it the compiler would compute the logits twice, once for the row max.
    logits, own = lax.optimization_barrier((logits, own))
    row_max = global_row_max(axis, capped(vocabulary, own), None)
    exists = row_max.largest != -jnp.inf
    shift = jnp.where(exists, row_max.largest, jnp.zeros_like(own))
    z = possible_logits(vocabulary, logits)
    compared = _compare(vocabulary, logits, z, own, shift)
    relative = z - shift[..., None]
    e = jnp.exp(relative)
    is_all = vocabulary.finite and not has_padding(vocabulary, width)
    sums: dict[str, Any] = {
        **plain_sums(is_all, z, relative, e, -1),
        "count": count_possible(is_all, z),
        **tempered_sums(query, relative, temperature, -1),
        "exp_sum": None,
    }
    sums["target"], sums["candidates"] = pick_all(vocabulary, logits, shift, query)
    sums["top"] = _top_id(axis, z, compared, row_max, exists)
    second_shift, second = jnp.zeros_like(shift), None
    if query.log_one_minus_p:
        second = _sum_without_top(compared, e, exists, row_max.is_local)
        second_shift, second = _without_underflow(
            vocabulary, logits, shift, exists & query.active, second
        )
        second_shift, second = merge_shifted_sums(axis, second_shift, second)
    else:
        sums["exp_sum"] = jnp.sum(e, -1)
    added = add_up(axis, sums, shift.ndim)
    given = jnp.ones_like(as_float(1.0)) if temperature is None else temperature
    row_sums = RowSums(
        shift=shift, second_shift=second_shift, second_exp_sum=second, **added
    )
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
    bias: Float[Array, "W"] | None = None,
    scale: Float[Array, ""] | None = None,
) -> tuple[Float[Array, "*n W"], Float[Array, ""] | None]:
    """Computes the cotangents of logits and temperature; ids are compared with.

    The cotangent is that of the finished logits, if bias and scale are not yet applied.
    """
    # Otherwise XLA would save what both passes need, such as a mask of all logits.
    logits = lax.optimization_barrier(logits)
    return gradient_of_logits(
        vocabulary,
        finished(logits, bias, scale),
        query,
        stats,
        cotangents,
        tempered=tempered,
        of_temperature=of_temperature,
        add=_add,
        put=put,
    )


class _Comparison(NamedTuple):
    """How logits compare with their row max.

    The three masks say the same: a single one with many uses would become an array in
    memory on GPUs.
    """

    is_below: Bool[Array, "*n W"]
    is_not_below: Bool[Array, "*n W"]
    is_equal: Bool[Array, "*n W"]


def _compare(vocabulary: Vocabulary, logits, z, own, shift) -> _Comparison:
    shift = shift[..., None]
    if vocabulary.soft_cap is None:
        return _Comparison(z < shift, z >= shift, z == shift)
    # Soft-capped in two programs, a logit may not equal itself; the raw logit does.
    is_top = capped(vocabulary, own)[..., None] >= shift
    is_top &= raw_logits(vocabulary, logits) == own[..., None]
    is_below = (z < shift) & ~is_top
    return _Comparison(is_below, ~is_below, ~is_below)


def _top_id(axis, z, compared: _Comparison, row_max: RowMax, exists):
    """Returns the id of the row max, and 0 on the shards that do not hold it."""
    width = z.shape[-1]
    # As floats, the ids join the other reductions in one pass.
    ids = as_float(column_ids(z) + first_id(axis, width))
    size = as_float(num_shards(axis) * width)
    top = jnp.min(jnp.where(compared.is_equal, ids, size), -1)
    if row_max.is_local is not None:
        top = jnp.where(row_max.is_local, top, jnp.zeros_like(top))
    return jnp.where(exists, top, jnp.zeros_like(top)).astype(jnp.int32)


def _sum_without_top(compared: _Comparison, e, exists, is_local):
    """Sums this shard's exponentials except the row max's, without cancellation."""
    equals = jnp.sum(as_float(compared.is_not_below), -1)
    top = jnp.ones_like(equals) if is_local is None else as_float(is_local)
    below = jnp.sum(jnp.where(compared.is_below, e, jnp.zeros_like(e)), -1)
    # Each further logit equal to the row max adds exp(0) = 1.
    return below + jnp.where(exists, equals - top, jnp.zeros_like(equals))


def _without_underflow(vocabulary: Vocabulary, logits, shift, exists, exp_sum):
    """Recomputes the sums that underflow, relative to the second largest logit.

    Such tokens are rare: a loop handles one position of all rows per iteration, so that
    a device which holds some of the rows needs nothing of the others.

    Returns:
      The second shift, and the sums relative to it.
    """
    if not shift.ndim:
        arrays = jax.tree.map(lambda x: x[None], (logits, shift, exists, exp_sum))
        found = _without_underflow(vocabulary, *arrays)
        return jax.tree.map(lambda x: x[0], found)
    axis = shift.ndim - 1

    def at(x, index):
        return lax.dynamic_index_in_dim(x, index, axis, keepdims=False)

    def is_left(state):
        return jnp.any(state[0])

    def sum_again(state):
        left, shifts, sums = state
        index = jnp.argmax(jnp.any(left, range(axis)))
        relative = possible_logits(vocabulary, at(logits, index))
        relative -= at(shift, index)[..., None]
        # The largest logit is far above all others, whatever its rounding.
        others = jnp.where(relative > _FAR, -jnp.inf, relative)
        second = jnp.max(others, -1)
        second = jnp.where(second == -jnp.inf, jnp.zeros_like(second), second)
        total = jnp.sum(jnp.exp(others - second[..., None]), -1)
        underflows = at(left, index)
        second = jnp.where(underflows, second, at(shifts, index))
        total = jnp.where(underflows, total, at(sums, index))
        new = zip(state, (jnp.zeros_like(underflows), second, total), strict=True)
        put = lax.dynamic_update_index_in_dim
        return tuple(put(x, y, index, axis) for x, y in new)

    left = exists & (exp_sum < _UNDERFLOW)
    start = (left, jnp.zeros_like(exp_sum), exp_sum)
    if not left.size:
        return start[1:]
    return lax.while_loop(is_left, sum_again, start)[1:]


def _add(grad, columns, values):
    """Adds values [..., Q] to grad [..., W] at the columns within range."""
    if columns.shape[-1] > MOST_COMPARED:
        return scatter_add(grad, columns, values)
    every = column_ids(grad)
    for q in range(columns.shape[-1]):
        here = every == columns[..., q : q + 1]
        grad += jnp.where(here, values[..., q : q + 1], jnp.zeros_like(grad))
    return grad


def put(grad: Array, columns: Array, values: Array) -> Array:
    """Sets grad [..., W] to values [...] at the columns within range."""
    return jnp.where(column_ids(grad) == columns[..., None], values[..., None], grad)
