"""What attacks climb or descend, image by image, in double precision.

There the loss of a confident model still has a gradient: cross-entropy up to logits about 100 apart, beyond which
its gradient by the pixels, in single precision, is zero. DLR does not change when all logits are scaled.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmscale.errors import UsageError

Loss = Callable[[Tensor, Tensor], Tensor]
"""logits [N, classes], labels [N] -> loss of each image, float64 [N]"""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each image's cross-entropy."""
    return F.cross_entropy(logits.double(), labels, reduction="none")


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each image's difference of logits ratio: positive where the image is misclassified.

    -(z_y - max z_i, i != y) / (z_(1) - z_(3)), z_(k) the k-th largest: equation 6 of Croce and Hein 2020, arXiv
    2003.01690. Raises UsageError where the model has fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise UsageError(
            f"--attack apgd-dlr is for a model of at least 3 classes; this one has {logits.shape[1]}: "
            "expected apgd-ce"
        )
    largest = logits.double().topk(3, dim=1).values
    spread = largest[:, 0] - largest[:, 2]
    return -margin(logits, labels) / spread.clamp_min(torch.finfo(torch.float64).tiny)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return by how much the logit of the right class exceeds every other's: negative where misclassified."""
    logits, right = logits.double(), labels[:, None]
    others = logits.scatter(1, right, -torch.inf)
    return logits.gather(1, right)[:, 0] - others.amax(1)


def climb(model: nn.Module, points: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, losses [N], and each loss's gradient by its image of `points` [N, C, H, W].

    Gradients of parameters are not computed. Where a gradient is not a number, it is zero: no step is taken.
    """
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        logits: Tensor = model(points)
        losses = loss(logits, labels)
        gradient = torch.autograd.grad(losses.sum(), points)[0]
    return logits.detach(), losses.detach(), gradient.nan_to_num(0.0)
