"""Site deepspeed: DeepSpeed's weights after several steps are those of the oracle, in every ZeRO stage.

The oracle trains in one process: it masks each rank's gradient of each micro-batch in NumPy, takes the mean over
ranks and steps with torch. DeepSpeed trains in two processes, several cases in each pair of them.
"""

import copy
import logging
import os
import sys
import warnings
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import gmscale
from gmscale import GradientMask
from gmscale.errors import UsageError

sys.path.insert(0, str(Path(__file__).parent.parent))
import oracle
from ranks import run_ranks

pytest.importorskip("deepspeed", reason='pip install "gmscale[deepspeed]"')

WORLD, STEPS, MICROS = 2, 5, 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# -- what is trained ----------------------------------------------------------------------------------------------
class Net(nn.Module):
    """Convolutions, a linear layer that may be used twice, and parameters that no mask touches."""

    def __init__(self, uses: int = 1, reentrant: bool | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.pointwise = nn.Conv2d(8, 20, 1)
        self.norm = nn.GroupNorm(4, 20)
        self.hidden = nn.Linear(20, 20)
        self.head = nn.Linear(20, 5)
        self.uses, self.reentrant = uses, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.pointwise(self.conv(x).relu())).relu().mean((2, 3))
        for _ in range(self.uses):
            if self.reentrant is None:
                x = self.hidden(x).relu()
            else:
                x = checkpoint(self.hidden, x, use_reentrant=self.reentrant).relu()
        return self.head(x)


def make(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options)


def loss_of(model: nn.Module, dtype: torch.dtype, rank: int, step: int, micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + 10 * step + micro)
    images = torch.randn(4, 3, 6, 6, generator=generator)
    labels = torch.randint(5, (4,), generator=generator)
    return nn.functional.cross_entropy(model(images.to(dtype)).float(), labels)


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)  # a large eps: no rounding is blown up


@dataclass(frozen=True)
class Case:
    stage: int
    dtype: str = "fp32"
    feedback: bool = True
    micros: int = MICROS
    optimizer: str = "sgd"
    overflow_at: int | None = None
    """Step at which rank 1's loss is infinite."""
    config: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    gate: str = "hard"
    strength: float | None = 0.6
    """None trains without a mask."""
    before: bool = False
    """Attach to the model before deepspeed.initialize."""

    @property
    def mask(self) -> GradientMask | None:
        if self.strength is None:
            return None
        return GradientMask(strength=self.strength, error_feedback=self.feedback, gate=self.gate, block=4)


# -- DeepSpeed ----------------------------------------------------------------------------------------------------
def start(rank: int) -> Any:
    """Make a rank DeepSpeed's; return the package."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    warnings.simplefilter("ignore")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for a minute
    accelerator = deepspeed.get_accelerator()
    type(accelerator).is_fp16_supported = lambda _: True  # it asks for fast fp16; slow fp16 is exact too
    deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def engine_of(deepspeed: Any, case: Case, model: nn.Module) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": case.micros,
        "zero_optimization": {"stage": case.stage, **case.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **({case.dtype: {"enabled": True}} if case.dtype == "bf16" else {}),
        **case.config,
    }
    optimizer = optimizer_of(case.optimizer, model)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def weights_of(deepspeed: Any, engine: Any) -> dict[str, Tensor]:
    """The float32 master weights; the model's own where there are no others."""
    optimizer, found = engine.optimizer, {}
    groups = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False)
    stage_0 = {id(p): m for group, masters in groups for p, m in zip(group, masters, strict=True)}
    for name, p in engine.module.named_parameters():
        master = stage_0.get(id(p)) if stage_0 else deepspeed.utils.safe_get_full_fp32_param(p)
        found[name] = (p if master is None else master).detach().clone()
        assert found[name].dtype == torch.float32
    return found


def loss_scale_of(engine: Any) -> float:
    return float(getattr(engine.optimizer, "loss_scale", 1.0))


def train(rank: int, deepspeed: Any, case: Case) -> dict[str, Any]:
    model = make(**case.model)
    attachment = gmscale.attach(model, case.mask, site="deepspeed") if case.before and case.mask else None
    engine = engine_of(deepspeed, case, model)
    if case.mask and not case.before:
        attachment = gmscale.attach(engine, case.mask, site="deepspeed")
    scales = [loss_scale_of(engine)]
    for step in range(STEPS):
        for micro in range(case.micros):
            loss = loss_of(engine, DTYPES[case.dtype], rank, step, micro)
            engine.backward(loss * float("inf") if step == case.overflow_at and rank == 1 else loss)
            engine.step()
        scales.append(loss_scale_of(engine))
    held = attachment.state_dict()["residuals"] if attachment else {}
    found = {
        "weights": weights_of(deepspeed, engine),
        "scales": scales,
        "held": {name: residual.float() / attachment._grad_scale for name, residual in held.items()},
        "touched": [tuple(t) for t in attachment.touched] if attachment else [],
        "report": attachment.report().hook_ms if attachment else None,
    }
    engine.destroy()
    return found


