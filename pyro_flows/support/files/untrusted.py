"""Files of strangers: what is in them is compared with the size of the file before anything is built of it."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flows.support.files.bundles import damaged
from pyro_flows.support.numbers.tensors import Args, Dispatch, Function, Kwargs
from pyro_flows.support.process.fallbacks import Tried, first_line

PLAIN = (bool, int, float, str, type(None))
SMALL_NUMBER = 1024  # that a description may have, however few numbers there are
LIST = 64  # entries of a list, if there are fewer tensors
AROUND = 16  # flows, each around the next one
SEEDS = ("seed",)  # entries of a description that are no sizes
NUMBERS_BUILT = 8  # times those stored, that one operation may write while a flow is built,
NUMBERS_AT_LEAST = 2**22  # and this many in any case
OPERATIONS = 100  # for each tensor stored, while a flow is built,
OPERATIONS_AT_LEAST = 5_000


class Damaged(ValueError):
    """A file holds what no save has written."""


def require(holds: object, what: str) -> None:
    """Refuse a file if something does not hold."""
    if not holds:
        raise Damaged(what)


@contextmanager
def reading(path: str | os.PathLike[str], *names: str) -> Iterator[None]:
    """Turn whatever damaged files raise into one line that names them."""
    with Tried() as tried:
        yield
    error = tried.error
    if isinstance(error, Damaged):
        raise ValueError(damaged(path, list(names), f"cannot be what was saved: {error}")) from error
    if error is not None:  # whatever a damaged file leads to: no other code runs inside
        text = "too deeply nested" if isinstance(error, RecursionError) else first_line(error)
        raise ValueError(damaged(path, list(names), f"cannot be read: {type(error).__name__}, {text}")) from error


# tensors --------------------------------------------------------------------------------------------------------------


def packed(tensors: object) -> bytes:
    """Write what :func:`unpacked` reads."""
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def unpacked(data: bytes, device: torch.device | str = "cpu") -> Any:
    """Read what ``torch.save`` wrote: tensors, numbers and text in lists, tuples and dicts. No code is run."""
    with Tried() as tried, zipfile.ZipFile(io.BytesIO(data)) as archive:
        stored = archive.infolist()
        whole = all(one.compress_type == zipfile.ZIP_STORED and one.file_size <= len(data) for one in stored)
    if tried.error is not None:
        raise Damaged("it is no archive of tensors") from tried.error
    require(whole, "its parts are compressed or larger than the file")
    with Tried() as tried:
        found = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    if tried.error is not None:  # torch's own text advises to run the file
        raise Damaged("it holds something else than tensors, or parts are missing") from tried.error
    _check_contents(found, len(data))
    return found


def _check_contents(found: object, size: int) -> None:
    """Refuse other values than tensors, numbers and text, and more numbers than the file can hold."""
    left, seen, total = [found], 0, 0
    while left:
        value = left.pop()
        seen += 1
        require(seen <= size, "it holds more values than bytes")
        if isinstance(value, Tensor):
            ordinary = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta
            require(ordinary, "it holds a tensor of another kind")
            total += value.numel() * value.element_size()
            require(total <= size, "its tensors are larger than the file")
        elif isinstance(value, Mapping):
            require(all(isinstance(name, (str, int)) for name in value), "it has names that are no text")
            left += value.values()
        elif isinstance(value, (list, tuple)):
            left += value
        else:
            require(isinstance(value, PLAIN), f"it holds a {type(value).__name__}")


def check_tensor(name: str, value: object, shape: Sequence[int | None]) -> None:
    """Refuse anything but a tensor of real numbers of this shape; None stands for any length."""
    if not isinstance(value, Tensor):
        raise Damaged(f"{name} is no tensor")
    fits = value.dim() == len(shape) and all(want in (None, got) for want, got in zip(shape, value.shape, strict=True))
    wanted = tuple("any" if size is None else size for size in shape)
    require(fits, f"{name} has shape {tuple(value.shape)}, and not {wanted}")
    require(value.is_floating_point(), f"{name} has dtype {value.dtype}")


# what is built --------------------------------------------------------------------------------------------------------


def check_numbers(description: object, state: Mapping[str, Tensor]) -> None:
    """Refuse a description whose sizes are larger than what is stored for it, or that has more parts."""
    numbers = sum(value.numel() for value in state.values())
    most, left, parts = max(numbers, SMALL_NUMBER), [("", description, 0)], 0
    while left:
        name, value, depth = left.pop()
        require(depth <= AROUND, "flows stand around flows too often")
        if isinstance(value, Mapping):
            parts += "builder" in value
            left += [(part, inner, depth + (part == "inner")) for part, inner in value.items()]
        elif isinstance(value, (list, tuple)):
            longest = numbers if name == "components" else max(len(state), LIST)
            require(len(value) <= longest, f"{name} has {len(value)} entries, with {len(state)} tensors stored")
            left += [(name, part, depth) for part in value]
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name not in SEEDS:
            require(math.isfinite(value) and value >= -most, f"{name} is {value}")
            counts = isinstance(value, int)
            require(not counts or value <= most, f"{name} is {value}, with {numbers} numbers stored")
    require(parts <= max(len(state), 1) + 1, f"{parts} parts, with {len(state)} tensors stored")


class Building(Dispatch):
    """Ends the building of a flow from a file, if it takes far more than the tensors that are stored for it."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.most = max(NUMBERS_BUILT * sum(value.numel() for value in state.values()), NUMBERS_AT_LEAST)
        self.left = max(OPERATIONS * len(state), OPERATIONS_AT_LEAST)

    def __torch_dispatch__(self, func: Function, types: object, args: Args = (), kwargs: Kwargs = None) -> object:
        self.left -= 1
        require(self.left >= 0, "it describes more parts than are stored")
        sizes = [part for part in args if isinstance(part, (list, tuple)) and all(type(one) is int for one in part)]
        require(all(math.prod(size) <= self.most for size in sizes), "it describes larger parts than are stored")
        counts = math.prod(part for part in args if type(part) is int and part > 0) if "eye" in str(func) else 0
        require(counts <= self.most, "it describes larger parts than are stored")
        return func(*args, **(kwargs or {}))
