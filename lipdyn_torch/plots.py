"""Figures from a history: sized for a page of text or for a slide, safe for colour-blind readers.

Every figure takes ``context="paper"`` (7 inches wide, 8 point) or ``"slide"`` (13.3 inches wide, 18 point). Time is
in optimiser steps, logarithms are natural, forces are per unit of the SDE's time (one step takes ``lr``). Curves are
told apart by dash pattern and label as well as by colour. Nothing here touches pyplot's global state: a `Figure` is
returned, to be shown by a notebook or saved with ``figure.savefig(path)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from lipdyn_torch.dynamics import step_increments
from lipdyn_torch.history import NETWORK, History
from lipdyn_torch.predict import SDE, Prediction, from_known, measured, observed, pathwise, sde

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    *("RATES", "error_panel", "force_panels", "forces_figure", "heatmap_figure", "log_k_figure", "log_k_panel"),
    *("split_figure", "summary_figure", "validity_figure"),
]

# Okabe and Ito's palette, without yellow, which is too pale for lines.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"),
)
#: Of layers: seven colours and five dash patterns, paired differently 35 times over.
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK)
DASHES: tuple[Any, ...] = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
#: So many layers have a curve of their own; the others share a style.
NAMED, OTHERS = 21, ("#BBBBBB", "-")
#: So many characters of a layer's name are written out.
LONGEST, ELLIPSIS = 32, "\N{HORIZONTAL ELLIPSIS}"
PREDICTOR_STYLES = [(VERMILION, "--"), (BLUE, "-."), (GREEN, (0, (1, 1)))]
#: Title and unit of the axes by column.
RATES = {
    "mu": ("drift $\\mu$", "nats per unit time"),
    "kappa": ("noise curvature $\\kappa$", "nats per unit time"),
    "lambda_sq": ("noise $\\lambda^2$", "nats$^2$ per unit time"),
}
REST = "rest, not in the SDE"
#: Of the areas of `forces_figure`: colour and hatching tell them apart.
FORCES = {
    "drift": (BLUE, ""),
    "noise curvature": (ORANGE, "////"),
    "Ito term of the noise": (GREEN, "...."),
    REST: ("#BBBBBB", ""),
}
#: Height of a line of text in an axes of `validity_figure`, as a part of the rest, with some space.
WORDS = 0.12
#: Size in inches per inch of the page, and base font size in points.
CONTEXTS = {"paper": (1.0, 8.0), "slide": (1.9, 18.0)}


@contextmanager
def _figure(context: str, height: float) -> Iterator[Figure]:
    """A figure of the context's width and ``height`` (inches on paper), its style in force while it is drawn."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if context not in CONTEXTS:
        raise ValueError(f"expected context {' or '.join(map(repr, CONTEXTS))}, got {context!r}")
    scale, font = CONTEXTS[context]
    small = font - 1 if context == "paper" else font - 3
    rc: dict[Any, Any] = {
        **{"font.size": font, "axes.titlesize": font, "axes.labelsize": font, "legend.fontsize": small},
        **{"xtick.labelsize": small, "ytick.labelsize": small, "figure.titlesize": font},
        **{
            "lines.markersize": 3.0 * scale,
            "lines.linewidth": 1.2 * scale,
            "axes.linewidth": 0.6 * scale,
            "hatch.linewidth": 0.5 * scale,
        },
        **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
    }
    with mpl.rc_context(rc):
        yield Figure(figsize=(7.0 * scale, height * scale), layout="constrained")


def summary_figure(history: History | pd.DataFrame, context: str = "paper") -> Figure:
    """The run in one figure.

    Above, log K as observed and predicted, and the predictors' errors; below, drift, noise curvature and noise
    of every layer.

    Parameters
    ----------
    history : History or DataFrame
        At least one monitored step.
    context : {"paper", "slide"}

    Examples
    --------
    >>> row = {"lr": 0.1, "batch": 4, "mu": 1.0, "kappa": 0.1, "lambda_sq": 0.2, "dz": 0.1, "dz2": 0.1, "dz3": 0.1}
    >>> rows = [row | {"step": k, "layer": name, "z": k / 10} for k in (0, 1) for name in ("fc", "network")]
    >>> figure = summary_figure(History(rows, {"sampling": "iid"}))
    >>> [axes.get_title() for axes in figure.get_axes()[:2]]
    ['Lipschitz bound of the network', 'Error of the predictors']
    """
    with _figure(context, 4.4) as figure:
        height = figure.get_figheight()
        grid = figure.add_gridspec(2, 1)
        upper, lower = (figure.add_subfigure(grid[row]) for row in range(2))
        predictors = _prediction_panels(upper, history)
        panels = list(lower.subplots(1, 3))
        force_panels(panels, history)
        heights = [height / 2 + predictors, height / 2 + _legend_below(lower, *_layer_entries(panels[0]))]
        grid.set_height_ratios(heights)
        figure.set_figheight(sum(heights))
    return figure


