"""``fit``: from a Pyro model and its data to a judged posterior, in one call."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import nn

from pyro_flows.fitting.combine import combine, drawn, make_runs
from pyro_flows.fitting.hierarchical import fit_hierarchical
from pyro_flows.fitting.ranks import check_alone, ranks
from pyro_flows.fitting.run import prepare
from pyro_flows.fitting.state import FitState, Plan, Run, Sampler, as_asked, recipe_for
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.recipe import AUTO, FlowLike
from pyro_flows.flows.recipe_json import to_json
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.inference.chains.refine import fallback_sampler, which
from pyro_flows.inference.chains.search import noted
from pyro_flows.inference.scoring import check_memory, seconds_to_judge
from pyro_flows.inference.starts.curvature import SMALL_UP_TO
from pyro_flows.inference.training.loop import STOPPED
from pyro_flows.inference.verdict.deciding import UNSEARCHED
from pyro_flows.model.arguments import usable
from pyro_flows.model.faults import Subsampled
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.observations import warn_if_nothing_observed
from pyro_flows.model.precision import LostDigits
from pyro_flows.model.unchanged import identity, own
from pyro_flows.posterior.draws import from_draws
from pyro_flows.posterior.posterior import Posterior
from pyro_flows.support import checks
from pyro_flows.support.process import journal, stages
from pyro_flows.support.process.clock import Clock, unbounded
from pyro_flows.support.process.interrupts import STATE, Released, interruptible
from pyro_flows.support.process.ledger import counted, said
from pyro_flows.support.process.progress import Bar
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.process.threads import alone, few_threads
from pyro_flows.support.process.warnings import outside

MAX_STEPS = 6000  # of a run


@checks.options
def fit(
    model: Callable[..., object],
    *args: object,
    model_kwargs: Mapping[str, object] | None = None,
    flow: FlowLike = AUTO,
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
    checkpoint: str | os.PathLike[str] | None = None,
) -> Posterior:
    r"""Fit the posterior of a Pyro model by the cheapest method that passes, judge it, and return draws.

    ``posterior.method`` names the method: a Gaussian, a grid, conditionals, a mixture, a trained flow, MCMC. A trained
    flow is :math:`z = m + L(b + A\,t(f(\epsilon)))` over all latents in unconstrained coordinates: f a normalizing
    flow, t tails for each coordinate, :math:`\epsilon` Student-t with 15 degrees of freedom (2 D, if that is more). m
    and L come from the best of several initial Gaussians. Training maximizes the ELBO by path gradients and stops by
    itself.

    Args:
        model: a Pyro model (function or module).
        args: its positional arguments, as a rule the data.
        model_kwargs: its keyword arguments.
        flow: ``"auto"``, the cheapest of these methods that passes: a conditional Laplace grid, a Gaussian, Gaussian
            conditionals, independent coordinates, a mixture, a trained flow (``"realnvp"``), MCMC. Or a flow that is
            trained first, which changes the method: no grid and no Gaussian conditionals are tried before:
            ``"realnvp"``, ``"nice"``, ``"planar"``, ``"spline"``, a :class:`Flow` or :class:`Bijection` of the right
            dimension (it is copied), or a function of the dimension that returns one. In one dimension couplings are
            affine, so ``"planar"`` is used for ``"realnvp"`` and ``"nice"``.
        layers: number of layers, for a flow given by name, 1000 at most; the default is the builder's.
        draws: how many draws to return, at least 100, and ten million at most, or what the memory holds; four times as
            many are judged by. A sampler (``refine``) returns all that it is judged by, 4096 at least.
        seed: of all randomness. One seed gives one answer, given the versions of packages, the processor, the compiler
            and the number of threads. Torch's global generator is left as it was.
        max_steps: bound on the optimization steps of a run, 64 gradient evaluations each; by default 6000, and more
            above 50 dimensions, twice as many from 200 on.
        max_seconds: bound on the seconds of the whole call, above zero: starts, training, the search for
            modes and the final draws. It is kept within a second or a fifth, unless a single run of the model takes
            longer. At the limit, the result so far is checked, with fewer draws if necessary, and the verdict says what
            was skipped. Time spent waiting for another fit in the same process does not count.
        train_model: also train the model's own parameters (``pyro.param``, modules); by default they are held fixed.
        escalate: where one flow does not suffice, go on with MCMC in its place, mixtures, and runs at missed modes. If
            the other latents are approximately normal given one latent, a grid over that one is used. For several
            modes, a mixture of Student-t distributions is begun at all of them, or the densities of independent
            coordinates are tabulated. If this is good enough before any training, no flow is trained; else up to seven
            more runs start at missed modes, and the guide is a mixture of all. With False, one flow is trained and
            judged.
        refine: run MCMC from the flow's draws (see :meth:`Posterior.refine`) if the first round does not suffice, and
            if the verdict would be ``unreliable``: ``"auto"``, or one of its methods for the latter; False never does.
            MCMC is not tried with ``train_model``.
        runs: independent runs with seeds and starts of their own, 100 at most. From 2 on, each trains a flow, unless
            the initial Gaussian passes: no grid, no Gaussian conditionals and no tables are tried before. So ``runs``
            changes the method, and is for comparing trainings. If runs disagree, the verdict names the sites, and the
            guide becomes a mixture of the runs, weighted so that it is as close to the posterior as it can be.
        progress: show what is being done: a stage, steps and ELBO, and the seconds so far. In a terminal or notebook
            that is one line; anywhere else, one line on stderr for each stage, and one every ten seconds.
        raise_on_interrupt: let Ctrl-C raise ``KeyboardInterrupt``. By default, once the model has been read, it ends
            the work, and what there is by then is judged and returned, never as ``ok``; a second Ctrl-C raises.
            SIGTERM and SIGHUP, which batch systems and closed terminals send, do the same in the main thread, unless
            the program handles them itself.
        checkpoint: a file that keeps the results of the work's steps, written every ten seconds and as methods end, in
            2 % of the time at most. A call that was stopped, by a kill or by Ctrl-C, goes on from there, and comes to
            the posterior of a call that was not stopped, to the last digit with one thread. It belongs to one model,
            its data, options, packages and machine. Of a model that takes less than a millisecond for a kilobyte of
            results, only training and MCMC are kept. With ``max_seconds``, each call has so many. The file stays there
            at the end.

    A model with a subsampled plate is fitted by an :class:`AutoHierarchicalFlow`, on minibatches. The posterior is then
    that of the latents outside of plates, judged by all rows, with 1000 draws at most; :meth:`Posterior.local_samples`
    draws the others. Up to some 4,700 rows, or data of rows (fewer, where rows are far from normal), a mixture of
    Student-t distributions is fitted to these latents by importance weights before any training. Chains of them come
    last, if the verdict would be ``unreliable``. ``runs`` above 1 and ``train_model`` are refused.

    Returns:
        A :class:`Posterior`; read its ``verdict`` first.

    Cost: five seconds of one thread for ten latents and few data, and a minute or two for a hundred latents.

    Raises:
        ValueError: before any work, for a bad option, a model that cannot be fitted, or data outside of the support of
            their likelihood; the argument or site is named. For a checkpoint that is damaged, of another call, or of
            several processes.

    Warns:
        NothingObservedWarning: for a model with neither data nor factors, so that the posterior is the prior.
        UserWarning: after Ctrl-C.

    Fits take turns: a call from a second thread waits for the first one, since Pyro's handlers, its validation and
    torch's random numbers belong to the whole process; a call from inside of a model does not wait. For several fits at
    once, take processes. Inside of ``torch.no_grad()`` and ``torch.inference_mode()`` it gives the same as outside.

    References: Agrawal, Sheldon and Domke 2020 (arXiv 2006.10343); Vaitl et al. 2024 (arXiv 2403.15881); Vehtari et al.
    2024 (k-hat, arXiv 1507.02646).

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> posterior = pf.fit(model, torch.tensor(1.3), progress=False, max_steps=1500)
    >>> posterior.verdict.status
    'ok'
    """
    if layers is not None and not isinstance(flow, str):
        raise ValueError("layers: goes with a flow given by name; this flow is already built.")
    options: dict[str, object] = {} if layers is None else {"layers": layers}
    method = which(refine)
    asked = as_asked(locals())
    checkpoint = journal.check(checkpoint)
    with interruptible(), alone(), seeded(seed), Bar("fit", progress) as bar:
        clock = Clock(max_seconds, raises=raise_on_interrupt, watch=bar.watch)
        plan = Plan(
            model,
            *usable(model, *own(args, model_kwargs)),
            recipe_for(flow, options),
            draws=draws,
            seed=seed,
            runs=runs,
            max_steps=max_steps or MAX_STEPS,
            train_model=train_model,
            escalate=escalate,
            refine=method,
            clock=clock,
            bar=bar,
            automatic=flow == AUTO and not options,
            asked=asked,
        )
        posterior = _fit(plan, max_steps is None, checkpoint)
        _close(bar, clock, posterior)
        return posterior


def _close(bar: Bar, clock: Clock, posterior: Posterior) -> None:
    """Say in the line of progress how the fit ended. Signals get a warning where :func:`fit` was called."""
    said(method=posterior.method, status=posterior.verdict.status, steps=len(posterior.losses))
    steps = f"{len(posterior.losses)} steps, " if len(posterior.losses) else ""
    bar.close(f"{steps}{posterior.method}, {posterior.verdict.status}")
    if STATE.take():
        if clock.raises:
            raise KeyboardInterrupt(STATE.name)
        warnings.warn(f"fit: {STATE.name} came as all was done; nothing was cut.", stacklevel=outside())
    elif clock.interrupted is not None:
        warnings.warn(f"fit: {clock.reasons()[0]}. The posterior is what it had come to by then.", stacklevel=outside())


def default_steps(dim: int) -> int:
    """Return how many steps a run may take at most, if nothing is said: 6000, and more from 50 dimensions on."""
    return round(MAX_STEPS * min(max(dim / SMALL_UP_TO, 1.0), 4.0) ** 0.5)


def _fit(plan: Plan, grow: bool, checkpoint: str | os.PathLike[str] | None) -> Posterior:
    """Fit under the plan's clock: the work, which can be cut anywhere, and the judging of what it came to."""

    def keeping(density: LogDensity) -> AbstractContextManager[None]:
        return journal.keeping(checkpoint, lambda: {**_about(plan), **identity(density)})

    plan.bar.watch(stages.READING)
    with counted(stages.READING):
        try:
            density = LogDensity(plan.model, plan.args, plan.kwargs)
        except Subsampled:
            if checkpoint is not None and ranks().size > 1:
                raise ValueError("checkpoint: expected None for a fit by several processes. Leave it out.") from None
            return fit_hierarchical(plan, keeping)
    check_alone()
    warn_if_nothing_observed(density.structure, density.trace_at, plan.model, plan.args, plan.kwargs)
    check_memory(density, plan.draws)
    plan = replace(plan, max_steps=default_steps(density.dim)) if grow else plan
    if plan.train_model and not density.parameters():
        raise ValueError("train_model: expected a model with parameters of its own (pyro.param, modules), got none.")
    if plan.train_model and plan.runs > 1:
        raise ValueError("runs: expected 1 with train_model=True, since the runs would share the model's parameters.")
    with few_threads(density.numbers), keeping(density):
        try:
            return _fitted(plan, density)
        except LostDigits:
            plan.bar.watch("reading the model in double precision")
            return _fitted(plan, density.in_double())


