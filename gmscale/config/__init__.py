"""The configuration of a run: frozen dataclasses, strict parsing, back to YAML."""

from gmscale.config.parsing import MAY_CHANGE_ON_RESUME, build_parser, changed_on_resume, from_dict, load, parse
from gmscale.config.sections import (
    Amp,
    FinetuneConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "MAY_CHANGE_ON_RESUME",
    "Amp",
    "FinetuneConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimConfig",
    "OutputConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
    "build_parser",
    "changed_on_resume",
    "from_dict",
    "load",
    "parse",
]
