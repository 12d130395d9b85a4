"""A guide that holds a flow over the latents of a model: how it is set up, stored and copied."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.guides import AutoGuide
from pyro.nn.module import _is_module_local_param_enabled
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.recipe import FlowLike, affine_of, begin_at, latent_recipe, start_at
from pyro_flows.guides.collapsed import few_parts, start_of_globals
from pyro_flows.guides.conditional import Rows
from pyro_flows.guides.recorded import Maps
from pyro_flows.guides.runs import beginning
from pyro_flows.guides.store import Named, Whole, copy_stored, forget, in_svi, param_statement, place, was_loaded
from pyro_flows.inference.starts.coordinates import choose_coordinates
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.starts.portfolio import portfolio
from pyro_flows.model.log_density import LogDensity, PartialLogDensity
from pyro_flows.model.observations import hides_data, warn_of_hidden, without_block
from pyro_flows.model.precision import LostDigits
from pyro_flows.model.reading import read_structure
from pyro_flows.model.sites import Keywords, Latent, Model, Noncentered, Positional, Structure, messages, vectorized
from pyro_flows.model.start import initial_value
from pyro_flows.support import checks
from pyro_flows.support.process.fallbacks import passed_over
from pyro_flows.support.process.seeding import seeded
from pyro_flows.transforms import DiagonalAffine, LowerTriangularAffine
from pyro_flows.transforms.networks import give_gains

AUTO, PRIOR = INITS = "auto", "prior"
CENTERING = "centering"  # the buffer of the coordinates of hierarchical sites, which a state and Pyro's store hold
UNSLOWED = {"gain": 1.0, "relative": 0.0}  # buffers of small steps, as they leave a flow without small steps


@checks.methods
class LatentGuide(AutoContinuous):
    """What a flow guide is made of; see :class:`~pyro_flows.AutoFlow`."""

    flow: Flow | FlowMixture

    def __init__(
        self,
        model: Callable[..., object],
        flow: FlowLike = "realnvp",
        *,
        affine: str = "auto",
        base: str = "student_t",
        df: float = 15.0,
        init: str = "auto",
        init_loc_fn: Callable[..., Any] | None = None,
        init_scale: float | None = None,
        noncentered: Noncentered | str = AUTO,
        cautious: bool | str = AUTO,
        create_plates: Callable[..., object] | None = None,
        **options: Any,
    ) -> None:
        if create_plates is not None and (isinstance(create_plates, pyro.plate) or not callable(create_plates)):
            raise ValueError(
                "create_plates: expected a function of the model's arguments that returns plates, "
                f"got a {type(create_plates).__name__}."
            )
        AutoGuide.__init__(self, model, create_plates=create_plates)
        self._recipe = latent_recipe(flow, options, affine=affine, base=base, df=df)
        checks.choice("init", init, INITS)
        own = init_loc_fn is not None or init_scale is not None
        self._init = PRIOR if own else init
        self._init_loc_fn = initial_value if init_loc_fn is None else init_loc_fn
        self._init_scale = 1.0 if init_scale is None else checks.positive("init_scale", init_scale)
        by_name = isinstance(noncentered, str)
        self._noncentered = checks.choice("noncentered", noncentered, (AUTO,)) if by_name else noncentered
        self._cautious = cautious if isinstance(cautious, bool) else checks.choice("cautious", cautious, (AUTO,))
        self._whole: Whole | None = None  # the parameters as one vector, while PathELBO trains them
        self._paced = 0.0  # the unit of steps that PathELBO has set
        self._arguments: tuple[Positional, Keywords] = ((), {})
        self._moved_to: dict[str, Any] = {}
        self._as_read: tuple[Structure, Tensor] | None = None  # at first, and the coordinates of the structure by now
        self.plates: dict[str, object] = {}
        self._in_store = False
        self._named: Named | None = None  # the tensors by their names in Pyro's store
        self._maps: Maps = {}  # the flow by graphs, for steps of SVI

    def initialize(self, *args: object, **kwargs: object) -> Self:
        """Run the model once on its arguments and make the parameters, so that an optimizer can be built."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
            if self.master is None:
                with poutine.block():
                    self._create_plates(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: object, **kwargs: object) -> None:
        structure = read_structure(self.model, args, kwargs, self._init_loc_fn)
        self._arguments = (args, kwargs)
        chosen, start = self._noncentered, self._best_start(structure, args, kwargs)
        if isinstance(chosen, str):
            chosen = () if start is None else start.noncentered
        self._set_structure(structure.noncenter(chosen))
        if self.master is not None:
            self.master()._check_prototype(self.prototype_trace)
        like = torch.zeros((), **{"dtype": structure.dtype, "device": structure.device, **self._moved_to})
        built = self._recipe.build_for_latents(structure.dim)
        if self._cautious:
            built.slow()
        if self._cautious == AUTO:
            give_gains(built)
        self.flow = built.to(like)
        if structure.hierarchical:
            self.register_buffer(CENTERING, self.get_buffer(CENTERING).to(like))
        if start is None or start.loc is None or start.scale is None:
            loc = self._init_loc().to(like)
            self.start_at(loc, self._init_scale * torch.ones_like(loc))
        else:
            begin_at(self._single, start.loc.to(like), start.scale.to(like))

    def _best_start(self, structure: Structure, args: Positional, kwargs: Keywords) -> Begun | None:
        """Return where the guide starts, by the data; None for the prior.

        A part of an ``AutoGuideList``, or a guide inside of ``poutine.block``, starts by the model without the block.
        """
        around, chosen, found = bool(self._recipe.around), self._noncentered, None
        begin, latents = self._init == AUTO and around, structure.latents
        choose = chosen == AUTO and bool(structure.hierarchical) and (around or self._recipe.named)
        whole, hidden = without_block(self.model), hides_data(structure, self.model)
        if not (begin or choose):
            return None
        if self.master is None and not hidden:
            asked = chosen if choose or not isinstance(chosen, str) else ()
            found = best_start(self.model, args, kwargs, among=latents, noncentered=asked, begin=begin)
        if begin and found is None and whole is not self.model:
            found = best_start(whole, args, kwargs, among=latents)
        if begin and found is None and structure.subsampled and whole is self.model:
            found = start_by_parts(self.model, args, kwargs, latents, values_of(structure))
        if found is None and hidden and self.master is None:
            warn_of_hidden()
        return found

    def _init_loc(self) -> Tensor:
        """The prototype run's values, unconstrained (D,), without entries that are masked out."""
        assert self.structure is not None
        return values_of(self.structure)

    def _set_structure(self, structure: Structure) -> None:
        """Keep what the guide needs of the prototype run: latent sites only, no data, nothing of a graph."""
        trace = poutine.Trace()
        kept = ("name", "type", "fn", "value", "is_observed", "infer", "cond_indep_stack", "scale", "mask")
        for latent in structure.latents:
            site = messages(structure.trace)[latent.name]
            trace.add_node(latent.name, args=(), kwargs={}, **{key: site[key] for key in kept})
        own = self.__dict__["structure"] = replace(structure, trace=trace, drawn=None, observed={})
        if structure.hierarchical:
            self._as_read = own, structure.centering
            self.register_buffer(CENTERING, structure.centering)
        self.prototype_trace = trace
        self.latent_dim = structure.dim
        self._unconstrained_shapes = {latent.name: latent.unconstrained_shape for latent in structure.latents}
        self._cond_indep_stacks = {name: vectorized(site) for name, site in messages(trace).items()}
        frames = [frame for stack in self._cond_indep_stacks.values() for frame in stack]
        self._prototype_frames = {frame.name: frame for frame in frames}

    @property
    def structure(self) -> Structure | None:
        """The structure of the model, in the coordinates that the state holds; None before the first run."""
        own = self._buffers.get(CENTERING)
        if own is not None:
            assert self._as_read is not None
            first, known = self._as_read
            if own.dtype != known.dtype or own.device != known.device or not torch.equal(own, known):
                self._as_read = first, own.detach().clone()  # a state was loaded, or comes from another process
                self.__dict__["structure"] = first.with_centering(own)
        found: Structure | None = self.__dict__.get("structure")
        return found

    @classmethod
    def of(
        cls,
        flow: Flow | FlowMixture,
        structure: Structure,
        model: Model,
        args: Positional = (),
        kwargs: Keywords | None = None,
    ) -> Self:
        """Return the guide that holds this flow, or mixture of flows, over the latents of ``structure``.

        The model is not run. With a mixture, the guide's distribution is the mixture, and has no transform.
        """
        guide = cls(model, flow if isinstance(flow, Flow) else flow.members[0], affine="none", cautious=False)
        guide._noncentered = structure.noncentered
        guide._arguments = (args, dict(kwargs or {}))
        guide._set_structure(structure)
        with poutine.block():
            guide._create_plates(*args, **guide._arguments[1])
        guide.flow = flow
        return guide

    @property
    def affine(self) -> LowerTriangularAffine | DiagonalAffine | None:
        """The trainable affine map after the flow, None with ``affine="none"`` and for a mixture of flows."""
        own = isinstance(self._flow, Flow) and bool(self._recipe.around)
        return affine_of(self._single) if own else None

    def start_at(self, loc: Tensor, scale: Tensor) -> None:
        """Set the fixed start m and L of the affine map (``scale``: (D,) or lower triangular (D, D)); b = 0, A = I."""
        if self.affine is not None:
            start_at(self._single, loc, scale)

    @property
    def _flow(self) -> Flow | FlowMixture:
        """The flow, or mixture of flows, past Pyro's attribute hook, which would register its parameters once more."""
        flow = self.__dict__["_modules"].get("flow")
        if flow is None:
            raise RuntimeError(
                f"{type(self).__name__} has no parameters yet: they are made when the model is first run. "
                "Call guide.initialize(*args) with the model's arguments first."
            )
        return flow

    @property
    def _like(self) -> Tensor:
        return next(self._flow.parameters(), self._flow._like)

    @property
    def _single(self) -> Flow:
        if isinstance(self._flow, FlowMixture):
            raise ValueError(
                "guide: a mixture of flows has no transform from one base distribution. Use get_posterior(), or fit "
                "with runs=1."
            )
        return self._flow

    @property
    def _built_structure(self) -> Structure:
        self._flow  # noqa: B018  (raises before the first run)
        assert self.structure is not None
        return self.structure

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Remember a move (``to``, ``double``, ``cuda``) that comes before the parameters: its dtype, its device.

        Later ones move parameters apart from the vector of all, which is made anew.
        """
        if self.prototype_trace is None:
            single, double = (fn(torch.zeros((), dtype=dtype)) for dtype in (torch.float32, torch.float64))
            if single.dtype == double.dtype:
                self._moved_to["dtype"] = single.dtype
            if single.device != torch.zeros(()).device:
                self._moved_to["device"] = single.device
        elif self._whole is not None:
            self._whole.release()
            self._whole = None
        return super()._apply(fn, recurse)

    # Pyro's store ---------------------------------------------------------------------------------------------------

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self._flow  # noqa: B018
        return super().named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._flow  # noqa: B018
        self._catch_up()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> object:
        self._flow  # noqa: B018
        return super().load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        own = self._buffers.get(CENTERING)
        if own is not None and any(name.startswith(f"{prefix}flow.") for name in state):
            state.setdefault(prefix + CENTERING, self._missing(own))
        super()._load_from_state_dict(state, prefix, *args)

    def take_coordinates(self, asked: Noncentered | str, chosen: Noncentered) -> None:
        """Take other coordinates than those of the first run."""
        self._noncentered, own = asked, self._buffers.get(CENTERING)
        if own is not None and self._as_read is not None:
            own.copy_(self._as_read[0].noncenter(chosen).centering)

    def _missing(self, own: Tensor) -> Tensor:
        """Return the coordinates of a state that tells none: those that were asked for, or those of the model."""
        assert self._as_read is not None
        return torch.full_like(own, -1.0) if self._noncentered == AUTO else self._as_read[0].centering.to(own)

    def _register(self, *, gather: bool = True) -> None:
        """Tell Pyro of the flow's parameters; make the store hold the very tensors of this guide.

        In SVI, optimizers get the parameters as one vector, by the name of the flow. With ``gather``, its gradient is
        that of the parameters.

        What the store holds under our names is either another guide's (then ours replaces it) or was loaded into the
        store (then we take its values over). The store holds the buffers too, m and L among them: without them the
        parameters, which are relative to the start, would mean something else in another guide.
        """
        tensors = self._named_tensors()
        if not _is_module_local_param_enabled():
            stored = pyro.get_param_store()._params
            if any(stored.get(full) is not tensor for full, tensor in tensors.items()):
                tensors = self._take_over()
                for full in [name for name in stored if name.startswith(self._prefix) and name not in tensors]:
                    forget(full)  # another guide's: in a file it would pass for ours
                for full, tensor in tensors.items():
                    place(full, tensor)
            self._in_store = True
        told = tensors
        if in_svi() and (whole := self._as_one()) is not None:
            if gather and torch.is_grad_enabled():
                whole.gather()
            told = {self._pyro_get_fullname("flow"): whole.vector}
            pyro.get_param_store()._param_to_name.update({tensor: name for name, tensor in told.items()})
        elif (
            (whole := self._whole)
            and whole.vector.grad is not None
            and gather
            and torch.is_grad_enabled()
            and whole.hold()  # the flow was not moved
        ):
            whole.gather()  # Pyro has set the vector's gradient to zero since, and so are the parameters' ones
        for full, tensor in told.items():
            if isinstance(tensor, nn.Parameter):
                # a param statement as pyro.param makes it, past the store's look-up and transform of real numbers
                tensor.unconstrained = weakref.ref(tensor)  # type: ignore[attr-defined]
                param_statement(full, tensor, constraint=constraints.real, name=full)

    def _as_one(self) -> Whole | None:
        """Return the trained parameters as one vector; None if they are of several kinds."""
        assert self._named is not None
        trained = [part for part in self._named.parameters if part.requires_grad]
        whole = self._whole
        if whole is None or list(map(id, whole.parameters)) != list(map(id, trained)) or not whole.hold():
            if whole is not None:
                whole.release()
            kinds = {(part.dtype, part.device) for part in trained}
            self._whole = Whole(trained) if len(kinds) == 1 else None
        return self._whole

    def _named_tensors(self) -> dict[str, Tensor]:
        """Return the flow's parameters and buffers by their names in Pyro's store."""
        prefix, flow = self._pyro_get_fullname("flow"), self._flow
        if self._named is None or not self._named.still(prefix, flow):
            state = flow.state_dict(keep_vars=True)
            tensors = {param_with_module_name(prefix, name): tensor for name, tensor in state.items()}
            self._named = Named(prefix, flow, tensors)
        own = self._buffers.get(CENTERING)
        return self._named.tensors | ({} if own is None else {self._pyro_get_fullname(CENTERING): own})

    @property
    def _prefix(self) -> str:
        """How the names of the flow's tensors in Pyro's store begin."""
        return param_with_module_name(self._pyro_get_fullname("flow"), "")

    def _take_over(self) -> dict[str, Tensor]:
        """Take over the values that were loaded into the store under our names, and return our tensors by name.

        Parameters that come without the buffers of small steps were saved without small steps, and those without
        coordinates in the model's. Layers without these buffers get those that were saved with the parameters.
        """
        store, modules = pyro.get_param_store(), dict(self._flow.named_modules())
        known = self._named_tensors()
        for full, stored in store._params.items():
            path, _, name = full.removeprefix(self._prefix).rpartition(".")
            ours = full.startswith(self._prefix) and full not in known and path in modules
            if ours and name in modules[path]._buffers and was_loaded(full, known):
                modules[path].register_buffer(name, stored.detach().clone().to(self._like))
        tensors = self._named_tensors()
        loaded = [full for full in tensors if was_loaded(full, tensors)]
        for full, tensor in tensors.items():
            if full in loaded:
                copy_stored(full, tensor, store._params[full])
                place(full, tensor)
            elif loaded and full not in store._params and full.rpartition(".")[2] in UNSLOWED:
                tensor.fill_(UNSLOWED[full.rpartition(".")[2]])
            elif loaded and full not in store._params and tensor is self._buffers.get(CENTERING):
                tensor.copy_(self._missing(tensor))
        return tensors

    def _catch_up(self) -> None:
        """See to it that draws are those of values that were loaded into the store since the guide last ran."""
        if self._in_store and not _is_module_local_param_enabled():
            self._take_over()

    # the model, and copies -------------------------------------------------------------------------------------------

    @property
    def model(self) -> Model:
        """The model.

        Raises:
            RuntimeError: for a guide that was loaded without it.
        """
        if self._model is None:
            raise RuntimeError("this guide was loaded without its model; give it one with guide.attach(model, *args).")
        return self._model[0]

    def attach(self, model: Callable[..., object], *args: object, **kwargs: object) -> Self:
        """Give a loaded guide its model back (pickles hold none)."""
        self._model, self._arguments = (model,), (args, kwargs)
        return self

    def __getstate__(self) -> dict[str, object]:
        if self._whole is not None:  # or each parameter would be saved with the memory of all
            self._whole.release()
        for tensor in super().state_dict(keep_vars=True).values():
            tensor.__dict__.pop("unconstrained", None)  # Pyro's weak reference
        gone = dict.fromkeys(("_model", "_whole", "_named", "master", "create_plates"))
        return {**self.__dict__, **gone, "plates": {}, "_arguments": ((), {}), "_in_store": False, "_maps": {}}

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Copy the guide: alone, with the same model; as a part of something else, with the copy of the model there."""
        whose = {"_model": self._model, "create_plates": self.create_plates}  # which a stored guide does not have
        if not memo:
            memo.update({id(part): part for part in whose.values()})
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__getstate__() | whose, memo), _arguments=self._arguments)
        return new