def _about(plan: Plan) -> dict[str, object]:
    """Return what tells a call from others of one model."""
    named = {name: getattr(plan, name) for name in ("draws", "seed", "runs", "max_steps", "train_model", "escalate")}
    built = plan.recipe.builder
    state = [*built.state_dict().values()] if isinstance(built, nn.Module) else []
    flow = [str(getattr(built, "__qualname__", built if isinstance(built, str) else type(built).__qualname__))]
    flow += [str(plan.recipe.options), str(journal.checksum(state)), str(plan.automatic)]
    return {"call": "fit", **named, "refine": plan.refine, "max_seconds": plan.clock.seconds, "flow": flow}


def _fitted(plan: Plan, density: LogDensity) -> Posterior:
    clock, state = plan.clock, FitState(plan, density)
    density.under(clock)
    STATE.hold(not clock.raises)  # until the call ends: parts of the work let the first signal through
    try:
        with clock.part(stages.FIT):
            if clock.finite:
                clock.reserve(seconds_to_judge(density, plan.draws))
            prepare(state.runs[0])
            make_runs(state)
            combine(state)
            if not (clock.over or state.improper):
                with seeded(derive(plan.seed, "digits"), density.device):
                    state.density.check_digits(drawn(state))
        clock.deliver_signal(stages.JUDGING)
        clock.judging()
        plan.bar.watch(stages.JUDGING)
        if clock.interrupted is not None:
            clock.reserve(seconds_to_judge(state.density, plan.draws))
        with counted(stages.JUDGING):
            try:
                with Released():
                    posterior = conclude(state)
            except KeyboardInterrupt:
                if not clock.interrupt(stages.JUDGING):
                    raise
                posterior = conclude(state)
    finally:
        state.density.under(unbounded())
    if plan.refine is None or plan.train_model or state.improper:
        return posterior
    chains = state.chains
    searched = state.search is not None and state.search.passed
    passed = chains is not None and state.best.sampled
    return fallback_sampler(posterior, plan.refine, clock, plan.bar, chains, searched=searched, passed=passed)


