"""The methods that a run tries, in their order, as a table; the first that suffices ends the run.

An attempt returns the name of the acceptance test that it has passed, as the ledger counts it, and None if it does not
suffice. What it found is in the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.fitting.laplace_grid import grid_at_start, grid_comes_first
from pyro_flows.fitting.multimodal import independent, multimodal
from pyro_flows.fitting.rounds import assess, untrained, weighed, weights_collapse
from pyro_flows.fitting.state import LIGHTER, SHARE_OF_SECONDS, Run
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.gaussian_conditionals import marginal_flow, with_tails
from pyro_flows.flows.parts import affine_base_of
from pyro_flows.flows.recipe import begin_at, set_df
from pyro_flows.inference.chains.adaptation import MOST_DIM
from pyro_flows.inference.chains.refine import chains_of_flow
from pyro_flows.inference.chains.untrained import chains_of_gaussian
from pyro_flows.inference.modes.conditionals import Conditional, can_have_conditionals, conditional, hyperparameters_of
from pyro_flows.inference.modes.hyperparameter_marginal import Sample, fit_flow, sampled
from pyro_flows.inference.modes.population_monte_carlo import can_be_tempered
from pyro_flows.inference.modes.propriety import improper_tails
from pyro_flows.inference.record import Stage
from pyro_flows.inference.starts.coordinates import climbed
from pyro_flows.inference.starts.prior import MATRICES_UP_TO, prior_draws, spread_of
from pyro_flows.inference.training.loop import BATCH, CHECK_EVERY, STEP_SIZE, Budget, Look, train
from pyro_flows.inference.training.trainer import Trainer
from pyro_flows.inference.verdict.deciding import (
    JUDGED_DRAWS,
    LOOKED_AT_DRAWS,
    SEARCHED_DRAWS,
    acceptable_gap,
    shift_is_noise,
)
from pyro_flows.inference.verdict.methods import CONDITIONALS, GAUSSIAN, GRID, INDEPENDENT, MCMC, MIXTURE, TRAINED
from pyro_flows.model.dims import coordinate_names
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process import stages
from pyro_flows.support.process.journal import milestone
from pyro_flows.support.process.ledger import accepted
from pyro_flows.support.process.progress import in_nats
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import ESS_OF_MCMC, ESS_SHARE_COLLAPSED, ESS_SHARE_PROMISING

AS_READ, AT_MODES, AT_THE_BEST, AFTER = "as read", "at modes", "at the best start", "after a flow"
AT_ONCE = "converged: weighting changes no result at the start"
DONE = "converged: given a few latents, the others are Gaussian"
SAMPLED_FROM = 30  # dimensions from which on a sampler is tried before a flow is trained


class Method(NamedTuple):
    """A row of the table: a method is tried at a moment of a run if it ``applies``."""

    name: str
    when: str
    applies: Callable[[Run], bool]
    attempt: Callable[[Run], str | None]


def answered(run: Run, when: str) -> bool:
    """Try the methods of a moment in their order; say whether one of them ended the run."""
    for method in METHODS:
        if method.when == when and method.applies(run):
            test = method.attempt(run)
            milestone()
            if test is not None:
                accepted(test)
                return True
    return False


# ---- a grid of one latent, and a few latents with Gaussian others ----------------------------------------------------


def _grid_of_hierarchy(run: Run) -> str | None:
    """Try a grid in non-centered coordinates: as a rule, it is the same in centered ones, where a funnel has no mode.

    Paths that were made for this are kept.
    """
    state = run.state
    if not grid_comes_first(run.plan, run.density):
        return None
    wholly = state.climbed = climbed(state.density, True, seed=run.seed)
    found = grid_at_start(run, wholly.density, wholly.start) if math.isfinite(wholly.elbo) else None
    if found is None:
        return None
    wholly.density.evaluations += state.density.evaluations
    state.density = wholly.density
    chosen = wholly.density.structure.noncentered
    details = {"noncentered": chosen, "elbo_centered": None, "elbo_noncentered": wholly.elbo}
    state.history.append(Stage(stages.PARAMETERIZATION, elbo=wholly.elbo, details=details))
    run.take(found)  # last: a signal that comes before leaves no flow in other coordinates than those of the state
    return GRID


def _grid_at_best(run: Run) -> str | None:
    found = grid_at_start(run, run.density, run.starts[0])
    if found is None:
        return None
    run.take(found)
    return GRID


def _is_hierarchical(run: Run) -> bool:
    return bool(run.density.structure.hierarchical)


def _few(run: Run) -> bool:
    return run.state.as_read.dim <= MATRICES_UP_TO  # above, chains cost less than Gaussian conditionals


# ---- a Gaussian ------------------------------------------------------------------------------------------------------


def _gaussian(run: Run) -> str | None:
    """Weigh the flow as it is at the best start, a Student-t distribution; say whether there is nothing to train."""
    density, start = run.density, run.starts[0]
    flow = run.plan.fresh(density)
    plain, df = affine_base_of(flow) if run.plan.recipe.named else flow, flow.df
    with run.plan.clock.part(stages.BEST_START, noted=False):
        for lighter in LIGHTER if flow.base == "student_t" else (1.0,):
            begin_at(set_df(plain, lighter * df), start.loc, start.scale)
            if weights_collapse(plain, density):
                continue
            cheap = density.affordable(JUDGED_DRAWS) > LOOKED_AT_DRAWS  # else the check that decides is as cheap
            if cheap and not shift_is_noise(weighed(plain, density, LOOKED_AT_DRAWS)):
                continue
            begin_at(set_df(flow, lighter * df), start.loc, start.scale)
            outcome = untrained(stages.FIRST_ROUND, flow, density, start.elbo, AT_ONCE)
            if shift_is_noise(outcome.weighing):
                run.take(outcome)
                return GAUSSIAN
    return None


# ---- tables of independent coordinates -------------------------------------------------------------------------------


def _independent(run: Run) -> str | None:
    found = None
    with run.plan.clock.part(stages.INDEPENDENCE):  # which the clock may end
        found = independent(run.density, run.starts, seed=run.seed)
    if found is None:
        return None
    run.multimodal = found
    run.note(found.stage)
    return found.stage.stage


# ---- a mixture at several modes --------------------------------------------------------------------------------------


def _mixture(run: Run, *, barrier: float = 3.0) -> str | None:
    """Fit a mixture at all modes, unless several runs were asked for: these are about a flow.

    If the density falls by less than ``barrier`` nats between two modes, a trained flow covers both.
    """
    plan = run.plan
    if not plan.escalate or plan.train_model or plan.runs > 1:
        return None
    with plan.clock.part(stages.SEVERAL):
        if run.best is None:
            z, hopeless = prior_draws(run.density, SEARCHED_DRAWS // 2, seed=run.seed), False
        else:
            z, weighing = run.flow().draw(SEARCHED_DRAWS // 2)[0], run.best.weighing
            hopeless = weighing.share < ESS_SHARE_COLLAPSED
        run.multimodal = multimodal(run.density, z, seed=run.seed, bar=plan.bar, barrier=barrier, ridges=hopeless)
    if run.multimodal is None:
        return None
    run.note(run.multimodal.stage)
    return run.multimodal.stage.stage if run.multimodal.enough else None


def _survey_is_cheap(run: Run) -> bool:
    """Whether a look at the modes costs next to nothing: an evaluation with its gradient is small."""
    density = run.density
    cheap = density.numbers * density.dim <= 500 and density.work.operations <= 500
    return cheap and len(run.modes) <= 1 and run.missed_mode is None


def _may_have_modes(run: Run) -> bool:
    """Whether a flow's weights are so poor that it may miss modes, or a search for modes costs little."""
    best = run.best
    if not (run.goes_on and run.missed_mode is None and run.multimodal is None) or best is None:
        return False
    poor = best.weighing.share < ESS_SHARE_PROMISING
    return poor or (can_be_tempered(run.density) and not best.only_k_hat_fails)


