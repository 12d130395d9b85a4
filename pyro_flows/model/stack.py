"""The log densities of one model with many data sets, as one function of many groups of points."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pyro_flows.model.batching import (
    batch,
    batch_and_grads,
    batch_hessians,
    hessians,
    quiet,
    values_and_grads,
    where_possible,
)
from pyro_flows.model.graphs import Recorder, Runner, agree, record
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.observations import same
from pyro_flows.support.numbers.cache import Cache
from pyro_flows.support.process.clock import unbounded
from pyro_flows.support.process.fallbacks import Tried

KINDS_KEPT = 16
RECORDED_FROM = 2  # the call with one number of points from which on it is recorded
SIZES_COMPARED = 0.5, 0.2  # of the points of a data set at which the stack is compared with the model itself
COMPARED = 2 * len(SIZES_COMPARED)  # such points
CHUNK = 2**21  # numbers that a call handles at once, about: more fill the memory and save nothing

Values = Callable[..., tuple[Tensor, ...]]


class NotStackable(RuntimeError):
    """Data sets that cannot go through a model side by side, with the reason."""


class Stack:
    """K log densities of one model, each with data of its own, in the same coordinates, evaluated side by side.

    Points (K m, D) stand in K groups of m, one for each data set, and each is scored with the data of its group. Data
    sets have to agree in everything but the numbers in some tensors, or this is NotStackable. These tensors are inputs
    of the recorded graphs, so that a model is recorded once for all data sets. The densities themselves share graphs
    from then on too. Each counts the gradients of its own data.
    """

    batched = True

    def __init__(self, densities: Sequence[LogDensity]) -> None:
        self.densities = list(densities)
        first = self.densities[0]
        self.dim, self.dtype, self.device, self.numbers = first.dim, first.dtype, first.device, first.numbers
        self.structure, self.written = first.structure, first.written
        self.clock = unbounded()
        self._form, self._where, self._given = _sorted_out(self.densities)
        self.given = [torch.stack(parts) for parts in zip(*self._given, strict=True)]
        self._bare = copy.copy(first)
        self._leaves = tree_flatten((first.args, first.kwargs))[0]
        unit, large = first.work.rows(2)
        self._recorders = (
            Recorder(self._values, self.numbers, unit=unit, large=large),
            Recorder(self._gradients, self.numbers, unit=unit),
            Recorder(self._constrained, self.numbers, unit=unit),
            Recorder(self._doubles, self.numbers, unit=unit),
        )
        self._runners: Cache[tuple[str, int], Runner] = Cache(KINDS_KEPT)
        self._calls: Counter[tuple[str, int]] = Counter()
        self._check()
        for density, given in zip(self.densities, self._given, strict=True):
            self._share(density, given)

    def __len__(self) -> int:
        return len(self.densities)

    # one data set ---------------------------------------------------------------------------------------------------

    def _with(self, given: Sequence[Tensor]) -> LogDensity:
        """Return the density with these tensors in the place of the data."""
        leaves = list(self._leaves)
        for place, value in zip(self._where, given, strict=True):
            leaves[place] = value
        self._bare.args, self._bare.kwargs = tree_unflatten(leaves, self._form)
        return self._bare

    def _values(self, z: Tensor, *given: Tensor) -> tuple[Tensor]:
        with quiet():
            return (batch(self._with(given).single)(z),)

    def _constrained(self, z: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), quiet():
            return tuple(batch(self._with(given).constrained)(z).values())

    def _doubles(self, z: Tensor, *given: Tensor) -> tuple[Tensor]:
        with quiet():
            return (batch(self._with(given).doubly)(z),)

    def _gradients(self, z: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), quiet():
            return values_and_grads(self._with(given).single, z)

    def graph(self, points: int, *, gradients: bool) -> fx.GraphModule:
        """Return the graph of one data set, ``(z, *given)`` to values, or values and gradients, at so many points."""
        function = self._gradients if gradients else self._values
        z = torch.zeros(points, self.dim, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            return record(function, z, *self._given[0])

    # all data sets --------------------------------------------------------------------------------------------------

    def __call__(self, z: Tensor) -> Tensor:
        """Return the log densities (K m,) at ``z`` (K m, D), without a graph of autograd's."""
        return self._run("values", lambda groups, *given: (self._all(groups, given),), z)[0]

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log densities (K m,) and their gradients (K m, D)."""
        self.spend(len(z) // len(self))
        value, grad = self._with_gradients(z)
        return value, grad

    def hessians(self, z: Tensor) -> Tensor:
        """Return the Hessians (K m, D, D)."""
        self.spend(z.numel() // len(self))
        return self._run("hessians", partial(self._differentiated, lambda *asked: (batch_hessians(*asked),)), z)[0]

    def spend(self, gradients: int) -> None:
        """Count gradients that were taken of each data set."""
        for density in self.densities:
            density.spend(gradients)

    def select(self, chosen: Sequence[int]) -> Stack:
        """Return the stack of some of the data sets, which shares the graphs of one data set."""
        other = copy.copy(self)
        other.densities = [self.densities[number] for number in chosen]
        other._given = [self._given[number] for number in chosen]
        other.given = [torch.stack(parts) for parts in zip(*other._given, strict=True)]
        other._runners, other._calls = Cache(KINDS_KEPT), Counter()
        return other

    def _all(self, groups: Tensor, given: Sequence[Tensor]) -> Tensor:
        """Return the log densities (K, m) of groups of points (K, m, D)."""
        return batch(lambda z, *part: self._values(z, *part)[0])(groups, *given)

    def _with_gradients(self, z: Tensor) -> list[Tensor]:
        return self._run("gradients", partial(self._differentiated, batch_and_grads), z)

    def _differentiated(self, how: Values, groups: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        """Return derivatives of the log densities of groups of points (K, m, D), as ``how`` takes them."""
        found = how(lambda z: self._all(z.view_as(groups), given).flatten(), groups.flatten(0, 1))
        return tuple(part.unflatten(0, groups.shape[:2]) for part in found)

    @torch.no_grad()
    def _run(self, name: str, function: Values, z: Tensor) -> list[Tensor]:
        """Apply a function of groups of points to all of them, in pieces of the groups' points."""
        self.clock.look()
        groups = z.reshape(len(self), -1, self.dim)
        rows = max(1, CHUNK // (len(self) * self.numbers))
        found = [self._possible(name, function, part.contiguous()) for part in groups.split(rows, 1)]
        return [torch.cat(parts, 1).flatten(0, 1).to(z.dtype) for parts in zip(*found, strict=True)]

    def _possible(self, name: str, function: Values, groups: Tensor) -> tuple[Tensor, ...]:
        """Return a piece, by each density alone where the model raises an error at some of the points."""
        try:
            return self._piece(name, function, groups)
        except torch.linalg.LinAlgError:
            found = list[tuple[Tensor, ...]]()
        for density, z in zip(self.densities, groups, strict=True):
            if name == "values":
                found.append((density(z),))
            elif name == "gradients":
                found.append(density.value_and_grad(z))
            else:
                with quiet():
                    found.append(where_possible(partial(_curvature, density), z, (self.dim, self.dim)))
        return tuple(torch.stack(parts) for parts in zip(*found, strict=True))

    def _piece(self, name: str, function: Values, groups: Tensor) -> tuple[Tensor, ...]:
        kind = (name, groups.shape[1])
        if kind not in self._runners:
            self._calls[kind] += 1
            with quiet():
                if self._calls[kind] < RECORDED_FROM:
                    return function(groups, *self.given)
                self._runners.put(kind, Runner(record(function, groups, *self.given)))
        return tuple(part.clone() for part in self._runners[kind](groups, *self.given))

    # checks ---------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Compare with the model itself at a few points: gradients at some data sets, a value at each other one."""
        points = torch.cat([self.structure.points(size) for size in SIZES_COMPARED])
        with Tried(lambda error: not isinstance(error, NotStackable)) as tried:
            for _ in range(RECORDED_FROM):
                value, grad = self._with_gradients(points.repeat(len(self), 1))
        if tried.error is not None:
            why = f"the model cannot take its data as inputs: {tried.error}".splitlines()[0]
            raise NotStackable(why) from tried.error
        some = range(0, len(self), max(1, len(self) // 8))  # at which gradients are compared too
        for number, density in enumerate(self.densities):
            first, derived = number * COMPARED, number in some
            part = slice(first, first + COMPARED if derived else first + 1)
            ours = (value[part], grad[part]) if derived else (value[part],)
            with quiet():
                theirs = density.unrecorded(points) if derived else (density.single(points[0])[None],)
            if not agree(ours, theirs):
                raise NotStackable("side by side, the model gave other values than by itself")

    def _share(self, density: LogDensity, given: Sequence[Tensor]) -> None:
        density.take(*(recorder.sharing(given) for recorder in self._recorders))

    # further data sets ----------------------------------------------------------------------------------------------

    def join(self, density: LogDensity) -> None:
        """Let the density of a further data set take these graphs; it differs where those of the stack differ only."""
        _check_alike(density, self.densities[0])
        leaves = tree_flatten((density.args, density.kwargs))[0]
        self._share(density, [leaves[place] for place in self._where])

    def at(self, z: Tensor, arguments: Sequence[tuple[object, object]]) -> Tensor:
        """Return the log densities (K, m) of groups of points (K, m, D), each with arguments ``(args, kwargs)``."""
        leaves = [tree_flatten(each)[0] for each in arguments]
        given = [torch.stack([each[place] for each in leaves]) for place in self._where]
        with torch.no_grad():
            return self._all(z, given)


def _curvature(density: LogDensity, z: Tensor) -> tuple[Tensor]:
    return (hessians(density.single, z),)


def signature(density: LogDensity) -> tuple[object, ...]:
    """Return what data sets have to agree in to be stacked: coordinates, shapes and everything but numbers."""
    structure = density.structure
    latents = tuple(
        (x.name, x.shape, x.unconstrained_shape, x.offset, x.size, x.mask is None) for x in structure.latents
    )
    leaves, form = tree_flatten((density.args, density.kwargs))
    shapes = tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
    observed = tuple((name, tuple(value.shape)) for name, value in structure.observed.items())
    more = (str(structure.dtype), str(structure.device), density._guards, structure.enumerated, structure.dependent)
    return (latents, str(form), shapes, observed, structure.hierarchical, density.batched, *more)


def _sorted_out(densities: Sequence[LogDensity]) -> tuple[TreeSpec, list[int], list[tuple[Tensor, ...]]]:
    """Return how arguments are put together, which tensors among them differ, and these of each data set."""
    first = densities[0]
    if any(not density.batched for density in densities):
        raise NotStackable(densities[0].reason or "the model runs draw by draw")
    if any(density.parameters() for density in densities):
        raise NotStackable("the model has parameters of its own")
    for density in densities:
        _check_alike(density, first)
    leaves = [tree_flatten((density.args, density.kwargs))[0] for density in densities]
    form = tree_flatten((first.args, first.kwargs))[1]
    where = [place for place, parts in enumerate(zip(*leaves, strict=True)) if _differ(parts)]
    return form, where, [tuple(parts[place] for place in where) for parts in leaves]


def _check_alike(density: LogDensity, first: LogDensity) -> None:
    """Refuse a data set whose coordinates or arguments are of another kind than those of the first."""
    if signature(density) != signature(first):
        raise NotStackable("data sets differ in shapes, or in values that are no tensors")
    for one, other in zip(density.structure.latents, first.structure.latents, strict=True):
        if one.mask is not None and other.mask is not None and not torch.equal(one.mask, other.mask):
            raise NotStackable(f"masks leave other entries of {one.name!r} in different data sets")


def _differ(parts: Sequence[object]) -> bool:
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return any(part is not tensors[0] and not same(part, tensors[0]) for part in tensors)
