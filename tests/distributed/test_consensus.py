"""Agreement consensus: mask(mean over ranks of s) * mean of gradients arrives, and only that has travelled."""

import sys
from pathlib import Path
from typing import Any

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
from gmscale.masking.units import parts_of
from gmscale.sites.packing import KeptUnits, _known_number_kept, kept_index

sys.path.insert(0, str(Path(__file__).parent.parent))
import oracle
from ranks import run_ranks

SMALL_BUCKETS = {"bucket_cap_mb": 0.003}
NAMES = ["conv.weight", "depthwise.weight", "pointwise.weight", "unused.weight", "head.weight"]


class Net(nn.Module):
    """Parameters large enough to be packed, one too small, short last row blocks, and a branch to leave unused."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 42, 1)
        self.norm = nn.BatchNorm2d(42)
        self.unused = nn.Linear(42, 16)
        self.head = nn.Linear(42, 20)
        self.use_all = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.pointwise(self.depthwise(self.conv(x)).relu())).relu().mean((2, 3))
        return self.head(x) + (self.unused(x).repeat(1, 2)[:, :20] if self.use_all else 0)


def make(channels_last: bool = False) -> Net:
    torch.manual_seed(0)
    return Net().to(memory_format=torch.channels_last) if channels_last else Net()


def loss_of(model: nn.Module, rank: int, step: int, micro: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + 10 * step + micro)
    images = torch.randn(4, 8, 5, 5, generator=generator)
    return nn.functional.cross_entropy(model(images), torch.randint(20, (4,), generator=generator))


def consensus(**settings: Any) -> GradientMask:
    return GradientMask(**{"agreement": "consensus", "block": 4, **settings})


def mean_over_ranks(x: np.ndarray) -> np.ndarray:
    total = torch.from_numpy(np.array(x, np.float64))
    dist.all_reduce(total)
    return (total / dist.get_world_size()).numpy()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def own_gradients(ddp: DDP, rank: int, step: int) -> dict[str, Tensor]:
    """What this rank alone has to send at this step, before DDP sees it."""
    with ddp.no_sync():
        loss_of(ddp, rank, step).backward()
    own = gradients(ddp.module)
    ddp.zero_grad()
    return own


def held(attachment: gmscale.sites.Attachment, own: dict[str, Tensor]) -> dict[str, Tensor]:
    residuals = attachment.state_dict()["residuals"]
    return {name: residuals[name].clone() if name in residuals else torch.zeros_like(own[name]) for name in NAMES}


# -- against the oracle -------------------------------------------------------------------------------------------
def compare(rank: int, ddp_options: dict, settings: dict, variant: dict) -> tuple[float, list[Tensor], set[str]]:
    """Train with consensus; return the largest difference to the oracle, the last gradients, what went dense."""
    ours, theirs = make(variant.get("channels_last", False)), make(variant.get("channels_last", False))
    ours.use_all = theirs.use_all = not variant.get("unused", False)
    micros = variant.get("micro_batches", 1)
    ddp, mask = DDP(ours, **ddp_options), consensus(**settings)
    attachment = gmscale.attach(ddp, mask)
    keys = ("operator", "gate", "norm", "block")
    of_oracle = {key: getattr(mask, key) for key in keys}
    residuals: dict[str, np.ndarray] = {}
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs)]
    worst = 0.0
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for micro in range(micros - 1):
            with attachment.no_sync():
                loss_of(ddp, rank, step, micro).backward()
            loss_of(theirs, rank, step, micro).backward()
        loss_of(ddp, rank, step, micros - 1).backward()
        loss_of(theirs, rank, step, micros - 1).backward()
        for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            g = (torch.zeros_like(p) if p.grad is None else p.grad).numpy().astype(np.float64)
            expected = mean_over_ranks(g)
            if p.ndim >= 2:
                total = g + residuals.get(name, 0)
                s = oracle.lateral_map(total, mask.norm, mask.block)
                m = oracle.keep_map(mean_over_ranks(s), **of_oracle)
                factor = 1 - mask.peak_strength * (1 - oracle.expand(m, g.shape, mask.block))
                if mask.error_feedback:
                    residuals[name] = total * (1 - factor)
                before = mean_over_ranks(total)
                expected = before * factor
                if mask.rescale:
                    expected *= np.linalg.norm(before) / np.linalg.norm(expected)
            p.grad = torch.from_numpy(expected).float().to(memory_format=torch.preserve_format)
            arrived = torch.zeros_like(q) if q.grad is None else q.grad
            worst = max(worst, float(np.abs(arrived.numpy() - expected).max()))
        for optimizer in optimizers:
            optimizer.step()
    return (
        worst,
        [p.grad for p in ours.parameters() if p.grad is not None],
        set(attachment.report().dense_parameters),
    )


def check(results: list[tuple[float, list[Tensor], set[str]]], dense: set[str]) -> None:
    first = results[0]
    for worst, arrived, went_dense in results:
        assert worst < 1e-6
        assert all(torch.equal(a, b) for a, b in zip(arrived, first[1], strict=True))
        assert went_dense == dense


@pytest.mark.parametrize("feedback", [False, True], ids=["plain", "feedback"])
@pytest.mark.parametrize(
    ("ddp_options", "variant", "world"),
    [
        ({}, {"channels_last": True}, 2),
        (SMALL_BUCKETS, {}, 3),
        ({"static_graph": True, **SMALL_BUCKETS}, {}, 2),
        ({"find_unused_parameters": True, **SMALL_BUCKETS}, {"unused": True}, 2),
        ({"gradient_as_bucket_view": True, **SMALL_BUCKETS}, {"channels_last": True, "micro_batches": 3}, 2),
    ],
    ids=["channels_last", "three ranks", "static", "unused", "views, no_sync"],
)
def test_gradient_is_the_common_mask_of_the_mean(tmp_path, ddp_options, variant, world, feedback):
    results = run_ranks(compare, world, tmp_path, ddp_options, {"error_feedback": feedback}, variant)
    check(results, dense={"depthwise.weight"})


SETTINGS = {
    "log": {"operator": "log"},
    "dog": {"operator": "dog", "block": 16},
    "licnn": {"operator": "licnn", "norm": "l1"},
    "max": {"norm": "max", "block": 5},
    "soft": {"gate": "soft"},
    "soft at 0.7": {"gate": "soft", "strength": 0.7},
    "half": {"strength": 0.5},
    "rescale": {"rescale": True, "error_feedback": False},
}
WHOLE = ("soft", "soft at 0.7", "half", "rescale")


def compare_all(rank: int) -> dict[str, Any]:
    return {name: compare(rank, SMALL_BUCKETS, settings, {}) for name, settings in SETTINGS.items()}


def test_every_operator_and_every_kind_that_travels_whole(tmp_path):
    results = run_ranks(compare_all, 2, tmp_path)
    for name in SETTINGS:
        assert max(result[name][0] for result in results) < 1e-6, name
        assert (results[0][name][2] == set(NAMES)) == (name in WHOLE), name
        assert all(torch.equal(a, b) for a, b in zip(results[0][name][1], results[1][name][1], strict=True)), name


# -- nothing is lost ----------------------------------------------------------------------------------------------
HOOKS = {
    "float32": None,
    "bf16": default_hooks.bf16_compress_hook,
    "fp16": default_hooks.fp16_compress_hook,
}


def account(rank: int, hook: str, settings: dict) -> list[dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """Return for each step and parameter (gradient + old residual, new residual, what arrived)."""
    ddp = DDP(make(), **SMALL_BUCKETS)
    attachment = gmscale.attach(ddp, consensus(**settings), hook=HOOKS[hook])
    steps = []
    for step in range(3):
        ddp.zero_grad()
        own = own_gradients(ddp, rank, step)
        before = held(attachment, own)
        loss_of(ddp, rank, step).backward()
        after, arrived = held(attachment, own), gradients(ddp.module)
        steps.append({name: (own[name] + before[name], after[name], arrived[name]) for name in NAMES})
    return steps


@pytest.mark.parametrize(
    ("hook", "settings"),
    [("float32", {}), ("bf16", {}), ("fp16", {}), ("bf16", {"gate": "soft"}), ("bf16", {"strength": 0.3})],
    ids=["float32", "bf16", "fp16", "bf16 soft", "bf16 strength 0.3"],
)
def test_sent_and_held_are_all_there_was_and_what_was_sent_arrives(tmp_path, hook, settings):
    world = 3
    ranks = run_ranks(account, world, tmp_path, hook, settings)
    wire = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[hook]
    inhibited = 0
    for step in zip(*ranks, strict=True):
        for name in NAMES:
            sent = []
            for rank in step:
                total, residual, arrived = rank[name]
                exactly = total.double() - residual.double()
                # What was sent is a number that the wire carries, so nothing was rounded on the way to it.
                assert torch.equal(exactly.to(wire).double(), exactly), name
                assert torch.equal(arrived, step[0][name][2]), name
                inhibited += int((exactly == 0).sum())
                sent.append(exactly)
            mean = sum(sent) / world
            error = (arrived.double() - mean).abs().max() / mean.abs().max()
            assert error < (1e-6 if hook == "float32" else 2 * torch.finfo(wire).eps), name
    assert (inhibited > 1000) == (not settings)


# -- bytes --------------------------------------------------------------------------------------------------------
def counted(rank: int, agreement: str, hook: str) -> tuple[int, gmscale.sites.MaskReport, dict[str, int]]:
    """Return (bytes that all-reduces got in a step, the report of it, kept entries by parameter)."""
    ddp = DDP(make(), **SMALL_BUCKETS)
    attachment = gmscale.attach(ddp, consensus(agreement=agreement), hook=HOOKS[hook])
    for step in range(2):
        loss_of(ddp, rank, step).backward()
    attachment.report()
    ddp.zero_grad()
    real, handed = dist.all_reduce, 0

    def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        nonlocal handed
        handed += tensor.numel() * tensor.element_size()
        return real(tensor, *args, **options)

    dist.all_reduce = all_reduce
    loss_of(ddp, rank, 2).backward()
    dist.all_reduce = real
    report = attachment.report()
    arrived = {name: g.numpy() for name, g in gradients(ddp.module).items()}
    kept = {name: oracle.lateral_map(arrived[name], block=4) > 0 for name in NAMES}
    return handed, report, {n: int(oracle.expand(1.0 * m, arrived[n].shape, 4).sum()) for n, m in kept.items()}


@pytest.mark.parametrize("hook", ["float32", "bf16"])
def test_bytes_are_those_that_all_reduces_got(tmp_path, hook):
    handed, report, kept = run_ranks(counted, 2, tmp_path, "consensus", hook)[0]
    assert report.wire_bytes == handed
    shapes = {name: p.shape for name, p in make().named_parameters()}
    assert report.dense_bytes == 4 * sum(shape.numel() for shape in shapes.values())
    units = 16 * 8 + 16 + 42 * 4 + 16 * 11 + 20 * 11
    passed = sum(shape.numel() for name, shape in shapes.items() if name not in NAMES)
    packed = sum(n for name, n in kept.items() if name != "depthwise.weight") + 16 * 9
    assert handed == (4 if hook == "float32" else 2) * (units + passed + packed)
    assert report.dense_parameters == {"depthwise.weight": "few entries"}
    handed, report, _ = run_ranks(counted, 2, tmp_path, "local", hook)[0]
    assert report.wire_bytes == handed == report.dense_bytes / (1 if hook == "float32" else 2)


def report_of(rank: int, case: str) -> tuple[gmscale.sites.MaskReport, dict[str, Tensor], dict]:
    ddp = DDP(make())
    attachment = gmscale.attach(ddp, consensus())
    loss = loss_of(ddp, rank, 0)
    factor = {"zero on one rank": rank, "zero": 0.0, "nan": float("nan") if rank else 1.0, "huge": 1e30}[case]
    (loss * factor).backward()
    return attachment.report(), gradients(ddp.module), attachment.state_dict()["residuals"]


def test_zero_gradients_cost_no_values_and_non_finite_ones_travel_whole(tmp_path):
    units = 16 * 8 + 16 + 42 * 4 + 16 * 11 + 20 * 11
    passed = sum(p.numel() for name, p in make().named_parameters() if name not in NAMES)
    (half, arrived, _), (_, other, _) = run_ranks(report_of, 2, tmp_path, "zero on one rank")
    assert 0.2 < half.kept_entries < 0.7
    assert all(torch.equal(arrived[name], other[name]) for name in arrived)
    report, arrived, _ = run_ranks(report_of, 2, tmp_path, "zero")[0]
    assert report.wire_bytes == 4 * (units + passed + 144)
    assert not any(g.any() for g in arrived.values())
    for case in ("nan", "huge"):
        for report, arrived, residuals in run_ranks(report_of, 2, tmp_path, case):
            assert set(report.dense_parameters) == set(NAMES)
            assert report.dense_parameters["conv.weight"] == "not finite"
            assert report.wire_bytes == report.dense_bytes + 4 * units
            assert all(torch.isnan(g).any() for g in arrived.values()) == (case == "nan")
            assert not any(r.any() for r in residuals.values())


def overflow(rank: int, hook: str) -> list[dict[str, Tensor]]:
    """Return the residuals after each step; rank 1 overflows in step 1."""
    ddp = DDP(make(), **SMALL_BUCKETS)
    attachment = gmscale.attach(ddp, consensus(), hook=HOOKS[hook])
    states = []
    for step in range(3):
        ddp.zero_grad()
        # 1e8 is a gradient that float32 and bfloat16 carry and float16 does not
        factor = (1e8 if hook == "fp16" else float("inf")) if step == 1 and rank == 1 else 1.0
        (loss_of(ddp, rank, step) * factor).backward()
        assert all(
            torch.isfinite(p.grad).all() != (step == 1) for n, p in ddp.module.named_parameters() if n in NAMES
        )
        states.append({name: r.clone() for name, r in attachment.state_dict()["residuals"].items()})
    return states


@pytest.mark.parametrize("hook", ["float32", "fp16"])
def test_an_overflow_on_one_rank_is_seen_by_all_and_changes_no_residual(tmp_path, hook):
    for before, during, after in run_ranks(overflow, 2, tmp_path, hook):
        for name in NAMES:
            assert before[name].any()
            assert torch.equal(before[name], during[name])
            assert not torch.equal(before[name], after[name])


def uneven(rank: int) -> tuple[list[list[Tensor]], int]:
    """Rank 1 has one batch, rank 0 three: DDP's join lets it take part with zeros, and with what it holds."""
    ddp = DDP(make(), **SMALL_BUCKETS)
    attachment = gmscale.attach(ddp, consensus())
    steps = []
    with ddp.join():
        for step in range(1 if rank else 3):
            ddp.zero_grad()
            loss_of(ddp, rank, step).backward()
            steps.append(list(gradients(ddp.module).values()))
    return steps, len(attachment.state_dict()["residuals"])


