"""The ELBO with path gradients, for Pyro's own SVI."""

from __future__ import annotations

import copy
import math
import operator
import weakref
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine import runtime
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pyro_flows.flows.flow import Flow
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.guides.setup import AUTO
from pyro_flows.guides.store import in_svi
from pyro_flows.guides.svi.pace import Pace
from pyro_flows.inference.training.flow_graphs import Passes, gradient_of, points
from pyro_flows.inference.training.objectives import BasePoints, pulled
from pyro_flows.model.batching import quiet, values_and_grads
from pyro_flows.model.graphs import Runner, Stitcher, agree, record
from pyro_flows.model.log_density import LogDensity, PartialLogDensity
from pyro_flows.model.sites import ROWS
from pyro_flows.support import checks
from pyro_flows.support.numbers.cache import Cache
from pyro_flows.support.process.fallbacks import Tried, fallback
from pyro_flows.transforms.networks import Paced

Program = Callable[..., object]  # a model or a guide
Keywords = dict[str, object]
STEPS_KEPT, MOST_RECORDED = 8, 12  # graphs of one guide, by the shapes of data; that are made in all
CHECKED_EVERY = 20  # steps by a graph, so that a run of the model adds a twentieth to their time
CHANGED = 0.1, 1e-3  # nats, and part of a log density: more than rounding in single precision


