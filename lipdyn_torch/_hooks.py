"""One watched layer: what its hooks catch between two optimiser steps.

A forward hook puts a hook on the layer's output *tensor*; when the gradient of that tensor arrives, it is
contracted with the layer's input at once, and the input is let go. Forward passes that are never
differentiated (evaluation, discarded losses) therefore count for nothing, and nothing of the graph outlives it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lipdyn_torch._bridge import Spectrum, read_spectrum
from lipdyn_torch.layers import LayerRule
from lipdyn_torch.noise import GradientNoise

__all__ = ["Watch"]

#: Notes that explain NaN in the noise terms.
NO_GRADIENT = "no gradient reached this layer"
CALLED_TWICE = "layer used several times in one backward pass: samples cannot be paired"
RETAINED = "several backward passes through one forward pass"
EDITED = "weight was changed between backward and step"
MISMATCH = "contributions do not sum to the gradient"


@dataclass
class Watch:
    """A layer under observation: its spectrum and the contributions to its gradient since the last step.

    ``active`` is switched by the monitor; while it is off the hooks return at once.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    weight: Tensor
    group: dict[str, Any]
    split: bool
    standing_problem: str = ""
    active: bool = True
    spectrum: Spectrum = field(init=False)
    samples: int = field(default=0, init=False)
    parts: list[tuple[Tensor, ...]] = field(default_factory=list, init=False)
    problems: dict[str, None] = field(default_factory=dict, init=False)
    _passes: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self.spectrum = read_spectrum(self.rule.matrix(self.module))

    def attach(self) -> RemovableHandle:
        """Put the forward hook on the module."""
        return self.module.register_forward_hook(_ForwardHook(self), with_kwargs=True)

    def refresh(self) -> bool:
        """Read the spectrum again if the weight is not bitwise the one it was read from; True if it was not."""
        matrix = self.rule.matrix(self.module)
        known = self.spectrum.matrix
        if known.device == matrix.device and torch.equal(known.view(torch.int64), matrix.view(torch.int64)):
            return False
        self.spectrum = read_spectrum(matrix)
        return True

    def receive(self, x: Tensor, delta: Tensor) -> None:
        """Contract one call's input with the gradient of its output (theory 2.4)."""
        backward = torch._C._current_graph_task_id()  # tells micro-batches from several uses in one pass
        if backward in self._passes:
            self.problems[CALLED_TWICE] = None
        self._passes.add(backward)
        self.samples += delta.shape[0] if delta.ndim > 1 else 1
        if self.spectrum.triplet is None:
            return
        u, v = self.spectrum.u, self.spectrum.v
        part = self.rule.contract(self.module, x, delta, u, v)
        self.parts.append((*part, self.rule.sum_of_squares(self.module, x, delta)) if self.split else part)

    def collect(self, refresh: bool = True) -> tuple[GradientNoise | None, int, list[str]]:
        """The noise of everything received since the last call, the number of samples, and what is wrong.

        Micro-batches are joined to one batch. The noise is None, and a problem given, unless the samples'
        contributions sum to the gradient the optimiser sees. With ``refresh=False`` the weight may have moved
        on already, and the spectrum is still that of the weight the samples were seen from.
        """
        parts, samples, problems = self.parts, self.samples, list(self.problems)
        self.forget()
        if refresh and self.refresh():
            problems.append(EDITED)
        if self.standing_problem:
            problems.append(self.standing_problem)
        gradient = self.weight.grad
        if gradient is None or samples == 0:
            problems.append(NO_GRADIENT)
        if problems or gradient is None or not parts or self.spectrum.triplet is None:
            return None, samples, problems
        p, q = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        squares = torch.stack([part[2] for part in parts]).sum(0) if self.split else None
        mean = self.rule.weight_matrix(self.module, gradient)
        noise = GradientNoise.from_contributions(p, q, squares, mean)
        error = noise.mismatch(mean, self.spectrum)
        if not error <= _tolerance(self.weight):
            return None, samples, [f"{MISMATCH} (relative {error:.1e}): clipped, rescaled or used elsewhere?"]
        return noise, samples, []

    def forget(self) -> None:
        """Drop what was received."""
        self.parts, self.samples = [], 0
        self.problems, self._passes = {}, set()


def _tolerance(weight: Tensor) -> float:
    """How far rounding may take the samples' sum from the gradient, relative to the samples' sizes.

    Rounding errors of sums are far below the square root of the precision; on CUDA devices the precision of a
    float32 convolution may be that of TF32 (2^-10).
    """
    if weight.is_cuda and weight.dtype == torch.float32:
        return 5e-3
    return torch.finfo(weight.dtype).eps ** 0.5


class _ForwardHook:
    """The only thing that hangs on the user's module; copies and pickles of the module carry an inert one."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        watch = self.watch
        if not watch.active or not torch.is_grad_enabled():
            return
        if not isinstance(output, Tensor) or not output.requires_grad or _is_functorch(output):
            return
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor):
            watch.refresh()
            output.register_hook(_OutputHook(watch, x.detach()))

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _InertHook, ()


class _InertHook:
    """Does nothing."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        return None


class _OutputHook:
    """Receives the gradient of one output tensor and forgets the input it belongs to."""

    def __init__(self, watch: Watch, x: Tensor) -> None:
        self.watch, self.x = watch, x
        self.used = False

    def __call__(self, delta: Tensor) -> None:
        if not self.watch.active:
            return
        if self.used:  # retain_graph: the same samples again
            self.watch.problems[RETAINED] = None
            return
        with torch.no_grad():
            self.watch.receive(self.x, delta.detach())
        self.used, self.x = True, delta.new_empty(0)


def _is_functorch(tensor: Tensor) -> bool:
    """Inside torch.func transforms a tensor stands for many; there is nothing to watch."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)
