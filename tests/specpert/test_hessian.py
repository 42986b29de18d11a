"""SigmaHessian against the dense matrix; spectrum, trace and diagonal in closed form."""

import math
import pickle

import numpy as np
import pytest
import scipy.sparse
import torch
from oracles import taylor_mpmath, with_spectrum
from scipy.sparse.linalg import eigsh

from specpert import (
    DegenerateSingularValueError,
    NonFiniteError,
    SigmaHessian,
    sigma_derivative,
    sigma_hessian,
    singular_triplet,
)

CASES = [
    (4, 6, [3.0, 2.0, 1.0, 0.4]),
    (6, 4, [3.0, 2.0, 1.0, 0.4]),
    (4, 4, [3.0, 2.0, 1.0, 0.4]),
    (5, 6, [3.0, 2.0, 1.0]),
    (1, 3, [2.0]),
    (3, 1, [2.0]),
    (1, 1, [2.0]),
]


def case(m, n, values, complex_, k):
    rng = np.random.default_rng([m, n, k])
    A = with_spectrum(rng, m, n, values, complex_)
    G = rng.standard_normal((5, m, n)) + (1j * rng.standard_normal((5, m, n)) if complex_ else 0)
    return A, G


def flat(G):
    """Coordinates of a stack of directions, as the rows of the dense form."""
    return np.stack([G.real, G.imag], axis=-1).reshape(len(G), -1) if np.iscomplexobj(G) else G.reshape(len(G), -1)


table = pytest.mark.parametrize(
    ("A", "G", "k"),
    [
        pytest.param(*case(m, n, values, complex_, k), k, id=f"{m}x{n}-rank{len(values)}-{'CR'[not complex_]}-k{k}")
        for m, n, values in CASES
        for complex_ in (False, True)
        for k in sorted({0, len(values) - 1})
    ],
)


def dense_matrix(A, k):
    D = sigma_hessian(A, k=k)
    side = math.isqrt(D.size)
    return D.reshape(side, side)


@table
def test_quadratic_forms(A, G, k):
    H, D = SigmaHessian(A, k=k), dense_matrix(A, k)
    expected = np.einsum("ia,ab,ib->i", flat(G), D, flat(G))
    np.testing.assert_allclose(H.quadratic(G), expected, rtol=1e-11, atol=1e-12)
    triplet = singular_triplet(A, k=k)
    p, q = G @ triplet.v, np.swapaxes(G.conj(), 1, 2) @ triplet.u
    np.testing.assert_allclose(SigmaHessian(triplet).from_projections(p, q), expected, rtol=1e-11, atol=1e-12)
    assert math.isclose(H.inner(G), expected.sum(), rel_tol=1e-11, abs_tol=1e-12)
    assert math.isclose(H.quadratic(G[0]), expected[0], rel_tol=1e-11, abs_tol=1e-12)
    for g, value in zip(G, expected, strict=True):
        assert math.isclose(sigma_derivative(A, 2, k=k, directions=g), value, rel_tol=1e-11, abs_tol=1e-12)


