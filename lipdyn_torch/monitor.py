"""LipschitzMonitor: hooks on the modules and on the optimiser's step, a schedule, a history; no mathematics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lipdyn_torch._hooks import Watch
from lipdyn_torch._measure import Measurement, UpdateRule, network_row
from lipdyn_torch.errors import NoBackwardError, NoSupportedLayerError, UnownedParametersError
from lipdyn_torch.history import NETWORK, History, Sink
from lipdyn_torch.layers import find_rule, unsupported_reason

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LipschitzMonitor"]

BATCH_NORM = "BatchNorm mixes samples in training: noise terms are heuristic"


class LipschitzMonitor:
    r"""Record how, and why, the Lipschitz bound ``K = prod sigma_l`` of a network moves while it is trained.

    Training goes on exactly as before: parameters, gradients and random numbers stay bitwise the same. Two
    hooks do the work, one on every `torch.nn.Linear` and `torch.nn.Conv2d` (theory 2.4), one on
    ``optimizer.step``. All analysis is in float64 on the tensors' device.

    Parameters
    ----------
    model : nn.Module
        Layers whose weight is trained by ``optimizer`` are monitored; `layers` and `skipped` say which.
    optimizer : torch.optim.Optimizer
        Changes along the path (``dz1`` ... ``dz``) are right for every optimiser. Drift and noise are those of
        `torch.optim.SGD` without momentum; for others they are NaN and the status says so.
    every : int
        Measure every so many steps; between them the hooks do nothing.
    noise : {"full", "split"}
        "split" adds the parts due to the variances and the covariances of the weights' gradients (theory 2.4).
    conv : {"matrix"}
        A convolution is read as its reshaped kernel (theory 3.1).
    sampling : {"shuffle", "iid"}
        How batches are drawn: every sample once per epoch, or independently. Kept for the predictors' bands.
    dataset_size : int, optional
        Number of samples of an epoch, for the bands with "shuffle".
    sinks : iterable of Sink
        Receive the rows of each step as they are made, `JsonLinesSink` for example.

    Attributes
    ----------
    history : History
        Rows with the columns below; ``history.to_pandas()`` is the table.
    layers : list of str
        Monitored layers, by their names in ``named_modules()``; a model that is itself a layer goes by the
        name of its class.
    skipped : dict
        Modules with parameters that are not monitored, and why.

    Notes
    -----
    One row per monitored step and layer, and one with layer "network":

    ======================  =====================================================================================
    ``step, layer``         optimiser steps since attaching (0 is the first); name
    ``lr, batch``           learning rate of this step; number of samples M
    ``sigma, gap``          largest singular value before the step; its isolation distance d (theory 1.9).
                            In the network row ``sigma`` is K and ``gap`` the smallest
    ``eps``                 ``2 ||D||_2 / d`` for the update D; expansions are certified below 1. Network: largest
    ``mu``                  drift ``-<J, gbar>/sigma`` (with weight decay), per unit of SDE time: a step takes ``lr``
    ``kappa``               ``lr <H, Sigma> / (2 sigma)``, per unit of SDE time
    ``lambda_sq``           ``lr J^T Sigma J / sigma^2``, per unit of SDE time. Network: all covariances between
                            layers included (theory 2.9)
    ``*_var, *_cov``        with ``noise="split"``: parts from the diagonal of Sigma, and the signed rest
    ``gHg``                 ``D^2 sigma[gbar, gbar]``, per unit of squared step; layers only
    ``dz1, dz2, dz3``       change of log sigma along the actual update to order 1, 2, 3, as ``log1p(r)``
    ``dz``                  observed change of log sigma in this step
    ``z``                   log sigma before the step, so ``z + dz`` is after it. Network: ``log K``
    ``status``              "ok", or why terms are NaN or to be taken with care
    ======================  =====================================================================================

    The batch is the first axis of a layer's input. Several backward passes before a step count as one batch.

    Raises
    ------
    NoSupportedLayerError, UnownedParametersError
        There is nothing to monitor.
    NoBackwardError
        From ``optimizer.step()``: no gradient has passed through any monitored layer since the last step.

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> with LipschitzMonitor(model, optimizer) as monitor:
    ...     for _ in range(3):
    ...         optimizer.zero_grad()
    ...         model(torch.randn(16, 4)).square().mean().backward()
    ...         optimizer.step()
    >>> monitor
    LipschitzMonitor(2 layers, 3 steps seen, closed)
    >>> table = monitor.history.to_pandas()
    >>> table["layer"].tolist()[:3], set(table["status"])
    (['0', '2', 'network'], {'ok'})
    >>> bool((abs(table["dz2"] - table["dz"]) < 1e-5).all())
    True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = 1,
        noise: str = "full",
        conv: str = "matrix",
        sampling: str = "shuffle",
        dataset_size: int | None = None,
        sinks: Iterable[Sink] = (),
    ) -> None:
        sinks = list(sinks)
        _check_types(model, optimizer, sinks)
        _check_settings(every, noise, conv, sampling, dataset_size)
        self._split = noise == "split"
        self._every = every
        self._optimizer = optimizer
        self._is_sgd = isinstance(optimizer, torch.optim.SGD)
        self._step = 0
        self._pending: list[Measurement] | None = None
        self._watches, self.skipped = _find_layers(model, optimizer, self._split)
        self._batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.history = History(
            meta={
                **{"optimizer": type(optimizer).__name__, "every": every, "noise": noise, "conv": conv},
                **{"sampling": sampling, "dataset_size": dataset_size},
                **{"layers": self.layers, "skipped": self.skipped},
            }
        )
        self._sinks = sinks
        for sink in self._sinks:
            sink.start(self.history.meta)
        self._handles: list[RemovableHandle] = [watch.attach() for watch in self._watches]
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))

    @property
    def layers(self) -> list[str]:
        """Names of the monitored layers."""
        return [watch.name for watch in self._watches]

    @property
    def log_k(self) -> float:
        """Natural logarithm of K as last measured (before the first step: of the initial weights)."""
        if self.history.rows:
            last = self.history.rows[-1]
            return last["z"] + last["dz"]
        return sum(math.log(w.spectrum.sigma) if w.spectrum.sigma > 0 else math.nan for w in self._watches)

    def plot(self) -> Figure:
        """The run in one figure: log K against the predictors, their errors, and the forces layer by layer."""
        from lipdyn_torch.plots import summary_figure

        return summary_figure(self.history)

    def close(self) -> None:
        """Take every hook off and close the sinks; the history stays. Closing twice is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._pending = None
        for watch in self._watches:
            watch.active = False
            watch.forget()
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "attached" if self._handles else "closed"
        return f"LipschitzMonitor({len(self._watches)} layers, {self._step} steps seen, {state})"

    def _due(self) -> bool:
        return self._step % self._every == 0

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read gradients, learning rates and noise while the weights are still the old ones."""
        self._pending = None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        # With a closure the backward pass happens inside the step; the reading then waits until after it.
        if self._due() and closure is None:
            self._pending = self._read()

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compare with the new weights and write the rows."""
        if self._due():
            measurements = self._pending if self._pending is not None else self._read(after_closure=True)
            for watch in self._watches:
                watch.refresh()
            rows = [m.complete(w.spectrum) for m, w in zip(measurements, self._watches, strict=True)]
            rows.append(network_row(measurements))
            rows = [{"step": self._step, **row} for row in rows]
            self.history.extend(rows)
            for sink in self._sinks:
                sink.write(rows)
        self._pending = None
        self._step += 1
        for watch in self._watches:
            watch.active = self._due()

    @torch.no_grad()
    def _read(self, after_closure: bool = False) -> list[Measurement]:
        if not any(watch.samples for watch in self._watches):
            raise NoBackwardError(
                f"expected a backward pass through a monitored layer ({', '.join(self.layers)}) before "
                f"optimizer.step(), got none since the last step (step {self._step}); call loss.backward() first, "
                "on the model the monitor was given, or close the monitor"
            )
        measurements = []
        for watch in self._watches:
            noise, batch, problems = watch.collect(refresh=not after_closure)
            if noise is not None and any(norm.training for norm in self._batch_norms):
                problems = [BATCH_NORM]
            rule = UpdateRule.of(type(self._optimizer).__name__, self._is_sgd, watch.group)
            measurements.append(Measurement(watch.name, watch.spectrum, noise, batch, rule, self._split, problems))
        return measurements


def _find_layers(model: nn.Module, optimizer: Optimizer, split: bool) -> tuple[list[Watch], dict[str, str]]:
    """Watches for the layers that can be read, and the reasons for all other modules with parameters."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    watches: dict[int, Watch] = {}
    skipped: dict[str, str] = {}
    readable = 0
    for path, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        name = _row_name(path, module)
        reason = unsupported_reason(module)
        weight = module._parameters.get("weight")
        rule = find_rule(module)
        if reason is not None or weight is None or rule is None:
            skipped[name] = reason or "no weight"
            continue
        readable += 1
        if id(weight) in watches:
            first = watches[id(weight)]
            skipped[name] = f"shares its weight with {first.name}"
            first.standing_problem = f"weight is shared with {name}: contributions of several layers"
        elif not weight.requires_grad:
            skipped[name] = "frozen"
        elif id(weight) not in groups:
            skipped[name] = "its weight is not in the optimizer"
        else:
            watches[id(weight)] = Watch(name, module, rule, weight, groups[id(weight)], split)
    if not readable:
        raise NoSupportedLayerError(
            f"expected a model with at least one Linear or Conv2d layer, got {_describe(model, skipped)}; "
            "teach the monitor your layer with lipdyn_torch.layers.register_rule"
        )
    if not watches:
        raise UnownedParametersError(
            f"expected an optimizer that trains a layer of the model, got {type(optimizer).__name__} with "
            f"{len(groups)} parameters, none of them a weight of {_describe(model, skipped)}; "
            "make the optimizer from model.parameters() of this very model"
        )
    return list(watches.values()), skipped


