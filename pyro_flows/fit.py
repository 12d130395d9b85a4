"""``fit``: from a Pyro model and its data to a judged posterior, in one call."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_flows import _checks
from pyro_flows.escalation import Round, assess, entry, rounds
from pyro_flows.flows import Flow
from pyro_flows.guides import AutoFlow, FlowLike
from pyro_flows.initial import Start, missed_modes, portfolio
from pyro_flows.labels import coordinate_names
from pyro_flows.log_density import LogDensity
from pyro_flows.posterior import Posterior, from_draws
from pyro_flows.randomness import seeded
from pyro_flows.runs import Stack, compare
from pyro_flows.runs import entry as comparison
from pyro_flows.training import BATCH, STEP_SIZE, Budget, Check, Trainer, Training, train
from pyro_flows.verdict import Draw

MAX_STEPS = 6000
RACE_STEPS = 100
STEP_SIZES = (STEP_SIZE, 3e-3)
ONE_THREAD_BELOW = 2**20  # numbers in one batch of likelihood terms
CLOSE = 10.0  # nats between two starts that are worth racing


def fit(
    model: Callable[..., Any],
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    flow: FlowLike = "realnvp",
    layers: int | None = None,
    draws: int = 4000,
    seed: int = 0,
    max_steps: int = MAX_STEPS,
    max_seconds: float = math.inf,
    train_model: bool = False,
    escalate: bool = True,
    runs: int = 1,
    progress: bool = True,
) -> Posterior:
    r"""Fit a flow guide to the posterior of a Pyro model, judge it, and return draws.

    The guide is :math:`z = m + L(b + A\,t(f(\epsilon)))` over all latents in unconstrained coordinates: f a normalizing
    flow, t tails for each coordinate, :math:`\epsilon` Student-t with 15 degrees of freedom (2 D, if that is more). m
    and L come from a portfolio of starts, the step size from a race; training minimises the ELBO by path gradients and
    stops by itself.

    Args:
        model: a Pyro model (function or module).
        args: its positional arguments, as a rule the data.
        model_kwargs: its keyword arguments.
        flow: ``"realnvp"``, ``"nice"``, ``"planar"``, a :class:`Flow` or :class:`Bijection` of the right dimension (it
            is copied), or a function of the dimension that returns one. In one dimension couplings are affine, so
            ``"planar"`` stands in for ``"realnvp"`` and ``"nice"``.
        layers: number of layers, for a flow given by name; the default is the builder's.
        draws: how many draws to return and to judge by, at least 100.
        seed: of all randomness; one seed, one answer. Torch's global generator is left as it was.
        max_steps: bound on the optimisation steps of a run, 64 gradient evaluations each (256 from the second round
            on); the short race of step sizes comes on top.
        max_seconds: bound on the training time. A fit that is cut short says so.
        train_model: also train the model's own parameters (``pyro.param``, modules); by default they are held fixed.
        escalate: where the first round does not suffice, go on with larger batches, more layers, heavier tails and
            tempering, in this order; each is an entry of ``history``.
        runs: independent runs with seeds and starts of their own. Where they disagree, the verdict names the sites,
            and draws come from a mixture of the runs weighted by their estimated evidence.
        progress: show a progress bar.

    Returns:
        A :class:`Posterior`; read its ``verdict`` first.

    Raises:
        ValueError: before any work, for a bad option or a model that cannot be fitted; the argument or site is named.

    References: Agrawal, Sheldon and Domke 2020; Vaitl et al. 2024; Vehtari et al. 2024 (k-hat).

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> posterior = pf.fit(model, torch.tensor(1.3), progress=False, max_steps=1500)
    >>> posterior.verdict.status
    'ok'
    """
    _checks.integer("draws", draws, 100)
    _checks.integer("max_steps", max_steps, 1)
    _checks.integer("seed", seed, 0)
    if layers is not None:
        _checks.integer("layers", layers, 1)
        if not isinstance(flow, str):
            raise ValueError("layers: goes with a flow given by name; this flow is already built.")
    _checks.integer("runs", runs, 1)
    plan = _Plan(
        model, args, dict(model_kwargs or {}), flow, {} if layers is None else {"layers": layers},
        max_steps, time.monotonic() + max_seconds, train_model, escalate, progress,
    )  # fmt: skip
    began = time.monotonic()
    with seeded(seed):
        if isinstance(flow, str):
            AutoFlow(model, flow, **plan.options)  # bad names and options fail before any work
        density, history = _coordinates(plan, seed=seed)
        if train_model and not density.parameters():
            raise ValueError(
                "train_model: expected a model with parameters of its own (pyro.param, modules), got none."
            )
        if train_model and runs > 1:
            raise ValueError(
                "runs: expected 1 with train_model=True, since the runs would share the model's parameters."
            )
        with _threads(density):
            done = [_run(plan, density, number, seed=seed + number) for number in range(runs)]
        best = max(done, key=lambda run: run.best.rank)
        history += [stage for run in done for stage in run.history]
        flow_found, warnings = best.guide.flow, _warnings(best.best.training)
        draw: Draw = lambda n: _draw(flow_found, n)  # noqa: E731
        score: Callable[[Tensor], Tensor] = flow_found.log_prob
        if runs > 1:
            agreement = compare([run.best for run in done], coordinate_names(density.structure))
            history.append(comparison(agreement))
            if not agreement.holds:
                warnings += agreement.disagreements
                stack = Stack.make([run.guide.flow for run in done], agreement.weights)
                draw, score = stack.draw, stack.log_prob
        density.forget()
        missed = missed_modes(density, [mode for run in done for mode in run.modes], score)
        settings = _settings(best, density, began, max_steps=max_steps, train_model=train_model, runs=runs)
        return from_draws(
            density,
            draw,
            draws=draws,
            seed=seed,
            guide=best.guide,
            losses=torch.tensor(best.trainer.losses),
            history=history,
            settings=settings,
            warnings=warnings,
            failures=missed,
        )


@dataclass(frozen=True)
class _Plan:
    """What the caller of :func:`fit` asked for."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    flow: FlowLike
    options: dict[str, Any]
    max_steps: int
    deadline: float
    train_model: bool
    escalate: bool
    progress: bool


