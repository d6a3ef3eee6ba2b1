"""Gradient quality of a checkpoint: what a mask does to its gradients, by METHOD.md's criterion; nothing trains.

The probe of a training run (sites/probe.py) measures one pair of adjacent steps; here the weights stand still, so a
pair can be drawn as often as wanted, and the criterion has an interval.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gmscale import data, models, parallel
from gmscale.config import TrainConfig
from gmscale.data import Batch, StreamLoader, TrainLoader
from gmscale.errors import UsageError, check_choice, check_range
from gmscale.evaluation.alignment import NUMBERS, STRENGTH, judged, summarized
from gmscale.evaluation.measurement import Measurement
from gmscale.evaluation.subject import Subject
from gmscale.losses import training_loss
from gmscale.masking import GradientMask
from gmscale.masking.mask import Operator
from gmscale.sites.selection import select

CONFIGURED = "configured"
OPERATORS = (CONFIGURED, *get_args(Operator))

_FEWEST = 2  # images of a batch: mixing takes pairs, and batch normalisation more than one


@dataclass(frozen=True, kw_only=True)
class GradientQuality(Measurement):
    """Held-out alignment gain dQ of a mask of the weight gradients, with its random control, layer by layer.

    Of each pair of batches, disjoint parts of one epoch, the first gives `ranks` gradients g_r, G = mean g_r, and
    m = mean mask(g_r) (agreement consensus: by the mean of the lateral maps), the second G'; then
    dQ = cos(m, G') - cos(G, G') (METHOD.md, "Gradient quality"). Everything but the mask is as in training: images
    in the run's order and augmentation, its loss, batch normalisation by the batch; except that arithmetic is
    float32, that nothing is dropped out, repeated or augmented by saliency, and that layer outputs are not masked.
    The mask works at full strength and without error feedback: a single step holds nothing back from earlier ones.
    """

    section: ClassVar[str] = "quality"
    shown: ClassVar[dict[str, tuple[str, str]]] = {
        "gain": ("dQ", "+.4f"),
        "gain_low": ("95 % from", "+.4f"),
        "gain_high": ("to", "+.4f"),
        "control_gain": ("random's", "+.4f"),
        "kept_entries": ("kept", ".0%"),
        "kept_energy": ("energy", ".0%"),
    }

    operator: str = CONFIGURED
    """configured: the run's mask.* settings, even if mask.enabled is false; else an operator with its defaults."""
    pairs: int = 8
    """Pairs of independent batches."""
    ranks: int = 4
    """Gradients of a batch, each masked by itself: micro-batches stand for the ranks of a training run."""
    batch_size: int | None = None
    """Images of one such gradient; None takes data.batch_size_per_device, or fewer where the split is small."""

    def __post_init__(self) -> None:
        check_choice(self.operator, OPERATORS, "--quality")
        check_range(self.pairs, "--pairs", 2, whole=True)
        check_range(self.ranks, "--quality_ranks", 2, whole=True)
        if self.batch_size is not None:
            check_range(self.batch_size, "--quality_batch_size", _FEWEST, whole=True)

    @property
    def trains(self) -> bool:
        return True

    @property
    def words(self) -> str:
        mask = "the configured mask" if self.operator == CONFIGURED else self.operator
        return f"{mask}, {self.pairs} pairs of batches"

    def mask(self, config: TrainConfig) -> GradientMask:
        """Return the mask that is judged."""
        return config.mask if self.operator == CONFIGURED else GradientMask(operator=self.operator)  # type: ignore[arg-type]

    def check(self, subject: Subject) -> None:
        """Raise UsageError if the training split is too small."""
        if self.batch_size is not None:
            self._loader(subject)

    def measure(self, subject: Subject) -> dict[str, Any]:
        """Return means over the pairs of each layer and, weighted by entries, of all, with dQ's 95 % t interval.

        Only dQ above 0 says that what the mask takes away was noise. `over_control`, dQ minus that of a random mask
        with equally many kept units, is above 0 for any mask that keeps the larger ones; snr, gsnr and noise_scale
        are diagnostics, never evidence. Raises UsageError for a training split that is too small, and for a mask
        that touches nothing.
        """
        mask, world = self.mask(subject.config), subject.world
        model = _as_in_training(subject.model, subject.config)
        selection = select(model, mask)
        loader, images = self._loader(subject)
        share = np.array_split(np.arange(self.pairs), world.size)[world.rank].tolist()
        entries = {t.name: torch.Size(t.shape).numel() for t in selection.touched}
        table = torch.zeros(self.pairs, len(entries), NUMBERS, dtype=torch.float64)
        parameters = list(selection.parameters.values())

        def gradients(batch: Batch) -> tuple[Tensor, ...]:
            config = subject.config
            inputs, targets = data.to_device(batch, config.data, config.augment, len(loader.classes), world.device)
            with torch.enable_grad():
                loss = training_loss(model(inputs), targets, config.optim)
                return torch.autograd.grad(loss, parameters, materialize_grads=True)

        for done, (pair, batches) in enumerate(_pairs(loader, share), 1):
            first = zip(*(gradients(batch) for batch in batches[: self.ranks]), strict=True)
            following = [torch.zeros_like(p) for p in parameters]
            for batch in batches[self.ranks :]:  # their sum: a cosine needs no division
                for total, gradient in zip(following, gradients(batch), strict=True):
                    total += gradient
            layers = zip(entries, first, following, strict=True)
            rows = [judged(of_ranks, after, mask, (subject.seed, pair, name)) for name, of_ranks, after in layers]
            table[pair] = torch.stack(rows).cpu()
            subject.progress(done, len(share))
        found = summarized(subject.total(table), entries, self.ranks)
        return {
            "judged": mask.operator,
            "strength": STRENGTH,
            "trained_with_mask": subject.config.mask.enabled,
            "images_of_a_gradient": images,
            "masked_parameters": len(entries),
            **{name: found["combined"][name] for name in self.shown},
            **found,
        }

    def _loader(self, subject: Subject) -> tuple[TrainLoader | StreamLoader, int]:
        """Open the training split as one process has it, of which a step is a pair; return it and the batch size.

        A collective: the first process of a node indexes the split where nobody did.
        """
        config, world, batches = subject.config, subject.world, 2 * self.ranks

        def opened(images: int, accumulate: int) -> TrainLoader | StreamLoader:
            section = replace(config.data, batch_size_per_device=images, decode="exact")
            # copies of a sample would be in both batches of a pair
            return data.train_loader(section, replace(config.augment, repeats=1), config.run.seed, 0, 1, accumulate)

        def fitting() -> tuple[TrainLoader | StreamLoader, int]:
            samples = opened(_FEWEST, 1).samples
            most = samples // batches // _FEWEST * _FEWEST
            images = self.batch_size or min(config.data.batch_size_per_device, most)
            if images * batches > samples or images < _FEWEST:
                split = f"data.train_split {config.data.train_split!r} has {samples} images"
                raise UsageError(
                    f"--quality_batch_size is {images}, but {split}; expected at most {most}, since a pair takes "
                    f"{batches} batches"
                    if most and self.batch_size
                    else f"--quality takes {batches} batches of {_FEWEST} images or more for a pair; {split}"
                )
            return opened(images, batches), images

        with parallel.together(world):
            if world.local_rank == 0:
                both = fitting()
        with parallel.together(world):
            if world.local_rank != 0:
                both = fitting()
        return both


def _as_in_training(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Return a copy whose weights need gradients, but for frozen ones; only batch normalisation is set to train.

    Dropout and stochastic depth would make the result depend on more than the images.
    """
    model = copy.deepcopy(model).requires_grad_(True).eval()
    # from finetune.unfreeze_epoch on nothing is frozen
    frozen = models.freeze(model, config.finetune) if config.finetune.unfreeze_epoch == 0 else None
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    if frozen is not None:
        frozen.hold()
    return model


def _pairs(loader: TrainLoader | StreamLoader, share: Sequence[int]) -> Iterator[tuple[int, list[Batch]]]:
    """Yield the pairs of a contiguous `share` with their batches: the steps of one epoch after another."""
    batches: Iterator[list[Batch]] = iter(())
    for pair in share:
        epoch, step = divmod(pair, loader.steps_per_epoch)
        if pair == share[0] or step == 0:
            batches = loader.epoch(epoch, step)
        yield pair, next(batches)
