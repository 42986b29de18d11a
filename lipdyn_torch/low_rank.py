"""Sums of a matrix and low-rank factors (LoRA), read as the effective matrix ``E = W + s B A``.

The matrix is not linear in its parameters: a step ``(dB, dA)`` moves it by ``s (dB A + B dA)`` and bends it by
``s dB dA``. The bend is of the second order, as the noise's curvature is, and belongs to kappa:
``D^2 sigma(E)[h, h] = D^2 sigma[dE, dE] + 2 s u^T dB dA v`` (chain rule on theory 1.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lipdyn_torch.layers import Block, LayerRule, LinearRule, ghost, value

__all__ = ["LowRankSumRule"]


class LowRankSumRule(LayerRule):
    """A linear layer whose matrix is ``W + s B A``; any of the three may be frozen.

    Parameters
    ----------
    frozen, up, down : str
        Paths of ``W`` (m, n), ``B`` (m, r) and ``A`` (r, n) from the module, ``"lora_A.default.weight"`` for example.
    scaling : str or float
        ``s``, or the name of the module's attribute that holds it.

    Examples
    --------
    >>> import torch
    >>> from lipdyn_torch import LipschitzMonitor
    >>> from lipdyn_torch.layers import register_rule
    >>> class Lora(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.base = torch.nn.Linear(6, 5)
    ...         self.base.requires_grad_(False)
    ...         self.up = torch.nn.Parameter(torch.randn(5, 2))
    ...         self.down = torch.nn.Parameter(torch.randn(2, 6))
    ...
    ...     def forward(self, x):
    ...         return self.base(x) + 0.5 * x @ self.down.T @ self.up.T
    >>> register_rule(Lora, LowRankSumRule("base.weight", "up", "down", scaling=0.5))
    >>> model = Lora()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> with LipschitzMonitor(model, optimizer) as monitor:
    ...     model(torch.randn(8, 6)).square().mean().backward()
    ...     optimizer.step()
    >>> monitor.history.rows[0]["status"]
    'ok'
    """

    def __init__(self, frozen: str, up: str, down: str, scaling: str | float = 1.0) -> None:
        self._paths = (frozen, up, down)
        self._scaling = scaling

    def parameters(self, module: Any, part: str) -> tuple[str, ...]:
        """``W``, ``B``, ``A``."""
        return self._paths

    def covers(self, module: Any) -> tuple[nn.Module, ...]:
        """The submodules that hold the three."""
        owners = (module.get_submodule(path.rpartition(".")[0]) for path in self._paths)
        return tuple(owner for owner in owners if owner is not module)

    def effective(self, module: Any, part: str, tensors: Sequence[Tensor]) -> Tensor:
        """``W + s B A`` as (1, m, n)."""
        W, B, A = tensors
        return (W + self._scale(module) * (B @ A))[None]

    def matrices(self, module: Any, part: str, tensors: Sequence[Tensor]) -> Tensor:
        """``dW + s (dB A + B dA)`` as (1, m, n), at the parameters' present values."""
        (dW, dB, dA), (_, B, A) = tensors, self._values(module)
        return (dW + self._scale(module) * (dB @ A + B @ dA))[None]

    def second_order(self, module: Any, part: str, tensors: Sequence[Tensor]) -> Tensor | None:
        """``s dB dA`` as (1, m, n)."""
        return self._scale(module) * (tensors[1] @ tensors[2])[None]

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
        """``p, q`` of the effective matrix's change, and the two factors of its bend."""
        (_, B, A), s = self._values(module), self._scale(module)
        x, delta = LinearRule.positions(x.double()), LinearRule.positions(delta.double())
        frozen, WB, WA = (None, None, None) if weights is None else weights
        p_up, q_up = ghost(x @ A.T, s * delta, u, A @ v, WB)  # dB A v and dB^T u
        p_down, q_down = ghost(x, s * (delta @ B), B.T @ u, v, WA)  # dA v and dA^T B^T u
        p, q = s * (p_up + p_down @ B.T), s * (q_up @ A + q_down)
        if frozen is None or bool(frozen.any()):
            p_base, q_base = ghost(x, delta, u, v, frozen)
            p, q = p + p_base, q + q_base
        return p, q, s * q_up, p_down

    def sum_of_squares(self, module: Any, x: Any, delta: Tensor, block: Block) -> Tensor | None:
        """None: variances belong to ``B`` and ``A``, not to the elements of the effective matrix."""
        return None

    def _values(self, module: Any) -> tuple[Tensor, ...]:
        return tuple(value(module.get_parameter(path)).double() for path in self._paths)

    def _scale(self, module: Any) -> float:
        return float(getattr(module, self._scaling) if isinstance(self._scaling, str) else self._scaling)