def test_ranks_with_fewer_batches_take_part(tmp_path):
    (long, _), (short, _) = run_ranks(uneven, 2, tmp_path)
    assert len(long) == 3
    assert all(torch.equal(a, b) for a, b in zip(long[0], short[0], strict=True))
    assert all(torch.isfinite(g).all() and g.any() for g in long[2])


def crowded_at_the_threshold(seed: int) -> Tensor:
    """A map with a thousand units a few float32 steps around pool's threshold."""
    s = torch.rand(701 + seed, 390, generator=torch.Generator().manual_seed(seed))
    for _ in range(5):  # these units move the mean a little
        threshold = float(s.double().mean()) - 1e-6 * float(s.max())
        s.view(-1)[:1000] = threshold + 3e-8 * torch.arange(-500, 500)
    return s


@pytest.mark.parametrize("operator", ["pool", "log", "dog", "licnn"])
def test_the_number_of_threads_does_not_change_a_mask(operator):
    """Ranks may differ in it, and one unit that they see differently would part them."""
    threads = torch.get_num_threads()
    try:
        for seed in range(4):
            s, maps = crowded_at_the_threshold(seed), []
            for n in (1, 2, 4):
                torch.set_num_threads(n)
                maps.append(consensus(operator=operator).keep_map(s))
            assert all(torch.equal(maps[0], m) for m in maps[1:])
    finally:
        torch.set_num_threads(threads)


