r"""The second derivative of a singular value as an operator, never dense unless asked (theory 1.3).

In coordinates a = U^* G v, b = V^* G^* u the form is diagonal but for pairs (a_i, b_i):
D^2 sigma[G, G] = sum_i direct_i (|a_i|^2 + |b_i|^2) + 2 cross_i Re(conj(a_i) b_i)
                + (||p - U a||^2 + ||q - V b||^2) / sigma.

Legend: G (..., m, n) directions; p = G v (..., m), q = G^* u (..., n); U, s, V thin SVD, r = min(m, n);
direct_i = sigma / (sigma^2 - s_i^2), cross_i = s_i / (sigma^2 - s_i^2); for i = k they are +-1 / (4 sigma).
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from specpert._arrays import (
    Array,
    Namespace,
    Portable,
    adjoint,
    array,
    as_arrays,
    check_matrix,
    exponent,
    eye,
    finite,
    from_host,
    host_view,
    is_complex,
    is_numpy,
    ldexp,
    magnitude,
    real,
    real_dtype,
    scalar,
    square,
)
from specpert._checks import check_shape
from specpert._operators import is_operator
from specpert._recursion import balanced
from specpert._resolvent import HostResolvent, SmallSideResolvent, is_small
from specpert.prepare import prepare
from specpert.result import NonFiniteError
from specpert.triplet import SingularTriplet, cast

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class SigmaHessian(Portable):
    """Second derivative of sigma_k at A: a symmetric form on m x n matrices, of rank at most m + n - 2 if A is real.

    It is positive semidefinite for k = 0 only (convexity of the norm); for k > 0 the values 1 / (sigma_k - s_i) of the
    larger singular values are negative. For complex A it is a real form on the real vector space of complex matrices.

    Parameters
    ----------
    A : array, shape (..., m, n), or SingularTriplet
        The matrix, or what :func:`singular_triplet` prepared from it.
    k : int
        Index of the singular value, 0 being the largest.

    Raises
    ------
    DegenerateSingularValueError, ZeroSingularValueError, NonFiniteError, IndexError, TypeError, ValueError
        As :func:`singular_triplet`.

    Examples
    --------
    sigma_0 of [3, x] is sqrt(9 + x^2), with second derivative 1/3 at x = 0:

    >>> import numpy as np
    >>> from specpert import SigmaHessian
    >>> H = SigmaHessian([[3.0, 0.0]])
    >>> print(H.dense().reshape(2, 2))
    [[0.         0.        ]
     [0.         0.33333333]]
    >>> bool(np.isclose(H.trace(), 1 / 3) and np.isclose(H.quadratic(np.array([[5.0, 3.0]])), 3.0))
    True
    """

    def __init__(self, A: Any, k: int = 0) -> None:
        if is_operator(A):
            raise TypeError(
                f"expected a dense array or a triplet, got {type(A).__name__}; prepare it with singular_triplet(A)"
            )
        triplet, _ = prepare(A, k, [], [], cluster=False, method="svd")
        if not isinstance(triplet.k, int):
            raise TypeError(
                f"expected one singular value, k an int, got k = {triplet.k}; take one SigmaHessian for each"
            )
        self.triplet = triplet
        self._xp = triplet._xp
        self._resolvent = triplet._resolvent()

    @property
    def _u(self) -> Array:
        return self.triplet._P0[..., 0]

    @property
    def _v(self) -> Array:
        return self.triplet._Q0[..., 0]

    @cached_property
    def _spectrum(self) -> _Spectrum:
        return _Spectrum(self.triplet)

    @cached_property
    def _all_values(self) -> Array:
        """All singular values of A / 2^e, descending."""
        if self.triplet._svd is not None:
            return self.triplet._svd[1]
        small = self.triplet._small_side
        assert small is not None
        return from_host(np.linalg.svd(small.whole, compute_uv=False), self.triplet._P0, self._xp)

    @property
    def shape(self) -> tuple[int, int]:
        """(m n, m n), the shape of the dense matrix for a real A."""
        m, n = self.triplet.shape[-2:]
        return m * n, m * n

    def quadratic(self, G: Any) -> Array:
        """D^2 sigma[G, G] for a matrix or a stack G (..., m, n), with the stack's shape (...)."""
        wider, G = self._promoted(self._direction(G))
        return wider._form(*wider._projections(G))

    def from_projections(self, p: Any, q: Any, *, rows: Any = None) -> Array:
        """D^2 sigma[G, G] from p = G v (..., m) and q = G^* u (..., n) alone (theory 2.4).

        Where G vanishes outside of some rows, as the gradient of a table of which few rows are read, `rows` (J,) may
        say which: p is then (..., J).

        Examples
        --------
        >>> import numpy as np
        >>> from specpert import SigmaHessian
        >>> A, G = np.random.default_rng(0).standard_normal((2, 9, 3))
        >>> H, rows = SigmaHessian(A), [1, 4]
        >>> G[[i for i in range(9) if i not in rows]] = 0.0
        >>> p, q = G @ H.triplet.v, G.T @ H.triplet.u
        >>> bool(np.isclose(H.from_projections(p[rows], q, rows=rows), H.quadratic(G)))
        True
        """
        xp, (_, p, q) = as_arrays(self.triplet._P0, p, q, names=["A", "p", "q"], promote=False)
        wider, p, q = self._promoted(p, q)
        m, n = self.triplet.shape[-2:]
        index = None if rows is None else self._row_indices(rows)
        width = m if index is None else len(index)
        if p.shape[-1:] != (width,) or q.shape[-1:] != (n,) or p.shape[:-1] != q.shape[:-1]:
            raise ValueError(
                f"expected p (..., {width}) and q (..., {n}) with equal leading axes, "
                f"got {tuple(p.shape)} and {tuple(q.shape)}"
            )
        if index is not None:  # one more coordinate, for all other rows
            p = xp.concat([p, xp.zeros((*p.shape[:-1], 1), dtype=p.dtype, device=p.device)], axis=-1)
        sizes = [magnitude(x[..., None, :], xp) for x in (p, q)]
        for size, name in zip(sizes, "pq", strict=True):
            if not bool(xp.all(xp.isfinite(size))):
                raise NonFiniteError(f"expected {name} to be finite, got NaN or inf in it")
        p, q, e = _of_order_one(p, q, xp.maximum(*sizes), xp)
        return wider._form(p, q, e, index)

    def _row_indices(self, rows: Any) -> np.ndarray:
        """As integers of NumPy; raises unless they are rows of A, each at most once."""
        view = host_view(rows)
        if view is None:
            view = rows.tolist() if hasattr(rows, "tolist") else rows
        index = np.array(view)  # of its own: what comes by DLPack may not be writable
        if index.size == 0:
            index = index.astype(np.int64)
        m = self.triplet.shape[-2]
        if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
            raise TypeError(f"expected rows (J,) of integers, got {index.dtype} of shape {index.shape}")
        if len(np.unique(index)) < len(index) or not np.all((index >= 0) & (index < m)):
            raise ValueError(f"expected rows of A, 0 ... {m - 1}, each once, got {index.tolist()[:10]} ...")
        return index

    def _form(self, p: Array, q: Array, e: Array, rows: np.ndarray | None = None) -> Array:
        """The form of 2^e (p, q), for p and q of the order of one."""
        xp = self._xp
        total = self.triplet._result(self._quadratic(p, q, rows))
        return finite(scalar(ldexp(total, 2 * e - self.triplet._e, xp)), "Hessian form", xp)

    def _quadratic(self, p: Array, q: Array, rows: np.ndarray | None = None) -> Array:
        """The form for A / 2^e; p is on all rows, or on some and has one number more."""
        xp, resolvent, small = self._xp, self._resolvent, self.triplet._small_side
        spectrum = None if self.triplet._svd is None else self._spectrum
        if rows is not None:
            m, n = self.triplet.shape[-2:]
            extra = min(m, n) if spectrum is not None else 1
            if len(rows) + extra < m and spectrum is not None:
                spectrum = spectrum.on(rows)
                p = xp.concat([p, xp.zeros((*p.shape[:-1], extra - 1), dtype=p.dtype, device=p.device)], axis=-1)
            elif len(rows) + extra < m and small is not None and small.mirrored and small.matrix is not None:
                assert isinstance(resolvent, SmallSideResolvent | HostResolvent)
                resolvent = resolvent.on(rows)
            else:
                places = np.full(m, len(rows))
                places[rows] = np.arange(len(rows))
                p = xp.take(p, array(places, p, xp, dtype=xp.int32), axis=-1)
        if spectrum is not None:
            return spectrum.quadratic(p, q)
        count = math.prod(p.shape[:-1])
        columns = (xp.matrix_transpose(xp.reshape(x, (count, x.shape[-1]))) for x in (p, q))
        assert isinstance(resolvent, SmallSideResolvent | HostResolvent)
        return xp.reshape(resolvent.quadratic(*columns), p.shape[:-1])

    def inner(self, factor: Any) -> Array:
        """<H, F^T F> = sum_i D^2 sigma[F_i, F_i] for a low-rank covariance given by its factor F (M, m, n).

        For a stack of matrices A (..., m, n) each is paired with the whole factor; shape (...).
        """
        F = self._direction(factor, stack=False)
        if F.ndim != 3:
            raise ValueError(f"expected a factor of shape (M, m, n), got {tuple(F.shape)}")
        lead = len(self.triplet.shape) - 2
        F = self._xp.reshape(F, (F.shape[0], *(1,) * lead, *F.shape[1:]))
        return scalar(self._xp.sum(self.quadratic(F), axis=0))

    def product(self, G: Any) -> Array:
        """The matrix H[G] (..., m, n) with <H[G], G'> = D^2 sigma[G, G'] for every G' (real part of the trace)."""
        wider, G = self._promoted(self._direction(G))
        xp, u, v = self._xp, wider._u, wider._v
        p, q, e = wider._projections(G)
        x, y = balanced(*wider._solve(p, q), 0.0, u[..., None], v[..., None], False, xp)
        product = x @ adjoint(v[..., None], xp) + u[..., None] @ adjoint(y, xp)
        product = wider.triplet._result(product)
        return finite(ldexp(product, (e - self.triplet._e)[..., None, None], xp), "Hessian product", xp)

    def _solve(self, p: Array, q: Array) -> tuple[Array, Array]:
        """The reduced resolvent on stacks of vectors, as columns (..., m, 1) and (..., n, 1)."""
        if self.triplet._svd is not None:
            x, y = self._resolvent(p[..., None], q[..., None])
            return x, y
        xp = self._xp
        count = math.prod(p.shape[:-1])
        columns = (xp.matrix_transpose(xp.reshape(x, (count, x.shape[-1]))) for x in (p, q))
        x, y = (xp.matrix_transpose(z) for z in self._resolvent(*columns))
        return xp.reshape(x, (*p.shape, 1)), xp.reshape(y, (*q.shape, 1))

    __matmul__ = product

    def eigenvalues(self) -> Array:
        """Non-zero eigenvalues in descending order, shape (..., m + n - 2) for real A (theory 1.3).

        ``1 / (sigma - s_i)`` and ``1 / (sigma + s_i)`` for each i != k, and ``1 / sigma`` ``|m - n|`` times; for
        complex A each twice, and ``1 / sigma`` once more.
        """
        xp, k, s, sigma = self._xp, self.triplet.k, self._all_values, self.triplet._values
        assert isinstance(k, int)
        others = [i for i in range(s.shape[-1]) if i != k]
        values = [2 * w[..., i] for w in _weights(s, sigma, k, xp) for i in others]
        sigma = sigma[..., 0]
        m, n = self.triplet.shape[-2:]
        values += [1 / sigma] * abs(m - n)
        if is_complex(self.triplet._P0, xp):
            values = values * 2 + [1 / sigma]
        if not values:
            return xp.zeros((*sigma.shape, 0), dtype=self.triplet._dtype, device=s.device)
        values = self.triplet._result(xp.stack(values, axis=-1))
        values = finite(ldexp(values, -self.triplet._e[..., None], xp), "Hessian", xp)
        return xp.sort(values, axis=-1, descending=True)

    def trace(self) -> Array:
        """Sum of the eigenvalues, shape (...)."""
        return scalar(self._xp.sum(self.eigenvalues(), axis=-1))

    def diagonal(self, rows: Any = None) -> Array:
        """D^2 sigma[E_pq, E_pq] for the unit matrices, shape (..., m, n).

        For complex A shape (..., m, n, 2): for the directions E_pq and i E_pq. With `rows` a_j, shape (J, n), along the
        matrices e_p a_j^T, shape (..., m, J): where A = X E for some X, the diagonal in X for the rows of E.

        Examples
        --------
        >>> import numpy as np
        >>> from specpert import SigmaHessian
        >>> X, E = np.random.default_rng(0).standard_normal((2, 3, 3))
        >>> H, G = SigmaHessian(X @ E), np.zeros((3, 3))
        >>> G[2, 1] = 1.0
        >>> bool(np.isclose(H.diagonal(rows=E)[2, 1], H.quadratic(G @ E)))
        True
        """
        xp = self._xp
        if rows is not None:
            return self._along_rows(rows)
        L, R, C = self._diagonal_blocks()
        u, v = self._u[..., :, None], self._v[..., None, :]
        left = L[..., :, None] * square(v, xp)
        right = square(u, xp) * R[..., None, :]
        cross = 2 * real(u * xp.conj(v) * C if is_complex(C, xp) else u * v * C, xp)
        if not is_complex(self.triplet._P0, xp):
            total = self.triplet._result(left + right + cross)
            return finite(ldexp(total, -self.triplet._e[..., None, None], xp), "Hessian", xp)
        both = self.triplet._result(xp.stack([left + right + cross, left + right - cross], axis=-1))
        return finite(ldexp(both, -self.triplet._e[..., None, None, None], xp), "Hessian", xp)

    def _along_rows(self, rows: Any) -> Array:
        """The diagonal along e_p a_j^T, whose projections are (a_j^T v) e_p and u_p conj(a_j)."""
        xp = self._xp
        _, (_, a) = as_arrays(self.triplet._P0, rows, names=["A", "rows"], promote=False)
        wider, a = self._promoted(a)
        *lead, m, n = self.triplet.shape
        if a.ndim != 2 or a.shape[1] != n:
            raise ValueError(f"expected rows of shape (J, {n}), got {tuple(a.shape)}")
        power = exponent(check_matrix(a, "rows", xp), xp)
        a = ldexp(a, -power, xp)
        L, _, C = wider._diagonal_blocks()
        q = xp.reshape(xp.conj(a) if is_complex(a, xp) else a, (a.shape[0], *(1,) * len(lead), n))
        q = q + xp.zeros((1, *lead, n), dtype=a.dtype, device=a.device)
        right = wider._quadratic(xp.zeros((*q.shape[:-1], m), dtype=a.dtype, device=a.device), q)
        u, seen = wider._u[..., :, None], wider._v[..., None, :] @ xp.matrix_transpose(a)  # (..., m, 1), (..., 1, J)
        cross = xp.astype(C, xp.result_type(C, a), copy=False) @ adjoint(a, xp)
        cross = 2 * real(u * xp.conj(seen) * cross if is_complex(cross, xp) else u * seen * cross, xp)
        total = L[..., :, None] * square(seen, xp) + square(u, xp) * xp.moveaxis(right, 0, -1)[..., None, :] + cross
        return finite(
            ldexp(wider.triplet._result(total), 2 * power - self.triplet._e[..., None, None], xp), "Hessian", xp
        )

    def _diagonal_blocks(self) -> tuple[Array, Array, Array]:
        """The diagonals of L and R, and C (theory 1.3), for A / 2^e."""
        if self.triplet._svd is not None:
            return self._spectrum.diagonal_blocks()
        assert isinstance(self._resolvent, SmallSideResolvent | HostResolvent)
        return self._resolvent.diagonal_blocks()

    def dense(self, layout: str = "tensor") -> Array:
        """The whole form; see :func:`sigma_hessian`."""
        from specpert.derivative import sigma_hessian

        return sigma_hessian(self.triplet, layout=layout)

    def as_linear_operator(self) -> LinearOperator:
        """SciPy LinearOperator on row-major vectors G.reshape(-1), for one NumPy matrix.

        For complex A on the real vectors G.reshape(-1).view(float), real and imaginary parts in turn.
        """
        from scipy.sparse.linalg import LinearOperator

        m, n = self.triplet.shape[-2:]
        if len(self.triplet.shape) > 2 or not is_numpy(self.triplet._P0):
            raise TypeError("expected one NumPy matrix for a SciPy operator, got a stack or another array")
        dtype = self.triplet._P0.dtype

        def matvec(x: np.ndarray) -> np.ndarray:
            G = np.ascontiguousarray(x, real_dtype(dtype, np)).view(dtype).reshape(m, n)
            return np.ascontiguousarray(self.product(G)).reshape(-1).view(G.real.dtype)

        size = m * n * (2 if np.iscomplexobj(self.triplet._P0) else 1)
        return LinearOperator((size, size), matvec=matvec, rmatvec=matvec, dtype=real_dtype(dtype, np))

    def _promoted(self, *arrays: Array) -> tuple[SigmaHessian, *tuple[Array, ...]]:
        """The form for arrays of a wider dtype, complex for a real matrix or more accurate, and the arrays in it."""
        xp, triplet = self._xp, self.triplet
        results = xp.result_type(triplet._dtype, *(real_dtype(x.dtype, xp) for x in arrays))
        wide = xp.result_type(triplet._P0, *arrays)
        arrays = tuple(xp.astype(x, wide, copy=False) for x in arrays)
        if wide == triplet._P0.dtype and results == triplet._dtype:
            return (self, *arrays)
        triplet = triplet if wide == triplet._P0.dtype else cast(triplet, wide)
        return (SigmaHessian(replace(triplet, _dtype=results)), *arrays)

    def _direction(self, G: Any, stack: bool = True) -> Array:
        """A direction, or stack, in its own precision."""
        _, (_, G) = as_arrays(self.triplet._P0, G, names=["A", "G"], promote=False)
        check_shape(G, "G", self.triplet.shape if stack else self.triplet.shape[-2:])
        return G

    def _projections(self, G: Array) -> tuple[Array, Array, Array]:
        """G v (..., m) and G^* u (..., n), of the order of one, and the exponents of two (...) taken out of them.

        They show NaN, inf and sizes out of the ordinary, so that no pass over G is spent on that.
        """
        xp, u, v = self._xp, self._u, self._v
        with np.errstate(over="ignore", invalid="ignore"):
            p, q = self._products(G, u, v)
        size = _size(p, q, xp)
        largest = float(xp.finfo(u.dtype).max) ** 0.5
        if not bool(xp.all((size > 1 / largest) & (size < largest))):
            power = exponent(check_matrix(G, "G", xp), xp)
            if bool(xp.any(power != 0)):  # else there is a zero among them
                p, q = self._products(ldexp(G, -power[..., None, None], xp), u, v)
                p, q, e = _of_order_one(p, q, _size(p, q, xp), xp)
                return p, q, e + power
        return _of_order_one(p, q, size, xp)

    def _products(self, G: Array, u: Array, v: Array) -> tuple[Array, Array]:
        if is_numpy(G) and G.ndim > 2 and u.ndim == 1:
            return _blocked_projections(G, u, v)
        return _times(G, v), _times(adjoint(G, self._xp), u)


