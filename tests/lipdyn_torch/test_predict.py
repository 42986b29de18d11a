"""Predicted curves on real histories, their bands, records and figures."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from lipdyn_torch import (
    History,
    JsonLinesSink,
    LipschitzMonitor,
    dynamics,
    increments,
    moments,
    paper,
    pathwise,
    read_history,
    sde,
)
from lipdyn_torch._bridge import cluster_values, read_spectrum, taylor
from lipdyn_torch.predict import SDE, forecast
from lipdyn_torch.reference import MeanGradient


def monitored(case, steps=30, lr=None, **settings):
    model = case.model()
    optimizer = case.optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = lr or group["lr"]
    with LipschitzMonitor(model, optimizer, **settings) as monitor:
        for step in range(steps):
            case.step(model, optimizer, step)
    return monitor


def test_predictions_are_running_sums(case):
    monitor = monitored(case, steps=4, sampling="iid")
    frame = monitor.history.to_pandas()
    for layer in ["network", *monitor.layers]:
        rows = [row for row in monitor.history if row["layer"] == layer]
        observed = [rows[0]["z"], *(row["z"] + row["dz"] for row in rows)]
        for order in (1, 2, 3):
            prediction = pathwise(frame, order, layer)
            z = rows[0]["z"]
            for j, row in enumerate(rows, 1):
                z += row[f"dz{order}"]
                assert prediction.predicted[j] == pytest.approx(z, abs=1e-14)
            assert prediction.observed == pytest.approx(observed, abs=1e-14)
        prediction, z, variance = sde(frame, layer), rows[0]["z"], 0.0
        for j, row in enumerate(rows, 1):
            parts = [r for r in monitor.history if r["step"] == j - 1 and r["layer"] != "network"]
            ito = sum(r["lr"] * r["lambda_sq"] for r in (parts if layer == "network" else [row]))
            z += row["lr"] * (row["mu"] + row["kappa"]) - ito / 2
            variance += row["lr"] * row["lambda_sq"]
            assert prediction.predicted[j] == pytest.approx(z, abs=1e-14)
            assert prediction.half_width[j] == pytest.approx(variance**0.5, rel=1e-12)


def test_error_of_the_path_falls_with_the_order(case):
    """At a tenth of the step the error of order n in one step falls about 10^(n+1) times (theory 2.6)."""
    errors = []
    for lr in (2e-2, 2e-3):
        rows = monitored(case, steps=1, lr=lr / (1 if case.reduction == "mean" else case.batch)).history.to_pandas()
        layers = rows[rows["layer"] != "network"]
        errors.append([float((layers[f"dz{n}"] - layers["dz"]).abs().max()) for n in (1, 2)])
    slopes = np.log10(np.array(errors[0]) / np.array(errors[1]))
    assert slopes[0] == pytest.approx(2.0, abs=0.3)
    assert slopes[1] == pytest.approx(3.0, abs=0.5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_certificate_is_never_violated(case, order):
    lr = 1e-3 / (1 if case.reduction == "mean" else case.batch)
    monitor = monitored(case, steps=20, lr=lr)
    certified = 0
    for layer in ["network", *monitor.layers]:
        prediction = pathwise(monitor.history, order, layer)
        assert (np.abs(prediction.error) <= prediction.half_width + 1e-13).all()
        certified += np.isfinite(prediction.half_width).sum()
    assert certified > 20


@pytest.mark.parametrize("order", [1, 2, 3])
def test_certificate_allows_for_rounding(mlp_case, order):
    """Of steps so short that the remainder of the series is far below the rounding of singular values."""
    prediction = pathwise(monitored(mlp_case, steps=20, lr=1e-5).history, order)
    assert (np.abs(prediction.error) <= prediction.half_width).all()
    assert prediction.half_width[-1] < (1e-6 if order == 1 else 1e-11)


@pytest.mark.parametrize("lr", [0.3, 1.0, 5.0])
def test_certificate_holds_beyond_eps_one(mlp_case, lr):
    """There the bound is the cluster's: convexity from below, the norm of the step from above."""
    monitor = monitored(mlp_case, steps=12, lr=lr)
    assert max(row["eps"] for row in monitor.history) > 1
    assert {row["mode"] for row in monitor.history} & {"cluster", "exact"}
    for row in monitor.history:
        assert abs(row["remainder"]) <= row["bound"] + 1e-13
    assert pathwise(monitor.history, 3).half_width[-1] == np.inf


