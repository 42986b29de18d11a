"""Spectral functions against 50-digit differences of their values, autograd, closed forms and the laws they obey."""

import functools
import math

import array_api_strict
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import orthogonal, with_spectrum

from specpert import (
    DegenerateSingularValueError,
    NonFiniteError,
    ZeroSingularValueError,
    sigma_series,
    singular_triplet,
)
from specpert.spectral import SpectralFunction


def entropy(p, log):
    return -sum(x * log(x) for x in p if x > 0)


# name -> (function, the same value from the singular values as numbers of any precision; m is math or mpmath)
FUNCTIONS = {
    "nuclear": (SpectralFunction.nuclear_norm(), lambda s, m: sum(s)),
    "schatten-0.5": (SpectralFunction.schatten_norm(0.5), lambda s, m: sum(x**0.5 for x in s) ** 2),
    "schatten-1.5": (SpectralFunction.schatten_norm(1.5), lambda s, m: sum(x**1.5 for x in s) ** (m.mpf(2) / 3)),
    "schatten-3": (SpectralFunction.schatten_norm(3), lambda s, m: sum(x**3 for x in s) ** (m.mpf(1) / 3)),
    "log-det": (SpectralFunction.log_det(), lambda s, m: sum(m.log(x) for x in s)),
    "entropy": (
        SpectralFunction.von_neumann_entropy(),
        lambda s, m: entropy([x**2 / sum(y**2 for y in s) for x in s], m.log),
    ),
    "effective-rank": (
        SpectralFunction.effective_rank(),
        lambda s, m: m.exp(entropy([x / sum(s) for x in s], m.log)),
    ),
    "stable-rank": (SpectralFunction.stable_rank(), lambda s, m: sum(x**2 for x in s) / max(s) ** 2),
    "log-condition": (SpectralFunction.log_condition(), lambda s, m: m.log(max(s) / min(s))),
    "user-separable": (
        SpectralFunction.separable(
            lambda s: np.log1p(s**2), lambda s: 2 * s / (1 + s**2), lambda s: 2 * (1 - s**2) / (1 + s**2) ** 2
        ),
        lambda s, m: sum(m.log(1 + x**2) for x in s),
    ),
    "user-symmetric": (
        SpectralFunction.symmetric(  # log(1 + sum s^2) + log(sum s^4)
            lambda s: np.log1p((s**2).sum(-1)) + np.log((s**4).sum(-1)),
            lambda s: _user_gradient(s),
            lambda s: _user_hessian(s),
        ),
        lambda s, m: m.log(1 + sum(x**2 for x in s)) + m.log(sum(x**4 for x in s)),
    ),
}  # fmt: skip


def _user_gradient(s):
    return 2 * s / (1 + (s**2).sum(-1, keepdims=True)) + 4 * s**3 / (s**4).sum(-1, keepdims=True)


def _user_hessian(s):
    N, M = (1 + (s**2).sum(-1))[..., None, None], (s**4).sum(-1)[..., None, None]
    outer = s[..., :, None] * s[..., None, :]
    return np.eye(s.shape[-1]) * (2 / N + 12 * s[..., None] ** 2 / M) - 4 * outer / N**2 - 16 * outer**3 / M**2


SPECTRA = {
    "distinct": [3.0, 2.0, 0.5],
    "tie": [3.0, 1.0, 1.0],
    "top-tie": [2.0, 2.0, 0.5],
    "all-tied": [2.0, 2.0, 2.0],
    "near-tie": [3.0, 1.0 + 1e-9, 1.0],
    "closer": [3.0, 1.0 + 1e-3, 1.0],
    "at-the-switch": [2.0, 2.0 * 65 / 64, 0.25],
    "rank-2": [3.0, 1.0, 0.0],
    "rank-1": [3.0, 0.0, 0.0],
}
SHAPES = [(3, 3), (3, 4), (5, 3)]
SMOOTH_AT_ZERO = {"schatten-3", "stable-rank", "user-separable", "user-symmetric"}
KINK_AT = {
    "stable-rank": {"top-tie", "all-tied"},
    "log-condition": {"tie", "top-tie", "all-tied", "rank-2", "rank-1"},
}


