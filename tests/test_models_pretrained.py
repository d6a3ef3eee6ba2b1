"""models.start_from: starting weights from files and from the hub, what is adapted, and what is refused."""

import argparse
import json
import pickle
import shutil
import threading
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from file_hub import NAME, Hub, weights_of
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor, nn

from gmscale import config as configuration
from gmscale import models
from gmscale.config import TrainConfig
from gmscale.errors import UsageError
from gmscale.models import Loaded

SWIN = "swin_tiny_patch4_window7_224"
SMALL_SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}


def config(name: str = "test_resnet", size: int = 32, channels: int = 3, **sections: Any) -> TrainConfig:
    model = {"name": name, "channels_last": False} | sections.pop("model", {})
    data = {"image_size": size, "channels": channels} | sections.pop("data", {})
    return configuration.from_dict({"model": model, "data": data} | sections)


def source(folder: Path, config: TrainConfig, classes: int = 5, seed: int = 1) -> tuple[Path, dict[str, Tensor]]:
    """A safetensors file of a model's random weights, and the weights."""
    torch.manual_seed(seed)
    weights = models.create(config, classes).state_dict()
    file = folder / "weights.safetensors"
    save_file(weights, file)
    return file, weights


def start(config: TrainConfig, file: Path | None, classes: int = 5) -> tuple[nn.Module, Loaded]:
    torch.manual_seed(2)
    model = models.create(config, classes)
    loaded = models.start_from(model, config, file)
    assert loaded is not None
    return model, loaded


def refusal(config: TrainConfig, file: Path | None, classes: int = 5) -> str:
    model = models.create(config, classes)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        models.start_from(model, config, file)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())  # all or nothing
    assert "\n" not in str(caught.value)
    return str(caught.value)


def equal(model: nn.Module, weights: dict[str, Tensor], but: tuple[str, ...] = ()) -> bool:
    own = model.state_dict()
    return all(torch.equal(own[n], t) for n, t in weights.items() if n not in but)


# -- files ------------------------------------------------------------------------------------------------------
def test_without_a_source_nothing_is_loaded() -> None:
    assert models.start_from(nn.Linear(1, 1), config(), None) is None


@pytest.mark.parametrize(("field", "value"), [("weights", "ema"), ("reset_head", True)])
def test_settings_of_starting_weights_without_any_are_refused(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"finetune.{field} is .* model.checkpoint"):
        models.start_from(nn.Linear(1, 1), config(finetune={field: value}), None)


def test_a_file_of_the_same_model_is_loaded_whole(tmp_path: Path) -> None:
    file, weights = source(tmp_path, config())
    model, loaded = start(config(), file)
    assert equal(model, weights)
    assert set(loaded.loaded) == set(weights)
    assert (loaded.adapted, loaded.fresh, loaded.unused) == ({}, {}, ())
    assert loaded.summary() == f"started from {file}: {len(weights)} tensors loaded as they are"
    assert json.loads(json.dumps(asdict(loaded)))["source"] == str(file)


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files_of_both_formats_are_read(tmp_path: Path, zipped: bool) -> None:
    _, weights = source(tmp_path, config())
    file = tmp_path / "weights.pth"
    torch.save(weights, file, _use_new_zipfile_serialization=zipped)
    assert equal(start(config(), file)[0], weights)


def test_half_precision_weights_become_those_of_the_model(tmp_path: Path) -> None:
    _, weights = source(tmp_path, config())
    file = tmp_path / "weights.safetensors"
    save_file({n: t.half() if t.is_floating_point() else t for n, t in weights.items()}, file)
    model, _ = start(config(), file)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert equal(model, {n: t.half().to(t.dtype) for n, t in weights.items()})


