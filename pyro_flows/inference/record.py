"""The fields of a posterior, which files and ArviZ groups are made of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.inference.verdict.chains import McmcDraws
from pyro_flows.inference.verdict.deciding import Draw
from pyro_flows.inference.verdict.methods import GUIDE
from pyro_flows.inference.verdict.verdict import Verdict
from pyro_flows.model.dims import Labeling
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.unchanged import Digests, check_unchanged, digests
from pyro_flows.support.files.bundles import plain
from pyro_flows.support.process.warnings import warn_unreliable


@dataclass(frozen=True)
class Stage:
    """What a stage of a fit came to; a figure that a stage does not have is None."""

    stage: str  # its name
    run: int | None = None  # the number of the run, from 0 on
    start: str | None = None  # the name of the start
    start_elbo: float | None = None  # the start's ELBO, nats
    elbo: float | None = None  # the ELBO at the end, nats
    step_size: float | None = None  # Adam's
    batch: int | None = None  # draws a step
    steps: int | None = None  # how many were taken
    k_hat: float | None = None  # Pareto shape of the importance weights of a fresh sample; infinite without any
    ess_ratio: float | None = None  # effective sample size of these weights over their number
    gap: float | None = None  # log evidence less ELBO, nats, by this sample
    converged: bool | None = None  # whether means, sds and ELBO stood still
    why: str | None = None  # how the training ended
    skipped: int | None = None  # steps whose gradient was not finite
    falls: int | None = None  # how often the training went back to its best state with half the step size
    details: Mapping[str, object] = field(default_factory=dict)  # what only this kind of stage has, JSON values

    def as_dict(self) -> dict[str, object]:
        """Return the fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Record:
    """What a fit found, as values; :class:`~pyro_flows.Posterior` says what each one is."""

    samples: dict[str, Tensor] = field(repr=False)
    z: Tensor = field(repr=False)
    log_p: Tensor = field(repr=False)
    log_q: Tensor = field(repr=False)
    log_weights: Tensor = field(repr=False)
    _used: Tensor = field(repr=False)
    _used_log_p: Tensor = field(repr=False)
    _used_log_q: Tensor = field(repr=False)
    k_hat: float
    ess: float
    elbo: float
    log_evidence: float
    verdict: Verdict
    losses: Tensor = field(repr=False)
    history: tuple[dict[str, Any], ...] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    coordinates: tuple[str, ...] = field(repr=False)
    guide: Any = field(repr=False)
    guide_name: str
    flow: Flow | FlowMixture | None = field(repr=False)
    density: LogDensity | None = field(repr=False)
    missing: dict[str, str] = field(repr=False)
    _stored: tuple[dict[str, Any], dict[str, Any]] | None = field(repr=False, default=None)  # as read from a file
    chains: McmcDraws | None = field(repr=False, default=None)
    _drawer: Draw | None = field(repr=False, default=None)  # more raw draws of a guide without a flow
    _labeling: Labeling = field(repr=False, default_factory=Labeling)  # what assign_coords was told
    _data: Digests | None = field(repr=False, default=None)  # of the model's arguments, when this was made

    def __post_init__(self) -> None:
        if self._data is None and self.density is not None:
            object.__setattr__(self, "_data", digests(self.density))

    def _raw_draws(self) -> Draw | None:
        """Return how to draw from the guide anew, n -> z (n, D), log q (n,); None without a guide or a model."""
        if self.density is None:
            return None
        return self._drawer if self.flow is None else self.flow.draw

    def _hand_on(self, function: str) -> None:
        """Warn where draws that the verdict calls unreliable go out by ``function``."""
        if self.verdict.status == "unreliable":
            warn_unreliable(self, function, self.verdict.reasons)

    @property
    def method(self) -> str:
        """What made the draws to use; the names are those of :attr:`Verdict.guide_method`, and ``"MCMC"``."""
        return self.verdict.method

    @property
    def described(self) -> str:
        """The method, with the class of a guide or sampler that is the caller's."""
        own = self._of_mcmc or self.method == GUIDE
        return f"{self.method} ({self.guide_name})" if own and self.guide_name != self.method else self.method

    @property
    def resampled(self) -> bool:
        """Whether ``samples`` are importance-resampled draws."""
        return self.verdict.status == "corrected"

    @property
    def _replaced(self) -> bool:
        """Whether ``samples`` are other draws than the guide's own: resampled ones, or those of chains."""
        return self.verdict.status in ("corrected", "refined")

    @property
    def _of_mcmc(self) -> bool:
        """Whether the draws are chains of another sampler, see :func:`~pyro_flows.from_mcmc`."""
        return self.verdict.chains is not None and self.verdict.chains.elsewhere

    @property
    def _by_chains(self) -> bool:
        """Whether ``samples`` are draws of Markov chains."""
        return self.chains is not None and (self.verdict.status == "refined" or self._of_mcmc)

    @property
    def chain_count(self) -> int:
        """How many chains ``samples`` are, one after the other; 1 if they are none."""
        return self.chains.count if self.chains is not None and self._by_chains else 1

    @property
    def _used_log_weights(self) -> Tensor:
        """Normalized log weights that ``samples`` still carry (S,): equal ones unless they are the guide's own."""
        return torch.full_like(self._used_log_p, -math.log(len(self._used))) if self._replaced else self.log_weights

    @property
    def effective(self) -> float:
        """How many independent draws ``samples`` are worth for means under the posterior; NaN if unreliable.

        The effective sample size of the weights; of resampled draws, (sum of counts)^2 / (sum of their squares); of
        chains, the bulk ESS of the worst coordinate.
        """
        if self.verdict.status == "unreliable":
            return math.nan
        if self._by_chains and self.verdict.chains is not None:
            return self.verdict.chains.ess_bulk
        if not self.resampled:
            return self.ess
        counts = torch.unique(self._used, dim=0, return_counts=True)[1].double()
        return float(counts.sum().square() / counts.square().sum())

    @property
    def seconds(self) -> float:
        """How long the fit took; NaN where nobody measured it."""
        return float(self.settings.get("seconds", math.nan))

    def _need_density(self) -> LogDensity:
        """Return the model as a log density, for it to be run again, unless it is missing or its data have changed."""
        found = self._need_model()
        self._check_unchanged()
        return found

    def _need_model(self) -> LogDensity:
        """Return the model as a log density, for its structure, or where its data have been checked already."""
        if self.density is None:
            why, remedy = self.missing.get("density"), "load(path, model, *args) with the arguments of the fit."
            if why in (None, "loaded without a model"):
                raise ValueError(f"this needs the model: {remedy}")
            raise ValueError(
                f"this needs the model, but the posterior was {why}. Save it where the model is, then {remedy}"
            )
        return self.density

    def _check_unchanged(self, *, runs: bool = True) -> None:
        """Refuse a model whose data have changed since, without running it if need be; with no model, do nothing."""
        if self.density is not None and self._data is not None:
            check_unchanged(self.density, self._data, self.z if runs else self.z[:0], self.log_p)


