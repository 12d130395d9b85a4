"""Which rows of the data each run of a model has, and which plates are integrated out; data that are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_flows.guides.conditional import Conditional, Rows, slope
from pyro_flows.guides.runs import Start, axes_of, is_part, off_center
from pyro_flows.model.observations import left_alone, refuse_outside, support_moves
from pyro_flows.model.precision import doubled
from pyro_flows.model.reading import check_observed
from pyro_flows.model.sites import Site, is_data, messages, vectorized
from pyro_flows.model.supports import inside
from pyro_flows.support.process.seeding import derive, seeded

JITTER = 0.1  # of a point, to tell whether points can be batched
ALL = ""  # in the place of a plate: all latents in plates are one row


class Part(NamedTuple):
    """The rows of one run of the model, by plate, and which of them are in no part before."""

    chosen: dict[str, Tensor]
    fresh: dict[str, Tensor]


def parts_of(first: Conditional, seed: int, most: int | None) -> list[Part]:
    """Return the rows of ``most`` runs of the model, or of as many as have all rows, in an order by the seed.

    None is in two of them as long as there are others.
    """
    drawn, device = first.at.drawn, first.at.z.device
    count = max((-(-size // rows) for size, rows in drawn.values()), default=1)
    count = count if most is None else min(count, most)
    parts = [Part({}, {}) for _ in range(count)]
    for name, (size, rows) in drawn.items():
        with seeded(derive(seed, f"rows of plate {name}"), device):
            order = torch.cat([torch.randperm(size, device=device) for _ in range(-(-count * rows // size))])
        fresh = torch.arange(len(order), device=device) < size
        for number, part in enumerate(parts):
            own = slice(number * rows, (number + 1) * rows)
            part.chosen[name], part.fresh[name] = order[own], fresh[own]
    for name, (_, rows) in first.at.given.items():
        for part in parts:
            part.fresh[name] = torch.ones(rows, dtype=torch.bool, device=device)
    return parts


@torch.no_grad()
def check_data(rows: Rows, z: Tensor, start: Start, parts: Sequence[Part]) -> None:
    """Refuse data that are NaN or outside of their support, and log densities that are NaN wherever the globals are.

    The error names the site and the row. A support that moves with the globals decides at each of their draws, and a
    distribution made with ``validate_args=False`` is left alone.
    """
    model = doubled(rows.model) if rows.doubled else rows.model
    for part in parts:
        at, other = (rows.run(point, start, part.chosen) for point in (z, z + JITTER))
        if part is parts[0]:
            with pyro.validation_enabled(False):  # as the run was, so that the model is run once more with checks
                alone = left_alone(messages(at.trace), partial(model, *rows.args, **rows.kwargs))
        lost, also = (run.densities() for run in (at, other))
        for name, site in messages(at.trace).items():
            if site["type"] != "sample" or not site["is_observed"] or not is_data(site):
                continue
            try:
                check_observed(site)
                if name not in alone and not support_moves(site, messages(other.trace)[name]):
                    refuse_outside(site)
            except ValueError as error:
                fine, axes = inside(site["fn"], site["value"])
                nan, depth = torch.isnan(site["value"]), site["fn"].event_dim
                fine = fine.flatten(fine.dim() - axes).all(-1) if axes else fine
                fine = fine & ~(nan.flatten(nan.dim() - depth).any(-1) if depth else nan)
                row = _row_named(site, (~fine).nonzero()[0].tolist(), at.chosen)
                raise ValueError(f"{error} In all data, the first is at {row}.") from None
            undefined = torch.isnan(lost[name]) & torch.isnan(also[name])
            if bool(undefined.any()):
                row = _row_named(site, undefined.nonzero()[0].tolist(), at.chosen) or "all rows"
                raise ValueError(
                    f"site {name!r}: its log density is NaN in {int(undefined.sum())} of {undefined.numel()} rows, the "
                    f"first at {row}, and its values are not. Look for NaN among the model's other arguments there."
                )


@torch.enable_grad()
def check_masks(rows: Rows, z: Tensor, chosen: Mapping[str, Tensor]) -> None:
    """Refuse latents whose priors are masked in rows that something reads: q is masked there too, and would be lost."""
    at = rows.run(z, off_center, chosen)
    for name, part in at.densities().items():
        for site in at.locals.values():
            mask = messages(at.trace)[site.name]["mask"]
            if name == site.name or mask is None or not part.requires_grad:
                continue
            read = (slope(part.sum(), site) != 0.0).any(-1)
            if bool((read & ~torch.as_tensor(mask)).any()):
                raise ValueError(
                    f"site {site.name!r}: expected a prior in each row that is read, got a mask on it where site "
                    f"{name!r} reads it. Give these rows a wide prior, or mask {name!r} there, too."
                )


def _row_named(site: Site, index: list[int], chosen: Mapping[str, Tensor]) -> str:
    """Return the place of a row in the data, by its plates."""
    frames = {frame.dim: frame.name for frame in vectorized(site)}
    named = []
    for axis, place in zip(range(-len(index), 0), index, strict=True):
        plate = frames.get(axis)
        named.append(f"{plate}[{int(chosen[plate][place]) if plate in chosen else place}]" if plate else str(place))
    return ", ".join(named)


def by_row(values: Tensor, site: Site, plate: str, nest: int) -> Tensor:
    """Add up what belongs to one row of a plate, or to all of it: (K, S, *plates) -> (K, S, rows)."""
    axis = axes_of(site).get(plate)
    others = [dim for dim in range(-nest, 0) if dim != axis]
    found = values.sum(others, keepdim=True) if others else values
    return found.reshape(*found.shape[:2], -1)


def groups_of(first: Conditional, *, whole: bool) -> dict[str, str]:
    """Return the plate whose rows are integrated out, for each site in plates and the data that depend on it.

    It is an error if the model draws rows, and there is no such plate for a site.
    """
    parts, drawn = first.at.densities(), first.at.drawn
    nodes = {name: messages(first.at.trace)[name] for name in parts}
    for name, site in nodes.items():
        subsampled = [frame.name for frame in vectorized(site) if is_part(frame)]
        if whole and (given := [plate for plate in subsampled if plate not in drawn]):
            raise ValueError(
                f"plate {given[0]!r}: the model is given a subsample, and all rows are needed. Pass all of them, for "
                "example subsample=torch.arange(size), or let the plate draw them (subsample_size=)."
            )
        if len(subsampled) > 1:
            raise ValueError(f"site {name!r}: expected at most one subsampled plate, got {subsampled}.")
    groups: dict[str, str] = {}
    for site in first.sites:
        plates = sorted(site.plates, key=lambda name: (name in drawn, site.batch[site.plates[name]]))
        outer = [groups[other.name] for other in first.sites if other.name in groups and site.inside(other)]
        groups[site.name] = outer[0] if outer and plates[-1] not in drawn else plates[-1]
    for name, part in parts.items():
        if name in first.at.without_local_parents or not part.requires_grad:
            continue
        values = [site.value for site in first.sites]
        slopes = torch.autograd.grad(part.sum(), values, retain_graph=True, allow_unused=True) if values else ()
        needed = {groups[site.name] for site, slope in zip(first.sites, slopes, strict=True) if slope is not None}
        needed |= {groups[name]} if name in groups else set()
        plates = list(axes_of(nodes[name]))
        split = {frame.name for frame in vectorized(nodes[name]) if is_part(frame)} - needed
        if len(needed) > 1 or not needed <= set(plates) or (needed and split):
            if drawn or first.at.given:
                raise ValueError(
                    f"site {name!r}: expected data in the plate of the latents that they depend on "
                    f"({', '.join(sorted(needed))}), got plates {plates}. Rows cannot be told apart."
                )
            names = [site.name for site in first.sites] + [
                name for name in parts if name not in first.at.without_local_parents
            ]
            return dict.fromkeys(names, ALL)
        groups |= dict.fromkeys([name], *needed) if needed else {}
    return groups
