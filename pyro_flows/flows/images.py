"""Builders of flows of images (C, H, W): several scales, logistic base, logit at the end for data in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.recipe import Couplings, build, of_images
from pyro_flows.support import checks
from pyro_flows.support.arguments import widths
from pyro_flows.transforms import (
    ActNorm,
    AffineCoupling,
    Bijection,
    Compose,
    Conv1x1,
    Logit,
    MultiScale,
    Squeeze,
    masks,
)

Shape = tuple[int, int, int]


@of_images
@checks.options
def multiscale_realnvp(
    dim: Sequence[int],
    *,
    levels: int = 2,
    layers: int = 3,
    context_dim: int = 0,
    hidden: Sequence[int] = (32, 32),
    activation: str = "relu",
    network: str = "robust",
    dense: Sequence[int] = (),
    log_scale_bound: float = 8.0,
    alpha: float | None = None,
    base: str = "logistic",
    df: float = 15.0,
) -> Flow:
    r"""Real-NVP of images: at each scale checkerboard couplings, couplings of channels, and half is factored out.

    A coupling keeps :math:`x_K` and moves the others, :math:`y_M = x_M \odot e^{s(x_K)} + t(x_K)`.
    In the direction of the density: ``layers`` affine couplings with checkerboard masks, space to depth, ``layers``
    with masks of channels, which part the rows that each block of 2 x 2 pixels had; half of the channels, a
    checkerboard, are left to the base, the others go on to the next scale; the last scale has ``layers + 1`` with
    checkerboard masks. Where sides are even, the parts of a checkerboard go from space to depth before the networks and
    not after them: then none works on zeros, and all on a quarter of the pixels. An :class:`ActNorm` before each
    coupling stands in for the paper's batch normalization: call ``flow.bijection.start_from(batch)`` before training.
    Latents have the shape of the data. The inverse costs as much as the forward pass. For guides, which need vectors,
    take :func:`realnvp`.

    Args:
        dim: the shape (C, H, W) of an image; H and W divisible by 2 for each level but the last.
        levels: number of scales.
        layers: number of couplings of each kind at a scale.
        context_dim: width of the context.
        hidden: channels of the convolutions of each coupling (or of the residual blocks, which are equal).
        activation: their activation.
        network: ``"robust"`` (convolutions of asinh(x): a few images far from all others, such as white ones, else send
            the density of their batch to zero), ``"convolution"``, ``"residual"`` (weight-normed, as published), or
            ``"dense"`` (perceptrons of all pixels).
        dense: widths of perceptrons of all pixels that take the place of convolutions at the last scale. A convolution
            sees 5 x 5 pixels of its scale, and few of them make strokes, but no digit.
        log_scale_bound: smooth bound of one coupling's log scale, in nats.
        alpha: None for data on the real line; for data in [0, 1], that of a final :class:`Logit`.
        base: see :class:`Flow`.
        df: degrees of freedom of the Student-t base.

    Raises:
        ValueError: for a shape that cannot be halved that often or is down to one pixel then, ``levels`` or ``layers``
            below 1, an unknown base, wrong widths.

    Reference: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, ICLR 2017
    (arXiv 1605.08803).

    >>> import torch, pyro_flows as pf
    >>> flow = pf.multiscale_realnvp((1, 8, 8), layers=1, hidden=(4,), alpha=0.05)
    >>> flow().sample((3,)).shape, flow.log_prob(torch.full((3, 1, 8, 8), 0.5)).shape
    (torch.Size([3, 1, 8, 8]), torch.Size([3]))
    """
    shape = _divisible(dim, checks.integer("levels", levels, 1) - 1)
    if shape[1] * shape[2] == 4 ** (levels - 1):
        raise ValueError(f"dim: expected more than one pixel at the last of {levels} scales, got {shape}.")
    checks.integer("layers", layers, 1)
    options: Couplings = {
        "context_dim": context_dim, "hidden": hidden, "activation": activation, "network": network,
        "log_scale_bound": log_scale_bound,
    }  # fmt: skip

    if not (isinstance(dense, (tuple, list)) and not dense):
        dense = widths("dense", dense)
    last: Couplings = {**options, "network": "dense", "hidden": dense} if dense else options

    def scale(shape: Shape, left: int) -> list[Bijection]:
        """In the order of sampling, the coarser scale first."""
        if left == 1 and (shape[1] % 2 or shape[2] % 2):
            return _couplings(shape, layers + 1, masks.checkerboard, last)
        deep, half = _halved(shape)
        if left == 1:
            inner = _couplings(deep, layers + 1, _board, last)
        else:
            inner = [MultiScale(Compose(scale(half, left - 1))), *_couplings(deep, layers, _rows, options)]
            inner += _couplings(deep, layers, _board, options)
        return [Squeeze(shape), *inner, Squeeze(shape).inv]

    stack = [*scale(shape, levels), *_ending(shape, alpha)]
    more = {"dim": shape, "levels": levels, "layers": layers, "alpha": alpha, "dense": dense}
    return build(stack, base, df, builder="multiscale_realnvp", **options, **more)


@of_images
@checks.options
def glow(
    dim: Sequence[int],
    *,
    levels: int = 2,
    layers: int = 8,
    context_dim: int = 0,
    hidden: Sequence[int] = (64, 64),
    activation: str = "relu",
    network: str = "robust",
    log_scale_bound: float = 8.0,
    alpha: float | None = None,
    base: str = "logistic",
    df: float = 15.0,
    seed: int = 0,
) -> Flow:
    r"""Glow: at each scale space to depth, then ``layers`` steps of ActNorm, 1 x 1 convolution and affine coupling.

    A step is :math:`h \mapsto c(W (h - b) / e^{s})`: W mixes the channels of a pixel, and c is the inverse of an
    :class:`AffineCoupling`. This is in the direction of the density; after each scale but the last, half of the
    channels are left to the base. The 1 x 1 convolutions start as seeded permutations of the channels, so all of them
    are soon moved. Call ``flow.bijection.start_from(batch)`` before training, which sets the ActNorms. Latents have the
    shape of the data. The inverse costs as much as the forward pass. Not for guides, which need vectors.

    Args:
        dim: the shape (C, H, W) of an image; H and W divisible by 2 for each level.
        levels: number of scales.
        layers: number of steps at a scale.
        context_dim: width of the context.
        hidden: channels of the convolutions of each coupling (or of the residual blocks, which are equal).
        activation: their activation.
        network: as for :func:`multiscale_realnvp`.
        log_scale_bound: smooth bound of one coupling's log scale, in nats.
        alpha: None for data on the real line; for data in [0, 1], that of a final :class:`Logit`.
        base: see :class:`Flow`.
        df: degrees of freedom of the Student-t base.
        seed: of the permutations.

    Raises:
        ValueError: for a shape that cannot be halved that often, ``levels`` or ``layers`` below 1, an unknown base.

    Reference: Kingma and Dhariwal, *Glow*, NeurIPS 2018 (arXiv 1807.03039).

    >>> import torch, pyro_flows as pf
    >>> flow = pf.glow((3, 8, 8), layers=2, hidden=(8,))
    >>> flow().sample((2,)).shape
    torch.Size([2, 3, 8, 8])
    """
    shape = _divisible(dim, checks.integer("levels", levels, 1))
    checks.integer("layers", layers, 1)
    checks.integer("seed", seed, 0)
    options: Couplings = {
        "context_dim": context_dim, "hidden": hidden, "activation": activation, "network": network,
        "log_scale_bound": log_scale_bound,
    }  # fmt: skip

    def scale(shape: Shape, left: int) -> list[Bijection]:
        """In the order of sampling, the coarser scale first."""
        deep, half = _halved(shape)
        stack: list[Bijection] = [MultiScale(Compose(scale(half, left - 1)))] if left > 1 else []
        for number in range(layers):
            stack += [AffineCoupling(deep, **options), Conv1x1(deep, seed=seed + layers * left + number), ActNorm(deep)]
        return [Squeeze(shape), *stack, Squeeze(shape).inv]

    stack = [*scale(shape, levels), *_ending(shape, alpha)]
    more = {"dim": shape, "levels": levels, "layers": layers, "alpha": alpha, "seed": seed}
    return build(stack, base, df, builder="glow", **options, **more)


def _divisible(dim: object, halvings: int) -> Shape:
    shape = checks.image("dim", dim)
    if any(side % 2**halvings for side in shape[1:]):
        raise ValueError(
            f"dim: expected a height and width divisible by {2**halvings}, got {shape}; take fewer levels, or pad."
        )
    return shape


def _halved(shape: Shape) -> tuple[Shape, Shape]:
    """Return the shape after space to depth, and that of the half that goes on."""
    channels, height, width = shape
    return (4 * channels, height // 2, width // 2), (2 * channels, height // 2, width // 2)


def _couplings(shape: Shape, count: int, mask: Callable[..., Tensor], options: Couplings) -> list[Bijection]:
    return [
        layer
        for number in range(count)
        for layer in (AffineCoupling(shape, mask=mask(shape, flip=number % 2 == 1), **options), ActNorm(shape))
    ]


def _board(shape: Shape, *, flip: bool) -> Tensor:
    """Return the checkerboard as masks of what :class:`Squeeze` made of the image; the top left pixel moves first."""
    return masks.channels(shape, flip=not flip)


def _rows(shape: Shape, *, flip: bool) -> Tensor:
    """Keep, of what :class:`Squeeze` made of blocks of 2 x 2 pixels, the upper two (or the lower ones)."""
    upper = torch.arange(shape[0]) * 4 // shape[0] % 2 == 0
    return (~upper if flip else upper)[:, None, None].expand(shape).clone()


def _ending(shape: Shape, alpha: float | None) -> list[Bijection]:
    return [] if alpha is None else [Logit(shape, alpha=alpha)]
