"""Iterating over the unmasked tokens of rows, a chunk of each row at a time.

The unmasked tokens of a row are visited first, in their order, and the chunks that hold
none of any row are not visited at all, but for the very first. How many those are is
known at run time only: the program is the same for every mask.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

Carry = TypeVar("Carry")


def fold_unmasked(
    body: Callable[[Carry, Array, Any], tuple[Carry, Any]],
    carry: Carry,
    source: Float[Array, "G B S X"],
    inputs: Any,
    active: Bool[Array, "G B S"],
    size: int,
    like: Any = None,
    *,
    is_open: bool = False,
    first_apart: bool = False,
) -> tuple[Carry, Any]:
    """Folds `body(carry, chunk, inputs)` over chunks of the unmasked tokens.

    Args:
      body: called with a chunk [B, C, X] and its inputs [B, C, ...], all zeros for
        masked tokens; returns the carry and outputs [B, C, ...].
      carry: the initial carry.
      source: the array to iterate over; masked tokens may hold anything.
      inputs: a pytree of [G, B, S, ...] arrays; likewise.
      active: marks the unmasked tokens.
      size: C; the whole row if that is shorter.
      like: a pytree of arrays [G, B, S, ...] with the dtypes of the outputs, if any.
      is_open: whether the loop ends after the last chunk that is visited, and outputs
        are scattered, as suits GPUs: XLA would copy the carry there at every chunk that
        may be skipped. Otherwise the loop skips the other chunks, so that compilers
        know how often it runs, and outputs are gathered at the end, as suits TPUs.
      first_apart: whether the first chunk is visited before an open loop begins, for a
        carry that only has its shape then.

    Returns:
      The last carry, and the outputs [G, B, S, ...], zeros for masked tokens.
    """
    groups, _, length = active.shape
    size = min(size, length)
    if groups == 1 and size == length:
        kept = jax.tree.map(lambda x: zero_masked(active[0], x[0]), (source, inputs))
        carry, outputs = body(carry, *kept)
        return carry, jax.tree.map(lambda x: x[None], outputs)
    order = _order(active, size)

    def visit(state, group, start):
        carry, written = state
        own = lax.dynamic_slice_in_dim(order.tokens[group], start, size, 1)
        offsets = start + jnp.arange(size, dtype=jnp.int32)
        is_active = offsets < order.counts[group][:, None]
        kept = jax.tree.map(
            lambda x: zero_masked(is_active, _take(x[group], own)), (source, inputs)
        )
        carry, outputs = body(carry, *kept)
        if is_open:
            # Beyond the row, where there is no token to put the output to.
            to = (group, jnp.where(offsets < length, own, length))
            written = jax.tree.map(lambda x, y: _scatter(x, *to, y), written, outputs)
        else:
            to = (group, start)
            written = jax.tree.map(lambda x, y: _write(x, *to, y), written, outputs)
        return carry, written

    def skip(state, *_):
        return state

    def step(state, offset):
        group, start, is_visited = offset
        return lax.cond(is_visited, visit, skip, state, group, start), None

    if is_open:
        outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return _loop(visit, (carry, outputs), order.chunks(), first_apart)

    def buffer(x):
        return lax.empty((*x.shape[:2], order.tokens.shape[2], *x.shape[3:]), x.dtype)

    start = (carry, jax.tree.map(buffer, like))
    carry, written = lax.scan(step, start, order.chunks())[0]
    return carry, jax.tree.map(order.put_back, written)


def _loop(
    visit: Callable[..., Any], state: Any, chunks: tuple[Array, ...], first_apart: bool
) -> Any:
    """Visits the chunks that are to be visited, and no others."""
    group, start, is_visited = chunks
    first = jnp.argsort(~is_visited, stable=True)
    count = jnp.sum(is_visited, dtype=jnp.int32)
    most = jnp.asarray(is_visited.size, jnp.int32)

    def is_left(item):
        # The second bound tells those who read the program how often it runs at most.
        return (item[0] < count) & (item[0] < most)

    def step(item):
        index, state = item
        chunk = first[index]
        return index + 1, visit(state, group[chunk], start[chunk])

    item = (jnp.zeros((), jnp.int32), state)
    # The very first chunk is visited whatever the mask.
    return lax.while_loop(is_left, step, step(item) if first_apart else item)[1]


@flax.struct.dataclass
class _Order:
    """In which order the tokens of each row are visited.

    Attributes:
      tokens: the position of the token at each place, unmasked ones first, [G, B, P]
        with P a multiple of the chunk's size.
      places: the place of each token.
      active: marks the unmasked tokens.
      counts: the number of unmasked tokens of each row.
      size: tokens of a row per chunk.
    """

    tokens: Int[Array, "G B P"]
    places: Int[Array, "G B S"]
    active: Bool[Array, "G B S"]
    counts: Int[Array, "G B"]
    size: int = flax.struct.field(pytree_node=False)

    def chunks(self) -> tuple[Int[Array, "_"], Int[Array, "_"], Bool[Array, "_"]]:
        """Returns each chunk's group, first place, and whether it is visited."""
        groups, _, places = self.tokens.shape
        group, start = jnp.divmod(
            jnp.arange(groups * (places // self.size), dtype=jnp.int32),
            places // self.size,
        )
        start *= self.size
        is_visited = start < jnp.max(self.counts, 1)[group]
        return group, start, is_visited.at[0].set(True)

    def put_back(self, x: Shaped[Array, "G B P *n"]) -> Shaped[Array, "G B S *n"]:
        """Returns values in the order of the rows, zeros for masked tokens."""
        return zero_masked(self.active, jax.vmap(_take)(x, self.places))


def _order(active: Bool[Array, "G B S"], size: int) -> _Order:
    # XLA would fold the sums of a constant mask, which takes seconds.
    active = lax.optimization_barrier(active)
    length = active.shape[2]
    total = -(-length // size) * size
    masked = (~active).astype(jnp.int32)
    unmasked = active.astype(jnp.int32)
    counts = jnp.sum(unmasked, -1, dtype=jnp.int32)
    places = jnp.where(
        active,
        jnp.cumsum(unmasked, -1) - 1,
        counts[..., None] + jnp.cumsum(masked, -1) - 1,
    )
    return _Order(
        tokens=_inverse(places, total),
        places=places,
        active=active,
        counts=counts,
        size=size,
    )


def _inverse(places: Int[Array, "G B S"], total: int) -> Int[Array, "G B P"]:
    """Returns the token at each place; any token where there is none."""

    @jax.vmap
    @jax.vmap
    def invert(places):
        tokens = lax.iota(jnp.int32, places.shape[0])
        return (
            jnp.zeros(total, jnp.int32)
            .at[places]
            .set(tokens, unique_indices=True, mode="promise_in_bounds")
        )

    return invert(places)


def _take(x: Shaped[Array, "B S *n"], tokens: Int[Array, "B C"]):
    """Returns the values of tokens of each row."""

    @jax.vmap
    def take(x, tokens):
        return x.at[tokens].get(mode="promise_in_bounds")

    return take(x, tokens)


def zero_masked(active: Bool[Array, "*n"], x: Shaped[Array, "..."]):
    """Zeroes what belongs to masked tokens, which may hold NaN."""
    active = active.reshape(*active.shape, *[1] * (x.ndim - active.ndim))
    return jnp.where(active, x, jnp.zeros_like(x))


def _write(x, group, start, new):
    zeros = [jnp.zeros_like(start)] * (x.ndim - 3)
    at = (group, jnp.zeros_like(start), start, *zeros)
    return lax.dynamic_update_slice(x, new[None], at)


def _scatter(x, group, tokens, new):
    """Sets the values of tokens of each row; those beyond the row are dropped."""
    rows = lax.broadcasted_iota(jnp.int32, tokens.shape, 0)
    return x.at[group, rows, tokens].set(new, mode="drop")
