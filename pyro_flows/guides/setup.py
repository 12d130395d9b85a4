"""A guide that holds a flow over the latents of a model: how it is set up, and copied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.guides import AutoGuide
from torch import Tensor

from pyro_flows import _checks
from pyro_flows._fallbacks import passed_over
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.recipe import (
    FlowLike,
    affine_of,
    begin_at,
    latent_recipe,
    start_at,
)
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.reading import read_structure
from pyro_flows.model.sites import Noncentered, Structure, messages
from pyro_flows.model.start import initial_value
from pyro_flows.starts.portfolio import portfolio
from pyro_flows.starts.start import Start
from pyro_flows.transforms import DiagonalAffine, LowerTriangularAffine
from pyro_flows.transforms.networks import give_gains

AUTO, PRIOR = INITS = "auto", "prior"


@_checks.methods
class LatentGuide(AutoContinuous):
    """What a flow guide is made of; see :class:`~pyro_flows.AutoFlow`."""

    def __init__(
        self,
        model: Callable[..., Any],
        flow: FlowLike = "realnvp",
        *,
        affine: str = "auto",
        base: str = "student_t",
        df: float = 15.0,
        init: str = "auto",
        init_loc_fn: Callable[..., Any] | None = None,
        init_scale: float | None = None,
        noncentered: Noncentered = (),
        cautious: bool | str = AUTO,
        create_plates: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        if create_plates is not None and (isinstance(create_plates, pyro.plate) or not callable(create_plates)):
            raise ValueError(
                "create_plates: expected a function of the model's arguments that returns plates, "
                f"got a {type(create_plates).__name__}."
            )
        AutoGuide.__init__(self, model, create_plates=create_plates)
        self._recipe = latent_recipe(flow, options, affine=affine, base=base, df=df)
        _checks.choice("init", init, INITS)
        own = init_loc_fn is not None or init_scale is not None
        self._init = PRIOR if own else init
        self._init_loc_fn = initial_value if init_loc_fn is None else init_loc_fn
        self._init_scale = 1.0 if init_scale is None else _checks.positive("init_scale", init_scale)
        self._noncentered = noncentered
        self._cautious = cautious if isinstance(cautious, bool) else _checks.choice("cautious", cautious, (AUTO,))
        self._whole: Any = None  # the parameters as one vector, while PathELBO trains them
        self._paced = False  # whether PathELBO has set the unit of steps
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._moved_to: dict[str, Any] = {}
        self.structure: Structure | None = None
        self.plates: dict[str, Any] = {}
        self._in_store = False
        self._named: Any = None  # the tensors by their names in Pyro's store

    def initialize(self, *args: Any, **kwargs: Any) -> Self:
        """Run the model once on its arguments and make the parameters, so that an optimizer can be built."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
            if self.master is None:
                with poutine.block():
                    self._create_plates(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        structure = read_structure(self.model, args, kwargs, self._init_loc_fn).noncenter(self._noncentered)
        self._arguments = (args, kwargs)
        self._set_structure(structure)
        if self.master is not None:
            self.master()._check_prototype(self.prototype_trace)
        like = torch.zeros((), **{"dtype": structure.dtype, "device": structure.device, **self._moved_to})
        self.flow = self._build(structure.dim).to(like)
        start = self._best_start(*args, **kwargs) if self._init == AUTO and self.affine is not None else None
        if start is None:
            loc = self._init_loc().to(like)
            self.start_at(loc, self._init_scale * torch.ones_like(loc))
        else:
            begin_at(self._single, start.loc.to(like), start.scale.to(like))

    def _best_start(self, *args: Any, **kwargs: Any) -> Start | None:
        """Return the best of the starts of a fit; None where the model's density is not known, as with subsampling."""
        try:
            with poutine.block():
                density = LogDensity(self.model, args, kwargs, noncentered=self._noncentered)
                return portfolio(density, seed=0)[0]
        except Exception as error:  # a model's own code may raise anything
            passed_over("the guide starts at the prior", error)
            return None

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
        self.structure = replace(structure, trace=trace, drawn=None, observed={})
        self.prototype_trace = trace
        self.latent_dim = structure.dim
        self._unconstrained_shapes = {latent.name: latent.unconstrained_shape for latent in structure.latents}
        self._cond_indep_stacks = {name: site["cond_indep_stack"] for name, site in trace.nodes.items()}
        frames = [frame for stack in self._cond_indep_stacks.values() for frame in stack]
        self._prototype_frames = {frame.name: frame for frame in frames}

    def _build(self, dim: int) -> Flow:
        built = self._recipe.build_for_latents(dim)
        if self._cautious:
            built.slow()
        if self._cautious == AUTO:
            give_gains(built)
        return built

    @classmethod
    def of(
        cls,
        flow: Flow | FlowMixture,
        structure: Structure,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
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

    @property
    def _built_structure(self) -> Structure:
        self._flow  # noqa: B018
        return self._known_structure

    @property
    def _known_structure(self) -> Structure:
        assert self.structure is not None
        return self.structure

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Remember a move (``to``, ``double``, ``cuda``) that comes before the parameters: its dtype, its device."""
        if self.prototype_trace is None:
            single, double = (fn(torch.zeros((), dtype=dtype)) for dtype in (torch.float32, torch.float64))
            if single.dtype == double.dtype:
                self._moved_to["dtype"] = single.dtype
            if single.device != torch.zeros(()).device:
                self._moved_to["device"] = single.device
        return super()._apply(fn, recurse)

    @property
    def model(self) -> Callable[..., Any]:
        """The model.

        Raises:
            RuntimeError: for a guide that was loaded without it.
        """
        if self._model is None:
            raise RuntimeError("this guide was loaded without its model; give it one with guide.attach(model, *args).")
        return self._model[0]

    def attach(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Self:
        """Give a loaded guide its model back (pickles hold none)."""
        self._model = (model,)
        self._arguments = (args, kwargs)
        return self

    def __getstate__(self) -> dict[str, Any]:
        modules = self.__dict__["_modules"].values()
        if self._whole is not None:  # or each parameter would be saved with the memory of all
            self._whole.release()
        for tensor in (tensor for module in modules for tensor in module.state_dict(keep_vars=True).values()):
            tensor.__dict__.pop("unconstrained", None)  # Pyro's weak reference
        state = self.__dict__.copy()
        state.update(
            _model=None,
            _whole=None,
            _named=None,
            master=None,
            plates={},
            create_plates=None,
            _arguments=((), {}),
            _in_store=False,
        )
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        new.__dict__.update(_model=self._model, create_plates=self.create_plates, _arguments=self._arguments)
        return new
