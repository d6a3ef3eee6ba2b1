"""Objects' boxes: from each source, where the evaluation transform puts them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_shards import opened, write_tar

from gmscale.data import DataConfig, ShardIndex, val_loader
from gmscale.data.images.transforms import EvalTransform
from gmscale.errors import UsageError
from gmscale.evaluation.saliency.boxes import Boxes, in_view

DATA = DataConfig(image_size=32, crop_pct=1.0)


def png(width: int, height: int, box: tuple[int, int, int, int] | None = None) -> bytes:
    """A black image with a white box."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    if box is not None:
        x0, y0, x1, y1 = box
        pixels[y0:y1, x0:x1] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def shards(folder: Path, samples: dict[str, Any], size: tuple[int, int] = (32, 32)) -> ShardIndex:
    """Two shards of PNGs of a size whose JSON is given by key; None for none."""
    keys = list(samples)
    halves = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    names = [f"t-train-{number:04}.tar" for number in range(2)]
    for name, half in zip(names, halves, strict=True):
        members = []
        for key in half:
            text = samples[key] if isinstance(samples[key], bytes) else json.dumps(samples[key]).encode()
            members += [(f"{key}.cls", b"0"), *([(f"{key}.json", text)] if samples[key] is not None else [])]
            members.append((f"{key}.png", png(*size)))
        write_tar(folder / name, members)
    split = {"name": "train", "filenames": names, "shard_lengths": [len(half) for half in halves]}
    split["num_samples"] = len(keys)
    (folder / "_info.json").write_text(json.dumps({"name": "t", "classes": ["a"], "splits": {"train": split}}))
    return opened(folder)


def xml(*boxes: tuple[int, int, int, int], size: tuple[int, int] | None = (32, 32)) -> str:
    edges = "".join(
        f"<object><name>n01</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox>"
        "</object>"
        for a, b, c, d in boxes
    )
    known = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"<annotation>{known}{edges}</annotation>"


def lists(found: list[torch.Tensor]) -> list[Any]:
    return [boxes.tolist() for boxes in found]


# ---- where the transform puts them -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(20, 150),
    height=st.integers(20, 150),
    crop_pct=st.sampled_from([1.0, 0.95, 0.875, 0.5]),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_a_box_is_where_the_transform_puts_its_pixels(
    width: int, height: int, crop_pct: float, corners: tuple[float, float, float, float]
) -> None:
    # not so thin that resizing dims them
    x0, x1 = sorted(round(corner * (width - 6)) for corner in corners[:2])
    y0, y1 = sorted(round(corner * (height - 6)) for corner in corners[2:])
    box = x0, y0, x1 + 6, y1 + 6
    data = DataConfig(image_size=64, crop_pct=crop_pct)
    seen = np.zeros((64, 64, 3), dtype=np.uint8)
    EvalTransform(data)(png(width, height, box), seen)
    found = in_view(torch.tensor([box]), (width, height), data)
    lit = seen[..., 0] > seen.max() / 2
    rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
    if len(found) == 0 or (found[0, 2:] - found[0, :2]).amin() < 1:  # outside, but for its edge's blur
        assert seen.max() < 127 or min(len(rows), len(columns)) <= 2
        return
    np.testing.assert_allclose(found[0], [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], atol=1)


def test_boxes_are_cut_to_the_view() -> None:
    data = DataConfig(image_size=50, crop_pct=0.5)  # 100 x 200 stays, its middle from (25, 75) on is seen
    boxes = torch.tensor([[0, 0, 200, 200], [30, 80, 40, 95], [0, 0, 25, 200], [70, 0, 100, 76]])
    assert in_view(boxes, (100, 200), data).tolist() == [[0, 0, 50, 50], [5, 5, 15, 20], [45, 0, 50, 1]]


# ---- sources -----------------------------------------------------------------------------------------------------


