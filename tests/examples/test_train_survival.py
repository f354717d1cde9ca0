"""Kills, full disks and vanished data: nothing is lost, and what ends says why."""

import contextlib
import json
import math
import os
import random
import shutil
import subprocess
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from rich.console import Console
from run_helpers import (
    assert_close,
    checkpoint,
    count_lines,
    start,
    train,
    wait_until,
    with_flags,
    without_seconds,
)

from train_tpu import Run, main
from trainer.report.metrics import Record, read_records
from trainer.run import checkpoint as checkpoint_module
from trainer.run.checkpoint import DELETED, PARTIAL, Checkpoints
from trainer.run.settings import parse_settings

KILLS = 20
STEPS = 240


def assert_same_run(found: Path, expected: Path, step: int) -> None:
    """The two folders hold the same run, to the bit."""
    chex.assert_trees_all_equal(checkpoint(found, step), checkpoint(expected, step))
    for name in ("metrics.jsonl", "heldout.jsonl"):
        records = read_records(expected / name)
        assert without_seconds(read_records(found / name)) == without_seconds(records)
    assert not list(found.rglob(PARTIAL))
    assert not list(found.rglob(DELETED))
    assert not list(found.rglob("*.part"))


class Killer:
    """Kills a run at a moment of some kind, drawn from a seed."""

    def __init__(self, out: Path, seed: int) -> None:
        self._out = out
        self._draw = random.Random(seed)
        self.inside_writes = 0

    def strike(self, process: subprocess.Popen[str], kind: str) -> None:
        begun = time.time()
        log = self._out / "metrics.jsonl"
        saved = Checkpoints(self._out / "checkpoints", keep=2).latest() or 0
        goal = saved + self._draw.randint(1, 9)

        def is_training() -> bool:
            return log.exists() and log.stat().st_mtime > begun

        def is_writing() -> bool:
            return any((self._out / "checkpoints").glob(PARTIAL))

        if kind == "startup":
            time.sleep(self._draw.uniform(0, 4))
        elif kind == "step":
            wait_until(lambda: is_training() and count_lines(log) >= goal, process)
        else:
            wait_until(lambda: is_training() and is_writing(), process)
        time.sleep(self._draw.uniform(0, 0.06))
        assert process.poll() is None, process.communicate()[0]
        process.kill()
        process.communicate()
        self.inside_writes += is_writing()