# the last stage: draws from the sampler, the verdict on them, and the posterior ---------------------------------------


def conclude(state: FitState) -> Posterior:
    """Draw from the sampler, judge what the work came to, and put the sampler into a guide."""
    plan, density, best, search = state.plan, state.density, state.best, state.search
    sampler = best.flow() if state.sampler is None else state.sampler
    mixed = [run for run in state.kept if run is not best and isinstance(sampler, FlowMixture)]
    of_flow = state.multimodal is None
    stopped = _stopped(plan, best) if of_flow else ""
    notes = [*_warnings(best, plan), *_of_others(mixed, plan)] if of_flow else []
    moving = of_flow and (best.best is None or best.best.training.moving)
    cut_short = ["training did not converge: means or sds still changed when it ended"]
    cut_short = cut_short if moving and not (state.improper or stopped) else []
    return from_draws(
        density,
        sampler.draw,
        draws=plan.draws,
        seed=plan.seed,
        checked=plan.checked,
        stopped=stopped,
        moving=bool(stopped) and moving,
        guide=AutoFlow.of(sampler, density.structure, plan.model, plan.args, plan.kwargs),
        losses=best.losses,
        history=[*state.history, *(stage for run in state.runs for stage in run.history), *noted(search)],
        settings={**_asked(plan), **_chosen(best, sampler, density), "seconds": plan.clock.elapsed},
        warnings=[*notes, *_differ(state)],
        failures=[*state.improper, *([] if search is None else search.failures), *state.failures, *cut_short],
        notes=[UNSEARCHED] if search is None else search.notes,
        doubts=[] if moving or not of_flow else _in_vain(state),
    )


