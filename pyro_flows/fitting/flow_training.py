"""Training of a flow in a fit: one round."""

from __future__ import annotations

from pyro_flows import _stages
from pyro_flows._progress import in_nats
from pyro_flows.fitting.rounds import assess, weighed
from pyro_flows.fitting.state import Run
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.recipe import begin_at
from pyro_flows.modes.propriety import improper_tails
from pyro_flows.training.loop import BATCH, CHECK_EVERY, STEP_SIZE, Budget, Look, train
from pyro_flows.training.trainer import Trainer
from pyro_flows.verdict.deciding import LOOKED_AT_DRAWS, acceptable_gap, shift_is_noise

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
    with plan.clock.part(_stages.TRAINING, noted=False):
        for step in range(max(1, min(UNWATCHED, plan.max_steps // 6))):
            trainer.step(STEP_SIZE * min(1.0, (step + 1) / CHECK_EVERY))
    _first_round(run, trainer)
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
