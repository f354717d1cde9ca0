"""Ctrl-C and SIGTERM end training after the step under way, so that it can be saved."""

import signal
import types
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

Handler = Callable[[int, types.FrameType | None], object] | int | None
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Says whether somebody asked to stop; a second signal stops at once."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._receive) for s in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        self._asked = True
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        if jax.process_count() == 1:
            return self._asked
        # All hosts of a pod must leave the loop at the same step.
        asked = multihost_utils.process_allgather(np.array(self._asked))
        return bool(np.any(asked))
