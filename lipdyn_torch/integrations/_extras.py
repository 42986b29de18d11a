"""Packages that only some users have."""

from __future__ import annotations

import importlib
from typing import Any

from lipdyn_torch.errors import LipdynError

__all__ = ["MissingExtraError", "need"]


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
        if (error.name or "").partition(".")[0] != package and not module.startswith("torch."):
            raise  # the package is there, and broken in itself
        missing = (error.name or package).partition(".")[0]
        raise MissingExtraError(
            f"expected the package {missing} to be installed, got none; "
            f"install it with: pip install 'specpert[{extra}]'"
        ) from error
