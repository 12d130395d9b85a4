"""``fit_many``: one model, many data sets, a judged posterior for each."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

from pyro_flows.calibration.batch import FEWEST, coordinates_for, fit_stack, size_of_batch
from pyro_flows.calibration.checkpoint import Folder
from pyro_flows.calibration.processes import check_jobs, fit_each
from pyro_flows.calibration.ranks import STATUSES
from pyro_flows.calibration.wiring import Case, cases_of, grouped
from pyro_flows.fitting.fit import MAX_STEPS
from pyro_flows.fitting.state import Plan, as_asked, recipe_for
from pyro_flows.flows.recipe import AUTO, FlowLike
from pyro_flows.inference.chains.refine import which
from pyro_flows.inference.scoring import check_memory
from pyro_flows.inference.verdict.deciding import CHECKED
from pyro_flows.inference.verdict.methods import AMORTIZED
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.observations import warn_if_nothing_observed
from pyro_flows.model.precision import LostDigits
from pyro_flows.model.stack import NotStackable
from pyro_flows.model.unchanged import qualname, software
from pyro_flows.posterior.posterior import Posterior
from pyro_flows.support import checks
from pyro_flows.support.files.bundles import Entries
from pyro_flows.support.process.clock import Clock
from pyro_flows.support.process.fallbacks import fallback
from pyro_flows.support.process.interrupts import STATE, interruptible
from pyro_flows.support.process.progress import Bar
from pyro_flows.support.process.seeding import derive
from pyro_flows.support.process.threads import alone
from pyro_flows.support.process.warnings import outside


class Answers(Protocol):
    """What answers before any fit: an :class:`~pyro_flows.Amortized`."""

    def posterior(self, *args: object, model_kwargs: Mapping[str, object] | None, draws: int, seed: int) -> Posterior:
        """Return the judged posterior of a data set."""
        ...


@checks.options
def fit_many(
    model: Callable[..., object],
    data: Sequence[object],
    *,
    model_kwargs: Mapping[str, object] | None = None,
    flow: FlowLike = AUTO,
    layers: int | None = None,
    draws: int = 4000,
    seed: int = 0,
    max_steps: int | None = None,
    escalate: bool = True,
    refine: str | bool = "auto",
    together: bool = True,
    jobs: int | None = None,
    amortized: Answers | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[Posterior]:
    r"""Fit one model to many data sets; return a judged posterior for each.

    Data sets whose arguments have equal shapes are fitted side by side. Their flows
    :math:`q_{\theta_1}, \dots, q_{\theta_K}` are trained in lockstep: parameters are stacked, data are inputs of one
    recorded graph, and what a step costs besides arithmetic is paid once for all. The starts and the search for missed
    modes are stacked too. Unless a flow is asked for, nothing is trained where importance weights correct a Student-t
    distribution with the posterior's moments. Then each fit is judged by itself, by the rules of :func:`fit`. A
    posterior that would be ``unreliable`` is fitted again by :func:`fit`, with all that it has. Fits that cannot go
    side by side (the model takes numbers out of its data, or runs draw by draw; fewer than four data sets of equal
    shapes; more than 200 dimensions) are made one by one.

    Args:
        model: a Pyro model (function or module).
        data: the arguments of each data set: a tuple, a dict of keyword arguments, or a single argument.
        model_kwargs: keyword arguments that all data sets share.
        flow: as in :func:`fit`; side by side, ``"auto"`` is ``"realnvp"``.
        layers: as in :func:`fit`; by default two side by side, and the builder's own number one by one.
        draws: as in :func:`fit`.
        seed: of all randomness; one seed, one answer. Each data set has a seed of its own, derived from it.
        max_steps: as in :func:`fit`, for fits one by one.
        escalate: as in :func:`fit`, likewise.
        refine: as in :func:`fit`, likewise.
        together: whether data sets go side by side where they can.
        jobs: processes for fits one by one, by joblib (the extra ``parallel``); -1 for one a processor. With None, what
            ``joblib.parallel_config`` says, if it was called (Dask, Ray), else this process.
        amortized: what :func:`amortize` returned for this model: it answers first, and only data sets to which its
            answer is unreliable are fitted. Their draws are then :math:`q(\theta \mid y)` of one flow for all.
        checkpoint: a folder that keeps finished posteriors, each as a saved one, and checkpoints of fits one by one. A
            call that was stopped goes on from there, and comes to the same draws and verdicts. It belongs to one model,
            its data, options and packages. A batch of data sets side by side is made again as a whole.
        progress: show what is being done, how many are done, and about how long the others will take.

    Returns:
        Posteriors in the order of ``data``. Verdicts of fits side by side note that the search for missed modes was a
        shorter one. ``settings["side_by_side"]`` tells with how many others a fit shared its steps. After Ctrl-C,
        SIGTERM or SIGHUP, which come with a warning, data sets without a posterior have None. A second signal raises,
        and so does one that comes before the first posterior.

    Raises:
        ValueError: before any work, for a bad option, or a checkpoint that is damaged or of another call; for data that
            the model cannot be fitted to, with their number.
        ImportError: for several processes without joblib.

    Cost: for small models a fifth to a fifteenth of as many calls of :func:`fit`; memory for 128 data sets at a time.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> posteriors = pf.fit_many(model, list(torch.arange(5.0)), draws=500, progress=False)
    >>> [posterior.verdict.status for posterior in posteriors]
    ['ok', 'ok', 'ok', 'ok', 'ok']
    """
    cases = cases_of(model, data, model_kwargs)
    options = {"flow": flow, "layers": layers, "draws": draws, "max_steps": max_steps}
    options |= {"escalate": escalate, "refine": refine}
    many = Many(model, cases, options, seed, together, jobs, amortized)
    named = {**options, "flow": flow if isinstance(flow, str) else type(flow).__name__, "model": qualname(model)}
    about = {**named, "seed": seed, "together": together, "amortized": amortized, "software": software()}
    kept = many.kept = Folder(checkpoint, model, cases, about)
    found = dict(kept.done)
    with interruptible(), Bar("fit_many", progress) as bar:
        try:
            _fit_all(many, found, bar)
        except KeyboardInterrupt:
            if not found or STATE.count > 1:
                raise
        STATE.hold(True)
        counts = count(posterior.verdict.status for posterior in found.values())
        bar.close(", ".join(f"{number} {status}" for status, number in counts.items()))
    if len(found) < len(cases):
        message = f"fit_many: interrupted ({STATE.name}) after {len(found)} of {len(cases)} data sets; others are None."
        warnings.warn(message, stacklevel=outside())
    return cast(list[Posterior], [found.get(number) for number in range(len(cases))])  # None after a signal only


def _fit_all(many: Many, found: dict[int, Posterior], bar: Bar) -> None:
    """Fit all data sets; put what is done into ``found``."""
    done = dict(many.kept.done)
    finished = len(done)
    for numbers in many.batches():
        for number, posterior, final in many.fits(numbers, bar, done) if set(numbers) - set(done) else ():
            if number in done:
                continue
            found[number] = posterior
            finished += final
            if final:
                many.kept.add(number, posterior)
            bar.count(finished, len(many.cases))
            if STATE.take():
                return


def count(statuses: Iterator[str]) -> dict[str, int]:
    """Return how many fits have each status, the best first."""
    listed = list(statuses)
    return {name: listed.count(name) for name in STATUSES if name in listed}


@dataclass
class Many:
    """All fits of a call: which go side by side, and how.

    ``options`` are those of :func:`fit`, ``reason`` says why data sets do not go side by side, once that is known, and
    ``kept`` is what is done already.
    """

    model: Callable[..., object]
    cases: Sequence[Case]
    options: Entries
    seed: int
    together: bool
    jobs: int | None
    amortized: Answers | None = None
    reason: str | None = None
    kept: Folder = field(default_factory=Folder)

    def __post_init__(self) -> None:
        options = self.options
        which(options["refine"])
        check_jobs(self.jobs)
        layers = {} if options["layers"] is None else {"layers": options["layers"]}
        self.recipe = recipe_for(options["flow"], layers)
        self._read: dict[int, LogDensity] = {}
        self._leads: dict[int, int] = {number: group[0] for group in grouped(self.cases) for number in group}

    def batches(self) -> list[list[int]]:
        """Return the numbers of the data sets in batches; what goes side by side is in one batch.

        Batches depend on the data alone, so that work that is taken up again has the same ones.
        """
        found = []
        for group in grouped(self.cases):
            size = size_of_batch(self._lead(group[0])) if self.together else 1
            found += [group[first : first + size] for first in range(0, len(group), size)]
        return found if self.together else [[number for part in found for number in part]]

    def fits(
        self, numbers: Sequence[int], bar: Bar, done: Container[int] = ()
    ) -> Iterator[tuple[int, Posterior, bool]]:
        """Yield the number and the posterior of each data set of a batch, and whether it stays as it is.

        One that would be unreliable is fitted once more, by itself, and yielded again; those ``done`` are not.
        """
        again = [number for number in numbers if number not in done]
        if self.amortized is not None:
            bar.watch(AMORTIZED)
            answers = dict[int, Posterior]()
            for number in numbers:
                options = {"draws": self.options["draws"], "seed": derive(self.seed, f"data set {number}")}
                case = self.cases[number]
                answers[number] = self.amortized.posterior(*case.args, model_kwargs=case.kwargs, **options)
            answered = [number for number, answer in answers.items() if answer.verdict.status != "unreliable"]
            yield from ((number, answers[number], True) for number in answered if number in again)
            again, numbers = ([number for number in part if number not in answered] for part in (again, numbers))
        if self.together and len(numbers) >= FEWEST and self.reason is None:
            for number, posterior in zip(numbers, self._side_by_side(numbers, bar), strict=False):
                if posterior is None:
                    continue
                final = posterior.verdict.status != "unreliable"
                if final and number in again:
                    again.remove(number)
                yield number, posterior, final
        bar.watch("fits one by one")
        seeds = {number: derive(self.seed, f"data set {number}") for number in again}
        cases = {number: self.cases[number] for number in again}
        options = {name: value for name, value in self.options.items() if value is not None}
        for number, posterior in fit_each(self.model, cases, options, seeds, self.jobs, self.kept.under_way):
            yield number, posterior, True

    def _side_by_side(self, numbers: Sequence[int], bar: Bar) -> list[Posterior | None]:
        """Fit a batch side by side, or those of it that can be; nothing if that cannot be done."""
        with alone():
            lead = self._lead(self._leads[numbers[0]])
            try:
                try:
                    return self._stacked(lead, numbers, bar)
                except LostDigits:
                    self._read = {self._leads[numbers[0]]: lead.in_double()}
                    return self._stacked(self._lead(self._leads[numbers[0]]), numbers, bar)
            except NotStackable as error:
                self.reason = fallback("data sets are fitted one by one", error)
                return []

    def _stacked(self, lead: LogDensity, numbers: Sequence[int], bar: Bar) -> list[Posterior | None]:
        """Fit a batch side by side, in the precision and the coordinates of ``lead``, unless that is LostDigits."""
        densities = [self.cases[number].density(self.model, number, lead) for number in numbers]
        first = densities[0]
        warn_if_nothing_observed(first.structure, first.trace_at, self.model, first.args, first.kwargs)
        check_memory(first, self.options["draws"])
        plans = [self._plan(number, bar) for number in numbers]
        densities = coordinates_for(plans[0], [lead, *densities])
        return fit_stack(plans, densities, seed=derive(self.seed, f"batch {numbers[0]}"), report=bar.watch)

    def _lead(self, number: int) -> LogDensity:
        """Return the density of the first data set of a group; the last one is kept."""
        if number not in self._read:
            with alone():
                self._read = {number: self.cases[number].density(self.model, number)}
        return self._read[number]

    def _plan(self, number: int, bar: Bar) -> Plan:
        return Plan(
            self.model,
            self.cases[number].args,
            self.cases[number].kwargs,
            self.recipe,
            draws=self.options["draws"],
            seed=derive(self.seed, f"data set {number}"),
            runs=1,
            max_steps=self.options["max_steps"] or MAX_STEPS,
            train_model=False,
            escalate=self.options["escalate"],
            refine=None,
            clock=Clock(raises=True),
            bar=bar,
            automatic=self.options["flow"] == AUTO and self.options["layers"] is None,
            checked=max(5, CHECKED // len(self.cases)),  # few: invalid arguments are a matter of the model
            asked=as_asked({"flow": self.options["flow"], "layers": self.options["layers"]}),
        )
