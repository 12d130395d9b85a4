"""A Pyro model as a batched log density of one unconstrained vector."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TypedDict

import pyro
import torch
from torch import Tensor, fx

from pyro_flows.model.batching import quiet, values_and_grads, where_possible
from pyro_flows.model.bounds import far_from_zero, log_times, on_bound
from pyro_flows.model.digits import COMPARED_ONE_BY_ONE
from pyro_flows.model.faults import Faults, Refused, Undefined, passing_over
from pyro_flows.model.graphs import Recorder, RecorderState
from pyro_flows.model.runs import Runs
from pyro_flows.model.site_values import SiteValues
from pyro_flows.model.sites import Noncentered, Structure
from pyro_flows.support.process.clock import Clock
from pyro_flows.support.process.fallbacks import Tried
from pyro_flows.support.process.journal import evaluated
from pyro_flows.support.process.ledger import booked
from pyro_flows.support.process.threads import turn
from pyro_flows.support.thresholds import SHIFT_MOST

LARGER = 4  # times the numbers of data and coordinates, that a few results may have
WRITTEN_FOR_A_CHECK, DRAWS_AT_LEAST = 2e9, 400  # numbers that a check may write, a second or so; and its draws
SENT_BACK, SENT_BACK_ONE_BY_ONE = 1024, 64  # draws whose values are turned into coordinates again
ON_BOUNDS = "rounding puts"  # begins a reason


def lost_next_to(name: str) -> str:
    """Return the reason: which site loses mass next to a bound."""
    return f"{ON_BOUNDS} {name} onto a bound, and the mass that is lost next to it would change a mean or an sd"


class DensityState(TypedDict):
    """All that evaluations change."""

    evaluations: int
    faults: dict[str, object]
    graphs: list[RecorderState]


class LogDensity(SiteValues):
    r"""The log joint density of a Pyro model over unconstrained coordinates z, batched: (S, D) -> (S,), nats.

    .. math:: \log \tilde p(z) = \log p(\theta(z), \text{data}) + \sum_{\text{sites}} \log |d\theta / dz|

    The model is a black box: whatever Pyro can score, this can, written for batches or not. Runs are batched with
    ``torch.func.vmap``; models that cannot be (``.item()`` of a latent, branches on one) are run draw by draw, and
    :attr:`reason`, which is logged as a warning, says why, what it costs and what to change. Numbers may be taken out
    of data, and tensors that the model makes may be written into. Discrete latents marked for parallel enumeration are
    summed out.
    :meth:`value_and_grad` records the computation as one flat graph, checks it at new points, and falls back to
    ordinary evaluation where recording fails.

    Args:
        model: a Pyro model, function or module. Parameters of its own are held at their present values.
        args: its positional arguments (the data).
        kwargs: its keyword arguments.
        noncentered: sites that get non-centered coordinates, (value - location) / scale, or True for all whose location
            or scale depends on other latents (``structure.hierarchical``); or ``{site: None}``, the same for some, or
            ``{site: {"precision": t, "center": c}}``, non-centered as far as the data leave a value open (see
            :mod:`pyro_flows.model.noncentered`). The model stays as it is.

    Attributes:
        dim: D, the number of unconstrained coordinates.
        names: the latent sites, in the order of their coordinates.
        dtype, device: of z; they follow the model's latents and data (the widest floating dtype).
        evaluations: how many gradients of the density have been taken so far.
        numbers: how many numbers one evaluation handles, as far as is known: latents or observations.

    Raises:
        ValueError: naming the site, for a model without latents, a discrete latent that is not enumerated, a support
            without a bijection, a latent that comes and goes, a subsampled plate, NaN in the data, data outside of the
            likelihood's support; or for a random density.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
    ...     pyro.sample("y", dist.Normal(0.0, scale), obs=y)
    >>> density = pf.LogDensity(model, (torch.tensor(0.5),))
    >>> density.dim, density(torch.zeros(3, 1)).shape
    (1, torch.Size([3]))
    """

    most_gradients = math.inf  # that one run of chains may take
    by_rows = False  # whether an evaluation is a pass over all rows of a plate, whose latents are integrated out
    level_error = 0.0  # standard error of the log density, nats, that all points have in common
    proper = False  # whether all tails along improper priors were told to fall fast enough for a finite integral

    def _settle(self, structure: Structure, like: Runs | None = None) -> None:
        super()._settle(structure, like)
        self.evaluations = 0
        self._take_own()

    def _take_own(self) -> None:
        """Evaluate by recorders of one's own, whose graphs have the data as constants."""
        (unit, large), numbers = self.work.rows(2), max(self.numbers, self.work.largest // (2 * LARGER))
        make = partial(Recorder, numbers=numbers, unit=unit, changed=self.faults)
        self._with_gradients = make(self._gradients)
        self._values = make(self._plain_values, large=large, whole=self._with_gradients)

    def spend(self, gradients: int) -> None:
        """Count gradients that were taken of this density, here or by a graph of its own."""
        self.evaluations += gradients
        booked(gradients)

    def state(self) -> DensityState:
        """Return all that evaluations change, so that a run may go on elsewhere to the last digit."""
        graphs = [recorder.state() for recorder in (self._with_gradients, self._values)]
        return {"evaluations": self.evaluations, "faults": dict(vars(self.faults)), "graphs": graphs}

    def put_back(self, state: DensityState) -> None:
        """Go on from what :meth:`state` returned."""
        for recorder, stored in zip((self._with_gradients, self._values), state["graphs"], strict=True):
            recorder.put_back(stored)
        self.evaluations = state["evaluations"]
        vars(self.faults).update(state["faults"])

    def affordable(self, draws: int) -> int:
        """Return how many of so many draws a check may evaluate: fewer where evaluations write many numbers."""
        return min(draws, max(DRAWS_AT_LEAST, int(WRITTEN_FOR_A_CHECK / max(self.written, 1))))

    def lost_digits(
        self, z: Tensor, *, most: int = COMPARED_ONE_BY_ONE, log_p: Tensor | None = None
    ) -> tuple[list[str], list[str]]:
        """Say what rounding does at draws ``z`` (S, D), to densities and next to bounds; see :class:`Digits`."""
        lost, notes = super().lost_digits(z, most=most, log_p=log_p)
        return [*self.on_bounds(z), *lost], notes

    @torch.no_grad()
    def on_bounds(self, z: Tensor) -> list[str]:
        """Say which site rounding puts onto a bound, if the mass that is lost there changes a mean or an sd; z (S, D).

        Draws at the cut get the weights of :mod:`pyro_flows.model.bounds`.
        """
        far = (z.abs() > far_from_zero(z.dtype)).any(1).nonzero()[:, 0]
        first = far[: SENT_BACK if self.batched else SENT_BACK_ONE_BY_ONE]

        def lost_at(points: Tensor) -> Tensor:
            return on_bound(points, self.unconstrain(self.constrain(points)).to(points))

        with quiet(), Tried() as tried:
            if not (len(first) and bool(lost_at(z[first]).any())):
                return []
            lost = lost_at(z[far])
            far, lost = far[lost.any(1)], lost[lost.any(1)]
            log_weights = z.new_zeros(len(z), dtype=torch.float64)
            log_weights[far] = log_times(z[far], lost, lambda points: self.unrecorded(points)[1]).sum(1)
            worst = int(lost.sum(0).argmax())
            name = next(one.name for one in self.structure.latents if one.offset <= worst < one.offset + one.size)
            values = self.constrain(z)[name].reshape(len(z), -1).double()
        if tried.error is not None:  # in the model's own code
            return []
        usable = torch.isfinite(values).all(1)
        if int(usable.sum()) < 2:  # which have no sd
            return []
        values, weights = values[usable], torch.softmax(log_weights[usable], 0)[:, None]
        mean = (weights * values).sum(0)
        sd = (weights * (values - mean).square()).sum(0).sqrt()
        shifts = torch.stack([(values.mean(0) - mean).abs() / sd, (values.std(0) / sd).log().abs()])
        if not float(shifts.nan_to_num(0.0).max()) > SHIFT_MOST:
            return []
        return [lost_next_to(name)]

    def take(self, values: Recorder, gradients: Recorder, constrained: Recorder, doubles: Recorder) -> None:
        """Evaluate by these recorders from now on: those that densities of one model with many data sets share."""
        self._values, self._with_gradients, self._constrained = values, gradients, constrained
        self._doubles = doubles

    def under(self, clock: Clock) -> None:
        """Look at ``clock`` as evaluations go on."""
        self.clock = clock

    def elsewhere(self, noncentered: Noncentered) -> LogDensity:
        """Return the same log density in other coordinates, under the same clock; the structure is not read anew."""
        other = copy.copy(self)
        other._settle(self._as_read.noncenter(noncentered))
        other.under(self.clock)
        return other

    def in_double(self) -> LogDensity:
        """Return the same log density in double precision throughout; this one, if the model does not run so.

        Its structure is read anew, and it is found out anew how it runs.
        """
        other = copy.copy(self)
        if self._double or not other._become_double():
            self._has_double = self._double
            return self
        other.evaluations += self.evaluations
        other.under(self.clock)
        return other

    def as_written(self) -> LogDensity:
        """Return the same log density with the model as it was given; it is to be read anew, by :meth:`beside`."""
        other = copy.copy(self)
        if self._double:
            other.model, other._double = vars(self.model)["__wrapped__"], False
        return other

    def beside(self, args: Sequence[object], kwargs: Mapping[str, object], *, moves_alike: bool = False) -> LogDensity:
        """Return the log density of the same model with other data of equal shapes, in the same coordinates.

        Its structure is read, and its data are checked. Whether it can be batched is not: who calls this compares
        values, as :class:`~pyro_flows.model.stack.Stack` does. With ``moves_alike``, what moves with latents (supports,
        locations, scales) is not found out anew: data that are inputs of one graph do not change it.

        Raises:
            ValueError: as for a new log density.
        """
        other = copy.copy(self)
        other.args, other.kwargs, other.faults, other.proper = tuple(args), dict(kwargs), Faults(), False
        like = self._as_read if moves_alike else None
        other._settle(other._read(self.model, like).noncenter(self.structure.noncentered), self)
        return other

    def __call__(self, z: Tensor) -> Tensor:
        """Return the log density (S,) at ``z`` (S, D), differentiable in ``z`` and in the model's own parameters.

        It is NaN where the model cannot be run, since a matrix has no factorization there. Without autograd, the
        computation is recorded as :meth:`value_and_grad` records it, unless the model has parameters of its own; see
        :meth:`forget`.
        """
        z = self._check(z)
        if not len(z):
            return z.sum(1)
        self.spend(len(z) if z.requires_grad else 0)
        recorded = self.batched and not torch.is_grad_enabled() and not self._parameters
        if recorded:
            with turn(), passing_over():
                (values,) = self._by_graph(self._values, z)
                self._note(z, values)
                return values.to(z.dtype)
        with suppress(Undefined):
            return self.map(self.single, z).to(z.dtype)
        return z.new_full((len(z),), torch.nan)

    def _note(self, z: Tensor, values: Tensor) -> None:
        """Find out, where a graph gives NaN, whether the model itself raises an error there."""
        undefined = torch.isnan(values)
        error = None
        if self.faults.looks and bool(undefined.any()):
            self.faults.looks -= 1
            bare = copy.copy(self)
            bare._factorizes = False  # or a matrix without a factor has one of NaN
            try:
                with torch.no_grad(), quiet():
                    bare.single(z[undefined][0])
            except Undefined as found:
                error = found
        self.faults.add(len(z), int(undefined.sum()), error)

    def _plain_values(self, z: Tensor) -> tuple[Tensor]:
        return (self.strictly(self.single, z),)

    def forget(self) -> None:
        """Drop the recorded graphs: call it after the model's own parameters, its data, or modules and globals that it
        reads have changed in place.

        A training run that has begun keeps the graph that it began with.
        """
        for recorder in (self._values, self._with_gradients, self._constrained, *self._densities.values()):
            if recorder is not None:
                recorder.forget()

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density (S,) and its gradient (S, D), both without a graph; cost: S gradient evaluations."""
        z = self._check(z)
        z = z.detach()
        if not len(z):
            return z.sum(1), z
        self.spend(len(z))
        if self.batched:
            with turn(), passing_over():
                value, grad = self._by_graph(self._with_gradients, z)
                return value.to(z.dtype), grad
        value, grad = evaluated([z], lambda: self.unrecorded(z), self.faults)
        return value, grad

    def graph(self, z: Tensor) -> fx.GraphModule | None:
        """Return the recorded graph of :meth:`value_and_grad` for batches like ``z``, to be made part of a larger one.

        None if the model cannot be recorded, or if such batches go through it in several pieces.

        Raises:
            torch.linalg.LinAlgError: if it is to be recorded now, and a factorization fails at ``z``.
        """
        if self._with_gradients.given:  # the graph of many data sets has their data as inputs
            self._take_own()
        return self._with_gradients.graph(z) if self.batched else None

    def unrecorded(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return what :meth:`value_and_grad` returns, by the model itself, for graphs to be compared with."""
        z = self._check(z)
        alone, halves = self._gradients_one_by_one, self.batched
        value, grad = where_possible(
            self._gradients, z.detach(), (), (self.dim,), alone=alone, halves=halves, note=self.faults.add
        )
        return value.to(z.dtype), grad

    @property
    def reason(self) -> str | None:
        """Why the model is run draw by draw, or is not recorded; None if it is batched and recorded."""
        return self._unbatched or self._with_gradients.reason or self._values.reason

    def _gradients(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Both for the rows of ``z``, in pieces like those of :meth:`map`."""
        with torch.no_grad(), quiet(), self.clock.watching():
            parts = [values_and_grads(self.single, part) for part in self._pieces(z)]
        value, grad = (torch.cat(part) for part in zip(*parts, strict=True))
        return value, grad

    def _gradients_one_by_one(self, z: Tensor) -> tuple[Tensor, Tensor]:
        values, grads = [], []
        with torch.enable_grad(), quiet():
            for row in self._pieces(z, one_by_one=True):
                leaf = row.clone().requires_grad_()
                value = self.single(leaf)
                try:
                    grads.append(torch.autograd.grad(value, leaf)[0])
                except NotImplementedError as error:
                    expected = "expected a log density with a derivative by each latent that it reads"
                    remedy = "write this function by operations that torch differentiates"
                    raise Refused(f"model: {expected}, got torch's '{error}'; {remedy}") from error
                values.append(value.detach())
        return torch.stack(values).to(z.dtype), torch.stack(grads)

    def complaint(self, z: Tensor, finite: Tensor | None = None) -> str | None:
        """Return what Pyro's own argument checks say at the first row of ``z`` where they object, or None.

        An invalid parameter can have a finite density (a Beta with a negative concentration has one), and for speed
        everything else here runs without these checks. Rows whose density is not ``finite`` are left out; which ones
        these are is computed where it is not known.
        """
        z = self._check(z)
        with torch.no_grad():
            rows = z[torch.isfinite(self(z)) if finite is None else finite]
        with turn(), torch.no_grad():
            for row in self._pieces(rows, one_by_one=True):
                said = self._objection(row)
                if said is not None and self._runs(row) and self._objection(row) is not None:
                    return said
        return None

    def _objection(self, row: Tensor) -> str | None:
        """Return what Pyro's checks, or the model itself, object to at one point (D,); None if they do not."""
        try:
            with pyro.validation_enabled(True), self.precisely():
                self._run(row, enumerate_sites=True)[0].compute_log_prob()
        except (ValueError, Undefined) as error:
            cause = error.__cause__ if isinstance(error, Undefined) else error
            place = f"{str(error).partition(': ')[0]}: " if isinstance(error, Undefined) else ""
            text = re.split(r"Trace Shapes|:?\s*tensor\(", str(cause))[0]  # the values themselves are left out
            return place + " ".join(text.split()) if isinstance(cause, ValueError) else None
        return None

    def _runs(self, row: Tensor) -> bool:
        """Whether the model raises no error of its own at one point (D,)."""
        with quiet(), suppress(Undefined):
            self._run(row, enumerate_sites=True)
            return True
        return False


class PartialLogDensity(LogDensity):
    """The log density by those rows of a plate that the arguments give (``subsample=``), scaled up to all rows.

    A step of SVI takes it. No posterior is made of it, since it is as certain as if all rows had been seen.
    """

    takes_a_part = True
