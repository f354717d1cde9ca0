"""The sizes of chunks and blocks of tokens, by implementation and shape."""

import math
from typing import NamedTuple

from jax.export import is_symbolic_dim

from ava_jax.kernel.platforms import Target

MIB = 2**20

# A block fits a CPU's caches, so that its logits are read from memory once.
_CPU_LOGITS_PER_BLOCK = 2**19
# Large enough for matrix products at nearly full speed, small enough to save memory,
# and to save time where most tokens are masked: only whole chunks are left out.
_CPU_BYTES_PER_CHUNK = 92 * MIB
# With fewer, accumulating the projection's gradient costs as much as computing it.
_CPU_FEWEST_TOKENS_PER_CHUNK = 256
# XLA:CPU materialises a product before it is added to its sum.
_CPU_PARTS = 2


class _Limits(NamedTuple):
    """The largest block or chunk of an accelerator.

    Attributes:
      tokens: the largest number of tokens.
      bytes: the largest size of their logits, or of the gradient of those.
      compromise: the largest value of tokens² times the bytes of a token's logits. With
        c tokens at a time, the time to read the projection goes as 1/c and the memory
        as c·V: the best compromise has c proportional to 1/√V.
    """

    tokens: int
    bytes: int
    compromise: float = math.inf

    def most(self, bytes_per_token: int) -> int:
        """Returns the largest number of tokens within these limits."""
        most = min(self.tokens, self.bytes // bytes_per_token)
        if math.isinf(self.compromise):
            return most
        return min(most, math.isqrt(int(self.compromise / bytes_per_token)))


_TPU_BLOCK = _Limits(1024, 512 * MIB, 2.4e11)
_TPU_CHUNK = _Limits(4096, 1024 * MIB, 1.8e12)
# For a chunk whose gradient of the logits is fused into the products.
_FUSED_TOKENS = 2048
_FUSED_FEATURES = 2560
_GPU_BLOCK = _Limits(2048, 1024 * MIB)
_GPU_CHUNK = _Limits(4096, 1024 * MIB)
# Columns of the longest row that a GPU's compiler does not split to reduce it.
_GPU_LONGEST_ROW = 16384
# Rows of an accelerator's memory tiles; other sizes are padded.
_TILE = 8


class Sizes(NamedTuple):
    """The numbers of tokens of each row that are processed at a time.

    Attributes:
      chunk: per product of the logits' gradient with the hidden states and with the
        projection.
      block: per reduction of logits, and per gradient of them.
      parts: the number of parts in which a chunk's contribution to the projection's
        gradient is computed.
      first: the block of the first chunk, if that is computed apart from the others.
    """

    chunk: int
    block: int
    parts: int = 1
    first: int = 0


def fuses_gradient(features: int) -> bool:
    """Returns whether a TPU should fuse the gradient of the logits into the products.

    With rounded exponentials that is possible if a chunk is one block: the gradient is
    never written, but a product recomputes it for every few hundred columns of its
    result, D in all. By the compiler's estimates that is faster with D = 1024 on any
    TPU and with 2560 on a v6e (0.88 of the time), about equal with 2048 on a v5e and
    v5p, and slower with 4096 there (1.08).

    Args:
      features: D.
    """
    return features <= _FUSED_FEATURES


def choose_sizes(
    target: Target,
    batch: int,
    length: int,
    width: int,
    features: int | None,
    *,
    itemsize: int = 4,
    is_one_block: bool = False,
    chunk: int | None = None,
    block: int | None = None,
) -> Sizes:
    """Chooses the sizes of chunks and blocks; a size given by the user is kept.

    On a CPU, a block's logits fill the caches; a chunk's logits and their gradient take
    92 MiB, or more if that is less than 256 tokens.

    On TPUs and GPUs the sizes balance three costs, with F flops and M bytes per second,
    C tokens per chunk and c per block:

    - The projection's gradient is read and written once per chunk: 8·D·V bytes against
      6·C·D·V flops. That costs a tenth of the products' time at C = 13·F/M: 2200
      tokens on a TPU v5p, 3100 on a v5e, 3900 on an H100. So C is at most 4096.
    - The projection is read once per block: 2·D·V bytes against 2·c·D·V flops, which
      take the same time at c = F/M: 166 tokens on a v5p, 240 on a v5e, 560 on a v6e. So
      c is at most 1024. On GPUs, sums are not fused into products and the logits are
      read again for them: there c is at most 2048.
    - A block's float32 logits (4·c·V bytes) and a chunk's gradient in the operands'
      dtype (b·C·V bytes) are live at the same time. On a TPU c and C fall as 1/√V: 1024
      and 4096 tokens with V = 50304, 512 and 2048 with V = 64128 to 151936.

    On GPUs the projection's gradient (4·D·V bytes) begins as the product of the first
    chunk. Until then its memory is free, so a block of that chunk may have D tokens.

    Logits given by the caller exist already, and are processed whole.

    Args:
      target: the implementation and the platform.
      batch: rows per device, B.
      length: tokens per row, S.
      width: logits per token and device, V.
      features: D; None if the logits are given.
      itemsize: b, the bytes of a hidden state's element.
      is_one_block: whether a chunk has to be one block; see `fuses_gradient`.
      chunk: the user's choice, tokens per row.
      block: the user's choice, tokens per row.

    Returns:
      Sizes of at most S; those chosen here divide the row into equal parts.
    """
    chunk = _known_chunk(batch, length, features, chunk, block)
    if target.implementation == "cpu":
        of_logit = 8 if itemsize >= 4 else 8 + itemsize
        most = _CPU_BYTES_PER_CHUNK // (width * of_logit)
        most = max(most, _CPU_FEWEST_TOKENS_PER_CHUNK)
        chunk = chunk or _even(length, most // batch)
        block = block or _even(length, _CPU_LOGITS_PER_BLOCK // (batch * width))
        return Sizes(min(chunk, length), min(block, length), _CPU_PARTS)
    if features is None:
        return Sizes(length, min(block or length, length))
    on_gpu = target.platform == "gpu"
    most = (_GPU_CHUNK if on_gpu else _TPU_CHUNK).most(itemsize * width)
    most = min(most, _FUSED_TOKENS) if is_one_block else most
    chunk = min(chunk or _tiled(length, most // batch), length)
    if is_one_block:
        return Sizes(chunk, min(block or chunk, chunk))
    most = (_GPU_BLOCK if on_gpu else _TPU_BLOCK).most(4 * width)
    first = min(block or _tiled(chunk, max(most, features) // batch), chunk)
    block = min(block or _tiled(chunk, most // batch), chunk)
    return Sizes(chunk, block, first=first if on_gpu else 0)


def parts_of_row(target: Target, width: int) -> int:
    """Returns how many equal parts of a row of logits to sum apart.

    A GPU's compiler splits rows of more than 16384 columns itself, in about as many
    parts as a part has columns, and keeps their sums in memory: 16 MiB for three sums
    of 16384 tokens. Fewer parts need less.

    Args:
      target: the implementation and the platform.
      width: columns per device.

    Returns:
      The fewest parts that are short enough; 1 where a row is not split, and where its
      width is not a multiple of few numbers.
    """
    if target.platform != "gpu":
        return 1
    fewest = -(-width // _GPU_LONGEST_ROW)
    fitting = (n for n in range(fewest, 4 * fewest) if width % n == 0)
    return next(fitting, 1)


def _known_chunk(
    batch: int, length: int, features: int | None, chunk: int | None, block: int | None
) -> int | None:
    """Returns the user's choice of a chunk, which symbolic dimensions need.

    Raises:
      ValueError: a dimension is symbolic and a size is not given.
    """
    if not (is_symbolic_dim(batch) or is_symbolic_dim(length)):
        return chunk
    if features is None:
        # Chunks are for the product: without one, blocks alone divide the rows.
        chunk = chunk or block
    if chunk is None or block is None:
        raise ValueError(
            f"sizes cannot be chosen for the symbolic shape ({batch}, {length}) of "
            f"targets: pass chunk_size, got {chunk}, and block_size, got {block}"
        )
    return chunk


def _even(length: int, most: int) -> int:
    """Returns the size of equal parts of at most `most` tokens, as few as possible."""
    return -(-length // -(-length // max(most, 1)))


def _tiled(length: int, most: int) -> int:
    """Returns the same in whole tiles; of up to twice as many parts, the best fit."""
    fewest = -(-length // max(most, _TILE))
    sizes = [
        -(-length // (parts * _TILE)) * _TILE for parts in range(fewest, 2 * fewest + 1)
    ]
    return min(length, min(sizes, key=lambda size: (-length % size, -size)))