@dataclass(frozen=True)
class _Run:
    """One finished run: its guide holds the flow of the best round."""

    guide: AutoFlow
    trainer: Trainer
    best: Round
    modes: list[Start]
    history: list[dict[str, Any]]


def _coordinates(plan: _Plan, *, seed: int) -> tuple[LogDensity, list[dict[str, Any]]]:
    """Return the log density in the coordinates in which a short race comes further, and the history of the choice.

    There is a choice where the location or the scale of some sites depends on other latents: centred or not.
    """
    density = LogDensity(plan.model, plan.args, plan.kwargs)
    if plan.train_model or not density.structure.hierarchical:
        return density, []
    other = LogDensity(plan.model, plan.args, plan.kwargs, noncentred=True)
    reached = []
    with _threads(density):
        for candidate in (density, other):
            start = portfolio(candidate, seed=seed)[0]
            entrant = _Entrant.run(
                _guide(plan, candidate), candidate, start, STEP_SIZES[0], _race_steps(plan), seed=seed
            )
            reached.append(entrant.elbo)
    chosen, left = (other, density) if reached[1] > reached[0] else (density, other)
    chosen.evaluations += left.evaluations
    sites = chosen.structure.noncentred
    return chosen, [
        {"stage": "coordinates", "noncentred": sites, "elbo_centred": reached[0], "elbo_noncentred": reached[1]}
    ]


@contextmanager
def _threads(density: LogDensity) -> Iterator[None]:
    """One thread for small problems, where threads cost more than they save; the caller's number comes back after.

    The rule looks at sizes, not at clocks, so that one seed gives one answer.
    """
    rows = sum(value.numel() for value in density.structure.observed.values())
    before = torch.get_num_threads()
    if BATCH * max(rows, density.dim) < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(plan: _Plan, density: LogDensity, number: int, *, seed: int) -> _Run:
    """Train one guide: portfolio, race, first round, escalation."""
    with seeded(seed, density.device):
        starts = portfolio(density, seed=seed)
        modes = [start for start in starts if start.evidence is not None]
        close = [start for start in starts if start.elbo >= starts[0].elbo - CLOSE]
        starts = close[number % len(close) :] + close[: number % len(close)]
        guide = _guide(plan, density)
        bar = _Bar(plan.max_steps, plan.progress)
        budget = Budget(plan.max_steps, plan.deadline)
        trainer, start, history = _race(guide, density, starts, plan, seed=seed)
        left = Budget(plan.max_steps - len(trainer.losses), plan.deadline)
        best = assess(guide.flow, density, train(trainer, left, seed=seed, report=bar.show))
        history.append(entry("first round", trainer, best))
        if plan.escalate and not plan.train_model and not best.enough:
            more = rounds(guide, density, trainer, best, start, budget, seed=seed, report=bar.show)
            for name, trainer, outcome in more:
                history.append(entry(name, trainer, outcome))
                best = max(best, outcome, key=lambda round_: round_.rank)
                if outcome.enough:
                    break
        guide.adopt(best.flow)
        bar.close(best.weighing.elbo, best.training.converged)
    return _Run(guide, trainer, best, modes, [{"run": number, **stage} for stage in history])


