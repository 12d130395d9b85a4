"""The pictures of docs/reference: a grid of lines after one transform, and each function of ``pf.plots``."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows.support.figures import BASE, FLOW, panels, styled
from pyro_flows.transforms.base import Bijection

REACH = 2.0  # of the grid
LINES = 13  # of each color
WIDTH = 3.7  # inches, to be read on a phone
SCHOOLS = ["Choate", "Deerfield", "Andover", "Exeter", "Hotchkiss", "Lawrenceville", "St. Paul's", "Mt. Hermon"]


class Waves(nn.Module):
    """Stands for the network of a coupling: each of its numbers is a sine of the coordinate that is kept."""

    def __init__(self, heights: list[float]) -> None:
        super().__init__()
        self.heights = torch.tensor(heights)
        self.phases = 1.5 * torch.arange(len(heights))

    def forward(self, kept: Tensor, context: Tensor | None = None) -> Tensor:
        """Return one number for each height, (..., count)."""
        return self.heights * torch.sin(1.8 * kept + self.phases)


def _coupling(
    layer: pf.transforms.AdditiveCoupling | pf.transforms.AffineCoupling | pf.transforms.SplineCoupling,
    heights: list[float],
) -> Bijection:
    layer.conditioner = Waves(heights)
    return layer


def _set(layer: Bijection, values: list[float]) -> Bijection:
    """Give a layer without context its numbers."""
    layer.load_state_dict({"conditioner.values": torch.tensor(values)})
    return layer


def _sheared() -> Bijection:
    layer = pf.transforms.LowerTriangularAffine(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.4)
    return layer


LAYERS: dict[str, Callable[[], Bijection]] = {
    "Planar": lambda: _set(pf.transforms.Planar(2), [0.9, 0.9, 1.0, 2.0, 0.0]),  # u, w, b
    "AdditiveCoupling": lambda: _coupling(pf.transforms.AdditiveCoupling(2), [0.7]),  # t
    "AffineCoupling": lambda: _coupling(pf.transforms.AffineCoupling(2), [0.5, 0.7]),  # s, t
    "SplineCoupling": lambda: _coupling(pf.transforms.SplineCoupling(2, bins=4, bound=2.0), [0.0, 0.0] + 11 * [1.5]),
    "LowerTriangularAffine": _sheared,
    "SinhArcsinh": lambda: _set(pf.transforms.SinhArcsinh(2), [0.5, 0.5, -0.4, -0.4, -0.7, -0.7, -0.4, -0.4]),
}


@styled
def transforms() -> Figure:
    """Lines across and upwards, evenly spaced before each transform."""
    figure, axes = panels(len(LAYERS), columns=2, size=(WIDTH, 1.55 * WIDTH))
    for axis, (name, make) in zip(axes, LAYERS.items(), strict=True):
        _grid(axis, make())
        axis.set_title(name)
    return figure


@torch.no_grad()
def _grid(axis: Axes, layer: Bijection) -> None:
    along = torch.linspace(-REACH, REACH, 200)
    for at in torch.linspace(-REACH, REACH, LINES):
        for color, line in ((FLOW, (at.expand(200), along)), (BASE, (along, at.expand(200)))):
            y: Tensor = layer(torch.stack(line, -1))
            axis.plot(*y.T.numpy(), color=color, linestyle="-", linewidth=0.8)
    axis.set_aspect("equal", adjustable="datalim")
    axis.axis("off")


@functools.cache
def _schools(flow: str = "auto") -> pf.Posterior:
    """The eight schools, with the schools' names; "auto" trains no flow."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def eight_schools(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return pf.fit(eight_schools, y, sigma, flow=flow, progress=False).assign_coords({"school": SCHOOLS})


@functools.cache
def _parabola() -> pf.Posterior:
    """Two numbers of which the data see only a + b^2."""

    def parabola(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("observation", len(y)):
            pyro.sample("y", dist.Normal(a + b**2, 1.0), obs=y)

    return pf.fit(parabola, torch.linspace(-1.0, 3.0, 30), flow="realnvp", progress=False)


PICTURES: dict[str, Callable[[], Figure]] = {
    "transforms": transforms,
    "plots-posterior": lambda: pf.plots.plot_posterior(_schools(), ["mu", "tau"], width=WIDTH),
    "plots-prior": lambda: pf.plots.plot_prior_posterior(_schools(), ["mu", "tau"], width=WIDTH),
    "plots-pairs": lambda: pf.plots.plot_pairs(
        _schools(), "theta[Choate]", "tau", transform={"tau": torch.log}, width=WIDTH
    ),
    "plots-forest": lambda: pf.plots.plot_forest(_schools(), "theta", width=4.6),
    "plots-weights": lambda: pf.plots.plot_weights(_schools("realnvp"), width=WIDTH),
    "plots-elbo": lambda: pf.plots.plot_elbo(_schools("realnvp"), width=4.6),
    "plots-predictive": lambda: pf.plots.plot_predictive(_schools(), width=4.6),
    "plots-layers": lambda: pf.plots.plot_layers(_parabola(), "b", "a", layers=[0, 3, 6, 10], count=1000, width=WIDTH),
}
