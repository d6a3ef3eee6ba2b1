"""gmscale shards build: a folder of images, or other shards -> shards in a shuffled order.

Which sample stands in which shard follows from the sorted names and the seed, so the bytes are the same for any
number of workers and whether or not the build was interrupted.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import PIL

from gmscale.data.faults import ImageError
from gmscale.data.index import open_index
from gmscale.data.tars.writer import open_shard
from gmscale.errors import RunError, UsageError, check_choice, check_range
from gmscale.shards import listing, reshard
from gmscale.shards.items import Item, read
from gmscale.shards.journal import Finished, Journal, Skipped, locked
from gmscale.shards.layout import Layout, Shard
from gmscale.shards.listing import Listing
from gmscale.shards.manifest import read_info, write_info, write_lists
from gmscale.shards.processes import spread
from gmscale.shards.recode import Recipe, recode

# What may stand in the names of shards: nothing that a shell, a URL or a brace pattern would read otherwise.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_REPORT_EVERY = 20  # images

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """What to build; the fields are the arguments of the command."""

    source: str
    out: Path
    split: str = "train"
    samples_per_shard: int = 1000
    seed: int = 0
    workers: int = 0
    recipe: Recipe = field(default_factory=Recipe)
    classes: Path | None = None
    labels: Path | None = None
    label: str = "cls"
    on_bad: str = "stop"
    name: str | None = None

    def __post_init__(self) -> None:
        check_range(self.samples_per_shard, "--samples_per_shard", 1, whole=True)
        check_range(self.seed, "--seed", 0, 2**63 - 1, whole=True)
        check_range(self.workers, "--workers", 0, whole=True)
        check_choice(self.on_bad, ("stop", "skip"), "--on_bad")
        for option, word in (("--split", self.split), ("--name", self.name)):
            if word is not None and not _NAME.fullmatch(word):
                raise UsageError(f"{option} is {word!r}; expected letters, digits and _ . -")
        # timm takes such a name for a file pattern.
        if "tar" in self.split or ".." in self.split:
            raise UsageError(f"--split is {self.split!r}; timm needs a name without 'tar' and '..'")


@dataclass
class Summary:
    """What a build came to."""

    name: str
    samples: int = 0
    shards: int = 0
    kept: int = 0
    """Shards that an earlier start had completed."""
    bytes: int = 0
    images: int = 0
    """Source images taken up by this start."""
    seconds: float = 0.0
    classes: int = 0
    unused: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)


class _Task(NamedTuple):
    """One shard, for a worker."""

    path: Path
    keys: list[str]
    items: list[Item]
    recipe: Recipe
    skip: bool


def build(options: Options, progress: Progress = lambda done, total: None) -> Summary:
    """Build the shards that are missing and the files beside them; `progress` hears images done and in all.

    One that was stopped or failed leaves complete shards, which the next start with equal options keeps.
    """
    out = options.out
    with ExitStack() as stack:
        if new := not out.exists():
            # Not made before the source is known to be good: a mistake should leave nothing.
            info = {}
        else:
            stack.enter_context(locked(out))
            info = read_info(out)
        name = _name(options, info)
        found = _find(options, _pinned_classes(options, info))
        if not len(found):
            passed = ", ".join(f"{count} {kind}" for kind, count in found.ignored.most_common(4)) or "nothing"
            raise UsageError(
                f"{found.root} holds no images ({', '.join(listing.EXTENSIONS)}); passed over: {passed}"
            )
        if new:
            stack.enter_context(locked(out))
            if read_info(out):
                raise UsageError(f"{out} has just been made by another build; start again")
        try:
            return _build(options, name, found, info, progress)
        except OSError as error:
            raise RunError(
                f"{error.filename or out}: {error.strerror or error}; complete shards stay, and the same command "
                "goes on from there"
            ) from error


def _build(options: Options, name: str, found: Listing, info: dict[str, Any], progress: Progress) -> Summary:
    out, split = options.out, options.split
    layout = Layout(f"{name}-{split}", len(found), options.samples_per_shard, options.seed)
    journal = _open_journal(options, info, name, found, layout)
    done = {shard for shard in layout.names if _is_done(journal.finished.get(shard), options)}

    summary = Summary(name, kept=len(done), classes=len(found.classes), unused=found.unused, ignored=found.ignored)
    before = sum(len(shard.keys) for shard in layout if shard.name in done)
    progress(before, len(found))
    began = time.monotonic()
    tasks = (_task(shard, found, options) for shard in layout if shard.name not in done)
    workers = min(options.workers, len(layout.names) - len(done))
    try:
        with closing(spread(build_shard, tasks, workers)) as messages:
            for message in messages:
                if isinstance(message, Finished):
                    journal.add(message)
                else:
                    summary.images += message
                    progress(before + summary.images, len(found))
    finally:
        _remove_unfinished(options, name)  # of workers that had to be killed
    summary.seconds = time.monotonic() - began

    entries = [journal.finished[shard] for shard in layout.names]
    summary.skipped.update(skipped.reason for entry in entries for skipped in entry.skipped)
    shards = [entry for entry in entries if entry.samples]
    summary.shards, summary.samples = len(shards), sum(entry.samples for entry in shards)
    summary.bytes = sum(entry.bytes for entry in shards)
    if not shards:
        raise RunError(f"{found.root}: not one of {len(found)} images can be used, such as {entries[0].skipped[0]}")
    write_lists(out, split, layout, found.names, entries)
    journal.close_with(entries)
    write_info(out, split, name, shards, found.classes, info)
    for built in reshard.open_given(str(out), split):
        open_index(built)  # what every training would wait for once
    return summary


def build_shard(task: _Task) -> Iterator[int | Finished]:
    """Write one shard; yield the number of images taken up since the last time, and in the end what it came to."""
    skipped: list[Skipped] = []
    taken = 0
    with open_shard(task.path) as shard:
        for key, item in zip(task.keys, task.items, strict=True):
            try:
                image, others = read(item)
                extension, encoded = recode(image, task.recipe)
            except ImageError as error:
                if not task.skip:
                    raise RunError(
                        f"{item.path if item.offset is None else item.name}: {error.reason}: {error}; "
                        "--on_bad skip leaves such images out and goes on from here"
                    ) from None
                skipped.append(Skipped(item.name, error.reason, " ".join(str(error).split())))
            else:
                shard.add({"__key__": key, **others, extension: encoded, "cls": str(item.label)})
            taken += 1
            if taken == _REPORT_EVERY:
                yield taken
                taken = 0
    if not shard.stats.count:
        task.path.unlink()  # readers take a shard without samples for damage
    yield taken
    came = shard.stats
    yield Finished(task.path.name, came.count, came.bytes, came.sha256, tuple(skipped))


def _name(options: Options, info: dict[str, Any]) -> str:
    name = options.name or info.get("name") or options.out.resolve().name
    if name != info.get("name", name):
        raise UsageError(f"--name is {name!r}; {options.out / '_info.json'} says {info['name']!r}")
    if not _NAME.fullmatch(name):
        raise UsageError(f"OUT is called {name!r}, which is no name for shards; give them one with --name")
    return name


def _pinned_classes(options: Options, info: dict[str, Any]) -> list[str] | None:
    """Return the classes that are given by --classes or by the splits that OUT has already."""
    pinned = listing.read_classes(options.classes) if options.classes else None
    others = set(info.get("splits", {})) - {options.split}
    if not others:
        return pinned
    path, known = options.out / "_info.json", info.get("classes")
    if known is None and pinned is None:
        raise UsageError(f"{path} has split {min(others)!r} but no classes; give them in order with --classes FILE")
    if known is not None and pinned is not None and pinned != known:
        raise UsageError(f"--classes {options.classes} differs from the classes in {path}")
    return known or pinned


def _find(options: Options, pinned: list[str] | None) -> Listing:
    if reshard.is_shards(options.source):
        if options.labels:
            raise UsageError("--labels is for images; shards have their labels in them")
        found = reshard.list_samples(options.source, options.split, options.label, options.workers, pinned)
        if options.out.resolve() == found.root.resolve():
            raise UsageError(f"OUT {options.out} is where the shards of SOURCE are; choose another directory")
        return found
    root = listing.find_folder(Path(options.source), options.split, options.labels is not None)
    if options.out.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"OUT {options.out} lies in the images of {root}; choose a directory outside")
    if options.labels is not None:
        return listing.by_table(root, options.labels, pinned)
    return listing.by_directory(root, pinned)


def _task(shard: Shard, found: Listing, options: Options) -> _Task:
    items = [found.item(i) for i in shard.samples]
    return _Task(options.out / shard.name, shard.keys, items, options.recipe, options.on_bad == "skip")


def _open_journal(options: Options, info: dict[str, Any], name: str, found: Listing, layout: Layout) -> Journal:
    out, split = options.out, options.split
    path = out / f"_build-{split}.jsonl"
    if not path.exists():
        if split in info.get("splits", {}):
            raise UsageError(f"{out} has a split {split!r} from elsewhere; choose another --split or OUT")
        present = next((shard for shard in layout.names if (out / shard).exists()), None)
        if present:
            raise UsageError(f"{out / present} exists, but no {path.name}; choose another --name or OUT")
    _remove_unfinished(options, name)
    plan = {
        "name": name,
        "samples_per_shard": options.samples_per_shard,
        "seed": options.seed,
        **asdict(options.recipe),
        # Another Pillow may encode the same pixels differently.
        "Pillow": PIL.__version__ if options.recipe.encodes else None,
        "images": len(found),
        "source (names, sizes, labels)": found.digest(),
    }
    return Journal(path, plan)


def _remove_unfinished(options: Options, name: str) -> None:
    for pattern in (f".{name}-{options.split}-*.tar", f"._*-{options.split}.*", "._info.json"):
        for path in options.out.glob(f"{pattern}.*.tmp"):
            path.unlink(missing_ok=True)


def _is_done(entry: Finished | None, options: Options) -> bool:
    if entry is None or (entry.skipped and options.on_bad == "stop"):
        return False
    try:
        return not entry.samples or (options.out / entry.shard).stat().st_size == entry.bytes
    except OSError:
        return False