def _guide(plan: _Plan, density: LogDensity) -> AutoFlow:
    flow = plan.flow
    if density.dim == 1 and flow in ("realnvp", "nice"):
        flow = "planar"
    if not isinstance(flow, str):
        flow = copy.deepcopy(flow)  # the caller's flow stays untrained, and each run has one of its own
    noncentred = density.structure.noncentred
    guide = AutoFlow(plan.model, flow, df=_tails(density.dim), noncentred=noncentred, **plan.options)
    return guide.initialize(*plan.args, **plan.kwargs)


def _tails(dim: int) -> float:
    """Degrees of freedom of the base: a Student-t costs about 0.94 D / df^2 nats where the target is Gaussian."""
    return max(15.0, 2.0 * dim)


@dataclass(frozen=True)
class _Entrant:
    """A start and a step size after a few steps, on a flow of its own, and the ELBO that they reached."""

    start: Start
    trainer: Trainer
    elbo: float

    @classmethod
    def run(
        cls, guide: AutoFlow, density: LogDensity, start: Start, size: float, steps: int, *, seed: int,
        extra: Sequence[Tensor] = (),
    ) -> _Entrant:  # fmt: skip
        """Train a copy of the guide's flow from ``start``."""
        flow = copy.deepcopy(guide.flow)
        runner = copy.copy(guide)  # shares everything but the flow
        runner.__dict__["_modules"] = {**guide.__dict__["_modules"], "flow": flow}
        runner.start_at(start.loc, start.scale)
        trainer = Trainer(flow, density, learning_rate=size, batch=BATCH, extra=extra)
        for step in range(steps):
            trainer.step(size * min(1.0, (step + 1) / (0.5 * RACE_STEPS)))
        return cls(start, trainer, Check.make(flow, density, seed=seed).elbo())

    @property
    def entry(self) -> dict[str, Any]:
        """What the history says of it."""
        size, before = self.trainer.learning_rate, self.start.elbo
        return {"stage": "race", "start": self.start.name, "step_size": size, "start_elbo": before, "elbo": self.elbo}


def _race_steps(plan: _Plan) -> int:
    """Steps of each entrant, so that all of them together take at most half of the budget."""
    return max(1, min(RACE_STEPS, plan.max_steps // (2 * (len(STEP_SIZES) + 1))))


def _race(
    guide: AutoFlow, density: LogDensity, starts: Sequence[Start], plan: _Plan, *, seed: int
) -> tuple[Trainer, Start, list[dict[str, Any]]]:
    """Run the best start with each step size, and the widest of the others that are close; keep the best.

    A wide start can still come to see what a narrow one has left out. The guide ends up with the winner's parameters
    and start.
    """
    extra = list(density.parameters().values()) if plan.train_model else []
    entrants = [(starts[0], size) for size in STEP_SIZES[: 1 if extra else None]]
    close = [start for start in starts[1:] if starts[0].elbo - start.elbo < CLOSE]
    if close and not extra:
        entrants.append((max(close, key=lambda start: start.volume), STEP_SIZES[0]))
    steps = _race_steps(plan)
    done = [_Entrant.run(guide, density, start, size, steps, seed=seed, extra=extra) for start, size in entrants]
    best = max(done, key=lambda entrant: entrant.elbo if math.isfinite(entrant.elbo) else -math.inf)
    guide.flow = best.trainer.flow
    return best.trainer, best.start, [entrant.entry for entrant in done]


@torch.no_grad()
def _draw(flow: Flow, n: int) -> tuple[Tensor, Tensor]:
    return flow.rsample_and_log_prob((n,))


def _warnings(result: Training) -> list[str]:
    found = [] if result.converged else [result.why]
    if result.skipped > 0.01 * len(result.losses):
        found.append(f"{result.skipped} of {len(result.losses)} steps had a gradient that is not finite")
    return found


def _settings(run: _Run, density: LogDensity, began: float, **given: Any) -> dict[str, Any]:
    return {
        **given,
        "flow": run.guide.flow.settings,
        "noncentred": density.structure.noncentred,
        "step_size": run.trainer.learning_rate,
        "batch": run.trainer.batch,
        "gradient_evaluations": density.evaluations,
        "evaluation": density.reason or "recorded",
        "seconds": time.monotonic() - began,
    }


class _Bar:
    """A progress bar of optimisation steps, with the ELBO and the state of the fit."""

    def __init__(self, steps: int, visible: bool) -> None:
        self.bar = tqdm(total=steps, disable=not visible, unit="step", desc="fit", leave=True)

    def show(self, done: int, elbo: float, state: str) -> None:
        """Show that ``done`` more steps of this stage are over."""
        self.bar.n = min(done, self.bar.total or done)
        self.bar.set_postfix_str(f"ELBO {elbo:.2f}, {state}", refresh=True)

    def close(self, elbo: float, converged: bool) -> None:
        """End the bar at the steps that were taken."""
        self.bar.total = self.bar.n
        self.bar.set_postfix_str(f"ELBO {elbo:.2f}, {'settled' if converged else 'cut short'}", refresh=True)
        self.bar.close()
