"""From what the hooks caught to the gradient noise of each layer, and to what the optimiser will make of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lipdyn_torch._bridge import Pair, Spectrum, all_finite
from lipdyn_torch._hooks import Call, Pass, Switch, Watch, add, failure
from lipdyn_torch.errors import FactorSizeError
from lipdyn_torch.layers import Block, Sums, working
from lipdyn_torch.noise import (
    FACTOR_ERROR,
    GradientNoise,
    OnRows,
    check_factor_size,
    common_factor,
    factor_slack,
    mismatch,
    nearest_factor,
)
from lipdyn_torch.optimizers import Response, gradient_of, mean_drift, respond

__all__ = ["RESIZED", "Caught", "collect", "rate_of", "settle", "without_samples"]

NO_GRADIENT = "no gradient reached this layer"
NO_SAMPLES = "no samples reached this layer"
SILENT = "a gradient reached the weight past the monitor: used by a function, or compiled away"
EDITED = "weight was changed between backward and step"
MISMATCH = "contributions do not sum to the gradient"
NOT_FINITE = "gradient is not finite"
SKIPPED = "step skipped: the gradient overflowed"
UNOWNED = "its weight is not in the optimizer"
NO_SPLIT = "variance part: the matrix is not a parameter itself"
LOST = "no factor fits all layers: clipped by value, or too small to tell"
RESCALED = "gradients were rescaled after the backward pass"
RESIZED = "images of a new size: read on a torus that holds them"


@dataclass
class Caught:
    """One layer just before the step: old weight, gradient, noise, and what is wrong.

    ``problems`` make the forces NaN, ``notes`` do not. ``drift`` is ``-b / lr`` as the singular vectors see it,
    ``(G v, G^T u)``, ``bent`` what its second order adds to ``u^T G v``; ``whole`` is the gradient, seen alike.
    """

    watch: Watch
    lr: float
    batch: int = 0
    frozen: bool = False
    kept: bool = False  # frozen, but not without a gradient
    still: bool = False  # without a gradient: the optimiser passes it by
    idle: bool = False  # without samples, but with a gradient of zeros
    lengths: tuple[int, ...] = ()  # all axes of an output of the layer but the last
    latent: bool = False  # its input was a parameter itself
    same_indices: bool = False  # it was read at the indices of the last measured step
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    drift: Pair | None = None
    bent: float = 0.0
    whole: Pair | None = None
    mean: Tensor | None = None  # the gradient as a matrix (m, n), where the split needs it
    reference: Pair | None = None  # as drift, of another mean gradient
    noise: GradientNoise | None = None
    gain: float = 1.0
    decay: float = 0.0
    weights: list[Tensor] | None = None
    eps: float = 0.0  # of the least precise number the gradient passed through
    responses: dict[int, Response] = field(default_factory=dict)  # by parameter
    spectrum: Spectrum = field(init=False)
    values: list[Tensor] = field(init=False)  # of the parameters

    def __post_init__(self) -> None:
        self.spectrum, self.values = self.watch.spectrum, self.watch.values

    @property
    def moves(self) -> bool:
        """Whether the optimiser touches it in this step."""
        return not (self.frozen or self.still)

    @property
    def tolerance(self) -> float:
        """How far rounding may take the samples' sum from the gradient, relative to the samples' sizes.

        Rounding errors of sums are far below the square root of the precision; in half precision, where that is much,
        the samples' errors are known to average out. On CUDA devices the precision of a float32 convolution may be that
        of TF32 (2^-10).
        """
        if self.eps > 1e-4:
            return max((self.eps / max(self.batch, 1)) ** 0.5, 2.0 * self.eps)
        return max(self.eps**0.5, 5e-3 if self.spectrum.matrices.is_cuda and self.eps > 1e-10 else 0.0)

    def release(self) -> None:
        """Let go of all that is of the weight's size, once there is a row."""
        self.values, self.responses, self.noise, self.mean = [], {}, None, None
        self.spectrum = self.spectrum.emptied()

    def unexplained(self, changes: Sequence[Tensor]) -> bool:
        """Whether the optimiser did something else than its formula says to change the parameters by so much."""
        return any(not response.explains(self.values[i], changes[i]) for i, response in self.responses.items())


