"""specpert against NumPy's LAPACK on the same matrix: how much a derivative costs beside the decomposition."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from bench.harness import Row, compare
from specpert import SigmaHessian, sigma_derivative, sigma_hessian, sigma_series

rng = np.random.default_rng(0)


def gaussian(*shape: int, dtype: type = np.float64) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def svd(A: np.ndarray) -> object:
    return np.linalg.svd(A, full_matrices=False)


def top(m: int, n: int, order: int, limit: float) -> Row:
    A, H = gaussian(m, n), gaussian(m, n)
    return compare(
        f"order-{order} series of sigma_0, {m} x {n}, to its thin SVD",
        lambda: sigma_series(A, H, order),
        lambda: svd(A),
        limit=limit,
    )


def single_precision() -> Row:
    A, H = gaussian(2048, 5504, dtype=np.float32), gaussian(2048, 5504, dtype=np.float32)
    found = sigma_series(A, H, 4).coefficients
    exact = sigma_series(A.astype(float), H.astype(float), 4).coefficients
    error = float(np.abs(found - exact).max() / np.abs(exact).max())
    return compare(
        "order-4 series of sigma_0, 2048 x 5504 float32, to its thin SVD",
        lambda: sigma_series(A, H, 4),
        lambda: svd(A),
        limit=0.10,
        note=f"largest error {error:.1e} of the largest coefficient",
    )


def interior() -> Row:
    A, H = gaussian(512, 1024), gaussian(512, 1024)
    return compare(
        "order-4 series of sigma_255, 512 x 1024, to its thin SVD",
        lambda: sigma_series(A, H, 4, k=255),
        lambda: svd(A),
        limit=1.15,
    )


def batch() -> Row:
    A, H = gaussian(10_000, 6, 10), gaussian(10_000, 6, 10)
    return compare(
        "order-4 series of 10,000 matrices 6 x 10, to their batched SVD",
        lambda: sigma_series(A, H, 4),
        lambda: svd(A),
        limit=1.5,
    )


def single_call() -> Row:
    A, H = gaussian(6, 10), gaussian(6, 10)
    for _ in range(20):
        sigma_derivative(A, 2, directions=H)

    def sixty_microseconds() -> None:
        end = time.perf_counter() + 60e-6
        while time.perf_counter() < end:
            pass

    return compare(
        "one call, 6 x 10, order 2, one direction, to 60 microseconds",
        lambda: sigma_derivative(A, 2, directions=H),
        sixty_microseconds,
        limit=1.0,
    )


def dense_hessian() -> Row:
    A = gaussian(64, 128)
    out = np.empty((64, 128, 64, 128))
    return compare(
        "dense Hessian 64 x 128, to filling an array of that size",
        lambda: sigma_hessian(A),
        lambda: np.full_like(out, 1.0),
        limit=3.0,
        note="both allocate 512 MiB",
    )


def quadratic_forms() -> Row:
    A, G = gaussian(256, 2048), gaussian(256, 256, 2048)
    H = SigmaHessian(A)
    v = H.triplet.v
    return compare(
        "Hessian forms of 256 directions 256 x 2048, to one einsum pass over them",
        lambda: H.quadratic(G),
        lambda: np.einsum("kij,j->ki", G, v),
        limit=1.5,
    )


def importing() -> Row:
    def process(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    code = "import time; a = time.perf_counter(); import specpert; print(time.perf_counter() - a)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(7)
    ]
    median = float(np.median(times))
    numpy_only = compare("", partial(process, "import specpert"), partial(process, "import numpy"), seconds=3.0)
    return Row(
        "import specpert, to 0.4 s",
        median / 0.4,
        min(times) / 0.4,
        max(times) / 0.4,
        1e3 * median,
        400.0,
        1.0,
        note=f"{numpy_only.ratio:.2f} times a process that imports numpy",
    )


def jobs() -> list[Callable[[], Row]]:
    return [
        partial(top, 512, 1024, 8, 0.35),
        partial(top, 512, 4096, 8, 0.35),
        single_precision,
        interior,
        batch,
        single_call,
        dense_hessian,
        quadratic_forms,
        importing,
    ]
