"""Convolutions read as operators: every number against the literal definition, and what images of several sizes do."""

from __future__ import annotations

import itertools
import math

import dense_forces
import pytest
import torch
from torch import Tensor, nn

from lipdyn_torch import ConvolutionOperator, LipschitzMonitor
from lipdyn_torch._bridge import _norms, read_spectrum, spectral_norm
from lipdyn_torch.convolution import phases

SAMPLES, LR = 5, 0.03


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def literal_blocks(module: nn.Module, torus: list[int], kernel: Tensor) -> Tensor:
    """Every matrix (co / g, ci / g prod s) of the convolution on a torus, tap by tap (theory 3.2)."""
    W = kernel.unflatten(0, (module.groups, -1))
    coarse = [n // s for n, s in zip(torus, module.stride, strict=True)]
    out = []
    for start in itertools.product(*map(range, coarse)):
        columns = []
        for fold in itertools.product(*map(range, module.stride)):
            total = torch.zeros(W.shape[:3], dtype=torch.complex128)
            for tap in itertools.product(*map(range, module.kernel_size)):
                turns = sum(
                    t * d * (i + a * c) / n
                    for t, d, i, a, c, n in zip(tap, module.dilation, start, fold, coarse, torus, strict=True)
                )
                index = (slice(None), slice(None), slice(None), *tap)
                angle = torch.tensor(-2 * math.pi * turns, dtype=torch.float64)
                total = total + W[index] * torch.polar(torch.ones((), dtype=torch.float64), angle)
            columns.append(total / math.sqrt(math.prod(module.stride)))
        out.append(torch.cat(columns, -1))
    return torch.stack(out)


LAYERS = {
    "plain": (lambda: nn.Conv2d(2, 3, 3, padding=1), (6, 5)),
    "strided": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (6, 7)),
    "two-strides": (lambda: nn.Conv2d(3, 2, (3, 2), stride=(1, 2)), (6, 6)),
    "dilated": (lambda: nn.Conv2d(2, 3, 3, dilation=2, padding=2), (6, 6)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (5, 5)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, padding=1), (5, 5)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (5, 6)),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (4, 4)),
    "rows": (lambda: nn.Conv2d(2, 3, (1, 3), padding=(0, 1)), (4, 6)),
    "one-axis": (lambda: nn.Conv1d(3, 4, 3, padding="same"), (8,)),
    "one-axis-strided": (lambda: nn.Conv1d(3, 4, 4, stride=3, padding=2), (11,)),
    "three-axes": (lambda: nn.Conv3d(2, 2, 2), (3, 4, 3)),
    "one-channel": (lambda: nn.Conv2d(1, 1, 3, padding=1), (5, 5)),
}


def network(layer: str) -> tuple[nn.Sequential, tuple[int, ...]]:
    torch.manual_seed(3)
    make, size = LAYERS[layer]
    conv = make().double()
    width = conv(torch.zeros(1, conv.in_channels, *size).double()).numel()
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3).double()), (conv.in_channels, *size)


def images(shape: tuple[int, ...], seed: int, samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (samples,), generator=generator)


