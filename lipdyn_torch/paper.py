"""The formulas of arXiv 2506.18588 under the paper's own names, for comparison (theory 2.1, 2.2).

They are what the paper prints, with its assumptions: layers are independent, batches are drawn independently, and the
terms do not depend on the path. Where they differ from what `lipdyn_torch.predict` does, theory 2.5 to 2.10 say why.
Every function takes a history; the integrals are sums over the monitored steps with ``dt = eta``, an array of n + 1
entries each, the first for the start. All begin with the first step at which every log sigma is known.

Letters: ``sigma_l`` largest singular value of layer l, ``J`` and ``H`` its derivatives, ``Sigma`` the covariance of the
mini-batch gradient, ``eta`` the learning rate, ``Z = sum_l log sigma_l``, ``K = exp Z``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lipdyn_torch.dynamics import log_sd_k
from lipdyn_torch.history import NETWORK, History
from lipdyn_torch.predict import from_known, observed, parts_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["expectation_K", "integral_Z", "kappa_Z", "lambda_Z_squared", "mu_Z", "variance_K", "variance_Z"]

Array = NDArray[np.float64]


def mu_Z(history: History | pd.DataFrame) -> Array:
    """Drift ``mu_Z = -sum_l <J_l, gbar_l> / sigma_l`` in each monitored step (n,), per unit of SDE time."""
    return _sums(history, "mu")


def kappa_Z(history: History | pd.DataFrame) -> Array:
    """Noise curvature ``kappa_Z = sum_l eta <H_l, Sigma_l> / (2 sigma_l)`` (n,), per unit of SDE time."""
    return _sums(history, "kappa")


def lambda_Z_squared(history: History | pd.DataFrame) -> Array:
    """Diffusion ``||lambda_Z||^2 = sum_l eta J_l^T Sigma_l J_l / sigma_l^2`` (n,), per unit of SDE time."""
    return _sums(history, "lambda_sq")


def integral_Z(history: History | pd.DataFrame) -> Array:
    """``Z(t) = Z(0) + int (mu_Z + kappa_Z - ||lambda_Z||^2 / 2) ds`` along the visited weights (n + 1,).

    Examples
    --------
    >>> row = {"step": 0, "layer": "0", "lr": 0.1, "mu": 1.0, "kappa": 0.5, "lambda_sq": 0.4, "z": 1.0, "dz": 0.1}
    >>> integral_Z(History([row, {**row, "layer": "network", "lambda_sq": 7.0}])).tolist()
    [1.0, 1.13]
    """
    return _start(history) + _integral(history, mu_Z(history) + kappa_Z(history) - lambda_Z_squared(history) / 2)


def expectation_K(history: History | pd.DataFrame) -> Array:
    """Natural logarithm of ``E[K(t)] = K(0) exp int (mu_Z + kappa_Z) ds`` (n + 1,)."""
    return _start(history) + _integral(history, mu_Z(history) + kappa_Z(history))


def variance_Z(history: History | pd.DataFrame) -> Array:
    """``Var[Z(t)] = int ||lambda_Z||^2 ds`` (n + 1,)."""
    return _integral(history, lambda_Z_squared(history))


def variance_K(history: History | pd.DataFrame) -> Array:
    """Natural logarithm of ``Var[K(t)] = E[K]^2 (exp(int ||lambda_Z||^2 ds) - 1)`` (n + 1,); of zero minus infinity."""
    return 2.0 * log_sd_k(expectation_K(history), variance_Z(history))


def _start(history: History | pd.DataFrame) -> float:
    return float(observed(history)[1][0])


def _sums(history: History | pd.DataFrame, column: str) -> Array:
    """Sum over the layers in each step; layers with a smaller learning rate count for as much less of the time."""
    layers = parts_of(from_known(history))
    eta = layers.groupby("step")["lr"].transform("max")
    share = (layers[column] * layers["lr"] / eta.where(eta > 0, 1.0)).groupby(layers["step"], sort=True)
    return np.asarray(share.agg(lambda x: x.sum(skipna=False)), dtype=np.float64)


def _integral(history: History | pd.DataFrame, terms: Array) -> Array:
    """From the start to each monitored state; a monitored step stands for all up to the next."""
    frame = from_known(history)
    rows = frame[frame["layer"] == NETWORK]
    step, _ = observed(frame)
    duration = np.append(np.diff(step[:-1]), 1) * rows["lr"].to_numpy(float)
    return np.concatenate([[0.0], np.cumsum(duration * terms)])
