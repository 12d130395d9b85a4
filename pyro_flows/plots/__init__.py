"""Figures of a posterior. Matplotlib is imported when the first one is drawn; pyplot and its state are not used.

Variables and labels are chosen as in ArviZ, by ``var_names``, ``filter_vars`` and ``coords``. Panels are named by
labels, ``theta[Choate]``, where :meth:`~pyro_flows.Posterior.assign_coords` gave any. A notebook shows a figure that is
the value of a cell; elsewhere, ``figure.savefig("file.png")`` writes it. ``plt.style.use("pyro_flows.style")`` gives
figures of your own the same style.
"""

from pyro_flows.plots.elbo import plot_elbo
from pyro_flows.plots.forest import plot_forest
from pyro_flows.plots.layers import plot_layers
from pyro_flows.plots.marginals import plot_posterior, plot_prior_posterior
from pyro_flows.plots.pairs import plot_pairs
from pyro_flows.plots.predictive import plot_predictive
from pyro_flows.plots.weights import plot_weights

__all__ = [
    "plot_elbo",
    "plot_forest",
    "plot_layers",
    "plot_pairs",
    "plot_posterior",
    "plot_predictive",
    "plot_prior_posterior",
    "plot_weights",
]
