"""What reaches the model is what a plain reading of the steps gives, and nothing on the way waits for a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gmscale.data.batch import Batch
from gmscale.data.config import AugmentConfig, DataConfig
from gmscale.data.images import device as device_module
from gmscale.data.images.device import Late, draw_late, normalize, to_device
from gmscale.data.images.erasing import erase
from gmscale.data.images.gpu import EncodedImages
from gmscale.data.images.mixing import mix_images, mix_labels

S = 24
CLASSES = 7
CPU = torch.device("cpu")
DATA = DataConfig(image_size=S)
EVERYTHING: dict[str, Any] = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "mix_mode": "elem",
    "erase_prob": 0.5,
    "erase_count": 2,
}


def seeds(count: int) -> NDArray[np.uint64]:
    return np.random.Philox(key=3).random_raw(count)


def batch(count: int, late: Late | None = None, size: int = S) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return Batch(pixels.contiguous(memory_format=torch.channels_last), labels, late)


def plainly(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (DATA.mean, DATA.std))
    return (images.double() / 255 - mean) / std


def test_without_anything_late_images_are_normalised_and_labels_go_as_they_are() -> None:
    given = batch(6)
    images, targets = to_device(given, DATA, AugmentConfig(), CLASSES, CPU)
    assert isinstance(given.images, Tensor)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(images.double(), plainly(given.images), rtol=1e-5, atol=1e-6)
    assert torch.equal(images, normalize(given.images, DATA))
    assert torch.equal(targets, given.labels)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("mix_mode", ["batch", "pair", "elem"])
def test_images_are_mixed_then_normalised_then_erased(mix_mode: Any, mode: Any) -> None:
    augment = AugmentConfig(**EVERYTHING | {"mix_mode": mix_mode, "erase_mode": mode})
    late = draw_late(augment, S, seeds(8), epoch=0)
    assert late is not None
    assert late.mix is not None
    assert late.erasure is not None
    given = batch(8, late)
    images, targets = to_device(given, DATA, augment, CLASSES, CPU)
    assert isinstance(given.images, Tensor)
    expected = given.images.float()
    mix_images(expected, late.mix)
    expected = plainly(expected).float().contiguous(memory_format=torch.channels_last)
    erase(expected, late.erasure, mode)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(targets, mix_labels(given.labels, late.mix, CLASSES))
    assert targets.dtype == torch.float32


def test_images_that_come_encoded_are_treated_like_any_others() -> None:
    augment = AugmentConfig(**EVERYTHING)
    given = batch(4, draw_late(augment, S, seeds(4), epoch=0))
    assert isinstance(given.images, Tensor)
    # As a loader process sends what the device's decoder would refuse: as pixels.
    encoded = EncodedImages(
        data=given.images.permute(0, 2, 3, 1).flatten(),
        ends=torch.arange(1, 5) * 3 * S * S,
        boxes=torch.full((4, 4), -1),
        flags=torch.zeros(4, 3, dtype=torch.bool),
    )
    found = to_device(given._replace(images=encoded), DATA, augment, CLASSES, CPU)
    for ours, expected in zip(found, to_device(given, DATA, augment, CLASSES, CPU), strict=True):
        assert torch.equal(ours, expected)


def test_a_mixed_batch_keeps_soft_targets_where_no_image_was_mixed() -> None:
    augment = AugmentConfig(mixup=1.0, mix_prob=0.0)
    given = batch(4, draw_late(augment, S, seeds(4), epoch=0))
    images, targets = to_device(given, DATA, augment, CLASSES, CPU)
    assert torch.equal(images, to_device(batch(4), DATA, augment, CLASSES, CPU)[0])
    assert torch.equal(targets, F.one_hot(given.labels, CLASSES).float())


def test_the_batch_itself_is_left_alone() -> None:
    augment = AugmentConfig(**EVERYTHING)
    given, same = (batch(8, draw_late(augment, S, seeds(8), epoch=0)) for _ in range(2))
    to_device(given, DATA, augment, CLASSES, CPU)
    for ours, before in zip(tensors(given), tensors(same), strict=True):
        assert torch.equal(ours, before)


def tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple):
        for inner in part:
            yield from tensors(inner)


def test_the_division_of_a_batch_changes_nothing() -> None:
    augment = AugmentConfig(**EVERYTHING)
    whole = batch(12, draw_late(augment, S, seeds(12), epoch=0))
    images, targets = to_device(whole, DATA, augment, CLASSES, CPU)
    for size in (2, 4, 6):
        for first in range(0, 12, size):
            own = slice(first, first + size)
            assert isinstance(whole.images, Tensor)
            part = Batch(whole.images[own], whole.labels[own], draw_late(augment, S, seeds(12)[own], epoch=0))
            for ours, expected in zip(to_device(part, DATA, augment, CLASSES, CPU), (images, targets), strict=True):
                assert torch.equal(ours, expected[own])


@pytest.mark.parametrize("block", [1, 3 * S * S * 4, 3 * S * S * 5])
def test_a_cpu_may_work_in_any_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    augment = AugmentConfig(**EVERYTHING)
    given = batch(10, draw_late(augment, S, seeds(10), epoch=0))
    expected, _ = to_device(given, DATA, augment, CLASSES, CPU)
    monkeypatch.setattr(device_module, "_BLOCK", block)
    assert torch.equal(to_device(given, DATA, augment, CLASSES, CPU)[0], expected)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_normalize_keeps_strides(memory_format: torch.memory_format) -> None:
    images = torch.randint(0, 256, (3, 3, 5, 4), dtype=torch.uint8).contiguous(memory_format=memory_format)
    normalised = normalize(images, DATA)
    assert normalised.stride() == images.stride()
    torch.testing.assert_close(normalised.double(), plainly(images), rtol=1e-5, atol=1e-6)
    half = normalize(images, DATA, torch.bfloat16)
    assert torch.equal(half, normalised.bfloat16())


def test_mixing_ends_with_the_epoch_that_says_so() -> None:
    augment = AugmentConfig(mixup=0.8, mix_off_epoch=3)
    drawn = [draw_late(augment, S, seeds(2), epoch) for epoch in range(5)]
    assert [late is not None for late in drawn] == [True, True, True, False, False]
    erasing_too = draw_late(AugmentConfig(mixup=0.8, mix_off_epoch=3, erase_prob=1.0), S, seeds(2), epoch=3)
    assert erasing_too is not None
    assert erasing_too.mix is None
    assert erasing_too.erasure is not None
    assert draw_late(AugmentConfig(mixup=0.8), S, seeds(2), epoch=1000) is not None


def test_nothing_is_drawn_where_nothing_is_late() -> None:
    assert draw_late(AugmentConfig(), S, seeds(3), epoch=0) is None


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_no_step_needs_a_number_back_from_the_device(mode: Any) -> None:
    # The meta device holds no numbers: .item(), a boolean mask or a size that depends on them would fail.
    augment = AugmentConfig(**EVERYTHING | {"erase_mode": mode})
    given = batch(8, draw_late(augment, S, seeds(8), epoch=0))
    images, targets = to_device(given, DATA, augment, CLASSES, torch.device("meta"))
    assert images.shape == (8, 3, S, S)
    assert targets.shape == (8, CLASSES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_a_gpu_gives_the_same_without_being_waited_for(mode: Any) -> None:
    augment = AugmentConfig(**EVERYTHING | {"erase_mode": mode})
    given = batch(8, draw_late(augment, S, seeds(8), epoch=0))
    expected = to_device(given, DATA, augment, CLASSES, CPU)
    cuda = torch.device("cuda", torch.cuda.current_device())
    pinned = torch.utils.data._utils.pin_memory.pin_memory(given)
    to_device(pinned, DATA, augment, CLASSES, cuda)  # fills the cache of constants
    with no_waiting():
        found = to_device(pinned, DATA, augment, CLASSES, cuda)
    for ours, on_cpu in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), on_cpu, rtol=1e-4, atol=1e-4)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- one channel of brightness ---------------------------------------------------------------------------------

GREY = DataConfig(image_size=S, channels=1)


def pillows(images: Tensor) -> Tensor:
    """Pillow's mode L of uint8 [N, 3, H, W], as [N, 1, H, W]."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L") for image in images]
    return torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures])[:, None]


