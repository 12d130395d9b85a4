"""The methods that make a result: their names, what their own draws are called, and the works that describe them."""

from __future__ import annotations

from typing import NamedTuple

TRAINED = "trained flow"
GAUSSIAN = "Gaussian"
GRID = "conditional Laplace grid"
CONDITIONALS = "Gaussian conditionals"
MIXTURE = "mixture"
INDEPENDENT = "independent coordinates"
TABULATED = "tabulated density"  # of a single coordinate
MCMC = "MCMC"
AMORTIZED = "amortized flow"  # trained on simulations, for all data sets of a form
GUIDE = "guide"  # of the caller's own, judged by ``diagnose``


class Method(NamedTuple):
    """What a method is in words, whose its draws are, and the keys of its references."""

    meaning: str
    owner: str
    cites: tuple[str, ...]


METHODS = {
    TRAINED: Method(
        "a normalizing flow, trained on the ELBO",
        "the flow's",
        ("Agrawal2020", "Roeder2017", "Vaitl2024", "Kingma2015"),
    ),
    GAUSSIAN: Method(
        "a multivariate Student t, close to a Gaussian, centered at the best of several starting points",
        "the Gaussian's",
        ("Zhang2022",),
    ),
    GRID: Method(
        "a table of one latent's marginal, and a Gaussian for all others on a grid of its values",
        "the grid's",
        ("Rue2009",),
    ),
    CONDITIONALS: Method(
        "a flow of a few latents, and the exact Gaussian of all others given these", "the conditionals'", ("Rue2009",)
    ),
    MIXTURE: Method("a mixture of Student-t distributions, or of flows, at several modes", "the mixture's", ()),
    INDEPENDENT: Method("a table of the density of each coordinate", "the tables'", ()),
    TABULATED: Method("a table of the density of the only coordinate", "the table's", ()),
    AMORTIZED: Method(
        "a conditional flow for all data sets of a form, trained on the model's simulations",
        "the amortized flow's",
        ("Papamakarios2016", "Radev2022", "Li2024"),
    ),
    MCMC: Method("Markov chains that converged", "the chains'", ()),
    GUIDE: Method("a guide of your own", "the guide's", ()),
}
