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
from dataclasses import dataclass

import torch
from torch import Tensor

from lipdyn_torch._bridge import Spectrum, hessian_diagonal, hessian_pairing

__all__ = ["GradientNoise", "NoiseTerms", "common_factor"]

_NAN = float("nan")


@dataclass(frozen=True)
class NoiseTerms:
    """Contractions of gradient and noise with the derivatives J = u v^T and H of sigma (theory 2.4).

    Attributes
    ----------
    gradient : float
        ``<J, Gbar>``.
    gradient_curvature : float
        ``<H, Gbar Gbar^T> = D^2 sigma[Gbar, Gbar]`` ("gHg").
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

    gradient: float
    gradient_curvature: float
    noise: float
    noise_curvature: float
    noise_var: float
    noise_curvature_var: float
    scores: Tensor


@dataclass(frozen=True)
class GradientNoise:
    """The samples' gradients of one layer seen through the singular vectors (u, v) of its weight.

    Parameters
    ----------
    p, q : Tensor, (M, m) and (M, n), float64
        ``G_i v`` and ``G_i^T u``.
    squares : Tensor (m, n), optional
        ``sum_i G_i o G_i``, needed for the variance part only.
    mean : Tensor (m, n), optional
        ``Gbar``, needed for the variance part only.
    bend : pair of Tensor (M, r), optional
        Where the matrix is not linear in its parameters: factors ``a_i``, ``b_i`` of what a step adds in the second
        order, ``u^T B_i v = a_i . b_i``.

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
    >>> round(terms.gradient, 12), round(terms.noise, 12), round(terms.noise_curvature, 12)
    (0.5, 0.25, 0.0)
    """

    p: Tensor
    q: Tensor
    squares: Tensor | None = None
    mean: Tensor | None = None
    bend: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_contributions(
        cls,
        p: Tensor,
        q: Tensor,
        squares: Tensor | None = None,
        mean: Tensor | None = None,
        bend: tuple[Tensor, Tensor] | None = None,
    ) -> GradientNoise:
        """From what each sample *contributed* to the gradient: contributions sum to it, so ``G_i`` is M times one.

        This holds for losses averaged and summed over the batch, and for accumulated micro-batches, alike.
        """
        return cls(p, q, squares, mean, bend).scaled(len(p))

    def scaled(self, factor: float) -> GradientNoise:
        """The samples' gradients times a factor; ``mean``, which was seen by itself, stays."""
        squares = None if self.squares is None else factor**2 * self.squares
        bend = None if self.bend is None else (factor * self.bend[0], factor * self.bend[1])
        return GradientNoise(factor * self.p, factor * self.q, squares, self.mean, bend)

    @property
    def batch(self) -> int:
        """M, the number of samples."""
        return len(self.p)

    def mismatch(self, gradient: Tensor, spectrum: Spectrum) -> float:
        """How far the samples are from summing to ``gradient`` (m, n), relative to the sum of their sizes.

        Compared where it matters: on ``gradient v`` and ``gradient^T u``. NaN if anything is not finite.
        """
        worst = 0.0
        for samples, whole in self._pairs(gradient, spectrum):
            size = float(torch.linalg.vector_norm(samples, dim=-1).mean() + torch.linalg.vector_norm(whole))
            error = float(torch.linalg.vector_norm(samples.mean(0) - whole))
            if size > 0.0:
                worst = max(worst, error / size) if error == error else _NAN
            if worst != worst:
                return _NAN
        return worst

    def factor(self, gradient: Tensor, spectrum: Spectrum) -> tuple[float, float]:
        """The number c for which the samples' mean times c is nearest to ``gradient``, and its standard error."""
        product = square = rest = 0.0
        entries = 0
        for samples, whole in self._pairs(gradient, spectrum):
            size = float(torch.linalg.vector_norm(samples, dim=-1).mean()) or 1.0
            product += float((samples.mean(0) / size) @ (whole / size))
            square += float((samples.mean(0) / size).square().sum())
            entries += whole.numel()
        if not square > 0.0:
            return _NAN, math.inf
        c = product / square
        for samples, whole in self._pairs(gradient, spectrum):
            size = float(torch.linalg.vector_norm(samples, dim=-1).mean()) or 1.0
            rest += float(((whole - c * samples.mean(0)) / size).square().sum())
        return c, math.sqrt(rest / entries / square)

    def _pairs(self, gradient: Tensor, spectrum: Spectrum) -> tuple[tuple[Tensor, Tensor], ...]:
        return (self.p, gradient @ spectrum.v), (self.q, gradient.T @ spectrum.u)

    def terms(self, spectrum: Spectrum) -> NoiseTerms:
        """All contractions with the derivatives of the largest singular value."""
        u = spectrum.u
        p_mean, q_mean = self.p.mean(0), self.q.mean(0)
        p, q = self.p - p_mean, self.q - q_mean
        scores = self.p @ u
        noise = noise_curvature = _NAN
        if self.batch > 1:
            norm = 1.0 / (self.batch * (self.batch - 1))
            noise = norm * float((p @ u).square().sum())
            noise_curvature = norm * (float(hessian_pairing(spectrum, p, q).sum()) + 2.0 * self._bending(centred=True))
        noise_var, noise_curvature_var = self._variance_part(spectrum)
        return NoiseTerms(
            gradient=float(u @ p_mean),
            gradient_curvature=float(hessian_pairing(spectrum, p_mean, q_mean)) + 2.0 * self._bending(centred=False),
            noise=noise,
            noise_curvature=noise_curvature,
            noise_var=noise_var,
            noise_curvature_var=noise_curvature_var,
            scores=scores,
        )

    def _bending(self, centred: bool) -> float:
        """``sum_i a_i . b_i`` of the centred samples, or ``a . b`` of their means."""
        if self.bend is None:
            return 0.0
        a, b = self.bend
        return float(((a - a.mean(0)) * (b - b.mean(0))).sum() if centred else a.mean(0) @ b.mean(0))

    def _variance_part(self, spectrum: Spectrum) -> tuple[float, float]:
        """The pairings of J J^T and H with diag(Sigma) (theory 2.4, "variance/covariance split")."""
        if self.squares is None or self.mean is None or self.batch < 2:
            return _NAN, _NAN
        variance = self.squares - self.batch * self.mean.square()
        variance = variance.clamp_min(0) / (self.batch * (self.batch - 1))  # rounding must not make it negative
        jacobian_squared = torch.outer(spectrum.u.square(), spectrum.v.square())
        diagonal = hessian_diagonal(spectrum)
        return float((jacobian_squared * variance).sum()), float((diagonal * variance).sum())