def test_clusters_are_nearer_than_the_series(mlp_case):
    """Steps a few gaps long: the second-order effective matrix against the plain second order."""
    torch.manual_seed(0)
    cluster, series = [], []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        W = torch.randn(20, 30, generator=generator, dtype=torch.float64) / 30**0.5
        D = torch.randn(20, 30, generator=generator, dtype=torch.float64) / 150
        spectrum = read_spectrum(W)
        h = float(torch.linalg.matrix_norm(D, 2))
        truth = float(torch.linalg.matrix_norm(W + D, 2))
        values = cluster_values(spectrum, D[None], h)
        if values is not None and 2 * h > spectrum.gap:
            cluster.append(values[1] - truth)
            series.append(sum(taylor(spectrum, D)[:3]) - truth)
    assert len(cluster) > 10
    assert np.sqrt(np.mean(np.square(cluster))) < 0.3 * np.sqrt(np.mean(np.square(series)))


@pytest.mark.parametrize("split", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_cluster_does_not_end_between_close_values(split, groups):
    """Two values on either side of four times the step: a cut between them would divide by their distance."""
    rng, h = np.random.default_rng(0), 0.05
    s = [2.0, 1.99, 1.97, 1.9, 1.82, 1.8 + split * h / 2, 1.8 - split * h / 2, 1.7, *np.linspace(1.6, 0.1, 12)]
    U, V = (torch.linalg.qr(torch.tensor(rng.standard_normal((n, 20))))[0] for n in (20, 30))
    W, D = (U * torch.tensor(s)) @ V.T, torch.tensor(rng.standard_normal((20, 30)))
    D *= h / torch.linalg.matrix_norm(D, 2)
    truth = float(torch.linalg.matrix_norm(W + D, 2))
    spectrum = read_spectrum(torch.stack([W, 0.5 * W])[:groups])
    found = [abs(value - truth) for value in cluster_values(spectrum, torch.stack([D, D])[:groups], h)]
    assert found[0] < 0.02 * h
    assert found[1] < 1e-3 * h
    assert found[2] < 1e-4 * h


def test_a_cluster_that_cannot_be_cut_is_none():
    """Twenty values side by side within six steps of the largest: whatever the end, the gap there is small."""
    W = torch.diag(torch.cat([torch.linspace(2.0, 1.9, 20, dtype=torch.float64), torch.tensor([1.0]).double()]))
    D = torch.eye(21, dtype=torch.float64).flip(0)
    assert cluster_values(read_spectrum(W), 0.05 * D[None], 0.05) is None
    assert cluster_values(read_spectrum(W), 3.0 * D[None], 3.0) is None


def reference_run(case, kind, steps=8, optimizer=None):
    """A run with all data, or the next batch, as reference; also the rows without it."""
    model = case.model()
    optimizer = optimizer(model) if optimizer else case.optimizer(model)
    batches = [case.data(seed) for seed in range(100, 105)]
    reference = MeanGradient(batches, lambda model, batch: case.loss(model(batch[0]), batch[1]), kind)
    expected = []
    state = torch.get_rng_state()
    with LipschitzMonitor(model, optimizer, reference=reference, sampling="iid") as monitor:
        for step in range(steps):
            chosen = batches if kind == "full" else [batches[step % 5]]
            loss = sum(case.loss(model(x), y) for x, y in chosen) / len(chosen)
            g = torch.autograd.grad(loss, model[0].weight)[0]
            W = model[0].weight.detach()
            u, s, vh = torch.linalg.svd(W)
            expected.append(float(-(u[:, 0] @ g @ vh[0]) / s[0]))
            case.step(model, optimizer, step)
    assert torch.equal(state, torch.get_rng_state())
    return monitor, expected, model


@pytest.mark.parametrize("kind", ["full", "independent"])
def test_drift_of_a_reference_gradient(mlp_case, kind):
    monitor, expected, model = reference_run(mlp_case, kind)
    rows = [row for row in monitor.history if row["layer"] == "0"]
    assert [row["mu_ref"] for row in rows] == pytest.approx(expected, rel=1e-10)
    assert {row["status"] for row in rows} == {"ok"}
    prediction = sde(monitor.history, "0", gradient=kind)
    assert prediction.name == f"SDE, {kind} gradient"
    z = rows[0]["z"] + sum(row["lr"] * (row["mu_ref"] + row["kappa"] - row["lambda_sq"] / 2) for row in rows)
    assert prediction.predicted[-1] == pytest.approx(z, abs=1e-12)
    batch = sde(monitor.history, "0")
    assert batch.name == SDE
    ratio = 2.0**0.5 if kind == "independent" else 1.0
    assert prediction.half_width == pytest.approx(ratio * batch.half_width)
    plain = mlp_case.model()
    optimizer = mlp_case.optimizer(plain)
    for step in range(8):
        mlp_case.step(plain, optimizer, step)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"expected a history with the .* gradient, got one with"):
        sde(monitor.history, gradient="full" if kind == "independent" else "independent")


