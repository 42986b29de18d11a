"""Taylor series of a singular value, or of a cluster of them, along a direction or an analytic family.

Legend: A(x) = A + x A_1 + x^2 A_2 + ...; lam_n Taylor coefficients; P_n (..., m), Q_n (..., n) vector series;
E_n (..., c, c) effective matrices of a cluster (theory 1.8); e, t exponents of two: A / 2^e and A_j / 2^(e + j t).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from specpert._arrays import (
    NEARER,
    Array,
    Namespace,
    Portable,
    adjoint,
    array,
    exponent,
    finite,
    is_numpy,
    kernels,
    ldexp,
    magnitude,
    namespace,
    real,
    scalar,
    to_precision,
)
from specpert._checks import check_order
from specpert._operators import Operator
from specpert._recursion import Vectors, extend, products, value_coefficients
from specpert.certificate import Certificate
from specpert.prepare import prepare
from specpert.result import NonFiniteError, Status
from specpert.triplet import SingularTriplet


@dataclass(frozen=True, eq=False)
class Scaled(Portable):
    """Terms of order 0, 1, ... on the last axis, each with an exponent of two: what may leave the range of floats."""

    terms: Array
    power: Array  # broadcasts with the terms
    xp: Namespace

    @classmethod
    def of(cls, terms: list[Array], e: Array, t: Array, triplet: SingularTriplet) -> Scaled:
        """Term n times 2^(e + n t), in the precision of results."""
        xp = triplet._xp
        stacked = to_precision(xp.stack(xp.broadcast_arrays(*terms), axis=-1), triplet._dtype, xp)
        orders = array([float(n) for n in range(len(terms))], t, xp)
        power = xp.astype(e[..., None] + orders * t[..., None], triplet._dtype, copy=False)
        power = xp.reshape(power, (*power.shape[:-1], *(1,) * (terms[0].ndim - e.ndim), len(terms)))
        if len(terms) == 1:  # the other terms have the axes of a stack of directions
            stacked = stacked + xp.zeros_like(power, dtype=stacked.dtype)
        return cls(stacked, power, xp)

    def first(self) -> Scaled:
        """Of the one value there is."""
        return Scaled(self.terms[..., 0, :], self.power[..., 0, :], self.xp)

    def completed(self, other: Scaled) -> Scaled:
        """With the terms of another where a value, or matrix, has terms that are not finite."""
        xp = self.xp
        known = xp.all(xp.isfinite(self.terms), axis=-1, keepdims=True)
        power = xp.where(known, *xp.broadcast_arrays(self.power, other.power))
        return Scaled(xp.where(known, self.terms, other.terms), power, xp)

    def __call__(self, x: Array) -> Array:
        """The sum at x, as far as terms and powers of x are in range together; raises OverflowError beyond."""
        total, e = self.sum(x)
        return finite(ldexp(total, e, self.xp), "sum of the series", self.xp, NEARER)

    @np.errstate(over="ignore", invalid="ignore")
    def sum(self, x: Array) -> tuple[Array, Array]:
        """The sum at x over 2^e, and e; not finite where it leaves the range."""
        e, xp = self.power[..., 0], self.xp
        y = ldexp(x + 0 * e, self.power[..., 1] - e + 0 * x, xp) if self.terms.shape[-1] > 1 else x
        total, in_range = self.terms[..., -1] + xp.zeros_like(y), bool(xp.all(xp.isfinite(y)))
        for n in range(self.terms.shape[-1] - 2, -1, -1):
            # zero times what has left the range is zero
            total = total * (y if in_range else xp.where(total == 0, xp.zeros_like(y), y)) + self.terms[..., n]
        return total, e + xp.zeros_like(real(total, xp))

    def coefficients(self) -> Array:
        """All terms; raises OverflowError where one leaves the range."""
        what = f"coefficients up to order {self.terms.shape[-1] - 1}"
        return finite(ldexp(self.terms, self.power, self.xp), what, self.xp)

    def derivative(self, n: int) -> Array:
        """Term n times n!, scaled once."""
        return times_factorial(self.terms[..., n], n, self.xp, self.power[..., n])


@dataclass(frozen=True, eq=False, repr=False)
class SigmaSeries:
    """Taylor series of one singular value (or of several, on an axis before the order).

    Attributes
    ----------
    coefficients : array, shape (..., N + 1) or (..., K, N + 1)
        Taylor coefficients lam_0 = sigma, lam_1, ... lam_N.
    gap : array
        Isolation distance of the value (theory 1.9).
    status : Status
        Whether digits are lost to a close neighbour.
    left, right : array, shape (..., m, N + 1) and (..., n, N + 1), or None
        Coefficients of the vector series P(x), Q(x), where asked for; the singular vectors at x are P(x) / ||P(x)||
        and Q(x) / ||Q(x)|| (theory 1.7).
    """

    coefficients: Array
    gap: Array
    status: Status
    left: Array | None
    right: Array | None
    _certificate: Certificate = field(repr=False)
    _scaled: Scaled = field(repr=False)  # the coefficients

    @property
    def order(self) -> int:
        """N, the order of the last coefficient."""
        return int(self.coefficients.shape[-1]) - 1

    @property
    def derivatives(self) -> Array:
        """The n! lam_n: derivatives of sigma(A(x)) at x = 0; for a linear family D^n sigma[H, ..., H]."""
        terms = [self._scaled.derivative(n) for n in range(self.order + 1)]
        return namespace(self.coefficients).stack(terms, axis=-1)

    @property
    def radius(self) -> Array:
        """Certified radius of convergence r0 (theory 1.9)."""
        return self._certificate.radius()

    def remainder(self, x: Any) -> Array:
        """Bound of ``|sigma(A(x)) - series(x)|``; infinite outside the radius (theory 1.9)."""
        return self._certificate.remainder(x, self.order)

    def __call__(self, x: Any) -> Array:
        """Sum of the series at x, a finite real number or a real array that broadcasts with the stack.

        Raises OverflowError where it leaves the range of its dtype.
        """
        argument, xp = self._certificate.argument(x), namespace(self.coefficients)
        if not bool(xp.all(xp.isfinite(argument))):
            raise NonFiniteError("expected x to be finite, got NaN or inf")
        return scalar(self._scaled(argument))

    def __repr__(self) -> str:
        return f"SigmaSeries(coefficients={self.coefficients}, gap={self.gap}, {self.status.name})"


@dataclass(frozen=True, eq=False, repr=False)
class ClusterSeries:
    """Taylor series of the effective matrix of a cluster (theory 1.8): small gaps inside it do not matter.

    Attributes
    ----------
    effective_matrices : array, shape (..., N + 1, c, c)
        E_0 ... E_N; the eigenvalues of sum_n x^n E_n are the singular values of the cluster at x.
    gap : array
        Distance of the cluster to the rest of the spectrum.
    status : Status
        Always ``Status.CLUSTER``.
    left, right : array, shape (..., m, c, N + 1) and (..., n, c, N + 1), or None
        Coefficients of the block series, where asked for: they span the singular subspaces.
    """

    effective_matrices: Array
    gap: Array
    status: Status
    left: Array | None
    right: Array | None
    _certificate: Certificate = field(repr=False)
    _scaled: Scaled = field(repr=False)  # of the mean
    _matrices: Scaled = field(repr=False)  # the effective matrices

    @property
    def order(self) -> int:
        """N, the order of the last effective matrix."""
        return int(self.effective_matrices.shape[-3]) - 1

    @property
    def mean(self) -> Array:
        """Taylor coefficients (..., N + 1) of the mean of the cluster's singular values: tr E_n / c."""
        return self._scaled.coefficients()

    @property
    def radius(self) -> Array:
        """Certified radius of convergence of the mean (theory 1.9)."""
        return self._certificate.radius()

    def remainder(self, x: Any) -> Array:
        """Bound of the error of the partial sum of the mean at x; infinite outside the radius."""
        return self._certificate.remainder(x, self.order)

    def values(self, x: float) -> Array:
        """The cluster's singular values at x, a real number, in descending order, shape (..., c).

        Raises OverflowError where they leave the range of their dtype.
        """
        if not isinstance(x, numbers.Real):
            raise TypeError(f"expected x to be a real number, got {type(x).__name__}")
        if not math.isfinite(x):
            raise ValueError(f"expected x to be finite, got {x}")
        xp = namespace(self.effective_matrices)
        total, e = self._matrices.sum(self._certificate.argument(float(x)))
        finite(total, "values of the cluster", xp, NEARER)
        # E(x) is similar to a Hermitian matrix, so its eigenvalues are real up to rounding
        eigenvalues = xp.sort(xp.real(xp.linalg.eigvals(total)), axis=-1, descending=True)
        return finite(ldexp(eigenvalues, e[..., 0], xp), "values of the cluster", xp, NEARER)

    def __repr__(self) -> str:
        return f"ClusterSeries(mean={self.mean}, gap={self.gap}, {self.status.name})"