def collect(
    watch: Watch,
    optimizer: Optimizer,
    groups: dict[int, dict[str, Any]],
    switch: Switch,
    split: bool,
    reference: Mapping[int, Tensor] | None = None,
    keep_gradients: bool = False,
    joint: bool = False,
) -> Caught:
    """Everything about one layer that must be known before the step; the watch is left empty.

    In a `joint` batch of several processes other samples than this one's may have made the gradient.
    """
    # what was kept for the step is contracted with the weight of now
    if watch.refresh() and any(single.sums is not None for single in watch.passes.values()):
        watch.problems[EDITED] = None
    owned = [groups.get(id(p)) for p in watch.parameters if p.requires_grad]
    caught = Caught(watch, rate_of(watch, optimizer, groups), frozen=not watch.trained, lengths=watch.lengths)
    caught.latent, caught.same_indices = watch.latent, watch.same_indices
    caught.notes += [RESIZED] if watch.resized else []
    merged = watch.merged(switch)
    passes = [single for single in merged if single.counted]
    caught.eps = max(watch.eps, *(torch.finfo(p.dtype).eps for p in watch.parameters))
    caught.batch = sum(single.samples for single in passes)
    if caught.frozen:
        caught.kept = any(p.grad is not None and id(p) in groups for p in watch.parameters)
    else:
        # Shards are gathered here and in the response: whatever this process's samples did, all must come by.
        gradients = [
            gradient_of(optimizer, p) if p.requires_grad and p.grad is not None else None for p in watch.parameters
        ]
        caught.still = None not in owned and all(g is None for g in gradients)
        if caught.batch == 0 and any(g is not None for g in gradients):
            if not any(g is not None and bool(g.any()) for g in gradients):
                caught.idle = bool(passes) or not watch.accumulated
            elif joint and not (merged or watch.accumulated):
                caught.idle = True
            elif not passes:  # it was added by hand
                for single in merged:
                    single.counted = True
                passes, caught.batch = merged, sum(single.samples for single in merged)
        _check(caught, optimizer, owned, passes, gradients)
        if caught.spectrum.triplet is not None and None not in owned:
            _respond(caught, optimizer, groups, gradients, split, reference)
        if not caught.problems and caught.drift is not None:
            _gather(caught, merged, split, keep_gradients)
    caught.weights = None  # as large as the parameters, and no longer needed
    caught.problems += [problem for problem in watch.problems if problem not in caught.problems]
    watch.forget()
    return caught


def rate_of(watch: Watch, optimizer: Optimizer, groups: Mapping[int, dict[str, Any]]) -> float:
    """Learning rate of a layer: the largest of its parameters', of a frozen one the largest of all."""
    own = [groups[id(p)] for p in watch.parameters if p.requires_grad and id(p) in groups]
    return max(float(group["lr"]) for group in own or optimizer.param_groups)


def _check(
    caught: Caught,
    optimizer: Optimizer,
    owned: list[dict[str, Any] | None],
    passes: list[Pass],
    gradients: list[Tensor | None],
) -> None:
    """What makes the forces meaningless before anything is computed."""
    watch, problems = caught.watch, caught.problems
    problems += watch.problems
    known = [g for g in gradients if g is not None]
    if None in owned:
        problems.append(UNOWNED)
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and float(found_inf) > 0:
        problems.append(SKIPPED)
    elif not all(map(all_finite, known)):
        problems.append(NOT_FINITE)
    if caught.idle:
        caught.notes.append(NO_SAMPLES)
    elif not passes:
        problems += [] if watch.problems else [SILENT if watch.accumulated else NO_GRADIENT]
    elif not known:
        problems.append(NO_GRADIENT)


