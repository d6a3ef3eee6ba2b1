"""Sharded weights: parts in, whole weights out, and a line for whatever does not fit together."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import small_checkpoints as small
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from gmscale import checkpoint
from gmscale.checkpoint.shards import Part, chosen, places, shard_name
from gmscale.checkpoint.tensors import TensorFile, write_tensors
from gmscale.errors import UsageError
from gmscale.parallel import WeightShard, World

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def cut(whole: dict[str, Tensor], cuts: dict[str, list[int]], world_size: int) -> list[dict[str, WeightShard]]:
    """Shards of whole weights, cut at some places; what is cut nowhere is rank 0's."""
    shards: list[dict[str, WeightShard]] = [{} for _ in range(world_size)]
    for name, tensor in whole.items():
        flat, ends = tensor.flatten(), [0, *sorted(cuts[name]), tensor.numel()]
        for rank in range(world_size if cuts[name] else 1):
            begin, end = (ends[rank], ends[rank + 1]) if cuts[name] else (0, tensor.numel())
            shards[rank][name] = WeightShard(tuple(tensor.shape), begin, flat[begin:end].clone())
    return shards


def write(folder: Path, shards: list[dict[str, WeightShard]]) -> Path:
    """A checkpoint's directory with the files of all ranks."""
    folder.mkdir(parents=True)
    for rank, own in enumerate(shards):
        entries = {name: shard.entries for name, shard in own.items()}
        write_tensors(folder / shard_name(rank, len(shards)), entries, places(own))
    return folder


@st.composite
def divided(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, list[int]], int]:
    world_size = draw(st.integers(1, 4))
    whole, cuts = {}, {}
    for i in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        tensor = torch.randint(0, 200, shape).to(draw(st.sampled_from(DTYPES)))
        whole[f"layer{i}.weight"] = tensor
        is_cut = world_size > 1 and draw(st.booleans())
        at = st.lists(st.integers(0, tensor.numel()), min_size=world_size - 1, max_size=world_size - 1)
        cuts[f"layer{i}.weight"] = draw(at) if is_cut else []
    return whole, cuts, world_size


@settings(deadline=None, max_examples=50)
@given(divided())
def test_cut_anywhere_the_whole_weights_come_back(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[dict[str, Tensor], dict[str, list[int]], int]
) -> None:
    whole, cuts, world_size = case
    shards = cut(whole, cuts, world_size)
    folder = write(tmp_path_factory.mktemp("run") / "step", shards)
    found = load_file(checkpoint.whole_weights(folder))
    assert tiny.different(found, whole) == []
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in whole.items()}
    for rank, own in enumerate(shards):
        loaded = checkpoint.load_shards(folder, World(rank, rank, world_size, torch.device("cpu"), "fsdp2"))
        assert loaded.keys() == own.keys()
        for name, shard in own.items():
            assert loaded[name][:2] == shard[:2]
            assert torch.equal(loaded[name].entries, shard.entries)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_a_part_too_few_or_too_many_is_noticed(lengths: list[int], data: st.DataObject) -> None:
    parts = [Part(sum(lengths[:i]), length, i) for i, length in enumerate(lengths)]
    filled = [part for part in parts if part.entries]
    total = sum(lengths)
    assert chosen(data.draw(st.permutations(parts)), total) == filled
    again = [part._replace(rank=part.rank + 10) for part in parts]  # a rank that has the same
    assert chosen([*again, *parts], total) == filled
    with pytest.raises(ValueError, match="entries"):
        chosen(parts, total + 1)
    if filled:
        gone = data.draw(st.sampled_from(filled))
        with pytest.raises(ValueError, match="entries"):
            chosen([part for part in parts if part != gone], total)
        with pytest.raises(ValueError, match="in several shards"):
            chosen([*parts, Part(gone.offset, gone.entries + 1, 20)], total)


WHOLE = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5.0), "mean": torch.ones(2)}
CUTS = {"a": [6], "b": [2], "mean": []}


def test_no_more_than_a_shard_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = []
    real = TensorFile.put

    def put(file: TensorFile, name: str, entries: Tensor, offset: int = 0) -> None:
        pieces.append((name, offset, entries.numel()))
        real(file, name, entries, offset)

    folder = write(tmp_path / "step", cut(WHOLE, CUTS, 2))
    monkeypatch.setattr(TensorFile, "put", put)
    checkpoint.whole_weights(folder)
    assert sorted(pieces) == [("a", 0, 6), ("a", 6, 6), ("b", 0, 2), ("b", 2, 3), ("mean", 0, 2)]


