"""Predicted curves of log sigma and log K, to be laid over the observed one (theory 2.7).

`pathwise` expands sigma along the update the optimiser really made: it is right for every optimiser and needs no
noise at all. `sde` adds up drift, noise curvature and Ito term as the stochastic differential equation has them;
its drift comes from the batches that made the steps, so it is an expansion of the realised path and not a
forecast, and its band is the spread over other draws of the batches. With a reference gradient (of all data, or
of independent batches) it is a prediction at the visited weights. `forecast` freezes the terms and looks ahead.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lipdyn_torch._settings import check_dataset_size
from lipdyn_torch.dynamics import (
    bridge_variance,
    diffusion_variance,
    discrete_increments,
    epoch_means,
    log_sd_k,
    mean_z,
    step_increments,
)
from lipdyn_torch.history import NETWORK, History, as_frame

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "SDE",
    "Moments",
    "Prediction",
    "forecast",
    "from_known",
    "increments",
    "measured",
    "moments",
    "observed",
    "pathwise",
    "sde",
]


#: Where the drift comes from, the name says (theory 2.7).
SDE = "SDE, batch gradient"
NO_SIZE = (
    "expected dataset_size for the band of epochs in shuffled order, got None: the band is NaN; give it to the monitor "
    "(or here), or say sampling='iid'"
)


@dataclass(frozen=True)
class Prediction:
    """A predicted curve beside the observed one; entry j belongs to the state after j monitored steps.

    Attributes
    ----------
    name : str
    step : array (n + 1,)
        Number of optimiser steps taken.
    predicted, observed : array (n + 1,)
        log K, or log sigma of one layer (natural logarithm: nats).
    half_width : array (n + 1,)
        Half the band's width in the same unit: one standard deviation for `sde` and `forecast`, the certified bound
        of the error for `pathwise` (infinite once a step was longer than the certificate reaches); NaN where unknown.
    observed_steps : int
        For `pathwise`: how many steps were so long beside the gaps that no expansion was made, and the observed change
        of a layer stands in for the predicted one (mode "exact"). The errors of these are zero by construction.
    """

    name: str
    step: NDArray[np.int64]
    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    half_width: NDArray[np.float64]
    observed_steps: int = 0

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
    """Steps (n + 1,) and observed log K (or log sigma of a layer) at them, from the first at which it is known."""
    rows = _rows(from_known(history, layer), layer)
    z, dz = rows["z"].to_numpy(float), rows["dz"].to_numpy(float)
    return _step_axis(rows), np.append(z, z[-1] + dz[-1])


def pathwise(history: History | pd.DataFrame, order: int = 2, layer: str = NETWORK) -> Prediction:
    """Sum of the changes of log sigma to the given order along the actual updates (theory 2.7).

    What else happens to the weights between two steps (clipping them, say) is taken as observed.

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
    if isinstance(order, bool) or order not in (1, 2, 3):
        raise ValueError(f"expected order 1, 2 or 3, got {order!r}; higher orders are not recorded")
    history = from_known(history, layer)
    rows = _rows(history, layer)
    step, z = observed(history, layer)
    if np.any(np.diff(step) != 1):
        raise ValueError(
            f"expected every step, got steps {step[0]} to {step[-1]} with gaps; monitor with every=1 to sum changes"
        )
    changes = rows[f"dz{order}"].to_numpy(float, copy=True)
    between = z[1:-1] - (z[:-2] + rows["dz"].to_numpy(float)[:-1])  # what happened to the weights besides the steps
    changes[:-1] += np.where(np.abs(between) > 1e-9, between, 0.0)
    predicted = z[0] + np.concatenate([[0.0], np.cumsum(changes)])
    exact = int((rows["mode"] == "exact").sum()) if "mode" in rows else 0
    return Prediction(f"pathwise, order {order}", step, predicted, z, _certificate(history, order, layer), exact)