def _at(k: int, s: Array, xp: Namespace) -> Array:
    """Where the k-th of the values s (..., r) is, (r,)."""
    return array([i == k for i in range(s.shape[-1])], s, xp, dtype=xp.bool)


def _weights(s: Array, sigma: Array, k: int, xp: Namespace) -> tuple[Array, Array]:
    """1 / (2 (sigma - s_i)), zero for i = k, and 1 / (2 (sigma + s_i)), (..., r)."""
    at_k = _at(k, s, xp)
    difference = xp.where(at_k, xp.ones_like(s), sigma - s)
    return xp.where(at_k, xp.zeros_like(s), 1 / (2 * difference)), 1 / (2 * (sigma + s))


class _Spectrum(Portable):
    """The form in the coordinates of a thin SVD, for A / 2^e."""

    def __init__(self, triplet: SingularTriplet) -> None:
        assert triplet._svd is not None
        assert isinstance(triplet.k, int)
        self.xp = xp = triplet._xp
        self.U, self.s, self.V = triplet._svd
        self.k = triplet.k
        s, sigma = self.s, triplet._values
        # direct +- cross: the form is sum_i minus_i |a_i + b_i|^2 + plus_i |a_i - b_i|^2, accurate near a close pair
        self.minus, self.plus = _weights(s, sigma, triplet.k, xp)
        if not is_complex(self.U, xp):  # a_k = b_k = u^T G v: what would be divided by sigma is nothing but rounding
            self.plus = xp.where(_at(triplet.k, s, xp), xp.zeros_like(s), self.plus)
        self.sigma, self.small = sigma[..., 0], is_small(sigma, s, xp)

    def on(self, rows: np.ndarray) -> _Spectrum:
        """For `quadratic` of p that vanish outside of these rows; they get r more coordinates, all 0.

        Those along what the columns of U have outside of the rows: inner products are those of the whole.
        """
        xp, m = self.xp, self.U.shape[-2]
        outside = array(~np.isin(np.arange(m), rows), self.U, xp, dtype=xp.bool)[:, None]
        rest = xp.where(outside, self.U, xp.zeros_like(self.U))
        w, X = xp.linalg.eigh(adjoint(rest, xp) @ rest)
        root = xp.astype(xp.sqrt(xp.clip(w, 0.0, None)), X.dtype)[..., :, None] * adjoint(X, xp)
        known = xp.take(self.U, array(rows, self.U, xp, dtype=xp.int32), axis=-2)
        other = copy(self)
        other.U = xp.concat([known, root], axis=-2)
        return other

    def quadratic(self, p: Array, q: Array) -> Array:
        """Forms (...) from projections (..., m), (..., n)."""
        xp, U, V = self.xp, self.U, self.V
        a, b = _times(adjoint(U, xp), p), _times(adjoint(V, xp), q)
        total = xp.sum(self.minus * square(a + b, xp) + self.plus * square(a - b, xp), axis=-1)
        m, n = p.shape[-1], q.shape[-1]
        if m > n:
            total = total + self._outside(p, a, U) / self.sigma
        if n > m:
            total = total + self._outside(q, b, V) / self.sigma
        return total

    def _outside(self, q: Array, b: Array, V: Array) -> Array:
        """||q - V b||^2 by Pythagoras; the part along v, which may be all of q and adds nothing, is taken off first.

        Divided by a small value rounding would count: then it is the norm of the residual, itself projected once more.
        """
        xp, k = self.xp, self.k
        if self.small:
            rest = q - _times(V, b)
            return xp.sum(square(rest - _times(V, _times(adjoint(V, xp), rest)), xp), axis=-1)
        rest = q - V[..., k] * b[..., k : k + 1]
        others = square(b, xp)
        inside = xp.sum(others[..., :k], axis=-1) + xp.sum(others[..., k + 1 :], axis=-1)
        return xp.clip(xp.sum(square(rest, xp), axis=-1) - inside, 0.0, None)

    def blocks(self) -> tuple[Array, Array, Array]:
        """L = U diag(direct) U^* + (I - U U^*) / sigma, R alike from V, and C = U diag(cross) V^*, for A / 2^e."""
        xp, U, V = self.xp, self.U, self.V
        Ua, Va = adjoint(U, xp), adjoint(V, xp)
        direct = (self.minus + self.plus)[..., None, :]
        cross = (self.minus - self.plus)[..., None, :]
        L, R, C = (U * direct) @ Ua, (V * direct) @ Va, (U * cross) @ Va
        sigma = self.sigma[..., None, None]
        m, n = U.shape[-2], V.shape[-2]
        if m > n:
            L = L + self._complement(U) / sigma
        if n > m:
            R = R + self._complement(V) / sigma
        return L, R, C

    def _complement(self, U: Array) -> Array:
        """I - U U^*, of a small value twice."""
        rest = eye(U.shape[-2], U, self.xp) - U @ adjoint(U, self.xp)
        return rest @ rest if self.small else rest

    def diagonal_blocks(self) -> tuple[Array, Array, Array]:
        """The diagonals of L and R, and C."""
        xp, U, V = self.xp, self.U, self.V
        direct, cross = (self.minus + self.plus)[..., None, :], (self.minus - self.plus)[..., None, :]
        base = 1 / self.sigma[..., None, None]
        L, R = (
            # 1 / sigma for what a thin SVD leaves out, and the rest for what it holds
            xp.sum(square(X, xp) * (direct - base), axis=-1) + base[..., 0]
            if X.shape[-2] > X.shape[-1]
            else xp.sum(square(X, xp) * direct, axis=-1)
            for X in (U, V)
        )
        return L, R, (U * cross) @ adjoint(V, xp)