@pytest.mark.parametrize("batches", ["abc", 3, None, {"x": torch.ones(2, 6)}, object()])
def test_a_reference_needs_batches(batches):
    with pytest.raises(TypeError, match=r"expected batches, such as a data loader or a list of them, got \w+"):
        MeanGradient(batches, lambda model, x: model(x).sum())


@pytest.mark.parametrize("kind", ["full", "independent"])
def test_a_reference_is_gone_through_again(kind):
    for once in ((torch.ones(2, 6) for _ in range(3)), iter([torch.ones(2, 6)])):
        with pytest.raises(TypeError, match=r"expected batches that can be gone through again, got a \w+; give"):
            MeanGradient(once, lambda model, x: model(x).sum(), kind)
    with pytest.raises(TypeError, match=r"expected loss\(model, batch\) to be callable, got float"):
        MeanGradient([torch.ones(2, 6)], 0.5, kind)


@pytest.mark.parametrize("given", [np.zeros(3), None, "some", 1], ids=str)
def test_words_that_are_none(mlp_case, given):
    history = monitored(mlp_case, steps=2).history
    with pytest.raises(ValueError, match="expected kind 'full' or 'independent', got "):
        MeanGradient([torch.ones(2, 6)], lambda model, x: model(x).sum(), given)
    with pytest.raises(ValueError, match="expected gradient 'batch', 'full' or 'independent', got "):
        sde(history, gradient=given, sampling="iid")
    if given is not None:
        with pytest.raises(ValueError, match="expected sampling 'iid' or 'shuffle', got "):
            sde(history, sampling=given)


@pytest.mark.parametrize("batch", ["abc", [], ["a"], 3, torch.tensor(1.0), [[2.0]]])
def test_a_batch_begins_with_samples(batch):
    with pytest.raises(TypeError, match="expected a batch that begins with a tensor of samples, got"):
        MeanGradient([batch], lambda model, x: model(x).sum())(torch.nn.Linear(6, 2))


def test_moments_are_over_the_training_batches_alone(mlp_case):
    """The noise of an independent reference is an error of the estimate, and no spread of K (theory 2.5, 2.7)."""
    monitor, _, _ = reference_run(mlp_case, "independent")
    found, batch = moments(monitor.history, gradient="independent"), moments(monitor.history, gradient="batch")
    np.testing.assert_allclose(found.z_sd, batch.z_sd)
    np.testing.assert_allclose(found.log_mean, found.z_mean + batch.z_sd**2 / 2)