@checks.constructor
class PathELBO(ELBO):
    r"""ELBO whose gradient leaves out the score term ("sticking the landing"), for Pyro's ``SVI``.

    .. math:: \nabla_\theta = -\frac 1S \sum_i \big(\nabla_z \log \tilde p(z_i) - \nabla_z \log q_\theta(z_i)\big)^\top
              \partial_\theta z_\theta(\epsilon_i), \qquad z_\theta(\epsilon_i) \sim q_\theta

    The term that is left out has mean zero, and noise that does not go away as q comes close to the posterior. A step
    is recorded once as a graph of tensor operations, with the tensors among the model's arguments as inputs, so that
    minibatches go through it, also those of which the arguments give the rows (``subsample=``). A draw whose gradient
    is five times as long as the median one is shortened, and a draw that is not finite is left out. A step whose
    gradient is not finite adds none.

    Unless the guide has a ``cautious`` of its own, the loss learns how far steps move the flow (:class:`Pace`): the
    optimizer's learning rate has next to no effect, and steps become short near the optimum.

    It works with :class:`AutoFlow` and its subclasses, and with any optimizer, scheduler or clipping. Other guides,
    steps inside of a handler (``with poutine.scale(scale=0.1):``), and models with parameters of their own, random
    subsampling inside, latents that come and go, or arguments that are neither tensors nor plain numbers and words, get
    :class:`pyro.infer.Trace_ELBO` with as many particles. ``reason`` then says why, and the logger ``pyro_flows`` too.

    A graph holds what the model reads besides its arguments, such as an attribute or a global tensor, at its value when
    it was recorded. One draw of each twentieth step is compared with the model, and a graph that differs by more than
    0.1 nats is recorded anew. So pass what changes as an argument, and numbers that change at each step as tensors.

    Cost of a step: one pass of the flow each way, and one gradient of the model for each particle.

    Args:
        num_particles: S, draws of a step.

    Attributes:
        reason: why the last step was taken by ``Trace_ELBO``, or without a graph; None if it was recorded.

    Raises:
        ValueError: if ``num_particles`` is no positive number.

    References: Roeder, Wu and Duvenaud 2017 (arXiv 1703.09194); Vaitl et al. 2022 (arXiv 2207.08219).

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)
    >>> guide = pf.AutoRealNVP(model, layers=2)
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=pf.PathELBO(num_particles=8))
    >>> svi.step(torch.ones(2)) > 0
    True
    """

    def __init__(self, num_particles: int = 16) -> None:
        super().__init__(num_particles=num_particles)
        self.reason: str | None = None
        self._kept: weakref.WeakKeyDictionary[Program, _Kept] = weakref.WeakKeyDictionary()
        self._plain = Trace_ELBO(num_particles=num_particles)

    def loss(
        self, model: Callable[..., object], guide: Callable[..., object], *args: object, **kwargs: object
    ) -> float:
        """Return an estimate of the negative ELBO in nats, without gradients."""
        kept = self._kept_of(model, guide, args, kwargs)
        if kept is None:
            return float(self._plain.loss(model, guide, *args, **kwargs))
        terms, _ = kept.step(self.num_particles, Arguments(args, kwargs))
        self.reason = kept.reason
        return _value(terms)

    def loss_and_grads(
        self, model: Callable[..., object], guide: Callable[..., object], *args: object, **kwargs: object
    ) -> float:
        """Add the gradients to those of the guide's parameters; return an estimate of the negative ELBO in nats."""
        kept = self._to_train(model, guide, args, kwargs)
        if kept is None:
            return float(self._plain.loss_and_grads(model, guide, *args, **kwargs))
        assert isinstance(guide, AutoFlow)
        terms, gradient = self._step(kept, guide, Arguments(args, kwargs))
        if in_svi() and guide._whole is not None:  # and not beside an optimizer of torch
            guide._whole.add_gradient(gradient)
            return _value(terms)
        sizes = [parameter.numel() for parameter in kept.parameters]
        for parameter, part in zip(kept.parameters, gradient.split(sizes), strict=True):
            own = part.view_as(parameter)
            parameter.grad = own.clone() if parameter.grad is None else parameter.grad + own
        return _value(terms)

    def differentiable_loss(
        self, model: Callable[..., object], guide: Callable[..., object], *args: object, **kwargs: object
    ) -> Tensor:
        """Return an estimate of the negative ELBO in nats, whose ``backward`` gives the path gradient.

        So ``PathELBO()(model, guide)`` is a module for the optimizers and training loops of torch. Its gradient with
        respect to parameters is a constant: second derivatives are zero.
        """
        kept = self._to_train(model, guide, args, kwargs)
        if kept is None:
            return torch.as_tensor(self._plain.differentiable_loss(model, guide, *args, **kwargs))
        assert isinstance(guide, AutoFlow)
        terms, gradient = self._step(kept, guide, Arguments(args, kwargs))
        linear = torch.cat([parameter.flatten() for parameter in kept.parameters]) @ gradient
        return _value(terms) + (linear - linear.detach())

    def _step(self, kept: _Kept, guide: AutoFlow, arguments: Arguments) -> tuple[Tensor, Tensor]:
        """Return the terms of the ELBO, and the gradient to train by: of all parameters, one after another."""
        if kept.pace is not None:
            kept.pace.follow()
        terms, gradient = kept.step(self.num_particles, arguments)
        self.reason = kept.reason
        gradient = gradient if bool(torch.isfinite(gradient).all()) else torch.zeros_like(gradient)
        if kept.pace is not None:
            gradient = kept.pace(gradient)
            guide._paced = kept.pace.unit
        return terms, gradient

    def _to_train(self, model: Program, guide: Program, args: Sequence[object], kwargs: Keywords) -> _Kept | None:
        """Return :meth:`_kept_of` once the guide's parameters have their names in Pyro's store."""
        kept = self._kept_of(model, guide, args, kwargs)
        if kept is None:
            return None
        assert isinstance(guide, AutoFlow)
        with guide._pyro_context:  # parameters have names inside
            guide._register(gather=False)
        return self._kept_of(model, guide, args, kwargs)  # anew, if the store has brought other coordinates

    def _get_trace(self, model: Program, guide: Program, args: Sequence[object], kwargs: Keywords) -> Any:
        return self._plain._get_trace(model, guide, args, kwargs)

    def _kept_of(self, model: Program, guide: Program, args: Sequence[object], kwargs: Keywords) -> _Kept | None:
        """Return what is kept of a guide and its model; None, with a reason, where they need Pyro's own ELBO."""
        if any(not (isinstance(part, TraceMessenger) and part.param_only) for part in runtime._PYRO_STACK):
            self.reason = fallback("Trace_ELBO is used: a handler is around the step, and a graph has none")
            return None
        kept = self._kept.get(guide)
        if kept is None or not kept.is_of(model, guide):
            kept = self._kept[guide] = _Kept(model, guide, args, kwargs, kept)
        self.reason = kept.unfit
        return None if kept.unfit else kept


