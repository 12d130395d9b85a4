"""Which rows of plates are independent given all other latents, and which log densities read them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

import torch
from torch import Tensor

from pyro_flows.guides.conditional import ROUNDING, Conditional, Number, slope
from pyro_flows.guides.runs import Local, axes_of, is_part
from pyro_flows.model.sites import Site, messages, vectorized

OF_THESE_ROWS = "Write `with pyro.plate(...) as rows:`, and pass the data of these rows, as in `obs=y[rows]`."


def coupled(first: Conditional) -> list[Local]:
    """Return the sites whose rows are not independent given all other latents, or are read in other rows.

    The products of the curvature with a vector of random signs are those signs times the curvature of each number, if
    the rows are independent.
    """
    found = [site for site in first.sites if _read_in_other_rows(first, site)]
    for index, number in enumerate(first.numbers):
        if number.raw.requires_grad and number.site not in found:
            signs = _signs(number.raw, index)
            column = -slope((signs * number.raw).sum(), number.site)[..., number.place]
            if not _close(column, signs * number.curvature, number.curvature):
                found.append(number.site)
    return found


def _read_in_other_rows(first: Conditional, site: Local) -> bool:
    """Whether a log density in the plates of a site depends on other rows of the site than its own.

    If not, the gradient of the densities times random signs of their rows is the gradient times these signs.
    """
    for index, (name, part) in enumerate(first.at.densities().items()):
        axes = axes_of(messages(first.at.trace)[name])
        shape = [1] * len(site.batch)
        for plate, axis in site.plates.items():
            shape[axis] = site.batch[axis] if plate in axes else 1
        if not part.requires_grad or name in first.at.without_local_parents or math.prod(shape) == 1:
            continue
        signs = _signs(site.value.new_zeros(shape), index)
        own = slope(part.sum(), site)
        if not _close(slope((signs * part).sum(), site), signs.unsqueeze(-1) * own, own):
            return True
    return False


def crossed(first: Conditional) -> list[tuple[Local, Local]]:
    """Return the pairs of sites that depend on each other given all else, and of which none is inside of the other."""

    def depends(number: Number, other: Local) -> bool:
        product = slope((_signs(number.raw, number.place) * number.raw).sum(), other)
        return not _close(product, torch.zeros_like(product), number.curvature)

    pairs = [(one, other) for one, other in itertools.combinations(first.sites, 2) if not other.inside(one)]
    bent = [number for number in first.numbers if number.raw.requires_grad]
    return [(one, other) for one, other in pairs if any(depends(own, other) for own in bent if own.site is one)]


def read_elsewhere(first: Conditional) -> list[Local]:
    """Return the sites outside of subsampled plates on which log densities inside of such plates depend.

    A subsample says too little of them for a conditional distribution.
    """
    nodes, found = messages(first.at.trace), []
    for site in first.sites:
        frames = {name: vectorized(nodes[name]) for name in first.at.densities()}
        noisy = {name for name, own in frames.items() if any(is_part(f) and f.name not in site.plates for f in own)}
        found += [site] if _read_by(first, site, noisy) else []
    return found


def shared(first: Conditional) -> list[Local]:
    """Return the sites that priors of other latents depend on, or log densities outside of their plates.

    These stand for the latents outside of plates in a model that has none.
    """
    plates = {name: axes_of(messages(first.at.trace)[name]).items() for name in first.at.densities()}
    found = []
    for site in first.sites:
        outside = {name for name, own in plates.items() if not site.plates.items() <= own}
        found += [site] if _read_by(first, site, outside | (first.at.locals.keys() - {site.name})) else []
    return found


def parents(first: Conditional) -> list[Local]:
    """Return the sites on which priors of latents of the flow depend."""
    children = first.at.placed.keys() - first.at.without_local_parents
    return [site for site in first.sites if _read_by(first, site, children)]


def _read_by(first: Conditional, site: Local, names: Collection[str]) -> bool:
    """Whether the log densities of sites of these names depend on a site."""
    parts = [part.sum() for name, part in first.at.densities().items() if name in names and part.requires_grad]
    return bool(parts) and bool((slope(torch.stack(parts).sum(), site) != 0.0).any())


def _signs(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randint(2, like.shape, generator=generator) - 1.0).to(like)


def _close(one: Tensor, other: Tensor, scale: Tensor) -> bool:
    sizes = torch.nan_to_num(scale.detach()).abs()  # NaN among the data is named later
    least = ROUNDING * float(sizes.median()) + 1e-6 * float(sizes.max())
    return torch.allclose(one, other, rtol=ROUNDING, atol=least, equal_nan=True)


def check_plates(site: Site) -> None:
    """Refuse a loop over a subsampled plate, and data of other rows than those of the plate."""
    for frame in site["cond_indep_stack"]:
        if not is_part(frame):
            continue
        if frame.dim is None:
            raise ValueError(
                f"site {site['name']!r}: expected a vectorized plate, got a loop over the subsampled plate "
                f"{frame.name!r}. {OF_THESE_ROWS}"
            )
        shape = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
        got = shape[frame.dim] if len(shape) >= -frame.dim else 1
        if site["is_observed"] and got not in (1, frame.size):
            raise ValueError(
                f"site {site['name']!r}: expected data of the {frame.size} rows that plate {frame.name!r} takes of "
                f"{frame.full_size}, got data of {got} rows. {OF_THESE_ROWS}"
            )


# where rows start -----------------------------------------------------------------------------------------------------