def log_k_figure(history: History | pd.DataFrame, context: str = "paper") -> Figure:
    """Observed and predicted log K with the band of the SDE, and beside them the predictors' errors.

    Parameters
    ----------
    history : History or DataFrame
        At least one monitored step. The band needs ``sampling`` and, for shuffled batches, ``dataset_size``.
    context : {"paper", "slide"}
    """
    with _figure(context, 2.5) as figure:
        figure.set_figheight(figure.get_figheight() + _prediction_panels(figure, history))
    return figure


def forces_figure(history: History | pd.DataFrame, context: str = "paper") -> Figure:
    """What drift, noise curvature and noise have added to log K so far, stacked; the black line is what it did.

    At every step the areas above zero add up, and those below; their difference is the line. Steps without noise
    terms go to the rest as a whole, and the label counts them.

    Parameters
    ----------
    history : History or DataFrame
        At least one monitored step; a monitored step stands for all up to the next.
    context : {"paper", "slide"}

    Examples
    --------
    >>> row = {"layer": "fc", "lr": 0.1, "batch": 4, "mu": 1.0, "kappa": 0.5, "lambda_sq": 0.4, "dz": 0.2}
    >>> rows = [row | {"step": k, "z": k / 5, "layer": name} for k in (0, 1) for name in ("fc", "network")]
    >>> axes = forces_figure(History(rows)).get_axes()[0]
    >>> [float(round(y, 12)) for y in axes.get_lines()[-1].get_ydata()]
    [0.0, 0.2, 0.4]
    """
    step, added, unknown = _contributions(history)
    with _figure(context, 3.0) as figure:
        axes = figure.subplots()
        above, below = np.zeros(len(step)), np.zeros(len(step))
        for (name, (color, hatch)), values in zip(FORCES.items(), added, strict=True):
            label = name + (f"\n(and {unknown} steps without noise terms)" if unknown and name == REST else "")
            up, down = np.maximum(values, 0.0), np.minimum(values, 0.0)
            style: dict[str, Any] = {"facecolor": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.0}
            axes.fill_between(step, above, above + up, label=label, **style)
            axes.fill_between(step, below, below + down, **style)
            above, below = above + up, below + down
        axes.axhline(0.0, color=BLACK, linewidth=0.5)
        axes.plot(step, added.sum(0), color=BLACK, label="observed")
        axes.set(xlabel="optimiser step", ylabel="added to log K  (nats)", title="What moved the Lipschitz bound")
        axes.margins(x=0)
        figure.legend(loc="outside right center")
    return figure


