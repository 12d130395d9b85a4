"""The fixed maps: between data and flow, and an order of coordinates; both count in the density."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_flows.support import checks
from pyro_flows.support.arguments import MOST_COORDINATES, refused
from pyro_flows.transforms.base import Bijection, Scored


class Preprocess(Bijection):
    r"""A fixed affine map to the scale of the data, :math:`y = m + B c + A x`; A is diagonal or a full matrix.

    c is the context, if there is one. :math:`\log|J| = \log|\det A|` is a constant. Nothing here is trained: a flow
    with this as its last layer sees standardized or white data, and its density is that of the data as they are. Both
    ways cost O(D), or one product with a D x D matrix.

    Args:
        loc: m, of the shape of one point.
        scale: the diagonal of A, of the same shape, or A itself, ``(D, D)``.
        slope: B transposed, ``(context_dim, D)``.

    Raises:
        ValueError: for values that are not finite, a scale that is not positive, a matrix without an inverse, or
            shapes that do not fit.

    >>> import torch
    >>> layer = Preprocess(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))
    >>> layer.forward_and_ladj(torch.ones(2))
    (tensor([3., 6.]), tensor(2.0794))
    """

    linear_in_context = True
    loc: Tensor
    scale: Tensor
    inverse_scale: Tensor
    log_scale: Tensor
    slope: Tensor | None

    def __init__(self, loc: Tensor, scale: Tensor, slope: Tensor | None = None) -> None:
        super().__init__()
        self.event_dim = loc.dim()
        self.dim = loc.numel() if loc.dim() == 1 else tuple(loc.shape)
        self.context_dim = 0 if slope is None else slope.shape[0]
        self.full = scale.shape != loc.shape
        dim = loc.numel()
        if self.full and scale.shape != (dim, dim):
            raise ValueError(f"scale: expected shape {tuple(loc.shape)} or {(dim, dim)}, got {tuple(scale.shape)}.")
        if slope is not None and slope.shape != (len(slope), dim):
            raise ValueError(f"slope: expected shape (context_dim, {dim}), got {tuple(slope.shape)}.")
        log_scale = torch.linalg.slogdet(scale.double())[1] if self.full else scale.double().log().sum()
        given = [loc, scale, log_scale, *([] if slope is None else [slope])]
        if not all(bool(torch.isfinite(value).all()) for value in given):
            raise ValueError("scale: expected finite numbers, a positive diagonal or a matrix that can be inverted.")
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale", scale.clone())
        self.register_buffer("inverse_scale", self._invert())
        self.register_buffer("log_scale", log_scale.to(scale.dtype))
        self.register_buffer("slope", None if slope is None else slope.clone())

    def _invert(self) -> Tensor:
        scale = self.scale.double()
        return (torch.linalg.inv(scale) if self.full else 1.0 / scale).to(self.scale.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Preprocess:
        """Move or convert; in a finer dtype the inverse is found anew, or both ways would not meet."""
        before = self.scale.dtype
        super()._apply(fn, recurse)
        if self.scale.dtype != before:
            self.inverse_scale = self._invert()
        return self

    def _shift(self, x: Tensor, context: Tensor | None) -> Tensor:
        if x.shape[x.dim() - self.event_dim :] != self.loc.shape:
            raise ValueError(f"Preprocess: expected shape (..., {tuple(self.loc.shape)}), got {tuple(x.shape)}.")
        checks.context("Preprocess", context, self.context_dim)
        if self.slope is None or context is None:
            return self.loc
        return self.loc + (context @ self.slope).unflatten(-1, self.loc.shape)

    def _product(self, x: Tensor, scale: Tensor) -> Tensor:
        if not self.full:
            return x * scale
        return (x.flatten(-self.event_dim) @ scale.mT).unflatten(-1, self.loc.shape)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self._shift(x, context) + self._product(x, self.scale)
        return y, self.log_scale.expand(y.shape[: y.dim() - self.event_dim])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self._product(y - self._shift(y, context), self.inverse_scale)
        return x, -self.log_scale.expand(x.shape[: x.dim() - self.event_dim])


@checks.constructor
class Permutation(Bijection):
    r"""Reorders the coordinates: :math:`y_i = x_{p(i)}`, :math:`\log|J| = 0`. Both ways cost one gather.

    Shapes: ``x`` and ``y`` are ``(..., dim)``, ``ladj`` is ``(...)``.

    Args:
        permutation: the indices p, or a number of coordinates to be shuffled by ``seed``.
        seed: of the shuffle; the result is a registered buffer, saved and moved with the module.

    Raises:
        ValueError: if the indices are no permutation of 0 to D - 1.

    >>> import torch, pyro_flows as pf
    >>> pf.transforms.Permutation([2, 0, 1])(torch.tensor([10.0, 20.0, 30.0])).tolist()
    [30.0, 10.0, 20.0]
    """

    permutation: Tensor

    def __init__(self, permutation: Sequence[int] | Tensor | int, *, seed: int = 0) -> None:
        super().__init__()
        if isinstance(permutation, int) and not isinstance(permutation, bool):
            size = checks.integer("permutation", permutation, 1, MOST_COORDINATES)
            permutation = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        try:
            indices = torch.as_tensor(permutation, dtype=torch.long)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise refused("permutation", "indices, or how many there are", permutation) from None
        if indices.dim() != 1 or sorted(indices.tolist()) != list(range(len(indices))) or not len(indices):
            raise ValueError(f"permutation: expected each of 0 to D - 1 once, got {indices.tolist()}.")
        self.dim = len(indices)
        self.register_buffer("permutation", indices.clone())

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._gather(x, context, self.permutation)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._gather(y, context, torch.argsort(self.permutation))

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        return *self.forward_and_ladj(x, context), score.index_select(-1, self.permutation)

    def _gather(self, x: Tensor, context: Tensor | None, indices: Tensor) -> tuple[Tensor, Tensor]:
        self._check(x, context)
        return x.index_select(-1, indices), x.new_zeros(x.shape[:-1])
