"""Which parameters a mask touches, and under which names they are reported and saved."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch
from torch import nn

from gmscale.errors import UsageError, nearest
from gmscale.masking import GradientMask
from gmscale.masking.lateral import Unit, map_shape, unit_of

_CONV_AND_LINEAR = (nn.Linear, nn.modules.conv._ConvNd)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_COMPILED_PREFIX = "_orig_mod."
_CHECKPOINTED_PREFIX = "_checkpoint_wrapped_module."


class Touched(NamedTuple):
    """One masked parameter, or a layer whose output gradient is masked (units position and token)."""

    name: str
    shape: tuple[int, ...]
    map_shape: tuple[int, int]
    unit: Unit | Literal["position", "token"]

    @classmethod
    def of(cls, name: str, parameter: torch.Tensor, mask: GradientMask) -> "Touched":
        shape = whole_shape(parameter)
        return cls(name, shape, map_shape(shape, mask.block), unit_of(shape))


class Selection(NamedTuple):
    parameters: dict[str, nn.Parameter]
    """The masked parameters by name, in the model's order."""
    touched: tuple[Touched, ...]
    passed: tuple[str, ...]
    """Names of the trained parameters that pass through."""


def select(model: nn.Module, mask: GradientMask) -> Selection:
    """Return what `mask` touches in `model`; raise UsageError if that is nothing (law 8).

    By default the weights of convolutions, linear layers and attention projections, and with `mask_1d` every
    1-D parameter too. `include` patterns choose among all parameters that have a lateral map.
    """
    trained = {clean_name(n): p for n, p in model.named_parameters() if p.requires_grad and whole_shape(p)}
    weights = _weights_of_layers(model)
    chosen = {
        name: p
        for name, p in trained.items()
        if _is_candidate(name, p, weights, mask) and not _matches(name, mask.exclude)
    }
    if not chosen:
        raise _nothing(mask, trained)
    return Selection(
        chosen,
        tuple(Touched.of(name, p, mask) for name, p in chosen.items()),
        tuple(name for name in trained if name not in chosen),
    )


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter, also of one that ZeRO-3 has partitioned and left empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def clean_name(name: str) -> str:
    """Return a parameter's name without the prefixes that torch.compile and checkpoint_wrapper add."""
    return name.replace(_COMPILED_PREFIX, "").replace(_CHECKPOINTED_PREFIX, "")


def _is_candidate(name: str, p: nn.Parameter, weights: set[int], mask: GradientMask) -> bool:
    ndim = len(whole_shape(p))
    if ndim == 1 and not mask.mask_1d:
        return False
    if mask.include:
        return _matches(name, mask.include)
    return ndim == 1 or id(p) in weights


def _weights_of_layers(model: nn.Module) -> set[int]:
    weights = set()
    for module in model.modules():
        if isinstance(module, _CONV_AND_LINEAR):
            weights.add(id(module.weight))
        elif isinstance(module, nn.MultiheadAttention):
            weights.update(id(getattr(module, n)) for n in _ATTENTION_WEIGHTS)
    return weights


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _nothing(mask: GradientMask, trained: dict[str, nn.Parameter]) -> UsageError:
    if not trained:
        return UsageError("the mask touches nothing: the model has no parameter that requires a gradient")
    if mask.include and not any(_matches(name, mask.include) for name in trained):
        patterns = ", ".join(mask.include)
        return UsageError(
            f"the mask touches nothing: mask.include {patterns} matches no parameter"
            f"{nearest(mask.include[0], trained)} (the first: {', '.join(list(trained)[:3])})"
        )
    return UsageError(
        "the mask touches nothing: what mask.include and mask.exclude leave are no convolution or linear "
        "weights (1-D parameters need mask.mask_1d)"
    )
