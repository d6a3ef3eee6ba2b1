"""Structured pruning: whole channels go, with everything that belongs to them, and the model becomes smaller."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import Attention
from torch import nn
from torch.nn.modules.conv import _ConvNd

from gmscale.data import DataConfig
from gmscale.errors import UsageError
from gmscale.models.create import classifiers

_LEAST = 1e-9  # torch-pruning rounds down what stays: of ten channels, (1 - 0.9) * 10 would be none
_OFF = (
    0.1  # layers are narrow, so shares are not met exactly; further off, the library has not understood the model
)


def without_channels(model: nn.Module, sparsity: float, config: DataConfig) -> nn.Module:
    """Return a smaller copy of `model`, without the share `sparsity` of the channels of each layer.

    Of channels that depend on each other (torch-pruning's dependency graph, https://arxiv.org/abs/2301.12900),
    those go whose weights have the smallest L2 norm together, and at least one stays; of attention heads the same
    dimensions of each. Outputs of the classifier stay. The copy takes the same images, of `config`.

    Raises UsageError for a model whose channels torch-pruning cannot take out.
    """
    try:
        import torch_pruning
    except ImportError:
        raise UsageError('--prune_how structured needs torch-pruning; run: pip install "gmscale[eval]"') from None
    copied = copy.deepcopy(model).eval().requires_grad_(True)  # the graph of its gradients is what is read
    attention = _attention(copied)
    heads, kept = {module.qkv: module.num_heads for module in attention}, _classifiers(copied)
    device = next(copied.parameters()).device
    images = torch.zeros(1, config.channels, config.image_size, config.image_size, device=device)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = copied(images).shape
            graph = torch_pruning.DependencyGraph().build_dependency(copied, images)
            torch_pruning.pruner.BasePruner(
                copied,
                images,
                torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None),
                pruning_ratio=sparsity - _LEAST,
                pruning_ratio_dict=_narrow(graph, kept, heads, sparsity),
                ignored_layers=kept,
                num_heads=dict(heads),
                in_channel_groups={},  # the library's defaults would be shared between models
                out_channel_groups={},
            ).step()
            for module in attention:
                _fit_heads(module)
            found = copied(images).shape
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what its graph has wrong may raise anything
        raise _refused(model, " ".join(str(error).split())[:200] or type(error).__name__) from error
    share = 1 - channels(copied) / channels(model)
    if found != outputs:
        raise _refused(model, f"it would leave {found[1:].numel()} outputs of {outputs[1:].numel()}")
    if abs(share - sparsity) > _OFF:
        raise _refused(model, f"it would take {share:.0%} of them, not {sparsity:.0%}")
    return copied.requires_grad_(False)


def channels(model: nn.Module) -> int:
    """Return how many outputs all convolutions and linear layers have together, but for the classifier's."""
    heads = _classifiers(model)
    layers = [module for module in model.modules() if isinstance(module, _ConvNd | nn.Linear)]
    return sum(len(layer.weight) for layer in layers if layer not in heads)


def _attention(model: nn.Module) -> list[Attention]:
    """Return the attention of a model. Raises UsageError for any whose heads would be taken apart wrongly."""
    found = []
    for module in model.modules():
        if isinstance(module, Attention) and isinstance(module.q_norm, nn.Identity):
            found.append(module)
        elif hasattr(module, "num_heads"):
            raise _refused(model, f"it does not know the heads of its {type(module).__name__}")
    return found


def _classifiers(model: nn.Module) -> list[nn.Module]:
    return [module for name in classifiers(model) for module in model.get_submodule(name).modules()]


def _narrow(graph: Any, kept: list[nn.Module], heads: Mapping[Any, int], sparsity: float) -> dict[Any, float]:
    """Return the shares for layers of which nothing would be left: there all channels go but one.

    torch-pruning would leave them whole. What competes are the channels of one group of a convolution, or one head.
    """
    found = {}
    for group in graph.get_all_groups(ignored_layers=kept):
        layers = [item.dep.target.module for item in group]
        parts = [3 * heads[layer] if layer in heads else _groups(layer) for layer in layers]
        width = len(group[0].idxs) // max(parts)
        if width * (1 - sparsity) < 1 - _LEAST:
            found[layers[0]] = 1 - 1 / width - _LEAST
    return found


def _groups(layer: Any) -> int:
    """Return in how many groups of channels a layer works; each of a depthwise convolution is on its own."""
    groups = int(getattr(layer, "groups", 1))
    return 1 if groups == getattr(layer, "out_channels", None) else groups


def _fit_heads(attention: Attention) -> None:
    """Tell attention the new size of its heads; what it divides products of queries and keys by stays the same."""
    before, width = attention.head_dim, attention.qkv.out_features // 3
    attention.attn_dim, attention.head_dim = width, width // attention.num_heads
    attention.scale = attention.head_dim**-0.5
    with torch.no_grad():
        for part in (attention.qkv.weight, attention.qkv.bias):
            if part is not None:
                part[:width] *= (attention.head_dim / before) ** 0.5


def _refused(model: nn.Module, reason: str) -> UsageError:
    return UsageError(
        f"--prune_how structured: torch-pruning cannot take channels from {type(model).__name__}: {reason}; take "
        "global or layer"
    )
