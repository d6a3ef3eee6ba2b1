"""Traces of chosen steps, by torch's profiler."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gmscale.parallel import World


class StepProfiler:
    """Traces some steps of those a run does, each in a range `step N`, into a file a rank in Chrome's trace format.

    `steps` are the first and the last one, counted from 1; without them it does nothing. `done` of `total_steps`
    are behind the run: steps that it does not do are left out, and `say` hears if that is all of them. A run that
    is stopped within them writes what it has.
    """

    def __init__(
        self,
        folder: Path,
        steps: tuple[int, int] | None,
        world: World,
        done: int,
        total_steps: int,
        say: Callable[[str], None],
    ) -> None:
        first, last = steps or (1, 0)
        self._first, self._last = max(first, done + 1), min(last, total_steps)
        self._folder, self._world, self._say = folder, world, say
        self._profile: profile | None = None
        self._range: record_function | None = None
        self._traced = 0
        if steps is not None and self._first > self._last:
            say(
                f"run.profile_steps {first} to {last}: this run does steps {done + 1} to {total_steps}, "
                "so there will be no trace"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is None:
            return
        if kind is None:
            self._write()
        else:
            self._profile.stop()

    def before(self, step: int) -> None:
        """Say that optimizer step number `step`, counted from 1, begins."""
        if not self._first <= step <= self._last:
            return
        if self._profile is None:
            activities = [ProfilerActivity.CPU]
            if self._world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
        self._range = record_function(f"step {step}")
        self._range.__enter__()

    def after(self, step: int) -> None:
        """Say that it has ended."""
        if self._range is None:
            return
        self._range.__exit__(None, None, None)
        self._range, self._traced = None, step
        if step == self._last:
            self._write()

    def _write(self) -> None:
        assert self._profile is not None
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        self._profile.stop()
        file = self._folder / f"rank-{self._world.rank:05d}-steps-{self._first}-{self._traced}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(file))
            self._say(f"wrote {file} (open it in https://ui.perfetto.dev)")
        except (OSError, RuntimeError) as error:  # a trace is no reason to end a training
            self._say(f"{file} cannot be written: {' '.join(str(error).split())[:200]}")
        self._profile = None
