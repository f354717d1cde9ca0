"""Several real processes train as one: the same numbers, one writer, one end."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from rich.console import Console
from run_helpers import (
    EXAMPLES,
    assert_close,
    count_lines,
    environment,
    start,
    wait_until,
    with_flags,
)
from texts import make_text

from train_tpu import Run, main
from trainer.errors import TrainingError
from trainer.model.language_model import loss_inputs
from trainer.model.layers import Batch
from trainer.report.metrics import read_records
from trainer.run import launch_local
from trainer.run.checkpoint import Checkpoints
from trainer.run.devices import RowShare, make_mesh
from trainer.run.processes import join_pod
from trainer.run.settings import parse_settings

FLAGS = ("--batch-size", "8", "--microbatches", "2", "--checkpoint-every", "3")


@pytest.fixture
def uneven(tiny: list[str], tmp_path: Path) -> list[str]:
    """A run whose rows differ in how many tokens they count for a term.

    Short and long documents alternate; a document's last tokens have no later ones to
    predict.
    """
    folder = tmp_path / "uneven"
    folder.mkdir()
    for number in range(90):
        words = 60 if number % 9 == 0 else 1 + number % 3
        (folder / f"{number:02d}.txt").write_text(make_text(words, seed=number))
    return with_flags(tiny, "--data", str(folder))


def run_all(
    tiny: list[str],
    out: Path,
    programs: Path,
    *flags: str,
    devices: int = 1,
    processes: int = 1,
) -> str:
    """Runs to the end; returns what the terminal showed."""
    arguments = with_flags(tiny, "--out", str(out), *FLAGS, *flags)
    process = start(arguments, programs, devices, processes)
    screen, _ = process.communicate(timeout=560)
    assert process.returncode == 0, screen
    return screen


def names_of(out: Path) -> list[str]:
    """The files of a run, but for what orbax keeps inside a checkpoint."""
    names = (path.relative_to(out).as_posix() for path in out.rglob("*"))
    kept = [name for name in names if "/state/" not in name]
    return sorted(name.partition(".out.tfevents")[0] for name in kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [
        (2, 1, "data=2"),
        (2, 2, "data=2,tensor=2"),
        (2, 1, "tensor=2"),
        (4, 1, "data=4"),
        (4, 1, "data=2,tensor=2"),
    ],
)
def test_processes_produce_the_metrics_of_one(
    uneven: list[str],
    tmp_path: Path,
    programs: Path,
    processes: int,
    devices: int,
    mesh: str,
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    flags = ("--sample-tokens", "3", "--prompt", "al")
    run_all(uneven, alone, programs, *flags)
    screen = run_all(
        uneven,
        together,
        programs,
        "--mesh",
        mesh,
        *flags,
        devices=devices,
        processes=processes,
    )
    for name in ("metrics.jsonl", "heldout.jsonl"):
        expected, found = read_records(alone / name), read_records(together / name)
        assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert names_of(together) == names_of(alone)
    assert screen.count("step 6/6") == 1
    assert "sample" in screen


def test_a_mean_per_process_would_be_seen(uneven: list[str], tmp_path: Path) -> None:
    arguments = [*uneven, "--out", str(tmp_path / "run")]
    run = Run(*parse_settings(arguments), console=Console(quiet=True))

    @jax.jit
    def total(batch: Batch) -> jax.Array:
        inputs = loss_inputs(run.model, run.state.params, batch, None)
        return run.loss_fn(run.state.loss, **inputs)[0]

    differences: list[float] = []
    for _ in range(6):
        batch = run.share.put(next(run.batches))
        halves = [Batch(*(x[part] for x in batch)) for part in (slice(2), slice(2, 4))]
        mean = (float(total(halves[0])) + float(total(halves[1]))) / 2
        whole = float(total(batch))
        differences.append(abs(mean - whole) / whole)
    assert max(differences) > 1e-4


def test_each_process_reads_the_rows_of_its_devices() -> None:
    share = RowShare(make_mesh("data=4,tensor=2", 8), 8)
    assert share.row_ids == list(range(8)), "all devices are here"


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(
    tiny: list[str], tmp_path: Path, programs: Path
) -> None:
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    run_all(tiny, alone, programs)
    run_all(tiny, moved, programs, "--steps", "2")
    run_all(tiny, moved, programs, "--steps", "4", "--mesh", "data=2", processes=2)
    run_all(tiny, moved, programs)
    found = read_records(moved / "metrics.jsonl")
    assert_close(found, read_records(alone / "metrics.jsonl"), rtol=1e-5, atol=1e-6)


def begin_pair(
    tiny: list[str], out: Path, programs: Path
) -> tuple[subprocess.Popen[str], list[int]]:
    """Starts two processes; returns when they train, with their ids by number."""
    flags = ("--steps", "1000000", "--mesh", "data=2", "--checkpoint-every", "5")
    arguments = with_flags(tiny, "--out", str(out), *flags)
    launcher = start(arguments, programs, processes=2)
    log = out / "metrics.jsonl"
    before = count_lines(log)
    wait_until(lambda: count_lines(log) >= before + 12, launcher)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher.pid)],
        capture_output=True,
        text=True,
        check=True,
    )
    return launcher, sorted(int(line) for line in children.stdout.split())


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_saves(
    tiny: list[str], tmp_path: Path, programs: Path
) -> None:
    launcher, children = begin_pair(tiny, tmp_path, programs)
    os.kill(children[1], signal.SIGTERM)
    screen, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, screen
    step = Checkpoints(tmp_path / "checkpoints", keep=2).latest()
    assert step is not None
    assert f"stopped and saved at step {step}" in screen
    steps = [record["step"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, step + 1))
    # The launcher passes a signal on, too.
    launcher, _ = begin_pair(tiny, tmp_path, programs)
    launcher.send_signal(signal.SIGINT)
    screen, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, screen
    assert "stopped and saved" in screen


@pytest.mark.slow
def test_a_signal_before_training_ends_all(
    tiny: list[str], tmp_path: Path, programs: Path
) -> None:
    arguments = with_flags(tiny, "--out", str(tmp_path), "--mesh", "data=2")
    launcher = start(arguments, programs, processes=2)
    wait_until(lambda: (tmp_path / "config.json").exists(), launcher)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_process_ends_all(
    tiny: list[str], tmp_path: Path, programs: Path, victim: int
) -> None:
    launcher, children = begin_pair(tiny, tmp_path, programs)
    os.kill(children[victim], signal.SIGKILL)
    screen, _ = launcher.communicate(timeout=60)
    assert launcher.returncode in (137, 1), screen
    assert "Traceback" not in screen
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    latest = Checkpoints(tmp_path / "checkpoints", keep=2).latest()
    steps = str(latest)
    assert main(with_flags(tiny, "--out", str(tmp_path), "--steps", steps)) == 0


@pytest.mark.slow
def test_data_that_fail_mid_run_stop_all_processes_with_everything_saved(
    tiny: list[str], tmp_path: Path, programs: Path
) -> None:
    cache = ("--cache", str(tmp_path / "cache"))
    launcher, _ = begin_pair([*with_flags(tiny, *cache)], tmp_path / "run", programs)
    (stream,) = (tmp_path / "cache").rglob("tokens.bin")
    os.truncate(stream, 400)
    screen, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    # The first process says why, whichever of the two found out.
    assert re.search(r"^error: process \d: .* has shrunk below", screen, re.MULTILINE)
    assert "Traceback" not in screen
    step = Checkpoints(tmp_path / "run" / "checkpoints", keep=2).latest()
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["step"] == step


def start_by_hand(
    arguments: list[list[str]], programs: Path, **changes: str
) -> list[subprocess.CompletedProcess[str]]:
    """Starts one process per list of arguments, without the launcher."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(EXAMPLES / "train_tpu.py"), *own],
            env=environment(programs)
            | {"JAX_NUM_PROCESSES": str(len(arguments)), "JAX_PROCESS_ID": str(index)}
            | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, own in enumerate(arguments)
    ]
    ends = [process.communicate(timeout=120) for process in processes]
    return [
        subprocess.CompletedProcess([], process.returncode, *end)
        for process, end in zip(processes, ends, strict=True)
    ]


