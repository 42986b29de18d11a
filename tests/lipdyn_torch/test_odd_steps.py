"""Steps that are not one backward pass through every layer: what is told from what, and what is said of it."""

from __future__ import annotations

import copy
import io
import math
import warnings

import pytest
import torch
from dense_forces import compare, forces, per_sample
from torch import Tensor, nn
from torch.nn import functional

from lipdyn_torch import LipschitzMonitor


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def by_layer(monitor: LipschitzMonitor, step: int) -> dict[str, dict]:
    return {row["layer"]: row for row in monitor.history.rows if row["step"] == step}


class Twins(nn.Module):
    """Two critics that share their input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(), mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


def test_contributions_of_another_loss_are_gone_with_the_gradients():
    """One critic has those of the actor's loss; they are cleared after the next forward pass, as in TD3."""
    model = Twins()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        for _ in range(3):
            first, second = model(torch.randn(8, 6).double())
            optimizer.zero_grad()
            (first.square().mean() + second.square().mean()).backward()
            optimizer.step()
            model.a(torch.randn(8, 6).double()).mean().backward()
    assert {row["status"] for row in monitor.history.rows} == {"ok"}
    assert {row["batch"] for row in monitor.history.rows} == {8}


@pytest.mark.parametrize("size", [4, 6])
def test_positions_in_a_square(size):
    """Relative positions index a table at as many rows as there are samples, the same in every step: that is said."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(11, 5), nn.Embedding(7, 1)

        def forward(self, x: Tensor) -> Tensor:
            t = torch.arange(x.shape[1])
            bias = self.places((t[None] - t[:, None]).clamp(-3, 3) + 3)[..., 0]
            return (bias.softmax(-1) @ self.words(x)).square()

    model = Biased()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randint(11, (4, size))).mean().backward()
            optimizer.step()
    for step in (1, 2):
        rows = by_layer(monitor, step)
        if size == 4:
            assert "the same indices as before" in rows["places"]["status"]
            assert rows["words"]["status"] == "ok"
        else:
            assert "different numbers of samples" in rows["places"]["status"]


def test_an_overflow_of_a_bias_alone():
    """A step that a scaler leaves out is counted, whichever gradient overflows."""
    model = mlp(torch.float32)
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}], 0.2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with LipschitzMonitor(model, optimizer) as monitor:
        for step in range(4):
            optimizer.zero_grad()
            extra = (model[2].bias * math.inf).sum() if step == 1 else 0.0
            scaler.scale(model(torch.randn(8, 6)).square().mean() + extra).backward()
            assert model[2].weight.grad.isfinite().all()
            scaler.step(optimizer)
            scaler.update()
    assert monitor.history.steps == [0, 1, 2, 3]
    rows = by_layer(monitor, 1)
    assert all("gradients were cleared without a step" in row["status"] for row in rows.values())
    assert {name: row["lr"] for name, row in rows.items()} == {"0": 0.1, "2": 0.2, "network": 0.2}
    assert by_layer(monitor, 2)["0"]["status"].startswith(("ok", "gradients were rescaled"))


def test_a_step_of_what_nobody_watches():
    """Of an auxiliary loss on a part that is not monitored: a step like others, in which no layer had a gradient."""
    model = nn.ModuleDict({"lstm": nn.LSTM(6, 6, batch_first=True), "head": nn.Linear(6, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        for step in range(4):
            optimizer.zero_grad()
            hidden, _ = model["lstm"](torch.randn(5, 7, 6))
            (model["head"](hidden[:, -1]) if step % 2 else hidden).square().mean().backward()
            optimizer.step()
    assert [by_layer(monitor, step)["head"]["status"] for step in range(4)] == [
        "no gradient reached this layer",
        "ok",
    ] * 2
    assert by_layer(monitor, 2)["head"]["dz"] == 0.0


def test_a_step_of_a_penalty_alone():
    """Once the hooks were heard, a gradient that comes past them is a row's remark and no error."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        for step in range(3):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 6).double()).square().mean()
            (sum(p.square().sum() for p in model.parameters()) if step == 1 else loss).backward()
            optimizer.step()
    rows = by_layer(monitor, 1)
    assert "a gradient reached the weight past the monitor" in rows["0"]["status"]
    assert math.isnan(rows["0"]["mu"])
    assert abs(rows["0"]["remainder"]) <= rows["0"]["bound"]
    assert {row["status"] for row in by_layer(monitor, 2).values()} == {"ok"}


def test_sharpness_aware_steps_of_adam():
    """Gradients at a weight nearby, the weight put back: with Adam samples are contracted at the step, rightly."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-3)
    with LipschitzMonitor(model, optimizer, noise="split") as monitor:
        for step in range(2):
            x = torch.randn(8, 6).double()
            moved = {p: 0.01 * torch.randn_like(p) for p in model.parameters()}
            with torch.no_grad():
                for p, e in moved.items():
                    p.add_(e)
            optimizer.zero_grad()
            model(x).square().mean().backward()

            def loss(m: nn.Module, i: int, x: Tensor = x) -> Tensor:
                return m(x[i : i + 1]).square().mean() / 8

            G = per_sample(model, ["0.weight"], loss, 8)
            with torch.no_grad():
                for p, e in moved.items():
                    p.sub_(e)
            old = model[0].weight.detach().clone()
            optimizer.step()
            row = by_layer(monitor, step)["0"]
            assert row["status"] in ("ok", "weight was changed since the last step")
            second = optimizer.state[model[0].weight]["exp_avg_sq"] / (1 - 0.999 ** (step + 1))
            W, b = 1 / (second.sqrt() + 1e-3), model[0].weight.detach() - old
            expected = forces([old], lambda w: w, G, W.flatten(), b.flatten(), 0.01)
            compare(row, expected, ["mu", "kappa", "lambda_sq", "kappa_var", "lambda_sq_var"])


def test_layers_unfrozen_one_by_one():
    """Those that were frozen when the monitor was attached are monitored when they are given to the optimizer."""
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor, warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2):
            optimizer.zero_grad()
            model(torch.randn(8, 6).double()).square().mean().backward()
            optimizer.step()
            if step == 0:
                model[0].requires_grad_(True)
                optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.05})
    assert by_layer(monitor, 0)["0"]["status"] == "frozen"
    assert by_layer(monitor, 1)["0"]["status"] == "ok"
    assert by_layer(monitor, 1)["0"]["kappa"] > 0


class Nested(nn.Module):
    """Its tensors come in a tuple and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))

    def forward(self, pair: tuple[Tensor, Tensor], *, extra: dict[str, Tensor]) -> Tensor:
        return (pair[0] * pair[1] + extra["shift"]) @ self.mix


