"""Which checkpoints stay, which is the best, and where its weights are."""

from pathlib import Path

import pytest
import small_checkpoints as small
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from gmscale import checkpoint
from gmscale.checkpoint import retention, saving
from gmscale.errors import UsageError

scores = st.lists(st.none() | st.sampled_from([0.0, 10.0, 20.0, 30.0]), max_size=12)


@given(scores, st.integers(1, 5), st.integers(0, 5))
def test_the_newest_and_the_best_are_kept(found: list[float | None], keep: int, keep_best: int) -> None:
    expected = set()
    for place, score in enumerate(found):
        newer = len(found) - place - 1
        better = [
            other for i, other in enumerate(found)
            if other is not None and score is not None and (other > score or (other == score and i > place))
        ]  # fmt: skip
        if newer < keep or (score is not None and len(better) < keep_best):
            expected.add(place)
    assert retention.kept(found, keep, keep_best) == expected


def test_on_disk_only_what_the_rule_names_is_left(tmp_path: Path) -> None:
    saver = small.saver(tmp_path, keep=2, keep_best=2)
    left = []
    for step, top1 in enumerate([50.0, 70.0, None, 60.0, 70.0, None, 10.0, None], start=1):
        saver.save(step, small.contents(), top1)
        left.append(tiny.checkpoint_steps(tmp_path))
    assert left == [[1], [1, 2], [1, 2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [2, 5, 6, 7], [2, 5, 7, 8]]
    assert checkpoint.best(tmp_path) == tmp_path / "checkpoints" / "step-00000005"
    assert all(p.name.startswith("step-") for p in (tmp_path / "checkpoints").iterdir())


def test_old_ones_go_only_after_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(saving, "remove_old", lambda *_: seen.append(checkpoint.latest(tmp_path)))
    paths = [small.save(tmp_path, step, keep=1) for step in (1, 2)]
    assert seen == paths
    assert [small.load(path) for path in paths] == [{1.0}, {1.0}]


def test_a_damaged_old_checkpoint_does_not_keep_a_run_from_saving(tmp_path: Path) -> None:
    (small.save(tmp_path, 1) / "state.json").write_text("{")
    small.save(tmp_path, 2)
    small.save(tmp_path, 3)
    assert tiny.checkpoint_steps(tmp_path) == [2, 3]


def test_best_is_the_newest_where_nothing_was_evaluated(tmp_path: Path) -> None:
    assert checkpoint.best(tmp_path) is None
    small.save(tmp_path, 1)
    newest = small.save(tmp_path, 2)
    assert checkpoint.best(tmp_path) == newest


def test_weights_are_found_by_file_checkpoint_and_run(tmp_path: Path) -> None:
    saver = small.saver(tmp_path)
    averaged = {"weight": torch.ones(2, 3)}
    for step, top1, ema in ((1, 90.0, averaged), (2, 80.0, None)):
        saver.save(step, small.contents(ema=ema), top1)
    first, second = checkpoint.checkpoints(tmp_path)
    found = checkpoint.weights_file
    assert found(tmp_path) == found(first) == found(tmp_path, "ema") == first / "model_ema.safetensors"
    assert found(tmp_path, "model") == found(first, "model") == first / "model.safetensors"
    assert found(second) == second / "model.safetensors"
    assert found(second / "state.json") == second / "state.json"
    with pytest.raises(UsageError, match="step-00000002 holds no averaged weights"):
        found(second, "ema")
    with pytest.raises(UsageError, match="no such file or run directory"):
        found(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty holds no complete checkpoint"):
        found(tmp_path / "empty")
