"""Integers only: which tokens count, their shifts, windows, matches and runs.

Nothing here touches a vocabulary axis or has a gradient. All arrays are [B, S] unless a
docstring says otherwise, and nothing crosses a segment.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from ava_jax.reduce import as_float

RUN_CAP = 10


@flax.struct.dataclass
class Tokens:
    """The targets of a batch and what counts of them.

    Attributes:
      targets: ids; 0 where the token does not count.
      raw: ids as given.
      weights: per-token weights; 0 where the token does not count.
      active: weights != 0.
      invalid: would count, but the id is outside the vocabulary.
      segments: segment ids; all 1 unless given.
      positions: position within the segment, from 0.
    """

    targets: Int[Array, "B S"]
    raw: Int[Array, "B S"]
    weights: Float[Array, "B S"]
    active: Bool[Array, "B S"]
    invalid: Bool[Array, "B S"]
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
) -> Tokens:
    """Weighs every target and finds the segments.

    The weight is `attention_mask · [y ≠ ignore_index] · [0 ≤ y < V]`, times
    `[segment ≠ 0]`. Without a mask, targets equal to `pad_token_id` weigh 0; if that is
    the EOS id too, the first one of the row's trailing run keeps its weight.
    """
    targets = _signed(targets)
    if attention_mask is not None:
        given = as_float(attention_mask)
    else:
        given = as_float(~_padding(targets, pad_token_id, eos_token_id))
    if segment_ids is None:
        segments = jnp.ones(targets.shape, jnp.int32)
    else:
        segments = segment_ids.astype(jnp.int32)
        given = jnp.where(segments == 0, jnp.zeros_like(given), given)
    inside = (targets >= 0) & (targets < vocab_size)
    wanted = (given != 0) & (targets != ignore_index)
    active = wanted & inside
    return Tokens(
        targets=jnp.where(active, targets, 0).astype(jnp.int32),
        raw=targets,
        weights=jnp.where(active, given, jnp.zeros_like(given)),
        active=active,
        invalid=wanted & ~inside,
        segments=segments,
        positions=_positions(segments),
    )


def _signed(ids: Integer[Array, "B S"]) -> Int[Array, "B S"]:
    """Gives ids a type that holds ignore_index and vocab_size; none become equal."""
    return ids.astype(jnp.int64 if ids.dtype.itemsize == 8 else jnp.int32)


def _padding(
    targets: Int[Array, "B S"], pad_token_id: int | None, eos_token_id: int | None
) -> Bool[Array, "B S"]:
    if pad_token_id is None:
        return jnp.zeros(targets.shape, bool)
    pads = targets == pad_token_id
    if pad_token_id != eos_token_id:
        return pads
    trailing = lax.cummin(pads.astype(jnp.int32), axis=1, reverse=True) == 1
    return trailing & previous(trailing, False)


def previous(x: Shaped[Array, "B S"], fill: int | bool) -> Shaped[Array, "B S"]:
    """Shifts one to the right along the sequence; position 0 gets `fill`."""
    first = jnp.full((x.shape[0], min(x.shape[1], 1)), fill, x.dtype)
    return jnp.concatenate([first, x[:, :-1]], axis=1)


def _positions(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    index = _index(segments.shape)
    starts = segments != previous(segments, -1)
    return index - lax.cummax(jnp.where(starts, index, 0), axis=1)


def _index(shape: tuple[int, ...]) -> Int[Array, "B S"]:
    return lax.broadcasted_iota(jnp.int32, shape, 1)


def ahead(tokens: Tokens, distance: int) -> Tokens:
    """Returns the tokens that a head looking `distance` further ahead predicts.

    Position t holds target t+j with its weight, if t+j lies in the row and in the
    segment of t; otherwise it does not count.
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
    """Returns how many counted targets of one segment end, without a gap, here."""
    index = _index(tokens.active.shape)
    last_gap = lax.cummax(jnp.where(tokens.active, -1, index), axis=1)
    first = jnp.maximum(last_gap + 1, index - tokens.positions)
    return index - first + 1


def whole_windows(tokens: Tokens, size: int) -> Bool[Array, "B S"]:
    """Says where a window of `size` counted targets of one segment ends."""
    return tokens.active & (stretch_lengths(tokens) >= size)


