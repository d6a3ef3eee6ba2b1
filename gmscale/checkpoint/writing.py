"""What a checkpoint is written with: copies that training cannot change, and work beside the main thread."""

import atexit
import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gmscale.checkpoint.contents import Pages

_MOMENT_S = 2.0


class Copies:
    """Copies of tensors in CPU memory, which the next copies are written into.

    The memory is kept, page-locked for tensors of a GPU: to ask the system for fresh memory takes several times as
    long as to copy, and a training step waits.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str], Tensor] = {}

    def of(self, files: Mapping[str, Pages]) -> dict[str, Pages]:
        """Return `files` with contiguous copies of their tensors; the copies made before are overwritten."""
        memory, self._memory = self._memory, {}
        for file, pages in files.items():
            for name, tensor in pages.tensors.items():
                copy = memory.get((file, name))
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._memory[file, name] = copy.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for pages in files.values() for tensor in pages.tensors.values()):
            torch.cuda.synchronize()
        return {
            file: Pages({name: self._memory[file, name] for name in pages.tensors}, pages.text)
            for file, pages in files.items()
        }


class Task:
    """Some work in a thread of its own; what it raises is kept as `error`.

    The thread ends with the process, wherever it is, but has a moment to leave torch's code, in which Python could
    not end it: the process would be aborted, and its status lost. It calls no collective: those belong to the main
    thread.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()
        atexit.register(self.wait, _MOMENT_S)

    @property
    def running(self) -> bool:
        """Whether the work still goes on."""
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait for the end of the work, but not longer than so many seconds."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # the main thread raises what it cannot deal with
            self.error = error
        finally:
            atexit.unregister(self.wait)
