"""The top of the spectrum of K = B B^*, the Gram matrix of the smaller side.

Legend: B (r, c); K (r, r); u (r, 1) its top vector, theta its top value; w eigenvalues, descending; X (r, j) vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from specpert._solvers import CholeskySolver, Gram, Product, Solver
from specpert.result import ConvergenceError

# Relative error of forms by a factor in single precision, in units of eps theta / (theta - w_2): nine tenths of it were
# measured for matrices close to a diagonal one, a fiftieth is usual.
SINGLE_ERROR = 4.0
MIXED = 2.0  # how far such a factor may mix close values, in units of eps theta
SINGLE_FROM = 1e-6  # the least relative accuracy for which single precision is thought of at all
NOISE = 8 * float(np.finfo(float).eps)  # what products with K leave of an eigenvalue zero, relative to the largest
#: Makes a start vector (r, 1) from K.
Start = Callable[[np.ndarray], np.ndarray]


class _TooCloseError(Exception):
    """The top value is too close to the next one for the precision at hand."""


def isolated_top(
    gram: Gram, starts: Sequence[Start], rtol: float, gap: float = 1.0
) -> tuple[np.ndarray, np.ndarray, CholeskySolver]:
    """The largest eigenvalue of K and (an upper estimate of) the next one, the vector (r, 1), and its solver.

    From the first of the starts that is near enough, or from Lanczos: a Cholesky factorisation that succeeds proves
    that no second eigenvalue is above the Rayleigh quotient, and its inverse then polishes the vector. Where none is
    good enough, from the two eigenvectors themselves. Where `rtol`, the accuracy asked of `Solver.form`, and the gap
    allow it, the factor is in single precision; values and vector never are. `gap`, relative to the value, is that of
    the root of theta for a matrix nearby. Raises numpy.linalg.LinAlgError where K cannot tell the values apart.
    """
    full = np.result_type(gram.B, np.float64)
    single = np.dtype(np.complex64 if np.issubdtype(full, np.complexfloating) else np.float32)
    product: Product = gram
    for dtype in (single, full) if rtol >= SINGLE_FROM and not _too_close(single, 1.6 * gap, rtol) else (full,):
        low = gram.at(dtype)
        K = low.matrix()
        if dtype == full:
            gram, product = low, K.__matmul__  # K itself where it is as precise: it is the smaller
        for start in (*starts, _lanczos_top):
            try:
                return _polished(gram, product, K, start(K).astype(full, copy=False), rtol)
            except _TooCloseError:
                break
            except (ConvergenceError, np.linalg.LinAlgError):
                continue
    w, X = top_two(K)
    u = X[:, 1:]
    return w[::-1], u, CholeskySolver(K, u, float(w[1]), gram)


def _too_close(dtype: Any, gap: float, rtol: float) -> bool:
    """Whether a factor cannot be that precise, with this relative gap of theta.

    The correction of forms squares their error; the isolation distance has no correction.
    """
    return MIXED * float(np.finfo(dtype).eps) > min(3 * rtol, rtol**0.5 / 8) * gap


def improved(K: np.ndarray, known: CholeskySolver, gap: float, rtol: float) -> np.ndarray:
    """The known solver's vector, so near the top one of K that one factorisation will do; in the precision of K.

    The gap is that of the known K, relative to its largest value.
    """
    allowed = 0.5 * gap * (gap * _drift_allowed(K.dtype, rtol)) ** 0.5
    floor = max(allowed, 8 * float(np.finfo(K.dtype).eps))
    return followed(K.__matmul__, known.a.astype(K.dtype), known, floor)


def _drift_allowed(dtype: Any, rtol: float) -> float:
    """Square of how far, in units of the root of the relative gap, a factor's shift may be from the right vector."""
    double = np.finfo(dtype).eps < SINGLE_FROM**2
    return 64 * float(np.finfo(dtype).eps) if double else rtol / 8


