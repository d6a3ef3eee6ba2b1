"""The sections of a run's configuration: frozen dataclasses whose field texts are the command line's --help."""

import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from gmscale.data import AugmentConfig, DataConfig
from gmscale.errors import UsageError, check_range
from gmscale.masking import GradientMask
from gmscale.masking.mask import Operator

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
    pause_after_epochs: float = 0.0
    """Stop after so many epochs as on request: a checkpoint, exit status 75; the same command without it, or with
    more, goes on. 0 is off."""
    branch_from: str = ""
    """Begin as the run of this checkpoint goes on (its weights, optimizer and place in the data), but with the
    settings given here; of a run directory it is the newest. Of no effect once dir has a checkpoint of its own."""
    log_every: int = 20
    """Steps between two training lines in metrics.jsonl."""
    eval_every_epochs: float = 1.0
    """Epochs between two evaluations; the last step is always evaluated."""
    save_every_steps: int = 0
    """Steps between two checkpoints; 0 saves at every evaluation."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; older ones are removed after a new one is complete."""
    keep_best: int = 1
    """Checkpoints of the best validation top1 kept besides; each new best is saved at once. 0 is off."""
    background_save: bool = True
    """Write checkpoints while training goes on; a copy in memory is all that a step waits for."""
    probe_every: int = 0
    """Steps between two probes of gradient quality, each of two steps; 0 is off."""
    max_nonfinite: int = 20
    """Steps in a row without a finite gradient after which the run ends; each is skipped and counted."""
    wandb_project: str = ""
    """Log to this project of Weights & Biases too (pip install wandb; WANDB_MODE=offline needs no network)."""
    profile_steps: tuple[int, int] | None = None
    """First and last step that torch's profiler traces, such as '[20, 22]', into dir/profile."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from the newest checkpoint in dir; never refuses a directory that holds a run."""
    deterministic: bool = True
    """Ask torch for deterministic algorithms (a warning where an operation has none); off lets cuDNN try which of
    its algorithms is fastest."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """torch.set_float32_matmul_precision: high and medium let GPUs use TF32 or bfloat16 inside float32 products."""

    def __post_init__(self) -> None:
        check_range(self.seed, "run.seed", 0, 10**9)
        check_range(self.epochs, "run.epochs", 0, 1e5, open_low=True)
        check_range(self.pause_after_epochs, "run.pause_after_epochs", 0)
        check_range(self.log_every, "run.log_every", 1)
        check_range(self.eval_every_epochs, "run.eval_every_epochs", 0, open_low=True)
        check_range(self.save_every_steps, "run.save_every_steps", 0)
        check_range(self.keep_checkpoints, "run.keep_checkpoints", 1)
        check_range(self.keep_best, "run.keep_best", 0)
        check_range(self.max_nonfinite, "run.max_nonfinite", 1)
        if self.profile_steps is not None:
            first, last = self.profile_steps
            check_range(first, "run.profile_steps[0]", 1)
            check_range(last, "run.profile_steps[1]", first)
        if self.probe_every != 0:
            check_range(self.probe_every, "run.probe_every", 2)
        if not self.dir:
            raise UsageError("run.dir is empty; expected the path of the run directory")
        if self.branch_from:
            own, origin = Path(self.dir).resolve(), Path(self.branch_from).resolve()
            if own == origin or own / "checkpoints" == origin.parent:
                raise UsageError(f"run.branch_from {self.branch_from} is of run.dir itself; choose another run.dir")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The timm model."""

    name: str = "test_byobnet"
    """Any name timm.create_model knows."""
    pretrained: bool = False
    """Start from timm's pretrained weights (needs the hub)."""
    checkpoint: str = ""
    """Start from these weights: a .safetensors, .pth, .pt or .bin file in timm's key names (no code in it is run),
    a run directory (its best checkpoint), or a checkpoint."""
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
    ema_warmup: bool = False
    """Let the average's decay rise from 0 over the first steps (timm's ema warm-up)."""
    compile: str = ""
    """Backend of torch.compile (inductor; eager and aot_eager find faults); empty is off."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """inductor: what torch.compile optimises for."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of timm.create_model; img_size is set to data.image_size where a model takes it."""

    def __post_init__(self) -> None:
        check_range(self.drop_rate, "model.drop_rate", 0, 1)
        check_range(self.drop_path_rate, "model.drop_path_rate", 0, 1)
        check_range(self.ema_decay, "model.ema_decay", 0, 0.999999)
        if self.ema_warmup and self.ema_decay == 0:
            raise UsageError("model.ema_warmup is true, but there is no average: model.ema_decay is 0")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What of the starting weights is kept, and which of them train."""

    weights: Literal["auto", "model", "ema"] = "auto"
    """Which weights of a run to start from: its averaged ones if it has any (auto), the plain, or the averaged."""
    reset_head: bool = False
    """Start with a fresh classifier even where the number of classes is the same (otherwise only where not)."""
    freeze: list[str] = field(default_factory=list)
    """Patterns (fnmatch) of modules or parameters that do not train, such as '[stem, "blocks.[0-5]"]'; modules that
    are frozen whole also keep their normalisation statistics, and no dropout."""
    linear_probe: bool = False
    """Freeze everything but the classifier."""
    unfreeze_epoch: float = 0.0
    """Epoch from which on everything trains (back-ends single and ddp); 0 keeps frozen what is frozen."""

    def __post_init__(self) -> None:
        check_range(self.unfreeze_epoch, "finetune.unfreeze_epoch", 0)
        if self.linear_probe and self.freeze:
            raise UsageError("finetune.linear_probe freezes all but the classifier; finetune.freeze must be empty")
        if self.unfreeze_epoch > 0 and not (self.freeze or self.linear_probe):
            raise UsageError("finetune.unfreeze_epoch is set, but nothing is frozen; set freeze or linear_probe")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, schedule and everything between the loss and the step."""

    opt: str = "sgd"
    """Any optimizer of timm's factory (its sgd is Nesterov; its momentum is plain SGD)."""
    lr: float = 0.1
    """Peak learning rate, for the global batch of lr_batch_size images."""
    lr_batch_size: int = 0
    """Global batch size that lr is meant for: a run with another one scales it. 0 takes lr as it is."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """How lr follows the global batch: in proportion (usual for SGD), or by its square root (for Adam's kin)."""
    momentum: float = 0.9
    """Momentum, for optimizers that have it."""
    weight_decay: float = 5e-4
    """Weight decay; not applied to biases, normalisation parameters and what the model itself excludes."""
    no_weight_decay: list[str] = field(default_factory=list)
    """Patterns (fnmatch) of further parameters without weight decay."""
    layer_decay: float = 0.0
    """Factor by which the learning rate falls from each layer to the one before it (0.65 to 0.9 for fine-tuning
    vision transformers); 0 is off."""
    opt_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the optimizer."""
    sched: str = "cosine"
    """Schedule of timm's factory: cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, plateau; or none."""
    sched_on: Literal["step", "epoch"] = "step"
    """When the learning rate changes: before every step, or every epoch. plateau follows the evaluations, of
    each epoch the first at or after its end."""
    sched_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm's schedule factory, such as '{decay_milestones: [30, 60], decay_rate: 0.1}'.
    The cycles of cosine, tanh and poly (cycle_limit) together last run.epochs."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up."""
    warmup_lr: float = 1e-5
    """Learning rate at the start of warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    cooldown_epochs: float = 0.0
    """Epochs at the end of training, after the schedule's."""
    loss: Literal["ce", "bce"] = "ce"
    """Cross-entropy, or binary cross-entropy of each class."""
    bce_threshold: float | None = None
    """bce: targets above it count as 1, others as 0 (with mixed labels usually 0.2); unset leaves them alone."""
    bce_sum: bool = False
    """bce: sum over classes instead of their mean."""
    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over the classes."""
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
        check_range(self.lr_batch_size, "optim.lr_batch_size", 0)
        check_range(self.momentum, "optim.momentum", 0, 1)
        check_range(self.weight_decay, "optim.weight_decay", 0)
        check_range(self.layer_decay, "optim.layer_decay", 0, 1)
        check_range(self.warmup_epochs, "optim.warmup_epochs", 0)
        check_range(self.cooldown_epochs, "optim.cooldown_epochs", 0)
        if self.bce_threshold is not None:
            check_range(self.bce_threshold, "optim.bce_threshold", 0, 1)
        for name, given in (("bce_threshold", self.bce_threshold is not None), ("bce_sum", self.bce_sum)):
            if given and self.loss != "bce":
                raise UsageError(f"optim.{name} is set, but optim.loss {self.loss} does not use it; take loss bce")
        check_range(self.label_smoothing, "optim.label_smoothing", 0, 1)
        check_range(self.grad_accum_steps, "optim.grad_accum_steps", 1)
        check_range(self.clip_grad, "optim.clip_grad", 0)
        if self.clip_mode != "norm" and self.clip_grad == 0:
            raise UsageError(f"optim.clip_mode is {self.clip_mode!r}, but nothing is clipped: optim.clip_grad is 0")
        if self.lr_scaling != "linear" and self.lr_batch_size == 0:
            raise UsageError(
                f"optim.lr_scaling is {self.lr_scaling!r}, but optim.lr is taken as it is: optim.lr_batch_size is 0"
            )

    def for_batch(self, global_batch_size: int) -> Self:
        """Return these settings with the learning rate for a global batch of so many images."""
        if self.lr_batch_size == 0:
            return self
        ratio = global_batch_size / self.lr_batch_size
        lr = self.lr * (ratio if self.lr_scaling == "linear" else ratio**0.5)
        return replace(self, lr=lr, lr_batch_size=0, lr_scaling="linear")


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
    elastic: bool = False
    """single and ddp: let the run go on with another number of processes. The global batch stays that of the run's
    beginning, optim.grad_accum_steps follows."""
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
    batch_norm: Literal["broadcast", "reduce", "sync"] = "broadcast"
    """Statistics of batch normalisation over ranks: rank 0's for all (broadcast), each rank its own, averaged at
    every evaluation (reduce), or those of the whole global batch (sync, GPUs only)."""
    sharded_checkpoints: bool = False
    """deepspeed stage 3 and fsdp2: each rank saves its own part of the weights; `gmscale export` makes one file."""

    def __post_init__(self) -> None:
        check_range(self.timeout_s, "parallel.timeout_s", 0, open_low=True)
        check_range(self.threads, "parallel.threads", 0)
        check_range(self.bucket_cap_mb, "parallel.bucket_cap_mb", 0, open_low=True)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run depends on."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
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
        return yaml.dump(plain(asdict(self)), Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Quotes text such as 1e-3, which is a number to the parser but not to PyYAML."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*\.?\d*[eE][-+]?\d+"), list("-+0123456789")
)


def plain(value: Any) -> Any:
    """Return nested tuples as lists, for YAML and JSON."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value
