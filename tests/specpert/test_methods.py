"""The ways to a triplet and to its resolvent agree: thin SVD, Gram matrix, Lanczos; compiled and plain kernels."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sparse
import torch
from oracles import taylor_mpmath, with_spectrum
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from specpert import (
    ConvergenceError,
    DegenerateSingularValueError,
    NonFiniteError,
    SigmaHessian,
    Status,
    ZeroSingularValueError,
    kato_temple,
    sigma_derivative,
    sigma_ito,
    sigma_series,
    singular_triplet,
)
from specpert._kernels import agnostic, cpu


def pair(shape, complex_=False, seed=0):
    rng = np.random.default_rng([seed, *shape])
    A, H = rng.standard_normal((2, *shape)) + (1j * rng.standard_normal((2, *shape)) if complex_ else 0)
    return A, H / np.linalg.norm(H, 2)


def assert_same(found, expected, d):
    weights = (d / 2) ** np.arange(len(expected)) / d
    assert np.abs((found - expected) * weights).max() <= 1e-12 * abs(expected[0]) / d


SHAPES = [(70, 70), (70, 160), (160, 70), (5, 4), (4, 5), (3, 3), (3, 400), (400, 5), (256, 300), (300, 260)]


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_is_the_svd(shape, complex_):
    A, H = pair(shape, complex_)
    gram, svd = (singular_triplet(A, method=method) for method in ("gram", "svd"))
    assert math.isclose(gram.sigma, svd.sigma, rel_tol=1e-14)
    # of a larger matrix the next value is estimated from above
    assert (1 - (1e-10 if min(shape) < 256 else 1e-6)) * svd.gap <= gram.gap <= (1 + 1e-10) * svd.gap
    one, two = sigma_series(gram, H, 8, vectors=True), sigma_series(svd, H, 8, vectors=True)
    assert_same(one.coefficients, two.coefficients, svd.gap)
    # signs and phases are free: compare what does not depend on them
    np.testing.assert_allclose(
        one.left[:, 3, None] @ one.left[:, :1].conj().T, two.left[:, 3, None] @ two.left[:, :1].conj().T, atol=1e-8
    )
    assert math.isclose(one.radius, two.radius, rel_tol=1e-9 if min(shape) < 256 else 1e-6)
    assert one.remainder(one.radius / 3) < 1.01 * two.remainder(one.radius / 3) + 1e-12
    directions = [H, H[::-1], H[:, ::-1]]
    mixed = [sigma_derivative(t, 3, directions=directions) for t in (gram, svd)]
    assert math.isclose(*mixed, rel_tol=1e-8)


@pytest.mark.parametrize("shape", [(64, 66), (800, 20), (4, 256)], ids=str)
def test_large_and_long_matrices_need_no_svd(shape, monkeypatch):
    A, H = pair(shape)
    expected = sigma_derivative(singular_triplet(A, method="svd"), 3, directions=H)
    monkeypatch.setattr(np.linalg, "svd", None)
    assert math.isclose(sigma_derivative(A, 3, directions=H), expected, rel_tol=1e-9)
    with pytest.raises(TypeError, match="not callable"):
        singular_triplet(A[:20, :20])  # the SVD was indeed taken away


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (70, 90), (90, 70), (256, 270), (300, 260)], ids=str)
def test_diagonal_of_the_hessian_from_one_side(shape, complex_):
    A, _ = pair(shape, complex_)
    one, all_ = (SigmaHessian(singular_triplet(A, method=method)).diagonal() for method in ("gram", "svd"))
    np.testing.assert_allclose(one, all_, rtol=1e-9, atol=1e-11 * np.abs(all_).max())
    host = torch.as_tensor(A)
    kept = SigmaHessian(singular_triplet(host, method="gram")).diagonal()
    assert isinstance(kept, torch.Tensor)
    np.testing.assert_allclose(kept, one)
    with pytest.raises(TypeError, match="dense array"):
        SigmaHessian(singular_triplet(sparse.random_array((60, 70), density=0.2, rng=0))).diagonal()


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shape", [(256, 270), (300, 260)], ids=str)
@pytest.mark.parametrize("start", ["exact", "near", "far", "second", "orthogonal to all but the last"])
def test_a_warm_start_changes_nothing_but_the_time(shape, complex_, start):
    A, H = pair(shape, complex_)
    svd = singular_triplet(A, method="svd")
    Vh = np.linalg.svd(A, full_matrices=False)[2].conj()
    starts = {
        "exact": svd.v,
        "near": svd.v + 1e-2 * H[0],
        "far": svd.v + Vh.sum(0),
        "second": Vh[1],
        "orthogonal to all but the last": Vh[-1],
    }
    warm = singular_triplet(A, v0=starts[start])
    assert math.isclose(warm.sigma, svd.sigma, rel_tol=1e-14)
    assert (1 - 1e-6) * svd.gap <= warm.gap <= (1 + 1e-10) * svd.gap
    assert_same(sigma_series(warm, H, 6).coefficients, sigma_series(svd, H, 6).coefficients, svd.gap)
    G = np.stack([H, H[::-1]])
    np.testing.assert_allclose(SigmaHessian(warm).quadratic(G), SigmaHessian(svd).quadratic(G), rtol=1e-10)


@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("degrees", [3, 10, 20, 30, 33, 38, 43, 44.9, 60])
def test_a_start_between_the_two_largest(degrees, gap):
    """The first factorisation proves that a vector up to 45 degrees away is alone; it does not make it accurate."""
    s = np.append([1.0, 1.0 - gap], np.linspace(1.0 - 1.01 * gap, 0.1, 258))
    A = with_spectrum(np.random.default_rng(1), 260, 270, s)
    _, _, Vh = np.linalg.svd(A)
    noise = pair(A.shape)[0][0]
    angle = math.radians(degrees)
    for start in (math.cos(angle) * Vh[0] + math.sin(angle) * Vh[1], Vh[0] + math.tan(angle) / 20 * noise):
        warm = singular_triplet(A, v0=start)
        assert abs(warm.v @ Vh[0]) > 1 - 1e-12 / gap
        assert math.isclose(warm.sigma, 1.0, rel_tol=1e-14)
        assert (1 - 1e-3) * gap < warm.gap < (1 + 1e-5) * gap  # the next value is estimated from above


def test_a_start_that_vanishes_is_no_start():
    A = np.zeros((260, 300))
    A[:, :260] = np.diag(np.linspace(2.0, 1.0, 260))
    assert singular_triplet(A, v0=np.eye(300)[-1]).sigma == pytest.approx(2.0)
    with pytest.raises(NonFiniteError, match="finite"):
        singular_triplet(A, v0=np.full(300, np.nan))
    with pytest.raises(ZeroSingularValueError):
        singular_triplet(0 * A, v0=np.ones(300))


@pytest.mark.parametrize("gap", [1e-4, 1e-6, 1e-9, 0.0])
def test_a_close_pair_of_a_large_matrix(gap):
    s = np.append([1.0, 1.0 - gap], np.linspace(0.9, 0.1, 258))
    A = with_spectrum(np.random.default_rng(0), 260, 270, s)
    H = pair(A.shape)[1]
    second = np.linalg.svd(A)[2][1]
    for v0 in (None, second, np.ones(270)):
        if gap == 0:
            with pytest.raises(DegenerateSingularValueError):
                singular_triplet(A, v0=v0)
            continue
        triplet, svd = singular_triplet(A, v0=v0), singular_triplet(A, method="svd")
        assert math.isclose(triplet.gap, svd.gap, rel_tol=1e-5)
        assert_same(sigma_series(triplet, H, 4).coefficients, sigma_series(svd, H, 4).coefficients, 1e-2 * svd.gap)


def test_auto_takes_the_gram_matrix_for_the_top_of_a_large_matrix():
    A, H = pair((80, 90))
    assert singular_triplet(A)._svd is None
    assert singular_triplet(A, k=1)._svd is not None
    assert singular_triplet(A[:20])._svd is not None
    on_torch = singular_triplet(torch.as_tensor(A))
    assert on_torch._svd is None
    assert isinstance(on_torch.u, torch.Tensor)
    G = np.random.default_rng(1).standard_normal((3, *A.shape))
    for dtype, rtol in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        a, h, g = (torch.as_tensor(x).to(dtype) for x in (A, H, G))
        series = sigma_series(a, h, 4)
        assert series.coefficients.dtype == dtype
        np.testing.assert_allclose(series.coefficients, sigma_series(A, H, 4).coefficients, rtol=rtol, atol=rtol)
        np.testing.assert_allclose(
            SigmaHessian(singular_triplet(a)).quadratic(g), SigmaHessian(A).quadratic(G), rtol=10 * rtol
        )
        np.testing.assert_allclose(SigmaHessian(singular_triplet(a)) @ g[0], SigmaHessian(A) @ G[0], atol=rtol)
        assert float(series.remainder(series.radius / 4)) < 1e-2
    complex_torch = singular_triplet(torch.as_tensor(A + 1j * H))
    assert complex_torch.u.dtype == torch.complex128
    assert_same(
        sigma_series(A, H, 6).coefficients,
        sigma_series(singular_triplet(A, method="svd"), H, 6).coefficients,
        singular_triplet(A).gap,
    )


def test_gram_in_float32_is_more_accurate_than_its_input():
    A, H = pair((200, 300))
    A32, H32 = A.astype(np.float32), H.astype(np.float32)
    series = sigma_series(A32, H32, 4)
    assert series.coefficients.dtype == np.float32
    exact = sigma_series(A32.astype(float), H32.astype(float), 4).coefficients
    assert np.abs(series.coefficients - exact).max() <= 1e-6 * np.abs(exact).max()
    triplet = singular_triplet(A32)
    assert triplet.u.dtype == triplet.v.dtype == np.float32
    assert isinstance(triplet.sigma, np.float32)
    assert sigma_series(triplet, H, 2).coefficients.dtype == np.float64
    assert sigma_series(triplet, H32, 2).coefficients.dtype == np.float32


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shape", [(70, 90), (90, 70)], ids=str)
def test_gram_of_a_cluster_is_the_svd(shape, complex_):
    rng = np.random.default_rng([*shape, complex_])
    values = [5.0, 5.0, 4.99, *np.linspace(3.0, 0.0, 67)]
    A, H = with_spectrum(rng, *shape, values, complex_), pair(shape, complex_)[1]
    one = sigma_series(A, H, 6, k=(0, 1, 2), vectors=True)
    assert one._certificate.triplet._svd is None
    # one matrix of a stack is decomposed by the SVD
    two = sigma_series(A[None], H[None], 6, k=(0, 1, 2), vectors=True)
    assert two._certificate.triplet._svd is not None
    assert_same(one.mean, two.mean[0], one.gap)
    assert math.isclose(one.gap, two.gap[0], rel_tol=1e-10)
    truth = np.linalg.svd(A + 0.1 * H, compute_uv=False)[:3]
    np.testing.assert_allclose(one.values(0.1), truth, atol=1e-7)
    on_torch = sigma_series(torch.as_tensor(A), torch.as_tensor(H), 6, k=(0, 1, 2))
    np.testing.assert_allclose(on_torch.mean, one.mean, atol=1e-12)
    derivative = sigma_derivative(A, 2, k=1, directions=H, on_degenerate="cluster")
    pair_mean = sigma_series(A, H, 2, k=(0, 1)).mean[2]
    assert math.isclose(derivative, 2 * pair_mean, rel_tol=1e-9)


def test_asked_for_by_name_gram_says_of_ties_and_zeros_what_the_svd_says():
    for values in ([2.0, 2.0, *np.linspace(1, 0.1, 300)], [2.0, 2.0, 1.0]):
        with pytest.raises(DegenerateSingularValueError, match=r"\(0, 1\) are tied"):
            singular_triplet(np.diag(values), method="gram")
    with pytest.raises(ZeroSingularValueError):
        singular_triplet(np.zeros((3, 3)), method="gram")
    with pytest.raises(ConvergenceError, match=r"got a gap of .* use method='svd'"):
        singular_triplet(np.diag([1 + 1e-14, 1.0, 0.5]), method="gram")


def test_gram_leaves_ties_and_zeros_to_the_svd():
    A = np.eye(70)
    with pytest.raises(DegenerateSingularValueError, match="are tied"):
        singular_triplet(A)
    A[0, 0] = 1 + 1e-9
    triplet = singular_triplet(A)
    assert math.isclose(triplet.gap, 1e-9, rel_tol=1e-5)
    assert triplet.status is Status.CLOSE_PAIR
    with pytest.raises(ZeroSingularValueError):
        singular_triplet(np.zeros((70, 70)))
    with pytest.raises(ValueError, match="method='gram'"):
        singular_triplet(A, k=1, method="gram")
    with pytest.raises(ValueError, match=r"method to be 'auto', .* or 'lanczos', got 'qr'"):
        singular_triplet(A, method="qr")


@pytest.mark.parametrize("shape", [(8, 9), (9, 8)], ids=str)
def test_hessian_and_dense_tensors_without_an_svd(shape):
    A = pair(shape)[0]
    gram = singular_triplet(A, method="gram")
    for order in (1, 2, 3):
        np.testing.assert_allclose(sigma_derivative(gram, order), sigma_derivative(A, order), atol=1e-8)
    G = np.random.default_rng(0).standard_normal((7, *shape))
    one, two = SigmaHessian(gram), SigmaHessian(A)
    np.testing.assert_allclose(one.quadratic(G), two.quadratic(G), rtol=1e-10)
    assert math.isclose(one.quadratic(G[0]), two.quadratic(G[0]), rel_tol=1e-10)
    np.testing.assert_allclose(one @ G, two @ G, atol=1e-10)
    np.testing.assert_allclose(one @ G[0], two @ G[0], atol=1e-10)
    np.testing.assert_allclose(one.eigenvalues(), two.eigenvalues(), rtol=1e-10)
    assert math.isclose(one.trace(), two.trace(), rel_tol=1e-12)


def operators(A):
    """The same matrix as everything that only multiplies."""
    return {"csr": sparse.csr_array(A), "coo": sparse.coo_matrix(A), "operator": aslinearoperator(A)}


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("kind", ["csr", "coo", "operator"])
@pytest.mark.parametrize("shape", [(120, 80), (80, 120)], ids=str)
@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
def test_lanczos_is_the_svd(shape, kind, k, complex_):
    A, H = pair(shape, complex_)
    A[np.abs(A) < 1.0] = 0
    dense = sigma_series(A, [H, 0.5 * H], 5, k=k)
    for B in (H, operators(H)[kind]):
        found = sigma_series(operators(A)[kind], [B, 0.5 * B], 5, k=k)
        assert_same(found.coefficients, dense.coefficients, dense.gap)
        assert 0.8 * dense.gap < found.gap <= dense.gap * (1 + 1e-8)  # the next value is bounded from above
        # a LinearOperator has its norm estimated, a sparse one bounded: the radius is never larger
        assert 0.1 * dense.radius < found.radius <= dense.radius * (1 + 1e-6)
        x = found.radius / 2
        truth = np.linalg.svd(A + x * H + 0.5 * x * x * H, compute_uv=False)[k]
        assert abs(truth - found(x)) <= found.remainder(x)


def test_lanczos_for_a_dense_array_and_warm_start():
    A, _H = pair((90, 100))
    cold = singular_triplet(A, method="lanczos")
    assert math.isclose(cold.sigma, singular_triplet(A).sigma, rel_tol=1e-13)
    products = 0

    def count(x):
        nonlocal products
        products += 1
        return A @ x

    B = LinearOperator(A.shape, matvec=count, rmatvec=lambda y: A.T @ y, dtype=float)
    singular_triplet(B)
    from_cold, products = products, 0
    singular_triplet(B, v0=cold.v)
    assert products < from_cold
    with pytest.raises(ValueError, match=r"v0 of shape \(100,\)"):
        singular_triplet(B, v0=cold.u)


def test_a_triplet_nearby_as_start_of_lanczos():
    A = sparse.csr_array(np.diag(np.linspace(1.0, 2.0, 100))[:60])
    near = singular_triplet(A)
    assert math.isclose(singular_triplet(1.01 * A, v0=near).sigma, 1.01 * near.sigma, rel_tol=1e-13)
    with pytest.raises(ValueError, match=r"the triplet k = 0 of a matrix \(60, 99\), got k = 0 of \(60, 100\)"):
        singular_triplet(A[:, 1:], v0=near)


def test_small_operators_are_decomposed():
    A, H = pair((6, 5))
    for B in operators(A).values():
        np.testing.assert_allclose(sigma_series(B, H, 4, k=1).coefficients, sigma_series(A, H, 4, k=1).coefficients)
    np.testing.assert_allclose(sigma_derivative(sparse.csr_array(A), 2), sigma_derivative(A, 2))


def test_sparse_direction_of_a_dense_matrix():
    A, H = pair((40, 50))
    np.testing.assert_allclose(
        sigma_series(A, sparse.csr_array(H), 4).coefficients, sigma_series(A, H, 4).coefficients, atol=1e-10
    )
    np.testing.assert_allclose(
        sigma_series(singular_triplet(A), sparse.csr_array(H), 4).coefficients,
        sigma_series(A, H, 4).coefficients,
        atol=1e-10,
    )
    assert sigma_derivative(A, 2, directions=[H, sparse.csr_array(H)]) == pytest.approx(
        sigma_derivative(A, 2, directions=H), rel=1e-10
    )


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_lanczos_scales(scale):
    A, H = pair((60, 50))
    one, scaled = sigma_series(sparse.csr_array(A), H, 4), sigma_series(sparse.csr_array(scale * A), scale * H, 4)
    assert_same(scaled.coefficients / scale, one.coefficients, one.gap)


def test_iterative_errors():
    A, H = pair((60, 50))
    B = sparse.csr_array(A)
    with pytest.raises(TypeError, match="LinearOperator with rmatvec"):
        singular_triplet(LinearOperator(A.shape, matvec=lambda x: A @ x))
    with pytest.raises(TypeError, match="expected one index k"):
        singular_triplet(B, k=[0, 1])
    with pytest.raises(ValueError, match=r"H of shape \(60, 50\) like A"):
        sigma_series(B, sparse.csr_array(H.T), 2)
    with pytest.raises(ValueError, match=r"H of shape"):
        sigma_series(B, H.T, 2)
    bad = B.copy()
    bad.data[3] = np.nan
    with pytest.raises(NonFiniteError, match="A to be finite, got nan"):
        singular_triplet(bad)
    with pytest.raises(NonFiniteError, match="products of A"):
        singular_triplet(aslinearoperator(np.where(A[0, 0] == A, np.nan, A)))
    with pytest.raises(ZeroSingularValueError, match="matrix of zeros"):
        singular_triplet(sparse.csr_array((60, 50)))
    with pytest.raises(IndexError, match="k = 50"):
        singular_triplet(B, k=50)
    with pytest.raises(DegenerateSingularValueError):
        singular_triplet(sparse.eye_array(60).tocsr())
    with pytest.raises(TypeError, match="NumPy array beside SciPy operators"):
        sigma_series(B, torch.as_tensor(H), 2)
    with pytest.raises(TypeError, match="method='lanczos'"):
        singular_triplet(torch.as_tensor(A), method="lanczos")


def test_a_solve_that_does_not_converge_says_so():
    rng = np.random.default_rng(3)
    values = np.sort(np.concatenate([[2.0, 1.0, 1 - 1e-6], 1 - 1e-6 - np.geomspace(1e-7, 0.9, 397)]))[::-1]
    A = with_spectrum(rng, 400, 450, list(values))
    triplet = singular_triplet(sparse.csr_array(A), k=0)  # the top value itself is easy
    assert math.isclose(triplet.sigma, 2.0, rel_tol=1e-12)
    with pytest.raises(ConvergenceError, match=r"(Lanczos|conjugate gradients).*method='svd'"):
        sigma_series(sparse.csr_array(A), rng.standard_normal(A.shape), 4, k=1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_bipartite_graph_of_two_million_edges():
    """In a process of its own, with its memory and time bounded."""
    script = """
