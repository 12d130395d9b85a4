"""The optimization loop: warm-up, a steady stretch until nothing moves, a cool-down with averaging."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.inference.training.convergence import WINDOW, Monitor
from pyro_flows.inference.training.trainer import LOOK_EVERY, Trainer
from pyro_flows.inference.verdict.deciding import COMPARED_DRAWS
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process import stages
from pyro_flows.support.process.clock import Clock, unbounded
from pyro_flows.support.process.journal import loop
from pyro_flows.support.process.seeding import seeded
from pyro_flows.support.thresholds import DENSITY_GAP_OF_LOST, ESS_SHARE_COLLAPSED

BATCH = 64  # draws of a step
STEP_SIZE = 1e-2  # of Adam
CHECK_EVERY = 40  # steps, and steps of warm-up before the first check; many flows are looked at twice as often
COOL_SHARE = 0.6  # of the steps before, for the cool-down
COOL = 600  # steps at least; half of them in a try and of many flows, a third where a look at the weights ended it
AVERAGED_SHARE = 0.2  # of a cool-down, the last steps

LIGHT = "weighting changes no result"
STALLED = "training ended early: the importance weights hardly improved"
STOPPED = "training was stopped"
ENDLESS = "training ended early: the posterior seems to be improper"
# values of a run that steps change
OWN = ("still", "why", "elbo", "kept", "best", "falls", "try_from", "share", "ask_from", "ended")

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
        weigh: draws it; returns whether it is good enough, and its effective share.
        stalls: whether training that raises this share by next to nothing is to end, since a sampler stands ready.
        endless: asks after 400 steps, 800 and so on whether the density has no finite integral, if there is reason to.
    """

    gap: float
    weigh: Callable[[], tuple[bool, float]]
    stalls: bool = False
    endless: Callable[[], bool] | None = None


class Check:
    """Functionals of the flow on one set of base draws."""

    def __init__(self, flow: Flow, density: LogDensity, *, seed: int) -> None:
        self.flow, self.density = flow, density
        with seeded(seed, density.device):
            self.noise = flow.base_distribution().sample((COMPARED_DRAWS,))

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
    settle: bool = True,
    look: Look | None = None,
) -> Training:
    """Run until the functionals stand still, then cool the step size down and average; or until the budget ends.

    The cool-down begins earlier, and is shorter, where ``look`` finds nothing to mend. What keeps the weights of a wide
    flow from that is often no more than the noise of its steps: so where the ELBO is level, a short cool-down is tried
    once, before the functionals stand still, and a look follows. Where training is to end as it stalls, this is done
    again after twice as many steps, and so on: it ends where the look is not better than the one before. With
    ``settle=False`` the budget alone ends it, to see what stopping costs. Where the time ends or Ctrl-C comes on the
    way, the flow keeps what it has learned so far.
    """
    check = Check(trainer.flow, trainer.density, seed=seed)
    return _Run(trainer, budget, check, report, look).train(settle=settle)


@dataclass
class _Cooling:
    """A cool-down under way: steps that were done before it, its own steps, and the average of its last fifth.

    Attributes:
        why: ``LIGHT`` if the training is over after it, ``STALLED`` if it is a try, ``""`` if it is the last one.
    """

    why: str
    begun: int
    steps: int
    past: int = 0
    averaged: int = 0
    average: Tensor | None = None

    def add(self, weights: Tensor) -> None:
        """Add the weights after a step to the average."""
        self.averaged += 1
        self.average = weights.clone() if self.average is None else self.average.lerp_(weights, 1.0 / self.averaged)


