"""Normalizing flows as guides and priors for Pyro models: fitted in one call, judged honestly, handed over to ArviZ."""

from importlib.metadata import PackageNotFoundError, version

from pyro_flows import datasets, interpolation, objectives, pictures, plots
from pyro_flows._warnings import UnreliableWarning
from pyro_flows.density_estimation.fit_density import fit_density
from pyro_flows.density_estimation.fitted import DensityFit
from pyro_flows.fitting.diagnose import diagnose
from pyro_flows.fitting.fit import fit
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.images import glow, multiscale_realnvp
from pyro_flows.flows.vectors import nice, planar, realnvp, spline
from pyro_flows.guides.autoflow import AutoFlow, AutoNICE, AutoPlanar, AutoRealNVP
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.observations import NothingObservedWarning
from pyro_flows.posterior.posterior import Posterior, load
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
from pyro_flows.verdict.verdict import Verdict

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
    "Conv1x1",
    "DensityFit",
    "Dequantize",
    "DiagonalAffine",
    "Flow",
    "Inverse",
    "LULinear",
    "LogDensity",
    "Logit",
    "LowerTriangularAffine",
    "MultiScale",
    "NothingObservedWarning",
    "Permutation",
    "Planar",
    "Posterior",
    "Rescale",
    "SinhArcsinh",
    "SplineCoupling",
    "Squeeze",
    "UnreliableWarning",
    "Verdict",
    "datasets",
    "diagnose",
    "fit",
    "fit_density",
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
    "realnvp",
    "spline",
]


def __dir__() -> list[str]:
    """List the public names, and not the modules that hold them, which are there as well once they are imported."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
