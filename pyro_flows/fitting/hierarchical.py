"""``fit`` and ``diagnose`` for models with plates: latents in plates are integrated out, row by row."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_flows.fitting.modes_of_globals import missed, sought, with_modes
from pyro_flows.fitting.multimodal import candidate_of
from pyro_flows.fitting.ranks import Followed, RowsOfRank, ranks
from pyro_flows.fitting.state import SHARE_OF_SECONDS, Plan
from pyro_flows.flows.recipe import begin_at, begun_at, set_df
from pyro_flows.guides.crossed_marginal import CrossedMarginal
from pyro_flows.guides.hierarchical import AutoHierarchicalFlow
from pyro_flows.guides.integrated import MOST_DRAWS
from pyro_flows.guides.marginal import Marginal
from pyro_flows.guides.marginal_density import INTEGRATED, MarginalDensity
from pyro_flows.inference.chains.refine import fallback_sampler
from pyro_flows.inference.modes.missed_modes import sentence_on
from pyro_flows.inference.modes.missed_regions import MissedRegion
from pyro_flows.inference.modes.population_monte_carlo import GENERATIONS, about, fitted
from pyro_flows.inference.record import Stage
from pyro_flows.inference.scoring import JUDGING
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.starts.portfolio import moved, tells_moments
from pyro_flows.inference.verdict.deciding import CHECKED, LOOKED_AT_DRAWS, POOL, UNSEARCHED, Draw, status_of
from pyro_flows.inference.verdict.methods import MIXTURE
from pyro_flows.inference.verdict.verdict import NAMED
from pyro_flows.inference.verdict.weighing import Weighing, weigh
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.observations import NothingObservedWarning
from pyro_flows.model.sites import Keywords, Model, Positional, coordinates_of
from pyro_flows.posterior.draws import from_draws
from pyro_flows.posterior.export.methods_text import method_of
from pyro_flows.posterior.posterior import Posterior
from pyro_flows.support.files.bundles import Entries
from pyro_flows.support.process import journal, stages
from pyro_flows.support.process.clock import Clock, OutOfTime, unbounded
from pyro_flows.support.process.interrupts import STATE
from pyro_flows.support.process.progress import Bar
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.process.warnings import outside
from pyro_flows.support.thresholds import ROW_ERROR_MOST, SHIFT_ERRORS

WHOLE_UP_TO = 1000  # latents that are judged together, if the model has all rows at each run
ROUND = 500  # steps of the first round; each next one has twice as many
FEW = LOOKED_AT_DRAWS // 10
OF_OTHERS = "latents of rows were integrated out, and the guide's flow is that of the others alone"
RATE = 5e-3  # of Adam, at the beginning of a round


def diagnose_hierarchical(
    model: Model, guide: AutoHierarchicalFlow, args: Positional, kwargs: Keywords, draws: int, seed: int, bar: Bar
) -> Posterior:
    """Judge a guide with structure; see :func:`pyro_flows.diagnose`."""
    with seeded(seed):
        guide.initialize(*args, **kwargs)
        marginal = _marginal(guide, args, kwargs, seed)
        whole = _whole_draw(model, guide, args, kwargs, marginal.marginal)
        bar.watch(stages.JUDGING)
        about: dict[str, Any] = {"settings": {"diagnosed": True}, "losses": torch.zeros(0)}
        if whole is None:
            return _posterior(guide, marginal, _checked(guide, marginal, seed, unbounded()), draws, seed, about)
        z, _ = _global_draw(guide)(CHECKED)
        second = marginal.marginal.second_modes(z.median(0).values)
        failures = _of_rows(second, marginal.marginal.row_count, guide)
        regions = missed(marginal, _global_draw(guide), guide.score_globals, seed=seed)
        failures += [sentence_on(marginal, regions, z)] if regions else []
        about |= {"failures": failures, "notes": [sought(marginal)]}
        return from_draws(*whole, draws=draws, seed=seed, guide=guide, **about)


def fit_hierarchical(plan: Plan, keeping: Callable[[LogDensity], AbstractContextManager[None]]) -> Posterior:
    """Train a guide with structure on minibatches, and judge it by all rows; see :func:`pyro_flows.fit`.

    ``keeping`` is the context in which steps are kept in a checkpoint.
    """
    if plan.runs > 1 or plan.train_model:
        name = "train_model" if plan.train_model else "runs"
        raise ValueError(f"{name}: not available for a model with subsampled plates. Leave it out, or give all rows.")
    clock, trained, store = plan.clock, _Trained(), pyro.get_param_store()
    with store.scope(state=store.get_state()), seeded(derive(plan.seed, "a guide with plates")):
        guide = _begun(plan)
        if not ranks().first:
            _fitted(guide, None, plan, trained)
            raise Followed
        density = _marginal(guide, plan.args, plan.kwargs, plan.seed)
        if clock.finite and not clock.over:
            clock.reserve(_seconds_to_judge(guide, density, plan.draws))
        density.under(clock)
        STATE.hold(not clock.raises)  # until the call ends
        try:
            with keeping(density), clock.part(stages.TRAINING):
                _fitted(guide, density, plan, trained)
            checks = _checked(
                guide, density, plan.seed, clock, lambda regions: _mended(guide, density, plan, trained, regions)
            )
            clock.judging()
            plan.bar.watch(stages.JUDGING)
            if clock.interrupted is not None:
                clock.reserve(_seconds_to_judge(guide, density, plan.draws))
            posterior = _concluded(guide, density, checks, plan, trained)
        finally:
            density.under(unbounded())
    if plan.refine is None or checks.failures or not _is_cheap(density):  # chains of the globals do not mend rows
        return posterior
    return fallback_sampler(posterior, plan.refine, clock, plan.bar)


@dataclass
class _Trained:
    """What training has come to so far."""

    losses: list[float] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    good: bool = False
    best: tuple[float, dict[str, Tensor]] | None = None  # highest ELBO, and the last flow as good
    mended: int = 0  # how often modes that were missed were added


def _begun(plan: Plan) -> AutoHierarchicalFlow:
    """Return a guide at its start; at the prior, if the time is over before, or Ctrl-C comes."""
    options = dict(plan.recipe.options)
    guide = AutoHierarchicalFlow(plan.model, plan.recipe.builder, **options)
    with plan.clock.part(stages.STARTS), plan.clock.watching():
        guide.initialize(*plan.args, **plan.kwargs)
    if guide.top is None:
        guide = AutoHierarchicalFlow(plan.model, plan.recipe.builder, init="prior", **options)
        guide.initialize(*plan.args, **plan.kwargs)
    if not guide.has_data:
        guide.reason = None  # none is hidden: the posterior is the prior, of which a warning tells
    if plan.recipe.named:
        flow = guide._top._single
        start = begun_at(flow)
        begin_at(set_df(flow, max(7.0, float(flow.dim))), *start)  # draws that are weighed need tails: .13 nats at most
    return guide


def _fitted(guide: AutoHierarchicalFlow, density: MarginalDensity | None, plan: Plan, trained: _Trained) -> None:
    """Train by rounds until draws of the globals can be corrected by weights: the process with a density says so."""
    steps = ROUND
    while True:
        over, elbo, mixture = False, math.nan, None
        try:
            if density is not None:
                found = _look(guide, density, moves=not trained.stages)
                status, elbo = status_of(found), found.elbo
                trained.good = status != "unreliable"
                noise = SHIFT_ERRORS * float(found.log_weights.std().nan_to_num()) / math.sqrt(len(found.log_weights))
                if trained.best is None or not elbo < trained.best[0] - noise:
                    state = {name: value.clone() for name, value in guide._top._flow.state_dict().items()}
                    trained.best = elbo if trained.best is None else max(trained.best[0], elbo), state
                if plan.open and status != "ok" and not trained.stages:
                    with plan.clock.part(MIXTURE, share=SHARE_OF_SECONDS, noted=False):
                        mixture = _mixture(guide, density, plan.seed)
                    trained.good = trained.good or mixture is not None
        except OutOfTime:
            if ranks().size == 1:
                raise
            over = True  # the other processes wait for what this one says
        stage = stages.FIRST_ROUND if trained.stages else stages.INITIAL
        looked = Stage(stage=stage, elbo=elbo, steps=len(trained.losses))
        trained.stages += [looked] if mixture is None else [looked, mixture]
        steps = min(steps, plan.max_steps - len(trained.losses))
        over = over or (density is not None and not density.marginal.trainable)
        if ranks().agreed(trained.good or over or steps <= 0):
            if trained.best is not None and not trained.good and elbo < trained.best[0]:  # training made it worse
                guide._top._flow.load_state_dict(trained.best[1])
            return
        plan.bar.watch(stages.TRAINING)
        _train(guide, plan, steps, trained.losses)
        steps = 2 * ROUND


def _mixture(guide: AutoHierarchicalFlow, density: MarginalDensity, seed: int) -> Stage | None:
    """Fit a mixture to the globals by weighted draws, where a pass over all rows is cheap; None unless it is good.

    Minibatches tell little of a tail, such as that of the log of a scale that may be zero.
    """
    if not _is_cheap(density):
        return None
    draws = _looked_at(density)
    parts = about(_global_draw(guide)(draws)[0], 1)
    best = None if parts is None else fitted(density, parts, seed=seed, draws=draws)
    candidate = None if best is None else candidate_of(best, "", {"parts": len(best.parts)})
    if candidate is None or not candidate.enough:
        return None
    guide.take_flow(candidate.sampler)
    return candidate.stage


def _seconds_to_judge(guide: AutoHierarchicalFlow, density: MarginalDensity, draws: int) -> float:
    """Time four evaluations, and return about how many seconds judging takes at most."""
    began = monotonic()
    density.marginal(_global_draw(guide)(4)[0])
    return (monotonic() - began) / 4 * POOL * density.affordable(draws) + 0.1


def _concluded(
    guide: AutoHierarchicalFlow, density: MarginalDensity, checks: _Checks, plan: Plan, trained: _Trained
) -> Posterior:
    """Judge what the work came to; Ctrl-C may come once more."""
    clock, stopped = plan.clock, bool(plan.clock.cut and not trained.good)
    asked = {"asked": dict(plan.asked), "flow": plan.asked.get("flow", plan.recipe.builder)}
    asked["max_seconds"] = clock.seconds if clock.finite else None
    when = "during training" if trained.losses else "before training"
    about = {"losses": torch.tensor(trained.losses), "history": trained.stages}
    about |= {"stopped": when if stopped else "", "moving": stopped}

    def conclude() -> Posterior:
        said = {**about, "settings": {**asked, "seconds": clock.elapsed}}
        return _posterior(guide, density, checks, plan.draws, plan.seed, said)

    try:
        return conclude()
    except KeyboardInterrupt:
        if not clock.interrupt(JUDGING):
            raise
        return conclude()


# what is to be judged -------------------------------------------------------------------------------------------------


@dataclass
class _Checks:
    """What was found of the rows and of other modes: what speaks against the draws, notes, and figures."""

    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, object] = field(default_factory=dict)


def _checked(
    guide: AutoHierarchicalFlow, density: MarginalDensity, seed: int, clock: Clock,
    mended: Callable[[list[MissedRegion]], bool] = lambda regions: False,
) -> _Checks:  # fmt: skip
    """Look at the rows, and for missed modes; what the clock cuts speaks against the draws.

    If the guide was ``mended`` for the modes that it missed, it is looked at again.
    """
    found, checked, note = _Checks(), False, UNSEARCHED
    z, _ = _global_draw(guide)(CHECKED)
    with clock.part(stages.ROWS):
        _check_rows(found, guide, density, z)
        checked = True
    if not checked:
        found.failures.append("no time for a check of all rows")
    with clock.part(stages.MISSED):
        regions = missed(density, _global_draw(guide), guide.score_globals, seed=seed)
        found.failures += [sentence_on(density, regions, z)] if regions else []
        note = sought(density)
        if regions and mended(regions):  # which may be cut: then this stays said
            return _checked(guide, density, seed, clock, mended)
    found.notes.append(note)
    return found


def _mended(
    guide: AutoHierarchicalFlow, density: MarginalDensity, plan: Plan, trained: _Trained, regions: list[MissedRegion]
) -> bool:
    """Let the guide have the regions that it misses, if it can; a flow that was asked for by name stays alone."""
    tried = None
    if plan.open and trained.mended < 4:  # images of what was found, and modes beyond the three climbs of a search
        with plan.clock.part(MIXTURE, share=SHARE_OF_SECONDS, noted=False):
            draws = _looked_at(density) if _is_cheap(density) else 0
            tried = with_modes(density, guide._top._flow, regions, draws, seed=plan.seed)
    if tried is not None:
        guide.take_flow(tried.sampler)
        trained.stages.append(tried.stage)
        trained.mended += 1
    return tried is not None


def _check_rows(found: _Checks, guide: AutoHierarchicalFlow, density: MarginalDensity, z: Tensor) -> None:
    """Choose the draws of a row, and look for rows whose likelihoods are poor."""
    marginal = density.marginal
    rows, errors = marginal.row_count, marginal.choose_count(z)
    density.level_error = errors.level
    worst, second = marginal.worst_rows(z), marginal.second_modes(z.median(0).values)
    poor = [f"{row.plate}[{row.row}] ({row.k_hat:.2f})" for row in worst]
    found.failures += _named(poor, rows, "a k-hat of 0.7 or more") + _of_rows(second, rows, guide)
    if not errors.differences <= ROW_ERROR_MOST:
        found.failures.append(
            f"the likelihoods of rows are too rough: an error of {errors.differences:.2g} nats between draws of the "
            f"other latents, with {marginal.count} draws of each row"
        )
    found.settings |= {"rows": rows, "worst_rows": [list(row) for row in [*(row[:2] for row in worst), *second]]}
    how = "normal distributions of all" if isinstance(marginal, CrossedMarginal) else f"{marginal.count} draws of each"
    if rows:
        found.notes.append(
            f"samples hold the latents outside of plates; those of {rows:,} rows were integrated out by {how} "
            f"(error {errors.differences:.2g} nats, of the log evidence {errors.level:.2g} nats), and "
            "local_samples() draws them"
        )


def _posterior(
    guide: AutoHierarchicalFlow, density: MarginalDensity, checks: _Checks, draws: int, seed: int, about: Entries
) -> Posterior:
    """Return the posterior of the globals, judged with latents in plates integrated out."""
    if not guide.has_data:
        what = "model: nothing is observed (no obs= with values, no pyro.factor), so the posterior is the prior."
        warnings.warn(what, NothingObservedWarning, stacklevel=outside())
    said = {**about, "settings": {**about["settings"], **checks.settings, INTEGRATED: density.recipe}}
    said |= {"notes": checks.notes, "failures": checks.failures, "draws": density.affordable(draws)}
    if isinstance(density.marginal, CrossedMarginal):
        said["times"] = 1
    found = from_draws(density, _global_draw(guide), seed=seed, guide=guide, **said)
    found = replace(found, missing={"flow": OF_OTHERS})
    if said["settings"].get("diagnosed"):
        return found
    return replace(found, verdict=replace(found.verdict, guide_method=method_of(guide._top._flow)))


def _of_rows(second: list[tuple[str, int]], rows: int, guide: AutoHierarchicalFlow) -> list[str]:
    """Say which rows have a second mode, and what the guide cannot follow."""
    said = _named([f"{plate}[{row}]" for plate, row in second], rows, "a second mode")
    return said if guide.reason is None else [*said, guide.reason]


def _named(names: list[str], rows: int, what: str) -> list[str]:
    """Say how many rows have something, and name some; nothing if there are none."""
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return [f"{len(names)} of {rows:,} rows have {what}: {', '.join(names[:NAMED])}{more}"] if names else []


def _looked_at(density: MarginalDensity) -> int:
    """Return by how many draws of the globals a guide is looked at before it is judged: more where a pass is cheap.

    A mixture takes as many in each of 40 generations at most, and then costs as much as chains may.
    """
    few = FEW * density.marginal.most_draws // MOST_DRAWS
    if few < FEW or not density.marginal.batched:  # a pass is dear
        return few
    return min(LOOKED_AT_DRAWS, max(few, int(density.most_gradients) // (10 * GENERATIONS)))


def _is_cheap(density: MarginalDensity) -> bool:
    """Whether a pass over all rows is so cheap that a mixture, or chains, of the globals take some minutes at most."""
    return density.marginal.trainable and _looked_at(density) > FEW


def _look(guide: AutoHierarchicalFlow, density: MarginalDensity, *, moves: bool) -> Weighing:
    """Return the weights of draws of the globals.

    A guide that ``moves`` goes to the moments that the weights tell, and is looked at again, unless that takes long and
    weights correct its draws.
    """
    z, log_q = _global_draw(guide)(_looked_at(density))
    density.marginal.choose_count(z[:CHECKED])
    found = weigh(z, density(z), log_q, quantiles=True)
    if not (moves and guide._top.affine is not None and tells_moments(found)):
        return found
    flow = guide._top._single
    start = moved(Start("", *begun_at(flow)), z, found)
    begin_at(flow, start.loc, start.scale)
    return found if status_of(found) != "unreliable" and not _is_cheap(density) else _look(guide, density, moves=False)


class _Loss(nn.Module):
    """The negative ELBO of a minibatch. Only the guide's parameters are its own: the model's are not trained."""

    def __init__(self, guide: AutoHierarchicalFlow, plan: Plan, rows: RowsOfRank) -> None:
        super().__init__()
        self.flow = guide._top._flow
        self.guide, self.plan, self.rows, self.elbo = (guide,), plan, rows, Trace_ELBO()

    def forward(self) -> Tensor:
        with self.rows:
            return self.elbo.differentiable_loss(self.plan.model, *self.guide, *self.plan.args, **self.plan.kwargs)


def _train(guide: AutoHierarchicalFlow, plan: Plan, steps: int, losses: list[float]) -> None:
    """Take steps of Adam, whose rate falls, and add the losses to those before. The clock may end them.

    Each process of several has rows and noise of its own, and the gradient is the mean over all.
    """
    parameters = [parameter for parameter in guide._top._flow.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, RATE * 0.02)
    if ranks().size > 1:
        torch.manual_seed(derive(plan.seed, f"noise of process {ranks().rank} after {len(losses)} steps"))
    rows = RowsOfRank(ranks(), derive(plan.seed, f"rows after {len(losses)} steps"))
    loss_of = ranks().averaged(_Loss(guide, plan, rows))

    def state() -> dict[str, object]:
        moments = [optimizer.state.get(part, {}) for part in parameters]
        rates = [schedule.last_epoch, *schedule.get_last_lr()]
        return {"weights": parameters, "moments": moments, "rates": rates, "losses": losses, **guide.remembered()}

    def put_back(known: Entries) -> None:
        with torch.no_grad():
            for part, weights, moments in zip(parameters, known["weights"], known["moments"], strict=True):
                part.copy_(weights)
                optimizer.state[part] = moments
        schedule.last_epoch, optimizer.param_groups[0]["lr"] = known["rates"]
        losses[:] = known["losses"]
        guide.put_back(known)

    with journal.loop("minibatches", *parameters) as kept:
        kept.take(put_back)
        while schedule.last_epoch < steps:
            if ranks().size == 1:
                plan.clock.look()
            elif plan.clock.finite and ranks().agreed(plan.clock.over):
                return
            optimizer.zero_grad()
            loss = loss_of()
            losses.append(float(loss.detach()))
            loss.backward(inputs=parameters)  # none of the model's own parameters
            if all(part.grad is None or bool(torch.isfinite(part.grad).all()) for part in parameters):
                optimizer.step()
            schedule.step()
            plan.bar.count(schedule.last_epoch, steps)
            kept.offer(state)
        kept.end(state)


# draws ----------------------------------------------------------------------------------------------------------------


def _global_draw(guide: AutoHierarchicalFlow) -> Draw:
    """Return what draws the globals, and their log density."""

    @torch.no_grad()
    def draw(count: int) -> tuple[Tensor, Tensor]:
        posterior = guide._top.get_posterior()
        z = guide.finite(posterior.sample((count,)))
        return z, posterior.log_prob(z)

    return draw


def _marginal(guide: AutoHierarchicalFlow, args: Positional, kwargs: Keywords, seed: int) -> MarginalDensity:
    """Return the log density of the globals; see :class:`MarginalDensity`."""
    middle = _global_draw(guide)(CHECKED)[0].median(0).values
    return MarginalDensity(guide.density_of_globals(args, kwargs, middle, seed))


def _whole_draw(
    model: Model, guide: AutoHierarchicalFlow, args: Positional, kwargs: Keywords, marginal: Marginal | CrossedMarginal
) -> tuple[LogDensity, Draw] | None:
    """Return the log density of all latents and what draws them together; None if rows are judged one by one."""
    axes = marginal.rows.axes  # where the model takes one point, many are mapped
    if guide.subsampled or sum(guide.sizes.values()) > WHOLE_UP_TO:
        return None
    if guide.local and isinstance(marginal, Marginal) and not marginal.batched:
        return None
    density = LogDensity(model, args, kwargs, noncentered=coordinates_of(guide._latents))
    latents = density.structure.latents
    if any(guide.sizes[latent.name] != latent.size for latent in latents):  # masked entries are no coordinates
        return None
    places = {own.name: slice(own.offset, own.offset + own.size) for own in guide._latents}

    @torch.no_grad()
    def draw(count: int) -> tuple[Tensor, Tensor]:
        z, log_q = _global_draw(guide)(count)
        values, densities = dict[str, Tensor](), dict[str, Tensor]()
        if guide.local:
            lead = z.reshape(count, *[1] * (guide._nesting if axes is None else axes.nest), -1)
            values, densities, _ = guide._locals(lead, args, kwargs, remember=False, axes=axes)
        names = [latent.name for latent in latents]
        parts = [values[own].reshape(count, -1) if own in values else z[:, places[own]] for own in names]
        for density_of_rows in densities.values():
            log_q = log_q + density_of_rows.reshape(count, -1).sum(1)
        return torch.cat(parts, 1).to(density.dtype), log_q.to(density.dtype)

    return density, draw
