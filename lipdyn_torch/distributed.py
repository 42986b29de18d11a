r"""Several processes training one model: the noise of the joint batch, and whole weights from shards.

Every process catches the samples it was given. What the terms need of them are a few sums: per layer the number
of samples, the means of ``p_i`` and ``q_i``, and centred second moments. They travel in one small collective per
monitored step and are joined by the parallel variance formula: for any quadratic form B, with ``M_r`` samples of
mean ``m_r`` in process r and the joint mean ``m``,

.. math:: \sum_i B(x_i - m) = \sum_r \Big[ M_r B(m_r - m) + \sum_{i \in r} B(x_i - m_r) \Big]

DistributedDataParallel and ``fully_shard`` average the processes' gradients, so sample i of process r counts
``M / (R M_r)`` times its gradient in its own process, with R processes: once, where all have as many samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lipdyn_torch._bridge import Pair, Spectrum, hessian_pairing, variance_forms
from lipdyn_torch.noise import GradientNoise, NoiseTerms

__all__ = ["JointNoise", "active", "agree", "combine", "full", "local", "pool", "share", "summarise"]

ELSEWHERE = "noise terms not known in every process"

_NAN = float("nan")


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor (DTensor) as a whole one, on every process; any other tensor as it is.

    All processes must call it: it is a collective for shards.

    Examples
    --------
    >>> full(torch.ones(2))
    tensor([1., 1.])
    """
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def local(tensor: Tensor) -> Tensor:
    """The shard that this process has of a sharded tensor (DTensor); any other tensor as it is.

    Examples
    --------
    >>> local(torch.ones(2))
    tensor([1., 1.])
    """
    own = getattr(tensor, "to_local", None)
    return tensor if own is None else own()


def active(group: dist.ProcessGroup | None = None) -> bool:
    """Whether there is more than one process to combine.

    Examples
    --------
    >>> active()
    False
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def agree(numbers: Sequence[float], device: torch.device, group: dist.ProcessGroup | None = None) -> list[float]:
    """The largest of each of the processes' numbers, so that all do the same; all processes must call it.

    Examples
    --------
    >>> agree([3, 4], torch.device("cpu"))
    [3, 4]
    """
    if not active(group):
        return list(numbers)
    largest = torch.tensor(numbers, device=device, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return [float(number) for number in largest]


class Layer(Protocol):
    """What `share` reads and changes of a layer, just before the step."""

    spectrum: Spectrum
    noise: Any  # GradientNoise, JointNoise or None
    batch: int
    problems: list[str]
    frozen: bool


@dataclass(frozen=True)
class JointNoise:
    """What the terms need of a set of samples' gradients; stands in for `GradientNoise` where samples are far away.

    Attributes
    ----------
    batch : int
        Number of samples M.
    p, q : Tensor, (m,) and (n,), float64
        Means of ``G_i v`` and ``G_i^T u``.
    sizes : tuple of float
        Mean norms of ``G_i v`` and of ``G_i^T u``.
    noise, curvature : float
        Sums over the samples of ``(u^T G_i v)^2`` and ``D^2 sigma[G_i, G_i]``, centred.
    squares : tuple of float
        Sums over the samples of ``<(u v^T)^2, G_i^2>`` and ``<diag(H), G_i^2>``, elementwise squares; NaN if unknown.
    mean : Tensor (m, n), optional
        The gradient, for the variance part.
    scores : Tensor (k,), optional
        Stand-ins for the samples' ``u^T G_i v``: over all layers together they give every
        ``sum (x - xbar)^2 / (k (k - 1))`` the value it has for the samples.
    """

    batch: int
    p: Tensor
    q: Tensor
    sizes: tuple[float, float]
    noise: float
    curvature: float
    squares: tuple[float, float] = (_NAN, _NAN)
    mean: Tensor | None = None
    scores: Tensor | None = None

    def scaled(self, factor: float) -> JointNoise:
        """The samples' gradients times a factor; ``mean``, which was seen by itself, stays."""
        first, second = abs(factor), factor**2
        return replace(
            self,
            p=factor * self.p,
            q=factor * self.q,
            sizes=(first * self.sizes[0], first * self.sizes[1]),
            noise=second * self.noise,
            curvature=second * self.curvature,
            squares=(second * self.squares[0], second * self.squares[1]),
            scores=None if self.scores is None else factor * self.scores,
        )

    @property
    def means(self) -> Pair:
        """Means of ``G_i v`` and ``G_i^T u``."""
        return self.p, self.q

    def terms(self, spectrum: Spectrum, along: Pair | None = None) -> NoiseTerms:
        """As `GradientNoise.terms`."""
        noise = curvature = noise_var = curvature_var = _NAN
        if self.batch > 1:
            norm = 1.0 / (self.batch * (self.batch - 1))
            noise, curvature = norm * self.noise, norm * self.curvature
            if self.mean is not None:
                square = self.batch * self.mean.square()
                means = [float((form * square).sum()) for form in variance_forms(spectrum)]
                noise_var, curvature_var = (norm * (x - y) for x, y in zip(self.squares, means, strict=True))
        return NoiseTerms(
            gradient_curvature=float(hessian_pairing(spectrum, *(along or self.means))),
            noise=noise,
            noise_curvature=curvature,
            noise_var=noise_var,
            noise_curvature_var=curvature_var,
            scores=self.p.new_full((1,), _NAN) if self.scores is None else self.scores,
        )


