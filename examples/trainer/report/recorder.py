"""Records the metrics of each step: checks, the log, TensorBoard, the screen."""

import contextlib
import types

from rich.console import Console

from trainer.report.metrics import Metrics, MetricsLog
from trainer.report.progress import ProgressReport
from trainer.report.tensorboard import Board
from trainer.run.guard import SkipGuard, check_targets
from trainer.run.processes import is_first
from trainer.run.settings import Settings


class Recorder:
    """Takes the metrics of one session's steps, in order.

    Args:
      settings: of the run.
      start: the step that the session begins after.
      console: for the progress.

    Attributes:
      is_skipping: whether the last step was skipped.
    """

    def __init__(self, settings: Settings, start: int, console: Console) -> None:
        out, self._settings = settings.out, settings
        self._tokens = settings.batch_size * settings.sequence_length
        self._console = console
        self._log = MetricsLog(out / "metrics.jsonl", start, is_first())
        self._board = Board(out / "tensorboard", start) if is_first() else None
        self._progress = ProgressReport(console, start, settings.steps, self._tokens)
        self._guard = SkipGuard(settings.max_skipped_steps)
        self._open = contextlib.ExitStack()
        self.is_skipping = False

    def __enter__(self) -> "Recorder":
        self._open.callback(self._log.close)
        if self._board is not None:
            self._open.callback(self._board.close)
        self._open.enter_context(self._progress)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._open.close()

    def settle(self, step: int, metrics: Metrics | None) -> None:
        """Waits for a step's metrics, checks and logs them; None does nothing.

        Raises:
          TrainingError: the run cannot continue after this step.
        """
        if metrics is None:
            return
        record = metrics.fetch()
        check_targets(step, record)
        settings = self._settings
        if step % settings.log_every == 0 or step == settings.steps:
            self._log.write(step, step * self._tokens, record)
            if self._board is not None:
                self._board.write(step, record)
        self.is_skipping = record["skipped_in_a_row"] > 0
        warning = self._guard.check(step, record)
        if warning is not None:
            self._console.print(warning, style="yellow", highlight=False, markup=False)
        self._progress.show(step, self._log.seconds(), record)
