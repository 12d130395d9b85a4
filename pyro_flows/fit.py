"""``fit``: from a Pyro model and its data to a judged posterior, in one call."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_flows import _checks
from pyro_flows.bar import Bar
from pyro_flows.batching import alone, usable
from pyro_flows.charting import choose_charts
from pyro_flows.clock import Clock, unbounded
from pyro_flows.coordinates import choose_coordinates
from pyro_flows.correction.rungs import last_rung, which
from pyro_flows.correction.search import noted
from pyro_flows.escalation import ENOUGH_K
from pyro_flows.flows import Flow
from pyro_flows.guides import AutoFlow, FlowLike
from pyro_flows.initial import Start
from pyro_flows.labels import coordinate_names
from pyro_flows.log_density import LogDensity
from pyro_flows.mixture import FlowMixture
from pyro_flows.modes import Search, missed_modes
from pyro_flows.observations import warn_if_nothing_observed
from pyro_flows.posterior import Posterior, from_draws
from pyro_flows.randomness import seeded
from pyro_flows.run import Plan, Run, make_run
from pyro_flows.runs import Agreement, balanced, compare
from pyro_flows.runs import entry as comparison
from pyro_flows.scoring import MAX_DRAWS, check_memory, seconds_to_judge
from pyro_flows.training import BATCH
from pyro_flows.verdict import weigh

MAX_STEPS = 6000
RUNS_ADDED = 3  # at most, one for each mode that is missed
STEPS_GROW_FROM = 50  # dimensions
ONE_THREAD_BELOW = 2**20  # numbers in one batch of likelihood terms
UNEVEN, FAR_UNEVEN = 2.0, 5.0
UNEVEN_DRAWS = 4000
MODE_DRAWS = 1000
COORDINATES_SHARE = 0.4  # of the seconds that are left, if there is a bound
MAX_LAYERS, MAX_RUNS, MAX_SEED = 1000, 100, 2**62


def fit(
    model: Callable[..., Any],
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    flow: FlowLike = "realnvp",
    layers: int | None = None,
    draws: int = 4000,
    seed: int = 0,
    max_steps: int | None = None,
    max_seconds: float = math.inf,
    train_model: bool = False,
    escalate: bool = True,
    refine: str | bool = "auto",
    runs: int = 1,
    progress: bool = True,
    raise_on_interrupt: bool = False,
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
        layers: number of layers, for a flow given by name, 1000 at most; the default is the builder's.
        draws: how many draws to return, at least 100, and ten million at most, or what the memory holds; four times as
            many are judged by.
        seed: of all randomness; one seed, one answer. Torch's global generator is left as it was.
        max_steps: bound on the optimisation steps of a run, 64 gradient evaluations each (256 from the second round
            on); by default 6000, and more above 50 dimensions, twice as many from 200 on; the short race of step sizes
            comes on top.
        max_seconds: bound on the seconds of the whole call, above zero: starts, races, training, the search for modes
            and the final draws. It is kept within a second or a fifth, unless a single run of the model takes longer.
            What there is by then is judged, by fewer draws if need be, and the verdict says what was cut. Time spent
            waiting for another fit in the same process does not count.
        train_model: also train the model's own parameters (``pyro.param``, modules); by default they are held fixed.
        escalate: where the first round does not suffice, go on with larger batches, more layers, heavier tails and
            tempering, in this order; each is an entry of ``history``. Where the guide lacks a mode, up to three more
            runs start there, and the guide becomes their mixture.
        refine: let a sampler that begins at the flow's draws finish the work (see :meth:`Posterior.refine`), where
            the first round does not suffice and a sampler does for less than another round, and where the verdict
            would be ``unreliable``: ``"auto"``, or one of its methods for the latter; False does without. A sampler is
            not tried with ``train_model``.
        runs: independent runs with seeds and starts of their own, 100 at most. Where they disagree, the verdict names
            the sites, and the guide becomes a mixture of the runs, weighted so that it is as close to the posterior as
            it can be.
        progress: show what is being done on one line: a stage, steps and ELBO, and the seconds so far.
        raise_on_interrupt: let Ctrl-C raise ``KeyboardInterrupt``. By default, once the model has been read, it ends
            the work, and what there is by then is judged and returned, never as ``ok``; a second Ctrl-C raises.

    Returns:
        A :class:`Posterior`; read its ``verdict`` first.

    Raises:
        ValueError: before any work, for a bad option, a model that cannot be fitted, or data outside of the support of
            their likelihood; the argument or site is named.

    Warns:
        NothingObservedWarning: for a model with neither data nor factors, so that the posterior is the prior.
        UserWarning: after Ctrl-C.

    Fits take turns: a call from a second thread waits for the first one, since Pyro's handlers, its validation and
    torch's random numbers belong to the whole process; a call from inside of a model does not wait. For several fits at
    once, take processes. Inside of ``torch.no_grad()`` and ``torch.inference_mode()`` it gives the same as outside.

    References: Agrawal, Sheldon and Domke 2020; Vaitl et al. 2024; Vehtari et al. 2024 (k-hat).

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> posterior = pf.fit(model, torch.tensor(1.3), progress=False, max_steps=1500)
    >>> posterior.verdict.status
    'ok'
    """
    _check_numbers(draws, max_steps, seed, runs)
    max_seconds = _checks.seconds("max_seconds", max_seconds)
    if layers is not None:
        _checks.integer("layers", layers, 1, MAX_LAYERS)
        if not isinstance(flow, str):
            raise ValueError("layers: goes with a flow given by name; this flow is already built.")
    options = {} if layers is None else {"layers": layers}
    method = which(refine)
    args, kwargs = usable(args), usable(dict(model_kwargs or {}))
    with alone(), seeded(seed):
        bar = Bar("fit", progress)
        clock = Clock(max_seconds, raises=raise_on_interrupt, watch=bar.watch)
        steps = max_steps or MAX_STEPS
        plan = Plan(model, args, kwargs, flow, options, steps, train_model, escalate, clock, bar, method, draws)
        try:
            posterior = _fit(plan, draws, seed, runs, grow=max_steps is None)
        except BaseException as error:
            bar.close(f"ended by {type(error).__name__}")
            raise
        bar.close(f"{len(posterior.losses)} steps, ELBO {posterior.elbo:.2f}, {posterior.verdict.status}")
    if clock.interrupted is not None:
        warnings.warn(f"fit: {clock.reasons()[0]}. The posterior is what it had come to by then.", stacklevel=2)
    return posterior


