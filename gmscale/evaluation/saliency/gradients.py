"""Saliency of pixels: gradients of the target's logit, plain, under noise, and along a path."""

import numpy as np
import torch
from torch import Tensor, nn

from gmscale.evaluation.draws import uniform
from gmscale.evaluation.saliency.layers import target_logits

NOISE = 0.15
"""Standard deviation of the noise, relative to the range of the image's pixels."""
COPIES = 16
STEPS = 32


def pixel_gradient(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of each target's logit, shaped like `pixels` [N, C, H, W]."""
    pixels = pixels.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(target_logits(model, pixels, labels), pixels)[0]


def gradient(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Return the largest absolute gradient over the channels of each pixel, [N, H, W].

    SOURCE: Simonyan et al. 2013, section 3.1.
    """
    return pixel_gradient(model, pixels, labels).abs().amax(1)


def smoothgrad(model: nn.Module, pixels: Tensor, labels: Tensor, indices: Tensor, seed: int) -> Tensor:
    """Return the mean of `gradient` over `COPIES` copies of the image with Gaussian noise, [N, H, W].

    SOURCE: Smilkov et al. 2017, section 3. The noise depends on the `seed` and the sample's number in `indices`,
    int64 [N].
    """
    deviation = NOISE * (pixels.amax((1, 2, 3)) - pixels.amin((1, 2, 3)))[:, None, None, None]
    total = torch.zeros(len(pixels), *pixels.shape[-2:], device=pixels.device)
    for copy in range(COPIES):
        draws = uniform(indices.to(pixels.device), pixels[0].numel(), (seed, copy))
        noise = torch.special.ndtri(draws).view(pixels.shape)
        total += gradient(model, pixels + deviation * noise, labels)
    return total / COPIES


def integrated_gradients(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Return what each pixel adds to the logit on the way from black, shaped like `pixels`, signed.

    The sum is the logit's change (completeness), up to the error of the integral: `STEPS` points of Gauss-Legendre.
    SOURCE: Sundararajan et al. 2017, equation 1.
    """
    nodes, weights = _gauss_legendre(STEPS)
    total = torch.zeros_like(pixels)
    for node, weight in zip(nodes, weights, strict=True):
        total += weight * pixel_gradient(model, node * pixels, labels)
    return total * pixels


def integrated(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Return the size of each pixel's integrated gradient, summed over its channels, [N, H, W]."""
    return integrated_gradients(model, pixels, labels).sum(1).abs()


def _gauss_legendre(points: int) -> tuple[list[float], list[float]]:
    """Return nodes in (0, 1) and their weights, which sum to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()
