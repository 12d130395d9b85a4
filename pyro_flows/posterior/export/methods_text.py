"""What made a result, told from its sampler; a paragraph for the methods section of a paper, and what it cites."""

from __future__ import annotations

import math

import torch

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.inference.record import Record, attributes_of, counted
from pyro_flows.inference.verdict import methods as made
from pyro_flows.inference.verdict.deciding import MENDED, POOL
from pyro_flows.inference.verdict.methods import bibtex, named
from pyro_flows.inference.verdict.verdict import Verdict
from pyro_flows.inference.verdict.weighing import UNTOLD
from pyro_flows.support.files.bundles import Entries
from pyro_flows.support.thresholds import K_HAT_GOOD, SHIFT_MOST

BASES = {"normal": "a normal base", "student_t": "a Student-t base", "logistic": "a logistic base"}
LAYERS = {
    "realnvp": ("affine coupling layers", "Dinh2017"),
    "nice": ("additive coupling layers", "Dinh2015"),
    "planar": ("planar layers", "Rezende2015"),
    "spline": ("rational quadratic spline couplings", "Durkan2019"),
}
FLOWS = "Rezende2015"  # of a flow that no builder made
MOVES = {  # of chains, by what their numbers say
    "microcanonical": ("Metropolis-adjusted microcanonical dynamics", ("Robnik2023", "Robnik2025")),
    "Hamiltonian": ("Hamiltonian Monte Carlo", ("Neal2011",)),
}


