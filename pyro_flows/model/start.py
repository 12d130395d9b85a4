"""Where a model is run first: at the prior's median, or at draws of the prior if it raises an error there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import TypeVar, cast

import torch
from pyro import poutine
from pyro.distributions import Delta, ImproperUniform, TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform
from torch.utils._pytree import tree_leaves

from pyro_flows.model.batching import apart, quiet
from pyro_flows.model.bijections import bijection, real_shape
from pyro_flows.model.faults import at_a_point, is_about_dtypes, is_of_a_point, place_of
from pyro_flows.model.sites import (
    Keywords,
    Model,
    Positional,
    Site,
    innermost,
    is_enumerated,
    is_open,
    is_subsample,
    messages,
)
from pyro_flows.model.supports import elementary
from pyro_flows.support.process.fallbacks import Tried, first_line
from pyro_flows.support.process.seeding import derive, seeded

Result = TypeVar("Result")

TRIES = 8  # draws of the prior at which a model is run, until it raises no error
MEDIAN_DRAWS = 15


def initial_value(site: Site) -> Tensor:
    """Return the prior's median where it can be sampled, the middle of the support otherwise."""
    fn = site["fn"]
    transform = transform_of(site)
    draws = _prior_draws(fn)
    if draws is None:
        bounds = [value for value in vars(elementary(fn.support)).values() if isinstance(value, Tensor)]
        like = next((bound for bound in bounds if bound.is_floating_point()), torch.empty(()))
        return transform(torch.zeros(real_shape(transform, fn.shape())).to(like))
    middle = transform.inv(draws).median(0).values
    return transform(torch.where(torch.isfinite(middle), middle, torch.zeros_like(middle)))


def _prior_draws(fn: TorchDistribution) -> Tensor | None:
    """Draws to start from, or None where there are none; samplers that cannot draw several at once are called often."""
    try:
        # some of Pyro's samplers ignore the shape that is asked for, or stumble on it
        with quiet(), suppress(RuntimeError, TypeError):
            draws = fn.sample(torch.Size((MEDIAN_DRAWS,)))
            if draws.shape == (MEDIAN_DRAWS, *fn.shape()):
                return draws
        with quiet():
            return torch.stack([fn.sample() for _ in range(MEDIAN_DRAWS)])
    except NotImplementedError:
        return None


def transform_of(site: Site) -> Transform:
    """Return the bijection onto a latent site's support, or say which site has none."""
    name = site["name"]
    if innermost(site["fn"]) is Delta:
        raise ValueError(f"site {name!r}: a Delta is a fixed value, no latent. Use pyro.deterministic({name!r}, ...).")
    support = cast(Constraint, site["fn"].support)
    if support.is_discrete and site["infer"].get("enumerate") == "parallel":
        raise ValueError(
            f"site {name!r}: expected finitely many values to be summed over, got the {type(site['fn']).__name__}, "
            "whose values cannot be enumerated. Use a Categorical over those that have a probability worth a thought."
        )
    if support.is_discrete:
        raise ValueError(
            f"site {name!r}: expected a continuous latent, got the discrete {type(site['fn']).__name__}. Enumerate it "
            f"(pyro.infer.config_enumerate, or infer={{'enumerate': 'parallel'}}) or hide it from the guide "
            f"(poutine.block(model, hide=[{name!r}]))."
        )
    try:
        return bijection(site["fn"])
    except NotImplementedError:
        raise ValueError(
            f"site {name!r}: no bijection from real numbers to its support {support}. Use a distribution with another "
            "support, or reparametrize the site (poutine.reparam)."
        ) from None


class _Begin(Messenger):
    """Give latent sites values; remember the site that the model came to last, and whether it is none to be fitted."""

    def __init__(self) -> None:
        super().__init__()
        self.last: str | None = None
        self.refused = False

    def _pyro_sample(self, msg: Site) -> None:
        self.last = msg["name"]
        if is_open(msg) and not is_subsample(msg) and not is_enumerated(msg):
            msg["value"] = self.value(msg)

    def value(self, msg: Site) -> Tensor:
        raise NotImplementedError


