"""Corrupted labels: the covariance of the gradient against the paper's (1 - eps)^2 and against the exact mixture.

With probability eps a label is drawn anew from all classes. Over samples and labels, with g0, S0 mean and
covariance of the per-sample gradients with clean labels and gu, Su those with uniform labels (theory 4),
``S_eps = (1 - eps) S0 + eps Su + eps (1 - eps) (g0 - gu)(g0 - gu)^T``.
Only traces and the pairing with J are needed; both come from products of activations, never from a gradient per sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from lipdyn_torch.experiments import training
from lipdyn_torch.experiments.data import Images, load
from lipdyn_torch.experiments.frames import groups, records
from lipdyn_torch.experiments.models import make_model, note
from lipdyn_torch.experiments.registry import (
    CONFIRMED,
    CONTRADICTED,
    WITHIN_LIMITS,
    Claim,
    Context,
    Experiment,
    Point,
    Row,
    Summary,
    Table,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENTS", "Moments", "corrupt", "moments"]

EPSILONS = [0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0]
PRESETS = {
    "quick": {"steps": 300, "batch": 64, "lr": 0.05, "eps": EPSILONS, "draws": 20, "samples": 1438, "every": 10},
    "paper": {
        "steps": 39_000,
        "batch": 128,
        "lr": 0.01,
        "eps": [i / 10 for i in range(11)],
        "draws": 20,
        "samples": 10_000,
        "every": 100,
    },
}


@dataclass(frozen=True)
class Moments:
    """Second moments of per-sample gradients, all layers together.

    Attributes
    ----------
    mean : list of Tensor
        Mean gradient of every weight (m, n).
    square : float
        Mean of the squared norm of the per-sample gradients.
    scores : Tensor, (samples,)
        ``sum_l u_l^T G_i v_l / sigma_l``: what a sample does to log K.
    """

    mean: list[Tensor]
    square: float
    scores: Tensor

    @property
    def trace(self) -> float:
        """``tr Sigma`` of one sample."""
        return self.square - sum(float(g.square().sum()) for g in self.mean)


def moments(model: nn.Module, x: Tensor, y: Tensor) -> Moments:
    """Moments over the given samples, from inputs and output gradients of the linear layers."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    caught: list[tuple[Tensor, Tensor]] = []
    handles = [m.register_forward_hook(lambda _, given, out: caught.append((given[0], out))) for m in layers]
    try:
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
    finally:
        for handle in handles:
            handle.remove()
    deltas = torch.autograd.grad(loss, [out for _, out in caught])
    mean, square, scores = [], 0.0, torch.zeros(len(x), dtype=torch.float64)
    for layer, (given, _), delta in zip(layers, caught, deltas, strict=True):
        a, d = given.detach().double(), delta.double()
        sigma, u, v = training.top_triplet(layer.weight.detach().double())
        mean.append(d.T @ a / len(x))
        square += float((a.square().sum(1) * d.square().sum(1)).mean())
        scores += (d @ u) * (a @ v) / sigma
    return Moments(mean, square, scores)


def corrupt(y: Tensor, eps: float, classes: int, seed: int) -> Tensor:
    """Labels of which a share eps is drawn anew from all classes, the true one included.

    Examples
    --------
    >>> corrupt(torch.tensor([3, 3]), 0.0, 10, seed=0).tolist()
    [3, 3]
    """
    generator = torch.Generator().manual_seed(seed)
    anew = torch.rand(y.shape, generator=generator) < eps
    return torch.where(anew, torch.randint(classes, y.shape, generator=generator), y)


def _points(context: Context) -> list[Point]:
    return [
        {"id": f"{eps:g}", "eps": eps, "cost": context["steps"] * 0.01 + context["draws"] * 0.1}
        for eps in context["eps"]
    ]


def _run(point: Point, context: Context) -> list[Row]:
    eps = point["eps"]
    images = load(context.data, context.root).first(context["samples"])
    start = make_model("mlp", images, context.seed)
    trained = make_model("mlp", images, context.seed)
    plan = training.Plan(context["steps"], context["batch"], context["lr"], seed=context.seed, every=0)
    training.train(trained, images, plan)
    rows = [
        {"eps": eps, "at": at, **_compare(model, images, eps, context)}
        for at, model in (("start", start), ("trained", trained))
    ]
    return rows + _own_path(images, eps, context)


def _compare(model: nn.Module, images: Images, eps: float, context: Context) -> Row:
    """Sampled corruption against the mixture, and against the claim, at fixed weights."""
    x, y = images.train_x, images.train_y
    drawn = [
        moments(model, x, corrupt(y, eps, images.classes, context.seed + 100 + d)) for d in range(context["draws"])
    ]
    mean = [torch.stack([m.mean[i] for m in drawn]).mean(0) for i in range(len(drawn[0].mean))]
    scores = torch.cat([m.scores for m in drawn])
    observed = np.mean([m.square for m in drawn]) - sum(float(g.square().sum()) for g in mean)
    clean = moments(model, x, y)
    each = [moments(model, x, torch.full_like(y, c)) for c in range(images.classes)]
    uniform_mean = [torch.stack([m.mean[i] for m in each]).mean(0) for i in range(len(clean.mean))]
    uniform = float(np.mean([m.square for m in each])) - sum(float(g.square().sum()) for g in uniform_mean)
    between = sum(float((a - b).square().sum()) for a, b in zip(clean.mean, uniform_mean, strict=True))
    all_scores = torch.cat([m.scores for m in each])
    gap = float(clean.scores.mean() - all_scores.mean())
    var_0, var_u = float(clean.scores.var(correction=0)), float(all_scores.var(correction=0))
    return {
        "trace": float(observed),
        "trace_clean": clean.trace,
        "trace_mixture": (1 - eps) * clean.trace + eps * uniform + eps * (1 - eps) * between,
        "noise": float(scores.var(correction=0)),
        "noise_clean": var_0,
        "noise_mixture": (1 - eps) * var_0 + eps * var_u + eps * (1 - eps) * gap**2,
        "uniform_over_clean": math.sqrt(
            sum(float(g.square().sum()) for g in uniform_mean) / sum(float(g.square().sum()) for g in clean.mean)
        ),
    }


