r"""Bounds that hold in floating point: radius of convergence, remainder, and a-posteriori (Kato-Temple) bounds.

All statements are those of theory 1.9. They hold for exact arithmetic; a margin of 10 max(m, n) eps s_1, the backward
error of the decomposition, is taken off the isolation distance and added to every bound.

Legend: d isolation distance; r0 radius; rho = |x| / r0; a_j >= ||A_j||_2; h = ||H||_2; N order of the last term kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from specpert._arrays import (
    OF_MATRIX,
    Array,
    Namespace,
    array,
    as_argument,
    eps,
    exponent,
    finite,
    ldexp,
    magnitude,
    real,
    scalar,
)
from specpert._checks import check_order
from specpert._operators import Operator, spectral_norm_bound
from specpert._recursion import Vectors, extend, products
from specpert.prepare import prepare
from specpert.result import NonFiniteError
from specpert.triplet import SingularTriplet


def _bound(A_j: Any, like: Array, xp: Namespace) -> Array:
    return array(A_j.norm_bound(), like, xp) if isinstance(A_j, Operator) else spectral_norm_bound(A_j, xp)


@dataclass(frozen=True, eq=False)
class Certificate:
    """Where a series converges and how far its partial sums can be off.

    Holds the normalised problem: A / 2^e and A_j / 2^(e + j t), so that x in the caller's units is x 2^t here.
    """

    triplet: SingularTriplet
    t: Array
    family: tuple[Any, ...] = field(repr=False)
    residuals: tuple[float, ...] = ()  # of the equations for the vectors of order 1, 2, ..., where solved iteratively

    @property
    def _safe_d(self) -> Array:
        xp = self.triplet._xp
        return xp.clip(self.triplet._pick_gap() - self._fit(self.triplet._margin), 0.0, None)

    @property
    def _unit(self) -> float:
        """Rounding of the results, whose dtype may be less accurate than the arrays here."""
        return float(self.triplet._xp.finfo(self.triplet._dtype).eps)

    @property
    def _size(self) -> Array:
        """Size of the value(s)."""
        values = self.triplet._values
        return values if self.triplet._several else values[..., 0]

    def _fit(self, x: Array) -> Array:
        """A quantity of each matrix (...) beside those of each value (..., K)."""
        return x[..., None] if self.triplet._several else x

    @cached_property
    @np.errstate(over="ignore", invalid="ignore", divide="ignore")
    def _radius(self) -> Array:
        """The root of sum_j a_j r^j = d / 2; d / (2 a_1) for a linear family.

        On the circle of radius d/2 around sigma the unperturbed resolvent has norm 2/d, so no eigenvalue crosses it
        while sum_j a_j |x|^j < d/2. The root is at least the 1 / (2 a / d + c) of theory 1.9.
        """
        xp, half = self.triplet._xp, self._safe_d / 2
        bounds = [self._fit(_bound(A_j, half, xp)) for A_j in self.family]
        r = xp.full_like(half + bounds[0], math.inf)
        for j, a_j in enumerate(bounds, start=1):
            one = xp.where(a_j > 0, a_j, xp.ones_like(a_j))
            r = xp.where(a_j > 0, xp.minimum(r, xp.pow(half / one, array(1.0 / j, half, xp))), r)
        if len(bounds) == 1:
            return r
        finite = xp.isfinite(r)
        r = xp.where(finite, r, xp.zeros_like(r))
        for _ in range(60):  # Newton from the right on a convex increasing polynomial: monotone
            value, slope = -half, xp.zeros_like(r)
            for j, a_j in enumerate(bounds, start=1):
                value = value + a_j * r**j
                slope = slope + j * a_j * r ** (j - 1)
            r = r - value / xp.where(slope > 0, slope, xp.ones_like(slope))
        r = xp.where(xp.isnan(r), xp.zeros_like(r), r)  # of bounds beyond the range nothing is certain
        safe = r * (1 - 100 * eps(half, xp))  # Newton's last step may end a rounding error to the right
        return xp.where(finite, safe, xp.full_like(r, math.inf))

    def radius(self) -> Array:
        """Certified radius of convergence r0, in the caller's units."""
        radius = ldexp(self._radius, -self._fit(self.t), self.triplet._xp)
        return scalar(self.triplet._result(radius))

    def argument(self, x: Any) -> Array:
        """The argument x of a series as an array that broadcasts with its values, in at least their precision."""
        xp, like = self.triplet._xp, self.triplet._values
        dtype = self.triplet._dtype
        x = array(x, like, xp, dtype) if isinstance(x, int | float) else as_argument(x, like, xp, dtype)
        return x[..., None] if self.triplet._several and x.ndim else x

    @np.errstate(over="ignore", invalid="ignore", divide="ignore")
    def remainder(self, x: Any, order: int) -> Array:
        """Bound of |sigma(A(x)) - partial sum of that order|; infinite for |x| >= r0."""
        xp, d = self.triplet._xp, self._safe_d
        x = xp.abs(self.argument(x))
        if bool(xp.any(xp.isnan(x))):
            raise NonFiniteError("expected x to be a number, got NaN")
        zero = xp.zeros_like(x) + xp.zeros_like(self._radius)
        certified = self._radius > 0
        rho = ldexp(x + zero, self._fit(self.t) + zero, xp) / xp.where(certified, self._radius, zero + 1)
        inside = certified & (rho < 1)
        rho = xp.where(inside, rho, zero)
        truncation = (d / 2 + self._fit(self.triplet._spread)) * rho ** (order + 1) / (1 - rho)
        # Cauchy's bound of what a backward error of A does to the n-th coefficient: e (n + 1) margin r0^-n; the
        # residual of the vector of order j is one of A_j
        amplified = zero
        for n in range(order, -1, -1):
            amplified = amplified * rho + math.e * (n + 1)
        backward = self._fit(self.triplet._margin)
        scaled_x = rho * xp.where(xp.isfinite(self._radius), self._radius, zero)
        for j, residual in enumerate(self.residuals, start=1):
            backward = backward + residual * scaled_x**j
        rounding = 4 * (order + 1) * self._unit * (self._size + d)
        bound = _upward(truncation + amplified * backward + rounding, self._fit(self.triplet._e) + zero, self.triplet)
        return scalar(self.triplet._result(xp.where(inside, bound, zero + math.inf)))