@table
def test_product(A, G, k):
    H, D = SigmaHessian(A, k=k), dense_matrix(A, k)
    np.testing.assert_allclose(flat(H @ G), flat(G) @ D, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(H.product(G[0]), (H @ G)[0], atol=1e-13)


@table
def test_spectrum_trace_and_diagonal(A, G, k):
    H, D = SigmaHessian(A, k=k), dense_matrix(A, k)
    eigenvalues = np.linalg.eigvalsh(D)
    nonzero = H.eigenvalues()
    full = np.sort(np.concatenate([nonzero, np.zeros(len(D) - len(nonzero))]))
    np.testing.assert_allclose(full, eigenvalues, atol=1e-12)
    assert math.isclose(H.trace(), np.trace(D), rel_tol=1e-12, abs_tol=1e-12)
    np.testing.assert_allclose(H.diagonal().reshape(-1), np.diag(D), atol=1e-12)
    # convexity: positive semidefinite for the largest value only
    assert (eigenvalues.min() > -1e-12) == (k == 0)


@pytest.mark.parametrize("complex_rows", [False, True])
@table
def test_diagonal_along_rows(A, G, k, complex_rows):
    """Along e_p a^T one by one, by the route of any direction; by both factorisations, at any scale."""
    m, n = A.shape
    rng = np.random.default_rng(8)
    rows = rng.standard_normal((3, n)) + (1j * rng.standard_normal((3, n)) if complex_rows else 0)
    H = SigmaHessian(A, k=k)
    directions = np.eye(m)[:, None, :, None] * rows[None, :, None, :]  # (m, J, m, n)
    expected = H.quadratic(directions)
    found = H.diagonal(rows=rows)
    assert found.shape == (m, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(H.diagonal(rows=1e150 * rows) / 1e300, expected, rtol=1e-11, atol=1e-12)
    if k == 0 and min(m, n) > 2:
        gram = SigmaHessian(singular_triplet(A, method="gram"))
        np.testing.assert_allclose(gram.diagonal(rows=rows), expected, rtol=1e-10, atol=1e-11)
    stack = SigmaHessian(np.stack([A, 2 * A, A]).reshape(3, 1, m, n), k=k).diagonal(rows=rows)
    np.testing.assert_allclose(stack, np.stack([expected, expected / 2, expected])[:, None], rtol=1e-11, atol=1e-12)
    if not (complex_rows or np.iscomplexobj(A)):
        np.testing.assert_allclose(H.diagonal(rows=np.eye(n)), H.diagonal(), rtol=1e-12, atol=1e-12)


def test_rows_of_another_length():
    H = SigmaHessian(np.diag([3.0, 2.0, 1.0]))
    with pytest.raises(ValueError, match=r"expected rows of shape \(J, 3\), got \(2, 2\)"):
        H.diagonal(rows=np.eye(2))
    with pytest.raises(NonFiniteError, match="rows"):
        H.diagonal(rows=np.full((1, 3), np.nan))


def test_scipy_operator():
    rng = np.random.default_rng(0)
    A = with_spectrum(rng, 6, 5, [4.0, 3.0, 2.0, 1.0, 0.5])
    H = SigmaHessian(A, k=1)
    operator = H.as_linear_operator()
    assert operator.shape == (30, 30)
    g = rng.standard_normal(30)
    np.testing.assert_allclose(operator @ g, H.dense().reshape(30, 30) @ g, atol=1e-12)
    np.testing.assert_allclose(operator.T @ g, operator @ g, atol=1e-12)
    top = eigsh(operator, k=2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(top), np.sort(H.eigenvalues())[-2:], rtol=1e-10)
    complex_ = SigmaHessian(A + 1j * rng.standard_normal((6, 5)), k=1)
    operator = complex_.as_linear_operator()
    assert operator.shape == (60, 60)
    assert operator.dtype == np.float64
    g = rng.standard_normal(60)
    np.testing.assert_allclose(operator @ g, complex_.dense().reshape(60, 60) @ g, atol=1e-12)
    with pytest.raises(TypeError, match="expected one NumPy matrix for a SciPy operator, got a stack"):
        SigmaHessian(np.stack([A, A])).as_linear_operator()


@pytest.mark.parametrize("shape", [(64, 90), (270, 256), (400, 20)], ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.complex128])
def test_spectrum_of_the_form_without_singular_vectors(shape, dtype):
    rng = np.random.default_rng(9)
    A = with_spectrum(rng, *shape, np.r_[2.0, np.linspace(1.7, 0.1, min(shape) - 1)]).astype(dtype)
    if np.iscomplexobj(A):
        A *= np.exp(1j * np.arange(shape[1]))
    quick = singular_triplet(A, rtol=3e-5)
    assert quick._svd is None
    found, expected = SigmaHessian(quick), SigmaHessian(A.astype(np.result_type(dtype, np.float64)))
    rtol = 1e-12 if dtype != np.float32 else 1e-6
    np.testing.assert_allclose(found.trace(), expected.trace(), rtol=rtol)
    np.testing.assert_allclose(found.eigenvalues(), expected.eigenvalues(), rtol=rtol)


def test_the_spectrum_of_the_form_needs_a_dense_array():
    products = singular_triplet(scipy.sparse.diags_array(np.linspace(1, 3, 60)).tocsr())
    with pytest.raises(TypeError, match="expected a triplet of a dense array"):
        SigmaHessian(products).trace()


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("shape", [(70, 65), (6, 5)], ids=str)
def test_precision_of_results_is_that_of_what_is_given(library, shape):
    A, G = np.random.default_rng(0).standard_normal((2, *shape))
    A = A.astype(np.float32)
    exact = SigmaHessian(A.astype(float))
    form, real, double = SigmaHessian(singular_triplet(library(A))), library(A).dtype, library(G).dtype
    assert form.trace().dtype == form.eigenvalues().dtype == real
    for H, results in ((G.astype(np.float32), real), (G, double), ((G + 1j * G[::-1]).astype(np.complex64), real)):
        given, mixed = library(H), library(H.astype(np.complex128) if np.iscomplexobj(H) else H).dtype
        found = form.quadratic(given)
        assert found.dtype == form.inner(given[None]).dtype == results
        p, q = given @ library(exact.triplet.v.astype(H.dtype)), library(H.conj().T @ exact.triplet.u.astype(H.dtype))
        assert form.from_projections(p, q).dtype == form.diagonal(rows=given[:2]).dtype == results
        assert form.product(given).dtype == (library(np.empty(0, np.complex64)).dtype if np.iscomplexobj(H) else mixed)
        # in the double precision of a Gram matrix, where there is one, and of the direction
        assert math.isclose(found, exact.quadratic(H), rel_tol=1e-12 if results == double and shape[0] > 60 else 1e-5)


def test_complex_rows_of_a_real_matrix_without_all_vectors():
    A, E = torch.randn(70, 65, dtype=torch.float64), torch.randn(2, 65, dtype=torch.complex128)
    found = SigmaHessian(singular_triplet(A)).diagonal(rows=E)
    torch.testing.assert_close(found, SigmaHessian(A).diagonal(rows=E), rtol=1e-10, atol=1e-11)


def test_layouts_of_the_dense_form():
    A = np.random.default_rng(1).standard_normal((3, 2))
    H = SigmaHessian(A)
    np.testing.assert_array_equal(H.dense("vec"), sigma_hessian(A, layout="vec"))
    assert H.shape == (6, 6)


def test_stack_of_matrices():
    rng = np.random.default_rng(2)
    A, G = rng.standard_normal((2, 3, 4, 5))
    H = SigmaHessian(A, k=1)
    for i in range(3):
        one = SigmaHessian(A[i], k=1)
        assert math.isclose(H.quadratic(G)[i], one.quadratic(G[i]), rel_tol=1e-12)
        np.testing.assert_allclose((H @ G)[i], one @ G[i], atol=1e-12)
        np.testing.assert_allclose(H.diagonal()[i], one.diagonal(), atol=1e-12)
        np.testing.assert_allclose(H.eigenvalues()[i], one.eigenvalues(), atol=1e-12)


def test_extreme_scales():
    A, G = np.random.default_rng(3).standard_normal((2, 4, 3))
    one = SigmaHessian(A).quadratic(G)
    for a, g in [(1e-250, 1e-250), (1e250, 1e250), (1.0, 1e150), (1e200, 1e-30)]:
        found = SigmaHessian(a * A).quadratic(g * G)
        expected = math.log(one) + 2 * math.log(g) - math.log(a)
        assert math.isclose(math.log(found) if found > 0 else -math.inf, expected, rel_tol=1e-12)


def test_close_pair_keeps_its_digits():
    """(a + b)^2 / (2 (sigma - s)): no cancellation between the a and b parts when the gap is 1e-9."""
    rng = np.random.default_rng(4)
    A = np.diag([1.0, 1.0 - 1e-9, 0.5])
    G = rng.standard_normal((3, 3))
    G = G - G.T  # antisymmetric: a + b = 0 for every pair, so the form is sum |a - b|^2 / (2 (sigma + s)), gap or none
    expected = sum((2 * G[i, 0]) ** 2 / (2 * (A[0, 0] + A[i, i])) for i in (1, 2))
    assert math.isclose(SigmaHessian(A).quadratic(G), expected, rel_tol=1e-14)


def test_bad_input():
    A = np.random.default_rng(5).standard_normal((3, 4))
    H = SigmaHessian(A)
    with pytest.raises(ValueError, match=r"expected p \(\.\.\., 3\) and q \(\.\.\., 4\)"):
        H.from_projections(np.ones((2, 4)), np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"expected G of shape \(\.\.\., 3, 4\) like A, got \(4, 3\)"):
        H.quadratic(A.T)
    with pytest.raises(TypeError, match="expected one singular value"):
        SigmaHessian(A, k=[0, 1])


def test_factor_is_paired_with_every_matrix_of_a_stack():
    A, F = np.stack([np.diag([2.0, 1]), np.diag([5.0, 1])]), np.random.default_rng(0).standard_normal((2, 2, 2))
    found = SigmaHessian(A).inner(F)
    np.testing.assert_allclose(found, [SigmaHessian(A[i]).inner(F) for i in range(2)])
    with pytest.raises(ValueError, match=r"factor of shape \(M, m, n\)"):
        SigmaHessian(A[0]).inner(F[0])


def test_infinities_are_errors():
    A, G = np.random.default_rng(1).standard_normal((2, 3, 4))
    for call in (
        lambda: SigmaHessian(A * 1e-310).trace(),
        lambda: SigmaHessian(A * 1e-310).product(G),
        lambda: SigmaHessian(A * 1e-300).quadratic(1e10 * G),
    ):
        with pytest.raises(OverflowError, match="float64"):
            call()
    with pytest.raises(NonFiniteError, match="p to be finite"):
        SigmaHessian(A).from_projections(np.full(3, np.nan), np.zeros(4))


def test_errors_cross_process_borders():
    with pytest.raises(DegenerateSingularValueError) as caught:
        SigmaHessian(np.eye(2))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.cluster) == (str(caught.value), (0, 1))