def torus_of(module: nn.Module, size: tuple[int, ...]) -> tuple[list[int], float]:
    operator = ConvolutionOperator.of(module, size)
    return operator.torus, operator.spread


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_term_is_its_dense_definition(layer, optimizer):
    model, shape = network(layer)
    conv = model[0]
    torus, spread = torus_of(conv, shape[1:])
    make = {"SGD": lambda p: torch.optim.SGD(p, lr=LR), "Adam": lambda p: torch.optim.Adam(p, lr=LR, eps=1e-3)}
    optim = make[optimizer](model.parameters())
    with LipschitzMonitor(model, optim, conv="operator", noise="factor") as monitor:
        for step in range(2):
            x, y = images(shape, step)

            def loss(net: nn.Module, i: int, x: Tensor = x, y: Tensor = y) -> Tensor:
                return nn.functional.cross_entropy(net(x[i : i + 1]), y[i : i + 1]) / SAMPLES

            G = dense_forces.per_sample(model, ["0.weight"], loss, SAMPLES)
            before = conv.weight.detach().clone()
            optim.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optim.step()
            (row,) = (r for r in monitor.history.rows if r["step"] == step and r["layer"] == "0")
            assert row["status"] == "ok"
            tops = [spread * torch.linalg.svdvals(b).amax(-1) for b in literal_blocks(conv, torus, before)]
            best = torch.stack(tops).amax(-1).argmax()
            W, D = torch.ones(conv.weight.numel()).double(), conv.weight.detach() - before
            if optimizer == "Adam":
                corrected = optim.state[conv.weight]["exp_avg_sq"].flatten() / (1 - 0.999 ** (step + 1))
                W = 1 / (corrected.sqrt() + 1e-3)
            expected = dense_forces.forces(
                [before], lambda K, best=best: spread * literal_blocks(conv, torus, K)[best], G, W, D.flatten(), LR
            )
            after = spread * torch.linalg.svdvals(literal_blocks(conv, torus, conv.weight.detach())).amax()
            assert row["sigma"] == pytest.approx(float(torch.stack(tops).amax()), rel=1e-12)
            assert row["dz"] == pytest.approx(float(after.log() - torch.stack(tops).amax().log()), abs=1e-12)
            for key in ("mu", "kappa", "lambda_sq", "gHg", "kappa_var", "lambda_sq_var"):
                wanted, least = getattr(expected, key), {"mu": 1e-2 * expected.lambda_sq**0.5}.get(key, 1e-20)
                assert abs(row[key] - wanted) <= 1e-10 * max(abs(wanted), least), key
            assert abs(row["remainder"]) <= row["bound"]
            F = monitor.noise["0"].factor()  # of the group's kernel
            whole = (W * (G - G.mean(0))).reshape(SAMPLES, conv.groups, -1) / math.sqrt(SAMPLES * (SAMPLES - 1))
            assert any(torch.allclose(F, part, rtol=1e-10, atol=1e-14) for part in whole.unbind(1))
            size = spread * float(torch.linalg.svdvals(literal_blocks(conv, torus, D)).amax())
            assert row["eps"] == pytest.approx(2 * size / row["gap"], rel=1e-9)


@pytest.mark.parametrize("layer", LAYERS)
def test_sigma_bounds_the_operator(layer):
    model, shape = network(layer)
    optim = torch.optim.SGD(model.parameters(), lr=LR)
    columns = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    with LipschitzMonitor(model, optim, conv="operator") as monitor:
        conv, bias = model[0], model[0].bias.detach().clone()
        bias = bias.reshape(-1, *[1] * (len(shape) - 1))
        dense = (conv(columns).detach() - bias).flatten(1)
        x, y = images(shape, 0)
        nn.functional.cross_entropy(model(x), y).backward()
        optim.step()
    true, sigma = float(torch.linalg.matrix_norm(dense, 2)), monitor.history.rows[0]["sigma"]
    assert true <= sigma * (1 + 1e-12)
    assert sigma <= 2 * true
    if layer == "circular":
        assert sigma == pytest.approx(true, rel=1e-12)


def trained(model: nn.Sequential, shapes: list[tuple[int, ...]], **settings: object) -> LipschitzMonitor:
    optim = torch.optim.SGD(model.parameters(), lr=LR)
    with LipschitzMonitor(model, optim, conv="operator", **settings) as monitor:
        for step, shape in enumerate(shapes):
            x, y = images(shape, step)
            optim.zero_grad()
            nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()
            optim.step()
    return monitor


def pooled(*convs: nn.Module) -> nn.Sequential:
    """A network for images of any size."""
    return nn.Sequential(
        *convs, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * convs[-1].out_channels, 3)
    ).double()


