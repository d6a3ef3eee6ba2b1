"""Site `output`, the paper's: gradients of layer outputs are masked during backpropagation.

A forward hook on each chosen module arranges that the gradient of its output passes through the mask before it
reaches the module. In eager mode this is a tensor hook, which works with modules that change the output in place;
torch.compile cannot trace one, so there the output passes through an identity whose backward asks an opaque
operator for the mask's factor. The operator looks strength and schedule up when it runs: nothing recompiles.

In eval mode nothing is masked, so that attacks and saliency maps see the true gradient.
"""

import itertools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gmscale.errors import UsageError
from gmscale.masking import GradientMask
from gmscale.masking.outputs import output_factor
from gmscale.sites.attachment import Attachment, _Mean
from gmscale.sites.layers import SMALLEST_MAP, Choice, Geometry, Layer, choose
from gmscale.sites.selection import Touched

OUTPUT_DEFAULT = GradientMask(operator="log", sigma=1.0, strength=0.25, start=0.1, end=0.65, error_feedback=False)
"""The gentle default of this site (METHOD.md)."""

_attachments: "weakref.WeakValueDictionary[int, OutputAttachment]" = weakref.WeakValueDictionary()
_keys = itertools.count()


class OutputAttachment(Attachment):
    """A mask of the gradients of layer outputs; masks in each backward pass, every sample by its own map.

    `touched` holds the chosen modules in the model's order; their shapes (of one sample) and maps are known from
    the first forward pass in training mode on. `mask.error_feedback` has no meaning here (the next step's outputs
    are of other images) and is ignored; so are the settings of weights (`block`, `mask_1d`).
    """

    site = "output"
    timing = "each backward"

    def __init__(self, model: nn.Module, mask: GradientMask, choice: Choice, rank: int) -> None:
        super().__init__(mask, None, rank)
        self._layers = choice.layers
        self._excluded = choice.passed
        self.touched = tuple(Touched(layer.name, (), (0, 0), "position") for layer in choice.layers)
        self.passed = choice.passed
        self._seen: dict[int, bool] = {}  # layer -> whether a gradient can be masked there, so far
        self._returned: tuple[weakref.ref[Tensor], int, str] | None = None
        self._calls: Counter[str] = Counter()
        self._key = next(_keys)
        _attachments[self._key] = self
        self._handles = [
            layer.module.register_forward_hook(_hook(self, self._key, i, layer, model))
            for i, layer in enumerate(choice.layers)
        ]
        self._handles.append(model.register_forward_hook(_hook_of_model(self, self._key)))
        if choice.token_grid is not None and choice.token_grid.varies:
            self._handles.append(choice.token_grid.patch_embed.register_forward_hook(choice.token_grid.see))

    def at(
        self, step: int, total_steps: int | None = None, *, grad_scale: float = 1.0, observe: bool = True
    ) -> None:
        super().at(step, total_steps, grad_scale=grad_scale, observe=observe)
        self._calls.clear()

    def no_sync(self) -> AbstractContextManager[None]:
        """A context that changes nothing: every backward pass is masked, accumulating or not.

        Use the `no_sync()` of the parameter site, or of DDP, for what it does there.
        """
        return nullcontext()

    def describe(self) -> dict[str, Any]:
        """Return what the mask touches; shape and map are null before the first training forward pass."""
        described = super().describe()
        for entry in described["touched"]:
            if not entry["shape"]:
                entry |= {"shape": None, "map": None, "entries": None}
        passed = set(self.passed)
        described["touched"] = [entry for entry in described["touched"] if entry["name"] not in passed]
        return described

    def detach(self) -> None:
        super().detach()
        for handle in self._handles:
            handle.remove()

    # -- forward --------------------------------------------------------------------------------------------
    def note(self, index: int, masked: bool) -> None:
        """Note whether the gradient of an output can be masked; a layer called twice is if one of the two can."""
        if self._seen.get(index, not masked) is not masked:
            self._seen[index] = self._seen.get(index, False) or masked
            passing = tuple(self._layers[i].name for i, masked in self._seen.items() if not masked)
            self.passed = (*self._excluded, *passing)

    def note_shape(self, index: int, shape: Sequence[int], geometry: Geometry | None) -> None:
        """Note the first shape of an output, preferably of one that is masked."""
        before = self.touched[index]
        if before.map_shape == (0, 0) and (geometry is not None or not before.shape):
            grid = (geometry.rows, geometry.cols) if geometry else (0, 0)
            seen = Touched(before.name, tuple(shape[1:]), grid, "token" if len(shape) == 3 else "position")
            self.touched = (*self.touched[:index], seen, *self.touched[index + 1 :])

    def check(self) -> None:
        """Raise UsageError if a whole forward pass has shown that no output can be masked (law 8)."""
        if self._active and self._seen and not any(self._seen.values()):
            shapes = "; ".join(f"{t.name} {list(t.shape)}" for t in self.touched[:3] if t.shape) or "compiled"
            raise UsageError(
                f"the mask touches nothing: none of {len(self._seen)} layers has an output that requires a "
                f"gradient and a map of at least {SMALLEST_MAP}x{SMALLEST_MAP} ({shapes}); choose other layers"
            )

    def refuse_same(self, name: str, output: Tensor) -> None:
        """Raise UsageError if the previous layer returned this very tensor: it would be masked twice (law 3)."""
        if self._returned is not None:
            tensor, version, previous = self._returned
            if tensor() is output and version == output._version and previous != name:
                raise UsageError(f"layers: {previous} and {name} return the same tensor; choose one of them")
        self._returned = weakref.ref(output), output._version, name

    # -- backward -------------------------------------------------------------------------------------------
    def masked(self, index: int, geometry: Geometry, gradient: Tensor) -> Tensor | None:
        """Return the masked gradient of an output, or None where the mask is off."""
        factor = self.factor(index, geometry, gradient)
        return None if factor is None else gradient * factor

    def factor(self, index: int, geometry: Geometry, gradient: Tensor) -> Tensor | None:
        """Return what a gradient is to be multiplied by (broadcastable), or None where the mask is off."""
        if not self._active or self._strength == 0:
            return None
        if self._strength is None:
            raise UsageError(
                "the mask depends on time (schedule or random operator): call attachment.at(step, total_steps) "
                "before each step's backward pass (site output)"
            )
        layer = self._layers[index]
        device = gradient.device
        # A step is timed from its first call on; without at() each backward pass counts as one.
        first = not self._calls or (self._step is None and layer.name == next(iter(self._calls)))
        # Where the user runs backward under autocast, a map must not lose its precision.
        with torch.no_grad(), torch.autocast(device.type, enabled=False), self._clock.running(device, float(first)):
            draw = f"{layer.name}/{self._calls[layer.name]}"
            self._calls[layer.name] += 1
            positions = gradient
            if gradient.ndim == 3:
                positions = gradient[:, geometry.prefix :].unflatten(1, (geometry.rows, geometry.cols))
            axis = 1 if geometry.channel_axis == 1 else 3
            factor, kept = output_factor(
                positions, axis, layer.mask, self._strength, self._generator(draw, device), self._observe
            )
            if kept is not None:
                self._kept.setdefault(layer.name, _Mean()).add(kept.entries, kept.energy)
            if gradient.ndim == 3:
                factor = factor.flatten(1, 2)
                factor = torch.cat((factor.new_ones(len(factor), geometry.prefix, 1), factor), dim=1)
            return factor.to(gradient.dtype)


