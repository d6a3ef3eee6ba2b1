"""timm's architectures, made for the images and classes of a run."""

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import _builder, get_arch_pretrained_cfgs
from torch import nn

from gmscale.config import TrainConfig
from gmscale.errors import UsageError, nearest

Convert = Callable[..., Any]

# What model.kwargs may not say, because another key does, or because nothing would be reported.
_ELSEWHERE = {
    "pretrained": "model.pretrained",
    "checkpoint_path": "model.checkpoint",
    "num_classes": "the data, which decide it",
    "in_chans": "data.channels",
    "drop_rate": "model.drop_rate",
    "drop_path_rate": "model.drop_path_rate",
    "features_only": "nothing: a run trains classifiers",
}


def create(config: TrainConfig, num_classes: int) -> nn.Module:
    """Return the timm model of `config` with `num_classes` outputs and random weights, on the CPU.

    It takes images of data.channels and data.image_size. Raises UsageError for a name timm does not know, for
    settings that the model does not have, and for images that it cannot take.
    """
    model, size = config.model, config.data.image_size
    _check_name(model.name)
    for key in model.kwargs:
        if key in _ELSEWHERE:
            raise UsageError(f"model.kwargs: {key!r} is the business of {_ELSEWHERE[key]}")
    try:
        with loading_withheld():
            made = make(config, num_classes)
    except TypeError as error:
        raise _unknown_setting(config, error) from error
    except Exception as error:  # timm's constructors raise what they like for sizes that they cannot take
        raise _unfit(config, error) from error
    if refusal := refused(made, config.data.channels, size):
        raise _unfit(config, refusal) from refusal
    _warn_of_cut_borders(made, config)
    if model.grad_checkpointing:
        if not hasattr(made, "set_grad_checkpointing"):
            raise UsageError(f"model.grad_checkpointing is true, but {model.name} does not offer it")
        made.set_grad_checkpointing(True)  # type: ignore[operator]
    return made.to(memory_format=torch.channels_last) if model.channels_last else made


def make(config: TrainConfig, num_classes: int, *, image_size: int = 0, pretrained: bool = False) -> nn.Module:
    """Return what timm makes of `config`; for other images, or as for pretrained weights, if told so.

    Raises timm's own errors.
    """
    model = config.model
    # Not every model takes every dropout; only those asked for are passed on.
    drops = {"drop_rate": model.drop_rate, "drop_path_rate": model.drop_path_rate}
    settings: dict[str, Any] = {name: rate for name, rate in drops.items() if rate > 0} | model.kwargs
    cfg = timm.get_pretrained_cfg(model.name)
    if cfg is not None and cfg.fixed_input_size:  # timm's word for models that take img_size
        settings.setdefault("img_size", config.data.image_size)
    if image_size and "img_size" in settings:
        settings["img_size"] = image_size
    # with pretrained=True timm gives a few models more than weights
    pretrained = pretrained or model.pretrained
    return timm.create_model(
        model.name, pretrained=pretrained, num_classes=num_classes, in_chans=config.data.channels, **settings
    )


def converter(config: TrainConfig) -> Convert | None:
    """Return timm's function from a source's tensors, by name, and a model to tensors in that model's names and
    shapes; None if the model of `config` has none."""
    with torch.device("meta"), loading_withheld() as found:
        make(config, 2, pretrained=True)
    return found[0]


@contextmanager
def loading_withheld() -> Iterator[list[Convert | None]]:
    """Let timm make models as it does with pretrained=True, but without loading anything.

    The list gets, for each model, the function that converts the names and shapes of weights from elsewhere. timm
    hands it from the model's factory to its loader and keeps it nowhere else.
    """
    found: list[Convert | None] = []
    real = _builder.load_pretrained

    def note(model: nn.Module, *, filter_fn: Convert | None = None, **rest: Any) -> None:
        found.append(filter_fn)

    _builder.load_pretrained = note  # type: ignore[assignment]
    try:
        yield found
    finally:
        _builder.load_pretrained = real


