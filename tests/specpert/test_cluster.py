"""The largest values as one cluster, from the decomposition of a triplet, beside that of an SVD."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from oracles import with_spectrum

from specpert import (
    DegenerateSingularValueError,
    NonFiniteError,
    SingularTriplet,
    Status,
    ZeroSingularValueError,
    kato_temple,
    leading_cluster,
    sigma_derivative,
    sigma_series,
    singular_triplet,
)
from specpert._solvers import ClusterSolver, EigenSolver
from specpert._top import SINGLE_ERROR


def random(shape, complex_=False, seed=0):
    rng = np.random.default_rng([seed, *shape])
    A = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if complex_ else 0)
    return A / math.sqrt(shape[1])


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize(
    ("shape", "refine_from"),
    [((6, 9), 1024), ((80, 70), 1024), ((256, 300), 1024), ((256, 300), 0), ((420, 256), 0)],
    ids=str,
)
@pytest.mark.parametrize("rtol", [0.0, 3e-5])
@pytest.mark.parametrize("scale", [1.0, 1e-150])
def test_it_is_the_cluster_of_the_svd(monkeypatch, shape, complex_, rtol, scale, refine_from):
    monkeypatch.setattr("specpert.cluster._REFINE_FROM", refine_from)
    A, H = scale * random(shape, complex_), scale * random(shape, complex_, seed=1)
    s = np.linalg.svd(A, compute_uv=False)
    triplet = singular_triplet(A, rtol=rtol)
    for c in (1, 2, 5) if min(shape) < 16 else (1, 2, 5, 16):
        between = (s[c - 1] + s[c]) / 2
        cluster = leading_cluster(triplet, between, between)
        assert cluster.k == tuple(range(c))
        assert cluster.status is Status.CLUSTER
        np.testing.assert_allclose(cluster.sigma, s[:c], rtol=1e-13)
        exact = singular_triplet(A, k=list(cluster.k), method="svd")
        for found, vectors in ((cluster.u, exact.u), (cluster.v, exact.v)):
            overlap = np.linalg.svd(vectors.conj().T @ found, compute_uv=False)
            np.testing.assert_allclose(overlap, 1.0, rtol=1e-11)
        distance = s[c - 1] - s[c]
        assert (1 - (1e-4 if rtol else 1e-5)) * distance <= cluster.gap <= (1 + 1e-9) * distance
        series, truth = sigma_series(cluster, H, 4), sigma_series(A, H, 4, k=cluster.k)
        exact_to = 1e-9 if rtol == 0 or min(shape) < 256 else 10 * rtol
        for found, expected in zip(series.effective_matrices, truth.effective_matrices, strict=True):
            assert math.isclose(np.linalg.norm(found), np.linalg.norm(expected), rel_tol=exact_to)
        np.testing.assert_allclose(series.mean, truth.mean, rtol=0, atol=exact_to * np.abs(truth.mean).max())
        solver = cluster._small_side and cluster._small_side.solve
        # single precision only where the cluster's own gap allows it
        single = rtol * (s[c - 1] ** 2 - s[c] ** 2) > SINGLE_ERROR * np.finfo(np.float32).eps * s[0] ** 2
        assert isinstance(solver, ClusterSolver) == (min(shape) >= 256 and (single if rtol else refine_from == 0))


@pytest.mark.parametrize("rtol", [0.0, 3e-5])
@pytest.mark.parametrize("shape", [(12, 15), (100, 120), (256, 300)], ids=str)
def test_it_ends_at_the_widest_gap(shape, rtol):
    split = 1e-5 if rtol else 1e-7
    s = np.append([2.0, 1.99, 1.97, 1.9, 1.82, 1.8 + split, 1.8 - split, 1.7], np.linspace(1.65, 0.1, min(shape) - 8))
    triplet = singular_triplet(with_spectrum(np.random.default_rng(0), *shape, s), rtol=rtol)
    assert leading_cluster(triplet, 1.8, 1.8).k == tuple(range(6))
    assert leading_cluster(triplet, 1.8, 1.75).k == tuple(range(7))
    assert leading_cluster(triplet, 1.85, 1.8).k == tuple(range(4))
    assert leading_cluster(triplet, 1.85, 1.75).k == tuple(range(7))
    assert leading_cluster(triplet, 1.85, 1.75, most=6).k == tuple(range(4))
    assert leading_cluster(triplet, 1.995, 1.98).k == (0, 1)
    assert leading_cluster(triplet, 1.85, 1.75, most=3) is None
    assert leading_cluster(triplet, 2.1, 1.0) is None
    assert leading_cluster(triplet, 1.0, 0.5, most=7) is None


@pytest.mark.parametrize("rtol", [0.0, 3e-5])
def test_ties_inside_and_at_the_end(rtol):
    s = np.append([2.0, 1.99, 1.99, 1.99, 1.9, 1.9], np.linspace(1.5, 0.1, 250))
    A, H = with_spectrum(np.random.default_rng(1), 256, 300, s), random((256, 300), seed=2)
    triplet = singular_triplet(A, rtol=rtol)
    for most in (16, 6):
        cluster = leading_cluster(triplet, 1.95, 1.6, most=most)
        assert cluster.k == tuple(range(6))
        np.testing.assert_allclose(cluster.sigma, s[:6], rtol=1e-12)
        found, truth = (sigma_series(x, H, 3, **k).mean for x, k in ((cluster, {}), (A, {"k": cluster.k})))
        np.testing.assert_allclose(found, truth, rtol=1e-4 if rtol else 1e-10)
    assert leading_cluster(triplet, 1.95, 1.9, most=5).k == tuple(range(4))


def test_ends_within_rounding():
    for A in (np.diag([2.0, 1.5, 1.5 - 4e-16, 1.0]), np.diag([2.0, 1.5, 1.5 - 4e-16, *np.linspace(1.0, 0.1, 300)])):
        with pytest.raises(DegenerateSingularValueError, match=r"the cluster \(0, 1\) to be isolated"):
            leading_cluster(A, 1.5 - 2e-16, 1.5 - 2e-16, most=2)
    with pytest.raises(ZeroSingularValueError):
        leading_cluster(np.diag([2.0, 1e-17]), 0.0, 0.0)
    assert leading_cluster(np.zeros((3, 4)), 0.0, 0.0) is None


def test_a_whole_spectrum():
    """A square matrix has nothing outside; the zeros of a rectangular one are the next values."""
    for shape in ((5, 5), (80, 80), (260, 260)):
        A = with_spectrum(np.random.default_rng(0), *shape, np.linspace(2.0, 1.0, shape[0]))
        cluster = leading_cluster(singular_triplet(A), 0.5, 0.5, most=300)
        assert len(cluster.k) == shape[0]
        assert math.isclose(cluster.gap, 2.0)
    A = with_spectrum(np.random.default_rng(0), 5, 7, np.linspace(2.0, 1.0, 5))
    assert math.isclose(leading_cluster(singular_triplet(A), 0.5, 0.0).gap, 1.0)


@pytest.mark.parametrize("rtol", [0.0, 1e-3])
def test_a_graded_spectrum(rtol):
    """Squared, small values would lose their digits: the SVD then decides."""
    s = np.logspace(0, -9, 256)
    A = with_spectrum(np.random.default_rng(0), 256, 256, s)
    triplet = singular_triplet(A, rtol=rtol)
    for c in (1, 3, 10, 60, 150):
        cluster = leading_cluster(triplet, math.sqrt(s[c - 1] * s[c]), math.sqrt(s[c - 1] * s[c]), most=200)
        assert len(cluster.k) == c
        np.testing.assert_allclose(cluster.sigma, s[:c], rtol=1e-5)


@pytest.mark.parametrize("kind", ["numpy", "torch", "float32"])
def test_of_a_matrix(kind):
    """Without a triplet, also where the largest value is tied."""
    A = with_spectrum(np.random.default_rng(0), 90, 80, np.append([2.0, 2.0, 1.9], np.linspace(1.5, 0.1, 77)))
    A = {"numpy": A, "torch": torch.as_tensor(A), "float32": A.astype(np.float32)}[kind]
    cluster = leading_cluster(A, 1.95, 1.7)
    assert cluster.k == (0, 1, 2)
    assert type(cluster.sigma) is type(A)
    assert cluster.sigma.dtype == A.dtype
    np.testing.assert_allclose(np.asarray(cluster.sigma), [2.0, 2.0, 1.9], rtol=1e-6)
    assert leading_cluster(A, 1.95, 1.7, most=1) is None


def test_of_a_triplet_of_another_library():
    A, H = (torch.as_tensor(random((256, 300), seed=seed)) for seed in (0, 1))
    triplet = singular_triplet(A)
    s = torch.linalg.svdvals(A)
    cluster = leading_cluster(triplet, float(s[2] + s[3]) / 2, float(s[2] + s[3]) / 2)
    assert isinstance(cluster.u, torch.Tensor)
    torch.testing.assert_close(sigma_series(cluster, H, 2).mean, sigma_series(A, H, 2, k=(0, 1, 2)).mean)


@pytest.mark.parametrize("missed", [2, 5])
def test_a_missed_value_is_not_passed_over(monkeypatch, missed):
    """Inside the cluster the factorisation finds it, and the whole spectrum decides; at its end it is put back."""
    import specpert.cluster

    monkeypatch.setattr(specpert.cluster, "_REFINE_FROM", 0)
    A = random((256, 300))
    s = np.linalg.svd(A, compute_uv=False)
    triplet, between = singular_triplet(A), (s[5] + s[6]) / 2
    leading = specpert.cluster._leading

    def blind(*args):
        w, X = leading(*args)
        return np.delete(w, missed), np.delete(X, missed, axis=1)

    monkeypatch.setattr(specpert.cluster, "_leading", blind)
    cluster = leading_cluster(triplet, between, between)
    assert cluster.k == tuple(range(6))
    assert isinstance(cluster._small_side.solve, EigenSolver if missed == 2 else ClusterSolver)
    np.testing.assert_allclose(cluster.sigma, s[:6], rtol=1e-13)


def test_what_is_refused():
    A = random((6, 9))
    triplet = singular_triplet(A)
    for bounds in ((-1.0, -2.0), (math.nan, 0.0), (math.inf, 0.0), (1.0, 2.0)):
        with pytest.raises(ValueError, match="expected"):
            leading_cluster(triplet, *bounds)
    for bound in ("1", None, np.ones(2)):
        with pytest.raises(TypeError, match="expected upper to be a number"):
            leading_cluster(triplet, bound, 0.0)
    for most in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="most"):
            leading_cluster(triplet, 1.0, 0.5, most=most)
    with pytest.raises(ValueError, match="k = 0 of one matrix"):
        leading_cluster(singular_triplet(A, k=1), 1.0, 0.5)
    with pytest.raises(ValueError, match="k = 0 of one matrix"):
        leading_cluster(singular_triplet(np.stack([A, A])), 1.0, 0.5)
    with pytest.raises(ValueError, match="stack"):
        leading_cluster(np.stack([A, A]), 1.0, 0.5)
    with pytest.raises(TypeError, match="dense"):
        leading_cluster(singular_triplet(random((60, 70)), method="lanczos"), 1.0, 0.5)
    with pytest.raises(NonFiniteError):
        leading_cluster(np.full((2, 3), np.nan), 1.0, 0.5)
    assert isinstance(leading_cluster(triplet, 0.0, 0.0), SingularTriplet)


@pytest.mark.parametrize("rtol", [0.0, 3e-5, 1e-3])
@pytest.mark.parametrize("seed", range(12))
def test_values_far_below_the_largest(monkeypatch, rtol, seed):
    """The inverse hardly tells them apart: none is left out, and none taken for another."""
    monkeypatch.setattr("specpert.cluster._REFINE_FROM", 0)
    rng = np.random.default_rng(seed)
    top = [[3.0, 1.02, 1.01, 1.0, 0.99], [1.5, 1.02, 1.01, 1.0, 0.9], [1.1, 1.02, 1.01, 1.0, 0.999]][seed % 3]
    s = np.array([*top, *np.sort(rng.uniform(0.0, 0.985 * top[4], 295))[::-1]])
    A, H = with_spectrum(rng, 300, 300, s), random((300, 300), seed=seed)
    triplet = singular_triplet(A, rtol=rtol)
    cluster = leading_cluster(triplet, 0.9995, 0.9995)
    assert cluster.k == (0, 1, 2, 3)
    np.testing.assert_allclose(cluster.sigma, s[:4], rtol=1e-12)
    found, truth = (sigma_series(x, H, 3, **k).mean for x, k in ((cluster, {}), (A, {"k": cluster.k})))
    np.testing.assert_allclose(found, truth, rtol=0, atol=(10 * rtol or 1e-9) * np.abs(truth).max())


@pytest.mark.parametrize("rtol", [3e-5, 1e-3])
@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-5, 1e-6])
def test_accuracy_and_certificate_of_clusters_with_a_small_gap(rtol, gap):
    """The triplet's factor was good enough for the gap of one value, not for that of any cluster."""
    rng = np.random.default_rng(1)
    s = [2.2, 2.02, 2.01, 2.005, 2.0, 2 - gap, 2 - 1.1 * gap, 2 - 1.2 * gap, 2 - 1.5 * gap]
    s = np.array([*s, *np.sort(rng.uniform(0.0, 1.0, 291))[::-1]])
    U, V = (np.linalg.qr(rng.standard_normal((300, 300)))[0] for _ in range(2))
    A, B = (U * s) @ V.T, rng.standard_normal((12, 12)) * gap / 7
    H = U[:, :12] @ B @ V[:, :12].T
    cluster = leading_cluster(singular_triplet(A, rtol=rtol), 2 - 0.3 * gap, 2 - 0.7 * gap)
    assert cluster.k == tuple(range(5))
    for order in (3, 4, 6):
        series, truth = sigma_series(cluster, H, order), sigma_series(A, H, order, k=cluster.k)
        np.testing.assert_allclose(series.mean, truth.mean, rtol=0, atol=rtol * np.abs(truth.mean[1:]).max())
        assert np.all(np.abs(series.mean[2:] / truth.mean[2:] - 1) < 100 * rtol)
        for x in (0.01, 0.03, 0.1, 0.3):
            mean = np.linalg.svd(np.diag(s[:12]) + x * B, compute_uv=False)[:5].mean()
            partial = sum(c * x**n for n, c in enumerate(series.mean))
            assert abs(mean - partial) <= series.remainder(x)


