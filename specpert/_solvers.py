"""The equation of the smaller side, (sigma^2 I - K) x = b.

Legend: B (r, c) the matrix, its smaller side first; K = B B^* (r, r); u (r, 1) its top vector, theta its top value; w
eigenvalues, descending; X (r, j) vectors; b, x (r, c) columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from specpert._arrays import by_columns, square, widened
from specpert.result import ConvergenceError

Product = Callable[[np.ndarray], np.ndarray]


class Solver(Protocol):
    """Solves (sigma^2 I - K) x = b for columns b (r, c), where it can be solved."""

    def __call__(self, b: np.ndarray) -> np.ndarray:
        """The solution x (r, c)."""

    def rough(self, b: np.ndarray) -> np.ndarray:
        """The solution to the accuracy asked of Hessian forms."""

    def form(self, b: np.ndarray) -> np.ndarray:
        """b^* x of each column (c,), to the accuracy of `rough`."""


class Gram:
    """K = B B^*: products in the better precision of B and the vectors, and the matrix itself."""

    def __init__(self, B: np.ndarray) -> None:
        self.B, self.Ba = B, B.conj().T
        self._copies: dict[np.dtype, Gram] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Gram, (self.B,)  # the adjoint is a view, and would be a second copy

    def apply(self, x: np.ndarray) -> np.ndarray:
        """B x."""
        return widened(self.B, x)

    def apply_adjoint(self, y: np.ndarray) -> np.ndarray:
        """B^* y."""
        return widened(self.Ba, y)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.apply(self.apply_adjoint(x))

    def at(self, dtype: Any) -> Gram:
        """The same in another precision; made once."""
        if self.B.dtype == dtype:
            return self
        if dtype not in self._copies:
            self._copies[dtype] = Gram(self.B.astype(dtype))
        return self._copies[dtype]

    def matrix(self) -> np.ndarray:
        """K, in the precision of B."""
        return np.asarray(self.B @ self.B.conj().T)


class CholeskySolver:
    """On the complement of vectors a (r, c) of values w (c,): M = theta I + a diag(w) a^* - K = L L^*.

    One vector has the value theta. Where K is less precise than the products `gram`, solutions are refined by these;
    `rtol` is the accuracy asked of forms, and `doubt` the error in units of it that the factor alone may leave.

    Raises numpy.linalg.LinAlgError unless M is positive definite; K then has at most c eigenvalues above theta.
    """

    def __init__(
        self,
        K: np.ndarray,
        a: np.ndarray,
        theta: float,
        gram: Gram,
        rtol: float = 0.0,
        w: np.ndarray | None = None,
    ) -> None:
        self.K, self.a, self.theta, self.gram, self.dtype, self.rtol, self.w = K, a, theta, gram, K.dtype, rtol, w
        self.doubt = 0.0
        factorise = self._routines()
        low = a.astype(K.dtype)
        M = low @ (self.values * low.conj().T).astype(K.dtype)
        M -= K
        M.flat[:: len(M) + 1] += theta
        # the Hermitian matrix column by column, as LAPACK wants it, without a transposed copy
        columns = M.conj().T if np.iscomplexobj(M) else M.T
        self.L, failed = factorise(columns, lower=True, overwrite_a=True, clean=False)
        if failed:
            raise np.linalg.LinAlgError("the shifted Gram matrix is not positive definite")

    def _routines(self) -> Any:
        """Look up those of SciPy that solve, which cannot be pickled, and return the one that factorises."""
        from scipy.linalg import get_blas_funcs, get_lapack_funcs

        factorise, self._solve = get_lapack_funcs(("potrf", "potrs"), (self.K,))
        self._halve, self._substitute = get_blas_funcs(("trsm", "trsv"), (self.K,))
        return factorise

    def __getstate__(self) -> dict[str, Any]:
        return {key: x for key, x in vars(self).items() if key not in ("_solve", "_halve", "_substitute")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._routines()

    def __call__(self, b: np.ndarray, rounds: int = 6) -> np.ndarray:
        """The solution x (..., r, c), refined at most so many times."""
        x = self.rough(b)
        if self.precise:
            return x
        rounding = 8 * float(np.finfo(b.dtype).eps) * self.theta
        for _ in range(rounds):
            residual = b - self.theta * x - self.a @ (self.values * (self.a.conj().T @ x)) + self.gram(x)
            if np.all(np.linalg.norm(residual, axis=-2) <= rounding * np.linalg.norm(x, axis=-2)):
                break
            x = x + self.rough(residual)
        return x

    @property
    def values(self) -> Any:
        """Those of the vectors, as a column."""
        return self.theta if self.w is None else self.w[:, None]

    @property
    def precise(self) -> bool:
        """Whether the factor has the precision of the vectors."""
        return bool(np.finfo(self.L.dtype).eps == np.finfo(self.a.dtype).eps)

    def rough(self, b: np.ndarray) -> np.ndarray:
        """As of the protocol: by the factor alone, to its precision."""
        if np.iscomplexobj(b) and not np.iscomplexobj(self.L):
            return np.asarray(self.rough(b.real) + 1j * self.rough(b.imag))
        if b.ndim > 2:
            return by_columns(self.rough, b)
        if b.size == 0:
            return b
        if self.precise:
            return self._solved(b)
        size = float(np.max(np.abs(b))) or 1.0  # small numbers have no place in single precision
        return np.multiply(self._solved((b / size).astype(self.L.dtype)), size, dtype=b.dtype)

    def accurate(self) -> CholeskySolver:
        """One whose rough solutions are as accurate as asked of forms."""
        if self.doubt <= 1.0:
            return self
        gram = self.gram.at(self.a.dtype)
        return CholeskySolver(gram.matrix(), self.a, self.theta, gram, self.rtol, self.w)

    def _solved(self, b: np.ndarray) -> np.ndarray:
        """The solution by the factor in its own precision."""
        if b.shape[1] > 1:
            return np.asarray(self._solve(self.L, b, lower=True)[0])
        # one column: a fraction of the time that LAPACK's blocks of columns take
        half = self._substitute(self.L, b[:, 0], lower=True)
        x = self._substitute(self.L, half, lower=True, trans=2, overwrite_x=True)
        return np.asarray(x)[:, None]

    def form(self, b: np.ndarray) -> np.ndarray:
        """||L^-1 b||^2 of each column: half the work of a solution; b may be overwritten.

        Where that may not be accurate enough it is corrected. If it nearly is for sure, a combination of the columns
        can show that it is.
        """
        if np.iscomplexobj(b) and not np.iscomplexobj(self.L):
            return self.form(b.real.copy("F")) + self.form(b.imag.copy("F"))
        if b.size == 0:
            return np.zeros(b.shape[1])
        right = b.astype(self.L.dtype, order="F", copy=self.doubt > 1.0)
        half = self._halve(1.0, self.L, right, lower=True, overwrite_b=True)
        found = _inner(half, half)[0]
        if self.doubt <= 1.0:
            return found
        if self.doubt <= 2.0:
            signs = np.random.default_rng(0).choice([-1.0, 1.0], len(found))
            combined = (signs / np.sqrt(np.where(found > 0, found, 1.0))).astype(found.dtype)[:, None]
            probe = half @ combined
            truth = float(self._corrected(b @ combined, probe)[0])
            if abs(float(_inner(probe, probe)[0, 0]) - truth) <= self.rtol / 8 * truth:
                return found
        return self._corrected(b, half)

    def _corrected(self, b: np.ndarray, half: np.ndarray) -> np.ndarray:
        """2 Re(b^* x) - x^* M x with the rough solution x, whose relative error it squares; half is L^-1 b."""
        x = self._halve(1.0, self.L, half, lower=True, trans_a=2).astype(self.a.dtype, copy=False)
        along, image = self.a.conj().T @ x, self.gram.apply_adjoint(x)
        known = self.theta * _inner(x, x) + np.sum(self.values * square(along, np), axis=0)
        return np.asarray((2 * _inner(b, x) - known + _inner(image, image))[0])


class ClusterSolver:
    """On the complement of a cluster X, column j with its own value w_j: conjugate gradients after a factor.

    The factor is that of a shift between them, which only the values of K just below the cluster can tell from their
    own: few rounds do. In the precision of K, to the accuracy asked of the factor; where that is single precision,
    residuals of the solves are kept for the certificate.
    """

    def __init__(self, inner: CholeskySolver) -> None:
        self.inner, self.dtype = inner, inner.dtype
        self.residuals: list[float] = []

    def fresh(self) -> ClusterSolver:
        """The same without residuals."""
        return ClusterSolver(self.inner)

    def __call__(self, b: np.ndarray) -> np.ndarray:
        """As of the protocol, of columns b (..., r, c)."""
        w = self.inner.values[:, 0]
        size = np.linalg.norm(b, axis=-2, keepdims=True)
        size[size == 0] = 1.0
        residual = self._outside(b / size)
        if np.finfo(residual.dtype).eps < np.finfo(self.dtype).eps:
            residual = residual.astype(np.complex64 if np.iscomplexobj(residual) else np.float32)
        x, z = np.zeros_like(residual), self._outside(self.inner.rough(residual))
        direction, slope = z, _inner(residual, z)
        asked = 0.0 if self.inner.precise else self.inner.rtol / 10
        found, floor = np.zeros_like(slope), max(4 * float(np.finfo(self.dtype).eps), asked)
        for _ in range(500):
            image = self._outside(w.astype(x.real.dtype) * direction - self.inner.K @ direction)
            curvature = _inner(direction, image)
            length = np.divide(slope, curvature, out=np.zeros_like(slope), where=curvature > 0)
            x, residual = x + length * direction, residual - length * image
            z = self._outside(self.inner.rough(residual))
            found, before, slope = found + length * slope, slope, _inner(residual, z)
            left = slope > floor * floor * found  # squares of the error, at most, and of x, in the energy norm
            if not left.any():
                if not self.inner.precise:
                    rounding = 4 * float(np.finfo(self.dtype).eps) * w[0]
                    norms = np.linalg.norm(residual, axis=-2) + rounding * np.linalg.norm(x, axis=-2)
                    self.residuals.append(float(np.max(norms * size[..., 0, :])))
                return np.multiply(x, size, dtype=b.dtype)
            direction = left * (z + np.divide(slope, before, out=np.zeros_like(slope), where=left) * direction)
        reached = float(np.max(np.linalg.norm(residual, axis=-2)))
        raise ConvergenceError(
            f"expected conjugate gradients to solve for a cluster to {floor:.1e}, got a residual of {reached:.1e} "
            "after 500 rounds: the next value is too close; use sigma_series(A, H, order, k=(0, 1, ...)), which takes "
            "all singular vectors"
        )

    rough = __call__

    def form(self, b: np.ndarray) -> np.ndarray:
        """As of the protocol."""
        return np.asarray(_inner(b, self(b))[..., 0, :])

    def _outside(self, x: np.ndarray) -> np.ndarray:
        X = self.inner.a.astype(x.dtype, copy=False)
        return np.asarray(x - X @ (X.conj().T @ x))


def _inner(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Re(x^* y) of each column, (..., 1, c)."""
    return np.asarray(np.einsum("...ij,...ij->...j", x.conj(), y).real[..., None, :])


