"""Activations and gradients at a model's layers, as grids of positions: hooks tell while the model runs on images.

The axis of the channels follows from the type of the layer that ran last (convolutions and 2d norms: before the
positions; linear layers and LayerNorm: behind them), for blocks and stages from what timm says of its model. A grid
has the aspect ratio of the images. Tokens form a grid where timm's patch embedding says which.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gmscale.errors import UsageError
from gmscale.evaluation.subject import OnPixels
from gmscale.sites.layers import channels_of_type, is_activation

_LISTS = (nn.Sequential, nn.ModuleList)
_BLOCK = re.compile(r"(.*\.)?blocks\.\d+")


class Maps(NamedTuple):
    """What a layer holds at the positions of a grid."""

    activations: Tensor
    """[N, C, rows, cols]"""
    gradients: Tensor
    """Of the targets' logits, [N, C, rows, cols]."""


class _Grid(NamedTuple):
    """Where a tensor holds a grid; of tokens [N, L, C] rows * cols follow `prefix` others."""

    rows: int
    cols: int
    channels_last: bool
    prefix: int = 0

    def positions(self, x: Tensor) -> Tensor:
        """Return what `x` holds at the grid's positions, [N, C, rows, cols]; a view."""
        if x.ndim == 3:
            x = x[:, self.prefix :].unflatten(1, (self.rows, self.cols))
        return x.permute(0, 3, 1, 2) if self.channels_last else x


