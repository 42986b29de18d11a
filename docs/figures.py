"""Draw the figures of the guides, from computations made here: python docs/figures.py [name ...]

Every figure is written to docs/images/<name>.png. The colours are those of Okabe and Ito, which colour-blind readers
can tell apart; line styles and markers tell them apart in print.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import mpmath
import numpy as np
import torch

from lipdyn_torch import LipschitzMonitor
from lipdyn_torch.dynamics import bridge_variance, diffusion_variance, epoch_means
from specpert import sigma_derivative, sigma_series

IMAGES = Path(__file__).parent / "images"
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#e0e0e0",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
}


def exact(A: np.ndarray, H: np.ndarray, x: float, digits: int = 40) -> list[mpmath.mpf]:
    """All singular values of A + x H, with that many digits."""
    with mpmath.workdps(digits):
        return list(mpmath.svd_r(mpmath.matrix(A.tolist()) + x * mpmath.matrix(H.tolist()), compute_uv=False))


def remainder() -> plt.Figure:
    """Error of the partial sums and the certified bound, over x in units of the certified radius."""
    A, H = np.random.default_rng(0).standard_normal((2, 4, 6))
    ratio = np.geomspace(1e-3, 0.99, 40)
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for order, colour, marker in [(1, BLUE, "o"), (2, ORANGE, "s"), (4, GREEN, "^"), (8, RED, "D")]:
        series = sigma_series(A, H, order)
        xs = ratio * float(series.radius)
        truth = [exact(A, H, float(x))[0] for x in xs]
        errors = [abs(float(t - mpmath.mpf(float(series(float(x)))))) for x, t in zip(xs, truth, strict=True)]
        axes.loglog(ratio, [float(series.remainder(float(x))) for x in xs], "--", color=colour)
        axes.loglog(ratio, np.maximum(errors, 1e-18), marker, ms=3, color=colour, label=f"order {order}")
    axes.plot([], [], "--", color="black", label="certified bound")
    axes.plot([], [], "o", ms=3, color="black", label="actual error")
    axes.set(xlabel="x / certified radius", ylabel=r"absolute error of $\sigma_0(A + xH)$", ylim=(1e-17, 10))
    axes.set_title("Partial sums of a 4 x 6 matrix: error (markers) and certified bound (dashed)", fontsize=9)
    axes.legend(ncols=2)
    return figure


def cluster() -> plt.Figure:
    """The series of one value beside a close neighbour, and the series of the pair."""
    rng = np.random.default_rng(3)
    A = np.diag([3.0, 2.001, 2.0, 1.0, 0.3])
    H = rng.standard_normal((5, 5))
    H /= np.linalg.norm(H, 2)
    order = 12
    single, pair = sigma_series(A, H, order, k=1), sigma_series(A, H, order, k=(1, 2))
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.6))

    xs = np.linspace(-0.004, 0.004, 201)
    values = np.array([np.linalg.svd(A + x * H, compute_uv=False)[1:3] for x in xs])
    left.plot(xs, values[:, 0], color="black", lw=3, alpha=0.3, label="singular values (SVD)")
    left.plot(xs, values[:, 1], color="black", lw=3, alpha=0.3)
    left.plot(xs, [pair.values(float(x)) for x in xs], color=BLUE, label=["series of the pair (1, 2)", "_"])
    left.plot(xs, single(xs), "--", color=RED, label=r"series of $\sigma_1$ alone")
    left.axvspan(
        -float(single.radius), float(single.radius), color=RED, alpha=0.12, lw=0, label=r"radius of $\sigma_1$"
    )
    left.set(xlabel="x", ylabel=r"$\sigma_1, \sigma_2$ of $A + xH$", ylim=(values.min() - 1e-3, values.max() + 2e-3))
    left.xaxis.set_major_locator(plt.MaxNLocator(5))
    left.legend(fontsize=7.5, loc="upper center")

    xs = np.geomspace(1e-5, 0.6, 60)
    truth = [exact(A, H, float(x)) for x in xs]
    errors = [abs(float(t[1] - mpmath.mpf(float(single(float(x)))))) for x, t in zip(xs, truth, strict=True)]
    right.loglog(xs, np.maximum(errors, 1e-17), "--", color=RED, label=r"$\sigma_1$ alone")
    errors = [
        max(abs(float(a - mpmath.mpf(float(b)))) for a, b in zip(t[1:3], pair.values(float(x)), strict=True))
        for x, t in zip(xs, truth, strict=True)
    ]
    right.loglog(xs, np.maximum(errors, 1e-17), color=BLUE, label="pair (1, 2)")
    for radius, color, name in [
        (single.radius, RED, r"radius of $\sigma_1$"),
        (pair.radius, BLUE, "radius of the pair"),
    ]:
        right.axvline(float(radius), color=color, ls=":", lw=1)
        right.text(0.9 * float(radius), 1e-1, name, color=color, fontsize=7.5, rotation=90, ha="right", va="center")
    right.set(xlabel="x", ylabel="absolute error", ylim=(1e-17, 1e4))
    right.legend(fontsize=7.5, loc="upper left")
    figure.suptitle(f"A = diag(3, 2.001, 2, 1, 0.3), ||H|| = 1, series to order {order}", fontsize=9)
    return figure


def autograd() -> plt.Figure:
    """Relative error of derivatives of sigma_0 against the gap of two other singular values."""
    H = np.random.default_rng(1).standard_normal((3, 3))
    gaps, orders = 10.0 ** np.arange(0, -15, -1.0), (2, 3, 4, 5)
    by_autograd, by_specpert = np.empty((2, len(gaps), len(orders)))
    for i, gap in enumerate(gaps):
        A = np.diag([3.0, 1.0 + gap, 1.0])
        x = torch.zeros((), dtype=torch.float64, requires_grad=True)
        y = torch.linalg.svdvals(torch.tensor(A) + x * torch.tensor(H))[0]
        with mpmath.workdps(60):
            a, h = mpmath.matrix(A.tolist()), mpmath.matrix(H.tolist())
            lam = mpmath.taylor(lambda t, a=a, h=h: mpmath.svd_r(a + t * h, compute_uv=False)[0], 0, max(orders))
        for n in range(1, max(orders) + 1):
            (y,) = torch.autograd.grad(y, x, create_graph=True)
            if n in orders:
                truth = float(lam[n]) * math.factorial(n)
                by_autograd[i, n - 2] = abs(float(y.detach()) / truth - 1)
                by_specpert[i, n - 2] = abs(float(sigma_derivative(A, order=n, directions=H)) / truth - 1)
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for j, (n, colour, marker) in enumerate(zip(orders, [BLUE, ORANGE, GREEN, RED], "os^D", strict=True)):
        axes.loglog(
            gaps, np.maximum(by_autograd[:, j], 1e-17), marker + "-", ms=3.5, color=colour, label=f"autograd, order {n}"
        )
    worst = np.maximum(by_specpert.max(axis=1), 1e-17)
    axes.loglog(gaps, worst, "--", color="black", label="specpert, worst of these orders")
    axes.axhline(1, color="gray", lw=0.8)
    axes.text(1.5, 1.6, "no digit right", fontsize=7.5, color="gray", ha="left", va="bottom")
    axes.set(
        xlabel=r"gap $s_1 - s_2$ of the two other singular values (at 0 autograd gives NaN)", ylabel="relative error"
    )
    axes.set_title(r"Derivatives of $\sigma_0$ = 3, which is well isolated", fontsize=9)
    axes.set_ylim(2e-18, 1e30)
    axes.invert_xaxis()
    axes.legend(loc="upper left")
    return figure


def bridge() -> plt.Figure:
    """Spread of log K over reshuffled runs, against the shuffle bridge and the diffusion of independent batches."""
    samples, batch, epochs, runs, lr = 256, 16, 3, 200, 1e-3
    torch.manual_seed(0)
    inputs, teacher = torch.randn(samples, 6), torch.randn(6, 4)
    targets = inputs @ teacher + 0.5 * torch.randn(samples, 4)
    start = torch.linalg.lstsq(inputs, targets).solution.T.contiguous()  # the minimum: the drift is small
    spreads = {}
    for sampling in ("shuffle", "iid"):
        paths = []
        for run in range(runs):
            model = torch.nn.Linear(6, 4, bias=False)
            with torch.no_grad():
                model.weight.copy_(start)
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            generator = torch.Generator().manual_seed(run)
            if run == 0:
                monitor = LipschitzMonitor(model, optimizer, sampling=sampling, dataset_size=samples)
            path = [torch.linalg.matrix_norm(model.weight.detach().double(), 2).log().item()]
            for _ in range(epochs):
                order = torch.randperm(samples, generator=generator)
                if sampling == "iid":
                    order = torch.randint(samples, (samples,), generator=generator)
                for chosen in order.split(batch):
                    optimizer.zero_grad()
                    (model(inputs[chosen]) - targets[chosen]).square().sum(1).mean().backward()
                    optimizer.step()
                    path.append(torch.linalg.matrix_norm(model.weight.detach().double(), 2).log().item())
            if run == 0:
                rows = monitor.history.to_pandas()
                rows = rows[rows.layer == "network"]
                monitor.close()
                v, sizes = (rows.lr * rows.lambda_sq).to_numpy(), rows.batch.to_numpy()
                variance = diffusion_variance(v)
                if sampling == "shuffle":
                    variance = bridge_variance(epoch_means(v, sizes, samples), sizes, samples)
            paths.append(path)
        spreads[sampling] = (np.std(paths, axis=0, ddof=1), np.sqrt(variance))
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    per_epoch = samples // batch
    steps = np.arange(epochs * per_epoch + 1) / per_epoch
    for sampling, colour, marker, name in [
        ("iid", ORANGE, "s", "independent batches"),
        ("shuffle", BLUE, "o", "reshuffled every epoch"),
    ]:
        observed, predicted = spreads[sampling]
        axes.plot(steps, observed, marker, ms=3, color=colour, label=f"{name}: {runs} runs")
        axes.plot(steps, predicted, color=colour, label=f"{name}: band of sde")
    axes.set(xlabel="epochs", ylabel="standard deviation of log K (nats)", xlim=(0, epochs))
    axes.set_xticks(range(epochs + 1))
    axes.set_ylim(0, 1.25 * spreads["iid"][1].max())
    axes.legend(fontsize=7.5, loc="upper left")
    axes.set_title(f"One linear layer near its minimum, N = {samples}, M = {batch}, lr = {lr:g}", fontsize=9)
    return figure


FIGURES = {"remainder": remainder, "cluster": cluster, "autograd": autograd, "bridge": bridge}


def main(names: list[str]) -> None:
    """Draw the figures named, or all."""
    IMAGES.mkdir(exist_ok=True)
    for name in names or FIGURES:
        with plt.rc_context(STYLE):
            figure = FIGURES[name]()
            figure.savefig(IMAGES / f"{name}.png")
            plt.close(figure)
        print(IMAGES / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