@overload
def sigma_series(
    A: Any, coefficients: Any, order: int, *, k: tuple[int, ...], vectors: bool = False
) -> ClusterSeries: ...
@overload
def sigma_series(
    A: Any, coefficients: Any, order: int, *, k: int | list[int] = 0, vectors: bool = False
) -> SigmaSeries: ...
def sigma_series(
    A: Any, coefficients: Any, order: int, *, k: int | Sequence[int] = 0, vectors: bool = False
) -> SigmaSeries | ClusterSeries:
    r"""Taylor series of a singular value along a direction or an analytic family.

    For :math:`A(x) = A + x A_1 + x^2 A_2 + \dots` the coefficients of
    :math:`\sigma_k(A(x)) = \sum_n \lambda_n x^n` follow from Kato's expansion of the Jordan-Wielandt matrix
    (theory 1.4), with vectors up to order N/2 only (theory 1.5).

    Parameters
    ----------
    A : array, shape (..., m, n), scipy.sparse array, LinearOperator, or SingularTriplet
        The matrix, or what :func:`singular_triplet` prepared from it (its k is then used).
    coefficients : array, shape (..., m, n), or sequence of such arrays
        One array is the direction H of the linear family A + x H; a sequence is A_1, A_2, ... Beside a sparse array or
        operator they may be dense, sparse or operators; the radius for a LinearOperator rests on an estimate of its
        norm by Lanczos.
    order : int
        N, order of the last coefficient; 0 gives the singular value alone.
    k : int, list of int, or tuple of int
        Index of the singular value, 0 being the largest. A list asks for several values, each with its own series; a
        tuple of consecutive indices for the block series of that cluster, in which ties do not matter (theory 1.8).
    vectors : bool
        Whether to return the vector series as well; they then go to order N.

    Returns
    -------
    SigmaSeries
        For one k or a list.
    ClusterSeries
        For a tuple.

    Raises
    ------
    DegenerateSingularValueError, ZeroSingularValueError
        The value asked for is tied, or zero.
    OverflowError
        A coefficient exceeds the range of the dtype.
    IndexError, NonFiniteError, TypeError, ValueError
        k, order or an array is not as described.

    Examples
    --------
    The square root of 9 + x^2 is the singular value of [3, x]:

    >>> from specpert import sigma_series
    >>> series = sigma_series([[3.0, 0.0]], [[0.0, 1.0]], 4)
    >>> print(series.coefficients)
    [ 3.          0.          0.16666667  0.         -0.00462963]
    >>> float(series.radius)
    1.4999999999999...
    >>> bool(abs(series(0.1) - 9.01**0.5) <= series.remainder(0.1))
    True

    A cluster through an exact tie: the values of [[1, x], [x, 1]] are 1 + x and 1 - x.

    >>> cluster = sigma_series([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]], 3, k=(0, 1))
    >>> print(cluster.values(0.25), cluster.mean)
    [1.25 0.75] [1. 0. 0. 0.]
    """
    order = check_order(order, 0)
    cluster = isinstance(k, tuple) or (isinstance(A, SingularTriplet) and A._cluster)
    family = _as_family(coefficients)
    names = ["H"] if len(family) == 1 else [f"A_{j}" for j in range(1, len(family) + 1)]
    triplet, family = prepare(A, k, family, names, cluster=cluster, widen=False)
    return expand(triplet, family, order, vectors)


