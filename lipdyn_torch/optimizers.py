"""What an optimiser makes of a gradient: the mean and the noise of one step, in the long run (theory 5).

A step moves a parameter by its drift ``b`` and by noise of covariance ``C``. Optimisers with a memory spread the
effect of one gradient over many steps; what counts for the path is the sum of these responses, so ``b`` and ``C``
are the *long-run* effects of one step's gradient, valid over windows much longer than the memory:

- `torch.optim.SGD`, heavy ball and Nesterov: ``b = -eta_eff gbar``, ``C = eta_eff^2 Sigma`` with
  ``eta_eff = eta (1 - tau) / (1 - beta)``. The covariance of a single step, ``eta^2 Sigma / (1 - beta^2)``, ignores
  that successive steps share gradients and is far too small. The very first gradient torch takes over undamped, as if
  tau were zero.
- `torch.optim.RMSprop`: ``b = -eta_eff W o gbar``, ``C = eta_eff^2 diag(W) Sigma diag(W)`` with
  ``W = 1/(sqrt(v) + eps)`` as it is in this step and ``eta_eff = eta / (1 - momentum)``.
- `torch.optim.Adam`, `torch.optim.AdamW`: ``b = -eta W o mhat`` (measured), ``C = eta^2 diag(W) Sigma diag(W)``
  with ``W = 1/(sqrt(vhat) + eps)``: the responses of the first average sum to one.

Coupled weight decay is part of ``gbar`` (it adds exactly ``-weight_decay`` to mu); decoupled decay multiplies the
weight and adds exactly ``log(1 - eta weight_decay)`` to log sigma.

Everything is computed before the step, from the optimiser's state and the gradient; the step that follows from it
is kept and compared with the one really made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lipdyn_torch.distributed import full
from lipdyn_torch.layers import value, whole, working

__all__ = ["Response", "mean_drift", "respond"]


@dataclass(frozen=True)
class Response:
    """What one step makes of one parameter's gradient; tensors have the parameter's shape, in its own precision.

    Half precision is widened to single.

    Attributes
    ----------
    drift : Tensor
        ``-b / eta``, without decoupled weight decay.
    direction : Tensor
        The change of the parameter in this very step is ``-lr * direction``.
    lr : float
        eta.
    gain : float
        ``eta_eff / eta``, the factor of the noise.
    weights : Tensor or None
        ``W``, elementwise, or None for ones.
    decay : float
        Decoupled weight decay per unit of eta.
    """

    drift: Tensor
    direction: Tensor
    lr: float
    gain: float = 1.0
    weights: Tensor | None = None
    decay: float = 0.0

    def explains(self, old: Tensor, change: Tensor) -> bool:
        """Whether the change of the parameter is that of the optimiser's formula, up to its rounding."""
        rounding = 8 * torch.finfo(old.dtype).eps * _norm(working(old))
        rest = torch.add(change, self.direction, alpha=self.lr)
        return _norm(rest) <= rounding + 1e-3 * abs(self.lr) * _norm(self.direction)


def _norm(x: Tensor) -> float:
    """Euclidean norm; where the squares leave the range of single precision, in float64."""
    size = float(torch.linalg.vector_norm(x))
    return size if 1e-15 < size < math.inf else float(torch.linalg.vector_norm(x.double()))


def respond(
    optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, gradient: Tensor | None = None
) -> Response | str:
    """The response of ``optimizer`` to ``gradient`` (default: `gradient_of` the parameter), or why it is not known.

    Call it before ``optimizer.step()``. Source: theory 5.

    Examples
    --------
    >>> import torch
    >>> p = torch.nn.Parameter(torch.ones(2))
    >>> p.grad = torch.full((2,), 0.5)
    >>> optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.75)
    >>> response = respond(optimizer, optimizer.param_groups[0], p)
    >>> response.gain, response.drift.tolist()
    (4.0, [2.0, 2.0])
    >>> optimizer = torch.optim.Adagrad([p])
    >>> respond(optimizer, optimizer.param_groups[0], p)
    'Adagrad: drift and noise terms are not known for this optimiser'
    """
    rule = next((make for kind, make in _RESPONSES.items() if isinstance(optimizer, kind)), None)
    if rule is None:
        return f"{type(optimizer).__name__}: drift and noise terms are not known for this optimiser"
    if parameter.grad is None:
        return "no gradient reached this layer"
    gradient = gradient_of(optimizer, parameter) if gradient is None else gradient
    return rule(group, optimizer.state.get(parameter, {}), gradient, parameter)