def _respond(
    caught: Caught,
    optimizer: Optimizer,
    groups: dict[int, dict[str, Any]],
    given: list[Tensor | None],
    split: bool,
    reference: Mapping[int, Tensor] | None,
) -> None:
    """Drift, preconditioner and gain of the layer's matrix from those of its parameters (theory 5)."""
    watch = caught.watch
    responses: list[Response] = []
    gradients: list[Tensor] = []
    for i, (p, old, gradient) in enumerate(zip(watch.parameters, watch.values, given, strict=True)):
        if gradient is None:  # it stays where it is
            still = torch.zeros_like(working(old))
            responses.append(Response(still, still, 0.0, gain=0.0))
            gradients.append(still)
            continue
        gradients.append(gradient)
        response = respond(optimizer, groups[id(p)], p, gradient)
        if isinstance(response, str):
            caught.problems += [] if caught.problems else [response]
            return
        caught.responses[i] = replace(response, drift=response.direction, weights=None)  # what is left to compare
        responses.append(response)
    rates = [_rate(groups[id(p)], caught.lr) if id(p) in groups else 0.0 for p in watch.parameters]

    def folded(parts: list[Tensor]) -> list[Tensor]:
        """Drifts of several parameters, each at its own rate and with its decoupled decay."""
        terms = zip(rates, parts, responses, watch.values, strict=True)
        return [rate * (part.double() + r.decay * x.double()) for rate, part, r, x in terms]

    if len(responses) == 1:
        (only,) = responses
        drifts, caught.gain, caught.decay = [only.drift], only.gain, only.decay
        weights = None if only.weights is None else [only.weights]
    else:  # several rates, gains and decays are folded into the parameters' own factors
        drifts = folded([r.drift for r in responses])
        weights = [
            rate * r.gain * (torch.ones_like(r.drift) if r.weights is None else r.weights).double()
            for rate, r in zip(rates, responses, strict=True)
        ]
    if weights is not None:
        gradients = [w * g for w, g in zip(weights, gradients, strict=True)]

    spectrum = caught.spectrum

    def seen(tensors: list[Tensor]) -> Pair:
        return spectrum.project(watch.rule.matrix(watch.module, watch.part, tensors, spectrum.group))

    caught.drift, caught.whole, caught.weights = seen(drifts), seen(gradients), weights
    if split:
        caught.mean = watch.rule.coordinates(watch.module, watch.part, gradients, spectrum.group).double()
    bent = watch.rule.second_order(watch.module, watch.part, drifts)
    caught.bent = 0.0 if bent is None else float(spectrum.u @ bent[spectrum.group] @ spectrum.v)
    if reference is not None:
        others = [
            mean_drift(groups[id(p)], r, reference.get(id(p), torch.zeros_like(r.drift)), p)
            if r.gain
            else torch.zeros_like(r.drift)
            for p, r in zip(watch.parameters, responses, strict=True)
        ]
        caught.reference = seen(others if len(others) == 1 else folded(others))


def _rate(group: dict[str, Any], lr: float) -> float:
    """A group's learning rate in units of the layer's; while a schedule holds both at zero they are alike."""
    return float(group["lr"]) / lr if lr else 1.0


def _gather(caught: Caught, merged: list[Pass], split: bool, keep_gradients: bool) -> None:
    """Join micro-batches to one batch of contributions.

    Gradients of `torch.autograd.grad` may have been added by hand: where what is counted does not make up the gradient,
    up to a factor, and all passes together do, they are the batch.
    """
    if caught.batch == 0:
        caught.problems += [] if caught.idle else [NO_SAMPLES]
        return
    caught.noise = _joined(caught, [single for single in merged if single.counted], split, keep_gradients)
    if caught.noise is None or all(single.counted for single in merged) or _fits(caught, caught.noise):
        return
    whole = _joined(caught, merged, split, keep_gradients)
    if whole is not None and _fits(caught, whole):
        caught.noise, caught.batch = whole, sum(single.samples for single in merged)


