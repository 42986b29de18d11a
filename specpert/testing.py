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

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

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

    .. math:: r_0^{-n} \left[ 10 \max(m, n)\, s_1 \left( e (n + 1)\, \varepsilon + a_n\, \varepsilon_0 \right) + t_n \right]

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
    if computed is None:
        series = sigma_series(A, coefficients, order, k=k)  # type: ignore[call-overload]
        computed = series.mean if isinstance(series, ClusterSeries) else series.coefficients
    found = _numpy(computed)
    comparison = _Comparison(_eps(found), factor)
    groups = _groups(k)
    for index, matrix, family in _matrices(A, coefficients):
        row = found[index]
        expected_shape = (order + 1,) if _is_single(k) else (len(groups), order + 1)
        if row.shape != expected_shape:
            raise ValueError(f"expected coefficients of shape {expected_shape} for each matrix, got {row.shape}")
        for values, group in zip(row.reshape(len(groups), -1), groups, strict=True):
            problem = _Problem.make(matrix, family, group)
            reference, rule = problem.samples(order, digits)
            comparison.coefficients(problem, values, reference, rule, 0.0 if digits else _EPS)
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
    if computes not in ("derivative", "sigma"):
        raise ValueError(f"expected computes to be 'derivative' or 'sigma', got {computes!r}")
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
    comparison.one(problem, order, theirs, expected, relative, size, f"{name} = {{}} (specpert)")
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
        The certified radius is zero, so that nothing is claimed.
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
    if series is None:
        series = sigma_series(A, coefficients, order, k=k)
    lam = _numpy(series.mean if isinstance(k, tuple) else series.coefficients)
    radius = float(_numpy(series.radius))
    if not radius > 0:
        raise ValueError("expected a series with a certified radius, got radius 0: the gap is lost in rounding errors")
    ((_, matrix, family),) = _matrices(A, coefficients)
    problem = _Problem.make(matrix, family, _groups(k)[0])
    value = problem.exact(digits) if digits else problem.value
    allowance = 0.0 if digits else problem.noise(_EPS)
    worst = (-1.0, 0.0, 0.0)
    reach = radius if math.isfinite(radius) else problem.r0
    for x in 0.99 * reach * np.linspace(-1, 1, samples):
        claimed = float(_numpy(series.remainder(float(x))))
        exact, partial = value(float(x)), math.fsum(float(c) * float(x) ** n for n, c in enumerate(lam))
        error = abs(float(exact - partial))
        if not error <= claimed + allowance or not math.isfinite(claimed):
            raise AssertionError(
                f"expected sigma = {float(exact):.15e} at x = {x:.6e} ({abs(x) / radius:.2f} of the radius "
                f"{radius:.6e}) within {claimed:.3e} of the partial sum of order {order}, got {partial:.15e}: "
                f"off by {error:.3e} (the sample's own error is at most {allowance:.1e})"
            )
        bound = claimed + allowance
        worst = max(worst, (error / bound if bound > 0 else 0.0, error, bound))
    return CheckReport((order,), (worst[1],), (worst[2],), _name_of(digits) + " on a real interval")


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
            unit = problem.r0**-n
            self.one(problem, n, value, expected * unit, relative, unit, f"lam_{n} = {{}} ({rule.name})")

    def one(
        self, problem: _Problem, n: int, got: Any, expected: Any, relative: float, unit: float, what: str
    ) -> None:
        """Compare the results of order n; the tolerance is `relative` times `unit`."""
        __tracebackhide__ = True
        relative = relative * self.factor
        if relative >= problem.size and n > 0:
            raise ValueError(
                f"expected a tolerance below {problem.size:.1e}, the largest size of what is checked, in units of "
                f"{unit:.1e}, got {relative:.1e}: the gap d = {problem.d:.3e} is too small for this precision; use "
                "wider dtypes, digits=50, or check the cluster"
            )
        tolerance = relative * unit
        difference = np.abs(np.asarray(got) - np.asarray(expected))
        at = np.unravel_index(np.argmax(np.where(np.isnan(difference), np.inf, difference)), difference.shape)
        error = float(difference[at])
        if not error <= tolerance:
            g, e = np.asarray(got)[at], np.asarray(expected)[at]
            raise AssertionError(
                f"expected {what.format(format(e, '.12e'))}, got {g:.12e}: off by {error:.3e} at order {n}, tolerance "
                f"{tolerance:.3e} = {relative / (problem.d * self.eps):.1e} units d (2 ||H|| / d)^n eps with the "
                f"isolation distance d = {problem.d:.6e}, the unit being {problem.d * unit * self.eps:.1e}"
            )
        ratio = error / tolerance if tolerance > 0 else 0.0
        self.found[n] = max(self.found.get(n, (-1.0, 0.0, 0.0)), (ratio, error, tolerance))

    def report(self) -> CheckReport:
        """What was found."""
        orders = tuple(sorted(self.found))
        errors, tolerances = (tuple(self.found[n][i] for n in orders) for i in (1, 2))
        return CheckReport(orders, errors, tolerances, self.reference)


