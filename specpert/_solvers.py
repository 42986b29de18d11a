"""The equation of the smaller side, (sigma^2 I - K) x = b, and the top of the spectrum of K.

Legend: K (r, r) the Gram matrix A A^* (or A^* A) of the smaller side; u (r, 1) its top vector; w eigenvalues,
descending; X (r, j) vectors; b, x (r, c) columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from specpert.result import ConvergenceError


class Solver(Protocol):
    """Solves (sigma^2 I - K) x = b for columns b (r, c), where it can be solved."""

    def __call__(self, b: np.ndarray) -> np.ndarray:
        """The solution x (r, c)."""

    def form(self, b: np.ndarray) -> np.ndarray:
        """b^* x of each column (c,)."""


class CholeskySolver:
    """On the complement of a: M = theta (I + a a^*) - K = L L^*.

    Raises numpy.linalg.LinAlgError unless M is positive definite; K then has at most one eigenvalue above theta.
    """

    def __init__(self, K: np.ndarray, a: np.ndarray, theta: float) -> None:
        from scipy.linalg import cho_factor

        M = (theta * a) @ a.conj().T
        M -= K
        M[np.diag_indices_from(M)] += theta
        # the Hermitian matrix column by column, as LAPACK wants it, without a transposed copy
        columns = M.conj().T if np.iscomplexobj(M) else M.T
        self.L, _ = cho_factor(columns, lower=True, overwrite_a=True, check_finite=False)

    def __call__(self, b: np.ndarray) -> np.ndarray:
        from scipy.linalg import cho_solve

        return np.asarray(cho_solve((self.L, True), b, check_finite=False))

    def form(self, b: np.ndarray) -> np.ndarray:
        """||L^-1 b||^2 of each column: half the work of a solution."""
        from scipy.linalg import solve_triangular

        return np.asarray(np.sum(square(solve_triangular(self.L, b, lower=True, check_finite=False)), axis=0))


class EigenSolver:
    """On the span of the eigenvectors X (r, j) of K with values w (j,), for column i with its own sigma_i (c,)."""

    def __init__(self, w: np.ndarray, X: np.ndarray, sigma: np.ndarray) -> None:
        self.X, self.weights = X, 1 / (sigma * sigma - w[:, None])

    def __call__(self, b: np.ndarray) -> np.ndarray:
        return np.asarray(self.X @ (self.weights * (self.X.conj().T @ b)))

    def form(self, b: np.ndarray) -> np.ndarray:
        """As of the protocol."""
        return np.asarray(np.sum(self.weights * square(self.X.conj().T @ b), axis=0))


def isolated_top(K: np.ndarray, start: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, CholeskySolver]:
    """The largest eigenvalue of K and (an upper estimate of) the next one, the vector (r, 1), and its solver.

    From a start vector (r, 1) near the top one, or from Lanczos: a Cholesky factorisation that succeeds proves that no
    second eigenvalue is above the Rayleigh quotient, and its inverse then polishes the vector. Where neither is good
    enough, from the two eigenvectors themselves. Raises numpy.linalg.LinAlgError where K cannot tell the values apart.
    """
    for guess in (lambda: start, lambda: _lanczos_top(K)):
        try:
            if (a := guess()) is not None:
                return _polished(K, a)
        except (ConvergenceError, np.linalg.LinAlgError):
            continue
    w, X = top_two(K)
    u = X[:, 1:]
    return w[::-1], u, CholeskySolver(K, u, float(w[1]))


def _polished(K: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, CholeskySolver]:
    """As `isolated_top`, from a vector that must be near; raises numpy.linalg.LinAlgError where it is not."""
    rounding = float(np.finfo(K.dtype).eps)
    theta, residual = _rayleigh(K, a)
    solver = CholeskySolver(K, a, theta)
    u, size = a, float(np.linalg.norm(residual))
    for _ in range(8):
        if size <= 4 * rounding * theta:
            break
        # The shift stays at the start's Rayleigh quotient: far from it the errors would grow instead of shrink.
        correction = solver(residual)
        better = u + correction - a @ (a.conj().T @ correction)
        better = better / np.linalg.norm(better)
        quotient, residual = _rayleigh(K, better)
        if (left := float(np.linalg.norm(residual))) > size / 2:
            break
        u, theta, size = better, quotient, left
    if size > len(K) * rounding * theta:
        raise np.linalg.LinAlgError("the start is too far from the top vector")
    drift = float(np.linalg.norm(u - a @ (a.conj().T @ u)))
    second, error = _next_value(K, u, solver)
    if theta - second <= 10 * error:  # so close that the estimate would decide whether it is a tie
        raise np.linalg.LinAlgError("the next value is not known well enough")
    if theta * drift**2 > 64 * rounding * (theta - second):  # the shift was not yet that of the vector
        solver = CholeskySolver(K, u, theta)
    return np.array([theta, second]), u, solver


def _rayleigh(K: np.ndarray, u: np.ndarray) -> tuple[float, np.ndarray]:
    """The Rayleigh quotient of a unit column, and its residual."""
    Ku = K @ u
    quotient = float((u.conj().T @ Ku).real[0, 0])
    return quotient, Ku - quotient * u


def _lanczos_top(K: np.ndarray) -> np.ndarray:
    start = np.random.default_rng(0).standard_normal(len(K)).astype(K.dtype)
    _, X = _lanczos(lambda x: K @ x, len(K), 1, start, K.dtype, 1e-11)  # so accurate that one factorisation will do
    return X


def _next_value(K: np.ndarray, u: np.ndarray, solver: CholeskySolver) -> tuple[float, float]:
    """Upper estimate of the largest eigenvalue of K on the complement of u, and the error allowed for in it.

    By Lanczos on the inverse.
    """

    def inverse(x: np.ndarray) -> np.ndarray:
        y = solver(x - u @ (u.conj().T @ x))
        return y - u @ (u.conj().T @ y)

    start = np.random.default_rng(1).standard_normal((len(K), 1)).astype(K.dtype)
    start = start - u @ (u.conj().T @ start)
    _, x = _lanczos(inverse, len(K), 1, start[:, 0], K.dtype, 1e-8, least_width=10)
    value, residual = _rayleigh(K, x)
    error = float(np.linalg.norm(residual))
    return value + error, error


def top_two(K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two largest eigenvalues of K, ascending, and their vectors."""
    from scipy.linalg import eigh

    r = len(K)
    w, X = eigh(K, subset_by_index=[r - 2, r - 1], check_finite=False)
    return w, X


