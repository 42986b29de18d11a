"""Clusters grown to a step, one-sided derivatives, and a-posteriori bounds."""

import math

import array_api_strict
import numpy as np
import pytest
import scipy.sparse as sparse
import torch
from hypothesis import given, settings
from oracles import certified_cases, with_spectrum

from specpert import (
    SpecpertError,
    isolating_cluster,
    kato_temple,
    one_sided_derivatives,
    sigma_series,
    singular_triplet,
)


def slope(function, truth):
    """log2 of the ratio of errors at x = 2 h and x = h: the order of the error."""
    h = 1e-3
    coarse, fine = (np.abs(function(x) - truth(x)).max() for x in (2 * h, h))
    return math.log2(coarse / fine)


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize(
    ("m", "n", "values", "k", "cluster"),
    [
        (6, 5, [3.0, 2.0, 2.0, 2.0, 1.0], 2, (1, 2, 3)),
        (5, 7, [2.0, 2.0, 1.0, 0.5], 4, (4,)),
        (6, 5, [2.0, 1.0, 0.5], 3, (3, 4)),
        (4, 4, [2.0, 1.0], 3, (2, 3)),
        (4, 5, [4.0, 3.0, 2.0, 1.0], 1, (1,)),
    ],
)
def test_one_sided(m, n, values, k, cluster, complex_):
    rng = np.random.default_rng([m, n, k])
    A = with_spectrum(rng, m, n, values, complex_)
    H = rng.standard_normal((m, n)) + (1j * rng.standard_normal((m, n)) if complex_ else 0)
    found = one_sided_derivatives(A, H, k=k)
    assert found.cluster == cluster
    padded = [*values, *[0.0] * n]
    assert math.isclose(found.value, padded[k], abs_tol=1e-14)

    def truth(x):
        return np.linalg.svd(A + x * H, compute_uv=False)[list(cluster)]

    h = 1e-7
    np.testing.assert_allclose(found.derivatives, (truth(h) - found.value) / h, atol=2e-6 * np.linalg.norm(H, 2) ** 2)
    assert slope(found.values, truth) > 2.8
    for library in (torch.as_tensor, array_api_strict.asarray):
        other = one_sided_derivatives(library(A), library(H), k=k)
        np.testing.assert_allclose(np.asarray(other.derivatives), found.derivatives, atol=1e-12)


def test_one_sided_input():
    with pytest.raises(ValueError, match="x >= 0, got -1"):
        one_sided_derivatives(np.eye(2), np.eye(2)).values(-1)
    with pytest.raises(ValueError, match="one matrix"):
        one_sided_derivatives(np.ones((2, 3, 3)), np.eye(3))
    with pytest.raises(TypeError, match="one index k"):
        one_sided_derivatives(np.eye(3), np.eye(3), k=[0, 1])
    loose = one_sided_derivatives(np.diag([1.0, 1 - 1e-6]), np.eye(2), gap_tol=1e-5)
    assert loose.cluster == (0, 1)


def test_one_sided_scales():
    rng = np.random.default_rng(0)
    A, H = with_spectrum(rng, 4, 5, [2.0, 2.0, 1.0]), rng.standard_normal((4, 5))
    for k in (0, 3):
        one, scaled = one_sided_derivatives(A, H, k=k), one_sided_derivatives(1e200 * A, 1e200 * H, k=k)
        np.testing.assert_allclose(scaled.derivatives, 1e200 * one.derivatives, rtol=1e-10)
        np.testing.assert_allclose(scaled.values(1e-3), 1e200 * one.values(1e-3), rtol=1e-10)


