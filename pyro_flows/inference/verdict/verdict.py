"""The verdict on a fit: a judgement, and the numbers that it rests on."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pyro_flows.inference.verdict.chains import McmcDiagnostics
from pyro_flows.inference.verdict.methods import AMORTIZED, GUIDE, MCMC
from pyro_flows.inference.verdict.weighing import in_words
from pyro_flows.support.figures import verdict_html
from pyro_flows.support.thresholds import ESS_SHARE_LEAST, SHIFT_MOST

NAMED = 3  # of many coordinates or rows, the worst ones; others are counted
SHOWN = 0.005  # sds: a smaller shift is printed as 0.00, and its coordinate is an accident of rounding


@dataclass(frozen=True)
class Verdict:
    r"""A judgement and the numbers it rests on; ``str()`` is one plain sentence.

    Attributes:
        status: ``"ok"``: the guide's draws can be used as they are; ``"corrected"``: they cannot, but importance
            resampling corrects them, and ``samples`` holds the resampled ones; ``"refined"``: ``samples`` are draws of
            Markov chains that started at the guide's; ``"unreliable"``: none of these. Even so, a second mode that is
            several times narrower can be missed, from three dimensions on; a table is in the documentation.
        k_hat: Pareto shape of the importance weights; NaN of fewer than 100 draws, and of an improper posterior.
        k_threshold: :math:`\min(1 - 1 / \log_{10} S,\ 0.7)`, for S draws.
        ess_ratio: effective sample size of the weights over S, :math:`(\sum_s w_s)^2 / (S \sum_s w_s^2)`.
        mean_shift: largest difference between raw and weighted means, in posterior sds, over unconstrained coordinates.
        sd_shift: largest absolute log ratio of raw and weighted sds.
        where: the coordinate of the larger shift.
        reasons: what spoke against the guide's own draws, in words. The sentence has them only if the verdict is
            unreliable: otherwise, those draws were replaced.
        notes: what was not or not fully checked, and what else to know before the draws are used.
        chains: figures of the chains, if a sampler was tried, or if the draws are another sampler's chains
            (:func:`from_mcmc`: then there are no weights, and the figures above are NaN).
        guide_method: what made the guide's own draws: ``"trained flow"``, ``"Gaussian"``, ``"conditional Laplace
            grid"``, ``"Gaussian conditionals"``, ``"mixture"``, ``"independent coordinates"``, ``"tabulated
            density"`` of a single one, ``"guide"`` for one of the caller's, or ``"MCMC"`` for chains of another
            sampler. ``method`` says what made the draws to use.

    The thresholds are those of Pareto-smoothed importance sampling, Vehtari et al. 2024 (arXiv 1507.02646). Cost: that
    of the draws; nothing is computed here.

    >>> import pyro_flows as pf
    >>> why = ("k-hat 0.91 is not below its threshold 0.70",)
    >>> print(pf.Verdict("ok", 0.21, 0.7, 0.97, 0.01, 0.02, "tau", guide_method="trained flow"))
    ok: trained flow (k-hat 0.21, ESS/S 0.97). The draws can be used as they are.
    >>> found = pf.Verdict("unreliable", 0.91, 0.7, 0.04, 0.3, 0.2, "tau", why, guide_method="trained flow")
    >>> print(found.next_step)
    call refine(), or fit with more layers
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
    chains: McmcDiagnostics | None = None
    guide_method: str = GUIDE

    @property
    def method(self) -> str:
        """What made the draws to use, ``"MCMC"`` for chains and ``guide_method`` otherwise."""
        return MCMC if self.status == "refined" else self.guide_method

    @property
    def _of_others(self) -> bool:
        """Whether another sampler made the chains."""
        return self.chains is not None and self.chains.elsewhere

    @property
    def _improper(self) -> bool:
        """Whether the posterior is improper, so that no figure of draws tells anything."""
        return any(reason.startswith(IMPROPER) for reason in self.reasons)

    @property
    def supports_evidence(self) -> bool:
        """Whether the importance weights bear an estimate of the log evidence; chains of others have none."""
        if self.status == "unreliable" or self._of_others:
            return False
        return self.status != "refined" or (self.k_hat < self.k_threshold and self.ess_ratio >= ESS_SHARE_LEAST)

    @property
    def next_step(self) -> str:
        """What helps against the reasons, if the verdict is unreliable; empty otherwise."""
        if self.status != "unreliable":
            return ""
        return next_step(self.reasons, MCMC if self._of_others else self.guide_method)

    def __str__(self) -> str:
        if self._improper:
            return f"unreliable: {'; '.join(self.reasons)}. Next step: {self.next_step}."
        return self._sentence() + (f" Note: {'; '.join(self.notes)}." if self.notes else "")

    def _sentence(self) -> str:
        method, figures = self.method, self._figures()
        what = "chains" if method == MCMC else "draws"
        if self.status == "ok":
            return f"ok: {method} ({figures}). The {what} can be used as they are."
        if self.status == "corrected":
            return f"corrected: {method}, importance-resampled ({figures}). The draws can be used."
        if self.status == "refined":
            return f"refined: {method}, converged ({figures}). The chains can be used."
        why = f"Why: {'; '.join(self.reasons)}. Next step: {self.next_step}."
        return f"unreliable: {method}{f' ({figures})' if figures else ''}. Do not use the {what}. {why}"

    def _figures(self) -> str:
        """Return the two or three figures that tell most: of chains, or of weights."""
        if self.method == MCMC and self.chains is not None:
            return self.chains.in_short
        if math.isnan(self.k_hat):
            return ""
        found = f"k-hat {self.k_hat:.2f}, ESS/S {self.ess_ratio:.2f}"
        if self.status == "corrected" and self.mean_shift >= max(self.sd_shift, SHIFT_MOST):
            found += f", weighting changes the mean of {self.where} by {in_words(self.mean_shift)} sd"
        elif self.status == "corrected" and self.sd_shift >= SHIFT_MOST:
            found += f", weighting changes an sd by a factor {in_words(math.exp(self.sd_shift))}"
        return found

    __repr__ = __str__  # what a REPL shows

    def _repr_html_(self) -> str:
        return verdict_html(str(self))