class IterativeSolver:
    """Solve (sigma^2 I - K) x = b on the complement of u by conjugate gradients, deflated with the known vectors.

    The known eigenvectors X of K (values w, all those above sigma^2 among them) are solved directly; on their
    complement the matrix is positive definite for every k. Residuals of the solves are kept for the certificate.
    """

    def __init__(
        self, gram: Callable[[np.ndarray], np.ndarray], X: np.ndarray, w: np.ndarray, index: int, sigma: float
    ) -> None:
        self.gram, self.X, self.w, self.sigma = gram, X, w, sigma
        self.index = index
        self.residuals: list[float] = []

    def __call__(self, b: np.ndarray) -> np.ndarray:
        solved = [self._solve(column) for column in b.T]
        self.residuals.append(max(residual for _, residual in solved))
        return np.stack([x for x, _ in solved], axis=1)

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


def top_of_gram(
    gram: Callable[[np.ndarray], np.ndarray], size: int, count: int, start: np.ndarray, dtype: Any
) -> tuple[np.ndarray, np.ndarray, float]:
    """The `count` largest eigenvalues w of K, descending, their vectors X, and an upper estimate of the next one.

    Lanczos (ARPACK). The next value is sought on the complement of X from a start of its own: a second copy of a tied
    value is orthogonal to all that the first start can reach. It need be no more accurate than its distance, so its
    residual is added to it. Where it turns out larger than a value found, the first start had missed it.
    """
    for _ in range(3):
        w, X = _lanczos(gram, size, count, start, dtype, 0.0)
        x, upper = _next_of_gram(gram, size, w, X, dtype)
        if upper <= w[-1] * (1 + 1e-8):
            break
        start = X.sum(axis=1) + x
    return w, X, min(upper, float(w[-1]))


def _next_of_gram(
    gram: Callable[[np.ndarray], np.ndarray], size: int, w: np.ndarray, X: np.ndarray, dtype: Any
) -> tuple[np.ndarray, float]:
    """Vector and upper estimate of the largest eigenvalue of K on the complement of X."""

    def deflated(x: np.ndarray) -> np.ndarray:
        y = gram(x - X @ (X.conj().T @ x))
        return y - X @ (X.conj().T @ y)

    start = np.random.default_rng(1).standard_normal((size, 1)).astype(dtype)
    start = start - X @ (X.conj().T @ start)
    rounding = 100 * size * float(np.finfo(float).eps) * float(w[0])
    if float(np.linalg.norm(deflated(start))) <= rounding * float(np.linalg.norm(start)):
        return start[:, 0], 0.0
    vector, upper = start[:, 0], 0.0
    for tolerance in (1e-3, 0.0):
        (value,), x = _lanczos(deflated, size, 1, vector, dtype, tolerance)
        upper = float(value) + float(np.linalg.norm(deflated(x) - value * x))
        vector = x[:, 0]
        if w[-1] - upper > 0.1 * (w[-1] - value):
            break
    return vector, max(upper, 0.0)


def _lanczos(
    product: Callable[[np.ndarray], np.ndarray],
    size: int,
    count: int,
    start: np.ndarray,
    dtype: Any,
    tolerance: float,
    least_width: int = 24,
) -> tuple[np.ndarray, np.ndarray]:
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh

    operator = LinearOperator((size, size), matvec=lambda x: product(x.reshape(-1, 1)).reshape(-1), dtype=dtype)
    width = min(size, max(2 * count + 1, least_width))
    try:
        w, X = eigsh(operator, k=count, which="LA", v0=start, tol=tolerance, ncv=width, maxiter=500)
    except ArpackNoConvergence as error:
        raise ConvergenceError(
            f"expected Lanczos to find {count} singular value(s), got {len(error.eigenvalues)} after 500 restarts: "
            "they lie too close together; use a dense array with method='svd', or a better start vector v0"
        ) from error
    except ArpackError as error:
        raise ConvergenceError(
            f"expected Lanczos to run, got an error of ARPACK ({error}): are the products finite, and is rmatvec the "
            "adjoint of matvec?"
        ) from error
    order = np.argsort(w)[::-1]
    return w[order], X[:, order]


def square(x: np.ndarray) -> np.ndarray:
    """|x|^2 elementwise."""
    return np.asarray(x.real**2 + x.imag**2)
