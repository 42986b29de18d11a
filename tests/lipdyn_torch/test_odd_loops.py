"""Loops in which steps, passes and batches do not follow one another as usual."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lipdyn_torch import LipschitzMonitor, pathwise, sde

RETAINED = "several backward passes through one forward pass"
POSITIONS = "indices without a batch axis, as many as there are samples: taken for one for each sample"

SHARED = "indices without a batch axis: expand them to the batch, positions.expand(batch, -1)"
LATENT = "a parameter without a batch axis, as many rows as there are samples: taken for one for each sample"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def loss_of(model: nn.Module, M: int = 8) -> torch.Tensor:
    return model(torch.randn(M, 6)).square().mean()


def statuses(monitor: LipschitzMonitor) -> dict[str, str]:
    return {row["layer"]: row["status"] for row in monitor.history if row["step"] == monitor.history.steps[-1]}


class Inner(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_step_inside_a_step_is_one(every, closure):
    """Torch puts its hooks around the step of every class, once there is an optimiser of that very class."""
    histories = []
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    for kind in (torch.optim.SGD, Inner):
        torch.manual_seed(0)
        model = mlp()
        optimizer = kind(model.parameters(), lr=0.1)

        def evaluate(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        with LipschitzMonitor(model, optimizer, every=every) as monitor:
            for _ in range(7):
                if closure:
                    optimizer.step(evaluate)
                else:
                    evaluate()
                    optimizer.step()
        histories.append(monitor.history)
    plain, inner = histories
    assert inner.steps == plain.steps == list(range(0, 7, every))
    assert inner.to_pandas().equals(plain.to_pandas())
    if every == 1:
        assert len(pathwise(inner).step) == 8


def test_a_step_inside_a_step_that_fails():
    class Fails(Inner):
        wanted = True

        def step(self, closure=None):
            result = super().step(closure)
            if self.wanted:
                self.wanted = False
                raise RuntimeError("not yet")
            return result

    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    model = mlp()
    optimizer = Fails(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        loss_of(model).backward()
        with pytest.raises(RuntimeError, match="not yet"):
            optimizer.step()
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert monitor.history.steps == [0, 1]
    assert {row["status"] for row in monitor.history} == {"ok"}


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, head: str) -> torch.Tensor:
        return getattr(self, head)(torch.tanh(self.trunk(x)))


@pytest.mark.parametrize("noise", ["full", "split", "factor"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"lr": 0.01}),
    ],
)
def test_a_head_without_samples_has_no_noise(kind, settings, noise):
    """Its gradient is left at zero, not None: the drift is known, and the samples' contributions are all zero."""
    model = Heads().double()
    optimizer = kind(model.parameters(), **settings)
    expected = {}
    with LipschitzMonitor(model, optimizer, sampling="iid", noise=noise) as monitor:
        for step in range(6):
            optimizer.zero_grad(set_to_none=False)
            model(torch.randn(8, 6).double(), "ab"[step % 2]).square().mean().backward()
            idle = model.b if step % 2 == 0 else model.a
            before = idle.weight.detach().clone()
            U, s, Vh = torch.linalg.svd(before)
            optimizer.step()
            if kind is torch.optim.AdamW:  # the step of this optimiser is its long-run drift
                change = float(U[:, 0] @ (idle.weight.detach() - before) @ Vh[0])
                expected[step] = change / (settings["lr"] * float(s[0]))
            else:  # the long run of coupled decay
                expected[step] = -settings.get("weight_decay", 0.0) / (1 - settings.get("momentum", 0.0))
    for row in monitor.history:
        if row["layer"] == "network":
            rows = [r for r in monitor.history if r["step"] == row["step"] and r is not row]
            assert row["mu"] == pytest.approx(sum(r["mu"] for r in rows), rel=1e-12)
            assert row["lambda_sq"] > 0
            continue
        if row["layer"] == "ba"[row["step"] % 2]:
            # before its first step with samples Adam has no gradient to go by
            assert row["status"] == (
                "no gradient reached this layer" if row["step"] == 0 else "no samples reached this layer"
            )
            assert (row["kappa"], row["lambda_sq"]) == (0.0, 0.0)
            if row["step"] > 0:
                assert row["batch"] == 8
                assert row["mu"] == pytest.approx(expected[row["step"]], rel=1e-4, abs=1e-7)
                if noise == "factor" and row["step"] == 5:
                    F = monitor.noise[row["layer"]].factor()
                    assert F.shape == (8, 15)
                    assert not F.any()
                if noise != "full":
                    assert (row["kappa_var"], row["lambda_sq_var"], row["kappa_cov"]) == (0.0, 0.0, 0.0)
        else:
            assert row["status"] == "ok"
            assert row["lambda_sq"] > 0
    assert math.isfinite(sde(monitor.history).predicted[-1])


