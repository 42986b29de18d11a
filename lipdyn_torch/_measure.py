"""From what was caught to rows of the history: one per layer, one for the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lipdyn_torch._bridge import Spectrum, spectral_norm, taylor
from lipdyn_torch.dynamics import drift, network_noise, noise_curvature, noise_strength, pathwise_changes
from lipdyn_torch.history import NETWORK, SPLIT_COLUMNS, Row
from lipdyn_torch.noise import GradientNoise

__all__ = ["Measurement", "UpdateRule", "network_row"]

_NAN = math.nan
BATCH_OF_ONE = "batch of one: noise terms undefined"
CLIPPED = "predicted change below -90 %: clipped"


@dataclass(frozen=True)
class UpdateRule:
    """How one parameter group turns gradients into steps, read from the optimiser before it acts."""

    lr: float
    weight_decay: float
    maximize: bool
    problem: str = ""

    @classmethod
    def of(cls, optimizer_name: str, is_sgd: bool, group: dict[str, Any]) -> UpdateRule:
        """Drift and noise terms are those of plain SGD; anything else leaves them undefined (theory 5)."""
        problem = ""
        if not is_sgd:
            problem = f"{optimizer_name}: drift and noise terms need torch.optim.SGD"
        elif group.get("momentum", 0):
            problem = "momentum: drift and noise terms need momentum=0"
        decay = float(group.get("weight_decay", 0.0)) if is_sgd else 0.0
        return cls(float(group["lr"]), decay, bool(group.get("maximize", False)), problem)


@dataclass
class Measurement:
    """One layer in one step: made before the step, completed after it."""

    name: str
    before: Spectrum
    noise: GradientNoise | None
    batch: int
    rule: UpdateRule
    split: bool
    problems: list[str]
    row: Row = field(default_factory=dict)
    scores: Tensor | None = None

    def complete(self, after: Spectrum) -> Row:
        """The row, once the weight after the step is known."""
        if self.before.problem:
            self.problems.append(self.before.problem)
        if self.rule.problem:
            self.problems.append(self.rule.problem)
        self.row = {"layer": self.name, "lr": self.rule.lr, "batch": self.batch}
        self.row |= {"sigma": self.before.sigma, "gap": self.before.gap}
        self.row |= self._path(after) | self._forces()
        self.row |= {"z": _log(self.before.sigma), "status": "; ".join(dict.fromkeys(self.problems)) or "ok"}
        return self.row

    def _path(self, after: Spectrum) -> Row:
        """What the actual update does to log sigma, predicted and observed (theory 2.7, 1.9)."""
        out: Row = dict.fromkeys(("eps", "dz1", "dz2", "dz3"), _NAN)
        out["dz"] = _log(after.sigma) - _log(self.before.sigma)
        if after.problem:
            self.problems.append(f"after the step: {after.problem}")
        update = after.matrix - self.before.matrix
        if self.before.triplet is None or not bool(update.isfinite().all()):
            return out
        out["eps"] = 2.0 * spectral_norm(update) / self.before.gap
        changes, clipped = pathwise_changes(taylor(self.before, update))
        out["dz1"], out["dz2"], out["dz3"] = changes
        if clipped:
            self.problems.append(CLIPPED)
        return out

    def _forces(self) -> Row:
        """Drift, noise curvature and noise strength per unit of SDE time (theory 2.1, 2.4)."""
        keys = ("mu", "kappa", "lambda_sq", "gHg", *(SPLIT_COLUMNS if self.split else ()))
        out: Row = dict.fromkeys(keys, _NAN)
        if self.noise is None:
            return out
        terms, sigma, lr = self.noise.terms(self.before), self.before.sigma, self.rule.lr
        out["gHg"] = terms.gradient_curvature
        if self.rule.problem:
            return out
        if self.batch < 2:
            self.problems.append(BATCH_OF_ONE)
        self.scores = terms.scores
        out["mu"] = drift(terms.gradient, sigma, self.rule.weight_decay, maximize=self.rule.maximize)
        out["kappa"] = noise_curvature(terms.noise_curvature, sigma, lr)
        out["lambda_sq"] = noise_strength(terms.noise, sigma, lr)
        if self.split:
            out["kappa_var"] = noise_curvature(terms.noise_curvature_var, sigma, lr)
            out["lambda_sq_var"] = noise_strength(terms.noise_var, sigma, lr)
            _set_covariance_parts(out)
        return out


def network_row(measurements: Sequence[Measurement]) -> Row:
    """The sum over the layers: Z = sum log sigma, K = exp Z in column ``sigma`` (theory 2.1, 2.9).

    With several learning rates ``lr`` is the largest, and the forces are scaled so that ``lr`` times the force
    is the layers' joint effect in this step. ``gap`` is the smallest, ``eps`` the largest of the layers'.
    """
    rows = [measurement.row for measurement in measurements]
    split = measurements[0].split
    lr = max(row["lr"] for row in rows)
    row: Row = {"layer": NETWORK, "lr": lr, "batch": rows[0]["batch"], "gHg": _NAN}
    row["z"] = sum(r["z"] for r in rows)
    row["sigma"] = math.exp(row["z"]) if row["z"] < 700 else _NAN
    row["gap"], row["eps"] = _nan_min(r["gap"] for r in rows), -_nan_min(-r["eps"] for r in rows)
    row |= {key: sum(r[key] for r in rows) for key in ("dz1", "dz2", "dz3", "dz")}
    share = [r["lr"] / lr if lr else 1.0 for r in rows]
    summed = ("mu", "kappa", *(("kappa_var", "lambda_sq_var") if split else ()))
    row |= {key: sum(s * r[key] for s, r in zip(share, rows, strict=True)) for key in summed}
    problems = [f"{r['layer']}: {r['status']}" for r in rows if r["status"] != "ok"]
    row["lambda_sq"] = _NAN
    scores = [m.scores for m in measurements if m.scores is not None]
    if len({r["batch"] for r in rows}) > 1:
        row["batch"] = max(r["batch"] for r in rows)
        problems.append("layers saw different numbers of samples: no joint noise")
    elif len(scores) == len(rows):
        # In units of the largest learning rate, so that the variance of the step is lr * lambda_sq.
        row["lambda_sq"] = lr * network_noise(scores, [r["sigma"] for r in rows], share)
    if split:
        _set_covariance_parts(row)
    row["status"] = "; ".join(problems) or "ok"
    return row


def _set_covariance_parts(row: Row) -> None:
    """The signed rest: what the covariances between weights add to the variances (theory 2.4)."""
    row["kappa_cov"] = row["kappa"] - row["kappa_var"]
    row["lambda_sq_cov"] = row["lambda_sq"] - row["lambda_sq_var"]


def _log(x: float) -> float:
    return math.log(x) if x > 0 else _NAN


def _nan_min(values: Any) -> float:
    known = list(values)
    return _NAN if any(x != x for x in known) else min(known)
