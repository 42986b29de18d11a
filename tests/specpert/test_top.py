"""The largest value of one large matrix: in single precision where that is enough, followed, and alone."""

import math

import numpy as np
import pytest
import scipy.sparse as sparse
import torch
from oracles import with_spectrum

from specpert import (
    ConvergenceError,
    DegenerateSingularValueError,
    NonFiniteError,
    SigmaHessian,
    kato_temple,
    sigma_derivative,
    sigma_series,
    singular_triplet,
    spectral_norm,
)
from specpert._solvers import CholeskySolver


def step(shape, complex_, size, seed=1):
    rng = np.random.default_rng([seed, *shape])
    H = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if complex_ else 0)
    return size * H / np.linalg.norm(H, 2)


def matrix(shape, complex_, gap, rng=0):
    r = min(shape)
    s = np.append([1.0], np.linspace(1.0 - gap, 0.1, r - 1))
    A = with_spectrum(np.random.default_rng(rng), *shape, s)
    if not complex_:
        return A
    phases = np.exp(1j * np.random.default_rng(rng).uniform(0, 6, shape[0]))
    return phases[:, None] * A


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shape", [(256, 300), (300, 260)], ids=str)
@pytest.mark.parametrize("gap", [1e-1, 1e-2, 5e-3, 2e-3, 2e-4, 1e-5])
@pytest.mark.parametrize("rtol", [1e-3, 3e-5, 1e-7])
def test_forms_in_single_precision(shape, complex_, gap, rtol):
    """Forms and diagonal keep to rtol; everything else is as without; a gap too small is seen."""
    A, H = matrix(shape, complex_, gap), step(shape, complex_, 1.0)
    svd = singular_triplet(A, method="svd")
    for v0 in (None, svd.v + 0.1 * gap * H[0].real):
        rough = singular_triplet(A, v0=v0, rtol=rtol)
        single = rough._resolvent().matrix.dtype.itemsize < A.dtype.itemsize
        assert single == (rtol > 1e-6 and gap * rtol > 4e-8)
        assert math.isclose(rough.sigma, svd.sigma, rel_tol=1e-14)
        assert abs(np.vdot(rough.v, svd.v)) > 1 - 1e-10
        assert (1 - max(rtol, 1e-3 if single else 1e-6)) * svd.gap <= rough.gap <= (1 + 1e-9) * svd.gap
        found, expected = (sigma_series(t, 0.1 * gap * H, 6).coefficients for t in (rough, svd))
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-15 / gap)
        G = np.stack([H, step(shape, complex_, 1.0, seed=2)])
        form, truth = (SigmaHessian(t).quadratic(G) for t in (rough, svd))
        np.testing.assert_allclose(form, truth, rtol=rtol)
        diagonal, exact = (SigmaHessian(t).diagonal() for t in (rough, svd))
        np.testing.assert_allclose(diagonal, exact, rtol=0, atol=rtol * np.abs(exact).max())


