"""Packages that only some users have."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from lipdyn_torch.errors import LipdynError

__all__ = ["MissingExtraError", "missing_extra", "need"]


class MissingExtraError(LipdynError, ImportError):
    """An optional package is not installed; the message says which extra brings it."""


def need(module: str, extra: str) -> Any:
    """Import and return ``module``, or say how to get it.

    Examples
    --------
    >>> need("json", "records").dumps([1])
    '[1]'
    >>> need("no_such_package.part", "records")
    Traceback (most recent call last):
        ...
    lipdyn_torch.integrations._extras.MissingExtraError: expected the package no_such_package to be installed,
    got none; install it with: pip install 'specpert[records]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        # parts of torch need packages of their own: tensorboard, for one
        packages = (package, (error.name or package).partition(".")[0]) if module.startswith("torch.") else (package,)
        raise missing_extra(error, extra, packages) from error


def missing_extra(error: ModuleNotFoundError, extra: str, packages: Iterable[str]) -> MissingExtraError:
    """The error in words, if it is one of these packages that is missing; if one is broken in itself, raise it."""
    missing = (error.name or "").partition(".")[0]
    if missing not in packages:
        raise error
    return MissingExtraError(
        f"expected the package {missing} to be installed, got none; install it with: pip install 'specpert[{extra}]'"
    )
