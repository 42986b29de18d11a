"""Symmetric functions F(s_1, ..., s_r) with first and second derivatives and divided differences.

Legend: s (..., r) in descending order, zero where it is zero to rounding; F_i, F_ij derivatives; g_i = F_i; a core is F
itself, a term a function of one value or a sum of it over all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from specpert._arrays import (
    Array,
    array,
    eye,
    namespace,
)

Elementwise = Callable[[Array], Array]

VALUE, GRADIENT, HESSIAN = 0, 1, 2  # what is asked for, and how smooth a function is at a zero singular value

# Gauss-Legendre on [0, 1]. Below the ratio a pair counts as near and its divided difference is a mean of second
# derivatives over the gap: with 4 nodes the error for a function analytic off zero is about (4 / ratio)^-8 = 5e-20,
# and above the ratio a quotient loses at most log10(1 / ratio) = 1.8 digits.
_NEAR = 1 / 64
_NODES, _WEIGHTS = (np.polynomial.legendre.leggauss(4)[0] + 1) / 2, np.polynomial.legendre.leggauss(4)[1] / 2


class Core(Protocol):
    """F(s) with its derivatives; s (..., r) in descending order, zero where it is zero to rounding."""

    @property
    def degree(self) -> int | None:
        """Number h with F(c s) = c^h F(s); None where there is none."""

    @property
    def log_degree(self) -> bool:
        """Whether F(c s) = F(s) + r log c."""

    @property
    def smooth(self) -> int | None:
        """How often F can be differentiated at a zero singular value; None where its derivatives there tell."""

    @property
    def simple(self) -> tuple[int, ...]:
        """Indices of the values that must be simple."""

    def value(self, s: Array) -> Array:
        """F, shape (...)."""

    def gradient(self, s: Array) -> Array:
        """F_i, shape (..., r)."""

    def hessian(self, s: Array) -> Array:
        """F_ij, shape (..., r, r)."""

    def minus(self, s: Array, g: Array, hessian: Array) -> Array:
        """(F_i - F_j) / (s_i - s_j), shape (..., r, r); anything on the diagonal."""


class _Term(Protocol):
    """f(s) elementwise, as a sum over all values or at one of them."""

    @property
    def index(self) -> int | None:
        """The one value of which it is a function; None for the sum."""

    def f(self, s: Array) -> Array: ...
    def df(self, s: Array) -> Array: ...
    def d2f(self, s: Array) -> Array: ...
    def minus(self, s: Array) -> Array:
        """(f'(s_i) - f'(s_j)) / (s_i - s_j), shape (..., r, r)."""


@dataclass(frozen=True)
class Power:
    """s^p / p, for p = 0 log s."""

    p: float
    index: int | None = None

    def f(self, s: Array) -> Array:
        return s**self.p / self.p if self.p else namespace(s).log(s)

    def df(self, s: Array) -> Array:
        return s ** (self.p - 1)

    def d2f(self, s: Array) -> Array:
        return (self.p - 1) * s ** (self.p - 2) if self.p != 1 else namespace(s).zeros_like(s)

    def minus(self, s: Array) -> Array:
        """x^(q - 1) (1 - (y / x)^q) / (1 - y / x) for q = p - 1 and x >= y."""
        xp, q = namespace(s), self.p - 1
        x, _, d, rho = _pairs(s)
        if q == 0:
            return xp.zeros_like(x)
        limit = xp.full_like(x, q)
        return x ** (q - 1) * xp.where(d > 0, -xp.expm1(q * rho) / xp.where(d > 0, d, limit), limit)


@dataclass(frozen=True)
class PowerLog:
    """s^p log s for p = 1 or 2."""

    p: int
    index: int | None = None

    def f(self, s: Array) -> Array:
        return s**self.p * _log(s)

    def df(self, s: Array) -> Array:
        return s ** (self.p - 1) * (self.p * _log(s) + 1)

    def d2f(self, s: Array) -> Array:
        return 1 / s if self.p == 1 else 2 * _log(s) + 3

    def minus(self, s: Array) -> Array:
        xp = namespace(s)
        x, ratio, d, rho = _pairs(s)
        slope = xp.where(d > 0, -rho / xp.where(d > 0, d, xp.ones_like(d)), xp.ones_like(d))
        # log[x, y] = slope / x and (s log s)[x, y] = log x + y log[x, y]
        return slope / x if self.p == 1 else 2 * (_log(x) + ratio * slope) + 1


@dataclass(frozen=True)
class UserTerm:
    """A user's f, f' and f''."""

    given: tuple[Elementwise, Elementwise, Elementwise]
    index: int | None = None

    def f(self, s: Array) -> Array:
        return _call(self.given[0], s, s.shape, "f")

    def df(self, s: Array) -> Array:
        return _call(self.given[1], s, s.shape, "df")

    def d2f(self, s: Array) -> Array:
        return _call(self.given[2], s, s.shape, "d2f")

    def minus(self, s: Array) -> Array:
        xp, g = namespace(s), self.df(s)
        si, sj = s[..., :, None], s[..., None, :]
        gap, x = si - sj, si + xp.zeros_like(sj)
        near = xp.abs(gap) <= _NEAR * xp.maximum(si, sj)
        mean = xp.zeros_like(gap)
        for node, weight in zip(_NODES, _WEIGHTS, strict=True):
            mean = mean + float(weight) * self.d2f(xp.where(near, x - float(node) * gap, x))
        return xp.where(near, mean, (g[..., :, None] - g[..., None, :]) / xp.where(near, xp.ones_like(gap), gap))


class _Outer(Protocol):
    """A function of a few sums t, w, with its first and second derivatives."""

    @property
    def value(self) -> Callable[..., Array]: ...
    @property
    def first(self) -> Callable[..., list[Any]]: ...
    @property
    def second(self) -> Callable[..., list[list[Any]]]: ...


class Sum:
    """t."""

    def value(self, t: Array) -> Array:
        return t

    def first(self, t: Array) -> list[Any]:
        return [1.0]

    def second(self, t: Array) -> list[list[Any]]:
        return [[0.0]]


class Difference:
    """t - w."""

    def value(self, t: Array, w: Array) -> Array:
        return t - w

    def first(self, t: Array, w: Array) -> list[Any]:
        return [1.0, -1.0]

    def second(self, t: Array, w: Array) -> list[list[Any]]:
        return [[0.0, 0.0], [0.0, 0.0]]


class Entropy:
    """log N - 2 w / N, N = 2 t the sum of s^2 and 2 w that of s^2 log s^2 / 2."""

    def value(self, t: Array, w: Array) -> Array:
        return namespace(t).log(2 * t) - w / t

    def first(self, t: Array, w: Array) -> list[Any]:
        return [1 / t + w / t**2, -1 / t]

    def second(self, t: Array, w: Array) -> list[list[Any]]:
        return [[-1 / t**2 - 2 * w / t**3, 1 / t**2], [1 / t**2, 0.0]]


class ExpEntropy:
    """t exp(-w / t), t the sum of s and w that of s log s."""

    def value(self, t: Array, w: Array) -> Array:
        return t * namespace(t).exp(-w / t)

    def first(self, t: Array, w: Array) -> list[Any]:
        power = namespace(t).exp(-w / t)
        return [power * (1 + w / t), -power]

    def second(self, t: Array, w: Array) -> list[list[Any]]:
        power = namespace(t).exp(-w / t)
        return [[power * c / t for c in row] for row in ((w**2 / t**2, -w / t), (-w / t, 1.0))]


class StableRank:
    """2 t / w^2, t half the sum of s^2 and w the largest s."""

    def value(self, t: Array, w: Array) -> Array:
        return 2 * t / w**2

    def first(self, t: Array, w: Array) -> list[Any]:
        return [2 / w**2, -4 * t / w**3]

    def second(self, t: Array, w: Array) -> list[list[Any]]:
        return [[0.0, -4 / w**3], [-4 / w**3, 12 * t / w**4]]


@dataclass(frozen=True)
class Norm:
    """(p t)^(1 / p)."""

    p: float

    def value(self, t: Array) -> Array:
        return (self.p * t) ** (1 / self.p)

    def first(self, t: Array) -> list[Any]:
        return [(self.p * t) ** (1 / self.p - 1)]

    def second(self, t: Array) -> list[list[Any]]:
        return [[(1 - self.p) * (self.p * t) ** (1 / self.p - 2)]]


@dataclass(frozen=True, eq=False)
class Composite:
    """Phi(t_1, t_2, ...) of terms t_a: sums of f_a(s_i) over all i, or f_a of one value."""

    terms: tuple[_Term, ...]
    outer: _Outer
    degree: int | None = 0
    log_degree: bool = False
    smooth: int | None = VALUE - 1
    simple: tuple[int, ...] = ()

    def value(self, s: Array) -> Array:
        return self.outer.value(*self._sums(s))

    def gradient(self, s: Array) -> Array:
        first = self.outer.first(*self._sums(s))
        return sum(_column(c) * _gradient_of(term, s) for c, term in zip(first, self.terms, strict=True))

    def hessian(self, s: Array) -> Array:
        xp, sums = namespace(s), self._sums(s)
        first, second = self.outer.first(*sums), self.outer.second(*sums)
        g = [_gradient_of(term, s) for term in self.terms]
        diagonal = xp.zeros_like(s)
        for c, term in zip(first, self.terms, strict=True):
            diagonal = diagonal + _column(c) * (term.d2f(s) * _mask(term, s))
        total = diagonal[..., :, None] * eye(s.shape[-1], s, xp)
        for g_a, row in zip(g, second, strict=True):
            for g_b, c in zip(g, row, strict=True):
                total = total + _column(_column(c)) * (g_a[..., :, None] * g_b[..., None, :])
        return total

    def minus(self, s: Array, g: Array, hessian: Array) -> Array:
        xp, total = namespace(s), 0.0
        for c, term in zip(self.outer.first(*self._sums(s)), self.terms, strict=True):
            if term.index is None:
                divided = term.minus(s)
            else:  # at most one of the pair is a member; it is simple, so the quotient is as good as its gap
                own = _gradient_of(term, s)
                gap = s[..., :, None] - s[..., None, :]
                divided = (own[..., :, None] - own[..., None, :]) / xp.where(gap == 0, xp.ones_like(gap), gap)
            total = total + _column(_column(c)) * divided
        return total

    def _sums(self, s: Array) -> list[Array]:
        return [
            namespace(s).sum(term.f(s), axis=-1) if term.index is None else term.f(s[..., term.index])
            for term in self.terms
        ]


def schatten(p: float) -> Composite:
    return Composite((Power(p),), Norm(p), degree=1, smooth=HESSIAN if p >= 2 else GRADIENT if p > 1 else VALUE)


@dataclass(frozen=True, eq=False)
class Symmetric:
    """A user's F with gradient and Hessian."""

    given: tuple[Elementwise, Elementwise, Elementwise]
    degree: int | None = None
    log_degree: bool = False
    smooth: int | None = None
    simple: tuple[int, ...] = ()

    def value(self, s: Array) -> Array:
        return _call(self.given[0], s, s.shape[:-1], "value")

    def gradient(self, s: Array) -> Array:
        return _call(self.given[1], s, s.shape, "gradient")

    def hessian(self, s: Array) -> Array:
        return _call(self.given[2], s, (*s.shape, s.shape[-1]), "hessian")

    def minus(self, s: Array, g: Array, hessian: Array) -> Array:
        """Quotients, but for near pairs the mean of F_ii - F_ij on the way to the point with s_i and s_j exchanged.

        There F_i has the value F_j: this is the fundamental theorem of calculus for F_i - F_j.
        """
        xp = namespace(s)
        identity = eye(s.shape[-1], s, xp)
        gap = s[..., :, None] - s[..., None, :]
        near = xp.abs(gap) <= _NEAR * xp.maximum(s[..., :, None], s[..., None, :])
        divided = (g[..., :, None] - g[..., None, :]) / xp.where(near, xp.ones_like(gap), gap)
        anywhere = xp.any(near, axis=tuple(range(near.ndim - 2))) if near.ndim > 2 else near
        nodes, weights = (
            xp.reshape(array([float(w) for w in x], s, xp), (-1,) + (1,) * (s.ndim - 1)) for x in (_NODES, _WEIGHTS)
        )
        for i, j in zip(*(index for index in xp.nonzero(anywhere)), strict=True):
            i, j = int(i), int(j)
            if i >= j:
                continue
            here = near[..., i, j]
            step = xp.where(here, gap[..., i, j], xp.zeros_like(gap[..., i, j]))
            way = s - (nodes * step)[..., None] * (identity[i, :] - identity[j, :])
            H = self.hessian(way)
            mean = xp.sum(weights * (H[..., i, i] - H[..., i, j]), axis=0)
            pair = identity[:, i][:, None] * identity[j, :] + identity[:, j][:, None] * identity[i, :] > 0
            divided = xp.where(pair & here[..., None, None], mean[..., None, None], divided)
        return divided


