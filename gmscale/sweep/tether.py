"""python -I -S tether.py PARENT COMMAND ...: run a command that ends with its parent and leaves nothing behind.

Between a sweep and the processes of a trial. Standard input is a pipe that the parent holds and never writes to:
when it closes, or the parent is gone in any way, everything that the command has started is killed, also processes
in sessions of their own. The same happens when the command itself has ended, so what it held is free when this
process is gone. SIGTERM is handed on; the exit status, or the signal, is that of the command. Linux only, and no
imports that take time.
"""

import ctypes
import os
import resource
import select
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

_SET_DEATH_SIGNAL, _SET_SUBREAPER = 1, 36  # of prctl
_LOOK_S = 1.0  # between two looks whether the parent lives: a fork of it may hold the pipe open


def main(parent: int, command: list[str]) -> NoReturn:
    """Run `command` for the process `parent`; never returns."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_SET_SUBREAPER, 1, 0, 0, 0)  # orphans below become children of this process, which can then end them
    own = os.getpid()
    pid = os.fork()
    if pid == 0:
        # The parent's death would not do for this: it is a thread of the parent's that Linux looks at.
        prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == own:  # else it died before that call
            _become(command)
        os._exit(1)

    def hand_on(number: int, frame: FrameType | None) -> None:
        os.kill(pid, number)  # not reaped before this process leaves, so it is no other's

    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, hand_on)
    for number in (signal.SIGCHLD, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # whoever signals all processes of a job has reached the command too
    while True:
        exited = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if exited is not None:
            _end_all()
            _leave(exited.si_status, by_signal=exited.si_code != os.CLD_EXITED)
        ready, _, _ = select.select([sys.stdin, woken], [], [], _LOOK_S)
        if sys.stdin in ready or os.getppid() != parent:
            _end_all()
            _leave(signal.SIGKILL, by_signal=True)
        if woken in ready:
            os.read(woken, 4096)


def _become(command: list[str]) -> None:
    """Be the command from here on, without the pipe."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"gmscale: error: {command[0]} cannot be started: {error.strerror}", file=sys.stderr, flush=True)


def _end_all() -> None:
    """Kill every process below this one: the children of one that dies come here and are next."""
    while True:
        for pid in _children():
            os.kill(pid, signal.SIGKILL)  # it cannot be another's: only this process reaps it
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> Iterator[int]:
    own = os.getpid()
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = file.read().rpartition(b")")[2].split()[1]
        except OSError:
            continue  # gone meanwhile
        if int(parent) == own:
            yield int(name)


def _leave(status: int, *, by_signal: bool) -> NoReturn:
    """End as the command has ended."""
    if by_signal:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one core file is enough
        if status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(status, signal.SIG_DFL)
        os.kill(os.getpid(), status)
    os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