@pytest.mark.parametrize("gap", [2e-3, 5e-3], ids=["corrected", "probed"])
def test_forms_of_nearly_diagonal_matrices(gap):
    """Errors of their Gram matrices in single precision add up: forms by the factor alone may not keep to rtol."""
    rtol, alone, ours = 3e-5, [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        s = np.sort(1 + rng.random(300))[::-1]
        s[0] = s[1] * (1 + gap)
        A = (np.eye(300, 400) * s[:, None] + 1e-5 * rng.standard_normal((300, 400))).astype(np.float32)
        rough, svd = singular_triplet(A, rtol=rtol, dtype="float64"), singular_triplet(A.astype(float), method="svd")
        solver = rough._small_side.solve
        assert not solver.precise
        assert (solver.doubt > 2) == (gap < 4e-3)
        beside = svd._svd[0][:, 1:9].T[:, :, None] * svd.v  # along the singular vectors next to the first
        G = np.concatenate([beside, rng.standard_normal((8, 300, 400))])
        truth = SigmaHessian(svd).quadratic(G)
        ours.append(np.abs(SigmaHessian(rough).quadratic(G) / truth - 1).max())
        solver.doubt = 0.0
        alone.append(np.abs(SigmaHessian(rough).quadratic(G) / truth - 1).max())
    assert max(ours) < rtol
    assert gap > 4e-3 or max(alone) > rtol


def test_a_probe_spares_the_correction(monkeypatch):
    """Where forms are accurate as they are, one column is corrected and not all."""
    A, widths = matrix((300, 400), False, 5e-3).astype(np.float32), []
    triplet, corrected = singular_triplet(A, rtol=3e-5, dtype="float64"), CholeskySolver._corrected
    monkeypatch.setattr(
        CholeskySolver, "_corrected", lambda self, b, half: (widths.append(b.shape[1]), corrected(self, b, half))[1]
    )
    SigmaHessian(triplet).quadratic(np.random.default_rng(0).standard_normal((20, 300, 400)))
    assert widths == [1]


def test_the_norm_of_zero_takes_no_decomposition(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("decomposed")

    monkeypatch.setattr(np.linalg, "svd", refuse)
    monkeypatch.setattr(np.linalg, "eigvalsh", refuse)
    for rtol in (0.0, 1e-3):
        assert spectral_norm(np.zeros((300, 400)), rtol=rtol) == 0.0
        np.testing.assert_array_equal(spectral_norm(np.zeros((2, 3, 4), np.float32), rtol=rtol), np.zeros(2))


def test_rtol_is_checked():
    with pytest.raises(ValueError, match="0 <= rtol < 1"):
        singular_triplet(np.eye(3), rtol=1.0)
    with pytest.raises(ValueError, match="0 <= rtol < 1"):
        spectral_norm(np.eye(3), rtol=-1e-3)


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shape", [(9, 6), (70, 80), (300, 260)], ids=str)
@pytest.mark.parametrize("eps", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("rtol", [0.0, 1e-3])
def test_follow(shape, complex_, eps, rtol):
    """While eps < 1 the value that is followed is the largest, to the last digits."""
    A, gap = matrix(shape, complex_, 1e-2), 1e-2
    triplet = singular_triplet(1e-30 * A, rtol=rtol)
    for seed in range(2):
        moved = A + step(shape, complex_, eps * gap / 2, seed)
        truth = 1e-30 * np.linalg.norm(moved, 2)
        assert math.isclose(triplet.follow(1e-30 * moved), truth, rel_tol=1e-14)
    if not complex_:
        on_torch = singular_triplet(torch.as_tensor(A), rtol=rtol)
        assert math.isclose(float(on_torch.follow(torch.as_tensor(moved))), 1e30 * truth, rel_tol=1e-14)


def test_follow_what_cannot_be_followed():
    A = matrix((256, 300), False, 1e-2)
    triplet = singular_triplet(A)
    with pytest.raises(ConvergenceError, match="nearby"):
        triplet.follow(matrix((256, 300), False, 1e-4, rng=7))
    with pytest.raises(ValueError, match="shape"):
        triplet.follow(A.T)
    with pytest.raises(ValueError, match="k = 1"):
        singular_triplet(A, k=1).follow(A)
    with pytest.raises(NonFiniteError):
        triplet.follow(np.full_like(A, np.nan))


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (64, 64), (80, 300), (300, 80)], ids=str)
@pytest.mark.parametrize("rtol", [0.0, 1e-8, 1e-3, 0.1])
@pytest.mark.parametrize("scale", [1e-250, 1e250])
def test_spectral_norm(shape, complex_, rtol, scale):
    for gap in (0.5, 1e-6):
        A = matrix(shape, complex_, gap)
        found = spectral_norm(scale * A, rtol=rtol)
        assert 1 - 1e-14 <= found / scale <= 1 + rtol + 1e-14
        if not complex_:
            there = spectral_norm(torch.as_tensor(scale * A), rtol=rtol)
            assert isinstance(there, torch.Tensor)
            assert math.isclose(float(there), found, rel_tol=1e-14)


@pytest.mark.parametrize("outlier", [1.2, 1.006, 1.0006, 1.0])
@pytest.mark.parametrize("rtol", [0.1, 1e-3, 1e-4])
def test_spectral_norm_of_nearly_orthogonal_matrices(outlier, rtol):
    """All values alike but one: the residual of any vector is small."""
    Q = with_spectrum(np.random.default_rng(3), 256, 256, np.append([outlier], np.ones(255)))
    assert outlier * (1 - 1e-14) <= spectral_norm(Q, rtol=rtol) <= outlier * (1 + rtol)


def test_spectral_norm_of_unusual_matrices():
    assert spectral_norm(np.zeros((70, 80)), rtol=1e-3) == 0.0
    np.testing.assert_allclose(spectral_norm(np.stack([np.eye(70), 2 * np.eye(70)]), rtol=1e-3), [1.0, 2.0])
    assert spectral_norm(np.eye(100, dtype=np.float32), rtol=1e-3).dtype == np.float32
    ones = np.ones((100, 90))  # of rank one: Lanczos ends after one step
    assert math.isclose(spectral_norm(ones, rtol=1e-3), math.sqrt(9000.0), rel_tol=1e-5)
    with pytest.raises(NonFiniteError):
        spectral_norm(np.full((70, 80), np.inf))


@pytest.fixture(scope="module", params=[(80, 90), (256, 300), (300, 260)], ids=str)
def both(request):
    """A real matrix by its Gram matrix and by an SVD, and a stack of directions."""
    A = matrix(request.param, False, 0.1)
    G = np.stack([step(A.shape, False, 1.0, seed) for seed in range(3)])
    return A, G, singular_triplet(A, method="gram"), singular_triplet(A, method="svd")


def test_stacks_of_directions(both):
    _, G, gram, svd = both
    for order in (1, 2, 3, 4):
        found, expected = (sigma_derivative(t, order, directions=G) for t in (gram, svd))
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
    found, expected = (sigma_series(t, G[None], 4).coefficients for t in (gram, svd))
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
    assert SigmaHessian(gram).quadratic(G[:0]).shape == SigmaHessian(svd).quadratic(G[:0]).shape == (0,)
    found, expected = (kato_temple(t, 1e-3 * G) for t in (gram, svd))
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-13)