def test_single_precision():
    rows = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        model = pooled(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)).to(dtype)
        rows.append(trained(model, [(3, 12, 12)] * 3).history.rows)
    for double, single in zip(*rows, strict=True):
        assert single["status"] == double["status"] == "ok"
        for key in ("sigma", "mu", "kappa", "lambda_sq"):
            assert single[key] == pytest.approx(double[key], rel=1e-4, abs=1e-7), key


def test_larger_images_enlarge_the_torus():
    model = pooled(nn.Conv2d(2, 3, 3, padding=1))
    start = model[0].weight.detach().clone()
    sizes = [8, 6, 11, 11]
    monitor = trained(model, [(2, n, n) for n in sizes])
    rows = [row for row in monitor.history.rows if row["layer"] == "0"]
    new = "images of a new size: read on a torus that holds them"
    assert [row["status"] for row in rows] == ["ok", "ok", new, "ok"]
    norm = ConvolutionOperator(start, 8, padding=1).bounds().uppers["torus"]
    assert rows[0]["sigma"] == pytest.approx(norm, rel=1e-9)
    assert all(math.isfinite(row["kappa"]) for row in rows)
    kernel = model[0].weight.detach()
    norm = ConvolutionOperator(kernel, 11, padding=1).bounds().uppers["torus"]
    assert math.exp(rows[-1]["z"] + rows[-1]["dz"]) == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("hold", [False, True])
def test_images_of_two_sizes_in_one_step(hold):
    """A larger image after a smaller one: what was contracted before does not fit; what is kept, as for Adam, does."""
    model = pooled(nn.Conv2d(2, 3, 3, padding=1))
    optim = (torch.optim.Adam if hold else torch.optim.SGD)(model.parameters(), lr=LR)
    with LipschitzMonitor(model, optim, conv="operator") as monitor:
        for _ in range(2):
            optim.zero_grad()
            for size in (6, 9):
                x, y = images((2, size, size), size)
                nn.functional.cross_entropy(model(x), y).backward()
            optim.step()
    first, second = (row for row in monitor.history.rows if row["layer"] == "0")
    if not hold:
        assert first["status"].startswith("images of a new size came between passes of one step")
    assert math.isnan(first["kappa"]) == (not hold)
    assert second["status"] == "ok"
    assert math.isfinite(second["kappa"])


