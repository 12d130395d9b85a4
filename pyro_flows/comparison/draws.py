"""Draws of a posterior in its verdict's own way: those in hand, or more of the same kind."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyro_flows._seeding import derive, seeded
from pyro_flows.comparison.controls import controls, of_gradients
from pyro_flows.correction.refine import can_go_on, go_on
from pyro_flows.verdict.deciding import POOL
from pyro_flows.verdict.psis import psis
from pyro_flows.verdict.weighing import resample

if TYPE_CHECKING:
    from pyro_flows.results.record import Record
    from pyro_flows.verdict.chains import McmcDraws

MOST_GRADIENTS = 2_000_000  # for going on with chains
GRADIENT = 3.0  # evaluations


class Draws(NamedTuple):
    """Draws z (S, D); log p / q where they are of q; control variates; numbers that copies of one draw share."""

    z: Tensor
    ratio: Tensor | None
    controls: Tensor | None = None
    copies: Tensor | None = None


def is_of_guide(posterior: Record) -> bool:
    """Whether the draws to use are the guide's own."""
    return posterior.verdict.status == "ok" and not posterior._by_chains


def in_hand(posterior: Record) -> Draws:
    """Return the draws to use."""
    if is_of_guide(posterior):
        ratio = posterior._used_log_p.double().cpu() - posterior._used_log_q.double().cpu()
        return _with_controls(posterior, Draws(posterior._used, ratio))
    copies = torch.unique(posterior._used.cpu(), dim=0, return_inverse=True)[1] if posterior.resampled else None
    return _with_controls(posterior, Draws(posterior._used, None, copies=copies))


def _with_controls(posterior: Record, draws: Draws) -> Draws:
    """Add functions of known expectation: those of the flow's base for its own draws, of gradients for others.

    Resampled draws have none: their errors are those of the weights too, which a regression on the draws does not see.
    """
    found = controls(posterior.flow, draws.z) if draws.ratio is not None else None
    if found is None and draws.copies is None and posterior.density is not None:
        found = of_gradients(posterior.density, draws.z, posterior.chain_count, draws.ratio)
    return draws._replace(controls=found)


def every(posterior: Record, draws: Draws, step: int) -> tuple[Draws, Tensor]:
    """Return one in ``step`` of these draws, of each chain, with controls of their own; and which these are (S,)."""
    each = len(draws.z) // posterior.chain_count
    chosen = torch.arange(len(draws.z)) % each % step == 0
    ratio, copies = (None if part is None else part[chosen] for part in (draws.ratio, draws.copies))
    z = draws.z[chosen.to(draws.z.device)]
    return _with_controls(posterior, Draws(z, ratio, copies=copies)), chosen


def can_draw(posterior: Record) -> bool:
    """Whether there can be more draws of the same kind: not of chains, and not without a guide and a model."""
    return posterior._raw_draws() is not None and not posterior._by_chains


def price(posterior: Record) -> float:
    """Return how many evaluations of the model a further draw costs, its log likelihoods and controls included."""
    if posterior.chains is not None and can_go_on(posterior):
        return 2.0 + GRADIENT * _leaps(posterior.chains)
    return 2.0 if is_of_guide(posterior) else 2.0 + POOL


def _leaps(chains: McmcDraws) -> float:
    """Return how many gradients a kept draw takes."""
    return float(chains.stats["n_steps"].mean()) * int(chains.numbers["thin"])


def most_draws(posterior: Record) -> float:
    """Return how many draws there can be, those in hand included."""
    if can_draw(posterior):
        return math.inf
    if posterior.chains is None or not can_go_on(posterior):
        return len(posterior._used)
    return len(posterior._used) + MOST_GRADIENTS / _leaps(posterior.chains)


def longer(posterior: Record, count: int, *, seed: int) -> Draws | None:
    """Go on with chains until they are ``count`` draws, within a bound on gradients; None if that cannot be done."""
    chains = posterior.chains
    if chains is None or not can_go_on(posterior):
        return None
    each = _leaps(chains) * chains.count
    wanted = int(min((count - len(posterior._used)) / chains.count, MOST_GRADIENTS / each))
    if wanted < 1:
        return None
    new = go_on(posterior, chains, wanted, seed=derive(seed, "leave-one-out"))
    z = torch.cat([posterior._used.unflatten(0, (chains.count, -1)), new], 1)
    return _with_controls(posterior, Draws(z.flatten(0, 1), None))


@torch.no_grad()
def more(posterior: Record, count: int, *, seed: int, purpose: str) -> Draws:
    """Draw anew from the guide; draws that the verdict corrects are resampled from a pool four times as large."""
    draw, density = posterior._raw_draws(), posterior._need_model()
    assert draw is not None  # see `can_draw`
    with seeded(derive(seed, purpose), posterior._used.device):
        z, log_q = draw(count if is_of_guide(posterior) else POOL * count)
        ratio = density(z).double() - log_q.double()
    if is_of_guide(posterior):
        return _with_controls(posterior, Draws(z, ratio.cpu()))
    index = resample(psis(ratio)[0], count, seed=seed)
    return _with_controls(posterior, Draws(z[index], None, copies=index.cpu()))
