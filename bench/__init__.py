"""Benchmarks: `python -m bench` measures side by side and keeps the results in bench/results/."""
