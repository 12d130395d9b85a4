"""Maximum likelihood by minibatches: a steady stretch until validation stands still, then a cool-down."""

from __future__ import annotations

import math
from collections.abc import Callable

from pyro_flows._interrupts import STATE
from pyro_flows.density_estimation.ascent import Ascent
from pyro_flows.density_estimation.schedule import WARM_UP, Plan, State, by_budget, factor

COOL_SHARE = 0.6  # of the steps so far, for a cool-down that validation asked for
PATIENCE_SHARE = 0.3
PATIENT_CHECKS = 8
CHECK_COST = 0.05  # share of the work that goes into checks
AVERAGE_EVERY = 5
FALL = 20.0  # nats a dimension below the best check: go back to it with half the step size

Report = Callable[[str, int, float, float], None]  # state, epochs, progress in [0, 1], validation or training nats


def climb(ascent: Ascent, plan: Plan, *, report: Report, save: Callable[[], None] = lambda: None) -> None:
    """Train until validation no longer improves or the budget ends, and leave the best weights in the flow."""
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
                report("cooling" if state.cool_from >= 0 else "settling", state.epoch, progress, _shown(state))
        else:
            state.epoch += 1
            save()
    _finish(ascent)


def _check_every(ascent: Ascent) -> int:
    """Steps between checks, so that checks (forward passes only, a third of a step's work) cost a twentieth."""
    if not ascent.held_out:
        return 50
    points = sum(len(y) for y, _ in ascent.held_out)
    return max(20, math.ceil(points / (3 * ascent.batch) / CHECK_COST))


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
    patience = max(PATIENCE_SHARE * state.steps, PATIENT_CHECKS * _check_every(ascent))
    if state.steps - state.best_step > patience:
        state.why = "validation no longer improved"
        state.cool_top = 0.3 * by_budget(state, progress)
        state.cool_from, state.cool_steps = state.steps, max(int(COOL_SHARE * state.best_step), 2 * WARM_UP)
        _go_back(ascent)


def _go_back(ascent: Ascent) -> None:
    ascent.assign(ascent.best_weights)
    ascent.average = ascent.keep()
    ascent.state.averaged = 0
    ascent.state.norm = 0.0
    ascent.fresh_moments()


def _finish(ascent: Ascent) -> None:
    """Leave the best of last weights, their average and the best check in the flow."""
    state = ascent.state
    if not ascent.held_out:
        ascent.assign(ascent.average)
        return
    last = ascent.keep()
    tried = [(ascent.validate(last), last), (ascent.validate(ascent.average), ascent.average)]
    state.best, weights = max([*tried, (state.best, ascent.best_weights)], key=lambda pair: pair[0])
    state.checks.append((state.steps, state.best))
    ascent.assign(weights)


def _shown(state: State) -> float:
    return state.checks[-1][1] if state.checks else -sum(state.losses[-50:]) / len(state.losses[-50:])
