"""What each layer of a posterior's flow does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyro_flows import _checks, pictures
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.results.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_layers(
    posterior: Record,
    x: str | None = None,
    y: str | None = None,
    *,
    layers: Sequence[int] | None = None,
    count: int = 2000,
    seed: int = 0,
    width: float = 11.4,
) -> Figure:
    """Draw how the posterior's flow carries draws of its base to two coordinates, layer by layer, colored by angle.

    The coordinates are the unconstrained ones in which the flow works; each layer moves all of them, and two are seen.
    The last layers of a guide bend the tails and are affine. Of a mixture, the part with the largest weight is drawn.

    Args:
        posterior: of :func:`~pyro_flows.fit`, or of a flow guide.
        x: the coordinate across, one of ``posterior.coordinates``; by default the first one.
        y: the coordinate upwards; by default the second one.
        layers: after how many layers to draw (0: the base); by default after each, at most eleven of them.
        count: number of draws.
        seed: of the draws.
        width: inches.

    Raises:
        ValueError: if the posterior has no flow or one coordinate, or for an unknown coordinate or layer.

    Cost: one pass of the flow for ``count`` points, layer by layer.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    ...     pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)
    >>> posterior = pf.fit(model, torch.tensor([1.3, 0.2]), layers=2, draws=400, progress=False)
    >>> len(pf.plots.plot_layers(posterior, layers=[0, 1], count=50).axes)
    2
    """
    flow = posterior.flow
    if flow is None:
        why = posterior.missing.get("flow", "it has no flow")
        raise ValueError(f"posterior: expected one with a flow, got none: {why}.")
    if isinstance(flow, FlowMixture):
        flow = flow.members[int(flow.which[int(flow.log_weights.argmax())])]
    assert isinstance(flow, Flow)
    names = list(posterior.coordinates)
    if len(names) < 2:
        raise ValueError(f"posterior: expected two coordinates or more, got {', '.join(names)} alone.")
    found = [default if given is None else given for given, default in zip((x, y), names, strict=False)]
    dims = [names.index(_checks.choice("x and y", name, names)) for name in found]
    chosen: dict[str, Any] = {"layers": layers, "count": count, "seed": seed, "width": width}
    shown = (f"{found[0]}, unconstrained", f"{found[1]}, unconstrained")
    return pictures.plot_layers(flow, dims=(dims[0], dims[1]), names=shown, **chosen)
