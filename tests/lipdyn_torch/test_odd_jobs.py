"""Jobs off the beaten track: each has a defined answer, and none stops the training."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_forces import forces, per_sample
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lipdyn_torch import LipschitzMonitor, NoSupportedLayerError, UnownedParametersError, moments, pathwise, sde
from lipdyn_torch.dynamics import bridge_variance, epoch_means
from lipdyn_torch.fallback import FallbackRule
from lipdyn_torch.history import ResumeError
from lipdyn_torch.layers import _RULES, register_rule
from lipdyn_torch.low_rank import LowRankSumRule
from lipdyn_torch.noise import common_factor
from lipdyn_torch.optimizers import Response
from lipdyn_torch.reference import MeanGradient


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def train(model, optimizer, x=None):
    optimizer.zero_grad()
    model(torch.randn(8, 6) if x is None else x).square().mean().backward()
    optimizer.step()


def statuses(monitor, step=-1):
    step = monitor.history.steps[step]
    return {row["layer"]: row["status"] for row in monitor.history if row["step"] == step}


# --- gradients changed between backward pass and step ------------------------------------------------------------


@pytest.mark.parametrize("which", ["all", "some"])
def test_gradients_set_to_zero_before_the_step(which):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = sgd(model)
    monitor = LipschitzMonitor(model, optimizer)
    model(torch.randn(8, 6)).square().mean().backward()
    for p in model.parameters() if which == "all" else model[:3].parameters():
        p.grad.zero_()
    optimizer.step()
    found = statuses(monitor)
    for name in ("0", "2"):
        assert "contributions do not sum to the gradient" in found[name]
    assert (found["4"] == "ok") == (which == "some")
    assert all(math.isnan(row["mu"]) for row in monitor.history if row["layer"] in ("0", "2"))


def test_factors_of_zero_are_not_factors():
    assert common_factor([(0.0, 0.0), (0.0, 0.0)], 1e-7) == 1.0
    assert common_factor([(0.0, 0.0), (0.5, 1e-9)], 1e-7) == 0.5
    assert common_factor([(-0.5, 0.0), (0.5, 1e-9)], 1e-7) == 0.5
    assert common_factor([(-0.5, 0.0), (-0.5, 1e-9)], 1e-7) == -0.5


@pytest.mark.parametrize("factor", [0.3, 0.8, 0.94, 1.0, 1.3])
def test_clipping_under_autocast(factor):
    """In half precision the factor is found as in single, so that the terms are those of the run without autocast."""
    rows = []
    for enabled in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = sgd(model, 0.05)
        x, y = torch.randn(256, 20), torch.arange(256) % 10
        monitor = LipschitzMonitor(model, optimizer)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        for p in model.parameters():
            p.grad.mul_(factor)
        optimizer.step()
        rows.append(monitor.history.rows)
    for plain, half in zip(*rows, strict=True):
        assert ("rescaled" in half["status"]) == ("rescaled" in plain["status"]) == (factor != 1.0)
        for key in ("lambda_sq", "kappa"):
            assert half[key] == pytest.approx(plain[key], rel=0.1)


def three() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def test_one_layer_scaled_in_half_precision():
    """Half precision hides it from the sum, where the samples are large beside it; not from the factor.

    But it would hide as well what else there may be in the gradient: no factor of the layer's own is believed.
    """
    model = three()
    optimizer = sgd(model, 0.05)
    x, y = torch.randn(256, 20), torch.arange(256) % 10
    monitor = LipschitzMonitor(model, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    model[2].weight.grad.mul_(0.8)
    optimizer.step()
    found = statuses(monitor)
    assert (found["0"], found["4"]) == ("ok", "ok")
    assert "contributions do not sum" in found["2"]


@pytest.mark.parametrize("noise", ["full", "split"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("clipped", [("0", "2"), ("0", "2", "4"), ("2",)], ids="-".join)
def test_layers_clipped_by_norm_one_by_one(clipped, make, noise):
    """What the optimiser sees are the samples times a factor of each layer: against the dense definition."""
    model = three().double()
    optimizer = make(model.parameters(), lr=1e-3)
    x, y = torch.randn(16, 20, dtype=torch.float64), torch.arange(16) % 10
    names = ["0.weight", "2.weight", "4.weight"]

    def loss(model, i):
        return nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) / 16

    with LipschitzMonitor(model, optimizer, noise=noise) as monitor:
        nn.functional.cross_entropy(model(x), y).backward()
        Gs = {name: per_sample(model, [name], loss, 16) for name in names}
        old = {name: model.get_parameter(name).detach().clone() for name in names}
        factors = dict.fromkeys(names, 1.0)
        for index, layer in enumerate(clipped):
            limit = 10.0 ** (-1 - index)
            factors[f"{layer}.weight"] = limit / (
                float(nn.utils.clip_grad_norm_(model[int(layer)].weight, limit)) + 1e-6
            )
        optimizer.step()
    scores = []
    for row, name in zip(monitor.history.rows, names, strict=False):
        p, c = model.get_parameter(name), factors[name]
        g = p.grad.reshape(-1)
        W = torch.ones_like(g) if make is torch.optim.SGD else 1 / (g.abs() + 1e-8)  # of the first step
        wanted = forces([old[name]], lambda w: w, c * Gs[name], W, -1e-3 * W * g, 1e-3)
        keys = ["mu", "kappa", "lambda_sq", "gHg"] + ["kappa_var", "lambda_sq_var"] * (noise == "split")
        for key in keys:
            assert row[key] == pytest.approx(getattr(wanted, key), rel=1e-6), (name, key)
        assert row["status"] == (
            "ok" if c == 1.0 else f"gradients were rescaled after the backward pass: factor {c:.3g}"
        )
        U, s, Vh = torch.linalg.svd(old[name])
        scores.append((W * c * Gs[name]) @ torch.outer(U[:, 0], Vh[0]).reshape(-1) / s[0])
    variance = float(sum(scores).var()) / 16
    assert monitor.history.rows[-1]["lambda_sq"] == pytest.approx(1e-3 * variance, rel=1e-6)


def by_value(model):
    nn.utils.clip_grad_value_(model[2].weight, float(model[2].weight.grad.abs().quantile(0.9)))


def upside_down(model):
    model[2].weight.grad.neg_()


def penalty(model):
    model[2].weight.grad += 1e-2 * model[2].weight.detach()


def other_samples(model):
    twin = copy.deepcopy(model)  # past the monitor
    nn.functional.cross_entropy(twin(torch.randn(256, 20).to(model[0].weight)), torch.arange(256) % 10).backward()
    model[2].weight.grad += twin[2].weight.grad


def masked(model):
    model[2].weight.grad[:3] = 0.0


@pytest.mark.parametrize("common", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("change", [by_value, upside_down, penalty, other_samples, masked])
def test_what_is_no_factor_of_a_layers_own(change, dtype, common):
    """Whatever else the others' gradients have gone through: no number times the samples is this gradient."""
    model = three().to(torch.float64 if dtype == torch.float64 else torch.float32)
    optimizer = sgd(model, 0.05)
    x, y = torch.randn(256, 20).to(model[0].weight), torch.arange(256) % 10
    with LipschitzMonitor(model, optimizer) as monitor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        change(model)
        for p in model.parameters():
            p.grad.mul_(common)
        optimizer.step()
    found = statuses(monitor)
    assert "contributions do not sum to the gradient" in found["2"]
    assert all("contributions" not in found[name] for name in "04")


