"""sigma_derivative, sigma_gradient and sigma_hessian: mixed, dense, layouts, and autograd where autograd is right."""

import itertools
import math

import array_api_strict
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import by_name, orthogonal, reference_cases, taylor_mpmath, with_spectrum

import specpert.derivative
from specpert import (
    DenseSizeError,
    sigma_derivative,
    sigma_gradient,
    sigma_hessian,
    sigma_series,
    singular_triplet,
)


def contract(tensor, directions):
    """The dense derivative applied to directions, one slot after the other."""
    for H in directions:
        entry = H if tensor.ndim % 3 or not np.iscomplexobj(H) else np.stack([H.real, H.imag], axis=-1)
        tensor = np.tensordot(entry, tensor, entry.ndim)
    return float(tensor)


def polarised(A, directions, k):
    """D^n[H_1, ..., H_n] from the derivatives along the sums of signed directions."""
    n, total = len(directions), 0.0
    for signs in itertools.product([1, -1], repeat=n):
        H = sum(s * h for s, h in zip(signs, directions, strict=True))
        total += math.prod(signs) * sigma_series(A, H, n, k=k).coefficients[n]
    return total / 2**n


@pytest.mark.parametrize("case", **by_name(reference_cases("mixed")))
def test_mixed_against_90_digits(case):
    scale = math.prod(np.linalg.norm(H, 2) for H in case["H"]) / singular_triplet(case["A"], case["k"]).gap ** (
        case["order"] - 1
    )
    found = sigma_derivative(case["A"], case["order"], k=case["k"], directions=case["H"])
    assert abs(found - case["value"]) <= 1e-12 * max(abs(case["value"]), 1e-2 * scale)
    dense = sigma_derivative(case["A"], case["order"], k=case["k"])
    assert abs(contract(dense, case["H"]) - case["value"]) <= 1e-12 * max(abs(case["value"]), 1e-2 * scale)


@pytest.mark.parametrize("case", **by_name(reference_cases("series")))
def test_one_direction_is_n_factorial_times_the_series(case):
    for n in range(1, case["order"] + 1):
        found = sigma_derivative(case["A"], n, k=case["k"], directions=case["H"][0]) / math.factorial(n)
        assert abs(found - case["value"][n]) <= 1e-10 * np.abs(case["value"]).max()


@pytest.mark.parametrize("case", **by_name(reference_cases("cluster")))
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_on_degenerate_cluster_is_the_mean(case, order):
    A, H, k = case["A"], case["H"][0], case["k"][0]
    expected = math.factorial(order) * case["value"][order]
    for directions in (H, [H] * order):
        found = sigma_derivative(A, order, k=k, directions=directions, on_degenerate="cluster")
        assert math.isclose(found, expected, rel_tol=1e-11)
    if order <= 2:
        dense = sigma_derivative(A, order, k=k, on_degenerate="cluster")
        assert math.isclose(contract(dense, [H] * order), expected, rel_tol=1e-11)


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("order", [2, 3, 4, 5, 6])
def test_mixed_is_the_polarisation(order, complex_):
    rng = np.random.default_rng([order, complex_])
    A = with_spectrum(rng, 5, 4, [4.0, 2.7, 1.8, 0.6], complex_)
    directions = list(rng.standard_normal((order, 5, 4)) + (1j * rng.standard_normal((order, 5, 4)) if complex_ else 0))
    for k in (0, 2):
        found = sigma_derivative(A, order, k=k, directions=directions)
        expected = polarised(A, directions, k)
        assert math.isclose(found, expected, rel_tol=1e-9)


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_dense_contracts_to_the_mixed_derivative(order, complex_):
    rng = np.random.default_rng([order, complex_])
    for shape in [(2, 3), (3, 2), (2, 2)]:
        A = with_spectrum(rng, *shape, [2.0, 0.8], complex_)
        directions = rng.standard_normal((order, *shape)) + (
            1j * rng.standard_normal((order, *shape)) if complex_ else 0
        )
        for k in (0, 1):
            expected = sigma_derivative(A, order, k=k, directions=list(directions))
            dense = sigma_derivative(A, order, k=k)
            if complex_ and order == 1:
                assert math.isclose(np.vdot(dense, directions[0]).real, expected, rel_tol=1e-12)
                continue
            for H in directions:
                entry = np.stack([H.real, H.imag], axis=-1) if complex_ else H
                dense = np.tensordot(entry, dense, entry.ndim)
            assert math.isclose(dense, expected, rel_tol=1e-10)


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("order", [2, 3])
def test_vec_layout_is_column_major(order, complex_):
    rng = np.random.default_rng(order)
    A = rng.standard_normal((3, 2)) + (1j * rng.standard_normal((3, 2)) if complex_ else 0)
    tensor, vec = sigma_derivative(A, order), sigma_derivative(A, order, layout="vec")
    m, n = A.shape
    for _ in range(20):
        slots = [(rng.integers(m), rng.integers(n), rng.integers(1 + complex_)) for _ in range(order)]
        index = tuple(p + m * q + m * n * part for p, q, part in slots)
        entry = tuple(i for slot in slots for i in (slot if complex_ else slot[:2]))
        assert vec[index] == tensor[entry]
    np.testing.assert_allclose(vec, np.swapaxes(vec, 0, 1), atol=1e-14)


