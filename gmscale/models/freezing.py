"""Freezing: which parameters train."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from gmscale.config import FinetuneConfig
from gmscale.errors import UsageError, nearest
from gmscale.models.create import classifiers


@dataclass(frozen=True)
class Frozen:
    """The part of a model that does not train."""

    parameters: dict[str, nn.Parameter]
    """By name, in the model's order; without those that timm never trains."""
    modules: dict[str, nn.Module]
    """Those frozen whole, none inside another: their statistics and dropout rest too."""

    def hold(self) -> None:
        """Put the frozen modules into evaluation mode; called after the model is set to train."""
        for module in self.modules.values():
            module.eval()

    def release(self) -> None:
        """Let everything train again."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)


def freeze(model: nn.Module, config: FinetuneConfig) -> Frozen | None:
    """Freeze what `config` names and return it; None if it names nothing.

    A parameter that modules share is frozen as soon as one of them is. Raises UsageError for a pattern that matches
    nothing, and if nothing would be left to train.
    """
    if not (config.freeze or config.linear_probe):
        return None
    # a shared parameter has several names, which all count
    names = dict(model.named_parameters(remove_duplicate=False))
    rests: set[nn.Module] = set()
    if config.linear_probe:
        trained = {
            p for name in classifiers(model) for p in model.get_submodule(name).parameters() if p.requires_grad
        }
        doomed = {p for p in names.values() if p not in trained}
        if not trained:
            raise UsageError("finetune.linear_probe: this model has no classifier with weights")
    else:
        doomed = set()
        for pattern in config.freeze:
            modules, parameters = _matching(model, names, pattern)
            rests |= modules
            doomed |= parameters
    frozen = {name: p for name, p in model.named_parameters() if p in doomed and p.requires_grad}
    if len(frozen) == sum(p.requires_grad for p in model.parameters()):
        raise UsageError(f"finetune.freeze {', '.join(config.freeze)} freezes everything; nothing is left to train")
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    return Frozen(frozen, dict(_whole(model, "", doomed, rests)))


def _matching(
    model: nn.Module, names: dict[str, nn.Parameter], pattern: str
) -> tuple[set[nn.Module], set[nn.Parameter]]:
    """Return the modules that a pattern names, and the parameters that it names or that are in those modules."""
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    rests = {m for name, m in modules.items() if fnmatchcase(name, pattern)}
    doomed = {p for name, p in names.items() if fnmatchcase(name, pattern)}
    doomed |= {p for m in rests for p in m.parameters()}
    if not rests and not doomed:
        first = ", ".join(name for name, _ in model.named_children())
        hint = nearest(pattern, [*modules, *names])
        raise UsageError(f"finetune.freeze: {pattern!r} matches no module or parameter{hint} (modules: {first})")
    if not doomed and not any(_has_state(m) for m in rests):
        raise UsageError(f"finetune.freeze: {pattern!r} matches only modules that have nothing to freeze")
    return rests, doomed


def _whole(
    module: nn.Module, prefix: str, doomed: set[nn.Parameter], rests: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules inside `module` of which nothing trains, none inside another."""
    for name, child in module.named_children():
        parameters = list(child.parameters())
        if all(p in doomed for p in parameters) and (parameters or (child in rests and _has_state(child))):
            yield prefix + name, child
        else:
            yield from _whole(child, f"{prefix}{name}.", doomed, rests)


def _has_state(module: nn.Module) -> bool:
    """Return whether the module has weights or statistics."""
    return bool(module.state_dict())
