"""Data for maximum likelihood, as batches: tensors, memory maps and loaders, quantized values and missing ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_flows.flows.flow import Flow
from pyro_flows.support import checks
from pyro_flows.support.arguments import numbers
from pyro_flows.support.process.warnings import outside

CHUNK = 4096
Batch = tuple[Tensor, Tensor | None]
Array = Tensor | np.ndarray


@dataclass(frozen=True)
class Levels:
    """Values that are one of ``count`` levels, ``step`` apart from zero on, and the noise that spreads them."""

    count: int
    step: float

    def spread(self, y: Tensor) -> Tensor:
        """Return ``(k + U(0, 1)) / count`` in the unit cube, for level k; the noise is fresh."""
        return (y / self.step + torch.rand_like(y)) / self.count


def noisy(y: Tensor, levels: Levels | None, noise: float) -> Tensor:
    """Return points with the noise that spreads levels, and normal noise of a standard deviation; both are fresh."""
    y = y if levels is None else levels.spread(y)
    return y + noise * torch.randn_like(y) if noise else y


@dataclass(frozen=True)
class Rows:
    """Points by index, in memory or on disk, with their context, as numbers of ``like``'s dtype on its device."""

    values: Array
    context: Array | None
    like: Tensor
    indices: Tensor | None = None
    levels: Levels | None = None
    noise: float = 0.0

    def __len__(self) -> int:
        return len(self.values) if self.indices is None else len(self.indices)

    @property
    def event_shape(self) -> torch.Size:
        return torch.Size(self.values.shape[1:])

    def take(self, places: Tensor) -> Batch:
        indices = places if self.indices is None else self.indices[places]
        y = _look_up(self.values, indices, self.like)
        context = None if self.context is None else _look_up(self.context, indices, self.like)
        return noisy(y, self.levels, self.noise), context

    def ordered(self, size: int) -> Iterator[Batch]:
        for places in torch.arange(len(self)).split(size):
            yield self.take(places)

    def shuffled(self, size: int) -> Iterator[Batch]:
        """Go through the points once in a fresh random order, without those left over after the last full batch."""
        size = min(size, len(self))
        order = torch.randperm(len(self))
        for places in order[: len(self) // size * size].split(size):
            yield self.take(places)

    def steps(self, size: int) -> int:
        """How many batches :meth:`shuffled` gives."""
        return max(len(self) // size, 1)

    def splits(self, share: float, times: int) -> list[tuple[Rows, Rows]]:
        """Part at random into the rest and ``share``, of at least one point each; each time other points, if it can."""
        if len(self) < 2:
            raise ValueError("data: expected at least two points to hold some out, got one; pass validation=None.")
        order = torch.randperm(len(self))
        count = min(max(round(share * len(self)), 1), len(self) - 1)
        turned = [order.roll(-number * count) for number in range(times)]
        parts = [(places[count:].sort().values, places[:count].sort().values) for places in turned]
        return [(replace(self, indices=rest), replace(self, indices=held_out)) for rest, held_out in parts]

    def first(self, count: int) -> Rows:
        """Return ``count`` points at most, at random."""
        if len(self) <= count:
            return self
        places = torch.randperm(len(self))[:count].sort().values
        return replace(self, indices=places if self.indices is None else self.indices[places])

    def quantized(self, levels: int, step: float | None = None) -> Rows:
        """Say that the values are levels: ``0, 1, ..., levels - 1``, or the same divided by ``levels - 1``.

        The second is so if they are floating-point numbers of 1 at most, and no ``step`` of other data is known.
        """
        if not _is_floating(self.values):
            step = 1.0
        elif step is None:
            step = 1.0 if max(float(y.max()) for y, _ in self.ordered(CHUNK)) > 1.0 else 1.0 / (levels - 1)
        for y, _ in self.ordered(CHUNK):
            level = y / step
            wrong = ((level - level.round()).abs() > 1e-3) | (level < -0.5) | (level > levels - 0.5)
            if bool(wrong.any()):
                raise ValueError(
                    f"data: expected {levels} levels, {step:g} apart from 0 on, got {float(y[wrong][0]):g}. Pass "
                    f"quantized values as they are, all as 0 to {levels - 1} or all divided by {levels - 1}, or "
                    "levels=None for continuous ones."
                )
        return replace(self, levels=Levels(levels, step))

    def check(self, name: str) -> None:
        """Refuse values that are missing or infinite, and say where the first of them is."""
        for what, values in ((name, self.values), ("context", self.context)):
            if values is None or not _is_floating(values):
                continue
            for start in range(0, len(values), CHUNK):
                bad = (~torch.isfinite(_tensor(values[start : start + CHUNK]))).nonzero()
                if len(bad):
                    row, *column = bad[0].tolist()
                    place = column[0] if len(column) == 1 else tuple(column)
                    raise ValueError(
                        f"{what}: the value in row {start + row}, column {place} is missing or infinite "
                        f"({float(values[(start + row, *column)])}). Fill it in or drop the row."
                    )


@dataclass(frozen=True)
class Stream:
    """Batches of a ``DataLoader``: tensors ``y``, or pairs ``(y, context)``."""

    loader: DataLoader[object]
    like: Tensor
    event_shape: torch.Size
    context_dim: int
    levels: Levels | None = None
    noise: float = 0.0

    def ordered(self, size: int) -> Iterator[Batch]:
        """Go through the loader once; ``size`` is the loader's own."""
        for number, item in enumerate(self.loader):
            parts = item if isinstance(item, (tuple, list)) else (item,)
            if self.context_dim and len(parts) < 2:
                raise ValueError("data: expected the loader to give pairs (data, context) for a conditional flow.")
            y = self._read("data", number, parts[0], self.event_shape)
            context = self._read("context", number, parts[1], (self.context_dim,)) if self.context_dim else None
            yield noisy(y, self.levels, self.noise), context

    def _read(self, name: str, number: int, values: object, shape: Sequence[int]) -> Tensor:
        found = numbers(name, values).to(self.like)
        found = found[:, None] if found.dim() == 1 else found
        if found.shape[1:] != torch.Size(shape):
            rows = ", ".join(("N", *map(str, shape)))
            raise ValueError(
                f"{name}: expected shape ({rows}) from the loader, got {tuple(found.shape)} in batch {number}; reshape "
                "it, or make the flow for that shape."
            )
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"{name}: batch {number} of the loader holds missing or infinite values.")
        return found

    shuffled = ordered

    @property
    def batch(self) -> int:
        """How many points a batch has, as the loader says, or its first batch."""
        size = self.loader.batch_size or getattr(self.loader.batch_sampler, "batch_size", None)
        return size if isinstance(size, int) else len(next(self.ordered(0))[0])

    def steps(self, size: int) -> int:
        """How many batches an epoch has."""
        try:
            count = len(self.loader)
        except TypeError:
            kind = type(self.loader.dataset).__name__
            raise ValueError(f"data: expected a loader with a length, got one of {kind}; give it __len__.") from None
        if not count:
            raise ValueError("data: expected points, got a loader without any.")
        return count

    def quantized(self, levels: int, step: float | None = None) -> Stream:
        """Say that the values are levels, as for tensors; judged by the first batch."""
        if step is None:
            step = 1.0 if float(next(self.ordered(0))[0].max()) > 1.0 else 1.0 / (levels - 1)
        return replace(self, levels=Levels(levels, step))


Source = Rows | Stream


def rows(name: str, data: object, context: object, like: Tensor | None) -> Rows:
    """Make rows of an array of numbers, with one point a row; what lies in memory is converted once.

    Without a ``like``, numbers get torch's default dtype, or double precision if that does not hold them.
    """
    values, about = _array(name, data, like), None if context is None else _array("context", context, like)
    if len(values.shape) < 2 or 0 in values.shape:
        raise ValueError(f"{name}: expected one point a row, (N, ...), got shape {tuple(values.shape)}.")
    if about is not None and len(about) != len(values):
        raise ValueError(f"context: expected a row for each of {len(values)} points of {name}, got {len(about)}.")
    found = Rows(values, about, torch.zeros(()) if like is None else like)
    found.check(name)
    return found


def _array(name: str, values: object, like: Tensor | None) -> Array:
    """Return points; a list of numbers becomes points of one coordinate."""
    if isinstance(values, np.memmap):
        return values[:, None] if values.ndim == 1 else values
    if hasattr(values, "iloc") and hasattr(values, "to_numpy"):
        values = _of_frame(name, values)
    if not isinstance(values, (Tensor, np.ndarray, list, tuple)):
        raise ValueError(f"{name}: expected a tensor, an array or a DataLoader, got a {type(values).__name__}.")
    tensor = numbers(name, values).detach()
    if like is None:
        default = torch.get_default_dtype()
        like = torch.zeros((), dtype=default if _lost(tensor, default) is None else torch.float64)
    if tensor.element_size() == 1:
        tensor = tensor.to(like.device)  # bytes stay bytes
    else:
        _warn_rounded(name, tensor, like.dtype)
        tensor = tensor.to(like)
    return tensor[:, None] if tensor.dim() == 1 else tensor


def _warn_rounded(name: str, values: Tensor, dtype: torch.dtype) -> None:
    """Warn if a column (of all others) loses its differences, or its size, as numbers of another dtype."""
    if (lost := _lost(values, dtype)) is not None:
        at, spread, size = lost
        warnings.warn(
            f"{name}: column {at} has a range of {spread:g} and numbers as large as {size:g}, which "
            f"{str(dtype).removeprefix('torch.')} does not hold. Subtract its mean and divide by its standard "
            "deviation, or pass a flow of float64.",
            UserWarning,
            stacklevel=outside(),
        )


def _lost(values: Tensor, dtype: torch.dtype) -> tuple[int, float, float] | None:
    """Return the first column that does not keep its differences or its size in a dtype, its range and its size."""
    narrower = values.is_floating_point() and values.dtype != torch.float64
    if narrower or values.element_size() == 1 or dtype == torch.float64 or not values.numel():
        return None
    columns = values.reshape(len(values), -1).double()
    size, spread = columns.abs().amax(0), columns.amax(0) - columns.amin(0)
    still = spread <= 100.0 * torch.finfo(columns.dtype).eps * size
    lost = (size.isfinite() & (size > torch.finfo(dtype).max)) | (
        ~still & (spread < 100.0 * torch.finfo(dtype).eps * size)
    )
    if not bool(lost.any()):
        return None
    at = int(lost.nonzero()[0])
    return at, float(spread[at]), float(size[at])


def _of_frame(name: str, values: Any) -> np.ndarray:
    """Return the numbers of a data frame, or of a column of one; pandas' missing values become NaN."""
    columns = [(label, values.iloc[:, at]) for at, label in enumerate(getattr(values, "columns", []))]
    for label, column in columns or [(values.name, values)]:
        if getattr(column.dtype, "kind", "O") not in "biuf":
            remedy = "let fit_density make the flow" if name == "context" else "pass categories as context="
            raise ValueError(
                f"{name}: expected columns of numbers, got {str(label)!r} of {column.dtype}. Drop the column, convert "
                f"it, or {remedy}."
            )
    return np.asarray(values.to_numpy(dtype=float, na_value=np.nan))


def _look_up(values: Array, indices: Tensor, like: Tensor) -> Tensor:
    if isinstance(values, Tensor):
        return values.index_select(0, indices.to(values.device)).to(like)
    return _tensor(values[indices.numpy()]).to(like)


def _tensor(values: Array) -> Tensor:
    """Make a tensor of part of a tensor or a memory map, which may not be writable."""
    return values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))


def _is_floating(values: Array) -> bool:
    return values.is_floating_point() if isinstance(values, Tensor) else np.issubdtype(values.dtype, np.floating)


def like(flow: Flow) -> Tensor:
    """Return a tensor of the flow's dtype on its device."""
    return next(flow.parameters(), flow._like)


def points_for(flow: Flow, name: str, data: object, context: object) -> Source:
    """Make rows, or a stream of a ``DataLoader``, for a flow; refuse other shapes than it takes."""
    if isinstance(data, DataLoader):
        if context is not None:
            raise ValueError("context: a DataLoader gives its context itself, as pairs (data, context).")
        return Stream(data, like(flow), flow.event_shape, flow.context_dim)
    found = rows(name, data, context, like(flow))
    if found.event_shape != flow.event_shape:
        raise ValueError(
            f"{name}: expected points of shape {tuple(flow.event_shape)}, got {tuple(found.event_shape)}; "
            "reshape them, or make the flow for that shape."
        )
    first = None if context is None else found.take(torch.zeros(1, dtype=torch.long))[1]
    checks.context(name, first, flow.context_dim)
    return found