@flax.struct.dataclass
class SortedWindows:
    """A row's windows, equal ones side by side and in order of position.

    Attributes:
      order: position of the window at each index of the sorted row.
      first: sorted index of the first window equal to this one.
      whole: whether the window at this index counts.
    """

    order: Int[Array, "B S"]
    first: Int[Array, "B S"]
    whole: Bool[Array, "B S"]

    @property
    def rank(self) -> Int[Array, "B S"]:
        """How many equal windows come earlier in the row."""
        return _index(self.first.shape) - self.first

    def in_row_order(self, values: Shaped[Array, "B S *n"]) -> Shaped[Array, "B S *n"]:
        """Brings values from the sorted row back to the windows' positions."""
        return _scatter(values, self.order)


def sort_ngrams(tokens: Tokens, size: int) -> SortedWindows:
    """Sorts the windows of `size` targets of each row, by their last position.

    Raises:
      ValueError: `size`, which callers know as `ngram_size`, is below 1.
    """
    if size < 1:
        raise ValueError(f"ngram_size must be at least 1, got {size}")
    keys = (tokens.segments, *_ending_at(tokens, size, 0))
    return _sort_windows(whole_windows(tokens, size), keys)


def count_ngrams(tokens: Tokens, size: int) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Returns how many distinct windows of `size` targets each row has, and of all."""
    windows = sort_ngrams(tokens, size)
    distinct = windows.whole & (windows.rank == 0)
    return jnp.sum(distinct, axis=1), jnp.sum(windows.whole, axis=1)


def _sort_windows(
    whole: Bool[Array, "B S"], keys: tuple[Int[Array, "B S"], ...]
) -> SortedWindows:
    """Groups equal windows exactly, O(S log S) per row and key.

    One key after the other joins a rank, which is equal where all keys so far are. That
    is one small sort in a loop: compiling a sort takes the TPU's compiler 3 s with two
    operands, 7 s with three and 18 s with six.
    """
    index = _index(whole.shape)

    def join(k: Int[Array, ""], state: SortedWindows) -> SortedWindows:
        rank = _scatter(state.first, state.order)
        key = lax.dynamic_index_in_dim(stacked, k, keepdims=False)
        key, rank, order = _sort_keys(key, rank, index)
        starts = index == 0
        for sorted_key in (rank, key):
            starts |= sorted_key != previous(sorted_key, -1)
        first = lax.cummax(jnp.where(starts, index, 0), axis=1)
        return SortedWindows(order=order, first=first, whole=state.whole)

    widest = max((key.dtype for key in keys), key=lambda dtype: dtype.itemsize)
    stacked = jnp.stack([key.astype(widest) for key in keys])
    # Windows that do not count differ from all others in their first rank.
    start = SortedWindows(order=index, first=(~whole).astype(jnp.int32), whole=whole)
    windows = lax.fori_loop(0, len(keys), join, start)
    return dataclasses.replace(
        windows, whole=jnp.take_along_axis(whole, windows.order, axis=1)
    )


def _sort_keys(
    key: Int[Array, "B S"], rank: Int[Array, "B S"], index: Int[Array, "B S"]
) -> tuple[Int[Array, "B S"], Int[Array, "B S"], Int[Array, "B S"]]:
    """Sorts rows by key, then rank, then index."""
    width = index.shape[1]
    if width**2 >= 2**31:
        operands = (key, rank, index)
        key, rank, index = lax.sort(operands, dimension=1, num_keys=3, is_stable=False)
        return key, rank, index
    # A rank is an index: both fit one number.
    operands = (key, rank * width + index)
    key, both = lax.sort(operands, dimension=1, num_keys=2, is_stable=False)
    return key, both // width, both % width


def _scatter(
    values: Shaped[Array, "B S *n"], order: Int[Array, "B S"]
) -> Shaped[Array, "B S *n"]:
    """Puts the value at index i of each row at `order[i]`, a permutation."""

    # Row by row, so that devices which share the rows need not gather them.
    @jax.vmap
    def scatter(values, order):
        return (
            jnp.zeros_like(values)
            .at[order]
            .set(values, unique_indices=True, mode="promise_in_bounds")
        )

    return scatter(values, order)


def _ending_at(tokens: Tokens, size: int, back: int) -> tuple[Int[Array, "B S"], ...]:
    """The `size` targets that end `back` positions before each one."""
    padded = jnp.pad(tokens.targets, ((0, 0), (size + back, 0)))
    width = tokens.targets.shape[1]
    return tuple(padded[:, k + 1 : k + 1 + width] for k in range(size))


def earlier_continuations(
    tokens: Tokens, ngram_size: int, max_matches: int
) -> tuple[Int[Array, "B S M"], Bool[Array, "B S M"]]:
    """Finds what followed the latest earlier occurrences of each token's context.

    The context of t is the n−1 targets before it. Of the earlier positions of the same
    row and segment with an equal context, the latest `max_matches` are taken.

    Returns:
      The targets at those positions, latest first, and whether each one exists.
    """
    context = ngram_size - 1
    whole = whole_windows(tokens, ngram_size)
    keys = (tokens.segments, *_ending_at(tokens, context, 1))
    windows = _sort_windows(whole, keys)
    follows = jnp.take_along_axis(tokens.targets, windows.order, axis=1)
    width = follows.shape[1]
    shifted = [
        jnp.pad(follows, ((0, 0), (back, 0)))[:, :width]
        for back in range(1, max_matches + 1)
    ]
    back = jnp.arange(1, max_matches + 1, dtype=jnp.int32)
    found = windows.whole[..., None] & (windows.rank[..., None] >= back)
    # No id is −1: what was not found travels with the ids.
    ids = windows.in_row_order(jnp.where(found, jnp.stack(shifted, -1), -1))
    return jnp.maximum(ids, 0), ids >= 0


def run_lengths(tokens: Tokens, ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Returns the length of the run of equal `ids` that each position belongs to.

    Positions that do not count neither extend nor break a run; every other one is
    compared with the one directly before it.
    """
    counted = jnp.cumsum(tokens.active.astype(jnp.int32), axis=1)
    same_segment = tokens.segments == previous(tokens.segments, -1)
    equal = (ids == previous(ids, -1)) & same_segment
    breaks = tokens.active & ~equal
    return counted - lax.cummax(jnp.where(breaks, counted, 0), axis=1) + 1


