"""What goes wrong ends in one clear message, and leaves the last checkpoint alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint import Checkpoints
from errors import TrainingError
from metrics import MetricsLog, Record, check, read_records
from train_tpu import main

SCRIPT = Path(__file__).parents[2] / "examples" / "train_tpu.py"
GOOD: Record = {"num_invalid_targets": 0.0, "total_loss": 1.0, "grad_norm": 1.0}


def with_steps(tiny: list[str], steps: int) -> list[str]:
    at = tiny.index("--steps") + 1
    return [*tiny[:at], str(steps), *tiny[at + 1 :]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_cleanly(
    tiny: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    arguments = [*with_steps(tiny, 1_000_000), "--out", str(tmp_path)]
    environment = dict(os.environ, XLA_FLAGS="", JAX_PLATFORMS="cpu")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count("\n") >= 3:
            break
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    step = Checkpoints(tmp_path / "checkpoints", keep=2).latest()
    assert step is not None
    assert step >= 3
    assert f"stopped and saved at step {step}" in out
    assert read_records(log)[-1]["step"] == step
    assert main([*with_steps(tiny, step + 1), "--out", str(tmp_path)]) == 0
    steps = [record["step"] for record in read_records(log)]
    assert steps == list(range(1, step + 2))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_and_an_older_checkpoint_goes_on(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*tiny, "--out", str(tmp_path), "--checkpoint-every", "3"]
    assert main(arguments) == 0
    newest = tmp_path / "checkpoints" / "step_00000006"
    files = [path for path in newest.rglob("*") if path.is_file()]
    flip_a_bit(max(files, key=lambda path: path.stat().st_size))
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "step_00000006 is damaged" in message
    assert "go on from step 3" in message
    assert (tmp_path / "checkpoints" / "step_00000003").exists()
    newest.rename(tmp_path / "aside")
    assert main(arguments) == 0


@pytest.mark.parametrize("name", ["data.json", "sha256.json", "state/_METADATA"])
def test_every_file_of_a_checkpoint_is_covered(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arguments = [*with_steps(tiny, 1), "--out", str(tmp_path)]
    assert main(arguments) == 0
    damaged = tmp_path / "checkpoints" / "step_00000001" / name
    flip_a_bit(damaged)
    assert main(arguments) == 1
    assert "is damaged" in capsys.readouterr().err
    damaged.unlink()
    assert main(arguments) == 1
    assert "is damaged" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The rate of step 1 is the peak over two; of step 2 on, everything has overflowed.
    flags = ["--learning-rate", "1e38", "--checkpoint-every", "1"]
    assert main([*tiny, "--out", str(tmp_path), *flags]) == 1
    assert "lower --learning-rate" in capsys.readouterr().err
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.latest() == 1
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_invalid_targets": 2.0}, "step 7: 2 targets lie outside"),
        ({"total_loss": float("nan")}, "total_loss is nan"),
        ({"grad_norm": float("inf")}, "grad_norm is inf"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(change: Record, message: str) -> None:
    check(7, GOOD)
    with pytest.raises(TrainingError, match=message):
        check(7, GOOD | change)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "/nowhere/text.txt"], "no such file or folder: /nowhere/text.txt"),
        (["--loss-config", "/nowhere/loss.json"], "cannot read --loss-config"),
        (["--loss.label-smoothing", "2"], "label_smoothing"),
        (["--vocab-size", "100"], "--vocab-size must be at least 257"),
    ],
)
def test_mistakes_on_the_command_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert main(["--out", str(tmp_path / "run"), *flags]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert not (tmp_path / "run").exists()


def test_checkpoints_without_a_config_are_not_trusted(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*with_steps(tiny, 1), "--out", str(tmp_path)]
    assert main(arguments) == 0
    (tmp_path / "config.json").unlink()
    assert main(arguments) == 1
    assert "no config.json" in capsys.readouterr().err


def test_a_log_damaged_in_its_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 0.1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(TrainingError, match="line 2"):
        MetricsLog(tmp_path, 3, is_writer=True)
