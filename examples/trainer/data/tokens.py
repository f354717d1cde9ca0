"""The token stream: int32 in one file, read piece by piece when it is needed."""

import os
import weakref
from pathlib import Path
from typing import Protocol

import numpy as np

from trainer.errors import TrainingError

DTYPE = np.dtype("<i4")


class Tokens(Protocol):
    """A stream of token ids, in memory or in a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, piece: slice, /) -> np.ndarray: ...


class TokenFile:
    """Token ids in a file; a slice reads its own bytes and no others.

    The file is read rather than mapped: should it shrink while in use, a read comes
    back short and can say so, where a mapping would kill the process.

    Raises:
      TrainingError: the file cannot be read, or has become shorter.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise self._unreadable(str(error)) from error
        weakref.finalize(self, os.close, self._handle)
        self._count = os.fstat(self._handle).st_size // DTYPE.itemsize

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, piece: slice) -> np.ndarray:
        start, stop, _ = piece.indices(self._count)
        size = max(0, stop - start) * DTYPE.itemsize
        try:
            raw = os.pread(self._handle, size, start * DTYPE.itemsize)
        except OSError as error:
            raise self._unreadable(str(error)) from error
        if len(raw) < size:
            raise self._unreadable(f"it has shrunk below {self._count} tokens")
        return np.frombuffer(raw, DTYPE).astype(np.int32, copy=False)

    def _unreadable(self, reason: str) -> TrainingError:
        return TrainingError(
            f"cannot read {self._path}: {reason}; the same command makes that file "
            "again from --data and resumes from the last checkpoint"
        )


def tokens_to_bytes(pieces: list[np.ndarray]) -> bytes:
    """Returns the content of a token file."""
    return np.concatenate(pieces).astype(DTYPE).tobytes()
