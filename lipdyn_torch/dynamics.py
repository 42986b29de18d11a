"""From contractions to forces, and from forces to curves: pure functions, no state (theory 2.1, 2.2, 2.9, 2.10).

Letters: ``eta`` learning rate, ``sigma`` largest singular value of one layer's weight, J and H its first and
second derivative, ``gbar`` and ``Sigma`` mean and covariance of the mini-batch gradient, ``Z`` = sum over the
layers of log sigma, ``K = exp Z``. The unit of time of mu, kappa and lambda^2 is the SDE's: one step takes
``eta``. Increments per step carry the letters of theory 2.2: m, c (curvature of the noise), v (variance), d
(curvature of the gradient), e (square of the drift).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

__all__ = [
    "bridge_variance",
    "diffusion_variance",
    "discrete_increments",
    "drift",
    "epoch_means",
    "expected_log_k",
    "fisher_share",
    "log_sd_k",
    "mean_z",
    "moving_average",
    "network_noise",
    "noise_curvature",
    "noise_strength",
    "pathwise_changes",
    "sample_paths",
    "step_increments",
]

# A predicted relative change below this is no longer a small one, and its logarithm is meaningless (theory 2.7).
_LEAST_CHANGE = -0.9


def drift(gradient: float, sigma: float, weight_decay: float = 0.0, *, maximize: bool = False) -> float:
    """``mu = -<J, gbar>/sigma``, less the weight decay, per unit of SDE time (theory 2.1, 5).

    Parameters
    ----------
    gradient : float
        ``<J, gbar>`` without the decay term, which adds exactly ``-weight_decay`` because ``<J, W> = sigma``.

    Examples
    --------
    >>> drift(gradient=0.5, sigma=2.0)
    -0.25
    """
    return (gradient if maximize else -gradient) / sigma - weight_decay


def noise_curvature(pairing: float, sigma: float, lr: float) -> float:
    """``kappa = eta <H, Sigma> / (2 sigma)``, per unit of SDE time (theory 2.1).

    Examples
    --------
    >>> noise_curvature(pairing=0.5, sigma=2.0, lr=0.25)
    0.03125
    """
    return lr * pairing / (2.0 * sigma)


def noise_strength(variance: float, sigma: float, lr: float) -> float:
    """``lambda^2 = eta J^T Sigma J / sigma^2``, per unit of SDE time (theory 2.1).

    Examples
    --------
    >>> noise_strength(variance=0.5, sigma=2.0, lr=0.25)
    0.03125
    """
    return lr * variance / sigma**2


def network_noise(scores: Sequence[Tensor], sigmas: Sequence[float], lrs: Sequence[float]) -> float:
    """Variance of one step of Z with every covariance between layers, ``v`` of theory 2.9.

    Parameters
    ----------
    scores : sequence of Tensor, (M,)
        ``u_l^T G_i^(l) v_l`` for each layer l; the same M samples in each.
    sigmas, lrs : sequence of float
        Each layer's largest singular value and learning rate.

    Returns
    -------
    float
        ``1/(M(M-1)) sum_i (z_i - zbar)^2`` with ``z_i = sum_l eta_l scores_li / sigma_l``; NaN for M < 2.

    Examples
    --------
    Two layers whose noises cancel leave the network without noise:

    >>> import torch
    >>> a = torch.tensor([1.0, 3.0])
    >>> network_noise([a, -a], [1.0, 1.0], [0.1, 0.1])
    0.0
    """
    z = torch.stack([lr / sigma * score for score, sigma, lr in zip(scores, sigmas, lrs, strict=True)]).sum(0)
    samples = len(z)
    if samples < 2:
        return math.nan
    return float((z - z.mean()).square().sum()) / (samples * (samples - 1))


def pathwise_changes(coefficients: Sequence[float]) -> tuple[list[float], bool]:
    """Change of log sigma along an actual update, to first, second, third order ... (theory 2.7).

    Parameters
    ----------
    coefficients : sequence of float
        Taylor coefficients ``sigma, D1, D2/2!, D3/3!, ...`` along the update.

    Returns
    -------
    changes : list of float
        ``log1p(r)`` with ``r`` the partial sums divided by sigma.
    clipped : bool
        Whether some ``r`` was below -0.9 and was replaced by it.

    Examples
    --------
    >>> changes, clipped = pathwise_changes([2.0, 0.2, 0.02, -0.002])
    >>> [round(change, 6) for change in changes], clipped
    ([0.09531, 0.10436, 0.103459], False)
    """
    relative = np.cumsum(np.asarray(coefficients[1:], dtype=float)) / coefficients[0]
    clipped = bool((relative < _LEAST_CHANGE).any())
    return [math.log1p(r) for r in np.maximum(relative, _LEAST_CHANGE)], clipped


def step_increments(
    lr: ArrayLike, mu: ArrayLike, kappa: ArrayLike, lambda_sq: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """``(m, c, v)`` of theory 2.2: what drift, curvature and noise do in each step.

    Examples
    --------
    >>> m, c, v = step_increments([0.1, 0.1], [1.0, 2.0], [0.5, 0.5], [0.2, 0.2])
    >>> m.tolist(), c.tolist()
    ([0.1, 0.2], [0.05, 0.05])
    """
    eta = np.asarray(lr, dtype=float)
    return eta * np.asarray(mu), eta * np.asarray(kappa), eta * np.asarray(lambda_sq)


def discrete_increments(
    lr: ArrayLike, mu: ArrayLike, gHg: ArrayLike, sigma: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``(d, e)`` of theory 2.2: what finite steps add to the equation, ``d - e/2`` in each (theory 2.6).

    d is the curvature along the mean gradient, e the square of the relative drift.

    Examples
    --------
    >>> d, e = discrete_increments(lr=0.1, mu=2.0, gHg=3.0, sigma=0.5)
    >>> round(float(d), 12), round(float(e), 12)
    (0.03, 0.04)
    """
    eta = np.asarray(lr, dtype=float)
    return eta**2 * np.asarray(gHg) / (2.0 * np.asarray(sigma)), (eta * np.asarray(mu)) ** 2