def summarise(noise: GradientNoise, spectrum: Spectrum) -> JointNoise:
    """The sums of one process's samples."""
    p, q = noise.means
    centred_p, centred_q = noise.centred
    squares = (_NAN, _NAN)
    if noise.squares is not None:
        first, second = (float((form * noise.squares).sum()) for form in variance_forms(spectrum))
        squares = (first, second)
    return JointNoise(
        batch=noise.batch,
        p=p,
        q=q,
        sizes=noise.sizes,
        noise=float((centred_p @ noise.seen(spectrum.u)).square().sum()),
        curvature=float(hessian_pairing(spectrum, centred_p, centred_q, noise.rows).sum()),
        squares=squares,
        mean=noise.mean,
    )


def pool(parts: Sequence[JointNoise], spectrum: Spectrum) -> JointNoise:
    """The sums of all samples from those of disjoint sets of them, by the parallel variance formula.

    Examples
    --------
    >>> from lipdyn_torch._bridge import read_spectrum
    >>> spectrum = read_spectrum(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)))
    >>> G = torch.arange(20, dtype=torch.float64).reshape(5, 2, 2).sin()
    >>> whole = GradientNoise(G @ spectrum.v, G.mT @ spectrum.u)
    >>> parts = [GradientNoise(G[part] @ spectrum.v, G[part].mT @ spectrum.u) for part in (slice(2), slice(2, 5))]
    >>> joint = pool([summarise(part, spectrum) for part in parts], spectrum).terms(spectrum)
    >>> abs(joint.noise_curvature - whole.terms(spectrum).noise_curvature) < 1e-12
    True
    """
    batch = sum(part.batch for part in parts)
    p = torch.stack([part.batch * part.p for part in parts]).sum(0) / batch
    q = torch.stack([part.batch * part.q for part in parts]).sum(0) / batch
    offset_p, offset_q = torch.stack([part.p - p for part in parts]), torch.stack([part.q - q for part in parts])
    counts = p.new_tensor([part.batch for part in parts])
    return JointNoise(
        batch=batch,
        p=p,
        q=q,
        sizes=(
            sum(part.batch / batch * part.sizes[0] for part in parts),
            sum(part.batch / batch * part.sizes[1] for part in parts),
        ),
        noise=sum(part.noise for part in parts) + float(counts @ (offset_p @ spectrum.u).square()),
        curvature=sum(part.curvature for part in parts) + float(counts @ hessian_pairing(spectrum, offset_p, offset_q)),
        squares=(sum(part.squares[0] for part in parts), sum(part.squares[1] for part in parts)),
        mean=parts[0].mean,
    )


def combine(
    layers: Sequence[tuple[Spectrum, GradientNoise | None]], group: dist.ProcessGroup | None = None
) -> list[JointNoise | None]:
    """The noise of the joint batch of all processes, layer by layer; one collective.

    Parameters
    ----------
    layers : sequence of (Spectrum, GradientNoise or None)
        This process's samples, as if it were alone; None where it could not tell. The same layers, with the same
        weights, in every process.
    group : ProcessGroup, optional
        The processes that split the batch; by default all.

    Returns
    -------
    list of JointNoise or None
        The same in every process; None where any process had none, or where the matrix is not linear in its
        parameters (a sum of a frozen matrix and trained factors).
    """
    return _exchange(layers, [0] * len(layers), group)[0]