def attach_output(
    model: nn.Module,
    mask: GradientMask,
    layers: str | Sequence[str] | None = None,
    sigmas: Mapping[str, float] | Sequence[float] | None = None,
) -> OutputAttachment:
    """Attach `mask` to the outputs of layers of a model, also one in DDP, torch.compile, FSDP2 or DeepSpeed.

    `layers` holds words: a type name (`ReLU`), a pattern of module names (`layer3.*`), `stages` for the outputs of
    timm's feature stages or `stage0`, `stage1`, ... for one. A pattern means the activations (in vision
    transformers: blocks) that it matches, or, where it matches none, the outermost modules. Empty: every activation
    of a CNN, every block of a vision transformer or NHWC model. A layout that cannot be told is appended to the
    word: `layer3.*:NHWC`; for tokens their grid and leading other tokens: `blocks.*:14x14+1`.
    `sigmas` (log, dog) maps the same words (a stage means all layers in it) to sigma, or holds one a stage.

    Raises UsageError for a word that matches nothing, a layout that is unknown (at the first forward pass), or a
    mask that touches nothing (law 8).
    """
    bare = _unwrap(model)
    if not any(p.requires_grad for p in bare.parameters()):
        raise UsageError("the mask touches nothing: the model has no parameter that requires a gradient")
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    attachment = OutputAttachment(bare, mask, choose(bare, mask, layers, sigmas), rank)
    if "torch._dynamo" in sys.modules:
        # What is compiled already does not notice new hooks (torch skips guards on them): compile it afresh.
        torch.compiler.reset()
    return attachment


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, DeepSpeed's engine and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DeepSpeedEngine"):
            inner = model.module
        if inner is None:
            return model
        model = inner


