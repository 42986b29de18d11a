"""Whatever is used in training, it goes on bit by bit as if there were no monitor, and nothing piles up."""

from __future__ import annotations

import ctypes
import gc
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lipdyn_torch import LipschitzMonitor
from lipdyn_torch.layers import LayerRule, register_rule
from lipdyn_torch.low_rank import LowRankSumRule
from lipdyn_torch.reference import MeanGradient

STEPS = 4


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    """Models as small as these only lose by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bits(value: Any) -> Any:
    """What two equal values share and no others do: NaN equals itself, 0 is not -0, layout and type count."""
    if not isinstance(value, Tensor):
        return repr(value)
    value = value.detach()
    if value.is_sparse:
        return "sparse", value.shape, value.is_coalesced(), bits(value._indices()), bits(value._values())
    raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return value.dtype, value.shape, value.stride(), value.requires_grad, raw


def leaves(label: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The bits of everything in nested containers."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(f"{label}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(f"{label}[{index}]", item)
    else:
        yield label, bits(value)


class Run:
    """One training, watched if there are settings, and the bits of all that must not depend on it."""

    def __init__(self, settings: dict[str, Any] | None) -> None:
        self.settings = settings
        self.monitors: list[LipschitzMonitor] = []
        self.closed: dict[LipschitzMonitor, int] = {}  # and the number of steps it has seen
        self.steps = 0
        self.bits: list[tuple[str, Any]] = []

    def train(self, feature: Callable[[Run], None]) -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002  (the global state is what must stay)
        try:
            feature(self)
        finally:
            for monitor in self.monitors:
                self.close(monitor)

    def watch(self, model: nn.Module, optimizer: Optimizer, **more: Any) -> None:
        self.model, self.optimizer = model, optimizer
        if self.settings is not None:
            self.monitors.append(LipschitzMonitor(model, optimizer, **{**self.settings, **more}))

    def close(self, monitor: LipschitzMonitor) -> None:
        monitor.close()
        self.closed.setdefault(monitor, self.steps)

    def see(self, label: str, value: Any) -> None:
        self.bits += leaves(label, value)

    def note(self, loss: Any) -> None:
        """After a step: all there is."""
        self.steps += 1
        self.see("loss", loss)
        self.see("model", dict(self.model.state_dict()))
        self.see("grad", {name: p.grad for name, p in self.model.named_parameters()})
        self.see("buffer", dict(self.model.named_buffers()))
        self.see("optimizer", self.optimizer.state_dict())
        self.see("generators", [torch.get_rng_state(), random.getstate(), np.random.get_state()])  # noqa: NPY002
        self.see("mode", [module.training for module in self.model.modules()])

    def differences(self, other: Run) -> list[str]:
        assert [label for label, _ in self.bits] == [label for label, _ in other.bits]
        return [label for (label, a), (_, b) in zip(self.bits, other.bits, strict=True) if a != b]


def vectors(samples: int = 6) -> tuple[Tensor, Tensor]:
    """A batch from the global generator: a number drawn too many would show."""
    return torch.randn(samples, 6), torch.randint(3, (samples,))


def sequences(samples: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 4, 6), torch.randint(3, (samples,))


def indices(samples: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randint(7, (samples, 4)), torch.randint(3, (samples,))


def mlp(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), *(middle or (nn.Tanh(), nn.Dropout(0.2))), nn.Linear(8, 3))


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def nothing() -> None:
    return None


def train(
    run: Run,
    model: nn.Module,
    optimizer: Optimizer,
    draw: Callable[[], tuple[Tensor, Tensor]] = vectors,
    forward: Callable[[Tensor], Tensor] | None = None,
    before: Callable[[], Any] = nothing,
    after_backward: Callable[[], Any] = nothing,
    set_to_none: bool = True,
) -> None:
    """The plain loop, with room for what a feature adds to it."""
    for _ in range(STEPS):
        before()
        x, y = draw()
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = functional.cross_entropy((forward or model)(x), y)
        loss.backward()
        after_backward()
        optimizer.step()
        run.note(loss)


def watched(run: Run, make: Callable[[], nn.Module], optimiser: Callable[[nn.Module], Optimizer], **loop: Any) -> None:
    """A feature that is nothing but a model, an optimiser, and settings of the loop."""
    model = make()
    optimizer = optimiser(model)
    run.watch(model, optimizer)
    train(run, model, optimizer, **loop)


# --- the features: each trains a few steps and notes what it has come to ---------------------------------------


def autocast(run: Run, dtype: torch.dtype, make: Callable[[nn.Module], Optimizer] = sgd) -> None:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return model(x)

    model = mlp()
    optimizer = make(model)
    run.watch(model, optimizer)
    train(run, model, optimizer, forward=forward)


def scaler(run: Run, dtype: torch.dtype, optimiser: Callable[[nn.Module], Optimizer], unscale: bool) -> None:
    """The second gradient is infinite, and the scaler leaves that step out."""
    model = mlp()
    optimizer = optimiser(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    run.watch(model, optimizer)
    for step in range(STEPS):
        x, y = vectors()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        with torch.autocast("cpu", dtype=dtype):
            loss = functional.cross_entropy(model(x), y) * (math.inf if step == 1 else 1.0)
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        weight = next(model.parameters())
        before = weight.detach().clone()
        scaler.step(optimizer)
        assert torch.equal(before, weight) == (step == 1)
        scaler.update()
        run.see("scaler", scaler.state_dict())
        run.note(loss)


def accumulation(run: Run) -> None:
    model = mlp()
    optimizer = adamw(model)
    run.watch(model, optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for samples in (4, 4, 3):
            x, y = vectors(samples)
            loss = functional.cross_entropy(model(x), y) / 3
            loss.backward()
            run.see("micro-batch", [loss, *(p.grad for p in model.parameters())])
        optimizer.step()
        run.note(loss)


def checkpointed(run: Run, reentrant: bool) -> None:
    def forward(x: Tensor) -> Tensor:
        x = checkpoint(model[:3], x.requires_grad_(), use_reentrant=reentrant)
        return checkpoint(model[3:], x, use_reentrant=reentrant)

    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 3)
    )
    optimizer = sgd(model)
    run.watch(model, optimizer)
    train(run, model, optimizer, forward=forward)


def closure(run: Run, optimiser: Callable[[nn.Module], Optimizer], *middle: nn.Module) -> None:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        run.see("evaluation", [loss, *(p.grad for p in model.parameters())])
        return loss

    model = mlp(*middle)
    optimizer = optimiser(model)
    run.watch(model, optimizer)
    for _ in range(STEPS):
        x, y = vectors()
        step: Any = optimizer.step  # whose type knows no closures that return tensors
        run.note(step(evaluate))


@cache
def compiled_steps_are_the_plain_ones() -> bool:
    """Whether torch itself, without a monitor, makes the same steps to the last bit."""

    def trained(compile_: bool) -> list[Tensor]:
        torch.manual_seed(0)
        torch.compiler.reset()
        model = mlp(nn.Tanh())
        optimizer = plain_sgd(model)

        def work(x: Tensor, y: Tensor) -> None:
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        step: Any = torch.compile(work, backend="eager") if compile_ else work
        for _ in range(STEPS):
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step(*vectors())
        return list(model.parameters())

    with torch.random.fork_rng():
        return all(map(torch.equal, trained(True), trained(False)))


def compiled(
    run: Run,
    fullgraph: bool,
    every: tuple[int, ...] = (2,),
    closed: int | None = None,
    around: str = "model",
) -> None:
    """Measured steps run uncompiled, the others in one graph, as ever: the backend counts its calls and graphs.

    The first of several monitors is closed after step ``closed``. What is compiled may be a function around the model,
    of which the monitor knows nothing: the loss, the loss and its backward pass, or all of a step.
    """
    calls, graphs = [], []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)

        def call(*args: Any) -> Any:
            calls.append(0)
            return graph.forward(*args)

        return call

    gc.collect()  # monitors of other tests that were never closed keep the process uncompiled
    if around == "step" and not compiled_steps_are_the_plain_ones():
        pytest.skip("this torch makes other steps when it compiles them, monitor or not")
    torch.compiler.reset()
    model = mlp(nn.Tanh())
    optimizer = plain_sgd(model)

    def work(x: Tensor, y: Tensor) -> Tensor:
        loss = functional.cross_entropy(wrapped(x) if around == "model" else model(x), y)
        if around in ("backward", "step"):
            loss.backward()
        if around == "step":
            optimizer.step()
        return loss

    wrapped: Any = torch.compile(model if around == "model" else work, backend=backend, fullgraph=fullgraph)
    for period in every:
        run.watch(wrapped if around == "model" else model, optimizer, every=period)
    run.model = model
    ran_compiled, expected = [], []
    try:
        for step in range(STEPS + 2):  # to a step of the first monitor after one of the second, and the reverse
            x, y = vectors()
            optimizer.zero_grad()
            calls.clear()
            expected.append(not any(step % m.history.meta["every"] == 0 for m in run.monitors if m not in run.closed))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch's own, about its own optimisers and backward passes
                loss = work(x, y) if around == "model" else wrapped(x, y)
            ran_compiled.append(bool(calls))
            if around in ("model", "loss"):
                loss.backward()
            if around != "step":
                optimizer.step()
            run.note(loss)
            if step == closed and run.monitors:
                run.close(run.monitors[0])
    finally:
        torch.compiler.reset()
    assert ran_compiled == expected
    again = closed is not None and bool(run.monitors)  # without hooks it is another model
    assert len(graphs) == 1 + (around == "step") + again  # torch's optimisers are a graph of their own


def evaluation(run: Run) -> None:
    def look() -> None:
        x, _ = vectors()
        model.eval()
        with torch.no_grad():
            run.see("no_grad", model(x))
        with torch.inference_mode():
            run.see("inference", model(x).clone())
        run.see("discarded", model(x))
        model.train()
        with torch.no_grad():
            run.see("training mode", model(x))  # moves buffers, draws numbers

    model = mlp(nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
    optimizer = sgd(model)
    run.watch(model, optimizer)
    train(run, model, optimizer, before=look)


def batch_norm() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, padding=1), nn.BatchNorm1d(4), nn.ReLU(inplace=True)),
        *(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.1, inplace=True), nn.Linear(8, 3)),
    )


class InPlace(nn.Module):
    """Activations and sums written over the outputs of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu_(self.a(x))
        y = self.b(x)
        y += x
        y[:, :2].mul_(0.5)
        return self.c(functional.leaky_relu_(y)).div_(2.0)


