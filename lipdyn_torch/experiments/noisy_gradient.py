"""Gradients scaled by sqrt(rho) plus sqrt(1 - rho) noise: growth of K against eq. 26 and against rescaled time.

Eq. 26 multiplies the drift's integral by sqrt(rho) and that of the noise by rho, along the path of rho = 1. But
scaling the gradient is a smaller learning rate, which makes the same path slower:
``K_rho(step) = K_1(sqrt(rho) step)``. And the added noise has a curvature term ``s^2 tr H``, which eq. 26 leaves out
(theory 4).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from lipdyn_torch.dynamics import step_increments
from lipdyn_torch.experiments import training
from lipdyn_torch.experiments.data import load
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

__all__ = ["EXPERIMENTS", "hessian_trace"]

NOISES = {"none": "none", "normal": "N(0, 1)", "uniform": "U[-0.5, 0.5]"}
VARIANCE = {"none": 0.0, "normal": 1.0, "uniform": 1.0 / 12.0}
PRESETS = {
    "quick": {"steps": 300, "batch": 64, "lr": 0.05, "noisy_lr": 0.01, "rho": [1.0, 0.9, 0.64, 0.25, 0.09], "every": 5},
    "paper": {
        "steps": 39_000,
        "batch": 128,
        "lr": 0.01,
        "noisy_lr": 0.01,
        "rho": [1.0, 0.9, 0.64, 0.25, 0.09],
        "every": 50,
    },
}


def hessian_trace(values: torch.Tensor, shape: tuple[int, int]) -> float:
    """``tr H`` of the largest singular value, from all singular values and the shape (theory 1.3).

    Examples
    --------
    >>> round(hessian_trace(torch.tensor([3.0, 1.0], dtype=torch.float64), (2, 2)), 12)  # 6 / 8
    0.75
    """
    s = values.sort(descending=True).values.double()
    pairs = float((2 * s[0] / (s[0] ** 2 - s[1:] ** 2)).sum())
    return pairs + abs(shape[0] - shape[1]) / float(s[0])


def _points(context: Context) -> list[Point]:
    points: list[Point] = [{"id": "reference", "noise": "none", "rho": 1.0, "cost": context["steps"] * 0.05}]
    for noise in NOISES:
        for rho in context["rho"]:
            if rho < 1:
                points.append({"id": f"{noise}-{rho}", "noise": noise, "rho": rho, "cost": context["steps"] * 0.005})
    # With added noise the paper's learning rate is kept, and its own run without noise is the reference.
    points.append({"id": "reference-noisy", "noise": "normal", "rho": 1.0, "cost": context["steps"] * 0.05})
    return points


def _rate(noise: str, context: Context) -> float:
    return float(context["lr"] if noise == "none" else context["noisy_lr"])


def _run(point: Point, context: Context) -> list[Row]:
    images = load(context.data, context.root).to(context.device)
    model = make_model("mlp", images, context.seed).to(context.device)
    rho, noise = point["rho"], point["noise"]
    generator = torch.Generator().manual_seed(context.seed + 17)
    curve: dict[int, float] = {0: training.log_k(model)}
    trace = _log_growth_of_noise(model, VARIANCE[noise] * (1 - rho), _rate(noise, context))

    def disturb(step: int, network: nn.Module) -> None:
        if step == 1 or (step and step % context["every"] == 0):
            curve[step] = training.log_k(network)
        if rho < 1:
            for parameter in network.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(math.sqrt(rho))
                if noise != "none":
                    parameter.grad.add_(math.sqrt(1 - rho) * _draw(noise, parameter, generator))

    every = 1 if point["id"].startswith("reference") else 0
    plan = training.Plan(context["steps"], context["batch"], _rate(noise, context), seed=context.seed, every=every)
    run = training.train(model, images, plan, on_gradient=disturb)
    curve[context["steps"]] = training.log_k(model)
    base: Row = {"noise": noise, "rho": rho, "kind": "curve", "trace": trace}
    rows = [{**base, "step": step, "z": z} for step, z in curve.items()]
    if every:
        layers = run.frame[run.frame["layer"] != training.NETWORK]
        network = training.network(run.frame)
        m, c, _ = step_increments(network["lr"], network["mu"], network["kappa"], network["lambda_sq"])
        v = (layers["lr"] * layers["lambda_sq"]).groupby(layers["step"]).sum().to_numpy()
        rows += [
            {**base, "kind": "forces", "step": i, "m": float(m[i]), "c": float(c[i]), "v": float(v[i])}
            for i in range(len(m))
        ]
    return rows


def _draw(noise: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    draw = (
        torch.randn(like.shape, generator=generator)
        if noise == "normal"
        else torch.rand(like.shape, generator=generator) - 0.5
    )
    return draw.to(like)


def _log_growth_of_noise(model: nn.Module, variance: float, lr: float) -> float:
    """What white noise adds to log K in the first step, ``sum lr^2 s^2 (tr H / sigma - 1/sigma^2) / 2``."""
    total = 0.0
    for matrix in training.weight_matrices(model).values():
        values = torch.linalg.svdvals(matrix)
        sigma = float(values[0])
        trace = hessian_trace(values, (matrix.shape[0], matrix.shape[1]))
        total += lr**2 * variance / 2 * (trace / sigma - 1 / sigma**2)
    return total


def _summarise(rows: list[Row], context: Context) -> Summary:
    import pandas as pd

    frame = pd.DataFrame(rows)
    lines, curves = [], {}
    for noise in NOISES:
        reference = frame[frame["point"] == ("reference" if noise == "none" else "reference-noisy")]
        one, forces = (
            reference[reference["kind"] == "curve"].sort_values("step"),
            reference[reference["kind"] == "forces"],
        )
        for rho in context["rho"]:
            if rho == 1 and noise == "uniform":
                continue  # the same run as with normal noise
            run = (
                one
                if rho == 1
                else frame[(frame["noise"] == noise) & (frame["rho"] == rho) & (frame["kind"] == "curve")]
            )
            run = run.sort_values("step")
            z0 = run["z"].iloc[0]
            growth = run["z"].iloc[-1] - z0
            paper = math.sqrt(rho) * forces["m"].sum() + rho * (forces["c"] - forces["v"] / 2).sum()
            rescaled = float(np.interp(math.sqrt(rho) * context["steps"], one["step"], one["z"])) - z0
            first = run.set_index("step").loc[1, "z"] - z0 if 1 in set(run["step"]) else math.nan
            label = "none" if rho == 1 else NOISES[noise]
            lines.append([label, rho, _rate(noise, context), growth, paper, rescaled, first, run["trace"].iloc[0]])
            curves[(noise, rho)] = run
    columns = [
        "noise",
        "rho",
        "lr",
        "growth of log K",
        "eq. 26",
        "rescaled time",
        "first step",
        "first step from s^2 tr H",
    ]
    table = Table(
        "Growth of log K over the run",
        columns,
        lines,
        "The last two columns: what the first step did, and what the added noise's curvature alone predicts for it.",
    )
    notes = [text for text in [note("mlp", load(context.data, context.root))] if text]
    return Summary([table], {"noisy-gradient": _figure(curves, context)}, _claims(lines), notes)


def _claims(lines: list[list]) -> list[Claim]:
    plain = [line for line in lines if line[0] == "none" and line[1] < 1]
    paper, ours = (max(abs(line[i] / line[3] - 1) for line in plain) for i in (4, 5))
    normal = [line for line in lines if line[0] == NOISES["normal"]]
    reference = next(line for line in lines if line[0] == "none" and line[1] == 1 and line[2] == normal[0][2])
    noisy = max(normal, key=lambda line: line[3])
    steps = [line for line in normal if line[7]]
    agreement = max(abs(line[6] / line[7] - 1) for line in steps)
    return [
        Claim(
            "eq. 26: scaling the gradient by sqrt(rho) scales the drift's integral by sqrt(rho)",
            f"error of the growth of log K: eq. 26 up to {100 * paper:.0f} %, rescaled time up to {100 * ours:.1f} %",
            CONFIRMED if paper < 0.05 else WITHIN_LIMITS if paper < 0.2 else CONTRADICTED,
        ),
        Claim(
            "noisy gradients slow the growth of K",
            f"with N(0, 1) noise and rho = {noisy[1]:g} log K grows by {noisy[3]:.2f}, "
            f"without noise by {reference[3]:.2f}",
            CONTRADICTED if noisy[3] > reference[3] else CONFIRMED,
        ),
        Claim(
            "the curvature term of the added noise can be left out",
            f"s^2 tr H predicts the first step's growth within {100 * agreement:.0f} %: "
            f"up to {max(line[7] for line in steps):.3f} of log K per step",
            CONTRADICTED if max(line[7] for line in steps) > 0.01 and agreement < 0.5 else WITHIN_LIMITS,
        ),
    ]


def _figure(curves: dict[tuple[str, float], pd.DataFrame], context: Context) -> Figure:
    from matplotlib.figure import Figure

    from lipdyn_torch.experiments.figures import BLACK, LINES, style

    with style():
        figure = Figure(figsize=(7.0, 4.8), layout="constrained")
        panels = figure.subplots(2, 2)
        titles = {"none": "gradient scaled, no noise", "normal": "noise N(0, 1)", "uniform": "noise U[-0.5, 0.5]"}
        for axes, noise in zip((panels[0, 0], panels[1, 0], panels[1, 1]), NOISES, strict=True):
            for rho, (color, dash) in zip(context["rho"], LINES, strict=False):
                run = curves.get((noise, rho), curves.get(("normal", rho) if rho == 1 else (noise, rho)))
                if run is not None:
                    axes.plot(
                        run["step"],
                        run["z"] - run["z"].iloc[0],
                        color=color,
                        linestyle=dash,
                        label=f"$\\rho$ = {rho:g}",
                    )
            axes.set(
                title=f"{titles[noise]}, lr {_rate(noise, context):g}",
                xlabel="optimiser step",
                ylabel="growth of log K (nats)",
            )
        axes = panels[0, 1]
        for rho, (color, dash) in zip(context["rho"], LINES, strict=False):
            run = curves[("none", rho)]
            axes.plot(
                math.sqrt(rho) * run["step"],
                run["z"] - run["z"].iloc[0],
                color=color,
                linestyle=dash,
                label=f"$\\rho$ = {rho:g}",
            )
        axes.set(title="no noise, over rescaled time", xlabel="$\\sqrt{\\rho}$ step", ylabel="growth of log K (nats)")
        axes.axhline(0, color=BLACK, linewidth=0.4)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), handlelength=3)
    return figure


EXPERIMENTS = [Experiment("noisy-gradient", "Scaled and noisy gradients", PRESETS, _points, _run, _summarise)]
