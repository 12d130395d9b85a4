"""Flows of signals (C, T), such as sound, conditioned on frames, such as those of a spectrogram."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.recipe import build, of_images
from pyro_flows.support import checks
from pyro_flows.transforms import ActNorm, AffineCoupling, Bijection, Compose, Conv1x1, MultiScale, Squeeze, masks


@of_images
@checks.options
def waveglow(
    dim: Sequence[int],
    *,
    group: int = 16,
    levels: int = 4,
    layers: int = 1,
    context_dim: int = 0,
    frames: int = 1,
    hidden: Sequence[int] = (64, 64, 64, 64),
    log_scale_bound: float = 8.0,
    base: str = "logistic",
    df: float = 15.0,
) -> Flow:
    r"""WaveGlow: groups of samples, affine couplings by dilated gated convolutions, early outputs, given a spectrogram.

    In the direction of the density: :class:`Squeeze` makes channels of each group of samples, an :class:`ActNorm`
    standardizes them, and the context scales and shifts them. At each level, ``layers`` steps of an invertible 1 x 1
    convolution and an :class:`AffineCoupling` follow: half of the channels move,
    :math:`y_M = x_M \odot e^{s(x_K, c)} + t(x_K, c)`, first those of every other sample, given its neighbors and the
    context c. After each level but the last, these are left to the base, and a signal of half the rate goes on. Latents
    have the shape of the data.

    The context is F rows of features, one after the other, such as the frames of a mel spectrogram, which share the
    length of the signal evenly. Networks prepare it frame by frame, so it costs little. Call
    ``flow.bijection.start_from(batch, context)`` before training, which sets the ActNorm. Networks see neighbors only,
    so one set of weights serves signals of all lengths (``at_length`` of :class:`DensityFit`). The inverse costs as
    much as the forward pass. Not for guides, which need vectors.

    Args:
        dim: the shape (C, T) of a signal.
        group: samples that become channels together; a divisor of T.
        levels: number of levels; ``C * group`` is divisible by 2 to that power.
        layers: number of steps at a level; every other one moves the other half.
        context_dim: width of the context, F times the number of features.
        frames: F, a divisor of ``T / group``.
        hidden: channels of the gated layers of each coupling, which are equal; the dilation doubles from 1 on.
        log_scale_bound: smooth bound of one coupling's log scale, in nats.
        base: see :class:`Flow`.
        df: degrees of freedom of the Student-t base.

    Raises:
        ValueError: for sizes that do not divide, ``layers`` or ``levels`` below 1, an unknown base.

    Reference: Prenger, Valle and Catanzaro, *WaveGlow*, ICASSP 2019 (arXiv 1811.00002); early outputs by halves as in
    Real-NVP (arXiv 1605.08803).

    >>> import torch, pyro_flows as pf
    >>> flow = pf.waveglow((1, 64), group=8, levels=3, context_dim=4 * 5, frames=4, hidden=(8, 8))
    >>> flow(torch.zeros(3, 20)).sample((2,)).shape
    torch.Size([2, 3, 1, 64])
    """
    shape = checks.grid("dim", dim)
    if len(shape) != 2 or shape[1] % group or shape[0] * group % 2 ** checks.integer("levels", levels, 1):
        raise ValueError(
            f"dim: expected the shape (C, T) of a signal, with T divisible by group={group}, and C * group by 2 to the "
            f"levels={levels}, got {shape}; cut or pad the signal."
        )
    checks.integer("layers", layers, 1)
    options = {"context_dim": context_dim, "frames": frames, "hidden": hidden, "log_scale_bound": log_scale_bound}
    coupling = partial(
        AffineCoupling, context_dim=context_dim, frames=frames, hidden=hidden, log_scale_bound=log_scale_bound
    )

    def scale(shape: tuple[int, ...], left: int) -> list[Bijection]:
        """In the order of sampling, the coarser scale first."""
        half = (shape[0] // 2, shape[1])
        stack: list[Bijection] = [MultiScale(Compose(scale(half, left - 1)))] if left > 1 else []
        for number in reversed(range(layers)):
            mask = masks.channels(shape, flip=number % 2 == 0)
            stack += [coupling(shape, mask=mask), Conv1x1(shape)]
        return stack

    squeezed = (group * shape[0], shape[1] // group)
    known = [coupling(squeezed, mask=torch.zeros(squeezed))] if context_dim else []
    stack = [*scale(squeezed, levels), *known, ActNorm(squeezed)]
    stack = [Squeeze(shape, group=group), *stack, Squeeze(shape, group=group).inv]
    more = {"dim": shape, "group": group, "levels": levels, "layers": layers}
    return build(stack, base, df, builder="waveglow", **options, **more)


def at_length(flow: Flow, length: int) -> Flow:
    """Return a copy of a flow of signals for another length: the same weights, and frames as long as before.

    Args:
        flow: made by :func:`waveglow`, trained or not.
        length: T, of whole frames and groups.

    Raises:
        ValueError: for a flow of another kind, or a length that does not divide.

    >>> import torch, pyro_flows as pf
    >>> from pyro_flows.flows.signals import at_length
    >>> longer = at_length(pf.waveglow((1, 64), context_dim=4 * 5, frames=4), 160)
    >>> longer.event_shape, longer.context_dim
    (torch.Size([1, 160]), 50)
    """
    recipe = flow.recipe
    if recipe is None or recipe.builder != waveglow.__name__ or recipe.around:
        raise ValueError("flow: expected one that pf.waveglow made, with no map to the scale of data after it.")
    channels, before = flow.event_shape
    old, width = recipe.options["frames"], recipe.options["context_dim"]
    frames, rest = divmod(old * checks.integer("length", length, 1), before)
    if rest:
        raise ValueError(f"length: expected whole frames of {before // old} samples, got {length}.")
    options = {**recipe.options, "frames": frames, "context_dim": width // old * frames}
    again = replace(recipe, options=options).build((channels, length)).to(next(flow.parameters()))
    state = {name: value for name, value in flow.state_dict().items() if not name.endswith(".mask")}
    again.load_state_dict(state, strict=False)
    return again
