"""One of two processes; started by test_distributed.py with rank, rendezvous file, scenario, and output file."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lipdyn_torch import GradientNoise
from lipdyn_torch._bridge import read_spectrum
from lipdyn_torch.noise import mismatch
from lipdyn_torch.reference import MeanGradient

SIZES = [(5, 4), (6, 5), (3, 6)]
WORLD = 2
Samples = list[tuple[Tensor, Tensor]]


def matrices() -> Samples:
    """Weights (m, n) and the gradients (M, m, n) of eight samples, the samples' mean far larger than their spread."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(random(m, n), 10.0 * random(m, n) + 0.1 * random(8, m, n)) for m, n in SIZES]


def noise_of(weight: Tensor, gradients: Tensor, mean: Tensor) -> tuple:
    spectrum = read_spectrum(weight)
    squares = gradients.square().sum(0)
    return spectrum, GradientNoise(gradients @ spectrum.v, gradients.mT @ spectrum.u, squares, mean)


def combined(rank: int, cut: int, broken: bool = False) -> list:
    """This process's part of the samples, combined with the other's."""
    from lipdyn_torch.distributed import combine

    part = slice(cut) if rank == 0 else slice(cut, None)
    layers = []
    for weight, gradients in matrices():
        mean = (gradients[:cut].mean(0) + gradients[cut:].mean(0)) / WORLD
        layers.append(noise_of(weight, gradients[part], mean))
    if broken and rank == 1:
        layers[1] = (layers[1][0], None)
    joint = combine(layers)
    out = []
    for (spectrum, _), noise in zip(layers, joint, strict=True):
        if noise is None:
            out.append(None)
            continue
        error = mismatch(noise, spectrum.project(noise.mean))
        out.append((noise.batch, vars(noise.terms(spectrum)), error, vars(noise.scaled(0.5).terms(spectrum))))
    return out


def network() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator, dtype=torch.float64), torch.randint(3, (8,), generator=generator)


def mean_gradient() -> MeanGradient:
    """The gradient of data that no step sees."""
    return MeanGradient(
        [batch(100), batch(101)], lambda model, data: nn.functional.cross_entropy(model(data[0]), data[1])
    )


def trained(
    rank: int | None,
    kind: str,
    optimizer: str = "SGD",
    steps: int = 4,
    trouble: bool = False,
    reference: bool = False,
    watch: bool = True,
    parts: int = 1,
    late: bool = False,
    probe: str = "",
    cut: int = 4,
    overflow: bool = False,
    groups: bool = False,
    ignored: bool = False,
    **settings: object,
) -> tuple[list[dict], list[Tensor]]:
    """Rows and weights of a run with half of each batch; with rank None, of one process with all of it.

    With trouble, the second process cannot read the second layer in step 1. Each batch comes in so many parts; late,
    shards are reduced with the last of them only. With probe, the first process takes a gradient of its own: once, or
    with "backward" after every step, which it then clears. With ignored, the loss leaves out the second one's last. The
    first process gets ``cut`` samples; with overflow, the loss of step 1 is not finite in one of them, and the scaler
    leaves that step out. With groups, the first and the second layer are clipped by norm, each by itself.
    """
    from lipdyn_torch import LipschitzMonitor
    from lipdyn_torch.distributed import full

    model = network()
    called: nn.Module = model
    if kind == "ddp":
        called = nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(model)
    make = getattr(torch.optim, optimizer)
    optim = make(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=overflow)
    if reference:
        settings["reference"] = mean_gradient()
    with LipschitzMonitor(model, optim, noise="split", **settings) if watch else nullcontext() as monitor:
        for step in range(steps):
            x, y = batch(step)
            y[-1] = -100 if ignored else y[-1]
            part = slice(None) if rank is None else (slice(cut), slice(cut, None))[rank]
            optim.zero_grad()
            for i, (a, b) in enumerate(zip(x[part].chunk(parts), y[part].chunk(parts), strict=True)):
                if late:
                    model.set_requires_gradient_sync(i + 1 == parts)
                loss = nn.functional.cross_entropy(called(a), b) / parts
                scaler.scale(loss * torch.inf if overflow and step == 1 and rank == 0 else loss).backward()
            if trouble and rank == 1 and step == 1:
                monitor._watches[1].problems["made up"] = None
            for layer, limit in ((model[0], 0.01), (model[2], 0.02)) if groups else ():
                nn.utils.clip_grad_norm_(layer.parameters(), limit)
            scaler.step(optim)
            scaler.update()
            if probe == "backward" and rank == 0:
                nn.functional.cross_entropy(model(x), y).backward()
                optim.zero_grad()
            elif probe and rank == 0 and step == 1:
                torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    rows = monitor.history.rows if watch else []
    return rows, [full(p.detach()).clone() for p in model.parameters()]


def pictured(rank: int | None, steps: int = 3) -> list[dict]:
    """Rows of a run with ``conv="operator"`` in which the second process has the larger images."""
    from lipdyn_torch import LipschitzMonitor

    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    called = model if rank is None else nn.parallel.DistributedDataParallel(model)
    optim = torch.optim.SGD(model.parameters(), lr=0.05)
    with LipschitzMonitor(model, optim, conv="operator") as monitor:
        for step in range(steps):
            optim.zero_grad()
            for part, size in enumerate((6, 9)):
                generator = torch.Generator().manual_seed(10 * step + part)
                x = torch.randn(4, 2, size, size, generator=generator, dtype=torch.float64)
                y = torch.randint(3, (4,), generator=generator)
                if rank is None or rank == part:
                    loss = nn.functional.cross_entropy(called(x), y)
                    (loss / WORLD if rank is None else loss).backward()
            optim.step()
    return monitor.history.rows