def _blocked_projections(G: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both products in one pass over memory: a block of rows is still in the cache when it is used again."""
    m, n = G.shape[-2:]
    flat = G.reshape(-1, m, n)
    p = np.empty((len(flat), m), np.result_type(G, v))
    q = np.zeros((len(flat), n), p.dtype)
    rows = max(1, 2**17 // n)
    uc = u.conj()
    for Gi, pi, qi in zip(flat, p, q, strict=True):
        for start in range(0, m, rows):
            block = Gi[start : start + rows]
            pi[start : start + rows] = block @ v
            qi += uc[start : start + rows] @ block
    return p.reshape(G.shape[:-1]), q.conj().reshape(*G.shape[:-2], n)


def dense_hessian(hessian: SigmaHessian) -> Array:
    """Shape (..., m, n, m, n); for complex A (..., m, n, 2, m, n, 2) in the real coordinates of entries (Re, Im)."""
    xp, triplet = hessian._xp, hessian.triplet
    L, R, C = hessian._spectrum.blocks()
    u, v = hessian._u, hessian._v
    if not is_complex(u, xp):
        # H[p, q, :, :] = v_q (L_p v^T + u C_p) + u_p (u R_q + C_q v^T): two small matrices, one pass over the result
        left = L[..., :, :, None] * v[..., None, None, :] + u[..., None, :, None] * C[..., :, None, :]
        Ct = xp.matrix_transpose(C)
        right = u[..., None, :, None] * R[..., :, None, :] + Ct[..., :, :, None] * v[..., None, None, :]
        scaled = [ldexp(x, -triplet._e[..., None, None, None], xp) for x in (left, right)]
        left, right = (finite(x, "Hessian", xp) for x in scaled)
        if is_numpy(left) and left.ndim == 3:
            return _filled(u, v, left, right)
        return (
            v[..., None, :, None, None] * left[..., :, None, :, :]
            + u[..., :, None, None, None] * right[..., None, :, :, :]
        )
    uc, vc = xp.conj(u), xp.conj(v)
    # pairings of c E_pq with c' E_p'q': coefficients conj(c) c', c conj(c') and conj(c c')
    one = vc[..., None, :, None, None] * v[..., None, None, None, :] * L[..., :, None, :, None]
    two = uc[..., :, None, None, None] * u[..., None, None, :, None] * R[..., None, :, None, :]
    both = vc[..., None, :, None, None] * u[..., None, None, :, None] * C[..., :, None, None, :]
    Ct = xp.matrix_transpose(C)
    both = both + u[..., :, None, None, None] * vc[..., None, None, None, :] * Ct[..., None, :, :, None]
    rows = []
    for c in (1, 1j):
        row = []
        for d in (1, 1j):
            cc, dd = complex(c).conjugate(), complex(d).conjugate()
            row.append(xp.real(one * (cc * d) + two * (c * dd) + both * (cc * dd)))
        rows.append(xp.stack(row, axis=-1))  # (..., m, n, m, n, 2)
    dense = xp.stack(rows, axis=-4)  # (..., m, n, 2, m, n, 2)
    return finite(ldexp(dense, -triplet._e[..., None, None, None, None, None, None], xp), "Hessian", xp)


def _filled(u: np.ndarray, v: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """H[p, q] = v_q left_p + u_p right_q, one p after the other: what is added still fits in the cache."""
    dense = np.empty((len(u), len(v), *left.shape[1:]), left.dtype)
    for p in range(len(u)):
        np.multiply.outer(v, left[p], out=dense[p])
        dense[p] += u[p] * right
    return dense


def _times(M: Array, x: Array) -> Array:
    """M x for a stack of vectors x (..., n); one product where M is a single matrix and x a stack."""
    if M.ndim == 2 and x.ndim >= 2:
        return x @ M.T if x.ndim == 2 else (M @ x[..., None])[..., 0]
    return (M @ x[..., None])[..., 0]


def _size(p: Array, q: Array, xp: Any) -> Array:
    """The largest modulus of a part of each pair of vectors, (...)."""
    return xp.maximum(magnitude(p[..., None, :], xp), magnitude(q[..., None, :], xp))


def _of_order_one(p: Array, q: Array, size: Array, xp: Any) -> tuple[Array, Array, Array]:
    """P / 2^e, q / 2^e and e, for pairs of that size."""
    e = exponent(size, xp)
    return ldexp(p, -e[..., None], xp), ldexp(q, -e[..., None], xp), e
