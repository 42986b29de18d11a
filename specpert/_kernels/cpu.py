"""The same in Numba, for NumPy arrays: the only file that imports numba.

The compiled code is cached on disk, so that it is made once for each machine and not in every process. Fast-math stays
off: it would reorder the sums on which the accuracy of the residuals rests. Products with a matrix in single precision,
summed in double, may be reordered as in any BLAS.
"""

from __future__ import annotations

import numba
import numpy as np

from specpert._kernels import agnostic
from specpert._resolvent import SMALL

njit = numba.njit(cache=True, fastmath=False, nogil=True)
njit_sums = numba.njit(cache=True, fastmath={"reassoc", "contract"}, nogil=True)


@njit
def direction_series(U, s, Vh, H, k, out):  # type: ignore[no-untyped-def]
    """Coefficients of sigma_k(A + x H) into out; see the agnostic kernel (theory 1.4, 1.5)."""
    B, m = U.shape[:2]
    n, order = Vh.shape[2], out.shape[1] - 1
    last = order // 2
    P, F = np.empty((last + 1, m), U.dtype), np.empty((last + 1, m), U.dtype)  # F_j = H Q_j
    Q, G = np.empty((last + 1, n), U.dtype), np.empty((last + 1, n), U.dtype)  # G_j = H^* P_j
    f, g = np.empty(m, U.dtype), np.empty(n, U.dtype)
    for i in range(B):
        P[0] = U[i, :, k]
        Q[0] = np.conj(Vh[i, k])
        out[i, 0] = s[i, k]
        for j in range(last + 1):
            apply_pair(H[i], Q[j], P[j], F[j], G[j])
            if j < last:
                lam = (inner(P[0], F[j]) + inner(Q[0], G[j])) / 2
                out[i, j + 1] = lam
                f[:], g[:] = F[j], G[j]
                for l in range(1, j + 1):
                    f -= out[i, l] * P[j + 1 - l]
                    g -= out[i, l] * Q[j + 1 - l]
                along = 0.0  # what the lower orders ask for along (u, -v), so that ||P(x)|| = ||Q(x)||
                for l in range(1, j + 1):
                    along += inner(Q[l], Q[j + 1 - l]) - inner(P[l], P[j + 1 - l])
                resolvent(U[i], s[i], Vh[i], k, f, g, along / 4, P[j + 1], Q[j + 1])
        for N in range(last + 1, order + 1):
            b = (N - 1) // 2
            a = N - 1 - b
            total = inner(P[a], F[b]) + inner(Q[a], G[b])
            for j in range(1, b + 1):
                for l in range(1, min(a, N - 1 - j) + 1):
                    total -= out[i, N - j - l] * (inner(P[l], P[j]) + inner(Q[l], Q[j]))
            out[i, N] = total / 2


@njit
def inner(x, y):  # type: ignore[no-untyped-def]
    """Real part of x^* y."""
    total = 0.0
    for i in range(x.shape[0]):
        total += x[i].real * y[i].real + x[i].imag * y[i].imag
    return total


@njit
def apply_pair(H, q, p, f, g):  # type: ignore[no-untyped-def]
    """Put H q into f and H^* p into g in one pass over H."""
    g[:] = 0
    for a in range(H.shape[0]):
        total = q[0] * 0  # a zero of the right type; f is not filled yet
        for b in range(H.shape[1]):
            h = H[a, b]
            total += h * q[b]
            g[b] += np.conj(h) * p[a]
        f[a] = total


@njit
def resolvent(U, s, Vh, k, f, g, along, x, y):  # type: ignore[no-untyped-def]
    """Minus the reduced resolvent from a thin SVD, into x and y (theory 1.4); `along` as in `_recursion.balanced`."""
    m, r = U.shape
    n, e = Vh.shape[1], s[k]
    x[:] = 0
    y[:] = 0
    careful = e < SMALL * s[0]  # then what is outside is not made of two large parts
    for i in range(r):
        al = f[0] * 0
        be = f[0] * 0
        for a in range(m):
            al += np.conj(U[a, i]) * f[a]
        for b in range(n):
            be += Vh[i, b] * g[b]
        if i == k:
            xi = (al - be) / (4 * e)
            xi += along - xi.real
            yi = -xi
        else:
            denominator = (e - s[i]) * (e + s[i])
            xi = (e * al + s[i] * be) / denominator
            yi = (s[i] * al + e * be) / denominator
        # what lies outside the thin SVD is divided by sigma: add U (xi - al / e) and f / e
        if m > r and not careful:
            xi -= al / e
        if n > r and not careful:
            yi -= be / e
        for a in range(m):
            x[a] += U[a, i] * xi
        for b in range(n):
            y[b] += np.conj(Vh[i, b]) * yi
    if m > r:
        rest = outside(np.conj(U.T), f) if careful else f
        for a in range(m):
            x[a] += rest[a] / e
    if n > r:
        rest = outside(Vh, g) if careful else g
        for b in range(n):
            y[b] += rest[b] / e


@njit
def outside(rows, f):  # type: ignore[no-untyped-def]
    """What is left of f without the span of the adjoints of orthonormal rows, which are taken off twice."""
    rest = f.copy()
    for _ in range(2):
        for i in range(rows.shape[0]):
            part = f[0] * 0
            for a in range(len(rest)):
                part += rows[i, a] * rest[a]
            for a in range(len(rest)):
                rest[a] -= np.conj(rows[i, a]) * part
    return rest


def add_product(A: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    """Add A x to out; compiled for a few real columns, for more BLAS on blocks is faster."""
    plain = x.ndim == 2 and x.shape[1] <= 2 and (A.dtype, x.dtype) == (np.float32, np.float64)
    if not (plain and (A.flags.c_contiguous or A.flags.f_contiguous)):
        agnostic.add_product(A, x, out)
        return
    for xj, outj in zip(np.ascontiguousarray(x.T), out.T, strict=True):
        if A.flags.c_contiguous:
            add_rows(A, xj, outj)
        else:
            add_columns(A.T, xj, outj)


@njit_sums
def add_rows(A, x, out):  # type: ignore[no-untyped-def]
    """Add A x to out; four rows at a time read x once."""
    m, n = A.shape
    whole = m - m % 4
    for i in range(0, whole, 4):
        a = b = c = d = 0.0
        for j in range(n):
            a += A[i, j] * x[j]
            b += A[i + 1, j] * x[j]
            c += A[i + 2, j] * x[j]
            d += A[i + 3, j] * x[j]
        out[i] += a
        out[i + 1] += b
        out[i + 2] += c
        out[i + 3] += d
    for i in range(whole, m):
        a = 0.0
        for j in range(n):
            a += A[i, j] * x[j]
        out[i] += a


@njit_sums
def add_columns(At, x, out):  # type: ignore[no-untyped-def]
    """Add A x to out, from the transpose of A; four columns at a time write out once."""
    n, m = At.shape
    whole = n - n % 4
    for j in range(0, whole, 4):
        for i in range(m):
            first = At[j, i] * x[j] + At[j + 1, i] * x[j + 1]
            out[i] += first + (At[j + 2, i] * x[j + 2] + At[j + 3, i] * x[j + 3])
    for j in range(whole, n):
        for i in range(m):
            out[i] += At[j, i] * x[j]
