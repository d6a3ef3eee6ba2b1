"""Remote files arrive complete or not at all, once a node, whatever the server and the other processes do."""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import signal
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import file_server
import numpy as np
import pytest
from file_server import FileServer, break_at, status, times
from hypothesis import given, settings
from hypothesis import strategies as st

from gmscale.data.config import DataConfig
from gmscale.data.faults import ShardError
from gmscale.data.index import open_index, read
from gmscale.data.remote import cache, transfer
from gmscale.data.remote.directory import RemoteDirectory
from gmscale.data.remote.servers import MissingFileError
from gmscale.data.source import open_split
from gmscale.data.tars.writer import write_shard
from gmscale.errors import RunError, UsageError

CONTENT = np.random.default_rng(0).bytes(3_000_000)
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BACKOFF", 0.002)
    monkeypatch.setattr(cache, "POLL", 0.01)
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server.serve() as server:
        yield server


@pytest.fixture
def directory(server: FileServer, tmp_path: Path) -> RemoteDirectory:
    return RemoteDirectory(f"{server.address}/d", tmp_path / "cache", 1.0)


def tar(*contents: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number, content in enumerate(contents):
            member = tarfile.TarInfo(f"{number:04}.jpg")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files(directory: RemoteDirectory) -> dict[str, int]:
    """Return names, without their hashes, and sizes of all but locks in the cache."""
    sizes = {}
    for file in directory._cache.folder.glob("*"):
        # Another process may just have renamed it.
        with suppress(FileNotFoundError):
            if not file.name.endswith(".lock"):
                sizes[file.name.partition("-")[2]] = file.stat().st_size
    return sizes


def run(*tasks: Callable[[], Any]) -> list[int | None]:
    """Run each task in a forked process of its own; return the exit statuses."""
    processes = [FORK.Process(target=task) for task in tasks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    return [process.exitcode for process in processes]


def test_a_file_is_fetched_once(server: FileServer, directory: RemoteDirectory) -> None:
    server.files["/d/part one/a.tar"] = tar(CONTENT)
    path = directory.fetch("part one/a.tar")
    assert path.read_bytes() == tar(CONTENT)
    assert directory.fetch("part one/a.tar") == path
    assert pickle.loads(pickle.dumps(directory)).fetch("part one/a.tar") == path
    assert len(server.requests) == 1
    assert directory.writable() is None


def test_equal_names_in_different_directories_do_not_meet(server: FileServer, tmp_path: Path) -> None:
    addresses = [f"{server.address}/{rest}" for rest in ("d", "e", "d?version=2", "d/")]
    for path in ("/d", "/e"):
        server.files[f"{path}/a.tar"] = tar(path.encode())
    paths = [RemoteDirectory(address, tmp_path, 1.0).fetch("a.tar") for address in addresses]
    assert len(set(paths)) == 3
    assert paths[0] == paths[3]
    assert paths[1].read_bytes() == tar(b"/e")


def test_credentials_and_query_reach_the_server_and_nobody_else(server: FileServer, tmp_path: Path) -> None:
    address = server.address.replace("//", "//user:se%2Fcret@")
    directory = RemoteDirectory(f"{address}/d?X-Sig=a%2Fb%3D&t=se,cret", tmp_path, 1.0)
    server.files["/d/a.tar"] = tar(CONTENT)
    path = directory.fetch("a.tar")
    assert server.requests[0].path == "/d/a.tar?X-Sig=a%2Fb%3D&t=se,cret"
    assert server.requests[0].authorization == "Basic dXNlcjpzZS9jcmV0"
    server.faults = [times(1, status(403))]
    with pytest.raises(UsageError) as refused:
        directory.fetch("b.tar")
    server.faults = [times(99, status(500))]
    with pytest.raises(RunError) as broken:
        directory.fetch("b.tar")
    said = [str(directory), repr(directory._address), str(refused.value), str(broken.value), path.name]
    said += [file.read_text() for file in tmp_path.glob(".*.lock")]
    assert not any(secret in text for text in said for secret in ("cret", "X-Sig", "user"))
    assert str(directory) == f"{server.address}/d"


@pytest.mark.parametrize("break_byte", [0, 1, 1_000_000, 2_999_999])
def test_a_broken_download_goes_on_where_it_broke(
    server: FileServer, directory: RemoteDirectory, break_byte: int
) -> None:
    server.files["/d/a.bin"] = CONTENT
    server.faults = [times(1, break_at(break_byte))]
    assert directory.fetch("a.bin", size=len(CONTENT)).read_bytes() == CONTENT
    assert server.asked("/d/a.bin") == [0, break_byte]


def test_many_breaks_are_survived_while_bytes_arrive(server: FileServer, directory: RemoteDirectory) -> None:
    content = CONTENT * 4
    server.files["/d/a.bin"] = content
    server.faults = [
        times(99, lambda handler, data: handler.send_file(data, min(handler.first + 1_500_000, len(data))))
    ]
    assert directory.fetch("a.bin", sha256=sha256(content)).read_bytes() == content
    assert server.asked("/d/a.bin") == list(range(0, len(content), 1_500_000))


@pytest.mark.parametrize("lacks", ["ranges", "tags"])
def test_without_ranges_or_tags_it_starts_again(server: FileServer, directory: RemoteDirectory, lacks: str) -> None:
    setattr(server, lacks, False)
    server.files["/d/a.tar"] = tar(CONTENT)
    server.faults = [times(2, break_at(1_000_000))]
    assert directory.fetch("a.tar").read_bytes() == tar(CONTENT)
    assert server.asked("/d/a.tar") == ([0] * 3 if lacks == "tags" else [0, 1_000_000, 1_000_000])


def test_what_changed_on_the_server_starts_again(server: FileServer, directory: RemoteDirectory) -> None:
    old, new = CONTENT, CONTENT[::-1]
    server.files["/d/a.bin"] = old

    def change(handler: file_server.Handler, content: bytes) -> None:
        handler.send_file(content, until=1_000_000)
        server.files["/d/a.bin"] = new

    server.faults = [times(1, change)]
    assert directory.fetch("a.bin", size=len(new)).read_bytes() == new
    assert server.asked("/d/a.bin") == [0, 1_000_000, 0]


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503])
def test_a_busy_server_is_asked_again(server: FileServer, directory: RemoteDirectory, code: int) -> None:
    server.files["/d/a.tar"] = tar(CONTENT)
    server.faults = [times(2, status(code, Retry_After="0"))]
    assert directory.fetch("a.tar").read_bytes() == tar(CONTENT)
    assert len(server.requests) == 3


