"""Mini-batch gradient noise of one layer, held as ghost projections (theory 2.3, 2.4).

Index letters: ``i`` sample (M of them), ``m`` outputs, ``n`` inputs. ``G_i`` is the gradient of sample i,
scaled so that the mean over the batch is the gradient the optimiser sees; ``Sigma`` is the covariance of that
mean, ``Sigma = 1/(M(M-1)) sum_i vec(G_i - Gbar) vec(G_i - Gbar)^T``. Neither is ever formed: only
``p_i = G_i v``, ``q_i = G_i^T u`` and, for the variance part, ``sum_i G_i o G_i`` are kept.

With an elementwise preconditioner W, ``W o G_i`` takes the place of ``G_i`` throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from lipdyn_torch._bridge import Pair, Spectrum, hessian_pairing, variance_forms
from lipdyn_torch.errors import FactorSizeError

__all__ = [
    *("FACTOR_LIMIT", "Averaged", "GradientNoise", "NoiseTerms", "OnRows", "check_factor_size", "common_factor"),
    *("mismatch", "nearest_factor"),
]

_NAN = float("nan")

#: So many numbers of per-sample gradients are kept at most: 1 GiB in float64.
FACTOR_LIMIT = 1 << 27


def check_factor_size(shape: Sequence[int], limit: int = FACTOR_LIMIT) -> None:
    """Raise FactorSizeError where the samples' gradients (M, m, n) are too many numbers to keep."""
    if (size := math.prod(shape)) > limit:
        raise FactorSizeError(
            f"expected at most {limit} numbers in the gradients of {shape[0]} samples, got {size} of shape "
            f"{tuple(shape)}; raise limit, or do without the factor: GradientNoise.terms never needs it"
        )


@dataclass(frozen=True)
class OnRows:
    """Vectors (M, m) that vanish outside of some of the m rows of a matrix, as those of a table of which few are read.

    Attributes
    ----------
    values : Tensor (M, J)
        The entries in these rows.
    rows : Tensor (J,)
        Integers, ascending.
    size : int
        m.

    Examples
    --------
    >>> import torch
    >>> x = OnRows(torch.ones(1, 2), torch.tensor([1, 3]), 5)
    >>> y = OnRows(torch.ones(1, 1), torch.tensor([3]), 5)
    >>> x.plus(y).values.tolist(), x.plus(y).dense().tolist()
    ([[1.0, 2.0]], [[0.0, 1.0, 0.0, 2.0, 0.0]])
    """

    values: Tensor
    rows: Tensor
    size: int

    def dense(self) -> Tensor:
        """All entries (M, m)."""
        return self.values.new_zeros(len(self.values), self.size).index_copy_(1, self.rows, self.values)

    def on(self, rows: Tensor) -> Tensor:
        """The entries in rows that hold all of its own."""
        zeros = self.values.new_zeros(len(self.values), len(rows))
        return zeros.index_copy_(1, torch.searchsorted(rows, self.rows), self.values)

    def plus(self, other: OnRows | Tensor) -> OnRows | Tensor:
        """The sums, sample by sample."""
        if not isinstance(other, OnRows):
            return self.dense() + other
        rows = torch.cat([self.rows, other.rows]).unique()
        return OnRows(self.on(rows) + other.on(rows), rows, self.size)

    @staticmethod
    def joined(parts: Sequence[OnRows | Tensor]) -> OnRows | Tensor:
        """The samples of all."""
        if len(parts) == 1:
            return parts[0]
        if all(isinstance(part, OnRows) for part in parts):
            few = [part for part in parts if isinstance(part, OnRows)]
            rows = torch.cat([part.rows for part in few]).unique()
            return OnRows(torch.cat([part.on(rows) for part in few]), rows, few[0].size)
        return torch.cat([part.dense() if isinstance(part, OnRows) else part for part in parts])


@dataclass(frozen=True)
class NoiseTerms:
    """Contractions of gradient and noise with the derivatives J = u v^T and H of sigma (theory 2.4).

    Attributes
    ----------
    gradient_curvature : float
        ``D^2 sigma[G, G]`` along the gradient asked for ("gHg").
    noise : float
        ``J^T Sigma J``; NaN for a batch of one.
    noise_curvature : float
        ``<H, Sigma>``; NaN for a batch of one.
    noise_var, noise_curvature_var : float
        The parts of the two that come from the diagonal of Sigma; the covariance part is the signed rest.
        NaN unless the sums of squares were kept.
    scores : Tensor, (M,)
        ``u^T G_i v``.
    """

    gradient_curvature: float
    noise: float
    noise_curvature: float
    noise_var: float
    noise_curvature_var: float
    scores: Tensor


