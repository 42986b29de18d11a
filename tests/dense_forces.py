"""The literal definition of every force: explicit covariance of all parameters, derivatives by autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOLERANCE = 1e-10

Effective = Callable[..., Tensor]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([(t.to_dense() if t.is_sparse else t).reshape(-1) for t in tensors])


def per_sample(
    model: nn.Module, names: Sequence[str], loss: Callable[[nn.Module, int], Tensor], samples: int
) -> Tensor:
    """(M, P) gradients of M times each sample's contribution to the loss, one backward pass per sample."""
    parameters = [model.get_parameter(name) for name in names]
    rows = []
    for i in range(samples):
        gradients = torch.autograd.grad(loss(model, i), parameters, allow_unused=True)
        rows.append(flat([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]))
    return samples * torch.stack(rows)


@dataclass
class Forces:
    """mu, kappa, lambda^2 and gHg of one matrix, and its variance parts."""

    mu: float
    kappa: float
    lambda_sq: float
    gHg: float  # noqa: N815
    kappa_var: float
    lambda_sq_var: float


def forces(
    values: Sequence[Tensor], effective: Effective, G: Tensor, W: Tensor, b: Tensor, lr: float, gain: float = 1.0
) -> Forces:
    """From parameter values, per-sample gradients (M, P), preconditioner (P,) and long-run drift ``b`` (P,)."""
    shapes = [v.shape for v in values]

    def sigma(theta: Tensor) -> Tensor:
        parts = theta.split([math.prod(shape) for shape in shapes])
        matrices = effective(*(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))
        return torch.linalg.svdvals(matrices).max()

    theta = flat(values)
    s, J, H = sigma(theta), torch.func.grad(sigma)(theta), torch.func.hessian(sigma)(theta)
    centred = G - G.mean(0)
    Sigma = centred.T @ centred / (len(G) * (len(G) - 1))
    C = (lr * gain) ** 2 * torch.outer(W, W) * Sigma
    D = C.diagonal()
    return Forces(
        mu=float(J @ b / (lr * s)),
        kappa=float((H * C).sum() / (2 * lr * s)),
        lambda_sq=float(J @ C @ J / (lr * s**2)),
        gHg=float(b @ H @ b / lr**2),
        kappa_var=float((H.diagonal() * D).sum() / (2 * lr * s)),
        lambda_sq_var=float((J.square() * D).sum() / (lr * s**2)),
    )


def compare(row: dict, expected: Forces, keys: Sequence[str] = ("mu", "kappa", "lambda_sq", "gHg")) -> None:
    for key in keys:
        wanted = getattr(expected, key)
        scale = max(abs(wanted), abs(expected.lambda_sq) ** 0.5 * 1e-2 if key == "mu" else 0.0)
        assert abs(row[key] - wanted) <= TOLERANCE * scale, f"{key}: got {row[key]}, expected {wanted}"
