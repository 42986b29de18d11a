"""What the monitor is given, checked with one message each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["batch_dims", "check_dataset_size", "check_settings", "check_types", "checked_sinks", "innermost"]


def innermost(optimizer: Any) -> Any:
    """What a wrapper that calls itself an optimiser, but was never made as one, wraps (that of accelerate)."""
    while isinstance(optimizer, Optimizer) and not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer) or inner is optimizer:
            raise TypeError(
                f"expected an optimizer made by torch.optim.Optimizer.__init__, got {type(optimizer).__name__} without "
                "hooks; give the monitor the optimizer inside it"
            )
        optimizer = inner
    return optimizer


def batch_dims(model: nn.Module, given: object) -> dict[str, int]:
    """Axis of the samples by module name, where it is not the first: that of torch's own layers, unless given."""
    names = {name for name, _ in model.named_modules()}
    dims: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            dim = 0 if module.self_attn.batch_first else 1
            dims |= {f"{name}.{child}".lstrip("."): dim for child, _ in module.named_modules() if child}
    if given is None:
        return dims
    by_name: Mapping[Any, Any] = given if isinstance(given, Mapping) else dict.fromkeys(names, given)
    for name, dim in by_name.items():
        if name not in names:
            raise ValueError(f"expected names of model.named_modules() in batch_dim, got {name!r}")
        if not _whole(dim, 0):
            raise ValueError(f"expected batch_dim to be whole numbers, at least 0, got {dim!r}")
        dims[name] = dim
    return dims


def check_types(model: object, optimizer: object, reference: object) -> None:
    """Raise unless the monitor is given a model, an optimiser, and something to call."""
    for name, value, kind in (("model", model, nn.Module), ("optimizer", optimizer, Optimizer)):
        if not isinstance(value, kind):
            public = f"torch.{'nn.Module' if kind is nn.Module else 'optim.Optimizer'}"
            raise TypeError(f"expected a {public} as {name}, got {type(value).__name__}; call it (model, optimizer)")
    if reference is not None and not callable(reference):
        raise TypeError(f"expected reference(model) to give gradients, got {reference!r}; see MeanGradient")


def checked_sinks(given: object) -> list[Any]:
    """The sinks as a list."""
    if isinstance(given, str | PathLike | Tensor) or not isinstance(given, Iterable):
        raise TypeError(f"expected a list of sinks, got {given!r}; for a file [JsonLinesSink(path)]")
    sinks = list(given)
    for sink in sinks:
        if not all(callable(getattr(sink, method, None)) for method in ("start", "write", "close")):
            raise ValueError(f"expected sinks with start, write and close, got {sink!r}; wrap a path in JsonLinesSink")
    return sinks


def check_settings(
    every: object, budget: object, warmup: object, noise: object, conv: object, sampling: object, dataset_size: object
) -> None:
    """Raise unless the settings are among those there are."""
    if not (isinstance(every, str) and every == "auto") and not _whole(every, 1):
        raise ValueError(f"expected every to be a whole number of steps, at least 1, or 'auto', got {every!r}")
    if not isinstance(budget, int | float) or not budget > 0:
        raise ValueError(f"expected budget to be a positive number of per cent, got {budget!r}")
    if not _whole(warmup, 0):
        raise ValueError(f"expected warmup to be a whole number of steps, got {warmup!r}")
    choices = {"noise": (noise, ("full", "split", "factor")), "conv": (conv, ("matrix", "operator"))}
    choices["sampling"] = (sampling, ("shuffle", "iid"))
    for name, (value, allowed) in choices.items():
        if not (isinstance(value, str) and value in allowed):
            raise ValueError(f"expected {name} to be {' or '.join(map(repr, allowed))}, got {value!r}")
    check_dataset_size(dataset_size)


def check_dataset_size(dataset_size: object) -> None:
    """Raise unless it is a number of samples, or None."""
    if dataset_size is not None and not _whole(dataset_size, 1):
        raise ValueError(f"expected dataset_size to be a positive whole number or None, got {dataset_size!r}")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
