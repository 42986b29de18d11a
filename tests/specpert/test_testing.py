"""The checks for users: what they pass, what they refuse, what they say; the random matrices."""

import math
import sys
from fractions import Fraction

import array_api_strict
import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from oracles import published_closed_form, taylor_mpmath, with_spectrum
from scipy.sparse.linalg import aslinearoperator

from specpert import DegenerateSingularValueError, ZeroSingularValueError, sigma_derivative, sigma_series, testing
from specpert.testing import check_certificate, check_derivative, check_series, matrices_with_spectrum

VALUES = [3.0, 2.4, 1.5, 0.6]


def case(shape=(4, 6), complex_=False, seed=0, values=VALUES):
    rng = np.random.default_rng(seed)
    A = with_spectrum(rng, *shape, values, complex_)
    H = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if complex_ else 0)
    return A, H / np.linalg.norm(H, 2)


SERIES = {
    "largest": {},
    "interior": {"k": 2},
    "several": {"k": [0, 3]},
    "cluster": {"k": (0, 1)},
    "digits": {"k": 1, "digits": 40},
    "cluster digits": {"k": (1, 2), "digits": 40},
}


@pytest.mark.parametrize("options", SERIES.values(), ids=SERIES)
@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shape", [(4, 6), (7, 4), (4, 4)], ids=str)
def test_series_passes(shape, complex_, options):
    A, H = case(shape, complex_)
    report = check_series(A, H, 6, **options)
    assert report.orders == tuple(range(7))
    assert all(0 <= e <= t for e, t in zip(report.errors, report.tolerances, strict=True))
    assert report.worst <= 1
    assert ("40 digits" if "digits" in options else "circle") in report.reference
    check_series(A, [H, 0.3 * A, -H], 4, **options)


def test_series_of_a_tied_cluster_and_of_rank_deficient_matrices():
    A, H = case(values=[2.0, 2.0, 1.0, 0.5])
    check_series(A, H, 5, k=(0, 1))
    with pytest.raises(DegenerateSingularValueError):
        check_series(A, H, 5)
    A, H = case((4, 4), values=[2.0, 1.0])
    check_series(A, H, 5, k=1)
    with pytest.raises(ZeroSingularValueError):
        check_series(A, H, 5, k=2)


def test_a_constant_family_and_order_0():
    A, H = case()
    report = check_series(A, 0 * H, 3)
    assert max(report.errors[1:]) < 1e-14
    assert max(report.tolerances) < 1e-10
    assert check_series(A, H, 0).orders == (0,)


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_scaled_matrices(scale):
    A, H = case()
    assert check_series(scale * A, scale * H, 4).worst < 1
    assert check_series(scale * A, H, 2).worst < 1


def test_stacks():
    stack = np.stack([case(seed=i)[0] for i in range(6)]).reshape(2, 3, 4, 6)
    H = case()[1]
    check_series(stack, H, 3)
    check_series(stack, H, 3, k=[1, 2])
    wrong = sigma_series(stack, H, 3).coefficients.copy()
    wrong[1, 2, 3] += 1e-3
    with pytest.raises(AssertionError, match="lam_3"):
        check_series(stack, H, 3, computed=wrong)


LIBRARIES = {"torch": torch.as_tensor, "strict": array_api_strict.asarray, "lists": np.ndarray.tolist}


@pytest.mark.parametrize("convert", LIBRARIES.values(), ids=LIBRARIES)
def test_arrays_of_other_libraries(convert):
    A, H = (convert(x) for x in case())
    assert check_series(A, H, 3).worst < 1
    assert check_certificate(A, H, 3).worst < 1
    assert check_derivative(lambda A, H: sigma_derivative(A, 2, directions=H), A, H, 2).errors == (0.0,)


@pytest.mark.parametrize("dtype", ["float32", "complex64", "bfloat16"])
def test_tolerance_follows_the_dtype_of_the_result(dtype):
    A, H = (torch.as_tensor(x).to(getattr(torch, dtype)) for x in case(complex_=dtype == "complex64"))
    single = check_series(A, H, 2)
    wide = torch.complex128 if A.is_complex() else torch.float64
    double = check_series(A.to(wide), H.to(wide), 2)
    assert single.tolerances[0] == pytest.approx(double.tolerances[0] * 2.0**29, rel=1)
    assert 1e-9 < single.errors[0] < single.tolerances[0]