def _upward(bound: Array, e: Array, triplet: SingularTriplet) -> Array:
    """A bound times 2^e, where the numbers may end: what rounding there takes from it and from the value is added."""
    info = triplet._xp.finfo(triplet._dtype)
    return ldexp(bound, e, triplet._xp) + float(info.smallest_normal) * float(info.eps)


@dataclass(frozen=True, eq=False)
class Enclosure:
    """A value of sigma_k(A + H) with a bound of its error.

    Attributes
    ----------
    value, bound : array, shape (...) or (..., K)
        ``|sigma_k(A + H) - value| <= bound``.
    eps : array
        Validity ratio 2 ||H|| / d (theory 1.9). From 1 on the value is sigma_k(A) and the bound Weyl's, for the k-th of
        the sorted values.
    """

    value: Array
    bound: Array
    eps: Array


def kato_temple(A: Any, H: Any, *, k: int | list[int] = 0, order: int = 1) -> Enclosure:
    r"""Enclose sigma_k(A + H) for a finite step H, without decomposing A + H (theory 1.9).

    With the Rayleigh quotient :math:`\theta` and the residual :math:`\rho` of the vector series summed to the given
    order, :math:`|\sigma_k - \theta| \le \rho^2 / \delta` with
    :math:`\delta = d - \|H\|_2 - |\theta - \sigma_k(A)|`: an error of :math:`O(\|H\|^{2 \, order + 2})`.
    Where the step is too large for it (eps >= 1) the bound is Weyl's.

    Parameters
    ----------
    A : array, shape (..., m, n), scipy.sparse array, LinearOperator, or SingularTriplet
    H : array, shape (..., m, n)
        The step.
    k : int or list of int
        Index of the singular value, 0 being the largest.
    order : int
        Order of the trial vectors; 0 costs one product with H and its adjoint, each further order one more and one
        call of the reduced resolvent.

    Returns
    -------
    Enclosure

    Raises
    ------
    DegenerateSingularValueError, ZeroSingularValueError, NonFiniteError, IndexError, TypeError, ValueError
        As :func:`sigma_series`.
    OverflowError
        The value exceeds the range of the dtype.

    Examples
    --------
    >>> import numpy as np
    >>> from specpert import kato_temple
    >>> A, H = np.diag([3.0, 1.0]), np.array([[0.1, 0.2], [0.0, -0.1]])
    >>> truth = np.linalg.norm(A + H, 2)
    >>> for order in (0, 1, 2):
    ...     e = kato_temple(A, H, order=order)
    ...     print(bool(abs(truth - e.value) <= e.bound), f"{e.bound:.0e}")
    True 1e-02
    True 1e-04
    True 7e-07
    """
    order = check_order(order, 0)
    triplet, (H,) = prepare(A, k, [H], ["H"], cluster=False)
    if triplet._cluster:
        raise TypeError(f"expected a triplet of single values to enclose, got that of a cluster {triplet.k}")
    xp, e = triplet._xp, triplet._e
    # a step so large that it has no size beside A counts as an infinite one
    size = xp.asarray(H.size * abs(H.factor)) if isinstance(H, Operator) else magnitude(H, xp)
    own = exponent(size, xp)
    huge = own - e > 0.4 * math.log2(float(xp.finfo(triplet._P0.dtype).max))
    power = xp.where(huge, own, e)
    step = H.scaled(float(power)) if isinstance(H, Operator) else ldexp(H, -power[..., None, None], xp)
    margin = triplet._margin[..., None]
    safe = triplet._gap - margin
    h = _bound(step, triplet._values[..., 0], xp)[..., None]
    with np.errstate(over="ignore", invalid="ignore"):  # where the step is far too large for the vectors
        theta, rho_squared = _rayleigh(triplet, step, order)
        delta = safe - h - xp.abs(theta)
        valid = (2 * h < safe) & (delta > 0)
        sharp = rho_squared / xp.where(valid, delta, xp.ones_like(delta))
    valid = valid & xp.isfinite(theta) & xp.isfinite(rho_squared) & ~huge[..., None]
    shift = xp.where(valid, theta, xp.zeros_like(theta))
    unit = float(xp.finfo(triplet._dtype).eps)  # value and bound are rounded to it
    bound = xp.where(valid, sharp, h) + margin + unit * (triplet._values + xp.abs(shift))
    bound = bound * (1 + 2 * unit)
    eps_step = xp.where(huge[..., None], xp.full_like(bound, math.inf), 2 * h / triplet._gap)
    results = (
        ldexp(triplet._values + shift, e[..., None] + 0 * bound, xp),
        _upward(bound, power[..., None] + 0 * bound, triplet),
        eps_step,
    )
    value, bound, eps_step = (triplet._result(triplet._pick(x)) for x in results)
    finite(value, "value", xp, OF_MATRIX)  # no finite bound encloses an infinite one
    return Enclosure(scalar(value), scalar(bound), scalar(eps_step))


