"""One training run with plain SGD, monitored: the loop that all training experiments share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lipdyn_torch.experiments.data import Images
from lipdyn_torch.experiments.regularisers import PLAIN, Regulariser
from lipdyn_torch.history import NETWORK
from lipdyn_torch.monitor import LipschitzMonitor

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Plan", "Run", "batch_indices", "log_k", "train"]


@dataclass(frozen=True)
class Plan:
    """How to train and what to measure.

    Attributes
    ----------
    steps, batch, lr
        Of plain SGD.
    sampling : {"shuffle", "iid"}
        Every sample once per epoch, or every sample drawn on its own.
    seed : int
        Of the batches and of the regulariser.
    every : int
        Steps between full measurements; 0: none.
    noise : {"full", "split"}
        As of `LipschitzMonitor`.
    full_every : int
        Steps between gradients of the whole training set, held in between; 0: none.
    """

    steps: int
    batch: int
    lr: float
    sampling: str = "shuffle"
    seed: int = 0
    every: int = 1
    noise: str = "full"
    full_every: int = 0


@dataclass
class Run:
    """What came out: the monitor's table, the loss of every step, the drift by the full gradient of every step."""

    frame: pd.DataFrame
    losses: list[float] = field(default_factory=list)
    full_mu: list[float] = field(default_factory=list)


def batch_indices(samples: int, plan: Plan) -> Iterator[Tensor]:
    """Indices of every step's batch.

    Examples
    --------
    >>> plan = Plan(steps=2, batch=2, lr=0.1)
    >>> sorted(torch.cat(list(batch_indices(4, plan))).tolist())
    [0, 1, 2, 3]
    """
    if not 1 <= plan.batch <= samples:
        raise ValueError(f"expected a batch of 1 to {samples} samples, got {plan.batch}")
    generator = torch.Generator().manual_seed(plan.seed)
    order, position = torch.empty(0, dtype=torch.long), samples
    for _ in range(plan.steps):
        if plan.sampling == "iid":
            yield torch.randint(samples, (plan.batch,), generator=generator)
            continue
        if position + plan.batch > samples:  # an incomplete last batch is left out
            order, position = torch.randperm(samples, generator=generator), 0
        yield order[position : position + plan.batch]
        position += plan.batch


def train(
    model: nn.Module,
    images: Images,
    plan: Plan,
    regulariser: Regulariser = PLAIN,
    on_gradient: Callable[[int, nn.Module], None] | None = None,
) -> Run:
    """Train in place.

    Parameters
    ----------
    on_gradient : callable, optional
        Called with step and model between the backward pass and the optimiser's step.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=plan.lr, weight_decay=regulariser.weight_decay)
    twin = _twin(model)
    monitor = None
    if plan.every:
        monitor = LipschitzMonitor(
            model,
            optimizer,
            every=plan.every,
            noise=plan.noise,
            sampling=plan.sampling,
            dataset_size=len(images.train_x),
        )
    losses: list[float] = []
    full_mu: list[float] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed + 1)  # augmentation, dropout
        for step, chosen in enumerate(batch_indices(len(images.train_x), plan)):
            if plan.full_every:
                full_mu.append(_full_mu(twin, images, regulariser) if step % plan.full_every == 0 else full_mu[-1])
            x, y = images.train_x[chosen], images.train_y[chosen]
            optimizer.zero_grad()
            loss = regulariser.loss(model, twin, x, y, images)
            loss.backward()
            if on_gradient is not None:
                on_gradient(step, model)
            optimizer.step()
            losses.append(loss.item())
    if monitor is None:
        import pandas as pd

        return Run(pd.DataFrame(), losses, full_mu)
    monitor.close()
    return Run(monitor.history.to_pandas(), losses, full_mu)


def log_k(model: nn.Module) -> float:
    """``log K``: the sum over the layers of log sigma, from Gram matrices of the smaller sides.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 2))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> round(math.exp(log_k(net)), 12)
    3.0
    """
    total = 0.0
    for matrix in weight_matrices(model).values():
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        total += 0.5 * math.log(float(torch.linalg.eigvalsh(gram)[-1]))
    return total


def network(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the network."""
    return frame[frame["layer"] == NETWORK].reset_index(drop=True)


def _twin(model: nn.Module) -> nn.Module:
    """A network on the same weights, but with its own gradients and without hooks.

    Passes that are no training steps (adversarial examples, the full gradient) go through it, unseen by the monitor.
    """
    twin = copy.deepcopy(model)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.data = mine.data  # the same memory: steps of the optimiser are made in place
    return twin


def weight_matrices(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the linear layers and convolutions as float64 matrices, kernels reshaped (theory 3.1)."""
    kinds = (nn.Linear, nn.Conv2d)
    return {n: m.weight.detach().double().flatten(1) for n, m in model.named_modules() if isinstance(m, kinds)}


def top_triplet(matrix: Tensor) -> tuple[float, Tensor, Tensor]:
    """Largest singular value with its vectors (u, v), from the Gram matrix of the smaller side.

    Examples
    --------
    >>> sigma, u, v = top_triplet(torch.tensor([[0.0, 3.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64))
    >>> round(sigma, 12), round(float(u[0] * v[1]), 12)
    (3.0, 1.0)
    """
    if matrix.shape[0] > matrix.shape[1]:
        sigma, v, u = top_triplet(matrix.T)
        return sigma, u, v
    u = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -1]
    back = matrix.T @ u
    sigma = float(torch.linalg.vector_norm(back))
    return sigma, u, back / sigma


def _full_mu(twin: nn.Module, images: Images, regulariser: Regulariser) -> float:
    """Drift of log K by the gradient of the whole training set: ``sum_l -<J, gbar>/sigma - decay`` (theory 2.7)."""
    twin.zero_grad()
    samples = len(images.train_x)
    for x, y in zip(images.train_x.split(512), images.train_y.split(512), strict=True):
        (regulariser.loss(twin, twin, x, y, images) * (len(x) / samples)).backward()
    total = 0.0
    for name, matrix in weight_matrices(twin).items():
        sigma, u, v = top_triplet(matrix)
        gradient = twin.get_submodule(name).weight.grad.double().flatten(1)  # type: ignore[union-attr,operator]
        total += -float(u @ gradient @ v) / sigma - regulariser.weight_decay
    twin.zero_grad()
    return total