def _fits(caught: Caught, noise: GradientNoise) -> bool:
    """Whether the samples sum to a multiple of the gradient."""
    assert caught.whole is not None
    factor, _ = nearest_factor(noise, caught.whole)
    return bool(mismatch(noise.scaled(factor), caught.whole) <= caught.tolerance)


def _joined(caught: Caught, passes: list[Pass], split: bool, keep_gradients: bool) -> GradientNoise | None:
    """The contributions of all samples of the passes; None leaves a problem behind."""
    watch = caught.watch
    sums = [_sums(watch, single, caught.weights) for single in passes]
    if watch.problems or any(part is None for part in sums):
        caught.problems += watch.problems
        return None
    p, *others = zip(*(part for part in sums if part is not None), strict=True)
    first = OnRows.joined(p)
    joined = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in others]
    try:
        squares = _squares(caught, passes) if split else None
        gradients = _gradients(caught, passes) if keep_gradients and squares is not None else None
    except Exception as error:  # of the user's own code, as in `Watch.contract`
        caught.problems.append(failure(error))
        return None
    bend = (joined[1], joined[2]) if len(joined) == 3 else None
    return GradientNoise.from_contributions(first, joined[0], squares, caught.mean, bend, gradients)


def _sums(watch: Watch, single: Pass, weights: list[Tensor] | None) -> Sums | None:
    """``p``, ``q``, ... of one pass, all its calls added up sample by sample."""
    total = single.sums
    for call in single.calls:
        part = watch.contract(call, weights)
        if part is None:
            return None
        total = part if total is None else add(total, part)
    return total


def _squares(caught: Caught, passes: list[Pass]) -> Tensor | None:
    """``sum_i (W o G_i)^2`` elementwise; several calls of one pass are added before squaring."""
    watch, group = caught.watch, caught.spectrum.group
    total: Tensor | None = None
    for single in passes:
        if len(single.calls) == 1:
            (call,) = single.calls
            part = call.rule.sum_of_squares(call.module, call.x, call.delta, Block(call.part, group))
        else:
            part = _joint_squares(single, group)
        if part is None:
            caught.notes.append(NO_SPLIT)
            return None
        total = part if total is None else total + part
    if total is not None and caught.weights is not None:
        W = watch.rule.coordinates(watch.module, watch.part, caught.weights, group)
        total = W.square() * total
    return total


def _gradients(caught: Caught, passes: list[Pass]) -> Tensor | None:
    """The samples' contributions (M, m, n) themselves, all calls of a pass added up."""
    watch, group = caught.watch, caught.spectrum.group
    if not _can_be_kept(caught):
        return None
    W = None
    if caught.weights is not None:
        W = watch.rule.coordinates(watch.module, watch.part, caught.weights, group).double()
    samples = torch.stack([G for single in passes for G in _one_by_one(single, group)])
    return samples if W is None else W * samples


def _can_be_kept(caught: Caught) -> bool:
    """Whether the samples' contributions are few enough numbers; else there is a note."""
    try:
        assert caught.mean is not None  # it comes with the split
        check_factor_size((caught.batch, *caught.mean.shape))
    except FactorSizeError as error:
        caught.notes.append(f"no factor: {error}")
        return False
    return True


def _joint_squares(single: Pass, group: int) -> Tensor | None:
    """The same for a weight used several times in a pass."""
    total: Tensor | None = None
    for G in _one_by_one(single, group):
        total = G.square() if total is None else total + G.square()
    return total


def _one_by_one(single: Pass, group: int) -> Iterator[Tensor]:
    """The samples' contributions in float64, those of all calls of the pass added up."""

    def of(call: Call) -> Iterator[Tensor]:
        for chunk in call.rule.per_sample(call.module, call.x, call.delta, Block(call.part, group)):
            yield from chunk

    for parts in zip(*map(of, single.calls), strict=True):
        yield torch.stack(parts).sum(0).double()


