"""The monitor in units of one plain training step, and per-sample gradients written the obvious way beside it."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from scipy.linalg import cho_factor
from torch import nn

from bench.harness import Row, compare
from lipdyn_torch import LipschitzMonitor
from lipdyn_torch.experiments.cli import keep_freed_memory


def convnet() -> nn.Module:
    """The paper's five layers for 3 x 32 x 32 images."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2048, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(4096, 1024), nn.ReLU(), nn.Linear(1024, 10))


def trainer(make: Callable[[], nn.Module], shape: tuple[int, ...], M: int, settings: dict | None) -> Callable[[], None]:
    """One training step as a function; with a monitor where there are settings for it."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [(torch.randn(M, *shape), torch.randint(0, 10, (M,))) for _ in range(4)]
    count = 0
    if settings is not None:
        LipschitzMonitor(model, optimizer, **settings)

    def step() -> None:
        nonlocal count
        x, y = batches[count % len(batches)]
        count += 1
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def repeated(step: Callable[[], None], times: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def row(
    name: str,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    M: int,
    settings: dict,
    limit: float | None,
    seconds: float = 20.0,
) -> Row:
    every = settings.get("every", 1)
    steps = min(every, 10)
    ours, plain = (repeated(trainer(make, shape, M, s), steps) for s in (settings, None))
    measured = compare(name, ours, plain, limit=limit, seconds=seconds)
    if every > steps:
        return measured
    share = factorisations(make()) / (measured.theirs / 1e3) * steps / every
    return replace(measured, note=f"of which {share:.2g} for the Gram and Cholesky factors of the weights")


def factorisations(model: nn.Module) -> float:
    """Seconds for the Gram matrix of the smaller side of every weight and a Cholesky factor of it, in float64."""
    weights = [p.detach().flatten(1).double().numpy() for p in model.parameters() if p.ndim > 1]
    weights = [W if W.shape[0] <= W.shape[1] else W.T for W in weights]
    times = []
    for _ in range(7):
        start = time.perf_counter()
        for W in weights:
            K = W @ W.T
            K[np.diag_indices_from(K)] += 1.0
            cho_factor(K.T, lower=True, overwrite_a=True, check_finite=False)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def per_sample(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], M: int) -> Row:
    """vmap(grad) and a thin SVD of every layer for the same terms, to a plain step: what the monitor replaces."""
    torch.manual_seed(0)
    model = make()
    params = {k: v.detach() for k, v in model.named_parameters()}
    x, y = torch.randn(M, *shape), torch.randint(0, 10, (M,))

    def loss(p: dict, xi: torch.Tensor, yi: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, p, (xi[None],)), yi[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    plain = trainer(make, shape, M, None)

    def obvious() -> None:
        plain()
        for key, G in gradients(params, x, y).items():
            if G.ndim > 2:
                W, G = params[key].flatten(1), G.flatten(2)
                U, s, Vh = torch.linalg.svd(W, full_matrices=False)
                G = G - G.mean(0)
                p, q = G @ Vh[0], U[:, 0] @ G
                a, b = p @ U, q @ Vh.T
                ((s[0] * (a**2 + b**2) + 2 * s * a * b)[:, 1:] / (s[0] ** 2 - s[1:] ** 2)).sum()

    return compare(name, obvious, plain, seconds=15.0)


MEMORY = """
import sys
from bench.monitor import convnet, trainer
from lipdyn_torch._bridge import read_spectrum
import torch

def status(key):
    words = open("/proc/self/status").read().split()
    return int(words[words.index(key) + 1]) / 1024

before = status("VmRSS:")
for _ in range(4):
    read_spectrum(torch.randn(300, 300), rtol=3e-5)  # libraries are loaded either way
libraries = status("VmRSS:") - before
step = trainer(convnet, (3, 32, 32), 128, {} if sys.argv[1] == "monitored" else None)
for _ in range(4):
    step()
print(status("VmHWM:"), libraries)
"""


def memory() -> Row:
    """Peak memory of training with the monitor and without, each in a process of its own (Linux)."""

    loaded = []

    def peak(kind: str) -> float:
        done = subprocess.run([sys.executable, "-c", MEMORY, kind], check=True, capture_output=True, text=True)
        highest, libraries = map(float, done.stdout.split())
        loaded.append(libraries)
        return highest

    pairs = [(peak("monitored"), peak("plain")) for _ in range(3)]
    model, sizes = convnet(), []
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    model(torch.randn(128, 3, 32, 32))
    kept = 2 * 4 * sum(sizes) / 2**20  # outputs and their gradients, in single precision
    ratios = sorted((ours - plain) / kept for ours, plain in pairs)
    ours, plain = (statistics.median(x) for x in zip(*pairs, strict=True))
    name = "ConvNet, peak memory above plain training, to the layers' outputs and their gradients"
    libraries = statistics.median(loaded)
    note = f"plain training with SciPy and Numba loaded: {plain:.0f} MiB, of which these {libraries:.0f}"
    return Row(name, ratios[1], ratios[0], ratios[2], ours - plain, kept, 1.0, note, "MiB")


def kept_memory(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Row:
    """As `row`, in the way of the `lipdyn` command; plain steps gain most."""
    keep_freed_memory()
    return row(name, make, shape, 128, {}, None)


def jobs() -> list[Callable[[], Row]]:
    image, pixels = (3, 32, 32), (784,)
    return [
        partial(row, "ConvNet 3x32x32, M = 128, all terms, every step", convnet, image, 128, {}, 1.30),
        partial(row, "the same with the split", convnet, image, 128, {"noise": "split"}, 1.60),
        partial(row, "the same with convolutions as operators", convnet, image, 128, {"conv": "operator"}, None),
        partial(row, "the same, every 10th step", convnet, image, 128, {"every": 10}, 1.04),
        partial(row, "the same, attached but idle", convnet, image, 128, {"every": 10**9}, 1.01),
        partial(per_sample, "the same by vmap(grad) and a thin SVD", convnet, image, 128),
        partial(row, "MLP 784-512-256-10, M = 128, all terms, every step", mlp, pixels, 128, {}, 3.0),
        partial(row, "the same, every 10th step", mlp, pixels, 128, {"every": 10}, 1.20),
        partial(row, "the same, attached but idle", mlp, pixels, 128, {"every": 10**9}, 1.01),
        partial(per_sample, "the same by vmap(grad) and a thin SVD", mlp, pixels, 128),
        partial(row, "Linear 4096 -> 1024, M = 64, all terms, every step", wide, (4096,), 64, {}, 2.5),
        partial(row, "the same, every 10th step", wide, (4096,), 64, {"every": 10}, None),
        memory,
        partial(kept_memory, "ConvNet, all terms, every step, where the C library keeps freed memory", convnet, image),
    ]
