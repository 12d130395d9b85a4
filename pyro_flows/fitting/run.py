"""The second stage of a fit, one run: starts, a race, a first round of training, and what follows if needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from pyro_flows import _stages
from pyro_flows._ledger import accepted
from pyro_flows._progress import Bar, in_nats
from pyro_flows._seeding import seeded
from pyro_flows.correction.rungs import attempt
from pyro_flows.correction.untrained import attempt_untrained
from pyro_flows.fitting.plan import Plan, tails
from pyro_flows.fitting.rounds import (
    JUDGED_DRAWS,
    LOOKED_AT_DRAWS,
    Round,
    assess,
    enough_gap,
    invisible,
    is_far_off,
    weighed,
)
from pyro_flows.fitting.selection import CLOSE, Entrant, begin, race, share
from pyro_flows.fitting.several import Several, several
from pyro_flows.fitting.slicing import STAGE as SLICES
from pyro_flows.fitting.slicing import slices_at_once, slices_of
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.parts import untrained_twin
from pyro_flows.flows.recipe import set_df
from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.population import can_be_scattered
from pyro_flows.modes.propriety import improper_tails
from pyro_flows.results.dims import coordinate_names
from pyro_flows.results.stage import Stage
from pyro_flows.starts.matching import matched
from pyro_flows.starts.portfolio import portfolio
from pyro_flows.starts.prior import prior_draws
from pyro_flows.starts.start import Start, standard
from pyro_flows.training.loop import BATCH, STEP_SIZE, Budget, Look, Training, train
from pyro_flows.training.trainer import Trainer
from pyro_flows.verdict.chains import McmcDraws
from pyro_flows.verdict.methods import GAUSSIAN
from pyro_flows.verdict.thresholds import ESS_SHARE_OF_NO_TOP, ESS_SHARE_OF_ONE_MODE, SHIFT_SEEN, SHIFT_SEEN_IN_TRAINING

STARTS_SHARE, RACE_SHARE = 0.5, 0.5  # of the seconds that are left, if there is a bound
LIGHTER = (4.0, 1.0)  # times the base's degrees of freedom: what a nearly normal posterior bears, first
AT_ONCE = "converged: weighting changes no result at the start"
AT_ONCE_SAMPLED = "no flow was trained: MCMC that began at a Gaussian converged"
SAMPLED_FROM, SAMPLED_UP_TO = 30, 1500  # dimensions in which a sampler is tried before a flow is trained
MOST_SAMPLED = 20_000  # draws asked for, up to which it is
CHEAP, FEW_OPERATIONS = 500, 500  # dimensions times numbers of an evaluation, and its operations, with its gradient,
# up to which a glance at the modes costs next to nothing
BARRIER = 3.0  # nats: over less, draws of a flow that is trained come to the other mode
SURVEYED_FROM = 500  # draws that tell where a survey of modes begins


@dataclass
class Run:
    """What a run has come to so far.

    Attributes:
        number: of the run, from 0 on.
        trainer: of the last round, with the losses of all.
        best: the best round, and ``kept`` its entry in the history.
        modes: starts at modes.
        history: an entry for each stage.
        untrained: the flow that a race starts with.
        chains: of a sampler that sufficed where the first round did not, or before it.
        sampled: whether that was before any training: these chains have gone through the search for modes they lack.
        copies: of the flow that these chains began at, at its images under exact symmetries, if there are any.
        several: a mixture at all modes that were found, tried in the place of training, or after the first round.
        improper: what tells that the posterior has no finite integral, so that nothing more was done.
    """

    number: int
    trainer: Trainer | None = None
    best: Round | None = None
    kept: Stage | None = None
    modes: list[Start] = field(default_factory=list)
    history: list[Stage] = field(default_factory=list)
    untrained: Flow | None = None
    chains: McmcDraws | None = None
    sampled: bool = False
    copies: FlowMixture | None = None
    several: Several | None = None
    improper: list[str] = field(default_factory=list)

    @property
    def rank(self) -> tuple[float, float]:
        """The larger the better."""
        return (-1.0, -math.inf) if self.best is None else self.best.rank

    @property
    def losses(self) -> torch.Tensor:
        """The negative ELBO of each step."""
        return torch.tensor([] if self.trainer is None else self.trainer.losses)

    def note(self, stage: Stage) -> Stage:
        """Add an entry to the history, and return it."""
        stage = replace(stage, run=self.number)
        self.history.append(stage)
        return stage

    def take(self, outcome: Round, trainer: Trainer) -> None:
        """Note a round, and keep it if it is the best so far."""
        stage = self.note(outcome.stage)
        if self.best is None or outcome.rank > self.best.rank:
            self.best, self.kept = outcome, stage
        self.trainer = trainer

    def flow(self, plan: Plan, density: LogDensity) -> Flow:
        """Return the flow of the best round; an untrained one, if there was no time for more."""
        if self.best is not None:
            return self.best.flow
        if self.untrained is None:
            self.untrained = plan.fresh(density)
        return self.untrained


def make_run(
    plan: Plan, density: LogDensity, run: Run, extra: Sequence[Start], lack: Start | None = None, *, seed: int,
    instead: Callable[..., bool] = lambda *, first: False,
) -> None:  # fmt: skip
    """Train one flow: portfolio (with the starts in ``extra``), race, first round, what follows it.

    With ``lack``, a start where the runs before lack a mode, this run starts there. ``instead`` is called where
    there is something to train, ``first`` before chains and then after these: it says whether something else does.

    All that is found is in ``run`` at once, so that Ctrl-C or the end of the time loses nothing.
    """
    with seeded(seed, density.device):
        starts = [*extra, standard(density)]
        with plan.clock.part(_stages.STARTS, share=STARTS_SHARE):
            starts = portfolio(density, seed=seed, extra=extra) if lack is None else [lack]
        run.modes = [start for start in starts if start.evidence is not None]
        cheap = density.numbers * density.dim <= CHEAP and density.work.operations <= FEW_OPERATIONS
        glance = cheap and len(run.modes) <= 1 and lack is None
        if len(run.modes) > 1 and lack is None and _is_several(plan, density, run, seed, barrier=BARRIER):
            return
        close = [start for start in starts if start.elbo >= starts[0].elbo - CLOSE]
        starts = close[run.number % len(close) :] + close[: run.number % len(close)]
        if not plan.train_model:
            starts = _matched(plan, density, starts, seed)
            if _fits_already(plan, density, run, starts[0]):
                return
            tried = density.structure.hierarchical  # in non-centered coordinates: slices are the same in all
            sliced = slices_at_once(plan, density, starts[0], seed=seed) if lack is None and not tried else None
            if sliced is not None:
                accepted(SLICES)
                run.take(*sliced)
                return
        alone = lack is None and not plan.train_model
        if (glance and _is_several(plan, density, run, seed, barrier=BARRIER)) or (alone and instead(first=True)):
            return
        if alone and (_sampled_at_once(plan, density, run, starts[0], seed) or instead(first=False)):
            return
        if (winner := _race(plan, density, run, starts, seed)) is None:
            return
        _first_round(plan, run, winner.trainer, seed=seed)
        assert run.best is not None
        if run.best.enough:
            accepted(_stages.FIRST_ROUND)
        if plan.escalate and not (plan.train_model or run.improper or run.best.enough):
            _go_on(plan, density, run, winner.trainer.flow, seed=seed, alone=lack is None)


def _go_on(plan: Plan, density: LogDensity, run: Run, flow: Flow, *, seed: int, alone: bool) -> None:
    """Do what follows a first round that is not enough: slices, a mixture, chains; the first that suffices is kept.

    ``flow`` is the one that was trained. Without ``alone``, it started where the runs before lack a mode.
    """
    best = run.best
    assert best is not None
    poor = best.weighing.ess < ESS_SHARE_OF_ONE_MODE * len(best.weighing.log_weights)
    sliced = slices_of(plan, density, best.flow, seed=seed) if alone else None
    if sliced is not None:
        accepted(SLICES)
        run.several = sliced
        run.note(sliced.stage)
        return
    tried = (poor or (can_be_scattered(density) and not best.lacks_a_tail)) and run.several is None and alone
    if _has_no_integral(plan, density, run, best.flow, seed) or (tried and _is_several(plan, density, run, seed)):
        return
    run.chains = _sampled(plan, density, flow, seed)
    if run.chains is not None:
        accepted("MCMC in the latent space")


def _has_no_integral(plan: Plan, density: LogDensity, run: Run, flow: Flow, seed: int) -> bool:
    """Whether the posterior seems to be improper: then no training, and no sampler, comes to an end of it."""
    with plan.clock.part(_stages.PROPRIETY):
        run.improper = improper_tails(density, lambda: flow.draw(LOOKED_AT_DRAWS)[0], seed=seed)
    return bool(run.improper)


def _matched(plan: Plan, density: LogDensity, starts: Sequence[Start], seed: int) -> list[Start]:
    """Put the best start at the moments that its weights tell, if they can."""
    found = list(starts)
    with plan.clock.part(_stages.MOMENTS, share=STARTS_SHARE):
        found[0] = matched(density, starts[0], tails(density.dim), seed=seed)
    return found


def _fits_already(plan: Plan, density: LogDensity, run: Run, start: Start) -> bool:
    """Look at the flow as it is at the best start, an affine map; say whether there is nothing to train."""
    flow = plan.fresh(density)
    plain, df = untrained_twin(flow) if plan.recipe.named else flow, flow.df
    with plan.clock.part(_stages.BEST_START, noted=False):
        for lighter in LIGHTER if flow.base == "student_t" else (1.0,):
            begin(set_df(plain, lighter * df), start)
            if is_far_off(plain, density):
                continue
            cheap = density.affordable(JUDGED_DRAWS) > LOOKED_AT_DRAWS  # else the check that decides is as cheap
            if cheap and not invisible(weighed(plain, density, LOOKED_AT_DRAWS)):
                continue
            begin(set_df(flow, lighter * df), start)
            trainer = Trainer(flow, density, learning_rate=STEP_SIZE, batch=BATCH)
            outcome = assess(
                _stages.FIRST_ROUND, trainer, Training([], start.elbo, True, False, AT_ONCE, 0, 0, early=True)
            )
            if invisible(outcome.weighing):
                accepted(GAUSSIAN)
                run.take(outcome, trainer)
                return True
    return False


def _first_round(plan: Plan, run: Run, trainer: Trainer, *, seed: int) -> None:
    """Train until there is nothing left to see in the weights, or until the guide stands still."""
    density = trainer.density

    def weigh() -> tuple[bool, float]:
        trainer.write()
        weighing = weighed(trainer.flow, density, LOOKED_AT_DRAWS)
        return invisible(weighing, seen=SHIFT_SEEN_IN_TRAINING * SHIFT_SEEN), weighing.ess / len(weighing.log_weights)

    def endless() -> bool:
        return _has_no_integral(plan, density, run, trainer.flow, seed)

    stalls = plan.escalate and plan.refine is not None
    asked = endless if plan.escalate and density.structure.improper else None
    look = None if plan.train_model else Look(enough_gap(density.dim), weigh, stalls, asked)
    while True:
        left = Budget(plan.max_steps - len(trainer.losses), plan.clock)
        training = train(trainer, left, seed=seed, report=_reporter(plan.bar), look=look)
        outcome = assess(_stages.FIRST_ROUND, trainer, training)
        run.take(outcome, trainer)
        done = not training.early or plan.clock.over or (stalls and outcome.lacks_a_tail)
        if done or invisible(outcome.weighing, seen=SHIFT_SEEN_IN_TRAINING * SHIFT_SEEN):
            return
        look = None


def _sampled(plan: Plan, density: LogDensity, flow: Flow, seed: int) -> McmcDraws | None:
    """Try a sampler in the place of further training, if one was asked for."""
    if plan.refine is None:
        return None
    with plan.clock.part(_stages.NEXT):
        return attempt(flow, density, coordinate_names(density.structure), plan.draws, seed=seed, bar=plan.bar)
    return None


def _sampled_at_once(plan: Plan, density: LogDensity, run: Run, start: Start, seed: int) -> bool:
    """Try a sampler in the place of a flow, where a flow would need thousands of steps; say whether it suffices."""
    asked = plan.escalate and plan.refine is not None and plan.runs == 1 and plan.draws <= MOST_SAMPLED
    if not (asked and SAMPLED_FROM <= density.dim <= SAMPLED_UP_TO and density.batched):
        return False
    with plan.clock.part(_stages.AT_ONCE, share=STARTS_SHARE):
        names = coordinate_names(density.structure)
        found = attempt_untrained(start, density, names, plan.draws, seed=seed, bar=plan.bar)
        if found is not None:
            flow, run.copies, run.chains = found
            trainer = Trainer(flow, density, learning_rate=STEP_SIZE, batch=BATCH)
            training = Training([], start.elbo, False, False, AT_ONCE_SAMPLED, 0, 0)
            run.take(assess(_stages.INITIAL, trainer, training, look=False), trainer)
            run.sampled = True
            accepted("MCMC instead of training")
    return run.sampled


def _is_several(plan: Plan, density: LogDensity, run: Run, seed: int, *, barrier: float = 0.0) -> bool:
    """Whether a mixture at all modes does in the place of a flow; several runs are for the flow's sake."""
    if not plan.escalate or plan.train_model or plan.runs > 1:
        return False
    with plan.clock.part(_stages.SEVERAL):
        first = run.best is None
        z = prior_draws(density, SURVEYED_FROM, seed=seed) if first else run.flow(plan, density).draw(SURVEYED_FROM)[0]
        weighing = None if run.best is None else run.best.weighing
        hopeless = weighing is not None and weighing.ess < ESS_SHARE_OF_NO_TOP * len(weighing.log_weights)
        run.several = several(density, z, seed=seed, bar=plan.bar, barrier=barrier, ridges=hopeless)
    if run.several is None:
        return False
    run.note(run.several.stage)
    if run.several.enough:
        accepted(run.several.stage.stage)
    return run.several.enough


def _race(plan: Plan, density: LogDensity, run: Run, starts: Sequence[Start], seed: int) -> Entrant | None:
    """Race starts and step sizes; return the winner, None if there was no time for a race."""
    flow = run.untrained = plan.fresh(density)
    trained = list(density.parameters().values()) if plan.train_model else []
    winner: Entrant | None = None
    with plan.clock.part(_stages.TRIALS, share=RACE_SHARE):
        winner, entrants = race(flow, density, starts, share(plan.max_steps), seed=seed, extra=trained)
        for entrant in entrants:
            run.note(entrant.stage)
    return winner


def _reporter(bar: Bar) -> Callable[[int, float, str], None]:
    return lambda done, elbo, state: bar.show(f"{done} steps, {in_nats(elbo)}{state}")