def _against_sigma(
    function: Callable[..., Any], A: Any, directions: list[Any], one: bool, k: int, ours: Any, factor: float
) -> CheckReport:
    """Specpert's derivative against samples of the caller's function; mixed ones by polarisation.

    D^n sigma[H_1, ..., H_n] = 2^(1-n) sum over signs, the first one +, of their product times lam_n along the signed sum.
    """
    __tracebackhide__ = True
    order = len(directions)
    matrix, family = _numpy(A), [_numpy(H) for H in directions]
    eps = _eps(_numpy(function(A)))
    if one:
        computed = _numpy(sigma_series(A, directions[0], order, k=k).coefficients)
        problem = _Problem.make(matrix, family[:1], (k,))
        reference, rule = problem.samples(order, None, lambda x: float(function(A + x * directions[0])))
        comparison = _Comparison(_eps(computed), factor)
        comparison.coefficients(problem, computed, reference, rule, eps)
        return comparison.report()
    norms = [float(np.linalg.norm(H, 2)) or 1.0 for H in family]
    total = allowed = 0.0
    for signs in itertools.product((1.0, -1.0), repeat=order - 1):
        weights = [s / h for s, h in zip((1.0, *signs), norms, strict=True)]
        H = sum(w * H for w, H in zip(weights, directions, strict=True))
        problem = _Problem.make(matrix, [_numpy(H)], (k,))
        along = problem.samples(order, None, lambda x, H=H: float(function(A + x * H)))  # type: ignore[misc]
        unit = problem.r0**-order / 2 ** (order - 1)
        total += math.prod(signs) * along[0][order] * unit
        allowed += (problem.noise(eps) * along[1].amplification[order] + problem.size * along[1].truncation[order]) * unit
    size = _polydisc(problem.d, family, order, one)
    computed = _numpy(ours)
    comparison = _Comparison(_eps(computed), factor)
    relative = problem.noise(_eps(computed)) * math.e * (order + 1)
    if size > 0:
        relative += allowed * math.prod(norms) / size
    comparison.reference = along[1].name
    comparison.one(
        problem, order, computed, total * math.prod(norms), relative, size, f"D^{order} sigma_{k} = {{}} (samples)"
    )
    return comparison.report()


def _polydisc(d: float, family: list[np.ndarray], order: int, one: bool) -> float:
    """Size of D^n sigma[H_1, ..., H_n] in units of d / 2: c_n prod_i (2 ||H_i|| / d)."""
    norms = [float(np.linalg.norm(H, 2)) for H in family] or [1.0] * order
    return (math.factorial(order) if one else order**order) * math.prod(2 * h / d for h in norms)


