"""The values at the top of the spectrum as one cluster, from the decomposition that a triplet has.

Legend: K = B B^* (r, r) the Gram matrix of the smaller side; w eigenvalues, descending; X (r, c) vectors; theta the
largest value, u its vector; s singular values.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from specpert._arrays import Array, Namespace, adjoint, as_arrays, check_matrix, eps, from_host
from specpert._checks import check_fraction
from specpert._dense import by_dense, of_gram
from specpert._isolation import isolation
from specpert._resolvent import SmallSideResolvent
from specpert._solvers import CholeskySolver, ClusterSolver, EigenSolver, Gram, Product
from specpert._top import SINGLE_ERROR, lanczos, next_value
from specpert.result import ConvergenceError
from specpert.triplet import SingularTriplet, assemble

_REFINE_FROM = 1024  # smaller side from which refined vectors cost less in double precision than all eigenvectors


class _TooManyError(Exception):
    """More values are above the bound than a cluster may have."""


def leading_cluster(A: Any, upper: float, lower: float, most: int = 16, *, rtol: float = 0.0) -> SingularTriplet | None:
    """The largest singular values as one cluster that ends between `upper` and `lower`, where the gap is widest.

    Its series (``sigma_series(cluster, H, order)``, theory 1.8) is of use for steps that single values are too close
    together for. Of a large matrix it costs one more Cholesky factorisation beside the triplet's own, and some solves.

    Parameters
    ----------
    A : array, shape (m, n), or SingularTriplet
        A matrix, or the triplet k = 0 of a dense one.
    upper, lower : float
        Values above `upper` belong to the cluster, values below `lower` do not; to the accuracy of the triplet.
    most : int
        As many values a cluster may have.
    rtol : float
        Relative accuracy asked of what the series has beyond its first order; by default that of the triplet. Where the
        triplet has a factor in single precision, more clusters can do with it: the values have full accuracy all the
        same, vectors and first order about 1e-6.

    Returns
    -------
    SingularTriplet or None
        With k = (0, 1, ...); None where more than `most` values are above `upper`, or none.

    Raises
    ------
    DegenerateSingularValueError, ZeroSingularValueError
        The cluster is tied with the next value, or reaches zero.
    NonFiniteError, TypeError, ValueError
        An argument is not as described.

    Examples
    --------
    >>> import numpy as np
    >>> from specpert import leading_cluster, sigma_series
    >>> cluster = leading_cluster(np.diag([2.1, 2.0, 1.8, 1.0]), upper=1.9, lower=1.5)
    >>> cluster.k
    (0, 1, 2)
    >>> print(sigma_series(cluster, np.eye(4), 1).values(0.5))
    [2.6 2.5 2.3]
    """
    upper, lower = _number(upper, "upper"), _number(lower, "lower")
    if lower > upper:
        raise ValueError(f"expected lower <= upper, got {lower} > {upper}")
    if not isinstance(most, numbers.Integral) or isinstance(most, bool) or most < 1:
        raise ValueError(f"expected most to be a positive integer, got {most!r}")
    most = int(most)
    check_fraction(rtol, "rtol")
    if not isinstance(A, SingularTriplet):
        xp, (A,) = as_arrays(A, names=["A"])
        check_matrix(A, "A", xp)
        if A.ndim > 2:
            raise ValueError(f"expected one matrix (m, n), got a stack of shape {tuple(A.shape)}")
        return _of_matrix(A, upper, lower, most, xp)
    triplet = A
    if triplet.k != 0 or triplet._e.ndim:
        raise ValueError(f"expected the triplet k = 0 of one matrix, got k = {triplet.k} of {triplet.shape}")
    upper, lower = (_scaled(bound, -float(triplet._e)) for bound in (upper, lower))
    if triplet._svd is not None:
        return _of_svd(triplet, upper, lower, most)
    small = triplet._small_side
    if small is None or small.matrix is None:
        raise TypeError("expected a triplet of a dense array, got one that knows only products with it")
    sigma = float(small.sigma[0])
    if upper >= sigma:
        return None
    upper = min(upper, (1 - 1e-13) * sigma)  # so that rounding does not take sigma itself below
    lower = min(lower, upper)
    try:
        return _of_gram(triplet, small, upper, lower, most, rtol)
    except _TooManyError:
        return None
    except (np.linalg.LinAlgError, ConvergenceError):  # Gram matrix or factor do not tell the values apart
        whole = from_host(adjoint(small.whole, np) if small.mirrored else small.whole, triplet._P0, triplet._xp)
        cluster = _of_matrix(whole, upper, lower, most, triplet._xp)
        return cluster and replace(cluster, _e=cluster._e + triplet._e, _dtype=triplet._dtype)


def _number(x: Any, name: str) -> float:
    """A bound as a float, also from an array without axes."""
    if isinstance(x, str | bytes) or getattr(x, "ndim", 0) != 0 or not hasattr(x, "__float__"):
        raise TypeError(f"expected {name} to be a number, got {x!r}")
    number = float(x)
    if not 0 <= number < math.inf:
        raise ValueError(f"expected {name} to be a finite number >= 0, got {number}")
    return number


def _scaled(x: float, e: float) -> float:
    """X 2^e, infinite where that is out of range."""
    return math.inf if x and math.frexp(x)[1] + e > 1000 else math.ldexp(x, int(e))


def _cut(s: np.ndarray, upper: float, lower: float, most: int) -> int | None:
    """How many of the values s, descending and known beyond `lower` or `most`, make the cluster."""
    least = int(np.sum(s > upper))
    if not 0 < least <= most:
        return None
    gaps = s - np.append(s[1:], 0.0)
    ends = gaps[least - 1 : max(least, min(most, int(np.sum(s >= lower))))]
    return least + int(np.argmax(ends))


def _of_matrix(A: Array, upper: float, lower: float, most: int, xp: Namespace) -> SingularTriplet | None:
    """From a decomposition of its own."""
    values = np.asarray([float(x) for x in xp.linalg.svdvals(A)])[: most + 2]
    c = _cut(values, upper, lower, most)
    return None if c is None else by_dense(A, range(c), None, True, "auto", xp)


def _of_svd(triplet: SingularTriplet, upper: float, lower: float, most: int) -> SingularTriplet | None:
    assert triplet._svd is not None
    (m, n), xp, s = triplet.shape, triplet._xp, triplet._svd[1]
    c = _cut(np.asarray([float(x) for x in s])[: most + 2], upper, lower, most)
    if c is None:
        return None
    gap, status = isolation(s, tuple(range(c)), m != n, True, 10 * max(m, n) * eps(s, xp), xp)
    return assemble(replace(triplet, status=status, _cluster=True), triplet._svd, tuple(range(c)), gap)


def _of_gram(
    triplet: SingularTriplet, small: SmallSideResolvent, upper: float, lower: float, most: int, rtol: float
) -> SingularTriplet | None:
    """Raises numpy.linalg.LinAlgError or ConvergenceError where that is not accurate."""
    solve, found = small.solve, None
    if upper**2 <= 100 * len(small.u) * float(np.finfo(float).eps) * float(small.sigma[0]) ** 2:
        raise np.linalg.LinAlgError("the bounds are within the rounding of the Gram matrix")
    if isinstance(solve, CholeskySolver):
        gram = solve.gram
        if not solve.precise or len(solve.K) >= _REFINE_FROM:
            known = _leading(solve, upper * upper, lower * lower, most)
            found = _by_factor(solve, *known, upper, lower, most, max(rtol, solve.rtol))
        if found is None:
            gram = gram.at(small.u.dtype)
            w, X = np.linalg.eigh(solve.K if solve.precise else gram.matrix())
            w, X = w[::-1], X[:, ::-1]
    else:
        assert isinstance(solve, EigenSolver)
        assert small.matrix is not None
        gram, w, X = Gram(small.matrix), solve.values, np.hstack([small.u, solve.X])
    rest: ClusterSolver | np.ndarray
    if found is not None:
        w, X, rest = found.w, found.X, found.solver
    else:
        c = _cut(_roots(w), upper, lower, most)
        if c is None:
            return None
        if c == len(w):
            raise np.linalg.LinAlgError("nothing is outside of the cluster")
        X, rest = X[:, :c], X[:, c:]
    xp = triplet._xp
    return of_gram(triplet.shape, gram, w, X, rest, True, triplet._e, None, triplet._P0, xp, triplet._dtype)


def _by_factor(
    solver: CholeskySolver, w: np.ndarray, X: np.ndarray, upper: float, lower: float, most: int, rtol: float
) -> _Refined | None:
    """The cluster among roughly known values and vectors; None where it is too close for the factor's precision.

    Raises numpy.linalg.LinAlgError where the values are not known well enough.
    """
    for _ in range(most + 1):
        c = _cut(_roots(w), upper, lower, most)
        if c is None:
            raise _TooManyError
        if c == len(w):
            raise np.linalg.LinAlgError("the values at the top are not known well enough")
        close = rtol * (w[c - 1] - w[c]) < SINGLE_ERROR * float(np.finfo(solver.dtype).eps) * w[0]
        if close and not solver.precise:
            return None
        found = _refined(solver, w[: c + 1], X[:, :c], upper * upper, rtol)
        if found.missed is None:
            return found
        # it may change where the cluster ends; those roughly known that it stands for are dropped
        value, x = found.missed
        others = c + np.flatnonzero(np.abs(x.conj().T @ X[:, c:])[0] < 0.5)
        w, X = np.r_[found.w, value, w[others]], np.hstack([found.X, x, X[:, others]])
        order = np.argsort(-w, kind="stable")
        w, X = w[order], X[:, order]
    return None


def _roots(w: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(np.maximum(w, 0.0)))


def _leading(solver: CholeskySolver, upper: float, lower: float, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Values (j,) and vectors (r, j) of K, roughly: all above `lower`, or the first most + 1 of them, and the next one.

    Raises _TooManyError where more than `most` are above `upper`. By Lanczos on the inverse, whose largest values they
    are, until they are known well beside their distances from the bounds and from the value that a cluster would end
    at.
    """
    theta, dtype = solver.theta, solver.L.dtype
    a = solver.a.astype(dtype)
    width = min(len(a) - 1, 8 * most + 32)
    rounding = 16 * float(np.finfo(dtype).eps)
    floor = rounding * theta

    def outside(x: np.ndarray) -> np.ndarray:
        return x - a @ (a.conj().T @ x)

    start = outside(np.random.default_rng(2).standard_normal((len(a), 1)).astype(dtype))
    for basis, T, beta in lanczos(lambda x: outside(solver.rough(x)), start, width):
        exhausted = beta <= rounding * float(np.abs(T).max())
        if exhausted or len(T) % 4 == 0 or len(T) == width:
            values, S = np.linalg.eigh(T)
            values, S = np.maximum(values[::-1], 1 / (2 * theta)), S[:, ::-1]  # of a K without negative values
            w = np.append(theta, theta - 1 / values)  # Ritz values: below those they stand for
            errors = np.append(0.0, beta * np.abs(S[-1]) / values**2) + floor
            if int(np.sum(w > upper + floor)) > most:
                raise _TooManyError
            wanted = min(most, int(np.sum(w >= lower)))
            c = _cut(_roots(w), math.sqrt(upper), math.sqrt(lower), most)
            if exhausted or (c is not None and wanted < len(T) and _settled(w, errors, c, wanted, upper, floor)):
                vectors = basis.T @ S[:, :wanted].astype(dtype)
                return w[: wanted + 1], np.hstack([a, vectors]).astype(solver.a.dtype)
    raise ConvergenceError(
        f"expected Lanczos to find the values at the top within {width} steps, got errors of up to "
        f"{float(errors.max()) / theta:.1e} of the largest"
    )


