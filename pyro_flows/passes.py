"""A flow's two passes for the path gradient, layer by layer through recorded bodies, without autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_flows import bases
from pyro_flows.bodies import Body, body_of
from pyro_flows.flows import Flow
from pyro_flows.transforms.base import Bijection
from pyro_flows.transforms.chain import Chain


class Passes:
    r"""Draw with a score, then pull a cotangent of the draws back to the parameters: what one training step needs.

    The arithmetic is that of :meth:`Flow.sample_with_score` and of autograd, but each kind of layer is recorded as two
    flat graphs once (see :mod:`pyro_flows.bodies`) and then run without Python's modules and without a tape.

    Args:
        flow: an unconditional flow; its layers must keep the shape of an event.
        like: base points (S, D) of the batches to come.
        weights: the flow's parameters that are trained, in their order; the passes read these tensors, not the flow's.

    Raises:
        Exception: of any kind, if some layer cannot be recorded.
    """

    def __init__(self, flow: Flow, like: Tensor, weights: Sequence[Tensor]) -> None:
        self.flow = flow
        layers = list(_flat(flow.bijection))
        owned = [parameter for layer in layers for parameter in layer.parameters()]
        if [id(parameter) for parameter in owned] != [id(parameter) for parameter in flow.parameters()]:
            raise ValueError("layers: expected parameters that belong to one layer each.")
        left = iter(weights)
        self.layers: list[tuple[Body, list[Tensor]]] = []
        for layer in layers:
            state = [next(left) if part.requires_grad else part.detach() for part in layer.parameters()]
            self.layers.append((body_of(layer, like), [*state, *layer.buffers()]))

    @torch.no_grad()
    def sample(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Any]]:
        """Return ``z``, ``log q(z)``, the score and what :meth:`pull` needs, for base points ``x`` (S, D)."""
        log_q, score = self.flow._log_base(x), bases.score(self.flow.base, x, self.flow.df)
        tape: list[Any] = []
        for body, state in self.layers:
            y, ladj, carried, *saved = body.forward(*state, x, score)
            tape.append((x, score, *saved))
            x, score, log_q = y, carried, log_q - ladj
        return x, log_q, score, tape

    @torch.no_grad()
    def pull(self, tape: list[Any], cotangent: Tensor) -> Tensor:
        """Return the gradient of ``(cotangent * z).sum()`` along all parameters, as one vector."""
        found: list[Tensor] = []
        for (body, state), saved in zip(reversed(self.layers), reversed(tape), strict=True):
            cotangent, *gradients = body.backward(*state, *saved, cotangent)
            found += reversed(gradients)
        return torch.cat([gradient.reshape(-1) for gradient in reversed(found)])


def _flat(bijection: Bijection) -> Iterator[Bijection]:
    if isinstance(bijection, Chain):
        for layer in bijection.layers:
            yield from _flat(layer)  # type: ignore[arg-type]
    else:
        yield bijection
