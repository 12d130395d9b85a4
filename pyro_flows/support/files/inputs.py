"""Models and data from files, for the command line."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_flows.support import checks
from pyro_flows.support.arguments import signature_of

Parameter = inspect.Parameter
NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
PRIVATE = "_pyro_flows_model_{}"  # the package that holds a file of the user's


def read_model(spec: str) -> Callable[..., object]:
    """Run a Python file and return one of its names: ``"models.py:eight_schools"``.

    The file becomes a module under a private name, so that one called ``statistics.py`` or ``torch.py`` replaces no
    other module. It may import files beside it: as ``from .helper import x``, or as ``import helper`` if no installed
    module has that name, since its folder is put at the end of ``sys.path``. Pickles of the model load in this process.
    """
    file, _, name = spec.rpartition(":")
    if not file or not name or "/" in name or "\\" in name:
        raise ValueError(f"model: expected FILE.py:NAME, for example models.py:eight_schools, got {spec!r}.")
    path = Path(file)
    if path.is_dir():
        raise ValueError(f"model: expected a Python file, {file!r} is a directory.")
    if not path.is_file():
        raise ValueError(f"model: no file {file!r}.")
    if path.suffix != ".py":
        raise ValueError(f"model: expected a Python file, got {file!r}.")
    module = _run_file(path)
    every = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    own = {key for key, value in every.items() if getattr(value, "__module__", None) == module.__name__} or every
    if not hasattr(module, name):
        if not own:
            raise ValueError(f"model: expected {name!r} in {file}, which defines no function. Define the model there.")
        checks.choice(f"model, in {file}", name, own)
    model = getattr(module, name)
    if isinstance(model, type):
        raise ValueError(
            f"model: expected a function or a module that is already made, {name!r} in {file} is a class. Make an "
            "instance of it in the file, and name that."
        )
    if not callable(model):
        raise ValueError(f"model: expected a callable, {name!r} in {file} is a {type(model).__name__}.")
    return model


def _run_file(path: Path) -> ModuleType:
    """Run a Python file as a module of a private package, whose folder is the file's own."""
    folder = path.parent.resolve()
    try:
        with _package(folder) as parent:
            module = importlib.import_module(parent)
            if "." in parent and path.name == "__init__.py":
                return module
            # A dot in the stem would make a package of what stands before it.
            spec = importlib.util.spec_from_file_location(f"{parent}.{path.stem.replace('.', '-')}", path)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    except SystemExit as error:
        raise ValueError(
            f"model: {path} ends the program when it is run (SystemExit: {error.code}). Put what is no part of the "
            "model under `if __name__ == '__main__':`."
        ) from None
    except ImportError as error:
        if not error.name or not _beside(folder, error):
            raise
        raise ValueError(
            f"model: {path} imports from {error.name!r}, which is {error.path or 'a module of Python'} and not the "
            f"file of that name beside it. Write `from .{error.name} import ...`, or rename the file."
        ) from error


@contextmanager
def _package(folder: Path) -> Iterator[str]:
    """Give the name of a private package of this folder, which can be imported from; after an error it is gone."""
    root, inner = folder, list[str]()
    while (root / "__init__.py").is_file() and root.name.isidentifier():  # folders that are packages themselves
        root, inner = root.parent, [root.name, *inner]
    package = ModuleType(next(name for name in map(PRIVATE.format, itertools.count()) if name not in sys.modules))
    package.__path__ = [str(root)]
    added = [str(place) for place in dict.fromkeys((folder, root)) if str(place) not in sys.path]
    sys.path += added
    sys.modules[package.__name__] = package
    try:
        yield ".".join((package.__name__, *inner))
    except BaseException:
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{package.__name__}.")]:
            del sys.modules[name]
        sys.path[:] = [place for place in sys.path if place not in added]
        raise


def _beside(folder: Path, error: ImportError) -> bool:
    """Whether the folder has a file of the name of a module that was found elsewhere and lacks what was asked for."""
    found = None if error.path is None else Path(error.path).resolve()
    beside = (folder / f"{error.name}.py", folder / str(error.name) / "__init__.py")
    return any(file.is_file() and file.resolve() != found for file in beside)


def read_data(file: str | Path) -> dict[str, object]:
    """Read named values: tensors, and plain integers where a JSON or npz file has single ones.

    JSON: an object of numbers and (nested) lists. CSV: a header and rows of numbers; one tensor a column. npz: arrays.
    Floats get torch's default dtype. Integers and booleans keep their kind: they may be indices.
    """
    path = Path(file)
    if path.is_dir():
        raise ValueError(f"data: expected a JSON, CSV or npz file, {str(file)!r} is a directory.")
    if not path.is_file():
        raise ValueError(f"data: no file {str(file)!r}.")
    kind = checks.choice(f"data, suffix of {path.name}", path.suffix.lower().lstrip("."), READERS)
    try:
        found = READERS[kind](path)
    except OSError as error:
        raise ValueError(f"data: {str(file)!r} cannot be read: {error.strerror or error}.") from None
    fields: dict[str, object] = {
        name: _value(f"data, {path.name}, field {name!r}", value) for name, value in found.items()
    }
    if not fields:
        raise ValueError(f"data: {path.name} has no fields.")
    return fields


