r"""The front door: derivatives of any order. Factorials and layouts live here only.

Legend: A (..., m, n); order n of the derivative D^n sigma_k[H_1, ..., H_n]; "tensor" layout (m, n) * order; "vec"
layout (m n,) * order with column-major vec, vec(A)[p + m q] = A[p, q] (theory 1.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np

from specpert._arrays import Array, adjoint, array, dtype_name, eye, finite, is_complex, ldexp, scalar
from specpert._checks import check_choice, check_order
from specpert._operators import is_operator
from specpert._recursion import products
from specpert._subsets import dense_tensor, mixed_cluster_mean, mixed_derivative
from specpert.hessian import SigmaHessian, dense_hessian
from specpert.prepare import prepare
from specpert.result import DegenerateSingularValueError, DenseSizeError
from specpert.series import expand, fast_coefficients, scale, times_factorial
from specpert.triplet import SingularTriplet

MAX_DENSE_BYTES = 2**31
"""Largest dense derivative that is made, in bytes; set ``specpert.derivative.MAX_DENSE_BYTES`` for another limit."""


def sigma_derivative(
    A: Any,
    order: int = 1,
    *,
    k: int | Sequence[int] = 0,
    directions: Any = None,
    layout: str = "tensor",
    gap_tol: float | None = None,
    on_degenerate: str = "raise",
) -> Array:
    r"""Derivative of any order of the singular value sigma_k at A.

    Parameters
    ----------
    A : array, shape (..., m, n), scipy.sparse array, LinearOperator, or SingularTriplet
        Real or complex matrix or stack of matrices, of NumPy or any library of the array API. Entries that track a
        gradient are taken by value: the result is no part of their graph.
    order : int
        n >= 1.
    k : int or sequence of int
        Index of the singular value, 0 being the largest. A sequence gives the results for each k, stacked on an axis
        after those of the stack.
    directions : array or sequence of arrays, optional
        One array H (..., m, n), a stack included, gives :math:`D^n \sigma_k[H, \dots, H]`; a list of `order` arrays
        gives :math:`D^n \sigma_k[H_1, \dots, H_n]` (theory 1.6). Without it the dense derivative is made.
    layout : {"tensor", "vec"}
        Of the dense derivative: shape (m, n) * order, or (m n,) * order with column-major vec, in which order 1 is
        :math:`v \otimes u` and order 2 the Kronecker form of the Hessian (theory 1.1).
    gap_tol : float, optional
        Distance to the next singular value, relative to the largest, below which the value counts as tied.
    on_degenerate : {"raise", "cluster"}
        What to do at a tie of the value asked for: raise, or take the mean of the tied cluster, which is smooth. The
        array does not say which it was; ``singular_triplet(A, k)`` does, as it raises at a tie.

    Returns
    -------
    array, shape (...) with directions, (..., m, n, m, n, ...) or (..., m n, m n, ...) without
        Of the library and device of A; float16, bfloat16 and float32 are computed in float32, integers in float64.
        For complex A the derivative is a real form: order 1 is the complex gradient :math:`u v^*`, with
        :math:`D\sigma[H] = \mathrm{Re}\, \mathrm{tr}((u v^*)^* H)`; from order 2 on the dense derivative is real,
        over the coordinates (Re, Im) of the entries: shape (m, n, 2) * order, or (2 m n,) * order over
        [vec(Re), vec(Im)].

    Raises
    ------
    DegenerateSingularValueError, ZeroSingularValueError
        sigma_k is tied, or zero.
    DenseSizeError
        The dense derivative would exceed ``specpert.derivative.MAX_DENSE_BYTES``.
    OverflowError
        The derivative exceeds the range of the dtype.
    IndexError, NonFiniteError, TypeError, ValueError
        k, order, layout or an array is not as described.

    Examples
    --------
    >>> import numpy as np
    >>> from specpert import sigma_derivative
    >>> A, H = np.array([[3.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> float(sigma_derivative(A, order=4, directions=H))  # of sqrt(9 + x^2) at x = 0: -1/9
    -0.111111111111...
    >>> T = sigma_derivative(A, order=4)
    >>> T.shape
    (1, 2, 1, 2, 1, 2, 1, 2)
    >>> bool(np.isclose(T[0, 1, 0, 1, 0, 1, 0, 1], -1 / 9))
    True
    """
    if getattr(order, "ndim", 0):
        raise TypeError(
            f"expected order to be an integer >= 1, got an array of shape {tuple(getattr(order, 'shape', ()))}; "
            "directions go by keyword: sigma_derivative(A, order=2, directions=H)"
        )
    order = check_order(order, 1)
    check_choice(on_degenerate, "on_degenerate", ("raise", "cluster"))
    check_choice(layout, "layout", ("tensor", "vec"))
    if gap_tol is None and (fast := fast_coefficients(A, directions, k, order)) is not None:
        return times_factorial(fast[order], order, np)
    given = [] if directions is None else _as_directions(directions, order)
    names = ["H"] if len(given) == 1 else [f"H_{i}" for i in range(1, len(given) + 1)]
    # the closed form of the Hessian needs all singular vectors
    method = "svd" if directions is None and order == 2 and not is_operator(A) else "auto"
    try:
        triplet, given = prepare(A, k, given, names, cluster=False, gap_tol=gap_tol, method=method)
    except DegenerateSingularValueError as error:
        if on_degenerate == "raise":
            raise
        if np.ndim(k) > 0 or (A.ndim if hasattr(A, "ndim") else np.ndim(A)) > 2:
            raise ValueError(
                "expected one matrix and one k with on_degenerate='cluster', as clusters differ from matrix to matrix; "
                f"ask for one after the other ({error})"
            ) from error
        triplet, given = prepare(A, error.cluster, given, names, cluster=True, gap_tol=gap_tol)
    if directions is None:
        return _dense(triplet, order, layout)
    if len(given) == 1:
        return scalar(expand(triplet, given, order)._scaled.derivative(order))
    return _mixed(triplet, given)


def _as_directions(directions: Any, order: int) -> list[Any]:
    """One array (used `order` times) or a sequence of `order` arrays; nested lists of numbers are one array."""
    if not isinstance(directions, list | tuple) or not directions:
        return [directions]
    first = directions[0]
    depth = first.ndim if hasattr(first, "ndim") else np.ndim(first)
    if depth < 2:
        return [directions]
    if len(directions) != order:
        raise ValueError(f"expected one direction or a sequence of order = {order} directions, got {len(directions)}")
    return list(directions)


def _mixed(triplet: SingularTriplet, directions: list[Array]) -> Array:
    """D^n sigma[H_1, ..., H_n], for a cluster of its mean."""
    xp = triplet._xp
    with np.errstate(over="ignore", invalid="ignore"):
        lam, power = _mixed_in_units(triplet, directions, None)
        value = ldexp(lam, power, xp)
        if not bool(xp.all(known := xp.isfinite(lam))):  # powers of 1 / d overflow; in units of d they cannot
            lam, power = _mixed_in_units(triplet, directions, xp.min(triplet._gap, axis=-1))
            value = xp.where(known, value, ldexp(lam, power, xp))
    return finite(scalar(value), f"derivative of order {len(directions)}", xp)


def _mixed_in_units(triplet: SingularTriplet, directions: list[Array], unit: Array | None) -> tuple[Array, Array]:
    """The mixed derivative over 2^e, and e, with directions scaled to about one, or to about the unit (...)."""
    xp = triplet._xp
    power, coefficients = triplet._e, []
    for H in directions:
        t, (scaled,) = scale([H], triplet._e, xp, unit)
        power = power + t
        coefficients.append(products(scaled, xp))
    P0, Q0 = triplet._P0, triplet._Q0
    if triplet._cluster:
        lam = mixed_cluster_mean(coefficients, triplet._resolvent(), P0, Q0, xp)
    else:
        lam = triplet._pick(mixed_derivative(coefficients, triplet._resolvent(), P0, Q0, xp))
        power = power[..., None] if triplet._several else power
    lam = triplet._result(lam)
    return lam, power + xp.zeros_like(lam)


def _dense(triplet: SingularTriplet, order: int, layout: str) -> Array:
    xp = triplet._xp
    _guard_size(triplet, order)
    if triplet._several:
        parts = [_dense(triplet._at(j), order, layout) for j in range(len(triplet._indices))]
        return xp.stack(parts, axis=len(triplet.shape) - 2)
    lead = triplet.shape[:-2]
    if triplet._cluster and order == 1:
        dense = triplet._result(triplet._P0 @ adjoint(triplet._Q0, xp)) / len(triplet._indices)
    elif triplet._cluster:
        dense = _dense_cluster_mean(triplet, order)
    elif order == 1:
        dense = triplet.u[..., :, None] * adjoint(triplet.v[..., None], xp)
    elif order == 2 and triplet._svd is not None:
        dense = dense_hessian(SigmaHessian(triplet))
    elif lead:
        flat = [_dense(triplet._matrix(i), order, "tensor") for i in np.ndindex(*lead)]
        dense = xp.reshape(xp.stack(flat), (*lead, *flat[0].shape))
    else:
        dense = dense_tensor(order, triplet._resolvent(), triplet._P0[..., 0], triplet._Q0[..., 0], xp)
        dense = triplet._result(dense)
        dense = ldexp(dense, (1 - order) * triplet._e, xp)
        dense = xp.reshape(dense, _entry_shape(triplet, order) * order)
    if order > 2:  # the Hessian sees to itself, at less cost
        dense = finite(dense, f"derivative of order {order}", xp)
    return dense if layout == "tensor" else _vec(dense, len(lead), _entry_shape(triplet, order), order, xp)


def _entry_shape(triplet: SingularTriplet, order: int) -> tuple[int, ...]:
    """Axes of one slot of the dense derivative: (m, n), or (m, n, 2) for the real form of a complex matrix."""
    m, n = triplet.shape[-2:]
    return (m, n, 2) if order > 1 and is_complex(triplet._P0, triplet._xp) else (m, n)


def _vec(dense: Array, lead: int, entry: tuple[int, ...], order: int, xp: Any) -> Array:
    """Column-major vec of every slot; for (m, n, 2) it stacks vec(Re) and vec(Im)."""
    w = len(entry)
    axes = list(range(lead))
    for slot in range(order):
        axes += [lead + slot * w + i for i in reversed(range(w))]
    return xp.reshape(xp.permute_dims(dense, tuple(axes)), (*dense.shape[:lead], *(math.prod(entry),) * order))


def _guard_size(triplet: SingularTriplet, order: int) -> None:
    several = len(triplet._indices) if triplet._several else 1
    entries = math.prod(triplet.shape[:-2]) * several * math.prod(_entry_shape(triplet, order)) ** order
    itemsize = 4 if dtype_name(triplet._values) == "float32" else 8
    if entries * itemsize > MAX_DENSE_BYTES:
        raise DenseSizeError(
            f"expected a dense derivative of at most {MAX_DENSE_BYTES:,} bytes, got order {order} of shape "
            f"{triplet.shape}, which needs {entries * itemsize:,} bytes; give directions=..., use SigmaHessian for "
            "order 2, or raise specpert.derivative.MAX_DENSE_BYTES"
        )


def _dense_cluster_mean(triplet: SingularTriplet, order: int) -> Array:
    """Each entry by the mixed derivative along its basis directions; symmetric entries once."""
    xp = triplet._xp
    entry = _entry_shape(triplet, order)
    basis = _basis(triplet, entry)
    B = basis.shape[0]
    multi = list(combinations_with_replacement(range(B), order))
    chunk = max(1, 2**22 // (B * len(triplet._indices)))  # bounds the memory of the directions and their vectors
    parts = []
    for start in range(0, len(multi), chunk):
        rows = multi[start : start + chunk]
        picks = [array([c[i] for c in rows], basis, xp, dtype=xp.int32) for i in range(order)]
        parts.append(_mixed(triplet, [xp.take(basis, pick, axis=0) for pick in picks]))
    values = xp.concat(parts)
    where = {c: i for i, c in enumerate(multi)}
    flat = [where[tuple(sorted(c))] for c in product(range(B), repeat=order)]
    dense = xp.take(values, array(flat, basis, xp, dtype=xp.int32), axis=0)
    return xp.reshape(dense, entry * order)


def _basis(triplet: SingularTriplet, entry: tuple[int, ...]) -> Array:
    """E_pq in row-major order, for the real form of a complex matrix each followed by i E_pq."""
    xp = triplet._xp
    m, n = entry[:2]
    units = xp.reshape(eye(m * n, triplet._P0, xp), (m * n, m, n))
    return units if len(entry) == 2 else xp.reshape(xp.stack([units, 1j * units], axis=1), (2 * m * n, m, n))


def sigma_gradient(A: Any, k: int | Sequence[int] = 0) -> Array:
    """Gradient u v^* of sigma_k at A, shape (..., m, n) (theory 1.2).

    The same as ``sigma_derivative(A, order=1, k=k)``; for complex A the gradient for the real inner product
    Re tr(X^* Y), as in torch.

    Parameters
    ----------
    A : array, shape (..., m, n), or SingularTriplet
    k : int or sequence of int
        Index of the singular value; a sequence gives shape (..., K, m, n).

    Returns
    -------
    array, shape (..., m, n)

    Raises
    ------
    DegenerateSingularValueError, ZeroSingularValueError, NonFiniteError, IndexError, TypeError, ValueError
        As :func:`singular_triplet`.

    Examples
    --------
    >>> from specpert import sigma_gradient
    >>> print(abs(sigma_gradient([[2.0, 0.0], [0.0, 1.0]])))
    [[1. 0.]
     [0. 0.]]
    """
    return sigma_derivative(A, 1, k=k)


def sigma_hessian(A: Any, k: int | Sequence[int] = 0, layout: str = "tensor") -> Array:
    """Hessian of sigma_k at A by its closed form (theory 1.3).

    The same as ``sigma_derivative(A, order=2, k=k, layout=layout)``. For products, quadratic forms, trace or diagonal
    use :class:`SigmaHessian`, which never makes the m n x m n matrix.

    Parameters
    ----------
    A : array, shape (..., m, n), or SingularTriplet
    k : int or sequence of int
        Index of the singular value; a sequence stacks the results on an axis after those of the stack.
    layout : {"tensor", "vec"}
        Shape (..., m, n, m, n), or (..., m n, m n) over column-major vec.

    Returns
    -------
    array
        For complex A over the real coordinates of the entries, see :func:`sigma_derivative`.

    Raises
    ------
    DegenerateSingularValueError, ZeroSingularValueError, DenseSizeError
        sigma_k is tied or zero; the result would be too large.
    NonFiniteError, IndexError, TypeError, ValueError
        As :func:`singular_triplet`.

    Examples
    --------
    >>> from specpert import sigma_hessian
    >>> print(sigma_hessian([[3.0, 0.0]], layout="vec"))
    [[0.         0.        ]
     [0.         0.33333333]]
    """
    return sigma_derivative(A, 2, k=k, layout=layout)