class InPlaceViews(nn.Module):
    """Outputs that are views are written over, those of attention along transposed axes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.attention = nn.Linear(6, 6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu_(self.a(x))
        y, _ = self.attention(x, x, x)
        y += x
        y = self.head(y)
        y[..., 0] = -1.0
        return y.div_(2.0).mean(1)


class Tied(nn.Module):
    """One layer used twice, its weight used by another, and a frozen layer below."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.idle = nn.Linear(6, 6)  # no gradient reaches it
        self.frozen.requires_grad_(False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.tanh(self.a(torch.tanh(self.a(self.frozen(x)))))))


def groups(model: Any) -> Optimizer:
    body = [model.a.weight, model.a.bias, model.b.bias, *model.frozen.parameters(), *model.idle.parameters()]
    heads = {"params": list(model.head.parameters()), "lr": 0.01, "weight_decay": 0.1}
    return torch.optim.SGD([{"params": body, "momentum": 0.9, "nesterov": True}, heads], lr=0.05)


def two_monitors(run: Run) -> None:
    model = mlp()
    optimizer = adamw(model)
    run.watch(model, optimizer)
    run.watch(model, optimizer, every=2, noise="split")
    train(run, model, optimizer)


def clipped(run: Run, by_value: bool) -> None:
    def clip() -> None:
        if by_value:
            nn.utils.clip_grad_value_(model[0].parameters(), 1e-2)
        else:
            run.see("norm", nn.utils.clip_grad_norm_(model.parameters(), 0.1))

    model = mlp()
    optimizer = sgd(model)
    run.watch(model, optimizer)
    train(run, model, optimizer, after_backward=clip)


