"""Singular triplets of dense arrays: from a thin SVD, or from the Gram matrix of the smaller side.

Legend: A (..., m, n), r = min(m, n); s (..., r) singular values; c number of values asked for; d isolation distance in
the spectrum of T0 = [[0, A], [A^*, 0]] (theory 1.9). All private arrays are those of A / 2^e.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any

import numpy as np

from specpert._arrays import (
    Array,
    Namespace,
    adjoint,
    array_device,
    as_arrays,
    check_matrix,
    dtype_name,
    eps,
    exponent,
    from_host,
    has_double,
    host_view,
    is_complex,
    is_numpy,
    ldexp,
    namespace,
    real_dtype,
    to_precision,
)
from specpert._checks import check_indices
from specpert._isolation import isolation
from specpert._resolvent import HostResolvent, Resolvent, SmallSideResolvent
from specpert._solvers import CholeskySolver, ClusterSolver, EigenSolver, Gram, IterativeSolver, Solver
from specpert._top import Start, improved, isolated_top
from specpert.result import (
    ConvergenceError,
    DegenerateSingularValueError,
    NonFiniteError,
)
from specpert.triplet import SingularTriplet, as_tuple, assemble, no_resolvent

# Smaller side, or larger side and ratio of both, from which the Gram matrix beats the SVD for the top value
_GRAM_FROM, _LONG, _RATIO = 64, 256, 16
# From this side on SciPy's partial decomposition and Cholesky pay; below, its pool of threads beside NumPy's costs more
_CHOLESKY_FROM = 256


def by_dense(
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
    check_start(v0, tuple(A.shape[-2:]), is_complex(A, xp))
    index = check_indices(k, min(m, n), cluster=cluster)
    e = exponent(xp.astype(size, real, copy=False), xp)
    scaled = ldexp(A, -e[..., None, None], xp)
    large = min(m, n) >= _GRAM_FROM or max(m, n) >= max(_LONG, _RATIO * min(m, n))
    wanted = method == "gram" or (method == "auto" and large)
    count = len(as_tuple(index))
    top = (as_tuple(index) == tuple(range(count)) if cluster else index == 0) and count < min(m, n) > 2
    view = host_view(scaled) if wanted and A.ndim == 2 and top else None
    if method == "gram" and view is None:
        raise ValueError(
            "expected one matrix on the CPU with min(m, n) > 2 and k = 0 (or a cluster of the largest values) for "
            f"method='gram', got shape {tuple(A.shape)}, k = {index} on {array_device(A)}; use method='svd'"
        )
    if view is not None:
        # where the gap is within rounding of K, the SVD decides whether it is a tie
        with contextlib.suppress(np.linalg.LinAlgError):
            return _by_gram(view, count, cluster, e, gap_tol, scaled, xp, v0, rtol, real)
    scaled = to_precision(scaled, real, xp)
    tol = 10 * max(m, n) * eps(scaled, xp) if gap_tol is None else gap_tol
    U, s, Vh = xp.linalg.svd(scaled, full_matrices=False)
    gap, status = isolation(s, as_tuple(index), m != n, cluster, tol, xp)
    if method == "gram":
        raise ConvergenceError(
            f"expected sigma_0 to be isolated well above rounding for method='gram', got a gap of {float(gap[0]):.1e} "
            f"beside a sigma_0 of {float(s[0]):.1e}, in which a Gram matrix is not precise enough; use method='svd'"
        )
    margin = 10 * max(m, n) * eps(scaled, xp) * s[..., 0]
    blank = SingularTriplet(
        index, tuple(A.shape), status, xp, e, s, U, Vh, gap, margin, no_resolvent, s.dtype, _cluster=cluster
    )
    return assemble(blank, (U, s, adjoint(Vh, xp)), index, gap)


def check_start(v0: Any, shape: tuple[int, ...], complex_: bool) -> None:
    """Raise unless v0 can be the start for a matrix of that shape."""
    if v0 is None:
        return
    if isinstance(v0, SingularTriplet):
        if tuple(v0.shape) != shape or v0.k != 0:
            raise ValueError(f"expected v0 to be the triplet k = 0 of a matrix {shape}, got k = {v0.k} of {v0.shape}")
        v0 = v0.v
    xp, (v0,) = as_arrays(v0, names=["v0"])
    if tuple(v0.shape) != shape[-1:]:
        raise ValueError(f"expected v0 of shape ({shape[-1]},), a right singular vector, got {tuple(v0.shape)}")
    if is_complex(v0, xp) and not complex_:
        raise TypeError("expected a real v0 for a real matrix, got a complex one")
    if not bool(xp.all(xp.isfinite(v0))):
        raise NonFiniteError("expected v0 to be finite, got NaN or inf in it")


def _results(A: Array, dtype: Any, xp: Namespace) -> Any:
    """The real dtype of results for a matrix A."""
    own = real_dtype(A.dtype, xp)
    if dtype is None:
        return own
    try:
        name = np.dtype(dtype).name
    except TypeError:  # of another library
        name = str(dtype).rsplit(".", 1)[-1]
    if name in ("float64", "complex128"):
        if not has_double(xp):
            raise ValueError(
                "expected dtype to be that of A, float32, got float64, which JAX has with jax_enable_x64 only"
            )
        return xp.float64
    if name not in ("float32", "complex64") or own == xp.float64:
        raise ValueError(f"expected dtype to be float64 or that of A, {dtype_name(A)}, got {dtype!r}")
    return own


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
    solve: CholeskySolver | None = None
    if cluster or r < _CHOLESKY_FROM:
        gram = gram.at(dtype)
        w, X = np.linalg.eigh(gram.matrix())
        w, X = w[::-1], X[:, ::-1]
        u = X[:, :c]
    else:
        starts = _starts(v0, A.shape[1], gram, dtype, wide, rtol)
        gap = v0._relative_gap if isinstance(v0, SingularTriplet) else 1.0
        w, u, solve = isolated_top(gram, starts, rtol, gap)
        gram = solve.gram
    return of_gram(A.shape, gram, w, u, X[:, c:] if solve is None else solve, cluster, e, gap_tol, like, xp, real)


def of_gram(
    shape: tuple[int, ...],
    gram: Gram,
    w: np.ndarray,
    u: np.ndarray,
    rest: CholeskySolver | ClusterSolver | np.ndarray,
    cluster: bool,
    e: Array,
    gap_tol: float | None,
    like: Array,
    xp: Namespace,
    real: Any,
) -> SingularTriplet:
    """The triplet, or cluster, of the top vectors u (r, c) of K, in float64 at least, for results as precise as `real`.

    The values w, descending, go one beyond the vectors or on to the last. `rest` solves the equation of the smaller
    side; or it is the other eigenvectors (r, r - c), and w all values. Raises numpy.linalg.LinAlgError where K cannot
    tell the cluster from the rest.
    """
    wide, (r, c), dtype = shape[0] <= shape[1], u.shape, u.dtype
    v = gram.apply_adjoint(u)
    s = np.sqrt(np.maximum(w, 0.0))
    s[:c] = np.linalg.norm(v, axis=0)
    if s[c - 1] == 0:
        raise np.linalg.LinAlgError("zero singular value")
    # the subspace is less accurate than that of an SVD by s_0 / (s_(c-1) + s_c)
    if cluster and isinstance(rest, np.ndarray) and s[c - 1] < 0.1 * s[0]:
        raise np.linalg.LinAlgError("the cluster is too far below the largest value")
    v /= s[:c]
    index = tuple(range(c)) if cluster else 0
    # the error of the decomposition, and that with which a matrix of results this precise was rounded to itself
    error = 10 * max(max(shape) * float(np.finfo(dtype).eps), float(xp.finfo(real).eps))
    tol = error if gap_tol is None else gap_tol
    rectangular, indices = shape[0] != shape[1], tuple(range(c))
    try:
        gap, status = isolation(s, indices, rectangular, cluster, tol, np)
    except DegenerateSingularValueError:
        if len(s) == r:
            raise
        s = np.linalg.svd(gram.at(dtype).B, compute_uv=False)  # the whole cluster, of which not all is known here
        gap, status = isolation(s, indices, rectangular, cluster, tol, np)
    margin = 10 * max(shape) * float(np.finfo(dtype).eps) * float(s[0])
    if isinstance(rest, ClusterSolver) and not rest.inner.precise:  # nor are the vectors then of full accuracy
        margin += float(np.linalg.norm(gram.apply(v) - u * s[:c]))
    if isinstance(rest, np.ndarray):
        if w[c - 1] - w[c] <= 100 * r * float(np.finfo(dtype).eps) * w[0]:
            raise np.linalg.LinAlgError("the gap is within rounding")
        solve: Solver = EigenSolver(w[c:], rest, s[:c])
        matrix = gram.B
    else:
        solve, matrix = rest, gram.at(rest.dtype).B
    products = gram.apply, gram.apply_adjoint
    resolvent = SmallSideResolvent(solve, products, u, v, s[:c], mirrored=not wide, matrix=matrix)
    series = partial(of_series, resolvent, None if is_numpy(like) else like)
    s0, P0, Q0, gap, margin = (
        from_host(x, like, xp) for x in (s[:c], *((u, v) if wide else (v, u)), gap, np.asarray(margin))
    )
    return SingularTriplet(index, shape, status, xp, e, s0, P0, Q0, gap, margin, series, real, _cluster=cluster)


def of_series(resolvent: SmallSideResolvent, like: Array | None) -> Resolvent:
    """The resolvent of one series, which keeps the residuals of its own solves, for arrays of the library of `like`."""
    if isinstance(solve := resolvent.solve, ClusterSolver | IterativeSolver):
        resolvent = copy(resolvent)
        resolvent.solve = solve.fresh()
    return resolvent if like is None else HostResolvent(resolvent, like, namespace(like))


def _starts(v0: Any, n: int, gram: Gram, dtype: Any, wide: bool, rtol: float) -> list[Start]:
    """The ways to begin that `v0` offers."""
    starts: list[Start] = []
    if isinstance(v0, SingularTriplet):
        small = v0._small_side
        if small is not None and isinstance(small.solve, CholeskySolver) and small.mirrored != wide:
            starts.append(partial(improved, known=small.solve, gap=v0._relative_gap, rtol=rtol))
        v0 = v0.v
    if v0 is not None and (column := on_smaller_side(v0, gram.apply, dtype, wide)) is not None:
        starts.append(lambda _: column)
    return starts


def on_smaller_side(v0: Any, apply: Callable[[np.ndarray], np.ndarray], dtype: Any, wide: bool) -> np.ndarray | None:
    """A start v0 (n,) for the right singular vector as a unit column of the smaller side; None if it vanishes there."""
    view = host_view(v0)
    v0 = np.asarray(v0 if view is None else view)
    column = v0.astype(dtype)[:, None]
    column = column / (float(np.max(np.abs(column))) or 1.0)
    warm = apply(column) if wide else column
    size = float(np.linalg.norm(warm))
    return np.asarray(warm / size) if size > 0 else None
