"""Spread of log K over mini-batch orders and batch sizes, with independent batches and with shuffled epochs.

With independent batches the variance of Z = log K grows as the paper has it. With shuffled epochs, as every ordinary
data loader draws them, the noise of an epoch sums to zero and the variance is that of a bridge (theory 2.10).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lipdyn_torch.dynamics import bridge_variance, diffusion_variance, epoch_means
from lipdyn_torch.experiments import training
from lipdyn_torch.experiments.convergence import power_law
from lipdyn_torch.experiments.data import Images, load
from lipdyn_torch.experiments.frames import groups
from lipdyn_torch.experiments.models import make_model, note
from lipdyn_torch.experiments.registry import (
    CONFIRMED,
    CONTRADICTED,
    NOT_DECIDED,
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

__all__ = ["EXPERIMENTS"]

SAMPLINGS = {"iid": "independent", "shuffle": "shuffled epochs"}
TRAJECTORIES = {
    "quick": {"model": "convnet", "steps": 88, "batch": 64, "lr": 0.01, "orders": 5, "every": 2, "samples": 1408},
    "paper": {
        "model": "convnet",
        "steps": 39_000,
        "batch": 256,
        "lr": 0.01,
        "orders": 5,
        "every": 5,
        "samples": 49_920,
    },
}
BATCH_SIZE = {
    "quick": {
        "model": "mlp",
        "steps": 40,
        "batches": list(range(32, 385, 32)),
        "lr": 0.01,
        "replicates": 10,
        "every": 10,
        "samples": 1438,
    },
    "paper": {
        "model": "mlp",
        "steps": 1000,
        "batches": list(range(32, 385, 32)),
        "lr": 0.01,
        "replicates": 20,
        "every": 10,
        "samples": 50_000,
    },
}


def _measure(context: Context, images: Images, sampling: str, batch: int, order: int) -> list[Row]:
    """Log K and the forces at the measured steps of a run from the fixed initial weights."""
    model = make_model(context["model"], images, context.seed).to(context.device)
    curve = {}
    # Another order of samples for every replicate and batch size; the seed of the weights stays.
    seed = 1_000_003 * (order + 1) + 7919 * batch + context.seed
    plan = training.Plan(context["steps"], batch, context["lr"], sampling, seed, every=context["every"])

    def observe(step: int, network: object) -> None:
        if step % context["every"] == 0:
            curve[step] = training.log_k(model)

    run = training.train(model, images, plan, on_gradient=observe)
    curve[context["steps"]] = training.log_k(model)
    measured = training.network(run.frame).set_index("step")
    rows = []
    for step, z in curve.items():
        row: Row = {"sampling": sampling, "batch": batch, "order": order, "step": step, "z": z}
        if step in measured.index:
            row |= {name: float(measured[name].loc[step]) for name in ("lr", "lambda_sq", "kappa", "mu")}
        rows.append(row)
    return rows


def _images(context: Context) -> Images:
    images = load(context.data, context.root)
    return images.first(context["samples"]).to(context.device)


def _predicted(part: pd.DataFrame, sampling: str, samples: int, context: Context) -> np.ndarray:
    """Var Z at the measured steps: sum of the step variances (the paper), or the bridge.

    A measured step stands for those up to the next one; the mean over the replicates is taken.
    """
    mean = part.groupby("step")["lambda_sq"].mean()
    v = context["lr"] * mean.reindex(range(context["steps"])).ffill().to_numpy()
    batch = np.full(len(v), part["batch"].iloc[0])
    curve = (
        diffusion_variance(v) if sampling == "iid" else bridge_variance(epoch_means(v, batch, samples), batch, samples)
    )
    return np.asarray(curve[_steps(part)])


def _steps(part: pd.DataFrame) -> np.ndarray:
    return np.sort(part["step"].unique())


def _spread(part: pd.DataFrame) -> np.ndarray:
    """Observed variance of Z over the replicates, at the measured steps."""
    return part.pivot(index="step", columns="order", values="z").var(axis=1, ddof=1).to_numpy()


# --- trajectories -----------------------------------------------------------------------------------------------


def _trajectory_points(context: Context) -> list[Point]:
    cost = context["steps"] * (0.04 + 0.14 / context["every"])
    return [
        {"id": f"{sampling}-{order}", "sampling": sampling, "order": order, "cost": cost}
        for sampling in SAMPLINGS
        for order in range(context["orders"])
    ]


def _trajectory_run(point: Point, context: Context) -> list[Row]:
    return _measure(context, _images(context), point["sampling"], context["batch"], point["order"])


def _trajectory_summary(rows: list[Row], context: Context) -> Summary:
    import pandas as pd

    frame = pd.DataFrame(rows)
    samples = len(_images(context).train_x)
    epoch = samples // context["batch"]
    ends = list(range(epoch, context["steps"] + 1, epoch)) or [context["steps"]]
    middle = [max(1, e - epoch // 2) for e in ends]
    sd: dict[str, tuple[np.ndarray, ...]] = {}
    for sampling in SAMPLINGS:
        part = frame[frame["sampling"] == sampling]
        observed = np.sqrt(_spread(part))
        paper, bridge = (np.sqrt(_predicted(part, s, samples, context)) for s in ("iid", "shuffle"))
        sd[sampling] = observed, paper, bridge
        at = {int(step): i for i, step in enumerate(_steps(part))}
    lines = []
    for sampling, (observed, paper, bridge) in sd.items():
        for label, where in (("mid-epoch", middle), ("end of epoch", ends)):
            means = [
                float(np.sqrt(np.mean(np.square(curve[[_nearest(at, s) for s in where]]))))
                for curve in (observed, paper, bridge)
            ]
            lines.append(
                [
                    SAMPLINGS[sampling],
                    label,
                    *means,
                    means[0] / means[1],
                    means[0] / means[2] if means[2] > 1e-12 else math.nan,
                ]
            )
    columns = ["batches", "where", "observed sd", "paper's sd", "bridge sd", "observed / paper", "observed / bridge"]
    dof = context["orders"] - 1
    table = Table(
        f"Standard deviation of log K over {context['orders']} orders (root mean square over {len(ends)} epochs)",
        columns,
        lines,
        f"With {context['orders']} orders one observed sd is uncertain by about {100 / math.sqrt(2 * dof):.0f} %.",
    )
    claims = _trajectory_claims(lines, frame)
    notes = [text for text in [note(context["model"], load(context.data, context.root))] if text]
    return Summary([table], {"trajectories": _trajectory_figure(frame, sd, epoch)}, claims, notes)


def _nearest(at: dict[int, int], step: int) -> int:
    """Position of the measured step nearest to a step."""
    return at[min(at, key=lambda known: abs(known - step))]


def _trajectory_claims(lines: list[list], frame: pd.DataFrame) -> list[Claim]:
    ratio = {(line[0], line[1]): line[5] for line in lines}
    independent = ratio[(SAMPLINGS["iid"], "end of epoch")]
    shuffled = ratio[(SAMPLINGS["shuffle"], "end of epoch")]
    good = 0.33 < independent < 3
    change = frame.groupby(["sampling", "order"])["z"].agg(lambda z: z.iloc[-1] - z.iloc[0])
    relative = float(change.groupby("sampling").std().max() / abs(change.mean()))
    return [
        Claim(
            "the order of the mini-batches hardly matters",
            f"sd over orders at the end: {100 * relative:.2g} % of the change of log K",
            CONFIRMED if relative < 0.05 else WITHIN_LIMITS if relative < 0.3 else CONTRADICTED,
        ),
        Claim(
            "Var[K] follows from the integral of lambda^2",
            f"observed over predicted sd at the ends of epochs: {independent:.2f} with independent batches, "
            f"{shuffled:.3f} with shuffled epochs",
            CONTRADICTED if not good else CONFIRMED if 0.33 < shuffled < 3 else WITHIN_LIMITS,
        ),
    ]


def _trajectory_figure(frame: pd.DataFrame, sd: dict[str, tuple[np.ndarray, ...]], epoch: int) -> Figure:
    from matplotlib.figure import Figure

    from lipdyn_torch.experiments.figures import BLACK, BLUE, LINES, VERMILION, style

    with style():
        figure = Figure(figsize=(7.0, 4.6), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True)
        for column, (sampling, (observed, paper, bridge)) in enumerate(sd.items()):
            part = frame[frame["sampling"] == sampling]
            for (order, run), (color, dash) in zip(groups(part, "order"), LINES * 10, strict=False):
                panels[0, column].plot(run["step"], run["z"], color=color, linestyle=dash, label=f"order {order + 1}")
            panels[0, column].set(
                title=f"{SAMPLINGS[sampling]}: {part['order'].nunique()} orders", ylabel="log K (nats)"
            )
            axes = panels[1, column]
            step = _steps(part)
            axes.plot(step, observed, color=BLACK, label="observed")
            axes.plot(step, paper, color=VERMILION, linestyle="--", label="paper: integral of $\\lambda^2$")
            axes.plot(step, bridge, color=BLUE, linestyle="-.", label="bridge")
            axes.set(xlabel="optimiser step", ylabel="sd of log K (nats)")
            axes.legend()
            for end in range(epoch, step[-1] + 1, epoch) if step[-1] // epoch < 30 else ():
                axes.axvline(end, color=BLACK, linewidth=0.3)
    return figure


# --- batch size -------------------------------------------------------------------------------------------------


def _batch_points(context: Context) -> list[Point]:
    return [
        {
            "id": f"{sampling}-{batch}-{r}",
            "sampling": sampling,
            "batch": batch,
            "order": r,
            "cost": context["steps"] * 0.012,
        }
        for sampling in SAMPLINGS
        for batch in context["batches"]
        for r in range(context["replicates"])
    ]


def _batch_run(point: Point, context: Context) -> list[Row]:
    return _measure(context, _images(context), point["sampling"], point["batch"], point["order"])


def _batch_summary(rows: list[Row], context: Context) -> Summary:
    import pandas as pd

    frame = pd.DataFrame(rows)
    samples = len(_images(context).train_x)
    lines = []
    for batch in context["batches"]:
        line: list = [batch]
        for sampling in SAMPLINGS:
            part = frame[(frame["sampling"] == sampling) & (frame["batch"] == batch)]
            curve = _predicted(part, sampling, samples, context)
            # Mean over the run: one instant would depend on where in its epoch it lies.
            line += [batch * _spread(part)[1:].mean(), batch * curve[1:].mean()]
            if sampling == "iid":
                line.append(batch * part["kappa"].mean())
        lines.append(line)
    columns = ["M", "M Var Z, independent", "predicted", "M kappa", "M Var Z, shuffled", "predicted (bridge)"]
    power = {
        name: power_law(np.array([ln[0] for ln in lines]), np.array([ln[i] / ln[0] for ln in lines]))[0]
        for name, i in (("iid", 1), ("kappa", 3), ("shuffle", 4))
    }
    # Relative error of one variance is sqrt(2 / (R - 1)); the slope's follows from the spread of log M.
    spread = np.std(np.log([line[0] for line in lines])) * math.sqrt(len(lines))
    error = float(math.sqrt(2 / (context["replicates"] - 1)) / spread)
    powers = Table(
        "Power of M",
        ["what", "exponent", "+-", "paper"],
        [
            ["Var Z, independent", float(power["iid"]), error, -1.0],
            ["Var Z, shuffled", float(power["shuffle"]), error, -1.0],
            ["kappa", float(power["kappa"]), "", -1.0],
        ],
        f"{context['replicates']} replicates; Var Z is the mean over the measured steps of {context['steps']}.",
    )
    table = Table("Noise by batch size: constant columns mean 1/M", columns, lines)
    notes = [text for text in [note(context["model"], load(context.data, context.root))] if text]
    return Summary([table, powers], {"batch-size": _batch_figure(lines)}, _batch_claims(lines, power, error), notes)


def _batch_claims(lines: list[list], power: dict[str, float], error: float) -> list[Claim]:
    def verdict(value: float, margin: float) -> str:
        if margin > 0.4:
            return NOT_DECIDED
        distance = abs(value + 1)
        return CONFIRMED if distance < max(0.1, 2 * margin) else WITHIN_LIMITS if distance < 0.5 else CONTRADICTED

    bridge = [line[4] / line[5] for line in lines if line[5] > 0]
    return [
        Claim(
            "Var[Z] falls like 1/M with independent batches",
            f"M^({power['iid']:.2f} +- {error:.2f})",
            verdict(power["iid"], error),
        ),
        Claim(
            "Var[Z] falls like 1/M with shuffled epochs",
            f"M^({power['shuffle']:.2f} +- {error:.2f}); observed over bridge formula {np.median(bridge):.2f} (median)",
            verdict(power["shuffle"], error),
        ),
        Claim(
            "the batch size affects the diffusion only",
            f"kappa, a drift, goes like M^({power['kappa']:.2f})",
            CONTRADICTED if power["kappa"] < -0.5 else CONFIRMED,
        ),
    ]


def _batch_figure(lines: list[list]) -> Figure:
    from matplotlib.figure import Figure

    from lipdyn_torch.experiments.figures import BLUE, GREEN, VERMILION, style

    m = [line[0] for line in lines]
    with style():
        figure = Figure(figsize=(7.0, 2.7), layout="constrained")
        left, right = figure.subplots(1, 2)
        for at, color, marker, dash, label in (
            (1, VERMILION, "s", "--", "independent"),
            (4, BLUE, "o", "-.", "shuffled"),
        ):
            left.plot(m, [line[at] for line in lines], marker, color=color, markersize=4, label=f"{label}, observed")
            left.plot(m, [line[at + 1] for line in lines], color=color, linestyle=dash, label=f"{label}, predicted")
        left.set(xlabel="batch size M", ylabel="M Var[log K] (nats²)", title="Variance of log K times M", yscale="log")
        figure.legend(loc="outside lower center", ncols=4)
        right.plot(m, [line[3] for line in lines], "d-", color=GREEN, markersize=4)
        right.set(xlabel="batch size M", ylabel="M $\\kappa$ per unit time", title="Noise curvature times M")
        right.set_ylim(0, 1.15 * max(line[3] for line in lines))
    return figure


EXPERIMENTS = [
    Experiment(
        "trajectories",
        "Spread over mini-batch orders",
        TRAJECTORIES,
        _trajectory_points,
        _trajectory_run,
        _trajectory_summary,
    ),
    Experiment("batch-size", "Noise and batch size", BATCH_SIZE, _batch_points, _batch_run, _batch_summary),
]
