"""Kernels in terms of the array API and of NumPy.

Legend: U (B, m, r), s (B, r), Vh (B, r, n) thin SVDs; H (B, m, n) directions; out (B, N + 1) coefficients.
"""

from __future__ import annotations

import numpy as np

from specpert._arrays import Array, adjoint, array, namespace
from specpert._recursion import Vectors, extend, value_coefficients
from specpert._resolvent import ThinSVDResolvent


def direction_series(U: Array, s: Array, Vh: Array, H: Array, k: int, out: Array) -> None:
    """Coefficients of sigma_k(A + x H) into out (theory 1.4, 1.5)."""
    xp = namespace(U)
    V, Ha = adjoint(Vh, xp), adjoint(H, xp)
    order, e = out.shape[-1] - 1, s[..., k : k + 1]
    excluded = array([[i == k] for i in range(s.shape[-1])], s, xp, dtype=xp.bool)
    vectors = Vectors([(lambda Q: H @ Q, lambda P: Ha @ P)], U[..., k : k + 1], V[..., k : k + 1])
    E = extend(vectors, ThinSVDResolvent(U, s, V, e, excluded), e[..., None], False, order // 2, xp)
    for n, lam in enumerate(value_coefficients(vectors, E, order, xp)):
        out[..., n] = lam[..., 0]


def add_product(A: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    """Add A x to out (..., m, c), in the precision of out: A (m, n) is widened block by block, in the cache."""
    if A.flags.c_contiguous:
        rows = max(1, 2**17 // A.shape[1])
        for start in range(0, len(A), rows):
            out[..., start : start + rows, :] += A[start : start + rows].astype(out.dtype) @ x
    else:  # a transposed view, whose columns lie together
        columns = max(1, 2**17 // len(A))
        for start in range(0, A.shape[1], columns):
            out += A[:, start : start + columns].astype(out.dtype) @ x[..., start : start + columns, :]
