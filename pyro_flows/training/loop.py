"""The optimisation loop: warm-up, a steady stretch until nothing moves, a cool-down with averaging."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_flows._clock import Clock, unbounded
from pyro_flows._fallbacks import fallback, first_line
from pyro_flows._seeding import seeded
from pyro_flows.flows.flow import Flow
from pyro_flows.model.log_density import LogDensity
from pyro_flows.objectives import BasePoints, elbo, pulled
from pyro_flows.training.adam import Moments, advance
from pyro_flows.training.convergence import WINDOW, Monitor
from pyro_flows.training.flow_graphs import gradient_of
from pyro_flows.training.step_graph import Step

BATCH = 64
STEP_SIZE = 1e-2
WARM_UP = 50
CHECK_EVERY = 40
CHECK_DRAWS = 256
COOL_SHARE = 0.6
COOL_AT_LEAST = 600
COOL_AT_MOST = 1500
AVERAGED_SHARE = 0.2
BLEND = 0.5
BLEND_FROM_ESS = 0.3
DEFENSIVE = 0.3
LOOK_EVERY = 10  # steps between two looks at what they have come to, since a look makes a GPU wait
EAGER_STEPS = 10  # a shorter run would not pay for recording
ANNEAL_FROM = 0.01
FALL = 20.0  # nats below the best check: go back to it with half the step size

Report = Callable[[int, float, str], None]  # steps done, ELBO, state


@dataclass(frozen=True)
class Budget:
    """What bounds a training run: optimisation steps, and the clock."""

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
    moving: bool  # cut short while means and sds still moved a lot
    why: str
    skipped: int
    falls: int


class Trainer:
    """Adam on the flow's parameters (and the model's, with ``extra``), one state for all stages of a run.

    The parameters live in one vector here, and each step is arithmetic on it; :meth:`write` hands them to the flow.
    Nothing in a step waits for a result, so that a GPU is kept busy. Gradients are clipped at five times their running
    norm; steps whose gradient is not finite are skipped and counted. Recorded steps after them leave out draws at which
    the flow or the density is not finite, until there are none.
    """

    def __init__(
        self,
        flow: Flow,
        density: LogDensity,
        *,
        learning_rate: float,
        batch: int,
        extra: Sequence[Tensor] = (),
        compile: bool | None = None,
    ) -> None:
        self.flow, self.density, self.batch, self.learning_rate = flow, density, batch, learning_rate
        self.extra, self.compile = list(extra), compile if density.clock.compiles else False
        self.parameters = [*(part for part in flow.parameters() if part.requires_grad), *self.extra]
        self.weights = torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])
        ends = self.weights.split([parameter.numel() for parameter in self.parameters])
        self._views = [part.view(parameter.shape) for part, parameter in zip(ends, self.parameters, strict=True)]
        self._points = BasePoints(flow)
        self._drawn: list[tuple[Tensor, Tensor]] = []
        self._step: Step | None = None
        self._recordable = not self.extra
        self.evaluation = "eager"
        self.moments = Moments.fresh(self.weights)
        self.beta = 1.0
        self._losses: list[float] = []
        self._pending: list[Tensor] = []
        self._blend, self._careful, self._skips_seen = 0.0, False, 0
        self._left_out = torch.zeros((), dtype=torch.long, device=self.weights.device)

    # state ----------------------------------------------------------------------------------------------------------

    @property
    def losses(self) -> list[float]:
        """The negative ELBO of each step so far."""
        if self._pending:
            self._losses += torch.stack(self._pending).tolist()
            self._pending = []
        return self._losses

    @losses.setter
    def losses(self, before: list[float]) -> None:
        self._losses, self._pending = before, []

    @property
    def skipped(self) -> int:
        """How many steps had a gradient that is not finite."""
        return int(self.moments.skipped)

    def write(self) -> None:
        """Hand the parameters to the flow (and the model)."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self._views)

    def keep(self) -> Tensor:
        """Return a copy of all parameters."""
        return self.weights.clone()

    def assign(self, kept: Tensor) -> None:
        """Take parameters from a copy."""
        self.weights.copy_(kept)
        self.write()

    def restore(self, kept: Tensor) -> None:
        """Go back to a copy, forget the optimiser's moments and halve the step size."""
        self.assign(kept)
        self.learning_rate *= 0.5
        self.moments = self.moments.forget()

    # steps ----------------------------------------------------------------------------------------------------------

    def step(self, learning_rate: float) -> None:
        """Take one step, or find out that the time is over."""
        self.density.clock.look()
        if self.extra:
            self._advance(*self._elbo(), learning_rate)
            return
        if not self._drawn:
            self._look()
        x, log_thinning = self._drawn.pop()
        if self._step is None:
            self._advance(*self._path(x, log_thinning), learning_rate)
            return
        if self._careful:
            possible = self._step.possible(x)
            self._left_out += torch.logical_not(possible).sum()
            x = torch.where(possible[:, None], x, 0.0)
            log_thinning = torch.where(possible, log_thinning, -torch.inf)
        options = (learning_rate, self._blend, self.beta)
        loss, weights, self.moments = self._step(self.weights, self.moments, x, log_thinning, *options)
        self.weights.copy_(weights)
        self._pending.append(loss)

    def _look(self) -> None:
        """See what the steps have come to, and draw the base points of the next ones."""
        done, skipped = len(self._losses) + len(self._pending), self.skipped
        self._blend = BLEND if float(self.moments.ess) > BLEND_FROM_ESS else 0.0
        self._careful = skipped > self._skips_seen or bool(self._left_out)
        self._skips_seen = skipped
        self._left_out.zero_()
        if self._recordable and done >= EAGER_STEPS:
            self._record()
        x, log_thinning = self._points(LOOK_EVERY * self.batch, DEFENSIVE if self._blend else 0.0)
        self._drawn = list(zip(x.split(self.batch), log_thinning.split(self.batch), strict=True))

    @torch.no_grad()
    def _advance(self, gradient: Tensor, terms: Tensor, log_weights: Tensor, learning_rate: float) -> None:
        state = (self.weights, self.moments, gradient, terms, log_weights, learning_rate)
        loss, weights, self.moments = advance(*state)
        self.weights.copy_(weights)
        self._pending.append(loss)

    def _path(self, x: Tensor, log_thinning: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the path gradient by autograd, the ELBO's terms and the log weights."""
        self.write()
        z, log_q, score_q = self.flow.sample_with_score(at=x)
        log_p, score_p = self.density.value_and_grad(z)
        options = {"forward": self._blend, "beta": self.beta}
        pull, terms, log_weights = pulled(log_p, score_p, log_q, score_q, log_thinning, **options)
        return gradient_of((pull * z).sum(), self.parameters), terms, log_weights

    def _elbo(self) -> tuple[Tensor, Tensor, Tensor]:
        self.write()
        estimate = elbo(self.flow, self.density, self.batch)
        return gradient_of(estimate.loss, self.parameters), estimate.terms, estimate.log_weights

    def _record(self) -> None:
        self._recordable = False
        like = self.weights.new_zeros(self.batch, self.flow.dim)
        self.write()
        try:
            with self.density.clock.watching():
                self._step = Step(self.flow, self.density, like, self.weights, self._views, compile=self.compile)
            self.evaluation = "recorded"
        except Exception as error:  # a layer's own code may raise anything
            self.evaluation = f"eager: {first_line(error)}"
            fallback("trained by autograd", error)


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
) -> Training:
    """Run until the functionals stand still, then cool the step size down and average; or until the budget ends.

    The cool-down takes ``cool`` steps at least. With ``settle=False`` the budget alone ends it, to see what stopping
    costs. Where the time ends or Ctrl-C comes on the way, the flow keeps what it has learnt so far, and the clock the
    ``name`` of what was cut.
    """
    check = Check.make(trainer.flow, trainer.density, seed=seed)
    monitor, ratchet = Monitor(), _Ratchet(trainer, -math.inf)
    first = len(trainer.losses)  # a race may have gone before
    still, why, value = False, "no steps", -math.inf
    steady = _steady_share(budget.steps)
    done = 0
    with budget.clock.part(name):
        ratchet.best = value = check.elbo()
        while done < steady and budget.left(done) and not still:
            trainer.step(trainer.learning_rate * min(1.0, (done + 1) / WARM_UP))
            done += 1
            if done % CHECK_EVERY == 0:
                trainer.write()
                value = monitor.add(*check())
                still, why = monitor.stationary()
                still = still and settle
                ratchet.look(value)
                report(first + done, value, "settling")
        steps = min(budget.left(done), max(cool, min(int(COOL_SHARE * done), COOL_AT_MOST)))
        value = _cool(trainer, budget, done, steps, check, ratchet, lambda *state: report(first + state[0], *state[1:]))
        why = f"stopped: {why}" if still else f"{done + steps} steps ended the fit before it settled ({why})"
        moving = not still and monitor.restless
        return Training(trainer.losses[first:], value, still, moving, why, trainer.skipped, ratchet.falls)
    ratchet.rescue()
    losses = trainer.losses[first:]
    why = f"{len(losses)} steps were taken before the fit was stopped" + (f" ({why})" if losses else "")
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