def unwrap(model: nn.Module) -> nn.Module:
    """Return the timm model inside DDP and torch.compile."""
    for attribute in ("module", "_orig_mod"):
        model = getattr(model, attribute, model)
    return model


def classifiers(model: nn.Module) -> list[str]:
    """Return the names of the modules that turn features into classes; most models have one."""
    named = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    modules = dict(model.named_modules())
    found = [name for name in ((named,) if isinstance(named, str) else named) if name in modules]
    if not found and hasattr(model, "get_classifier"):
        heads = model.get_classifier()  # type: ignore[operator]
        heads = heads if isinstance(heads, tuple | list) else (heads,)
        found = [name for name, module in modules.items() if any(module is head for head in heads)]
    return found


def refused(model: nn.Module, channels: int, size: int) -> Exception | None:
    """Return why the model on the CPU does not take square images of `size` pixels; None if it does."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, channels, size, size))
    except Exception as error:  # as above
        return error
    finally:
        model.train(was_training)
    return None


def _check_name(name: str) -> None:
    """Raise UsageError unless timm knows the architecture and, if it is given, the tag of its weights."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UsageError(f"model.name: timm has no model {name!r}{nearest(architecture, timm.list_models())}")
    known = [full.removeprefix(f"{architecture}.") for full in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in known:
        listed = f" (it has: {', '.join(known[:8])})" if known else " (it has none)"
        raise UsageError(f"model.name: {architecture} has no weights tagged {tag!r}{nearest(tag, known)}{listed}")


def _unknown_setting(config: TrainConfig, error: TypeError) -> UsageError:
    """Return the error for a keyword argument that the model does not have, as far as it is one."""
    model = config.model
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    key = found[1] if found else ""
    if key in ("drop_rate", "drop_path_rate"):
        return UsageError(f"model.{key}: {model.name} does not have it; set it to 0")
    if key not in model.kwargs:
        return _unfit(config, error)
    with torch.device("meta"):
        kind = type(timm.create_model(model.name))
    known = [name for name in inspect.signature(kind).parameters if name not in _ELSEWHERE]
    return UsageError(f"model.kwargs: {model.name} has no argument {key!r}{nearest(key, known)}")


def _unfit(config: TrainConfig, error: Exception) -> UsageError:
    """Return the error for images that the model cannot take, with a size near by that it can, if one is found."""
    size, reason = config.data.image_size, " ".join(str(error).split())[:200] or type(error).__name__
    fits = next((f for f in _candidates(config) if _takes(config, f)), None)
    if fits is None:  # then it is not their size
        return UsageError(f"model {config.model.name} cannot be made with these settings: {reason}")
    return UsageError(
        f"model {config.model.name} cannot take images of data.image_size {size}: {reason}; {fits} would fit"
    )


def _candidates(config: TrainConfig) -> list[int]:
    """Return sizes that may fit where data.image_size does not, the nearest first."""
    size, cfg = config.data.image_size, timm.get_pretrained_cfg(config.model.name)
    sizes = {size // step * step + up for step in (16, 32) for up in (0, step)}
    sizes = (sizes | {cfg.input_size[-1] if cfg else 224}) - {0, size}
    return sorted(sizes, key=lambda s: abs(s - size))


def _takes(config: TrainConfig, size: int) -> bool:
    try:
        with loading_withheld():
            model = make(config, 2, image_size=size)
    except Exception:
        return False
    return refused(model, config.data.channels, size) is None


def _warn_of_cut_borders(model: nn.Module, config: TrainConfig) -> None:
    """Warn if the patches leave out the borders of the images, which timm does silently."""
    patches, size = getattr(model, "patch_embed", None), config.data.image_size
    if not isinstance(patches, PatchEmbed) or patches.dynamic_img_pad:
        return
    side = patches.patch_size[0]
    if size % side:
        fits = size // side * side
        warnings.warn(
            f"{config.model.name} cuts images into patches of {side} pixels and never sees the last {size % side} "
            f"rows and columns of data.image_size {size}; {fits} or {fits + side} would fit",
            stacklevel=2,
        )