# what to do next ------------------------------------------------------------------------------------------------------

# A cause is known by the words of its reason, since a saved verdict holds its reasons as text.
DIGITS = (("rounding changes",), "give data and parameters in double precision")
NO_DIGITS = (("in double precision too",), "choose a prior with less mass where the density loses its digits")
BOUNDS = (("rounding puts",), "choose a prior with less mass next to the bound, or model the logit")
INVALID = (("the model is invalid", "no finite log density"), "check the data and the priors")
IMPROPER = "the posterior is improper: along "
PROPER = re.compile(r": along (?:a coordinate of )?(.+?), whose prior is improper")  # the reason itself says which site
TIME = (("max_seconds", "time for"), "give a larger max_seconds")
OF_CHAINS = (
    (("the chains have not converged", "of the chains", "chains that began"), "call refine() with a larger max_steps"),
    (("the trajectories diverged",), "write the model with other parameters, such as non-centered ones"),
)
OF_FITS = (
    BOUNDS,
    NO_DIGITS,
    DIGITS,
    TIME,  # before what a fit that had no time to look about may have met
    (("interrupted",), "call fit again and let it finish"),
    INVALID,
    (("NICE",), 'fit with flow="realnvp"'),
    (("a mode near", "too little mass near"), "fit with more runs, runs=4"),
    (("did not converge",), "fit with a larger max_steps"),
    *OF_CHAINS,
)
OF_WEIGHTS = "call refine(), or fit with more layers"

OF_GUIDES = (
    BOUNDS,
    NO_DIGITS,
    DIGITS,
    TIME,
    INVALID,
    (("a mode near", "too little mass near"), "call refine() or fit()"),
    *OF_CHAINS,
)
OF_TRAINING = "train the guide longer, or call refine()"

OF_AMORTIZED = (
    BOUNDS,
    NO_DIGITS,
    DIGITS,
    INVALID,
    (("outside of what the prior predicts",), "check data and priors; for these data, call refine() or fit()"),
    *OF_CHAINS,
)
OF_LEARNING = "call refine() or fit() for these data, or amortize with more simulations"

OF_MCMC = (
    NO_DIGITS,
    (("rounding changes",), "sample with data and parameters in double precision"),
    (("no finite log density",), "check the data and the priors"),
    (("chain does not agree with itself",), "run four chains, and longer ones"),
    (("transitions diverged",), "raise target_accept_prob, or write the model with other parameters"),
)
OF_MIXING = "run more warm-up steps and draw longer chains"


STEPS = {
    None: (OF_FITS, OF_WEIGHTS),
    GUIDE: (OF_GUIDES, OF_TRAINING),
    AMORTIZED: (OF_AMORTIZED, OF_LEARNING),
    MCMC: (OF_MCMC, OF_MIXING),
}  # by the method, None for all of a fit


def next_step(reasons: Sequence[str], method: str | None = None) -> str:
    """Return what helps against the reasons for which a result of some method is unreliable."""
    table, otherwise = STEPS[method if method in STEPS else None]
    if improper := PROPER.search("; ".join(reasons)):
        return f"give `{improper[1]}` a proper prior"
    for words, step in table:
        if any(word in reason for word in words for reason in reasons):
            return step
    return otherwise
