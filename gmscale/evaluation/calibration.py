"""Whether a model is right as often as it is sure: expected calibration error and what it is made of.

SOURCE: Guo et al., On Calibration of Modern Neural Networks (2017), arXiv 1706.04599, section 2.
"""

from typing import Any

import torch
from torch import Tensor

BINS = 15


def bin_sums(confidence: Tensor, correct: Tensor) -> Tensor:
    """Return what predictions [N] add to each bin: float64 [BINS, 3] of confidence, right ones, and number.

    Bin m, from 1, holds confidences in ((m - 1) / BINS, m / BINS]. Sums of disjoint parts may be added.
    """
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64, device=confidence.device)[1:-1]
    confidence = confidence.double()
    # a product, for scatter_add on a GPU would add in any order and bincount wait for the device
    member = torch.bucketize(confidence, edges)[:, None] == torch.arange(BINS, device=confidence.device)
    return member.double().T @ torch.stack((confidence, correct.double(), torch.ones_like(confidence)), 1)


def calibration(sums: Tensor) -> dict[str, Any]:
    """Return, of the whole set's `bin_sums`, ece in percent (equation 3) and the bins of a reliability diagram.

    Each bin has confidence and accuracy, means as shares of 1, None where it is empty, and count.
    """
    confidence, correct, count = sums.double().cpu().unbind(1)
    gap = (correct - confidence).abs().sum() / count.sum()  # n_b |accuracy - confidence| over n
    means = torch.stack((confidence, correct), 1) / count[:, None]
    return {
        "ece": 100 * float(gap),
        "bins": [
            {"confidence": sure if n else None, "accuracy": right if n else None, "count": int(n)}
            for (sure, right), n in zip(means.tolist(), count.tolist(), strict=True)
        ],
    }