def plainly_grey(images: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    mean, std = (weights @ torch.tensor(values, dtype=torch.float64) for values in (DATA.mean, DATA.std))
    return (images.double() / 255 - mean) / std


def test_brightness_is_pillows() -> None:
    levels = torch.arange(0, 256, 15, dtype=torch.uint8)
    colours = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 18, -1).contiguous()
    found = normalize(colours, GREY)
    assert found.shape == (1, 1, 18, 324)
    torch.testing.assert_close(found.double(), plainly_grey(pillows(colours)), rtol=1e-4, atol=1e-5)
    pixels = torch.round((found.double() * GREY.statistics[1][0] + GREY.statistics[0][0]) * 255)
    assert torch.equal(pixels.to(torch.uint8), pillows(colours))


def test_training_and_evaluation_see_the_same_brightness() -> None:
    given = batch(6)
    assert isinstance(given.images, Tensor)
    images, targets = to_device(given, GREY, AugmentConfig(), CLASSES, CPU)
    assert images.shape == (6, 1, S, S)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, normalize(given.images, GREY))
    assert torch.equal(targets, given.labels)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("mix_mode", ["batch", "elem"])
def test_brightness_is_mixed_and_erased_like_any_channel(mix_mode: Any, mode: Any) -> None:
    augment = AugmentConfig(**EVERYTHING | {"mix_mode": mix_mode, "erase_mode": mode})
    given = batch(8, draw_late(augment, S, seeds(8), epoch=0))
    assert isinstance(given.images, Tensor)
    images, targets = to_device(given, GREY, augment, CLASSES, CPU)
    # Grey colours: all three channels are the brightness, so each is what one channel has to be.
    grey = pillows(given.images).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    same = DataConfig(image_size=S, mean=GREY.statistics[0] * 3, std=GREY.statistics[1] * 3)
    expected, same_targets = to_device(given._replace(images=grey), same, augment, CLASSES, CPU)
    assert torch.equal(images, expected[:, :1])
    assert torch.equal(targets, same_targets)


def test_a_run_in_brightness_trains_evaluates_and_shows_pictures(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    tiny.build(cache)
    data = {"channels": 1, "batch_size_per_device": 10}
    config = tiny.config(cache, tmp_path / "run", data=data, augment={"mixup": 0.2, "erase_prob": 0.5})
    summary = tiny.train(config).summary
    assert summary is not None
    assert summary["loss"] > 0
    weights = tiny.tensors(tmp_path / "run")
    assert min(t.shape[1] for name, t in weights.items() if "model.safetensors" in name and t.dim() == 4) == 1
    assert Image.open(tmp_path / "run" / "samples" / "000.png").mode == "RGB"
