"""Prepare once: the singular triplet with its isolation distance and reduced resolvent.

Legend: A (..., m, n), r = min(m, n); s (..., r) singular values; d isolation distance in the spectrum of
T0 = [[0, A], [A^*, 0]] (theory 1.9); c number of values asked for.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from specpert._arrays import (
    Array,
    Namespace,
    adjoint,
    array,
    as_arrays,
    check_matrix,
    eps,
    exponent,
    eye,
    ldexp,
    scalar,
)
from specpert._resolvent import Resolvent, from_thin_svd
from specpert.result import DegenerateSingularValueError, Status, ZeroSingularValueError


@dataclass(frozen=True, eq=False, repr=False)
class SingularTriplet:
    """Singular value(s) with their vectors, ready for derivatives of any order; made by :func:`singular_triplet`.

    Attributes
    ----------
    sigma : array, shape (...) or (..., K)
        The singular value, or the K values where several were asked for.
    u, v : array, shape (..., m) and (..., n), or (..., m, K) and (..., n, K)
        Left and right singular vectors, A v = sigma u.
    gap : array, shape of sigma
        Isolation distance d in the spectrum of the Jordan-Wielandt matrix: the least of the distances to the other
        singular values, 2 sigma, and sigma where zero is in that spectrum (theory 1.9).
    singular_values : array, shape (..., min(m, n))
        All singular values, in descending order.
    k : int or tuple of int
        What was asked for.
    status : Status
        Whether digits are lost to a close neighbour.
    """

    k: int | tuple[int, ...]
    shape: tuple[int, ...]
    status: Status
    # for A / 2^e: thin SVD (shapes (..., m, r), (..., r), (..., n, r)) and isolation distances (..., c)
    _e: Array
    _U: Array
    _s: Array
    _V: Array
    _gap: Array
    _cluster: bool
    _xp: Namespace

    @property
    def sigma(self) -> Array:
        """Singular value(s), shape (...) or (..., K)."""
        return scalar(ldexp(self._pick(self._values), self._fit(self._e), self._xp))

    @property
    def gap(self) -> Array:
        """Isolation distance(s) d, shape of sigma."""
        return scalar(ldexp(self._pick_gap(), self._fit(self._e) if self._several else self._e, self._xp))

    @property
    def u(self) -> Array:
        """Left singular vector(s), shape (..., m) or (..., m, K)."""
        return self._pick(self._columns(self._U))

    @property
    def v(self) -> Array:
        """Right singular vector(s), shape (..., n) or (..., n, K)."""
        return self._pick(self._columns(self._V))

    @property
    def singular_values(self) -> Array:
        """All singular values in descending order, shape (..., min(m, n))."""
        return ldexp(self._s, self._e[..., None], self._xp)

    @property
    def _indices(self) -> tuple[int, ...]:
        return self.k if isinstance(self.k, tuple) else (self.k,)

    @property
    def _several(self) -> bool:
        """Whether there are results for several separate values, on an axis of their own."""
        return isinstance(self.k, tuple) and not self._cluster

    def _columns(self, x: Array) -> Array:
        """The entries of the last axis that were asked for."""
        return self._xp.stack([x[..., i] for i in self._indices], axis=-1)

    def _pick(self, x: Array) -> Array:
        """The last axis as the caller sees it: gone for a single k."""
        return x[..., 0] if isinstance(self.k, int) else x

    def _pick_gap(self) -> Array:
        return self._gap if self._several else self._gap[..., 0]

    def _fit(self, x: Array) -> Array:
        """A quantity of each matrix (...) beside those of each value."""
        return x if isinstance(self.k, int) else x[..., None]

    def _at(self, j: int) -> SingularTriplet:
        """The j-th of several values, with the same decomposition."""
        return replace(self, k=self._indices[j], _gap=self._gap[..., j : j + 1])

    def _matrix(self, i: tuple[int, ...]) -> SingularTriplet:
        """The i-th matrix of the stack."""
        arrays = {name: getattr(self, name)[i] for name in ("_e", "_U", "_s", "_V", "_gap")}
        return replace(self, shape=self.shape[-2:], **arrays)

    @property
    def _values(self) -> Array:
        return self._columns(self._s)

    @property
    def _spread(self) -> Array:
        """Largest distance inside the cluster; zero for one value."""
        if not self._cluster:
            return self._xp.zeros_like(self._s[..., 0])
        return self._s[..., min(self._indices)] - self._s[..., max(self._indices)]

    @property
    def _coupled(self) -> Array:
        """(c, c): ones for a cluster, the identity for separate values."""
        c = len(self._indices)
        return eye(c, self._s, self._xp) if not self._cluster else self._xp.ones_like(eye(c, self._s, self._xp))

    def _resolvent(self) -> Resolvent:
        indices = self._indices
        excluded = [[i in indices if self._cluster else i == k for k in indices] for i in range(self._s.shape[-1])]
        excluded = array(excluded, self._s, self._xp, dtype=self._xp.bool)
        return from_thin_svd(self._U, self._s, self._V, self._values, excluded, self._xp)

    def __repr__(self) -> str:
        return (
            f"SingularTriplet(shape={self.shape}, k={self.k}, sigma={self.sigma}, gap={self.gap}, {self.status.name})"
        )


def singular_triplet(A: Any, k: int | Sequence[int] = 0, *, gap_tol: float | None = None) -> SingularTriplet:
    """Singular value k of A with its vectors, isolation distance and reduced resolvent.

    Parameters
    ----------
    A : array, shape (..., m, n)
        Real or complex matrix or stack of matrices, of NumPy or any library of the array API.
    k : int or sequence of int
        Index of the value, 0 being the largest; a sequence asks for several, which share one decomposition.
    gap_tol : float, optional
        Distance to the next singular value, relative to the largest one, below which the value counts as tied.
        Default 10 max(m, n) eps, the error of the decomposition itself.

    Returns
    -------
    SingularTriplet

    Raises
    ------
    IndexError
        k is not in 0 ... min(m, n) - 1.
    DegenerateSingularValueError
        The value is tied with another.
    ZeroSingularValueError
        The value is zero.
    NonFiniteError, ValueError, TypeError
        A is not a finite floating or integer matrix.

    Examples
    --------
    >>> from specpert import singular_triplet
    >>> triplet = singular_triplet([[3.0, 0.0], [0.0, 1.0]], k=1)
    >>> float(triplet.sigma), float(triplet.gap)
    (1.0, 2.0)
    """
    triplet, _ = prepare(A, k, [], [], cluster=False, gap_tol=gap_tol)
    return triplet


def prepare(
    A: Any,
    k: int | Sequence[int],
    directions: list[Any],
    names: list[str],
    *,
    cluster: bool,
    gap_tol: float | None = None,
) -> tuple[SingularTriplet, list[Array]]:
    """The triplet of A (or the one given in its place) and directions of its library, device, dtype and shape."""
    if isinstance(A, SingularTriplet):
        xp, (U, *arrays) = as_arrays(A._U, *directions, names=["the triplet", *names])
        triplet = replace(A, _U=U, _V=xp.astype(A._V, U.dtype, copy=False))
    else:
        xp, (A, *arrays) = as_arrays(A, *directions, names=["A", *names])
        triplet = _triplet(A, k, gap_tol, cluster, xp)
    for H, name in zip(arrays, names, strict=True):
        check_direction(H, name, triplet.shape, xp)
    return triplet, arrays


def check_direction(H: Array, name: str, shape: tuple[int, ...], xp: Namespace) -> None:
    """Raise unless H is finite and of the shape of A, or a stack that broadcasts with A's."""
    check_matrix(H, name, xp)
    if tuple(H.shape[-2:]) != tuple(shape[-2:]):
        raise ValueError(f"expected {name} of shape (..., {shape[-2]}, {shape[-1]}) like A, got {tuple(H.shape)}")
    try:
        np.broadcast_shapes(tuple(H.shape), tuple(shape))
    except ValueError:
        raise ValueError(
            f"expected the leading axes of {name} to broadcast with those of A {tuple(shape)}, got {tuple(H.shape)}"
        ) from None


