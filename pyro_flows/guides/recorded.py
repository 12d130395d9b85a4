"""A flow's map and its gradient as graphs, for the steps of a guide in SVI: a tape of autograd takes longer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.autograd.function import once_differentiable

from pyro_flows.guides.store import Whole
from pyro_flows.model.graphs import Runner, agree, record
from pyro_flows.support.numbers.tensors import nearby, pull
from pyro_flows.support.process.fallbacks import Tried, passed_over
from pyro_flows.transforms import Bijection, Bound
from pyro_flows.transforms.base import hooked

MOST_RECORDED = 4  # maps of a guide, each for another number of points
MOST_PRODUCTS = 10_000_000  # of points and parameters: beyond, torch's products of matrices take less time than graphs
KNOWN = "pyro_flows", "torch"  # packages whose layers do at each step what they did when they were recorded

Maps = dict[object, "RecordedMap | None"]


class RecordedBound(Bound):
    r"""A :class:`Bound` that maps points forward by graphs, recorded when so many points come for the first time.

    One graph is the map and its log derivative, the other their gradient along the parameters, which are one vector.
    The layers themselves are used if one is of another package, if one has hooks, if graphs give other numbers, if the
    flow is large, and if the number of points, or what is no parameter, has changed often.

    Args:
        bijection: of vectors, without a context.
        whole: its trained parameters.
        maps: what was recorded at earlier steps.

    >>> import torch, pyro_flows as pf
    >>> from pyro_flows.guides.recorded import RecordedBound
    >>> from pyro_flows.guides.store import Whole
    >>> layer, x = pf.transforms.AffineCoupling(2), torch.ones(3, 2)
    >>> torch.equal(RecordedBound(layer, Whole([*layer.parameters()]), {})(x), layer.condition(None)(x))
    True
    """

    def __init__(self, bijection: Bijection, whole: Whole, maps: Maps) -> None:
        super().__init__(bijection)
        self._whole, self._maps = whole, maps

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.requires_grad or torch._C._get_tracing_state() or _functorch.peek_interpreter_stack() is not None:
            return super()._forward(x)
        points, trained = x.reshape(-1, x.shape[-1]), set(map(id, self._whole.parameters))
        parts = [part for held in self._held for part in held.values() if part is not None]
        fixed = ((id(part), part._version) for part in parts if id(part) not in trained)
        key = id(self.bijection), self._whole, points.shape, points.dtype, *fixed
        if key not in self._maps and len(self._maps) < MOST_RECORDED:
            self._maps[key] = _recorded(self.bijection, self._whole, points, parts)
        found = self._maps.get(key)
        if found is None:
            return super()._forward(x)
        both: Tensor = _Map.apply(found, points, self._whole.vector)
        return both[:, :-1].reshape(x.shape), both[:, -1].reshape(x.shape[:-1])


def _recorded(bijection: Bijection, whole: Whole, x: Tensor, parts: list[Tensor]) -> RecordedMap | None:
    """Return the map by graphs; None if the layers have to be called."""
    if len(x) * whole.vector.numel() > MOST_PRODUCTS:
        return None
    for module in bijection.modules():
        own = type(module).__module__.partition(".")[0] in KNOWN
        if not own or hooked(module):
            return None
    with Tried() as tried:
        return RecordedMap(bijection, whole, x, parts)
    assert tried.error is not None
    passed_over("the flow of a guide is not recorded", tried.error)
    return None


class RecordedMap:
    """A bijection's map and log derivative at points like ``x`` (S, D), with gradients along its trained parameters.

    Its other ``parts``, such as masks and scales of the start, are constants.

    Raises:
        Exception: of any kind, if a layer cannot be recorded, or if the graphs give other numbers.
    """

    def __init__(self, bijection: Bijection, whole: Whole, x: Tensor, parts: list[Tensor]) -> None:
        self._kept = bijection, parts  # so that nothing else comes to have their ids
        called = _Called(bijection)
        named = [*called.named_parameters(remove_duplicate=False)]
        names = {id(parameter): name for name, parameter in named}
        if len(names) < len(named):
            raise ValueError("layers: expected parameters that belong to one layer each.")
        sizes = [part.numel() for part in whole.parameters]

        def along(vector: Tensor, x: Tensor) -> tuple[Tensor]:
            split = zip(whole.parameters, vector.split(sizes), strict=True)
            own = {names[id(part)]: value.view(part.shape) for part, value in split if id(part) in names}
            return (torch.func.functional_call(called, own, (x,)),)

        def gradient(vector: Tensor, x: Tensor, cotangent: Tensor) -> tuple[Tensor]:
            leaf = vector.detach().requires_grad_()
            with torch.enable_grad():
                (found,) = pull(*along(leaf, x), cotangent, [leaf])
            return (found,)

        vector, cotangent = whole.vector.detach(), torch.cat([x, x[:, :1]], -1)
        with torch.no_grad():
            self.forward = Runner(record(along, vector, x))
            self.backward = Runner(record(gradient, vector, x, cotangent))
            for run, function, given in ((self.forward, along, ()), (self.backward, gradient, (nearby(cotangent),))):
                inputs = vector, nearby(x), *given
                if not agree(run(*inputs), function(*inputs)):
                    raise RuntimeError("the graphs gave other numbers than the layers")


class _Called(nn.Module):
    """Makes the map and its log derivative, as one tensor (S, D + 1), the call that ``functional_call`` makes."""

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection

    def forward(self, x: Tensor) -> Tensor:
        y, ladj = self.bijection.forward_and_ladj(x)
        return torch.cat([y, ladj.unsqueeze(-1)], -1)


class _Map(torch.autograd.Function):
    """A recorded map as a node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, recorded: RecordedMap, x: Tensor, vector: Tensor) -> Tensor:
        (both,) = recorded.forward(vector.detach(), x)
        ctx.recorded = recorded
        ctx.save_for_backward(x, vector)
        return both.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, None, Tensor]:
        x, vector = ctx.saved_tensors
        (found,) = ctx.recorded.backward(vector.detach(), x, cotangent.contiguous())
        return None, None, found.clone()