def test_a_stack_as_long_as_the_matrix_is_high():
    A = matrix((256, 256), False, 0.1)
    G = 0.1 * np.random.default_rng(0).standard_normal((256, 256, 256))
    np.testing.assert_allclose(
        sigma_derivative(A, 2, directions=G), SigmaHessian(singular_triplet(A)).quadratic(G), rtol=1e-10
    )


def test_complex_directions_of_a_real_matrix(both):
    A, G, gram, _ = both
    Z = G[0] + 1j * G[1]
    for rough in (gram, singular_triplet(A, method="gram", rtol=1e-4)):
        rtol = 1e-9 if rough is gram else 1e-4
        np.testing.assert_allclose(SigmaHessian(rough).quadratic(Z), SigmaHessian(A + 0j).quadratic(Z), rtol=rtol)
    np.testing.assert_allclose(SigmaHessian(gram) @ Z, SigmaHessian(A + 0j) @ Z, atol=1e-9)
    found, expected = (sigma_series(t, Z, 5).coefficients for t in (gram, A + 0j))
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
    near = kato_temple(gram, 1e-3 * Z)
    assert abs(near.value - np.linalg.norm(A + 1e-3 * Z, 2)) <= near.bound
    assert math.isclose(gram.follow(A + 1e-3 * Z), np.linalg.norm(A + 1e-3 * Z, 2), rel_tol=1e-14)


def test_complex_directions_of_a_real_sparse_matrix(both):
    A, G, _, _ = both
    Z = G[0] + 1j * G[1]
    lanczos = singular_triplet(sparse.csr_array(A))
    np.testing.assert_allclose(SigmaHessian(lanczos).quadratic(Z), SigmaHessian(A + 0j).quadratic(Z), rtol=1e-8)


@pytest.mark.parametrize(("gap", "rtol"), [(1e-6, 1e-2), (1e-5, 1e-3), (0.1, 5e-8)])
def test_rtol_spares_the_series(gap, rtol):
    A = matrix((256, 256), False, gap)
    H = 0.1 * gap * step(A.shape, False, 1.0)
    start = np.linalg.svd(A)[2][0] + 20 * gap * step(A.shape, False, 1.0)[0]
    found, expected = (
        sigma_series(t, H, 6).coefficients
        for t in (singular_triplet(A, v0=start, rtol=rtol), singular_triplet(A, method="svd"))
    )
    np.testing.assert_allclose(found, expected, rtol=2e-8, atol=1e-16)


@pytest.mark.parametrize("second", [0.5, 1e-2, 3e-4, 1e-7])
@pytest.mark.parametrize("rtol", [0.0, 1e-3, 0.1])
def test_gap_to_a_small_second_value(second, rtol):
    s = np.append([1.0, second], second * np.linspace(0.5, 1e-3, 254))
    A = with_spectrum(np.random.default_rng(0), 256, 256, s)
    gap = singular_triplet(A, rtol=rtol).gap  # at most a little too small, never too large
    assert 1 - second - max(rtol, 1e-5) <= gap <= 1 - second + 1e-13


