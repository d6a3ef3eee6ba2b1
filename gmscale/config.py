"""The configuration of a run: frozen dataclasses, strict parsing, back to YAML.

Flags beat later files, later files beat earlier ones, files beat defaults. An unknown key is an error in every
source, and says which one was meant.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from gmscale.data import AugmentConfig, DataConfig
from gmscale.errors import UsageError, check_keys, check_range, nearest
from gmscale.masking import GradientMask
from gmscale.masking.mask import Operator

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Amp = Literal["none", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run: where it lives, how long it trains, when it logs, evaluates and saves."""

    dir: str = "runs/default"
    """Run directory; starting again in the same one resumes."""
    arm: str = ""
    """Label of the arm in comparisons; empty makes one from the mask's settings."""
    seed: int = 0
    """Seed of initialisation, sample order, augmentation and dropout."""
    epochs: float = 6.0
    """Length of training; a fraction is allowed."""
    log_every: int = 20
    """Steps between two training lines in metrics.jsonl."""
    eval_every_epochs: float = 1.0
    """Epochs between two evaluations; the last step is always evaluated."""
    save_every_steps: int = 0
    """Steps between two checkpoints; 0 saves at every evaluation."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are removed after a new one is complete."""
    probe_every: int = 0
    """Steps between two probes of gradient quality, each of two steps; 0 is off."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from the newest checkpoint in dir; never refuses a directory that holds a run."""
    deterministic: bool = True
    """Ask torch for deterministic algorithms (a warning where an operation has none)."""

    def __post_init__(self) -> None:
        check_range(self.seed, "run.seed", 0, 10**9)
        check_range(self.epochs, "run.epochs", 0, open_low=True)
        check_range(self.log_every, "run.log_every", 1)
        check_range(self.eval_every_epochs, "run.eval_every_epochs", 0, open_low=True)
        check_range(self.save_every_steps, "run.save_every_steps", 0)
        check_range(self.keep_checkpoints, "run.keep_checkpoints", 1)
        if self.probe_every != 0:
            check_range(self.probe_every, "run.probe_every", 2)
        if not self.dir:
            raise UsageError("run.dir is empty; expected the path of the run directory")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The timm model."""

    name: str = "test_byobnet"
    """Any name timm.create_model knows."""
    pretrained: bool = False
    """Start from timm's pretrained weights (needs the hub)."""
    checkpoint: str = ""
    """Start from this safetensors file, in timm's key names."""
    drop_rate: float = 0.0
    """Dropout before the classifier."""
    drop_path_rate: float = 0.0
    """Stochastic depth, for models that have it."""
    channels_last: bool = True
    """Keep weights and activations in channels_last memory."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them (timm's blocks)."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights, which is evaluated too; 0 is off."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of timm.create_model."""

    def __post_init__(self) -> None:
        check_range(self.drop_rate, "model.drop_rate", 0, 1)
        check_range(self.drop_path_rate, "model.drop_path_rate", 0, 1)
        check_range(self.ema_decay, "model.ema_decay", 0, 1)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, schedule and everything between the loss and the step."""

    opt: str = "sgd"
    """Any optimizer of timm's factory (its sgd is Nesterov; its momentum is plain SGD)."""
    lr: float = 0.1
    """Peak learning rate, for the global batch size that the run uses."""
    momentum: float = 0.9
    """Momentum, for optimizers that have it."""
    weight_decay: float = 5e-4
    """Weight decay; not applied to biases and normalisation parameters."""
    opt_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the optimizer."""
    sched: str = "cosine"
    """Schedule of timm's factory (cosine, step, multistep, poly, tanh), updated every step; none is constant."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up."""
    warmup_lr: float = 1e-5
    """Learning rate at the start of warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    grad_accum_steps: int = 1
    """Micro-batches in an optimizer step."""
    clip_grad: float = 0.0
    """Gradient clipping after the reduction; 0 is off."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """What clip_grad bounds: the norm, each value, or adaptively (AGC)."""
    amp: Amp = "none"
    """Automatic mixed precision; fp16 scales the loss."""

    def __post_init__(self) -> None:
        check_range(self.lr, "optim.lr", 0, open_low=True)
        check_range(self.momentum, "optim.momentum", 0, 1)
        check_range(self.weight_decay, "optim.weight_decay", 0)
        check_range(self.warmup_epochs, "optim.warmup_epochs", 0)
        check_range(self.label_smoothing, "optim.label_smoothing", 0, 1)
        check_range(self.grad_accum_steps, "optim.grad_accum_steps", 1)
        check_range(self.clip_grad, "optim.clip_grad", 0)


@dataclass(frozen=True, kw_only=True)
class MaskConfig(GradientMask):
    """The gradient mask: on or off, its site, and the settings of GradientMask."""

    enabled: bool = True
    """Attach the mask; off is the plain run, bit for bit."""
    site: Literal["auto", "ddp", "deepspeed", "fsdp2", "single"] = "auto"
    """Where the mask meets the weight gradients; auto is the site of parallel.backend."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig(GradientMask):
    """A gradient mask of layer outputs (the paper's site), beside or instead of the one of weights."""

    enabled: bool = False
    """Attach a mask to layer outputs."""
    layers: list[str] = field(default_factory=list)
    """Type names (ReLU), patterns of module names (layer3.*) or stages (stages, stage2); empty: by model."""
    sigmas: dict[str, float] = field(default_factory=dict)
    """log and dog: sigma of layers by the same words, such as '{stage0: 2.0, stage3: 0.8}'."""
    operator: Operator = "log"
    """Inhibition: log, dog, licnn (neighbourhoods), pool (order-free), random (control of equal density)."""
    strength: float | None = 0.25
    """How far inhibited positions are damped: 0 is the identity, 1 removes them."""
    start: float = 0.1
    """Share of training before which the mask is off."""
    end: float = 0.65
    """Share of training from which the mask is off again."""
    error_feedback: bool = False
    """Not for layer outputs: the next step's outputs are of other images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.error_feedback:
            raise UsageError("output.error_feedback is true; what layer outputs hold back belongs to no later step")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Processes and how they talk."""

    backend: Literal["auto", "single", "ddp", "deepspeed", "fsdp2"] = "auto"
    """auto is ddp under torchrun, else single."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """deepspeed: what ZeRO partitions (1 optimizer state, 2 also gradients, 3 also weights)."""
    overlap_comm: bool = True
    """deepspeed: reduce gradients while the backward pass goes on."""
    reshard_after_forward: bool = True
    """fsdp2: free the gathered weights after the forward pass and gather them again for the backward pass."""
    timeout_s: float = 600.0
    """Seconds a collective may take before it is an error."""
    threads: int = 0
    """Threads a process uses on CPU; 0 shares the cores among the local processes."""
    comm_hook: Literal["allreduce", "bf16", "fp16"] = "allreduce"
    """ddp: what reduces the (masked) gradients; bf16 and fp16 halve the bytes that travel."""
    bucket_cap_mb: float = 25.0
    """Size of DDP's gradient buckets."""
    gradient_as_bucket_view: bool = True
    """Let gradients be views of the buckets (saves one copy of the gradients)."""
    static_graph: bool = False
    """Promise DDP that the graph never changes."""
    find_unused_parameters: bool = False
    """Let DDP look for parameters that a forward pass does not use."""

    def __post_init__(self) -> None:
        check_range(self.timeout_s, "parallel.timeout_s", 0, open_low=True)
        check_range(self.threads, "parallel.threads", 0)
        check_range(self.bucket_cap_mb, "parallel.bucket_cap_mb", 0, open_low=True)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run depends on."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def arm(self) -> str:
        """Label of this run in comparisons."""
        if self.run.arm:
            return self.run.arm
        parts = []
        if self.mask.enabled:
            agreement = "" if self.mask.agreement == "local" else f" {self.mask.agreement}"
            parts.append(f"{self.mask.operator} {self.mask.peak_strength:g}{agreement}")
        if self.output.enabled:
            parts.append(f"output {self.output.operator} {self.output.peak_strength:g}")
        return " + ".join(parts) or "no mask"

    def to_yaml(self) -> str:
        """Return the resolved configuration, readable by `--config` again."""
        return yaml.dump(_plain(asdict(self)), Dumper=_Dumper, sort_keys=False)


