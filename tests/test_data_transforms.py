"""Training and evaluation images are timm's of Pillow's; fast and GPU decoding show the same view much alike."""

import dataclasses
import io
import pickle
import random
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from skimage import data as photographs
from sklearn.datasets import load_sample_image
from timm.data import create_transform

from gmscale.data.config import AugmentConfig, DataConfig, Interpolation
from gmscale.data.faults import ImageError
from gmscale.data.images.gpu import EncodedAssembly, EncodedImages, check_device, decode_images
from gmscale.data.images.transforms import (
    FastTransform,
    eval_assembly,
    eval_transform,
    train_assembly,
    train_transform,
)
from gmscale.data.images.views import Augmentation, View
from gmscale.errors import RunError, UsageError

IMAGENET = AugmentConfig(
    crop_scale=(0.08, 1.0),
    crop_ratio=(3 / 4, 4 / 3),
    hflip=0.5,
    vflip=0.25,
    color_jitter=0.0,
    interpolation="random",
)
CPU = torch.device("cpu")
Decode = Literal["exact", "fast", "gpu"]
EvalInterpolation = Literal["bilinear", "bicubic", "lanczos"]


@cache
def jpegs() -> tuple[bytes, ...]:
    shots = [photographs.astronaut(), photographs.chelsea(), photographs.rocket(), load_sample_image("china.jpg")]
    return tuple(encoded(Image.fromarray(shot), quality=90) for shot in shots)


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def part(width: int, height: int, form: str = "JPEG") -> bytes:
    return encoded(Image.fromarray(photographs.coffee()[: height or 1, : width or 1]), form, quality=90)


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def by_timm(data: bytes, size: int, augment: AugmentConfig, seed: int) -> NDArray[np.uint8]:
    transform = create_transform(
        size,
        is_training=True,
        scale=augment.crop_scale,
        ratio=augment.crop_ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment or None,
        interpolation=augment.interpolation,
        use_prefetcher=True,
    )
    seed_all(seed)
    return transform(Image.open(io.BytesIO(data)).convert("RGB")).permute(1, 2, 0).numpy()


