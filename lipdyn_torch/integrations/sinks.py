"""Sinks for the tools people watch runs with: TensorBoard, Parquet, MLflow, Weights & Biases.

All follow `lipdyn_torch.history.Sink`, import their package when they are made, and give each number the name
``lipschitz_<column>/<layer>``, so that dashboards put one quantity of all layers side by side. Numbers that are
NaN or infinite are left out: a gap in the curve is a value that does not exist. The status of a layer is noted
when it changes.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lipdyn_torch.history import Row, check_same_run, json_ready
from lipdyn_torch.integrations._extras import need

__all__ = ["MLflowSink", "ParquetSink", "TensorBoardSink", "WandbSink", "scalars"]

PREFIX = "lipschitz_"
_KEYS = ("step", "layer", "status")


def scalars(rows: Iterable[Row], columns: Sequence[str] | None = None) -> dict[str, float]:
    """The finite numbers of one step by name, all columns or those asked for.

    Examples
    --------
    >>> scalars([{"step": 3, "layer": "fc", "mu": 0.5, "kappa": float("nan"), "status": "ok"}])
    {'lipschitz_mu/fc': 0.5}
    """
    return {
        f"{PREFIX}{column}/{row['layer']}": float(value)
        for row in rows
        for column, value in row.items()
        if column not in _KEYS
        and (columns is None or column in columns)
        and isinstance(value, int | float)
        and math.isfinite(value)
    }


class _Statuses:
    """Tells a layer's status when it differs from the one before ("ok" at the start)."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def changed(self, rows: Iterable[Row]) -> dict[str, str]:
        now = {str(row["layer"]): str(row.get("status", "ok")) for row in rows}
        news = {layer: status for layer, status in now.items() if status != self._last.get(layer, "ok")}
        self._last |= now
        return {f"{PREFIX}status/{layer}": status for layer, status in news.items()}


class TensorBoardSink:
    """Writes scalars for TensorBoard (extra ``tensorboard``).

    Parameters
    ----------
    writer : str, Path or torch.utils.tensorboard.SummaryWriter
        A folder for event files, or your own writer, which stays open.
    columns : sequence of str, optional
        Columns of the history to write; all by default.

    Notes
    -----
    On a run resumed at a later step, TensorBoard hides what an earlier run wrote from that step on.
    """

    def __init__(self, writer: Any, *, columns: Sequence[str] | None = None) -> None:
        self._tensorboard = need("torch.utils.tensorboard", "tensorboard")
        self._columns = columns
        self._meta: dict[str, Any] = {}
        self._statuses = _Statuses()
        self._folder = writer if isinstance(writer, str | os.PathLike) else None
        self._writer = None if self._folder is not None else writer

    def start(self, meta: dict[str, Any]) -> None:
        """Keep the meta until the first rows tell where the run begins."""
        self._meta = meta

    def write(self, rows: Sequence[Row]) -> None:
        """Add the scalars of one step."""
        step = rows[0]["step"]
        if self._writer is None:
            purge = {"purge_step": step} if step else {}
            self._writer = self._tensorboard.SummaryWriter(os.fspath(self._folder), **purge)  # type: ignore[arg-type]
        if self._meta:
            text = json.dumps(json_ready(self._meta), indent=2)
            self._writer.add_text(f"{PREFIX}meta", f"```json\n{text}\n```", step)
            self._meta = {}
        for name, value in scalars(rows, self._columns).items():
            self._writer.add_scalar(name, value, step)
        for name, status in self._statuses.changed(rows).items():
            self._writer.add_text(name, status, step)

    def close(self) -> None:
        """Flush, and close the writer if it is the sink's own."""
        if self._writer is not None:
            self._writer.flush()
            if self._folder is not None:
                self._writer.close()


class ParquetSink:
    """Writes a folder of Parquet files, read back whole by ``pandas.read_parquet(folder)`` (extra ``parquet``).

    A file appears under its name only when it is complete, so a crash loses the rows not yet in a file and
    damages none. ``History.meta`` is in each file's schema, as JSON under the key ``lipdyn``.

    Parameters
    ----------
    folder : str or Path
        Must be new or empty, unless ``resume`` is on.
    rows_per_file : int
        Rows kept in memory before they are written.
    resume : bool
        Continue the folder. Files with steps that this run repeats are renamed to ``_superseded-...``, which
        readers pass over, and their earlier steps written anew.
    """

    def __init__(self, folder: str | os.PathLike[str], *, rows_per_file: int = 10_000, resume: bool = False) -> None:
        self._arrow, self._parquet = need("pyarrow", "parquet"), need("pyarrow.parquet", "parquet")
        if not isinstance(rows_per_file, int) or rows_per_file < 1:
            raise ValueError(f"expected rows_per_file of at least 1, got {rows_per_file!r}")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for half_written in self.folder.glob("_tmp-*"):
            half_written.unlink()
        if any(self.folder.iterdir()) and not resume:
            raise FileExistsError(f"expected an empty folder, got {folder}; choose another one or resume=True")
        self._resumed, self._rows_per_file = resume, rows_per_file
        self._rows: list[Row] = []
        self._meta: dict[str, Any] = {}

    def start(self, meta: dict[str, Any]) -> None:
        """Keep the meta for the files; on resuming, check that the rows in the folder were made likewise."""
        self._meta = json_ready(meta)
        for part in self._parts()[-1:]:
            old = json.loads((self._parquet.read_schema(part).metadata or {}).get(b"lipdyn", b"{}"))
            check_same_run(old, self._meta, str(self.folder))

    def write(self, rows: Sequence[Row]) -> None:
        """Take the rows of one step, and write a file when there are enough."""
        if self._resumed and rows:
            self._supersede(rows[0]["step"])
            self._resumed = False
        self._rows.extend(rows)
        if len(self._rows) >= self._rows_per_file:
            self._flush()

    def close(self) -> None:
        """Write what is left; closing twice is harmless."""
        self._flush()

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def _flush(self) -> None:
        if self._rows:
            keys = list(dict.fromkeys(key for row in self._rows for key in row))
            types = [self._type([row.get(key) for row in self._rows]) for key in keys]
            schema = self._arrow.schema(list(zip(keys, types, strict=True)), {"lipdyn": json.dumps(self._meta)})
            self._put(self._arrow.Table.from_pylist(self._rows, schema=schema))
            self._rows = []

    def _type(self, values: list[Any]) -> Any:
        known = [value for value in values if value is not None]
        if any(isinstance(value, str) for value in known):
            return self._arrow.string()
        whole = all(isinstance(value, int) for value in known)
        return self._arrow.int64() if known and whole else self._arrow.float64()

    def _put(self, table: Any) -> None:
        parts = self._parts()
        number = int(parts[-1].stem.removeprefix("part-")) + 1 if parts else 0
        name = f"part-{number:06d}.parquet"
        self._parquet.write_table(table, self.folder / f"_tmp-{name}")
        os.replace(self.folder / f"_tmp-{name}", self.folder / name)

    def _supersede(self, step: int) -> None:
        """Take away all rows from ``step`` on."""
        for part in self._parts():
            table = self._parquet.read_table(part)
            keep = self._arrow.compute.less(table["step"], step)
            if not all(keep.to_pylist()):
                aside = self.folder / f"_superseded-{time.time_ns()}-{part.name}"
                os.replace(part, aside)
                if any(keep.to_pylist()):
                    self._put(table.filter(keep))


