"""Which matrices of a model are watched, how, and why others are not: nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.optim import Optimizer

from lipdyn_torch._hooks import Switch, Tap, Watch
from lipdyn_torch.convolution_rules import TorusRule
from lipdyn_torch.errors import NoSupportedLayerError, UnownedParametersError
from lipdyn_torch.fallback import PARAMETRISED, FallbackRule
from lipdyn_torch.history import NETWORK
from lipdyn_torch.layers import EmbeddingRule, LayerRule, LinearRule, find_rule, unsupported_reason
from lipdyn_torch.low_rank import LowRankSumRule

__all__ = ["Entry", "Report", "Survey", "survey"]

_FALLBACK = FallbackRule()
OPERATOR = ", as an operator on images"


class Entry(NamedTuple):
    """One line of the report."""

    module: str
    type: str
    how: str  # "monitored", "fallback" or "skipped"
    detail: str


class Report(tuple[Entry, ...]):
    """Every module that owns parameters, and how it is measured; printed as a table.

    Examples
    --------
    >>> print(Report([Entry("0", "Linear", "monitored", "8 x 4"), Entry("1", "LayerNorm", "skipped", "no matrix")]))
    module  type       how        detail
    0       Linear     monitored  8 x 4
    1       LayerNorm  skipped    no matrix
    """

    def __str__(self) -> str:
        lines = [Entry._fields, *self]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        padded = ("  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]]) for line in lines)
        return "\n".join(line.rstrip() for line in padded)


@dataclass
class Survey:
    """The watches and taps on a model, and the report on it."""

    watches: list[Watch] = field(default_factory=list)
    taps: list[Tap] = field(default_factory=list)
    paths: list[tuple[str, nn.Module]] = field(default_factory=list)  # where each tapped module was found
    entries: list[Entry] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)  # what is skipped though the optimiser trains matrices of it

    @property
    def skipped(self) -> dict[str, str]:
        """Modules with parameters that are not watched, and why."""
        return {entry.module: entry.detail for entry in self.entries if entry.how == "skipped"}


def survey(
    model: nn.Module,
    optimizer: Optimizer,
    switch: Switch,
    hold: bool,
    batch_dims: Mapping[str, int],
    operators: bool = False,
) -> Survey:
    """Find the matrices of the model; with `operators` those of convolutions on images, not their reshaped kernels.

    Raises
    ------
    NoSupportedLayerError, UnownedParametersError
        There is nothing to watch.
    """
    found = Survey()
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    known: dict[tuple[int, ...], Watch] = {}
    covered: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, ParametrizationList):  # the module it is a weight of has a line
            continue
        if id(module) in covered or not _own(module):
            rule = find_rule(module)
            if id(module) in covered or rule is None or not rule.covers(module):
                continue
        rule = find_rule(module) or _fallback(module)
        reason = unsupported_reason(module, rule)
        if rule is None or reason is not None:
            row, reason = _row_name(path, module), reason or "no rule"
            found.entries.append(Entry(row, type(module).__name__, "skipped", reason))
            if any(p.requires_grad and id(p) in owned and _is_matrix(p) for p in _own(module)):
                found.unread[row] = reason
            continue
        if operators:
            rule = TorusRule.of(rule, module)
        covered |= {id(child) for cover in rule.covers(module) for child in cover.modules()}
        # images have the samples first, and rules of the user's own and attention say themselves where they are
        dim = batch_dims.get(path, 0) if isinstance(rule, LinearRule | EmbeddingRule | LowRankSumRule) else 0
        _add_module(found, path, Tap(module, rule, switch, dim), known, owned, hold)
    _check(found, model, optimizer)
    return found


def _fallback(module: nn.Module) -> LayerRule | None:
    """The rule of last resort, where the module has a matrix of its own."""
    known = _FALLBACK.parts(module) or isinstance(module, nn.RNNBase) or is_parametrized(module)
    return _FALLBACK if known else None


def _own(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are no submodule's; those that a parametrisation computes others from are the module's."""
    lists = module.parametrizations.children() if is_parametrized(module) else ()  # type: ignore[union-attr]
    return [p for owner in (module, *lists) for p in owner.parameters(recurse=False)]


def _is_matrix(p: nn.Parameter) -> bool:
    """Whether it has, or may have, two axes at least."""
    return isinstance(p, nn.parameter.UninitializedParameter) or sum(size > 1 for size in p.shape) > 1


