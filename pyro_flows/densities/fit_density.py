"""``fit_density``: a flow fitted to data by maximum likelihood."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributions import constraints

from pyro_flows.densities import files
from pyro_flows.densities.ascent import Ascent, State, rouse
from pyro_flows.densities.encoding import Encoding
from pyro_flows.densities.fitted import DensityFit, bits_per_dim, mean_log_prob
from pyro_flows.densities.points import Levels, Rows, Source, like
from pyro_flows.densities.preparing import (
    CHECKED_POINTS,
    MIXTURE_SHARE,
    begin_mixture,
    defend,
    held,
    identity,
    make,
    mixtures,
    sources,
    with_scale,
)
from pyro_flows.densities.standardizing import KINDS
from pyro_flows.densities.training import MAX_STEPS, Plan, batch_size, choose, climb
from pyro_flows.flows.bases import DefendedBase
from pyro_flows.flows.ensemble import averaged
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture_base import MixtureBase
from pyro_flows.flows.recipe import AUTO, without_fixed
from pyro_flows.flows.unbent import warn_unbent
from pyro_flows.support import checks
from pyro_flows.support.files.bundles import Entries
from pyro_flows.support.process import journal
from pyro_flows.support.process.interrupts import STATE, interruptible
from pyro_flows.support.process.progress import Bar
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.process.threads import alone
from pyro_flows.support.process.warnings import outside

AUTO_START, SMALL = "small", 0.01  # how a default flow starts: at its mixture, but for so much of random weights
SAVE_EVERY = 30.0  # seconds between checkpoints
SKIPPED_SHARE = 0.05  # of the steps, above which users are warned
Pair = tuple[Source, Source | None]  # what is trained on, and what is held out
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.monotonic, "cpu": time.process_time}


@checks.options
def fit_density(
    flow: object = AUTO,
    data: object = None,
    *,
    context: object = None,
    validation: object = 0.1,
    preprocess: str | None = "auto",
    levels: int | None = None,
    noise: float | None = None,
    batch: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    start: str = "auto",
    max_epochs: int | None = None,
    max_seconds: float | None = None,
    clock: str = "wall",
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> DensityFit:
    r"""Fit a flow to data by maximum likelihood, with nothing to tune.

    It raises :math:`\frac1N \sum_n \log q(x_n)`, in nats. ``fit_density(data)`` and ``fit_density(data, context=...)``
    take a flow by themselves. Its base is a mixture of Student t distributions, which begins at a mixture of Gaussians
    by expectation maximization, with the number of parts that held-out points like best. All of it is trained
    together. The weights that held-out points like best are kept, so the result is not behind that mixture on them.
    Given a context, weights, places, scales and tails of the parts depend on it. One output given a context gets the
    mixture alone; else there are splines too, and above 100 coordinates affine couplings. At the end, the mixture as it
    began, which no context moves from the regression line, is mixed in. Its share w is what held-out points say: it is
    large for few of them, and is ``settings["share_without_context"]``, or ``settings["share_of_mixture"]`` if there is
    no context. Without one, held-out points may ask for a mixture of narrower parts in its place: such parts cannot be
    trained well. Of up to 1000 points, five such flows are fitted, each with others held out, and the result is
    the mean of their densities. All take the learning rate that the first found. With ``max_seconds``, another one is
    fitted as long as the time that the first took is left.

    The data are put on a common scale by an affine map that becomes the flow's last layer. Learning rates are
    compared in short trial runs. The largest that comes about as far as the best goes on until the mean log density of
    held-out points stops rising, or a fifth of the remaining budget is used. Then it falls to zero along a cosine. An
    average of the weights over about the last tenth of the steps is what is checked and, if it is the best, what is
    kept. If its gain on held-out points is within its standard error, the start is kept: few points tell no more. (Not
    so where the start is mixed in.)

    Args:
        flow: a flow of the shape of one point, which is copied, not changed; or the name of a builder for vectors
            (``"realnvp"``, ``"nice"``, ...), then with a logistic base and robust networks. Data often touch places
            that are empty in training; a normal base punishes them without measure, and networks that go on along
            straight lines throw them far out. ``"auto"``, or data in its place: the default above. Flows that are made
            here have double precision where torch's default dtype does not hold the data or the context.
        data: one point a row, ``(N, ...)``, or ``(N,)`` numbers: a tensor, an array, a data frame, a ``numpy.memmap``
            (read batch by batch), or a ``DataLoader`` that gives tensors, or pairs ``(data, context)``.
        context: what the density is conditional on, ``(N, columns)`` or ``(N,)``. Flows that are made here, by default
            or by name, take a data frame or an array with missing values (NaN, None): these become the mean and a
            column that says where. Texts, booleans, pandas' categories, and whole numbers of at most 20 values, each in
            10 rows or more, become columns of 0 and 1. Builders' flows standardize their context.
        validation: the share to hold out, others for each of five flows; or held-out data, or a pair of them
            and their context, for one flow; or ``None``, with which nothing stops the training but the budget. With a
            ``DataLoader``, it cannot be a share.
        preprocess: ``"standardize"`` (each coordinate), ``"whiten"`` (correlations too; see
            ``densities/standardizing.py``), ``None``, or ``"auto"``: standardized for vectors, and for images
            with one scale for all pixels; nothing for signals, nor after a :class:`~pyro_flows.transforms.Logit`, which
            needs the unit cube. A map of this kind that the flow has, from an earlier fit, is replaced, never doubled;
            and ``"auto"`` leaves a trained flow as it is where that describes the data better, so that its training
            goes on.
        levels: for quantized data, how many levels they have (256 for bytes): values 0 to ``levels - 1``, or the same
            divided by ``levels - 1``. Level k becomes ``(k + U(0, 1)) / levels``, with fresh noise each time, and the
            density is one on the unit cube.
        noise: standard deviation :math:`\sigma` of normal noise that all points get, afresh each time, in units of the
            data (of the unit cube, with levels). The density, its nats and draws are those of the noisy data,
            :math:`x + \sigma\epsilon`; :meth:`DensityFit.denoise` takes the noise out of draws. Images are black or
            white at many pixels, where a density without noise has narrow peaks to learn.
        batch: points a step; by default 256, or a tenth of the data if that is less, and 32 at least. A ``DataLoader``
            has batches of its own.
        learning_rate: of Adam, without trial runs.
        weight_decay: of AdamW, relative to the step size; by default 1e-4 times epochs ahead (in 20 000 steps at most)
            times parameters over points (of images: pixels), since what can be learned by heart is the more, the longer
            it takes and the more there are; but 1 at most, and so little that a tenth of the training is remembered.
            The default flow of one output given a context has none.
        start: ``"random"``: last layers of networks that are zero get small random weights, with which training is far
            quicker; ``"auto"``: the same, or for the default flow a hundredth of that, so that it begins at its
            mixture; or ``"identity"``: the flow starts as it is, so that few data are first described by the base
            and the preprocessing alone (whitened, with a normal base: by a Gaussian), and stay so if nothing is better.
        max_epochs: passes through the data at most; by default, as many as make 20 000 steps, or as many as fit into
            ``max_seconds`` if that is given.
        max_seconds: seconds at most, preparation included.
        clock: what these seconds are: ``"wall"``, or ``"cpu"`` for the process's own, as benchmarks want them.
        checkpoint: a file, written each half minute at the end of an epoch and at the end. If it is there, the
            training goes on from it, as if it had not been broken off. (Flows after the first add a number to the
            name.) It holds digests of data, flow and options, and
            those of another run are refused. (Of a ``DataLoader``, a few items are compared, if they are not random.)
        seed: of all randomness. The global generators are left as they were.
        progress: whether to show a bar, with held-out nats and bits a dimension.

    Cost: up to ``max_seconds`` or ``max_epochs``; a step is a pass and a gradient of the flow for a batch of points.

    Raises:
        ValueError: for data of another shape than the flow's, missing or infinite values (with row and column), values
            that are no levels, a damaged checkpoint or one of another run, or an option out of range.

    Warns:
        UserWarning: if a coordinate is constant, if coordinates fulfil a linear equation, such as a sum or a copy, if
            there are ten rows of training or more for each different value, if the flow can only shift and scale a
            coordinate, or if more than a twentieth of the steps had a gradient that is not finite and were skipped.

    Reference: Bishop 1994, *Mixture density networks*; Breiman et al. 1984, *Classification and Regression Trees* (the
    rule of one standard error); Krogh and Vedelsby 1995, *Neural network ensembles, cross validation, and active
    learning*; Dinh, Krueger and Bengio 2015 (arXiv 1410.8516); Polyak and Juditsky 1992 (averaging,
    doi:10.1137/0330046); Yao, Vehtari, Simpson and Gelman 2018 (w, doi:10.1214/17-BA1091); Zhai et al. 2024 (arXiv
    2412.06329: noise, taken out of draws).

    >>> import torch, pyro_flows as pf
    >>> x = torch.rand(300, 1)
    >>> given = pf.fit_density(x**2 + 0.1 * torch.randn(300, 1), context=x, max_epochs=3, progress=False)
    >>> given.quantiles([0.1, 0.5, 0.9], x[:4]).shape
    torch.Size([4, 3, 1])
    >>> points = torch.randn(500, 2) * torch.tensor([1.0, 10.0]) + 5.0
    >>> fit = pf.fit_density("realnvp", points, max_epochs=3, progress=False)
    >>> fit.sample(4).shape, fit.log_prob(points).shape
    (torch.Size([4, 2]), torch.Size([500]))
    """
    began = CLOCKS[checks.choice("clock", clock, CLOCKS)]()
    if data is None:
        flow, data = AUTO, flow
    auto = isinstance(flow, str) and flow == AUTO
    if preprocess is not None:
        checks.choice("preprocess", preprocess, ("auto", *KINDS))
    if levels is not None:
        checks.integer("levels", levels, 2)
    spread = 0.0 if noise is None else checks.positive("noise", noise)
    checks.choice("start", start, ("auto", "random", "identity"))
    options: dict[str, object] = {"preprocess": preprocess, "levels": levels, "learning_rate": learning_rate}
    options |= {"noise": noise, "weight_decay": weight_decay, "start": start, "max_epochs": max_epochs, "seed": seed}
    seconds = math.inf if max_seconds is None else checks.positive("max_seconds", max_seconds)
    file = journal.check(checkpoint)
    device = like(flow).device if isinstance(flow, Flow) else None
    encoding = Encoding.of(context) if context is not None and isinstance(flow, str) else None
    if encoding is not None:
        context = encoding.encode(context)
        if isinstance(validation, tuple) and len(validation) == 2:
            validation = validation[0], encoding.encode(validation[1])
    with interruptible(), alone(), seeded(derive(seed, "fit_density"), device):
        made = make(flow, data, context)
        if not auto:
            warn_unbent(made, "fit_density")
        support = made.bijection.codomain
        if spread and getattr(support, "base_constraint", support) is not constraints.real:
            raise ValueError(f"noise: noisy points leave the flow's support, {support}; pass a flow without alpha=.")
        pairs = sources(made, data, context, validation, levels, spread, folds=auto)
        plan = Plan(0, seconds, CLOCKS[clock], began)
        with Bar("fit_density", progress) as line:
            asked = _Asked(options, batch, auto, validation, file, line)
            runs = _runs(asked, made, lambda: make(flow, data, context), pairs, plan)
            options |= runs[0].options
            whole, validated = _together(runs, options)
            first = runs[0].ascent
            line.close(_words(validated, whole, first.source.levels) if math.isfinite(validated) else "done")
        STATE.take()  # there is nothing more to be lost
    options.update(clock=clock, seconds=sum(run.seconds for run in runs))
    state = runs[-1].ascent.state if runs[-1].ascent.state.interrupted else first.state
    _warn(state, f", in flow {len(runs)} of {len(pairs)}" if len(pairs) > 1 else "", file)
    return replace(_result(first, whole, validated, options, encoding), why=state.why)


def _warn(state: State, which: str, checkpoint: Path | None) -> None:
    """Warn of steps that were skipped, and of an interruption, in ``which`` flow."""
    if state.skipped > SKIPPED_SHARE * state.steps:
        warnings.warn(
            f"data: {state.skipped} of {state.steps} steps were skipped, since their gradient was not finite. The "
            "density of some points overflows: look for far ones; take network='robust', a logistic base, a smaller "
            "learning_rate.",
            stacklevel=outside(),
        )
    if state.interrupted:
        kept = checkpoint is not None and checkpoint.exists()
        rest = " The same call goes on from the last checkpoint." if kept else ""
        warnings.warn(f"fit_density: {state.why}{which}. The flow is what it had come to.{rest}", stacklevel=outside())


@dataclass(frozen=True)
class _Asked:
    """What the training of each flow takes from the call."""

    options: Entries
    batch: int | None
    auto: bool
    validation: object
    checkpoint: Path | None
    line: Bar


@dataclass(frozen=True)
class _Run:
    """One flow after its training."""

    ascent: Ascent
    seconds: float  # that it took
    held_out: Source | None
    fixed: MixtureBase | None  # the mixture that is to be mixed in
    options: Entries  # what was chosen


def _runs(asked: _Asked, made: Flow, again: Callable[[], Flow], pairs: Sequence[Pair], plan: Plan) -> list[_Run]:
    """Train the first flow, and further ones, made ``again``, as long as the time that the first took is left."""
    several, seed = len(pairs) > 1, asked.options["seed"]
    asked.line.done = f"flow 1 of {len(pairs)}" if several else ""
    runs = [_run(asked, made, *pairs[0], plan, asked.checkpoint)]
    options = {**asked.options, "learning_rate": runs[0].ascent.state.learning_rate}
    for number, pair in enumerate(pairs[1:], 1):
        limit = plan.max_seconds - sum(run.seconds for run in runs)  # those before a checkpoint count as well
        if any(run.ascent.state.interrupted for run in runs) or limit < runs[0].seconds:
            break
        path = None if asked.checkpoint is None else Path(f"{asked.checkpoint}.{number}")
        asked.line.done = f"flow {number + 1} of {len(pairs)}"
        bounds, like_first = Plan(0, limit, plan.clock, plan.clock()), replace(asked, options=options)
        with seeded(derive(seed, f"flow {number} of the density"), like(made).device):
            runs.append(_run(like_first, again(), *pair, bounds, path, warns=False))
    return runs


def _run(
    asked: _Asked,
    flow: Flow,
    train: Source,
    held_out: Source | None,
    bounds: Plan,
    checkpoint: Path | None,
    *,
    warns: bool = True,
) -> _Run:
    """Put a new flow on the scale of the data, give it its start, and train it within the bounds' seconds."""
    options, start = asked.options, asked.options["start"]
    about = {} if checkpoint is None else identity(flow, train, held_out, asked.validation)
    flow, kind = with_scale(flow, train, options["preprocess"], warns=warns)
    size, epochs = batch_size(train, asked.batch), options["max_epochs"]
    steps = MAX_STEPS if math.isinf(bounds.max_seconds) else sys.maxsize
    plan, fixed = replace(bounds, max_steps=steps if epochs is None else epochs * train.steps(size)), None

    def over() -> bool:
        return plan.progress(0) > MIXTURE_SHARE

    if asked.auto:
        flow, fixed = begin_mixture(flow, train, held_out, over)
        start = AUTO_START if start == "auto" else start
    elif isinstance(flow.mixture, DefendedBase):
        if held_out is not None:
            _, fixed = mixtures(flow, train, held_out, over)
        without_fixed(flow)
    if start != "identity":
        rouse(flow, SMALL if start == AUTO_START else 1.0)
    ascent = Ascent(flow, train, [] if held_out is None else held(held_out, CHECKED_POINTS), batch=size)
    chosen: dict[str, object] = {"preprocess": kind, "batch": size}
    keeper = files.Keeper(checkpoint, ascent, plan, SAVE_EVERY, {**options, **chosen}, about, fixed)
    _train(keeper, options["learning_rate"], options["weight_decay"], fixed is not None, asked.line)
    plan = keeper.plan
    return _Run(ascent, plan.clock() - plan.began, held_out, keeper.fixed, chosen)


