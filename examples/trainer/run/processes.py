"""Multi-process runs: joining, agreeing, waiting, and ending together."""

import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from trainer.errors import TrainingError

ADDRESS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
MESSAGE_BYTES = 1024


def join_pod() -> None:
    """Connects the processes of a pod or cluster; does nothing for a single process.

    TPU pods, Slurm, Open MPI and others are recognised by JAX. Elsewhere, set
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process.

    Raises:
      TrainingError: some of the three are set and the others cannot be found out, or
        the processes do not find each other.
    """
    given = [name for name in ADDRESS if name in os.environ]
    # Its handler would swallow a SIGTERM that comes before training.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        count, own = (_number(name) for name in ADDRESS[1:])
        jax.distributed.initialize(num_processes=count, process_id=own)
    except ValueError as error:
        if not given:
            # JAX found no cluster around it: one process owns every device.
            return
        raise TrainingError(
            f"{' and '.join(given)} without a process group to join ({error}): set "
            f"{', '.join(ADDRESS)} for every process, or none of them"
        ) from error
    except RuntimeError as error:
        raise TrainingError(f"the processes do not find each other: {error}") from error


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise ValueError(f"{name} must be a number, got {text!r}")
    return None if text is None else int(text)


def run_to_the_end(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Joins the other processes, runs `main` on the command line, and exits.

    An orderly exit waits for the other processes. After an error they may be waiting
    for this one, so then it exits at once, which ends them too.
    """
    try:
        join_pod()
        code = main(sys.argv[1:])
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    if code and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_first(decide: Callable[[], int]) -> int:
    """Returns the first process's answer on every process.

    Raises:
      TrainingError: the first process raised one; the others refer to its message.
    """
    if jax.process_count() == 1:
        return decide()
    answer, error = 0, None
    if is_first():
        try:
            answer = decide()
        except TrainingError as refusal:
            error = refusal
    said = np.array([error is not None, answer], np.int32)
    failed, answer = multihost_utils.broadcast_one_to_all(said).tolist()
    if error is not None:
        raise error
    if failed:
        raise TrainingError("the first process stopped, and says why")
    return answer


def first_failure(failure: TrainingError | None) -> TrainingError:
    """Returns the failure of the first process that has one; all must call it.

    Gathered, because the process that knows may be ended before it speaks.
    """
    if failure is not None and jax.process_count() == 1:
        return failure
    own = str(failure or "").encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    everyone = multihost_utils.process_allgather(np.frombuffer(own, np.uint8))
    for index, row in enumerate(np.atleast_2d(everyone)):
        if message := row.tobytes().rstrip(b"\0").decode(errors="replace"):
            return TrainingError(f"process {index}: {message}")
    return TrainingError("no process has failed")


def check_same(parts: Mapping[str, str]) -> None:
    """Refuses to start if processes were given different arguments.

    Args:
      parts: texts that must be equal everywhere, under names for the message.

    Raises:
      TrainingError: some are not; it is raised on every process.
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(text.encode()).digest() for text in parts.values()]
    own = np.frombuffer(b"".join(digests), np.uint32).reshape(len(parts), -1)
    everyone = multihost_utils.process_allgather(own)
    for index, name in enumerate(parts):
        differs = np.any(everyone[:, index] != everyone[0, index], axis=-1)
        if differs.any():
            others = ", ".join(map(str, np.flatnonzero(differs)))
            raise TrainingError(
                f"processes must have the same {name}, but those of process {others} "
                "are not those of process 0"
            )
