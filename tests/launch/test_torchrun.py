"""Real torchrun, two processes: killed, stopped or failing, a run ends as an undisturbed one or says why."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import warm
import yaml
from safetensors.torch import load_file

from gmscale import data, evaluation, models
from gmscale.config import from_dict
from gmscale.data import DataConfig, open_index, open_split, order
from gmscale.errors import UsageError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
SECTIONS = {
    "run": {"epochs": 8.0, "log_every": 5, "save_every_steps": 3},
    "model": {"ema_decay": 0.8, "drop_rate": 0.3},
    "data": {"batch_size_per_device": 8},
}
STEPS = 48


class Job(warm.Program):
    """`torchrun ... -m gmscale ARGV`, or one plain process."""

    def __init__(self, log: Path, *argv: str, processes: int = 2, restarts: int = 0) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        launcher += ["--max-restarts", str(restarts)]
        super().__init__(log, [*(launcher if processes > 1 else []), "-m", "gmscale", *argv], ROOT)

    def workers(self) -> dict[int, int]:
        """Rank -> process id."""
        return warm.ranks(self.pid)

    def wait_for_workers_other_than(self, former: dict[int, int]) -> None:
        deadline = time.monotonic() + 60
        while (now := self.workers()).keys() != former.keys() or set(now.values()) & set(former.values()):
            assert self.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        """Wait until metrics.jsonl shows a step."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if tiny.metrics(run_dir)[-1]["step"] >= step:
                    return
            except (OSError, IndexError, ValueError):
                pass  # not there yet, or half a line
            assert self.poll() is None, self.output
            time.sleep(0.005)
        pytest.fail(f"step {step} did not come: {self.output}")

    def end(self) -> None:
        for pid in self.workers().values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.kill()


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    """Jobs to end when the test does."""
    started: list[Job] = []
    yield started
    for job in started:
        if job.poll() is None:
            job.end()


@pytest.fixture(scope="module")
def undisturbed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes from beginning to end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = Job(folder / "log", "train", *tiny.flags(cache, folder / "run", **SECTIONS))
    assert job.wait() == 0, job.output
    return folder / "run"


# ---- killed and stopped -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_stopped_at_several_steps_a_run_ends_as_an_undisturbed_one(
    cache: Path, undisturbed: Path, tmp_path: Path, jobs: list[Job]
) -> None:
    run_dir = tmp_path / "run"
    argv = ["train", *tiny.flags(cache, run_dir, **SECTIONS)]
    job = Job(tmp_path / "log", *argv, restarts=2)
    jobs.append(job)
    for step, victim in ((5, 1), (15, 0)):  # torchrun starts the workers again, which resume
        job.wait_for_step(run_dir, step)
        killed = job.workers()
        os.kill(killed[victim], signal.SIGKILL)
        job.wait_for_workers_other_than(killed)
    job.wait_for_step(run_dir, 25)
    os.kill(job.pid, signal.SIGTERM)  # the launcher passes it on
    assert job.wait(30) != 0, job.output
    assert not (run_dir / "summary.json").exists(), "the run was over before it was interrupted"
    assert f"stopped on request after step {tiny.checkpoint_steps(run_dir)[-1]} of {STEPS}" in job.output

    job = Job(tmp_path / "log-again", *argv)
    jobs.append(job)
    assert job.wait() == 0, job.output
    assert tiny.checkpoint_steps(run_dir)[-1] == STEPS
    found = tiny.tensors(run_dir)
    assert {name.split("/")[0] for name in found} == {
        *("model.safetensors", "model_ema.safetensors", "optimizer.safetensors"),
        *("rank-00000.safetensors", "rank-00001.safetensors"),
    }
    assert tiny.different(tiny.tensors(undisturbed), found) == []
    assert tiny.untimed(tiny.metrics(undisturbed)) == tiny.untimed(tiny.metrics(run_dir))


