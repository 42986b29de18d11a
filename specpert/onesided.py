"""Where a singular value has no derivative of its own: clusters that a step cannot leave, and one-sided derivatives.

Legend: A (m, n); s singular values; h = ||H||_2; eps = 2 h / d with d the distance of the cluster to the rest;
U_c, V_c singular vectors of a tie; U_0 (m, m - rank), V_0 (n, n - rank) null bases; A^+ pseudo-inverse.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from specpert._arrays import (
    OF_MATRIX,
    Array,
    adjoint,
    array,
    as_arrays,
    check_matrix,
    eps,
    exponent,
    finite,
    ldexp,
    magnitude,
    namespace,
)
from specpert._checks import check_direction, check_fraction, check_indices
from specpert.certificate import spectral_norm_bound
from specpert.result import SpecpertError
from specpert.series import ClusterSeries, sigma_series


def isolating_cluster(A: Any, H: Any, *, k: int = 0) -> tuple[int, ...]:
    """The least cluster around sigma_k that the step H cannot mix with the rest: eps < 1/2 (theory 1.8).

    Its block series ``sigma_series(A, H, order, k=cluster)`` converges well beyond x = 1, whatever gaps lie inside.

    Parameters
    ----------
    A, H : array, shape (m, n)
        The matrix and the step.
    k : int
        Index of the singular value, 0 being the largest.

    Returns
    -------
    tuple of int
        Consecutive indices, k among them.

    Raises
    ------
    SpecpertError
        The step is so large that the cluster reaches the value zero: nothing is isolated.
    NonFiniteError, IndexError, TypeError, ValueError
        An argument is not as described.

    Examples
    --------
    >>> import numpy as np
    >>> from specpert import isolating_cluster
    >>> isolating_cluster(np.diag([2.001, 2.0, 1.0]), 0.01 * np.ones((3, 3)))
    (0, 1)
    """
    xp, (A, H) = as_arrays(A, H, names=["A", "H"])
    _check_single(A, H, xp)
    index = check_indices(k, min(A.shape))
    if not isinstance(index, int):
        raise TypeError(f"expected one index k, got {index}")
    values = [float(x) for x in xp.linalg.svdvals(A)]
    margin = 10 * max(A.shape) * eps(A, xp) * values[0]
    needed = 4 * float(spectral_norm_bound(H, xp)) + margin
    first = last = index
    while first > 0 and values[first - 1] - values[first] <= needed:
        first -= 1
    while last + 1 < len(values) and values[last] - values[last + 1] <= needed:
        last += 1
    zero = A.shape[0] != A.shape[1] or values[-1] <= margin
    if (values[last] if zero else 2 * values[last]) <= needed:
        raise SpecpertError(
            f"expected a step that leaves sigma_{index} apart from zero, got ||H|| = {(needed - margin) / 4:.3e} "
            f"beside sigma_{last} = {values[last]:.3e}: take smaller steps, or decompose A + H"
        )
    return tuple(range(first, last + 1))


@dataclass(frozen=True, eq=False)
class OneSided:
    """What the sorted values of a tie do along H, for x > 0 (theory 1.8).

    Attributes
    ----------
    cluster : tuple of int
        Indices of the values tied with sigma_k.
    value : float
        Their common value at x = 0.
    derivatives : array, shape (c,)
        One-sided derivatives at x = 0, in descending order like the values themselves.
    """

    cluster: tuple[int, ...]
    value: float
    derivatives: Array
    _values: Any = field(repr=False)

    def values(self, x: float) -> Array:
        """The sorted values at x >= 0, shape (c,), with an error of O(x^3).

        Raises OverflowError where they are, or x times the direction is beside the matrix, beyond the range of floats.
        """
        if not isinstance(x, numbers.Real):
            raise TypeError(f"expected x to be a real number, got {type(x).__name__}")
        if not 0 <= x < math.inf:
            raise ValueError(f"expected a finite x >= 0, got {x}; for the other side take the direction -H")
        return self._values(float(x))


def one_sided_derivatives(A: Any, H: Any, *, k: int = 0, gap_tol: float | None = None) -> OneSided:
    r"""One-sided derivatives of a repeated or zero singular value along H.

    A repeated value has the eigenvalues of :math:`\mathrm{sym}(U_c^* H V_c)`; a zero one the singular values of
    :math:`U_0^* H V_0`, to second order those of :math:`U_0^* (H - x H A^+ H) V_0` (theory 1.8). A simple positive
    value is a tie of one, with its ordinary derivative.

    Parameters
    ----------
    A, H : array, shape (m, n)
        The matrix and the direction.
    k : int
        Index of the singular value, 0 being the largest.
    gap_tol : float, optional
        Distance, relative to the largest value, below which two values (or a value and zero) count as equal.
        Default, and least, 10 max(m, n) eps, the error of the decomposition.

    Returns
    -------
    OneSided

    Raises
    ------
    NonFiniteError, IndexError, TypeError, ValueError
        An argument is not as described.
    OverflowError
        The value, or a derivative, exceeds the range of the dtype.

    Examples
    --------
    The values of [[1, x], [x, 1]] are 1 + x and 1 - x; those of a zero matrix are x times those of H:

    >>> import numpy as np
    >>> from specpert import one_sided_derivatives
    >>> print(one_sided_derivatives(np.eye(2), np.array([[0.0, 1.0], [1.0, 0.0]])).derivatives)
    [ 1. -1.]
    >>> zero = one_sided_derivatives(np.zeros((2, 2)), np.diag([3.0, -4.0]))
    >>> print(zero.derivatives, zero.values(0.5))
    [4. 3.] [2.  1.5]
    """
    if gap_tol is not None:
        check_fraction(gap_tol, "gap_tol")
    xp, (A, H) = as_arrays(A, H, names=["A", "H"])
    _check_single(A, H, xp)
    index = check_indices(k, min(A.shape))
    if not isinstance(index, int):
        raise TypeError(f"expected one index k, got {index}")
    e, t = exponent(magnitude(A, xp), xp), exponent(magnitude(H, xp), xp)
    A, H = ldexp(A, -e, xp), ldexp(H, -t, xp)  # each to about one; x in these units is x 2^(t - e)
    U, s, Vh = xp.linalg.svd(A, full_matrices=True)
    values = [float(x) for x in s]
    tol = max(10 * max(A.shape) * eps(A, xp), gap_tol or 0.0) * values[0]
    low = high = index
    while low > 0 and values[low - 1] - values[low] <= tol:
        low -= 1
    while high + 1 < len(values) and values[high] - values[high + 1] <= tol:
        high += 1
    if values[high] <= tol:  # tied with zero
        rank = low
        U0, V0 = U[:, rank:], adjoint(Vh, xp)[:, rank:]
        Y, W = U[:, :rank], adjoint(Vh, xp)[:, :rank]
        first = adjoint(U0, xp) @ H @ V0
        second = ((adjoint(U0, xp) @ H @ W) / s[:rank]) @ (adjoint(Y, xp) @ H @ V0)  # U_0^* H A^+ H V_0
        of_zero = partial(_of_zero, first, second, e, t)
        derivatives = finite(ldexp(xp.linalg.svdvals(first), t, xp), "derivatives", xp)
        return OneSided(tuple(range(rank, len(values))), 0.0, derivatives, of_zero)
    cluster = tuple(range(low, high + 1))
    series = sigma_series(A, H, 2, k=cluster)
    first = series.effective_matrices[1, :, :]
    derivatives = xp.sort(xp.linalg.eigvalsh((first + adjoint(first, xp)) / 2), descending=True)
    value = float(finite(ldexp(s[index], e, xp), "value", xp, OF_MATRIX))
    derivatives = finite(ldexp(derivatives, t, xp), "derivatives", xp)
    return OneSided(cluster, value, derivatives, partial(_of_tie, series, e, t))


def _of_zero(first: Array, second: Array, e: Array, t: Array, x: float) -> Array:
    """The values at 2^(e - t) x of what is zero at x = 0, from U_0^* H V_0 and U_0^* H A^+ H V_0."""
    xp = namespace(first)
    scaled = array(_in_units(x, e, t), e, xp)
    what = f"values at x = {x}"
    with np.errstate(over="ignore", invalid="ignore"):
        matrix = finite(first - scaled * second, what, xp)
        return finite(ldexp(scaled * xp.linalg.svdvals(matrix), e, xp), what, xp)


def _of_tie(series: ClusterSeries, e: Array, t: Array, x: float) -> Array:
    """Those of a tie, from its series."""
    xp = namespace(e)
    return finite(ldexp(series.values(_in_units(x, e, t)), e, xp), f"values at x = {x}", xp)


def _in_units(x: float, e: Array, t: Array) -> float:
    """X 2^(t - e), the argument for directions and values of the order of one."""
    xp = namespace(e)
    with np.errstate(over="ignore"):
        return float(finite(ldexp(array(x, e, xp), t - e, xp), f"values at x = {x}", xp))


def _check_single(A: Array, H: Array, xp: Any) -> None:
    check_matrix(A, "A", xp)
    check_direction(H, "H", A.shape, xp)
    for X, what in ((A, "matrix A"), (H, "direction H")):
        if X.ndim > 2:
            raise ValueError(f"expected one {what} (m, n), got a stack of shape {tuple(X.shape)}; take one at a time")