class Begun(NamedTuple):
    """Where a guide starts: location (D,), scale, (D, D) triangular or (D,), and the sites' coordinates."""

    loc: Tensor | None
    scale: Tensor | None
    noncentered: Noncentered


def values_of(structure: Structure) -> Tensor:
    """Return the values of latents in the run that a structure holds, unconstrained (D,), without masked entries."""
    sites = [(latent, messages(structure.trace)[latent.name]) for latent in structure.latents]
    return torch.cat([latent.flatten(site["value"], site["fn"]) for latent, site in sites])


def start_by_parts(
    model: Model, args: Positional, kwargs: Keywords, latents: Sequence[Latent], z: Tensor
) -> Begun | None:
    """Return a mode of all latents, and the curvature there, by runs that each draw other rows; ``z`` (D,) is a point.

    It is None where the log density of such a run is not known.
    """
    try:
        with poutine.block(), seeded(0, z.device):
            found = start_of_globals(few_parts(Rows(model, latents, (), args, kwargs), z, beginning), z)
    except Exception as error:  # a model's own code may raise anything
        passed_over("the guide starts at the prior", error)
        return None
    return None if found is None else Begun(*found, noncentered=())


def best_start(
    model: Model, args: Positional, kwargs: Keywords, *, among: Sequence[Latent], noncentered: Noncentered | str = (),
    begin: bool = True,
) -> Begun | None:  # fmt: skip
    """Return some latents in the best of the starts of a fit, in the coordinates of a fit if these are ``"auto"``.

    It is None where the model's density is not known, as with subsampling. Without ``begin``, it has coordinates only.
    """

    def found(density: LogDensity) -> tuple[LogDensity, Start | None]:
        extra = []
        if noncentered == AUTO and density.structure.hierarchical:
            density, learned, _ = choose_coordinates(density, seed=0)
            extra = [] if learned is None else [learned]
        return density, portfolio(density, seed=0, extra=extra)[0] if begin else None

    try:
        with poutine.block():
            given = () if isinstance(noncentered, str) else noncentered
            density: LogDensity = PartialLogDensity(model, args, kwargs, noncentered=given)
            try:
                density, start = found(density)
            except LostDigits:
                density, start = found(density.in_double())
    except Exception as error:  # a model's own code may raise anything
        passed_over("the guide starts at the prior, in the model's coordinates", error)
        return None
    if start is None:
        return Begun(None, None, density.structure.noncentered)
    places = {latent.name: range(latent.offset, latent.offset + latent.size) for latent in density.structure.latents}
    if any(latent.size != len(places.get(latent.name, ())) for latent in among):
        return None  # those inside of poutine.block, of which the model says other things
    chosen = [place for latent in among for place in places[latent.name]]
    loc, scale = (part[chosen].to(density.dtype) for part in (start.loc, start.scale))
    if scale.dim() == 2 and chosen != [*range(density.dim)]:
        rows = scale.double()  # of a triangle; what is left of it is none
        scale = torch.linalg.cholesky(rows @ rows.mT)
    return Begun(loc, scale, density.structure.noncentered)
