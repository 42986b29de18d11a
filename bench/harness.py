"""Interleaved timing: the functions of a row run in turn, so that a change of the machine's speed touches all alike."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lipdyn_torch.experiments.runner import processor

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One line of a table: the median of the ratio ours / theirs over the rounds, against what was promised."""

    name: str
    ratio: float
    low: float
    high: float
    ours: float
    theirs: float
    limit: float | None
    note: str = ""
    unit: str = "ms"

    @property
    def verdict(self) -> str:
        if self.limit is None:
            return ""
        return "met" if self.ratio <= self.limit else "not met"


def compare(
    name: str, ours: Callable, theirs: Callable, *, limit: float | None = None, seconds: float = 4.0, note: str = ""
) -> Row:
    """Time the two in turn for about so many seconds, after a warm-up of both."""
    for _ in range(2):
        ours(), theirs()
    once = _time(ours, 1) + _time(theirs, 1)
    inner = max(1, int(2e-3 / once))
    rounds = int(np.clip(seconds / (inner * once), 5, 200))
    pairs = [(_time(ours, inner), _time(theirs, inner)) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    ours_ms, theirs_ms = (1e3 * statistics.median(x) / inner for x in zip(*pairs, strict=True))
    quarter = len(ratios) // 4
    return Row(name, statistics.median(ratios), ratios[quarter], ratios[-1 - quarter], ours_ms, theirs_ms, limit, note)


def _time(function: Callable, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return time.perf_counter() - start


def machine() -> dict:
    """What the numbers were measured on."""
    versions = {m: sys.modules[m].__version__ for m in ("numpy", "scipy", "numba", "torch", "jax") if m in sys.modules}
    threads = {k: v for k, v in os.environ.items() if k.endswith("_NUM_THREADS")}
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions,
        "threads": threads,
    }


def run(title: str, jobs: list[Callable[[], Row]], command: str) -> list[Row]:
    """Run the jobs with a progress bar, print the table, keep it as bench/results/<title>.json."""
    rows = [job() for job in tqdm(jobs, desc=title, unit="row", leave=False)]
    RESULTS.mkdir(exist_ok=True)
    record = {"command": command, "machine": machine(), "rows": [asdict(r) | {"verdict": r.verdict} for r in rows]}
    (RESULTS / f"{title}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))
    return rows


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| work | ratio (quartiles) | at most | | ours | theirs | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        limit = "" if r.limit is None else f"{r.limit:g}"
        spread = f"{r.ratio:.3g} ({r.low:.3g} to {r.high:.3g})"
        lines.append(
            f"| {r.name} | {spread} | {limit} | {r.verdict} "
            f"| {r.ours:.3g} {r.unit} | {r.theirs:.3g} {r.unit} | {r.note} |"
        )
    return "\n".join(lines)


def page() -> str:
    """All kept results as one page of the documentation."""
    parts = [
        "# Benchmarks",
        "Each row times two things in turn, in one process, and gives the median of their ratio with its quartiles; "
        "`at most` is the target set beforehand. Shared machines are noisy: read the ratios, not the milliseconds. "
        "Repeat with `make bench`, or `python -m bench TABLE` for one table.",
    ]
    for file in sorted(RESULTS.glob("*.json")):
        record = json.loads(file.read_text())
        m = record["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
        threads = ", ".join(f"{k} = {v}" for k, v in m["threads"].items()) or "default threads"
        rows = [Row(**{k: v for k, v in row.items() if k != "verdict"}) for row in record["rows"]]
        parts += [
            f"## {file.stem.replace('_', ' ').capitalize()}",
            f"`{record['command']}` on {m['processor']}, {m['cores']} cores, Python {m['python']}, {versions}; "
            f"{threads}.",
            table(rows),
        ]
    return "\n\n".join(parts) + "\n"
