"""What bad input gets: the type and the words of every error."""

import math

import numpy as np
import pytest
import torch
from oracles import with_spectrum

from specpert import (
    DegenerateSingularValueError,
    NonFiniteError,
    SpecpertError,
    SpectralFunction,
    ZeroSingularValueError,
    sigma_derivative,
    sigma_gradient,
    sigma_hessian,
    sigma_ito,
    sigma_series,
    singular_triplet,
)

A = np.arange(12.0).reshape(3, 4) + np.eye(3, 4)
H = np.ones((3, 4))
WITH_NAN = A.copy()
WITH_NAN[1, 1] = np.nan

TABLE = [
    ("k_too_large", lambda: sigma_series(A, H, 2, k=3), IndexError, r"0 <= k < min\(m, n\) = 3, got k = 3"),
    ("k_negative", lambda: sigma_series(A, H, 2, k=-1), IndexError, r"got k = -1; 0 is the largest"),
    ("k_repeated", lambda: sigma_gradient(A, k=[0, 0]), IndexError, r"different indices in k, got \(0, 0\)"),
    ("k_empty", lambda: sigma_gradient(A, k=[]), IndexError, "at least one singular value index"),
    ("k_float", lambda: sigma_gradient(A, k=1.0), TypeError, "k to be an int or a sequence of ints, got float"),
    ("cluster_with_hole", lambda: sigma_series(A, H, 2, k=(0, 2)), IndexError, "consecutive indices"),
    ("vector", lambda: sigma_gradient(A[0]), ValueError, r"matrix \(m, n\) or a stack .*, got shape \(4,\)"),
    ("scalar", lambda: sigma_gradient(3.0), ValueError, r"got shape \(\)"),
    ("empty", lambda: sigma_gradient(np.zeros((0, 3))), ValueError, r"at least one row, column .* got shape \(0, 3\)"),
    ("no_matrix", lambda: sigma_gradient(np.zeros((0, 3, 3))), ValueError, r"got shape \(0, 3, 3\)"),
    ("nan", lambda: sigma_gradient(WITH_NAN), NonFiniteError, r"A to be finite, got nan at index \(1, 1\)"),
    ("inf", lambda: sigma_series(A, np.full((3, 4), np.inf), 2), NonFiniteError, r"H to be finite, got inf at index"),
    ("shape", lambda: sigma_series(A, H.T, 2), ValueError, r"H of shape \(\.\.\., 3, 4\) like A, got \(4, 3\)"),
    ("family", lambda: sigma_series(A, [H, H[:2]], 2), ValueError, r"A_2 of shape \(\.\.\., 3, 4\)"),
    ("no_family", lambda: sigma_series(A, [], 2), ValueError, r"H to be a matrix .* got shape \(0,\)"),
    (
        "stack",
        lambda: sigma_series(np.stack([A, A]), np.stack([H, H, H]), 2),
        ValueError,
        r"leading axes of H to broadcast with those of A \(2, 3, 4\), got \(3, 3, 4\)",
    ),
    (
        "number",
        lambda: sigma_derivative(A, 3, directions=[H, H]),
        ValueError,
        "sequence of order = 3 directions, got 2",
    ),
    ("none", lambda: sigma_derivative(A, 2, directions=[]), ValueError, "H to be a matrix"),
    ("order_zero", lambda: sigma_derivative(A, 0), ValueError, "order to be an integer >= 1, got 0"),
    ("order_float", lambda: sigma_series(A, H, 2.0), ValueError, "order to be an integer >= 0, got 2.0"),
    ("order_array", lambda: sigma_series(A, 2, H), ValueError, r"integer >= 0, got an array of shape \(3, 4\)"),
    ("order_long", lambda: sigma_series(A, H, "a" * 99), ValueError, r"got 'a+\.\.\.a+'$"),
    (
        "direction_for_order",
        lambda: sigma_derivative(A, H),
        TypeError,
        r"got an array of shape \(3, 4\); directions go by keyword: sigma_derivative\(A, order=2, directions=H\)",
    ),
    ("layer", lambda: sigma_gradient(torch.nn.Linear(3, 4)), TypeError, r"got Linear; give A\.weight"),
    ("nothing", lambda: sigma_gradient(None), TypeError, "expected A to be an array of numbers, got NoneType"),
    (
        "graphs",
        lambda: sigma_gradient([torch.ones(2, requires_grad=True)] * 2),
        TypeError,
        "array of numbers, got a list",
    ),
    ("variance", lambda: sigma_ito(1e200 * A, 0 * A, 1e200 * A[None]).variance, OverflowError, "expected the variance"),
    ("log", lambda: sigma_ito(1e-200 * A, 0 * A, A[None]).log(), OverflowError, "expected the relative coefficients"),
    ("meta", lambda: singular_triplet(torch.empty(2, 2, device="meta")), TypeError, "A to hold numbers, got a tensor"),
    ("argument", lambda: sigma_series(A, H, 2)(np.inf), NonFiniteError, "expected x to be finite, got NaN or inf"),
    ("arguments", lambda: sigma_series(A, H, 2)(np.array([0.1, np.nan])), NonFiniteError, "expected x to be finite"),
    ("argument_of_remainder", lambda: sigma_series(A, H, 2).remainder(np.nan), NonFiniteError, "a number, got NaN"),
    ("zeros", lambda: sigma_gradient(np.zeros((2, 3))), ZeroSingularValueError, "above zero, got zeros alone: "),
    (
        "zeros_in_a_stack",
        lambda: sigma_gradient(np.stack([A, 0 * A])),
        ZeroSingularValueError,
        r"zeros alone of matrix \(1,\): ",
    ),
    (
        "list_beside_torch",
        lambda: sigma_series(torch.ones(1, 2), [[1.0, 2.0]], 2),
        TypeError,
        r"same array library as A \(torch\), got a list",
    ),
    ("order_bool", lambda: sigma_series(A, H, True), ValueError, "order to be an integer"),
    (
        "layout",
        lambda: sigma_hessian(A, layout="rowmajor"),
        ValueError,
        "layout to be 'tensor' or 'vec', got 'rowmajor'",
    ),
    ("degenerate", lambda: sigma_derivative(A, on_degenerate="skip"), ValueError, "'raise' or 'cluster', got 'skip'"),
    ("object", lambda: sigma_gradient(A.astype(object)), TypeError, "dtype among .* got object"),
    ("text", lambda: sigma_gradient([["a", "b"]]), TypeError, "dtype among .* got <U1"),
    ("longdouble", lambda: sigma_gradient(A.astype(np.longdouble)), TypeError, "dtype among .* got (long|float128)"),
    ("ragged", lambda: sigma_gradient([[1.0, 2.0], [3.0]]), ValueError, "rectangular array"),
    ("masked", lambda: sigma_gradient(np.ma.masked_less(A, 3)), TypeError, "without a mask"),
    (
        "libraries",
        lambda: sigma_series(A, torch.ones(3, 4), 2),
        TypeError,
        r"same array library as A \(numpy\), got torch",
    ),
    ("zero", lambda: sigma_gradient(np.diag([1.0, 0.0]), k=1), ZeroSingularValueError, r"not differentiable at zero"),
    ("tie", lambda: sigma_gradient(np.eye(3)), DegenerateSingularValueError, r"values \(0, 1, 2\) are tied"),
    ("overflow", lambda: sigma_series(1e-200 * A, 1e100 * H, 4), OverflowError, "range of float64"),
    ("overflow_mixed", lambda: sigma_derivative(1e-200 * A, 2, directions=[1e100 * H] * 2), OverflowError, "float64"),
    ("overflow_dense", lambda: sigma_derivative(1e-200 * A, 3), OverflowError, "range of float64"),
]


