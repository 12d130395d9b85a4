"""Whether to believe a fit: PSIS, effective sample size, and what weighting would change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_flows._display import verdict_html
from pyro_flows._seeding import derive
from pyro_flows.verdict.chains import ChainFigures
from pyro_flows.verdict.next_step import next_step
from pyro_flows.verdict.psis import psis

ESS_RATIO = 0.1
MEAN_SHIFT = 0.1
SD_SHIFT = 0.1
WIDENING = math.log(2.0)  # of an sd: beyond it, weights tell that mass is missing in the tails, not how much
LEVEL = math.log(1.5)  # largest weight over the mean one, below which weights have no tail for k-hat to look at
MENDED_MEAN = 1.0  # sds: a guide that is further off has not seen what it should weigh
UNDOUBTED_ESS = 0.5  # of S: with k-hat below MENDED_K, weights that are good whatever went before
MENDED_K = 0.5  # of weights that have to mend something: above it they have no variance
HEAVY_INDEX = 0.42
POOL = 4
CONTAINED_K, CONTAINED_ESS, CONTAINED_GAP, CONTAINED_SHIFT = 1.0, 0.9, 0.05, 0.05  # see _hangs_on_nothing
NEXT_TO_NONE_K, NEXT_TO_NONE_ESS, NEXT_TO_NONE_GAP = 1.5, 0.99, 0.005  # and this
SHOWN = 0.005  # sds: a smaller shift is printed as 0.00, and its coordinate is an accident of rounding
CHECKED = 50  # draws run with Pyro's argument checks on

Draw = Callable[[int], tuple[Tensor, Tensor]]  # n -> z (n, D), log q (n,)


@dataclass(frozen=True)
class Verdict:
    """A judgement and the numbers it rests on; ``str()`` is one plain sentence.

    Attributes:
        status: ``"ok"``: the guide's draws can be used as they are; ``"corrected"``: they cannot, but importance
            resampling corrects them, and ``samples`` holds the resampled ones; ``"refined"``: ``samples`` are draws of
            Markov chains that started at the guide's; ``"unreliable"``: none of these.
        k_hat: Pareto shape of the importance weights.
        k_threshold: min(1 - 1 / log10(S), 0.7).
        ess_ratio: effective sample size of the weights over S.
        mean_shift: largest difference between raw and weighted means, in posterior sds, over unconstrained coordinates.
        sd_shift: largest absolute log ratio of raw and weighted sds.
        where: the coordinate of the larger shift.
        reasons: what spoke against ``ok``, in words.
        notes: what was not or not fully checked, and what else to know before the draws are used.
        chains: figures of the chains, if a sampler was tried.
    """

    status: str
    k_hat: float
    k_threshold: float
    ess_ratio: float
    mean_shift: float
    sd_shift: float
    where: str
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    chains: ChainFigures | None = None

    def __str__(self) -> str:
        return self._sentence() + (f" Note: {'; '.join(self.notes)}." if self.notes else "")

    def _sentence(self) -> str:
        at = f", at {self.where}" if self.mean_shift >= SHOWN else ""
        figures = (
            f"k-hat {self.k_hat:.2f} (threshold {self.k_threshold:.2f}), ESS/S {self.ess_ratio:.2f}, "
            f"largest change of a mean by weighting {self.mean_shift:.2f} sd{at}"
        )
        if self.status == "ok":
            return f"ok: the samples can be used as they are. Figures: {figures}."
        why = "; ".join(self.reasons)
        if self.status == "corrected":
            what = "the guide's own draws need a correction; the samples were importance-resampled and can be used"
            return f"corrected: {what}. Why: {why}. Figures: {figures}."
        if self.status == "refined":
            what = "the samples are Markov chains that started at the guide's draws and converged; they can be used"
            return f"refined: {what}. Why: {why}. Figures: {self.chains}."
        step = next_step(self.reasons)
        return f"unreliable: do not use these samples. Why: {why}. Next step: {step}. Figures: {figures}."

    __repr__ = __str__  # what a REPL shows

    def _repr_html_(self) -> str:
        return verdict_html(str(self))


@dataclass(frozen=True)
class Weighing:
    """Draws scored by both densities: smoothed weights and what they imply."""

    log_weights: Tensor
    k_hat: float
    ess: float
    elbo: float
    log_evidence: float
    mean_shift: Tensor
    sd_shift: Tensor
    widening: float
    distance: float  # the largest shift of a mean, of the draws that are possible under p
    broken: int
    heavy: Tensor | None = None  # (D,): quantiles were compared in place of moments

    @property
    def threshold(self) -> float:
        """Largest admissible k-hat for this many draws."""
        return min(1.0 - 1.0 / math.log10(max(len(self.log_weights), 11)), 0.7)

    @property
    def admissible(self) -> bool:
        """Whether weighted averages can be trusted."""
        return self.k_hat < self.threshold and self.ess >= ESS_RATIO * len(self.log_weights)


def weigh(z: Tensor, log_p: Tensor, log_q: Tensor) -> Weighing:
    """Compare draws ``z`` (S, D) from q with their log densities under p and q."""
    ratio = (log_p - log_q).double()
    broken = int((~torch.isfinite(ratio)).sum())
    ratio = torch.where(torch.isfinite(ratio), ratio, -torch.inf)
    if broken == len(ratio):
        nothing = torch.full((z.shape[1],), torch.nan)
        return Weighing(ratio, math.inf, 0.0, -math.inf, -math.inf, nothing, nothing, 0.0, math.inf, broken)
    log_weights, k_hat = psis(ratio)
    log_evidence = float(torch.logsumexp(ratio, 0) - math.log(len(ratio)))
    if float(ratio.max()) - log_evidence < LEVEL:
        k_hat = min(k_hat, 0.0)
    weights, points = log_weights.exp().unsqueeze(-1), z.double()
    mean, weighted, possible = points.mean(0), (weights * points).sum(0), torch.isfinite(ratio)
    spread = points.std(0)
    weighted_spread = (weights * (points - weighted).square()).sum(0).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    narrowing = (spread / weighted_spread).log()
    mean_shift = (mean - weighted).abs() / weighted_spread
    distance = (points[possible].mean(0) - weighted).abs() / weighted_spread
    heavy = heavy_tails(points[possible])
    if bool(heavy.any()):  # moments that do not exist are noise
        moved, narrowed = _quantile_shifts(points[:, heavy], weights[:, 0])
        mean_shift[heavy], distance[heavy], narrowing[heavy] = moved, moved, narrowed
    return Weighing(
        log_weights=log_weights,
        k_hat=k_hat,
        ess=float(1.0 / weights.square().sum()),
        elbo=float(ratio[possible].mean()),
        log_evidence=log_evidence,
        mean_shift=mean_shift,
        sd_shift=narrowing.abs(),
        widening=float(-narrowing.min()),
        distance=float(distance.max()),
        broken=broken,
        heavy=heavy,
    )


def heavy_tails(points: Tensor) -> Tensor:
    """Return which columns (D,) of draws (S, D) have tails so heavy that their variance may not exist.

    The tail index of each side is estimated from the 3 sqrt(S) draws that are farthest from the median. From an index
    of 0.5 on there is no variance; what counts as heavy begins a little below.

    Reference: Dekkers, Einmahl and de Haan 1989, "A moment estimator for the index of an extreme-value distribution".
    """
    count = len(points)
    tail = int(3.0 * math.sqrt(count))
    if tail < 30 or tail >= count // 2:
        return torch.zeros(points.shape[1], dtype=torch.bool, device=points.device)
    away = torch.nan_to_num(points - points.median(0).values)
    heavy = torch.zeros(points.shape[1], dtype=torch.bool, device=points.device)
    for side in (away, -away):
        largest = side.topk(tail + 1, dim=0).values.clamp_min(torch.finfo(side.dtype).tiny).log()
        excess = largest[:-1] - largest[-1]
        first, second = excess.mean(0), excess.square().mean(0)
        index = first + 1.0 - 0.5 / (1.0 - first.square() / second.clamp_min(torch.finfo(side.dtype).tiny))
        heavy = heavy | (index > HEAVY_INDEX)
    return heavy


def _quantile_shifts(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return shifts of quartiles in weighted sds (by the quartiles), and log ratios of spreads, raw over weighted."""
    ordered, places = points.sort(0)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=points.dtype, device=points.device)
    cumulative = weights[places].cumsum(0)
    wanted = levels[None].expand(points.shape[1], -1).contiguous()
    index = torch.searchsorted(cumulative.mT.contiguous(), wanted).clamp_max(len(points) - 1)
    weighted, raw = ordered.gather(0, index.mT), torch.quantile(points, levels, dim=0)
    scale = ((weighted[3] - weighted[1]) / 1.349).clamp_min(torch.finfo(points.dtype).tiny)
    ratios = torch.stack([(raw[j] - raw[i]) / (weighted[j] - weighted[i]) for i, j in ((0, 4), (1, 3))])
    widest = ratios.log().abs().argmax(0)
    return ((raw - weighted)[1:4].abs() / scale).amax(0), ratios.log().gather(0, widest[None])[0]


