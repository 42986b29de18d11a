"""Mean gradients other than the batch's own: of all data, or of a batch that had no part in the step (theory 2.7)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipdyn_torch.fallback import host_random_kept

__all__ = ["MeanGradient"]


class MeanGradient:
    """The mean gradient of a loss over batches, at the present weights, without a trace in the training.

    The model runs with copies of its buffers, and the random number generators of torch, NumPy and Python, and those of
    a data loader, are put back; forward hooks of one's own on its modules are called.

    Parameters
    ----------
    batches : iterable
        A data loader, say, that can be gone through again and again; each batch is passed on to ``loss``, and counts
        by the length of its first tensor.
    loss : callable
        ``loss(model, batch)``, the mean loss of one batch.
    kind : {"full", "independent"}
        All batches every time, or the next one each time (from the start again when they are used up).

    Notes
    -----
    Where several processes train one model, give each of them the same batches.

    Examples
    --------
    >>> import torch
    >>> from lipdyn_torch import LipschitzMonitor
    >>> x = torch.randn(32, 4)
    >>> model = torch.nn.Linear(4, 2)
    >>> everything = MeanGradient(x.split(8), lambda model, x: model(x).square().mean())
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> with LipschitzMonitor(model, optimizer, reference=everything) as monitor:
    ...     model(x).square().mean().backward()  # this batch is everything
    ...     optimizer.step()
    >>> row = monitor.history.rows[0]
    >>> bool(abs(row["mu_ref"] - row["mu"]) < 1e-6)
    True
    """

    def __init__(self, batches: Iterable[Any], loss: Callable[[Any, Any], Tensor], kind: str = "full") -> None:
        if not (isinstance(kind, str) and kind in ("full", "independent")):
            raise ValueError(f"expected kind 'full' or 'independent', got {kind!r}")
        if isinstance(batches, str | bytes | Mapping) or not hasattr(type(batches), "__iter__"):
            raise TypeError(f"expected batches, such as a data loader or a list of them, got {type(batches).__name__}")
        if isinstance(batches, Iterator):  # used up after one pass, in the midst of a training
            raise TypeError(
                f"expected batches that can be gone through again, got a {type(batches).__name__}; give its list(...)"
            )
        if not callable(loss):
            raise TypeError(f"expected loss(model, batch) to be callable, got {type(loss).__name__}")
        self.batches, self.loss, self.kind = batches, loss, kind
        self._next: Iterator[Any] = iter(())

    def __call__(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Gradients by parameter name."""
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        devices = {p.device.index for p in named.values() if p.is_cuda}
        totals = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
        count = 0
        with torch.random.fork_rng(devices=list(devices)), host_random_kept(), _generators_kept(self.batches):
            for batch in self._chosen():
                size = _length(batch)
                for name, g in self._gradients(model, named, batch).items():
                    totals[name] += size * g
                count += size
        if count == 0:
            raise ValueError("expected at least one batch to take the mean gradient of, got none")
        return {name: total / count for name, total in totals.items()}

    def _chosen(self) -> Iterable[Any]:
        if self.kind == "full":
            return self.batches
        batch = next(self._next, None)
        if batch is None:
            self._next = iter(self.batches)
            batch = next(self._next, None)
        return [] if batch is None else [batch]

    def _gradients(self, model: nn.Module, named: dict[str, nn.Parameter], batch: Any) -> dict[str, Tensor]:
        buffers = {name: b.clone() for name, b in model.named_buffers()}

        def twin(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, buffers, args, kwargs)

        with torch.enable_grad():
            loss = self.loss(twin, batch)
            if any(hasattr(p, "full_tensor") for p in named.values()):
                return _by_backward(loss, named)
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {name: g for name, g in zip(named, gradients, strict=True) if g is not None}


@contextlib.contextmanager
def _generators_kept(loader: Any) -> Iterator[None]:
    """The random number generators that a data loader and its samplers hold are put back."""
    batches = getattr(loader, "batch_sampler", None)
    samplers = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    held = [getattr(sampler, "generator", None) for sampler in samplers]
    states = [(g, g.get_state()) for g in held if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _by_backward(loss: Tensor, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gradients of sharded parameters, which the graph does not hold: they arrive in ``grad``, left as it was."""
    kept = {name: p.grad for name, p in named.items()}
    try:
        for p in named.values():
            p.grad = None
        loss.backward()
        return {name: p.grad for name, p in named.items() if p.grad is not None}
    finally:
        for name, p in named.items():
            p.grad = kept[name]


def _length(batch: Any) -> int:
    """Samples in a batch: the length of its first tensor."""
    if isinstance(batch, Tensor) and batch.ndim > 0:
        return len(batch)
    values = list(batch.values() if isinstance(batch, Mapping) else batch) if _holds_others(batch) else []
    if not values:
        raise TypeError(f"expected a batch that begins with a tensor of samples, got {type(batch).__name__}")
    return _length(values[0])


def _holds_others(batch: Any) -> bool:
    return isinstance(batch, Iterable) and not isinstance(batch, Tensor | str | bytes)