def sde(
    history: History | pd.DataFrame,
    layer: str = NETWORK,
    *,
    gradient: str = "batch",
    sampling: str | None = None,
    dataset_size: int | None = None,
) -> Prediction:
    """``Z_0 + sum [m + c - v/2]`` (theory 2.2), with the gradient of theory 2.7 asked for.

    On steps that were not monitored the terms of the last monitored one are kept.

    Parameters
    ----------
    gradient : {"batch", "full", "independent"}
        The mean of the batch that made the step, so that first-order noise is reproduced; or the reference
        gradient the monitor was given, which must be of that kind. "full" is an unbiased drift and the band its
        error; an "independent" batch, taken to be as large as the training batch, adds its own noise to the band.
    sampling : {"iid", "shuffle"}, optional
        How batches are drawn; decides the band (theory 2.10). Default: what the monitor was told.
    dataset_size : int, optional
        Number of samples of an epoch, at least a batch, needed for the band with "shuffle"; without it the band is NaN,
        with a warning. Default: what the monitor was told.

    Notes
    -----
    Between monitored steps the epochs are counted from the first one on, with batches of the most frequent size. Where
    the data are no multiple of it, the smaller last batch of an epoch is taken to be made use of, as data loaders do
    by themselves, unless a batch of full size was seen in its place. Where other sizes occur, each holds until the
    next monitored step.

    Examples
    --------
    >>> row = {"layer": "network", "lr": 0.1, "batch": 4, "kappa": 0.5, "dz": 0.15, "status": "ok"}
    >>> layer = {**row, "step": 0, "layer": "0", "z": 1.0, "mu": 1.0, "lambda_sq": 0.4}
    >>> network = {**layer, "layer": "network"}
    >>> prediction = sde(History([layer, network]), sampling="iid")
    >>> prediction.predicted.tolist(), prediction.half_width.tolist()
    ([1.0, 1.13], [0.0, 0.2])
    """
    path = _path(_moves(from_known(history, layer)), layer, gradient, sampling, dataset_size)
    step, z = observed(history, layer)
    return Prediction(f"SDE, {gradient} gradient", step, path.mean, z, np.sqrt(path.variance + path.of_reference))


@dataclass(frozen=True)
class Moments:
    """Mean and spread of Z = log K and of K over draws of the batches; entry j is the state after j monitored steps.

    K is log-normal where Z is Gaussian, which needs terms that do not depend on the path (theory 2.5). Logarithms are
    natural.

    Attributes
    ----------
    step : array (n + 1,)
        Number of optimiser steps taken.
    z_mean, z_sd : array (n + 1,)
        Mean and standard deviation of Z.
    log_mean, log_sd : array (n + 1,)
        Logarithms of the mean and of the standard deviation of K.
    """

    step: NDArray[np.int64]
    z_mean: NDArray[np.float64]
    z_sd: NDArray[np.float64]
    log_mean: NDArray[np.float64]
    log_sd: NDArray[np.float64]


def moments(
    history: History | pd.DataFrame,
    layer: str = NETWORK,
    *,
    gradient: str = "full",
    sampling: str | None = None,
    dataset_size: int | None = None,
    independent_layers: bool = False,
) -> Moments:
    """E[K] and Var[K] of the network, or of one layer's sigma, along the run (theory 2.2, 2.9, 2.10).

    Parameters
    ----------
    gradient, sampling, dataset_size
        As in `sde`. The batches that made the steps carry the very noise that is averaged over here: "batch" makes the
        mean of K too large by the factor exp(Var Z / 2) (theory 2.7). An "independent" batch puts noise of its own on
        z_mean and log_mean, which averages out over runs; the spreads are those over the training batches alone.
    independent_layers : bool
        Leave out the covariances between layers, as the paper does.

    Examples
    --------
    >>> row = {"layer": "network", "lr": 0.1, "batch": 4, "kappa": 0.5, "dz": 0.15, "status": "ok"}
    >>> layer = {**row, "step": 0, "layer": "0", "z": 1.0, "mu": 1.0, "lambda_sq": 0.4}
    >>> network = {**layer, "layer": "network", "lambda_sq": 0.6}
    >>> found = moments(History([layer, network]), gradient="batch", sampling="iid")
    >>> found.z_mean.tolist(), [round(x, 12) for x in found.log_mean.tolist()]  # 1 + 0.15 - 0.04/2, and + 0.06/2
    ([1.0, 1.13], [1.0, 1.16])
    """
    path = _path(_moves(from_known(history, layer)), layer, gradient, sampling, dataset_size, independent_layers)
    step, _ = observed(history, layer)
    log_mean = path.mean + path.variance / 2
    return Moments(step, path.mean, np.sqrt(path.variance), log_mean, log_sd_k(log_mean, path.variance))


