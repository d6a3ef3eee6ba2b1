"""What a model can still do without part of its weights."""

from gmscale.evaluation.pruning.measurement import HOW, Pruning
from gmscale.evaluation.pruning.smallest import pruned

__all__ = ["HOW", "Pruning", "pruned"]
