"""Two processes see what one would on the joint batch."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from lipdyn_torch.distributed import full, pool, summarise
from lipdyn_torch.noise import mismatch, nearest_factor

WORKER = Path(__file__).with_name("distributed_worker.py")
spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
TERMS = ["gradient_curvature", "noise", "noise_curvature", "noise_var", "noise_curvature_var"]


def run_workers(folder: Path, scenarios: list[str]) -> list[dict]:
    """What each of two processes returned for each scenario."""
    command = [str(folder / "rendezvous"), ",".join(scenarios), str(folder / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), *command], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = []
    for process in processes:
        try:
            errors.append(process.communicate(timeout=90)[1])
        except subprocess.TimeoutExpired:
            process.kill()
            errors.append(process.communicate()[1] + "\ntimed out")
    assert [p.returncode for p in processes] == [0, 0], "\n".join(error[-3000:] for error in errors)
    return [torch.load(folder / f"out.{rank}", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def combined(tmp_path_factory) -> list[dict]:
    """All scenarios in one pair of processes: starting them is what takes time."""
    scenarios = list(worker.SCENARIOS)
    return run_workers(tmp_path_factory.mktemp("combined"), scenarios)


def weighted(cut: int):
    """All samples as they count in the average of the two processes' gradients."""
    for weight, gradients in worker.matrices():
        size = len(gradients)
        weights = [size / (2 * cut)] * cut + [size / (2 * (size - cut))] * (size - cut)
        G = torch.tensor(weights, dtype=torch.float64)[:, None, None] * gradients
        yield worker.noise_of(weight, G, G.mean(0))


@pytest.mark.parametrize(("scenario", "cut"), [("even", 4), ("uneven", 3)])
def test_terms_are_those_of_the_joint_batch(combined, scenario, cut):
    for index, (spectrum, noise) in enumerate(weighted(cut)):
        want = vars(noise.terms(spectrum))
        for rank in (0, 1):
            batch, got, mismatch, half = combined[rank][scenario][index]
            assert batch == 8
            assert mismatch < 1e-14
            for name in TERMS:
                assert got[name] == pytest.approx(want[name], rel=1e-10, abs=1e-13), (name, index)
            assert half["noise"] == pytest.approx(want["noise"] / 4, rel=1e-10)
            assert half["noise_curvature"] == pytest.approx(want["noise_curvature"] / 4, rel=1e-10)
            assert half["gradient_curvature"] == pytest.approx(want["gradient_curvature"] / 4, rel=1e-10)


@pytest.mark.parametrize(("scenario", "cut"), [("even", 4), ("uneven", 3)])
def test_stand_in_scores_have_the_covariances_between_layers(combined, scenario, cut):
    from lipdyn_torch.dynamics import network_noise

    want = [noise.terms(spectrum).scores for spectrum, noise in weighted(cut)]
    got = [terms["scores"] for _, terms, _, _ in combined[0][scenario]]
    for sigmas, lrs in (([1.0, 2.0, 3.0], [0.1, 0.2, 0.3]), ([1.0, 1.0, 1.0], [1.0, 0.0, 1.0])):
        assert network_noise(got, sigmas, lrs) == pytest.approx(network_noise(want, sigmas, lrs), rel=1e-10)


def test_both_processes_have_bitwise_the_same(combined):
    for scenario in ("even", "uneven"):
        for one, other in zip(combined[0][scenario], combined[1][scenario], strict=True):
            assert all(torch.equal(torch.as_tensor(one[1][k]), torch.as_tensor(other[1][k])) for k in one[1])


def test_a_layer_one_process_could_not_read_is_read_by_none(combined):
    for rank in (0, 1):
        assert [part is None for part in combined[rank]["broken"]] == [False, True, False]
        assert combined[rank]["broken"][0][1]["noise"] == combined[rank]["even"][0][1]["noise"]


def test_pooling_does_not_depend_on_the_split():
    weight, gradients = worker.matrices()[0]
    spectrum, whole = worker.noise_of(weight, gradients, gradients.mean(0))
    want = vars(whole.terms(spectrum))
    for cuts in ([8], [1, 7], [2, 2, 4], [1] * 8):
        pieces = torch.split(gradients, cuts)
        parts = [summarise(worker.noise_of(weight, piece, gradients.mean(0))[1], spectrum) for piece in pieces]
        joint = pool(parts, spectrum)
        got = vars(joint.terms(spectrum))
        for name in TERMS:
            assert got[name] == pytest.approx(want[name], rel=1e-10, abs=1e-13), (name, cuts)
        assert nearest_factor(joint, spectrum.project(3.0 * gradients.mean(0))) == pytest.approx((3.0, 0.0), abs=1e-12)
        assert mismatch(joint, spectrum.project(gradients.mean(0))) < 1e-14
        assert mismatch(joint, spectrum.project(2 * gradients.mean(0))) > 0.3


