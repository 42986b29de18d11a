"""Prepare once: the singular triplet with its isolation distance and reduced resolvent.

Legend: A (..., m, n), r = min(m, n); s (..., r) singular values; c number of values asked for; d isolation distance in
the spectrum of T0 = [[0, A], [A^*, 0]] (theory 1.9). All private arrays are those of A / 2^e.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from specpert._arrays import (
    Array,
    Namespace,
    adjoint,
    array,
    array_device,
    as_arrays,
    check_matrix,
    dtype_name,
    eps,
    exponent,
    eye,
    from_host,
    host_view,
    is_numpy,
    ldexp,
    real_dtype,
    scalar,
    to_precision,
)
from specpert._checks import check_direction, check_fraction, check_indices
from specpert._isolation import isolation
from specpert._operators import Operator, as_operator, is_operator
from specpert._resolvent import HostResolvent, Resolvent, SmallSideResolvent, from_thin_svd
from specpert._solvers import (
    CholeskySolver,
    EigenSolver,
    Gram,
    IterativeSolver,
    Solver,
    Start,
    followed,
    improved,
    isolated_top,
    top_of_gram,
)
from specpert.result import (
    ConvergenceError,
    NonFiniteError,
    Status,
    ZeroSingularValueError,
)

_GRAM_FROM = 64  # smaller side from which the Gram matrix beats the SVD for the top value
# From this side on SciPy's partial decomposition and Cholesky pay; below, its pool of threads beside NumPy's costs more
_CHOLESKY_FROM = 256
METHODS = ("auto", "svd", "gram", "lanczos")


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
    def _coupled(self) -> Array:
        """(c, c): ones for a cluster, the identity for separate values."""
        identity = eye(len(self._indices), self._values, self._xp)
        return self._xp.ones_like(identity) if self._cluster else identity

    @property
    def _E0(self) -> Array:
        """Effective matrix of order 0 (..., c, c): the values on the diagonal."""
        identity = eye(len(self._indices), self._values, self._xp)
        return self._xp.astype(self._values[..., None, :] * identity, self._P0.dtype)

    def _at(self, j: int) -> SingularTriplet:
        """The j-th of several values, with the same decomposition."""
        return _assemble(self, self._svd, self._indices[j], self._gap[..., j : j + 1])

    def _matrix(self, i: tuple[int, ...]) -> SingularTriplet:
        """The i-th matrix of the stack."""
        assert self._svd is not None
        one = replace(self, shape=self.shape[-2:], _e=self._e[i], _margin=self._margin[i])
        return _assemble(one, tuple(x[i] for x in self._svd), self.k, self._gap[i])

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

    def count_above(self, lower: float) -> int:
        """Number of singular values of A above `lower`; one that is within rounding of it counts or does not.

        From the decomposition there is, or by Sylvester's law of inertia from the Gram matrix. Raises TypeError for a
        stack of matrices and for a triplet that knows only products with A, ValueError for NaN.

        Examples
        --------
        >>> import numpy as np
        >>> from specpert import singular_triplet
        >>> singular_triplet(np.diag([3.0, 2.0, 1.0])).count_above(1.5)
        2
        """
        if self._e.ndim:
            raise TypeError(f"expected a triplet of one matrix, got one of a stack {self.shape[:-2]}")
        lower = float(lower) * 2.0 ** -float(self._e)
        if math.isnan(lower):
            raise ValueError("expected a number as lower, got NaN")
        if self._svd is not None:
            return int(self._xp.sum(self._xp.astype(self._svd[1] > lower, self._xp.int64)))
        if lower < 0:
            return min(self.shape)
        small = self._small_side
        assert small is not None
        solve = small.solve
        if not isinstance(solve, CholeskySolver | EigenSolver):
            raise TypeError("expected a triplet of a dense array, got one that knows only products with it")
        if lower < 1e-6 * float(small.sigma[0]):  # squared it would be lost
            B: Any = solve.gram.B if isinstance(solve, CholeskySolver) else small.matrix
            s = np.linalg.svd(B.astype(small.u.dtype, copy=False), compute_uv=False)
            return int(np.sum(s > lower))
        return solve.count(lower * lower)

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
        size = check_matrix(A, "A", xp)
        view, small = host_view(A), self._small_side
        if view is None or small is None:
            return self._result(xp.linalg.matrix_norm(xp.astype(A, xp.result_type(A, self._P0), copy=False), ord=2))
        e = exponent(size, xp)
        if abs(float(e - self._e)) > 64:
            raise ConvergenceError(f"expected a matrix nearby, got one 2^{float(e - self._e):.0f} times as large")
        scaled = np.asarray(ldexp(view, np.asarray(-float(e))[..., None, None], np))
        gram = Gram(adjoint(scaled, np) if small.mirrored else scaled)
        # the error of the Rayleigh quotient is the square of that of the vector
        tol = 0.1 * math.sqrt(self._relative_gap * float(np.finfo(small.u.dtype).eps))
        v = gram.apply_adjoint(followed(gram, small.u, small.solve, tol))
        return self._result(ldexp(array(float(np.linalg.norm(v)), self._values, xp), e, xp))

    def __repr__(self) -> str:
        return (
            f"SingularTriplet(shape={self.shape}, k={self.k}, sigma={self.sigma}, gap={self.gap}, {self.status.name})"
        )


def singular_triplet(
    A: Any,
    k: int | Sequence[int] = 0,
    *,
    v0: Any = None,
    method: str = "auto",
    gap_tol: float | None = None,
    rtol: float = 0.0,
    dtype: Any = None,
) -> SingularTriplet:
    """Singular value k of A with its vectors, isolation distance and reduced resolvent.

    Parameters
    ----------
    A : array, shape (..., m, n), scipy.sparse array, or LinearOperator
        Real or complex matrix or stack of matrices, of NumPy or any library of the array API.
    k : int or sequence of int
        Index of the value, 0 being the largest; a sequence asks for several, which share one decomposition.
    v0 : array, shape (n,), or SingularTriplet, optional
        Start for the right singular vector, for example that of a matrix nearby, or that matrix's triplet itself, of
        which more can be used; by Lanczos and, for a min(m, n) of 256 or more, by the Gram method. It saves time and
        changes nothing else.
    method : {"auto", "svd", "gram", "lanczos"}
        A thin SVD; for the largest value of one NumPy matrix the Gram matrix of the smaller side with a Cholesky
        factorisation, many times faster and as accurate for k = 0; or Lanczos with conjugate gradients, for sparse
        arrays and operators. "auto" takes the fastest that is as accurate as the SVD.
    gap_tol : float, optional
        Distance to the next singular value, relative to the largest one, below which the value counts as tied.
        Default 10 max(m, n) eps, the error of the decomposition itself. A Gram matrix is decomposed in float64; there
        it is at least 10 eps of A's own dtype.
    rtol : float
        Relative accuracy asked of the isolation distance and of Hessian forms and diagonals. From 1e-6 on, the Gram
        method may take them from a factorisation in single precision, where the gap is wide enough for that; singular
        value, vectors and series have full accuracy all the same.
    dtype : dtype, optional
        Precision of the results: A's own (default), or float64 of A's library for a float32 matrix that is meant
        exactly as it is. The Gram method makes no copy of it for that.

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
    ConvergenceError
        Lanczos did not converge.
    NonFiniteError, ValueError, TypeError
        A is not a finite floating or integer matrix.

    Examples
    --------
    >>> from specpert import singular_triplet
    >>> triplet = singular_triplet([[3.0, 0.0], [0.0, 1.0]], k=1)
    >>> float(triplet.sigma), float(triplet.gap)
    (1.0, 2.0)
    """
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {METHODS}, got {method!r}")
    check_fraction(rtol, "rtol")
    triplet, _ = prepare(A, k, [], [], cluster=False, gap_tol=gap_tol, method=method, v0=v0, rtol=rtol, dtype=dtype)
    return triplet


def prepare(
    A: Any,
    k: int | Sequence[int],
    directions: list[Any],
    names: list[str],
    *,
    cluster: bool,
    gap_tol: float | None = None,
    method: str = "auto",
    v0: Any = None,
    rtol: float = 0.0,
    dtype: Any = None,
    widen: bool = True,
) -> tuple[SingularTriplet, list[Any]]:
    """The triplet of A (or the one given in its place) and directions of its library, device, dtype and shape.

    Without `widen` NumPy directions keep a lower precision than the triplet's vectors have: they are only multiplied.
    """
    prepared = isinstance(A, SingularTriplet)
    if prepared:
        _check_request(A, k, cluster, gap_tol)
    if gap_tol is not None:
        check_fraction(gap_tol, "gap_tol")
    if is_operator(A) or any(is_operator(H) for H in directions) or (not prepared and method == "lanczos"):
        if dtype is not None:
            raise ValueError(
                f"expected no dtype beside an operator or method='lanczos', which has float64, got {dtype}"
            )
        if method in ("svd", "gram"):
            raise ValueError(f"expected a dense array for method={method!r}, got {type(A).__name__}; convert it to one")
        return _prepare_operators(A, k, directions, names, cluster, gap_tol, v0)
    if v0 is not None and (prepared or method == "svd"):
        what = "a triplet" if prepared else "method='svd'"
        raise ValueError(f"expected no v0 with {what}, which does not start from one")
    if not prepared:
        xp, (A, *arrays) = as_arrays(A, *directions, names=["A", *names])
        triplet = _by_dense(A, k, gap_tol, cluster, method, xp, v0, rtol, dtype)
    else:
        triplet, xp, arrays = A, A._xp, []
        if directions:
            xp, (P0, *arrays) = as_arrays(A._P0, *directions, names=["the triplet", *names], promote=False)
            results = xp.result_type(A._dtype, *(real_dtype(H.dtype, xp) for H in arrays))
            wide = xp.result_type(P0, *arrays)
            triplet = replace(A if wide == P0.dtype else cast(A, wide), _dtype=results)
    for H, name in zip(arrays, names, strict=True):
        check_direction(H, name, triplet.shape, xp)
    if not widen and is_numpy(triplet._P0):
        return triplet, arrays
    return triplet, [xp.astype(H, triplet._P0.dtype, copy=False) for H in arrays]


def _check_request(triplet: SingularTriplet, k: Any, cluster: bool, gap_tol: float | None) -> None:
    """Raise where a prepared triplet is asked for what it does not hold; k = 0 stands for "its own"."""
    own = list(triplet._indices)
    asked = list(k) if isinstance(k, Sequence) else [k]
    if asked not in ([0], own) or (cluster and not triplet._cluster):
        raise ValueError(f"expected the k = {triplet.k} of the triplet, or none, got k = {k}; prepare another triplet")
    if gap_tol is not None:
        raise ValueError("expected no gap_tol beside a triplet, which is already isolated; give it to singular_triplet")


def _tuple(k: int | tuple[int, ...]) -> tuple[int, ...]:
    return k if isinstance(k, tuple) else (k,)


# --- dense arrays ------------------------------------------------------------------------------------------------


def _by_dense(
    A: Array,
    k: int | Sequence[int],
    gap_tol: float | None,
    cluster: bool,
    method: str,
    xp: Namespace,
    v0: Any = None,
    rtol: float = 0.0,
    dtype: Any = None,
) -> SingularTriplet:
    size = check_matrix(A, "A", xp)
    real = _results(A, dtype, xp)
    m, n = A.shape[-2:]
    _check_start(v0, tuple(A.shape[-2:]))
    index = check_indices(k, min(m, n), cluster=cluster)
    e = exponent(size, xp)
    scaled = ldexp(A, -e[..., None, None], xp)
    wanted = method == "gram" or (method == "auto" and min(m, n) >= _GRAM_FROM)
    count = len(_tuple(index))
    top = _tuple(index) == tuple(range(count)) and (cluster or count == 1) and count < min(m, n) > 2
    view = host_view(scaled) if wanted and A.ndim == 2 and top else None
    if method == "gram" and view is None:
        raise ValueError(
            "expected one matrix on the CPU with min(m, n) > 2 and k = 0 (or a cluster of the largest values) for "
            f"method='gram', got shape {tuple(A.shape)}, k = {index} on {array_device(A)}; use method='svd'"
        )
    if view is not None:
        try:
            return _by_gram(view, count, cluster, xp.astype(e, real, copy=False), gap_tol, scaled, xp, v0, rtol, real)
        except np.linalg.LinAlgError:  # the gap is within rounding of K: let the SVD decide whether it is a tie
            if method == "gram":
                raise ConvergenceError(
                    "expected sigma_0 to be isolated well above rounding for method='gram', got a Gram matrix whose "
                    "shift is not positive definite; use method='svd'"
                ) from None
    e, scaled = xp.astype(e, real, copy=False), to_precision(scaled, real, xp)
    tol = 10 * max(m, n) * eps(scaled, xp) if gap_tol is None else gap_tol
    U, s, Vh = xp.linalg.svd(scaled, full_matrices=False)
    gap, status = isolation(s, _tuple(index), m != n, cluster, tol, xp)
    margin = 10 * max(m, n) * eps(scaled, xp) * s[..., 0]
    blank = SingularTriplet(
        index, tuple(A.shape), status, xp, e, s, U, Vh, gap, margin, _no_resolvent, s.dtype, _cluster=cluster
    )
    return _assemble(blank, (U, s, adjoint(Vh, xp)), index, gap)


def _check_start(v0: Any, shape: tuple[int, ...]) -> None:
    """Raise unless v0 can be the start for a matrix of that shape."""
    if isinstance(v0, SingularTriplet):
        if tuple(v0.shape) != shape or v0.k != 0:
            raise ValueError(f"expected v0 to be the triplet k = 0 of a matrix {shape}, got k = {v0.k} of {v0.shape}")
    elif v0 is not None and tuple(getattr(v0, "shape", None) or np.shape(v0)) != shape[-1:]:
        raise ValueError(f"expected v0 of shape ({shape[-1]},), a right singular vector, got {np.shape(v0)}")


def _results(A: Array, dtype: Any, xp: Namespace) -> Any:
    """The real dtype of results for a matrix A."""
    own = real_dtype(A.dtype, xp)
    if dtype is None or dtype == own:
        return own
    if dtype != "float64" and dtype != xp.float64:
        raise ValueError(f"expected dtype to be that of A ({dtype_name(A)}) or float64, got {dtype!r}")
    return xp.float64


def _no_resolvent() -> Resolvent:
    raise AssertionError("a triplet is used before it is assembled")


def _assemble(
    blank: SingularTriplet, svd: tuple[Array, ...] | None, index: int | tuple[int, ...], gap: Array
) -> SingularTriplet:
    """The triplet of `index` from a thin SVD."""
    assert svd is not None
    xp, (U, s, V) = blank._xp, svd
    indices = _tuple(index)
    U0, s0, V0 = (xp.stack([x[..., i] for i in indices], axis=-1) for x in (U, s, V))
    excluded = [[i in indices if blank._cluster else i == k for k in indices] for i in range(s.shape[-1])]
    excluded = array(excluded, s, xp, dtype=xp.bool)
    resolvent = partial(from_thin_svd, U, s, V, s0, excluded, xp)
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
    return _assemble(other, (xp.astype(U, dtype), floats(s), xp.astype(V, dtype)), other.k, other._gap)


def _by_gram(
    A: np.ndarray,
    c: int,
    cluster: bool,
    e: Array,
    gap_tol: float | None,
    like: Array,
    xp: Namespace,
    v0: Any,
    rtol: float,
    real: Any,
) -> SingularTriplet:
    """Top triplet, or cluster of the c largest values, of one matrix on the CPU from its smaller Gram matrix.

    In float64 at least. A cluster or a small matrix takes all eigenvectors of the Gram matrix, one value of a large one
    a Cholesky factorisation.
    """
    wide = A.shape[0] <= A.shape[1]
    dtype = np.result_type(A.dtype, np.float64)
    gram = Gram(A if wide else adjoint(A, np))
    r = len(gram.B)
    solve: Solver | None = None
    if cluster or r < _CHOLESKY_FROM:
        gram = gram.at(dtype)
        matrix, (w, X) = gram.B, np.linalg.eigh(gram.matrix())
        w, X = w[::-1], X[:, ::-1]
        u = X[:, :c]
    else:
        starts = _starts(v0, A.shape[1], gram, dtype, wide, rtol)
        w, u, solve = isolated_top(gram, starts, rtol)
        gram, matrix = solve.gram, solve.gram.at(solve.K.dtype).B
    v = gram.apply_adjoint(u)
    s = np.sqrt(np.maximum(w, 0.0))
    s[:c] = np.linalg.norm(v, axis=0)
    if s[c - 1] == 0:
        raise np.linalg.LinAlgError("zero singular value")
    v /= s[:c]
    index = tuple(range(c)) if cluster else 0
    # the error of the decomposition, and that with which a matrix of results this precise was rounded to itself
    error = 10 * max(max(A.shape) * float(np.finfo(dtype).eps), float(xp.finfo(real).eps))
    tol = error if gap_tol is None else gap_tol
    gap, status = isolation(s, tuple(range(c)), A.shape[0] != A.shape[1], cluster, tol, np)
    margin = np.asarray(10 * max(A.shape) * float(np.finfo(dtype).eps) * s[0])
    if solve is None:
        if w[c - 1] - w[c] <= 100 * r * float(np.finfo(dtype).eps) * w[0]:
            raise np.linalg.LinAlgError("the gap is within rounding")
        solve = EigenSolver(w[c:], X[:, c:], s[:c])
    resolvent = SmallSideResolvent(
        solve, (gram.apply, gram.apply_adjoint), u, v, s[:c], mirrored=not wide, matrix=matrix
    )
    s0, P0, Q0, gap, margin = (from_host(x, like, xp) for x in (s[:c], *((u, v) if wide else (v, u)), gap, margin))
    wrapped = resolvent if is_numpy(like) else HostResolvent(resolvent, like, xp)
    return SingularTriplet(
        index, A.shape, status, xp, e, s0, P0, Q0, gap, margin, lambda: wrapped, real, _cluster=cluster
    )


# --- sparse arrays and operators ---------------------------------------------------------------------------------


def _prepare_operators(
    A: Any,
    k: int | Sequence[int],
    directions: list[Any],
    names: list[str],
    cluster: bool,
    gap_tol: float | None,
    v0: Any,
) -> tuple[SingularTriplet, list[Any]]:
    """As `prepare`, where the matrix or a direction is only multiplied with."""
    if isinstance(A, SingularTriplet):
        triplet = A
        if not is_numpy(A._P0):
            raise TypeError("expected directions of the triplet's array library, got a SciPy operator")
    else:
        triplet = _by_operator(A, k, cluster, gap_tol, v0)
    operators = []
    for H, name in zip(directions, names, strict=True):
        if not is_operator(H):
            _, (H,) = as_arrays(H, names=[name])
            if not is_numpy(H):
                raise TypeError(f"expected {name} as a NumPy array beside SciPy operators, got {type(H).__name__}")
            check_direction(H, name, triplet.shape, np)
        H = as_operator(H, name)
        if H.shape != tuple(triplet.shape[-2:]):
            raise ValueError(f"expected {name} of shape {tuple(triplet.shape[-2:])} like A, got {H.shape}")
        operators.append(H)
    return triplet, operators


def _by_operator(A: Any, k: int | Sequence[int], cluster: bool, gap_tol: float | None, v0: Any) -> SingularTriplet:
    """Triplet k of a matrix known by its products: Lanczos on K, conjugate gradients for the resolvent."""
    if not is_operator(A):
        xp, (A,) = as_arrays(A, names=["A"])
        check_matrix(A, "A", xp)
        if not is_numpy(A):
            raise TypeError(f"expected a NumPy array for method='lanczos', got {type(A).__name__}")
        A = A.astype(np.result_type(A.dtype, np.float64), copy=False)
    B = as_operator(A, "A")
    m, n = B.shape
    if isinstance(v0, SingularTriplet):
        _check_start(v0, (m, n))
        v0 = v0.v
    index = check_indices(k, min(m, n), cluster=cluster)
    if min(m, n) <= max(2 * (max(_tuple(index)) + 2), 32):  # too small for Lanczos to pay
        xp, (dense,) = as_arrays(B.dense(), names=["A"])
        return _by_dense(dense, index, gap_tol, cluster, "svd", xp)
    if isinstance(index, tuple):
        raise TypeError(
            f"expected one index k for a sparse array or operator, got {index}; ask for one after the other, or give a "
            "dense array"
        )
    if B.size == 0:
        raise ZeroSingularValueError("expected a singular value above zero, got a matrix of zeros")
    e = float(exponent(np.asarray(B.size), np))
    B = B.scaled(e)
    wide = m <= n
    first, second = (B.apply, B.apply_adjoint) if wide else (B.apply_adjoint, B.apply)
    w, X, following = top_of_gram(lambda x: first(second(x)), min(m, n), index + 1, _start(v0, B, wide), B.dtype)
    u = X[:, index : index + 1]
    v = second(u)
    sigma = float(np.linalg.norm(v))
    if sigma == 0:
        raise ZeroSingularValueError(f"expected a singular value above zero, got sigma_{index} = 0")
    v /= sigma
    residual = float(np.linalg.norm(first(v) - sigma * u))
    xp, _ = as_arrays(u, names=["u"])
    s = np.sqrt(np.maximum(np.append(w, following), 0.0))
    s[index] = sigma
    tol = 10 * max(m, n) * float(np.finfo(float).eps) if gap_tol is None else gap_tol
    gap, status = isolation(s, (index,), True, False, tol, xp)
    margin = np.asarray(10 * max(m, n) * float(np.finfo(float).eps) * s[0] + residual)

    def resolvent() -> Resolvent:
        solver = IterativeSolver(lambda x: first(second(x)), X, w, index, sigma)
        return SmallSideResolvent(solver, (first, second), u, v, np.array([sigma]), mirrored=not wide)

    P0, Q0 = (u, v) if wide else (v, u)
    values, real = s[index : index + 1], np.dtype(np.float64)
    return SingularTriplet(index, (m, n), status, xp, np.asarray(e), values, P0, Q0, gap, margin, resolvent, real)


def _start(v0: Any, B: Operator, wide: bool) -> np.ndarray:
    """Start vector of Lanczos on the smaller side.

    A little of a random vector (of a fixed seed) is mixed into the caller's, which may lie in an invariant subspace.
    """
    start: np.ndarray = np.random.default_rng(0).standard_normal(min(B.shape)).astype(B.dtype)
    if v0 is None:
        return start
    column = _on_smaller_side(v0, B.shape[1], B.apply, B.dtype, wide)
    if column is None:
        raise NonFiniteError("expected v0 not to be in the null space of A, got A v0 = 0")
    return column[:, 0] + 1e-4 * start / float(np.linalg.norm(start))


def _starts(v0: Any, n: int, gram: Gram, dtype: Any, wide: bool, rtol: float) -> list[Start]:
    """The ways to begin that `v0` offers."""
    starts: list[Start] = []
    if isinstance(v0, SingularTriplet):
        small = v0._small_side
        if small is not None and isinstance(small.solve, CholeskySolver) and small.mirrored != wide:
            starts.append(partial(improved, known=small.solve, gap=v0._relative_gap, rtol=rtol))
        v0 = v0.v
    if v0 is not None and (column := _on_smaller_side(v0, n, gram.apply, dtype, wide)) is not None:
        starts.append(lambda _: column)
    return starts


def _on_smaller_side(
    v0: Any, n: int, apply: Callable[[np.ndarray], np.ndarray], dtype: Any, wide: bool
) -> np.ndarray | None:
    """A start v0 (n,) for the right singular vector as a unit column of the smaller side; None if it vanishes there."""
    view = host_view(v0)
    v0 = np.asarray(v0 if view is None else view)
    if v0.shape != (n,):
        raise ValueError(f"expected v0 of shape ({n},), a right singular vector, got {v0.shape}")
    if np.iscomplexobj(v0) and not np.issubdtype(dtype, np.complexfloating):
        raise TypeError("expected a real v0 for a real matrix, got a complex one")
    column = v0.astype(dtype)[:, None]
    warm = apply(column) if wide else column
    size = float(np.linalg.norm(warm))
    if not size < np.inf:
        raise NonFiniteError(f"expected v0 to be finite, got a norm of {size}")
    return np.asarray(warm / size) if size > 0 else None