def _own_path(images: Images, eps: float, context: Context) -> list[Row]:
    """Training on the corrupted labels: the noise along the network's own path."""
    labels = corrupt(images.train_y, eps, images.classes, context.seed + 99)
    noisy = Images(images.train_x, labels, images.test_x, images.test_y, images.mean, images.sd)
    model = make_model("mlp", images, context.seed)
    plan = training.Plan(context["steps"], context["batch"], context["lr"], seed=context.seed, every=context["every"])
    network = training.network(training.train(model, noisy, plan).frame)
    return [{"eps": eps, "at": "path", **row} for row in records(network[["step", "z", "lambda_sq", "kappa"]])]


def _summarise(rows: list[Row], context: Context) -> Summary:
    import pandas as pd

    frame = pd.DataFrame(rows)
    fixed, path = frame[frame["at"] != "path"], frame[frame["at"] == "path"]
    lines = [
        [
            row["at"],
            row["eps"],
            row["trace"] / row["trace_clean"],
            row["trace_mixture"] / row["trace_clean"],
            row["noise"] / row["noise_clean"],
            row["noise_mixture"] / row["noise_clean"],
            (1 - row["eps"]) ** 2,
        ]
        for row in fixed.sort_values(["at", "eps"]).to_dict("records")
    ]
    columns = [
        "weights",
        "eps",
        "tr Sigma, observed",
        "mixture",
        "noise of log K, observed",
        "mixture",
        "claim (1-eps)^2",
    ]
    ratio = fixed[fixed["at"] == "trained"]["uniform_over_clean"].mean()
    first = Table(
        "Covariance of the gradient relative to clean labels",
        columns,
        lines,
        f"At the trained weights the mean gradient of uniform labels is {ratio:.1f} times that of the clean ones.",
    )
    grouped = []
    clean = path[path["eps"] == min(context["eps"])]
    for eps, part in groups(path, "eps"):
        late = part["step"] >= context["steps"] / 2
        reference = clean["lambda_sq"][clean["step"] >= context["steps"] / 2].mean()
        grouped.append(
            [eps, part["z"].iloc[-1] - part["z"].iloc[0], part["lambda_sq"][late].mean() / reference, (1 - eps) ** 2]
        )
    second = Table(
        "Along the path of training on corrupted labels, second half",
        ["eps", "growth of log K", "lambda^2 / that of clean labels", "claim (1-eps)^2"],
        grouped,
    )
    notes = [text for text in [note("mlp", load(context.data, context.root))] if text]
    return Summary([first, second], {"label-noise": _figure(lines, path)}, _claims(lines), notes)


def _claims(lines: list[list]) -> list[Claim]:
    inside = [line for line in lines if line[0] == "trained" and 0 < line[1] < 1]
    mixture = max(abs(line[2] / line[3] - 1) for line in inside)
    pairs = ", ".join(
        f"{line[2]:.2f} at eps = {line[1]:g} (claimed {line[6]:.2f})" for line in inside[:: max(1, len(inside) // 3)]
    )
    wrong = max(abs(line[2] - line[6]) for line in inside)
    return [
        Claim(
            "label corruption scales the covariance of the gradient by (1 - eps)^2",
            f"trained weights, relative trace: {pairs}; exact mixture within {100 * mixture:.1f} %",
            CONTRADICTED if wrong > 0.2 else WITHIN_LIMITS if wrong > 0.05 else CONFIRMED,
        )
    ]


def _figure(lines: list[list], path: pd.DataFrame) -> Figure:
    from matplotlib.figure import Figure

    from lipdyn_torch.experiments.figures import BLACK, BLUE, LINES, VERMILION, style

    with style():
        figure = Figure(figsize=(7.0, 2.8), layout="constrained")
        panels = figure.subplots(1, 3)
        for axes, at in zip(panels, ("start", "trained"), strict=False):
            chosen = [line for line in lines if line[0] == at]
            shares = [line[1] for line in chosen]
            axes.plot(shares, [line[2] for line in chosen], "o", color=BLACK, markersize=4, label="observed")
            axes.plot(shares, [line[3] for line in chosen], "-", color=BLUE, label="exact mixture")
            axes.plot(
                shares, [line[6] or math.nan for line in chosen], "--", color=VERMILION, label="claim $(1-\\epsilon)^2$"
            )
            axes.set(
                xlabel="share of corrupted labels $\\epsilon$",
                title=f"tr $\\Sigma$ over clean, {at} weights",
                yscale="log",
            )
            axes.set_ylim(0.03, None)
            axes.legend()
        for (eps, part), (color, dash) in zip(groups(path, "eps"), LINES, strict=False):
            mean = part["lambda_sq"].rolling(5, min_periods=1).mean()
            panels[2].semilogy(part["step"], mean, color=color, linestyle=dash, label=f"{eps:g}")
        panels[2].set(xlabel="optimiser step", title="$\\lambda^2$ per unit time along the path")
        panels[2].legend(title="$\\epsilon$", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


EXPERIMENTS = [Experiment("label-noise", "Corrupted labels", PRESETS, _points, _run, _summarise)]
