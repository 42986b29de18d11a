"""Two everyday operations on tables, with types that say what rows and keys really are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["groups", "records"]


def groups(frame: pd.DataFrame, by: str | Sequence[str], sort: bool = True) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Key and rows of every group; one key is a plain value, several are a tuple."""
    yield from frame.groupby(by if isinstance(by, str) else list(by), sort=sort)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dictionaries.

    Examples
    --------
    >>> import pandas as pd
    >>> records(pd.DataFrame({"x": [1, 2]}))
    [{'x': 1}, {'x': 2}]
    """
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]
