"""Where a layer's parameters come from: free numbers, or a network of (kept coordinates, context)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import glu

from pyro_flows.support import checks
from pyro_flows.support.arguments import widths
from pyro_flows.support.numbers.tensors import broadcast
from pyro_flows.transforms.networks import (
    ACTIVATIONS,
    NETWORKS,
    Dense,
    Free,
    Linear,
    Network,
    Paced,
    Robust,
    beside,
    one_width,
)

Pull = Callable[[Tensor], Tensor]
TAPS = 3  # of the convolutions of a WaveNet


class Gated(nn.Module):
    r"""One layer of a WaveNet that is not causal: :math:`h + B\,(u \odot \sigma(v))`, (u, v) by a dilated convolution.

    What a frame says, ``about`` (N, 2 W, F), is added to (u, v) at all times of the frame.
    """

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(width, 2 * width, TAPS, dilation=dilation, padding="same")
        self.back = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, about: Tensor | None) -> Tensor:
        mixed = self.mix(x)
        if about is not None:
            mixed = (mixed.unflatten(-1, (about.shape[-1], -1)) + about[..., None]).flatten(-2)
        found: Tensor = x + self.back(glu(mixed, dim=-2))
        return found


class WaveNet(Network):
    """Dilated gated convolutions of kept channels (C, P), a layer for each entry of ``hidden``, dilated by 1, 2, 4, ...

    The context holds the features of ``frames`` frames, one after the other, which share P evenly. A convolution over
    frames prepares them once; each gated layer adds what a product makes of them, and the last layer sees them beside
    the hidden units. So they cost little: there are fewer frames than times. Without kept channels, only they count.
    """

    def __init__(
        self,
        kept: int,
        context_dim: int,
        out: int,
        hidden: Sequence[int],
        activation: str,
        start: Tensor | None = None,
        *,
        frames: int = 1,
    ) -> None:
        Paced.__init__(self)
        width, wide, self.frames = one_width(hidden), context_dim // frames, frames
        last = nn.Conv1d(width * ((kept > 0) + (wide > 0)), out, 1)
        gates = [Gated(width, 2**number) for number in range(len(hidden))] if kept else []
        self.inward = nn.Conv1d(kept, width, 1) if kept else None
        over_frames = nn.Conv1d(wide, width, TAPS, padding="same") if wide else None
        self.features = None if over_frames is None else nn.Sequential(over_frames, ACTIVATIONS[activation]())
        self.additions = nn.Conv1d(width, 2 * width * len(gates), 1) if wide and gates else None
        self.layers = nn.Sequential(*gates, self._starting_at(last, start))

    def forward(self, kept: Tensor | None, context: Tensor | None) -> Tensor:
        assert kept is not None
        batch = kept.shape[:-2] if context is None else broadcast(kept.shape[:-2], context.shape[:-1])
        count = math.prod(batch)
        kept = kept.expand(*batch, *kept.shape[-2:]).reshape(count, *kept.shape[-2:])
        found, additions = [], None
        if context is not None and self.features is not None:
            rows = context.expand(*batch, -1).reshape(count, self.frames, context.shape[-1] // self.frames)
            features = self.features(rows.mT)
            additions = None if self.additions is None else self.additions(features)
            found = [features.repeat_interleave(kept.shape[-1] // self.frames, -1)]
        if self.inward is not None:
            found = [self._gated(self.inward(kept), additions), *found]
        out = self.layers[-1](torch.cat(found, -2))
        out = out if self.gain is None else out * self.gain.reshape(-1, 1)
        return out.reshape(*batch, *out.shape[-2:])

    def _gated(self, x: Tensor, additions: Tensor | None) -> Tensor:
        gates = [*self.layers][:-1]
        each = [None] * len(gates) if additions is None else additions.chunk(len(gates), -2)
        for gate, addition in zip(gates, each, strict=True):
            x = gate(x, addition)
        return x


KINDS: dict[int, dict[str, type[Network]]] = {**NETWORKS, 2: {"wavenet": WaveNet}}


def bounded(raw: Tensor, bound: float) -> Tensor:
    r"""Return :math:`B \tanh(r / B)` for a bound B: near 0 the identity, smooth, within (-B, B).

    As :math:`2 B\,\sigma(2 r / B) - B`, which is the same up to rounding of B, exact at 0, and takes an eighth of the
    time: torch's tanh is slow.
    """
    return torch.rsub(torch.sigmoid(raw * (2.0 / bound)), -bound, alpha=-2.0 * bound)


def bounded_back(out: Tensor, bound: float, cotangent: Tensor) -> Tensor:
    """Return the vector-Jacobian product of :func:`bounded`, from what it returned."""
    return torch.addcmul(cotangent, cotangent, out.square(), value=-1.0 / bound**2)


def conditioner(
    kept: int,
    context_dim: int,
    out: int,
    *,
    hidden: Sequence[int] | int = (32, 32),
    activation: str = "silu",
    network: str | None = None,
    axes: int = 1,
    frames: int = 1,
    sides: Sequence[int] = (),
    start: Tensor | None = None,
) -> Free | Network:
    """Return free parameters if there is nothing to condition on, a network otherwise.

    Args:
        kept: how many coordinates (channels of a signal or image) are conditioned on (0: none).
        context_dim: width of the context (0: none).
        out: how many numbers (channels) the layer needs.
        hidden: widths of the hidden layers, or of residual blocks.
        activation: one of ``elu``, ``relu``, ``silu``, ``softplus``, ``tanh``.
        network: ``mlp`` (the default), ``robust`` or ``residual`` for vectors, ``wavenet`` for signals,
            ``convolution`` (the default), ``robust``, ``residual`` or ``dense`` for images.
        axes: of an event: 1 of vectors, 2 of signals, 3 of images.
        frames: how many parts of a signal have a context of their own.
        sides: height and width of an image.
        start: the ``out`` numbers that come out before any training (default: zeros).
    """
    checks.integer("context_dim", context_dim, 0)
    hidden = widths("hidden", hidden)
    checks.choice("activation", activation, ACTIVATIONS)
    kinds = KINDS[axes]
    kind = kinds[next(iter(kinds)) if network is None else checks.choice("network", network, kinds)]
    if kept + context_dim == 0:
        return Free(out, start)
    if issubclass(kind, WaveNet):
        return kind(kept, context_dim, out, hidden, activation, start, frames=frames)
    if issubclass(kind, Dense):
        return kind(kept, context_dim, out, hidden, activation, start, sides=sides)
    return kind(kept, context_dim, out, hidden, activation, start)


# ---- the way back ----------------------------------------------------------------------------------------------------

_aten = torch.ops.aten
BACK: dict[type[nn.Module], Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    nn.Linear: lambda layer, x, y, cotangent: cotangent @ layer.weight,
    Linear: lambda layer, x, y, cotangent: layer._paced(cotangent) @ layer.weight,
    nn.ELU: lambda layer, x, y, cotangent: _aten.elu_backward.default(cotangent, layer.alpha, 1.0, 1.0, False, x),
    nn.ReLU: lambda layer, x, y, cotangent: _aten.threshold_backward.default(cotangent, y, 0.0),
    nn.SiLU: lambda layer, x, y, cotangent: _aten.silu_backward.default(cotangent, x),
    nn.Softplus: lambda layer, x, y, cotangent: _aten.softplus_backward.default(
        cotangent, x, layer.beta, layer.threshold
    ),
    nn.Tanh: lambda layer, x, y, cotangent: _aten.tanh_backward.default(cotangent, y),
}  # vector-Jacobian products, from what goes in and out


def forward_and_pull(network: nn.Module, kept: Tensor, context: Tensor | None) -> tuple[Tensor, Pull]:
    """Return what a network returns, and its vector-Jacobian product along ``kept``, to be called without autograd.

    Autograd takes longer to find the way back through a few layers than they take to run, so perceptrons of plain
    layers are followed by hand. ``context`` must have the batch shape of ``kept``.
    """
    if not isinstance(network, Network) or not _is_plain(network):
        with torch.enable_grad():
            root = kept if kept.requires_grad else kept.detach().requires_grad_()
            out = network(root, context)
        return out, lambda cotangent: torch.autograd.grad(out, root, cotangent, retain_graph=True)[0]
    robust, tape = isinstance(network, Robust), []
    gain = network.gain
    out = beside(kept.asinh() if robust else kept, context)
    for layer in network.layers:
        x, out = out, layer(out)
        tape.append((layer, x, out))
    out = network._paced(out)

    def pull(cotangent: Tensor) -> Tensor:
        cotangent = cotangent if gain is None else cotangent * gain
        for layer, x, y in reversed(tape):
            cotangent = BACK[type(layer)](layer, x, y, cotangent)
        if context is not None:
            cotangent = cotangent[..., : kept.shape[-1]]
        return cotangent * (kept.square() + 1.0).rsqrt() if robust else cotangent

    return out, pull


def _is_plain(network: Network) -> bool:
    """Whether the way back is known, and nobody hooks into the way there."""
    if type(network) not in (Network, Robust):
        return False
    layers = [*network.layers]
    return all(type(layer) in BACK for layer in layers) and not any(map(_is_hooked, [network, network.layers, *layers]))


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