def judge(
    weighing: Weighing,
    names: Sequence[str],
    *,
    warnings: Sequence[str] = (),
    failures: Sequence[str] = (),
    notes: Sequence[str] = (),
    contained: bool = False,
    doubts: Sequence[str] = (),
) -> Verdict:
    """Turn a weighing into a verdict.

    Args:
        weighing: the scored draws.
        names: labels of the coordinates.
        warnings: what speaks against the raw draws (a fit that was cut short, runs that disagree).
        failures: what speaks against the weighted draws too (a mode that the guide lacks).
        notes: what was not checked, or is to be known.
        contained: whether a search found no place next to the guide where it has too little.
        doubts: what speaks against draws whose weights are not good (a fit that was cut short after poor rounds).
    """
    if weighing.heavy is not None and bool(weighing.heavy.any()):
        found = [names[index] for index in weighing.heavy.nonzero().flatten().tolist()]
        said = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        notes = (*notes, f"{said}: heavy tails, so quantiles were compared; means and sds may not exist")
    reasons = list(failures)
    ratio = weighing.ess / len(weighing.log_weights)
    good = weighing.k_hat < MENDED_K and ratio >= UNDOUBTED_ESS
    reasons += () if good else doubts
    if not weighing.k_hat < weighing.threshold and contained and _hangs_on_nothing(weighing):
        notes = (
            *notes,
            f"k-hat {weighing.k_hat:.2f} is above its threshold, but weighting changes no result, and Markov chains "
            "that start at the guide's draws stay where the guide has enough mass",
        )
    elif not weighing.k_hat < weighing.threshold:
        reasons.append(f"k-hat {weighing.k_hat:.2f} is not below its threshold {weighing.threshold:.2f}")
    if ratio < ESS_RATIO:
        reasons.append(f"ESS/S {ratio:.3f} is below {ESS_RATIO}")
    mean, where = (float(x) for x in weighing.mean_shift.max(0))
    sd, sd_where = (float(x) for x in weighing.sd_shift.max(0))
    moved = []
    if mean > MEAN_SHIFT:
        moved.append(f"importance weighting changes the mean of {names[int(where)]} by {mean:.2f} sd")
    if sd > SD_SHIFT:
        moved.append(f"importance weighting changes the sd of {names[int(sd_where)]} by a factor {math.exp(sd):.2f}")
    if weighing.widening > WIDENING:
        reasons.append(
            f"importance weighting widens an sd {math.exp(weighing.widening):.1f} times, more than weights can correct"
        )
    if math.isnan(mean) or math.isnan(sd):
        reasons.append(f"a mean or an sd of {names[int(where if math.isnan(mean) else sd_where)]} is not a number")
    if not weighing.distance <= MENDED_MEAN:
        reasons.append(
            f"importance weighting changes a mean by {weighing.distance:.3g} sd, more than weights can correct"
        )
    if moved and MENDED_K <= weighing.k_hat < weighing.threshold:
        reasons.append(
            f"k-hat {weighing.k_hat:.2f} is not below {MENDED_K} and weighting changes the results, so the weights "
            "have infinite variance"
        )
    if weighing.broken:
        moved.append(f"{weighing.broken} draws have no finite log density")
    status = "unreliable" if reasons else "corrected" if moved or warnings or doubts else "ok"
    return Verdict(
        status=status,
        k_hat=weighing.k_hat,
        k_threshold=weighing.threshold,
        ess_ratio=ratio,
        mean_shift=mean,
        sd_shift=sd,
        where=names[int(where)],
        reasons=(*reasons, *moved, *warnings, *(doubts if good else ())),
        notes=tuple(notes),
    )


