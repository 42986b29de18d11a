"""Derivatives of singular values beside automatic differentiation: the matrices of the paper's figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lipdyn_torch._bridge import specpert
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

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENTS", "FROM_ONE", "RANDOM", "SHAPE", "autograd", "draw"]

SHAPE = (6, 10)
DISTRIBUTIONS = {"normal": "N(0, 1)", "uniform": "U(0, 1)", "beta": "Beta(2, 5)"}
PARAMETERS = {"distributions": list(DISTRIBUTIONS), "shape": list(SHAPE)}
FROM_ONE, RANDOM = "k from 1, as in the paper", "random matrices"
AGREES = 1e-9  # relative to the largest entry; float64 autograd itself loses digits when a gap is small


def draw(distribution: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """A random matrix of the paper's shape.

    Examples
    --------
    >>> draw("uniform", np.random.default_rng(0)).shape
    (6, 10)
    """
    if distribution == "normal":
        return rng.standard_normal(SHAPE)
    return rng.random(SHAPE) if distribution == "uniform" else rng.beta(2.0, 5.0, SHAPE)


def autograd(A: NDArray[np.float64], k: int, order: int) -> NDArray[np.float64]:
    """Gradient (m, n) or Hessian (m n, m n; column-major) of sigma_k by torch's automatic differentiation."""

    def sigma(columns: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(columns.reshape(A.shape[::-1]).T)[k]

    vec = torch.from_numpy(A.flatten(order="F"))
    if order == 1:
        return torch.autograd.functional.jacobian(sigma, vec).reshape(A.shape[::-1]).T.numpy()
    return torch.autograd.functional.hessian(sigma, vec, vectorize=True).numpy()


def _points(context: Context) -> list[Point]:
    return [{"id": name, "distribution": name, "cost": 1.0} for name in context["distributions"]]


def _run(order: int) -> Any:
    def run(point: Point, context: Context) -> list[Row]:
        rng = np.random.default_rng([context.seed, list(DISTRIBUTIONS).index(point["distribution"])])
        A = draw(point["distribution"], rng)
        rows = []
        for k in range(min(A.shape)):
            ours = specpert.sigma_derivative(A, order, k=k, layout="tensor" if order == 1 else "vec")
            other = autograd(A, k, order)
            row = {"distribution": point["distribution"], "k": k + 1, "largest": float(np.abs(other).max())}
            row["error"] = float(np.abs(ours - other).max())
            # Seven digits are enough for the picture; the error above was taken before rounding.
            row["ours"], row["autograd"] = ([[float(f"{x:.7g}") for x in line] for line in M] for M in (ours, other))
            rows.append(row)
        return rows

    return run


def _summarise(order: int) -> Any:
    name = "Jacobian" if order == 1 else "Hessian"

    def summarise(rows: list[Row], context: Context) -> Summary:
        lines = [
            [
                f"{k}",
                *(
                    next(r["error"] for r in rows if r["k"] == k and r["distribution"] == d)
                    for d in context["distributions"]
                ),
            ]
            for k in sorted({row["k"] for row in rows})
        ]
        worst = max(row["error"] / row["largest"] for row in rows)
        columns = ["k", *(DISTRIBUTIONS[d] for d in context["distributions"])]
        note = f"Largest error relative to the largest entry: {worst:.1e}."
        claim = Claim(
            f"the closed form of the {name} of every singular value is right",
            f"largest difference from autograd {worst:.1e} of the largest entry",
            CONFIRMED if worst < AGREES else CONTRADICTED,
        )
        title = f"Largest entry-wise difference from autograd, {name} of sigma_k ({FROM_ONE})"
        table = Table(title, columns, lines, note)
        return Summary([table], {name.lower(): _figure(rows, order)}, [claim], data=RANDOM)

    return summarise


def _figure(rows: list[Row], order: int) -> Figure:
    """Ours above autograd, one column per k; one colour scale per pair, its end printed above it."""
    from matplotlib.figure import Figure

    from lipdyn_torch.experiments.figures import style

    distributions = list(dict.fromkeys(row["distribution"] for row in rows))
    ks = sorted({row["k"] for row in rows})
    with style():
        figure = Figure(figsize=(7.0, 4.6 if order == 1 else 8.2), layout="constrained")
        name = "Jacobian" if order == 1 else "Hessian"
        figure.suptitle(f"{name} of $\\sigma_k$, {FROM_ONE}; ± the end of the colour scale", fontsize=8)
        axes = figure.subplots(2 * len(distributions), len(ks), squeeze=False)
        for row in rows:
            line, column = 2 * distributions.index(row["distribution"]), ks.index(row["k"])
            for offset, key in enumerate(("ours", "autograd")):
                panel = axes[line + offset, column]
                panel.imshow(row[key], cmap="PuOr", vmin=-row["largest"], vmax=row["largest"], interpolation="nearest")
                panel.set(xticks=[], yticks=[])
                panel.spines[:].set_visible(True)
                if column == 0:
                    panel.set_ylabel(f"{DISTRIBUTIONS[row['distribution']]}\n{key}")
            axes[line, column].set_title(
                f"k = {row['k']}   ±{row['largest']:.2g}\ndifference {row['error']:.0e}", fontsize=6
            )
    return figure


EXPERIMENTS = [
    Experiment(
        "jacobian",
        "First derivatives of singular values",
        {"quick": PARAMETERS, "paper": PARAMETERS},
        _points,
        _run(1),
        _summarise(1),
    ),
    Experiment(
        "hessian",
        "Second derivatives of singular values",
        {"quick": PARAMETERS, "paper": PARAMETERS},
        _points,
        _run(2),
        _summarise(2),
    ),
]
