"""Random numbers that depend on the sample alone: no result changes with batch size, limit or number of ranks."""

import torch
from torch import Tensor

_ODD = -0x61C8864680B583EB  # 2**64 divided by the golden ratio, as int64


def uniform(indices: Tensor, count: int, key: tuple[int, int]) -> Tensor:
    """Return `count` numbers evenly distributed in (0, 1) for each of `indices`: float32 [N, count].

    splitmix64 at a position that follows from key and index, since a generator would need a loop over the images.
    """
    state = torch.zeros_like(indices)
    for part in (*key, indices):
        state = _mixed(state + part + 1)
    bits = _mixed(state[:, None] + _ODD * torch.arange(1, count + 1, device=indices.device))
    return (_shifted(bits, 41).float() + 0.5) / 2**23


def _mixed(x: Tensor) -> Tensor:
    """Return the finaliser of splitmix64; products wrap around."""
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Return int64 `x` shifted to the right as if it had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
