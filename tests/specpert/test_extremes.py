"""Numbers far apart in one problem, values far below the largest, and requests that take another way from a size on."""

import mpmath
import numpy as np
import pytest
from scipy import sparse

from specpert import (
    ConvergenceError,
    SigmaHessian,
    kato_temple,
    leading_cluster,
    one_sided_derivatives,
    sigma_derivative,
    sigma_gradient,
    sigma_hessian,
    sigma_series,
    singular_triplet,
)
from specpert.testing import check_certificate, check_derivative, check_series


@pytest.mark.parametrize("side", [3, 63, 64, 300])
def test_a_list_of_one_value_keeps_its_axis(side):
    """Whatever decomposition the size asks for."""
    A, H = np.random.default_rng(0).standard_normal((2, side, side + 3))
    triplet = singular_triplet(A, [0])
    assert (triplet.k, triplet.sigma.shape, triplet.u.shape, triplet.gap.shape) == ((0,), (1,), (side, 1), (1,))
    assert sigma_gradient(A, k=[0]).shape == (1, side, side + 3)
    assert sigma_series(A, H, 3, k=[0]).coefficients.shape == (1, 4)
    assert sigma_series(A, H, 3, k=[0], vectors=True).left.shape == (side, 1, 4)
    assert sigma_derivative(A, 3, k=[0], directions=[H, H, H]).shape == (1,)
    assert kato_temple(A, H, k=[0]).value.shape == (1,)
    np.testing.assert_allclose(
        sigma_series(A, H, 3, k=[0]).coefficients[0], sigma_series(A, H, 3).coefficients, rtol=1e-9
    )


def test_one_value_of_a_list_does_not_spoil_another():
    """The gaps of two values are 1e-12 and 0.9: powers of the first leave the range, those of the second do not."""
    A = np.diag([1.0, 1.0 - 1e-12, 0.1])
    H = 1e-6 * np.random.default_rng(0).standard_normal((3, 3))
    both = sigma_series(A, H, 30, k=[0, 2], vectors=True)
    alone = sigma_series(A, H, 30, k=2, vectors=True)
    np.testing.assert_allclose(both.coefficients[1], alone.coefficients, rtol=1e-12)
    for found, expected in ((both.left[:, 1], alone.left), (both.right[:, 1], alone.right)):
        size = np.abs(expected).max(axis=0)
        assert np.all(np.abs(found - expected).max(axis=0) <= 1e-12 * size)


def test_large_numbers_that_play_no_part():
    """The large entry is in a block of its own: high orders are those of the small one."""
    A, H = np.diag([3.0, 2.0, 1.0]), np.zeros((3, 3))
    H[0, 1], H[2, 2] = 1.0, 1e20
    small = sigma_series(A[:2, :2], H[:2, :2], 20)
    large = sigma_series(A, H, 20)
    np.testing.assert_allclose(large.coefficients, small.coefficients, rtol=1e-12, atol=0.0)
    vectors = sigma_series(A, H, 20, vectors=True)
    np.testing.assert_allclose(vectors.coefficients, small.coefficients, rtol=1e-12, atol=0.0)
    expected = sigma_series(A[:2, :2], H[:2, :2], 20, vectors=True)
    np.testing.assert_allclose(vectors.left[:2], expected.left, rtol=1e-12, atol=1e-300)
    stack = sigma_series(np.stack([A, np.diag([5.0, 2.0, 1.0])]), np.stack([H, np.eye(3)]), 20)
    np.testing.assert_allclose(stack.coefficients[0], small.coefficients, rtol=1e-12, atol=0.0)
    np.testing.assert_allclose(stack.coefficients[1], [5.0, 1.0, *[0.0] * 19], atol=1e-12)
    assert sigma_derivative(A, 16, directions=H) == pytest.approx(sigma_derivative(A[:2, :2], 16, directions=H[:2, :2]))


