"""The method of Gaussian conditionals: all other latents are normal, given a few hyperparameters.

Examples are scales of a hierarchy, of a random walk or of errors of measurement, each with a funnel. All other
latents, up to thousands, are integrated out exactly. A density of a few coordinates is left. See
``modes/conditionals.py`` and ``modes/hyperparameter_marginal.py``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_flows._seeding import derive, seeded
from pyro_flows.fitting.plan import SHARE_OF_SECONDS
from pyro_flows.fitting.rounds import untrained
from pyro_flows.fitting.state import Run
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.gaussian_conditionals import marginal_flow, with_tails
from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.conditionals import Conditional, can_have_conditionals, conditional, hyperparameters_of
from pyro_flows.modes.hyperparameter_marginal import Sample, fit_flow, sampled
from pyro_flows.results.dims import coordinate_names
from pyro_flows.starts.prior import prior_draws, spread_of
from pyro_flows.verdict.methods import CONDITIONALS
from pyro_flows.verdict.thresholds import ESS_OF_MCMC

STAGE = CONDITIONALS
SEED = "coordinates held"  # its digits, on which draws depend
DONE = "converged: given a few latents, the others are Gaussian"
PRIOR = 500  # draws that tell where to begin
POINTS = 2  # near which normality is looked at
LAYERS, LAYERS_OF_TWO = 4, 2  # of the flow of the held coordinates: four of two make draws that are far beyond all mass
DF = 30.0  # degrees of freedom of its tails: of heavier ones, couplings make draws that are far beyond all mass
WIDEST = 1.0  # spread of a prior, up to which functions are looked for at first
CHECKED = 8  # draws at which they are looked at again
TRIES = 3


def conditionals_at_start(run: Run) -> str | None:
    """Hold a few coordinates of the model as it was read, before any training.

    The run takes draws that are good enough, and what was chosen since the model was read is dropped.
    """
    plan, density = run.plan, run.state.as_read
    if not plan.open or not can_have_conditionals(density):
        return None
    with plan.clock.part(STAGE, share=SHARE_OF_SECONDS), seeded(derive(run.seed, SEED), density.device):
        found = conditionals_flow(density, seed=run.seed)
        if found is None:
            return None
        flow, held = found
        outcome, trainer = untrained(STAGE, flow, density, 0.0, DONE)
        names = coordinate_names(density.structure)
        details = {**outcome.stage.details, "held": [names[number] for number in held]}
        if outcome.enough:
            run.state.go_back()
            run.modes, run.history = [], []
            run.take(replace(outcome, stage=replace(outcome.stage, details=details)), trainer)
            return CONDITIONALS
    return None


def conditionals_flow(density: LogDensity, *, seed: int) -> tuple[Flow, list[int]] | None:
    """Return a flow of held coordinates and normal others, and these coordinates; None if there are none.

    Cost: a hundred Hessians, and ten thousand densities. Randomness is torch's global one.
    """
    draws = prior_draws(density, PRIOR, seed=seed)
    middle, spread = draws.median(0).values, spread_of(draws)
    held = hyperparameters_of(density, middle + 0.5 * spread * torch.randn(POINTS, len(middle)).to(middle))
    if not held:
        return None
    found = _found(density, held, middle[held].double(), spread[held].double())
    if found is None:
        return None
    given, sample = found
    flow = given.flow(LAYERS if len(held) > 2 else LAYERS_OF_TWO)
    fit_flow(*marginal_flow(with_tails(flow, DF), sample.loc, sample.root), given.marginal, sample)
    return flow.to(density.dtype), held


@torch.no_grad()
def _found(
    density: LogDensity, held: list[int], middle: Tensor, spread: Tensor
) -> tuple[Conditional, Sample] | None:  # fmt: skip
    """Return the distribution of the others and draws of the held coordinates, whose functions hold at these draws.

    A posterior may lie where a function counts that had contributed nothing about the prior's middle.
    """
    loc, root, scale = middle, torch.diag(spread), spread.clamp_max(WIDEST)
    for _ in range(TRIES):
        given = conditional(density, held, middle, scale)
        if given is None:
            return None
        sample = sampled(given.marginal, loc, root)
        if sample is None or sample.effective < ESS_OF_MCMC:
            return None
        chosen = torch.multinomial(sample.weights, CHECKED, replacement=True)
        if given.holds(sample.theta[chosen]):
            return given, sample
        loc, root, middle = sample.loc, sample.root, sample.loc
        scale = torch.maximum(root.norm(dim=1), 0.3 * scale)
    return None
