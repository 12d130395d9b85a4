"""The training of many flows side by side: steps until nearly all stand still, then a cool-down of all."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_flows.training.convergence import Monitor
from pyro_flows.training.lockstep import Lockstep
from pyro_flows.training.loop import AVERAGED_SHARE, FALL, WARM_UP, Training
from pyro_flows.verdict.thresholds import EVIDENCE_GAP_VISIBLE

CHECK_EVERY = 20
STEADY = 800  # steps at most, before the cool-down
COOL, SHORT_COOL = 300, 200
NEARLY_ALL = 0.9  # of the flows stand still: the rest is not waited for

Report = Callable[[int, int, str], None]  # steps done, flows that stand still, state


def train_together(flows: Lockstep, *, report: Report) -> list[Training]:
    """Train all flows for as many steps; say of each whether it converged, by the rule of ``loop.train``.

    Checks are on common random numbers, 20 steps apart. The step size is constant until nine tenths of the flows stand
    still or have weights that correct them, or for `STEADY` steps; then it falls to zero along a cosine over `COOL`
    steps (half as many if weights ended it), the last fifth of which is averaged. A flow whose ELBO falls far goes back
    to its best check, with half the step size.
    """
    run = _Together(flows)
    done, still = 0, torch.zeros(len(flows), dtype=torch.bool)
    good = still
    while done < STEADY and not float((still | good).double().mean()) >= NEARLY_ALL:
        flows.step(min(1.0, (done + 1) / WARM_UP))
        done += 1
        if done % CHECK_EVERY == 0:
            still = still | run.check()  # what comes after is the cool-down, in ``loop.train`` too
            good = torch.tensor([monitor.promises(EVIDENCE_GAP_VISIBLE) for monitor in run.monitors])
            report(done, int((still | good).sum()), "converging")
    cool = COOL if float(still.double().mean()) >= NEARLY_ALL else SHORT_COOL
    why = [monitor.stationary()[1] for monitor in run.monitors]
    average: Tensor | None = None
    for step in range(cool):
        flows.step(0.5 * (1.0 + math.cos(math.pi * step / cool)))
        if step >= (1.0 - AVERAGED_SHARE) * cool:
            count = step + 1 - math.ceil((1.0 - AVERAGED_SHARE) * cool)
            average = flows.weights.clone() if average is None else average.lerp_(flows.weights, 1.0 / (count + 1))
        if (step + 1) % (4 * CHECK_EVERY) == 0:
            run.rescue(run.elbos())
            report(done + step + 1, int(still.sum()), "cooling")
    elbos = run.finish(average)
    flows.write()
    return run.trainings(elbos, still, good, why, done + cool)


class _Together:
    """The monitors of all flows, and the weights of their best checks."""

    def __init__(self, flows: Lockstep) -> None:
        self.flows = flows
        self.monitors = [Monitor() for _ in range(len(flows))]
        self.falls = torch.zeros(len(flows), dtype=torch.long)
        self.kept, self.best = flows.weights.clone(), self.elbos()

    def elbos(self) -> Tensor:
        """Return the ELBO (K,) of each flow on the common base points, without the lowest terms."""
        found = [Monitor().add(z, terms) for z, terms in zip(*self.flows.look(), strict=True)]
        return torch.tensor(found, dtype=torch.float64)

    def check(self) -> Tensor:
        """Look at all flows; return which stand still (K,)."""
        looks = zip(self.monitors, *self.flows.look(), strict=True)
        found = [monitor.add(z, log_weights) for monitor, z, log_weights in looks]
        self.rescue(torch.tensor(found, dtype=torch.float64))
        return torch.tensor([monitor.stationary()[0] for monitor in self.monitors])

    def rescue(self, elbos: Tensor) -> None:
        """Keep weights that are the best so far; take those back that are far from it."""
        flows = self.flows
        better, fallen = elbos >= self.best, ~(elbos > self.best - FALL)
        self.kept = torch.where(better.to(flows.weights.device)[:, None], flows.weights, self.kept)
        self.best = torch.where(better, elbos, self.best)
        fallen &= ~better
        if bool(fallen.any()):
            flows.weights = torch.where(fallen.to(flows.weights.device)[:, None], self.kept, flows.weights)
            flows.forget(fallen.to(flows.weights.device))
            self.falls += fallen.long()

    def finish(self, average: Tensor | None) -> Tensor:
        """Take averaged weights where they do not lower the ELBO; return the ELBOs (K,)."""
        flows = self.flows
        last = self.elbos()
        self.rescue(last)
        last = torch.where(last > self.best - FALL, last, self.best)
        if average is None:
            return last
        own, flows.weights = flows.weights, average
        found = self.elbos()
        better = found >= last
        flows.weights = torch.where(better.to(own.device)[:, None], average, own)
        return torch.where(better, found, last)

    def trainings(self, elbos: Tensor, still: Tensor, good: Tensor, why: list[str], steps: int) -> list[Training]:
        """Return what was done with each flow."""
        losses = torch.stack(self.flows.losses, 1).tolist()
        skipped = self.flows.moments.skipped.tolist()
        return [
            Training(
                losses=losses[number],
                elbo=float(elbos[number]),
                converged=settled,
                moving=not (settled or good[number]) and self.monitors[number].restless,
                why=f"converged: {why[number]}"
                if settled
                else f"training ended after {steps} steps, before it had converged ({why[number]})",
                skipped=skipped[number],
                falls=int(self.falls[number]),
            )
            for number, settled in enumerate(still.tolist())
        ]
