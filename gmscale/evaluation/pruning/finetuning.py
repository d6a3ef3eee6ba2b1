"""Fine-tuning of a pruned model: a few steps of the run's own optimizer, with what is gone held at zero."""

import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import count

import torch
import torch.nn.functional as F

from gmscale import data, models, parallel
from gmscale.errors import RunError
from gmscale.evaluation.pruning.smallest import Pruned, hold, prunable
from gmscale.evaluation.subject import Subject

# Of the run's highest learning rate; from there it falls to zero as a cosine. The rate at which a run ends, often
# zero itself, recovers less after pruning than a higher one that falls again: https://arxiv.org/abs/2105.03193
RATE = 0.1


def finetune(sparse: Pruned, subject: Subject, steps: int) -> None:
    """Train the model for `steps` optimizer steps in place; a collective.

    Images, batch, optimizer and clipping are the run's, the loss is plain cross-entropy in float32. All layers
    train, without gradient mask, mixing or erasing, and without dropout, which models loaded for evaluation do not
    have. Each rank normalises its own share of a batch, and rank 0's statistics stay.
    Raises RunError if a gradient is not finite.
    """
    config, world = subject.config, subject.world
    loader = subject.training()
    optim = replace(config.optim.for_batch(loader.global_batch_size), amp="none")
    settings = replace(
        config,
        model=replace(config.model, compile=""),
        optim=optim,
        parallel=replace(config.parallel, batch_norm="broadcast"),
    )
    model, weights = sparse.model.requires_grad_(True), prunable(sparse.model)
    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        torch.manual_seed(subject.seed + world.rank)
        wrapped = parallel.wrap(model, lambda whole: models.optimizer(whole, optim), settings, world)
        wrapped.model.train()
        batches = (micro_batches for epoch in count() for micro_batches in loader.epoch(epoch))
        for step, micro_batches in zip(range(steps), batches, strict=False):
            for group in wrapped.optimizer.param_groups:
                group["lr"] = rate(optim.lr, step, steps) * group.get("lr_scale", 1.0)
            wrapped.zero_grad()
            for number, batch in enumerate(micro_batches, 1):
                batch = batch._replace(late=None)  # which would mix and erase
                images, labels = data.to_device(batch, config.data, config.augment, 0, world.device)
                with nullcontext() if number == len(micro_batches) else wrapped.no_sync():
                    loss = F.cross_entropy(wrapped.model(images).float(), labels)
                    wrapped.backward(loss / len(micro_batches))
            # what is gone has no say in the norm of the gradient, nor in steps that weights take together
            hold({name: w.grad for name, w in weights.items() if w.grad is not None}, sparse.gone)
            if wrapped.step().skipped:
                raise RunError(f"step {step + 1} of fine-tuning the pruned model has no finite gradient")
            hold(weights, sparse.gone)
            subject.progress(step + 1, steps)
    model.requires_grad_(False).eval()


def rate(peak: float, step: int, steps: int) -> float:
    """Return the learning rate of step number `step` of `steps`, counted from 0."""
    return RATE * peak * 0.5 * (1 + math.cos(math.pi * step / steps))