class _Kept:
    """A guide with its model's log density, and the graphs of its steps."""

    def __init__(
        self, model: Program, guide: Program, args: Sequence[object], kwargs: Keywords, before: _Kept | None
    ) -> None:
        self.model = model
        self.reason: str | None = None  # why steps are not recorded
        self.unfit: str | None = None  # why Pyro's own ELBO is needed
        with Tried() as tried:
            self._read(model, guide, args, kwargs, before)
        if tried.error is not None:
            self.unfit = fallback("Trace_ELBO is used", tried.error)

    def _read(
        self, model: Program, guide: Program, args: Sequence[object], kwargs: Keywords, before: _Kept | None
    ) -> None:
        if not isinstance(guide, AutoFlow):
            raise TypeError(f"guide: expected an AutoFlow, got {type(guide).__name__}")
        guide.initialize(*args, **kwargs)
        if not isinstance(guide._flow, Flow):
            raise TypeError("the guide is a mixture of flows")
        self.guide = weakref.ref(guide)
        self.flow, self.structure = guide._flow, guide._built_structure
        self.density: LogDensity = PartialLogDensity(model, args, kwargs, noncentered=self.structure.noncentered)
        left = set(self.density.names) - {latent.name for latent in self.structure.latents}
        if left:
            raise ValueError(f"the guide has no latents {', '.join(map(repr, sorted(left)))}")
        with torch.enable_grad(), quiet():  # a module that Pyro is not told of has parameters too
            moved = self.density.single(guide._init_loc().to(self.density.dtype)).requires_grad
        if moved or self.density.parameters():
            raise ValueError("the model has parameters of its own")
        if not self.density.batched:
            raise ValueError(self.density.reason or "the model runs draw by draw")
        self.parameters = [parameter for parameter in self.flow.parameters() if parameter.requires_grad]
        self.gains = [module for module in self.flow.modules() if isinstance(module, Paced)]
        paced = guide._cautious == AUTO and any(module.gain is not None for module in self.gains)
        self.pace = Pace(self.flow, self.parameters, unit=guide._paced) if paced else None
        self._recorded = self._taken = 0  # graphs, and steps by graphs
        if before is not None and before.unfit is None and before.flow is self.flow:  # a model in another handler
            self.pace, self._recorded = before.pace, before._recorded
        self._arguments = Arguments(args, kwargs)
        self._steps: Cache[tuple[object, ...], RecordedStep | str] = Cache(STEPS_KEPT)
        self._base: tuple[object, BasePoints] | None = None

    def is_of(self, model: Program, guide: Any) -> bool:
        """Whether the guide still has the flow and coordinates, and is trained on the model, that this was made for."""
        same = self.unfit is not None or (self.flow is guide._flow and self.structure is guide.structure)
        return self.model == model and same

    def points(self, count: int) -> Tensor:
        like = (self.parameters[0].dtype, self.parameters[0].device) if self.parameters else None
        if self._base is None or self._base[0] != like:
            self._base = like, BasePoints(self.flow)
        return self._base[1](count)[0]

    @torch.enable_grad()
    def step(self, count: int, arguments: Arguments) -> tuple[Tensor, Tensor]:
        """Return the terms of the ELBO and the gradient, by a graph if there is one for such data."""
        gains = [module.gain for module in self.gains if module.gain is not None]
        places = tuple(part.data_ptr() for part in (*self.parameters, *gains))  # where a graph reads them
        x, key = self.points(count), (count, arguments.key, places)
        found = self._steps.of(key, lambda: self._record(x, arguments))
        if isinstance(found, RecordedStep):
            self.reason = None
            terms, gradient = found(x, arguments.tensors)
            self._taken += 1
            if self._taken % CHECKED_EVERY or self._is_that_of_the_model(found.density, x, terms, arguments):
                return terms, gradient
            self._steps.clear()
            return self.step(count, arguments)
        self.reason = found
        return eager_step(self.flow, self._with(arguments), self.parameters, x)

    def _is_that_of_the_model(self, recorded: LogDensity, x: Tensor, terms: Tensor, arguments: Arguments) -> bool:
        """Whether the model has the value of a graph at the draw of the median term; its structure is not read anew."""
        middle, bare = terms.argsort()[len(terms) // 2], copy.copy(recorded)
        bare.args, bare.kwargs = arguments.with_tensors(arguments.tensors)
        z, log_q, _ = self.flow.sample_with_score(at=x[middle][None])
        with quiet():
            own = bare(z.detach()) - log_q
        return not bool((own - terms[middle]).abs() > CHANGED[0] + CHANGED[1] * own.abs())

    def _record(self, x: Tensor, arguments: Arguments) -> RecordedStep | str:
        self._recorded += 1
        if self._recorded > MOST_RECORDED:
            return fallback(
                "the step is not recorded: the model, a handler on it, what it reads besides its arguments, shapes, or "
                "arguments that are no tensors, change too often"
            )
        density = self._with(arguments)
        with Tried() as tried:
            return RecordedStep(self.flow, density, arguments, x)
        return fallback("the step is not recorded", tried.error)

    def _with(self, arguments: Arguments) -> LogDensity:
        """Return the density with these data, which is read anew where they are others."""
        known, (args, kwargs) = self._arguments, arguments.with_tensors(arguments.tensors)
        density = self.density
        if known.key != arguments.key:
            density = PartialLogDensity(self.model, args, kwargs, noncentered=self.structure.noncentered)
        elif not all(map(operator.is_, known.tensors, arguments.tensors)):
            density = density.beside(args, kwargs)
        ours, theirs = self.structure.layout, density.structure.layout
        for mine, other in zip_longest(ours, theirs):
            if mine != other:
                expected = f"site {mine[0]!r} with {mine[1]} coordinates" if mine else "no further site"
                got = f"{other[0]!r} with {other[1]}" if other else "none"
                raise ValueError(
                    f"guide: expected {expected}, as in the first run, got {got}. A site without data is a latent. "
                    f"{ROWS} Models have to draw their latents in one order."
                )
        self._arguments, self.density = arguments, density
        return density


def _value(terms: Tensor) -> float:
    """Return the negative mean of the terms that are finite; NaN if none is."""
    finite = terms[torch.isfinite(terms)]
    return -float(finite.mean()) if len(finite) else math.nan


# one step as a recorded graph, with the data as inputs ----------------------------------------------------------------

STEEP = 5.0  # times the median length of a draw's gradient: with few draws, one would decide a step
Shapes = tuple[object, ...]
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)  # what is compared by how it is written