class Averaged(Protocol):
    """Samples known by their means ``(G v, G^T u)`` and mean sizes."""

    @property
    def means(self) -> Pair:
        """Means of ``p`` and ``q``."""

    @property
    def sizes(self) -> tuple[float, float]:
        """Mean norms of ``p_i`` and of ``q_i``."""


def mismatch(noise: Averaged, whole: Pair) -> float:
    """How far the samples are from summing to the gradient G, relative to the sum of their sizes.

    Compared where it matters: on ``whole``, which is ``(G v, G^T u)``. NaN if anything is not finite.
    """
    worst = 0.0
    for mean, size, seen in zip(noise.means, noise.sizes, whole, strict=True):
        scale = size + float(torch.linalg.vector_norm(seen))
        error = float(torch.linalg.vector_norm(mean - seen))
        if not error <= math.inf:
            return _NAN
        worst = max(worst, error / scale) if scale > 0.0 else worst
    return worst


def nearest_factor(noise: Averaged, whole: Pair) -> tuple[float, float]:
    """The number c for which the samples' mean times c is nearest to the gradient, and its standard error."""
    pairs = [
        (mean / (size or 1.0), seen / (size or 1.0))
        for mean, size, seen in zip(noise.means, noise.sizes, whole, strict=True)
    ]
    square = sum(float(mean.square().sum()) for mean, _ in pairs)
    if not square > 0.0:
        return _NAN, math.inf
    c = sum(float(mean @ seen) for mean, seen in pairs) / square
    rest = sum(float((seen - c * mean).square().sum()) for mean, seen in pairs)
    return c, math.sqrt(rest / sum(seen.numel() for _, seen in pairs) / square)


