"""Class activation maps: the channels of one layer, weighted by their gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmscale.evaluation.saliency.layers import last_maps


def gradcam(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Return Grad-CAM, [N, H, W]: relu(sum_k w_k A_k), w_k the mean gradient of channel k.

    SOURCE: Selvaraju et al. 2017, equations 1 and 2. A is the last layer with a grid; the map is resized
    bilinearly to the image.
    """
    activations, gradients = last_maps(model, pixels, labels)
    return _upsampled(gradients.mean((2, 3), keepdim=True), activations, pixels)


def gradcam_plus_plus(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Return Grad-CAM++, [N, H, W]: relu(sum_k w_k A_k), w_k = sum_ij alpha_ij relu(exp(S) G_ij).

    SOURCE: Chattopadhay et al. 2018, equations 1, 5 and 19: for the score exp(S) alpha_ij is
    G_ij^2 / (2 G_ij^2 + sum_ab A_ab * G_ij^3), with G the gradient of the logit S. exp(S) is one factor for the
    whole map and left out. Where activations may be negative, so may alpha.
    """
    activations, gradients = last_maps(model, pixels, labels)
    denominator = 2 + activations.sum((2, 3), keepdim=True) * gradients  # divided by G^2: no underflow
    alpha = torch.where(denominator == 0, 0, 1 / denominator)
    return _upsampled((alpha * F.relu(gradients)).sum((2, 3), keepdim=True), activations, pixels)


def _upsampled(weights: Tensor, activations: Tensor, pixels: Tensor) -> Tensor:
    cam = F.relu((weights * activations).sum(1, keepdim=True))
    return F.interpolate(cam, pixels.shape[-2:], mode="bilinear")[:, 0]
