"""Convolutions read as operators: every number against the literal definition, and what images of several sizes do."""

from __future__ import annotations

import itertools
import math

import dense_forces
import pytest
import torch
from torch import Tensor, nn

from lipdyn_torch import ConvolutionOperator, LipschitzMonitor
from lipdyn_torch._bridge import _norms, read_spectrum, spectral_norm
from lipdyn_torch.convolution import phases

SAMPLES, LR = 5, 0.03


def literal_blocks(module: nn.Module, torus: list[int], kernel: Tensor) -> Tensor:
    """Every matrix (co / g, ci / g prod s) of the convolution on a torus, tap by tap (theory 3.2)."""
    W = kernel.unflatten(0, (module.groups, -1))
    coarse = [n // s for n, s in zip(torus, module.stride, strict=True)]
    out = []
    for start in itertools.product(*map(range, coarse)):
        columns = []
        for fold in itertools.product(*map(range, module.stride)):
            total = torch.zeros(W.shape[:3], dtype=torch.complex128)
            for tap in itertools.product(*map(range, module.kernel_size)):
                turns = sum(
                    t * d * (i + a * c) / n
                    for t, d, i, a, c, n in zip(tap, module.dilation, start, fold, coarse, torus, strict=True)
                )
                index = (slice(None), slice(None), slice(None), *tap)
                angle = torch.tensor(-2 * math.pi * turns, dtype=torch.float64)
                total = total + W[index] * torch.polar(torch.ones((), dtype=torch.float64), angle)
            columns.append(total / math.sqrt(math.prod(module.stride)))
        out.append(torch.cat(columns, -1))
    return torch.stack(out)


LAYERS = {
    "plain": (lambda: nn.Conv2d(2, 3, 3, padding=1), (6, 5)),
    "strided": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (6, 7)),
    "two-strides": (lambda: nn.Conv2d(3, 2, (3, 2), stride=(1, 2)), (6, 6)),
    "dilated": (lambda: nn.Conv2d(2, 3, 3, dilation=2, padding=2), (6, 6)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (5, 5)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, padding=1), (5, 5)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (5, 6)),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (4, 4)),
    "rows": (lambda: nn.Conv2d(2, 3, (1, 3), padding=(0, 1)), (4, 6)),
    "one-axis": (lambda: nn.Conv1d(3, 4, 3, padding="same"), (8,)),
    "one-axis-strided": (lambda: nn.Conv1d(3, 4, 4, stride=3, padding=2), (11,)),
    "three-axes": (lambda: nn.Conv3d(2, 2, 2), (3, 4, 3)),
    "one-channel": (lambda: nn.Conv2d(1, 1, 3, padding=1), (5, 5)),
}


def network(layer: str) -> tuple[nn.Sequential, tuple[int, ...]]:
    torch.manual_seed(3)
    make, size = LAYERS[layer]
    conv = make().double()
    width = conv(torch.zeros(1, conv.in_channels, *size).double()).numel()
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3).double()), (conv.in_channels, *size)


def images(shape: tuple[int, ...], seed: int, samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (samples,), generator=generator)


def torus_of(module: nn.Module, size: tuple[int, ...]) -> tuple[list[int], float]:
    operator = ConvolutionOperator.of(module, size)
    return operator.torus, operator.spread


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_term_is_its_dense_definition(layer, optimizer):
    model, shape = network(layer)
    conv = model[0]
    torus, spread = torus_of(conv, shape[1:])
    make = {"SGD": lambda p: torch.optim.SGD(p, lr=LR), "Adam": lambda p: torch.optim.Adam(p, lr=LR, eps=1e-3)}
    optim = make[optimizer](model.parameters())
    with LipschitzMonitor(model, optim, conv="operator") as monitor:
        for step in range(2):
            x, y = images(shape, step)

            def loss(net: nn.Module, i: int, x: Tensor = x, y: Tensor = y) -> Tensor:
                return nn.functional.cross_entropy(net(x[i : i + 1]), y[i : i + 1]) / SAMPLES

            G = dense_forces.per_sample(model, ["0.weight"], loss, SAMPLES)
            before = conv.weight.detach().clone()
            optim.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optim.step()
            (row,) = (r for r in monitor.history.rows if r["step"] == step and r["layer"] == "0")
            assert row["status"] == "ok"
            tops = [spread * torch.linalg.svdvals(b).amax(-1) for b in literal_blocks(conv, torus, before)]
            best = torch.stack(tops).amax(-1).argmax()
            W, D = torch.ones(conv.weight.numel()).double(), conv.weight.detach() - before
            if optimizer == "Adam":
                corrected = optim.state[conv.weight]["exp_avg_sq"].flatten() / (1 - 0.999 ** (step + 1))
                W = 1 / (corrected.sqrt() + 1e-3)
            expected = dense_forces.forces(
                [before], lambda K: spread * literal_blocks(conv, torus, K)[best], G, W, D.flatten(), LR
            )
            after = spread * torch.linalg.svdvals(literal_blocks(conv, torus, conv.weight.detach())).amax()
            assert row["sigma"] == pytest.approx(float(torch.stack(tops).amax()), rel=1e-12)
            assert row["dz"] == pytest.approx(float(after.log() - torch.stack(tops).amax().log()), abs=1e-12)
            for key in ("mu", "kappa", "lambda_sq", "gHg"):
                wanted, least = getattr(expected, key), {"mu": 1e-2 * expected.lambda_sq**0.5}.get(key, 1e-20)
                assert abs(row[key] - wanted) <= 1e-10 * max(abs(wanted), least), key
            assert abs(row["remainder"]) <= row["bound"]
            size = spread * float(torch.linalg.svdvals(literal_blocks(conv, torus, D)).amax())
            assert row["eps"] == pytest.approx(2 * size / row["gap"], rel=1e-9)


@pytest.mark.parametrize("layer", LAYERS)
def test_sigma_bounds_the_operator(layer):
    model, shape = network(layer)
    optim = torch.optim.SGD(model.parameters(), lr=LR)
    columns = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    with LipschitzMonitor(model, optim, conv="operator") as monitor:
        conv, bias = model[0], model[0].bias.detach().clone()
        bias = bias.reshape(-1, *[1] * (len(shape) - 1))
        dense = (conv(columns).detach() - bias).flatten(1)
        x, y = images(shape, 0)
        nn.functional.cross_entropy(model(x), y).backward()
        optim.step()
    true, sigma = float(torch.linalg.matrix_norm(dense, 2)), monitor.history.rows[0]["sigma"]
    assert true <= sigma * (1 + 1e-12)
    assert sigma <= 2 * true
    if layer == "circular":
        assert sigma == pytest.approx(true, rel=1e-12)
