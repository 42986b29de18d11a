"""The monitor changes nothing, keeps nothing, and says what it cannot measure."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lipdyn_torch import (
    JsonLinesSink,
    LipschitzMonitor,
    NoBackwardError,
    NoSupportedLayerError,
    UnownedParametersError,
    _bridge,
    _collect,
    _hooks,
    _measure,
    distributed,
    monitor,
    read_history,
)
from lipdyn_torch.layers import LinearRule

FORCES = ["mu", "kappa", "lambda_sq"]


def train(case, monitored: bool, steps: int, **settings):
    """Train in float32 with data drawn from torch's global generator, evaluating now and then."""
    model = case.model(torch.float32)
    model.insert(len(model), nn.Dropout(0.1))  # uses the global generator in every step
    optimizer = case.optimizer(model)
    monitor = LipschitzMonitor(model, optimizer, **settings) if monitored else None
    losses = []
    for step in range(steps):
        losses.append(case.step(model, optimizer, step))
        if step % 7 == 0:
            with torch.no_grad():
                model(case.data(step, torch.float32)[0])
    return model, optimizer, torch.stack(losses), torch.get_rng_state(), monitor


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("settings", [{}, {"noise": "split"}, {"every": 3}], ids=["full", "split", "every"])
def test_fifty_steps_are_bitwise_the_same(case, settings):
    model, optimizer, losses, rng, _ = train(case, False, 50)
    watched, watched_optimizer, watched_losses, watched_rng, monitor = train(case, True, 50, **settings)
    assert torch.equal(losses, watched_losses)
    assert torch.equal(rng, watched_rng)
    for (name, p), q in zip(model.named_parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert torch.equal(p.grad, q.grad), name
    state, watched_state = optimizer.state_dict(), watched_optimizer.state_dict()
    assert state["param_groups"] == watched_state["param_groups"]
    assert str(state["state"]) == str(watched_state["state"])
    assert list(watched.state_dict()) == list(model.state_dict())
    assert len(monitor.history.steps) == len(range(0, 50, settings.get("every", 1)))
    start = case.model(torch.float32).parameters()
    moved = [not torch.equal(p, q) for p, q in zip(start, model.parameters(), strict=True)]
    assert all(moved)  # the comparison is of a training that went somewhere


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    count = sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())
    return count + len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_close_removes_every_hook_also_after_an_exception(mlp_case):
    model = mlp_case.model()
    optimizer = mlp_case.optimizer(model)
    clean = [hooks_of(model, optimizer), [set(vars(m)) for m in model.modules()]]
    monitor = LipschitzMonitor(model, optimizer)
    assert hooks_of(model, optimizer) > 0
    mlp_case.step(model, optimizer)
    monitor.close()
    monitor.close()
    with pytest.raises(KeyboardInterrupt), LipschitzMonitor(model, optimizer):
        raise KeyboardInterrupt
    assert [hooks_of(model, optimizer), [set(vars(m)) for m in model.modules()]] == clean
    mlp_case.step(model, optimizer)
    assert monitor.history.steps == [0]


def test_nothing_of_the_graph_outlives_the_step(mlp_case):
    """Not even the storage of a hidden layer's input, whatever tensor might still show it."""
    model = mlp_case.model()
    optimizer = mlp_case.optimizer(model)
    stored = []

    def remember(module, args, output):
        stored.append(StorageWeakRef(args[0].untyped_storage()))

    model[2].register_forward_hook(remember)
    with LipschitzMonitor(model, optimizer, noise="split") as monitor:
        for step in range(3):
            mlp_case.step(model, optimizer, step)
            gc.collect()
            assert all(storage.expired() for storage in stored)
        model(mlp_case.data()[0])  # a forward pass nobody differentiates
        gc.collect()
        assert [storage.expired() for storage in stored] == [True] * 4
        assert all(not watch.passes for watch in monitor._watches)


