"""What hooks catch between two optimiser steps.

A forward hook on a module puts a hook on its output *tensor*; when the gradient of that tensor arrives, it is
contracted with the module's input at once, and the input is let go. Forward passes that are never differentiated
(evaluation, discarded losses) therefore count for nothing, and nothing of the graph outlives it. Where the
contraction needs what is known only at the step (a preconditioner) or all uses of a weight at once (the variance
part), inputs and output gradients are kept until the step. Inputs that come out of no layer, as a batch does, may be
written over before: they are copied.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from lipdyn_torch._bridge import Spectrum, read_spectrum
from lipdyn_torch.distributed import full, local
from lipdyn_torch.layers import Block, LayerRule, Sums, value, whole, working
from lipdyn_torch.noise import OnRows

__all__ = ["Call", "Switch", "Tap", "Watch", "add", "listen", "overhear"]

#: Notes that explain NaN in the noise terms.
UNPAIRED = "calls of the layer in one backward pass saw different numbers of samples: they cannot be paired"
RETAINED = "several backward passes through one forward pass"
NESTED = "nested tensors of strided layout cannot be read; those of layout torch.jagged can"
SIZES = "images of a new size came between passes of one step: they cannot be compared"

#: Relative accuracy of the Hessian's forms for weights in single precision, whose gradients are no better.
ENOUGH = 3e-5


@dataclass
class Switch:
    """What all hooks of one monitor look at first: while ``on`` is off they return at once."""

    on: bool = True
    ahead: bool = False  # while it was off, a forward pass was made after the last backward pass
    discard: Callable[[], None] = lambda: None  # called when gradients seem to be cleared without a step
    stale: Callable[[], bool] = lambda: False  # whether gradients were cleared of any weight that caught something
    others: list[Tensor] = field(default_factory=list)  # sums of gradients of parameters that nobody watches
    backward: int = -1  # the backward pass that was seen last
    outer: dict[int, int] = field(default_factory=dict)  # backward pass inside a checkpoint: the one around it
    reached: set[int] = field(default_factory=set)  # backward passes that reached any weight that is watched

    def forget(self) -> None:
        """Drop what belongs to one step."""
        self.ahead = False
        self.others.clear()
        self.outer.clear()
        self.reached.clear()


class Call(NamedTuple):
    """One use of a weight, with the gradient of its output."""

    module: nn.Module
    rule: LayerRule
    part: str
    x: Any
    delta: Tensor


@dataclass
class Pass:
    """The uses of one weight in one backward pass: sample i of each is the same sample, and they add up."""

    samples: int
    sums: Sums | None = None
    calls: list[Call] = field(default_factory=list)
    counted: bool = True  # a gradient reached a parameter in it
    retained: bool = False  # it went through a forward pass whose contributions another one has


@dataclass
class Watch:
    """One matrix under observation: its spectrum, and the contributions to its gradient since the last step.

    Attributes
    ----------
    name : str
        The row's.
    module, rule, part
        Where the matrix is; other modules may share its parameters.
    parameters : tuple of Parameter
        What the matrix is made of.
    hold : bool
        Whether calls are kept until the step.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    part: str
    parameters: tuple[nn.Parameter, ...]
    hold: bool = False
    spectrum: Spectrum = field(init=False)
    values: list[Tensor] = field(init=False)  # of the parameters when the spectrum was read
    passes: dict[int, Pass] = field(default_factory=dict, init=False)
    problems: dict[str, None] = field(default_factory=dict, init=False)
    accumulated: bool = field(default=False, init=False)  # a gradient has reached the parameter
    totals: list[Tensor] = field(default_factory=list, init=False)  # sums of such gradients, to find an overflow in
    versions: dict[int, int] = field(default_factory=dict, init=False)  # of such gradients, by parameter
    reached: set[int] = field(default_factory=set, init=False)  # backward passes with such gradients
    eps: float = field(default=0.0, init=False)  # of the least precise tensor caught
    lengths: tuple[int, ...] = field(default=(), init=False)  # all axes of an output but the last
    latent: bool = field(default=False, init=False)  # the input was a parameter itself
    unread: bool = field(default=False, init=False)  # the module's last output was not one tensor
    indices: Tensor | None = field(default=None, init=False)  # that the table was read at in the last measured step
    now: Tensor | None = field(default=None, init=False)  # and in this one, first
    same_indices: bool = field(default=False, init=False)  # which are the same
    resized: bool = field(default=False, init=False)  # the matrix became another one for the size of an input

    def __post_init__(self) -> None:
        self._read(None)

    @property
    def trained(self) -> bool:
        """Whether any of the parameters can learn."""
        return any(p.requires_grad for p in self.parameters)

    def _read(self, known: Spectrum | None) -> None:
        self.values = [value(p) for p in self.parameters]
        self._understand(known)

    def _understand(self, known: Spectrum | None) -> None:
        """Read the spectrum of the values there are."""
        single = any(x.dtype != torch.float64 for x in self.values)
        matrices = self._matrices(self.values)
        if self.rule.unknown:
            self.spectrum = Spectrum(matrices, math.nan, math.nan, None, problem=self.rule.unknown)
            return
        found = read_spectrum(matrices, known, ENOUGH if single else 0.0)
        if not self.trained:  # of a weight that stays nothing else is asked
            found = found.let_go()
        self.spectrum = replace(found, chart=partial(self.rule.chart, self.module, found.group))

    def _matrices(self, values: list[Tensor]) -> Tensor:
        """The weight (g, m, n): in the parameters' own precision, in float64 where it has to be computed from them."""
        values = [working(x) if self._plain else x.double() for x in values]
        return self.rule.effective(self.module, self.part, values)

    @property
    def _plain(self) -> bool:
        """Whether the matrix is nothing but the parameter in another shape."""
        return type(self.rule).effective is LayerRule.effective and len(self.parameters) == 1

    def refresh(self, anew: bool = False) -> bool:
        """Read the spectrum again if the weight is not bitwise the one it was read from, or `anew`; True if so."""
        anew = anew or (self.trained and self.spectrum.known_by_value)
        same = not anew and all(_bitwise_equal(whole(p), x) for p, x in zip(self.parameters, self.values, strict=True))
        if same and not (self._plain or self.rule.sized):  # it may read more than the parameters
            known = self.spectrum.matrices
            same = _bitwise_equal(self._matrices([whole(p) for p in self.parameters]), known)
        if not same:
            self._read(self.spectrum)
        return not same

    @torch.no_grad()  # a tensor that autograd saves would count among those of a checkpoint
    def meet(self, x: Any, rule: LayerRule) -> None:
        """Have the spectrum of the present weight, for this input of a module, before it is used."""
        unknown, changed = self.rule.unknown, rule.meet(x)
        self.refresh()
        if self.now is None and _is_square(x):
            last, self.now = self.indices, x.clone()
            fits = last is not None and last.shape == x.shape and last.device == x.device
            self.same_indices = fits and bool((last == x).all())
        if changed:
            self._resize(not unknown)

    def recall(self, noted: Sequence[float]) -> None:
        """Take what another watch on this layer has met for met here."""
        unknown = self.rule.unknown
        if self.rule.recall(noted):
            self._resize(not unknown)

    def _resize(self, known: bool) -> None:
        """The matrix is another one; `known` if it was known before."""
        self.resized = self.resized or known
        if self.passes and not self.hold:
            self.problems[SIZES] = None
        self._understand(self.spectrum)

    def look(self) -> tuple[list[Tensor], Tensor]:
        """The parameters and the weight (g, m, n) as they are now; what is remembered stays as it is."""
        values = [whole(p) for p in self.parameters]
        return values, self._matrices(values)

    def changes(
        self, old: tuple[list[Tensor], Tensor], new: tuple[list[Tensor], Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """How the parameters and the weight (g, m, n) changed."""
        changes = [working(y) - working(x) for x, y in zip(old[0], new[0], strict=True)]
        return changes, self.rule.matrices(self.module, self.part, changes) if self._plain else new[1] - old[1]

    def cleared(self) -> bool:
        """Whether the gradients are gone, though contributions to them were caught.

        One that has been zero ever since it was made is not: zeros may be the gradient.
        """

        def gone(p: nn.Parameter) -> bool:
            if p.grad is None:  # where shards are not yet reduced, it comes with a later backward pass
                return local(p) is p or id(p) in self.versions
            return self.versions.get(id(p)) != p.grad._version and not bool(full(p.grad).any())

        return all(gone(p) for p in self.parameters if p.requires_grad)

    def overflowed(self) -> bool:
        """Whether a gradient that has reached the parameters was not finite."""
        return not all(bool(total.isfinite()) for total in self.totals)

    def receive(self, call: Call, backward: int) -> None:
        """Contract one call's input with the gradient of its output (theory 2.4), or keep them for later."""
        if call.delta.is_nested and call.delta.layout == torch.strided:
            self.problems[NESTED] = None
            return
        samples = call.rule.samples(call.module, call.delta)
        single = self.passes.setdefault(backward, Pass(samples))
        if single.samples != samples:
            self.problems[UNPAIRED] = None
            return
        self.eps = max(self.eps, torch.finfo(call.delta.dtype).eps)
        self.lengths = tuple(call.delta.shape[:-1])
        if self.spectrum.triplet is None:
            return
        if self.hold:
            single.calls.append(call)
            return
        sums = self.contract(call)
        if sums is not None:
            single.sums = sums if single.sums is None else add(single.sums, sums)

    def contract(self, call: Call, weights: list[Tensor] | None = None) -> Sums | None:
        """``p`` and ``q`` of one call; a rule that cannot leaves a problem behind instead."""
        s = self.spectrum
        block = Block(call.part, s.group)
        try:
            return call.rule.contract(call.module, call.x, call.delta, s.u, s.v, block, weights)
        except Exception as error:  # the fallback runs code of the user's, on one sample at a time
            self.problems[failure(error)] = None
            return None

    def merged(self, switch: Switch) -> list[Pass]:
        """The passes, those inside checkpoints added to the pass around them.

        Not counted are those that reached no parameter, such as one of `torch.autograd.grad` for the inputs, where
        others did: of this layer, or where none did, of any.
        """
        outer = switch.outer

        def root(backward: int) -> int:
            while backward in outer:
                backward = outer[backward]
            return backward

        # where shards are reduced, several passes may reach a parameter at once
        whole_ones = all(local(p) is p for p in self.parameters)
        reached = {root(backward) for backward in self.reached} if whole_ones else set()
        if whole_ones and not any(root(backward) in reached for backward in self.passes):
            reached = {root(backward) for backward in switch.reached}
        merged: dict[int, Pass] = {}
        for backward, single in self.passes.items():
            backward = root(backward)
            whole = merged.setdefault(backward, Pass(single.samples, counted=not reached or backward in reached))
            if whole.samples != single.samples:
                self.problems[UNPAIRED] = None
                continue
            whole.retained |= single.retained
            whole.calls += single.calls
            if single.sums is not None:
                whole.sums = single.sums if whole.sums is None else add(whole.sums, single.sums)
        if any(single.retained and single.counted for single in merged.values()):
            self.problems[RETAINED] = None
        return list(merged.values())

    def release(self) -> None:
        """Let go of all that is of the weight's size."""
        self.forget()
        self.values, self.indices = [], None
        self.spectrum = self.spectrum.emptied()

    def forget(self) -> None:
        """Drop what was received."""
        self.passes, self.problems = {}, {}
        self.accumulated, self.eps, self.totals, self.versions, self.reached = False, 0.0, [], {}, set()
        self.lengths, self.latent, self.unread, self.resized, self.same_indices = (), False, False, False, False
        self.indices, self.now = self.now, None


def _is_square(x: Any) -> bool:
    """Whether these are indices, as many rows as columns."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_nested or x.layout != torch.strided:
        return False
    return x.ndim == 2 and x.shape[0] == x.shape[1]


def failure(error: Exception) -> str:
    """What rows say where per-sample gradients cannot be had."""
    first = (str(error).splitlines() or [""])[0][:200]
    return f"per-sample gradients failed: {first or type(error).__name__}"


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bit by bit: NaN equals itself, and 0 is not -0."""
    if a.dtype != b.dtype or a.device != b.device or a.shape != b.shape:
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    a, b = (z.contiguous().view(_BITS[z.element_size()]) for z in (a, b))
    if a.device.type == "cpu":  # NumPy compares several times faster; most that differ do so from the start
        x, y = (z.numpy().reshape(-1) for z in (a, b))
        return np.array_equal(x[:1024], y[:1024]) and np.array_equal(x, y)
    return torch.equal(a, b)


def add(a: Sums, b: Sums) -> Sums:
    """What two calls gave, sample by sample."""
    (p, *others), (r, *more) = (b, a) if isinstance(b[0], OnRows) else (a, b)
    return (p.plus(r) if isinstance(p, OnRows) else p + r, *(x + y for x, y in zip(others, more, strict=True)))


class Tap:
    """The hooks on one module, and the matrices it feeds."""

    def __init__(self, module: nn.Module, rule: LayerRule, switch: Switch, batch_dim: int = 0) -> None:
        self.module, self.rule, self.switch, self.batch_dim = module, rule, switch, batch_dim
        self.feeds: list[tuple[Watch, str]] = []  # watch, and the part of this module that belongs to it

    def attach(self) -> RemovableHandle:
        """Put the forward hook on the module."""
        return self.module.register_forward_hook(_ForwardHook(self), with_kwargs=True)

    @property
    def unknown(self) -> bool:
        """Whether it feeds frozen weights of which it is not known what matrix they are."""
        return any(watch.rule.unknown and not watch.trained for watch, _ in self.feeds)

    def stale(self) -> bool:
        """Whether gradients were cleared to which contributions were caught."""
        return any(watch.passes and watch.cleared() for watch, _ in self.feeds)

    def receive(self, x: Any, delta: Tensor, backward: int) -> None:
        """Hand a call to every matrix that can learn from it."""
        if self.batch_dim and isinstance(x, Tensor) and delta.ndim > self.batch_dim + 1:
            x, delta = x.movedim(self.batch_dim, 0), delta.movedim(self.batch_dim, 0)
        for watch, part in self.feeds:
            if watch.trained:
                watch.receive(Call(self.module, self.rule, part, x, delta), backward)


class _ForwardHook:
    """The only thing that hangs on the user's module; copies and pickles of the module carry an inert one."""

    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            if self.tap.switch.on and self.tap.unknown:
                self.introduce(module, args, kwargs)
            return
        if not self.tap.switch.on:
            self.tap.switch.ahead = True
            return
        self.watch(module, args, kwargs, output)

    @torch._disable_dynamo
    def introduce(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Show frozen weights, which no gradient asks for, an input that tells what matrix they are."""
        x = self.tap.rule.inputs(module, args, kwargs)
        for watch, _ in self.tap.feeds:
            if x is not None and not watch.trained:
                watch.meet(x, self.tap.rule)

    @torch._disable_dynamo  # where a compiled function uses the module: what comes before goes into its graph
    def watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook the output."""
        tap = self.tap
        output = tap.rule.output(module, output)
        for watch, _ in tap.feeds:
            watch.unread = output is None
        if output is None or _is_symbolic(output):
            return
        if not output.requires_grad:
            if tap.rule.sized:
                self.introduce(module, args, kwargs)
            return
        if output.is_leaf:  # a parameter itself: a hook would stay on it
            return
        outer = torch._C._current_graph_task_id()  # not -1 inside a checkpoint that is run again
        if outer == -1 and tap.stale():
            tap.switch.discard()
            if not tap.switch.on:  # that was the measured step
                return
        x = tap.rule.inputs(module, args, kwargs)
        if isinstance(next(iter((*args, *kwargs.values())), None), nn.Parameter):
            for watch, _ in tap.feeds:
                watch.latent = True
        if x is not None:
            for watch, _ in tap.feeds:
                watch.meet(x, tap.rule)
            given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            # autograd itself notices what is written over, unless autocast has made a copy for it
            late = torch.is_autocast_enabled(output.device.type) or any(watch.hold for watch, _ in tap.feeds)
            if late and any(w.trained for w, _ in tap.feeds) and all(a.grad_fn is None for a in given):
                x = tree_map_only(Tensor, Tensor.clone, x)
            base, place = _origin(output, given)
            base.register_hook(_OutputHook(tap, x, outer, place))

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _InertHook, ()


class _InertHook:
    """Does nothing."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        return None


class _Place(NamedTuple):
    """Where the elements of a view are among those of its base, which has these strides."""

    base: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, gradient: Tensor) -> Tensor:
        """The view's part of a gradient of the base."""
        if gradient.stride() != self.base:
            laid_out = torch.empty_strided(gradient.shape, self.base, dtype=gradient.dtype, device=gradient.device)
            gradient = laid_out.copy_(gradient)
        return gradient.as_strided(self.shape, self.strides, gradient.storage_offset() + self.offset)


def _origin(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, _Place | None]:
    """The tensor that waits for the gradient of a module's output, and where the output is in it.

    It is the output itself, unless that is a view: what is later written over a view takes its place in the graph, and
    hooks on it would never be called. The base keeps its own. A view of an input is left alone: its base is used by
    others.
    """
    base = output._base
    if base is None or base.is_leaf or not base.requires_grad or type(base) is not Tensor:
        return output, None
    if base.dtype != output.dtype or any(x is base or x._base is base for x in inputs):
        return output, None
    reach, whole, offset = _reach(output), _reach(base), output.storage_offset() - base.storage_offset()
    if reach is None or whole != max(base.numel() - 1, 0) or not 0 <= offset <= whole - reach:
        return output, None
    return base, _Place(base.stride(), output.shape, output.stride(), int(offset))


def _reach(tensor: Tensor) -> int | None:
    """How far the last element in memory is from the first; None where elements may share a place."""
    if tensor.numel() == 0:
        return 0
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return None
        reach += stride * (size - 1)
    return reach


class _OutputHook:
    """Receives the gradient of one output tensor and forgets the input it belongs to."""

    def __init__(self, tap: Tap, x: Any, outer: int, place: _Place | None) -> None:
        self.tap, self.x, self.outer, self.place = tap, x, outer, place
        self.used = False

    @torch._disable_dynamo
    def __call__(self, delta: Tensor) -> None:
        tap = self.tap
        if not tap.switch.on:
            return
        delta = delta.detach() if self.place is None else self.place.of(delta.detach())
        backward = torch._C._current_graph_task_id()  # tells micro-batches from several uses in one pass
        if self.used:  # retain_graph: the same samples again
            for watch, _ in tap.feeds:
                if watch.trained:
                    watch.passes.setdefault(backward, Pass(tap.rule.samples(tap.module, delta))).retained = True
            return
        if self.outer != -1:
            tap.switch.outer[backward] = self.outer
        elif backward != tap.switch.backward:  # a new one: were gradients cleared after the forward pass?
            tap.switch.backward = backward
            if tap.switch.stale():
                tap.switch.discard()
                if not tap.switch.on:
                    return
        # in full precision also where the backward pass runs under autocast
        with torch.no_grad(), torch.autocast(delta.device.type, enabled=False):
            tap.receive(self.x, delta, backward)
        self.used, self.x = True, None


class _GradientHook:
    """Notes that a gradient has reached a parameter, whatever the other hooks have seen.

    The garbage collector does not look into what hangs on parameters: a model that could be reached from here would
    never be freed.
    """

    def __init__(self, watch: Watch, switch: Switch) -> None:
        self.watch, self.switch = weakref.ref(watch), weakref.ref(switch)

    def __call__(self, parameter: Tensor) -> None:
        watch, switch = self.watch(), self.switch()
        if watch is None or switch is None:
            return
        if not switch.on:
            switch.ahead = False
        else:
            self.note(watch, switch, parameter)

    @staticmethod
    @torch._disable_dynamo
    def note(watch: Watch, switch: Switch, parameter: Tensor) -> None:
        """Remember it, and enough of it to see an overflow."""
        watch.accumulated = True
        backward = torch._C._current_graph_task_id()
        watch.reached.add(backward)
        switch.reached.add(backward)
        if parameter.grad is not None:
            watch.totals.append(_sum(parameter.grad))
            watch.versions[id(parameter)] = parameter.grad._version


class _OtherHook:
    """The same for a parameter that nobody watches, where a step may overflow too."""

    def __init__(self, switch: Switch) -> None:
        self.switch = weakref.ref(switch)

    def __call__(self, parameter: Tensor) -> None:
        switch = self.switch()
        if switch is not None and switch.on:
            self.note(switch, parameter)

    @staticmethod
    @torch._disable_dynamo
    def note(switch: Switch, parameter: Tensor) -> None:
        """Remember enough to see an overflow."""
        if parameter.grad is not None:
            switch.others.append(_sum(parameter.grad))


def _sum(gradient: Tensor) -> Tensor:
    """Of this process's part; finite if that is."""
    gradient = local(gradient.detach())
    half = gradient.is_floating_point() and gradient.element_size() < 4  # its sum may overflow by itself
    return gradient.sum(dtype=torch.float32 if half else None)


def overhear(parameters: Iterable[nn.Parameter], switch: Switch) -> list[RemovableHandle]:
    """Notice gradients of parameters that nobody watches."""
    hook = _OtherHook(switch)
    known = (p for p in parameters if not isinstance(p, nn.parameter.UninitializedParameter))
    return [p.register_post_accumulate_grad_hook(hook) for p in known if p.requires_grad and p.is_leaf]


def listen(watch: Watch, switch: Switch) -> list[RemovableHandle]:
    """Notice gradients that reach the parameters of a watch, those that are frozen too: they may be trained later."""
    hook, handles = _GradientHook(watch, switch), []
    for p in watch.parameters:
        if p.is_inference():  # never
            continue
        trained = p.requires_grad
        handles.append(p.requires_grad_().register_post_accumulate_grad_hook(hook))  # torch refuses frozen ones
        p.requires_grad_(trained)
    return handles


def _is_symbolic(tensor: Tensor) -> bool:
    """Inside torch.func transforms, tracing and export a tensor stands for others; there is nothing to watch."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or isinstance(tensor, FakeTensor | FunctionalTensor) or torch.jit.is_tracing()
