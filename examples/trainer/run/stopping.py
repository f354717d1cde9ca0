"""Ctrl-C, SIGTERM and SIGHUP end training after a step, so that it can be saved."""

import os
import signal
import stat
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

Handler = Callable[[int, types.FrameType | None], object] | int | None
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CONTINUE, STOP, FAILED = range(3)


class StopRequest:
    """True when training should stop; a second signal stops at once.

    All processes must leave the loop at the same step, so each casts a vote before a
    step and reads the outcome after having started it: nobody waits for the others.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Handler] = {}
        self._outcome: Int[Array, ""] | int = CONTINUE

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._receive) for s in signals_to_stop()}
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
        if number == signal.SIGHUP:
            _leave_terminal()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def vote(self, *, failed: bool) -> None:
        """Casts the vote of this process on the step after the one about to start."""
        own = FAILED if failed else STOP if self._asked else CONTINUE
        self._outcome = own if jax.process_count() == 1 else _gather(own)

    @property
    def has_failed(self) -> bool:
        """Whether a process voted that it has failed."""
        return int(self._outcome) == FAILED

    def __bool__(self) -> bool:
        if jax.process_count() == 1 and self._asked:
            return True
        return int(self._outcome) != CONTINUE


def signals_to_stop() -> tuple[signal.Signals, ...]:
    """The signals that end training; not SIGHUP where `nohup` has switched it off."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return SIGNALS[:-1] if ignored else SIGNALS


def _leave_terminal() -> None:
    """Writes no more to a terminal, which may be gone: that would be an error."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        if stat.S_ISCHR(os.fstat(output).st_mode):
            os.dup2(nothing, output)
    os.close(nothing)


def _gather(vote: int) -> Int[Array, ""]:
    """The largest vote of all processes, computed on the devices without waiting."""
    mesh = Mesh(np.array(jax.devices()), ("all",))
    votes = jax.make_array_from_callback(
        (jax.device_count(),),
        NamedSharding(mesh, P("all")),
        lambda index: np.full(1, vote, np.int32),
    )
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))(votes)
