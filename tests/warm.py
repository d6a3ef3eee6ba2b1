"""Python programs without the seconds of starting: each is forked from a process that has imported torch once.

What runs is the program itself, torchrun too, with its own arguments, environment, exit status and signals;
torchrun's workers are forked like it. Only the interpreter's last breath is cut short.
"""

import atexit
import ctypes
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn

import torch

from gmscale.parallel.local_ranks import enter_network

context = multiprocessing.get_context("forkserver")
_NEW_HOST = 0x04000000  # CLONE_NEWUTS
_IMPORTED = ["timm", "gmscale.sites", "gmscale.cli", "gmscale.train", "gmscale.launch.agent"]


@cache
def begin() -> None:
    """Start the server, for all that uses `context`."""
    # what deepspeed finds out when it is imported would be about this process's GPU: then each fork imports its own
    own = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    context.set_forkserver_preload([*_IMPORTED, "deepspeed"] if own else _IMPORTED)
    before = dict(os.environ)
    os.environ.update(own)
    forkserver.ensure_running()
    for name in own.keys() - before.keys():
        del os.environ[name]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


class Program:
    """`python ARGUMENTS` in a session of its own, its output in the file `log`.

    With a `network`, a namespace of that name, it lives there, on a host of the name `host`.
    """

    def __init__(
        self,
        log: Path,
        arguments: Sequence[str],
        folder: Path | None = None,
        environment: Mapping[str, str] = {},
        *,
        network: str | None = None,
        host: str | None = None,
    ) -> None:
        begin()
        self.log = log
        log.write_bytes(b"")
        self._process = context.Process(
            target=_run,
            args=(log, list(arguments), folder or Path.cwd(), {**os.environ, **environment}, network, host),
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float = 90) -> int:
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.log.name, timeout_s, self.output)
        return self._process.exitcode

    def kill(self) -> None:
        """End it and everything it started in its session."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()

    @property
    def output(self) -> str:
        return self.log.read_text()


def run(log: Path, arguments: Sequence[str], folder: Path | None = None, *, timeout_s: float = 100) -> str:
    """Return the output of a program that must end with status 0."""
    program = Program(log, arguments, folder)
    try:
        assert program.wait(timeout_s) == 0, program.output
    finally:
        program.kill()
    return program.output


def ranks(launcher: int) -> dict[int, int]:
    """Return {rank: process id} of the living workers of a torchrun."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue  # gone meanwhile
        state, parent = rest.split()[:2]
        if name.startswith("rank ") and int(parent) == launcher and state != "Z":
            found[int(name.removeprefix("rank "))] = int(path.parent.name)
    return found


def _run(
    log: Path,
    arguments: list[str],
    folder: Path,
    environment: dict[str, str],
    network: str | None,
    host: str | None,
) -> NoReturn:
    os.setsid()
    if network is not None:
        enter_network(network)
    if host is not None and ctypes.CDLL(None).unshare(_NEW_HOST) == 0:
        socket.sethostname(host)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(folder)
    _become(arguments, environment)


def _become(arguments: list[str], environment: Mapping[str, str]) -> NoReturn:
    """Be the process `python ARGUMENTS` from here on; a rank is called so in /proc."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    if "RANK" in os.environ:
        Path("/proc/self/comm").write_text(f"rank {os.environ['RANK']}")
    status = 1
    try:
        status = _status(lambda: _main([a for a in arguments if a != "-u"]))
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)  # to tear down all that was imported takes two seconds


def _main(arguments: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = lambda handler, command, environment: _Worker(list(command[1:]), environment)  # type: ignore
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _status(main: Callable[[], Any]) -> int:
    try:
        main()
    except SystemExit as left:
        if isinstance(left.code, int | None):
            return left.code or 0
        print(left.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class _Worker:
    """What torchrun asks of the subprocess.Popen of a worker."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.args, self.returncode = arguments, None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            _become(arguments, environment)
        while os.getpgid(self.pid) != self.pid:  # Popen, too, returns once the group is there that may be killed
            time.sleep(0.0005)

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return status