def default_steps(dim: int) -> int:
    """Return how many steps a run may take at most, if nothing is said: 6000, and more from 50 dimensions on."""
    return round(MAX_STEPS * min(max(dim / STEPS_GROW_FROM, 1.0), 4.0) ** 0.5)


def _check_numbers(draws: int, max_steps: int | None, seed: int, runs: int) -> None:
    _checks.integer("draws", draws, 100, MAX_DRAWS)
    if max_steps is not None:
        _checks.integer("max_steps", max_steps, 1)
    _checks.integer("seed", seed, 0, MAX_SEED)
    _checks.integer("runs", runs, 1, MAX_RUNS)


def _fit(plan: Plan, draws: int, seed: int, runs: int, *, grow: bool) -> Posterior:
    """Fit under the plan's clock: the work, which can be cut anywhere, and the judging of what it came to."""
    clock = plan.clock
    plan.bar.watch("reading the model")
    if isinstance(plan.flow, str):
        AutoFlow(plan.model, plan.flow, **plan.options)  # bad names and options fail before any work
    density = LogDensity(plan.model, plan.args, plan.kwargs)
    warn_if_nothing_observed(density.structure, density.trace_at, plan.model, plan.args, plan.kwargs)
    check_memory(density, draws)
    plan = replace(plan, max_steps=default_steps(density.dim)) if grow else plan
    if plan.train_model and not density.parameters():
        raise ValueError("train_model: expected a model with parameters of its own (pyro.param, modules), got none.")
    if plan.train_model and runs > 1:
        raise ValueError("runs: expected 1 with train_model=True, since the runs would share the model's parameters.")
    state = _State(density, [Run(0)])
    density.under(clock)
    try:
        with clock.part("the fit"):
            if clock.finite:
                clock.reserve(seconds_to_judge(density, draws))
            _work(plan, state, seed, runs)
        clock.judging()
        plan.bar.watch("judging")
        if clock.interrupted is not None:
            clock.reserve(seconds_to_judge(state.density, draws))
        try:
            found = _judged(plan, state, draws, seed, runs)
        except KeyboardInterrupt:
            if not clock.interrupt("judging"):
                raise
            found = _judged(plan, state, draws, seed, runs)
    finally:
        state.density.under(unbounded())
    if plan.refine is None or plan.train_model:
        return found
    chains = state.best.chains if isinstance(found.flow, Flow) else None
    return last_rung(found, plan.refine, clock, plan.bar, chains)


