"""Models and data from files, for the command line."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_flows import _checks

Parameter = inspect.Parameter
NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def read_model(spec: str) -> Callable[..., Any]:
    """Run a Python file and return one of its names: ``"models.py:eight_schools"``. The file's folder is importable.

    Raises:
        ValueError: if there is no such file or name, or if the name is not callable.
    """
    file, _, name = spec.rpartition(":")
    if not file or not name or "/" in name or "\\" in name:
        raise ValueError(f"model: expected FILE.py:NAME, for example models.py:eight_schools, got {spec!r}.")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"model: no file {file!r}.")
    loader = importlib.util.spec_from_file_location(path.stem, path)
    if path.suffix != ".py" or loader is None or loader.loader is None:
        raise ValueError(f"model: expected a Python file, got {file!r}.")
    module = importlib.util.module_from_spec(loader)
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[path.stem] = module
    loader.loader.exec_module(module)
    own = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    own = {key: value for key, value in own.items() if getattr(value, "__module__", path.stem) == path.stem} or own
    if not hasattr(module, name):
        _checks.choice(f"model, in {file}", name, own)
    model = getattr(module, name)
    if not callable(model):
        raise ValueError(f"model: expected a callable, {name!r} in {file} is a {type(model).__name__}.")
    found: Callable[..., Any] = model
    return found


def read_data(file: str | Path) -> dict[str, Any]:
    """Read named values: tensors, and plain integers where a JSON or npz file has single ones.

    JSON: an object of numbers and (nested) lists. CSV: a header and rows of numbers; one tensor a column. npz: arrays.
    Floats get torch's default dtype, integers and booleans keep their kind.

    Raises:
        ValueError: naming the file and field, for what cannot be read, is not a number, ragged, missing or NaN.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"data: no file {str(file)!r}.")
    kind = _checks.choice(f"data, suffix of {path.name}", path.suffix.lower().lstrip("."), READERS)
    fields = {name: _value(f"data, {path.name}, field {name!r}", value) for name, value in READERS[kind](path).items()}
    if not fields:
        raise ValueError(f"data: {path.name} has no fields.")
    return fields


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"data: {path.name} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f'data: expected an object {{"field": values}} in {path.name}, got a {type(found).__name__}.')
    return found


def _read_csv(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if len(rows) < 2:
        raise ValueError(f"data: expected a header and rows of numbers in {path.name}, got {len(rows)} lines.")
    header = [name.strip() for name in rows[0]]
    if len(set(header)) < len(header) or "" in header:
        raise ValueError(f"data: expected distinct column names in the first line of {path.name}, got {header}.")
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise ValueError(f"data: {path.name}, row {line}: expected {len(header)} values, got {len(row)}.")
    columns = zip(*rows[1:], strict=True)
    return {name: _column(path, name, column) for name, column in zip(header, columns, strict=True)}


def _column(path: Path, name: str, cells: tuple[str, ...]) -> list[Any]:
    for kind in (int, float):
        try:
            return [kind(cell) for cell in cells]
        except ValueError:
            continue
    for line, cell in enumerate(cells, start=2):
        try:
            float(cell)
        except ValueError:
            got = repr(cell) if cell.strip() else "nothing"
            raise ValueError(f"data: {path.name}, row {line}, column {name!r}: expected a number, got {got}.") from None
    raise AssertionError("a column of numbers is read above")


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise ValueError(f"data: {path.name} is not an npz file of plain arrays: {error}") from None


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {"csv": _read_csv, "json": _read_json, "npz": _read_npz}


def _value(where: str, value: Any) -> Tensor | int | bool:
    """Turn numbers, lists and arrays into what a model takes."""
    try:
        array = np.asarray(_filled(value))
    except ValueError:
        raise ValueError(f"{where}: expected lists of equal lengths.") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{where}: expected numbers, got {str(value)[:60]!r}.")
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ValueError(
            f"{where}: {int(np.isnan(array).sum())} of {array.size} values are missing or NaN. Leave them out, or fill "
            "them in and tell the model by a mask (obs_mask)."
        )
    if array.ndim == 0 and array.dtype.kind != "f":
        single: int | bool = array.item()
        return single
    dtype = {"f": torch.get_default_dtype(), "b": torch.bool}.get(array.dtype.kind, torch.int64)
    return torch.as_tensor(array.astype(np.float64) if array.dtype.kind == "f" else array.astype(np.int64)).to(dtype)


def _filled(value: Any) -> Any:
    """Put NaN for JSON's null."""
    if value is None:
        return float("nan")
    return [_filled(item) for item in value] if isinstance(value, list) else value


def match(model: Callable[..., Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's keyword arguments, by name.

    Raises:
        ValueError: naming the fields that the model lacks, and the parameters that the data lack.
    """
    target = model.forward if isinstance(model, torch.nn.Module) else model
    parameters = inspect.signature(target).parameters
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
