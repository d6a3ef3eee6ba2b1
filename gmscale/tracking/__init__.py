"""What a run tells: metrics.jsonl, TensorBoard, Weights & Biases, and one live line on the terminal."""

from gmscale.tracking.clock import StepClock
from gmscale.tracking.tracker import Tracker, plain_console
from gmscale.tracking.weights_and_biases import check

__all__ = ["StepClock", "Tracker", "check", "plain_console"]
