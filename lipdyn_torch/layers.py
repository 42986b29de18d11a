"""Modules read as matrices: one registry, one rule per layer type.

Index letters: ``i`` sample (M of them), ``t`` position (sequence element or output pixel), ``o`` row of the
matrix (m outputs), ``n`` column (n inputs), ``c`` input channel, ``k`` kernel tap.

For a layer whose output is linear in its weight, the loss gradient of sample i with respect to the weight
matrix is ``G_i = sum_t delta_it x_it^T`` with x the layer's input patches and delta the gradient of the output.
A rule gives ``p_i = G_i v`` and ``q_i = G_i^T u`` without forming ``G_i`` ("ghost" contractions, theory 2.4).
Inputs and output gradients arrive in their own precision; everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Conv2dRule", "LayerRule", "LinearRule", "find_rule", "register_rule", "unsupported_reason"]

# Per-sample gradients exist only in the variance part, and never more than this many numbers at a time.
_CHUNK_NUMBERS = 1 << 22


class LayerRule(Protocol):
    """What the monitor must know about a layer type. All tensors are detached; M is the number of samples."""

    def unsupported(self, module: nn.Module) -> str | None:
        """Why this very module cannot be read, or None if it can."""

    def matrix(self, module: Any) -> Tensor:
        """The weight as a float64 matrix (m, n), a copy."""

    def weight_matrix(self, module: Any, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape (the gradient, say) as a float64 matrix (m, n), a copy."""

    def contract(self, module: Any, x: Tensor, delta: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``p_i = G_i v`` (M, m) and ``q_i = G_i^T u`` (M, n) from the layer's input and output gradient."""

    def sum_of_squares(self, module: Any, x: Tensor, delta: Tensor) -> Tensor:
        """``sum_i G_i o G_i`` (m, n), elementwise squares of the per-sample gradients."""


class _WeightRule:
    """What rules share whose matrix is the module's ``weight`` with all but the first axis flattened."""

    def matrix(self, module: Any) -> Tensor:
        return self.weight_matrix(module, module.weight)

    def weight_matrix(self, module: Any, tensor: Tensor) -> Tensor:
        return tensor.detach().to(torch.float64, copy=True).reshape(tensor.shape[0], -1)


class LinearRule(_WeightRule):
    """``nn.Linear`` on vectors (M, n) or on sequences (M, ..., n), the sample being the whole sequence.

    A plain vector (n,) is a batch of one. The first axis is always taken as the sample axis.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> x, delta = torch.ones(1, 3), torch.tensor([[1.0, 2.0]])
    >>> u, v = torch.eye(2, dtype=torch.float64)[1], torch.eye(3, dtype=torch.float64)[0]
    >>> p, q = LinearRule().contract(layer, x, delta, u, v)  # G = delta x^T
    >>> p.tolist(), q.tolist()
    ([[1.0, 2.0]], [[2.0, 2.0, 2.0]])
    """

    def unsupported(self, module: nn.Module) -> str | None:
        """Every linear layer can be read."""
        return None

    def contract(self, module: nn.Linear, x: Tensor, delta: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``p_i = sum_t delta_it (x_it . v)``, ``q_i = sum_t x_it (delta_it . u)``."""
        x, delta = self._positions(x), self._positions(delta)
        p = torch.einsum("ito,it->io", delta, x @ v)
        q = torch.einsum("itn,it->in", x, delta @ u)
        return p, q

    def sum_of_squares(self, module: nn.Linear, x: Tensor, delta: Tensor) -> Tensor:
        """``(delta o delta)^T (x o x)`` for vectors; per-sample gradients in chunks for sequences."""
        x, delta = self._positions(x), self._positions(delta)
        if x.shape[1] == 1:  # one position: the square of an outer product is the outer product of squares
            return delta[:, 0].square().T @ x[:, 0].square()
        return _chunked_squares(delta, x)

    @staticmethod
    def _positions(a: Tensor) -> Tensor:
        """(n,), (M, n) or (M, ..., n) to float64 (M, T, n)."""
        a = a.to(torch.float64)
        return a.reshape(1, 1, -1) if a.ndim == 1 else a.reshape(a.shape[0], -1, a.shape[-1])


class Conv2dRule(_WeightRule):
    """``nn.Conv2d``, read as its reshaped kernel (co, ci kh kw), with any stride, padding and dilation.

    The norm of this matrix is a lower bound of the norm of the convolution operator (theory 3.1).
    """

    def unsupported(self, module: nn.Module) -> str | None:
        """Grouped convolutions are several matrices."""
        groups = getattr(module, "groups", 1)
        return None if groups == 1 else f"convolution with groups={groups}, only groups=1 is read"

    def contract(self, module: nn.Conv2d, x: Tensor, delta: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``p_i = sum_t delta_it conv(x_i; v)_t``; ``q_i`` the kernel gradient for output gradient ``u . delta_i``."""
        x, delta = self._padded(module, x), self._batched(delta)
        kernel = v.reshape(1, *module.weight.shape[1:])
        response = functional.conv2d(x, kernel, stride=module.stride, dilation=module.dilation)[:, 0]
        p = torch.einsum("iohw,ihw->io", delta, response)
        # q_i is the kernel gradient of a one-channel convolution: correlate each input channel with
        # u . delta_i laid out at the places every kernel tap reads. Only one channel is ever unfolded.
        placed = self._taps(module, torch.einsum("iohw,o->ihw", delta, u), x.shape[-2:])
        q = torch.einsum("ics,isk->ick", x.flatten(2), placed)
        return p, q.flatten(1)

    def sum_of_squares(self, module: nn.Conv2d, x: Tensor, delta: Tensor) -> Tensor:
        """Per-sample kernel gradients, a chunk of samples at a time."""
        x, delta = self._padded(module, x), self._batched(delta)
        total = delta.new_zeros(delta.shape[1], module.weight[0].numel())
        for chunk in _chunks(len(x), module.weight.numel() + x[0].numel() * module.weight[0, 0].numel()):
            patches = functional.unfold(
                x[chunk], module.kernel_size, dilation=module.dilation, stride=module.stride
            )  # (chunk, n, positions)
            total += torch.einsum("iot,int->ion", delta[chunk].flatten(2), patches).square().sum(0)
        return total

    @staticmethod
    def _batched(a: Tensor) -> Tensor:
        a = a.to(torch.float64)
        return a if a.ndim == 4 else a[None]

    @classmethod
    def _padded(cls, module: nn.Conv2d, x: Tensor) -> Tensor:
        """The input as the kernel sees it: batched, float64, padded; the convolution then has no padding."""
        width: list[int] = []  # F.pad wants the last axis first
        for axis in (1, 0):
            if module.padding == "same":
                total = module.dilation[axis] * (module.kernel_size[axis] - 1)
                width += [total // 2, total - total // 2]
            elif module.padding == "valid":
                width += [0, 0]
            else:
                width += [int(module.padding[axis])] * 2
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return functional.pad(cls._batched(x), width, mode=mode) if any(width) else cls._batched(x)

    @staticmethod
    def _taps(module: nn.Conv2d, t: Tensor, size: torch.Size) -> Tensor:
        """(M, h, w) to (M, H W, kh kw): column k holds ``t`` at the input pixels that tap k reads."""
        (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
        samples, h, w = t.shape
        placed = t.new_zeros(samples, *size, kh, kw)
        for a in range(kh):
            for b in range(kw):
                rows = slice(a * dh, a * dh + (h - 1) * sh + 1, sh)
                columns = slice(b * dw, b * dw + (w - 1) * sw + 1, sw)
                placed[:, rows, columns, a, b] = t
        return placed.reshape(samples, size[0] * size[1], kh * kw)


def _chunks(samples: int, numbers_per_sample: int) -> Iterator[slice]:
    """Slices of the sample axis that hold at most about ``_CHUNK_NUMBERS`` numbers each."""
    width = max(1, _CHUNK_NUMBERS // max(1, numbers_per_sample))
    return (slice(start, start + width) for start in range(0, samples, width))


def _chunked_squares(delta: Tensor, x: Tensor) -> Tensor:
    """``sum_i (sum_t delta_it x_it^T)^2`` elementwise, for (M, T, m) and (M, T, n)."""
    total = delta.new_zeros(delta.shape[-1], x.shape[-1])
    for chunk in _chunks(len(x), total.numel()):
        total += torch.einsum("ito,itn->ion", delta[chunk], x[chunk]).square().sum(0)
    return total


_RULES: dict[type[nn.Module], LayerRule] = {nn.Linear: LinearRule(), nn.Conv2d: Conv2dRule()}


def register_rule(module_type: type[nn.Module], rule: LayerRule) -> None:
    """Teach the monitor a layer type; subclasses of ``module_type`` follow it unless they have their own rule.

    Examples
    --------
    >>> import torch
    >>> class MyLinear(torch.nn.Module):
    ...     pass
    >>> register_rule(MyLinear, LinearRule())
    >>> type(find_rule(MyLinear())).__name__
    'LinearRule'
    """
    _RULES[module_type] = rule


def find_rule(module: nn.Module) -> LayerRule | None:
    """The rule of the module's type, or of the nearest base class that has one."""
    return next((_RULES[base] for base in type(module).__mro__ if base in _RULES), None)


def unsupported_reason(module: nn.Module) -> str | None:
    """Why a module that owns parameters cannot be read, or None if it can.

    Examples
    --------
    >>> import torch
    >>> unsupported_reason(torch.nn.Linear(3, 2)) is None
    True
    >>> unsupported_reason(torch.nn.BatchNorm2d(4))
    'no rule for BatchNorm2d'
    """
    rule = find_rule(module)
    if rule is None:
        return f"no rule for {type(module).__name__}"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters (a parametrisation)"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight has no shape yet; run one forward pass first"
    return rule.unsupported(module)