def test_the_embedded_set_has_its_boxes(cache: Path) -> None:
    data = DataConfig(size=100, image_size=32, cache_dir=str(cache), workers=0)
    loader = val_loader(data, 0, 1)
    boxes = Boxes(loader.index, data)  # type: ignore[union-attr]
    for images, _, indices in loader:
        for image, objects in zip(images, boxes.of(indices.tolist()), strict=True):
            ((x0, y0, x1, y1),) = objects.int().tolist()
            brightness = image.float().amax(0)
            inside = brightness[y0:y1, x0:x1].amax()
            brightness[y0:y1, x0:x1] = 0
            assert inside > brightness.median() + 50  # ink is bright


def test_json_in_the_shards(tmp_path: Path) -> None:
    index = shards(
        tmp_path,
        {
            "a": {"box": [1, 2, 3, 4]},
            "dir/b": {"boxes": [[1, 2, 3, 4], [5, 6.5, 7, 8]]},
            "c": {"box": "a cardboard one"},
            "d": None,
            "e": {"boxes": []},
            "f": [1, 2, 3, 4],
            "g": {"box": [-10, 0, 100, 32]},
        },
    )
    first = [[1, 2, 3, 4]]
    expected: list[Any] = [first, [*first, [5, 6.5, 7, 8]], [], [], [], [], [[0, 0, 32, 32]]]
    boxes = Boxes(index, DATA)
    assert lists(boxes.of(range(7))) == expected
    assert lists(boxes.of([6, 1, 1, 3])) == [expected[6], expected[1], expected[1], []]
    assert boxes.of([]) == []
    assert all(found.shape[1] == 4 for found in boxes.of(range(7)))


def test_a_folder_of_xml(tmp_path: Path) -> None:
    index = shards(tmp_path, dict.fromkeys(("a", "train/b", "cat/1", "dog/1", "e", "f")))
    folder = tmp_path / "xml"
    for name, text in {
        "a": xml((1, 1, 32, 32)),  # pixels are counted from 1: this is the image
        "n01/b": xml((3, 4, 10, 20), (5, 5, 5, 5), size=None),
        "cat/1": xml((1, 1, 2, 2)),
        "dog/1": xml((1, 1, 4, 4)),
        "e": xml((0, 0, 9, 9), size=(0, 0)),  # some tools count from 0, some do not know the size
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.xml").write_text(text)
    assert lists(Boxes(index, DATA, str(folder)).of(range(6))) == [
        [[0, 0, 32, 32]],
        [[2, 3, 10, 20], [4, 4, 5, 5]],
        [[0, 0, 2, 2]],
        [[0, 0, 4, 4]],
        [[0, 0, 9, 9]],
        [],
    ]


def test_xml_of_an_image_that_was_made_smaller(tmp_path: Path) -> None:
    """Shards may hold an ImageNet image at a half of its size; its annotation has the original's pixels."""
    index = shards(tmp_path, {"a": None, "b": None}, size=(64, 32))
    (tmp_path / "a.xml").write_text(xml((41, 11, 80, 30), size=(128, 64)))
    assert lists(Boxes(index, DATA, str(tmp_path)).of([0])) == [[[4, 5, 24, 15]]]


def test_names_of_before_the_shards_were_built(tmp_path: Path) -> None:
    index = shards(tmp_path, {"0000000": None, "0000001": None})
    (tmp_path / "_sources-train.txt").write_text("0000000\tn01/val_1.JPEG\n0000001\tn02/val_2.x.JPEG\n")
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml" / "val_1.xml").write_text(xml((1, 1, 5, 5)))
    assert lists(Boxes(index, DATA, str(tmp_path / "xml")).of([0, 1])) == [[[0, 0, 5, 5]], []]
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps({"n01/val_1": [[0, 0, 5, 5]], "val_2.x": [1, 2, 3, 4]}))
    assert lists(Boxes(index, DATA, str(file)).of([0, 1])) == [[[0, 0, 5, 5]], [[1, 2, 3, 4]]]