def test_next_to_nothing_is_no_multiple():
    """Where the samples nearly cancel, and something else nearly cancels what is left: compared with the samples, the
    rest is a small multiple of their mean.
    """
    model = three()
    optimizer = sgd(model)
    x, a = torch.randn(64, 20).repeat(2, 1), torch.randn(64, 10)
    a = torch.cat([a, -a]) + 1e-2 * torch.randn(128, 10)
    with LipschitzMonitor(model, optimizer) as monitor:
        (model(x) * a).sum(1).mean().backward()
        g = model[2].weight.grad
        g.copy_(1e-3 * (g + 0.2 * g.std() * torch.randn_like(g)))
        optimizer.step()
    found = statuses(monitor)
    assert "contributions do not sum to the gradient" in found["2"]
    assert (found["0"], found["4"]) == ("ok", "ok")


def test_a_weight_of_one_number_tells_no_factor_of_its_own():
    """Any two gradients of it are multiples of each other."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 1))
    optimizer = sgd(model)
    with LipschitzMonitor(model, optimizer) as monitor:
        (model(torch.randn(8, 6)).square().mean() + model[4].weight.square().sum()).backward()
        optimizer.step()
    assert "contributions do not sum to the gradient" in statuses(monitor)["4"]


def test_a_large_weight_that_moves_otherwise_is_seen():
    """Norms of numbers whose squares leave the range of single precision."""
    for scale in (1e20, 1e-25):
        old = torch.full((4, 4), scale)
        step = torch.full((4, 4), -0.01 * scale)
        response = Response(drift=step, direction=step, lr=-1.0)
        assert response.explains(old, step)
        assert not response.explains(old, old)


# --- learning rates and phases -----------------------------------------------------------------------------------


def test_a_low_rank_sum_while_the_rate_is_zero():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(6, 5).requires_grad_(False)
            self.up, self.down = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 6))

        def forward(self, x):
            return self.base(x) + x @ self.down.T @ self.up.T

    register_rule(Adapted, LowRankSumRule("base.weight", "up", "down"))
    try:
        model = Adapted()
        optimizer = sgd(model, 1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 10)
        reference = {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
        monitor = LipschitzMonitor(model, optimizer, reference=lambda _: reference)
        for _ in range(2):
            train(model, optimizer)
            schedule.step()
    finally:
        del _RULES[Adapted]
    first, second = (monitor.history.rows[i] for i in (0, 2))
    assert (first["lr"], first["dz"], first["status"]) == (0.0, 0.0, "ok")
    for key in ("mu", "mu_ref"):  # the weights have not moved between the steps, and the reference never does
        assert math.isfinite(first[key])
    assert first["mu_ref"] == pytest.approx(second["mu_ref"], rel=1e-6)


def test_a_phase_in_which_only_biases_are_trained():
    model = mlp()
    optimizer = sgd(model)
    monitor = LipschitzMonitor(model, optimizer)
    train(model, optimizer)
    for p in model.parameters():
        p.requires_grad_(p.ndim == 1)
    train(model, optimizer)
    assert statuses(monitor) == {"0": "frozen", "2": "frozen", "network": "ok"}
    for p in model.parameters():
        p.requires_grad_(True)
    train(model, optimizer)
    assert set(statuses(monitor).values()) == {"ok"}


@pytest.mark.parametrize("late", [False, True])
def test_a_layer_unfrozen_later_and_used_past_its_module(late):
    model = mlp()
    optimizer = sgd(model)
    model[0].weight.requires_grad_(not late)
    with LipschitzMonitor(model, optimizer) as monitor:
        assert model[0].weight.requires_grad is not late
        model[0].weight.requires_grad_(True)
        model[2](torch.tanh(nn.functional.linear(torch.randn(8, 6), model[0].weight))).square().mean().backward()
        optimizer.step()
    assert statuses(monitor)["0"].startswith("a gradient reached the weight past the monitor")


@pytest.mark.parametrize("late", [False, True])
def test_searches_while_only_layers_unfrozen_later_are_trained(late):
    """Backward passes for the inputs reach no weight, and do not count, whenever it was unfrozen."""
    model = mlp()
    optimizer = sgd(model)
    model[0].requires_grad_(not late)
    with LipschitzMonitor(model, optimizer) as monitor:
        model.requires_grad_(True)
        model[2].requires_grad_(False)
        for _ in range(3):
            x = torch.randn(5, 6, requires_grad=True)
            (slope,) = torch.autograd.grad(model(x).square().mean(), x)
            (model(x.detach() + 0.1 * slope.sign()).square().mean() / 3).backward()
        optimizer.step()
    row = monitor.history.rows[0]
    assert (row["status"], row["batch"]) == ("ok", 15)


def test_frozen_weights_that_can_never_be_trained():
    model = mlp()
    with torch.inference_mode():
        model[0].weight = nn.Parameter(torch.randn(5, 6), requires_grad=False)
    with LipschitzMonitor(model, sgd(model[2])) as monitor:
        train(model, monitor._optimizer)
    assert statuses(monitor) == {"0": "frozen", "2": "ok", "network": "ok"}


def test_a_closure_that_raises():
    model = mlp()
    optimizer = sgd(model)
    monitor = LipschitzMonitor(model, optimizer)
    x, calls = torch.randn(8, 6), 0

    def closure():
        nonlocal calls
        calls += 1
        if calls == 2:
            raise FloatingPointError
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(FloatingPointError):
        optimizer.step(closure)
    train(model, optimizer)  # without one
    optimizer.step(closure)
    assert monitor.history.steps == [0, 1, 2]
    assert {row["status"] for row in monitor.history} == {"ok"}


def test_a_state_of_another_run():
    """Rows that do not end where the weights are would show a jump that never was."""
    model = mlp()
    optimizer = sgd(model)
    monitor = LipschitzMonitor(model, optimizer)
    for _ in range(2):
        train(model, optimizer)
    state = monitor.state_dict()
    monitor.close()
    again = LipschitzMonitor(model, optimizer)
    again.load_state_dict(state)
    again.close()
    other = mlp()
    with pytest.warns(UserWarning, match="expected the weights that the rows end with"):
        LipschitzMonitor(other, sgd(other)).load_state_dict(state)


def test_a_sink_that_raises_loses_no_step():
    class Full:
        def start(self, meta):
            pass

        def write(self, rows):
            if rows[0]["step"] == 0:
                raise OSError("disk full")

        def close(self):
            pass

    class Kept(Full):
        steps = ()

        def write(self, rows):
            self.steps += (rows[0]["step"],)

    model = mlp()
    optimizer = sgd(model)
    kept = Kept()
    monitor = LipschitzMonitor(model, optimizer, sinks=[Full(), kept])
    with pytest.warns(RuntimeWarning, match=r"Full did not take the rows of a step, .* \(OSError: disk full\)"):
        train(model, optimizer)
    train(model, optimizer)
    assert [row["step"] for row in monitor.history] == [0] * 3 + [1] * 3
    assert kept.steps == (0, 1)  # whatever becomes of the other sink


def test_large_gradients_in_half_precision_are_no_overflow():
    """Their sum leaves the range of float16, they do not."""
    model = nn.Linear(300, 300, bias=False).half()
    optimizer = sgd(model, 1e-6)
    monitor = LipschitzMonitor(model, optimizer)
    x = torch.rand(4, 300).half()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).sum().backward()
    assert not model.weight.grad.sum().isfinite()
    optimizer.step()
    assert monitor.history.steps == [0]


# --- layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_frozen_weights_of_a_storage_dtype(dtype):
    class Stored(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    first = Stored(6, 6)
    first.weight = nn.Parameter((10 * first.weight.detach()).to(dtype), requires_grad=False)
    model = nn.Sequential(first, nn.Linear(6, 5))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.01)
    monitor = LipschitzMonitor(model, optimizer)
    train(model, optimizer)
    if dtype == torch.int8:
        assert monitor.skipped == {"0": "its weight is not real floating-point but int8"}
    else:
        row = monitor.history.rows[0]
        assert row["status"] == "frozen"
        norm = torch.linalg.matrix_norm(first.weight.detach().double(), 2)
        assert row["sigma"] == pytest.approx(float(norm), rel=1e-12)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_complex_and_empty_weights_are_skipped():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 6, dtype=torch.cfloat))

        def forward(self, x):
            return torch.view_as_real(x.to(torch.cfloat) @ self.w.T).flatten(1)

    for model, reason in (
        (Complex(), "its weight is not real floating-point but complex64"),
        (nn.Linear(6, 5, dtype=torch.cfloat), "its weight is not real floating-point but complex64"),
    ):
        with pytest.raises(NoSupportedLayerError, match=reason):
            LipschitzMonitor(model, sgd(model))
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 0))
    assert LipschitzMonitor(model, sgd(model)).skipped == {"1": "its weight is empty, of shape (0, 5)"}


def test_a_subclass_with_matrices_of_its_own():
    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(6, 5)
            self.weight.requires_grad_(False)
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(5, 2))

    class Renamed(nn.Linear):
        pass

    model = nn.Sequential(Adapted(), Renamed(5, 3))
    monitor = LipschitzMonitor(model, sgd(model))
    assert monitor.layers == ["1"]
    assert "matrices that LinearRule does not read (lora_A, lora_B)" in monitor.skipped["0"]


def test_a_module_whose_settings_change():
    """What is run again for per-sample gradients is the module as it is now."""

    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.temperature = nn.Parameter(torch.randn(5, 6)), 1.0

        def forward(self, x):
            return torch.tanh(x @ self.w.T * self.temperature)

    model = Tempered()
    optimizer = sgd(model, 0.01)
    monitor = LipschitzMonitor(model, optimizer)
    for temperature in (1.0, 1.5):
        model.temperature = temperature
        train(model, optimizer)
        assert set(statuses(monitor).values()) == {"ok"}


@pytest.mark.parametrize("draw", [random.random, np.random.random], ids=["random", "numpy"])
def test_modules_that_draw_are_not_run_again(draw):
    """Training goes on with the same random numbers, and the rows say why there are no terms."""

    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 6))

        def forward(self, x):
            return torch.tanh(x @ self.w.T) * (1.0 if draw() < 0.5 else 0.5)

    weights = []
    for watched in (False, True):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        model = Drawing()
        optimizer = sgd(model)
        monitor = LipschitzMonitor(model, optimizer) if watched else None
        for _ in range(3):
            train(model, optimizer)
        weights.append((model.w.detach().clone(), draw()))
    assert torch.equal(weights[0][0], weights[1][0])
    assert weights[0][1] == weights[1][1]
    assert all("draws random numbers" in row["status"] for row in monitor.history)


def test_a_branch_that_is_not_used_in_a_step():
    """The optimiser passes its weight by: it adds nothing, and the network's terms are those of the others."""
    model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(6, 5)})
    optimizer = sgd(model)
    monitor = LipschitzMonitor(model, optimizer, dataset_size=64)
    for step in range(4):
        optimizer.zero_grad()
        model["ab"[step % 2]](torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    for row, other, network in zip(*(monitor.history.rows[i::3] for i in range(3)), strict=True):
        assert network["mu"] == row["mu"] + other["mu"]
        assert network["lambda_sq"] == pytest.approx(row["lambda_sq"] + other["lambda_sq"], rel=1e-12)
    assert np.isfinite(sde(monitor.history).predicted).all()


def test_bands_of_a_frozen_layer():
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    monitor = LipschitzMonitor(model, optimizer, dataset_size=32)
    for _ in range(3):
        train(model, optimizer)
    assert sde(monitor.history, "0").half_width.tolist() == [0.0] * 4


def test_a_subclass_of_attention_with_biases():
    class Attention(nn.MultiheadAttention):
        pass

    model = Attention(8, 2, add_bias_kv=True)
    layers = LipschitzMonitor(model, sgd(model)).layers
    assert [name.rpartition(".")[2] for name in layers] == ["q", "k", "v", "out_proj"]


def test_a_weight_of_one_number():
    """Of a square matrix with one value the next in the spectrum is minus that (theory 1.9)."""
    for scale in (1.0, 1e20, 1e-20):
        model = nn.Linear(1, 1, bias=False).double()
        with torch.no_grad():
            model.weight.fill_(scale * 0.7)
        optimizer = sgd(model, 0.3)
        monitor = LipschitzMonitor(model, optimizer)
        for _ in range(5):
            train(model, optimizer, torch.randn(8, 1).double())
        for row in monitor.history:
            if row["layer"] != "network":
                assert row["gap"] == pytest.approx(2 * row["sigma"], rel=1e-12)
                assert abs(row["remainder"]) <= row["bound"]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace.* is deprecated")
@pytest.mark.parametrize("how", ["export", "trace", "fake"])
def test_tracing_with_the_monitor_on(how):
    model = mlp()
    optimizer = sgd(model)
    monitor = LipschitzMonitor(model, optimizer)
    x = torch.randn(8, 6)
    if how == "export":
        torch.export.export(model, (x,), strict=False)  # the strict way, by Dynamo, refuses what may not be traced
    elif how == "trace":
        assert torch.equal(torch.jit.trace(model, x)(x), model(x))
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(x))
    train(model, optimizer)
    assert set(statuses(monitor).values()) == {"ok"}