# ---- Markov chains ---------------------------------------------------------------------------------------------------


def _chains_of_gaussian(run: Run) -> str | None:
    """Try a sampler in the place of a flow, where a flow would need thousands of steps."""
    plan, density = run.plan, run.density
    with plan.clock.part(stages.AT_ONCE, share=SHARE_OF_SECONDS):
        names = coordinate_names(density.structure)
        found = chains_of_gaussian(run.starts[0], density, names, plan.draws, seed=run.seed, bar=plan.bar)
        if found is not None:
            flow, run.copies, run.chains = found
            why = "no flow was trained: MCMC that began at a Gaussian converged"
            run.take(untrained(stages.INITIAL, flow, density, run.starts[0].elbo, why, look=False))
            run.sampled = True
            return "MCMC instead of training"
    return None


def _chains_come_first(run: Run) -> bool:
    plan, density = run.plan, run.density
    asked = plan.escalate and plan.refine is not None and plan.runs == 1 and plan.draws <= 20_000
    return run.from_scratch and asked and SAMPLED_FROM <= density.dim <= MOST_DIM and density.batched


def _chains_of_flow(run: Run) -> str | None:
    """Try a sampler in the place of further training, if one was asked for."""
    plan, density = run.plan, run.density
    assert run.trainer is not None
    with plan.clock.part(stages.NEXT):
        names = coordinate_names(density.structure)
        run.chains = chains_of_flow(run.trainer.flow, density, names, plan.draws, seed=run.seed, bar=plan.bar)
    return None if run.chains is None else "MCMC in the latent space"


# ---- Gaussian conditionals -------------------------------------------------------------------------------------------