@pytest.mark.parametrize("share", [1e-3, 1e-6])
def test_forms_of_directions_nearly_along_the_matrix(share):
    """What is along u and v adds nothing to the form, and must not drown the rest."""
    A = np.abs(np.random.default_rng(0).standard_normal((256, 300)))
    G = A + share * step(A.shape, False, 1.0)
    found, expected = (SigmaHessian(singular_triplet(A, **kind)).quadratic(G) for kind in ({"rtol": 3e-5}, {}))
    assert singular_triplet(A, rtol=3e-5)._resolvent().matrix.dtype == np.float32
    assert math.isclose(found, expected, rel_tol=1e-4)


def test_follow_to_another_scale():
    triplet = singular_triplet(matrix((256, 300), False, 1e-2))
    for scale in (1e-200, 1e200):
        with pytest.raises(ConvergenceError, match="times as large"):
            triplet.follow(scale * matrix((256, 300), False, 1e-2))


@pytest.mark.parametrize("shape", [(260, 4200), (4200, 260)], ids=str)
@pytest.mark.parametrize("k", [0, (0, 1)], ids=["one", "cluster"])
def test_directions_in_single_precision_lose_nothing_more(shape, k):
    """They are multiplied in float64, in blocks: what differs is the rounding of the results to float32."""
    A = matrix(shape, False, 0.1).astype(np.float32)
    H = step(shape, False, 0.1).astype(np.float32)
    family = [H, H[::-1].copy()]
    found = sigma_series(A, family, 4, k=k)
    exact = sigma_series(A.astype(np.float64), [x.astype(np.float64) for x in family], 4, k=k)
    name = "coefficients" if k == 0 else "effective_matrices"
    found, exact = getattr(found, name), getattr(exact, name)
    assert found.dtype == np.float32
    if k == 0:
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-9)
    else:  # up to the sign of the vectors
        np.testing.assert_allclose(np.trace(found, axis1=1, axis2=2), np.trace(exact, axis1=1, axis2=2), rtol=1e-5)


def same_results(found, expected, rtol):
    assert math.isclose(found.sigma, expected.sigma, rel_tol=1e-14)
    assert (1 - (1e-3 if rtol else 1e-4)) * expected.gap <= found.gap <= (1 + 1e-9) * expected.gap
    assert abs(np.vdot(found.u, expected.u)) > 1 - 1e-12
    assert abs(np.vdot(found.v, expected.v)) > 1 - 1e-12


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shape", [(9, 12), (90, 70), (300, 320), (320, 300)], ids=str)
@pytest.mark.parametrize("rtol", [0.0, 3e-5])
def test_a_single_precision_matrix_meant_exactly(shape, complex_, rtol):
    """With dtype float64 everything is as for the same numbers in float64."""
    A = matrix(shape, complex_, 0.1).astype(np.complex64 if complex_ else np.float32)
    H = step(shape, complex_, 0.01).astype(A.dtype)
    wide = np.complex128 if complex_ else np.float64
    found, expected = singular_triplet(A, rtol=rtol, dtype=np.float64), singular_triplet(A.astype(wide), method="svd")
    assert found.u.dtype == wide
    assert found.sigma.dtype == np.float64
    same_results(found, expected, rtol)
    series = [sigma_series(t, x, 4).coefficients for t, x in ((found, H), (expected, H.astype(wide)))]
    np.testing.assert_allclose(*series, rtol=1e-10, atol=1e-15)
    assert math.isclose(found.follow(A + H), np.linalg.norm((A + H).astype(wide), 2), rel_tol=1e-14)
    assert singular_triplet(A).sigma.dtype == np.float32


def test_dtype_of_other_libraries_and_stacks():
    A = matrix((70, 80), False, 0.1).astype(np.float32)
    exact = np.linalg.norm(A.astype(np.float64), 2)
    triplet = singular_triplet(torch.from_numpy(A), dtype=torch.float64)
    assert triplet.sigma.dtype == triplet.v.dtype == torch.float64
    assert math.isclose(float(triplet.sigma), exact, rel_tol=1e-14)
    stack = singular_triplet(np.stack([A, 2 * A]), dtype="float64")
    np.testing.assert_allclose(stack.sigma, [exact, 2 * exact], rtol=1e-14)
    assert singular_triplet(A, dtype=np.float32).sigma.dtype == np.float32


