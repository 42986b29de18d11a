"""What is written over the outputs of layers, many of which are views, and over the inputs of the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_forces import compare, flat, forces, per_sample
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lipdyn_torch import LipschitzMonitor

F64 = torch.float64
M, T, N = 6, 3, 4


class Attention(nn.Module):
    """Of a sequence to itself; what it returns is a view, with transposed axes where samples come first."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.inner, self.batch_first = nn.MultiheadAttention(N, 2, batch_first=batch_first), batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        return self.inner(x, x, x, need_weights=False)[0]


class Causal(nn.Conv1d):
    """What sees the future is cut off: a view of a part."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :-2]


class Last(nn.Module):
    """Read by the fallback; of every other position, the last features first."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(N, N))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.mix)[:, ::2].mT


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(N, N))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.mix)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(N, N),
    "attention": lambda: Attention(False),
    "attention-batch-first": lambda: Attention(True),
    "causal": lambda: Causal(T, 5, 3, padding=2),
    "part": Last,
}


def part_(h: Tensor) -> Tensor:
    h[..., 0] = -0.5
    return h


def used_before_(h: Tensor) -> Tensor:
    before = 2.0 * h
    h += 1.0
    return before + h.square()


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "add": lambda h: h.add_(torch.linspace(-1.0, 1.0, h.shape[-1], dtype=h.dtype)),
    "clamp": lambda h: h.clamp_(-0.8, 0.8),
    "temperature": lambda h: h.div_(0.5),
    "part": part_,
    "used-before": used_before_,
    "twice": lambda h: part_(h.transpose(0, 1)).mul_(2.0),
    "none": lambda h: h,
}


