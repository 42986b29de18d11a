"""The only file that imports specpert: what the monitor asks of perturbation theory, with failures as words."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

import specpert
from specpert import SigmaSeries, SingularTriplet

__all__ = [
    *("Pair", "SigmaSeries", "SingularTriplet", "Spectrum", "all_finite", "as_given", "as_real", "cluster_values"),
    *("degenerate", "follow_spectrum", "hessian_pairing", "one_thread", "read_spectrum", "series_along"),
    *("spectral_norm", "taylor", "top_triplet", "variance_forms"),
]


_P = ParamSpec("_P")
_T = TypeVar("_T")


@cache
def _blas() -> ThreadpoolController:
    """The BLAS libraries of NumPy and SciPy (torch's is its own)."""
    return ThreadpoolController().select(user_api="blas")


class _OneThread:
    """Held while any thread is inside: the limits are the process's, so the first sets and the last lifts them."""

    def __init__(self) -> None:
        self.lock, self.inside, self.limits = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.limits.enter_context(_blas().limit(limits=1))
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.limits.close()


_ONE_THREAD = _OneThread()


def one_thread(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Keep NumPy's and SciPy's threads out of the way of torch's, which wait for work and would share the cores."""

    @wraps(function)
    def limited(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with _ONE_THREAD:
            return function(*args, **kwargs)

    return limited


#: What is left of a matrix G when it meets the singular vectors: G v (m,) and G^T u (n,).
Pair: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Spectrum:
    """The top of the spectrum of a weight, which may be several matrices (the groups of a convolution).

    The singular values of all groups together are those of the block-diagonal matrix they make up: ``sigma`` is
    the largest of all, ``group`` the matrix it belongs to, and ``gap`` counts the other groups too.

    Attributes
    ----------
    matrices : Tensor, (g, m, n)
        The weight, in single or double precision, real or complex; everything else is in double precision.
    sigma, gap : float
        Largest singular value and its isolation distance (theory 1.9); the gap is NaN where it is unknown.
    triplet : SingularTriplet or None
        None where the derivatives do not exist; ``problem`` then says why. Also None where it was let go.
    group : int
    problem : str
        Empty when all is well.
    norms : Tensor (g,), optional
        Upper bounds of the norms of several matrices, exact for the largest two.
    chart : callable, optional
        Makes E (J, n) where the matrix that attains sigma is X E for a real matrix X (m, J) of the parameters.

    Vectors of complex matrices are real here, of twice the length: real parts and imaginary ones in turn. Real parts of
    inner products are then those of real vectors.
    """

    matrices: Tensor
    sigma: float
    gap: float
    triplet: SingularTriplet | None
    group: int = 0
    problem: str = ""
    norms: Tensor | None = None
    chart: Callable[[], Tensor | None] | None = None

    @property
    def matrix(self) -> Tensor:
        """The matrix (m, n) that attains sigma."""
        return self.matrices[self.group]

    def let_go(self) -> Spectrum:
        """The same without the triplet, which holds several matrices of the weight's size."""
        return replace(self, triplet=None)

    def emptied(self) -> Spectrum:
        """The same without any matrix."""
        return replace(self, matrices=self.matrices.new_empty(0), triplet=None, chart=None)

    @property
    def known_by_value(self) -> bool:
        """Whether the triplet was let go."""
        return self.triplet is None and not self.problem

    @property
    def u(self) -> Tensor:
        """Left singular vector (m,) or (2 m,)."""
        assert self.triplet is not None
        return as_real(_tensor(self.triplet.u))

    @property
    def v(self) -> Tensor:
        """Right singular vector (n,) or (2 n,)."""
        assert self.triplet is not None
        return as_real(_tensor(self.triplet.v))

    def project(self, G: Tensor) -> Pair:
        """``G v`` and ``G^* u`` of a matrix (m, n), multiplied in its own precision."""
        u, v = as_given(self.u, G.dtype), as_given(self.v, G.dtype)
        return as_real(G @ v).double(), as_real(G.mH @ u).double()


def as_real(x: Tensor) -> Tensor:
    """Complex vectors (..., n) as real ones (..., 2 n); real ones as they are."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2) if x.is_complex() else x


def as_given(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `as_real` where the precision is a complex one, and in that precision."""
    return (torch.view_as_complex(x.unflatten(-1, (-1, 2))) if dtype.is_complex else x).to(dtype)


def _double(a: Tensor) -> Tensor:
    return a.to(torch.complex128) if a.is_complex() else a.double()


def _array(a: Tensor) -> Any:
    """What specpert is given: on the CPU NumPy's view of a tensor, which it knows best."""
    return a.numpy() if a.device.type == "cpu" else a


def _tensor(a: Any) -> Tensor:
    return a if isinstance(a, Tensor) else torch.as_tensor(a)


#: A cluster holds the values within this many times the norm of a step of the largest, and may end in the widest gap
#: up to the second number; of at most so many values (theory 2.8).
REACH, MOST = (4.0, 6.0), 16
#: Relative accuracy of what the effective matrices have beyond the first order, in single precision.
CLUSTER_ACCURACY = 1e-3
#: What rounding may take from a norm, relative to it.
ROUNDING = 1e-12
REPEATED = "largest singular value is repeated"


@one_thread
def read_spectrum(matrices: Tensor, known: Spectrum | None = None, rtol: float = 0.0) -> Spectrum:
    """The spectrum of a matrix (m, n) or of several (g, m, n), in float64; never raises for numerical reasons.

    ``known``, the spectrum of a matrix nearby, saves time; so does ``rtol``, a relative accuracy that is enough for
    `hessian_pairing` and `variance_forms`.

    Examples
    --------
    >>> import torch
    >>> good = read_spectrum(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)))
    >>> round(good.sigma, 12), round(good.gap, 12), good.problem
    (3.0, 2.0, '')
    >>> tie = read_spectrum(torch.eye(2, dtype=torch.float64))
    >>> tie.sigma, tie.gap, tie.problem
    (1.0, 0.0, 'largest singular value is repeated')
    >>> groups = read_spectrum(torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]]], dtype=torch.float64))
    >>> groups.group, round(groups.sigma, 12), round(groups.gap, 12)
    (1, 5.0, 4.0)
    """
    matrices = matrices if matrices.ndim == 3 else matrices[None]
    nan = float("nan")
    if not all_finite(matrices):
        return Spectrum(matrices, nan, nan, None, problem="weight is not finite")
    try:
        norms, (group, other) = (None, (0, 0)) if len(matrices) == 1 else _norms(matrices, known)
        rival = -math.inf if norms is None else float(norms[other])
        A = _array(matrices[group])
        dtype = torch.float64 if isinstance(A, Tensor) else np.float64
        triplet = specpert.singular_triplet(A, v0=_start(matrices, group, known), rtol=rtol, dtype=dtype)
    except specpert.DegenerateSingularValueError:
        sigma = float(torch.linalg.matrix_norm(_double(matrices[group]), 2))
        return Spectrum(matrices, sigma, 0.0, None, group, REPEATED, norms)
    except specpert.ZeroSingularValueError:
        return Spectrum(matrices, 0.0, 0.0, None, group, "weight is zero")
    except torch.linalg.LinAlgError:
        return Spectrum(matrices, nan, nan, None, problem="singular value decomposition failed")
    sigma = float(triplet.sigma)
    gap = min(float(triplet.gap), sigma - rival)
    if gap <= 10 * max(matrices.shape[1:]) * torch.finfo(torch.float64).eps * sigma:
        return Spectrum(matrices, sigma, 0.0, None, group, REPEATED, norms)
    return Spectrum(matrices, sigma, gap, triplet, group, norms=norms)


@one_thread
def follow_spectrum(matrices: Tensor, known: Spectrum) -> Spectrum:
    """As `read_spectrum`, but with sigma alone: for a matrix so near the known one that its value is still the largest.

    Examples
    --------
    >>> import torch
    >>> before = read_spectrum(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)))
    >>> after = follow_spectrum(torch.tensor([[[3.0, 0.1], [0.0, 1.0]]], dtype=torch.float64), before)
    >>> round(after.sigma, 12) == round(float(torch.linalg.matrix_norm(after.matrix, 2)), 12)
    True
    """
    assert known.triplet is not None
    if len(matrices) == 1 and all_finite(matrices):
        with contextlib.suppress(specpert.ConvergenceError):
            return Spectrum(matrices, float(known.triplet.follow(_array(matrices[0]))), math.nan, None)
    return read_spectrum(matrices, known)


def all_finite(a: Tensor) -> bool:
    """Whether all numbers are finite: a sum shows NaN and inf, and only where it does are they looked for."""
    return bool(a.sum().isfinite()) or bool(a.isfinite().all())


def _start(matrices: Tensor, group: int, known: Spectrum | None) -> Any:
    """Where the search for the singular vector may begin."""
    if known is None or known.triplet is None or known.group != group or known.matrices.device != matrices.device:
        return None
    return known.triplet if known.matrices.shape == matrices.shape else None


#: So many matrices at a time are decomposed to find the largest of many.
CHUNK = 16


def _norms(matrices: Tensor, known: Spectrum | None = None, rank: int = 2) -> tuple[Tensor, list[int]]:
    """Upper bounds of the norms of matrices (g, m, n), and which are the largest, whose bounds are exact.

    Only those are decomposed that may be among the largest: a norm is at most the Frobenius norm, and has changed by no
    more than that of the change.
    """
    matrices = _double(matrices)
    bounds = _frobenius(matrices) * (1 + ROUNDING)
    if known is not None and known.norms is not None and known.matrices.shape == matrices.shape:
        change = _frobenius(matrices - known.matrices)
        bounds = torch.minimum(bounds, (known.norms.to(bounds) + change) * (1 + ROUNDING))
    exact = torch.full_like(bounds, -math.inf)
    order = bounds.argsort(descending=True)
    for start in range(0, len(order), CHUNK):
        chunk = order[start : start + CHUNK]
        if start >= rank and float(bounds[chunk[0]]) <= float(exact.topk(rank).values[-1]):
            break
        # for a positive rtol by the small Gram matrices, which give the largest value to rounding
        exact[chunk] = _tensor(specpert.spectral_norm(_array(matrices[chunk]), rtol=ROUNDING)).to(bounds)
    return torch.where(exact >= 0, exact, bounds), exact.topk(min(rank, len(exact))).indices.tolist()


def _frobenius(matrices: Tensor) -> Tensor:
    """Frobenius norms (g,)."""
    rows = as_real(matrices).flatten(1)
    norms = torch.linalg.vector_norm(rows, dim=1)
    if not 1e-140 < float(norms.amax()) < math.inf:  # squares may have left the range of numbers
        size = rows.abs().amax(1, keepdim=True)
        norms = size[:, 0] * torch.linalg.vector_norm(rows / size.where(size > 0, torch.ones_like(size)), dim=1)
    return norms


@one_thread
def hessian_pairing(spectrum: Spectrum, p: Tensor, q: Tensor, rows: Tensor | None = None) -> Tensor:
    """``D^2 sigma[G, G]`` from ``p = G v`` (..., m) and ``q = G^T u`` (..., n); shape (...) (theory 1.3).

    With ``rows`` (J,) p is (..., J): G vanishes in all others.
    """
    dtype = torch.complex128 if spectrum.matrices.is_complex() else torch.float64
    p, q = (_array(as_given(x, dtype)) for x in (p, q))
    index = None if rows is None else _array(rows)
    return _tensor(specpert.SigmaHessian(spectrum.triplet).from_projections(p, q, rows=index))


@one_thread
def variance_forms(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """``J o J`` and the diagonal of H as matrices (m, n) for J and H of sigma (theory 2.4); by a chart (m, J)."""
    hessian, u, v = specpert.SigmaHessian(spectrum.triplet), spectrum.u, spectrum.v
    E = None if spectrum.chart is None else spectrum.chart()
    if E is None:
        return torch.outer(u.square(), v.square()), _tensor(hessian.diagonal())
    u, v = as_given(u, E.dtype), as_given(v, E.dtype)
    return torch.outer(u.conj(), E @ v).real.square(), _tensor(hessian.diagonal(rows=_array(E)))


@one_thread
def taylor(spectrum: Spectrum, step: Tensor, order: int = 3) -> list[float]:
    """Taylor coefficients (sigma, D1, D2/2, D3/6, ...) of sigma along ``step`` (m, n) (theory 1.4)."""
    return [float(c) for c in specpert.sigma_series(spectrum.triplet, _array(step), order).coefficients]


@one_thread
def cluster_values(spectrum: Spectrum, steps: Tensor, size: float) -> list[float] | None:
    """Largest singular value after ``steps`` (g, m, n), to order 1, 2, 3, by effective matrices (theory 2.8).

    They are those of theory 1.8, which solve with each value's own denominator, not with that of the largest for all.

    All singular values from which a step of norm ``size`` cannot keep the largest apart are taken as one cluster in
    each group, so that no small gap is divided by.

    Returns
    -------
    list of float, or None
        None if the cluster would be too large, or a value comes out beyond the reach of the step (Weyl), as it does
        where the cluster can only end in a small gap.

    Examples
    --------
    >>> import torch
    >>> tie = read_spectrum(torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)))
    >>> step = torch.zeros(1, 3, 3, dtype=torch.float64)
    >>> step[0, 0, 1] = step[0, 1, 0] = 0.1  # splits the pair into 2.1 and 1.9
    >>> [round(value, 12) for value in cluster_values(tie, step, 0.1)]
    [2.1, 2.1, 2.1]
    """
    upper, lower = spectrum.sigma - REACH[0] * size, max(0.0, spectrum.sigma - REACH[1] * size)
    if upper <= 0:
        return None
    matrices = spectrum.matrices
    if spectrum.norms is not None:
        near = spectrum.norms > upper
        matrices, steps = matrices[near], steps[near]
        if len(matrices) > MOST:
            return None
    if spectrum.triplet is not None and len(spectrum.matrices) == 1:
        sources, counts = [spectrum.triplet], [1]
    else:
        sources = [_array(_double(matrix)) for matrix in matrices]
        counts = (_singular_values(matrices) > upper).sum(-1).tolist()
    if sum(counts) > MOST:
        return None
    best = [0.0] * 3
    for source, count, step in zip(sources, counts, steps, strict=True):
        if count == 0:
            continue
        cluster = specpert.leading_cluster(source, upper, lower, MOST, rtol=CLUSTER_ACCURACY)
        if cluster is None:
            return None
        series = specpert.sigma_series(cluster, _array(step), 3)
        assert isinstance(series, specpert.ClusterSeries)
        matrices = _tensor(series.effective_matrices)
        tops = torch.linalg.eigvals(torch.cumsum(matrices, 0)[1:]).real.amax(-1).tolist()
        best = [max(pair) for pair in zip(best, tops, strict=True)]
    return best if max(abs(value - spectrum.sigma) for value in best) <= 1.1 * size else None


def _singular_values(matrices: Tensor) -> Tensor:
    """All singular values, descending; the small ones to half the digits, which is enough to tell them apart."""
    matrices = _double(matrices)
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mH
    if wide.device.type != "cpu":
        return torch.linalg.eigvalsh(wide @ wide.mH).flip(-1).clamp_min(0).sqrt()
    # NumPy sees the symmetry of one product and does half the work; and torch's threads would wait for each other
    each = wide.resolve_conj().reshape(-1, *wide.shape[-2:]).numpy()
    rows = [np.linalg.eigvalsh(one @ one.conj().T) for one in each]
    return torch.from_numpy(np.sqrt(np.maximum(np.stack(rows)[:, ::-1], 0.0))).reshape(wide.shape[:-1])


@one_thread
def spectral_norm(matrix: Tensor) -> float:
    """``||matrix||_2``, for a large matrix by Lanczos and up to 3e-4 too large; NaN where that or inf is in it.

    Of matrices (g, m, n) the largest.

    Examples
    --------
    >>> import torch
    >>> round(spectral_norm(1e-200 * torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))) * 1e200, 12)
    4.0
    """
    if matrix.numel() == 0:
        return 0.0
    try:
        if matrix.ndim > 2 and len(matrix) > 1:
            norms, (first,) = _norms(matrix, rank=1)
            return float(norms[first])
        matrix = matrix if matrix.ndim == 2 else matrix[0]
        # on a GPU by a Gram matrix, which single precision (there perhaps TF32) would spoil
        return float(
            specpert.spectral_norm(_array(matrix) if matrix.device.type == "cpu" else _double(matrix), rtol=3e-4)
        )
    except specpert.NonFiniteError:
        return math.nan


@one_thread
def top_triplet(A: Any) -> SingularTriplet:
    """The top singular triplet of a matrix or of a SciPy LinearOperator."""
    return specpert.singular_triplet(A)


@one_thread
def series_along(triplet: SingularTriplet, H: Any, order: int) -> SigmaSeries:
    """Series of the triplet's value along H, a matrix or operator like its own (theory 1.4)."""
    return specpert.sigma_series(triplet, H, order)


def degenerate(message: str, count: int) -> specpert.DegenerateSingularValueError:
    """The error of a largest value that is attained so many times."""
    return specpert.DegenerateSingularValueError(message, 0, tuple(range(count)), 0.0)
