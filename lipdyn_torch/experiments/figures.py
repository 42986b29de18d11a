"""The look of all figures: sizes for a page of text, colours that colour-blind readers tell apart."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

__all__ = ["BLACK", "BLUE", "GREEN", "LINES", "ORANGE", "PURPLE", "SKY", "VERMILION", "style"]

# Okabe and Ito's palette, without yellow, which is too pale for lines.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"),
)
#: Colour and dash of the first, second ... curve: told apart without colour as well.
LINES: list[tuple[str, Any]] = [
    *[(BLUE, "-"), (VERMILION, "--"), (GREEN, "-."), (PURPLE, (0, (5, 1, 1, 1, 1, 1))), (SKY, (0, (1, 1)))],
    *[(ORANGE, "-"), (BLACK, "--")],
]
_SETTINGS: dict[Any, Any] = {
    **{"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7},
    **{"xtick.labelsize": 7, "ytick.labelsize": 7, "lines.linewidth": 1.2, "axes.linewidth": 0.6},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.axisbelow": True},
    **{"svg.hashsalt": "lipdyn"},  # the same figure is then the same SVG, byte for byte
}


def style() -> AbstractContextManager[None]:
    """Matplotlib settings for a ``with`` block.

    Examples
    --------
    >>> import matplotlib as mpl
    >>> with style():
    ...     mpl.rcParams["font.size"]
    8.0
    """
    import matplotlib as mpl

    return mpl.rc_context(_SETTINGS)