#: A factor known worse than this is not known.
_FACTOR_ERROR = 0.05


def common_factor(factors: Sequence[tuple[float, float]], eps: float) -> float:
    """What all layers' gradients were multiplied by between backward pass and step.

    Parameters
    ----------
    factors : sequence of (float, float)
        `GradientNoise.factor` of each layer: value and standard error.
    eps : float
        Relative precision of the gradients. In single precision and better, a mean gradient too small to tell a
        factor from means that there is nothing to tell.

    Returns
    -------
    float
        1 where at least half of the layers say so; else the best known; NaN where none is known.

    Examples
    --------
    >>> common_factor([(1.0 + 1e-9, 1e-9), (1.0, 1e-12), (3.0, 0.5)], eps=1e-16)
    1.0
    >>> common_factor([(0.25, 1e-9), (0.2501, 1e-4)], eps=1e-16)
    0.25
    """
    known = [(c, error) for c, error in factors if error <= _FACTOR_ERROR * abs(c)]
    if not known:
        return 1.0 if eps < 1e-4 or all(error == math.inf for _, error in factors) else _NAN
    untouched = sum(abs(c - 1.0) <= 5.0 * error + 1e2 * eps for c, error in known)
    return 1.0 if 2 * untouched >= len(known) else min(known, key=lambda pair: pair[1] / abs(pair[0]))[0]