def test_mixed_derivatives_near_the_end_of_single_precision():
    """Powers of the inverse gap overflow on the way, the result does not."""
    A = np.float32(1e10) * np.diag(np.float32([1, 1 - 3e-5, 0.5]))
    H = (1e7 * np.random.default_rng(0).standard_normal((3, 3))).astype(np.float32)
    expected = sigma_derivative(A.astype(float), 9, directions=[H.astype(float)] * 9)
    found = sigma_derivative(A, 9, directions=[H] * 9)
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, rel=1e-4)


def second_difference(A: np.ndarray, G: np.ndarray, digits: int = 150) -> float:
    """D^2 of the smallest singular value of a wide matrix, at that many digits."""
    with mpmath.workdps(digits):
        A, G = mpmath.matrix(A.tolist()), mpmath.matrix(G.tolist())

        def least(x):
            B = A + x * G
            return mpmath.sqrt(min(mpmath.eigsy(B * B.T, eigvals_only=True)))

        h = mpmath.mpf(10) ** -26
        return float((least(h) - 2 * least(mpmath.mpf(0)) + least(-h)) / h**2)


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("ratio", [1e-3, 1e-6, 1e-8])
def test_second_derivatives_of_a_small_value(ratio, tall):
    """What is left of a direction outside the singular vectors is divided by it: no rounding may be in that."""
    rng = np.random.default_rng(1)
    U, V = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (3, 7))
    A = U @ np.diag([1.0, 0.6, ratio]) @ V[:, :3].T
    G = np.outer(rng.standard_normal(3), V[:, 0] + 0.3 * V[:, 1])
    expected = second_difference(A, G)
    if tall:
        A, G = A.T.copy(), G.T.copy()
    allowed = 100 * 2.0**-52 / ratio  # the value itself is no better known
    assert SigmaHessian(A, k=2).quadratic(G) == pytest.approx(expected, rel=allowed)
    assert sigma_derivative(A, 2, k=2, directions=G) == pytest.approx(expected, rel=allowed)
    assert sigma_derivative(A, 2, k=2, directions=[G, G]) == pytest.approx(expected, rel=allowed)
    large = sigma_series(np.stack([A, A]), G, 2, k=2).coefficients[:, 2]  # a stack takes other kernels
    np.testing.assert_allclose(2 * large, [expected] * 2, rtol=allowed)
    if ratio > 1e-4:
        dense = sigma_hessian(A, k=2)
        assert np.tensordot(np.tensordot(dense, G, 2), G, 2) == pytest.approx(expected, rel=1e-9)


def test_many_values_close_below_one_of_a_sparse_matrix():
    """Near many copies of a value Lanczos may lose what it had: the best vector counts."""
    s = np.sort(np.random.default_rng(17).uniform(0, 1, 80))[::-1]
    s[4:11] = s[3] * (1 - 3e-9)
    s = np.sort(s)[::-1]
    triplet = singular_triplet(sparse.diags_array(s).tocsr(), 3)
    gap = min(s[2] - s[3], s[3] - s[4])
    assert 0.99 * gap <= triplet.gap <= gap * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_sparse_gaps_are_lower_bounds_and_no_false_ties(seed):
    rng = np.random.default_rng(seed)
    s = np.sort(rng.uniform(0, 1, 60))[::-1].copy()
    j, count, relative = int(rng.integers(0, 4)), int(rng.integers(1, 8)), 10.0 ** rng.uniform(-8.5, -3)
    s[j + 1 : j + 1 + count] = s[j] * (1 - relative)
    s = np.sort(s)[::-1]
    gap = min(s[j] - s[j + 1], s[j - 1] - s[j] if j else np.inf)
    try:
        triplet = singular_triplet(sparse.diags_array(s).tocsr(), j)
    except ConvergenceError:  # an honest answer, where the gap is near the limit
        assert relative < 1e-5
        return
    assert triplet.gap <= gap * (1 + 1e-6) + 1e-14
    assert triplet.gap >= (0.98 if relative > 1e-5 else 0.1) * gap


