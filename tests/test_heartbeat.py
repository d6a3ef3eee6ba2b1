"""What ranks leave of themselves, and what is read from it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gmscale import heartbeat, launched
from gmscale.diagnosis import describe_status, of_exits, of_records
from gmscale.heartbeat import Heartbeat, Record

NOW = 1000.0


def record(rank: int, step: int | None = 5, place: int = 2, phase: str = "backward", **more: object) -> Record:
    values = {"size": 3, "host": f"n{rank}", "pid": 100 + rank, "seen": NOW - 1, "since": NOW - 9} | more
    return Record(rank=rank, step=step, place=place, phase=phase, **values)


def test_the_record_on_this_machine_is_exact_after_sigkill(tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom gmscale.heartbeat import Heartbeat\nbeat = Heartbeat(1, 2)\n"
        "beat.at('data', 7)\nbeat.at('forward')\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, launched.HEARTBEATS: str(tmp_path)})
    assert done.returncode == -signal.SIGKILL
    (found,) = heartbeat.read_all(tmp_path)
    assert (found.rank, found.size, found.step, found.phase, found.place) == (1, 2, 7, "forward", 1)
    assert found.status is None
    assert found.where == "step 7, forward"


def test_the_shared_record_follows_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_PERIOD_S", 0.05)
    beat = Heartbeat(0, 1)
    with beat.shared(tmp_path):
        beat.at("data", 3)
        deadline = time.monotonic() + 5
        while heartbeat.read_all(tmp_path / "heartbeats")[0].step != 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        (found,) = heartbeat.read_all(tmp_path / "heartbeats")
        assert (found.step, found.phase, found.sharing) == (3, "data", True)
    beat.leave(1, "two\nlines", final=True)
    (found,) = heartbeat.read_all(tmp_path / "heartbeats")
    assert (found.status, found.error, found.final, found.sharing) == (1, "two lines", True, False)


def test_records_have_a_fixed_length_and_damaged_ones_are_left_out(tmp_path: Path) -> None:
    beat = Heartbeat(0, 2)
    with beat.shared(tmp_path):
        pass
    beat.leave(1, "x" * 5000)
    path = tmp_path / "heartbeats" / "rank-00000.json"
    assert path.stat().st_size == 2048
    assert set(json.loads(path.read_text())["error"]) == {"x"}
    for error in ("ж" * 2000, '"' * 2000):
        beat = Heartbeat(0, 2)
        with beat.shared(tmp_path):
            pass
        beat.leave(1, error)
        assert path.stat().st_size == 2048
        assert set(heartbeat.read_all(path.parent)[0].error) == {error[0]}
    (path.parent / "rank-00001.json").write_text('{"rank": 1')
    assert [found.rank for found in heartbeat.read_all(path.parent)] == [0]


def test_a_rank_that_is_behind_is_named() -> None:
    lines = of_records([record(0), record(1, place=1, phase="data"), record(2)], 3, NOW)
    assert lines == [
        "rank 1 (host n1, process 101) is behind: 9 s in step 5, data, while rank 0 is in step 5, backward"
    ]


def test_a_rank_in_an_earlier_step_is_behind_even_in_a_later_phase() -> None:
    lines = of_records([record(0), record(1, step=4, place=9, phase="saving"), record(2)], 3, NOW)
    assert len(lines) == 1
    assert lines[0].startswith("rank 1 (host n1, process 101) is behind: 9 s in step 4, saving")


def test_a_silent_rank_is_named_before_those_that_are_behind() -> None:
    silent = record(2, seen=NOW - 8)
    lines = of_records([record(0), record(1, place=1), silent], 3, NOW)
    assert lines == [
        "rank 2 (host n2, process 102) gave no sign of life for 8 s, last in step 5, backward: it hangs, or is gone"
    ]


def test_a_rank_without_a_word_is_named() -> None:
    assert of_records([record(0), record(2)], 3, NOW) == [
        "rank 1 never said a word: it did not start, or its node is gone"
    ]


def test_all_in_one_place_blames_nobody() -> None:
    (line,) = of_records([record(rank) for rank in range(3)], 3, NOW)
    assert line.startswith("all ranks were in step 5, backward")


def test_all_in_one_place_names_the_one_that_was_heard_last() -> None:
    lines = of_records([record(0), record(1, seen=NOW - 6), record(2)], 3, NOW)
    assert lines[1:] == ["rank 1 (host n1, process 101) was heard last 6 s ago, the longest of all"]


def test_many_lines_are_cut() -> None:
    assert of_records([record(0)], 100, NOW)[-1] == "and 95 more ranks"
    assert len(of_records([record(0)], 6, NOW)) == 5


def test_a_killed_rank_is_the_cause_and_not_those_that_lost_it() -> None:
    lost = record(0, status=1, by_peer=True, error="Connection closed by peer")
    assert of_exits({0: 1, 1: -9}, [lost, record(1), record(2)], 3, NOW) == [
        "rank 1 (host n1, process 101) was killed by SIGKILL (out of memory? the kernel's log says so) in step 5, "
        "backward"
    ]


def test_an_error_of_a_ranks_own_is_shown_also_from_another_node() -> None:
    lost = record(0, status=1, by_peer=True)
    own = record(2, status=1, error="shard-3.tar: does not decode", final=True)
    assert of_exits({0: 1}, [lost, record(1), own], 3, NOW) == [
        "rank 2 (host n2, process 102) ended with status 1 in step 5, backward: shard-3.tar: does not decode"
    ]


def test_a_timeout_of_all_names_the_one_that_did_not_come() -> None:
    timed_out = [record(rank, status=1, by_peer=True, error="Timed out") for rank in (0, 1)]
    (line,) = of_exits({0: 1, 1: 1}, [*timed_out, record(2, place=1, phase="forward")], 3, NOW)
    assert line.startswith("rank 2 (host n2, process 102) is behind: 9 s in step 5, forward")


def test_many_ranks_beat_more_slowly_and_are_not_called_silent() -> None:
    ranks = [record(rank, size=1024, seen=NOW - rank / 100) for rank in range(1024)]
    ranks[700].place = 1
    (line,) = of_records(ranks, 1024, NOW)
    assert line.startswith("rank 700 (host n700, process 800) is behind")


def test_a_rank_that_the_watchdog_aborted_is_not_to_blame_if_another_is_behind() -> None:
    ranks = [record(0), record(1), record(2, step=4)]
    lines = of_exits({0: -6}, ranks, 3, NOW)
    assert lines[0].startswith("rank 2 (host n2, process 102) is behind")
    assert lines[1].startswith("rank 0 (host n0, process 100) was killed by SIGABRT")


def test_a_rank_that_died_before_its_first_word() -> None:
    assert of_exits({0: -11}, [], 0, NOW) == ["rank 0 was killed by SIGSEGV before it said a word"]


@pytest.mark.parametrize(
    ("status", "said"),
    [(3, "ended with status 3"), (-6, "was killed by SIGABRT"), (-99, "was killed by signal 99")],
)
def test_statuses_in_words(status: int, said: str) -> None:
    assert describe_status(status) == said
