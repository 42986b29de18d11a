"""The table of models every property of the monitor is tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional


class MeanOverPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@dataclass(frozen=True)
class Case:
    """A model, its input, and how it is trained; everything in float64 unless said."""

    name: str
    layers: Callable[[], list[nn.Module]]
    shape: tuple[int, ...]
    classes: int = 3
    batch: int = 7
    reduction: str = "mean"
    lr: float = 0.05
    settings: dict[str, Any] = field(default_factory=dict)  # of SGD
    head_lr: float | None = None  # the last layer in its own parameter group

    def gain(self, step: int) -> float:
        """Sum of the responses to the gradient of that step (theory 5); the first is not damped."""
        dampening = self.settings.get("dampening", 0.0) if step else 0.0
        return (1 - dampening) / (1 - self.settings.get("momentum", 0.0))

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Sequential:
        torch.manual_seed(11)
        return nn.Sequential(*self.layers()).to(dtype)

    def data(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, *self.shape, generator=generator, dtype=torch.float64).to(dtype)
        return x, torch.randint(self.classes, (self.batch,), generator=generator)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(output, y, reduction=self.reduction)

    def optimizer(self, model: nn.Sequential) -> torch.optim.SGD:
        groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
        if self.head_lr is not None:
            head = list(model[-1].parameters())
            body = [p for p in model.parameters() if all(p is not q for q in head)]
            groups = [{"params": body}, {"params": head, "lr": self.head_lr}]
        return torch.optim.SGD(groups, lr=self.lr, **self.settings)

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> Tensor:
        x, y = self.data(seed, next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss = self.loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()


def mlp() -> list[nn.Module]:
    return [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)]


def inplace() -> list[nn.Module]:
    return [nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3, bias=False)]


def sequence() -> list[nn.Module]:
    return [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), MeanOverPositions(), nn.Linear(4, 3)]


def convolutions(flat: int, *convs: nn.Conv2d) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for conv in convs:
        layers += [conv, nn.ReLU(inplace=True)]
    return [*layers, nn.Flatten(), nn.Linear(flat, 3)]


CASES = [
    Case("mlp", mlp, (6,)),
    Case("mlp-sum-loss", mlp, (6,), reduction="sum", lr=0.01),
    Case("mlp-weight-decay", mlp, (6,), settings={"weight_decay": 0.1}),
    Case("mlp-maximize", mlp, (6,), settings={"maximize": True, "weight_decay": 0.1}),
    Case("mlp-two-groups", mlp, (6,), head_lr=0.2),
    Case("mlp-momentum", mlp, (6,), settings={"momentum": 0.9, "nesterov": True}),
    Case("mlp-heavy-ball", mlp, (6,), settings={"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    Case("inplace-relu-no-bias", inplace, (6,)),
    Case("sequence", sequence, (4, 5)),
    Case(
        "conv-stride-padding",
        lambda: convolutions(4 * 2 * 2, nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, 2, padding=(1, 0))),
        (2, 4, 5),
    ),
    Case(
        "conv-dilation-same-reflect",
        lambda: convolutions(
            4 * 4 * 3,
            nn.Conv2d(1, 3, (3, 2), padding="same", dilation=(1, 2), padding_mode="reflect"),
            nn.Conv2d(3, 4, 2, dilation=2, stride=(1, 2), padding=(1, 2), bias=False),
        ),
        (1, 4, 4),
    ),
    Case(
        "conv-even-same-circular",
        lambda: convolutions(
            3 * 3 * 4,
            nn.Conv2d(2, 4, (2, 3), padding="same", padding_mode="circular"),
            nn.Conv2d(4, 3, (2, 3), padding="valid", stride=1),
            nn.Conv2d(3, 3, 2, padding=1, stride=1, padding_mode="replicate"),
        ),
        (2, 3, 5),
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def mlp_case() -> Case:
    return CASES[0]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
