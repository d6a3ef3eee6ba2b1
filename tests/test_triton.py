"""The fused kernels against the eager path and the oracle: in Triton's interpreter on CPU, and on a GPU if there.

Triton decides when it is imported whether it interprets, so the interpreted tests run in a process of their own.
"""

import math
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from gmscale.masking import GradientMask
from gmscale.masking.plan import MaskPlan

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no CUDA device"),
]

SHAPES = [(11, 13, 3, 3), (5, 3, 4, 4), (24, 1, 3, 3), (10, 37, 1, 1), (9, 50), (7, 5), (1, 1, 3, 3), (33,)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
STRENGTHS = [0.3, 0.5, 0.75, 1.0]


@pytest.mark.skipif(INTERPRETED, reason="this is the process it starts")
def test_in_the_interpreter() -> None:
    quiet = ["-x", "-p", "no:cacheprovider", "-m", "not gpu", "-W", "ignore::RuntimeWarning"]
    command = [sys.executable, "-m", "pytest", __file__, *quiet]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d\d passed", done.stdout), done.stdout


def gradients(dtype: torch.dtype, seed: int = 0, channels_last: bool = True, device: str = "cpu") -> list[Tensor]:
    """Whole numbers, of which sums and halves are exact in every dtype: the interpreter truncates to bfloat16."""
    made = []
    for shape in SHAPES:
        rng = np.random.default_rng([seed, *shape])
        size = rng.choice([1, 3, 12], (*shape[:2], *(1,) * (len(shape) - 2)))
        g = torch.from_numpy(rng.integers(-8, 9, shape) * size).to(device, dtype)
        made.append(g.to(memory_format=torch.channels_last) if channels_last and g.ndim == 4 else g)
    return made


def mask_of(**settings: Any) -> GradientMask:
    return GradientMask(**{"error_feedback": False, "mask_1d": True, **settings})


def fused(mask: GradientMask, g: list[Tensor]) -> Any:
    from gmscale.masking.triton_kernels import FusedMask

    assert FusedMask.supports(mask, g)
    return FusedMask(mask, g)


def eager(mask: GradientMask, g: list[Tensor], strength: float, residuals: list[Tensor | None]) -> None:
    for x, r in zip(g, residuals, strict=True):
        mask.apply_(x, strength=strength, residual=r)


def none_of(g: list[Tensor]) -> list[Tensor | None]:
    return [None] * len(g)


def agree(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    rtol = torch.finfo(dtype).eps * (32 if dtype in (torch.float32, torch.float64) else 2)
    for a, b in zip(ours, theirs, strict=True):
        largest = float(b.double().nan_to_num(0, 0, 0).abs().max())
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * largest, equal_nan=True)


# -- interpreted --------------------------------------------------------------------------------------------------
@interpreted
@pytest.mark.parametrize(
    "settings",
    [{}, {"kappa": 0.6, "norm": "l1", "block": 5}, {"gate": "soft"}, {"norm": "max", "block": 1}],
    ids=str,
)
@pytest.mark.parametrize("feedback", [False, True], ids=["plain", "feedback"])
def test_pool_is_that_of_the_eager_path(
    settings: dict[str, Any], feedback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gmscale.masking import triton_kernels

    monkeypatch.setattr(triton_kernels, "TILES", 2)  # so that small maps need several rounds
    for dtype, strength in zip(DTYPES, STRENGTHS, strict=True):
        if settings and dtype in (
            torch.float32,
            torch.bfloat16,
        ):  # the interpreter is slow, and rounds soft bfloat16
            continue
        mask = mask_of(**settings)
        ours, theirs = gradients(dtype), gradients(dtype)
        held: list[Any] = gradients(dtype, seed=1) if feedback else none_of(ours)
        expected: list[Any] = gradients(dtype, seed=1) if feedback else none_of(ours)
        sums = [g + r for g, r in zip(ours, held, strict=True)] if feedback else []
        flat_s, flat_m = fused(mask, ours).mask_(ours, held, strength)
        plan = MaskPlan(mask, theirs)
        if not feedback:
            flat = plan.lateral_maps(theirs)
            torch.testing.assert_close(flat_s, flat, rtol=1e-6, atol=0)
            torch.testing.assert_close(flat_m, plan.keep_maps(flat), rtol=1e-5, atol=1e-7)
        eager(mask, theirs, strength, expected)
        agree(ours, theirs, dtype)
        if feedback:
            agree(held, expected, dtype)
            for g, r, total in zip(ours, held, sums, strict=True):
                assert torch.equal(g.double() + r.double(), total.double()), "nothing is lost"


@interpreted
@pytest.mark.parametrize("feedback", [False, True], ids=["plain", "feedback"])
@pytest.mark.parametrize(
    "settings", [{"operator": "log", "sigma": 0.6}, {"operator": "dog", "sigma": 0.4}], ids=str
)
def test_stencils_are_those_of_the_oracle(settings: dict[str, Any], feedback: bool) -> None:
    mask = mask_of(**settings)
    ours, before = gradients(torch.float64)[1:6], gradients(torch.float64)[1:6]
    held: list[Any] = gradients(torch.float64, seed=1)[1:6] if feedback else none_of(ours)
    earlier: list[Any] = gradients(torch.float64, seed=1)[1:6] if feedback else [torch.zeros_like(g) for g in ours]
    fused(mask, ours).mask_(ours, held, 0.6)
    for g, r, x, y in zip(ours, held, before, earlier, strict=True):
        sent, kept = oracle.error_feedback(x.numpy(), y.numpy(), 0.6, mask_1d=True, **settings)
        np.testing.assert_allclose(g.numpy(), sent, rtol=1e-10, atol=1e-10)
        if r is not None:
            np.testing.assert_allclose(r.numpy(), kept, rtol=1e-10, atol=1e-10)


@interpreted
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("norm", ["l2", "max"])
def test_non_finite_gradients_stay_visible_and_out_of_the_residual(value: float, norm: str) -> None:
    mask = mask_of(norm=norm)
    ours, theirs = gradients(torch.float32), gradients(torch.float32)
    for g in (ours, theirs):
        g[0][3, 4, 1, 1] = value
        g[4][8, 49] = value
    held: list[Any] = gradients(torch.float32, seed=1)
    expected: list[Any] = gradients(torch.float32, seed=1)
    fused(mask, ours).mask_(ours, held, 0.5)
    eager(mask, theirs, 0.5, expected)
    agree(ours, theirs, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))
    assert not torch.isfinite(ours[0][3, 4, 1, 1])
    assert torch.equal(held[0], gradients(torch.float32, seed=1)[0])


@interpreted
def test_flat_and_zero_gradients_and_contiguous_memory() -> None:
    mask = mask_of(block=1, gate="soft")
    ours = [torch.ones(3, 4, 3, 3), torch.zeros(5, 6), torch.ones(4, 6), torch.full((7,), 2.0)]
    before = [g.clone() for g in ours]
    fused(mask, ours).mask_(ours, none_of(ours), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))
    ours, theirs = (gradients(torch.float32, channels_last=False) for _ in range(2))
    fused(mask_of(), ours).mask_(ours, none_of(ours), 0.5)
    eager(mask_of(), theirs, 0.5, none_of(theirs))
    agree(ours, theirs, torch.float32)


