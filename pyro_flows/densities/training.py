"""Maximum likelihood by minibatches: what is not given, a steady stretch, and a cool-down."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from pyro_flows.densities.ascent import RACE_STEPS, RACED, Ascent, State, widest
from pyro_flows.densities.points import Source, Stream
from pyro_flows.flows.flow import Flow
from pyro_flows.support import checks
from pyro_flows.support.process.interrupts import STATE

MAX_STEPS = 20_000
DECAY = 1e-4  # of weights a point of data, each epoch,
FORGOTTEN = 10.0  # and so often in a training at most
BATCH = 256
LONG = 1000  # steps, from which on the step size falls with the square root of their number,
SMALL_ENOUGH = 2e-3  # down to this
WARM_UP = 40  # steps
STEADY_SHARE = 0.2  # of what is left of a budget after the race; the rest is for the cool-down
COOL_SHARE = 0.6  # of the steps so far, for a cool-down that validation asked for
PATIENCE_SHARE = 0.3
PATIENT_CHECKS = 8
PATIENT_STEPS = 320  # at least: on a plateau, networks take some hundred steps before held-out points gain
CHECK_COST = 0.05  # share of the work that goes into checks
AVERAGE_EVERY = 5
KEPT = "the start was kept, since the gain on held-out points is within its standard error"
FALL = 20.0  # nats a dimension below the best check: go back to it with half the step size

Report = Callable[[str, int, float, float], None]  # state, epochs, progress in [0, 1], validation or training nats


@dataclass(frozen=True)
class Plan:
    """What bounds a run."""

    max_steps: int
    max_seconds: float = math.inf
    clock: Callable[[], float] = time.monotonic
    began: float = 0.0

    def progress(self, steps: int) -> float:
        """Return the share of the budget that is used, 1 or more at its end."""
        return max(steps / self.max_steps, (self.clock() - self.began) / self.max_seconds)


def batch_size(train: Source, batch: int | None) -> int:
    """Return how many points a step takes: what is asked for, or a tenth of few data; or a loader's own batches."""
    if isinstance(train, Stream):
        if batch is not None:
            raise ValueError("batch: a DataLoader has batches of its own; leave it out, or pass the data themselves.")
        return train.batch
    if batch is not None:
        return checks.integer("batch", batch, 1)
    return max(32, min(BATCH, len(train) // 10))


def choose(ascent: Ascent, learning_rate: float | None, weight_decay: float | None, plan: Plan) -> None:
    """Set what is not given: the step size by a race of about a fifth of the budget at most, the decay by the budget.

    A short race is won by a step size that is too large for thousands of steps, so it is less for long trainings, down
    to `SMALL_ENOUGH`, but for a mixture alone, which such a step size leaves on plateaus, at a linear regression. Units
    of wide networks die of a large one, so those of width W race up to 1 / W only. (That Adam's
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
        learning_rate = found = ascent.state.learning_rate
        if not is_mixture_alone(ascent.flow):
            learning_rate = max(found * min(1.0, math.sqrt(LONG / max(ahead, 1))), min(found, SMALL_ENOUGH))
    ascent.state.learning_rate = learning_rate
    if weight_decay is None:
        limit = FORGOTTEN / (learning_rate * max(counted, 1))
        ascent.set_weight_decay(min(ascent.state.weight_decay, limit))


def is_mixture_alone(flow: Flow) -> bool:
    """Whether a mixture given a context has all of the shape: the default of one output."""
    return flow.mixture is not None and flow.context_dim > 0 and flow.dim == 1


def _decay(ascent: Ascent, ahead: int) -> float:
    """Return the weight decay for a number of steps ahead.

    An image counts as often as it has pixels, at each of which convolutions use all their weights. A mixture alone has
    none: held-out points end its training as well, and narrow noise about a curve needs large weights.
    """
    if is_mixture_alone(ascent.flow):
        return 0.0
    weights, epoch = sum(parameter.numel() for parameter in ascent.parameters), ascent.source.steps(ascent.batch)
    points = epoch * ascent.batch * math.prod(ascent.flow.event_shape[1:])
    return min(1.0, DECAY * weights / points * ahead / epoch)


def factor(state: State, progress: float) -> float | None:
    """Return the share of the step size to take now, none at the end; begin the cool-down that the budget asks for."""
    if progress >= 1.0:
        state.why = state.why or "the budget ended it"
        return None
    if state.cool_steps:
        done = (state.steps - state.cool_from) / state.cool_steps
        return None if done >= 1.0 else state.cool_top * _cosine(done)
    return by_budget(state, progress)


def by_budget(state: State, progress: float) -> float:
    """Return the share of the step size: it rises, stays for a fifth of what is left and falls along a cosine."""
    if progress < state.spent + STEADY_SHARE * (1.0 - state.spent):
        return min(1.0, (state.steps + 1) / WARM_UP)
    if state.cool_from < 0:
        state.cool_from = progress
    return _cosine((progress - state.cool_from) / (1.0 - state.cool_from))


def _cosine(share: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(max(share, 0.0), 1.0)))


def climb(
    ascent: Ascent, plan: Plan, *, report: Report, save: Callable[[], None] = lambda: None, stacked: bool = False
) -> None:
    """Train until validation no longer improves or the budget ends, and leave the best weights in the flow.

    ``stacked``: the start will be mixed in by what held-out points say, so it is not kept instead.
    """
    state = ascent.state
    if state.done:
        return
    every = _check_every(ascent)
    if state.steps == 0:
        state.spent = min(plan.progress(0), 1.0)
        if ascent.held_out and not math.isfinite(state.best):
            state.best = ascent.validate()
    while not state.done:
        for y, context in ascent.source.shuffled(ascent.batch):
            progress = plan.progress(state.steps)
            if STATE.take():
                state.interrupt()
                break
            share = factor(state, progress)
            if share is None:
                state.done = True
                break
            state.losses.append(ascent.step(y, context, state.learning_rate * share))
            state.steps += 1
            if state.steps % AVERAGE_EVERY == 0:
                ascent.update_average()
            if state.steps % every == 0:
                _check(ascent, progress)
                nats = state.checks[-1][1] if state.checks else -sum(state.losses[-50:]) / len(state.losses[-50:])
                report("cooling" if state.cool_from >= 0 else "settling", state.epoch, progress, nats)
        else:
            state.epoch += 1
            save()
    _finish(ascent, stacked)


def _check_every(ascent: Ascent) -> int:
    """Steps between checks, so that checks (forward passes only, a third of a step's work) cost a twentieth."""
    points = sum(len(y) for y, _ in ascent.held_out)
    return max(20, math.ceil(points / (3 * ascent.batch) / CHECK_COST)) if points else 50


def _check(ascent: Ascent, progress: float) -> None:
    """Measure validation, keep the best weights, and begin the cool-down once it has stood still."""
    state = ascent.state
    if not ascent.held_out:
        return
    value = ascent.validate(ascent.average)
    state.checks.append((state.steps, value))
    if value > state.best:
        state.best, state.best_step, ascent.best_weights = value, state.steps, [w.clone() for w in ascent.average]
        return
    if state.cool_steps:
        return
    if not value > state.best - FALL * ascent.dim and state.falls < 8:
        _go_back(ascent)
        state.falls += 1
        state.learning_rate *= 0.5
        return
    patience = max(PATIENCE_SHARE * state.steps, PATIENT_CHECKS * _check_every(ascent), PATIENT_STEPS)
    if state.steps - state.best_step > patience:
        state.why = "validation no longer improved"
        state.cool_top = 0.3 * by_budget(state, progress)
        state.cool_from, state.cool_steps = state.steps, max(int(COOL_SHARE * state.best_step), 2 * WARM_UP)
        _go_back(ascent)


def _go_back(ascent: Ascent) -> None:
    ascent.assign(ascent.best_weights)
    ascent.average, ascent.state.averaged, ascent.state.norm = ascent.keep(), 0, 0.0
    ascent.fresh_moments()


def _finish(ascent: Ascent, stacked: bool) -> None:
    """Leave the best of last weights, their average and the best check in the flow, or the start if none is better."""
    state = ascent.state
    if not ascent.held_out:
        ascent.assign(ascent.average)
        return
    tried = [(ascent.validate(weights), weights) for weights in (ascent.keep(), ascent.average)]
    state.best, weights = max([*tried, (state.best, ascent.best_weights)], key=lambda pair: pair[0])
    if not stacked and ascent.gains_nothing(weights):
        weights, state.best = ascent.start, ascent.validate(ascent.start)
        state.why = f"{state.why}; {KEPT}" if state.why else KEPT
    state.checks.append((state.steps, state.best))
    ascent.assign(weights)
