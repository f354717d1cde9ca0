"""Instructions of asynchronous copies between arrays and shared memory."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from support.ptx.products import swizzled
from support.ptx.program import TensorMap
from support.ptx.shared_memory import WORD
from support.ptx.state import MAPS, Block, Warp, finished
from support.ptx.waiting import barrier_at


class _Places(NamedTuple):
    """Where the numbers of a tile are.

    Attributes:
      array: what they are in, in numbers of their size.
      at: addresses in shared memory, in numbers.
      inside: the same within the array; 0 for numbers beyond its end.
      is_inside: whether that is within the array.
      words: those of shared memory.
    """

    array: np.ndarray
    at: np.ndarray
    inside: np.ndarray
    is_inside: np.ndarray
    words: np.ndarray


def _places(block: Block, warp: Warp, tile: str, target: str, lanes) -> _Places:
    """Returns them, given the map and the first index of a tile, in brackets."""
    base, *corner = re.findall(r"%\w+", tile)
    map_: TensorMap = block.launch.maps[warp.one(f"[{base}]", lanes) - MAPS]
    first = [warp.one(x, lanes, "s32") for x in reversed(corner)]
    index = np.zeros(map_.box, np.int64)
    is_inside = np.ones(map_.box, bool)
    offsets = np.meshgrid(*map(np.arange, map_.box), indexing="ij")
    for offset, start, size, stride in zip(
        offsets, first, map_.sizes, map_.strides, strict=True
    ):
        index += (offset + start) * stride
        is_inside &= (offset + start >= 0) & (offset + start < size)
    start = warp.one(target, lanes)
    at = start + map_.itemsize * np.arange(index.size)
    if map_.swizzle == 128:
        assert start % 1024 == 0, "a tile that is not aligned"
        at = swizzled(at)
    return _Places(
        block.arrays[map_.argument].view(f"uint{8 * map_.itemsize}"),
        at // map_.itemsize,
        np.where(is_inside, index, 0).ravel(),
        is_inside.ravel(),
        np.unique(at // WORD),
    )


def copy_tile(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    """Copies a tile of an array: `cp.async.bulk.tensor`."""
    if ".global.shared::cta." in name:
        _store_tile(block, warp, operands, lanes)
    else:
        _load_tile(block, warp, operands, lanes)


def _load_tile(block: Block, warp: Warp, operands, lanes) -> None:
    """Copies a tile to shared memory; its bytes arrive at a barrier."""
    target, tile, barrier = operands
    barrier = barrier_at(block, warp, barrier, lanes)
    places = _places(block, warp, tile, target, lanes)
    block.memory.begin_write(warp.clock, places.words)
    kind = places.array.dtype

    def arrive() -> None:
        found = np.where(places.is_inside, places.array[places.inside], 0)
        block.memory.bytes.view(kind)[places.at] = found
        block.memory.end_write(barrier.agent, barrier.phase + 1, places.words)
        barrier.bytes -= found.size * kind.itemsize
        barrier.turn()

    block.copies.append(arrive)


class _Store:
    """A copy from shared memory to an array.

    Attributes:
      words: what it reads.
      write: writes what it has read.
    """

    def __init__(self, words: np.ndarray, read: Callable, write: Callable) -> None:
        self.words, self.write = words, write
        self._read, self._found = read, None

    def read(self) -> np.ndarray:
        """Reads, the first time."""
        if self._found is None:
            self._found = self._read()
        return self._found


def _store_tile(block: Block, warp: Warp, operands, lanes) -> None:
    """Copies a tile of shared memory to an array."""
    tile, source = operands
    places = _places(block, warp, tile, source, lanes)

    def read() -> np.ndarray:
        return block.memory.bytes.view(places.array.dtype)[places.at]

    def write(found: np.ndarray) -> None:
        places.array[places.inside[places.is_inside]] = found[places.is_inside]

    _store(block, warp, places.words, read, write)


def copy_bytes(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    """Copies bytes of shared memory to an array: `cp.async.bulk`."""
    array, start = block.array(warp.one(operands[0], lanes))
    source, count = (warp.one(x, lanes) for x in operands[1:])
    assert start + count <= array.size, "beyond the end of an array"
    at = np.arange(source, source + count)

    def write(found: np.ndarray) -> None:
        array[start : start + count] = found

    words = np.unique(at // WORD)
    _store(block, warp, words, lambda: block.memory.bytes[at], write)


def _store(block: Block, warp: Warp, words: np.ndarray, read, write) -> None:
    block.memory.begin_read(warp.clock, words)
    store = _Store(words, read, write)
    if block.is_early():
        store.read()
    warp.stores[-1].append(store)


def commit(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    """Makes a group of the last copies: `cp.async.bulk.commit_group`."""
    warp.stores.append([])


def wait(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    """Waits for all groups but the last ones: `cp.async.bulk.wait_group`."""
    # Those that are only known to have read are written now, too.
    for group in finished(warp.stores, int(operands[0])):
        for store in group:
            store.write(store.read())
            block.memory.end_read(warp.number, warp.clock, store.words)


INSTRUCTIONS = {
    "cp.async.bulk.tensor.": copy_tile,
    "cp.async.bulk.global.shared::cta": copy_bytes,
    "cp.async.bulk.commit_group": commit,
    "cp.async.bulk.wait_group": wait,
}
