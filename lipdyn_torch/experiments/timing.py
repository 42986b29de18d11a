"""What the validation costs: plain and monitored steps, and per-sample gradients written the obvious way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lipdyn_torch.experiments.data import Images, load
from lipdyn_torch.experiments.models import make_model
from lipdyn_torch.experiments.registry import Context, Experiment, Point, Row, Summary, Table
from lipdyn_torch.experiments.regularisers import REGULARISERS
from lipdyn_torch.monitor import LipschitzMonitor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENTS"]

PAPER_GPU_HOURS = 570  # as the paper reports for all its experiments
VALIDATION_STEPS = 39_000
CHUNK = 32  # samples whose gradients are held at once
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"rounds": 10, "steps": 10, "per_sample_steps": 1, "batch": 64, "lr": 0.01, "shape": None},
    "paper": {"rounds": 10, "steps": 10, "per_sample_steps": 1, "batch": 256, "lr": 0.01, "shape": [3, 32, 32]},
}
METHODS = {
    "plain": "plain step",
    "monitor": "monitored step",
    "every 10": "monitored every 10th step",
    "per sample": "vmap(grad) and SVD",
}


def _points(context: Context) -> list[Point]:
    return [{"id": "run", "cost": context["rounds"] * context["steps"] * context["batch"] * 0.05}]


def _images(context: Context) -> tuple[Images, str]:
    """Images of the wanted shape: the data set's if they have it, otherwise noise, which takes the same time."""
    images = load(context.data, context.root)
    shape = tuple(context["shape"] or images.train_x.shape[1:])
    if tuple(images.train_x.shape[1:]) == shape:
        return images.first(4096), context.data
    generator = torch.Generator().manual_seed(context.seed)
    x = torch.randn(4 * context["batch"], *shape, generator=generator)
    y = torch.randint(10, (len(x),), generator=generator)
    return Images(x, y, x[:1], y[:1], torch.zeros(shape[0]), torch.ones(shape[0])), "random pixels"


def _run(point: Point, context: Context) -> list[Row]:
    images, source = _images(context)
    images = images.to(context.device)
    steppers = {name: _stepper(name, images, context) for name in METHODS}
    rows = []
    for name, step in steppers.items():
        step()  # the first calls plan and allocate
        if name == "every 10":
            for _ in range(9):
                step()
    for repeat in range(context["rounds"]):
        for name, step in steppers.items():
            # A whole period of the schedule, or its mean would depend on where it was cut.
            count = {"every 10": 10, "per sample": context["per_sample_steps"]}.get(name, context["steps"])
            start = time.perf_counter()
            for _ in range(count):
                step()
            if context.device.startswith("cuda"):
                torch.cuda.synchronize(context.device)
            rows.append(
                {
                    "method": name,
                    "round": repeat,
                    "steps": count,
                    "seconds": (time.perf_counter() - start) / count,
                    "data": source,
                    "shape": list(images.train_x.shape[1:]),
                }
            )
    return rows


def _stepper(name: str, images: Images, context: Context) -> Callable[[], object]:
    model = make_model("convnet", images, context.seed).to(context.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=context["lr"])
    if name == "per sample":
        return lambda: _per_sample_step(model, optimizer, *_batch(images, context))
    monitor = LipschitzMonitor(model, optimizer, every=10 if name == "every 10" else 1) if name != "plain" else None

    def step() -> None:
        x, y = _batch(images, context)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step.monitor = monitor  # type: ignore[attr-defined]  # keeps it alive as long as the step
    return step


def _batch(images: Images, context: Context) -> tuple[Tensor, Tensor]:
    return images.train_x[: context["batch"]], images.train_y[: context["batch"]]


