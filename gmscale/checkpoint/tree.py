"""Trees of dicts, lists, numbers, text, dtypes and tensors <-> JSON and a flat dict of tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_TENSOR = "__tensor__"
_STRIDE = "__stride__"  # of channels_last ones: a norm over them is rounded in the order of their memory
_DTYPE = "__dtype__"  # of a momentum kept in bfloat16, say
_INT_KEY = "__key__"  # JSON object keys are strings; the optimizer's are integers


def pack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Return `tree` as JSON values, its tensors moved into `tensors` under numbered names."""
    if isinstance(tree, Tensor):
        key = f"t{len(tensors):06d}"
        tensors[key] = tree
        return (
            {_TENSOR: key}
            if tree.is_contiguous() or not _is_dense(tree)
            else {_TENSOR: key, _STRIDE: tree.stride()}
        )
    if isinstance(tree, torch.dtype):
        return {_DTYPE: str(tree).removeprefix("torch.")}
    if isinstance(tree, Mapping):
        return {f"{_INT_KEY}{k}" if isinstance(k, int) else k: pack(v, tensors) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [pack(v, tensors) for v in tree]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"a checkpoint cannot hold {type(tree).__name__}")


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `pack` was given (tuples come back as lists)."""
    if isinstance(tree, dict):
        if _TENSOR in tree:
            found = tensors[tree[_TENSOR]]
            if _STRIDE not in tree:
                return found
            return torch.empty_strided(found.shape, tree[_STRIDE], dtype=found.dtype, device=found.device).copy_(
                found
            )
        if _DTYPE in tree:
            return getattr(torch, tree[_DTYPE])
        return {
            int(k.removeprefix(_INT_KEY)) if k.startswith(_INT_KEY) else k: unpack(v, tensors)
            for k, v in tree.items()
        }
    return [unpack(v, tensors) for v in tree] if isinstance(tree, list) else tree


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's entries lie in memory without gaps, in whatever order."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return last + 1 == tensor.numel()
