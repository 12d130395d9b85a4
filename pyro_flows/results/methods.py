"""What made a result: told from the sampler that its draws come from, by nothing else."""

from __future__ import annotations

import torch

from pyro_flows._bundles import Entries
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.verdict import methods as made

OF_BUILDERS = {"sliced": made.GRID, "nested": made.CONDITIONALS, "marginals": made.INDEPENDENT}
PAIRS = 8  # of points, at whose middles an affine map is known
STRAIGHT = 1e-4  # of the distance between the images of a pair: training moves images by a hundred times as much


def guide_method(flow: Flow | FlowMixture | None, settings: Entries) -> str:
    """Return what made a guide's own draws; ``settings`` tell whether the guide is the caller's, or amortized.

    A flow that could not be stored was one that the caller gave to a fit.
    """
    if settings.get("diagnosed"):
        return made.GUIDE
    if settings.get("amortized"):
        return made.AMORTIZED
    return made.TRAINED if flow is None else method_of(flow)


def method_of(sampler: Flow | FlowMixture) -> str:
    """Return the method that a sampler is."""
    if isinstance(sampler, FlowMixture):
        return made.MIXTURE if len(sampler.components) > 1 else method_of(sampler.members[int(sampler.which[0])])
    recipe = sampler.recipe
    known = OF_BUILDERS.get(recipe.builder) if recipe is not None and recipe.named else None
    if known is not None:
        return made.TABULATED if known == made.INDEPENDENT and sampler.dim == 1 else known
    return made.GAUSSIAN if sampler.base in ("normal", "student_t") and is_affine(sampler) else made.TRAINED


@torch.no_grad()
def is_affine(flow: Flow) -> bool:
    """Whether a flow is an affine map: images of the middles of random pairs are the middles of images."""
    generator = torch.Generator().manual_seed(0)
    like = next(flow.parameters(), flow._like)
    a, b = torch.randn(2, PAIRS, *flow.base_shape, generator=generator).to(like)
    at_a, at_b, middle = (flow.bijection.forward_and_ladj(x)[0].double() for x in (a, b, 0.5 * (a + b)))
    size = torch.maximum(at_a.abs(), at_b.abs())
    bend = (middle - 0.5 * (at_a + at_b)).abs()
    allowed = STRAIGHT * (at_a - at_b).abs() + 16.0 * torch.finfo(like.dtype).eps * size
    return bool((bend <= allowed).all())