# -- forward hooks: closures over few things, because torch.compile guards what they read, and copies of a model
# -- (an average of its weights) copy functions by reference
def _hook(
    attachment: OutputAttachment, key: int, index: int, layer: Layer, model: nn.Module
) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not model.training:
            return None
        tensor = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(tensor, Tensor):
            raise UsageError(
                f"layers: {layer.name} returns {type(output).__name__}; expected a tensor, or a tuple or list that "
                f"begins with one"
            )
        geometry = layer.geometry(tensor.shape)
        # Under reentrant checkpointing the first forward pass records no graph, and says nothing of gradients.
        trains = tensor.requires_grad or not torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            _note(key, index, geometry is not None and trains)
            if geometry is None or not tensor.requires_grad:
                return None
            masked = _Compiled.apply(tensor, key, index, *geometry)
            return masked if isinstance(output, Tensor) else type(output)((masked, *output[1:]))
        attachment.note(index, geometry is not None and trains)
        attachment.note_shape(index, tensor.shape, geometry)
        if geometry is not None and tensor.requires_grad:
            attachment.refuse_same(layer.name, tensor)
            tensor.register_hook(lambda gradient: attachment.masked(index, geometry, gradient))
        return None

    return hook


def _hook_of_model(attachment: OutputAttachment, key: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not module.training:
            return
        if not torch.compiler.is_compiling():
            attachment.check()
        elif complaint := _check(key):
            raise UsageError(complaint)

    return hook


# -- torch.compile ------------------------------------------------------------------------------------------------
@torch.compiler.assume_constant_result
def _note(key: int, index: int, masked: bool) -> None:
    """Run while torch.compile traces, once a compilation."""
    _attachments[key].note(index, masked)


@torch.compiler.assume_constant_result
def _check(key: int) -> str:
    """Return what `check` has to say, for an error that torch.compile lets through."""
    try:
        _attachments[key].check()
    except UsageError as error:
        return str(error)
    return ""


class _Compiled(torch.autograd.Function):
    """The identity; its backward multiplies by the factor of the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *where: int) -> Tensor:
        ctx.where = where
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        factor = torch.ops.gmscale.output_factor(gradient, *ctx.where)
        return gradient * factor, *(None for _ in ctx.where)


def _factor(gradient: Tensor, key: int, index: int, axis: int, rows: int, cols: int, prefix: int) -> Tensor:
    attachment = _attachments.get(key)
    geometry = Geometry(axis, rows, cols, prefix)
    if attachment is not None:
        attachment.note_shape(index, gradient.shape, geometry)
    factor = attachment.factor(index, geometry, gradient) if attachment else None
    return _like(gradient, axis).fill_(1) if factor is None else factor.contiguous()


def _like(gradient: Tensor, axis: int, *_: int) -> Tensor:
    return gradient.new_empty([1 if i == axis else n for i, n in enumerate(gradient.shape)])


_OPERATOR = "gmscale::output_factor"
# Strength is read by Python when the operator runs; a CUDA graph would replay an old one.
_TAGS = [tag for name in ("pt2_compliant_tag", "cudagraph_unsafe") if (tag := getattr(torch.Tag, name, None))]
torch.library.define(
    _OPERATOR,
    "(Tensor gradient, int key, int index, int axis, SymInt rows, SymInt cols, SymInt prefix) -> Tensor",
    tags=_TAGS,
)
torch.library.impl(_OPERATOR, "CompositeExplicitAutograd", _factor)
torch.library.register_fake(_OPERATOR, lambda gradient, key, index, axis, *_: _like(gradient, axis))
