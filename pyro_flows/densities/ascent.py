"""Adam on the likelihood of a flow: its steps, an average of the weights beside them, a race for the step size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flows.densities.points import Batch, Source
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture_base import MixtureBase
from pyro_flows.support.files.bundles import Entries
from pyro_flows.support.files.untrusted import require
from pyro_flows.support.process.interrupts import STATE
from pyro_flows.transforms import DiagonalAffine
from pyro_flows.transforms.networks import Network, Residual, ResidualConvolution

RACED = (1e-3, 3e-3, 1e-2)
RACE_STEPS = 80
JUDGED = 32  # batches of training points that judge a race beside the held-out ones
TIE, TIE_NATS, NOISE = 0.05, 0.1, 0.02  # of what the best gains on the start; nats a dimension at most, nats at least
AVERAGE_POWER = 9.0  # the average holds about the last tenth of the steps
CLIP = 5.0
SCALES = 5.0
PARTS = 0.3  # of a mixture as base, which begins where it is best by itself

Run = tuple[float, float, list[Tensor], torch.optim.Optimizer]  # of a race: score, step size, weights

INTERRUPTED = "interrupted"  # begins the reason of such an end


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
        return self.why.startswith(INTERRUPTED)

    def interrupt(self) -> None:
        self.done, self.why = True, f"{INTERRUPTED} ({STATE.name}) after {self.steps} steps"


def log_prob(flow: Flow, y: Tensor, context: Tensor | None) -> Tensor:
    """Return ``log q(y)`` without the detour over a distribution of Pyro's."""
    x, ladj = flow.bijection.inverse_and_ladj(y, context)
    return flow.base_distribution(context).log_prob(x) + ladj


@torch.no_grad()
def score(flow: Flow, batches: Iterable[Batch], most: float = math.inf) -> float:
    """Return the mean log density of about the first ``most`` points; minus infinity if it is not finite."""
    total, count = 0.0, 0
    for y, context in batches:
        total += float(log_prob(flow, y, context).double().sum())
        count += len(y)
        if count >= most:
            break
    return total / count if math.isfinite(total) else -math.inf


