"""Trees of dicts, lists, numbers, text, dtypes and tensors <-> JSON and a flat dict of tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_TENSOR = "__tensor__"
_DTYPE = "__dtype__"  # of a momentum kept in bfloat16, say
_INT_KEY = "__key__"  # JSON object keys are strings; the optimizer's are integers


def pack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Return `tree` as JSON values, its tensors moved into `tensors` under numbered names."""
    if isinstance(tree, Tensor):
        key = f"t{len(tensors):06d}"
        tensors[key] = tree
        return {_TENSOR: key}
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
            return tensors[tree[_TENSOR]]
        if _DTYPE in tree:
            return getattr(torch, tree[_DTYPE])
        return {
            int(k.removeprefix(_INT_KEY)) if k.startswith(_INT_KEY) else k: unpack(v, tensors)
            for k, v in tree.items()
        }
    return [unpack(v, tensors) for v in tree] if isinstance(tree, list) else tree
