"""Pyro's NUTS in the flow's latent space, as a check of the other samplers.

This is what ``NeuTraReparam`` does, with the density given as it is: Pyro's handler counts the log determinant once for
each entry of a plate where the first latent sits in one, and cannot be used then.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_flows.correction.kept import STATS
from pyro_flows.correction.latent import Latent

DIVERGENT = "divergences"


class _Potential(torch.autograd.Function):
    """The energy of one point, with its gradient from :meth:`Latent.look`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, latent: Latent) -> Tensor:
        points = latent.look(x.detach()[None], torch.zeros(1, dtype=torch.long, device=x.device))
        ctx.save_for_backward(-points.slope[0])
        return -points.log_pi[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope, None


def nuts(latent: Latent, x: Tensor, *, draws: int, warm_up: int) -> tuple[Tensor, dict[str, Tensor], int]:
    """Run a chain from each x (C, D), one after the other; return draws (C, N, D), their numbers, and gradients taken.

    Only flows of one part have a latent space to walk in, not mixtures.
    """
    before = latent.density.evaluations
    kept, numbers = [], []
    for start in x:
        with torch.enable_grad():
            kernel = NUTS(potential_fn=lambda point: _Potential.apply(point["x"], latent), adapt_mass_matrix=True)
            run = MCMC(
                kernel,
                draws,
                warmup_steps=warm_up,
                initial_params={"x": start},
                disable_progbar=True,
            )
            run.run()
        found = run.get_samples()["x"].reshape(draws, -1)
        points = latent.look(found, torch.zeros(len(found), dtype=torch.long, device=found.device))
        diverged = torch.zeros(draws, dtype=torch.bool)
        diverged[[i for i in run.diagnostics()[DIVERGENT]["chain 0"] if i < draws]] = True
        acceptance = float(run.diagnostics()["acceptance rate"]["chain 0"])
        kept.append(points.z)
        numbers.append(_numbers(points.log_p, points.log_weight, diverged, acceptance, float(kernel.step_size)))
    stats = {name: torch.stack([row[name] for row in numbers]) for name in STATS}
    return torch.stack(kept), stats, latent.density.evaluations - before


def _numbers(log_p: Tensor, log_weight: Tensor, diverged: Tensor, acceptance: float, step: float) -> dict[str, Tensor]:
    nothing = torch.zeros_like(log_p)
    given = {"lp": log_p, "log_weight": log_weight, "diverging": diverged}
    given |= {"acceptance_rate": torch.full_like(log_p, acceptance), "step_size": torch.full_like(log_p, step)}
    return {name: given.get(name, nothing) for name in STATS}
