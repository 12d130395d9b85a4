"""The log density of a model's global latents as a posterior needs it: latents in plates are integrated out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from pyro import poutine
from torch import Tensor
from torch._C import _functorch

from pyro_flows.guides.collapsed import Density
from pyro_flows.guides.conditional import Conditional, Rows
from pyro_flows.guides.hierarchical import AutoHierarchicalFlow
from pyro_flows.guides.parts import ALL
from pyro_flows.guides.runs import at_values, is_part
from pyro_flows.model.batching import batch
from pyro_flows.model.bijections import bijection
from pyro_flows.model.digits import COMPARED_ONE_BY_ONE
from pyro_flows.model.handlers import Given
from pyro_flows.model.log_density import LogDensity, lost_next_to
from pyro_flows.model.sites import (
    Keywords,
    Model,
    Positional,
    coordinates_of,
    is_deterministic,
    is_subsample,
    messages,
    vectorized,
)
from pyro_flows.model.start import first_run, initial_value
from pyro_flows.support import checks
from pyro_flows.support.process.clock import Clock
from pyro_flows.support.process.fallbacks import Tried, fallback

INTEGRATED = "integrated"  # what settings call :attr:`MarginalDensity.recipe`


class MarginalDensity(LogDensity):
    """The log density of the globals; ``structure``, names and constrained values are those of the globals alone."""

    by_rows = True

    def __init__(self, marginal: Density) -> None:
        self.marginal = marginal
        rows, first, nodes = marginal.rows, marginal.first, messages(marginal.first.at.trace)
        values = {name: bijection(nodes[name]["fn"])(value).to(marginal.dtype) for name, value in first.base.items()}
        values = {name: value for name, value in values.items() if bool(torch.isfinite(value).all())}  # else drawn anew
        shown = [*(latent.name for latent in rows.latents), *_deterministic(rows, first)]
        alone = _globals_alone(rows.model, shown, {**first.at.chosen, **values})
        noncentered = coordinates_of(rows.latents)
        super().__init__(alone, rows.args, rows.kwargs, noncentered=noncentered)

    @property
    def recipe(self) -> dict[str, Any]:
        """What, beside the model with its data, the density is made of; JSON values only.

        These are sites in plates that are no rows, sites in other coordinates, the seed of the draws of rows, how many
        there are, whether they have heavy tails, and the error of the level, nats.
        """
        marginal, nodes = self.marginal, messages(self.marginal.first.at.trace)
        latents = marginal.rows.latents
        return {
            "joint": [latent.name for latent in latents if vectorized(nodes[latent.name])],
            "noncentered": coordinates_of(latents),
            "seed": marginal.seed,
            "count": marginal.count,
            "wide": marginal.wide,
            "level_error": self.level_error,
        }

    @classmethod
    def made_of(cls, recipe: Mapping[str, Any], model: Model, args: Positional, kwargs: Keywords, z: Tensor) -> Self:
        """Make the density anew by its :attr:`recipe`; ``z`` (S, D) are draws from near its mode.

        Modes of rows are found anew, so its values differ from those before by the errors of likelihoods of rows. With
        another number of coordinates than D, it is that of another model.
        """
        sites = messages(first_run(model, args, kwargs, initial_value))
        joint = [name for name in recipe["joint"] if name in sites]
        guide = AutoHierarchicalFlow(model, joint=joint, init="prior", noncentered=recipe["noncentered"])
        guide.initialize(*args, **kwargs)
        begun = guide._top._init_loc().to(guide._top._like)
        middle = z.to(begun)[torch.isfinite(z).all(1)].median(0).values if z.shape[1] == len(begun) else begun
        guide.find_modes(args, kwargs, middle)
        marginal = guide.density_of_globals(args, kwargs, middle, recipe["seed"])
        marginal.count, marginal.wide = recipe["count"], recipe["wide"]
        found = cls(marginal)
        found.level_error = recipe["level_error"]
        return found

    @property
    def most_gradients(self) -> float:  # type: ignore[override]
        """How many gradients one run of chains may take: some minutes, or 3e8 draws of rows or of their data."""
        return max(5000.0, 3e8 / max(self.marginal.count * max(self.marginal.row_count, self._terms), 1))

    @property
    def _terms(self) -> int:
        """How many terms the largest site has in a pass over all rows: a row may have many data."""
        sites = messages(self.marginal.first.at.trace).values()
        counted = [site for site in sites if "log_prob" in site and not is_subsample(site)]
        shares = [math.prod((own.full_size or own.size) / own.size for own in vectorized(site)) for site in counted]
        terms = [site["log_prob"].numel() * share for site, share in zip(counted, shares, strict=True)]
        return round(max(terms, default=0.0))

    def under(self, clock: Clock) -> None:
        super().under(clock)
        self.marginal.clock = clock

    def rounding(self, z: Tensor, *, most: int = COMPARED_ONE_BY_ONE, log_p: Tensor | None = None) -> float:
        """Return by how many nats rounding changes the log density of globals alone."""
        return super().rounding(z, most=most)

    def known_rounding(self, z: Tensor) -> float:
        """Return what rounding and the likelihoods of rows do to the log density at all points alike, nats."""
        return math.hypot(super().known_rounding(z), self.level_error)

    def on_bounds(self, z: Tensor) -> list[str]:
        """Say which site rounding puts onto a bound, of the globals or of rows; see :class:`LogDensity`."""
        worst = self.marginal.on_bounds(z)
        return super().on_bounds(z) + ([] if worst is None else [lost_next_to(worst)])

    def local_samples(
        self,
        z: Tensor,
        names: Sequence[str] | None = None,
        rows: Tensor | Sequence[int] | None = None,
        *,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Draw latents of rows at points ``z`` (S, D); see :meth:`pyro_flows.Posterior.local_samples`."""
        marginal, z = self.marginal, self._check(z).detach()
        sites = [site.name for site in marginal.first.sites]
        if not sites:
            return super().local_samples(z, names, rows)
        names = sites if names is None else [checks.choice("names", name, sites) for name in names]
        found: dict[str, Tensor] = {}
        for plate in dict.fromkeys(marginal.plates[name] for name in names):
            own = [name for name in names if marginal.plates[name] == plate]
            found |= marginal.local_draws(z, own, self._indices(plate, rows), seed)
        return {name: found[name] for name in names}

    def row_likelihoods(self, z: Tensor) -> dict[str, Tensor]:
        """Return the log likelihoods of rows at ``z`` (S, D), their latents integrated out: ``{plate: (S, rows)}``."""
        return {plate or "data": own for plate, own in self.marginal.row_likelihoods(self._check(z).detach()).items()}

    def _indices(self, plate: str, rows: Tensor | Sequence[int] | None) -> Tensor:
        size = self.marginal.sizes[plate]
        if rows is None:
            return torch.arange(size)
        if plate == ALL:
            raise ValueError("rows: not available, since the latents in plates are drawn together. Leave it out.")
        index = torch.as_tensor(rows)
        listed = index.dim() == 1 and not index.is_floating_point() and len(index) > 0
        if not listed or int(index.min()) < 0 or int(index.max()) >= size:
            raise ValueError(f"rows: expected a list of indices from 0 to {size - 1} of plate {plate!r}, got {rows!r}.")
        return index.long()

    def affordable(self, draws: int) -> int:
        """Return how many of so many draws a check may evaluate, each by a pass over all rows."""
        return min(draws, self.marginal.most_draws)

    def __call__(self, z: Tensor) -> Tensor:
        """Return the log density (S,) at ``z`` (S, D), without gradients."""
        return self.marginal(self._check(z).detach()).to(z.dtype)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density (S,) and its gradient (S, D); cost: S passes over all rows."""
        self.spend(len(z))
        value, gradient = self.marginal.value_and_grad(self._check(z).detach())
        return value.to(z.dtype), gradient.to(z.dtype)

    def unrecorded(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return what :meth:`value_and_grad` returns: there is no graph."""
        return self.value_and_grad(z)

    def predictive(self, z: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
        """Raise an error: the latents of rows are not there, and a run of the model has a part of the rows."""
        if self.marginal.first.sites:
            raise ValueError(
                "predictive: latents of rows were integrated out. Draw them with posterior.local_samples(), and new "
                "data with pyro.infer.Predictive and these draws."
            )
        raise ValueError(
            "predictive: a run of the model has a part of the rows of its plates. Draw new data with "
            "pyro.infer.Predictive, these draws, and a model whose plates have all rows (no subsample_size=)."
        )

    def graph(self, z: Tensor) -> None:
        """Return None: a pass over parts of the data is no graph."""


def _deterministic(rows: Rows, first: Conditional) -> list[str]:
    """Return the deterministic sites outside of subsampled plates that no value of latents in plates goes into.

    Under ``vmap`` over these values, what they go into is batched.
    """
    sites = [site for site in messages(first.at.trace).values() if site["type"] == "sample" and is_deterministic(site)]
    names = [site["name"] for site in sites if not any(map(is_part, vectorized(site)))]
    if not (names and first.sites):
        return names

    def apart(values: dict[str, Tensor]) -> Tensor:
        nodes = messages(rows.run(first.at.z, at_values(values), first.at.chosen, through=True).trace)
        names[:] = [name for name in names if not _functorch.is_batchedtensor(nodes[name]["value"])]
        return first.at.z

    with Tried(lambda error: isinstance(error, RuntimeError)) as tried:
        batch(apart)({name: value[None] for name, value in first.base.items()})
    if tried.error is not None:
        fallback("deterministic sites are left out", tried.error)
        return []
    return names


def _globals_alone(model: Model, names: list[str], fixed: Mapping[str, Tensor]) -> Model:
    """Return the model with these sites alone; subsamples and latents in plates are ``fixed``."""
    known = {name: value.detach() for name, value in fixed.items()}

    def alone(*args: object, **kwargs: object) -> None:
        with poutine.block(expose=names), Given(known):
            model(*args, **kwargs)

    return alone