def test_forecast_freezes_the_terms(mlp_case):
    monitor = monitored(mlp_case, steps=10)
    rows = [row for row in monitor.history if row["layer"] == "2"]
    ahead = forecast(monitor.history, 6, "2", window=2)
    slope = np.mean([r["lr"] * (r["mu"] + r["kappa"] - r["lambda_sq"] / 2) for r in rows[4:6]])
    assert ahead.step.tolist() == [6, 7, 8, 9, 10]
    assert ahead.predicted == pytest.approx(rows[6]["z"] + slope * np.arange(5), abs=1e-13)
    assert ahead.observed[-1] == rows[-1]["z"] + rows[-1]["dz"]
    beyond = forecast(monitor.history, 10, steps=3)
    assert np.isnan(beyond.observed).tolist() == [False, True, True, True]
    with pytest.raises(ValueError, match="expected at to be a monitored step after the first, got 0"):
        forecast(monitor.history, 0)
    assert forecast(
        monitor.history, np.int64(6), "2", window=np.int64(2), steps=np.int64(4)
    ).predicted == pytest.approx(ahead.predicted)


@pytest.mark.parametrize("value", [-1, 2.5, "3", True])
@pytest.mark.parametrize(("name", "least"), [("at", 0), ("steps", 0), ("window", 1)])
def test_forecasts_that_are_none(mlp_case, name, least, value):
    history = monitored(mlp_case, steps=3).history
    for given in (value, *([0] if least else [])):
        with pytest.raises(ValueError, match=f"expected {name} to be a whole number, at least {least}, got {given!r}"):
            forecast(history, **{"at": 2, name: given})


def test_shuffled_band_closes_at_the_end_of_an_epoch(mlp_case):
    monitor = monitored(mlp_case, steps=10, dataset_size=35)
    shuffled, independent = sde(monitor.history), sde(monitor.history, sampling="iid")
    assert shuffled.half_width[5] < 0.5 * independent.half_width[5]
    assert 0 < shuffled.half_width[3] < independent.half_width[3]
    history = monitored(mlp_case, steps=2).history
    for function in (sde, lambda history: moments(history, gradient="batch")):
        with pytest.warns(UserWarning, match="dataset_size for the band of epochs in shuffled order, got None"):
            found = function(history)
    assert np.isnan(found.z_sd).all()
    with pytest.warns(UserWarning, match="expected dataset_size"):
        assert np.isnan(sde(history).half_width).all()


def epochs_of(sizes, epochs, every, samples):
    """A history of equal noise in each sample, its batches of the given sizes in every epoch."""
    names = ("0", "network")
    row = {"lr": 1.0, "eps": 0.1, "mu": 0.0, "kappa": 0.0, "dz": 0.0, "z": 0.0, "status": "ok"}
    rows = [
        {**row, "step": k, "layer": name, "batch": sizes[k % len(sizes)], "lambda_sq": 1 / sizes[k % len(sizes)]}
        for k in range(0, epochs * len(sizes), every)
        for name in names
    ]
    return History(rows, {"sampling": "shuffle", "dataset_size": samples})


#: The last batch is smaller, as large as all others, or left out, which every other step never shows.
EPOCHS = [([64] * 15 + [40], (2, 3, 4, 5, 7, 10)), ([50] * 20, (2, 3, 4, 5, 7, 10)), ([64] * 15, (3, 5, 7))]


@pytest.mark.parametrize(("sizes", "every"), [(sizes, every) for sizes, periods in EPOCHS for every in periods])
def test_epochs_are_counted_between_monitored_steps(sizes, every):
    """The band is that of a run with every step monitored, and of all orders in which samples are drawn."""
    samples = 1000
    history, whole = (epochs_of(sizes, 8, e, samples) for e in (every, 1))
    found, truth = sde(history), sde(whole)
    np.testing.assert_allclose(found.half_width, truth.half_width[found.step], atol=1e-7)
    per_epoch = (1 / np.array(sizes)).sum() - len(sizes) ** 2 / samples  # sum of 1/M - (number of batches)^2 / N
    of_epochs = dict(zip(found.step.tolist(), found.half_width.tolist(), strict=True))
    for epoch in range(9):
        if (at := epoch * len(sizes)) in of_epochs:
            assert of_epochs[at] == pytest.approx((max(epoch * per_epoch, 0.0)) ** 0.5, abs=1e-7)


