"""A guide with a model's structure: a flow over global latents, and conditional distributions of those in plates."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Self, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide.effect import AutoMessenger
from pyro.nn.module import pyro_method
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch._C import _functorch

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.recipe import FlowLike, begin_at
from pyro_flows.guides import conditional
from pyro_flows.guides.autoflow import QUANTILE_DRAWS, AutoFlow, Drawn, Known, finite_gradients, levels_of, quantiles_of
from pyro_flows.guides.collapsed import FEW_PARTS, MOST_PARTS, few_parts, start_of_globals
from pyro_flows.guides.conditional import Chosen, Conditional, Rows
from pyro_flows.guides.crossed import Crossed, CrossedMarginal, Expansion
from pyro_flows.guides.marginal import Marginal, check_data, parts_of
from pyro_flows.guides.setup import AUTO, best_start
from pyro_flows.model.batching import apart
from pyro_flows.model.bijections import bijection
from pyro_flows.model.sites import (
    Frame,
    Keywords,
    Latent,
    Model,
    Positional,
    Site,
    by_event,
    is_open,
    is_subsample,
    messages,
    vectorized,
)
from pyro_flows.model.start import first_run, initial_value, transform_of
from pyro_flows.support import checks
from pyro_flows.support.process.fallbacks import fallback, first_line
from pyro_flows.support.process.seeding import seeded
from pyro_flows.transforms import Bijection, Compose, DiagonalAffine, SinhArcsinh

LAYERS = 4  # couplings of the default flow
MOST_NUMBERS = 64  # of a row: each takes a pass backward
JOINT_UP_TO = 200  # coordinates of sites that are put into the flow, since their rows are not independent
MORE_ROWS = 4  # times the rows by which the flow started, from which on it starts anew
DRAWN_AT_ONCE = 4_000_000  # numbers of latents
SAME = 1e-3  # relative error of a site's log density, among other draws or alone
REACH = 0.3  # of difference quotients, in sds


@checks.constructor
class AutoHierarchicalFlow(AutoMessenger):  # type: ignore[metaclass]
    r"""Guide :math:`q(\theta, y) = q_\text{flow}(\theta) \prod_i q(y_i \mid \theta, x_i)`, for plates and minibatches.

    A flow is the distribution of the latents outside of plates, :math:`\theta`, as in :class:`AutoFlow`. A latent y in
    plates has a conditional distribution given :math:`\theta`, the latents of the plates around it, and its data. With
    gradient g and negative Hessian H of the model's own log density at a mode :math:`y_0` of the latents in plates,

    .. math:: y = y_0 + H^{-1} g + H^{-1/2} t(\epsilon), \qquad \epsilon \sim \mathcal N(0, I).

    t is a trained map of each number of a row, the same for all rows: an affine one and :class:`SinhArcsinh`. H is
    sparse, since rows are independent given what is outside of their plate, and is factored in time linear in the rows,
    from the innermost plates outwards. Where the latents in plates are normal with normal data, given
    :math:`\theta`, this is their exact conditional distribution. Elsewhere it is Laplace's approximation with trained
    tails.

    Latents whose data are in other plates, such as effects of students and lecturers on ratings, are drawn together, if
    they are too many for the flow: :math:`H` then couples all latents in plates, is added up over all rows of the data,
    and is factored with the largest site first (Papaspiliopoulos, Roberts and Zanella 2020,
    doi:10.1093/biomet/asz058). In a step of SVI with a minibatch, what the rows say of them is an expansion at the mode
    of the flow's latents. For this the first run needs all rows, and draws of these latents are given its data.

    Nothing is stored for a row but its last mode, from which the next Newton step begins. So the guide needs no
    parameters for rows and no encoder: it trains on minibatches (``subsample_size=`` or ``subsample=`` of
    ``pyro.plate``), and new rows take one pass.

    It is a ``GuideMessenger``: the model runs twice a step, and its own plates are the guide's. Use it in ``SVI`` with
    ``Trace_ELBO``, vectorized particles too; ``TraceEnum_ELBO`` and, with latents in plates, ``JitTrace_ELBO`` are
    refused. Minibatches add noise to gradients, so let the learning rate fall.

    Cost of a step: two runs of the model, and one pass backward for each number of a row. With crossed plates, a dense
    factor of the numbers of all sites but the largest one, at most 3000, in the place of the passes backward.

    Args:
        model: a Pyro model. Its plates may be nested. Latents are continuous. If all are in plates, the flow takes
            those that priors of other latents read, or that are read outside of their plates.
        flow: of the latents outside of plates, see :class:`AutoFlow`.
        joint: sites in plates whose latents the flow takes too. Sites whose rows depend on each other given all else,
            such as increments of a random walk or weights of a regression, are found, and are taken too, up to 200
            coordinates. So are sites on which priors of these depend, such as a scale of each weight.
        init: ``"auto"``: the flow starts at a mode of its latents, those in plates integrated out by importance
            sampling, and at the curvature there. Up to 256 minibatches are read. Without latents in plates, or without
            a mode, it starts as :class:`AutoFlow` does. ``"prior"``: at the prior's median.
        create_plates: taken, so that the guide can stand in the place of others; the model's plates are used.
        options: of :class:`AutoFlow`, such as ``layers=`` (4), ``affine=``, ``base=``. ``noncentered="auto"`` is none
            where latents in plates are left to conditional distributions, and with ``init="prior"``.

    Attributes:
        local: names of the sites in plates that have conditional distributions.
        sizes: numbers of each latent site of a run, unconstrained.
        subsampled: whether a run has a part of the rows of a plate.
        has_data: whether the first run had data.
        reason: what the guide cannot follow: pairs of sites in crossed plates that cannot be coupled, which it takes as
            independent given the flow's latents; or that it sees no data. None if there is nothing.

    Raises:
        ValueError: for a model that is not callable; and when the model is first run, for discrete latents, a model
            whose rows are independent of each other, more than 64 numbers in a row, latents of a subsampled plate that
            depend on each other, crossed plates of which a row of the data reads several rows, an index that was
            forgotten, a log density that is NaN.

    References: Tierney and Kadane 1986 (doi:10.1080/01621459.1986.10478240); Rue, Martino and Chopin 2009
    (doi:10.1111/j.1467-9868.2008.00700.x); Agrawal and Domke 2021 (arXiv 2111.03144), for the factorization.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    ...     tau = pyro.sample("tau", dist.HalfNormal(2.0))
    ...     with pyro.plate("row", len(y), subsample_size=10) as rows:
    ...         z = pyro.sample("z", dist.Normal(mu, tau))
    ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])
    >>> y = torch.linspace(-2.0, 2.0, 50)
    >>> guide = pf.AutoHierarchicalFlow(model, layers=2)
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.005}), pyro.infer.Trace_ELBO())
    >>> svi.step(y) > 0
    True
    >>> guide.local, guide.sample_posterior(100, y)["z"].shape
    (['z'], torch.Size([100, 10]))
    """

    _option = "joint"  # that names the sites of the flow

    def __init__(
        self,
        model: Callable[..., object],
        flow: FlowLike = "realnvp",
        *,
        joint: Sequence[str] = (),
        init: str = AUTO,
        create_plates: Callable[..., object] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model)
        if flow == "realnvp":
            options.setdefault("layers", LAYERS)
        AutoFlow(model, flow, init=init, **options)  # what is wrong is named here, not at the first step
        self._noncentered = options.get("noncentered", AUTO)
        options["noncentered"] = () if self._noncentered == AUTO else self._noncentered  # chosen when the flow starts
        self._joint = tuple(joint)
        self._own: list[str] = []  # sites whose posteriors a subclass makes
        self._init = init
        self._of_globals = flow, options
        self.local: list[str] = []
        self._children: list[str] = []  # sites of the flow whose priors depend on latents in plates
        self.reason: str | None = None
        self.top: AutoFlow | None = None
        self._modes: dict[str, tuple[Tensor, Tensor]] = {}  # of all rows of sites in plates, and which rows have one
        self._plate_sizes: dict[str, int] = {}  # all rows of each plate
        self._axes: dict[str, tuple[int, int]] = {}  # of each latent site: batch axes, and axes of an event
        self._events: dict[str, int] = {}  # axes of an unconstrained event of sites in plates
        self.sizes: dict[str, int] = {}
        self.subsampled = False
        self.has_data = True  # in the first run
        self._z: Tensor | None = None  # the globals of this run
        self._run: _Run | None = None
        self._crossed: Crossed | None = None  # the system of all latents in plates, where rows are not independent
        self._expansion: Expansion | None = None
        self._about: tuple[Tensor, Tensor] | None = None  # globals at which the expansion is, and their sds
        self._began: tuple[int, list[int]] | None = None  # given rows by which the flow started, and its state

    @property
    def has_own(self) -> bool:
        """Whether some sites have other posteriors than this class gives them."""
        return bool(self._own)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "trace"}  # which a copy does not have

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Copy the guide: alone, with the same model; as a part of something else, with the copy of the model there."""
        if not memo:
            memo[id(self.model)] = self.model
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return new

    # the structure ---------------------------------------------------------------------------------------------------

    def initialize(self, *args: object, **kwargs: object) -> Self:
        """Run the model on its arguments and make the parameters, so that an optimizer can be built."""
        if self.top is None:
            with poutine.block(), torch.enable_grad():
                self._read(args, kwargs)
        return self

    def _read(self, args: Positional, kwargs: Keywords) -> None:
        """Read the structure from a run; find which sites are in plates, and where the globals start."""
        plates = _Plates()
        try:
            trace = first_run(plates(self.model), args, kwargs, initial_value)
        except (RuntimeError, ValueError, IndexError) as error:
            plates.explain(error)
            raise
        sites = [site for site in messages(trace).values() if site["type"] == "sample" and not is_subsample(site)]
        for site in sites:
            conditional.check_plates(site)
        latents = [site for site in sites if not site["is_observed"]]
        frames = {site["name"]: vectorized(site) for site in sites}
        every = [frame for own in frames.values() for frame in own]
        _check_latents(latents)
        _check_rows(every, trace)
        for option, names in ((self._option, self._joint), ("normal", self._own)):
            for name in names:
                checks.choice(option, name, [site["name"] for site in latents])
        self._plate_sizes = {frame.name: frame.full_size or frame.size for frame in every}
        axes = [max(len(site["fn"].batch_shape), site["value"].dim() - site["fn"].event_dim) for site in sites]
        self._nesting = max(axes)  # of which some may be in no plate
        self._axes = {site["name"]: (len(site["fn"].batch_shape), site["fn"].event_dim) for site in latents}
        self.sizes = {site["name"]: transform_of(site).inv(site["value"]).numel() for site in latents}
        self.subsampled = any(map(conditional.is_part, every))
        joint = set(self._joint) or self._shared(latents, args, kwargs)
        for site in latents:
            size = self.sizes[site["name"]] // max(math.prod(site["fn"].batch_shape), 1)
            if frames[site["name"]] and site["name"] not in (*joint, *self._own) and size > MOST_NUMBERS:
                self._give_up(
                    site["name"],
                    f"site {site['name']!r}: expected at most {MOST_NUMBERS} numbers in a row, got {size}. Each takes "
                    "a pass backward at each step. Put the site into the flow (joint=), or use AutoFlow.",
                )
        for _ in range(len(latents) + 1):  # each round puts one more site into the flow
            there = [site["name"] for site in latents if site["name"] not in (*joint, *self._own)]
            self.local = [name for name in there if frames[name]]
            top = self._globals(args, kwargs)
            z = top._init_loc().to(top._like)
            self._children = self._rows(args, kwargs).find_children(z)
            rows = self._rows(args, kwargs)
            first = rows.conditional(z, conditional.off_center, {}, graph=True)
            moved = self._to_join(rows, first)
            if moved is None:
                break
            if moved not in self._own:
                joint.add(moved)
        self.has_data = len(latents) < len(sites)
        if self.local and not self.has_data:
            self.reason = fallback(
                f"the model has no data, so latents in plates, such as {self.local[0]!r}, have their priors. If it has "
                "some, a handler hides them: name these sites in expose=, too"
            )
        self._events = {site.name: site.event_dim for site in first.sites}
        check_data(self._rows(args, kwargs), z, self._start, parts_of(first, 0, MOST_PARTS))
        self._begin(top, z, args, kwargs)
        shapes = [Compose([SinhArcsinh(1), DiagonalAffine(1)]) for _ in ([] if self._crossed else first.numbers)]
        top._flow.add_module("local", nn.ModuleList(shapes).to(top._like))
        self.top = top

    def _shared(self, latents: Sequence[Site], args: Positional, kwargs: Keywords) -> set[str]:
        """Return the sites that the flow takes if none is outside of plates: those that rows share."""
        sites = {site["name"]: site for site in latents if site["name"] not in self._own}
        if not sites or not all(map(vectorized, sites.values())):
            return set()
        nothing = latents[0]["value"].new_zeros(0)
        with seeded(0, nothing.device):  # rows of a subsample are drawn
            first = Rows(self.model, (), [*sites], args, kwargs).conditional(nothing, conditional.off_center, {})
        found = [*conditional.shared(first), *conditional.read_elsewhere(first)]
        return {site.name for site in found if self._fits(site)}

    def _to_join(self, rows: Rows, first: Conditional) -> str | None:
        """Return a site that the flow has to take: its rows, or what is read of them, do not stand for themselves.

        Last come the parents of latents that the flow has. Given a child, such as a coefficient near zero, a scale has
        a long flat tail, which no normal approximation has; without it, what ties the two would be lost.
        """
        own, pairs, why = conditional.coupled(first), conditional.crossed(first), ""
        joined = [*own, *conditional.read_elsewhere(first)]
        walks = bool(own) and all(self._fits(site) for site in own)  # which the flow takes
        if (pairs or joined) and not walks:
            try:
                self._crossed = self._solved(rows, first.at.z)
                return None
            except Exception as error:  # a model's own code may raise anything
                why = f" No sparse system couples them: {first_line(error)}."
        for site in joined:
            if not self._fits(site):
                self._give_up(
                    site.name,
                    f"site {site.name!r}: its rows depend on each other given all other latents, or on a subsample of "
                    f"the data, and the flow cannot take them ({site.value.numel()} numbers; at most {JOINT_UP_TO}, "
                    "and not in a subsampled plate). Write the model with rows that are independent given the latents "
                    f"outside of their plate, and their data in the same plate.{why}",
                )
            return site.name
        for pair in pairs:
            if self._fits(small := min(pair, key=lambda site: site.value.numel())):
                return small.name
            names = " and ".join(repr(site.name) for site in pair)
            self.reason = f"{names} are in crossed plates: taken as independent given the flow's latents.{why}"
            fallback(self.reason)
        return next((site.name for site in conditional.parents(first) if self._fits(site)), None)

    def _solved(self, rows: Rows, z: Tensor) -> Crossed:
        """Return the system that couples all latents in plates."""
        return Crossed(rows, z)

    def _give_up(self, name: str, reason: str) -> None:
        """Refuse a site in plates that has no conditional distribution. Subclasses may give it one of their own."""
        raise ValueError(reason)

    def _fits(self, site: conditional.Local) -> bool:
        whole = all(self._plate_sizes[name] == site.batch[axis] for name, axis in site.plates.items())
        return whole and site.value.numel() <= JOINT_UP_TO

    def _globals(self, args: Positional, kwargs: Keywords) -> AutoFlow:
        """Return the guide of the latents outside of plates."""
        try:
            top = self._made(poutine.block(self.model, hide=[*self.local, *self._own]), args, kwargs)
            top.initialize(*args, **kwargs)
        except ValueError as error:
            if "at least one continuous latent" not in str(error) or not (self.local or self._own):
                raise
            if self._own:
                raise ValueError(
                    "model: expected a latent outside of plates, or one that rows share, for the flow, got none beside "
                    f"those in normal=: {', '.join(self._own)}. Leave one of them out."
                ) from error
            raise ValueError(
                "model: expected a latent outside of plates, or one that rows share, got none: rows are independent of "
                "each other. Fit them one by one, or give the model all rows in one run, without a subsample."
            ) from error
        self._globals_of = (top,)  # in a tuple, and not as a module before all is known
        return top

    @property
    def _latents(self) -> tuple[Latent, ...]:
        """The latents of the flow, in its coordinates."""
        return self._globals_of[0]._built_structure.latents

    def _made(self, model: Model, args: Positional, kwargs: Keywords) -> AutoFlow:
        flow, options = self._of_globals
        return AutoFlow(model, flow, init="prior", **options)

    def _rows(self, args: Positional, kwargs: Keywords) -> Rows:
        return Rows(self.model, self._latents, self.local, args, kwargs, self._children)

    def _begin(self, top: AutoFlow, z: Tensor, args: Positional, kwargs: Keywords) -> None:
        """Let the flow start at a mode and the curvature there, or as :class:`AutoFlow` does."""
        if self._init != AUTO or top.affine is None:
            return
        found = None
        try:
            if self.local or self.subsampled:
                found = start_of_globals(self.density_of_globals(args, kwargs, z, 0, most=FEW_PARTS), z)
        except Exception as error:  # a model's own code may raise anything
            fallback("the guide starts at the prior", error)
            return
        if found is None and not (self.subsampled or self._own):
            chosen = top._built_structure.noncentered if self.local or self._noncentered != AUTO else AUTO
            begun = best_start(self.model, args, kwargs, among=self._latents, noncentered=chosen)
            if begun is not None and begun.loc is not None and begun.scale is not None:
                found = begun.loc, begun.scale
                top.take_coordinates(chosen, begun.noncentered)
        if found is None:
            return
        begin_at(top._single, *(part.to(top._like) for part in found))
        if self._crossed is not None:
            mode, scale = found
            self.find_modes(args, kwargs, mode)
            self._about = mode, scale if scale.dim() == 1 else scale.norm(dim=1)

    @torch.no_grad()
    def find_modes(self, args: Positional, kwargs: Keywords, z: Tensor) -> None:
        """Find modes of all latents in plates at a point ``z`` (D,) of the others: runs begin there."""
        if self._crossed is not None:
            self._crossed.mode = self._crossed.normal(z[None]).mean[0].to(z)
            return
        rows = self._rows(args, kwargs)
        first = rows.near_mode(z, self._start, {})
        for part in parts_of(first, 0, None):
            self._remember(rows.near_mode(z, self._start, part.chosen))

    def density_of_globals(
        self, args: Positional, kwargs: Keywords, z: Tensor, seed: int, *, most: int | None = None
    ) -> Marginal | CrossedMarginal:
        """Return the log density of the latents outside of plates; ``z`` is a point (D,), the rest as in Marginal."""
        rows = self._rows(args, kwargs)
        if self._crossed is not None:
            system = self._crossed if rows.has_data_of(self._crossed.rows) else self._solved(rows, z)
            every = CrossedMarginal(system, seed)
            return every if most is None else every.with_parts(most)
        if most is None:
            return Marginal(rows, z, self._start, seed)
        return few_parts(rows, z, self._start, seed, remember=self._remember, most=most)

    @torch.no_grad()
    def score_globals(self, z: Tensor) -> Tensor:
        """Return the log density (S,) of the flow at points (S, D)."""
        return self._top._flow().log_prob(z)

    def take_flow(self, flow: Flow | FlowMixture) -> None:
        """Take another distribution of the latents outside of plates, in the same coordinates."""
        top = self._top
        flow.add_module("local", top._flow.get_submodule("local"))
        self.top = AutoFlow.of(flow, top._built_structure, top.model, *top._arguments)
        self._globals_of = (self.top,)

    def _begin_again(self, args: Positional, kwargs: Keywords) -> None:
        """Let the flow start anew, if it did so by a few given rows, more are given, and it was not trained since.

        Other packages run a guide first on a batch of two.
        """

        def state() -> list[int]:
            return [parameter._version for parameter in self._top._flow.parameters()]

        if not self.subsampled or self._crossed is not None or (self._began is not None and state() != self._began[1]):
            return
        z = self._top._init_loc().to(self._top._like)
        with poutine.block():
            at = self._rows(args, kwargs).run(z, self._start, {})
            rows = max((rows for _, rows in at.given.values()), default=0)
            if self._began is None:
                self._began = rows, state()
            elif rows > MORE_ROWS * self._began[0]:
                self._begin(self._top, z, args, kwargs)
                self._began = rows, state()

    # a run -----------------------------------------------------------------------------------------------------------

    @pyro_method
    def __call__(self, /, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        """Draw all latents, and run the model on them; return ``{site: value}``, observed sites too."""
        self.initialize(*args, **kwargs)
        if self.local and torch.jit.is_tracing():
            raise NotImplementedError(
                f"{type(self).__name__}: torch.jit records no second derivatives, by which rows of {self.local[0]!r} "
                "are drawn. Use Trace_ELBO in the place of JitTrace_ELBO."
            )
        self._begin_again(args, kwargs)
        self.args_kwargs = args, kwargs
        try:
            with self:
                self._top._register()
                self._z = finite_gradients(self.finite(self._top.sample_latent()))
                self.model(*args, **kwargs)
        except RuntimeError as error:
            self._explain_shared_plates(error)
            raise
        finally:
            self._z = self._run = None
            del self.args_kwargs
        model_trace, _ = self.get_traces()
        return {name: site["value"] for name, site in messages(model_trace).items() if site["type"] == "sample"}

    def _explain_shared_plates(self, error: Exception) -> None:
        """Raise an error with a remedy, if this one is about a plate that another part of the guide has made."""
        for name in self._plate_sizes:
            if f"Multiple sample sites named '{name}'" in first_line(error):
                raise ValueError(
                    f"plate {name!r}: expected it to be this guide's alone, got one that another part of the guide has "
                    "made (as AutoGuideList does), whose draws this guide would not see. For normals beside flows, use "
                    "one guide: AutoFlowMessenger(model, normal=[...]) with the names of their sites."
                ) from error

    @property
    def _top(self) -> AutoFlow:
        if self.top is None:
            raise RuntimeError(
                f"{type(self).__name__} has no parameters yet: they are made when the model is first run. "
                "Call guide.initialize(*args) with the model's arguments first."
            )
        return self.top

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self._top  # noqa: B018  (raises before the first run)
        return super().named_parameters(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> object:
        self._top  # noqa: B018
        return super().load_state_dict(*args, **kwargs)

    def finite(self, z: Tensor) -> Tensor:
        """Return draws (*batch, D) of the flow.

        Raises:
            ValueError: if they are not finite, with the site, and the parameter of the flow that is not.
        """
        if _functorch.is_batchedtensor(z):  # none has a value there
            return z
        broken = ~torch.isfinite(z).reshape(-1, z.shape[-1]).all(0)
        if not bool(broken.any()):
            return z
        place = int(broken.nonzero()[0])
        site = next(latent.name for latent in reversed(self._latents) if latent.offset <= place)
        named = self._top._flow.named_parameters()
        lost = [name for name, parameter in named if not bool(torch.isfinite(parameter).all())]
        cause = f", since its parameter {lost[0]!r} is not finite" if lost else ""
        got = float(z[..., place].detach().flatten()[0])
        raise ValueError(
            f"site {site!r}: expected finite draws from the guide's flow, got {got}{cause}. "
            "Train a new guide with a lower learning rate, or with clipped gradients."
        )

    def _drawn(self, z: Tensor) -> _Run:
        """Return what this run draws of the latents in plates, for the rows that its plates have by now."""
        if self._run is None:
            sites = messages(self.trace).items()
            chosen = {name: site["value"] for name, site in sites if site["type"] == "sample" and is_subsample(site)}
            with apart(inside=True):
                self._run = self._locals(z, *self.args_kwargs, chosen=chosen)
        return self._run

    def _locals(
        self, z: Tensor, args: Positional, kwargs: Keywords, *, remember: bool = True, chosen: Chosen | None = None,
        axes: conditional.Axes | None = None,
    ) -> _Run:  # fmt: skip
        """Draw unconstrained values of the latents in plates, given the others; see :class:`Rows` for ``axes``."""
        if self._crossed is not None:
            return self._crossed_locals(self._crossed, z)
        graph = torch.is_grad_enabled()
        # with children, modes of particles are far apart
        rows = replace(self._rows(args, kwargs), children=(), axes=axes)
        now = rows.near_mode(z, self._start, chosen or {}, graph=graph, patient=not graph)
        if remember:
            self._remember(now)
        densities: list[Tensor] = []
        shapes = cast(Sequence[Bijection], self._top._flow.get_submodule("local"))

        def noise(index: int, shape: torch.Size) -> Tensor:
            eps = torch.randn(shape, dtype=z.dtype, device=z.device)
            shaped, ladj = shapes[index].forward_and_ladj(eps.unsqueeze(-1))
            densities.append(dist.Normal(0.0, 1.0).log_prob(eps) - ladj - now.numbers[index].sd.log())
            return shaped.squeeze(-1)

        drawn = now.moved(now.base, now.draw(noise))
        values = {name: finite_gradients(value.unsqueeze(-1)).squeeze(-1) for name, value in drawn.items()}
        by_site = {name: torch.stack(parts).sum(0) for name, parts in now.by_site(densities).items()}
        return _Run(values, by_site, now.at.chosen)

    def _crossed_locals(self, system: Crossed, z: Tensor) -> _Run:
        """Draw all latents in plates together, at points (*batch, D)."""
        flat = z.reshape(-1, z.shape[-1])
        noise = torch.randn(len(flat), 1, system.size, dtype=torch.float64, device=z.device)
        if system.first.at.drawn:
            if self._expansion is None:
                self._about = about, reach = self._about or (flat[0].detach(), torch.ones_like(flat[0]).detach())
                self._expansion = Expansion(system, about, REACH * reach)
            u, density = self._expansion.drawn(flat, noise)
        else:
            u, density = system.drawn(flat, noise)
        values, densities = system.split(u[:, 0].to(z)), system.split(density[:, 0].to(z))
        for site in system.sites:
            lead = [*z.shape[: max(z.dim() - 1 - self._nesting, 0)]]
            lead += [1] * (self._nesting - len(site.batch)) if z.dim() > 1 else []
            values[site.name] = values[site.name].reshape(*lead, *site.value.shape)
            densities[site.name] = densities[site.name].reshape(*lead, *site.batch, -1).sum(-1)
        return _Run(values, densities, {})

    def _start(self, msg: Site, at: conditional.At) -> Tensor:
        """Return the values at which a site's rows were last near their modes; the middle of the prior for others."""
        kept, event = self._modes.get(msg["name"]), self._events.get(msg["name"], 0)
        if kept is None or self._other_rows(vectorized(msg)):
            return conditional.beginning(msg, at)
        values, seen = kept
        for frame in vectorized(msg):
            if frame.full_size != frame.size:
                rows = at.chosen[frame.name].to(values.device)
                values = values.index_select(values.dim() + frame.dim - event, rows)
                seen = seen.index_select(seen.dim() + frame.dim, rows)
        if bool(seen.all()):
            return values
        return torch.where(seen.reshape(*seen.shape, *[1] * event), values, conditional.beginning(msg, at))

    def _other_rows(self, frames: Iterable[Frame]) -> bool:
        """Whether a plate has another size than in the first run: its rows are not those that have modes."""
        return any((frame.full_size or frame.size) != self._plate_sizes.get(frame.name) for frame in frames)

    def remembered(self) -> dict[str, object]:
        """Return what runs leave behind, besides parameters: modes of rows, and where the system was expanded."""
        return {"modes": self._modes, "about": self._about}

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`remembered` returned."""
        self._modes = {name: (values, seen) for name, (values, seen) in state["modes"].items()}
        self._about = state["about"] and (state["about"][0], state["about"][1])

    @torch.no_grad()
    def _remember(self, now: Conditional) -> None:
        """Keep where the rows of this run have their modes, averaged over the particles; none of other plates."""
        if self._other_rows(conditional.all_frames(now.at.trace)):
            return
        near = zip(now.steps, now.decrement, strict=True)
        there = now.moved(now.base, [torch.where(far.abs() <= conditional.NEAR, step, 0.0) for step, far in near])
        for site in now.sites:
            rank = max(-axis for axis in site.plates.values())
            value = there[site.name]
            while value.dim() - site.event_dim > rank:
                value = value.mean(0)
            full = [1] * rank
            for plate, axis in site.plates.items():
                full[axis] = self._plate_sizes[plate]
            kept, seen = self._modes.get(site.name, (value, value.new_ones(())))
            if kept.dtype != value.dtype or list(seen.shape) != full:
                kept, seen = value.new_zeros(*full, *value.shape[rank:]), value.new_zeros(full, dtype=torch.bool)
                self._modes[site.name] = kept, seen
            index = [torch.arange(size, device=value.device) for size in full]
            for plate, axis in site.plates.items():
                index[axis] = now.at.chosen.get(plate, index[axis]).to(value.device)
            rows = torch.meshgrid(*index, indexing="ij")
            kept[rows] = value
            seen[rows] = True

    def _pyro_sample(self, message: Message) -> None:
        msg = cast(Site, message)
        if is_subsample(msg):
            if self._run is not None and is_open(msg) and msg["name"] in self._run.chosen:
                msg["value"] = self._run.chosen[msg["name"]]
            return
        if self._is_own(msg):
            return
        prior = msg["infer"]["prior"] = msg["fn"]
        if msg["is_observed"]:  # no part of the guide's density, for who traces the guide
            msg["fn"] = prior.mask(False)
            return
        posterior = self.get_posterior(msg["name"], prior)
        if isinstance(posterior, Tensor):
            posterior = dist.Delta(posterior, event_dim=prior.event_dim)
        batch = torch.broadcast_shapes(posterior.batch_shape, prior.batch_shape)  # outer plates come later
        msg["fn"] = posterior if batch == posterior.batch_shape else posterior.expand(batch)
        if msg["name"] not in (*self.local, *self._own):  # the flow's density has no power, whatever that of the prior
            msg["infer"]["power"], msg["scale"] = msg["scale"], 1.0

    def get_posterior(self, name: str, prior: TorchDistribution) -> TorchDistribution | Tensor:
        """Return a point mass at a site's value of this run, with the guide's log density.

        Raises:
            ValueError: for a site that was no latent in the first run, such as one whose data are left out.
        """
        assert self._z is not None
        if name not in self.local:
            latent = next((latent for latent in self._latents if latent.name == name), None)
            if latent is None:
                raise ValueError(
                    f"site {name!r}: expected the latents of the first run, got another one. If its data are left out "
                    "to predict them: rows are drawn given their data, so draw first, and predict by "
                    "Predictive(model, posterior_samples=guide.sample_posterior(n, *data))."
                )
            placed = latent.place(self._z, prior)
            return Known(placed.value, log_density=-placed.ladj, event_dim=prior.event_dim)
        run = self._drawn(self._z)
        transform, y, density = bijection(prior), run.values[name], run.densities[name]
        value = transform(y)
        density = density - by_event(transform.log_abs_det_jacobian(y, value), density.dim())
        return Drawn(value, log_density=density, event_dim=prior.event_dim)

    def get_traces(self) -> tuple[poutine.Trace, poutine.Trace]:
        """Return the traces of model and guide of the last run."""
        guide_trace = prune_subsample_sites(self.trace)
        model_trace = guide_trace.copy()
        for name, site in list(messages(guide_trace).items()):
            if site["type"] != "sample" or site["is_observed"]:
                del guide_trace.nodes[name]
            if site["type"] == "sample" and self._is_own(site):
                del model_trace.nodes[name]
            elif site["type"] == "sample":
                scale = site["scale"] * site["infer"].get("power", 1.0)
                messages(model_trace)[name] = {**site, "fn": site["infer"]["prior"], "scale": scale}
        return model_trace, guide_trace

    def _is_own(self, site: Site) -> bool:
        """Whether a site is a draw of the guide's own; factors and latents of a model may be marked alike."""
        auxiliary = site["infer"].get("is_auxiliary") and not site["is_observed"]
        return bool(auxiliary) and site["name"] not in self._axes

    # draws -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_posterior(self, n: int, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Draw ``n`` times from the guide: ``{name: (n, *shape)}``, constrained; uses torch's global generator.

        Latents of a subsampled plate are those of one subsample, the same for all draws.

        Args:
            n: how many draws.
            args: the model's arguments.
            kwargs: its keyword arguments.
        """
        checks.integer("n", n, 1)
        self.initialize(*args, **kwargs)
        with poutine.block():
            if not (self.local or self._own):  # the flow has all latents
                self(*args, **kwargs)  # takes over values that were loaded into Pyro's store
                return self._top.sample_posterior(n, *args, **kwargs)
            chosen = self._chosen(args, kwargs)
            rows = max(sum(value.numel() for value in self._run_once(args, kwargs, chosen).values()), 1)
            size = max(1, DRAWN_AT_ONCE // rows)
            parts = [min(size, n - first) for first in range(0, n, size)]
            try:
                found = [self._many(part, args, kwargs, chosen) for part in parts]
            except (RuntimeError, ValueError, IndexError) as error:  # a model that is not written for an outer plate
                fallback("draws are made one by one", error)
                singles = [self._run_once(args, kwargs, chosen) for _ in range(n)]
                found = [{name: torch.stack([one[name] for one in singles]) for name in singles[0]}]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _chosen(self, args: Positional, kwargs: Keywords) -> dict[str, Tensor]:
        """Return the rows of one run of the model, of plates that it draws."""
        at = self._rows(args, kwargs).run(self._top._init_loc().to(self._top._like), self._start, {})
        return {name: at.chosen[name] for name in at.drawn}

    def _run_once(self, args: Positional, kwargs: Keywords, chosen: Chosen) -> dict[str, Tensor]:
        with poutine.condition(data=dict(chosen)) if chosen else nullcontext():
            found = self(*args, **kwargs)
        return {name: found[name] for name in self._axes}

    def _many(self, count: int, args: Positional, kwargs: Keywords, chosen: Chosen) -> dict[str, Tensor]:
        """Draw in an outer plate, and compare a draw with a run of its own."""
        with pyro.plate("_draws", count, dim=-1 - self._nesting):
            found = self._run_once(args, kwargs, chosen)
            together, _ = self.get_traces()
        draws = {}
        for name, (batch, event_dim) in self._axes.items():
            value, rank = found[name], 1 + self._nesting + event_dim
            value = value.reshape(*[1] * (rank - value.dim()), *value.shape)
            cut = 1 + self._nesting - batch
            draws[name] = value.expand(count, *value.shape[1:]).reshape(count, *value.shape[cut:])
        if self.local:
            of_rows = {name: rows.expand(count, -1) for name, rows in chosen.items()}
            self._check_draws(together, args, kwargs, {**draws, **of_rows})
        return draws

    def _check_draws(
        self, together: poutine.Trace, args: Positional, kwargs: Keywords, draws: Mapping[str, Tensor]
    ) -> None:
        """Raise an error unless the model, run on one draw, has the log densities that this draw has among others.

        In an outer plate, ``w.sum()`` adds up the draws too, and ``w[0]`` is one of them.
        """
        together.compute_log_prob()
        for place in {0, len(next(iter(draws.values()))) - 1}:
            given = {name: value[place] for name, value in draws.items()}
            alone = poutine.trace(poutine.condition(self.model, data=given)).get_trace(*args, **kwargs)
            alone.compute_log_prob()
            for name, site in messages(together).items():
                if "log_prob" not in site or is_subsample(site):
                    continue
                density = site["log_prob"]
                own = density[place] if density.dim() > self._nesting and len(density) > 1 else density
                one = float(messages(alone)[name]["log_prob"].sum())
                if not math.isclose(float(own.sum()), one, rel_tol=SAME, abs_tol=SAME):
                    raise ValueError(f"the model gives site {name!r} another log density among other draws than alone")

    def median(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Return the marginal medians of 4000 draws."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Return marginal quantiles over 4000 draws, constrained: ``{name: (len(quantiles), *shape)}``.

        Raises:
            ValueError: for quantiles that are no list of numbers between 0 and 1.
        """
        levels = levels_of(quantiles)
        self.initialize(*args, **kwargs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return quantiles_of(self.sample_posterior(QUANTILE_DRAWS, *args, **kwargs), levels)


def _check_latents(latents: Iterable[Site]) -> None:
    """Refuse discrete latents, and supports without a bijection."""
    for site in latents:
        support: Any = site["fn"].support
        if support.is_discrete:
            raise ValueError(
                f"site {site['name']!r}: a discrete latent, which has no gradient. Sum it out in the model, for "
                "example by a MixtureSameFamily. Or give plates all rows (no subsample): then fit and AutoFlow sum "
                "out latents that are marked for enumeration."
            )
        transform_of(site)


def _check_rows(frames: Iterable[Frame], trace: poutine.Trace) -> None:
    """Refuse a subsampled plate whose rows a trace lacks."""
    for frame in frames:
        if conditional.is_part(frame) and frame.name not in messages(trace):
            raise ValueError(
                f"model: a handler hides which rows plate {frame.name!r} takes. Name the plate too, as in "
                f"poutine.block(model, expose=[..., {frame.name!r}]), or name what to hide: hide=[...]."
            )


class _Plates(Messenger):
    """Remember the subsampled plates of a run, to tell where an index was forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[str, tuple[int, int]] = {}

    def _pyro_post_sample(self, msg: Site) -> None:
        if is_subsample(msg):
            self.taken[msg["name"]] = len(msg["value"]), conditional.rows_in(msg)[0]

    def explain(self, error: Exception) -> None:
        """Raise an error with a hint, if this one is about the sizes of a plate and of its minibatch."""
        numbers = {int(number) for number in re.findall(r"\d+", str(error))}
        for name, (rows, size) in self.taken.items():
            if rows < size and {rows, size} <= numbers:
                raise ValueError(
                    f"model: plate {name!r} takes {rows} of {size} rows, and something in it has all {size} "
                    f"({first_line(error)}). Write `with pyro.plate(...) as rows:`, and index each argument that has a "
                    "value for each row, as in `x[rows]`."
                ) from error


class _Run(NamedTuple):
    """What one run of the guide has drawn."""

    values: dict[str, Tensor]  # of the sites in plates, unconstrained
    densities: dict[str, Tensor]  # their log densities, of each row
    chosen: Chosen  # rows of the plates
