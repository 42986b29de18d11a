"""Optimisers with memory, preconditioners and weight decay against dense definitions and simulation."""

from __future__ import annotations

import math

import pytest
import torch
from dense_forces import compare, forces, per_sample
from torch import nn
from torch.nn import functional

from lipdyn_torch import LipschitzMonitor, MeanGradient
from lipdyn_torch.layers import register_rule
from lipdyn_torch.low_rank import LowRankSumRule

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3),
    "adam-coupled-amsgrad": lambda p: torch.optim.Adam(p, lr=2e-3, weight_decay=0.1, amsgrad=True),
    "adam-maximize-eps": lambda p: torch.optim.Adam(p, lr=2e-3, maximize=True, eps=1e-3, betas=(0.8, 0.95)),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=2e-3, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, weight_decay=0.1),
    "rmsprop-centered-momentum": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.5),
    "heavy-ball": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.25, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "tensor-lr": lambda p: torch.optim.SGD(p, lr=torch.tensor(1e-2), foreach=False),
}


def setting(noise: str):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2, stride=2),
        nn.Tanh(),
        nn.Flatten(2),
        nn.Linear(4, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(9, 3),
    ).double()
    x, y = torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.randint(3, (6,))
    return model, x, y, noise


def long_run(optimizer: torch.optim.Optimizer, p: nn.Parameter, old: torch.Tensor, grad: torch.Tensor, first: bool):
    """(W, gain, b) of theory 5, read from the state after the step."""
    group, state = optimizer.param_groups[0], optimizer.state[p]
    lr, change, decay = float(group["lr"]), p.detach() - old, group["weight_decay"]
    ones = torch.ones_like(p).detach()
    if isinstance(optimizer, torch.optim.SGD):
        gain = (1 if first else 1 - group["dampening"]) / (1 - group["momentum"])  # the first gradient is not damped
        return ones, gain, -lr * gain * (grad + decay * old)
    if isinstance(optimizer, torch.optim.Adam):
        second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        corrected = second / (1 - group["betas"][1] ** float(state["step"]))
        # with decoupled decay, the rest of the change is Adam's own
        return 1 / (corrected.sqrt() + group["eps"]), 1.0, change
    second = state["square_avg"] - (state["grad_avg"].square() if group["centered"] else 0.0)
    W, gain = 1 / (second.sqrt() + group["eps"]), 1 / (1 - group["momentum"])
    return W, gain, -lr * gain * W * (grad + decay * old)


