"""Builders of the usual stacks, for vectors."""

from __future__ import annotations

from collections.abc import Sequence

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.recipe import Couplings, Networks, build, of_vectors
from pyro_flows.support import checks
from pyro_flows.transforms import AdditiveCoupling, AffineCoupling, Bijection, Planar, Rescale, SplineCoupling, masks


@of_vectors
@checks.options
def planar(
    dim: int,
    *,
    layers: int = 16,
    context_dim: int = 0,
    hidden: Sequence[int] = (32, 32),
    activation: str = "silu",
    base: str = "normal",
    df: float = 15.0,
) -> Flow:
    r"""Planar flow: ``layers`` times :math:`x + \hat u \tanh(w^\top x + b)`; :math:`2D + 1` parameters a layer.

    For low dimensions and mild departures from a Gaussian; bends one dimension too. The
    inverse costs a scalar root a layer.

    Args:
        dim: number of coordinates D.
        layers: number of planar maps.
        context_dim: width of the context; above 0, ``hidden`` and ``activation`` describe its networks.
        hidden: widths of those networks.
        activation: their activation.
        base: see :class:`Flow`.
        df: degrees of freedom of the Student-t base.

    Raises:
        ValueError: for ``layers`` or ``dim`` below 1, an unknown base.

    Reference: Rezende and Mohamed 2015 (arXiv 1505.05770).

    >>> import pyro_flows as pf
    >>> sum(p.numel() for p in pf.planar(2, layers=8).parameters())
    40
    """
    checks.integer("layers", layers, 1)
    options: Networks = {"context_dim": context_dim, "hidden": hidden, "activation": activation}
    stack: list[Bijection] = [Planar(dim, **options) for _ in range(layers)]
    return build(stack, base, df, builder="planar", dim=dim, layers=layers, **options)


@of_vectors
@checks.options
def nice(
    dim: int,
    *,
    layers: int = 4,
    context_dim: int = 0,
    hidden: Sequence[int] = (32, 32),
    activation: str = "silu",
    network: str = "mlp",
    mask: str = "mixed",
    base: str = "normal",
    df: float = 15.0,
    seed: int = 0,
) -> Flow:
    r"""NICE: a diagonal :math:`e^{s}` of the base, then ``layers`` additive couplings :math:`x_M + t(x_K)`.

    Volume-preserving up to that scale: fast and stable, but it cannot widen one region and narrow another.
    The inverse costs as much as the forward pass. Couplings work on the scale of what is modeled; s tells how much
    each latent matters (:func:`scale_spectrum`).

    For images as vectors in the unit cube, as published::

        nice(784, mask="alternating", hidden=(1000,) * 5, activation="relu", base="logistic")

    and in a fifth of the time ``hidden=(512,) * 3``. The logistic base is the right one for data: a normal base pays
    dearly for the few test images that are unlike all training images in some coordinate.

    Args:
        dim: number of coordinates.
        layers: number of couplings; 2 at least to move every coordinate (1 does if ``dim`` is 1).
        context_dim: width of the context.
        hidden: widths of the couplings' hidden layers.
        activation: their activation.
        network: ``"mlp"``, ``"robust"`` (of asinh(x), for data with far values) or ``"residual"`` (weight-normed
            blocks, one for each of ``hidden``).
        mask: ``"mixed"`` or ``"alternating"``, see :func:`masks.sequence`.
        base: see :class:`Flow`.
        df: degrees of freedom of the Student-t base.
        seed: of mixed masks from the fifth coupling on.

    Raises:
        ValueError: for ``layers`` or ``dim`` below 1, an unknown base.

    Reference: Dinh, Krueger and Bengio 2015 (arXiv 1410.8516).

    >>> import torch, pyro_flows as pf
    >>> pf.nice(3, layers=4).rsample_and_log_prob((5,))[1].shape
    torch.Size([5])
    """
    options: Networks = {"context_dim": context_dim, "hidden": hidden, "activation": activation}
    kept = masks.sequence(dim, layers, kind=mask, seed=seed)
    stack: list[Bijection] = [Rescale(dim, **options)]
    stack += [AdditiveCoupling(dim, mask=part, network=network, **options) for part in kept]
    more = {"network": network, "mask": mask, "seed": seed}
    return build(stack, base, df, builder="nice", dim=dim, layers=layers, **options, **more)