def mean_drift(group: dict[str, Any], response: Response, gradient: Tensor, parameter: Tensor) -> Tensor:
    """``-b / eta`` for another mean gradient in the place of the batch's, all else as in ``response``.

    Adam's average of past gradients gives way to the gradient itself: its long-run effect.
    """
    if group.get("decoupled_weight_decay", False):
        group = {**group, "weight_decay": 0.0}
    g = response.gain * _with_decay(group, full(gradient).to(response.drift.dtype), parameter)
    return g if response.weights is None else response.weights * g


def gradient_of(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    """A copy of the gradient in true units, dense: fused optimisers undo the loss scale only inside the step."""
    assert parameter.grad is not None
    g = working(value(parameter.grad))
    scale = getattr(optimizer, "grad_scale", None)
    return g if scale is None else g / float(scale)


def _with_decay(group: dict[str, Any], g: Tensor, parameter: Tensor) -> Tensor:
    """The gradient as the optimiser's formula has it: sign, and coupled weight decay."""
    g = -g if group.get("maximize", False) else g
    decay = float(group.get("weight_decay", 0.0))
    return g if decay == 0.0 else g + decay * working(whole(parameter))


def _sgd(group: dict[str, Any], state: dict[str, Any], g: Tensor, parameter: Tensor) -> Response | str:
    lr, beta, tau = float(group["lr"]), float(group["momentum"]), float(group["dampening"])
    g = _with_decay(group, g, parameter)
    if beta == 0.0:
        return Response(g, g, lr)
    if not 0.0 < beta < 1.0:
        return f"momentum {beta:g}: the responses to a gradient have no sum"
    if state.get("momentum_buffer") is None:  # the first gradient becomes the buffer as it is
        tau = 0.0
    buffer = beta * _held(state, "momentum_buffer", g) + (1.0 - tau) * g
    gain = (1.0 - tau) / (1.0 - beta)
    return Response(gain * g, g + beta * buffer if group["nesterov"] else buffer, lr, gain)


def _rmsprop(group: dict[str, Any], state: dict[str, Any], g: Tensor, parameter: Tensor) -> Response | str:
    lr, alpha, momentum = float(group["lr"]), float(group["alpha"]), float(group["momentum"])
    if not 0.0 <= momentum < 1.0:
        return f"momentum {momentum:g}: the responses to a gradient have no sum"
    g = _with_decay(group, g, parameter)
    square = alpha * _held(state, "square_avg", g) + (1.0 - alpha) * g.square()
    if group["centered"]:
        mean = alpha * _held(state, "grad_avg", g) + (1.0 - alpha) * g
        square = square - mean.square()
    W = 1.0 / (square.sqrt() + float(group["eps"]))
    buffer = momentum * _held(state, "momentum_buffer", g) + W * g
    gain = 1.0 / (1.0 - momentum)
    return Response(gain * W * g, buffer, lr, gain, W)


def _adam(group: dict[str, Any], state: dict[str, Any], g: Tensor, parameter: Tensor) -> Response | str:
    lr, (beta1, beta2) = float(group["lr"]), (float(beta) for beta in group["betas"])
    decay = float(group["weight_decay"])
    decoupled = bool(group.get("decoupled_weight_decay", False))
    g = _with_decay({**group, "weight_decay": 0.0} if decoupled else group, g, parameter)
    taken = float(state.get("step", 0.0)) + 1.0
    mean = beta1 * _held(state, "exp_avg", g) + (1.0 - beta1) * g
    square = beta2 * _held(state, "exp_avg_sq", g) + (1.0 - beta2) * g.square()
    if group["amsgrad"]:
        square = torch.maximum(square, _held(state, "max_exp_avg_sq", g))
    W = 1.0 / ((square / (1.0 - beta2**taken)).sqrt() + float(group["eps"]))
    drift = W * mean / (1.0 - beta1**taken)
    if not decoupled:
        return Response(drift, drift, lr, 1.0, W)
    return Response(drift, drift + decay * working(whole(parameter)), lr, 1.0, W, decay)


def _held(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    """A tensor of the optimiser's state in the precision of ``like``; zeros before the first step."""
    held = state.get(name)
    if held is None:
        return torch.zeros_like(like)
    return (held.to_dense() if held.is_sparse else full(held)).to(like.dtype)


_RESPONSES: dict[type[Optimizer], Callable[..., Response | str]] = {
    torch.optim.SGD: _sgd,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
}
