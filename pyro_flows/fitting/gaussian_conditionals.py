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

DONE = "converged: given a few latents, the others are Gaussian"


def conditionals_at_start(run: Run) -> str | None:
    """Try Gaussian conditionals given a few hyperparameters of the model as it was read, before any training.

    The run takes draws that weights correct: only the density of the hyperparameters was fitted. Then coordinates that
    were chosen since the model was read are dropped.
    """
    plan, density = run.plan, run.state.as_read
    if not plan.open or not can_have_conditionals(density):
        return None
    seed = derive(run.seed, "coordinates held")
    with plan.clock.part(CONDITIONALS, share=SHARE_OF_SECONDS), seeded(seed, density.device):
        found = conditionals_flow(density, seed=run.seed)
        if found is None:
            return None
        flow, held = found
        outcome = untrained(CONDITIONALS, flow, density, 0.0, DONE)
        names = coordinate_names(density.structure)
        details = {**outcome.stage.details, "held": [names[number] for number in held]}
        if outcome.enough or outcome.corrected:
            run.state.go_back()
            run.modes, run.history = [], []
            run.take(replace(outcome, stage=replace(outcome.stage, details=details)))
            return CONDITIONALS
    return None


def conditionals_flow(density: LogDensity, *, seed: int) -> tuple[Flow, list[int]] | None:
    """Return a flow of hyperparameters and normal others, and these coordinates; None if there are none.

    Four layers for two coordinates, and tails with less than 30 degrees of freedom, made draws far beyond all mass.

    Cost: a hundred Hessians, and ten thousand densities. Randomness is torch's global one.
    """
    draws = prior_draws(density, 500, seed=seed)
    middle, spread = draws.median(0).values, spread_of(draws)
    held = hyperparameters_of(density, middle + 0.5 * spread * torch.randn(2, len(middle)).to(middle))
    if not held:
        return None
    found = _found(density, held, middle[held].double(), spread[held].double())
    if found is None:
        return None
    given, sample = found
    flow = given.flow(4 if len(held) > 2 else 2)
    fit_flow(*marginal_flow(with_tails(flow, 30.0), sample.loc, sample.root), given.marginal, sample)
    return flow.to(density.dtype), held


@torch.no_grad()
def _found(
    density: LogDensity, held: list[int], middle: Tensor, spread: Tensor
) -> tuple[Conditional, Sample] | None:  # fmt: skip
    """Return the conditionals and draws of the hyperparameters, at which the conditionals were checked.

    A posterior may lie where a function matters that contributed nothing near the middle of the prior.
    """
    loc, root, scale = middle, torch.diag(spread), spread.clamp_max(1.0)
    for _ in range(3):  # each from the moments of the last draws
        given = conditional(density, held, middle, scale)
        if given is None:
            return None
        sample = sampled(given.marginal, loc, root)
        if sample is None or sample.effective < ESS_OF_MCMC:
            return None
        chosen = torch.multinomial(sample.weights, 8, replacement=True)
        if given.holds(sample.theta[chosen]):
            return given, sample
        loc, root, middle = sample.loc, sample.root, sample.loc
        scale = torch.maximum(root.norm(dim=1), 0.3 * scale)
    return None