import time
import numpy as np, scipy.sparse as sparse
from specpert import sigma_series
rng = np.random.default_rng(0)
m, n, edges = 200_000, 100_000, 2_000_000
A = sparse.coo_array((np.ones(edges), (rng.integers(m, size=edges), rng.integers(n, size=edges))), shape=(m, n)).tocsr()
H = A.copy(); H.data = rng.standard_normal(A.nnz)
start = time.perf_counter()
series = sigma_series(A, H, 4)
seconds = time.perf_counter() - start
x = series.radius / 4
moved = sigma_series(A + x * H, H, 0).coefficients[0]
assert abs(moved - series(x)) <= series.remainder(x), (moved, series(x), series.remainder(x))
assert seconds < 60, seconds
# the peak of this program; getrusage would count that of the process it was forked from
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
assert peak < 2 * 1024**2, peak
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


# --- kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2, 3, 6, 7])
@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (5, 5), (1, 4), (4, 1), (1, 1)], ids=str)
def test_compiled_kernel_is_the_plain_one(shape, complex_, order):
    rng = np.random.default_rng([order, *shape])
    A, H = rng.standard_normal((2, 3, *shape)) + (1j * rng.standard_normal((2, 3, *shape)) if complex_ else 0)
    U, s, Vh = np.linalg.svd(A, full_matrices=False)
    for k in {0, min(shape) - 1}:
        plain, compiled = np.empty((3, order + 1)), np.empty((3, order + 1))
        agnostic.direction_series(U, s, Vh, H, k, plain)
        cpu.direction_series(U, s, Vh, H, k, compiled)
        for i in range(3):
            d = singular_triplet(A[i], k=k).gap
            assert_same(compiled[i], plain[i], d)


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_compiled_kernel_of_products_in_two_precisions(layout, dtype, columns):
    """Every number of A is exact in float64, so that the products are too, but for the rounding of float64."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((2 * 37, 2 * 41)).astype(dtype) * (1 if dtype == np.float32 else np.complex64(1 + 2j))
    A = {"rows": np.ascontiguousarray(A[::2, ::2]), "columns": A[::2, ::2].copy("F"), "strided": A[::2, ::2]}[layout]
    x = rng.standard_normal((41, columns)).astype(np.result_type(dtype, np.float64))
    start = rng.standard_normal((37, columns)).astype(x.dtype)
    plain, compiled = start.copy(), start.copy()
    agnostic.add_product(A, x, plain)
    cpu.add_product(A, x, compiled)
    exact = start + A.astype(x.dtype) @ x
    for found in (plain, compiled):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
def test_the_fast_way_is_the_general_way(complex_):
    A, H = pair((6, 10), complex_)
    for order in range(1, 7):
        for k in range(6):
            fast = sigma_derivative(A, order, k=k, directions=H)
            general = sigma_derivative(A, order, k=k, directions=H, gap_tol=1e-12)
            assert math.isclose(fast, general, rel_tol=1e-8)
            assert isinstance(fast, np.float64)
    truth = taylor_mpmath(A, H, 0, 3)[3] * 6
    assert math.isclose(sigma_derivative(A, 3, directions=H), truth, rel_tol=1e-11)


def test_the_fast_way_gives_way_where_care_is_needed():
    """Ties, zeros, NaN and extreme sizes go the general way, with its errors and its scaling."""
    A, H = pair((4, 4))
    for bad, error in [(np.eye(4), DegenerateSingularValueError), (np.zeros((4, 4)), ZeroSingularValueError)]:
        with pytest.raises(error):
            sigma_derivative(bad, 2, directions=H)
    for M, D in [(A * np.nan, H), (A, H * np.inf)]:
        with pytest.raises(NonFiniteError):
            sigma_derivative(M, 2, directions=D)
    assert math.isclose(
        sigma_derivative(1e-200 * A, 2, directions=1e-200 * H), 1e-200 * sigma_derivative(A, 2, directions=H)
    )
    with pytest.raises(IndexError):
        sigma_derivative(A, 2, k=4, directions=H)


def test_numba_is_not_imported_for_a_few_calls():
    script = """
