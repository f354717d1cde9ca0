"""How many tokens are handled at a time, by implementation and shape."""

import math
from typing import NamedTuple

from ava_jax.kernel.platforms import Target

MIB = 2**20

# A processor's caches hold a block, so that its logits are read from memory once.
_CPU_LOGITS_PER_BLOCK = 2**19
# Large enough for full-speed matrix products, small enough to need little memory.
_CPU_BYTES_PER_CHUNK = 108 * MIB
# With fewer, adding up the projection's gradient costs as much as making it.
_CPU_FEWEST_TOKENS_PER_CHUNK = 256
# XLA's CPU adds a product to its sum in a step of its own.
_CPU_PARTS = 2


class _Limits(NamedTuple):
    """The most that an accelerator handles at a time.

    Attributes:
      tokens: of them.
      bytes: that their logits, or the gradient of those, take.
      compromise: tokens², times the bytes of a token's logits. What is read once for
        all tokens costs time as 1/c and what they need costs memory as c·V, so that
        the best compromise between the two has c as 1/√V.
    """

    tokens: int
    bytes: int
    compromise: float = math.inf

    def most(self, bytes_per_token: int) -> int:
        """Returns how many tokens that is."""
        most = min(self.tokens, self.bytes // bytes_per_token)
        if math.isinf(self.compromise):
            return most
        return min(most, math.isqrt(int(self.compromise / bytes_per_token)))


_TPU_BLOCK = _Limits(1024, 512 * MIB, 2.4e11)
_TPU_CHUNK = _Limits(4096, 1024 * MIB, 1.8e12)
# A chunk whose gradient of the logits is made within the products.
_FUSED_TOKENS = 2048
_FUSED_FEATURES = 2560
_GPU_BLOCK = _Limits(2048, 1024 * MIB)
_GPU_CHUNK = _Limits(4096, 1024 * MIB)
# Rows of an accelerator's tiles; other sizes are padded in memory.
_TILE = 8


class Sizes(NamedTuple):
    """Tokens of each row that are handled at a time.

    Attributes:
      chunk: how many logits' gradients are multiplied together, into those of the
        hidden states and of the projection.
      block: how many logits are reduced, and differentiated, together.
      parts: in how many parts a chunk's share of the projection's gradient is made.
    """

    chunk: int
    block: int
    parts: int = 1


def fuses_gradient(features: int) -> bool:
    """Says whether a TPU makes the gradient of the logits within the products.

    Out of rounded exponentials it can, if a chunk is one block: nothing is written, but
    a product makes its operand anew for every few hundred columns of its result, D in
    all. By the compiler's estimates that is faster with D = 1024 on any TPU, with 2560
    on a v6e (0.88 of the time), about equal with 2048 on a v5e and v5p, and slower with
    4096 there (1.08).

    Args:
      features: D.
    """
    return features <= _FUSED_FEATURES


def choose_sizes(
    target: Target,
    batch: int,
    length: int,
    width: int,
    *,
    itemsize: int = 4,
    is_projected: bool = True,
    is_one_block: bool = False,
    chunk: int | None = None,
    block: int | None = None,
) -> Sizes:
    """Chooses how many tokens are handled at a time; a given size is taken as it is.

    On a CPU, a block's logits fill the caches; a chunk's take, with their gradient, 108
    MiB, and more if that is below 256 tokens.

    On TPUs and GPUs three costs pull at the sizes, with F flops and M bytes a second, C
    tokens a chunk and c a block:

    - The projection's gradient is read and written once a chunk: 8·D·V bytes against
      6·C·D·V flops. That costs a tenth of the products' time at C = 13·F/M: 2200
      tokens on a TPU v5p, 3100 on a v5e, 3900 on an H100. So C is at most 4096.
    - The projection is read once a block: 2·D·V bytes against 2·c·D·V flops, which
      take as long at c = F/M: 166 tokens on a v5p, 240 on a v5e, 560 on a v6e. So c is
      at most 1024. Products on GPUs do not make sums of their results on the way, and
      read the projection anew for what those spare: there c is 2048.
    - A block's float32 logits (4·c·V bytes) and a chunk's gradient in the operands'
      dtype (b·C·V bytes) exist at once. On a TPU c and C fall as 1/√V: 1024 and 4096
      tokens with V = 50304, 512 and 2048 with V = 64128 to 151936.

    Logits that are given exist already, and are handled whole.

    Args:
      target: the implementation and the platform.
      batch: rows of a device, B.
      length: tokens per row, S.
      width: logits per token of a device, V.
      itemsize: b, the bytes of a hidden state.
      is_projected: whether the logits are made of hidden states.
      is_one_block: whether a chunk is to be one block, see `fuses_gradient`.
      chunk: the user's choice, tokens per row.
      block: the user's choice, tokens per row.

    Returns:
      Sizes of at most S; those chosen here cut the row into equal parts.
    """
    if target.implementation == "cpu":
        of_logit = 8 if itemsize >= 4 else 8 + itemsize
        most = _CPU_BYTES_PER_CHUNK // (width * of_logit)
        most = max(most, _CPU_FEWEST_TOKENS_PER_CHUNK)
        chunk = chunk or _even(length, most // batch)
        block = block or _even(length, _CPU_LOGITS_PER_BLOCK // (batch * width))
        return Sizes(min(chunk, length), min(block, length), _CPU_PARTS)
    if not is_projected:
        return Sizes(length, min(block or length, length))
    on_gpu = target.platform == "gpu"
    most = (_GPU_CHUNK if on_gpu else _TPU_CHUNK).most(itemsize * width)
    most = min(most, _FUSED_TOKENS) if is_one_block else most
    chunk = min(chunk or _tiled(length, most // batch), length)
    if is_one_block:
        return Sizes(chunk, min(block or chunk, chunk))
    most = (_GPU_BLOCK if on_gpu else _TPU_BLOCK).most(4 * width)
    return Sizes(chunk, min(block or _tiled(chunk, most // batch), chunk))


def _even(length: int, most: int) -> int:
    """The size of the smallest number of equal parts of at most `most` tokens."""
    return -(-length // -(-length // max(most, 1)))


def _tiled(length: int, most: int) -> int:
    """The same in whole tiles, and of up to twice as many parts those that fit best."""
    fewest = -(-length // max(most, _TILE))
    sizes = [
        -(-length // (parts * _TILE)) * _TILE for parts in range(fewest, 2 * fewest + 1)
    ]
    return min(length, min(sizes, key=lambda size: (-length % size, -size)))