def test_dtype_is_checked():
    A = np.eye(3)[:2] * [[1], [2]]
    for bad in (np.float32, np.int64, "single"):
        with pytest.raises(ValueError, match="dtype to be float64 or that of A, float64, got"):
            singular_triplet(A, dtype=bad)
    with pytest.raises(ValueError, match="no dtype beside an operator"):
        singular_triplet(sparse.csr_array(A), dtype=np.float64)


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shape", [(60, 70), (256, 300), (300, 256)], ids=str)
@pytest.mark.parametrize("eps", [1e-3, 0.3, 2.0, 50.0])
@pytest.mark.parametrize("rtol", [0.0, 3e-5])
def test_a_triplet_nearby_as_start(shape, complex_, eps, rtol):
    """Whatever the start, the result is that of the matrix alone."""
    A = matrix(shape, complex_, 0.05)
    B = 1e3 * (A + step(shape, complex_, eps * 0.025))
    expected = singular_triplet(B, method="svd")
    for method in ("auto", "svd"):
        near = singular_triplet(A, method=method, rtol=0.0 if method == "svd" else rtol)
        same_results(singular_triplet(B, v0=near, rtol=rtol), expected, rtol)


def test_starts_of_another_matrix():
    A = matrix((256, 300), False, 0.05)
    for other in (singular_triplet(A.T.copy()), singular_triplet(A, k=1), singular_triplet(np.stack([A, A]))):
        with pytest.raises(ValueError, match=r"expected v0 to be the triplet k = 0 of a matrix \(256, 300\)"):
            singular_triplet(A, v0=other)
    turned = 1j * A  # a real start serves a complex matrix
    same_results(singular_triplet(turned, v0=singular_triplet(A)), singular_triplet(turned, method="svd"), 0.0)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("shape", [(20, 30), (70, 66), (300, 260)], ids=str)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_enclosures_hold_in_single_precision(shape, dtype, order):
    """Value and bound are rounded to the precision of the results."""
    rng = np.random.default_rng(order)
    for size in (0.0, 1e-6, 1e-3, 1e-1):
        A, H = (rng.standard_normal((2, *shape)) + 1j * rng.standard_normal((2, *shape))).astype(np.complex64)
        A, H = (A, size * H) if dtype == np.complex64 else (A.real.copy(), size * H.real)
        enclosure = kato_temple(A, H, order=order)
        truth = np.linalg.norm(A.astype(np.complex128) + H, 2)
        assert enclosure.value.dtype == np.float32
        assert abs(truth - float(enclosure.value)) <= float(enclosure.bound)


@pytest.mark.parametrize("sizes", [(1e-20, 1e20), (1e-30, 1e30), (1e-42, 1e-3)])
def test_an_enclosure_for_a_step_beyond_comparison(sizes):
    a, b = (np.float32(x) for x in sizes)
    enclosure = kato_temple(np.diag([a, a / 3]), b * np.eye(2, dtype=np.float32))
    assert enclosure.eps == np.inf
    assert abs(float(a) + float(b) - float(enclosure.value)) <= float(enclosure.bound) < 1.01 * float(b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(40, 50), (255, 300), (300, 320)], ids=str)
def test_a_tie_of_three_is_named_whole(shape, dtype):
    tight = np.finfo(dtype).eps / 4
    s = np.append([1.0, 1.0 - tight, 1.0 - 2 * tight], np.linspace(0.9, 0.1, min(shape) - 3))
    A, H = with_spectrum(np.random.default_rng(0), *shape, s).astype(dtype), step(shape, False, 1.0).astype(dtype)
    with pytest.raises(DegenerateSingularValueError) as caught:
        singular_triplet(A)
    assert caught.value.cluster == (0, 1, 2)
    found = sigma_derivative(A, 2, directions=H, on_degenerate="cluster")
    assert math.isclose(found, 2 * sigma_series(A, H, 2, k=(0, 1, 2)).mean[2], rel_tol=1e-4)