import sys, time
start = time.perf_counter()
import specpert
assert time.perf_counter() - start < 5
import numpy as np
A, H = np.random.default_rng(0).standard_normal((2, 4, 5))
specpert.sigma_derivative(A, 2, directions=H); specpert.sigma_series(A, H, 4); specpert.sigma_hessian(A)
for module in ("numba", "torch", "jax", "scipy.sparse.linalg", "pandas", "matplotlib"):
    assert module not in sys.modules, module
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# --- what a careful reader found -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_lanczos_sees_exact_ties(seed):
    rng = np.random.default_rng(seed)
    B = (sparse.random_array((300, 200), density=0.02, rng=rng) > 0).astype(float)
    twice = sparse.block_diag([B, B]).tocsr()  # every value exactly double
    diagonal = sparse.diags_array(np.r_[3, 3, 2.9, np.linspace(2.5, 0.1, 197)]).tocsr()
    mixed = with_spectrum(rng, 100, 110, [3.0, 3.0, *np.linspace(2.6, 0.1, 98)])
    for A in (twice, diagonal, sparse.csr_array(mixed)):
        with pytest.raises(DegenerateSingularValueError):
            singular_triplet(A)


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("copies", [2, 9, 12, 16])
def test_lanczos_finds_all_copies_of_a_value_above(copies, complex_):
    """One start sees few copies of a value, and ARPACK's vectors of complex ones need not be orthogonal."""
    rng = np.random.default_rng(copies)
    for m, n in ((90, 110), (180, 70)):
        values = [*[3.0] * copies, 2.0, 1.7, *rng.uniform(0.01, 1.0, min(m, n) - copies - 2)]
        A = with_spectrum(rng, m, n, sorted(values, reverse=True), complex_)
        H = rng.standard_normal((m, n)) / 20
        for operator in (aslinearoperator(A), sparse.csr_array(A)):
            triplet = singular_triplet(operator, k=copies)
            assert triplet.sigma == pytest.approx(2.0, rel=1e-13)
            assert 0.29 < triplet.gap <= 0.3 + 1e-12
            found = sigma_series(triplet, H, 4).coefficients
            assert found == pytest.approx(sigma_series(A, H, 4, k=copies).coefficients, rel=1e-9)
    diagonal = sparse.diags_array(np.r_[[3.0] * copies, 2.0, 1.7, np.linspace(1, 0.01, 100)]).tocsr()
    assert singular_triplet(diagonal, k=copies).sigma == pytest.approx(2.0, rel=1e-14)


