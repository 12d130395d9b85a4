"""A Pyro model as a batched log density of one unconstrained vector."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import pairwise
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, fx

from pyro_flows import _checks
from pyro_flows._clock import Clock, unbounded
from pyro_flows._fallbacks import fallback, first_line
from pyro_flows._seeding import BatchedDraws, derive, seeded
from pyro_flows._turns import turn
from pyro_flows.graphs.batches import Recorder, rows_for
from pyro_flows.graphs.writes import Batchable, FindWrites, Places
from pyro_flows.model.batching import advice, apart, batch, join, nearer, quiet, where_possible
from pyro_flows.model.enumeration import Enumerate, Evaluator
from pyro_flows.model.observations import check_values, not_finite
from pyro_flows.model.sites import (
    Latent,
    Noncentred,
    Place,
    Resample,
    Structure,
    flatten_all,
    hold,
    messages,
    place_all,
    read_structure,
)

MAPPED = 2**20  # numbers of observations that are handled at once, where nothing is recorded
PORTION = 16  # pieces of a recorded graph between two looks at the clock

logger = logging.getLogger("pyro_flows")


class LogDensity:
    r"""The log joint density of a Pyro model over unconstrained coordinates z, batched: (S, D) -> (S,).

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
        noncentred: sites that get non-centred coordinates, (value - location) / scale, or True for all whose location
            or scale depends on other latents (``structure.hierarchical``); or ``{site: None}``, the same for some, or
            ``{site: {"precision": t, "centre": c}}``, non-centred as far as the data leave a value open (see
            :mod:`pyro_flows.model.centring`). The model stays as it is.

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

    def __init__(
        self,
        model: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        noncentred: Noncentred = (),
    ) -> None:
        if not callable(model):
            raise ValueError(f"model: expected a callable Pyro model, got a {type(model).__name__}.")
        self.args, self.kwargs = tuple(args), dict(kwargs or {})
        with seeded(0):
            self.structure: Structure = read_structure(model, self.args, self.kwargs).noncentre(noncentred)
        self.model, self._parameters = hold(model, self.structure.trace)
        if self.structure.subsampled:
            plate = self.structure.subsampled[0]
            raise ValueError(
                f"plate {plate!r}: subsampled, so the log density is random. Give it its full size, or train a guide "
                "such as AutoRealNVP with Pyro's own SVI."
            )
        self.dim, self.dtype, self.device = self.structure.dim, self.structure.dtype, self.structure.device
        self.names = tuple(latent.name for latent in self.structure.latents)
        self.evaluations = 0
        self.clock = unbounded()  # looked at as evaluations go on
        self.batched = True
        self._unbatched: str | None = None
        self._writes: Places | None = None  # in tensors that the model makes
        self._evaluator: Evaluator | None = None
        self.numbers = max(self.dim, sum(value.numel() for value in self.structure.observed.values()))
        self._rows = rows_for(self.numbers, MAPPED)
        self._values = Recorder(self._plain_values, self.numbers)
        self._with_gradients = Recorder(self._gradients, self.numbers)
        self._guards: frozenset[str] = frozenset()
        self._guards = check_values(self.structure, self.trace_at, lambda: self.model(*self.args, **self.kwargs))
        self._probe()

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
        with apart(), place, self._writing(z):
            trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        self._check_sites(trace, place)
        return trace, sum((ladj.sum() for _, ladj in place.placed.values()), z.new_zeros(()))

    def trace_at(self, z: Tensor) -> poutine.Trace:
        """Return the trace of the model at one point ``z`` (D,), with enumerated latents along axes of their own."""
        return self._run(z, enumerate_sites=True)[0]

    def _writing(self, z: Tensor) -> AbstractContextManager[Any]:
        """Give tensors that the model writes into the batch axis of ``z``, if it has one."""
        return nullcontext() if self._writes is None else Batchable(self._writes, z)

    def _check_sites(self, trace: poutine.Trace, place: Place) -> None:
        """Refuse models whose latents come and go: a new one would be drawn at random, a lost one have no density."""
        known = {*place.placed, *self.structure.observed, *self.structure.enumerated}
        new = [
            name
            for name, site in messages(trace).items()
            if site["type"] == "sample" and not site["is_observed"] and name not in known
            if not site_is_subsample(site)
        ]
        for name in (*new, *(name for name in self.names if name not in place.placed)):
            raise ValueError(
                f"site {name!r}: a latent that is there for some values of the others only. A flow needs one and the "
                "same set of latents everywhere; write the choice as a mixture."
            )

    def single(self, z: Tensor, latents: Sequence[Latent] | None = None) -> Tensor:
        """Return the log density of one point (D,), or that in the coordinates of other ``latents``."""
        trace, ladj = self._run(z, enumerate_sites=True, latents=latents)
        with self._writing(z):  # distributions write in place, too
            if not self.structure.enumerated:
                return trace.log_prob_sum() + ladj
            if self._evaluator is None:
                self._evaluator = Evaluator(trace, True, self.structure.plate_nesting)
            return self._evaluator.log_prob(trace) + ladj

    def _probe(self) -> None:
        """Find out whether the model can be batched, by comparing with single runs at two points."""
        spread = torch.linspace(-0.5, 0.5, 2 * self.dim, dtype=self.dtype, device=self.device).reshape(2, self.dim)

        def run(size: float) -> tuple[Tensor, Tensor, Tensor]:
            points = size * spread
            single, again = (torch.stack([self.single(point) for point in points]) for _ in range(2))
            return points, single, again

        with torch.no_grad(), quiet():
            points, single, again = nearer(run)
            if not torch.allclose(single, again, rtol=1e-3, atol=1e-3, equal_nan=True):
                worst = int((single - again).abs().nan_to_num(nan=torch.inf).argmax())
                raise ValueError(
                    f"model: its log density is random, {single[worst]:.6g} and {again[worst]:.6g} at one point. Take "
                    "random numbers out of the model, or train a guide such as AutoRealNVP with Pyro's own SVI."
                )
            self._unbatched = self._why_unbatched(points, single)
            if self._unbatched is not None:
                with FindWrites() as found:
                    self.single(points[0])
                for places in found.places.ways():
                    self._writes = places
                    if self._why_unbatched(points, single) is None:
                        self._unbatched = None
                        break
        if self._unbatched is not None:
            self.batched, self._writes = False, None
            self._unbatched = f"{self._unbatched}. {advice(self._unbatched)}"
            fallback(self._unbatched)
            logger.warning("%s", self._unbatched)

    def _why_unbatched(self, points: Tensor, single: Tensor) -> str | None:
        """Return why values and gradients cannot be had for many points at once; None if they can."""
        try:
            _, batched = batch(torch.func.grad_and_value(self.single))(points)
        except torch.linalg.LinAlgError:
            raise
        except Exception as error:  # a model's own code may raise anything
            return f"not batched: {first_line(error)}"
        if not torch.allclose(single, batched, rtol=1e-3, atol=1e-3, equal_nan=True):
            return "not batched: vmap gave other values than single runs"
        return None

    def under(self, clock: Clock) -> None:
        """Look at ``clock`` as evaluations go on, and compile nothing if it leaves no time for that."""
        self.clock = clock
        self._values.compile = self._with_gradients.compile = None if clock.compiles else False

    def elsewhere(self, noncentred: Noncentred) -> LogDensity:
        """Return the same log density in other coordinates, under the same clock."""
        other = LogDensity(self.model, self.args, self.kwargs, noncentred=noncentred)
        other.under(self.clock)
        return other

    # batches ------------------------------------------------------------------------------------------------------

    def map(self, function: Callable[[Tensor], Any], z: Tensor, *, randomness: str = "same") -> Any:
        """Apply a function of one point to all rows of ``z``, in chunks; results (dicts of tensors) are stacked."""
        with quiet(), self.clock.watching():
            if self.batched:
                try:
                    batched = torch.func.vmap(function, randomness=randomness)
                    with BatchedDraws() if randomness == "different" else nullcontext():
                        return join((batched(part) for part in self._pieces(z)), len(z))
                except (torch.linalg.LinAlgError, NotImplementedError):
                    raise  # of these points, and of a distribution without a sampler: no better one by one
                except RuntimeError as error:
                    if randomness == "same":
                        raise
                    fallback("drawn one by one", error)
            return join((_one_row(function(row)) for row in self._pieces(z, one_by_one=True)), len(z))

    def _pieces(self, z: Tensor, *, one_by_one: bool = False) -> Iterator[Tensor]:
        """Yield the rows of ``z`` in pieces, or one by one, with a look at the clock before each."""
        for part in z if one_by_one else z.split(self._rows):
            self.clock.look()
            yield part

    def __call__(self, z: Tensor) -> Tensor:
        """Return the log density (S,) at ``z`` (S, D), differentiable in ``z`` and in the model's own parameters.

        It is NaN where the model cannot be run, since a matrix has no factorization there. Without autograd, the
        computation is recorded as :meth:`value_and_grad` records it, unless the model has parameters of its own; see
        :meth:`forget`.
        """
        z = self._check(z)
        self.evaluations += len(z) if z.requires_grad else 0
        recorded = self.batched and not torch.is_grad_enabled() and not self._parameters
        if recorded:
            with turn(), suppress(torch.linalg.LinAlgError):
                values = [self._values(part)[0] for part in self._portions(z, self._values)]
                return (values[0] if len(values) == 1 else torch.cat(values)).to(z.dtype)
        return where_possible(self._plain_values, z, ())[0].to(z.dtype)

    def _plain_values(self, z: Tensor) -> tuple[Tensor]:
        return (self.map(self.single, z),)

    def forget(self) -> None:
        """Drop the recorded graphs: call it after the model's own parameters, or its data, have changed in place.

        A training run that has begun keeps the graph that it began with.
        """
        self._values.forget()
        self._with_gradients.forget()

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density (S,) and its gradient (S, D), both without a graph; cost: S gradient evaluations."""
        z = self._check(z)
        z = z.detach()
        self.evaluations += len(z)
        if self.batched:
            with turn(), suppress(torch.linalg.LinAlgError):
                found = [self._with_gradients(part) for part in self._portions(z, self._with_gradients)]
                value, grad = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
                return value.to(z.dtype), grad
        return self.unrecorded(z)

    def _portions(self, z: Tensor, recorder: Recorder) -> Iterator[Tensor]:
        """Yield ``z`` in whole numbers of the recorder's pieces, with a look at the clock before each."""
        rows = PORTION * recorder.rows
        cuts = [*range(0, max(len(z) - rows, 0), rows), len(z)]  # the last one is the longest: no new size of a piece
        for first, last in pairwise(cuts) if len(cuts) > 1 else [(0, len(z))]:
            self.clock.look()
            yield z[first:last]

    def graph(self, z: Tensor) -> fx.GraphModule | None:
        """Return the recorded graph of :meth:`value_and_grad` for batches like ``z``, to be made part of a larger one.

        None if the model cannot be recorded, or if such batches go through it in several pieces.

        Raises:
            torch.linalg.LinAlgError: if it is to be recorded now, and a factorization fails at ``z``.
        """
        return self._with_gradients.graph(z) if self.batched else None

    def unrecorded(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return what :meth:`value_and_grad` returns, by the model itself, for graphs to be compared with."""
        z = self._check(z)
        run = self._gradients if self.batched else self._gradients_one_by_one
        value, grad = where_possible(run, z.detach(), (), (self.dim,))
        return value.to(z.dtype), grad

    @property
    def reason(self) -> str | None:
        """Why the model is run draw by draw, or is not recorded; None if it is batched and recorded."""
        return self._unbatched or self._with_gradients.reason or self._values.reason

    def _gradients(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Both for the rows of ``z``, in pieces like those of :meth:`map`."""
        with torch.no_grad(), quiet(), self.clock.watching():
            run = batch(torch.func.grad_and_value(self.single))
            parts = [run(part) for part in self._pieces(z)]
        grad, value = (torch.cat(part) for part in zip(*parts, strict=True))
        return value, grad

    def _gradients_one_by_one(self, z: Tensor) -> tuple[Tensor, Tensor]:
        values, grads = [], []
        with torch.enable_grad(), quiet():
            for row in self._pieces(z, one_by_one=True):
                leaf = row.clone().requires_grad_()
                value = self.single(leaf)
                grads.append(torch.autograd.grad(value, leaf)[0])
                values.append(value.detach())
        return torch.stack(values).to(z.dtype), torch.stack(grads)

    # values -------------------------------------------------------------------------------------------------------

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Return latent and deterministic sites as the model sees them: ``{name: (S, *shape)}``."""
        z = self._check(z)
        deterministic = () if self.structure.enumerated else tuple(self.structure.deterministic)

        def values(row: Tensor) -> dict[str, Tensor]:
            trace, _ = self._run(row, enumerate_sites=True)
            return {name: messages(trace)[name]["value"] for name in (*self.names, *deterministic)}

        with torch.no_grad():
            return self.map(values, z)

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return ``z`` (S, D) for constrained latents ``{name: (S, *shape)}``: the inverse of :meth:`constrain`."""
        missing = [name for name in self.names if name not in values]
        if missing:
            raise ValueError(f"values: expected one for each latent site, {', '.join(map(repr, missing))} missing.")
        kept = {name: torch.as_tensor(values[name], device=self.device) for name in self.names}
        for latent in self.structure.latents:
            if kept[latent.name].shape[1:] != latent.shape:
                got = tuple(kept[latent.name].shape)
                raise ValueError(f"values[{latent.name!r}]: expected shape (S, *{tuple(latent.shape)}), got {got}.")

        def flat(row: dict[str, Tensor]) -> Tensor:
            with self._writing(row[self.names[0]]):
                return flatten_all(self.structure, row, lambda: self.model(*self.args, **self.kwargs))

        with torch.no_grad(), quiet():
            if self.batched:
                with seeded(0, self.device):  # enumerated sites are drawn, if supports depend on latents
                    return torch.func.vmap(flat, randomness="different")(kept).to(self.dtype)
            rows = [{name: value[i] for name, value in kept.items()} for i in range(len(kept[self.names[0]]))]
            return torch.stack([flat(row) for row in rows]).to(self.dtype)

    def log_jacobian(self, z: Tensor) -> Tensor:
        """Return the log determinant (S,) of the map from ``z`` to the model's own values; the density contains it."""
        self._check(z)

        def ladj(row: Tensor) -> Tensor:
            placed = place_all(self.structure, row, lambda: self.model(*self.args, **self.kwargs))
            return sum((found.sum() for _, found in placed.values()), row.new_zeros(()))

        with torch.no_grad():
            found: Tensor = self.map(ladj, z)
        return found

    def log_prior(self, z: Tensor) -> dict[str, Tensor]:
        """Return the log prior density of each latent site, constrained: ``{name: (S, *batch)}``."""
        return self._site_densities(z, self.names)

    def log_likelihood(self, z: Tensor) -> dict[str, Tensor]:
        """Return the pointwise log likelihood of each observed site: ``{name: (S, *batch)}``; masked entries are 0."""
        return self._site_densities(z, () if self.structure.enumerated else tuple(self.structure.observed))

    def _site_densities(self, z: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        z = self._check(z)

        def densities(row: Tensor) -> dict[str, Tensor]:
            trace, _ = self._run(row, enumerate_sites=True)
            found = {}
            for name in names:
                site = messages(trace)[name]
                with self._writing(row):
                    density = site["fn"].log_prob(site["value"])
                mask = site["mask"]
                found[name] = density if mask is None else torch.where(torch.as_tensor(mask), density, 0.0)
            return found

        with torch.no_grad():
            return self.map(densities, z)

    def predictive(self, z: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
        """Draw the observed sites anew at each row of ``z``: ``{name: (S, *shape)}``; one seed, one answer."""
        z = self._check(z)

        def draw(row: Tensor) -> dict[str, Tensor]:
            trace, _ = self._run(row, enumerate_sites=False, resample=True)
            return {name: messages(trace)[name]["value"] for name in self.structure.observed}

        with torch.no_grad(), seeded(derive(seed, "posterior predictive"), self.device):
            return self.map(draw, z, randomness="different")

    def prior(self, draws: int, *, seed: int = 0) -> dict[str, Tensor] | None:
        """Draw all sites from the prior, observed ones too: ``{name: (draws, *shape)}``; None if there are none.

        There are none with improper priors, and where a factorization fails on the way.
        """
        _checks.integer("draws", draws, 1)
        names = (*self.names, *self.structure.deterministic, *self.structure.observed)

        def draw(row: Tensor) -> dict[str, Tensor]:
            with apart(), self._writing(row):
                trace = poutine.trace(Resample()(self.model)).get_trace(*self.args, **self.kwargs)
            return {name: messages(trace)[name]["value"] for name in names}

        with torch.no_grad(), seeded(derive(seed, "prior"), self.device):
            try:
                return self.map(draw, torch.zeros(draws, 1, device=self.device), randomness="different")
            except (NotImplementedError, torch.linalg.LinAlgError):
                return None

    def explain(self, z: Tensor) -> str:
        """Name the sites whose log density is not finite at one point ``z`` (D,)."""
        bad = []
        with torch.no_grad(), quiet():
            trace, ladj = self._run(z, enumerate_sites=True)
            for site in messages(trace).values():
                if site["type"] == "sample" and site["mask"] is not False:
                    density = torch.as_tensor(site["fn"].log_prob(site["value"]))
                    if not torch.isfinite(density).all():
                        bad.append(not_finite(site, density))
        return "; ".join(bad) or f"log Jacobian {float(ladj)}"

    def complaint(self, z: Tensor) -> str | None:
        """Return what Pyro's own argument checks say at the first row of ``z`` where they object, or None.

        An invalid parameter can have a finite density (a Beta with a negative concentration has one), and for speed
        everything else here runs without these checks. Rows whose density is not finite are left out.
        """
        z = self._check(z)
        with torch.no_grad():
            rows = z[torch.isfinite(self(z))]
        with turn(), torch.no_grad(), pyro.validation_enabled(True):
            for row in self._pieces(rows, one_by_one=True):
                try:
                    self._run(row, enumerate_sites=True)[0].compute_log_prob()
                except ValueError as error:
                    return " ".join(str(error).partition("Trace Shapes")[0].split())
        return None

    def parameters(self) -> dict[str, Tensor]:
        """Return the unconstrained leaves of the model's own parameters (``pyro.param``, modules), by name."""
        return dict(self._parameters)

    def _check(self, z: Tensor) -> Tensor:
        """Return ``z`` (S, D), whole numbers as floating-point ones: results have its dtype."""
        if z.dim() != 2 or z.shape[1] != self.dim:
            raise ValueError(f"z: expected shape (S, {self.dim}), got {tuple(z.shape)}.")
        return _checks.floating("z", z, self.dtype)


def _one_row(value: Any) -> Any:
    return {name: part[None] for name, part in value.items()} if isinstance(value, dict) else value[None]
