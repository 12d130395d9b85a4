"""Bijections, each a ``TransformModule`` of Pyro: it returns value and log-determinant, and inverts at any point.

A batch of events goes in, with a context if the map is conditional; the mapped batch and its log-determinant come out.
One family stands in a file. Read ``base.py`` first, then ``planar.py`` as an example.
"""

from pyro_flows.transforms import masks
from pyro_flows.transforms.affine_coupling import AdditiveCoupling, AffineCoupling
from pyro_flows.transforms.base import Bijection, Bound, Inverse
from pyro_flows.transforms.compose import Compose
from pyro_flows.transforms.fixed import Permutation
from pyro_flows.transforms.image import MultiScale, Squeeze
from pyro_flows.transforms.linear import DiagonalAffine, LowerTriangularAffine, Rescale
from pyro_flows.transforms.lu import Conv1x1, LULinear
from pyro_flows.transforms.norm import ActNorm, BatchNorm
from pyro_flows.transforms.pixels import Dequantize, Logit
from pyro_flows.transforms.planar import Planar
from pyro_flows.transforms.spline_coupling import SplineCoupling
from pyro_flows.transforms.tails import SinhArcsinh

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "BatchNorm",
    "Bijection",
    "Bound",
    "Compose",
    "Conv1x1",
    "Dequantize",
    "DiagonalAffine",
    "Inverse",
    "LULinear",
    "Logit",
    "LowerTriangularAffine",
    "MultiScale",
    "Permutation",
    "Planar",
    "Rescale",
    "SinhArcsinh",
    "SplineCoupling",
    "Squeeze",
    "masks",
]