def fisher_share(lr: ArrayLike, mu: ArrayLike, lambda_sq: ArrayLike, batch: ArrayLike) -> NDArray[np.float64]:
    """How much of the empirical Fisher information along J is noise, between 0 and 1.

    With ``F = 1/M sum_i G_i G_i^T`` (elementwise, of the samples' own gradients) ``J^T F J`` is ``(M - 1) J^T Sigma J``
    and ``<J, gbar>^2`` together. Near convergence the mean gradient vanishes and ``Sigma = F / M``: the share is then
    1 up to 1/M, and far from it Fisher information does not tell the noise. ``mu`` must be without weight decay.

    Examples
    --------
    >>> float(fisher_share(lr=0.1, mu=0.0, lambda_sq=0.3, batch=8))
    1.0
    >>> round(float(fisher_share(lr=0.1, mu=3.0, lambda_sq=0.3, batch=4)), 12)
    0.5
    """
    mean_square = np.asarray(mu, dtype=float) ** 2
    noise = (np.asarray(batch, dtype=float) - 1.0) * np.asarray(lambda_sq, dtype=float) / np.asarray(lr, dtype=float)
    with np.errstate(invalid="ignore"):  # neither gradient nor noise: NaN
        return np.asarray(noise / (noise + mean_square))


def moving_average(values: ArrayLike, window: int) -> NDArray[np.float64]:
    """Mean of each value and those before it, up to ``window`` of them.

    Examples
    --------
    >>> moving_average([1.0, 3.0, 5.0], 2).tolist()
    [1.0, 2.0, 4.0]
    """
    values = np.asarray(values, dtype=float)
    starts = np.maximum(np.arange(len(values)) - window + 1, 0)
    return np.array([values[start : end + 1].mean() for end, start in enumerate(starts)])


