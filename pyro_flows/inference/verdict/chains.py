"""Markov chains of a sampler: their draws, their convergence diagnostics, and the objections to using them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_flows.support.thresholds import (
    DIVERGENT_FEW,
    DIVERGENT_SHARE_OF_CHAINS,
    ESS_OF_CHAINS,
    R_HAT_CONVERGED,
    R_HAT_OF_SHORT_CHAINS,
)


@dataclass(frozen=True)
class McmcDiagnostics:
    r"""The figures that a verdict on chains rests on, each of the worst coordinate (the log density is one more).

    Of chains that another sampler made (:func:`from_mcmc`), some are not known, and are NaN: ``nested_r_hat``, what
    energies and proposals tell, and ``divergences``, if that sampler does not count them.

    R-hat is :math:`\sqrt{(N - 1) / N + B / W}`, with the variance W within chains of N draws, and B of their means.
    Draws are replaced by their normal scores first, and each chain is cut into halves.

    Attributes:
        chains: how many.
        draws: of each chain, kept.
        sweeps: of each chain since its kernel was fixed.
        r_hat: rank-normalized split R-hat of single chains.
        nested_r_hat: of superchains, each of chains with one starting point.
        ess_bulk: effective draws for means and medians.
        ess_tail: effective draws for the 5 % and the 95 % quantile.
        where: the coordinate with the lowest of both.
        divergences: share of trajectories whose energy error is above 1000 or not finite.
        energy_error: median absolute error of the energy at the end of a trajectory.
        acceptance: share of trajectories accepted.
        independence: share of independent proposals accepted; NaN if there were none.
        agreement: R-hat of groups of chains that began in different parts of a mixture; NaN if all began in one.
        changes: how often chains changed from one part to another, a chain.
        elsewhere: whether another sampler made the chains.

    Sources: rank-normalized R-hat, Vehtari et al. 2021 (arXiv 1903.08008); nested R-hat, Margossian et al. 2024
    (arXiv 2110.13017). Cost: nothing is computed here.

    >>> import pyro_flows as pf
    >>> known = {"r_hat": 1.002, "ess_bulk": 900.0, "ess_tail": 800.0, "where": "mu", "divergences": 0.0}
    >>> print(pf.McmcDiagnostics.of_mcmc(chains=4, draws=500, **known))
    4 chains of 500 draws; R-hat 1.002; ESS 900 in the bulk and 800 in the tails (lowest at mu); 0.00% divergences
    """

    chains: int
    draws: int
    sweeps: int
    r_hat: float = math.nan
    nested_r_hat: float = math.nan
    ess_bulk: float = math.nan
    ess_tail: float = math.nan
    where: str = ""
    divergences: float = math.nan
    energy_error: float = math.nan
    acceptance: float = math.nan
    independence: float = math.nan
    agreement: float = math.nan
    changes: float = math.nan
    elsewhere: bool = False

    def __str__(self) -> str:
        count = f"{self.chains} chain{'s' if self.chains > 1 else ''} of {self.draws} draws"
        nested = "" if self.elsewhere else f"nested R-hat {self.nested_r_hat:.3f}, "
        ess = f"ESS {self.ess_bulk:.0f} in the bulk and {self.ess_tail:.0f} in the tails (lowest at {self.where})"
        known = not (self.elsewhere and math.isnan(self.divergences))
        shares = f"{self.divergences:.2%} divergences" if known else "divergences not known"
        shares += "" if self.elsewhere else f", acceptance {self.acceptance:.2f}"
        shares += "" if math.isnan(self.independence) else f" ({self.independence:.2f} of independent proposals)"
        modes = "" if math.isnan(self.agreement) else f"; R-hat between starts in different modes {self.agreement:.3f}"
        return f"{count}; {nested}R-hat {self.r_hat:.3f}; {ess}; {shares}{modes}"

    @property
    def in_short(self) -> str:
        """The figures that tell most."""
        return f"R-hat {self.r_hat:.3f}, {min(self.ess_bulk, self.ess_tail):.0f} effective draws"

    @classmethod
    def of_mcmc(cls, *, draws: int, **known: object) -> McmcDiagnostics:
        """Return figures of another sampler's chains: NaN where nothing is known."""
        make: Callable[..., McmcDiagnostics] = cls
        return make(draws=draws, sweeps=draws, elsewhere=True, **known)

    @classmethod
    def of(cls, stored: Mapping[str, object]) -> McmcDiagnostics:
        """Make figures again of those that a file holds."""
        kinds: dict[str, Callable[..., object]] = {"chains": int, "draws": int, "sweeps": int, "where": str}
        kinds["elsewhere"], make = bool, cast("Callable[..., McmcDiagnostics]", cls)
        return make(**{entry.name: kinds.get(entry.name, float)(stored[entry.name]) for entry in fields(cls)})