@dataclass(frozen=True)
class GradientNoise:
    """The samples' gradients of one layer seen through the singular vectors (u, v) of its weight.

    Parameters
    ----------
    p, q : Tensor, (M, m) and (M, n), float64
        ``G_i v`` and ``G_i^T u``; with ``rows`` p is (M, J).
    squares : Tensor (m, n), optional
        ``sum_i G_i o G_i``, needed for the variance part only.
    mean : Tensor (m, n), optional
        ``Gbar``, needed for the variance part only.
    bend : pair of Tensor (M, r), optional
        Where the matrix is not linear in its parameters: factors ``a_i``, ``b_i`` of what a step adds in the second
        order, ``u^T B_i v = a_i . b_i``.
    gradients : Tensor (M, m, n), optional
        The ``G_i`` themselves, needed for `factor` and `square_root` only.
    population : int, optional
        Number N of samples that the M were drawn from without replacement: Sigma then has the factor 1 - M/N.
    rows : Tensor (J,), optional
        Integers, ascending: all ``G_i`` vanish in the other rows. Needs ``height``.
    height : int, optional
        m.

    Examples
    --------
    Two samples whose gradients differ by the first unit matrix, seen from A = diag(2, 1):

    >>> import torch
    >>> from lipdyn_torch._bridge import read_spectrum
    >>> spectrum = read_spectrum(torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)))
    >>> G = torch.zeros(2, 2, 2, dtype=torch.float64)
    >>> G[1, 0, 0] = 1.0
    >>> noise = GradientNoise(G @ spectrum.v, G.mT @ spectrum.u)
    >>> terms = noise.terms(spectrum)
    >>> round(terms.gradient_curvature, 12), round(terms.noise, 12), round(terms.noise_curvature, 12)
    (0.0, 0.25, 0.0)
    """

    p: Tensor
    q: Tensor
    squares: Tensor | None = None
    mean: Tensor | None = None
    bend: tuple[Tensor, Tensor] | None = None
    gradients: Tensor | None = None
    population: int | None = None
    rows: Tensor | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        if self.population is not None and not self.batch <= self.population:
            raise ValueError(f"expected a population of at least the {self.batch} samples, got {self.population}")

    @classmethod
    def from_gradients(
        cls, gradients: Tensor, spectrum: Spectrum, *, population: int | None = None, limit: int = FACTOR_LIMIT
    ) -> GradientNoise:
        """Everything from the samples' gradients ``G_i`` (M, m, n), mean and variance part included.

        Raises FactorSizeError where they are more than ``limit`` numbers.

        Examples
        --------
        >>> import torch
        >>> from lipdyn_torch._bridge import read_spectrum
        >>> spectrum = read_spectrum(torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)))
        >>> G = torch.arange(12, dtype=torch.float64).reshape(3, 2, 2).sin()
        >>> noise = GradientNoise.from_gradients(G, spectrum)
        >>> F, J = noise.factor(), torch.outer(spectrum.u, spectrum.v)
        >>> terms = noise.terms(spectrum)
        >>> bool(torch.isclose((F @ J.flatten()).square().sum(), torch.tensor(terms.noise).double()))
        True
        >>> root = noise.square_root(J)  # Sigma^(1/2) J, whose square is the same
        >>> bool(torch.isclose(root.square().sum(), torch.tensor(terms.noise).double()))
        True
        """
        check_factor_size(gradients.shape, limit)
        G = gradients.double()
        return cls(G @ spectrum.v, G.mT @ spectrum.u, G.square().sum(0), G.mean(0), None, G, population)

    @classmethod
    def from_contributions(
        cls,
        p: Tensor | OnRows,
        q: Tensor,
        squares: Tensor | None = None,
        mean: Tensor | None = None,
        bend: tuple[Tensor, Tensor] | None = None,
        gradients: Tensor | None = None,
    ) -> GradientNoise:
        """From what each sample *contributed* to the gradient: contributions sum to it, so ``G_i`` is M times one.

        This holds for losses averaged and summed over the batch, and for accumulated micro-batches, alike.
        """
        if isinstance(p, OnRows):
            few = cls(p.values, q, squares, mean, bend, gradients, rows=p.rows, height=p.size)
            return few.scaled(len(q))
        return cls(p, q, squares, mean, bend, gradients).scaled(len(p))

    def scaled(self, factor: float) -> GradientNoise:
        """The samples' gradients times a factor; ``mean``, which was seen by itself, stays."""
        if factor == 1.0:
            return self
        squares = None if self.squares is None else factor**2 * self.squares
        bend = None if self.bend is None else (factor * self.bend[0], factor * self.bend[1])
        gradients = None if self.gradients is None else factor * self.gradients
        p, q = factor * self.p, factor * self.q
        return replace(self, p=p, q=q, squares=squares, bend=bend, gradients=gradients)

    @property
    def batch(self) -> int:
        """M, the number of samples."""
        return len(self.p)

    @property
    def _norm(self) -> float:
        """What the sum over the samples of the centred outer products is multiplied by; NaN for a batch of one."""
        if self.batch < 2:
            return _NAN
        finite = 1.0 if self.population is None else 1.0 - self.batch / self.population
        return finite / (self.batch * (self.batch - 1))

    def factor(self) -> Tensor:
        """F (M, m n) with ``Sigma = F^T F``, matrices flattened by rows; NaN for a batch of one (theory 2.3).

        Raises ValueError unless ``gradients`` were kept.
        """
        if self.gradients is None:
            raise ValueError("expected gradients for the factor, got none; use from_gradients or noise='factor'")
        centred = self.gradients - self.gradients.mean(0)
        return math.sqrt(self._norm) * centred.flatten(1) if self.batch > 1 else centred.flatten(1) * _NAN

    def square_root(self, X: Tensor) -> Tensor:
        """``Sigma^(1/2)`` applied to a matrix X (m, n), in float64 (theory 2.3).

        By the Gram matrix (M, M) of the factor and its pseudo-inverse: it always has a null vector, so that the inverse
        root of the literature does not exist.
        """
        F = self.factor()
        w, Q = torch.linalg.eigh(F @ F.mT)
        kept = w > 1e-12 * w[-1]
        inverse_root = torch.where(kept, w.where(kept, torch.ones_like(w)).rsqrt(), torch.zeros_like(w))
        seen = Q.mT @ (F @ X.double().flatten())
        return (F.mT @ (Q @ (inverse_root * seen))).reshape(X.shape)

    @cached_property
    def means(self) -> Pair:
        """Means (m,) and (n,) of ``G_i v`` and ``G_i^T u``."""
        p, q = self._means
        if self.rows is None or self.height is None:
            return p, q
        return p.new_zeros(self.height).index_copy_(0, self.rows, p), q

    @cached_property
    def _means(self) -> Pair:
        """Means of ``p`` and ``q``."""
        return self.p.mean(0), self.q.mean(0)

    @property
    def centred(self) -> Pair:
        """``p`` and ``q`` less their means."""
        p, q = self._means
        return self.p - p, self.q - q

    def scores(self, spectrum: Spectrum) -> Tensor:
        """``u^T G_i v`` (M,)."""
        return self.p @ self.seen(spectrum.u)

    def seen(self, u: Tensor) -> Tensor:
        """A vector (m,) in the rows of ``p``."""
        return u if self.rows is None else u[self.rows]

    @cached_property
    def norms(self) -> Pair:
        """Norms (M,) of the ``p_i`` and of the ``q_i``."""
        return torch.linalg.vector_norm(self.p, dim=-1), torch.linalg.vector_norm(self.q, dim=-1)

    @cached_property
    def sizes(self) -> tuple[float, float]:
        """Mean norms of ``p_i`` and of ``q_i``."""
        p, q = self.norms
        return float(p.mean()), float(q.mean())

    @property
    def silent(self) -> Tensor:
        """Which samples (M,) have nothing to say."""
        p, q = self.norms
        silent = p + q == 0
        where = silent.nonzero()[:, 0]  # or squares too small for a float
        silent[where] = ~(self.p[where].any(1) | self.q[where].any(1))
        return silent

    def terms(self, spectrum: Spectrum, along: Pair | None = None) -> NoiseTerms:
        """All contractions with the derivatives of the largest singular value.

        ``along`` is ``(G v, G^T u)`` of the gradient G for ``gradient_curvature``; by default the samples' mean.
        """
        if self.rows is None:
            # one call: most of its cost is in the overhead and in reading the matrix
            p, q = map(_centred_and, (self.p, self.q), self.means, along or self.means)
            *forms, form = hessian_pairing(spectrum, p, q).tolist()
            p = p[:-1]
        else:
            p, q = self.centred
            forms = hessian_pairing(spectrum, p, q, self.rows).tolist()
            form = float(hessian_pairing(spectrum, *(along or self.means)))
        noise = noise_curvature = _NAN
        if self.batch > 1:
            norm = self._norm
            noise = norm * float((p @ self.seen(spectrum.u)).square().sum())
            noise_curvature = norm * (math.fsum(forms) + 2.0 * self._bending())
        noise_var, noise_curvature_var = self._variance_part(spectrum)
        return NoiseTerms(
            gradient_curvature=form,
            noise=noise,
            noise_curvature=noise_curvature,
            noise_var=noise_var,
            noise_curvature_var=noise_curvature_var,
            scores=self.scores(spectrum),
        )

    def _bending(self) -> float:
        """``sum_i a_i . b_i`` of the centred samples."""
        if self.bend is None:
            return 0.0
        a, b = self.bend
        return float(((a - a.mean(0)) * (b - b.mean(0))).sum())

    def _variance_part(self, spectrum: Spectrum) -> tuple[float, float]:
        """The pairings of J J^T and H with diag(Sigma) (theory 2.4, "variance/covariance split")."""
        if self.squares is None or self.mean is None or self.batch < 2:
            return _NAN, _NAN
        variance = self.squares - self.batch * self.mean.square()
        variance = self._norm * variance.clamp_min(0)  # rounding must not make it negative
        jacobian_squared, diagonal = variance_forms(spectrum)
        return float((jacobian_squared * variance).sum()), float((diagonal * variance).sum())


