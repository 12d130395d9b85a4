"""The optimization loop: warm-up, a steady stretch until nothing moves, a cool-down with averaging."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_flows._clock import Clock, unbounded
from pyro_flows._seeding import seeded
from pyro_flows.flows.flow import Flow
from pyro_flows.model.log_density import LogDensity
from pyro_flows.training.convergence import WINDOW, Monitor
from pyro_flows.training.trainer import LOOK_EVERY, Trainer

BATCH = 64
STEP_SIZE = 1e-2
WARM_UP = 50
CHECK_EVERY = 40
CHECK_DRAWS = 256
COOL_SHARE = 0.6
COOL_AT_LEAST = 600
COOL_AT_MOST = 1500
COOL_EARLY = 200  # steps, where a look at the weights ended the training
AVERAGED_SHARE = 0.2
ANNEAL_FROM = 0.01
FALL = 20.0  # nats below the best check: go back to it with half the step size

Report = Callable[[int, float, str], None]  # steps done, ELBO, state


@dataclass(frozen=True)
class Budget:
    """What bounds a training run: optimization steps, and the clock."""

    steps: int
    clock: Clock = field(default_factory=unbounded)

    def left(self, done: int) -> int:
        """Steps still allowed after ``done``; none once the time is over."""
        return 0 if self.clock.over else max(self.steps - done, 0)


@dataclass(frozen=True)
class Training:
    """What a run of the loop did."""

    losses: list[float]
    elbo: float
    converged: bool
    moving: bool  # did not converge, and means or sds still changed a lot
    why: str
    skipped: int
    falls: int
    early: bool = False  # a look at the weights ended it


@dataclass(frozen=True)
class Look:
    """What may end a training early: a larger sample of the flow whose weights leave nothing to see.

    Attributes:
        gap: nats between log evidence and ELBO by the draws of a check, up to which the sample is drawn.
        enough: draws it, and says whether it is good enough.
    """

    gap: float
    enough: Callable[[], bool]


@dataclass
class Check:
    """Functionals of the flow on one set of base draws."""

    flow: Flow
    density: LogDensity
    noise: Tensor

    @classmethod
    def make(cls, flow: Flow, density: LogDensity, *, seed: int) -> Check:
        """Draw the common noise."""
        with seeded(seed, density.device):
            return cls(flow, density, flow.base_distribution().sample((CHECK_DRAWS,)))

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return the images of the noise and their log weights."""
        z, ladj = self.flow.bijection.forward_and_ladj(self.noise)
        return z, self.density(z) - self.flow.base_distribution().log_prob(self.noise) + ladj

    def elbo(self) -> float:
        """Return the ELBO on the common noise, without the lowest terms."""
        return Monitor().add(*self())


def train(
    trainer: Trainer,
    budget: Budget,
    *,
    seed: int,
    report: Report,
    cool: int = COOL_AT_LEAST,
    settle: bool = True,
    name: str = "training",
    look: Look | None = None,
) -> Training:
    """Run until the functionals stand still, then cool the step size down and average; or until the budget ends.

    The cool-down takes ``cool`` steps at least; it begins earlier, and is shorter, where ``look`` finds nothing to
    mend. With ``settle=False`` the budget alone ends it, to see what stopping costs. Where the time ends or Ctrl-C
    comes on the way, the flow keeps what it has learned so far, and the clock the ``name`` of what was cut.
    """
    check = Check.make(trainer.flow, trainer.density, seed=seed)
    monitor, ratchet = Monitor(), _Ratchet(trainer, -math.inf)
    first = len(trainer.losses)  # a race may have gone before
    still, early, why, value = False, False, "no steps", -math.inf
    steady, done = _steady_share(budget.steps), 0
    with budget.clock.part(name):
        ratchet.best = value = check.elbo()
        while done < steady and budget.left(done) and not still and not early:
            trainer.step(trainer.learning_rate * min(1.0, (done + 1) / WARM_UP))
            done += 1
            if done % CHECK_EVERY == 0:
                trainer.write()
                value = monitor.add(*check())
                still, why = monitor.stationary() if settle else (False, "a budget alone ends it")
                ratchet.look(value)
                report(first + done, value, "converging")
                early = look is not None and not still and monitor.promises(look.gap) and look.enough()
        steps = min(budget.left(done), COOL_EARLY if early else max(cool, min(int(COOL_SHARE * done), COOL_AT_MOST)))
        value = _cool(trainer, budget, done, steps, check, ratchet, lambda *state: report(first + state[0], *state[1:]))
        why = f"the importance weights leave nothing to mend after {done} steps" if early else why
        still = still or early
        why = f"converged: {why}" if still else f"training did not converge in {done + steps} steps ({why})"
        state = still, not still and monitor.restless, why, trainer.skipped, ratchet.falls, early
        return Training(trainer.losses[first:], value, *state)
    ratchet.rescue()
    losses = trainer.losses[first:]
    why = f"training was stopped after {len(losses)} steps and did not converge" + (f" ({why})" if losses else "")
    moving = not still and (monitor.restless or len(monitor.elbos) < WINDOW)
    return Training(losses, value, False, moving, why, trainer.skipped, ratchet.falls)