def test_before_the_first_image():
    """A layer that no image has come to is not known, and says so."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rest = nn.Conv2d(2, 2, 3, padding=1), pooled(nn.Conv2d(2, 3, 3))
            self.use = False

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.conv(x) if self.use else x)

    torch.manual_seed(0)
    model = Sometimes().double()
    optim = torch.optim.SGD(model.parameters(), lr=LR)
    with LipschitzMonitor(model, optim, conv="operator") as monitor:
        assert math.isnan(monitor.log_k)
        for use in (False, True):
            model.use = use
            x, y = images((2, 8, 8), 0)
            with torch.no_grad():
                model.rest(torch.zeros(1, 2, 30, 30).double())  # an evaluation: its images do not count
            optim.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optim.step()
    first, second = (row for row in monitor.history.rows if row["layer"] == "conv")
    assert "no image has been seen yet" in first["status"]
    assert math.isnan(first["sigma"])
    assert second["status"] == "ok"
    assert second["sigma"] > 0
    (rest, _) = (row for row in monitor.history.rows if row["layer"] == "rest.0")
    assert rest["status"] == "ok"


def test_where_no_patches_overlap_the_kernel_is_read():
    """Pointwise convolutions and patch embeddings: the norm is that of the reshaped kernel, split and all."""
    model = pooled(nn.Conv2d(2, 6, 4, stride=4), nn.Conv2d(6, 4, 1))
    monitor = trained(model, [(2, 12, 12)], noise="split")
    assert "operator" not in str(monitor.report())
    for row in monitor.history.rows[:2]:
        conv = model.get_submodule(row["layer"])
        assert math.isfinite(row["kappa_var"])
        after = math.exp(row["z"] + row["dz"])
        assert after == pytest.approx(float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)), rel=1e-12)
    assert ConvolutionOperator.of(model[0], 12).norm == pytest.approx(
        float(torch.linalg.matrix_norm(model[0].weight.detach().flatten(1), 2)), rel=1e-8
    )


def test_tied_kernels():
    """One kernel in two places, on images of two sizes: contributions are added, on the larger torus."""
    first, second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    second.weight = first.weight
    model = pooled(nn.Sequential(first, nn.MaxPool2d(2)), second)
    monitor = trained(model, [(3, 10, 10)] * 2)
    rows = [row for row in monitor.history.rows if row["layer"] == "0.0"]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    norm = ConvolutionOperator(first.weight.detach(), 10, padding=1).bounds().uppers["torus"]
    assert math.exp(rows[-1]["z"] + rows[-1]["dz"]) == pytest.approx(norm, rel=1e-9)


def test_stop_and_resume():
    def run(model: nn.Sequential, monitor: LipschitzMonitor, optim: torch.optim.SGD, steps: list[int]) -> None:
        for step in steps:
            x, y = images((2, *[(9, 9), (6, 6), (7, 7)][min(step, 2)]), step)
            optim.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optim.step()

    def start() -> tuple[nn.Sequential, torch.optim.SGD, LipschitzMonitor]:
        model = pooled(nn.Conv2d(2, 3, 3, padding=1))
        optim = torch.optim.SGD(model.parameters(), lr=LR)
        return model, optim, LipschitzMonitor(model, optim, conv="operator")

    model, optim, monitor = start()
    run(model, monitor, optim, [0, 1])
    states = model.state_dict(), monitor.state_dict()
    again, optim_again, resumed = start()
    again.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert resumed.log_k == monitor.log_k
    run(again, resumed, optim_again, [2, 3])
    run(model, monitor, optim, [2, 3])
    for one, other in zip(monitor.history.rows, resumed.history.rows, strict=True):
        for key, value in one.items():
            assert other[key] == (pytest.approx(value, rel=1e-9, nan_ok=True) if isinstance(value, float) else value)


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_the_largest_of_many_norms(scale):
    """Only what may be among the largest is decomposed; twin: all of them."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(200, 4, 6, 2, generator=generator, dtype=torch.float64)
    A = torch.view_as_complex(A * torch.linspace(0.3, 1.0, 200, dtype=torch.float64)[:, None, None, None])
    known = None
    for step in range(4):
        exact = torch.linalg.matrix_norm(A, 2)
        norms, order = _norms(scale * A, known)
        assert order == exact.topk(2).indices.tolist()
        torch.testing.assert_close(norms[order], scale * exact[order], rtol=1e-12, atol=0.0)
        assert bool((norms >= scale * exact * (1 - 1e-12)).all())
        assert spectral_norm(scale * A) == pytest.approx(scale * float(exact.amax()), rel=1e-12)
        known = read_spectrum(scale * A, known)
        assert known.sigma == pytest.approx(scale * float(exact.amax()), rel=1e-12)
        A = A + 0.1 * torch.randn(A.shape, generator=generator, dtype=A.dtype) / (1 + step)


@pytest.mark.parametrize(
    ("taps", "size", "stride", "dilation"),
    [
        ((3, 3), (6, 5), (1, 1), (1, 1)),
        ((3, 2), (8, 6), (2, 2), (1, 1)),
        ((3, 3), (8, 6), (1, 2), (2, 2)),
        ((3, 1), (6, 4), (1, 2), (3, 1)),
        ((4,), (12,), (2,), (3,)),
        ((5,), (12,), (4,), (2,)),
    ],
)
def test_distinct_frequencies_have_all_values(taps, size, stride, dilation):
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(3, 2, math.prod(taps), generator=generator, dtype=torch.float64)

    def values(distinct: bool) -> list[Tensor]:
        E = phases(taps, size, stride, dilation, distinct=distinct)
        return [torch.linalg.svdvals((W.to(E.dtype) @ e).flatten(1)) for e in E]

    few, every = values(True), values(False)
    assert len(few) < len(every)
    near = [[bool(torch.allclose(a, b, rtol=1e-9, atol=1e-12)) for b in few] for a in every]
    assert all(sum(row) == 1 for row in near)  # each is there, and no two of the few are the same