def heatmap_figure(history: History | pd.DataFrame, context: str = "paper") -> Figure:
    """Layers against time: change of log sigma since the start, drift, and noise; grey where nothing is known.

    Values are means over up to 200 stretches of time. Colours of signed quantities are symmetric about zero and
    end at the largest value but 2 per cent. Those of the noise are logarithmic, and white where there is none, of a
    frozen layer say.

    Parameters
    ----------
    history : History or DataFrame
        At least one monitored step.
    context : {"paper", "slide"}
    """
    frame = measured(history)
    layers = [name for name in frame["layer"].unique() if name != NETWORK]
    tables = {column: _by_layer(frame, column, layers) for column in ("z", "mu", "lambda_sq")}
    start = np.isfinite(tables["z"]).argmax(axis=1)  # a layer that is zero at first has no logarithm
    tables["z"] = tables["z"] - np.take_along_axis(tables["z"], start[:, None], axis=1)
    titles = ["change of log sigma  (nats)", "drift $\\mu$", "noise $\\lambda^2$"]
    step = np.unique(frame["step"].to_numpy(int))
    edges = np.unique(np.linspace(0, len(step), min(200, len(step)) + 1).astype(int))
    times = np.append(step, step[-1] + 1)[edges]
    with _figure(context, min(8.0, 1.2 + 3 * max(0.55, 0.14 * len(layers)))) as figure:
        panels = figure.subplots(3, 1, sharex=True, squeeze=False)[:, 0]
        for axes, title, (column, table) in zip(panels, titles, tables.items(), strict=True):
            mean = _means_between(table, edges)
            signed = column != "lambda_sq"
            cells = (times, np.arange(len(layers) + 1))
            mesh = axes.pcolormesh(*cells, mean, rasterized=True, **_colours(mean, signed))
            if not signed and (mean == 0.0).any():  # which a logarithmic scale leaves out like the unknown
                none = np.where(mean == 0.0, 0.0, np.nan)
                axes.pcolormesh(*cells, none, rasterized=True, cmap="binary", vmin=0.0, vmax=1.0)
                title += "  (white: none)"
            axes.set_facecolor("#999999")
            axes.set(title=title)
            every = -(-len(layers) // 24)
            axes.set_yticks(np.arange(len(layers))[::every] + 0.5, _shortened(layers)[::every])
            axes.invert_yaxis()
            axes.tick_params(axis="y", length=0)
            figure.colorbar(mesh, ax=axes, pad=0.01, aspect=12)
        panels[-1].set_xlabel("optimiser step")
    return figure


def validity_figure(history: History | pd.DataFrame, context: str = "paper") -> Figure:
    """Gap of every layer, and eps: where eps is above 1, expansions in the step have no certificate.

    Parameters
    ----------
    history : History or DataFrame
        At least one monitored step.
    context : {"paper", "slide"}
    """
    frame = measured(history)
    with _figure(context, 2.75) as figure:
        left, right = figure.subplots(1, 2)
        for axes, column in ((left, "gap"), (right, "eps")):
            for name, color, dash in _layer_styles(frame):
                rows = frame[frame["layer"] == name]
                values = rows[column].to_numpy(float)
                positive = np.where(values > 0, values, np.nan)
                _curve(axes, rows["step"], positive, color=color, linestyle=dash, label=_label(name))
            _span(axes, frame["step"])
            axes.set_yscale("log")
            axes.set_xlabel("optimiser step")
        left.set(title="isolation of the largest singular value", ylabel="gap $d$  (unit of the weights)")
        right.set(title="validity of expansions", ylabel="$\\epsilon = 2\\,\\|D\\|_2 / d$")
        low, high = right.get_ylim()
        high = max(high, 3.0)
        top = high * (high / low) ** WORDS  # a strip above the curves and the line at 1
        right.set_ylim(low, top)
        right.axhspan(1.0, top, color=VERMILION, alpha=0.15, linewidth=0)
        right.axhline(1.0, color=VERMILION, linewidth=0.8)
        right.text(0.98, 0.98, "no certificate", transform=right.transAxes, ha="right", va="top", color="#A04000")
        figure.set_figheight(figure.get_figheight() + _legend_below(figure, *_layer_entries(left)))
    return figure


def split_figure(history: History | pd.DataFrame, context: str = "paper") -> Figure:
    """Noise curvature and noise of the network, and the parts from variances and from covariances of the gradient.

    The covariance part has a sign: it is what correlations between weights, and between layers, add or take away.
    Curves are moving averages over what is known.

    Parameters
    ----------
    history : History or DataFrame
        Measured with ``noise="split"``.
    context : {"paper", "slide"}

    Raises
    ------
    ValueError
        The parts were not measured.
    """
    frame = measured(history)
    if "kappa_var" not in frame:
        raise ValueError(
            "expected a history with variance and covariance parts, got one without; monitor with noise='split'"
        )
    rows = frame[frame["layer"] == NETWORK]
    window = _window(frame)
    styles = {"": (BLACK, "-", "all"), "_var": (BLUE, "--", "variances"), "_cov": (VERMILION, "-.", "covariances")}
    with _figure(context, 2.55) as figure:
        panels = figure.subplots(1, 2)
        for axes, column in zip(panels, ("kappa", "lambda_sq"), strict=True):
            title, unit = RATES[column]
            for part, (color, dash, label) in styles.items():
                at, values = _smoothed(rows, column + part, window)
                _curve(axes, at, values, color=color, linestyle=dash, label=label)
                if part:
                    axes.fill_between(at, 0.0, values, color=color, alpha=0.12, linewidth=0)
            _span(axes, rows["step"])
            axes.set(xlabel="optimiser step", ylabel=unit, title=title)
            if rows[[column + part for part in styles]].notna().to_numpy().any():
                axes.axhline(0.0, color=BLACK, linewidth=0.5)
            else:
                _not_known(axes)
        panels[0].set_ylabel(_rate(window))
        figure.set_figheight(figure.get_figheight() + _legend_below(figure, *panels[0].get_legend_handles_labels()))
    return figure


def log_k_panel(axes: Axes, history: History | pd.DataFrame, predictions: list[Prediction]) -> None:
    """Observed log K against the predictions, with the band of the SDE, which has a label where it can be seen."""
    import matplotlib as mpl

    step, z = observed(history)
    _curve(
        axes,
        step,
        z,
        color=BLACK,
        linewidth=2.2 * mpl.rcParams["lines.linewidth"],
        alpha=0.35,
        label="observed",
        solid_capstyle="butt",
    )
    for prediction, (color, dash) in zip(predictions, PREDICTOR_STYLES, strict=False):
        _curve(axes, prediction.step, prediction.predicted, color=color, linestyle=dash, label=prediction.name)
        if prediction.name == SDE and np.isfinite(prediction.half_width).all():
            low, high = (prediction.predicted + sign * prediction.half_width for sign in (-1, 1))
            seen = prediction.half_width.max() > 0.02 * np.ptp(np.concatenate([z, low, high]))  # wider than a line
            label = "SDE $\\pm$ 1 sd over batches" if seen else None
            axes.fill_between(prediction.step, low, high, color=color, alpha=0.25, linewidth=0, label=label)
    axes.set(xlabel="optimiser step", ylabel="log K  (nats)", title="Lipschitz bound of the network")


def error_panel(axes: Axes, predictions: list[Prediction]) -> None:
    """Absolute errors of the predictions, and the width of the SDE's band, on a logarithmic axis.

    The band is the spread over batches and no bound of the error: that is what the SDE leaves out of a finite step.
    """
    import matplotlib as mpl

    for prediction, (color, dash) in zip(predictions, PREDICTOR_STYLES, strict=False):
        error = np.abs(prediction.error)
        label = f"{SDE}\n(no curvature along it)" if prediction.name == SDE else prediction.name
        _curve(axes, prediction.step[1:], error[1:], color=color, linestyle=dash, label=label)
        _span(axes, prediction.step)
        if prediction.name == SDE and np.isfinite(prediction.half_width).all():
            sd = np.where(prediction.half_width > 0, prediction.half_width, np.nan)
            style: dict[str, Any] = {"color": color, "alpha": 0.18}
            axes.fill_between(prediction.step, sd, linewidth=0, label="SDE, 1 sd over batches", **style)
            bars = _alone(sd)
            axes.vlines(prediction.step[bars], 0.0, sd[bars], linewidth=mpl.rcParams["lines.markersize"], **style)
    top = max((float(np.nanmax(np.abs(p.error), initial=0.0)) for p in predictions), default=0.0)
    if top > 0.0:
        axes.set_yscale("log")
        axes.set_ylim(1e-9 * top, 10 * top)  # below that is rounding
    axes.set(xlabel="optimiser step", ylabel="|predicted - observed|  (nats)", title="Error of the predictors")


def force_panels(panels: list[Axes], history: History | pd.DataFrame) -> None:
    """Drift, noise curvature and noise of each layer in three panels, as moving averages over what is known."""
    frame = measured(history)
    window = _window(frame)
    for axes, (column, (title, unit)) in zip(panels, RATES.items(), strict=True):
        for name, color, dash in _layer_styles(frame):
            rows = frame[frame["layer"] == name]
            _curve(axes, *_smoothed(rows, column, window), color=color, linestyle=dash, label=_label(name))
        _span(axes, frame["step"])
        axes.set(xlabel="optimiser step", ylabel=unit, title=title)
        known = frame[column].to_numpy(float)
        if not np.isfinite(known).any():
            _not_known(axes)
        elif column == "mu":
            axes.axhline(0.0, color=BLACK, linewidth=0.5)
        elif np.nansum(known) > 0:
            axes.set_yscale("log")
    panels[0].set_ylabel(_rate(window))


def _prediction_panels(figure: Any, history: History | pd.DataFrame) -> float:
    """`log_k_panel` and `error_panel` side by side over one legend, whose height in inches is returned."""
    left, right = figure.subplots(1, 2)
    predictions = _predictions(history)
    log_k_panel(left, history, predictions)
    error_panel(right, predictions)
    (first, *_), (observed_label, *_) = left.get_legend_handles_labels()
    handles, labels = right.get_legend_handles_labels()  # which say more of the same curves
    return _legend_below(figure, [first, *handles], [observed_label, *labels])


def _predictions(history: History | pd.DataFrame) -> list[Prediction]:
    """Those the history allows: the SDE always, the path where every step was monitored."""
    predictions = [sde(history)]
    step, _ = observed(history)
    if np.all(np.diff(step) == 1):
        predictions += [pathwise(history, order=2), pathwise(history, order=3)]
    return predictions


def _contributions(history: History | pd.DataFrame) -> tuple[NDArray, NDArray, int]:
    """Steps (n + 1,), what each of `FORCES` has added by then (4, n + 1), and the number of steps without terms."""
    frame = from_known(measured(history))
    rows = frame[frame["layer"] == NETWORK]
    step, z = observed(frame)
    m, c, _ = step_increments(rows["lr"], rows["mu"], rows["kappa"], rows["lambda_sq"])
    layers = frame[frame["layer"] != NETWORK]
    v = (layers["lr"] * layers["lambda_sq"]).groupby(layers["step"], sort=True).agg(lambda x: x.sum(skipna=False))
    forces = np.stack([m, c, -v.to_numpy(float) / 2]) * np.append(np.diff(step[:-1]), 1)
    unknown = ~np.isfinite(forces).all(0)
    forces = np.where(unknown, 0.0, forces)
    added = np.concatenate([np.zeros((3, 1)), np.cumsum(forces, axis=1)], axis=1)
    return step, np.concatenate([added, [z - z[0] - added.sum(0)]]), int(unknown.sum())


def _by_layer(frame: pd.DataFrame, column: str, layers: list[str]) -> NDArray[np.float64]:
    """A column as (layers, monitored steps), NaN where a row is missing."""
    table = frame.pivot_table(index="layer", columns="step", values=column, dropna=False)
    return table.reindex(index=layers, columns=np.unique(frame["step"])).to_numpy(float)


def _means_between(table: NDArray[np.float64], edges: NDArray[np.int64]) -> NDArray[np.float64]:
    """Means over the columns between successive edges; NaN where nothing is known."""
    known = np.isfinite(table)
    sums = np.add.reduceat(np.where(known, table, 0.0), edges[:-1], axis=1)
    counts = np.add.reduceat(known, edges[:-1], axis=1, dtype=float)
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _colours(values: NDArray[np.float64], signed: bool) -> dict[str, Any]:
    """Two hues about zero for signed values, one logarithmic scale for others."""
    from matplotlib.colors import LogNorm

    known = values[np.isfinite(values)]
    if signed:
        end = float(np.quantile(np.abs(known), 0.98)) if known.size else 1.0
        return {"cmap": "PuOr", "vmin": -(end or 1.0), "vmax": end or 1.0}
    positive = known[known > 0]
    low, high = np.quantile(positive, [0.02, 1.0]) if positive.size else (0.1, 1.0)
    return {"cmap": "cividis", "norm": LogNorm(low, high)}


def _layer_styles(frame: pd.DataFrame) -> Iterator[tuple[str, str, Any]]:
    """Name, colour and dash pattern of each layer; those without a style of their own come first, below the others."""
    layers = [name for name in frame["layer"].unique() if name != NETWORK]
    for name in layers[NAMED:]:
        yield name, *OTHERS
    for index, name in enumerate(layers[:NAMED]):
        yield name, COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]


