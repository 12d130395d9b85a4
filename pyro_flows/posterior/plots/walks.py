"""Walks in latent space: a manifold through four images on which a latent stays typical, and inpainting."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.support import checks
from pyro_flows.transforms import Rescale


def blend(latents: Tensor, across: Tensor, up: Tensor) -> Tensor:
    r"""Blend four latents on a manifold whose coefficients have norm 1.

    .. math:: z = \cos\phi\,(\cos\phi' z_1 + \sin\phi' z_2) + \sin\phi\,(\cos\phi' z_3 + \sin\phi' z_4)

    Independent standard normal latents stay standard normal everywhere on it, where a straight blend shrinks them to
    half in the middle.

    Args:
        latents: the four, ``(4, ...)``.
        across: :math:`\phi'`, from 0 (z1, z3) to :math:`\pi/2` (z2, z4).
        up: :math:`\phi`, from 0 (z1, z2) to :math:`\pi/2` (z3, z4); broadcasts with ``across``.

    Returns:
        One latent for each pair of angles.

    Raises:
        ValueError: if there are not four latents.

    Cost: O(D) for each pair.

    Reference: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, ICLR 2017
    (arXiv 1605.08803), section 4.5.

    >>> z = torch.eye(4)
    >>> blend(z, torch.tensor(0.0), torch.tensor(math.pi / 2)).round(decimals=3).abs().tolist()
    [0.0, 0.0, 1.0, 0.0]
    """
    if latents.dim() < 1 or len(latents) != 4:
        raise ValueError(f"latents: expected four, got shape {tuple(latents.shape)}.")
    across, up = torch.broadcast_tensors(across, up)
    weights = [up.cos() * across.cos(), up.cos() * across.sin(), up.sin() * across.cos(), up.sin() * across.sin()]
    return torch.tensordot(torch.stack(weights, -1).to(latents), latents, 1)


def over_grid(latents: Tensor, steps: int) -> Tensor:
    r"""Blend four latents over a grid of angles, ``(steps, steps, ...)``; they stand in its corners.

    The angles go from 0 to :math:`\pi/2` in equal steps, see :func:`blend`. Cost: ``steps**2`` blends.

    Raises:
        ValueError: if there are not four latents.

    >>> over_grid(torch.eye(4), 3).shape
    torch.Size([3, 3, 4])
    """
    angles = torch.linspace(0.0, math.pi / 2.0, steps, dtype=latents.dtype, device=latents.device)
    return blend(latents, angles[None, :], angles[:, None])


@torch.no_grad()
@checks.options
def interpolate(flow: Flow, points: Tensor, *, steps: int = 8, context: Tensor | None = None) -> Tensor:
    r"""Walk between four points: encode them, blend their latents over a grid of angles, decode.

    The corners of the grid are the four points themselves. For a base that is not normal, the blend is one of
    :math:`\Phi^{-1}(F(z))` (the Gaussian copula), so that every latent on the grid keeps the base's margins.

    Args:
        flow: a trained flow with a normal or logistic base.
        points: the four, ``(4, *event_shape)``: top left, top right, bottom left, bottom right.
        steps: points along each side of the grid.
        context: the context of all points, ``(context_dim,)``.

    Returns:
        The points of the grid, ``(steps, steps, *event_shape)``.

    Raises:
        ValueError: for points of another shape, fewer than two steps, or another base.

    Cost: the flow's inverse at four points, and a pass at each point of the grid.

    >>> import torch, pyro_flows as pf
    >>> interpolate(pf.realnvp(2), torch.randn(4, 2), steps=5).shape
    torch.Size([5, 5, 2])
    """
    if points.shape != (4, *flow.event_shape):
        raise ValueError(f"points: expected shape {(4, *flow.event_shape)}, got {tuple(points.shape)}.")
    z = to_normal(flow, flow.bijection.inverse_and_ladj(points, context)[0])
    latents = from_normal(flow, over_grid(z, steps))
    return flow.bijection.forward_and_ladj(latents, context)[0]


def to_normal(flow: Flow, x: Tensor) -> Tensor:
    r"""Map latents of the base to standard normal ones, :math:`\Phi^{-1}(F(x))`, with full precision in both tails.

    Raises:
        ValueError: for a base without a closed form in both tails.

    Shapes: as ``x``. Cost: O(D) each. Those of a logistic base have no gradients.

    >>> import torch, pyro_flows as pf
    >>> to_normal(pf.realnvp(2, base="logistic"), torch.zeros(2)).round(decimals=6).abs().tolist()
    [0.0, 0.0]
    """
    from scipy.special import ndtri_exp

    if _base(flow) == "normal":
        return x
    # log F(-|x|) = -softplus(|x|); the tail beyond float's smallest probability is reached through the logarithm
    log_p = -torch.nn.functional.softplus(x.abs()).detach().double().cpu()
    return torch.copysign(torch.as_tensor(ndtri_exp(log_p.numpy())).to(x), x)


def from_normal(flow: Flow, z: Tensor) -> Tensor:
    r"""Map standard normal latents to those of the base: the inverse of :func:`to_normal`.

    :math:`x = F^{-1}(\Phi(z))`. Shapes: as ``z``. Cost: O(D) each.

    Raises:
        ValueError: for a base without a closed form in both tails.

    >>> import torch, pyro_flows as pf
    >>> from_normal(pf.realnvp(2, base="logistic"), torch.zeros(2)).round(decimals=6).abs().tolist()
    [0.0, 0.0]
    """
    if _base(flow) == "normal":
        return z
    lower = torch.special.log_ndtr(-z.abs())
    return torch.copysign(-(lower - torch.log(-torch.expm1(lower))), z)  # logit of a probability below one half


def _base(flow: Flow) -> str:
    if flow.base not in ("normal", "logistic"):
        raise ValueError(f"flow: expected a normal or logistic base, got {flow.base!r}.")
    return flow.base


@checks.options
def inpaint(
    flow: Flow,
    points: Tensor,
    known: Tensor,
    *,
    steps: int = 300,
    step_size: float = 0.05,
    bounds: tuple[float, float] | None = None,
    context: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    r"""Fill in what is not known by gradient ascent on :math:`\log q`, with noise that dies away.

    Unknown coordinates start at random within the range of the known ones and move by Adam, with a step that falls
    along a cosine.

    Args:
        flow: a trained flow.
        points: ``(N, *event_shape)``; what is unknown in them is not looked at.
        known: booleans that broadcast to ``points``: what stays as it is.
        steps: of the ascent.
        step_size: of Adam, in the unit of the data.
        bounds: the smallest and largest value, as (0, 1) for images.
        context: of the points.
        seed: of the start and the noise.

    Raises:
        ValueError: for points of another shape.

    Cost: ``steps`` gradients of the flow's log density.

    Reference: Dinh, Krueger and Bengio 2015, *NICE* (arXiv 1410.8516), section 5.2 and appendix.

    >>> import torch, pyro_flows as pf
    >>> inpaint(pf.realnvp(2), torch.tensor([[0.5, torch.nan]]), torch.tensor([True, False]))[0, 0].item()
    0.5
    """
    if points.shape[1:] != flow.event_shape:
        raise ValueError(f"points: expected shape {('N', *flow.event_shape)}, got {tuple(points.shape)}.")
    known = known.expand(points.shape)
    generator = torch.Generator(device=points.device).manual_seed(seed)
    seen = points[known]
    low, high = bounds or ((float(seen.min()), float(seen.max())) if len(seen) else (-1.0, 1.0))
    noise = torch.rand(points.shape, generator=generator, dtype=points.dtype, device=points.device)
    free = torch.where(known, points, low + (high - low) * noise).detach().requires_grad_()
    optimizer = torch.optim.Adam([free])
    for step in range(steps):
        share = 0.5 * (1.0 + math.cos(math.pi * step / steps))
        (gradient,) = torch.autograd.grad(-flow.log_prob(free, context).sum(), free)
        free.grad = torch.where(known, torch.zeros_like(gradient), gradient)
        optimizer.param_groups[0]["lr"] = step_size * share
        optimizer.step()
        with torch.no_grad():
            jitter = torch.randn(points.shape, generator=generator, dtype=points.dtype, device=points.device)
            free += torch.where(known, 0.0, 0.1 * step_size * share * jitter)
            if bounds is not None:
                free.clamp_(*bounds)
            free.copy_(torch.where(known, points, free))
    return free.detach()


@checks.options
def nearest(samples: Tensor, training: Tensor, *, count: int = 1) -> Tensor:
    """Return the indices ``(N, count)`` of the training points nearest to each sample, by Euclidean distance.

    A model that has learned its data by heart shows here. Cost: all distances, one block of samples at a time.

    >>> import torch
    >>> nearest(torch.tensor([[0.9, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])).tolist()
    [[1]]
    """
    rows = training.flatten(1).to(samples)
    found = [torch.cdist(block, rows).topk(count, largest=False).indices for block in samples.flatten(1).split(256)]
    return torch.cat(found)


def scale_spectrum(flow: Flow) -> Tensor:
    r"""Return :math:`\sigma_d = e^{s_d}` of NICE's scaling layer, largest first: how much each latent matters.

    In NICE's own direction, from data to noise, the layer is :math:`e^{-s_d}`, the inverse of what is returned.

    Raises:
        ValueError: for a flow without such a layer, or with a conditional one.

    Cost: O(D log D). Source: Dinh, Krueger and Bengio 2015 (arXiv 1410.8516), section 5.1.

    >>> import pyro_flows as pf
    >>> scale_spectrum(pf.nice(3)).shape
    torch.Size([3])
    """
    layers: Sequence[Rescale] = [module for module in flow.modules() if isinstance(module, Rescale)]
    if len(layers) != 1 or layers[0].context_dim:
        raise ValueError("flow: expected one with a single Rescale layer without context, as pf.nice makes it.")
    layer = layers[0]
    return layer.forward_and_ladj(torch.ones_like(layer.scale))[0].detach().sort(descending=True).values
