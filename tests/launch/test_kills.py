"""Two of the kills of kills.py: that program's own functions, so that it works when a person runs it."""

import signal
from pathlib import Path

import pytest
from kills import Kill, Series, draw, summary
from managers import ByHand

from gmscale.errors import RunError

pytestmark = pytest.mark.slow


def test_a_run_ends_as_undisturbed_whatever_is_killed(tmp_path: Path) -> None:
    series = Series(tmp_path)
    duration_s = series.prepare()
    try:
        trials = [
            series.run("nodes", 1, Kill("worker of n2", signal.SIGKILL, 0.4), duration_s),
            series.run("nodes", 2, Kill("launcher of n1", signal.SIGKILL, 0.4), duration_s),
        ]
    except RunError as error:
        if "network namespaces" not in str(error) and "cannot make its link" not in str(error):
            raise
        pytest.skip(str(error))
    for trial in trials:
        assert trial.wrong == [], trial.line
        assert not trial.late, trial.line
        assert trial.after_s is not None, trial.line
        assert trial.restart_s is not None, trial.line
        assert trial.starts in (1, 2), trial.line  # 1: the kill came before the ranks, as may be on a busy machine
    assert [trial.statuses[-2:] for trial in trials] == [["n1 0", "n2 0"]] * 2
    assert trials[0].statuses == ["n1 0", "n2 0"]
    assert "n1 -9" in trials[1].statuses
    assert summary(trials).startswith("nodes: 2 of 2 runs right after a kill")


def test_the_seed_says_what_is_killed_and_when() -> None:
    kills = [draw(0, number, ByHand.victims) for number in range(1, 25)]
    assert kills == [draw(0, number, ByHand.victims) for number in range(1, 25)]
    assert kills != [draw(1, number, ByHand.victims) for number in range(1, 25)]
    ways = [(kill.victim, kill.signal) for kill in kills]
    for turn in (ways[:8], ways[8:16], ways[16:]):
        assert set(turn) == {(v, s) for v in ByHand.victims for s in (signal.SIGTERM, signal.SIGKILL)}
    assert ways[:8] != ways[8:16]
    assert min(kill.share for kill in kills) < 0.2 < 0.8 < max(kill.share for kill in kills)
