"""Densities fitted by other libraries, each as its documentation has it, with one plain recipe of training.

Standardized data (images by one scale for all pixels), Adam with a step size of 2e-3 that falls to zero along a cosine
over the CPU seconds allowed, and the weights of the best of about twenty checks on held-out points. Ran in a process of
its own by ``density.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.density.problems import Problem

LEARNING_RATE = 2e-3
LogProb = Callable[[Tensor], Tensor]
Made = tuple[list[nn.Parameter], LogProb]


def zuko(kind: str, dim: int, layers: int, hidden: tuple[int, ...], bins: int) -> Made:
    """Couplings of zuko; its additive one is the affine with the scale left out."""
    import zuko

    def shift(by: Tensor) -> torch.distributions.Transform:
        return zuko.transforms.AdditiveTransform(by)

    options: dict[str, Any] = {"transforms": layers, "hidden_features": hidden}
    if kind == "affine":
        flow = zuko.flows.RealNVP(dim, **options)
    elif kind == "additive":
        flow = zuko.flows.RealNVP(dim, univariate=shift, shapes=[()], **options)
    else:
        flow = zuko.flows.NSF(dim, bins=bins, passes=2, **options)
    return list(flow.parameters()), lambda y: flow().log_prob(y)


def nflows(kind: str, dim: int, layers: int, hidden: tuple[int, ...], bins: int) -> Made:
    """Couplings of nflows with residual networks of the same width and depth."""
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import base, coupling
    from nflows.utils.torchutils import create_alternating_binary_mask

    def net(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(inputs, outputs, hidden_features=hidden[0], num_blocks=max(len(hidden) // 2, 1))

    stack = []
    for layer in range(layers):
        mask = create_alternating_binary_mask(dim, even=layer % 2 == 0)
        if kind == "spline":
            stack.append(
                coupling.PiecewiseRationalQuadraticCouplingTransform(
                    mask, net, num_bins=bins, tails="linear", tail_bound=5.0
                )
            )
        else:
            made = coupling.AffineCouplingTransform if kind == "affine" else coupling.AdditiveCouplingTransform
            stack.append(made(mask, net))
    flow = Flow(base.CompositeTransform(stack), StandardNormal([dim]))
    return list(flow.parameters()), flow.log_prob


def normflows(kind: str, dim: int, layers: int, hidden: tuple[int, ...], bins: int) -> Made:
    """Couplings of normflows."""
    import normflows as nf

    stack: list[nn.Module] = []
    for layer in range(layers):
        mask = torch.arange(dim) % 2 == layer % 2
        if kind == "spline":
            stack.append(
                nf.flows.CoupledRationalQuadraticSpline(
                    dim, max(len(hidden) // 2, 1), hidden[0], num_bins=bins, tail_bound=5.0, reverse_mask=layer % 2 == 1
                )
            )
            continue
        net = nf.nets.MLP([dim, *hidden, dim], init_zeros=True)
        scale = nf.nets.MLP([dim, *hidden, dim], init_zeros=True) if kind == "affine" else None
        stack.append(nf.flows.MaskedAffineFlow(mask.float(), net, scale))
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), stack)
    return list(flow.parameters()), flow.log_prob


def pyro(kind: str, dim: int, layers: int, hidden: tuple[int, ...], bins: int) -> Made:
    """Couplings of Pyro with a flip between each two; it has no additive ones."""
    import pyro.distributions as dist
    import pyro.distributions.transforms as transforms

    if kind == "additive":
        raise LookupError("Pyro has no additive coupling.")
    stack: list[Any] = []
    for _ in range(layers):
        if kind == "affine":
            stack.append(transforms.affine_coupling(dim, list(hidden)))
        else:
            stack.append(transforms.spline_coupling(dim, hidden_dims=list(hidden), count_bins=bins, bound=5.0))
        stack.append(transforms.Permute(torch.arange(dim).flip(0)))
    base = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
    flow = dist.TransformedDistribution(base, stack)

    def log_prob(y: Tensor) -> Tensor:
        flow.clear_cache()
        return flow.log_prob(y)

    return list(nn.ModuleList([layer for layer in stack if isinstance(layer, nn.Module)]).parameters()), log_prob


def normflows_glow(shape: torch.Size, levels: int, layers: int, hidden: int) -> Made:
    """Glow as in normflows' own example, for flat images, with a diagonal Gaussian that is trained as base."""
    import normflows as nf

    channels, height, width = shape
    bases, stacks, merges = [], [], []
    for level in range(levels):
        deep = channels * 2 ** (levels + 1 - level)
        blocks = [nf.flows.GlowBlock(deep, hidden, split_mode="channel", scale=True) for _ in range(layers)]
        stacks.append([*blocks, nf.flows.Squeeze()])
        merges += [nf.flows.Merge()] if level else []
        small = (height // 2 ** (levels - level), width // 2 ** (levels - level))
        bases.append(nf.distributions.DiagGaussian((deep if level == 0 else deep // 2, *small)))
    flow = nf.MultiscaleFlow(bases, stacks, merges, class_cond=False)
    return list(flow.parameters()), lambda y: flow.log_prob(y.unflatten(-1, shape), None)


PEERS: dict[str, Callable[[str, int, int, tuple[int, ...], int], Made]] = {
    "zuko": zuko,
    "nflows": nflows,
    "normflows": normflows,
    "Pyro": pyro,
}


def make(peer: str, problem: Problem, kind: str, shape: torch.Size) -> Made:
    """Return a peer's flow of the size that the problem asks for, of flat points."""
    if kind in problem.images:
        options = problem.images[kind]
        return normflows_glow(shape, options["levels"], options["layers"], options["hidden"][0])
    return PEERS[peer](kind, shape[0], problem.depth(kind), problem.hidden, problem.bins)


def has(peer: str, kind: str) -> bool:
    """Whether a peer has flows of this kind: Pyro no additive couplings, and for images only normflows has Glow."""
    if kind == "auto":
        return False
    if kind in ("multiscale", "glow"):
        return (peer, kind) == ("normflows", "glow")
    return (peer, kind) != ("Pyro", "additive")


def train(made: Made, rows: LogProb, held_out: Tensor, *, points: int, batch: int, seconds: float) -> int:
    """Train until ``seconds`` of CPU time are over, and leave the best weights; ``rows`` gives points by index."""
    parameters, log_prob = made
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    began = time.process_time()
    best, kept, check_at, steps = -math.inf, [parameter.detach().clone() for parameter in parameters], 0.05, 0
    while (share := (time.process_time() - began) / seconds) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1.0 + math.cos(math.pi * share))
        optimizer.zero_grad()
        loss = -log_prob(rows(torch.randint(points, (batch,)))).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 50.0)
        if bool(torch.isfinite(norm)):
            optimizer.step()
        steps += 1
        if share >= check_at:
            check_at += 0.05
            best, kept = _better(parameters, log_prob, held_out, best, kept)
    best, kept = _better(parameters, log_prob, held_out, best, kept)
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return steps


@torch.no_grad()
def _better(
    parameters: list[nn.Parameter], log_prob: LogProb, held_out: Tensor, best: float, kept: list[Tensor]
) -> tuple[float, list[Tensor]]:
    value = float(log_prob(held_out).mean())
    return (value, [parameter.detach().clone() for parameter in parameters]) if value > best else (best, kept)
