"""Training of a flow in a fit: the choice of start and learning rate, and one round of training."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pyro_flows import _stages
from pyro_flows._progress import in_nats
from pyro_flows.fitting.rounds import assess, weighed
from pyro_flows.fitting.state import SHARE_OF_SECONDS, Run
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.recipe import begin_at
from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.propriety import improper_tails
from pyro_flows.results.record import Stage
from pyro_flows.starts.gaussians import CLOSE, Start, divergence
from pyro_flows.training.convergence import Monitor
from pyro_flows.training.loop import BATCH, CHECK_EVERY, STEP_SIZE, Budget, Check, Look, train
from pyro_flows.training.trainer import Trainer
from pyro_flows.verdict.deciding import LOOKED_AT_DRAWS, acceptable_gap, shift_is_noise
from pyro_flows.verdict.thresholds import EVIDENCE_GAP_OF_TRIALS

STEP_SIZES = (STEP_SIZE, 3e-3)


class Entrant(NamedTuple):
    """A start and a step size after a few steps, on a flow of its own, and the ELBO that they reached."""

    start: Start
    trainer: Trainer
    elbo: float
    gap: float  # between log evidence and ELBO, by the same draws

    @classmethod
    def run(
        cls, fresh: Flow, density: LogDensity, start: Start, size: float, steps: int, *, seed: int,
        extra: Sequence[Tensor] = (),
    ) -> Entrant:  # fmt: skip
        flow = copy.deepcopy(fresh)
        begin_at(flow, start.loc, start.scale)
        trainer = Trainer(flow, density, learning_rate=size, batch=BATCH, extra=extra)
        monitor = Monitor()
        with density.clock.part(_stages.TRIAL):
            for step in range(steps):
                trainer.step(size * min(1.0, (step + 1) / CHECK_EVERY))
            trainer.write()
            monitor.add(*Check(flow, density, seed=seed)())
        finished = bool(monitor.elbos)
        return cls(start, trainer, *((monitor.elbos[0], monitor.gaps[0]) if finished else (-math.inf, math.inf)))


def share(max_steps: int) -> int:
    """Steps of each entrant, a warm-up and as many; all of them together take at most half of the budget."""
    return max(1, min(2 * CHECK_EVERY, max_steps // (2 * (len(STEP_SIZES) + 1))))


def race(
    fresh: Flow, density: LogDensity, starts: Sequence[Start], steps: int, *, seed: int, extra: Sequence[Tensor]
) -> tuple[Entrant, list[Entrant]]:
    """Run the best start, with a second step size if need be, and the widest of the others that are close.

    Returns the winner, and all. A wide start can still come to see what a narrow one has left out; one that is no
    wider, or next to the same, cannot. Each trains a copy of the flow. With ``extra``, the model's own parameters, one
    entrant trains them for good.
    """

    def enter(start: Start, size: float) -> Entrant:
        return Entrant.run(fresh, density, start, size, steps, seed=seed, extra=extra)

    done = [enter(starts[0], STEP_SIZES[0])]
    if not extra and not done[0].gap < EVIDENCE_GAP_OF_TRIALS:
        done += [enter(starts[0], size) for size in STEP_SIZES[1:]]
    if not extra:
        done += [enter(start, STEP_SIZES[0]) for start in _wider(starts[0], starts[1:])]
    best = max(done, key=lambda entrant: entrant.elbo if math.isfinite(entrant.elbo) else -math.inf)
    return best, done


def _wider(best: Start, others: Sequence[Start]) -> list[Start]:
    """Return the widest of other starts that are close, if it reaches where the best one does not."""
    close = [start for start in others if best.elbo - start.elbo < CLOSE and start.volume > best.volume]
    widest = max(close, key=lambda start: start.volume, default=None)
    return [] if widest is None or divergence(widest, best) < EVIDENCE_GAP_OF_TRIALS else [widest]


def train_flow(run: Run) -> str | None:
    """Race the starts, and train the winner; the name of the round if it is enough."""
    plan, density = run.plan, run.density
    flow = run.untrained = plan.fresh(density)
    trained = list(density.parameters().values()) if plan.train_model else []
    winner: Entrant | None = None
    with plan.clock.part(_stages.TRIALS, share=SHARE_OF_SECONDS):
        winner, entrants = race(flow, density, run.starts, share(plan.max_steps), seed=run.seed, extra=trained)
        for start, trainer, elbo, _ in entrants:
            size, before = trainer.learning_rate, start.elbo
            run.note(Stage(_stages.TRIAL_RUN, start=start.name, step_size=size, start_elbo=before, elbo=elbo))
    if winner is None:  # there was no time for a race
        return None
    _first_round(run, winner.trainer)
    return _stages.FIRST_ROUND if run.best is not None and run.best.enough else None


def is_improper(run: Run, flow: Flow | None = None) -> str | None:
    """Whether the posterior seems to be improper: then no training, and no sampler, comes to an end of it."""
    drawn = run.flow() if flow is None else flow
    with run.plan.clock.part(_stages.PROPRIETY):
        run.improper = improper_tails(run.density, lambda: drawn.draw(LOOKED_AT_DRAWS)[0], seed=run.seed)
    return _stages.PROPRIETY if run.improper else None


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
        outcome = assess(_stages.FIRST_ROUND, trainer, training)
        run.take(outcome, trainer)
        done = not training.early or plan.clock.over or (stalls and outcome.only_k_hat_fails)
        if done or shift_is_noise(outcome.weighing):
            return
        look = None