def test_a_cluster_far_below_the_largest_value():
    """Squared it would lose its digits: it is left to the SVD."""
    rng = np.random.default_rng(5)
    U, V = (np.linalg.qr(rng.standard_normal((n, 64)))[0] for n in (64, 71))
    s = np.append([1.0, 2e-6], np.linspace(1.2e-6, 1e-7, 62))
    A, H = (U * s) @ V.T, rng.standard_normal((64, 71))
    truth = sum(U[:, i] @ H @ V[:, i] for i in (0, 1)) / 2
    assert math.isclose(sigma_series(A, H, 1, k=(0, 1)).mean[1], truth, rel_tol=1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rtol", [0.0, 1e-3])
def test_gap_of_a_matrix_of_rank_one(seed, rtol):
    """Nothing is left to be found beside the one vector."""
    A = with_spectrum(np.random.default_rng(seed), 300, 303, np.append([1.0], np.zeros(299)))
    assert math.isclose(singular_triplet(A, rtol=rtol).gap, 1.0, rel_tol=max(rtol, 1e-6))


def test_certificates_of_one_matrix_are_scalars_in_every_library():
    A = torch.from_numpy(matrix((70, 80), False, 0.1))
    series = sigma_series(A, A, 2)
    found = (series.gap, series.radius, series.remainder(0.1), kato_temple(A, 1e-3 * A).bound)
    assert [tuple(x.shape) for x in found] == [()] * 4


def test_starts_and_directions_of_any_size():
    A = matrix((256, 300), False, 1e-2)
    warm = singular_triplet(A, v0=np.full(300, 1e300))
    assert math.isclose(warm.sigma, np.linalg.norm(A, 2), rel_tol=1e-14)
    with pytest.raises(ValueError, match="no rtol or dtype beside a triplet"):
        singular_triplet(warm, rtol=1e-3)


def test_follow_gives_numbers_of_the_better_precision():
    A = matrix((256, 300), False, 1e-2)
    for shape in ((10, 12), (256, 300)):
        part = A[: shape[0], : shape[1]]
        for triplet in (singular_triplet(part), singular_triplet(part.astype(np.float32))):
            assert type(triplet.follow(part)) is np.float64
        assert type(singular_triplet(part.astype(np.float32)).follow(part.astype(np.float32))) is np.float32


def close_seconds(gap, width, seed):
    """A matrix whose second value has hundreds of others within a small part of the gap; and its right vectors."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((256, 256)))[0] for _ in range(2))
    s = 1 - width * gap * np.sort(rng.random(256))
    s[0], s[1] = 1 + gap, 1.0
    return (U * s) @ V.T, V


@pytest.mark.parametrize("rtol", [0.0, 1e-3, 1e-2])
@pytest.mark.parametrize("gap", [2e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("width", [5e-3, 1e-2])
def test_the_gap_is_a_lower_bound_whatever_the_start(gap, width, rtol):
    for seed in range(3):
        A, V = close_seconds(gap, width, seed)
        starts = [V[:, 0] + share * V[:, 1:20].sum(1) / math.sqrt(19) for share in (0.01, 0.1, 0.3)]
        for v0 in (None, *starts):
            found = singular_triplet(A, v0=v0, rtol=rtol)
            assert found.gap <= gap * (1 + 1e-9) + 1e-13
            assert found.gap >= gap * (1 - 1e-5 - (2e-4 + 5 * rtol if rtol else 0.0)) - 1e-13


def test_a_norm_is_rounded_up_to_the_precision_of_results():
    for seed in range(60):
        A = np.random.default_rng(seed).standard_normal((70, 90)).astype(np.float32)
        truth = np.linalg.norm(A.astype(float), 2)
        for rtol in (1e-3, 1e-6, 1e-8):
            assert truth <= float(spectral_norm(A, rtol=rtol)) <= truth * (1 + rtol + 1e-6)


def test_a_cluster_of_noise_is_not_taken_for_a_tie():
    """Roots of the Gram matrix's eigenvalues are off by 1e-8 of the largest; the SVD has to tell values below apart."""
    s = np.full(66, 1e-9)
    s[:5] = [1.0, 9e-9, 8e-9, 7e-9, 6.5e-9]
    A = with_spectrum(np.random.default_rng(0), 66, 88, s)
    found = singular_triplet(A, range(5))
    cluster = sigma_series(A, A, 1, k=tuple(range(5)))
    np.testing.assert_allclose(found.sigma, s[:5], atol=1e-15)
    np.testing.assert_allclose(cluster.values(1.0), 2 * s[:5], atol=1e-15)