def test_the_server_says_how_long_to_wait(server: FileServer, directory: RemoteDirectory) -> None:
    server.files["/d/a.tar"] = tar(CONTENT)
    server.faults = [times(1, status(429, Retry_After="1"))]
    begun = time.monotonic()
    directory.fetch("a.tar")
    assert time.monotonic() - begun >= 1


def test_five_failures_are_enough(server: FileServer, directory: RemoteDirectory) -> None:
    server.faults = [times(99, status(503))]
    with pytest.raises(RunError, match=r"/d/a\.tar: the server answered 503 .* 5 attempts$"):
        directory.fetch("a.tar")
    assert len(server.requests) == 5


def test_nobody_listens(tmp_path: Path) -> None:
    with file_server.serve() as server:
        address = server.address
    with pytest.raises(RunError, match=r"a\.tar: the connection failed \(Connect.*5 attempts$"):
        RemoteDirectory(address, tmp_path, 1.0).fetch("a.tar")


def test_what_is_not_there_is_said_at_once(server: FileServer, directory: RemoteDirectory) -> None:
    for attempt in (directory.fetch, directory.open):
        with pytest.raises(FileNotFoundError, match=r"/d/a\.tar does not exist: .* 404"):
            attempt("a.tar")
    with pytest.raises(UsageError) as missing:
        directory.fetch("a.tar")
    assert isinstance(missing.value, MissingFileError)
    assert missing.value.errno == errno.ENOENT
    assert len(server.requests) == 3
    assert list(directory._cache.folder.iterdir()) == []


@pytest.mark.parametrize("code", [400, 401, 403, 204])
def test_a_refusal_is_final(server: FileServer, directory: RemoteDirectory, code: int) -> None:
    server.faults = [times(99, status(code))]
    with pytest.raises(UsageError, match=rf"/d/a\.tar: .* {code} "):
        directory.fetch("a.tar")
    assert len(server.requests) == 1


def test_a_server_that_has_no_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no server of that name"):
        RemoteDirectory("http://nowhere.invalid/d", tmp_path, 1.0).fetch("a.tar")


