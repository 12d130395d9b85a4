"""Coupling layers: some coordinates stay, the others move by an amount that depends on those that stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows import _checks
from pyro_flows.transforms.base import Bijection
from pyro_flows.transforms.conditioners import conditioner
from pyro_flows.transforms.masks import half


class _Coupling(Bijection):
    """Mask, splitting, joining and the conditioner of a coupling layer; ``per`` parameters a moved coordinate."""

    per: int
    mask: Tensor
    _kept: Tensor
    _moved: Tensor
    _order: Tensor

    def __init__(
        self,
        dim: int,
        *,
        mask: Tensor | None = None,
        context_dim: int = 0,
        hidden: Sequence[int] = (32, 32),
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.dim = _checks.integer("dim", dim, 1)
        self.context_dim = context_dim
        given = half(dim) if mask is None else torch.as_tensor(mask)
        mask = given == 1
        if given.shape != (dim,) or bool(mask.all()) or not bool((mask | (given == 0)).all()):
            raise ValueError(
                f"mask: expected {dim} booleans, at least one of them False (moved), got {given.tolist()}."
            )
        self.register_buffer("mask", mask)
        self.register_load_state_dict_post_hook(_reindex)
        self._index()
        kept = int(mask.sum())
        out = self.per * (dim - kept)
        self.conditioner = conditioner(kept, context_dim, out, hidden=hidden, activation=activation)

    def _index(self) -> None:
        """Derive the index tensors from the mask, and whether slices can replace them."""
        mask = self.mask
        kept, moved = mask.nonzero().flatten(), (~mask).nonzero().flatten()
        self.register_buffer("_kept", kept, persistent=False)
        self.register_buffer("_moved", moved, persistent=False)
        self.register_buffer("_order", torch.argsort(torch.cat([kept, moved])), persistent=False)
        changes = int((mask[1:] != mask[:-1]).sum()) if len(mask) > 1 else 0
        self._first = len(kept) if changes <= 1 and (len(kept) == 0 or bool(mask[0])) else None
        self._last = len(moved) if changes == 1 and not bool(mask[0]) else None

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._first is not None:
            return x[..., : self._first], x[..., self._first :]
        if self._last is not None:
            return x[..., self._last :], x[..., : self._last]
        return x.index_select(-1, self._kept), x.index_select(-1, self._moved)

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        kept = kept.expand(*moved.shape[:-1], -1)
        if self._first is not None:
            return torch.cat([kept, moved], dim=-1)
        if self._last is not None:
            return torch.cat([moved, kept], dim=-1)
        return torch.cat([kept, moved], dim=-1).index_select(-1, self._order)

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        _checks.event(type(self).__name__, x, self.dim)
        _checks.context(type(self).__name__, context, self.context_dim)


class AdditiveCoupling(_Coupling):
    r"""NICE's coupling: :math:`y_K = x_K,\ y_M = x_M + t(x_K, \text{context})`; volume is kept, :math:`\log|J| = 0`.

    K are the coordinates that ``mask`` keeps, M those it moves. The network's last layer starts at zero: the identity.
    The inverse costs the same as the forward pass: one evaluation of the network.

    Args:
        dim: number of coordinates.
        mask: booleans, ``True`` for the kept ones (default: the first half).
        context_dim: width of the context.
        hidden: widths of the network's hidden layers.
        activation: its activation.

    Raises:
        ValueError: for a mask that moves nothing or has the wrong length, or a wrong width.

    Reference: Dinh, Krueger and Bengio, *NICE*, ICLR workshop 2015.

    >>> import torch, pyro_flows as pf
    >>> layer = pf.AdditiveCoupling(2)
    >>> layer.forward_and_ladj(torch.tensor([1.0, 2.0]))[0].tolist()
    [1.0, 2.0]
    """

    per = 1

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._shift(x, context, 1.0)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._shift(y, context, -1.0)

    def _shift(self, x: Tensor, context: Tensor | None, sign: float) -> tuple[Tensor, Tensor]:
        self._check(x, context)
        kept, moved = self._split(x)
        y = self._join(kept, moved + sign * self.conditioner(kept, context))
        return y, y.new_zeros(y.shape[:-1])

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._check(x, context)
        (kept, moved), (score_kept, score_moved) = map(self._split, _spread(x, score, context))
        with torch.enable_grad():
            root = kept if kept.requires_grad else kept.detach().requires_grad_()
            shift = self.conditioner(root, context)
        y = self._join(kept, moved + shift)
        if kept.shape[-1]:
            score_kept = score_kept - _pull((shift,), root, (score_moved,))
        return y, y.new_zeros(y.shape[:-1]), self._join(score_kept, score_moved)


class AffineCoupling(_Coupling):
    r"""Real-NVP's coupling: :math:`y_K = x_K,\ y_M = x_M \odot e^{s} + t`, with s and t from a network of :math:`x_K`.

    The log scale is bounded smoothly, :math:`s = B \tanh(r / B)`, so that one layer scales by at most :math:`e^{B}`
    either way; :math:`\log|J| = \sum s`. The network's last layer starts at zero: the identity. The inverse costs
    the same as the forward pass: one evaluation of the network.

    Args:
        dim: number of coordinates (with one coordinate and no context, s and t are free parameters).
        mask: booleans, ``True`` for the kept ones (default: the first half).
        context_dim: width of the context.
        hidden: widths of the network's hidden layers.
        activation: its activation.
        log_scale_bound: B, in nats.

    Raises:
        ValueError: for a mask that moves nothing or has the wrong length, a bound that is not positive, or a wrong
            width.

    Reference: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, ICLR 2017.

    >>> import torch, pyro_flows as pf
    >>> layer = pf.AffineCoupling(4, mask=pf.masks.alternating(4))
    >>> y, ladj = layer.forward_and_ladj(torch.randn(10, 4))
    >>> ladj.shape
    torch.Size([10])
    """

    per = 2

    def __init__(
        self,
        dim: int,
        *,
        mask: Tensor | None = None,
        context_dim: int = 0,
        hidden: Sequence[int] = (32, 32),
        activation: str = "silu",
        log_scale_bound: float = 8.0,
    ) -> None:
        super().__init__(dim, mask=mask, context_dim=context_dim, hidden=hidden, activation=activation)
        self.log_scale_bound = _checks.positive("log_scale_bound", log_scale_bound)

    def _scale_and_shift(self, kept: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raw, shift = self.conditioner(kept, context).chunk(2, dim=-1)
        return self.log_scale_bound * torch.tanh(raw / self.log_scale_bound), shift

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x, context)
        kept, moved = self._split(x)
        log_scale, shift = self._scale_and_shift(kept, context)
        y = self._join(kept, torch.addcmul(shift, moved, log_scale.exp()))
        return y, log_scale.sum(-1).expand(y.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(y, context)
        kept, moved = self._split(y)
        log_scale, shift = self._scale_and_shift(kept, context)
        x = self._join(kept, (moved - shift) * torch.exp(-log_scale))
        return x, -log_scale.sum(-1).expand(x.shape[:-1])

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._check(x, context)
        (kept, moved), (score_kept, score_moved) = map(self._split, _spread(x, score, context))
        with torch.enable_grad():
            root = kept if kept.requires_grad else kept.detach().requires_grad_()
            log_scale, shift = self._scale_and_shift(root, context)
        scale = log_scale.exp()
        y = self._join(kept, torch.addcmul(shift, moved, scale))
        carried = score_moved / scale.detach()
        if kept.shape[-1]:
            weights = torch.addcmul(torch.ones_like(carried), score_moved, moved.detach())
            score_kept = score_kept - _pull((log_scale, shift), root, (weights, carried))
        return y, log_scale.sum(-1).expand(y.shape[:-1]), self._join(score_kept, carried)


def _reindex(module: _Coupling, _: object) -> None:
    module._index()


def _spread(x: Tensor, score: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Expand a point and its score to the batch shape that they have in common with the context."""
    if context is None:
        return x, score
    shape = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
    return x.expand(*shape, -1), score.expand(*shape, -1)


def _pull(outputs: tuple[Tensor, ...], root: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """Return the vector-Jacobian product of the conditioner, keeping its graph for the backward pass to come."""
    return torch.autograd.grad(outputs, root, weights, retain_graph=True)[0]
