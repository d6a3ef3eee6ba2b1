"""The order's laws, and a loader that gives the same batches however it is divided, staffed or resumed."""

import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import get_worker_info

from gmscale.data import (
    AugmentConfig,
    Batch,
    DataConfig,
    TrainLoader,
    ValLoader,
    embedded,
    loader,
    order,
    to_device,
    train_loader,
    val_loader,
    workers,
)
from gmscale.data.images import transforms
from gmscale.data.images.transforms import Transform, eval_transform
from gmscale.data.index import read
from gmscale.errors import RunError, UsageError

shard_lengths = st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any).map(np.array)
seeds = st.integers(0, 2**32)
epochs = st.integers(0, 1000)
small = st.integers(1, 5)


# ---- order -------------------------------------------------------------------------------------------------


@given(shard_lengths, seeds, epochs)
def test_an_epoch_holds_every_sample_once(lengths: np.ndarray, seed: int, epoch: int) -> None:
    samples = order.epoch_order(lengths, seed, epoch)
    assert samples.dtype == np.int64
    assert sorted(samples) == list(range(lengths.sum()))
    assert np.array_equal(samples, order.epoch_order(lengths, seed, epoch))


def test_orders_differ_between_epochs_and_seeds() -> None:
    lengths = np.full(4, 100)
    first = order.epoch_order(lengths, 0, 0)
    for seed, epoch in ((0, 1), (1, 0)):
        # Of two independent permutations about one sample stays in place.
        assert (first == order.epoch_order(lengths, seed, epoch)).sum() < 10


def test_an_order_is_for_ever() -> None:
    # A resumed run depends on it, whatever versions it is resumed with.
    assert order.epoch_order(np.array([3, 2, 4]), 7, 5).tolist() == [1, 3, 0, 6, 5, 4, 7, 2, 8]


