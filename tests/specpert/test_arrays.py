"""One table of libraries and dtypes: same results, same library, device and (by rule) dtype out."""

import array_api_strict
import numpy as np
import pytest
import torch

from specpert import SigmaHessian, sigma_derivative, sigma_hessian, sigma_series, singular_triplet

LIBRARIES = {"numpy": np.asarray, "torch": torch.as_tensor, "strict": array_api_strict.asarray}
libraries = pytest.mark.parametrize("asarray", LIBRARIES.values(), ids=LIBRARIES)


def case(complex_, seed=0):
    rng = np.random.default_rng(seed)
    A, H = rng.standard_normal((2, 4, 6)) + (1j * rng.standard_normal((2, 4, 6)) if complex_ else 0)
    return A, H


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-10, atol=1e-12)


@libraries
@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
def test_every_function_on_every_library(asarray, complex_):
    A, H = case(complex_)
    a, h = asarray(A), asarray(H)
    expected, found = (sigma_series(x, y, 5, k=1, vectors=True) for x, y in ((A, H), (a, h)))
    assert type(found.coefficients) is type(a)
    close(found.coefficients, expected.coefficients)
    close(found.derivatives, expected.derivatives)
    close(found.gap, expected.gap)
    close(found.radius, expected.radius)
    close(found.remainder(0.01), expected.remainder(0.01))
    close(found(0.01), expected(0.01))
    assert type(found.left) is type(found.right) is type(a)
    prepared = sigma_series(singular_triplet(a, k=1), h, 5)
    assert type(prepared.coefficients) is type(a)
    close(prepared.coefficients, expected.coefficients)
    family = sigma_series(a, [h, 0.5 * h], 4)
    close(family.coefficients, sigma_series(A, [H, 0.5 * H], 4).coefficients)
    close(family.radius, sigma_series(A, [H, 0.5 * H], 4).radius)
    several = sigma_series(a, h, 3, k=[0, 2])
    close(several.coefficients, sigma_series(A, H, 3, k=[0, 2]).coefficients)
    cluster = sigma_series(a, h, 3, k=(0, 1))
    close(cluster.mean, sigma_series(A, H, 3, k=(0, 1)).mean)
    close(cluster.values(0.01), sigma_series(A, H, 3, k=(0, 1)).values(0.01))
    for order in (1, 2, 3):
        close(sigma_derivative(a, order), sigma_derivative(A, order))
        close(sigma_derivative(a, order, directions=[h] * order), sigma_derivative(A, order, directions=[H] * order))
    close(sigma_hessian(a, layout="vec"), sigma_hessian(A, layout="vec"))
    ours, theirs = SigmaHessian(A, k=1), SigmaHessian(a, k=1)
    close(theirs.quadratic(h), ours.quadratic(H))
    close(theirs @ h, ours @ H)
    close(theirs.diagonal(), ours.diagonal())
    close(theirs.trace(), ours.trace())
    assert type(theirs @ h) is type(a)


DTYPES = [
    ("bool", "float64"),
    ("int8", "float64"),
    ("int64", "float64"),
    ("float16", "float32"),
    ("bfloat16", "float32"),
    ("float32", "float32"),
    ("float64", "float64"),
    ("complex64", "complex64"),
    ("complex128", "complex128"),
]


@pytest.mark.parametrize(("given", "expected"), DTYPES, ids=[d[0] for d in DTYPES])
def test_dtype_rule(given, expected):
    dtype = getattr(torch, given)
    A = torch.tensor([[3, 1, 0], [0, 1, 1]]).to(dtype)
    H = torch.tensor([[1, 0, 1], [0, 1, 0]]).to(dtype)
    series = sigma_series(A, H, 3)
    real = {"complex64": "float32", "complex128": "float64"}.get(expected, expected)
    assert series.coefficients.dtype == getattr(torch, real)
    assert sigma_derivative(A).dtype == getattr(torch, expected)
    exact = sigma_series(A.to(torch.complex128 if A.is_complex() else torch.float64), H.to(torch.complex128), 3)
    tolerance = 1e-13 if real == "float64" else 1e-5
    torch.testing.assert_close(
        series.coefficients.double(), exact.coefficients, rtol=tolerance, atol=tolerance, check_dtype=False
    )
    if given != "bfloat16":
        assert sigma_series(A.numpy(), H.numpy(), 3).coefficients.dtype == np.dtype(real)


