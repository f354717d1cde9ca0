"""Starts the trainer as several processes on this machine.

    python -m trainer.run.launch_local 2 --preset demo --mesh data=2

The first argument is the number of processes, the others go to train_tpu.py. Process 0
writes to the terminal; what the others say is kept, and shown if one of them is the
first to fail. Ctrl-C, SIGTERM and SIGHUP are passed on. Exit code: that of the first
process that fails, which ends the others too.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "train_tpu.py"
SECONDS_TO_END = 20.0
SHOWN_LINES = 20


def start(count: int, arguments: Sequence[str], logs: Path) -> list[subprocess.Popen]:
    """Starts the processes; they find each other through their environment."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    processes: list[subprocess.Popen] = []
    for index in range(count):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
            # Of the GPUs, if there are any, one each.
            "JAX_LOCAL_DEVICE_IDS": str(index),
        }
        with ExitStack() as stack:
            log = stack.enter_context(log_of(logs, index).open("w")) if index else None
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), *arguments],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT if log else None,
                # Ctrl-C reaches them once, through this process.
                process_group=0,
            )
        processes.append(process)
    return processes


def wait(processes: Sequence[subprocess.Popen]) -> tuple[int, int]:
    """Returns which process failed first and its exit code; 0 and 0 if none did."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [index for index, code in enumerate(codes) if code]
        if failed:
            code = processes[failed[0]].returncode
            return failed[0], code if code > 0 else 128 - code
        if None not in codes:
            return 0, 0
        time.sleep(0.1)


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Gives the processes time to exit, then kills them."""
    deadline = time.monotonic() + SECONDS_TO_END
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def log_of(logs: Path, index: int) -> Path:
    """Where process `index` writes."""
    return logs / f"process_{index}.log"


def main(arguments: Sequence[str]) -> int:
    """Runs the processes; returns the exit code."""
    if not arguments or not arguments[0].isdecimal() or int(arguments[0]) < 1:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="ava_jax_") as folder:
        logs = Path(folder)
        processes = start(int(arguments[0]), arguments[1:], logs)

        def pass_on(number: int, frame: types.FrameType | None) -> None:
            for process in processes:
                process.send_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # `nohup` has SIGHUP ignored.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, pass_on)
        try:
            first, code = wait(processes)
        finally:
            end(processes)
        if code and first > 0:
            lines = log_of(logs, first).read_text(errors="replace").splitlines()
            print(f"process {first} failed:", *lines[-SHOWN_LINES:], sep="\n  ")
        elif code:
            print(f"process 0 failed (exit code {code}): what it said is above")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
