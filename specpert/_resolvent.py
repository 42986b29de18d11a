"""The one seam: minus the reduced resolvent of the Jordan-Wielandt matrix T0 = [[0, A], [A^*, 0]].

A resolvent is a function (f, g) -> (x, y) on columns f (..., m, c), g (..., n, c). Column j is solved with its own
eigenvalue e_j on the complement of the eigenvectors (u_i, v_i), i in the excluded set of that column (theory 1.4, 1.8).
The vectors (u_i, -v_i) stay in: leaving them out is the mistake of the published formula.

Legend: U (..., m, r), s (..., r), V (..., n, r) thin SVD; e (..., c) eigenvalues; excluded (r, c) boolean;
al = U^* f, be = V^* g (..., r, c); K = A A^* (m <= n) the Gram matrix of the smaller side.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import numpy as np

from specpert._arrays import Array, Namespace, Portable, adjoint, from_host, namespace, square
from specpert._solvers import CholeskySolver, Solver

Resolvent = Callable[[Array, Array], tuple[Array, Array]]


class ThinSVDResolvent:
    """Reduced resolvent from a thin SVD: two products with U and two with V for each call."""

    def __init__(self, U: Array, s: Array, V: Array, e: Array, excluded: Array) -> None:
        xp = namespace(U)
        self.U, self.V, self.Ua, self.Va = U, V, adjoint(U, xp), adjoint(V, xp)
        si, ej = s[..., :, None], e[..., None, :]
        denominator = xp.where(excluded, 2 * (ej + si), (ej - si) * (ej + si))
        # an excluded i keeps only (u_i, -v_i): x_i = (al_i - be_i) / (2 (s_i + e_j)) = -y_i
        direct = xp.where(excluded, 1 / denominator, ej / denominator)
        cross = xp.where(excluded, -1 / denominator, si / denominator)
        self.direct, self.cross, self.ej = xp.astype(direct, U.dtype), xp.astype(cross, U.dtype), ej
        self.small = is_small(e, s, xp)

    def __call__(self, f: Array, g: Array) -> tuple[Array, Array]:
        U, V, direct, cross = self.U, self.V, self.direct, self.cross
        al, be = self.Ua @ f, self.Va @ g
        x, y = U @ (direct * al + cross * be), V @ (cross * al + direct * be)
        # The residuals live in the null spaces of A^* and A, which a thin SVD leaves out.
        if U.shape[-2] > U.shape[-1]:
            x = x + self._outside(f - U @ al, U, self.Ua) / self.ej
        if V.shape[-2] > V.shape[-1]:
            y = y + self._outside(g - V @ be, V, self.Va) / self.ej
        return x, y

    def _outside(self, rest: Array, U: Array, Ua: Array) -> Array:
        """What is left of a residual: divided by a small value, its rounding errors would count."""
        return rest - U @ (Ua @ rest) if self.small else rest


def is_small(e: Array, s: Array, xp: Namespace) -> bool:
    """Whether values e (..., c) are so far below the largest of s (..., r) that 1 / e makes much of rounding errors."""
    return bool(xp.any(e < SMALL * s[..., :1]))


#: Below this share of the largest value, residuals are taken off the singular vectors twice.
SMALL = 0.1


class SmallSideResolvent:
    """Reduced resolvent by elimination of the larger side: two products with A and one small solve for each call.

    Eliminating y = (g + A^* x) / sigma from sigma x - A y = f, sigma y - A^* x = g leaves
    (sigma^2 I - K) x = sigma f + A g, which `solve` answers on the complement of u. With `mirrored` it is the resolvent
    of the adjoint: K is then A^* A. For a cluster u (m, c), v (n, c) and sigma (c,), and column j has its own sigma_j;
    for one value any number of columns. `matrix` is A (with `mirrored` A^*) in the precision of forms, where it is
    known.
    """

    def __init__(
        self,
        solve: Solver,
        products: tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]],
        u: np.ndarray,
        v: np.ndarray,
        sigma: np.ndarray,
        mirrored: bool,
        matrix: np.ndarray | None = None,
    ) -> None:
        self.matrix = matrix
        self.solve, self.u, self.v, self.sigma, self.mirrored = solve, u, v, sigma, mirrored
        self.apply, self.apply_adjoint = products
        self.sums = sigma[:, None] + sigma

    def __call__(self, f: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.mirrored:
            y, x = self._solve(g, f)
            return x, y
        return self._solve(f, g)

    def _solve(self, f: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, v = self.u, self.v
        # off the eigenvector (u, v)
        c = (u.conj().T @ f + v.conj().T @ g) / 2
        f, g = f - u @ c, g - v @ c
        x = self.solve(self.sigma * f + self.apply(g))
        # the part along u is not the equation's to fix: (x, y) is orthogonal to (u, v), which leaves that of (u, -v)
        x = x - u @ (u.conj().T @ x + v.conj().T @ g / self.sums)
        return x, (g + self.apply_adjoint(x)) / self.sigma

    def quadratic(self, f: np.ndarray, g: np.ndarray) -> np.ndarray:
        """Re((f, g)^* (x, y)) of each column (c,): (||g||^2 + r^* (sigma^2 I - K)^-1 r) / sigma, on one side only.

        Of one value; computed with the vectors as rows, which leaves the columns of r as LAPACK wants them.
        """
        if self.mirrored:
            f, g = g, f
        f, g, u, v = f.T, g.T, self.u.T, self.v.T
        a, b = f @ u.conj().T, g @ v.conj().T
        # what is along u and v may be nearly all there is: off with it before precision is lost
        f, g = f - a @ u, g - b @ v
        if self.matrix is not None and np.finfo(self.matrix.dtype).eps > np.finfo(f.dtype).eps:
            f, g = (x.astype(np.complex64 if np.iscomplexobj(x) else np.float32) for x in (f, g))
        r = self.apply(g.T).T if self.matrix is None else g @ self.matrix.T
        r = r + float(self.sigma[0]) * f
        r -= (r @ u.conj().T.astype(r.dtype)) @ u.astype(r.dtype)
        along = square((a - b)[:, 0], np) / 4  # (a - b) / 2 of v is left in g, whose image belongs to u
        total = np.einsum("ij,ij->i", g, g.conj()).real + along + self.solve.form(r.T)
        return np.asarray(total / self.sigma, self.sigma.dtype)

    def on(self, rows: np.ndarray) -> SmallSideResolvent:
        """For `quadratic` of vectors on the larger side that vanish outside of these rows of it; they get one more, 0.

        That is the coordinate along what v has outside of the rows: with it they are in the span of v and of the rows'
        unit vectors, where all inner products are those of the whole.
        """
        assert self.matrix is not None
        known, outside = self.v[rows], self.v.copy()
        outside[rows] = 0
        size = float(np.linalg.norm(outside))
        along = self.matrix @ (outside.astype(self.matrix.dtype) / (size or 1.0))
        other = copy(self)
        other.v = np.vstack([known, np.full((1, 1), size, known.dtype)])
        other.matrix = np.hstack([self.matrix[:, rows], along])
        return other

    def diagonal_blocks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of one value: diagonals (m,) and (n,) of the blocks L and R, and the block C (m, n) (theory 1.3)."""
        A, u, v, sigma = self.dense, self.u, self.v, float(self.sigma[0])
        solve = self.solve.accurate() if isinstance(self.solve, CholeskySolver) else self.solve
        S = solve.rough(np.eye(len(u), dtype=u.dtype) - u @ u.conj().T)
        S = S - u @ (u.conj().T @ S)
        C = S.astype(np.result_type(A, np.complex64) if np.iscomplexobj(S) else A.dtype, copy=False) @ A
        uu, vv = square(u[:, 0], np), square(v[:, 0], np)
        L = sigma * np.diagonal(S).real + uu / (4 * sigma)
        R = (1 + np.sum(A.real * C.real + A.imag * C.imag, axis=0)) / sigma - 0.75 * vv / sigma
        C = C - u @ v.conj().T / (4 * sigma)
        return (R, L, C.conj().T) if self.mirrored else (L, R, C)

    @property
    def dense(self) -> np.ndarray:
        """The `matrix`; raises TypeError where it is not known."""
        if self.matrix is None:
            raise TypeError("expected a triplet of a dense array, got one that knows only products with it")
        return self.matrix

    @property
    def whole(self) -> np.ndarray:
        """The matrix in the precision of the vectors, from a copy that was not rounded."""
        matrix = self.solve.gram.B if isinstance(self.solve, CholeskySolver) else self.dense
        return matrix.astype(self.u.dtype, copy=False)

    @property
    def residuals(self) -> list[float]:
        """Residual of each solve so far, as one of the Jordan-Wielandt equation; empty for a factorisation."""
        return [r / float(self.sigma[0]) for r in getattr(self.solve, "residuals", [])]


class HostResolvent(Portable):
    """A resolvent on NumPy arrays for arrays of another library in the same memory."""

    def __init__(self, resolvent: SmallSideResolvent, like: Array, xp: Namespace) -> None:
        self.resolvent, self.like, self.xp = resolvent, like, xp

    def __call__(self, f: Array, g: Array) -> tuple[Array, Array]:
        x, y = self.resolvent(np.from_dlpack(f), np.from_dlpack(g))
        return from_host(x, self.like, self.xp), from_host(y, self.like, self.xp)

    @property
    def residuals(self) -> list[float]:
        """As of the resolvent."""
        return self.resolvent.residuals

    def diagonal_blocks(self) -> tuple[Array, Array, Array]:
        """As of the resolvent."""
        L, R, C = (from_host(x, self.like, self.xp) for x in self.resolvent.diagonal_blocks())
        return L, R, C

    def on(self, rows: np.ndarray) -> HostResolvent:
        """As of the resolvent."""
        return HostResolvent(self.resolvent.on(rows), self.like, self.xp)

    def quadratic(self, f: Array, g: Array) -> Array:
        """As of the resolvent."""
        return from_host(self.resolvent.quadratic(np.from_dlpack(f), np.from_dlpack(g)), self.like, self.xp)
