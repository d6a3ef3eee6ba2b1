"""Files fetched into the cache in the background, a bounded distance ahead of their readers in other processes."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gmscale.errors import RunError, UsageError

# Downloads at once: one connection is seldom as fast as the network.
_AT_ONCE = 4
_POLL = 0.2


@dataclass
class _Copy:
    path: Path
    before: int | None
    """When it was last asked for before this began; None if it was not there."""
    size: int | None = None
    """Bytes; None until it is there."""
    own: int | None = None
    """The time of use that fetching it ahead has left."""

    def reached(self) -> bool:
        """Whether a reader has asked for it, or it is gone."""
        return self.own is not None and _used(self.path) != self.own

    def overtaken(self) -> bool:
        """Whether a reader has asked for it before it could be fetched ahead."""
        return _used(self.path) not in (self.before, None)


class Prefetch:
    """Fetches `names` in their order, until at most `ahead` bytes wait to be read.

    What tells where the readers are is the time of use of the copies at `paths`: one that was asked for again has
    been reached, and so have those before it. Failures end it, for the reader will meet them as well, and is the
    one to say so.
    """

    def __init__(
        self, fetch: Callable[[str], Path], names: Sequence[str], paths: Sequence[Path], ahead: float
    ) -> None:
        self._fetch, self._names, self._paths, self._ahead = fetch, names, paths, ahead
        self._stopped = threading.Event()
        self._free = threading.Semaphore(_AT_ONCE)
        threading.Thread(target=self._run, name="prefetch", daemon=True).start()

    def stop(self) -> None:
        """Begin no more downloads."""
        self._stopped.set()

    def _run(self) -> None:
        copies = [_Copy(path, _used(path)) for path in self._paths]
        waiting: list[_Copy] = []
        for name, copy in zip(self._names, copies, strict=True):
            while not self._stopped.is_set():
                if copy.overtaken():
                    waiting = []
                else:
                    passed = max((place for place, one in enumerate(waiting, 1) if one.reached()), default=0)
                    waiting = waiting[passed:]
                if self._fits(waiting):
                    break
                self._stopped.wait(_POLL)
            if copy.overtaken():
                continue
            self._free.acquire()
            if self._stopped.is_set():
                return
            waiting.append(copy)
            threading.Thread(target=self._bring, args=(name, copy), name="prefetch", daemon=True).start()

    def _fits(self, waiting: Sequence[_Copy]) -> bool:
        """Whether one more may be fetched, if it is as large as the largest."""
        if not waiting:
            return True
        sizes = [one.size for one in waiting if one.size is not None]
        return bool(sizes) and sum(sizes) + max(sizes) * (len(waiting) - len(sizes) + 1) <= self._ahead

    def _bring(self, name: str, copy: _Copy) -> None:
        try:
            status = self._fetch(name).stat()
            copy.size, copy.own = status.st_size, status.st_mtime_ns
        except (UsageError, RunError, OSError):
            self._stopped.set()
        finally:
            self._free.release()


def _used(path: Path) -> int | None:
    """Return when a copy was last asked for, None where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
