"""Figures as SVG elements of a page."""

import io
import re
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def to_svg(figure: "Figure") -> str:
    """Return a figure as an SVG element to be put into a page; equal figures give equal text."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "adaptive", "svg.fonttype": "none"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"^.*?(?=<svg )", "", buffer.getvalue(), flags=re.DOTALL)