def smooth(name, spectrum):
    if spectrum in KINK_AT.get(name, ()):
        return False
    return not spectrum.startswith("rank") or name in SMOOTH_AT_ZERO


@functools.cache
def case(spectrum, shape, complex_):
    rng = np.random.default_rng([len(spectrum), *shape, complex_])
    A = with_spectrum(rng, *shape, sorted(SPECTRA[spectrum], reverse=True), complex_)
    G = rng.standard_normal((2, *shape)) + (1j * rng.standard_normal((2, *shape)) if complex_ else 0)
    return A, G[0], G[1]


STEP = mpmath.mpf(10) ** -16  # the third derivative may jump: the second differences are then off by this


@functools.cache
def singular_values_mpmath(spectrum, shape, complex_):
    """Singular values of A - h G, A, A + h G at 60 digits, for an A whose spectrum is exact at 60 digits."""
    A, G, _ = case(spectrum, shape, complex_)
    with mpmath.workdps(60):
        a, g = mpmath.matrix(A.tolist()), mpmath.matrix(G.tolist())
        # the spectrum of A in float64 is not quite the one asked for: put the exact one into its exact vectors
        U, _, Vh = (mpmath.svd_c if complex_ else mpmath.svd_r)(a, full_matrices=False)
        a = U * mpmath.diag(sorted(SPECTRA[spectrum], reverse=True)) * Vh
        svd = mpmath.svd_c if complex_ else mpmath.svd_r
        return [[abs(x) for x in svd(a + t * STEP * g, compute_uv=False)] for t in (-1, 0, 1)]


def derivatives_mpmath(name, spectrum, shape, complex_):
    """Value, first and second derivative of f(A + x G), by central differences with an error below 1e-15."""
    with mpmath.workdps(60):
        below, at, above = (FUNCTIONS[name][1](s, mpmath) for s in singular_values_mpmath(spectrum, shape, complex_))
        return float(at), float((above - below) / (2 * STEP)), float((above - 2 * at + below) / STEP**2)


def inner(X, Y):
    return (X.conj() * Y).real.sum(axis=(-2, -1))


cases = pytest.mark.parametrize(
    ("name", "spectrum", "shape", "complex_"),
    [
        pytest.param(name, spectrum, shape, complex_, id=f"{name}-{spectrum}-{shape[0]}x{shape[1]}-{'RC'[complex_]}")
        for name in FUNCTIONS
        for spectrum in SPECTRA
        for shape in SHAPES
        for complex_ in (False, True)
        if smooth(name, spectrum)
    ],
)


@cases
def test_value_gradient_and_hessian_against_mpmath(name, spectrum, shape, complex_):
    f = FUNCTIONS[name][0]
    A, G, other = case(spectrum, shape, complex_)
    value, first, second = derivatives_mpmath(name, spectrum, shape, complex_)
    # near a tie a function of the one value alone has derivatives as good as the gap, which rounding of A spoils
    tolerance = {"near-tie": 1e-5, "closer": 2e-12}.get(spectrum, 2e-13) if name == "log-condition" else 2e-13
    floor = value / np.linalg.norm(A)  # of the derivatives, which vanish at extrema of f
    assert math.isclose(f.value(A), value, rel_tol=1e-14, abs_tol=1e-14)
    size = max(np.linalg.norm(f.gradient(A)), floor) * np.linalg.norm(G)
    assert math.isclose(inner(f.gradient(A), G), first, rel_tol=1e-13, abs_tol=tolerance * size)
    product = f.hessian_product(A, G)
    size = np.linalg.norm(product) * np.linalg.norm(G)
    assert math.isclose(f.quadratic(A, G), second, rel_tol=1e-13, abs_tol=tolerance * size)
    assert math.isclose(inner(product, G), f.quadratic(A, G), abs_tol=1e-13 * size)
    size = np.linalg.norm(product) * np.linalg.norm(other)
    assert math.isclose(inner(product, other), inner(f.hessian_product(A, other), G), abs_tol=1e-12 * size)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_where_it_is_not_smooth(name):
    f = FUNCTIONS[name][0]
    for spectrum in SPECTRA:
        A, G, _ = case(spectrum, (3, 4), False)
        if smooth(name, spectrum):
            f.quadratic(A, G)
            continue
        rank_deficient = spectrum.startswith("rank")
        error = ZeroSingularValueError if rank_deficient else DegenerateSingularValueError
        with pytest.raises(error, match=r"expected .*take a "):
            f.quadratic(A, G)
        with pytest.raises(error):
            f.hessian_product(A, G)
        if name not in ("schatten-1.5", "entropy"):  # continuously differentiable at zero
            with pytest.raises(error):
                f.gradient(A)
        if not rank_deficient:
            tied = [k for k, s in enumerate(SPECTRA[spectrum]) if SPECTRA[spectrum].count(s) > 1]
            with pytest.raises(DegenerateSingularValueError) as caught:
                f.gradient(A)
            assert caught.value.cluster == tuple(tied)
            assert caught.value.k in tied


