"""Figures of posteriors, of flows and of images, and walks between points. Matplotlib is imported by the first figure.

Variables and labels are chosen as in ArviZ, by ``var_names``, ``filter_vars`` and ``coords``. Panels are named by
labels, ``theta[Choate]``, where :meth:`~pyro_flows.Posterior.assign_coords` gave any. A notebook shows a figure that is
the value of a cell; elsewhere, ``figure.savefig("file.png")`` writes it. Figures are 7 inches wide, which a notebook
shows without shrinking them. ``plt.style.use("pyro_flows.style")`` gives figures of your own the same style. Pyplot and
its state are not used. Posteriors and flows go in, figures come out. Read ``marginals.py`` first, and ``parts.py`` for
what all figures share.
"""

from pyro_flows.posterior.plots.densities import plot_losses, plot_pit, plot_points, plot_quantiles, plot_spectrum
from pyro_flows.posterior.plots.elbo import plot_elbo
from pyro_flows.posterior.plots.forest import plot_forest
from pyro_flows.posterior.plots.images import plot_images, plot_interpolation, plot_nearest
from pyro_flows.posterior.plots.layers import plot_layers
from pyro_flows.posterior.plots.marginals import plot_posterior, plot_prior_posterior
from pyro_flows.posterior.plots.pairs import plot_pairs
from pyro_flows.posterior.plots.predictive import plot_predictive
from pyro_flows.posterior.plots.walks import (
    blend,
    from_normal,
    inpaint,
    interpolate,
    nearest,
    over_grid,
    scale_spectrum,
    to_normal,
)
from pyro_flows.posterior.plots.weights import plot_weights

__all__ = [
    "blend",
    "from_normal",
    "inpaint",
    "interpolate",
    "nearest",
    "over_grid",
    "plot_elbo",
    "plot_forest",
    "plot_images",
    "plot_interpolation",
    "plot_layers",
    "plot_losses",
    "plot_nearest",
    "plot_pairs",
    "plot_pit",
    "plot_points",
    "plot_posterior",
    "plot_predictive",
    "plot_prior_posterior",
    "plot_quantiles",
    "plot_spectrum",
    "plot_weights",
    "scale_spectrum",
    "to_normal",
]