@pytest.mark.parametrize("scale", [1e80, 1e160, 1e300, 1e-200])
def test_checks_at_any_scale(scale):
    """Units of high orders leave the range of floats; what is compared does not."""
    A, H = np.diag([3.0, 1.0]), np.array([[1.0, 2.0], [0.5, 1.0]])
    for order in (2, 4):
        assert check_series(scale * A, scale * H, order).worst < 1
        if scale > 1:  # the last coefficients are the least numbers there are, or zero
            assert check_series(scale * A, H, order).worst <= 1

    def wrong(A, H):
        return sigma_derivative(A, 2, directions=H) * (1 + 1e-9)

    with pytest.raises(AssertionError, match="expected D"):
        check_derivative(wrong, scale * A, scale * H, order=2)
    computed = sigma_series(scale * A, scale * H, 2).coefficients * np.array([1.0, 1.0, 1 + 1e-9])
    with pytest.raises(AssertionError, match="expected lam_2"):
        check_series(scale * A, scale * H, 2, computed=computed)


@pytest.mark.parametrize(("size", "order"), [(1e-80, 4), (1e-60, 6), (1e-30, 12)])
def test_certificates_of_small_directions(size, order):
    assert check_certificate(np.diag([3.0, 1.0]), size * np.ones((2, 2)), order).worst < 1


@pytest.mark.parametrize(("scale", "order"), [(1e100, 2), (1e155, 3), (1e-110, 3), (1.0, 3)])
def test_mixed_derivatives_of_a_function_at_any_scale(scale, order):
    A, H = scale * np.diag([3.0, 1.0]), scale * np.ones((2, 2))
    norm = lambda A: np.linalg.svd(A, compute_uv=False)[0]  # noqa: E731
    assert check_derivative(norm, A, [H] * order, order=order, computes="sigma").worst < 1
    with pytest.raises(AssertionError, match="samples"):
        check_derivative(lambda A: norm(A) * (1 + 1e-3 * A[0, 1] / scale), A, [H] * 2, order=2, computes="sigma")


def test_a_cluster_of_a_small_matrix_by_the_letter_of_the_standard():
    strict = pytest.importorskip("array_api_strict")
    A = np.diag([2.1, 2.0, 1.8])
    expected = leading_cluster(A, 1.9, 1.5).k
    for given in (strict.asarray(A), singular_triplet(strict.asarray(A))):
        assert leading_cluster(given, 1.9, 1.5).k == expected


def test_requests_in_other_words():
    A, H = np.random.default_rng(0).standard_normal((2, 5, 6))
    triplet = singular_triplet(A, [0, 1])
    expected = sigma_series(A, H, 2, k=[0, 1]).coefficients
    np.testing.assert_array_equal(sigma_series(triplet, H, 2, k=np.array([0, 1])).coefficients, expected)
    with pytest.raises(TypeError, match="expected dense directions for k"):
        sigma_series(A, sparse.csr_array(H), 2, k=(0, 1))
    assert float(sigma_series(A, sparse.csr_array(H), 2)(0.1)) == pytest.approx(float(sigma_series(A, H, 2)(0.1)))


def test_sums_beyond_the_range_of_a_term():
    """The coefficient is zero; the power it belongs to is beyond the range."""
    assert sigma_series([[3.0, 0.0]], [[0.0, 1e100]], 1)(1e300) == 3.0


@pytest.mark.parametrize(
    ("A", "H", "k", "x"),
    [
        (np.zeros((2, 2)), 1e300 * np.diag([3.0, -4.0]), 0, 1e10),
        (1e-200 * np.diag([3.0, 0.0]), 1e200 * np.ones((2, 2)), 1, 1.0),
        (1e-200 * np.diag([3.0, 3.0]), 1e200 * np.ones((2, 2)), 1, 1.0),
    ],
)
def test_one_sided_values_beyond_the_range(A, H, k, x):
    sides = one_sided_derivatives(A, H, k=k)
    with pytest.raises(OverflowError, match="expected the values at x"):
        sides.values(x)
    assert np.all(np.isfinite(sides.values(0.0)))