def ours(data: bytes, config: DataConfig, augment: AugmentConfig, seed: int) -> NDArray[np.uint8]:
    """Return [S, S, 3], on the CPU also where a GPU would decode."""
    assembly = train_assembly(config, augment)
    images = assembly.begin(1)
    seed_all(seed)
    assembly.put(images, 0, data)
    made = assembly.end(images)
    if isinstance(made, EncodedImages):
        made = decode_images(made, config.image_size, CPU)
    assert made.is_contiguous(memory_format=torch.channels_last)
    return made[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
@pytest.mark.parametrize(
    ("color_jitter", "policy"),
    [
        (0.0, ""),
        (0.4, ""),
        (0.4, "rand-m9-mstd0.5-inc1"),
        (0.0, "rand-n3-m7-p0.7-tlight"),
        (0.0, "augmix-m5-w4-d2"),
        (0.0, "augmix-m9-b1"),
        (0.0, "original"),
        (0.0, "originalr-mstd0.5"),
        (0.0, "v0"),
        (0.0, "v0r-mstd1"),
        (0.4, "3a"),
    ],
)
def test_exact_images_are_timms_bit_for_bit(interpolation: Interpolation, color_jitter: float, policy: str) -> None:
    augment = dataclasses.replace(
        IMAGENET, interpolation=interpolation, color_jitter=color_jitter, auto_augment=policy
    )
    transform = train_transform(DataConfig(image_size=48), augment)
    for seed, data in enumerate(jpegs()):
        expected = by_timm(data, 48, augment, seed)
        seed_all(seed)
        pixels = np.empty((48, 48, 3), dtype=np.uint8)
        transform(data, pixels)
        np.testing.assert_array_equal(pixels, expected)
        assert pixels.flags.c_contiguous


def test_three_augment_goes_with_lanczos() -> None:
    augment = dataclasses.replace(IMAGENET, interpolation="lanczos", color_jitter=0.3, auto_augment="3a")
    for seed, data in enumerate(jpegs()):
        pixels = ours(data, DataConfig(image_size=48), augment, seed)
        np.testing.assert_array_equal(pixels, by_timm(data, 48, augment, seed))


@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.integers(1, 60),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted),
    interpolation=st.sampled_from(["bilinear", "bicubic", "lanczos", "random"]),
    form=st.sampled_from(["JPEG", "PNG"]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_exact_crops_are_timms_for_any_shape(
    width: int,
    height: int,
    size: int,
    scale: list[float],
    ratio: list[float],
    interpolation: Interpolation,
    form: str,
    seed: int,
) -> None:
    augment = dataclasses.replace(
        IMAGENET,
        crop_scale=(scale[0], scale[1]),
        crop_ratio=(ratio[0], ratio[1]),
        interpolation=interpolation,
        vflip=0.0,
    )
    data = part(width, height, form)
    expected = by_timm(data, size, augment, seed)
    np.testing.assert_array_equal(ours(data, DataConfig(image_size=size), augment, seed), expected)


@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    factor=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_a_shrunk_view_lies_within_the_shrunk_image(width: int, height: int, factor: int, seed: int) -> None:
    seed_all(seed)
    view = Augmentation(DataConfig(), IMAGENET).draw(height, width)
    small = view.shrunk(factor)
    assert 0 <= small.top <= small.top + small.height <= -(-height // factor)
    assert 0 <= small.left <= small.left + small.width <= -(-width // factor)
    assert abs(small.top * factor - view.top) <= factor / 2
    assert abs((small.left + small.width) * factor - (view.left + view.width)) <= factor / 2


def difference(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> float:
    return float(np.abs(images.astype(int) - others.astype(int)).mean())


@pytest.mark.parametrize("decode", ["fast", "gpu"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_faster_ways_differ_little_from_exact(decode: Decode, interpolation: Interpolation) -> None:
    augment = dataclasses.replace(IMAGENET, interpolation=interpolation)
    config = DataConfig(image_size=224, decode=decode)
    for seed in range(12):
        data = jpegs()[seed % 4]
        exact = ours(data, DataConfig(image_size=224), augment, seed)
        assert difference(ours(data, config, augment, seed), exact) < 0.25


def test_reduced_jpegs_differ_by_a_few_levels_from_exact() -> None:
    config = DataConfig(image_size=64, decode="fast")
    transform = FastTransform(config, IMAGENET)
    found = []
    for seed in range(24):
        data = jpegs()[seed % 4]
        seed_all(seed)
        view = transform.augmentation.draw(*np.asarray(Image.open(io.BytesIO(data))).shape[:2])
        shrink, small = transform.reduced(view)
        if shrink > 1:
            assert min(small.height, small.width) >= 64
            exact = ours(data, DataConfig(image_size=64), IMAGENET, seed)
            found.append(difference(ours(data, config, IMAGENET, seed), exact))
    assert len(found) > 12
    assert np.mean(found) < 3
    assert max(found) < 8


@given(
    width=st.integers(1, 300), height=st.integers(1, 300), size=st.integers(1, 80), seed=st.integers(0, 2**32 - 1)
)
@settings(max_examples=60, deadline=None)
def test_faster_ways_take_any_shape(width: int, height: int, size: int, seed: int) -> None:
    data = part(width, height)
    exact = ours(data, DataConfig(image_size=size), IMAGENET, seed)
    gpu = ours(data, DataConfig(image_size=size, decode="gpu"), IMAGENET, seed)
    assert difference(gpu, exact) < 2
    assert ours(data, DataConfig(image_size=size, decode="fast"), IMAGENET, seed).shape == (size, size, 3)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_other_formats_are_resized_fast(form: str) -> None:
    data = part(150, 130, form)
    exact = ours(data, DataConfig(image_size=32), IMAGENET, 0)
    assert difference(ours(data, DataConfig(image_size=32, decode="fast"), IMAGENET, 0), exact) < 0.25


def test_fast_images_are_augmented_further_like_exact_ones() -> None:
    augment = dataclasses.replace(IMAGENET, auto_augment="rand-m9-mstd0.5", interpolation="bilinear")
    for seed in range(4):
        exact = ours(jpegs()[seed], DataConfig(image_size=224), augment, seed)
        fast = ours(jpegs()[seed], DataConfig(image_size=224, decode="fast"), augment, seed)
        assert difference(fast, exact) < 4


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("crop_pct", [0.5, 0.875, 0.95, 1.0])
def test_evaluation_images_are_timms_bit_for_bit(crop_pct: float, interpolation: EvalInterpolation) -> None:
    config = DataConfig(image_size=40, crop_pct=crop_pct, eval_interpolation=interpolation, decode="fast")
    transform = eval_transform(config)
    reference = create_transform(40, interpolation=interpolation, crop_pct=crop_pct, use_prefetcher=True)
    for data in (*jpegs(), part(1, 60), part(40, 40), part(39, 77, "PNG")):
        expected = reference(Image.open(io.BytesIO(data)).convert("RGB")).permute(1, 2, 0)
        found = np.empty((40, 40, 3), dtype=np.uint8)
        transform(data, found)
        np.testing.assert_array_equal(found, expected)


def test_an_image_of_the_right_size_is_evaluated_as_it_is() -> None:
    data = part(40, 40)
    assembly = eval_assembly(DataConfig(image_size=40))
    images = assembly.begin(2)
    assembly.put(images, 0, data)
    assembly.put(images, 1, data)
    made = assembly.end(images)
    assert isinstance(made, torch.Tensor)
    np.testing.assert_array_equal(made[1].permute(1, 2, 0), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("decode", ["exact", "fast", "gpu"])
def test_assemblies_are_the_same_after_a_journey_to_another_process(decode: Decode) -> None:
    augment = IMAGENET if decode == "gpu" else dataclasses.replace(IMAGENET, auto_augment="rand-m9-mstd0.5-inc1")
    config = DataConfig(image_size=32, decode=decode)
    assembly = train_assembly(config, augment)
    copy = pickle.loads(pickle.dumps(assembly))
    images = []
    for one in (assembly, copy):
        place = one.begin(1)
        seed_all(3)
        one.put(place, 0, jpegs()[0])
        made = one.end(place)
        images.append(made if isinstance(made, EncodedImages) else (made,))
    assert all(torch.equal(*pair) for pair in zip(*images, strict=True))


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"auto_augment": "rnad-m9"}, ["augment.auto_augment", "rnad-m9"]),
        ({"decode": "gpu", "auto_augment": "rand-m9"}, ["data.decode", "augment.auto_augment"]),
        ({"decode": "gpu", "color_jitter": 0.4}, ["data.decode", "augment.color_jitter"]),
        ({"decode": "gpu", "interpolation": "lanczos"}, ["data.decode", "augment.interpolation"]),
        ({"decode": "fast", "interpolation": "lanczos"}, ["data.decode", "augment.interpolation"]),
        (
            {"auto_augment": "rand-m9", "interpolation": "lanczos"},
            ["augment.auto_augment", "augment.interpolation"],
        ),
    ],
)
def test_what_no_transform_can_do_is_refused_by_name(settings_: dict[str, Any], words: list[str]) -> None:
    settings_ = dict(settings_)
    config = DataConfig(decode=settings_.pop("decode", "exact"))
    with pytest.raises(UsageError) as caught:
        train_assembly(config, dataclasses.replace(IMAGENET, **settings_))
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("decode", ["exact", "fast", "gpu"])
@pytest.mark.parametrize("data", [b"", b"<html>", part(100, 100)[:-200]])
def test_a_bad_image_leaves_its_row_to_another(decode: Decode, data: bytes) -> None:
    assembly = train_assembly(DataConfig(image_size=32, decode=decode), IMAGENET)
    images = assembly.begin(1)
    with pytest.raises(ImageError):
        assembly.put(images, 0, data)
    assembly.put(images, 0, jpegs()[0])
    assert len(assembly.end(images)[0]) > 0


def mixed_batch() -> tuple[list[bytes], EncodedImages]:
    """JPEGs for a GPU, and four images that loader processes decode."""
    inks = encoded(Image.fromarray(photographs.coffee()).convert("CMYK"))
    rgb = encoded(Image.fromarray(photographs.coffee()), keep_rgb=True)
    grey = encoded(Image.fromarray(photographs.coffee()).convert("L"))
    progressive = encoded(Image.fromarray(photographs.coffee()), progressive=True)
    batch = [jpegs()[0], part(60, 50, "PNG"), grey, inks, progressive, rgb, jpegs()[1] + b"after the end"]
    assembly = EncodedAssembly(DataConfig(image_size=48, decode="gpu"), IMAGENET)
    images = assembly.begin(len(batch))
    for row in reversed(range(len(batch))):
        seed_all(row)
        assembly.put(images, row, batch[row])
    return batch, assembly.end(images)


def assert_nearly_exact(batch: list[bytes], made: torch.Tensor, most: float) -> None:
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert made.dtype == torch.uint8
    for row, data in enumerate(batch):
        exact = ours(data, DataConfig(image_size=48), IMAGENET, row)
        assert difference(made[row].permute(1, 2, 0).cpu().numpy(), exact) < most


def test_a_batch_mixes_what_the_device_decodes_and_what_it_cannot() -> None:
    batch, images = mixed_batch()
    assert (images.boxes[:, 2] < 0).tolist() == [False, True, False, True, False, True, True]
    assert_nearly_exact(batch, decode_images(images, 48, CPU), 0.25)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_decodes_nearly_exactly() -> None:
    device = torch.device("cuda")
    check_device(device)
    batch, images = mixed_batch()
    made = decode_images(EncodedImages(*(part.pin_memory() for part in images)), 48, device)
    assert made.device.type == "cuda"
    assert_nearly_exact(batch, made, 3)  # nvJPEG interpolates colours otherwise


def test_a_device_other_than_a_gpu_is_refused() -> None:
    with pytest.raises(UsageError, match=r"data\.decode gpu needs a CUDA device, not cpu; expected exact or fast"):
        check_device(CPU)


def test_a_damaged_jpeg_in_a_batch_is_an_error() -> None:
    _, images = mixed_batch()
    broken = images.data.clone()
    broken[2:300] = 0
    with pytest.raises(RunError, match=r"^data\.decode gpu: .*exact or fast"):
        decode_images(images._replace(data=broken), 48, CPU)


def test_what_a_device_refuses_is_decoded_by_the_processor() -> None:
    data = part(48, 48, "PNG")
    images = EncodedImages(
        data=torch.frombuffer(bytearray(data), dtype=torch.uint8),
        ends=torch.tensor([len(data)]),
        boxes=torch.tensor([[0, 0, 48, 48]]),
        flags=torch.tensor([[False, True, False]]),
    )
    made = decode_images(images, 48, CPU)[0].permute(1, 2, 0)
    np.testing.assert_array_equal(made, np.asarray(Image.open(io.BytesIO(data)))[:, ::-1])


def test_a_view_says_what_is_shown() -> None:
    seed_all(0)
    view = Augmentation(DataConfig(), dataclasses.replace(IMAGENET, hflip=1.0, vflip=0.0)).draw(30, 20)
    assert isinstance(view, View)
    assert (view.mirrored, view.upside_down) == (True, False)
    assert view.interpolation in ("bilinear", "bicubic")


@pytest.mark.parametrize("decode", ["exact", "fast"])
@pytest.mark.parametrize("size", [32, 224])
def test_irregular_jpegs_are_shown_like_regular_ones_unless_strict(decode: Decode, size: int) -> None:
    regular = jpegs()[0]
    irregular = regular[:-2] + bytes(50) + regular[-2:]
    config = DataConfig(image_size=size, decode=decode)
    with pytest.raises(ImageError):
        ours(irregular, config, IMAGENET, 0)
    found = ours(irregular, dataclasses.replace(config, strict=False), IMAGENET, 0)
    assert difference(found, ours(regular, config, IMAGENET, 0)) < 8  # decoded whole, where the other is reduced


def test_a_policy_that_timm_reads_and_cannot_carry_out_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"augment\.auto_augment 'augmix-m5-w4-d0-a0': alpha"):
        train_transform(DataConfig(image_size=32), AugmentConfig(auto_augment="augmix-m5-w4-d0-a0"))


@pytest.mark.parametrize("policy", ["rand-m10-inc1-n30", "augmix-m10-w8-d8", "v0r", "original", "3a"])
def test_the_strongest_posterize_does_not_end_the_training(policy: str) -> None:
    """Pillow 13 refuses to keep 0 bits, which timm asks for at the highest levels."""
    views = Augmentation(DataConfig(image_size=16), AugmentConfig(auto_augment=policy))
    image = Image.fromarray(np.full((16, 16, 3), 200, dtype=np.uint8))
    for seed in range(60):
        random.seed(seed)
        np.random.seed(seed)
        assert views.change(image).size == image.size
    operations = [
        o for c in views.changes for e in getattr(c, "ops", getattr(c, "policy", [])) for o in np.ravel(e)
    ]
    for operation in operations:
        if "Posterize" in operation.name:
            assert not np.asarray(operation.aug_fn(image, 0)).any()
            assert np.asarray(operation.aug_fn(image, 1)).max() == 128