def test_values_and_gradients_at_zero_where_they_exist():
    A = np.diag([3.0, 4.0, 0.0])
    log_det, condition = SpectralFunction.log_det(), SpectralFunction.log_condition()
    for f in (log_det, condition):
        with pytest.raises(ZeroSingularValueError):
            f.value(A)
    assert SpectralFunction.nuclear_norm().value(A) == 7.0
    assert math.isclose(SpectralFunction.effective_rank().value(A), math.exp(entropy([3 / 7, 4 / 7], math.log)))
    S = SpectralFunction.von_neumann_entropy()
    p = np.array([9 / 25, 16 / 25])
    expected = -2 * np.array([3.0, 4.0]) / 25 * (np.log(p) + entropy(p, math.log))
    np.testing.assert_allclose(S.gradient(A), np.diag([*expected, 0.0]), atol=1e-15)
    f = SpectralFunction.schatten_norm(1.5)
    np.testing.assert_allclose(f.gradient(A), np.diag([3.0, 4.0, 0.0]) ** 0.5 / f.value(A) ** 0.5, atol=1e-14)


def test_zero_matrix():
    Z, G = np.zeros((2, 3)), np.ones((2, 3))
    for name, (f, _) in FUNCTIONS.items():
        if name == "user-separable":  # log det (I + A A^*)
            assert f.value(Z) == 0.0
            assert math.isclose(f.quadratic(Z, G), 2 * 6.0)
        elif name in ("nuclear", "schatten-0.5", "schatten-1.5", "schatten-3"):
            assert f.value(Z) == 0.0
            with pytest.raises(ZeroSingularValueError):
                f.gradient(Z)
        elif name != "user-symmetric":
            with pytest.raises(ZeroSingularValueError):
                f.value(Z)


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 3)])
def test_whole_hessian_against_autograd(shape):
    A = np.random.default_rng(shape).standard_normal(shape)
    units = np.eye(A.size).reshape(A.size, *shape)

    def power(s, p):
        return (s**p).sum()

    def exp_entropy(s):
        return torch.exp(-(s / s.sum() * torch.log(s / s.sum())).sum())

    twins = {
        "nuclear": lambda s: s.sum(),
        "schatten-1.5": lambda s: power(s, 1.5) ** (2 / 3),
        "log-det": lambda s: torch.log(s).sum(),
        "entropy": lambda s: -(s**2 / power(s, 2) * torch.log(s**2 / power(s, 2))).sum(),
        "effective-rank": exp_entropy,
        "stable-rank": lambda s: power(s, 2) / s[0] ** 2,
        "log-condition": lambda s: torch.log(s[0] / s[-1]),
    }
    for name, F in twins.items():
        f = FUNCTIONS[name][0]

        def phi(X, F=F):
            return F(torch.linalg.svdvals(X))

        a = torch.as_tensor(A)
        H = torch.func.hessian(phi)(a).numpy().reshape(A.size, A.size)
        found = f.hessian_product(A, units).reshape(A.size, A.size)
        np.testing.assert_allclose(found, H, atol=1e-12 * np.abs(H).max(), err_msg=name)
        np.testing.assert_allclose(f.gradient(A), torch.func.grad(phi)(a).numpy(), rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(f.quadratic(A, units), np.diag(H), atol=1e-12 * np.abs(H).max())


def test_closed_forms():
    rng = np.random.default_rng(1)
    A, G = rng.standard_normal((2, 4, 4)) + 1j * rng.standard_normal((2, 4, 4))
    X = np.linalg.solve(A, G)
    log_det = SpectralFunction.log_det()
    assert math.isclose(log_det.value(A), np.linalg.slogdet(A)[1], rel_tol=1e-13)
    assert math.isclose(log_det.quadratic(A, G), -np.trace(X @ X).real, rel_tol=1e-12)
    np.testing.assert_allclose(log_det.gradient(A), np.linalg.inv(A).conj().T, atol=1e-13)
    frobenius, norm = SpectralFunction.schatten_norm(2), np.linalg.norm(A)
    expected = G / norm - inner(A, G) / norm**3 * A
    np.testing.assert_allclose(frobenius.hessian_product(A, G), expected, atol=1e-14)
    # the sum over all singular values is a cluster of all
    for M, H in ((A, G), (A[:3], G[:3]), (A[:, :2], G[:, :2])):
        r = min(M.shape)
        series = sigma_series(M, H, 2, k=tuple(range(r)))
        assert math.isclose(SpectralFunction.nuclear_norm().quadratic(M, H), 2 * r * series.mean[2], rel_tol=1e-11)


def test_large_powers_neither_overflow_nor_lose_the_top():
    A, G = np.diag([300.0, 200.0, 1.0]), np.random.default_rng(2).standard_normal((3, 3))
    f = SpectralFunction.schatten_norm(1e4)
    assert math.isclose(f.value(A), 300.0, rel_tol=1e-14)
    expected = 2 * sigma_series(A, G, 2).coefficients[2]
    # what is left of the norm's curvature in s_1 is (1 - p) + (p - 1) = 0
    assert math.isclose(f.quadratic(A, G), expected, rel_tol=1e-10)


@pytest.mark.parametrize("gap", [1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 0.01, 1 / 64, 1 / 63, 0.1, 0.9])
def test_divided_differences_keep_their_digits_at_any_gap(gap):
    """For diagonal A and G = E_12 + E_21 the form is 2 (F_1 - F_2) / (s_1 - s_2), which mpmath knows."""
    A, G = np.diag([1.0, 1.0 - gap, 0.25]), np.zeros((3, 3))
    G[0, 1] = G[1, 0] = 1.0
    s = np.diag(A)
    with mpmath.workdps(50):
        exact = [mpmath.mpf(float(x)) for x in s]
        for name in set(FUNCTIONS) - {"stable-rank", "log-condition"}:

            def partial(i, F=FUNCTIONS[name][1]):
                h = mpmath.mpf(10) ** -22

                def at(t):
                    return F([x + t * h * (j == i) for j, x in enumerate(exact)], mpmath)

                return (at(1) - at(-1)) / (2 * h)

            expected = 2 * (partial(0) - partial(1)) / (exact[0] - exact[1])
            found = FUNCTIONS[name][0].quadratic(A, G)
            # of size one are the terms, which nearly cancel in some functions
            assert math.isclose(found, float(expected), rel_tol=3e-13, abs_tol=1e-13), name


@settings(deadline=None)
@given(
    st.sampled_from(sorted(set(FUNCTIONS))),
    st.sampled_from(SHAPES),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.floats(1e-6, 1e6),
)
def test_laws(name, shape, complex_, seed, c):
    """Unitary invariance, adjoint, Euler's theorem on homogeneous functions, and null directions."""
    f, rng = FUNCTIONS[name][0], np.random.default_rng(seed)
    A = with_spectrum(rng, *shape, list(np.array([4.0, 2.0, 1.0]) + rng.uniform(-0.4, 0.4, 3)), complex_)
    G = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if complex_ else 0)
    P, Q = (orthogonal(rng, n, n, complex_) for n in shape)
    B, K = P @ A @ Q, P @ G @ Q
    size = np.linalg.norm(f.hessian_product(A, G))
    tolerance = 1e-11 * size * np.linalg.norm(G)
    assert math.isclose(f.value(A), f.value(B), rel_tol=1e-12, abs_tol=1e-12)
    np.testing.assert_allclose(f.gradient(B), P @ f.gradient(A) @ Q, atol=1e-11)
    np.testing.assert_allclose(f.hessian_product(B, K), P @ f.hessian_product(A, G) @ Q, atol=1e-11 * size)
    adjoint = f.hessian_product(A.conj().T, G.conj().T).conj().T
    np.testing.assert_allclose(adjoint, f.hessian_product(A, G), atol=1e-11 * size)
    # along the orbit exp(xW) A, W skew, f is constant: D^2 f[W A, W A] + D f[W^2 A] = 0
    W = rng.standard_normal((shape[0], shape[0])) + (1j * rng.standard_normal((shape[0], shape[0])) if complex_ else 0)
    W = W - W.conj().T
    bend = inner(f.gradient(A), W @ W @ A)
    assert math.isclose(f.quadratic(A, W @ A), -bend, rel_tol=1e-10, abs_tol=1e-10 * np.linalg.norm(W @ W @ A))
    if name.startswith("user"):
        return
    h = 1 if name.startswith(("nuclear", "schatten")) else 0
    shift = 3 * math.log(c) if name == "log-det" else 0.0
    assert math.isclose(f.value(c * A), c**h * f.value(A) + shift, rel_tol=1e-12, abs_tol=1e-12)
    np.testing.assert_allclose(f.hessian_product(A, A), (h - 1) * f.gradient(A), atol=1e-11)
    assert math.isclose(f.quadratic(c * A, G), c ** (h - 2) * f.quadratic(A, G), abs_tol=c ** (h - 2) * tolerance)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if not n.startswith("user")])