@pytest.mark.parametrize("copies", [3, 4, 6])
def test_no_copy_of_a_value_above_is_missed(copies):
    """Else the index would be that of another value, with vectors that give no sign of it."""
    for seed in range(30):
        s = np.sort(np.random.default_rng(seed).uniform(0.05, 1.0, 80))[::-1]
        s[:copies] = s[copies - 1]
        assert singular_triplet(sparse.diags_array(s).tocsr(), k=copies).sigma == pytest.approx(s[copies], rel=1e-12)
    for lowest in (0.9, 0.95, 0.99, 0.999):
        s = np.r_[np.ones(copies), np.linspace(lowest, 0.1, 60)]
        assert singular_triplet(sparse.diags_array(s).tocsr(), k=copies).sigma == pytest.approx(lowest, rel=1e-12)


@pytest.mark.parametrize("seed", [*range(20), 22, 566, 692])
def test_the_gap_of_a_sparse_array_is_never_too_large(seed):
    s = np.sort(np.random.default_rng(seed).uniform(0.05, 1.0, 130))[::-1]
    for k in (0, 1):
        gap = min([s[k] - s[k + 1], *(s[j] - s[k] for j in range(k))])
        assert 0.98 * gap <= singular_triplet(sparse.diags_array(s).tocsr(), k=k).gap <= gap * (1 + 1e-12)


