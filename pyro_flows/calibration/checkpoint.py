"""What a call has finished: simulations of ``sbc`` in a file, posteriors of ``fit_many`` in a folder."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyro_flows.calibration.ranks import STATUSES, Ranked
from pyro_flows.calibration.wiring import Case
from pyro_flows.model.unchanged import digest_of
from pyro_flows.posterior.posterior import Posterior, load
from pyro_flows.support.files.bundles import Entries, digest
from pyro_flows.support.files.files import replace_file
from pyro_flows.support.files.untrusted import require
from pyro_flows.support.process.fallbacks import Tried, first_line
from pyro_flows.support.process.warnings import UnreliableWarning

FORMAT = "pyro_flows calibration 1"
EVERY = 10.0  # seconds between two writes of the file
ABOUT = "fit_many.json"
REMEDY = "Name a new folder, or remove it to begin anew."


def key_of(options: Entries, *values: Mapping[str, Tensor]) -> str:
    """Return a digest of the options and of all simulated values: these tell the model, its data and the seed."""
    return digest_of([json.dumps(dict(options), sort_keys=True, default=_named), *values])


def _named(value: object) -> str:
    """Return a function's name, which is the same in another process, or what an object says of itself."""
    return str(getattr(value, "__qualname__", repr(value)))


class Checkpoint:
    """The finished simulations of a run (of this ``key``, see :func:`key_of`), in a file that is whole or as it was.

    ``shapes`` are those of the ranks of a simulation, by name. Without a path nothing is kept.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        key: str,
        *,
        simulations: int,
        draws: int,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.path, self.key = None if path is None else Path(path), key
        self.simulations, self.draws, self.shapes = simulations, draws, shapes
        self.done: dict[int, Ranked] = {}
        self._written = time.monotonic()
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            stored = json.loads(path.read_bytes())
            body = stored["body"]
            whole = stored["format"] == FORMAT and stored["digest"] == digest(_text(body))
            require(isinstance(body["key"], str) and isinstance(body["done"], dict), "entries are missing")
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            why = "too deeply nested" if isinstance(error, RecursionError) else first_line(error)
            raise ValueError(f"checkpoint: {str(path)!r} is no checkpoint of sbc, or is damaged ({why}).") from error
        if not whole:
            raise ValueError(f"checkpoint: {str(path)!r} is damaged, or of another version. Remove it to begin anew.")
        if body["key"] != self.key:
            raise ValueError(
                f"checkpoint: {str(path)!r} is of a run with another model, other data or other options. Take another "
                "file, or remove it."
            )
        with Tried() as tried:
            self.done = {int(number): self._ranked(entry) for number, entry in body["done"].items()}
            require(all(0 <= number < self.simulations for number in self.done), "it has other simulations")
        if tried.error is not None:  # whatever a damaged file leads to
            raise ValueError(f"checkpoint: {str(path)!r} is damaged ({first_line(tried.error)}).") from tried.error

    def _ranked(self, entry: Entries) -> Ranked:
        """Return the ranks and the status of one simulation, if they can be such."""
        found = {name: torch.tensor(value) for name, value in entry["ranks"].items()}
        require(set(found) == set(self.shapes), f"it has ranks of {', '.join(found)}")
        for name, ranks in found.items():
            require(tuple(ranks.shape) == self.shapes[name], f"ranks of {name} have shape {tuple(ranks.shape)}")
            whole = ranks.dtype == torch.long and bool(((ranks >= 0) & (ranks <= self.draws)).all())
            require(whole, f"a rank of {name} is none of 0 to {self.draws}")
        require(entry["status"] in STATUSES, f"a status is {entry['status']!r}")
        return Ranked(found, entry["status"])

    def add(self, number: int, found: Ranked) -> None:
        """Add a finished simulation; write the file if the last time is long ago."""
        self.done[number] = found
        if time.monotonic() - self._written >= EVERY:
            self.write()

    def write(self) -> None:
        """Write the file."""
        self._written = time.monotonic()
        if self.path is None:
            return
        done = {
            str(number): {"ranks": {name: value.tolist() for name, value in one.ranks.items()}, "status": one.status}
            for number, one in sorted(self.done.items())
        }
        body = {"key": self.key, "done": done}
        text = json.dumps({"format": FORMAT, "digest": digest(_text(body)), "body": body})
        replace_file(self.path, text.encode())


def _text(body: Entries) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


# fit_many -------------------------------------------------------------------------------------------------------------


class Folder:
    """The finished fits of one call of ``fit_many``, each a saved posterior; without a path nothing is kept.

    ``about`` is what tells the call from others beside its data, plain values. A folder of another call, or with other
    files, is a ValueError, before any work.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        model: Callable[..., object] | None = None,
        cases: Sequence[Case] = (),
        about: Mapping[str, object] | None = None,
    ) -> None:
        self.path, self.model = None if path is None else Path(path), model
        self.done: dict[int, Posterior] = {}
        if self.path is None:
            return
        about = {**(about or {}), "data": digest_of([(case.args, case.kwargs) for case in cases])}
        text = json.dumps({name: str(value) for name, value in about.items()}, indent=1)
        self._check(self.path, text)
        for number, case in enumerate(cases):
            if (self.path / str(number)).is_dir():
                self.done[number] = self._read(number, case)

    def _check(self, path: Path, text: str) -> None:
        """Make the folder, or find out whether it is of this call."""
        try:
            path.mkdir(exist_ok=True)
            if not any(path.iterdir()):
                replace_file(path / ABOUT, text.encode())
            stored = (path / ABOUT).read_text()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ValueError(
                f"checkpoint: expected a new folder or one of fit_many, got {str(path)!r} ({why}). {REMEDY}"
            ) from error
        if stored != text:
            raise ValueError(
                f"checkpoint: expected one of this call, got {str(path)!r} of another model, other data or other "
                f"options. {REMEDY}"
            )

    def _read(self, number: int, case: Case) -> Posterior:
        assert self.path is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreliableWarning)
            try:
                return load(self.path / str(number), self.model, *case.args, model_kwargs=case.kwargs)
            except ValueError as error:
                raise ValueError(f"checkpoint: {error} {REMEDY}") from error

    def under_way(self, number: int) -> Path | None:
        """Return the checkpoint of a fit that is made by itself."""
        return None if self.path is None else self.path / f"{number}.journal"

    def add(self, number: int, posterior: Posterior) -> None:
        """Save a finished fit; the work goes on if that fails."""
        if self.path is None:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnreliableWarning)
                posterior.save(self.path / str(number))
            (self.path / f"{number}.journal").unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(f"checkpoint: {error.strerror}; the work goes on.", stacklevel=2)
