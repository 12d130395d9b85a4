"""Losses: values in closed form, and gradients against plain estimators that know nothing of scores."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.inference.training.objectives import elbo, importance_weighted, path, pulled
from tests.invariants import close
from tests.registry import make_flow

DIM = 2
WEIGHT = 1.7  # the target is a density times e to this


def target(loc=0.5, scale=1.5, log_evidence=WEIGHT):
    """An unnormalized Gaussian in two dimensions."""

    def model():
        z = pyro.sample("z", dist.Normal(loc * torch.ones(DIM, dtype=torch.float64), scale).to_event(1))
        pyro.factor("weight", z.new_tensor(log_evidence))

    return pf.LogDensity(model)


def affine_flow(loc=0.0, scale=1.0):
    """A Gaussian q with a diagonal scale; its parameters are shifts of the mean, then of the log scale."""
    start = torch.ones(DIM, dtype=torch.float64)
    return pf.Flow(pf.transforms.DiagonalAffine(DIM, loc=loc * start, scale=scale * start).double())


def gradients(loss, flow):
    found = torch.autograd.grad(loss, list(flow.parameters()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def naive(flow, density, draws, *, group):
    """The bound as Burda et al. write it, differentiated through draws, q and p."""
    z, log_q = flow.rsample_and_log_prob((draws,))
    log_weights = (density(z) - log_q).reshape(-1, group)
    return -(torch.logsumexp(log_weights, 1) - math.log(group)).mean()


@pytest.mark.parametrize("group", [1, 5])
def test_value_is_the_bound(group):
    """The same draws give the same value to rounding."""
    flow, density = make_flow("realnvp", DIM), target()
    torch.manual_seed(1)
    loss, terms, log_weights = importance_weighted(flow, density, 40, group=group)
    torch.manual_seed(1)
    close(terms.mean(), -naive(flow, density, 40, group=group).detach(), 1e-12)
    assert (terms.shape, log_weights.shape) == ((40 // group,), (40,))
    assert loss.requires_grad
    assert not terms.requires_grad
    assert not log_weights.requires_grad


@pytest.mark.parametrize("group", [2, 8])
def test_gradient_is_that_of_the_naive_estimator_in_expectation(group):
    """Four standard errors of the difference for each of the four derivatives: fails once in 4000 runs by chance.

    The plain and the squared weights differ: with normalized weights in place of their squares the test fails.
    """
    flow, density = affine_flow(), target()
    ours, plain = [], []
    for _ in range(300):
        ours.append(gradients(importance_weighted(flow, density, 40 * group, group=group).loss, flow))
        plain.append(gradients(naive(flow, density, 40 * group, group=group), flow))
    ours, plain = torch.stack(ours), torch.stack(plain)
    error = ((ours.var(0) + plain.var(0)) / len(ours)).sqrt()
    assert ((ours.mean(0) - plain.mean(0)).abs() <= 4.0 * error).all()
    assert (ours.mean(0).abs() > 10.0 * error).all(), "nothing to compare"
    first_order = [gradients(_unsquared(flow, density, 40 * group, group), flow) for _ in range(300)]
    assert ((torch.stack(first_order).mean(0) - plain.mean(0)).abs() > 4.0 * error).any()


def _unsquared(flow, density, draws, group):
    z, _, score_q = flow.sample_with_score((draws,))
    log_p, score_p = density.value_and_grad(z)
    weights = torch.softmax((log_p - flow.log_prob(z.detach())).detach().reshape(-1, group), 1).flatten()
    return -((weights[:, None] * (score_p - score_q)).detach() * z).sum() * group / draws


def test_gradient_in_closed_form():
    r"""K = 1, q = N(m, 1), p = N(0.5, 1.5): :math:`-\nabla_m \mathcal L = (m - 0.5) / 1.5^2`, on average.

    Five standard errors.
    """
    flow, density = affine_flow(loc=-0.4), target()
    found = torch.stack([gradients(importance_weighted(flow, density, 200, group=1).loss, flow) for _ in range(200)])
    exact_loc = torch.full((DIM,), (-0.4 - 0.5) / 1.5**2, dtype=torch.float64)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0)[:DIM] - exact_loc).abs() <= 5.0 * error[:DIM] + 1e-12).all()


@pytest.mark.parametrize("name", ["nice", "planar", "realnvp"])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_zero_at_the_target(name, group):
    """With q = p up to a constant, each draw's gradient is zero, and the bound is the log evidence."""
    flow = make_flow(name, DIM)
    loss, terms, _ = importance_weighted(flow, _Same(flow), 32, group=group)
    close(terms, torch.full_like(terms, WEIGHT), 1e-8)
    elsewhere = importance_weighted(flow, target(), 32, group=group).loss
    assert gradients(loss, flow).norm() <= 1e-9 * gradients(elsewhere, flow).norm()


@pytest.mark.parametrize("level", [0.0, -1000.0])
def test_wider_draws_leave_the_level_of_the_bound_alone(level):
    """Defensive draws carry weights whose mean is near 1: left as it is, it would move a bound of -1000 by tens."""
    flow = make_flow("realnvp", DIM)
    torch.manual_seed(0)
    same = _Same(flow, level)
    values = torch.stack([path(flow, same, 64, forward=0.5, defensive=0.3).terms.nanmean() for _ in range(20)])
    close(values, torch.full_like(values, level), 1e-8)
    torch.manual_seed(0)
    many = path(affine_flow(), target(), 200_000, forward=0.5, defensive=0.3).terms.nanmean()
    torch.manual_seed(1)
    close(many, elbo(affine_flow(), target(), 200_000).terms.mean(), 0.02)


