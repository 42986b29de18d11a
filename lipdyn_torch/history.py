"""What was measured: rows, their table, and sinks that write them as they come.

A row is a flat dictionary with the keys of `COLUMNS` (and of `SPLIT_COLUMNS` where the noise was split): one for
every monitored step and layer, and one with layer "network" for the sum over the layers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    *("COLUMNS", "NETWORK", "SPLIT_COLUMNS"),
    *("History", "JsonLinesSink", "Row", "Sink", "json_ready", "read_history"),
]

Row = dict[str, Any]

#: Name of the row that sums up the layers.
NETWORK = "network"
SPLIT_COLUMNS = ("kappa_var", "kappa_cov", "lambda_sq_var", "lambda_sq_cov")
COLUMNS = (
    *("step", "layer", "lr", "batch", "sigma", "gap", "eps", "mu", "kappa", "lambda_sq"),
    *("gHg", "dz1", "dz2", "dz3", "dz", "z", "status"),
)


class Sink(Protocol):
    """Receives the rows of every monitored step at once."""

    def start(self, meta: dict[str, Any]) -> None:
        """Learn how the rows will be made (`History.meta`)."""

    def write(self, rows: Sequence[Row]) -> None:
        """Take the rows of one step."""

    def close(self) -> None:
        """No more rows will come."""


class History:
    """The rows of a run, in order, and how they were measured.

    Parameters
    ----------
    rows : iterable of dict
    meta : dict
        How the rows were made: ``noise``, ``conv``, ``sampling``, ``dataset_size``, ``every``, ``optimizer``,
        ``layers``, ``skipped``.

    Examples
    --------
    >>> history = History([{"step": 0, "layer": "network", "z": 1.5, "dz": 0.25}])
    >>> len(history), history.steps
    (1, [0])
    >>> float(history.to_pandas()["z"].iloc[0])
    1.5
    """

    def __init__(self, rows: Iterable[Row] = (), meta: dict[str, Any] | None = None) -> None:
        self.rows: list[Row] = list(rows)
        self.meta: dict[str, Any] = dict(meta or {})

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return f"History({len(self.steps)} steps of {len(self.layers)} layers)"

    def extend(self, rows: Iterable[Row]) -> None:
        """Append the rows of one step."""
        self.rows.extend(rows)

    @property
    def steps(self) -> list[int]:
        """The monitored steps, in order."""
        return list(dict.fromkeys(row["step"] for row in self.rows))

    @property
    def layers(self) -> list[str]:
        """Names of the monitored layers, without the network."""
        return [name for name in dict.fromkeys(row["layer"] for row in self.rows) if name != NETWORK]

    def to_pandas(self) -> pd.DataFrame:
        """One line per row, columns in the order of `COLUMNS`; ``attrs`` holds `meta`."""
        import pandas as pd

        columns = list(COLUMNS)
        if any(SPLIT_COLUMNS[0] in row for row in self.rows):
            at = columns.index("gHg")
            columns[at:at] = SPLIT_COLUMNS
        frame = pd.DataFrame(self.rows, columns=columns)
        frame.attrs.update(self.meta)
        return frame


class JsonLinesSink:
    r"""Writes rows as strict JSON, one a line, the first line holding `History.meta`; NaN becomes null.

    Every step reaches the operating system as a single flushed write, so a crash loses at most the step
    being written.

    Parameters
    ----------
    path : str or Path
        Must not exist yet.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sink = JsonLinesSink(Path(folder) / "history.jsonl")
    ...     sink.write([{"step": 0, "layer": "network", "z": float("nan")}])
    ...     sink.close()
    ...     Path(sink.path).read_text()
    '{"step": 0, "layer": "network", "z": null}\n'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: IO[str] = self.path.open("x", encoding="utf-8")

    def start(self, meta: dict[str, Any]) -> None:
        """Write the line that says how the rows are made."""
        self._put([{"meta": meta}])

    def write(self, rows: Sequence[Row]) -> None:
        """Write and flush the rows of one step."""
        self._put(rows)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()

    def _put(self, rows: Sequence[Row]) -> None:
        lines = [json.dumps(json_ready(row), allow_nan=False) for row in rows]
        self._file.write("".join(line + "\n" for line in lines))
        self._file.flush()


def read_history(path: str | os.PathLike[str]) -> History:
    r"""Read what `JsonLinesSink` wrote; a last line torn by a crash is left out.

    Raises
    ------
    ValueError
        A line other than the last is not JSON.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "history.jsonl"
    ...     _ = path.write_text('{"step": 0, "layer": "fc", "mu": null}\n{"step": 0, "lay')
    ...     read_history(path).rows
    [{'step': 0, 'layer': 'fc', 'mu': nan}]
    """
    history = History()
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(
                f"expected one JSON object per line in {path}, got {line[:40]!r} in line {number}; "
                "restore the file or delete that line"
            ) from error
        if "meta" in row:
            history.meta.update(row["meta"])
        else:
            history.rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return history


def json_ready(value: Any) -> Any:
    """The value with NaN and infinities, which strict JSON does not have, replaced by None at any depth.

    Examples
    --------
    >>> json_ready({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
