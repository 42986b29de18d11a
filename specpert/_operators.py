"""SciPy sparse arrays and LinearOperators as matrices that are only multiplied with.

Legend: A (m, n) known through A x and A^* y; e exponent of two of its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import matmul
from typing import Any

import numpy as np

from specpert._arrays import Array, Namespace, by_columns, eps
from specpert.result import ConvergenceError, NonFiniteError

_EXACT_NORM_LIMIT = 512  # up to this smaller side the norm of a matrix is computed, beyond it bounded


def is_operator(A: Any) -> bool:
    """Whether A is a SciPy sparse array or a LinearOperator (known by what it can do: nothing is imported)."""
    return hasattr(A, "tocsr") or (hasattr(A, "matvec") and hasattr(A, "rmatvec"))


@dataclass(frozen=True, eq=False)
class Operator:
    """A matrix given by its products, times `factor`."""

    shape: tuple[int, int]
    dtype: np.dtype
    size: float  # of the order of the norm, before the factor; exact zero for a zero matrix
    bound: float | None  # certified upper bound of ||A||_2 before the factor, None where only products are known
    _apply: Callable[[np.ndarray], np.ndarray]
    _apply_adjoint: Callable[[np.ndarray], np.ndarray]
    factor: float = 1.0

    @property
    def ndim(self) -> int:
        """Two, as of any matrix."""
        return 2

    def apply(self, x: np.ndarray) -> np.ndarray:
        """A x for columns x (..., n, c)."""
        return self.factor * by_columns(self._apply, x)

    def apply_adjoint(self, y: np.ndarray) -> np.ndarray:
        """A^* y for columns y (..., m, c)."""
        return self.factor * by_columns(self._apply_adjoint, y)

    def scaled(self, e: float) -> Operator:
        """A / 2^e."""
        return replace(self, factor=math.ldexp(self.factor, -int(e))) if self.size > 0 else self

    def norm_bound(self) -> float:
        """Upper bound of the norm; for a LinearOperator an estimate by Lanczos, raised by one per cent."""
        if self.bound is not None:
            return self.bound * abs(self.factor)
        if self.size == 0:
            return 0.0
        from scipy.sparse.linalg import ArpackError, LinearOperator, svds

        if min(self.shape) < 3:
            return abs(self.factor) * self.size * float(np.linalg.norm(self.dense() / self.size, 2)) * 1.01
        operator = LinearOperator(
            self.shape,
            matvec=lambda x: self._apply(x.reshape(-1, 1)).reshape(-1) / self.size,
            rmatvec=lambda y: self._apply_adjoint(y.reshape(-1, 1)).reshape(-1) / self.size,
            dtype=self.dtype,
        )
        start = np.random.default_rng(0).standard_normal(min(self.shape))
        try:
            norm = float(svds(operator, k=1, v0=start, return_singular_vectors=False)[0])
        except ArpackError as error:
            raise ConvergenceError(f"expected Lanczos to find the norm of a direction, got: {error}") from error
        return abs(self.factor) * self.size * 1.01 * norm

    def dense(self) -> np.ndarray:
        """The matrix itself, by products with the unit vectors of the smaller side."""
        m, n = self.shape
        if n <= m:
            return self._apply(np.eye(n, dtype=self.dtype))
        return self._apply_adjoint(np.eye(m, dtype=self.dtype)).conj().T


def as_operator(A: Any, name: str) -> Operator:
    """An Operator from a sparse array, a LinearOperator or a dense matrix; raises unless it is a finite matrix."""
    if A.ndim != 2 or 0 in A.shape:
        raise ValueError(f"expected {name} to be a matrix with at least one row and column, got shape {tuple(A.shape)}")
    m, n = (int(i) for i in A.shape)
    if hasattr(A, "tocsr"):
        return _from_sparse(A, name)
    if isinstance(A, np.ndarray):
        Aa, size = A.conj().T, float(np.max(np.abs(A)))
        bound = size * float(spectral_norm_bound(A / size, np)) if size > 0 else 0.0
        return Operator((m, n), A.dtype, size, bound, partial(matmul, A), partial(matmul, Aa))
    dtype = np.result_type(A.dtype if A.dtype is not None else float, np.float64)
    probe = np.random.default_rng(0).standard_normal(n)
    image = np.asarray(A.matvec(probe))
    size = _norm(image) / _norm(probe) * math.sqrt(max(m, n) / m)
    try:
        A.rmatvec(image / _norm(image) if size > 0 else image)
    except (NotImplementedError, TypeError, AttributeError) as error:
        raise TypeError(
            f"expected {name} to be a LinearOperator with rmatvec (the product with its adjoint), got one without; "
            "give rmatvec=... when it is made"
        ) from error
    if not np.isfinite(image).all():
        raise NonFiniteError(f"expected the products of {name} to be finite, got NaN or inf")
    return Operator((m, n), dtype, size, None, A.matmat, A.rmatmat)


def _from_sparse(A: Any, name: str) -> Operator:
    A = A.tocsr()
    if A.dtype.kind not in "biufc" or A.dtype in (np.longdouble, np.clongdouble):
        raise TypeError(f"expected {name} with a floating or integer dtype, got {A.dtype}")
    A = A.astype(np.result_type(A.dtype, np.float64), copy=False)
    if not A.has_canonical_format:  # SciPy would add up entries given twice in the caller's own array
        A = A.copy()
        A.sum_duplicates()
    if not np.isfinite(A.data).all():
        raise NonFiniteError(f"expected {name} to be finite, got {A.data[~np.isfinite(A.data)][0]} among its entries")
    bound = 0.0
    if A.nnz and (largest := float(np.max(np.abs(A.data)))) > 0:
        magnitude = abs(A)
        magnitude.data = magnitude.data / largest  # SciPy multiplies by the inverse, which may overflow
        sums = [float(magnitude.sum(axis=axis).max()) for axis in (0, 1)]
        bound = largest * min(_norm(magnitude.data), math.sqrt(sums[0] * sums[1])) * (1 + 1e-12)
    adjoint = A.conj().T.tocsr()
    return Operator(A.shape, A.dtype, bound, bound, partial(matmul, A), partial(matmul, adjoint))


def spectral_norm_bound(H: Array, xp: Namespace) -> Array:
    """Upper bound of ||H||_2, shape (...): the norm and a margin; for large H min(||H||_F, sqrt(||H||_1 ||H||_inf))."""
    m, n = H.shape[-2:]
    if min(m, n) <= _EXACT_NORM_LIMIT:
        return xp.max(xp.linalg.svdvals(H), axis=-1) * (1 + 10 * max(m, n) * eps(H, xp))
    magnitude = xp.abs(H)
    size = xp.max(magnitude, axis=(-2, -1), keepdims=True)
    magnitude = magnitude / xp.where(size > 0, size, xp.ones_like(size))
    frobenius = xp.sqrt(xp.sum(magnitude * magnitude, axis=(-2, -1)))
    columns, rows = xp.max(xp.sum(magnitude, axis=-2), axis=-1), xp.max(xp.sum(magnitude, axis=-1), axis=-1)
    return size[..., 0, 0] * xp.minimum(frobenius, xp.sqrt(columns * rows)) * (1 + (m + n) * eps(H, xp))


def _norm(x: np.ndarray) -> float:
    """Euclidean norm, free of overflow."""
    largest = float(np.max(np.abs(x)))
    return largest * float(np.linalg.norm(x / largest)) if largest > 0 else 0.0