class Own(nn.Module):
    """No rule: the fallback runs it again, and must not draw numbers, move the buffer or reach the gradients."""

    calls: Tensor

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.mix, self.shift = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))
        self.drop = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.drop(torch.tanh(x @ self.mix + self.shift))


class OwnWithRule(Own):
    pass


class OwnRule(LayerRule):
    parameter = "mix"

    def per_sample(self, module: Any, x: Tensor, delta: Tensor, block: Any) -> Iterator[Tensor]:
        x, delta = x.double(), delta.double()
        slope = 1.0 - torch.tanh(x @ module.mix.double() + module.shift.double()).square()
        yield torch.einsum("ia,ib->iab", x, delta * slope).detach()


register_rule(OwnWithRule, OwnRule())


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 3)
        self.base.requires_grad_(False)
        self.up, self.down = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.7 * x @ self.down.T @ self.up.T


register_rule(LowRank, LowRankSumRule("base.weight", "up", "down", 0.7))


class Attention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, dropout=dropout), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.head(self.attention(x, x, x)[0].mean(0))


class Encoder(nn.Module):
    """A transformer's layer and a head."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=dropout, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.layer(x, src_key_padding_mask=mask).mean(1))


class Text(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 6, padding_idx=2, **settings), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(1))


def plain_sgd(model: nn.Module) -> Optimizer:
    """Without momentum: what sparse gradients allow."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


