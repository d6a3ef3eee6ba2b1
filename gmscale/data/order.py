"""Which rank reads which sample at which step: pure functions of the shard lengths, the seed and the epoch.

Nothing here counts: the training loop keeps the position, so a resumed run asks for the step it stopped at.
"""

import numpy as np
from numpy.typing import NDArray

from gmscale.errors import UsageError

# Samples are shuffled among this many shards, so that a worker's reads stay within a few files.
WINDOW = 16

# Independent streams of random bits under one (seed, epoch).
_SHARDS, _SAMPLES, _AUGMENTATION = range(3)


def epoch_order(lengths: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """Return a permutation of all samples: shards permuted, samples shuffled within windows of 16 shards.

    `lengths` holds the samples per shard; sample i is the i-th over all shards in their given order.
    """
    starts = np.cumsum(lengths) - lengths
    shards = np.argsort(_bits(len(lengths), seed, epoch, _SHARDS), kind="stable")
    bits = _bits(int(lengths.sum()), seed, epoch, _SAMPLES)
    windows = []
    for first in range(0, len(shards), WINDOW):
        samples = np.concatenate(
            [np.arange(starts[s], starts[s] + lengths[s]) for s in shards[first : first + WINDOW]]
        )
        windows.append(samples[np.argsort(bits[samples], kind="stable")])
    return np.concatenate(windows)


def augmentation_seeds(count: int, seed: int, epoch: int) -> NDArray[np.uint64]:
    """Return one seed for each of `count` samples: a sample is augmented alike wherever it is loaded."""
    return _bits(count, seed, epoch, _AUGMENTATION)


def micro_batches(
    order: NDArray[np.int64],
    step: int,
    rank: int,
    world_size: int,
    batch_size_per_device: int,
    grad_accum_steps: int,
) -> list[NDArray[np.int64]]:
    """Return the samples of each micro-batch of `rank` at `step`.

    The step's global batch is one slice of `order`, the rank's share a slice of that, so any division of the
    same global batch size trains on the same samples: 8 ranks x 32 or 4 x 64.
    """
    per_rank = batch_size_per_device * grad_accum_steps
    first = (step * world_size + rank) * per_rank
    return np.split(order[first : first + per_rank], grad_accum_steps)


def steps_per_epoch(samples: int, global_batch_size: int) -> int:
    """Return the full global batches among `samples`; what remains is left out of this epoch only."""
    if samples < global_batch_size:
        raise UsageError(
            f"data.batch_size_per_device is too large: one step takes {global_batch_size} samples over all ranks "
            f"and micro-batches, the training split has {samples}"
        )
    return samples // global_batch_size


def rank_share(samples: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """Return the samples that `rank` evaluates: contiguous, together every sample once, perhaps none."""
    return np.array_split(np.arange(samples), world_size)[rank]


def _bits(count: int, seed: int, epoch: int, stream: int) -> NDArray[np.uint64]:
    # Raw bits, because numpy keeps them the same between its versions, which it does not promise for permutation().
    return np.random.Philox(np.random.SeedSequence((seed, epoch, stream))).random_raw(count)
