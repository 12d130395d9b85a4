"""Where a layer's parameters come from: free numbers, or a network of (kept coordinates, context)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_flows import _checks

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class Free(nn.Module):
    """Parameters that depend on nothing: a vector of ``out`` numbers, zero at the start unless told otherwise."""

    def __init__(self, out: int, start: Tensor | None = None) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(out) if start is None else start.clone())

    def forward(self, kept: Tensor | None, context: Tensor | None) -> Tensor:
        return self.values


class Network(nn.Module):
    """A multilayer perceptron of (kept, context); its last layer starts at ``start`` whatever the input."""

    def __init__(
        self, kept: int, context_dim: int, out: int, hidden: Sequence[int], activation: str, start: Tensor | None = None
    ) -> None:
        super().__init__()
        sizes = [kept + context_dim, *hidden]
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(sizes):
            layers += [nn.Linear(wide, narrow), ACTIVATIONS[activation]()]
        last = nn.Linear(sizes[-1], out)
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.zeros(out) if start is None else start)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, kept: Tensor | None, context: Tensor | None) -> Tensor:
        if context is None:
            inputs = kept
        elif kept is None:
            inputs = context
        else:
            shape = torch.broadcast_shapes(kept.shape[:-1], context.shape[:-1])
            inputs = torch.cat([kept.expand(*shape, -1), context.expand(*shape, -1)], dim=-1)
        return self.layers(inputs)


def conditioner(
    kept: int,
    context_dim: int,
    out: int,
    *,
    hidden: Sequence[int] | int = (32, 32),
    activation: str = "silu",
    start: Tensor | None = None,
) -> Free | Network:
    """Return free parameters if there is nothing to condition on, a network otherwise.

    Args:
        kept: how many coordinates are conditioned on (0: none).
        context_dim: width of the context (0: none).
        out: how many numbers the layer needs.
        hidden: widths of the hidden layers.
        activation: one of ``elu``, ``relu``, ``silu``, ``softplus``, ``tanh``.
        start: the ``out`` numbers that come out before any training (default: zeros).
    """
    _checks.integer("context_dim", context_dim, 0)
    hidden = _checks.widths("hidden", hidden)
    _checks.choice("activation", activation, ACTIVATIONS)
    if kept + context_dim == 0:
        return Free(out, start)
    return Network(kept, context_dim, out, hidden, activation, start)
