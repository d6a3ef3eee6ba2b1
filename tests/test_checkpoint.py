"""Checkpoints: exact, complete or absent, readable by timm, and no pickle anywhere."""

import json
import math
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_checkpoints as small
import timm
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from gmscale import checkpoint
from gmscale.checkpoint.tree import pack, unpack
from gmscale.errors import UsageError

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
    packed = json.loads(json.dumps(pack(tree, tensors)))
    assert same(tree, unpack(packed, tensors))


def test_what_a_tree_cannot_hold_is_an_error() -> None:
    with pytest.raises(TypeError, match="cannot hold set"):
        pack({"a": {1, 2}}, {})


@settings(max_examples=20, deadline=None)
@given(tree=trees)
def test_a_rank_gets_its_own_tree_from_the_file(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    own = small.saver(run_dir)
    own.save(1, small.contents(per_rank={"x": tree}), None)
    path = checkpoint.latest(run_dir)
    assert path is not None
    assert same({"x": tree}, checkpoint.load_rank(path, tiny.ALONE))


# ---- save and load -----------------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = small.save(tmp_path, 3, value=7.0)
    assert path == checkpoint.latest(tmp_path)
    assert checkpoint.read(path)["step"] == 3
    assert small.load(path) == {7.0}
    assert sorted(p.name for p in path.iterdir()) == sorted(small.FILES)


def test_shared_memory_views_and_memory_formats_are_saved_as_values(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 5), nn.Linear(5, 5)).to(
        memory_format=torch.channels_last
    )
    model[2].weight = model[1].weight
    state = {k: v.clone() for k, v in model.state_dict().items()}
    held = torch.arange(12.0)
    own = small.saver(tmp_path)
    own.save(
        1,
        small.contents(weights=model.state_dict(), per_rank={"all": held, "part": held[3:6], "end": held[12:]}),
        None,
    )
    path = checkpoint.latest(tmp_path)
    assert path is not None
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    checkpoint.load_weights(path, model.load_state_dict)
    assert tiny.different(state, model.state_dict()) == []
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert checkpoint.load_rank(path, tiny.ALONE)["part"].tolist() == [3, 4, 5]
    assert checkpoint.load_rank(path, tiny.ALONE)["end"].shape == (0,)


def test_random_states_continue_where_they_were() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))]

    draw()  # an odd number of normal draws: each generator holds the second of a pair
    packed: dict[str, Tensor] = {}
    tree = json.loads(json.dumps(pack(checkpoint.random_states(torch.device("cpu")), packed)))
    expected = draw()
    checkpoint.set_random_states(unpack(tree, packed), torch.device("cpu"))
    assert draw() == expected


# ---- damaged -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", small.FILES)
@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "gone"])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, name: str, damage: str) -> None:
    path = small.save(tmp_path, 1)
    content = (path / name).read_bytes()
    broken = {"truncated": content[:-3], "empty": b"", "garbage": b"\x00garbage" * 20}.get(damage)
    if broken is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(broken)
    with pytest.raises(UsageError, match=name if name != "state.json" else "step-00000001") as caught:
        small.load(path)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = small.save(tmp_path, 1)
    for name in small.FILES:
        content = (path / name).read_bytes()
        for length in range(0, len(content), 7):
            (path / name).write_bytes(content[:length])
            with pytest.raises(UsageError, match="step-00000001"):
                small.load(path)
        (path / name).write_bytes(content)
    assert small.load(path) == {1.0}


def test_weights_of_another_model_and_another_format_are_refused(tmp_path: Path) -> None:
    path = small.save(tmp_path, 1)
    with pytest.raises(UsageError, match=r"model\.safetensors.*size mismatch"):
        checkpoint.load_weights(path, nn.Linear(4, 2).load_state_dict)
    state = json.loads((path / "state.json").read_text())
    for other in (2, 99, None):
        (path / "state.json").write_text(json.dumps(state | {"format": other}))
        with pytest.raises(UsageError, match=f"has format {other}; this gmscale reads format 3$"):
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


def test_tensors_keep_their_order_in_memory(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 4, 5)
    tree = {
        "last": images.to(memory_format=torch.channels_last),
        "turned": torch.randn(3, 4).t(),
        "sliced": images[:, 1],  # with gaps: only its values count
        "empty": torch.empty(0, 3).t(),
    }
    tensors: dict[str, torch.Tensor] = {}
    packed = pack(tree, tensors)
    found = unpack(json.loads(json.dumps(packed)), {name: t.contiguous() for name, t in tensors.items()})
    assert all(torch.equal(found[name], tree[name]) for name in tree)
    assert [found[name].stride() for name in ("last", "turned")] == [tree["last"].stride(), (1, 4)]
    assert found["sliced"].is_contiguous()