def test_views_of_torch_that_are_not_carried_out():
    A, H = (torch.as_tensor(1j * x).conj().imag for x in case())
    assert A.is_neg()
    assert check_series(A, H, 3).orders == (0, 1, 2, 3)


OPERATORS = {"sparse": scipy.sparse.csr_array, "operator": aslinearoperator}


@pytest.mark.parametrize("convert", OPERATORS.values(), ids=OPERATORS)
def test_operators(convert):
    A, H = case()
    assert "circle" in check_series(convert(A), convert(H), 4).reference
    big = scipy.sparse.random_array((260, 300), density=0.05, rng=np.random.default_rng(1))
    big += scipy.sparse.coo_array(([4.0, 3.0], ([0, 1], [0, 1])), shape=big.shape)
    D = scipy.sparse.random_array(big.shape, density=0.02, rng=np.random.default_rng(2))
    exact = sigma_series(big.toarray(), D.toarray(), 3).coefficients
    report = check_series(convert(big), convert(D), 3, computed=exact)
    assert report.reference == "samples"
    check_series(convert(big), convert(D), 3)
    check_certificate(convert(big), convert(D), 2, samples=5)
    with pytest.raises(AssertionError, match="lam_2"):
        check_series(convert(big), convert(D), 3, computed=exact * [1, 1, 1 + 1e-4, 1])
    with pytest.raises(TypeError, match="dense matrix"):
        check_series(convert(big), convert(D), 2, computed=exact[:3], digits=30)


# --- what the checks compare with -----------------------------------------------------------------------------------


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize(("digits", "accuracy"), [(None, 1e-12), (50, 1e-15)])
def test_samples_give_the_taylor_coefficients(complex_, digits, accuracy):
    A, H = case(complex_=complex_)
    for k in range(4):
        problem = testing._Problem.make(A, [H], (k,))
        lam, _ = problem.samples(7, digits)
        expected = taylor_mpmath(A, H, k, 7) * problem.r0 ** np.arange(8.0)
        np.testing.assert_allclose(lam, expected, rtol=1e-15, atol=accuracy * expected[0])