def test_one_sample_has_no_noise():
    weight, gradients = worker.matrices()[0]
    spectrum, noise = worker.noise_of(weight, gradients[:1], gradients[0])
    terms = vars(summarise(noise, spectrum).terms(spectrum))
    assert math.isnan(terms["noise"])
    assert math.isnan(terms["noise_curvature"])
    assert terms["gradient_curvature"] == pytest.approx(noise.terms(spectrum).gradient_curvature, rel=1e-12)


def test_whole_tensors_stay_as_they_are():
    weight = torch.ones(2)
    assert full(weight) is weight


@pytest.mark.parametrize(("kind", "optimizer"), [("ddp", "SGD"), ("fsdp", "SGD"), ("fsdp-adam", "Adam")])
def test_rows_are_those_of_one_process(combined, kind, optimizer):
    rows, weights = worker.trained(None, "alone", optimizer)
    want = pd.DataFrame(rows)
    assert set(want["status"]) == {"ok"}
    assert set(want["batch"]) == {8}
    for run in combined:
        got, arrived = run[kind]
        pd.testing.assert_frame_equal(pd.DataFrame(got), want, rtol=1e-10, atol=1e-12)
        for p, q in zip(arrived, weights, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["ddp-reference", "fsdp-reference"])
def test_the_reference_gradient_is_that_of_one_process(combined, kind):
    want = pd.DataFrame(worker.trained(None, "alone", reference=True)[0])
    assert (want["mu_ref"] - want["mu"]).abs().min() > 1e-4
    for run in combined:
        pd.testing.assert_frame_equal(pd.DataFrame(run[kind][0]), want, rtol=1e-10, atol=1e-12)


def test_trouble_in_one_process_holds_up_none(combined):
    """Shards are gathered by all processes, whether or not one of them could read its samples."""
    whole, weights = combined[0]["fsdp"]
    for run, said in zip(combined, ("noise terms not known in every process", "made up"), strict=True):
        rows, arrived = run["fsdp-trouble"]
        for row, undisturbed in zip(rows, whole, strict=True):
            if (row["step"], row["layer"]) == (1, "2"):
                assert said in row["status"]
                assert math.isnan(row["kappa"])
                assert row["dz2"] == pytest.approx(undisturbed["dz2"], rel=1e-12)
            elif row["layer"] != "network":
                assert row["status"] == "ok"
                for name in ("kappa", "lambda_sq", "mu", "dz", "dz2"):
                    assert row[name] == pytest.approx(undisturbed[name], rel=1e-12)
        for p, q in zip(arrived, weights, strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["ddp-uneven", "ddp-unknown", "ddp-overflow"])
def test_samples_are_counted_in_all_processes(combined, kind):
    """Five here and three there, whether or not anything is known of their noise, or the step was made."""
    (first, _), (second, _) = (run[kind] for run in combined)
    assert {row["batch"] for row in first} == {8}
    assert list(dict.fromkeys(row["step"] for row in first)) == [0, 1, 2, 3]
    pd.testing.assert_frame_equal(pd.DataFrame(first), pd.DataFrame(second))
    skipped = {row["step"] for row in first if "gradients were cleared without a step" in row["status"]}
    assert skipped == ({1} if kind == "ddp-overflow" else set())
    assert all("not known for this optimiser" in row["status"] for row in first) == (kind == "ddp-unknown")


def test_layers_clipped_in_groups_in_two_processes(combined):
    want = pd.DataFrame(worker.trained(None, "alone", groups=True)[0])
    assert want["status"].str.contains("rescaled").tolist() == [True, True, False, True] * 4
    for run in combined:
        pd.testing.assert_frame_equal(pd.DataFrame(run["ddp-clipped"][0]), want, rtol=1e-10, atol=1e-12)


def test_automatic_steps_are_the_same_in_every_process(combined):
    """One process could afford every step, the other none: the slower decides."""
    for run in combined:
        assert list(dict.fromkeys(row["step"] for row in run["auto"][0])) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_training_is_bitwise_the_same_without_the_monitor(combined, kind):
    for rank in (0, 1):
        (_, watched), (_, plain) = combined[rank][kind], combined[rank][f"{kind}-plain"]
        assert all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))


