"""Guides by the name of their flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyro_flows import _checks
from pyro_flows.guides.autoflow import AutoFlow


@_checks.constructor
class AutoRealNVP(AutoFlow):
    r""":class:`AutoFlow` with :func:`~pyro_flows.realnvp`: affine couplings :math:`x_M \odot e^{s(x_K)} + t(x_K)`.

    The default choice.

    Args:
        model: a Pyro model.
        layers: number of couplings.
        hidden: widths of their hidden layers.
        options: as for :class:`AutoFlow` and :func:`~pyro_flows.realnvp`.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> guide = pf.AutoRealNVP(lambda: pyro.sample("x", dist.Beta(2.0, 2.0)), layers=2)
    >>> guide.initialize().median()["x"].shape
    torch.Size([])

    Cost of a step: one pass of the flow and one gradient of the model a draw. Errors: those of :class:`AutoFlow`.
    Source: Dinh, Sohl-Dickstein and Bengio 2017 (arXiv 1605.08803).
    """

    def __init__(
        self, model: Callable[..., Any], layers: int = 4, *, hidden: Sequence[int] = (32, 32), **options: Any
    ) -> None:
        super().__init__(model, "realnvp", layers=layers, hidden=hidden, **options)


@_checks.constructor
class AutoNICE(AutoFlow):
    """:class:`AutoFlow` with :func:`~pyro_flows.nice`: additive couplings :math:`x_M + t(x_K)`.

    It preserves volume up to a scale of the base.

    Args:
        model: a Pyro model.
        layers: number of couplings.
        hidden: widths of their hidden layers.
        options: as for :class:`AutoFlow` and :func:`~pyro_flows.nice`.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> guide = pf.AutoNICE(lambda: pyro.sample("x", dist.Beta(2.0, 2.0)), layers=2)
    >>> guide.initialize().median()["x"].shape
    torch.Size([])

    Cost of a step: one pass of the flow and one gradient of the model a draw. Errors: those of :class:`AutoFlow`.
    Source: Dinh, Krueger and Bengio 2014 (arXiv 1410.8516).
    """

    def __init__(
        self, model: Callable[..., Any], layers: int = 4, *, hidden: Sequence[int] = (32, 32), **options: Any
    ) -> None:
        super().__init__(model, "nice", layers=layers, hidden=hidden, **options)


@_checks.constructor
class AutoPlanar(AutoFlow):
    r""":class:`AutoFlow` with :func:`~pyro_flows.planar`: maps :math:`x + \hat u \tanh(w^\top x + b)`.

    For few dimensions and mild departures from a Gaussian.

    Args:
        model: a Pyro model.
        layers: number of planar maps.
        options: as for :class:`AutoFlow` and :func:`~pyro_flows.planar`.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> guide = pf.AutoPlanar(lambda: pyro.sample("x", dist.Beta(2.0, 2.0)), layers=2)
    >>> guide.initialize().median()["x"].shape
    torch.Size([])

    Cost of a step: one pass of the flow and one gradient of the model a draw. Errors: those of :class:`AutoFlow`.
    Source: Rezende and Mohamed 2015 (arXiv 1505.05770).
    """

    def __init__(self, model: Callable[..., Any], layers: int = 16, **options: Any) -> None:
        super().__init__(model, "planar", layers=layers, **options)
