"""Forms of a sum that are not followed: they do no harm."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows import LogDensity
from pyro_flows.inference.modes.terms import MOST_TERMS, Counting, Terms

FORMS = {
    "exp": lambda a, b: torch.exp(input=a) + torch.exp(input=b),
    "mul": lambda a, b: torch.mul(torch.exp(a), other=torch.tensor(2.0)),
    "div": lambda a, b: torch.div(torch.exp(a), other=torch.exp(b)),
    "sum": lambda a, b: torch.sum(input=torch.stack([a, b]).exp(), dim=0),
    "logsumexp": lambda a, b: torch.logsumexp(input=torch.stack([a, b]), dim=0),
    "logaddexp": lambda a, b: torch.logaddexp(input=a, other=b),
    "in place": lambda a, b: torch.exp(a).sub_(torch.exp(b)).abs(),
}


@pytest.mark.parametrize("name", FORMS)
def test_arguments_by_keyword_end_no_fit(name):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.log(FORMS[name](-(x - 1.0).square(), -(x + 1.0).square()) + 1.0))

    density = LogDensity(model)
    z = torch.linspace(-1.0, 1.0, 5)[:, None]
    terms = Terms(density, z)
    for number in range(len(terms.branches)):
        points = torch.cat([z, torch.full((5, 1), float(number))], 1)
        assert torch.isfinite(terms.value_and_grad(points)[0]).all()


def test_a_number_that_was_changed_in_place_is_no_sum_any_more():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        both = torch.exp(x)
        both.clamp_(min=2.0)
        pyro.factor("f", both.sum().log())

    assert not len(Terms(LogDensity(model), torch.zeros(3, 2)).branches)


def test_a_point_where_the_model_raises_an_error_has_no_sum():
    raising = []

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if raising:
            raise ValueError("by chance")
        pyro.factor("f", torch.logsumexp(torch.stack([x, -x]), 0))

    density = LogDensity(model)
    assert len(Terms(density, torch.zeros(1, 1)).branches) == 2
    raising.append(None)
    assert not len(Terms(density, torch.zeros(1, 1)).branches)


def test_a_recursion_of_sums_and_products_is_not_followed():
    """Terms doubled at each step of a differential equation: a fit took 21 GB."""
    seen = []

    class Looking(Counting):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            found = super().__torch_function__(func, types, args, kwargs)
            seen.append(max((logs.shape[-1] for _, logs in self._terms.values()), default=0))
            return found

    x = torch.exp(torch.zeros(()))
    with Looking() as counting:
        rate = torch.exp(torch.tensor(-1.0))
        for _ in range(40):
            x = x + 0.1 * rate * x
        torch.log(x)
    assert 2 < max(seen) <= MOST_TERMS
    assert not counting.sizes
