"""The training loop, the regularisers and the closed forms of the experiments against slow twins."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lipdyn_torch.experiments import label_noise, timing, training
from lipdyn_torch.experiments.data import Images, digits
from lipdyn_torch.experiments.models import MLP, ConvNet, make_model, note
from lipdyn_torch.experiments.noisy_gradient import hessian_trace
from lipdyn_torch.experiments.regularisers import REGULARISERS, augment
from lipdyn_torch.experiments.training import Plan, batch_indices, train


@pytest.fixture(scope="module")
def images():
    return digits().first(64)


def test_shuffled_epochs_see_every_sample_once():
    batches = list(batch_indices(12, Plan(steps=6, batch=4, lr=0.1, seed=1)))
    for epoch in (batches[:3], batches[3:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(12))
    assert not torch.equal(torch.cat(batches[:3]), torch.cat(batches[3:]))


def test_independent_batches_repeat_samples():
    batches = torch.cat(list(batch_indices(4, Plan(steps=50, batch=4, lr=0.1, sampling="iid"))))
    assert batches.bincount().min() > 25
    assert batches.bincount().unique().numel() > 1


@pytest.mark.parametrize("batch", [0, 13])
def test_impossible_batches_are_refused(batch):
    with pytest.raises(ValueError, match="1 to 12 samples"):
        next(batch_indices(12, Plan(steps=1, batch=batch, lr=0.1)))


@pytest.mark.parametrize("name", REGULARISERS)
def test_measuring_does_not_change_training(images, name):
    """Neither the monitor nor the full gradient; random regularisers draw for the full gradient too, so without it."""
    regulariser = REGULARISERS[name]
    weights = []
    for every in (0, 1):
        model = make_model("convnet", images, 0, **regulariser.model)
        run = train(model, images, Plan(steps=3, batch=16, lr=0.05, every=every), regulariser)
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        assert all(map(math.isfinite, run.losses))
    assert torch.equal(*weights)


def test_the_drift_by_the_full_gradient_is_that_of_one_large_batch(images):
    model = make_model("mlp", images, 0)
    run = train(model, images, Plan(steps=1, batch=64, lr=0.05, full_every=1), REGULARISERS["weight-decay"])
    assert run.full_mu[0] == pytest.approx(training.network(run.frame)["mu"].iloc[0], rel=1e-4)


def test_the_full_gradient_leaves_running_averages_alone(images):
    models = [make_model("convnet", images, 0, batch_norm=True) for _ in range(2)]
    for model, full in zip(models, (0, 1), strict=True):
        train(model, images, Plan(steps=2, batch=16, lr=0.05, every=0, full_every=full), REGULARISERS["batch-norm"])
    assert torch.equal(models[0].norm1.running_mean, models[1].norm1.running_mean)


@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_images_stay_images(channels):
    pixels = torch.rand(40, channels, 16, 16)
    torch.manual_seed(0)
    out = augment(pixels)
    assert out.shape == pixels.shape
    assert 0 <= out.min() <= out.max() <= 1
    assert not torch.equal(out, pixels)


def test_adversarial_images_raise_the_loss(images):
    model = make_model("convnet", images, 0)
    x, y = images.train_x, images.train_y
    clean, moved = (REGULARISERS[n].loss(model, model, x, y, images) for n in ("none", "fgsm"))
    assert moved > clean


def test_the_networks_of_the_paper():
    conv, mlp = ConvNet(3, 32), MLP(1, 28)
    assert [tuple(p.shape) for p in conv.parameters() if p.ndim > 1] == [
        (32, 3, 3, 3),
        (64, 32, 3, 3),
        (128, 64, 3, 3),
        (256, 32768),
        (10, 256),
    ]
    assert conv.conv3.stride == (2, 2)
    assert [tuple(p.shape) for p in mlp.parameters() if p.ndim > 1] == [(512, 784), (256, 512), (10, 256)]
    big = Images(torch.zeros(2, 3, 32, 32), torch.tensor([0, 9]), *(torch.zeros(1),) * 4)
    assert note("convnet", big) == ""
    assert "2048" in note("convnet", digits())


def test_hessian_trace_is_that_of_autograd():
    torch.manual_seed(0)
    A = torch.randn(4, 6, dtype=torch.float64)
    dense = torch.autograd.functional.hessian(lambda w: torch.linalg.svdvals(w.reshape(4, 6))[0], A.flatten())
    assert hessian_trace(torch.linalg.svdvals(A), (4, 6)) == pytest.approx(float(dense.trace()), rel=1e-10)


def test_moments_are_those_of_gradients_sample_by_sample(images):
    model = make_model("mlp", images, 0)
    x, y = images.train_x[:8], images.train_y[:8]
    found = label_noise.moments(model, x, y)
    rows = []
    for i in range(8):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.ndim > 1]).double())
    G = torch.stack(rows)
    assert found.trace == pytest.approx(float(G.var(0, correction=0).sum()), rel=1e-5)
    assert torch.allclose(torch.cat([g.flatten() for g in found.mean]), G.mean(0), atol=1e-6)


def test_the_obvious_way_measures_the_same_terms(images):
    model = make_model("mlp", images, 0)
    twin = make_model("mlp", images, 0)
    run = train(model, images, Plan(steps=1, batch=64, lr=0.05))
    order = next(batch_indices(64, Plan(steps=1, batch=64, lr=0.05)))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    terms = timing._per_sample_step(twin, optimizer, images.train_x[order], images.train_y[order])
    for (_, row), (drift, noise, curvature) in zip(run.frame.iterrows(), terms, strict=False):
        sigma = row["sigma"]
        assert row["mu"] == pytest.approx(-drift / sigma, rel=1e-3)
        assert row["lambda_sq"] == pytest.approx(0.05 * noise / sigma**2, rel=1e-3)
        assert row["kappa"] == pytest.approx(0.05 * curvature / (2 * sigma), rel=1e-2)
    assert torch.allclose(*(nn.utils.parameters_to_vector(m.parameters()) for m in (model, twin)), atol=1e-6)