def test_cluster_grows_with_the_step():
    rng = np.random.default_rng(1)
    A = with_spectrum(rng, 6, 8, [3.0, 2.9, 2.5, 1.0, 0.9, 0.8])
    H = rng.standard_normal((6, 8))
    H /= np.linalg.norm(H, 2)
    assert isolating_cluster(A, 0.01 * H) == (0,)
    assert isolating_cluster(A, 0.05 * H) == (0, 1)
    assert isolating_cluster(A, 0.15 * H, k=1) == (0, 1, 2)
    assert isolating_cluster(A, 0.05 * H, k=4) == (3, 4, 5)
    for size in (0.01, 0.05, 0.15):
        cluster = isolating_cluster(A, size * H)
        series = sigma_series(A, size * H, 16, k=cluster)
        assert series.radius > 2 * (1 - 1e-9)  # eps < 1/2
        truth = np.linalg.svd(A + size * H, compute_uv=False)[list(cluster)]
        assert abs(series.mean.sum() - truth.mean()) <= series.remainder(1.0)
        np.testing.assert_allclose(series.values(1.0), truth, atol=1e-6)
    with pytest.raises(SpecpertError, match=r"apart from zero, got \|\|H\|\| = 1.000e\+00"):
        isolating_cluster(A, H)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_kato_temple_order_of_the_error(order):
    rng = np.random.default_rng(order)
    A, H = with_spectrum(rng, 5, 6, [4.0, 3.0, 2.0, 1.0, 0.5]), rng.standard_normal((5, 6))
    H /= np.linalg.norm(H, 2)
    bounds = []
    for h in (0.04, 0.02):
        e = kato_temple(A, h * H, k=1, order=order)
        truth = np.linalg.svd(A + h * H, compute_uv=False)[1]
        assert abs(truth - e.value) <= e.bound
        assert math.isclose(e.eps, 2 * h, rel_tol=1e-9)
        bounds.append(e.bound - 1.4e-14)
    if order < 3:  # beyond, the float margin shows
        assert abs(math.log2(bounds[0] / bounds[1]) - (2 * order + 2)) < 0.4


def test_kato_temple_order_0_by_hand():
    """theta = sigma + u^T H v; rho^2 = (||H v||^2 + ||H^T u||^2) / 2 - (u^T H v)^2 (theory 1.9)."""
    rng = np.random.default_rng(2)
    A, H = with_spectrum(rng, 4, 4, [4.0, 3.0, 2.0, 1.0]), 0.01 * rng.standard_normal((4, 4))
    t = singular_triplet(A, k=2)
    first = t.u @ H @ t.v
    rho_squared = (np.sum((H @ t.v) ** 2) + np.sum((H.T @ t.u) ** 2)) / 2 - first**2
    delta = t.gap - np.linalg.norm(H, 2) - abs(first)
    e = kato_temple(A, H, k=2, order=0)
    assert math.isclose(e.value, t.sigma + first, rel_tol=1e-14)
    assert math.isclose(e.bound, rho_squared / delta, rel_tol=1e-8)


def test_kato_temple_on_stacks_several_k_and_operators():
    rng = np.random.default_rng(3)
    A, H = rng.standard_normal((3, 5, 6)), 0.01 * rng.standard_normal((3, 5, 6))
    e = kato_temple(A, H, k=[0, 2])
    assert e.value.shape == e.bound.shape == e.eps.shape == (3, 2)
    truth = np.linalg.svd(A + H, compute_uv=False)[:, [0, 2]]
    assert (abs(truth - e.value) <= e.bound).all()
    one = kato_temple(A[1], H[1], k=2)
    assert math.isclose(one.value, e.value[1, 1], rel_tol=1e-13)
    B, D = rng.standard_normal((50, 60)), 0.01 * rng.standard_normal((50, 60))
    big = kato_temple(sparse.csr_array(B), D)
    assert abs(np.linalg.norm(B + D, 2) - big.value) <= big.bound
    assert abs(np.linalg.norm(B + D, 2) - big.value) < 1e-6
    with pytest.raises(ValueError, match="order to be an integer >= 0"):
        kato_temple(B, D, order=-1)


@given(certified_cases())
@settings(max_examples=2000, deadline=None)
def test_kato_temple_is_never_violated(case):
    A, H, k, order, rho = case
    H = H * (rho * singular_triplet(A, k=k).gap / np.linalg.norm(H, 2))  # eps from 0.02 to 1.9
    e = kato_temple(A, H, k=k, order=min(order, 2))
    values = np.linalg.svd(A + H, compute_uv=False)
    assert abs(values[k] - e.value) <= e.bound + 1e-14 * max(A.shape) * values[0]