def _hangs_on_nothing(weighing: Weighing) -> bool:
    """Whether the largest weights carry next to nothing: the guide is right but for a tail that holds hardly any mass.

    k-hat tells that weights have no mean square, and above 1 no mean. Draws that are used as they are need neither, if
    the effective sample size is near its maximum, log evidence and ELBO agree, and weighting changes no mean and no sd;
    and if something else than weights, which know of the guide's own draws only, says that nothing is missing. The
    smaller the part that all unequal weights have together, the less their tail can say.
    """
    gap, share = weighing.log_evidence - weighing.elbo, weighing.ess / len(weighing.log_weights)
    shift = max(float(weighing.mean_shift.max()), float(weighing.sd_shift.max()))
    next_to_none = share >= NEXT_TO_NONE_ESS and gap <= NEXT_TO_NONE_GAP
    good = share >= CONTAINED_ESS and gap <= CONTAINED_GAP and shift <= CONTAINED_SHIFT
    return good and weighing.k_hat < (NEXT_TO_NONE_K if next_to_none else CONTAINED_K)


@dataclass(frozen=True)
class Decision:
    """Raw draws ``z`` with their densities, the verdict on them, and the draws to use."""

    z: Tensor
    log_p: Tensor
    log_q: Tensor
    log_weights: Tensor
    weighing: Weighing
    verdict: Verdict
    used: Tensor
    used_log_p: Tensor
    used_log_q: Tensor


