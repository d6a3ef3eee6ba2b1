"""Safetensors files, written piece by piece.

Writing is plain file writes, fit for a thread: they release the interpreter's lock, raise OSError when the disk is
full, may be cut off by the end of the process, and need no memory besides the pieces. Reading is left to the
safetensors package.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from gmscale.errors import UsageError

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class Layout(NamedTuple):
    """What a file says of a tensor before its entries."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


class TensorFile:
    """A safetensors file in the making: whoever `put`s every entry of every tensor has a whole one."""

    def __init__(self, file: RawIOBase, layouts: Mapping[str, Layout], text: str) -> None:
        self._file, self._layouts = file, layouts
        header: dict[str, object] = {"__metadata__": {"format": "pt", "tree": text}}
        self._places, end = {}, 0
        # widest entries first: every tensor then begins at a multiple of its entry's size
        for name, layout in sorted(layouts.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
            begin, end = end, end + layout.entries * layout.dtype.itemsize
            kind = _NAMES[layout.dtype]
            header[name] = {"dtype": kind, "shape": layout.shape, "data_offsets": (begin, end)}
            self._places[name] = begin
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        head = len(encoded).to_bytes(8, "little") + encoded
        self._begin = len(head)
        self._write(memoryview(head))

    def put(self, name: str, entries: Tensor, offset: int = 0) -> None:
        """Write `entries` of a tensor, a contiguous CPU tensor, from entry `offset` of the flattened one on."""
        itemsize = self._layouts[name].dtype.itemsize
        self._file.seek(self._begin + self._places[name] + offset * itemsize)
        self._write(entries.reshape(-1).view(torch.uint8).numpy().data)

    def _write(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]


@contextmanager
def new_file(path: Path, layouts: Mapping[str, Layout], text: str = "") -> Iterator[TensorFile]:
    """Context of a new file, to be filled with tensors of `layouts`; `text` is kept beside them.

    At the end it is durable; after an exception it is gone, and a disk that was full has its space back. Raises
    OSError.
    """
    with open(path, "xb", buffering=0) as file:
        try:
            yield TensorFile(file, layouts, text)
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], text: str = "") -> None:
    """Write tensors, and a text beside them, to a new file; wait until it is on the disk."""
    layouts = {name: Layout(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with new_file(path, layouts, text) as file:
        for name in tensors:
            file.put(name, tensors[name].detach().cpu().contiguous())


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a file and the text beside them. Raises UsageError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("tree", "")
        return load_file(path), text
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from None


def read_layouts(path: Path) -> tuple[dict[str, Layout], str]:
    """Return what a file says of its tensors, and the text beside them. Raises UsageError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            layouts = {n: Layout(_DTYPES[s.get_dtype()], tuple(s.get_shape())) for n, s in slices.items()}
            return layouts, (file.metadata() or {}).get("tree", "")
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> UsageError:
    """Return the error that says how to go on without a damaged checkpoint."""
    folder = path if path.is_dir() else path.parent
    return UsageError(
        f"checkpoint file {path} cannot be read ({error}); remove {folder} to resume from an older one"
    )
