"""One fit by several processes, as ``torchrun`` starts them: rows and noise of each, one gradient, one judge."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from operator import attrgetter

import torch
from pyro.poutine.messenger import Messenger
from torch import distributed, nn

from pyro_flows.model.sites import Site, is_open, is_subsample
from pyro_flows.support.process.fallbacks import fallback


class Followed(Exception):
    """This process has done its part: the first one judges the fit and has the result."""


@dataclass(frozen=True)
class Ranks:
    """The number of this process, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def averaged(self, module: nn.Module) -> nn.Module:
        """Return a module whose gradients are the means over all processes, which begin with the same parameters."""
        if self.size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module)

    def agreed(self, value: bool) -> bool:
        """Return what the first process says."""
        if self.size == 1:
            return value
        said = torch.tensor(int(value))
        distributed.broadcast(said, 0)
        return bool(said)


class RowsOfRank(Messenger):
    """Let each process draw other rows of subsampled plates: together, one minibatch without replacement.

    All processes draw the same orders of the rows, by the same seed, and each takes its own part of them. Where the
    parts have more rows than there are, the last ones begin anew.
    """

    def __init__(self, ranks: Ranks, seed: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.generator = torch.Generator().manual_seed(seed)

    def _pyro_sample(self, msg: Site) -> None:
        if self.ranks.size == 1 or not is_subsample(msg) or not is_open(msg):
            return
        size, rows, device = attrgetter("size", "subsample_size", "device")(msg["fn"])
        if rows is not None and rows < size:
            order = torch.randperm(size, generator=self.generator)
            places = (self.ranks.rank * rows + torch.arange(rows)) % size
            msg["value"] = order[places].to(device)


ALONE = Ranks()
_CURRENT: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


def ranks() -> Ranks:
    """Return the processes of this fit: one alone, outside of :func:`joined`."""
    return _CURRENT.get()


def check_alone() -> None:
    """Let the first process only make a fit that does not train on minibatches: the others are :class:`Followed`."""
    if not ranks().first:
        raise Followed
    if ranks().size > 1:
        fallback(f"one process fits, the other {ranks().size - 1} end: no plate of the model is subsampled")


@contextmanager
def joined() -> Iterator[Ranks]:
    """Let fits inside be those of all processes that ``torchrun`` has started; of this one alone, without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not distributed.is_torchelastic_launched():
        yield ranks()
        return
    distributed.init_process_group()
    token = _CURRENT.set(Ranks(distributed.get_rank(), distributed.get_world_size()))
    try:
        yield ranks()
    finally:
        _CURRENT.reset(token)
        distributed.destroy_process_group()