def _per_sample_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> list[tuple[float, float, float]]:
    """Gradients of every sample, the thin SVD of every weight, and the sums of theory 2.4 over the samples.

    In chunks, because 256 gradients of the ConvNet for 32 x 32 images take 9 GB at once.
    """
    values = {name: p.detach() for name, p in model.named_parameters()}
    svds = {n: torch.linalg.svd(w.flatten(1), full_matrices=False) for n, w in values.items() if w.ndim > 1}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, weights, (image[None],))
        return nn.functional.cross_entropy(logits, label[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    total = {name: torch.zeros_like(w) for name, w in values.items()}
    projections: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in svds}
    for images, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        for name, gradients in per_sample(values, images, labels).items():
            total[name] += gradients.sum(0)
            if name in svds:
                U, _, Vh = svds[name]
                G = gradients.flatten(2)
                projections[name].append((G @ Vh[0], torch.einsum("imn,m->in", G, U[:, 0])))
    for name, parameter in model.named_parameters():
        parameter.grad = total[name] / len(x)
    terms = [_terms(svds[n], *(torch.cat(parts) for parts in zip(*pq, strict=True))) for n, pq in projections.items()]
    optimizer.step()
    return terms


def _terms(svd: tuple[Tensor, Tensor, Tensor], p: Tensor, q: Tensor) -> tuple[float, float, float]:
    """``<J, gbar>, J^T Sigma J, <H, Sigma>`` of one layer from ``G_i v`` and ``G_i^T u`` (theory 1.3, 2.3)."""
    U, s, Vh = svd
    drift = float(U[:, 0] @ p.mean(0))
    p, q = p - p.mean(0), q - q.mean(0)
    a, b = p @ U, q @ Vh.T
    rest = (p - a @ U.T).square().sum() + (q - b @ Vh).square().sum()
    a1, b1, s1 = a[:, 1:], b[:, 1:], s[1:]
    sums = (s[0] * (a1.square() + b1.square()) + 2 * s1 * a1 * b1) / (s[0] ** 2 - s1**2)
    norm = len(p) * (len(p) - 1)
    return drift, float(a[:, 0].square().sum() / norm), float((rest / s[0] + sums.sum()) / norm)


def _summarise(rows: list[Row], context: Context) -> Summary:
    import pandas as pd

    frame = pd.DataFrame(rows)
    medians: dict[str, float] = {str(k): float(v) for k, v in frame.groupby("method")["seconds"].median().items()}
    runs = len(REGULARISERS)
    lines = []
    for name, title in METHODS.items():
        part = frame[frame["method"] == name]
        hours = runs * VALIDATION_STEPS * medians[name] / 3600
        lines.append([title, int(part["steps"].sum()), 1000 * medians[name], medians[name] / medians["plain"], hours])
    where = f"{context.device}, one thread" if context.device == "cpu" else context.device
    table = Table(
        f"One step of the ConvNet on {' x '.join(map(str, rows[0]['shape']))}, batch {context['batch']}, {where}",
        [
            "what",
            "steps timed",
            "ms per step (median)",
            "in plain steps",
            f"{runs} runs of {VALIDATION_STEPS} steps, hours",
        ],
        lines,
        f"Pixels: {rows[0]['data']}. Interleaved in one process. "
        f"The paper reports {PAPER_GPU_HOURS}+ GPU hours for its experiments.",
    )
    ratio = medians["per sample"] / medians["monitor"]
    notes = [
        f"The validation, {runs} runs of {VALIDATION_STEPS} steps measured at every step, takes "
        f"{lines[1][4]:.1f} hours here at batch {context['batch']} "
        f"({where}, the full gradient not counted); with per-sample gradients written the obvious way "
        f"{lines[3][4]:.1f} hours, {ratio:.1f} times as long."
    ]
    return Summary([table], {"timing": _figure(frame)}, notes=notes, data=rows[0]["data"])


def _figure(frame: Any) -> Figure:
    from matplotlib.figure import Figure

    from lipdyn_torch.experiments.figures import BLUE, VERMILION, style

    with style():
        figure = Figure(figsize=(7.0, 2.0), layout="constrained")
        axes = figure.subplots()
        names = list(METHODS)
        axes.boxplot(
            [1000 * frame[frame["method"] == n]["seconds"] for n in names],
            orientation="horizontal",
            whis=(0, 100),
            medianprops={"color": VERMILION},
            boxprops={"color": BLUE},
        )
        axes.set(xlabel="ms per step", xscale="log", title="Cost of one step")
        axes.set_yticks(np.arange(1, len(names) + 1), [METHODS[n] for n in names])
        axes.invert_yaxis()
    return figure


EXPERIMENTS = [Experiment("timing", "Cost of the validation", PRESETS, _points, _run, _summarise, alone=True)]
