"""The equation of the smaller side, (sigma^2 I - K) x = b.

Legend: B (r, c) the matrix, its smaller side first; K = B B^* (r, r); u (r, 1) its top vector, theta its top value; w
eigenvalues, descending; X (r, j) vectors; b, x (r, c) columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from specpert._arrays import square, widened
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
    """On the complement of a: M = theta (I + a a^*) - K = L L^*.

    Where K is less precise than the products `gram`, solutions are refined by these.

    Raises numpy.linalg.LinAlgError unless M is positive definite; K then has at most one eigenvalue above theta.
    """

    def __init__(self, K: np.ndarray, a: np.ndarray, theta: float, gram: Gram) -> None:
        from scipy.linalg import get_blas_funcs, get_lapack_funcs

        self.K, self.a, self.theta, self.gram = K, a, theta, gram
        factorise, self._solve = get_lapack_funcs(("potrf", "potrs"), (K,))
        self._halve, self._substitute = get_blas_funcs(("trsm", "trsv"), (K,))
        low = a.astype(K.dtype)
        M = np.multiply(low, (theta * low.conj().T).astype(K.dtype))
        M -= K
        M.flat[:: len(M) + 1] += theta
        # the Hermitian matrix column by column, as LAPACK wants it, without a transposed copy
        columns = M.conj().T if np.iscomplexobj(M) else M.T
        self.L, failed = factorise(columns, lower=True, overwrite_a=True, clean=False)
        if failed:
            raise np.linalg.LinAlgError("the shifted Gram matrix is not positive definite")

    def __call__(self, b: np.ndarray, rounds: int = 6) -> np.ndarray:
        """The solution x (..., r, c), refined at most so many times."""
        x = self.rough(b)
        if self.precise:
            return x
        rounding = 8 * float(np.finfo(b.dtype).eps) * self.theta
        for _ in range(rounds):
            residual = b - self.theta * (x + self.a @ (self.a.conj().T @ x)) + self.gram(x)
            if np.all(np.linalg.norm(residual, axis=-2) <= rounding * np.linalg.norm(x, axis=-2)):
                break
            x = x + self.rough(residual)
        return x

    @property
    def precise(self) -> bool:
        """Whether the factor has the precision of the vectors."""
        return bool(np.finfo(self.L.dtype).eps == np.finfo(self.a.dtype).eps)

    def rough(self, b: np.ndarray) -> np.ndarray:
        """As of the protocol: by the factor alone, to its precision."""
        if np.iscomplexobj(b) and not np.iscomplexobj(self.L):
            return np.asarray(self.rough(b.real) + 1j * self.rough(b.imag))
        if b.ndim > 2:  # a stack: its columns beside one another
            columns = np.moveaxis(b, -2, 0)
            x = self.rough(columns.reshape(len(columns), -1)).reshape(columns.shape)
            return np.asarray(np.moveaxis(x, 0, -2))
        if b.size == 0:
            return b
        if self.precise:
            return self._solved(b)
        size = float(np.max(np.abs(b))) or 1.0  # small numbers have no place in single precision
        return np.multiply(self._solved((b / size).astype(self.L.dtype)), size, dtype=b.dtype)

    def _solved(self, b: np.ndarray) -> np.ndarray:
        """The solution by the factor in its own precision."""
        if b.shape[1] > 1:
            return np.asarray(self._solve(self.L, b, lower=True)[0])
        # one column: a fraction of the time that LAPACK's blocks of columns take
        half = self._substitute(self.L, b[:, 0], lower=True)
        x = self._substitute(self.L, half, lower=True, trans=2, overwrite_x=True)
        return np.asarray(x)[:, None]

    def form(self, b: np.ndarray) -> np.ndarray:
        """||L^-1 b||^2 of each column: half the work of a solution; b may be overwritten."""
        if np.iscomplexobj(b) and not np.iscomplexobj(self.L):
            return self.form(b.real.copy("F")) + self.form(b.imag.copy("F"))
        if b.size == 0:
            return np.zeros(b.shape[1])
        half = self._halve(1.0, self.L, b.astype(self.L.dtype, copy=False), lower=True, overwrite_b=True)
        return np.asarray(np.einsum("ij,ij->j", half, half.conj()).real)

    def count(self, lower: float) -> int:
        """How many eigenvalues of K are above `lower`, by Sylvester's law of inertia: K - lower I = L D L^*."""
        from scipy.linalg import get_lapack_funcs

        # in single precision the values have errors of eps theta
        K = self.K if self.precise or lower > 1e-2 * self.theta else self.gram.at(self.a.dtype).matrix()
        name = "hetrf" if np.iscomplexobj(K) else "sytrf"
        (factorise,) = get_lapack_funcs((name,), (K,))
        shifted = K - lower * np.eye(len(K), dtype=K.dtype)
        factors, pivots, _ = factorise(shifted, lower=True, overwrite_a=True)
        single = pivots > 0
        # D has blocks of order two where no entry of the diagonal would do as a pivot: one value of each sign
        return int(np.sum(np.diagonal(factors).real[single] > 0)) + int(np.sum(~single)) // 2


class EigenSolver:
    """On the span of the eigenvectors X (r, j) of K with values w (j,), for column i with its own sigma_i (c,)."""

    def __init__(self, w: np.ndarray, X: np.ndarray, sigma: np.ndarray) -> None:
        self.values = np.append(sigma * sigma, w)
        self.X, self.weights = X, 1 / (sigma * sigma - w[:, None])

    def count(self, lower: float) -> int:
        """As of the protocol."""
        return int(np.sum(self.values > lower))

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

    def __call__(self, b: np.ndarray) -> np.ndarray:
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
        known = X.conj().T @ b
        rest = b - X @ known
        operator = LinearOperator((len(b), len(b)), matvec=self._matvec, dtype=b.dtype)
        x, _ = cg(operator, rest, rtol=0.0, atol=1e-14 * size, maxiter=min(len(b), 2000))
        residual = float(np.linalg.norm(self._matvec(x) - rest))
        if residual > 1e-6 * size:
            raise ConvergenceError(
                f"expected the conjugate gradients to reach a residual of 1e-6, got {residual / size:.1e}: sigma_k is "
                "too close to its neighbours, or tied with one; use a dense array, whose clusters have series"
            )
        weights = self.sigma * self.sigma - self.w
        weights[self.index] = np.inf
        return x - X @ (X.conj().T @ x) + X @ (known / weights), residual