def nan_loss(run: Run) -> None:
    model = mlp()
    optimizer = sgd(model)
    run.watch(model, optimizer)
    for step in range(STEPS):
        x, y = vectors()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y) * (math.nan if step == 2 else 1.0)
        loss.backward()
        optimizer.step()
        run.note(loss)
        assert bool(next(model.parameters()).isnan().any()) == (step >= 2)


def gradient_penalty(run: Run) -> None:
    """A backward pass through a backward pass."""
    model = mlp(nn.Tanh())
    optimizer = sgd(model)
    run.watch(model, optimizer)
    for _ in range(STEPS):
        x, y = vectors()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x.requires_grad_()), y)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = loss + slope.square().sum()
        loss.backward()
        optimizer.step()
        run.note([loss, slope])


def reference(run: Run, kind: str) -> None:
    """The model runs on other data in between: with dropout, with moving buffers, with a loader that shuffles."""
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(12, 6, generator=generator), torch.randint(3, (12,), generator=generator))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    mean = MeanGradient(loader, lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]), kind)
    model = mlp(nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
    optimizer = sgd(model)
    run.watch(model, optimizer, reference=mean)
    train(run, model, optimizer)


def zero_gradients(run: Run, everywhere: bool) -> None:
    """Gradients that are zero have not been cleared: below a head that starts from zero, or for a batch of no weight.

    A pass that is not differentiated follows, and a second micro-batch.
    """
    model = mlp()
    if not everywhere:
        for p in list(model.parameters())[-2:]:
            nn.init.zeros_(p)
    optimizer = sgd(model)
    run.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        for samples in (4, 3):
            x, y = vectors(samples)
            loss = functional.cross_entropy(model(x), y) * (0.0 if everywhere and step == 1 else 1.0)
            loss.backward()
            run.see("discarded", model(x))
        optimizer.step()
        run.note(loss)


def fused(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)


def lbfgs(model: nn.Module) -> Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe")


BF16, FP16 = torch.bfloat16, torch.float16
FEATURES: dict[str, Callable[[Run], None]] = {
    "autocast-bf16": partial(autocast, dtype=BF16),
    "autocast-bf16-adamw": partial(autocast, dtype=BF16, make=adamw),
    "scaler-fp16": partial(scaler, dtype=FP16, optimiser=sgd, unscale=False),
    "scaler-bf16-clipped": partial(scaler, dtype=BF16, optimiser=adamw, unscale=True),
    "scaler-fused": partial(scaler, dtype=FP16, optimiser=fused, unscale=False),
    "accumulation": accumulation,
    "checkpoint-reentrant": partial(checkpointed, reentrant=True),
    "checkpoint": partial(checkpointed, reentrant=False),
    "closure-lbfgs": lambda run: closure(run, lbfgs, nn.Tanh()),  # dropout may end its line search at once
    "closure-adamw": partial(closure, optimiser=adamw),
    "compile": partial(compiled, fullgraph=False),
    "compile-fullgraph": partial(compiled, fullgraph=True),
    "compile-two-monitors": partial(compiled, fullgraph=False, every=(2, 3)),
    "compile-two-monitors-fullgraph": partial(compiled, fullgraph=True, every=(3, 2)),
    "compile-two-monitors-one-closed": partial(compiled, fullgraph=True, every=(2, 2), closed=1),
    "compile-loss": partial(compiled, fullgraph=True, every=(3,), around="loss"),
    "compile-loss-two-monitors": partial(compiled, fullgraph=True, every=(2, 3), around="loss"),
    "compile-backward": partial(compiled, fullgraph=False, every=(3,), around="backward"),
    "compile-step": partial(compiled, fullgraph=False, every=(3,), around="step"),
    "evaluation": evaluation,
    "batch-norm": partial(watched, make=batch_norm, optimiser=sgd),
    "in-place": partial(watched, make=InPlace, optimiser=sgd),
    "in-place-views": partial(watched, make=InPlaceViews, optimiser=adamw, draw=sequences),
    "gradients-to-none": partial(watched, make=Tied, optimiser=groups, set_to_none=True),
    "gradients-to-zero": partial(watched, make=Tied, optimiser=groups, set_to_none=False),
    "two-monitors": two_monitors,
    "clipped-by-norm": partial(clipped, by_value=False),
    "clipped-by-value": partial(clipped, by_value=True),
    "own-rule": partial(watched, make=lambda: nn.Sequential(OwnWithRule(), nn.Linear(4, 3)), optimiser=adamw),
    "fallback": partial(watched, make=lambda: nn.Sequential(Own(), nn.Linear(4, 3)), optimiser=sgd),
    "fallback-random": partial(watched, make=lambda: nn.Sequential(Own(0.2), nn.Linear(4, 3)), optimiser=sgd),
    "attention": partial(watched, make=partial(Attention, 0.0), optimiser=adamw, draw=sequences),
    "attention-dropout": partial(watched, make=partial(Attention, 0.1), optimiser=sgd, draw=sequences),
    "transformer": partial(watched, make=partial(Encoder, 0.0), optimiser=sgd, draw=sequences),
    "transformer-dropout": partial(watched, make=partial(Encoder, 0.1), optimiser=adamw, draw=sequences),
    "embedding": partial(watched, make=Text, optimiser=adamw, draw=indices),
    "embedding-sparse": partial(watched, make=partial(Text, sparse=True), optimiser=plain_sgd, draw=indices),
    "low-rank-sum": partial(watched, make=LowRank, optimiser=adamw),
    "nan-loss": nan_loss,
    "zero-gradients": partial(zero_gradients, everywhere=True),
    "zero-gradients-below-the-head": partial(zero_gradients, everywhere=False),
    "gradient-penalty": gradient_penalty,
    "reference-full": partial(reference, kind="full"),
    "reference-independent": partial(reference, kind="independent"),
}
#: Rows without noise terms, each for a reason its status gives; all others must have been measured in earnest.
NO_FORCES = {"closure-lbfgs", "gradient-penalty"}
#: One call of ``optimizer.step`` is left out; fused optimisers leave it out themselves.
LEFT_OUT = {"scaler-fp16", "scaler-bf16-clipped"}
OFTEN: dict[str, dict[str, Any]] = {"full": {}, "split": {"noise": "split"}}
SELDOM: dict[str, dict[str, Any]] = {"third": {"every": 3, "noise": "split"}, "auto": {"every": "auto"}}
#: What spans several steps, or changes what the next step finds, is also measured now and then only.
SPANNING = ["scaler-fp16", "scaler-fused", "accumulation", "checkpoint-reentrant", "closure-lbfgs", "closure-adamw"]
SPANNING += ["evaluation", "batch-norm", "two-monitors", "gradients-to-zero", "fallback", "attention", "nan-loss"]
SPANNING += ["transformer-dropout", "embedding-sparse", "low-rank-sum", "reference-independent"]
TRIALS = [(feature, settings) for feature in FEATURES for settings in OFTEN.items()]
TRIALS += [(feature, settings) for feature in SPANNING for settings in SELDOM.items()]
TRIALS += [("batch-norm", ("operator", {"conv": "operator"})), ("two-monitors", ("operator", {"conv": "operator"}))]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # shown by a test of its own
@pytest.mark.parametrize(("feature", "settings"), TRIALS, ids=lambda x: x if isinstance(x, str) else x[0])
def test_bitwise_as_without_the_monitor(feature: str, settings: tuple[str, dict[str, Any]]) -> None:
    plain, seen = Run(None), Run(settings[1])
    plain.train(FEATURES[feature])
    seen.train(FEATURES[feature])
    assert seen.differences(plain) == []
    states = [value for label, value in plain.bits if label.startswith("model.")]
    assert len(set(states)) > len(states) / plain.steps  # the training went somewhere
    for monitor in seen.monitors:
        every = monitor.history.meta["every"]
        # a step that the scaler left out does not count if nobody looked
        counted = seen.closed[monitor] - (feature in LEFT_OUT and every != 1)
        assert monitor.history.steps == list(range(0, counted, 2 if every == "auto" else every))
        assert any(math.isfinite(row["kappa"]) for row in monitor.history.rows) == (feature not in NO_FORCES)


def test_torch_has_nothing_to_warn_of() -> None:
    """A warning out of the monitor would end a training that takes warnings for errors."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        Run({}).train(FEATURES["transformer"])
    assert [str(warning.message) for warning in heard] == []


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_evaluation_of_a_transformer(padded: bool) -> None:
    """For padded sequences torch has a faster path, taken only where there are no hooks: the same but for rounding."""
    torch.manual_seed(0)
    model = Encoder(0.1).eval()
    x, _ = sequences()
    mask = torch.arange(4) >= torch.tensor([[1], [2], [3], [4], [4]]) if padded else None
    with torch.no_grad():
        plain = model(x, mask)
        with LipschitzMonitor(model, sgd(model), warmup=1):
            seen = model(x, mask)
        torch.testing.assert_close(seen, plain, rtol=1e-5 if padded else 0.0, atol=1e-6 if padded else 0.0)
        assert torch.equal(model(x, mask), plain)


@pytest.mark.parametrize("watched", [False, True])
def test_a_stance_of_ones_own_is_kept(watched: bool) -> None:
    """How torch treats what is compiled is set for the whole process."""
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        calls.append(0)
        return graph.forward

    gc.collect()
    torch.compiler.reset()
    model = nn.Linear(6, 3)
    wrapped: Any = torch.compile(model, backend=backend)
    with torch.compiler.set_stance("force_eager"):
        if watched:
            with LipschitzMonitor(wrapped, sgd(model), every=2):
                pass
        wrapped(vectors()[0])
    assert calls == []
    wrapped(vectors()[0])
    assert calls == [0]
    torch.compiler.reset()


# --- nothing piles up ----------------------------------------------------------------------------------------

#: Steps before the first count and between the two; bytes and blocks per step that caches may still take.
WARM, LONG = 50, 150
SLACK = {"tensors": 0, "blocks": 2, "malloc": 100}
#: Bytes that a table of the interpreter takes when it is enlarged, as it may be once.
TABLE = 40_000


class MallocInfo(ctypes.Structure):
    """What glibc says of itself."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    )


def in_use() -> dict[str, int]:
    """Bytes of the tensors that Python can see, blocks of its objects, and all bytes that malloc has given out.

    The last, which knows tensors that only C++ can see, is for glibc alone.
    """
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided]
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    out = {"tensors": sum(storages.values()), "blocks": sys.getallocatedblocks()}
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if mallinfo is not None:
        mallinfo.restype = MallocInfo
        info = mallinfo()
        out["malloc"] = info.uordblks + info.hblkhd
    return out


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def pieces(model: nn.Sequential, optimizer: Optimizer, step: int) -> None:
    """Micro-batches through reentrant checkpoints, passes that nobody differentiates, and steps thrown away."""
    for _ in range(2):
        x, y = vectors(64)
        body = checkpoint(model[:2], x.requires_grad_(), use_reentrant=True)
        functional.cross_entropy(model[2:](body), y).backward()
    model(vectors(64)[0])
    if step % 5 == 3:
        optimizer.zero_grad()  # without a step
        functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def one(model: nn.Sequential, optimizer: Optimizer, step: int) -> None:
    x, y = vectors(64)
    optimizer.zero_grad(set_to_none=step % 2 == 0)
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def attach_and_close(model: nn.Sequential, optimizer: Optimizer, step: int) -> None:
    with LipschitzMonitor(model, optimizer, noise="split"):
        one(model, optimizer, step)
        model(vectors(64)[0])