def counted(posterior: Record) -> str:
    """Return how many coordinates a posterior has, in words."""
    dim = posterior._used.shape[1]
    return f"{dim} unconstrained coordinate{'' if dim == 1 else 's'}"


Recorded = TypeVar("Recorded", bound=Record)  # what takes a posterior gives a posterior


# what the ArviZ object of a result says of itself ---------------------------------------------------------------------

PACKAGES = ("pyro-ppl", "torch", "arviz-base", "arviz-stats")


def attributes(posterior: Record) -> dict[str, str | float]:
    """Return what the object says of itself, the verdict first: numbers and strings only."""
    kind = {"corrected": "psis-resampled", "refined": "chains"}.get(posterior.verdict.status, posterior.method)
    return {
        "status": posterior.verdict.status,  # both first, where a display that is cut short still shows them
        "verdict": str(posterior.verdict),
        "method": posterior.method,
        "inference_library": "pyro_flows",
        "inference_library_version": _version("pyro-flows"),
        **{f"{name.replace('-', '_')}_version": _version(name) for name in PACKAGES},
        "settings": json.dumps(plain(posterior.settings)),
        "seed": int(posterior.settings["seed"]),
        "device": str(posterior.z.device),
        "dtype": str(posterior.z.dtype).removeprefix("torch."),
        "sampling": "mcmc" if posterior._of_mcmc else kind,
    }


def attributes_of(posterior: Record) -> dict[str, str | float]:
    """Return the attributes as they were stored, if the posterior was loaded."""
    return attributes(posterior) if posterior._stored is None else posterior._stored[1]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
