"""The spectral norm alone, where neither vectors nor other singular values are wanted.

Legend: A (..., m, n), r = min(m, n); e exponent of two, A / 2^e is of the order of one.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np

from specpert._arrays import (
    Array,
    adjoint,
    array,
    as_arrays,
    check_matrix,
    eps,
    exponent,
    host_view,
    is_complex,
    ldexp,
    scalar,
)
from specpert._checks import check_fraction
from specpert._top import largest
from specpert.result import ConvergenceError

_EXPONENTS = 60  # of two, up to which products in single precision neither overflow nor lose digits
_LANCZOS_FROM = 64  # smaller side from which a few products beat a decomposition


def spectral_norm(A: Any, *, rtol: float = 0.0) -> Array:
    """Spectral norm of a matrix, its largest singular value; with `rtol` found by Lanczos and rounded up.

    Parameters
    ----------
    A : array, shape (..., m, n)
        Real or complex matrix or stack of matrices, of NumPy or any library of the array API.
    rtol : float
        How much too large the result may be, relative to it, beside rounding. For one matrix on the CPU with
        min(m, n) >= 64 a positive value saves the decomposition: Lanczos goes on until the residual of the singular
        pair is small, and what a random start (of a fixed seed) can have hidden by its small share in a vector is added
        to the value. Very likely the result is not too small; for a proof leave rtol at zero.

    Returns
    -------
    array, shape (...), of A's real dtype; infinite beyond its range

    Raises
    ------
    NonFiniteError, TypeError, ValueError
        A is not a finite matrix, or rtol is not as described.

    Examples
    --------
    >>> import numpy as np
    >>> from specpert import spectral_norm
    >>> print(spectral_norm([[3.0, 0.0], [0.0, -4.0]]))
    4.0
    >>> A = np.random.default_rng(0).standard_normal((100, 200))
    >>> bool(1 <= spectral_norm(A, rtol=1e-3) / spectral_norm(A) <= 1 + 1e-3)
    True
    """
    check_fraction(rtol, "rtol")
    xp, (A,) = as_arrays(A, names=["A"])
    size = check_matrix(A, "A", xp)
    if not bool(xp.any(size > 0)):
        return scalar(xp.zeros_like(size))
    e = exponent(size, xp)
    view = host_view(A) if rtol > 0 and A.ndim == 2 and min(A.shape) >= _LANCZOS_FROM else None
    if view is not None:
        with contextlib.suppress(ConvergenceError):
            bound = _by_lanczos(view, int(e), rtol) * (1 + eps(e, xp))  # it is rounded to the precision of results
            return scalar(ldexp(array(bound, e, xp), e, xp))
    scaled = ldexp(A, -e[..., None, None], xp)
    wide = scaled if A.shape[-2] <= A.shape[-1] else adjoint(scaled, xp)
    if rtol > 0 and view is None:  # squaring costs the largest value no accuracy
        w = xp.linalg.eigvalsh(wide @ adjoint(wide, xp))
        return scalar(ldexp(xp.sqrt(xp.clip(w[..., -1], 0.0, None)), e, xp))
    return scalar(ldexp(xp.max(xp.linalg.svdvals(wide), axis=-1), e, xp))


def _by_lanczos(A: np.ndarray, e: int, rtol: float) -> float:
    """||A / 2^e||_2, rounded up."""
    if abs(e) > _EXPONENTS:
        A, e = ldexp(A, np.asarray(-e, A.real.dtype), np), 0
    hidden = 2 * math.sqrt(min(A.shape))  # 1 / sqrt(r) is what a random start has of each vector
    share = rtol / (2 * hidden)
    low = np.complex64 if is_complex(A, np) else np.float32
    single = share >= 8 * float(np.finfo(np.float32).eps)
    B = A.astype(low if single else np.result_type(A.dtype, np.float64), copy=False)
    B = B if B.shape[0] <= B.shape[1] else adjoint(B, np)
    Ba = adjoint(B, np)
    start = np.random.default_rng(0).standard_normal((len(B), 1)).astype(B.dtype)
    unit = B.real.dtype.type(2.0**-e)  # of the vectors, which spares a copy of the matrix

    def product(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.asarray(unit * (matrix @ x))

    u = largest(lambda x: product(B, product(Ba, x)), start, share)
    v = product(Ba, u)
    sigma = float(np.linalg.norm(v))
    residual = float(np.linalg.norm(product(B, v / sigma) - sigma * u))
    return (sigma + hidden * residual) * (1 + 8 * float(np.finfo(B.dtype).eps))
