"""Many flows of one kind, each trained on a density of its own: the step of all, and the loop of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from pyro_flows.flows.flow import Flow
from pyro_flows.inference.training.convergence import Monitor
from pyro_flows.inference.training.flow_graphs import Passes, flat, is_order, points, state_of
from pyro_flows.inference.training.loop import AVERAGED_SHARE, CHECK_EVERY, COOL, Training
from pyro_flows.inference.training.objectives import BasePoints
from pyro_flows.inference.training.step_graph import Moments, stitched
from pyro_flows.inference.training.trainer import BLEND, DEFENSIVE, LOOK_EVERY
from pyro_flows.inference.verdict.deciding import COMPARED_DRAWS
from pyro_flows.model.batching import quiet
from pyro_flows.model.graphs import Runner, Stitcher, agree, stacked
from pyro_flows.model.stack import NotStackable, Stack
from pyro_flows.support.thresholds import DENSITY_GAP_OF_LOST, ESS_SHARE_PROMISING, EVIDENCE_GAP_GOOD

STEADY = 800  # steps at most, before the cool-down
NEARLY_ALL = 0.9  # of the flows stand still: the rest is not waited for

Report = Callable[[int, int, str], None]  # steps done, flows that stand still, state


class Lockstep:
    r"""K flows and their optimizers as stacked tensors; a step of all of them is one recorded graph.

    The graph is that of one flow's step (``step_graph.py``), batched over flows and data sets by ``torch.func.vmap``
    and recorded once more: products of matrices become batched products. Each flow has base points, moments, step size
    and blend of its own, so that it is trained as it would be by itself.

    Args:
        stack: the K densities.
        flows: K untrained flows of one kind, each at its start.
        learning_rate: of Adam, at first.
        batch: draws of each flow in a step.

    Raises:
        NotStackable: if the graphs cannot be batched, or give other values than a flow by itself.
    """

    def __init__(self, stack: Stack, flows: Sequence[Flow], *, learning_rate: float, batch: int) -> None:
        self.stack, self.flows, self.batch = stack, list(flows), batch
        first = self.flows[0]
        trained = [[part for part in flow.parameters() if part.requires_grad] for flow in self.flows]
        self._sizes = [part.numel() for part in trained[0]]
        self._shapes = [part.shape for part in trained[0]]
        self.weights = torch.stack([torch.cat([part.detach().reshape(-1) for part in own]) for own in trained])
        self.moments = Moments.fresh(self.weights)
        self.rates = self.weights.new_full((len(flows),), learning_rate)
        self._points = BasePoints(first)
        self._drawn: list[tuple[Tensor, Tensor]] = []
        self._blends = torch.zeros_like(self.rates)
        self.losses: list[Tensor] = []
        like = self.weights.new_zeros(batch, first.dim)
        views = self._cut(self.weights[0])
        self._state = self._states()
        kind, given = Passes(first, like, views).kind, [part[0] for part in self.stack.given]
        step = stitched(stack.graph(batch, gradients=True), kind, self.weights[0].clone(), given)
        self._step = self._recorded(step, [*self._inputs(like), *self._held(0.0)])
        self._noise = self._points(COMPARED_DRAWS)[0]
        self._look = self._recorded(self._one_look(views), self._inputs(self._noise))
        self._check(like)

    def __len__(self) -> int:
        return len(self.flows)

    # graphs ---------------------------------------------------------------------------------------------------------

    def _one_look(self, views: Sequence[Tensor]) -> fx.GraphModule:
        """Return the graph of one flow's check: images of base points (S, D) and their log weights (S,)."""
        kind = Passes(self.flows[0], self._noise, views).kind
        whole = Stitcher()
        state = kind.inputs(whole)
        z, log_q, _, _ = kind.add_forward(whole, state, whole.input(self._noise))
        given = [whole.input(part[0]) for part in self.stack.given]
        (log_p,) = whole.add(self.stack.graph(len(self._noise), gradients=False), [z, *given])
        return whole.finish([z, whole.call(torch.ops.aten.sub.Tensor, (log_p, log_q), log_q.meta["val"])])

    def _recorded(self, module: fx.GraphModule, inputs: Sequence[Tensor]) -> Runner:
        """Batch a graph over flows, and record that."""
        try:
            with quiet():
                whole = stacked(module, *inputs)
        except RuntimeError as error:
            raise NotStackable(f"a training step cannot be batched: {error}".splitlines()[0]) from error
        return Runner(whole)

    def _states(self) -> list[Tensor | int]:
        """Return the flows' states, stacked; trained parameters as their number, since they are parts of the weights.

        Raises:
            NotStackable: if coordinates are arranged differently in the flows.
        """
        found: list[Tensor | int] = []
        count = 0
        own = [[part for layer in flat(flow.bijection) for part in state_of(layer)] for flow in self.flows]
        for parts in zip(*own, strict=True):
            if parts[0].requires_grad:
                found.append(count)
                count += 1
            elif not is_order(parts[0]):
                found.append(torch.stack([part.detach() for part in parts]))
            elif not all(torch.equal(part, parts[0]) for part in parts):
                raise NotStackable("the flows arrange coordinates differently")
        return found

    def _cut(self, weights: Tensor) -> list[Tensor]:
        """Cut weights (..., W) into parameters."""
        parts = weights.split(self._sizes, -1)
        return [part.reshape(*weights.shape[:-1], *shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _inputs(self, x: Tensor) -> list[Tensor]:
        """Return state, base points and data of all flows; points (S, D) are the same for all."""
        own = self._cut(self.weights)
        state = [own[part] if isinstance(part, int) else part for part in self._state]
        return [*state, x if x.dim() == 3 else x.expand(len(self), *x.shape), *self.stack.given]

    def _held(self, log_importance_ratio: Tensor | float) -> list[Tensor]:
        """Return what a step takes after the data."""
        ratios = self.weights.new_zeros(len(self), self.batch) + log_importance_ratio
        scalars = torch.stack([self.rates, self._blends], 1)
        return [ratios, scalars, self.weights, *self.moments]

    @torch.no_grad()
    def _check(self, like: Tensor) -> None:
        """Compare the values that a step takes at fixed points with those of two flows by themselves."""
        x = points(like)
        losses = self._step(*self._inputs(x), *self._held(0.0))[0]
        for number in {0, len(self) - 1}:
            z, log_q, _ = self.flows[number].sample_with_score(at=x)
            terms = self.stack.densities[number](z) - log_q
            expected = -terms[torch.isfinite(terms)].mean()
            if not agree((losses[number : number + 1],), (expected.detach()[None],)) and bool(torch.isfinite(expected)):
                raise NotStackable("a step gave other values than a flow by itself")

    # steps ----------------------------------------------------------------------------------------------------------

    def step(self, share: float = 1.0) -> None:
        """Take one step of all flows, of ``share`` of their step sizes."""
        self.stack.clock.look()
        if not self._drawn:
            self._draw()
        x, log_ratios = self._drawn.pop()
        held = self._held(log_ratios)
        held[1][:, 0] *= share
        loss, weights, *moments = self._step(*self._inputs(x), *held)
        self.weights, self.moments = weights.clone(), Moments(*(part.clone() for part in moments))
        self.losses.append(loss)
        self.stack.spend(self.batch)

    @torch.no_grad()
    def _draw(self) -> None:
        """Draw base points of the next steps; flows whose batches are effective get defensive ones."""
        good = self.moments.ess > ESS_SHARE_PROMISING
        self._blends = torch.where(good, BLEND, 0.0).to(self.rates)
        shape = (LOOK_EVERY, len(self), self.batch)
        shares = torch.where(good, DEFENSIVE, 0.0).to(self.rates)[:, None].expand(shape)
        x, log_ratios = self._points(shares.numel(), shares.reshape(-1))
        x, log_ratios = x.reshape(*shape, -1), log_ratios.reshape(shape)
        self._drawn = list(zip(x.unbind(), log_ratios.unbind(), strict=True))

    def look(self) -> tuple[Tensor, Tensor]:
        """Return the images (K, S, D) of common base points, and their log weights (K, S)."""
        z, log_weights = self._look(*self._inputs(self._noise))
        return z.clone(), log_weights.clone()

    def forget(self, chosen: Tensor) -> None:
        """Halve the step sizes of some flows (K,), and forget their optimizers' moments of the gradient."""
        pairs = zip(self.moments.forget(), self.moments, strict=True)
        masks = {1: chosen, 2: chosen[:, None]}  # by the number of axes
        self.moments = Moments(*(torch.where(masks[old.dim()], new, old) for new, old in pairs))
        self.rates = torch.where(chosen, 0.5 * self.rates, self.rates)

    @torch.no_grad()
    def write(self) -> None:
        """Hand the weights to the flows."""
        for flow, row in zip(self.flows, self.weights, strict=True):
            trained: list[Tensor] = [part for part in flow.parameters() if part.requires_grad]
            torch._foreach_copy_(trained, self._cut(row))


def train_together(flows: Lockstep, *, report: Report) -> list[Training]:
    """Train all flows for as many steps; say of each whether it converged, by the rule of ``loop.train``.

    Checks are on common random numbers, 20 steps apart. The step size is constant until nine tenths of the flows stand
    still or have weights that correct them, or for `STEADY` steps; then it falls to zero along a cosine over half
    of `COOL` steps (a third if weights ended it), the last fifth of which is averaged. A flow whose ELBO falls
    far goes back to its best check, with half the step size.
    """
    run = _Together(flows)
    done, still = 0, torch.zeros(len(flows), dtype=torch.bool)
    good = still
    while done < STEADY and not float((still | good).double().mean()) >= NEARLY_ALL:
        flows.step(min(1.0, (done + 1) / CHECK_EVERY))
        done += 1
        if done % (CHECK_EVERY // 2) == 0:
            still = still | run.check()  # what comes after is the cool-down, in ``loop.train`` too
            good = torch.tensor([monitor.promises(EVIDENCE_GAP_GOOD) for monitor in run.monitors])
            report(done, int((still | good).sum()), "converging")
    cool = COOL // 2 if float(still.double().mean()) >= NEARLY_ALL else COOL // 3
    why = [monitor.stationary()[1] for monitor in run.monitors]
    average: Tensor | None = None
    for step in range(cool):
        flows.step(0.5 * (1.0 + math.cos(math.pi * step / cool)))
        if step >= (1.0 - AVERAGED_SHARE) * cool:
            count = step + 1 - math.ceil((1.0 - AVERAGED_SHARE) * cool)
            average = flows.weights.clone() if average is None else average.lerp_(flows.weights, 1.0 / (count + 1))
        if (step + 1) % (2 * CHECK_EVERY) == 0:
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

    def elbos(self, monitors: Sequence[Monitor] | None = None) -> Tensor:
        """Return the ELBO (K,) of each flow on the common base points, without the lowest terms; monitors note them."""
        looks = zip(monitors or [Monitor() for _ in self.monitors], *self.flows.look(), strict=True)
        return torch.tensor([monitor.add(z, terms) for monitor, z, terms in looks], dtype=torch.float64)

    def check(self) -> Tensor:
        """Look at all flows; return which stand still (K,)."""
        self.rescue(self.elbos(self.monitors))
        return torch.tensor([monitor.stationary()[0] for monitor in self.monitors])

    def rescue(self, elbos: Tensor) -> None:
        """Keep weights that are the best so far; take those back that are far from it."""
        flows = self.flows
        better, fallen = elbos >= self.best, ~(elbos > self.best - DENSITY_GAP_OF_LOST)
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
        last = torch.where(last > self.best - DENSITY_GAP_OF_LOST, last, self.best)
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