@pytest.mark.parametrize("small", [1e-3, 1e-5, 2e-6, 1e-8, 1e-12])
def test_small_values_of_sparse_arrays(small):
    """What the Gram matrix cannot tell from its neighbours, or from zero, is refused."""
    for values, k in (([1.0, small, small], 1), ([1.0, 0.9, small, small, small], 2), ([1.0, small, small], 2)):
        A = sparse.csr_array(np.diag([*values, *[0.0] * 60]))
        with pytest.raises((DegenerateSingularValueError, ZeroSingularValueError)):
            singular_triplet(A, k=k)
    gap = singular_triplet(sparse.csr_array(np.diag([1.0, small, *[0.0] * 60]))).gap
    assert 0.98 <= gap <= 1 - small
    if small >= 2e-6:
        A = sparse.csr_array(np.diag([1.0, small, small / 2, *np.zeros(60)]))
        triplet = singular_triplet(A, k=1)
        assert triplet.sigma == pytest.approx(small, rel=1e-3)
        assert 0.4 * small <= triplet.gap <= 0.5 * small * (1 + 1e-3)


def test_warm_start_in_an_invariant_subspace():
    rng = np.random.default_rng(0)
    b, c = (sparse.random_array((40, 40), density=0.2, rng=rng) for _ in range(2))
    A = sparse.block_diag([b, 2 * c]).tocsr()
    v0 = np.r_[np.linalg.svd(b.toarray())[2][0], np.zeros(40)]
    assert math.isclose(singular_triplet(A, v0=v0).sigma, np.linalg.norm(A.toarray(), 2), rel_tol=1e-12)
    for bad, error in [(np.full(80, np.nan), NonFiniteError), (np.zeros(80), NonFiniteError), (v0 + 1j, TypeError)]:
        with pytest.raises(error, match="v0"):
            singular_triplet(A, v0=bad)