# What may differ between a run and its resumption; everything else decides the result and must be the same.
MAY_CHANGE_ON_RESUME = {
    "run": {"dir", "arm", "log_every", "eval_every_epochs", "save_every_steps", "keep_checkpoints", "resume"},
    "data": {
        "source",
        "cache_dir",
        "cache_gb",
        "workers",
        "eval_batch_size_per_device",
        "allow_pipe",
        "max_bad_share",
    },
    "parallel": {"timeout_s", "threads"},
}


def build_parser(prog: str) -> ArgumentParser:
    """Return the command-line parser whose namespace `parse` turns into a TrainConfig."""
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of any of the fields below; may be repeated.")
    for section, cls in _sections().items():
        parser.add_class_arguments(cls, section)
    return parser


def parse(argv: Sequence[str], prog: str = "gmscale train", parser: ArgumentParser | None = None) -> Any:
    """Parse a command line; return (TrainConfig, namespace with any further arguments of `parser`).

    Raises UsageError, in one line, for whatever is wrong with a flag or a file.
    """
    parser = parser or build_parser(prog)
    _check_files(argv)
    try:
        namespace = parser.parse_args(list(argv))
        sections = parser.instantiate(namespace)
    except (ArgumentError, TypeError) as error:
        raise _explained(str(error), parser) from None
    return TrainConfig(**{name: sections[name] for name in _sections()}), namespace


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Return the TrainConfig of a nested mapping such as a loaded config.yaml; strict like `parse`."""
    _check_mapping(values, "the configuration")
    parser = build_parser("gmscale")
    try:
        sections = parser.instantiate(parser.parse_object(_plain(dict(values))))
    except (ArgumentError, TypeError) as error:
        raise _explained(str(error), parser) from None
    return TrainConfig(**{name: sections[name] for name in _sections()})


def load(path: Path) -> TrainConfig:
    """Return the TrainConfig of a YAML file."""
    return parse(["--config", str(path)])[0]


def changed_on_resume(saved: Mapping[str, Any], now: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Return (field, saved value, value now) of what differs although a resumed run must keep it."""
    current = _plain(asdict(now))
    changes = []
    for section, values in current.items():
        for name, value in values.items():
            before = saved.get(section, {}).get(name)
            if name not in MAY_CHANGE_ON_RESUME.get(section, ()) and before != value:
                changes.append((f"{section}.{name}", before, value))
    return changes


