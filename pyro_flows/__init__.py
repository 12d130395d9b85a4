"""Normalizing flows as guides and priors for Pyro models: fitted in one call, judged honestly, handed over to ArviZ."""

from importlib.metadata import PackageNotFoundError, version

from pyro_flows.density import DensityFit, fit_density
from pyro_flows.diagnostics import diagnose
from pyro_flows.fit import fit
from pyro_flows.flows import Flow, nice, planar, realnvp
from pyro_flows.guides import AutoFlow, AutoNICE, AutoPlanar, AutoRealNVP
from pyro_flows.log_density import LogDensity
from pyro_flows.posterior import Posterior, load
from pyro_flows.transforms import (
    AdditiveCoupling,
    AffineCoupling,
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
    masks,
)
from pyro_flows.verdict import Verdict

try:
    __version__ = version("pyro-flows")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "AutoFlow",
    "AutoNICE",
    "AutoPlanar",
    "AutoRealNVP",
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
    "Verdict",
    "diagnose",
    "fit",
    "fit_density",
    "load",
    "masks",
    "nice",
    "planar",
    "realnvp",
]
