"""FSDP2: weights, gradients and optimizer state split over the ranks by torch's `fully_shard`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from gmscale.config import ParallelConfig, TrainConfig
from gmscale.errors import RunError, UsageError
from gmscale.parallel.compiled import compile_, uncompiled
from gmscale.parallel.failure import together
from gmscale.parallel.gradients import clip
from gmscale.parallel.world import World
from gmscale.parallel.wrapped import AMP_TYPES, MakeOptimizer, Stepped, WeightShard, Wrapped, check_division

_BatchNorm = nn.modules.batchnorm._BatchNorm


class FSDP2Wrapped(Wrapped):
    """A model under `fully_shard`: each of its blocks (`blocks`), and the root with what is left.

    Every rank starts from rank 0's weights, which it holds whole until they are split. With optim.amp bf16 weights
    are gathered in bfloat16, computed with by autocast's rules (buffers such as attention masks stay float32), and
    their gradients summed in float32; batch normalisation keeps float32 weights. Evaluation does as training does.

    Raises UsageError for optim.amp fp16 (each rank would see overflow only in its own shard, and skip steps alone)
    and for optim.clip_mode agc (timm's takes norms that DTensor does not).
    """

    lockstep = True

    def __init__(self, bare: nn.Module, make_optimizer: MakeOptimizer, config: TrainConfig, world: World) -> None:
        with together(world):
            if config.optim.amp == "fp16":
                raise UsageError(
                    "optim.amp fp16 with parallel.backend fsdp2 would scale the loss by what each rank sees in its "
                    "own shard; use bf16, or parallel.backend ddp"
                )
            if config.optim.clip_grad > 0 and config.optim.clip_mode == "agc":
                raise UsageError(
                    "optim.clip_mode agc needs norms of whole weights, which parallel.backend fsdp2 shards; "
                    "use norm or value, or parallel.backend ddp"
                )
            # fully_shard takes contiguous weights only; channels_last images keep the activations channels_last
            bare = bare.to(world.device).to(memory_format=torch.contiguous_format)
        for tensor in (*bare.parameters(), *bare.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        mesh = init_device_mesh(world.device.type, (world.size,))
        with together(world):
            compile_(blocks(bare) or [bare], config.model, world.device)
            _shard(bare, mesh, config.parallel, AMP_TYPES[config.optim.amp])
            self.optimizer = make_optimizer(bare)
        self.bare = self.model = bare
        self.autocast = AMP_TYPES[config.optim.amp]
        plain = uncompiled(bare, config.model)
        self.eval_model = _Autocast(plain, world.device, self.autocast) if self.autocast else plain
        self._optim = config.optim
        self._mesh = mesh
        self.world = world

    def loss_scale(self) -> float:
        return 1.0

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        assert isinstance(self.bare, FSDPModule)
        self.bare.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.bare.set_requires_gradient_sync(True)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> Stepped:
        norm, finite = clip(self.bare.parameters(), self._optim)
        if finite:
            self.optimizer.step()
        self._share_buffers()
        return Stepped(norm, not finite)

    def weights(self) -> Mapping[str, Tensor]:
        weights = {}
        for name, tensor in self.bare.state_dict().items():  # one after another: the ranks never hold all of them
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.world.is_main:
                weights[name] = whole.detach().cpu()
        return weights

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        set_model_state_dict(self.bare, dict(weights), options=StateDictOptions(full_state_dict=True))

    def weight_shards(self) -> Mapping[str, WeightShard]:
        shards = {}
        for name, tensor in self.bare.state_dict().items():
            if isinstance(tensor, DTensor):
                offset = _first_row(tensor, self.world) * (tensor.numel() // max(1, tensor.shape[0]))
                shards[name] = WeightShard(tuple(tensor.shape), offset, tensor.to_local().detach().flatten())
            elif self.world.is_main:
                shards[name] = WeightShard(tuple(tensor.shape), 0, tensor.detach().flatten())
        return shards

    @torch.no_grad()
    def load_weight_shards(self, shards: Mapping[str, WeightShard]) -> None:
        with together(self.world):
            own = self.weight_shards()  # views of the weights
            check_division(own, shards)
            for name, shard in shards.items():
                own[name].entries.copy_(shard.entries)
        self._share_buffers()

    def optimizer_state(self) -> Mapping[str, Any]:
        return {"param_groups": self.optimizer.state_dict()["param_groups"]}

    def rank_state(self) -> Mapping[str, Any]:
        states = self.optimizer.state_dict()["state"]
        return {"optimizer": {i: {k: _to_local(v) for k, v in state.items()} for i, state in states.items()}}

    def load_optimizer_state(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        states = {
            i: {k: _from_local(v, self._mesh) for k, v in state.items()} for i, state in own["optimizer"].items()
        }
        self.optimizer.load_state_dict({"state": states, "param_groups": shared["param_groups"]})

    def _share_buffers(self) -> None:
        """Give all ranks rank 0's buffers (batch-norm statistics), as DDP does before the next forward pass."""
        by_dtype: Callable[[Tensor], str] = lambda buffer: str(buffer.dtype)  # noqa: E731
        for _, group in groupby(sorted(self.bare.buffers(), key=by_dtype), key=by_dtype):
            buffers = list(group)
            flat = torch.cat([buffer.flatten() for buffer in buffers])
            dist.broadcast(flat, src=0)
            for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(part.view_as(buffer))


class _Autocast(nn.Module):
    """A model under autocast: without it, bfloat16 weights do not go together with float32 buffers."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.device_type, self.dtype = model, device.type, dtype

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device_type, self.dtype):
            logits: Tensor = self.model(images)
        return logits


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a timm model, innermost first.

    A block is a member of an nn.Sequential or nn.ModuleList that is made of several layers with parameters and
    contains no smaller block: the Block of a vision transformer, the Bottleneck of a ResNet, the MBConv of an
    EfficientNet, the ConvNeXtBlock inside its stage. Where there are none, as in a RegNet, the stages of timm's
    feature_info take their place; a model without these either, such as a VGG, is sharded as a whole.
    """
    found: list[nn.Module] = []

    def visit(module: nn.Module, is_member: bool) -> bool:
        """Collect the blocks in a module; return whether there are any."""
        members = isinstance(module, nn.Sequential | nn.ModuleList)
        inside = [visit(child, members) for child in module.children()]
        if is_member and _has_layers(module) and not any(inside):
            found.append(module)
            return True
        return any(inside)

    visit(model, False)
    stages = [model.get_submodule(info["module"]) for info in getattr(model, "feature_info", ())]
    return found or [stage for stage in stages if _has_layers(stage)]


def _has_layers(module: nn.Module) -> bool:
    """Whether a module is made of several layers with parameters."""
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules()) > 1


