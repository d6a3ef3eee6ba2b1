"""Starting weights: from timm's hub, from a file, or from one of our runs."""

import inspect
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv, get_arch_pretrained_cfgs, load_state_dict_from_hf
from torch import Tensor, nn

from gmscale.config import TrainConfig
from gmscale.errors import UsageError
from gmscale.models.create import Convert, classifiers, converter
from gmscale.models.weights import Provenance, provenance, read_weights

# What a source may have beyond the model: further classifiers, buffers computed anew, what only pretraining used.
_HARMLESS = re.compile(
    r"^(head|head_dist|fc|classifier|aux|pre_logits|last_linear|mask_token|attn_pool)\w*(\.|$)"
    r"|(relative_position_index|relative_coords_table|attn_mask|num_batches_tracked)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Loaded:
    """What starting weights gave to a model."""

    source: str
    """Where they came from: a hub name, or a file."""
    loaded: tuple[str, ...]
    """Names of the model's tensors that were loaded as they are."""
    adapted: dict[str, str]
    """Those that were loaded after a change, with what was changed (position embeddings, input channels)."""
    fresh: dict[str, str]
    """Those that kept their random values, with the reason."""
    unused: tuple[str, ...]
    """Tensors of the source that the model has no place for."""

    def summary(self) -> str:
        """Return lines for people; started_from.json in the run directory has every name."""
        lines = [f"started from {self.source}: {len(self.loaded)} tensors loaded as they are"]
        for word, reasons in (("adapted", self.adapted), ("fresh", self.fresh)):
            for reason in dict.fromkeys(reasons.values()):
                lines.append(f"  {word} ({reason}): {_listed(n for n, why in reasons.items() if why == reason)}")
        if self.unused:
            lines.append(f"  skipped, for the model has no place for them: {_listed(self.unused)}")
        return "\n".join(lines)


def start_from(model: nn.Module, config: TrainConfig, file: Path | None) -> Loaded | None:
    """Load the starting weights that `config` asks for into `model`; None where it asks for none.

    `file` is what model.checkpoint stands for. Nothing in it is executed. Names and shapes are converted as timm
    converts them: weights in their authors' names, position embeddings for other image sizes, other input channels.
    Raises UsageError for a file that cannot be read, and for weights that do not fit the model beyond its
    classifier.
    """
    if file is None and config.finetune.weights != "auto":
        raise UsageError(f"finetune.weights is {config.finetune.weights!r}, but model.checkpoint names no weights")
    if file is None and not config.model.pretrained:
        if config.finetune.reset_head:
            raise UsageError(
                "finetune.reset_head is true, but neither model.checkpoint nor model.pretrained is set"
            )
        return None
    if file is not None and config.model.pretrained:
        raise UsageError("model.pretrained and model.checkpoint are both set; choose one of them")
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    if file is None:
        source, given = _from_hub(cfg, config)
        origin = Provenance(config.model.name, tuple(cfg.get("mean", ())), tuple(cfg.get("std", ())))
    else:
        source, given = str(file), read_weights(file, config.finetune.weights)
        origin = provenance(file)
    own = model.state_dict()
    weights, adapted = _converted(model, config, source, given)
    if file is None:
        adapted |= _without_background(model, cfg.get("label_offset") or 0, weights)
    adapted |= _fit_input_channels(own, cfg.get("first_conv") or (), config.data.channels, weights)
    fresh = _fresh_head(own, classifiers(model), weights, reset=config.finetune.reset_head)
    # PyTorch's own loading forgives it too: files from before torch 0.4.1 have none
    fresh |= {n: "not in the source" for n in own if n.endswith("num_batches_tracked") and n not in weights}
    unused = tuple(name for name in weights if name not in own)
    chosen = {name: t for name, t in weights.items() if name in own and name not in fresh}
    if problems := _misfits(own, chosen, fresh, unused, classifiers(model)):
        trained = f" (it was trained as {origin.architecture})" if origin.architecture else ""
        raise UsageError(f"{source}{trained} does not fit model {config.model.name}: {problems}")
    for name, tensor in chosen.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(
                f"{source}: {name} has values that are not finite; nothing can start from these weights"
            )
    model.load_state_dict(chosen, strict=False)
    _compare_normalisation(origin, config)
    adapted = {name: change for name, change in adapted.items() if name in chosen}
    return Loaded(source, tuple(name for name in chosen if name not in adapted), adapted, fresh, unused)


def _from_hub(cfg: dict[str, Any], config: TrainConfig) -> tuple[str, dict[str, Any]]:
    """Return the name and the tensors of timm's pretrained weights, downloaded if they are not in the cache."""
    name, file, hub, url = config.model.name, cfg.get("file"), cfg.get("hf_hub_id"), cfg.get("url")
    if file:  # model.kwargs may name a copy: {pretrained_cfg_overlay: {file: ...}}
        return str(file), read_weights(Path(file))
    if not (hub or url):
        raise UsageError(f"model.pretrained: timm has no weights for {name}; give model.checkpoint a file")
    try:
        if hub:
            named = {"filename": cfg["hf_hub_filename"]} if cfg.get("hf_hub_filename") else {}
            return f"{hub} of the hub", load_state_dict_from_hf(hub, **named)
        found = torch.hub.load_state_dict_from_url(str(url), map_location="cpu", progress=False, weights_only=True)
        return str(url), found
    except Exception as error:  # the errors of network, hub and disk have no common kind
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        tags = [t.partition(".")[2] for t in get_arch_pretrained_cfgs(name.partition(".")[0])]
        raise UsageError(
            f"model.pretrained: cannot get the weights {hub or url}: {reason}; without a network fill the hub's "
            f"cache (HF_HOME) beforehand and set HF_HUB_OFFLINE=1, or give model.checkpoint a file (timm's tags of "
            f"this model: {', '.join(tags[:6])})"
        ) from None


def _converted(
    model: nn.Module, config: TrainConfig, source: str, given: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors under the model's names and, as far as timm can, in its shapes; and what was changed."""
    before = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    convert, result = converter(config), given
    if convert is not None:
        try:
            result = _call(convert, dict(given), model)
        except Exception as error:  # made for weights of this architecture, these functions check nothing
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
            raise UsageError(
                f"{source} looks like another architecture than {config.model.name}: timm cannot convert it "
                f"({reason}); its first tensors are {_listed(before)}"
            ) from None
    after = {name: value for name, value in result.items() if isinstance(value, Tensor)}
    return after, {name: change for name, t in after.items() if (change := _change(before.get(name), t))}


def _call(convert: Convert, weights: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Call one of timm's filters; some take no model."""
    alone = len(inspect.signature(convert).parameters) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about details of timm's resampling
        result: dict[str, Any] = convert(weights) if alone else convert(weights, model)
    return result


def _change(before: Tensor | None, after: Tensor) -> str | None:
    if before is None:
        return "converted from another name"
    if before.shape != after.shape:
        return f"{_size(before)} to {_size(after)}"
    return None if before is after else "resampled"


def _without_background(model: nn.Module, offset: int, weights: dict[str, Tensor]) -> dict[str, str]:
    """Cut from timm's classifiers the class of nothing that a few of them have before their own."""
    changed = {}
    for name, own in model.state_dict().items():
        if not offset or name.rpartition(".")[0] not in classifiers(model) or name not in weights:
            continue
        if len(weights[name]) == len(own) + offset:
            weights[name] = weights[name][offset:]
            changed[name] = "without the background class"
    return changed


def _fit_input_channels(
    own: Mapping[str, Tensor], stems: str | Sequence[str], channels: int, weights: dict[str, Tensor]
) -> dict[str, str]:
    """Sum or repeat the channels of the first convolutions where the source saw others, as timm does."""
    changed = {}
    for name in (f"{stem}.weight" for stem in ([stems] if isinstance(stems, str) else stems)):
        if name not in weights or name not in own or not weights[name].ndim == own[name].ndim == 4:
            continue
        given, wanted = weights[name].shape[1], own[name].shape[1]
        if given == wanted or given * channels % wanted:
            continue
        base = given * channels // wanted  # a stem that takes several pixels at once has more than the image
        known = {"base_chans": base} if "base_chans" in inspect.signature(adapt_input_conv).parameters else {}
        weights[name] = adapt_input_conv(channels, weights[name], **known)
        changed[name] = f"{base} to {channels} input channels"
    return changed


def _fresh_head(
    own: Mapping[str, Tensor], heads: Sequence[str], weights: Mapping[str, Tensor], *, reset: bool
) -> dict[str, str]:
    """Return the tensors of the classifiers if they have to start afresh, with the reason."""
    names = [n for n in own if n.startswith(tuple(f"{head}." for head in heads))]
    other = [n for n in names if n in weights and weights[n].shape != own[n].shape]
    if reset:
        reason = "finetune.reset_head"
    elif any(n not in weights for n in names):
        reason = "not in the source"
    elif other:
        reason = f"classifier of {len(weights[other[0]])} classes in the source, {len(own[other[0]])} here"
    else:
        return {}
    return dict.fromkeys(names, reason)


def _misfits(
    own: Mapping[str, Tensor],
    chosen: Mapping[str, Tensor],
    fresh: Mapping[str, str],
    unused: Sequence[str],
    heads: Sequence[str],
) -> str:
    """Return in words in what the weights `chosen` of a source are not those of the model; nothing if they are."""
    missing = [n for n in own if n not in chosen and n not in fresh]
    wrong = [n for n, t in chosen.items() if t.shape != own[n].shape]
    harmless = tuple(f"{head}." for head in heads)
    foreign = [n for n in unused if not (n.startswith(harmless) or _HARMLESS.search(n))]
    found = []
    if missing:
        found.append(f"{len(missing)} of the model's {len(own)} tensors are missing ({_listed(missing, 3)})")
    if wrong:
        shapes = [f"{n} is {_size(chosen[n])}, expected {_size(own[n])}" for n in wrong]
        found.append(f"{len(wrong)} have another shape ({_listed(shapes, 3)})")
    if foreign:
        found.append(f"{len(foreign)} have no place in it ({_listed(foreign, 3)})")
    if foreign or len(wrong) == len(chosen):
        found.append("it looks like another architecture")
    return "; ".join(found)


def _compare_normalisation(origin: Provenance, config: TrainConfig) -> None:
    """Warn if the weights were trained on images of another brightness and contrast."""
    data = config.data
    if len(origin.mean) == 3 == len(origin.std) and (origin.mean, origin.std) != (data.mean, data.std):
        warnings.warn(
            f"the starting weights were trained with mean {list(origin.mean)} and std {list(origin.std)}, but "
            f"data.mean is {list(data.mean)} and data.std {list(data.std)}; to keep theirs set "
            f"--data.mean '{list(origin.mean)}' --data.std '{list(origin.std)}'",
            stacklevel=2,
        )


def _listed(names: Iterable[str], most: int = 6) -> str:
    """Return the first names in one line."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _size(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "a number"
