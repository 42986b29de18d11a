"""When to measure: every so many steps, or as often as a budget allows."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["Schedule"]

#: Times of this many steps are remembered, and so many of either kind are needed before a budget is kept.
_MEMORY, _ENOUGH = 31, 3


class Schedule:
    """Decides at the end of each step whether the next one is measured.

    Parameters
    ----------
    every : int or "auto"
        Measure every so many steps; or, with "auto", so rarely that measuring takes no more than ``budget`` per
        cent of the time of the steps between. The first step after the warm-up is always measured. The times of
        both kinds of step are medians of the latest, and the very first of either kind, which pays for caches and
        compilation, does not count.
    budget : float
        Per cent of the time of the unmeasured steps.
    warmup : int
        Measure none of the first so many steps.
    agree : callable, optional
        With "auto": what all processes make of the period that one of them can afford.

    Examples
    --------
    Measuring costs as much as four steps; one per cent allows it every 400 steps:

    >>> schedule = Schedule("auto", budget=1.0)
    >>> for step in range(12):
    ...     schedule.note(5.0 if schedule.due(step) else 1.0, schedule.due(step))
    ...     schedule.finished(step)
    >>> schedule.period
    400
    """

    def __init__(
        self,
        every: int | str = 1,
        budget: float = 5.0,
        warmup: int = 0,
        agree: Callable[[int], int] = int,
    ) -> None:
        self.auto = every == "auto"
        self.budget = budget
        self.agree = agree
        self.next = warmup
        self.period = 1 if isinstance(every, str) else every
        self._times: dict[bool, deque[float]] = {kind: deque(maxlen=_MEMORY) for kind in (False, True)}
        self._seen = {False: 0, True: 0}

    def due(self, step: int) -> bool:
        """Whether this step is measured."""
        return step == self.next

    def note(self, seconds: float, measured: bool) -> None:
        """How long a step took."""
        self._seen[measured] += 1
        if self._seen[measured] > 1:
            self._times[measured].append(seconds)

    def finished(self, step: int) -> None:
        """Fix the next measured step once this one is over."""
        if step < self.next:
            return
        if self.auto:
            self.period = self.agree(self._affordable())
        self.next = step + self.period

    def _affordable(self) -> int:
        """The shortest period within the budget; alternate until enough is known."""
        plain, measured = self._times[False], self._times[True]
        if min(len(plain), len(measured)) < _ENOUGH:
            return 2
        usual = statistics.median(plain)
        extra = statistics.median(measured) - usual
        return max(1, math.ceil(100.0 * extra / (self.budget * usual))) if usual > 0 else 1

    def state_dict(self) -> dict[str, Any]:
        """What must be known to go on; times belong to a machine and are measured anew."""
        return {"next": self.next, "period": self.period}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another run stopped."""
        self.next = int(state["next"])
        if self.auto:
            self.period = int(state["period"])