class Ascent:
    """Adam on the negative mean log density of a flow, with an average of the weights beside it.

    Diagonal scales take `SCALES` times the step size, since they move by units where weights move by hundredths. They
    do not decay, and neither do the parts of a mixture that is the base, which take `PARTS` times the step size.
    Gradients are clipped at five times their running norm; a step whose gradient is not finite is skipped and counted.
    """

    def __init__(self, flow: Flow, source: Source, held_out: Sequence[Batch], *, batch: int) -> None:
        self.flow, self.source, self.held_out, self.batch = flow, source, list(held_out), batch
        self.parameters = [parameter for parameter in flow.parameters() if parameter.requires_grad]
        self.state = State()
        self.fresh_moments()
        self.start, self.average, self.best_weights = self.keep(), self.keep(), self.keep()
        self.dim = flow.dim

    def fresh_moments(self) -> None:
        layers = [layer for layer in self.flow.modules() if isinstance(layer, DiagonalAffine) and not layer.context_dim]
        scales = {parameter for layer in layers for parameter in layer.parameters()}
        mixtures = [layer for layer in self.flow.modules() if isinstance(layer, MixtureBase)]
        parts = {parameter for layer in mixtures for parameter in layer.parameters(recurse=False)}
        kinds = [(set(self.parameters) - scales - parts, 1.0, True), (scales, SCALES, False), (parts, PARTS, False)]
        groups: list[dict[str, Any]] = [
            {"params": own, "times": times, "decays": decays}
            for kind, times, decays in kinds
            if (own := [one for one in self.parameters if one in kind])
        ]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
        self.set_weight_decay(self.state.weight_decay)

    def step(self, y: Tensor, context: Tensor | None, learning_rate: float) -> float:
        """Take one step; return the loss before it."""
        loss = -log_prob(self.flow, y, context).mean()
        gradients = torch.autograd.grad(loss, self.parameters)
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        state, value = self.state, float(loss.detach())
        if not math.isfinite(norm):
            state.skipped += 1
            return value
        state.norm = norm if state.norm == 0.0 else 0.95 * state.norm + 0.05 * min(norm, CLIP * state.norm)
        if norm > CLIP * state.norm > 0.0:
            torch._foreach_mul_(gradients, CLIP * state.norm / norm)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["times"]
        self.optimizer.step()
        return value

    @torch.no_grad()
    def update_average(self) -> None:
        """Let the average follow the weights: weights of step t count as t to the ninth power."""
        self.state.averaged += 1
        share = (AVERAGE_POWER + 1.0) / (self.state.averaged + AVERAGE_POWER)
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], min(share, 1.0))

    def keep(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def assign(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def validate(self, weights: Sequence[Tensor] | None = None) -> float:
        """Return the mean log density of the held-out points, with other weights if they are given."""
        kept = self.keep()
        self.assign(kept if weights is None else weights)
        value = score(self.flow, self.held_out)
        self.assign(kept)
        return value

    @torch.no_grad()
    def gains_nothing(self, weights: Sequence[Tensor]) -> bool:
        """Whether the gain of weights on the start, over held-out points, is within its standard error.

        The mean of few held-out points is noise, and the best of many checks is the luckiest one. Source: the rule of
        one standard error, Breiman et al. 1984, *Classification and Regression Trees*.
        """
        kept, found = self.keep(), []
        for values in (self.start, weights):
            self.assign(values)
            found.append(torch.cat([log_prob(self.flow, y, context).double() for y, context in self.held_out]))
        self.assign(kept)
        gains = found[1] - found[0]
        told = len(gains) > 1 and bool(torch.isfinite(gains).all())
        return told and float(gains.mean()) <= float(gains.std()) / math.sqrt(len(gains))

    def seconds_a_step(self, clock: Callable[[], float]) -> float:
        """Time a step, and forget it."""
        start, batches = self.keep(), list(islice(self._forever(), 3))
        times = [clock()]
        for y, context in batches:
            self.step(y, context, 0.0)
            times.append(clock())
        self.assign(start)
        self.fresh_moments()
        self.state.skipped, self.state.norm = 0, 0.0
        return max(min(later - earlier for earlier, later in pairwise(times)), 1e-6)

    def race(self, candidates: Sequence[float], steps: int) -> None:
        """Take ``steps`` steps with each step size from the same start, on the same batches; go on with one of them.

        Each run warms up and cools down, so that a large step size is not judged by its noise. Among those that come
        about as far as the best, the largest is taken: noise tells them apart here, thousands of steps do later. If
        none improves on the start, the start stays and the smallest step size is taken.
        """
        start = self.keep()
        batches = list(islice(self._forever(), steps))
        judge = [*self.held_out, *batches[-JUDGED:]]
        first = (score(self.flow, judge), min(candidates), start, self.optimizer)
        runs: list[Run] = []
        for learning_rate in candidates:
            self.assign(start)
            self.fresh_moments()
            self.state.norm = 0.0
            for step, (y, context) in enumerate(batches):
                self.step(y, context, learning_rate * trapeze((step + 1) / steps))
            runs.append((score(self.flow, judge), learning_rate, self.keep(), self.optimizer))
        good = _about_best(first[0], runs, self.dim)
        _, self.state.learning_rate, weights, self.optimizer = max(good or [first], key=lambda run: run[1])
        self.assign(weights)
        self.average = self.keep()
        if self.held_out:
            tried = [(self.validate(values), values) for values in (start, weights)]
            self.state.best, self.best_weights = max(tried, key=lambda pair: pair[0])
        self.state.skipped, self.state.norm = 0, 0.0

    def set_weight_decay(self, decay: float) -> None:
        """Let weights decay, but not diagonal scales."""
        self.state.weight_decay = decay
        for group in self.optimizer.param_groups:
            group["weight_decay"] = decay if group["decays"] else 0.0

    def _forever(self) -> Iterator[Batch]:
        while True:
            yield from self.source.shuffled(self.batch)

    def checkpoint(self) -> dict[str, object]:
        """Return all tensors that going on needs."""
        return {
            "weights": self.keep(),
            "buffers": [buffer.clone() for buffer in self.flow.buffers()],
            "start": self.start,
            "average": self.average,
            "best_weights": self.best_weights,
            "moments": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "state": vars(self.state),
        }

    def restore(self, saved: Entries) -> None:
        """Go on from what :meth:`checkpoint` returned; anything else is :class:`Damaged`."""
        self._check(saved)
        self.assign(saved["weights"])
        for buffer, value in zip(self.flow.buffers(), saved["buffers"], strict=True):
            buffer.copy_(value)
        self.start, self.average, self.best_weights = saved["start"], saved["average"], saved["best_weights"]
        self.optimizer.load_state_dict(saved["moments"])
        self.state = State(**saved["state"])
        torch.set_rng_state(saved["random"].cpu())
        if saved["random_cuda"]:
            torch.cuda.set_rng_state_all([state.cpu() for state in saved["random_cuda"]])

    def _check(self, saved: Entries) -> None:
        """Refuse a state of other shapes than those of the flow, before anything is changed."""
        buffers = list(self.flow.buffers())
        for name in ("weights", "start", "average", "best_weights", "buffers"):
            wanted, found = buffers if name == "buffers" else self.parameters, saved[name]
            require(len(found) == len(wanted), f"{name} has {len(found)} tensors, not {len(wanted)}")
            for value, like in zip(found, wanted, strict=True):
                alike = value.shape == like.shape and value.dtype == like.dtype
                require(alike and not bool(torch.isnan(value).any()), f"{name} has tensors of another run, or NaN")
        ordered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for place, moments in saved["moments"]["state"].items():
            for value in moments.values():
                require(value.dim() == 0 or value.shape == ordered[place].shape, "moments have other shapes")
        require(set(saved["state"]) == {one.name for one in fields(State)}, "the state lacks entries")
        state = State(**saved["state"])
        for one in fields(State):
            value, kind = getattr(state, one.name), type(one.default)
            kinds = (int, float) if kind is float else (kind,)  # a number of steps is a progress too
            known = isinstance(value, list) if one.default is MISSING else type(value) in kinds
            require(known and (kind is not int or value >= 0), f"{one.name} is {value!r}")


@torch.no_grad()
def rouse(flow: Flow, share: float = 1.0) -> None:
    """Give last layers of networks that start at zero torch's usual small random weights, or a share of that.

    At zero, the layers below get no gradient, and for some hundred steps only little: that is right for a guide, whose
    start is a good one, and slow for data. Residual networks, whose blocks add up, get a tenth of that.
    """
    for network in flow.modules():
        if isinstance(network, Network):
            last = network.layers[-1].get_parameter("weight")
            if not bool(last.any()):
                size = 0.1 if isinstance(network, (Residual, ResidualConvolution)) else 1.0
                last.uniform_(-1.0, 1.0).mul_(share * size * last[0].numel() ** -0.5)


def widest(flow: Flow) -> int:
    """Return the width of the widest layer of a conditioner of vectors, 1 if there is none."""
    layers = [layer for network in flow.modules() if isinstance(network, Network) for layer in network.modules()]
    return max([layer.in_features for layer in layers if isinstance(layer, nn.Linear)], default=1)


def trapeze(share: float) -> float:
    """Rise over the first quarter, stay, fall over the last third."""
    return min(1.0, 4.0 * share, max(3.0 * (1.0 - share), 0.02))


def _about_best(start: float, runs: Sequence[Run], dim: int) -> list[Run]:
    """Return the runs that come about as far as the best one; none if that is no further than the start."""
    best = max(run[0] for run in runs)
    enough = best - min(max(TIE * (best - start), NOISE), TIE_NATS * dim) if math.isfinite(best) else best
    return [run for run in runs if run[0] >= enough and best > start]
