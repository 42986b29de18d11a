"""From what was caught to rows of the history: one per layer, one for the network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lipdyn_torch._bridge import (
    REPEATED,
    Spectrum,
    cluster_values,
    follow_spectrum,
    read_spectrum,
    spectral_norm,
    taylor,
)
from lipdyn_torch._collect import Caught
from lipdyn_torch.dynamics import drift, network_noise, noise_curvature, noise_strength, pathwise_changes
from lipdyn_torch.history import NETWORK, SPLIT_COLUMNS, Row

__all__ = ["Measurement", "network_row"]

_NAN = math.nan
BATCH_OF_ONE = "batch of one: noise terms undefined"
CLIPPED = "predicted change below -90 %: clipped"
OTHER_UPDATE = "the step is not the one the optimizer's formula gives: drift and noise terms unknown"
FROZEN = "frozen"
KEPT = "frozen with a gradient left, by which the optimizer still moves it"
#: So many layers of the same status are named in that of the network.
FEW = 3
_FORCES = ("mu", "kappa", "lambda_sq", "gHg")


@dataclass
class Measurement:
    """One layer in one step: made before the step, completed after it."""

    caught: Caught
    split: bool
    reference: bool = False  # whether there is another mean gradient to take the drift of
    row: Row = field(default_factory=dict)
    scores: Tensor | None = None

    def complete(self, keep: bool) -> Row:
        """The row, once the step is made; with `keep` the watch then knows the new weight's spectrum.

        Without, no more is found of it than its largest singular value, in a fraction of the time.
        """
        caught, before, watch = self.caught, self.caught.spectrum, self.caught.watch
        if before.problem:
            caught.problems.append(before.problem)
        after = None
        if keep:
            watch.refresh()
            after, values, matrices = watch.spectrum, watch.values, watch.spectrum.matrices
        else:
            values, matrices = watch.look()
        changes, updates = watch.changes((caught.values, before.matrices), (values, matrices))
        if caught.drift is not None and not caught.problems and caught.unexplained(changes):
            caught.problems.append(OTHER_UPDATE)
        if caught.kept and bool(updates.any()):
            caught.frozen = False
            caught.problems.append(KEPT)
        path = self._path(matrices, updates, after)
        self.row = {"layer": caught.watch.name, "lr": caught.lr, "batch": caught.batch}
        self.row |= {"sigma": before.sigma, "gap": before.gap}
        self.row |= path | self._forces()
        remarks = [FROZEN] if caught.frozen else []
        status = "; ".join(dict.fromkeys([*caught.problems, *remarks, *caught.notes])) or "ok"
        self.row |= {"z": _log(before.sigma), "status": status}
        caught.release()
        return self.row

    def _path(self, matrices: Tensor, updates: Tensor, after: Spectrum | None) -> Row:
        """What the actual update does to log sigma, predicted and observed (theory 2.7, 2.8, 1.9).

        ``mode`` says how ``dz1`` ... ``dz3`` were made: by the "series" of one value while eps < 1, by the
        effective matrix of the "cluster" of values near it beyond that, and where the cluster would be too large
        they are the "exact" change.
        """
        before = self.caught.spectrum
        out: Row = dict.fromkeys(("eps", "dz1", "dz2", "dz3", "bound", "remainder"), _NAN)
        size = spectral_norm(updates) if before.problem in ("", REPEATED) else _NAN
        size = size if size < math.inf else _NAN
        if size == size:
            out["eps"] = 2.0 * size / before.gap if before.gap > 0 else (math.inf if size > 0 else 0.0)
        if after is None and size == 0.0:
            after = before
        if size > 0.0 and before.known_by_value:  # it was frozen
            before = self.caught.spectrum = read_spectrum(before.matrices)
        if after is None:  # while eps < 1 the largest value stays the largest
            near = before.triplet is not None and out["eps"] < 1.0
            after = follow_spectrum(matrices, before) if near else read_spectrum(matrices, before)
        if after.problem and after.problem != before.problem:
            self.caught.notes.append(f"after the step: {after.problem}")
        out |= {"mode": "none", "dz": _log(after.sigma) - _log(before.sigma)}
        if size != size:
            return out
        out["mode"], changes, first = self._changes(updates, size, out["eps"], out["dz"])
        out["dz1"], out["dz2"], out["dz3"] = changes
        out["bound"] = _bound(before, updates[before.group], size, out, first)
        out["remainder"] = out["dz"] - out["dz2"]
        return out

    def _changes(self, updates: Tensor, size: float, eps: float, observed: float) -> tuple[str, list[float], float]:
        """The mode, the changes of log sigma to order 1, 2, 3, and that of sigma to the first.

        The last is a lower bound of the change (sigma is convex); -inf where it does not exist.
        """
        before = self.caught.spectrum
        if size == 0.0:
            return "series", [0.0] * 3, 0.0
        values = None
        if eps < 1.0:
            coefficients = taylor(before, updates[before.group])
            changes, clipped = pathwise_changes(coefficients)
            if clipped:
                self.caught.notes.append(CLIPPED)
            return "series", changes, coefficients[1]
        first = -math.inf
        if before.triplet is not None:
            first = taylor(before, updates[before.group], order=1)[1]
        try:
            values = cluster_values(before, updates, size)
        except (ArithmeticError, ValueError, torch.linalg.LinAlgError):
            values = None
        if values is None or min(values) <= 0.0:
            return "exact", [observed] * 3, first
        return "cluster", [math.log(value / before.sigma) for value in values], first

    def _forces(self) -> Row:
        """Drift, noise curvature and noise strength per unit of SDE time (theory 2.1, 2.4, 5)."""
        caught = self.caught
        keys = (*_FORCES, *(SPLIT_COLUMNS if self.split else ()), *(("mu_ref",) if self.reference else ()))
        if not caught.moves:
            self.scores = torch.zeros(0)
            return dict.fromkeys(keys, 0.0)
        out: Row = dict.fromkeys(keys, _NAN)
        noise, spectrum, lr, b = caught.noise, caught.spectrum, caught.lr, caught.drift
        if caught.problems or noise is None or b is None:
            return out
        if noise.batch < 2:
            caught.notes.append(BATCH_OF_ONE)
        terms, sigma, square = noise.terms(spectrum, b), spectrum.sigma, caught.gain**2
        self.scores = caught.gain * terms.scores
        u = spectrum.u
        decay = -math.log1p(-lr * caught.decay) / lr if 0 < lr * caught.decay < 1 else caught.decay
        out["mu"] = drift(float(u @ b[0]), sigma, decay)
        if caught.reference is not None:
            out["mu_ref"] = drift(float(u @ caught.reference[0]), sigma, decay)
        out["gHg"] = terms.gradient_curvature + 2.0 * caught.bent
        out["kappa"] = noise_curvature(square * terms.noise_curvature, sigma, lr)
        out["lambda_sq"] = noise_strength(square * terms.noise, sigma, lr)
        if self.split:
            out["kappa_var"] = noise_curvature(square * terms.noise_curvature_var, sigma, lr)
            out["lambda_sq_var"] = noise_strength(square * terms.noise_var, sigma, lr)
            _set_covariance_parts(out)
        return out


def _bound(before: Spectrum, update: Tensor, size: float, row: Row, first: float) -> float:
    """Certified bound of ``|dz - dz2|``.

    Two statements hold together: the truth lies in ``[sigma + u^T D v, sigma + ||D||]`` (sigma is convex, and
    Weyl), and, for the series with eps < 1, within its remainder (theory 1.9). Rounding is allowed for.
    """
    margin = 10.0 * max(before.matrices.shape[1:]) * 2.0**-52 * (before.sigma + size)
    if torch.finfo(update.dtype).eps > 1e-10:  # the difference of two weights was rounded, and || |D| ||_2 <= ||D||_F
        margin += 2.0**-24 * size * math.sqrt(min(update.shape))
    if row["mode"] == "exact":
        return 0.0
    estimate = before.sigma * math.exp(row["dz2"])
    low, high = before.sigma + max(first, -size) - margin, before.sigma + size + margin
    eps = row["eps"]
    if row["mode"] == "series":
        remainder = before.gap / 2 * eps**3 / (1 - eps) + margin
        low, high = max(low, estimate - remainder), min(high, estimate + remainder)
    if low <= 0.0:
        return math.inf
    rounding = 2.0**-50 * (1.0 + abs(math.log(before.sigma)))  # of the logarithms
    return max(math.log(high / estimate), math.log(estimate / low), 0.0) + rounding


def network_row(measurements: Sequence[Measurement]) -> Row:
    """The sum over the layers: Z = sum log sigma, K = exp Z in column ``sigma`` (theory 2.1, 2.9).

    With several learning rates ``lr`` is the largest, and the forces are scaled so that ``lr`` times the force
    is the layers' joint effect in this step. ``gap`` is the smallest, ``eps`` the largest of the layers'; ``batch``
    is 0 where they disagree on it.
    """
    rows = [measurement.row for measurement in measurements]
    moving = [m for m in measurements if m.caught.moves]
    split = measurements[0].split
    lr = max(m.row["lr"] for m in (moving or measurements))
    batches = {m.row["batch"] for m in moving if m.row["batch"] > 0}
    row: Row = {"layer": NETWORK, "lr": lr, "batch": max(batches, default=0) if len(batches) < 2 else 0, "gHg": _NAN}
    row["z"] = sum(r["z"] for r in rows)
    row["sigma"] = math.exp(row["z"]) if row["z"] < 700 else _NAN
    row["gap"], row["eps"] = _nan_min(r["gap"] for r in rows), -_nan_min(-r["eps"] for r in rows)
    row |= {key: sum(r[key] for r in rows) for key in ("dz1", "dz2", "dz3", "dz", "bound", "remainder")}
    row["mode"] = next(mode for mode in ("none", "exact", "cluster", "series") if mode in {r["mode"] for r in rows})
    share = [r["lr"] / lr if lr else 1.0 for r in rows]
    summed = ("mu", "kappa", *(("kappa_var", "lambda_sq_var") if split else ()))
    summed += tuple(key for key in ("mu_ref",) if key in rows[0])
    row |= {key: sum(s * r[key] for s, r in zip(share, rows, strict=True)) for key in summed}
    problems = _statuses(rows)
    row["lambda_sq"] = _NAN
    if len(batches) > 1:
        problems.append("layers saw different numbers of samples: no joint noise")
    elif moving and all(m.scores is not None for m in moving):
        # In units of the largest learning rate, so that the variance of the step is lr * lambda_sq.
        scores = [m.scores for m in moving if m.scores is not None]
        shares = [m.row["lr"] / lr if lr else 1.0 for m in moving]
        row["lambda_sq"] = lr * network_noise(scores, [m.row["sigma"] for m in moving], shares)
    elif not moving:
        row["lambda_sq"] = 0.0
    if split:
        _set_covariance_parts(row)
    row["status"] = "; ".join(problems) or "ok"
    return row


def _statuses(rows: Sequence[Row]) -> list[str]:
    """What the layers say, each remark once; the layers are counted where more than a few share one."""
    saying: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] not in ("ok", FROZEN):
            saying.setdefault(row["status"], []).append(row["layer"])
    return [f"{', '.join(names) if len(names) <= FEW else f'{len(names)} layers'}: {s}" for s, names in saying.items()]


def _set_covariance_parts(row: Row) -> None:
    """The signed rest: what the covariances between weights add to the variances (theory 2.4)."""
    row["kappa_cov"] = row["kappa"] - row["kappa_var"]
    row["lambda_sq_cov"] = row["lambda_sq"] - row["lambda_sq_var"]


def _log(x: float) -> float:
    return math.log(x) if x > 0 else _NAN


def _nan_min(values: Iterable[float]) -> float:
    known = list(values)
    return _NAN if any(x != x for x in known) else min(known)
