"""The distinct targets in a window before each token, without an [S, S] array."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from ava_jax.ranges import check_range
from ava_jax.tokens import Tokens, sort_ngrams

# No token is at this position.
_NOWHERE = -1


@flax.struct.dataclass
class Recent:
    """The whole rows, for losses of the last few targets before each token.

    Attributes:
      ids: the targets.
      until: the last position that finds here the latest occurrence of the id in its
        segment: that of the next occurrence, or S. It is −1 where the token is masked.
      segments: segment ids.
    """

    ids: Int[Array, "B S"]
    until: Int[Array, "B S"]
    segments: Int[Array, "B S"]


def read_recent(tokens: Tokens) -> Recent:
    """Finds the next occurrence of every id in its segment, by one sort."""
    windows = sort_ngrams(tokens, 1)
    length = windows.order.shape[1]
    following = _shifted_left(windows.order)
    # At the end of the row, nothing follows.
    repeats = _shifted_left(windows.whole & ~windows.is_first)
    until = jnp.where(repeats, following, length)
    until = jnp.where(windows.whole, until, _NOWHERE)
    return Recent(tokens.targets, windows.in_row_order(until), tokens.segments)


def _shifted_left(x: Array) -> Array:
    return jnp.pad(x[:, 1:], ((0, 0), (0, min(x.shape[1], 1))))


def recent_ids(
    recent: Recent,
    segments: Int[Array, "B C"],
    positions: Int[Array, "B C"],
    window: int,
) -> tuple[Int[Array, "B C W"], Bool[Array, "B C W"]]:
    """Returns the distinct ids in the window before each token, in its own segment.

    Args:
      recent: the whole rows.
      segments: segment ids of a block.
      positions: row positions of the block, from 0.
      window: how many positions before the token are looked at.

    Returns:
      The ids at those positions, W = min(window, S) of them, the last one nearest to
      the token; and a mask of unmasked ones that do not occur again before the token.

    Raises:
      ValueError: `window` is below 1.
    """
    check_range("window", window, 1, whole=True)
    width = min(window, recent.ids.shape[1])
    arrays = recent.ids, recent.until, recent.segments
    columns = jnp.stack([x.astype(segments.dtype) for x in arrays], -1)
    left = ((0, 0), (width, 0), (0, 0))
    padded = jnp.pad(columns, left, constant_values=_NOWHERE)

    @jax.vmap
    def before(row: Int[Array, "_ 3"], starts: Int[Array, "C"]):
        cut = jax.vmap(lambda start: lax.dynamic_slice_in_dim(row, start, width))
        return cut(starts)

    ids, until, own = jnp.unstack(before(padded, positions), axis=-1)
    found = (until.astype(jnp.int32) >= positions[..., None]) & (
        own == segments[..., None]
    )
    return jnp.maximum(ids, 0).astype(jnp.int32), found