@dataclass
class _State:
    """What a fit has come to so far: enough to be judged at any moment."""

    density: LogDensity
    done: list[Run]
    history: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    search: Search | None = None
    added: int = 0
    guide: AutoFlow | None = None

    @property
    def kept(self) -> list[Run]:
        """The runs that can be compared; if there are none, those that got anywhere."""
        weighed = [run for run in self.done if run.best is not None and run.best.weighed]
        return weighed or [run for run in self.done if run.best is not None] or self.done

    @property
    def best(self) -> Run:
        """The run with the best verdict, then the best ELBO."""
        return max(self.kept, key=lambda run: run.rank)


def _work(plan: Plan, state: _State, seed: int, runs: int) -> None:
    """Choose coordinates, make the runs, compare them, look for what they lack; all that is found is in ``state``."""
    clock, starts = plan.clock, list[Start]()
    with _threads(state.density):
        if state.density.structure.hierarchical and not plan.train_model:
            with clock.part("the choice of coordinates", share=COORDINATES_SHARE):
                state.density, start, choice = choose_coordinates(state.density, seed=seed)
                state.history.append(choice)
                starts += [] if start is None else [start]
        if not plan.train_model:
            with clock.part("the search for angles and heavy tails", share=COORDINATES_SHARE):
                state.density, carried, charted = choose_charts(state.density, starts[0] if starts else None, seed=seed)
                state.history += [{"stage": "charts", "sites": charted}] if charted else []
                starts = [] if carried is None else [carried]
        for number in range(runs):
            if number and clock.over:
                clock.skip(f"run {number + 1} of {runs}")
                break
            if number:
                state.done.append(Run(number))
            name = f"run {number + 1} of {runs}"
            plan.bar.task = "fit" if runs == 1 else f"fit, {name}"
            with clock.part(name, noted=False):
                lack = _first_lack(state, seed) if number and not plan.train_model else None
                make_run(plan, state.density, state.done[-1], starts, lack, seed=seed + number)
    plan.bar.task = "fit"
    state.guide = state.best.settle(plan, state.density)
    if not clock.over:
        with clock.part("a look at how uneven the density is"):
            uneven, impossible = _too_uneven(state.guide.flow, state.density)
            state.warnings, state.failures = state.warnings + uneven, state.failures + impossible
    if len(state.kept) > 1:
        with clock.part("the comparison of runs"):
            _compare(plan, state)
    if plan.train_model:
        state.density.forget()
    with clock.part("the search for modes that the guide lacks"):
        state.search = _search(state, state.guide._flow, seed)
    if plan.escalate and not plan.train_model:
        _add_runs(plan, state, starts, seed)


def _add_runs(plan: Plan, state: _State, starts: list[Start], seed: int) -> None:
    """Train further runs where the guide lacks a mode, until it lacks none; the guide becomes the mixture of all."""
    for _ in range(RUNS_ADDED):
        if state.search is None or not state.search.lacks or plan.clock.over:
            return
        number = len(state.done)
        state.done.append(Run(number))
        plan.bar.task = "fit, a run for a missed mode"
        with plan.clock.part("a run for a missed mode"), _threads(state.density):
            make_run(plan, state.density, state.done[-1], starts, state.search.lacks[0].start, seed=seed + number)
        plan.bar.task = "fit"
        state.guide = state.best.settle(plan, state.density)
        with plan.clock.part("the comparison of runs"):
            _compare(plan, state)
        state.added += 1
        with plan.clock.part("the search for modes that the guide lacks"):
            state.search = _search(state, state.guide._flow, seed)


def _search(state: _State, flow: Flow | FlowMixture, seed: int) -> Search:
    """Look for modes that a flow, or a mixture of them, lacks."""
    z, log_q = _draw(flow, MODE_DRAWS)
    modes = [mode for run in state.done for mode in run.modes]
    return missed_modes(state.density, modes, z, log_q, flow.log_prob, seed=seed)


