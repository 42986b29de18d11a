"""JAX arrays in, JAX arrays out, in both precisions; and no array is read on the host, on JAX and on torch.

What may be read on the host is one number at a time: the flags and exponents by which the input is validated and the
scaling stops (is everything finite? is the gap above the tolerance?). Nothing with more than one entry.
"""

import contextlib
from unittest import mock

import numpy as np
import pytest
import torch

from specpert import (
    DegenerateSingularValueError,
    NonFiniteError,
    SigmaHessian,
    leading_cluster,
    sigma_derivative,
    sigma_gradient,
    sigma_hessian,
    sigma_series,
    singular_triplet,
)
from specpert.testing import check_certificate, check_derivative, check_series

RNG = np.random.default_rng(0)
REAL = RNG.standard_normal((2, 4, 6))
COMPLEX = REAL + 1j * RNG.standard_normal((2, 4, 6))
CASES = {"real": REAL, "complex": COMPLEX}


def close(found, expected, single):
    scale = np.abs(expected).max() if np.isfinite(expected).all() else 1.0
    np.testing.assert_allclose(
        np.asarray(found), expected, rtol=2e-3 if single else 1e-10, atol=(1e-4 if single else 1e-12) * scale
    )


# One row for each function: arrays from (A, H), for any library.
FUNCTIONS = {
    "series": lambda A, H: [
        getattr(sigma_series(A, H, 3, k=1, vectors=True), name)
        for name in ("coefficients", "derivatives", "gap", "radius")
    ],
    "evaluation": lambda A, H: [sigma_series(A, H, 4)(0.01)],
    "family": lambda A, H: [sigma_series(A, [H, 0.5 * H], 4).coefficients, sigma_series(A, [H, 0.5 * H], 4).radius],
    "several": lambda A, H: [sigma_series(A, H, 2, k=[0, 2]).coefficients],
    "cluster": lambda A, H: [sigma_series(A, H, 3, k=(0, 1)).mean, sigma_series(A, H, 3, k=(0, 1)).radius],
    "cluster values": lambda A, H: [sigma_series(A, H, 3, k=(0, 1)).values(0.01)],
    "gradient": lambda A, H: [sigma_gradient(A), sigma_gradient(A, k=[0, 3])],
    "hessian": lambda A, H: [sigma_hessian(A, k=1), sigma_hessian(A, layout="vec")],
    "third order": lambda A, H: [sigma_derivative(A[:2, :3], 3)],
    "mixed": lambda A, H: [sigma_derivative(A, n, directions=[H, A + H, H, A - H][:n]) for n in (1, 2, 3, 4)],
    "one direction": lambda A, H: [sigma_derivative(A, n, directions=H, k=2) for n in (1, 2, 3)],
    "SigmaHessian": lambda A, H: [
        (form := SigmaHessian(A, k=1)) @ H,
        form.quadratic(H),
        form.from_projections(H[:, 0], H[0, :]),
        form.from_projections(H[:2, 0], H[0, :], rows=[0, 3]),
        form.diagonal(),
        form.trace(),
        form.eigenvalues(),
    ],
    "triplet": lambda A, H: [(t := singular_triplet(A, k=1)).sigma, t.gap],
}
COMPILED = ["series", "gradient", "SigmaHessian"]  # again for each dtype
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
# JAX compiles every operation anew for each shape and dtype, tens of milliseconds each
compiling = pytest.mark.parametrize(
    "function", [pytest.param(f, id=i, marks=[pytest.mark.slow] * (i == "third order")) for i, f in FUNCTIONS.items()]
)


