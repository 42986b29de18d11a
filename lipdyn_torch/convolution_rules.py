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

_CONVOLVE: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


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
        """``p_i = sum_t delta_it conv(x_i; v)_t``; ``q_i`` the kernel gradient for output gradient ``u . delta_i``."""
        if weights is not None:
            return super().contract(module, x, delta, u, v, block, weights)
        x, delta = self.operands(module, working(x), working(delta), block.group)
        u, v = u.to(delta.dtype), v.to(x.dtype)
        kernel = v.reshape(1, x.shape[1], *module.kernel_size)
        convolve = _CONVOLVE[len(module.kernel_size)]
        response = convolve(x, kernel, stride=module.stride, dilation=module.dilation)[:, 0]
        response = response[(slice(None), *(slice(0, size) for size in delta.shape[2:]))]
        p = torch.einsum("iot,it->io", delta.flatten(2), response.flatten(1))
        # q_i is the kernel gradient of a one-channel convolution: correlate each input channel with
        # u . delta_i laid out at the places every kernel tap reads. Only one channel is ever unfolded.
        placed = _taps(module, torch.einsum("io...,o->i...", delta, u), x.shape[2:])
        q = torch.einsum("ics,isk->ick", x.flatten(2), placed)
        return p.double(), q.flatten(1).double()

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


def _taps(module: Any, t: Tensor, size: torch.Size) -> Tensor:
    """(M, *out) to (M, S, K): column k holds ``t`` at the input pixels that tap k reads."""
    placed = t.new_zeros(len(t), *size, *module.kernel_size)
    for tap in itertools.product(*(range(k) for k in module.kernel_size)):
        where = tuple(
            slice(a * d, a * d + (out - 1) * s + 1, s)
            for a, d, s, out in zip(tap, module.dilation, module.stride, t.shape[1:], strict=True)
        )
        placed[(slice(None), *where, *(slice(a, a + 1) for a in tap))] = t[(..., *(None for _ in tap))]
    return placed.flatten(1, len(size)).flatten(2)


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