def _centred_and(samples: Tensor, mean: Tensor, last: Tensor) -> Tensor:
    """The samples (M, n) less their mean, and one row more."""
    rows = samples.new_empty(len(samples) + 1, samples.shape[1])
    torch.sub(samples, mean, out=rows[:-1])
    rows[-1] = last
    return rows


#: A factor known worse than this is not known.
FACTOR_ERROR = 0.05


def factor_slack(error: float, eps: float) -> float:
    """How far a factor of that standard error may be from another, relative to it, and mean the same."""
    return 5.0 * error + (1e2 if eps < 1e-4 else 2.0) * eps  # in half precision errors of rounding show in the error


def common_factor(factors: Sequence[tuple[float, float]], eps: float) -> float:
    """What all layers' gradients were multiplied by between backward pass and step.

    Parameters
    ----------
    factors : sequence of (float, float)
        `nearest_factor` of each layer: value and standard error.
    eps : float
        Relative precision of the gradients. In single precision and better, a mean gradient too small to tell a
        factor from means that there is nothing to tell.

    Returns
    -------
    float
        1 where at least half of the layers say so, or the best known does; else that, a negative one only if all are;
        NaN where none is known.

    Examples
    --------
    >>> common_factor([(1.0 + 1e-9, 1e-9), (1.0, 1e-12), (3.0, 0.5)], eps=1e-16)
    1.0
    >>> common_factor([(0.25, 1e-9), (0.2501, 1e-4)], eps=1e-16)
    0.25
    """
    known = [(c, error) for c, error in factors if c != 0.0 and error <= FACTOR_ERROR * abs(c)]
    if not known:
        return 1.0 if eps < 1e-4 or all(error == math.inf for _, error in factors) else _NAN
    untouched = sum(abs(c - 1.0) <= factor_slack(error, eps) for c, error in known)
    best, error = min(known, key=lambda pair: (pair[0] < 0.0, pair[1] / abs(pair[0])))
    return 1.0 if 2 * untouched >= len(known) or abs(best - 1.0) <= factor_slack(error, eps) else best
