"""Normalizing flows as guides and priors for Pyro models: fitted in one call, judged honestly, handed over to ArviZ."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pyro_flows import objectives
from pyro_flows._warnings import UnreliableWarning
from pyro_flows.fitting.diagnose import diagnose
from pyro_flows.fitting.fit import fit
from pyro_flows.fitting.mcmc import from_mcmc
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.images import glow, multiscale_realnvp
from pyro_flows.flows.vectors import nice, planar, realnvp, spline
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.guides.named import AutoNICE, AutoPlanar, AutoRealNVP
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.observations import NothingObservedWarning
from pyro_flows.posterior.posterior import Posterior, load
from pyro_flows.transforms import masks
from pyro_flows.transforms.affine_coupling import AdditiveCoupling, AffineCoupling
from pyro_flows.transforms.base import Bijection, Bound, Inverse
from pyro_flows.transforms.chain import Chain
from pyro_flows.transforms.image import MultiScale, Squeeze
from pyro_flows.transforms.linear import DiagonalAffine, LowerTriangularAffine, Rescale
from pyro_flows.transforms.lu import Conv1x1, LULinear
from pyro_flows.transforms.norm import ActNorm, BatchNorm
from pyro_flows.transforms.permutation import Permutation
from pyro_flows.transforms.pixels import Dequantize, Logit
from pyro_flows.transforms.planar import Planar
from pyro_flows.transforms.spline_coupling import SplineCoupling
from pyro_flows.transforms.tails import SinhArcsinh
from pyro_flows.verdict.chains import ChainFigures, Chains
from pyro_flows.verdict.verdict import Verdict

if TYPE_CHECKING:
    from pyro_flows import datasets, interpolation, pictures, plots
    from pyro_flows.calibration.fit_many import fit_many
    from pyro_flows.calibration.result import Calibration
    from pyro_flows.calibration.sbc import sbc
    from pyro_flows.comparison.compare import Comparison, compare
    from pyro_flows.comparison.evidence import Estimate, Evidence
    from pyro_flows.comparison.loo import Loo
    from pyro_flows.comparison.prior import prior_predictive
    from pyro_flows.comparison.sensitivity import Sensitivity
    from pyro_flows.density_estimation.fit_density import fit_density
    from pyro_flows.density_estimation.fitted import DensityFit
    from pyro_flows.priors.fit import prior_from
    from pyro_flows.priors.fitted import FittedPrior

# What a fit does not need is imported when it is asked for: a third of the time that the package takes.
_LATER = {
    "datasets": "datasets",
    "interpolation": "interpolation",
    "pictures": "pictures",
    "plots": "plots",
    "fit_many": "calibration.fit_many",
    "Calibration": "calibration.result",
    "sbc": "calibration.sbc",
    "Comparison": "comparison.compare",
    "compare": "comparison.compare",
    "Estimate": "comparison.evidence",
    "Evidence": "comparison.evidence",
    "Loo": "comparison.loo",
    "prior_predictive": "comparison.prior",
    "Sensitivity": "comparison.sensitivity",
    "fit_density": "density_estimation.fit_density",
    "DensityFit": "density_estimation.fitted",
    "prior_from": "priors.fit",
    "FittedPrior": "priors.fitted",
}

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
    "Calibration",
    "Chain",
    "ChainFigures",
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
    "fit_many",
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
    "sbc",
    "spline",
]


def __getattr__(name: str) -> Any:
    """Import a public name that is asked for the first time."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_LATER[name]}")
    value = module if _LATER[name] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, and not the modules that hold them, which are there as well once they are imported."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