# --- what is not known stays so ----------------------------------------------------------------------------------


def test_bands_do_not_hide_what_is_unknown():
    model = mlp()
    optimizer = sgd(model, 0.05)
    monitor = LipschitzMonitor(model, optimizer, dataset_size=33)
    for batch in (8, 8, 8, 8, 1):  # of one sample there is no noise to tell
        train(model, optimizer, torch.randn(batch, 6))
    for sampling in ("shuffle", "iid"):
        width = sde(monitor.history, sampling=sampling).half_width
        assert np.isnan(width[-1])
        assert width[0] == 0.0
        assert (width[1:-1] > 0.0).all()
    assert np.isnan(bridge_variance([0.25, np.nan, 0.25], [4] * 3, 16)[2:]).all()
    np.testing.assert_allclose(epoch_means([0.2, np.nan, 0.4], [4] * 3, 12), [0.3, np.nan, 0.3])


def test_skipped_steps_add_nothing_to_predictions():
    """A loss scaler's skip leaves the weights where they were; the curve goes on through it."""
    model = mlp()
    optimizer = sgd(model, 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    monitor = LipschitzMonitor(model, optimizer, dataset_size=64)
    for step in range(6):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 6)).square().mean() * (math.inf if step == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert "skipped" in statuses(monitor, 2)["network"]
    prediction = sde(monitor.history)
    assert np.isfinite(prediction.predicted).all()
    assert np.isfinite(prediction.half_width).all()
    assert prediction.predicted[2] == prediction.predicted[3]
    assert prediction.max_error < 1e-3
    assert np.isfinite(moments(monitor.history, gradient="batch").log_mean).all()


# --- modules, gradients and optimisers that the monitor was not made for ---------------------------------------------


class Refuses(nn.Module):
    """Fails on single samples, in one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight, self.way = nn.Parameter(torch.randn(3, 6)), way

    def forward(self, x):
        assert self.way != "even" or len(x) % 2 == 0
        if self.way == "pairs":
            x = x - x[[*range(1, 8), 0]]
        if self.way == "table":
            x = x * {8: 1.0}[len(x)]
        return x @ self.weight.T


@pytest.mark.parametrize("noise", ["full", "split", "factor"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("way", ["even", "pairs", "table"])
def test_a_module_that_cannot_be_run_on_one_sample(way, optimizer, noise):
    model = Refuses(way)
    optimizer = optimizer(model.parameters(), lr=0.1)
    with LipschitzMonitor(model, optimizer, noise=noise) as monitor:
        train(model, optimizer)
    row = monitor.history.rows[0]
    assert row["status"].startswith("per-sample gradients failed")
    assert math.isnan(row["mu"])
    assert math.isfinite(row["dz3"])


def test_a_rule_of_ones_own_that_fails_at_the_squares():
    class Rule(_RULES[nn.Linear].__class__):
        def sum_of_squares(self, module, x, delta, block):
            raise KeyError("no squares")

    kept = _RULES[nn.Linear]
    register_rule(nn.Linear, Rule())
    try:
        model = mlp()
        with LipschitzMonitor(model, sgd(model), noise="split") as monitor:
            train(model, monitor._optimizer)
    finally:
        register_rule(nn.Linear, kept)
    assert statuses(monitor)["0"] == "per-sample gradients failed: 'no squares'"


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_with_momentum(kind):
    torch.manual_seed(0)
    rows = []
    for sparse in (True, False):
        torch.manual_seed(1)
        model = nn.Sequential(kind(10, 4, sparse=sparse), nn.Flatten(), nn.LazyLinear(2)).double()
        index = torch.randint(0, 10, (5, 3))
        model(index)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with LipschitzMonitor(model, optimizer) as monitor:
            for _ in range(3):
                optimizer.zero_grad()
                model(index).square().mean().backward()
                optimizer.step()
        rows.append(monitor.history.rows)
    for row, expected in zip(*rows, strict=True):
        assert row["status"] == "ok"
        for column in ("mu", "kappa", "lambda_sq", "dz3"):
            assert math.isclose(row[column], expected[column], rel_tol=1e-9, abs_tol=1e-14)


@pytest.mark.parametrize("projection", ["clip", "rescale"])
def test_weights_changed_between_steps(projection):
    """The certificate is of the steps; what happens besides is taken as observed, and named in the next row."""
    model = mlp().double()
    optimizer = sgd(model, 0.05)
    x = torch.randn(8, 6, dtype=torch.float64)
    with LipschitzMonitor(model, optimizer) as monitor:
        for _ in range(12):
            train(model, optimizer, x)
            with torch.no_grad():
                for p in model.parameters():
                    p.clamp_(-0.3, 0.3) if projection == "clip" else p.mul_(0.9)
    assert "weight was changed since the last step" in statuses(monitor)["0"]
    assert statuses(monitor, 0)["0"] == "ok"
    for order in (1, 2, 3):
        path = pathwise(monitor.history, order)
        assert np.all(np.abs(path.error) <= path.half_width + 1e-12)
    assert path.max_error < 1e-4


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("micro", [1, 2])
def test_gradients_of_the_inputs_beside_those_of_the_weights(order, micro):
    """A saliency map, or an adversarial search, has a backward pass of its own that reaches no weight."""
    rows = []
    for other in (True, False):
        torch.manual_seed(3)
        model = mlp().double()
        optimizer = sgd(model)
        x = torch.randn(8, 6, dtype=torch.float64)

        def search(model=model, x=x, other=other):
            if other:
                xx = x.clone().requires_grad_()
                torch.autograd.grad(model(xx).square().mean(), xx)

        with LipschitzMonitor(model, optimizer) as monitor:
            for _ in range(2):
                optimizer.zero_grad()
                for part in x.chunk(micro):
                    if order == "before":
                        search()
                    (model(part).square().mean() / micro).backward()
                    if order == "after":
                        search()
                optimizer.step()
        rows.append(monitor.history.rows)
    for row, expected in zip(*rows, strict=True):
        assert row["status"] == "ok"
        assert row["batch"] == 8
        for column in ("mu", "kappa", "lambda_sq", "gHg", "dz3"):
            assert row[column] == pytest.approx(expected[column], rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("by_hand", ["first", "second", "both"])
def test_gradients_added_by_hand(by_hand):
    """What `torch.autograd.grad` gives and the user adds to ``grad`` belongs to the batch."""
    rows = []
    for hand in (by_hand, "none"):
        torch.manual_seed(3)
        model = mlp().double()
        optimizer = sgd(model)
        x = torch.randn(8, 6, dtype=torch.float64)
        with LipschitzMonitor(model, optimizer, noise="split") as monitor:
            for _ in range(2):
                optimizer.zero_grad()
                for part, name in zip(x.chunk(2), ("first", "second"), strict=True):
                    loss = model(part).square().mean() / 2
                    if hand not in (name, "both"):
                        loss.backward()
                        continue
                    parameters = list(model.parameters())
                    for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                        p.grad = g if p.grad is None else p.grad + g
                optimizer.step()
        rows.append(monitor.history.rows)
    for row, expected in zip(*rows, strict=True):
        assert (row["status"], row["batch"]) == ("ok", 8)
        for column in ("mu", "kappa", "kappa_var", "lambda_sq", "gHg", "dz3"):
            assert row[column] == pytest.approx(expected[column], rel=1e-12, nan_ok=True)


def test_a_retained_graph_is_called_so():
    model = mlp()
    with LipschitzMonitor(model, sgd(model)) as monitor:
        x = torch.randn(8, 6, requires_grad=True)
        loss = model(x).square().mean()
        torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
        monitor._optimizer.step()
    assert statuses(monitor)["0"] == "several backward passes through one forward pass"
    assert monitor.history.rows[0]["batch"] == 8


def test_frozen_with_a_gradient_of_zeros():
    """Plain SGD does not move it: nothing is wrong."""
    model = mlp()
    optimizer = sgd(model)
    with LipschitzMonitor(model, optimizer) as monitor:
        for step in range(3):
            if step == 1:
                model[0].requires_grad_(False)
            optimizer.zero_grad(set_to_none=False)
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
    assert statuses(monitor) == {"0": "frozen", "2": "ok", "network": "ok"}


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_frozen_with_a_gradient_left(optimizer):
    """What is frozen by requires_grad alone goes on moving where its gradient is kept: by decay and momentum."""
    model = mlp()
    settings = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    optimizer = optimizer(model.parameters(), lr=0.05, weight_decay=0.1, **settings)
    x = torch.randn(8, 6)
    with LipschitzMonitor(model, optimizer) as monitor:
        for step in range(4):
            if step == 2:
                model[0].requires_grad_(False)
            optimizer.zero_grad(set_to_none=step == 3)
            model(x).square().mean().backward()
            optimizer.step()
    assert statuses(monitor, 2)["0"] == "frozen with a gradient left, by which the optimizer still moves it"
    row = next(row for row in monitor.history if row["step"] == 2 and row["layer"] == "0")
    assert math.isnan(row["mu"])
    assert abs(row["dz"]) > 1e-4
    assert statuses(monitor, 3)["0"] == "frozen"


def test_a_module_that_returns_its_parameter():
    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self):
            return self.weight

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.position, self.head = Position(), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(x + self.position())

    model = Model()
    optimizer = sgd(model)
    with LipschitzMonitor(model, optimizer) as monitor:
        for _ in range(3):
            train(model, optimizer, torch.randn(8, 4, 6))
    assert not model.position.weight._backward_hooks
    assert statuses(monitor)["head"] == "ok"
    assert "past the monitor" in statuses(monitor)["position.weight"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
def test_a_compiled_step():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with LipschitzMonitor(model, optimizer) as monitor:
        step = torch.compile(lambda: optimizer.step(), backend="eager")
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            step()
    assert {row["status"] for row in monitor.history} == {"ok"}
    torch._dynamo.reset()


def test_a_step_that_is_made_again():
    model = mlp()
    optimizer, failures = sgd(model), [True]

    def fails_once(*args):
        if failures:
            failures.pop()
            raise RuntimeError("not yet")

    with LipschitzMonitor(model, optimizer) as monitor:
        optimizer.register_step_pre_hook(fails_once)
        model(torch.randn(8, 6)).square().mean().backward()
        with pytest.raises(RuntimeError, match="not yet"):
            optimizer.step()
        optimizer.step()
        train(model, optimizer)
    assert {row["status"] for row in monitor.history} == {"ok"}
    assert monitor.history.steps == [0, 1]


def test_an_expert_without_samples():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            to = x[:, 0] > 100.0
            out = x.new_zeros(len(x), 3)
            out[~to], out[to] = self.first(x[~to]), self.second(x[to])
            return out

    model = Experts()
    with LipschitzMonitor(model, sgd(model)) as monitor:
        train(model, monitor._optimizer)
    assert statuses(monitor)["first"] == "ok"
    assert statuses(monitor)["second"] == "no samples reached this layer"


class Router(nn.Module):
    """As Hugging Face's: logits, weights and choices in one tuple."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        logits = x @ self.weight.T
        return logits, logits.softmax(-1), logits.argmax(-1)


class RouterRule(FallbackRule):
    def output(self, module, output):
        return output[0]


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.router, self.head = nn.Linear(6, 6), Router(), nn.Linear(6, 3)

    def forward(self, x):
        x = self.trunk(x)
        _, weights, choices = self.router(x)
        return self.head(x * weights.gather(-1, choices[:, None]))


def test_a_module_that_returns_several_tensors():
    """Why it is not read is known; a rule of one's own says which is the output."""
    model = Weighted().double()
    x = torch.randn(8, 6).double()
    with LipschitzMonitor(model, sgd(model, 0.0)) as monitor:
        train(model, monitor._optimizer, x)
    found = statuses(monitor)
    assert found["router.weight"] == found["network"].removeprefix("router.weight: ")
    assert found["router.weight"].endswith("past the monitor: the module's output is not one tensor")
    register_rule(Router, RouterRule())
    try:
        with LipschitzMonitor(model, sgd(model)) as monitor:
            train(model, monitor._optimizer, x)
    finally:
        del _RULES[Router]
    assert set(statuses(monitor).values()) == {"ok"}
    assert monitor.history.rows[1]["kappa"] > 0


@pytest.mark.parametrize("depth", [3, 4])
def test_the_network_says_once_what_many_layers_say(depth):
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(depth)), nn.Linear(6, 1))
    with LipschitzMonitor(model, sgd(model)) as monitor:
        model(torch.randn(8, 6)).square().mean().backward()
        nn.utils.clip_grad_norm_([p for layer in model[:-1] for p in layer.parameters()], 1e-3)
        nn.utils.clip_grad_value_(model[-1].parameters(), 1e-3)
        monitor._optimizer.step()
    found = statuses(monitor)
    network = found.pop("network")
    assert len(set(found.values())) == 2
    several = "0, 1, 2" if depth == 3 else "4 layers"
    assert network == f"{several}: {found['0']}; {depth}: {found[str(depth)]}"