class MLflowSink:
    """Logs metrics to an MLflow run (extra ``mlflow``; the light package ``mlflow-skinny`` suffices).

    Parameters
    ----------
    run_id : str, optional
        The run to log to; by default the active one (``with mlflow.start_run():``).
    tracking_uri : str, optional
        Where the run lives; by default what MLflow is set to.
    columns : sequence of str, optional
        Columns of the history to log; all by default.

    Notes
    -----
    Metrics go out in one request per step (at most 1,000 metrics each). `History.meta` becomes the artifact
    ``lipschitz_meta.json``, statuses other than "ok" become tags. Characters of layer names that MLflow does not
    allow become underscores, and a checksum behind tells such names apart. The run is not ended by the sink.
    """

    _LIMIT = 1000

    def __init__(
        self, run_id: str | None = None, *, tracking_uri: str | None = None, columns: Sequence[str] | None = None
    ) -> None:
        mlflow = need("mlflow", "mlflow")
        active = mlflow.active_run()
        if run_id is None and active is None:
            raise ValueError("expected a run to log to, got none; pass run_id= or call mlflow.start_run() before")
        self.run_id: str = run_id or active.info.run_id
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient(tracking_uri=tracking_uri)
        self._columns = columns
        self._statuses = _Statuses()

    def start(self, meta: dict[str, Any]) -> None:
        """Store the meta as an artifact."""
        self._client.log_dict(self.run_id, json_ready(meta), f"{PREFIX}meta.json")

    def write(self, rows: Sequence[Row]) -> None:
        """Log the metrics of one step."""
        now, step = int(1000 * time.time()), rows[0]["step"]
        named = scalars(rows, self._columns).items()
        metrics = [self._metric(self._allowed(name), value, now, step) for name, value in named]
        for at in range(0, len(metrics), self._LIMIT):
            self._client.log_batch(self.run_id, metrics=metrics[at : at + self._LIMIT])
        for name, status in self._statuses.changed(rows).items():
            self._client.set_tag(self.run_id, self._allowed(name), f"step {step}: {status}")

    def close(self) -> None:
        """Nothing to do: the run belongs to the script."""

    @staticmethod
    def _allowed(name: str) -> str:
        allowed = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
        return allowed if allowed == name else f"{allowed}-{zlib.crc32(name.encode(errors='surrogatepass')):08x}"


class WandbSink:
    """Logs to a Weights & Biases run (extra ``wandb``).

    Parameters
    ----------
    run : wandb.Run, optional
        By default the active one (``wandb.init()``).
    columns : sequence of str, optional
        Columns of the history to log; all by default.
    commit : bool
        With True each monitored step is a step of the W&B run. With False numbers wait for the script's own next
        ``run.log``: choose it when the script logs every step, or passes ``step=`` itself.

    Notes
    -----
    The numbers have their own horizontal axis, ``optimizer_step``. `History.meta` goes to ``run.config``.
    The run is not finished by the sink.
    """

    AXIS = "optimizer_step"

    def __init__(self, run: Any = None, *, columns: Sequence[str] | None = None, commit: bool = True) -> None:
        self._run = run if run is not None else need("wandb", "wandb").run
        if self._run is None:
            raise ValueError("expected a run to log to, got none; pass run= or call wandb.init() before")
        self._columns, self._commit = columns, commit
        self._statuses = _Statuses()

    def start(self, meta: dict[str, Any]) -> None:
        """Store the meta in the run's config, and give the numbers their axis."""
        self._run.config.update({"lipschitz": json_ready(meta)}, allow_val_change=True)
        self._run.define_metric(f"{PREFIX}*", step_metric=self.AXIS)

    def write(self, rows: Sequence[Row]) -> None:
        """Log the numbers of one step, and statuses that changed."""
        record: dict[str, Any] = {self.AXIS: rows[0]["step"], **scalars(rows, self._columns)}
        self._run.log(record | self._statuses.changed(rows), commit=self._commit)

    def close(self) -> None:
        """Nothing to do: the run belongs to the script."""