def test_a_head_without_samples_is_asked_for_something_else():
    """Its gradient for the inputs, between the backward pass and the step, which reaches no weight."""
    model = Heads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        for head in "ab":
            optimizer.zero_grad(set_to_none=False)
            model(torch.randn(8, 6), head).square().mean().backward()
            x = torch.randn(4, 6, requires_grad=True)
            torch.autograd.grad(model(x, "a").sum(), x)
            optimizer.step()
    assert statuses(monitor)["a"] == "no samples reached this layer"
    assert {row["batch"] for row in monitor.history if row["step"] == 1} == {8}
    assert math.isfinite(monitor.history.rows[-1]["lambda_sq"])


def test_a_gradient_of_one_head_added_by_hand():
    model = Heads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        model(torch.randn(8, 6), "b").square().mean().backward()
        x = torch.randn(8, 6)
        loss = model(x, "a").square().mean()
        model.a.weight.grad, model.a.bias.grad = torch.autograd.grad(loss, [model.a.weight, model.a.bias])
        optimizer.step()
    assert statuses(monitor)["a"] == "ok"
    assert monitor.history.rows[1]["lambda_sq"] > 0


def test_a_frozen_layer_under_a_retained_graph():
    model = mlp()
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        x = torch.randn(8, 6, requires_grad=True)
        loss = model(x).square().mean()
        loss.backward(retain_graph=True)
        torch.autograd.grad(loss, x)
        optimizer.step()
    assert statuses(monitor) == {"0": "ok", "2": "frozen", "network": "ok"}


def test_half_a_forward_pass_before_the_last_step():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model[0](torch.randn(8, 6))
    with LipschitzMonitor(model, optimizer, every=2) as monitor:
        for _ in range(5):
            optimizer.zero_grad()
            model[2](model[1](first)).square().mean().backward(inputs=[model[0].weight, model[2].weight])
            first = model[0](torch.randn(8, 6))
            optimizer.step()
    found = statuses(monitor)
    assert found["0"] == "forward pass was made before the last step, while the monitor was not listening"
    assert found["2"] == "ok"


@pytest.mark.parametrize("every", [2, 3])
def test_a_forward_pass_before_the_last_step(every):
    """While the monitor is idle it hears of none: the row says so, and the training goes on."""
    model = nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer, every=every) as monitor:
        loss = loss_of(model)
        for _ in range(7):
            optimizer.zero_grad()
            loss.backward()
            loss = loss_of(model)
            optimizer.step()
    rows = [row for row in monitor.history if row["layer"] == "Linear"]
    assert [row["step"] for row in rows] == list(range(0, 7, every))
    assert rows[0]["status"] == "ok"
    for row in rows[1:]:
        assert row["status"] == "forward pass was made before the last step, while the monitor was not listening"
        assert math.isnan(row["mu"])
        assert abs(row["dz"] - row["dz2"]) <= row["bound"]


def test_passes_through_a_retained_graph_that_reach_no_weight():
    """Rows of the Jacobian for the inputs, between the backward pass and the step."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        loss_of(model).backward()
        x = torch.randn(4, 6, requires_grad=True)
        out = model(x)
        for i in range(3):
            torch.autograd.grad(out[:, i].sum(), x, retain_graph=True)
        optimizer.step()
        assert set(statuses(monitor).values()) == {"ok"}
        assert monitor.history.rows[-1]["batch"] == 8
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        assert statuses(monitor)["0"] == RETAINED


@pytest.mark.parametrize(("M", "T"), [(6, 6), (5, 6)])
def test_positions_that_could_be_samples(M, T):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions, self.head = nn.Embedding(11, 8), nn.Embedding(6, 8), nn.Linear(8, 11)

        def forward(self, t, positions):
            return self.head(torch.tanh(self.tokens(t) + self.positions(positions)))

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        for positions in (torch.arange(T), torch.arange(T).expand(M, -1)):
            optimizer.zero_grad()
            t = torch.randint(11, (M, T))
            nn.functional.cross_entropy(model(t, positions).flatten(0, 1), t.flatten()).backward()
            optimizer.step()
            found = statuses(monitor)
            if positions.ndim == 2:
                assert set(found.values()) == {"ok"}
            elif M == T:
                assert (found["tokens"], found["positions"], found["head"]) == ("ok", POSITIONS, "ok")
            else:
                assert found["positions"] == f"layers saw different numbers of samples: {M}, {T}; {SHARED}"


class Tables(nn.Module):
    """Tokens as rows or columns, positions as Hugging Face's models read them, and layers over samples or tokens."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat, self.tokens, self.positions = flat, nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, t: torch.Tensor, positions: torch.Tensor, time_first: bool) -> torch.Tensor:
        h = self.tokens(t.T if time_first else t)
        h = (h.mT.permute(2, 0, 1) if time_first else h) + self.positions(positions)
        return self.c(torch.tanh(self.b(self.a(h.flatten(0, 1) if self.flat else h))))


