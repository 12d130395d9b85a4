"""Flow guides for Pyro: subclasses of ``AutoContinuous`` that work in Pyro's own SVI and are what ``fit`` trains."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.guides import AutoGuide
from pyro.nn.module import _is_module_local_param_enabled
from pyro.params.param_store import param_with_module_name
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils._pytree import tree_leaves, tree_map

from pyro_flows import _checks
from pyro_flows._turns import turn
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.recipe import (
    FlowLike,
    affine_of,
    latent_recipe,
    start_at,
)
from pyro_flows.model.handlers import flatten_all, place_all
from pyro_flows.model.reading import initial_value, read_structure
from pyro_flows.model.sites import Noncentred, Structure, messages
from pyro_flows.transforms import Bound, DiagonalAffine, LowerTriangularAffine

QUANTILE_DRAWS = 4000
UNSLOWED = {"gain": 1.0, "relative": 0.0}  # buffers of small steps, as they leave a flow without small steps

# Which tensor a guide of this process put into the store last under a name, and the store's table at that time, which
# is another one once the store was cleared. What else is found there was loaded.
_placed: dict[str, tuple[weakref.ref[Tensor], dict[str, Any]]] = {}


class AutoFlow(AutoContinuous):
    r"""Guide :math:`z = m + L(b + A\,t(f(\epsilon)))` over all continuous latents: any flow f, then tails, then affine.

    t is :class:`SinhArcsinh`, which gives each coordinate tails of its own; it and the affine map are trained with f.

    Works in Pyro's ``SVI`` with any ELBO, in ``Predictive``, ``AutoGuideList``, ``poutine.block``, ``NeuTraReparam``.
    Latents are mapped to real numbers by their supports' bijections (dependent supports and improper priors too).
    Every guide owns its parameters: a second guide of the same name starts afresh and trains, and parameters that were
    loaded into Pyro's store are taken over. dtype and device follow the model's sites, or an earlier ``guide.to(...)``.

    One SVI step evaluates each layer's network once.

    Two limits of Pyro's: ``NeuTraReparam`` is wrong for models whose first latent sits in a plate (it counts the
    log-determinant once for each entry), ``RenyiELBO`` for models with all sites in one plate (it takes the entries for
    independent problems).

    Args:
        model: a Pyro model.
        flow: a builder's name (``"realnvp"``, ``"spline"``, ``"nice"``, ``"planar"``), a :class:`Flow` or
            :class:`Bijection` of the model's dimension, or a function of the dimension that returns one.
        affine: the trainable affine map after flow and tails: ``"tril"``, ``"diagonal"``, ``"none"`` (no tails
            either), or ``"auto"`` (triangular up to 200 dimensions).
        base: base distribution, see :class:`Flow`; ignored if ``flow`` is a :class:`Flow`, which brings its own.
        df: degrees of freedom of the Student-t base.
        init_loc_fn: Pyro init function for m; the default is the prior median, and works for improper priors.
            With ``affine="none"`` there is no m, and the flow starts at its base.
        init_scale: L at the start, times the identity.
        noncentred: sites that get non-centred coordinates, see :class:`LogDensity`.
        cautious: train the flow by small steps (:meth:`Flow.slow`), which one draw a step and minibatches need; False
            is for gradients averaged over many draws.
        create_plates: Pyro's: a function of the model's arguments that returns a plate or several, in which the guide
            then works; for subsampling. In an ``AutoGuideList`` the list takes it.
        options: passed to the builder, e.g. ``layers=8``; only with a builder's name.

    Raises:
        ValueError: for a model or function that is not callable, an unknown flow, affine map or base; and when the
            model is first run, naming the site, for discrete latents, supports without a bijection, subsampled plates
            with local latents, NaN in the data.
        RuntimeError: if parameters are asked for before the guide has seen the model's arguments.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model():
    ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> guide = pf.AutoFlow(model, "nice", layers=2).initialize()
    >>> guide.sample_posterior(10)["x"].shape
    torch.Size([10, 3])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        flow: FlowLike = "realnvp",
        *,
        affine: str = "auto",
        base: str = "student_t",
        df: float = 15.0,
        init_loc_fn: Callable[..., Any] = initial_value,
        init_scale: float = 1.0,
        noncentred: Noncentred = (),
        cautious: bool = True,
        create_plates: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        if not callable(model):
            raise ValueError(f"model: expected a callable Pyro model, got a {type(model).__name__}.")
        if not callable(init_loc_fn):
            raise ValueError(f"init_loc_fn: expected a function of a site, got a {type(init_loc_fn).__name__}.")
        if create_plates is not None and (isinstance(create_plates, pyro.plate) or not callable(create_plates)):
            raise ValueError(
                "create_plates: expected a function of the model's arguments that returns plates, "
                f"got a {type(create_plates).__name__}."
            )
        AutoGuide.__init__(self, model, create_plates=create_plates)
        self._recipe = latent_recipe(flow, options, affine=affine, base=base, df=df)
        self._init_loc_fn = init_loc_fn
        self._init_scale = _checks.positive("init_scale", init_scale)
        self._noncentred = noncentred
        self._cautious = cautious
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._moved_to: dict[str, Any] = {}
        self.structure: Structure | None = None
        self.plates: dict[str, Any] = {}
        self._in_store = False

    # setting up -----------------------------------------------------------------------------------------------------

    def initialize(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Run the model once on its arguments and make the parameters, so that an optimiser can be built."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
            if self.master is None:
                with poutine.block():
                    self._create_plates(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        structure = read_structure(self.model, args, kwargs, self._init_loc_fn).noncentre(self._noncentred)
        self._arguments = (args, kwargs)
        self._set_structure(structure)
        if self.master is not None:
            self.master()._check_prototype(self.prototype_trace)
        like = torch.zeros((), **{"dtype": structure.dtype, "device": structure.device, **self._moved_to})
        loc = self._init_loc().to(like)
        self.flow = self._build(structure.dim).to(like)
        self.start_at(loc, self._init_scale * torch.ones_like(loc))

    def _init_loc(self) -> Tensor:
        """The prototype run's values, unconstrained (D,), without entries that are masked out."""
        nodes, latents = messages(self.prototype_trace), self._known_structure.latents
        sites = [(latent, nodes[latent.name]) for latent in latents]
        return torch.cat([latent.flatten(site["value"], site["fn"]) for latent, site in sites])

    def _set_structure(self, structure: Structure) -> None:
        """Keep what the guide needs of the prototype run: latent sites only, no data, nothing of a graph."""
        trace = poutine.Trace()
        for latent in structure.latents:
            site = messages(structure.trace)[latent.name]
            kept = ("name", "type", "fn", "value", "is_observed", "infer", "cond_indep_stack", "scale", "mask")
            trace.add_node(latent.name, args=(), kwargs={}, **{key: site[key] for key in kept})
        self.structure = replace(structure, trace=trace, observed={})
        self.prototype_trace = trace
        self.latent_dim = structure.dim
        self._unconstrained_shapes = {latent.name: latent.unconstrained_shape for latent in structure.latents}
        self._cond_indep_stacks = {name: site["cond_indep_stack"] for name, site in trace.nodes.items()}
        frames = [frame for stack in self._cond_indep_stacks.values() for frame in stack]
        self._prototype_frames = {frame.name: frame for frame in frames}

    def _build(self, dim: int) -> Flow:
        built = self._recipe.build_for_latents(dim)
        return built.slow() if self._cautious else built

    @classmethod
    def of(
        cls,
        flow: Flow | FlowMixture,
        structure: Structure,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> AutoFlow:
        """Return the guide that holds this flow, or mixture of flows, over the latents of ``structure``.

        The model is not run. With a mixture, the guide's distribution is the mixture, and has no transform.
        """
        guide = cls(model, flow if isinstance(flow, Flow) else flow.members[0], affine="none", cautious=False)
        guide._noncentred = structure.noncentred
        guide._arguments = (args, dict(kwargs or {}))
        guide._set_structure(structure)
        with poutine.block():
            guide._create_plates(*args, **guide._arguments[1])
        guide.flow = flow  # type: ignore[assignment]
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
        """A tensor of the dtype and on the device of the flow."""
        return next(self._flow.parameters(), self._flow._like)

    @property
    def _single(self) -> Flow:
        if isinstance(self._flow, FlowMixture):
            raise ValueError(
                "guide: a mixture of flows has no transform from one base distribution. Use get_posterior(), or fit "
                "with runs=1."
            )
        return self._flow

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self._flow  # noqa: B018  (raises before the first run)
        return super().named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._flow  # noqa: B018
        self._catch_up()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._flow  # noqa: B018
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> AutoFlow:
        """Remember a move (``to``, ``double``, ``cuda``) that comes before the parameters: its dtype, its device."""
        if self.prototype_trace is None:
            single, double = (fn(torch.zeros((), dtype=dtype)) for dtype in (torch.float32, torch.float64))
            if single.dtype == double.dtype:
                self._moved_to["dtype"] = single.dtype
            if single.device != torch.zeros(()).device:
                self._moved_to["device"] = single.device
        return super()._apply(fn, recurse)

    # copies ----------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Callable[..., Any]:
        if self._model is None:
            raise RuntimeError("this guide was loaded without its model; give it one with guide.attach(model, *args).")
        return self._model[0]

    def attach(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> AutoFlow:
        """Give a loaded guide its model back (pickles hold none)."""
        self._model = (model,)
        self._arguments = (args, kwargs)
        return self

    def __getstate__(self) -> dict[str, Any]:
        modules = self.__dict__["_modules"].values()
        for tensor in (tensor for module in modules for tensor in module.state_dict(keep_vars=True).values()):
            tensor.__dict__.pop("unconstrained", None)  # Pyro's weak reference
        state = self.__dict__.copy()
        state.update(_model=None, master=None, plates={}, create_plates=None, _arguments=((), {}), _in_store=False)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFlow:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        new.__dict__.update(_model=self._model, create_plates=self.create_plates, _arguments=self._arguments)
        return new

    # Pyro's protocol -------------------------------------------------------------------------------------------------

    def get_base_dist(self) -> dist.TorchDistribution:
        return self._single.base_distribution()

    def get_transform(self, *args: Any, **kwargs: Any) -> Bound:
        return Bound(self._single.bijection)

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """Return the distribution of the unconstrained vector."""
        self._catch_up()
        return self._flow()

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draw the unconstrained vector, as the auxiliary site of Pyro's guides."""
        name = f"_{self._pyro_name}_latent"
        return pyro.sample(name, self._flow(), infer={"is_auxiliary": True})

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        for site in self._built_structure.latents:
            yield messages(self.prototype_trace)[site.name], site.unconstrained(latent)

    @property
    def _built_structure(self) -> Structure:
        self._flow  # noqa: B018
        return self._known_structure

    @property
    def _known_structure(self) -> Structure:
        assert self.structure is not None
        return self.structure

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._register()
        z = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        placed = place_all(self._built_structure, z, lambda: self.model(*args, **kwargs))
        result = {}
        for latent in self._built_structure.latents:
            value, ladj = placed[latent.name]
            density = 0.0 if poutine.get_mask() is False else -ladj
            with ExitStack() as stack:
                for frame in self._cond_indep_stacks[latent.name]:
                    stack.enter_context(plates[frame.name])
                delta = dist.Delta(value, log_density=density, event_dim=latent.event_dim)
                result[latent.name] = pyro.sample(latent.name, delta)
        return result

    def _register(self) -> None:
        """Tell Pyro of the flow's parameters; make the store hold the very tensors of this guide.

        What the store holds under our names is either another guide's (then ours replaces it) or was loaded into the
        store (then we take its values over). The store holds the buffers too, m and L among them: without them the
        parameters, which are relative to the start, would mean something else in another guide.
        """
        tensors = self._named_tensors()
        if not _is_module_local_param_enabled():
            self._take_over(tensors)
            for full, tensor in tensors.items():
                _place(full, tensor)
            self._in_store = True
        for full, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                # a param statement as pyro.param makes it, past the store's look-up and transform of real numbers
                tensor.unconstrained = weakref.ref(tensor)  # type: ignore[attr-defined]
                _param_statement(full, tensor, constraint=constraints.real, name=full)

    def _named_tensors(self) -> dict[str, Tensor]:
        """Return the flow's parameters and buffers by their names in Pyro's store."""
        prefix = self._pyro_get_fullname("flow")
        state = self._flow.state_dict(keep_vars=True)
        return {param_with_module_name(prefix, name): tensor for name, tensor in state.items()}

    def _take_over(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the values that were loaded into the store under these names, and put the tensors there.

        Parameters that come without the buffers of small steps were saved without small steps.
        """
        store = pyro.get_param_store()
        loaded = [full for full, tensor in tensors.items() if _was_loaded(full, tensor)]
        for full, tensor in tensors.items():
            if full in loaded:
                _copy_stored(full, tensor, store._params[full])
                _place(full, tensor)
            elif loaded and full not in store._params and full.rpartition(".")[2] in UNSLOWED:
                tensor.fill_(UNSLOWED[full.rpartition(".")[2]])

    def _catch_up(self) -> None:
        """See to it that draws are those of values that were loaded into the store since the guide last ran."""
        if self._in_store and not _is_module_local_param_enabled():
            self._take_over(self._named_tensors())

    # the posterior, constrained --------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_posterior(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw ``n`` times from the guide: ``{name: (n, *shape)}``, constrained; uses torch's global generator.

        Model arguments are needed only if supports depend on latents and the guide was loaded from a file.
        """
        _checks.integer("n", n, 1)
        self._catch_up()
        return self._constrain(self._flow().sample((n,)), *args, **kwargs)

    def _constrain(self, z: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        structure = self._built_structure
        args, kwargs = (args, kwargs) if args or kwargs else self._arguments

        def values(row: Tensor) -> dict[str, Tensor]:
            placed = place_all(structure, row, lambda: self.model(*args, **kwargs))
            return {name: value for name, (value, _) in placed.items()}

        return _map_rows(values, z)

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        r"""Return the guide's log density of constrained latents, :math:`\log q(z) - \log|d\theta/dz|`.

        Args:
            values: ``{name: (*batch, *shape)}``, one for each latent site, with one common batch shape.
            args: the model's arguments (as in :meth:`sample_posterior`).
            kwargs: its keyword arguments.

        Raises:
            ValueError: naming the site that is missing or has the wrong shape.
        """
        structure = self._built_structure
        self._catch_up()
        args, kwargs = (args, kwargs) if args or kwargs else self._arguments
        shapes = set()
        for latent in structure.latents:
            shape = torch.as_tensor(values[latent.name]).shape if latent.name in values else None
            cut = 0 if shape is None else len(shape) - len(latent.shape)
            if shape is None or cut < 0 or shape[cut:] != latent.shape:
                got = "nothing" if shape is None else f"shape {tuple(shape)}"
                expected = f"(*batch, *{tuple(latent.shape)})"
                raise ValueError(f"values[{latent.name!r}]: expected shape {expected}, got {got}.")
            shapes.add(shape[:cut])
        if len(shapes) > 1:
            raise ValueError(f"values: expected one batch shape for all sites, got {sorted(map(tuple, shapes))}.")
        batch = shapes.pop()
        rows = {site.name: torch.as_tensor(values[site.name]).reshape(-1, *site.shape) for site in structure.latents}

        def flat(row: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            z = flatten_all(structure, row, lambda: self.model(*args, **kwargs))
            placed = place_all(structure, z, lambda: self.model(*args, **kwargs))
            return z, sum((ladj.sum() for _, ladj in placed.values()), z.new_zeros(()))

        z, ladj = _map_rows(flat, rows)
        return (self._flow().log_prob(z.to(self._like)) - ladj).reshape(batch)

    @torch.no_grad()
    def _draws(self) -> Tensor:
        """Draws for medians and quantiles, the same at each call."""
        self._catch_up()
        like = self._like
        with turn(), torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
            torch.manual_seed(0)
            return self._flow().sample((QUANTILE_DRAWS,))

    def _initialize_from_store(self, *args: Any, **kwargs: Any) -> None:
        """Make the parameters if need be, with the values that were loaded into Pyro's store, as a first run would."""
        if self.prototype_trace is None:
            self.initialize(*args, **kwargs)
            with self._pyro_context:  # from here on the parameters have names
                self._in_store = True

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the marginal medians, taken over 4000 draws of the unconstrained vector and then constrained."""
        self._initialize_from_store(*args, **kwargs)
        middle = self._draws().median(0, keepdim=True).values
        return {name: value[0] for name, value in self._constrain(middle, *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return marginal quantiles over 4000 draws, constrained: ``{name: (len(quantiles), *shape)}``."""
        self._initialize_from_store(*args, **kwargs)
        levels = torch.as_tensor(quantiles)
        if levels.dim() != 1 or not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"quantiles: expected a list of numbers between 0 and 1, got {quantiles!r}.")
        draws = self._constrain(self._draws(), *args, **kwargs)
        return {name: torch.quantile(value, levels.to(value), dim=0) for name, value in draws.items()}


def _map_rows(function: Callable[..., Any], rows: Any) -> Any:
    """Apply a function of one row to all rows of a tensor or a dict of tensors; batched where the model allows."""
    with turn(), pyro.validation_enabled(False):
        try:
            return torch.func.vmap(function)(rows)
        except RuntimeError:  # the model is run only if supports depend on latents
            count = len(tree_leaves(rows)[0])
            found = [function(tree_map(lambda column, i=i: column[i], rows)) for i in range(count)]  # type: ignore[misc]
            return tree_map(lambda *parts: torch.stack(parts), *found)


@effectful(type="param")
def _param_statement(name: str, tensor: nn.Parameter, **_: Any) -> nn.Parameter:
    return tensor


def _was_loaded(name: str, tensor: Tensor) -> bool:
    """Whether the store holds another tensor than this one under a name, and no guide put it there."""
    store = pyro.get_param_store()
    stored = store._params.get(name)
    if stored is None or stored is tensor:
        return False
    placed = _placed.get(name)
    return placed is None or placed[0]() is not stored or placed[1] is not store._constraints


def _place(name: str, tensor: Tensor) -> None:
    """Let the store hold this very tensor under a name."""
    store = pyro.get_param_store()
    if store._params.get(name) is not tensor:
        if name in store._params:
            del store[name]
        store._constraints[name] = constraints.real
        store._params[name] = tensor
        store._param_to_name[tensor] = name
        _placed[name] = weakref.ref(tensor), store._constraints


def _copy_stored(name: str, parameter: Tensor, stored: Tensor) -> None:
    if stored.shape != parameter.shape:
        raise ValueError(
            f"param store: {name!r} has shape {tuple(stored.shape)}, this guide's is {tuple(parameter.shape)}. "
            "It was saved from another guide; call pyro.clear_param_store(), or build the guide with the same settings."
        )
    with torch.no_grad():
        parameter.copy_(stored)


class AutoRealNVP(AutoFlow):
    """:class:`AutoFlow` with :func:`~pyro_flows.realnvp`: affine couplings with alternating masks. The default choice.

    Args:
        model: a Pyro model.
        layers: number of couplings.
        hidden: widths of their hidden layers.
        options: as for :class:`AutoFlow` and :func:`~pyro_flows.realnvp`.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> guide = pf.AutoRealNVP(lambda: pyro.sample("x", dist.Beta(2.0, 2.0)), layers=2)
    >>> guide.initialize().median()["x"].shape
    torch.Size([])
    """

    def __init__(
        self, model: Callable[..., Any], layers: int = 8, *, hidden: Sequence[int] = (32, 32), **options: Any
    ) -> None:
        super().__init__(model, "realnvp", layers=layers, hidden=hidden, **options)


class AutoNICE(AutoFlow):
    """:class:`AutoFlow` with :func:`~pyro_flows.nice`: additive couplings, volume-preserving up to a scale of the base.

    Args:
        model: a Pyro model.
        layers: number of couplings.
        hidden: widths of their hidden layers.
        options: as for :class:`AutoFlow` and :func:`~pyro_flows.nice`.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> guide = pf.AutoNICE(lambda: pyro.sample("x", dist.Beta(2.0, 2.0)), layers=2)
    >>> guide.initialize().median()["x"].shape
    torch.Size([])
    """

    def __init__(
        self, model: Callable[..., Any], layers: int = 4, *, hidden: Sequence[int] = (32, 32), **options: Any
    ) -> None:
        super().__init__(model, "nice", layers=layers, hidden=hidden, **options)


class AutoPlanar(AutoFlow):
    """:class:`AutoFlow` with :func:`~pyro_flows.planar`: for few dimensions and mild departures from a Gaussian.

    Args:
        model: a Pyro model.
        layers: number of planar maps.
        options: as for :class:`AutoFlow` and :func:`~pyro_flows.planar`.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> guide = pf.AutoPlanar(lambda: pyro.sample("x", dist.Beta(2.0, 2.0)), layers=2)
    >>> guide.initialize().median()["x"].shape
    torch.Size([])
    """

    def __init__(self, model: Callable[..., Any], layers: int = 16, **options: Any) -> None:
        super().__init__(model, "planar", layers=layers, **options)