def largest(conv: nn.Module, *shape: int) -> float:
    """Norm of what a convolution does to images of that shape."""
    columns = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    bias = conv.bias.detach().reshape(-1, *[1] * (len(shape) - 1))
    return float(torch.linalg.matrix_norm((conv(columns).detach() - bias).flatten(1), 2))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_gradient_checkpointing(reentrant, make):
    """Nothing of the monitor's is saved by autograd inside a checkpoint: the rows are those without one."""
    tables = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = pooled(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
        optim = make(model.parameters(), lr=LR)
        with LipschitzMonitor(model, optim, conv="operator") as monitor:
            for step in range(3):
                x, y = images((2, 6 + step, 6), step)
                optim.zero_grad()
                x.requires_grad_()
                body = model[:3]
                if checkpointed:
                    hidden = torch.utils.checkpoint.checkpoint(body, x, use_reentrant=reentrant)
                else:
                    hidden = body(x)
                nn.functional.cross_entropy(model[3:](hidden), y).backward()
                optim.step()
        tables.append(monitor.history.rows)
    for row, other in zip(*tables, strict=True):
        if reentrant and row["layer"] == "2":
            continue  # images are seen in the backward pass there, and tori grow in it
        for key in ("sigma", "dz"):
            assert other[key] == pytest.approx(row[key], rel=1e-9, abs=1e-12)


def test_weights_that_are_not_finite():
    model = pooled(nn.Conv2d(2, 3, 3, padding=1))
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = math.nan
    monitor = trained(model, [(2, 6, 6), (2, 8, 8)])
    for row in monitor.history.rows:
        if row["layer"] == "0":
            assert "weight is not finite" in row["status"]
            assert math.isnan(row["sigma"])


def test_outputs_beyond_the_reach_of_a_transposed_kernel():
    model = pooled(nn.ConvTranspose2d(2, 3, 3, dilation=2, output_padding=1))
    monitor = trained(model, [(2, 5, 5)])
    row = monitor.history.rows[0]
    assert row["status"] == "ok"
    model[0].load_state_dict(model[0].state_dict())
    assert math.exp(row["z"] + row["dz"]) >= largest(model[0], 2, 5, 5) * (1 - 1e-12)


@pytest.mark.parametrize("way", ["first", "no-grad"])
def test_frozen_convolutions(way):
    """A frozen body is read from the first images too, also where it runs without gradients."""
    torch.manual_seed(2)
    body = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()).double().requires_grad_(False)
    head = pooled(nn.Conv2d(3, 3, 3, padding=1))
    model = nn.Sequential(body, head)
    optim = torch.optim.SGD(head.parameters(), lr=LR)
    with LipschitzMonitor(model, optim, conv="operator") as monitor:
        for step in range(2):
            size = 6 if way == "no-grad" or step == 0 else 9
            x, y = images((2, size, size), step)
            optim.zero_grad()
            with torch.set_grad_enabled(way == "first"):
                hidden = body(x)
            nn.functional.cross_entropy(head(hidden), y).backward()
            optim.step()
    rows = [row for row in monitor.history.rows if row["layer"] == "0.0"]
    assert all(row["status"].startswith("frozen") for row in rows)
    norms = [ConvolutionOperator.of(body[0], n).bounds().uppers["torus"] for n in (6, 9 if way == "first" else 6)]
    assert [row["sigma"] for row in rows] == pytest.approx(norms)
    assert all(math.isfinite(row["z"]) for row in monitor.history.rows)


