"""Coupling layers: some coordinates stay, the others move by an amount that depends on those that stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_flows.support import checks
from pyro_flows.support.numbers.tensors import broadcast
from pyro_flows.transforms.base import Bijection, Scored
from pyro_flows.transforms.conditioners import conditioner, forward_and_pull
from pyro_flows.transforms.masks import channels, half
from pyro_flows.transforms.networks import Network


class Coupling(Bijection):
    """What couplings share: mask, splitting and joining, the conditioner, the passes. A subclass is an elementwise map.

    It says how many parameters a moved coordinate takes (``per``), and writes ``_read`` (from the conditioner's numbers
    to parameters), ``_move`` and ``_unmove`` (value and log-determinant), and ``_carry`` (the score).
    """

    per: int
    mask: Tensor
    _order: Tensor
    _back: Tensor

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
    ) -> None:
        super().__init__()
        self.dim = checks.size("dim", dim)
        self.context_dim = context_dim
        shape = (self.dim,) if isinstance(self.dim, int) else self.dim
        self.event_dim = len(shape)
        self._axes = tuple(range(-len(shape), 0))
        self.register_buffer("mask", _read_mask(mask, shape, context_dim))
        self.register_load_state_dict_post_hook(_reindex)
        self._index()
        kept, moved = (part.shape[self._axes[0]] for part in self._split(self.mask))
        self.conditioner = conditioner(
            kept, context_dim, self.per * moved, axes=len(shape), hidden=hidden, activation=activation, network=network,
            frames=checks.divisor("frames", frames, shape[1], context_dim) if len(shape) == 2 else 1,
            sides=shape[1:],
        )  # fmt: skip

    def slow(self, count: float) -> None:
        """Let a step of Adam move the map as little as an affine one, as one of ``count`` couplings.

        A step changes each of W weights of the last layer by about as much as the bias, in the same direction in the
        worst case, and half of the couplings move a coordinate. The map stays as it is.
        """
        if isinstance(self.conditioner, Network):
            self.conditioner.slow(self._reach().reciprocal() * min(1.0, 2.0 / (count * self.conditioner.width)))

    def _reach(self) -> Tensor:
        """Return how far a step of 1 in a number of the network moves a point: one for all, or one for each number."""
        return torch.ones(())

    def _index(self) -> None:
        """Derive from the mask how to split and join: in blocks, by every other coordinate, by an order, by masking."""
        self._way, self._sizes, self._kept_first = _way(self.mask)
        if self._way != "masked":
            order = torch.argsort((~_line(self.mask)).long(), stable=True)
            self.register_buffer("_order", order, persistent=False)
            self.register_buffer("_back", torch.argsort(order), persistent=False)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is conditioned on and what moves. A masked image is kept with zeros, and moves as a whole."""
        if self._way == "masked":
            return torch.where(self.mask, x, 0), x
        if self._way == "every other":
            first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            axis = self._axes[0]
            first, second = (x if self._way == "blocks" else x.index_select(axis, self._order)).split(self._sizes, axis)
        return (first, second) if self._kept_first else (second, first)

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        if self._way == "masked":
            return torch.where(self.mask, kept, moved)
        batch = moved.shape[: -self.event_dim]
        if kept.shape[: -self.event_dim] != batch:
            kept = kept.expand(*batch, *kept.shape[-self.event_dim :])
        pair = (kept, moved) if self._kept_first else (moved, kept)
        if self._way == "every other":
            return torch.stack(pair, dim=-1).flatten(-2)
        whole = torch.cat(pair, dim=self._axes[0])
        return whole if self._way == "blocks" else whole.index_select(self._axes[0], self._back)

    def _parameters_at(self, kept: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
        """Return the parameters of each coordinate that moves; zeros for those of a masked image that do not."""
        return self._read(self._blank(self.conditioner(kept, context)))

    def _blank(self, raw: Tensor) -> Tensor:
        """Put zeros where a masked image does not move."""
        if self._way != "masked":
            return raw
        return torch.where(self.mask.repeat(self.per, *[1] * (self.event_dim - 1)), 0, raw)

    def _total(self, terms: Tensor) -> Tensor:
        return terms.sum(self._axes)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._pass(x, context, self._move)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._pass(y, context, self._unmove)

    def _pass(
        self, x: Tensor, context: Tensor | None, run: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        self._check(x, context)
        kept, moved = self._split(x)
        moved, ladj = run(moved, self._parameters_at(kept, context))
        y = self._join(kept, moved)
        return y, self._expand(ladj, y)

    def _expand(self, ladj: Tensor, y: Tensor) -> Tensor:
        batch = y.shape[: -self.event_dim]
        return ladj if ladj.shape == batch else ladj.expand(batch)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        self._check(x, context)
        if context is not None:
            batch = broadcast(x.shape[: -self.event_dim], context.shape[:-1])
            event = x.shape[-self.event_dim :]
            x, score = x.expand(*batch, *event), score.expand(*batch, *event)
        (kept, moved), (score_kept, score_moved) = self._split(x), self._split(score)
        conditioned = bool(kept.shape[self._axes[0]])
        if conditioned:
            raw, pull = forward_and_pull(self.conditioner, kept, context)
            raw = self._blank(raw)
            parameters = self._read(raw)
        else:
            parameters = self._parameters_at(kept, context)
        y, ladj = self._move(moved, parameters)
        y = self._join(kept, y)
        with torch.no_grad():
            carried, weights = self._carry(moved, parameters, score_moved)
            if conditioned:
                score_kept = score_kept - pull(self._blank(self._read_back(raw, parameters, weights)))
            score = self._join(score_kept, carried)
        return y, self._expand(ladj, y), score

    def _read(self, raw: Tensor) -> tuple[Tensor, ...]:
        """Split the conditioner's numbers, ``per`` blocks of coordinates or channels."""
        return raw.chunk(self.per, dim=self._axes[0])

    def _read_back(self, raw: Tensor, parameters: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        """Return the vector-Jacobian product of ``_read``, without a graph: what ``weights`` are along ``raw``."""
        with torch.enable_grad():
            leaf = raw.detach().requires_grad_()
            return torch.autograd.grad(self._read(leaf), leaf, weights)[0]

    def _move(self, moved: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _unmove(self, moved: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _carry(self, moved: Tensor, parameters: tuple[Tensor, ...], score: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        r"""Return the score :math:`g_M` after the map, and :math:`\partial(g_M \cdot y + \log|J|)` by parameter."""
        raise NotImplementedError


def _reindex(module: Coupling, _: object) -> None:
    module._index()


def _way(mask: Tensor) -> tuple[str, tuple[int, int], bool]:
    """Return how to split by a mask, the sizes of the two parts, and whether the kept one comes first.

    Two blocks of coordinates or of channels, and every other one of an even number of coordinates, need no index.
    """
    line, several = _line(mask), mask.dim() > 1
    if several and not bool((mask.flatten(1) == line[:, None]).all()):
        return "masked", (0, 0), True
    first, changes = bool(line[0]), int((line[1:] != line[:-1]).sum())
    if changes <= 1:
        size = int((line == line[0]).sum())
        return "blocks", (size, len(line) - size), first
    if changes == len(line) - 1 and len(line) % 2 == 0 and not several:
        return "every other", (0, 0), first
    return "order", (int(line.sum()), int((~line).sum())), True


def _line(mask: Tensor) -> Tensor:
    """Return the mask of coordinates, or of channels at the first time or pixel."""
    return mask.flatten(1)[:, 0] if mask.dim() > 1 else mask


def _read_mask(mask: Tensor | None, shape: tuple[int, ...], context_dim: int) -> Tensor:
    """Return the mask as booleans (the default one for None), or say what is wrong with it.

    Of an image, some of it has to be kept; of a signal, unless there is a context.
    """
    some = len(shape) == 3 or (len(shape) == 2 and not context_dim)
    if mask is None:
        mask = half(shape[0]) if len(shape) == 1 else channels(shape)
    given = torch.as_tensor(mask)
    kept = given == 1
    usable = given.shape == shape and bool((kept | (given == 0)).all()) and not bool(kept.all())
    if not usable or (some and not bool(kept.any())):
        got = given.tolist() if given.dim() == 1 else f"shape {tuple(given.shape)}"
        size = str(shape[0]) if len(shape) == 1 else str(shape)
        needs = "at least one of them False (moved)" + (" and one True (kept)" if some else "")
        raise ValueError(f"mask: expected {size} booleans, {needs}, got {got}.")
    return kept
