"""The graph of a model, by Pyro and graphviz."""

from __future__ import annotations

import re

import pyro

from pyro_flows._fallbacks import fallback
from pyro_flows._seeding import seeded
from pyro_flows._turns import alone
from pyro_flows.report.figures import Picture, themed
from pyro_flows.results.record import Record

NAME, TITLE = "graph", "Model"
CAPTION = "Shaded sites are observed, boxes are plates."
INSTALL = "install graphviz, and its Python package of the same name, to see it"
LARGEST = 200_000  # characters of SVG


def graph(posterior: Record) -> Picture:
    """Draw the model's sites and plates; the picture says why it is left out, if it is."""
    density = posterior.density
    if density is None:
        return _without("the posterior was loaded without its model")
    try:
        import graphviz
    except ImportError:
        return _without(INSTALL)
    try:
        with alone(), seeded(0, density.device):
            drawn = pyro.render_model(density.model, density.args, density.kwargs, render_distributions=True)
        svg = drawn.pipe(format="svg").decode()
    except graphviz.ExecutableNotFound:
        return _without(INSTALL)
    except NotImplementedError as error:  # Pyro draws from all priors, and some are improper
        return _without(f"Pyro could not draw it, for {str(error).splitlines()[0]}")
    except Exception as error:  # Pyro reads the model in its own way, which may not know all that it does
        return _without(fallback("Pyro could not draw it", error))
    if len(svg) > LARGEST:
        return _without("it has too many sites")
    width = re.search(r'width="(\d+)pt"', svg)
    found = themed(svg, NAME, f"{TITLE}. {CAPTION}")
    style = f' style="max-width: {int(width[1]) * 4 // 3}px"' if width else ""
    return Picture(NAME, TITLE, CAPTION, svg=found.replace("<svg", f"<svg{style}", 1))


def _without(why: str) -> Picture:
    return Picture(NAME, TITLE, CAPTION, missing=f"The graph of the model is left out: {why}.")