def test_less_accuracy_lets_more_clusters_do_with_a_single_precision_factor():
    A, H = random((420, 256)), random((420, 256), seed=1)
    s = np.linalg.svd(A, compute_uv=False)
    triplet, between = singular_triplet(A, rtol=3e-5), (s[15] + s[16]) / 2
    exact = sigma_series(A, H, 3, k=tuple(range(16))).mean
    for rtol, kind in ((0.0, EigenSolver), (1e-3, ClusterSolver)):
        cluster = leading_cluster(triplet, between, between, rtol=rtol)
        assert isinstance(cluster._small_side.solve, kind)
        found = sigma_series(cluster, H, 3).mean
        np.testing.assert_allclose(found[:2], exact[:2], rtol=1e-6)
        np.testing.assert_allclose(found[2:], exact[2:], rtol=0, atol=max(rtol, 1e-9) * np.abs(exact[2:]).max())
    with pytest.raises(ValueError, match="0 <= rtol < 1"):
        leading_cluster(triplet, between, between, rtol=1.0)


def test_of_a_matrix_in_single_precision():
    """Where the Gram matrix does not do, the SVD of what the triplet holds."""
    rng = np.random.default_rng(0)
    A = with_spectrum(rng, 100, 120, 10.0 ** -np.linspace(0, 6, 100)).astype(np.float32)
    s = np.linalg.svd(A, compute_uv=False)
    between = (s[19] + s[20]) / 2
    cluster = leading_cluster(singular_triplet(A), between, between, most=40)
    assert cluster.k == tuple(range(20))
    assert cluster.sigma.dtype == np.float32
    np.testing.assert_allclose(cluster.sigma, s[:20], rtol=1e-4)