@pytest.mark.parametrize("small", [1e-3, 1e-7, 1e-11])
def test_a_small_value_of_a_real_square_matrix_loses_no_digits(small):
    rng = np.random.default_rng(0)
    A = with_spectrum(rng, 3, 3, [1.0, 0.65, small])
    E = np.eye(9).reshape(9, 3, 3)
    form = {i: 2 * taylor_mpmath(A, E[i], 2, 2)[2] for i in range(9)}
    exact = np.array(
        [[taylor_mpmath(A, E[i] + E[j], 2, 2)[2] - (form[i] + form[j]) / 2 for j in range(9)] for i in range(9)]
    )
    hessian, size = SigmaHessian(A, k=2), np.abs(exact).max()
    products = np.stack([hessian.product(e).reshape(9) for e in E])
    diagonals = hessian.diagonal().reshape(9), np.array([hessian.quadratic(e) for e in E])
    for found in (hessian.dense().reshape(9, 9), products):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-14 * size)
    for found in diagonals:
        np.testing.assert_allclose(found, np.diag(exact), rtol=0, atol=1e-14 * size)


def test_matrix_and_direction_of_any_size():
    """Scaling by powers of two is exact; what overflows or underflows on the way must not matter."""
    A = np.random.default_rng(0).standard_normal((3, 4))
    G = np.round(64 * np.random.default_rng(1).standard_normal((3, 4)))
    hessian = SigmaHessian(A)
    tiny = SigmaHessian(A * 2.0**-1000) @ (G * 2.0**-1070)
    np.testing.assert_array_equal(tiny * 2.0**70, hessian @ G)
    assert SigmaHessian(A * 2.0**-1000).quadratic(G * 2.0**-1000) == hessian.quadratic(G) * 2.0**-1000
    huge = SigmaHessian(A * 2.0**1000) @ (np.ones((3, 4)) * 2.0**1023)
    np.testing.assert_array_equal(huge, (hessian @ np.ones((3, 4))) * 2.0**23)
    stack = np.stack([G, 0.0 * G, 2.0**-1000 * G, 2.0**400 * G])
    np.testing.assert_array_equal(hessian.quadratic(stack)[[0, 1, 3]], [hessian.quadratic(x) for x in stack[[0, 1, 3]]])
    with pytest.raises(NonFiniteError):
        hessian.quadratic(np.full((3, 4), np.inf))
    with pytest.raises(OverflowError):
        hessian.quadratic(2.0**1000 * G)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shape", [(9, 3), (3, 9), (500, 40), (600, 270), (40, 500)], ids=str)
