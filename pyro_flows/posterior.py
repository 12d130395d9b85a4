"""The frozen result of a fit: draws, weights, verdict, ArviZ, files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_flows import _arviz, _checks
from pyro_flows.log_density import LogDensity
from pyro_flows.verdict import Verdict, judge, resample, weigh

if TYPE_CHECKING:
    import pandas as pd

POOL = 4

Draw = Callable[[int], tuple[Tensor, Tensor]]  # n -> z (n, D), log q (n,)


@dataclass(frozen=True, eq=False)
class Posterior:
    """What a fit (or :func:`diagnose`) found. Nothing in it changes; methods give new values.

    Attributes:
        samples: the draws to use, constrained, deterministic sites too: ``{name: (draws, *shape)}``. Raw draws of the
            guide if the verdict is ok or unreliable, importance-resampled ones if it is corrected.
        z: raw draws in unconstrained coordinates (S, D).
        log_p, log_q: unnormalised log posterior and log guide density of ``z`` (S,).
        log_weights: Pareto-smoothed, normalised log importance weights of ``z`` (S,).
        k_hat: Pareto shape of the weights.
        ess: effective sample size of the weights (S is the best).
        elbo: evidence lower bound, nats, mean of ``log_p - log_q``.
        log_evidence: importance-sampling estimate of the log normaliser, nats.
        verdict: whether to believe the draws.
        losses: negative ELBO of each optimisation step (empty for :func:`diagnose`).
        history: what happened during the fit, one dict a stage.
        settings: everything that :func:`fit` was told or chose, JSON values only.
        guide: the guide.
        density: the model as a log density; None after :func:`load` without a model.
    """

    samples: dict[str, Tensor] = field(repr=False)
    z: Tensor = field(repr=False)
    log_p: Tensor = field(repr=False)
    log_q: Tensor = field(repr=False)
    log_weights: Tensor = field(repr=False)
    k_hat: float
    ess: float
    elbo: float
    log_evidence: float
    verdict: Verdict
    losses: Tensor = field(repr=False)
    history: tuple[dict[str, Any], ...] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    guide: Any = field(repr=False)
    density: LogDensity | None = field(repr=False)
    used: Tensor = field(repr=False)  # unconstrained coordinates of ``samples``


def coordinate_names(density: LogDensity) -> list[str]:
    """Label the unconstrained coordinates by site and index: ``theta[3]``."""
    names = []
    for latent in density.structure.latents:
        single = latent.size == 1 and not latent.unconstrained_shape
        names += [latent.name] if single else [f"{latent.name}[{i}]" for i in range(latent.size)]
    return names


def from_draws(
    density: LogDensity,
    draw: Draw,
    *,
    draws: int,
    seed: int,
    guide: Any,
    losses: Tensor,
    history: Sequence[dict[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    failures: Sequence[str] = (),
) -> Posterior:
    """Draw, score, weigh and judge. ``draw(n)`` gives unconstrained draws and their log density under the guide."""
    _checks.integer("draws", draws, 100)
    with torch.no_grad():
        z, log_q = draw(draws)
        log_p = density(z)
        weighing = weigh(z, log_p, log_q)
        names = coordinate_names(density)
        verdict = judge(weighing, names, warnings=warnings, failures=failures)
        used = z
        if verdict.status == "corrected":
            pool, pool_q = draw(POOL * draws)
            again = weigh(pool, density(pool), pool_q)
            if again.admissible:
                used = pool[resample(again.log_weights, draws, seed=seed)]
            else:
                extra = f"a larger pool of draws has k-hat {again.k_hat:.2f} and ESS/S {again.ess / len(pool):.3f}"
                verdict = judge(weighing, names, warnings=warnings, failures=(*failures, extra))
        samples = density.constrain(used)
    return Posterior(
        samples=samples,
        z=z,
        log_p=log_p,
        log_q=log_q,
        log_weights=weighing.log_weights,
        k_hat=weighing.k_hat,
        ess=weighing.ess,
        elbo=weighing.elbo,
        log_evidence=weighing.log_evidence,
        verdict=verdict,
        losses=losses,
        history=tuple(history),
        settings={"draws": draws, "seed": seed, **dict(settings or {})},
        guide=guide,
        density=density,
        used=used,
    )