def plain_tokens(ids: Integer[Array, "B S"], active: Bool[Array, "B S"]) -> Tokens:
    """Wraps ids of any range, one segment per row, for counting windows."""
    signed = _signed(ids)
    # XLA would scan over a mask of ones while compiling, which takes seconds.
    active = lax.optimization_barrier(active)
    return Tokens(
        targets=signed,
        raw=signed,
        weights=as_float(active),
        active=active,
        invalid=jnp.zeros_like(active),
        segments=jnp.ones(ids.shape, jnp.int32),
        positions=_index(ids.shape),
    )


def longest_runs(tokens: Tokens) -> Int[Array, "B"]:
    """Returns each row's longest run of equal targets; 1 where nothing counts."""
    runs = jnp.where(tokens.active, run_lengths(tokens, tokens.raw), 1)
    return jnp.max(runs, axis=1)


def repeated_token(
    tokens: Tokens,
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """Returns the token that would extend a run at each position, and the run's length.

    The length is capped at 10, and 0 where no run could be extended: the token before
    does not count or lies in another segment.
    """
    unmatched = jnp.where(tokens.active, tokens.targets, -1)
    runs = previous(run_lengths(tokens, unmatched), 0)
    before = previous(tokens.active, False)
    exists = before & (tokens.segments == previous(tokens.segments, -1))
    length = jnp.where(exists, jnp.minimum(runs, RUN_CAP), 0)
    return previous(tokens.targets, 0), length


@flax.struct.dataclass
class History:
    """The rows as a token's past, for penalties that look at all earlier tokens.

    Attributes:
      ids: the targets.
      first: whether the id is the first of its kind in its segment.
      segments: segment ids.
    """

    ids: Int[Array, "B S"]
    first: Bool[Array, "B S"]
    segments: Int[Array, "B S"]


def read_history(tokens: Tokens) -> History:
    """Finds the first occurrence of every id in its segment, by one sort."""
    windows = sort_ngrams(tokens, 1)
    first = windows.in_row_order(windows.whole & (windows.rank == 0))
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
      The rows' ids, and which of them are distinct and earlier.
    """
    earlier = _index(history.ids.shape)[:, None] < positions[..., None]
    same = history.segments[:, None] == segments[..., None]
    found = history.first[:, None] & same & earlier
    return jnp.broadcast_to(history.ids[:, None], found.shape), found
