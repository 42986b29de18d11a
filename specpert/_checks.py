"""What callers hand in: directions, indices and orders, checked with one message each."""

from __future__ import annotations

import numbers
import operator
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from specpert._arrays import Array, Namespace, check_matrix, check_ndim


def check_direction(H: Array, name: str, shape: tuple[int, ...], xp: Namespace) -> None:
    """Raise unless H is finite and of the shape of A, or a stack that broadcasts with A's."""
    check_shape(H, name, shape)
    check_matrix(H, name, xp)


def check_shape(H: Array, name: str, shape: tuple[int, ...]) -> None:
    """Raise unless H is of the shape of A, or a stack that broadcasts with A's."""
    check_ndim(H, name)
    if tuple(H.shape[-2:]) != tuple(shape[-2:]):
        raise ValueError(f"expected {name} of shape (..., {shape[-2]}, {shape[-1]}) like A, got {tuple(H.shape)}")
    try:
        np.broadcast_shapes(tuple(H.shape), tuple(shape))
    except ValueError:
        raise ValueError(
            f"expected the leading axes of {name} to broadcast with those of A {tuple(shape)}, got {tuple(H.shape)}"
        ) from None


def check_indices(k: Any, r: int, *, cluster: bool = False) -> int | tuple[int, ...]:
    """Return k as an int or a tuple of different ints in range(r)."""
    single = not isinstance(k, Sequence) and getattr(k, "ndim", 0) == 0
    indices = [k] if single else list(k)
    if not indices:
        raise IndexError("expected at least one singular value index k, got an empty sequence")
    checked = []
    for i in indices:
        try:
            i = operator.index("bool" if isinstance(i, bool) else i)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"expected k to be an int or a sequence of ints, got {type(i).__name__}") from None
        if not 0 <= i < r:
            raise IndexError(
                f"expected 0 <= k < min(m, n) = {r}, got k = {i}; 0 is the largest singular value, {r - 1} the smallest"
            )
        checked.append(i)
    if len(set(checked)) < len(checked):
        raise IndexError(f"expected different indices in k, got {tuple(checked)}")
    if cluster and sorted(checked) != list(range(min(checked), max(checked) + 1)):
        raise IndexError(f"expected a cluster of consecutive indices, got k = {tuple(checked)}")
    return checked[0] if single else tuple(sorted(checked) if cluster else checked)


def check_order(order: Any, least: int) -> int:
    """Return order as an int, or raise."""
    try:
        checked = operator.index("bool" if isinstance(order, bool) else order)  # type: ignore[arg-type]
    except TypeError:
        checked = least - 1
    if checked < least:
        got = f"an array of shape {tuple(order.shape)}" if getattr(order, "ndim", 0) else reprlib.repr(order)
        raise ValueError(f"expected order to be an integer >= {least}, got {got}")
    return checked


def check_choice(value: Any, name: str, choices: Sequence[str]) -> None:
    """Raise unless value is one of the words."""
    if not (isinstance(value, str) and value in choices):
        words = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
        raise ValueError(f"expected {name} to be {words}, got {reprlib.repr(value)}")


def check_count(value: Any, name: str) -> None:
    """Raise unless value is a positive int."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"expected {name} to be an integer >= 1, got {reprlib.repr(value)}")


def check_callables(**functions: Any) -> None:
    """Raise unless each can be called."""
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"expected {name} to be a function, got {type(function).__name__}")


def check_fraction(value: Any, name: str) -> None:
    """Raise unless value is a real number in [0, 1)."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be a real number, got {type(value).__name__}")
    if not 0 <= float(value) < 1:
        raise ValueError(f"expected 0 <= {name} < 1, relative to the largest singular value, got {value}")