@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_extreme_scales(name, scale):
    f = FUNCTIONS[name][0]
    A, G = np.random.default_rng(3).standard_normal((2, 4, 3))
    h = 1 if name.startswith(("nuclear", "schatten")) else 0
    value = f.value(A) * scale if h else f.value(A) + (3 * math.log(scale) if name == "log-det" else 0)
    assert math.isclose(f.value(scale * A), value, rel_tol=1e-13)
    expected = f.quadratic(A, G) * (scale if h else 1.0)
    assert math.isclose(f.quadratic(scale * A, scale * G), expected, rel_tol=1e-11)
    with np.errstate(under="ignore"):
        expected = f.hessian_product(A, G) * scale ** (h - 1)
    np.testing.assert_allclose(f.hessian_product(scale * A, scale * G), expected, rtol=1e-10)
    np.testing.assert_allclose(f.gradient(scale * A), f.gradient(A) * scale ** (h - 1), rtol=1e-10)


def test_what_exceeds_the_floats_is_an_error_not_infinity():
    A = 1e-200 * np.eye(2)
    with pytest.raises(OverflowError, match="log-determinant"):
        SpectralFunction.log_det().quadratic(A, np.eye(2))
    with pytest.raises(OverflowError, match="nuclear norm"):
        SpectralFunction.nuclear_norm().value(np.full((3, 3), 1e308))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_stacks(name):
    f, rng = FUNCTIONS[name][0], np.random.default_rng(4)
    A, G = rng.standard_normal((2, 1, 4, 3)), rng.standard_normal((5, 4, 3))
    values, products, quadratics = f.value(A), f.hessian_product(A, G), f.quadratic(A, G)
    assert values.shape == (2, 1)
    assert products.shape == (2, 5, 4, 3)
    assert f.gradient(A).shape == A.shape
    for i in range(2):
        assert math.isclose(values[i, 0], f.value(A[i, 0]), rel_tol=1e-14)
        np.testing.assert_allclose(f.gradient(A)[i, 0], f.gradient(A[i, 0]), atol=1e-13)
        for j in range(5):
            assert math.isclose(quadratics[i, j], f.quadratic(A[i, 0], G[j]), rel_tol=1e-11)
            np.testing.assert_allclose(products[i, j], f.hessian_product(A[i, 0], G[j]), atol=1e-11)


