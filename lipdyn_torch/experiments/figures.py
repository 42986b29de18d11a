"""The look of all figures: sizes for a page of text, colours that colour-blind readers tell apart."""

from __future__ import annotations

from contextlib import AbstractContextManager

from lipdyn_torch.plots import BLACK, BLUE, GREEN, LAYER_STYLES, ORANGE, PURPLE, RC, SKY, VERMILION

__all__ = ["BLACK", "BLUE", "GREEN", "LAYER_STYLES", "ORANGE", "PURPLE", "SKY", "VERMILION", "style"]


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

    # A fixed salt makes the same figure the same SVG, byte for byte.
    return mpl.rc_context({**RC, "svg.hashsalt": "lipdyn", "axes.axisbelow": True})
