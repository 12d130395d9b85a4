"""Starts for many data sets of one model at once: the best of Pathfinder's Gaussians and Laplace approximations."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_flows._seeding import derive, seeded
from pyro_flows.model.stack import NotStackable, Stack
from pyro_flows.starts.curvature import FULL_HESSIAN_UP_TO, inverse_roots, lower_triangular
from pyro_flows.starts.pathfinder import pathfinder
from pyro_flows.starts.portfolio import TRIM
from pyro_flows.starts.prior import PATHS, PRIOR_DRAWS, path_starts, prior_draws
from pyro_flows.starts.start import Start
from pyro_flows.verdict.deciding import COMPARED_DRAWS


def starts_together(stack: Stack, *, seed: int, df: float) -> list[Start]:
    """Return the best start of each data set, by the ELBO on common Student-t noise.

    Paths begin at the prior's median and at draws of the prior, in units of the curvature there. Candidates are the
    best Gaussian along each path and the Laplace approximation at its end.

    Raises:
        NotStackable: above 200 dimensions, where Hessians cost too much.
    """
    if stack.dim > FULL_HESSIAN_UP_TO:
        raise NotStackable(f"more than {FULL_HESSIAN_UP_TO} dimensions")
    draws = prior_draws(stack.densities[0], PRIOR_DRAWS, seed=derive(seed, "starts"))
    points = path_starts(draws).repeat(len(stack), 1)
    paths = pathfinder(stack, points, lower_triangular(inverse_roots(stack, points)[0]), seed=seed)
    roots = lower_triangular(inverse_roots(stack, paths.ends)[0])
    normals = (paths.best.loc, paths.ends), (lower_triangular(paths.best.scale()), roots)
    # candidates of each data set: places (K, C, D), and lower triangular scales (K, C, D, D)
    loc, scale = (torch.cat([part.unflatten(0, (len(stack), -1)) for part in parts], 1) for parts in normals)
    with seeded(derive(seed, "scores of starts"), stack.device):
        one = torch.ones(stack.dim, dtype=stack.dtype, device=stack.device)
        base = dist.StudentT(df * one, 0.0, 1.0).to_event(1)
        noise = base.sample((COMPARED_DRAWS // 2,))
    elbos = _scores(stack, loc, scale, noise, base.log_prob(noise))
    best = elbos.nan_to_num(nan=-torch.inf).argmax(1).tolist()
    names = ("pathfinder",) * PATHS + ("laplace",) * PATHS
    return [Start(names[c], loc[k, c], scale[k, c], float(elbos[k, c])) for k, c in enumerate(best)]


def _scores(stack: Stack, loc: Tensor, scale: Tensor, noise: Tensor, log_noise: Tensor) -> Tensor:
    """Return the ELBOs (K, C), without the lowest 5 % of the draws; -inf where a map is not finite."""
    volume = scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    z = loc[:, :, None] + noise @ scale.mT
    usable = torch.isfinite(z).all(-1).all(-1)
    z = torch.where(usable[..., None, None], z, 0.0)
    log_p = stack(z.flatten(0, 2)).reshape(z.shape[:3])
    terms = (log_p - log_noise + volume[..., None]).nan_to_num(nan=-torch.inf).sort(-1).values
    elbos = terms[..., int(TRIM * len(noise)) :].mean(-1)
    return torch.where(usable & torch.isfinite(elbos), elbos, -torch.inf)
