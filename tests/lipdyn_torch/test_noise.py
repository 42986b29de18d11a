"""The covariance of the gradient itself: its low-rank factor, its root, and samples drawn without replacement."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from lipdyn_torch import FactorSizeError, GradientNoise, LipschitzMonitor, LowRankSumRule, register_rule
from lipdyn_torch._bridge import read_spectrum


def gradients(samples: int, m: int = 3, n: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(G: torch.Tensor) -> torch.Tensor:
    """Of the mean, literally (theory 2.3)."""
    rows = G.flatten(1)
    return torch.cov(rows.T) / len(G)


SPECTRUM = read_spectrum(torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9)))


@pytest.mark.parametrize("samples", [2, 5, 30])
def test_factor_and_root_are_those_of_the_dense_covariance(samples):
    G = gradients(samples)
    noise = GradientNoise.from_gradients(G, SPECTRUM)
    Sigma = covariance(G)
    F = noise.factor()
    assert F.shape == (samples, 12)
    torch.testing.assert_close(F.T @ F, Sigma)
    root = torch.stack([noise.square_root(unit.reshape(3, 4)).flatten() for unit in torch.eye(12, dtype=torch.float64)])
    torch.testing.assert_close(root, root.T)
    torch.testing.assert_close(root @ root, Sigma, rtol=1e-9, atol=1e-12)
    assert float(torch.linalg.eigvalsh(root)[0]) > -1e-12


def test_equal_gradients_and_a_batch_of_one():
    same = GradientNoise.from_gradients(gradients(1).expand(4, 3, 4), SPECTRUM)
    assert not same.factor().any()
    assert not same.square_root(torch.ones(3, 4)).any()
    one = GradientNoise.from_gradients(gradients(1), SPECTRUM)
    assert one.factor().isnan().all()
    assert math.isnan(one.terms(SPECTRUM).noise)


def test_samples_without_replacement_by_enumeration():
    """Over all batches of 3 out of 6 the estimates average to the covariance of their means."""
    everything = gradients(6)
    batches = [everything[list(chosen)] for chosen in itertools.combinations(range(6), 3)]
    means = torch.stack([batch.mean(0) for batch in batches]).flatten(1)
    true = torch.cov(means.T, correction=0)
    noises = [GradientNoise.from_gradients(batch, SPECTRUM, population=6) for batch in batches]
    estimate = torch.stack([noise.factor().T @ noise.factor() for noise in noises]).mean(0)
    torch.testing.assert_close(estimate, true)
    J = torch.outer(SPECTRUM.u, SPECTRUM.v).flatten()
    terms = [noise.terms(SPECTRUM) for noise in noises]
    assert sum(t.noise for t in terms) / len(terms) == pytest.approx(float(J @ true @ J))
    parts = sum(t.noise_var for t in terms) / len(terms)
    assert parts == pytest.approx(float(J.square() @ true.diagonal()))
    free = GradientNoise.from_gradients(batches[0], SPECTRUM).terms(SPECTRUM)
    assert terms[0].noise_curvature == pytest.approx(free.noise_curvature / 2)
    assert terms[0].noise_curvature_var == pytest.approx(free.noise_curvature_var / 2)
    with pytest.raises(ValueError, match="population of at least the 3 samples, got 2"):
        GradientNoise.from_gradients(batches[0], SPECTRUM, population=2)


def test_size_guard():
    with pytest.raises(FactorSizeError, match="at most 10 numbers in the gradients of 5 samples, got 60"):
        GradientNoise.from_gradients(gradients(5), SPECTRUM, limit=10)
    with pytest.raises(ValueError, match="expected gradients for the factor"):
        GradientNoise(torch.ones(2, 3), torch.ones(2, 4)).factor()


@pytest.mark.parametrize("make", [None, torch.optim.Adam], ids=["as the case has it", "Adam"])
def test_the_monitor_keeps_the_factor(case, make):
    """Every term of the rows, from the factor alone; the rows are those of the split."""
    frames = []
    for kind in ("split", "factor"):
        model = case.model()
        optimizer = case.optimizer(model) if make is None else make(model.parameters(), lr=1e-3)
        with LipschitzMonitor(model, optimizer, noise=kind) as monitor:
            spectra = {watch.name: watch.spectrum for watch in monitor._watches}
            case.step(model, optimizer)
        frames.append(monitor.history.to_pandas())
    split, factor = frames
    assert split.equals(factor)
    assert set(monitor.noise) == set(monitor.layers)
    for row in monitor.history.rows[:-1]:
        spectrum, noise = spectra[row["layer"]], monitor.noise[row["layer"]]
        F = noise.factor()
        gain = case.gain(0) if make is None else 1.0
        J = torch.outer(spectrum.u, spectrum.v).flatten()
        assert row["lr"] * gain**2 * float((F @ J).square().sum()) / row["sigma"] ** 2 == pytest.approx(
            row["lambda_sq"], rel=1e-9
        )
        forms = GradientNoise.from_gradients(F.reshape(-1, *spectrum.matrix.shape), spectrum)
        torch.testing.assert_close(forms.p @ spectrum.u, F @ J)
        kappa = sum(
            GradientNoise(p[None], q[None]).terms(spectrum).gradient_curvature
            for p, q in zip(forms.p, forms.q, strict=True)
        )
        assert row["lr"] * gain**2 * kappa / (2 * row["sigma"]) == pytest.approx(row["kappa"], rel=1e-9)


def test_what_has_no_factor_says_so(monkeypatch):
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.base = nn.Linear(4, 3)
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    register_rule(Adapted, LowRankSumRule("base.weight", "up.weight", "down.weight"))
    model = Adapted()
    model.base.requires_grad_(False)
    optimizer = torch.optim.SGD([*model.down.parameters(), *model.up.parameters()], lr=0.1)
    with LipschitzMonitor(model, optimizer, noise="factor") as monitor:
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    with pytest.raises(ValueError, match="expected gradients"):
        monitor.noise["Adapted"].factor()

    monkeypatch.setattr("lipdyn_torch._collect.check_factor_size", lambda shape: check(shape, 10))
    from lipdyn_torch.noise import check_factor_size as check

    layer = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with LipschitzMonitor(layer, optimizer, noise="factor") as monitor:
        layer(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    assert "no factor: expected at most 10 numbers" in monitor.history.rows[0]["status"]
    assert monitor.history.rows[0]["kappa"] > 0