def test_a_last_batch_that_is_never_seen_is_taken_to_be_there():
    seen = [sde(epochs_of(sizes, 8, 4, 1000)).half_width[:30] for sizes in ([64] * 15, [64] * 15 + [40])]
    np.testing.assert_array_equal(*seen)


def test_the_network_needs_its_layers(mlp_case):
    frame = monitored(mlp_case, steps=4, sampling="iid").history.to_pandas()
    alone = frame[frame["layer"] == "network"]
    needing = (
        sde,
        increments,
        lambda h: moments(h, gradient="batch"),
        lambda h: forecast(h, 2),
        paper.mu_Z,
        paper.variance_Z,
    )
    for function in needing:
        with pytest.raises(ValueError, match="expected a row of each layer at every step, got those of the network"):
            function(alone)
    assert np.isnan(pathwise(alone).half_width).all()
    assert pathwise(alone).predicted == pytest.approx(pathwise(frame).predicted)
    without = [
        frame[(frame["step"] != 1) | (frame["layer"] != "2")],
        frame[(frame["step"] != 1) | (frame["layer"] == "network")],
    ]
    for torn in without:
        for function in (*needing, pathwise):
            with pytest.raises(ValueError, match="expected a row of each layer at every step, got others at step 1"):
                function(torn)
        assert len(sde(torn, "0").predicted) == (4 if torn is without[1] else 5)


def test_rows_out_of_order(mlp_case):
    frame = monitored(mlp_case, steps=4, sampling="iid").history.to_pandas()
    for torn in (frame.iloc[::-1], frame.loc[frame.index.repeat(2)]):
        for function in (sde, pathwise, increments, paper.integral_Z):
            with pytest.raises(
                ValueError, match="expected one row of a layer at each step, in their order, got others"
            ):
                function(torn)


def test_batches_of_odd_sizes_hold():
    found = sde(epochs_of([8, 4, 2, 16], 6, 3, 60))
    held = np.repeat([8, 16, 2, 4, 8, 16, 2, 4], 3)[:22]
    bridge = dynamics.bridge_variance(1 / held, held, 60)
    np.testing.assert_allclose(found.half_width, np.sqrt(bridge[[0, 3, 6, 9, 12, 15, 18, 21, 22]]))


@pytest.mark.parametrize("size", [0, -5, 2.5, "64", True, math.nan])
def test_dataset_sizes_that_are_none(size):
    history = epochs_of([16] * 4, 1, 1, 64)
    for function in (sde, lambda h, **kw: moments(h, gradient="batch", **kw)):
        for sampling in ("shuffle", "iid"):
            with pytest.raises(ValueError, match="expected dataset_size to be a positive whole number or None, got"):
                function(history, sampling=sampling, dataset_size=size)


def test_dataset_size_below_a_batch():
    with pytest.raises(ValueError, match="expected dataset_size to be at least a batch of 16, got 4; give the number"):
        sde(epochs_of([16] * 4, 1, 1, 64), dataset_size=4)
    told = epochs_of([16] * 4, 1, 1, 4)
    with pytest.warns(UserWarning, match="at least a batch of 16, got 4 by the monitor: the band is NaN"):
        assert np.isnan(sde(told).half_width).all()
    assert sde(told, dataset_size=np.int64(64)).half_width[2] > 0
    with pytest.raises(ValueError, match="expected sampling 'iid' or 'shuffle', got ''"):
        sde(told, sampling="")


@pytest.mark.parametrize("given", ["history.jsonl", [1, 2], None])
def test_what_is_no_history(given):
    with pytest.raises(TypeError, match=r"expected a History, such as monitor.history .*, got (str|list|NoneType)"):
        sde(given)


