"""Site ddp: what arrives in p.grad is the mean over ranks of each rank's own masked gradient."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel as DDP

import gmscale
from gmscale import GradientMask
from gmscale.errors import UsageError

sys.path.insert(0, str(Path(__file__).parent.parent))
import oracle
from ranks import run_ranks

WORLD = 2


class Net(nn.Module):
    """Convolutions of several kinds, a linear layer, and a branch that some tests leave unused."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 20, 1)
        self.norm = nn.BatchNorm2d(20)
        self.unused = nn.Linear(20, 6)
        self.head = nn.Linear(20, 5)
        self.use_all = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.pointwise(self.depthwise(self.conv(x)).relu())).relu().mean((2, 3))
        return self.head(x) + (self.unused(x)[:, :5] if self.use_all else 0)


def make(channels_last: bool = False) -> Net:
    torch.manual_seed(0)
    return Net().to(memory_format=torch.channels_last) if channels_last else Net()


def batch(rank: int, step: int, micro: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + 10 * step + micro)
    return torch.randn(4, 3, 6, 6, generator=generator), torch.randint(5, (4,), generator=generator)


def loss_of(model: nn.Module, rank: int, step: int, micro: int = 0) -> Tensor:
    images, labels = batch(rank, step, micro)
    return nn.functional.cross_entropy(model(images), labels)


def is_weight(name: str, p: Tensor) -> bool:
    return p.ndim >= 2


def mean_over_ranks(gradient: np.ndarray) -> np.ndarray:
    total = torch.from_numpy(gradient.copy())
    dist.all_reduce(total)
    return (total / dist.get_world_size()).numpy()


# -- against the oracle -------------------------------------------------------------------------------------------
def largest_difference(rank: int, ddp_options: dict, settings: dict, variant: dict) -> float:
    """Train DDP with the mask beside a plain model masked by the oracle; return the largest gradient difference."""
    ours, theirs = make(variant.get("channels_last", False)), make(variant.get("channels_last", False))
    ours.use_all = theirs.use_all = not variant.get("unused", False)
    micros = variant.get("micro_batches", 1)
    ddp = DDP(ours, **ddp_options)
    mask = GradientMask(**settings)
    attachment = gmscale.attach(ddp, mask, site="ddp")
    residuals: dict[str, np.ndarray] = {}
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs)]
    worst = 0.0
    for step in range(4):  # buckets are rebuilt at the second or third forward pass
        for optimizer in optimizers:
            optimizer.zero_grad()
        for micro in range(micros - 1):
            with attachment.no_sync():
                loss_of(ddp, rank, step, micro).backward()
            loss_of(theirs, rank, step, micro).backward()
        loss_of(ddp, rank, step, micros - 1).backward()
        loss_of(theirs, rank, step, micros - 1).backward()
        for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            g = p.grad.numpy().astype(np.float64)
            if is_weight(name, p):
                if mask.error_feedback:
                    held = residuals.setdefault(name, np.zeros_like(g))
                    g, residuals[name] = oracle_feedback(g, held, mask)
                else:
                    g = oracle_apply(g, mask)
            expected = mean_over_ranks(g)
            p.grad = torch.from_numpy(expected).float().to(memory_format=torch.preserve_format)
            if q.grad is not None:
                worst = max(worst, float(np.abs(q.grad.numpy() - expected).max()))
            else:
                worst = max(worst, float(np.abs(expected).max()))
        for optimizer in optimizers:
            optimizer.step()
    return worst


def oracle_apply(g: np.ndarray, mask: GradientMask) -> np.ndarray:
    return oracle.apply(g, mask.peak_strength, **oracle_settings(mask))


def oracle_feedback(g: np.ndarray, held: np.ndarray, mask: GradientMask) -> tuple[np.ndarray, np.ndarray]:
    return oracle.error_feedback(g, held, mask.peak_strength, **oracle_settings(mask))


def oracle_settings(mask: GradientMask) -> dict:
    return {"operator": mask.operator, "gate": mask.gate, "norm": mask.norm, "block": mask.block}


@pytest.mark.parametrize("feedback", [False, True], ids=["plain", "feedback"])
@pytest.mark.parametrize(
    ("ddp_options", "variant"),
    [
        ({}, {}),
        ({"gradient_as_bucket_view": True}, {}),
        ({"bucket_cap_mb": 0.0005}, {}),
        ({"static_graph": True, "bucket_cap_mb": 0.0005}, {}),
        ({"find_unused_parameters": True}, {"unused": True}),
        ({"gradient_as_bucket_view": True}, {"channels_last": True}),
        ({"bucket_cap_mb": 0.0005, "gradient_as_bucket_view": True}, {"micro_batches": 3}),
    ],
    ids=["default", "views", "buckets", "static", "unused", "channels_last", "no_sync"],
)
def test_gradient_is_the_mean_of_the_oracles_masks(tmp_path, ddp_options, variant, feedback):
    settings = {"strength": 0.6, "error_feedback": feedback, "block": 4}
    worst = run_ranks(largest_difference, WORLD, tmp_path, ddp_options, settings, variant)
    assert max(worst) < 1e-6


