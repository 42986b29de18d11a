"""What an experiment is, and the list of them: name -> points of a sweep, how to run one, how to sum them up."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DATA", "NAMES", "PRESETS", "Claim", "Context", "Experiment", "Point", "Row", "Summary", "Table", "find"]

PRESETS = ("quick", "paper")
DATA = ("digits", "mnist", "cifar10", "cifar100")

Row = dict[str, Any]
#: One point of a sweep: plain values with a unique "id", and "cost", a guess of its share of the work.
Point = dict[str, Any]

CONFIRMED, WITHIN_LIMITS, CONTRADICTED = "confirmed", "confirmed within limits", "contradicted"
NOT_DECIDED = "not decided by this run"


@dataclass(frozen=True)
class Context:
    """Everything a point needs beside itself; plain values, so that it travels to any worker.

    Attributes
    ----------
    preset, data, device : str
    root : str or None
        Folder with data files that are already there.
    seed : int
        Of everything random.
    parameters : dict
        The experiment's numbers for this preset.
    """

    preset: str
    data: str
    root: str | None
    device: str
    seed: int
    parameters: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.parameters[name]


@dataclass(frozen=True)
class Table:
    """A table: raw values, formatted where it is printed."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, what was measured, and the verdict the numbers give."""

    text: str
    measured: str
    verdict: str


@dataclass
class Summary:
    """What is printed and drawn from the rows; ``data`` names what they were made from, if not the data asked for."""

    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: str | None = None


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes
    ----------
    name, title : str
    presets : dict
        Parameters for "quick" and "paper".
    points : callable
        ``context -> list of points``.
    run : callable
        ``(point, context) -> rows``; depends on nothing else, so that a point can be run anywhere and again.
    summarise : callable
        ``(rows, context) -> Summary``; rows carry the id of their point under "point".
    alone : bool
        A point measures time and must not share the machine with another.
    """

    name: str
    title: str
    presets: dict[str, dict[str, Any]]
    points: Callable[[Context], list[Point]]
    run: Callable[[Point, Context], list[Row]]
    summarise: Callable[[list[Row], Context], Summary]
    alone: bool = False


_MODULES = {
    "jacobian": "matrices",
    "hessian": "matrices",
    "hessian-errors": "matrix_errors",
    "validation": "validation",
    "near-convergence": "convergence",
    "trajectories": "sampling",
    "batch-size": "sampling",
    "noisy-gradient": "noisy_gradient",
    "label-noise": "label_noise",
    "initialisation": "initialisation",
    "timing": "timing",
}
NAMES = tuple(_MODULES)


def find(name: str) -> Experiment:
    """The experiment of that name.

    Examples
    --------
    >>> find("jacobian").title
    'First derivatives of singular values'
    """
    if name not in _MODULES:
        raise ValueError(f"expected an experiment of {', '.join(NAMES)} or all, got {name!r}")
    module = importlib.import_module(f"lipdyn_torch.experiments.{_MODULES[name]}")
    return next(e for e in module.EXPERIMENTS if e.name == name)