class EigenSolver:
    """On the span of the eigenvectors X (r, j) of K with values w (j,), for column i with its own sigma_i (c,)."""

    def __init__(self, w: np.ndarray, X: np.ndarray, sigma: np.ndarray) -> None:
        self.values = np.append(sigma * sigma, w)
        self.X, self.weights = X, 1 / (sigma * sigma - w[:, None])

    def __call__(self, b: np.ndarray) -> np.ndarray:
        return np.asarray(self.X @ (self.weights * (self.X.conj().T @ b)))

    rough = __call__

    def form(self, b: np.ndarray) -> np.ndarray:
        """As of the protocol."""
        return np.asarray(np.sum(self.weights * square(self.X.conj().T @ b, np), axis=0))


class IterativeSolver:
    """Solve (sigma^2 I - K) x = b on the complement of u by conjugate gradients, deflated with the known vectors.

    The known eigenvectors X of K (values w, all those above sigma^2 among them) are solved directly; on their
    complement the matrix is positive definite for every k. Residuals of the solves are kept for the certificate.
    """

    def __init__(self, gram: Product, X: np.ndarray, w: np.ndarray, index: int, sigma: float) -> None:
        self.gram, self.X, self.w, self.sigma = gram, X, w, sigma
        self.index = index
        self.residuals: list[float] = []

    def fresh(self) -> IterativeSolver:
        """The same without residuals."""
        return IterativeSolver(self.gram, self.X, self.w, self.index, self.sigma)

    def __call__(self, b: np.ndarray) -> np.ndarray:
        if b.ndim > 2:
            return by_columns(self, b)
        solved = [self._solve(column) for column in b.T]
        self.residuals.append(max(residual for _, residual in solved))
        return np.stack([x for x, _ in solved], axis=1)

    rough = __call__

    def form(self, b: np.ndarray) -> np.ndarray:
        """As of the protocol."""
        x = self(b)
        return np.asarray(np.sum(b.real * x.real + b.imag * x.imag, axis=0))

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        # sigma^2 on the span of X, where the solution has no part, keeps the matrix positive definite
        X, square = self.X, self.sigma * self.sigma
        inside = X @ (X.conj().T @ x)
        rest = (x - inside).reshape(-1, 1)
        y = (square * rest - self.gram(rest)).reshape(-1)
        return y - X @ (X.conj().T @ y) + square * inside

    def _solve(self, b: np.ndarray) -> tuple[np.ndarray, float]:
        from scipy.sparse.linalg import LinearOperator, cg

        X = self.X
        size = float(np.linalg.norm(b))
        if size == 0:
            return b, 0.0
        b = b / size
        known = X.conj().T @ b
        rest = b - X @ known
        operator = LinearOperator((len(b), len(b)), matvec=self._matvec, dtype=b.dtype)
        x, _ = cg(operator, rest, rtol=0.0, atol=1e-14, maxiter=min(10 * len(b), 2000))
        residual = float(np.linalg.norm(self._matvec(x) - rest))
        if residual > 1e-6:
            raise ConvergenceError(
                f"expected the conjugate gradients to reach a residual of 1e-6, got {residual:.1e}: sigma_k is "
                "too close to its neighbours, or tied with one; use a dense array, whose clusters have series"
            )
        weights = self.sigma * self.sigma - self.w
        weights[self.index] = np.inf
        return size * (x - X @ (X.conj().T @ x) + X @ (known / weights)), size * residual