def test_projections_on_some_rows(shape, complex_, library):
    """As with zeros in all others, by the Gram matrix of either side and by an SVD."""
    m, n = shape
    rng = np.random.default_rng(0)

    def random(*size):
        return rng.standard_normal(size) + (1j * rng.standard_normal(size) if complex_ else 0)

    give = np.asarray if library == "numpy" else torch.from_numpy
    A = give(random(m, n))
    for method in ("auto", "svd"):
        hessian = SigmaHessian(singular_triplet(A, method=method))
        u, v = np.asarray(hessian.triplet.u), np.asarray(hessian.triplet.v)
        for count in (0, 1, min(m, 7), m):
            rows = rng.permutation(m)[:count]
            G = np.zeros((5, m, n), u.dtype)
            G[:, rows] = random(5, count, n)
            p, q = G @ v, np.swapaxes(G.conj(), 1, 2) @ u
            found = hessian.from_projections(give(p[:, rows]), give(q), rows=give(rows))
            expected = hessian.from_projections(give(p), give(q))
            np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-12, atol=1e-300)
            assert isinstance(found, type(expected))


def test_rows_of_projections_are_checked():
    hessian = SigmaHessian(np.diag([3.0, 2.0, 1.0]))
    p, q = np.ones(2), np.ones(3)
    for rows, error, match in (
        ([0, 3], ValueError, r"expected rows of A, 0 ... 2, each once, got \[0, 3\]"),
        ([1, 1], ValueError, "each once"),
        ([0.0, 1.0], TypeError, r"expected rows \(J,\) of integers, got float64"),
        ([0], ValueError, r"expected p \(..., 1\)"),
    ):
        with pytest.raises(error, match=match):
            hessian.from_projections(p, q, rows=rows)
