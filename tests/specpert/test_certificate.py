"""Certificates are never violated, and say what theory 1.9 says."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from oracles import certified_cases, with_spectrum

from specpert import kato_temple, sigma_series, singular_triplet
from specpert.certificate import spectral_norm_bound


@pytest.mark.parametrize(
    ("m", "n", "values", "k", "d"),
    [
        (3, 3, [3.0, 2.5, 1.0], 0, 0.5),
        (3, 3, [3.0, 2.5, 1.0], 2, 1.5),
        (3, 3, [3.0, 2.5, 0.2], 2, 0.4),  # 2 sigma: -sigma is in the spectrum
        (3, 4, [3.0, 2.5, 0.2], 2, 0.2),  # sigma: so is zero
        (3, 3, [3.0, 0.2], 1, 0.2),
        (1, 1, [5.0], 0, 10.0),
        (1, 2, [5.0], 0, 5.0),
    ],
)
def test_isolation_distance(m, n, values, k, d):
    A = with_spectrum(np.random.default_rng(0), m, n, values)
    assert math.isclose(singular_triplet(A, k=k).gap, d, rel_tol=1e-12)


def test_radius_is_sharp():
    """[[1, x], [x, 2]] shifted: [[d/2, x], [x, -d/2]] has its branch points at |x| = d / 2 (theory 1.9)."""
    A, H = np.diag([4.0, 3.0]), np.array([[0.0, 1.0], [-1.0, 0.0]])
    series = sigma_series(A, H @ np.diag([1.0, -1.0]), 30)
    assert math.isclose(series.radius, 0.5, rel_tol=1e-12)
    growth = abs(series.coefficients[30] / series.coefficients[28]) ** 0.5  # tends to 1 / (radius of convergence)
    assert 0.5 <= 1 / growth <= 0.56


def test_radius_of_a_family_is_at_least_the_simple_formula():
    rng = np.random.default_rng(1)
    A = with_spectrum(rng, 4, 5, [3.0, 2.0, 1.0, 0.5])
    family = [with_spectrum(rng, 4, 5, [0.7 * 0.4**j] * 4) for j in range(4)]
    d = singular_triplet(A, k=1).gap
    simple = 1 / (2 * 0.7 / d + 0.4)
    assert simple <= sigma_series(A, family, 4, k=1).radius <= 1.3 * simple


def test_no_direction_no_limit():
    A = np.diag([3.0, 1.0])
    series = sigma_series(A, np.zeros((2, 2)), 3)
    assert series.radius == math.inf
    assert series.remainder(1e10) < 1e-12
    assert sigma_series(A, [np.zeros((2, 2)), 4 * np.eye(2)], 4).radius == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (600, 700)], ids=str)
def test_norm_bound_is_above_the_norm(shape):
    H = np.random.default_rng(2).standard_normal(shape)
    bound, norm = spectral_norm_bound(H, np), np.linalg.norm(H, 2)
    assert norm <= bound <= min(np.linalg.norm(H), 20 * norm) * 1.001


def exact_value(A, H, k, x, dps=40):
    with mpmath.workdps(dps):
        M = mpmath.matrix(A.tolist()) + mpmath.mpf(x) * mpmath.matrix(H.tolist())
        svd = mpmath.svd_c if np.iscomplexobj(A) or np.iscomplexobj(H) else mpmath.svd_r
        return svd(M, compute_uv=False)[k]


def assert_certified(A, H, k, order, rho, exact):
    series = sigma_series(A, H, order, k=k)
    x = rho * series.radius
    error = abs(float(exact(A, H, k, x) - mpmath.mpf(float(series(x)))))
    assert error <= series.remainder(x), (error, series.remainder(x))
    # |lam_n| <= (d / 2) r0^-n, up to the rounding of the gap
    d = series.gap
    bound = d / 2 * series.radius ** -np.arange(1.0, order + 1)
    assert (abs(series.coefficients[1:]) <= bound * (1 + 1e-9) + 1e-13 * series.coefficients[0]).all()


@given(certified_cases())
@settings(max_examples=150, deadline=None)
def test_remainder_against_exact_values(case):
    assert_certified(*case, exact_value)


@given(certified_cases())
@settings(max_examples=10_000, deadline=None)
def test_remainder_is_never_violated(case):
    """Many cases against LAPACK, whose own error is allowed for."""
    A, H, k, order, rho = case
    series = sigma_series(A, H, order, k=k)
    if series.radius == 0:  # the gap is below the margin: nothing is certified, and said so
        assert series.remainder(1e-300) == math.inf
        return
    x = rho * series.radius
    values = np.linalg.svd(A + x * H, compute_uv=False)
    assert abs(values[k] - series(x)) <= series.remainder(x) + 1e-14 * max(A.shape) * values[0]


def test_no_certificate_outside_the_radius():
    A, H = np.diag([3.0, 1.0]), np.ones((2, 2))
    series = sigma_series(A, H, 3)
    assert np.isinf(series.remainder(series.radius * np.array([1.0, 1.5, -1.0]))).all()
    assert np.isfinite(series.remainder(-0.99 * series.radius))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [*((np.float64, x) for x in (1e-305, 1e-315, 1e-321)), *((np.float32, x) for x in (1e-36, 1e-40, 1e-43))],
)
def test_certificates_where_the_numbers_end(dtype, scale):
    """The value's own rounding and that of the bound are as large as the smallest number there is."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        A, H = rng.standard_normal((3, 4)), 0.02 * rng.standard_normal((3, 4))
        A, H = (M.astype(dtype) * dtype(scale) for M in (A, H))

        def exact(x, A=A, H=H):
            return exact_value(A.astype(float), H.astype(float), 0, x)

        for order in range(3):
            found = kato_temple(A, H, order=order)
            assert abs(exact(1.0) - mpmath.mpf(float(found.value))) <= mpmath.mpf(float(found.bound))
        series = sigma_series(A, H, 3)
        for x in (0.3, 1.0):
            assert abs(exact(x) - mpmath.mpf(float(series(x)))) <= mpmath.mpf(float(series.remainder(x)))