def conditionals_at_start(run: Run) -> str | None:
    """Try Gaussian conditionals given a few hyperparameters of the model as it was read, before any training.

    These are scales of a hierarchy, of a random walk or of errors of measurement, each with a funnel. All other
    latents, up to thousands, are integrated out exactly. A density of a few coordinates is left: see
    ``inference/modes/conditionals.py`` and ``inference/modes/hyperparameter_marginal.py``.

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
def _found(density: LogDensity, held: list[int], middle: Tensor, spread: Tensor) -> tuple[Conditional, Sample] | None:
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


# ---- the training of a first round -----------------------------------------------------------------------------------

# steps before training is watched: without them, three of six fits of a posterior with a wide tail needed more than a
# flow, and two of these were `unreliable` (record 0058)
UNWATCHED = 2 * CHECK_EVERY


def train_flow(run: Run) -> str | None:
    """Train a flow from the best start; the name of the round if it is enough."""
    plan, density, start = run.plan, run.density, run.starts[0]
    flow = run.untrained = plan.fresh(density)
    begin_at(flow, start.loc, start.scale)
    trained = list(density.parameters().values()) if plan.train_model else []
    trainer = Trainer(flow, density, learning_rate=STEP_SIZE, batch=BATCH, extra=trained)
    with plan.clock.part(stages.TRAINING, noted=False):
        for step in range(max(1, min(UNWATCHED, plan.max_steps // 6))):
            trainer.step(STEP_SIZE * min(1.0, (step + 1) / CHECK_EVERY))
    _first_round(run, trainer)
    return stages.FIRST_ROUND if run.best is not None and run.best.enough else None


def is_improper(run: Run, flow: Flow | None = None) -> str | None:
    """Whether the posterior seems to be improper: then no training, and no sampler, comes to an end of it."""
    drawn = run.flow() if flow is None else flow
    with run.plan.clock.part(stages.PROPRIETY):
        run.improper = improper_tails(run.density, lambda: drawn.draw(LOOKED_AT_DRAWS)[0], seed=run.seed)
    return stages.PROPRIETY if run.improper else None


def _first_round(run: Run, trainer: Trainer) -> None:
    """Train until there is nothing left to see in the weights, or until the guide stands still."""
    plan, density = run.plan, trainer.density

    def weigh() -> tuple[bool, float]:
        trainer.write()
        weighing = weighed(trainer.flow, density, LOOKED_AT_DRAWS)
        return shift_is_noise(weighing), weighing.share

    def report(done: int, elbo: float, state: str) -> None:
        plan.bar.show(f"{done} steps, {in_nats(elbo)}{state}")

    def endless() -> bool:
        return is_improper(run, trainer.flow) is not None

    stalls = plan.escalate and plan.refine is not None
    asked = endless if plan.escalate and density.structure.improper else None
    look = None if plan.train_model else Look(acceptable_gap(density.dim), weigh, stalls, asked)
    while True:
        left = Budget(plan.max_steps - len(trainer.losses), plan.clock)
        training = train(trainer, left, seed=run.seed, report=report, look=look)
        outcome = assess(stages.FIRST_ROUND, trainer, training)
        run.take(outcome, trainer)
        done = not training.early or plan.clock.over or (stalls and outcome.only_k_hat_fails)
        if done or shift_is_noise(outcome.weighing):
            return
        look = None


# ---- the table -------------------------------------------------------------------------------------------------------

METHODS = (
    Method(GRID, AS_READ, _is_hierarchical, _grid_of_hierarchy),
    Method(CONDITIONALS, AS_READ, lambda run: _is_hierarchical(run) and _few(run), conditionals_at_start),
    Method(MIXTURE, AT_MODES, lambda run: len(run.modes) > 1 and run.missed_mode is None, _mixture),
    Method(GAUSSIAN, AT_THE_BEST, lambda run: not run.plan.train_model, _gaussian),
    Method(INDEPENDENT, AT_THE_BEST, lambda run: run.from_scratch and run.plan.open, _independent),
    Method(GRID, AT_THE_BEST, lambda run: run.from_scratch and not _is_hierarchical(run), _grid_at_best),
    Method(MIXTURE, AT_THE_BEST, _survey_is_cheap, _mixture),
    Method(  # for hierarchical models of few dimensions, this was tried before
        CONDITIONALS,
        AT_THE_BEST,
        lambda run: run.from_scratch and _few(run) and not run.state.as_read.structure.hierarchical,
        conditionals_at_start,
    ),
    Method(MCMC, AT_THE_BEST, _chains_come_first, _chains_of_gaussian),
    Method(CONDITIONALS, AT_THE_BEST, lambda run: run.from_scratch and not _few(run), conditionals_at_start),
    Method(TRAINED, AT_THE_BEST, lambda run: True, train_flow),
    Method(stages.PROPRIETY, AFTER, lambda run: run.goes_on, is_improper),
    Method(MIXTURE, AFTER, _may_have_modes, lambda run: _mixture(run, barrier=0.0)),
    Method(MCMC, AFTER, lambda run: run.goes_on and run.plan.refine is not None, _chains_of_flow),
)
