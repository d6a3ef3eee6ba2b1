"""Which rank reads which sample at which step: pure functions of the shard lengths, the seed and the epoch.

Nothing here counts: the training loop keeps the position, so a resumed run asks for the step it stopped at.
"""

from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from gmscale.errors import UsageError

# Samples are shuffled among this many shards, so that a worker's reads stay within a few files.
WINDOW = 16

# Independent streams of random bits under one (seed, epoch).
_SHARDS, _SAMPLES, _AUGMENTATION = range(3)

_Number = TypeVar("_Number", np.int64, np.uint64)


class Plan(NamedTuple):
    """What an epoch trains on, place by place."""

    samples: NDArray[np.int64]
    seeds: NDArray[np.uint64]
    """Of the augmentation of each."""


def epoch_plan(
    lengths: NDArray[np.int64], seed: int, epoch: int, repeats: int = 1, global_batch_size: int = 1
) -> Plan:
    """Return the samples of an epoch in their order, each `repeats` times with other augmentation seeds.

    The epoch keeps its length, so it ends after a part of `epoch_order`, another one in each epoch. The copies of a
    sample are in one global batch, or in two that follow one another. Within a global batch all first copies come
    before all second ones, as far apart as can be: so ranks, micro-batches and neighbours that are mixed have
    different samples where there are enough, as in timm's RepeatAugSampler.
    """
    samples = epoch_order(lengths, seed, epoch)
    count = len(samples)
    bits = random_bits(seed, epoch, _AUGMENTATION)
    if repeats == 1:
        return Plan(samples, bits.random_raw(count)[samples])
    samples = np.repeat(samples, repeats)[:count]
    seeds = np.empty(count, dtype=np.uint64)
    for copy in range(repeats):
        own = slice(copy, None, repeats)
        seeds[own] = bits.random_raw(count)[samples[own]]
    places = np.arange(count)
    places = np.lexsort((places % repeats, places // global_batch_size))
    return Plan(samples[places], seeds[places])


def epoch_order(lengths: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """Return a permutation of all samples: shards permuted, samples shuffled within windows of 16 shards.

    `lengths` holds the samples per shard; sample i is the i-th over all shards in their given order.
    """
    starts = np.cumsum(lengths) - lengths
    shards = np.argsort(random_bits(seed, epoch, _SHARDS).random_raw(len(lengths)), kind="stable")
    bits = random_bits(seed, epoch, _SAMPLES).random_raw(int(lengths.sum()))
    windows = []
    for first in range(0, len(shards), WINDOW):
        samples = np.concatenate(
            [np.arange(starts[s], starts[s] + lengths[s]) for s in shards[first : first + WINDOW]]
        )
        windows.append(samples[np.argsort(bits[samples], kind="stable")])
    return np.concatenate(windows)


def augmentation_seeds(count: int, seed: int, epoch: int) -> NDArray[np.uint64]:
    """Return one seed for each of `count` samples: a sample is augmented alike wherever it is loaded."""
    return random_bits(seed, epoch, _AUGMENTATION).random_raw(count)


def micro_batches(
    order: NDArray[_Number],
    step: int,
    rank: int,
    world_size: int,
    batch_size_per_device: int,
    grad_accum_steps: int,
) -> list[NDArray[_Number]]:
    """Return the samples, or their seeds, of each micro-batch of `rank` at `step`.

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


def random_bits(*key: int) -> np.random.Philox:
    """Return the stream of random bits that belongs to a key, such as (seed, epoch, purpose)."""
    # Raw bits, because numpy keeps them the same between its versions, which it does not promise for permutation().
    return np.random.Philox(np.random.SeedSequence(key))
