"""A split of a data set: the names of its shards, where they are, and what _info.json knows about them."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from gmscale.data.config import DataConfig
from gmscale.errors import UsageError, nearest

# timm reads either.
_INFO_NAMES = ("_info.json", "info.json")
_LARGEST_INFO = 64 << 20
_MOST_SHARDS = 1 << 17
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_NUMBERED = re.compile(r"(.*?)(\d+)(\.tar)")
_PIPE = "pipe:"


class Directory(Protocol):
    """Where the files of a data set are."""

    def fetch(self, name: str, *, size: int | None = None, sha256: str | None = None) -> Path:
        """Return a complete local file; FileNotFoundError where there is none of that name."""

    def open(self, name: str) -> BinaryIO:
        """Open a file to be read once, from front to back."""

    def writable(self) -> Path | None:
        """Return the local directory if files can be put beside the shards."""

    def __str__(self) -> str:
        """The directory as the user wrote it."""


@dataclass(frozen=True)
class LocalDirectory:
    """Files that are here already: what is known of their sizes and hashes is not checked when they are fetched."""

    path: Path

    def fetch(self, name: str, *, size: int | None = None, sha256: str | None = None) -> Path:
        path = self.path / name
        os.stat(path)
        return path

    def open(self, name: str) -> BinaryIO:
        return (self.path / name).open("rb")

    def writable(self) -> Path | None:
        return self.path if os.access(self.path, os.W_OK | os.X_OK) else None

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Split:
    """Shards in their order. What _info.json does not say of every one of them is None."""

    directory: Directory
    name: str
    """The split's name in _info.json, or the pattern of file names that the user gave."""
    names: tuple[str, ...]
    """Of the shards, relative to the directory."""
    lengths: tuple[int, ...] | None
    """Samples in each shard."""
    sha256: tuple[str, ...] | None
    sizes: tuple[int, ...] | None
    """Bytes of each shard."""
    classes: list[str] | None


@dataclass(frozen=True)
class _Shard:
    """What _info.json says of one shard."""

    length: int
    sha256: str | None
    size: int | None


def open_split(config: DataConfig, split: str, root: Path | None = None) -> Split:
    """Find a split in `root`, by default in data.source.

    `split` is a name in _info.json, or names of tars with braces, of which _info.json may know the lengths.
    Whatever is wrong is a UsageError. The shards themselves are not looked for yet.
    """
    directory = _directory(config) if root is None else LocalDirectory(root)
    info = _Info.read(directory)
    known = info.splits if info else {}
    if split in known:
        names = list(known[split])
    elif ".tar" in split or split.startswith(_PIPE):
        names = expand(split)
    elif info:
        raise UsageError(f"{info.path} has no split {split!r} (it has {', '.join(known)}){nearest(split, known)}")
    else:
        raise UsageError(_no_info(directory, split))
    for name in names:
        _check_name(name, config)
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise UsageError(f"split {split!r} names {repeated[0]} twice; expected each shard once")
    facts = known.get(split) or {name: shard for shards in known.values() for name, shard in shards.items()}
    found = [facts.get(name) for name in names]

    def column(get: Callable[[_Shard], Any]) -> tuple[Any, ...] | None:
        values = [get(shard) if shard else None for shard in found]
        return None if None in values else tuple(values)

    return Split(
        directory=directory,
        name=split,
        names=tuple(names),
        lengths=column(lambda shard: shard.length),
        sha256=column(lambda shard: shard.sha256),
        sizes=column(lambda shard: shard.size),
        classes=info.classes if info else None,
    )


def expand(pattern: str) -> list[str]:
    """Return the names that a pattern stands for: braces as in bash and webdataset, '{0000..1023}' or '{a,b}'."""
    from braceexpand import braceexpand  # what webdataset uses

    for first, last in _RANGE.findall(pattern):
        if abs(int(last) - int(first)) >= _MOST_SHARDS:
            raise UsageError(f"{pattern!r} stands for too many shards; expected at most {_MOST_SHARDS}")
    try:
        names = list(islice(braceexpand(pattern), _MOST_SHARDS + 1))
    except ValueError:
        raise UsageError(
            f"{pattern!r} has unbalanced braces; expected such as 'train-{{0000..1023}}.tar'"
        ) from None
    if len(names) > _MOST_SHARDS:
        raise UsageError(f"{pattern!r} stands for too many shards; expected at most {_MOST_SHARDS}")
    return names


def collapse(names: Iterable[str]) -> Iterator[str]:
    """Yield a pattern for each run of numbered tars among `names`, longest first; the inverse of expand."""
    runs: dict[tuple[str, int], list[str]] = {}
    for name in sorted(names):
        if match := _NUMBERED.fullmatch(name):
            runs.setdefault((match[1], len(match[2])), []).append(match[2])
    for (prefix, _), numbers in sorted(runs.items(), key=lambda run: -len(run[1])):
        if int(numbers[-1]) - int(numbers[0]) == len(numbers) - 1:
            yield (
                f"{prefix}{{{numbers[0]}..{numbers[-1]}}}.tar" if len(numbers) > 1 else f"{prefix}{numbers[0]}.tar"
            )


