"""What a file says of a flow: its recipe as JSON, from which an equal flow is built that takes over the tensors."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import Component, FlowMixture
from pyro_flows.flows.recipe import BUILDERS, PARTS, Recipe
from pyro_flows.support import checks
from pyro_flows.support.files.untrusted import Building, Damaged, check_numbers, require
from pyro_flows.support.process.fallbacks import first_line
from pyro_flows.support.process.seeding import seeded

MIXTURE = "mixture"  # in the place of a builder's name
AROUND = {"builder", "df", "inner", "mixture", "preprocess", "affine"}  # entries of a flow with more maps around it


def to_json(flow: Flow | FlowMixture) -> dict[str, object] | None:
    """Return JSON values that tell how to build the flow; None if it was not made by a builder.

    A builder's options stand side by side with "builder", "dim", "base" and "df", and so do a "mixture" as the base,
    one map to the scale of data, "preprocess", and one affine map after it, "affine". What comes on top of these has
    all so far as "inner". Weights, orders and signs of a mixture are in the state, like all parameters.
    """
    if isinstance(flow, FlowMixture):
        found = [to_json(member) for member in flow.members]
        parts = zip(flow.which.tolist(), flow.log_weights.exp().tolist(), strict=True)
        if None in found:
            return None
        return {"builder": MIXTURE, "flows": found, "components": [list(part) for part in parts]}
    recipe = flow.recipe
    if recipe is None or not recipe.named:
        return None
    dim = flow.dim if len(flow.base_shape) == 1 else tuple(flow.base_shape)
    text: dict[str, object] = {"builder": recipe.builder, "dim": dim, **recipe.options}
    text |= {"base": recipe.base, "df": recipe.df}
    for kind, about in recipe.around:
        if "affine" in text or kind in text:
            text = {"builder": recipe.builder, "df": recipe.df, "inner": text}
        text[kind] = about
    return text


def recipe_of(text: Mapping[str, object]) -> tuple[Recipe, int | tuple[int, ...]]:
    """Return the recipe that :func:`to_json` wrote down, and the dimension."""
    inner = text.get("inner")
    if isinstance(inner, Mapping):
        recipe, dim = recipe_of(inner)
        if not set(text) <= AROUND or text.get("builder") != inner.get("builder"):
            raise ValueError(f"recipe: expected the entries {', '.join(sorted(AROUND))} around a flow, got others.")
        recipe = recipe.with_df(cast("float", text.get("df", recipe.df)))
    else:
        options = {name: value for name, value in text.items() if name not in ("mixture", "affine", "preprocess")}
        builder, base, df = cast("str", options.pop("builder")), cast("str", options.pop("base")), options.pop("df")
        dim = cast("int | tuple[int, ...]", options.pop("dim"))
        checks.positive("df", df)
        recipe = Recipe(builder, options, base, cast("float", df))
    if text.get("mixture") is not None:
        recipe = recipe.then("mixture", text["mixture"])
    if text.get("preprocess") is not None:
        recipe = recipe.then("preprocess", text["preprocess"])
    if text.get("affine") is not None:
        recipe = recipe.then("affine", checks.choice("affine", text["affine"], ("auto", "diagonal", "tril")))
    return recipe, dim


def from_json(text: Mapping[str, object]) -> Flow | FlowMixture:
    """Build the flow, or mixture of flows, that :func:`to_json` wrote down; its state is to be loaded.

    Raises:
        ValueError: for an unknown builder or affine map.
    """
    if text.get("builder") == MIXTURE:
        parts = [Component(int(flow)) for flow, _ in cast("list[tuple[int, float]]", text["components"])]
        flows = [from_json(flow) for flow in cast("list[Mapping[str, object]]", text["flows"])]
        return FlowMixture(cast("list[Flow]", flows), parts)
    if text.get("builder") not in PARTS:
        checks.choice("builder", text["builder"], BUILDERS)
    recipe, dim = recipe_of(text)
    return recipe.build(dim)


def restored(text: object, state: object) -> Any:
    """Build the flow, or mixture of flows, of a file, which anybody may have written, and give it its state.

    Args:
        text: what :func:`to_json` wrote.
        state: tensors by name.

    Raises:
        Damaged: for sizes beyond those of the tensors, before anything of that size is made; for other tensors than
            those of the flow, and for NaN.
    """
    if not isinstance(text, Mapping) or not isinstance(state, Mapping) or not state:
        raise Damaged("a flow has no description or tensors")
    require(all(isinstance(value, Tensor) for value in state.values()), "a flow's state holds more than tensors")
    check_numbers(text, state)
    kinds = {value.dtype for value in state.values() if value.is_floating_point()}
    require(len(kinds) == 1 and kinds < {torch.float32, torch.float64, None}, "a flow's tensors have dtypes of no flow")
    try:
        with seeded(0), Building(state):
            flow = from_json(text)
        flow.to(kinds.pop()).load_state_dict(state)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        made = f"the tensors are not those of pf.{text.get('builder')} as this release makes it"
        raise Damaged(f"{made} ({first_line(error)}); read them by the release that wrote them") from error
    for name, value in flow.state_dict().items():
        require(value.dtype == state[name].dtype, f"{name} has dtype {state[name].dtype}, and not {value.dtype}")
        require(not bool(torch.isnan(value).any()), f"{name} has NaN")
    return flow


@torch.no_grad()
def not_rebuilt(flow: Flow | FlowMixture) -> str | None:
    """Say why :func:`from_json` does not give this flow back from what is written of it, or None: it does.

    Names and shapes of the tensors are compared, then values at two points.
    """
    if any(value.is_floating_point() and bool(torch.isnan(value).any()) for value in flow.state_dict().values()):
        return "some of its numbers are NaN"
    text = to_json(flow)
    if text is None:
        return "its bijection is not one of the builders', so it cannot be rebuilt from settings"
    changed = "it was changed after a builder made it, so it cannot be rebuilt from settings"
    state = {name: value.detach().cpu() for name, value in flow.state_dict().items()}
    try:
        with seeded(0):
            again = from_json(json.loads(json.dumps(text)))
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
    like = next(flow.parameters(), flow._like)
    x = torch.linspace(-3.0, 3.0, 2 * flow.dim).reshape(2, *flow.base_shape).to(like)
    context = x.new_zeros(2, flow.context_dim) if flow.context_dim else None
    return (*flow.bijection.forward_and_ladj(x, context), flow.base_distribution(context).log_prob(x))
