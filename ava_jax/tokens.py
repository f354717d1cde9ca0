"""Integer functions of the targets: masks, shifts, n-gram windows, matches and runs.

Nothing here has a vocabulary axis or a gradient. All arrays are [B, S] unless a
docstring says otherwise, and nothing crosses a segment.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from ava_jax.arrays import as_ids, as_labels, usable_weights
from ava_jax.kernel.sharding import in_one_program
from ava_jax.ranges import check_range
from ava_jax.reduce import as_float

RUN_CAP = 10
# For indices that are a permutation of the positions.
_PERMUTATION: Any = {"unique_indices": True, "mode": "promise_in_bounds"}


@flax.struct.dataclass
class Tokens:
    """The targets of a batch with their weights and segments.

    Attributes:
      targets: ids; 0 where the token is masked.
      raw: ids as given.
      weights: per-token weights; 0 where the token is masked.
      active: marks the unmasked tokens, weights != 0.
      invalid: marks tokens masked only because their id is outside the vocabulary.
      no_weight: marks those whose given weight is negative, NaN or infinite.
      routed: marks the tokens that a model's routers see: all but padding.
      segments: segment ids; all 1 unless given.
      positions: position within the segment, from 0.
    """

    targets: Int[Array, "B S"]
    raw: Int[Array, "B S"]
    weights: Float[Array, "B S"]
    active: Bool[Array, "B S"]
    invalid: Bool[Array, "B S"]
    no_weight: Bool[Array, "B S"]
    routed: Bool[Array, "B S"]
    segments: Int[Array, "B S"]
    positions: Int[Array, "B S"]


def read_tokens(
    targets: Integer[Array, "B S"],
    attention_mask: Shaped[Array, "B S"] | None = None,
    segment_ids: Integer[Array, "B S"] | None = None,
    *,
    vocab_size: int,
    ignore_index: int = -100,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
    mask_boundaries: bool = False,
) -> Tokens:
    """Computes the weight of every target and its position in its segment.

    The weight is `attention_mask · [y ≠ ignore_index] · [0 ≤ y < V]`, times
    `[segment ≠ 0]`. Without a mask, targets equal to `pad_token_id` have weight 0; if
    that is also the EOS id, only trailing ones do, except the first of them if it is
    the end of something. A weight that is negative, NaN or infinite is 0.

    With `mask_boundaries`, the first target of a segment that begins within the row,
    which is predicted from the segment before, belongs to no segment.
    """
    targets = as_ids(targets)
    if attention_mask is not None:
        given = usable_weights(attention_mask)
        no_weight = as_float(attention_mask) != given
    else:
        given = as_float(~_padding(targets, pad_token_id, eos_token_id))
        no_weight = jnp.zeros_like(given, bool)
    routed = given != 0
    if segment_ids is None:
        segments = jnp.ones(targets.shape, jnp.int32)
        # XLA would compute the same of a constant, in quadratic time, while compiling.
        positions = _index(targets.shape)
    else:
        segments = as_labels("segment_ids", segment_ids)
        routed &= segments != 0
        if mask_boundaries:
            begins = segments != jnp.roll(segments, 1, axis=1)
            begins &= _index(targets.shape) > 0
            segments = jnp.where(begins, jnp.zeros_like(segments), segments)
        positions = _positions(segments)
        given = jnp.where(segments == 0, jnp.zeros_like(given), given)
    inside = (targets >= 0) & (targets < vocab_size)
    wanted = (given != 0) & (targets != ignore_index)
    active = wanted & inside
    return Tokens(
        targets=jnp.where(active, targets, 0),
        raw=targets,
        weights=jnp.where(active, given, jnp.zeros_like(given)),
        active=active,
        invalid=wanted & ~inside,
        no_weight=no_weight,
        routed=routed,
        segments=segments,
        positions=positions,
    )


def _padding(
    targets: Int[Array, "B S"], pad_token_id: int | None, eos_token_id: int | None
) -> Bool[Array, "B S"]:
    if pad_token_id is None:
        return jnp.zeros(targets.shape, bool)
    pads = targets == pad_token_id
    if pad_token_id != eos_token_id:
        return pads
    trailing = lax.cummin(pads.astype(jnp.int32), axis=1, reverse=True) == 1
    return trailing & previous(trailing, True)


def previous(x: Shaped[Array, "B S"], fill: int | bool) -> Shaped[Array, "B S"]:
    """Shifts by one to the right along the sequence; position 0 gets `fill`."""
    first = jnp.full((x.shape[0], min(x.shape[1], 1)), fill, x.dtype)
    return jnp.concatenate([first, x[:, :-1]], axis=1)


def _positions(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    index = _index(segments.shape)
    starts = segments != previous(segments, -1)
    return index - lax.cummax(jnp.where(starts, index, 0), axis=1)


def _index(shape: tuple[int, ...]) -> Int[Array, "B S"]:
    return lax.broadcasted_iota(jnp.int32, shape, 1)


def ahead(tokens: Tokens, distance: int) -> Tokens:
    """Returns the tokens that a head predicts `distance` positions further ahead.

    Position t holds target t+j with its weight, if t+j is in the row and in the segment
    of t; otherwise it is masked.
    """
    width = tokens.targets.shape[1]

    def shift(x: Shaped[Array, "B S"]) -> Shaped[Array, "B S"]:
        return jnp.pad(x[:, distance:], ((0, 0), (0, min(distance, width))))

    same = shift(tokens.segments) == tokens.segments
    active = shift(tokens.active) & same
    weights = shift(tokens.weights)
    return dataclasses.replace(
        tokens,
        targets=jnp.where(active, shift(tokens.targets), 0),
        raw=shift(tokens.raw),
        weights=jnp.where(active, weights, jnp.zeros_like(weights)),
        active=active,
        invalid=shift(tokens.invalid) & same,
    )


def stack_ahead(tokens: Tokens, num_heads: int) -> Tokens:
    """Stacks `ahead` for heads 1…K on a leading axis."""
    heads = [ahead(tokens, j) for j in range(1, num_heads + 1)]
    return jax.tree.map(lambda *x: jnp.stack(x), *heads)


def stretch_lengths(tokens: Tokens) -> Int[Array, "B S"]:
    """Returns the length of the gapless run of unmasked targets ending at each one."""
    index = _index(tokens.active.shape)
    last_gap = lax.cummax(jnp.where(tokens.active, -1, index), axis=1)
    first = jnp.maximum(last_gap + 1, index - tokens.positions)
    return index - first + 1


def whole_windows(tokens: Tokens, size: int) -> Bool[Array, "B S"]:
    """Marks where a window of `size` unmasked targets of one segment ends."""
    return (_streaks(tokens.active, size) == size) & (tokens.positions >= size - 1)


@flax.struct.dataclass
class SortedWindows:
    """The windows of each row, sorted: equal ones are adjacent, in order of position.

    Attributes:
      order: position of the window at each index of the sorted row.
      targets: the target at that position.
      is_first: whether no earlier window of the row is equal to this one.
      whole: whether the window is complete: unmasked targets of one segment.
    """

    order: Int[Array, "B S"]
    targets: Int[Array, "B S"]
    is_first: Bool[Array, "B S"]
    whole: Bool[Array, "B S"]

    @property
    def rank(self) -> Int[Array, "B S"]:
        """The number of equal windows earlier in the row."""
        index = _index(self.order.shape)
        return index - lax.cummax(jnp.where(self.is_first, index, 0), axis=1)

    def in_row_order(self, values: Shaped[Array, "B S *n"]) -> Shaped[Array, "B S *n"]:
        """Returns values of the sorted rows in the order of the rows."""
        return _scatter(values, self.order)


def sort_ngrams(tokens: Tokens, size: int) -> SortedWindows:
    """Sorts the windows of `size` targets of each row; their position is the last one.

    Raises:
      ValueError: `size`, which callers pass as `ngram_size`, is below 1.
    """
    check_range("ngram_size", size, 1, whole=True)
    return _sort_windows(tokens, size, size)


def count_ngrams(tokens: Tokens, size: int) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Returns the number of distinct windows of each row, and of all its windows."""
    windows = sort_ngrams(tokens, size)
    distinct = windows.whole & windows.is_first
    return jnp.sum(distinct, axis=1), jnp.sum(windows.whole, axis=1)


