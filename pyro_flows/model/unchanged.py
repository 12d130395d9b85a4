"""A model's arguments and outcome at a point, as they were: copies of small arguments, digests of all."""

from __future__ import annotations

import functools
import hashlib
import inspect
import marshal
import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, cast

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pyro_flows.model.arguments import names_of
from pyro_flows.model.batching import quiet
from pyro_flows.model.graphs import interpreter_is_built
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import Keywords, Positional
from pyro_flows.support.numbers.tensors import storage_of
from pyro_flows.support.process.fallbacks import Tried, first_line
from pyro_flows.support.process.seeding import seeded
from pyro_flows.support.process.threads import alone

if TYPE_CHECKING:
    import pandas as pd

COPIED = 2**24  # bytes of all arguments of a call; more are not copied
ROUNDED = {torch.float32: 1e-3, torch.float64: 1e-6}  # relative differences of one log density, by other operations
ROUNDED_AT_LEAST = 1e-2  # nats

Digests = Mapping[str, str]
Feed = Callable[[bytes | memoryview], None]  # of a digest


def own(args: Positional, kwargs: Keywords | None) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return arguments whose numbers are the caller's no more, if they are at most 16 MB: what is given, otherwise.

    Tensors without gradients, arrays, tables and the lists, tuples and dicts that hold them are copied. Modules,
    functions and other objects are not, nor are empty lists and dicts, which a model may fill.
    """
    given = tuple(args), dict(kwargs or {})
    leaves = tree_leaves(given, is_leaf=_is_empty)
    if sum(map(_size, leaves)) > COPIED:
        return given
    copies: dict[int, object] = {}
    for leaf in leaves:  # one object that is given twice stays one
        if id(leaf) not in copies:
            copies[id(leaf)] = _copy(leaf)
    return tree_map(lambda leaf: copies[id(leaf)], given, is_leaf=_is_empty)


def _is_empty(value: object) -> bool:
    return isinstance(value, (list, dict)) and not value


def _size(value: object) -> int:
    """Return about how many bytes an argument has."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if _is_table(value):
        return int(np.sum(value.memory_usage()))
    return int(getattr(value, "nbytes", 32))  # about, of a number of Python in a list


def _is_table(value: object) -> TypeGuard[pd.DataFrame]:
    known = hasattr(value, "iloc") or hasattr(value, "to_frame")  # tables, series, and indices
    return known and type(value).__module__.partition(".")[0] == "pandas"


def _copy(value: object) -> object:
    if type(value) is Tensor and not value.requires_grad:
        return value.clone()
    if isinstance(value, np.ndarray):
        return np.array(value, order="K", subok=True)
    return value.copy() if _is_table(value) else value


# digests --------------------------------------------------------------------------------------------------------------


def digests(density: LogDensity) -> dict[str, str]:
    """Return a SHA-256 digest of each argument of a model, and of observed values that are not among the arguments.

    Numbers, text, tensors, arrays, tables, data classes, and lists, tuples and dicts of these are looked at; modules,
    functions and other objects are not. Cost: 10 million numbers take about a tenth of a second.
    """
    args, kwargs = density.args, density.kwargs
    given = [*zip(names_of(density.model, args), args, strict=True), *kwargs.items()]
    found = {f"argument {name!r}": digest_of(value) for name, value in given}
    known = {storage_of(leaf) for leaf in tree_leaves((args, kwargs)) if _is_strided(leaf)}
    for name, value in density.structure.observed.items():
        if not _is_strided(value) or storage_of(value) not in known:
            found[f"the observed value of site {name!r}"] = digest_of(value)
    return found


