"""Largest singular value of random layers: the law for large ones, its correction, and convolutions as operators."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lipdyn_torch.convolution import ConvolutionOperator
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
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENTS", "corrected", "limit"]

LINEAR = [[10, 256], [256, 512], [512, 784], [256, 2048]]
KERNELS = [[32, 3, 3, 1], [64, 32, 3, 1], [128, 64, 3, 2], [16, 16, 5, 1]]  # out, in, side, stride
PRESETS = {
    "quick": {
        "linear": LINEAR,
        "kernels": KERNELS,
        "schemes": ["default", "kaiming", "xavier"],
        "samples": 20,
        "image": 32,
    },
    "paper": {
        "linear": LINEAR,
        "kernels": KERNELS,
        "schemes": ["default", "kaiming", "xavier"],
        "samples": 200,
        "image": 32,
    },
}
TRACY_WIDOM_MEAN = -1.2065335746


def limit(m: int, n: int, s: float) -> float:
    """``s (sqrt m + sqrt n)``: the law of Bai and Yin for entries of standard deviation s (theory 4).

    Examples
    --------
    >>> limit(4, 9, 2.0)
    10.0
    """
    return s * (math.sqrt(m) + math.sqrt(n))


def corrected(m: int, n: int, s: float) -> float:
    """The limit with the mean of the Tracy-Widom fluctuations (theory 4).

    Examples
    --------
    >>> corrected(256, 512, 1.0) < limit(256, 512, 1.0)
    True
    """
    a, b = math.sqrt(max(m, n) - 1), math.sqrt(min(m, n))
    return s * math.sqrt((a + b) ** 2 + TRACY_WIDOM_MEAN * (a + b) * (1 / a + 1 / b) ** (1 / 3))


def _fill(weight: Tensor, scheme: str) -> float:
    """Initialise in place; returns the standard deviation of the entries."""
    fan_in = weight[0].numel()
    fan_out = weight.numel() // weight.shape[1]
    if scheme == "default":  # what nn.Linear and nn.Conv2d do: uniform
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        return 1 / math.sqrt(3 * fan_in)
    if scheme == "kaiming":
        nn.init.kaiming_normal_(weight)
        return math.sqrt(2 / fan_in)
    nn.init.xavier_uniform_(weight)
    return math.sqrt(2 / (fan_in + fan_out))


def _points(context: Context) -> list[Point]:
    shapes = [(shape, 1) for shape in context["linear"]]
    shapes += [([o, i, k, k], stride) for o, i, k, stride in context["kernels"]]
    return [
        {
            "id": f"{'x'.join(map(str, shape))}-{scheme}",
            "shape": shape,
            "stride": stride,
            "scheme": scheme,
            "cost": 0.03 * context["samples"] * len(shape),
        }
        for shape, stride in shapes
        for scheme in context["schemes"]
    ]


def _run(point: Point, context: Context) -> list[Row]:
    shape, stride = point["shape"], point["stride"]
    rows = []
    for sample in range(context["samples"]):
        torch.manual_seed(context.seed + 1000 * sample)
        weight = torch.empty(shape)
        s = _fill(weight, point["scheme"])
        weight = weight.double()
        row = {
            "shape": " x ".join(map(str, shape)),
            "scheme": point["scheme"],
            "sample": sample,
            "sd": s,
            "stride": stride,
        }
        matrix = weight.flatten(1)
        m, n = matrix.shape
        row |= {"kind": "matrix", "sigma": float(torch.linalg.matrix_norm(matrix, 2))}
        rows.append(row | {"limit": limit(m, n, s), "corrected": corrected(m, n, s)})
        if len(shape) == 4 and sample < max(2, context["samples"] // 10):  # an operator takes a second each
            operator = ConvolutionOperator(weight, context["image"], stride=stride, padding=shape[2] // 2)
            row |= {"kind": "operator", "sigma": operator.norm}
            # Known for stride 1 only; a stride of 2 folds the frequencies.
            law = s * shape[2] * (math.sqrt(shape[0]) + math.sqrt(shape[1])) if stride == 1 else math.nan
            rows.append(row | {"limit": law, "corrected": math.nan})
    return rows


def _summarise(rows: list[Row], context: Context) -> Summary:
    import pandas as pd

    frame = pd.DataFrame(rows)
    lines = []
    for (kind, shape, scheme), part in frame.groupby(["kind", "shape", "scheme"], sort=False):
        sigma = part["sigma"].mean()
        errors = [100 * (part[c].mean() / sigma - 1) for c in ("limit", "corrected")]
        lines.append([kind, shape, scheme, len(part), sigma, 100 * part["sigma"].std() / sigma, *errors])
    columns = [
        "read as",
        "shape",
        "scheme",
        "samples",
        "mean sigma_1",
        "sd, %",
        "error of the limit, %",
        "of the correction, %",
    ]
    note = (
        "Laws: s(sqrt m + sqrt n) for matrices, s side (sqrt out + sqrt in) for operators of stride 1. "
        "Errors are those of the mean."
    )
    ratios = []
    matrix = frame[frame["kind"] == "matrix"]
    for (shape, scheme), part in frame[frame["kind"] == "operator"].groupby(["shape", "scheme"], sort=False):
        same = matrix[(matrix["shape"] == shape) & (matrix["scheme"] == scheme) & matrix["sample"].isin(part["sample"])]
        ratios.append(
            [
                shape,
                scheme,
                same["sigma"].mean(),
                part["sigma"].mean(),
                (part["sigma"].to_numpy() / same["sigma"].to_numpy()).mean(),
            ]
        )
    tables = [Table("Largest singular value of random layers", columns, lines, note)]
    if ratios:
        title = f"Kernels on {context['image']} x {context['image']} images, zero padding: matrix against operator"
        tables.append(Table(title, ["kernel", "scheme", "as a matrix", "as an operator", "ratio"], ratios))
    return Summary(tables, {"initialisation": _figure(lines)}, _claims(lines, ratios), data="random weights")


def _claims(lines: list[list], ratios: list[list]) -> list[Claim]:
    matrix = [line for line in lines if line[0] == "matrix"]
    worst, best = (max(abs(line[i]) for line in matrix) for i in (6, 7))
    claims = [
        Claim(
            "at the start sigma_1 is s(sqrt m + sqrt n)",
            f"error of the limit at most {worst:.2f} %, with the finite-size correction at most {best:.2f} %",
            CONFIRMED if worst < 1 else WITHIN_LIMITS if worst < 10 else CONTRADICTED,
        )
    ]
    if ratios:
        largest = max(line[4] for line in ratios)
        claims.append(
            Claim(
                "the norm of a convolution is the norm of its reshaped kernel",
                f"the operator's norm is up to {largest:.2f} times larger",
                CONTRADICTED if largest > 1.01 else CONFIRMED,
            )
        )
    return claims


def _figure(lines: list[list]) -> Figure:
    from matplotlib.figure import Figure

    from lipdyn_torch.experiments.figures import BLACK, BLUE, VERMILION, style

    matrix = [line for line in lines if line[0] == "matrix"]
    with style():
        figure = Figure(figsize=(7.0, 0.8 + 0.15 * len(matrix)), layout="constrained")
        axes = figure.subplots()
        at = range(len(matrix))
        sd_of_mean = [line[5] / math.sqrt(line[3]) for line in matrix]
        axes.errorbar(
            [line[6] for line in matrix],
            at,
            xerr=sd_of_mean,
            fmt="s",
            color=VERMILION,
            markersize=4,
            label="limit $s(\\sqrt{m}+\\sqrt{n})$",
        )
        axes.errorbar(
            [line[7] for line in matrix],
            at,
            xerr=sd_of_mean,
            fmt="o",
            color=BLUE,
            markersize=4,
            label="with finite-size correction",
        )
        axes.axvline(0, color=BLACK, linewidth=0.6)
        axes.set(
            yticks=at, xlabel="error of the predicted mean of $\\sigma_1$ (%)", title="Random layers, read as matrices"
        )
        axes.set_yticklabels([f"{line[1]}, {line[2]}" for line in matrix])
        axes.invert_yaxis()
        axes.legend(loc="lower right")
    return figure


EXPERIMENTS = [
    Experiment("initialisation", "Largest singular value at initialisation", PRESETS, _points, _run, _summarise)
]