@pytest.mark.parametrize("operator", ["log", "dog", "licnn"])
def test_every_operator_arrives_unchanged(tmp_path, operator):
    settings = {"operator": operator, "strength": 1.0, "error_feedback": False, "block": 4}
    assert max(run_ranks(largest_difference, WORLD, tmp_path, {}, settings, {})) < 1e-6


# -- identity -----------------------------------------------------------------------------------------------------
def weights_after(rank: int, how: str) -> list[Tensor]:
    model = make()
    ddp = DDP(model, bucket_cap_mb=0.0005)
    if how == "strength 0":
        gmscale.attach(ddp, GradientMask(strength=0.0), site="ddp")
    elif how == "detached":
        gmscale.attach(ddp, GradientMask(strength=1.0), site="ddp").detach()
    elif how == "masked":
        gmscale.attach(ddp, GradientMask(strength=1.0), site="ddp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(ddp, rank, step).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_strength_zero_and_detach_are_the_plain_run_bit_for_bit(tmp_path):
    plain, zero, detached, masked = (
        run_ranks(weights_after, WORLD, tmp_path, how) for how in ("plain", "strength 0", "detached", "masked")
    )
    for rank in range(WORLD):
        assert all(torch.equal(a, b) for a, b in zip(plain[rank], zero[rank], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(plain[rank], detached[rank], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(plain[rank], masked[rank], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(masked[0], masked[rank], strict=True))


# -- stacking -----------------------------------------------------------------------------------------------------
def stacked(rank: int, which: str) -> tuple[float, float]:
    """Return (largest difference to the mean of masked gradients, the largest such gradient)."""
    mask = GradientMask(strength=1.0, error_feedback=False, block=4)
    reference, model = make(), make()
    ddp = DDP(model)
    if which == "powersgd":
        # full rank, so that the approximation is exact, and started at once
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=20, start_powerSGD_iter=2, min_compression_rate=0.01
        )
        ddp.register_comm_hook(state, gmscale.mask_wrapper(powerSGD_hook.powerSGD_hook, mask))
    elif which == "attach":
        gmscale.attach(ddp, mask, site="ddp", hook=default_hooks.fp16_compress_hook, hook_state=None)
    else:
        hook = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}[which]
        ddp.register_comm_hook(None, gmscale.mask_wrapper(hook, mask))
    difference = largest = 0.0
    for step in range(4):
        ddp.zero_grad()
        reference.zero_grad()
        loss_of(ddp, rank, step).backward()
        loss_of(reference, rank, step).backward()
        for p, q in zip(reference.parameters(), model.parameters(), strict=True):
            g = mask.apply(p.grad) if p.ndim >= 2 else p.grad
            expected = mean_over_ranks(g.numpy())
            difference = max(difference, float(np.abs(q.grad.numpy() - expected).max()))
            largest = max(largest, float(np.abs(expected).max()))
    return difference, largest


@pytest.mark.parametrize(
    ("which", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2), ("powersgd", 1e-3), ("attach", 2e-3)]
)
def test_stacks_with_torchs_hooks(tmp_path, which, tolerance):
    for difference, largest in run_ranks(stacked, WORLD, tmp_path, which):
        assert difference < tolerance * largest


# -- state --------------------------------------------------------------------------------------------------------
def interrupted(rank: int, interrupt: bool) -> list[Tensor]:
    model = make()
    optimizer_state = attachment_state = None
    for first, last in ((0, 2), (2, 5)) if interrupt else ((0, 5),):
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        model = make()
        model.load_state_dict(weights)
        ddp = DDP(model, bucket_cap_mb=0.0005)
        attachment = gmscale.attach(ddp, GradientMask(strength=0.9, operator="random"), site="ddp")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if optimizer_state:
            optimizer.load_state_dict(optimizer_state)
            attachment.load_state_dict(attachment_state)
        for step in range(first, last):
            attachment.at(step, 5)
            optimizer.zero_grad()
            loss_of(ddp, rank, step).backward()
            optimizer.step()
        optimizer_state, attachment_state = optimizer.state_dict(), attachment.state_dict()
    return [p.detach() for p in model.parameters()]


def test_state_makes_an_interrupted_run_continue_bit_for_bit(tmp_path):
    whole, parts = (run_ranks(interrupted, WORLD, tmp_path, how) for how in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(whole[0], parts[0], strict=True))


def overflow(rank: int) -> dict:
    """One rank's gradient overflows at step 1."""
    model = make()
    ddp = DDP(model)
    attachment = gmscale.attach(ddp, GradientMask(strength=1.0), site="ddp")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, residuals = [], []
    for step in range(3):
        attachment.at(step, grad_scale=scaler.get_scale())
        optimizer.zero_grad()
        loss = loss_of(ddp, rank, step)
        scaler.scale(loss * float("inf") if step == 1 and rank == 1 else loss).backward()
        before.append(model.head.weight.detach().clone())
        scaler.step(optimizer)
        scaler.update()
        residuals.append({k: v.clone() for k, v in attachment.state_dict()["residuals"].items()})
    after = model.head.weight.detach()
    finite = all(torch.isfinite(r).all() for step in residuals for r in step.values())
    kept = all(torch.equal(residuals[0][k], residuals[1][k]) for k in residuals[0])
    return {
        "skipped": torch.equal(before[1], before[2]),
        "went on": not torch.equal(before[2], after),
        "finite": finite,
        "kept": kept,
        "scale": scaler.get_scale(),
    }


def test_overflow_on_one_rank_is_seen_by_all_and_never_enters_the_residual(tmp_path):
    first, second = run_ranks(overflow, WORLD, tmp_path)
    for rank in (first, second):
        assert rank["skipped"]
        assert rank["went on"]
        assert rank["finite"]
        assert rank["scale"] == 4.0
    assert second["kept"]  # the rank that overflowed held on to what it had


# -- what is refused ----------------------------------------------------------------------------------------------
def refusals(rank: int) -> dict[str, str]:
    messages = {}
    attempts = {
        "not ddp": lambda: gmscale.attach(make(), GradientMask(), site="ddp"),
        "single": lambda: gmscale.attach(DDP(make()), GradientMask(), site="single"),
        "site": lambda: gmscale.attach(DDP(make()), GradientMask(), site="dpp"),
        "nothing": lambda: gmscale.attach(DDP(make()), GradientMask(include=("con.*",)), site="ddp"),
        "excluded": lambda: gmscale.attach(DDP(make()), GradientMask(exclude=("*",)), site="ddp"),
        "wrapper": lambda: gmscale.mask_wrapper(default_hooks.allreduce_hook, GradientMask(include=("a",))),
    }
    for name, attempt in attempts.items():
        with pytest.raises(UsageError) as caught:
            attempt()
        messages[name] = str(caught.value)
    ddp = DDP(make())
    ddp.register_comm_hook(None, default_hooks.allreduce_hook)
    with pytest.raises(UsageError) as caught:
        gmscale.attach(ddp, GradientMask(), site="ddp")
    messages["taken"] = str(caught.value)
    return messages


def test_refusals_say_what_to_do(tmp_path):
    messages = run_ranks(refusals, 1, tmp_path)[0]
    assert "wrap it first" in messages["not ddp"]
    assert "site='ddp'" in messages["single"]
    assert "did you mean 'ddp'" in messages["site"]
    assert "matches no parameter" in messages["nothing"]
    assert "touches nothing" in messages["excluded"]
    assert "attach(..., hook=...)" in messages["wrapper"]
    assert "hook=" in messages["taken"]


# -- what is reported ---------------------------------------------------------------------------------------------
def reported(rank: int) -> tuple[dict, dict, dict]:
    ddp = DDP(make())
    pool = gmscale.attach(ddp, GradientMask(block=4), site="ddp")
    loss_of(ddp, rank, 0).backward()
    report, description = pool.report(), pool.describe()
    shuffled = DDP(make())
    random = gmscale.attach(shuffled, GradientMask(block=4, operator="random"), site="ddp")
    random.at(0, 1)
    loss_of(shuffled, rank, 0).backward()
    return vars(report), description, vars(random.report())


def test_report_names_what_was_kept(tmp_path):
    report, description, random = run_ranks(reported, WORLD, tmp_path)[0]
    names = [t["name"] for t in description["touched"]]
    assert names == ["conv.weight", "depthwise.weight", "pointwise.weight", "unused.weight", "head.weight"]
    assert "norm.weight" in description["passed"]
    assert description["timing"] == "once per step"
    assert list(report["layers"]) == names
    assert 0 < report["kept_entries"] < report["kept_energy"] < 1
    assert report["hook_ms"] > 0
    assert random["kept_energy"] < report["kept_energy"]
    for name in names:  # the control keeps as many entries, up to a short last row block
        assert random["layers"][name][0] == pytest.approx(report["layers"][name][0], abs=0.13)


def bytes_of_hook(rank: int, which: str) -> tuple[float | None, float | None]:
    ddp = DDP(make())
    hook = {"plain": None, "fp16": default_hooks.fp16_compress_hook, "own": hook_of_ones_own}[which]
    attachment = gmscale.attach(ddp, GradientMask(block=4), site="ddp", hook=hook)
    for step in range(2):
        loss_of(ddp, rank, step).backward()
    report = attachment.report()
    return report.wire_bytes, report.dense_bytes


def hook_of_ones_own(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    return default_hooks.allreduce_hook(None, bucket)


def test_report_counts_the_bytes_of_torchs_hooks_and_does_not_guess_those_of_others(tmp_path):
    whole = 4.0 * sum(p.numel() for p in make().parameters())
    assert run_ranks(bytes_of_hook, WORLD, tmp_path, "plain")[0] == (whole, whole)
    assert run_ranks(bytes_of_hook, WORLD, tmp_path, "fp16")[0] == (whole / 2, whole)
    assert run_ranks(bytes_of_hook, WORLD, tmp_path, "own")[0] == (None, None)
