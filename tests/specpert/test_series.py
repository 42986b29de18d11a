"""sigma_series against values at 90 digits, against literal twins, and by laws."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    by_name,
    kato_trace,
    published_closed_form,
    recursion_dense,
    reference_cases,
    taylor_mpmath,
    with_spectrum,
)

from specpert import SigmaSeries, Status, one_sided_derivatives, sigma_derivative, sigma_series, singular_triplet

TOLERANCE = {"badly_scaled_k1": 1e-10}


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("vectors", [False, True], ids=["2n+1", "recursion"])
@pytest.mark.parametrize("case", **by_name(reference_cases("series")))
def test_direction_against_90_digits(case, vectors):
    series = sigma_series(case["A"], case["H"][0], case["order"], k=case["k"], vectors=vectors)
    assert relative(series.coefficients, np.array(case["value"])) <= TOLERANCE.get(case["name"], 1e-12)


@pytest.mark.parametrize("vectors", [False, True], ids=["2n+1", "recursion"])
@pytest.mark.parametrize("case", **by_name(reference_cases("family")))
def test_family_against_90_digits(case, vectors):
    series = sigma_series(case["A"], case["H"], case["order"], k=case["k"], vectors=vectors)
    assert relative(series.coefficients, np.array(case["value"])) <= 1e-12


@pytest.mark.parametrize("case", **by_name(reference_cases("cluster")))
def test_cluster_mean_against_90_digits(case):
    series = sigma_series(case["A"], case["H"][0], case["order"], k=tuple(case["k"]))
    assert relative(series.mean, np.array(case["value"])) <= 1e-12
    assert series.status is Status.CLUSTER


SHAPES = [(5, 5), (3, 7), (8, 3), (1, 4), (4, 1), (1, 1)]


def random_case(shape, complex_, seed=0):
    rng = np.random.default_rng([seed, *shape])
    A, H = rng.standard_normal((2, *shape)) + (1j * rng.standard_normal((2, *shape)) if complex_ else 0)
    return A, H


SMALL = (1e-3, 1e-5, 1e-7, 1e-11)


def with_small_value(small, n=3):
    rng = np.random.default_rng(0)
    A = with_spectrum(rng, n, n, [*np.linspace(1.0, 0.6, n - 1), small])
    H = rng.standard_normal((n, n))
    return A, H / np.linalg.norm(H, 2)


def each(found, expected, first=1):
    """The largest of the errors relative to each coefficient; sigma itself has that of a decomposition."""
    return np.max(np.abs(found[first:] - expected[first:]) / np.abs(expected[first:]))


@pytest.mark.parametrize("small", SMALL)
def test_small_value_of_a_real_square_matrix(small):
    """Up to its sign it is analytic through zero: no order has a reason to lose digits, and none does.

    The resolvent divides what is along (u, -v) by sigma; that ||P(x)|| = ||Q(x)|| says it without.
    """
    A, H = with_small_value(small)
    exact = taylor_mpmath(A, H, 2, 8, dps=400)
    found = {
        "kernel": sigma_series(A, H, 8, k=2).coefficients,
        "recursion": sigma_series(A, [H], 8, k=2, vectors=True).coefficients,
        "several": sigma_series(A, H, 8, k=[0, 2]).coefficients[1],
        "cluster of one": sigma_series(A, H, 8, k=(2,)).mean,
        "family": sigma_series(A, [H, np.zeros_like(H)], 8, k=2).coefficients,
        "stack": sigma_series(np.stack([A, A]), np.stack([H, H]), 8, k=2).coefficients[1],
    }
    for coefficients in found.values():
        assert each(coefficients, exact) < 1e-12
    for on_degenerate in ("raise", "cluster"):
        for n in range(1, 7):
            mixed = sigma_derivative(A, n, directions=[H] * n, k=2, on_degenerate=on_degenerate)
            assert math.isclose(mixed, math.factorial(n) * exact[n], rel_tol=1e-12)
    for n in range(1, 6):
        tensor = sigma_derivative(A, n, k=2)
        for _ in range(n):
            tensor = np.tensordot(H, tensor, axes=([0, 1], [0, 1]))
        assert math.isclose(tensor, math.factorial(n) * exact[n], rel_tol=1e-11)


@pytest.mark.parametrize("small", SMALL)
def test_small_value_in_two_dimensions(small):
    """sigma_1 = (sqrt(F + 2 D) - sqrt(F - 2 D)) / 2 with F the squared Frobenius norm and D the determinant."""
    A, H = np.array([[3.0, 1.0], [2.0, 2.0 / 3.0 + small]]), np.array([[0.3, 0.5], [-0.7, 0.2]])
    with mpmath.workdps(400):

        def value(x):
            a, b, c, d = (mpmath.mpf(float(p)) + x * mpmath.mpf(float(q)) for p, q in zip(A.flat, H.flat, strict=True))
            F, D = a * a + b * b + c * c + d * d, a * d - b * c
            return (mpmath.sqrt(F + 2 * D) - mpmath.sqrt(F - 2 * D)) / 2

        exact = np.array([float(c) for c in mpmath.taylor(value, 0, 12)])
    exact *= np.sign(exact[0])
    assert each(sigma_series(A, H, 12, k=1).coefficients, exact) < 1e-11


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("k", [0, 3, (0, 1), (2, 3)], ids=str)
def test_both_vector_series_have_the_same_gram_matrix(k, complex_):
    rng = np.random.default_rng(5)
    A, H, B = (rng.standard_normal((4, 4)) + complex_ * 1j * rng.standard_normal((4, 4)) for _ in range(3))
    series = sigma_series(A, [H, B], 6, k=k, vectors=True)
    P, Q = (np.moveaxis(x, -1, 0).reshape(7, 4, -1) for x in (series.left, series.right))
    for n in range(1, 7):
        left, right = (sum(X[i].conj().T @ X[n - i] for i in range(n + 1)) for X in (P, Q))
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-13 * np.abs(np.stack([P, Q])).max() ** 2)


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_k_against_mpmath(shape, complex_):
    A, H = random_case(shape, complex_)
    for k in range(min(shape)):
        expected = taylor_mpmath(A, H, k, 7)
        assert relative(sigma_series(A, H, 7, k=k).coefficients, expected) <= 1e-12


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)], ids=str)
def test_dense_recursion_is_the_same(shape, complex_):
    A, H = random_case(shape, complex_)
    for k in range(min(shape)):
        assert relative(sigma_series(A, H, 6, k=k).coefficients, recursion_dense(A, H, k, 6)) <= 1e-12


@pytest.mark.parametrize("shape", [(3, 4), (4, 3)], ids=str)
def test_kato_trace_formula(shape):
    A, H = random_case(shape, False)
    series = sigma_series(A, H, 5, k=1)
    s = np.linalg.svd(A, compute_uv=False)
    kato = [kato_trace(A, H, s[1], n) for n in range(1, 6)]
    assert relative(series.coefficients[1:], np.array(kato)) <= 1e-11


def test_kato_trace_formula_of_a_cluster():
    rng = np.random.default_rng(3)
    A, H = with_spectrum(rng, 4, 5, [2.0, 2.0, 1.0, 0.5]), rng.standard_normal((4, 5))
    mean = sigma_series(A, H, 4, k=(0, 1)).mean
    assert relative(mean[1:], np.array([kato_trace(A, H, 2.0, n, c=2) for n in range(1, 5)])) <= 1e-11


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)], ids=str)
def test_published_closed_form_is_wrong_from_order_3(shape):
    A, H = random_case(shape, False, seed=1)
    truth = taylor_mpmath(A, H, 0, 5)
    published = np.array([published_closed_form(A, H, 0, n) for n in range(1, 6)])
    np.testing.assert_allclose(published[:2], truth[1:3], rtol=1e-11)
    assert (abs(published[2:] / truth[3:] - 1) > 1e-3).all()
    np.testing.assert_allclose(sigma_series(A, H, 5).coefficients, truth, rtol=1e-11)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)], ids=str)
def test_published_resolvent_is_wrong_from_order_4(shape):
    A, H = random_case(shape, False, seed=2)
    truth = taylor_mpmath(A, H, 0, 5)
    published = recursion_dense(A, H, 0, 5, published_resolvent=True)
    np.testing.assert_allclose(published[:4], truth[:4], rtol=1e-11)
    assert (abs(published[4:] / truth[4:] - 1) > 1e-4).all()


def test_published_resolvent_is_wrong_from_order_2_for_complex_matrices():
    A, H = random_case((4, 5), True, seed=3)
    truth = taylor_mpmath(A, H, 0, 2)
    published = recursion_dense(A, H, 0, 2, published_resolvent=True)
    np.testing.assert_allclose(published[:2], truth[:2], rtol=1e-11)
    assert abs(published[2] / truth[2] - 1) > 1e-3


def test_general_family_is_not_the_linear_one():
    """n! lam_n = D^n[A_1, ..., A_1] for the linear family only: 2 lam_2 = D^2[A_1, A_1] + 2 D[A_2]."""
    A, H = random_case((4, 5), False)
    A2 = random_case((4, 5), False, seed=9)[0]
    lam = sigma_series(A, [H, A2], 2).coefficients
    expected = sigma_derivative(A, 2, directions=H) + 2 * sigma_derivative(A, 1, directions=A2)
    assert math.isclose(2 * lam[2], expected, rel_tol=1e-12)


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
def test_vector_series_solve_the_perturbed_problem(complex_):
    A, H = random_case((5, 4), complex_)
    series = sigma_series(A, H, 12, k=1, vectors=True)
    x = 0.3 * series.radius
    powers = x ** np.arange(13)
    P, Q, sigma = series.left @ powers, series.right @ powers, series(x)
    bound = 20 * series.remainder(x) + 1e-12
    assert np.abs((A + x * H) @ Q - sigma * P).max() < bound
    assert np.abs((A + x * H).conj().T @ P - sigma * Q).max() < bound
    assert abs(np.linalg.norm(P) - np.linalg.norm(Q)) < bound
    # the normalisation w_0^* w(x) = 1
    assert abs((series.left[:, 0].conj() @ P + series.right[:, 0].conj() @ Q) / 2 - 1) < 1e-13


def test_cluster_goes_through_a_small_gap():
    """theory 1.8: the block series does not see the gap 1e-3; the series of the single value diverges."""
    rng = np.random.default_rng(5)
    A, H = with_spectrum(rng, 6, 7, [3.0, 2.001, 2.0, 1.0, 0.3]), rng.standard_normal((6, 7))
    H /= np.linalg.norm(H, 2)
    x = 0.03
    truth = np.linalg.svd(A + x * H, compute_uv=False)
    cluster = sigma_series(A, H, 12, k=(1, 2))
    np.testing.assert_allclose(cluster.values(x), truth[1:3], atol=1e-13)
    assert abs(cluster.mean @ x ** np.arange(13) - truth[1:3].mean()) <= cluster.remainder(x)
    single = sigma_series(A, H, 12, k=1)
    assert single.status is Status.CLOSE_PAIR
    assert abs(single(x) - truth[1]) > 1e3
    assert single.remainder(x) == np.inf


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
def test_cluster_through_an_exact_tie(complex_):
    rng = np.random.default_rng(6)
    A = with_spectrum(rng, 5, 4, [2.0, 1.5, 1.5, 1.5], complex_)
    H = random_case((5, 4), complex_)[1]
    cluster = sigma_series(A, H, 10, k=(1, 2, 3))
    x = 0.2 * cluster.radius
    np.testing.assert_allclose(cluster.values(x), np.linalg.svd(A + x * H, compute_uv=False)[1:], atol=1e-10)


def test_cluster_of_one_is_the_series():
    A, H = random_case((4, 6), False)
    np.testing.assert_allclose(sigma_series(A, H, 6, k=(2,)).mean, sigma_series(A, H, 6, k=2).coefficients, rtol=1e-10)


def test_tie_elsewhere_changes_nothing():
    rng = np.random.default_rng(7)
    A, H = with_spectrum(rng, 5, 6, [3.0, 2.0, 2.0, 1.0, 1.0]), rng.standard_normal((5, 6))
    assert relative(sigma_series(A, H, 6).coefficients, taylor_mpmath(A, H, 0, 6)) <= 1e-12


def test_stack_and_several_k_share_one_call():
    rng = np.random.default_rng(8)
    A, H = rng.standard_normal((2, 2, 3, 4, 6))
    series = sigma_series(A, H, 5, k=[2, 0])
    assert series.coefficients.shape == (2, 3, 2, 6)
    for i in np.ndindex(2, 3):
        for j, k in enumerate([2, 0]):
            one = sigma_series(A[i], H[i], 5, k=k)
            np.testing.assert_allclose(series.coefficients[*i, j], one.coefficients, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(series.gap[*i, j], one.gap)
            np.testing.assert_allclose(series.radius[*i, j], one.radius)
            np.testing.assert_allclose(series.remainder(1e-3)[*i, j], one.remainder(1e-3), rtol=1e-6)


def test_one_matrix_many_directions():
    rng = np.random.default_rng(9)
    A, H = rng.standard_normal((4, 5)), rng.standard_normal((7, 4, 5))
    many = sigma_series(A, H, 4)
    np.testing.assert_allclose(many.coefficients, [sigma_series(A, h, 4).coefficients for h in H], atol=1e-12)
    np.testing.assert_allclose(many.radius, [sigma_series(A, h, 4).radius for h in H])


def test_triplet_is_prepared_once():
    A, H = random_case((5, 7), False)
    triplet = singular_triplet(A, k=2)
    np.testing.assert_array_equal(sigma_series(triplet, H, 6).coefficients, sigma_series(A, H, 6, k=2).coefficients)
    np.testing.assert_allclose(A @ triplet.v, triplet.sigma * triplet.u, atol=1e-14)
    assert math.isclose(triplet.sigma, np.linalg.svd(A, compute_uv=False)[2], rel_tol=1e-14)


def test_lists_of_numbers_and_integers_are_matrices():
    series = sigma_series([[3, 0], [0, 1]], [[0, 1], [1, 0]], 2)
    # sigma of [[3, x], [x, 1]] is 2 + sqrt(1 + x^2)
    np.testing.assert_allclose(series.coefficients, [3.0, 0.0, 0.5], atol=1e-15)
    assert series.coefficients.dtype == np.float64


def test_order_zero_is_the_value():
    A, H = random_case((3, 4), False)
    np.testing.assert_allclose(sigma_series(A, H, 0).coefficients, np.linalg.svd(A, compute_uv=False)[:1])


def test_derivatives_and_calls():
    A, H = random_case((4, 4), False)
    series = sigma_series(A, H, 5)
    assert isinstance(series, SigmaSeries)
    factorials = [math.factorial(n) for n in range(6)]
    np.testing.assert_allclose(series.derivatives, series.coefficients * factorials)
    x = np.array([0.0, 0.01, 0.02])
    np.testing.assert_allclose(series(x), np.polynomial.polynomial.polyval(x, series.coefficients), rtol=1e-14)
    assert series.remainder(x).shape == (3,)
    assert repr(series).startswith("SigmaSeries(coefficients=[")


# --- laws --------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 6)


def law_case(seed, m, n, complex_=False):
    """A with well separated values, so that tolerances mean something, and a direction of norm one."""
    rng = np.random.default_rng(seed)
    values = np.cumsum(rng.uniform(0.3, 1.5, min(m, n)))[::-1]
    A = with_spectrum(rng, m, n, list(values), complex_)
    H = rng.standard_normal((m, n)) + (1j * rng.standard_normal((m, n)) if complex_ else 0)
    return rng, A, H / np.linalg.norm(H, 2)


def assert_same_series(found, expected, d):
    """Equal up to rounding, coefficient n in units of d (2 / d)^n."""
    weights = (d / 2) ** np.arange(len(expected)) / d
    assert np.abs((found - expected) * weights).max() <= 1e-12 * max(1, abs(expected[0]) / d)


@given(seeds, sides, sides, st.booleans(), st.sampled_from([1e-250, 1e-30, 0.5, 3.0, 1e30, 1e250]))
@settings(max_examples=100, deadline=None)
def test_homogeneity(seed, m, n, complex_, scale):
    _, A, H = law_case(seed, m, n, complex_)
    series, scaled = sigma_series(A, H, 5), sigma_series(scale * A, scale * H, 5)
    assert_same_series(scaled.coefficients / scale, series.coefficients, series.gap)
    assert math.isclose(scaled.radius, series.radius, rel_tol=1e-10)


@given(seeds, sides, sides, st.booleans())
@settings(max_examples=100, deadline=None)
def test_unitary_invariance(seed, m, n, complex_):
    rng, A, H = law_case(seed, m, n, complex_)
    L, R = with_spectrum(rng, m, m, [1.0] * m, complex_), with_spectrum(rng, n, n, [1.0] * n, complex_)
    series = sigma_series(A, H, 6, k=min(m, n) - 1)
    moved = sigma_series(L @ A @ R, L @ H @ R, 6, k=min(m, n) - 1)
    assert_same_series(moved.coefficients, series.coefficients, series.gap)


@given(seeds, sides, sides, st.booleans())
@settings(max_examples=100, deadline=None)
def test_adjoint(seed, m, n, complex_):
    _, A, H = law_case(seed, m, n, complex_)
    series, adjoint = sigma_series(A, H, 6), sigma_series(A.conj().T, H.conj().T, 6)
    assert_same_series(adjoint.coefficients, series.coefficients, series.gap)


@given(seeds, sides, sides)
@settings(max_examples=100, deadline=None)
def test_orders_double(seed, m, n):
    _, A, H = law_case(seed, m, n)
    series, doubled = sigma_series(A, H, 4), sigma_series(A, [np.zeros_like(H), H], 8)
    assert_same_series(doubled.coefficients[::2], series.coefficients, series.gap)
    assert np.abs(doubled.coefficients[1::2]).max() == 0
    assert math.isclose(doubled.radius, math.sqrt(series.radius), rel_tol=1e-9)


@given(seeds, sides, sides)
@settings(max_examples=100, deadline=None)
def test_sum_of_squares(seed, m, n):
    """sum_k sigma_k(x)^2 = ||A + x H||_F^2, a polynomial of degree two."""
    _, A, H = law_case(seed, m, n)
    series = sigma_series(A, H, 6, k=list(range(min(m, n))))
    total = sum(np.convolve(c, c)[:7] for c in series.coefficients)
    expected = np.array([np.sum(A * A), 2 * np.sum(A * H), np.sum(H * H), 0, 0, 0, 0])
    weights = (series.gap.min() / 2) ** np.arange(7)
    assert np.abs((total - expected) * weights).max() <= 1e-11 * expected[0]


@given(seeds, st.integers(3, 6), st.integers(3, 6))
@settings(max_examples=60, deadline=None)
def test_cluster_mean_is_the_mean_of_its_values(seed, m, n):
    _, A, H = law_case(seed, m, n)
    separate = sigma_series(A, H, 5, k=[0, 1, 2])
    cluster = sigma_series(A, H, 5, k=(0, 1, 2))
    assert_same_series(cluster.mean, separate.coefficients.mean(axis=0), separate.gap.min())


def test_a_zero_coefficient_changes_nothing():
    A, H, Z = np.diag([2e-200, 1e-200]), 1e-200 * np.ones((2, 2)), np.zeros((2, 2))
    expected = sigma_series(A, H, 8)
    found = sigma_series(A, [H, Z, Z], 8)
    np.testing.assert_allclose(found.coefficients, expected.coefficients, rtol=1e-12, atol=1e-212)
    assert math.isclose(found.radius, expected.radius, rel_tol=1e-9)


def test_tiny_gaps_and_high_orders_do_not_overflow():
    A, H = np.diag([1 + 1e-9, 1.0, 0.5]), 1e-10 * np.ones((3, 3))
    series = sigma_series(A, H, 40)
    x = series.radius / 2
    assert abs(np.linalg.norm(A + x * H, 2) - series(x)) <= series.remainder(x)
    single = sigma_series(np.diag([1.0001, 1, 0.5]).astype("f4"), (1e-5 * np.ones((3, 3))).astype("f4"), 12)
    assert np.isfinite(single.coefficients).all()
    sigma_series(np.diag([1e-3, 2e-4]), 2e3 * np.array([[1, 2], [3, 4.0]]), 30)  # without a warning


def test_arguments_keep_the_precision_of_the_series():
    A, H = torch.diag(torch.tensor([3.0, 1.0])).double(), torch.ones(2, 2).double()
    series = sigma_series(A, H, 8)
    x = torch.tensor([1e-3])
    assert series(x).dtype == torch.float64
    truth = torch.linalg.matrix_norm(A + float(x[0]) * H, 2)
    assert abs(float(series(x)[0] - truth)) <= float(series.remainder(x)[0])
    for argument in ([1e-3], (1e-3,), np.array([1e-3]), np.float64(1e-3)):
        np.testing.assert_array_equal(np.ravel(series(argument)), series(1e-3))  # not rounded to torch's default
    for half in (torch.tensor([0.5]).bfloat16(), torch.tensor([0.5]).half()):
        assert series(half)[0] == sigma_series(A.numpy(), H.numpy(), 8)(half)[0] == series(0.5)
    assert series([1]).dtype == series(torch.tensor([1])).dtype == torch.float64
    at = torch.tensor(1e-3, dtype=torch.float64, requires_grad=True)
    series(at).backward()
    assert math.isclose(at.grad, sum(n * c * 1e-3 ** (n - 1) for n, c in enumerate(series.coefficients)))
    with pytest.raises(TypeError, match="x to be real"):
        series(torch.tensor([1j]))
    with pytest.raises(ValueError, match="x to be a rectangular array"):
        series([[1.0], [1.0, 2.0]])
    with pytest.raises(TypeError, match="x to be a real number"):
        sigma_series(A, H, 2, k=(0, 1)).values(x)


def test_arguments_of_a_stack_with_several_k():
    A, H = np.random.default_rng(2).standard_normal((2, 2, 4, 5))
    series = sigma_series(A, H, 4, k=[0, 1])
    x = np.array([1e-3, 2e-3])
    for i in range(2):
        one = sigma_series(A[i], H[i], 4, k=[0, 1])
        np.testing.assert_allclose(series(x)[i], one(x[i]), rtol=1e-13)
        np.testing.assert_allclose(series.remainder(x)[i], one.remainder(x[i]), rtol=1e-6)


@pytest.mark.parametrize(
    ("order", "size"), [(20, 3e-16), (10, 1e-32), (80, 1.1e-4), (150, 1e-3), (40, 1e4), (60, 2.0**-15), (30, 1.0)]
)
@pytest.mark.parametrize("sigma", [3.0, 2.0**-16, 4e4])
def test_derivatives_of_high_order_come_through(order, size, sigma):
    """That of sqrt(sigma^2 + x^2 size^2): a coefficient beyond the range of floats may have a derivative within it."""
    with mpmath.workdps(60):
        half = mpmath.mpf(order) / 2
        truth = mpmath.binomial(0.5, half) * mpmath.mpf(size) ** order * mpmath.mpf(sigma) ** (1 - order)
        truth *= mpmath.factorial(order)
    A, H = np.array([[sigma, 0.0]]), np.array([[0.0, size]])
    if abs(truth) > 1e307:
        with pytest.raises(OverflowError):
            sigma_derivative(A, order, directions=H)
        return
    found = sigma_derivative(A, order, directions=H)
    rtol = 1e-9 if abs(truth) > 1e-300 else 1e-2
    assert abs(found - truth) <= rtol * abs(truth) + 5e-324


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", [10, 20, 40])
def test_values_with_and_without_a_close_neighbour(dtype, order):
    """What one value needs of scaling does not spoil the other: each is as if it were asked for alone."""
    tight = 2e-5 if dtype == np.float32 else 1e-12
    A, H = np.diag([3.0, 2.0, 1.0, 1.0 - tight]).astype(dtype), np.zeros((4, 4), dtype)
    H[0, 1] = H[1, 0] = 1.0
    both = sigma_series(A, H, order, k=[0, 2])
    for i, k in enumerate([0, 2]):
        alone = sigma_series(A, H, order, k=k).coefficients
        np.testing.assert_allclose(both.coefficients[i], alone, rtol=1e-5 if dtype == np.float32 else 1e-12)
    # 5/2 + sqrt(1/4 + x^2), whatever the neighbours do that H does not reach
    with mpmath.workdps(60):
        exact = np.array(mpmath.taylor(lambda x: 2.5 + mpmath.sqrt(0.25 + x * x), 0, order), float)
    allowed = {"rtol": 2e-4 if dtype == np.float32 else 1e-10, "atol": 1e-30}
    np.testing.assert_allclose(both.coefficients[0], exact, **allowed)
    A, H = np.diag([3.0, 3.0 - tight, 2.0, 0.5]).astype(dtype), np.zeros((4, 4), dtype)
    H[0, 2] = H[2, 0] = 1.0
    found = sigma_series(A, H, order).coefficients
    np.testing.assert_allclose(found, exact, **allowed)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("order", [20, 100, 200])
def test_sums_of_high_order_keep_to_their_remainder(order, scale):
    """Also where coefficients leave the range of floats and powers of x would."""
    A, H = np.diag([3.0, 2.0]), scale * np.array([[0.0, 1.0], [1.0, 0.0]])
    try:
        series = sigma_series(A, H, order)
    except OverflowError:
        assert scale > 1
        return
    for share in (0.1, 0.8):
        x = share * float(series.radius)
        assert abs(series(x) - np.linalg.norm(A + x * H, 2)) <= series.remainder(x)
    points = np.array([-0.5, 0.0, 0.5]) * float(series.radius)
    np.testing.assert_array_equal(series(points), [series(float(x)) for x in points])


@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.float64, 1e-200), (np.float64, 1e-30), (np.float32, 1e-20), (np.float32, 1e-6)]
)
def test_values_of_a_cluster_do_not_depend_on_the_size_of_the_direction(dtype, scale):
    A, H = np.diag([2.0, 2.0, 1.0]), np.random.default_rng(0).standard_normal((3, 3))
    values = sigma_series(A.astype(dtype), (scale * H).astype(dtype), 8, k=(0, 1)).values(0.05 / scale)
    expected = np.linalg.svd(A + 0.05 * H, compute_uv=False)[:2]
    np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize("order", [9, 10, 11, 12, 14, 16, 18, 20])
@pytest.mark.parametrize(("a", "h"), [(31.0, 1 / 16), (20.0, 1 / 16), (1 / 15, 15.0)])
def test_high_orders_in_single_precision(a, h, order):
    """sqrt(a^2 + (h x)^2) for sizes at the ends of what counts as ordinary."""
    A, H = np.array([[a, 0.0]]), np.array([[0.0, h]])
    exact = sigma_derivative(A, order, directions=H)
    ways = (
        lambda A, H: sigma_derivative(A, order, directions=H),
        lambda A, H: sigma_series(A, H, order).derivatives[order],
    )
    for way in ways:
        if abs(exact) > np.finfo("f4").max:
            with pytest.raises(OverflowError):
                way(A.astype("f4"), H.astype("f4"))
            continue
        found = way(A.astype("f4"), H.astype("f4"))
        assert found == pytest.approx(exact, rel=1e-4, abs=0.0)


@pytest.mark.parametrize("k", [0, [0, 1], (0, 1)], ids=["one", "several", "cluster"])
@pytest.mark.parametrize("library", ["numpy", "torch", "strict"])
def test_order_zero_has_the_axes_of_the_directions(k, library):
    import array_api_strict

    asarray = {"numpy": np.asarray, "torch": torch.as_tensor, "strict": array_api_strict.asarray}[library]
    rng = np.random.default_rng(0)
    A, H = asarray(rng.standard_normal((3, 3))), asarray(rng.standard_normal((4, 3, 3)))
    zero, one = (sigma_series(A, H, order, k=k, vectors=True) for order in (0, 1))
    if isinstance(k, tuple):
        assert zero.effective_matrices.shape == (4, 1, 2, 2)
        assert zero.mean.shape[:-1] == one.mean.shape[:-1]
        shapes = [x.values(0.01).shape for x in (zero, one)]
    else:
        assert zero.coefficients.shape[:-1] == one.coefficients.shape[:-1]
        assert zero.derivatives.shape[:-1] == one.derivatives.shape[:-1]
        shapes = [x(0.01).shape for x in (zero, one)]
    assert shapes[0] == shapes[1]
    assert zero.left.shape[:-1] == one.left.shape[:-1]
    assert zero.remainder(0.01).shape == one.remainder(0.01).shape


def test_small_gaps_of_every_library():
    """Where powers of one over the gap overflow, whatever the library thinks of arithmetic with booleans."""
    import array_api_strict

    A, H = np.diag([1.0, 1 - 1e-12, 0.5]), np.full((3, 3), 1e-14)
    found = sigma_series(*map(array_api_strict.asarray, (A, H)), 40).coefficients
    np.testing.assert_allclose(np.asarray(found), sigma_series(A, H, 40).coefficients, rtol=1e-4)


FAMILY = np.array([[0.3, 0.5], [-0.2, 0.4]])


@pytest.mark.parametrize(
    ("dtype", "sizes"), [(np.float64, (1e-200, 1e-300, 1e-310)), (np.float32, (1e-25, 1e-30, 1e-39))]
)
def test_a_family_that_begins_with_next_to_nothing(dtype, sizes):
    A, G = np.diag([2.0, 1.0]).astype(dtype), FAMILY.astype(dtype)
    for order in (2, 3, 4):
        plain = sigma_series(A, [0 * G, G], order)
        for size in sizes:
            series = sigma_series(A, [dtype(size) * G, G], order)
            assert math.isclose(series.radius, plain.radius, rel_tol=1e-6)
            assert math.isclose(series.remainder(0.3), plain.remainder(0.3), rel_tol=1e-5)
            np.testing.assert_allclose(series.coefficients[::2], plain.coefficients[::2], rtol=1e-6)
            assert math.isclose(series.coefficients[1], size * 0.3, rel_tol=1e-5 if size > 1e-300 else 1e-3)
            assert series.remainder(3.0) == math.inf


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_sums_beyond_the_range_are_errors(library):
    A, G, unit = library(np.diag([2.0, 1.0])), library(FAMILY), library(np.eye(2))
    for x in (1e120, [0.1, 1e120], -1e120):
        with pytest.raises(OverflowError, match=r"sum of the series within the range of float64.*nearer to 0"):
            sigma_series(A, G, 3)(x)
    with pytest.raises(OverflowError, match="values of the cluster"):
        sigma_series(unit, G, 3, k=(0, 1)).values(1e120)
    with pytest.raises(OverflowError, match="values of the cluster"):
        one_sided_derivatives(unit, G * 1e284).values(1.0)
    assert sigma_series(A, G, 3).remainder(1e300) == sigma_series(unit, G, 3, k=(0, 1)).remainder(math.inf) == math.inf


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_sums_are_as_precise_as_the_coefficients(library):
    A, H = (library(x) for x in np.random.default_rng(0).standard_normal((2, 70, 65)).astype(np.float32))
    series = sigma_series(A, H, 3)
    assert series(0.01).dtype == series.remainder(0.01).dtype == series.coefficients.dtype == A.dtype
    assert sigma_series(A, H, 3, k=(0, 1)).values(0.01).dtype == A.dtype
    assert one_sided_derivatives(A, H).values(0.01).dtype == A.dtype
