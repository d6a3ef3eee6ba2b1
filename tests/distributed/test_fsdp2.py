"""Site fsdp2: the weights after some steps are those of each rank's own masks, averaged."""

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import gmscale
from gmscale import GradientMask
from gmscale.errors import UsageError

sys.path.insert(0, str(Path(__file__).parent.parent))
import oracle
from ranks import run_ranks

pytest.importorskip("torch.distributed.fsdp", reason="torch without FSDP2")
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

WORLD = 2
STEPS = 3


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.pointwise = nn.Conv2d(8, 8, 1, bias=False)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.pointwise(self.conv(x).relu())).relu()


class Attention(nn.Module):
    """`attention.out_proj` is a module whose forward pass is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return x + self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).view(x.shape)


class Net(nn.Module):
    """Blocks, the first of them used twice, between a stem and a head that the root module keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([Convolutions(), Convolutions(), Attention()])
        self.head = nn.Linear(8, 5)
        self.twice = True
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in (*self.blocks, self.blocks[0]) if self.twice else self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


def make() -> Net:
    torch.manual_seed(0)
    return Net()


def shard(model: Net, variant: dict[str, Any], **options: Any) -> Net:
    """Put a model under fully_shard as `variant` says."""
    if variant.get("bf16"):
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if variant.get("replicas"):
        options["mesh"] = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    options["reshard_after_forward"] = variant.get("reshard")
    model.reentrant = variant.get("reentrant")
    for i, block in enumerate(model.blocks):
        if variant.get("checkpoint_wrapper"):
            model.blocks[i] = block = checkpoint_wrapper(block)
        if variant.get("compile"):
            block.compile(backend="aot_eager")
        if variant.get("nested") and i < 2:
            fully_shard(getattr(block, "_checkpoint_wrapped_module", block).conv, **options)
        if variant.get("blocks", True):
            fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def batch(rank: int, step: int, micro: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + 10 * step + micro)
    return torch.randn(4, 3, 6, 6, generator=generator), torch.randint(5, (4,), generator=generator)