@pytest.mark.parametrize(
    ("shape", "flat", "time_first", "said"),
    [
        ((1, 6), False, False, {"positions"}),
        ((6,), False, False, {"positions"}),
        ((5, 6), False, False, set()),
        ((5, 6), True, False, set()),  # indices have the batch, other layers see tokens
        ((5, 6), False, True, set()),  # batch_dim is what would help
    ],
)
@pytest.mark.parametrize("passes", [1, 2])
def test_indices_that_all_samples_share(shape, flat, time_first, said, passes):
    model = Tables(flat)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        for _ in range(passes):
            t = torch.randint(11, (5, 6))
            out = model(t, torch.arange(6).expand(shape), time_first)
            nn.functional.cross_entropy(out.reshape(-1, 11), t.flatten()).backward()
        optimizer.step()
    found = statuses(monitor)
    assert {name for name, status in found.items() if SHARED in status} - {"network"} == said
    assert ("tokens" in {name for name, status in found.items() if "different" in status}) == (flat or time_first)


class Latents(nn.Module):
    """Queries that are learned, one head of attention over the tokens, and a head of the usual kind."""

    def __init__(self, expanded: bool) -> None:
        super().__init__()
        self.queries, self.expanded = nn.Parameter(torch.randn(5, 4)), expanded
        self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(3, 6)
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries = self.q(self.queries.expand(len(x), -1, -1) if self.expanded else self.queries)
        found = torch.softmax(queries @ self.k(x).mT, -1) @ self.v(x)
        return self.head(torch.tanh(self.inner(found)).mean(1))


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("M", [5, 7])
def test_learned_queries_that_could_be_samples(M, expanded):
    model = Latents(expanded)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with LipschitzMonitor(model, optimizer, noise="split") as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(M, 9, 3)).square().mean().backward()
            optimizer.step()
    found = statuses(monitor)
    network = found.pop("network")
    if expanded:
        assert set(found.values()) == {"ok"}
    elif M == 5:
        assert found == {"q": LATENT, "k": "ok", "v": "ok", "inner": "ok", "head": "ok"}
        assert network == f"q: {LATENT}"
    else:
        assert "different numbers of samples: 5, 7" in found["q"]


def test_codes_that_are_learned_for_each_sample():
    """All samples in one batch: the rows of the parameter are what it is taken for."""
    codes = nn.Parameter(torch.randn(8, 6))
    model = mlp()
    optimizer = torch.optim.SGD([codes, *model.parameters()], lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        model(codes).square().mean().backward()
        optimizer.step()
    assert set(statuses(monitor).values()) == {"ok"}
    assert codes.grad is not None


def test_another_optimizer_takes_over():
    """As after unfreezing: the steps of the new one are missed, and that is said."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        for step in range(105):
            if step == 3:
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer.zero_grad()
            if step < 103:
                loss_of(model).backward()
            else:
                with pytest.warns(UserWarning, match="got 100 cleared gradients without one"):
                    loss_of(model).backward()
                break
            optimizer.step()
    assert monitor.history.steps == [0, 1, 2]


def test_a_wrapper_that_was_never_made_an_optimizer():
    class Wrapper(torch.optim.Optimizer):
        """As that of accelerate: an optimiser by its class alone."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        @property
        def param_groups(self):
            return self.optimizer.param_groups

        def step(self, closure=None):
            self.optimizer.step(closure)

        def zero_grad(self, set_to_none=True):
            self.optimizer.zero_grad(set_to_none)

    class Lookahead(Wrapper):
        def __init__(self, optimizer):
            super().__init__(optimizer)
            self.defaults, self.state = optimizer.defaults, optimizer.state

    model = mlp()
    LipschitzMonitor(model, Lookahead(torch.optim.SGD(model.parameters(), lr=0.1))).close()
    optimizer = Wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with LipschitzMonitor(model, optimizer) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert monitor.history.steps == [0, 1, 2]
    assert monitor.history.meta["optimizer"] == "SGD"
    with pytest.raises(TypeError, match="got Wrapper without hooks; give the monitor the optimizer inside it"):
        LipschitzMonitor(model, Wrapper(None))
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_that_are_not_meant_for_a_step():
    """Maps of what a trained model looks at, between two epochs: nobody else makes steps."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            for _ in range(150):
                model.zero_grad()
                model(torch.randn(2, 6)).sum().backward()
    assert monitor.history.steps == [0, 1]
    assert {row["batch"] for row in monitor.history} == {8}