@pytest.mark.parametrize("stride", [1, 2])
def test_circular_convolutions_of_several_sizes(stride):
    """Exact while there is one size; with more of them, a bound for all."""
    model = pooled(nn.Conv2d(2, 3, 3, padding=1, stride=stride, padding_mode="circular"))
    sizes, norms = [8, 6, 8, 6], []
    optim = torch.optim.SGD(model.parameters(), lr=LR)
    with LipschitzMonitor(model, optim, conv="operator") as monitor:
        for step, size in enumerate(sizes):
            norms.append(largest(model[0], 2, size, size))
            x, y = images((2, size, size), step)
            optim.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optim.step()
    sigmas = [row["sigma"] for row in monitor.history.rows if row["layer"] == "0"]
    assert sigmas[0] == pytest.approx(norms[0], rel=1e-12)
    assert all(norm <= sigma * (1 + 1e-12) for norm, sigma in zip(norms, sigmas, strict=True))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"stride": 2, "padding": 1}, {"padding": 1}),
        ({"stride": 3}, {"padding": 1}),
        ({"padding": 1}, {"stride": 3}),
        ({"padding": 1}, {"padding": 1, "padding_mode": "replicate"}),
        ({"padding": 1, "padding_mode": "circular"}, {"padding": 1}),
    ],
)
def test_one_kernel_in_two_operators(first, second):
    """Of the same stride and dilation one torus bounds both; else the reshaped kernel is read, as the report says."""
    one, other = nn.Conv2d(3, 3, 3, **first).double(), nn.Conv2d(3, 3, 3, **second).double()
    other.weight = one.weight

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.head = one, other, nn.Linear(6, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.one(x).mean((2, 3)), self.other(x).mean((2, 3))], 1))

    monitor = trained(Both(), [(3, 6, 6)] * 2)
    (*_, last) = (row for row in monitor.history.rows if row["layer"] == "one")
    assert last["status"] == "ok"
    assert math.isfinite(last["kappa"])
    same = first.get("stride", 1) == second.get("stride", 1)
    assert ("both read as reshaped kernels" in str(monitor.report())) == (not same)
    assert ("as an operator on images" in str(monitor.report())) == same
    after = math.exp(last["z"] + last["dz"])
    if same:
        assert max(largest(one, 3, 6, 6), largest(other, 3, 6, 6)) <= after * (1 + 1e-12)
    else:
        assert after == pytest.approx(float(torch.linalg.matrix_norm(one.weight.detach().flatten(1), 2)), rel=1e-12)


def test_a_rule_of_ones_own_for_a_convolution():
    """What it makes of the kernel is its own business: its matrix is read as it is."""
    from lipdyn_torch.convolution_rules import ConvRule
    from lipdyn_torch.layers import _RULES, register_rule

    class Halved(nn.Conv2d):
        pass

    class HalvedRule(ConvRule):
        def effective(self, module, part, tensors):
            return 0.5 * self.matrices(module, part, tensors)

    register_rule(Halved, HalvedRule())
    try:
        model = pooled(Halved(2, 3, 3, padding=1))
        expected = 0.5 * float(torch.linalg.matrix_norm(model[0].weight.detach().flatten(1), 2))
        assert trained(model, [(2, 6, 6)]).history.rows[0]["sigma"] == pytest.approx(expected)
    finally:
        del _RULES[Halved]


def test_another_default_device():
    """What is computed for the geometry stays on the CPU."""
    A = ConvolutionOperator(torch.ones(1, 1, 3, 3), 8, padding=1, padding_mode="replicate")
    expected = A.bounds().uppers["torus"]
    with torch.device("meta"):
        assert A.bounds().uppers["torus"] == expected
        assert ConvolutionOperator.like(nn.Conv2d(2, 2, 3), 8).torus == [8, 8]
