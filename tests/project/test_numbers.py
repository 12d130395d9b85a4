"""Numbers in prose that the code decides are those of the code.

Each page has a list of phrases. In braces stands where the number comes from: a constant of a module, an option's
default as ``module.function(option)``, with an index where it is one of several; then, after a bar, how it is written.
"""

import importlib
import inspect
import math
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
ORDINALS = ["zeroth", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
WRITTEN = {
    "": lambda value: f"{value:g}" if value < 10_000 else f"{value:,}".replace(",", " "),
    "comma": lambda value: f"{value:,}",
    "fixed": lambda value: f"{value:.2f}",
    "percent": lambda value: f"{100 * value:g} %",
    "word": lambda value: {13: "thirteen", 16: "sixteen", 64: "64"}.get(value) or WORDS[int(value)],
    "exp": lambda value: f"{math.exp(value):g}",
    "fold": lambda value: {2: "twofold", 3: "threefold", 4: "fourfold"}[round(math.exp(value))],
    "tens": lambda value: f"{10 * round(math.exp(value) / 10)}",
    "one in": lambda value: {1e-3: "one in a thousand", 1e-4: "one in ten thousand"}[value],
    "million": lambda value: {0.5: "half a million", 1.0: "a million", 10.0: "ten million"}[round(value / 1e6, 1)],
    "part": lambda value: {0.1: "A tenth", 0.2: "A fifth"}[value],
    "share": lambda value: {0.02: "a fiftieth"}[value],
    "half": lambda value: {0.5: "half a"}[value],
}

PHRASES = {
    "docs/understand/fit.md": [
        "Above {inference.starts.curvature.FULL_HESSIAN_UP_TO} dimensions they come from L-BFGS",
        "Up to {inference.starts.curvature.ONE_HESSIAN_UP_TO}, a Laplace approximation with all correlations",
        "by more than the Monte Carlo error of {fitting.fit.fit(draws)} draws",
        "If their effective share has not risen by {support.thresholds.ESS_SHARE_COLLAPSED}",
        "in up to {inference.starts.curvature.SMALL_UP_TO} dimensions and for models of few operations",
        "Given up to {inference.modes.conditionals.MOST_HELD|word} coordinates",
        "In up to {inference.starts.prior.MATRICES_UP_TO} dimensions this comes before the parameterization is chosen",
        "In {inference.starts.prior.MATRICES_UP_TO} to {inference.starts.curvature.FULL_HESSIAN_UP_TO} dimensions "
        "it is tried if the "
        "chains",
        "In {fitting.methods.SAMPLED_FROM} to {inference.chains.adaptation.MOST_DIM} dimensions a flow takes "
        "thousands of "
        "steps",
        "{inference.chains.refine.ATTEMPT|comma} gradients at most, half of that in up to "
        "{inference.starts.curvature.SMALL_UP_TO} "
        "dimensions",
        "they get up to {inference.chains.refine.CHEAPEST|word} times as many",
        "up to {inference.chains.untrained.MOST_COPIES} images under exact symmetries",
        "k-hat is below {support.thresholds.K_HAT_GOOD} (or ESS/S above {support.thresholds.ESS_SHARE_EVEN}), training "
        "converged",
        "less than {support.thresholds.EVIDENCE_GAP_GOOD} nats above it",
        "less than {support.thresholds.EVIDENCE_GAP_GOOD_A_DIM} nats per dimension",
        "at all such images, up to {fitting.combine.MAX_COPIES}, without",
    ],
    "docs/understand/verdict.md": [
        r"$S = {inference.verdict.deciding.POOL} \times$ `draws`",
        "largest weight is below {support.thresholds.LOG_WEIGHT_EVEN|exp} times the mean",
        "divided by the number of draws, is below {support.thresholds.ESS_SHARE_LEAST}",
        "k-hat below {support.thresholds.K_HAT_GOOD} and ESS/S above {support.thresholds.ESS_SHARE_PROMISING}",
        "widens a standard deviation** more than {support.thresholds.SD_WIDENING_MOST|fold}",
        "by more than {support.thresholds.MEAN_SHIFT_MOST|word} standard deviation. Then too much",
        "noticeably, and k-hat is {support.thresholds.K_HAT_GOOD} or more",
        "**Var[log p]** is more than {support.thresholds.VAR_LOG_P_RATIO_MOST|word} times what",
        "holds more than {support.thresholds.MISSED_MASS_SHARE|percent} of the mass that the guide covers",
        "if {support.thresholds.MISSED_MASS_OF_TAILS|percent} more mass than in the draws, and "
        "{support.thresholds.MISSED_MASS_ERRORS|word} standard errors, lies beyond one of their "
        "{support.thresholds.TAIL_SHARE|percent} quantiles",
        "are checked in up to {inference.starts.curvature.SMALL_UP_TO} dimensions",
        "**changes a mean** by more than {support.thresholds.SHIFT_MOST} posterior standard deviations",
        "the logarithm of the ratio is larger than {support.thresholds.SHIFT_MOST}",
        "by more than {support.thresholds.SHIFT_MOST} and {support.thresholds.SHIFT_ERRORS|word} standard errors",
        "names the worst {inference.verdict.verdict.NAMED|word} and counts the others",
        "(dimensions times data above {inference.modes.survey.NUMBERS|million})",
        "up to a factor of {inference.modes.under_covered.HIGH|tens}",
        "up to {inference.starts.prior.MATRICES_UP_TO} dimensions and for the first "
        "{inference.modes.propriety.COORDINATES_LOOKED_AT} such "
        "coordinates",
        "This is tried for up to {inference.modes.propriety.HIDDEN} such coordinates",
        "Levels up to {inference.modes.outward.DEEP} nats down are seen",
    ],
    "docs/understand/refinement.md": [
        "{inference.chains.sampler.CHAINS} short chains run as one batch",
        "start in superchains of {inference.chains.sampler.SUBCHAINS|word}",
        "nested R-hat**, of superchains, is at most {support.thresholds.R_HAT_CONVERGED}, and R-hat of "
        "single chains is at most {support.thresholds.R_HAT_OF_SHORT_CHAINS}",
        "effective sample size** is {support.thresholds.ESS_OF_CHAINS} or more",
        "at most {support.thresholds.DIVERGENT_SHARE_OF_CHAINS|one in} trajectories **diverged**, or "
        "{support.thresholds.DIVERGENT_FEW|word} in all",
        "agree (R-hat at most {support.thresholds.R_HAT_OF_SHORT_CHAINS})",
        "all coordinates have {support.thresholds.ESS_OF_CHAINS} effective draws, and",
        "**standard deviation** is {support.thresholds.SD_ERROR_OF_CHAINS|percent} of it. It has to be "
        "{support.thresholds.SD_ERROR_OF_FEW_DRAWS|percent}",
        "(a kurtosis above {inference.chains.stopping.LIGHT}; a normal",
        "({inference.chains.stopping.CLEARLY} times the error)",
        "with an error above {support.thresholds.SHIFT_MOST|percent} speaks",
    ],
    "docs/howto/runs.md": [
        "R-hat of a coordinate is above {support.thresholds.R_HAT_CONVERGED}, or if log evidences differ by more than "
        "{support.thresholds.EVIDENCE_GAP_OF_RUNS}",
    ],
    "docs/howto/compare.md": [
        "weights {posterior.comparison.evidence.DRAWS} new draws of the flow",
        "{posterior.comparison.working.RELATIVE|share} of the standard error over observations, "
        "or of {posterior.comparison.working.ERROR} nats",
        "up to {posterior.comparison.working.MOST_DRAWS} new draws",
    ],
    "docs/howto/check-a-guide.md": [
        "{support.thresholds.R_HAT_CONVERGED}), bulk and tail effective sample sizes (at least "
        "{support.thresholds.ESS_OF_MCMC}), divergences (at most {support.thresholds.DIVERGENT_SHARE_OF_MCMC|one in})",
    ],
    "docs/howto/choose-a-flow.md": [
        '`"realnvp"` ({flows.vectors.realnvp(layers)} layers)',
        '`"planar"` ({flows.vectors.planar(layers)} layers)',
        '`"nice"` ({flows.vectors.nice(layers)} layers)',
    ],
    "docs/howto/many-data-sets.md": [
        "Flows have {calibration.batch.LAYERS|word} layers",
        "fewer than {calibration.batch.FEWEST|word} data sets",
        "more than {inference.starts.curvature.FULL_HESSIAN_UP_TO} dimensions",
    ],
    "docs/howto/many-latents.md": [
        "Up to about {inference.starts.curvature.FULL_HESSIAN_UP_TO} latents",
        "Up to {inference.starts.curvature.ONE_HESSIAN_UP_TO} latents, one Hessian",
    ],
    "docs/howto/calibration.md": ["whether ranks are uniform at {calibration.result.LEVEL|percent}"],
    "docs/howto/density.md": ["{densities.fit_density.fit_density(validation)|part} of the data is held out"],
    "docs/howto/priors.md": ["A change of {posterior.comparison.sensitivity.THRESHOLD} or more is large"],
    "docs/reference/options.md": [
        "at most {support.arguments.MAX_LAYERS}; the default is {flows.vectors.realnvp(layers)} for `realnvp`, "
        "{flows.vectors.nice(layers)} for `nice`, {flows.vectors.planar(layers)} for `planar`",
        "| `draws` | `{fitting.fit.fit(draws)}` |",
        "to {support.arguments.MAX_DRAWS|million}; the verdict uses {inference.verdict.deciding.POOL|word} times "
        "as many",
        "| `seed` | `{fitting.fit.fit(seed)}` |",
        "| `runs` | `{fitting.fit.fit(runs)}` |",
        "| `max_steps` | {fitting.fit.MAX_STEPS} up to {inference.starts.curvature.SMALL_UP_TO} dimensions,",
    ],
    "pyro_flows/fitting/fit.py": [
        "steps of a run, {inference.training.loop.BATCH} gradient evaluations each",
        "by default {fitting.fit.MAX_STEPS}, and more above {inference.starts.curvature.SMALL_UP_TO} dimensions",
        "number of layers, for a flow given by name, {support.arguments.MAX_LAYERS} at most",
    ],
    "docs/gallery.md": ["trained by Pyro's SVI for {benchmarks.gallery.pictures.STEPS} steps"],
    "docs/design.md": [
        "from {fitting.methods.SAMPLED_FROM} to {inference.chains.adaptation.MOST_DIM} dimensions",
        "up to {inference.starts.curvature.SMALL_UP_TO} dimensions: in hierarchical models",
        "given up to {inference.modes.conditionals.MOST_HELD|word} hyperparameters",
        "up to {inference.starts.prior.MATRICES_UP_TO} dimensions before chains",
        "above {inference.starts.prior.MATRICES_UP_TO} after them",
        "(diagonal above {flows.recipe.FULL_AFFINE_UP_TO} dimensions, $L$ above "
        "{inference.starts.curvature.ONE_HESSIAN_UP_TO})",
        "falls {support.thresholds.DENSITY_GAP_OF_LOST} nats below the best check",
        "checked every {inference.training.loop.CHECK_EVERY} steps",
        "a window of {inference.training.convergence.WINDOW|word} checks",
        "split R-hat of at most {support.thresholds.R_HAT_OF_SHORT_CHAINS}",
        "at most {support.thresholds.EVIDENCE_GAP_NEGLIGIBLE} nats may remain",
    ],
}
SOURCE = re.compile(r"\{([\w.]+?)(?:\((\w+)\))?(?:\[(-?\d+)\])?(?:\|([\w ]+))?\}")


def value(found: re.Match) -> str:
    """What the code says, as it is written."""
    path, option, index, how = found.groups()
    module, _, name = path.rpartition(".")
    package = "" if module.startswith("benchmarks") else "pyro_flows."
    number = getattr(importlib.import_module(package + module), name)
    if option is not None:
        number = inspect.signature(number).parameters[option].default
    return WRITTEN[how or ""](number if index is None else number[int(index)])


def words(text: str) -> str:
    return " ".join(text.split())


def missing(page: str, phrases: list[str]) -> list[str]:
    """The phrases, as the code has them, that the page does not have."""
    assert all(SOURCE.search(phrase) for phrase in phrases), f"{page}: a phrase without a number of the code"
    text = words((ROOT / page).read_text(encoding="utf-8"))
    return [expected for phrase in phrases if (expected := words(SOURCE.sub(value, phrase))) not in text]


def test_numbers_in_prose_are_those_of_the_code():
    """Where the code says otherwise, change the page; where the sentence is gone, the list."""
    found = {page: missing(page, phrases) for page, phrases in PHRASES.items()}
    assert not {page: phrases for page, phrases in found.items() if phrases}


def test_a_number_that_the_code_does_not_have_is_seen(monkeypatch):
    monkeypatch.setattr("pyro_flows.fitting.methods.SAMPLED_FROM", 31)
    (found,) = missing("docs/understand/fit.md", PHRASES["docs/understand/fit.md"])
    assert found.startswith("In 31 to 1500 dimensions")


def test_the_searches_are_counted():
    """The page says how many searches there are, and other pages which of them they mean."""
    verdict = (ROOT / "docs" / "understand" / "verdict.md").read_text(encoding="utf-8")
    section = verdict.split("## The search for missed modes")[1].split("\n## ")[0]
    searches = re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |\Z)", section, flags=re.MULTILINE | re.DOTALL)
    assert [int(number) for number, _ in searches] == list(range(1, len(searches) + 1))
    assert f"{WORDS[len(searches)].capitalize()} searches look for missed modes" in section
    thin = next(int(number) for number, text in searches if "where the guide is too thin" in text)
    assert f"The {ORDINALS[thin]} search was made for this" in words(verdict)
    refinement = (ROOT / "docs" / "understand" / "refinement.md").read_text(encoding="utf-8")
    assert f"where the flow is too thin ([the {ORDINALS[thin]} search](verdict.md" in words(refinement)


