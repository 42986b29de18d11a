"""Convolutions as operators against the dense matrix that torch's own layer makes of the unit images (theory 3)."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import specpert
from lipdyn_torch.convolution import ConvolutionOperator

LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MODES = ("zeros", "circular", "reflect", "replicate")


def layer(seed, mode=None):
    """A random layer and the size of its input."""
    rng = np.random.default_rng(seed)
    while True:
        dims, groups = int(rng.choice([1, 2, 2, 3])), int(rng.choice([1, 1, 2]))
        size = rng.integers(3, 8 if dims < 3 else 5, dims)
        k, s, d = rng.integers(1, 4, dims), rng.integers(1, 4, dims), rng.integers(1, 3, dims)
        options = {"stride": tuple(s.tolist()), "dilation": tuple(d.tolist()), "groups": groups, "bias": False}
        options["padding"] = tuple(rng.integers(0, 3, dims).tolist())
        options["padding_mode"] = str(rng.choice(MODES)) if mode is None else mode
        if np.any(size + 2 * np.array(options["padding"]) <= d * (k - 1)) or np.any(size <= options["padding"]):
            continue
        torch.manual_seed(seed)
        channels = [groups * int(c) for c in rng.integers(1, 4, 2)]
        return LAYERS[dims](*channels, tuple(k.tolist()), dtype=torch.float64, **options), size.tolist()


def circular_layer(seed):
    """One on a torus: odd kernels, padded by half, strides that divide the size."""
    rng = np.random.default_rng(seed)
    dims, groups = int(rng.choice([1, 2, 2, 3])), int(rng.choice([1, 1, 2]))
    k, s, d = 2 * rng.integers(0, 2, dims) + 1, rng.integers(1, 3, dims), rng.integers(1, 3, dims)
    size = s * rng.integers(2, 4, dims)
    padding = d * (k - 1) // 2
    torch.manual_seed(seed)
    channels = [groups * int(c) for c in rng.integers(1, 4, 2)]
    options = {"stride": s, "dilation": d, "padding": padding}
    options = {key: tuple(int(x) for x in value) for key, value in options.items()}
    made = LAYERS[dims](
        *channels, tuple(k.tolist()), groups=groups, bias=False, padding_mode="circular", dtype=torch.float64, **options
    )
    return made, size.tolist()


def dense(module, size, channels=None):
    """The matrix (outputs, inputs) of a layer."""
    shape = (channels or module.in_channels, *size)
    with torch.no_grad():
        return module(torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)).flatten(1).T


@pytest.mark.parametrize("seed", range(60))
def test_products_and_bounds(seed):
    module, size = layer(seed)
    A, M = ConvolutionOperator.of(module, size), dense(module, size)
    norm = float(torch.linalg.matrix_norm(M, 2))
    x, y = torch.randn(2, module.in_channels, *size), torch.randn(2, module.out_channels, *A.out)
    torch.testing.assert_close(A.apply(x).flatten(1), x.double().flatten(1) @ M.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(A.apply_adjoint(y).flatten(1), y.double().flatten(1) @ M, rtol=1e-12, atol=1e-12)
    bounds = A.bounds(grid=8)
    assert set(bounds.uppers) == {"torus", "frequencies", "reshaped", "taps"}
    assert norm * (1 - 1e-6) <= bounds.lower <= norm * (1 + 1e-12)
    assert norm <= bounds.upper == min(bounds.uppers.values())
    assert set(A.bounds(torus=False).uppers) == {"frequencies", "reshaped", "taps"}


def test_bounds_are_not_far_off():
    """Of layers as they are used; the torus comes nearest (theory 3.3: 0.957 in the median)."""
    ratios = []
    for seed in range(12):
        torch.manual_seed(seed)
        module = nn.Conv2d(4, 6, 3, stride=1 + seed % 2, padding=1)
        bounds = ConvolutionOperator.of(module, 12).bounds()
        assert bounds.upper == bounds.uppers["torus"]
        ratios.append(bounds.lower / bounds.upper)
    assert 0.93 < np.median(ratios) < 1


def test_known_values():
    """All-ones 3 x 3 (theory 3.1, 3.3)."""
    ones = torch.ones(1, 1, 3, 3)
    found = {
        (mode, n): ConvolutionOperator(ones, n, padding=1, padding_mode=mode).norm
        for mode, n in (("zeros", 32), ("circular", 32), ("reflect", 8))
    }
    known = {("zeros", 32): 8.946, ("circular", 32): 9.0, ("reflect", 8): 9.53}
    assert found == pytest.approx(known, abs=5e-3)
    assert ConvolutionOperator(ones, 32).reshaped_norm == pytest.approx(3.0)


@pytest.mark.parametrize("seed", range(40))
def test_torus_has_all_singular_values(seed):
    module, size = circular_layer(seed)
    A, M = ConvolutionOperator.of(module, size), dense(module, size)
    assert A.exact
    torch.testing.assert_close(A.singular_values(), torch.linalg.svdvals(M), rtol=1e-10, atol=1e-10)
    bounds = A.bounds(grid=8)
    norm = float(torch.linalg.matrix_norm(M, 2))
    assert bounds.uppers["torus"] == pytest.approx(norm, rel=1e-11)
    assert norm <= bounds.upper


@pytest.mark.parametrize("seed", range(12))
def test_transposed_convolutions(seed):
    rng = np.random.default_rng(seed)
    dims = 1 + seed % 3
    k, s, p = rng.integers(2, 4, dims), rng.integers(1, 3, dims), rng.integers(0, 2, dims)
    extra = [int(rng.integers(0, step)) for step in s]
    torch.manual_seed(seed)
    groups = 1 + seed % 2
    module = TRANSPOSED[dims](
        2 * groups,
        3 * groups,
        tuple(k.tolist()),
        tuple(s.tolist()),
        tuple(p.tolist()),
        tuple(extra),
        groups,
        bias=False,
    ).double()
    A, M = ConvolutionOperator.of(module, [3] * dims), dense(module, [3] * dims)
    y = torch.randn(1, 2 * groups, *[3] * dims)
    torch.testing.assert_close(A.apply_adjoint(y).flatten(1), y.double().flatten(1) @ M.T)
    norm, bounds = float(torch.linalg.matrix_norm(M, 2)), A.bounds(grid=8)
    assert bounds.lower == pytest.approx(norm, rel=1e-6)
    assert norm <= bounds.upper


@pytest.mark.parametrize("seed", range(12))
def test_derivatives_are_those_of_the_dense_matrix(seed):
    module, size = layer(seed, mode=MODES[seed % 4])
    A, M = ConvolutionOperator.of(module, size), dense(module, size).numpy()
    dT = torch.randn_like(module.weight)
    change = LAYERS[len(size)](
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        **{key: getattr(module, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")},
        bias=False,
        dtype=torch.float64,
    )
    change.weight.data = dT
    try:
        expected = specpert.sigma_series(M, dense(change, size).numpy(), 4).coefficients
    except specpert.DegenerateSingularValueError:
        assert not A.exact
        with pytest.raises(specpert.DegenerateSingularValueError):
            A.series(dT, 4)
        return
    np.testing.assert_allclose(A.series(dT, 4).coefficients, expected, rtol=1e-7, atol=1e-9)
    assert float((A.gradient() * dT).sum()) == pytest.approx(float(expected[1]), rel=1e-7)


@pytest.mark.parametrize("seed", range(12))
def test_derivatives_on_a_torus(seed):
    """The value belongs to two opposite frequencies in general: a cluster whose series is that of its mean."""
    module, size = circular_layer(seed + 3)
    A, M = ConvolutionOperator.of(module, size), dense(module, size).numpy()
    dT = torch.randn(module.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values = np.linalg.svd(M, compute_uv=False)
    count = int((values > values[0] * (1 - 1e-9)).sum())
    module.weight.data, kernel = dT, module.weight.data
    H = dense(module, size).numpy()
    expected = specpert.sigma_series(M, H, 4, k=tuple(range(count))).mean
    series = A.series(dT, 4)
    np.testing.assert_allclose(np.asarray(series.coefficients), expected, rtol=1e-8, atol=1e-10)
    assert float((A.gradient() * dT).sum()) == pytest.approx(float(expected[1]), rel=1e-9)
    # and the certificate holds for the value itself, which may no longer be the largest
    x = 0.2 * float(series.radius)
    after = ConvolutionOperator.of(module, size)
    after.kernel = kernel + x * dT
    assert float((after.singular_values() - float(series(x))).abs().amin()) <= float(series.remainder(x))


def test_same_padding_and_single_precision():
    torch.manual_seed(0)
    module = nn.Conv2d(2, 3, (3, 5), padding="same", dilation=(2, 1), bias=False)
    A, M = ConvolutionOperator.of(module, (5, 6)), dense(module.double(), (5, 6))
    assert A.out == [5, 6]
    assert A.bounds().lower == pytest.approx(float(torch.linalg.matrix_norm(M, 2)), rel=1e-6)
    assert A.gradient().dtype == torch.float64


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("scale", [1e-200, 1e200, 0.0])
def test_scale(scale, mode):
    torch.manual_seed(0)
    kernel = torch.randn(3, 2, 3, dtype=torch.float64)
    one, other = (ConvolutionOperator(c * kernel, 8, padding=1, padding_mode=mode) for c in (1.0, scale))
    for ours, theirs in zip(one.bounds().uppers.items(), other.bounds().uppers.items(), strict=True):
        assert scale == 0 or ours[0] == theirs[0]
        assert theirs[1] == pytest.approx(scale * ours[1], rel=1e-12)
    assert other.bounds().lower == pytest.approx(scale * one.norm, rel=1e-6)
    if scale:
        torch.testing.assert_close(other.gradient(), one.gradient())
        series = other.series(scale * kernel, 2)  # (1 + x) times the norm
        assert np.asarray(series.coefficients) / scale == pytest.approx([one.norm, one.norm, 0.0], rel=1e-6, abs=1e-9)
    else:
        with pytest.raises(specpert.ZeroSingularValueError):
            other.gradient()


def test_the_users_tensors_stay_as_they_are():
    module = nn.Conv1d(2, 2, 3, padding=1)
    before, grad = module.weight.detach().clone(), module.weight.grad
    A = ConvolutionOperator.of(module, 8)
    A.bounds(), A.gradient(), A.series(torch.ones_like(module.weight))
    assert torch.equal(module.weight, before)
    assert module.weight.grad is grad
    assert module.weight.requires_grad


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((np.ones((1, 1, 3)), 8), {}, TypeError, "real floating tensor, got ndarray"),
        ((torch.ones(1, 1, 3, dtype=torch.complex64), 8), {}, TypeError, "complex64"),
        ((torch.ones(3, 3), 8), {}, ValueError, "1 to 3 axes"),
        ((torch.full((1, 1, 3), math.nan), 8), {}, ValueError, "finite"),
        ((torch.ones(1, 1, 3), (8, 8)), {}, ValueError, "expected size to be one integer"),
        ((torch.ones(1, 1, 3), 0), {}, ValueError, "expected size"),
        ((torch.ones(1, 1, 3), 8), {"stride": 0}, ValueError, "expected stride"),
        ((torch.ones(1, 1, 3), 8), {"padding": -1}, ValueError, "expected padding"),
        ((torch.ones(1, 1, 3), 8), {"padding": "some"}, ValueError, "'same', 'valid'"),
        ((torch.ones(1, 1, 3), 8), {"padding": "same", "stride": 2}, ValueError, "stride 1"),
        ((torch.ones(3, 1, 3), 8), {"groups": 2}, ValueError, "groups to divide the 3"),
        ((torch.ones(1, 1, 3), 8), {"padding_mode": "mirror"}, ValueError, "padding_mode among"),
        ((torch.ones(1, 1, 3), 2), {"padding": 2, "padding_mode": "reflect"}, ValueError, "padding of at most"),
        ((torch.ones(1, 1, 3), 2), {}, ValueError, "larger than the kernel's reach"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ConvolutionOperator(*arguments, **options)


def test_questions_that_have_no_answer():
    with pytest.raises(TypeError, match=r"convolution of torch\.nn, got Linear"):
        ConvolutionOperator.of(nn.Linear(2, 2), 4)
    A = ConvolutionOperator(torch.ones(1, 1, 3), 8)
    with pytest.raises(ValueError, match=r"expected circular padding with 8 outputs, got 'zeros' padding with 6"):
        A.singular_values()
    with pytest.raises(ValueError, match="grid"):
        A.bounds(grid=2)
    with pytest.raises(ValueError, match="direction"):
        A.series(torch.ones(1, 1, 4))
    with pytest.raises(ValueError, match="output_padding below stride"):
        ConvolutionOperator.of(nn.ConvTranspose1d(1, 1, 3, stride=1, dilation=2, output_padding=1), 5)


def test_ties_between_frequencies():
    """Where all of them change alike they are no obstacle: by the kernel's shape, or by a symmetry that is kept."""
    pointwise = ConvolutionOperator(torch.tensor([[[2.0]]]), 8, padding_mode="circular")
    assert pointwise.series(torch.ones(1, 1, 1)).coefficients.tolist() == pytest.approx([2.0, 1.0, 0.0, 0.0])
    assert pointwise.gradient().tolist() == [[[pytest.approx(1.0)]]]
    # 2 cos w_2 - 2 cos w_1, largest at (0, pi) and (pi, 0)
    kernel = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 1.0], [0.0, -1.0, 0.0]])[None, None]
    A = ConvolutionOperator(kernel, 8, padding=1, padding_mode="circular")
    assert A.series(kernel).coefficients.tolist() == pytest.approx([4.0, 4.0, 0.0, 0.0], abs=1e-12)
    middle = torch.zeros_like(kernel)
    middle[..., 1, 1] = 1.0  # raises one value and lowers the other
    with pytest.raises(specpert.DegenerateSingularValueError, match="at all frequencies"):
        A.series(middle)
    with pytest.raises(specpert.DegenerateSingularValueError, match="at all frequencies"):
        A.gradient()


