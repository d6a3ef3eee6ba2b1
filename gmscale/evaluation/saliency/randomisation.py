"""Sanity check of saliency maps: a map that explains a model changes when the model's weights are drawn anew.

SOURCE: Adebayo et al. 2018, Sanity Checks for Saliency Maps, section 3: cascading randomisation. Zero is not within
reach of every model: strides and borders alone relate the gradients of two random inception_v3 by 0.7.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

STAGES = 4


def randomised(model: nn.Module, seed: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield (layer, copy of `model` with random weights from its output down to that layer), in up to 4 stages.

    Each stage takes a further quarter of the layers that hold parameters, in the order of the modules; the last
    copy has nothing left of the model. Layers draw as torch's `reset_parameters` does, running statistics go back
    to their start; parameters that it does not know (class tokens, position embeddings) are shuffled. The same on
    every device and rank.
    """
    device = next(model.parameters()).device
    changed = copy.deepcopy(model).cpu()
    layers = [
        (name, m) for name, m in changed.named_modules() if next(m.parameters(recurse=False), None) is not None
    ]
    layers.reverse()
    stages = min(STAGES, len(layers))
    ends = [len(layers) * (stage + 1) // stages for stage in range(stages)]
    for stage, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would change the generators of GPUs too
            torch.default_generator.manual_seed(seed + stage)
            for _, layer in layers[begin:end]:
                _redraw(layer)
        yield layers[end - 1][0] or "input", copy.deepcopy(changed).to(device)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's rank correlation of the maps [N, H, W] of each image: float64 [N], in [-1, 1].

    Tied pixels share the mean of their ranks. It is 0 where a map is constant, which has no order.
    """
    ranks = [_ranks(maps.flatten(1)) for maps in (a, b)]
    a, b = (r - r.mean(1, keepdim=True) for r in ranks)
    lengths = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return torch.where(lengths > 0, (a * b).sum(1) / lengths, 0.0)


@torch.no_grad()
def _redraw(layer: nn.Module) -> None:
    for parameter in layer.parameters(recurse=False):
        parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view(parameter.shape))
    if hasattr(layer, "reset_parameters"):
        layer.reset_parameters()  # type: ignore[operator]


def _ranks(x: Tensor) -> Tensor:
    """Return the rank of each entry in its row, of ties the mean; float64."""
    ordered = x.sort(1).values.contiguous()
    below = torch.searchsorted(ordered, x.contiguous())
    return (below + torch.searchsorted(ordered, x.contiguous(), right=True) - 1).double() / 2
