"""Site output on two real processes: under DDP, beside the ddp site, with checkpointing and torch.compile."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import gmscale
from gmscale import GradientMask

sys.path.insert(0, str(Path(__file__).parent.parent))
import oracle
from ranks import run_ranks

WORLD = 2
OUTPUT = {"operator": "log", "strength": 1.0, "error_feedback": False}
WEIGHTS = {"strength": 0.7, "error_feedback": False}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)
        self.checkpoints = False

    def body(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.body, x, use_reentrant=False) if self.checkpoints else self.body(x)
        weighting = torch.linspace(-1, 1, 64).view(8, 8).sin().to(x)  # or the gradient would be flat
        return self.head((x * weighting).mean((2, 3)))


def make() -> Net:
    torch.manual_seed(0)
    return Net().double()


def backward(model: nn.Module, rank: int, step: int) -> None:
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(10 * rank + step)).double()
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2])).backward()


def reference(rank: int, step: int, weights: bool) -> dict[str, Tensor]:
    """The mean over ranks of gradients masked by the oracle, without DDP."""
    model = make()

    def masked(g: Tensor) -> Tensor:
        return torch.from_numpy(oracle.apply_output(g.numpy(), 1.0, "NCHW", operator="log"))

    model.relu.register_forward_hook(lambda m, a, out: out.register_hook(masked) and None)
    backward(model, rank, step)
    found = {}
    for name, p in model.named_parameters():
        g = p.grad.numpy()
        g = oracle.apply(g, 0.7) if weights and g.ndim > 1 else g
        found[name] = torch.from_numpy(np.array(g))
        dist.all_reduce(found[name])
        found[name] /= WORLD
    return found


def largest_difference(rank: int, how: str) -> tuple[float, list[str], float]:
    model = make()
    model.checkpoints = how == "checkpointing"
    mask = GradientMask(**OUTPUT)
    if how == "output first":
        attachment = gmscale.attach(model, mask, site="output")
    ddp = DDP(model)
    if how != "output first":
        attachment = gmscale.attach(ddp, mask, site="output")
    both = how == "with site ddp"
    if both:
        gmscale.attach(ddp, GradientMask(**WEIGHTS), site="ddp")
    trained = torch.compile(ddp, backend="aot_eager") if how == "compiled" else ddp
    worst = 0.0
    for step in range(3):
        ddp.zero_grad()
        if step == 1:  # accumulation is DDP's affair: every backward pass is masked
            with attachment.no_sync(), ddp.no_sync():
                backward(trained, rank, step)
            ddp.zero_grad()
        backward(trained, rank, step)
        for name, expected in reference(rank, step, both).items():
            found = model.get_parameter(name).grad
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst, [t.name for t in attachment.touched], attachment.report().kept_entries


@pytest.mark.parametrize("how", ["output first", "ddp first", "with site ddp", "checkpointing", "compiled"])
def test_gradients_are_the_mean_of_what_the_oracle_masks(tmp_path, how):
    for worst, touched, kept in run_ranks(largest_difference, WORLD, tmp_path, how):
        assert worst < 1e-9
        assert touched == ["relu"]
        assert 0 < kept < 1


def drawn(rank: int) -> Tensor:
    """Both ranks see the same data; what differs is the draw."""
    model = make()
    attachment = gmscale.attach(model, GradientMask(**OUTPUT | {"operator": "random"}), site="output")
    attachment.at(0)
    backward(model, 0, 0)
    return model.conv.weight.grad


def test_random_masks_differ_between_ranks(tmp_path):
    first, second = run_ranks(drawn, WORLD, tmp_path)
    assert not torch.equal(first, second)
