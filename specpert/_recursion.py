r"""The order loop, beside theory 1.4, 1.5 and 1.8.

The eigenvalue problem of T(x) = T0 + x T1 + x^2 T2 + ... is solved order by order for columns w_n = (P_n, Q_n), in the
normalisation w_0^* w(x) = 1. Columns of one cluster are coupled through the effective matrix E(x); columns of
different simple values are not, and E_n is then diagonal. One simple value is a cluster of one.

Legend: A_j (..., m, n) coefficients of the family; P_n (..., m, c), Q_n (..., n, c) vector series; E_n (..., c, c)
effective matrices; lam_n (..., c) their diagonals; <w, w'> = (P^* P' + Q^* Q') / 2; <i, j>_l = <w_i, T_l w_j>.

The resolvent divides what lies along (u, -v) by 2 sigma, and digits are lost where sigma is small. But the blocks keep
P^* P = Q^* Q: from A Q = P E and A^* P = Q E follows E^* X + X E = 0 for their difference X, hence X = 0 as E has
positive eigenvalues. So the Hermitian part of that component, all of it for one value of a real matrix, is known from
the lower orders without a division (`balanced`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from specpert._arrays import Array, Namespace, adjoint, is_numpy, real, widened
from specpert._operators import Operator
from specpert._resolvent import Resolvent

Coefficient = tuple[Callable[[Array], Array], Callable[[Array], Array]]  # products with A_j and with A_j^*


def products(A_j: Any, xp: Namespace) -> Coefficient:
    """Products with A_j and with its adjoint."""
    if isinstance(A_j, Operator):
        return A_j.apply, A_j.apply_adjoint
    adjoint_j = adjoint(A_j, xp)
    if is_numpy(A_j) and A_j.ndim == 2:
        return partial(widened, A_j), partial(widened, adjoint_j)
    return lambda Q: A_j @ Q, lambda P: adjoint_j @ P


class Vectors:
    """The vector series so far, and its products (A_l Q_j, A_l^* P_j), each computed once."""

    def __init__(self, family: Sequence[Coefficient], P0: Array, Q0: Array) -> None:
        self.family = family
        self.P, self.Q = [P0], [Q0]
        self._products: dict[tuple[int, int], tuple[Array, Array]] = {}

    def product(self, l: int, j: int) -> tuple[Array, Array]:
        """T_l w_j as the pair (A_l Q_j, A_l^* P_j)."""
        if (l, j) not in self._products:
            apply, apply_adjoint = self.family[l - 1]
            self._products[l, j] = apply(self.Q[j]), apply_adjoint(self.P[j])
        return self._products[l, j]

    def seen_from_the_first(self, n: int, cluster: bool, xp: Namespace) -> Array:
        """sum_l <w_0, T_l w_{n-l}> = sum_l <T_l w_0, w_{n-l}>, which needs no product with the last vectors."""
        total: Array | float = 0.0
        for l in range(1, min(n, len(self.family)) + 1):
            Aq, Ap = self.product(l, 0)
            inner = block_product(Aq, self.P[n - l], cluster, xp) + block_product(Ap, self.Q[n - l], cluster, xp)
            total = total + inner / 2
        return total

    def right_hand_side(self, n: int) -> tuple[Array, Array]:
        """sum_l T_l w_{n-l}."""
        f, g = self.product(1, n - 1)
        for l in range(2, min(n, len(self.family)) + 1):
            Aq, Ap = self.product(l, n - l)
            f, g = f + Aq, g + Ap
        return f, g


def block_product(x: Array, y: Array, cluster: bool, xp: Namespace) -> Array:
    """x^* y of columns (..., c): the matrix (..., c, c) of a cluster, else its diagonal as a row (..., 1, c)."""
    return adjoint(x, xp) @ y if cluster else xp.vecdot(x, y, axis=-2)[..., None, :]


def spread(x: Array, a: Array, cluster: bool) -> Array:
    """The product x a of columns x (..., c) and of what `block_product` makes."""
    return x @ a if cluster else x * a


def balanced(
    P_n: Array, Q_n: Array, difference: Array | float, P0: Array, Q0: Array, cluster: bool, xp: Namespace
) -> tuple[Array, Array]:
    """The vectors of one order with the component along (u, -v) that keeps P^* P = Q^* Q.

    `difference` is the part of that order of P^* P - Q^* Q which the lower orders make.
    """
    along = (block_product(P0, P_n, cluster, xp) - block_product(Q0, Q_n, cluster, xp)) / 2
    excess = xp.astype(hermitian(along, cluster, xp) + difference / 4, P_n.dtype, copy=False)
    return P_n - spread(P0, excess, cluster), Q_n + spread(Q0, excess, cluster)


def hermitian(a: Array, cluster: bool, xp: Namespace) -> Array:
    """The Hermitian part of what `block_product` makes."""
    return (a + adjoint(a, xp)) / 2 if cluster else real(a, xp)


def extend(
    vectors: Vectors, resolvent: Resolvent, E0: Array, cluster: bool, order: int, xp: Namespace, last: bool = True
) -> list[Array]:
    """Vectors of orders 1..order, appended to `vectors`; effective matrices of orders 0..order (theory 1.4, 1.8).

    The columns are those of one `cluster`, or of values that are not coupled. Without `last` the vectors of the last
    order, which no effective matrix needs, are left out.
    """
    E = [E0]
    P, Q = vectors.P, vectors.Q
    for n in range(1, order + 1):
        E.append(vectors.seen_from_the_first(n, cluster, xp))
        if n == order and not last:
            break
        f, g = vectors.right_hand_side(n)
        for j in range(1, n):
            f = f - spread(P[j], E[n - j], cluster)
            g = g - spread(Q[j], E[n - j], cluster)
        difference: Array | float = 0.0
        for i in range(1, n // 2 + 1):  # the other half are the adjoints
            pair = block_product(P[i], P[n - i], cluster, xp) - block_product(Q[i], Q[n - i], cluster, xp)
            difference = difference + (1 if 2 * i == n else 2) * hermitian(pair, cluster, xp)
        P_n, Q_n = balanced(*resolvent(f, g), difference, P[0], Q[0], cluster, xp)
        P.append(P_n)
        Q.append(Q_n)
    return E


def value_coefficients(vectors: Vectors, E: list[Array], order: int, xp: Namespace) -> list[Array]:
    """lam_0..lam_order of uncoupled columns by the 2n+1 rule (theory 1.5), from vectors of orders up to order // 2."""
    P, Q = vectors.P, vectors.Q

    def inner(i: int, f: Array, g: Array) -> Array:
        return real(xp.vecdot(P[i], f, axis=-2) + xp.vecdot(Q[i], g, axis=-2), xp) / 2

    lam = [real(E_n[..., 0, :], xp) for E_n in E]
    overlap: dict[tuple[int, int], Array] = {}
    for n in range(len(E), order + 1):
        b = (n - 1) // 2
        a = n - 1 - b
        total = xp.zeros_like(lam[0])
        for j in range(b + 1):
            for i in range(min(a, n - 1 - j) + 1):
                l = n - i - j
                if l <= len(vectors.family):
                    total = total + inner(i, *vectors.product(l, j))
                if i > 0 and j > 0:
                    if (i, j) not in overlap:
                        overlap[i, j] = overlap[j, i] = inner(i, P[j], Q[j])
                    total = total - lam[l] * overlap[i, j]
        lam.append(total)
    return lam
