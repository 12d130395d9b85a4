"""The results so far of ``fit_many`` in a folder: finished posteriors, and checkpoints of running fits."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pyro_flows._files import replace_file
from pyro_flows._warnings import UnreliableWarning
from pyro_flows.calibration.cases import Case
from pyro_flows.model.unchanged import digest_of
from pyro_flows.posterior.posterior import Posterior, load

ABOUT = "fit_many.json"
REMEDY = "Name a new folder, or remove it to begin anew."


class Folder:
    """The finished fits of one call of ``fit_many``: each a saved posterior, or not there.

    Args:
        path: of the folder; None keeps nothing.
        model: the Pyro model.
        cases: the arguments of each data set.
        about: all else that tells the call from others, plain values.

    Raises:
        ValueError: for a folder that is of another call, or holds other files; before any work.
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
