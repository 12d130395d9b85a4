"""The next step that an unreliable verdict proposes: one, for the cause that comes first in the table."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pyro_flows.verdict.methods import AMORTIZED, GUIDE, MCMC

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
