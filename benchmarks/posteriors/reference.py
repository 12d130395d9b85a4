"""Read data and reference draws from a checkout of posteriordb (or a subset in the same folder layout)."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

DATABASE = "posterior_database"
ENVIRONMENT_VARIABLE = "POSTERIORDB"
_DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "posteriordb"
_INDEXED = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<index>\d+(?:,\d+)*)\])?")


def find_posteriordb(path: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the ``posterior_database`` folder, or None where there is none.

    Looks at ``path``, else at the environment variable ``POSTERIORDB``, else at ``shared/posteriordb`` beside the
    repository. Each may be the folder ``posterior_database`` itself or the checkout that holds it. Only the first of
    the three that is given counts: a mistyped ``path`` does not fall back to another checkout.
    """
    given = path if path is not None else os.environ.get(ENVIRONMENT_VARIABLE) or _DEFAULT
    folder = Path(given).expanduser()
    for candidate in (folder / DATABASE, folder):
        if (candidate / "posteriors").is_dir():
            return candidate
    return None


def posterior_names(root: str | os.PathLike[str] | None) -> tuple[str, ...]:
    """Return the names of all posteriors in the checkout, sorted."""
    return tuple(sorted(file.stem for file in (_database(root) / "posteriors").glob("*.json")))


def load_data(root: str | os.PathLike[str] | None, name: str) -> dict[str, Any]:
    """Return the data of posterior ``name``: lists as numpy arrays, numbers as they are."""
    database = _database(root)
    data_name = _posterior_info(database, name)["data_name"]
    data = _read_zip(database / "data" / "data" / f"{data_name}.json.zip")
    return {key: np.asarray(value) if isinstance(value, list) else value for key, value in data.items()}


def load_draws(root: str | os.PathLike[str] | None, name: str) -> dict[str, np.ndarray]:
    """Return the reference draws of posterior ``name``, chain after chain.

    Columns ``theta[1]``, ``theta[2]``, ... are gathered: each parameter is a float64 array of shape
    (chains * draws, *shape of the parameter).
    """
    database = _database(root)
    reference_name = _posterior_info(database, name).get("reference_posterior_name")
    if not reference_name:
        raise ValueError(
            f"expected a posterior with reference draws, got {name!r}, whose 'reference_posterior_name' is empty; "
            f"choose another posterior of {database}"
        )
    chains = _read_zip(database / "reference_posteriors" / "draws" / "draws" / f"{reference_name}.json.zip")
    columns = {key: np.concatenate([np.asarray(chain[key], dtype=np.float64) for chain in chains]) for key in chains[0]}
    return gather(columns)


def gather(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gather columns ``x``, ``x[i]``, ``x[i,j]`` (1-based) of shape (S,) into arrays ``x`` of shape (S, *shape)."""
    entries: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for column, values in columns.items():
        match = _INDEXED.fullmatch(column)
        if match is None:
            raise ValueError(
                f"expected a column named like 'theta', 'theta[1]' or 'theta[1,2]', got {column!r}; check the draws"
            )
        index = tuple(int(i) for i in match["index"].split(",")) if match["index"] else ()
        entries.setdefault(match["name"], {})[index] = values
    return {name: _assemble(name, parts) for name, parts in entries.items()}


def _assemble(name: str, parts: dict[tuple[int, ...], np.ndarray]) -> np.ndarray:
    """Put the columns of one parameter, keyed by 1-based index, into one array (S, *shape)."""
    if len({len(index) for index in parts}) == 1:
        shape = tuple(max(axis) for axis in zip(*parts, strict=True))
        if set(parts) == {tuple(i + 1 for i in index) for index in np.ndindex(*shape)}:
            stacked = np.stack([parts[index] for index in sorted(parts)], axis=-1)
            return stacked.reshape(stacked.shape[0], *shape)
    raise ValueError(
        f"expected every element of {name!r} once, with 1-based indices and no gaps, got the indices {sorted(parts)}; "
        "the file of draws is incomplete: fetch it again"
    )


def _database(root: str | os.PathLike[str] | None) -> Path:
    """Return the ``posterior_database`` folder at ``root`` or say how to give one."""
    database = find_posteriordb(root)
    if database is None:
        given = root if root is not None else os.environ.get(ENVIRONMENT_VARIABLE) or _DEFAULT
        raise FileNotFoundError(
            f"expected a posteriordb checkout (a folder holding {DATABASE}/posteriors), got {str(given)!r}, which is "
            f"none; clone posteriordb and give its folder as root or in the environment variable {ENVIRONMENT_VARIABLE}"
        )
    return database


def _posterior_info(database: Path, name: str) -> dict[str, Any]:
    """Return the description ``posteriors/NAME.json`` of posterior ``name``."""
    file = database / "posteriors" / f"{name}.json"
    if not file.is_file():
        known = ", ".join(posterior_names(database))
        raise ValueError(f"expected the name of a posterior in {database}, got {name!r}; choose one of: {known}")
    info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return info


def _read_zip(file: Path) -> Any:
    """Return the JSON value stored in the archive ``NAME.json.zip`` as its only member ``NAME.json``."""
    if not file.is_file():
        raise FileNotFoundError(
            f"expected the file {file}, got none at that place; the posteriordb checkout is incomplete: fetch it again"
        )
    with zipfile.ZipFile(file) as archive:
        return json.loads(archive.read(file.stem))