def _row_name(path: str, module: nn.Module) -> str:
    name = path or type(module).__name__
    return name if name != NETWORK else f"{name}.weight"  # that name belongs to the sum over the layers


def _describe(model: nn.Module, skipped: dict[str, str]) -> str:
    reasons = ", ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:8])
    return f"{type(model).__name__} ({reasons or 'no parameters'})"


def _check_types(model: object, optimizer: object, sinks: list[Any]) -> None:
    for name, value, kind in (("model", model, nn.Module), ("optimizer", optimizer, Optimizer)):
        if not isinstance(value, kind):
            public = f"torch.{'nn.Module' if kind is nn.Module else 'optim.Optimizer'}"
            raise TypeError(f"expected a {public} as {name}, got {type(value).__name__}; call it (model, optimizer)")
    for sink in sinks:
        if not all(callable(getattr(sink, method, None)) for method in ("start", "write", "close")):
            raise ValueError(f"expected sinks with start, write and close, got {sink!r}; wrap a path in JsonLinesSink")


def _check_settings(every: object, noise: object, conv: object, sampling: object, dataset_size: object) -> None:
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"expected every to be a whole number of steps, at least 1, got {every!r}")
    choices = {"noise": (noise, ("full", "split")), "conv": (conv, ("matrix",))}
    choices["sampling"] = (sampling, ("shuffle", "iid"))
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"expected {name} to be {' or '.join(map(repr, allowed))}, got {value!r}")
    if dataset_size is not None and (not isinstance(dataset_size, int) or dataset_size < 1):
        raise ValueError(f"expected dataset_size to be a positive whole number or None, got {dataset_size!r}")
