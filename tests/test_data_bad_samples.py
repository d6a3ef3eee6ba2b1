"""Bad samples in training: replaced alike on every rank, written down, counted, and too many of them fatal."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gmscale.data import (
    AugmentConfig,
    Batch,
    DataConfig,
    Fault,
    FaultLog,
    TrainLoader,
    embedded,
    order,
    train_loader,
)
from gmscale.errors import RunError, UsageError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training pictures in 3 shards."""
    config = DataConfig(cache_dir=str(tmp_path_factory.mktemp("cache")), size=48, image_size=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "SAMPLES_PER_SHARD", 16)
        return embedded.ensure(config)


def opened(config: DataConfig, rank: int = 0, world_size: int = 1, repeats: int = 1) -> TrainLoader:
    train = train_loader(config, AugmentConfig(repeats=repeats), 0, rank, world_size, 1)
    assert isinstance(train, TrainLoader)
    return train


def batches(train: TrainLoader) -> list[Batch]:
    return [batch for step in train.epoch(0) for batch in step]


def images(found: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.images for batch in found if isinstance(batch.images, torch.Tensor)])


def damaged(source: Path, directory: Path, samples: list[int]) -> tuple[DataConfig, list[str]]:
    """Copy the set with the images of these training samples overwritten; return its settings and their names."""
    for path in source.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    config = DataConfig(source=str(directory), image_size=32, batch_size_per_device=4, workers=0, max_bad_share=0.1)
    index = opened(config).index
    names = []
    for i in samples:
        shard = index.split.names[index.shard(i)]
        with open(directory / shard, "r+b") as file:
            file.seek(int(index.offset[i]))
            file.write(bytes(int(index.size[i])))
        names.append(f"{directory / shard}: {i:07}.jpg")
    return config, names


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_replaced_by_its_neighbour_on_every_rank_alike(
    source: Path, tmp_path: Path, workers: int
) -> None:
    neighbours = {5: 6, 20: 22, 21: 22, 47: 32}  # two in a row, and the last of a shard
    config, names = damaged(source, tmp_path, list(neighbours))
    alone = opened(config)
    found = batches(alone)
    faults = [fault for batch in found for fault in batch.faults]
    assert sorted({f"{fault.shard}: {fault.key}.jpg" for fault in faults}) == names
    assert {fault.reason for fault in faults} == {"corrupt image"}

    planned = order.epoch_order(alone.index.lengths, 0, 0)
    used = [neighbours.get(i, i) for i in planned.tolist()]
    assert torch.cat([batch.labels for batch in found]).tolist() == alone.index.label[used].tolist()

    ranks = [opened(replace(config, workers=workers), rank, 2) for rank in range(2)]
    together = [batch for pair in zip(*map(batches, ranks), strict=True) for batch in pair]
    assert torch.equal(images(found), images(together))


def test_every_copy_of_a_bad_sample_is_replaced_alike(source: Path, tmp_path: Path) -> None:
    neighbours = {5: 6, 20: 22, 21: 22, 47: 32}
    config, _ = damaged(source, tmp_path, list(neighbours))
    train = opened(config, repeats=2)
    planned = order.epoch_plan(train.index.lengths, 0, 0, 2, 4).samples.tolist()
    found = batches(train)
    used = [neighbours.get(i, i) for i in planned]
    assert used != planned
    assert torch.cat([batch.labels for batch in found]).tolist() == train.index.label[used].tolist()
    # The copies are other variants of the same neighbour.
    pixels = images(found).flatten(1).tolist()
    assert len({tuple(image) for image in pixels}) == len(pixels)


def test_a_row_of_bad_samples_ends_the_run_and_names_the_first(source: Path, tmp_path: Path) -> None:
    config, names = damaged(source, tmp_path, list(range(48)))
    with pytest.raises(RunError, match=r"and the 31 samples after it cannot be used either") as caught:
        batches(opened(config))
    assert any(str(caught.value).startswith(name) for name in names)
    assert "\n" not in str(caught.value)


def test_samples_found_bad_by_the_index_count_against_the_limit(source: Path, tmp_path: Path) -> None:
    config, _ = damaged(source, tmp_path, [])
    index = opened(config).index
    shard = tmp_path / index.split.names[0]
    with tarfile.open(shard) as tar:
        label = tar.getmember("0000007.cls")
    with open(shard, "r+b") as file:
        file.seek(label.offset_data)
        file.write(b"x")
    train = opened(config)
    assert [(fault.key, fault.reason) for fault in train.faults] == [("0000007", "bad label")]
    assert np.flatnonzero(train.index.label < 0).tolist() == [7]
    assert all(not batch.faults for batch in batches(train))
    with pytest.raises(UsageError, match=r"data\.train_split: 1 of 48 .*1 bad label.*max_bad_share allows 0\.001"):
        opened(replace(config, max_bad_share=0.001))


def test_the_log_of_faults_counts_an_epoch_and_writes_each_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    known = Fault("s", "a.jpg", "no label", "a.jpg has no label")
    faults = [Fault("s", f"{i}.jpg", "corrupt image", f"{i}.jpg does not decode") for i in range(3)]

    def keys() -> list[str]:
        return [json.loads(line)["key"] for line in path.read_text().splitlines()]

    log = FaultLog(path, [known], samples=30, share=0.1)
    assert not path.exists()
    log.add([], 0)
    log.add(faults[:2], 0)  # with the known one, three of thirty
    assert keys() == ["0.jpg", "1.jpg"]
    with pytest.raises(RunError, match=r"^s: 2\.jpg does not decode; 4 of 30 .*max_bad_share allows 0\.1 .*bad"):
        log.add(faults[2:], 0)
    log.add(faults[:1], 1)
    assert log.found == 1
    with pytest.raises(RunError, match="4 of 30"):
        log.check(3)  # over all ranks
    # A resumed run goes on in the same file, whose last line may be torn.
    with path.open("a") as file:
        file.write('{"shard": "s", "ke')
    FaultLog(path, [known], samples=30, share=0.1).write([known, *faults])
    assert keys() == ["0.jpg", "1.jpg", "2.jpg", "a.jpg"]
