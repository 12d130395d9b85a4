"""Many runs of Pyro's one-particle SVI at once: all seeds and priors of the cells in lockstep, in one recorded graph.

The model and the guides are those of test_guides_svi.py. A run of its own in Pyro's SVI takes half a minute; thirty in
lockstep take no longer than one. That the gradients are Pyro's is tested there.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import softplus

RAW = math.log(math.expm1(0.1))  # softplus(RAW) = 0.1, where Pyro's scales start


class Gaussian(torch.nn.Module):
    """Pyro's AutoMultivariateNormal of two numbers as a map of normal draws, with its parameters."""

    def __init__(self, start):
        super().__init__()
        self.loc = torch.nn.Parameter(start.clone())
        self.raw = torch.nn.Parameter(torch.full((2,), RAW))
        self.below = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        scale = softplus(self.raw)
        turned = torch.stack([x[..., 0], self.below * x[..., 0] + x[..., 1]], -1)
        return self.loc + scale * turned, scale.log().sum()


class Map(torch.nn.Module):
    """A flow's bijection as a function of its parameters."""

    def __init__(self, flow):
        super().__init__()
        self.bijection = flow.bijection

    def forward(self, x):
        return self.bijection.forward_and_ladj(x)


def heights(log_tau, priors):
    """The log density of log(tau) under each prior."""
    with pyro.validation_enabled(False):
        return torch.stack([prior().log_prob(log_tau.exp()) for prior in priors]) + log_tau


def loss(core, parameters, buffers, local, x, noise, index, picked, y, priors):
    """Minus the ELBO of one draw and one minibatch, up to a constant; ``local`` is AutoNormal's locs and raw scales."""
    (mu, log_tau), ladj = functional_call(core, {**parameters, **buffers}, (x,))
    loc, scale = local[0][index], softplus(local[1])[index]
    z = loc + scale * noise
    top = -0.5 * (mu / 10.0).square() + (heights(log_tau, priors) * picked).sum() + ladj
    cells = -0.5 * ((z - mu) * torch.exp(-log_tau)).square() - log_tau - 0.5 * (y[index] - z).square() + scale.log()
    return -(top + len(y) / len(index) * cells.sum())


def lockstep(cores, picked, df, *, y, batch, priors, steps):
    """Train; return for each run ``(core, parameters, locs, scales)``. ``df`` of the base, None for a normal one."""
    core, count = cores[0], len(cores)
    parameters = {
        name: torch.stack([part.get_parameter(name).detach() for part in cores]) for name, _ in core.named_parameters()
    }
    buffers = {name: torch.stack([part.get_buffer(name) for part in cores]) for name, _ in core.named_buffers()}
    local = (torch.zeros(count, len(y)), torch.full((count, len(y)), RAW))

    def one(parameters, local, buffers, *draws):
        return loss(core, parameters, buffers, local, *draws, y, priors)

    def draws():
        base = dist.Normal(0.0, 1.0) if df is None else dist.StudentT(df)
        index = torch.rand(count, len(y)).argsort(-1)[:, :batch]
        return base.sample((count, 2)), torch.randn(count, batch), index, picked

    gradients = make_fx(vmap(grad(one, argnums=(0, 1))))(parameters, local, buffers, *draws())
    tensors = [*parameters.values(), *local]
    optimizer = ClippedAdam(tensors, lr=0.01)
    for _ in range(steps):
        found, others = gradients(parameters, local, buffers, *draws())
        for tensor, gradient in zip(tensors, [*found.values(), *others], strict=True):
            tensor.grad = gradient
        optimizer.step()
    rows = [{name: tensor[row] for name, tensor in {**parameters, **buffers}.items()} for row in range(count)]
    return [(core, row, local[0][number], softplus(local[1][number])) for number, row in enumerate(rows)]


@torch.no_grad()
def elbo(core, parameters, loc, scale, picked, df, *, y, priors, draws=4000):
    """The ELBO on all cells. Given mu and tau the rest is Gaussian, so that only these two are drawn."""
    base = dist.Normal(0.0, 1.0) if df is None else dist.StudentT(df)
    torch.manual_seed(1)
    x = base.sample((draws, 2))
    values, ladj = functional_call(core, parameters, (x,))
    mu, log_tau = values.unbind(-1)
    apart = (loc - mu[:, None]).square() + scale.square()
    cells = -0.5 * apart * torch.exp(-2.0 * log_tau[:, None]) - log_tau[:, None] - 0.5 * math.log(2.0 * math.pi)
    cells = cells + dist.Normal(loc, 1.0).log_prob(y) - 0.5 * scale.square() + dist.Normal(loc, scale).entropy()
    top = dist.Normal(0.0, 10.0).log_prob(mu) + (heights(log_tau, priors) * picked[:, None]).sum(0)
    return (top + cells.sum(-1) + ladj - base.log_prob(x).sum(-1)).mean().item()