class Experts(nn.Module):
    """The second expert is for batches with a positive sum of their first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.other(x) if x[0, 0] > 0 else self.one(x)))


def experts(rank: int | None) -> list[dict]:
    """Rows of a run in which each process uses an expert of its own."""
    from lipdyn_torch import LipschitzMonitor

    torch.manual_seed(7)
    model = Experts().double()
    called = model if rank is None else nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optim = torch.optim.SGD(model.parameters(), lr=0.05)
    with LipschitzMonitor(model, optim) as monitor:
        for step in range(2):
            optim.zero_grad()
            x, y = batch(step)
            for part, sign in enumerate((-1.0, 1.0)):
                a, b = x[4 * part : 4 * part + 4].clone(), y[4 * part : 4 * part + 4]
                a[0, 0] = sign
                if rank is None or rank == part:
                    (nn.functional.cross_entropy(called(a), b) / (WORLD if rank is None else 1)).backward()
            optim.step()
    return monitor.history.rows


class Full:
    """A sink whose disk is full when a step was left out."""

    def start(self, meta: dict) -> None:
        pass

    def write(self, rows: list[dict]) -> None:
        if any("cleared without a step" in row["status"] for row in rows):
            raise OSError("no space left")

    def close(self) -> None:
        pass


def sinking(rank: int) -> tuple[list[int], list[str]]:
    """Steps of the rows, and warnings, in a run with an overflow in which the first process has such a sink."""
    from lipdyn_torch import LipschitzMonitor

    model = network()
    called = nn.parallel.DistributedDataParallel(model)
    optim, scaler = torch.optim.SGD(model.parameters(), lr=0.05), torch.amp.GradScaler("cpu", init_scale=8.0)
    sinks = [Full()] if rank == 0 else []
    with LipschitzMonitor(model, optim, sinks=sinks) as monitor, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            x, y = batch(step)
            optim.zero_grad()
            loss = nn.functional.cross_entropy(called(x[4 * rank : 4 * rank + 4]), y[4 * rank : 4 * rank + 4])
            scaler.scale(loss * torch.inf if step == 1 else loss).backward()
            scaler.step(optim)
            scaler.update()
    return monitor.history.steps, [str(one.message) for one in caught if one.category is RuntimeWarning]


def elsewhere(rank: int) -> list[str]:
    """Warnings of a run in which another optimizer makes the steps."""
    from lipdyn_torch import LipschitzMonitor

    model = network()
    called = nn.parallel.DistributedDataParallel(model)
    idle, optim = (torch.optim.SGD(model.parameters(), lr=0.05) for _ in range(2))
    with LipschitzMonitor(model, idle) as monitor, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(110):
            x, y = batch(step)
            optim.zero_grad()
            nn.functional.cross_entropy(called(x), y).backward()
            optim.step()
    assert len(monitor._lost) < 100
    return [str(warning.message) for warning in caught]


def collectives(rank: int) -> list[int]:
    """Numbers that the monitor's collectives sent in each of three steps."""
    sent: list[int] = []
    gather = dist.all_gather

    def counted(tensors: list[Tensor], tensor: Tensor, **settings: object) -> object:
        sent.append(tensor.numel())
        return gather(tensors, tensor, **settings)

    dist.all_gather = counted
    try:
        trained(rank, "ddp", steps=3)
    finally:
        dist.all_gather = gather
    return sent


SCENARIOS = {
    "even": lambda rank: combined(rank, 4),
    "uneven": lambda rank: combined(rank, 3),
    "broken": lambda rank: combined(rank, 4, broken=True),
    "ddp": lambda rank: trained(rank, "ddp"),
    "fsdp": lambda rank: trained(rank, "fsdp"),
    "auto": lambda rank: trained(rank, "ddp", steps=14, every="auto", budget=(1e9, 1e-6)[rank]),
    "fsdp-trouble": lambda rank: trained(rank, "fsdp", trouble=True),
    "ddp-reference": lambda rank: trained(rank, "ddp", reference=True),
    "fsdp-reference": lambda rank: trained(rank, "fsdp", reference=True),
    "ddp-plain": lambda rank: trained(rank, "ddp", watch=False),
    "fsdp-plain": lambda rank: trained(rank, "fsdp", watch=False),
    "ddp-parts": lambda rank: trained(rank, "ddp", parts=2),
    "fsdp-late": lambda rank: trained(rank, "fsdp", parts=2, late=True),
    "ddp-probe": lambda rank: trained(rank, "ddp", probe="once"),
    "ddp-backward": lambda rank: trained(rank, "ddp", probe="backward"),
    "ddp-overflow-backward": lambda rank: trained(rank, "ddp", cut=5, overflow=True, probe="backward"),
    "ddp-ignored": lambda rank: trained(rank, "ddp", ignored=True),
    "ddp-experts": experts,
    "collectives": collectives,
    "ddp-uneven": lambda rank: trained(rank, "ddp", cut=5),
    "ddp-unknown": lambda rank: trained(rank, "ddp", "Adagrad", cut=5),
    "ddp-overflow": lambda rank: trained(rank, "ddp", cut=5, overflow=True),
    "ddp-clipped": lambda rank: trained(rank, "ddp", groups=True),
    "ddp-images": pictured,
    "ddp-sink": sinking,
    "ddp-elsewhere": elsewhere,
    "fsdp-adam": lambda rank: trained(rank, "fsdp", "Adam"),
}


def main() -> None:
    rank, rendezvous, scenario, out = int(sys.argv[1]), *sys.argv[2:5]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    results = {name: SCENARIOS[name](rank) for name in scenario.split(",")}
    torch.save(results, f"{out}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