def without_samples(layers: Sequence[Caught], keep_gradients: bool = False) -> None:
    """Every sample's gradient of a layer without samples is known: it is zero, in a batch of the other layers' size.

    For an empty batch two samples stand, as there is no covariance of fewer.
    """
    batch = max((caught.batch for caught in layers), default=0)
    for caught in layers:
        if caught.idle and caught.drift is not None and not caught.problems:
            caught.batch, size, spectrum = batch, batch or 2, caught.spectrum
            zeros = partial(spectrum.matrix.new_zeros, dtype=torch.float64)
            shape = None if caught.mean is None else caught.mean.shape
            gradients = zeros(size, *shape) if shape and keep_gradients and _can_be_kept(caught) else None
            squares = None if shape is None else zeros(*shape)
            p, q = zeros(size, 0), zeros(size, len(spectrum.v))
            rows, height = torch.empty(0, dtype=torch.int64, device=p.device), len(spectrum.u)
            caught.noise = GradientNoise(p, q, squares, caught.mean, gradients=gradients, rows=rows, height=height)


def settle(layers: Sequence[Caught]) -> float:
    """Bring all layers' samples to the units of the gradients they belong to, and check that they sum to them.

    Returns the common factor by which gradients were changed between backward pass and step: the inverse of a
    loss scale, or that of clipping by norm. Layers that were clipped in groups have factors of their own.
    """
    known = [caught for caught in layers if caught.noise is not None]
    factors = [nearest_factor(c.noise, c.whole) for c in known if c.noise is not None and c.whole is not None]
    common = common_factor(factors, max(c.eps for c in known)) if known else 1.0
    for caught, nearest in zip(known, factors, strict=True):
        assert caught.noise is not None
        assert caught.whole is not None
        if common != common:
            caught.noise, caught.problems = None, [*caught.problems, LOST]
            continue
        noise = caught.noise.scaled(common)
        error, factor = mismatch(noise, caught.whole), common
        if not _is_common(caught, error, common, *nearest):
            factor = _own_factor(caught, common, *nearest)
            noise = caught.noise.scaled(factor)
        if factor != factor:
            caught.noise = None
            caught.problems.append(f"{MISMATCH} (relative {error:.1e}): clipped by value, or used elsewhere?")
            continue
        caught.noise = noise
        if factor != 1.0:
            caught.notes.append(f"{RESCALED}: factor {factor:.3g}")
    return common


def _is_common(caught: Caught, error: float, common: float, own: float, deviation: float) -> bool:
    """Whether a layer's gradient, off by that error, was multiplied by the factor of the others."""
    # in half precision the sum's rounding hides what a factor of the layer's own still shows
    slack = factor_slack(deviation / abs(common), caught.eps) + caught.tolerance
    apart = deviation <= FACTOR_ERROR * abs(own) and abs(own / common - 1.0) > slack
    return error <= caught.tolerance and not (caught.eps > 1e-4 and apart)


def _own_factor(caught: Caught, common: float, own: float, deviation: float) -> float:
    """What it was multiplied by, if not by that; NaN if by nothing."""
    assert caught.noise is not None
    assert caught.whole is not None
    if caught.eps > 1e-4:  # its rounding would hide what else there may be in the gradient
        return math.nan
    # One of its own must leave no more than rounding of the gradient, and next to nothing of what the others leave:
    # what was clipped by value, or has another gradient in it, is hardly a multiple. Of a single number everything is.
    own = 1.0 if abs(own - 1.0) <= factor_slack(deviation, caught.eps) else own
    gained = min((abs(own - other) for other in (common, 1.0) if other != own), default=0.0)
    numbers = sum(seen.numel() for seen in caught.whole)
    if not (numbers > 2 and deviation * numbers**0.5 < min(FACTOR_ERROR * gained, caught.tolerance * own)):
        return math.nan
    return own if mismatch(caught.noise.scaled(own), caught.whole) <= caught.tolerance else math.nan