@pytest.mark.slow
def test_twenty_kills_change_nothing(
    tiny: list[str], tmp_path: Path, programs: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ("--steps", str(STEPS), "--checkpoint-every", "4")
    process = start(with_flags(tiny, *flags, "--out", str(whole)), programs)
    screen, _ = process.communicate(timeout=400)
    assert process.returncode == 0, screen
    arguments = with_flags(tiny, *flags, "--out", str(killed))
    kinds = ["startup"] * 2 + ["step"] * 8 + ["write"] * (KILLS - 10)
    random.Random(0).shuffle(kinds)
    killer = Killer(killed, seed=1)
    for kind in kinds:
        killer.strike(start(arguments, programs), kind)
    assert killer.inside_writes >= 5
    process = start(arguments, programs)
    screen, _ = process.communicate(timeout=400)
    assert process.returncode == 0, screen
    assert_same_run(killed, whole, STEPS)


@pytest.mark.slow
def test_what_a_kill_leaves_behind_is_cleared_away(
    tiny: list[str], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(tiny, whole)
    train(tiny, killed, "--steps", "3")
    # Killed while it removed step 1, wrote step 4, and added held-out metrics.
    for name in (f"{DELETED}/step_00000001", "step_00000004.orbax-checkpoint-tmp"):
        rest = killed / "checkpoints" / name / "state"
        rest.mkdir(parents=True)
        (rest / "half").write_text("x")
    with (killed / "heldout.jsonl").open("a") as file:
        file.write('{"step": 6, "nl')
    train(tiny, killed)
    heldout = (killed / "heldout.jsonl").read_text().splitlines()
    assert json.loads(heldout[-1])["step"] == 6
    kept = {path.name for path in (killed / "checkpoints").iterdir()}
    assert kept == {"step_00000003", "step_00000006"}


def test_a_checkpoint_is_whole_only_after_its_lines_are_written(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[int, int]] = []
    write = checkpoint_module.write_manifest

    def look_and_write(folder: Path, ignored: Collection[str]) -> None:
        step = int(folder.name.partition(".")[0].removeprefix("step_"))
        written.append((step, count_lines(tmp_path / "metrics.jsonl")))
        write(folder, ignored)

    monkeypatch.setattr(checkpoint_module, "write_manifest", look_and_write)
    train(tiny, tmp_path, "--checkpoint-every", "2")
    assert [step for step, _ in written] == [2, 4, 6]
    assert all(lines >= step for step, lines in written)


@pytest.mark.slow
def test_a_checkpoint_moves_from_eight_devices_to_a_grid_to_one(
    tiny: list[str], tmp_path: Path
) -> None:
    stays, moves = tmp_path / "stays", tmp_path / "moves"
    flags = ("--batch-size", "8", "--keep", "9")
    train(tiny, stays, *flags, "--mesh", "data=8", "--steps", "3")
    shutil.copytree(stays, moves)
    expected = train(tiny, stays, *flags, "--mesh", "data=8", "--steps", "5")
    for step, mesh in ((3, "data=4,tensor=2"), (4, "data=1")):
        wanted = with_flags(tiny, *flags, "--mesh", mesh, "--steps", str(step + 1))
        arguments = [*wanted, "--out", str(moves)]
        run = Run(*parse_settings(arguments), Console(quiet=True))
        state, _ = checkpoint(moves, step)
        restored = jax.tree.leaves(jax.tree.map(np.asarray, run.state))
        chex.assert_trees_all_equal(
            sorted(map(digest, restored)), sorted(map(digest, jax.tree.leaves(state)))
        )
        assert main(arguments) == 0
    found = read_records(moves / "metrics.jsonl")
    assert_close(with_logs(found), with_logs(expected), rtol=1e-6, atol=1e-7)


def with_logs(records: list[Record]) -> list[Record]:
    """A relative error of exp(nll) is an absolute one of nll, so back to that."""
    return [r | {"perplexity": math.log(r["perplexity"])} for r in records]


def digest(leaf: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    array = np.asarray(leaf)
    return str(array.dtype), array.shape, array.tobytes()


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A real file system of a given size."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.mark.parametrize("notices", [True, False])
@pytest.mark.parametrize("free", [pytest.param(40, marks=pytest.mark.slow), 1200])
def test_a_full_disk_loses_nothing(
    tiny: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    notices: bool,
) -> None:
    # Space for some log lines alone; for one checkpoint. That a second one does not fit
    # is seen before, or, as under a quota, only when it is written.
    if not notices:
        plenty = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)
    flags = ("--checkpoint-every", "2", "--keep", "9")
    train(tiny, tmp_path / "whole", *flags)
    with small_disk(tmp_path / "disk", free) as disk:
        out = disk / "run"
        arguments = with_flags(tiny, *flags, "--out", str(out))
        capfd.readouterr()
        assert main(arguments) == 1
        message = capfd.readouterr().err
        assert message.startswith("error: cannot write ")
        assert "No space left on device" in message
        assert message.count("\n") == 1
        saved = Checkpoints(out / "checkpoints", keep=9).latest()
        assert saved == {40: None, 1200: 2}[free]
        remount(disk, "size=64m")
        assert main(arguments) == 0
        assert_same_run(out, tmp_path / "whole", 6)


def test_a_disk_that_became_read_only_says_so(
    tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", 20_000) as disk:
        train(tiny, disk / "run", "--steps", "2")
        remount(disk, "ro")
        arguments = with_flags(tiny, "--out", str(disk / "run"), "--steps", "3")
        capfd.readouterr()
        assert main(arguments) == 1
        message = capfd.readouterr().err
        assert message.startswith("error: cannot write ")
        assert "Read-only file system" in message
        remount(disk, "rw")
        assert main(arguments) == 0


@pytest.mark.parametrize("flag", ["--out", "--cache"])
def test_a_folder_that_cannot_be_made_says_so(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    (tmp_path / "file").write_text("")
    wanted = str(tmp_path / "file" / "folder")
    arguments = with_flags(tiny, "--out", str(tmp_path / "run"))
    assert main(with_flags(arguments, flag, wanted)) == 1
    message = capsys.readouterr().err
    assert f"error: cannot write {wanted}" in message
    assert "Not a directory" in message


def test_text_that_changed_between_sessions_says_so(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "text", tmp_path / "run"
    shutil.copytree(tiny[tiny.index("--data") + 1], data)
    flags = ("--data", str(data))
    train(tiny, out, *flags, "--steps", "2")
    arguments = with_flags(tiny, *flags, "--out", str(out))
    for change, message in (
        (lambda: os.truncate(data / "03.txt", 100), "is not that of the run"),
        (lambda: (data / "03.txt").unlink(), "is not that of the run"),
        (lambda: shutil.rmtree(data), "no such file or folder"),
    ):
        change()
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
        assert Checkpoints(out / "checkpoints", keep=2).latest() == 2
    shutil.copytree(tiny[tiny.index("--data") + 1], data)
    assert main(arguments) == 0


@pytest.mark.slow
def test_a_stream_that_shrinks_mid_run_stops_with_everything_saved(
    tiny: list[str], tmp_path: Path, programs: Path
) -> None:
    flags = ("--cache", str(tmp_path / "cache"), "--steps", "1000000")
    whole, out = tmp_path / "whole", tmp_path / "run"
    process = start(with_flags(tiny, *flags, "--out", str(out)), programs)
    wait_until(lambda: count_lines(out / "metrics.jsonl") >= 3, process)
    (stream,) = (tmp_path / "cache").rglob("tokens.bin")
    os.truncate(stream, 400)
    screen, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in screen
    (line,) = [line for line in screen.splitlines() if line.startswith("error: ")]
    assert f"cannot read {stream}: it has shrunk below" in line
    step = Checkpoints(out / "checkpoints", keep=2).latest()
    assert step is not None
    assert read_records(out / "metrics.jsonl")[-1]["step"] == step
    # The stream is made again, and the run is the one that had no such trouble.
    more = ("--steps", str(step + 2))
    train(tiny, out, *flags[:2], *more)
    train(tiny, whole, *more)
    assert_close(
        read_records(out / "metrics.jsonl"),
        read_records(whole / "metrics.jsonl"),
        rtol=1e-4,
    )


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_named(
    tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    train(tiny, small, "--steps", "1")
    wide = ("--model.width", "64", "--steps", "1")
    train(tiny, large, *wide)
    shutil.rmtree(large / "checkpoints")
    shutil.copytree(small / "checkpoints", large / "checkpoints")
    capfd.readouterr()
    assert main(with_flags(tiny, *wide, "--out", str(large))) == 1
    message = capfd.readouterr().err
    assert "is of another model: " in message
    assert "there and float32[" in message
    assert message.count("\n") == 1