def decide(
    draw: Draw,
    score: Callable[[Tensor], Tensor],
    names: Sequence[str],
    *,
    draws: int,
    seed: int,
    warnings: Sequence[str] = (),
    failures: Sequence[str] = (),
    notes: Sequence[str] = (),
    contained: bool = False,
    doubts: Sequence[str] = (),
    again: Callable[[], Weighing] | None = None,
    complaint: Callable[[Tensor], str | None] = lambda z: None,
) -> Decision:
    """Draw a pool of four times as many draws as asked for, weigh and judge it, and choose the draws to use.

    The pool steadies k-hat, whose standard error is about (1 + k) / sqrt(3 sqrt(S)). The first ``draws`` of it are the
    raw draws; where weighting mends them, the draws to use are resampled from the whole pool, and a second pool has to
    come to the same verdict.

    Args:
        draw: n -> draws z (n, D) and their log density (n,) under the guide.
        score: z -> log density (n,) under the model.
        names: labels of the coordinates.
        draws: how many.
        seed: of the resampling.
        warnings: see :func:`judge`.
        failures: see :func:`judge`.
        notes: see :func:`judge`.
        contained: see :func:`judge`.
        doubts: see :func:`judge`.
        again: weighs a second pool, if draws are to be corrected.
        complaint: z -> what is invalid about the model at some of the first draws, though its density is finite there.
    """
    pool, pool_q = draw(POOL * draws)
    pool_p = score(pool)
    weighing = weigh(pool, pool_p, pool_q)
    objection = complaint(pool[:CHECKED])
    if objection is not None:
        failures = (*failures, f"the model is invalid at some draws: {objection}")
    said: dict[str, Any] = {"warnings": warnings, "notes": notes, "contained": contained, "doubts": doubts}
    verdict = judge(weighing, names, failures=failures, **said)
    if verdict.status == "corrected" and again is not None:  # one lucky pool does not correct a guide
        second = judge(again(), names, contained=contained)
        if second.status == "unreliable":
            failures = (*failures, f"a second sample from the guide fails the check ({second.reasons[0]})")
            verdict = judge(weighing, names, failures=failures, **said)
    raw = torch.arange(draws, device=pool.device)
    index = resample(weighing.log_weights, draws, seed=seed) if verdict.status == "corrected" else raw
    return Decision(
        z=pool[:draws],
        log_p=pool_p[:draws],
        log_q=pool_q[:draws],
        log_weights=torch.log_softmax(weighing.log_weights[:draws], 0),
        weighing=weighing,
        verdict=verdict,
        used=pool[index],
        used_log_p=pool_p[index],
        used_log_q=pool_q[index],
    )


def resample(log_weights: Tensor, draws: int, *, seed: int) -> Tensor:
    """Return ``draws`` indices drawn by systematic resampling of normalised log weights (S,), in random order."""
    generator = torch.Generator().manual_seed(derive(seed, "resampling"))
    cumulative = log_weights.double().cpu().exp().cumsum(0)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    points = (torch.arange(draws, dtype=torch.float64) + offset) / draws
    index = torch.searchsorted(cumulative, points * cumulative[-1]).clamp_max(len(cumulative) - 1)
    return index[torch.randperm(draws, generator=generator)].to(log_weights.device)
