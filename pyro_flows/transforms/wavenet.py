"""A network of signals: dilated gated convolutions, conditioned on frames such as those of a spectrogram."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import glu

from pyro_flows._tensors import broadcast
from pyro_flows.transforms.networks import ACTIVATIONS, Network, Paced, one_width

TAPS = 3


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
