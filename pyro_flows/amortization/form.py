"""What data sets of one form have in common, and a data set as one row of numbers that a network takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_flows.calibration.wiring import Case, Wiring
from pyro_flows.densities.standardizing import tails
from pyro_flows.inference.verdict.weighing import heavy_tails
from pyro_flows.model.arguments import usable
from pyro_flows.model.sites import Keywords, Model, Site, Structure, messages
from pyro_flows.support.arguments import signature_of
from pyro_flows.support.thresholds import TAIL_INDEX_FOURTH

MEASURED = 50_000  # simulations that regression and tails are measured with


def bound(model: Model, args: tuple[object, ...], kwargs: Keywords) -> Case:
    """Return arguments with which the model runs, in one form however the caller passed them."""
    args, found = usable(model, args, kwargs)
    try:
        given = signature_of(model).bind(*args, **found)
    except (TypeError, ValueError):
        return Case(args, found)
    given.apply_defaults()
    return Case(given.args, given.kwargs)


@dataclass(frozen=True)
class Form:
    """The arguments of a model, of which the data may change, and nothing else."""

    wiring: Wiring  # which argument holds which observed site
    missing: dict[str, Tensor]  # the entries of each observed site that are missing (NaN)
    keep: dict[str, Tensor]  # those that count: neither missing nor masked out

    @classmethod
    def of(cls, wiring: Wiring, structure: Structure) -> Form:
        """Return the form of data sets like this one, which the model was read with."""
        whole = cls(wiring, structure.observed, {})
        found = whole._placed(tree_flatten((wiring.case.args, wiring.case.kwargs))[0])
        missing = {name: value.isnan() for name, value in found.items()}
        counts = {name: _counts(messages(structure.trace)[name]) for name in missing}
        return cls(wiring, missing, {name: counts[name].to(gone.device) & ~gone for name, gone in missing.items()})

    def read(self, case: Case) -> dict[str, Tensor]:
        """Return the values of the observed sites of a data set."""
        leaves, structure = tree_flatten((case.args, case.kwargs))
        own, known = tree_flatten((self.wiring.case.args, self.wiring.case.kwargs))
        if structure != known:
            raise ValueError(
                "args: expected arguments of the same form as those that amortize was given. Options such as draws= "
                "go to amortized.posterior(*args, draws=...)."
            )
        held = {place.leaf for place in self.wiring.places}
        for number, (leaf, first) in enumerate(zip(leaves, own, strict=True)):
            if number in held:
                leaves[number] = _like(leaf, first, number)
            elif not _equal(leaf, first):
                raise ValueError(
                    f"args: argument {number} is no data, and differs from the one that amortize was given. "
                    "The flow knows the model with that one only: amortize once more, or use fit."
                )
        return self.checked(self._placed(leaves))

    def checked(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return values of the observed sites, of one data set or of many, or say what the flow does not take."""
        for name, value in found.items():
            if not torch.equal(value.isnan(), self.missing[name].expand(value.shape)):
                raise ValueError(f"site {name!r}: expected missing values (NaN) where amortize was given them.")
            if bool(value.isinf().any()):
                raise ValueError(f"site {name!r}: expected finite data, got inf. The flow takes numbers only: use fit.")
        return found

    def _placed(self, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the values of the observed sites in the arguments."""
        found = {}
        for place in self.wiring.places:
            value = leaves[place.leaf] if place.part is None else torch.as_strided(leaves[place.leaf], *place.part)
            found[place.site] = value.reshape(self.missing[place.site].shape)
        return found

    def rows(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the entries that count of K data sets ``{site: (K, *shape)}`` as rows (K, n)."""
        return torch.cat([values[name][:, keep].double() for name, keep in self.keep.items()], 1)

    @property
    def sizes(self) -> list[int]:
        """How many columns of :meth:`rows` each site has."""
        return [int(keep.sum()) for keep in self.keep.values()]

    def entry(self, number: int) -> str:
        """Return the name of a column of :meth:`rows`."""
        for name, keep in self.keep.items():
            places = keep.nonzero()
            if number < len(places):
                return f"{name}[{', '.join(map(str, places[number].tolist()))}]" if keep.dim() else name
            number -= len(places)
        raise IndexError(number)


def _counts(site: Site) -> Tensor:
    """Return which entries of an observed site its mask does not leave out."""
    value, axes = site["value"], site["fn"].event_dim
    mask = torch.as_tensor(True if site["mask"] is None else site["mask"], device=value.device)
    mask = mask.reshape(mask.shape + (1,) * axes)
    whole = mask.expand(torch.broadcast_shapes(mask.shape, value.shape))
    return whole.int().sum_to_size(value.shape) > 0  # one value may be seen in several places


def _like(leaf: object, first: Tensor, number: int) -> Tensor:
    """Return an argument as the first one was: its strides, dtype and device."""
    try:
        value = torch.as_tensor(leaf)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"args: expected argument {number} to hold numbers, since it is data, got {leaf!r:.60}. Pass a tensor."
        ) from None
    if value.shape != first.shape:
        raise ValueError(
            f"args: expected argument {number} of shape {tuple(first.shape)}, as amortize was given, got "
            f"{tuple(value.shape)}. Data sets of another size need a flow of their own."
        )
    return first.clone().copy_(value)