def test_training_checkpoints_are_unpacked(tmp_path: Path) -> None:
    _, plain = source(tmp_path, config(), seed=1)
    _, averaged = source(tmp_path, config(), seed=3)
    file = tmp_path / "checkpoint.pth.tar"
    wrapped = {f"module._orig_mod.{name}": t for name, t in plain.items()}
    rest = {"epoch": 3, "arch": "test_resnet", "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}}
    torch.save(rest | {"state_dict": wrapped, "state_dict_ema": averaged}, file)
    for choice, expected in (("auto", averaged), ("ema", averaged), ("model", plain)):
        assert equal(start(config(finetune={"weights": choice}), file)[0], expected)
    torch.save({"model": plain}, file)
    assert equal(start(config(), file)[0], plain)
    assert "no averaged weights" in refusal(config(finetune={"weights": "ema"}), file)


class Trap:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_never_run(tmp_path: Path, zipped: bool) -> None:
    file, sprung = tmp_path / "weights.pth", tmp_path / "sprung"
    torch.save({"state_dict": Trap(sprung)}, file, _use_new_zipfile_serialization=zipped)
    message = refusal(config(), file)
    assert str(file) in message
    assert "is refused" in message
    assert not sprung.exists()
    torch.load(file, weights_only=False)  # the trap is a real one
    assert sprung.exists()


def test_a_plain_pickle_is_refused_too(tmp_path: Path) -> None:
    file, sprung = tmp_path / "weights.bin", tmp_path / "sprung"
    file.write_bytes(pickle.dumps(Trap(sprung)))
    assert str(file) in refusal(config(), file)
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights.npz"])
@pytest.mark.parametrize("content", [b"", b"nothing of the kind", None])
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    assert str(file) in refusal(config(), file)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    _, weights = source(tmp_path, config())
    file = tmp_path / "weights.pth"
    torch.save(weights, file)
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"{file} cannot be read as weights" in refusal(config(), file)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(torch.zeros(3), file)
    assert "holds a Tensor" in refusal(config(), file)
    torch.save({"epoch": 3}, file)
    assert "are missing" in refusal(config(), file)


# -- what is adapted --------------------------------------------------------------------------------------------
def test_another_number_of_classes_gives_a_fresh_head(tmp_path: Path) -> None:
    file, weights = source(tmp_path, config(), classes=7)
    model, loaded = start(config(), file, classes=3)
    torch.manual_seed(2)
    random = models.create(config(), 3).state_dict()
    head = ("fc.weight", "fc.bias")
    assert tuple(loaded.fresh) == head
    assert equal(model, weights, but=head)
    assert equal(model, {name: random[name] for name in head})
    assert "fresh (classifier of 7 classes in the source, 3 here): fc.weight, fc.bias" in loaded.summary()


def test_the_head_is_reset_on_request(tmp_path: Path) -> None:
    file, weights = source(tmp_path, config())
    model, loaded = start(config(finetune={"reset_head": True}), file)
    assert set(loaded.fresh.values()) == {"finetune.reset_head"}
    assert equal(model, weights, but=tuple(loaded.fresh))
    assert not torch.equal(model.get_parameter("fc.weight"), weights["fc.weight"])


def test_a_second_classifier_that_the_model_lacks_is_listed(tmp_path: Path) -> None:
    file, weights = source(tmp_path, config())
    save_file(weights | {"head_dist.weight": torch.zeros(5, 3)}, file)
    model, loaded = start(config(), file)
    assert loaded.unused == ("head_dist.weight",)
    assert equal(model, weights)
    assert "skipped, for the model has no place for them: head_dist.weight" in loaded.summary()


def test_a_source_without_a_classifier_gives_a_fresh_one(tmp_path: Path) -> None:
    file, weights = source(tmp_path, config())
    save_file({n: t for n, t in weights.items() if not n.startswith("fc.")}, file)
    assert start(config(), file)[1].fresh == dict.fromkeys(("fc.weight", "fc.bias"), "not in the source")


def test_position_embeddings_are_resampled_for_the_image_size(tmp_path: Path) -> None:
    kwargs = {"kwargs": {"depth": 1}}
    file, weights = source(tmp_path, config("vit_tiny_patch16_224", 64, model=kwargs))
    model, loaded = start(config("vit_tiny_patch16_224", 96, model=kwargs), file)
    assert loaded.adapted == {"pos_embed": "1x17x192 to 1x37x192"}
    expected = resample_abs_pos_embed(weights["pos_embed"], new_size=[6, 6])
    assert torch.equal(model.get_parameter("pos_embed"), expected)
    assert equal(model, weights, but=("pos_embed",))


def test_relative_positions_are_resampled_for_the_window(tmp_path: Path) -> None:
    small, large = ({"kwargs": SMALL_SWIN | {"window_size": side}} for side in (4, 7))
    file, weights = source(tmp_path, config(SWIN, 64, model=small))
    model, loaded = start(config(SWIN, 56, model=large), file)
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert loaded.adapted[name] == "49x1 to 169x1"
    assert torch.equal(
        model.get_parameter(name),
        resize_rel_pos_bias_table(weights[name], new_window_size=(7, 7), new_bias_shape=(169, 1)),
    )


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize(("given", "wanted"), [(3, 1), (1, 3)])
def test_other_input_channels_see_a_grey_image_as_before(
    tmp_path: Path, name: str, given: int, wanted: int
) -> None:
    file, _ = source(tmp_path, config(name, channels=given))
    torch.manual_seed(1)
    before = models.create(config(name, channels=given), 5).eval()
    after, loaded = start(config(name, channels=wanted), file)
    assert list(loaded.adapted.values()) == [f"{given} to {wanted} input channels"]
    grey = torch.rand(2, 1, 32, 32)
    out = [m.eval()(grey.expand(2, channels, 32, 32)) for m, channels in ((before, given), (after, wanted))]
    torch.testing.assert_close(*out)


def test_weights_in_their_authors_names_are_converted(tmp_path: Path) -> None:
    # DeiT-III's own files call the scales of a block gamma_1 and gamma_2
    deit = config("deit3_small_patch16_224", model={"kwargs": {"depth": 1}})
    _, weights = source(tmp_path, deit)
    file = tmp_path / "deit3.pth"
    torch.save({"model": {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t
                          for n, t in weights.items()}}, file)  # fmt: skip
    model, loaded = start(deit, file)
    assert equal(model, weights)
    assert loaded.adapted == dict.fromkeys(
        ("blocks.0.ls1.gamma", "blocks.0.ls2.gamma"), "converted from another name"
    )


# -- what is refused --------------------------------------------------------------------------------------------
def test_another_architecture_is_refused_with_the_evidence(tmp_path: Path) -> None:
    file, _ = source(tmp_path, config("test_vit"))
    message = refusal(config("test_resnet"), file)
    assert str(file) in message
    assert "test_resnet" in message
    assert "blocks.0.attn.proj.bias" in message
    assert "looks like another architecture" in message


def test_a_deeper_model_of_the_same_names_is_refused(tmp_path: Path) -> None:
    deep, shallow = (config("vit_tiny_patch16_224", model={"kwargs": {"depth": d}}) for d in (2, 1))
    file, _ = source(tmp_path, deep)
    message = refusal(shallow, file)
    assert "12 have no place in it (blocks.1.attn.proj.bias, " in message
    assert "and 9 more" in message
    file, _ = source(tmp_path, shallow)
    assert "12 of the model's 32 tensors are missing (blocks.1.norm1.weight, " in refusal(deep, file)


def test_tensors_of_other_shapes_are_refused(tmp_path: Path) -> None:
    file, weights = source(tmp_path, config())
    save_file(weights | {"layer1.0.conv1.weight": torch.zeros(4, 4, 3, 3)}, file)
    message = refusal(config(), file)
    assert "1 have another shape (layer1.0.conv1.weight is 4x4x3x3, expected " in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    file, weights = source(tmp_path, config())
    weights["layer1.0.conv1.weight"][0, 0, 0, 0] = value
    save_file(weights, file)
    assert "layer1.0.conv1.weight has values that are not finite" in refusal(config(), file)


def test_two_sources_are_one_too_many(tmp_path: Path) -> None:
    file, _ = source(tmp_path, config())
    assert "choose one" in refusal(config(model={"pretrained": True}), file)


# -- the hub ----------------------------------------------------------------------------------------------------
@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache as it is after a download, on a machine without a network."""
    cache = tmp_path / "hub"
    folder = cache / f"models--timm--{NAME}"
    commit = "0" * 40
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    weights_of(folder / "snapshots" / commit / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


@pytest.mark.parametrize("name", ["test_vit", NAME])
@pytest.mark.parametrize(("size", "channels", "classes"), [(160, 3, 1000), (64, 1, 1000), (96, 3, 4)])
def test_the_hub_gives_what_timm_makes_of_it(
    hub_cache: Path, name: str, size: int, channels: int, classes: int
) -> None:
    given = config(name, size, channels, model={"pretrained": True}, data={"mean": [0.5] * 3, "std": [0.5] * 3})
    torch.manual_seed(2)
    expected = timm.create_model(name, pretrained=True, img_size=size, in_chans=channels, num_classes=classes)
    model, loaded = start(given, None, classes)
    assert equal(model, expected.state_dict())
    assert ("pos_embed" in loaded.adapted) == (size != 160)
    assert ("patch_embed.proj.weight" in loaded.adapted) == (channels != 3)
    assert ("head.weight" in loaded.fresh) == (classes != 1000)
    assert f"timm/{NAME}" in loaded.source


def test_weights_of_another_normalisation_are_warned_of(hub_cache: Path) -> None:
    given = config("test_vit", model={"pretrained": True})
    model = models.create(given, 5)
    with pytest.warns(UserWarning, match=r"--data\.mean '\[0\.5, 0\.5, 0\.5\]' --data\.std '\[0\.5, 0\.5, 0\.5\]'"):
        models.start_from(model, given, None)


def test_a_hub_out_of_reach_is_told_with_what_to_do(hub_cache: Path) -> None:
    shutil.rmtree(hub_cache)
    message = refusal(config("test_vit", model={"pretrained": True}), None)
    assert f"timm/{NAME}" in message
    assert "HF_HUB_OFFLINE" in message
    assert "model.checkpoint" in message
    assert "r160_in1k" in message


def test_a_model_without_pretrained_weights() -> None:
    assert "timm has no weights for efficientnet_b0_gn" in refusal(
        config("efficientnet_b0_gn", model={"pretrained": True}), None
    )


def test_the_background_class_of_old_weights_is_cut_off(tmp_path: Path) -> None:
    file, weights = source(tmp_path, config(), classes=6)
    overlay = {"file": str(file), "label_offset": 1, "num_classes": 5}
    given = config(model={"pretrained": True, "kwargs": {"pretrained_cfg_overlay": overlay}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, loaded = start(given, None, classes=5)
    assert torch.equal(model.get_parameter("fc.weight"), weights["fc.weight"][1:])
    assert set(loaded.adapted) == {"fc.weight", "fc.bias"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on this machine; the files that were downloaded from it."""
    Hub.file, Hub.asked = tmp_path / "model.safetensors", []
    weights_of(Hub.file)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield Hub.asked
    server.shutdown()
    server.server_close()


def test_weights_are_downloaded_once(hub: list[str]) -> None:
    given = config("test_vit", model={"pretrained": True}, data={"mean": [0.5] * 3, "std": [0.5] * 3})
    for _ in range(2):
        model, _ = start(given, None, 1000)
        assert equal(model, load_file(Hub.file), but=("pos_embed",))
    assert hub == [f"/timm/{NAME}/resolve/main/model.safetensors"]
