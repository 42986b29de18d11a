"""The only file that imports specpert: what the monitor asks of perturbation theory, with failures as words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import specpert

__all__ = ["Spectrum", "hessian_diagonal", "hessian_pairing", "read_spectrum", "spectral_norm", "taylor"]


@dataclass(frozen=True)
class Spectrum:
    """The top of a weight's spectrum.

    Attributes
    ----------
    matrix : Tensor, (m, n)
        The weight in float64.
    sigma, gap : float
        Largest singular value and its isolation distance (theory 1.9); the gap is NaN where it is unknown.
    triplet : SingularTriplet or None
        None where the derivatives do not exist; ``problem`` then says why.
    problem : str
        Empty when all is well.
    """

    matrix: Tensor
    sigma: float
    gap: float
    triplet: specpert.SingularTriplet | None
    problem: str = ""

    @property
    def u(self) -> Tensor:
        """Left singular vector (m,)."""
        assert self.triplet is not None
        return self.triplet.u

    @property
    def v(self) -> Tensor:
        """Right singular vector (n,)."""
        assert self.triplet is not None
        return self.triplet.v


def read_spectrum(matrix: Tensor) -> Spectrum:
    """The spectrum of a float64 matrix (m, n); never raises for numerical reasons.

    Examples
    --------
    >>> import torch
    >>> good = read_spectrum(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)))
    >>> round(good.sigma, 12), round(good.gap, 12), good.problem
    (3.0, 2.0, '')
    >>> tie = read_spectrum(torch.eye(2, dtype=torch.float64))
    >>> tie.sigma, tie.gap, tie.problem
    (1.0, 0.0, 'largest singular value is repeated')
    """
    if not bool(torch.isfinite(matrix).all()):
        return Spectrum(matrix, float("nan"), float("nan"), None, "weight is not finite")
    try:
        triplet = specpert.singular_triplet(matrix)
    except specpert.DegenerateSingularValueError:
        sigma = float(torch.linalg.matrix_norm(matrix, 2))
        return Spectrum(matrix, sigma, 0.0, None, "largest singular value is repeated")
    except specpert.ZeroSingularValueError:
        return Spectrum(matrix, 0.0, 0.0, None, "weight is zero")
    except torch.linalg.LinAlgError:
        return Spectrum(matrix, float("nan"), float("nan"), None, "singular value decomposition failed")
    return Spectrum(matrix, float(triplet.sigma), float(triplet.gap), triplet)


def hessian_pairing(spectrum: Spectrum, p: Tensor, q: Tensor) -> Tensor:
    """``D^2 sigma[G, G]`` from ``p = G v`` (..., m) and ``q = G^T u`` (..., n); shape (...) (theory 1.3)."""
    return specpert.SigmaHessian(spectrum.triplet).from_projections(p, q)


def hessian_diagonal(spectrum: Spectrum) -> Tensor:
    """The diagonal of the Hessian of sigma as a matrix (m, n) (theory 2.4)."""
    return specpert.SigmaHessian(spectrum.triplet).diagonal()


def taylor(spectrum: Spectrum, step: Tensor) -> list[float]:
    """Taylor coefficients (sigma, D1, D2/2, D3/6) of sigma along ``step`` (m, n) (theory 1.4)."""
    return [float(c) for c in specpert.sigma_series(spectrum.triplet, step, 3).coefficients]


def spectral_norm(matrix: Tensor) -> float:
    """``||matrix||_2`` from the Gram matrix of the smaller side: far cheaper than a decomposition.

    Squaring costs no accuracy for the largest value; the scaling keeps tiny steps from underflow.

    Examples
    --------
    >>> import torch
    >>> round(spectral_norm(1e-200 * torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))) * 1e200, 12)
    4.0
    """
    scale = float(matrix.abs().max()) if matrix.numel() else 0.0
    if scale == 0.0 or scale != scale or scale == float("inf"):
        return scale
    a = matrix / scale
    gram = a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a
    return scale * float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt())