def objections(figures: McmcDiagnostics) -> list[str]:
    """Return what speaks against chains, in words; nothing if their draws can be used. NaN speaks against them."""
    found = []
    if not figures.nested_r_hat <= R_HAT_CONVERGED:
        found.append(f"nested R-hat {figures.nested_r_hat:.3f} of the chains is above {R_HAT_CONVERGED}")
    if not figures.r_hat <= R_HAT_OF_SHORT_CHAINS:
        found.append(f"R-hat {figures.r_hat:.3f} of the chains is above {R_HAT_OF_SHORT_CHAINS}")
    for name, value in (("bulk", figures.ess_bulk), ("tails", figures.ess_tail)):
        if not value >= ESS_OF_CHAINS:
            found.append(
                f"ESS {value:.0f} of the chains in the {name} is below {ESS_OF_CHAINS:.0f}, at {figures.where}"
            )
    if diverge(figures):
        found.append(f"{100 * figures.divergences:.2g}% of the trajectories diverged")
    if not math.isnan(figures.agreement) and not figures.agreement <= R_HAT_OF_SHORT_CHAINS:
        found.append(f"chains that began in different modes disagree (R-hat {figures.agreement:.2f})")
    return found


def diverge(figures: McmcDiagnostics) -> bool:
    """Whether too many trajectories diverged; NaN says so."""
    few = not figures.elsewhere and figures.divergences * figures.chains * figures.draws < DIVERGENT_FEW + 0.5
    return not (few or figures.divergences <= DIVERGENT_SHARE_OF_CHAINS)


@dataclass(frozen=True, eq=False)
class McmcDraws:
    """Draws of chains, and all that is needed to go on with them, if they are ours (``Posterior.refine``).

    Attributes:
        z: draws kept, in unconstrained coordinates (C, N, D), N of each chain.
        stats: numbers of each kept draw, each (C, N), under ArviZ's names.
        state: tensors of the kernel and the chains' present points; of another sampler's chains, nothing.
        numbers: of the kernel: step size, trajectory, sweeps done, and so on; ``method`` says which one.
        figures: of all of these draws, if they are known; no file holds them.

    Cost: the draws are held once, and are not copied.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> draws = {"x": torch.randn(4, 500, generator=torch.Generator().manual_seed(0))}
    >>> def model(y):
    ...     x = pyro.sample("x", dist.Normal(0.0, 2.0**0.5))
    ...     pyro.sample("y", dist.Normal(x, 2.0**0.5), obs=y)
    >>> pf.from_mcmc(draws, model, torch.tensor(0.0)).chains.z.shape
    torch.Size([4, 500, 1])
    """

    z: Tensor = field(repr=False)
    stats: dict[str, Tensor] = field(repr=False)
    state: dict[str, Tensor] = field(repr=False)
    numbers: dict[str, Any]
    figures: McmcDiagnostics | None = field(default=None, repr=False)

    @property
    def count(self) -> int:
        """How many chains there are."""
        return len(self.z)

    def stored(self) -> dict[str, object]:
        """Return what a file holds of them: tensors and numbers."""
        tensors = {"z": self.z, "stats": self.stats, "state": self.state}
        return {**tree_map(lambda part: part.detach().cpu().clone(), tensors), "numbers": self.numbers}


def as_numbers(figures: McmcDiagnostics | None) -> dict[str, object] | None:
    return None if figures is None else asdict(figures)


def worst_of(values: Sequence[float], names: Sequence[str], *, largest: bool) -> tuple[float, str]:
    """Return the largest or the smallest value and its name; NaN, the first one, if there is any."""
    for value, name in zip(values, names, strict=True):
        if math.isnan(value):
            return value, name
    place = (max if largest else min)(range(len(values)), key=values.__getitem__)
    return values[place], names[place]
