"""What is not given: how many points a step takes, the step size and the weight decay."""

from __future__ import annotations

import math

from pyro_flows import _checks
from pyro_flows.density_estimation.ascent import RACE_STEPS, RACED, Ascent, widest
from pyro_flows.density_estimation.points import Rows, Source
from pyro_flows.density_estimation.schedule import Plan

MAX_STEPS = 20_000
DECAY = 1e-4  # of weights a point of data, each epoch,
FORGOTTEN = 10.0  # and so often in a training at most
BATCH = 256
LONG = 1000  # steps, from which on the step size falls with the square root of their number,
SMALL_ENOUGH = 2e-3  # down to this


def batch_size(train: Source, batch: int | None) -> int:
    """Return how many points a step takes: what is asked for, or a tenth of few data."""
    if batch is not None:
        return _checks.integer("batch", batch, 1)
    return max(32, min(BATCH, len(train) // 10)) if isinstance(train, Rows) else BATCH


def choose(ascent: Ascent, learning_rate: float | None, weight_decay: float | None, plan: Plan) -> None:
    """Set what is not given: the step size by a race of about a fifth of the budget at most, the decay by the budget.

    A short race is won by a step size that is too large for thousands of steps, so it is less for long trainings, down
    to `SMALL_ENOUGH`; and units of wide networks die of it, so those of width W race up to 1 / W only. (That Adam's
    step size should go as 1 / W: Yang et al. 2021, *Tuning large neural networks via zero-shot hyperparameter
    transfer*.)
    """
    ahead = plan.max_steps
    if math.isfinite(plan.max_seconds):
        ahead = min(ahead, int(plan.max_seconds / ascent.seconds_a_step(plan.clock)))
    counted = min(ahead, MAX_STEPS)  # for the decay: validation seldom lets more pass
    ascent.set_weight_decay(_decay(ascent, counted) if weight_decay is None else weight_decay)
    if learning_rate is None:
        scale = min(1.0, 1.0 / (widest(ascent.flow) * max(RACED)))
        ascent.race([scale * candidate for candidate in RACED], max(min(RACE_STEPS, ahead // (5 * len(RACED))), 8))
        found = ascent.state.learning_rate
        learning_rate = max(found * min(1.0, math.sqrt(LONG / max(ahead, 1))), min(found, SMALL_ENOUGH))
    ascent.state.learning_rate = learning_rate
    if weight_decay is None:
        limit = FORGOTTEN / (learning_rate * max(counted, 1))
        ascent.set_weight_decay(min(ascent.state.weight_decay, limit))


def _decay(ascent: Ascent, ahead: int) -> float:
    """Return the weight decay for a number of steps ahead.

    An image counts as often as it has pixels, at each of which convolutions use all their weights.
    """
    weights, epoch = sum(parameter.numel() for parameter in ascent.parameters), ascent.source.steps(ascent.batch)
    points = epoch * ascent.batch * math.prod(ascent.flow.event_shape[1:])
    return min(1.0, DECAY * weights / points * ahead / epoch)
