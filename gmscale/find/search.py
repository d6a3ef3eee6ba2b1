"""Which batch sizes to try: pure functions of what fitted so far."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence


def divisors(number: int, *, even: bool = False) -> list[int]:
    """Return the divisors of `number`, rising; only the `even` ones if asked for."""
    return [d for d in range(1, number + 1) if number % d == 0 and (d % 2 == 0 or not even)]


def round_sizes(most: int, *, even: bool = False) -> list[int]:
    """Return sizes up to `most` in steps of at most a quarter: ..., 8, 10, 12, 14, 16, 20, 24, 28, 32, ..."""
    sizes, size = [], 1
    while size <= most:
        sizes.append(size)
        size += max(1, 2 ** (size.bit_length() - 3))
    return [s for s in sizes if s % 2 == 0 or not even]


def largest_fitting(sizes: Sequence[int], start: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest of the rising `sizes` that fits, or None; whatever is smaller than one that fits does too.

    From about `start` the sizes are doubled until one does not fit, or halved until one does; the rest is bisected.
    """
    low, high = -1, len(sizes)  # indices: the largest that fits, the smallest that does not
    i = min(bisect_left(sizes, start), len(sizes) - 1)
    while low < i < high:
        if fits(sizes[i]):
            low = i
            if high == len(sizes):
                i = max(i + 1, bisect_right(sizes, 2 * sizes[i]) - 1)
                continue
        else:
            high = i
            if low == -1:
                i = min(i - 1, max(0, bisect_right(sizes, sizes[i] // 2) - 1))
                continue
        i = (low + high) // 2
    return sizes[low] if low >= 0 else None


def predicted(measured: Sequence[tuple[int, float]], size: int) -> float | None:
    """Return the memory of `size` on the line through the two largest measured (size, memory); None with fewer."""
    if len(measured) < 2:
        return None
    (b1, m1), (b2, m2) = sorted(measured)[-2:]
    return m2 + max(0.0, (m2 - m1) / (b2 - b1)) * (size - b2)
