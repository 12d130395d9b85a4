"""From a weighing to a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyro_flows.verdict.verdict import Verdict
from pyro_flows.verdict.weighing import ESS_RATIO, Weighing, in_words

MEAN_SHIFT = 0.1
SD_SHIFT = 0.1
WIDENING = math.log(2.0)  # of an sd: beyond it, weights tell that mass is missing in the tails, not how much
MENDED_MEAN = 1.0  # sds: a guide that is further off has not seen what it should weigh
UNDOUBTED_ESS = 0.5  # of S: with k-hat below MENDED_K, weights that are good whatever went before
MENDED_K = 0.5  # of weights that have to mend something: above it they have no variance
CONTAINED_K, CONTAINED_ESS, CONTAINED_GAP, CONTAINED_SHIFT = 1.0, 0.9, 0.05, 0.05  # see _hangs_on_nothing
NEXT_TO_NONE_K, NEXT_TO_NONE_ESS, NEXT_TO_NONE_GAP = 1.5, 0.99, 0.005  # and this
NOTHING_HANGS_ON_IT = (
    "is above its threshold, but weighting changes no result, and Markov chains that start at the guide's draws stay "
    "where the guide has enough mass"
)


def judge(
    weighing: Weighing,
    names: Sequence[str],
    *,
    warnings: Sequence[str] = (),
    failures: Sequence[str] = (),
    notes: Sequence[str] = (),
    contained: bool = False,
    doubts: Sequence[str] = (),
    changed: Sequence[str] = (),
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
        changed: what weighting changes besides means and sds of the coordinates.
    """
    notes = (*notes, *_heavy_tailed(weighing, names))
    reasons = list(failures)
    ratio = weighing.ess / len(weighing.log_weights)
    good = weighing.k_hat < MENDED_K and ratio >= UNDOUBTED_ESS
    reasons += () if good else doubts
    if not weighing.k_hat < weighing.threshold and contained and _hangs_on_nothing(weighing):
        notes = (*notes, f"k-hat {weighing.k_hat:.2f} {NOTHING_HANGS_ON_IT}")
    elif not weighing.k_hat < weighing.threshold:
        reasons.append(f"k-hat {weighing.k_hat:.2f} is not below its threshold {weighing.threshold:.2f}")
    if ratio < ESS_RATIO:
        reasons.append(f"ESS/S {ratio:.3f} is below {ESS_RATIO}")
    moved = [*_moved(weighing, names), *changed]
    reasons += _past_mending(weighing, names, to_mend=bool(moved))
    mean, where, sd, _ = _largest_shifts(weighing)
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


def _heavy_tailed(weighing: Weighing, names: Sequence[str]) -> tuple[str, ...]:
    """Return a note on the coordinates whose quantiles were compared in place of moments, if there are any."""
    if weighing.heavy is None or not bool(weighing.heavy.any()):
        return ()
    found = [names[index] for index in weighing.heavy.nonzero().flatten().tolist()]
    said = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return (f"{said}: heavy tails where unconstrained, so quantiles were compared; means and sds there may not exist",)


def _largest_shifts(weighing: Weighing) -> tuple[float, int, float, int]:
    """Return the largest shift of a mean and its coordinate, and the largest change of an sd and its coordinate."""
    (mean, where), (sd, sd_where) = weighing.mean_shift.max(0), weighing.sd_shift.max(0)
    return float(mean), int(where), float(sd), int(sd_where)


def _moved(weighing: Weighing, names: Sequence[str]) -> list[str]:
    """Say which mean and which sd weighting changes."""
    mean, where, sd, sd_where = _largest_shifts(weighing)
    moved = []
    if mean > MEAN_SHIFT:
        moved.append(f"importance weighting changes the mean of {names[where]} by {in_words(mean)} sd")
    if sd > SD_SHIFT:
        moved.append(f"importance weighting changes the sd of {names[sd_where]} by a factor {in_words(math.exp(sd))}")
    return moved


def _past_mending(weighing: Weighing, names: Sequence[str], *, to_mend: bool) -> list[str]:
    """Say what weighting cannot mend."""
    mean, where, sd, sd_where = _largest_shifts(weighing)
    reasons = []
    if weighing.widening > WIDENING:
        reasons.append(
            f"importance weighting widens an sd {math.exp(weighing.widening):.1f} times, more than weights can correct"
        )
    if math.isnan(mean) or math.isnan(sd):
        reasons.append(f"a mean or an sd of {names[where if math.isnan(mean) else sd_where]} is not a number")
    if not weighing.distance <= MENDED_MEAN:
        reasons.append(
            f"importance weighting changes a mean by {in_words(weighing.distance)} sd, more than weights can correct"
        )
    if to_mend and MENDED_K <= weighing.k_hat < weighing.threshold:
        reasons.append(
            f"k-hat {weighing.k_hat:.2f} is not below {MENDED_K} and weighting changes the results, so the weights "
            "have infinite variance"
        )
    return reasons


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
