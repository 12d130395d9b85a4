"""Coordinates that a flow can only shift and scale, so that their density keeps the shape of the base."""

from __future__ import annotations

import copy
import warnings

import torch

from pyro_flows.flows.flow import Flow
from pyro_flows.support.process.seeding import seeded
from pyro_flows.support.process.warnings import outside

LINES = 32  # along which second differences are taken
SPREADS = 0.5, 0.05  # of random parameters: with large ones, points may lie outside of the interval of a spline
ROUNDING = 1e-6  # of a second difference, relative to the first one,
LAST_DIGITS = 1e-13  # and relative to the values, which may be far larger than their differences
UP_TO = 100  # dimensions in which flows are looked at
SHAPES = {"normal": "normal", "logistic": "logistic", "student_t": "Student t", "uniform": "uniform"}


@torch.no_grad()
def unbent(flow: Flow) -> list[int]:
    """Return the coordinates that are affine functions of the base's draws in each context, whatever the parameters.

    The flow gets random parameters. A coordinate that is a straight line along random lines of the base is affine.

    >>> import pyro_flows as pf
    >>> unbent(pf.spline(1, layers=1)), unbent(pf.realnvp(2, layers=2))
    ([], [])
    """
    if len(flow.event_shape) != 1 or flow.dim > UP_TO or flow.mixture is not None:
        return []
    straight = torch.stack([_straight(flow, spread) for spread in SPREADS]).all(0)
    return straight.nonzero().flatten().tolist()


def _straight(flow: Flow, spread: float) -> torch.Tensor:
    """Say of each coordinate whether it is straight along all lines, with random parameters of a spread."""
    made = copy.deepcopy(flow.bijection).cpu().double().eval()
    with seeded(0):
        for parameter in made.parameters():
            parameter.normal_(0.0, spread)
        start, way = torch.randn(2, LINES, flow.dim, dtype=torch.float64)
        context = torch.randn(LINES, flow.context_dim, dtype=torch.float64) if flow.context_dim else None
    y = torch.stack([made.forward_and_ladj(start + step * way, context)[0] for step in (0.0, 1.0, 2.0)])
    bend, size = y.diff(n=2, dim=0)[0].abs(), y.diff(dim=0).abs().amax(0)
    rounding = ROUNDING * size.clamp_min(1e-9) + LAST_DIGITS * y.abs().amax(0)
    return (bend <= rounding).all(0)  # NaN, where random parameters are too large, is not


def warn_unbent(flow: Flow, name: str) -> None:
    """Warn of coordinates that can only have the base's shape of density.

    Warns:
        UserWarning: naming the first of them, and what bends it.
    """
    places = unbent(flow)
    if not places:
        return
    given = " in each context" if flow.context_dim else ""
    shape = SHAPES.get(flow.base, flow.base)
    remedy = "pf.spline bends every coordinate" + ("." if flow.dim == 1 else " from two layers on.")
    which = f"coordinate {places[0]} is" if len(places) == 1 else f"{len(places)} of {flow.dim} coordinates are"
    warnings.warn(
        f"{name}: {which} only shifted and scaled{given}, so the density there is {shape} whatever the data are. "
        + (remedy if flow.dim == 1 or name == "spline" else f"More layers help, and {remedy}"),
        UserWarning,
        stacklevel=outside(),
    )