def increments(history: History | pd.DataFrame, layer: str = NETWORK) -> pd.DataFrame:
    """What each monitored step adds: a table with the columns step, m, c, v, v_independent, d, e (theory 2.2).

    Of the network, ``v`` has the covariances between layers (theory 2.9), ``v_independent`` is the layers' own sum as
    in the paper; d and e are sums over the layers. Of one layer both variances are the same.

    Examples
    --------
    >>> terms = {"step": 0, "lr": 0.1, "mu": 1.0, "kappa": 0.5, "lambda_sq": 0.4, "sigma": 2.0}
    >>> layers = [{**terms, "layer": name, "gHg": 4.0} for name in "01"]
    >>> table = increments(History([*layers, {**terms, "layer": "network", "mu": 2.0, "lambda_sq": 0.6}]))
    >>> [[round(x, 12) for x in row] for row in table.to_numpy().tolist()]
    [[0.0, 0.2, 0.05, 0.06, 0.08, 0.02, 0.02]]
    """
    import pandas as pd

    frame = _moves(history)
    rows = _rows(frame, layer)
    m, c, v = step_increments(rows["lr"], rows["mu"], rows["kappa"], rows["lambda_sq"])
    own = parts_of(frame, layer)
    d, e = discrete_increments(own["lr"], own["mu"], own["gHg"], own["sigma"])
    sums = pd.DataFrame({"step": own["step"].to_numpy(), "d": d, "e": e}).groupby("step", sort=True)
    of_layers = {name: sums[name].agg(lambda x: x.sum(skipna=False)).to_numpy() for name in ("d", "e")}
    independent = _sum_of_layer_variances(frame) if layer == NETWORK else v
    step = rows["step"].to_numpy()
    return pd.DataFrame({"step": step, "m": m, "c": c, "v": v, "v_independent": independent, **of_layers})


class _Path(NamedTuple):
    """Mean and variance of Z at every monitored state, and how far the reference gradient's own noise moves the mean.

    The last is part of the error of a prediction, but not of the spread of Z over draws of the training batches.
    """

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    of_reference: NDArray[np.float64]  # a variance


def _path(
    frame: pd.DataFrame,
    layer: str,
    gradient: str,
    sampling: str | None,
    dataset_size: int | None,
    independent_layers: bool = False,
) -> _Path:
    sampling = frame.attrs.get("sampling", "shuffle") if sampling is None else sampling
    dataset_size = int(dataset_size) if isinstance(dataset_size, np.integer) else dataset_size
    check_dataset_size(dataset_size)
    if not (isinstance(sampling, str) and sampling in ("iid", "shuffle")):
        raise ValueError(f"expected sampling 'iid' or 'shuffle', got {sampling!r}")
    rows = _rows(frame, layer)
    step, z = observed(frame, layer)
    # A monitored step stands for all steps up to the next monitored one.
    repeat = np.append(np.diff(step[:-1]), 1)
    m, c, v = step_increments(rows["lr"], rows[_drift_column(frame, gradient)], rows["kappa"], rows["lambda_sq"])
    v_layers = _sum_of_layer_variances(frame) if layer == NETWORK else v
    if independent_layers:
        v = v_layers
    m, c, v, v_layers = (np.repeat(a, repeat) for a in (m, c, v, v_layers))
    states = np.append(0, np.cumsum(repeat))
    if sampling == "iid":
        variance = diffusion_variance(v)
    elif (size := _epoch_size(frame, rows, dataset_size)) is None:
        variance = np.full(len(v) + 1, np.nan)
    else:
        held = np.repeat(rows["batch"].to_numpy(float), repeat)
        batch = _batches(held, states[:-1], size)
        of_batch = v * np.divide(held, batch, out=np.ones_like(v), where=batch > 0)  # the noise goes with 1/M
        variance = bridge_variance(epoch_means(of_batch, batch, size), batch, size)
    of_reference = diffusion_variance(v if gradient == "independent" else np.zeros_like(v))
    return _Path(mean_z(float(z[0]), m, c, v_layers)[states], variance[states], of_reference[states])


def _epoch_size(frame: pd.DataFrame, rows: pd.DataFrame, given: int | None) -> int | None:
    """Number of samples of an epoch, as given or as the monitor was told; None, with a warning, where unknown."""
    size, largest = frame.attrs.get("dataset_size") if given is None else given, rows["batch"].max()
    if size is None:
        warnings.warn(NO_SIZE, stacklevel=4)
    elif size < largest:
        message = f"expected dataset_size to be at least a batch of {largest:g}, got {size}"
        if given is not None:
            raise ValueError(f"{message}; give the number of samples of an epoch, not of batches")
        warnings.warn(f"{message} by the monitor: the band is NaN; give dataset_size here", stacklevel=4)
        return None
    return size


