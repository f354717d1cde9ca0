"""Shared memory that knows who has accessed it, and raises an error at a race.

Time is a vector clock: of each warp, how often it has let others know of what it did,
and of each barrier, how many of its phases are complete. An access to what another has
written is allowed if the clock of who accesses it has reached the one of that.
Asynchronous copies and products access memory from when they are issued until they are
known to be complete, whenever they really do it.
"""

import numpy as np

BASE = 1024  # the first KB is the system's
WORD = 4
_NOBODY = -1


class Race(AssertionError):
    """Memory is accessed in an order that nothing enforces."""


class SharedMemory:
    """The shared memory of a block.

    Attributes:
      bytes: what it holds.
    """

    def __init__(self, size: int, warps: int) -> None:
        words = (BASE + size) // WORD
        self.bytes = np.full(words * WORD, 0xFF, np.uint8)
        self._writer = np.full(words, _NOBODY)
        self._written = np.zeros(words, int)
        self._lane = np.full(words, -1)
        self._read = np.zeros((warps, words), int)
        # Writes that asynchronous reads do not see yet.
        self._is_unfenced = np.zeros(words, bool)
        self._is_arriving = np.zeros(words, bool)
        self._readers = np.zeros(words, int)

    def _check(self, found: np.ndarray, words: np.ndarray, what: str) -> None:
        if found.any():
            places = sorted({WORD * int(x) - BASE for x in words[found]})
            raise Race(f"{what} at {places[:4]} of {len(places)}")

    def _check_written(self, clock: np.ndarray, words: np.ndarray) -> None:
        self._check(self._is_arriving[words], words, "a copy is still arriving")
        writer = self._writer[words]
        is_known = (writer == _NOBODY) | (self._written[words] <= clock[writer])
        self._check(~is_known, words, "unordered with a write")

    def _check_read(self, clock: np.ndarray, words: np.ndarray) -> None:
        self._check(self._readers[words] > 0, words, "still read asynchronously")
        for warp, read in enumerate(self._read):
            self._check(read[words] > clock[warp], words, "unordered with a read")

    def load(self, warp: int, clock: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        """Returns the word at an address for each lane."""
        words = addresses // WORD
        self._check(self._writer[words] == _NOBODY, words, "never written")
        self._check_written(clock, words)
        is_recent = self._written[words] == clock[warp]
        is_other = (self._writer[words] == warp) & is_recent
        is_other &= self._lane[words] != np.arange(len(words))
        self._check(is_other, words, "written by another lane")
        self._read[warp, words] = clock[warp]
        return self.bytes.view(np.uint32)[words]

    def store(self, warp: int, clock: np.ndarray, addresses, values) -> None:
        """Writes a word at an address for each lane."""
        words = addresses // WORD
        self._check_written(clock, words)
        self._check_read(clock, words)
        self.bytes.view(np.uint32)[words] = values
        self._writer[words] = warp
        self._written[words] = clock[warp]
        self._lane[words] = np.arange(len(words))
        self._is_unfenced[words] = True

    def fence(self, warp: int) -> None:
        """Makes what a warp has written visible to asynchronous reads."""
        self._is_unfenced[self._writer == warp] = False

    def begin_read(self, clock: np.ndarray, words: np.ndarray) -> None:
        """Begins an asynchronous read."""
        self._check(self._writer[words] == _NOBODY, words, "never written")
        self._check_written(clock, words)
        self._check(self._is_unfenced[words], words, "not fenced")
        self._readers[words] += 1

    def end_read(self, warp: int, clock: np.ndarray, words: np.ndarray) -> None:
        """Ends an asynchronous read, as a warp knows."""
        self._readers[words] -= 1
        self._read[warp, words] = clock[warp]

    def begin_write(self, clock: np.ndarray, words: np.ndarray) -> None:
        """Begins an asynchronous write; until it ends, the words hold anything."""
        self._check_written(clock, words)
        self._check_read(clock, words)
        self._is_arriving[words] = True
        self.bytes.view(np.uint32)[words] = 0xFFFFFFFF

    def end_write(self, agent: int, phase: int, words: np.ndarray) -> None:
        """Ends an asynchronous write, as a phase of a barrier tells."""
        self._is_arriving[words] = False
        self._is_unfenced[words] = False
        self._writer[words] = agent
        self._written[words] = phase
