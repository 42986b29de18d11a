"""LipschitzMonitor: hooks on the modules and on the optimiser's step, a schedule, a history; no mathematics."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from itertools import chain, islice
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lipdyn_torch._bridge import one_thread
from lipdyn_torch._collect import RESIZED, Caught, collect, rate_of, settle, without_samples
from lipdyn_torch._hooks import Switch, listen, overhear
from lipdyn_torch._measure import Measurement, network_row
from lipdyn_torch._settings import batch_dims, check_settings, check_types, checked_sinks, innermost
from lipdyn_torch.distributed import active, agree, local, share
from lipdyn_torch.errors import LayerReplacedError, NoBackwardError, SilentHookError
from lipdyn_torch.history import History, ResumeError, Sink
from lipdyn_torch.integrations._extras import need
from lipdyn_torch.layers import EmbeddingRule
from lipdyn_torch.noise import GradientNoise
from lipdyn_torch.schedule import Schedule
from lipdyn_torch.survey import Report, replaced, survey

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LipschitzMonitor"]

_T = TypeVar("_T")

BATCH_NORM = "BatchNorm mixes samples: noise terms are heuristic"
UNEQUAL = "layers saw different numbers of samples"
NO_SHARE = "samples had no gradient in any layer: if the loss ignores them, noise terms take them for zeros"
CHANGED = "weight was changed since the last step"
CLEARED = "step skipped: gradients were cleared without a step"
AHEAD = "forward pass was made before the last step, while the monitor was not listening"
NOT_ONE = "a gradient reached the weight past the monitor: the module's output is not one tensor"
POSITIONS = "indices without a batch axis, as many as there are samples: taken for one for each sample"
SHARED = "indices without a batch axis: expand them to the batch, positions.expand(batch, -1)"
SQUARE = "the same indices as before, for as many rows as there are samples: positions would be taken for samples"
LATENT = "a parameter without a batch axis, as many rows as there are samples: taken for one for each sample"
ADDED = (
    "expected the parameters the optimizer had when the monitor was attached, got more: they are not monitored; close "
    "the monitor and attach a new one"
)
NOT_TAKEN = "did not take the rows of a step, which monitor.history has; it is given the next ones"
#: So many times in a row are gradients cleared without a step until somebody is told.
UNSEEN = 100
NO_STEPS = (
    f"expected steps of the optimizer that the monitor was given, got {UNSEEN} cleared gradients without one; if "
    "another optimizer makes the steps (one inside a wrapper, as SAM has, or a new one), give the monitor that one"
)
#: So many steps that were not made are told from each other in the numbers that processes exchange.
_FLAGS = 48
#: What torch puts around the ``step`` of every class of optimisers.
_STEP = Optimizer.profile_hook_step(lambda self: None).__code__


def _outermost(optimizer: Optimizer) -> bool:
    """Whether a step is not part of another one: a subclass may call ``super().step()``, which has hooks again."""
    frame: FrameType | None = sys._getframe(1)
    inside = 0
    while frame is not None and inside < 2:
        inside += frame.f_code is _STEP and frame.f_locals.get("args", (None,))[0] is optimizer
        frame = frame.f_back
    return inside < 2


class _Eager:
    """How torch treats what is compiled is set for the whole process: uncompiled while any monitor wants it so."""

    def __init__(self) -> None:
        self.wanted: set[int] = set()
        self.stance = contextlib.ExitStack()
        self.eager = self.turning = False

    def want(self, monitor: int, on: bool) -> None:
        """Note a monitor's wish; the first sets torch's stance, the last restores the one there was.

        Garbage collection calls this for monitors that were dropped, and may begin at any line: while ``turning`` it
        notes the wish alone, and the loop looks again.
        """
        (self.wanted.add if on else self.wanted.discard)(monitor)
        while not self.turning and self.eager != bool(self.wanted):
            self.turning = True
            try:
                before, self.eager = self.eager, bool(self.wanted)
                if self.eager and not before:
                    self.stance.enter_context(torch.compiler.set_stance("force_eager"))
                elif before and not self.eager:
                    self.stance.close()
            finally:
                self.turning = False


_EAGER = _Eager()


def _full_precision(method: Callable[..., _T]) -> Callable[..., _T]:
    """Autocast is for the user's arithmetic, not for ours."""

    @wraps(method)
    def exact(self: LipschitzMonitor, *args: Any) -> _T:
        with torch.autocast(self._watches[0].spectrum.matrices.device.type, enabled=False):
            return method(self, *args)

    return exact