def _add_module(
    found: Survey,
    path: str,
    tap: Tap,
    known: dict[tuple[int, ...], Watch],
    owned: set[int],
    hold: bool,
) -> None:
    """Watch every part of one module, unless its parameters are another optimiser's."""
    module, rule = tap.module, tap.rule
    name, kind = _row_name(path, module), type(module).__name__
    for part in rule.parts(module):
        row = ".".join(filter(None, (name, part)))
        parameters = tuple(module.get_parameter(p) for p in rule.parameters(module, part))
        if all(p.requires_grad and id(p) not in owned for p in parameters):
            found.entries.append(Entry(row, kind, "skipped", "its weight is not in the optimizer"))
            continue
        key = (*map(id, parameters), hash(part) if len(rule.parts(module)) > 1 else 0)
        watch = known.get(key)
        if watch is None:
            watch = known[key] = Watch(row, module, rule, part, parameters, hold or len(parameters) > 1)
            found.watches.append(watch)
            shape = " x ".join(map(str, watch.spectrum.matrices.shape[-2:]))
            count = len(watch.spectrum.matrices)
            detail = (f"{count} of " if count > 1 else "") + shape
            detail += OPERATOR if isinstance(rule, TorusRule) else ""
            detail += "" if watch.trained else ", frozen: sigma only"
        else:
            detail = f"shares its weight with {watch.name}: contributions added"
            if not (isinstance(rule, TorusRule) and rule.shares(watch.rule)):
                detail += _by_kernels(found, tap, watch)
        tap.feeds.append((watch, part))
        found.entries.append(Entry(row, kind, rule.label, detail))
    if tap.feeds:
        found.taps.append(tap)
        found.paths.append((path, module))


def _by_kernels(found: Survey, tap: Tap, watch: Watch) -> str:
    """Have the reshaped kernel read where one is in two places that make different operators of it."""
    if not any(isinstance(rule, TorusRule) for rule in (tap.rule, watch.rule)):
        return ""
    feeding = [other for other in found.taps if any(fed is watch for fed, _ in other.feeds)]
    holders: list[Watch | Tap] = [watch, tap, *feeding]
    for holder in holders:
        holder.rule = holder.rule.inner if isinstance(holder.rule, TorusRule) else holder.rule
    watch.refresh(anew=True)
    found.entries = [
        entry._replace(detail=entry.detail.replace(OPERATOR, "")) if entry.module == watch.name else entry
        for entry in found.entries
    ]
    return ", both read as reshaped kernels: they differ in stride, dilation or groups"


def _check(found: Survey, model: nn.Module, optimizer: Optimizer) -> None:
    if any(watch.trained for watch in found.watches):
        return
    skipped = found.skipped
    described = f"{type(model).__name__} ({_listed(skipped) or 'no parameters'})"
    readable = found.watches or any("not in the optimizer" in reason for reason in skipped.values())
    if not readable and PARAMETRISED in skipped.values():
        raise NoSupportedLayerError(
            "expected at least one Linear or convolution layer whose weight is a parameter itself, not computed from "
            f"others as with spectral_norm or weight_norm, got {described}; take the parametrisation off one, or teach "
            "the monitor your layer with lipdyn_torch.layers.register_rule"
        )
    if not readable:
        raise NoSupportedLayerError(
            f"expected a model with at least one Linear or convolution layer, got {described}; "
            "teach the monitor your layer with lipdyn_torch.layers.register_rule"
        )
    if found.unread:
        raise UnownedParametersError(
            f"expected a layer that is trained and can be read, got {type(model).__name__} of which the optimizer "
            f"trains what is skipped ({_listed(found.unread)}); teach the monitor that layer with "
            "lipdyn_torch.layers.register_rule, for low-rank factors beside a weight with a LowRankSumRule"
        )
    if found.watches:
        raise UnownedParametersError(
            f"expected a weight that is trained, got {type(model).__name__} whose weights "
            f"({', '.join(watch.name for watch in found.watches[:8])}) are all frozen; turn requires_grad on first"
        )
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    raise UnownedParametersError(
        f"expected an optimizer that trains a layer of the model, got {type(optimizer).__name__} with "
        f"{count} parameters, none of them a weight of {described}; "
        "make the optimizer from model.parameters() of this very model"
    )


def _listed(skipped: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:8])


def _row_name(path: str, module: nn.Module) -> str:
    name = path or type(module).__name__
    return name if name != NETWORK else f"{name}.weight"  # that name belongs to the sum over the layers


def replaced(model: nn.Module, paths: Iterable[tuple[str, nn.Module]], watches: Iterable[Watch]) -> str | None:
    """The name of a layer that is no longer the one that is watched, if any."""
    for path, module in paths:
        try:
            present = model.get_submodule(path)
        except AttributeError:
            return path
        if present is not module:
            return path
    for watch in watches:
        names = watch.rule.parameters(watch.module, watch.part)
        try:
            found = [watch.module.get_parameter(name) for name in names]
        except AttributeError:  # pruned, or given a parametrisation
            return watch.name
        if any(now is not p for now, p in zip(found, watch.parameters, strict=True)):
            return watch.name
    return None