class _Start(_Begin):
    """Give latent sites their starting values; flat priors, which have no dtype of their own, take that of ``like``."""

    def __init__(self, start: Callable[[Site], Tensor], like: Tensor) -> None:
        super().__init__()
        self.start = start
        self.like = like

    def value(self, msg: Site) -> Tensor:
        self.refused = True
        with torch.no_grad():
            value = self.start(msg)
        self.refused = False
        return value.to(self.like) if innermost(msg["fn"]) is ImproperUniform else value


class FromPrior(_Begin):
    """Draw latents from their priors.

    Those that cannot be drawn from, improper ones, come from a standard normal in unconstrained coordinates, around
    their values in the run ``around`` if there is one.
    """

    def __init__(self, like: Tensor, around: poutine.Trace | None = None) -> None:
        super().__init__()
        self.like = like
        self.around = {} if around is None else messages(around)

    def value(self, msg: Site) -> Tensor:
        try:
            return msg["fn"].sample()
        except NotImplementedError:
            transform = bijection(msg["fn"])
            shape = real_shape(transform, msg["fn"].shape())
            drawn = torch.randn(shape, dtype=self.like.dtype, device=self.like.device)
            if msg["name"] in self.around:
                drawn = drawn + transform.inv(self.around[msg["name"]]["value"])
            return transform(drawn)


def first_run(model: Model, args: Positional, kwargs: Keywords, start: Callable[[Site], Tensor]) -> poutine.Trace:
    """Run the model once at starting values, or at a draw of its prior where it raises an error there.

    Flat priors take the arguments' floating dtype (or, failing that, another one).
    """
    likes = _likes(args, kwargs)
    for number in range(1 + TRIES):
        for like in likes:
            handler: _Begin = FromPrior(like) if number else _Start(start, like)
            drawing = seeded(derive(number, "a first run"), like.device) if number else nullcontext()

            def passes(error: Exception, handler: _Begin = handler, last: bool = like is likes[1]) -> bool:
                return not handler.refused and (not last if is_about_dtypes(error) else is_of_a_point(error))

            with Tried(passes) as tried, apart(), torch.no_grad(), drawing, handler:
                return poutine.trace(model).get_trace(*args, **kwargs)
            failed, place = tried.error, place_of(handler.last, ())
            if failed is not None and not is_about_dtypes(failed):
                break
    assert failed is not None
    raise ValueError(
        f"model: expected it to run at the start or at one of {TRIES} draws of its prior, but it raised an error at "
        f"each of them, {place}: {first_line(failed)}. Check the shapes and values of its arguments there; "
        "model(*args) shows the whole error."
    ) from failed


def _likes(args: Positional, kwargs: Keywords) -> tuple[Tensor, Tensor]:
    """Return examples of the arguments' floating dtype, and of the other one."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    dtypes = [leaf.dtype for leaf in given if leaf.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else torch.get_default_dtype()
    other = torch.float32 if dtype == torch.float64 else torch.float64
    device = given[0].device if given else None
    return torch.zeros((), dtype=dtype, device=device), torch.zeros((), dtype=other, device=device)


def prior_run(run: Callable[[], object], around: poutine.Trace, like: Tensor) -> poutine.Trace | None:
    """Run a model at a draw of its prior; None if it raises an error at each of several draws."""
    for number in range(TRIES):
        drawing = seeded(derive(number, "a prior run"), like.device)
        with at_a_point(), apart(), torch.no_grad(), quiet(), drawing, FromPrior(like, around):
            return poutine.trace(run).get_trace()
    return None


def at_some_draw(run: Callable[[], Result]) -> Result:
    """Return what a run that draws latents returns, with another seed where the model raises an error."""
    for number in range(TRIES):
        with at_a_point() as tried, seeded(number):
            return run()
    assert tried.error is not None
    raise ValueError(
        f"model: expected it to run at one of {TRIES} draws of its prior, but it raised an error at each of them: "
        f"{first_line(tried.error)}. Check its arguments and its priors."
    ) from tried.error