def test_rank_one_and_bad_adjoints():
    A = sparse.csr_array(np.outer(np.r_[1.0, np.zeros(59)], np.ones(90)))
    triplet = singular_triplet(A)
    assert math.isclose(triplet.sigma, math.sqrt(90), rel_tol=1e-12)
    assert math.isclose(triplet.gap, math.sqrt(90), rel_tol=1e-6)
    wrong = LinearOperator((60, 90), matvec=lambda x: A @ x, rmatvec=lambda y: np.full(90, np.nan), dtype=float)
    with pytest.raises((ConvergenceError, NonFiniteError)):
        singular_triplet(wrong)


def test_lanczos_hessian_forms_of_many_directions():
    rng = np.random.default_rng(1)
    A, G = rng.standard_normal((50, 60)), rng.standard_normal((3, 50, 60))
    lanczos, svd = SigmaHessian(singular_triplet(sparse.csr_array(A))), SigmaHessian(A)
    np.testing.assert_allclose(lanczos.quadratic(G), svd.quadratic(G), rtol=1e-8)
    np.testing.assert_allclose(lanczos @ G, svd @ G, atol=1e-8)
    B = A[:33, :34]
    np.testing.assert_allclose(sigma_derivative(sparse.csr_array(B), 2), sigma_derivative(B, 2), atol=1e-8)