def _directory(config: DataConfig) -> Directory:
    if config.source.startswith(("http://", "https://", "s3://")):
        from gmscale.data.remote.directory import RemoteDirectory

        return RemoteDirectory(config.source, Path(config.cache_dir) / "shards", config.cache_gb)
    path = Path(config.source)
    if not path.is_dir():
        raise UsageError(f"data.source: {path} is not a directory; expected 'embedded' or a directory of shards")
    return LocalDirectory(path)


@dataclass(frozen=True)
class _Info:
    """A checked _info.json: of each split, the shards by name."""

    path: str
    splits: dict[str, dict[str, _Shard]]
    classes: list[str] | None

    @classmethod
    def read(cls, directory: Directory) -> "_Info | None":
        for name in _INFO_NAMES:
            path = f"{directory}/{name}"
            try:
                with directory.fetch(name).open("rb") as file:
                    content = file.read(_LARGEST_INFO + 1)
                if len(content) > _LARGEST_INFO:
                    raise ValueError(f"it is larger than {_LARGEST_INFO} bytes")
                info = json.loads(content)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, RecursionError) as error:
                raise UsageError(f"{path} cannot be read: {error}") from None
            return cls._checked(path, info)
        return None

    @classmethod
    def _checked(cls, path: str, info: Any) -> "_Info":
        try:
            entries = {
                name: (entry["filenames"], entry["shard_lengths"], entry.get("sha256"), entry.get("bytes"))
                for name, entry in info["splits"].items()
            }
        except (AttributeError, KeyError, TypeError):
            raise UsageError(f"{path} needs 'filenames' and 'shard_lengths' for each of its 'splits'") from None
        splits = {}
        for split, (names, lengths, hashes, sizes) in entries.items():
            where = f"{path}: split {split!r}"
            _check_list(names, "filenames", where, _is_text, "names")
            _check_list(lengths, "shard_lengths", where, _is_count, "whole numbers from 0")
            if not names or len(names) != len(lengths):
                raise UsageError(f"{where} has {len(names)} filenames and {len(lengths)} shard_lengths")
            for field, values, check, kind in (
                ("sha256", hashes, _is_hash, "64 hexadecimal digits each"),
                ("bytes", sizes, _is_count, "whole numbers from 0"),
            ):
                if values is not None:
                    _check_list(values, field, where, check, kind)
                    if len(values) != len(names):
                        raise UsageError(f"{where} has {len(names)} filenames and {len(values)} {field}")
            unknown = [None] * len(names)
            rows = zip(names, lengths, hashes or unknown, sizes or unknown, strict=True)
            splits[split] = {name: _Shard(length, sha256, size) for name, length, sha256, size in rows}
            if len(splits[split]) != len(names):
                repeated = Counter(names).most_common(1)[0][0]
                raise UsageError(f"{where} names {repeated} twice; expected each shard once")
        classes = info.get("classes")
        if classes is not None:
            _check_list(classes, "classes", path, _is_text, "names")
            if not classes:
                raise UsageError(f"{path} lists no classes; leave 'classes' out to number them")
        return cls(path, splits, classes)


def _check_list(values: Any, field: str, where: str, check: Callable[[Any], bool], kind: str) -> None:
    if not isinstance(values, list):
        raise UsageError(f"{where} has {field!r} that is not a list; expected {kind}")
    for value in values:
        if not check(value):
            raise UsageError(f"{where} has {str(value)[:60]!r} among its {field}; expected {kind}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _check_name(name: str, config: DataConfig) -> None:
    """Refuse names that lead out of the directory, whoever wrote them, and commands that were not allowed."""
    if name.startswith(_PIPE):
        if config.access != "stream" or not config.allow_pipe:
            raise UsageError(
                f"{name!r} would run a shell command; that takes data.access stream and data.allow_pipe true"
            )
    elif "://" in name:
        raise UsageError(f"{name!r} is an address; give its directory as data.source and name the file only")
    elif name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
        raise UsageError(f"{name!r} is not a name within data.source; expected one without '..' or a leading '/'")


def _no_info(directory: Directory, split: str) -> str:
    text = (
        f"{directory}/_info.json is missing, which lists the shards and sample counts of split {split!r} for timm"
    )
    if isinstance(directory, LocalDirectory):
        patterns = _by_likeness(list(collapse(path.name for path in directory.path.glob("*.tar"))), split)
        if patterns:
            return f"{text}; without it, name the shards, such as {patterns[0]!r}"
        return f"{text}, and {directory} holds no numbered tars"
    return f"{text}; without it, name the shards, such as '{split}-{{0000..0063}}.tar'"


def _by_likeness(patterns: Sequence[str], split: str) -> list[str]:
    """Sort patterns that hold the split's name, or its beginning, before the others."""
    return sorted(patterns, key=lambda pattern: (split not in pattern, split[:3] not in pattern))