RULES = {
    **{f"circle {n}": testing._circle(n) for n in (0, 1, 4, 9)},
    **{f"interval {n}": testing._interval(n, 1e-16, "samples") for n in (0, 1, 4, 9)},
    "fifty digits": testing._interval(6, 1e-50, "samples"),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_bounds_of_the_rules(rule):
    """1 / (1 - t) has the largest coefficients allowed, all one: the truncation bound must cover it."""
    nodes = [complex(t) if isinstance(t, complex) else t for t in rule.nodes]
    for n, row in enumerate(rule.weights):
        found = sum(w * (1 / (1 - t)) for w, t in zip(row, nodes, strict=True))
        noise = sum(abs(w) for w in row)
        rounding = 1e-14 * noise if isinstance(nodes[0], complex) else 0
        assert abs(found - 1) <= rule.truncation[n] * (1 + 1e-6) + rounding
        assert noise <= rule.amplification[n] * (1 + 1e-9)
        for j in range(len(rule.weights)):  # exact on polynomials
            moment = sum(w * t**j for w, t in zip(row, nodes, strict=True))
            if isinstance(moment, Fraction):
                assert moment == (j == n)
            else:
                assert abs(moment - (j == n)) < 1e-12 * max(1, noise)


def test_higher_precision_cuts_off_less():
    assert RULES["fifty digits"].truncation[6] < 1e-16
    assert testing._circle(4).truncation[4] < 1e-16


def test_radius_of_a_family():
    root = testing._radius(0.7, [2.0, 3.0])
    assert math.isclose(2 * root + 3 * root**2, 0.35, rel_tol=1e-12)
    assert testing._radius(0.7, [0.0, 0.0]) == 1.0
    assert math.isclose(testing._radius(0.7, [0.0, 3.0]), math.sqrt(0.35 / 3), rel_tol=1e-12)


@pytest.mark.parametrize("k", range(4))
def test_isolation_distance_is_that_of_the_series(k):
    for A, H in (case(), case((4, 4)), case((4, 4), values=[2.0, 1.5, 1.2, 0.1])):
        assert math.isclose(testing._Problem.make(A, [H], (k,)).d, sigma_series(A, H, 1, k=k).gap, rel_tol=1e-12)
        problem = testing._Problem.make(A, [H, A], (k,))
        assert math.isclose(problem.r0, sigma_series(A, [H, A], 1, k=k).radius, rel_tol=1e-9)


# --- what they refuse -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(6))
def test_every_wrong_order_is_found(n):
    A, H = case()
    good = sigma_series(A, H, 5).coefficients
    tolerance = check_series(A, H, 5).tolerances[n]
    for delta in (3 * tolerance, -3 * tolerance, math.nan, math.inf):
        wrong = good.copy()
        wrong[n] += delta
        with pytest.raises(AssertionError, match=rf"expected lam_{n} = .* got .* order {n}, tolerance"):
            check_series(A, H, 5, computed=wrong)
    inside = good.copy()
    inside[n] += 0.5 * tolerance
    check_series(A, H, 5, computed=inside)
    wrong = good + 3 * tolerance * (np.arange(6) == n)
    check_series(A, H, 5, computed=wrong, factor=10)
    with pytest.raises(AssertionError):
        check_series(A, H, 5, computed=wrong)


def test_message_says_what_is_needed():
    A, H = case()
    with pytest.raises(AssertionError) as info:
        check_series(A, H, 2, computed=sigma_series(A, H, 2).coefficients + np.array([0, 0, 0.125]))
    for part in ("expected lam_2 = ", "got ", "off by 1.250e-01 at order 2", "tolerance", "units", "d = 6.000000e-01"):
        assert part in str(info.value)


def test_published_closed_form_is_refused_at_order_3():
    A, H = case()
    published = np.array([3.0, *(published_closed_form(A, H, 0, n) for n in range(1, 5))])
    check_series(A, H, 2, computed=published[:3])
    with pytest.raises(AssertionError, match="lam_3"):
        check_series(A, H, 4, computed=published)
    for order in (1, 2):
        check_derivative(lambda A, H, n=order: math.factorial(n) * published_closed_form(A, H, 0, n), A, H, order)
    with pytest.raises(AssertionError, match=r"D\^3 sigma_0"):
        check_derivative(lambda A, H: 6 * published_closed_form(A, H, 0, 3), A, H, 3)


def literal_hessian(A, k, null_space=True):
    """Entries of D^2 sigma_k by the sums of theory 1.3, with full U and V; the null-space terms optional."""
    U, s, Vh = np.linalg.svd(A)
    m, n = A.shape
    dense = np.zeros((m, n, m, n))
    size = max(m, n) if null_space else min(m, n)
    values = np.concatenate([s, np.zeros(max(m, n) - len(s))])
    for i in range(size):
        if i == k:
            continue
        a = np.outer(U[:, i], Vh[k]) if i < m else np.zeros((m, n))
        b = np.outer(U[:, k], Vh[i]) if i < n else np.zeros((m, n))
        w = 1 / (s[k] ** 2 - values[i] ** 2)
        dense += w * s[k] * (np.multiply.outer(a, a) + np.multiply.outer(b, b))
        dense += w * values[i] * (np.multiply.outer(a, b) + np.multiply.outer(b, a))
    return dense


@pytest.mark.parametrize("layout", ["tensor", "vec"])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)], ids=str)
def test_hessian_without_its_null_space_is_refused(shape, layout):
    A, H = case(shape, values=VALUES[:3])

    def dense(A, null_space=True):
        D = literal_hessian(A, 1, null_space)
        return D if layout == "tensor" else D.transpose(1, 0, 3, 2).reshape(15, 15)

    check_derivative(dense, A, order=2, k=1, layout=layout)
    with pytest.raises(AssertionError, match=r"D\^2 sigma_1 \(largest difference\)"):
        check_derivative(lambda A: dense(A, False), A, order=2, k=1, layout=layout)

    def form(A, directions):
        return np.tensordot(np.tensordot(literal_hessian(A, 1, False), directions[1]), directions[0])

    with pytest.raises(AssertionError, match=r"D\^2 sigma_1 = "):
        check_derivative(form, A, [H, 0.5 * H + A], 2, k=1)


