"""The gradient of logits from their exponentials in bfloat16.

On a TPU the product writes the exponentials while it computes the sums, in half the
bytes of the logits. They are precise enough for operands of 16 bits, to which the
gradient is rounded anyway. The gradient at the queried ids, where p − 1 may be tiny, is
computed from the statistics alone, which are not rounded.
"""

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ava_jax.kernel.collectives import first_id
from ava_jax.kernel.gradient import (
    bounded,
    cotangents_at_ids,
    exponentials,
    is_zero_cotangent,
    of_active,
    through_sums,
)
from ava_jax.kernel.logits import column_ids, columns_of, has_padding, ids_of, is_class
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary
from ava_jax.kernel.xla import put
from ava_jax.reduce import as_float


@flax.struct.dataclass
class Exponentials:
    """The exponentials of a block, saved instead of its logits.

    Attributes:
      rounded: `exp(z − shift)` in bfloat16.
      shift: one number per token.
    """

    rounded: Float[Array, "N W"]
    shift: Float[Array, "N"]


def logits_gradient(
    kept: Exponentials,
    bias: Float[Array, "W"] | None,
    query: Query,
    vocabulary: Vocabulary,
    stats: TokenStats,
    cotangents: TokenStats,
    *,
    tempered: bool,
) -> Float[Array, "N W"]:
    """Computes the logits' cotangent.

    Args:
      kept: the block's exponentials.
      bias: that of the logits, −inf for impossible classes; None if there is none.
      query: the query of `stats`.
      vocabulary: the static facts; logits have no soft-cap.
      stats: of the block.
      cotangents: of the stats; None where they are known to be zero.
      tempered: whether the temperature can differ from 1.
    """
    # Otherwise XLA would save what both passes need, such as a mask of all logits.
    rounded = as_float(lax.optimization_barrier(kept.rounded))
    cotangents = of_active(cotangents, query.active, tempered=tempered)
    offset = kept.shift - stats.shift
    e = rounded * jnp.exp(offset - stats.second_shift)[..., None]
    relative = bounded(jnp.log(rounded) + offset[..., None])
    grad, _ = through_sums(e, relative, stats, cotangents, is_finite=True)
    width = grad.shape[-1]
    if has_padding(vocabulary, width):
        every = column_ids(grad) + first_id(vocabulary.axis, width)
        grad = jnp.where(is_class(vocabulary, every), grad, jnp.zeros_like(grad))
    if bias is not None and not is_zero_cotangent(cotangents.total):
        # All other terms are multiples of the exponential, which is 0.
        grad = jnp.where(bias != -jnp.inf, grad, jnp.zeros_like(grad))
    ids = ids_of(query)
    exact = _at_ids(ids, query, stats, cotangents)
    columns = columns_of(vocabulary.axis, ids, width)
    for k in range(ids.shape[-1]):
        grad = put(grad, columns[:, k], exact[:, k])
    return grad


def _at_ids(ids, query: Query, stats: TokenStats, cotangents: TokenStats):
    """Computes the whole gradient at the ids of the query, [N, K]."""
    picked = [stats.target[..., None], *stats.candidates.values()]
    relative = jnp.concatenate(picked, -1)
    e = exponentials(relative, stats.second_shift, query.log_one_minus_p)
    exact, at_top = through_sums(e, relative, stats, cotangents, is_finite=False)
    if query.log_one_minus_p:
        exact = jnp.where(ids == stats.top[:, None], at_top[:, None], exact)
    at_ids = cotangents_at_ids(query, stats, cotangents)
    if at_ids is not None:
        others, values = at_ids
        is_same = ids[:, :, None] == others[:, None, :]
        exact += jnp.sum(jnp.where(is_same, values[:, None], 0.0), -1)
    return jnp.where(relative != -jnp.inf, exact, jnp.zeros_like(exact))