def expand(
    triplet: SingularTriplet, family: list[Array], order: int, vectors: bool = False
) -> SigmaSeries | ClusterSeries:
    """Series of what the triplet holds, for a family of the right library, dtype and shape."""
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is found in the coefficients, and raised
        return _expand(triplet, family, order, vectors)


def _expand(triplet: SingularTriplet, family: list[Array], order: int, vectors: bool) -> SigmaSeries | ClusterSeries:
    xp = triplet._xp
    # powers of directions much smaller than the value would underflow in a high order
    ordinary = ORDINARY_ORDERS if xp.finfo(triplet._dtype).bits > 32 else ORDINARY_ORDERS // 2
    unit = xp.max(triplet._values, axis=-1) if order > ordinary else None
    parts = _terms(triplet, family, order, vectors, unit)
    if not all(bool(xp.all(xp.isfinite(part.terms))) for part in parts[:-1] if part is not None):
        # powers of 1 / d overflow; in units of d they cannot, but those of values with a larger d may underflow
        first, parts = parts, _terms(triplet, family, order, vectors, xp.min(triplet._gap, axis=-1))
        vector_series = parts[2:4] if parts[1] is not None else _completed(first[2:4], parts[2:4])
        parts = (first[0].completed(parts[0]), parts[1], *vector_series, parts[4])
    if parts[1] is None and (unit := _unit_of_small_terms(parts[0])) is not None:
        # what is large in the directions has no part in the value, whose terms are then near the end of the range
        first, parts = parts, _terms(triplet, family, order, vectors, xp.full_like(triplet._e, unit))
        parts = (parts[0].completed(first[0]), None, *_completed(parts[2:4], first[2:4]), first[4])
    lam, E, left, right, certificate = parts
    P, Q = (None if part is None else part.coefficients() for part in (left, right))
    if E is not None:
        matrices = xp.moveaxis(E.coefficients(), -1, -3)
        return ClusterSeries(matrices, triplet.gap, triplet.status, P, Q, certificate, lam, E)
    return SigmaSeries(lam.coefficients(), triplet.gap, triplet.status, P, Q, certificate, lam)