def _polished(
    gram: Gram, product: Product, K: np.ndarray, a: np.ndarray, rtol: float
) -> tuple[np.ndarray, np.ndarray, CholeskySolver]:
    """As `isolated_top`, from a vector that must be near; raises numpy.linalg.LinAlgError where it is not."""
    rounding = float(np.finfo(a.dtype).eps)
    theta, residual = _rayleigh(product, a)
    solver = CholeskySolver(K, a, theta, gram, rtol)
    u, size = a, float(np.linalg.norm(residual))
    for _ in range(8):
        if size <= 4 * rounding * theta:
            break
        # The shift stays at the start's Rayleigh quotient: far from it the errors would grow instead of shrink.
        correction = solver.rough(residual)
        better = u + correction - a @ (a.conj().T @ correction)
        better = better / np.linalg.norm(better)
        quotient, residual = _rayleigh(product, better)
        if (left := float(np.linalg.norm(residual))) > size / 2:
            break
        u, theta, size = better, quotient, left
    if size > len(K) * rounding * theta:
        raise np.linalg.LinAlgError("the start is too far from the top vector")
    drift = float(np.linalg.norm(u - a @ (a.conj().T @ u)))
    _, second, error, _ = next_value(product, u, solver, rtol)
    if theta * drift**2 > _drift_allowed(K.dtype, rtol) * (theta - second):  # the shift was not yet that of the vector
        solver = CholeskySolver(K, u, theta, gram, rtol)
        _, second, error, _ = next_value(product, u, solver, rtol)  # of many close ones the first may have missed some
    else:
        second += theta * drift**2
    if theta - second <= 10 * error:  # so close that the estimate would decide whether it is a tie
        raise np.linalg.LinAlgError("the next value is not known well enough")
    if not solver.precise:
        gap = (theta - second) / theta
        solver.doubt = SINGLE_ERROR * float(np.finfo(K.dtype).eps) / (rtol * gap)
        if _too_close(K.dtype, gap, rtol):
            raise _TooCloseError
    solver.a, solver.theta = u, theta
    return np.array([theta, second]), u, solver


def followed(product: Product, u: np.ndarray, solver: Solver, rtol: float) -> np.ndarray:
    """The top vector (r, 1) of a K near that of the solver, to a residual of rtol relative to its value.

    By Davidson's method from that K's own vector u (r, 1): the residual, solved with the old K, is what the new vector
    lacks but for a factor of the order of the change to the gap.
    """
    basis, images = u, product(u)
    for _ in range(24):
        w, S = np.linalg.eigh(basis.conj().T @ images)
        theta, x = float(w[-1]), basis @ S[:, -1:]
        residual = images @ S[:, -1:] - theta * x
        if (left := float(np.linalg.norm(residual))) <= rtol * theta:
            return np.asarray(x / np.linalg.norm(x))
        new = solver.rough(residual)
        for _ in range(2):  # twice is enough
            new = new - basis @ (basis.conj().T @ new)
            new = new / np.linalg.norm(new)
        basis, images = np.hstack([basis, new]), np.hstack([images, product(new)])
    raise ConvergenceError(
        "expected a matrix nearby, got one whose top singular vector is far from the known one: after 24 steps a "
        f"residual of {left / theta:.1e} in place of {rtol:.1e}; prepare it anew with singular_triplet(A)"
    )


def _rayleigh(product: Product, u: np.ndarray) -> tuple[float, np.ndarray]:
    """The Rayleigh quotient of a unit column, and its residual."""
    Ku = product(u)
    quotient = float((u.conj().T @ Ku).real[0, 0])
    return quotient, Ku - quotient * u


def _lanczos_top(K: np.ndarray) -> np.ndarray:
    start = np.random.default_rng(0).standard_normal((len(K), 1)).astype(K.dtype)
    # so accurate that one factorisation will do
    return largest(K.__matmul__, start, max(1e-10, 8 * float(np.finfo(K.dtype).eps)))


