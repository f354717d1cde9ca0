"""The asynchronous product of a group of four warps, `wgmma`, as one warp sees it."""

import functools
from typing import NamedTuple

import numpy as np

from support.ptx.arithmetic import BFLOAT16, LANES
from support.ptx.shared_memory import WORD

ROWS, DEPTH = 16, 16
_ROW_BYTES = 128


class Operands(NamedTuple):
    """Where the operands are in shared memory, and the words they consist of.

    Attributes:
      left: addresses [rows of the warp, depth].
      right: addresses [depth, columns].
      words: those of both.
    """

    left: np.ndarray
    right: np.ndarray
    words: np.ndarray


@functools.lru_cache(4096)
def operands(left: int, right: int, warp: int, columns: int) -> Operands:
    """Returns where a warp's operands are, given their descriptors.

    Args:
      left: of an array whose rows hold 64 numbers of the depth.
      right: of one whose rows hold 64 columns.
      warp: its number within its group.
      columns: of the product.
    """
    start, _, step = _fields(left)
    row, depth = np.arange(ROWS)[:, None] + ROWS * warp, np.arange(DEPTH)
    lefts = start + row // 8 * step + row % 8 * _ROW_BYTES + 2 * depth
    start, across, down = _fields(right)
    depth, column = np.arange(DEPTH)[:, None], np.arange(columns)
    rights = start + column // 64 * across + column % 64 * 2
    rights = rights + depth // 8 * down + depth % 8 * _ROW_BYTES
    lefts, rights = swizzled(lefts), swizzled(rights)
    words = np.unique(np.concatenate([lefts.ravel(), rights.ravel()]) // WORD)
    return Operands(lefts, rights, words)


def _fields(descriptor: int) -> tuple[int, int, int]:
    """Returns the address, and the two distances in bytes."""
    assert descriptor >> 62 == 1, "no pieces permuted within 128 bytes"
    start, leading, stride = (
        (descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32)
    )
    return start, leading, stride


def swizzled(address: np.ndarray) -> np.ndarray:
    """Returns where a byte of a row of 128 is: its pieces of 16 are permuted."""
    return address ^ (address >> 7 & 7) << 4


def multiply(memory: np.ndarray, at: Operands) -> np.ndarray:
    """Returns the product, [rows, columns]."""
    numbers = memory.view(BFLOAT16)
    left, right = (numbers[x // 2].astype(np.float32) for x in (at.left, at.right))
    return left @ right


@functools.lru_cache(4)
def places(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row and column of each of a lane's numbers, [count, lanes]."""
    number, lane = np.arange(count)[:, None], np.arange(LANES)
    row = lane // 4 + 8 * (number % 4 // 2)
    column = number // 4 * 8 + lane % 4 * 2 + number % 2
    return row, column
