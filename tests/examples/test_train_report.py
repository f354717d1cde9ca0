"""Metrics on their way from the device to files, curves and the screen."""

import errno
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from trainer.errors import TrainingError
from trainer.report.metrics import Metrics, MetricsLog, Record, read_records
from trainer.report.plot import group_names, plot_losses
from trainer.report.progress import ProgressReport
from trainer.report.summary import show_table
from trainer.report.tensorboard import Board


def make_records(steps: int) -> list[Record]:
    return [
        {
            "step": step,
            "tokens": 10 * step,
            "seconds": 0.1 * step,
            "total_loss": 7.0 / step,
            "nll": 6.0 / step,
            "mtp_loss": 0.1,
            "mtp_head_losses_1": 1.0 / step,
            "temperature": 1.0,
            "something_new": 0.5,
            "perplexity": 100.0 / step,
        }
        for step in range(1, steps + 1)
    ]


def test_metrics_travel_as_one_vector_with_their_names() -> None:
    packed = jax.jit(Metrics.pack)({"a": jnp.array(1), "b": jnp.array([2.0, 3.0])})
    assert packed.fetch() == {"a": 1.0, "b_1": 2.0, "b_2": 3.0}
    assert len(jax.tree.leaves(packed)) == 1


def test_the_log_goes_on_from_a_step_and_a_time(tmp_path: Path) -> None:
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = MetricsLog(tmp_path / "metrics.jsonl", start, is_writer=True)
        for step in steps:
            log.write(step, 10 * step, {"loss": float(start)})
        log.close()
    records = read_records(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in records] == [(1, 0), (2, 0), (3, 2), (4, 2)]
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)


def test_only_the_first_host_writes(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, is_writer=False)
    log.write(1, 10, {"loss": 1.0})
    log.close()
    assert not list(tmp_path.iterdir())


def test_a_board_on_a_full_disk_names_itself_and_closes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Board(tmp_path, 0)
    board.write(1, {"loss": 1.0})

    def refuse() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(board._writer, "flush", refuse)
        with pytest.raises(TrainingError, match=f"write {tmp_path}: No space left"):
            board.write(2, {"loss": 1.0})
        # A second complaint would hide the first.
        board.close()
    board.close()


def test_every_term_has_a_panel_and_only_one() -> None:
    names = ["total_loss", "main_loss", "main_primary_loss", "mtp_head_losses_1"]
    names += ["moe_cv", "something_new", "temperature"]
    panels = group_names(names)
    assert sorted(name for group in panels.values() for name in group) == sorted(names)
    assert panels["Loss"] == ["total_loss", "main_loss"]
    assert panels["Adaptive multi-token"] == ["main_primary_loss"]
    assert panels["something_new"] == ["something_new"]


@pytest.mark.parametrize("steps", [1, 5, 300])
def test_curves_are_drawn_for_any_length(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "losses.png"
    heldout = [{"step": 0, "nll": 7.0}]
    plot_losses(make_records(steps), heldout, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_a_terminal_there_are_few_plain_lines() -> None:
    screen = io.StringIO()
    records = make_records(100)
    with ProgressReport(Console(file=screen, width=200), 0, 100, 64) as progress:
        for record in records:
            progress.show(int(record["step"]), record["seconds"], record)
    lines = screen.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[0].startswith("step 5/100")
    assert "loss 1.400" in lines[0]
    assert "\x1b" not in screen.getvalue()


def test_the_lines_say_how_fast_the_last_steps_were() -> None:
    screen = io.StringIO()
    report = ProgressReport(Console(file=screen, width=200), 0, 4, 1000)
    with report as progress:
        for step, seconds in enumerate((30.0, 30.5, 31.0, 35.0), start=1):
            progress.show(step, seconds, {"total_loss": 1.0})
    rates = [
        line.partition("tokens/s")[0].split()[-1:]
        for line in screen.getvalue().splitlines()
    ]
    assert "tokens/s" not in screen.getvalue().splitlines()[0], "that was compiling"
    assert rates[1:] == [["2,000"], ["2,000"], ["250"]]


def test_a_terminal_gets_a_bar() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with ProgressReport(console, 0, 4, 64) as progress:
        for record in make_records(4):
            progress.show(int(record["step"]), record["seconds"], record)
    assert "4/4" in screen.getvalue()


def test_the_table_shows_first_and_last() -> None:
    screen = io.StringIO()
    heldout = [
        {"step": 0, "nll": 5.5, "accuracy": 0.01},
        {"step": 7, "nll": 2.5, "accuracy": 0.42},
    ]
    show_table(Console(file=screen, width=100), make_records(7), heldout)
    lines = screen.getvalue().splitlines()
    (total,) = [line for line in lines if "total_loss" in line]
    assert "7" in total.split()
    assert "1" in total.split()
    (held,) = [line for line in lines if "held-out accuracy" in line]
    assert "0.01" in held
    assert "0.42" in held