def test_mixed_dtypes_are_promoted():
    A, H = case(False)
    assert sigma_series(A.astype(np.float32), H, 2).coefficients.dtype == np.float64
    both = sigma_series(A, H + 0j, 4).coefficients
    np.testing.assert_allclose(both, sigma_series(A, H, 4).coefficients, atol=1e-13)
    triplet = singular_triplet(A)
    np.testing.assert_allclose(sigma_series(triplet, H + 0j, 4).coefficients, both, atol=1e-13)
    a, h = torch.as_tensor(A), torch.as_tensor(H)
    torch.testing.assert_close(sigma_series(a, h + 0j, 4).coefficients, torch.as_tensor(both), rtol=1e-12, atol=1e-12)


def test_entries_that_track_gradients_are_taken_by_value():
    A, H = (torch.as_tensor(x).requires_grad_() for x in case(False))
    series = sigma_series(A, H, 3)
    assert not series.coefficients.requires_grad
    assert A.grad is None
    assert H.grad is None


def test_numpy_results_are_scalars_not_zero_dimensional_arrays():
    A, H = case(False)
    series = sigma_series(A, H, 2)
    for value in (series.gap, series.radius, series.remainder(0.1), series(0.1), singular_triplet(A).sigma):
        assert isinstance(value, np.float64)
    assert isinstance(sigma_derivative(A, 2, directions=H), np.float64)
    assert isinstance(sigma_derivative(A, 2, directions=[H, H]), np.float64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_results_stay_on_the_device():
    A, H = (torch.as_tensor(x, device="cuda") for x in case(False))
    series = sigma_series(A, H, 4, vectors=True)
    for x in (series.coefficients, series.left, series.gap, series.radius, series.remainder(0.01)):
        assert x.device == A.device
    assert sigma_derivative(A, 3).device == A.device
    torch.testing.assert_close(series.coefficients.cpu(), sigma_series(A.cpu(), H.cpu(), 4).coefficients)
    with pytest.raises(TypeError, match="on the device of A"):
        sigma_series(A, H.cpu(), 2)


def test_torch_views_that_put_off_conjugation():
    A, G = (torch.as_tensor(x) for x in np.random.default_rng(0).standard_normal((2, 70, 80, 2)).view(complex)[..., 0])
    for view, plain in ((A.mH, A.mH.resolve_conj()), (A.conj(), A.conj().resolve_conj()), (A.imag, A.imag.clone())):
        start = torch.ones(view.shape[1], dtype=view.dtype, requires_grad=True)
        torch.testing.assert_close(singular_triplet(view, v0=start).sigma, singular_triplet(plain).sigma)
    assert float(SigmaHessian(A.mH).quadratic(G.mH)) == pytest.approx(float(SigmaHessian(A).quadratic(G)))


@pytest.mark.parametrize("shape", [(5, 7), (70, 80)], ids=str)
def test_torch_hessian_of_wider_directions(shape):
    A, G = np.random.default_rng(0).standard_normal((2, *shape))
    single, double, both = torch.as_tensor(A).float(), torch.as_tensor(G), torch.as_tensor(G + 1j * G[::-1])
    H, exact = SigmaHessian(single), SigmaHessian(single.double())
    torch.testing.assert_close(H.quadratic(double), exact.quadratic(double), rtol=1e-3, atol=0, check_dtype=False)
    torch.testing.assert_close(H @ double, exact @ double, rtol=1e-3, atol=1e-4, check_dtype=False)
    whole = SigmaHessian(single.double() + 0j)
    torch.testing.assert_close(exact.quadratic(both), whole.quadratic(both), rtol=1e-9, atol=0)
    torch.testing.assert_close(exact @ both, whole @ both)
    torch.testing.assert_close(exact.inner(both[None]), whole.inner(both[None]), rtol=1e-9, atol=0)