class _Ratchet:
    """The parameters of the best check so far, to go back to with half the step size after a fall."""

    def __init__(self, trainer: Trainer, elbo: float) -> None:
        self.trainer, self.kept, self.best, self.falls = trainer, trainer.keep(), elbo, 0

    def look(self, elbo: float) -> float:
        """Keep the present parameters if they are the best, go back if they are far from it; return their ELBO."""
        if elbo >= self.best:
            self.kept, self.best = self.trainer.keep(), elbo
        elif not elbo > self.best - FALL:
            self.trainer.restore(self.kept)
            self.falls += 1
            return self.best
        return elbo

    def rescue(self) -> None:
        """Hand the present parameters to the flow without a check, or the kept ones where the last losses are worse."""
        last = self.trainer.losses[-LOOK_EVERY:]
        lost = last and not -sum(last) / len(last) > self.best - FALL
        self.trainer.assign(self.kept if lost else self.trainer.keep())


def anneal(trainer: Trainer, steps: int, *, report: Report) -> None:
    """Train on tempered densities, beta rising from 0.01 to 1 along a straight line in its logarithm."""
    for step in range(steps):
        trainer.beta = ANNEAL_FROM ** (1.0 - (step + 1) / steps)
        trainer.step(trainer.learning_rate * min(1.0, (step + 1) / WARM_UP))
        if (step + 1) % CHECK_EVERY == 0:
            report(step + 1, -trainer.losses[-1], f"tempering, beta {trainer.beta:.2f}")
    trainer.beta = 1.0
    trainer.write()


def _steady_share(steps: int) -> int:
    """How many of ``steps`` may pass before the cool-down has to begin."""
    return max(steps - max(COOL_AT_LEAST, int(steps * COOL_SHARE / (1.0 + COOL_SHARE))), steps // 2)


def _cool(
    trainer: Trainer, budget: Budget, done: int, steps: int, check: Check, ratchet: _Ratchet, report: Report
) -> float:
    """Lower the step size to zero along a cosine; average the last fifth, kept if the ELBO does not fall."""
    average: Tensor | None = None
    averaged = 0
    for step in range(steps):
        if not budget.left(done + step):
            break
        trainer.step(trainer.learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / steps)))
        if step >= (1.0 - AVERAGED_SHARE) * steps:
            averaged += 1
            average = trainer.keep() if average is None else average.lerp_(trainer.weights, 1.0 / averaged)
        if (step + 1) % CHECK_EVERY == 0:
            trainer.write()
            value = check.elbo()
            ratchet.look(value)
            report(done + step + 1, value, "cooling")
    trainer.write()
    last = ratchet.look(check.elbo())
    if average is None:
        return last
    kept = trainer.keep()
    trainer.assign(average)
    better = check.elbo()
    if not better >= last:
        trainer.assign(kept)
    return max(better, last)