@of_vectors
@checks.options
def realnvp(
    dim: int,
    *,
    layers: int = 8,
    context_dim: int = 0,
    hidden: Sequence[int] = (32, 32),
    activation: str = "silu",
    network: str = "mlp",
    mask: str = "mixed",
    log_scale_bound: float = 8.0,
    base: str = "normal",
    df: float = 15.0,
    seed: int = 0,
) -> Flow:
    r"""Real-NVP: ``layers`` affine couplings with alternating masks. The default choice.

    A coupling keeps :math:`x_K` and moves the others, :math:`y_M = x_M \odot e^{s(x_K)} + t(x_K)`; see
    :class:`AffineCoupling`.
    The inverse costs as much as the forward pass. In one dimension a coupling has nothing to condition on and the flow
    is affine, which a warning says: take :func:`spline` there.

    Args:
        dim: number of coordinates.
        layers: number of couplings; an even number moves all coordinates equally often.
        context_dim: width of the context.
        hidden: widths of the couplings' hidden layers.
        activation: their activation.
        network: ``"mlp"``, ``"robust"`` (of asinh(x), for data with far values) or ``"residual"`` (weight-normed
            blocks, one for each of ``hidden``).
        mask: ``"mixed"`` or ``"alternating"``, see :func:`masks.sequence`.
        log_scale_bound: smooth bound of one coupling's log scale, in nats.
        base: see :class:`Flow`.
        df: degrees of freedom of the Student-t base.
        seed: of mixed masks from the fifth coupling on.

    Raises:
        ValueError: for ``layers`` or ``dim`` below 1, an unknown base.

    Reference: Dinh, Sohl-Dickstein and Bengio 2017 (arXiv 1605.08803).

    >>> import torch, pyro_flows as pf
    >>> pf.realnvp(3, context_dim=2)(torch.zeros(7, 2)).batch_shape
    torch.Size([7])
    """
    options: Couplings = {
        "context_dim": context_dim, "hidden": hidden, "activation": activation, "network": network,
        "log_scale_bound": log_scale_bound,
    }  # fmt: skip
    kept = masks.sequence(dim, layers, kind=mask, seed=seed)
    stack: list[Bijection] = [AffineCoupling(dim, mask=part, **options) for part in kept]
    return build(stack, base, df, builder="realnvp", dim=dim, layers=layers, mask=mask, seed=seed, **options)


@of_vectors
@checks.options
def spline(
    dim: int,
    *,
    layers: int = 4,
    bins: int = 8,
    bound: float | None = None,
    context_dim: int = 0,
    hidden: Sequence[int] = (32, 32),
    activation: str = "silu",
    network: str = "mlp",
    mask: str = "mixed",
    log_scale_bound: float = 8.0,
    base: str = "normal",
    df: float = 15.0,
    seed: int = 0,
) -> Flow:
    r"""Neural spline flow: ``layers`` couplings by rational quadratic splines, each followed by an affine map.

    A coupling keeps :math:`x_K` and moves the others, :math:`y_M = e^{s} \odot g(x_M) + t`, where g, s and t depend on
    :math:`x_K`; see :class:`SplineCoupling`.

    For densities with sharp edges, gaps or several modes in few dimensions; bends one dimension too. A layer costs
    about three times one of :func:`realnvp`, and does the work of several. The inverse costs as much as the forward
    pass.

    Args:
        dim: number of coordinates.
        layers: number of couplings; an even number moves all coordinates equally often.
        bins: of each spline.
        bound: each spline bends (-bound, bound), in units of the base distribution; by default 3 with a normal base,
            5 with the wider ones: beyond, bins are wasted on the few far points.
        context_dim: width of the context.
        hidden: widths of the couplings' hidden layers.
        activation: their activation.
        network: ``"mlp"``, ``"robust"`` (of asinh(x), for data with far values) or ``"residual"`` (weight-normed
            blocks, one for each of ``hidden``).
        mask: ``"mixed"`` or ``"alternating"``, see :func:`masks.sequence`.
        log_scale_bound: smooth bound of one coupling's log scale, in nats.
        base: see :class:`Flow`.
        df: degrees of freedom of the Student-t base.
        seed: of mixed masks from the fifth coupling on.

    Raises:
        ValueError: for ``layers`` or ``dim`` below 1, a number of bins below 2 or above 500, an unknown base.

    Reference: Durkan, Bekasov, Murray and Papamakarios, *Neural Spline Flows*, NeurIPS 2019 (arXiv
    1906.04032).

    >>> import torch, pyro_flows as pf
    >>> pf.spline(1, layers=1).log_prob(torch.zeros(3, 1)).shape
    torch.Size([3])
    """
    options: Couplings = {
        "context_dim": context_dim, "hidden": hidden, "activation": activation, "network": network,
        "log_scale_bound": log_scale_bound,
    }  # fmt: skip
    bound = (3.0 if base == "normal" else 5.0) if bound is None else bound
    kept = masks.sequence(dim, layers, kind=mask, seed=seed)
    stack: list[Bijection] = [SplineCoupling(dim, mask=part, bins=bins, bound=bound, **options) for part in kept]
    more = {"bins": bins, "bound": bound}
    return build(stack, base, df, builder="spline", dim=dim, layers=layers, mask=mask, seed=seed, **options, **more)