def _together(runs: Sequence[_Run], options: dict[str, object]) -> tuple[Flow, float]:
    """Mix in what was not trained, if there is something, and return the mean density of all flows, and their score.

    The score is the mean log density of what was held out, each flow's own; NaN if nothing was.
    """
    flows = [run.ascent.flow for run in runs]
    members = [
        (run.ascent.flow, run.fixed, run.held_out) for run in runs if run.fixed is not None and run.held_out is not None
    ]
    if members:
        which = "share_without_context" if flows[0].context_dim else "share_of_mixture"
        options[which] = defend(members)
    scores = [(mean_log_prob(run.ascent.flow, run.held_out), run.held_out) for run in runs if run.held_out is not None]
    validated = sum(score for score, _ in scores) / len(scores) if scores else math.nan
    if len(flows) == 1:
        return flows[0], validated
    options["flows"] = len(flows)
    return averaged(flows), validated


def _words(nats: float, flow: Flow, levels: Levels | None) -> str:
    return f"{nats:.3f} nats, {bits_per_dim(nats, flow, levels):.3f} bits/dim"


def _train(
    keeper: files.Keeper, learning_rate: float | None, weight_decay: float | None, stacked: bool, line: Bar
) -> None:
    """Train, or go on from a checkpoint, to the end."""
    ascent = keeper.ascent

    def show(state: str, epoch: int, share: float, nats: float) -> None:
        line.watch(state)
        said = _words(nats, ascent.flow, ascent.source.levels)
        line.show(f"epoch {epoch}, {min(round(100 * share), 100)} % of the budget, {said}")

    line.watch("comparing learning rates")
    start = ascent.keep()
    try:
        if not keeper.resume():
            choose(ascent, learning_rate, weight_decay, keeper.plan)
    except KeyboardInterrupt:
        if STATE.count > 1:
            raise
        ascent.assign(start)
        ascent.average = start
        ascent.state.interrupt()
    STATE.hold(True)
    climb(ascent, keeper.plan, report=show, save=keeper.save, stacked=stacked)
    if not ascent.state.interrupted:  # the last checkpoint is of an end of an epoch: from there one can go on
        keeper.save(final=True)


def _result(ascent: Ascent, flow: Flow, validation: float, options: Entries, encoding: Encoding | None) -> DensityFit:
    state, train, trained = ascent.state, ascent.source, ascent.flow
    settings = {
        **options,
        "flow": "flow" if trained.recipe is None else trained.recipe.builder,
        "points": len(train) if isinstance(train, Rows) else None,
        "event_shape": list(flow.event_shape),
        **{name: getattr(state, name) for name in ("learning_rate", "weight_decay", "steps")},
        "epochs": state.epoch,
        "skipped": state.skipped,
        "falls": state.falls,
    }
    return DensityFit(
        flow=flow,
        losses=torch.tensor(state.losses),
        checks=torch.tensor(state.checks, dtype=torch.float64).reshape(-1, 2),
        validation=validation,
        levels=train.levels,
        settings=settings,
        why=state.why,
        encoding=encoding,
    )
