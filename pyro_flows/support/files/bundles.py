"""Directories that hold one object each: files of tensors and arrays, sealed by the digests in a JSON file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, overload

from pyro_flows.support.files.files import existing, locked, replace_directory

Json: TypeAlias = "dict[str, Json] | list[Json] | str | float | int | bool | None"
Entries = Mapping[str, Any]  # of JSON, by name
VERSION = 3  # of the format
ZEROS = "0" * 64  # stands for the digest of the JSON file while that is computed
READERS = {  # of the formats
    "pyro_flows posterior": "pf.load",
    "pyro_flows amortized posterior": "pf.Amortized.load",
    "pyro_flows density": "pf.DensityFit.load",
    "pyro_flows prior": "pf.FittedPrior.load",
}
READS = 5  # attempts, where locks cannot keep saves of other processes out


@dataclass(frozen=True)
class Bundle:
    """A directory that holds one object: files of tensors and arrays, and a JSON file with their SHA-256 digests."""

    what: str  # what it holds, in a word
    format: str  # the entry ``format`` of the JSON
    text: str  # the name of the JSON file
    others: tuple[str, ...]  # the names of the other files

    def check_target(self, path: str | os.PathLike[str]) -> Path:
        """Return the directory to write to, or say why it cannot be written."""
        target = Path(path)
        if target.exists() and not target.is_dir():
            raise ValueError(f"path: expected a directory, {str(target)!r} is a file.")
        if target.is_dir() and any(target.iterdir()) and not self._is_ours(target):
            raise ValueError(
                f"path: {str(target)!r} holds other files and no saved {self.what}. Name a new or empty directory."
            )
        real = Path(os.path.realpath(target))
        kind = "the working directory" if real in _working() else "a mount point" if os.path.ismount(real) else None
        if kind is not None:
            raise ValueError(
                f"path: a save replaces a directory as a whole, and {str(target)!r} is {kind}. Name a directory inside "
                f"of it, such as {str(target / self.what)!r}."
            )
        folder = next(parent for parent in real.parents if parent.exists())
        if not folder.is_dir():
            raise ValueError(f"path: expected a directory, {str(folder)!r} in {str(target)!r} is a file.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"path: no permission to write into {str(folder)!r}, where {str(target)!r} would be made.")
        return target

    def _is_ours(self, folder: Path) -> bool:
        with suppress(OSError, ValueError):
            return _parsed((folder / self.text).read_bytes()).get("format") == self.format
        return False

    def write(self, path: Path, description: Mapping[str, object], contents: Mapping[str, bytes]) -> None:
        """Write the object at what :meth:`check_target` returned: all of it, or nothing if anything fails or kills the
        process.
        """
        digests = {**{name: digest(data) for name, data in contents.items()}, self.text: ZEROS}
        whole = {"format": self.format, "version": VERSION, "digests": digests, **description}
        text = (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode()
        sealed = text.replace(ZEROS.encode(), digest(text).encode(), 1)
        replace_directory(path, {**contents, self.text: sealed})

    def read(self, path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return description and contents. Nothing is written, so a read-only directory will do."""
        for attempt in range(READS):
            # a save may take the directory's place between two files: what failed once is read while no save can go on
            with locked(Path(os.path.realpath(path)).parent) if attempt else nullcontext(False) as alone:
                try:
                    return self._read(existing(path), str(Path(path)))
                except (OSError, ValueError):
                    if alone or attempt == READS - 1:
                        raise
        raise AssertionError  # not reached

    def _read(self, source: Path, shown: str) -> tuple[dict[str, Any], dict[str, bytes]]:
        lacking = [name for name in (*self.others, self.text) if not (source / name).is_file()]
        text = b"" if self.text in lacking else (source / self.text).read_bytes()
        description: dict[str, Any] = {}
        with suppress(ValueError):
            description = _parsed(text)
        if lacking or description.get("format") != self.format:
            why = f"{', '.join(lacking)} missing" if lacking else f"{self.text} was not written by pyro_flows"
            raise ValueError(
                f"path: expected the directory of a saved {self.what}, got {shown!r}: {why}.{self._remedy(source)}"
            )
        version, digests = description.get("version"), description.get("digests")
        if version != VERSION:
            raise ValueError(
                f"path: {shown!r} has format version {version!r}, this release of pyro_flows reads version {VERSION}. "
                "Read it with the release that wrote it, or fit and save anew."
            )
        contents = {name: (source / name).read_bytes() for name in self.others}
        digests = digests if isinstance(digests, dict) else {}
        own = str(digests.get(self.text))
        found = {name: digest(data) for name, data in contents.items()}
        found[self.text] = digest(text.replace(own.encode(), ZEROS.encode(), 1))
        wrong = [name for name, value in found.items() if digests.get(name) != value]
        if wrong:
            raise ValueError(damaged(shown, wrong, "is not what was saved: its SHA-256 digest differs"))
        return description, contents

    def _remedy(self, source: Path) -> str:
        """Say how a directory that holds another object is read."""
        for file in sorted(source.glob("*.json")):
            with suppress(OSError, ValueError):
                found = str(_parsed(file.read_bytes()).get("format"))
                if found in READERS and found != self.format:
                    return f" It is a saved {found.partition(' ')[2]}: read it with {READERS[found]}."
        return ""


def _working() -> tuple[Path, ...]:
    """Return the working directory and those above it; none if it has been removed."""
    with suppress(OSError):
        here = Path.cwd()
        return here, *here.parents
    return ()


def digest(data: bytes) -> str:
    """Return the SHA-256 digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def damaged(path: str | os.PathLike[str], names: list[str], why: str) -> str:
    """Return the sentence for files that cannot be what was written."""
    return f"path: {str(path)!r} is damaged ({', '.join(names)} {why}). Take a copy of it, or fit and save anew."


def _parsed(text: bytes) -> dict[str, object]:
    try:
        found = json.loads(text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("too deeply nested") from error
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


@overload
def plain(value: Mapping[str, object]) -> dict[str, Json]: ...
@overload
def plain(value: object) -> Json: ...
def plain(value: object) -> Json:
    """Return ``value`` as JSON has it: lists, dicts, strings, finite numbers; other numbers as strings."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
