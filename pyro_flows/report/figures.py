"""Figures as parts of a page: SVG whose text and lines take the page's colors, light or dark."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyro

from pyro_flows import plots
from pyro_flows._arrays import Chosen
from pyro_flows._display import STATUS_COLORS
from pyro_flows._fallbacks import Tried, fallback
from pyro_flows._figures import INK, LINE
from pyro_flows._seeding import seeded
from pyro_flows._turns import alone
from pyro_flows.results.labeled import NotThere
from pyro_flows.results.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 3.7  # inches: a phone's 390 pixels, less margins, at 96 to an inch
DPI = 150  # of clouds of points, which are pictures inside of the SVG
NAME, TITLE = "graph", "Model"  # of the graph of the model
CAPTION = "Shaded sites are observed, boxes are plates."
INSTALL = "install graphviz, and its Python package of the same name, to see it"
LARGEST = 200_000  # characters of SVG
PANELS, ROWS, PRIORS, SCALARS = 12, 24, 8, 3
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
    marginals = plots.plot_posterior(posterior, **chosen, width=WIDTH, max_panels=PANELS)
    forest = plots.plot_forest(posterior, **chosen, width=WIDTH, max_rows=ROWS)
    found = [
        _drawn(
            "marginals", "Marginals", "The bar holds the central 89 % of the draws, the dot is their mean.", marginals
        ),
        _drawn(
            "forest",
            "Intervals",
            "The thick line holds the central 50 % of the draws, the thin one 89 %, and the dot is their mean.",
            forest,
        ),
        prior(posterior, chosen),
    ]
    if scalars > 1:
        about = "Bends, funnels and separate clouds show what a Gaussian would miss."
        found.append(
            _drawn("pairs", "Pairs", about, plots.plot_pairs(posterior, **chosen, width=WIDTH, max_scalars=SCALARS))
        )
    if bool((posterior.log_p - posterior.log_q).isfinite().any()):
        about = "Points along the line confirm k-hat. The flatter the line, the heavier the tail."
        found.append(_drawn("weights", "Importance weights", about, plots.plot_weights(posterior, width=WIDTH)))
    if len(posterior.losses):
        about = "The median of the last steps and the dashed line, of new draws, should meet."
        found.append(_drawn("elbo", "Training", about, plots.plot_elbo(posterior, width=WIDTH)))
    return found


def prior(posterior: Record, chosen: Chosen) -> Picture:
    """Draw the prior behind the posterior, or say why it cannot be."""
    name, title, about = "prior", "Prior and posterior", "Where both are alike, the data have taught little."
    try:
        return _drawn(
            name, title, about, plots.plot_prior_posterior(posterior, **chosen, width=WIDTH, max_panels=PRIORS)
        )
    except NotThere as error:
        return Picture(name, title, about, missing=f"Left out. {error}")


def replicates(posterior: Record) -> Picture:
    """Draw the data over replicates of them, or say why they cannot be."""
    name, title = "replicates", "Data and replicates"
    about = "The line is the distribution of the data. It stays in the bands where the model could have made them."
    try:
        return _drawn(name, title, about, plots.plot_predictive(posterior, width=WIDTH))
    except NotThere as error:
        return Picture(name, title, about, missing=f"Left out. {error}")


def _drawn(name: str, title: str, caption: str, figure: Figure) -> Picture:
    return Picture(name, title, caption, svg=inline(figure, name, f"{title}. {caption}"))


def inline(figure: Figure, name: str, label: str) -> str:
    """Return a figure as SVG for a page: text as text, colors as variables, identifiers with the figure's name."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, dpi=DPI, metadata={"Date": None})
    return themed(text.getvalue(), name, label)


def themed(svg: str, name: str, label: str) -> str:
    """Strip what belongs to a file of its own, and take the page's colors."""
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\bid=\"", f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r"href=\"#", f'href="#{name}-', svg)
    for color, variable in VARIABLES.items():
        svg = re.sub(rf"(:\s*){color}\b", rf"\1var({variable})", svg, flags=re.IGNORECASE)
    svg = re.sub(r"(<svg[^>]*?)\s+width=\"[^\"]*\"", r"\1", svg, count=1)
    svg = re.sub(r"(<svg[^>]*?)\s+height=\"[^\"]*\"", r"\1", svg, count=1)
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
    if len(svg) > LARGEST:
        return _without("it has too many sites")
    width = re.search(r'width="(\d+)pt"', svg)
    found = themed(svg, NAME, f"{TITLE}. {CAPTION}")
    style = f' style="max-width: {int(width[1]) * 4 // 3}px"' if width else ""
    return Picture(NAME, TITLE, CAPTION, svg=found.replace("<svg", f"<svg{style}", 1))


def _without(why: str) -> Picture:
    return Picture(NAME, TITLE, CAPTION, missing=f"The graph of the model is left out: {why}.")
