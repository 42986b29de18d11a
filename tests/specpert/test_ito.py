"""Ito coefficients against closed forms, the derivatives they are made of, and simulated processes."""

import math

import array_api_strict
import numpy as np
import pytest
import torch
from oracles import taylor_mpmath, with_spectrum

from specpert import (
    DegenerateSingularValueError,
    SpecpertError,
    ZeroSingularValueError,
    sigma_series,
    singular_triplet,
)
from specpert.ito import sigma_ito, spectral_ito
from specpert.spectral import SpectralFunction


def units(m, n, complex_=False):
    """A Brownian matrix; a complex one has independent real and imaginary parts."""
    E = np.eye(m * n).reshape(m * n, m, n)
    return np.concatenate([E, 1j * E]) if complex_ else E


def process(m=3, n=4, J=3, complex_=False, seed=0):
    rng = np.random.default_rng(seed)
    A, *D = rng.standard_normal((J + 1, m, n)) + (1j * rng.standard_normal((J + 1, m, n)) if complex_ else 0)
    return A, rng.standard_normal((m, n)), np.stack(D)


@pytest.mark.parametrize("shape", [(3, 3), (3, 5), (4, 3)])
@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
def test_brownian_matrix(shape, complex_):
    """The drift of Bru (1989), real and complex, and a unit diffusion."""
    s = [3.0, 2.0, 0.5]
    A = with_spectrum(np.random.default_rng(shape), *shape, s, complex_)
    for k in range(3):
        b = sigma_ito(A, np.zeros(shape), units(*shape, complex_), k=k)
        repulsion = sum(s[k] / (s[k] ** 2 - s[i] ** 2) for i in range(3) if i != k)
        real = abs(shape[0] - shape[1]) / (2 * s[k]) + repulsion
        expected = 2 * real + 1 / (2 * s[k]) if complex_ else real
        assert math.isclose(b.drift, expected, rel_tol=1e-12)
        assert b.first_order == 0
        assert math.isclose(b.variance, 1.0, rel_tol=1e-12)
        assert math.isclose(b.value, s[k], rel_tol=1e-13)


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("k", [0, 2, (0, 1), (1, 2)])
def test_parts_are_derivatives_at_50_digits(k, complex_):
    A, G, D = process(complex_=complex_)
    b = sigma_ito(A, G, D, k=k)
    ks = k if isinstance(k, tuple) else (k,)

    def taylor(H):
        return np.mean([taylor_mpmath(A, H, i, 2) for i in ks], axis=0)

    value, first, _ = taylor(G)
    along = np.array([taylor(D_j) for D_j in D])
    assert math.isclose(b.value, value, rel_tol=1e-13)
    assert math.isclose(b.first_order, first, rel_tol=1e-12)
    np.testing.assert_allclose(b.diffusion, along[:, 1], rtol=1e-12)
    assert math.isclose(b.curvature, along[:, 2].sum(), rel_tol=1e-11)
    assert math.isclose(b.drift, first + along[:, 2].sum(), rel_tol=1e-11)
    assert math.isclose(b.variance, (along[:, 1] ** 2).sum(), rel_tol=1e-11)
    log = b.log()
    assert math.isclose(log.value, math.log(value), rel_tol=1e-12, abs_tol=1e-13)
    assert math.isclose(log.drift, b.drift / value - b.variance / (2 * value**2), rel_tol=1e-12)
    np.testing.assert_allclose(log.diffusion, b.diffusion / value, rtol=1e-13)


def test_spectral_functions_are_sums_of_singular_values():
    A, G, D = process(complex_=True)
    ours = spectral_ito(SpectralFunction.nuclear_norm(), A, G, D)
    each = [sigma_ito(A, G, D, k=k) for k in range(3)]
    for field in ("value", "first_order", "curvature", "diffusion"):
        expected = sum(getattr(b, field) for b in each)
        np.testing.assert_allclose(getattr(ours, field), expected, rtol=1e-11, atol=1e-12)
    log_det = spectral_ito(SpectralFunction.log_det(), A, G, D)
    logs = [b.log() for b in each]
    for field in ("value", "first_order", "curvature", "diffusion"):
        expected = sum(getattr(b, field) for b in logs)
        np.testing.assert_allclose(getattr(log_det, field), expected, rtol=1e-11, atol=1e-12)


