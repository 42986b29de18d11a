"""Prepare once: checks, and the way to a singular triplet.

Legend: A (..., m, n), r = min(m, n); s (..., r) singular values; c number of values asked for; d isolation distance in
the spectrum of T0 = [[0, A], [A^*, 0]] (theory 1.9). All private arrays are those of A / 2^e.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from specpert._arrays import (
    as_arrays,
    is_numpy,
    real_dtype,
)
from specpert._checks import check_choice, check_direction, check_fraction
from specpert._dense import by_dense
from specpert._matrix_free import by_operator
from specpert._operators import as_operator, is_operator
from specpert.triplet import SingularTriplet, cast

METHODS = ("auto", "svd", "gram", "lanczos")


def singular_triplet(
    A: Any,
    k: int | Sequence[int] = 0,
    *,
    v0: Any = None,
    method: str = "auto",
    gap_tol: float | None = None,
    rtol: float = 0.0,
    dtype: Any = None,
) -> SingularTriplet:
    """Singular value k of A with its vectors, isolation distance and reduced resolvent.

    Parameters
    ----------
    A : array, shape (..., m, n), scipy.sparse array, or LinearOperator
        Real or complex matrix or stack of matrices, of NumPy or any library of the array API.
    k : int or sequence of int
        Index of the value, 0 being the largest; a sequence asks for several, which share one decomposition.
    v0 : array, shape (n,), or SingularTriplet, optional
        Start for the right singular vector, for example that of a matrix nearby, or that matrix's triplet itself, of
        which more can be used; by Lanczos and, for a min(m, n) of 256 or more, by the Gram method. It saves time and
        changes nothing else.
    method : {"auto", "svd", "gram", "lanczos"}
        A thin SVD; for the largest value of one NumPy matrix the Gram matrix of the smaller side with a Cholesky
        factorisation, many times faster and as accurate for k = 0; or Lanczos with conjugate gradients, for sparse
        arrays and operators. "auto" takes the fastest that is as accurate as the SVD.
    gap_tol : float, optional
        Distance to the next singular value, relative to the largest one, below which the value counts as tied.
        Default 10 max(m, n) eps, the error of the decomposition itself. A Gram matrix is decomposed in float64; there
        it is at least 10 eps of the precision of the results.
    rtol : float
        Relative accuracy asked of Hessian forms; diagonals have four times that. From 1e-6 on, the Gram method may take
        them from a factorisation in single precision, where the gap is wide enough for that, and the isolation distance
        may then be 2e-4 + 5 rtol too small, relative to it; singular value, vectors and series have full accuracy all
        the same.
    dtype : dtype, optional
        Precision of the results: A's own (default), or float64 for a float32 matrix that is meant exactly as it is;
        for a complex matrix either name of the precision will do. The Gram method makes no copy of the matrix for that.

    Returns
    -------
    SingularTriplet

    Raises
    ------
    IndexError
        k is not in 0 ... min(m, n) - 1.
    DegenerateSingularValueError
        The value is tied with another.
    ZeroSingularValueError
        The value is zero.
    ConvergenceError
        Lanczos did not converge.
    NonFiniteError, ValueError, TypeError
        A is not a finite floating or integer matrix.

    Examples
    --------
    >>> from specpert import singular_triplet
    >>> triplet = singular_triplet([[3.0, 0.0], [0.0, 1.0]], k=1)
    >>> float(triplet.sigma), float(triplet.gap)
    (1.0, 2.0)
    """
    check_choice(method, "method", METHODS)
    check_fraction(rtol, "rtol")
    if isinstance(A, SingularTriplet) and (rtol or dtype is not None):
        raise ValueError("expected no rtol or dtype beside a triplet, which is already made; give them with the matrix")
    triplet, _ = prepare(A, k, [], [], cluster=False, gap_tol=gap_tol, method=method, v0=v0, rtol=rtol, dtype=dtype)
    return triplet


def prepare(
    A: Any,
    k: int | Sequence[int],
    directions: list[Any],
    names: list[str],
    *,
    cluster: bool,
    gap_tol: float | None = None,
    method: str = "auto",
    v0: Any = None,
    rtol: float = 0.0,
    dtype: Any = None,
    widen: bool = True,
) -> tuple[SingularTriplet, list[Any]]:
    """The triplet of A (or the one given in its place) and directions of its library, device, dtype and shape.

    Without `widen` NumPy directions keep a lower precision than the triplet's vectors have: they are only multiplied.
    """
    prepared = isinstance(A, SingularTriplet)
    if prepared:
        _check_request(A, k, cluster, gap_tol)
    if gap_tol is not None:
        check_fraction(gap_tol, "gap_tol")
    if is_operator(A) or any(is_operator(H) for H in directions) or (not prepared and method == "lanczos"):
        if dtype is not None:
            raise ValueError(
                f"expected no dtype beside an operator or method='lanczos', which has float64, got {dtype}"
            )
        if method in ("svd", "gram"):
            raise ValueError(f"expected a dense array for method={method!r}, got {type(A).__name__}; convert it to one")
        if not (prepared or is_operator(A) or method == "lanczos" or isinstance(k, int | np.integer)):
            raise TypeError(
                f"expected dense directions for k = {k}, got a sparse one or an operator; make an array of it"
            )
        return _prepare_operators(A, k, directions, names, cluster, gap_tol, v0)
    if v0 is not None and (prepared or method == "svd"):
        what = "a triplet" if prepared else "method='svd'"
        raise ValueError(f"expected no v0 with {what}, which does not start from one")
    if not prepared:
        xp, (A, *arrays) = as_arrays(A, *directions, names=["A", *names])
        triplet = by_dense(A, k, gap_tol, cluster, method, xp, v0, rtol, dtype)
    else:
        triplet, xp, arrays = A, A._xp, []
        if directions:
            xp, (P0, *arrays) = as_arrays(A._P0, *directions, names=["the triplet", *names], promote=False)
            results = xp.result_type(A._dtype, *(real_dtype(H.dtype, xp) for H in arrays))
            wide = xp.result_type(P0, *arrays)
            triplet = replace(A if wide == P0.dtype else cast(A, wide), _dtype=results)
    for H, name in zip(arrays, names, strict=True):
        check_direction(H, name, triplet.shape, xp)
    if not widen and is_numpy(triplet._P0):
        return triplet, arrays
    return triplet, [xp.astype(H, triplet._P0.dtype, copy=False) for H in arrays]


def _check_request(triplet: SingularTriplet, k: Any, cluster: bool, gap_tol: float | None) -> None:
    """Raise where a prepared triplet is asked for what it does not hold; k = 0 stands for "its own"."""
    if triplet._cluster and isinstance(k, list):
        raise TypeError(f"expected a triplet of single values for the list k = {k}, got that of a cluster {triplet.k}")
    own = list(triplet._indices)
    asked = np.ravel(np.asarray(k)).tolist()
    if asked not in ([0], own) or (cluster and not triplet._cluster):
        raise ValueError(f"expected the k = {triplet.k} of the triplet, or none, got k = {k}; prepare another triplet")
    if gap_tol is not None:
        raise ValueError("expected no gap_tol beside a triplet, which is already isolated; give it to singular_triplet")


def _prepare_operators(
    A: Any,
    k: int | Sequence[int],
    directions: list[Any],
    names: list[str],
    cluster: bool,
    gap_tol: float | None,
    v0: Any,
) -> tuple[SingularTriplet, list[Any]]:
    """As `prepare`, where the matrix or a direction is only multiplied with."""
    if isinstance(A, SingularTriplet):
        triplet = A
        if not is_numpy(A._P0):
            raise TypeError("expected directions of the triplet's array library, got a SciPy operator")
    else:
        triplet = by_operator(A, k, cluster, gap_tol, v0)
    operators = []
    for H, name in zip(directions, names, strict=True):
        if not is_operator(H):
            _, (H,) = as_arrays(H, names=[name])
            if not is_numpy(H):
                raise TypeError(f"expected {name} as a NumPy array beside SciPy operators, got {type(H).__name__}")
            check_direction(H, name, triplet.shape, np)
            if H.ndim > 2:
                operators.append(H.astype(np.result_type(H, triplet._P0), copy=False))
                continue
        H = as_operator(H, name)
        if H.shape != tuple(triplet.shape[-2:]):
            raise ValueError(f"expected {name} of shape {tuple(triplet.shape[-2:])} like A, got {H.shape}")
        operators.append(H)
    return triplet, operators
