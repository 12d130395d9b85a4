"""Normalizing flows as guides and priors for Pyro models: fitted in one call, judged honestly, handed over to ArviZ."""

from pyro_flows.flows import Flow, nice, planar, realnvp
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
from pyro_flows.log_density import LogDensity
from pyro_flows.guides import AutoFlow, AutoNICE, AutoPlanar, AutoRealNVP
from pyro_flows.posterior import Posterior, load
from pyro_flows.diagnostics import diagnose