def next_value(
    product: Product, u: np.ndarray, solver: CholeskySolver, rtol: float
) -> tuple[float, float, float, np.ndarray]:
    """Lower and upper estimate of the largest eigenvalue of K on the complement of u (r, c), the vector's residual, it.

    By Lanczos on the inverse, less the 1 / theta that it has for a value zero: K / (theta (theta I - K)). What a random
    start can have hidden by its small share in a vector, about 1 / sqrt(r), is added, and how far the error of a factor
    in single precision can have mixed close values.
    """

    def outside(x: np.ndarray) -> np.ndarray:
        return x - u @ (u.conj().T @ x)

    theta, hidden = solver.theta, 2 * len(u) ** 0.5
    rounding = 16 * float(np.finfo(solver.L.dtype).eps)
    tol = max(1e-8, rtol / (8 * hidden), rounding)
    start = outside(np.random.default_rng(1).standard_normal((len(u), 1)).astype(u.dtype))
    x = largest(lambda x: outside(solver.rough(x) - x / theta), start, tol, rounding / theta)
    # once more takes off what is far below, which the inverse hardly sees, and the rounding of its factor
    better = outside(solver(x, rounds=1) - x / theta)
    if (size := float(np.linalg.norm(better))) > rounding / theta:
        x = better / size
    value, residual = _rayleigh(product, x)
    slack = (tol * value + rounding * (theta - value)) * (theta - value) / theta
    mixed = 0.0 if solver.precise else MIXED * float(np.finfo(solver.L.dtype).eps) * theta
    if value < theta / 2 and not solver.precise:  # the inverse has no advantage, and its factor errors of eps theta
        tol, rounding = 1e-8, 16 * float(np.finfo(u.dtype).eps)
        x = outside(largest(lambda x: outside(product(x)), x, tol, rounding * theta))
        x /= np.linalg.norm(x)
        value, residual = _rayleigh(product, x)
        slack, mixed = tol * value + rounding * theta, 0.0
    error = float(np.linalg.norm(residual))
    return value, value + error + hidden * slack + mixed, error, x


def largest(product: Product, start: np.ndarray, rtol: float, floor: float = 0.0, width: int = 40) -> np.ndarray:
    """Unit vector (r, 1) of the largest eigenvalue of a positive operator, to a residual of rtol times that, or floor.

    By Lanczos, restarted: where few products do, this takes a fraction of the time of ARPACK's many small calls.
    """
    size, rounding = 0.0, 16 * float(np.finfo(start.dtype).eps)
    for _ in range(12):
        for basis, T, beta in lanczos(product, start, width):
            size = max(size, abs(T[-1, -1]))
            exhausted = beta <= max(rounding * size, floor)  # what is left is noise
            if exhausted or len(T) == width or len(T) % 3 == 0:  # to look each time would cost more than a product
                values, S = np.linalg.eigh(T)
                done = exhausted or beta * abs(S[-1, -1]) <= max(rtol * values[-1], floor)
                if done or len(T) == width:
                    x = S[:, -1].astype(basis.dtype) @ basis
                    break
        start = np.asarray(x / np.linalg.norm(x))[:, None]
        if done:
            return start
    raise ConvergenceError(
        f"expected Lanczos to reach a residual of {rtol:.1e}, got {beta * abs(S[-1, -1]) / size:.1e} after 12 "
        "restarts: many values lie close together; use method='svd', or rtol = 0 for a norm"
    )


def lanczos(product: Product, start: np.ndarray, width: int) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Of each step from a start (r, 1): basis (j, r), projection (j, j) of the Hermitian operator, size of the rest."""
    V, T = np.empty((width, len(start)), start.dtype), np.zeros((width, width))
    w, beta = start[:, 0], float(np.linalg.norm(start))
    for j in range(width):
        V[j] = w / beta
        basis = V[: j + 1]
        dual = basis.conj() if np.iscomplexobj(V) else basis
        w = product(V[j, :, None])[:, 0]
        h = dual @ w
        T[j, j] = h[j].real
        w = w - h @ basis
        w -= (dual @ w) @ basis  # twice is enough
        beta = math.sqrt(np.vdot(w, w).real)
        yield basis, T[: j + 1, : j + 1], beta
        if j + 1 < width:
            T[j + 1, j] = T[j, j + 1] = beta


def top_two(K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two largest eigenvalues of K, ascending, and their vectors."""
    from scipy.linalg import eigh

    r = len(K)
    w, X = eigh(K, subset_by_index=[r - 2, r - 1], check_finite=False)
    return w, X


