"""What is to be built: the images of a folder, with a class for each."""

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmscale.data.faults import Reason
from gmscale.errors import UsageError, nearest
from gmscale.shards.items import Item

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".png", ".webp")
_NUMBER = re.compile("[0-9]+")
# What the first cell of a table's headings is called.
_HEADINGS = {"file", "files", "filename", "file_name", "image", "imageid", "image_id", "name", "path", "id"}
SPLITS = ("train", "training", "val", "valid", "validation", "test")

# Most of the time goes to waiting where directories are on a network.
_THREADS = 16


@dataclass(frozen=True)
class Listing:
    """Every image in the order of names; arrays have one entry an image."""

    root: Path
    names: list[str]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: list[str]
    ignored: Counter[str] = field(default_factory=Counter)
    """What was passed over: number of files by kind."""
    unused: list[str] = field(default_factory=list)
    """Classes without an image."""
    shards: Sequence[str] = ()
    """Where the images are in shards: the paths of those."""
    shard: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    offsets: NDArray[np.int64] | None = None
    """Byte of its shard at which a sample begins."""
    faults: dict[int, tuple[Reason, str]] = field(default_factory=dict)
    """Samples that are known to be bad."""

    def __len__(self) -> int:
        return len(self.names)

    def item(self, i: int) -> Item:
        """Return where the bytes of image `i` are."""
        name, size, label = self.names[i], int(self.sizes[i]), int(self.labels[i])
        if self.offsets is None:
            return Item(name, os.path.join(self.root, name), size, label)
        return Item(name, self.shards[self.shard[i]], size, label, int(self.offsets[i]), self.faults.get(int(i)))

    def digest(self) -> str:
        """SHA-256 of names, sizes, labels and classes: equal where the shards will be equal."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        digest.update("\0".join(self.names).encode("utf-8", "surrogateescape"))
        for array in (self.sizes, self.labels):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()


def find_folder(source: Path, split: str, labelled: bool) -> Path:
    """Return SOURCE, or SOURCE/SPLIT where that is the folder of one split among several."""
    if not source.is_dir():
        raise UsageError(f"{source} is not a directory of images or shards")
    directories = {entry.name for entry in _entries(source) if entry.is_dir() and not entry.name.startswith(".")}
    if labelled:
        return source / split if split in directories else source
    # A class may be called train, too; but it holds images, not directories, and stands among other classes.
    names = {split, *SPLITS}
    splits = sorted(name for name in directories & names if directories <= names or _has_directory(source / name))
    if split in splits:
        return source / split
    if splits:
        # Taken for classes, they would become labels.
        found = ", ".join(f"{name}/" for name in splits)
        raise UsageError(f"{source} holds {found} but no {split}/; give one of them as SOURCE or as --split")
    return source


def by_directory(root: Path, pinned: Sequence[str] | None) -> Listing:
    """List a folder whose sub-directories are classes, in the order of `pinned` or of their names."""
    classes, ignored = [], Counter[str]()
    for entry in _entries(root):
        if entry.name.startswith("."):
            ignored["hidden"] += 1
        elif entry.is_dir():
            classes.append(entry.name)
        else:
            ignored["outside of the class directories" if _is_image(entry.name) else _kind(entry.name)] += 1
    if not classes:
        raise UsageError(f"{root} has no class directories; images without them need --labels FILE")
    classes = in_order(classes)
    number = {name: i for i, name in enumerate(pinned or classes)}
    for name in classes:
        if name not in number:
            raise UsageError(f"{root / name}: {unknown_class(name, number)}")
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(classes, pool.map(lambda name: _walk(root, name), classes), strict=True))
    names, sizes, labels = [], [], []
    for name, (files, passed) in found.items():
        ignored.update(passed)
        for path, size in files:
            names.append(path)
            sizes.append(size)
            labels.append(number[name])
    return _listing(root, names, sizes, labels, list(number), ignored)


def by_table(root: Path, table: Path, pinned: Sequence[str] | None) -> Listing:
    """List the images that `table` names, with their classes: rows FILE, CLASS.

    CSV is divided by commas, TSV by tabs, TXT by what its first line has of tab, comma, blank. A file may be named
    without its extension. Where the classes are pinned, a row may give a class by number. Kaggle's table of the
    validation images of ImageNet is known.
    """
    files, ignored = _walk(root, "")
    size_of = dict(files)
    stems: dict[str, list[str]] = {}
    for name in size_of:
        stems.setdefault(os.path.splitext(name)[0], []).append(name)
    rows: dict[str, str] = {}
    for line, (file, label) in _rows(table):
        if line == 1 and file.lower() in _HEADINGS and file not in stems:
            continue
        meant = [file] if file in size_of else sorted(stems.get(file, [file]))
        if len(meant) > 1:
            raise UsageError(
                f"{table}, line {line}: {file} may be {' or '.join(meant[:3])}; expected the whole name"
            )
        name = meant[0]
        if name in rows:
            raise UsageError(f"{table}, line {line}: {file} has a line already")
        rows[name] = label
    missing = [name for name in rows if name not in size_of]
    if len(missing) == len(rows):
        found = f"it has {len(size_of)} images, such as {min(size_of)}" if size_of else "it has no images"
        example = f", such as {missing[0]}" if missing else ""
        raise UsageError(f"{table}: none of its {len(rows)} files{example}, is in {root} ({found})")
    ignored["without a line in --labels"] += len(size_of) - (len(rows) - len(missing))
    classes = pinned or in_order(set(rows.values()))
    if not pinned and all(_NUMBER.fullmatch(name) for name in classes):
        _check_numbers(table, classes)
    number = {name: i for i, name in enumerate(classes)}
    for label in sorted(set(rows.values()) - number.keys()):
        if not (pinned and _NUMBER.fullmatch(label) and int(label) < len(pinned)):
            raise UsageError(f"{table}: {unknown_class(label, number)}")
    labels = [number[label] if label in number else int(label) for label in rows.values()]
    sizes = [size_of.get(name, -1) for name in rows]
    return _listing(root, list(rows), sizes, labels, list(number), +ignored)


def in_order(classes: Iterable[str]) -> list[str]:
    """Return class names sorted: numbers by value, anything else by its letters."""
    names = sorted(classes)
    return sorted(names, key=int) if all(map(_NUMBER.fullmatch, names)) else names


def _check_numbers(table: Path, classes: Sequence[str]) -> None:
    """Raise UsageError unless the numbers that name the classes are those that they will get."""
    for expected, name in enumerate(classes):
        if int(name) != expected:
            raise UsageError(
                f"{table}: its classes are the numbers {classes[0]} to {classes[-1]}, without {expected}; expected "
                "0, 1, 2 and so on, or the names of all classes in order with --classes FILE"
            )


def read_classes(path: Path) -> list[str]:
    """Return the class names in a file, one a line."""
    names = [line.strip() for line in _text(path).splitlines()]
    names = [name for name in names if name]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated or not names:
        raise UsageError(f"{path}: {f'class {repeated[0]!r} comes twice' if repeated else 'no class in it'}")
    return names


def _listing(
    root: Path, names: list[str], sizes: list[int], labels: list[int], classes: list[str], ignored: Counter[str]
) -> Listing:
    for name in names:
        if "\n" in name or "\r" in name:
            raise UsageError(f"{root}: the file name {name!r} holds a line break")
    order = sorted(range(len(names)), key=names.__getitem__)
    label = np.array(labels, dtype=np.int64)[order]
    used = set(label.tolist())
    return Listing(
        root=root,
        names=[names[i] for i in order],
        sizes=np.array(sizes, dtype=np.int64)[order],
        labels=label,
        classes=classes,
        ignored=ignored,
        unused=[name for i, name in enumerate(classes) if i not in used],
    )


def _walk(root: Path, below: str) -> tuple[list[tuple[str, int]], Counter[str]]:
    """Return path and size of every image in `root / below`, at any depth, and what was passed over.

    Links are followed. A size costs one system call, once for each image, and is -1 for a broken link.
    """
    files: list[tuple[str, int]] = []
    ignored = Counter[str]()
    waiting = [(below, frozenset[tuple[int, int]]())]
    while waiting:
        directory, above = waiting.pop()
        place = root / directory
        status = place.stat()
        if (status.st_dev, status.st_ino) in above:
            raise UsageError(f"{place} is a link to a directory above it")
        above |= {(status.st_dev, status.st_ino)}
        for entry in _entries(place):
            path = os.path.join(directory, entry.name)
            if entry.name.startswith("."):
                ignored["hidden"] += 1
            elif entry.is_dir():
                waiting.append((path, above))
            elif not entry.is_file() and not entry.is_symlink():
                ignored["no file"] += 1  # reading a named pipe would never end
            elif _is_image(entry.name):
                try:
                    files.append((path, entry.stat().st_size))
                except OSError:
                    files.append((path, -1))
            else:
                ignored[_kind(entry.name)] += 1
    return files, ignored


def _entries(directory: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            yield from entries
    except OSError as error:
        raise UsageError(f"{directory} cannot be listed: {error.strerror}") from None


def _rows(table: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield line number, file and class of each line that is not blank."""
    lines = _text(table).splitlines()
    first = lines[0] if lines else ""
    in_text = next((mark for mark in "\t," if mark in first), " ")
    delimiter = {".csv": ",", ".tsv": "\t", ".txt": in_text}.get(table.suffix.lower())
    if delimiter is None:
        raise UsageError(f"--labels {table}: expected a .csv, .tsv or .txt file")
    cells: Iterable[list[str]] = (line.rsplit(None, 1) for line in lines)
    if delimiter != " ":
        cells = csv.reader(lines, delimiter=delimiter)
    kaggle = False
    for number, row in enumerate(cells, 1):
        if not row:
            continue
        if len(row) != 2 or not row[0].strip() or not row[1].strip():
            raise UsageError(f"{table}, line {number}: {lines[number - 1][:60]!r}; expected FILE and CLASS")
        file, label = row[0].strip(), row[1].strip()
        if number == 1:
            kaggle = (file, label) == ("ImageId", "PredictionString")  # the class and the boxes of its objects
        yield number, (file.removeprefix("./"), label.split()[0] if kaggle else label)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _has_directory(path: Path) -> bool:
    return any(entry.is_dir() and not entry.name.startswith(".") for entry in _entries(path))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _kind(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without extension"


def unknown_class(name: str, known: Iterable[str]) -> str:
    """Return the words for a class that is not among those expected."""
    known = list(known)
    return f"unknown class {name!r}; expected one of the {len(known)} given{nearest(name, known)}"