def test_a_json_file(tmp_path: Path) -> None:
    index = shards(tmp_path, {"a": {"box": [9, 9, 10, 10]}, "dir/b": None, "c": None})
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps({"a": [[1, 2, 3, 4]], "b": [[1, 2, 3, 4], [5, 6, 7, 8]], "other": "unread"}))
    assert lists(Boxes(index, DATA, str(file)).of(range(3))) == [[[1, 2, 3, 4]], [[1, 2, 3, 4], [5, 6, 7, 8]], []]


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    index = shards(tmp_path, {"a": b"{", "b": {"box": [1, 2, 3, 4]}})
    assert lists(Boxes(index, DATA).of([1])) == [[[1, 2, 3, 4]]]
    (tmp_path / "a.xml").write_text("<annotation>")
    (tmp_path / "b.xml").write_text(xml((2, 3, 3, 4)))
    assert lists(Boxes(index, DATA, str(tmp_path)).of([1])) == [[[1, 2, 3, 4]]]


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (b"{", "'a.json' does not hold JSON"),
        ({"box": [1, 2, 3]}, "'a.json' field 'box' has the box [1, 2, 3]; expected [x0, y0, x1, y1] in pixels"),
        ({"box": [1, 2, 3, "4"]}, "field 'box' has the box"),
        ({"boxes": [[1, 2, 1, 4]]}, "field 'boxes' has the box [1, 2, 1, 4]; expected"),
        ({"boxes": [[1, 2, 3, 4], None]}, "field 'boxes' has the box None"),
        (b'{"box": [1, 2, NaN, 4]}', "has the box [1, 2, nan, 4]"),
    ],
)
def test_broken_json_in_the_shards(tmp_path: Path, sample: Any, said: str) -> None:
    index = shards(tmp_path, {"a": sample, "b": None})
    with pytest.raises(UsageError) as raised:
        Boxes(index, DATA).of([0, 1])
    assert said in str(raised.value)
    assert f"{tmp_path}/t-train-0000.tar" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<annotation>", "a.xml: no element found: line 1, column 12; expected a PASCAL annotation"),
        (xml((1, 1, 2, 2)).replace("xmax", "right"), "expected a PASCAL annotation: object/bndbox with xmin"),
        (xml((9, 9, 2, 2)), "a.xml: bndbox has the box [8.0, 8.0, 2.0, 2.0]; expected [x0, y0, x1, y1]"),
    ],
)
def test_broken_xml(tmp_path: Path, text: str, said: str) -> None:
    index = shards(tmp_path, {"a": None, "b": None})
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(UsageError) as raised:
        Boxes(index, DATA, str(tmp_path)).of([0])
    assert str(raised.value).startswith(f"--boxes {tmp_path}")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file or directory; expected a folder of XML files, or a JSON file {key: [[x0"),
        ("{", "does not hold JSON: Expecting property name"),
        ("[]", "holds a JSON list; expected a folder"),
        ('{"a": 3}', "'a' is 3; expected a list of [x0, y0, x1, y1]"),
        ('{"a": [[1, 2, 3]]}', "'a' has the box [1, 2, 3]; expected [x0"),
    ],
)
def test_a_broken_json_file(tmp_path: Path, text: str | None, said: str) -> None:
    index = shards(tmp_path, {"a": None, "b": None})
    path = tmp_path / "boxes.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError) as raised:
        Boxes(index, DATA, str(path)).of([0])
    assert str(raised.value).startswith(f"--boxes {path}")
    assert said in str(raised.value)


def test_a_folder_without_xml(tmp_path: Path) -> None:
    index = shards(tmp_path, {"a": None, "b": None})
    with pytest.raises(UsageError, match=r"holds no \.xml file; expected NAME\.xml for each image"):
        Boxes(index, DATA, str(tmp_path))
