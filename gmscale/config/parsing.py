"""Strict parsing of a run's configuration.

Flags beat later files, later files beat earlier ones, files beat defaults. An unknown key is an error in every
source, and says which one was meant.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from gmscale.config.sections import TrainConfig, plain
from gmscale.errors import UsageError, check_keys, nearest

set_parsing_settings(docstring_parse_attribute_docstrings=True)

# What may differ between a run and its resumption; everything else decides the result and must be the same.
MAY_CHANGE_ON_RESUME = {
    "run": {
        "dir",
        "arm",
        "pause_after_epochs",
        "branch_from",
        "log_every",
        "eval_every_epochs",
        "save_every_steps",
        "keep_checkpoints",
        "keep_best",
        "background_save",
        "max_nonfinite",
        "wandb_project",
        "profile_steps",
        "resume",
    },
    "data": {
        "source",
        "cache_dir",
        "cache_gb",
        "workers",
        "eval_batch_size_per_device",
        "allow_pipe",
        "max_bad_share",
    },
    "parallel": {"elastic", "timeout_s", "threads"},
}

# What each step reads afresh, so that nothing in a checkpoint depends on it: what a run that branches from another
# may have of its own besides. Not seeds, by which the order of the data and the starting weights are drawn.
_OF_ANY_MASK = {
    "operator",
    "strength",
    "gate",
    "kappa",
    "sigma",
    "ratio",
    "kernel_size",
    "licnn_a",
    "licnn_b",
    "random_like",
    "norm",
    "block",
    "rescale",
    "paper_compat",
    "start",
    "end",
    "warmup",
    "cooldown",
    "ramp",
}
MAY_DIFFER_ON_BRANCH = {
    "model": {"drop_rate", "drop_path_rate"},
    "augment": {
        "crop_scale",
        "crop_ratio",
        "hflip",
        "vflip",
        "color_jitter",
        "auto_augment",
        "erase_prob",
        "erase_count",
        "mixup",
        "cutmix",
        "mix_prob",
        "mix_switch_prob",
    },
    "optim": {"lr", "min_lr", "weight_decay", "label_smoothing", "bce_threshold", "clip_grad"},
    "mask": _OF_ANY_MASK,
    "output": _OF_ANY_MASK | {"sigmas"},
}


Sections = Mapping[str, type]
"""Name -> dataclass."""


def build_parser(prog: str, extra: Sections | None = None) -> ArgumentParser:
    """Return the command-line parser whose namespace `parse` turns into a TrainConfig.

    `extra` are sections of files and flags besides those of TrainConfig, for `parse_with`.
    """
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of any of the fields below; may be repeated.")
    for section, cls in {**(extra or {}), **_sections()}.items():
        parser.add_class_arguments(cls, section)
    return parser


def parse(argv: Sequence[str], prog: str = "gmscale train", parser: ArgumentParser | None = None) -> Any:
    """Parse a command line; return (TrainConfig, namespace with any further arguments of `parser`).

    Raises UsageError, in one line, for whatever is wrong with a flag or a file.
    """
    config, _, namespace = parse_with({}, argv, parser or build_parser(prog))
    return config, namespace


def parse_with(
    extra: Sections, argv: Sequence[str], parser: ArgumentParser
) -> tuple[TrainConfig, dict[str, Any], Any]:
    """Like `parse`, with the sections that `parser` was built with; return those by name in between."""
    known = {**_sections(), **extra}
    _check_files(argv, known)
    try:
        namespace = parser.parse_args(list(argv))
        found = parser.instantiate(namespace)
    except (ArgumentError, TypeError) as error:
        raise _explained(str(error), parser, known) from None
    config = TrainConfig(**{name: found[name] for name in _sections()})
    return config, {name: found[name] for name in extra}, namespace


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Return the TrainConfig of a nested mapping such as a loaded config.yaml; strict like `parse`."""
    known = _sections()
    _check_mapping(values, "the configuration", known)
    parser = build_parser("gmscale")
    try:
        found = parser.instantiate(parser.parse_object(plain(dict(values))))
    except (ArgumentError, TypeError) as error:
        raise _explained(str(error), parser, known) from None
    return TrainConfig(**{name: found[name] for name in known})


@cache
def field_types() -> Mapping[str, Any]:
    """Return the type of every field of TrainConfig, by dotted name such as mask.strength."""
    found: dict[str, Any] = {}
    for section, cls in _sections().items():
        hints = get_type_hints(cls)
        found |= {f"{section}.{f.name}": hints[f.name] for f in fields(cls)}
    return found


def field_value(name: str, value: Any) -> Any:
    """Return `value` as the field of this dotted name holds it; strict like `parse`, but for its range."""
    section, _, field = name.partition(".")
    parser = _field_parser(name)
    try:
        return parser.parse_object({section: {field: plain(value)}})[section][field]
    except (ArgumentError, TypeError) as error:
        raise _explained(str(error), parser, _sections()) from None