def loss_of(model: nn.Module, rank: int, step: int, micro: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    images, labels = batch(rank, step, micro)
    return nn.functional.cross_entropy(model(images.to(dtype)).float(), labels)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole weights, by the names of the plain model."""
    weights = {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in model.named_parameters()}
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in weights.items()}


# -- against the oracle -------------------------------------------------------------------------------------------
class Reference:
    """A plain model that every rank trains on the mean of all ranks' gradients, masked by the oracle."""

    def __init__(self, mask: GradientMask, variant: dict[str, Any]) -> None:
        self.model = make()
        self.model.twice = variant.get("twice", True)
        self.mask = mask
        self.dtype = torch.bfloat16 if variant.get("bf16") else torch.float32
        self.frozen: tuple[str, ...] = variant.get("frozen", ())
        self.held: dict[str, Tensor] = {}
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def step(self, rank: int, step: int, micro_batches: int) -> None:
        sums = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        for micro in range(micro_batches):
            working = copy.deepcopy(self.model).to(self.dtype)
            loss_of(working, rank, step, micro, self.dtype).backward()
            for name, p in working.named_parameters():
                assert p.grad is not None
                sums[name] += self.masked(name, p.grad).float()
        for name, p in self.model.named_parameters():
            dist.all_reduce(sums[name])
            p.grad = None if name in self.frozen else sums[name] / dist.get_world_size()
        self.optimizer.step()

    def masked(self, name: str, gradient: Tensor) -> Tensor:
        if gradient.ndim < 2 or name in self.mask.exclude:
            return gradient
        settings = {"operator": self.mask.operator, "block": self.mask.block}
        total = gradient + self.held.get(name, 0.0)  # in the gradient's own dtype
        sent = oracle.apply(total.double().numpy(), self.mask.peak_strength, **settings)
        if self.mask.error_feedback:
            self.held[name] = (total.double() - torch.from_numpy(sent)).to(total.dtype)
        return torch.from_numpy(sent).to(total.dtype)


def largest_difference(rank: int, variant: dict[str, Any], settings: dict[str, Any]) -> list[float]:
    """Return the largest difference of the weights to the oracle's, without and with error feedback."""
    worst = []
    for feedback in (False, True):
        mask = GradientMask(block=4, error_feedback=feedback, **settings)
        reference, model = Reference(mask, variant), make()
        model.twice = variant.get("twice", True)
        for name, p in model.named_parameters():
            p.requires_grad_(name not in variant.get("frozen", ()))
        shard(model, variant)
        attachment = gmscale.attach(model, mask, site="fsdp2")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        micro_batches = variant.get("micro_batches", 1)
        for step in range(STEPS):
            with torch.no_grad():
                loss_of(model, rank, step)  # an evaluation between two steps leaves no trace
            for micro in range(micro_batches - 1):
                with attachment.no_sync():
                    loss_of(model, rank, step, micro).backward()
            loss_of(model, rank, step, micro_batches - 1).backward()
            optimizer.step()
            optimizer.zero_grad()
            reference.step(rank, step, micro_batches)
        expected, start = whole(reference.model), whole(make())
        found = whole(model)
        assert found.keys() == expected.keys()
        assert all(t.name in expected and t.shape == expected[t.name].shape for t in attachment.touched)
        assert any(not torch.equal(expected[n], start[n]) for n in expected)
        worst.append(max(float((found[n] - expected[n]).abs().max()) for n in expected))
    return worst


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"reshard": True, "nested": True},
        {"reshard": False, "micro_batches": 3},
        {"blocks": False},
        {"replicas": True},
        {"reentrant": False},
        {"reentrant": True, "twice": False},
        {"checkpoint_wrapper": True, "reshard": True, "micro_batches": 2},
        {"frozen": ("stem.weight", "blocks.1.conv.weight")},
        {"compile": True},
    ],
    ids=lambda variant: " ".join(variant) or "default",
)
def test_weights_are_those_of_the_mean_of_the_oracles_masks(tmp_path, variant):
    for differences in run_ranks(largest_difference, WORLD, tmp_path, variant, {"strength": 0.6}):
        assert max(differences) < 1e-6


@pytest.mark.parametrize(
    "variant",
    [{}, {"reshard": True, "micro_batches": 3}, {"checkpoint_wrapper": True}, {"reentrant": True, "twice": False}],
    ids=lambda variant: " ".join(variant) or "default",
)
def test_bf16_weights_are_those_of_the_mean_of_the_oracles_masks(tmp_path, variant):
    """At strength 1 a bf16 gradient is sent as it is or not at all; its mean over ranks is taken in float32."""
    variant = variant | {"bf16": True}
    for differences in run_ranks(largest_difference, WORLD, tmp_path, variant, {"strength": 1.0}):
        assert max(differences) < 1e-6


@pytest.mark.parametrize("operator", ["log", "dog", "licnn"])
def test_every_operator_and_exclude_arrive_unchanged(tmp_path, operator):
    settings = {"operator": operator, "strength": 1.0, "exclude": ("head.weight", "blocks.0.conv.weight")}
    for differences in run_ranks(largest_difference, WORLD, tmp_path, {}, settings):
        assert max(differences) < 1e-6


