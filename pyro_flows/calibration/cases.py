"""Data sets of one model: how callers give them, and which can go side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_flows.model.arguments import usable
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import Keywords, Model
from pyro_flows.model.unchanged import own as owned


@dataclass(frozen=True)
class Case:
    """The arguments of a model for one data set."""

    args: tuple[object, ...]
    kwargs: dict[str, object]

    def density(self, model: Model, number: int, lead: LogDensity | None = None) -> LogDensity:
        """Return the model's log density: how the model runs is taken from ``lead``, that of data of equal shapes."""
        try:
            if lead is not None and lead.batched and not lead.parameters():
                return lead.beside(self.args, self.kwargs)
            return LogDensity(model, self.args, self.kwargs)
        except ValueError as error:
            raise ValueError(f"data[{number}]: {error}") from error

    @property
    def shapes(self) -> tuple[object, ...]:
        """What data sets that go side by side have in common: the form of the arguments, and their shapes."""
        leaves, form = tree_flatten((self.args, self.kwargs))
        parts = [(tuple(leaf.shape), str(leaf.dtype)) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]
        return (str(form), *parts)


def cases_of(model: Model, data: object, model_kwargs: Keywords | None) -> list[Case]:
    """Return the arguments of each data set: a tuple, a dict of keyword arguments, or a single argument."""
    if isinstance(data, (str, bytes, Mapping, Tensor)) or not isinstance(data, Sequence):
        raise ValueError(
            "data: expected a list with the arguments of each data set (a tuple, a dict of keyword arguments, or one "
            f"argument), got a {type(data).__name__}. To fit a single data set, call fit."
        )
    shared = dict(model_kwargs or {})
    found = []
    for own in data:
        args: tuple[object, ...] = tuple(own) if isinstance(own, tuple) else () if isinstance(own, Mapping) else (own,)
        kwargs = {**shared, **own} if isinstance(own, Mapping) else shared
        found.append(Case(*usable(model, *owned(args, kwargs))))
    return found


def grouped(cases: Sequence[Case]) -> list[list[int]]:
    """Return the numbers of the data sets, those with equal shapes together, in the order in which they come."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, case in enumerate(cases):
        groups.setdefault(case.shapes, []).append(number)
    return list(groups.values())
