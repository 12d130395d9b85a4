"""Normalizing flows as guides and priors for Pyro models: fitted in one call, judged honestly, handed over to ArviZ."""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from pyro_flows import transforms
from pyro_flows.fitting.diagnose import diagnose, from_mcmc
from pyro_flows.fitting.fit import fit
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.images import glow, multiscale_realnvp
from pyro_flows.flows.signals import waveglow
from pyro_flows.flows.vectors import nice, planar, realnvp, spline
from pyro_flows.guides.autoflow import AutoFlow, AutoNICE, AutoPlanar, AutoRealNVP
from pyro_flows.inference.training import objectives
from pyro_flows.inference.verdict.chains import McmcDiagnostics, McmcDraws
from pyro_flows.inference.verdict.verdict import Verdict
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.observations import NothingObservedWarning
from pyro_flows.posterior import plots
from pyro_flows.posterior.posterior import Posterior, load
from pyro_flows.support import datasets
from pyro_flows.support.process.warnings import UnreliableWarning

if TYPE_CHECKING:
    from pyro_flows.amortization.amortize import amortize
    from pyro_flows.amortization.amortized import Amortized
    from pyro_flows.calibration.fit_many import fit_many
    from pyro_flows.calibration.result import Calibration
    from pyro_flows.calibration.sbc import sbc
    from pyro_flows.densities.estimator import DensityEstimator
    from pyro_flows.densities.fit_density import fit_density
    from pyro_flows.densities.fitted import DensityFit
    from pyro_flows.guides.hierarchical import AutoHierarchicalFlow
    from pyro_flows.guides.messenger import AutoFlowMessenger
    from pyro_flows.guides.svi.path_elbo import PathELBO
    from pyro_flows.model.versions import show_versions
    from pyro_flows.posterior.comparison.compare import Comparison, compare
    from pyro_flows.posterior.comparison.evidence import Estimate, Evidence
    from pyro_flows.posterior.comparison.loo import Loo
    from pyro_flows.posterior.comparison.prior import prior_predictive
    from pyro_flows.posterior.comparison.sensitivity import Sensitivity
    from pyro_flows.priors.fitted import FittedPrior, prior_from

# What a fit does not need is imported when it is asked for: a third of the time that the package takes.
_LATER = {
    "Amortized": "amortization.amortized",
    "amortize": "amortization.amortize",
    "fit_many": "calibration.fit_many",
    "AutoFlowMessenger": "guides.messenger",
    "AutoHierarchicalFlow": "guides.hierarchical",
    "Calibration": "calibration.result",
    "sbc": "calibration.sbc",
    "Comparison": "posterior.comparison.compare",
    "compare": "posterior.comparison.compare",
    "Estimate": "posterior.comparison.evidence",
    "Evidence": "posterior.comparison.evidence",
    "Loo": "posterior.comparison.loo",
    "prior_predictive": "posterior.comparison.prior",
    "Sensitivity": "posterior.comparison.sensitivity",
    "fit_density": "densities.fit_density",
    "DensityEstimator": "densities.estimator",
    "DensityFit": "densities.fitted",
    "prior_from": "priors.fitted",
    "FittedPrior": "priors.fitted",
    "PathELBO": "guides.svi.path_elbo",
    "show_versions": "model.versions",
}
_MOVED = {"Chain": "transforms.Compose", "Chains": "McmcDraws", "ChainFigures": "McmcDiagnostics"}
_MOVED |= {"interpolation": "plots", "pictures": "plots"}

# Public modules keep their short names, whatever folder they stand in: ``from pyro_flows.plots import plot_pairs``.
sys.modules |= {f"{__name__}.{module.__name__.rpartition('.')[2]}": module for module in (datasets, objectives, plots)}

try:
    __version__ = version("pyro-flows")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "Amortized",
    "AutoFlow",
    "AutoFlowMessenger",
    "AutoHierarchicalFlow",
    "AutoNICE",
    "AutoPlanar",
    "AutoRealNVP",
    "Calibration",
    "Comparison",
    "DensityEstimator",
    "DensityFit",
    "Estimate",
    "Evidence",
    "FittedPrior",
    "Flow",
    "LogDensity",
    "Loo",
    "McmcDiagnostics",
    "McmcDraws",
    "NothingObservedWarning",
    "PathELBO",
    "Posterior",
    "Sensitivity",
    "UnreliableWarning",
    "Verdict",
    "amortize",
    "compare",
    "datasets",
    "diagnose",
    "fit",
    "fit_density",
    "fit_many",
    "from_mcmc",
    "glow",
    "load",
    "multiscale_realnvp",
    "nice",
    "objectives",
    "planar",
    "plots",
    "prior_from",
    "prior_predictive",
    "realnvp",
    "sbc",
    "show_versions",
    "spline",
    "transforms",
    "waveglow",
]


def __getattr__(name: str) -> object:
    """Import a public name that is asked for the first time."""
    if name not in _LATER:
        moved = _MOVED.get(name) or (f"transforms.{name}" if name in transforms.__all__ else None)
        where = f"; it is pf.{moved} now" if moved else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{where}")
    module = import_module(f"{__name__}.{_LATER[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, and not the modules that hold them, which are there as well once they are imported."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