# -- identity -----------------------------------------------------------------------------------------------------
def weights_after(rank: int, variant: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Return the weights after some steps without a mask, with one of strength 0, detached, and at work."""
    weights = {}
    for how in ("plain", "strength 0", "detached", "masked"):
        model = shard(make(), variant)
        if how != "plain":
            mask = GradientMask(strength=0.0 if how == "strength 0" else 1.0)
            attachment = gmscale.attach(model, mask, site="fsdp2")
        if how == "detached":
            loss_of(model, rank, 99).backward()  # puts the hooks in place
            model.zero_grad()
            attachment.detach()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(STEPS):
            loss_of(model, rank, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights[how] = whole(model)
    return weights


@pytest.mark.parametrize("variant", [{}, {"bf16": True, "reentrant": False}], ids=["fp32", "bf16"])
def test_strength_zero_and_detach_are_the_plain_run_bit_for_bit(tmp_path, variant):
    for weights in run_ranks(weights_after, WORLD, tmp_path, variant):
        for name, weight in weights["plain"].items():
            assert torch.equal(weight, weights["strength 0"][name])
            assert torch.equal(weight, weights["detached"][name])
        assert any(not torch.equal(weight, weights["masked"][name]) for name, weight in weights["plain"].items())


# -- conservation, non-finite gradients ---------------------------------------------------------------------------
def conservation(rank: int, variant: dict[str, Any], strength: float) -> tuple[bool, int, set[torch.dtype]]:
    """Return (whether sent + held == gradient + earlier residual always, calls, dtypes of residuals)."""
    model = shard(make(), variant)
    attachment = gmscale.attach(model, GradientMask(strength=strength, block=4), site="fsdp2")
    mask_all = attachment._mask_all
    exact, calls = True, 0

    def checked(gradients: list[tuple[str, Tensor]]) -> None:
        nonlocal exact, calls
        (name, gradient), held = gradients[0], attachment.state_dict()["residuals"]
        total = gradient + held[name] if name in held else gradient.clone()
        mask_all(gradients)
        exact &= torch.equal(gradient + attachment.state_dict()["residuals"][name], total)
        exact &= not torch.equal(gradient, total)
        calls += 1

    attachment._mask_all = checked
    for step in range(STEPS):
        loss_of(model, rank, step).backward()
        model.zero_grad()
    return exact, calls, {r.dtype for r in attachment.state_dict()["residuals"].values()}


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("variant", [{}, {"bf16": True, "checkpoint_wrapper": True}], ids=["fp32", "bf16"])
def test_what_is_sent_and_held_is_gradient_and_residual_and_every_hook_runs_once(tmp_path, variant, strength):
    for exact, calls, dtypes in run_ranks(conservation, WORLD, tmp_path, variant, strength):
        assert exact
        assert calls == 8 * STEPS  # masked weights: each once a step, although a block is used twice
        assert dtypes == {torch.bfloat16 if variant.get("bf16") else torch.float32}


def non_finite(rank: int) -> tuple[list[bool], bool, bool]:
    """One rank's gradient overflows at step 1."""
    model = shard(make(), {})
    attachment = gmscale.attach(model, GradientMask(strength=1.0), site="fsdp2")
    finite, residuals = [], []
    for step in range(STEPS):
        loss = loss_of(model, rank, step)
        (loss * float("inf") if step == 1 and rank == 1 else loss).backward()
        finite.append(all(bool(torch.isfinite(p.grad.full_tensor()).all()) for p in model.parameters()))
        model.zero_grad()
        residuals.append({n: r.clone() for n, r in attachment.state_dict()["residuals"].items()})
    held_on = all(torch.equal(residuals[0][n], residuals[1][n]) for n in residuals[0])
    return finite, held_on, all(bool(torch.isfinite(r).all()) for step in residuals for r in step.values())


def test_non_finite_gradients_are_seen_by_all_ranks_and_never_enter_the_residual(tmp_path):
    for rank, (finite, held_on, residuals_finite) in enumerate(run_ranks(non_finite, WORLD, tmp_path)):
        assert finite == [True, False, True]
        assert held_on == (rank == 1)  # the rank that overflowed keeps what it held, the other goes on
        assert residuals_finite


# -- state --------------------------------------------------------------------------------------------------------
def interrupted(rank: int, interrupt: bool) -> dict[str, Tensor]:
    weights = make().state_dict()
    state = None
    for first, last in ((0, 2), (2, 4)) if interrupt else ((0, 4),):
        model = make()
        model.load_state_dict(weights)
        shard(model, {"bf16": True})
        attachment = gmscale.attach(model, GradientMask(strength=0.9, operator="random"), site="fsdp2")
        if state is not None:
            attachment.load_state_dict(state)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(first, last):
            attachment.at(step, 4)
            loss_of(model, rank, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights, state = whole(model), attachment.state_dict()
    return weights


def test_state_makes_an_interrupted_run_continue_bit_for_bit(tmp_path):
    undisturbed, parts = (run_ranks(interrupted, WORLD, tmp_path, how) for how in (False, True))
    assert all(torch.equal(undisturbed[0][n], parts[0][n]) for n in undisturbed[0])


# -- what is refused, what is reported ----------------------------------------------------------------------------
def refusals(rank: int) -> dict[str, str]:
    only_blocks, ignoring = make(), make()
    for block in only_blocks.blocks:
        fully_shard(block)
    fully_shard(ignoring, ignored_params={ignoring.head.weight})
    attempts: dict[str, Callable[[], Any]] = {
        "plain": lambda: gmscale.attach(make(), GradientMask(), site="fsdp2"),
        "ddp": lambda: gmscale.attach(DDP(make()), GradientMask(), site="fsdp2"),
        "nothing": lambda: gmscale.attach(shard(make(), {}), GradientMask(exclude=("*",)), site="fsdp2"),
        "include": lambda: gmscale.attach(shard(make(), {}), GradientMask(include=("haed.*",)), site="fsdp2"),
        "partial": lambda: gmscale.attach(only_blocks, GradientMask(), site="fsdp2"),
        "ignored": lambda: gmscale.attach(ignoring, GradientMask(), site="fsdp2"),
    }
    messages = {}
    for name, attempt in attempts.items():
        with pytest.raises(UsageError) as caught:
            attempt()
        messages[name] = str(caught.value)
    assert all("\n" not in message for message in messages.values())
    return messages


def test_refusals_say_what_to_do(tmp_path):
    messages = run_ranks(refusals, 1, tmp_path)[0]
    assert "fully_shard(model) first" in messages["plain"]
    assert "DistributedDataParallel" in messages["ddp"]
    assert "touches nothing" in messages["nothing"]
    assert "did you mean" in messages["include"]
    assert "stem.weight is not sharded" in messages["partial"]
    assert "head.weight is not sharded" in messages["ignored"]


def reported(rank: int) -> tuple[dict, dict, list[str]]:
    model = shard(make(), {"checkpoint_wrapper": True})
    attachment = gmscale.attach(model, GradientMask(block=4), site="fsdp2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2):
            attachment.at(step)
            with attachment.no_sync():
                loss_of(model, rank, step).backward()
            loss_of(model, rank, step, 1).backward()
        report, description = attachment.report(), attachment.describe()
        silent = gmscale.attach(model, GradientMask(), site="fsdp2")
        silent.at(0)
        silent.at(1)
    return vars(report), description, [str(w.message) for w in caught if "masked" in str(w.message)]


def test_report_names_what_was_kept_and_a_warning_what_was_never_masked(tmp_path):
    report, description, warned = run_ranks(reported, WORLD, tmp_path)[0]
    names = [t["name"] for t in description["touched"]]
    conv = [
        "blocks.0.conv.weight",
        "blocks.0.pointwise.weight",
        "blocks.1.conv.weight",
        "blocks.1.pointwise.weight",
    ]
    attention = ["blocks.2.attention.in_proj_weight", "blocks.2.attention.out_proj.weight"]
    assert names == ["stem.weight", *conv, *attention, "head.weight"]
    assert [t["shape"] for t in description["touched"]][-1] == [5, 8]  # whole, although rank 0 has 3 rows
    assert "blocks.0.norm.weight" in description["passed"]
    assert description["timing"] == "each micro-batch"
    assert set(report["layers"]) == set(names)
    assert 0 < report["kept_entries"] < report["kept_energy"] < 1
    assert report["hook_ms"] > 0
    assert len(warned) == 1
    assert "8 of 8 parameters were never masked so far (first: stem.weight)" in warned[0]