def _asked(plan: Plan) -> dict[str, object]:
    """What the caller asked for; ``flow`` is what was asked for, ``sampler`` what the work came to."""
    seconds = plan.clock.seconds if plan.clock.finite else None
    bounds = {"max_steps": plan.max_steps, "max_seconds": seconds, "train_model": plan.train_model, "runs": plan.runs}
    return {"flow": plan.asked.get("flow", AUTO), "asked": dict(plan.asked), **bounds}


def _chosen(run: Run, sampler: Sampler, density: LogDensity) -> dict[str, object]:
    """What was chosen: step size and batch are those of the round that was kept."""
    kept = None if run.best is None else run.best.stage
    return {
        "sampler": to_json(sampler),
        "noncentered": density.structure.noncentered,
        "round": None if kept is None else kept.stage,
        "step_size": None if kept is None else kept.step_size,
        "batch": None if kept is None else kept.batch,
        "gradient_evaluations": density.evaluations,
        "evaluation": density.reason or "recorded",
    }


def _stopped(plan: Plan, run: Run) -> str:
    """Say where in the training the time was over, or Ctrl-C came; empty if that was elsewhere."""
    if not plan.clock.cut or run.improper:
        return ""
    if run.best is None or not len(run.losses):
        return "before training"
    return "during training" if run.best.training.why.startswith(STOPPED) else ""


def _warnings(run: Run, plan: Plan) -> list[str]:
    if run.best is None:
        return []
    result = run.best.training
    told = plan.clock.cut and result.why.startswith(STOPPED)  # by the clock's reason
    found = [] if result.converged or told else [result.why]
    if result.skipped > 0.01 * len(result.losses):
        found.append(f"{result.skipped} of {len(result.losses)} training steps had a gradient that is not finite")
    return found


def _of_others(runs: Sequence[Run], plan: Plan) -> list[str]:
    """Count the further runs of a mixture whose training did not converge; each has figures of its own."""
    trained = [run.best.training for run in runs if run.best is not None and _warnings(run, plan)]
    count = sum(not training.converged for training in trained)
    return [f"training of {count} of the {len(runs)} other runs in the mixture did not converge"] if count else []


def _differ(state: FitState) -> list[str]:
    """Say that runs disagree, or what was added since the first ones lacked modes."""
    said = list(state.disagreements)
    if state.multimodal is not None:
        said = [state.multimodal.said]
    if state.added and said and state.multimodal is None:
        what = "a run was" if state.added == 1 else f"{state.added} runs were"
        first = "the first run" if state.plan.runs == 1 else "the first runs"
        said = [f"{first} missed a mode, so {what} added there to form a mixture"]
    if state.copies > 1:
        said.append(f"one of {state.copies} symmetric modes was fitted, and copied to the others")
    return said


def _in_vain(state: FitState) -> list[str]:
    """Say so where runs that began at missed modes came to the same posterior as the first: they may have left them."""
    if not state.added or state.disagreements or state.copies > 1:
        return []
    return ["runs that started at a missed mode found the same posterior as the first run"]