class _Refined(NamedTuple):
    """Values (c + 1,), the last an upper estimate of the largest not in the cluster; vectors (r, c); solver.

    Or a value and its vector (r, 1) that had been missed.
    """

    w: np.ndarray
    X: np.ndarray
    solver: ClusterSolver
    missed: tuple[float, np.ndarray] | None = None


def _settled(w: np.ndarray, errors: np.ndarray, c: int, wanted: int, upper: float, floor: float) -> bool:
    """Whether nothing that the first c values are chosen for can change any more."""
    small = 1e-2 * (w[c - 1] - w[c])
    # the next value may still grow, but neither above the bound nor so far that the cluster would end elsewhere
    growing = w[c] + errors[c] > max(upper, w[c] + small) + 2 * floor
    return bool(errors[: wanted + 1].max() <= max(small, 2 * floor) and not growing)


def _refined(solver: CholeskySolver, w: np.ndarray, X: np.ndarray, upper: float, rtol: float) -> _Refined:
    """The cluster near X, by Newton's method; the last of the w is roughly the next value.

    Raises numpy.linalg.LinAlgError where the vectors are not known well, or not those of the largest values.
    """
    K, gram, rounding = solver.K, solver.gram, float(np.finfo(X.dtype).eps)
    product: Product = K.__matmul__ if solver.precise else gram
    X, w, outside = np.linalg.qr(X)[0], w[:-1], float(w[-1])
    # about as far from all of the cluster's values
    middle = outside + math.sqrt((w[0] - outside) * (w[-1] - outside))
    cluster = ClusterSolver(CholeskySolver(K, X, middle, gram, rtol, w))
    enough, before = 8 * rounding * w[0], math.inf
    if not solver.precise:  # its equations are solved to single precision only
        enough = max(enough, 1e-6 * (w[-1] - outside))
    for _ in range(8):
        images = product(X)
        w, S = np.linalg.eigh(X.conj().T @ images)
        w, X = w[::-1], X @ S[:, ::-1]
        residual = images @ S[:, ::-1] - X * w
        size = float(np.linalg.norm(residual, axis=0).max())
        cluster.inner.a, cluster.inner.w = X, w
        if size <= enough or size > before / 2:
            break
        before = size
        X = np.linalg.qr(X + cluster(residual))[0]
    if size > max(len(X) * rounding * w[0], enough):
        raise np.linalg.LinAlgError("the vectors of the cluster are not known well enough")
    inner = CholeskySolver(K, X, float(w[-1]), gram, w=w)  # proves that no other value is above the lowest
    least, second, error, x = next_value(product, X, inner, 0.0)
    if least > upper + 8 * rounding * w[0] or least > outside + 0.1 * (w[-1] - outside):
        return _Refined(w, X, cluster, (least, x))
    if w[-1] - second <= 10 * error:
        raise np.linalg.LinAlgError("the next value is not known well enough")
    return _Refined(np.append(w, second), X, cluster)