def top_of_gram(
    gram: Product, size: int, count: int, start: np.ndarray, dtype: Any
) -> tuple[np.ndarray, np.ndarray, float]:
    """The `count` largest eigenvalues w of K, descending, their vectors X, and an upper estimate of the next one.

    Lanczos (ARPACK). The next value is sought on the complement of X from a start of its own: a second copy of a tied
    value is orthogonal to all that the first start can reach. It need be no more accurate than its distance, so its
    residual is added to it. Where it turns out larger than a value found, it takes its place among them, and the next
    one is sought anew: of a value with many copies one start finds only some.
    """
    # ARPACK's vectors of one complex value with several copies need not be orthogonal
    w, X = _ritz(gram, _lanczos(gram, size, count, start, dtype, 0.0)[1], count)
    for attempt in range(2 * count + 3):
        x, value, upper = _next_of_gram(gram, size, w, X, dtype, 1 + attempt)
        if value <= w[-1] * (1 + 1e-8):
            if value < w[-1] - 4 * NOISE * w[0] < upper:
                raise ConvergenceError(
                    "expected Lanczos to tell the next singular value from those asked for, got one whose error is "
                    "larger than its distance; use a dense array with method='svd'"
                )
            return w, X, upper
        w, X = _ritz(gram, np.column_stack([X, x]), count)
    raise ConvergenceError(
        f"expected Lanczos to find the {count} largest singular values, got others above them time and again; use a "
        "dense array with method='svd'"
    )


def _ritz(gram: Product, X: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest Ritz values of K in the span of X, descending, and their vectors."""
    basis, _ = np.linalg.qr(X)
    values, S = np.linalg.eigh(basis.conj().T @ gram(basis))
    return values[::-1][:count], basis @ S[:, ::-1][:, :count]


def _next_of_gram(
    gram: Product, size: int, w: np.ndarray, X: np.ndarray, dtype: Any, seed: int
) -> tuple[np.ndarray, float, float]:
    """Vector and value of the largest eigenvalue of K on the complement of X, and an upper estimate of that.

    What a random start can have hidden by its small share in a vector, about 1 / sqrt(size), is added. All tolerances
    are relative to the largest value w_0, which K knows no value better than.
    """

    def deflated(x: np.ndarray) -> np.ndarray:
        y = gram(x - X @ (X.conj().T @ x))
        return y - X @ (X.conj().T @ y)

    top, unit, hidden = float(w[0]), float(np.finfo(float).eps), 2 * size**0.5
    rounding = NOISE * top
    # another start each time: the part of this one that is found, and added to X, says nothing of what else there is
    start = np.random.default_rng(seed).standard_normal((size, 1)).astype(dtype)
    start = start - X @ (X.conj().T @ start)
    start /= np.linalg.norm(start)
    if float(np.linalg.norm(deflated(start))) <= rounding:
        return start[:, 0], 0.0, hidden * rounding
    best, value, upper, least = start, 0.0, math.inf, math.inf
    for tolerance in (1e-3, 1e-6, unit):
        try:
            _, x = _lanczos(lambda y: deflated(y) + top * y, size, 1, (best + start)[:, 0], dtype, tolerance)
        except ConvergenceError:
            if upper < w[-1]:  # a rough bound, but one
                break
            raise
        quotient, residual = _rayleigh(deflated, x)
        error = float(np.linalg.norm(residual))
        if error < least:  # near a value with many copies a start that has converged may lose digits
            best, value, least = x, quotient, error
            # what a start has of a larger value it keeps, or more: seen in the residual but for that share
            upper = value + (1 + hidden) * error + rounding
        here, known, bound = (math.sqrt(max(float(x), 0.0)) for x in (w[-1], value, upper))
        if here - bound > 0.99 * (here - known):
            break
    return best[:, 0], value, upper


def _lanczos(
    product: Product,
    size: int,
    count: int,
    start: np.ndarray,
    dtype: Any,
    tolerance: float,
) -> tuple[np.ndarray, np.ndarray]:
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh

    operator = LinearOperator((size, size), matvec=lambda x: product(x.reshape(-1, 1)).reshape(-1), dtype=dtype)
    width = min(size, max(2 * count + 1, 24))
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