def load(path: Path) -> TrainConfig:
    """Return the TrainConfig of a YAML file."""
    return parse(["--config", str(path)])[0]


def changed_on_resume(
    saved: Mapping[str, Any], now: TrainConfig, *, branches: bool = False
) -> list[tuple[str, Any, Any]]:
    """Return (field, saved value, value now) of what differs although a resumed run must keep it.

    Or, with `branches`, a run that begins at a checkpoint of the saved one.
    """
    current, defaults = plain(asdict(now)), plain(asdict(TrainConfig()))
    changes = []
    for section, values in current.items():
        for name, value in values.items():
            # a run of before a field existed did what the field's default does
            before = saved.get(section, {}).get(name, defaults[section][name])
            if before != value and not _may_change(section, name, now, branches):
                changes.append((f"{section}.{name}", before, value))
    return changes


def _may_change(section: str, name: str, now: TrainConfig, branches: bool) -> bool:
    if name == "eval_every_epochs" and (now.optim.sched == "plateau" or now.parallel.batch_norm == "reduce"):
        return False  # training follows the evaluations
    if name in MAY_CHANGE_ON_RESUME.get(section, ()):
        return True
    if name in ("lr", "min_lr") and now.optim.sched == "plateau":
        return False  # its rates are what earlier evaluations made of them
    return branches and name in MAY_DIFFER_ON_BRANCH.get(section, ())


@cache
def _field_parser(name: str) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=field_types()[name])
    return parser


def _sections() -> dict[str, type]:
    hints = get_type_hints(TrainConfig)
    return {f.name: hints[f.name] for f in fields(TrainConfig)}


def _check_files(argv: Sequence[str], known: Sections) -> None:
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            _check_file(Path(argv[i + 1]), known)
        elif argument.startswith("--config="):
            _check_file(Path(argument.removeprefix("--config=")), known)


def _check_file(path: Path, known: Sections) -> None:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        siblings = [str(path.parent / p.name) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UsageError(f"--config {path}: {error.strerror}{nearest(str(path), siblings)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    _check_mapping(values, str(path), known)


def _check_mapping(values: Any, where: str, known: Sections) -> None:
    if not isinstance(values, Mapping):
        held = "nothing" if values is None else f"a {type(values).__name__}"
        raise UsageError(f"{where} holds {held}; expected sections {', '.join(known)}")
    check_keys(values, known, where)
    for name, cls in known.items():
        if name not in values:
            continue
        section = values[name]
        if not isinstance(section, Mapping):
            raise UsageError(f"{where}: section {name} holds {section!r}; expected fields of {name}")
        check_keys(section, [f.name for f in fields(cls)], f"{where}: section {name}")


def _explained(message: str, parser: ArgumentParser, known: Sections) -> UsageError:
    """Turn a parser's message into one line with the nearest valid choice."""
    line = " ".join(message.split())
    if found := re.match(r"unrecognized arguments: (\S+)", line):
        flag = found[1].split("=")[0]
        if not flag.startswith("-"):
            return UsageError(f"unexpected argument {flag!r} (see --help)")
        flags = [s for action in parser._actions for s in action.option_strings]
        return UsageError(f"unknown flag {flag}{nearest(flag, flags)} (see --help)")
    if found := re.match(r'Parser key "([^"]+)": Expected a (.+)\. Got value: (.*)$', line):
        key, expected, value = found.groups()
        if choices := re.match(r"typing\.Literal\[(.*)\]", expected):
            options = [c.strip(" '\"") for c in choices[1].split(",")]
            return UsageError(f"{key} is {value!r}; expected one of {', '.join(options)}{nearest(value, options)}")
        wanted = _WANTED.get(expected, expected)
        return UsageError(f"{key} is {value!r}; expected {wanted}")
    either = r'Parser key "([^"]+)": .*Expected (?:a )?(\S+ \S+) - .*NoneType.*Given value: (.*)$'
    if found := re.match(either, line):
        key, expected, value = found.groups()
        return UsageError(f"{key} is {value!r}; expected {_WANTED.get(expected, expected)} or null")
    if found := re.match(r"Group '(\w+)' does not accept option '([^']+)'", line):
        check_keys([found[2]], [f.name for f in fields(known[found[1]])], f"section {found[1]}")
    return UsageError(line)


_WANTED = {
    "<class 'str'>": "text (in quotes, if it looks like a number)",
    "<class 'float'>": "a number",
    "<class 'int'>": "a whole number",
    "<class 'bool'>": "true or false",
    "<class 'tuple'>": "a list such as '[a, b]'",
    "<class 'list'>": "a list such as '[a, \"b.*\"]' (patterns with *, [ or { in quotes)",
    "<class 'dict'>": "a mapping such as '{key: value}'",
}
