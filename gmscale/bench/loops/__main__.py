"""One process of a loop, or the launcher of several: python -m gmscale.bench.loops TASK [PROCESSES]."""

import ctypes
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

from gmscale.bench.loops import WARM_UP, Task

_PDEATHSIG = 1  # of prctl


def main() -> None:
    """Run the task, or torchrun with processes that do."""
    _die_with_parent()
    path = Path(sys.argv[1])
    if len(sys.argv) > 2:
        launcher = ["--standalone", "--nproc_per_node", sys.argv[2], "-m", "gmscale.bench.loops", str(path)]
        _become("torch.distributed.run", launcher)
    else:
        started, task = _started(), Task.read(path)
        _measure(task, started)
        _run(task)


def _run(task: Task) -> None:
    if task.loop == "timm":
        from gmscale.bench.loops.timm_loop import train

        train(task)
    elif task.loop == "Accelerate":
        from gmscale.bench.loops.accelerate_loop import train

        train(task)
    else:
        _become("gmscale", task.arguments(task.loop.removeprefix("gmscale ")))


def _become(module: str, arguments: list[str]) -> None:
    """Do what `python -m module arguments` does."""
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _measure(task: Task, started: float) -> None:
    """Let every optimizer tell when its steps end; after the last one the answer is written."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ends: list[float] = []
    awaited = {1, WARM_UP, task.steps}  # steps at whose end a GPU must have done its work too

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if torch.cuda.is_available() and len(ends) + 1 in awaited:
            torch.cuda.synchronize()
        ends.append(time.monotonic())
        if len(ends) == task.steps:
            answer = {"started": started, "ends": ends, "peak_memory_mb": _peak_memory_mb()}
            file = task.answer(int(os.environ.get("RANK", "0")))
            file.with_suffix(".part").write_text(json.dumps(answer))
            file.with_suffix(".part").replace(file)

    register_optimizer_step_post_hook(after_step)


def _started() -> float:
    """Return when this process began, by the monotonic clock; where the system does not say, that is now."""
    now = time.monotonic()
    if sys.platform != "linux":
        return now
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the machine started
    return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def _peak_memory_mb() -> float:
    import torch

    from gmscale.parallel import peak_memory_mb  # only now: it takes time that the other loops need not spend

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return peak_memory_mb(device)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)


main()