def test_bounds_of_any_kind():
    A = random((20, 30))
    s = np.linalg.svd(A, compute_uv=False)
    triplet = singular_triplet(torch.as_tensor(A))
    bound = (s[2] + s[3]) / 2
    for x in (bound, float(bound), np.asarray(bound), torch.tensor(bound), Fraction(float(bound))):
        assert leading_cluster(triplet, x, x).k == (0, 1, 2)


@pytest.mark.parametrize("rtol", [0.0, 1e-3])
def test_a_bound_just_below_the_largest_value(rtol):
    for seed in range(6):
        A = random((256, 270), seed=seed).astype(np.float32)
        triplet = singular_triplet(A, rtol=rtol, dtype=np.float64)
        upper = np.nextafter(float(triplet.sigma), 0.0)
        assert leading_cluster(triplet, upper, upper).k == (0,)
        assert leading_cluster(triplet, triplet.sigma, triplet.sigma) is None


def test_a_cluster_is_not_several_values():
    A, H = np.diag([3.0, 3.0 - 1e-7, 2.0, 1.0]), np.eye(4)
    cluster = leading_cluster(A, 2.5, 2.2)
    with pytest.raises(TypeError, match="single values to enclose, got that of a cluster"):
        kato_temple(cluster, H)
    for call in (
        lambda: sigma_series(cluster, H, 2, k=[0, 1]),
        lambda: sigma_derivative(cluster, 2, directions=H, k=[0, 1]),
        lambda: singular_triplet(cluster, k=[0, 1]),
    ):
        with pytest.raises(TypeError, match=r"single values for the list k = \[0, 1\], got that of a cluster"):
            call()


def test_bounds_below_what_a_gram_matrix_can_tell():
    s = np.full(66, 1e-9)
    s[:5] = [1.0, 9e-9, 8e-9, 7e-9, 6.5e-9]
    A = with_spectrum(np.random.default_rng(0), 66, 88, s)
    for method in ("gram", "svd"):
        cluster = leading_cluster(singular_triplet(A, method=method), 6e-9, 4e-9, 16)
        assert cluster.k == (0, 1, 2, 3, 4)
        assert cluster.gap == pytest.approx(5.5e-9, rel=1e-6)
