"""Maps that rearrange images (C, H, W): space to depth, and several scales."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pyro_flows import _checks
from pyro_flows.transforms.base import Bijection


class Squeeze(Bijection):
    r"""Space to depth: each block of 2 x 2 pixels becomes one pixel of four times the channels; :math:`\log|J| = 0`.

    (C, H, W) becomes (4 C, H/2, W/2). The channels of a block's pixels follow one another in the order top left, bottom
    right, top right, bottom left, so each half of them is a checkerboard. ``Squeeze(shape).inv`` is depth to space.

    Cost: a copy of the image.

    Args:
        dim: the shape (C, H, W) of x, with H and W even.

    Raises:
        ValueError: for an odd height or width, or an input of another shape.

    Reference: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, ICLR 2017
    (arXiv 1605.08803), section 3.6.

    >>> import torch, pyro_flows as pf
    >>> pf.transforms.Squeeze((1, 2, 2))(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])).flatten().tolist()
    [1.0, 4.0, 2.0, 3.0]
    """

    event_dim = 3

    def __init__(self, dim: Sequence[int]) -> None:
        super().__init__()
        channels, height, width = self.dim = _checks.image("dim", dim)
        if height % 2 or width % 2:
            raise ValueError(f"dim: expected an even height and width, got {self.dim}; pad or crop the image.")
        self._squeezed = (4 * channels, height // 2, width // 2)

    def forward_shape(self, shape: Iterable[int]) -> torch.Size:  # type: ignore[override]
        *batch, channels, height, width = shape
        return torch.Size((*batch, 4 * channels, height // 2, width // 2))

    def inverse_shape(self, shape: Iterable[int]) -> torch.Size:  # type: ignore[override]
        *batch, channels, height, width = shape
        return torch.Size((*batch, channels // 4, 2 * height, 2 * width))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _checks.event("Squeeze", x, self.dim)
        _checks.context("Squeeze", context, 0)
        return _squeeze(x), x.new_zeros(x.shape[:-3])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _checks.event("Squeeze", y, self._squeezed)
        _checks.context("Squeeze", context, 0)
        first, second, third, fourth = y.chunk(4, dim=-3)
        upper = torch.stack([first, third], dim=-1).flatten(-2)
        lower = torch.stack([fourth, second], dim=-1).flatten(-2)
        return torch.stack([upper, lower], dim=-2).flatten(-3, -2), y.new_zeros(y.shape[:-3])

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return *self.forward_and_ladj(x, context), _squeeze(score)


class MultiScale(Bijection):
    r"""Factor out half: the first half of the channels stays as it is, ``coarse`` moves the second half.

    With :math:`x = (x_1, x_2)`, :math:`y = (x_1, c(x_2))` and :math:`\log|J| = \log|J_c(x_2)|`.

    In the direction of the density, half of what has been worked out up to here is left to the base distribution, and
    the rest goes on to a coarser scale. Nested, with :class:`Squeeze` in between, this is Real-NVP's and Glow's
    architecture; since nothing changes its shape, latents have the shape of the data. It costs what ``coarse`` costs on
    half of the channels.

    Args:
        coarse: a bijection of (C/2, H, W) that keeps the shape; it also names the shape.

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
        self.event_dim = len(shape)  # type: ignore[assignment]
        self.context_dim = coarse.context_dim

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _checks.event("MultiScale", x, self.dim)
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

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        (first, second), (score_first, score_second) = self._halves(x), self._halves(score)
        second, ladj, score_second = self.coarse.forward_and_score(second, score_second, context)
        return self._join(first, second), ladj, self._join(score_first, score_second)

    @torch.no_grad()
    def start_from(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        first, second = self._halves(y)
        return self._join(first, self.coarse.start_from(second, context))


def _squeeze(x: Tensor) -> Tensor:
    corners = (0, 0), (1, 1), (0, 1), (1, 0)
    return torch.cat([x[..., row::2, column::2] for row, column in corners], dim=-3)
