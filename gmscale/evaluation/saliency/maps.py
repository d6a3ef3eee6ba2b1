"""A saliency map of any timm image model: how much each pixel matters to the logit of a given class.

Captum has some of these; they are a few lines each, so the section does not need it, and tests compare with it.
"""

from torch import Tensor, nn

from gmscale.errors import check_choice
from gmscale.evaluation.saliency.cam import gradcam, gradcam_plus_plus
from gmscale.evaluation.saliency.gradients import gradient, integrated, smoothgrad
from gmscale.evaluation.saliency.lateral import lateral
from gmscale.masking.inhibition import log_kernel, paper_kernel

METHODS = ("log-paper", "log", "gradient", "smoothgrad", "integrated", "gradcam", "gradcam++")
"""The authors' method, the same with a kernel that has a negative lobe, and what both are compared with."""

_PAPER_SIGMA = 11.0
_SIGMA = 1.0


def saliency(
    model: nn.Module, pixels: Tensor, labels: Tensor, method: str, *, indices: Tensor, seed: int
) -> Tensor:
    """Return the map of each image, float32 [N, H, W] >= 0, of the logit of its label.

    `pixels` are [N, C, H, W] in [0, 1], `labels` int64 [N]. `model` takes pixels (`Subject.on_pixels`), is in
    evaluation mode, and is left as it is, also when this raises. Whatever is drawn (smoothgrad) depends on `seed`
    and the sample's number in `indices`, int64 [N]. A map's scale is its own: only compare positions of one map.
    Raises UsageError for a method that is not in METHODS, and where it needs layers with a grid of positions
    (log-paper, log, gradcam, gradcam++) and the model has none.
    """
    check_choice(method, METHODS, "--saliency")
    if method == "log-paper":
        found = lateral(model, pixels, labels, paper_kernel(_PAPER_SIGMA))
    elif method == "log":
        found = lateral(model, pixels, labels, log_kernel(_SIGMA))
    elif method == "gradient":
        found = gradient(model, pixels, labels)
    elif method == "smoothgrad":
        found = smoothgrad(model, pixels, labels, indices, seed)
    elif method == "integrated":
        found = integrated(model, pixels, labels)
    elif method == "gradcam":
        found = gradcam(model, pixels, labels)
    else:
        found = gradcam_plus_plus(model, pixels, labels)
    return found.float()
