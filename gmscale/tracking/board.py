"""TensorBoard's event files, written in this thread: an error shows at once, and no torn event stays."""

import io
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from gmscale.tracking.appending import Appender

_VERSION = "brain.Event:2"  # of the format, the first event of every file


class Board:
    """Writes scalars for TensorBoard into a new file, which hides what others in `folder` hold after a step."""

    def __init__(self, folder: Path, resume_step: int, warn: Callable[[str], None]) -> None:
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        start = SessionLog(status=SessionLog.START)
        header = _framed(Event(wall_time=time.time(), file_version=_VERSION))
        header += _framed(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))
        self._file = Appender(folder / name, warn, header)

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Write values by tag."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        if values:
            self._file.append(_framed(Event(wall_time=time.time(), step=step, summary=Summary(value=values))))

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _framed(event: Event) -> bytes:
    """Return an event as a record with its length and checksums."""
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
