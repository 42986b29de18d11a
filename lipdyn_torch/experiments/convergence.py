"""A long run without regulariser: what the forces add up to as the loss goes to zero."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lipdyn_torch.dynamics import moving_average
from lipdyn_torch.experiments import training
from lipdyn_torch.experiments.data import load
from lipdyn_torch.experiments.frames import groups, records
from lipdyn_torch.experiments.models import make_model, note
from lipdyn_torch.experiments.registry import (
    CONFIRMED,
    CONTRADICTED,
    NOT_DECIDED,
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

__all__ = ["EXPERIMENTS", "power_law"]

FORCES = ("mu", "kappa", "lambda_sq")
PARTS = ("kappa_var", "kappa_cov", "lambda_sq_var", "lambda_sq_cov")
PRESETS = {
    "quick": {"model": "convnet", "steps": 4000, "batch": 64, "lr": 0.05, "every": 10, "window": 500},
    "paper": {"model": "convnet", "steps": 153_270, "batch": 256, "lr": 0.01, "every": 10, "window": 500},
}


def power_law(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Exponent and constant of ``y = c x^p`` by least squares of logarithms, where both are positive.

    Examples
    --------
    >>> power_law(np.array([1.0, 2.0, 4.0]), np.array([3.0, 12.0, 48.0]))[0].round(12)
    np.float64(2.0)
    """
    good = (x > 0) & (y > 0)
    if good.sum() < 2:
        return math.nan, math.nan
    power, constant = np.polyfit(np.log(x[good]), np.log(y[good]), 1)
    return power, math.exp(constant)


def _points(context: Context) -> list[Point]:
    return [{"id": "run", "cost": context["steps"] * (0.015 + 0.4 / context["every"])}]


def _run(point: Point, context: Context) -> list[Row]:
    images = load(context.data, context.root).to(context.device)
    model = make_model(context["model"], images, context.seed).to(context.device)
    plan = training.Plan(
        context["steps"], context["batch"], context["lr"], seed=context.seed, every=context["every"], noise="split"
    )
    run = training.train(model, images, plan)
    loss = moving_average(run.losses, context["window"])
    columns = ["step", "layer", "lr", "z", "dz", "dz2", *FORCES, *PARTS, "eps"]
    rows: list[Row] = records(run.frame[columns])
    for row in rows:
        if row["layer"] == training.NETWORK:
            row["loss"] = loss[row["step"]]
    return rows


def _summarise(rows: list[Row], context: Context) -> Summary:
    import pandas as pd

    frame = pd.DataFrame(rows)
    # A measured step stands for those up to the next one.
    frame["weight"] = frame["lr"] * context["every"]
    network = training.network(frame)
    last_third = network["step"] >= 2 * context["steps"] / 3
    lines = []
    for name in (*FORCES, *PARTS):
        increments = network["weight"] * network[name]
        total, tail = increments.sum(), increments[last_third].sum()
        lines.append([name, total, tail, 100 * tail / total if total else math.nan, float(network[name].iloc[-1])])
    note_1 = (
        "Time is the sum of learning rates; the tail is the last third. "
        f"log K went from {network['z'].iloc[0]:.3f} to {network['z'].iloc[-1]:.3f}."
    )
    first = Table(
        "Integrals over the run, network", ["force", "integral", "tail", "tail, %", "at the end"], lines, note_1
    )
    layers = [
        [layer, *((part["weight"] * part[name]).sum() for name in (*FORCES, *PARTS))]
        for layer, part in groups(frame, "layer", sort=False)
        if layer != training.NETWORK
    ]
    second = Table("Integrals over the run, by layer", ["layer", *FORCES, *PARTS], layers)
    fit = _fits(network, context)
    third = Table("Power laws, second half of the run", ["what", "exponent"], [[k, v] for k, v in fit.items()])
    claims = _claims(network, last_third, fit, frame)
    images = load(context.data, context.root)
    return Summary(
        [first, _growth(frame), second, third],
        {"near-convergence": _figure(frame, context)},
        claims,
        [n for n in [note(context["model"], images)] if n],
    )


def _growth(frame: pd.DataFrame) -> Table:
    """What the forces say of the measured steps alone, where the truth is known (theory 2.2, 2.7)."""
    network, layers = training.network(frame), frame[frame["layer"] != training.NETWORK]
    mu, kappa = ((network["lr"] * network[name]).sum() for name in ("mu", "kappa"))
    ito = (layers["lr"] * layers["lambda_sq"]).sum() / 2
    lines = [
        ["observed", network["dz"].sum()],
        ["mu", mu],
        ["mu + kappa - lambda^2 / 2 (the SDE)", mu + kappa - ito],
        ["along the update, order 2", network["dz2"].sum()],
    ]
    what = "The SDE leaves out the curvature along the mean gradient, which large steps early in the run feel."
    return Table(f"Growth of log K in the {len(network)} measured steps", ["what", "sum"], lines, what)


