"""One node's launcher at work: torchelastic's agent, with our reports, statuses and manners of stopping."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import DistError, DistStoreError, Store
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from gmscale import diagnosis, heartbeat, launched
from gmscale.heartbeat import Record
from gmscale.launch.console import say
from gmscale.launch.meeting import LOST_S, EndedError, Meeting, interrupt_main_thread
from gmscale.launch.topology import Topology
from gmscale.stopping import STOPPED, StopRequest

_PATIENCE_S = 3.0  # for ranks that end after a failure, before they are killed
_WORD_S = 3.0  # for another launcher to say whether a failure there is the end
_LAST_CALL_S = 5.0  # for more nodes, once the least number is there
_UNCOUNTED = 10**9
_USAGE = 2
_ROLL_CALL_S = 8.0  # for the nodes of a new start to say how many ranks they have
_KEEP_ALIVE_S, _KEEP_ALIVE_ATTEMPTS = 2, 3


class _Rendezvous(DynamicRendezvousHandler):
    """One whose nodes wait only for seconds for a node that was lost as soon as it had joined."""

    def _get_store(self) -> Store:
        store = super()._get_store()
        store.set_timeout(timedelta(seconds=_ROLL_CALL_S))
        return store


class Agent(LocalElasticAgent):
    """Starts this node's ranks, watches them, and starts them again."""

    def __init__(self, topology: Topology, meeting: Meeting, command: Sequence[str], folder: Path) -> None:
        backend = C10dRendezvousBackend(meeting.store, topology.run_id)
        handler = _Rendezvous.from_backend(
            topology.run_id,
            meeting.store,
            backend,
            topology.min_nodes,
            topology.max_nodes,
            local_addr=topology.route.address,
            timeout=RendezvousTimeout(
                join=timedelta(seconds=topology.join_timeout_s), last_call=timedelta(seconds=_LAST_CALL_S)
            ),
            keep_alive_interval=_KEEP_ALIVE_S,
            keep_alive_max_attempt=_KEEP_ALIVE_ATTEMPTS,
        )
        spec = WorkerSpec(
            role="rank",
            local_world_size=topology.nproc_per_node,
            rdzv_handler=handler,
            entrypoint=sys.executable,
            args=("-m", "gmscale", *command),
            max_restarts=_UNCOUNTED,  # torchelastic forgives none of a month's; we count those without progress
            monitor_interval=0.1,
            local_addr=topology.route.address,
        )
        super().__init__(spec, DefaultLogsSpecs(log_dir=str(folder / "logs")))
        self._topology, self._meeting, self._handler = topology, meeting, handler
        self._folder = folder / "heartbeats"
        self._folder.mkdir()
        os.environ[launched.HEARTBEATS] = str(self._folder)
        os.environ[launched.LAUNCHER] = str(os.getpid())
        os.environ[launched.MOST_RANKS] = str(topology.max_nodes * topology.nproc_per_node)
        self._is_training = command[0] == "train"  # whose ranks leave together, when all is written
        self._stop_since: float | None = None
        self._held = 0
        self._heard: list[int] = []  # signals that wait
        self._failures = 0  # in a row
        self._furthest = 0

    # -- running ---------------------------------------------------------------------------------------------------

    def supervise(self, stop: StopRequest) -> int:
        """Run the job to its end; return the exit status. Raises EndedError if it ends before its time.

        `stop` is what has listened for signals until now.
        """
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""  # its handlers would end ranks that could still save
        if stop.requested:
            raise EndedError(STOPPED, ["asked to stop before any rank had begun"])
        handled = {*StopRequest.listens_to(), signal.SIGQUIT, signal.SIGUSR2}
        for number in handled:
            signal.signal(number, self._on_signal)
        self._meeting.listen(interrupt_main_thread)
        try:
            self.run()
        except SignalException:
            self._meeting.tell(STOPPED, ["asked to stop"])
            raise EndedError(STOPPED, ["asked to stop while no rank was at work"]) from None
        except RendezvousTimeoutError:
            t, came = self._topology, ", ".join(self._meeting.names())
            said = (
                f"waited {t.join_timeout_s:.0f} s for {t.nodes} nodes; these have come since the beginning: {came}"
            )
            raise EndedError(1, [said]) from None
        except (RendezvousError, DistError) as error:
            self._wait_for_verdict()  # who listens may find a moment later that the head is gone
            raise EndedError(1, [f"lost the other launchers: {' '.join(str(error).split())[:200]}"]) from None
        finally:
            for number in handled:
                signal.signal(number, signal.SIG_IGN)  # a request repeated now must not change the status
        return max((record.status or 0 for record in self._own_records()), default=0)

    # -- what torchelastic calls -----------------------------------------------------------------------------------

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        while (attempt := self._meet(worker_group)) is None:
            self._heed_verdict()
            say("a node was lost as soon as it had joined; the others meet again")
        os.environ[launched.WORLD] = f"{self._meeting.launch}.{attempt}"
        for path in self._folder.glob("rank-*.json"):
            path.unlink()
        if attempt > 1 and worker_group.group_rank == 0:
            say(f"start {attempt}: {worker_group.group_world_size} nodes, {len(worker_group.workers)} ranks here")

    def _meet(self, worker_group: WorkerGroup) -> int | None:
        """Return the number of this start, with its nodes in `worker_group`; None if one was lost meanwhile."""
        try:
            super()._rendezvous(worker_group)
            # all launchers of this start call it the same, which their own counts of restarts do not give
            store: Any = worker_group.store
            if worker_group.group_rank == 0:
                store.set("attempt", str(self._meeting.new_attempt()))
            return int(store.get("attempt"))
        except DistStoreError:
            return None
        finally:
            self._meeting.store.set_timeout(timedelta(seconds=LOST_S))

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with self._undisturbed():  # a rank that is not registered yet would be left behind
            pids = super()._start_workers(worker_group)
            context: Any = self._pcontext
            close = context.close

            def close_soon(death_sig: signal.Signals | None = None, timeout: float = 30) -> None:
                # after a failure there is nothing that the other ranks could save, and a hanging one hears nothing
                with self._undisturbed():
                    close(death_sig, min(timeout, _PATIENCE_S))

            context.close = close_soon
        self._catch_up()
        return pids

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        # a node has come: what was trained since the last save is kept, if the ranks elsewhere can still agree
        if worker_group.state == WorkerState.HEALTHY and not self._meeting.has_failed(launched.world_name()):
            self._ask_to_stop()
            deadline = time.monotonic() + self._topology.grace_s
            exits: dict[int, int] = {}
            while time.monotonic() < deadline and self._pcontext is not None:
                exits |= self._exits(worker_group)
                if self._pcontext.wait(0) is not None:
                    break
                time.sleep(0.05)
            failed = {rank: status for rank, status in exits.items() if status != STOPPED}
            for line in self._diagnosis(failed) if failed else []:  # they did not agree: one hung, or died
                say(line)
        super()._stop_workers(worker_group)
        self._catch_up()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        with self._undisturbed():
            super()._shutdown(death_sig, timeout)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._stop_since is not None and time.monotonic() - self._stop_since > self._topology.grace_s:
            said = f"asked to stop {self._topology.grace_s:.0f} s ago, and ranks still run; they are killed now"
            raise EndedError(STOPPED, [said, *self._diagnosis({})])
        exits = self._exits(worker_group)  # looked at before torchelastic ends the others and mixes them up
        result = super()._monitor_workers(worker_group)
        self._catch_up()
        if result.state == WorkerState.SUCCEEDED:
            self._judge_end()
            if self._stopped_for_newcomer():
                return RunResult(state=WorkerState.HEALTHY)  # and so torchelastic lets them in
        elif result.is_failed():
            self._judge_failure(exits or {rank: failure.exitcode for rank, failure in result.failures.items()})
        return result

    def _exits(self, worker_group: WorkerGroup) -> dict[int, int]:
        """Return the statuses of the ranks that have failed, negative for signals, without reaping them."""
        found = {}
        for worker in worker_group.workers:
            try:
                exited = os.waitid(os.P_PID, worker.id, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # reaped already, after it had succeeded
                continue
            if exited is not None and exited.si_status != 0:
                by_exit = exited.si_code == os.CLD_EXITED
                found[worker.global_rank] = exited.si_status if by_exit else -exited.si_status
        return found

    # -- judging ---------------------------------------------------------------------------------------------------

    def _judge_end(self) -> None:
        """Raise EndedError if ranks left with a status that to start them again would not change."""
        records = self._own_records()
        wrong = [record for record in records if record.status not in (None, 0, STOPPED)]
        if wrong:
            self._end(wrong[0].status or 1, [])
        if self._is_training and all(record.status == 0 for record in records):
            self._meeting.tell(0, [])  # a node that loses a rank from here on need not start it again

    def _stopped_for_newcomer(self) -> bool:
        stopped = any(record.status == STOPPED for record in self._own_records())
        return stopped and self._stop_since is None and self._handler.num_nodes_waiting() > 0

    def _judge_failure(self, exits: dict[int, int]) -> None:
        """Say why ranks failed. Raise EndedError if they are not to be started again."""
        own = {record.rank: record for record in self._own_records()}
        lines = self._diagnosis(exits)
        left = [own[rank] for rank in exits if rank in own and own[rank].status is not None]
        if all(record.status == STOPPED for record in left) and len(left) == len(exits):
            raise EndedError(STOPPED)
        if self._stop_since is not None:
            raise EndedError(
                STOPPED, [*lines, "this came after the job was asked to stop: it goes on from its checkpoint"]
            )
        usage = any(status == _USAGE and rank not in {r.rank for r in left} for rank, status in exits.items())
        if usage or any(record.final and record.status == _USAGE for record in left):
            self._end(_USAGE, lines, own=[])  # the rank has said it
        if any(record.final for record in left):
            self._end(1, lines)
        if all(record.by_peer for record in left) and len(left) == len(exits):
            self._wait_for_verdict()
        step = max((record.step or 0 for record in own.values()), default=0)
        if self._meeting.verdict is not None and self._meeting.verdict.status == 0:
            raise EndedError(0, [*lines, "the run was finished by then"])
        self._failures = 1 if step > self._furthest else self._failures + 1
        self._furthest = max(step, self._furthest)
        if self._failures > self._topology.max_restarts:
            tried = (
                f"failed {self._failures} times, at most at step {self._furthest}"
                if self._failures > 1
                else "failed"
            )
            self._end(1, [*lines, f"{tried}, and --max_restarts is {self._topology.max_restarts}"])
        self._meeting.report_failure(launched.world_name())
        for line in lines:
            say(line)
        say(f"the ranks start again from the last checkpoint ({self._failures} of {self._topology.max_restarts})")

    def _end(self, status: int, lines: list[str], own: list[str] | None = None) -> None:
        """Tell the other launchers, and end; `own` is what is to be said here, if not the same."""
        self._meeting.tell(status, lines)
        raise EndedError(status, lines if own is None else own)

    def _diagnosis(self, exits: dict[int, int]) -> list[str]:
        records = {record.rank: record for record in self._shared_records()}
        for own in self._own_records():  # the exact one, and seen when either was
            shared = records.get(own.rank)
            if shared is not None:
                own.seen = max(own.seen, shared.seen)
            records[own.rank] = own
        size = next((record.size for record in records.values()), 0)
        return diagnosis.of_exits(exits, sorted(records.values(), key=lambda r: r.rank), size, time.time())

    def _own_records(self) -> list[Record]:
        return [r for r in heartbeat.read_all(self._folder) if r.world == launched.world_name()]

    def _shared_records(self) -> list[Record]:
        folder = next((record.folder for record in self._own_records() if record.folder), None)
        if folder is None:
            return []
        return [r for r in heartbeat.read_all(Path(folder)) if r.world == launched.world_name()]

    # -- signals ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Let signals wait."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def _catch_up(self) -> None:
        while self._heard and not self._held:
            self._act(self._heard.pop(0))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._heard.append(number)
        else:
            self._act(number)

    def _act(self, number: int) -> None:
        """Do what a signal asks for. Raises EndedError or SignalException where that means to leave."""
        if number == signal.SIGUSR2:
            self._heed_verdict()
        elif self._stop_since is None:
            self._stop_since = time.monotonic()
            if not self._ask_to_stop():
                raise SignalException("no rank is at work", signal.Signals(number))
        elif number == signal.SIGINT:
            raise EndedError(STOPPED, ["interrupted a second time: killed"])

    def _ask_to_stop(self) -> bool:
        """Ask this node's ranks to stop at their next step boundary; return False if there is none that could."""
        group = self.get_worker_group()
        if group.state == WorkerState.HEALTHY:
            for worker in group.workers:
                with suppress(ProcessLookupError):
                    os.kill(worker.id, signal.SIGUSR1)
        return group.state in (WorkerState.HEALTHY, WorkerState.SUCCEEDED)

    def _wait_for_verdict(self) -> None:
        deadline = time.monotonic() + _WORD_S
        while time.monotonic() < deadline:
            self._heed_verdict()
            time.sleep(0.1)

    def _heed_verdict(self) -> None:
        verdict = self._meeting.verdict
        if verdict is None or verdict.teller == self._meeting.number:
            return
        at_work = self.get_worker_group().state in (WorkerState.HEALTHY, WorkerState.SUCCEEDED)
        if verdict.status != 0 or not at_work:  # of a finished run our ranks are about to end, too
            said = f"ended because of {verdict.host}: " if verdict.host else ""
            raise EndedError(verdict.status, [said + line for line in verdict.lines])
