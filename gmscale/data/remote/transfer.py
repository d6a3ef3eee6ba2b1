"""Files from http(s) and S3 servers, through the sessions of fsspec and s3fs; broken transfers are resumed.

A transfer runs in a thread and an event loop of its own, and nothing of it is kept afterwards. So a process may
fork while one runs: the thread's frames, and with them loop and sockets, are lost in the child but never finalised
there. fsspec's shared loop and cached sessions have no such safety: finalised in a child they take the parent's
sockets out of the epoll set that both share.
"""

import asyncio
import queue
import random
import threading
import time
from collections.abc import Generator
from contextlib import closing, suppress

from gmscale.data.remote.servers import CHUNK, Address, Answer, PassingError, Version, send_http, send_s3
from gmscale.errors import RunError, UsageError

# Chunks that have arrived and wait to be taken.
_WAITING = 4

ATTEMPTS = 5
BACKOFF = 0.5
"""Seconds before the second attempt; they double from one to the next."""
_LONGEST_PAUSE = 60.0


def check_installed(address: Address) -> None:
    """Import what transfers from `address` take: now, for a process that forks during an import may hang."""
    try:
        if address.scheme == "s3":
            import s3fs  # noqa: F401
        else:
            import fsspec.implementations.http  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"data.source {address} needs the package {error.name}: pip install 'gmscale[remote]'"
        ) from None


def receive(
    address: Address, start: int = 0, version: Version | None = None
) -> Generator[Answer | bytes, None, None]:
    """Yield a file's bytes in chunks of at most CHUNK, and an Answer before them whenever a connection was made.

    They begin at `start` if the server can and still has `version`, else at 0; so also after each broken
    connection. Raises MissingFileError, UsageError for what another attempt cannot help, and RunError after
    ATTEMPTS without progress.
    """
    position = furthest = start
    failures = 0
    while True:
        try:
            resume = position if version and version.tag and version.size else 0
            with closing(_stream(address, resume, version)) as stream:
                for item in stream:
                    if isinstance(item, Answer):
                        position, version = item
                    else:
                        position += len(item)
                    yield item
            if version and version.size not in (None, position):
                raise PassingError(f"ended after {position} of {version.size} bytes")
            return
        except PassingError as problem:
            # A server that sends a little more each time gets on.
            failures = 1 if position - furthest >= CHUNK else failures + 1
            furthest = max(furthest, position)
            if failures >= ATTEMPTS:
                raise RunError(f"{address}: {problem}, at the last of {ATTEMPTS} attempts") from None
            # Not from the generators that a run's results depend on.
            spread = random.SystemRandom().uniform(0.5, 1)
            time.sleep(min(max(BACKOFF * 2 ** (failures - 1) * spread, problem.pause), _LONGEST_PAUSE))


def _stream(address: Address, start: int, version: Version | None) -> Generator[Answer | bytes, None, None]:
    """Yield what one connection brings."""
    items: queue.Queue[Answer | bytes | Exception | None] = queue.Queue(_WAITING)
    # Not an Event: its lock could be held when the process forks, and this generator be closed in the child.
    stopped: list[bool] = []

    def put(item: Answer | bytes | Exception | None) -> None:
        while not stopped:
            try:
                return items.put(item, timeout=0.2)
            except queue.Full:
                continue
        raise asyncio.CancelledError

    def transfer() -> None:
        with suppress(asyncio.CancelledError):
            try:
                send = send_s3 if address.scheme == "s3" else send_http
                asyncio.run(send(address, start, version, put))
                put(None)
            except Exception as error:
                put(error)

    threading.Thread(target=transfer, name=f"transfer of {address}", daemon=True).start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stopped.append(True)
