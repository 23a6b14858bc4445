"""Figures as SVG elements of a page."""

import io
import re
from collections.abc import Callable, Iterable
from colorsys import hls_to_rgb
from typing import TYPE_CHECKING

from llamafactory_adaptive.reports.plots import new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Of middling lightness, so that each is seen on a light page and on a dark one.
COLOURS = ("#2f81f7", "#d97706", "#2da44e", "#bf3989", "#8957e5", "#0d9488", "#e5534b", "#9a7b0a")
GREY = "#768390"
_OF_TYPES = (*COLOURS[1:], "#0e7490", "#a16207", "#65a30d", "#c026d3", "#475569")  # none is the blue that losses have
_GOLDEN = 0.618034  # of the hues, so that each is far from those before
_INK = "#010203"  # where the page's own text colour is due: matplotlib knows no such colour
_SIZES = {"wide": (11.2, 3.2), "narrow": (3.6, 3.2)}  # inches, at which letters have the size of the page's


def type_colours(kinds: Iterable[str]) -> dict[str, str]:
    """Give each module type a colour of its own, in any figure; what is beyond the palette is spread over the hues."""
    kinds = list(kinds)
    hues = (number * _GOLDEN % 1.0 for number in range(len(kinds)))
    spread = ("#" + "".join(f"{round(255 * part):02x}" for part in hls_to_rgb(hue, 0.45, 0.6)) for hue in hues)
    return dict(zip(kinds, [*_OF_TYPES, *spread], strict=False))


def to_svg(figure: "Figure", salt: str = "adaptive") -> str:
    """Return a figure as an SVG element to be put into a page; equal figures give equal text.

    Args:
        figure: figure to convert.
        salt: part of all ids; figures of one page that may be hidden from one another have different ones.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return re.sub(r"^.*?(?=<svg )", "", buffer.getvalue(), flags=re.DOTALL)


def in_two_forms(draw: "Callable[[Axes], None]", salt: str) -> str:
    """Draw a figure for wide and for narrow pages, of which the style of the pictures shows one.

    Args:
        draw: draws lines with labels on the axes, and names these.
        salt: part of all ids, of this figure alone on a page.
    """
    from matplotlib.ticker import MaxNLocator

    forms = []
    for form, size in _SIZES.items():
        figure = new_figure(*size)
        axes = figure.add_subplot()
        draw(axes)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # steps are whole
        axes.spines[["top", "right"]].set_visible(False)
        _add_legend(axes, form)
        forms.append(f'<div class="{form}">{_themed(figure, axes, f"{salt} {form}")}</div>')
    return "".join(forms)


def _add_legend(axes: "Axes", form: str) -> None:
    if form == "wide":
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _themed(figure: "Figure", axes: "Axes", salt: str) -> str:
    """Return a figure as SVG without a background, its text and axes in the text colour of the page."""
    figure.patch.set_alpha(0.0)
    axes.patch.set_alpha(0.0)
    axes.tick_params(colors=_INK)
    for spine in axes.spines.values():
        spine.set_edgecolor(_INK)
    legend = axes.get_legend()
    for text in (axes.xaxis.label, axes.yaxis.label, *(legend.get_texts() if legend else ())):
        text.set_color(_INK)
    return to_svg(figure, salt).replace(_INK, "currentColor")