def test_an_error_in_a_stack_names_the_matrix():
    A = np.stack([np.diag([2.0, 1.0]), np.diag([1.0, 1.0])])
    with pytest.raises(DegenerateSingularValueError, match=r"of matrix \(1,\)"):
        SpectralFunction.stable_rank().gradient(A)
    A[1] = np.diag([1.0, 0.0])
    with pytest.raises(ZeroSingularValueError, match=r"sigma_1 of matrix \(1,\)"):
        SpectralFunction.log_det().value(A)


def test_prepared_triplets():
    A, G = np.random.default_rng(5).standard_normal((2, 4, 5))
    f = SpectralFunction.effective_rank()
    triplet = singular_triplet(A, 1)
    assert math.isclose(f.quadratic(triplet, G), f.quadratic(A, G), rel_tol=1e-14)
    with pytest.raises(TypeError, match="method='svd'"):
        f.value(singular_triplet(np.random.default_rng(6).standard_normal((80, 90)), method="gram"))


def user_functions(xp):
    """log det (I + A A^*) in both kinds, from elementwise functions of a library."""

    def hessian(s):
        return xp.eye(s.shape[-1], dtype=s.dtype) * (2 * (1 - s**2) / (1 + s**2) ** 2)[..., None]

    separable = SpectralFunction.separable(
        lambda s: xp.log(1 + s**2), lambda s: 2 * s / (1 + s**2), lambda s: 2 * (1 - s**2) / (1 + s**2) ** 2
    )
    symmetric = SpectralFunction.symmetric(
        lambda s: xp.sum(xp.log(1 + s**2), axis=-1), lambda s: 2 * s / (1 + s**2), hessian
    )
    return separable, symmetric


