"""Command line: `python -m bench [TITLE ...]` runs all tables, or those named."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from bench import against_autograd, against_lapack, against_peers, monitor
from bench.harness import page, run

TABLES = {
    "against_lapack": against_lapack.jobs,
    "against_autograd": against_autograd.jobs,
    "against_peers": against_peers.jobs,
    "monitor": monitor.jobs,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="measure side by side, in ratios")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; default all")
    arguments = parser.parse_args()
    unknown = set(arguments.tables) - set(TABLES)
    if unknown:
        parser.error(f"expected tables among {', '.join(TABLES)}, got {', '.join(sorted(unknown))}")
    names = arguments.tables or list(TABLES)
    if len(names) > 1:  # each in a process of its own: what one leaves in memory must not change the next
        for name in names:
            subprocess.run([sys.executable, "-m", "bench", name], check=True)
        return
    (name,) = names
    print(f"\n## {name}\n")
    run(name, TABLES[name](), command=f"python -m bench {name}")
    Path(__file__).parents[1].joinpath("docs", "benchmarks.md").write_text(page())


if __name__ == "__main__":
    main()