@given(st.integers(17, 60), seeds, epochs)
def test_shuffling_stays_within_a_window_of_shards(shards: int, seed: int, epoch: int) -> None:
    samples = order.epoch_order(np.full(shards, 3), seed, epoch)
    for first in range(0, shards, order.WINDOW):
        window = samples[3 * first : 3 * (first + order.WINDOW)]
        assert len({sample // 3 for sample in window}) == len(window) / 3


@given(st.integers(1, 300), seeds, small, small, small)
def test_ranks_share_a_step_equally_and_exactly(
    count: int, seed: int, world_size: int, batch_size: int, grad_accum_steps: int
) -> None:
    samples = order.epoch_order(np.array([count]), seed, 0)
    global_batch = batch_size * world_size * grad_accum_steps
    seen: list[int] = []
    for step in range(count // global_batch):
        for rank in range(world_size):
            batches = order.micro_batches(samples, step, rank, world_size, batch_size, grad_accum_steps)
            assert [len(batch) for batch in batches] == [batch_size] * grad_accum_steps
            seen += np.concatenate(batches).tolist()
    assert seen == samples[: count - count % global_batch].tolist()


@given(st.sampled_from([(8, 32, 1), (4, 64, 1), (1, 256, 1), (2, 32, 4), (1, 8, 32)]), st.integers(0, 3))
def test_the_division_of_a_global_batch_does_not_change_it(division: tuple[int, int, int], step: int) -> None:
    samples = order.epoch_order(np.full(3, 400), 0, 0)
    world_size, batch_size, grad_accum_steps = division
    parts = [
        batch
        for rank in range(world_size)
        for batch in order.micro_batches(samples, step, rank, world_size, batch_size, grad_accum_steps)
    ]
    assert np.concatenate(parts).tolist() == samples[256 * step : 256 * (step + 1)].tolist()


@given(st.integers(0, 200), st.integers(1, 30))
def test_validation_shares_hold_every_sample_once(count: int, world_size: int) -> None:
    shares = [order.rank_share(count, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(shares).tolist() == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_step_larger_than_the_split_is_refused() -> None:
    assert order.steps_per_epoch(100, 32) == 3
    with pytest.raises(UsageError, match=r"data\.batch_size_per_device .*takes 128 .*split has 100"):
        order.steps_per_epoch(100, 128)


# ---- repeated augmentation -----------------------------------------------------------------------------------


@given(shard_lengths, seeds, epochs, st.integers(1, 40))
def test_without_repeats_an_epoch_is_what_it_was(lengths: np.ndarray, seed: int, epoch: int, size: int) -> None:
    plan = order.epoch_plan(lengths, seed, epoch, 1, size)
    assert np.array_equal(plan.samples, order.epoch_order(lengths, seed, epoch))
    expected = order.augmentation_seeds(int(lengths.sum()), seed, epoch)[plan.samples]
    assert np.array_equal(plan.seeds, expected)


@given(shard_lengths, seeds, epochs, st.integers(2, 5), st.integers(1, 40))
def test_repeats_keep_the_length_and_take_the_first_of_the_order(
    lengths: np.ndarray, seed: int, epoch: int, repeats: int, size: int
) -> None:
    plan = order.epoch_plan(lengths, seed, epoch, repeats, size)
    whole = order.epoch_order(lengths, seed, epoch)
    count = len(whole)
    # timm's RepeatAugSampler: the order with each sample repeated, cut into global batches.
    for first in range(0, count, size):
        batch = slice(first, first + size)
        assert sorted(plan.samples[batch]) == sorted(np.repeat(whole, repeats)[:count][batch])
    assert len(set(plan.seeds.tolist())) == count
    assert set(zip(plan.samples, plan.seeds, strict=True)) == set(
        zip(*order.epoch_plan(lengths, seed, epoch, repeats, 1), strict=True)
    )
    one_copy = dict(zip(*order.epoch_plan(lengths, seed, epoch), strict=True))
    pairs = set(zip(plan.samples, plan.seeds, strict=True))
    assert all((sample, one_copy[sample]) in pairs for sample in plan.samples)


@given(st.integers(2, 4), st.sampled_from([2, 4, 8]), st.sampled_from([1, 2, 4]), seeds)
def test_neighbours_and_ranks_have_different_samples(
    repeats: int, rank_batch: int, accumulate: int, seed: int
) -> None:
    division = 4, rank_batch, accumulate
    size = 4 * rank_batch * accumulate
    plan = order.epoch_plan(np.full(5, 64), seed, 0, repeats, size)
    for rank in range(4):
        for batch in order.micro_batches(plan.samples, 1, rank, *division):
            assert len(set(batch)) == len(batch)


def test_another_epoch_repeats_other_samples() -> None:
    chosen = [set(order.epoch_plan(np.full(4, 60), 0, epoch, 3, 24).samples.tolist()) for epoch in range(20)]
    assert {len(samples) for samples in chosen} == {80}
    assert len(set.union(*chosen)) > 230


# ---- loader ------------------------------------------------------------------------------------------------


# All three random generators are drawn from, in the loader process and for the device.
AUGMENT = AugmentConfig(
    auto_augment="augmix-m5-w4-d2", hflip=0.5, erase_prob=0.5, mixup=0.2, cutmix=1.0, mix_mode="elem"
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """48 training pictures in 3 shards, 12 for validation; augmented by all three random generators."""
    cache = tmp_path_factory.mktemp("cache")
    config = DataConfig(
        cache_dir=str(cache),
        size=48,
        image_size=32,
        batch_size_per_device=4,
        eval_batch_size_per_device=5,
        workers=0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "SAMPLES_PER_SHARD", 16)
        embedded.ensure(config)
    return config


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "available_cores", lambda: 3)


def flatten(steps: list[list[Batch]]) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [batch for step in steps for batch in step]
    images = [batch.images for batch in batches if isinstance(batch.images, torch.Tensor)]
    return torch.cat(images), torch.cat([batch.labels for batch in batches])


def prepared(steps: list[list[Batch]], config: DataConfig) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what the model takes: images mixed, normalised and erased, with their targets."""
    cpu = torch.device("cpu")
    return [to_device(batch, config, AUGMENT, 10, cpu) for step in steps for batch in step]


def same(first: list[list[Batch]], second: list[list[Batch]], config: DataConfig) -> bool:
    pairs = zip(prepared(first, config), prepared(second, config), strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def opened(
    config: DataConfig, seed: int = 0, rank: int = 0, world_size: int = 1, grad_accum_steps: int = 1
) -> TrainLoader:
    train = train_loader(config, AUGMENT, seed, rank, world_size, grad_accum_steps)
    assert isinstance(train, TrainLoader)
    return train


def opened_val(config: DataConfig, rank: int = 0, world_size: int = 1) -> ValLoader:
    val = val_loader(config, rank, world_size)
    assert isinstance(val, ValLoader)
    return val


def test_batches_are_channels_last_bytes_in_the_planned_order(config: DataConfig) -> None:
    train = opened(config, seed=1, rank=1, world_size=2, grad_accum_steps=3)
    assert (train.global_batch_size, train.steps_per_epoch, len(train.classes)) == (24, 2, 10)
    steps = list(train.epoch(0))
    assert [len(step) for step in steps] == [3, 3]
    planned = order.epoch_order(train.index.lengths, 1, 0).reshape(2, 2, 12)[:, 1].ravel()
    images, labels = flatten(steps)
    assert labels.tolist() == train.index.label[planned].tolist()
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    for batch in steps[0]:
        assert isinstance(batch.images, torch.Tensor)
        assert batch.images.shape == (4, 3, 32, 32)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


def open_train(config: DataConfig) -> TrainLoader:
    return opened(config, seed=3, grad_accum_steps=2)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_and_resumes_change_nothing(config: DataConfig) -> None:
    expected = {epoch: list(open_train(config).epoch(epoch)) for epoch in (0, 1)}
    assert not same(expected[0], expected[1], config)
    for count in (0, 1, 3):
        train = open_train(replace(config, workers=count))
        # The second epoch abandons the first, whose batches may still be under way in the workers.
        assert same([next(train.epoch(0))], expected[0][:1], config)
        assert same(list(train.epoch(1)), expected[1], config)
        for start_step in (2, train.steps_per_epoch - 1):
            assert same(list(train.epoch(0, start_step)), expected[0][start_step:], config)
        assert list(train.epoch(0, train.steps_per_epoch)) == []


@pytest.mark.parametrize(("batch_size", "world_size", "workers"), [(2, 4, 0), (4, 2, 1), (8, 1, 2)])
def test_a_global_batch_does_not_depend_on_its_division_also_after_a_resume(
    config: DataConfig, batch_size: int, world_size: int, workers: int
) -> None:
    # Half of an epoch by one process, the rest by another number of them.
    alone = prepared(list(opened(replace(config, batch_size_per_device=8)).epoch(1)), config)
    settings = replace(config, batch_size_per_device=batch_size, workers=workers)
    ranks = [opened(settings, rank=rank, world_size=world_size) for rank in range(world_size)]
    steps = list(zip(*(rank.epoch(1, start_step=3) for rank in ranks), strict=True))
    assert len(alone) == 6
    assert len(steps) == 3
    for (images, targets), step in zip(alone[3:], steps, strict=True):
        parts = prepared(list(step), config)
        assert torch.equal(images, torch.cat([part for part, _ in parts]))
        assert torch.equal(targets, torch.cat([part for _, part in parts]))


@pytest.mark.parametrize(("batch_size", "world_size", "accumulate", "workers"), [(2, 4, 1, 0), (2, 2, 2, 1)])
def test_repeats_do_not_depend_on_the_division_of_a_global_batch_also_after_a_resume(
    config: DataConfig, batch_size: int, world_size: int, accumulate: int, workers: int
) -> None:
    augment = replace(AUGMENT, repeats=3)

    def run(size: int, ranks: int, accumulate: int, workers: int, start: int) -> list[torch.Tensor]:
        settings = replace(config, batch_size_per_device=size, workers=workers)
        loaders = [train_loader(settings, augment, 0, rank, ranks, accumulate) for rank in range(ranks)]
        steps = zip(*(loader.epoch(1, start) for loader in loaders), strict=True)
        return [torch.cat([part for part, _ in prepared(list(step), config)]) for step in steps]

    alone = run(8, 1, 1, 0, 0)
    assert len(alone) == 6
    assert all(len({tuple(image.flatten().tolist()) for image in images}) == 8 for images in alone)
    for found, expected in zip(run(batch_size, world_size, accumulate, workers, 2), alone[2:], strict=True):
        assert torch.equal(found, expected)


def test_remote_shards_are_fetched_in_the_order_in_which_repeats_read_them(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = train_loader(config, replace(AUGMENT, repeats=3), 0, 0, 1, 1)
    assert isinstance(train, TrainLoader)
    fetched: list[str] = []
    local = type(train.index.split.directory)
    monkeypatch.setattr(loader, "RemoteDirectory", local)
    monkeypatch.setattr(local, "prefetch", lambda self, names: fetched.extend(names), raising=False)
    next(train.epoch(2, 3))
    read_later = order.epoch_plan(train.index.lengths, 0, 2, 3, 4).samples[3 * 4 :]
    names = [train.index.split.names[train.index.shard(int(i))] for i in read_later]
    assert fetched == list(dict.fromkeys(names))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_training_process_keeps_its_random_states(config: DataConfig, workers: int) -> None:
    def draw() -> list[float]:
        return [random.random(), np.random.random(), torch.rand(()).item()]

    def seed() -> None:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    seed()
    expected = draw()
    seed()
    list(open_train(replace(config, workers=workers)).epoch(0))
    list(val_loader(replace(config, workers=workers), 0, 1))
    assert draw() == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 5, 13])
def test_validation_counts_every_sample_once(config: DataConfig, workers: int, world_size: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        share = opened_val(replace(config, workers=workers), rank, world_size)
        assert len(share.index) == 12
        for images, labels, indices in share:
            assert images.shape == (len(labels), 3, 32, 32)
            assert labels.tolist() == [share.index.label[i] for i in indices]
            seen += indices.tolist()
    assert seen == list(range(12))


def test_validation_pictures_are_the_stored_ones_each_time(config: DataConfig) -> None:
    val = opened_val(config)
    (first, *_), *_ = val
    (second, *_), *_ = val
    stored = Image.open(io.BytesIO(read(val.index, 0)))
    assert torch.equal(first, second)
    assert np.array_equal(first[0].permute(1, 2, 0).numpy(), np.asarray(stored))


def broken(config: DataConfig, directory: Path, content: bytes) -> tuple[DataConfig, str]:
    """Copy the set with the second validation picture's bytes overwritten; return its settings and shard."""
    source = embedded.ensure(config)
    for path in source.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    shard = directory / "gmscale-validation-0000.tar"
    with tarfile.open(shard) as tar:
        member = tar.getmember("0000001.jpg")
    data = bytearray(shard.read_bytes())
    data[member.offset_data : member.offset_data + member.size] = content.ljust(member.size, b"\0")
    shard.write_bytes(data)
    return replace(config, source=str(directory)), f"{shard}: 0000001.jpg does not decode"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 no picture", b"\x89PNG\r\n\x1a\n" + b"x" * 50])
def test_a_picture_that_does_not_decode_is_named(
    config: DataConfig, tmp_path: Path, workers: int, content: bytes
) -> None:
    config, message = broken(config, tmp_path, content)
    said = failure(opened_val(replace(config, workers=workers)))
    assert said.startswith(message)
    assert "\n" not in said
    assert not multiprocessing.active_children()


def failure(batches: ValLoader) -> str:
    """Return what the loader's RunError says. Not pytest.raises, which would keep the loader and its workers."""
    try:
        list(batches)
    except RunError as error:
        return str(error)
    raise AssertionError("no RunError")


def test_a_shard_removed_during_the_run_is_named(config: DataConfig, tmp_path: Path) -> None:
    config, _ = broken(config, tmp_path, b"")
    val = opened_val(config)
    (tmp_path / "gmscale-validation-0000.tar").unlink()
    assert "gmscale-validation-0000.tar cannot be read: No such file" in failure(val)


class SignalledTransform:
    """An eval transform whose worker first receives each signal that a scheduler may send."""

    def __init__(self, config: DataConfig) -> None:
        self.transform: Transform = eval_transform(config)

    def __call__(self, encoded: bytes, out: np.ndarray) -> None:
        assert get_worker_info() is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert torch.get_num_threads() == 1
        self.transform(encoded, out)


def test_workers_outlive_the_schedulers_signals(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "eval_transform", SignalledTransform)
    assert sum(len(labels) for _, labels, _ in val_loader(replace(config, workers=2), 0, 1)) == 12


def test_a_process_that_fails_within_an_epoch_ends_at_once(config: DataConfig) -> None:
    # multiprocessing ends the workers at exit with SIGTERM, and waits for them.
    program = f"""
from gmscale.data import *
epoch = train_loader({replace(config, workers=1)!r}, AugmentConfig(), 0, 0, 1, 1).epoch(0)
next(epoch)
raise SystemExit(7)
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")
    assert time.monotonic() - start < 30


# ---- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 3),
        ("image_size", 0),
        ("batch_size_per_device", 0),
        ("eval_batch_size_per_device", 0),
        ("workers", -1),
        ("cache_gb", 0),
        ("max_bad_share", 1.5),
        ("crop_pct", 0),
        ("label", "json."),
        ("mean", (0.5, 0.5, 128.0)),
        ("std", (0.5, 0.0, 0.5)),
    ],
)
def test_a_setting_of_the_data_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"data\.{field}"):
        DataConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.5, 1.1)),
        ("crop_scale", (0.9, 0.5)),
        ("crop_ratio", (2.0, 1.0)),
        ("hflip", 1.5),
        ("vflip", -0.1),
        ("color_jitter", float("nan")),
        ("erase_prob", 2),
        ("erase_count", 0),
        ("mixup", -1),
        ("cutmix_minmax", (0.9, 0.2)),
        ("mix_switch_prob", 1.1),
        ("mix_off_epoch", -1),
    ],
)
def test_a_setting_of_the_augmentation_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"augment\.{field}"):
        AugmentConfig(**{field: value})  # type: ignore[arg-type]


def test_mixing_needs_batches_of_pairs(config: DataConfig) -> None:
    with pytest.raises(UsageError, match=r"data\.batch_size_per_device"):
        train_loader(replace(config, batch_size_per_device=3), AUGMENT, 0, 0, 1, 1)