def test_unmonitored_steps_hold_the_last_terms(mlp_case):
    monitor = monitored(mlp_case, steps=7, every=3, sampling="iid")
    prediction = sde(monitor.history)
    network = [row for row in monitor.history if row["layer"] == "network"]
    v = [row["lr"] * row["lambda_sq"] for row in network]
    assert prediction.step.tolist() == [0, 3, 6, 7]
    assert prediction.half_width**2 == pytest.approx([0.0, 3 * v[0], 3 * (v[0] + v[1]), 3 * (v[0] + v[1]) + v[2]])
    with pytest.raises(ValueError, match="expected every step, got steps 0 to 7 with gaps; monitor with every=1"):
        pathwise(monitor.history)


def test_wrong_questions(mlp_case):
    history = monitored(mlp_case, steps=2).history
    with pytest.raises(ValueError, match="expected order 1, 2 or 3, got 4"):
        pathwise(history, 4)
    with pytest.raises(ValueError, match="expected order 1, 2 or 3, got True"):
        pathwise(history, True)
    with pytest.raises(
        ValueError, match=r"expected a layer of the history, got 'conv'; there are '0', '2', '4', 'network'"
    ):
        sde(history, "conv")
    with pytest.raises(ValueError, match="expected sampling 'iid' or 'shuffle', got 'sorted'"):
        sde(history, sampling="sorted")
    with pytest.raises(ValueError, match="no step has been measured yet"):
        sde(History())


# --- records -------------------------------------------------------------------------------------------------


def test_columns(mlp_case):
    full = monitored(mlp_case, steps=1).history.to_pandas()
    forces, path = ["mu", "kappa", "lambda_sq", "gHg"], ["dz1", "dz2", "dz3", "dz", "z"]
    assert list(full.columns) == [
        "step",
        "layer",
        "lr",
        "batch",
        "sigma",
        "gap",
        "eps",
        *forces,
        *path,
        "mode",
        "bound",
        "remainder",
        "status",
    ]
    split = monitored(mlp_case, steps=1, noise="split").history.to_pandas()
    parts = ["kappa_var", "kappa_cov", "lambda_sq_var", "lambda_sq_cov"]
    assert set(split.columns) - set(full.columns) == set(parts)
    assert full["layer"].tolist() == ["0", "2", "4", "network"]
    assert full.attrs["sampling"] == "shuffle"


def test_torn_last_line_is_left_out_and_a_torn_middle_is_refused(mlp_case, tmp_path):
    path = tmp_path / "history.jsonl"
    history = monitored(mlp_case, steps=3, sinks=[JsonLinesSink(path)]).history
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    whole = path.read_text()
    path.write_text(whole[:-25])
    assert read_history(path).to_pandas().equals(History(history.rows[:-4]).to_pandas())  # without the torn step
    path.write_text(whole.replace('"step": 1, "layer"', '"step": 1, "lay', 1))
    with pytest.raises(ValueError, match=r"expected one JSON object per line in .* got .* in line 6; restore"):
        read_history(path)
    with pytest.raises(FileExistsError):
        JsonLinesSink(path)


def test_json_lines_read_by_pandas_directly(mlp_case, tmp_path):
    import pandas as pd

    path = tmp_path / "history.jsonl"
    history = monitored(mlp_case, steps=2, sinks=[JsonLinesSink(path)]).history
    frame = pd.read_json(path, lines=True).iloc[1:]
    assert frame["z"].to_numpy(float) == pytest.approx(history.to_pandas()["z"].to_numpy())


# --- figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 4])
def test_figure_shows_the_curves(mlp_case, tmp_path, every):
    monitor = monitored(mlp_case, steps=12, every=every, dataset_size=35)
    figure = monitor.plot()
    axes = figure.get_axes()
    assert len(axes) == 5
    assert all(a.get_xlabel() and a.get_title() for a in axes)
    drawn = {line.get_label(): line for line in axes[0].get_lines()}
    names = [SDE, "pathwise, order 2", "pathwise, order 3"] if every == 1 else [SDE]
    assert list(drawn) == ["observed", *names]
    assert drawn[SDE].get_ydata() == pytest.approx(sde(monitor.history).predicted)
    assert {line.get_label() for line in axes[3].get_lines()} == set(monitor.layers)
    figure.savefig(tmp_path / "figure.png")


