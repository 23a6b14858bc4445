"""Figures as SVG elements of a page."""

import io
import re
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Drawn where the page's own text colour is due: matplotlib knows no such colour.
_INK = "#010203"


def to_svg(figure: "Figure", salt: str = "adaptive") -> str:
    """Return a figure as an SVG element to be put into a page; equal figures give equal text.

    Args:
        figure: figure to convert.
        salt: part of all ids; figures of one page that may be hidden from one another have different ones.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"^.*?(?=<svg )", "", buffer.getvalue(), flags=re.DOTALL)


def to_themed_svg(figure: "Figure", salt: str) -> str:
    """Return a figure as an SVG element without a background, its text and axes in the text colour of the page."""
    figure.patch.set_alpha(0.0)
    for axes in figure.axes:
        axes.patch.set_alpha(0.0)
        axes.tick_params(colors=_INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(_INK)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(_INK)
        for text in axes.get_legend().get_texts() if axes.get_legend() else ():
            text.set_color(_INK)
    return to_svg(figure, salt).replace(_INK, "currentColor")
