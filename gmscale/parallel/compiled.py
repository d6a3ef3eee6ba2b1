"""torch.compile: in place, so that names stay as they are, and before a back-end wraps the model.

Training is compiled, evaluation is not: its numbers are those of the plain timm model, and batches of other sizes
compile nothing.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gmscale.config import ModelConfig
from gmscale.errors import UsageError, check_choice


def compile_(modules: Iterable[nn.Module], config: ModelConfig, device: torch.device) -> None:
    """Let each module compile itself when it is first called, if `config` asks for it.

    Raises UsageError for a backend that torch does not know or that cannot work here.
    """
    if not config.compile:
        if config.compile_mode != "default":
            raise UsageError(f"model.compile_mode is {config.compile_mode!r}, but model.compile is not set")
        return
    known = [name for name in torch.compiler.list_backends(exclude_tags=()) if not name.endswith("TESTING_ONLY")]
    check_choice(config.compile, known, "model.compile")
    mode = None if config.compile_mode == "default" else config.compile_mode
    if mode is not None and config.compile != "inductor":
        raise UsageError(f"model.compile_mode belongs to inductor, and model.compile is {config.compile!r}")
    if config.compile == "inductor" and device.type == "cpu":
        _check_compiler()
    for module in modules:
        module.compile(backend=config.compile, mode=mode)


def uncompiled(module: nn.Module, config: ModelConfig) -> nn.Module:
    """Return what runs a module as it is written, although it may be compiled for training."""
    return _Uncompiled(module) if config.compile else module


class _Uncompiled(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            logits: Tensor = self.module(images)
        return logits


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UsageError(
            "model.compile inductor needs a C++ compiler, and none was found; install g++, name one in the "
            "environment variable CXX, or leave model.compile empty"
        ) from None
