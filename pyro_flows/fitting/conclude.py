"""The last stage of a fit: draws from the sampler, the verdict on them, and the posterior."""

from __future__ import annotations

from pyro_flows.correction.search import noted
from pyro_flows.fitting.attempt import Combined, Run
from pyro_flows.fitting.plan import Plan
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.recipe import AUTO
from pyro_flows.flows.recipe_json import to_json
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.model.log_density import LogDensity
from pyro_flows.posterior.draws import from_draws
from pyro_flows.posterior.posterior import Posterior
from pyro_flows.training.loop import STOPPED
from pyro_flows.verdict.mcmc import UNSEARCHED


def conclude(plan: Plan, density: LogDensity, found: Combined) -> Posterior:
    """Draw from the sampler, judge what the work came to, and put the sampler into a guide."""
    best, search = found.best, found.search
    sampler = best.flow(plan, density) if found.sampler is None else found.sampler
    mixed = [run for run in found.kept if run is not best and isinstance(sampler, FlowMixture)]
    stopped = _stopped(plan, best) if found.multimodal is None else ""
    notes = [note for run in [best, *mixed] for note in _warnings(run, plan)] if found.multimodal is None else []
    moving = found.multimodal is None and (best.best is None or best.best.training.moving)
    cut_short = ["training did not converge: means or sds still changed when it ended"]
    cut_short = cut_short if moving and not (found.improper or stopped) else []
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
        history=[*found.history, *(stage for run in found.runs for stage in run.history), *noted(search)],
        settings={**_asked(plan), **_chosen(best, sampler, density), "seconds": plan.clock.elapsed},
        warnings=[*notes, *found.warnings, *_differ(found, plan.runs)],
        failures=[*found.improper, *([] if search is None else search.failures), *found.failures, *cut_short],
        notes=[UNSEARCHED] if search is None else search.notes,
        doubts=[] if moving or found.multimodal is not None else _in_vain(found),
    )


def _asked(plan: Plan) -> dict[str, object]:
    """What the caller asked for; ``flow`` is what was asked for, ``sampler`` what the work came to."""
    seconds = plan.clock.seconds if plan.clock.finite else None
    bounds = {"max_steps": plan.max_steps, "max_seconds": seconds, "train_model": plan.train_model, "runs": plan.runs}
    return {"flow": plan.asked.get("flow", AUTO), "asked": dict(plan.asked), **bounds}


def _chosen(run: Run, sampler: Flow | FlowMixture, density: LogDensity) -> dict[str, object]:
    """What was chosen: step size and batch are those of the round that was kept."""
    kept = run.kept
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


def _differ(found: Combined, runs: int) -> list[str]:
    """Say that runs disagree, or what was added since the first ones lacked modes."""
    said = list(found.disagreements)
    if found.multimodal is not None:
        said = [found.multimodal.said]
    if found.added and said and found.multimodal is None:
        what = "a run was" if found.added == 1 else f"{found.added} runs were"
        said = [f"the first run{'' if runs == 1 else 's'} missed a mode, so {what} added there to form a mixture"]
    if found.copies > 1:
        said.append(f"one of {found.copies} symmetric modes was fitted, and copied to the others")
    return said


def _in_vain(found: Combined) -> list[str]:
    """Say so where runs that began at missed modes came to the same posterior as the first: they may have left them."""
    if not found.added or found.disagreements or found.copies > 1:
        return []
    return ["runs that started at a missed mode found the same posterior as the first run"]