class Text:
    """Sentences, and the keys of the works that they cite, each once and in order."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.keys: list[str] = []

    def cite(self, *keys: str) -> str:
        """Return a citation in brackets."""
        self.keys += [key for key in keys if key not in self.keys]
        return f"({'; '.join(named(key) for key in keys)})"

    def say(self, sentence: str) -> None:
        """Add a sentence."""
        self.sentences.append(f"{sentence[0].upper()}{sentence[1:]}.")


def methods_text(posterior: Record) -> str:
    """Return the paragraph."""
    return " ".join(_text(posterior).sentences)


def references(posterior: Record) -> str:
    """Return the works that the paragraph cites, as BibTeX."""
    return bibtex(_text(posterior).keys, str(attributes_of(posterior).get("inference_library_version", "unknown")))


def _text(posterior: Record) -> Text:
    text, versions = Text(), attributes_of(posterior)
    names = ("inference_library", "pyro_ppl", "torch")
    own, pyro, torch = (versions.get(f"{name}_version", "unknown") for name in names)
    software = f"Pyro {pyro} {text.cite('Bingham2019')} and PyTorch {torch} {text.cite('Paszke2019')}"
    text.say(f"the posterior, of {counted(posterior)}, was computed with pyro_flows {own}, {software}")
    if posterior._of_mcmc:
        _of_others(text, posterior)
        return text
    improper = posterior.verdict._improper
    if improper and posterior.settings.get("round") is None and posterior.verdict.guide_method != made.GUIDE:
        text.say(f"no approximation was fitted: {_improper(posterior)}")
        return text
    text.say(_guide(text, posterior))
    _work(text, posterior)
    if improper:
        text.say(f"{_improper(posterior)}, so nothing should be reported")
    elif posterior._by_chains:
        _chains(text, posterior)
    else:
        _weights(text, posterior)
    text.say(f"the seed was {posterior.settings['seed']}")
    return text


def _improper(posterior: Record) -> str:
    return posterior.verdict.reasons[0].partition(",")[0].replace("improper: ", "improper ")


# how the guide's own draws were made ----------------------------------------------------------------------------------


def _guide(text: Text, posterior: Record) -> str:
    method, flow = posterior.verdict.guide_method, posterior.flow
    if method == made.GUIDE:
        return f"the approximation was a guide of the authors' own ({posterior.guide_name})"
    if method == made.AMORTIZED:
        return _amortized(text, posterior)
    if "rows" in posterior.settings:
        return _by_rows(text, posterior)
    return _sampler(text, method, flow, posterior)


def _amortized(text: Text, posterior: Record) -> str:
    """Say how the flow for all data sets was trained."""
    about = posterior.settings["amortized"]
    density, flows, workflow = made.METHODS[made.AMORTIZED].cites
    return (
        f"the approximation was a conditional normalizing flow {text.cite(density, flows)}, trained by maximum "
        f"likelihood on {about['simulations']:,} simulations of the model, in {about['steps']:,} steps of Adam "
        f"{text.cite('Kingma2015')}, and weighed at these data {text.cite(workflow)}"
    )


def _by_rows(text: Text, posterior: Record) -> str:
    """Say how latents were integrated out, row by row."""
    steps, method = len(posterior.losses), posterior.verdict.guide_method
    what = "a Gaussian at a mode of their marginal density"
    if method == made.MIXTURE:
        what = f"a mixture of Student-t distributions, fitted by population Monte Carlo {text.cite('Cappe2008')}"
    elif method != made.GAUSSIAN or steps:
        what = f"a normalizing flow, trained on minibatches in {steps} steps of Adam {text.cite('Kingma2015')}"
    rows = posterior.settings["rows"]
    if not rows:
        return f"the approximation was {what}"
    return (
        f"the approximation of the latents outside of plates was {what}; the latents of {rows:,} rows were integrated "
        f"out by importance sampling {text.cite('Andrieu2009')}, from Laplace approximations given the other latents "
        f"{text.cite('Rue2009')}"
    )


def _sampler(text: Text, method: str, flow: Flow | FlowMixture | None, posterior: Record) -> str:
    """Say what a sampler is, in one sentence without its stop."""
    if isinstance(flow, FlowMixture) and method == made.MIXTURE:
        return _mixture(text, flow, posterior)
    cites = made.METHODS[method].cites
    options: Entries = flow.recipe.options if isinstance(flow, Flow) and flow.recipe is not None else {}
    names = posterior.coordinates
    if method == made.GRID:
        of, about = names[options["coordinate"]], f"a grid of {options['slices']} values"
        return (
            f"the marginal density of {of} was tabulated, and all other coordinates were taken as Gaussian given {of}, "
            f"by conditional Laplace approximations on {about} {text.cite(*cites)}"
        )
    if method == made.CONDITIONALS:
        held = ", ".join(names[number] for number in options["held"])
        return (
            f"the approximation was a flow of {held}, with the Gaussian distribution that all other coordinates have "
            f"given these {text.cite(*cites)}"
        )
    if method == made.INDEPENDENT:
        return "the coordinates are independent under the posterior, and the density of each was tabulated"
    if method == made.TABULATED:
        return f"the density of {names[0]}, the only coordinate, was tabulated"
    base = _base(flow)
    settings = posterior.settings
    if method == made.GAUSSIAN and (settings.get("round") is None or not settings.get("gradient_evaluations", 1)):
        return f"the approximation was an affine map of {base} that was not fitted, since the time was over"
    if method == made.GAUSSIAN:
        return (
            f"the approximation was a Gaussian (an affine map of {base}), placed by Laplace approximations at modes, "
            f"by Pathfinder {text.cite(*cites)} and by the moments of weighted draws"
        )
    if method in OF_BUILDERS.values():  # a method without a sentence of its own
        return f"the approximation was {made.METHODS[method].meaning}" + (f" {text.cite(*cites)}" if cites else "")
    return f"{_trained(text, flow, base)}, in {len(posterior.losses)} steps"


def _base(flow: Flow | FlowMixture | None) -> str:
    if not isinstance(flow, Flow):
        return "its base"
    df = f" with {flow.df:g} degrees of freedom" if flow.base == "student_t" else ""
    return f"{BASES.get(flow.base, f'a {flow.base} base')}{df}"


def _trained(text: Text, flow: Flow | FlowMixture | None, base: str) -> str:
    recipe, layers, key = flow.recipe if isinstance(flow, Flow) else None, "", FLOWS
    if recipe is not None and recipe.named:
        kind, key = LAYERS.get(recipe.builder, ("a custom map", FLOWS))
        count = recipe.options.get("layers")
        layers = f" of {f'{count} ' if count else ''}{kind}"
    agrawal, *gradients, adam = made.METHODS[made.TRAINED].cites
    return (
        f"the approximation was a normalizing flow{layers} {text.cite(key, agrawal)} with an affine map, over {base}, "
        f"trained on the evidence lower bound by path gradients {text.cite(*gradients)} and Adam {text.cite(adam)}"
    )


def _mixture(text: Text, flow: FlowMixture, posterior: Record) -> str:
    count, kinds = len(flow.components), {method_of(member): member for member in flow.members}
    own = len(flow.members)
    if own < count:
        images = f"{count} images of {own} distribution{'s' * (own > 1)}"
        what = f"a mixture of {images} under exact symmetries of the posterior"
    else:
        what = f"a mixture of {count} distributions"
    if set(kinds) == {made.GAUSSIAN}:
        fitted = f", fitted by population Monte Carlo {text.cite('Cappe2008')}" if len(flow.members) == count else ""
        return f"the approximation was {what}, each an affine map of {_base(flow.members[0])}{fitted}"
    parts = "; for a part, ".join(_sampler(text, kind, member, posterior) for kind, member in kinds.items())
    return f"the approximation was {what}; for a part, {parts}"


def _work(text: Text, posterior: Record) -> None:
    settings = posterior.settings
    if settings.get("runs", 1) > 1:
        differ = any("runs" in reason for reason in posterior.verdict.reasons)
        agreed = "disagreed, and were put together" if differ else "agreed"
        text.say(f"{settings['runs']} independent runs {agreed}")
    if settings.get("gradient_evaluations"):
        text.say(f"in all, {settings['gradient_evaluations']} gradients of the log density were evaluated")


# how they were judged -------------------------------------------------------------------------------------------------


def _weights(text: Text, posterior: Record) -> None:
    verdict = posterior.verdict
    if not math.isnan(verdict.k_hat):
        _figures(text, verdict, int(posterior.settings.get("judged_draws", POOL * int(posterior.settings["draws"]))))
    _search(text, posterior)
    count = len(posterior._used)
    if verdict.status == "unreliable":
        text.say(f"the result is unreliable, and should not be reported: {'; '.join(verdict.reasons)}")
    elif posterior.resampled:
        text.say(f"the {count} draws reported were importance-resampled by these weights")
    else:
        text.say(f"the {count} draws reported are those of the approximation, unweighted")


def _figures(text: Text, verdict: Verdict, count: int) -> None:
    """Say what the weights of so many draws tell; their variance has to be finite where they have to mend something."""
    mean, factor = verdict.mean_shift, math.exp(min(verdict.sd_shift, 10.0))
    moved = mean > SHIFT_MOST or verdict.sd_shift > SHIFT_MOST
    mended = (moved and verdict.status == "corrected") or any(MENDED in reason for reason in verdict.reasons)
    threshold = min(verdict.k_threshold, K_HAT_GOOD) if mended else verdict.k_threshold
    text.say(
        f"{count:,} draws were weighted by the ratio of the posterior to the approximate density, Pareto-smoothed "
        f"{text.cite('Vehtari2024')}: k-hat was {verdict.k_hat:.2f} (threshold {threshold:.2f}), and the effective "
        f"sample size {100 * verdict.ess_ratio:.0f} % of the draws"
    )
    if mean <= UNTOLD and verdict.sd_shift <= UNTOLD:
        text.say(
            f"weighting changed no mean by {_above(mean)} posterior standard deviations or more, and no standard "
            f"deviation by a factor of {_above(factor)} or more"
        )


def _above(figure: float) -> str:
    """Return the least number of two decimals above a figure."""
    return f"{math.floor(100.0 * figure) / 100.0 + 0.01:.2f}"


def _search(text: Text, posterior: Record) -> None:
    missing = [note for note in posterior.verdict.notes if note.startswith("no search for missed modes")]
    if missing or posterior.verdict.status != "unreliable":
        text.say(missing[0] if missing else "searches for missed modes, from these draws, found none")


def _chains(text: Text, posterior: Record) -> None:
    chains, figures = posterior.chains, posterior.verdict.chains
    assert chains is not None
    assert figures is not None
    numbers = chains.numbers
    moves, keys = MOVES[numbers["moves"]]
    within = f"the latent space of this approximation {text.cite('Hoffman2019')}"
    space = "standardized coordinates" if posterior.flow is None else within
    text.say(
        f"the {figures.chains * figures.draws} draws reported are those of {figures.chains} Markov chains of {moves} "
        f"{text.cite(*keys)} in {space}, which began at weighted draws of the approximation and at points "
        "that it under-represents"
    )
    _search(text, posterior)
    text.say(
        f"at the worst coordinate, R-hat was {figures.r_hat:.3f} {text.cite('Vehtari2021')}, nested R-hat "
        f"{figures.nested_r_hat:.3f} {text.cite('Margossian2024')}, and the effective sample size "
        f"{figures.ess_bulk:.0f} in the bulk and {figures.ess_tail:.0f} in the tails; "
        f"{100 * figures.divergences:.2f} % of the trajectories diverged"
    )


def _of_others(text: Text, posterior: Record) -> None:
    figures = posterior.verdict.chains
    assert figures is not None
    nuts = posterior.guide_name == "NUTS"
    by = f"the No-U-Turn sampler {text.cite('Hoffman2014')}" if nuts else f"another sampler ({posterior.guide_name})"
    chains = "one Markov chain" if figures.chains == 1 else f"{figures.chains} Markov chains"
    text.say(f"the draws are {chains} of {figures.draws} draws, by {by}")
    text.say(
        f"at the worst coordinate, R-hat was {figures.r_hat:.3f} {text.cite('Vehtari2021')}, and the effective sample "
        f"size {figures.ess_bulk:.0f} in the bulk and {figures.ess_tail:.0f} in the tails, "
        f"by ArviZ {text.cite('Kumar2019')}"
    )
    if posterior.verdict.status == "unreliable":
        text.say("by these figures, the chains have not converged, and should not be reported")


# what made a result: told from the sampler that its draws come from, by nothing else ----------------------------------

OF_BUILDERS = {method.builder: name for name, method in made.METHODS.items() if method.builder}
PAIRS = 8  # of points, at whose middles an affine map is known
STRAIGHT = 1e-4  # of the distance between the images of a pair: training moves images by a hundred times as much


def guide_method(flow: Flow | FlowMixture | None, settings: Entries) -> str:
    """Return what made a guide's own draws; ``settings`` tell whether the guide is the caller's, or amortized.

    A flow that could not be stored was one that the caller gave to a fit.
    """
    if settings.get("diagnosed"):
        return made.GUIDE
    if settings.get("amortized"):
        return made.AMORTIZED
    return made.TRAINED if flow is None else method_of(flow)


def method_of(sampler: Flow | FlowMixture) -> str:
    """Return the method that a sampler is."""
    if isinstance(sampler, FlowMixture):
        return made.MIXTURE if len(sampler.components) > 1 else method_of(sampler.members[int(sampler.which[0])])
    recipe = sampler.recipe
    known = OF_BUILDERS.get(recipe.builder) if recipe is not None and recipe.named else None
    if known is not None:
        return made.TABULATED if known == made.INDEPENDENT and sampler.dim == 1 else known
    return made.GAUSSIAN if sampler.base in ("normal", "student_t") and is_affine(sampler) else made.TRAINED


@torch.no_grad()
def is_affine(flow: Flow) -> bool:
    """Whether a flow is an affine map: images of the middles of random pairs are the middles of images."""
    generator = torch.Generator().manual_seed(0)
    like = next(flow.parameters(), flow._like)
    a, b = torch.randn(2, PAIRS, *flow.base_shape, generator=generator).to(like)
    at_a, at_b, middle = (flow.bijection.forward_and_ladj(x)[0].double() for x in (a, b, 0.5 * (a + b)))
    size = torch.maximum(at_a.abs(), at_b.abs())
    bend = (middle - 0.5 * (at_a + at_b)).abs()
    allowed = STRAIGHT * (at_a - at_b).abs() + 16.0 * torch.finfo(like.dtype).eps * size
    return bool((bend <= allowed).all())
