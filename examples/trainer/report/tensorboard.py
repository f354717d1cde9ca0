"""TensorBoard events, written at once by the thread that has them.

tensorboardX's own `SummaryWriter` writes in a thread, and on a full disk that thread
dies and the run waits for it for ever.
"""

import contextlib
import os
import time
from pathlib import Path

from google.protobuf.message import Message
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from trainer.files import writing
from trainer.report.metrics import Record

# Made when the modules are loaded, which no type checker sees.
Event, SessionLog = vars(event_pb2)["Event"], vars(event_pb2)["SessionLog"]
Summary = vars(summary_pb2)["Summary"]


class Board:
    """The events of one session.

    Args:
      folder: where TensorBoard looks.
      start: the step that the run resumes from; later events, which a killed run may
        have left, are hidden.
    """

    def __init__(self, folder: Path, start: int) -> None:
        self._folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Two sessions may begin within the second that names the file.
            suffix = f".{time.time_ns()}.{os.getpid()}"
            self._writer = EventsWriter(str(folder / "events"), suffix)
        begin = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=start + 1, session_log=begin))

    def write(self, step: int, record: Record) -> None:
        """Adds the numbers of one step."""
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
        ]
        self._write(
            Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        )

    def _write(self, event: Message) -> None:
        with writing(self._folder):
            self._writer.write_event(event)
            self._writer.flush()

    def close(self) -> None:
        """Closes the file; errors in writing have been reported before."""
        with contextlib.suppress(OSError):
            self._writer.close()