def test_sizes_far_apart():
    A, H = np.diag([2e-200, 1e-200]), np.diag([1e200, 5e200])
    found = one_sided_derivatives(A, H)
    assert found.cluster == (0,)
    assert math.isclose(found.value, 2e-200)
    np.testing.assert_allclose(found.derivatives, [1e200])
    for M, D in [(np.diag([2.0, 1]), 1e160 * np.ones((2, 2))), (A, H)]:
        e = kato_temple(M, D)
        truth = np.linalg.norm(M + D, 2)
        assert abs(truth - e.value) <= e.bound
    f32 = kato_temple(np.random.default_rng(0).standard_normal((70, 80)).astype("f4"), np.zeros((70, 80), "f4"))
    assert f32.value.dtype == f32.bound.dtype == np.float32


def test_gap_tol_is_checked_and_never_below_rounding():
    A = np.diag([1.0, 1.0 - 2e-16, 0.5])
    assert one_sided_derivatives(A, np.ones((3, 3)), gap_tol=0).cluster == (0, 1)
    for wrong in (-1.0, float("nan"), 1.0):
        with pytest.raises(ValueError, match="gap_tol"):
            one_sided_derivatives(A, A, gap_tol=wrong)
    with pytest.raises(TypeError, match="gap_tol"):
        one_sided_derivatives(A, A, gap_tol="0.1")


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_isolating_cluster_of_a_large_matrix_at_any_scale(scale):
    A = np.diag(np.append([3.0, 2.9], np.linspace(1.0, 0.1, 511)))
    H = 0.04 * np.diag(np.append([1.0], np.zeros(512)))
    assert isolating_cluster(scale * A, scale * H) == (0, 1)


def test_a_chain_of_ties_that_ends_at_zero():
    """All of it counts as zero: from the positive end as from the zero one."""
    A = np.diag([1.0, 1e-14, 5e-15])
    for k in (1, 2):
        found = one_sided_derivatives(A, np.diag([1.0, 2.0, -3.0]), k=k)
        assert (found.cluster, found.value) == ((1, 2), 0.0)
        np.testing.assert_allclose(found.derivatives, [3.0, 2.0])


def test_arguments_are_finite():
    for x in (np.inf, np.nan, -1.0):
        with pytest.raises(ValueError, match="expected a finite x >= 0, got"):
            one_sided_derivatives(np.eye(2), np.eye(2)).values(x)


def test_one_direction_at_a_time():
    A, H = np.diag([3.0, 2.0, 1.0]), np.stack([np.eye(3)] * 2)
    for function in (one_sided_derivatives, isolating_cluster):
        with pytest.raises(ValueError, match=r"one direction H \(m, n\), got a stack of shape \(2, 3, 3\)"):
            function(A, H)
    sides = one_sided_derivatives(A, H[0])
    for x in ("a", np.array([0.1, 0.2])):
        with pytest.raises(TypeError, match="real number"):
            sides.values(x)


def test_a_step_too_large_to_enclose_has_the_bound_of_weyl():
    A, H = np.diag([3.0, 1.0]), -40.0 * np.eye(2)
    for order in (0, 1, 2):
        found = kato_temple(A, H, order=order)
        assert found.value == 3.0
        assert math.isclose(found.bound, 40.0)


def test_what_leaves_the_range_of_floats():
    """An infinite value with a finite bound would be a false certificate."""
    A, H = np.array([[1.5e308, 1.5e308], [0.0, 1e307]]), np.array([[1.0, 2.0], [0.5, 1.0]])
    for function in (kato_temple, one_sided_derivatives):
        with pytest.raises(
            OverflowError, match="expected the value within the range of float64, got an overflow; scale"
        ):
            function(A, H)
        assert np.isfinite(function(A / 2**1000, H / 2**1000).value)
    for matrix in (np.array([[2.0, 1.0], [1.0, 2.0]]), np.zeros((2, 2))):
        with pytest.raises(
            OverflowError, match="expected the derivatives within the range of float64, got an overflow"
        ):
            one_sided_derivatives(matrix, np.full((2, 2), 1.2e308))
    assert kato_temple(np.diag([2.0, 1.0]), np.full((2, 2), 1.2e308)).bound == np.inf
