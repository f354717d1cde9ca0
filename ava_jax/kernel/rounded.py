"""The gradient of logits of which exponentials in 16 bits are kept.

A TPU's product writes them as it makes its sums, in half the bytes of the logits. They
are precise enough for operands of 16 bits, as which the gradient is rounded anyway.
What reaches the ids asked for, where p − 1 may be next to nothing, is made of the
statistics alone, which are not rounded.
"""

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ava_jax.kernel.collectives import first_id
from ava_jax.kernel.gradient import (
    bounded,
    cotangents_of_picks,
    exponentials,
    of_active,
    through_sums,
)
from ava_jax.kernel.logits import column_ids, columns_of, has_padding, ids_of, is_class
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary
from ava_jax.kernel.xla import put
from ava_jax.reduce import as_float


@flax.struct.dataclass
class Exponentials:
    """What is kept of a block in place of its logits.

    Attributes:
      rounded: `exp(z − shift)` in bfloat16.
      shift: what they are relative to.
    """

    rounded: Float[Array, "N W"]
    shift: Float[Array, "N"]


def logits_gradient(
    kept: Exponentials,
    query: Query,
    vocabulary: Vocabulary,
    stats: TokenStats,
    cotangents: TokenStats,
    *,
    tempered: bool,
) -> Float[Array, "N W"]:
    """Computes the logits' cotangent.

    Args:
      kept: of the block.
      query: what `stats` answers.
      vocabulary: the static facts; logits are finite and have no soft-cap.
      stats: of the block.
      cotangents: of the stats; None where they are known to be zero.
      tempered: whether the temperature can differ from 1.
    """
    # Otherwise XLA would keep what both passes need, a mask of all logits, say.
    rounded = as_float(lax.optimization_barrier(kept.rounded))
    cotangents = of_active(cotangents, query.active, tempered=tempered)
    offset = kept.shift - stats.shift
    e = rounded * jnp.exp(offset - stats.pivot)[..., None]
    relative = bounded(jnp.log(rounded) + offset[..., None])
    grad, _ = through_sums(e, relative, stats, cotangents, is_finite=True)
    width = grad.shape[-1]
    if has_padding(vocabulary, width):
        ids = column_ids(grad) + first_id(vocabulary.axis, width)
        grad = jnp.where(is_class(vocabulary, ids), grad, jnp.zeros_like(grad))
    asked = ids_of(query)
    exact = _at_ids(asked, query, stats, cotangents)
    columns = columns_of(vocabulary.axis, asked, width)
    for k in range(asked.shape[-1]):
        grad = put(grad, columns[:, k], exact[:, k])
    return grad


def _at_ids(ids, query: Query, stats: TokenStats, cotangents: TokenStats):
    """The whole gradient at the ids of the query, [N, K]."""
    picked = [stats.target[..., None], *stats.candidates.values()]
    relative = jnp.concatenate(picked, -1)
    e = exponentials(relative, stats.pivot, query.complements)
    exact, at_top = through_sums(e, relative, stats, cotangents, is_finite=False)
    if query.complements:
        exact = jnp.where(ids == stats.top[:, None], at_top[:, None], exact)
    picks = cotangents_of_picks(query, stats, cotangents)
    if picks is not None:
        others, values = picks
        is_same = ids[:, :, None] == others[:, None, :]
        exact += jnp.sum(jnp.where(is_same, values[:, None], 0.0), -1)
    return jnp.where(relative != -jnp.inf, exact, jnp.zeros_like(exact))
