"""``fit_density``: a flow fitted to data by maximum likelihood."""

from __future__ import annotations

import copy
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from pyro_flows import _checks
from pyro_flows._progress import Bar
from pyro_flows._seeding import derive, seeded
from pyro_flows._turns import alone
from pyro_flows.density_estimation import files
from pyro_flows.density_estimation.fitted import DensityFit, bits_per_dim, like, mean_log_prob, points_for
from pyro_flows.density_estimation.points import CHUNK, Batch, Levels, Rows, Source, Stream, rows
from pyro_flows.density_estimation.schedule import Plan
from pyro_flows.density_estimation.standardizing import KINDS, is_fresh, preprocess
from pyro_flows.density_estimation.training import RACE_STEPS, RACED, Ascent, climb, rouse, widest
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.recipe import BUILDERS, ending, with_preprocess
from pyro_flows.transforms import Chain, Logit
from pyro_flows.transforms.fixed import Preprocess

MAX_STEPS = 20_000
DECAY = 1e-4  # of weights a point of data, each epoch,
FORGOTTEN = 10.0  # and so often in a training at most
BATCH = 256
LONG = 1000  # steps, from which on the step size falls with the square root of their number,
SMALL_ENOUGH = 2e-3  # down to this
CHECKED_POINTS = 5_000  # held-out points that the checks during training use
MEASURED_POINTS = 50_000  # from which scales and correlations are taken
SAVE_EVERY = 30.0  # seconds between checkpoints
SKIPPED_SHARE = 0.05  # of the steps, above which users are warned
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.monotonic, "cpu": time.process_time}


