"""How far a value, or a cluster of them, is from the rest of the spectrum of T0 (theory 1.9); ties and zeros.

Legend: s (..., r) singular values, descending; group of indices that belong together; d isolation distance.
"""

from __future__ import annotations

from specpert._arrays import Array, Namespace
from specpert.result import DegenerateSingularValueError, Status, ZeroSingularValueError


def isolation(
    s: Array, indices: tuple[int, ...], zero: bool, cluster: bool, tol: float, xp: Namespace
) -> tuple[Array, Status]:
    """Isolation distances (..., c), or (..., 1) for a cluster, and the status; raises for ties and zeros.

    `zero` says whether zero is in the spectrum of T0 whatever s.
    """
    r = s.shape[-1]
    distances = []
    for group in [indices] if cluster else [(i,) for i in indices]:
        first, last = s[..., min(group)], s[..., max(group)]
        _raise_if_zero(last, s, group, tol, xp)
        near = []
        if min(group) > 0:
            near.append(s[..., min(group) - 1] - first)
        if max(group) < r - 1:
            near.append(last - s[..., max(group) + 1])
        # -sigma is always in the spectrum of T0, zero where A has a null space on either side
        d = xp.where(zero | (s[..., -1] <= tol * s[..., 0]), last, 2 * last)
        for gap in near:
            _raise_if_tied(gap, s, group, tol, xp)
            d = xp.minimum(d, gap)
        distances.append(d)
    gaps = xp.stack(distances, axis=-1)
    close = not cluster and bool(xp.any(gaps < 1e-3 * s[..., :1]))
    return gaps, Status.CLUSTER if cluster else Status.CLOSE_PAIR if close else Status.OK


def _first(mask: Array, xp: Namespace) -> tuple[int, ...] | None:
    """Index of the first matrix of the stack for which the mask holds; None if there is none."""
    if not bool(xp.any(mask)):
        return None
    return tuple(int(i[0]) for i in xp.nonzero(mask)) if mask.ndim else ()


def _raise_if_zero(lowest: Array, s: Array, group: tuple[int, ...], tol: float, xp: Namespace) -> None:
    at = _first(lowest <= tol * s[..., 0], xp)
    if at is None:
        return
    top = float(s[(*at, 0)])
    if top == 0:
        raise ZeroSingularValueError(
            f"expected a singular value above zero, got zeros alone{_where(at)}: it is not differentiable there, "
            "and has one-sided derivatives only; see one_sided_derivatives(A, H, k=...)"
        )
    raise ZeroSingularValueError(
        f"expected a singular value above {tol:.1e} sigma_0, got sigma_{max(group)}{_where(at)} = "
        f"{float(lowest[at]) / top:.3e} sigma_0: it is not differentiable at zero, where it has "
        "one-sided derivatives only; see one_sided_derivatives(A, H, k=...)"
    )


def _raise_if_tied(gap: Array, s: Array, group: tuple[int, ...], tol: float, xp: Namespace) -> None:
    at = _first(gap <= tol * s[..., 0], xp)
    if at is None:
        return
    values = [float(s[(*at, i)]) for i in range(s.shape[-1])]
    low, high = min(group), max(group)
    while low > 0 and values[low - 1] - values[low] <= tol * values[0]:
        low -= 1
    while high < len(values) - 1 and values[high] - values[high + 1] <= tol * values[0]:
        high += 1
    cluster = tuple(range(low, high + 1))
    relative = max(float(gap[at]), 0.0) / values[0]
    what = f"sigma_{group[0]}" if len(group) == 1 else f"the cluster {group}"
    raise DegenerateSingularValueError(
        f"expected {what}{_where(at)} to be isolated by more than {tol:.1e} sigma_0, got a gap of {relative:.3e} "
        f"sigma_0: the values {cluster} are tied and have no derivatives of their own; ask for the cluster with "
        f"sigma_series(A, H, order, k={cluster}) or for the derivative of its mean with on_degenerate='cluster', "
        "either of a dense array",
        k=group[0],
        cluster=cluster,
        gap=relative,
    )


def _where(at: tuple[int, ...]) -> str:
    return f" of matrix {at}" if at else ""
