"""What a flow is made of: a builder with its options, and the maps around the flow."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flows import _checks
from pyro_flows._fallbacks import first_line
from pyro_flows._seeding import seeded
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import BUILDER, FlowMixture
from pyro_flows.flows.vectors import BUILDERS
from pyro_flows.transforms import Bijection, Chain, DiagonalAffine, LowerTriangularAffine, SinhArcsinh
from pyro_flows.transforms.fixed import Preprocess


def append_affine(flow: Flow, kind: str) -> Flow:
    map_ = LowerTriangularAffine(flow.dim) if kind == "tril" else DiagonalAffine(flow.dim)
    whole = Flow(Chain([flow.bijection, SinhArcsinh(flow.dim), map_]), dim=flow.dim, base=flow.base, df=flow.df)
    whole.settings = wrapped(flow.settings, "affine", kind)
    return whole


def rebuild(settings: Mapping[str, Any]) -> Any:
    """Build the flow that :attr:`Flow.settings` describes, with the maps after it: to the scale of data, of a guide.

    A :class:`FlowMixture` is built with all its flows; its weights, orders and signs are in the state to be loaded.

    Raises:
        ValueError: for an unknown builder or affine map.
    """
    if settings.get("builder") == BUILDER:
        return FlowMixture.from_settings(settings, rebuild)
    options = dict(settings)
    affine, standardising = options.pop("affine", None), options.pop("preprocess", None)
    if "inner" in options:
        flow = rebuild(options["inner"])
        flow.df = options.get("df", flow.df)
    else:
        flow = BUILDERS[_checks.choice("builder", options.pop("builder"), BUILDERS)](**options)
    if standardising is not None:
        flow = append(flow, blank(standardising, flow))
    return flow if affine is None else append_affine(flow, _checks.choice("affine", affine, ("diagonal", "tril")))


@torch.no_grad()
def not_rebuilt(flow: Flow | FlowMixture) -> str | None:
    """Say why :func:`rebuild` does not give this flow back from its settings and state, or None: it does.

    Names and shapes of the tensors are compared, then values at two points.
    """
    if flow.settings is None:
        return "its bijection is not one of the builders', so it cannot be rebuilt from settings"
    changed = "it was changed after a builder made it, so it cannot be rebuilt from settings"
    state = {name: value.detach().cpu() for name, value in flow.state_dict().items()}
    try:
        with seeded(0):
            again = rebuild(json.loads(json.dumps(flow.settings)))
        again.to(next(value.dtype for value in state.values() if value.is_floating_point())).load_state_dict(state)
        pair = [copy.deepcopy(flow).cpu().eval(), again.eval()]
        found = [_at_two_points(one) for one in pair]
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return f"{changed} ({first_line(error)})"
    pairs = zip(*found, strict=True)
    same = all(torch.allclose(one, other, rtol=1e-5, atol=1e-6, equal_nan=True) for one, other in pairs)
    return None if same else changed


@torch.no_grad()
def _at_two_points(flow: Flow | FlowMixture) -> tuple[Tensor, ...]:
    """Return what a flow makes of two points, for flows to be compared."""
    if isinstance(flow, FlowMixture):
        return (flow.log_prob(torch.linspace(-3.0, 3.0, 2 * flow.dim).reshape(2, -1).to(flow._like)),)
    like = flow.base_distribution().mean
    x = torch.linspace(-3.0, 3.0, 2 * flow.dim).reshape(2, *flow.base_shape).to(like)
    context = x.new_zeros(2, flow.context_dim) if flow.context_dim else None
    return (*flow.bijection.forward_and_ladj(x, context), flow.base_distribution().log_prob(x))


def copy_layers(old: nn.Module, new: nn.Module) -> None:
    """Copy parameters and buffers layer by layer: the n-th layer of each class onto the n-th of the same class."""
    if not isinstance(old, Chain):
        new.load_state_dict(old.state_dict())
        return
    seen: dict[type, int] = {}
    for layer in old.layers:
        twins: Any = [candidate for candidate in new.layers if type(candidate) is type(layer)]  # type: ignore[union-attr]
        copy_layers(layer, twins[seen.get(type(layer), 0)])
        seen[type(layer)] = seen.get(type(layer), 0) + 1


def append(flow: Flow, layer: Preprocess) -> Flow:
    """Make ``layer`` the last one of the flow, in the place of one of its kind, and note it in the flow's settings."""
    noted = {"full": layer.full, "context": layer.slope is not None}
    if ending(flow) is not None:
        flow.bijection = _ending_replaced(flow.bijection, layer)
        flow.settings = None if flow.settings is None else {**flow.settings, "preprocess": noted}
        return flow
    inner = flow.bijection
    flow.bijection = Chain([*(inner.layers if isinstance(inner, Chain) else [inner]), layer])  # type: ignore[list-item]
    flow.settings = wrapped(flow.settings, "preprocess", noted)
    return flow


def _ending_replaced(bijection: Bijection, layer: Preprocess) -> Bijection:
    if not isinstance(bijection, Chain):
        return layer
    stack: list[Any] = list(bijection.layers)
    return Chain([*stack[:-1], _ending_replaced(stack[-1], layer)])


def blank(about: Mapping[str, Any], flow: Flow) -> Preprocess:
    """Return a map of the kind that :func:`append` noted, that changes nothing: its numbers are read from a file."""
    loc = torch.zeros(flow.event_shape)
    scale = torch.eye(loc.numel()) if about["full"] else torch.ones_like(loc)
    return Preprocess(loc, scale, torch.zeros(flow.context_dim, loc.numel()) if about["context"] else None)


def wrapped(settings: Mapping[str, Any] | None, name: str, value: Any) -> dict[str, Any] | None:
    """Return the settings of a flow with one more map at its end: ``"preprocess"``, or ``"affine"`` of a guide.

    One of each may stand beside a builder's options, in this order; what comes on top of those has the settings so far
    as its ``"inner"`` ones.
    """
    if settings is None:
        return None
    if "affine" in settings or name in settings:
        return {"builder": settings["builder"], "inner": dict(settings), name: value}
    return {**settings, name: value}


def ending(flow: Flow) -> Preprocess | None:
    """Return the map to the scale of data that is the flow's last layer, if there is one."""
    last: Any = flow.bijection
    while isinstance(last, Chain):
        last = last.layers[-1]
    return last if isinstance(last, Preprocess) else None
