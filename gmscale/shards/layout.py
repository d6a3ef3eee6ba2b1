"""Which sample of a build stands where: a pure function of their number, the seed and the size of a shard."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Shard(NamedTuple):
    """What goes into one shard."""

    name: str
    keys: list[str]
    samples: NDArray[np.int64]
    """Their numbers in the source."""


class Layout:
    """All samples, shuffled over shards of equal length or of one sample less."""

    def __init__(self, prefix: str, count: int, samples_per_shard: int, seed: int) -> None:
        shards = -(-count // samples_per_shard)
        self._parts = np.array_split(shuffled(count, seed), shards)
        digits = max(4, len(str(shards - 1)))
        self.names = [f"{prefix}-{number:0{digits}}.tar" for number in range(shards)]
        self._key_digits = max(7, len(str(count - 1)))

    def __iter__(self) -> Iterator[Shard]:
        first = 0
        for name, samples in zip(self.names, self._parts, strict=True):
            keys = [f"{key:0{self._key_digits}}" for key in range(first, first + len(samples))]
            first += len(samples)
            yield Shard(name, keys, samples)


def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """Return a permutation of `count` samples."""
    # Raw bits, because numpy keeps them the same between its versions, which it does not promise for permutation().
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable")
