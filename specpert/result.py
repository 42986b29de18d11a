"""What the functions of specpert return beside arrays: statuses with advice, and the exceptions."""

from __future__ import annotations

import enum
from typing import Any


class SpecpertError(ValueError):
    """Base of the errors that specpert raises about the values of its input."""


class DegenerateSingularValueError(SpecpertError):
    """The singular value asked for is tied with a neighbour, so it has no derivative of its own.

    Attributes
    ----------
    k : int
        Index that was asked for (0 is the largest value).
    cluster : tuple of int
        Indices of all singular values tied with it.
    gap : float
        Distance to the nearest other singular value, relative to the largest.
    """

    def __init__(self, message: str, k: int, cluster: tuple[int, ...], gap: float) -> None:
        super().__init__(message)
        self.k = k
        self.cluster = cluster
        self.gap = gap

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.k, self.cluster, self.gap)  # so that it crosses process borders


class ZeroSingularValueError(SpecpertError):
    """The singular value asked for is zero (to rounding), where it is not differentiable."""


class NonFiniteError(SpecpertError):
    """The input holds NaN or infinite entries."""


class ConvergenceError(SpecpertError):
    """An iteration did not reach its tolerance; the message gives the residual and the remedy."""


class DenseSizeError(SpecpertError, MemoryError):
    """A dense derivative would need more memory than the limit allows."""


class Status(enum.Enum):
    """How far a result can be trusted; the value is the advice to the reader.

    Examples
    --------
    >>> from specpert import Status
    >>> Status.OK.value
    'the singular value is isolated; all digits are those of the working precision'
    """

    OK = "the singular value is isolated; all digits are those of the working precision"
    CLOSE_PAIR = (
        "the isolation distance is small: about log10(sigma / gap) digits are lost in each order; "
        "ask for the cluster, sigma_series(..., k=(i, j, ...)), to get them back"
    )
    CLUSTER = "these are derivatives of the mean of a cluster of singular values, each of which has none of its own"