LIBRARIES = {"numpy": np, "torch": torch, "strict": array_api_strict}


@pytest.mark.parametrize(
    ("library", "complex_", "dtype"),
    [(x, y, z) for x in ("numpy", "torch", "strict") for y in (False, True) for z in ("float64", "float32")],
)
def test_every_function_on_every_library(library, complex_, dtype):
    asarray, tolerance = LIBRARIES[library].asarray, {"float64": 1e-12, "float32": 2e-5}[dtype]
    rng = np.random.default_rng(7)
    A = with_spectrum(rng, 3, 4, [3.0, 2.0, 0.5], complex_)
    G = rng.standard_normal((2, 3, 4)) + (1j * rng.standard_normal((2, 3, 4)) if complex_ else 0)
    a, g = (asarray(x.astype(np.result_type(dtype, np.complex64 if complex_ else dtype))) for x in (A, G))
    ours = [f for name, (f, _) in FUNCTIONS.items() if not name.startswith("user")]
    pairs = list(zip(ours, ours, strict=True))
    pairs += list(zip(user_functions(np), user_functions(LIBRARIES[library]), strict=True))
    for here, there in pairs:
        for method, arguments, array_arguments in [
            ("value", (A,), (a,)),
            ("gradient", (A,), (a,)),
            ("hessian_product", (A, G), (a, g)),
            ("quadratic", (A, G), (a, g)),
        ]:
            expected, found = getattr(here, method)(*arguments), getattr(there, method)(*array_arguments)
            assert dtype in str(found.dtype) or (complex_ and "complex" in str(found.dtype))
            if library != "numpy":
                assert type(found) is type(a)
            np.testing.assert_allclose(
                np.asarray(found), expected, atol=tolerance * np.abs(expected).max(), err_msg=f"{here} {method}"
            )


