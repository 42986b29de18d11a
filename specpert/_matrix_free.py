"""Singular triplets of sparse arrays and operators, which are only multiplied with.

Legend: A (..., m, n), r = min(m, n); s (..., r) singular values; c number of values asked for; d isolation distance in
the spectrum of T0 = [[0, A], [A^*, 0]] (theory 1.9). All private arrays are those of A / 2^e.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from specpert._arrays import (
    as_arrays,
    check_matrix,
    exponent,
    is_numpy,
)
from specpert._checks import check_indices
from specpert._dense import by_dense, check_start, of_series, on_smaller_side
from specpert._isolation import isolation
from specpert._operators import Operator, as_operator, is_operator
from specpert._resolvent import SmallSideResolvent
from specpert._solvers import IterativeSolver, Product
from specpert._top import NOISE, top_of_gram
from specpert.result import (
    NonFiniteError,
    ZeroSingularValueError,
)
from specpert.triplet import SingularTriplet, as_tuple


def by_operator(A: Any, k: int | Sequence[int], cluster: bool, gap_tol: float | None, v0: Any) -> SingularTriplet:
    """Triplet k of a matrix known by its products: Lanczos on K, conjugate gradients for the resolvent."""
    if not is_operator(A):
        xp, (A,) = as_arrays(A, names=["A"])
        check_matrix(A, "A", xp)
        if not is_numpy(A):
            raise TypeError(f"expected a NumPy array for method='lanczos', got {type(A).__name__}")
        A = A.astype(np.result_type(A.dtype, np.float64), copy=False)
    B = as_operator(A, "A")
    m, n = B.shape
    check_start(v0, (m, n), np.iscomplexobj(np.empty(0, B.dtype)))
    if isinstance(v0, SingularTriplet):
        v0 = v0.v
    index = check_indices(k, min(m, n), cluster=cluster)
    if min(m, n) <= max(2 * (max(as_tuple(index)) + 2), 32):  # too small for Lanczos to pay
        xp, (dense,) = as_arrays(B.dense(), names=["A"])
        return by_dense(dense, index, gap_tol, cluster, "svd", xp)
    if isinstance(index, tuple):
        raise TypeError(
            f"expected one index k for a sparse array or operator, got {index}; give a dense array (A.toarray())"
            + ("" if cluster else ", or ask for one after the other")
        )
    if B.size == 0:
        raise ZeroSingularValueError("expected a singular value above zero, got a matrix of zeros")
    e = float(exponent(np.asarray(B.size), np))
    B = B.scaled(e)
    wide = m <= n
    first, second = (B.apply, B.apply_adjoint) if wide else (B.apply_adjoint, B.apply)
    gram = partial(_after, first, second)
    w, X, following = top_of_gram(gram, min(m, n), index + 1, _start(v0, B, wide), B.dtype)
    u = X[:, index : index + 1]
    v = second(u)
    sigma = float(np.linalg.norm(v))
    if sigma == 0:
        raise ZeroSingularValueError(f"expected a singular value above zero, got sigma_{index} = 0")
    v /= sigma
    residual = float(np.linalg.norm(first(v) - sigma * u))
    xp, _ = as_arrays(u, names=["u"])
    s = np.sqrt(np.maximum(np.append(w - NOISE * w[0], following), 0.0))
    s[index], s[-1] = sigma, min(float(s[-1]), sigma)
    tol = 10 * max(m, n) * float(np.finfo(float).eps) if gap_tol is None else gap_tol
    gap, status = isolation(s, (index,), True, False, tol, xp)
    margin = np.asarray(10 * max(m, n) * float(np.finfo(float).eps) * s[0] + residual)
    solver = IterativeSolver(gram, X, w, index, sigma)
    resolvent = SmallSideResolvent(solver, (first, second), u, v, np.array([sigma]), mirrored=not wide)
    series = partial(of_series, resolvent, None)
    P0, Q0 = (u, v) if wide else (v, u)
    values, real = s[index : index + 1], np.dtype(np.float64)
    return SingularTriplet(index, (m, n), status, xp, np.asarray(e), values, P0, Q0, gap, margin, series, real)


def _after(first: Product, second: Product, x: np.ndarray) -> np.ndarray:
    """One product after the other."""
    return first(second(x))


def _start(v0: Any, B: Operator, wide: bool) -> np.ndarray:
    """Start vector of Lanczos on the smaller side.

    A little of a random vector (of a fixed seed) is mixed into the caller's, which may lie in an invariant subspace.
    """
    start: np.ndarray = np.random.default_rng(0).standard_normal(min(B.shape)).astype(B.dtype)
    if v0 is None:
        return start
    column = on_smaller_side(v0, B.apply, B.dtype, wide)
    if column is None:
        raise NonFiniteError("expected v0 not to be in the null space of A, got A v0 = 0")
    return column[:, 0] + 1e-4 * start / float(np.linalg.norm(start))
