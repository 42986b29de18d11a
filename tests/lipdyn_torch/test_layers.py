"""Every kind of layer against the dense definition, and the report on what is read how."""

from __future__ import annotations

import math

import pytest
import torch
from dense_forces import compare, flat, forces, per_sample
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lipdyn_torch import LipschitzMonitor
from lipdyn_torch.layers import Block, EmbeddingBagRule, LayerRule, find_rule, register_rule, unsupported_reason
from lipdyn_torch.low_rank import LowRankSumRule


class Twice(nn.Module):
    """One layer called twice, and its weight used by another module."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=2)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x)))


class Attention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **settings)
        self.first = settings.get("batch_first", False)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        other = x[..., : self.attention.kdim] if self.attention.kdim else x
        mask = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
        out = self.attention(x, other, other, attn_mask=mask)[0]
        return out if self.first else out.transpose(0, 1)


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(5, 4)
        self.base.requires_grad_(False)
        self.up, self.down = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 5))
        self.scaling = 0.7

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * x @ self.down.T @ self.up.T


class Own(nn.Module):
    """No rule: read by the fallback."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(5, 4))
        self.shift = nn.Parameter(torch.randn(4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x @ self.mix + self.shift) @ self.mix.T


class OwnWithRule(Own):
    pass


class OwnRule(LayerRule):
    parameter = "mix"

    def per_sample(self, module, x, delta, block):
        x, delta = x.double(), delta.double()
        hidden = torch.tanh(x @ module.mix + module.shift)
        back = (delta @ module.mix) * (1 - hidden.square())
        yield (torch.einsum("ia,ib->iab", delta, hidden) + torch.einsum("ia,ib->iab", x, back)).detach()


register_rule(LowRank, LowRankSumRule("base.weight", "up", "down", "scaling"))
register_rule(OwnWithRule, OwnRule())

F64 = torch.float64
MODELS = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2), (2, 9), {}),
    "conv1d-depthwise": (lambda: nn.Conv1d(3, 6, 3, groups=3, padding="same"), (3, 5), {}),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, (2, 3), groups=2, stride=(1, 2), padding=(0, 1)), (4, 3, 5), {}),
    "conv3d": (lambda: nn.Conv3d(1, 3, 2, stride=(1, 2, 1), padding=(0, 1, 0)), (1, 3, 3, 3), {}),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 2, 3, stride=2, padding=1, output_padding=1), (3, 4), {}),
    "transposed2d-groups": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2, dilation=2, stride=2), (4, 2, 3), {}),
    "transposed2d-output-padding": (
        lambda: nn.ConvTranspose2d(2, 3, 2, stride=1, dilation=3, output_padding=2),
        (2, 3, 3),
        {},
    ),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 2, 2, stride=(2, 1, 1)), (2, 2, 2, 2), {}),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=2), (5,), {}),
    "embedding-sparse": (lambda: nn.Embedding(7, 4, sparse=True), (5,), {}),
    "embedding-bag": (lambda: nn.EmbeddingBag(7, 4, padding_idx=2), (5,), {}),
    "embedding-few-read": (lambda: nn.Embedding(60, 4, padding_idx=2), (5,), {}),
    "tied-embedding": (TiedEmbedding, (5,), {"table": ("table.weight",)}),
    "twice-and-tied": (Twice, (4,), {"a": ("a.weight",)}),
    "attention": (Attention, (3, 4), {}),
    "attention-batch-first": (lambda: Attention(batch_first=True), (3, 4), {}),
    "attention-kdim": (lambda: Attention(kdim=3, vdim=3), (3, 4), {}),
    "low-rank": (LowRank, (5,), {"LowRank": ("base.weight", "up", "down")}),
    "fallback": (Own, (5,), {"Own.mix": ("mix",)}),
    "own-rule": (OwnWithRule, (5,), {"OwnWithRule": ("mix",)}),
}