def test_a_triplet_is_not_asked_for_what_it_does_not_hold():
    A, H = pair((5, 6))
    triplet = singular_triplet(A, k=1)
    for call in (
        lambda: sigma_series(triplet, H, 2, k=2),
        lambda: sigma_derivative(triplet, 1, k=3, directions=H),
        lambda: sigma_series(singular_triplet(A, k=[0, 1]), H, 2, k=(0, 1)),
        lambda: sigma_derivative(triplet, 1, directions=H, gap_tol=0.1),
    ):
        with pytest.raises(ValueError, match="triplet"):
            call()
    assert sigma_derivative(triplet, 2, k=1, directions=H) == pytest.approx(sigma_derivative(A, 2, k=1, directions=H))
    with pytest.raises(ValueError, match="no v0 with method='svd'"):
        singular_triplet(A, v0=A[0], method="svd")
    with pytest.raises(ValueError, match="no v0 with a triplet"):
        singular_triplet(triplet, k=1, v0=A[0])
    with pytest.raises(ValueError, match="dense array for method='svd'"):
        singular_triplet(sparse.csr_array(A), method="svd")
    for gap_tol in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match="0 <= gap_tol < 1"):
            singular_triplet(A, gap_tol=gap_tol)
    with pytest.raises(TypeError, match="same array library"):
        sigma_series(triplet, torch.as_tensor(H), 2)


def test_sparse_arrays_at_the_ends_of_the_range():
    A = sparse.random_array((60, 50), density=0.1, rng=np.random.default_rng(0), format="csr")
    for scale in (1e-310, 1e-300, 1e290):
        dense = np.linalg.norm(A.toarray(), 2)
        assert math.isclose(singular_triplet(A * scale).sigma / scale, dense, rel_tol=1e-6 if scale < 1e-305 else 1e-13)
    family = [A * 1e-300, A * 0]
    found = sigma_series(A, family, 2).coefficients
    np.testing.assert_allclose(found, sigma_series(A.toarray(), [B.toarray() for B in family], 2).coefficients)


