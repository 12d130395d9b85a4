"""Flows that cost next to nothing, for mixtures of many: affine images of a Student-t."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import Component, FlowMixture
from pyro_flows.flows.recipe import build, of_mixtures
from pyro_flows.transforms import LowerTriangularAffine


@of_mixtures
def location_scale(dim: int, *, base: str = "student_t", df: float = 15.0) -> Flow:
    """Return an affine image of the base, :math:`z = m + L x`, at the identity; both ways cost O(D^2) a point."""
    return build([LowerTriangularAffine(dim)], base, df, builder="location_scale", dim=dim)


@torch.no_grad()
def student_mixture(loc: Tensor, scale_tril: Tensor, log_weights: Sequence[float], *, df: float) -> FlowMixture:
    r"""Return the mixture of K products of Student-t distributions, each moved by :math:`m_k + L_k x`.

    Args:
        loc: m (K, D).
        scale_tril: L (K, D, D), lower triangular with positive diagonals.
        log_weights: K of them, up to a constant.
        df: degrees of freedom of all.

    >>> import torch
    >>> from pyro_flows.flows.parts import student_mixture
    >>> pair = student_mixture(torch.tensor([[-3.0], [3.0]]), torch.ones(2, 1, 1), [0.0, 0.0], df=15.0)
    >>> z, log_q = pair.draw(5)
    >>> bool(torch.allclose(pair.log_prob(z), log_q))
    True
    """
    flows = []
    for place, scale in zip(loc, scale_tril, strict=True):
        flow = location_scale(loc.shape[1], df=df).to(loc)
        affine = flow.bijection.layers[0]  # type: ignore[index, union-attr]
        affine.loc.copy_(place)
        affine.scale_tril.copy_(scale)
        flows.append(flow)
    return FlowMixture(flows, [Component(number, float(weight)) for number, weight in enumerate(log_weights)])