class Scaled:
    """A series with its remainder multiplied by a factor, or its radius."""

    def __init__(self, series, remainder=1.0, radius=1.0):
        self.coefficients, self.radius = series.coefficients, radius * series.radius
        self.remainder = lambda x: remainder * series.remainder(x)


def test_false_certificates_are_refused():
    A, H = np.diag([4.0, 3.0]), np.array([[0.0, 1.0], [1.0, 0.0]])  # the radius is sharp here (theory 1.9)
    for order in (0, 2, 3):
        series = sigma_series(A, H, order)
        report = check_certificate(A, H, order)
        assert report.errors[0] <= report.tolerances[0]
        check_certificate(A, H, order, series=Scaled(series))
        with pytest.raises(AssertionError, match=r"of the partial sum of order .* off by"):
            check_certificate(A, H, order, series=Scaled(series, remainder=0.5 * report.worst))
        with pytest.raises(AssertionError, match="within inf"):
            check_certificate(A, H, order, series=Scaled(series, radius=1.5))


@pytest.mark.parametrize("options", [{}, {"k": 2}, {"k": (0, 1)}, {"digits": 30}, {"k": (1, 2), "digits": 30}], ids=str)
@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
def test_certificates_pass(complex_, options):
    A, H = case(complex_=complex_)
    for order in (0, 3):
        assert 0 < check_certificate(A, H, order, samples=9, **options).worst < 1
    assert check_certificate(A, [H, A], 2, samples=9, **options).orders == (2,)
    assert check_certificate(A, 0 * H, 2, samples=3, **options).worst < 1


def test_nothing_is_claimed_where_nothing_is_certified():
    A, H = case((2, 2), values=[1.0, 1.0 - 1e-13])
    series = sigma_series(np.diag([2.0, 1.0]), H, 1)
    with pytest.raises(ValueError, match="radius 0"):
        check_certificate(A, H, 1, series=Scaled(series, radius=0.0))


