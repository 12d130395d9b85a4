"""Figures as parts of a page: SVG whose text and lines take the page's colors, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro

from pyro_flows.inference.record import Record
from pyro_flows.posterior import plots
from pyro_flows.posterior.export.arviz_groups import NotThere
from pyro_flows.support.figures import INK, LINE, STATUS_COLORS
from pyro_flows.support.numbers.arrays import Chosen
from pyro_flows.support.process.fallbacks import Tried, fallback
from pyro_flows.support.process.seeding import seeded
from pyro_flows.support.process.threads import alone

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 3.7  # inches: a phone's 390 pixels, less margins, at 96 to an inch
INSTALL = "install graphviz, and its Python package of the same name, to see it"
TEXTS = {  # title and caption
    "marginals": ("Marginals", "The bar holds the central 89 % of the draws, the dot is their mean."),
    "forest": (
        "Intervals",
        "The thick line holds the central 50 % of the draws, the thin one 89 %, and the dot is their mean.",
    ),
    "prior": ("Prior and posterior", "Where both are alike, the data have taught little."),
    "pairs": ("Pairs", "Bends, funnels and separate clouds show what a Gaussian would miss."),
    "weights": (
        "Importance weights",
        "Points along the line confirm k-hat. The flatter the line, the heavier the tail.",
    ),
    "elbo": ("Training", "The median of the last steps and the dashed line, of new draws, should meet."),
    "replicates": (
        "Data and replicates",
        "The line is the distribution of the data. It stays in the bands where the model could have made them.",
    ),
    "graph": ("Model", "Shaded sites are observed, boxes are plates."),
}
VARIABLES = {
    INK: "--ink",
    LINE: "--line",
    "#ffffff": "--card",
    **{color: f"--{status}" for status, color in STATUS_COLORS.items()},
}


@dataclass(frozen=True)
class Picture:
    """A figure on the page."""

    name: str  # for links and identifiers
    title: str  # its heading
    caption: str  # what is to be seen
    svg: str = ""  # the figure; empty if there is none
    missing: str = ""  # why there is none


def pictures(posterior: Record, chosen: Chosen, *, scalars: int) -> list[Picture]:
    """Draw those figures that this posterior has; ``chosen`` says of which variables, which have so many scalars."""
    found = [
        drawn("marginals", plots.plot_posterior, posterior, **chosen, max_panels=12),
        drawn("forest", plots.plot_forest, posterior, **chosen, max_rows=24),
        drawn("prior", plots.plot_prior_posterior, posterior, **chosen, max_panels=8),
    ]
    if scalars > 1:
        found.append(drawn("pairs", plots.plot_pairs, posterior, **chosen, max_scalars=3))
    if bool((posterior.log_p - posterior.log_q).isfinite().any()):
        found.append(drawn("weights", plots.plot_weights, posterior))
    if len(posterior.losses):
        found.append(drawn("elbo", plots.plot_elbo, posterior))
    return found


def drawn(name: str, draw: Callable[..., Figure], posterior: Record, **options: Any) -> Picture:
    """Draw a figure as SVG for a page, or say why it cannot be drawn."""
    import matplotlib

    title, caption = TEXTS[name]
    text = io.StringIO()
    try:
        figure = draw(posterior, **options, width=WIDTH)
    except NotThere as error:
        return Picture(name, title, caption, missing=f"Left out. {error}")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        # The resolution is that of clouds of points, which are pictures inside of the SVG.
        figure.savefig(text, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    return Picture(name, title, caption, svg=themed(text.getvalue(), name, f"{title}. {caption}"))


def themed(svg: str, name: str, label: str) -> str:
    """Return an SVG for a page: without what belongs to a file of its own, colors as the page's variables, and
    identifiers with the figure's name.
    """
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(\bid=\"|url\(#|href=\"#)", rf"\g<1>{name}-", svg)
    for color, variable in VARIABLES.items():
        svg = re.sub(rf"(:\s*){color}\b", rf"\1var({variable})", svg, flags=re.IGNORECASE)
    for side in ("width", "height"):
        svg = re.sub(rf"(<svg[^>]*?)\s+{side}=\"[^\"]*\"", r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


# the graph of the model, by Pyro and graphviz -------------------------------------------------------------------------


def graph(posterior: Record) -> Picture:
    """Draw the model's sites and plates; the picture says why it is left out, if it is."""
    density = posterior.density
    if density is None:
        return _without("the posterior was loaded without its model")
    try:
        import graphviz
    except ImportError:
        return _without(INSTALL)
    with Tried() as tried:
        with alone(), seeded(0, density.device):
            drawn = pyro.render_model(density.model, density.args, density.kwargs, render_distributions=True)
        svg = drawn.pipe(format="svg").decode()
    if isinstance(tried.error, graphviz.ExecutableNotFound):
        return _without(INSTALL)
    if isinstance(tried.error, NotImplementedError):  # Pyro draws from all priors, and some are improper
        return _without(f"Pyro could not draw it, for {str(tried.error).splitlines()[0]}")
    if tried.error is not None:  # Pyro reads the model in its own way, which may not know all that it does
        return _without(fallback("Pyro could not draw it", tried.error))
    if len(svg) > 200_000:  # characters
        return _without("it has too many sites")
    width = re.search(r'width="(\d+)pt"', svg)
    title, caption = TEXTS["graph"]
    found = themed(svg, "graph", f"{title}. {caption}")
    style = f' style="max-width: {int(width[1]) * 4 // 3}px"' if width else ""
    return Picture("graph", title, caption, svg=found.replace("<svg", f"<svg{style}", 1))


def _without(why: str) -> Picture:
    return Picture("graph", *TEXTS["graph"], missing=f"The graph of the model is left out: {why}.")