def _layer_entries(axes: Axes) -> tuple[list[Any], list[str]]:
    """Handles and labels for a legend of the layers' curves."""
    handles, labels = axes.get_legend_handles_labels()
    others = max(0, len(labels) - NAMED)  # which come first
    rest = [f"and {others} more"] if others else []
    return [*handles[others:], *handles[: len(rest)]], [*_shortened(labels[others:]), *rest]


def _legend_below(figure: Any, handles: list[Any], labels: list[str]) -> float:
    """One legend for all panels, in as many columns as the width has room for; its height in inches."""
    for columns in range(min(7, len(labels)), 0, -1):
        balanced = -(-len(labels) // -(-len(labels) // columns))
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=balanced, handlelength=3)
        box = legend.get_window_extent()
        if box.width < 0.98 * figure.bbox.width or columns == 1:
            break
        legend.remove()
    return float(box.height / figure.dpi)


def _shortened(names: list[str]) -> list[str]:
    """The names; if one is longer than `LONGEST`, without the modules they share and without their middles, distinct.

    Examples
    --------
    >>> _shortened(["conv1", "fc"])
    ['conv1', 'fc']
    >>> _shortened([f"model.language_model.layers.10.attention.{part}_proj" for part in "qk"])
    ['…q_proj', '…k_proj']
    >>> _shortened(["head", *(f"encoder_block_{part}_self_attention_projection" for part in (10, 20))])
    ['head', 'encoder_block_10…tion_projection', 'encoder_block_20…tion_projection']
    """
    if max(map(len, names), default=0) <= LONGEST:
        return names
    modules = zip(*(name.split(".")[:-1] for name in names), strict=False)
    if shared := sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, modules)):
        names = [ELLIPSIS + ".".join(name.split(".")[shared:]) for name in names]
    for length in range(LONGEST, max(map(len, names))):
        for start in sorted(range(length), key=lambda start: abs(2 * start - length)):  # from the middle outwards
            end = length - 1 - start
            cut = [n if len(n) <= length else f"{n[:start]}{ELLIPSIS}{n[len(n) - end :]}" for n in names]
            if len(set(cut)) == len(names):
                return cut
    return names


