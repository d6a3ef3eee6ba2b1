"""The saliency of Jiang et al. 2022: lateral inhibition of the gradient at every layer, summed over layers.

SOURCE: the authors' public code (METHOD.md, second row of the sources), which is read here, not copied.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmscale.evaluation.saliency.layers import at_each_layer
from gmscale.masking.inhibition import centre_surround
from gmscale.masking.outputs import output_map


def lateral(model: nn.Module, pixels: Tensor, labels: Tensor, kernel: Tensor) -> Tensor:
    """Return sum over layers of relu(resize(-LoG * ||g||)) with g the gradient at a layer: [N, H, W].

    g is the gradient of the target's logit at what enters each activation (the authors: each ReLU), ||.|| the L2
    norm over channels, `kernel` [k, k] a centre-positive -LoG, correlated under reflect padding. Maps are resized
    bilinearly (the authors: Lanczos) and rectified afterwards. Layers are not weighted: the authors do not either.
    """
    size = pixels.shape[-2:]
    total = torch.zeros(len(pixels), *size, device=pixels.device)

    def add(gradient: Tensor) -> None:
        response = centre_surround(output_map(gradient, 1), kernel)
        total.add_(F.relu(F.interpolate(response[:, None], size, mode="bilinear")[:, 0]))

    at_each_layer(model, pixels, labels, add)
    return total