def _first_lack(state: _State, seed: int) -> Start | None:
    """Return a start where the runs so far lack a mode: the next run trains there."""
    outcomes = [run.best for run in state.done[:-1] if run.best is not None and run.best.weighed]
    if not outcomes:
        return None
    flow: Flow | FlowMixture = outcomes[0].flow
    if len(outcomes) > 1:
        names = coordinate_names(state.density.structure)
        flow = FlowMixture.of([outcome.flow for outcome in outcomes], compare(outcomes, names).weights)
    lacks = _search(state, flow, seed).lacks
    return lacks[0].start if lacks else None


def _compare(plan: Plan, state: _State) -> None:
    """Compare runs; where they disagree, the guide becomes their mixture: all parts of the posterior come from it."""
    runs = state.kept
    agreement: Agreement = compare([run.best for run in runs if run.best], coordinate_names(state.density.structure))
    state.history.append(comparison(agreement))
    if agreement.holds:
        return
    state.disagreements = list(agreement.disagreements)
    assert state.guide is not None
    flows = [run.settle(plan, state.density)._single for run in runs]
    weights = balanced(flows, state.density, agreement.weights)
    state.history[-1]["weights"] = weights
    state.guide.adopt(FlowMixture.of(flows, weights))


def _judged(plan: Plan, state: _State, draws: int, seed: int, runs: int) -> Posterior:
    """Draw from the guide and judge what the work came to."""
    clock, density, best = plan.clock, state.density, state.best
    guide = best.settle(plan, density) if state.guide is None else state.guide
    mixed = [run for run in state.kept if run is not best and isinstance(guide._flow, FlowMixture)]
    notes = [note for run in [best, *mixed] for note in _warnings(run)]
    moving = best.best is None or best.best.training.moving
    cut_short = ["the fit was cut short while it still moved"] if moving else []
    seconds = clock.seconds if clock.finite else None
    search = state.search
    given = {"max_steps": plan.max_steps, "max_seconds": seconds, "train_model": plan.train_model, "runs": runs}
    return from_draws(
        density,
        functools.partial(_draw, guide._flow),
        draws=draws,
        seed=seed,
        guide=guide,
        losses=best.losses,
        history=[*state.history, *(stage for run in state.done for stage in run.history), *noted(search)],
        settings={**given, **_settings(best, guide, density), "seconds": clock.elapsed},
        warnings=[*notes, *state.warnings, *_differ(state, runs)],
        failures=[*([] if search is None else search.failures), *state.failures, *cut_short],
        notes=["no search for missed modes was made"] if search is None else search.notes,
        contained=search is not None and search.contained,
        doubts=[] if moving else _never_good(best),
    )


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


@torch.no_grad()
def _draw(flow: Flow | FlowMixture, n: int) -> tuple[Tensor, Tensor]:
    return flow.rsample_and_log_prob((n,))


def _warnings(run: Run) -> list[str]:
    if run.best is None:
        return []
    result = run.best.training
    found = [] if result.converged else [result.why]
    if result.skipped > 0.01 * len(result.losses):
        found.append(f"{result.skipped} of {len(result.losses)} steps had a gradient that is not finite")
    return found


def _differ(state: _State, runs: int) -> list[str]:
    """Say that runs disagree, or that some were added since the first ones lacked modes."""
    if not state.added or not state.disagreements:
        return state.disagreements
    what = "a run was" if state.added == 1 else f"{state.added} runs were"
    return [f"{what} added where the first {'one' if runs == 1 else 'ones'} lacked a mode, and mixed with it"]


def _never_good(run: Run) -> list[str]:
    """Say so where a fit was cut short and its rounds before had poor weights: one good sample is then a lucky one."""
    if run.best is None or run.best.training.converged:
        return []
    others = [stage for stage in run.history if "k_hat" in stage and stage["stage"] != run.kept.get("stage")]
    worst = max((math.inf if stage["k_hat"] is None else stage["k_hat"] for stage in others), default=0.0)
    if worst <= ENOUGH_K:
        return []
    return [f"the fit was cut short, and had k-hat {worst:.2f} before"]


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


def _settings(run: Run, guide: AutoFlow, density: LogDensity) -> dict[str, Any]:
    """What was chosen: step size and batch are those of the round that was kept."""
    return {
        "flow": guide._flow.settings,
        "noncentred": density.structure.noncentred,
        "round": run.kept.get("stage"),
        "step_size": run.kept.get("step_size"),
        "batch": run.kept.get("batch"),
        "gradient_evaluations": density.evaluations,
        "evaluation": density.reason or "recorded",
    }
