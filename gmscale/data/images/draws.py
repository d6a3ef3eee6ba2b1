"""Random numbers that belong to one sample, wherever, by whom and in whose company it is loaded."""

import numpy as np

# Independent streams of random numbers under one seed; the loader's own draws from the seed are none of them.
MIXING, ERASING, GUIDING = 1, 2, 3


class Streams:
    """One generator that is put at the start of any (seed, stream).

    Philox is keyed by both, and numpy has frozen what RandomState makes of its bits, so a stream is the same in
    every version of numpy. Restarting takes 2 us; making a RandomState from a seed would take 100.
    """

    def __init__(self) -> None:
        self._random = np.random.RandomState(np.random.Philox(key=0))
        self._start = self._random.get_state(legacy=False)

    def start(self, seed: int, stream: int) -> np.random.RandomState:
        """Return the generator at the start of `stream` of a 64-bit `seed`, good until the next call."""
        self._start["state"]["key"][:] = seed, stream
        self._random.set_state(self._start)
        return self._random


def whole_number(random: np.random.RandomState, limit: int) -> int:
    """Return one of 0 .. limit - 1, limit at most 2 ** 53. randint takes several times as long."""
    return int(random.random_sample() * limit)


def number(random: np.random.RandomState, low: float, high: float) -> float:
    """Return a number between `low` and `high`."""
    return low + random.random_sample() * (high - low)
