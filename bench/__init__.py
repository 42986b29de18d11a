"""Benchmarks: `python -m bench` measures side by side and keeps the results in bench/results/."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the oracles are those of the tests