def _sections() -> dict[str, type]:
    hints = get_type_hints(TrainConfig)
    return {f.name: hints[f.name] for f in fields(TrainConfig)}


class _Dumper(yaml.SafeDumper):
    """Quotes text such as 1e-3, which is a number to the parser but not to PyYAML."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*\.?\d*[eE][-+]?\d+"), list("-+0123456789")
)


def _plain(value: Any) -> Any:
    """Return nested tuples as lists, for YAML and JSON."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _check_files(argv: Sequence[str]) -> None:
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            _check_file(Path(argv[i + 1]))
        elif argument.startswith("--config="):
            _check_file(Path(argument.removeprefix("--config=")))


def _check_file(path: Path) -> None:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        siblings = [str(path.parent / p.name) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UsageError(f"--config {path}: {error.strerror}{nearest(str(path), siblings)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    _check_mapping(values, str(path))


def _check_mapping(values: Any, where: str) -> None:
    if not isinstance(values, Mapping):
        held = "nothing" if values is None else f"a {type(values).__name__}"
        raise UsageError(f"{where} holds {held}; expected sections {', '.join(_sections())}")
    check_keys(values, _sections(), where)
    for name, cls in _sections().items():
        if name not in values:
            continue
        section = values[name]
        if not isinstance(section, Mapping):
            raise UsageError(f"{where}: section {name} holds {section!r}; expected fields of {name}")
        check_keys(section, [f.name for f in fields(cls)], f"{where}: section {name}")


def _explained(message: str, parser: ArgumentParser) -> UsageError:
    """Turn a parser's message into one line with the nearest valid choice."""
    line = " ".join(message.split())
    if found := re.match(r"unrecognized arguments: (\S+)", line):
        flag = found[1].split("=")[0]
        if not flag.startswith("-"):
            return UsageError(f"unexpected argument {flag!r} (see --help)")
        known = [s for action in parser._actions for s in action.option_strings]
        return UsageError(f"unknown flag {flag}{nearest(flag, known)} (see --help)")
    if found := re.match(r'Parser key "([^"]+)": Expected a (.+)\. Got value: (.*)$', line):
        key, expected, value = found.groups()
        if choices := re.match(r"typing\.Literal\[(.*)\]", expected):
            options = [c.strip(" '\"") for c in choices[1].split(",")]
            return UsageError(f"{key} is {value!r}; expected one of {', '.join(options)}{nearest(value, options)}")
        wanted = _WANTED.get(expected, expected)
        return UsageError(f"{key} is {value!r}; expected {wanted}")
    if found := re.match(r'Parser key "([^"]+)": .*Expected a (\S+ \S+) - .*NoneType.*Given value: (.*)$', line):
        key, expected, value = found.groups()
        return UsageError(f"{key} is {value!r}; expected {_WANTED.get(expected, expected)} or null")
    if found := re.match(r"Group '(\w+)' does not accept option '([^']+)'", line):
        check_keys([found[2]], [f.name for f in fields(_sections()[found[1]])], f"section {found[1]}")
    return UsageError(line)


_WANTED = {
    "<class 'str'>": "text (in quotes, if it looks like a number)",
    "<class 'float'>": "a number",
    "<class 'int'>": "a whole number",
    "<class 'bool'>": "true or false",
    "<class 'tuple'>": "a list such as '[a, b]'",
    "<class 'dict'>": "a mapping such as '{key: value}'",
}