def _exchange(
    layers: Sequence[tuple[Spectrum, GradientNoise | None]], numbers: Sequence[int], group: dist.ProcessGroup | None
) -> tuple[list[JointNoise | None], list[list[int]]]:
    """The same, and the numbers that each process sends along."""
    layers = [(spectrum, None if noise is None or _bent(noise) else noise) for spectrum, noise in layers]
    own = [None if noise is None else summarise(noise, spectrum) for spectrum, noise in layers]
    shapes = [(spectrum.u.shape[0], spectrum.v.shape[0]) if spectrum.triplet else (0, 0) for spectrum, _ in layers]
    scatter = _scatter(layers)
    packed = [_pack(part, *shape, scatter) for part, shape in zip(own, shapes, strict=True)]
    vector = torch.cat([*packed, scatter.flatten(), scatter.new_tensor(numbers)])
    received = [torch.empty_like(vector) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, vector, group=group)
    cuts = [_HEAD + m + n for m, n in shapes]
    pieces = [list(torch.split(other, [*cuts, scatter.numel(), len(numbers)])) for other in received]
    joint: list[JointNoise | None] = []
    means = scatter.new_zeros(len(pieces), len(layers))
    scale = scatter.new_ones(len(pieces), len(layers))
    for index, ((spectrum, noise), shape) in enumerate(zip(layers, shapes, strict=True)):
        parts = [_unpack(piece[index], *shape) for piece in pieces]
        if noise is None or any(part.batch == 0 for part in parts):
            joint.append(None)
            continue
        batch = sum(part.batch for part in parts)
        weights = [batch / (len(parts) * part.batch) for part in parts]
        parts = [part if w == 1.0 else part.scaled(w) for part, w in zip(parts, weights, strict=True)]
        whole = replace(pool(parts, spectrum), mean=noise.mean)
        joint.append(whole)
        scale[:, index] = scale.new_tensor(weights)
        offsets = [float((part.p - whole.p) @ spectrum.u) * part.batch**0.5 for part in parts]
        means[:, index] = means.new_tensor(offsets)
    inside = torch.stack([piece[-2].reshape(scatter.shape) for piece in pieces])
    inside = (scale[:, :, None] * inside * scale[:, None, :]).sum(0)
    said = [list(map(round, piece[-1].tolist())) for piece in pieces]
    return _with_scores(joint, inside + means.T @ means), said


def share(
    layers: Sequence[Layer], group: dist.ProcessGroup | None = None, words: Sequence[int] = ()
) -> list[list[int]]:
    """Put the joint batch and its noise in place of this process's, in each layer; all processes must call it.

    Returns what each process had to say beside: its words.
    """
    own = [(layer.spectrum, layer.noise) for layer in layers]
    joint, said = _exchange(own, [*(layer.batch for layer in layers), *words], group)
    for layer, noise, batches in zip(layers, joint, zip(*said, strict=True), strict=False):
        layer.noise, layer.batch = noise, sum(batches)
        if noise is None and not layer.problems and not layer.frozen and layer.spectrum.triplet is not None:
            layer.problems.append(ELSEWHERE)
    return [numbers[len(layers) :] for numbers in said]


#: Numbers of a layer before its means: batch, two sizes, noise, curvature, two sums of squares.
_HEAD = 7


def _pack(part: JointNoise | None, m: int, n: int, like: Tensor) -> Tensor:
    if part is None:
        return like.new_zeros(_HEAD + m + n)
    head = [part.batch, *part.sizes, part.noise, part.curvature, *part.squares]
    return torch.cat([like.new_tensor(head), part.p, part.q])


def _unpack(vector: Tensor, m: int, n: int) -> JointNoise:
    batch, size_p, size_q, noise, curvature, first, second = vector[:_HEAD].tolist()
    _, p, q = torch.split(vector, [_HEAD, m, n])
    return JointNoise(round(batch), p, q, (size_p, size_q), noise, curvature, (first, second))


def _scatter(layers: Sequence[tuple[Spectrum, GradientNoise | None]]) -> Tensor:
    """Centred sums of products of the layers' scores (L, L); zero for layers that saw another number of samples."""
    device = next((spectrum.u.device for spectrum, _ in layers if spectrum.triplet), torch.device("cpu"))
    samples = max((noise.batch for _, noise in layers if noise is not None), default=0)
    rows = torch.zeros(len(layers), samples, dtype=torch.float64, device=device)
    for row, (spectrum, noise) in zip(rows, layers, strict=True):
        if noise is not None and noise.batch == samples:
            scores = noise.scores(spectrum)
            row += scores - scores.mean()
    return rows @ rows.T


def _bent(noise: GradientNoise) -> bool:
    """Whether the matrix is not linear in its parameters: those sums are not kept."""
    return getattr(noise, "bend", None) is not None


def _with_scores(joint: Sequence[JointNoise | None], scatter: Tensor) -> list[JointNoise | None]:
    """Stand-ins for the scores: a root of the scatter and its negative, scaled from M samples to so many."""
    values, vectors = torch.linalg.eigh(scatter)
    root = vectors * values.clamp_min(0).sqrt()
    count = 2 * len(root)
    rows = torch.cat([root, -root], dim=1) / 2**0.5
    out: list[JointNoise | None] = []
    for part, row in zip(joint, rows, strict=True):
        if part is not None:
            ratio = count * (count - 1) / (part.batch * (part.batch - 1)) if part.batch > 1 else _NAN
            part = replace(part, scores=ratio**0.5 * row)
        out.append(part)
    return out