def _fits(network: pd.DataFrame, context: Context) -> dict[str, float]:
    half = network[network["step"] >= context["steps"] / 2]
    window = max(1, min(context["window"], context["steps"] // 10) // context["every"])
    kappa = np.convolve(half["kappa"], np.full(window, 1 / window), mode="valid")
    loss, step = (half[name].to_numpy()[window - 1 :] for name in ("loss", "step"))
    out = {
        "kappa as a power of the loss": power_law(loss, kappa)[0],
        "kappa as a power of the step": power_law(step, kappa)[0],
    }
    return {key: float(value) for key, value in out.items()}


def _claims(network: pd.DataFrame, tail: pd.Series, fit: dict[str, float], frame: pd.DataFrame) -> list[Claim]:
    increments = {name: network["weight"] * network[name] for name in FORCES}
    kappa, mu = increments["kappa"].sum(), increments["mu"].sum()
    power = fit["kappa as a power of the step"]
    share = float(increments["kappa"][tail].sum() / kappa)
    # An integral of step^p grows without bound only for p >= -1.
    bounded = power < -1
    ratio = float(mu / kappa)
    covariance = {k: float((network["weight"] * network[k]).sum()) for k in PARTS}
    dominates = abs(covariance["lambda_sq_cov"]) > abs(covariance["lambda_sq_var"])
    return [
        Claim(
            "near convergence K grows without bound, through kappa",
            f"kappa falls like step^{power:.2f} and loss^{fit['kappa as a power of the loss']:.2f}; its integral is "
            f"{kappa:.2e}, {100 * share:.1f} % of it from the last third; the integral of mu is "
            f"{ratio:.0f} times as large",
            CONTRADICTED if bounded and ratio > 1 else NOT_DECIDED if ratio > 1 else CONFIRMED,
        ),
        Claim(
            "the covariance of the gradient noise dominates its variance part",
            f"lambda^2: covariance {covariance['lambda_sq_cov']:+.2e}, variance {covariance['lambda_sq_var']:+.2e}; "
            f"kappa: covariance {covariance['kappa_cov']:+.2e}, variance {covariance['kappa_var']:+.2e}",
            CONFIRMED if dominates else CONTRADICTED,
        ),
    ]


def _figure(frame: pd.DataFrame, context: Context) -> Figure:
    from matplotlib.figure import Figure

    from lipdyn_torch.experiments.figures import BLACK, BLUE, LINES, VERMILION, style
    from lipdyn_torch.plots import RATES

    window = max(1, context["window"] // context["every"])
    network = training.network(frame)
    with style():
        figure = Figure(figsize=(7.0, 6.4), layout="constrained")
        panels = figure.subplots(3, 2, sharex=True)
        figure.suptitle(f"All but the last panel: means of up to {context['window']} steps", fontsize=8)

        def draw(axes, rows, column, **look):  # type: ignore[no-untyped-def]
            axes.plot(rows["step"], moving_average(rows[column], window), **look)

        names = [n for n in frame["layer"].unique() if n != training.NETWORK]
        for axes, (column, (title, unit)) in zip(panels.flat[:3], RATES.items(), strict=True):
            for name, (color, dash) in zip(names, LINES, strict=False):
                draw(axes, frame[frame["layer"] == name], column, color=color, linestyle=dash, label=name)
            draw(axes, network, column, color=BLACK, linewidth=2.2, alpha=0.4, label="network")
            axes.set(title=title, ylabel=unit)
            if column != "mu":
                axes.set_yscale("log")
        for column, label, color, dash in (
            ("lambda_sq_var", "variance part of $\\lambda^2$", BLUE, "-"),
            ("lambda_sq_cov", "covariance part of $\\lambda^2$", VERMILION, "--"),
            ("kappa_var", "variance part of $\\kappa$", BLUE, ":"),
            ("kappa_cov", "covariance part of $\\kappa$", VERMILION, "-."),
        ):
            draw(panels[1, 1], network, column, color=color, linestyle=dash, label=label)
        panels[1, 1].set(title="parts, network", ylabel="nats, nats$^2$ per unit time")
        panels[1, 1].set_yscale("symlog", linthresh=float(np.nanmedian(np.abs(network["kappa_var"]))))
        panels[1, 1].legend()
        panels[2, 0].semilogy(network["step"], network["loss"], color=BLACK)
        panels[2, 0].set(title="loss", ylabel="nats", xlabel="optimiser step")
        _cumulated(panels[2, 1], network)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, handlelength=3)
    return figure


def _cumulated(axes, network: pd.DataFrame) -> None:  # type: ignore[no-untyped-def]
    """The integral of each force so far, beside the change of log K."""
    from lipdyn_torch.experiments.figures import BLACK, BLUE, GREEN, VERMILION

    axes.plot(
        network["step"],
        network["z"] - network["z"].iloc[0],
        color=BLACK,
        linewidth=2.4,
        alpha=0.35,
        label="change of log K",
    )
    for name, symbol, color, dash in (
        ("mu", "$\\mu$", BLUE, "-."),
        ("kappa", "$\\kappa$", VERMILION, "--"),
        ("lambda_sq", "$\\lambda^2$ (nats$^2$)", GREEN, ":"),
    ):
        axes.plot(
            network["step"],
            (network["weight"] * network[name]).cumsum(),
            color=color,
            linestyle=dash,
            label=f"integral of {symbol}",
        )
    axes.set(title="integrals of the network's forces, and log K", ylabel="nats", xlabel="optimiser step")
    low, high = axes.get_ylim()
    axes.set_ylim(low, low + 1.5 * (high - low))  # room for the legend
    axes.legend(loc="upper left", ncols=2)


EXPERIMENTS = [Experiment("near-convergence", "Forces near convergence", PRESETS, _points, _run, _summarise)]
