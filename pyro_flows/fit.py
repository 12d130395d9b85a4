"""``fit``: from a Pyro model and its data to a judged posterior, in one call."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
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
from pyro_flows.initial import Start, portfolio
from pyro_flows.labels import coordinate_names
from pyro_flows.log_density import LogDensity
from pyro_flows.modes import missed_modes
from pyro_flows.posterior import Posterior, from_draws
from pyro_flows.race import CLOSE, choose_coordinates, race, share
from pyro_flows.randomness import seeded
from pyro_flows.runs import Stack, compare
from pyro_flows.runs import entry as comparison
from pyro_flows.training import BATCH, Budget, Trainer, Training, train
from pyro_flows.verdict import Draw, weigh

MAX_STEPS = 6000
ONE_THREAD_BELOW = 2**20  # numbers in one batch of likelihood terms
UNEVEN, FAR_UNEVEN = 2.0, 5.0
UNEVEN_DRAWS = 4000
MODE_DRAWS = 1000


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
        density = LogDensity(model, args, plan.kwargs)
        if train_model and not density.parameters():
            raise ValueError(
                "train_model: expected a model with parameters of its own (pyro.param, modules), got none."
            )
        if train_model and runs > 1:
            raise ValueError(
                "runs: expected 1 with train_model=True, since the runs would share the model's parameters."
            )
        with _threads(density):
            history, starts = [], None
            if density.structure.hierarchical and not train_model:
                steps = share(max_steps)
                guide_for = functools.partial(_guide, plan)
                density, starts, choice = choose_coordinates(density, guide_for, steps, seed=seed)
                history.append(choice)
            done = [_run(plan, density, number, starts, seed=seed + number) for number in range(runs)]
        best = max(done, key=lambda run: run.best.rank)
        history += [stage for run in done for stage in run.history]
        flow_found = best.guide.flow
        uneven, impossible = _too_uneven(flow_found, density)
        warnings = _warnings(best.best.training) + uneven
        draw: Draw = lambda n: _draw(flow_found, n)  # noqa: E731
        score: Callable[[Tensor], Tensor] = flow_found.log_prob
        if runs > 1:
            agreement = compare([run.best for run in done], coordinate_names(density.structure))
            history.append(comparison(agreement))
            if not agreement.holds:
                warnings += agreement.disagreements
                stack = Stack.make([run.guide.flow for run in done], agreement.weights)
                draw, score = stack.draw, stack.log_prob
        moving = best.best.training.moving
        if train_model:
            density.forget()
        z, log_q = draw(MODE_DRAWS)
        missed = missed_modes(density, [mode for run in done for mode in run.modes], z, log_q, score)
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
            failures=missed + impossible + (["the fit was cut short while it still moved"] if moving else []),
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


def _run(plan: _Plan, density: LogDensity, number: int, starts: list[Start] | None, *, seed: int) -> _Run:
    """Train one guide: portfolio (for run 0, ``starts`` if there are some), race, first round, escalation."""
    with seeded(seed, density.device):
        if number or starts is None:
            starts = portfolio(density, seed=seed)
        modes = [start for start in starts if start.evidence is not None]
        close = [start for start in starts if start.elbo >= starts[0].elbo - CLOSE]
        starts = close[number % len(close) :] + close[: number % len(close)]
        guide = _guide(plan, density)
        bar = _Bar(plan.max_steps, plan.progress)
        budget = Budget(plan.max_steps, plan.deadline)
        extra = list(density.parameters().values()) if plan.train_model else []
        winner, field = race(guide, density, starts, share(plan.max_steps), seed=seed, extra=extra)
        history, trainer = [entrant.entry for entrant in field], winner.trainer
        del field  # the losers' flows
        left = Budget(plan.max_steps - len(trainer.losses), plan.deadline)
        best = assess(guide.flow, density, train(trainer, left, seed=seed, report=bar.show))
        history.append(entry("first round", trainer, best))
        if plan.escalate and not plan.train_model and not best.enough:
            more = rounds(guide, density, trainer, best, winner.start, budget, seed=seed, report=bar.show)
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
    options: dict[str, Any] = {"noncentred": noncentred, "cautious": False, **plan.options}  # batches bear larger steps
    guide = AutoFlow(plan.model, flow, df=_tails(density.dim), **options)
    return guide.initialize(*plan.args, **plan.kwargs)


def _tails(dim: int) -> float:
    """Degrees of freedom of the base: a Student-t costs about 0.94 D / df^2 nats where the target is Gaussian."""
    return max(15.0, 2.0 * dim)


@torch.no_grad()
def _draw(flow: Flow, n: int) -> tuple[Tensor, Tensor]:
    return flow.rsample_and_log_prob((n,))


def _warnings(result: Training) -> list[str]:
    found = [] if result.converged else [result.why]
    if result.skipped > 0.01 * len(result.losses):
        found.append(f"{result.skipped} of {len(result.losses)} steps had a gradient that is not finite")
    return found


@torch.no_grad()
def _too_uneven(flow: Flow, density: LogDensity) -> tuple[list[str], list[str]]:
    """Say so where the posterior's density is more uneven than a volume-preserving flow can be.

    Such a flow hands on the base's Var[log q], which the posterior's Var[log p] has to equal. A little more is a
    warning, much more a failure: draws of such a flow do not come to where most of the variance is. Returns both kinds.
    """
    if flow.settings is None or flow.settings["builder"] != "nice":
        return [], []
    z, log_q = _draw(flow, UNEVEN_DRAWS)
    log_p = density(z)
    weighing = weigh(z, log_p, log_q)
    weights = weighing.log_weights.exp().nan_to_num()
    log_p = torch.where(weights > 0, log_p.double(), 0.0)
    spread = (weights * (log_p - (weights * log_p).sum()).square()).sum()
    base = flow.base_distribution()
    ratio = float(spread / base.log_prob(base.sample((UNEVEN_DRAWS,))).var())
    if not ratio > UNEVEN:
        return [], []
    said = [f"Var[log p] is {ratio:.1f} times what a volume-preserving flow can have, so NICE cannot fit; try realnvp"]
    return (said, []) if ratio < FAR_UNEVEN else ([], said)


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
