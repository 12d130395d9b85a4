"""What the caller of ``fit`` asked for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from pyro_flows import _checks
from pyro_flows._clock import Clock
from pyro_flows._progress import Bar
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.recipe import AUTO, BUILDERS, VECTOR_BUILDERS, FlowLike, Recipe, latent_recipe
from pyro_flows.model.log_density import LogDensity
from pyro_flows.verdict.deciding import CHECKED

USUAL = {
    "flow": AUTO,
    "layers": None,
    "max_steps": None,
    "max_seconds": math.inf,
    "train_model": False,
    "escalate": True,
    "refine": "auto",
    "runs": 1,
}
LIGHTER = (4.0, 1.0)  # times the base's degrees of freedom: what a nearly normal posterior bears, first
SHARE_OF_SECONDS = 0.5  # that are left, for each part of a fit, if there is a bound
TRAINED = "realnvp"  # where a fit is not told which flow


@dataclass(frozen=True)
class Plan:
    """The model with its arguments, the recipe of the flow, and what bounds the work: see :func:`fit`.

    ``automatic`` says that the choice of a flow was left open, so that other methods may take its place. At most
    ``checked`` draws are run with Pyro's checks of arguments on. ``asked`` are the options of the call that are not the
    usual ones, as JSON values.
    """

    model: Callable[..., object]
    args: tuple[object, ...]
    kwargs: dict[str, object]
    recipe: Recipe
    draws: int
    seed: int
    runs: int
    max_steps: int
    train_model: bool
    escalate: bool
    refine: str | None
    clock: Clock
    bar: Bar
    automatic: bool = False
    checked: int = CHECKED
    asked: Mapping[str, object] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether other methods than a flow may answer: nobody has asked for one."""
        return self.automatic and self.escalate and self.runs == 1 and not self.train_model

    def fresh(self, density: LogDensity) -> Flow:
        """Return an untrained flow over the coordinates of ``density``.

        In one dimension couplings are affine, so that planar maps stand in for them.
        """
        recipe = replace(self.recipe, df=tails(density.dim))
        if density.dim == 1 and recipe.builder in ("realnvp", "nice"):
            recipe = replace(recipe, builder="planar")
        if not recipe.named:
            recipe = replace(recipe, builder=copy.deepcopy(recipe.builder))  # the caller's flow stays untrained
        return recipe.build_for_latents(density.dim).to(torch.zeros((), dtype=density.dtype, device=density.device))


def as_asked(arguments: Mapping[str, object]) -> dict[str, object]:
    """Return those arguments of a fit that are options, and not the usual ones, as JSON values.

    A flow that was given stands as its kind in angle brackets: no name makes it again.
    """
    found = {name: value for name, value in arguments.items() if name in USUAL}
    if not isinstance(flow := found["flow"], str):
        found["flow"] = f"<{getattr(flow, '__name__', type(flow).__name__)}>"
    return {name: value for name, value in found.items() if value != USUAL[name]}


def recipe_for(flow: FlowLike, options: Mapping[str, object]) -> Recipe:
    """Return the recipe of the flow that a fit trains.

    Raises:
        ValueError, TypeError: as :func:`latent_recipe` does.
    """
    if isinstance(flow, str) and flow not in BUILDERS:
        _checks.choice("flow", flow, (AUTO, *VECTOR_BUILDERS))
    trained: FlowLike = TRAINED if flow == AUTO else flow
    return latent_recipe(trained, options, affine="auto", base="student_t", df=15.0)


def tails(dim: int) -> float:
    """Return the base's degrees of freedom: a Student-t costs about 0.94 D / df^2 nats where the target is Gaussian."""
    return max(15.0, 2.0 * dim)