class Arguments:
    """A model's arguments: their tensors, which are inputs of a graph, and all else, which a graph depends on."""

    def __init__(self, args: Sequence[object], kwargs: dict[str, object]) -> None:
        leaves, self.form = tree_flatten((tuple(args), kwargs))
        self.where = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors = [leaves[place] for place in self.where]
        self.rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for leaf in self.rest:
            if not isinstance(leaf, PLAIN):
                raise TypeError(f"an argument is a {type(leaf).__name__}, and no tensor")

    @property
    def key(self) -> Shapes:
        """What arguments have to agree in to go through one graph."""
        shapes = tuple((part.shape, part.dtype, part.device) for part in self.tensors)
        return (str(self.form), shapes, tuple(map(repr, self.rest)))

    def with_tensors(self, tensors: Sequence[Tensor]) -> tuple[tuple[object, ...], dict[str, object]]:
        """Return arguments and keyword arguments with other tensors in the place of these."""
        leaves = list(self.rest)
        for place, value in zip(self.where, tensors, strict=True):
            leaves[place] = value
        form: TreeSpec = self.form
        args, kwargs = tree_unflatten(leaves, form)
        return args, kwargs


class RecordedStep:
    """From base points and data to the terms of the ELBO and the path gradient, as one graph.

    The graph reads the parameters of the flow, an unconditional one, where they are, so an optimizer changes them in
    place. The tensors among the model's arguments are inputs. ``like`` are base points (S, D) of the steps to come. An
    error of any kind says that a layer or the model cannot be recorded, or that the graph gives other values than they.
    """

    def __init__(self, flow: Flow, density: LogDensity, arguments: Arguments, like: Tensor) -> None:
        self.flow, self.density = flow, density
        self.parameters = [parameter for parameter in flow.parameters() if parameter.requires_grad]
        self.passes = Passes(flow, like, [parameter.detach() for parameter in self.parameters])
        self._run = Runner(self._graph(arguments))
        self._check(like, arguments.tensors)

    def __call__(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the terms (S,) at base points (S, D) with these data, and the gradient (W,) of the loss."""
        terms, gradient = self._run(*self.passes.state, x, *tensors)
        return terms, gradient

    def _graph(self, arguments: Arguments) -> fx.GraphModule:
        kind, whole, bare = self.passes.kind, Stitcher(), copy.copy(self.density)

        def scored(z: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            bare.args, bare.kwargs = arguments.with_tensors(tensors)
            with torch.no_grad(), quiet():
                return values_and_grads(bare.single, z)

        state, x = kind.inputs(whole), whole.input(kind.like)
        given = [whole.input(part) for part in arguments.tensors]
        z, log_q, score_q, tape = kind.add_forward(whole, state, x)
        with torch.no_grad():
            examples = [self.flow.sample_with_score(at=points(kind.like))[0], *arguments.tensors]
        log_p, score_p = whole.add(record(scored, *examples), [z, *given])
        none = torch.zeros_like(kind.like[:, 0])
        values = [none.to(log_p.meta["val"].dtype), kind.like.clone(), none.clone(), kind.like.clone()]
        pull, terms = whole.add(record(_pull, *values), [log_p, score_p, log_q, score_q])
        return whole.finish([terms, kind.add_backward(whole, state, tape, pull)])

    def _check(self, like: Tensor, tensors: Sequence[Tensor]) -> None:
        """Compare a step with autograd's and the model's own."""
        x = 0.5 * points(like)
        found = self(x, tensors)
        if not agree(found, eager_step(self.flow, self.density, self.parameters, x)):
            raise RuntimeError("the graph gave other values than the flow and the model")


def eager_step(flow: Flow, density: LogDensity, parameters: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what :class:`RecordedStep` returns, by autograd and by the model itself."""
    z, log_q, score_q = flow.sample_with_score(at=x)
    log_p, score_p = density.unrecorded(z)
    pull, terms = _pull(log_p, score_p, log_q, score_q)
    return terms, gradient_of((pull * z).sum(), parameters)


def _pull(log_p: Tensor, score_p: Tensor, log_q: Tensor, score_q: Tensor) -> tuple[Tensor, Tensor]:
    none = torch.zeros_like(log_q)
    found = pulled(log_p.to(log_q.dtype), score_p.to(log_q.dtype), log_q, score_q, none, steep=STEEP)
    return found[0], found[1]