@interpreted
def test_a_second_step_reuses_the_tables_and_follows_new_memory() -> None:
    mask = mask_of()
    ours = gradients(torch.float32)
    kernels = fused(mask, ours)
    kernels.mask_(ours, none_of(ours), 0.5)
    pointers = kernels._pointers
    fresh = gradients(torch.float32)
    kernels.mask_(fresh, none_of(fresh), 0.5)
    assert kernels._pointers is not pointers
    assert all(torch.equal(a, b) for a, b in zip(ours, fresh, strict=True))
    pointers = kernels._pointers
    kernels.mask_(fresh, none_of(fresh), 0.5)
    assert kernels._pointers is pointers


@interpreted
def test_the_plan_uses_the_kernels_and_reports_what_was_kept() -> None:
    mask = mask_of(mask_1d=False)
    ours, theirs = gradients(torch.float32), gradients(torch.float32)
    plan = MaskPlan(mask, ours)
    plan._fused = fused(mask, [g for g in ours if g.ndim > 1])
    kept = plan.mask_(ours, strength=0.5, observe=True)
    expected = MaskPlan(mask, theirs).mask_(theirs, strength=0.5, observe=True)
    agree(ours, theirs, torch.float32)
    for a, b in zip(kept, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(torch.stack(a), torch.stack(b))


# -- what needs no interpreter ------------------------------------------------------------------------------------
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize("dtype", ["bf16", "fp64"])
def test_kernels_compile_for_a_gpu(dtype: str) -> None:
    compiler = pytest.importorskip("triton.compiler")
    backends = pytest.importorskip("triton.backends.compiler")
    from gmscale.masking import triton_kernels as kernels

    map_dtype = "fp64" if dtype == "fp64" else "fp32"
    types = {v: k for k, v in {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}.items()}
    of = {types[d]: t for d, t in kernels._DTYPES.items() if d in types}
    signature = {"pointers": "*i64", "layout": "*i64", "tiles": "*i64", "spans": "*i64", "numbers": "*fp64"}
    constants = {
        "DTYPE": of[dtype], "MAP_DTYPE": of[map_dtype], "FIELDS": kernels._FIELDS, "UNITS": kernels.UNITS,
        "TAPS": kernels._TAPS, "BLOCK": kernels.TILES, "FEEDBACK": True, "NORM": "l2", "OPERATOR": "stencil",
        "SIZE": 7, "HELD_FIRST": False, "SENT_FIRST": False,
    }  # fmt: skip
    for kernel in (kernels._maps, kernels._statistics, kernels._apply):
        names = kernel.arg_names
        source = compiler.ASTSource(
            fn=kernel,
            signature={n: "constexpr" if n in constants else signature.get(n, f"*{map_dtype}") for n in names},
            constexprs={(i,): constants[n] for i, n in enumerate(names) if n in constants},
        )
        target = backends.GPUTarget("cuda", 90, 32)
        compiled = compiler.compile(source, target=target, options={"enable_fp_fusion": False})
        if kernel is kernels._apply:
            assert "fma" not in compiled.asm["ptx"], "a fused multiply-add would break conservation"


def test_what_the_kernels_do_not_know_takes_the_eager_path() -> None:
    from gmscale.masking.triton_kernels import FusedMask

    g = [torch.ones(4, 4), torch.ones(3, 3)]
    for settings in (
        {"operator": "licnn"},
        {"operator": "random"},
        {"rescale": True},
        {"operator": "log", "sigma": 9.0},
    ):
        assert not FusedMask.supports(mask_of(**settings), g)
    assert FusedMask.supports(mask_of(), g)
    assert not FusedMask.supports(mask_of(), [g[0], g[1].half()])
    assert not FusedMask.supports(mask_of(), [g[0], torch.ones(4, 4, 3, 4)[..., :3]])
    assert MaskPlan(mask_of(), g)._fused is None, "tensors on CPU never go to a GPU's kernels"


# -- on a GPU -----------------------------------------------------------------------------------------------------
class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("feedback", [False, True], ids=["plain", "feedback"])
    @pytest.mark.parametrize("settings", [{}, {"gate": "soft"}, {"operator": "log"}, {"operator": "dog"}], ids=str)
    def test_as_on_cpu(self, settings: dict[str, Any], feedback: bool, dtype: torch.dtype) -> None:
        for strength in STRENGTHS:
            mask = mask_of(**settings)
            ours, theirs = gradients(dtype, device="cuda"), gradients(dtype)
            held: list[Any] = gradients(dtype, 1, device="cuda") if feedback else none_of(ours)
            expected: list[Any] = gradients(dtype, 1) if feedback else none_of(theirs)
            plan = MaskPlan(mask, ours)
            assert plan._fused is not None
            plan.mask_(ours, strength=strength, residuals=held)
            eager(mask, theirs, strength, expected)
            agree([g.cpu() for g in ours], theirs, dtype)
            if feedback:
                agree([r.cpu() for r in held], expected, dtype)

    def test_three_launches_a_bucket_and_no_synchronisation(self) -> None:
        ours = gradients(torch.float32, device="cuda")
        held: list[Any] = [torch.zeros_like(g) for g in ours]
        plan = MaskPlan(mask_of(), ours)
        plan.mask_(ours, strength=0.5, residuals=held)  # compiles, sends the tables
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            torch.cuda.set_sync_debug_mode("error")
            try:
                plan.mask_(ours, strength=0.5, residuals=held)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        launches = [e for e in profile.events() if "LaunchKernel" in e.name]
        assert len(launches) == 3

    def test_conservation_at_random(self) -> None:
        torch.manual_seed(0)
        for dtype in DTYPES:
            for strength in STRENGTHS:
                ours = [torch.randn(shape, device="cuda").to(dtype) for shape in SHAPES]
                held: list[Any] = [torch.randn(shape, device="cuda").to(dtype) for shape in SHAPES]
                total = [g + r for g, r in zip(ours, held, strict=True)]
                MaskPlan(mask_of(), ours).mask_(ours, strength=strength, residuals=held)
                for g, r, t in zip(ours, held, total, strict=True):
                    assert torch.equal(g.double() + r.double(), t.double())
