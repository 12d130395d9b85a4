"""The optimization loop: warm-up, a steady stretch until nothing moves, a cool-down with averaging."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_flows import _stages
from pyro_flows._clock import Clock, unbounded
from pyro_flows._seeding import seeded
from pyro_flows.flows.flow import Flow
from pyro_flows.model.log_density import LogDensity
from pyro_flows.training.convergence import WINDOW, Monitor
from pyro_flows.training.trainer import LOOK_EVERY, Trainer
from pyro_flows.verdict.thresholds import ESS_SHARE_RISE

BATCH = 64
STEP_SIZE = 1e-2
WARM_UP = 50
CHECK_EVERY = 40
CHECK_DRAWS = 256
COOL_SHARE = 0.6
COOL_AT_LEAST = 600
COOL_AT_MOST = 1500
COOL_TRIED = 300
COOL_EARLY = 200  # steps, where a look at the weights ended the training
AVERAGED_SHARE = 0.2
FALL = 20.0  # nats below the best check: go back to it with half the step size

AGAIN = 2  # times the steps that were done at a try, until the next one
ASKED_AFTER = 400  # steps, and again after twice as many: whether training can come to an end at all

LIGHT = "weighting changes no result"
STALLED = "training ended early: the importance weights hardly improved"
STOPPED = "training was stopped"
ENDLESS = "training ended early: the posterior seems to be improper"

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
    return _Run(trainer, budget, Check.make(trainer.flow, trainer.density, seed=seed), report, look).train(
        settle=settle
    )


class _Run:
    """One run of the loop."""

    def __init__(self, trainer: Trainer, budget: Budget, check: Check, report: Report, look: Look | None) -> None:
        self.trainer, self.budget, self.check, self.report, self.look = trainer, budget, check, report, look
        self.monitor, self.ratchet = Monitor(), _Ratchet(trainer, -math.inf)
        self.first = len(trainer.losses)  # a race may have gone before
        self.still, self.why, self.elbo = False, "no steps", -math.inf
        self.try_from, self.share, self.ask_from = 0.0, 0.0, ASKED_AFTER

    @property
    def done(self) -> int:
        return len(self.trainer.losses) - self.first

    def train(self, *, settle: bool) -> Training:
        """Do what :func:`train` says."""
        budget, trainer = self.budget, self.trainer
        with budget.clock.part(_stages.TRAINING):
            self.ratchet.best = self.elbo = self.check.elbo()
            early, steady = "", _steady_share(budget.steps)
            while self.done < steady and budget.left(self.done) and not self.still and not early:
                trainer.step(trainer.learning_rate * min(1.0, (self.done + 1) / WARM_UP))
                if self.done % CHECK_EVERY == 0:
                    early = self._checked(settle)
            if early in (STALLED, ENDLESS):
                return self._ended(False, f"{early} after {self.done} steps")
            if early:
                return self._ended(True, f"converged: {early} after {self.done} steps", early=True)
            self._cool(max(COOL_AT_LEAST, min(int(COOL_SHARE * self.done), COOL_AT_MOST)))
            steps = f"training did not converge in {self.done} steps"
            return self._ended(self.still, f"converged: {self.why}" if self.still else f"{steps} ({self.why})")
        self.ratchet.rescue()
        done, few = self.done, len(self.monitor.elbos) < WINDOW
        why = f"{STOPPED} after {done} steps and did not converge" + (f" ({self.why})" if done else "")
        return replace(self._ended(False, why), moving=not self.still and (self.monitor.restless or few))

    def _checked(self, settle: bool) -> str:
        """Look at the functionals, and at the weights; return why the training is over, if the weights say so."""
        self.trainer.write()
        self.elbo = self.monitor.add(*self.check())
        self.still, self.why = self.monitor.stationary() if settle else (False, "a budget alone ends it")
        self.ratchet.look(self.elbo)
        self.report(self.first + self.done, self.elbo, "converging")
        if self.look is None or self.still:
            return ""
        if self.look.endless is not None and self.done >= self.ask_from:
            self.ask_from = AGAIN * self.done
            if self.look.endless():
                return ENDLESS
        if self.monitor.promises(self.look.gap) and self.look.weigh()[0]:
            self._cool(COOL_EARLY)
            return LIGHT
        return self._tried(self.look) if self.done >= self.try_from and self.monitor.level() else ""

    def _tried(self, look: Look) -> str:
        """Cool down for a while, and look at the weights; return why the training is over, if they say so."""
        self._cool(COOL_TRIED)
        enough, share = look.weigh()
        stalled = look.stalls and share < ESS_SHARE_RISE * self.share
        self.try_from, self.share = AGAIN * self.done if look.stalls else math.inf, share
        return LIGHT if enough else STALLED if stalled else ""

    def _cool(self, steps: int) -> None:
        done = self.done

        def told(past: int, elbo: float) -> None:
            self.report(self.first + done + past, elbo, "cooling")

        steps = min(self.budget.left(done), steps)
        self.elbo = _cool(self.trainer, self.budget, done, steps, self.check, self.ratchet, told)

    def _ended(self, still: bool, why: str, *, early: bool = False) -> Training:
        moving = not still and self.monitor.restless
        losses, trainer = self.trainer.losses[self.first :], self.trainer
        return Training(losses, self.elbo, still, moving, why, trainer.skipped, self.ratchet.falls, early=early)


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


def _steady_share(steps: int) -> int:
    """How many of ``steps`` may pass before the cool-down has to begin."""
    return max(steps - max(COOL_AT_LEAST, int(steps * COOL_SHARE / (1.0 + COOL_SHARE))), steps // 2)


def _cool(
    trainer: Trainer,
    budget: Budget,
    done: int,
    steps: int,
    check: Check,
    ratchet: _Ratchet,
    report: Callable[[int, float], None],
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
            report(step + 1, value)
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
