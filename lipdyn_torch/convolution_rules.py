"""Convolutions of one, two and three dimensions and their transposes as reshaped kernels (theory 2.4, 3.1).

Letters as in `layers`. A transposed convolution is the adjoint of the convolution with the same kernel, so its
rule is that of the convolution with input and output gradient exchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lipdyn_torch._bridge import as_given, as_real
from lipdyn_torch.convolution import ConvolutionOperator, blocks, overlaps, padded, phases, sides
from lipdyn_torch.layers import Block, LayerRule, Sums, chunks, register_rule, together

__all__ = ["ConvRule", "ConvTransposeRule", "TorusRule"]


class ConvRule(LayerRule):
    """``nn.Conv1d``, ``Conv2d``, ``Conv3d`` as the reshaped kernel (co, ci k), with any stride, padding, dilation.

    The norm of this matrix is a lower bound of the norm of the convolution operator (theory 3.1). Each group is a
    matrix of its own; the layer's sigma is the largest of theirs, and the group that attains it is read.
    """

    def matrices(self, module: Any, part: str, tensors: Sequence[Tensor]) -> Tensor:
        """(co, ci / g, k...) to (g, co / g, ci / g k)."""
        return tensors[0].reshape(module.groups, tensors[0].shape[0] // module.groups, -1)

    def samples(self, module: Any, delta: Tensor) -> int:
        """M, or 1 for a single picture."""
        return delta.shape[0] if delta.ndim == len(module.kernel_size) + 2 else 1

    def contract(
        self,
        module: Any,
        x: Tensor,
        delta: Tensor,
        u: Tensor,
        v: Tensor,
        block: Block,
        weights: Sequence[Tensor] | None = None,
    ) -> Sums:
        """``p_i = sum_t delta_it conv(x_i; v)_t``; ``q_i`` is the kernel's gradient for ``u . delta_i``."""
        if weights is not None:
            return super().contract(module, x, delta, u, v, block, weights)
        x, delta = self.operands(module, *together(x, delta), block.group)
        if getattr(module, "padding_mode", "zeros") != "zeros":
            x = _padded(module, x)
        u, v = u.to(delta.dtype), v.to(x.dtype)
        taps, size, out = module.weight[0, 0].numel(), x.shape[2:], delta.shape[2:]
        kernel = v.reshape(x.shape[1], taps).T
        p, q = [u.new_zeros(0, len(u))], [v.new_zeros(0, len(v))]
        # Everything is a product of matrices with the channels: only one channel for each tap is ever unfolded.
        for chunk in chunks(len(x), taps * size.numel()):
            a, d = x[chunk].flatten(2), delta[chunk].flatten(2)
            response = _gathered(module, (kernel @ a).unflatten(2, size), out)
            p.append((response.flatten(1)[:, None] @ d.mT)[:, 0])
            placed = _scattered(module, (u @ d).unflatten(1, out), size)
            q.append((placed.flatten(2) @ a.mT).mT.flatten(1))
        return torch.cat(p).double(), torch.cat(q).double()

    def per_sample(self, module: Any, x: Tensor, delta: Tensor, block: Block) -> Iterator[Tensor]:
        """Kernel gradients from unfolded patches, a chunk of samples at a time."""
        x, delta = self.operands(module, *together(x, delta), block.group)
        taps, out = module.weight[0, 0].numel(), delta.shape[2:]
        for chunk in chunks(len(x), x.shape[1] * taps * (out.numel() + delta.shape[1])):
            yield delta[chunk].flatten(2) @ _patches(module, _padded(module, x[chunk]), out).mT

    def operands(self, module: Any, x: Tensor, delta: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """The group's channels of the input and of the output gradient: batched, not padded."""
        dims = len(module.kernel_size)
        return _group(module, _batched(x, dims), group), _group(module, _batched(delta, dims), group)


class ConvTransposeRule(ConvRule):
    """``nn.ConvTranspose1d``, ``2d``, ``3d`` as the reshaped kernel (ci, co k) of the convolution they transpose."""

    def operands(self, module: Any, x: Tensor, delta: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Input and output gradient in each other's place."""
        return super().operands(module, delta, x, group)


@dataclass
class Torus:
    """One that holds all images which convolutions of the same kernel, stride and dilation have seen.

    It is that of the images themselves while they are of one size, and all convolutions are ones on a torus of that
    size; else one that holds the padded images.
    """

    taps: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pixels: tuple[int, ...] = ()  # none before the first image
    spread: float = 1.0  # what padding that is not zero does to the norm
    phases: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"), repr=False)
    _seen: set[tuple[Any, ...]] = field(default_factory=set)
    _noted: list[float] = field(default_factory=list)

    def hold(self, module: Any, size: tuple[int, ...]) -> bool:
        """Make it large enough for images of that size; True if it is another one then."""
        if (module.padding, module.padding_mode, size) in self._seen:
            return False
        self._seen.add((module.padding, module.padding_mode, size))
        found = ConvolutionOperator.like(module, size)
        fewest = [-n for n in found.size]
        noted = [*found.covering, found.repeats, 0.0 if found.exact else 1.0, *found.size, *fewest]
        return self.recall(list(map(max, noted, self.noted())))

    def noted(self) -> list[float]:
        """The covering torus, the padding's norm, whether one needed these, the most and the negative fewest pixels."""
        axes = len(self.taps)
        return self._noted or [*[0.0] * axes, 1.0, 0.0, *[0.0] * axes, *[-(2.0**40)] * axes]

    def recall(self, noted: list[float]) -> bool:
        """Take what was noted; True if it is another torus then."""
        axes = len(self.taps)
        covering, (repeats, rough) = noted[:axes], noted[axes : axes + 2]
        most, fewest = noted[axes + 2 : 2 * axes + 2], noted[2 * axes + 2 :]
        if not any(covering):
            return False
        self._noted = list(noted)
        exact = not rough and most == [-n for n in fewest]
        pixels, spread = tuple(map(int, most if exact else covering)), 1.0 if exact else repeats
        if (pixels, spread) == (self.pixels, self.spread):
            return False
        self.pixels, self.spread = pixels, spread
        self.phases = spread * phases(self.taps, pixels, self.stride, self.dilation, distinct=True)
        return True


class TorusRule(LayerRule):
    """A convolution as an operator on a torus that holds the images: a complex matrix for each frequency (theory 3.2).

    The norm is an upper bound of that on the images themselves, and the norm itself where they are the torus: with
    circular padding, one size, and one output for each stride (theory 3.3).
    The matrices are linear in the kernel: each is the reshaped kernel times a matrix E of phases.
    """

    sized = True

    @classmethod
    def of(cls, rule: LayerRule, module: Any) -> LayerRule:
        """The rule itself where it is none of these, or no patches overlap: the reshaped kernel then has the norm."""
        if type(rule) not in (ConvRule, ConvTransposeRule) or not isinstance(module, nn.modules.conv._ConvNd):
            return rule
        axes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
        same = module.padding_mode == "zeros" and not any(overlaps(*axis) for axis in axes)
        return rule if same else cls(rule, module)

    def __init__(self, inner: LayerRule, module: Any) -> None:
        self.inner, self.module = inner, module
        self.torus = Torus(module.kernel_size, module.stride, module.dilation)

    def shares(self, other: LayerRule) -> bool:
        """Whether a kernel in two places is one family of matrices; the torus is then one too."""
        if not isinstance(other, TorusRule):
            return False
        mine, theirs = ((t.taps, t.stride, t.dilation) for t in (self.torus, other.torus))
        if (mine, self.module.groups) != (theirs, other.module.groups):
            return False
        self.torus = other.torus
        return True

    @property
    def unknown(self) -> str:  # type: ignore[override]
        """Before the first image its size is not known."""
        return "" if self.torus.pixels else "no image has been seen yet"

    def meet(self, x: Tensor) -> bool:
        """Make the torus large enough for the image."""
        return self.torus.hold(self.module, tuple(x.shape[-len(self.torus.taps) :]))

    def noted(self) -> list[float]:
        """What the torus is made from."""
        return self.torus.noted()

    def recall(self, noted: Sequence[float]) -> bool:
        """Make the torus from that."""
        return bool(noted) and self.torus.recall(list(noted))

    def inputs(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As of the reshaped kernel."""
        return self.inner.inputs(module, args, kwargs)

    def output(self, module: Any, output: Any) -> Tensor | None:
        """As of the reshaped kernel."""
        return self.inner.output(module, output)

    def samples(self, module: Any, delta: Tensor) -> int:
        """As of the reshaped kernel."""
        return self.inner.samples(module, delta)

    def matrices(self, module: Any, part: str, tensors: Sequence[Tensor]) -> Tensor:
        """(co, ci / g, k...) to (frequencies g, co / g, ci / g prod s), complex; reshaped while there is no torus."""
        if not self.torus.pixels:
            return self.inner.matrices(module, part, tensors)
        return self._blocks(tensors[0], slice(None)).flatten(0, 1)

    def matrix(self, module: Any, part: str, tensors: Sequence[Tensor], group: int) -> Tensor:
        """One of `matrices`."""
        frequency, inner = divmod(group, module.groups)
        return self._blocks(tensors[0], slice(frequency, frequency + 1))[0, inner]

    def chart(self, module: Any, group: int) -> Tensor | None:
        """E: the phases, for each channel the same."""
        if not self.torus.pixels:
            return None
        E = self.torus.phases[group // module.groups]
        return torch.block_diag(*[E.to(module.weight.device)] * module.weight.shape[1])

    def coordinates(self, module: Any, part: str, tensors: Sequence[Tensor], group: int) -> Tensor:
        """The reshaped kernel."""
        return self.inner.matrix(module, part, tensors, group % module.groups)

    def effective(self, module: Any, part: str, tensors: Sequence[Tensor]) -> Tensor:
        """The same: linear, but not the kernel itself."""
        return self.matrices(module, part, tensors)

    def _blocks(self, kernel: Tensor, which: slice) -> Tensor:
        W = kernel.double().unflatten(0, (self.module.groups, -1))
        return blocks(W, self.torus.phases[which])

    def contract(
        self,
        module: Any,
        x: Tensor,
        delta: Tensor,
        u: Tensor,
        v: Tensor,
        block: Block,
        weights: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """``p_i = R_i E v`` and ``q_i = E^* R_i^T u`` from those of the sample's reshaped gradient R_i (theory 2.4)."""
        E = self.torus.phases[block.group // module.groups].to(u.device)  # of each channel (K, prod s)
        u, v = (as_given(z, torch.complex128) for z in (u, v))
        seen = (v.unflatten(0, (-1, E.shape[1])) @ E.T).flatten()
        (p, q), (r, s) = (
            self.inner.contract(module, x, delta, a, b, self._inner(module, block), weights)
            for a, b in ((u.real, seen.real), (u.imag, seen.imag))
        )
        q = torch.complex(q, s).unflatten(1, (-1, E.shape[0])) @ E.conj()
        return as_real(torch.complex(p, r)), as_real(q.flatten(1))

    def per_sample(self, module: Any, x: Tensor, delta: Tensor, block: Block) -> Iterator[Tensor]:
        """As of the reshaped kernel."""
        return self.inner.per_sample(module, x, delta, self._inner(module, block))

    def sum_of_squares(self, module: Any, x: Any, delta: Tensor, block: Block) -> Tensor | None:
        """As of the reshaped kernel."""
        return self.inner.sum_of_squares(module, x, delta, self._inner(module, block))

    @staticmethod
    def _inner(module: Any, block: Block) -> Block:
        return Block(block.part, block.group % module.groups)


def _batched(a: Tensor, dims: int) -> Tensor:
    return a if a.ndim == dims + 2 else a[None]


def _group(module: Any, a: Tensor, group: int) -> Tensor:
    width = a.shape[1] // module.groups
    return a[:, group * width : (group + 1) * width]


def _padding(module: Any) -> list[tuple[int, int]]:
    """Pixels added before and after, axis by axis."""
    return sides(module.padding, [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)])


def _padded(module: Any, x: Tensor) -> Tensor:
    """The picture as the kernel sees it."""
    return padded(x, _padding(module), getattr(module, "padding_mode", "zeros"))


def _taps(module: Any, size: torch.Size, out: torch.Size) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """For each kernel tap the input pixels (of a picture of that size) it reads, and the output pixels they are for.

    What it reads of a border of zeros is left out; other borders are part of the picture.
    """
    border = [before if getattr(module, "padding_mode", "zeros") == "zeros" else 0 for before, _ in _padding(module)]
    for tap in itertools.product(*(range(k) for k in module.kernel_size)):
        read, written = [], []
        for a, d, s, before, pixels, places in zip(tap, module.dilation, module.stride, border, size, out, strict=True):
            start = a * d - before
            first = max(0, -(start // s))
            count = max(0, min(places, (pixels - 1 - start) // s + 1) - first)
            begin = start + first * s if count else 0
            read.append(slice(begin, begin + s * max(count - 1, 0) + min(count, 1), s))
            written.append(slice(first, first + count))
        yield tuple(read), tuple(written)


def _gathered(module: Any, planes: Tensor, out: torch.Size) -> Tensor:
    """(M, K, *size) to (M, *out): what tap k reads of plane k, added up."""
    total = planes.new_zeros(len(planes), *out)
    for k, (read, written) in enumerate(_taps(module, planes.shape[2:], out)):
        index: tuple[slice | int, ...] = (slice(None), k, *read)
        total[(slice(None), *written)] += planes[index]
    return total


def _scattered(module: Any, t: Tensor, size: torch.Size) -> Tensor:
    """(M, *out) to (M, K, *size), the adjoint: plane k holds ``t`` at the input pixels that tap k reads."""
    placed = t.new_zeros(len(t), module.weight[0, 0].numel(), *size)
    for k, (read, written) in enumerate(_taps(module, size, t.shape[1:])):
        index: tuple[slice | int, ...] = (slice(None), k, *read)
        placed[index] = t[(slice(None), *written)]
    return placed


def _patches(module: Any, x: Tensor, out: torch.Size) -> Tensor:
    """(M, c, *size), padded, to (M, c K, T): what the kernel reads at each of the T places."""
    dims = len(out)
    for axis, (k, s, d, places) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, out, strict=True), start=2
    ):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d].narrow(axis, 0, places)
    # Places last: the copy runs along rows of the picture.
    return x.movedim(tuple(range(2, 2 + dims)), tuple(range(-dims, 0))).flatten(1, 1 + dims).flatten(2)


_TYPES: dict[type[nn.Module], LayerRule] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvRule()),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ConvTransposeRule()),
}
for _type, _rule in _TYPES.items():
    register_rule(_type, _rule)