def test_whole_weights_are_made_once_and_are_there_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "step", cut(WHOLE, CUTS, 2))
    before = {path.name for path in folder.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("_write", "put"):
        with monkeypatch.context() as patch:
            patch.setattr(TensorFile, name, full)
            with pytest.raises(UsageError, match=r"model\.safetensors cannot be made .*No space left"):
                checkpoint.whole_weights(folder)
        assert {path.name for path in folder.iterdir()} == before
    file = checkpoint.whole_weights(folder)
    assert {path.name for path in folder.iterdir()} == before | {"model.safetensors"}
    written = file.stat().st_mtime_ns
    assert checkpoint.whole_weights(folder) == file
    assert file.stat().st_mtime_ns == written


def test_a_checkpoint_with_shards_is_read_like_any_other(tmp_path: Path) -> None:
    """Saved by one rank, which has everything."""
    (shards,) = cut(WHOLE, {name: [] for name in WHOLE}, 1)
    saver = small.saver(tmp_path)
    saver.save(1, small.contents(weights=None, shards=shards), None)
    path = checkpoint.latest(tmp_path)
    assert path is not None
    assert checkpoint.read(path)["sharded"] is True
    assert not (path / "model.safetensors").exists()
    saver.finish(whole=True)
    assert tiny.different(load_file(path / "model.safetensors"), WHOLE) == []
    saver.save(2, small.contents(weights=None, shards=shards), None)
    file = checkpoint.weights_file(tmp_path)
    assert file == tmp_path / "checkpoints" / "step-00000002" / "model.safetensors"
    assert tiny.different(load_file(file), WHOLE) == []


def test_a_finished_run_keeps_its_shards_if_they_cannot_be_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shards,) = cut(WHOLE, {name: [] for name in WHOLE}, 1)
    said: list[str] = []
    saver = small.saver(tmp_path, said)
    saver.save(1, small.contents(weights=None, shards=shards), None)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorFile, "put", full)
    saver.finish(whole=True)
    assert len(said) == 1
    assert "step-00000001 stay in shards" in said[0]
    assert "gmscale export" in said[0]
    assert tiny.checkpoint_steps(tmp_path) == [1]


# ---- what does not fit together ----------------------------------------------------------------------------------


def second(change: Callable[[dict[str, WeightShard]], None]) -> Callable[[Path], None]:
    """Change what the second rank saved."""

    def apply(folder: Path) -> None:
        own = cut(WHOLE, CUTS, 2)[1]
        change(own)
        (folder / shard_name(1, 2)).unlink()
        entries = {name: shard.entries for name, shard in own.items()}
        write_tensors(folder / shard_name(1, 2), entries, places(own))

    return apply


DISAGREEMENTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (
        lambda folder: (folder / shard_name(1, 2)).unlink(),
        "weights-00002-of-00002.safetensors is missing",
    ),
    "of another world": (
        lambda folder: write_tensors(folder / shard_name(2, 3), {}, "{}"),
        "weights-00003-of-00003.safetensors does not belong to weights-00001-of-00002.safetensors",
    ),
    "shape": (
        second(lambda own: own.update(a=own["a"]._replace(shape=(4, 3)))),
        r"weights-00002.*: a is float32 \[4, 3\], and float32 \[3, 4\] in another shard",
    ),
    "dtype": (
        second(lambda own: own.update(a=own["a"]._replace(entries=own["a"].entries.double()))),
        "a is float64",
    ),
    "gap": (
        second(lambda own: own.update(a=WeightShard((3, 4), 7, torch.zeros(5)))),
        "do not make up a: entries 6 to 6 are in no shard",
    ),
    "overlap": (
        second(lambda own: own.update(b=WeightShard((5,), 1, torch.zeros(4)))),
        "do not make up b: entries 1 to 1 are in several shards",
    ),
    "end": (
        second(lambda own: own.update(b=WeightShard((5,), 2, torch.zeros(2)))),
        "do not make up b: there are 5 entries, and the shards hold 4",
    ),
    "absent": (second(lambda own: own.pop("a")), "do not make up a: there are 12 entries, and the shards hold 6"),
}


@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_shards_that_disagree_are_one_line(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "step-00000001", cut(WHOLE, CUTS, 2))
    spoil, said = DISAGREEMENTS[kind]
    spoil(folder)
    with pytest.raises(UsageError, match=said) as caught:
        checkpoint.whole_weights(folder)
    assert "\n" not in str(caught.value)
    assert "step-00000001" in str(caught.value)
    assert not list(folder.glob("*model*"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "gone"])
def test_a_damaged_shard_is_one_line_that_names_it(tmp_path: Path, damage: str) -> None:
    folder = write(tmp_path / "step-00000001", cut(WHOLE, CUTS, 2))
    file = folder / shard_name(1, 2)
    content = file.read_bytes()
    broken = {"truncated": content[:-3], "empty": b"", "garbage": b"\x00garbage" * 20}.get(damage)
    if broken is None:
        file.unlink()
    else:
        file.write_bytes(broken)
    attempts: list[Callable[[], object]] = [
        lambda: checkpoint.load_shards(folder, World(1, 1, 2, torch.device("cpu"), "fsdp2")),
        lambda: checkpoint.whole_weights(folder),
    ]
    for attempt in attempts:
        with pytest.raises(UsageError, match=r"weights-00002-of-00002\.safetensors") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_places_stand_beside_the_entries(tmp_path: Path) -> None:
    """What the format promises to other readers."""
    folder = write(tmp_path / "step", cut(WHOLE, CUTS, 2))
    text = (folder / shard_name(1, 2)).read_bytes()
    header = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])
    assert json.loads(header["__metadata__"]["tree"]) == {"a": [[3, 4], 6], "b": [[5], 2]}


def test_only_back_ends_that_divide_weights_take_sharded_checkpoints(cache: Path, tmp_path: Path) -> None:
    config = tiny.config(cache, tmp_path / "run", parallel={"threads": 1, "sharded_checkpoints": True})
    with pytest.raises(UsageError, match=r"sharded_checkpoints needs parallel\.backend fsdp2 .*; this is single"):
        tiny.train(config)
    assert not (tmp_path / "run").exists()
