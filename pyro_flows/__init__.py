"""Normalizing flows as guides and priors for Pyro models: fitted in one call, judged honestly, handed over to ArviZ."""

from importlib.metadata import PackageNotFoundError, version

from pyro_flows import datasets, interpolation, objectives, pictures, plots
from pyro_flows.alarms import UnreliableWarning
from pyro_flows.builders import nice, planar, realnvp, spline
from pyro_flows.mcmc import Chains, ChainVerdict, from_mcmc
from pyro_flows.comparison.compare import Comparison, compare
from pyro_flows.comparison.evidence import Estimate, Evidence
from pyro_flows.comparison.loo import Loo
from pyro_flows.comparison.prior import prior_predictive
from pyro_flows.comparison.sensitivity import Sensitivity
from pyro_flows.density import fit_density
from pyro_flows.density_fit import DensityFit
from pyro_flows.diagnostics import diagnose
from pyro_flows.fit import fit
from pyro_flows.flows import Flow
from pyro_flows.guides import AutoFlow, AutoNICE, AutoPlanar, AutoRealNVP
from pyro_flows.image_builders import glow, multiscale_realnvp
from pyro_flows.log_density import LogDensity
from pyro_flows.observations import NothingObservedWarning
from pyro_flows.posterior import Posterior, load
from pyro_flows.priors.fit import prior_from
from pyro_flows.priors.fitted import FittedPrior
from pyro_flows.transforms import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    BatchNorm,
    Bijection,
    Bound,
    Chain,
    Conv1x1,
    Dequantize,
    DiagonalAffine,
    Inverse,
    Logit,
    LowerTriangularAffine,
    LULinear,
    MultiScale,
    Permutation,
    Planar,
    Rescale,
    SinhArcsinh,
    SplineCoupling,
    Squeeze,
    masks,
)
from pyro_flows.verdict import Verdict

try:
    __version__ = version("pyro-flows")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "AutoFlow",
    "AutoNICE",
    "AutoPlanar",
    "AutoRealNVP",
    "BatchNorm",
    "Bijection",
    "Bound",
    "Chain",
    "ChainVerdict",
    "Chains",
    "Comparison",
    "Conv1x1",
    "DensityFit",
    "Dequantize",
    "DiagonalAffine",
    "Estimate",
    "Evidence",
    "FittedPrior",
    "Flow",
    "Inverse",
    "LULinear",
    "LogDensity",
    "Logit",
    "Loo",
    "LowerTriangularAffine",
    "MultiScale",
    "NothingObservedWarning",
    "Permutation",
    "Planar",
    "Posterior",
    "Rescale",
    "Sensitivity",
    "SinhArcsinh",
    "SplineCoupling",
    "Squeeze",
    "UnreliableWarning",
    "Verdict",
    "compare",
    "datasets",
    "diagnose",
    "fit",
    "fit_density",
    "from_mcmc",
    "glow",
    "interpolation",
    "load",
    "masks",
    "multiscale_realnvp",
    "nice",
    "objectives",
    "pictures",
    "planar",
    "plots",
    "prior_from",
    "prior_predictive",
    "realnvp",
    "spline",
]


def __dir__() -> list[str]:
    """List the public names, and not the modules that hold them, which are there as well once they are imported."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
