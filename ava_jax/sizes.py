"""How many tokens are handled at a time, by device and shape."""

from typing import NamedTuple

import jax

# A processor's caches hold a block, so that its logits are read from memory once.
_CPU_LOGITS_PER_BLOCK = 2**19
# Large enough for full-speed matrix products, small enough to need little memory.
_CPU_BYTES_PER_CHUNK = 108 * 2**20
# With fewer, adding up the projection's gradient costs as much as making it.
_CPU_FEWEST_TOKENS_PER_CHUNK = 256
_TOKENS_PER_CHUNK = 8192
# XLA's CPU adds a product to its sum in a step of its own.
_CPU_PARTS = 2


class Sizes(NamedTuple):
    """Tokens of each row that are handled at a time.

    Attributes:
      chunk: how many are projected to logits together.
      block: how many of those are reduced, and differentiated, together.
      parts: in how many parts a chunk's share of the projection's gradient is made.
    """

    chunk: int
    block: int
    parts: int = 1


def choose_sizes(
    batch: int,
    length: int,
    width: int,
    itemsize: int = 4,
    chunk: int | None = None,
    block: int | None = None,
) -> Sizes:
    """Chooses the sizes for the default device; a given one is taken as it is.

    On a CPU, a block's logits fill the caches; a chunk's take, with their gradient, 108
    MiB, and more if that is below 256 tokens. On other devices a chunk has 8192 tokens
    and is reduced whole, since a loop of small blocks would leave them idle.

    Args:
      batch: rows, B.
      length: tokens per row, S.
      width: logits per token, V.
      itemsize: bytes of a hidden state; below 4 the chunk's gradient is cast to them.
      chunk: the user's choice.
      block: the user's choice.

    Returns:
      Sizes of at most S; those chosen here cut the row into equal parts.
    """
    if jax.default_backend() == "cpu":
        of_logit = 8 if itemsize >= 4 else 8 + itemsize
        most = _CPU_BYTES_PER_CHUNK // (width * of_logit)
        most = max(most, _CPU_FEWEST_TOKENS_PER_CHUNK)
        chunk = chunk or _even(length, most // batch)
        block = block or _even(length, _CPU_LOGITS_PER_BLOCK // (batch * width))
        return Sizes(min(chunk, length), min(block, length), _CPU_PARTS)
    chunk = chunk or _even(length, _TOKENS_PER_CHUNK // batch)
    return Sizes(min(chunk, length), min(block or length, length))


def _even(length: int, most: int) -> int:
    """The size of the smallest number of equal parts of at most `most` tokens."""
    return -(-length // -(-length // max(most, 1)))