def test_gaps_too_small_to_check_are_refused():
    A, H = case((2, 2), values=[1.0, 1.0 - 1e-13])
    with pytest.raises(ValueError, match="too small for this precision"):
        check_series(A, H, 2, computed=[1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="expected isolated"):
        check_series(np.eye(2), H, 2, computed=[1.0, 0.0, 0.0])


# --- functions ------------------------------------------------------------------------------------------------------


def norm(A):
    return np.linalg.norm(A, 2)


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_specpert_against_a_function_that_computes_sigma(order, complex_):
    A, H = case(complex_=complex_)
    along = check_derivative(norm, A, H, order, computes="sigma")
    assert along.orders == tuple(range(order + 1))
    others = [case(complex_=complex_, seed=i)[1] for i in range(order)]
    assert check_derivative(norm, A, others, order, computes="sigma").orders == (order,)
    assert check_derivative(norm, A, [others[0], *[0 * H] * (order - 1)], order, computes="sigma").worst < 1


@pytest.mark.parametrize("seed", range(20))
def test_values_more_precise_than_the_matrix(seed):
    """The points A + x H are rounded to single precision, though the function's values are Python's floats."""
    A, H = np.random.default_rng(seed).standard_normal((2, 4, 3)).astype(np.float32)
    check_derivative(lambda M: float(norm(M)), A, H, 2, computes="sigma")
    check_derivative(lambda M: float(norm(M)), A, [H, A], 2, computes="sigma")
    with pytest.raises(AssertionError):
        check_derivative(lambda M: 1.001 * float(norm(M)), A, H, 2, computes="sigma")


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_function_that_computes_another_value_is_refused(order):
    A, H = case()
    G = case(seed=1)[1]
    with pytest.raises(AssertionError, match="lam_0"):
        check_derivative(norm, A, H, order, k=1, computes="sigma")
    with pytest.raises(AssertionError, match=rf"D\^{order} sigma_1"):
        check_derivative(norm, A, [H, G, H][:order], order, k=1, computes="sigma")


def test_nuclear_norm_is_not_the_largest_value():
    A, H = case()
    with pytest.raises(AssertionError):
        check_derivative(lambda A: np.linalg.norm(A, "nuc"), A, H, 1, computes="sigma")


def test_dense_derivatives_of_a_function():
    A, _ = case((2, 3), values=[2.0, 1.0])
    B, _ = case((2, 3), True, values=[2.0, 1.0])
    for order in (1, 2, 3):
        assert check_derivative(lambda A, n=order: sigma_derivative(A, n), A, order=order).errors == (0.0,)
        check_derivative(lambda A, n=order: sigma_derivative(A, n), B, order=order)
        tensor = sigma_derivative(A, order)
        with pytest.raises(AssertionError):
            check_derivative(lambda A, T=tensor: T * (1 + 1e-6), A, order=order)
    with pytest.raises(ValueError, match="to return shape"):
        check_derivative(lambda A: sigma_derivative(A, 2, layout="vec"), A, order=2)


def test_bad_arguments():
    A, H = case()
    with pytest.raises(ValueError, match="'derivative' or 'sigma'"):
        check_derivative(norm, A, H, computes="value")
    with pytest.raises(ValueError, match="directions=None"):
        check_derivative(norm, A, computes="sigma")
    with pytest.raises(ValueError, match="one matrix"):
        check_derivative(norm, A[None], H)
    with pytest.raises(ValueError, match="one matrix"):
        check_derivative(norm, A, H.T)
    with pytest.raises(ValueError, match=r"coefficients of shape \(4,\)"):
        check_series(A, H, 3, computed=[1.0, 2.0])
    with pytest.raises(TypeError, match="array of numbers"):
        check_series(A, H, 1, computed=["a", "b"])


def test_missing_packages_are_named(monkeypatch):
    A, H = case()
    monkeypatch.setitem(sys.modules, "mpmath", None)
    with pytest.raises(ImportError, match="pip install mpmath"):
        check_series(A, H, 1, digits=30)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match="pip install hypothesis"):
        matrices_with_spectrum()


# --- random matrices ------------------------------------------------------------------------------------------------


@given(matrices_with_spectrum(dtypes=(np.float64, np.complex128, np.float32, np.complex64)))
@settings(max_examples=200, deadline=None)
def test_singular_values_are_the_prescribed_ones(example):
    A, s = example
    assert s.dtype == np.float64
    assert (np.diff(s) <= 0).all()
    assert len(s) == min(A.shape)
    assert max(A.shape) <= 6
    found = np.linalg.svd(A.astype(np.complex128), compute_uv=False)
    assert np.abs(found - s).max() <= 10 * max(A.shape) * np.finfo(A.dtype).eps * s[0]


