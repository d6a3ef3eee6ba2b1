"""One command in the process group: how its processes begin, fail and end, so that a job ends as a whole."""

import atexit
import errno
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gmscale import diagnosis, heartbeat, launched
from gmscale.errors import RunError, UsageError


def in_world(config: Any, body: Callable[[Any], int]) -> int:
    """Run `body` in the process group; a failure ends this process at once, and with it the job."""
    from gmscale import parallel

    world = parallel.init(config)
    try:
        status = body(world)
    except BaseException as error:
        status = _explain_failure(error, world)
        if world.backend != "single":
            parallel.end_process(status)  # tearing down the group could wait for ranks that wait for this one
        return status
    parallel.shutdown(world)
    world.heartbeat.leave(status)
    if world.backend != "single":
        atexit._run_exitfuncs()  # ends loader processes in order
        # To torchelastic any status but 0 is a failure, after which it ends the other ranks and starts all again.
        parallel.end_process(0 if launched.by_launcher() else status)
    return status


def _explain_failure(error: BaseException, world: Any) -> int:
    """Print the error once over all ranks, leave it in the heartbeat, and return the exit status."""
    from gmscale import parallel

    if isinstance(error, KeyboardInterrupt):
        world.heartbeat.leave(130)
        return 130
    status = 2 if isinstance(error, UsageError) else 1
    if isinstance(error, parallel.OutOfMemoryError):
        error = RunError(
            f"{' '.join(str(error).split())[:200]} ...; lower data.batch_size_per_device (optim.grad_accum_steps "
            "makes up for it), or set model.grad_checkpointing true or optim.amp bf16"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        error = RunError(f"{error.filename or 'a file'} cannot be written: {error.strerror}")
    said = str(error) if isinstance(error, UsageError | RunError) else f"{type(error).__name__}: {error}"
    final = isinstance(error, UsageError | RunError) and not isinstance(error, parallel.PeerError)
    by_peer = isinstance(error, parallel.PeerError) or parallel.is_of_a_collective(error)
    where = world.heartbeat.where
    told = by_peer and launched.by_launcher()  # the launcher says whose fault it was
    if told or isinstance(error, parallel.PeerError) or (not final and parallel.failed_elsewhere(world)):
        world.heartbeat.leave(status, said, by_peer=True)  # a collective broke because the other rank is gone
        return status
    world.heartbeat.leave(status, said, final=final, by_peer=by_peer)
    if not parallel.announce_failure(world):
        return status
    prefix = f"rank {world.rank}: " if world.size > 1 else ""
    if final:
        print(f"gmscale: error: {prefix}{error}", file=sys.stderr)
    elif by_peer:
        print(f"gmscale: error: {prefix}{where}: {' '.join(said.split())[:300]}", file=sys.stderr)
        for line in _who_is_missing(world):
            print(f"gmscale: error: {line}", file=sys.stderr)
    else:
        print(f"gmscale: {prefix}unexpected error in {where}", file=sys.stderr)
        traceback.print_exception(error)
    return status


def _who_is_missing(world: Any) -> list[str]:
    folder = world.heartbeat.folder
    if folder is None:
        return []
    records = [record for record in heartbeat.read_all(Path(folder)) if record.world == launched.world_name()]
    return diagnosis.of_records(records, world.size, time.time())
