"""What was measured: rows, their table, and sinks that write them as they come.

A row is a flat dictionary with the keys of `COLUMNS` (and of `SPLIT_COLUMNS` where the noise was split): one for
every monitored step and layer, and one with layer "network" for the sum over the layers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from lipdyn_torch.errors import LipdynError, in_words
from lipdyn_torch.integrations._extras import need

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    *("COLUMNS", "NETWORK", "REFERENCE_COLUMNS", "SPLIT_COLUMNS"),
    *("History", "as_frame", "JsonLinesSink", "ResumeError", "Row", "Sink"),
    *("check_same_run", "json_ready", "read_history"),
]

_LOG = logging.getLogger(__name__)

Row = dict[str, Any]

#: Name of the row that sums up the layers.
NETWORK = "network"
SPLIT_COLUMNS = ("kappa_var", "kappa_cov", "lambda_sq_var", "lambda_sq_cov")
COLUMNS = (
    *("step", "layer", "lr", "batch", "sigma", "gap", "eps", "mu", "kappa", "lambda_sq"),
    *("gHg", "dz1", "dz2", "dz3", "dz", "z", "mode", "bound", "remainder", "status"),
)
#: Of histories with a reference gradient.
REFERENCE_COLUMNS = ("mu_ref",)


class ResumeError(LipdynError, ValueError):
    """A record cannot be continued by this run: it is of another model, or measured otherwise."""


class Sink(Protocol):
    """Receives the rows of every monitored step at once.

    A run that is resumed from a checkpoint repeats the steps after it. Sinks that keep a record therefore take
    the first step they are given as the truth, and drop what they hold of that step and of later ones.
    """

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
        ``layers``, ``shapes``, ``skipped``, ``reference``.

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

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain containers of numbers and strings: fit for ``torch.save`` and ``weights_only``.

        Examples
        --------
        >>> history = History([{"step": 0, "layer": "network", "z": 1.5}], {"layers": ["fc"]})
        >>> twin = History(meta={"layers": ["fc"]})
        >>> twin.load_state_dict(history.state_dict())
        >>> twin.rows == history.rows
        True
        """
        return {"version": 1, "rows": [dict(row) for row in self.rows], "meta": dict(self.meta)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the rows of an earlier run of the same model in place of those held now.

        The meta of this run is kept where the two differ in schedule or optimiser.

        Raises
        ------
        ResumeError
            The rows are of other layers, or their noise or convolutions were read otherwise.
        """
        if not isinstance(state, dict) or not {"version", "rows", "meta"} <= state.keys():
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ResumeError(f"expected the state_dict of a History, got {got}; pass what history.state_dict() gave")
        if state["version"] != 1:
            raise ResumeError(f"expected version 1 of the state, got {state['version']!r}; update lipdyn_torch")
        check_same_run(state["meta"], self.meta, "the state")
        self.rows = [dict(row) for row in state["rows"]]
        self.meta = {**state["meta"], **self.meta}

    def to_pandas(self) -> pd.DataFrame:
        """One line per row, columns in the order of `COLUMNS`; ``attrs`` holds `meta`."""
        pd = need("pandas", "torch")
        columns = list(COLUMNS)
        if any(SPLIT_COLUMNS[0] in row for row in self.rows):
            at = columns.index("gHg")
            columns[at:at] = SPLIT_COLUMNS
        if any(REFERENCE_COLUMNS[0] in row for row in self.rows):
            at = columns.index("kappa")
            columns[at:at] = REFERENCE_COLUMNS
        frame = pd.DataFrame(self.rows, columns=columns)
        frame.attrs.update(self.meta)
        return frame


def as_frame(history: History | pd.DataFrame) -> pd.DataFrame:
    """The table of a history; a table as it is."""
    if isinstance(history, History):
        return history.to_pandas()
    if not (hasattr(history, "columns") and hasattr(history, "attrs")):
        raise TypeError(
            f"expected a History, such as monitor.history or read_history(path), or its table, got "
            f"{type(history).__name__}"
        )
    return history


class JsonLinesSink:
    r"""Writes rows as strict JSON, one a line, the first line holding `History.meta`; NaN and infinities become null.

    Every step reaches the operating system as a single write, so a crash of the process loses at most the step
    being written; of a step that cannot be written whole, on a full disk say, nothing stays. The file is locked: no
    other process can write it meanwhile (on POSIX systems).

    Parameters
    ----------
    path : str or Path
        Must not exist yet, unless ``resume`` is on.
    resume : bool
        Continue the file if it is there. What cannot stay is moved to a side file, ``<name>.aside-1`` and so on,
        never deleted: a step torn by a crash, at once; steps that this run repeats, with its first row.

    Attributes
    ----------
    path : Path
    set_aside : list of Path
        The side files made by this sink, each holding the removed lines as they were; the log names them too.

    Raises
    ------
    FileExistsError
        The file exists and ``resume`` is off.
    OSError
        The file cannot be written, or another sink is writing it.
    ResumeError
        The file cannot be continued: damaged before its end, or (with the first rows) of another model.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sink = JsonLinesSink(Path(folder) / "history.jsonl")
    ...     sink.write([{"step": 0, "layer": "network", "z": float("nan")}])
    ...     sink.close()
    ...     sink.path.read_text()
    '{"step": 0, "layer": "network", "z": null}\n'
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        self.path = Path(path)
        self.set_aside: list[Path] = []
        self._meta: dict[str, Any] | None = None
        self._resumed = resume and self.path.exists()
        try:
            if not self._resumed:
                self.path.open("xb").close()
            self._file = self.path.open("ab", buffering=0)
        except FileExistsError as error:
            message = (
                f"expected a new file, got {self.path}, which exists; continue it with resume=True or name another"
            )
            raise in_words(error, message) from error
        except OSError as error:
            message = f"expected a file that can be written, got {self.path} ({error.strerror}); make its folder first"
            raise in_words(error, message) from error
        try:
            _lock(self._file, self.path)
            self._found = _Found(self.path)
            if torn := self._cut(self._found.whole):
                _LOG.warning("%s: the last step was cut short; what there was of it is kept in %s", self.path, torn)
        except BaseException:
            self.close()
            raise

    def start(self, meta: dict[str, Any]) -> None:
        """Write the line that says how the rows are made; on resuming, check that they are made likewise."""
        if self._file.closed:
            raise ValueError(
                f"expected an open sink, got that of {self.path}, closed by an earlier run; make a new one"
            )
        self._meta = json_ready(meta)
        if not self._resumed:
            self._put([{"meta": meta}])
            return
        try:
            check_same_run(self._found.meta(), self._meta or {}, str(self.path))
        except ResumeError:
            self.close()
            raise

    def write(self, rows: Sequence[Row]) -> None:
        """Write the rows of one step."""
        if self._resumed and rows:
            self._resumed = False
            step = rows[0]["step"]
            if repeated := self._cut(end := self._found.before(step)):
                message = "%s: this run begins at step %d; what an earlier run wrote from that step on is kept in %s"
                _LOG.warning(message, self.path, step, repeated)
            if self._meta is not None and self._meta != self._found.meta(end):
                self._put([{"meta": self._meta}])
        self._put(rows)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if not self._file.closed:
            _unlock(self._file)
        self._file.close()

    def _put(self, rows: Sequence[Row]) -> None:
        lines = [json.dumps(json_ready(row), allow_nan=False) for row in rows]
        data = memoryview("".join(line + "\n" for line in lines).encode())
        end = os.fstat(self._file.fileno()).st_size
        try:
            while data:  # an unbuffered file may take less than it is given
                data = data[self._file.write(data) :]
        except BaseException:
            self._file.truncate(end)  # what comes later must not follow half a line
            raise

    def _cut(self, size: int) -> Path | None:
        """Shorten the file to ``size`` bytes; the rest, if any, is safe in the side file that is returned."""
        with self.path.open("rb+") as file:
            file.seek(size)
            rest = file.read()
            if not rest:
                return None
            aside = next(p for n in itertools.count(1) if not (p := Path(f"{self.path}.aside-{n}")).exists())
            with aside.open("xb") as copy:
                copy.write(rest)
                copy.flush()
                os.fsync(copy.fileno())
            file.truncate(size)
        self.set_aside.append(aside)
        return aside


def read_history(path: str | os.PathLike[str]) -> History:
    r"""Read what `JsonLinesSink` wrote; a last step torn by a crash, or not yet whole, is left out.

    Raises
    ------
    ResumeError
        It is another file, or a line other than the last is damaged.
    OSError
        There is no file, or it cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "history.jsonl"
    ...     _ = path.write_text('{"step": 0, "layer": "network", "mu": null}\n{"step": 1, "lay')
    ...     read_history(path).rows
    [{'step': 0, 'layer': 'network', 'mu': nan}]
    """
    history, whole = History(), 0
    for _, record in _records(Path(path)):
        if "meta" in record:
            history.meta.update(record["meta"])
        else:
            history.rows.append({key: math.nan if value is None else value for key, value in record.items()})
            whole = len(history.rows) if record["layer"] == NETWORK else whole
    del history.rows[whole:]
    return history


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each whole line as ``(offset of its end, object)``; ends before a torn last line."""
    try:
        file = path.open("rb")
    except OSError as error:
        message = f"expected a history written by JsonLinesSink, got {path} ({error.strerror}); is it the right path?"
        raise in_words(error, message) from error
    with file:
        size, end = os.fstat(file.fileno()).st_size, 0
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError:  # also what is not UTF-8
                record = None
            end += len(line)
            if not (_is_record(record) and line.endswith(b"\n")):
                if end >= size and (number > 1 or _is_torn_head(line, record)):
                    return
                raise ResumeError(_complaint(path, number, line, record))
            yield end, record


def _is_record(value: Any) -> bool:
    """Whether it is a row or the head."""
    if not isinstance(value, dict):
        return False
    return isinstance(value["meta"], dict) if "meta" in value else {"step", "layer"} <= value.keys()


def _is_torn_head(line: bytes, record: Any) -> bool:
    """Whether the only line of a file can be what a crash left of a record: its beginning, or zeros in its place."""
    begun = line.startswith(b"{") and not line.endswith(b"\n") and record is None
    return begun or _is_record(record) or not line.strip(b"\0")


def _complaint(path: Path, number: int, line: bytes, record: Any) -> str:
    got = repr(line[:40].decode(errors="replace"))
    if number == 1:
        return (
            f"expected a history written by JsonLinesSink, got {path}, whose first line is neither a head (meta) nor "
            f"a row (step, layer): {got}; name the right file, or restore this one"
        )
    if isinstance(record, dict):
        got = f"{got} without the keys step and layer"
    return (
        f"expected one JSON object per line in {path}, got {got} in line {number}; restore the file, or delete all "
        "lines of that step"
    )


class _Found:
    """Where steps and heads are in a file that is to be continued; offsets in bytes.

    A step is written at once and closes with the network's row: ``whole`` is where the last whole one ends.
    """

    def __init__(self, path: Path) -> None:
        self._heads: list[tuple[int, dict[str, Any]]] = []
        self._begins: list[tuple[int, int]] = []  # of steps
        self.whole = before = 0
        for end, record in _records(path):
            if "meta" in record:
                self._heads.append((end, record["meta"]))
            elif not self._begins or self._begins[-1][0] != record["step"]:
                self._begins.append((record["step"], before))
            if "meta" in record or record["layer"] == NETWORK:
                self.whole = end
            before = end

    def meta(self, end: float = math.inf) -> dict[str, Any]:
        """`History.meta` of what lies before that."""
        return dict(item for offset, head in self._heads if offset <= end for item in head.items())

    def before(self, step: int) -> int:
        """Where the first row of ``step`` or of a later one begins; the end of the last whole step if there is none."""
        later = (offset for found, offset in self._begins if found >= step)
        return min(next(later, self.whole), self.whole)


def _lock(file: IO[bytes], path: Path) -> None:
    """Keep other processes from writing the file, where the system can."""
    try:
        import fcntl
    except ModuleNotFoundError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = (
            f"expected a file that nobody else writes, got {path}, which another sink has open, perhaps that of a job "
            "still running; close that one, or name another file"
        )
        raise in_words(error, message) from error
    except OSError as error:  # some network file systems have no locks
        _LOG.info("%s: not locked (%s)", path, error.strerror)


def _unlock(file: IO[bytes]) -> None:
    """Let others write the file, also while processes forked from this one still have it open."""
    with contextlib.suppress(ModuleNotFoundError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


def check_same_run(old: dict[str, Any], new: dict[str, Any], what: str) -> None:
    """Rows may follow each other only where they mean the same."""
    for key in ("layers", "shapes", "noise", "conv", "reference"):
        if key in old and key in new and json_ready(old[key]) != json_ready(new[key]):
            raise ResumeError(
                f"expected {what} to have {key} {new[key]!r} as this run, got {old[key]!r}; "
                "resume with the same model and settings, or start a new record"
            )


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
