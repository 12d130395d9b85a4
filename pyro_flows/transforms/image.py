"""Maps that rearrange signals (C, T) and images (C, H, W): space to depth, and several scales."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from pyro_flows.support import checks
from pyro_flows.transforms.base import Bijection, Scored


@checks.constructor
class Squeeze(Bijection):
    r"""Space to depth: each block of 2 x 2 pixels becomes one pixel of four times the channels; :math:`\log|J| = 0`.

    (C, H, W) becomes (4 C, H/2, W/2). The channels of a block's pixels follow one another in the order top left, bottom
    right, top right, bottom left, so each half of them is a checkerboard. ``Squeeze(shape).inv`` is depth to space.

    Of a signal, k samples become one: (C, T) becomes (k C, T/k). Every other sample of a block makes the first half of
    the channels, every other one of the rest a half of what is left, and so on.

    Cost: a copy of the signal or image.

    Args:
        dim: the shape (C, T) or (C, H, W) of x, with T divisible by k, or H and W by 2.
        group: k, for signals.

    Raises:
        ValueError: for a length, height or width that is not divisible, or an input of another shape.

    Reference: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, ICLR 2017
    (arXiv 1605.08803), section 3.6.

    >>> import torch, pyro_flows as pf
    >>> pf.transforms.Squeeze((1, 2, 2))(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])).flatten().tolist()
    [1.0, 4.0, 2.0, 3.0]
    >>> pf.transforms.Squeeze((1, 8), group=4)(torch.arange(8.0)[None])[:, 0].tolist()
    [1.0, 3.0, 2.0, 0.0]
    """

    def __init__(self, dim: Sequence[int], *, group: int = 2) -> None:
        super().__init__()
        _, *sides = self.dim = checks.grid("dim", dim)
        self.event_dim = len(self.dim)
        image = len(sides) == 2
        self.group = 2 if image else checks.integer("group", group, 2)
        if any(side % self.group for side in sides):
            expected = "an even height and width" if image else f"a length divisible by {self.group}"
            raise ValueError(f"dim: expected {expected}, got {self.dim}; pad or crop the data.")
        self._corners = CORNERS if image else [(place,) for place in _halving(list(range(self.group)))]
        self._squeezed = tuple(self.forward_shape(self.dim))

    def forward_shape(self, shape: Iterable[int]) -> torch.Size:
        *batch, channels = (sizes := list(shape))[: 1 - self.event_dim]
        sides = sizes[1 - self.event_dim :]
        return torch.Size((*batch, channels * len(self._corners), *(side // self.group for side in sides)))

    def inverse_shape(self, shape: Iterable[int]) -> torch.Size:
        *batch, channels = (sizes := list(shape))[: 1 - self.event_dim]
        sides = sizes[1 - self.event_dim :]
        return torch.Size((*batch, channels // len(self._corners), *(side * self.group for side in sides)))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x, context)
        return self._squeeze(x), x.new_zeros(x.shape[: -self.event_dim])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        checks.event("Squeeze", y, self._squeezed)
        checks.context("Squeeze", context, 0)
        parts = dict(zip(self._corners, y.chunk(len(self._corners), dim=-self.event_dim), strict=True))
        x = torch.stack([parts[corner] for corner in sorted(parts)], -1)
        if self.event_dim == 3:
            x = x.unflatten(-1, (2, 2)).transpose(-3, -2).flatten(-4, -3)
        return x.flatten(-2), y.new_zeros(y.shape[: -self.event_dim])

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        return *self.forward_and_ladj(x, context), self._squeeze(score)

    def _squeeze(self, x: Tensor) -> Tensor:
        taken = [[slice(place, None, self.group) for place in corner] for corner in self._corners]
        return torch.cat([x[cast("tuple[slice, ...]", (..., *places))] for places in taken], dim=-self.event_dim)


class MultiScale(Bijection):
    r"""Factor out half: the first half of the channels stays as it is, ``coarse`` moves the second half.

    With :math:`x = (x_1, x_2)`, :math:`y = (x_1, c(x_2))` and :math:`\log|J| = \log|J_c(x_2)|`.

    In the direction of the density, half of what has been worked out up to here is left to the base distribution, and
    the rest goes on to a coarser scale. Nested, with :class:`Squeeze` in between, this is Real-NVP's and Glow's
    architecture; since nothing changes its shape, latents have the shape of the data. It costs what ``coarse`` costs on
    half of the channels.

    Args:
        coarse: a bijection of (C/2, T) or (C/2, H, W) that keeps the shape; it also names the shape.

    Raises:
        ValueError: for a ``coarse`` that does not name its shape or changes it, or an input of another shape.

    Reference: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, ICLR 2017
    (arXiv 1605.08803), section 3.6.

    >>> import torch, pyro_flows as pf
    >>> layer = pf.transforms.MultiScale(pf.transforms.ActNorm((1, 2, 2)))
    >>> layer.event_shape
    torch.Size([2, 2, 2])
    """

    def __init__(self, coarse: Bijection) -> None:
        super().__init__()
        if not isinstance(coarse, Bijection):
            raise ValueError(f"coarse: expected a Bijection, got a {type(coarse).__name__}.")
        shape = coarse.event_shape
        if shape is None or tuple(coarse.forward_shape(shape)) != tuple(shape):
            raise ValueError("coarse: expected a bijection that names the shape of its events and keeps it.")
        self.coarse = coarse
        self.dim = (2 * shape[0], *shape[1:])
        self.event_dim = len(shape)
        self.context_dim = coarse.context_dim

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        checks.event("MultiScale", x, self.dim)
        first, second = x.chunk(2, dim=-self.event_dim)
        return first, second

    def _join(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first.expand_as(second), second], dim=-self.event_dim)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first, second = self._halves(x)
        second, ladj = self.coarse.forward_and_ladj(second, context)
        return self._join(first, second), ladj

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first, second = self._halves(y)
        second, ladj = self.coarse.inverse_and_ladj(second, context)
        return self._join(first, second), ladj

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        (first, second), (score_first, score_second) = self._halves(x), self._halves(score)
        second, ladj, score_second = self.coarse.forward_and_score(second, score_second, context)
        return self._join(first, second), ladj, self._join(score_first, score_second)

    @torch.no_grad()
    def start_from(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        first, second = self._halves(y)
        return self._join(first, self.coarse.start_from(second, context))


CORNERS: list[tuple[int, ...]] = [(0, 0), (1, 1), (0, 1), (1, 0)]


def _halving(places: list[int]) -> list[int]:
    """Return every other place, then every other one of the rest, and so on."""
    return [*places[1::2], *_halving(places[::2])] if len(places) > 1 else places