def test_redirects_lead_to_http_only(server: FileServer, directory: RemoteDirectory, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(CONTENT))
    server.faults = [times(1, status(302, Location=f"file://{tmp_path}/a.tar"))]
    with pytest.raises(UsageError, match="redirected"):
        directory.fetch("a.tar")
    server.files["/e/a.tar"] = tar(CONTENT)
    server.faults = [times(1, status(302, Location="/e/a.tar"))]
    assert directory.fetch("a.tar").read_bytes() == tar(CONTENT)


PAGE = b"<!DOCTYPE html><title>Sign in</title>" + b" " * 1000


def test_an_error_page_is_not_a_shard(server: FileServer, directory: RemoteDirectory) -> None:
    server.files["/d/a.tar"] = tar(CONTENT)
    server.faults = [times(1, status(200, PAGE))]
    assert directory.fetch("a.tar").read_bytes() == tar(CONTENT)
    server.faults = [times(2, status(200, PAGE))]
    with pytest.raises(ShardError, match=r"/d/b\.tar: .*HTML") as bad:
        directory.fetch("b.tar")
    assert bad.value.fault.reason == "not a tar"
    assert set(files(directory)) == {"a.tar"}


def test_half_a_shard_of_unknown_size_is_found_out(server: FileServer, directory: RemoteDirectory) -> None:
    content = tar(CONTENT[:200_000], CONTENT[:100_000])

    def without_length(handler: file_server.Handler, content: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(content[: server.sent or None])

    server.files["/d/a.tar"] = content
    server.faults = [times(1, without_length)]
    assert directory.fetch("a.tar").read_bytes() == content
    server.files["/d/b.tar"] = content
    server.sent = 250_000
    server.faults = [times(9, without_length)]
    with pytest.raises(ShardError) as bad:
        directory.fetch("b.tar")
    assert bad.value.fault.reason == "truncated shard"


def test_another_hash_or_size_is_fetched_once_more(server: FileServer, directory: RemoteDirectory) -> None:
    content, wrong = tar(CONTENT), tar(CONTENT[::-1])
    for name, known in (("a.tar", {"sha256": sha256(content)}), ("b.tar", {"size": len(content)})):
        server.files[f"/d/{name}"] = content
        server.faults = [times(1, lambda handler, _: handler.send_file(wrong[: 10240 + len(handler.path)]))]
        assert directory.fetch(name, **known).read_bytes() == content
    server.files["/d/c.tar"] = wrong
    server.faults = []
    with pytest.raises(ShardError) as bad:
        directory.fetch("c.tar", size=len(wrong), sha256=sha256(content))
    assert bad.value.fault.reason == "wrong hash"
    assert sha256(content) in str(bad.value)
    assert sha256(wrong) in str(bad.value)
    with pytest.raises(ShardError, match=f"{len(wrong)} bytes, _info.json says 7$"):
        directory.fetch("c.tar", size=7)
    assert server.asked("/d/c.tar") == [0] * 4
    assert set(files(directory)) == {"a.tar", "b.tar"}


def test_a_copy_of_something_else_is_replaced(server: FileServer, directory: RemoteDirectory) -> None:
    old, new = tar(CONTENT), tar(CONTENT[::-1])
    server.files["/d/a.tar"] = old
    directory.fetch("a.tar")
    server.files["/d/a.tar"] = new
    assert directory.fetch("a.tar").read_bytes() == old
    assert directory.fetch("a.tar", sha256=sha256(old)).read_bytes() == old
    assert directory.fetch("a.tar", size=len(new), sha256=sha256(new)).read_bytes() == new
    assert len(server.requests) == 2


def test_what_is_not_a_shard_is_compared_with_the_server(server: FileServer, directory: RemoteDirectory) -> None:
    server.files["/d/_info.json"] = b"{}" * 100
    path = directory.fetch("_info.json")
    inode = path.stat().st_ino
    assert directory.fetch("_info.json").stat().st_ino == inode
    server.files["/d/_info.json"] = b"[]" * 100
    assert directory.fetch("_info.json").read_bytes() == b"[]" * 100
    assert len(server.requests) == 3


def test_the_processes_of_a_node_make_one_copy(server: FileServer, directory: RemoteDirectory) -> None:
    server.files["/d/a.tar"] = tar(CONTENT)
    server.faults = [times(1, lambda handler, data: handler.send_file(data, pause=0.005))]

    def fetch() -> None:
        assert directory.fetch("a.tar").read_bytes() == tar(CONTENT)

    assert run(*[fetch] * 8) == [0] * 8
    assert len(server.requests) == 1


def test_a_killed_download_is_taken_over(server: FileServer, directory: RemoteDirectory) -> None:
    server.files["/d/a.bin"] = CONTENT
    server.faults = [times(1, lambda handler, data: handler.send_file(data, pause=0.02))]
    process = FORK.Process(target=directory.fetch, args=("a.bin",), kwargs={"size": len(CONTENT)})
    process.start()
    wait_for(lambda: server.sent > 1_500_000)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    arrived = files(directory)["a.bin.part"]
    assert 0 < arrived < len(CONTENT)
    assert directory.fetch("a.bin", sha256=sha256(CONTENT)).read_bytes() == CONTENT
    assert server.asked("/d/a.bin") == [0, arrived]
    assert list(files(directory)) == ["a.bin"]


def test_a_child_does_not_keep_the_lock_of_its_killed_parent(
    server: FileServer, directory: RemoteDirectory, tmp_path: Path
) -> None:
    server.files["/d/a.bin"] = CONTENT
    server.faults = [times(1, lambda handler, data: handler.send_file(data, pause=0.02))]

    parent = os.fork()
    if not parent:
        threading.Thread(target=directory.fetch, args=("a.bin",), daemon=True).start()
        wait_for(lambda: any(files(directory).values()))
        child = os.fork()
        if child:
            (tmp_path / "child").write_text(str(child))
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(20)
        os._exit(0)
    assert os.waitpid(parent, 0)[1] == signal.SIGKILL
    begun = time.monotonic()
    try:
        assert directory.fetch("a.bin").read_bytes() == CONTENT
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert time.monotonic() - begun < 5


def test_who_waits_too_long_is_told_for_whom(
    server: FileServer, directory: RemoteDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PATIENCE", 0.2)
    server.files["/d/a.tar"] = tar(CONTENT)
    server.faults = [times(1, break_at(100_000))]
    process = FORK.Process(target=directory.fetch, args=("a.tar",))
    monkeypatch.setattr(transfer, "BACKOFF", 60)
    process.start()
    wait_for(lambda: any(files(directory).values()))
    with pytest.raises(RunError, match=rf"has not grown for 0 s; it is being fetched by process {process.pid} on "):
        directory.fetch("a.tar")
    process.kill()
    process.join()


def test_forked_processes_fetch_beside_their_parent(server: FileServer, directory: RemoteDirectory) -> None:
    """Before, during and after a transfer of the parent; none disturbs another."""
    names = [f"{number}.bin" for number in range(6)]
    for number, name in enumerate(names):
        server.files[f"/d/{name}"] = bytes([number]) + CONTENT
    directory.fetch(names[0], size=len(CONTENT) + 1)
    stream = directory.open(names[1])
    begin = stream.read(1000)
    server.faults = [times(6, lambda handler, data: handler.send_file(data, pause=0.005))]
    slow = threading.Thread(target=directory.fetch, args=(names[2],))
    slow.start()
    wait_for(lambda: "/d/2.bin" in [request.path for request in server.requests])

    def child(name: str) -> Callable[[], None]:
        def fetch() -> None:
            nonlocal stream
            del stream
            path = directory.fetch(name, size=len(CONTENT) + 1)
            assert path.read_bytes() == server.files[f"/d/{name}"]
            assert directory.open(names[1]).read() == server.files["/d/1.bin"]

        return fetch

    assert run(*[child(name) for name in names[2:]]) == [0] * 4
    slow.join()
    assert begin + stream.read() == server.files["/d/1.bin"]
    assert [server.asked(f"/d/{name}") for name in names[2:]] == [[0]] * 4


def megabytes(server: FileServer, count: int) -> list[str]:
    names = [f"{number}.tar" for number in range(count)]
    for number, name in enumerate(names):
        server.files[f"/d/{name}"] = tar(bytes([number]) * 1_000_000)
    return names


def test_the_longest_unused_go(server: FileServer, tmp_path: Path) -> None:
    names = megabytes(server, 6)
    directory = RemoteDirectory(f"{server.address}/d", tmp_path, 0.0031)
    foreign = tmp_path / "mine.tar"
    foreign.write_bytes(bytes(5_000_000))
    (tmp_path / ".mine.tar.part").write_bytes(b"mine")
    opened = directory.fetch(names[0]).open("rb")
    for name in (names[1], names[2], names[0], names[3], names[0], names[4]):
        directory.fetch(name)
        time.sleep(0.01)
    assert set(files(directory)) - {""} == {"0.tar", "3.tar", "4.tar"}
    directory.fetch(names[1])
    directory.fetch(names[2])
    assert set(files(directory)) - {""} == {"4.tar", "1.tar", "2.tar"}
    assert opened.read() == server.files["/d/0.tar"]
    assert foreign.stat().st_size == 5_000_000
    assert (tmp_path / ".mine.tar.part").exists()
    assert len(list(tmp_path.glob(".*.lock"))) == 3


def test_a_cache_that_is_too_small_is_the_users_to_change(server: FileServer, tmp_path: Path) -> None:
    server.files["/d/a.tar"] = tar(CONTENT)
    directory = RemoteDirectory(f"{server.address}/d", tmp_path, 0.001)
    with pytest.raises(
        UsageError, match=r"takes 0\.00301056 GB, data\.cache_gb is 0\.001; expected at least 0\.003"
    ):
        directory.fetch("a.tar")
    server.tags = False
    server.faults = [times(1, lambda handler, data: endless(handler))]
    with pytest.raises(UsageError, match=r"data\.cache_gb is 0\.001"):
        directory.fetch("b.bin")
    assert sum(files(directory).values()) <= 1_000_000


def endless(handler: file_server.Handler) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(bytes(1 << 20))


def test_parts_of_dead_downloads_go_in_the_end(
    server: FileServer, directory: RemoteDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/d/a.bin"] = server.files["/d/b.tar"] = tar(CONTENT)
    server.faults = [times(5, break_at(1_000_000))]
    monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    with pytest.raises(RunError):
        directory.fetch("a.bin")
    server.faults = []
    directory.fetch("b.tar")
    assert set(files(directory)) == {"a.bin.part", "b.tar"}
    (part,) = directory._cache.folder.glob(".*.part")
    os.utime(part, (0, time.time() - 2 * 24 * 3600))
    server.files["/d/c.tar"] = tar(CONTENT)
    directory.fetch("c.tar")
    assert set(files(directory)) == {"b.tar", "c.tar"}


def test_downloads_that_run_count_in_full(server: FileServer, tmp_path: Path) -> None:
    """Several processes at once do not each fill what is left."""
    names = megabytes(server, 6)
    directory = RemoteDirectory(f"{server.address}/d", tmp_path, 0.0045)
    for name in names[:3]:
        directory.fetch(name)
    server.faults = [times(3, lambda handler, data: handler.send_file(data, pause=0.02))]
    most = 0

    def watch() -> None:
        nonlocal most
        while len(server.requests) < 6 or "5.tar" not in files(directory):
            most = max(most, sum(files(directory).values()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    assert run(*[lambda name=name: directory.fetch(name) for name in names[3:]]) == [0] * 3
    watcher.join(5)
    assert most <= 4_500_000
    assert {"3.tar", "4.tar", "5.tar"} <= set(files(directory))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.booleans(), st.sampled_from(["", "break", "busy"])), max_size=25),
    st.integers(100, 400),
)
def test_no_sequence_of_fetches_breaks_the_bound(sequence: list[tuple[int, bool, str]], kilobytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder, file_server.serve() as server:
        directory = RemoteDirectory(f"{server.address}/d", Path(folder), kilobytes / 1e6)
        for number in range(8):
            server.files[f"/d/{number}.tar"] = tar(bytes([number]) * 10_000 * (number + 1))
        for number, known, trouble in sequence:
            content = server.files[f"/d/{number}.tar"]
            fault = {"": [], "break": [times(1, break_at(5000))], "busy": [times(1, status(503))]}[trouble]
            server.faults = list(fault)
            path = directory.fetch(f"{number}.tar", sha256=sha256(content) if known else None)
            assert path.read_bytes() == content
            assert sum(files(directory).values()) <= kilobytes * 1000
            assert path.name.partition("-")[2] in files(directory)


def test_files_are_fetched_ahead_in_their_order(server: FileServer, tmp_path: Path) -> None:
    names = megabytes(server, 12)
    directory = RemoteDirectory(f"{server.address}/d", tmp_path, 0.0094)
    reader = RemoteDirectory(f"{server.address}/d", tmp_path, 0.0094)
    order = [names[i] for i in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
    directory.prefetch(order)
    wait_for(lambda: len(server.requests) == 3)
    time.sleep(0.5)
    assert asked_for(server) == sorted(order[:3])
    for place, name in enumerate(order):
        wait_for(lambda place=place: len(server.requests) >= min(place + 3, 10))  # type: ignore[misc]
        assert asked_for(server) == sorted(order[: place + 3])
        assert reader.fetch(name).read_bytes() == server.files[f"/d/{name}"]
    assert asked_for(server) == sorted(order)


def asked_for(server: FileServer) -> list[str]:
    return sorted(request.path.removeprefix("/d/") for request in server.requests)


def test_a_reader_that_is_faster_is_not_waited_for(server: FileServer, tmp_path: Path) -> None:
    names = megabytes(server, 10)
    directory = RemoteDirectory(f"{server.address}/d", tmp_path, 0.0094)
    directory.prefetch(names)
    wait_for(lambda: len(server.requests) == 3)
    reader = RemoteDirectory(f"{server.address}/d", tmp_path, 0.0094)
    reader.fetch(names[3])
    reader.fetch(names[4])
    wait_for(lambda: len(server.requests) == 8)
    directory.prefetch(names[8:])
    wait_for(lambda: len(server.requests) == 10)
    assert asked_for(server) == names


def test_a_process_ends_while_it_fetches_ahead(server: FileServer, directory: RemoteDirectory) -> None:
    names = megabytes(server, 3)
    server.faults = [times(9, lambda handler, data: handler.send_file(data, pause=1))]

    def prefetch() -> None:
        directory.prefetch(names)
        wait_for(lambda: any(files(directory)))

    begun = time.monotonic()
    assert run(prefetch) == [0]
    assert time.monotonic() - begun < 5


def test_a_stream_goes_on_where_it_broke(server: FileServer, directory: RemoteDirectory) -> None:
    server.files["/d/a.bin"] = CONTENT
    for ranges in (True, False):
        server.ranges = ranges
        server.requests.clear()
        server.faults = [times(1, break_at(1_000_000)), times(1, break_at(1_100_000)), times(1, status(503))]
        with directory.open("a.bin") as file:
            assert file.read(10) + file.read(1_500_000) + file.read() == CONTENT
        assert server.asked("/d/a.bin") == [0, 1_000_000, 1_100_000, 1_100_000]
    assert not directory._cache.folder.exists()


def test_a_stream_that_changes_ends(server: FileServer, directory: RemoteDirectory) -> None:
    server.files["/d/a.bin"] = CONTENT

    def change(handler: file_server.Handler, content: bytes) -> None:
        handler.send_file(content, until=1_000_000)
        server.files["/d/a.bin"] = CONTENT[::-1]

    server.faults = [times(1, change)]
    with directory.open("a.bin") as file, pytest.raises(RunError, match="changed on its server"):
        file.read()


def test_a_stream_takes_no_more_memory_than_a_few_chunks(server: FileServer, directory: RemoteDirectory) -> None:
    content = bytes(40 << 20)
    server.files["/d/a.bin"] = content
    with directory.open("a.bin") as file:
        assert len(file.read(1 << 16)) == 1 << 16
        time.sleep(0.5)
        # Besides what waits in the kernel's buffers.
        assert server.sent < 20 << 20
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("transfer")])


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../a.tar", "a/../../b", "pipe:ls", "http://h/a.tar", "file:a", "a\\b", "a\nb"]
)
def test_names_lead_nowhere_else(directory: RemoteDirectory, name: str) -> None:
    for attempt in (directory.fetch, directory.open):
        with pytest.raises(UsageError, match=r"is not the name of a file within data\.source"):
            attempt(name)


@pytest.mark.parametrize(
    "address",
    [
        "http://",
        "https:///d",
        "http://h:x/d",
        "http://[::1/d",
        "ftp://h/d",
        "s3://k:secret@b/d",
        "s3://b/d?secret",
        "s3://",
        "http://h/#d",
    ],
)
def test_addresses_are_checked(address: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^data\.source .*expected http://HOST/DIRECTORY") as wrong:
        RemoteDirectory(address, tmp_path, 1.0)
    assert "secret" not in str(wrong.value)


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UsageError, match=r"s3://b/d needs the package s3fs: pip install 'gmscale\[remote\]'$"):
        RemoteDirectory("s3://b/d", tmp_path, 1.0)


def test_a_folder_that_cannot_be_made(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"data\.cache_dir: .*file/cache cannot be made: Not a directory"):
        RemoteDirectory(server.address, tmp_path / "file" / "cache", 1.0).fetch("a.tar")


def test_remote_shards_are_indexed_and_read(server: FileServer, tmp_path: Path) -> None:
    samples: list[dict[str, str | bytes]] = [
        {"__key__": f"{number}", "jpg": bytes([number]) * 100, "cls": str(number)} for number in range(3)
    ]
    stats = write_shard(tmp_path / "t-0000.tar", samples)
    server.files["/d/t-0000.tar"] = (tmp_path / "t-0000.tar").read_bytes()
    entry = {"filenames": ["t-0000.tar"], "shard_lengths": [3], "sha256": [stats.sha256], "bytes": [stats.bytes]}
    server.files["/d/_info.json"] = json.dumps({"splits": {"train": entry}}).encode()
    data = DataConfig(source=f"{server.address}/d?token=secret", cache_dir=str(tmp_path / "cache"))
    index = open_index(open_split(data, "train"), cache_dir=tmp_path / "cache")
    assert index.label.tolist() == [0, 1, 2]
    assert [read(index, number) for number in range(3)] == [bytes([number]) * 100 for number in range(3)]
    assert server.asked("/d/t-0000.tar") == [0]


@pytest.fixture
def bucket(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteDirectory:
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return RemoteDirectory("s3://bucket/d", tmp_path / "cache", 1.0)


def test_files_come_from_s3(server: FileServer, bucket: RemoteDirectory) -> None:
    server.files["/bucket/d/part one/ä.tar"] = tar(CONTENT)
    path = bucket.fetch("part one/ä.tar")
    assert path.read_bytes() == tar(CONTENT)
    assert bucket.fetch("part one/ä.tar") == path
    assert len(server.requests) == 1
    assert "Credential=key/" in str(server.requests[0].authorization)
    with bucket.open("part one/ä.tar") as file:
        assert file.read() == tar(CONTENT)
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/d/b\.tar does not exist: the server answered 404"):
        bucket.fetch("b.tar")


def test_s3_downloads_are_resumed(server: FileServer, bucket: RemoteDirectory) -> None:
    server.files["/bucket/d/a.bin"] = CONTENT
    server.faults = [times(2, status(503, b"<Error><Code>SlowDown</Code></Error>")), times(1, break_at(1_000_000))]
    assert bucket.fetch("a.bin", sha256=sha256(CONTENT)).read_bytes() == CONTENT
    assert server.asked("/bucket/d/a.bin") == [0, 0, 0, 1_000_000]


def test_s3_objects_that_change_start_again(server: FileServer, bucket: RemoteDirectory) -> None:
    server.files["/bucket/d/a.bin"] = CONTENT

    def change(handler: file_server.Handler, content: bytes) -> None:
        handler.send_file(content, until=1_000_000)
        server.files["/bucket/d/a.bin"] = CONTENT[::-1]

    server.faults = [times(1, change)]
    assert bucket.fetch("a.bin").read_bytes() == CONTENT[::-1]
    assert server.asked("/bucket/d/a.bin") == [0, 1_000_000, 0]


def test_s3_refusals_are_final(
    server: FileServer, bucket: RemoteDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.faults = [times(9, status(403, b"<Error><Code>AccessDenied</Code></Error>"))]
    with pytest.raises(UsageError, match=r"s3://bucket/d/a\.tar: access was refused, .* 403 AccessDenied$"):
        bucket.fetch("a.tar")
    assert len(server.requests) == 1
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UsageError, match="no credentials were found"):
        bucket.fetch("a.tar")


def test_forked_processes_fetch_from_s3(server: FileServer, bucket: RemoteDirectory) -> None:
    for number in range(3):
        server.files[f"/bucket/d/{number}.bin"] = bytes([number]) + CONTENT
    server.faults = [times(9, lambda handler, data: handler.send_file(data, pause=0.005))]
    slow = threading.Thread(target=bucket.fetch, args=("0.bin",))
    slow.start()
    wait_for(lambda: server.sent > 0)

    def child(number: int) -> Callable[[], None]:
        def fetch() -> None:
            assert bucket.fetch(f"{number}.bin").read_bytes() == bytes([number]) + CONTENT

        return fetch

    assert run(child(0), child(1), child(2)) == [0] * 3
    slow.join()
    assert [server.asked(f"/bucket/d/{number}.bin") for number in range(1, 3)] == [[0], [0]]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
