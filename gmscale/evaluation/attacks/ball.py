"""The ball that an attack may move an image in: L-inf or L2 of some radius around it, within [0, 1]."""

import torch
from torch import Tensor

from gmscale.evaluation.draws import uniform

NORMS = ("linf", "l2")

TINY = 1e-12


def random_start(pixels: Tensor, indices: Tensor, *, eps: float, norm: str, key: tuple[int, int]) -> Tensor:
    """Return a point of the ball of radius `eps` for each image, evenly distributed, shaped like `pixels`.

    It depends on the `key` and on the sample's number in `indices`, int64 [N], not on the other samples.
    """
    draws = uniform(indices.to(pixels.device), pixels[0].numel() + 1, key)
    start = 2 * draws[:, 1:] - 1
    if norm == "linf":
        start = eps * start
    else:
        normal = start.erfinv()  # directions of Gaussian vectors are evenly distributed
        radius = eps * draws[:, :1] ** (1 / normal.shape[1])
        start = radius * normal / normal.norm(dim=1, keepdim=True)
    return start.view(pixels.shape)


def direction(gradient: Tensor, norm: str) -> Tensor:
    """Return the step of length 1 in `norm` that climbs most; none where the gradient is zero."""
    if norm == "linf":
        return gradient.sign()
    # squares of a confident model's gradient would be zero in single precision
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)
    gradient = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / lengths(gradient).clamp_min(TINY)


def project(moved: Tensor, pixels: Tensor, *, eps: float, norm: str) -> Tensor:
    """Return `moved` [N, C, H, W] within [0, 1] and then within the ball around `pixels`."""
    change = moved.clamp(0, 1) - pixels
    if norm == "linf":
        change = change.clamp(-eps, eps)
    else:
        change = change * (eps / lengths(change).clamp_min(max(eps, TINY)))
    # drawn nearer to `pixels` it stays in [0, 1], but for rounding
    return (pixels + change).clamp(0, 1)


def lengths(images: Tensor) -> Tensor:
    """Return the L2 norm of each image [N, C, H, W], [N, 1, 1, 1]."""
    return torch.linalg.vector_norm(images, dim=(1, 2, 3), keepdim=True)
