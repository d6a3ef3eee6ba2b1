"""The training loss is that of timm's modules."""

import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor

from gmscale.config import OptimConfig
from gmscale.errors import UsageError
from gmscale.losses import training_loss

N, CLASSES = 12, 7
SMOOTHING = [0.0, 0.1, 0.5]


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(N, CLASSES, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(0, CLASSES, (N,), generator=torch.Generator().manual_seed(1))


def mixed(labels: Tensor, lam: float) -> Tensor:
    """Targets of timm's Mixup without smoothing, as the data hands them over."""
    return mixup_target(labels, CLASSES, lam, smoothing=0.0)


@pytest.mark.parametrize("smoothing", SMOOTHING)
def test_cross_entropy_of_labels_is_timms(logits: Tensor, labels: Tensor, smoothing: float) -> None:
    ours = training_loss(logits, labels, OptimConfig(label_smoothing=smoothing))
    torch.testing.assert_close(ours, LabelSmoothingCrossEntropy(smoothing)(logits, labels))


@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("lam", [1.0, 0.7])
def test_cross_entropy_of_mixed_targets_is_timms(
    logits: Tensor, labels: Tensor, lam: float, smoothing: float
) -> None:
    ours = training_loss(logits, mixed(labels, lam), OptimConfig(label_smoothing=smoothing))
    smoothed = mixup_target(labels, CLASSES, lam, smoothing=smoothing)
    torch.testing.assert_close(ours, SoftTargetCrossEntropy()(logits, smoothed))


@pytest.mark.parametrize("bce_sum", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("smoothing", SMOOTHING)
def test_binary_cross_entropy_is_timms(
    logits: Tensor, labels: Tensor, smoothing: float, threshold: float | None, bce_sum: bool
) -> None:
    config = OptimConfig(loss="bce", label_smoothing=smoothing, bce_threshold=threshold, bce_sum=bce_sum)
    theirs = BinaryCrossEntropy(smoothing, threshold, sum_classes=bce_sum)
    torch.testing.assert_close(training_loss(logits, labels, config), theirs(logits, labels))
    smoothed = mixup_target(labels, CLASSES, 0.7, smoothing=smoothing)
    torch.testing.assert_close(training_loss(logits, mixed(labels, 0.7), config), theirs(logits, smoothed))


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_a_loss_under_autocast_is_computed_in_float32(logits: Tensor, labels: Tensor, loss: str) -> None:
    config = OptimConfig(loss=loss, label_smoothing=0.1)  # type: ignore[arg-type]
    half = logits.bfloat16()
    for targets in (labels, mixed(labels, 0.7)):
        with torch.autocast("cpu", torch.bfloat16):
            ours = training_loss(half, targets, config)
        assert ours.dtype == torch.float32
        assert torch.equal(ours, training_loss(half.float(), targets, config))


@pytest.mark.parametrize("setting", [{"bce_threshold": 0.2}, {"bce_sum": True}])
def test_what_a_loss_would_ignore_is_refused(setting: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=rf"optim\.{next(iter(setting))} is set, but optim\.loss ce"):
        OptimConfig(**setting)  # type: ignore[arg-type]
