"""models.create: timm's models for the images of a run, and what it says where that is not possible."""

import warnings
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from gmscale import config as configuration
from gmscale import models
from gmscale.config import TrainConfig
from gmscale.errors import UsageError

SMALL_SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}


def config(name: str, size: int = 32, channels: int = 3, **model: Any) -> TrainConfig:
    return configuration.from_dict(
        {"model": {"name": name} | model, "data": {"image_size": size, "channels": channels}}
    )


def outputs(config: TrainConfig) -> Tensor:
    side = config.data.image_size
    return models.create(config, 3).eval()(torch.zeros(2, config.data.channels, side, side))


def error(config: TrainConfig) -> str:
    with pytest.raises(UsageError) as caught:
        models.create(config, 3)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_resnet", {}),
        ("test_vit", {}),
        ("vit_tiny_patch16_224", {"depth": 1}),
        ("swin_tiny_patch4_window7_224", SMALL_SWIN),
    ],
)
def test_models_take_images_of_the_run(name: str, kwargs: dict[str, Any], channels: int) -> None:
    assert outputs(config(name, 32, channels, kwargs=kwargs)).shape == (2, 3)


def test_position_embeddings_are_made_for_the_image_size() -> None:
    model = models.create(config("vit_tiny_patch16_224", 64, kwargs={"depth": 1}), 3)
    assert model.get_parameter("pos_embed").shape[1] == 1 + (64 // 16) ** 2


def test_the_user_may_choose_another_img_size() -> None:
    kwargs = {"depth": 1, "img_size": 128, "dynamic_img_size": True}
    model = models.create(config("vit_tiny_patch16_224", 64, kwargs=kwargs), 3)
    assert model.get_parameter("pos_embed").shape[1] == 1 + (128 // 16) ** 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("test_vitt", ["model.name", "'test_vitt'", "did you mean 'test_vit'?"]),
        ("test_vit.r160in1k", ["model.name", "'r160in1k'", "did you mean 'r160_in1k'?"]),
        ("test_vit.zz", ["'zz'", "it has: r160_in1k"]),
        ("vit_tiny_patch16_18x2.tag", ["vit_tiny_patch16_18x2"]),
    ],
)
def test_unknown_names_are_told_with_the_nearest(name: str, words: list[str]) -> None:
    message = error(config(name))
    assert all(word in message for word in words)


def test_tags_of_weights_are_part_of_a_name() -> None:
    assert outputs(config("test_vit.r160_in1k")).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("vit_tiny_patch16_224", {"depht": 1}, ["model.kwargs", "'depht'", "did you mean 'depth'?"]),
        ("test_resnet", {"img_size": 32}, ["model.kwargs", "'img_size'"]),
        ("test_resnet", {"in_chans": 1}, ["model.kwargs", "data.channels"]),
        ("test_resnet", {"checkpoint_path": "weights.pth"}, ["model.kwargs", "model.checkpoint"]),
    ],
)
def test_settings_that_a_model_does_not_have(name: str, kwargs: dict[str, Any], words: list[str]) -> None:
    message = error(config(name, kwargs=kwargs))
    assert all(word in message for word in words)


def test_dropout_that_a_model_does_not_have() -> None:
    assert "model.drop_path_rate" in error(config("vgg11", drop_path_rate=0.1))


def test_images_that_do_not_fit_are_told_with_a_size_that_does() -> None:
    message = error(config("test_vit", 50))
    assert "data.image_size 50" in message
    assert message.endswith("; 48 would fit")


def test_windows_that_do_not_fit_are_told_with_a_size_that_does() -> None:
    message = error(config("test_maxvit", 40))
    assert "data.image_size 40" in message
    assert message.endswith("; 32 would fit")


def test_settings_that_fit_no_image_are_not_blamed_on_the_image() -> None:
    message = error(config("vit_tiny_patch16_224", kwargs={"depth": 1, "num_heads": 5}))
    assert "cannot be made with these settings" in message
    assert "image_size" not in message


def test_borders_that_no_patch_covers_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"never sees the last 4 rows and columns .* 96 or 112 would fit"):
        models.create(config("vit_tiny_patch16_224", 100, kwargs={"depth": 1}), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.create(config("vit_tiny_patch16_224", 96, kwargs={"depth": 1}), 3)


def test_nothing_is_loaded_when_a_model_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = config("test_vit", pretrained=True)
    torch.manual_seed(0)
    made = models.create(given, 3).state_dict()
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", num_classes=3, img_size=32).state_dict()
    assert all(torch.equal(made[name], plain[name]) for name in plain)
    assert timm.models._builder.load_pretrained is timm.models.load_pretrained
