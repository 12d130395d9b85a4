"""A flow of a few held coordinates, all others about a normal distribution that depends on these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.parts import Base, knots
from pyro_flows.flows.recipe import build, of_mixtures, start_at, with_affine
from pyro_flows.flows.vectors import realnvp
from pyro_flows.flows.vectors import spline as splines
from pyro_flows.transforms import Compose, DiagonalAffine
from pyro_flows.transforms.nested import Nested
from pyro_flows.transforms.splines import MarginalSpline

BINS, BOUND = 64, 6.5  # of the spline from a normal base to a Student-t distribution
FAR, FINE = 9.0, 8001  # how far that is tabulated, as powers of e, and by how many values
NORMAL = Base(
    lambda below, above: torch.where(below < 0.5, torch.special.ndtri(below), -torch.special.ndtri(above)),
    lambda x: -0.5 * x.square() - 0.9189385332046727,
)


@of_mixtures
def nested(
    dim: int, *, held: Sequence[int] = (0,), terms: int = 1, entries: int = 1, layers: int = 4, base: str = "normal",
    df: float = 15.0,
) -> Flow:  # fmt: skip
    """Return a flow of the held coordinates, and a normal distribution of all others that depends on these.

    The flow is heavier tails, couplings (splines, if one coordinate is held), tails and an affine map.
    """
    few = len(held)  # whose far draws meet a map that nobody fitted: so the couplings are small ones
    inner = (
        splines(1, layers=1)
        if few == 1
        else realnvp(few, layers=layers, hidden=(16,), network="robust", log_scale_bound=2.0)
    )
    last = with_affine(inner, "tril").bijection
    outer = Compose([MarginalSpline(few, bins=BINS, bound=BOUND), DiagonalAffine(few), last])
    map_ = Nested(dim, held=held, outer=outer, terms=terms, entries=entries)
    options = {"held": tuple(held), "terms": terms, "entries": entries, "layers": layers}
    return build([map_], base, df, builder="nested", dim=dim, **options)


@torch.no_grad()
def marginal_flow(flow: Flow, loc: Tensor, scale: Tensor) -> tuple[Flow, list[nn.Parameter]]:
    """Return the flow of the held coordinates alone, begun at an affine map, and its parameters that can be fitted.

    They are those of ``flow``. The scale of tails is none of them, see :func:`with_tails`.
    """
    outer = nested_of(flow).outer
    assert isinstance(outer, Compose)
    last = outer.layers[-1]
    start_at(Flow(last, dim=len(loc)), loc, scale)
    return Flow(outer, dim=len(loc), base=flow.base, df=flow.df), list(last.parameters())


def nested_of(flow: Flow) -> Nested:
    """Return the one map of a nested flow."""
    (map_,) = (layer for layer in flow.modules() if isinstance(layer, Nested))
    return map_


@torch.no_grad()
def with_tails(flow: Flow, df: float) -> Flow:
    """Give the held coordinates the tails of a Student-t distribution, before their couplings. Returns the flow."""
    outer = nested_of(flow).outer
    assert isinstance(outer, Compose)
    spline, affine = outer.layers[:2]
    assert isinstance(spline, MarginalSpline)
    assert isinstance(affine, DiagonalAffine)
    values = torch.linspace(-FAR, FAR, FINE, dtype=torch.float64).sinh()
    table = values, torch.distributions.StudentT(torch.tensor(df, dtype=torch.float64)).log_prob(values)
    at, middle, half = knots(*table, NORMAL, bins=BINS, bound=BOUND)
    spline.at.copy_(at)
    affine.loc.fill_(float(middle))
    affine.scale.fill_(float(half))
    return flow
