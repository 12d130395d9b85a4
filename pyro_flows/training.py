"""The optimisation loop: warm-up, a steady stretch until nothing moves, a cool-down with averaging."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.convergence import Monitor
from pyro_flows.flows import Flow
from pyro_flows.log_density import LogDensity
from pyro_flows.objectives import Estimate, elbo, path
from pyro_flows.randomness import seeded

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
CLIP = 5.0
ANNEAL_FROM = 0.01
FALL = 20.0  # nats below the best check: go back to it with half the step size

Report = Callable[[int, float, str], None]  # steps done, ELBO, state


@dataclass(frozen=True)
class Budget:
    """What bounds a training run: optimisation steps, and seconds on the clock."""

    steps: int
    deadline: float = math.inf

    def left(self, done: int) -> int:
        """Steps still allowed after ``done``; none after the deadline."""
        return 0 if time.monotonic() > self.deadline else max(self.steps - done, 0)


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

    Gradients are clipped at five times their running norm; steps whose gradient is not finite are skipped and counted.
    """

    def __init__(
        self, flow: Flow, density: LogDensity, *, learning_rate: float, batch: int, extra: Sequence[Tensor] = ()
    ) -> None:
        self.flow, self.density, self.batch, self.learning_rate = flow, density, batch, learning_rate
        self.extra = list(extra)
        self.parameters = [*flow.parameters(), *self.extra]
        self.optimiser = torch.optim.Adam(self.parameters, lr=learning_rate, fused=True)
        self.norm = 0.0
        self.ess = 0.0
        self.beta = 1.0
        self.skipped = 0
        self.losses: list[float] = []

    def step(self, learning_rate: float) -> None:
        """Take one step."""
        estimate = self._estimate()
        gradients = torch.autograd.grad(estimate.loss, self.parameters, allow_unused=True)
        finite = estimate.terms[torch.isfinite(estimate.terms)]
        self.losses.append(float(-finite.mean()) if len(finite) else math.inf)
        present = [gradient for gradient in gradients if gradient is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(present))))
        if not math.isfinite(norm):
            self.skipped += 1
            return
        self.norm = norm if self.norm == 0.0 else 0.95 * self.norm + 0.05 * min(norm, CLIP * self.norm)
        if norm > CLIP * self.norm > 0.0:
            torch._foreach_mul_(present, CLIP * self.norm / norm)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        self.optimiser.step()

    def keep(self) -> list[Tensor]:
        """Return a copy of all parameters."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def restore(self, kept: list[Tensor]) -> None:
        """Go back to a copy, forget the optimiser's moments and halve the step size."""
        with torch.no_grad():
            _assign(self.parameters, kept)
        self.learning_rate *= 0.5
        self.optimiser = torch.optim.Adam(self.parameters, lr=self.learning_rate, fused=True)
        self.norm = 0.0

    def _estimate(self) -> Estimate:
        if self.extra:
            return elbo(self.flow, self.density, self.batch)
        blend = BLEND if self.ess > BLEND_FROM_ESS else 0.0
        share = DEFENSIVE if blend else 0.0
        estimate = path(self.flow, self.density, self.batch, forward=blend, defensive=share, beta=self.beta)
        weights = torch.softmax(torch.nan_to_num(estimate.log_weights, nan=-torch.inf), 0)
        effective = float(1.0 / (weights.square().sum() * self.batch))
        self.ess = 0.95 * self.ess + 0.05 * (effective if math.isfinite(effective) else 0.0)
        return estimate


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


def train(trainer: Trainer, budget: Budget, *, seed: int, report: Report, settle: bool = True) -> Training:
    """Run until the functionals stand still, then cool the step size down and average; or until the budget ends.

    With ``settle=False`` the budget alone ends it, to see what stopping costs.
    """
    check = Check.make(trainer.flow, trainer.density, seed=seed)
    monitor = Monitor()
    first = len(trainer.losses)  # a race may have gone before
    still, why = False, "no steps"
    steady = _steady_share(budget.steps)
    kept, best, falls = trainer.keep(), check.elbo(), 0
    done = 0
    while done < steady and budget.left(done) and not still:
        trainer.step(trainer.learning_rate * min(1.0, (done + 1) / WARM_UP))
        done += 1
        if done % CHECK_EVERY == 0:
            value = monitor.add(*check())
            still, why = monitor.stationary()
            still = still and settle
            if value >= best:
                kept, best = trainer.keep(), value
            elif not value > best - FALL:
                trainer.restore(kept)
                falls += 1
            report(first + done, value, "settling")
    cool = min(budget.left(done), max(COOL_AT_LEAST, min(int(COOL_SHARE * done), COOL_AT_MOST)))
    value = _cool(trainer, budget, done, cool, check, lambda *state: report(first + state[0], *state[1:]))
    why = f"stopped: {why}" if still else f"{done + cool} steps ended the fit before it settled ({why})"
    moving = not still and monitor.restless
    return Training(trainer.losses[first:], value, still, moving, why, trainer.skipped, falls)


def anneal(trainer: Trainer, steps: int, *, report: Report) -> None:
    """Train on tempered densities, beta rising from 0.01 to 1 along a straight line in its logarithm."""
    for step in range(steps):
        trainer.beta = ANNEAL_FROM ** (1.0 - (step + 1) / steps)
        trainer.step(trainer.learning_rate * min(1.0, (step + 1) / WARM_UP))
        if (step + 1) % CHECK_EVERY == 0:
            report(step + 1, -trainer.losses[-1], f"tempering, beta {trainer.beta:.2f}")
    trainer.beta = 1.0


def _steady_share(steps: int) -> int:
    """How many of ``steps`` may pass before the cool-down has to begin."""
    return max(steps - max(COOL_AT_LEAST, int(steps * COOL_SHARE / (1.0 + COOL_SHARE))), steps // 2)


def _cool(trainer: Trainer, budget: Budget, done: int, steps: int, check: Check, report: Report) -> float:
    """Lower the step size to zero along a cosine; average the last fifth, kept if the ELBO does not fall."""
    average: list[Tensor] = []
    averaged = 0
    for step in range(steps):
        if not budget.left(done + step):
            break
        trainer.step(trainer.learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / steps)))
        if step >= (1.0 - AVERAGED_SHARE) * steps:
            averaged += 1
            with torch.no_grad():
                if not average:
                    average = trainer.keep()
                torch._foreach_lerp_(average, list(trainer.parameters), 1.0 / averaged)
        if (step + 1) % CHECK_EVERY == 0:
            report(done + step + 1, check.elbo(), "cooling")
    last = check.elbo()
    if not average:
        return last
    with torch.no_grad():
        kept = trainer.keep()
        _assign(trainer.parameters, average)
        better = check.elbo()
        if not better >= last:
            _assign(trainer.parameters, kept)
    return max(better, last)


def _assign(parameters: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
