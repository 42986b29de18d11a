r"""Drift and diffusion of a singular value, a cluster mean, or a spectral function of a matrix Ito process.

For dA = G dt + sum_j D_j dW_j with independent real Wiener processes W_j, Ito's formula gives

    d phi(A) = (D phi[G] + 1/2 sum_j D^2 phi[D_j, D_j]) dt + sum_j D phi[D_j] dW_j.

Legend: A, G (..., m, n); D (..., J, m, n); phi the quantity, b_j = D phi[D_j] its diffusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specpert._arrays import OF_MATRIX, Array, as_arrays, finite, namespace, scalar
from specpert.prepare import prepare
from specpert.result import SpecpertError
from specpert.series import ClusterSeries, expand
from specpert.spectral import SpectralFunction
from specpert.triplet import SingularTriplet


@dataclass(frozen=True, eq=False)
class ItoCoefficients:
    r"""Coefficients of :math:`d\varphi = (\text{first} + \text{curvature})\, dt + \sum_j b_j\, dW_j`.

    Attributes
    ----------
    value : array, shape (...)
        phi(A).
    first_order : array, shape (...)
        D phi[G], what the drift of A does to first order.
    curvature : array, shape (...)
        :math:`\frac12 \sum_j D^2 \varphi[D_j, D_j]`, what the noise does on average.
    diffusion : array, shape (..., J)
        The b_j.

    Examples
    --------
    >>> import numpy as np
    >>> from specpert.ito import sigma_ito
    >>> I = np.eye(2)
    >>> b = sigma_ito(np.diag([2.0, 1.0]), 0.5 * I, np.stack([I, 2 * I]))
    >>> print(b.drift, b.diffusion, b.variance)
    0.5 [1. 2.] 5.0
    """

    value: Array
    first_order: Array
    curvature: Array
    diffusion: Array

    @property
    def drift(self) -> Array:
        """First-order part plus curvature, shape (...)."""
        return self.first_order + self.curvature

    @property
    def variance(self) -> Array:
        r"""Variance :math:`\sum_j b_j^2` per unit of time, shape (...)."""
        xp = namespace(self.diffusion)
        with np.errstate(over="ignore"):
            return finite(scalar(xp.sum(self.diffusion**2, axis=-1)), "variance", xp, OF_MATRIX)

    def log(self) -> ItoCoefficients:
        r"""Coefficients of log phi: b / phi, and curvature :math:`c / \varphi - \sum_j b_j^2 / (2 \varphi^2)`.

        Raises
        ------
        SpecpertError
            phi is not positive.

        Examples
        --------
        The geometric Brownian motion dA = A dW has the drift -1/2 in its logarithm:

        >>> import numpy as np
        >>> from specpert.ito import sigma_ito
        >>> A = np.array([[3.0, 0.0], [0.0, 1.0]])
        >>> log = sigma_ito(A, np.zeros((2, 2)), A[None]).log()
        >>> print(log.drift, log.diffusion)
        -0.5 [1.]
        """
        xp = namespace(self.diffusion)
        if not bool(xp.all(xp.asarray(self.value) > 0)):
            raise SpecpertError(
                f"expected a positive quantity to take the logarithm of, got {self.value}; use its own drift and "
                "diffusion"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            # ratios first: the squares of small values would leave the range of the floats
            relative = self.diffusion / self.value[..., None]
            curvature = self.curvature / self.value - xp.sum(relative**2, axis=-1) / 2
            parts = (self.first_order / self.value, scalar(curvature), relative)
        return ItoCoefficients(xp.log(self.value), *(finite(x, "relative coefficients", xp, OF_MATRIX) for x in parts))


def sigma_ito(A: Any, G: Any, D: Any, *, k: int | tuple[int, ...] = 0) -> ItoCoefficients:
    r"""Drift and diffusion of a singular value, or of the mean of a cluster, of dA = G dt + sum_j D_j dW_j.

    .. math::
        d\sigma_k = \Bigl(D\sigma_k[G] + \tfrac12 \sum_j D^2\sigma_k[D_j, D_j]\Bigr) dt + \sum_j D\sigma_k[D_j]\, dW_j

    (theory 1.2, 1.3 and 2.1; for clusters 1.8). For a Brownian matrix, with all unit matrices as D_j, this is the
    process of Bru (J. Multivariate Anal. 29, 1989): the curvature is half the trace of the Hessian,
    :math:`\frac{|m-n|}{2\sigma_k} + \sum_{i \neq k} \frac{\sigma_k}{\sigma_k^2 - \sigma_i^2}`.

    Parameters
    ----------
    A : array, shape (..., m, n), or SingularTriplet
        The matrix now, or what :func:`singular_triplet` prepared from a single one (its k is then used).
    G : array, shape (..., m, n)
        Drift of A.
    D : array, shape (..., J, m, n)
        The J matrices that the Wiener processes drive; a noise of covariance Sigma has D = a factor of Sigma (theory
        2.1). Leading axes of A, G and D broadcast.
    k : int or tuple of int
        Index of the singular value, 0 being the largest, or the consecutive indices of a cluster, whose mean is then
        followed through any ties inside it.

    Returns
    -------
    ItoCoefficients

    Raises
    ------
    DegenerateSingularValueError, ZeroSingularValueError
        sigma_k, or the cluster, is tied with another value, or zero.
    IndexError, NonFiniteError, OverflowError, TypeError, ValueError
        k or an array is not as described, or a coefficient exceeds the range of the dtype.

    Examples
    --------
    The norm of a Brownian motion in R^3, at distance 2 from the origin, is a Bessel process with drift 1 / 2:

    >>> import numpy as np
    >>> from specpert.ito import sigma_ito
    >>> b = sigma_ito([[2.0, 0.0, 0.0]], np.zeros((1, 3)), np.eye(3).reshape(3, 1, 3))
    >>> print(b.drift, b.variance)
    0.5 1.0
    """
    if not isinstance(k, tuple) and (isinstance(k, Sequence) or np.ndim(k)):
        kind = type(k).__name__
        raise TypeError(f"expected k to be an int, or a tuple of ints for the mean of a cluster, got the {kind} {k}")
    if isinstance(A, SingularTriplet) and A._several:
        raise TypeError(f"expected a triplet of one singular value or a cluster, got the values {A.k}")
    A, G, D, stacked = _aligned(A, G, D)
    cluster = isinstance(k, tuple) or (isinstance(A, SingularTriplet) and A._cluster)
    triplet, (G, D) = prepare(A, k, [G, D], ["G", "D"], cluster=cluster)

    def coefficients(H: Array, order: int) -> Array:
        series = expand(triplet, [H], order)
        return series.mean if isinstance(series, ClusterSeries) else series.coefficients

    first, second = coefficients(G, 1), coefficients(D, 2)
    return _assemble(first[..., 0], first[..., 1], second[..., 1], second[..., 2], stacked)


def spectral_ito(f: SpectralFunction, A: Any, G: Any, D: Any) -> ItoCoefficients:
    r"""Drift and diffusion of a spectral function f(A) of dA = G dt + sum_j D_j dW_j, right at ties where f is smooth.

    .. math::
        df = \Bigl(Df[G] + \tfrac12 \sum_j D^2 f[D_j, D_j]\Bigr) dt + \sum_j Df[D_j]\, dW_j

    Parameters
    ----------
    f : SpectralFunction
    A : array, shape (..., m, n), or SingularTriplet
        As for :func:`sigma_ito`; the triplet must hold all singular values.
    G : array, shape (..., m, n)
        Drift of A.
    D : array, shape (..., J, m, n)
        The matrices that the Wiener processes drive.

    Returns
    -------
    ItoCoefficients

    Raises
    ------
    ZeroSingularValueError, DegenerateSingularValueError
        f is not twice differentiable at A.
    NonFiniteError, OverflowError, TypeError, ValueError
        An array is not as described, or a coefficient exceeds the range of the dtype.

    Examples
    --------
    For a Brownian matrix at the identity the second derivatives -tr(E_ij E_ij) of log |det A| sum to -n:

    >>> import numpy as np
    >>> from specpert.ito import spectral_ito
    >>> from specpert.spectral import SpectralFunction
    >>> b = spectral_ito(SpectralFunction.log_det(), np.eye(2), np.zeros((2, 2)), np.eye(4).reshape(4, 2, 2))
    >>> print(b.drift, b.variance)
    -1.0 2.0
    """
    if not isinstance(f, SpectralFunction):
        raise TypeError(f"expected f to be a SpectralFunction, got {type(f).__name__}")
    A, G, D, stacked = _aligned(A, G, D)
    point = f._point(A)
    first = point.derivative(G, "G")
    return _assemble(point.value(), first, point.derivative(D, "D"), point.quadratic(D, "D") / 2, stacked)


def _aligned(A: Any, G: Any, D: Any) -> tuple[Any, Array, Array, bool]:
    """A, G, D with an axis beside that of the J noises in A and G where A is a stack, and whether it is one."""
    if isinstance(A, SingularTriplet):
        if len(A.shape) > 2:
            raise TypeError("expected the triplet of a single matrix, got one of a stack; give the stack itself")
        _, (G, D) = as_arrays(G, D, names=["G", "D"])
    else:
        _, (A, G, D) = as_arrays(A, G, D, names=["A", "G", "D"])
    if D.ndim < 3:
        raise ValueError(f"expected D of shape (..., J, m, n), got {tuple(D.shape)}; one noise is D[None]")
    stacked = len(A.shape) > 2
    if stacked and G.ndim >= 2:  # a G of too few axes is reported where directions are checked
        A, G = A[..., None, :, :], G[..., None, :, :]
    return A, G, D, stacked


def _assemble(value: Array, first: Array, b: Array, curvatures: Array, stacked: bool) -> ItoCoefficients:
    """Coefficients from value and first (...) or, if stacked, (..., 1), and b and curvatures (..., J)."""
    xp = namespace(b)
    curvature = xp.sum(curvatures, axis=-1)
    if stacked:
        value, first = value[..., 0], first[..., 0]
    value, first, curvature = xp.broadcast_arrays(*(xp.asarray(x) for x in (value, first, curvature)))
    b = xp.broadcast_to(b, (*value.shape, b.shape[-1]))
    return ItoCoefficients(scalar(value), scalar(first), scalar(curvature), b)