def repeated_ngram_pairs(tokens: Tokens, size: int) -> Float[Array, ""]:
    """Returns how many pairs of equal windows of `size` targets the rows have.

    `Σ_rows Σ_distinct c·(c−1)/2`, c the number of equal windows.
    """
    windows = sort_ngrams(tokens, size)
    return jnp.sum(as_float(jnp.where(windows.whole, windows.rank, 0)))


def _sort_windows(tokens: Tokens, size: int, compared: int) -> SortedWindows:
    """Sorts windows by their first targets, exactly, in O(S log S) per target.

    A loop sorts the rows by one key after the other, stably: compiling a sort takes the
    TPU's compiler 3 s with two operands, 7 s with three and 18 s with six.

    Args:
      tokens: the rows.
      size: targets per window.
      compared: the number of targets, from the first, that windows are compared by.
    """
    return in_one_program(_sorted, (size, compared), tokens)


def _sorted(size: int, compared: int, tokens: Tokens) -> SortedWindows:
    whole = whole_windows(tokens, size)
    # Incomplete windows become segment 0, which holds no complete one.
    segments = jnp.where(whole, tokens.segments, 0)
    columns = (segments, *_ending_at(tokens.targets, size, 0))
    widest = max((x.dtype for x in columns), key=lambda dtype: dtype.itemsize)
    stacked = jnp.stack([x.astype(widest) for x in columns], -1)

    def sort_by(k: Int[Array, ""], order: Int[Array, "B S"]) -> Int[Array, "B S"]:
        key = lax.dynamic_index_in_dim(stacked, k, -1, keepdims=False)
        return _sort_once(_gather(key, order), order)

    order = lax.fori_loop(0, compared + 1, sort_by, _index(whole.shape))
    columns = _gather(stacked, order)
    keys = columns[..., : compared + 1]
    is_equal = jnp.pad(jnp.all(keys[:, 1:] == keys[:, :-1], -1), ((0, 0), (1, 0)))
    return SortedWindows(
        order=order,
        targets=columns[..., -1].astype(tokens.targets.dtype),
        is_first=~is_equal[:, : whole.shape[1]],
        whole=columns[..., 0] != 0,
    )