def test_an_address_that_is_missing_says_so(
    tiny: list[str], programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (end,) = start_by_hand([tiny], programs)
    assert end.returncode == 1
    assert end.stderr.startswith("error: JAX_NUM_PROCESSES and JAX_PROCESS_ID without")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(TrainingError, match="JAX_PROCESS_ID must be a number, got 'o"):
        join_pod()


def test_processes_with_other_settings_are_refused(
    tiny: list[str], tmp_path: Path, programs: Path
) -> None:
    flags = [with_flags(tiny, "--out", str(tmp_path), "--seed", s) for s in "01"]
    ends = start_by_hand(flags, programs, JAX_COORDINATOR_ADDRESS=free_address())
    assert any("the same settings" in end.stderr for end in ends)
    assert all(end.returncode != 0 for end in ends)
    assert not (tmp_path / "metrics.jsonl").exists()


def free_address() -> str:
    with launch_local.socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


@pytest.mark.parametrize("arguments", [[], ["two"], ["0"]])
def test_the_launcher_wants_a_number(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch_local.main(arguments) == 2
    assert "number of processes" in capsys.readouterr().err


def test_the_launcher_returns_the_code_of_the_first_that_fails(
    programs: Path,
) -> None:
    end = subprocess.run(
        [sys.executable, launch_local.__file__, "2", "--steps", "0"],
        env=environment(programs),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert end.returncode == 1
    said = end.stdout + end.stderr
    assert "--steps must be at least 1" in said
    assert "process 0 failed" in said or "process 1 failed" in said
