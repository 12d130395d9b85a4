"""The verdict on a fit: a judgement, and the numbers that it rests on."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_flows._display import verdict_html
from pyro_flows.verdict.chains import McmcDiagnostics
from pyro_flows.verdict.next_step import next_step, next_step_of_mcmc
from pyro_flows.verdict.weighing import in_words

SHOWN = 0.005  # sds: a smaller shift is printed as 0.00, and its coordinate is an accident of rounding


@dataclass(frozen=True)
class Verdict:
    r"""A judgement and the numbers it rests on; ``str()`` is one plain sentence.

    Attributes:
        status: ``"ok"``: the guide's draws can be used as they are; ``"corrected"``: they cannot, but importance
            resampling corrects them, and ``samples`` holds the resampled ones; ``"refined"``: ``samples`` are draws of
            Markov chains that started at the guide's; ``"unreliable"``: none of these. Even so, a second mode that is
            several times narrower can be missed, from three dimensions on; a table is in the documentation.
        k_hat: Pareto shape of the importance weights.
        k_threshold: :math:`\min(1 - 1 / \log_{10} S,\ 0.7)`, for S draws.
        ess_ratio: effective sample size of the weights over S, :math:`(\sum_s w_s)^2 / (S \sum_s w_s^2)`.
        mean_shift: largest difference between raw and weighted means, in posterior sds, over unconstrained coordinates.
        sd_shift: largest absolute log ratio of raw and weighted sds.
        where: the coordinate of the larger shift.
        reasons: what spoke against ``ok``, in words.
        notes: what was not or not fully checked, and what else to know before the draws are used.
        chains: figures of the chains, if a sampler was tried, or if the draws are another sampler's chains
            (:func:`from_mcmc`: then there are no weights, and the figures above are NaN).

    The thresholds are those of Pareto-smoothed importance sampling, Vehtari et al. 2024 (arXiv 1507.02646). Cost: that
    of the draws; nothing is computed here.

    >>> import pyro_flows as pf
    >>> why = ("k-hat 0.91 is not below its threshold 0.70",)
    >>> found = pf.Verdict("unreliable", 0.91, 0.7, 0.04, 0.3, 0.2, "tau", why)
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

    @property
    def next_step(self) -> str:
        """What helps against the reasons, if the verdict is unreliable; empty otherwise."""
        if self.status != "unreliable":
            return ""
        elsewhere = self.chains is not None and self.chains.elsewhere
        return next_step_of_mcmc(self.reasons) if elsewhere else next_step(self.reasons)

    def __str__(self) -> str:
        return self._sentence() + (f" Note: {'; '.join(self.notes)}." if self.notes else "")

    def _sentence(self) -> str:
        if self.chains is not None and self.chains.elsewhere and self.status != "refined":
            return self._sentence_on_mcmc()
        at = f", at {self.where}" if self.mean_shift >= SHOWN else ""
        figures = (
            f"k-hat {self.k_hat:.2f} (threshold {self.k_threshold:.2f}), ESS/S {self.ess_ratio:.2f}, "
            f"largest change of a mean by weighting {in_words(self.mean_shift)} sd{at}"
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
        return f"unreliable: do not use these samples. Why: {why}. Next step: {self.next_step}. Figures: {figures}."

    def _sentence_on_mcmc(self) -> str:
        if self.status == "ok":
            return f"ok: the chains agree and can be used. Figures: {self.chains}."
        why = "; ".join(self.reasons)
        return f"unreliable: do not use these chains. Why: {why}. Next step: {self.next_step}. Figures: {self.chains}."

    __repr__ = __str__  # what a REPL shows

    def _repr_html_(self) -> str:
        return verdict_html(str(self))