def fit_density(
    flow: Flow | str,
    data: Any,
    *,
    context: Any = None,
    validation: Any = 0.1,
    preprocess: str | None = "auto",
    levels: int | None = None,
    batch: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    start: str = "random",
    max_epochs: int | None = None,
    max_seconds: float | None = None,
    clock: str = "wall",
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> DensityFit:
    r"""Fit a flow to data by maximum likelihood, with nothing to tune.

    The data are put on a common scale by an affine map that becomes the flow's last layer. Step sizes race for a few
    steps. The largest that comes about as far as the best goes on until the mean log density of held-out points stands
    still, or a fifth of what the race left of the budget is used. Then the step size falls to zero along a cosine. An
    average of the weights over about the last tenth of the steps is what is checked and, if it is the best, what is
    kept.

    Args:
        flow: a flow of the shape of one point, which is copied, not changed; or the name of a builder for vectors
            (``"realnvp"``, ``"nice"``, ...), then with a logistic base and robust networks. Data often touch places
            that are empty in training; a normal base punishes them without measure, and networks that go on along
            straight lines throw them far out.
        data: one point a row, ``(N, ...)``: a tensor, an array, a ``numpy.memmap`` (read batch by batch), or a
            ``DataLoader`` that gives tensors, or pairs ``(data, context)``.
        context: what the density is conditional on, ``(N, context_dim)``.
        validation: the share to hold out; or held-out data, or a pair of them and their context; or ``None``, with
            which nothing stops the training but the budget. With a ``DataLoader``, it cannot be a share.
        preprocess: ``"standardize"`` (each coordinate), ``"whiten"`` (correlations too; see
            ``density_estimation/standardizing.py``), ``None``, or ``"auto"``: standardised for vectors, and for images
            with one scale for all pixels; nothing after a :class:`~pyro_flows.Logit`, which needs the unit cube.
            A map of this kind that the flow has, from an earlier fit, is replaced, never doubled; and ``"auto"`` leaves
            a trained flow as it is where that describes the data better, so that its training goes on.
        levels: for quantised data, how many levels they have (256 for bytes): values 0 to ``levels - 1``, or the same
            divided by ``levels - 1``. Level k becomes ``(k + U(0, 1)) / levels``, with fresh noise each time, and the
            density is one on the unit cube.
        batch: points a step; by default 256, or a tenth of the data if that is less, and 32 at least.
        learning_rate: the step size of Adam, without a race.
        weight_decay: of AdamW, relative to the step size; by default 1e-4 times epochs ahead (in 20 000 steps at most)
            times parameters over points (of images: pixels), since what can be learnt by heart is the more, the longer
            it takes and the more there are; but 1 at most, and so little that a tenth of the training is remembered.
        start: ``"random"``: last layers of networks that are zero get small random weights, with which training is far
            quicker; or ``"identity"``: the flow starts as it is, so that few data are first described by the base
            and the preprocessing alone (whitened, with a normal base: by a Gaussian), and stay so if nothing is better.
        max_epochs: passes through the data at most; by default, as many as make 20 000 steps, or as many as fit into
            ``max_seconds`` if that is given.
        max_seconds: seconds at most, preparation included.
        clock: what these seconds are: ``"wall"``, or ``"cpu"`` for the process's own, as benchmarks want them.
        checkpoint: a file, written each half minute at the end of an epoch and at the end. If it is there, the
            training goes on from it, as if it had not been broken off. It holds digests of data, flow and options, and
            those of another run are refused. (Of a ``DataLoader``, a few items are compared, if they are not random.)
        seed: of all randomness. The global generators are left as they were.
        progress: whether to show a bar, with held-out nats and bits a dimension.

    Raises:
        ValueError: for data of another shape than the flow's, missing or infinite values (with row and column), values
            that are no levels, a damaged checkpoint or one of another run, or an option out of range.

    Warns:
        UserWarning: if a coordinate is constant, or if more than a twentieth of the steps had a gradient that is not
            finite and were skipped.

    Reference: Dinh, Krueger and Bengio 2015; Polyak and Juditsky 1992 (averaging).

    >>> import torch, pyro_flows as pf
    >>> points = torch.randn(500, 1) * torch.tensor([1.0, 10.0]) + 5.0
    >>> fit = pf.fit_density("realnvp", points, max_epochs=3, progress=False)
    >>> fit.sample(4).shape, fit.log_prob(points).shape
    (torch.Size([4, 2]), torch.Size([500]))
    """
    began = CLOCKS[_checks.choice("clock", clock, CLOCKS)]()
    if learning_rate is not None:
        _checks.positive("learning_rate", learning_rate)
    options: dict[str, Any] = {
        "preprocess": preprocess if preprocess is None else _checks.choice("preprocess", preprocess, ("auto", *KINDS)),
        "levels": levels if levels is None else _checks.integer("levels", levels, 2),
        "learning_rate": learning_rate,
        "weight_decay": weight_decay if not weight_decay else _checks.positive("weight_decay", weight_decay),
        "start": _checks.choice("start", start, ("random", "identity")),
        "max_epochs": max_epochs if max_epochs is None else _checks.integer("max_epochs", max_epochs, 1),
        "seed": _checks.integer("seed", seed, 0),
    }
    seconds = math.inf if max_seconds is None else _checks.positive("max_seconds", max_seconds)
    files.check_checkpoint(checkpoint)
    with alone(), seeded(derive(seed, "fit_density"), like(flow).device if isinstance(flow, Flow) else None):
        made = _make(flow, data, context)
        train, held_out = _sources(made, data, context, validation, levels)
        about = {} if checkpoint is None else _identity(made, train, held_out, validation)
        made, options["preprocess"] = _with_preprocessing(made, train, preprocess)
        size = options["batch"] = _batch_size(train, batch)
        if start == "random":
            rouse(made)
        checked = [] if held_out is None else _held(held_out, CHECKED_POINTS)
        ascent = Ascent(made, train, checked, batch=size)
        steps = sys.maxsize if max_seconds is not None else MAX_STEPS
        plan = Plan(steps if max_epochs is None else max_epochs * train.steps(size), seconds, CLOCKS[clock], began)
        bar = _Bar(visible=progress, flow=made, levels=train.levels)
        keeper = files.Keeper(checkpoint, ascent, plan, SAVE_EVERY, options, about)
        if not keeper.resume():
            _choose(ascent, learning_rate, weight_decay, plan)
        climb(ascent, keeper.plan, report=bar.show, save=keeper.save)
        keeper.save(final=True)
        validated = math.nan if held_out is None else mean_log_prob(made, held_out)
        bar.close(validated)
    options.update(clock=clock, seconds=plan.clock() - keeper.plan.began)
    _warn_of_skipped(ascent)
    return _result(ascent, validated, options)


# parts ----------------------------------------------------------------------------------------------------------------


def _make(flow: Flow | str, data: Any, context: Any) -> Flow:
    """Copy the flow, or make one by a builder's name."""
    if isinstance(flow, Flow):
        return copy.deepcopy(flow)
    if not isinstance(flow, str):
        raise ValueError(f"flow: expected a Flow or a builder's name, got a {type(flow).__name__}.")
    builder = BUILDERS[_checks.choice("flow", flow, BUILDERS)]
    if isinstance(data, DataLoader):
        raise ValueError("flow: a DataLoader does not tell its shape; pass a flow, such as pf.realnvp(dim).")
    shape = rows("data", data, None, torch.zeros(())).event_shape
    if len(shape) != 1:
        raise ValueError(f"flow: a name makes a flow of vectors, the data have shape {tuple(shape)}; pass a flow.")
    width = 0 if context is None else torch.as_tensor(context).shape[-1]
    options = {} if flow == "planar" else {"network": "robust"}
    return builder(shape[0], context_dim=width, hidden=(64, 64), activation="relu", base="logistic", **options)


def _sources(flow: Flow, data: Any, context: Any, validation: Any, levels: int | None) -> tuple[Source, Source | None]:
    """Make what is trained on and what is held out."""
    train = points_for(flow, "data", data, context)
    if levels is not None:
        train = train.quantised(levels)
    if validation is None:
        return train, None
    if isinstance(validation, float):
        if isinstance(train, Stream):
            raise ValueError(
                "validation: of a DataLoader no share can be held out; pass held-out data, a loader of them, or None."
            )
        if not 0.0 < validation < 1.0:
            raise ValueError(f"validation: expected a share between 0 and 1, data or None, got {validation!r}.")
        return train.split(validation)
    pair = validation if isinstance(validation, tuple) else (validation, None)
    if len(pair) != 2:
        raise ValueError(f"validation: expected data, or a pair (data, context), got {len(pair)} items.")
    held_out = points_for(flow, "validation", *pair)
    return train, held_out if levels is None else held_out.quantised(levels)


def _with_preprocessing(flow: Flow, train: Source, kind: str | None) -> tuple[Flow, str | None]:
    """Append the affine map to the scale of the data, as measured on the data, noise of levels included.

    It takes the place of one that the flow has. A flow that knows data already, since it was trained, may be on their
    scale: then ``"auto"`` leaves it as it is.
    """
    own = ending(flow)
    if kind is None:
        return flow, None
    images, auto = len(flow.event_shape) > 1, kind == "auto"
    if auto:
        inner = flow.bijection
        if isinstance(inner.layers[-1] if isinstance(inner, Chain) else inner, Logit):
            return flow, None
        kind = "whiten" if own is not None and own.full else "standardize"
    batches = _held(train, MEASURED_POINTS)
    layer: Preprocess = preprocess(kind, batches, pooled=images)
    given = flow if auto and not is_fresh(flow) else None
    placed = with_preprocess(flow if given is None else copy.deepcopy(flow), layer)
    if given is not None and _likelihood(given, batches) >= _likelihood(placed, batches):
        return given, None if own is None else kind
    return placed, kind


@torch.no_grad()
def _likelihood(flow: Flow, batches: Sequence[Batch]) -> float:
    """Return the mean log density of about the first `CHECKED_POINTS` points; minus infinity if it is not finite."""
    total, count = 0.0, 0
    for y, context in batches:
        x, ladj = flow.bijection.inverse_and_ladj(y, context)
        total += float((flow.base_distribution().log_prob(x) + ladj).double().sum())
        count += len(y)
        if count >= CHECKED_POINTS:
            break
    return total / count if math.isfinite(total) else -math.inf


def _identity(flow: Flow, train: Source, held_out: Source | None, validation: Any) -> dict[str, Any]:
    """Return what tells a checkpoint of these data and this flow from those of others."""
    share = validation if validation is None or isinstance(validation, float) else "given"
    given = held_out if share == "given" else None
    return {
        "weights": files.values_of(flow),
        "data": files.data_digest(train),
        "validation": share,
        "held out": files.data_digest(given),
    }


def _result(ascent: Ascent, validation: float, options: dict[str, Any]) -> DensityFit:
    state, train, flow = ascent.state, ascent.source, ascent.flow
    settings = {
        **options,
        "flow": "flow" if flow.recipe is None else flow.recipe.builder,
        "points": len(train) if isinstance(train, Rows) else None,
        "event_shape": list(flow.event_shape),
        "learning_rate": state.learning_rate,
        "weight_decay": state.weight_decay,
        "steps": state.steps,
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
    )


def _warn_of_skipped(ascent: Ascent) -> None:
    skipped, steps = ascent.state.skipped, ascent.state.steps
    if skipped > SKIPPED_SHARE * steps:
        warnings.warn(
            f"data: {skipped} of {steps} steps were skipped, since their gradient was not finite. The density of some "
            "points overflows: look for far ones; take network='robust', a logistic base, a smaller learning_rate.",
            stacklevel=3,
        )


def _batch_size(train: Source, batch: int | None) -> int:
    if batch is not None:
        return _checks.integer("batch", batch, 1)
    return max(32, min(BATCH, len(train) // 10)) if isinstance(train, Rows) else BATCH


def _held(points: Source, most: int) -> list[Batch]:
    """Return about the first ``most`` points as batches that stay the same, noise included."""
    if isinstance(points, Rows):
        return list(points.first(most).ordered(CHUNK))
    found: list[Batch] = []
    for batch in points.ordered(CHUNK):
        found.append(batch)
        if sum(len(y) for y, _ in found) >= most:
            break
    return found


def _choose(ascent: Ascent, learning_rate: float | None, weight_decay: float | None, plan: Plan) -> None:
    """Set what is not given: the step size by a race of about a fifth of the budget at most, the decay by the budget.

    A short race is won by a step size that is too large for thousands of steps, so it is less for long trainings, down
    to `SMALL_ENOUGH`; and units of wide networks die of it, so those of width W race up to 1 / W only. (That Adam's
    step size should go as 1 / W: Yang et al. 2021, *Tuning large neural networks via zero-shot hyperparameter
    transfer*.)
    """
    ahead = plan.max_steps
    if math.isfinite(plan.max_seconds):
        ahead = min(ahead, int(plan.max_seconds / ascent.seconds_a_step(plan.clock)))
    counted = min(ahead, MAX_STEPS)  # for the decay: validation seldom lets more pass
    ascent.set_weight_decay(_decay(ascent, counted) if weight_decay is None else weight_decay)
    if learning_rate is None:
        scale = min(1.0, 1.0 / (widest(ascent.flow) * max(RACED)))
        ascent.race([scale * candidate for candidate in RACED], max(min(RACE_STEPS, ahead // (5 * len(RACED))), 8))
        found = ascent.state.learning_rate
        learning_rate = max(found * min(1.0, math.sqrt(LONG / max(ahead, 1))), min(found, SMALL_ENOUGH))
    ascent.state.learning_rate = learning_rate
    if weight_decay is None:
        limit = FORGOTTEN / (learning_rate * max(counted, 1))
        ascent.set_weight_decay(min(ascent.state.weight_decay, limit))


def _decay(ascent: Ascent, ahead: int) -> float:
    """Return the weight decay for a number of steps ahead.

    An image counts as often as it has pixels, at each of which convolutions use all their weights.
    """
    weights, epoch = sum(parameter.numel() for parameter in ascent.parameters), ascent.source.steps(ascent.batch)
    points = epoch * ascent.batch * math.prod(ascent.flow.event_shape[1:])
    return min(1.0, DECAY * weights / points * ahead / epoch)


class _Bar:
    """One line: the share of the budget, at the end of which it stops at the latest, and held-out nats."""

    def __init__(self, *, visible: bool, flow: Flow, levels: Levels | None) -> None:
        self.flow, self.levels = flow, levels
        self.bar = Bar("fit_density", visible)
        self.bar.watch("the race of step sizes")

    def show(self, state: str, epoch: int, share: float, nats: float) -> None:
        self.bar.watch(state)
        spent = min(round(100 * share), 100)
        self.bar.show(f"epoch {epoch}, {spent} % of the budget, {self._words(nats)}")

    def close(self, nats: float) -> None:
        self.bar.close(self._words(nats) if math.isfinite(nats) else "done")

    def _words(self, nats: float) -> str:
        return f"{nats:.3f} nats, {bits_per_dim(nats, self.flow, self.levels):.3f} bits/dim"
