"""A flow: which start and which step size, and a round of training."""

from __future__ import annotations

from collections.abc import Callable

from pyro_flows import _stages
from pyro_flows._progress import Bar, in_nats
from pyro_flows.fitting.attempt import Attempt
from pyro_flows.fitting.rounds import LOOKED_AT_DRAWS, acceptable_gap, assess, shift_is_noise, weighed
from pyro_flows.fitting.selection import Entrant, race, share
from pyro_flows.flows.flow import Flow
from pyro_flows.modes.propriety import improper_tails
from pyro_flows.training.loop import Budget, Look, train
from pyro_flows.training.trainer import Trainer
from pyro_flows.verdict.thresholds import SHIFT_SEEN, SHIFT_SEEN_IN_TRAINING

RACE_SHARE = 0.5  # of the seconds that are left, if there is a bound


def train_flow(at: Attempt) -> str | None:
    """Race the starts, and train the winner; the name of the round if it is enough."""
    winner = _race(at)
    if winner is None:
        return None
    _first_round(at, winner.trainer)
    assert at.run.best is not None
    return _stages.FIRST_ROUND if at.run.best.enough else None


def has_no_integral(at: Attempt, flow: Flow) -> bool:
    """Whether the posterior seems to be improper: then no training, and no sampler, comes to an end of it."""
    with at.plan.clock.part(_stages.PROPRIETY):
        at.run.improper = improper_tails(at.density, lambda: flow.draw(LOOKED_AT_DRAWS)[0], seed=at.seed)
    return bool(at.run.improper)


def _race(at: Attempt) -> Entrant | None:
    """Race starts and step sizes; return the winner, None if there was no time for a race."""
    plan, density = at.plan, at.density
    flow = at.run.untrained = plan.fresh(density)
    trained = list(density.parameters().values()) if plan.train_model else []
    winner: Entrant | None = None
    with plan.clock.part(_stages.TRIALS, share=RACE_SHARE):
        winner, entrants = race(flow, density, at.starts, share(plan.max_steps), seed=at.seed, extra=trained)
        for entrant in entrants:
            at.run.note(entrant.stage)
    return winner


def _first_round(at: Attempt, trainer: Trainer) -> None:
    """Train until there is nothing left to see in the weights, or until the guide stands still."""
    plan, density = at.plan, trainer.density

    def weigh() -> tuple[bool, float]:
        trainer.write()
        weighing = weighed(trainer.flow, density, LOOKED_AT_DRAWS)
        return shift_is_noise(weighing, seen=SHIFT_SEEN_IN_TRAINING * SHIFT_SEEN), weighing.ess / len(
            weighing.log_weights
        )

    def endless() -> bool:
        return has_no_integral(at, trainer.flow)

    stalls = plan.escalate and plan.refine is not None
    asked = endless if plan.escalate and density.structure.improper else None
    look = None if plan.train_model else Look(acceptable_gap(density.dim), weigh, stalls, asked)
    while True:
        left = Budget(plan.max_steps - len(trainer.losses), plan.clock)
        training = train(trainer, left, seed=at.seed, report=_reporter(plan.bar), look=look)
        outcome = assess(_stages.FIRST_ROUND, trainer, training)
        at.run.take(outcome, trainer)
        done = not training.early or plan.clock.over or (stalls and outcome.only_k_hat_fails)
        if done or shift_is_noise(outcome.weighing, seen=SHIFT_SEEN_IN_TRAINING * SHIFT_SEEN):
            return
        look = None


def _reporter(bar: Bar) -> Callable[[int, float, str], None]:
    return lambda done, elbo, state: bar.show(f"{done} steps, {in_nats(elbo)}{state}")