def test_figure_without_noise_terms(mlp_case, tmp_path):
    """With momentum only the path is known; the figure is drawn all the same."""
    model = mlp_case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with LipschitzMonitor(model, optimizer, dataset_size=35) as monitor:
        for step in range(5):
            mlp_case.step(model, optimizer, step)
    monitor.plot().savefig(tmp_path / "figure.png")


def test_import_is_light():
    code = "import sys, lipdyn_torch; print([m for m in ('pandas', 'matplotlib', 'sklearn') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize("layer", ["network", "first"])
def test_increments_are_those_of_the_rows(case, layer):
    monitor = monitored(case, steps=3)
    layer = monitor.layers[0] if layer == "first" else layer
    table = increments(monitor.history, layer)
    for j, found in enumerate(table.to_dict("records")):
        rows = [row for row in monitor.history if row["step"] == j]
        own = [row for row in rows if row["layer"] == layer]
        parts = [row for row in rows if row["layer"] != "network"] if layer == "network" else own
        expected = {
            "step": j,
            "m": own[0]["lr"] * own[0]["mu"],
            "c": own[0]["lr"] * own[0]["kappa"],
            "v": own[0]["lr"] * own[0]["lambda_sq"],
            "v_independent": sum(row["lr"] * row["lambda_sq"] for row in parts),
            "d": sum(row["lr"] ** 2 * row["gHg"] / (2 * row["sigma"]) for row in parts),
            "e": sum((row["lr"] * row["mu"]) ** 2 for row in parts),
        }
        assert found == pytest.approx(expected, rel=1e-12)


