"""How results show in a notebook: figures as pictures, verdicts as colored sentences."""

from __future__ import annotations

import html
import io
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATUS_COLORS = {"ok": "#2e7d4f", "corrected": "#b26a00", "refined": "#1f5f99", "unreliable": "#b3261e"}
DPI = 150  # of the picture, so that it is sharp on fine screens too
SHOWN_DPI = 96  # pixels of a page to an inch


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that a notebook shows when it is the value of a cell.

    It is not one of pyplot's: no backend is chosen, and nothing keeps it or shows it a second time. Jupyter asks
    ``_repr_png_`` where pyplot was not imported, and otherwise draws by a function that matplotlib registered.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    vars(figure)["_repr_png_"] = partial(png, figure)
    return figure


def png(figure: Figure) -> tuple[bytes, dict[str, int]]:
    """Return a figure as a PNG file, and the size in pixels in which a page shows it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    width, height = figure.get_size_inches()
    return buffer.getvalue(), {"width": round(SHOWN_DPI * width), "height": round(SHOWN_DPI * height)}


def verdict_html(text: str) -> str:
    """Return a verdict's sentence as HTML, with its first word, the status, in bold and in color."""
    status, colon, rest = text.partition(":")
    color = STATUS_COLORS.get(status, "inherit")
    return f'<b style="color:{color}">{html.escape(status)}</b>{colon}{html.escape(rest)}'