def test_spare_draws_are_those_of_the_code():
    from pyro_flows.support.thresholds import ESS_OF_CHAINS_MOST

    text = words((ROOT / "docs" / "understand" / "refinement.md").read_text(encoding="utf-8"))
    assert f"With {ESS_OF_CHAINS_MOST:g} effective draws chains end" in text


def test_the_threshold_of_k_hat_is_that_of_the_code():
    from pyro_flows.inference.verdict.psis import largest_k

    text = words((ROOT / "docs" / "understand" / "verdict.md").read_text(encoding="utf-8"))
    (limit,) = re.findall(r"\\min\(1 - 1/\\log_\{10\} S,\\ ([0-9.]+)\)", text)
    assert largest_k(10**9) == float(limit)
    assert largest_k(100) == 0.5


def test_the_default_of_max_steps_grows_as_the_page_says():
    from pyro_flows.fitting.fit import default_steps

    text = words((ROOT / "docs" / "reference" / "options.md").read_text(encoding="utf-8"))
    most, from_dim = re.search(r"(\d+ \d+) from (\d+) on", text).groups()
    most, from_dim = int(most.replace(" ", "")), int(from_dim)
    assert default_steps(from_dim) == default_steps(10 * from_dim) == most
    assert default_steps(from_dim - 20) < most