def _rayleigh(triplet: SingularTriplet, step: Any, order: int) -> tuple[Array, Array]:
    """Rayleigh quotient less sigma, and squared residual, of the vectors summed to the given order, shape (..., c)."""
    xp = triplet._xp
    state = Vectors([products(step, xp)], triplet._P0, triplet._Q0)
    resolvent = triplet._resolvent()
    lam = [E[..., 0, :] for E in extend(state, resolvent, triplet._E0, False, order, xp)]
    # (T0 + T1) w = sigma w + rest, as (T0 - sigma) w_n = -T1 w_{n-1} + sum_j lam_j w_{n-j}
    wP, wQ = sum(state.P), sum(state.Q)
    restP, restQ = state.product(1, order)
    for n in range(1, order + 1):
        for j in range(1, n + 1):
            restP = restP + lam[j][..., None, :] * state.P[n - j]
            restQ = restQ + lam[j][..., None, :] * state.Q[n - j]

    def inner(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
        return real(xp.vecdot(a[0], b[0], axis=-2) + xp.vecdot(a[1], b[1], axis=-2), xp)

    norm = inner((wP, wQ), (wP, wQ))
    shift = inner((wP, wQ), (restP, restQ)) / norm
    residual = (restP - shift[..., None, :] * wP, restQ - shift[..., None, :] * wQ)
    # iterative solves leave residuals of their own in that equation
    left = sum(getattr(resolvent, "residuals", ()))
    return shift, (xp.sqrt(inner(residual, residual) / norm) + left) ** 2
