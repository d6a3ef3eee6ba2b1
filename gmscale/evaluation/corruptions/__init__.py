"""Corrupted images: ImageNet-C's families made here, or read from ImageNet-C itself."""

from gmscale.corruption_error import EXTRA, FAMILIES, GROUPS, SEVERITIES
from gmscale.evaluation.corruptions.corrupt import corrupt
from gmscale.evaluation.corruptions.measurement import CorruptedFolder, Corruption

__all__ = ["EXTRA", "FAMILIES", "GROUPS", "SEVERITIES", "CorruptedFolder", "Corruption", "corrupt"]