class _Same:
    """The density of a flow, with a constant."""

    def __init__(self, flow, level=WEIGHT):
        self.flow, self.level = flow, level

    def value_and_grad(self, z):
        leaf = z.detach().requires_grad_()
        value = self.flow.log_prob(leaf) + self.level
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def test_one_draw_a_group_is_the_path_gradient():
    flow, density = make_flow("realnvp", DIM), target()
    torch.manual_seed(2)
    ours = gradients(importance_weighted(flow, density, 16, group=1, beta=0.7).loss, flow)
    torch.manual_seed(2)
    close(ours, gradients(path(flow, density, 16, beta=0.7).loss, flow), 1e-12)


def given(*, lengths=(1.0, 2.0, 3.0, 4.0)):
    """Log p, its gradient, log q, its gradient, and log ratios of the base for four draws in two dimensions."""
    log_p = torch.tensor([0.3, -1.2, 0.8, -0.1], dtype=torch.float64)
    log_q = torch.tensor([0.1, -0.4, 0.2, 0.5], dtype=torch.float64)
    score = torch.tensor(lengths, dtype=torch.float64)[:, None] * torch.tensor([1.0, -0.5], dtype=torch.float64)
    ratio = torch.tensor([0.0, -0.3, 0.2, -0.6], dtype=torch.float64)
    return log_p, score, log_q, torch.zeros_like(score), ratio


def test_a_share_of_the_forward_divergence_weighs_by_w_times_one_less_w():
    log_p, score, log_q, _, ratio = given()
    pull, _, log_weights = pulled(*given(), forward=0.25)
    weights = torch.softmax(log_p - log_q + ratio, 0)
    coefficients = 0.75 / 4 * ratio.exp() + 0.25 * weights * (1.0 - weights)
    close(pull, -score * coefficients[:, None], 1e-12)
    close(log_weights, log_p - log_q + ratio, 1e-12)


def test_steep_directions_are_shortened_to_a_multiple_of_the_median_length():
    """The median of 1, 2, 3 and 400 is 2 (torch takes the lower one), so with 5 times that the last is 10 long."""
    _, score, _, _, ratio = given(lengths=(1.0, 2.0, 3.0, 400.0))
    pull, _, _ = pulled(*given(lengths=(1.0, 2.0, 3.0, 400.0)), steep=5.0)
    short = torch.cat([score[:3], 10.0 / 400.0 * score[3:]])
    close(pull, -short * ratio.exp()[:, None] / 4, 1e-12)


def test_terms_are_thinned_by_shares_of_the_draws_that_count():
    log_p, score, log_q, zero, ratio = given()
    log_p[2] = -torch.inf
    _, terms, _ = pulled(log_p, score, log_q, zero, ratio)
    counts = torch.tensor([0, 1, 3])
    thinning = ratio.exp()[counts]
    close(terms[counts], (log_p - log_q)[counts] * thinning / thinning.mean(), 1e-12)
    assert terms[2] == -torch.inf


def test_the_bound_rises_with_the_size_of_the_groups():
    """From the ELBO to below the log evidence; 20 000 draws, differences of at least ten standard errors."""
    flow, density = affine_flow(), target(scale=1.2)
    with torch.no_grad():
        values = [float(importance_weighted(flow, density, 20_000, group=group).terms.mean()) for group in (1, 4, 20)]
        plain = float(elbo(flow, density, 20_000).terms.mean())
    exact = WEIGHT - DIM * (math.log(1.2) + (1.0 + 0.25) / (2.0 * 1.44) - 0.5)
    assert values[0] == pytest.approx(exact, abs=0.03)
    assert plain == pytest.approx(exact, abs=0.03)
    assert values[0] + 0.05 < values[1] < values[2] < WEIGHT


def test_draws_outside_of_the_support_have_weight_zero():
    """A bound over groups that each have a draw inside is finite, and so is its gradient."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(DIM, dtype=torch.float64), 1.0).to_event(1))
        pyro.factor("half", torch.where(z[0] > 0.0, 0.0, -torch.inf))

    flow = affine_flow(loc=0.3)
    loss, terms, log_weights = importance_weighted(flow, pf.LogDensity(model), 400, group=40)
    share = torch.isfinite(log_weights).double().mean()
    assert 0.1 < share < 0.9
    assert torch.isfinite(terms).all()
    found = gradients(loss, flow)
    assert torch.isfinite(found).all()
    assert found.norm() > 0.0
    flow = affine_flow(loc=-1e3)
    nowhere = importance_weighted(flow, pf.LogDensity(model), 40, group=40)
    assert nowhere.terms.tolist() == [-math.inf]
    assert not gradients(nowhere.loss, flow).any()


def test_errors():
    flow, density = affine_flow(), target()
    with pytest.raises(ValueError, match="draws: expected a multiple of group=3, got 64"):
        importance_weighted(flow, density, 64, group=3)
    with pytest.raises(ValueError, match="group: expected an integer >= 1, got 0"):
        importance_weighted(flow, density, 64, group=0)
