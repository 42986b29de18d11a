"""Prepared once: a singular triplet with its isolation distance and reduced resolvent.

Legend: A (..., m, n), r = min(m, n); s (..., r) singular values; c number of values asked for; d isolation distance in
the spectrum of T0 = [[0, A], [A^*, 0]] (theory 1.9). All private arrays are those of A / 2^e.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from specpert._arrays import (
    Array,
    Namespace,
    Portable,
    adjoint,
    array,
    as_arrays,
    check_matrix,
    exponent,
    eye,
    host_view,
    ldexp,
    real_dtype,
    scalar,
    to_precision,
)
from specpert._resolvent import HostResolvent, Resolvent, SmallSideResolvent, ThinSVDResolvent
from specpert._solvers import Gram
from specpert._top import followed
from specpert.result import (
    ConvergenceError,
    Status,
)


@dataclass(frozen=True, eq=False, repr=False)
class SingularTriplet(Portable):
    """Singular value(s) with their vectors, ready for derivatives of any order; made by :func:`singular_triplet`.

    Attributes
    ----------
    sigma : array, shape (...) or (..., K)
        The singular value, or the K values where several were asked for; infinite beyond the range of the dtype.
    u, v : array, shape (..., m) and (..., n), or (..., m, K) and (..., n, K)
        Left and right singular vectors, A v = sigma u.
    gap : array, shape of sigma
        Isolation distance d in the spectrum of the Jordan-Wielandt matrix: the least of the distances to the other
        singular values, 2 sigma, and sigma where zero is in that spectrum (theory 1.9). Where the other values are not
        all known it is a lower bound (for sparse arrays and operators very likely so): up to 1 % too small for sparse
        arrays and operators, or more if it is less than 1e-5 sigma, 2e-4 + 5 rtol by `rtol`, 1e-5 else.
    k : int or tuple of int
        What was asked for.
    shape : tuple of int
        Shape of A.
    status : Status
        Whether digits are lost to a close neighbour.
    """

    k: int | tuple[int, ...]
    shape: tuple[int, ...]
    status: Status
    _xp: Namespace
    _e: Array  # (...)
    _values: Array  # (..., c)
    _P0: Array  # (..., m, c)
    _Q0: Array  # (..., n, c)
    _gap: Array  # (..., c), of a cluster (..., 1)
    _margin: Array  # (...) backward error
    _resolvent: Callable[[], Resolvent]
    _dtype: Any  # real dtype of results; the arrays here may be more accurate
    _svd: tuple[Array, Array, Array] | None = None  # thin SVD U (..., m, r), s (..., r), V (..., n, r)
    _cluster: bool = False

    @property
    def sigma(self) -> Array:
        """Singular value(s), shape (...) or (..., K)."""
        return scalar(ldexp(self._result(self._pick(self._values)), self._fit(self._e), self._xp))

    @property
    def gap(self) -> Array:
        """Isolation distance(s) d, shape of sigma."""
        return scalar(ldexp(self._result(self._pick_gap()), self._fit(self._e) if self._several else self._e, self._xp))

    @property
    def u(self) -> Array:
        """Left singular vector(s), shape (..., m) or (..., m, K)."""
        return self._result(self._pick(self._P0))

    @property
    def v(self) -> Array:
        """Right singular vector(s), shape (..., n) or (..., n, K)."""
        return self._result(self._pick(self._Q0))

    @property
    def _indices(self) -> tuple[int, ...]:
        return self.k if isinstance(self.k, tuple) else (self.k,)

    @property
    def _several(self) -> bool:
        """Whether there are results for several separate values, on an axis of their own."""
        return isinstance(self.k, tuple) and not self._cluster

    def _result(self, x: Array) -> Array:
        """Return x in the precision of results."""
        return to_precision(x, self._dtype, self._xp)

    def _pick(self, x: Array) -> Array:
        """The last axis as the caller sees it: gone for a single k."""
        return x[..., 0] if isinstance(self.k, int) else x

    def _pick_gap(self) -> Array:
        return self._gap if self._several else self._gap[..., 0]

    def _fit(self, x: Array) -> Array:
        """A quantity of each matrix (...) beside those of each value."""
        return x if isinstance(self.k, int) else x[..., None]

    @property
    def _spread(self) -> Array:
        """Largest distance inside the cluster; zero for one value."""
        if not self._cluster:
            return self._xp.zeros_like(self._values[..., 0])
        return self._values[..., 0] - self._values[..., -1]

    @property
    def _E0(self) -> Array:
        """Effective matrix of order 0: of a cluster (..., c, c), the values on the diagonal; else the row of these."""
        values = self._values[..., None, :]
        values = values * eye(len(self._indices), values, self._xp) if self._cluster else values
        return self._xp.astype(values, self._P0.dtype)

    def _at(self, j: int) -> SingularTriplet:
        """The j-th of several values, with the same decomposition."""
        return assemble(self, self._svd, self._indices[j], self._gap[..., j : j + 1])

    def _matrix(self, i: tuple[int, ...]) -> SingularTriplet:
        """The i-th matrix of the stack."""
        assert self._svd is not None
        one = replace(self, shape=self.shape[-2:], _e=self._e[(*i, ...)], _margin=self._margin[(*i, ...)])
        return assemble(one, tuple(x[(*i, ...)] for x in self._svd), self.k, self._gap[(*i, ...)])

    @property
    def _small_side(self) -> SmallSideResolvent | None:
        """The resolvent on NumPy arrays, where it is one by elimination of the larger side."""
        resolvent = self._resolvent()
        inner = resolvent.resolvent if isinstance(resolvent, HostResolvent) else resolvent
        return inner if isinstance(inner, SmallSideResolvent) else None

    @property
    def _relative_gap(self) -> float:
        """That of one value of one matrix, relative to it."""
        return float(self._gap[..., 0]) / float(self._values[..., 0])

    def follow(self, A: Any) -> Array:
        """The largest singular value of a matrix nearby, for a triplet of one dense matrix with k = 0.

        Where the triplet comes from a Gram matrix, a few products with A and solves with the factor there is find it to
        full accuracy, without a decomposition of A. It is the largest value for sure while 2 ||A - A_0||_2 < gap, with
        A_0 the triplet's own matrix.

        Parameters
        ----------
        A : array, shape (m, n)

        Raises
        ------
        ConvergenceError
            A is too far away.
        NonFiniteError, TypeError, ValueError
            A is not a finite matrix of the triplet's shape, or the triplet is of another kind.

        Examples
        --------
        >>> import numpy as np
        >>> from specpert import singular_triplet
        >>> A, H = np.diag([3.0, 1.0]), np.array([[0.1, 0.2], [0.0, -0.1]])
        >>> bool(np.isclose(singular_triplet(A).follow(A + H), np.linalg.norm(A + H, 2), rtol=1e-15))
        True
        """
        xp, (_, A) = as_arrays(self._P0, A, names=["the triplet", "A"], promote=False)
        if self.k != 0 or A.ndim != 2 or tuple(A.shape) != tuple(self.shape):
            raise ValueError(f"expected k = 0 and A of shape {tuple(self.shape)}, got k = {self.k}, {tuple(A.shape)}")
        size, results = check_matrix(A, "A", xp), xp.result_type(self._dtype, real_dtype(A.dtype, xp))
        view, small = host_view(A), self._small_side
        if view is None or small is None:
            sigma = xp.linalg.matrix_norm(xp.astype(A, xp.result_type(A, self._P0), copy=False), ord=2)
            return scalar(xp.astype(sigma, results, copy=False))
        e = exponent(size, xp)
        if abs(float(e - self._e)) > 64:
            raise ConvergenceError(f"expected a matrix nearby, got one 2^{float(e - self._e):.0f} times as large")
        scaled = np.asarray(ldexp(view, np.asarray(-float(e))[..., None, None], np))
        gram = Gram(adjoint(scaled, np) if small.mirrored else scaled)
        # the error of the Rayleigh quotient is the square of that of the vector
        tol = 0.1 * math.sqrt(self._relative_gap * float(np.finfo(small.u.dtype).eps))
        v = gram.apply_adjoint(followed(gram, small.u, small.solve, tol))
        sigma = array(float(np.linalg.norm(v)), self._values, xp)
        return scalar(xp.astype(ldexp(sigma, xp.astype(e, sigma.dtype), xp), results, copy=False))

    def __repr__(self) -> str:
        return (
            f"SingularTriplet(shape={self.shape}, k={self.k}, sigma={self.sigma}, gap={self.gap}, {self.status.name})"
        )


def no_resolvent() -> Resolvent:
    """Stands in until a triplet is assembled."""
    raise AssertionError("a triplet is used before it is assembled")


def assemble(
    blank: SingularTriplet, svd: tuple[Array, ...] | None, index: int | tuple[int, ...], gap: Array
) -> SingularTriplet:
    """The triplet of `index` from a thin SVD."""
    assert svd is not None
    xp, (U, s, V) = blank._xp, svd
    indices = as_tuple(index)
    U0, s0, V0 = (xp.stack([x[..., i] for i in indices], axis=-1) for x in (U, s, V))
    excluded = [[i in indices if blank._cluster else i == k for k in indices] for i in range(s.shape[-1])]
    excluded = array(excluded, s, xp, dtype=xp.bool)
    resolvent = partial(ThinSVDResolvent, U, s, V, s0, excluded)
    return replace(blank, k=index, _values=s0, _P0=U0, _Q0=V0, _gap=gap, _resolvent=resolvent, _svd=(U, s, V))


def cast(triplet: SingularTriplet, dtype: Any) -> SingularTriplet:
    """The same triplet in another dtype: a real matrix with complex directions, float32 with float64."""
    xp = triplet._xp
    real = real_dtype(dtype, xp)

    def floats(x: Array) -> Array:
        return xp.astype(x, real, copy=False)

    arrays = {name: floats(getattr(triplet, name)) for name in ("_e", "_values", "_gap", "_margin")}
    arrays |= {name: xp.astype(getattr(triplet, name), dtype, copy=False) for name in ("_P0", "_Q0")}
    other = replace(triplet, **arrays)
    if triplet._svd is None:  # the products with A promote by themselves
        return other
    U, s, V = triplet._svd
    return assemble(other, (xp.astype(U, dtype), floats(s), xp.astype(V, dtype)), other.k, other._gap)


def as_tuple(k: int | tuple[int, ...]) -> tuple[int, ...]:
    """Indices as a tuple, one alone too."""
    return k if isinstance(k, tuple) else (k,)
