"""Saving: complete or absent, and a training step waits for no more than a copy in memory.

A checkpoint goes through stages, all ranks together. Each rank writes its files into a directory with a temporary
name. When all have, rank 0 commits it: gives it its name and removes old ones. If one has failed, rank 0 discards
it. A stage is work beside the main thread; between two steps the ranks find out whether all have come to its end.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from gmscale import parallel
from gmscale.checkpoint.contents import Contents, Pages, pages
from gmscale.checkpoint.layout import FORMAT, latest, rank_name
from gmscale.checkpoint.retention import best_top1, remove, remove_old, sweep
from gmscale.checkpoint.shards import shard_name, whole_weights
from gmscale.checkpoint.tensors import write_tensors
from gmscale.checkpoint.writing import Copies, Task
from gmscale.errors import RunError, UsageError
from gmscale.files import sync, write_durably
from gmscale.parallel import World

Stage = Literal["write", "commit", "discard", "join shards"]


@dataclass(frozen=True)
class _Draft:
    """A checkpoint on its way."""

    final: Path
    state: str
    """The text of state.json."""
    of_all_ranks: tuple[str, ...]
    """Names of the files that each rank writes, on all of them."""
    top1: float
    """What an evaluation has just found; minus infinity if there was none."""

    @property
    def temporary(self) -> Path:
        return self.final.with_name(f".{self.final.name}.tmp")


class Saver:
    """Writes the checkpoints of a run and removes old ones; every method is called by all ranks.

    In the `background` the files are written while training goes on; otherwise before `save` returns. A checkpoint
    that cannot be written costs a warning, given to rank 0's `warn`, and those before it stay. Before anything is
    written or removed there, rank 0's `check_owner` raises RunError if the directory is another's by now.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        *,
        keep: int,
        keep_best: int,
        background: bool,
        warn: Callable[[str], None],
        check_owner: Callable[[], None],
    ) -> None:
        self._run_dir, self._world = run_dir, world
        self._check_owner = check_owner
        self._keep, self._keep_best = keep, keep_best
        self._background, self._warn = background, warn
        self._copies = Copies()
        self._stage: Stage = "write"
        self._task: Task | None = None
        self._draft: _Draft | None = None
        self._failure = ""  # what the user has not been told yet; the same on all ranks
        self._committed: int | None = None
        self.step: int | None = None
        """The newest step that was handed to `save` and has not failed."""
        if world.is_main:
            sweep(run_dir)
        self._best: float = parallel.of_all_ranks(best_top1(run_dir) if world.is_main else -math.inf, world)[0]

    @property
    def progress(self) -> tuple[bool, bool]:
        """Whether this rank is at work, and whether it has failed; for `advance`, counted over the ranks."""
        if self._task is None:
            return False, False
        running = self._task.running  # asked first: work that has ended has left its error
        return running, self._task.error is not None

    def is_best(self, top1: float) -> bool:
        """Return whether a checkpoint with this validation top1 would be the best of those saved."""
        if self._keep_best == 0:
            return False
        return top1 > (self._best if self._draft is None else max(self._best, self._draft.top1))

    def save(self, step: int, contents: Contents, top1: float | None) -> None:
        """Copy `contents`, of `step` steps done, and begin to write them; `top1` if it was just measured.

        What an earlier call handed over is finished first.
        """
        self._settle()
        self._tell()
        with parallel.together(self._world):  # from here on ranks write
            if self._world.is_main:
                self._check_owner()
                sweep(self._run_dir)  # what could not be discarded
        files, draft = pages(contents, self._world), self._drafted(step, contents, top1)
        if self._background:
            files = self._copies.of(files)
        self.step, self._draft = step, draft
        self._start("write", partial(_write, files, draft.temporary))
        if not self._background:
            self._settle()

    def advance(self, working: int, failed: int) -> None:
        """Begin the next stage, if no rank is at work any more; `progress` counted over the ranks."""
        self._turn(working, failed)
        self._tell()

    def settle(self) -> None:
        """Wait until what was handed over is saved or given up, before a run ends with an error of its own."""
        self._settle()
        self._tell()

    def finish(self, *, whole: bool = False) -> None:
        """Wait until what was handed over is saved. Raises RunError if that fails.

        `whole` also makes model.safetensors of the newest checkpoint, where its weights are sharded.
        """
        self._settle()
        failure, self._failure = self._failure, ""
        with parallel.together(self._world):
            if failure and self._world.is_main:
                raise RunError(f"{failure}; the same command goes on")
        if whole:
            self._start("join shards", self._join_shards if self._world.is_main else _nothing)
            self._settle()
            self._tell()

    def _drafted(self, step: int, contents: Contents, top1: float | None) -> _Draft:
        sharded, size = contents.shards is not None, self._world.size
        state = {
            "format": FORMAT,
            "step": step,
            "world_size": size,
            "top1": top1,
            "sharded": sharded,
            "shared": dict(contents.shared),
        }
        names = [rank_name(rank) for rank in range(size)]
        names += [shard_name(rank, size) for rank in range(size)] if sharded else []
        final = self._run_dir / "checkpoints" / f"step-{step:08d}"
        return _Draft(final, json.dumps(state, indent=1), tuple(names), -math.inf if top1 is None else top1)

    def _settle(self) -> None:
        """Wait until nothing is under way on any rank, also for longer than a collective may take."""
        while self._task is not None:
            self._task.wait(1.0)
            self._turn(*parallel.count_over_ranks(self._world, *self.progress))

    def _turn(self, working: int, failed: int) -> None:
        """Begin the next stage, if no rank is at work any more: with equal counts all ranks decide the same."""
        if self._task is None or working > 0:
            return
        if failed:
            self._failure = self._describe(self._task.error)
        if self._stage == "join shards":
            self._task = None
        elif failed:
            self.step = self._committed
            self._start("discard", self._discard if self._world.is_main else _nothing)
        elif self._stage == "write":
            self._start("commit", self._commit if self._world.is_main else _nothing)
        else:
            if self._stage == "commit":
                assert self._draft is not None
                self._committed, self._best = self.step, max(self._best, self._draft.top1)
            self._task = self._draft = None

    def _start(self, stage: Stage, work: Callable[[], None]) -> None:
        self._stage, self._task = stage, Task(work)

    def _commit(self) -> None:
        assert self._draft is not None
        temporary, final = self._draft.temporary, self._draft.final
        for name in self._draft.of_all_ranks:
            if not (temporary / name).is_file():
                raise OSError(f"{name} is not there; run.dir must be one directory for all ranks")
        self._check_owner()
        write_durably(temporary / "state.json", self._draft.state)
        sync(temporary)
        if final.exists():  # without its state.json, or not known to be on the disk
            remove(final)
        temporary.rename(final)
        sync(final.parent)
        remove_old(self._run_dir, self._keep, self._keep_best)

    def _discard(self) -> None:
        assert self._draft is not None
        shutil.rmtree(self._draft.temporary, ignore_errors=True)

    def _join_shards(self) -> None:
        newest = latest(self._run_dir)
        if newest is not None:
            whole_weights(newest)

    def _describe(self, error: BaseException | None) -> str:
        """Return what went wrong, on any rank, in one line. Raises what no user can do anything about."""
        with parallel.together(self._world):
            if error is not None and not isinstance(error, OSError | UsageError):
                raise error
            newest = latest(self._run_dir)
        own = "" if error is None else str(error) or type(error).__name__
        errors = parallel.of_all_ranks(own, self._world)
        rank = next(rank for rank, said in enumerate(errors) if said)
        said = f"rank {rank}: {errors[rank]}" if self._world.size > 1 else errors[rank]
        if self._stage == "join shards":
            return f"the weights of {newest} stay in shards ({said}); gmscale export makes one file of them"
        assert self._draft is not None
        stands = f"{newest} stands" if newest else "there is none yet"
        return f"checkpoint {self._draft.final} cannot be written ({said}); {stands}"

    def _tell(self) -> None:
        if self._failure and self._world.is_main:
            self._warn(f"warning: {self._failure}, and the run goes on")
        self._failure = ""


def _write(files: Mapping[str, Pages], folder: Path) -> None:
    """Write this rank's files; none of them if one cannot be, so that a full disk has its space back at once."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, pages in files.items():
            write_tensors(folder / name, pages.tensors, pages.text)
    except OSError:
        for name in files:
            (folder / name).unlink(missing_ok=True)
        raise


def _nothing() -> None:
    """The work of a rank that waits for another."""