def mean_z(z0: float, m: ArrayLike, c: ArrayLike, v_layers: ArrayLike) -> NDArray[np.float64]:
    """Z before the first and after every step, ``Z_0 + sum [m + c - v/2]`` (theory 2.2).

    ``v_layers`` is the sum of the layers' own variances, also where the network's noise has covariances
    between layers: the Ito term belongs to each logarithm (theory 2.9).

    Examples
    --------
    >>> mean_z(1.0, [0.1, 0.1], [0.0, 0.0], [0.2, 0.2]).tolist()
    [1.0, 1.0, 1.0]
    """
    steps = np.asarray(m, dtype=float) + np.asarray(c) - np.asarray(v_layers) / 2
    return z0 + np.concatenate([[0.0], np.cumsum(steps)])


def expected_log_k(z0: float, m: ArrayLike, c: ArrayLike, v: ArrayLike, v_layers: ArrayLike) -> NDArray[np.float64]:
    """``log E[K]`` before the first and after every step (theory 2.2 with the cross-layer term of 2.9).

    Right when m, c and v do not depend on the path and the batches are independent (theory 2.5): never use it
    with an m that comes from the batches that made the steps.

    Parameters
    ----------
    v, v_layers : array_like
        Variance of each step of Z with all covariances, and the sum of the layers' own variances. With
        independent layers they agree and drop out: ``K_0 exp(sum m + c)``.

    Examples
    --------
    >>> expected_log_k(0.0, [0.25], [0.125], [0.3], [0.3]).tolist()
    [0.0, 0.375]
    """
    steps = np.asarray(m, dtype=float) + np.asarray(c) + (np.asarray(v) - np.asarray(v_layers)) / 2
    return z0 + np.concatenate([[0.0], np.cumsum(steps)])


def log_sd_k(log_mean_k: ArrayLike, var_z: ArrayLike) -> NDArray[np.float64]:
    """Logarithm of the standard deviation of K, ``Var K = (E K)^2 (exp(Var Z) - 1)`` (theory 2.2).

    Examples
    --------
    >>> bool(np.isclose(np.exp(log_sd_k(0.0, np.log(2.0))), 1.0))
    True
    """
    var_z = np.asarray(var_z, dtype=float)
    with np.errstate(divide="ignore"):  # no variance: minus infinity
        of_relative = 0.5 * (var_z + np.log(-np.expm1(-var_z)))  # exp(Var Z) itself may be out of range
    return np.asarray(log_mean_k, dtype=float) + of_relative


def diffusion_variance(v: ArrayLike) -> NDArray[np.float64]:
    """``Var Z`` before the first and after every step for independent batches, ``sum v`` (theory 2.2).

    Examples
    --------
    >>> diffusion_variance([0.5, 0.25]).tolist()
    [0.0, 0.5, 0.75]
    """
    return np.concatenate([[0.0], np.cumsum(np.asarray(v, dtype=float))])


def bridge_variance(v: ArrayLike, batch: ArrayLike, dataset_size: int) -> NDArray[np.float64]:
    r"""``Var Z`` before the first and after every step when each epoch visits every sample once (theory 2.10).

    Batch means drawn without replacement from N samples have variance ``s^2 (1/M - 1/N)`` and covariance
    ``-s^2/N`` with each other. With a step's response to its batch held in ``v = a^2 s^2 / M`` this sums to

    .. math:: \mathrm{Var} = \sum_k v_k - \frac1N \Big(\sum_k \sqrt{v_k M_k}\Big)^2

    within an epoch, which for constant v is the bridge ``k v (1 - k M/N)`` of theory 2.10; epochs add up.
    The first monitored step is taken as the start of an epoch, and an epoch ends when fewer than M samples
    are left, or, if its last batch was smaller, when none is.

    Examples
    --------
    >>> bridge_variance([0.25] * 4, [4] * 4, dataset_size=16).tolist()
    [0.0, 0.1875, 0.25, 0.1875, 0.0]
    """
    total, inside, response = 0.0, 0.0, 0.0
    curve = [0.0]
    for v_k, m_k, first in _epochs(v, batch, dataset_size):
        if first:
            total, inside, response = curve[-1], 0.0, 0.0
        inside += v_k
        response += math.sqrt(v_k * m_k)
        rest = inside - response**2 / dataset_size
        curve.append(total + (rest if not rest < 0.0 else 0.0))  # NaN stays
    return np.asarray(curve)