@pytest.fixture(name="jax")
def fixture_jax():
    """The library, told to compile quickly: every operation is compiled anew for each shape and dtype."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield jax
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(params=[True, False], ids=["x64", "x32"])
def jax_and_single(request, jax):
    """The library, and whether it computes in float32."""
    with jax.enable_x64(request.param):
        yield jax, not request.param


@compiling
def test_jax_gives_the_same_as_numpy(jax, function):
    with jax.enable_x64(True):
        compare(jax, function, *REAL, single=False)


@pytest.mark.parametrize("name", COMPILED)
def test_jax_in_single_precision(jax, name):
    with jax.enable_x64(False):
        compare(jax, FUNCTIONS[name], *REAL, single=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_complex_jax_gives_the_same_as_numpy(jax, name):
    with jax.enable_x64(True):
        compare(jax, FUNCTIONS[name], *COMPLEX, single=False)


def compare(jax, function, A, H, single):
    a, h = jax.numpy.asarray(A), jax.numpy.asarray(H)
    for found, expected in zip(function(a, h), function(A, H), strict=True):
        assert isinstance(found, jax.Array)
        assert found.dtype in ((np.float32, np.complex64) if single else (np.float64, np.complex128))
        assert found.devices() == a.devices()
        assert found.shape == np.shape(expected)
        close(found, expected, single)


NARROW = [
    (d, x64)
    for x64 in (False, True)
    for d in ("float16", "bfloat16", "int32", "uint8", "bool")
    if not x64 or "f" not in d
]


@pytest.mark.parametrize(("dtype", "x64"), NARROW)
def test_narrow_dtypes_of_jax(jax, dtype, x64):
    """Halves become float32, integers the widest that there is: float64, or float32 without x64."""
    with jax.enable_x64(x64):
        A, H = (jax.numpy.asarray(abs(x) > 0.5).astype(dtype) for x in REAL)
        series = sigma_series(A, H, 3)
    assert series.coefficients.dtype == (np.float64 if x64 else np.float32)
    exact = sigma_series(*(np.asarray(x).astype(float) for x in (A, H)), 3)
    np.testing.assert_allclose(series.coefficients, exact.coefficients, atol=1e-4)


def test_remainder_of_jax(jax_and_single):
    """In single precision the bound has to be larger: it holds in floating point."""
    jax, single = jax_and_single
    found = sigma_series(*(jax.numpy.asarray(x) for x in REAL), 4).remainder(0.01)
    expected = sigma_series(*REAL, 4).remainder(0.01)
    assert isinstance(found, jax.Array)
    assert expected < found < 1e-3 if single else float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_stacks_of_jax(jax):
    stack = np.random.default_rng(1).standard_normal((3, 4, 6))
    with jax.enable_x64(True):
        found = sigma_series(jax.numpy.asarray(stack), jax.numpy.asarray(REAL[1]), 2)
    close(found.coefficients, sigma_series(stack, REAL[1], 2).coefficients, False)


def test_errors_are_those_of_numpy(jax_and_single):
    jax, _ = jax_and_single
    A, H = (jax.numpy.asarray(x) for x in REAL)
    with pytest.raises(DegenerateSingularValueError):
        sigma_series(jax.numpy.eye(4, 6), H, 2)
    with pytest.raises(NonFiniteError, match=r"at index \(0, 1\)"):
        sigma_gradient(A.at[0, 1].set(np.nan))
    with pytest.raises(TypeError, match="same array library"):
        sigma_series(A, REAL[1], 2)


def test_tracers_are_named(jax):
    A = jax.numpy.ones((2, 2, 3))
    for transformed in (jax.jit(sigma_gradient), jax.vmap(sigma_gradient), jax.jit(singular_triplet)):
        with pytest.raises(TypeError, match="got a tracer; call it outside of jax"):
            transformed(A)


@pytest.mark.slow
def test_dense_derivative_of_a_tie_in_single_precision(jax):
    with jax.enable_x64(False):
        A = jax.numpy.diag(jax.numpy.asarray([2.0, 2.0, 1.0]))
        found = sigma_derivative(A, 2, on_degenerate="cluster")
    close(found, sigma_derivative(np.diag([2.0, 2.0, 1.0]), 2, on_degenerate="cluster"), True)


def test_checks_take_jax_arrays(jax_and_single):
    jax, single = jax_and_single
    a, h = (jax.numpy.asarray(x) for x in REAL)
    order = 2 if single else 4
    check_series(a, h, order)
    check_certificate(a, h, order)
    assert check_derivative(lambda A, H: sigma_derivative(A, 2, directions=H), a, h, 2).errors == (0.0,)


# --- nothing is read on the host -------------------------------------------------------------------------------------


@contextlib.contextmanager
def host_reads(owner, names):
    """List of how many entries each read of an array on the host has.

    Stands in for the methods of the array that give Python and NumPy objects, and for np.asarray and np.array, which
    read a JAX array on a CPU without asking it.
    """
    sizes = []

    def recording(original):
        if isinstance(original, property):
            return property(lambda x: sizes.append(x.size) or original.fget(x))

        def read(*args, **kwargs):
            if args and isinstance(args[0], owner):
                sizes.append(int(np.prod(args[0].shape)))
            return original(*args, **kwargs)

        return read

    with contextlib.ExitStack() as stack:
        for target, name in [*((owner, name) for name in names), (np, "asarray"), (np, "array")]:
            stack.enter_context(mock.patch.object(target, name, recording(getattr(target, name))))
        yield sizes


def watch_jax(jax):
    return host_reads(type(jax.numpy.zeros(1)), ["_value", "__array__", "__dlpack__", "item", "tolist"])


def watch_torch():
    names = ["numpy", "cpu", "__array__", "__dlpack__", "item", "tolist", "__bool__", "__float__", "__int__"]
    return host_reads(torch.Tensor, names)


def test_the_watch_on_jax_sees(jax):
    x = jax.numpy.ones((2, 3))
    roads = [lambda x: np.asarray(x), lambda x: np.array(x), jax.device_get, np.from_dlpack, lambda x: x.tolist()]
    for road in roads:
        with watch_jax(jax) as sizes:
            np.testing.assert_equal(np.shape(road(x + 1)), (2, 3))
        assert max(sizes) == 6
    for road in (lambda x: bool(x[0, 0] > 0), lambda x: float(x[0, 0]), lambda x: x[0, 0].item()):
        with watch_jax(jax) as sizes:
            road(x)
        assert set(sizes) == {1}


def test_the_watch_on_torch_sees():
    x = torch.ones((2, 3))
    for road in (np.asarray, np.from_dlpack, lambda x: x.numpy(), lambda x: x.cpu(), lambda x: x.tolist()):
        with watch_torch() as sizes:
            road(x)
        assert max(sizes) == 6


@compiling
def test_jax_arrays_stay_on_their_device(jax, function):
    """JAX's transfer guard lets everything pass on a CPU, so the reads themselves are watched."""
    with jax.enable_x64(True):
        A, H = (jax.numpy.asarray(x) for x in REAL)
        with watch_jax(jax) as sizes:
            function(A, H)
        assert set(sizes) == {1}  # the validation reads at least one flag


@functions
@pytest.mark.parametrize("complex_", CASES)
def test_torch_tensors_stay_on_their_device(function, complex_):
    A, H = (torch.as_tensor(x) for x in CASES[complex_])
    with watch_torch() as sizes:
        function(A, H)
    assert set(sizes) == {1}


def test_float64_results_need_float64():
    jax = pytest.importorskip("jax")
    A = REAL[0].astype(np.float32)
    with jax.enable_x64(False):
        triplet = singular_triplet(jax.numpy.asarray(A))
        s = np.linalg.svd(A)[1]
        assert len(leading_cluster(triplet, s[1], s[1]).k) == 1
        with pytest.raises(ValueError, match="float64, which JAX has with jax_enable_x64 only"):
            singular_triplet(jax.numpy.asarray(A), dtype="float64")
    with jax.enable_x64(True):
        found = singular_triplet(jax.numpy.asarray(A), dtype=np.float64)
        assert found.sigma.dtype == np.float64
        np.testing.assert_allclose(found.sigma, np.linalg.norm(A.astype(np.float64), 2), rtol=1e-14)