def test_arguments_in_tuples_and_dicts():
    model = nn.ModuleDict({"first": nn.Linear(6, 6), "nested": Nested()}).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y, shift = torch.randn(3, 8, 6, dtype=torch.float64)

    def run(model: nn.Module, which: slice) -> Tensor:
        hidden = model["first"](x[which])
        return model["nested"]((hidden, y[which]), extra={"shift": shift[which]}).square().sum() / 8

    with LipschitzMonitor(model, optimizer) as monitor:
        G = per_sample(model, ["nested.mix"], lambda m, i: run(m, slice(i, i + 1)), 8)
        old = model["nested"].mix.detach().clone()
        run(model, slice(None)).backward()
        b = -0.05 * model["nested"].mix.grad.flatten()
        optimizer.step()
    row = by_layer(monitor, 0)["nested.mix"]
    assert row["status"] == "ok"
    compare(row, forces([old], lambda w: w, G, torch.ones(24).double(), b, 0.05))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    """Those of strided layout cannot be read; they do not stop the training either."""
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        ragged = torch.nested.nested_tensor([torch.randn(n, 6) for n in (2, 3, 4)], layout=layout)
        sum(part.square().sum() for part in model(ragged).unbind()).backward()
        optimizer.step()
    row = by_layer(monitor, 0)["Linear"]
    if layout is torch.strided:
        assert row["status"].startswith("nested tensors of strided layout cannot be read")
    assert math.isfinite(row["dz"])


def test_a_batch_written_over_before_the_backward_pass():
    """Under autocast autograd has a copy of its own, and lets that be done."""
    rows = []
    for over in (False, True):
        torch.manual_seed(1)
        model = mlp(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        buffer = torch.randn(8, 6)
        with LipschitzMonitor(model, optimizer) as monitor:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(buffer).square().mean()
            if over:
                buffer.copy_(torch.randn(8, 6))
            loss.backward()
            optimizer.step()
        rows.append(monitor.history.rows)
    assert {row["status"] for row in rows[0]} == {"ok"}
    for row, other in zip(*rows, strict=True):
        assert (row["kappa"], row["mu"], row["status"]) == (other["kappa"], other["mu"], other["status"])


def test_gradients_clipped_by_value_in_half_precision_say_so():
    model = mlp(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(10 * torch.randn(64, 6)).square().mean()
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 1e-4)
        optimizer.step()
    for name in ("0", "2"):
        assert "clipped by value" in by_layer(monitor, 0)[name]["status"]


def test_a_model_that_carries_its_monitor():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        model.monitor = monitor
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        for twin in (torch.load(stream, weights_only=False), copy.deepcopy(model)):
            assert type(twin.monitor).__name__ == "Detached"
            functional.mse_loss(twin(torch.randn(8, 6).double()), torch.zeros(8, 3).double()).backward()
        assert model.monitor is monitor


@pytest.mark.parametrize("way", ["checkpoint", "twice"])
def test_a_table_used_again_in_the_same_step(way):
    """New words each time, as many as there are samples: nothing is said."""

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(50, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            if way == "twice":
                return self.head(self.words(x) + self.words(x))
            return torch.utils.checkpoint.checkpoint(lambda x: self.head(self.words(x)), x, use_reentrant=False)

    model = Text()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randint(50, (4, 4))).square().mean().backward()
            optimizer.step()
    assert {row["status"] for row in monitor.history.rows} == {"ok"}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_indices_in_nested_tensors_do_not_stop_the_training():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            x = torch.nested.nested_tensor([torch.randint(10, (n,)) for n in (3, 5)], layout=torch.jagged)
            model(x).values().square().mean().backward()
            optimizer.step()
    assert monitor.history.steps == [0, 1, 2]


@pytest.mark.parametrize("way", ["added", "unfrozen"])
def test_a_step_of_a_parameter_that_came_later(way):
    """No hook is on it; the gradient is there to see."""
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    model[1].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained if way == "added" else model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        for step in range(2):
            optimizer.zero_grad()
            if step == 1:
                model[1].requires_grad_(True)
                if way == "added":
                    optimizer.add_param_group({"params": list(model[1].parameters())})
                model[1](torch.randn(8, 5)).square().mean().backward()
            else:
                model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
    assert by_layer(monitor, 1)["0"]["status"] == "no gradient reached this layer"


def test_copies_of_a_method_of_a_monitor():
    model = mlp()
    with LipschitzMonitor(model, torch.optim.SGD(model.parameters(), lr=0.1)) as monitor:
        model.log = monitor.report
        assert copy.deepcopy(model).log is not model.log
