"""The last stage of a fit: draws from the sampler, the verdict on them, and the posterior."""

from __future__ import annotations

from pyro_flows.correction.search import noted
from pyro_flows.fitting.plan import Plan
from pyro_flows.fitting.state import FitState, Run, Sampler
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.recipe import AUTO
from pyro_flows.flows.recipe_json import to_json
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.model.log_density import LogDensity
from pyro_flows.posterior.draws import from_draws
from pyro_flows.posterior.posterior import Posterior
from pyro_flows.training.loop import STOPPED
from pyro_flows.verdict.mcmc import UNSEARCHED


def conclude(state: FitState) -> Posterior:
    """Draw from the sampler, judge what the work came to, and put the sampler into a guide."""
    plan, density, best, search = state.plan, state.density, state.best, state.search
    sampler = best.flow() if state.sampler is None else state.sampler
    mixed = [run for run in state.kept if run is not best and isinstance(sampler, FlowMixture)]
    of_flow = state.multimodal is None
    stopped = _stopped(plan, best) if of_flow else ""
    notes = [note for run in [best, *mixed] for note in _warnings(run, plan)] if of_flow else []
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
        warnings=[*notes, *state.warnings, *_differ(state)],
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
