"""timm's optimizers, with what has no weight decay and layers' own learning rates."""

import inspect
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from timm.optim.kron import Kron
from timm.optim.lookahead import Lookahead
from torch import nn

from gmscale.config import OptimConfig
from gmscale.errors import UsageError, check_keys, nearest
from gmscale.models.create import unwrap

_LOOKAHEAD = "lookahead_"

# Arguments of timm's factory that group the parameters, by their names in its grouping functions.
_GROUPING = {
    "filter_bias_and_bn": "weight_decay_exclude_1d",
    "fallback_list": "fallback_list",
    "fallback_no_weight_decay": "fallback_no_weight_decay",
}
_LAYERS_GROUPING = {"layer_decay_min_scale": "min_scale"}

_SET_BY = {
    **{name: f"optim.{name}" for name in ("lr", "momentum", "weight_decay", "opt", "layer_decay")},
    "layer_decay_no_opt_scale": "finetune.freeze",
}

# Its one warning is our error, see `check_optimizer`.
logging.getLogger(param_groups_layer_decay.__module__).setLevel(logging.ERROR)


def optimizer(model: nn.Module, config: OptimConfig, *, frozen_too: bool = False) -> torch.optim.Optimizer:
    """Return timm's optimizer over the parameters of `model` that train.

    With `frozen_too` it has the others as well, which it leaves alone as long as they get no gradient. Raises
    UsageError for a name or an argument that timm does not know, and for an optimizer that cannot run here.
    """
    kwargs, grouping = _arguments(config)
    bare = unwrap(model)
    with _trainable(bare) if frozen_too else nullcontext():
        groups = _groups(bare, config, grouping)
    try:
        made = create_optimizer_v2(groups, opt=config.opt, lr=config.lr, momentum=config.momentum, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"optim.opt {config.opt}: {_one_line(error)}") from error
    if isinstance(made, Lookahead):
        made.state = made._base_optimizer.state  # its own is empty; back-ends look for the momenta here
    if isinstance(inner := getattr(made, "_base_optimizer", made), Kron):
        inner.rng = _Random(1337)
    return made


def check_optimizer(model: nn.Module, config: OptimConfig, backend: str) -> None:
    """Raise UsageError for settings that would change nothing in the optimizer of this whole model."""
    _, grouping = _arguments(config)
    names = [name for name, _ in model.named_parameters()]
    patterns = {"optim.no_weight_decay": config.no_weight_decay}
    patterns["optim.opt_kwargs.fallback_list"] = list(grouping.get("fallback_list", ()))
    for where, given in patterns.items():
        for pattern in given:
            if not any(fnmatch(name, pattern) for name in names):
                raise UsageError(f"{where}: {pattern!r} matches no parameter{nearest(pattern, names)}")
    if 0 < config.layer_decay < 1:
        scales = {group["lr_scale"] for group in _groups(model, config, grouping)}
        if len(scales) == 1:
            raise UsageError(f"optim.layer_decay is {config.layer_decay:g}, but timm sees one layer in this model")
    if backend not in ("single", "ddp") and _inner_name(config.opt).startswith("kron"):
        raise UsageError(
            f"optim.opt {config.opt} draws random numbers of its own, which parallel.backend {backend} "
            "does not save; use ddp"
        )


def _arguments(config: OptimConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of the optimizer and those of its groups, checked."""
    known = [str(name) for name in list_optimizers()]
    name = _inner_name(config.opt)
    if name not in known:
        raise UsageError(f"optim.opt: timm has no optimizer {config.opt!r}{nearest(config.opt, known)}")
    if get_optimizer_info(name).second_order:
        raise UsageError(f"optim.opt {config.opt} needs second derivatives, which no step here computes; use adamw")
    try:
        kind = get_optimizer_class(name, bind_defaults=False)
    except (AssertionError, ImportError) as error:
        raise UsageError(f"optim.opt {config.opt}: {_one_line(error)}") from error
    for key in config.opt_kwargs:
        if key in _SET_BY:
            raise UsageError(f"optim.opt_kwargs sets {key!r}; set {_SET_BY[key]} instead")
    grouping = _GROUPING | (_LAYERS_GROUPING if config.layer_decay > 0 else {})
    if "muon" not in name:  # alone has something to fall back to
        grouping = {key: value for key, value in grouping.items() if not key.startswith("fallback")}
    own = [key for key in inspect.signature(kind).parameters if key not in {"params", *_SET_BY}]
    check_keys(config.opt_kwargs, [*own, *grouping], f"optim.opt_kwargs of {config.opt}")
    kwargs = {key: value for key, value in config.opt_kwargs.items() if key in own}
    if name.startswith("kron"):
        # Otherwise each rank would draw its own random numbers, and ranks would come to have different weights.
        kwargs = {"deterministic": True} | kwargs
    return kwargs, {grouping[key]: value for key, value in config.opt_kwargs.items() if key in grouping}


def _groups(model: nn.Module, config: OptimConfig, grouping: dict[str, Any]) -> list[dict[str, Any]]:
    """Return timm's groups of the parameters that train."""
    excluded = {*getattr(model, "no_weight_decay", set)(), *config.no_weight_decay}
    if config.layer_decay > 0:
        grouping = {"layer_decay": config.layer_decay} | grouping
    group = param_groups_layer_decay if config.layer_decay > 0 else param_groups_weight_decay
    return group(model, weight_decay=config.weight_decay, no_weight_decay_list=excluded, **grouping)


def _inner_name(opt: str) -> str:
    return opt.lower().removeprefix(_LOOKAHEAD)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    """Let every parameter require gradients for a while: timm groups only those that do."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


class _Random(random.Random):
    """Takes its state back from a checkpoint, where tuples have become lists."""

    def setstate(self, state: Any) -> None:
        version, words, gauss = state
        super().setstate((version, tuple(words), gauss))