SAMPLES, HORIZON = 20_000, 1e-6
TIED = [2.0, 2.0, 1.0]
QUANTITIES = {
    # from the descending singular values (..., 3) of the samples, and by Ito's formula
    "top": ([3.0, 2.0, 1.0], lambda s: s[..., 0], lambda *a: sigma_ito(*a)),
    "log of the top": ([3.0, 2.0, 1.0], lambda s: np.log(s[..., 0]), lambda *a: sigma_ito(*a).log()),
    "bottom": ([3.0, 2.0, 1.0], lambda s: s[..., 2], lambda *a: sigma_ito(*a, k=2)),
    "tied cluster": (TIED, lambda s: (s[..., 0] + s[..., 1]) / 2, lambda *a: sigma_ito(*a, k=(0, 1))),
    "nuclear norm": (TIED, lambda s: s.sum(-1), lambda *a: spectral_ito(SpectralFunction.nuclear_norm(), *a)),
    "log-determinant": (
        TIED,
        lambda s: np.log(s).sum(-1),
        lambda *a: spectral_ito(SpectralFunction.log_det(), *a),
    ),
    "entropy": (
        TIED,
        lambda s: -(_p(s) * np.log(_p(s))).sum(-1),
        lambda *a: spectral_ito(SpectralFunction.von_neumann_entropy(), *a),
    ),
}


def _p(s):
    return s**2 / (s**2).sum(-1, keepdims=True)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_simulated_process(quantity):
    """Mean and variance after a short time, with antithetic noise, within four standard errors."""
    spectrum, phi, ito = QUANTITIES[quantity]
    rng = np.random.default_rng(11)
    A = with_spectrum(rng, 3, 4, spectrum)
    G = A @ A.T @ A / 4  # moves every quantity
    D = np.concatenate([units(3, 4), rng.standard_normal((2, 3, 4))])
    b = ito(A, G, D)
    dW = math.sqrt(HORIZON) * rng.standard_normal((SAMPLES, len(D)))
    noise = np.tensordot(dW, D, 1)
    up, down = (phi(np.linalg.svd(A + G * HORIZON + sign * noise, compute_uv=False)) for sign in (1, -1))
    drifts = ((up + down) / 2 - phi(np.array(spectrum))) / HORIZON
    error = drifts.std() / math.sqrt(SAMPLES)
    assert abs(drifts.mean() - b.drift) < 4 * error
    # the simulation is good enough to see either part of the drift
    assert min(abs(b.curvature), abs(b.first_order)) > 6 * error
    squares = ((up - down) / 2) ** 2 / HORIZON
    error = squares.std() / math.sqrt(SAMPLES)
    assert abs(squares.mean() - b.variance) < 4 * error
    assert b.variance > 50 * error


def test_formula_along_paths_of_an_equation():
    """For dA = (C - A) dt + B A dW_1 + E dW_2 the value minus its integrated drift is a martingale."""
    rng = np.random.default_rng(12)
    C, E = rng.standard_normal((2, 3, 4)) / 2
    B = rng.standard_normal((3, 3)) / 2
    paths, steps, dt = 1000, 20, 2e-3
    A = np.broadcast_to(with_spectrum(rng, 3, 4, [3.0, 2.0, 1.0]), (paths, 3, 4))
    f = SpectralFunction.von_neumann_entropy()
    rest = {"sigma": -sigma_ito(A, C - A, E[None]).value, "entropy": -f.value(A)}
    bent = dict.fromkeys(rest, 0.0)
    for _ in range(steps):
        G, D = C - A, np.stack([B @ A, np.broadcast_to(E, A.shape)], axis=1)
        dW = math.sqrt(dt) * rng.standard_normal((paths, 2))
        for name, b in (("sigma", sigma_ito(A, G, D)), ("entropy", spectral_ito(f, A, G, D))):
            rest[name] = rest[name] - b.drift * dt - (b.diffusion * dW).sum(-1)
            bent[name] = bent[name] + b.curvature * dt
        A = A + G * dt + np.einsum("pj,pjmn->pmn", dW, D)
    rest["sigma"] = rest["sigma"] + np.linalg.svd(A, compute_uv=False)[:, 0]
    rest["entropy"] = rest["entropy"] + f.value(A)
    for name, x in rest.items():
        error = x.std() / math.sqrt(paths)
        assert abs(x.mean()) < 4 * error, name
        assert abs(bent[name].mean()) > 10 * error, name


