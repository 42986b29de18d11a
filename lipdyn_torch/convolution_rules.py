"""Convolutions of one, two and three dimensions and their transposes as reshaped kernels (theory 2.4, 3.1).

Letters as in `layers`. A transposed convolution is the adjoint of the convolution with the same kernel, so its
rule is that of the convolution with input and output gradient exchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipdyn_torch.layers import Block, LayerRule, chunks, register_rule, working

__all__ = ["ConvRule", "ConvTransposeRule"]

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
    ) -> tuple[Tensor, ...]:
        """``p_i = sum_t delta_it conv(x_i; v)_t``; ``q_i`` the kernel gradient for the output gradient ``u . delta_i``."""
        if weights is not None:
            return super().contract(module, x, delta, u, v, block, weights)
        x, delta = self.operands(module, working(x), working(delta), block.group)
        u, v = u.to(delta.dtype), v.to(x.dtype)
        taps, size, out = module.weight[0, 0].numel(), x.shape[2:], delta.shape[2:]
        kernel = v.reshape(x.shape[1], taps).T
        p, q = [], []
        # Everything is a product of matrices with the channels: only one channel for each tap is ever unfolded.
        for chunk in chunks(len(x), taps * x[0, 0].numel()):
            a, d = x[chunk].flatten(2), delta[chunk].flatten(2)
            response = _gathered(module, (kernel @ a).unflatten(2, size), out)
            p.append((response.flatten(1)[:, None] @ d.mT)[:, 0])
            placed = _scattered(module, (u @ d).unflatten(1, out), size)
            q.append((placed.flatten(2) @ a.mT).mT.flatten(1))
        return torch.cat(p).double(), torch.cat(q).double()

    def per_sample(self, module: Any, x: Tensor, delta: Tensor, block: Block) -> Iterator[Tensor]:
        """Kernel gradients from unfolded patches, a chunk of samples at a time."""
        x, delta = self.operands(module, x.double(), delta.double(), block.group)
        taps, places = module.weight[0, 0].numel(), delta[0, 0].numel()
        for chunk in chunks(len(x), x.shape[1] * taps * (places + delta.shape[1])):
            patches = _patches(module, x[chunk], delta.shape[2:])
            yield torch.einsum("iot,ictk->iock", delta[chunk].flatten(2), patches).flatten(2)

    def operands(self, module: Any, x: Tensor, delta: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """The group's channels of the padded input and of the output gradient: batched."""
        dims = len(module.kernel_size)
        return _group(module, _padded(module, x), group), _group(module, _batched(delta, dims), group)


class ConvTransposeRule(ConvRule):
    """``nn.ConvTranspose1d``, ``2d``, ``3d`` as the reshaped kernel (ci, co k) of the convolution they transpose."""

    def operands(self, module: Any, x: Tensor, delta: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Input and output gradient in each other's place."""
        dims = len(module.kernel_size)
        return _group(module, _padded(module, delta), group), _group(module, _batched(x, dims), group)


def _batched(a: Tensor, dims: int) -> Tensor:
    return a if a.ndim == dims + 2 else a[None]


def _group(module: Any, a: Tensor, group: int) -> Tensor:
    width = a.shape[1] // module.groups
    return a[:, group * width : (group + 1) * width]


def _padded(module: Any, x: Tensor) -> Tensor:
    """The picture as the kernel sees it: batched, padded; the convolution then has no padding."""
    width: list[int] = []  # F.pad wants the last axis first
    for axis in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            width += [total // 2, total - total // 2]
        elif module.padding == "valid":
            width += [0, 0]
        else:
            width += [int(module.padding[axis])] * 2
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = _batched(x, len(module.kernel_size))
    return functional.pad(x, width, mode=mode) if any(width) else x


def _taps(module: Any, out: torch.Size) -> Iterator[tuple[slice, ...]]:
    """For each kernel tap, the input pixels it reads for the output pixels ``out``."""
    for tap in itertools.product(*(range(k) for k in module.kernel_size)):
        yield tuple(
            slice(a * d, a * d + (places - 1) * s + 1, s)
            for a, d, s, places in zip(tap, module.dilation, module.stride, out, strict=True)
        )


def _gathered(module: Any, planes: Tensor, out: torch.Size) -> Tensor:
    """(M, K, *size) to (M, *out): what tap k reads of plane k, added up."""
    total = planes.new_zeros(len(planes), *out)
    for k, where in enumerate(_taps(module, out)):
        total += planes[(slice(None), k, *where)]
    return total


def _scattered(module: Any, t: Tensor, size: torch.Size) -> Tensor:
    """(M, *out) to (M, K, *size), the adjoint: plane k holds ``t`` at the input pixels that tap k reads."""
    placed = t.new_zeros(len(t), module.weight[0, 0].numel(), *size)
    for k, where in enumerate(_taps(module, t.shape[1:])):
        placed[(slice(None), k, *where)] = t
    return placed


def _patches(module: Any, x: Tensor, out: torch.Size) -> Tensor:
    """(M, c, *size) to (M, c, T, K): what the kernel reads at each of the T places."""
    for axis, (k, s, d, places) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, out, strict=True), start=2
    ):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d].narrow(axis, 0, places)
    dims = len(out)
    return x.flatten(2, dims + 1).flatten(3)


_TYPES: dict[type[nn.Module], LayerRule] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvRule()),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ConvTransposeRule()),
}
for _type, _rule in _TYPES.items():
    register_rule(_type, _rule)
