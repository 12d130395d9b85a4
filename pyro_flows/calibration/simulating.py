"""Parameters from the prior, or the posterior at the data in hand, and data given them, in the model's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_flows.calibration.wiring import Case, Names, check_wiring, filled, wire
from pyro_flows.fitting.fit import fit
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import Model, Site, is_data, messages
from pyro_flows.support.files.bundles import Entries
from pyro_flows.support.process.progress import Bar
from pyro_flows.support.process.seeding import derive


@dataclass(frozen=True)
class Simulated:
    """What is fitted: the model, its arguments with simulated data, and the true values (simulations, *shape)."""

    model: Model
    density: LogDensity
    cases: list[Case]
    truths: dict[str, Tensor]
    data: dict[str, Tensor]

    def truth(self, number: int) -> dict[str, Tensor]:
        """Return the true values of one simulation."""
        return {name: values[number] for name, values in self.truths.items()}


def simulate(model: Model, case: Case, data: Names, asked: Entries, options: Entries, bar: Bar) -> Simulated:
    """Draw parameters and data, and put the data into the arguments."""
    bar.watch("simulating")
    case = filled(model, case, data)
    density = LogDensity(model, case.args, case.kwargs)
    check_model(density, asked["kind"])
    wiring = wire(density, case, data)
    count, seed = asked["simulations"], asked["seed"]
    if asked["kind"] == "prior":
        found = density.prior(count, seed=derive(seed, "simulations"))
        if found is None:
            raise ValueError("model: expected proper priors that can be drawn from. Take kind='posterior'.")
    else:
        found = _from_posterior(model, case, count, seed, options, bar)
    check_wiring(density, wiring, {name: values[0] for name, values in found.items()})
    truths = {name: found[name] for name in density.names}
    drawn = {name: found[name] for name in density.structure.observed}
    cases = [wiring({name: values[number] for name, values in drawn.items()}) for number in range(count)]
    fitted = model if asked["kind"] == "prior" else Augmented(model, case)
    return Simulated(fitted, density, cases, truths, drawn)


def check_model(density: LogDensity, kind: str) -> None:
    """Refuse models whose data cannot be simulated."""
    structure = density.structure
    factors = [name for name, site in messages(structure.trace).items() if isinstance(site.get("fn"), Unit)]
    if factors:
        raise ValueError(f"site {factors[0]!r}: a factor, so that the model cannot draw its own data.")
    if not structure.observed:
        raise ValueError(
            "model: expected observed sites, got none, so there are no data to simulate. Pass data, or name the "
            "argument that is None: data={'site': 'argument'}."
        )
    if kind == "posterior" and structure.enumerated:
        raise ValueError("kind: expected 'prior' for a model with enumerated latents.")


def _from_posterior(model: Model, case: Case, count: int, seed: int, options: Entries, bar: Bar) -> dict[str, Tensor]:
    """Draw parameters from the posterior at the data in hand, and data given them."""
    bar.watch("the fit to the data in hand")
    given = {name: value for name, value in options.items() if value is not None}
    given["draws"] = max(4000, count)
    posterior = fit(model, *case.args, model_kwargs=case.kwargs, seed=derive(seed, "at hand"), progress=False, **given)
    if posterior.verdict.status == "unreliable" or posterior.density is None:
        raise ValueError(f"posterior at the data in hand: {posterior.verdict}")
    generator = torch.Generator().manual_seed(derive(seed, "true values"))
    picked = torch.randperm(len(posterior._used), generator=generator)[:count]
    drawn = posterior.density.predictive(posterior._used[picked], seed=derive(seed, "simulations"))
    return {**{name: values[picked] for name, values in posterior.samples.items()}, **drawn}


# the data at hand and new ones together -------------------------------------------------------------------------------

AT_HAND = " (at hand)"


class _Again(Messenger):
    """Give latent sites the values that they have, unseen from outside; call observed sites otherwise."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["is_observed"], msg["stop"] = self.values[msg["name"]], True, True
        elif msg["is_observed"] and is_data(msg):
            msg["name"] = f"{msg['name']}{AT_HAND}"
        elif msg["is_observed"]:
            msg["stop"] = True  # deterministic sites, which are there already


class Augmented:
    r"""A model run twice with the same latents, on its arguments and on the data at hand; its pickle is the model's.

    Its posterior is :math:`p(\theta \mid y_{\text{at hand}}, y)`.
    """

    def __init__(self, model: Model, case: Case) -> None:
        self.model, self.case = model, case
        self.__name__ = getattr(model, "__name__", type(model).__name__)

    def __call__(self, *args: object, **kwargs: object) -> object:
        with poutine.trace() as seen:
            result = self.model(*args, **kwargs)
        sites = messages(seen.trace).items()
        latents = {name: site["value"] for name, site in sites if site["type"] == "sample" and not site["is_observed"]}
        with _Again(latents):
            self.model(*self.case.args, **self.case.kwargs)
        return result