def epoch_means(v: ArrayLike, batch: ArrayLike, dataset_size: int) -> NDArray[np.float64]:
    """Noise of the steps, ``v_k M_k`` averaged over each epoch (theory 2.10: it varies slowly).

    One batch tells v with an error of its own; without the average the bridge would not close at the epoch's end. What
    is NaN stays so and counts for nothing; noise of a batch whose size is not known (0) is NaN.

    Examples
    --------
    >>> epoch_means([0.2, 0.3, 0.1, 0.4], [4] * 4, dataset_size=8).tolist()
    [0.25, 0.25, 0.25, 0.25]
    >>> epoch_means([0.2, 0.1, 0.0], [4, 0, 0], dataset_size=8).tolist()
    [0.2, nan, 0.0]
    """
    steps = _epochs(v, batch, dataset_size)
    epoch = np.cumsum([first for _, _, first in steps])
    scaled = np.array([v_k * m_k for v_k, m_k, _ in steps])
    sizes = np.array([m_k for _, m_k, _ in steps])
    known = ~np.isnan(scaled) & (sizes > 0)  # frozen layers see no samples, nor does an empty batch
    sums = np.bincount(epoch[known], scaled[known], minlength=len(steps) + 1)
    means = sums / np.maximum(np.bincount(epoch[known], minlength=len(steps) + 1), 1)
    spread = np.divide(means[epoch], sizes, out=np.zeros(len(steps)), where=sizes > 0)
    lost = (sizes == 0) & (np.array([v_k for v_k, _, _ in steps]) > 0)
    return np.where(np.isnan(scaled) | lost, np.nan, spread)


def sample_paths(
    mean: ArrayLike,
    v: ArrayLike,
    batch: ArrayLike | None = None,
    *,
    paths: int = 100,
    dataset_size: int | None = None,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Random paths of Z around a mean curve, (paths, steps + 1), by exact Gaussian increments.

    With ``dataset_size`` (and the batch sizes) the noise of each epoch is drawn without replacement, so the
    paths have the variance of `bridge_variance`; without it, that of `diffusion_variance`.

    Examples
    --------
    Without replacement, the noise of a whole epoch sums to nothing:

    >>> z = sample_paths(np.zeros(5), [1.0] * 4, [2] * 4, paths=3, dataset_size=8)
    >>> bool(np.allclose(z[:, -1], 0.0))
    True
    """
    rng = np.random.default_rng(seed)
    v = np.asarray(v, dtype=float)
    noise = np.sqrt(v) * rng.standard_normal((paths, len(v)))
    if dataset_size is not None:
        if batch is None:
            raise ValueError("expected the batch sizes with dataset_size, got None; pass batch=")
        sizes = np.asarray(batch, dtype=float)
        starts = [k for k, (_, _, first) in enumerate(_epochs(v, sizes, dataset_size)) if first]
        for start, stop in zip(starts, [*starts[1:], len(v)], strict=True):
            inside = slice(start, stop)
            roots, drawn = np.sqrt(sizes[inside]), rng.standard_normal((paths, stop - start))
            unseen = max(0.0, dataset_size - sizes[inside].sum())
            rest = math.sqrt(unseen) * rng.standard_normal((paths, 1))
            epoch_mean = ((roots * drawn).sum(1, keepdims=True) + rest) / dataset_size
            noise[:, inside] = np.sqrt(v[inside]) * (drawn - roots * epoch_mean)
    return np.asarray(mean) + np.concatenate([np.zeros((paths, 1)), np.cumsum(noise, axis=1)], axis=1)


def _epochs(v: ArrayLike, batch: ArrayLike, dataset_size: int) -> list[tuple[float, float, bool]]:
    """``(v_k, M_k, whether an epoch starts here)`` for every step."""
    sizes = np.broadcast_to(np.asarray(batch, dtype=float), np.shape(v))
    out, seen = [], math.inf
    for v_k, m_k in zip(np.asarray(v, dtype=float), sizes, strict=True):
        first = seen + m_k > dataset_size
        seen = m_k if first else seen + m_k
        out.append((float(v_k), float(m_k), first))
    return out