def test_evaluation_and_discarded_passes_do_not_count(mlp_case):
    model = mlp_case.model()
    optimizer = mlp_case.optimizer(model)
    with LipschitzMonitor(model, optimizer) as monitor:
        with torch.no_grad():
            model(mlp_case.data(5)[0])
        model(mlp_case.data(6)[0])
        mlp_case.step(model, optimizer)
    table = monitor.history.to_pandas()
    assert set(table["status"]) == {"ok"}
    assert set(table["batch"]) == {mlp_case.batch}


def test_copies_and_pickles_of_the_model_are_not_watched(mlp_case):
    model = mlp_case.model()
    optimizer = mlp_case.optimizer(model)
    with LipschitzMonitor(model, optimizer) as monitor:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            mlp_case.loss(twin(mlp_case.data()[0]), mlp_case.data()[1]).backward()
        assert not any(watch.passes for watch in monitor._watches)
        mlp_case.step(model, optimizer)
        assert torch.func.vmap(model)(mlp_case.data()[0]).shape == (mlp_case.batch, 3)
    assert {row["status"] for row in monitor.history} == {"ok"}


def test_a_step_with_a_closure_is_measured(mlp_case):
    tables = []
    for closure in (False, True):
        model = mlp_case.model()
        optimizer = mlp_case.optimizer(model)
        x, y = mlp_case.data()

        def evaluate(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = mlp_case.loss(model(x), y)
            loss.backward()
            return loss

        with LipschitzMonitor(model, optimizer) as monitor:
            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
        tables.append(monitor.history.to_pandas())
    assert tables[0].equals(tables[1])
    assert set(tables[0]["status"]) == {"ok"}


def test_weights_edited_between_steps_are_noticed(mlp_case):
    """Also edits through ``.data``, which leave the version counter alone."""
    model = mlp_case.model()
    optimizer = mlp_case.optimizer(model)
    with LipschitzMonitor(model, optimizer) as monitor:
        mlp_case.step(model, optimizer)
        model[0].weight.data.mul_(2.0)
        sigma = float(torch.linalg.matrix_norm(model[0].weight.detach(), 2))
        mlp_case.step(model, optimizer)
        x, y = mlp_case.data()
        optimizer.zero_grad()
        mlp_case.loss(model(x), y).backward()
        model[0].weight.data.mul_(2.0)
        optimizer.step()
    rows = [row for row in monitor.history if row["layer"] == "0"]
    assert rows[1]["sigma"] == pytest.approx(sigma, rel=1e-12)
    assert rows[1]["status"] == "weight was changed since the last step"
    assert math.isfinite(rows[1]["mu"])
    assert rows[2]["status"].startswith("weight was changed between backward and step")
    assert math.isnan(rows[2]["mu"])
    assert rows[2]["dz2"] == pytest.approx(rows[2]["dz"], abs=1e-3)


# --- wrong use -----------------------------------------------------------------------------------------------


def test_model_without_supported_layer():
    model = nn.Sequential(nn.LayerNorm(3), nn.LSTM(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NoSupportedLayerError, match=r"expected .* Linear or conv.*, got Sequential .*recurrent layer"):
        LipschitzMonitor(model, optimizer)


def test_optimizer_of_another_model(mlp_case):
    optimizer = mlp_case.optimizer(mlp_case.model())
    with pytest.raises(UnownedParametersError, match=r"expected an optimizer that trains .* got SGD .* of this very"):
        LipschitzMonitor(mlp_case.model(), optimizer)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_step_without_backward(mlp_case, steps_before):
    model = mlp_case.model()
    optimizer = mlp_case.optimizer(model)
    with LipschitzMonitor(model, optimizer) as monitor:
        for step in range(steps_before):
            mlp_case.step(model, optimizer, step)
        weights = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(NoBackwardError, match=r"expected a backward pass .* got none .* call loss.backward\(\)"):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
        mlp_case.step(model, optimizer)  # training can go on
    assert monitor.history.steps == list(range(steps_before + 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "expected every to be a whole number of steps, at least 1, or 'auto', got 0"),
        ({"every": "often"}, "expected every to be a whole number .* got 'often'"),
        ({"budget": 0}, "expected budget to be a positive number of per cent, got 0"),
        ({"warmup": -1}, "expected warmup to be a whole number of steps, got -1"),
        ({"every": torch.zeros(3)}, "expected every to be a whole number .* got tensor"),
        ({"noise": torch.zeros(3)}, "expected noise to be .* got tensor"),
        ({"every": True}, "expected every to be a whole number .* got True"),
        ({"noise": "sketch"}, "expected noise to be 'full' or 'split' or 'factor', got 'sketch'"),
        ({"conv": "fft"}, "expected conv to be 'matrix' or 'operator', got 'fft'"),
        ({"sampling": "sorted"}, "expected sampling to be 'shuffle' or 'iid', got 'sorted'"),
        ({"dataset_size": 0}, "expected dataset_size to be a positive whole number or None, got 0"),
        ({"sinks": ["history.jsonl"]}, "expected sinks with start, write and close, got 'history.jsonl'"),
    ],
)
def test_wrong_settings(mlp_case, settings, message):
    model = mlp_case.model()
    with pytest.raises(ValueError, match=message):
        LipschitzMonitor(model, mlp_case.optimizer(model), **settings)


@pytest.mark.parametrize("swap", [False, True])
def test_wrong_types(mlp_case, swap):
    model = mlp_case.model()
    optimizer = mlp_case.optimizer(model)
    arguments = (optimizer, model) if swap else (model, list(model.parameters()))
    with pytest.raises(TypeError, match=r"expected a torch\.(nn\.Module|optim\.Optimizer)"):
        LipschitzMonitor(*arguments)


# --- what cannot be measured is NaN, and the status says why --------------------------------------------------


def one_row(model: nn.Module, optimizer, backward, layer: str) -> dict:
    with LipschitzMonitor(model, optimizer) as monitor:
        backward()
        optimizer.step()
    return next(row for row in monitor.history if row["layer"] == layer)


def test_batch_of_one(mlp_case):
    model = mlp_case.model()
    optimizer = mlp_case.optimizer(model)
    x, y = mlp_case.data()
    with LipschitzMonitor(model, optimizer, noise="split") as monitor:
        mlp_case.loss(model(x[:1]), y[:1]).backward()
        optimizer.step()
    table = monitor.history.to_pandas()
    noise = ["kappa", "lambda_sq", "kappa_var", "kappa_cov", "lambda_sq_var", "lambda_sq_cov"]
    assert table[noise].isna().to_numpy().all()
    assert table["status"].str.contains("batch of one").all()
    assert table["mu"].notna().all()
    assert table["dz3"].to_numpy() == pytest.approx(table["dz"].to_numpy(), abs=1e-5)


def test_an_unbatched_vector_is_a_batch_of_one(mlp_case):
    model = mlp_case.model()
    x, y = mlp_case.data()
    row = one_row(model, mlp_case.optimizer(model), lambda: mlp_case.loss(model(x[0])[None], y[:1]).backward(), "0")
    assert row["batch"] == 1
    assert "batch of one" in row["status"]


def test_equal_gradients_have_no_noise(mlp_case):
    model = mlp_case.model()
    x, y = (a[:1].repeat(4, *[1] * (a.ndim - 1)) for a in mlp_case.data())
    row = one_row(model, mlp_case.optimizer(model), lambda: mlp_case.loss(model(x), y).backward(), "0")
    assert row["status"] == "ok"
    assert row["kappa"] == pytest.approx(0.0, abs=1e-25)
    assert row["lambda_sq"] == pytest.approx(0.0, abs=1e-25)


def test_zero_gradients_give_zeros(mlp_case):
    model = mlp_case.model()
    x, y = mlp_case.data()
    row = one_row(model, mlp_case.optimizer(model), lambda: (0.0 * mlp_case.loss(model(x), y)).backward(), "2")
    assert row["status"] == "ok"
    assert [row[key] for key in (*FORCES, "eps", "dz1", "dz2", "dz3", "dz")] == [0.0] * 8


@pytest.mark.parametrize(
    ("weight", "status"),
    [
        (torch.eye(4), "largest singular value is repeated"),
        (torch.zeros(4, 4), "weight is zero"),
        (torch.full((4, 4), float("nan")), "weight is not finite"),
    ],
    ids=["tie", "zero", "nan"],
)
def test_weights_without_derivative(weight, status):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    with LipschitzMonitor(model, optimizer) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().sum().backward()
            optimizer.step()
    first, other, network = monitor.history.rows[:3]
    assert status in first["status"]
    assert all(math.isnan(first[key]) for key in [*FORCES, "gHg"])
    path = [first[key] for key in ("eps", "dz1", "dz2", "dz3")]
    if "repeated" in status:  # the cluster's effective matrix does not need a gap
        assert (first["eps"], first["mode"]) == (math.inf, "cluster")
        assert first["dz3"] == pytest.approx(first["dz"], abs=1e-7)
    else:
        assert all(map(math.isnan, path))
    assert f"0: {first['status']}" in network["status"]
    assert math.isnan(network["mu"])
    if not weight.isnan().any():
        assert other["status"] == "ok"
        assert first["sigma"] == float(weight.max())
        assert monitor.history.rows[3]["status"] == "ok"  # the step has broken the tie


@pytest.mark.parametrize("noise", ["full", "split"])
def test_gradient_clipped_by_norm(mlp_case, noise):
    """The same gradient, scaled by one factor: drift by the factor, noise by its square."""
    tables = []
    for limit in (math.inf, 1e-3):
        model = mlp_case.model()
        optimizer = mlp_case.optimizer(model)
        with LipschitzMonitor(model, optimizer, noise=noise) as monitor:
            x, y = mlp_case.data()
            mlp_case.loss(model(x), y).backward()
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), limit))
            optimizer.step()
        tables.append(monitor.history.to_pandas())
    plain, clipped = tables
    factor = 1e-3 / (norm + 1e-6)
    assert clipped["status"].str.contains("gradients were rescaled after the backward pass: factor").all()
    powers = {"mu": 1, "kappa": 2, "lambda_sq": 2}
    powers |= {"kappa_var": 2, "lambda_sq_var": 2} if noise == "split" else {}
    for key, power in powers.items():
        assert clipped[key].to_numpy() == pytest.approx(factor**power * plain[key].to_numpy(), rel=1e-9), key