def trained(rank: int, cases: list[Case]) -> list[dict[str, Any]]:
    deepspeed = start(rank)
    return [train(rank, deepspeed, case) for case in cases]


# -- the oracle ---------------------------------------------------------------------------------------------------
def expected(case: Case, scales: list[float]) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Return the weights, and what each rank holds back (without the loss scale).

    `scales` are DeepSpeed's loss scales before each step and after the last one. In a step in which the scale
    grows, DeepSpeed divides by the new scale.
    """
    dtype = DTYPES[case.dtype]
    master = make(**case.model).to(dtype).float()  # the master weights are made of the rounded ones
    optimizer = optimizer_of(case.optimizer, master)
    held: list[dict[str, np.ndarray]] = [{} for _ in range(WORLD)]
    for step, (scale, scale_after) in enumerate(pairwise(scales)):
        model = copy.deepcopy(master).to(dtype)
        total = {name: np.zeros(p.shape) for name, p in model.named_parameters()}
        for rank in range(WORLD):
            for micro in range(case.micros):
                model.zero_grad()
                loss = loss_of(model, dtype, rank, step, micro) * (scale / case.micros)
                (loss * float("inf") if step == case.overflow_at and rank == 1 else loss).backward()
                for name, p in model.named_parameters():
                    g = p.grad.float().numpy().astype(np.float64) / scale
                    total[name] += masked(g, name, case, held[rank]) / WORLD
        if all(np.isfinite(g).all() for g in total.values()):
            for name, p in master.named_parameters():
                p.grad = torch.from_numpy(total[name] * (scale / scale_after)).float()
            optimizer.step()
    return {name: p.detach().double().numpy() for name, p in master.named_parameters()}, held


def masked(g: np.ndarray, name: str, case: Case, held: dict[str, np.ndarray]) -> np.ndarray:
    if g.ndim < 2 or case.strength is None:
        return g
    if not case.feedback:
        return oracle.apply(g, case.strength, gate=case.gate, block=4)
    before = held.get(name, np.zeros_like(g))
    sent, held[name] = oracle.error_feedback(g, before, case.strength, gate=case.gate, block=4)
    return sent


def distance(found: dict[str, Any], wanted: dict[str, np.ndarray], case: Case) -> float:
    """|found - wanted| over all parameters, relative to how far training moved them."""
    began = dict(make().to(DTYPES[case.dtype]).named_parameters())
    off = [found[name].double().numpy() - w for name, w in wanted.items()]
    moved = [began[name].detach().double().numpy() - w for name, w in wanted.items()]
    return float(np.sqrt(sum((d**2).sum() for d in off) / sum((d**2).sum() for d in moved)))


def check(case: Case, results: list[dict[str, Any]], tolerance: float) -> None:
    weights, held = expected(case, results[0]["scales"])
    for rank, result in enumerate(results):
        assert distance(result["weights"], weights, case) < tolerance, case
        assert result["held"].keys() == held[rank].keys()
        for name, residual in result["held"].items():
            assert np.linalg.norm(residual.numpy() - held[rank][name]) <= 5 * tolerance * np.linalg.norm(
                held[rank][name]
            ), (case, name)
    unmasked, _ = expected(Case(**vars(case) | {"strength": None}), results[0]["scales"])
    assert distance(results[0]["weights"], unmasked, case) > 3 * tolerance, (
        "the tolerance would let an unmasked run pass"
    )


def compare(cases: list[Case], tolerance: float, folder: Path) -> list[list[dict[str, Any]]]:
    """Train the cases in one pair of processes and check each; return their results by case and rank."""
    by_rank = run_ranks(trained, WORLD, folder, cases, timeout_s=120)
    results = [list(ranks) for ranks in zip(*by_rank, strict=True)]
    for case, result in zip(cases, results, strict=True):
        check(case, result, tolerance)
    return results


# -- against the oracle -------------------------------------------------------------------------------------------
def test_fp32_weights_are_the_oracles_in_every_stage(tmp_path: Path) -> None:
    cases = [
        case
        for stage in range(4)
        for case in (
            Case(stage, feedback=False, zero={"overlap_comm": False}),
            Case(stage, optimizer="adamw", zero={"overlap_comm": True}),
            Case(stage, micros=1, zero={"overlap_comm": True}, before=True),
        )
    ]
    cases += [
        Case(1, zero={"contiguous_gradients": False, "reduce_bucket_size": 50}),
        Case(2, zero={"reduce_scatter": False, "reduce_bucket_size": 50}),
        Case(3, zero={"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 300}),
        Case(2, optimizer="adamw", zero={"offload_optimizer": {"device": "cpu"}}),
        Case(3, zero={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
        Case(3, zero={"zero_hpz_partition_size": 2}),
        Case(2, model={"reentrant": True}),
        Case(3, model={"reentrant": False, "uses": 2}),
    ]
    results = compare(cases, 1e-5, tmp_path)
    masked_weights = {"conv.weight", "pointwise.weight", "hidden.weight", "head.weight"}
    for ranks in results:
        assert {name for name, *_ in ranks[0]["touched"]} == masked_weights
        assert {name: shape for name, shape, *_ in ranks[0]["touched"]}["conv.weight"] == (8, 3, 3, 3)
        assert ranks[0]["report"] > 0


def test_bf16_weights_are_the_oracles_in_every_stage(tmp_path: Path) -> None:
    # the gate is soft, because rounding to eight bits moves units over the threshold of a hard one
    cases = [
        Case(stage, "bf16", feedback, gate="soft", zero={"overlap_comm": stage > 1})
        for stage in range(4)
        for feedback in (False, True)
    ]
    cases.append(Case(1, "bf16", gate="soft", config={"data_types": {"grad_accum_dtype": "fp32"}}))
    compare(cases, 0.008, tmp_path)


def test_fp16_weights_are_the_oracles_while_the_loss_scale_changes(tmp_path: Path) -> None:
    dynamic = {"fp16": {"enabled": True, "initial_scale_power": 9, "loss_scale_window": 1, "hysteresis": 1}}
    static = {"fp16": {"enabled": True, "loss_scale": 64}}
    cases = [Case(s, "fp16", config=dynamic, overflow_at=1, zero={"overlap_comm": s > 1}) for s in (1, 2, 3)]
    cases += [Case(s, "fp16", s > 1, config=static) for s in (1, 2, 3)]
    results = compare(cases, 0.005, tmp_path)
    for case, ranks in zip(cases, results, strict=True):
        assert ranks[0]["scales"] == ranks[1]["scales"]
        if case.overflow_at is not None:
            assert ranks[0]["scales"] == [512, 512, 256, 256, 512, 1024]
        else:
            assert ranks[0]["scales"] == [64] * (STEPS + 1)


# -- laws ---------------------------------------------------------------------------------------------------------
def laws(rank: int) -> dict[str, Any]:
    deepspeed = start(rank)
    found: dict[str, Any] = {"identity": [], "conserved": [], "detached": []}
    for stage in range(4):
        plain = train(rank, deepspeed, Case(stage, strength=None))
        zero = train(rank, deepspeed, Case(stage, strength=0.0))
        found["identity"].append(different(plain["weights"], zero["weights"]))
        found["conserved"].append(conserved(rank, deepspeed, stage))
    return found


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


def conserved(rank: int, deepspeed: Any, stage: int) -> list[bool]:
    """Whether sent + held is gradient + earlier residual to the last bit, for each weight and micro-batch."""
    case = Case(stage)
    engine = engine_of(deepspeed, case, make())
    weights = {name: p for name, p in engine.module.named_parameters() if name.endswith("conv.weight")}
    raw: dict[str, Tensor] = {}
    answers: list[bool] = []
    earlier: dict[str, Tensor] = {}
    for name, p in weights.items():
        p.register_hook(lambda g, name=name: raw.update({name: g.clone()}))
    attachment = gmscale.attach(engine, case.mask, site="deepspeed")

    def compare_sums(name: str, sent: Tensor) -> None:
        held = attachment.state_dict()["residuals"][name]
        before = earlier.get(name, torch.zeros_like(held))
        answers.append(torch.equal(sent + held, raw[name] + before) and bool(held.any()))
        earlier[name] = held.clone()

    for name, p in weights.items():
        p.register_hook(lambda g, name=name: compare_sums(name, g))
    for micro in range(4):
        engine.backward(loss_of(engine, torch.float32, rank, 0, micro))
        engine.step()
    engine.destroy()
    return answers


def test_strength_zero_is_the_plain_run_and_nothing_is_lost(tmp_path: Path) -> None:
    for result in run_ranks(laws, WORLD, tmp_path, timeout_s=120):
        assert result["identity"] == [[]] * 4
        assert result["conserved"] == [[True] * 4] * 4


# -- loss scale ---------------------------------------------------------------------------------------------------
def residual_at_the_limit(rank: int) -> tuple[list[float], bool]:
    """Hold back what the next loss scale cannot represent."""
    deepspeed = start(rank)
    config = {"fp16": {"enabled": True, "loss_scale": 1.0}}
    engine = engine_of(deepspeed, Case(1, "fp16", config=config, micros=1), make())
    attachment = gmscale.attach(engine, GradientMask(block=4), site="deepspeed")
    attachment.load_state_dict({"grad_scale": 0.25, "residuals": {"head.weight": torch.full((5, 20), 3e4).half()}})
    seen = []
    for step in range(2):
        attachment.at(step, grad_scale=None)
        engine.backward(loss_of(engine, torch.float16, rank, step, 0))
        residual = attachment.state_dict()["residuals"]["head.weight"]
        seen.append(float(residual.abs().max()))
        engine.step()
    return seen, bool(torch.isfinite(engine.module.head.weight).all())


def test_a_growing_loss_scale_never_makes_the_residual_infinite(tmp_path: Path) -> None:
    for seen, weights_finite in run_ranks(residual_at_the_limit, WORLD, tmp_path):
        assert all(value <= torch.finfo(torch.float16).max for value in seen)
        assert weights_finite


# -- what is refused ----------------------------------------------------------------------------------------------
def refusals(rank: int) -> dict[str, str]:
    deepspeed = start(rank)
    fp16 = {"fp16": {"enabled": True, "loss_scale": 64}}

    def attach(case: Case) -> None:
        gmscale.attach(engine_of(deepspeed, case, make(**case.model)), GradientMask(), site="deepspeed")

    def nothing() -> None:
        engine = engine_of(deepspeed, Case(3), make())
        gmscale.attach(engine, GradientMask(include=("module.conv*",)), site="deepspeed")

    attempts = {
        "ddp": lambda: gmscale.attach(DDP(make()), GradientMask(), site="deepspeed"),
        "stage 0 fp16": lambda: attach(Case(0, "fp16", config=fp16)),
        "stage 0 fp16, found late": lambda: train(rank, deepspeed, Case(0, "fp16", config=fp16, before=True)),
        "nothing": nothing,
        "consensus": lambda: gmscale.attach(make(), GradientMask(agreement="consensus"), site="deepspeed"),
        "single": lambda: gmscale.attach(engine_of(deepspeed, Case(1), make()), GradientMask(), site="ddp"),
    }
    for stage in (1, 2, 3):
        case = Case(stage, model={"uses": 2, "reentrant": True})
        attempts[f"parts {stage}"] = lambda case=case: train(rank, deepspeed, case)
    messages = {}
    for name, attempt in attempts.items():
        with pytest.raises(UsageError) as caught:
            attempt()
        messages[name] = str(caught.value)
    return messages


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    messages = run_ranks(refusals, WORLD, tmp_path)[0]
    assert "site is 'ddp'" in messages["ddp"]
    assert "use stage 1, or bf16" in messages["stage 0 fp16"]
    assert messages["stage 0 fp16, found late"] == messages["stage 0 fp16"]
    assert "matches no parameter" in messages["nothing"]
    assert "conv.weight" in messages["nothing"]
    assert "needs site 'ddp'" in messages["consensus"]
    assert "DistributedDataParallel" in messages["single"]
    for stage in (1, 2, 3):
        assert "use_reentrant=False" in messages[f"parts {stage}"]
    assert not any("\n" in message for message in messages.values())


def test_a_missing_deepspeed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UsageError, match=r"pip install \"gmscale\[deepspeed\]\""):
        gmscale.attach(make(), GradientMask(), site="deepspeed")


def test_a_model_that_no_engine_was_made_of_is_masked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    plain, model = make(), make()
    attachment = gmscale.attach(model, GradientMask(strength=1.0, error_feedback=False, block=4), site="deepspeed")
    for m in (plain, model):
        loss_of(m, torch.float32, 0, 0, 0).backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        wanted = oracle.apply(p.grad.numpy(), 1.0, block=4)
        np.testing.assert_allclose(q.grad.numpy(), wanted, rtol=1e-6, err_msg=name)
    assert attachment.describe()["timing"] == "each micro-batch"
    with attachment.no_sync():
        attachment.detach()
    loss_of(model, torch.float32, 0, 0, 0).backward()  # the same pass count no longer matters
