"""specpert against torch.func, JAX and mpmath, and the certificates, on matrices of drawn spectra.

The matrices for automatic differentiation are well separated: its rules divide by the gaps between all values.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from specpert import sigma_derivative, sigma_series
from specpert.testing import check_certificate, check_derivative, check_series, matrices_with_spectrum

SEPARATED = matrices_with_spectrum(kinds=("separated",), max_side=5)
EVERY_KIND = matrices_with_spectrum(max_side=5)
SEEDS = st.integers(0, 2**32 - 1)


def directions(A, seed, count=1):
    """Directions of norm one, real for a real A."""
    rng = np.random.default_rng(seed)
    H = rng.standard_normal((count, *A.shape))
    H = H + 1j * rng.standard_normal(H.shape) if np.iscomplexobj(A) else H
    return list(H / np.linalg.norm(H, 2, axis=(-2, -1), keepdims=True))


def nested_jvp(jvp, value, zero, one, order):
    """D^order of value(x_1 + ... + x_order), one forward derivative in each x_i, the innermost first."""
    for _ in range(order):
        value = (lambda inner: lambda x: jvp(inner, (x,), (one,))[1])(value)
    return value(zero)


def torch_derivative(k, order):
    """D^order sigma_k[H, ..., H] by torch.func, of NumPy arrays."""

    def derivative(A, H):
        A, H = torch.as_tensor(A), torch.as_tensor(H)
        zero, one = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
        return nested_jvp(
            torch.func.jvp, lambda x: torch.linalg.svd(A + x * H, full_matrices=False)[1][k], zero, one, order
        )

    return derivative


def torch_mixed(k):
    """D^n sigma_k[H_1, ..., H_n]: one forward derivative in each direction."""

    def along(value, H):
        return lambda A: torch.func.jvp(value, (A,), (torch.as_tensor(H),))[1]

    def derivative(A, given):
        def value(A):
            return torch.linalg.svd(A, full_matrices=False)[1][k]

        for H in given:
            value = along(value, H)
        return value(torch.as_tensor(A))

    return derivative


@given(SEPARATED, SEEDS, st.data())
@settings(max_examples=25, deadline=None)
def test_against_torch_func(drawn, seed, data):
    A, s = drawn
    k = data.draw(st.integers(0, len(s) - 1))
    (H,) = directions(A, seed)
    for order in (1, 2, 3, 4):
        note(f"order {order}")
        check_derivative(torch_derivative(k, order), A, H, order, k=k)


@given(SEPARATED, SEEDS, st.data())
@settings(max_examples=15, deadline=None)
def test_mixed_against_torch_func(drawn, seed, data):
    A, s = drawn
    k = data.draw(st.integers(0, len(s) - 1))
    order = data.draw(st.integers(2, 4))
    check_derivative(torch_mixed(k), A, directions(A, seed, order), order, k=k)


@given(matrices_with_spectrum(kinds=("separated",), max_side=5, dtypes=(np.float64,)), st.data())
@settings(max_examples=15, deadline=None)
def test_gradient_and_hessian_against_torch_autograd(drawn, data):
    A, s = drawn
    k = data.draw(st.integers(0, len(s) - 1))

    def sigma(A):
        return torch.linalg.svdvals(A)[k]

    check_derivative(lambda A: torch.func.grad(sigma)(torch.as_tensor(A)), A, order=1, k=k)
    check_derivative(lambda A: torch.func.hessian(sigma)(torch.as_tensor(A)), A, order=2, k=k)


@pytest.fixture(scope="module", name="jax")
def fixture_jax():
    """The library, told to compile quickly."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield jax
    jax.config.update("jax_disable_most_optimizations", before)


REAL_3_BY_4 = matrices_with_spectrum(shape=(3, 4), kinds=("separated",), dtypes=(np.float64,))


