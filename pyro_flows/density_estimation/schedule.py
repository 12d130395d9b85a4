"""The step size of a maximum-likelihood training over its budget, and where the training stands."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pyro_flows._interrupts import STATE

WARM_UP = 40
INTERRUPTED = "interrupted"  # begins the reason of such an end
STEADY_SHARE = 0.2  # of what is left of a budget after the race; the rest is for the cool-down


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


@dataclass
class State:
    """Where a run stands, but for weights and moments; plain numbers, so that it can be written to a checkpoint."""

    learning_rate: float = 0.0
    weight_decay: float = 0.0
    spent: float = 0.0  # share of the budget that went before the first step
    steps: int = 0
    epoch: int = 0
    seconds: float = 0.0
    norm: float = 0.0
    skipped: int = 0
    falls: int = 0
    averaged: int = 0
    best: float = -math.inf
    best_step: int = 0
    cool_from: float = -1.0  # progress or steps at which the cool-down began; below 0: not yet
    cool_steps: int = 0  # its length, where validation asked for it; 0 where the budget did
    cool_top: float = 1.0  # the share of the step size that it began with
    done: bool = False
    why: str = ""
    losses: list[float] = field(default_factory=list)
    checks: list[tuple[int, float]] = field(default_factory=list)  # steps, nats on validation

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C or another signal has ended the run."""
        return self.why.startswith(INTERRUPTED)

    def interrupt(self) -> None:
        """End the run, since a signal came."""
        self.done, self.why = True, f"{INTERRUPTED} ({STATE.name}) after {self.steps} steps"


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


def trapeze(share: float) -> float:
    """Rise over the first quarter, stay, fall over the last third."""
    return min(1.0, 4.0 * share, max(3.0 * (1.0 - share), 0.02))