@pytest.mark.parametrize("kind", ["ddp-parts", "fsdp-late"])
def test_accumulation_in_two_processes(combined, kind):
    rows, _ = worker.trained(None, "alone", parts=2)
    for rank in (0, 1):
        found, _ = combined[rank][kind]
        assert [row["batch"] for row in found] == [row["batch"] for row in rows] == [8] * len(rows)
        for row, other in zip(found, rows, strict=True):
            for key in ("mu", "kappa", "lambda_sq", "kappa_var", "sigma", "dz"):
                assert row[key] == pytest.approx(other[key], rel=1e-10, abs=1e-14), (row["layer"], key)


def test_a_gradient_of_one_process_holds_up_none(combined):
    """That of a loss which is only looked at never was on its way to a step: nothing to agree on."""
    for rank in (0, 1):
        (probed, weights), (rows, undisturbed) = combined[rank]["ddp-probe"], combined[rank]["ddp"]
        pd.testing.assert_frame_equal(pd.DataFrame(probed), pd.DataFrame(rows))
        assert all(torch.equal(a, b) for a, b in zip(weights, undisturbed, strict=True))


def test_backward_passes_of_one_process_hold_up_none(combined):
    """What one process clears again concerns no other, also where a step is left out for an overflow."""
    for kind in ("ddp-backward", "ddp-overflow-backward"):
        for rank in (0, 1):
            (probed, weights) = combined[rank][kind]
            rows, undisturbed = combined[rank]["ddp" if kind == "ddp-backward" else "ddp-overflow"]
            # samples of a pass that is added to gradients which were not cleared yet count where those were left out
            drop = [] if kind == "ddp-backward" else ["batch"]
            pd.testing.assert_frame_equal(
                pd.DataFrame(probed).drop(columns=drop), pd.DataFrame(rows).drop(columns=drop)
            )
            assert all(torch.equal(a, b) for a, b in zip(weights, undisturbed, strict=True))


def test_samples_that_one_process_ignores_are_counted_by_all(combined):
    for rank in (0, 1):
        rows, _ = combined[rank]["ddp-ignored"]
        assert all(
            "1 of 8 samples had no gradient in any layer" in r["status"] for r in rows if r["layer"] != "network"
        )


def test_an_expert_of_one_process_only(combined):
    """The samples of the process that does not use it have no gradient there: zeros, not unknown."""
    rows = worker.experts(None)
    for rank in (0, 1):
        found = combined[rank]["ddp-experts"]
        for row in found:
            assert math.isfinite(row["kappa"])
            assert row["batch"] == 8
        for row, alone in zip(found, rows, strict=True):
            if row["layer"] == "head":  # used by all samples: as in one process
                for key in ("sigma", "mu", "kappa", "lambda_sq", "dz"):
                    assert row[key] == pytest.approx(alone[key], rel=1e-10)
    one, other = (pd.DataFrame(combined[rank]["ddp-experts"]).drop(columns="status") for rank in (0, 1))
    pd.testing.assert_frame_equal(one, other)


def test_a_sink_of_one_process_that_fails_at_a_step_left_out(combined):
    """There is a warning; all processes count the same steps."""
    for rank, said in ((0, ["Full did not take the rows of a step"]), (1, [])):
        steps, warned = combined[rank]["ddp-sink"]
        assert steps == [0, 1, 2, 3]
        assert [text[:36] for text in warned] == said


def test_steps_of_another_optimizer_are_missed_in_every_process(combined):
    for rank in (0, 1):
        assert any("cleared gradients without one" in said for said in combined[rank]["ddp-elsewhere"])


def test_images_of_other_sizes_in_every_process(combined):
    """The torus that holds the largest images of all processes is known to all from the second step on."""
    one, other = (combined[rank]["ddp-images"] for rank in (0, 1))
    alone = worker.pictured(None)
    layers = {row["layer"] for row in alone}
    assert len(one) == len(other) == len(alone) == 3 * len(layers)
    for row, second, want in zip(one, other, alone, strict=True):
        if row["step"] == 0:
            assert row["sigma"] == pytest.approx(second["sigma"], rel=1e-12)
            continue
        assert row["status"] == second["status"] == want["status"] == "ok"
        for key in ("sigma", "mu", "kappa", "lambda_sq", "dz"):
            assert row[key] == pytest.approx(want[key], rel=1e-10, abs=1e-13), key
            assert row[key] == pytest.approx(second[key], rel=1e-10, abs=1e-13), key


def test_one_small_collective_in_a_step(combined):
    for rank in (0, 1):
        sent = combined[rank]["collectives"]
        assert len(sent) == 3
        assert max(sent) < 100  # three layers of up to 48 numbers: the means, a few sums, and layers by layers