def test_the_discrete_terms_bring_the_mean_of_a_step_nearer(mlp_case):
    """The mean of log sigma over all batches of three: d - e/2 is what the equation leaves out (theory 2.6)."""
    model = mlp_case.model()
    x, y = mlp_case.data()
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def first_step(chosen):
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer.zero_grad()
        with LipschitzMonitor(model, optimizer) as monitor:
            mlp_case.loss(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
        return monitor.history.rows[0]["dz"], increments(monitor.history, "0").iloc[0]

    changes, tables = zip(*(first_step(list(b)) for b in itertools.combinations(range(len(x)), 3)), strict=True)
    _, full = first_step(list(range(len(x))))
    finite = 1 - 3 / len(x)  # without replacement
    c, v = (finite * np.mean([table[name] for table in tables]) for name in ("c", "v"))
    truth, equation = np.mean(changes), full["m"] + c - v / 2
    assert abs(equation + full["d"] - full["e"] / 2 - truth) < 0.1 * abs(equation - truth)


def test_moments_of_the_bound(case):
    monitor = monitored(case, steps=5, dataset_size=5 * case.batch)
    frame = monitor.history.to_pandas()
    table = increments(frame)
    z0 = float(frame["z"][frame["layer"] == "network"].iloc[0])
    found = moments(frame, gradient="batch", sampling="iid")
    log_mean = dynamics.expected_log_k(z0, table["m"], table["c"], table["v"], table["v_independent"])
    np.testing.assert_allclose(found.log_mean, log_mean, rtol=1e-12)
    np.testing.assert_allclose(found.z_sd**2, dynamics.diffusion_variance(table["v"]), rtol=1e-12)
    np.testing.assert_allclose(found.log_sd, dynamics.log_sd_k(log_mean, found.z_sd**2))
    shuffled = moments(frame, gradient="batch")
    assert shuffled.z_sd[-1] == pytest.approx(0.0, abs=1e-6)  # the epoch is over
    np.testing.assert_allclose(shuffled.z_mean, found.z_mean)
    alone = moments(frame, gradient="batch", sampling="iid", independent_layers=True)
    np.testing.assert_allclose(alone.z_sd**2, np.append(0.0, np.cumsum(table["v_independent"])), rtol=1e-12)
    with pytest.raises(ValueError, match="full gradient"):
        moments(frame)


def test_the_formulas_of_the_paper(case):
    """Its symbols, summed by hand; and they are what the predictors give for independent layers and batches."""
    monitor = monitored(case, steps=4)
    layers = [[r for r in monitor.history if r["step"] == k and r["layer"] != "network"] for k in range(4)]
    z = z0 = sum(math.log(row["sigma"]) for row in layers[0])
    log_mean, variance = z0, 0.0
    curves = paper.integral_Z, paper.expectation_K, paper.variance_Z, paper.variance_K
    found = [curve(monitor.history) for curve in curves]
    for k, rows in enumerate(layers):
        drift = sum(row["lr"] * row["mu"] for row in rows)
        curvature = sum(row["lr"] * row["kappa"] for row in rows)
        noise = sum(row["lr"] * row["lambda_sq"] for row in rows)
        z, log_mean, variance = z + drift + curvature - noise / 2, log_mean + drift + curvature, variance + noise
        of_k = 2 * log_mean + math.log(math.expm1(variance))
        for curve, value in zip(found, (z, log_mean, variance, of_k), strict=True):
            assert curve[k + 1] == pytest.approx(value, rel=1e-10)
    assert [len(curve) for curve in found] == [5] * 4
    assert found[3][0] == -math.inf
    alone = moments(monitor.history, gradient="batch", sampling="iid", independent_layers=True)
    np.testing.assert_allclose(found[0], alone.z_mean, rtol=1e-12)
    np.testing.assert_allclose(found[1], alone.log_mean, rtol=1e-12)
    np.testing.assert_allclose(found[3][1:], 2 * alone.log_sd[1:], rtol=1e-12)


def test_the_formulas_of_the_paper_begin_where_log_sigma_is_known(mlp_case):
    model = mlp_case.model()
    torch.nn.init.zeros_(model[4].weight)
    optimizer = mlp_case.optimizer(model)
    with LipschitzMonitor(model, optimizer) as monitor:
        for step in range(5):
            mlp_case.step(model, optimizer, step)
    later = monitor.history.to_pandas().query("step >= 1")
    alone = moments(later, gradient="batch", sampling="iid", independent_layers=True)
    np.testing.assert_allclose(paper.integral_Z(monitor.history), alone.z_mean, rtol=1e-12)
    for name in paper.__all__:
        found = getattr(paper, name)(monitor.history)
        np.testing.assert_array_equal(found, getattr(paper, name)(later))
        assert not np.isnan(found).any()


def test_fisher_information_and_noise(mlp_case):
    """The share of the literal empirical Fisher matrix, seen by J, that is noise."""
    model = mlp_case.model()
    optimizer = mlp_case.optimizer(model)
    with LipschitzMonitor(model, optimizer, noise="factor") as monitor:
        spectra = {watch.name: watch.spectrum for watch in monitor._watches}
        mlp_case.step(model, optimizer)
    for row in monitor.history.rows[:-1]:
        spectrum, G = spectra[row["layer"]], monitor.noise[row["layer"]].gradients
        seen = torch.einsum("m,imn,n->i", spectrum.u, G, spectrum.v)
        fisher = float(seen.square().mean())  # J^T F J
        share = 1 - float(seen.mean() ** 2) / fisher
        found = dynamics.fisher_share(row["lr"], row["mu"], row["lambda_sq"], row["batch"])
        assert float(found) == pytest.approx(share, rel=1e-10)
    assert math.isnan(dynamics.fisher_share(0.1, 0.0, 0.0, 4))


def test_steps_that_were_only_observed_are_counted(mlp_case):
    frame = monitored(mlp_case, steps=4).history.to_pandas()
    assert pathwise(frame).observed_steps == 0
    frame.loc[(frame["step"] == 2) & (frame["layer"] == "network"), "mode"] = "exact"
    assert pathwise(frame).observed_steps == 1