def _read_json(path: Path) -> dict[str, object]:
    text, twice = _text(path), set[str]()

    def collect(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        twice.update(name for name in names if names.count(name) > 1)
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=collect)
    except ValueError as error:
        raise ValueError(f"data: {path.name} is not JSON: {error}.") from None
    except RecursionError:
        raise ValueError(f"data: {path.name} is nested too deeply to be lists of numbers.") from None
    if twice:
        raise ValueError(f"data: expected distinct names in {path.name}, got {', '.join(sorted(twice))} twice.")
    if not isinstance(found, dict):
        raise ValueError(f'data: expected an object {{"field": values}} in {path.name}, got a {type(found).__name__}.')
    return found


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: expected UTF-8 text in {path.name}: {error}. Save it with that encoding.") from None


def _read_csv(path: Path) -> dict[str, object]:
    import pandas

    try:
        text = io.StringIO(_text(path))
        table = pandas.read_csv(text, header=None, dtype=str, keep_default_na=False).fillna("")  # of short rows
    except pandas.errors.EmptyDataError:
        table = pandas.DataFrame()
    except pandas.errors.ParserError as error:
        raise ValueError(f"data: {path.name} is not CSV: {error}.") from None
    if len(table) < 2:
        raise ValueError(f"data: expected a header and rows of numbers in {path.name}, got {len(table)} lines.")
    header = table.iloc[0].str.strip().tolist()
    if len(set(header)) < len(header) or "" in header:
        raise ValueError(f"data: expected distinct column names in the first line of {path.name}, got {header}.")
    return {name: _column(path, name, table[place][1:].tolist()) for place, name in enumerate(header)}


def _column(path: Path, name: str, cells: list[str]) -> list[int] | list[float]:
    with suppress(ValueError):
        return [int(cell) for cell in cells]
    found = []
    for line, cell in enumerate(cells, start=2):
        try:
            found.append(float(cell))
        except ValueError:
            got = repr(cell) if cell.strip() else "nothing"
            raise ValueError(f"data: {path.name}, row {line}, column {name!r}: expected a number, got {got}.") from None
    return found


def _read_npz(path: Path) -> dict[str, object]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"data: {path.name} is not an npz file of plain arrays. Write one with numpy.savez.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise ValueError(f"data: {path.name} is not an npz file of plain arrays: {error}") from None


READERS: dict[str, Callable[[Path], dict[str, object]]] = {"csv": _read_csv, "json": _read_json, "npz": _read_npz}


def _value(where: str, value: object) -> Tensor | int | bool:
    """Turn numbers, lists and arrays into what a model takes."""
    try:
        array = np.asarray(tree_map(lambda item: math.nan if item is None else item, value))  # JSON's null
    except ValueError:
        raise ValueError(f"{where}: expected lists of equal lengths.") from None
    if array.dtype.kind in "uO" and _too_large(array):
        raise ValueError(f"{where}: expected integers below 2**63, got larger ones. Write them as floats: 1e20, 3.0.")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{where}: expected numbers, got {str(value)[:60]!r}.")
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ValueError(
            f"{where}: {int(np.isnan(array).sum())} of {array.size} values are missing or NaN. Leave them out, or fill "
            "them in and tell the model by a mask (obs_mask)."
        )
    if array.ndim == 0 and array.dtype.kind != "f":
        return array.item()
    dtype = {"f": torch.get_default_dtype(), "b": torch.bool}.get(array.dtype.kind, torch.int64)
    return torch.as_tensor(array.astype(np.float64) if array.dtype.kind == "f" else array.astype(np.int64)).to(dtype)


def _too_large(array: np.ndarray) -> bool:
    """Whether these are integers, some of which do not fit into 64 bits with a sign."""
    if array.dtype.kind == "u":
        return bool(array.size) and int(array.max()) >= 2**63
    whole = all(isinstance(item, int) for item in array.flat)
    return whole and any(not -(2**63) <= item < 2**63 for item in array.flat)


def match(model: Callable[..., object], fields: Mapping[str, object]) -> dict[str, object]:
    """Return the model's keyword arguments, by name."""
    parameters = signature_of(model).parameters
    fixed = [name for name, parameter in parameters.items() if parameter.kind is Parameter.POSITIONAL_ONLY]
    if fixed:
        raise ValueError(
            f"model: its parameters {', '.join(map(repr, fixed))} cannot be passed by name (positional-only)."
        )
    named = {name: parameter for name, parameter in parameters.items() if parameter.kind in NAMED}
    takes_all = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    missing = [name for name, parameter in named.items() if parameter.default is Parameter.empty and name not in fields]
    unknown = [] if takes_all else [name for name in fields if name not in named]
    if missing or unknown:
        parts = [f"no field for {', '.join(map(repr, missing))}"] if missing else []
        parts += [f"no parameter for the fields {', '.join(map(repr, unknown))}"] if unknown else []
        expected = ", ".join(named) or "none"
        raise ValueError(f"data: expected a field for each parameter of the model ({expected}); {'; '.join(parts)}.")
    return dict(fields)