def test_gradient_clipped_by_value(mlp_case):
    model = mlp_case.model()

    def backward():
        x, y = mlp_case.data()
        mlp_case.loss(model(x), y).backward()
        nn.utils.clip_grad_value_(model.parameters(), 1e-2)

    row = one_row(model, mlp_case.optimizer(model), backward, "0")
    assert row["status"].startswith("contributions do not sum to the gradient")
    assert all(math.isnan(row[key]) for key in FORCES)
    assert row["dz2"] == pytest.approx(row["dz"], abs=1e-7)


def test_two_backward_passes_through_one_graph(mlp_case):
    model = mlp_case.model()

    def backward():
        loss = mlp_case.loss(model(mlp_case.data()[0]), mlp_case.data()[1])
        loss.backward(retain_graph=True)
        loss.backward()

    row = one_row(model, mlp_case.optimizer(model), backward, "0")
    assert row["status"] == "several backward passes through one forward pass"


def test_shared_weights_and_layers_left_out():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a", "tied", "frozen", "elsewhere", "network", "idle")})
    model["norm"] = nn.LayerNorm(4)
    model["tied"].weight = model["a"].weight
    model["frozen"].requires_grad_(False)
    trained = [p for name in ("a", "network", "idle") for p in model[name].parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    with LipschitzMonitor(model, optimizer) as monitor:
        x = torch.randn(6, 4)
        for name in ("a", "tied", "network"):
            x = torch.tanh(model[name](x))
        x.sum().backward()
        optimizer.step()
    assert monitor.layers == ["a", "frozen", "network.weight", "idle"]
    assert monitor.skipped == {"elsewhere": "its weight is not in the optimizer", "norm": "no rule for LayerNorm"}
    assert {entry.module: entry.detail for entry in monitor.report() if entry.how == "monitored"} == {
        **{"a": "4 x 4", "tied": "shares its weight with a: contributions added"},
        **{"frozen": "4 x 4, frozen: sigma only", "network.weight": "4 x 4", "idle": "4 x 4"},
    }
    a, frozen, named_network, idle, network = monitor.history.rows
    assert a["status"] == named_network["status"] == "ok"
    assert frozen["status"] == "frozen"
    assert [frozen[key] for key in (*FORCES, "eps", "dz1", "dz2", "dz3", "dz")] == [0.0] * 8
    assert frozen["sigma"] == pytest.approx(
        float(torch.linalg.matrix_norm(model["frozen"].weight.double(), 2)), rel=1e-12
    )
    assert idle["status"] == "no gradient reached this layer"
    assert [idle[key] for key in (*FORCES, "dz2", "dz")] == [0.0] * (len(FORCES) + 2)  # the optimiser passes it by
    for key in ("mu", "kappa"):
        assert network[key] == pytest.approx(a[key] + named_network[key], rel=1e-12)
    assert 0.0 < network["lambda_sq"] < math.inf
    assert network["status"] == "idle: no gradient reached this layer"


def test_model_that_is_itself_a_layer():
    model = nn.Linear(4, 3)
    row = one_row(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        lambda: model(input=torch.randn(5, 4)).square().sum().backward(),
        "Linear",
    )
    assert row["status"] == "ok"


def test_layers_that_see_different_numbers_of_samples():
    model = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(0, 1), nn.Linear(3, 2))
    row = one_row(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        lambda: model(torch.randn(5, 4)).square().mean().backward(),
        "network",
    )
    assert "different numbers of samples" in row["status"]
    assert row["batch"] == 0
    assert math.isnan(row["lambda_sq"])
    assert not math.isnan(row["kappa"])