def build(layer: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    return LAYERS[layer]().double(), torch.randn(M, T, N, dtype=F64)


def loss_of(model: nn.Module, x: Tensor, change: Callable[[Tensor], Tensor], spare: bool = False) -> Tensor:
    """The mean over the samples; with ``spare`` a copy of the output is written over."""
    h = model(x)
    return torch.sin(change(h.clone() if spare else h)).square().sum() / M


def matrix_of(row: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The parameter of a row, and the matrix in it."""
    part = row.rpartition(".")[2]
    if part in ("q", "k", "v"):
        return "inner.in_proj_weight", lambda w: w.chunk(3)["qkv".index(part)]
    return {"out_proj": "inner.out_proj.weight", "mix": "mix"}.get(part, "weight"), lambda w: w.flatten(1)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_written_over(layer: str, operation: str) -> None:
    model, x = build(layer)
    change = OPERATIONS[operation]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    samples = {
        name: per_sample(model, [name], lambda m, i: loss_of(m, x[i : i + 1], change, spare=True), M)
        for name, p in model.named_parameters()
    }
    with LipschitzMonitor(model, optimizer) as monitor:
        loss_of(model, x, change).backward()
        optimizer.step()
    for row in monitor.history.rows[:-1]:
        assert row["status"] == "ok"
        name, matrix = matrix_of(row["layer"])
        step = flat([model.get_parameter(name).detach() - before[name]])
        compare(row, forces([before[name]], matrix, samples[name], torch.ones_like(step), step, 1e-3))


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
@pytest.mark.parametrize("layer", ["linear", "attention-batch-first"])
def test_in_place_or_not(layer: str, dtype: torch.dtype, kind: Any, reentrant: bool | None) -> None:
    """In half precision, in checkpoints, and where outputs are kept until the step: the rows do not differ."""

    def rows(spare: bool) -> list[dict[str, Any]]:
        model, x = build(layer)
        model = model.to(torch.float32 if dtype == torch.bfloat16 else dtype)
        x = x.to(next(model.parameters()).dtype).requires_grad_()
        optimizer = kind(model.parameters(), lr=1e-3)

        def forward(x: Tensor) -> Tensor:
            return loss_of(model, x, torch.relu_, spare)

        with LipschitzMonitor(model, optimizer) as monitor:
            for _ in range(2):
                optimizer.zero_grad()
                for part in x.detach().chunk(2):
                    part.requires_grad_()
                    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                        loss = (
                            forward(part) if reentrant is None else checkpoint(forward, part, use_reentrant=reentrant)
                        )
                    loss.backward()
                optimizer.step()
        return monitor.history.rows

    for row, expected in zip(rows(False), rows(True), strict=True):
        assert (row["status"], row["batch"]) == (expected["status"], M)
        for key in ("mu", "kappa", "lambda_sq"):
            assert math.isfinite(row[key])
            assert row[key] == pytest.approx(expected[key], rel=1e-9)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_a_single_image(kind: Any) -> None:
    """Without a batch axis a convolution returns a view, too."""
    rows = []
    for operation in (torch.relu_, torch.relu):
        torch.manual_seed(1)
        model = kind(T, 5, 2).double()
        with LipschitzMonitor(model, torch.optim.SGD(model.parameters(), lr=1e-3)) as monitor:
            operation(model(torch.randn(T, N, dtype=F64))).square().sum().backward()
            monitor._optimizer.step()
        rows.append(monitor.history.rows[0])
    assert rows[0]["status"] == rows[1]["status"]
    assert rows[0]["mu"] == pytest.approx(rows[1]["mu"], rel=1e-12)


def test_a_layer_that_passes_its_input_on() -> None:
    """What it returns is the output of another: both are hooked, and each row speaks for itself."""

    class Off(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x.view_as(x)

    model = nn.Sequential(nn.Linear(N, N), Off(N, N), nn.ReLU(inplace=True))
    with LipschitzMonitor(model, torch.optim.SGD(model.parameters(), lr=1e-3)) as monitor:
        x = torch.randn(M, T, N)
        (model(x).square().sum() + model[0](x).sum()).backward()
        monitor._optimizer.step()
    assert [row["status"] for row in monitor.history.rows[:2]] == ["ok", "no gradient reached this layer"]


def test_an_empty_batch_written_over() -> None:
    model, x = build("linear")
    with LipschitzMonitor(model, torch.optim.SGD(model.parameters(), lr=1e-3)) as monitor:
        loss_of(model, x[:0], torch.relu_).backward()
        monitor._optimizer.step()
    assert monitor.history.rows[0]["status"] == "no samples reached this layer"


def test_outputs_that_are_repeated() -> None:
    """Several elements share a place of the base, which then has all their gradients."""

    class Repeats(Own):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, None].expand(-1, T, -1)

    model = Repeats()
    with LipschitzMonitor(model, torch.optim.SGD(model.parameters(), lr=1e-3)) as monitor:
        model(torch.randn(M, N)).square().mean().backward()
        monitor._optimizer.step()
    assert monitor.history.rows[0]["status"] == "ok"


def test_passes_through_a_retained_graph() -> None:
    model, x = build("linear")
    with LipschitzMonitor(model, torch.optim.SGD(model.parameters(), lr=1e-3)) as monitor:
        loss = loss_of(model, x, torch.relu_)
        loss.backward(retain_graph=True)
        loss.backward()
        monitor._optimizer.step()
    assert monitor.history.rows[0]["status"] == "several backward passes through one forward pass"


FIRST: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(N, N),
    "convolution": lambda: nn.Conv1d(T, T, 3, padding=1),
    "attention": lambda: Attention(True),
    "fallback": Own,
    "embedding": lambda: nn.Embedding(7, N),
}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"noise": "split"}),
        (torch.optim.SGD, {"noise": "factor"}),
        (torch.optim.AdamW, {}),
        (torch.optim.RMSprop, {"noise": "split"}),
    ],
)
@pytest.mark.parametrize("first", FIRST)
def test_inputs_written_over_before_the_step(first: str, kind: Any, settings: dict[str, Any]) -> None:
    """By the next batch, in a buffer that is always the same: the rows are those of batches of their own."""
    rows = []
    for reused in (True, False):
        torch.manual_seed(1)
        model = nn.Sequential(FIRST[first](), nn.Tanh(), nn.Linear(N, 2)).double()
        optimizer = kind(model.parameters(), lr=1e-3)
        batches = [torch.randint(7, (M, T)) if first == "embedding" else torch.randn(M, T, N).double() for _ in "1234"]
        place = torch.empty_like(batches[0])
        with LipschitzMonitor(model, optimizer, **settings) as monitor:
            for x, following in itertools.pairwise(batches):
                optimizer.zero_grad()
                if reused:
                    place.copy_(x)
                model(place if reused else x).square().mean().backward()
                if reused:
                    place.copy_(following)
                optimizer.step()
        rows.append(monitor.history.rows)
    for row, expected in zip(*rows, strict=True):
        assert row["status"] == "ok"
        for key, value in expected.items():
            assert row[key] == (pytest.approx(value, rel=1e-12, nan_ok=True) if isinstance(value, float) else value)
