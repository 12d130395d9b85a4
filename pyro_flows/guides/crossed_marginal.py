"""The density of globals with latents of crossed plates integrated out: closed where all is normal, else by draws."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from pyro_flows.guides.crossed import TRIES, Crossed
from pyro_flows.guides.integrated import MOST_DRAWS, Errors, Integrated, without_lost
from pyro_flows.guides.parts import ALL, Part
from pyro_flows.guides.runs import at_values
from pyro_flows.model.batching import batch, quiet
from pyro_flows.model.sites import messages
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import ROW_ERROR_MOST, ROW_MODE_SHARE, ROW_MODES_APART

WITH_GRAPH = 4  # points whose gradients are taken at once
LEAST_DRAWS, WRITTEN = 200, 1_100_000_000  # draws that are judged; numbers that all of them may take
LEAST_CROSSED, MOST_CROSSED = 8, 64  # draws of u at a point, where it is not normal
LOOKED_AT = 16  # points by which their number is chosen


class CrossedMarginal(Integrated):
    """The log density of globals, latents in crossed plates integrated out; see :mod:`pyro_flows.guides.crossed`."""

    apart = True  # whether points have noise of their own

    def __init__(self, system: Crossed, seed: int) -> None:
        super().__init__(system.rows, system.first, seed, system.first.at.z.dtype)
        self.system = system
        self.count = 1 if system.quadratic else LEAST_CROSSED  # K, draws of the latents at a point
        self.trainable = system.quadratic  # else weights have the noise of u, whatever the guide
        written = system.written + (system.size - system.head) ** 2  # a draw: all derivatives, and a dense factor
        self.most_draws = max(LEAST_DRAWS, min(MOST_DRAWS, WRITTEN // written))
        self.plates = dict.fromkeys([site.name for site in system.sites], ALL)  # drawn together, as one row
        self.sizes, self.parts = {ALL: 1}, [Part({}, {})]
        self.row_count = sum(site.value.numel() // site.size for site in system.sites)

    @property
    def at_once(self) -> int:
        return self.system.at_once

    @property
    def with_graph(self) -> int:
        return max(1, WITH_GRAPH // self.count)

    def values(self, z: Tensor, number: int) -> tuple[Tensor, Tensor]:
        if self.system.quadratic:
            return self._closed(z)
        value = torch.logsumexp(self._log_weights(z, *self._drawn(z, 0)), 1) - math.log(self.count)
        return value, value

    def _closed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density where all is normal, and the expected log joint density, up to a constant."""
        pattern, center = self.system.pattern, self.system.mode.expand(len(z), -1)
        height, gradient, entries = self.system.assemble(z, center, look=self.clock.look)
        with torch.no_grad():
            own = pattern.normal(center.double(), gradient, entries)
            step = own.mean - center
            volume = own.log_scales().sum(1) + 0.5 * self.system.size * math.log(2.0 * math.pi)
            value = height + 0.5 * (gradient * step).sum(1) + volume
            if not z.requires_grad:
                return value, value
            second = step[:, pattern.row] * step[:, pattern.column] + own.covariances()
            second = torch.where(pattern.row == pattern.column, 0.5, 1.0) * second
        return value, height + (gradient * step).sum(1) - (entries * second).sum(1)

    def _drawn(self, z: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return draws (S, K, n) of the latents at each point, in pairs, and their log densities (S, K)."""
        half = torch.stack([self._noise(row, seed) for row in z])
        u, log_q = self.system.drawn(z, torch.cat([half, -half], 1)[:, : self.count], look=self.clock.look)
        return u.to(z), log_q.sum(2)

    def _log_weights(self, z: Tensor, u: Tensor, log_q: Tensor) -> Tensor:
        """Return the logarithms of the weights (S, K) of draws."""
        every = [part.split(4 * self.system.at_once) for part in (z.repeat_interleave(self.count, 0), u.flatten(0, 1))]
        heights = [self.system.heights(point, base, self.clock.look) for point, base in zip(*every, strict=True)]
        return without_lost(torch.cat(heights).reshape(log_q.shape) - log_q, 1)

    def _noise(self, row: Tensor, seed: int) -> Tensor:
        """Return noise for the pairs of a point, which hangs on nothing but the point and the seed."""
        digest = hashlib.blake2b(row.detach().double().cpu().numpy().tobytes() if self.apart else b"", digest_size=7)
        number = derive(self.seed + seed, f"latents in crossed plates at {digest.hexdigest()}")
        generator = torch.Generator().manual_seed(number)
        shape = -(-self.count // 2), self.system.size
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(row.device)

    # what a verdict asks ---------------------------------------------------------------------------------------------

    def with_parts(self, most: int) -> Self:
        """Return the same by all rows, since a part of them says too little, with the same noise at all points.

        So there is a gradient of the noise, too.
        """
        other = copy.copy(self)
        other.apart = False
        return other

    @torch.no_grad()
    def choose_count(self, z: Tensor) -> Errors:
        """Double the draws of the latents until the noise of the log density at ``z`` (S, D) is small, or too many.

        There are no errors: the noise is a part of the weights.
        """
        z = z[:LOOKED_AT]
        while not self.system.quadratic and self.count < MOST_CROSSED:
            weights = torch.softmax(self._log_weights(z, *self._drawn(z, 0)), 1).unflatten(1, (2, -1)).sum(1)
            noise = (
                (weights.square().sum(1) - 1.0 / weights.shape[1]).clamp_min(0.0).median().sqrt()
            )  # of a mean weight
            if not float(noise) > ROW_ERROR_MOST:
                break
            self.count *= 2
        return Errors(0.0, 0.0)

    @torch.no_grad()
    def second_modes(self, z: Tensor) -> list[tuple[str, int]]:
        """Return plate and index of a row that is elsewhere in a second mode at a point ``z`` (D,); most often none.

        Climbs from draws of the prior look for it, unless all is normal.
        """
        system = self.system
        if system.quadratic:
            return []
        own = system.normal(z[None], look=self.clock.look)
        height = system.heights(z[None], own.mean.to(z), self.clock.look) + own.log_scales().sum(1)
        for attempt in range(TRIES):
            self.clock.look()
            start = system._of_prior(z, attempt, self.seed)
            other = system.normal(z[None], look=self.clock.look, start=start)
            there = system.heights(z[None], other.mean.to(z), self.clock.look) + other.log_scales().sum(1)
            apart = ((other.mean - own.mean) / own.log_scales().exp())[0].abs()
            if float(apart.max()) > ROW_MODES_APART and float(there - height) > math.log(ROW_MODE_SHARE):
                counts = [(site, site.value.numel()) for site in system.sites]
                rows = [("/".join(site.plates), place // site.size) for site, n in counts for place in range(n)]
                return [rows[int(apart.argmax())]]
        return []

    def row_likelihoods(self, z: Tensor) -> dict[str, Tensor]:
        """Return the log likelihood of all data, up to the prior of the globals: ``{ALL: (S, 1)}``."""
        return {ALL: self(z)[:, None]}

    @torch.no_grad()
    def local_draws(self, z: Tensor, names: Sequence[str], rows: Tensor, seed: int) -> dict[str, Tensor]:
        """Draw latents of all rows given points: ``{name: (S, *shape)}``, constrained.

        Where they are not normal, one is picked of those by which the point was weighed, by their own weights.
        """

        def constrained(row: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            at = self.rows.run(row, at_values(values), self.first.at.chosen, through=True)
            return {name: messages(at.trace)[name]["value"] for name in names}

        found: dict[str, list[Tensor]] = {name: [] for name in names}
        nodes = messages(self.first.at.trace)
        for piece in z.split(self.system.at_once):
            u, log_q = self._drawn(piece, seed if self.system.quadratic else 0)
            if self.count > 1:
                weights = torch.softmax(self._log_weights(piece, u, log_q), 1)
                if bool(torch.isnan(weights).any()):
                    raise ValueError(
                        "local_samples: expected a finite log density at all draws of the latents outside of plates, "
                        f"got none at {int(torch.isnan(weights).any(1).sum())} of {len(piece)} of them. Use draws of a "
                        "fit that is not `unreliable`."
                    )
                with seeded(derive(self.seed + seed, "picked"), z.device):
                    picked = torch.multinomial(weights, 1)
                u = u.gather(1, picked[:, :, None].expand(-1, -1, self.system.size))
            with quiet():
                placed = batch(constrained)(piece, self.system.split(u[:, 0]))
            for name in names:
                found[name].append(placed[name].reshape(len(piece), *nodes[name]["value"].shape))
        return {name: torch.cat(parts) for name, parts in found.items()}
