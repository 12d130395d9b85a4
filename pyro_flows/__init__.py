"""Normalizing flows as guides and priors for Pyro models: fitted in one call, judged honestly, handed over to ArviZ."""

from importlib.metadata import PackageNotFoundError, version

from pyro_flows.builders import nice, planar, realnvp, spline
from pyro_flows.density import fit_density
from pyro_flows.density_fit import DensityFit
from pyro_flows.diagnostics import diagnose
from pyro_flows.fit import fit
from pyro_flows.flows import Flow
from pyro_flows.guides import AutoFlow, AutoNICE, AutoPlanar, AutoRealNVP
from pyro_flows.log_density import LogDensity
from pyro_flows.posterior import Posterior, load
from pyro_flows.transforms import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    BatchNorm,
    Bijection,
    Bound,
    Chain,
    DiagonalAffine,
    Inverse,
    LowerTriangularAffine,
    Permutation,
    Planar,
    Rescale,
    SinhArcsinh,
    SplineCoupling,
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
    "DensityFit",
    "DiagonalAffine",
    "Flow",
    "Inverse",
    "LogDensity",
    "LowerTriangularAffine",
    "Permutation",
    "Planar",
    "Posterior",
    "Rescale",
    "SinhArcsinh",
    "SplineCoupling",
    "Verdict",
    "diagnose",
    "fit",
    "fit_density",
    "load",
    "masks",
    "nice",
    "planar",
    "realnvp",
    "spline",
]