def own() -> nn.Sequential:
    return nn.Sequential(Own(), nn.Linear(4, 3))


def views() -> nn.Sequential:
    """Each output is a view that is written over."""
    first, second = nn.ReLU(inplace=True), nn.Hardtanh(inplace=True)
    body = (nn.Linear(3, 8), first, nn.Linear(8, 4), second)
    return nn.Sequential(nn.Unflatten(1, (2, 3)), *body, nn.Flatten(), nn.Linear(8, 3))


LOOPS: dict[str, tuple[Callable[..., None], nn.Sequential, Callable[[nn.Module], Optimizer], dict[str, Any]]] = {
    "split": (one, wide(), adamw, {"noise": "split"}),
    "pieces": (pieces, wide(), sgd, {}),
    "fallback": (one, own(), adamw, {}),
    "views": (one, views(), adamw, {}),
    "attach-and-close": (attach_and_close, wide(), sgd, {"warmup": 2 * (WARM + LONG)}),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_no_bytes_are_kept(loop: str) -> None:
    """Every step is measured; the history, which does grow, is emptied."""
    torch.manual_seed(0)
    step, model, make, settings = LOOPS[loop]
    optimizer = make(model)
    counts, rows = [], 0
    with LipschitzMonitor(model, optimizer, **settings) as monitor:
        for index in range(WARM + LONG):
            step(model, optimizer, index)
            rows += len(monitor.history.rows)
            monitor.history.rows.clear()
            if index + 1 in (WARM, WARM + LONG):
                counts.append(in_use())
    before, after = counts
    grown = {kind: after[kind] - before[kind] for kind in before}
    allowed = {kind: SLACK[kind] * LONG + (TABLE if kind == "malloc" else 0) for kind in grown}
    assert {kind: bytes_ for kind, bytes_ in grown.items() if bytes_ > allowed[kind]} == {}
    assert rows >= (0 if "warmup" in settings else (WARM + LONG) * (len(monitor.layers) + 1))
