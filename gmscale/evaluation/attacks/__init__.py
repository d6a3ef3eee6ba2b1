"""Attacks: accuracy on images that were changed, within a ball of radius eps, to be misclassified.

Images are pixels in [0, 1]; normalisation is part of the model that is attacked. Everything an attack draws depends
on the sample alone, so results do not depend on how samples are divided into batches and among ranks.
"""

from gmscale.evaluation.attacks.auto_pgd import apgd
from gmscale.evaluation.attacks.ball import NORMS, random_start
from gmscale.evaluation.attacks.gradient import fgsm, pgd
from gmscale.evaluation.attacks.measurement import ATTACKS, Attack, survivors
from gmscale.evaluation.attacks.squares import square

__all__ = ["ATTACKS", "NORMS", "Attack", "apgd", "fgsm", "pgd", "random_start", "square", "survivors"]
