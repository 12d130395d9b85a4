"""What single sites of a model say at points: values, densities and draws by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_flows.model.batching import apart, join, quiet, redrawn, undefined
from pyro_flows.model.digits import Digits
from pyro_flows.model.faults import Undefined, defined, passing_over
from pyro_flows.model.graphs import Recorder
from pyro_flows.model.handlers import Resample, flatten_all
from pyro_flows.model.observations import not_finite
from pyro_flows.model.runs import Runs
from pyro_flows.model.sites import Structure, messages
from pyro_flows.support import checks
from pyro_flows.support.numbers.tensors import ROWS_AT_MOST
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.process.threads import turn

PORTION = 16  # pieces of a recorded graph between two looks at the clock


class SiteValues(Digits):
    """Values and densities of a model's sites at points, and draws; see :class:`~pyro_flows.LogDensity`."""

    def _settle(self, structure: Structure, like: Runs | None = None) -> None:
        super()._settle(structure, like)
        self._densities: dict[tuple[str, ...], Recorder] = {}  # by the sites that they are of
        self._constrained: Recorder | None = None  # of constrained values, which many data sets may share

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Return latent and deterministic sites as the model sees them: ``{name: (S, *shape)}``.

        A long model runs only if it has deterministic sites, or if supports depend on other sites or on parameters.
        Of a model with many numbers, what constrained values depend on is recorded: most often no row of the data. See
        :meth:`~pyro_flows.LogDensity.forget` where data or modules change in place.
        """
        z = self._check(z)
        if self.long and not (self._shown[len(self.names) :] or self.structure.dependent or self._parameters):
            with torch.no_grad():
                return self.map(lambda row: {name: placed.value for name, placed in self.placed(row).items()}, z)
        if self._constrained is None and self.batched and self._rows < ROWS_AT_MOST and not self._parameters:
            values = partial(self.strictly, self.constrained)
            self._constrained = Recorder(lambda z: tuple(values(z).values()), self.numbers, changed=self.faults)
        if self._constrained is not None and not self._factorizes:
            with turn(), passing_over():
                return dict(zip(self._shown, self._by_graph(self._constrained, z), strict=True))

        def instead(rows: Tensor) -> dict[str, Tensor]:
            known = {} if self.structure.dependent or self._parameters else self.placed(rows[0])
            sites = {name: messages(self.structure.trace)[name]["value"] for name in self._shown}
            found = {name: known[name].value if name in known else undefined(value) for name, value in sites.items()}
            return {name: value[None] for name, value in found.items()}

        with torch.no_grad():
            return self.map(self.constrained, z, instead=instead)

    def _by_graph(self, recorder: Recorder, z: Tensor) -> tuple[Tensor, ...]:
        """Return results by whole numbers of the recorder's pieces, with a look at the clock before each portion."""
        rows = PORTION * recorder.large
        cuts = [*range(0, max(len(z) - rows, 0), rows), len(z)]  # the last one is the longest: no new size of a piece

        def portion(first: int, last: int) -> tuple[Tensor, ...]:
            self.clock.look()
            return recorder(z[first:last])

        if len(cuts) < 3:
            return portion(0, len(z))
        return join((portion(*ends) for ends in pairwise(cuts)), len(z))

    @property
    def _shown(self) -> tuple[str, ...]:
        """The sites of :meth:`constrain`: latent ones first, then deterministic ones."""
        return (*self.names, *(() if self.structure.enumerated else self.structure.deterministic))

    def constrained(self, row: Tensor) -> dict[str, Tensor]:
        """Return what :meth:`constrain` does, at one point (D,)."""
        trace, _ = self._run(row, enumerate_sites=True)
        return {name: messages(trace)[name]["value"] for name in self._shown}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return ``z`` (S, D) for constrained latents ``{name: (S, *shape)}``: the inverse of :meth:`constrain`.

        Raises:
            ValueError: naming the site, for one that is missing or has another shape.
        """
        missing = [name for name in self.names if name not in values]
        if missing:
            raise ValueError(f"values: expected one for each latent site, {', '.join(map(repr, missing))} missing.")
        kept = {name: torch.as_tensor(values[name], device=self.device) for name in self.names}
        for latent in self.structure.latents:
            if kept[latent.name].shape[1:] != latent.shape:
                got = tuple(kept[latent.name].shape)
                raise ValueError(f"values[{latent.name!r}]: expected shape (S, *{tuple(latent.shape)}), got {got}.")

        def flat(row: dict[str, Tensor]) -> Tensor:
            with self.writing(row[self.names[0]]), defined(lambda: "in the model"):
                return flatten_all(self.structure, row, self._called, moving=bool(self._parameters))

        draws = seeded(0, self.device) if self.batched else nullcontext()  # of enumerated sites, if supports need them
        with torch.no_grad(), draws:
            return self.map(flat, kept, randomness="different").to(self.dtype)

    def log_jacobian(self, z: Tensor) -> Tensor:
        """Return the log determinant (S,) of the map from ``z`` to the model's own values; the density contains it."""
        self._check(z)

        def ladj(row: Tensor) -> Tensor:
            return sum((placed.ladj.sum() for placed in self.placed(row).values()), row.new_zeros(()))

        with torch.no_grad():
            return self.map(ladj, z)

    def log_prior(self, z: Tensor) -> dict[str, Tensor]:
        """Return the log prior density of each latent site, constrained: ``{name: (S, *batch)}``.

        Masked entries are 0, and what ``poutine.scale`` multiplies is multiplied, as in the density.
        """
        return self._site_densities(z, self.names)

    def log_likelihood(self, z: Tensor) -> dict[str, Tensor]:
        """Return the pointwise log likelihood of each observed site: ``{name: (S, *batch)}``.

        Masked entries are 0, and what ``poutine.scale`` multiplies is multiplied, as in the density.
        """
        return self._site_densities(z, () if self.structure.enumerated else tuple(self.structure.observed))

    def _site_densities(self, z: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the log densities of sites, by a recorded graph where the model is short enough to have one soon."""
        z, names = self._check(z), tuple(names)
        if self.batched and not self._parameters and not self.long and names:
            if names not in self._densities:
                numbers = max(self.numbers, self.work.largest // 2)
                at = partial(self._densities_at, names)
                self._densities[names] = Recorder(lambda z: tuple(self.strictly(at, z).values()), numbers)
            with turn(), passing_over():
                return dict(zip(names, self._densities[names](z), strict=True))
        with torch.no_grad():
            return self.map(partial(self._densities_at, names), z, instead=partial(self._no_densities, names))

    def _densities_at(self, names: Sequence[str], row: Tensor) -> dict[str, Tensor]:
        trace, _ = self._run(row, enumerate_sites=True)
        found = {}
        for name in names:
            site = messages(trace)[name]
            with self.writing(row), defined(partial(str, f"at site {name!r}")):
                density = site["fn"].log_prob(site["value"])
            mask = site["mask"] if site["mask"] is None else torch.as_tensor(site["mask"], device=density.device)
            found[name] = scale_and_mask(density, site["scale"], mask)
        return found

    def _no_densities(self, names: Sequence[str], rows: Tensor) -> dict[str, Tensor]:
        """Return the log densities (1, ...) of sites at a point where the model raises an error."""
        sites = {name: messages(self.structure.trace)[name] for name in names}
        with quiet(), self.precisely():
            return {name: undefined(site["fn"].log_prob(site["value"]))[None] for name, site in sites.items()}

    def predictive(self, z: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
        """Draw the observed sites anew at each row of ``z``: ``{name: (S, *shape)}``; one seed, one answer.

        They are NaN (0 for whole numbers) at rows where the model raises an error.

        Raises:
            Undefined: if it raises one at all rows, as a distribution without a sampler does.
        """
        z = self._check(z)

        def draw(row: Tensor) -> dict[str, Tensor]:
            trace, _ = self._run(row, enumerate_sites=False, resample=True)
            return {name: messages(trace)[name]["value"] for name in self.structure.observed}

        with torch.no_grad(), seeded(derive(seed, "posterior predictive"), self.device):
            return self.map(draw, z, randomness="different")

    def local_samples(
        self,
        z: Tensor,
        names: Sequence[str] | None = None,
        rows: Tensor | Sequence[int] | None = None,
        *,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Raise an error: no latents were integrated out.

        Raises:
            ValueError: always.
        """
        raise ValueError("local_samples: no latents of rows were integrated out. All latents are in samples.")

    def row_likelihoods(self, z: Tensor) -> dict[str, Tensor]:
        """Return log likelihoods of rows whose latents are integrated out, ``{plate: (S, rows)}``: there are none."""
        return {}

    def prior(self, draws: int, *, seed: int = 0) -> dict[str, Tensor] | None:
        """Draw all sites from the prior, observed ones too: ``{name: (draws, *shape)}``; None if there are none.

        There are none with improper priors. Draws at which the model raises an error are drawn anew, a few times.
        """
        checks.integer("draws", draws, 1)
        names = (*self.names, *self.structure.deterministic, *self.structure.observed)

        def draw(row: Tensor) -> dict[str, Tensor]:
            with apart(), self.writing(row), defined(lambda: "in the model"):
                trace = poutine.trace(Resample()(self.model)).get_trace(*self.args, **self.kwargs)
            return {name: messages(trace)[name]["value"] for name in names}

        with torch.no_grad(), seeded(derive(seed, "prior"), self.device):
            try:
                return redrawn(
                    lambda count: self.map(draw, torch.zeros(count, 1, device=self.device), randomness="different"),
                    draws,
                )
            except (NotImplementedError, torch.linalg.LinAlgError):
                return None

    def explain(self, z: Tensor) -> str:
        """Name the sites whose log density is not finite at one point ``z`` (D,)."""
        bad = []
        with torch.no_grad(), quiet(), self.precisely():
            try:
                self.single(z)
                trace, ladj = self._run(z, enumerate_sites=True)
            except Undefined as error:
                return str(error)
            for site in messages(trace).values():
                if site["type"] == "sample" and site["mask"] is not False:
                    density = torch.as_tensor(site["fn"].log_prob(site["value"]))
                    if not torch.isfinite(density).all():
                        bad.append(not_finite(site, density))
        return "; ".join(bad) or f"log Jacobian {float(ladj)}"