# -- random, precision, time --------------------------------------------------------------------------------------
def kept_by(rank: int, operator: str) -> list[dict[str, Tensor]]:
    ddp = DDP(make(), **SMALL_BUCKETS)
    attachment = gmscale.attach(ddp, consensus(operator=operator, error_feedback=False))
    steps = []
    for step in range(2):
        attachment.at(step, 2)
        ddp.zero_grad()
        loss_of(ddp, rank, step).backward()
        steps.append({name: gradients(ddp.module)[name] != 0 for name in NAMES})
    return steps


def test_random_draws_alike_on_all_ranks_and_keeps_as_many(tmp_path):
    pool, (random, other) = run_ranks(kept_by, 2, tmp_path, "pool")[0], run_ranks(kept_by, 2, tmp_path, "random")
    for step in range(2):
        for name in NAMES:
            assert torch.equal(random[step][name], other[step][name])
        assert int(random[step]["conv.weight"].sum()) == int(pool[step]["conv.weight"].sum())
        assert not torch.equal(random[step]["conv.weight"], pool[step]["conv.weight"])
    assert not torch.equal(random[0]["conv.weight"], random[1]["conv.weight"])


class Mixed(nn.Module):
    """Half of the parameters are bfloat16, so there are buckets of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 40), nn.Linear(40, 40).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu().bfloat16()).float()


def mixed(rank: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return for each weight (gradient + old residual, new residual, what arrived)."""
    torch.manual_seed(0)
    ddp = DDP(Mixed())
    attachment = gmscale.attach(ddp, consensus())
    for _ in range(3):
        before = dict(attachment.state_dict()["residuals"])
        before = {name: r.clone() for name, r in before.items()}
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(rank))
        with ddp.no_sync():
            ddp(x).square().mean().backward()
        own = gradients(ddp.module)
        ddp.zero_grad()
        ddp(x).square().mean().backward()
        after, arrived = attachment.state_dict()["residuals"], gradients(ddp.module)
        ddp.zero_grad()
    return {name: (own[name] + before[name], after[name], arrived[name]) for name in before}


