"""Mini-batch gradient noise of one layer, held as ghost projections (theory 2.3, 2.4).

Index letters: ``i`` sample (M of them), ``m`` outputs, ``n`` inputs. ``G_i`` is the gradient of sample i,
scaled so that the mean over the batch is the gradient the optimiser sees; ``Sigma`` is the covariance of that
mean, ``Sigma = 1/(M(M-1)) sum_i vec(G_i - Gbar) vec(G_i - Gbar)^T``. Neither is ever formed: only
``p_i = G_i v``, ``q_i = G_i^T u`` and, for the variance part, ``sum_i G_i o G_i`` are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lipdyn_torch._bridge import Spectrum, hessian_diagonal, hessian_pairing

__all__ = ["GradientNoise", "NoiseTerms"]

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

    @classmethod
    def from_contributions(
        cls, p: Tensor, q: Tensor, squares: Tensor | None = None, mean: Tensor | None = None
    ) -> GradientNoise:
        """From what each sample *contributed* to the gradient: contributions sum to it, so ``G_i`` is M times one.

        This holds for losses averaged and summed over the batch, and for accumulated micro-batches, alike.
        """
        samples = len(p)
        return cls(samples * p, samples * q, None if squares is None else samples**2 * squares, mean)

    @property
    def batch(self) -> int:
        """M, the number of samples."""
        return len(self.p)

    def mismatch(self, gradient: Tensor, spectrum: Spectrum) -> float:
        """How far the samples are from summing to ``gradient`` (m, n), relative to the sum of their sizes.

        Compared where it matters: on ``gradient v`` and ``gradient^T u``. NaN if anything is not finite.
        """
        worst = 0.0
        for samples, whole in ((self.p, gradient @ spectrum.v), (self.q, gradient.T @ spectrum.u)):
            size = float(torch.linalg.vector_norm(samples, dim=-1).mean() + torch.linalg.vector_norm(whole))
            error = float(torch.linalg.vector_norm(samples.mean(0) - whole))
            if size > 0.0:
                worst = max(worst, error / size) if error == error else _NAN
            if worst != worst:
                return _NAN
        return worst

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
            noise_curvature = norm * float(hessian_pairing(spectrum, p, q).sum())
        noise_var, noise_curvature_var = self._variance_part(spectrum)
        return NoiseTerms(
            gradient=float(u @ p_mean),
            gradient_curvature=float(hessian_pairing(spectrum, p_mean, q_mean)),
            noise=noise,
            noise_curvature=noise_curvature,
            noise_var=noise_var,
            noise_curvature_var=noise_curvature_var,
            scores=scores,
        )

    def _variance_part(self, spectrum: Spectrum) -> tuple[float, float]:
        """The pairings of J J^T and H with diag(Sigma) (theory 2.4, "variance/covariance split")."""
        if self.squares is None or self.mean is None or self.batch < 2:
            return _NAN, _NAN
        variance = self.squares - self.batch * self.mean.square()
        variance = variance.clamp_min(0) / (self.batch * (self.batch - 1))  # rounding must not make it negative
        jacobian_squared = torch.outer(spectrum.u.square(), spectrum.v.square())
        diagonal = hessian_diagonal(spectrum)
        return float((jacobian_squared * variance).sum()), float((diagonal * variance).sum())