def _label(name: str) -> str:
    """A layer's name for the legend, from which Matplotlib leaves out what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _rate(window: int) -> str:
    """The label of an axis of moving averages, whose first windows are not full."""
    return f"nats per unit time (step = lr),\nmean of \N{LESS-THAN OR EQUAL TO} {window} monitored steps"


def _curve(axes: Axes, x: Any, y: NDArray[np.float64], **style: Any) -> None:
    """A line, with a marker at every known point that has no known neighbour and so no line."""
    alone = _alone(y).tolist()
    axes.plot(x, y, **style, **({"marker": "o", "markevery": alone} if alone else {}))


def _alone(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Where a known value stands between unknown ones."""
    known = np.pad(np.isfinite(values), 1)
    return np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:])


def _span(axes: Axes, step: Any) -> None:
    """All these steps on the axis: what is unknown at either end is a gap too."""
    axes.update_datalim([(np.min(step), 0.0), (np.max(step), 0.0)], updatey=False)


def _not_known(axes: Axes) -> None:
    """Say so where a panel has nothing to show."""
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, "not known:\nsee status", transform=axes.transAxes, ha="center", va="center")


def _smoothed(rows: pd.DataFrame, column: str, window: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Step and value as means over the known values of each row and those before it; NaN where none is known.

    Up to ``window`` rows are taken together. One unknown step would otherwise empty all the windows it lies in.
    """
    values = rows[column].to_numpy(float)
    known = np.isfinite(values)
    table = np.where(known, [np.ones(len(rows)), rows["step"].to_numpy(float), values], 0.0).T
    # Not from differences of running sums: small values after large ones would be lost on a logarithmic axis.
    count, *sums = sliding_window_view(np.pad(table, ((window - 1, 0), (0, 0))), window, axis=0).sum(-1).T
    at, mean = np.divide(sums, count, out=np.full_like(sums, np.nan), where=count > 0)
    return at, mean


def _window(frame: pd.DataFrame) -> int:
    return max(1, frame["step"].nunique() // 40)