class _Run:
    """One run of the loop. All that it changes is in :meth:`_state`, so that it can go on after any step."""

    def __init__(self, trainer: Trainer, budget: Budget, check: Check, report: Report, look: Look | None) -> None:
        self.trainer, self.budget, self.check, self.report, self.look = trainer, budget, check, report, look
        self.monitor = Monitor()
        self.kept, self.best, self.falls = trainer.keep(), -math.inf, 0  # parameters and ELBO of the best check
        self.first = len(trainer.losses)  # another stretch may have gone before
        self.still, self.why, self.elbo = False, "no steps", -math.inf
        self.try_from, self.share, self.ask_from = 0.0, 0.0, 400
        self.cooling: _Cooling | None = None
        self.ended: str | None = None  # why, once it has; empty at the end of the last cool-down

    @property
    def done(self) -> int:
        return len(self.trainer.losses) - self.first

    def train(self, *, settle: bool) -> Training:
        """Do what :func:`train` says."""
        with self.budget.clock.part(stages.TRAINING), loop("training", self.trainer.weights) as kept:
            if not kept.take(self._put_back):
                self.best = self.elbo = self.check.elbo()
            while self.ended is None:
                self._go_on(settle)
                kept.offer(self._state)
            kept.end(self._state)
            return self._finished(self.ended)
        last = self.trainer.losses[-LOOK_EVERY:]  # no time for a check
        lost = last and not -sum(last) / len(last) > self.best - DENSITY_GAP_OF_LOST
        self.trainer.assign(self.kept if lost else self.trainer.keep())
        done, few = self.done, len(self.monitor.elbos) < WINDOW
        why = f"{STOPPED} after {done} steps and did not converge" + (f" ({self.why})" if done else "")
        return replace(self._result(False, why), moving=not self.still and (self.monitor.restless or few))

    def _go_on(self, settle: bool) -> None:
        """Take one step, or end a stretch of them."""
        trainer, done = self.trainer, self.done
        if self.cooling is not None:
            self._cool_on(self.cooling)
        elif done < _steady_share(self.budget.steps) and self.budget.left(done) and not self.still:
            trainer.step(trainer.learning_rate * min(1.0, (done + 1) / CHECK_EVERY))
            if self.done % CHECK_EVERY == 0:
                self._look_at_all(settle)
        else:
            self._cool("", max(COOL, min(int(COOL_SHARE * done), 1500)))

    def _look_at_all(self, settle: bool) -> None:
        """Look at the functionals, and at the weights: these may end the training, or begin a cool-down."""
        self.trainer.write()
        self.elbo = self.monitor.add(*self.check())
        self.still, self.why = self.monitor.stationary() if settle else (False, "a budget alone ends it")
        self._compare(self.elbo)
        self.report(self.first + self.done, self.elbo, "converging")
        if self.look is None or self.still:
            return
        if self.look.endless is not None and self.done >= self.ask_from:
            self.ask_from = 2 * self.done
            if self.look.endless():
                self.ended = ENDLESS
                return
        if self.monitor.promises(self.look.gap) and self.look.weigh()[0]:
            self._cool(LIGHT, COOL // 3)
        elif self.done >= self.try_from and self.monitor.level():
            self._cool(STALLED, COOL // 2)

    def _compare(self, elbo: float) -> float:
        """Keep the present parameters if they are the best, go back if they are far from it; return their ELBO.

        After a fall, the step size is halved.
        """
        if elbo >= self.best:
            self.kept, self.best = self.trainer.keep(), elbo
        elif not elbo > self.best - DENSITY_GAP_OF_LOST:
            self.trainer.restore(self.kept)
            self.falls += 1
            return self.best
        return elbo

    def _cool(self, why: str, steps: int) -> None:
        """Begin to lower the step size to zero."""
        self.cooling = _Cooling(why, self.done, min(self.budget.left(self.done), steps))

    def _cool_on(self, cooling: _Cooling) -> None:
        """Take one step on a cosine, or end the cool-down."""
        trainer, steps, past = self.trainer, cooling.steps, cooling.past
        if past == steps or not self.budget.left(cooling.begun + past):
            self._end_cooling(cooling)
            return
        trainer.step(trainer.learning_rate * 0.5 * (1.0 + math.cos(math.pi * past / steps)))
        cooling.past += 1
        if past >= (1.0 - AVERAGED_SHARE) * steps:
            cooling.add(trainer.weights)
        if cooling.past % CHECK_EVERY == 0:
            trainer.write()
            value = self.check.elbo()
            self._compare(value)
            self.report(self.first + cooling.begun + cooling.past, value, "cooling")

    def _end_cooling(self, cooling: _Cooling) -> None:
        """Keep the average if the ELBO does not fall; then go on, or end."""
        trainer, self.cooling = self.trainer, None
        trainer.write()
        self.elbo = self._compare(self.check.elbo())
        if cooling.average is not None:
            last, kept = self.elbo, trainer.keep()
            trainer.assign(cooling.average)
            better = self.check.elbo()
            if not better >= last:
                trainer.assign(kept)
            self.elbo = max(better, last)
        self.ended = self._tried() if cooling.why == STALLED else cooling.why

    def _tried(self) -> str | None:
        """Look at the weights after a try; return why the training is over, if they say so."""
        assert self.look is not None
        enough, share = self.look.weigh()
        stalled = self.look.stalls and share < self.share + ESS_SHARE_COLLAPSED
        self.try_from, self.share = 2 * self.done if self.look.stalls else math.inf, share
        return LIGHT if enough else STALLED if stalled else None

    def _finished(self, ended: str) -> Training:
        if ended in (STALLED, ENDLESS):
            return self._result(False, f"{ended} after {self.done} steps")
        if ended:
            return self._result(True, f"converged: {ended} after {self.done} steps", early=True)
        steps = f"training did not converge in {self.done} steps"
        return self._result(self.still, f"converged: {self.why}" if self.still else f"{steps} ({self.why})")

    def _result(self, still: bool, why: str, *, early: bool = False) -> Training:
        moving = not still and self.monitor.restless
        losses, trainer = self.trainer.losses[self.first :], self.trainer
        return Training(losses, self.elbo, still, moving, why, trainer.skipped, self.falls, early=early)

    def _state(self) -> dict[str, Any]:
        """Return all that steps change."""
        return {
            "own": {name: getattr(self, name) for name in OWN},
            "monitor": vars(self.monitor),
            "cooling": None if self.cooling is None else vars(self.cooling),
            "trainer": self.trainer.state(),
            "density": self.trainer.density.state(),
        }

    def _put_back(self, state: dict[str, Any]) -> None:
        vars(self).update(state["own"])
        self.monitor = Monitor(**state["monitor"])
        self.cooling = None if state["cooling"] is None else _Cooling(**state["cooling"])
        self.trainer.put_back(state["trainer"])
        self.trainer.density.put_back(state["density"])


def _steady_share(steps: int) -> int:
    """How many of ``steps`` may pass before the cool-down has to begin."""
    return max(steps - max(COOL, int(steps * COOL_SHARE / (1.0 + COOL_SHARE))), steps // 2)
