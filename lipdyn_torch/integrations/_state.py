"""What callbacks put into checkpoints."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from lipdyn_torch.monitor import LipschitzMonitor

__all__ = ["load_monitor_state", "monitor_state", "plain_optimizer", "submodule"]


def monitor_state(monitor: LipschitzMonitor | None) -> dict[str, Any]:
    """The monitor's state; empty before training, and for monitors that keep none."""
    save = getattr(monitor, "state_dict", None)
    return {} if save is None else save()


def load_monitor_state(monitor: LipschitzMonitor, state: dict[str, Any]) -> None:
    """Continue from a state; an empty one says there is nothing to continue."""
    load = getattr(monitor, "load_state_dict", None)
    if state and load is not None:
        load(state)


def plain_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimiser inside the wrappers of training frameworks: the one whose step the hooks must see."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def submodule(model: nn.Module, name: str | None) -> nn.Module:
    """The part of the model to watch.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> submodule(model, "0"), submodule(model, None) is model
    (Linear(in_features=2, out_features=2, bias=True), True)
    >>> submodule(model, "net")
    Traceback (most recent call last):
        ...
    ValueError: expected the name of a module of Sequential, got 'net'; its children are 0
    """
    try:
        return model if name is None else model.get_submodule(name)
    except AttributeError as error:
        children = ", ".join(child for child, _ in model.named_children())
        raise ValueError(
            f"expected the name of a module of {type(model).__name__}, got {name!r}; its children are {children}"
        ) from error
