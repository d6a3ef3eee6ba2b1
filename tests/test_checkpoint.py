"""Checkpoints: exact, complete or absent, readable by timm, and no pickle anywhere."""

import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from gmscale import checkpoint
from gmscale.errors import RunError, UsageError

FILES = ("state.json", "model.safetensors", "optimizer.safetensors", "rank-00000.safetensors")


def save(run_dir: Path, step: int, keep: int = 2, value: float = 1.0) -> Path:
    """Save a checkpoint of which every tensor holds `value`."""
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[model.weight] = {"momentum_buffer": torch.full((2, 3), value)}
    return checkpoint.save(
        run_dir,
        step,
        weights=model.state_dict(),
        ema=None,
        optimizer=optimizer.state_dict(),
        shared={"value": value},
        per_rank={"held": torch.full((4,), value)},
        keep=keep,
        world=tiny.ALONE,
    )


def load(path: Path) -> set[float]:
    """Load everything of a checkpoint that `save` made; return the values found in it."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    checkpoint.load_weights(path, model.load_state_dict)
    optimizer.load_state_dict(checkpoint.optimizer_state(path))
    found = [model.weight.detach(), optimizer.state[model.weight]["momentum_buffer"]]
    found.append(checkpoint.load_rank(path, tiny.ALONE)["held"])
    return {float(v) for tensor in found for v in tensor.flatten()} | {checkpoint.read(path)["shared"]["value"]}


# ---- trees -------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


@st.composite
def some_tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(draw(st.sampled_from(DTYPES)))
    return tensor.movedim(0, -1) if shape and draw(st.booleans()) else tensor  # not contiguous


names = st.text(max_size=8).filter(lambda s: not s.startswith("__"))
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | some_tensors()
trees = st.recursive(
    leaves, lambda t: st.lists(t, max_size=3) | st.dictionaries(names | st.integers(), t, max_size=3), max_leaves=8
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)  # NaN is itself here


@settings(deadline=None)
@given(trees)
def test_a_tree_comes_back_as_it_was(tree: Any) -> None:
    tensors: dict[str, Tensor] = {}
    packed = json.loads(json.dumps(checkpoint.pack(tree, tensors)))
    assert same(tree, checkpoint.unpack(packed, tensors))


def test_what_a_tree_cannot_hold_is_an_error() -> None:
    with pytest.raises(TypeError, match="cannot hold set"):
        checkpoint.pack({"a": {1, 2}}, {})


@settings(max_examples=20, deadline=None)
@given(tree=trees)
def test_a_rank_gets_its_own_tree_from_the_file(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    model = nn.Linear(1, 1)
    path = checkpoint.save(
        run_dir,
        1,
        weights=model.state_dict(),
        ema=None,
        optimizer={},
        shared={},
        per_rank={"x": tree},
        keep=1,
        world=tiny.ALONE,
    )
    assert same({"x": tree}, checkpoint.load_rank(path, tiny.ALONE))


# ---- save and load -----------------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 3, value=7.0)
    assert path == checkpoint.latest(tmp_path)
    assert checkpoint.read(path)["step"] == 3
    assert load(path) == {7.0}
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)


def test_shared_memory_views_and_memory_formats_are_saved_as_values(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 5), nn.Linear(5, 5)).to(
        memory_format=torch.channels_last
    )
    model[2].weight = model[1].weight
    state = {k: v.clone() for k, v in model.state_dict().items()}
    held = torch.arange(12.0)
    path = checkpoint.save(
        tmp_path, 1, weights=model.state_dict(), ema=None, optimizer={}, shared={},
        per_rank={"all": held, "part": held[3:6]}, keep=1, world=tiny.ALONE,
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    checkpoint.load_weights(path, model.load_state_dict)
    assert tiny.different(state, model.state_dict()) == []
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert checkpoint.load_rank(path, tiny.ALONE)["part"].tolist() == [3, 4, 5]


def test_random_states_continue_where_they_were() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))]

    draw()  # an odd number of normal draws: each generator holds the second of a pair
    packed: dict[str, Tensor] = {}
    tree = json.loads(json.dumps(checkpoint.pack(checkpoint.random_states(torch.device("cpu")), packed)))
    expected = draw()
    checkpoint.set_random_states(checkpoint.unpack(tree, packed), torch.device("cpu"))
    assert draw() == expected


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (1, 5, 9, 10):
        save(tmp_path, step, keep)
    assert tiny.checkpoint_steps(tmp_path) == [1, 5, 9, 10][-keep:]
    assert all(p.name.startswith("step-") for p in (tmp_path / "checkpoints").iterdir())


# ---- interrupted -------------------------------------------------------------------------------------------------


def test_an_unfinished_directory_is_ignored_and_swept_up(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    left_over = tmp_path / "checkpoints" / ".step-00000002.tmp"
    shutil.copytree(first, left_over)
    assert checkpoint.latest(tmp_path) == first
    save(tmp_path, 2)
    assert not left_over.exists()
    assert tiny.checkpoint_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("broken", ["rename", "fsync"])
def test_a_save_that_fails_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    first = save(tmp_path, 1, value=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "rename") if broken == "rename" else (os, "fsync")), fail)
        with pytest.raises(RunError, match=r"cannot be written: .*No space left"):
            save(tmp_path, 2, value=2.0)
    assert checkpoint.latest(tmp_path) == first
    assert load(first) == {1.0}
    assert load(save(tmp_path, 2, value=2.0)) == {2.0}


def _save_and_die(run_dir: Path, at_call: int) -> None:
    """Save step 2 and SIGKILL this process just before its `at_call`-th sync, rename or removal."""
    calls = 0

    def deadly(function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    os.fsync, Path.rename, shutil.rmtree = deadly(os.fsync), deadly(Path.rename), deadly(shutil.rmtree)
    save(run_dir, 2, keep=1, value=2.0)


def test_killed_at_any_moment_the_newest_checkpoint_is_complete(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    seen = set()
    for at_call in range(1, 20):
        run_dir = tmp_path / str(at_call)
        save(run_dir, 1, value=1.0)
        process = context.Process(target=_save_and_die, args=(run_dir, at_call))
        process.start()
        process.join(30)
        newest = checkpoint.latest(run_dir)
        assert newest is not None
        step = checkpoint.read(newest)["step"]
        assert load(newest) == {float(step)}
        seen.add(step)
        assert load(save(run_dir, 3, value=3.0)) == {3.0}  # and the run goes on
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    else:
        pytest.fail("never came through")
    assert seen == {1, 2}
    assert at_call > 6


# ---- damaged -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "gone"])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path, 1)
    content = (path / name).read_bytes()
    broken = {"truncated": content[:-3], "empty": b"", "garbage": b"\x00garbage" * 20}.get(damage)
    if broken is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(broken)
    with pytest.raises(UsageError, match=name if name != "state.json" else "step-00000001") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for name in FILES:
        content = (path / name).read_bytes()
        for length in range(0, len(content), 7):
            (path / name).write_bytes(content[:length])
            with pytest.raises(UsageError, match="step-00000001"):
                load(path)
        (path / name).write_bytes(content)
    assert load(path) == {1.0}


def test_weights_of_another_model_and_another_format_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(UsageError, match=r"model\.safetensors.*size mismatch"):
        checkpoint.load_weights(path, nn.Linear(4, 2).load_state_dict)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(UsageError, match="format 99"):
        checkpoint.read(path)


# ---- no pickle, and timm -----------------------------------------------------------------------------------------


def test_no_file_is_a_pickle_and_none_is_executed(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = checkpoint.latest(finished_run)
    assert newest is not None
    for file in newest.iterdir():
        assert file.suffix in (".json", ".safetensors")
        assert not zipfile.is_zipfile(file)
        with pytest.raises(Exception), open(file, "rb") as stream:  # noqa: B017, PT011 - whatever it is not
            pickle.load(stream)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was about to be executed")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    model = timm.create_model("test_byobnet", num_classes=10)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4)
    checkpoint.load_weights(newest, model.load_state_dict)
    optimizer.load_state_dict(checkpoint.optimizer_state(newest)["optimizer"])
    state = checkpoint.load_rank(newest, tiny.ALONE)
    checkpoint.set_random_states(state["random"], torch.device("cpu"))
    assert state["masks"]["mask"]["residuals"]


@pytest.mark.parametrize("name", ["model", "model_ema"])
def test_plain_timm_reads_the_weights(finished_run: Path, name: str) -> None:
    newest = checkpoint.latest(finished_run)
    assert newest is not None
    path = newest / f"{name}.safetensors"
    model = timm.create_model("test_byobnet", num_classes=10, checkpoint_path=str(path))
    assert tiny.different(load_file(path), model.state_dict()) == []