class Routed(nn.Module):
    """A gate sends each token to one of eight experts, of which so many are live."""

    def __init__(self, live):
        super().__init__()
        self.live, self.table, self.trunk = live, nn.Embedding(50, 6), nn.Linear(6, 6)
        self.gate, self.head = nn.Linear(6, 8), nn.Linear(6, 50)
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(8)])

    def forward(self, x):
        h = self.trunk(self.table(x))
        tokens = h.flatten(0, 1)
        weight, to = self.gate(tokens)[:, : self.live].softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            (own,) = torch.where(to == i)
            out = out.index_add(0, own, expert(tokens[own]) * weight[own, None])
        return self.head(h + out.view_as(h))


def test_experts_without_samples_have_no_vote():
    """Six of them would make the number of tokens, which the gate saw, the usual one."""
    model, x = Routed(live=2), torch.randint(50, (8, 12))
    optimizer = sgd(model)
    with LipschitzMonitor(model, optimizer) as monitor:
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        optimizer.step()
    found = statuses(monitor)
    assert {name for name, status in found.items() if status == "ok"} == {"table", "trunk", "head"}
    assert all("different numbers of samples" in found[name] for name in ("gate", "experts.0", "experts.1", "network"))
    assert {found[f"experts.{i}"] for i in range(2, 8)} == {"no samples reached this layer"}
    assert {row["layer"]: row["batch"] for row in monitor.history}["network"] == 0


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_few_votes_more_are_no_majority(tokens):
    """Two layers saw 8 samples and one to three saw 24: only two against one are believed."""
    layers = [nn.Linear(6, 6), nn.Linear(6, 6), nn.Unflatten(1, (3, 2)), nn.Flatten(0, 1), nn.Linear(2, 2)]
    model = nn.Sequential(*layers, *(nn.Linear(2, 2) for _ in range(tokens - 1)))
    with LipschitzMonitor(model, sgd(model)) as monitor:
        train(model, monitor._optimizer)
    fine = [name for name, status in statuses(monitor).items() if status == "ok"]
    assert fine == (["0", "1"] if tokens == 1 else [])


