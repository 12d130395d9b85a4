"""From draws of a guide to a posterior: scored, weighed and judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from pyro_flows._clock import Clock
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.model.log_density import LogDensity
from pyro_flows.posterior.posterior import Posterior
from pyro_flows.results.dims import coordinate_names
from pyro_flows.results.methods import guide_method
from pyro_flows.results.scoring import Pool, beyond_priors, check_memory, infinite_places, pool_of, score_pool
from pyro_flows.results.stage import Stage
from pyro_flows.verdict.deciding import CHECKED, POOL, Decision, Draw, decide
from pyro_flows.verdict.own_values import changed_values
from pyro_flows.verdict.weighing import Weighing, weigh

VALUES_COMPARED = 4_000_000  # numbers: all draws of most models


class Said(TypedDict):
    """What is said before draws are judged, see :func:`~pyro_flows.verdict.deciding.judge`."""

    failures: Sequence[str]
    doubts: Sequence[str]
    notes: Sequence[str]
    warnings: Sequence[str]


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
        lost, rounded = density.lost_digits(pool.z, most=pool.checked, log_p=pool.log_p)
        lost += infinite_places(density, pool.z, pool.log_p)
        lost += beyond_priors(density, pool.z, pool.log_p - pool.log_q)
        said: Said = {
            "failures": [*failed, *failures, *lost],
            "doubts": doubts,
            "notes": [*notes, *rounded, *density.faults.notes(), *density.clock.notes()],  # what was raised, and cut
            "warnings": [*warnings, *cut],
        }
        pool = pool._replace(checked=min(checked, pool.checked))
        found, samples = _decided(density, draw, pool, draws=draws, times=times, least=least, seed=seed, **said)
    about = {
        "draws": draws,
        "judged_draws": scored,
        "seed": seed,
        "noncentered": density.structure.noncentered,
        **dict(settings or {}),
    }
    make: Callable[..., Posterior] = Posterior
    return make(
        samples=samples,
        **_figures(found, draws, guide_method(_flow_of(guide), about)),
        losses=losses,
        history=tuple(stage.as_dict() for stage in history),
        settings=about,
        coordinates=tuple(coordinate_names(density.structure)),
        **_of_guide(guide, draw),
        density=density,
    )


def _cut(clock: Clock, scored: int, wanted: int, stopped: str, *, moving: bool) -> tuple[list[str], list[str]]:
    """Say once what the end of the time, or Ctrl-C, has cut, as a failure or a warning; nothing if neither came."""
    judged = f"; judged by {scored:,} of {wanted:,} draws" if scored < wanted else ""
    where = f" {stopped}" if stopped and clock.interrupted is None else ""
    still = ", while means or sds still changed" if moving and stopped == "during training" else ""
    said = [f"{reason}{where}{still}{judged}" for reason in clock.reasons(short=scored < wanted)]
    return (said, []) if moving or scored < wanted else ([], said)


def _decided(
    density: LogDensity,
    draw: Draw,
    pool: Pool,
    *,
    draws: int,
    times: int,
    seed: int,
    least: float = 0.0,
    **said: Unpack[Said],
) -> tuple[Decision, dict[str, Tensor]]:
    """Decide by the pool that is there; return the model's own values of the draws to use, too.

    ``said`` goes to the judge.
    """
    values: dict[str, Tensor] = {}  # of the whole pool, if they are needed

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
        complaint=lambda z: density.complaint(z[: pool.checked], torch.isfinite(pool.log_p[: len(z)][: pool.checked])),
        changed=lambda z, log_weights: _changed(density, z, log_weights, draws, values) or _uneven(log_weights, least),
        **said,
    )
    return found, {name: value[found.index] for name, value in values.items()} or density.constrain(found.used)


def _uneven(log_weights: Tensor, least: float) -> list[str]:
    """Say that weights (S,) are uneven, if their effective share is below ``least``."""
    share = float(1.0 / log_weights.double().exp().square().sum()) / len(log_weights)
    return [f"ESS/S {share:.2f} is below {least}, so the draws were weighted"] if share < least else []


def _changed(
    density: LogDensity, z: Tensor, log_weights: Tensor, draws: int, values: dict[str, Tensor]
) -> list[str]:  # fmt: skip
    """Say what weighting changes in the model's own values; not where each draw is a run of the model.

    ``values`` gets these, if they are of all draws.
    """
    if not density.batched:
        return []
    count = max(1, min(len(z), VALUES_COMPARED // density.dim))
    own = density.constrain(z[:count])
    if count == len(z):
        values.update(own)
    return changed_values(own, torch.log_softmax(log_weights[:count], 0), min(draws, count))


def _figures(found: Decision, draws: int, method: str) -> dict[str, object]:
    """Return the fields of a posterior that are draws, densities and what they come to."""
    fields: dict[str, object] = {name: getattr(found, name) for name in ("z", "log_p", "log_q", "log_weights")}
    fields.update(_used=found.used, _used_log_p=found.used_log_p, _used_log_q=found.used_log_q)
    weighing = found.weighing
    fields.update(k_hat=weighing.k_hat, elbo=weighing.elbo, log_evidence=weighing.log_evidence)
    fields["verdict"] = replace(found.verdict, guide_method=method)
    return {**fields, "ess": found.verdict.ess_ratio * draws}


def _flow_of(guide: object) -> Flow | FlowMixture | None:
    return guide._flow if isinstance(guide, AutoFlow) else None


def _of_guide(guide: object, draw: Draw) -> dict[str, object]:
    """Return the fields of a posterior about its guide."""
    flow = _flow_of(guide)
    name = type(guide).__name__ if isinstance(guide, torch.nn.Module) else getattr(guide, "__name__", "guide")
    missing = {} if flow is not None else {"flow": f"the guide ({name}) is not a flow guide of pyro_flows"}
    drawer = None if flow is not None else draw
    return {"guide": guide, "guide_name": name, "flow": flow, "missing": missing, "_drawer": drawer}