_Terms = tuple["Scaled", "Scaled | None", "Scaled | None", "Scaled | None", Certificate]


def _terms(triplet: SingularTriplet, family: list[Array], order: int, vectors: bool, unit: Array | None) -> _Terms:
    """Coefficients (of a cluster's mean), effective matrices of a cluster, both vector series, and the certificate."""
    xp, cluster = triplet._xp, triplet._cluster
    t, scaled = scale(family, triplet._e, xp, unit)

    def of(terms: list[Array], e: Array) -> Scaled:
        return Scaled.of(terms, e, t, triplet)

    if not vectors and _is_small(triplet, scaled):
        lam = of(_by_kernel(triplet, scaled[0], order), triplet._e).first()
        return lam, None, None, None, Certificate(triplet, t, tuple(scaled))
    state = Vectors([products(A_j, xp) for A_j in scaled], triplet._P0, triplet._Q0)
    resolvent = triplet._resolvent()
    needed = order if vectors or cluster else order // 2
    E = extend(state, resolvent, triplet._E0, triplet._cluster, needed, xp, last=vectors or not cluster)
    left = right = None
    if vectors:
        left, right = (of(w, xp.zeros_like(triplet._e)) for w in (state.P, state.Q))
        left, right = (w.first() if isinstance(triplet.k, int) else w for w in (left, right))
    certificate = Certificate(triplet, t, tuple(scaled), tuple(getattr(resolvent, "residuals", ())))
    if cluster:
        means = [real(xp.sum(xp.linalg.diagonal(E_n), axis=-1), xp) / len(triplet._indices) for E_n in E]
        return of(means, triplet._e), of(E, triplet._e), left, right, certificate
    lam = of(value_coefficients(state, E, order, xp), triplet._e)
    return lam.first() if isinstance(triplet.k, int) else lam, None, left, right, certificate


def _completed(
    series: tuple[Scaled | None, Scaled | None], others: tuple[Scaled | None, Scaled | None]
) -> tuple[Scaled | None, Scaled | None]:
    """Both vector series completed by others, where there are any."""
    left, right = (None if a is None or b is None else a.completed(b) for a, b in zip(series, others, strict=True))
    return left, right


def _unit_of_small_terms(lam: Scaled) -> float | None:
    """One in which terms are larger, where some are so small that digits are lost; else None."""
    xp, size = lam.xp, lam.xp.abs(lam.terms[..., 1:])
    least = float(xp.finfo(size.dtype).smallest_normal) ** 0.75
    lost = (size > 0) & (size < least)
    if not bool(xp.any(lost)):
        return None
    rates = xp.log2(xp.where(lost, size, xp.ones_like(size)))
    orders = array([float(n) for n in range(1, lam.terms.shape[-1])], size, xp)
    largest = math.log2(float(xp.finfo(size.dtype).max)) - 2  # the unit must be a number too
    return 2.0 ** min(float(xp.max(-rates / orders)), largest)


SMALL = 64  # side up to which a matrix counts as small


def _is_small(triplet: SingularTriplet, family: list[Any]) -> bool:
    """Whether the kernels of small matrices can do it: NumPy, one value, one direction for each matrix."""
    return (
        is_numpy(triplet._P0)
        and isinstance(triplet.k, int)
        and triplet._svd is not None
        and max(triplet.shape[-2:]) <= SMALL
        and len(family) == 1
        and not isinstance(family[0], Operator)
        and tuple(family[0].shape) == triplet.shape
    )


