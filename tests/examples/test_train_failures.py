"""What goes wrong ends in one clear message, and leaves the last checkpoint alone."""

import shutil
import signal
from pathlib import Path

import pytest
from run_helpers import count_lines, start, wait_until, with_flags

from train_tpu import main
from trainer.errors import TrainingError
from trainer.report.metrics import MetricsLog, read_records
from trainer.report.run_files import read_run
from trainer.run import checkpoint, launch_local
from trainer.run.checkpoint import DELETED, Checkpoints


def with_steps(tiny: list[str], steps: int) -> list[str]:
    return with_flags(tiny, "--steps", str(steps))


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_exits_cleanly(
    tiny: list[str], tmp_path: Path, programs: Path, number: signal.Signals
) -> None:
    arguments = [*with_steps(tiny, 1_000_000), "--out", str(tmp_path)]
    process = start(arguments, programs)
    log = tmp_path / "metrics.jsonl"
    wait_until(lambda: count_lines(log) >= 3, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    step = Checkpoints(tmp_path / "checkpoints", keep=2).latest()
    assert step is not None
    assert step >= 3
    assert f"stopped and saved at step {step}" in out
    assert read_records(log)[-1]["step"] == step
    assert main([*with_steps(tiny, step + 1), "--out", str(tmp_path)]) == 0
    steps = [record["step"] for record in read_records(log)]
    assert steps == list(range(1, step + 2))


def test_a_second_trainer_is_refused_and_the_first_goes_on(
    tiny: list[str],
    tmp_path: Path,
    programs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*with_steps(tiny, 1_000_000), "--out", str(tmp_path)]
    first = start(arguments, programs)
    log = tmp_path / "metrics.jsonl"
    wait_until(lambda: count_lines(log) >= 3, first)
    assert main(arguments) == 1
    assert f"another trainer is at work on --out {tmp_path}" in capsys.readouterr().err
    lines = count_lines(log)
    wait_until(lambda: count_lines(log) >= lines + 3, first)
    assert first.poll() is None, "the first was ended"
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 0, out
    # Nothing of a process that was killed stands in the way of the next one.
    step = int(read_records(log)[-1]["step"])
    first = start(with_flags(arguments, "--checkpoint-every", "1"), programs)
    wait_until(lambda: count_lines(log) >= step + 3, first)
    first.kill()
    first.communicate(timeout=60)
    latest = Checkpoints(tmp_path / "checkpoints", keep=2).latest()
    assert latest is not None
    assert main(with_flags(arguments, "--steps", str(latest + 1))) == 0


def test_the_launcher_names_process_0_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch_local, "start", lambda *given: [])
    monkeypatch.setattr(launch_local, "wait", lambda processes: (0, 137))
    monkeypatch.setattr(launch_local.signal, "signal", lambda *given: None)
    assert launch_local.main(["2"]) == 137
    assert "process 0 failed (exit code 137)" in capsys.readouterr().out


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_and_an_older_checkpoint_resumes(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*tiny, "--out", str(tmp_path), "--checkpoint-every", "3"]
    assert main(arguments) == 0
    newest = tmp_path / "checkpoints" / "step_00000006"
    files = [path for path in newest.rglob("*") if path.is_file()]
    flip_a_bit(max(files, key=lambda path: path.stat().st_size))
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "step_00000006 is corrupt" in message
    assert "resume from step 3" in message
    assert (tmp_path / "checkpoints" / "step_00000003").exists()
    newest.rename(tmp_path / "aside")
    assert main(arguments) == 0


def test_the_checkpoint_that_is_offered_is_a_valid_one(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint-every", "1", "--steps", "4", "--keep", "9"]
    arguments = with_flags(tiny, "--out", str(tmp_path), *flags)
    assert main(arguments) == 0
    folders = [tmp_path / "checkpoints" / f"step_{step:08d}" for step in range(1, 5)]
    for folder in folders[2:]:
        flip_a_bit(folder / "data" / "metadata")
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert f"delete {folders[3]} and {folders[2]} to resume from step 2" in message
    for folder in folders[:2]:
        flip_a_bit(folder / "state" / "_METADATA")
    assert main(arguments) == 1
    assert "no valid older one" in capsys.readouterr().err


def test_only_folders_set_aside_are_removed(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []
    remove = shutil.rmtree

    def note_and_remove(path: Path, ignore_errors: bool = False) -> None:
        removed.append(Path(path).name)
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", note_and_remove)
    flags = ["--checkpoint-every", "1", "--keep", "1"]
    assert main(with_flags(tiny, "--out", str(tmp_path), *flags)) == 0
    assert removed == [DELETED] * 5


@pytest.mark.parametrize("name", ["data/metadata", "sha256.json", "state/_METADATA"])
def test_every_file_of_a_checkpoint_is_covered(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arguments = [*with_steps(tiny, 1), "--out", str(tmp_path)]
    assert main(arguments) == 0
    corrupt = tmp_path / "checkpoints" / "step_00000001" / name
    flip_a_bit(corrupt)
    assert main(arguments) == 1
    assert "is corrupt" in capsys.readouterr().err
    corrupt.unlink()
    assert main(arguments) == 1
    assert "is corrupt" in capsys.readouterr().err


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


def test_a_log_corrupt_in_its_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 0.1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(TrainingError, match="line 2"):
        MetricsLog(path, 3, is_writer=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1}', "has no step"),
        ('{"step": null, "seconds": 1}', "has no step"),
        ('{"step": "x"}', "step must be a number"),
        ('{"step": 1' + "0" * 400 + "}", "step must be a number"),
        ('{"step": 1}', "has no seconds"),
        ("[" * 200_000, "line 1: not JSON"),
        ("5", "needs an object"),
    ],
)
def test_a_line_that_is_no_record_is_named(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'\ufeff{line}\n{{"step": 2, "seconds": 3}}\n', "utf-8")
    with pytest.raises(TrainingError, match=message) as caught:
        MetricsLog(path, start=2, is_writer=True)
    assert str(path) in str(caught.value)
    if "seconds" not in message:
        with pytest.raises(TrainingError, match=message):
            read_records(path)


@pytest.mark.parametrize("content", ["[" * 200_000, "[]", '{"settings": 1}'])
def test_a_record_of_a_run_that_is_none_is_named(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    assert main([*tiny, "--out", str(tmp_path)]) == 1
    assert f"{path} is corrupt" in capsys.readouterr().err
    with pytest.raises(TrainingError, match=str(path)):
        read_run(tmp_path)


def test_a_deeply_nested_loss_is_named(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("loss.json", "loss.yaml"):
        path = tmp_path / name
        path.write_text("[" * 20_000)
        assert main(with_flags(tiny, "--loss-config", str(path))) == 1
        assert f"--loss-config {path} does not parse" in capsys.readouterr().err