def test_a_stopped_process_exits_with_its_own_status(cache: Path, tmp_path: Path, jobs: list[Job]) -> None:
    sections = {**tiny.EVERYTHING, "run": {"epochs": 5, "log_every": 2}, "data": {"workers": 1}}
    run_dir = tmp_path / "run"
    job = Job(tmp_path / "log", "train", *tiny.flags(cache, run_dir, **sections), processes=1)
    jobs.append(job)
    job.wait_for_step(run_dir, 4)
    os.killpg(job.pid, signal.SIGTERM)  # as a scheduler does: loader processes hear it too
    assert job.wait(30) == 75, job.output
    assert f"stopped on request after step {tiny.checkpoint_steps(run_dir)[-1]} of 30" in job.output
    assert tiny.train(tiny.config(cache, run_dir, **sections)).summary is not None  # goes on in another process
    tiny.train(tiny.config(cache, tmp_path / "undisturbed", **sections))
    assert tiny.different(tiny.tensors(tmp_path / "undisturbed"), tiny.tensors(run_dir)) == []
    assert tiny.untimed(tiny.metrics(tmp_path / "undisturbed")) == tiny.untimed(tiny.metrics(run_dir))


# ---- failing ----------------------------------------------------------------------------------------------------


def corrupt(shards: Path, rank: int, step: int) -> str:
    """Overwrite an image that only `rank` of two meets, at `step`; return the name of its shard."""
    index = open_index(open_split(DataConfig(source=str(shards)), "train"))
    samples = order.epoch_order(index.lengths, 0, 0)
    i = order.micro_batches(samples, step, rank, 2, SECTIONS["data"]["batch_size_per_device"], 1)[0][0]
    name = index.split.names[index.shard(i)]
    with open(shards / name, "r+b") as file:
        file.seek(int(index.offset[i]))
        file.write(bytes(int(index.size[i])))
    return name


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_a_failing_rank_ends_the_job_and_its_error_is_shown_once(
    cache: Path, tmp_path: Path, jobs: list[Job], backend: str
) -> None:
    shards = shutil.copytree(tiny.build(cache), tmp_path / "shards")
    shard = corrupt(shards, rank=1, step=3)
    sections = SECTIONS | {"data": {"batch_size_per_device": 8, "source": str(shards)}}
    sections |= {"model": {}, "parallel": {"backend": backend}}
    job = Job(tmp_path / "log", "train", *tiny.flags(cache, tmp_path / "run", **sections))
    jobs.append(job)
    assert job.wait(60) == 1  # a rank that waited for the other one would wait for parallel.timeout_s, 10 minutes
    assert job.output.count("does not decode") == 1
    assert f"gmscale: error: rank 1: {shards / shard}: " in job.output
    assert "unexpected error" not in job.output


@pytest.mark.slow
def test_a_mistake_that_every_rank_finds_is_shown_once(cache: Path, tmp_path: Path, jobs: list[Job]) -> None:
    flags = tiny.flags(cache, tmp_path / "run", **SECTIONS, mask={"enabled": False})
    job = Job(tmp_path / "log", "compare", *flags)
    jobs.append(job)
    assert job.wait(60) != 0
    assert job.output.count("gmscale: error:") == job.output.count("needs a mask") == 1
    assert not (tmp_path / "run").exists()


# ---- two ranks and one ------------------------------------------------------------------------------------------


def test_two_ranks_count_an_odd_number_of_samples_once_and_agree_with_one(undisturbed: Path, cache: Path) -> None:
    config = from_dict(yaml.safe_load((undisturbed / "config.yaml").read_text()))
    for name, phase in (("model", "validation"), ("model_ema", "validation_ema")):
        model = models.create(config, 10)
        model.load_state_dict(load_file(undisturbed / "checkpoints" / f"step-{STEPS:08d}" / f"{name}.safetensors"))
        alone = evaluation.evaluate(model, data.val_loader(config.data, 0, 1), config.data, tiny.ALONE)
        records = [r for r in tiny.metrics(undisturbed) if r["phase"] == phase]
        assert len(records) == 8
        assert {r["count"] for r in records} == {tiny.VALIDATION_SIZE} == {alone["count"]}
        assert records[-1]["top1"] == alone["top1"]
        assert records[-1]["top5"] == alone["top5"]
        assert records[-1]["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_a_run_of_two_processes_is_not_resumed_by_one(undisturbed: Path, cache: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    (run_dir / "summary.json").unlink()
    with pytest.raises(UsageError, match="saved by 2 processes, which cannot be resumed by 1"):
        tiny.train(tiny.config(cache, run_dir, **SECTIONS))