def _is_strided(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.layout is torch.strided


def digest_of(value: object) -> str:
    """Return a SHA-256 digest of an argument, see :func:`digests`."""
    total = hashlib.sha256()
    _feed(total.update, value)
    return total.hexdigest()


def _feed(total: Feed, value: object) -> None:
    """Feed a digest with all that is in a value."""
    total(type(value).__qualname__.encode())
    if isinstance(value, Tensor):
        _feed_tensor(total, value)
    elif _is_table(value):
        _feed_table(total, value)
    elif isinstance(value, np.ndarray):
        _feed_array(total, value)
    elif _plain(total, value):
        return
    elif isinstance(value, Mapping):
        for name, part in value.items():
            _feed(total, name)
            _feed(total, part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _feed(total, part)
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            _feed(total, getattr(value, one.name))
    elif hasattr(type(value), "__array__"):
        _feed_array(total, np.asarray(value))


def _plain(total: Feed, value: object) -> bool:
    """Feed a digest with numbers, text, and lists and dicts of them alone; return whether it is such a value."""
    try:
        # which says itself what else it takes; 2 is the last version whose bytes do not count references to an object
        total(marshal.dumps(cast("list[object]", value), 2))
    except ValueError:
        return False
    return True


def _feed_tensor(total: Feed, value: Tensor) -> None:
    total(f"{value.dtype} {tuple(value.shape)}".encode())
    value = value if _is_strided(value) else value.to_dense()
    whole = value.detach().cpu().contiguous().resolve_conj().resolve_neg()
    total(whole.reshape(-1).view(torch.uint8).numpy().data)


def _feed_array(total: Feed, value: np.ndarray) -> None:
    total(f"{value.dtype} {value.shape}".encode())
    if value.dtype.hasobject:
        _feed(total, value.tolist())
        return
    total(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    if isinstance(value, np.ma.MaskedArray):
        total(np.ascontiguousarray(np.ma.getmaskarray(value)).data)


def _feed_table(total: Feed, value: pd.DataFrame) -> None:
    import pandas as pd

    total(repr([*getattr(value, "columns", ())]).encode())
    with suppress(TypeError):  # cells that are lists or other objects
        _feed_array(total, pd.util.hash_pandas_object(value).to_numpy())


def identity(density: LogDensity) -> dict[str, object]:
    """Return what tells a model with its arguments from others, in another process too, and what its numbers depend on.

    These are digests of arguments and parameters, the log density at two points to the last digit, the packages, this
    package's code, and the processor.
    """
    parameters = {name: digest_of(value) for name, value in density.parameters().items()}
    return {
        "model": qualname(density.model),
        **digests(density),
        "parameters": parameters,
        "log density": None if type(density) is not LogDensity else _values(density),
        "device": str(density.device),
        "threads": torch.get_num_threads(),
        "software": software(),
    }


def qualname(model: Callable[..., object]) -> str:
    """Return the name of a model, which is the same in another process."""
    found = inspect.unwrap(model)
    return str(getattr(found, "__qualname__", type(found).__qualname__))


@torch.no_grad()
def _values(density: LogDensity) -> list[str]:
    found = []
    with alone(), seeded(0, density.device), quiet():
        for point in density.structure.points(1.0):
            with suppress(Exception):  # code of the user's, which may raise anything
                found.append(repr(float(density.single(point))))
    return found


@functools.cache
def software() -> str:
    """Return a digest of all that decides about the last digits of a result, but for the number of threads."""
    total = hashlib.sha256(f"{torch.__version__} {pyro.__version__} {np.__version__} {interpreter_is_built()}".encode())
    total.update(f"{sys.version} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}".encode())
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()


# comparison -----------------------------------------------------------------------------------------------------------


def check_unchanged(density: LogDensity, before: Digests, z: Tensor, log_p: Tensor) -> None:
    """Refuse a model whose arguments are not what they were, or that has another log density at a draw.

    ``before`` are the digests of its arguments, and ``log_p`` (S,) the log densities at draws ``z`` (S, D), at the time
    of the fit. Without draws the model is not run.
    """
    now = digests(density)
    changed = [name for name, value in before.items() if now.get(name) != value]
    if changed:
        verb = "have" if len(changed) > 1 else "has"
        raise ValueError(
            f"model: {' and '.join(changed)} {verb} changed since the fit, so that its results would be of other data "
            "than the draws. Fit again; or undo the change, and give the fit a copy (.clone(), .copy()) next time."
        )
    why = _differs(density, z, log_p) if type(density) is LogDensity else None
    if why is not None:
        raise ValueError(
            f"model: {why}. Something has changed that the model reads from outside of its arguments: data, parameters "
            "of its own, a module, a global name. Put it back as it was, or fit again."
        )


@torch.no_grad()
def _differs(density: LogDensity, z: Tensor, log_p: Tensor) -> str | None:
    """Say how the log density at one draw is another one than it was; None if it is the same."""
    finite = torch.isfinite(log_p[: len(z)]).nonzero()
    if not len(finite):
        return None
    row = int(finite[0])
    saved = float(log_p[row])
    with Tried() as tried, alone(), torch.no_grad(), seeded(0, density.device), quiet():
        value = float(density.single(z[row].to(density.dtype)))
    if tried.error is not None:
        return f"it raises an error at a draw, and raised none in the fit ({first_line(tried.error)})"
    allowed = ROUNDED_AT_LEAST + ROUNDED.get(density.dtype, 1e-3) * abs(saved)
    return None if abs(value - saved) <= allowed else f"its log density at a draw is {value:.6g}, and was {saved:.6g}"
