"""Magnitude pruning of single weights: the smallest become zero, and shapes stay."""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gmscale.errors import UsageError


class Pruned(NamedTuple):
    """A copy of a model without part of its weights."""

    model: nn.Module
    gone: Mapping[str, Tensor]
    """By layer, which of its weights are zero and have to stay so: bool, shaped like the weight."""
    whole: tuple[str, ...] = ()
    """Layers that keep all weights, since the pattern does not fit them."""


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of all convolutions and linear layers by layer, each once: layers may share one.

    Biases and normalisation are never pruned. Raises UsageError if there are none.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):
            found.setdefault(id(module.weight), (name, module.weight))
    if not found:
        raise UsageError(f"{type(model).__name__} has no convolution or linear layer to prune")
    return dict(found.values())


def fitting_pattern(model: nn.Module, pattern: str) -> set[str]:
    """Return the prunable weights whose inputs are a multiple of M. Raises UsageError if there are none."""
    m = int(pattern.partition(":")[2])
    found = {name for name, weight in prunable(model).items() if weight.shape[1] % m == 0}
    if not found:
        raise UsageError(
            f"--prune is {pattern}, but no layer of {type(model).__name__} has a multiple of {m} inputs"
        )
    return found


@torch.no_grad()
def pruned(model: nn.Module, sparsity: float, how: str = "global") -> Pruned:
    """Return a copy of `model` without its smallest weights; nothing is trained or measured again afterwards.

    `how` is global (all weights compete), layer (those of each layer) or N:M such as 2:4 (of each M neighbouring
    inputs of a layer, at each place of the kernel, the N largest weights stay; `sparsity` is 1 - N/M). The first
    two choose as torch's global_unstructured and l1_unstructured, which cannot do channels_last weights. The last
    groups weights as NVIDIA's ASP does for sparse tensor cores (https://arxiv.org/abs/2104.08378); layers whose
    inputs are no multiple of M stay whole, as depthwise convolutions do.

    Raises UsageError for a model without such layers, or none that the pattern fits.
    """
    copied = copy.deepcopy(model)
    weights = prunable(copied)
    if how == "global":
        gone = _of_all(weights, sparsity)
    elif how == "layer":
        gone = {name: _smallest(weight, sparsity) for name, weight in weights.items()}
    else:
        n, m = map(int, how.split(":"))
        fitting = fitting_pattern(model, how)
        gone = {name: _of_runs(weight, n, m) for name, weight in weights.items() if name in fitting}
    hold(weights, gone)
    return Pruned(copied, gone, tuple(name for name in weights if name not in gone))


@torch.no_grad()
def hold(weights: Mapping[str, Tensor], gone: Mapping[str, Tensor]) -> None:
    """Set the weights that are gone to zero."""
    for name, entries in gone.items():
        weights[name].masked_fill_(entries, 0.0)


def zeros(weights: Mapping[str, Tensor]) -> int:
    """Return how many weights are zero."""
    return sum(int((weight == 0).sum()) for weight in weights.values())


def _of_all(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    sizes = torch.cat([weight.abs().flatten() for weight in weights.values()])
    parts = _smallest(sizes, sparsity).split([weight.numel() for weight in weights.values()])
    return {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}


def _smallest(weight: Tensor, sparsity: float) -> Tensor:
    sizes = weight.abs().flatten()
    gone = torch.zeros_like(sizes, dtype=torch.bool)
    gone[sizes.topk(round(sparsity * len(sizes)), largest=False).indices] = True
    return gone.view(weight.shape)


def _of_runs(weight: Tensor, n: int, m: int) -> Tensor:
    """Return which weights of [O, I, ...] are not among the `n` largest of `m` neighbours along I."""
    last = weight.abs().movedim(1, -1)
    runs = last.reshape(-1, m)
    smallest = runs.topk(m - n, largest=False).indices
    return torch.zeros_like(runs, dtype=torch.bool).scatter_(1, smallest, True).view(last.shape).movedim(-1, 1)
