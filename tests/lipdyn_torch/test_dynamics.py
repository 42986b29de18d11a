"""Curves of Z and K against literal twins: enumeration, simulation and loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lipdyn_torch import dynamics


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_bridge_variance_is_that_of_all_orders(batch):
    """Every order of six samples, cut into batches: the exact variance of the partial sums (theory 2.10)."""
    x = np.array([0.3, -1.2, 2.0, 0.1, 0.9, -0.4])
    response = np.linspace(1.0, 1.5, 6 // batch)  # a changes from step to step
    orders = np.array(list(itertools.permutations(x)))
    means = orders.reshape(len(orders), -1, batch).mean(2)
    exact = np.cumsum(means * response, axis=1).var(axis=0)
    v = response**2 * x.var(ddof=1) / batch  # what one step would have with independent batches
    bridge = dynamics.bridge_variance(v, [batch] * len(v), dataset_size=6)
    assert bridge[1:] == pytest.approx(exact, rel=1e-12, abs=1e-15)


def test_bridge_of_constant_steps_is_the_closed_form():
    """Two epochs of 64 steps: k v (1 - k M/N) in each, nothing left over from the first."""
    k = np.arange(1, 65)
    bridge = dynamics.bridge_variance(np.full(128, 0.01), 8, dataset_size=512)
    assert bridge[1:65] == pytest.approx(0.01 * k * (1 - k / 64), abs=1e-14)
    assert bridge[65:] == pytest.approx(bridge[1:65], abs=1e-12)


def test_epochs_without_their_incomplete_batch():
    """Ten samples in batches of four: two steps per epoch, two samples unseen, so the noise does not cancel."""
    bridge = dynamics.bridge_variance(np.ones(4), 4, dataset_size=10)
    one, two = 1 - 4 / 10, 2 - 16 / 10
    assert bridge == pytest.approx([0.0, one, two, two + one, 2 * two])


@pytest.mark.parametrize("dataset_size", [None, 12])
def test_sample_paths_have_the_predicted_moments(dataset_size):
    v, batch, mean = np.array([1.0, 2.0, 0.5, 1.0, 1.5]), np.full(5, 4), np.linspace(0.0, 1.0, 6)
    z = dynamics.sample_paths(mean, v, batch, paths=40_000, dataset_size=dataset_size, seed=1)
    predicted = (
        dynamics.diffusion_variance(v) if dataset_size is None else dynamics.bridge_variance(v, batch, dataset_size)
    )
    assert z.mean(0) == pytest.approx(mean, abs=4 * np.sqrt(v.sum() / 40_000))
    assert z.var(0) == pytest.approx(predicted, rel=0.04, abs=1e-12)
    again = dynamics.sample_paths(mean, v, batch, paths=40_000, dataset_size=dataset_size, seed=1)
    assert np.array_equal(z, again)


def test_expected_k_with_correlated_layers():
    """Two layers with correlated noise: E[K] and Var[K] of the product by simulation (theory 2.9)."""
    rng = np.random.default_rng(0)
    m, c, covariance = np.array([0.02, -0.01]), np.array([0.005, 0.003]), np.array([[0.02, 0.012], [0.012, 0.03]])
    steps, paths = 5, 400_000
    noise = rng.multivariate_normal([0, 0], steps * covariance, size=paths).sum(1)
    v_layers, v = np.full(steps, covariance.trace()), np.full(steps, covariance.sum())
    m_z, c_z = np.full(steps, m.sum()), np.full(steps, c.sum())
    z = dynamics.mean_z(0.3, m_z, c_z, v_layers)[-1] + noise
    log_mean = dynamics.expected_log_k(0.3, m_z, c_z, v, v_layers)
    k = np.exp(z)
    assert np.exp(log_mean[-1]) == pytest.approx(k.mean(), rel=5 * k.std() / k.mean() / np.sqrt(paths))
    sd = np.exp(dynamics.log_sd_k(log_mean, dynamics.diffusion_variance(v)))
    assert sd[0] == 0.0
    assert sd[-1] == pytest.approx(k.std(), rel=0.02)


def test_spread_of_k_beyond_the_range_of_floats():
    """The logarithm of sqrt(exp v - 1) is v/2 for a large v, and log(v)/2 for a small one."""
    found = dynamics.log_sd_k(1.0, [0.0, 1e-300, 1e-20, 1.0, 800.0, 1e6, 1e300])
    expected = [-np.inf, *(0.5 * np.log([1e-300, 1e-20, np.expm1(1.0)])), 400.0, 5e5, 5e299]
    assert found == pytest.approx(1.0 + np.array(expected), rel=1e-14)


def test_clipping_of_impossible_changes():
    changes, clipped = dynamics.pathwise_changes([1.0, -1.5, 0.7, 0.0])
    assert clipped
    assert changes == pytest.approx([np.log(0.1), np.log(0.2), np.log(0.2)])


def test_paths_without_replacement_need_batch_sizes():
    with pytest.raises(ValueError, match="expected the batch sizes with dataset_size, got None"):
        dynamics.sample_paths(np.zeros(2), [1.0], dataset_size=3)


def test_bridge_of_noisy_estimates_closes_at_the_end_of_every_epoch():
    rng = np.random.default_rng(0)
    v = 0.01 * rng.chisquare(15, 48) / 15  # what 16 samples tell of one variance
    sizes = np.full(48, 16)
    smooth = dynamics.epoch_means(v, sizes, dataset_size=256)
    bridge = dynamics.bridge_variance(smooth, sizes, dataset_size=256)
    np.testing.assert_allclose(bridge[[0, 16, 32, 48]], 0.0, atol=1e-15)
    assert dynamics.bridge_variance(v, sizes, dataset_size=256)[16] > 1e-3
    np.testing.assert_allclose(smooth.reshape(3, 16).mean(1), v.reshape(3, 16).mean(1))
    constant = np.full(48, 0.01)
    np.testing.assert_allclose(dynamics.epoch_means(constant, sizes, dataset_size=256), constant)


def test_an_empty_batch_takes_no_part_in_its_epoch():
    v, sizes, where = np.array([0.2, 0.3, 0.0, 0.1]), np.array([4, 4, 0, 4]), [0, 1, 3]
    without = dynamics.epoch_means(v[where], sizes[where], 12)
    averaged = dynamics.epoch_means(v, sizes, 12)
    assert averaged[where] == pytest.approx(without, rel=1e-14)
    assert averaged[2] == 0.0
    paths = dynamics.sample_paths(np.zeros(5), averaged, sizes, paths=40_000, dataset_size=12)
    assert np.array_equal(paths[:, 2], paths[:, 3])
    assert paths.var(0) == pytest.approx(dynamics.bridge_variance(averaged, sizes, 12), rel=0.03, abs=1e-12)
