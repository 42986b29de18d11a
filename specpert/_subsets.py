r"""Mixed derivatives and dense tensors by the recursion over subsets of directions (theory 1.6), with the 2n+1 rule.

For S a set of directions: lam_S = D^|S| sigma along them, w_S = (P_S, Q_S) the mixed derivative of the vectors.
Vectors of subsets up to half the size give lam of the whole set:
    lam_S = sum <w_I, T_i w_J> over I + {i} + J = S, |I| = a, |J| = b  -  sum lam_B <w_I, w_J> over I + J + B = S,
with a + b = |S| - 1, b = floor(a or a - 1), I and J not empty and |I| <= a, |J| <= b in the second sum.

Legend: N number of directions; subsets are bit masks; B = m n (or 2 m n for complex A) basis directions of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations

from specpert._arrays import Array, Namespace, adjoint, eye, is_complex, real
from specpert._recursion import Coefficient, balanced, block_product, hermitian
from specpert._resolvent import Resolvent


def mixed_derivative(
    directions: Sequence[Coefficient], resolvent: Resolvent, P0: Array, Q0: Array, xp: Namespace
) -> Array:
    """D^N sigma[H_1, ..., H_N] for each column, shape (..., c)."""
    N = len(directions)
    w = {0: (P0, Q0)}
    lam: dict[int, Array] = {}
    products: dict[tuple[int, int], tuple[Array, Array]] = {}

    def T(i: int, S: int) -> tuple[Array, Array]:
        if (i, S) not in products:
            apply, apply_adjoint = directions[i]
            P, Q = w[S]
            products[i, S] = apply(Q), apply_adjoint(P)
        return products[i, S]

    def inner(S: int, pair: tuple[Array, Array]) -> Array:
        P, Q = w[S]
        return real(xp.vecdot(P, pair[0], axis=-2) + xp.vecdot(Q, pair[1], axis=-2), xp) / 2

    @cache
    def overlap(I: int, J: int) -> Array:
        return inner(I, w[J]) if I <= J else overlap(J, I)

    @cache
    def overlaps(R: int, a: int, b: int) -> Array | float:
        """Sum of <w_I, w_J> over I + J = R with |I| <= a, |J| <= b."""
        parts = ((R & ~J, J) for J in _proper_parts(R) if R.bit_count() - a <= J.bit_count() <= b)
        return sum((overlap(I, J) for I, J in parts), start=0.0)

    for size in range(1, N // 2 + 1):
        for S in _subsets(range(N), size):
            z = [T(i, S & ~(1 << i)) for i in _members(S)]
            f, g = sum(p for p, _ in z), sum(q for _, q in z)
            lam[S] = inner(0, (f, g))
            for B in _proper_parts(S):
                P, Q = w[S & ~B]
                f, g = f - lam[B][..., None, :] * P, g - lam[B][..., None, :] * Q
            w[S] = balanced(*resolvent(f, g), _difference(w, S, False, xp), P0, Q0, False, xp)
    for size in range(N // 2 + 1, N + 1):
        b = (size - 1) // 2
        a = size - 1 - b
        for S in _subsets(range(N), size):
            total = 0
            for i in _members(S):
                rest = S & ~(1 << i)
                for J in _subsets(_members(rest), b):
                    total = total + inner(rest & ~J, T(i, J))
            for B in _proper_parts(S):
                total = total - lam[B] * overlaps(S & ~B, a, b)
            lam[S] = total
    return lam[(1 << N) - 1]


def mixed_cluster_mean(
    directions: Sequence[Coefficient], resolvent: Resolvent, P0: Array, Q0: Array, xp: Namespace
) -> Array:
    """D^N of the mean of a cluster, shape (...): the block form of the subset recursion (theory 1.8)."""
    N, c = len(directions), P0.shape[-1]
    w = {0: (P0, Q0)}
    E: dict[int, Array] = {}
    for size in range(1, N + 1):
        for S in _subsets(range(N), size):
            f = g = 0
            for i in _members(S):
                apply, apply_adjoint = directions[i]
                P, Q = w[S & ~(1 << i)]
                f, g = f + apply(Q), g + apply_adjoint(P)
            E[S] = (adjoint(P0, xp) @ f + adjoint(Q0, xp) @ g) / 2
            if size == N:
                break
            for B in _proper_parts(S):
                P, Q = w[S & ~B]
                f, g = f - P @ E[B], g - Q @ E[B]
            w[S] = balanced(*resolvent(f, g), _difference(w, S, True, xp), P0, Q0, True, xp)
    return xp.sum(real(xp.linalg.diagonal(E[(1 << N) - 1]), xp), axis=-1) / c


def _difference(w: dict[int, tuple[Array, Array]], S: int, cluster: bool, xp: Namespace) -> Array | float:
    """What the parts of S make of the mixed derivative of P^* P - Q^* Q."""
    total: Array | float = 0.0
    for B in _proper_parts(S):
        (P, Q), (R, T) = w[B], w[S & ~B]
        total = total + hermitian(block_product(P, R, cluster, xp) - block_product(Q, T, cluster, xp), cluster, xp)
    return total


def _members(S: int) -> list[int]:
    return [i for i in range(S.bit_length()) if S >> i & 1]


def _subsets(items: Sequence[int], size: int) -> Iterator[int]:
    for chosen in combinations(items, size):
        yield sum(1 << i for i in chosen)


def _proper_parts(S: int) -> Iterator[int]:
    """Subsets of S other than itself and the empty one."""
    B = (S - 1) & S
    while B:
        yield B
        B = (B - 1) & S


def dense_tensor(order: int, resolvent: Resolvent, u: Array, v: Array, xp: Namespace) -> Array:
    """D^order sigma on all basis directions, shape (B,) * order, from vector tensors of orders to order / 2.

    The basis is E_pq in row-major order of (p, q); for complex u, v of (p, q, part) with directions E_pq and i E_pq.
    """
    b = (order - 1) // 2
    a = order - 1 - b
    w = [(u, v)]
    lam: list[Array] = [xp.zeros(())]
    for j in range(1, order // 2 + 1):
        f, g = _all_directions(*w[j - 1], xp)  # the new direction comes first
        f, g = (_symmetrised(z, [1, j - 1], xp) for z in (f, g))
        lam.append(_pair(f, g, u, v, xp))
        for i in range(1, j):
            P, Q = w[j - i]
            f = f - _symmetrised(_outer(lam[i], P, xp), [i, j - i], xp)
            g = g - _symmetrised(_outer(lam[i], Q, xp), [i, j - i], xp)
        difference: Array | float = 0.0
        for i in range(1, j):
            overlap = _gram(w[i], w[j - i], xp, sign=-1.0) * 2
            difference = difference + _symmetrised(overlap, [i, j - i], xp)
        w.append(_solve(resolvent, f, g, difference, u, v, xp))
    for size in range(order // 2 + 1, order + 1):
        b = (size - 1) // 2
        a = size - 1 - b
        total = _symmetrised(_pairing(w[a], w[b], xp), [a, 1, b], xp)
        for i in range(1, a + 1):
            for j in range(1, min(b, size - 1 - i) + 1):
                l = size - i - j
                total = total - _symmetrised(_outer(lam[l], _gram(w[i], w[j], xp), xp), [l, i, j], xp)
        lam.append(total)
    return lam[order]


def _all_directions(P: Array, Q: Array, xp: Namespace) -> tuple[Array, Array]:
    """T_b w for every basis direction b, on a new first axis: A_b Q = c Q[q] e_p and A_b^* P = conj(c) P[p] e_q."""
    m, n = P.shape[-1], Q.shape[-1]
    lead = (1,) * (P.ndim - 1)
    f = xp.reshape(eye(m, P, xp), (m, 1, *lead, m)) * xp.moveaxis(Q, -1, 0)[None, ..., None]
    g = xp.reshape(eye(n, Q, xp), (1, n, *lead, n)) * xp.moveaxis(P, -1, 0)[:, None, ..., None]
    if is_complex(P, xp):
        f, g = xp.stack([f, 1j * f], axis=2), xp.stack([g, -1j * g], axis=2)
    B = m * n * (2 if is_complex(P, xp) else 1)
    return xp.reshape(f, (B, *P.shape[:-1], m)), xp.reshape(g, (B, *Q.shape[:-1], n))


def _symmetrised(z: Array, sizes: Sequence[int], xp: Namespace) -> Array:
    """Sum over the ways to deal the positions 0..j-1 to consecutive groups of axes of the given sizes.

    z is symmetric within each group; axes past the j-th (the vector's) stay last.
    """
    j = sum(sizes)
    total = None
    for order in _deals(list(range(j)), sizes):
        axes = [order.index(i) for i in range(j)] + list(range(j, z.ndim))
        term = xp.permute_dims(z, tuple(axes))
        total = term if total is None else total + term
    return total


def _deals(positions: list[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    if not sizes:
        yield []
        return
    for chosen in combinations(positions, sizes[0]):
        rest = [i for i in positions if i not in chosen]
        for tail in _deals(rest, sizes[1:]):
            yield [*chosen, *tail]


def _outer(x: Array, y: Array, xp: Namespace) -> Array:
    return xp.reshape(x, (*x.shape, *(1,) * y.ndim)) * y


def _pair(f: Array, g: Array, u: Array, v: Array, xp: Namespace) -> Array:
    """<w_0, (f, g)> over the last axes."""
    return real(xp.vecdot(u, f, axis=-1) + xp.vecdot(v, g, axis=-1), xp) / 2


def _flat(x: Array, xp: Namespace) -> Array:
    return xp.reshape(x, (-1, x.shape[-1]))


def _solve(
    resolvent: Resolvent, f: Array, g: Array, difference: Array | float, u: Array, v: Array, xp: Namespace
) -> tuple[Array, Array]:
    x, y = resolvent(xp.matrix_transpose(_flat(f, xp)), xp.matrix_transpose(_flat(g, xp)))
    if not isinstance(difference, float):
        difference = xp.reshape(difference, (1, -1))
    x, y = balanced(x, y, difference, u[:, None], v[:, None], False, xp)
    return xp.reshape(xp.matrix_transpose(x), f.shape), xp.reshape(xp.matrix_transpose(y), g.shape)


def _gram(w: tuple[Array, Array], z: tuple[Array, Array], xp: Namespace, sign: float = 1.0) -> Array:
    """<w_I, z_J> for all I and J: one matrix product each side; the right vectors' part with the sign."""
    total = 0
    for x, y, factor in zip(w, z, (1.0, sign), strict=True):
        xf, yf = _flat(x, xp), _flat(y, xp)
        total = total + factor * real((xp.conj(xf) if is_complex(xf, xp) else xf) @ xp.matrix_transpose(yf), xp)
    return xp.reshape(total / 2, (*w[0].shape[:-1], *z[0].shape[:-1]))


def _pairing(w: tuple[Array, Array], z: tuple[Array, Array], xp: Namespace) -> Array:
    """<w_I, T_b z_J> for all I, b, J: Re(c (conj(P_I[p]) Q_J[q] + Q_I[q] conj(P_J[p]))) / 2."""
    (PI, QI), (PJ, QJ) = [[_flat(x, xp) for x in pair] for pair in (w, z)]
    if is_complex(PI, xp):
        PI, PJ = xp.conj(PI), xp.conj(PJ)
    PJt, QJt = xp.matrix_transpose(PJ), xp.matrix_transpose(QJ)
    total = (PI[:, :, None, None] * QJt[None, None, :, :] + QI[:, None, :, None] * PJt[None, :, None, :]) / 2
    if is_complex(total, xp):
        total = xp.stack([xp.real(total), -xp.imag(total)], axis=3)
    B = PI.shape[1] * QI.shape[1] * (2 if is_complex(PI, xp) else 1)
    return xp.reshape(total, (*w[0].shape[:-1], B, *z[0].shape[:-1]))