def _batches(held: NDArray[np.float64], monitored: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    """Batch of every step, from the last monitored one before it: each epoch has one smaller batch, or none."""
    seen = held[monitored]
    sizes, counts = np.unique(seen[seen > 0], return_counts=True)  # frozen layers see no samples
    if len(monitored) == len(held) or len(sizes) == 0:
        return held
    usual = float(sizes[counts == counts.max()][-1])
    last = size % usual
    if last == 0 or not set(sizes) <= {usual, last}:
        return held
    steps = int(size // usual) + 1
    ends = np.arange(len(held)) % steps == steps - 1
    dropped = last not in sizes and bool(np.any(seen[ends[monitored]] == usual))
    batch = np.full(len(held), usual) if dropped else np.where(ends, last, usual)
    batch[monitored] = seen
    return np.where(held == 0, 0.0, batch)


def forecast(
    history: History | pd.DataFrame, at: int, layer: str = NETWORK, *, steps: int | None = None, window: int = 10
) -> Prediction:
    """Freeze mu, kappa and lambda at one step and go on with them: a forecast, with no guarantee (theory 2.7).

    Parameters
    ----------
    at : int
        Optimiser steps taken before the forecast begins; only rows before it are used.
    steps : int, optional
        How far to look ahead, step by step. Default: to the end of the history.
    window : int
        The frozen terms are means over the last so many monitored steps.

    Returns
    -------
    Prediction
        From ``at`` on; ``observed`` is NaN where the history has nothing. The band is that of independent batches.

    Examples
    --------
    >>> terms = {"lr": 0.1, "batch": 4, "mu": 1.0, "kappa": 0.5, "lambda_sq": 1.0, "status": "ok"}
    >>> rows = [
    ...     {**terms, "step": k, "layer": name, "z": 0.1 * k, "dz": 0.1} for k in (0, 1) for name in ("0", "network")
    ... ]
    >>> ahead = forecast(History(rows), at=1, steps=2)
    >>> ahead.name, ahead.step.tolist(), [round(z, 12) for z in ahead.predicted.tolist()]
    ('forecast from step 1', [1, 2, 3], [0.1, 0.2, 0.3])
    """
    for name, value, least in (("at", at, 0), ("steps", 0 if steps is None else steps, 0), ("window", window, 1)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"expected {name} to be a whole number, at least {least}, got {value!r}")
    frame = _moves(from_known(history, layer))
    rows = _rows(frame, layer)
    axis, z = observed(frame, layer)
    past = rows[rows["step"] < at].tail(window)
    if len(past) == 0 or at not in axis:
        raise ValueError(f"expected at to be a monitored step after the first, got {at}; there are {axis[1:].tolist()}")
    m, c, v = (float(np.mean(a)) for a in step_increments(past["lr"], past["mu"], past["kappa"], past["lambda_sq"]))
    v_layers = v
    if layer == NETWORK:
        v_layers = float(np.mean(_sum_of_layer_variances(frame[frame["step"].isin(past["step"])])))
    step = axis[axis >= at] if steps is None else np.arange(at, at + steps + 1)
    known = dict(zip(axis.tolist(), z.tolist(), strict=True))
    ahead = step - at
    predicted = known[at] + (m + c - v_layers / 2) * ahead
    truth = np.array([known.get(s, np.nan) for s in step.tolist()])
    return Prediction(f"forecast from step {at}", step, predicted, truth, np.sqrt(v * ahead))


def _drift_column(frame: pd.DataFrame, gradient: str) -> str:
    """The column that holds the drift of the gradient asked for."""
    if not (isinstance(gradient, str) and gradient in ("batch", "full", "independent")):
        raise ValueError(f"expected gradient 'batch', 'full' or 'independent', got {gradient!r}")
    if gradient == "batch":
        return "mu"
    kind = frame.attrs.get("reference")
    if "mu_ref" not in frame or kind != gradient:
        raise ValueError(
            f"expected a history with the {gradient} gradient, got one with {kind or 'the batch gradient only'}; "
            "give the monitor reference=MeanGradient(...)"
        )
    return "mu_ref"


def _sum_of_layer_variances(frame: pd.DataFrame) -> NDArray[np.float64]:
    layers = parts_of(frame)
    v = layers["lr"] * layers["lambda_sq"]
    sums = v.groupby(layers["step"], sort=True).agg(lambda x: x.sum(skipna=False))
    return np.asarray(sums, dtype=np.float64)


def _certificate(history: History | pd.DataFrame, order: int, layer: str) -> NDArray[np.float64]:
    """Cumulative certified bound of the error of log sigma (theory 1.9): summed over steps, and over layers."""
    frame = as_frame(history)
    steps = _rows(frame, layer)["step"].to_numpy(int)
    if (frame["layer"] == NETWORK).all():
        return np.full(len(steps) + 1, np.nan)
    layers = parts_of(frame, layer)
    bound = layers["bound"].to_numpy(float) if "bound" in layers else np.zeros(len(layers))
    if order != 2 or "bound" not in layers:  # the monitor's own holds for clusters too
        bound = _bound(layers, order, bound)
    per_step = [bound[layers["step"].to_numpy(int) == step].sum() for step in steps]
    return np.concatenate([[0.0], np.cumsum(per_step)])


def _bound(layers: pd.DataFrame, order: int, of_second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bound of the error of log sigma in each step, from the remainder of the series and, for rounding, that of dz2."""
    eps, gap, sigma = (layers[name].to_numpy(float) for name in ("eps", "gap", "sigma"))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        estimate, second = (sigma * np.exp(layers[f"dz{n}"].to_numpy(float)) for n in (order, 2))
        remainder, its = (gap / 2 * eps ** (n + 1) / (1 - eps) for n in (order, 2))
        # the bound of dz2 allows for rounding of singular values of whatever matrix, which only the monitor has seen
        remainder += np.fmax(second * np.expm1(of_second) - its, 0.0)
        bound = -np.log1p(-remainder / estimate)  # the truth is at least estimate - remainder
        bound += 2.0**-50 * (1.0 + np.abs(np.log(sigma)))  # of the logarithms
    return np.where((eps < 1) & (remainder < estimate), bound, np.where(np.isnan(eps), np.nan, np.inf))


def measured(history: History | pd.DataFrame) -> pd.DataFrame:
    """All rows, of which there must be some."""
    frame = as_frame(history)
    if len(frame) == 0:
        raise ValueError("expected a history with rows, got one without any: no step has been measured yet")
    return frame


def parts_of(frame: pd.DataFrame, layer: str = NETWORK) -> pd.DataFrame:
    """The rows of the layers that make up the network, at each of its steps; of one layer its own."""
    rows = _rows(frame, layer)
    if layer != NETWORK:
        return rows
    layers = frame[frame["layer"] != NETWORK]
    steps = rows["step"].to_numpy()
    counts = layers.groupby(["step", "layer"]).size().unstack(fill_value=0).reindex(steps, fill_value=0).to_numpy()
    wrong = [*steps[(counts != 1).any(axis=1)], *layers["step"][~layers["step"].isin(steps)]]
    if len(layers) == 0 or wrong:
        got = "those of the network only" if len(layers) == 0 else f"others at step {wrong[0]}"
        raise ValueError(f"expected a row of each layer at every step, got {got}; give the whole history")
    return layers


def from_known(history: History | pd.DataFrame, layer: str = NETWORK) -> pd.DataFrame:
    """The rows from the first step on at which log sigma is known: as long as a weight is zero it is not."""
    frame = as_frame(history)
    if "z" not in frame:
        return frame
    z = frame.loc[frame["layer"] == layer, ["step", "z"]]
    first = z.loc[np.isfinite(z["z"].to_numpy(float)), "step"].min()
    return frame[frame["step"] >= first] if first > z["step"].min() else frame


def _moves(history: History | pd.DataFrame) -> pd.DataFrame:
    """The rows, with zeros for what is not known of a step that left the weights as they were: a loss scaler's skip."""
    frame = as_frame(history)
    if "eps" not in frame:
        return frame
    forces = [name for name in ("mu", "mu_ref", "kappa", "lambda_sq", "gHg") if name in frame]
    filled = frame[forces].where(frame[forces].notna() | (frame["eps"] != 0.0).to_numpy()[:, None], 0.0)
    return frame.assign(**{name: filled[name] for name in forces})


def _rows(history: History | pd.DataFrame, layer: str) -> pd.DataFrame:
    frame = measured(history)
    rows = frame[frame["layer"] == layer]
    if len(rows) == 0:
        names = ", ".join(map(repr, frame["layer"].unique()))
        raise ValueError(f"expected a layer of the history, got {layer!r}; there are {names}")
    if (np.diff(rows["step"].to_numpy(np.int64)) <= 0).any():
        raise ValueError("expected one row of a layer at each step, in their order, got others; sort them by step")
    return rows


def _step_axis(rows: pd.DataFrame) -> NDArray[np.int64]:
    step = rows["step"].to_numpy(np.int64)
    return np.append(step, step[-1] + 1)
