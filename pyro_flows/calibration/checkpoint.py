"""What a call has finished: simulations of ``sbc`` in a file, posteriors of ``fit_many`` in a folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyro_flows.calibration.ranks import STATUSES, Ranked
from pyro_flows.calibration.wiring import Case
from pyro_flows.model.unchanged import digest_of
from pyro_flows.posterior.posterior import Posterior, load
from pyro_flows.support.files.bundles import Entries
from pyro_flows.support.files.checkpoints import REMEDY, Checkpoint
from pyro_flows.support.files.untrusted import require
from pyro_flows.support.process.warnings import UnreliableWarning

ABOUT = "fit_many.json"


class Finished:
    """The finished simulations of a run, and their file; without a path nothing is kept.

    ``shapes`` are those of the ranks of a simulation, by name.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, about: Entries, *, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.simulations, self.draws, self.shapes = about["simulations"], about["draws"], shapes
        self.file = None if path is None else Checkpoint(path, about)
        self.done: dict[int, Ranked] = {}
        stored = None if self.file is None else self.file.read()
        if self.file is not None and stored is not None:
            with self.file.reading():
                self.done = {number: self._ranked(*entry) for number, entry in stored["done"].items()}
                known = all(type(number) is int and 0 <= number < self.simulations for number in self.done)
                require(known, "it has other simulations")

    def _ranked(self, ranks: dict[str, Tensor], status: str) -> Ranked:
        """Return the ranks and the status of one simulation, if they can be such."""
        require(set(ranks) == set(self.shapes), f"it has ranks of {', '.join(ranks)}")
        for name, values in ranks.items():
            require(tuple(values.shape) == self.shapes[name], f"ranks of {name} have shape {tuple(values.shape)}")
            whole = values.dtype == torch.long and bool(((values >= 0) & (values <= self.draws)).all())
            require(whole, f"a rank of {name} is none of 0 to {self.draws}")
        require(status in STATUSES, f"a status is {status!r}")
        return Ranked(ranks, status)

    def add(self, number: int, found: Ranked) -> None:
        """Add a finished simulation; write the file if the last time is long ago."""
        self.done[number] = found
        if self.file is not None and self.file.due():
            self.write()

    def write(self) -> None:
        """Write the file."""
        if self.file is not None:
            done = sorted(self.done.items())
            self.file.write({"done": {number: [one.ranks, one.status] for number, one in done}})


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
        file = Checkpoint(self.path / ABOUT, about)
        try:
            self.path.mkdir(exist_ok=True)
            new = not any(self.path.iterdir())
        except OSError as error:
            why = error.strerror or error
            raise ValueError(f"checkpoint: expected a folder, got {str(path)!r} ({why}). {REMEDY}") from error
        if new:
            file.write({})
        if file.read() is None:
            raise ValueError(f"checkpoint: expected a new folder or one of fit_many, got {str(path)!r}. {REMEDY}")
        for number, case in enumerate(cases):
            if (self.path / str(number)).is_dir():
                self.done[number] = self._read(number, case)

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
