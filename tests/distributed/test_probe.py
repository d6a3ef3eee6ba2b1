"""The probe at sites: what it measures against NumPy, and that training does not notice it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import gmscale
from gmscale import GradientMask
from gmscale.errors import UsageError
from gmscale.sites import GradientProbe

sys.path.insert(0, str(Path(__file__).parent.parent))
import oracle
from ranks import run_ranks

WORLD = 2
MICRO = 2


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 10)
    )


def loss_of(model: nn.Module, rank: int, step: int, micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + 10 * step + micro)
    images = torch.randn(4, 3, 6, 6, generator=generator)
    return nn.functional.cross_entropy(model(images), torch.randint(10, (4,), generator=generator))


def attached(site: str, settings: dict) -> tuple[nn.Module, gmscale.sites.Attachment]:
    model = make()
    parallel = {"ddp": lambda m: DDP(m, bucket_cap_mb=0.001), "fsdp2": fully_shard, "single": lambda m: m}[site](
        model
    )
    return parallel, gmscale.attach(parallel, GradientMask(**settings), site=site)


def train(rank: int, site: str, settings: dict, every: int | None, steps: int = 7, micros: int = MICRO) -> dict:
    """Train; return the reports of the probe, and everything that it must not change."""
    model, attachment = attached(site, settings)
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    probe = GradientProbe(attachment, every) if every else None
    reports = []
    for step in range(steps):
        attachment.at(step, steps)
        if probe:
            probe.before(step)
        optimizer.zero_grad()
        for micro in range(micros):
            if micro + 1 < micros:
                with attachment.no_sync():
                    loss_of(model, rank, step, micro).backward()
            else:
                loss_of(model, rank, step, micro).backward()
        if probe:
            reports.append(probe.after(step))
        optimizer.step()
    return {
        "reports": reports,
        "weights": [p.detach() for p in model.parameters()],
        "held": attachment.state_dict()["residuals"],
        "random": torch.get_rng_state(),
    }


# -- training does not notice -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "special",
    [{}, {"operator": "random", "error_feedback": False}, {"agreement": "consensus", "strength": 1.0}],
    ids=str,
)
def test_weights_residuals_and_random_streams_are_those_without_the_probe(tmp_path, special):
    settings = {"strength": 0.7, "block": 4, **special}
    plain = run_ranks(train, WORLD, tmp_path, "ddp", settings, None)
    probed = run_ranks(train, WORLD, tmp_path, "ddp", settings, 3)
    for a, b in zip(plain, probed, strict=True):
        assert [report is not None for report in b["reports"]] == [False, True, False, False, True, False, False]
        assert all(torch.equal(p, q) for p, q in zip(a["weights"], b["weights"], strict=True))
        assert a["held"].keys() == b["held"].keys()
        assert all(torch.equal(a["held"][name], b["held"][name]) for name in a["held"])
        assert torch.equal(a["random"], b["random"])


# -- what is measured ---------------------------------------------------------------------------------------------
def by_hand(rank: int, settings: dict, steps: int = 2) -> list[tuple[dict, dict]]:
    """Train a plain model with the oracle's mask; return (raw, masked) local gradients of each step."""
    model = make()
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen, held = [], {}
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(MICRO):
            loss_of(model, rank, step, micro).backward()
        raw, masked = {}, {}
        for name, p in model.named_parameters():
            if p.ndim > 1:
                raw[name] = p.grad.double().numpy().copy()
                nothing = np.zeros_like(raw[name])
                before = held.get(name, nothing) if settings["error_feedback"] else nothing
                masked[name], held[name] = oracle.error_feedback(raw[name], before, 0.7, block=settings["block"])
                p.grad.copy_(torch.from_numpy(masked[name]))
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        optimizer.step()
        seen.append((raw, masked))
    return seen


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


