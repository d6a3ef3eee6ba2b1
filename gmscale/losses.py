"""The training loss: a pure function of logits, targets and settings, the same as timm's loss modules."""

import torch.nn.functional as F
from torch import Tensor

from gmscale.config import OptimConfig


def training_loss(logits: Tensor, targets: Tensor, config: OptimConfig) -> Tensor:
    """Return the float32 mean loss (0-d) of logits [N, C] and targets: labels [N], or shares of the classes [N, C].

    Targets come without label smoothing; mixed ones are smoothed as timm's Mixup does it. Binary cross-entropy is
    the mean over images and classes, or with optim.bce_sum over images only.
    """
    logits = logits.float()
    if config.loss == "ce":
        return F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
    classes = logits.shape[1]
    if targets.dim() == 1:
        targets = F.one_hot(targets, classes)
    shares = targets * (1 - config.label_smoothing) + config.label_smoothing / classes
    if config.bce_threshold is not None:
        shares = (shares > config.bce_threshold).float()
    loss = F.binary_cross_entropy_with_logits(logits, shares.float(), reduction="none")
    return loss.sum(1).mean() if config.bce_sum else loss.mean()