def _triplet(A: Array, k: int | Sequence[int], gap_tol: float | None, cluster: bool, xp: Namespace) -> SingularTriplet:
    check_matrix(A, "A", xp)
    m, n = A.shape[-2:]
    index = check_indices(k, min(m, n), cluster=cluster)
    e = exponent(A, xp)
    U, s, Vh = xp.linalg.svd(ldexp(A, -e[..., None, None], xp), full_matrices=False)
    tol = 10 * max(m, n) * eps(A, xp) if gap_tol is None else gap_tol
    gap, status = _isolation(s, index if isinstance(index, tuple) else (index,), m != n, cluster, tol, xp)
    return SingularTriplet(index, tuple(A.shape), status, e, U, s, adjoint(Vh, xp), gap, cluster, xp)


def check_indices(k: Any, r: int, *, cluster: bool = False) -> int | tuple[int, ...]:
    """Return k as an int or a tuple of different ints in range(r)."""
    single = not isinstance(k, Sequence) and getattr(k, "ndim", 0) == 0
    indices = [k] if single else list(k)
    if not indices:
        raise IndexError("expected at least one singular value index k, got an empty sequence")
    checked = []
    for i in indices:
        try:
            i = operator.index(i)
        except TypeError:
            raise TypeError(f"expected k to be an int or a sequence of ints, got {type(i).__name__}") from None
        if not 0 <= i < r:
            raise IndexError(
                f"expected 0 <= k < min(m, n) = {r}, got k = {i}; 0 is the largest singular value, {r - 1} the smallest"
            )
        checked.append(i)
    if len(set(checked)) < len(checked):
        raise IndexError(f"expected different indices in k, got {tuple(checked)}")
    if cluster and sorted(checked) != list(range(min(checked), max(checked) + 1)):
        raise IndexError(f"expected a cluster of consecutive indices, got k = {tuple(checked)}")
    return checked[0] if single else tuple(sorted(checked) if cluster else checked)


