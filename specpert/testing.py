r"""Checks for your own matrices, directions, operators and functions, and random matrices of a prescribed spectrum.

The values that results are compared with come from samples of the singular values of A(x) for x inside the certified
radius: no formula of perturbation theory, and nothing of specpert, is used for them. Two rules turn samples into
Taylor coefficients, both with explicit bounds of what they cut off and of how they amplify rounding errors:

* on a circle in the complex plane (Cauchy's integral, dense float64): sigma(A(x)) for complex x is the eigenvalue of
  [[0, A(x)], [A(conj x)^*, 0]] in the disc of radius d/2 around sigma_k, which holds no other one (theory 1.9);
* on a real interval (interpolation, weights in rational arithmetic): for operators, functions and high precision.

Every tolerance is built from one number, the backward error of a stable computation 10 max(m, n) eps s_1 (theory 1.9),
which moves lam_n by at most e (n + 1) times itself times r0^-n, where r0^-1 = 2 ||H|| / d for a direction H.

All arrays are converted to NumPy for checking, from whatever library or device they are.

Legend: A(x) = A + x A_1 + x^2 A_2 + ...; lam_n Taylor coefficients; d isolation distance; r0 radius; N order;
rho = |x| / r0 of the samples; M their number; unit d r0^-n eps.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from specpert._arrays import ldexp
from specpert._checks import check_callables, check_choice, check_count
from specpert.derivative import sigma_derivative
from specpert.series import ClusterSeries, sigma_series

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = [
    "CheckReport",
    "MatrixWithSpectrum",
    "check_certificate",
    "check_derivative",
    "check_series",
    "matrices_with_spectrum",
]

_EPS = 2.0**-52
_DENSE_LIMIT = 400  # operators with m + n up to this are made dense
Kind = Literal["separated", "close", "tied", "graded", "deficient"]


@dataclass(frozen=True)
class CheckReport:
    """What a passed check found.

    Attributes
    ----------
    orders : tuple of int
        The orders that were compared.
    errors : tuple of float
        Largest difference at each of them, over the stack and all k.
    tolerances : tuple of float
        What was allowed where that difference occurred.
    reference : str
        What the results were compared with.
    """

    orders: tuple[int, ...]
    errors: tuple[float, ...]
    tolerances: tuple[float, ...]
    reference: str

    @property
    def worst(self) -> float:
        """Largest ratio of error to tolerance, at most one."""
        return max(e / t if t > 0 else 0.0 for e, t in zip(self.errors, self.tolerances, strict=True))


def check_series(
    A: Any,
    coefficients: Any,
    order: int,
    *,
    k: int | Sequence[int] = 0,
    computed: Any = None,
    digits: int | None = None,
    factor: float = 1.0,
) -> CheckReport:
    r"""Check Taylor coefficients of a singular value, or of the mean of a cluster, against samples of A(x).

    A coefficient may be off by

    .. math:: r_0^{-n} [ 10 \max(m, n)\, s_1 ( e (n + 1)\, \varepsilon + a_n\, \varepsilon_0 ) + t_n ]

    with :math:`\varepsilon` that of the dtype of the coefficients and :math:`\varepsilon_0` of the samples,
    :math:`a_n` the amplification (on the circle at most e (N + 1)) and :math:`t_n` the truncation of the rule.

    Parameters
    ----------
    A : array, shape (..., m, n), sparse array or LinearOperator
        The matrix. Operators with m + n > 400 are sampled by Lanczos, and only for values among the largest.
    coefficients : array, shape (..., m, n), or sequence of such arrays
        The direction H, or A_1, A_2, ... of a family, as in :func:`specpert.sigma_series`.
    order : int
        N, order of the last coefficient.
    k : int, list of int or tuple of int
        Which value; a list for several, a tuple for a cluster, whose mean is checked.
    computed : array, shape (..., N + 1) or (..., K, N + 1), optional
        Coefficients of another origin to check; by default those of :func:`specpert.sigma_series`.
    digits : int, optional
        Sample with that many decimal digits (needs mpmath); by default in float64.
    factor : float
        Multiplies all tolerances.

    Returns
    -------
    CheckReport
        Of orders 0 ... N.

    Raises
    ------
    AssertionError
        A coefficient is off by more than the tolerance.
    ValueError
        The gap is so small that the tolerance exceeds the largest coefficient there can be (theory 1.9).
    ImportError
        `digits` is given and mpmath is not installed.
    SpecpertError, IndexError, TypeError
        As :func:`specpert.sigma_series`.

    Examples
    --------
    The singular value of [3, x] is sqrt(9 + x^2):

    >>> from specpert.testing import check_series
    >>> report = check_series([[3.0, 0.0]], [[0.0, 1.0]], 4)
    >>> report.orders, report.worst < 1
    ((0, 1, 2, 3, 4), True)
    >>> check_series([[3.0, 0.0]], [[0.0, 1.0]], 2, computed=[3.0, 0.0, 0.25])
    Traceback (most recent call last):
        ...
    AssertionError: expected lam_2 = 1.66666...e-01 (samples on a circle), got 2.500000000000e-01: off by 8.333e-02...
    """
    __tracebackhide__ = True
    if digits is not None:
        check_count(digits, "digits")
    if computed is None:
        series = sigma_series(A, coefficients, order, k=k)  # type: ignore[arg-type]
        computed = series.mean if isinstance(series, ClusterSeries) else series.coefficients
    found = _numpy(computed)
    comparison = _Comparison(_eps(found), factor)
    groups = _groups(k)
    for index, matrix, family in _matrices(A, coefficients):
        row = found[index]
        expected_shape: tuple[int, ...] = (order + 1,)
        if _is_several(k):
            expected_shape = (len(groups), order + 1)
        if row.shape != expected_shape:
            raise ValueError(f"expected coefficients of shape {expected_shape} for each matrix, got {row.shape}")
        for values, group in zip(row.reshape(len(groups), -1), groups, strict=True):
            problem = _Problem.make(matrix, family, group)
            reference, rule = problem.samples(order, digits)
            comparison.coefficients(problem, values, reference, rule, 10.0**-digits if digits else _EPS)
    return comparison.report()


def check_derivative(
    function: Callable[..., Any],
    A: Any,
    directions: Any = None,
    order: int = 1,
    *,
    k: int = 0,
    computes: Literal["derivative", "sigma"] = "derivative",
    layout: str = "tensor",
    factor: float = 1.0,
) -> CheckReport:
    r"""Check a derivative function against specpert, or specpert against a function that computes sigma_k.

    With ``computes="derivative"`` the results may differ by :math:`c_n \prod_i (2 \|H_i\| / d)` times
    :math:`10 \max(m, n)\, s_1\, e (n + 1) (\varepsilon + \varepsilon')`, the epsilons those of the two results;
    :math:`c_n` is n! for one direction and n^n for several or none (Cauchy's bound on a polydisc). With
    ``computes="sigma"`` the tolerance is that of :func:`check_series`, samples being taken from `function`.

    Parameters
    ----------
    function : callable
        ``function(A, directions)`` gives D^n sigma_k[H_1, ..., H_n], or ``function(A)`` the dense derivative where no
        directions are given; it is called with the arrays as they are, so it may use any library and its autograd.
        With ``computes="sigma"``, ``function(A)`` gives sigma_k.
    A : array, shape (m, n)
        One matrix.
    directions : array or sequence of arrays, optional
        One array H, used `order` times, or H_1, ..., H_n. None for the dense derivative.
    order : int
        n >= 1.
    k : int
        Which singular value.
    computes : {"derivative", "sigma"}
        What `function` computes.
    layout : {"tensor", "vec"}
        Of a dense derivative, as in :func:`specpert.sigma_derivative`.
    factor : float
        Multiplies all tolerances.

    Returns
    -------
    CheckReport
        Of order n; with ``computes="sigma"`` and one direction of the Taylor coefficients 0 ... n.

    Raises
    ------
    AssertionError
        The two differ by more than the tolerance.
    ValueError
        The gap is too small for anything to be checked; A is a stack; sigma is to be sampled without a direction.
    SpecpertError, IndexError, TypeError
        As :func:`specpert.sigma_derivative`.

    Examples
    --------
    The second derivative of the norm of a row a is (|h|^2 - (a.h)^2 / |a|^2) / |a|:

    >>> import numpy as np
    >>> from specpert.testing import check_derivative
    >>> def second(A, H):
    ...     return (np.sum(H * H) - np.sum(A * H) ** 2 / np.sum(A * A)) / np.linalg.norm(A)
    >>> A, H = np.array([[3.0, 4.0]]), np.array([[1.0, 2.0]])
    >>> check_derivative(second, A, H, order=2).orders
    (2,)
    >>> check_derivative(np.linalg.norm, A, [H, H], order=2, computes="sigma").worst < 1
    True
    """
    __tracebackhide__ = True
    check_choice(computes, "computes", ("derivative", "sigma"))
    check_callables(function=function)
    A = np.asarray(A) if isinstance(A, list | tuple) else A
    one = directions is not None and not _is_sequence(directions)
    given = [] if directions is None else [directions] * order if one else list(directions)
    matrix, family = _numpy(A), [_numpy(H) for H in given]
    if matrix.ndim != 2 or any(H.shape != matrix.shape for H in family):
        raise ValueError(
            f"expected one matrix and directions of its shape, got {matrix.shape} and {[H.shape for H in family]}"
        )
    ours = sigma_derivative(A, order, k=k, directions=directions, layout=layout)
    if computes == "sigma":
        if not given:
            raise ValueError("expected a direction to sample sigma along, got directions=None")
        given = [np.asarray(H) if isinstance(H, list | tuple) else H for H in given]
        return _against_sigma(function, A, given, one, k, ours, factor)
    theirs = _numpy(function(A) if directions is None else function(A, directions))
    expected = _numpy(ours)
    if theirs.shape != expected.shape:
        raise ValueError(f"expected function to return shape {expected.shape}, got {theirs.shape}")
    problem = _Problem.make(matrix, family[:1], (k,))
    size = _polydisc(problem.d, family, order, one)
    comparison = _Comparison(max(_eps(theirs), _eps(expected)), factor)
    relative = problem.noise(_eps(theirs) + _eps(expected)) * math.e * (order + 1)
    name = f"D^{order} sigma_{k}" + ("" if directions is not None else " (largest difference)")
    results = size.under(theirs), size.under(expected)
    comparison.one(problem, order, *results, relative, size, f"{name} = {{}} (specpert)")
    return comparison.report()


def check_certificate(
    A: Any,
    coefficients: Any,
    order: int,
    *,
    k: int | tuple[int, ...] = 0,
    series: Any = None,
    samples: int = 33,
    digits: int | None = None,
) -> CheckReport:
    r"""Check that the remainder bound of a series holds at real points inside its radius.

    The points fill (-r0, r0), ends at 0.99 r0. Of a float64 sample an error of :math:`10 \max(m, n)\, \varepsilon s_1`
    is allowed for; with `digits` nothing is.

    Parameters
    ----------
    A : array, shape (m, n), sparse array or LinearOperator
    coefficients : array, shape (m, n), or sequence of such arrays
        The direction H, or A_1, A_2, ... of a family.
    order : int
        N, order of the partial sum.
    k : int or tuple of int
        Which value, or which cluster, the mean of which is checked.
    series : object, optional
        What to check in place of ``sigma_series(A, coefficients, order, k=k)``: it has ``radius``, ``remainder(x)``
        and ``coefficients``, or ``mean`` for a cluster.
    samples : int
        Number of points.
    digits : int, optional
        Sample with that many decimal digits (needs mpmath).

    Returns
    -------
    CheckReport
        Of order N: the error and the bound at the point where their ratio is largest.

    Raises
    ------
    AssertionError
        An error exceeds its bound, or a bound inside the radius is not finite.
    ValueError
        The certified radius is zero, so that nothing is claimed; A or a direction is a stack.
    SpecpertError, IndexError, TypeError
        As :func:`specpert.sigma_series`.

    Examples
    --------
    >>> from specpert.testing import check_certificate
    >>> report = check_certificate([[3.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [0.0, 1.0]], 4)
    >>> report.orders, 0 < report.worst < 1
    ((4,), True)
    """
    __tracebackhide__ = True
    check_count(samples, "samples")
    if digits is not None:
        check_count(digits, "digits")
    if _is_several(k):
        raise TypeError(f"expected one index k or the tuple of a cluster, got {k!r}; check one value at a time")
    if any(len(np.shape(X)) > 2 for X in (A, *(coefficients if _is_sequence(coefficients) else [coefficients]))):
        raise ValueError("expected one matrix and one direction or family, got a stack; check one matrix at a time")
    if series is None:
        series = sigma_series(A, coefficients, order, k=k)
    lam = _numpy(series.mean if isinstance(k, tuple) else series.coefficients)
    radius = float(_numpy(series.radius))
    if not radius > 0:
        raise ValueError("expected a series with a certified radius, got radius 0: the gap is lost in rounding errors")
    ((_, matrix, family),) = _matrices(A, coefficients)
    problem = _Problem.make(matrix, family, _groups(k)[0])
    exact_value = _exact(problem, digits) if digits else None
    allowance = 0.0 if digits else problem.noise(_EPS)
    worst = (-1.0, 0.0, 0.0)
    reach = radius if math.isfinite(radius) else 8 * problem.r0  # whoever claims more must hold more
    for x in 0.99 * reach * np.linspace(-1, 1, samples):
        claimed = float(_numpy(series.remainder(float(x))))
        partial = functools.reduce(lambda total, c, x=float(x): total * x + c, lam[::-1], 0.0)  # type: ignore[misc]
        exact = exact_value(float(x), 1.0) if exact_value else problem.value(float(x))
        error = abs(float(exact - float(partial)))
        if not error <= claimed + allowance or not math.isfinite(claimed):
            raise AssertionError(
                f"expected sigma = {float(exact):.15e} at x = {x:.6e} ({abs(x) / radius:.2f} of the radius "
                f"{radius:.6e}) within {claimed:.3e} of the partial sum of order {order}, got {partial:.15e}: "
                f"off by {error:.3e} (the sample's own error is at most {allowance:.1e})"
            )
        bound = claimed + allowance
        worst = max(worst, (error / bound if bound > 0 else 0.0, error, bound))
    return CheckReport((order,), (worst[1],), (worst[2],), f"samples of {digits} digits" if digits else "samples")


class _Scale(NamedTuple):
    """m 2^e, which may be far out of the range of floats."""

    m: float
    e: int

    @classmethod
    def of(cls, *factors: float) -> _Scale:
        """Their product."""
        m, e = 1.0, 0
        for factor in factors:
            part, more = math.frexp(factor)
            m, carried = math.frexp(m * part)
            e += more + carried
        return cls(m, e)

    def power(self, n: int) -> _Scale:
        """Its n-th power."""
        m, e = _Scale.of(*[self.m if n > 0 else 1 / self.m] * abs(n))
        return _Scale(m, e + n * self.e)

    def by(self, other: _Scale) -> _Scale:
        """Their product."""
        return _Scale(self.m * other.m, self.e + other.e)

    def over(self, other: _Scale) -> float:
        """Its ratio to another, of a size that floats have."""
        return math.ldexp(self.m / other.m, self.e - other.e)

    def times(self, x: Any) -> Any:
        """X times it."""
        return ldexp(_double(np.asarray(x)) * self.m, np.asarray(float(self.e)), np)

    def under(self, x: Any) -> Any:
        """X over it."""
        return ldexp(_double(np.asarray(x)) / self.m, np.asarray(-float(self.e)), np)


class _Comparison:
    """Collects the worst difference of each order, and raises for the first that is too large."""

    def __init__(self, eps: float, factor: float) -> None:
        self.eps, self.factor = eps, factor
        self.found: dict[int, tuple[float, float, float]] = {}  # order -> (ratio, error, tolerance)
        self.reference = "specpert"

    def coefficients(
        self, problem: _Problem, computed: np.ndarray, reference: np.ndarray, rule: _Rule, sample_eps: float
    ) -> None:
        """Compare Taylor coefficients with those from samples (in units of r0^-n)."""
        __tracebackhide__ = True
        self.reference = rule.name
        for n, (value, expected) in enumerate(zip(computed, reference, strict=True)):
            relative = problem.noise(self.eps) * math.e * (n + 1) + problem.noise(sample_eps) * rule.amplification[n]
            relative += problem.size * rule.truncation[n]
            unit = _Scale.of(problem.r0).power(-n)
            self.one(problem, n, unit.under(value), expected, relative, unit, f"lam_{n} = {{}} ({rule.name})")

    def one(self, problem: _Problem, n: int, got: Any, expected: Any, relative: float, unit: _Scale, what: str) -> None:
        """Compare the results of order n, both over `unit`; the tolerance is `relative`."""
        __tracebackhide__ = True
        relative = relative * self.factor
        if relative >= problem.size and n > 0:
            raise ValueError(
                f"expected a tolerance below {problem.size:.1e}, the largest size of what is checked, in units of "
                f"{unit.times(1.0):.1e}, got {relative:.1e}: the gap d = {problem.d:.3e} is too small for this "
                "precision; use wider dtypes, digits=50, or check the cluster"
            )
        with np.errstate(over="ignore"):
            relative += float(unit.under(2.0**-1074 if self.eps < 1e-10 else 2.0**-149))  # the least number there is
        difference = np.abs(np.asarray(got) - np.asarray(expected))
        at = np.unravel_index(np.argmax(np.where(np.isnan(difference), np.inf, difference)), difference.shape)
        error = float(difference[at])
        if not error <= relative:
            here = (np.asarray(got)[at], np.asarray(expected)[at], error, relative, problem.d * self.eps)
            g, e, off, tolerance, least = (unit.times(x)[()] for x in here)
            raise AssertionError(
                f"expected {what.format(format(e, '.12e'))}, got {g:.12e}: off by {off:.3e} at order {n}, tolerance "
                f"{tolerance:.3e} = {relative / (problem.d * self.eps):.1e} units d (2 ||H|| / d)^n eps with the "
                f"isolation distance d = {problem.d:.6e}, the unit being {least:.1e}"
            )
        ratio = error / relative if relative > 0 else 0.0
        found = (ratio, float(unit.times(error)), float(unit.times(relative)))
        self.found[n] = max(self.found.get(n, (-1.0, 0.0, 0.0)), found)

    def report(self) -> CheckReport:
        """What was found."""
        orders = tuple(sorted(self.found))
        errors, tolerances = (tuple(self.found[n][i] for n in orders) for i in (1, 2))
        return CheckReport(orders, errors, tolerances, self.reference)


def _against_sigma(
    function: Callable[..., Any], A: Any, directions: list[Any], one: bool, k: int, ours: Any, factor: float
) -> CheckReport:
    """Specpert's derivative against samples of the caller's function; mixed ones by polarisation.

    D^n sigma[H_1, ..., H_n] = 2^(1-n) sum over signs, the first one +, of their product times lam_n along their sum.
    """
    __tracebackhide__ = True
    order = len(directions)
    matrix, family = _numpy(A), [_numpy(H) for H in directions]
    # the points are rounded to the caller's precision, whatever that of the values
    eps = max(_eps(_numpy(x)) for x in (function(A), A + directions[0]))
    if one:
        computed = _numpy(sigma_series(A, directions[0], order, k=k).coefficients)
        problem = _Problem.make(matrix, family[:1], (k,))
        reference, rule = problem.samples(order, None, lambda x: float(function(A + x * directions[0])))
        comparison = _Comparison(_eps(computed), factor)
        comparison.coefficients(problem, computed, reference, rule, eps)
        return comparison.report()
    norms = [float(np.linalg.norm(H, 2)) or 1.0 for H in family]
    total = allowed = 0.0
    size = _polydisc(_isolation(np.linalg.svd(matrix, compute_uv=False), (k,), matrix.shape), family, order, one)
    for signs in itertools.product((1.0, -1.0), repeat=order - 1):
        weights = [s / h for s, h in zip((1.0, *signs), norms, strict=True)]
        H = sum(w * H for w, H in zip(weights, directions, strict=True))
        if not _numpy(H).any():  # nothing changes along it
            continue
        problem = _Problem.make(matrix, [_numpy(H)], (k,))
        along = problem.samples(order, None, lambda x, H=H: float(function(A + x * H)))  # type: ignore[misc]
        share = _Scale.of(problem.r0).power(-order).by(_Scale.of(*norms)).over(size) / 2 ** (order - 1)
        total += math.prod(signs) * along[0][order] * share
        allowed += share * (
            problem.noise(eps) * along[1].amplification[order] + problem.size * along[1].truncation[order]
        )
    computed = _numpy(ours)
    comparison = _Comparison(_eps(computed), factor)
    relative = problem.noise(_eps(computed)) * math.e * (order + 1) + allowed
    comparison.reference = "samples of the function"
    what = f"D^{order} sigma_{k} = {{}} (samples)"
    comparison.one(problem, order, size.under(computed), total, relative, size, what)
    return comparison.report()


def _polydisc(d: float, family: list[np.ndarray], order: int, one: bool) -> _Scale:
    """Size of D^n sigma[H_1, ..., H_n] in units of d / 2: c_n prod_i (2 ||H_i|| / d)."""
    norms = [float(np.linalg.norm(H, 2)) or 1.0 for H in family] or [1.0] * order
    count = float(math.factorial(order) if one else order**order)
    return _Scale.of(count, 2.0 ** len(norms), *norms).by(_Scale.of(d).power(-len(norms)))


# --- sampling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    """lam_n r0^n = sum_i weights[n][i] sigma(nodes[i] r0), nodes in the unit disc."""

    name: str
    nodes: Sequence[Any]
    weights: Sequence[Sequence[Any]]
    amplification: list[float]  # of the error of a sample
    truncation: list[float]  # in units of the largest |lam_n| r0^n


@dataclass(frozen=True, eq=False)
class _Problem:
    """A family with one value or cluster, its singular values, isolation distance and radius; float64."""

    A: Any  # array (m, n) or LinearOperator
    family: list[Any]
    group: tuple[int, ...]
    s: np.ndarray
    d: float
    r0: float

    @classmethod
    def make(cls, A: Any, family: list[Any], group: tuple[int, ...]) -> _Problem:
        s = _singular_values(A, max(group) + 2)
        d = _isolation(s, group, A.shape)
        if not d > 0:
            raise ValueError(f"expected isolated singular values {group}, got an isolation distance of {d}")
        norms = [float(_singular_values(A_j, 1)[0]) for A_j in family]
        return cls(A, family, group, s, d, _radius(d, norms))

    @property
    def size(self) -> float:
        """Bound of |lam_n| r0^n for n > 0 (theory 1.9): d / 2, and the spread of a cluster."""
        return self.d / 2 + float(self.s[min(self.group)] - self.s[max(self.group)])

    def noise(self, eps: float) -> float:
        """Backward error of a stable computation in a precision, times the condition of a cluster's mean."""
        return float(10 * max(self.A.shape) * eps * self.s[0]) * (self.size / (self.d / 2))

    def at(self, x: float) -> Any:
        """A(x)."""
        return sum((x**j * A_j for j, A_j in enumerate(self.family, start=1)), start=self.A)

    def value(self, x: float) -> float:
        """Mean of the group at a real x."""
        return float(np.mean(_singular_values(self.at(x), max(self.group) + 2)[list(self.group)]))

    def branch(self, x: np.ndarray) -> np.ndarray:
        """Mean of the group for complex x, from all eigenvalues of the Jordan-Wielandt family."""
        m, n = self.A.shape
        T = np.zeros((len(x), m + n, m + n), dtype=complex)
        for j, A_j in enumerate((self.A, *self.family)):
            power = x[:, None, None] ** j
            T[:, :m, m:] += power * A_j
            T[:, m:, :m] += power * A_j.conj().T
        scale = np.ldexp(1.0, np.frexp(self.s[0])[1] - 1)  # some LAPACKs do not converge for large entries
        w = np.linalg.eigvals(T / scale) * scale
        distance = np.abs(w - np.clip(w.real, self.s[max(self.group)], self.s[min(self.group)]))
        nearest = np.argsort(distance, axis=1)[:, : len(self.group)]
        return np.take_along_axis(w, nearest, axis=1).mean(axis=1)

    def samples(
        self, order: int, digits: int | None = None, function: Callable[[float], float] | None = None
    ) -> tuple[np.ndarray, _Rule]:
        """The lam_n r0^n of orders 0 ... N, and the rule that gave them."""
        if digits is not None:
            rule = _interval(order, 10.0**-digits, f"samples of {digits} digits")
            value = _exact(self, digits)
            exact = [value(t, self.r0) for t in rule.nodes]
            return np.array([float(_dot(row, exact, digits)) for row in rule.weights]), rule
        if function is None and isinstance(self.A, np.ndarray):
            rule = _circle(order)
            half = np.asarray(rule.nodes[: len(rule.nodes) // 2 + 1]) * self.r0
            chunk = max(1, 2**22 // sum(self.A.shape) ** 2)
            above = np.concatenate([self.branch(half[i : i + chunk]) for i in range(0, len(half), chunk)])
            values = np.concatenate([above, above[-2:0:-1].conj()])  # sigma(conj x) = conj sigma(x)
            return (np.asarray(rule.weights) @ values).real, rule
        sample = self.value if function is None else function
        rule = _interval(order, _EPS, "samples" if function is None else "samples of the function")
        values = np.array([sample(float(t) * self.r0) for t in rule.nodes])
        return np.array([[float(w) for w in row] for row in rule.weights]) @ values, rule


def _exact(problem: _Problem, digits: int) -> Callable[[Any, float], Any]:
    """Mean of the group at t r0, by mpmath; t a float or a fraction, taken exactly."""
    try:
        import mpmath
    except ImportError as error:
        raise ImportError("digits=... needs mpmath; install it with: pip install mpmath") from error
    if not isinstance(problem.A, np.ndarray):
        raise TypeError("expected a dense matrix where digits are given, got an operator")
    terms = [mpmath.matrix(X.tolist()) for X in (problem.A, *problem.family)]
    complex_ = any(np.iscomplexobj(X) for X in (problem.A, *problem.family))

    def value(t: Any, r0: float) -> Any:
        with mpmath.workdps(digits):
            t = Fraction(t)
            x = mpmath.mpf(t.numerator) / t.denominator * r0
            total = terms[0]
            for j, A_j in enumerate(terms[1:], start=1):
                total = total + x**j * A_j
            values = (mpmath.svd_c if complex_ else mpmath.svd_r)(total, compute_uv=False)
            return sum(values[i] for i in problem.group) / len(problem.group)

    return value


def _dot(weights: Sequence[Fraction], values: list[Any], digits: int) -> Any:
    import mpmath

    with mpmath.workdps(digits + 10):
        return mpmath.fsum(mpmath.mpf(w.numerator) / w.denominator * v for w, v in zip(weights, values, strict=True))


@lru_cache(maxsize=32)
def _circle(order: int) -> _Rule:
    """Cauchy's integral by the trapezoidal rule on rho = N / (N + 1), the best radius for the last coefficient.

    The M-th roots of unity cut off lam_(n + jM), j >= 1. A backward error of T(x) moves its eigenvalue by
    ||eigenprojection|| <= 1 / (1 - rho) times itself.
    """
    rho = order / (order + 1) if order else 0.5
    M = 2 * math.ceil(20 / -math.log(rho))
    roots = np.exp(2j * np.pi * np.arange(M) / M)
    weights = [(rho * roots) ** -n / M for n in range(order + 1)]
    cut = rho**M / (1 - rho**M)
    amplification = [rho**-n / (1 - rho) for n in range(order + 1)]
    return _Rule("samples on a circle", list(rho * roots), weights, amplification, [cut] * (order + 1))


@lru_cache(maxsize=64)
def _interval(order: int, eps: float, name: str) -> _Rule:
    """Interpolation in Chebyshev points of [-theta, theta], theta and their number the best for that precision."""
    candidates = [
        _interpolation(order, count, Fraction(theta), name)
        for count in range(order + 5, order + 38, 4)
        for theta in (0.75, 0.5, 0.25, 0.125, 2.0**-5, 2.0**-7)
    ]
    return min(candidates, key=lambda rule: rule.truncation[order] + 1e3 * eps * rule.amplification[order])


def _interpolation(order: int, count: int, theta: Fraction, name: str) -> _Rule:
    points, exact = _lagrange(order, count)
    xi = np.array([float(p) for p in points])
    W = np.array([[float(w) for w in row] for row in exact])
    beyond = np.arange(count, count + 100)
    moments = np.abs(W @ xi[:, None] ** beyond)  # what the rule makes of the terms it cuts off
    tail = np.abs(W).sum(axis=1)
    t = float(theta)
    cut = [
        float(moments[n] @ t ** (beyond - n) + tail[n] * t ** (beyond[-1] + 1 - n) / (1 - t)) for n in range(order + 1)
    ]
    weights = [[w / theta**n for w in row] for n, row in enumerate(exact)]
    return _Rule(name, [theta * p for p in points], weights, [float(a * t**-n) for n, a in enumerate(tail)], cut)


@lru_cache(maxsize=64)
def _lagrange(order: int, count: int) -> tuple[list[Fraction], list[list[Fraction]]]:
    """Chebyshev points as fractions; Taylor coefficients 0 ... N of their Lagrange polynomials, exactly."""
    Q = 2**20
    p = [round(Q * math.cos(math.pi * (2 * i + 1) / (2 * count))) for i in range(count)]
    rows: list[list[Fraction]] = [[] for _ in range(order + 1)]
    for i in range(count):
        polynomial = [1] + [0] * order
        for q in p[:i] + p[i + 1 :]:
            polynomial = [(polynomial[n - 1] if n else 0) - q * polynomial[n] for n in range(order + 1)]
        scale = math.prod(p[i] - q for q in p[:i] + p[i + 1 :])
        for n in range(order + 1):
            rows[n].append(Fraction(polynomial[n] * Q**n, scale))
    return [Fraction(q, Q) for q in p], rows


def _isolation(s: np.ndarray, group: Sequence[int], shape: tuple[int, ...]) -> float:
    """Isolation distance d (theory 1.9); where only the largest values are known, zero is taken to be one too."""
    low, high = max(group), min(group)
    known = len(s) == min(shape)
    zero = not known or shape[0] != shape[1] or s[-1] <= 10 * max(shape) * _EPS * s[0]
    near = [s[high - 1] - s[high]] if high > 0 else []
    near += [s[low] - s[low + 1]] if low + 1 < len(s) else []
    return float(min([*near, s[low] if zero else 2 * s[low]]))


def _radius(d: float, norms: list[float]) -> float:
    """The root of sum_j a_j r^j = d / 2 (theory 1.9); one if the family is constant, so that there is a unit."""
    roots = [(d / (2 * a)) ** (1 / j) for j, a in enumerate(norms, start=1) if a > 0]
    if len(roots) < 2:
        return roots[0] if roots else 1.0
    from scipy.optimize import brentq

    top = min(roots)
    return top * float(
        brentq(lambda t: sum(a * (top * t) ** j for j, a in enumerate(norms, start=1)) / (d / 2) - 1, 0.0, 1.0)
    )


def _singular_values(A: Any, count: int) -> np.ndarray:
    """All singular values of an array, the largest `count` of an operator, in descending order."""
    if isinstance(A, np.ndarray):
        return np.linalg.svd(A, compute_uv=False)
    from scipy.sparse.linalg import svds

    start = np.random.default_rng(0).standard_normal(min(A.shape))
    return np.sort(svds(A, k=count, v0=start, return_singular_vectors=False))[::-1]


# --- arrays of any library --------------------------------------------------------------------------------------------


def _numpy(x: Any) -> np.ndarray:
    """A NumPy array from one of any library or device."""
    if hasattr(x, "detach"):  # torch
        x = x.detach().cpu().resolve_conj().resolve_neg()
        x = x.float() if "bfloat16" in str(x.dtype) else x
    elif hasattr(x, "get") and hasattr(x, "device"):  # CuPy
        x = x.get()
    array = np.asarray(x)
    if "bfloat16" in str(array.dtype):
        array = array.astype(np.float32)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"expected an array of numbers, got {type(x).__name__}")
    return array


def _eps(x: np.ndarray) -> float:
    """Unit of rounding of what was computed; of float64 for integers."""
    return float(np.finfo(x.dtype).eps) if x.dtype.kind in "fc" else _EPS


def _is_sequence(coefficients: Any) -> bool:
    """Whether this is a sequence of matrices, not one matrix (nested lists of numbers are one)."""
    if not isinstance(coefficients, list | tuple) or not coefficients:
        return False
    first = coefficients[0]
    return (first.ndim if hasattr(first, "ndim") else np.ndim(first)) >= 2


def _matrices(A: Any, coefficients: Any) -> list[tuple[tuple[int, ...], Any, list[Any]]]:
    """Index, matrix and family of each matrix of the stack, in float64; operators stay what they are if large."""
    family = list(coefficients) if _is_sequence(coefficients) else [coefficients]
    if any(hasattr(X, "matvec") or hasattr(X, "tocsr") for X in (A, *family)):
        from scipy.sparse.linalg import aslinearoperator

        operators = [aslinearoperator(X if hasattr(X, "shape") else np.asarray(X)) for X in (A, *family)]
        if sum(operators[0].shape) <= _DENSE_LIMIT:
            operators = [_double(X @ np.eye(X.shape[1])) for X in operators]
        return [((), operators[0], operators[1:])]
    arrays = [_double(_numpy(X)) for X in (A, *family)]
    lead = np.broadcast_shapes(*(X.shape[:-2] for X in arrays))
    arrays = [np.broadcast_to(X, (*lead, *X.shape[-2:])) for X in arrays]
    return [(i, arrays[0][i], [X[i] for X in arrays[1:]]) for i in np.ndindex(*lead)]


def _double(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def _is_several(k: Any) -> bool:
    return not isinstance(k, tuple) and np.ndim(k) > 0


def _groups(k: Any) -> list[tuple[int, ...]]:
    """The group of indices behind each series."""
    return [(int(i),) for i in k] if _is_several(k) else [k if isinstance(k, tuple) else (int(k),)]


# --- random matrices --------------------------------------------------------------------------------------------------


class MatrixWithSpectrum(NamedTuple):
    """A matrix and the singular values it was made from; unpacks as ``A, s``.

    The singular values of A itself differ from them by the rounding of the product, at most
    10 max(m, n) eps s_1 with the eps of its dtype.
    """

    A: np.ndarray
    singular_values: np.ndarray

    def isolation(self, k: int) -> float:
        """Isolation distance d of value k (theory 1.9); zero for ties and zeros."""
        return _isolation(self.singular_values, (k,), self.A.shape)

    def isolated(self, relative: float = 1e-3) -> list[int]:
        """Indices of the values whose isolation distance is at least `relative` times the largest value."""
        s = self.singular_values
        return [k for k in range(len(s)) if self.isolation(k) >= relative * s[0]]


def matrices_with_spectrum(
    *,
    shape: tuple[int, int] | None = None,
    max_side: int = 6,
    kinds: Sequence[Kind] = ("separated", "close", "tied", "graded", "deficient"),
    dtypes: Sequence[Any] = (np.float64, np.complex128),
    smallest_gap: float = 2.0**-30,
) -> SearchStrategy[MatrixWithSpectrum]:
    r"""Hypothesis strategy of matrices U diag(s) V^* with prescribed singular values s.

    The values are steps of 1/8 (between 1/2 and 2), in descending order, changed as the kind says:

    * "separated": nothing; every value is isolated by at least 1/2;
    * "close": two neighbours differ by a drawn power of two, from 1/4 down to `smallest_gap`;
    * "tied": two or more neighbours are equal;
    * "graded": value i is divided by g^i, g = 2 ... 64;
    * "deficient": the last values are zero.

    The orthogonal factors come from a drawn seed, 0 being the identity: examples shrink to small diagonal matrices
    with values at steps of 1/2.

    Parameters
    ----------
    shape : (int, int), optional
        Shape (m, n); drawn from 1 ... `max_side` otherwise.
    max_side : int
        Largest side.
    kinds : sequence of str
        Kinds to draw from, the simplest first; matrices with one singular value are "separated" always.
    dtypes : sequence of dtypes
        Real and complex floating dtypes to draw from, the simplest first.
    smallest_gap : float
        Of a close pair.

    Returns
    -------
    SearchStrategy of MatrixWithSpectrum
        A and its singular values, in descending order, of float64.

    Raises
    ------
    ImportError
        Hypothesis is not installed.
    ValueError
        An argument is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from hypothesis import given, settings
    >>> from specpert.testing import matrices_with_spectrum
    >>> @settings(max_examples=20, database=None, derandomize=True)
    ... @given(matrices_with_spectrum(max_side=4))
    ... def test(example):
    ...     A, s = example
    ...     assert np.allclose(np.linalg.svd(A, compute_uv=False), s, atol=1e-13 * s[0])
    >>> test()
    """
    try:
        from hypothesis import strategies as st
    except ImportError as error:
        raise ImportError("matrices_with_spectrum needs Hypothesis; install it with: pip install hypothesis") from error
    known = Kind.__args__  # type: ignore[attr-defined]
    if not kinds or set(kinds) - set(known):
        raise ValueError(f"expected kinds among {known}, got {tuple(kinds)}")
    if not 0 < smallest_gap <= 0.25:
        raise ValueError(f"expected 0 < smallest_gap <= 1/4, got {smallest_gap}")
    if max_side < 1 or (shape is not None and min(shape) < 1):
        raise ValueError(f"expected at least one row and column, got shape={shape}, max_side={max_side}")
    sides = st.integers(1, max_side)
    last = math.floor(-math.log2(smallest_gap))

    @st.composite
    def draw_matrix(draw: Callable[..., Any]) -> MatrixWithSpectrum:
        m, n = shape or (draw(sides), draw(sides))
        r = min(m, n)
        kind = draw(st.sampled_from(list(kinds))) if r > 1 else "separated"
        steps = draw(st.lists(st.integers(4, 16), min_size=r, max_size=r))
        s = np.cumsum(np.array(steps, dtype=float))[::-1] / 8
        if kind == "close":
            i = draw(st.integers(0, r - 2))
            s[: i + 1] += s[i + 1] + 2.0 ** -draw(st.integers(2, last)) - s[i]
        elif kind == "tied":
            i = draw(st.integers(0, r - 2))
            s[i : draw(st.integers(i + 2, r))] = s[i]
        elif kind == "graded":
            s = s / float(draw(st.integers(2, 64))) ** np.arange(r)
        elif kind == "deficient":
            s[draw(st.integers(1, r - 1)) :] = 0.0
        dtype = np.dtype(draw(st.sampled_from(list(dtypes))))
        seed = draw(st.integers(0, 2**32 - 1))
        U, V = _factors(seed, m, n, dtype.kind == "c")
        return MatrixWithSpectrum(((U * s) @ V.conj().T).astype(dtype), s.copy())

    return draw_matrix()


def _factors(seed: int, m: int, n: int, complex_: bool) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal columns (m, r) and (n, r), uniformly distributed; of the identity for seed 0."""
    r = min(m, n)
    if seed == 0:
        return np.eye(m, r), np.eye(n, r)
    rng = np.random.default_rng(seed)
    draws = [
        rng.standard_normal((rows, r)) + (1j * rng.standard_normal((rows, r)) if complex_ else 0) for rows in (m, n)
    ]
    U, V = (np.linalg.qr(X)[0] for X in draws)
    return U, V