def test_stacks():
    rng = np.random.default_rng(1)
    A, G = rng.standard_normal((2, 5, 3, 4))
    D = rng.standard_normal((2, 3, 4))
    f = SpectralFunction.effective_rank()
    for ito in (sigma_ito, lambda *a: sigma_ito(*a, k=(1, 2)), lambda *a: spectral_ito(f, *a)):
        every = ito(A, G, D)
        assert every.diffusion.shape == (5, 2)
        assert every.variance.shape == every.value.shape == every.log().drift.shape == (5,)
        per_matrix = ito(A, G, np.broadcast_to(D, (5, 2, 3, 4)))
        for i in range(5):
            one = ito(A[i], G[i], D)
            for field in ("value", "drift", "curvature", "diffusion", "variance"):
                np.testing.assert_allclose(getattr(every, field)[i], getattr(one, field), rtol=1e-10, atol=1e-12)
                np.testing.assert_allclose(getattr(per_matrix, field)[i], getattr(one, field), rtol=1e-10, atol=1e-12)
        several = ito(A[0], G, D)  # one matrix, several drifts
        assert several.diffusion.shape == (5, 2)
        assert several.curvature.shape == (5,)
        np.testing.assert_allclose(several.first_order[3], ito(A[0], G[3], D).first_order, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("asarray", [torch.as_tensor, array_api_strict.asarray], ids=["torch", "strict"])
@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
def test_array_libraries(asarray, complex_):
    arrays = process(complex_=complex_)
    f = SpectralFunction.stable_rank()
    for ito in (sigma_ito, lambda *a: sigma_ito(*a, k=(0, 1)), lambda *a: spectral_ito(f, *a)):
        expected, found = ito(*arrays), ito(*(asarray(x) for x in arrays))
        for b, c in ((expected, found), (expected.log(), found.log())):
            for field in ("value", "drift", "curvature", "first_order", "diffusion", "variance"):
                assert type(getattr(c, field)) is type(asarray(arrays[0]))
                np.testing.assert_allclose(np.asarray(getattr(c, field)), getattr(b, field), rtol=1e-10, atol=1e-12)
        assert isinstance(expected.drift, np.float64)
        assert isinstance(expected.variance, np.float64)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_extreme_scales(scale):
    """log phi of the scaled process has the same coefficients."""
    A, G, D = process()
    for ito in (sigma_ito, lambda *a: spectral_ito(SpectralFunction.nuclear_norm(), *a)):
        one, other = ito(A, G, D), ito(scale * A, scale * G, scale * D)
        assert math.isclose(other.drift, scale * one.drift, rel_tol=1e-11)
        assert math.isclose(other.log().drift, one.log().drift, rel_tol=1e-10)
        np.testing.assert_allclose(other.log().diffusion, one.log().diffusion, rtol=1e-11)


def test_prepared_triplets():
    A, G, D = process(complex_=True)
    triplet, f = singular_triplet(A, 1), SpectralFunction.nuclear_norm()
    assert math.isclose(sigma_ito(triplet, G, D).drift, sigma_ito(A, G, D, k=1).drift, rel_tol=1e-12)
    assert math.isclose(spectral_ito(f, triplet, G, D).drift, spectral_ito(f, A, G, D).drift, rel_tol=1e-12)
    with pytest.raises(TypeError, match="of one singular value"):
        sigma_ito(singular_triplet(A, [0, 1]), G, D)
    with pytest.raises(TypeError, match="of a single matrix"):
        sigma_ito(singular_triplet(np.stack([A, A])), G, D)


def test_large_matrix():
    """The top value of a matrix large enough for the Gram factorisation."""
    A, G, D = process(80, 100)
    b = sigma_ito(A, G, D)
    expected = [sigma_series(A, D_j, 2).coefficients for D_j in D]
    np.testing.assert_allclose(b.diffusion, [c[1] for c in expected], rtol=1e-11)
    assert math.isclose(b.curvature, sum(c[2] for c in expected), rel_tol=1e-11)


def test_bad_input():
    A, G, D = process()
    with pytest.raises(ValueError, match=r"expected D of shape \(\.\.\., J, m, n\).*D\[None\]"):
        sigma_ito(A, G, D[0])
    for several in ([0, 1], range(2), np.array([0, 1])):
        with pytest.raises(TypeError, match=r"tuple of ints for the mean of a cluster, got the (list|range|ndarray)"):
            sigma_ito(A, G, D, k=several)
    with pytest.raises(ValueError, match=r"expected D of shape \(\.\.\., 3, 4\)"):
        sigma_ito(A, G, D[..., :3])
    f = SpectralFunction.nuclear_norm()
    with pytest.raises(ValueError, match=r"expected D of shape \(\.\.\., 3, 4\)"):
        spectral_ito(f, A, G, D[..., :3])
    with pytest.raises(ValueError, match=r"expected G of shape \(\.\.\., 3, 4\)"):
        spectral_ito(f, A, G.T, D)
    tied = np.eye(3, 4)
    with pytest.raises(DegenerateSingularValueError):
        sigma_ito(tied, G, D)
    with pytest.raises(ZeroSingularValueError):
        sigma_ito(np.ones((3, 4)), G, D, k=2)
    with pytest.raises(ZeroSingularValueError):
        spectral_ito(f, np.ones((3, 4)), G, D)
    log_det = spectral_ito(SpectralFunction.log_det(), 0.1 * A, G, D)
    with pytest.raises(SpecpertError, match="expected a positive quantity"):
        log_det.log()