def target_logits(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over the batch of each image's logit of its label: its gradients are the images' own."""
    return model(pixels).gather(1, labels[:, None]).sum()


def at_each_layer(model: nn.Module, pixels: Tensor, labels: Tensor, hear: Callable[[Tensor], None]) -> None:
    """Call `hear` with the gradient of the targets' logits, [N, C, rows, cols], at each layer that has a grid.

    Layers are activations, whose gradient is that of what enters them, as in the authors' public code; in vision
    transformers, and models that timm says are NHWC, the outputs of blocks; where these have no grid, the outputs
    of timm's feature stages. Functional activations are not seen. `model` takes pixels [N, C, H, W], is in
    evaluation mode, and is left as it is; so for `last_maps`. Raises UsageError where no layer has a grid.
    """
    layers = _Layers(model, pixels)
    if not _hear(model, pixels, labels, layers, hear):
        layers.blocks = layers.stages
        if not _hear(model, pixels, labels, layers, hear):
            raise _no_grid(model, "activation, block or stage")


def last_maps(model: nn.Module, pixels: Tensor, labels: Tensor) -> Maps:
    """Return activations and gradients of the last layer that still has a grid of more than one position.

    In a vision transformer this is the first layer within the last block, mostly `norm1`: what follows gives the
    class token's answer no gradient at the patches. Layers within a feature stage of timm that leaves one position
    do not count: they are but a branch of it. Raises UsageError where no layer has a grid.
    """
    layers = _Layers(model, pixels)
    last: tuple[Tensor, _Grid] | None = None
    before_stage = last
    awaited = False  # whether a block has begun and none of its layers has ended

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal before_stage, awaited
        layers.enter(module)
        if module in layers.stages:
            before_stage = last
        awaited = awaited or (layers.has_tokens and module in layers.blocks)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal last, awaited
        if layers.has_tokens and not awaited:
            return
        # Dropout and the like are no layers: they may hold the weights of an attention.
        is_leaf = next(module.children(), None) is None
        counts = not is_leaf or is_activation(module) or _channels_last(module) is not None
        if counts and (grid := layers.grid(output, module)) and output.requires_grad:
            last, awaited = (output, grid), False
        elif module in layers.stages and not layers.has_tokens:
            last = before_stage

    with torch.enable_grad(), _hooked(model, before, after):
        logits = target_logits(model, pixels.detach().requires_grad_(), labels)
        if last is None:
            raise _no_grid(model, "layer")
        output, grid = last
        gradient = torch.autograd.grad(logits, output)[0]
    return Maps(grid.positions(output.detach()), grid.positions(gradient))


def _hear(
    model: nn.Module, pixels: Tensor, labels: Tensor, layers: "_Layers", hear: Callable[[Tensor], None]
) -> bool:
    """Do as `at_each_layer` with the activations or the blocks of `layers`; return whether there was one."""
    heard = False

    def listen(x: Tensor, grid: _Grid) -> None:
        nonlocal heard
        heard = True
        # Unlike autograd.grad, a hook is not confused by a later change of the tensor in place.
        x.register_hook(lambda gradient: hear(grid.positions(gradient)))

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        layers.enter(module)
        if layers.blocks or not is_activation(module) or (grid := layers.grid(args[0], module)) is None:
            return None
        entered = args[0].clone()  # the activation's own: what enters may be used elsewhere too
        if entered.requires_grad:
            listen(entered, grid)
        return entered, *args[1:]

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module in layers.blocks and (grid := layers.grid(output, module)) and output.requires_grad:
            listen(output, grid)

    pixels = pixels.detach().requires_grad_()
    # Hooks stay until the backward pass is done: where activations are checkpointed it runs the model again.
    with torch.enable_grad(), _hooked(model, before, after):
        torch.autograd.grad(target_logits(model, pixels, labels), pixels)
    return heard


class _Layers:
    """The layers of a model while it runs on `pixels`, and the grids of their tensors."""

    def __init__(self, model: nn.Module, pixels: Tensor) -> None:
        self._count, self._size = len(pixels), (pixels.shape[-2], pixels.shape[-1])
        root: Any = next((m for m in model.modules() if hasattr(m, "feature_info")), model)  # timm's
        stated = getattr(root, "output_fmt", "NCHW")
        is_nhwc = str(getattr(stated, "value", stated)) == "NHWC"
        embedding: Any = next((m for m in root.children() if hasattr(m, "dynamic_feat_size")), None)
        own_blocks: Any = getattr(root, "blocks", None)
        self.has_tokens = embedding is not None and isinstance(own_blocks, _LISTS) and not is_nhwc
        self._tokens = embedding.dynamic_feat_size(self._size) if self.has_tokens else (0, 0)
        self._prefix = getattr(root, "num_prefix_tokens", 0)
        self._between_blocks = is_nhwc or self.has_tokens  # whether channels are last there
        self._latest = False
        named = dict(root.named_modules())
        listed: Any = getattr(root, "feature_info", ())
        names = [d["module"] for d in (listed.get_dicts() if hasattr(listed, "get_dicts") else listed)]
        self.stages: Collection[nn.Module] = [named[name] for name in names if name in named]
        self.blocks: Collection[nn.Module] = ()
        """Layers whose outputs count instead of activations."""
        if self.has_tokens:
            self.blocks = list(own_blocks)
        elif is_nhwc:
            self.blocks = [m for name, m in named.items() if _BLOCK.fullmatch(name)]

    def enter(self, module: nn.Module) -> None:
        """Hear that a module begins."""
        last = _channels_last(module)
        self._latest = self._latest if last is None else last

    def grid(self, x: Any, module: nn.Module) -> _Grid | None:
        """Return the grid of what `module` takes or returns now; None if it is no tensor with one."""
        if not isinstance(x, Tensor) or len(x) != self._count:
            return None
        if x.ndim == 3 and self.has_tokens:
            rows, cols = self._tokens
            # Some models (CaiT, ConViT) add their class token only behind these blocks.
            prefix = x.shape[1] - rows * cols
            return _Grid(rows, cols, True, prefix) if prefix in (0, self._prefix) and rows * cols > 1 else None
        if x.ndim != 4:
            return None
        own = _channels_last(module)
        if own is None:
            own = self._latest if is_activation(module) else self._between_blocks
        for channels_last in (own, not own):
            rows, cols = x.shape[1:3] if channels_last else x.shape[2:]
            if self._is_of_image(rows, cols):
                return _Grid(rows, cols, channels_last)
        return None

    def _is_of_image(self, rows: int, cols: int) -> bool:
        height, width = self._size
        # Both are rounded after each stride, by less than one position; square images have square grids.
        same_ratio = abs(rows * width - cols * height) < max(height, width)
        return same_ratio and rows <= height and cols <= width and rows * cols > 1


@contextmanager
def _hooked(model: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> Iterator[None]:
    """Call `before` and `after` with each module within `model` that runs."""
    handles = []
    try:
        for module in model.modules():
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channels_last(module: nn.Module) -> bool | None:
    """Return whether a layer of this type holds channels last; None if it does not tell."""
    kind = channels_of_type(module)
    return None if kind is None else kind == "last"


def _no_grid(model: nn.Module, layer: str) -> UsageError:
    bare = model.model if isinstance(model, OnPixels) else model
    return UsageError(
        f"{type(bare).__name__} has no {layer} module whose output is known to be a grid of positions on these "
        f"images; choose a saliency of pixels: gradient, smoothgrad or integrated"
    )