def test_bfloat16_parameters_travel_packed_in_their_own_precision(tmp_path):
    first, second = run_ranks(mixed, 2, tmp_path)
    assert {after.dtype for _, after, _ in first.values()} == {torch.float32, torch.bfloat16}
    for name, (_, _, arrived) in first.items():
        assert torch.equal(arrived, second[name][2])
        assert 0.2 < float((arrived == 0).float().mean()) < 0.8
        sent = [rank[name][0] - rank[name][1] for rank in (first, second)]
        for rank, part in zip((first, second), sent, strict=True):
            total, after, _ = rank[name]
            assert torch.equal(part + after, total)
        torch.testing.assert_close(arrived, (sent[0] + sent[1]) / 2)


def interrupted(rank: int, interrupt: bool) -> list[Tensor]:
    model, optimizer_state, attachment_state = make(), None, None
    for first, last in ((0, 2), (2, 5)) if interrupt else ((0, 5),):
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        model = make(channels_last=True)
        model.load_state_dict(weights)
        ddp = DDP(model, **SMALL_BUCKETS)
        attachment = gmscale.attach(ddp, consensus(operator="random"), hook=default_hooks.bf16_compress_hook)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if optimizer_state:
            optimizer.load_state_dict(optimizer_state)
            # a checkpoint may lay tensors out anew
            residuals = {k: v.contiguous() for k, v in attachment_state["residuals"].items()}
            attachment.load_state_dict({**attachment_state, "residuals": residuals})
        for step in range(first, last):
            attachment.at(step, 5, grad_scale=2.0**step)
            optimizer.zero_grad()
            (loss_of(ddp, rank, step) * 2.0**step).backward()
            for p in model.parameters():
                p.grad /= 2.0**step
            optimizer.step()
        optimizer_state, attachment_state = optimizer.state_dict(), attachment.state_dict()
    return [p.detach() for p in model.parameters()]


