"""Where rows of plates were last near their modes: the next run begins there."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pyro_flows.guides.conditional import NEAR, Conditional
from pyro_flows.guides.runs import At, all_frames, beginning
from pyro_flows.model.sites import Frame, Site, vectorized


class RowModes:
    """The modes of all rows of sites in plates, as far as runs have seen them."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}  # of all rows of each site, and which rows have one
        self.sizes: dict[str, int] = {}  # all rows of each plate
        self.events: dict[str, int] = {}  # axes of an unconstrained event of each site

    def start(self, msg: Site, at: At) -> Tensor:
        """Return the values at which a site's rows were last near their modes; the middle of the prior for others."""
        kept, event = self.kept.get(msg["name"]), self.events.get(msg["name"], 0)
        if kept is None or self._are_others(vectorized(msg)):
            return beginning(msg, at)
        values, seen = kept
        for frame in vectorized(msg):
            if frame.full_size != frame.size:
                rows = at.chosen[frame.name].to(values.device)
                values = values.index_select(values.dim() + frame.dim - event, rows)
                seen = seen.index_select(seen.dim() + frame.dim, rows)
        if bool(seen.all()):
            return values
        return torch.where(seen.reshape(*seen.shape, *[1] * event), values, beginning(msg, at))

    def _are_others(self, frames: Iterable[Frame]) -> bool:
        """Whether a plate has another size than in the first run: its rows are not those that have modes."""
        return any((frame.full_size or frame.size) != self.sizes.get(frame.name) for frame in frames)

    @torch.no_grad()
    def remember(self, now: Conditional) -> None:
        """Keep where the rows of this run have their modes, averaged over the particles; none of other plates."""
        if self._are_others(all_frames(now.at.trace)):
            return
        near = zip(now.steps, now.decrement, strict=True)
        there = now.moved(now.base, [torch.where(far.abs() <= NEAR, step, 0.0) for step, far in near])
        for site in now.sites:
            rank = max(-axis for axis in site.plates.values())
            value = there[site.name]
            while value.dim() - site.event_dim > rank:
                value = value.mean(0)
            full = [1] * rank
            for plate, axis in site.plates.items():
                full[axis] = self.sizes[plate]
            kept, seen = self.kept.get(site.name, (value, value.new_ones(())))
            if kept.dtype != value.dtype or list(seen.shape) != full:
                kept, seen = value.new_zeros(*full, *value.shape[rank:]), value.new_zeros(full, dtype=torch.bool)
                self.kept[site.name] = kept, seen
            index = [torch.arange(size, device=value.device) for size in full]
            for plate, axis in site.plates.items():
                index[axis] = now.at.chosen.get(plate, index[axis]).to(value.device)
            rows = torch.meshgrid(*index, indexing="ij")
            kept[rows] = value
            seen[rows] = True