@pytest.mark.parametrize("given", [None, 2.5, [2.5, 2], "ab", torch.tensor(3), len, [1, 2, 3]], ids=range(7))
@pytest.mark.parametrize("name", ["size", "stride", "padding", "dilation"])
def test_sizes_that_are_none(name, given):
    with pytest.raises(ValueError, match=f"expected {'.*' if name == 'padding' else name} to be one integer|padding '"):
        ConvolutionOperator(torch.ones(4, 3, 3, 3), **{"size": 8, name: given})
    if name == "size":
        with pytest.raises(ValueError, match="expected size to be one integer of at least 1, or 2, got"):
            ConvolutionOperator.of(nn.Conv2d(3, 4, 3), given)


def test_words_that_are_arrays():
    for name in ("padding", "padding_mode"):
        with pytest.raises(ValueError, match=f"expected {name} "):
            ConvolutionOperator(torch.ones(4, 3, 3, 3), 8, **{name: np.zeros(3)})


def test_images_of_another_size():
    A = ConvolutionOperator(torch.ones(4, 3, 3, 3), (8, 9))
    for product, channels, size in ((A.apply, 3, (8, 9)), (A.apply_adjoint, 4, (6, 7))):
        assert len(product(torch.ones(2, channels, *size, dtype=torch.int32))) == 2
        words = rf"expected images \(N, {channels}, {size[0]}, {size[1]}\), got a tensor .*; make an operator"
        for shape in ((2, channels, 20, 20), (2, channels + 1, *size), (channels, *size), ()):
            with pytest.raises(ValueError, match=words):
                product(torch.ones(shape))
        for given in (None, 2.5, np.ones((2, channels, *size))):
            with pytest.raises(TypeError, match=r"expected images as a tensor \(N, .*\), got "):
                product(given)


def test_every_way_to_reshape():
    """The least of them is below each of the four of the literature (theory 3.1)."""
    torch.manual_seed(0)
    W = torch.randn(3, 2, 3, 2, dtype=torch.float64)
    A = ConvolutionOperator(W, 8)
    layouts = [(0, 1, 2, 3), (1, 0, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2)]
    rows = [1, 1, 2, 2]
    norms = [
        float(torch.linalg.matrix_norm(W.permute(axes).flatten(0, n - 1).flatten(1), 2))
        for axes, n in zip(layouts, rows, strict=True)
    ]
    assert A.bounds().uppers["reshaped"] == pytest.approx(math.sqrt(6) * min(norms), rel=1e-9)
    for p, s in itertools.product((0, 1), (1, 2)):
        B = ConvolutionOperator(W, 8, padding=p, stride=s)
        assert B.bounds().lower <= B.bounds().uppers["reshaped"]
