"""Predicted curves of log sigma and log K, to be laid over the observed one (theory 2.7).

`pathwise` expands sigma along the update the optimiser really made: it is right for every optimiser and needs no
noise at all. `sde` adds up drift, noise curvature and Ito term as the stochastic differential equation has them;
its drift comes from the batches that made the steps, so it is an expansion of the realised path and not a
forecast, and its band is the spread over other draws of the batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lipdyn_torch.dynamics import bridge_variance, diffusion_variance, mean_z, step_increments
from lipdyn_torch.history import NETWORK, History

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SDE", "Prediction", "observed", "pathwise", "sde"]


#: The drift comes from the batches that made the steps, and the name says so (theory 2.7).
SDE = "SDE, batch gradient"


@dataclass(frozen=True)
class Prediction:
    """A predicted curve beside the observed one; entry j belongs to the state after j monitored steps.

    Attributes
    ----------
    name : str
    step : array (n + 1,)
        Number of optimiser steps taken.
    predicted, observed : array (n + 1,)
        log K, or log sigma of one layer (natural logarithm, dimensionless).
    half_width : array (n + 1,)
        Half the band's width in the same unit: one standard deviation for `sde`, the certified bound of the
        error for `pathwise` (infinite once a step was longer than the certificate reaches); NaN where unknown.
    """

    name: str
    step: NDArray[np.int64]
    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    half_width: NDArray[np.float64]

    @property
    def error(self) -> NDArray[np.float64]:
        """Predicted minus observed."""
        return self.predicted - self.observed

    @property
    def max_error(self) -> float:
        """Largest absolute error over the run; NaN if any is."""
        return float(np.max(np.abs(self.error)))

    @property
    def final_error(self) -> float:
        """Signed error at the end of the run."""
        return float(self.error[-1])


def observed(history: History | pd.DataFrame, layer: str = NETWORK) -> tuple[NDArray, NDArray]:
    """Steps (n + 1,) and observed log K (or log sigma of a layer) at them."""
    rows = _rows(history, layer)
    z, dz = rows["z"].to_numpy(float), rows["dz"].to_numpy(float)
    return _step_axis(rows), np.append(z, z[-1] + dz[-1])


def pathwise(history: History | pd.DataFrame, order: int = 2, layer: str = NETWORK) -> Prediction:
    """Sum of the changes of log sigma to the given order along the actual updates (theory 2.7).

    Parameters
    ----------
    order : {1, 2, 3}
    layer : str
        A layer's name, or "network" for log K.

    Raises
    ------
    ValueError
        Steps are missing (``every > 1``): what happened in them is not known.

    Examples
    --------
    >>> row = {"step": 0, "layer": "network", "z": 1.0, "dz": 0.10, "dz2": 0.11}
    >>> pathwise(History([row])).predicted.tolist()
    [1.0, 1.11]
    """
    if order not in (1, 2, 3):
        raise ValueError(f"expected order 1, 2 or 3, got {order!r}; higher orders are not recorded")
    rows = _rows(history, layer)
    step, z = observed(history, layer)
    if np.any(np.diff(step) != 1):
        raise ValueError(
            f"expected every step, got steps {step[0]} to {step[-1]} with gaps; monitor with every=1 to sum changes"
        )
    changes = rows[f"dz{order}"].to_numpy(float)
    predicted = z[0] + np.concatenate([[0.0], np.cumsum(changes)])
    return Prediction(f"pathwise, order {order}", step, predicted, z, _certificate(history, order, layer))


def sde(
    history: History | pd.DataFrame,
    layer: str = NETWORK,
    *,
    sampling: str | None = None,
    dataset_size: int | None = None,
) -> Prediction:
    """``Z_0 + sum [m + c - v/2]`` with the batch mean as gradient (theory 2.2, "sde/batch" of 2.7).

    On steps that were not monitored the terms of the last monitored one are kept.

    Parameters
    ----------
    sampling : {"iid", "shuffle"}, optional
        How batches are drawn; decides the band (theory 2.10). Default: what the monitor was told.
    dataset_size : int, optional
        Number of samples of an epoch, needed for the band with "shuffle"; without it the band is NaN.

    Examples
    --------
    >>> row = {"layer": "network", "lr": 0.1, "batch": 4, "kappa": 0.5, "dz": 0.15, "status": "ok"}
    >>> layer = {**row, "step": 0, "layer": "0", "z": 1.0, "mu": 1.0, "lambda_sq": 0.4}
    >>> network = {**layer, "layer": "network"}
    >>> prediction = sde(History([layer, network]), sampling="iid")
    >>> prediction.predicted.tolist(), prediction.half_width.tolist()
    ([1.0, 1.13], [0.0, 0.2])
    """
    frame = _frame(history)
    sampling = sampling or frame.attrs.get("sampling", "shuffle")
    dataset_size = dataset_size or frame.attrs.get("dataset_size")
    if sampling not in ("iid", "shuffle"):
        raise ValueError(f"expected sampling 'iid' or 'shuffle', got {sampling!r}")
    rows = _rows(history, layer)
    step, z = observed(history, layer)
    # A monitored step stands for all steps up to the next monitored one.
    repeat = np.append(np.diff(step[:-1]), 1)
    m, c, v = step_increments(rows["lr"], rows["mu"], rows["kappa"], rows["lambda_sq"])
    v_layers = _sum_of_layer_variances(frame) if layer == NETWORK else v
    m, c, v, v_layers = (np.repeat(a, repeat) for a in (m, c, v, v_layers))
    states = np.append(0, np.cumsum(repeat))
    if sampling == "iid":
        variance = diffusion_variance(v)
    elif dataset_size is None:
        variance = np.full(len(v) + 1, np.nan)
    else:
        variance = bridge_variance(v, np.repeat(rows["batch"].to_numpy(float), repeat), dataset_size)
    predicted = mean_z(float(z[0]), m, c, v_layers)[states]
    return Prediction(SDE, step, predicted, z, np.sqrt(variance)[states])


def _sum_of_layer_variances(frame: pd.DataFrame) -> NDArray[np.float64]:
    layers = frame[frame["layer"] != NETWORK]
    v = layers["lr"] * layers["lambda_sq"]
    sums = v.groupby(layers["step"], sort=True).agg(lambda x: x.sum(skipna=False))
    return np.asarray(sums, dtype=np.float64)


def _certificate(history: History | pd.DataFrame, order: int, layer: str) -> NDArray[np.float64]:
    """Cumulative certified bound of the error of log sigma (theory 1.9): summed over steps, and over layers."""
    frame = _frame(history)
    layers = frame[frame["layer"] != NETWORK] if layer == NETWORK else _rows(history, layer)
    steps = np.unique(frame["step"].to_numpy(int))
    if len(layers) == 0:
        return np.full(len(steps) + 1, np.nan)
    eps, gap, sigma = (layers[name].to_numpy(float) for name in ("eps", "gap", "sigma"))
    estimate = sigma * np.exp(layers[f"dz{order}"].to_numpy(float))
    with np.errstate(divide="ignore", invalid="ignore"):
        remainder = gap / 2 * eps ** (order + 1) / (1 - eps)
        bound = -np.log1p(-remainder / estimate)  # the truth is at least estimate - remainder
    bound = np.where((eps < 1) & (remainder < estimate), bound, np.where(np.isnan(eps), np.nan, np.inf))
    per_step = [bound[layers["step"].to_numpy(int) == step].sum() for step in steps]
    return np.concatenate([[0.0], np.cumsum(per_step)])


def _frame(history: History | pd.DataFrame) -> pd.DataFrame:
    return history.to_pandas() if isinstance(history, History) else history


def _rows(history: History | pd.DataFrame, layer: str) -> pd.DataFrame:
    frame = _frame(history)
    rows = frame[frame["layer"] == layer]
    if len(rows) == 0:
        names = ", ".join(map(repr, frame["layer"].unique())) or "no rows at all"
        raise ValueError(f"expected a layer of the history, got {layer!r}; there are {names}")
    return rows


def _step_axis(rows: pd.DataFrame) -> NDArray[np.int64]:
    step = rows["step"].to_numpy(np.int64)
    return np.append(step, step[-1] + 1)
