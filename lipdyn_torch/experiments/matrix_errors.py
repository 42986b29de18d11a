"""Errors of the Hessian over many matrices, and of orders 3 to 6 against high precision.

The closed form of the literature for any order is computed beside ours. It keeps one chain of reduced resolvents,
``w T (-S T)^(n-1) w``, and is right for orders 1 and 2 only (theory 1.4).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lipdyn_torch._bridge import specpert
from lipdyn_torch.experiments.frames import groups
from lipdyn_torch.experiments.matrices import DISTRIBUTIONS, FROM_ONE, RANDOM, autograd, draw
from lipdyn_torch.experiments.registry import (
    CONFIRMED,
    CONTRADICTED,
    Claim,
    Context,
    Experiment,
    Point,
    Row,
    Summary,
    Table,
)
from lipdyn_torch.integrations._extras import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENTS", "exact_coefficients", "published_coefficient"]

ORDERS = (3, 4, 5, 6)
PRESETS = {
    "quick": {"trials": 500, "chunk": 50, "series_trials": 4, "digits": 70},
    "paper": {"trials": 500, "chunk": 50, "series_trials": 50, "digits": 70},
}


def exact_coefficients(A: NDArray[np.float64], H: NDArray[np.float64], order: int, digits: int) -> NDArray[np.float64]:
    """Taylor coefficients of every sigma_k(A + x H), (k, order + 1), from differences at high precision.

    The step is 10^(-digits / (order + 2)), so truncation and rounding leave about ``digits / (order + 2)`` digits
    at the worst order; no perturbation theory enters.
    """
    mpmath = need("mpmath", "experiments")
    with mpmath.workdps(digits):
        step = mpmath.mpf(10) ** (-(digits // (order + 2)))
        nodes = range(-(order // 2 + 1), order // 2 + 2)
        a, h = mpmath.matrix(A.tolist()), mpmath.matrix(H.tolist())
        values = [mpmath.svd_r(a + step * x * h, compute_uv=False) for x in nodes]
        vandermonde = mpmath.matrix([[mpmath.mpf(x) ** n for n in range(len(nodes))] for x in nodes])
        inverse = vandermonde**-1
        out = np.empty((min(A.shape), order + 1))
        for k in range(min(A.shape)):
            coefficients = inverse * mpmath.matrix([value[k] for value in values])
            out[k] = [float(coefficients[n] / step**n) for n in range(order + 1)]
    return out


def published_coefficient(A: NDArray[np.float64], H: NDArray[np.float64], k: int, order: int) -> float:
    """Coefficient of that order by the closed form of the literature (theory 1.4, erratum)."""
    m, n = A.shape
    U, s, Vh = np.linalg.svd(A)
    w = np.concatenate([U[:, k], Vh[k]]) / math.sqrt(2)
    T, T1 = (np.block([[np.zeros((m, m)), M], [M.T, np.zeros((n, n))]]) for M in (A, H))
    S = np.linalg.pinv(T - s[k] * np.eye(m + n) + np.outer(w, w)) - np.outer(w, w)
    z = T1 @ w
    for _ in range(order - 1):
        z = T1 @ (-S @ z)
    return float(w @ z)


def _points(context: Context) -> list[Point]:
    points: list[Point] = []
    for name in DISTRIBUTIONS:
        for start in range(0, context["trials"], context["chunk"]):
            count = min(context["chunk"], context["trials"] - start)
            points.append(
                {
                    "id": f"{name}-hessian-{start}",
                    "kind": "hessian",
                    "distribution": name,
                    "start": start,
                    "count": count,
                    "cost": 0.05 * count,
                }
            )
        for trial in range(context["series_trials"]):
            points.append(
                {
                    "id": f"{name}-series-{trial}",
                    "kind": "series",
                    "distribution": name,
                    "start": trial,
                    "count": 1,
                    "cost": 0.5,
                }
            )
    return points


def _run(point: Point, context: Context) -> list[Row]:
    rows = []
    for trial in range(point["start"], point["start"] + point["count"]):
        which = list(DISTRIBUTIONS).index(point["distribution"])
        rng = np.random.default_rng([context.seed, which, trial, point["kind"] == "series"])
        A = draw(point["distribution"], rng)
        make = _hessian_rows if point["kind"] == "hessian" else _series_rows
        rows += [
            {"kind": point["kind"], "distribution": point["distribution"], "trial": trial, **r}
            for r in make(A, rng, context)
        ]
    return rows


def _hessian_rows(A: NDArray[np.float64], rng: np.random.Generator, context: Context) -> list[Row]:
    rows = []
    for k in range(min(A.shape)):
        ours, other = specpert.sigma_derivative(A, 2, k=k, layout="vec"), autograd(A, k, 2)
        rows.append({"k": k + 1, "error": float(np.abs(ours - other).max()), "largest": float(np.abs(other).max())})
    return rows


def _series_rows(A: NDArray[np.float64], rng: np.random.Generator, context: Context) -> list[Row]:
    H = rng.standard_normal(A.shape)
    H /= np.linalg.norm(H, 2)
    exact = exact_coefficients(A, H, ORDERS[-1], context["digits"])
    rows = []
    for k in range(min(A.shape)):
        ours = np.asarray(specpert.sigma_series(A, H, ORDERS[-1], k=k).coefficients)
        for n in ORDERS:
            truth, published = exact[k, n], published_coefficient(A, H, k, n)
            error, wrong = (abs(x - truth) / abs(truth) for x in (float(ours[n]), published))
            rows.append(
                {
                    "k": k + 1,
                    "order": n,
                    "error": error,
                    "published_error": wrong,
                    "derivative": truth * math.factorial(n),
                }
            )
    return rows


def _summarise(rows: list[Row], context: Context) -> Summary:
    import pandas as pd

    frame = pd.DataFrame(rows)
    hessian, series = frame[frame["kind"] == "hessian"].copy(), frame[frame["kind"] == "series"]
    hessian["relative"] = hessian["error"] / hessian["largest"]
    lines = [
        [str(k), len(part), *(part[c].agg(a) for c in ("error", "relative") for a in ("median", "max"))]
        for k, part in groups(hessian, "k")
    ]
    columns = ["k", "Hessians", "median", "largest", "median, relative", "largest, relative"]
    title = f"Error of the Hessian of sigma_k ({FROM_ONE}): largest entry-wise difference from autograd"
    first = Table(title, columns, lines)
    lines = [
        [
            str(int(n)),
            len(part),
            part["error"].median(),
            part["error"].max(),
            part["published_error"].median(),
            part["published_error"].min(),
        ]
        for n, part in groups(series, "order")
    ]
    columns = ["order", "cases", "ours, median", "ours, largest", "published, median", "published, smallest"]
    note = "Directional derivatives against mpmath; relative errors."
    second = Table("Orders 3 to 6 along a random direction", columns, lines, note)
    figures, claims = {"hessian-errors": _figure(hessian, series)}, _claims(hessian, series)
    return Summary([first, second], figures, claims, data=RANDOM)


def _claims(hessian, series) -> list[Claim]:  # type: ignore[no-untyped-def]
    relative = hessian["relative"].quantile(0.99)
    wrong = (series["published_error"] > 1e-3).mean()
    return [
        Claim(
            "the Hessian agrees with automatic differentiation on random matrices",
            f"{len(hessian)} Hessians: 99 % within {relative:.1e} of the largest entry",
            CONFIRMED if relative < 1e-9 else CONTRADICTED,
        ),
        Claim(
            "the published closed form holds at every order",
            f"orders 3 to 6: wrong by more than 0.1 % in {100 * wrong:.1f} % of cases, median relative error "
            f"{series['published_error'].median():.2g}; the recursion used here: at most {series['error'].max():.1e}",
            CONTRADICTED if wrong > 0.05 else CONFIRMED,
        ),
    ]


def _figure(hessian, series) -> Figure:  # type: ignore[no-untyped-def]
    from matplotlib.figure import Figure

    from lipdyn_torch.experiments.figures import BLUE, VERMILION, style

    with style():
        figure = Figure(figsize=(7.0, 2.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        errors = [part["relative"].to_numpy() for _, part in groups(hessian, "k")]
        left.boxplot(errors, whis=(0, 100), medianprops={"color": VERMILION})
        left.set(
            yscale="log",
            xlabel=FROM_ONE,
            ylabel="largest difference / largest entry",
            title="Hessian of $\\sigma_k$ against autograd",
        )
        for column, color, marker, shift, label in (
            ("error", BLUE, "o", -0.12, "ours"),
            ("published_error", VERMILION, "x", 0.12, "published closed form"),
        ):
            right.plot(
                series["order"] + shift, series[column], marker, color=color, markersize=3, alpha=0.6, label=label
            )
        right.set(
            yscale="log", xticks=ORDERS, xlabel="order", ylabel="relative error against mpmath", title="Higher orders"
        )
        right.legend(loc="center right")
    return figure


EXPERIMENTS = [
    Experiment("hessian-errors", "Errors over many matrices, and higher orders", PRESETS, _points, _run, _summarise)
]
