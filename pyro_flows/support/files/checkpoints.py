"""Checkpoints: one file with what a call is of, what it has come to, and a digest of both."""

from __future__ import annotations

import json
import operator
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyro_flows.support.files.bundles import digest
from pyro_flows.support.files.files import replace_file
from pyro_flows.support.files.untrusted import packed, require, unpacked
from pyro_flows.support.process.fallbacks import Tried, first_line
from pyro_flows.support.process.warnings import outside

FORMAT = b"pyro_flows checkpoint 1\n"  # then the digest of the rest, a line, and the rest as torch.save writes it
EVERY = 10.0  # seconds between two writes, at least
REMEDY = "Name a new file, or remove it to begin anew."


class Checkpoint:
    """The file of one call; ``about`` says what the call is of, in plain values, which ``alike`` compares.

    A file that is damaged, or of another call, is a ValueError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        about: Mapping[str, object],
        *,
        every: float | None = None,
        alike: Callable[[Any, Any], bool] = operator.eq,
    ) -> None:
        self.path, self.every, self.alike = Path(path), EVERY if every is None else every, alike
        self.about: dict[str, object] = json.loads(json.dumps(dict(about), default=_named))
        self.failed, self.last = False, time.monotonic()

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self.last >= self.every

    def write(self, contents: Mapping[str, object]) -> None:
        """Write the file: tensors, numbers and text in lists and dicts. The work goes on if that fails."""
        self.last = time.monotonic()
        body = packed({"about": self.about, **contents})
        try:
            replace_file(self.path, FORMAT + digest(body).encode() + b"\n" + body)
        except OSError as error:  # what has been found so far is worth more than its checkpoint
            if not self.failed:
                warnings.warn(f"checkpoint: {error.strerror}; the work goes on.", stacklevel=outside())
            self.failed = True

    def read(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """Return what the file holds, None if there is no file."""
        if not self.path.exists():
            return None
        shown, whole = repr(str(self.path)), self.path.read_bytes()
        if not whole.startswith(FORMAT):
            what = "that of another release" if whole.startswith(b"pyro_flows") else "another file"
            raise ValueError(f"checkpoint: expected one of this release, got {what}, {shown}. {REMEDY}")
        found, _, body = whole[len(FORMAT) :].partition(b"\n")
        with self.reading():
            require(found.decode("ascii", "replace") == digest(body), "its SHA-256 digest differs")
            stored: dict[str, Any] = unpacked(body, device)
            about = stored["about"]
            require(isinstance(about, dict), "it does not say what it is of")
        names = [*self.about, *(name for name in about if name not in self.about)]
        different = [name for name in names if not self.alike(about.get(name), self.about.get(name))]
        if different:
            raise ValueError(
                f"checkpoint: expected one of this call, got {shown} of another (different: {', '.join(different)}). "
                f"{REMEDY}"
            )
        return stored

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read inside what the file has. It may be damaged: any error becomes a ValueError that says so."""
        with Tried() as tried:
            yield
        if tried.error is not None:
            why = "too deeply nested" if isinstance(tried.error, RecursionError) else first_line(tried.error)
            what = f"checkpoint: expected a whole file, got {str(self.path)!r}, damaged ({why}). {REMEDY}"
            raise ValueError(what) from tried.error


def _named(value: object) -> str:
    """Return a function's name, which is the same in another process, or what an object says of itself."""
    return str(getattr(value, "__qualname__", repr(value)))
