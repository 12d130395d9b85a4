"""From draws to a verdict on them, and to the draws to use."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyro_flows.inference.verdict.chains import McmcDiagnostics
from pyro_flows.inference.verdict.methods import MCMC
from pyro_flows.inference.verdict.verdict import IMPROPER, NAMED, Verdict
from pyro_flows.inference.verdict.weighing import Weighing, in_words, resample, weigh
from pyro_flows.support import arviz
from pyro_flows.support.thresholds import (
    DIVERGENT_SHARE_OF_MCMC,
    ESS_OF_MCMC,
    ESS_SHARE_COLLAPSED,
    ESS_SHARE_EVEN,
    ESS_SHARE_LEAST,
    ESS_SHARE_PROMISING,
    EVIDENCE_GAP_GOOD,
    EVIDENCE_GAP_GOOD_A_DIM,
    K_HAT_GOOD,
    K_HAT_MOST,
    MEAN_SHIFT_MOST,
    R_HAT_CONVERGED,
    SD_WIDENING_MOST,
    SHIFT_ERRORS,
    SHIFT_MOST,
    SHIFT_SEEN,
)

MENDED = f"is not below {K_HAT_GOOD} and weighting changes the results"
LEAST_DRAWS = 100  # below, weights say nothing
TOO_MUCH = "too much to correct"
POOL = 4
# draws by which a candidate is accepted, draws by which it is dropped at once, and draws that a search begins at; half
# of these for a survey of modes before there is a flow, and at least for a choice of coordinates
JUDGED_DRAWS, LOOKED_AT_DRAWS, SEARCHED_DRAWS = 20_000, 4000, 1000
ESTIMATED_DRAWS = 2000  # draws by which a mean is estimated: an ELBO, a mass, an evidence, moments
# draws of common random numbers by which ELBOs are compared, of a first look at weights, and that are moved: by exact
# symmetries, and as walkers; twice as many tell the weights of one normal or Student-t distribution of several
COMPARED_DRAWS = 256
# draws that cost much: run one by one, with Pyro's argument checks on; climbed from; at
# which all rows are looked at
CHECKED = 50


def judge(
    weighing: Weighing, names: Sequence[str], *, warnings: Sequence[str] = (), failures: Sequence[str] = (),
    notes: Sequence[str] = (), doubts: Sequence[str] = (), changed: Sequence[str] = (),
) -> Verdict:  # fmt: skip
    """Turn the weighing of draws into a verdict.

    Args:
        weighing: of the draws.
        names: labels of the coordinates.
        warnings: what speaks against the raw draws (a fit that was cut short, runs that disagree).
        failures: what speaks against the weighted draws too (a mode that the guide lacks).
        notes: what was not checked, or is to be known.
        doubts: what speaks against draws whose weights are not good (a run that began at a missed mode and left it).
        changed: what weighting changes besides means and sds of the coordinates.
    """
    if improper := [failure for failure in failures if failure.startswith(IMPROPER)]:
        return _unweighed(weighing, names, improper)
    if (count := len(weighing.log_weights)) < LEAST_DRAWS:
        few = f"too few draws to judge ({count})"
        return _unweighed(weighing, names, [*failures, few, *doubts, *warnings], notes)
    ratio = weighing.share
    notes = (*notes, *_heavy_tailed(weighing, names))
    reasons = list(failures)
    good = weighing.k_hat < K_HAT_GOOD and ratio >= ESS_SHARE_PROMISING
    reasons += () if good else doubts
    if not weighing.k_hat < weighing.threshold:
        reasons.append(f"k-hat {weighing.k_hat:.2f} is not below its threshold {weighing.threshold:.2f}")
    if ratio < ESS_SHARE_LEAST:
        reasons.append(f"ESS/S {ratio:.3f} is below {ESS_SHARE_LEAST}")
    moved = _moved(weighing, names) or list(changed)
    reasons += _past_mending(weighing, names, changed, to_mend=bool(moved))
    mean, where, sd, _ = _largest_shifts(weighing)
    moved = [] if any(TOO_MUCH in reason for reason in reasons) else moved  # the worst coordinate is named once
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
        where=names[where],
        reasons=(*reasons, *moved, *warnings, *(doubts if good else ())),
        notes=tuple(notes),
    )


def _unweighed(weighing: Weighing, names: Sequence[str], reasons: Sequence[str], notes: Sequence[str] = ()) -> Verdict:
    """Return the verdict on draws whose weights say nothing: it has no k-hat."""
    mean, where, sd, _ = _largest_shifts(weighing)
    ratio = weighing.share
    figures = (math.nan, weighing.threshold, ratio, mean, sd, names[where])
    return Verdict("unreliable", *figures, reasons=tuple(reasons), notes=tuple(notes))


def _heavy_tailed(weighing: Weighing, names: Sequence[str]) -> tuple[str, ...]:
    """Return a note on the coordinates whose quantiles were compared in place of moments, if there are any."""
    if weighing.heavy is None or not bool(weighing.heavy.any()):
        return ()
    found = [names[index] for index in weighing.heavy.nonzero().flatten().tolist()]
    said = ", ".join(found[:NAMED]) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")
    return (f"{said}: heavy tails where unconstrained, so quantiles were compared; means and sds there may not exist",)


def _largest_shifts(weighing: Weighing) -> tuple[float, int, float, int]:
    """Return the largest shift of a mean and its coordinate, and the largest change of an sd and its coordinate."""
    (mean, where), (sd, sd_where) = weighing.mean_shift.max(0), weighing.sd_shift.max(0)
    return float(mean), int(where), float(sd), int(sd_where)


def _moved(weighing: Weighing, names: Sequence[str]) -> list[str]:
    """Say which mean and which sd weighting changes."""
    mean, where, sd, sd_where = _largest_shifts(weighing)
    by_mean, by_sd = f"by {in_words(mean)} sd", f"by a factor {in_words(math.exp(sd))}"
    moved = []
    if mean > SHIFT_MOST:
        moved.append(f"importance weighting changes the mean of {names[where]} {by_mean}")
    if sd > SHIFT_MOST and moved and where == sd_where:
        moved[0] += f" and its sd {by_sd}"
    elif sd > SHIFT_MOST:
        moved.append(f"importance weighting changes the sd of {names[sd_where]} {by_sd}")
    return moved


def _past_mending(weighing: Weighing, names: Sequence[str], changed: Sequence[str], *, to_mend: bool) -> list[str]:
    mean, where, sd, sd_where = _largest_shifts(weighing)
    reasons = []
    if math.isnan(mean) or math.isnan(sd):
        reasons.append(f"a mean or an sd of {names[where if math.isnan(mean) else sd_where]} is not a number")
    elif not weighing.distance <= MEAN_SHIFT_MOST:
        by = in_words(weighing.distance)
        reasons.append(f"importance weighting changes the mean of {names[weighing.farthest]} by {by} sd, {TOO_MUCH}")
    elif weighing.widening > SD_WIDENING_MOST:
        times = in_words(math.exp(weighing.widening))
        reasons.append(f"importance weighting widens the sd of {names[weighing.widest]} {times} times, {TOO_MUCH}")
    # weights that are nearly even and only narrow take far draws away; the largest ones, as k-hat tells, do nothing. An
    # sd of the model's own values may widen, by a factor above one, where that of the coordinate does not
    narrows = weighing.share >= ESS_SHARE_EVEN and max(weighing.widening, mean) <= SHIFT_MOST
    narrows = narrows and all("by a factor 0." in change for change in changed)
    if to_mend and not narrows and K_HAT_GOOD <= weighing.k_hat < weighing.threshold:
        reasons.append(f"k-hat {weighing.k_hat:.2f} {MENDED}, so the weights have infinite variance")
    return reasons


Draw = Callable[[int], tuple[Tensor, Tensor]]  # n -> z (n, D), log q (n,)


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
    index: Tensor  # of the draws to use, in the pool


def decide(
    draw: Draw, score: Callable[[Tensor], Tensor], names: Sequence[str], *, draws: int, seed: int,
    warnings: Sequence[str] = (), failures: Sequence[str] = (), notes: Sequence[str] = (), doubts: Sequence[str] = (),
    again: Callable[[], Weighing] | None = None, complaint: Callable[[Tensor], str | None] = lambda z: None,
    changed: Callable[[Tensor, Tensor], list[str]] = lambda z, log_weights: [],
) -> Decision:  # fmt: skip
    """Draw a pool of four times as many draws as asked for, weigh and judge it, and choose the draws to use.

    The pool steadies k-hat, whose standard error is about (1 + k) / sqrt(3 sqrt(S)). The first ``draws`` of it are the
    raw draws; where weighting mends them, the draws to use are resampled from the whole pool, and a second pool has to
    come to the same verdict, which ``again`` weighs. ``changed`` says what weighting changes in the model's own values,
    ``complaint`` what is invalid about the model at some of the first draws, though its density is finite there. For
    the rest see :func:`judge`.
    """
    pool, pool_q = draw(POOL * draws)
    pool_p = score(pool)
    weighing = weigh(pool, pool_p, pool_q)
    if (objection := complaint(pool[:CHECKED])) is not None:
        failures = (*failures, f"the model is invalid at some draws: {objection}")
    different = changed(pool, weighing.log_weights) if weighing.broken < len(pool) else []
    judged = partial(judge, weighing, names, warnings=warnings, notes=notes, doubts=doubts, changed=different)
    verdict = judged(failures=failures)
    if verdict.status == "corrected" and again is not None:  # one lucky pool does not correct a guide
        second = judge(again(), names)
        if second.status == "unreliable":
            failures = (*failures, f"a second sample from the guide fails the check ({second.reasons[0]})")
            verdict = judged(failures=failures)
    index = torch.arange(draws, device=pool.device)
    if verdict.status == "corrected":
        index = resample(weighing.log_weights, draws, seed=seed)
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
        index=index,
    )


# the acceptance test of a candidate: whether its draws are so good that no other method is tried ----------------------
# There are two levels. A mixture, a table and Gaussian conditionals are accepted if weights correct their draws. A flow
# that is or was trained, a Gaussian and a grid are accepted if their draws can be used as they are. This is stricter
# than the verdict, since more can be tried. Markov chains have no weights: see `judge_mcmc`.


def weights_correct(ess_share: float, k_hat: float) -> bool:
    """Say whether importance weights correct draws, by their effective share and k-hat."""
    return ess_share >= ESS_SHARE_PROMISING and _is_good(ess_share, k_hat)


def _is_good(ess_share: float, k_hat: float) -> bool:
    """Say whether k-hat is good. Of nearly even weights it is noise, or tells of rounding or of the cells of a table.

    For these, the threshold of the verdict does.
    """
    return k_hat < (K_HAT_MOST if ess_share >= ESS_SHARE_EVEN else K_HAT_GOOD)


def raw_weights(log_ratios: Tensor) -> Tensor | None:
    """Return normalized weights of draws (S,) by log p - log q; None if they collapse, or if no draw has a density."""
    ratios = log_ratios.double()
    weights = torch.softmax(torch.where(torch.isfinite(ratios), ratios, -torch.inf), 0)
    collapse = not float(weights.square().sum()) * len(weights) * ESS_SHARE_COLLAPSED < 1.0  # NaN without a density
    return None if collapse else weights


def nothing_to_gain(weighing: Weighing) -> bool:
    """Say whether draws can be used as they are, and the ELBO is so close to the log evidence that no method gains."""
    gap, share = weighing.log_evidence - weighing.elbo, weighing.share
    good = _is_good(share, weighing.k_hat) and gap < acceptable_gap(len(weighing.mean_shift))
    return good and status_of(weighing) == "ok"


def shift_is_noise(weighing: Weighing) -> bool:
    """Say whether there is nothing to gain, and weighting moves no mean, sd or quantile by what a reader would see."""
    shift = max(float(weighing.mean_shift.max()), float(weighing.sd_shift.max()), weighing.quantile_shift or 0.0)
    error = math.sqrt(max(1.0 / weighing.ess - 1.0 / len(weighing.log_weights), 0.0)) if weighing.ess else 0.0
    return nothing_to_gain(weighing) and shift < SHIFT_SEEN + SHIFT_ERRORS * error


def acceptable_gap(dim: int) -> float:
    """Return the gap in nats that leaves nothing to see in means and sds: the same for each dimension."""
    return max(EVIDENCE_GAP_GOOD, EVIDENCE_GAP_GOOD_A_DIM * dim)


def status_of(weighing: Weighing) -> str:
    """Return the verdict on a sample, ``unreliable`` if it is too small."""
    return judge(weighing, [str(i) for i in range(len(weighing.mean_shift))]).status


# the verdict on Markov chains of another sampler ----------------------------------------------------------------------

UNSEARCHED = "no search for missed modes was made"  # begins a note
OF_WEIGHTS = ("k_hat", "k_threshold", "ess_ratio", "mean_shift", "sd_shift")  # of which chains have none


def judge_mcmc(draws: Tensor, log_p: Tensor, names: Sequence[str], diverging: Tensor | None) -> Verdict:
    """Judge chains (C, N, D) with log densities (C, N) and, if known, which draws diverged (C, N)."""
    found = arviz.chain_diagnostics(draws)
    r_hat = torch.nan_to_num(found["r_hat"].reshape(-1), nan=math.inf)
    ess = {name: torch.nan_to_num(found[f"ess_{name}"].reshape(-1)) for name in ("bulk", "tail")}
    worst, total = int(r_hat.argmax()), log_p.numel()
    diverged = 0 if diverging is None else int(diverging.sum())
    broken = int((~torch.isfinite(log_p)).sum())
    apart = "the chains do not agree" if len(draws) > 1 else "the chain does not agree with itself"
    reasons, notes = [], [UNSEARCHED]
    if not float(r_hat[worst]) < R_HAT_CONVERGED:
        reasons.append(f"R-hat {r_hat[worst]:.3f} of {names[worst]} is not below {R_HAT_CONVERGED}: {apart}")
    for kind, sizes in ess.items():
        if not float(sizes.min()) >= ESS_OF_MCMC:
            reasons.append(f"effective sample size ({kind}) {sizes.min():.0f} is below {ESS_OF_MCMC:.0f}")
    if diverged > DIVERGENT_SHARE_OF_MCMC * total:
        reasons.append(f"{diverged} of {total} transitions diverged, so a region of strong curvature is missed")
    elif diverged > 0:
        notes.append(f"{diverged} of {total} transitions diverged")
    if broken:
        reasons.append(f"{broken} draws have no finite log density")
    figures = McmcDiagnostics.of_mcmc(
        chains=len(draws),
        draws=draws.shape[1],
        r_hat=float(r_hat[worst]),
        ess_bulk=float(ess["bulk"].min()),
        ess_tail=float(ess["tail"].min()),
        where=names[int(torch.minimum(ess["bulk"], ess["tail"]).argmin())],
        divergences=math.nan if diverging is None else diverged / total,
    )
    notes += ["one chain: R-hat compares its halves, and no other chain could disagree"] if len(draws) == 1 else []
    notes += ["divergences are not known"] if diverging is None else []
    return Verdict(
        status="unreliable" if reasons else "ok",
        where="",
        reasons=tuple(reasons),
        notes=tuple(notes),
        chains=figures,
        guide_method=MCMC,
        **dict.fromkeys(OF_WEIGHTS, math.nan),
    )