def test_state_makes_an_interrupted_run_continue_bit_for_bit(tmp_path):
    whole, parts = (run_ranks(interrupted, 2, tmp_path, how) for how in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(whole[0], parts[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[0], whole[1], strict=True))


def scheduled(rank: int, masked: bool) -> tuple[list[Tensor], list[int]]:
    """Masked only in the first of three steps: return the last gradients, and how many residuals each step left."""
    ddp = DDP(make(), **SMALL_BUCKETS)
    attachment = gmscale.attach(ddp, consensus(end=0.3)) if masked else None
    left = []
    for step in range(3):
        ddp.zero_grad()
        if attachment:
            attachment.at(step, 3)
        loss_of(ddp, rank, step).backward()
        left.append(len(attachment.state_dict()["residuals"]) if attachment else 0)
    return list(gradients(ddp.module).values()), left


def test_strength_zero_is_the_plain_run_bit_for_bit_once_all_is_sent(tmp_path):
    (plain, _), _ = run_ranks(scheduled, 2, tmp_path, False)
    (masked, left), _ = run_ranks(scheduled, 2, tmp_path, True)
    assert left == [5, 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(plain, masked, strict=True))


# -- around it ----------------------------------------------------------------------------------------------------
class Witness:
    """Adds up what the attachment says it saw and sent."""

    def __init__(self) -> None:
        self.raw: dict[str, Tensor] = {}
        self.sent: dict[str, Tensor] = {}

    def before_mask(self, named: list, residuals: dict) -> None:
        self.raw |= {name: gradient.clone() for name, gradient in named}

    def after_mask(self, named: list) -> None:
        self.sent |= {name: gradient.clone() for name, gradient in named}


def watched(rank: int, settings: dict) -> tuple[float, bool]:
    """Return (difference between the mean of what was sent and what arrived, whether raw is the own gradient)."""
    ddp = DDP(make(), **SMALL_BUCKETS)
    attachment = gmscale.attach(ddp, consensus(**settings))
    for step in range(2):
        ddp.zero_grad()
        own = own_gradients(ddp, rank, step)
        witness = Witness()
        attachment.watch(witness)
        loss_of(ddp, rank, step).backward()
        attachment.watch(None)
    arrived = gradients(ddp.module)
    worst = max(float(np.abs(mean_over_ranks(witness.sent[n].numpy()) - arrived[n].numpy()).max()) for n in NAMES)
    return worst, all(torch.equal(witness.raw[name], own[name]) for name in NAMES)


@pytest.mark.parametrize("settings", [{}, {"strength": 0.5}, {"error_feedback": False}])
def test_a_watcher_sees_what_travels(tmp_path, settings):
    for worst, raw_is_own in run_ranks(watched, 2, tmp_path, settings):
        assert worst < 1e-7
        assert raw_is_own


def wrapped(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    answers = []
    for wrapper in (False, True):
        ddp = DDP(make(), **SMALL_BUCKETS)
        if wrapper:
            ddp.register_comm_hook(None, gmscale.mask_wrapper(default_hooks.bf16_compress_hook, consensus()))
        else:
            gmscale.attach(ddp, consensus(), hook=default_hooks.bf16_compress_hook)
        for step in range(3):
            ddp.zero_grad()
            loss_of(ddp, rank, step).backward()
        answers.append(list(gradients(ddp.module).values()))
    return answers[0], answers[1]


def test_the_wrapper_does_the_same(tmp_path):
    for attached, wrapper in run_ranks(wrapped, 2, tmp_path):
        assert all(torch.equal(a, b) for a, b in zip(attached, wrapper, strict=True))


def refusals(rank: int) -> dict[str, str]:
    messages = {}
    state = powerSGD_hook.PowerSGDState(None)
    attempts = {
        "powersgd": lambda: gmscale.attach(DDP(make()), consensus(), hook=powerSGD_hook.powerSGD_hook),
        "state": lambda: gmscale.attach(
            DDP(make()), consensus(), hook=default_hooks.fp16_compress_hook, hook_state=state
        ),
        "wrapper": lambda: gmscale.mask_wrapper(powerSGD_hook.powerSGD_hook, consensus()),
        "single": lambda: gmscale.attach(make(), consensus(), site="single"),
    }
    for name, attempt in attempts.items():
        with pytest.raises(UsageError) as caught:
            attempt()
        messages[name] = str(caught.value)
    attached = gmscale.attach(DDP(make()), consensus())
    return {**messages, "agreement": attached.describe()["agreement"]}


def test_refusals_say_what_to_do(tmp_path):
    messages = run_ranks(refusals, 1, tmp_path)[0]
    for which in ("powersgd", "wrapper"):
        assert "powerSGD_hook" in messages[which]
        assert "bf16_compress_hook" in messages[which]
    assert "PowerSGDState" in messages["state"]
    assert "'local'" in messages["single"]
    assert messages["agreement"] == "consensus"


# -- packing ------------------------------------------------------------------------------------------------------
def layouts() -> dict[str, Tensor]:
    torch.manual_seed(0)
    kernels = torch.randn(6, 5, 3, 2)
    return {
        "kernels": kernels,
        "channels_last": kernels.contiguous(memory_format=torch.channels_last),
        "row blocks": torch.randn(7, 12),
        "short last block": torch.randn(7, 10),
        "only short blocks": torch.randn(7, 3),
        "1x1 channels_last": torch.randn(7, 10, 1, 1).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(10, 7).t(),
        "elements": torch.randn(11),
    }


@pytest.mark.parametrize("layout", layouts())
def test_what_is_packed_and_put_back_is_what_the_mask_keeps(layout):
    g = layouts()[layout]
    m = (torch.rand(oracle.lateral_map(g.numpy(), block=4).shape) > 0.5).float()
    factor = torch.from_numpy(oracle.expand(m.numpy(), tuple(g.shape), 4))
    result, residual, entries = torch.zeros_like(g), g.clone(), 0
    assert residual.stride() == g.stride()
    for part in parts_of(tuple(g.shape), g.stride(), 4):
        keep = part.of_map(m)
        units = KeptUnits(g, part, kept_index(keep, int(keep.sum())), residual)
        values = torch.empty(units.entries)
        units.take(values)
        units.hold(None)
        units._replace(gradient=result).put(values)
        entries += units.entries
    assert torch.equal(result, g * factor)
    assert torch.equal(residual, g * (1 - factor))
    assert entries == int(factor.sum())


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_positions_of_a_known_number_need_no_waiting(share):
    keep = torch.rand(1000, generator=torch.Generator().manual_seed(0)) < share
    expected = keep.nonzero().squeeze(1)
    assert torch.equal(_known_number_kept(keep, len(expected)), expected)
    assert torch.equal(kept_index(keep.float().view(10, 100), len(expected)), expected)