class Detached:
    """What copies and pickles of a monitor are: they watch nothing."""


class LipschitzMonitor:
    r"""Record how, and why, the Lipschitz bound ``K = prod sigma_l`` of a network moves while it is trained.

    Training goes on exactly as before: parameters, gradients and random numbers stay bitwise the same. Hooks on
    the modules whose weights are matrices, on the weights' gradients and on ``optimizer.step`` do the work (theory
    2.4). Singular values, vectors and changes are computed in float64 on the tensors' device, the noise terms of
    float32 weights to a relative 3e-5.

    Parameters
    ----------
    model : nn.Module
        `report` says how each of its modules is read. Weights that are frozen have rows with sigma only; weights
        of another optimiser are left out. On measured steps all that `torch.compile` made, functions around the model
        and any others of the process too, runs uncompiled; on the others in the same graphs as without the monitor.
    optimizer : torch.optim.Optimizer
        The one that makes the steps, or what accelerate wraps around it. Drift and noise are those of the long run of
        `torch.optim.SGD`, `Adam`, `AdamW` and `RMSprop` (`lipdyn_torch.optimizers`); for others they are NaN. Changes
        along the path are right for every optimiser.
    every : int or "auto"
        Measure every so many steps, or as often as ``budget`` allows; between them the hooks do nothing.
    budget : float
        With "auto", per cent of the step time that measuring may take, as timed on the run.
    warmup : int
        Measure none of the first so many steps.
    noise : {"full", "split", "factor"}
        "split" adds the parts due to the variances and the covariances of the weights' gradients (theory 2.4);
        "factor" does so too, and keeps in `noise` the gradients of the samples, and so the low-rank factor of Sigma,
        of layers where they are not too many numbers.
    conv : {"matrix", "operator"}
        A convolution is read as its reshaped kernel, as in the literature, whose norm is a lower bound of that on
        images (theory 3.1); or as an operator on a torus that holds the images, whose norm is an upper bound, and the
        norm itself for circular padding and one size (theory 3.2, 3.3). The size of images is read off the first one.
    sampling : {"shuffle", "iid"}
        How batches are drawn: every sample once per epoch, or independently. Kept for the predictors' bands.
    dataset_size : int, optional
        Number of samples of an epoch, for the bands with "shuffle".
    batch_dim : int or mapping of str to int, optional
        Axis of the samples in the inputs of `torch.nn.Linear` (also with low-rank factors) and `torch.nn.Embedding`
        that have more axes than that, for all or by module name. By default the first; in torch's own transformer
        layers made with ``batch_first=False`` the second. Give 1 for a recurrent net whose data has time first.
    reference : callable, optional
        Another mean gradient to take a drift of, column ``mu_ref``: ``reference(model)`` gives gradients by
        parameter name, `lipdyn_torch.reference.MeanGradient` for example (theory 2.7).
    process_group : torch.distributed.ProcessGroup, optional
        The processes that split the batch (DistributedDataParallel, ``fully_shard``), each with a monitor of the
        inner model; by default all. Every process has the rows of the joint batch; give one of them the sinks.
    sinks : iterable of Sink
        Receive the rows of each step as they are made, `JsonLinesSink` for example.

    Attributes
    ----------
    history : History
        Rows with the columns below; ``history.to_pandas()`` is the table.
    layers : list of str
        Names of the rows, which are those of ``named_modules()``; a model that is itself a layer goes by the
        name of its class, and one with several matrices, or without a rule of its own, adds the part: ``attention.q``,
        ``block.scale``.
    skipped : dict
        Modules with parameters that are not monitored, and why.
    noise : dict of str to GradientNoise
        With ``noise="factor"``: of the last measured step, by layer; empty with several processes.

    Notes
    -----
    One row per monitored step and layer, and one with layer "network":

    ======================  =====================================================================================
    ``step, layer``         optimiser steps since attaching (0 is the first); name. A step that a loss scaler
                            skipped counts where it would have been measured, and has rows without forces
    ``lr, batch``           learning rate of this step; number of samples M. Network: 0 where layers disagree on it
    ``sigma, gap``          largest singular value before the step; its isolation distance d (theory 1.9), of large
                            weights rounded down by at most 4e-4. Network: ``sigma`` is K, ``gap`` the smallest
    ``eps``                 ``2 ||D||_2 / d`` for the update D, of large weights rounded up by at most 3e-4 more;
                            expansions are certified below 1. Network: largest
    ``mu``                  drift ``<J, b> / (lr sigma)`` with b the long-run effect of this step's gradient and of
                            weight decay (theory 5), per unit of SDE time: a step takes ``lr``
    ``mu_ref``              with ``reference``: the same for that gradient
    ``kappa``               ``<H, C> / (2 lr sigma)``, C the covariance of a step's long-run effect; per unit of
                            SDE time
    ``lambda_sq``           ``J^T C J / (lr sigma^2)``, per unit of SDE time. Network: all covariances between
                            layers included (theory 2.9)
    ``*_var, *_cov``        with ``noise="split"``: parts from the diagonal of C, and the signed rest
    ``gHg``                 ``D^2 sigma[b, b] / lr^2``; layers only
    ``mode``                how dz1 ... dz3 were made: "series" (eps < 1), "cluster" (theory 2.8), "exact", "none"
    ``dz1, dz2, dz3``       change of log sigma along the actual update to order 1, 2, 3
    ``dz``                  observed change of log sigma in this step
    ``remainder, bound``    ``dz - dz2``, and its certified bound
    ``z``                   log sigma before the step, so ``z + dz`` is after it. Network: ``log K``
    ``status``              "ok", "frozen", or why terms are NaN or to be taken with care
    ======================  =====================================================================================

    The batch is the first axis of a layer's input (but see ``batch_dim``), and the noise is that of a mean over all of
    it. A loss that ignores samples or weights classes makes another mean; samples without any gradient are counted in
    the status. Several backward passes before a step count as one batch;
    several uses of a weight in one backward pass are paired sample by sample and added.

    Raises
    ------
    NoSupportedLayerError, UnownedParametersError
        There is nothing to monitor.
    NoBackwardError, SilentHookError, LayerReplacedError
        From ``optimizer.step()``: no gradient has reached any parameter of the optimizer since the last step; or none
        has ever reached a hook, but the weights; or a layer is no longer the one the monitor was attached to.

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
        every: int | str = 1,
        budget: float = 5.0,
        warmup: int = 0,
        noise: str = "full",
        conv: str = "matrix",
        sampling: str = "shuffle",
        dataset_size: int | None = None,
        batch_dim: int | Mapping[str, int] | None = None,
        reference: Callable[[nn.Module], Mapping[str, torch.Tensor]] | None = None,
        process_group: Any = None,
        sinks: Iterable[Sink] = (),
    ) -> None:
        optimizer = innermost(optimizer)
        check_types(model, optimizer, reference)
        sinks = checked_sinks(sinks)
        check_settings(every, budget, warmup, noise, conv, sampling, dataset_size)
        dims = batch_dims(model, batch_dim)
        self._model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        self._optimizer = optimizer
        self._split, self._keep_gradients = noise != "full", noise == "factor"
        self.noise: dict[str, GradientNoise] = {}
        self._reference = reference
        self._group = process_group
        self._schedule = Schedule(every, budget, warmup, self._agree)
        self._step = 0
        self._clock: float | None = None
        self._pending: list[Measurement] | None = None
        self._inside = False  # of a step that calls a closure
        self._cleared = 0  # how often gradients went since the last step
        self._heard = False  # the hooks have seen a backward pass
        # of each step that was not made: whether it overflowed; its samples
        self._lost: deque[tuple[bool, int]] = deque(maxlen=_FLAGS)
        self._switch = Switch(discard=self._discard, stale=self._stale)
        # What a preconditioner does to a sample is known at the step only; so is which calls share a weight.
        hold = self._split or isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW | torch.optim.RMSprop)
        self._survey = survey(self._model, optimizer, self._switch, hold, dims, conv == "operator")
        self._watches = self._survey.watches
        self._batch_norms = [m for m in self._model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.skipped = self._survey.skipped
        self.history = History(
            meta={
                **{"optimizer": type(optimizer).__name__, "every": every, "noise": noise, "conv": conv},
                **{"sampling": sampling, "dataset_size": dataset_size},
                **{"layers": self.layers, "skipped": self.skipped},
                **{"shapes": [list(watch.spectrum.matrices.shape) for watch in self._watches]},
                **{"reference": None if reference is None else getattr(reference, "kind", "full")},
            }
        )
        self._sinks = sinks
        for sink in self._sinks:
            sink.start(self.history.meta)
        self._handles: list[RemovableHandle] = [tap.attach() for tap in self._survey.taps]
        for watch in self._watches:
            self._handles += listen(watch, self._switch)
        watched = {id(p) for watch in self._watches for p in watch.parameters}
        self._owned = watched | {id(p) for p in self._parameters()}  # or will be, once they are trained
        others = {id(p): p for p in self._parameters() if id(p) not in watched}
        self._handles += overhear(others.values(), self._switch)
        self._heard_of = watched | {id(p) for p in others.values() if p.requires_grad}
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        weakref.finalize(self, _EAGER.want, id(self), False).atexit = False
        self._turn(self._schedule.due(0))

    @property
    def layers(self) -> list[str]:
        """Names of the rows' layers."""
        return [watch.name for watch in self._watches]

    @property
    def log_k(self) -> float:
        """Natural logarithm of K as last measured (before the first step: of the initial weights)."""
        if self.history.rows:
            last = self.history.rows[-1]
            return last["z"] + last["dz"]
        return self._log_k_now()

    def _log_k_now(self) -> float:
        return sum(math.log(w.spectrum.sigma) if w.spectrum.sigma > 0 else math.nan for w in self._watches)

    def report(self) -> Report:
        """Every module that owns parameters: monitored, read by the fallback, or skipped and why.

        Examples
        --------
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
        >>> with LipschitzMonitor(model, torch.optim.SGD(model.parameters(), lr=0.1)) as monitor:
        ...     print(monitor.report())
        module  type       how        detail
        0       Linear     monitored  8 x 4
        1       LayerNorm  skipped    no rule for LayerNorm
        2       Linear     monitored  2 x 8
        """
        return Report(self._survey.entries)

    def plot(self) -> Figure:
        """The run in one figure: log K against the predictors, their errors, and the forces layer by layer."""
        need("matplotlib", "torch")
        from lipdyn_torch.plots import summary_figure

        return summary_figure(self.history)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after a restart: rows, step, schedule. Save it beside model and optimiser.

        Examples
        --------
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> monitor = LipschitzMonitor(model, torch.optim.SGD(model.parameters(), lr=0.1), every=5)
        >>> state = monitor.state_dict()
        >>> monitor.load_state_dict(state)
        >>> monitor.close()
        """
        return {
            **{"version": 1, "step": self._step, "history": self.history.state_dict()},
            **{"schedule": self._schedule.state_dict(), "noted": {w.name: w.rule.noted() for w in self._watches}},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a run where `state_dict` left it; load model and optimiser first. Warns if the weights do not fit.

        Raises
        ------
        lipdyn_torch.history.ResumeError
            The state is of another model, was measured otherwise, or is that of something else.
        """
        if not (isinstance(state, Mapping) and {"history", "step", "schedule"} <= state.keys()):
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ResumeError(f"expected what LipschitzMonitor.state_dict() returned, got {got}")
        self.history.load_state_dict(state["history"])
        self._step = int(state["step"])
        self._schedule.load_state_dict(state["schedule"])
        self._clock = self._pending = None
        self._lost.clear()
        if not self._handles:  # closed: it holds rows and no weights
            return
        for watch in self._watches:
            watch.forget()
            watch.refresh()
            watch.recall(state.get("noted", {}).get(watch.name, []))
        if self.history.rows and self.history.rows[-1]["step"] == self._step - 1:
            expected, found = self.log_k, self._log_k_now()
            if abs(expected - found) > 1e-6:
                warnings.warn(
                    f"expected the weights that the rows end with, log K = {expected:.6f}, got {found:.6f}; load the "
                    "model first, and the state of the same run",
                    stacklevel=2,
                )
        self._turn(self._schedule.due(self._step))

    def close(self) -> None:
        """Take every hook off and close the sinks; the history stays. Closing twice is harmless."""
        attached = bool(self._handles)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._pending = None
        if attached:
            self._turn(False)
        for watch in self._watches:
            watch.release()
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Detached, ()

    def __repr__(self) -> str:
        state = "attached" if self._handles else "closed"
        return f"LipschitzMonitor({len(self._watches)} layers, {self._step} steps seen, {state})"

    def _turn(self, on: bool) -> None:
        """Switch the hooks; compiled models, and functions around them, run their Python while the hooks listen."""
        self._switch.on = on
        _EAGER.want(id(self), on and bool(self._handles))

    @torch._disable_dynamo  # a compiled step calls the hooks as they are, like torch's own zero_grad
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read gradients, learning rates and noise while the weights are still the old ones."""
        if not self._schedule.due(self._step) or not _outermost(optimizer):
            return None
        failed, self._pending, self._inside = self._pending, None, False
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            # the last call may not have come to its end, and this one be made with the same gradients
            again = failed is not None and not any(watch.passes or watch.accumulated for watch in self._watches)
            self._pending = failed if again else self._read()
            return None
        # With a closure the (last) backward pass happens inside the step: read after it, before the optimiser acts.
        self._inside = True
        watched = self._reading(closure)
        return ((args[0], watched, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": watched})

    def _reading(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, followed by a reading the first time it is called."""

        def watched() -> Any:
            try:
                loss = closure()
            except BaseException:  # the step ends here, and what was caught belongs to no step
                self._pending, self._inside = None, False
                for watch in self._watches:
                    watch.forget()
                self._turn(True)
                raise
            if self._pending is None:
                self._pending = self._read()
                self._switch.on = False
            return loss

        return watched

    @torch._disable_dynamo
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compare with the new weights and write the rows."""
        if not _outermost(optimizer):
            return
        due = self._schedule.due(self._step) or self._pending is not None
        pending, self._pending, self._inside = self._pending, None, False
        try:
            if pending is not None:
                self._write(pending)
        finally:  # the step was made
            self._finish(due)

    def _stale(self) -> bool:
        """Whether gradients were cleared to which contributions were caught; no shard is gathered to find that out."""
        caught = [watch for watch in self._watches if watch.passes]
        return any(all(local(p) is p for p in watch.parameters) and watch.cleared() for watch in caught)

    def _agree(self, period: int) -> int:
        """All processes measure the same steps: those the slowest of them can afford."""
        return int(agree([period], self._device, self._group)[0])

    @property
    def _device(self) -> torch.device:
        return self._watches[0].spectrum.matrices.device

    def _finish(self, measured: bool) -> None:
        """Count the step and decide on the next."""
        now = time.perf_counter()
        if self._clock is not None:
            self._schedule.note(now - self._clock, measured)
        self._schedule.finished(self._step)
        self._step, self._cleared = self._step + 1, 0
        due = self._schedule.due(self._step)
        if due or measured:
            self._turn(due)
        self._clock = time.perf_counter()

    @torch.no_grad()
    @one_thread
    @_full_precision
    def _write(self, measurements: list[Measurement]) -> None:
        next_too = self._schedule.period == 1  # where it is not, or not sure, the next reading may find the spectrum
        rows = [m.complete(keep=next_too) for m in measurements]
        rows.append(network_row(measurements))
        rows = [{"step": self._step, **row} for row in rows]
        self.history.extend(rows)
        for sink in self._sinks:
            try:
                sink.write(rows)
            except Exception as error:  # training goes on, whatever becomes of a record
                kind = type(error).__name__
                warnings.warn(f"{type(sink).__name__} {NOT_TAKEN} ({kind}: {error})", RuntimeWarning, stacklevel=2)

    def _discard(self) -> None:
        """Gradients were cleared without a step. Where they had overflowed, a loss scaler skipped it: that gets rows.

        One layer whose gradient happens to be zero is no sign that anything was cleared.
        """
        caught = [watch for watch in self._watches if watch.trained and watch.passes]
        if not all(watch.cleared() for watch in caught):
            return
        batch = max(sum(p.samples for p in watch.merged(self._switch) if p.counted) for watch in self._watches)
        overflowed = any(watch.overflowed() for watch in caught) or not all(map(torch.isfinite, self._switch.others))
        reached = any(watch.accumulated for watch in caught)  # else none was on its way to a step
        for watch in self._watches:
            watch.forget()
        self._switch.forget()
        made = reached and not self._inside
        if made and active(self._group):  # others may know of an overflow, or nothing of this pass
            self._lost.append((overflowed, batch))  # settled with the next step
        if not (made and overflowed):
            self._cleared += 1
            if self._cleared == UNSEEN and self._changed():
                warnings.warn(NO_STEPS, stacklevel=2)
        elif not active(self._group):
            self._write(self._skipped(batch))
            self._finish(True)

    def _skipped(self, batch: int) -> list[Measurement]:
        """The layers in a step that was not made."""
        groups = self._groups()
        rates = [rate_of(watch, self._optimizer, groups) for watch in self._watches]
        layers = [Caught(w, lr, batch, not w.trained) for w, lr in zip(self._watches, rates, strict=True)]
        for layer in layers:
            layer.problems += [] if layer.frozen else [CLEARED]
        return [Measurement(layer, self._split) for layer in layers]

    def _combine(self, layers: list[Caught], silent: int) -> int:
        """Put the joint batch in place of this process's, and write the rows of steps that were not made meanwhile.

        Returns the number of silent samples in all processes.
        """
        lost = list(self._lost)
        self._lost.clear()
        flags = sum(overflowed << i for i, (overflowed, _) in enumerate(lost))
        last = max(lost, default=(False, 0), key=lambda step: step[0])  # an overflow rather than another
        said = share(layers, self._group, [silent, len(lost), flags, last[1]])
        silents, counts, masks, batches = zip(*said, strict=True)
        if len(set(counts)) == 1:
            skipped = sum(1 << i for i in range(counts[0]) if any(mask >> i & 1 for mask in masks)).bit_count()
        else:  # some process had passes of its own
            skipped = max(mask.bit_count() for mask in masks)
        for _ in range(skipped):
            self._write(self._skipped(sum(batches)))
            self._schedule.finished(self._step)
            self._step += 1
        return sum(silents)

    @torch.no_grad()
    @one_thread
    @_full_precision
    def _read(self) -> list[Measurement]:
        name = replaced(self._model, self._survey.paths, self._watches)
        if name is not None:
            raise LayerReplacedError(
                f"expected layer {name!r} to be the one the monitor was attached to, got another layer or weight; "
                "close the monitor and attach a new one"
            )
        self._check_alive()
        for watch in self._watches:
            if watch.accumulated and not watch.passes and watch.unread:
                watch.problems[NOT_ONE] = None
        groups = self._groups()
        added = [p for p in self._parameters() if id(p) not in self._owned]
        self._owned |= groups.keys()
        if any(p.ndim > 1 for p in added):
            warnings.warn(ADDED, stacklevel=2)
        joint = active(self._group)
        noted = {watch.name: watch.rule.noted() for watch in self._watches}
        if any(noted.values()) and joint:  # the largest images may have come to another process
            largest = iter(agree(list(chain.from_iterable(noted.values())), self._device, self._group))
            for watch in self._watches:
                watch.recall(list(islice(largest, len(noted[watch.name]))))
        reference = self._mean_gradient()
        caught = [
            collect(watch, self._optimizer, groups, self._switch, self._split, reference, self._keep_gradients, joint)
            for watch in self._watches
        ]
        self._switch.forget()
        without_samples(caught, self._keep_gradients)
        silent = _note_samples(caught)
        self._note_changes(caught)
        if joint:
            silent = self._combine(caught, silent)
        _note_batches(caught, silent)
        settle(caught)
        if self._keep_gradients:
            self.noise = {c.watch.name: c.noise for c in caught if isinstance(c.noise, GradientNoise)}
        # without running statistics it takes those of the batch in evaluation too
        if any(norm.training or norm.running_mean is None for norm in self._batch_norms):
            for layer in caught:
                if layer.noise is not None:
                    layer.notes.append(BATCH_NORM)
        return [Measurement(layer, self._split, self._reference is not None) for layer in caught]

    def _note_changes(self, layers: list[Caught]) -> None:
        """Say which weights are not those that the last step left."""
        last = self.history.rows[-len(layers) - 1 :]
        if not last or last[0]["step"] != self._step - 1:
            return
        for layer, row in zip(layers, last, strict=False):
            sigma = layer.spectrum.sigma
            if RESIZED not in layer.notes and sigma > 0 and abs(math.log(sigma) - row["z"] - row["dz"]) > 1e-9:
                layer.notes.append(CHANGED)

    def _changed(self) -> bool:
        """Whether somebody else may be making steps: the weights are not those of the last measured one."""
        return not self.history.rows or abs(self.log_k - self._log_k_now()) > 1e-9

    def _mean_gradient(self) -> dict[int, torch.Tensor] | None:
        """The reference gradient by parameter; the hooks look away meanwhile."""
        if self._reference is None:
            return None
        self._switch.on = False
        try:
            gradients = self._reference(self._model)
        finally:
            self._switch.on = True
        return {id(self._model.get_parameter(name)): g for name, g in gradients.items()}

    def _groups(self) -> dict[int, dict[str, Any]]:
        return {id(p): group for group in self._optimizer.param_groups for p in group["params"]}

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _check_alive(self) -> None:
        """Some hook must have spoken; once they have, a step past them is a step, with rows that say so."""
        trained = [watch for watch in self._watches if watch.trained]
        past = [watch for watch in trained if watch.accumulated and not watch.passes]
        if self._switch.ahead and past:
            for watch in past:
                watch.problems[AHEAD] = None
            return
        if not trained or any(watch.passes or watch.problems for watch in trained):
            self._heard = True
            return
        if past and not self._heard:
            raise SilentHookError(
                f"expected the hooks on {', '.join(w.name for w in trained)} to see the backward pass, but gradients "
                "came past them; a module of your own must return one tensor of its own, and torch.compiler.set_stance "
                "leave measured steps uncompiled"
            )
        # of parameters that were added, or trained, later there is only the gradient to see
        late = (p.grad is not None for p in self._parameters() if id(p) not in self._heard_of)
        if past or self._switch.others or any(late):
            return
        raise NoBackwardError(
            f"expected a backward pass through a monitored layer ({', '.join(self.layers)}) before "
            f"optimizer.step(), got none since the last step (step {self._step}); call loss.backward() first, "
            "on the model the monitor was given, or close the monitor"
        )


def _note_batches(layers: list[Caught], silent: int) -> None:
    """Say in every row what makes M doubtful: layers that disagree on it, and so many samples without any gradient.

    A number that at least twice as many layers saw as any other is the batch.
    """
    known = [layer for layer in layers if layer.noise is not None]
    seeing = [layer for layer in known if not _empty(layer)]
    sizes = Counter(layer.batch for layer in seeing)
    if len(sizes) > 1:
        (usual, most), (_, second) = sizes.most_common(2)
        clear = most >= 2 * second
        for layer in seeing:
            if layer.batch != usual or not clear:
                layer.notes.append(f"{UNEQUAL}: {', '.join(map(str, sorted(sizes)))}")
                if isinstance(layer.watch.rule, EmbeddingRule) and _shared(layer, usual if clear else 0):
                    layer.notes.append(SHARED)
        return
    for layer in known:
        if 0 < silent < layer.batch:
            layer.notes.append(f"{silent} of {layer.batch} {NO_SHARE}")


def _shared(layer: Caught, usual: int) -> bool:
    """Whether an embedding was read for all samples at once: no axis, nor all together, is as long as the batch.

    Of no `usual` batch only a first axis of one tells.
    """
    first = layer.lengths[0] if layer.lengths else 1
    batch = usual * first / layer.batch  # in each of several passes or processes
    return first == 1 or (batch > 0 and batch not in (*layer.lengths, math.prod(layer.lengths)))


def _empty(layer: Caught) -> bool:
    """Whether it had no samples here, nor in another process: its M was taken from the other layers."""
    return layer.idle and layer.noise is not None and not any(layer.noise.sizes)


def _note_samples(layers: list[Caught]) -> int:
    """Say in rows where M may be something else; returns how many samples of this process have no gradient anywhere."""
    known = [layer for layer in layers if layer.noise is not None]
    if len({layer.batch for layer in known}) != 1:
        return 0
    batch = known[0].batch
    shapes = [layer.lengths for layer in known]
    for layer in known:
        if layer.lengths == (batch,):
            if isinstance(layer.watch.rule, EmbeddingRule) and (batch, batch) in shapes:
                layer.notes.append(POSITIONS)
            if layer.latent and max(map(len, shapes)) > 1:
                layer.notes.append(LATENT)
        if layer.same_indices and layer.lengths == (batch, batch):
            layer.notes.append(SQUARE)
    return int(torch.stack([c.noise.silent for c in known if c.noise is not None]).all(0).sum())