def test_vec_layout_of_the_literature():
    """Order 1 is v (x) u, order 2 the Kronecker form of theory 1.3."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((3, 4))
    U, s, Vh = np.linalg.svd(A)
    k, u, v = 1, U[:, 1], Vh[1]
    gradient = sigma_derivative(A, 1, k=k, layout="vec")
    np.testing.assert_allclose(gradient, np.kron(v, u), atol=1e-14)
    s_left, s_right = np.append(s, []), np.append(s, 0.0)
    H = np.zeros((12, 12))
    for i in range(3):
        if i != k:
            a = np.kron(v, U[:, i])
            H += s[k] / (s[k] ** 2 - s_left[i] ** 2) * np.outer(a, a)
    for j in range(4):
        if j != k:
            b = np.kron(Vh[j], u)
            H += s[k] / (s[k] ** 2 - s_right[j] ** 2) * np.outer(b, b)
    for i in range(3):
        if i != k:
            a, b = np.kron(v, U[:, i]), np.kron(Vh[i], u)
            H += s[i] / (s[k] ** 2 - s[i] ** 2) * (np.outer(a, b) + np.outer(b, a))
    np.testing.assert_allclose(sigma_hessian(A, k=k, layout="vec"), H, atol=1e-13)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)], ids=str)
def test_dense_orders_1_to_3_are_autograd(shape):
    """torch differentiates svdvals rightly where all values differ; there the results agree."""
    A = torch.from_numpy(np.random.default_rng(1).standard_normal(shape))

    def sigma(X):
        return torch.linalg.svdvals(X)[1]

    torch.testing.assert_close(sigma_gradient(A, k=1), torch.func.grad(sigma)(A), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(sigma_hessian(A, k=1), torch.func.hessian(sigma)(A), rtol=1e-10, atol=1e-11)
    third = torch.func.jacfwd(torch.func.hessian(sigma))(A)
    torch.testing.assert_close(sigma_derivative(A, 3, k=1), third, rtol=1e-9, atol=1e-9)


def test_complex_gradient_is_autograd():
    A = torch.from_numpy(np.random.default_rng(2).standard_normal((2, 3, 4)) @ np.eye(4)).to(torch.complex128)
    A = (A[0] + 1j * A[1]).requires_grad_()
    torch.linalg.svdvals(A)[0].backward()
    gradient = sigma_gradient(A)
    torch.testing.assert_close(gradient, A.grad, rtol=1e-12, atol=1e-13)
    assert not gradient.requires_grad


def test_autograd_fails_where_we_do_not():
    """A tie elsewhere in the spectrum: the second derivative of the top value exists, autograd gives NaN or rubbish."""
    rng = np.random.default_rng(4)
    A, H = np.diag([3.0, 1.0, 1.0]), rng.standard_normal((3, 3))
    truth = taylor_mpmath(A, H, 0, 2)[2] * 2
    assert math.isclose(sigma_derivative(A, 2, directions=H), truth, rel_tol=1e-13)
    hessian = torch.func.hessian(lambda X: torch.linalg.svdvals(X)[0])(torch.from_numpy(A)).numpy()
    autograd = contract(hessian, [H, H])
    assert not math.isclose(autograd, truth, rel_tol=1e-6)


def test_stacks_and_several_k():
    A = np.random.default_rng(5).standard_normal((2, 3, 2))
    for order in (1, 2, 3):
        found = sigma_derivative(A, order, k=[1, 0])
        assert found.shape == (2, 2, *(3, 2) * order)
        for i in range(2):
            for j, k in enumerate([1, 0]):
                np.testing.assert_allclose(found[i, j], sigma_derivative(A[i], order, k=k), rtol=1e-9, atol=1e-10)
    H = np.random.default_rng(6).standard_normal((3, 2, 3, 2))
    mixed = sigma_derivative(A, 3, k=(0, 1), directions=list(H))
    assert mixed.shape == (2, 2)
    assert math.isclose(mixed[1, 0], sigma_derivative(A[1], 3, directions=list(H[:, 1])), rel_tol=1e-10)


def test_scale_is_homogeneous_of_degree_1_minus_n():
    rng = np.random.default_rng(7)
    A, H = rng.standard_normal((2, 3, 4))
    for order in (1, 2, 3):
        one = sigma_derivative(A, order, directions=[H] * order)
        for c in (2.0**-60, 2.0**60):
            assert math.isclose(sigma_derivative(c * A, order, directions=[H] * order), c ** (1 - order) * one)
            dense = sigma_derivative(c * A, order)
            np.testing.assert_allclose(dense, c ** (1 - order) * sigma_derivative(A, order), rtol=1e-9, atol=0)


def test_dense_guard_names_bytes_and_alternative(monkeypatch):
    monkeypatch.setattr(specpert.derivative, "MAX_DENSE_BYTES", 1000)
    A = np.random.default_rng(8).standard_normal((3, 4))
    sigma_derivative(A, 1)
    with pytest.raises(DenseSizeError, match=r"at most 1,000 bytes, got order 2 .* 1,152 bytes; give directions"):
        sigma_derivative(A, 2)
    with pytest.raises(MemoryError):
        sigma_hessian(A)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4), st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_mixed_derivative_is_symmetric_and_linear(seed, m, n, order):
    rng = np.random.default_rng(seed)
    r = min(m, n)
    A = orthogonal(rng, m, r) * (1.0 + np.arange(r)[::-1]) @ orthogonal(rng, n, r).T
    directions = list(rng.standard_normal((order, m, n)))
    value = sigma_derivative(A, order, directions=directions)
    size = math.prod(np.linalg.norm(H) for H in directions) * math.factorial(order)
    turned = sigma_derivative(A, order, directions=directions[1:] + directions[:1])
    assert abs(turned - value) <= 1e-12 * size
    extra = rng.standard_normal((m, n))
    total = sigma_derivative(A, order, directions=[directions[0] + 3 * extra, *directions[1:]])
    part = sigma_derivative(A, order, directions=[extra, *directions[1:]])
    assert abs(total - value - 3 * part) <= 1e-11 * size * (1 + 3 * np.linalg.norm(extra))


def test_complex_cluster_mean_of_order_1():
    rng = np.random.default_rng(0)
    C = with_spectrum(rng, 3, 4, [2.0, 2.0, 1.0], complex_=True)
    U, _, Vh = np.linalg.svd(C)
    found = sigma_derivative(C, 1, on_degenerate="cluster")
    np.testing.assert_allclose(found, U[:, :2] @ Vh[:2] / 2, atol=1e-14)
    H = rng.standard_normal((3, 4)) + 1j * rng.standard_normal((3, 4))
    by_direction = sigma_derivative(C, 1, directions=H, on_degenerate="cluster")
    assert math.isclose(np.vdot(found, H).real, by_direction, rel_tol=1e-12)
    for stack in (np.stack([np.eye(2), np.diag([3.0, 1.0])]), [np.eye(2).tolist(), np.diag([3.0, 1.0]).tolist()]):
        with pytest.raises(ValueError, match="one matrix and one k"):
            sigma_derivative(stack, 1, directions=np.eye(2), on_degenerate="cluster")
    for several in ([0, 2], np.array([0, 2]), range(2)):
        with pytest.raises(ValueError, match="one matrix and one k"):
            sigma_derivative(C, 1, k=several, directions=H, on_degenerate="cluster")


def test_high_orders_overflow_with_an_error_only():
    A, H = np.diag([3.0, 1.0]), np.ones((2, 2))
    for order, direction in [(160, 50 * H), (172, 50 * H)]:
        with pytest.raises(OverflowError, match="range of float64"):
            sigma_derivative(A, order, directions=direction)
    with pytest.raises(OverflowError, match="range of float32"):
        sigma_derivative(A.astype("f4"), 40, directions=0.9 * H.astype("f4"))
    # sigma_0 of [[3 + x, x], [x, 1 + x]] is 2 + x + sqrt(1 + x^2); the factorial alone exceeds the floats
    found = sigma_derivative(A, 172, directions=0.1 * H)
    expected = mpmath.factorial(172) * mpmath.binomial(0.5, 86) * mpmath.mpf(0.1) ** 172
    assert math.isclose(found, expected, rel_tol=1e-9)
    assert sigma_derivative(A, np.int64(2), directions=H) == sigma_derivative(A, 2, directions=H)


def test_big_endian_arrays():
    A, H = np.random.default_rng(1).standard_normal((2, 3, 4))
    assert math.isclose(
        sigma_derivative(A.astype(">f8"), 2, directions=H.astype(">f8")), sigma_derivative(A, 2, directions=H)
    )


def test_dense_derivatives_of_a_stack_by_the_standard_alone():
    A = np.random.default_rng(0).standard_normal((2, 3, 2))
    found = sigma_derivative(array_api_strict.asarray(A), 3)
    np.testing.assert_allclose(np.asarray(found), sigma_derivative(A, 3), rtol=1e-12, atol=1e-12)
