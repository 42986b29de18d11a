"""Benchmarks: `python -m bench` measures side by side and keeps the results in bench/results/."""

import os
import sys
from pathlib import Path

# One thread for each library: NumPy, SciPy and torch bring pools of their own, which otherwise wait for each other.
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the oracles are those of the tests
