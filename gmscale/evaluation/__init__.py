"""What a trained model can do. Never imports train."""

from gmscale.evaluation.accuracy import evaluate
from gmscale.evaluation.samples import write_samples

__all__ = ["evaluate", "write_samples"]
