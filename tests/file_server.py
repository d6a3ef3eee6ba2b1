"""Servers over loopback that fail on demand: plain HTTP, and as much of S3 as reading takes."""

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class Request(NamedTuple):
    path: str
    """With its query."""
    first: int
    """The byte asked for with Range, else 0."""
    authorization: str | None


class FileServer(ThreadingHTTPServer):
    """Serves `files` by path and keeps the `requests`. A fault is a function that answers a request in its own way
    and returns True, or False once it has nothing more to spoil."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Callable[[_Handler, bytes], bool]] = []
        self.ranges = self.tags = True
        self.sent = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, path: str) -> list[int]:
        """Return the bytes from which a file was asked for, in order."""
        return [request.first for request in self.requests if urlsplit(request.path).path == path]

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.first = int(asked[1]) if asked and self.server.ranges else 0
        request = Request(self.path, int(asked[1]) if asked else 0, self.headers.get("Authorization"))
        self.server.requests.append(request)
        content = self.server.files.get(unquote(urlsplit(self.path).path))
        for fault in list(self.server.faults):
            if fault(self, content or b""):
                return
        if content is None:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        elif "If-Match" in self.headers and self.headers["If-Match"] != tag(content):
            self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        else:
            self.send_file(content)

    def send_file(self, content: bytes, until: int | None = None, pause: float = 0) -> None:
        """Send the part asked for, but break off before the byte `until` or pause after each 64 KiB."""
        ranged = "Range" in self.headers and self.server.ranges
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {self.first}-{len(content) - 1}/{len(content)}")
        if self.server.tags:
            self.send_header("ETag", tag(content))
            self.send_header("Last-Modified", formatdate(0, usegmt=True))
        self.send_header("Content-Length", str(len(content) - self.first))
        self.end_headers()
        end = len(content) if until is None else until
        for start in range(self.first, end, 1 << 16):
            piece = content[start : min(start + (1 << 16), end)]
            self.wfile.write(piece)
            self.server.sent += len(piece)
            time.sleep(pause)
        if until is not None:
            # What was written arrives before the connection breaks.
            time.sleep(0.05)
            self.close_connection = True

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


Handler = _Handler


def tag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


@contextmanager
def serve() -> Iterator[FileServer]:
    server = FileServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def times(count: int, fault: Callable[[_Handler, bytes], None]) -> Callable[[_Handler, bytes], bool]:
    """Return a fault that spoils the next `count` requests."""
    left = [None] * count

    def spoil(handler: _Handler, content: bytes) -> bool:
        try:
            left.pop()
        except IndexError:
            return False
        fault(handler, content)
        return True

    return spoil


def break_at(byte: int) -> Callable[[_Handler, bytes], None]:
    """Close the connection before a byte of the file."""
    return lambda handler, content: handler.send_file(content, until=byte)


def status(code: int, body: bytes = b"", **headers: str) -> Callable[[_Handler, bytes], None]:
    return lambda handler, content: handler.answer(code, body, **headers)
