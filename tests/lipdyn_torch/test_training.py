"""Training loops as people write them: the rows are those of the plain loop, or say what is different."""

from __future__ import annotations

import gc
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import lipdyn_torch
from lipdyn_torch import LipschitzMonitor
from lipdyn_torch.errors import LayerReplacedError, SilentHookError
from lipdyn_torch.history import ResumeError
from lipdyn_torch.layers import register_rule
from lipdyn_torch.low_rank import LowRankSumRule
from lipdyn_torch.monitor import _EAGER
from lipdyn_torch.predict import sde

FORCES = ["mu", "kappa", "lambda_sq"]


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def data(dtype: torch.dtype = torch.float32, samples: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(samples, 6, generator=generator).to(dtype), torch.randint(3, (samples,), generator=generator)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def run(loop, model=None, optimizer=None, **settings):
    """Rows of a loop ``loop(model, optimizer)``."""
    model = model or mlp(torch.float64)
    optimizer = optimizer or sgd(model)
    with LipschitzMonitor(model, optimizer, **settings) as monitor:
        loop(model, optimizer)
    return monitor.history.rows


def plain(model, optimizer, forward=None, steps: int = 2):
    x, y = data(next(model.parameters()).dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy((forward or model)(x), y).backward()
        optimizer.step()


def same(rows, expected, rel: float = 1e-9):
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row["status"] == other["status"]
        for key, value in other.items():
            if isinstance(value, float):
                assert row[key] == pytest.approx(value, rel=rel, abs=1e-14, nan_ok=True), (row["layer"], key)


# --- where the samples are ---


class Encoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(7, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=batch_first)
        self.head = nn.Linear(6, 3)
        self.batch_first = batch_first

    def forward(self, x):
        return self.head(self.layer(self.table(x)).mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("steps", [12, 5], ids=["as many as samples", "fewer"])
@pytest.mark.parametrize("named", [True, False])
def test_sequences_with_time_first(steps, named):
    """The same numbers as with the samples first; only the table is ours to declare."""
    index = torch.randint(7, (12, steps), generator=torch.Generator().manual_seed(0))

    def rows(batch_first, **settings):
        model = Encoder(batch_first).double()
        x = index if batch_first else index.T
        return run(lambda m, o: plain_on(m, o, x), model, **settings)

    def plain_on(model, optimizer, x):
        _, y = data()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    same(rows(False, batch_dim={"table": 1} if named else 1), rows(True), rel=1e-7)
    untold = rows(False)
    assert all(
        row["kappa"] == pytest.approx(other["kappa"]) for row, other in zip(untold[1:7], rows(True)[1:7], strict=True)
    )
    if steps != 12:  # the table sees five samples, the others twelve
        assert "layers saw different numbers of samples: 5, 12" in untold[0]["status"]


def test_a_mapping_overrides_single_layers_of_a_transformer():
    """By name even torch's own layers may be told otherwise; the others keep their axis."""

    def loop(model, optimizer):
        functional.cross_entropy(model(torch.arange(60).reshape(5, 12) % 7), data()[1]).backward()
        optimizer.step()

    usual, told = (run(loop, Encoder(False).double(), batch_dim=dims) for dims in ({}, {"layer.linear1": 0}))
    seen = {row["layer"]: row["batch"] for row in told if row["batch"] != 12}
    assert seen == {"table": 5, "layer.linear1": 5, "network": 0}
    assert [row["layer"] for row in usual if row["batch"] != 12] == ["table", "network"]


class Recurrent(nn.Module):
    """Convolutions and a sum with low-rank factors, before and after what is read with time first."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.body, self.back = nn.Conv1d(2, 6, 3, padding=1), LowRank(), nn.ConvTranspose1d(6, 3, 2)
        self.head, self.time_first = nn.Linear(3, 3), time_first

    def forward(self, x):
        x = self.conv(x)  # (M, 6, T)
        x = x.permute(2, 0, 1) if self.time_first else x.permute(0, 2, 1)
        x = torch.tanh(self.body(x))
        x = self.back(x.permute(1, 2, 0) if self.time_first else x.permute(0, 2, 1))
        return self.head(x.permute(2, 0, 1).mean(0) if self.time_first else x.mean(2))


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.up, self.down = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


register_rule(LowRank, LowRankSumRule("base.weight", "up", "down"))


@pytest.mark.parametrize("steps", [12, 5], ids=["as many as samples", "fewer"])
def test_convolutions_have_the_samples_first(steps):
    """Whatever is said of the layers that read sequences."""
    x = torch.randn(12, 2, steps, dtype=torch.float64)

    def loop(model, optimizer):
        functional.cross_entropy(model(x), data()[1]).backward()
        optimizer.step()

    first = run(loop, Recurrent(False).double())
    assert {row["status"] for row in first} == {"ok"}
    same(run(loop, Recurrent(True).double(), batch_dim=1), first)


def test_batch_dim_is_checked():
    model = mlp()
    for wrong, message in (({"7": 1}, "names of model.named_modules"), (-1, "whole numbers"), ({"0": 0.5}, "whole")):
        with pytest.raises(ValueError, match=message):
            LipschitzMonitor(model, sgd(model), batch_dim=wrong)


def test_samples_that_the_loss_ignores_are_counted_in_the_status():
    def loop(model, optimizer):
        x, y = data(torch.float64)
        y[:3] = -100
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    assert all(row["status"].count("3 of 12 samples had no gradient in any layer") for row in run(loop)[:-1])


# --- precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rel"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_autocast_gives_terms_in_true_units(dtype, rel):
    def loop(model, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=dtype == torch.float16)
        x, y = data()
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    mixed = run(loop, model=mlp())
    single = run(plain, model=mlp())
    assert len(mixed) == len(single)
    for row, expected in zip(mixed, single, strict=True):
        if dtype == torch.float16:
            assert "gradients were rescaled after the backward pass: factor 0.000244" in row["status"]
        else:
            assert row["status"] == "ok"
        for key in FORCES:
            scale = max(abs(r[key]) for r in single)
            assert row[key] == pytest.approx(expected[key], rel=rel, abs=rel * scale * 0.2), key


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_clipping_by_value_is_noticed_in_half_precision(share):
    """The rounding of 256 samples averages out; what a tenth of the entries lose does not."""
    model = mlp()
    optimizer = sgd(model)
    x, y = data(samples=256)
    with LipschitzMonitor(model, optimizer) as monitor:
        for clip in (False, True):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = functional.cross_entropy(model(x), y)
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_value_(model.parameters(), float(model[4].weight.grad.abs().quantile(share)))
            optimizer.step()
    statuses = {(row["step"], row["layer"]): row["status"] for row in monitor.history}
    assert statuses[0, "4"] == "ok"
    assert "do not sum to the gradient" in statuses[1, "4"]


def test_a_step_skipped_by_the_scaler_is_a_row_without_forces():
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)
    with LipschitzMonitor(model, optimizer) as monitor:
        for step in range(3):
            x, y = data()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss = functional.cross_entropy(model(x), y) * (math.inf if step == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert monitor.history.steps == [0, 1, 2]
    skipped = [row for row in monitor.history if row["step"] == 1]
    for row in skipped:
        assert "step skipped: gradients were cleared without a step" in row["status"]
        assert all(math.isnan(row[key]) for key in FORCES)
        assert row["dz"] == row["dz2"] == row["eps"] == 0.0
    assert all("skipped" not in row["status"] for row in monitor.history if row["step"] != 1)
    assert not any(math.isnan(row["kappa"]) for row in monitor.history if row["step"] != 1)


def test_fused_optimisers_unscale_inside_the_step():
    def loop(scaled):
        def steps(model, optimizer):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled, growth_interval=1000)
            x, y = data()
            for step in range(3):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(x), y)
                if step == 1 and scaled:
                    loss = loss * math.inf
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

        return steps

    rows = []
    for scaled in (True, False):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        rows.append(run(loop(scaled), model=model, optimizer=optimizer))
    scaled, plainly = rows
    for row, expected in zip(scaled[:4], plainly[:4], strict=True):
        assert row["kappa"] == pytest.approx(expected["kappa"], rel=1e-4)
        assert row["mu"] == pytest.approx(expected["mu"], rel=1e-3)
    assert all("overflowed" in row["status"] and row["dz"] == 0.0 for row in scaled[4:8])
    assert all(math.isnan(row["mu"]) for row in scaled[4:8])


# --- shape of the loop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("noise", ["full", "split"])
def test_activation_checkpointing(reentrant, noise):
    def forward(model):
        def inner(x):
            x = x.requires_grad_()
            x = checkpoint(model[:2], x, use_reentrant=reentrant)
            return checkpoint(model[2:], x, use_reentrant=reentrant)

        return inner

    expected = run(plain, noise=noise)
    same(run(lambda m, o: plain(m, o, forward(m)), noise=noise), expected)


def test_a_weight_shared_across_checkpoints_is_one_batch():
    """The same layer inside and outside a reentrant checkpoint: samples are paired, not appended."""

    def forward(model, inside):
        def inner(x):
            x = model[0](x.requires_grad_())
            body = nn.Sequential(nn.Tanh(), model[2], nn.Tanh(), model[2])
            x = checkpoint(body, x, use_reentrant=True) if inside else body(x)
            return model[4](torch.tanh(model[2](x)))

        return inner

    tables = [run(lambda m, o, inside=inside: plain(m, o, forward(m, inside), 1)) for inside in (False, True)]
    assert {row["batch"] for row in tables[1]} == {12}
    same(tables[1], tables[0])


@pytest.mark.parametrize("noise", ["full", "split"])
@pytest.mark.parametrize("make", [sgd, lambda model: torch.optim.Adam(model.parameters(), lr=1e-3)])
def test_gradient_accumulation(make, noise):
    def pieces(model, optimizer):
        x, y = data(torch.float64)
        for _ in range(2):
            optimizer.zero_grad()
            for part in range(3):
                functional.cross_entropy(model(x[part::3]), y[part::3]).backward()
            for p in model.parameters():
                p.grad /= 3  # averaged by hand, after the backward passes
            optimizer.step()

    rows = []
    for loop in (plain, pieces):
        model = mlp(torch.float64)
        rows.append(run(loop, model=model, optimizer=make(model), noise=noise))
    expected, accumulated = rows
    assert {row["batch"] for row in accumulated} == {12}
    assert all("factor 0.333" in row["status"] for row in accumulated)
    for row in accumulated:
        row["status"] = "ok"
    same(accumulated, expected)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_with_a_layer_that_learns_nothing_yet(set_to_none):
    """The head is zero, so no gradient gets behind it: that is no sign that gradients were cleared."""

    def loop(parts):
        def train(model, optimizer):
            nn.init.zeros_(model[4].weight)
            x, y = data(torch.float64)
            for _ in range(3):
                optimizer.zero_grad(set_to_none)
                for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    (functional.cross_entropy(model(a), b) / parts).backward()
                optimizer.step()

        return train

    expected = run(loop(1))
    assert len(expected) == 3 * 4
    same(run(loop(4)), expected)


def test_gradients_cleared_on_purpose_are_no_step():
    """As in a GAN, where the other network's loss reaches this one's weights."""

    def loop(model, optimizer):
        x, y = data(torch.float64)
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    same(run(loop), run(lambda model, optimizer: plain(model, optimizer, steps=3)))


@pytest.mark.parametrize("early", [False, True], ids=["before the forward pass", "after it"])
def test_gradients_cleared_before_or_after_the_forward_pass(early):
    """A step that overflows is skipped by the scaler, and what it left is cleared at one time or the other."""
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x, y = data()
    with LipschitzMonitor(model, optimizer) as monitor:
        for step in range(3):
            if early:
                optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y) * (math.inf if step == 1 else 1.0)
            if not early:
                optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    batches = [row["batch"] for row in monitor.history if row["layer"] == "0"]
    statuses = [row["status"] for row in monitor.history if row["layer"] == "0"]
    assert batches == [12, 12, 12]
    assert ["skipped" in status for status in statuses] == [False, True, False]
    assert all(math.isfinite(row["kappa"]) for row in monitor.history if row["step"] != 1)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_evaluation_between_steps_and_both_ways_to_clear_gradients(set_to_none):
    def loop(model, optimizer):
        x, y = data(torch.float64)
        for _ in range(2):
            model.eval()
            with torch.no_grad():
                model(x)
            with torch.inference_mode():
                model(x)
            model(x).sum()  # never differentiated
            model.train()
            optimizer.zero_grad(set_to_none=set_to_none)
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    same(run(loop), run(plain))


def test_a_changed_batch_size():
    def loop(model, optimizer):
        for samples in (12, 5, 1, 7):
            x, y = data(torch.float64, samples)
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    rows = run(loop)
    assert [row["batch"] for row in rows if row["layer"] == "network"] == [12, 5, 1, 7]
    assert {row["status"] for row in rows if row["batch"] > 1} == {"ok"}


def test_nan_loss_marks_the_row_and_leaves_training_alone():
    def loop(model, optimizer):
        x, y = data(torch.float64)
        (functional.cross_entropy(model(x), y) * math.nan).backward()
        optimizer.step()

    model = mlp(torch.float64)
    rows = run(loop, model=model)
    assert all("gradient is not finite" in row["status"] for row in rows)
    assert all(math.isnan(row["mu"]) for row in rows)
    assert bool(model[0].weight.isnan().all())


def test_the_step_may_be_under_autocast():
    def loop(model, optimizer):
        x, y = data()
        for _ in range(2):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                optimizer.step()

    same(run(loop, model=mlp()), run(plain, model=mlp()), rel=1e-12)


LAYERS = [nn.Linear(6, 3), nn.Conv1d(2, 3, 2), nn.Embedding(6, 3)]


NO_SAMPLES = "no samples reached this layer"


@pytest.mark.parametrize("noise", ["full", "split", "factor"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_an_empty_batch_has_no_noise(layer, noise):
    def loop(model, optimizer):
        x = {nn.Linear: torch.ones(0, 6), nn.Conv1d: torch.ones(0, 2, 4)}.get(type(layer), torch.ones(0, 2).long())
        model(x).square().sum().backward()
        optimizer.step()

    rows = run(loop, model=nn.Sequential(layer), noise=noise)
    forces = [*FORCES, "gHg"] + ["kappa_var", "kappa_cov", "lambda_sq_var", "lambda_sq_cov"] * (noise != "full")
    assert [row["batch"] for row in rows] == [0, 0]
    assert [row["status"] for row in rows] == [NO_SAMPLES, f"0: {NO_SAMPLES}"]
    assert all(row[key] == 0.0 for row in rows for key in forces if key != "gHg" or row["layer"] != "network")
    assert rows[0]["dz"] == 0.0


@pytest.mark.parametrize("sampling", ["iid", "shuffle"])
@pytest.mark.parametrize(
    ("settings", "drift"),
    [({}, 0.0), ({"momentum": 0.9}, 0.0), ({"momentum": 0.5, "weight_decay": 0.1}, -0.1 / (1 - 0.5))],
)
def test_an_empty_batch_among_others(settings, drift, sampling):
    """Momentum and decay move the weights; the long-run effect of this step is that of the decay alone."""

    def loop(model, optimizer):
        for samples in (8, 8, 0, 8, 8):
            optimizer.zero_grad()
            model(torch.randn(samples, 6, dtype=torch.float64)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, **settings)
    with LipschitzMonitor(model, optimizer, sampling=sampling, dataset_size=16) as monitor:
        loop(model, optimizer)
    for row in monitor.history:
        if row["layer"] == "network":
            continue
        if row["step"] != 2:
            assert (row["status"], row["batch"]) == ("ok", 8)
            continue
        assert (row["status"], row["batch"], row["kappa"], row["lambda_sq"]) == (NO_SAMPLES, 0, 0.0, 0.0)
        assert row["mu"] == pytest.approx(drift, rel=1e-12)
        assert (row["dz"] != 0.0) == ("momentum" in settings)
    found = sde(monitor.history)
    assert all(map(math.isfinite, [*found.predicted, *found.half_width]))
    if sampling == "shuffle":  # the bridge closes after two batches, with or without the empty one between
        assert found.half_width[[2, 3, 5]] == pytest.approx(0.0, abs=1e-9)
        assert found.half_width[4] > 0.0


def test_a_large_weight_set_to_zero():
    """It is no longer where the search for its singular vectors could begin."""

    def loop(model, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(4, 300)).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                model[0].weight.zero_()

    rows = run(loop, model=nn.Sequential(nn.Linear(300, 260)))
    assert [row["status"] for row in rows if row["layer"] == "0"][1].startswith("weight is zero")


@pytest.mark.parametrize("group", [0, 1])
def test_nan_in_one_group_of_a_convolution(group):
    def loop(model, optimizer):
        model(torch.randn(4, 4, 5)).square().mean().backward()
        model[0].weight.grad[2 * group] = math.nan
        optimizer.step()

    torch.manual_seed(0)
    rows = run(loop, model=nn.Sequential(nn.Conv1d(4, 4, 2, groups=2)))
    assert "gradient is not finite" in rows[0]["status"]
    assert all(math.isnan(rows[0][key]) for key in ("eps", "bound", "dz", "mu"))


def test_a_rule_may_read_more_than_parameters():
    """A scale that changes between two steps belongs to neither of them."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.scale = nn.Linear(6, 3, dtype=torch.float64), 1.0
            self.up = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
            self.down = nn.Parameter(torch.randn(2, 6, dtype=torch.float64))

        def forward(self, x):
            return self.base(x) + self.scale * x @ self.down.T @ self.up.T

    register_rule(Sum, LowRankSumRule("base.weight", "up", "down", scaling="scale"))

    def loop(model, optimizer):
        for scale in (1.0, 3.0):
            model.scale = scale
            plain(model, optimizer, steps=1)
            expected.append(torch.linalg.matrix_norm(model.base.weight + scale * model.up @ model.down, 2).item())

    torch.manual_seed(0)
    expected: list[float] = []
    rows = [row for row in run(loop, model=Sum()) if row["layer"] != "network"]
    assert [row["status"] for row in rows] == ["ok", "weight was changed since the last step"]
    assert [math.exp(row["z"] + row["dz"]) for row in rows] == pytest.approx(expected, rel=1e-12)
    assert rows[1]["z"] != pytest.approx(rows[0]["z"] + rows[0]["dz"], abs=0.1)


def test_a_replaced_layer_or_weight_is_an_error():
    for replace in (
        lambda m: m.__setitem__(2, nn.Linear(8, 8)),
        lambda m: setattr(m[2], "weight", nn.Parameter(torch.randn(8, 8))),
        lambda m: m.__delitem__(4),
    ):
        model = mlp()
        optimizer = sgd(model)
        with LipschitzMonitor(model, optimizer):
            replace(model)
            model(data()[0]).sum().backward()
            with pytest.raises(LayerReplacedError, match=r"expected layer '[24]' to be the one .* attach a new one"):
                optimizer.step()


@pytest.mark.parametrize("change", ["prune", "parametrise"])
def test_a_weight_that_becomes_a_function_of_others_is_an_error(change):
    model = mlp()
    optimizer = sgd(model)
    monitor = LipschitzMonitor(model, optimizer)
    if change == "prune":
        prune.l1_unstructured(model[2], "weight", 0.5)
    else:
        nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(LayerReplacedError, match="expected layer '2' to be the one"):
        plain(model, optimizer)
    monitor.close()


def test_resume_with_other_widths_is_an_error():
    def state(width):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))
        with LipschitzMonitor(model, sgd(model)) as monitor:
            plain(model, monitor._optimizer)
        return monitor, monitor.state_dict()

    (monitor, _), (_, other) = state(8), state(20)
    with pytest.raises(ResumeError, match="to have shapes"):
        monitor.load_state_dict(other)


def test_lbfgs_has_the_path_over_all_its_evaluations():
    model = mlp(torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    x, y = data(torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    norm = float(torch.linalg.matrix_norm(model[0].weight.detach(), 2))
    with LipschitzMonitor(model, optimizer) as monitor:
        optimizer.step(closure)
    row = monitor.history.rows[0]
    after = float(torch.linalg.matrix_norm(model[0].weight.detach(), 2))
    assert "LBFGS: drift and noise terms are not known" in row["status"]
    assert row["dz"] == pytest.approx(math.log(after / norm), abs=1e-12)


def test_adam_with_a_closure():
    def loop(model, optimizer):
        x, y = data(torch.float64)

        def closure():
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)

    rows = []
    for steps in (plain, loop):
        model = mlp(torch.float64)
        rows.append(run(steps, model=model, optimizer=torch.optim.Adam(model.parameters(), lr=1e-3)))
    same(rows[1], rows[0])


def test_accumulation_whose_last_batch_is_in_the_closure():
    """As Lightning does it; a closure that clears the gradients first discards what came before."""

    def loop(clears):
        def steps(model, optimizer):
            x, y = data(torch.float64)
            optimizer.zero_grad()
            (functional.cross_entropy(model(x[:6]), y[:6]) / 2).backward()

            def closure():
                if clears:
                    optimizer.zero_grad()
                loss = functional.cross_entropy(model(x[6:]), y[6:]) / 2
                loss.backward()
                return loss

            optimizer.step(closure)

        return steps

    same(run(loop(False)), run(lambda m, o: plain(m, o, steps=1)))
    cleared = run(loop(True))
    assert {row["batch"] for row in cleared} == {6}
    assert {row["status"] for row in cleared} == {"ok"}
    assert {row["step"] for row in cleared} == {0}


# --- compiled models -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["function", "method"])
def test_compiled_models_run_eagerly_on_measured_steps(way):
    torch.compiler.reset()
    model = mlp(torch.float64)
    if way == "method":
        model.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    optimizer = sgd(model)
    with LipschitzMonitor(compiled, optimizer, every=2) as monitor:
        plain(model, optimizer, compiled, 5)
    expected = run(lambda m, o: plain(m, o, steps=5), every=2)
    same(monitor.history.rows, expected)
    assert monitor.history.steps == [0, 2, 4]
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
def test_a_monitor_of_a_model_that_is_compiled_already():
    """What torch has compiled before there were hooks knows none; on measured steps it is not used."""
    torch.compiler.reset()
    model = mlp(torch.float64)
    compiled = torch.compile(model, backend="eager")
    compiled(data(torch.float64)[0])
    same(run(lambda m, o: plain(m, o, compiled), model), run(plain))
    torch.compiler.reset()


def test_a_layer_that_returns_no_tensor_is_an_error():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.randn(6, 3))

        def forward(self, x):
            return x @ self.mix, None

    model = Pair()
    with pytest.raises(SilentHookError, match=r"hooks on Pair.mix .* came past them; .* must return one tensor"):
        run(lambda m, o: plain(m, o, lambda x: m(x)[0]), model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("every", [1, 2, 3])
def test_several_steps_in_one_compiled_function(every):
    """Measured steps begin inside it, where it is too late to leave it: torch breaks its graphs at the hooks."""
    torch.compiler.reset()
    model = mlp(torch.float64)
    optimizer, graphs = sgd(model), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def steps():
        plain(model, optimizer, steps=2)

    with LipschitzMonitor(model, optimizer, every=every) as monitor:
        compiled = torch.compile(steps, backend=backend)
        for _ in range(3):
            compiled()
    same(monitor.history.rows, run(lambda m, o: plain(m, o, steps=6), every=every))
    traced = [node.stack_trace or "" for graph in graphs for node in graph.graph.nodes]
    assert not any(str(Path(lipdyn_torch.__file__).parent) in trace for trace in traced)
    torch.compiler.reset()


def stance() -> str:
    gc.collect()
    return torch._dynamo.eval_frame._stance.stance


@pytest.mark.parametrize("closed", [True, False])
def test_a_monitor_that_is_dropped_leaves_the_process_compiled(closed):
    def train_and_forget():
        model = mlp()
        optimizer = sgd(model)
        monitor = LipschitzMonitor(model, optimizer)
        plain(model, optimizer)
        assert stance() == "force_eager"
        if closed:
            state = monitor.state_dict()
            monitor.close()
            monitor.load_state_dict(state)
            assert stance() == "default"

    assert stance() == "default"
    train_and_forget()
    assert stance() == "default"


def test_garbage_may_be_collected_at_any_point():
    """A monitor that was dropped goes while another one turns torch's stance: after each instruction, one by one."""

    def attach() -> LipschitzMonitor:
        model = mlp()
        return LipschitzMonitor(model, sgd(model))

    def turn(on: bool, count: int) -> int:
        """Collect after so many instructions; returns how many there are."""
        done = 0

        def trace(frame, event, arg):
            nonlocal done
            if frame.f_code is _EAGER.want.__func__.__code__ and count > 0:
                frame.f_trace_opcodes = True
                done += event == "opcode"
                if done == count:
                    sys.settrace(None)
                    gc.collect()
                return trace
            return None

        attach()
        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            _EAGER.want(0, on)
        finally:
            sys.settrace(previous)
        return done

    assert stance() == "default"
    gc.disable()
    gc.freeze()  # what there is already needs no looking through
    try:
        count = 1
        while count in (turn(True, count), turn(False, count)):
            assert (stance(), _EAGER.wanted) == ("default", set())
            count += 1
    finally:
        gc.unfreeze()
        gc.enable()
    assert count > 10


def test_a_monitor_lives_as_long_as_what_it_watches():
    """Dropped by its name alone it goes on: its hooks hold it."""
    model = mlp()
    optimizer = sgd(model)
    history = LipschitzMonitor(model, optimizer).history
    gc.collect()
    plain(model, optimizer)
    assert history.steps == [0, 1]
    assert stance() == "force_eager"
    del model, optimizer
    assert stance() == "default"


# --- schedules and resuming ----------------------------------------------------------------------------------


def test_warmup_then_every():
    rows = run(lambda m, o: plain(m, o, steps=9), every=3, warmup=2)
    assert sorted({row["step"] for row in rows}) == [2, 5, 8]


@pytest.mark.parametrize(("budget", "period"), [(25.0, 16), (100.0, 4), (1e6, 1), (1.0, 400)])
def test_auto_keeps_to_the_budget(budget, period, monkeypatch):
    """By a clock on which a step takes one second, and a measured one five."""
    seconds = itertools.count()
    write = LipschitzMonitor._write

    def slow_write(self, measurements):
        for _ in range(4):
            next(seconds)
        return write(self, measurements)

    monkeypatch.setattr("lipdyn_torch.monitor.time.perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr(LipschitzMonitor, "_write", slow_write)
    rows = run(lambda m, o: plain(m, o, steps=60), every="auto", budget=budget)
    steps = sorted({row["step"] for row in rows})
    assert steps[:5] == [0, 2, 4, 6, 8]  # until enough is known
    assert all(later - earlier == period for earlier, later in itertools.pairwise(steps[4:]))
    assert steps[-1] > 60 - period - 1
    assert {row["status"] for row in rows} == {"ok"}


@pytest.mark.parametrize("every", [1, 3])
def test_stop_and_resume_gives_the_same_rows(every, tmp_path):
    whole = run(lambda m, o: plain(m, o, steps=8), every=every)
    model = mlp(torch.float64)
    optimizer = sgd(model)
    with LipschitzMonitor(model, optimizer, every=every) as monitor:
        plain(model, optimizer, steps=4)
    torch.save([model.state_dict(), optimizer.state_dict(), monitor.state_dict()], tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    model = mlp(torch.float64)
    optimizer = sgd(model)
    with LipschitzMonitor(model, optimizer, every=every) as monitor:
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
        monitor.load_state_dict(states[2])
        plain(model, optimizer, steps=4)
    assert str(monitor.history.rows) == str(whole)
    other = nn.Linear(3, 2)
    with LipschitzMonitor(other, sgd(other)) as monitor, pytest.raises(ResumeError):
        monitor.load_state_dict(states[2])


# --- nothing is changed, nothing is kept ---------------------------------------------------------------------


class Everything(nn.Module):
    """A layer of each kind, with dropout and BatchNorm."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.conv = nn.Conv1d(6, 6, 3, groups=2)
        self.back = nn.ConvTranspose1d(6, 4, 3)
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.2)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.table(x)
        x = self.attention(x, x, x)[0].transpose(1, 2)
        x = functional.relu(self.back(functional.relu(self.conv(x), inplace=True)))
        return self.head(self.drop(self.norm(x)).flatten(1))


@pytest.mark.parametrize("make", [sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("settings", [{}, {"noise": "split"}, {"every": "auto"}], ids=["full", "split", "auto"])
def test_training_is_bitwise_the_same(make, settings):
    results = []
    for monitored in (False, True):
        torch.manual_seed(4)
        model = Everything()
        optimizer = make(model)
        monitor = LipschitzMonitor(model, optimizer, **settings) if monitored else None
        losses = []
        for step in range(6):
            x, y = torch.randint(5, (6, 4)), torch.randint(3, (6,))
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            losses.append(loss.item())
        gradients = [p.grad for p in model.parameters()]
        state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        results.append([losses, torch.get_rng_state(), *model.state_dict().values(), *gradients, *state])
        if monitor is not None:
            assert all("BatchNorm" in row["status"] for row in monitor.history if row["layer"] != "network")
            assert not any(math.isnan(row["kappa"]) for row in monitor.history)
            monitor.close()
            assert not any(m._forward_hooks for m in model.modules())
            assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    before, after = results
    assert len(before) == len(after)
    assert before[0] == after[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))


@pytest.mark.parametrize("make", [sgd, lambda m: torch.optim.Adam(m.parameters(), lr=1e-4)], ids=["sgd", "adam"])
def test_memory_does_not_grow(make):
    """Five thousand steps, one in twenty measured: objects and tensors alive stay as many as after a hundred."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = make(model)
    x = torch.randn(4, 3)

    def alive() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        return sum(issubclass(type(o), torch.Tensor) for o in objects), len(objects) - sum(
            map(len, monitor.history.rows)
        )

    with LipschitzMonitor(model, optimizer, every=20) as monitor:
        counts = []
        for step in range(5001):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if step % 20 == 15:
                monitor.history.rows.clear()
            if step in (215, 4995):
                counts.append(alive())
    assert counts[1][0] <= counts[0][0]
    assert counts[1][1] <= counts[0][1] + 100


# --- large layers, whose spectra are tracked ---


def wide(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(280, 300), nn.ReLU(), nn.Linear(300, 4)).to(dtype)


def wide_batches(dtype: torch.dtype, steps: int):
    generator = torch.Generator().manual_seed(6)
    for _ in range(steps):
        x = torch.randn(16, 280, generator=generator, dtype=torch.float64)
        yield x.float().to(dtype), torch.randint(4, (16,), generator=generator)


@pytest.mark.parametrize("noise", ["full", "split"])
def test_a_large_layer_in_single_precision(noise):
    """The Cholesky factor is in single precision: the terms are those of float64 to 1e-4."""
    rows = {}
    for dtype in (torch.float32, torch.float64):
        model = wide(torch.float32).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with LipschitzMonitor(model, optimizer, noise=noise) as monitor:
            ((x, y),) = wide_batches(dtype, 1)
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            factor = monitor._watches[0].spectrum.triplet._resolvent().matrix.dtype
        rows[dtype] = monitor.history.rows
        assert str(factor) == str(dtype).removeprefix("torch.")
    keys = ["sigma", "gap", "eps", *FORCES, "gHg"]
    keys += ["kappa_var", "lambda_sq_var"] if noise == "split" else []
    for row, exact in zip(*rows.values(), strict=True):
        assert row["status"] == exact["status"] == "ok"
        for key in keys:
            close = 1e-3 if key == "eps" else 1e-4  # the norm of the update is rounded up
            assert row[key] == pytest.approx(exact[key], rel=close, abs=1e-12, nan_ok=True), (row["layer"], key)
        for key in ("dz1", "dz2", "dz3", "dz"):  # the update itself is rounded to float32
            assert row[key] == pytest.approx(exact[key], abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("lr", [1e-3, 0.5])
def test_tracked_spectra_are_those_of_the_weights(dtype, every, lr):
    """From step to step, for small steps and for such that cross gaps: before, after, distance, and certificate."""
    model = wide(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    truths = []
    with LipschitzMonitor(model, optimizer, every=every) as monitor:
        for x, y in wide_batches(dtype, 6):
            before = torch.linalg.svdvals(model[0].weight.detach().double())
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            truths.append((before, torch.linalg.matrix_norm(model[0].weight.detach().double(), 2)))
    rows = [row for row in monitor.history if row["layer"] == "0"]
    assert [row["step"] for row in rows] == list(range(0, 6, every))
    assert (max(row["eps"] for row in rows) > 1.0) == (lr > 0.1)
    for row in rows:
        before, after = truths[row["step"]]
        assert row["sigma"] == pytest.approx(float(before[0]), rel=1e-13)
        assert row["gap"] == pytest.approx(float(before[0] - before[1]), rel=2e-4)
        assert row["z"] + row["dz"] == pytest.approx(math.log(after), abs=1e-13)
        assert abs(row["remainder"]) <= row["bound"]
