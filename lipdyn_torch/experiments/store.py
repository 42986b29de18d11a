"""The run folder: settings, and the rows of finished points, safe against a kill at any moment.

Rows are JSON lines. Those of a point are written together and closed by a line ``{"finished": id, "rows": count}``:
a point counts only if that line is there and the count is right, and only once.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from lipdyn_torch.errors import RunFolderExistsError, in_words
from lipdyn_torch.experiments.registry import NAMES, Row
from lipdyn_torch.history import json_ready

__all__ = ["CONFIG", "ROWS", "RunFolder", "make_folder", "read_document"]

CONFIG, ROWS = "config.json", "rows.jsonl"
DAMAGED = "rows.damaged-{}.jsonl"
SUMMARY = "summary.md"  # names the figures beside it
_MADE_HERE = ("environment.json", "report.html", "rows.damaged-*.jsonl", SUMMARY, ROWS, CONFIG)


def make_folder(path: Path) -> bool:
    """Make the folder where it is not there; whether it is empty.

    Raises
    ------
    RunFolderExistsError
        It is a file.
    OSError
        It cannot be made or read.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        return not any(path.iterdir())
    except FileExistsError as error:
        raise RunFolderExistsError(f"expected a folder, got {path}, which is a file; choose another --out") from error
    except OSError as error:
        message = f"expected a folder that can be made and read, got {path} ({error.strerror}); choose another --out"
        raise in_words(error, message) from error


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class RunFolder:
    """A folder that belongs to one experiment with one configuration.

    Parameters
    ----------
    path : Path
        Made if it is not there. If it is, its configuration must be this one: the run then continues.
    config : dict
        Plain values.
    overwrite : bool
        Remove the files of an earlier run first, whatever its configuration; what else is there is not overwritten.

    Attributes
    ----------
    finished : dict
        Rows by id of their point.
    set_aside : Path or None
        Where the damaged tail of the row file was moved.

    Raises
    ------
    RunFolderExistsError
        The folder holds another experiment, another configuration, or something else.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     folder = RunFolder(Path(place) / "run", {"experiment": "jacobian"})
    ...     folder.add("k0", [{"error": 1e-16}])
    ...     RunFolder(Path(place) / "run", {"experiment": "jacobian"}).finished
    {'k0': [{'error': 1e-16}]}
    """

    def __init__(self, path: Path, config: dict[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.finished: dict[str, list[Row]] = {}
        self.set_aside: Path | None = None
        config = json.loads(json.dumps(json_ready(config)))
        if not make_folder(path) and not (overwrite and self._clear()):
            self._check(config)
        else:
            self.write(CONFIG, json.dumps(config, indent=2) + "\n")
        self._load()

    def add(self, point: str, rows: list[Row]) -> None:
        """Record a finished point; a second time changes nothing."""
        if point in self.finished:
            return
        records = [*({"point": point, **row} for row in rows), {"finished": point, "rows": len(rows)}]
        text = "".join(json.dumps(json_ready(record), allow_nan=False) + "\n" for record in records)
        with (self.path / ROWS).open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # What is summed up is what a later reading finds: through JSON and back.
        self.finished[point] = [_from_json(json.loads(line)) for line in text.splitlines()[:-1]]

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder in one piece: it is there whole or not at all."""
        temporary = self.path / f".{name}.part"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path / name)

    def rows(self, points: list[str]) -> list[Row]:
        """All rows of these points, in their order, whatever the order in which they were finished."""
        return [{"point": point, **row} for point in points for row in self.finished[point]]

    def _clear(self) -> bool:
        """Remove what a run makes, and only that; False if this is no run folder."""
        if self._config() is None:
            return False
        summary = self.path / SUMMARY
        text = summary.read_text(encoding="utf-8", errors="replace") if summary.is_file() else ""
        figures = (
            f"{name}.{kind}" for name in re.findall(r"^!\[([\w-]+)\]", text, re.MULTILINE) for kind in ("png", "svg")
        )
        for pattern in (*figures, *_MADE_HERE):
            for file in self.path.glob(pattern):
                file.unlink()
        return True

    def _check(self, config: dict[str, Any]) -> None:
        found = self._config()
        if found is None:
            raise RunFolderExistsError(
                f"expected a run folder, got {self.path} without a {CONFIG} of an experiment; choose another --out"
            )
        for key in dict.fromkeys((*config, *found)):
            if found.get(key) != config.get(key):
                raise RunFolderExistsError(
                    f"expected a folder of this run ({key} {config.get(key)!r}), got {self.path} with {key} "
                    f"{found.get(key)!r}; choose another --out or add --overwrite"
                )

    def _config(self) -> dict[str, Any] | None:
        """The configuration that the folder was made for; None if no experiment made it: others have such files too."""
        found = read_document(self.path / CONFIG)
        return found if found.get("experiment") in ("all", *NAMES) else None

    def _load(self) -> None:
        file = self.path / ROWS
        if not file.exists():
            return
        content = file.read_bytes()
        kept, pending = 0, []
        position = 0
        for line in content.splitlines(keepends=True):
            position += len(line)
            record = _parse(line)
            if record is None:
                break
            if "finished" not in record:
                pending.append(record)
                continue
            if record.get("rows") != len(pending) or any(row.get("point") != record["finished"] for row in pending):
                break
            self.finished.setdefault(record["finished"], [_from_json(row) for row in pending])
            kept, pending = position, []
        if kept < len(content):
            self.set_aside = self._move_tail(content[kept:])
            with file.open("r+b") as handle:
                handle.truncate(kept)

    def _move_tail(self, tail: bytes) -> Path:
        number = 1
        while (target := self.path / DAMAGED.format(number)).exists():
            number += 1
        target.write_bytes(tail)
        return target


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a whole line, or None if it is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and line.endswith(b"\n") else None


def _from_json(row: Row) -> Row:
    """The row as it was: null is NaN again, and the point's id is the key under which it is kept."""
    return {key: math.nan if value is None else value for key, value in row.items() if key != "point"}