@pytest.mark.parametrize("feedback", [False, True], ids=["plain", "feedback"])
def test_the_report_is_what_numpy_computes_from_the_ranks_gradients(tmp_path, feedback):
    settings = {"strength": 0.7, "block": 4, "error_feedback": feedback}
    ranks = run_ranks(by_hand, WORLD, tmp_path, settings)
    ours = [answer["reports"][1] for answer in run_ranks(train, WORLD, tmp_path, "ddp", settings, 10, 2)]
    (raw, masked), (following, _) = (
        [{name: np.stack([r[step][kind][name] for r in ranks]) for name in ranks[0][0][0]} for kind in (0, 1)]
        for step in (0, 1)
    )
    report = ours[0]
    assert report.step == 0
    assert report.layers == ours[1].layers  # the same on every rank
    assert set(report.layers) == {"0.weight", "3.weight", "5.weight"}
    assert report.cost_ms > 0
    gains = {}
    for name, layer in report.layers.items():
        g, m, after = (x[name].mean(0) for x in (raw, masked, following))
        gains[name] = cosine(m, after) - cosine(g, after)
        assert layer.gain == pytest.approx(gains[name], abs=1e-5)
        assert layer.alignment == pytest.approx(cosine(g, after), abs=1e-5)
        maps = [oracle.lateral_map(x, block=4) for x in raw[name]]
        keep = [oracle.expand(oracle.keep_map(s), g.shape, 4) for s in maps]
        assert layer.kept_entries == pytest.approx(np.mean(keep), abs=1e-6)
        energy = [((k * x) ** 2).sum() / (x**2).sum() for k, x in zip(keep, raw[name], strict=True)]
        assert layer.kept_energy == pytest.approx(np.mean(energy), abs=1e-5)
        assert abs(layer.control_gain - layer.gain) > 1e-4
        of = report.layer_diagnostics[name]
        trace = raw[name].var(0, ddof=1).sum()
        assert of.raw.snr == pytest.approx(np.sqrt((g * g).sum() / trace), rel=1e-4)
        assert of.raw.agreement == pytest.approx(
            (raw[name][0] * raw[name][1]).sum() / (raw[name] ** 2).sum() * 2, abs=1e-5
        )
    size = {name: raw[name][0].size for name in gains}
    total = sum(size.values())
    assert report.combined.gain == pytest.approx(sum(gains[n] * size[n] for n in size) / total, abs=1e-5)
    assert report.diagnostics.masked.snr != report.diagnostics.raw.snr


def control_at_strength_1(rank: int) -> tuple:
    report = train(rank, "ddp", {"strength": 1.0, "error_feedback": False, "block": 4}, 10, 2)["reports"][1]
    again = train(rank, "ddp", {"strength": 1.0, "error_feedback": False, "block": 4}, 10, 2)["reports"][1]
    return report.combined, again.combined


def test_the_control_is_a_function_of_the_seed(tmp_path):
    for first, second in run_ranks(control_at_strength_1, WORLD, tmp_path):
        assert first == second


@pytest.mark.parametrize("micros", [1, 2])
def test_fsdp2_measures_what_ddp_measures(tmp_path, micros):
    settings = {"strength": 0.7, "block": 4}
    ddp, fsdp2 = (
        run_ranks(train, WORLD, tmp_path, site, settings, 10, 2, micros)[0]["reports"][1]
        for site in ("ddp", "fsdp2")
    )
    # with two micro-batches fsdp2 masks each of them: another mask, hence another second step
    exact = ("alignment", "gain", "control_gain", "kept_entries", "kept_energy") if micros == 1 else ()
    for name, layer in ddp.layers.items():
        assert fsdp2.layers[name].alignment == pytest.approx(layer.alignment, abs=0.1)
        for field in exact:
            assert getattr(fsdp2.layers[name], field) == pytest.approx(getattr(layer, field), abs=1e-6)
    for which in ("snr", "agreement"):
        assert getattr(fsdp2.diagnostics.raw, which) == pytest.approx(getattr(ddp.diagnostics.raw, which), rel=1e-5)


# -- sites, schedules, overflow -----------------------------------------------------------------------------------
def test_site_single_measures_without_processes_and_has_no_spread():
    report = train(0, "single", {"strength": 1.0, "error_feedback": False}, 10, 2)["reports"][1]
    assert -1 <= report.combined.gain <= 1
    assert report.diagnostics is None
    assert report.layer_diagnostics == {}


def test_steps_without_a_mask_are_not_measured():
    def measured(**settings: float) -> list[int]:
        reports = train(0, "single", {"strength": 0.5, **settings}, 2, 10)["reports"]
        return [report.step for report in reports if report]

    assert measured() == [0, 2, 4, 6, 8]
    assert measured(start=0.5) == [6, 8]  # strength rises from 0 at step 5 on
    assert measured(end=0.5) == [0, 2, 4]
    assert train(0, "single", {"strength": 0.0}, 2)["reports"] == [None] * 7


def overflow(rank: int) -> tuple:
    model, attachment = attached("ddp", {"strength": 0.5})
    probe = GradientProbe(attachment, 2)
    for step in range(4):
        probe.before(step)
        model.zero_grad()
        loss_of(model, rank, step, 0).backward()
        report = probe.after(step)
        if step == 1:
            model.module[5].weight.data[0, 0] = float("inf") if rank else 1.0
    return report.non_finite, report.combined, report.layers["5.weight"].gain


def test_gradients_that_are_not_finite_are_counted(tmp_path):
    for count, combined, gain in run_ranks(overflow, WORLD, tmp_path):
        assert count == 3
        assert combined.gain is None
        assert gain is None


def test_every_must_leave_room_for_two_steps():
    _, attachment = attached("single", {})
    with pytest.raises(UsageError, match=r"probe every is 1; expected a whole number in \[2"):
        GradientProbe(attachment, 1)


def test_the_report_of_the_mask_does_not_time_the_probe():
    _, attachment = attached("single", {})
    probe = GradientProbe(attachment, 2)
    probe.before(0)
    with attachment._clock.running(torch.device("cpu"), 1.0):
        pass
    assert attachment.report().hook_ms is None