@given(REAL_3_BY_4, SEEDS, st.integers(0, 2), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_against_jax(jax, drawn, seed, k, order):
    """One shape and dtype: JAX compiles anew for each."""
    (H,) = directions(drawn.A, seed)

    def derivative(A, H):
        def value(x):
            return jax.numpy.linalg.svd(A + x * H, full_matrices=False)[1][k]

        return nested_jvp(jax.jvp, value, 0.0, 1.0, order)

    with jax.enable_x64(True):
        check_derivative(derivative, jax.numpy.asarray(drawn.A), jax.numpy.asarray(H), order, k=k)


@given(EVERY_KIND, SEEDS, st.data())
@settings(max_examples=40, deadline=None)
def test_against_mpmath(drawn, seed, data):
    """Every kind of spectrum; ties and close pairs of other values do not matter."""
    A, _ = drawn
    ks = drawn.isolated(1e-3)
    if ks:
        check_series(A, directions(A, seed)[0], 3, k=data.draw(st.sampled_from(ks)), digits=40)


@given(EVERY_KIND, SEEDS)
@settings(max_examples=100, deadline=None)
def test_series_of_every_isolated_value(drawn, seed):
    A, _ = drawn
    ks = drawn.isolated(1e-3)
    if ks:
        check_series(A, directions(A, seed, 2), 5, k=ks)


@given(matrices_with_spectrum(shape=(4, 5), kinds=("tied", "close")), SEEDS)
@settings(max_examples=40, deadline=None)
def test_means_of_clusters(drawn, seed):
    """The values nearer to each other than 0.3, the rest of the spectrum at a distance of at least that."""
    A, s = drawn
    near = np.flatnonzero(-np.diff(s) < 0.3)
    check_series(A, directions(A, seed)[0], 4, k=tuple(range(int(near[0]), int(near[-1]) + 2)))


@given(EVERY_KIND, SEEDS, st.integers(0, 5), st.data())
@settings(max_examples=100, deadline=None)
def test_certificates(drawn, seed, order, data):
    A, _ = drawn
    ks = drawn.isolated(1e-8)
    if ks:
        check_certificate(A, directions(A, seed)[0], order, k=data.draw(st.sampled_from(ks)), samples=9)


@given(SEPARATED, SEEDS, st.integers(1, 3), st.data())
@settings(max_examples=30, deadline=None)
def test_mixed_derivatives_against_samples(drawn, seed, order, data):
    A, s = drawn
    k = data.draw(st.integers(0, len(s) - 1))
    given_ = directions(A, seed, order)
    check_derivative(lambda A: np.linalg.svd(A, compute_uv=False)[k], A, given_, order, k=k, computes="sigma")


# --- wrong results are found on drawn matrices -----------------------------------------------------------------------


@given(matrices_with_spectrum(shape=(3, 4), kinds=("separated",)), SEEDS.filter(bool), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_a_wrong_coefficient_is_found(drawn, seed, n):
    """A coefficient one per cent of the largest possible one away, at any order up to 5."""
    A, _ = drawn
    (H,) = directions(A, seed)
    series = sigma_series(A, H, 5)
    wrong = series.coefficients.copy()
    wrong[n] += 0.01 * series.gap / 2 * series.radius**-n
    with pytest.raises(AssertionError, match=f"lam_{n}"):
        check_series(A, H, 5, computed=wrong)
    with pytest.raises(AssertionError, match=rf"D\^{n}"):
        check_derivative(lambda A, H: math.factorial(n) * wrong[n], A, H, n)


@given(matrices_with_spectrum(shape=(3, 4), kinds=("separated",)), SEEDS)
@settings(max_examples=20, deadline=None)
def test_a_derivative_of_another_value_is_found(drawn, seed):
    A, _ = drawn
    (H,) = directions(A, seed)
    with pytest.raises(AssertionError, match=r"D\^2 sigma_0"):
        check_derivative(lambda A, H: sigma_derivative(A, 2, k=1, directions=H), A, H, 2)
    with pytest.raises(AssertionError, match="lam_0"):
        check_derivative(
            lambda A: torch.linalg.svdvals(A)[1], torch.as_tensor(A), torch.as_tensor(H), 2, computes="sigma"
        )
