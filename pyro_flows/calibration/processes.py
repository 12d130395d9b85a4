"""Fits one by one, in this process or in processes of joblib."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from pyro_flows.calibration.wiring import Case, numbered
from pyro_flows.fitting.fit import fit
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import Model
from pyro_flows.posterior.export.files import like
from pyro_flows.posterior.posterior import Posterior
from pyro_flows.support.files.bundles import Entries

T = TypeVar("T")


def check_jobs(jobs: int | None) -> None:
    """Check the number of processes, and that joblib is there for several."""
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs == 0):
        raise ValueError(f"jobs: expected a number of processes, -1 for one a processor, or None, got {jobs!r}.")
    if jobs not in (None, 1) and importlib.util.find_spec("joblib") is None:
        raise ImportError('jobs: several processes need joblib. Install it: pip install "pyro-flows[parallel]".')


def run_all(tasks: Sequence[Callable[[], T]], jobs: int | None) -> Iterator[T]:
    """Yield the result of each task in turn, from this process or from joblib's.

    With ``jobs`` None, a backend that ``joblib.parallel_config`` has set is taken (Dask and Ray have some), and else
    this process.
    """
    loaded = sys.modules.get("joblib")
    if jobs is None and (loaded is None or not _is_configured(loaded)):
        jobs = 1
    if jobs == 1 or len(tasks) < 2:
        yield from (task() for task in tasks)
        return
    import joblib

    # Ray's backend gives all results at the end only.
    as_they_come = joblib.Parallel(n_jobs=jobs)._backend.supports_return_generator
    with joblib.Parallel(n_jobs=jobs, return_as="generator" if as_they_come else "list") as parallel:
        yield from parallel(joblib.delayed(_called)(task) for task in tasks)


def _called(task: Callable[[], T]) -> T:
    """Call a task. Dask hashes what it calls, and tasks have no hash: it waited for ever."""
    return task()


def _is_configured(joblib: ModuleType) -> bool:
    """Whether the caller has chosen a backend or a number of processes."""
    parallel, own = joblib.Parallel(), ("LokyBackend", "SequentialBackend")
    return parallel.n_jobs not in (None, 1) or type(parallel._backend).__name__ not in own


@dataclass(frozen=True)
class FitTask:
    """One fit, as a value that can be sent to another process."""

    model: Model
    number: int
    case: Case
    options: Entries
    seed: int

    def __call__(self) -> Posterior:
        case, options = self.case, {"progress": False, "raise_on_interrupt": True, **self.options}
        with numbered(self.number):
            return fit(self.model, *case.args, model_kwargs=case.kwargs, seed=self.seed, **options)


def fit_each(
    model: Model,
    cases: Mapping[int, Case],
    options: Entries,
    seeds: Mapping[int, int],
    jobs: int | None,
    checkpoint: Callable[[int], Path | None],
) -> Iterator[tuple[int, Posterior]]:
    """Yield the number and the posterior of each data set in turn, with its model."""
    own = {number: {**options, "checkpoint": checkpoint(number)} for number in cases}
    tasks = [FitTask(model, number, case, own[number], seeds[number]) for number, case in cases.items()]
    for (number, case), posterior in zip(cases.items(), run_all(tasks, jobs), strict=True):
        yield number, posterior if posterior.density is not None else with_model(posterior, model, case)


def with_model(posterior: Posterior, model: Model, case: Case) -> Posterior:
    """Give a posterior that was pickled its log density and its guide back."""
    read = LogDensity(model, case.args, case.kwargs, noncentered=posterior.settings["noncentered"])
    density = like(read, posterior.z)
    flow = posterior.flow
    if not isinstance(flow, (Flow, FlowMixture)):
        missing = {name: why for name, why in posterior.missing.items() if name in ("guide", "flow")}
        return replace(posterior, density=density, _stored=None, missing=missing)
    guide = AutoFlow.of(flow, density.structure, model, density.args, density.kwargs)
    return replace(posterior, density=density, guide=guide, _stored=None, missing={})