def _by_kernel(triplet: SingularTriplet, H: Array, order: int) -> list[Array]:
    """Coefficients of order 0, 1, ..., each (..., 1)."""
    assert triplet._svd is not None
    U, s, V = (x.reshape(-1, *x.shape[len(triplet.shape) - 2 :]) for x in triplet._svd)
    out = np.empty((len(s), order + 1), s.dtype)
    Vh, H = np.ascontiguousarray(adjoint(V, triplet._xp)), np.ascontiguousarray(H.reshape(-1, *H.shape[-2:]))
    assert isinstance(triplet.k, int)
    kernels(len(s), hurried=False).direction_series(U, s, Vh, H, triplet.k, out)
    return [out[:, n].reshape(*triplet.shape[:-2], 1) for n in range(order + 1)]


def fast_coefficients(A: Any, H: Any, k: Any, order: int) -> np.ndarray | None:
    """Coefficients along H of one small NumPy matrix of ordinary size and spectrum; None where more care is needed.

    It spares the general path, whose checks take longer than the mathematics of a small matrix.
    """
    if not (type(A) is type(H) is np.ndarray and A.ndim == 2 and A.shape == H.shape and type(k) is int):
        return None
    if not (A.dtype == H.dtype and A.dtype in _FAST_DTYPES and 0 <= k < min(A.shape) and max(A.shape) <= SMALL):
        return None
    if order > ORDINARY_ORDERS:
        return None
    try:
        U, s, Vh = np.linalg.svd(A, full_matrices=False)
    except np.linalg.LinAlgError:
        return None
    top, value = float(s[0]), float(s[k])
    tol = 10 * max(A.shape) * _FAST_EPS * top
    above = float(s[k - 1]) - value if k > 0 else value
    below = value - float(s[k + 1]) if k + 1 < len(s) else value
    if not (1e-4 < top < 1e4 and min(value, above, below) > tol and 1e-4 < float(np.abs(H).max()) < 1e4):
        return None
    out = np.empty((1, order + 1))
    kernels(1).direction_series(U[None], s[None], Vh[None], np.ascontiguousarray(H)[None], k, out)
    return out[0] if math.isfinite(out.sum()) else None


_FAST_DTYPES = (np.dtype(np.float64), np.dtype(np.complex128))
# Up to which no coefficient of numbers of ordinary size (2^+-16, in float32 2^+-4) leaves the range of floats; in
# float32 half of that.
ORDINARY_ORDERS = 20
_FAST_EPS = float(np.finfo(np.float64).eps)


def times_factorial(x: Array, n: int, xp: Namespace, power: Array | float = 0.0) -> Array:
    """Return n! 2^power x; raises OverflowError where that leaves the range of x, and only there."""
    factorial = math.factorial(n)
    bits = factorial.bit_length()
    product = ldexp(x * (factorial / 2**bits), power + array(float(bits), real(x, xp), xp), xp)
    return finite(product, f"derivative of order {n}", xp)


def _as_family(coefficients: Any) -> list[Any]:
    """One direction, or the sequence A_1, A_2, ...; nested lists of numbers are one matrix."""
    if isinstance(coefficients, list | tuple) and coefficients:
        first = coefficients[0]
        if getattr(first, "ndim", None) is None:
            first = np.asarray(first)
        if first.ndim >= 2:
            return list(coefficients)
    return [coefficients]


def scale(family: list[Any], e: Array, xp: Namespace, unit: Array | None = None) -> tuple[Array, list[Any]]:
    """Exponent t (...) and A_j / 2^(e + j t), the largest of which is about one, or about `unit` (...)."""
    t = array(-math.inf, e, xp)
    for j, A_j in enumerate(family, start=1):
        size = array(A_j.size * abs(A_j.factor), e, xp) if isinstance(A_j, Operator) else magnitude(A_j, xp)
        step = xp.ceil((exponent(size, xp, always=unit is not None) - e) / j)
        t = xp.maximum(t, xp.where(size > 0, step, xp.full_like(step, -math.inf)))
    t = xp.where(xp.isfinite(t), t, xp.zeros_like(t))
    if unit is not None:
        t = t + xp.ceil(-xp.log2(xp.astype(unit, e.dtype)))
    return t, [_scaled(A_j, e + j * t, xp) for j, A_j in enumerate(family, start=1)]


def _scaled(A_j: Any, e: Array, xp: Namespace) -> Any:
    return A_j.scaled(float(e)) if isinstance(A_j, Operator) else ldexp(A_j, -e[..., None, None], xp)