def test_jax(request):
    """Few functions, compiled without optimisation: JAX compiles every operation, for seconds."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    before = jax.config.values["jax_disable_most_optimizations"]
    request.addfinalizer(lambda: jax.config.update("jax_disable_most_optimizations", before))
    jax.config.update("jax_disable_most_optimizations", True)
    A, G, _ = case("closer", (3, 4), False)
    with jax.enable_x64(True):
        a, g = jax.numpy.asarray(A), jax.numpy.asarray(G)
        entropy_, (_, symmetric) = SpectralFunction.von_neumann_entropy(), user_functions(jax.numpy)
        for found, expected in [
            (entropy_.gradient(a), entropy_.gradient(A)),
            (symmetric.quadratic(a, g), user_functions(np)[1].quadratic(A, G)),
        ]:
            assert isinstance(found, jax.Array)
            np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-12, atol=1e-13)


def test_the_two_user_kinds_agree_through_ties():
    separable, symmetric = user_functions(np)
    for spectrum in SPECTRA:
        A, G, _ = case(spectrum, (5, 3), True)
        np.testing.assert_allclose(symmetric.gradient(A), separable.gradient(A), atol=1e-13)
        np.testing.assert_allclose(symmetric.hessian_product(A, G), separable.hessian_product(A, G), atol=1e-13)


def test_mixed_dtypes():
    A, G = np.random.default_rng(8).standard_normal((2, 3, 4))
    f = SpectralFunction.nuclear_norm()
    found = f.hessian_product(A, G + 0j)
    assert found.dtype == np.complex128
    np.testing.assert_allclose(found, f.hessian_product(A, G), atol=1e-14)
    assert math.isclose(f.quadratic(A, 1j * G), f.quadratic(A + 0j, 1j * G), rel_tol=1e-12)
    a, g = torch.as_tensor(A, dtype=torch.float32), torch.as_tensor(G)
    assert f.quadratic(a, g).dtype == torch.float64
    assert isinstance(f.value(A), np.float64)
    assert SpectralFunction.log_det().value(np.array([[2, 0], [0, 3]])) == pytest.approx(math.log(6))


def test_user_functions_at_zero_singular_values():
    A, G = np.diag([2.0, 1.0, 0.0]), np.ones((3, 3))
    kink = SpectralFunction.separable(lambda s: s, lambda s: np.ones_like(s), lambda s: np.zeros_like(s))
    assert kink.value(A) == 3.0
    for ask in (kink.gradient, lambda A: kink.quadratic(A, G)):
        with pytest.raises(ZeroSingularValueError, match=r"f'\(0\) = 0"):
            ask(A)
    once = SpectralFunction.separable(lambda s: s**1.5, lambda s: 1.5 * s**0.5, lambda s: 0.75 * s**-0.5)
    np.testing.assert_allclose(once.gradient(A), np.diag([1.5 * 2**0.5, 1.5, 0.0]), atol=1e-15)
    with pytest.raises(ZeroSingularValueError):
        once.quadratic(A, G)
    logarithm = SpectralFunction.separable(np.log, lambda s: 1 / s, lambda s: -1 / s**2)
    with pytest.raises(ZeroSingularValueError):
        logarithm.value(A)
    with pytest.raises(ZeroSingularValueError):
        logarithm.gradient(A)


def test_bad_input():
    A = np.random.default_rng(9).standard_normal((3, 4))
    f = SpectralFunction.nuclear_norm()
    for p in (0, -1, math.inf, math.nan, "2"):
        with pytest.raises(ValueError, match="expected 0 < p < inf"):
            SpectralFunction.schatten_norm(p)
    with pytest.raises(ValueError, match=r"expected G of shape \(\.\.\., 3, 4\) like A"):
        f.quadratic(A, A.T)
    with pytest.raises(NonFiniteError):
        f.value(np.full((2, 2), np.nan))
    with pytest.raises(TypeError, match="same array library"):
        f.quadratic(A, torch.ones(3, 4))
    with pytest.raises(ValueError, match="expected A to be a matrix"):
        f.value(np.ones(3))
    scalar = SpectralFunction.separable(np.square, lambda s: 2 * s, lambda s: 2.0)
    with pytest.raises(ValueError, match=r"expected d2f to return an array of shape \(3,\).*got float"):
        scalar.quadratic(A, A)
    wrong = SpectralFunction.symmetric(lambda s: s, lambda s: s, lambda s: s)
    with pytest.raises(ValueError, match=r"expected value to return an array of shape \(\)"):
        wrong.value(A)
    overflow = SpectralFunction.separable(lambda s: s / 0, lambda s: s / 0, lambda s: s / 0, name="quotient")
    for ask in (overflow.value, overflow.gradient):
        with pytest.raises(NonFiniteError, match="finite quotient"):
            ask(A)
