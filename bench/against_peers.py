"""specpert against general perturbation theory of the embedded Hermitian problem: pymablock and EasterEig.

Both are given the (m + n)-dimensional Jordan-Wielandt matrices; neither knows about singular values. Each row times the
whole way from the matrices to the coefficient, decomposition included.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable
from functools import partial

import numpy as np
from oracles import jordan_wielandt, taylor_mpmath

from bench.harness import Row, compare
from specpert import sigma_derivative

rng = np.random.default_rng(0)


def by_pymablock(A: np.ndarray, H: np.ndarray, order: int) -> float:
    """Coefficient of the given order of the top eigenvalue of T0 + x T1."""
    from pymablock import block_diagonalize

    w, X = np.linalg.eigh(jordan_wielandt(A))
    size = len(w)
    effective, _, _ = block_diagonalize(
        [np.diag(w), X.T @ jordan_wielandt(H) @ X], subspace_indices=[0] * (size - 1) + [1]
    )
    return float(np.asarray(effective[1, 1, order]).reshape(()))


def by_eastereig(A: np.ndarray, H: np.ndarray, order: int) -> float:
    """The same by EasterEig's bordered linear systems."""
    import eastereig

    T0, T1 = jordan_wielandt(A).astype(complex), jordan_wielandt(H).astype(complex)  # it computes in complex numbers
    w, X = np.linalg.eigh(T0)

    class Family(eastereig.OP):
        def __init__(self) -> None:
            self.setnu0(0.0)
            self._lib = "numpy"
            identity = np.eye(len(T0), dtype=complex)
            self.K = [T0, -identity]
            self.dK = [lambda n: [T0, T1][n] if n < 2 else 0, lambda n: 0 if n else -identity]
            self.flda = [None, eastereig.lda_func.Lda]

    pair = eastereig.Eig("numpy", lda=w[-1], x=X[:, -1])
    with contextlib.redirect_stdout(None):  # it reports each solve
        pair.getDerivatives(order + 1, Family())
    return float(np.real(pair.dlda[order])) / math.factorial(order)


PEERS = {"pymablock": by_pymablock, "eastereig": by_eastereig}


def row(name: str, shape: tuple[int, int], order: int) -> Row:
    A, H = rng.standard_normal((2, *shape))
    H /= np.linalg.norm(H, 2)
    method = PEERS[name]
    note = ""
    if max(shape) <= 10:
        truth = taylor_mpmath(A, H, 0, order)[order]
        ours = sigma_derivative(A, order, directions=H) / math.factorial(order)
        errors = [abs(f / truth - 1) for f in (ours, method(A, H, order))]
        note = f"relative error {errors[0]:.0e} against {errors[1]:.0e}"
    return compare(
        f"order {order}, {shape[0]} x {shape[1]}, to {name}",
        lambda: sigma_derivative(A, order, directions=H),
        lambda: method(A, H, order),
        limit=1.0,
        note=note,
    )


def jobs() -> list[Callable[[], Row]]:
    installed = [name for name in PEERS if importlib.util.find_spec(name)]
    return [
        partial(row, name, shape, order) for name in installed for shape in ((6, 10), (60, 100)) for order in (2, 4, 6)
    ]