def _isolation(
    s: Array, indices: tuple[int, ...], rectangular: bool, cluster: bool, tol: float, xp: Namespace
) -> tuple[Array, Status]:
    """Isolation distances (..., c), one for each column or one for the cluster; raises for ties and zeros."""
    r = s.shape[-1]
    distances = []
    groups = [indices] if cluster else [(i,) for i in indices]
    for group in groups:
        lowest = s[..., max(group)]
        _raise_if_zero(lowest, s, group, tol, xp)
        near = []
        if min(group) > 0:
            near.append(s[..., min(group) - 1] - s[..., min(group)])
        if max(group) < r - 1:
            near.append(lowest - s[..., max(group) + 1])
        for gap in near:
            _raise_if_tied(gap, s, group, tol, xp)
        # -sigma is always in the spectrum of T0, zero only where A has a null space on either side
        zero = rectangular | (s[..., -1] <= tol * s[..., 0])
        d = xp.where(zero, lowest, 2 * lowest)
        for gap in near:
            d = xp.minimum(d, gap)
        distances.append(d)
    gaps = xp.stack(distances, axis=-1)
    close = bool(xp.any(gaps < 1e-3 * s[..., :1]))
    status = Status.CLUSTER if cluster else Status.CLOSE_PAIR if close else Status.OK
    return gaps, status


def _first(mask: Array, xp: Namespace) -> tuple[int, ...] | None:
    """Index of the first matrix of the stack for which the mask holds; None if there is none."""
    if not bool(xp.any(mask)):
        return None
    return tuple(int(i[0]) for i in xp.nonzero(mask)) if mask.ndim else ()


def _raise_if_zero(lowest: Array, s: Array, group: tuple[int, ...], tol: float, xp: Namespace) -> None:
    at = _first(lowest <= tol * s[..., 0], xp)
    if at is not None:
        where = f" of matrix {at}" if at else ""
        raise ZeroSingularValueError(
            f"expected a singular value above {tol:.1e} sigma_0, got sigma_{max(group)}{where} = "
            f"{float(lowest[at] / s[(*at, 0)]) if float(s[(*at, 0)]) else 0.0:.3e} sigma_0: it is not "
            "differentiable at zero, where only one-sided derivatives exist"
        )


def _raise_if_tied(gap: Array, s: Array, group: tuple[int, ...], tol: float, xp: Namespace) -> None:
    at = _first(gap <= tol * s[..., 0], xp)
    if at is None:
        return
    values = [float(s[(*at, i)]) for i in range(s.shape[-1])]
    low = high = group[0]
    while low > 0 and values[low - 1] - values[low] <= tol * values[0]:
        low -= 1
    while high < len(values) - 1 and values[high] - values[high + 1] <= tol * values[0]:
        high += 1
    cluster = tuple(range(low, high + 1))
    relative = float(gap[at]) / values[0]
    where = f" of matrix {at}" if at else ""
    what = f"sigma_{group[0]}" if len(group) == 1 else f"the cluster {group}"
    raise DegenerateSingularValueError(
        f"expected {what}{where} to be isolated by more than {tol:.1e} sigma_0, got a gap of {relative:.3e} sigma_0: "
        f"the values {cluster} are tied and have no derivatives of their own; ask for the cluster with "
        f"sigma_series(A, H, order, k={cluster}) or for the derivative of its mean with on_degenerate='cluster'",
        k=group[0],
        cluster=cluster,
        gap=relative * values[0],
    )