def _equal(leaf: object, first: object) -> bool:
    if isinstance(first, Tensor):
        if not isinstance(leaf, Tensor) or leaf.shape != first.shape:
            return False
        return torch.allclose(leaf.double(), first.double(), rtol=0.0, atol=0.0, equal_nan=True)
    if isinstance(first, np.ndarray):
        return np.array_equal(cast(np.ndarray, leaf), first)
    try:
        return leaf is first or bool(leaf == first)
    except (TypeError, ValueError):  # of tables and the like
        return False


class Scale(torch.nn.Module):
    """Rows of data (N, n) on a common scale: :math:`u = (y - m) / s`, and asinh(u) of what has heavy tails.

    m is the median of simulated values and s their median absolute deviation, of each entry, or, of ``exchangeable``
    rows, of all entries of a site. Heavy-tailed is a site with values ten s away and without a fourth moment, by the
    tail index of its values. ``sites`` are the numbers of columns of each.
    """

    loc: Tensor
    scale: Tensor
    heavy: Tensor

    def __init__(self, rows: Tensor, sites: Sequence[int], *, exchangeable: int) -> None:
        super().__init__()
        found = [_measured(part, exchangeable) for part in rows.split(list(sites), 1)]
        for name, parts in zip(("loc", "scale", "heavy"), zip(*found, strict=True), strict=True):
            self.register_buffer(name, torch.cat(parts))

    def forward(self, rows: Tensor) -> Tensor:
        units = (rows - self.loc) / self.scale
        return torch.where(self.heavy, units.asinh(), units)

    def log_slope(self, features: Tensor) -> Tensor:
        """Return the log absolute determinant (K,) of the map to ``features`` (K, n)."""
        bend = torch.where(self.heavy, features.cosh().log(), 0.0)
        return -(bend + self.scale.log()).sum(1)


def _measured(part: Tensor, exchangeable: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return place, scale and whether the tails are heavy, for each column (N, m) of a site."""
    values = part.reshape(len(part) * exchangeable, -1)
    loc, scale, far = tails(values)
    heavy = (far > 0.0).any()
    if heavy:  # or there is no tail to speak of
        units = (values[:MEASURED] - loc) / scale
        heavy = heavy_tails(units.reshape(-1, 1), index=TAIL_INDEX_FOURTH)[0]
    return loc.repeat(exchangeable), scale.repeat(exchangeable), heavy.expand(part.shape[1])


def ess_share(log_weights: Tensor) -> float:
    """Return the effective share of draws with these log weights (S,); 0 where none is finite."""
    log_weights = torch.where(torch.isfinite(log_weights), log_weights, -torch.inf)
    share = (2.0 * log_weights.logsumexp(0) - (2.0 * log_weights).logsumexp(0)).exp() / len(log_weights)
    return float(share.nan_to_num(nan=0.0))