def test_sparse_arrays_are_left_as_they_are():
    """SciPy would add up entries that are given twice, in place."""
    data, indices = np.arange(1.0, 121.0), np.repeat(np.arange(60), 2)
    A = sparse.csr_array((data, indices, np.arange(0, 121, 2)), shape=(60, 60))
    before = [x.copy() for x in (A.data, A.indices, A.indptr)]
    H = A.copy()
    assert math.isclose(sigma_series(A, H, 1).radius, sigma_series(A.toarray(), A.toarray(), 1).radius, rel_tol=0.5)
    for B in (A, H):
        for x, y in zip((B.data, B.indices, B.indptr), before, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("scale", [1e-130, 1e-300, 1e130])
def test_enclosures_of_sparse_arrays_at_any_scale(scale):
    A = sparse.csr_array(np.diag(np.arange(40.0, 0.0, -1.0)))
    found = kato_temple(A * scale, A * (1e-3 * scale))
    dense = kato_temple(A.toarray() * scale, A.toarray() * (1e-3 * scale))
    assert math.isclose(found.eps, dense.eps, rel_tol=1e-3)
    assert math.isclose(found.value, dense.value, rel_tol=1e-12)
    assert found.bound < 1e-8 * scale
    assert kato_temple(A, A * 1e200).eps == math.inf


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1.0, 1e160, 1e300])
def test_norms_of_operators_at_any_scale(scale):
    A = sparse.random_array((60, 70), density=0.2, rng=np.random.default_rng(0))
    B = aslinearoperator(A * scale)
    assert math.isclose(sigma_series(B, B, 2).radius, sigma_series(A, aslinearoperator(A), 2).radius, rel_tol=1e-6)


def test_sparse_arrays_in_extended_precision_are_refused():
    if np.dtype(np.longdouble) == np.float64:
        pytest.skip("no extended precision here")
    with pytest.raises(TypeError, match="expected A with a floating or integer dtype, got float128"):
        singular_triplet(sparse.csr_array(np.eye(40).astype(np.longdouble)))


@pytest.mark.parametrize("kind", ["sparse", "operator", "lanczos"])
def test_stacks_of_directions_without_a_decomposition(kind):
    """A triplet that knows only products takes what one of a dense array takes."""
    rng = np.random.default_rng(3)
    S = sparse.random_array((90, 70), density=0.1, rng=rng, format="csr")
    A = S.toarray()
    G = np.stack([step / np.linalg.norm(step, 2) for step in rng.standard_normal((2, 90, 70))])
    exact = singular_triplet(A, method="svd")
    source = {"sparse": S, "operator": aslinearoperator(S), "lanczos": A}[kind]
    triplet = singular_triplet(source, method="lanczos" if kind == "lanczos" else "auto")
    calls = [
        lambda t: sigma_series(t, G, 5).coefficients,
        lambda t: sigma_series(t, [G, G[0]], 4).coefficients,
        lambda t: sigma_derivative(t, 2, directions=G),
        lambda t: sigma_derivative(t, 3, directions=[G, G[0], G]),
        lambda t: kato_temple(t, 1e-3 * G).value,
        lambda t: sigma_ito(t, G[0], G[1:]).drift,
        lambda t: sigma_ito(t, G[0], G).variance,
    ]
    for call in calls:
        found, expected = call(triplet), call(exact)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    if kind == "sparse":
        found, expected = (sigma_series(x, G, 4).coefficients for x in (S, A))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(4, 6), (300, 320)], ids=str)
@pytest.mark.parametrize("method", ["auto", "gram", "lanczos"])
def test_a_start_is_checked_whether_it_is_used_or_not(shape, method):
    A, n = pair(shape)[0], shape[1]
    for v0, error in (
        ("a", TypeError),
        (np.ones(n - 1), ValueError),
        (np.ones((n, 1)), ValueError),
        (np.full(n, np.nan), NonFiniteError),
        (1j * np.ones(n), TypeError),
    ):
        with pytest.raises(error, match="expected"):
            singular_triplet(A, v0=v0, method=method)
    assert math.isclose(singular_triplet(A, v0=[1.0] * n, method=method).sigma, np.linalg.norm(A, 2), rel_tol=1e-12)


def test_large_operators_are_tried_without_overflow():
    S = sparse.random_array((90, 70), density=0.1, rng=np.random.default_rng(0), format="csr")
    large = singular_triplet(aslinearoperator(S) * 1e200)
    assert math.isclose(large.sigma, 1e200 * singular_triplet(S).sigma, rel_tol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_gaps_of_sparse_arrays_are_at_most_one_per_cent_too_small(seed):
    """Also far below the largest value, where one per cent of a square is more of its root."""
    rng = np.random.default_rng(seed)
    s = np.full(40, 3.9e-4)
    s[:3] = 1.0, 0.039, 7.8e-4 * rng.uniform(0.9, 1.1)
    found = singular_triplet(sparse.diags_array(s[rng.permutation(40)]).tocsr(), 1).gap
    assert 0.99 * (s[1] - s[2]) <= found <= s[1] - s[2]
