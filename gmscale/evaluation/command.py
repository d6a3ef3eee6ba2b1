"""The command line of gmscale evaluate: models measured one after another, and one page about them."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import nn

from gmscale import parallel, robustness, scorecards
from gmscale.data import StreamValLoader, ValLoader
from gmscale.errors import UsageError
from gmscale.evaluation import options
from gmscale.evaluation.attacks import Attack
from gmscale.evaluation.measurement import Measurement
from gmscale.evaluation.opening import Opened, group_of, opened
from gmscale.evaluation.options import SALIENCY_IMAGES, Request, home
from gmscale.evaluation.saliency.gallery import NAME as GALLERY
from gmscale.evaluation.saliency.gallery import write_gallery
from gmscale.evaluation.saliency.measurement import Saliency
from gmscale.evaluation.scorecard import Scorecard, entry_of
from gmscale.evaluation.subject import Subject
from gmscale.parallel import World
from gmscale.progress import Meter
from gmscale.report import write_scorecards
from gmscale.tracking import plain_console

InWorld = Callable[[Any, Callable[[Any], int]], int]


def main(argv: list[str], in_world: InWorld) -> int:
    """Measure what is asked for, show it and write the page; `in_world` runs a function in the process group."""
    request = options.parse(argv)
    groups = [group_of(name) for name in (*request.models, *request.baselines)]
    # every rank has the whole model, however it was trained
    return in_world(groups[0], lambda world: _Evaluation(request, world).run())


class _Prepared(NamedTuple):
    """A model that can be measured."""

    subject: Subject
    asked: list[Measurement]
    card: Scorecard | None
    """None but on the main rank."""
    missing: list[Measurement]
    """Of those asked for, what the scorecard does not have yet."""


@dataclass
class _Evaluation:
    """The models of one command."""

    request: Request
    world: World
    console: Console = field(default_factory=plain_console)
    _surrogates: dict[str, Opened] = field(default_factory=dict)

    def run(self) -> int:
        began = time.monotonic()
        names = [*self.request.baselines, *self.request.models]
        for name in names[1:]:
            self._prepared(name)  # a mistake in the last of them is found before minutes of measuring the others
        for name in names:
            self._one(name)
        if self.world.is_main:
            if self.request.page is not None:
                cards, baselines = (
                    [self._card_path(name) for name in group]
                    for group in (self.request.models, self.request.baselines)
                )
                self._say(f"page: {write_scorecards(cards, baselines, self.request.page)}")
            self._say(f"{len(names)} {'model' if len(names) == 1 else 'models'}, {time.monotonic() - began:.0f} s")
        return 0

    def _one(self, name: str) -> None:
        subject, asked, card, missing = self._prepared(name)
        if card is not None:
            self._say(f"{name}: {_which(card.content)}, {len(missing)} of {len(asked)} results to measure")
        left_out = self._measure(subject, card, missing)
        self._draw_gallery(name, subject, asked, anew=any(isinstance(what, Saliency) for what in missing))
        if card is not None:
            for table in _tables(card.content, [what for what in asked if what not in left_out]):
                self._say(table)
            for sentence in robustness.warnings(card.content.get("attacks", [])):
                self._say(sentence)
            self._say(str(self._card_path(name)))

    def _prepared(self, name: str) -> "_Prepared":
        """Open a model and find out what is to be measured of it; a collective.

        Raises UsageError for what is known to fail.
        """
        found = opened(name, self.request.source, self.world)
        torch.set_float32_matmul_precision(found.config.run.matmul_precision)
        subject = Subject(_ready(found, self.world), found.config, found.loader, self.world, found.classes)
        asked = list(dict.fromkeys(self._asked(found)))
        surrogate = self._surrogate(found) if any(map(_is_transfer, asked)) else None
        if surrogate is not None:
            subject = replace(subject, surrogates=(_ready(surrogate, self.world),))
            digest = str(surrogate.about["sha256"])[:12]
            asked = [replace(what, surrogate=digest) if _is_transfer(what) else what for what in asked]  # type: ignore[call-arg]
        card, missing = None, asked
        with parallel.together(self.world):
            if self.world.is_main:
                card = Scorecard(self._card_path(name), found.about)
                missing = [what for what in asked if not card.has(what)]
                _check_writable(self._card_path(name).parent)
        missing = parallel.of_all_ranks(missing, self.world)[0]
        for what in missing:
            what.check(subject)
        return _Prepared(subject, asked, card, missing)

    def _asked(self, found: Opened) -> Iterator[Measurement]:
        """Yield what this model is measured on: of everything, what it can be."""
        for what in self.request.measurements:
            if self.request.everything and what.trains and "model" in found.about:
                continue  # a model without a run comes with images to be measured on alone
            if _is_transfer(what) and self._surrogate(found) is None:
                continue  # the only baseline, measured for itself
            yield self._as_many_as_there_are(what, found.loader)

    def _as_many_as_there_are(self, what: Measurement, loader: ValLoader | StreamValLoader) -> Measurement:
        """Return a measurement of all images where there are no more, or no part can be taken.

        No result shall be said to be of more images than there are. Raises UsageError for a part of a stream.
        """
        images = getattr(what, "images", None)
        if images is None:
            return what
        if isinstance(loader, StreamValLoader):
            if not (self.request.everything or (isinstance(what, Saliency) and images == SALIENCY_IMAGES)):
                raise UsageError(
                    f"{what.words}: a part of the images needs data.access index; this run's is stream"
                )
        elif images < len(loader.index):
            return what
        return replace(what, images=None)  # type: ignore[call-arg]

    def _measure(
        self, subject: Subject, card: Scorecard | None, missing: Sequence[Measurement]
    ) -> list[Measurement]:
        """Measure and keep; return what of everything could not be measured of this model."""
        left_out: list[Measurement] = []
        for number, what in enumerate(missing, 1):
            self.world.heartbeat.at("evaluation")
            self._say(f"[{number}/{len(missing)}] {what.words}")
            try:
                with _progress(what, self.world) as progress:
                    values = what.measure(replace(subject, progress=progress))
            except UsageError as error:
                if not self.request.everything:
                    raise
                self._say(f"left out: {what.words}: {error}")
                left_out.append(what)
                continue
            with parallel.together(self.world):
                if card is not None:
                    card.add(what, values)
        return left_out

    def _surrogate(self, found: Opened) -> Opened | None:
        """Return the baseline that attacks on this model are made on: of another seed where there is one.

        So a model and the baseline of its seed meet the same images; None if there is no other baseline.
        """
        others = [name for name in self.request.baselines if name != found.name]
        for name in others:
            if name not in self._surrogates:
                self._surrogates[name] = opened(name, self.request.source, self.world)
            other = self._surrogates[name]
            if other.config.data.image_size != found.config.data.image_size or len(other.classes) != len(
                found.classes
            ):
                raise UsageError(
                    f"{name} has other images or classes than {found.name}; expected a --baseline of its task"
                )
            if other.about["seed"] != found.about["seed"]:
                return other
        return self._surrogates[others[0]] if others else None

    def _draw_gallery(self, name: str, subject: Subject, asked: Sequence[Measurement], *, anew: bool) -> None:
        folder = self._card_path(name).parent / "gallery"
        methods = [what.method for what in asked if isinstance(what, Saliency)]
        here = parallel.of_all_ranks((folder / GALLERY).exists(), self.world)[0]
        if not (self.request.gallery and methods and (anew or not here)):
            return
        if isinstance(subject.loader, StreamValLoader):
            self._say("no gallery: its images are a part of the split, which needs data.access index")
        else:
            self._say(f"gallery of {self.request.gallery} images")
            write_gallery(subject, folder, methods, self.request.gallery, self.request.boxes)

    def _card_path(self, name: str) -> Path:
        return self.request.out or home(name) / scorecards.NAME

    def _say(self, what: str | Table) -> None:
        if self.world.is_main:
            self.console.print(what, highlight=False, markup=False, soft_wrap=True)


def _ready(found: Opened, world: World) -> nn.Module:
    model = found.model.requires_grad_(False).to(world.device)
    return model.to(memory_format=torch.channels_last) if found.config.model.channels_last else model


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"no scorecard can be written in {folder}: {error.strerror or error}; name another file with --out"
        ) from None


def _is_transfer(what: Measurement) -> bool:
    return isinstance(what, Attack) and what.attack == "transfer"


@contextmanager
def _progress(what: Measurement, world: World) -> Iterator[Callable[[int, int], None]]:
    """Show, on the main rank, how far a measurement is; the others' shares are as large."""
    if not world.is_main:
        yield lambda done, total: None
        return
    with Meter(what.words) as meter:
        yield meter.show


def _tables(card: Mapping[str, Any], measurements: Sequence[Measurement]) -> Iterator[Table]:
    """Yield one table a section and kind of measurement."""
    by_kind: defaultdict[tuple[str, str], list[Measurement]] = defaultdict(list)
    for what in measurements:
        by_kind[what.section, type(what).__name__].append(what)
    for (section, _), asked in by_kind.items():
        table = Table(box=SIMPLE)
        table.add_column(section, no_wrap=True)
        for heading, _ in asked[0].shown.values():
            table.add_column(heading, justify="right", no_wrap=True)
        for what in asked:
            found = entry_of(card, what)
            assert found is not None
            values = [(found.get(name), form) for name, (_, form) in what.shown.items()]
            table.add_row(what.words, *("-" if value is None else format(value, form) for value, form in values))
        yield table


def _which(card: Mapping[str, Any]) -> str:
    averaged = "averaged" if card["weights"] == "ema" else "plain"
    return (
        f"{averaged} weights of {'step ' + str(card['step']) if card['step'] is not None else card['checkpoint']}"
    )
