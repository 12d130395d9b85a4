"""Which latents the flow has, which ones in plates have conditional distributions, and where the flow starts."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from pyro import poutine
from pyro.infer.autoguide.effect import AutoMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.recipe import FlowLike, begin_at
from pyro_flows.guides import independence
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.guides.collapsed import FEW_PARTS, MOST_PARTS, few_parts, start_of_globals
from pyro_flows.guides.conditional import Conditional, Rows
from pyro_flows.guides.crossed import Crossed
from pyro_flows.guides.crossed_marginal import CrossedMarginal
from pyro_flows.guides.marginal import Marginal
from pyro_flows.guides.parts import check_data, parts_of
from pyro_flows.guides.row_modes import RowModes
from pyro_flows.guides.runs import Local, is_part, off_center, rows_in
from pyro_flows.guides.setup import AUTO, best_start
from pyro_flows.model.sites import Frame, Keywords, Latent, Model, Positional, Site, is_subsample, messages, vectorized
from pyro_flows.model.start import first_run, initial_value, transform_of
from pyro_flows.support import checks
from pyro_flows.support.process.fallbacks import fallback, first_line
from pyro_flows.support.process.seeding import seeded
from pyro_flows.transforms import Compose, DiagonalAffine, SinhArcsinh

LAYERS = 4  # couplings of the default flow
MOST_NUMBERS = 64  # of a row: each takes a pass backward
JOINT_UP_TO = 200  # coordinates of sites that are put into the flow, since their rows are not independent
MORE_ROWS = 4  # times the rows by which the flow started, from which on it starts anew


class StructuredGuide(AutoMessenger):  # type: ignore[metaclass]
    """The structure of a guide that a first run of the model shows; see :class:`~pyro_flows.AutoHierarchicalFlow`."""

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
        self.modes = RowModes()
        self._axes: dict[str, tuple[int, int]] = {}  # of each latent site: batch axes, and axes of an event
        self.sizes: dict[str, int] = {}
        self.subsampled = False
        self.has_data = True  # in the first run
        self._crossed: Crossed | None = None  # the system of all latents in plates, where rows are not independent
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

    def initialize(self, *args: object, **kwargs: object) -> Self:
        """Run the model on its arguments and make the parameters, so that an optimizer can be built."""
        if self.top is None:
            with poutine.block(), torch.enable_grad():
                self._read(args, kwargs)
        return self

    def _read(self, args: Positional, kwargs: Keywords) -> None:
        """Read the structure from a run; find which sites are in plates, and where the globals start."""
        sites = _sites_of(self.model, args, kwargs)
        latents = [site for site in sites if not site["is_observed"]]
        for option, names in ((self._option, self._joint), ("normal", self._own)):
            for name in names:
                checks.choice(option, name, [site["name"] for site in latents])
        self._measure(sites, latents)
        joint = set(self._joint) or self._shared(latents, args, kwargs)
        self._refuse_wide_rows(latents, joint)
        top, first = self._divide(latents, joint, args, kwargs)
        self.has_data = len(latents) < len(sites)
        if self.local and not self.has_data:
            self.reason = fallback(
                f"the model has no data, so latents in plates, such as {self.local[0]!r}, have their priors. If it has "
                "some, a handler hides them: name these sites in expose=, too"
            )
        self.modes.events = {site.name: site.event_dim for site in first.sites}
        z = first.at.z
        check_data(self._rows(args, kwargs), z, self.modes.start, parts_of(first, 0, MOST_PARTS))
        self._begin(top, z, args, kwargs)
        shapes = [Compose([SinhArcsinh(1), DiagonalAffine(1)]) for _ in ([] if self._crossed else first.numbers)]
        top._flow.add_module("local", nn.ModuleList(shapes).to(top._like))
        self.top = top

    def _measure(self, sites: Sequence[Site], latents: Sequence[Site]) -> None:
        """Note the sizes of plates and latents, and their axes."""
        every = [frame for site in sites for frame in vectorized(site)]
        self.modes.sizes = {frame.name: frame.full_size or frame.size for frame in every}
        axes = [max(len(site["fn"].batch_shape), site["value"].dim() - site["fn"].event_dim) for site in sites]
        self._nesting = max(axes)  # of which some may be in no plate
        self._axes = {site["name"]: (len(site["fn"].batch_shape), site["fn"].event_dim) for site in latents}
        self.sizes = {site["name"]: transform_of(site).inv(site["value"]).numel() for site in latents}
        self.subsampled = any(map(is_part, every))

    def _refuse_wide_rows(self, latents: Sequence[Site], joint: Collection[str]) -> None:
        """Refuse sites in plates with too many numbers in a row."""
        for site in latents:
            size = self.sizes[site["name"]] // max(math.prod(site["fn"].batch_shape), 1)
            if vectorized(site) and site["name"] not in (*joint, *self._own) and size > MOST_NUMBERS:
                self._give_up(
                    site["name"],
                    f"site {site['name']!r}: expected at most {MOST_NUMBERS} numbers in a row, got {size}. Each takes "
                    "a pass backward at each step. Put the site into the flow (joint=), or use AutoFlow.",
                )

    def _divide(
        self, latents: Sequence[Site], joint: set[str], args: Positional, kwargs: Keywords
    ) -> tuple[AutoFlow, Conditional]:
        """Divide the latents among the flow and conditional distributions; return the flow's guide, and the others."""
        for _ in range(len(latents) + 1):  # each round puts one more site into the flow
            there = [site for site in latents if site["name"] not in (*joint, *self._own)]
            self.local = [site["name"] for site in there if vectorized(site)]
            top = self._globals(args, kwargs)
            z = top._init_loc().to(top._like)
            self._children = self._rows(args, kwargs).find_children(z)
            rows = self._rows(args, kwargs)
            first = rows.conditional(z, off_center, {}, graph=True)
            moved = self._to_join(rows, first)
            if moved is None:
                break
            if moved not in self._own:
                joint.add(moved)
        return top, first

    def _shared(self, latents: Sequence[Site], args: Positional, kwargs: Keywords) -> set[str]:
        """Return the sites that the flow takes if none is outside of plates: those that rows share."""
        sites = {site["name"]: site for site in latents if site["name"] not in self._own}
        if not sites or not all(map(vectorized, sites.values())):
            return set()
        nothing = latents[0]["value"].new_zeros(0)
        with seeded(0, nothing.device):  # rows of a subsample are drawn
            first = Rows(self.model, (), [*sites], args, kwargs).conditional(nothing, off_center, {})
        found = [*independence.shared(first), *independence.read_elsewhere(first)]
        return {site.name for site in found if self._fits(site)}

    def _to_join(self, rows: Rows, first: Conditional) -> str | None:
        """Return a site that the flow has to take: its rows, or what is read of them, do not stand for themselves.

        Last come the parents of latents that the flow has. Given a child, such as a coefficient near zero, a scale has
        a long flat tail, which no normal approximation has; without it, what ties the two would be lost.
        """
        own, pairs, why = independence.coupled(first), independence.crossed(first), ""
        joined = [*own, *independence.read_elsewhere(first)]
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
        return next((site.name for site in independence.parents(first) if self._fits(site)), None)

    def _solved(self, rows: Rows, z: Tensor) -> Crossed:
        """Return the system that couples all latents in plates."""
        return Crossed(rows, z)

    def _give_up(self, name: str, reason: str) -> None:
        """Refuse a site in plates that has no conditional distribution. Subclasses may give it one of their own."""
        raise ValueError(reason)

    def _fits(self, site: Local) -> bool:
        whole = all(self.modes.sizes[name] == site.batch[axis] for name, axis in site.plates.items())
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
        first = rows.near_mode(z, self.modes.start, {})
        for part in parts_of(first, 0, None):
            self.modes.remember(rows.near_mode(z, self.modes.start, part.chosen))

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
            return Marginal(rows, z, self.modes.start, seed)
        return few_parts(rows, z, self.modes.start, seed, remember=self.modes.remember, most=most)

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
            at = self._rows(args, kwargs).run(z, self.modes.start, {})
            rows = max((rows for _, rows in at.given.values()), default=0)
            if self._began is None:
                self._began = rows, state()
            elif rows > MORE_ROWS * self._began[0]:
                self._begin(self._top, z, args, kwargs)
                self._began = rows, state()

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


def _sites_of(model: Model, args: Positional, kwargs: Keywords) -> list[Site]:
    """Return the sites of a first run, without subsamples; refuse what no guide can follow."""
    plates = _Plates()
    try:
        trace = first_run(plates(model), args, kwargs, initial_value)
    except (RuntimeError, ValueError, IndexError) as error:
        plates.explain(error)
        raise
    sites = [site for site in messages(trace).values() if site["type"] == "sample" and not is_subsample(site)]
    for site in sites:
        independence.check_plates(site)
    _check_latents(site for site in sites if not site["is_observed"])
    _check_rows([frame for site in sites for frame in vectorized(site)], trace)
    return sites


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
        if is_part(frame) and frame.name not in messages(trace):
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
            self.taken[msg["name"]] = len(msg["value"]), rows_in(msg)[0]

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
