"""The couplings of NICE and Real-NVP: what moves is shifted, or scaled and shifted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows.support import checks
from pyro_flows.transforms.conditioners import bounded, bounded_back
from pyro_flows.transforms.coupling import Coupling


@checks.constructor
class AdditiveCoupling(Coupling):
    r"""NICE's coupling: :math:`y_K = x_K,\ y_M = x_M + t(x_K, \text{context})`; volume is kept, :math:`\log|J| = 0`.

    K are the coordinates that ``mask`` keeps, M those it moves. The network's last layer starts at zero: the identity.
    The inverse costs the same as the forward pass: one evaluation of the network.

    Args:
        dim: number of coordinates, or the shape (C, T) of a signal or (C, H, W) of an image.
        mask: booleans, ``True`` for the kept ones (default: the first half, of channels if there are any).
        context_dim: width of the context.
        hidden: widths of the network's hidden layers.
        activation: its activation.
        network: ``"mlp"``, ``"robust"`` or ``"residual"``; for images ``"convolution"``, ``"robust"``,
            ``"residual"`` or ``"dense"``, of all pixels (``None``: the first); for signals ``"wavenet"``.
        frames: how many frames of a signal have their own part of the context, one after the other.

    Raises:
        ValueError: for a mask that moves nothing or has the wrong shape, or a wrong width.

    Reference: Dinh, Krueger and Bengio, *NICE*, ICLR workshop 2015 (arXiv 1410.8516).

    >>> import torch, pyro_flows as pf
    >>> layer = pf.transforms.AdditiveCoupling(2)
    >>> layer.forward_and_ladj(torch.tensor([1.0, 2.0]))[0].tolist()
    [1.0, 2.0]
    """

    per = 1

    def _read_back(self, raw: Tensor, parameters: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        return weights[0]

    def _move(self, moved: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return moved + parameters[0], moved.new_zeros(())

    def _unmove(self, moved: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return moved - parameters[0], moved.new_zeros(())

    def _carry(self, moved: Tensor, parameters: tuple[Tensor, ...], score: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return score, (score,)


@checks.constructor
class AffineCoupling(Coupling):
    r"""Real-NVP's coupling: :math:`y_K = x_K,\ y_M = x_M \odot e^{s} + t`, with s and t from a network of :math:`x_K`.

    The log scale is bounded smoothly, :math:`s = B \tanh(r / B)`, so that one layer scales by at most :math:`e^{B}`
    either way; :math:`\log|J| = \sum s`. The network's last layer starts at zero: the identity. The inverse costs
    the same as the forward pass: one evaluation of the network.

    Args:
        dim: number of coordinates (with one coordinate and no context, s and t are free parameters), or the shape
            (C, T) of a signal or (C, H, W) of an image.
        mask: booleans, ``True`` for the kept ones (default: the first half, of channels if there are any).
        context_dim: width of the context.
        hidden: widths of the network's hidden layers.
        activation: its activation.
        network: ``"mlp"``, ``"robust"`` or ``"residual"``; for images ``"convolution"``, ``"robust"``,
            ``"residual"`` or ``"dense"``, of all pixels (``None``: the first); for signals ``"wavenet"``.
        frames: how many frames of a signal have their own part of the context, one after the other.
        log_scale_bound: B, in nats.

    Raises:
        ValueError: for a mask that moves nothing or has the wrong shape, a bound that is not positive, or a wrong
            width.

    Reference: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, ICLR 2017
    (arXiv 1605.08803).

    >>> import torch, pyro_flows as pf
    >>> from pyro_flows.transforms import AffineCoupling, masks
    >>> layer = AffineCoupling(4, mask=masks.alternating(4))
    >>> y, ladj = layer.forward_and_ladj(torch.randn(10, 4))
    >>> ladj.shape
    torch.Size([10])
    >>> AffineCoupling((2, 8, 8), mask=masks.checkerboard((2, 8, 8)))(torch.ones(5, 2, 8, 8)).shape
    torch.Size([5, 2, 8, 8])
    """

    per = 2

    def __init__(
        self,
        dim: int | Sequence[int],
        *,
        mask: Tensor | None = None,
        context_dim: int = 0,
        hidden: Sequence[int] = (32, 32),
        activation: str = "silu",
        network: str | None = None,
        frames: int = 1,
        log_scale_bound: float = 8.0,
    ) -> None:
        super().__init__(
            dim,
            mask=mask,
            context_dim=context_dim,
            hidden=hidden,
            activation=activation,
            network=network,
            frames=frames,
        )
        self.log_scale_bound = checks.positive("log_scale_bound", log_scale_bound)

    def _read(self, raw: Tensor) -> tuple[Tensor, ...]:
        raw, shift = super()._read(raw)
        return bounded(raw, self.log_scale_bound), shift

    def _read_back(self, raw: Tensor, parameters: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        along_scale = bounded_back(parameters[0], self.log_scale_bound, weights[0])
        return torch.cat([along_scale, weights[1]], dim=self._axes[0])

    def _move(self, moved: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        log_scale, shift = parameters
        return torch.addcmul(shift, moved, log_scale.exp()), self._total(log_scale)

    def _unmove(self, moved: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        log_scale, shift = parameters
        shrink = -log_scale
        return (moved - shift) * shrink.exp(), self._total(shrink)

    def _carry(self, moved: Tensor, parameters: tuple[Tensor, ...], score: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        carried = score / parameters[0].exp()
        return carried, (torch.addcmul(torch.ones_like(carried), score, moved), carried)
