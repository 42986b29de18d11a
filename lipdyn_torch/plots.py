"""Figures from a history: sized for a page of text, safe for colour-blind readers.

Curves are told apart by dash pattern and label as well as by colour. Nothing here touches pyplot's global state:
a `Figure` is returned, to be shown by a notebook or saved with ``figure.savefig(path)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lipdyn_torch.history import NETWORK, History
from lipdyn_torch.predict import SDE, Prediction, observed, pathwise, sde

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["error_panel", "force_panels", "log_k_panel", "summary_figure"]

# Okabe and Ito's palette, without yellow, which is too pale for lines.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"),
)
LAYER_STYLES = [
    *[(BLUE, "-"), (VERMILION, "--"), (GREEN, "-."), (PURPLE, (0, (5, 1, 1, 1, 1, 1))), (SKY, (0, (1, 1)))],
    *[(ORANGE, "-"), (BLACK, "--")],
]
PREDICTOR_STYLES = [(VERMILION, "--"), (BLUE, "-."), (GREEN, (0, (1, 1)))]
RC: dict[Any, Any] = {
    **{"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7},
    **{"xtick.labelsize": 7, "ytick.labelsize": 7, "lines.linewidth": 1.2, "axes.linewidth": 0.6},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
}


def summary_figure(history: History | pd.DataFrame) -> Figure:
    """The run in one figure, 7 inches wide.

    Above, log K as observed and predicted, and the predictors' errors; below, drift, noise curvature and noise
    of every layer.

    Parameters
    ----------
    history : History or DataFrame
        At least two monitored steps.

    Examples
    --------
    >>> row = {"lr": 0.1, "batch": 4, "mu": 1.0, "kappa": 0.1, "lambda_sq": 0.2, "dz": 0.1, "dz2": 0.1, "dz3": 0.1}
    >>> rows = [row | {"step": k, "layer": name, "z": k / 10} for k in (0, 1) for name in ("fc", "network")]
    >>> figure = summary_figure(History(rows))
    >>> [axes.get_title() for axes in figure.get_axes()[:2]]
    ['Lipschitz bound of the network', 'Error of the predictors']
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(RC):
        figure = Figure(figsize=(7.0, 5.0), layout="constrained")
        parts = np.asarray(figure.subfigures(2, 1, height_ratios=[1.0, 1.05]))
        upper, lower = parts[0], parts[1]
        left, right = upper.subplots(1, 2)
        predictions = _predictions(history)
        log_k_panel(left, history, predictions)
        error_panel(right, predictions)
        force_panels(list(lower.subplots(1, 3)), history)
        handles, labels = lower.axes[0].get_legend_handles_labels()
        lower.legend(handles, labels, loc="outside lower center", ncols=min(7, len(labels)), handlelength=3)
    return figure


def log_k_panel(axes: Axes, history: History | pd.DataFrame, predictions: list[Prediction]) -> None:
    """Observed log K against the predictions, with the band of the SDE."""
    step, z = observed(history)
    axes.plot(step, z, color=BLACK, linewidth=2.6, alpha=0.35, label="observed", solid_capstyle="butt")
    for prediction, (color, dash) in zip(predictions, PREDICTOR_STYLES, strict=False):
        axes.plot(prediction.step, prediction.predicted, color=color, linestyle=dash, label=prediction.name)
        if prediction.name == SDE and np.isfinite(prediction.half_width).all():
            low, high = (prediction.predicted + sign * prediction.half_width for sign in (-1, 1))
            label = "SDE $\\pm$ 1 sd over batches"
            axes.fill_between(prediction.step, low, high, color=color, alpha=0.25, linewidth=0, label=label)
    axes.set(xlabel="optimiser step", ylabel="log K  (nats)", title="Lipschitz bound of the network")
    axes.legend(loc="best")


def error_panel(axes: Axes, predictions: list[Prediction]) -> None:
    """Absolute errors of the predictions, and the width of the SDE's band, on a logarithmic axis."""
    for prediction, (color, dash) in zip(predictions, PREDICTOR_STYLES, strict=False):
        error = np.abs(prediction.error)
        axes.semilogy(prediction.step[1:], error[1:], color=color, linestyle=dash, label=prediction.name)
        if prediction.name == SDE and np.isfinite(prediction.half_width).all():
            sd = np.where(prediction.half_width > 0, prediction.half_width, np.nan)
            axes.fill_between(prediction.step, sd, color=color, alpha=0.18, linewidth=0, label="SDE, 1 sd")
    top = max((float(np.nanmax(np.abs(p.error), initial=0.0)) for p in predictions), default=0.0)
    if top > 0.0:
        axes.set_ylim(1e-9 * top, 10 * top)  # below that is rounding
    axes.set(xlabel="optimiser step", ylabel="|predicted - observed|  (nats)", title="Error of the predictors")
    axes.legend(loc="best")


def force_panels(panels: list[Axes], history: History | pd.DataFrame) -> None:
    """Drift, noise curvature and noise of each layer in three panels, as moving averages."""
    frame = history.to_pandas() if isinstance(history, History) else history
    titles = {
        "mu": "drift $\\mu$",
        "kappa": "noise curvature $\\kappa$",
        "lambda_sq": "noise $\\lambda^2$",
    }
    layers = [name for name in frame["layer"].unique() if name != NETWORK]
    window = max(1, frame["step"].nunique() // 40)
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for index, name in enumerate(layers):
            rows = frame[frame["layer"] == name]
            color, dash = LAYER_STYLES[index % len(LAYER_STYLES)]
            mean = _moving_average(rows[column].to_numpy(float), window)
            at = _moving_average(rows["step"].to_numpy(float), window)
            axes.plot(at, mean, color=color, linestyle=dash, label=name)
        axes.set(xlabel="optimiser step", title=title)
        if column != "mu" and np.nansum(frame[column].to_numpy(float)) > 0:
            axes.set_yscale("log")
    panels[0].axhline(0.0, color=BLACK, linewidth=0.5)
    panels[0].set_ylabel(f"per unit time (one step = lr),\nmean of {window} steps")


def _predictions(history: History | pd.DataFrame) -> list[Prediction]:
    """Those the history allows: the SDE always, the path where every step was monitored."""
    predictions = [sde(history)]
    step, _ = observed(history)
    if np.all(np.diff(step) == 1):
        predictions += [pathwise(history, order=2), pathwise(history, order=3)]
    return predictions


def _moving_average(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    return np.convolve(values, np.full(window, 1.0 / window), mode="valid") if len(values) >= window else values