@pytest.mark.parametrize(("call", "error", "message"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_message(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_tie_names_the_cluster():
    rng = np.random.default_rng(0)
    M = with_spectrum(rng, 5, 6, [3.0, 2.0, 2.0, 2.0, 1.0])
    with pytest.raises(DegenerateSingularValueError, match=r"sigma_series\(A, H, order, k=\(1, 2, 3\)\)") as caught:
        sigma_gradient(M, k=2)
    assert caught.value.k == 2
    assert caught.value.cluster == (1, 2, 3)
    assert caught.value.gap < 1e-14
    with pytest.raises(DegenerateSingularValueError, match="the cluster"):
        sigma_series(M, np.ones((5, 6)), 2, k=(1, 2))  # a cluster must hold the whole tie
    assert sigma_gradient(M, k=0).shape == (5, 6)  # a tie elsewhere does not matter


def test_gap_tol_decides_what_a_tie_is():
    M = np.diag([1.0, 1.0 - 1e-6])
    assert singular_triplet(M).gap == pytest.approx(1e-6)
    with pytest.raises(DegenerateSingularValueError, match=r"more than 1.0e-05"):
        singular_triplet(M, gap_tol=1e-5)
    with pytest.raises(DegenerateSingularValueError):
        sigma_derivative(M, gap_tol=1e-5)


def test_the_bad_matrix_of_a_stack_is_named():
    stack = np.stack([np.diag([3.0, 1.0]), np.eye(2)])
    with pytest.raises(DegenerateSingularValueError, match=r"sigma_0 of matrix \(1,\)"):
        sigma_gradient(stack)
    stack[1] = 0
    with pytest.raises(ZeroSingularValueError, match=r"of matrix \(1,\)"):
        sigma_gradient(stack)


def test_all_value_errors_have_one_base():
    for error in (DegenerateSingularValueError, ZeroSingularValueError, NonFiniteError):
        assert issubclass(error, SpecpertError)
        assert issubclass(error, ValueError)


def test_inputs_are_left_alone():
    a, h = A.copy(), H.copy()
    a.flags.writeable = h.flags.writeable = False
    sigma_series(a, [h, h], 4, vectors=True)
    sigma_derivative(a, 3, directions=[h, h, h])
    sigma_hessian(a)
    np.testing.assert_array_equal(a, A)


def test_sparse_tensors_and_odd_arguments():
    with pytest.raises(TypeError, match=r"expected A to be a dense tensor, got torch.sparse_coo; .* A.to_dense\(\)"):
        singular_triplet(torch.eye(3).to_sparse())
    series = sigma_series(np.diag([2.0, 1.0]), np.eye(2), 2)
    with pytest.raises(TypeError, match="expected x to be real, got"):
        series("a")
    cluster = sigma_series(np.eye(2), np.eye(2), 2, k=(0, 1))
    for x in (math.nan, math.inf):
        with pytest.raises(ValueError, match="expected x to be finite"):
            cluster.values(x)


@pytest.mark.parametrize("given", [A, None, 3, "qr", ["svd"]], ids=str)
def test_words_that_are_none(given):
    for name, call in {
        "method": lambda: singular_triplet(A, method=given),
        "layout": lambda: sigma_derivative(A, 2, layout=given),
        "on_degenerate": lambda: sigma_derivative(A, 2, directions=H, on_degenerate=given),
    }.items():
        with pytest.raises(ValueError, match=f"^expected {name} to be '.*' or '.*', got "):
            call()


def test_functions_that_are_none():
    with pytest.raises(TypeError, match="expected df to be a function, got NoneType"):
        SpectralFunction.separable(np.square, None, np.ones_like)
    with pytest.raises(TypeError, match="expected hessian to be a function, got float"):
        SpectralFunction.symmetric(np.sum, np.ones_like, 2.0)


@pytest.mark.parametrize("k", [0, (0, 1)])
def test_arguments_that_are_tensors(k):
    """A NumPy series takes the numbers of a tensor, on a graph or not."""
    series, x = sigma_series(A, H, 3, k=k), torch.tensor([0.01, 0.02], dtype=torch.float64, requires_grad=True)
    plain = x.detach().numpy()
    np.testing.assert_array_equal(series.remainder(x), series.remainder(plain))
    np.testing.assert_array_equal(series.remainder(torch.tensor(plain + 0j).conj().real), series.remainder(plain))
    if k == 0:
        np.testing.assert_array_equal(series(x), series(plain))
