"""Composition of bijections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_flows.support import checks
from pyro_flows.transforms.base import Bijection, Scored
from pyro_flows.transforms.networks import Seen, State, adopt_context_scale, seen_of


@checks.constructor
class Compose(Bijection):
    r"""Bijections one after the other: :math:`y = T_K(\dots T_1(x))`, :math:`\log|J| = \sum_k \log|J_k|`.

    Layers with ``context_dim > 0`` must agree on it; all of them see the same context. The inverse costs the inverse
    of each layer. The buffer ``context_scale``, (2, context_dim) or None, holds a location and a scale of the context:
    if it is there, layers see the standardized context. If ``context_knots``, (2, context_dim, K), is there, layers
    whose effect of it is not linear see it along lines through these knots in place of that.

    Args:
        layers: the bijections, first applied first.

    Raises:
        ValueError: if there is no layer, or shapes of events or context dimensions do not fit.

    >>> import torch, pyro_flows as pf
    >>> chain = pf.transforms.Compose([pf.transforms.Planar(2), pf.transforms.AffineCoupling(2)])
    >>> chain.forward_and_ladj(torch.zeros(5, 2))[1].shape
    torch.Size([5])
    """

    context_scale: Tensor | None
    context_knots: Tensor | None

    def __init__(self, layers: Iterable[Bijection]) -> None:
        super().__init__()
        self.register_buffer("context_scale", None)
        self.register_buffer("context_knots", None)
        stack = list(layers)
        if not stack:
            raise ValueError("layers: expected at least one Bijection, got none.")
        for layer in stack:
            if not isinstance(layer, Bijection):
                raise ValueError(f"layers: expected Bijections, got a {type(layer).__name__}.")
        if len({layer.event_dim for layer in stack}) > 1:
            raise ValueError("layers: expected one event_dim, got several.")
        widths = {layer.context_dim for layer in stack} - {0}
        if len(widths) > 1:
            raise ValueError(f"layers: expected one context_dim, got {sorted(widths)}.")
        _check_shapes(stack)
        self.layers = cast("Sequence[Bijection]", nn.ModuleList(stack))
        self.event_dim = stack[0].event_dim
        self.context_dim = widths.pop() if widths else 0

    @property
    def event_shape(self) -> torch.Size | None:
        for number, layer in enumerate(self.layers):
            if layer.event_shape is not None:
                shape: Iterable[int] = layer.event_shape
                for before in reversed([*self.layers][:number]):
                    shape = before.inverse_shape(shape)
                return torch.Size(shape)
        return None

    @constraints.dependent_property
    def domain(self) -> constraints.Constraint:
        return self.layers[0].domain

    @constraints.dependent_property
    def codomain(self) -> constraints.Constraint:
        return self.layers[-1].codomain

    def forward_shape(self, shape: Iterable[int]) -> Iterable[int]:
        for layer in self.layers:
            shape = layer.forward_shape(shape)
        return shape

    def inverse_shape(self, shape: Iterable[int]) -> Iterable[int]:
        for layer in reversed(self.layers):
            shape = layer.inverse_shape(shape)
        return shape

    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: object, **kwargs: object) -> None:
        adopt_context_scale(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _seen(self, context: Tensor | None) -> Seen:
        """Check the context, and return what layers see of it."""
        checks.context("Compose", context, self.context_dim)
        return seen_of(context, self.context_scale, self.context_knots)

    def _context(self, layer: Bijection, seen: Seen) -> Tensor | None:
        if not layer.context_dim:
            return None
        return seen.linear if layer.linear_in_context else seen.bent

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen = self._seen(context)
        first, *others = self.layers
        x, total = first.forward_and_ladj(x, self._context(first, seen))
        for layer in others:
            x, ladj = layer.forward_and_ladj(x, self._context(layer, seen))
            total = total + ladj
        return x, total

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen = self._seen(context)
        first, *others = reversed(self.layers)
        y, total = first.inverse_and_ladj(y, self._context(first, seen))
        for layer in others:
            y, ladj = layer.inverse_and_ladj(y, self._context(layer, seen))
            total = total + ladj
        return y, total

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        seen = self._seen(context)
        first, *others = self.layers
        x, total, score = first.forward_and_score(x, score, self._context(first, seen))
        for layer in others:
            x, ladj, score = layer.forward_and_score(x, score, self._context(layer, seen))
            total = total + ladj
        return x, total, score

    @torch.no_grad()
    def start_from(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        seen = self._seen(context)
        for layer in reversed(self.layers):
            y = layer.start_from(y, self._context(layer, seen))
        return y


def _check_shapes(stack: list[Bijection]) -> None:
    """Compare the shape of the event that each layer gets with the one that it expects, where both are known."""
    shape: Iterable[int] | None = None
    for number, layer in enumerate(stack):
        own = layer.event_shape
        if own is not None and shape is not None and tuple(own) != tuple(shape):
            raise ValueError(
                f"layers: layer {number} ({type(layer).__name__}) expects events of shape {tuple(own)}, "
                f"but gets {tuple(shape)} from the layer before it."
            )
        known = shape if own is None else own
        shape = None if known is None else layer.forward_shape(known)