def _call(function: Elementwise, s: Array, shape: tuple[int, ...], name: str) -> Array:
    """What a user function makes of s, or an error if that is not an array of the expected shape."""
    result = function(s)
    if tuple(getattr(result, "shape", (-1,))) != tuple(shape):
        raise ValueError(
            f"expected {name} to return an array of shape {tuple(shape)} for s of shape {tuple(s.shape)}, got "
            f"{tuple(result.shape) if hasattr(result, 'shape') else type(result).__name__}"
        )
    return result


def _mask(term: _Term, s: Array) -> Array:
    """(r,): ones for a sum, a unit vector for a term of one value."""
    xp, r = namespace(s), s.shape[-1]
    return xp.ones_like(s) if term.index is None else eye(r, s, xp)[term.index % r, :]


def _gradient_of(term: _Term, s: Array) -> Array:
    return term.df(s) * _mask(term, s)


def _column(c: Any) -> Any:
    """A factor of each matrix beside the singular values; numbers as they are."""
    return c if isinstance(c, float) else c[..., None]


def _log(s: Array) -> Array:
    """Logarithm of s, zero at s = 0, where it comes with a positive power of s."""
    xp = namespace(s)
    return xp.log(xp.where(s > 0, s, xp.ones_like(s)))


def _pairs(s: Array) -> tuple[Array, Array, Array, Array]:
    """For all pairs x >= y of s: x, y / x, 1 - y / x and log(y / x), each to its last digits; shape (..., r, r)."""
    xp = namespace(s)
    si, sj = s[..., :, None], s[..., None, :]
    x, y = xp.maximum(si, sj), xp.minimum(si, sj)
    one = xp.ones_like(x)
    positive = xp.where(x > 0, x, one)
    ratio, d = xp.where(x > 0, y / positive, one), (x - y) / positive
    far = ratio < 0.5
    smallest = float(xp.finfo(s.dtype).smallest_normal)
    # at y = 0 any very negative number does: it occurs in exp(q log(y / x)) with q >= 1 only
    rho = xp.where(far, xp.log(xp.clip(ratio, smallest, None)), xp.log1p(-xp.where(far, one / 2, d)))
    return x, ratio, d, rho