KINDS = {
    "separated": lambda s: (-np.diff(s) >= 0.5).all() and s[-1] >= 0.5,
    "close": lambda s: (-np.diff(s)).min() <= 0.25 and len(set(s)) == len(s) and s[-1] > 0,
    "tied": lambda s: len(set(s)) < len(s) and s[-1] > 0,
    "graded": lambda s: (s[1:] < s[:-1]).all() and s[-1] > 0,
    "deficient": lambda s: s[0] > 0 and s[-1] == 0,
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    @given(matrices_with_spectrum(shape=(4, 5), kinds=(kind,)))
    @settings(max_examples=50, deadline=None)
    def holds(example):
        assert KINDS[kind](example.singular_values)
        assert example.A.shape == (4, 5)

    holds()


def test_examples_shrink_to_the_simplest():
    A, s = find(matrices_with_spectrum(), lambda example: True)
    assert A.tolist() == [[0.5]]
    A, s = find(matrices_with_spectrum(), lambda example: min(example.A.shape) >= 2)
    assert A.tolist() == [[1.0, 0.0], [0.0, 0.5]]
    A, s = find(matrices_with_spectrum(kinds=("tied",)), lambda example: len(example.singular_values) == 3)
    assert A.tolist() == np.diag(s).tolist()
    assert s[0] == s[1]


def test_close_pairs_reach_the_smallest_gap_and_not_below():
    strategy = matrices_with_spectrum(shape=(2, 2), kinds=("close",), smallest_gap=2.0**-40)
    assert -np.diff(find(strategy, lambda e: -np.diff(e.singular_values)[0] < 2.0**-39).singular_values) == 2.0**-40


@given(matrices_with_spectrum(kinds=("close", "tied", "deficient")), st.sampled_from([1e-6, 1e-3, 0.1]))
@settings(max_examples=50, deadline=None)
def test_isolated_values(example, relative):
    A, s = example
    for k in example.isolated(relative):
        others = np.abs(np.delete(s, k) - s[k])
        assert others.min(initial=math.inf) >= relative * s[0]
        assert s[k] > 0
        zero = A.shape[0] != A.shape[1] or s[-1] == 0
        assert example.isolation(k) == min(others.min(initial=math.inf), s[k] if zero else 2 * s[k])


BAD = [
    {"kinds": ()},
    {"kinds": ("odd",)},
    {"smallest_gap": 0.0},
    {"smallest_gap": 1.0},
    {"max_side": 0},
    {"shape": (0, 2)},
]


@pytest.mark.parametrize("arguments", BAD, ids=str)
def test_strategy_arguments(arguments):
    with pytest.raises(ValueError, match="expected"):
        matrices_with_spectrum(**arguments)


@pytest.mark.parametrize("scale", [1e-250, 1e-160, 1e160, 1e200])
def test_right_series_pass_at_any_scale(scale):
    A, H = np.diag([3.0, 1.0]), 0.1 * np.array([[1.0, 2.0], [3.0, 4.0]])
    assert check_series(A * scale, H * scale, 4).worst < 1


def test_a_claim_of_convergence_everywhere_is_tried():
    A, H = np.diag([3.0, 2.0]), np.array([[0.0, 1.0], [1.0, 0.0]])

    class Boasting:
        def __init__(self, series):
            self.coefficients, self.radius = series.coefficients, np.inf
            self.remainder = lambda x: series.remainder(x) if abs(x) < 0.5 else 1e-3

    with pytest.raises(AssertionError):
        check_certificate(A, H, 6, series=Boasting(sigma_series(A, H, 6)))


@pytest.mark.parametrize("count", [0, -3, 2.5, True, "a"])
def test_counts_that_are_none(count):
    A, H = case()
    for name, call in {
        "samples": lambda: check_certificate(A, H, 3, samples=count),
        "digits": lambda: check_certificate(A, H, 3, digits=count),
        "digits ": lambda: check_series(A, H, 3, digits=count),
    }.items():
        with pytest.raises(ValueError, match=f"expected {name.strip()} to be an integer >= 1, got "):
            call()


def test_certificates_are_checked_one_at_a_time():
    A, H = case()
    with pytest.raises(TypeError, match=r"expected one index k or the tuple of a cluster, got \[0, 1\]"):
        check_certificate(A, H, 3, k=[0, 1])
    stack = np.stack([A, A])
    for matrix, direction in ((stack, H), (A, np.stack([H, H])), (A, [H, np.stack([H, H])])):
        with pytest.raises(ValueError, match="expected one matrix and one direction or family, got a stack"):
            check_certificate(matrix, direction, 3)


def test_directions_as_nested_lists():
    def norm_of(A):
        return np.linalg.norm(A, 2)

    assert check_derivative(norm_of, [[3.0, 4.0]], [[1.0, 2.0]], 2, computes="sigma").worst < 1
    assert check_derivative(norm_of, [[3.0, 4.0]], [[[1.0, 2.0]], [[0.0, 1.0]]], 2, computes="sigma").worst < 1