# --- sampling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    """lam_n r0^n = sum_i weights[n, i] sigma(nodes[i] r0), nodes in the unit disc."""

    name: str
    nodes: np.ndarray
    weights: np.ndarray
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
        norms = [float(_singular_values(A_j, 1)[0]) for A_j in family]
        return cls(A, family, group, s, d, _radius(d, norms))

    def noise(self, eps: float) -> float:
        """Backward error of a stable computation in a precision (theory 1.9)."""
        return float(10 * max(self.A.shape) * eps * self.s[0])

    @property
    def size(self) -> float:
        """Bound of |lam_n| r0^n for n > 0 (theory 1.9)."""
        return self.d / 2 + float(self.s[min(self.group)] - self.s[max(self.group)])

    def at(self, x: Any) -> Any:
        """A(x)."""
        total = self.A
        for j, A_j in enumerate(self.family, start=1):
            total = total + x**j * A_j
        return total

    def value(self, x: float) -> float:
        """Mean of the group at a real x."""
        return float(np.mean(_singular_values(self.at(x), max(self.group) + 2)[list(self.group)]))

    def exact(self, digits: int) -> Callable[[Any], Any]:
        """The same with mpmath."""
        try:
            import mpmath
        except ImportError as error:
            raise ImportError("digits=... needs mpmath; install it with: pip install mpmath") from error
        if not isinstance(self.A, np.ndarray):
            raise TypeError("expected a dense matrix for digits=..., got an operator")
        complex_ = any(np.iscomplexobj(X) for X in (self.A, *self.family))

        def value(x: Any) -> Any:
            with mpmath.workdps(digits):
                total = mpmath.matrix(self.A.tolist())
                for j, A_j in enumerate(self.family, start=1):
                    total = total + mpmath.mpmathify(x) ** j * mpmath.matrix(A_j.tolist())
                values = (mpmath.svd_c if complex_ else mpmath.svd_r)(total, compute_uv=False)
                return sum(values[i] for i in self.group) / len(self.group)

        return value

    def branch(self, x: np.ndarray) -> np.ndarray:
        """Mean of the group for complex x, by all eigenvalues of the Jordan-Wielandt family."""
        m, n = self.A.shape
        T = np.zeros((len(x), m + n, m + n), dtype=complex)
        powers = [x[:, None, None] ** j for j in range(len(self.family) + 1)]
        for power, A_j in zip(powers, (self.A, *self.family), strict=True):
            T[:, :m, m:] += power * A_j
            T[:, m:, :m] += power * A_j.conj().T
        w = np.linalg.eigvals(T)
        low, high = self.s[max(self.group)], self.s[min(self.group)]
        distance = np.abs(w - np.clip(w.real, low, high))
        nearest = np.argsort(distance, axis=1)[:, : len(self.group)]
        return np.take_along_axis(w, nearest, axis=1).mean(axis=1)

    def samples(
        self, order: int, digits: int | None, function: Callable[[float], float] | None = None
    ) -> tuple[np.ndarray, _Rule]:
        """The lam_n r0^n of orders 0 ... N from samples, and the rule."""
        if function is None and digits is None and isinstance(self.A, np.ndarray):
            rule = _circle(order)
            half = self.branch(rule.nodes[: len(rule.nodes) // 2 + 1] * self.r0)
            values = np.concatenate([half, half[-2:0:-1].conj()])  # sigma(conj x) = conj sigma(x)
            return (rule.weights @ values).real, rule
        if digits is not None:
            import mpmath

            value = self.exact(digits)
            rule = _interval(order, min(0.5, 10.0 ** (-digits / (2 * order + 40))), order + 24 + order % 2, "samples by mpmath")
            with mpmath.workdps(digits):
                exact = [value(mpmath.mpf(float(t)) * self.r0) for t in rule.nodes]
                weights = _exact_weights(order, len(rule.nodes))
                theta = mpmath.mpf(float(rule.nodes[-1])) / mpmath.mpf(float(_grid(len(rule.nodes))[-1]))
                lam = [
                    float(sum(mpmath.mpf(w.numerator) / w.denominator * v for w, v in zip(row, exact, strict=True)) / theta**n)
                    for n, row in enumerate(weights)
                ]
            return np.array(lam), rule
        rule = _best_interval(order, max(self.noise(_EPS) / self.size, 1e-17))
        sample = self.value if function is None else function
        return rule.weights @ np.array([sample(float(t) * self.r0) for t in rule.nodes]), rule


def _name_of(digits: int | None) -> str:
    return f"samples of {digits} digits" if digits else "samples"
