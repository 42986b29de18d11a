"""Slow, literal twins of what specpert computes, and makers of matrices. None uses a formula of the package.

Legend: T0, T1 Jordan-Wielandt matrices; S reduced resolvent; P eigenprojection; lam_n Taylor coefficients.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import mpmath
import numpy as np
from hypothesis import strategies as st

DATA = Path(__file__).parent / "data" / "sigma_derivatives.json"


def reference_cases(kind: str) -> list[dict]:
    """Cases of one kind computed at 90 digits, with arrays in place of nested lists."""
    cases = json.loads(DATA.read_text())["cases"]
    return [{**c, "A": _array(c["A"]), "H": [_array(h) for h in c["H"]]} for c in cases if c["kind"] == kind]


def _array(entry: dict) -> np.ndarray:
    real = np.array(entry["re"])
    return real + 1j * np.array(entry["im"]) if "im" in entry else real


def by_name(cases: list[dict]) -> dict:
    """Arguments of pytest.mark.parametrize for a list of cases."""
    return {"argvalues": cases, "ids": [c["name"] for c in cases]}


def taylor_mpmath(A: np.ndarray, H: np.ndarray, k: int, order: int, dps: int = 60) -> np.ndarray:
    """Taylor coefficients of sigma_k(A + x H) by high-precision differences of mpmath's singular values."""
    with mpmath.workdps(dps):
        a, h = mpmath.matrix(A.tolist()), mpmath.matrix(H.tolist())
        svd = mpmath.svd_c if np.iscomplexobj(A) or np.iscomplexobj(H) else mpmath.svd_r

        def sigma(x):
            return svd(a + x * h, compute_uv=False)[k]

        return np.array([float(c) for c in mpmath.taylor(sigma, 0, order)])


def jordan_wielandt(A: np.ndarray) -> np.ndarray:
    """[[0, A], [A^*, 0]]."""
    m, n = A.shape
    return np.block([[np.zeros((m, m)), A], [A.conj().T, np.zeros((n, n))]])


def reduced_resolvent(A: np.ndarray, value: float, c: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """P and S of the c eigenvalues of T0 nearest to `value`, from the full eigendecomposition."""
    w, X = np.linalg.eigh(jordan_wielandt(A))
    inside = np.argsort(abs(w - value))[:c]
    outside = np.setdiff1d(np.arange(len(w)), inside)
    P = X[:, inside] @ X[:, inside].conj().T
    S = X[:, outside] / (w[outside] - w[inside].mean()) @ X[:, outside].conj().T
    return P, S


def kato_trace(A: np.ndarray, H: np.ndarray, value: float, order: int, c: int = 1) -> float:
    """Mean of the perturbed eigenvalues, order n: Kato's trace formula (theory 1.4), exponential in n."""
    T1 = jordan_wielandt(H)
    P, S = reduced_resolvent(A, value, c)
    power = {0: -P, 1: S}
    for i in range(2, order):
        power[i] = power[i - 1] @ S
    total = 0.0
    for ks in itertools.product(range(order), repeat=order):
        if sum(ks) == order - 1:
            product = np.eye(len(T1))
            for i in ks:
                product = product @ T1 @ power[i]
            total += np.trace(product).real
    return (-1) ** order / order * total / c


def published_closed_form(A: np.ndarray, H: np.ndarray, k: int, order: int) -> float:
    """The closed form of the literature (theory 1.4): the one chain w T1 (-S T1)^(n-1) w without renormalisation."""
    U, s, Vh = np.linalg.svd(A)
    w = np.concatenate([U[:, k], Vh[k].conj()]) / np.sqrt(2)
    T1 = jordan_wielandt(H)
    _, S = reduced_resolvent(A, s[k])
    z = T1 @ w
    for _ in range(order - 1):
        z = T1 @ (-S @ z)
    return float((w.conj() @ z).real)


def recursion_dense(A: np.ndarray, H: np.ndarray, k: int, order: int, published_resolvent: bool = False) -> np.ndarray:
    """The recursion of theory 1.4 on the (m + n)-dimensional eigenproblem, with a dense reduced resolvent.

    With `published_resolvent` the vector (u, -v) is left out of S, as in the literature.
    """
    U, s, Vh = np.linalg.svd(A)
    w0 = np.concatenate([U[:, k], Vh[k].conj()]) / np.sqrt(2)
    T1 = jordan_wielandt(H)
    _, S = reduced_resolvent(A, s[k])
    if published_resolvent:
        z = np.concatenate([U[:, k], -Vh[k].conj()]) / np.sqrt(2)
        S = S - np.outer(z, z.conj()) / (-2 * s[k])
    w, lam = [w0], [s[k]]
    for n in range(1, order + 1):
        f = T1 @ w[n - 1]
        lam.append((w0.conj() @ f).real)
        for j in range(1, n):
            f = f - lam[j] * w[n - j]
        w.append(-S @ f)
    return np.array(lam)


def orthogonal(rng: np.random.Generator, n: int, columns: int, complex_: bool = False) -> np.ndarray:
    """Orthonormal columns, uniformly distributed."""
    X = rng.standard_normal((n, columns)) + (1j * rng.standard_normal((n, columns)) if complex_ else 0)
    return np.linalg.qr(X)[0]


def with_spectrum(rng: np.random.Generator, m: int, n: int, values: list[float], complex_: bool = False) -> np.ndarray:
    """An m x n matrix with the given singular values, the rest zero."""
    r = len(values)
    return orthogonal(rng, m, r, complex_) * np.array(values) @ orthogonal(rng, n, r, complex_).conj().T


@st.composite
def certified_cases(draw):
    """Matrices of all kinds: close pairs, badly scaled, rank deficient, real and complex, any shape and k."""
    m, n = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    rank = draw(st.integers(1, min(m, n)))
    kind = draw(st.sampled_from(["separated", "close", "graded"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = np.cumsum(rng.uniform(0.1, 1.0, rank))[::-1].copy()
    if kind == "close" and rank > 1:
        i = int(rng.integers(rank - 1))
        values[i] = values[i + 1] + 10.0 ** rng.uniform(-9, -2)
    if kind == "graded":
        values = values * 10.0 ** -np.linspace(0, rng.uniform(0, 9), rank)
    complex_ = draw(st.booleans())
    A = orthogonal(rng, m, rank, complex_) * np.sort(values)[::-1] @ orthogonal(rng, n, rank, complex_).conj().T
    H = rng.standard_normal((m, n)) + (1j * rng.standard_normal((m, n)) if complex_ else 0)
    return A, H, int(rng.integers(rank)), draw(st.integers(0, 6)), draw(st.floats(0.01, 0.95))