def _shard(model: nn.Module, mesh: DeviceMesh, config: ParallelConfig, dtype: torch.dtype | None) -> None:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    for block in blocks(model):
        if dtype is not None:
            _shard_norms(block, mesh, config.reshard_after_forward)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    if dtype is not None:
        _shard_norms(model, mesh, config.reshard_after_forward)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # the root stays gathered: its backward pass comes at once


def _shard_norms(module: nn.Module, mesh: DeviceMesh, reshard_after_forward: bool) -> None:
    """Gather batch-norm weights as float32, in one group: their running statistics are float32 too."""
    found = (m for m in module.modules() if isinstance(m, _BatchNorm) and not isinstance(m, FSDPModule))
    norms: list[nn.Module] = [norm for norm in found if norm.affine]
    if norms:
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        fully_shard(norms, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)


def _first_row(weight: DTensor, world: World) -> int:
    """Return the first row of a weight that this rank holds: `fully_shard` divides rows as torch.chunk does."""
    rows, most = weight.shape[0], -(-weight.shape[0] // world.size)
    first = min(world.rank * most, rows)
    assert weight.placements == (Shard(0),), weight.placements
    assert len(weight.to_local()) == min(most, rows - first)
    return first


def _to_local(value: Any) -> Any:
    """Return a rank's part of an optimizer state, with what `_from_local` needs to put it back."""
    if not isinstance(value, DTensor):
        return value
    if not all(isinstance(placement, Shard | Replicate) for placement in value.placements):
        raise RunError(f"the optimizer keeps state placed as {value.placements}, which a checkpoint cannot hold")
    return {
        "local": value.to_local(),
        "shape": list(value.shape),
        "stride": list(value.stride()),
        "sharded": [p.dim if isinstance(p, Shard) else None for p in value.placements],
    }


def _from_local(value: Any, mesh: DeviceMesh) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()  # Adam's step counter; load_state_dict puts what belongs elsewhere there
    if not isinstance(value, Mapping):
        return value
    placements: list[Placement] = [Replicate() if dim is None else Shard(dim) for dim in value["sharded"]]
    shape, stride = torch.Size(value["shape"]), tuple(value["stride"])
    return DTensor.from_local(value["local"], mesh, placements, run_check=False, shape=shape, stride=stride)
