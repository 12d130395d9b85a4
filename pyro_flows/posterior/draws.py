"""From draws of a guide to a posterior: scored, weighed and judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.inference.record import Stage
from pyro_flows.inference.scoring import Pool, beyond_priors, check_memory, infinite_places, pool_of, score_pool
from pyro_flows.inference.verdict.deciding import CHECKED, POOL, Draw, decide, raw_weights
from pyro_flows.inference.verdict.verdict import Verdict
from pyro_flows.inference.verdict.weighing import Weighing, changed_values, resample, weigh
from pyro_flows.model.dims import coordinate_names
from pyro_flows.model.log_density import LogDensity
from pyro_flows.posterior.export.methods_text import guide_method
from pyro_flows.posterior.posterior import Posterior
from pyro_flows.support.files.bundles import Entries
from pyro_flows.support.process.clock import Clock


def from_draws(
    density: LogDensity,
    draw: Draw,
    *,
    draws: int,
    seed: int,
    guide: object,
    losses: Tensor,
    history: Sequence[Stage] = (),
    settings: Mapping[str, object] | None = None,
    warnings: Sequence[str] = (),
    failures: Sequence[str] = (),
    notes: Sequence[str] = (),
    doubts: Sequence[str] = (),
    checked: int = CHECKED,
    times: int = POOL,
    least: float = 0.0,
    stopped: str = "",
    moving: bool = False,
) -> Posterior:
    """Draw, score, weigh and judge. ``draw(n)`` gives unconstrained draws and their log density under the guide.

    ``checked`` draws at most are run with Pyro's checks of arguments on. ``times`` as many draws as asked for are
    judged. Draws are weighted, whatever that changes, where the effective share of them is below ``least``. Where the
    clock of ``density`` ends the scoring, the draws scored so far are all that there are. ``stopped`` says where it
    ended the training before, ``moving`` that means or sds still changed a lot there.
    """
    check_memory(density, draws)
    with torch.no_grad():
        pool = pool_of(density, draw, draws, times)
        scored = len(pool.log_p)
        failed, cut = _cut(density.clock, scored, pool.wanted, stopped, moving=moving)
        draws = scored * draws // pool.wanted
        lost, rounded = _digits(density, pool, seed)
        checked = min(checked, pool.checked)
        values: dict[str, Tensor] = {}  # the model's own values of the whole pool, if weights are compared by them

        def again() -> Weighing:
            second = score_pool(density, draw, times * draws)
            return weigh(second.z, second.log_p, second.log_q)

        found = decide(
            lambda n: (pool.z[:n], pool.log_q[:n]),
            lambda z: pool.log_p[: len(z)],
            coordinate_names(density.structure),
            draws=draws,
            seed=seed,
            again=again,
            complaint=lambda z: density.complaint(z[:checked], torch.isfinite(pool.log_p[: len(z)][:checked])),
            changed=lambda z, weights: _uneven(weights, least) or _changed(density, z, weights, draws, values),
            failures=[*failed, *failures, *lost],
            doubts=doubts,
            notes=[*notes, *rounded, *density.faults.notes(), *density.clock.notes()],  # what was raised, and cut
            warnings=[*warnings, *cut],
        )
        samples = {name: value[found.index] for name, value in values.items()} or density.constrain(found.used)
    about = {"draws": draws, "judged_draws": scored, "seed": seed, "noncentered": density.structure.noncentered}
    about |= dict(settings or {})
    return Posterior(
        samples=samples,
        **{name: getattr(found, name) for name in ("z", "log_p", "log_q", "log_weights")},
        **{f"_{name}": getattr(found, name) for name in ("used", "used_log_p", "used_log_q")},
        **{name: getattr(found.weighing, name) for name in ("k_hat", "elbo", "log_evidence")},
        ess=found.verdict.ess_ratio * draws,
        losses=losses,
        history=tuple(stage.as_dict() for stage in history),
        settings=about,
        coordinates=tuple(coordinate_names(density.structure)),
        density=density,
        **_of_guide(guide, draw, found.verdict, about),
    )


def _digits(density: LogDensity, pool: Pool, seed: int) -> tuple[list[str], list[str]]:
    """Say what makes scored draws no result, infinite or of too few digits, and what rounding does to them."""
    weights = raw_weights(pool.log_p - pool.log_q)  # far draws of no weight may have no digits
    of_posterior = slice(None) if weights is None else resample(weights.log(), len(pool.log_p), seed=seed)
    lost, rounded = density.lost_digits(pool.z[of_posterior], most=pool.checked, log_p=pool.log_p[of_posterior])
    lost += infinite_places(density, pool.z, pool.log_p)
    lost += beyond_priors(density, pool.z, pool.log_p - pool.log_q)
    return lost, rounded


def _of_guide(guide: object, draw: Draw, verdict: Verdict, about: Entries) -> dict[str, Any]:
    """Return the fields of a posterior that tell of its guide, and the verdict, which names its method."""
    flow = guide._flow if isinstance(guide, AutoFlow) else None
    name = type(guide).__name__ if isinstance(guide, torch.nn.Module) else getattr(guide, "__name__", "guide")
    return {
        "guide": guide,
        "guide_name": name,
        "flow": flow,
        "verdict": replace(verdict, guide_method=guide_method(flow, about)),
        "missing": {} if flow is not None else {"flow": f"the guide ({name}) is not a flow guide of pyro_flows"},
        "_drawer": None if flow is not None else draw,
    }


def _cut(clock: Clock, scored: int, wanted: int, stopped: str, *, moving: bool) -> tuple[list[str], list[str]]:
    """Say once what the end of the time, or Ctrl-C, has cut, as a failure or a warning; nothing if neither came."""
    judged = f"; judged by {scored:,} of {wanted:,} draws" if scored < wanted else ""
    where = f" {stopped}" if stopped and clock.interrupted is None else ""
    still = ", while means or sds still changed" if moving and stopped == "during training" else ""
    said = [f"{reason}{where}{still}{judged}" for reason in clock.reasons(short=scored < wanted)]
    return (said, []) if moving or scored < wanted else ([], said)


def _uneven(log_weights: Tensor, least: float) -> list[str]:
    """Say that weights (S,) are uneven, if their effective share is below ``least``."""
    share = float(1.0 / log_weights.double().exp().square().sum()) / len(log_weights)
    return [f"ESS/S {share:.4f} is below {least:.4f}, so the draws were weighted"] if share < least else []


def _changed(density: LogDensity, z: Tensor, log_weights: Tensor, draws: int, values: dict[str, Tensor]) -> list[str]:
    """Say what weighting changes in the model's own values; not where each draw is a run of the model.

    ``values`` gets these, if they are of all draws.
    """
    if not density.batched:
        return []
    count = max(1, min(len(z), 4_000_000 // density.dim))  # all draws of most models
    own = density.constrain(z[:count])
    if count == len(z):
        values.update(own)
    return changed_values(own, torch.log_softmax(log_weights[:count], 0), min(draws, count))