def _sort_once(key: Int[Array, "B S"], order: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Sorts the order of each row by key, stably."""
    index = _index(order.shape)
    width = order.shape[1]
    if width**2 >= 2**31:
        operands = (key, index, order)
        return lax.sort(operands, dimension=1, num_keys=2, is_stable=False)[2]
    # Index and order fit one number.
    operands = (key, index * width + order)
    return lax.sort(operands, dimension=1, num_keys=2, is_stable=False)[1] % width


def _gather(
    values: Shaped[Array, "B S *n"], order: Int[Array, "B S"]
) -> Shaped[Array, "B S *n"]:
    """Returns `values[order[i]]` at index i of each row, for a permutation."""

    @jax.vmap
    def gather(values, order):
        return values.at[order].get(**_PERMUTATION)

    return gather(values, order)


def _scatter(
    values: Shaped[Array, "B S *n"], order: Int[Array, "B S"]
) -> Shaped[Array, "B S *n"]:
    """Returns `values[i]` at index `order[i]` of each row, for a permutation."""

    # Mapped over rows, so that XLA need not gather rows that are sharded.
    @jax.vmap
    def scatter(values, order):
        return jnp.zeros_like(values).at[order].set(values, **_PERMUTATION)

    return scatter(values, order)


def _ending_at(
    x: Shaped[Array, "B S"], size: int, back: int
) -> tuple[Shaped[Array, "B S"], ...]:
    """Returns the `size` values that end `back` positions before each position."""
    padded = jnp.pad(x, ((0, 0), (size + back, 0)))
    width = x.shape[1]
    return tuple(padded[:, k + 1 : k + 1 + width] for k in range(size))


def _streaks(links: Bool[Array, "B S"], cap: int) -> Int[Array, "B S"]:
    """Returns the number of consecutive links up to each position, at most `cap`.

    This is one kernel on a CPU, where a cumulative maximum is eight.
    """
    length = jnp.zeros(links.shape, jnp.int32)
    for link in _ending_at(links.astype(jnp.int32), cap, 0):
        length = (length + 1) * link
    return length


def earlier_continuations(
    tokens: Tokens, ngram_size: int, max_matches: int
) -> tuple[Int[Array, "B S M"], Bool[Array, "B S M"]]:
    """Returns the targets that followed earlier occurrences of each token's context.

    The context of t is the n−1 targets before it. Of the earlier positions of the same
    row and segment with an equal context, the last `max_matches` are used.

    Returns:
      The targets at those positions, last first, and whether each one exists.
    """
    windows = _sort_windows(tokens, ngram_size, ngram_size - 1)
    follows = jnp.stack(_ending_at(windows.targets, max_matches, 1)[::-1], -1)
    back = jnp.arange(1, max_matches + 1, dtype=jnp.int32)
    rank = _streaks(~windows.is_first, max_matches)
    found = windows.whole[..., None] & (rank[..., None] >= back[None, None])
    # No id is −1, which marks missing ones in the same array.
    ids = windows.in_row_order(jnp.where(found, follows, -1))
    return jnp.maximum(ids, 0), ids >= 0


def run_lengths(tokens: Tokens, ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Returns the length, up to each position, of the run of equal `ids`.

    Masked positions neither extend nor break a run; every other one is compared with
    the one directly before it.
    """
    count = jnp.cumsum(tokens.active.astype(jnp.int32), axis=1)
    same_segment = tokens.segments == previous(tokens.segments, -1)
    equal = (ids == previous(ids, -1)) & same_segment
    breaks = tokens.active & ~equal
    return count - lax.cummax(jnp.where(breaks, count, 0), axis=1) + 1


def plain_tokens(ids: Integer[Array, "B S"], active: Bool[Array, "B S"]) -> Tokens:
    """Wraps ids of any range in `Tokens`, one segment per row, to count windows."""
    signed = as_labels("ids", ids)
    # XLA would fold the scan over a constant mask, which takes seconds.
    active = lax.optimization_barrier(active)
    return Tokens(
        targets=signed,
        raw=signed,
        weights=as_float(active),
        active=active,
        invalid=jnp.zeros_like(active),
        no_weight=jnp.zeros_like(active),
        routed=active,
        segments=jnp.ones(ids.shape, jnp.int32),
        positions=_index(ids.shape),
    )


def longest_runs(tokens: Tokens) -> Int[Array, "B"]:
    """Returns each row's longest run of equal targets; 1 if there are none."""
    runs = jnp.where(tokens.active, run_lengths(tokens, tokens.raw), 1)
    return jnp.max(runs, axis=1, initial=1)


def repeated_token(
    tokens: Tokens,
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """Returns the token that would extend a run at each position, and the run's length.

    The length is capped at 10. It is 0 where there is no run to extend: the previous
    token is masked or in another segment.
    """
    before = previous(tokens.active, False)
    exists = before & (tokens.segments == previous(tokens.segments, -1))
    repeats = exists & tokens.active & (tokens.targets == previous(tokens.targets, 0))
    run = previous(_streaks(repeats, RUN_CAP - 1) + 1, 0)
    length = jnp.where(exists, run, 0)
    return previous(tokens.targets, 0), length


@flax.struct.dataclass
class History:
    """The whole rows, for penalties on all earlier tokens.

    Attributes:
      ids: the targets.
      first: whether this is the first occurrence of the id in its segment.
      segments: segment ids.
    """

    ids: Int[Array, "B S"]
    first: Bool[Array, "B S"]
    segments: Int[Array, "B S"]


def read_history(tokens: Tokens) -> History:
    """Finds the first occurrence of every id in its segment, by one sort."""
    windows = sort_ngrams(tokens, 1)
    first = windows.in_row_order(windows.whole & windows.is_first)
    return History(ids=tokens.targets, first=first, segments=tokens.segments)


def earlier_ids(
    history: History, segments: Int[Array, "B C"], positions: Int[Array, "B C"]
) -> tuple[Int[Array, "B C S"], Bool[Array, "B C S"]]:
    """Returns the distinct ids before each token of a block, in its own segment.

    Args:
      history: the whole rows.
      segments: segment ids of the block.
      positions: row positions of the block, from 0.

    Returns:
      The rows' ids, and a mask of the distinct earlier ones.
    """
    earlier = _index(history.ids.shape)[:, None] < positions[..., None]
    same = history.segments[:, None] == segments[..., None]
    found = history.first[:, None] & same & earlier
    return jnp.broadcast_to(history.ids[:, None], found.shape), found
