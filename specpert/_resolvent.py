"""The one seam: minus the reduced resolvent of the Jordan-Wielandt matrix T0 = [[0, A], [A^*, 0]].

A resolvent is a function (f, g) -> (x, y) on columns f (..., m, c), g (..., n, c). Column j is solved with its own
eigenvalue e_j on the complement of the eigenvectors (u_i, v_i), i in the excluded set of that column (theory 1.4, 1.8).
The vectors (u_i, -v_i) stay in: leaving them out is the mistake of the published formula.

Legend: U (..., m, r), s (..., r), V (..., n, r) thin SVD; e (..., c) eigenvalues; excluded (r, c) boolean;
al = U^* f, be = V^* g (..., r, c).
"""

from __future__ import annotations

from collections.abc import Callable

from specpert._arrays import Array, Namespace, adjoint

Resolvent = Callable[[Array, Array], tuple[Array, Array]]


def from_thin_svd(U: Array, s: Array, V: Array, e: Array, excluded: Array, xp: Namespace) -> Resolvent:
    """Reduced resolvent from a thin SVD: two products with U and two with V for each call."""
    m, n, r = U.shape[-2], V.shape[-2], U.shape[-1]
    si, ej = s[..., :, None], e[..., None, :]
    denominator = xp.where(excluded, 2 * (ej + si), (ej - si) * (ej + si))
    # an excluded i keeps only (u_i, -v_i): x_i = (al_i - be_i) / (2 (s_i + e_j)) = -y_i
    direct = xp.where(excluded, 1 / denominator, ej / denominator)
    cross = xp.where(excluded, -1 / denominator, si / denominator)
    direct, cross = xp.astype(direct, U.dtype), xp.astype(cross, U.dtype)
    Ua, Va = adjoint(U, xp), adjoint(V, xp)

    def resolvent(f: Array, g: Array) -> tuple[Array, Array]:
        al, be = Ua @ f, Va @ g
        x, y = U @ (direct * al + cross * be), V @ (cross * al + direct * be)
        # The residuals live in the null spaces of A^* and A, which a thin SVD leaves out.
        if m > r:
            x = x + (f - U @ al) / ej
        if n > r:
            y = y + (g - V @ be) / ej
        return x, y

    return resolvent