def test_what_is_refused_at_once():
    model = mlp()
    for sinks in ("rows.jsonl", Path("rows.jsonl"), None, 5, torch.tensor(3)):
        with pytest.raises(TypeError, match=r"expected a list of sinks, got .*; for a file \[JsonLinesSink\(path\)\]"):
            LipschitzMonitor(model, sgd(model), sinks=sinks)
    with pytest.raises(TypeError, match=r"expected reference\(model\) to give gradients, got 5"):
        LipschitzMonitor(model, sgd(model), reference=5)
    model.requires_grad_(False)
    with pytest.raises(UnownedParametersError, match=r"got Sequential whose weights \(0, 2\) are all frozen; turn"):
        LipschitzMonitor(model, sgd(model))


class FactorsBesideTheBase(nn.Module):
    def __init__(self, frozen):
        super().__init__()
        self.base = nn.Linear(6, 5).requires_grad_(not frozen)
        self.up, self.down = nn.Parameter(torch.zeros(5, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("frozen", [True, False])
def test_trained_factors_that_no_rule_reads(frozen):
    """Whoever turns requires_grad on for the base, or hands it to the optimizer, has lost the job."""
    model = nn.Sequential(FactorsBesideTheBase(frozen), nn.LayerNorm(5))
    factors = [p for name, p in model.named_parameters() if "base" not in name]
    message = r"trains what is skipped \(0: FactorsBesideTheBase owns parameters .*\); teach .*register_rule.*LowRank"
    with pytest.raises(UnownedParametersError, match=message):
        LipschitzMonitor(model, torch.optim.SGD(factors, lr=0.1))
    with pytest.raises(UnownedParametersError, match=r"frozen; turn|make the optimizer from"):
        LipschitzMonitor(model, torch.optim.SGD(model[1].parameters(), lr=0.1))


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("bias", [True, False])
def test_parametrised_layers_are_there(kind, bias):
    parametrise = getattr(nn.utils.parametrizations, kind)
    model = nn.Sequential(parametrise(nn.Linear(6, 5, bias=bias)), parametrise(nn.Linear(5, 3, bias=bias)))
    with pytest.raises(NoSupportedLayerError, match=r"whose weight is a parameter itself, .*, got Sequential \(0: its"):
        LipschitzMonitor(model, sgd(model))
    model.append(nn.Linear(3, 3).requires_grad_(False))
    with pytest.raises(UnownedParametersError, match=r"trains what is skipped \(0: its weight is computed from other"):
        LipschitzMonitor(model, sgd(model))


@pytest.mark.parametrize("state", [None, {}, {"history": {"rows": [], "meta": {}}}])
def test_the_state_of_something_else(state):
    model = mlp()
    with LipschitzMonitor(model, sgd(model)) as monitor:
        train(model, monitor._optimizer)
        with pytest.raises(ResumeError, match=r"expected what LipschitzMonitor\.state_dict\(\) returned, got"):
            monitor.load_state_dict(state)
        assert len(monitor.history) == 3


def test_a_weight_without_a_shape_yet_is_skipped():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with LipschitzMonitor(model, sgd(model)) as monitor:
        assert monitor.skipped == {"0": "its weight has no shape yet; run one forward pass first"}


@pytest.mark.parametrize("kind", [nn.Linear, nn.MultiheadAttention])
def test_weights_without_storage_are_skipped(kind):
    """As in a model that is loaded piece by piece."""
    reason = "its weight is on the meta device; load it, or give it storage, first"
    model = nn.ModuleList([kind(4, 2, device="meta"), nn.Linear(4, 2)])
    monitor = LipschitzMonitor(model, sgd(model))
    assert monitor.layers == ["1"]
    assert set(monitor.skipped.values()) == {reason}
    with pytest.raises(NoSupportedLayerError, match=reason):
        LipschitzMonitor(model[:1], sgd(model[:1]))


@pytest.mark.parametrize("kind", ["full", "independent"])
def test_a_reference_from_the_very_loader_of_the_training(kind):
    """Its generator, NumPy's and Python's are as they were; another monitor does not take its passes for training."""

    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return torch.full((6,), float(index)) + np.random.rand() + random.random()  # noqa: NPY002

    def run(watched):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        model = mlp()
        optimizer = sgd(model, 0.001)
        loader = torch.utils.data.DataLoader(
            Noisy(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1)
        )
        monitors = []
        if watched:
            reference = MeanGradient(loader, lambda model, x: model(x).square().mean(), kind)
            monitors = [LipschitzMonitor(model, optimizer, reference=reference), LipschitzMonitor(model, optimizer)]
        for _ in range(2):
            for x in loader:
                train(model, optimizer, x)
        for monitor in monitors:
            assert {row["status"] for row in monitor.history} == {"ok"}
            assert {row["batch"] for row in monitor.history} == {4}
            monitor.close()
        return list(model.parameters())

    for p, q in zip(run(True), run(False), strict=True):
        assert torch.equal(p, q)


def test_parameters_added_later_are_spoken_of():
    model, more = mlp(), nn.Linear(3, 3)
    optimizer = sgd(model)
    with LipschitzMonitor(model, optimizer) as monitor:
        train(model, optimizer)
        optimizer.add_param_group({"params": more.parameters()})
        with pytest.warns(UserWarning, match="got more: they are not monitored"):
            train(model, optimizer)
        train(model, optimizer)  # once is enough
    assert monitor.layers == ["0", "2"]


def test_steps_of_another_optimizer_are_missed():
    model = mlp()
    given, other = sgd(model), sgd(model)
    with LipschitzMonitor(model, given) as monitor:
        for _ in range(100):
            train(model, other)
        with pytest.warns(UserWarning, match="got 100 cleared gradients without one"):
            train(model, other)
        train(model, other)  # once is enough
    assert not monitor.history.rows


def test_frozen_and_closed_keep_no_matrices():
    """Of a frozen weight only its values are kept, to see it move; of a closed monitor's nothing."""
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    monitor = LipschitzMonitor(model, optimizer)
    train(model, optimizer)
    frozen, trained = monitor._watches[:2]
    assert frozen.spectrum.triplet is None
    assert trained.spectrum.triplet is not None
    monitor.close()
    for watch in monitor._watches:
        assert watch.values == []
        assert watch.spectrum.triplet is None
        assert watch.spectrum.matrices.numel() == 0
    assert monitor.log_k == pytest.approx(monitor.history.rows[-1]["z"] + monitor.history.rows[-1]["dz"])


def test_a_frozen_layer_costs_no_decomposition(monkeypatch):
    """Nothing is read again of a weight that stays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 80), nn.Tanh(), nn.Linear(80, 3))
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    shapes = []
    for name in ("svd", "eigh", "eigvalsh"):
        routine = getattr(np.linalg, name)
        monkeypatch.setattr(
            np.linalg,
            name,
            lambda a, *args, routine=routine, **kwargs: (shapes.append(a.shape), routine(a, *args, **kwargs))[1],
        )
    with LipschitzMonitor(model, optimizer) as monitor:
        shapes.clear()
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(8, 70)).square().mean().backward()
            optimizer.step()
    assert max(max(shape) for shape in shapes) <= 80
    assert all(70 not in shape[-2:] for shape in shapes)
    assert [row["dz"] for row in monitor.history.rows if row["layer"] == "0"] == [0.0, 0.0]