def matrices(name: str, row: str, model: nn.Module):
    """The effective matrices of a row as a function of its parameters."""
    if name == "low-rank":
        return lambda W, B, A: W + 0.7 * B @ A
    if name.startswith("attention") and model.attention._qkv_same_embed_dim and not row.endswith("out_proj"):
        return lambda w: w.chunk(3)["qkv".index(row[-1])]
    groups = getattr(model, "groups", 1)
    return lambda w: w.reshape(groups, w.shape[0] // groups, -1)


def names_of(row: str, model: nn.Module, known: dict) -> tuple[str, ...]:
    if row in known:
        return known[row]
    if isinstance(model, Attention):
        if row.endswith("out_proj"):
            return ("attention.out_proj.weight",)
        apart = not model.attention._qkv_same_embed_dim
        return (f"attention.{row[-1]}_proj_weight" if apart else "attention.in_proj_weight",)
    return ("weight",)


def inputs(name: str, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    make, shape, _ = MODELS[name]
    model = make().double()
    x = torch.randint(7, (6, *shape)) if "embedding" in name else torch.randn(6, *shape, dtype=F64)
    with torch.no_grad():
        target = torch.randn(model(x).shape, dtype=F64)
    return (x if "embedding" in name else x.to(dtype)), target.to(dtype)


def build(name: str):
    torch.manual_seed(5)
    make, _, known = MODELS[name]
    model = make().double()
    x, target = inputs(name)
    return model, known, lambda m, i: (torch.sin(m(x[i]) + target[i]) * target[i]).sum() / 6


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("noise", ["full", "split"])
@pytest.mark.parametrize("name", list(MODELS))
def test_layer_against_the_dense_definition(name, noise, kind):
    model, known, loss = build(name)
    if kind == "adam" and "sparse" in name:
        return  # Adam takes no sparse gradients
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "sgd":
        optimizer = torch.optim.SGD(trained, lr=1e-3)
    else:
        optimizer = torch.optim.Adam(trained, lr=1e-4)
    everything = slice(None)
    monitor = LipschitzMonitor(model, optimizer, noise=noise)
    with torch.no_grad():
        assert all(watch.spectrum.triplet is not None for watch in monitor._watches)
    rows_names = {row: names_of(row, model, known) for row in monitor.layers}
    monitor._switch.on = False
    G = {
        row: per_sample(model.requires_grad_(True), names, lambda m, i: loss(m, slice(i, i + 1)), 6)
        for row, names in rows_names.items()
    }
    for p in model.parameters():
        p.requires_grad_(any(p is q for q in trained))
    monitor._switch.on = True
    before = {row: [model.get_parameter(n).detach().clone() for n in names] for row, names in rows_names.items()}
    optimizer.zero_grad()
    loss(model, everything).backward()
    optimizer.step()
    for row in monitor.history.rows[:-1]:
        names = rows_names[row["layer"]]
        parameters = [model.get_parameter(n) for n in names]
        W, b = [], []
        for p, old in zip(parameters, before[row["layer"]], strict=True):
            b.append(p.detach() - old)
            if not p.requires_grad:
                W.append(torch.zeros_like(p))
            elif kind == "sgd":
                W.append(torch.ones_like(p))
            else:
                W.append(1 / ((optimizer.state[p]["exp_avg_sq"] / 1e-3).sqrt() + 1e-8))
        effective = matrices(name, row["layer"], model)
        lr = optimizer.param_groups[0]["lr"]
        expected = forces(before[row["layer"]], effective, G[row["layer"]], flat(W).detach(), flat(b), lr)
        if noise == "split" and name == "low-rank":
            assert row["status"] == "variance part: the matrix is not a parameter itself"
            assert math.isnan(row["kappa_var"])
        else:
            assert row["status"] == "ok"
        compare(row, expected)
        if noise == "split" and name != "low-rank":
            compare(row, expected, ["kappa_var", "lambda_sq_var"])
        sigma = torch.linalg.svdvals(effective(*parameters).detach()).max()
        assert row["z"] + row["dz"] == pytest.approx(float(sigma.log()), abs=1e-12)
        assert abs(row["remainder"]) <= row["bound"]
    monitor.close()


@st.composite
def convolutions(draw) -> tuple[nn.Module, Tensor]:
    """Convolutions and their transposes of every kind, some with taps that meet nothing but the border; an input."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))

    def axes(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(dims)]

    kernel, stride, dilation, padding = axes(1, 4), axes(1, 3), axes(1, 2), axes(0, 3)
    options = {"stride": stride, "dilation": dilation, "groups": groups, "dtype": F64}
    if draw(st.booleans()):
        extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        make, options = f"ConvTranspose{dims}d", {**options, "padding": padding, "output_padding": extra}
    else:
        mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
        named = draw(st.sampled_from(["same", "valid", None]))
        options |= {"padding": named or padding, "padding_mode": mode}
        options |= {"stride": 1} if named == "same" else {}
        make = f"Conv{dims}d"
    torch.manual_seed(draw(st.integers(0, 99)))
    return getattr(nn, make)(2 * groups, 2 * groups, kernel, **options), torch.randn(
        3, 2 * groups, *axes(2, 8), dtype=F64
    )


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@settings(max_examples=80, deadline=None)
@given(convolutions())
def test_convolutions_of_every_kind(case):
    module, x = case
    try:
        y = module(x)
    except RuntimeError:
        assume(False)  # the kernel, or its border, is larger than the picture
    delta, rule = torch.randn_like(y), find_rule(module)
    each = [torch.autograd.grad(module(x[i : i + 1]), module.weight, delta[i : i + 1])[0] for i in range(len(x))]
    for group in range(module.groups):
        block = Block("", group)
        G = torch.stack([rule.matrices(module, "", [gradient])[group] for gradient in each])
        u, v = torch.randn(G.shape[1], dtype=F64), torch.randn(G.shape[2], dtype=F64)
        with torch.no_grad():
            p, q = rule.contract(module, x, delta, u, v, block)
            torch.testing.assert_close(torch.cat(list(rule.per_sample(module, x, delta, block))), G)
            torch.testing.assert_close(rule.sum_of_squares(module, x, delta, block), G.square().sum(0))
        torch.testing.assert_close(p, G @ v)
        torch.testing.assert_close(q, G.mT @ u)


def test_report_names_everything():
    model = nn.ModuleDict(
        {
            **{
                "linear": nn.Linear(3, 2),
                "conv": nn.Conv1d(4, 4, 2, groups=2),
                "attention": nn.MultiheadAttention(4, 2),
            },
            **{"own": Own(), "norm": nn.LayerNorm(3), "lstm": nn.LSTM(2, 2), "mixed": Mixed()},
            **{"renormed": nn.Embedding(3, 2, max_norm=1.0), "frozen": nn.Linear(2, 2).requires_grad_(False)},
            "weightnorm": nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)),
            "spectralnorm": nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3, bias=False)),
        }
    )
    with LipschitzMonitor(model, torch.optim.SGD(model.parameters(), lr=0.1)) as monitor:
        entries = {entry.module: (entry.how, entry.detail) for entry in monitor.report()}
    assert entries["linear"] == ("monitored", "2 x 3")
    assert entries["conv"] == ("monitored", "2 of 2 x 4")
    assert {entries[f"attention.{part}"] for part in ("q", "k", "v", "out_proj")} == {("monitored", "4 x 4")}
    assert entries["own.mix"] == ("fallback", "5 x 4")
    assert entries["frozen"] == ("monitored", "2 x 2, frozen: sigma only")
    assert entries["norm"] == ("skipped", "no rule for LayerNorm")
    assert entries["lstm"][1] == "recurrent layer LSTM: no rule"
    assert entries["renormed"][1] == "embedding with max_norm: the forward pass changes the table"
    assert entries["mixed"][1] == "Mixed owns parameters beside submodules: register a rule for it"
    assert entries["mixed.inner"] == ("monitored", "2 x 2")
    computed = ("skipped", "its weight is computed from other parameters (a parametrisation)")
    assert entries["weightnorm"] == entries["spectralnorm"] == computed
    assert not any("parametrizations" in name for name in entries)  # one line a layer
    lists = nn.utils.parametrize.ParametrizationList
    owners = {n for n, m in model.named_modules() if list(m.parameters(recurse=False)) and not isinstance(m, lists)}
    covered = {"attention", "attention.out_proj", "own"} | set(entries)
    assert owners <= covered
    assert str(monitor.report()).splitlines()[1].split() == ["linear", "Linear", "monitored", "2", "x", "3"]


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.matrix = nn.Linear(2, 2), nn.Parameter(torch.randn(2, 2))


def test_attention_with_dropout_says_so():
    torch.manual_seed(0)
    model = Attention(dropout=0.3, batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with LipschitzMonitor(model, optimizer) as monitor:
        model(torch.randn(5, 3, 4)).square().mean().backward()
        optimizer.step()
    for row in monitor.history.rows[:-1]:
        assert row["status"] == "per-sample gradients failed: attention with dropout cannot be run again"
        assert math.isnan(row["kappa"])
        assert abs(row["remainder"]) <= row["bound"]


def test_the_fallback_runs_a_copy():
    """Hooks of the user's on the module, and its buffers, see the training's own calls only."""
    torch.manual_seed(0)
    model, calls = Own(), []
    model.register_forward_hook(lambda *args: calls.append(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with LipschitzMonitor(model, optimizer) as monitor:
        model(torch.randn(6, 5)).square().mean().backward()
        optimizer.step()
    assert monitor.history.rows[0]["status"] == "ok"
    assert len(calls) == 1
    assert float(model.calls) == 1.0


@pytest.mark.parametrize("name", ["conv2d-groups", "transposed2d-groups", "attention", "fallback", "tied-embedding"])
def test_single_precision_is_close_to_double(name):
    tables = []
    for dtype in (torch.float32, torch.float64):
        model, _, loss = build(name)
        single = {key: value.float() for key, value in model.state_dict().items()}
        model.load_state_dict(single)
        model.to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        x, target = inputs(name, dtype)
        with LipschitzMonitor(model, optimizer) as monitor:
            (torch.sin(model(x) + target) * target).sum().backward()
            optimizer.step()
        tables.append(monitor.history.rows)
        del loss
    for row, expected in zip(*tables, strict=True):
        for key in ("sigma", "mu", "kappa", "lambda_sq"):
            scale = max(abs(r[key]) for r in tables[1])
            assert abs(row[key] - expected[key]) <= 1e-4 * scale, key


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("last", [False, True], ids=["", "last-offset"])
@pytest.mark.parametrize("mode", ["sum", "mean", "weighted"])
def test_bags(mode, last, padding):
    """Bags of different sizes, one of them empty, given by offsets: each sample's gradient is that of its bag alone."""
    torch.manual_seed(0)
    kind = "sum" if mode == "weighted" else mode
    bag = nn.EmbeddingBag(7, 3, mode=kind, padding_idx=padding, include_last_offset=last).double()
    index, offsets = torch.tensor([1, 2, 2, 6, 0, 1, 1]), [0, 3, 3, 5, *([7] if last else [])]
    weights = {"per_sample_weights": torch.rand(7, dtype=F64)} if mode == "weighted" else {}
    args = (index, torch.tensor(offsets))
    out = bag(*args, **weights)
    delta = torch.randn(4, 3, dtype=F64)
    rule, block = EmbeddingBagRule(), Block()
    assert type(find_rule(bag)) is EmbeddingBagRule
    x = rule.inputs(bag, args, weights)
    found = torch.cat(list(rule.per_sample(bag, x, delta, block)))
    for i in range(4):
        (expected,) = torch.autograd.grad((out[i] * delta[i]).sum(), bag.weight, retain_graph=True)
        torch.testing.assert_close(found[i], expected, rtol=1e-13, atol=1e-15)
    u, v = torch.randn(7, dtype=F64), torch.randn(3, dtype=F64)
    p, q = rule.contract(bag, x, delta, u, v, block)
    torch.testing.assert_close(p.dense(), found @ v, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(q, found.mT @ u, rtol=1e-12, atol=1e-14)
    squares = rule.sum_of_squares(bag, x, delta, block)
    torch.testing.assert_close(squares, found.square().sum(0), rtol=1e-12, atol=1e-14)


def test_bags_without_entries():
    bag = nn.EmbeddingBag(7, 3, mode="mean").double()
    rule = EmbeddingBagRule()
    x = rule.inputs(bag, (torch.empty(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)), {})
    delta, u, v = torch.ones(2, 3, dtype=F64), torch.ones(7, dtype=F64), torch.ones(3, dtype=F64)
    p, q = rule.contract(bag, x, delta, u, v, Block())
    assert not p.dense().any()
    assert not q.any()
    assert "mode 'max'" in unsupported_reason(nn.EmbeddingBag(7, 3, mode="max"))


def test_rules_that_are_none():
    linear = nn.Linear(2, 2)
    for module in (linear, None, int, "Linear"):
        with pytest.raises(TypeError, match=r"expected a class of modules, such as torch\.nn\.Linear, got "):
            register_rule(module, find_rule(linear))
    for rule in (LayerRule, None, print):
        with pytest.raises(TypeError, match=r"expected an instance of LayerRule, such as LinearRule\(\), got "):
            register_rule(nn.Bilinear, rule)
    assert find_rule(nn.Bilinear(2, 2, 2)) is None


ATTENTIONS = {
    "causal": ({}, {"attn_mask": torch.ones(3, 3).triu(1).bool(), "is_causal": True, "need_weights": False}),
    "padding": ({"batch_first": True}, {"key_padding_mask": torch.tensor([[False, False, True]] * 4)}),
    "masks-of-heads": ({}, {"attn_mask": torch.linspace(-1, 1, 4 * 2 * 3 * 3).reshape(8, 3, 3)}),
    "extra-keys": ({"add_bias_kv": True, "add_zero_attn": True}, {"average_attn_weights": False}),
    "no-biases": ({"bias": False, "batch_first": True}, {"need_weights": False}),
    "evaluation": ({"dropout": 0.5}, {}),
}


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("crossed", [False, True], ids=["self", "crossed"])
def test_attention_against_one_sample_at_a_time(name, crossed):
    """All options of the module; with ``crossed`` queries, keys and values differ, and so do their widths."""
    torch.manual_seed(0)
    settings, options = ATTENTIONS[name]
    widths = {"kdim": 3, "vdim": 5} if crossed else {}
    module = nn.MultiheadAttention(6, 2, **settings, **widths).double().train(name != "evaluation")
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    query = torch.randn(3, 4, 6, dtype=F64)
    key, value = (torch.randn(3, 4, width, dtype=F64) for width in (3, 5)) if crossed else (query, query)
    axis = 0 if module.batch_first else 1
    args = [z.movedim(1, axis) for z in (query, key, value)]
    options = {
        k: z.double() if isinstance(z, torch.Tensor) and z.is_floating_point() else z for k, z in options.items()
    }
    rule = find_rule(module)
    out = module(*args, **options)[0]
    delta = torch.randn_like(out)
    x = rule.inputs(module, tuple(args), options)
    u = {"q": torch.randn(6), "k": torch.randn(6), "v": torch.randn(6), "out_proj": torch.randn(6)}
    for part in rule.parts(module):
        (path,) = rule.parameters(module, part)
        weight = module.get_parameter(path)
        found = torch.cat(list(rule.per_sample(module, x, delta, Block(part))))
        for i in range(4):
            loss = (out.select(axis, i) * delta.select(axis, i)).sum()
            (G,) = torch.autograd.grad(loss, weight, retain_graph=True)
            expected = rule.matrix(module, part, [G], 0)
            torch.testing.assert_close(found[i], expected, rtol=1e-10, atol=1e-12)
        a, b = u[part].double(), torch.randn(found.shape[2], dtype=F64)
        p, q = rule.contract(module, x, delta, a, b, Block(part))
        torch.testing.assert_close(p, found @ b, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(q, found.mT @ a, rtol=1e-10, atol=1e-12)


def test_attention_with_a_forward_pass_of_its_own():
    class Scaled(nn.MultiheadAttention):
        def forward(self, query, key, value):
            return super().forward(2.0 * query, key, value)

    assert unsupported_reason(Scaled(4, 2)) == "Scaled has a forward pass of its own: register a rule for it"
