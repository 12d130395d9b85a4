"""Runs of a Pyro model at points in its unconstrained coordinates: one, and many at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import cast

import torch
from pyro import poutine
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_flows.model.arguments import usable
from pyro_flows.model.batching import (
    Found,
    Rows,
    advice,
    apart,
    filled_up,
    over_rows,
    pieces,
    possible_pieces,
    quiet,
    values_and_grads,
)
from pyro_flows.model.faults import (
    Factorizations,
    Faults,
    Subsampled,
    defined,
    is_of_a_point,
    line_of,
    passing_over,
    place_of,
    where_it_runs,
)
from pyro_flows.model.handlers import Place, Resample, hold, place_all
from pyro_flows.model.observations import check_values
from pyro_flows.model.precision import doubled, in_double, in_floats, is_refused, read_in_one_precision
from pyro_flows.model.sites import (
    Keywords,
    Latent,
    Model,
    Noncentered,
    Placed,
    Positional,
    Structure,
    check_latents,
    draws_rows,
    messages,
)
from pyro_flows.model.writes import Batchable, FindWrites, Places
from pyro_flows.support import checks
from pyro_flows.support.numbers.tensors import ROWS_AT_LEAST, Args, Dispatch, Function, Kwargs, rows_for, tensors_in
from pyro_flows.support.process.clock import unbounded
from pyro_flows.support.process.fallbacks import Tried, fallback, first_line
from pyro_flows.support.process.journal import evaluated
from pyro_flows.support.process.seeding import seeded

MAPPED = 2**20  # numbers of observations that are handled at once, where nothing is recorded

logger = logging.getLogger("pyro_flows")
LONG = 2000  # operations from which one graph serves all batch sizes: recording takes seconds
AT_ONCE = 2**12  # numbers that one operation of a long graph handles in little more time than one number,
LONG_ROWS = 64  # and rows at most: the results of a long loop that its gradient needs should stay in a cache
LONG_VALUES, ROWS_OF_VALUES = 2**14, 1024  # the same for values alone, of which no results are kept


class Work(Dispatch):
    """Counts operations inside, the numbers that they write, and those of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.numbers = self.largest = 0

    def __torch_dispatch__(self, func: Function, types: object, args: Args = (), kwargs: Kwargs = None) -> object:
        result = func(*args, **(kwargs or {}))
        sizes = [part.numel() for part in tensors_in((result,))]
        self.operations += 1
        self.numbers += sum(sizes)
        self.largest = max(self.largest, *sizes, 0)
        return result

    def rows(self, batch: int) -> tuple[int, int] | tuple[None, None]:
        """Return how many rows pieces have, and larger ones of values alone, after a run with so many.

        Both are None where small batches may have graphs of their own.
        """
        if self.operations < LONG:
            return None, None
        apiece = max(1, self.numbers // (self.operations * batch))
        both = (AT_ONCE, LONG_ROWS), (LONG_VALUES, ROWS_OF_VALUES)
        unit, large = (min(most, 1 << ((at_once // apiece) | 1).bit_length() - 1) for at_once, most in both)
        return max(ROWS_AT_LEAST, unit), max(ROWS_AT_LEAST, large)


class Runs:
    """A model with its arguments and its structure, run at points; see :class:`~pyro_flows.LogDensity`."""

    takes_a_part = False  # whether the arguments may give a part of the rows of a plate (subsample=)

    def __init__(
        self, model: Model, args: Positional = (), kwargs: Keywords | None = None, *, noncentered: Noncentered = ()
    ) -> None:
        self.args, self.kwargs = usable(model, args, kwargs)
        self._double = False  # whether the model runs in double precision, whatever it was written for
        self.faults = Faults()
        self._settle(self._read(model).noncenter(noncentered))

    def _read(self, model: Model, like: Structure | None = None) -> Structure:
        """Read the structure of a model with these arguments, and tie it to its parameters."""
        with seeded(0):
            self._as_read, double = read_in_one_precision(model, self.args, self.kwargs, like)
            nodes = messages(self._as_read.trace)
            refused = frozenset(name for name in self._as_read.observed if is_refused(nodes[name]))
            if refused:
                model = in_floats(model, refused)
                self._as_read, double = read_in_one_precision(model, self.args, self.kwargs, like)
        self.model, self._parameters = hold(model, self._as_read.trace)
        if double:
            self.model, self._double = doubled(self.model), True
        read = messages(self._as_read.trace)
        for plate in self._as_read.subsampled:
            if self.takes_a_part and plate in read and not draws_rows(read[plate]):
                continue
            raise Subsampled(
                f"plate {plate!r}: subsampled, so the log density is not that of all rows. Give it all rows, or use "
                "fit, or train an AutoHierarchicalFlow with Pyro's own SVI."
            )
        return self._as_read

    def _settle(self, structure: Structure, like: Runs | None = None) -> None:
        """Take these coordinates: find out whether the data fit there, and whether runs can be batched.

        That is taken over from ``like``, runs of the same model in these coordinates, if there are such.
        """
        self.structure = structure
        self.dim, self.dtype, self.device = self.structure.dim, self.structure.dtype, self.structure.device
        self.names = tuple(latent.name for latent in self.structure.latents)
        self.clock = unbounded()  # looked at as runs go on
        self.order = tuple(name for name, site in messages(structure.trace).items() if site["type"] == "sample")
        self.batched = True
        self._unbatched: str | None = None
        self._writes: Places | None = None  # in tensors that the model makes
        self.work = Work()  # of gradients at two points
        self._factorizes = False
        self._evaluator: Evaluator | None = None
        self.numbers = max(self.dim, sum(value.numel() for value in self.structure.observed.values()))
        self._rows = rows_for(self.numbers, MAPPED)
        self._guards: frozenset[str] = frozenset()
        self._guards = check_values(self.structure, self.trace_at, self._called)
        if like is None:
            self._probe()
        else:
            self.batched, self._unbatched, self._writes = like.batched, like._unbatched, like._writes
            self.work, self._factorizes = like.work, like._factorizes

    # one run ------------------------------------------------------------------------------------------------------

    def _run(
        self, z: Tensor, *, enumerate_sites: bool, resample: bool = False, latents: Sequence[Latent] | None = None
    ) -> tuple[poutine.Trace, Tensor]:
        """Run the model at one point; return the trace and the log Jacobian. ``latents`` may have other coordinates."""
        model = self.model
        if enumerate_sites and self.structure.enumerated:
            model = Enumerate(first_available_dim=-1 - self.structure.plate_nesting)(model)
        if resample:
            model = Resample()(model)
        place = Place(self.structure.latents if latents is None else latents, z, self._guards)
        with apart(), place, self.writing(z), defined(lambda: place_of(place.last, self.order)):
            trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        check_latents(trace, place.placed, self.structure)
        return trace, sum((placed.ladj.sum() for placed in place.placed.values()), z.new_zeros(()))

    def placed(self, z: Tensor) -> dict[str, Placed]:
        """Put each latent at one point ``z`` (D,)."""
        with self.writing(z), defined(lambda: "in the model"):
            return place_all(self.structure, z, self._called, moving=bool(self._parameters))

    def _called(self) -> object:
        return self.model(*self.args, **self.kwargs)

    def trace_at(self, z: Tensor) -> poutine.Trace:
        """Return the trace of the model at one point ``z`` (D,), with enumerated latents along axes of their own."""
        return self._run(z, enumerate_sites=True)[0]

    @contextmanager
    def writing(self, z: Tensor) -> Iterator[None]:
        """Compute in the model's precision, without errors of factorizations.

        Tensors that the model writes into have the batch axis of ``z``, if it has one.
        """
        writes = nullcontext() if self._writes is None else Batchable(self._writes, z)
        with Factorizations() if self._factorizes else nullcontext(), writes, self.precisely():
            yield

    def precisely(self) -> AbstractContextManager[None]:
        """Compute in double precision inside, if the model does."""
        return in_double() if self._double else nullcontext()

    def single(self, z: Tensor, latents: Sequence[Latent] | None = None) -> Tensor:
        """Return the log density of one point (D,), or that in the coordinates of other ``latents``."""
        trace, ladj = self._run(z, enumerate_sites=True, latents=latents)
        with self.writing(z), defined(lambda: _failing(trace)):  # distributions write in place, too
            if not self.structure.enumerated:
                return trace.log_prob_sum() + ladj
            if self._evaluator is None:
                self._evaluator = Evaluator(trace, True, self.structure.plate_nesting)
            return self._evaluator.log_prob(trace) + ladj

    def _probe(self) -> None:
        """Find out whether the model can be batched, by comparing with single runs at two points."""

        def run(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return point, self.single(point), self.single(point)

        with torch.no_grad(), quiet():
            with Factorizations(strict=True) as factorizations:
                points, single, again = self._tried(run)
            if not torch.allclose(single, again, rtol=1e-3, atol=1e-3, equal_nan=True):
                worst = int((single - again).abs().nan_to_num(nan=torch.inf).argmax())
                raise ValueError(
                    f"model: its log density is random, {single[worst]:.6g} and {again[worst]:.6g} at one point. Take "
                    "random numbers out of the model, or train a guide such as AutoRealNVP with Pyro's own SVI."
                )
            self._unbatched = self._why_unbatched(points, single)
            if self._unbatched is not None:
                with FindWrites() as found, passing_over():
                    self.single(points[0])
                for places in found.places.ways():
                    self._writes = places
                    if self._why_unbatched(points, single) is None:
                        self._unbatched = None
                        break
        self._factorizes = factorizations.met  # from now on: above, places of writes are told by who calls torch
        if self._unbatched is not None:
            self.batched, self._writes = False, None
            self._unbatched = f"{self._unbatched}. {advice(self._unbatched)}"
            fallback(self._unbatched)
            logger.warning("%s", self._unbatched)

    def _tried(self, run: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
        """Return what ``run`` returns at two points, stacked: where the log density is finite, if it is anywhere."""
        errors = list[Exception]()
        found = where_it_runs(
            run, self.structure.points, 2, good=lambda ran: bool(torch.isfinite(ran[1])), note=errors.append
        )
        if not found:
            raise ValueError(
                "model: expected a log density near the start or near a draw of the prior, but an error is raised at "
                f"each of {len(errors)} points, {errors[0]}. Check the shapes and values of its arguments there."
            ) from errors[0]
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    def _why_unbatched(self, points: Tensor, single: Tensor, *, again: bool = True) -> str | None:
        """Return why values and gradients cannot be had for many points at once; None if they can."""
        with Tried() as tried, Work() as self.work:
            batched, _ = values_and_grads(self.single, points)
        if tried.error is not None:
            if again and is_of_a_point(tried.error):  # by chance, since it was none when this was tried point by point
                return self._why_unbatched(points, single, again=False)
            return f"not batched: {first_line(tried.error)}{line_of(tried.error)}"
        if not torch.allclose(single, batched, rtol=1e-3, atol=1e-3, equal_nan=True):
            return "not batched: vmap gave other values than single runs"
        return None

    @property
    def written(self) -> int:
        """Numbers that the operations of one evaluation with its gradient write, altogether."""
        return self.work.numbers // 2

    @property
    def long(self) -> bool:
        """Whether its operations are so many that batches of all sizes go through one recorded graph."""
        return self.work.rows(2)[0] is not None

    # batches ------------------------------------------------------------------------------------------------------

    def map(
        self,
        function: Callable[[Rows], Found],
        z: Rows,
        *,
        randomness: str = "same",
        instead: Callable[[Rows], Found | None] = lambda row: None,
    ) -> Found:
        """Apply a function of one point to all rows of ``z``, in chunks; results (dicts of tensors) are stacked.

        At points where the model raises an error they are what ``instead`` returns for a row (1, D), or else NaN (0 for
        whole numbers).

        Raises:
            Undefined: if it raises one at all points, and nothing is given instead.
        """
        rows = partial(self.strictly, function, randomness=randomness)
        alone, add = partial(rows, batched=False), self.faults.add

        def compute() -> Found:
            found = possible_pieces(rows, z, alone=alone, halves=self.batched, instead=instead, note=add)
            return filled_up(list(found), self.faults)

        given = tree_leaves(z)
        moving = torch.is_grad_enabled() and (self._parameters or any(part.requires_grad for part in given))
        if moving or randomness != "same":
            return compute()
        return evaluated(given, compute, self.faults)

    def strictly(
        self, function: Callable[[Rows], Found], z: Rows, *, randomness: str = "same", batched: bool | None = None
    ) -> Found:
        """Return what :meth:`map` does; errors at single points are raised."""
        otherwise = None if randomness == "same" else partial(fallback, "drawn one by one")
        with quiet(), self.clock.watching():
            return over_rows(
                function,
                z,
                batched=self.batched if batched is None else batched,
                randomness=randomness,
                size=self._rows,
                look=self.clock.look,
                otherwise=otherwise,
            )

    def _pieces(self, z: Tensor, *, one_by_one: bool = False) -> Iterator[Tensor]:
        """Yield the rows of ``z`` in pieces, or one by one, with a look at the clock before each."""
        return pieces(z, None if one_by_one else self._rows, self.clock.look)

    def _check(self, z: Tensor) -> Tensor:
        """Return ``z`` (S, D), whole numbers as floating-point ones: results have its dtype."""
        z = checks.floating("z", z, self.dtype)
        if z.dim() != 2 or z.shape[1] != self.dim:
            raise ValueError(f"z: expected shape (S, {self.dim}), got {tuple(z.shape)}.")
        return z.to(torch.promote_types(z.dtype, self.dtype))  # single precision would round the result

    def parameters(self) -> dict[str, Tensor]:
        """Return the unconstrained leaves of the model's own parameters (``pyro.param``, modules), by name."""
        return dict(self._parameters)


def _failing(trace: poutine.Trace) -> str:
    """Say at which site of a run the log density raises an error."""
    for name, site in messages(trace).items():
        if site["type"] == "sample":
            with Tried() as tried:
                site["fn"].log_prob(site["value"])
            if tried.error is not None:
                return f"at site {name!r}"
    return "in the log density"


# discrete latents summed out: Pyro's parallel enumeration in a form that vmap and recording accept --------------------


class Enumerate(EnumMessenger):
    """Pyro's enumeration handler, which reads ``value.data``: forbidden under vmap, and only its shape matters."""

    def _pyro_post_sample(self, msg: Message) -> None:
        value = msg["value"]
        if value is not None:
            msg["value"] = SimpleNamespace(data=value, dim=value.dim)
        try:
            super()._pyro_post_sample(msg)
        finally:
            msg["value"] = value


class Evaluator(TraceEinsumEvaluator):
    """Log density of a trace with its enumerated dimensions summed out by variable elimination."""

    def log_prob(self, model_trace: Trace) -> Tensor:
        return contract_to_tensor(self._get_log_factors(model_trace), self._enum_dims, ring=_Elimination())


class _Elimination(LogRing):
    """Sum-product in log space, one dimension at a time, the cheapest first; plain torch operations only."""

    def sumproduct(self, terms: Sequence[Tensor], dims: Iterable[str]) -> Tensor:
        pool = [(term, vars(term)["_pyro_dims"]) for term in terms]
        left = set(dims)
        while left:
            dim = min(sorted(left), key=lambda name: len(_union(names for _, names in pool if name in names)))
            left.remove(dim)
            touched = [entry for entry in pool if dim in entry[1]]
            names = _union(names for _, names in touched)
            joint = torch.logsumexp(_add(touched, names), names.index(dim))
            pool = [entry for entry in pool if dim not in entry[1]] + [(joint, names.replace(dim, ""))]
        names = _union(names for _, names in pool)
        result = _add(pool, names)
        vars(result)["_pyro_dims"] = names
        return result


def _union(names: Iterable[str]) -> str:
    return "".join(sorted(set("".join(names))))


def _add(entries: Sequence[tuple[Tensor, str]], names: str) -> Tensor:
    """Add tensors with named axes, each broadcast to ``names``."""
    total: Tensor | float = 0.0
    for tensor, own in entries:
        order = sorted(range(len(own)), key=own.__getitem__)
        index = tuple(slice(None) if name in own else None for name in names)
        total = total + tensor.permute(order)[index]
    return cast(Tensor, total + 0.0)