@pytest.mark.parametrize("noise", ["full", "split"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_forces_are_their_dense_definition(name, noise):
    model, x, y, _ = setting(noise)
    optimizer = OPTIMIZERS[name](model.parameters())
    monitor = LipschitzMonitor(model, optimizer, noise=noise)
    for step in range(3):
        G = {
            layer: per_sample(
                model, [f"{layer}.weight"], lambda m, i: functional.cross_entropy(m(x[i : i + 1]), y[i : i + 1]) / 6, 6
            )
            for layer in monitor.layers
        }
        old = {layer: model.get_parameter(f"{layer}.weight").detach().clone() for layer in monitor.layers}
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        rows = {row["layer"]: row for row in monitor.history if row["step"] == step}
        for layer in monitor.layers:
            p = model.get_parameter(f"{layer}.weight")
            W, gain, b = long_run(optimizer, p, old[layer], p.grad, step == 0)
            lr = float(optimizer.param_groups[0]["lr"])
            expected = forces([old[layer]], lambda w: w.flatten(1), G[layer], W.reshape(-1), b.reshape(-1), lr, gain)
            if "adamw" in name:
                # decoupled decay multiplies the weight: exactly log(1 - lr wd), on top of Adam's own change
                own = b + lr * 0.1 * old[layer]
                J_own = forces([old[layer]], lambda w: w.flatten(1), G[layer], W.reshape(-1), own.reshape(-1), lr)
                expected = J_own
                expected.mu += math.log1p(-lr * 0.1) / lr
            assert rows[layer]["status"] == "ok"
            compare(rows[layer], expected)
            if noise == "split":
                compare(rows[layer], expected, ["kappa_var", "lambda_sq_var"])
        assert rows["network"]["status"] == "ok"


def test_schedules_are_read_at_each_step():
    model, x, y, _ = setting("full")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with LipschitzMonitor(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    assert [row["lr"] for row in monitor.history if row["layer"] == "network"] == [0.1, 0.05, 0.025]
    assert {row["status"] for row in monitor.history} == {"ok"}


def test_a_step_of_another_formula_is_noticed():
    """A subclass that does something else with the gradient: the path stays right, the forces are NaN."""

    class Doubled(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data -= 2 * group["lr"] * p.grad

    model, x, y, _ = setting("full")
    optimizer = Doubled(model.parameters(), lr=0.01)
    with LipschitzMonitor(model, optimizer) as monitor:
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for row in monitor.history.rows[:-1]:
        assert row["status"].startswith("the step is not the one the optimizer's formula gives")
        assert math.isnan(row["mu"])
        assert math.isnan(row["kappa"])
        assert abs(row["remainder"]) <= row["bound"]


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_noise_by_simulation(nesterov):
    """A constant gradient plus noise: the spread of sigma after many steps is that of the long-run response.

    Source: theory 5 with its exact finite window ``eta^2 sum_j ((1 - beta^j)/(1 - beta))^2``; the covariance of a
    single step is 15 times too small.
    """
    torch.manual_seed(0)
    steps, paths, lr, beta, m, n, batch = 120, 4000, 1e-4, 0.9, 3, 4, 16
    layer = nn.Linear(n, m, bias=False).double()
    start = layer.weight.detach().clone()
    u, _, vh = torch.linalg.svd(start)
    J = torch.outer(u[:, 0], vh[0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=beta, nesterov=nesterov)
    inputs = torch.randn(4096, n, dtype=torch.float64)  # loss = mean of a . W x: gradients do not depend on W
    a = torch.randn(4096, m, dtype=torch.float64)
    predicted = []
    with LipschitzMonitor(layer, optimizer, sampling="iid") as monitor:
        for _ in range(4):
            pick = torch.randint(4096, (128 * batch,))
            optimizer.zero_grad()
            (layer(inputs[pick]) * a[pick]).sum(1).mean().backward()
            optimizer.step()
            row = monitor.history.rows[-2]
            predicted.append(row["lr"] * row["lambda_sq"] * row["sigma"] ** 2 * 128)
    per_step = sum(predicted) / len(predicted)  # J^T C J of one step's long-run effect
    scores = torch.einsum("im,mn,in->i", a, J, inputs)
    noise = scores[torch.randint(4096, (paths, steps, batch))].mean(2) - scores.mean()
    buffer, moved = torch.zeros(paths, dtype=torch.float64), torch.zeros(paths, dtype=torch.float64)
    for step in range(steps):
        buffer = beta * buffer + noise[:, step]
        moved -= lr * (noise[:, step] + beta * buffer if nesterov else buffer)
    j = torch.arange(1, steps + 1) + (1 if nesterov else 0)
    window = float((1 - beta**j).square().sum())  # steps that have had their full effect
    assert float(moved.var()) == pytest.approx(window * per_step, rel=0.12)
    naive = steps * per_step * (1 - beta) ** 2 / (1 - beta**2)
    assert float(moved.var()) > 10 * naive


MOMENTUM = {
    "heavy-ball": {"momentum": 0.9},
    "dampened": {"momentum": 0.9, "dampening": 0.6},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}


@pytest.mark.parametrize("settings", MOMENTUM.values(), ids=list(MOMENTUM))
def test_the_long_run_of_each_gradient_by_simulation(settings):
    """What torch's own steps make of one more gradient, with zeros ever after; the first fills an empty buffer."""
    torch.manual_seed(0)
    lr, x, y = 0.01, torch.randn(3, 8, 4, dtype=torch.float64), torch.randn(3, 8, 3, dtype=torch.float64)

    def moved(gradients):
        p = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
        optimizer = torch.optim.SGD([p], lr=lr, **settings)
        for g in [*gradients, *[torch.zeros(3, 4, dtype=torch.float64)] * 500]:
            p.grad = g.clone()
            optimizer.step()
        return p.detach()

    layer = nn.Linear(4, 3, bias=False).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, **settings)

    def loss(model, i):
        return (model(x[i]) - y[i]).square().sum(1).mean()

    same_batch = iter(range(3))
    reference = MeanGradient([x], lambda model, _: loss(model, next(same_batch)))
    gradients = []
    with LipschitzMonitor(layer, optimizer, reference=reference) as monitor:
        for i in range(3):
            old = layer.weight.detach().clone()
            G = per_sample(layer, ["weight"], lambda m, j, i=i: (m(x[i, j : j + 1]) - y[i, j]).square().sum() / 8, 8)
            optimizer.zero_grad()
            loss(layer, i).backward()
            gradients.append(layer.weight.grad.clone())
            optimizer.step()
            b = (moved(gradients) - moved([*gradients[:-1], torch.zeros_like(old)])).reshape(-1)
            gain = float(b.norm() / (lr * gradients[-1].norm()))
            expected = forces([old], lambda w: w, G, torch.ones_like(b), b, lr, gain)
            row = monitor.history.rows[-2]
            compare(row, expected)
            assert row["mu_ref"] == pytest.approx(expected.mu, rel=1e-10)


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 5)
        self.up, self.down = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


register_rule(Adapted, LowRankSumRule("base.weight", "up", "down"))


@pytest.mark.parametrize("trained", ["all", "factors"])
@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, betas=(0.0, 0.9)),
        lambda groups: torch.optim.SGD(groups, lr=1e-2, weight_decay=0.1, momentum=0.9),
        lambda groups: torch.optim.RMSprop(groups, lr=1e-2, weight_decay=0.1),
    ],
    ids=["adamw", "sgd", "rmsprop"],
)
def test_the_reference_of_the_very_batch_is_the_drift(make, trained):
    """Weight decay of every kind included, also where a matrix is made of several parameters with their own rates."""
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(), nn.Tanh(), nn.Linear(5, 3)).double()
    model[0].base.weight.requires_grad_(trained == "all")
    others = [p for name, p in model.named_parameters() if name != "0.up"]
    optimizer = make([{"params": [model[0].up], "lr": 2e-2, "weight_decay": 0.3}, {"params": others}])
    x = torch.randn(8, 6, dtype=torch.float64)
    reference = MeanGradient([x], lambda model, x: model(x).square().mean())
    with LipschitzMonitor(model, optimizer, reference=reference) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for row in monitor.history:
        assert row["status"] == "ok"
        assert row["mu_ref"] == pytest.approx(row["mu"], rel=1e-10)