def test_other_optimisers_have_the_path_only(mlp_case):
    model = mlp_case.model()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-3)
    with LipschitzMonitor(model, optimizer) as monitor:
        for step in range(3):
            mlp_case.step(model, optimizer, step)
    table = monitor.history.to_pandas()
    assert table["status"].str.contains("Adagrad: drift and noise terms are not known for this optimiser").all()
    assert table[FORCES].isna().to_numpy().all()
    assert table["dz3"].to_numpy() == pytest.approx(table["dz"].to_numpy(), abs=1e-7)


def test_batch_norm_is_remarked():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def backward():
        model(torch.randn(5, 4)).square().mean().backward()

    row = one_row(model, optimizer, backward, "0")
    assert "BatchNorm" in row["status"]
    assert row["kappa"] > 0
    model.eval()
    optimizer.zero_grad()
    assert one_row(model, optimizer, backward, "0")["status"] == "ok"


def test_batch_norm_without_running_statistics_is_remarked_in_evaluation_too():
    """It then takes those of the batch: what one sample gives depends on the others."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 2)).eval()
    x = torch.randn(5, 4)
    assert not torch.allclose(model(x)[:2], model(x[:2]), atol=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    row = one_row(model, optimizer, lambda: model(x).square().mean().backward(), "0")
    assert row["status"] == "BatchNorm mixes samples: noise terms are heuristic"


# --- schedule and records ------------------------------------------------------------------------------------


def test_every_and_the_sink(mlp_case, tmp_path):
    model = mlp_case.model()
    optimizer = mlp_case.optimizer(model)
    path = tmp_path / "history.jsonl"
    with LipschitzMonitor(model, optimizer, every=3, dataset_size=70, sinks=[JsonLinesSink(path)]) as monitor:
        for step in range(8):
            mlp_case.step(model, optimizer, step)
            assert len(path.read_text().splitlines()) == 1 + len(monitor.history)  # flushed in every step
    assert monitor.history.steps == [0, 3, 6]
    assert {row["status"] for row in monitor.history} == {"ok"}
    read = read_history(path)
    assert read.meta == monitor.history.meta
    assert read.to_pandas().equals(monitor.history.to_pandas())


def test_idle_steps_do_no_work(mlp_case, monkeypatch):
    model = mlp_case.model()
    optimizer = mlp_case.optimizer(model)
    calls = []
    contract = LinearRule.contract
    monkeypatch.setattr(LinearRule, "contract", lambda *args: calls.append(0) or contract(*args))
    effective = LinearRule.effective
    monkeypatch.setattr(LinearRule, "effective", lambda *args: calls.append(1) or effective(*args))
    with LipschitzMonitor(model, optimizer, every=4):
        counts = []
        for step in range(8):
            calls.clear()
            mlp_case.step(model, optimizer, step)
            counts.append(calls.count(0))
            assert bool(calls) == (step % 4 == 0)
    assert counts == [3, 0, 0, 0, 3, 0, 0, 0]


def test_two_monitors_agree_and_do_not_disturb_each_other(mlp_case):
    model = mlp_case.model()
    optimizer = mlp_case.optimizer(model)
    with LipschitzMonitor(model, optimizer) as first, LipschitzMonitor(model, optimizer, every=2) as second:
        for step in range(4):
            mlp_case.step(model, optimizer, step)
    one, two = first.history.to_pandas(), second.history.to_pandas()
    one = one[one["step"] % 2 == 0].reset_index(drop=True)
    # what follows a step is found in another way where the next one is not measured
    pd.testing.assert_frame_equal(one, two, rtol=1e-9, atol=1e-14)


def test_log_k_is_that_of_the_weights(mlp_case):
    model = mlp_case.model()
    optimizer = mlp_case.optimizer(model)

    def truth():
        return sum(float(torch.linalg.matrix_norm(m.weight.detach(), 2).log()) for m in (model[0], model[2], model[4]))

    with LipschitzMonitor(model, optimizer) as monitor:
        assert monitor.log_k == pytest.approx(truth(), abs=1e-12)
        mlp_case.step(model, optimizer)
        assert monitor.log_k == pytest.approx(truth(), abs=1e-12)
        assert repr(monitor) == "LipschitzMonitor(3 layers, 1 steps seen, attached)"


def test_a_list_of_parameters_is_no_layer():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrices = nn.ParameterList([torch.randn(4, 3), torch.randn(3, 4)])
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x @ self.matrices[0])

    model = Listed()
    with LipschitzMonitor(model, torch.optim.SGD(model.parameters(), lr=0.1)) as monitor:
        assert monitor.layers == ["head"]
        assert "ParameterList has no forward pass: register a rule" in monitor.skipped["matrices"]


def test_every_status_is_in_the_guide():
    """In its table a row begins with the status, or with as much of it as goes before dots."""
    guide = (Path(__file__).parents[2] / "docs" / "guide-lipdyn.md").read_text()
    rows = [line.split("|")[1].strip() for line in guide.split("## Statuses")[1].splitlines() if line.startswith("| ")]
    named = [_collect, _hooks, _measure, monitor, distributed, _bridge]
    words = {
        value
        for module in named
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str) and " " in value and not value.startswith(("expected", "did not"))
    }
    words |= set(re.findall(r'(?:problem=|group, )"([a-z ]+)"', inspect.getsource(_bridge)))
    words |= {"no factor: ", "after the step: ", "per-sample gradients failed", "no image has been seen yet"}
    assert len(words) > 30
    begins = tuple(begin for row in rows if (begin := row.split("...")[0].strip()))
    missing = [s for s in words if not (s.startswith(begins) or any(begin.startswith(s) for begin in begins))]
    assert missing == []
