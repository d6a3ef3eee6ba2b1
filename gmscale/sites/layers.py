"""Which layers the site `output` masks, and where their outputs hold channels, positions and tokens.

The axis of the channels is never guessed from sizes. It follows from the type of the module (convolutions and
2d norms: NCHW; linear layers and LayerNorm: last), for an activation from its neighbours, for a block or stage
from what it is made of or from what timm says of its model (`output_fmt`, NCHW where absent). What these do not
decide, and what the sizes contradict, is an error that says how to name the layout.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from torch import nn

from gmscale.errors import UsageError, check_range, nearest
from gmscale.masking import GradientMask
from gmscale.sites.selection import clean_name

SMALLEST_MAP = 7
"""Maps with fewer rows or columns pass through (METHOD.md)."""

Channels = Literal["first", "last"]

_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
_FIRST_BY_NAME = re.compile("(Norm|Pool).*2d")
_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
_ACTIVATION_PACKAGES = ("torch.nn.modules.activation", "timm.layers.activations", "timm.layers.activations_me")
# In these packages, but no activations: they weight others, or are whole attention layers.
_GATES = re.compile("(Hard|Log)?[Ss]igmoid(Me)?|Tanh|(Log)?Soft(max|min)(2d)?|MultiheadAttention")
_SUFFIX = re.compile(r"(NCHW|NHWC)|(\d+)x(\d+)(?:\+(\d+))?")


class Geometry(NamedTuple):
    """Where one output [N, ...] holds its map; for tokens rows * cols positions follow `prefix` other tokens."""

    channel_axis: int
    rows: int
    cols: int
    prefix: int


@dataclass
class TokenGrid:
    """The grid of a vision transformer's patch tokens, as its patch embedding tells it."""

    patch_embed: nn.Module
    prefix: int
    latest: tuple[int, int] | None = None
    """Grid of the latest images, where image sizes may vary."""

    @property
    def varies(self) -> bool:
        return not getattr(self.patch_embed, "strict_img_size", True)

    def see(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the patch embedding: note the grid of these images."""
        feat_size: Any = module.dynamic_feat_size
        self.latest = feat_size(tuple(args[0].shape[-2:]))

    def of(self, tokens: int) -> tuple[int, int, int] | None:
        """Return (rows, columns, prefix) of so many tokens, or None if they are not this grid."""
        size: Any = self.latest if self.varies else self.patch_embed.grid_size
        if size is None:
            return None
        rows, cols = int(size[0]), int(size[1])
        if tokens == rows * cols + self.prefix:
            return rows, cols, self.prefix
        # Some models (CaiT, XCiT) add their class token only after these blocks.
        return (rows, cols, 0) if tokens == rows * cols else None


@dataclass
class Layer:
    """A module whose output gradients are masked."""

    name: str
    module: nn.Module
    mask: GradientMask
    channels: Channels | None
    """Where a 4-D output holds its channels; None is unknown."""
    grid: TokenGrid | tuple[int, int, int] | None
    """Grid of a 3-D output: (rows, columns, prefix tokens), or where to ask; None is unknown."""
    by_name: bool
    """The user chose it: an output that cannot be understood is an error, else it passes through."""
    by_user: bool = False
    """The user named the layout."""
    widths: frozenset[int] = field(default_factory=frozenset)
    """Channel counts in and beside the module, to contradict a wrong layout."""

    def geometry(self, shape: Sequence[int]) -> Geometry | None:
        """Return where an output of this shape holds its map; None if it has none or one below 7x7.

        Raises UsageError for what cannot be understood, if the user chose this layer.
        """
        found = self._tokens(shape) if len(shape) == 3 else self._image(shape) if len(shape) == 4 else None
        if found is None or min(found.rows, found.cols) < SMALLEST_MAP:
            return None
        return found

    def _image(self, shape: Sequence[int]) -> Geometry | None:
        what = f"output of {self.name} is {list(shape)}"
        if self.channels is None:
            self._refuse(f"{what}, and which axis holds channels is unknown")
            return None
        here, other = (1, 3) if self.channels == "first" else (3, 1)
        if not self.by_user and shape[here] not in self.widths and shape[other] in self.widths:
            self._refuse(f"{what}, and its channels seem to be axis {other}, not {here}")
            return None
        return Geometry(1, shape[2], shape[3], 0) if here == 1 else Geometry(3, shape[1], shape[2], 0)

    def _refuse(self, what: str) -> None:
        if self.by_name:
            raise UsageError(f"{what}; say it in layers, as {self.name + ':NCHW'!r} or {self.name + ':NHWC'!r}")

    def _tokens(self, shape: Sequence[int]) -> Geometry | None:
        known = self.grid if isinstance(self.grid, tuple) else self.grid.of(shape[1]) if self.grid else None
        fits = known is not None and known[0] * known[1] + known[2] == shape[1]
        if fits and self.channels != "first":
            assert known is not None
            return Geometry(2, *known)
        if self.by_name:
            raise UsageError(
                f"output of {self.name} is {list(shape)}, and the grid of these tokens is unknown; say it in "
                f"layers, such as {self.name + ':14x14+1'!r} for 14 rows of 14 tokens after 1 class token"
            )
        return None


class Choice(NamedTuple):
    layers: list[Layer]
    passed: tuple[str, ...]
    """Layers that mask.include and mask.exclude take out."""
    token_grid: TokenGrid | None


def choose(
    model: nn.Module,
    mask: GradientMask,
    layers: str | Sequence[str] | None,
    sigmas: Mapping[str, float] | Sequence[float] | None,
) -> Choice:
    """Return the layers that `layers` names, in the model's order; see `attach_output` for the words.

    Raises UsageError for a word that matches nothing, and if nothing is left (law 8).
    """
    tree = _Tree(model)
    words = [layers] if isinstance(layers, str) else list(layers or ())
    wanted: dict[str, str] = {}  # name -> layout suffix
    for word in words:
        pattern, _, suffix = word.partition(":")
        if suffix and not _SUFFIX.fullmatch(suffix):
            raise UsageError(f"layers: {word!r} ends in {suffix!r}; expected NCHW, NHWC or a grid such as 14x14+1")
        wanted |= dict.fromkeys(tree.matches(pattern, "layers"), suffix)
    names = [n for n in tree.modules if n in wanted] if words else tree.default()
    kept = [n for n in names if not mask.include or _any(n, mask.include)]
    kept = [n for n in kept if not _any(n, mask.exclude)]
    if not kept:
        raise _nothing(model, mask, names)
    chosen = [tree.layer(n, replace_quietly(mask), bool(words), wanted.get(n, "")) for n in kept]
    for layer, sigma in zip(chosen, tree.sigmas(kept, mask, sigmas), strict=True):
        if sigma is not None:
            layer.mask = replace_quietly(mask, sigma=sigma)
    return Choice(chosen, tuple(n for n in names if n not in kept), tree.token_grid)


def replace_quietly(mask: GradientMask, **changes: Any) -> GradientMask:
    """Return the mask without error feedback and with `changes`; what it warns of has been said already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return replace(mask, error_feedback=False, **changes)


class _Tree:
    """The modules of a model by name, and what timm says of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # A wrapper and what it wraps have the same name; the wrapper comes first, the module itself is meant.
        self.modules = {clean_name(n + ".").rstrip("."): m for n, m in model.named_modules() if n}
        self.modules.pop("", None)
        known: list[tuple[str, nn.Module]] = [
            (clean_name(n + ".").rstrip("."), m) for n, m in model.named_modules() if hasattr(m, "feature_info")
        ]
        self.prefix = known[0][0] if known else ""
        self.timm: Any = known[0][1] if known else None
        self.token_grid: TokenGrid | None = None
        patch_embed: Any = getattr(self.timm, "patch_embed", None)
        if hasattr(patch_embed, "grid_size") and hasattr(patch_embed, "dynamic_feat_size"):
            self.token_grid = TokenGrid(patch_embed, getattr(self.timm, "num_prefix_tokens", 0))

    # -- words ----------------------------------------------------------------------------------------------
    def default(self) -> list[str]:
        """Every block of a vision transformer or NHWC model; else every activation."""
        if blocks := self._blocks():
            return blocks
        activations = [n for n, m in self.modules.items() if is_activation(m)]
        if not activations:
            raise UsageError(
                f"{type(self.model).__name__} has no activation modules to mask the outputs of; choose layers: "
                f"type names, patterns of module names, or timm's stages"
            )
        return activations

    def _blocks(self) -> list[str]:
        start = f"{self.prefix}.blocks." if self.prefix else "blocks."
        blocks = [n for n in self.modules if n.startswith(start) and "." not in n.removeprefix(start)]
        if self.token_grid and blocks:
            return blocks
        if self._format == "last":
            return _outermost(n for n, m in self.modules.items() if type(m).__name__.endswith("Block"))
        return []

    def matches(self, word: str, where: str) -> list[str]:
        """Return the names that a word means: stages, a type, or a pattern."""
        stages = self.stages()
        if word == "stages" and stages:
            return list(dict.fromkeys(stages))
        if (index := _stage_index(word)) is not None and index < len(stages):
            return [stages[index]]
        of_type = [n for n, m in self.modules.items() if type(m).__name__ == word]
        if of_type:
            return of_type
        named = [n for n in self.modules if fnmatchcase(n, word)]
        if not named:
            raise self.unknown(word, where)
        usual = set(named) & set(self._blocks() or (n for n in named if is_activation(self.modules[n])))
        return [n for n in named if n in usual] or _outermost(named)

    def unknown(self, word: str, where: str) -> UsageError:
        types = list(dict.fromkeys(type(m).__name__ for m in self.modules.values()))
        stages = [f"stage{i}" for i in range(len(self.stages()))]
        hint = nearest(word, [*types, *stages, *self.modules])
        staged = f", {', '.join(stages)}" if stages else ""
        return UsageError(
            f"{where}: {word!r} matches no type, module name or stage of the model{hint} (types: "
            f"{', '.join(sorted({type(m).__name__ for m in self.modules.values() if is_activation(m)}))}{staged})"
        )

    def stages(self) -> list[str]:
        """Return the names of timm's feature stages, from the input on."""
        info = getattr(self.timm, "feature_info", None) or []
        listed = info.get_dicts() if hasattr(info, "get_dicts") else info
        names = [f"{self.prefix}.{d['module']}" if self.prefix else d["module"] for d in listed]
        return [n for n in names if n in self.modules]

    def sigmas(
        self, chosen: list[str], mask: GradientMask, sigmas: Mapping[str, float] | Sequence[float] | None
    ) -> list[float | None]:
        """Return each chosen layer's own sigma, or None for the mask's."""
        if not sigmas:
            return [None] * len(chosen)
        if {"log", "dog"}.isdisjoint({mask.operator, mask.random_like if mask.operator == "random" else ""}):
            raise UsageError(f"sigmas belong to the operators log and dog, not {mask.operator!r}")
        if not isinstance(sigmas, Mapping):
            if len(sigmas) != len(self.stages()):
                raise UsageError(
                    f"sigmas has {len(sigmas)} values; expected one for each of timm's {len(self.stages())} "
                    f"feature stages, or a mapping from types, patterns and stages to sigma"
                )
            sigmas = {f"stage{i}": sigma for i, sigma in enumerate(sigmas)}
        stage_of = self._stage_of()
        found: dict[str, float] = {}
        for word, sigma in sigmas.items():
            check_range(sigma, f"sigmas[{word!r}]", 0.1, 100)
            index = _stage_index(word)
            if index is not None and index < len(self.stages()):
                names = [n for n in chosen if stage_of[n] == index]
            else:
                names = [n for n in chosen if type(self.modules[n]).__name__ == word or fnmatchcase(n, word)]
                if not names:
                    raise (
                        self.unknown(word, "sigmas")
                        if word not in self.modules
                        else UsageError(
                            f"sigmas: {word!r} is none of the chosen layers (the first: {', '.join(chosen[:3])})"
                        )
                    )
            found |= dict.fromkeys(names, sigma)
        return [found.get(n) for n in chosen]

    def _stage_of(self) -> dict[str, int]:
        """Return each module's stage: the first whose last module is not before it; behind the last, the last."""
        stages, order = self.stages(), list(self.modules)
        ends = [max(i for i, n in enumerate(order) if n == s or n.startswith(s + ".")) for s in stages]
        return {
            n: next((k for k, end in enumerate(ends) if i <= end), len(stages) - 1) for i, n in enumerate(order)
        }

    # -- layout ---------------------------------------------------------------------------------------------
    def layer(self, name: str, mask: GradientMask, by_name: bool, suffix: str) -> Layer:
        module = self.modules[name]
        near = self.modules.get(name.rpartition(".")[0], self.model) if _is_plain(module) else module
        layer = Layer(
            name, module, mask, self._channels(name), self.token_grid, by_name, bool(suffix), _widths(near)
        )
        if suffix:
            layout, rows, cols, prefix = _SUFFIX.fullmatch(suffix).groups()  # type: ignore[union-attr]
            layer.channels = "first" if layout == "NCHW" else "last"
            if rows:
                layer.grid = int(rows), int(cols), int(prefix or 0)
        return layer

    @property
    def _format(self) -> Channels | None:
        """What timm says of the outputs of its blocks and stages."""
        if self.timm is None:
            return None
        stated = getattr(self.timm, "output_fmt", "NCHW")
        return "first" if str(getattr(stated, "value", stated)).startswith("NC") else "last"

    def _channels(self, name: str) -> Channels | None:
        module = self.modules[name]
        if not _is_plain(module):
            return self._of(module)
        while name:
            parent, _, own = name.rpartition(".")
            around = self.modules.get(parent, self.model)
            if parent and (known := channels_of_type(around)):
                return known
            siblings = list(around.named_children())
            at = next((i for i, (n, _) in enumerate(siblings) if n == own), 0)
            for _, sibling in (*reversed(siblings[:at]), *siblings[at + 1 :]):
                if not _is_plain(sibling):
                    return self._of(sibling)
            name = parent
        return None

    def _of(self, module: nn.Module) -> Channels | None:
        kinds = {kind for m in module.modules() if (kind := channels_of_type(m))}
        return channels_of_type(module) or (kinds.pop() if len(kinds) == 1 else self._format)


def is_activation(module: nn.Module) -> bool:
    """Return whether a module is an activation function; gates (sigmoid, tanh, softmax) are not counted."""
    kind = type(module)
    return kind.__module__ in _ACTIVATION_PACKAGES and not _GATES.fullmatch(kind.__name__)


def channels_of_type(module: nn.Module) -> Channels | None:
    """Return whether a layer of this type has channels first or last; None if that does not tell."""
    name = type(module).__name__
    if isinstance(module, _FIRST) or _FIRST_BY_NAME.search(name):  # timm's LayerNorm2d is a LayerNorm
        return "first"
    return "last" if isinstance(module, _LAST) or name.startswith(("RmsNorm", "SimpleNorm")) else None


def _is_plain(module: nn.Module) -> bool:
    """Whether nothing in a module tells a layout: activations, dropout, identity."""
    return not any(channels_of_type(m) for m in module.modules())


def _widths(module: nn.Module) -> frozenset[int]:
    names = ("out_channels", "out_features", "num_features", "num_channels")
    return frozenset(
        width for m in module.modules() for n in names if isinstance(width := getattr(m, n, None), int)
    )


def _stage_index(word: str) -> int | None:
    match = re.fullmatch(r"stage(\d+)", word)
    return int(match[1]) if match else None


def _outermost(names: Iterable[str]) -> list[str]:
    """Return the names that lie inside none of the others."""

    def outer() -> Iterator[str]:
        last = None
        for name in names:  # in the model's order: what is inside follows
            if last is None or not name.startswith(last + "."):
                last = name
                yield name

    return list(outer())


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _nothing(model: nn.Module, mask: GradientMask, names: list[str]) -> UsageError:
    patterns = ", ".join(mask.include or mask.exclude)
    hint = nearest(mask.include[0], names) if mask.include else ""
    return UsageError(
        f"the mask touches nothing: of {len(names)} layers mask.include and mask.exclude ({patterns}) leave none"
        f"{hint} (the first: {', '.join(names[:3])})"
    )
