"""A flow: a bijection and a base distribution, and builders for the usual stacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, TransformedDistribution
from torch import Tensor, nn

from pyro_flows import _checks
from pyro_flows.transforms import (
    AdditiveCoupling,
    AffineCoupling,
    Bijection,
    Bound,
    Chain,
    Planar,
    Rescale,
    masks,
)

BASES = ("logistic", "normal", "student_t", "uniform")


class Flow(nn.Module):
    r"""A base distribution pushed through a bijection: :math:`y = T(x)`, :math:`x \sim q_0`.

    ``flow()`` (or ``flow(context)``) is a Pyro ``TransformedDistribution`` with event shape ``(dim,)``: a prior, a
    likelihood or a guide site. It is made anew by each call and costs nothing to make; sampling and then scoring the
    same draw costs one pass.

    Args:
        bijection: the map T, with ``event_dim`` 1.
        dim: number of coordinates; needed only if the bijection does not know it.
        base: ``"normal"``, ``"student_t"``, ``"logistic"`` (all with unit scale) or ``"uniform"`` on (-1, 1), each
            independent over coordinates; with the uniform base, draws fill the image of the cube and have density 0
            outside of it.
        df: degrees of freedom of the Student-t base.

    Raises:
        ValueError: for an unknown base (with a suggestion), or a context of the wrong width.

    >>> import torch, pyro_flows as pf
    >>> flow = pf.realnvp(2, layers=4)
    >>> flow().event_shape, flow().sample((3,)).shape
    (torch.Size([2]), torch.Size([3, 2]))
    """

    _like: Tensor

    def __init__(self, bijection: Bijection, *, dim: int | None = None, base: str = "normal", df: float = 15.0) -> None:
        super().__init__()
        if not isinstance(bijection, Bijection):
            raise ValueError(f"bijection: expected a Bijection, got a {type(bijection).__name__}.")
        if bijection.event_dim != 1:
            raise ValueError(f"bijection: expected event_dim 1, got {bijection.event_dim}.")
        self.bijection = bijection
        self.dim = _find_dim(bijection) if dim is None else _checks.integer("dim", dim, 1)
        self.base = _checks.choice("base", base, BASES)
        self.df = _checks.positive("df", df)
        self.settings: dict[str, Any] | None = None
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    @property
    def context_dim(self) -> int:
        """Width of the context, 0 for an unconditional flow."""
        return self.bijection.context_dim

    def base_distribution(self) -> TorchDistribution:
        """Return :math:`q_0`, with event shape ``(dim,)``, on the flow's device and of its dtype."""
        like = next(self.bijection.parameters(), self._like)
        zero, one = like.new_zeros(self.dim), like.new_ones(self.dim)
        if self.base == "normal":
            base = dist.Normal(zero, one, validate_args=False)
        elif self.base == "student_t":
            base = dist.StudentT(self.df * one, zero, one, validate_args=False)
        elif self.base == "logistic":
            base = dist.Logistic(zero, one, validate_args=False)
        else:
            base = dist.Uniform(-one, one, validate_args=False)
        return base.to_event(1)

    def forward(self, context: Tensor | None = None) -> TransformedDistribution:
        """Return the distribution of the flow, with the batch shape of the context."""
        return TransformedDistribution(self.base_distribution(), [Bound(self.bijection, context)])

    def rsample_and_log_prob(self, shape: Sequence[int] = (), context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw and score in one pass: ``(*shape, *batch, dim)`` and ``(*shape, *batch)``, with gradients."""
        base = self.base_distribution()
        if context is not None:
            base = base.expand(context.shape[:-1])
        x = base.rsample(torch.Size(shape))
        y, ladj = self.bijection.forward_and_ladj(x, context)
        return y, base.log_prob(x) - ladj

    def sample_with_score(
        self, shape: Sequence[int] = (), *, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Draw with a graph; return ``y``, ``log q(y)`` and the score :math:`\nabla_y \log q(y)` without one.

        This is what the path gradient needs, in one pass through the bijection. ``at`` gives base points
        ``(*shape, dim)`` to be used instead of draws of the base. The uniform base is refused: its density has edges
        that move with the parameters, which a score cannot see.
        """
        if self.base == "uniform":
            raise ValueError(
                "base: the uniform base has no score at its edges; take 'normal', 'student_t' or 'logistic'."
            )
        base = self.base_distribution()
        x = base.rsample(torch.Size(shape)) if at is None else at
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            log_base = base.log_prob(leaf)
            (score,) = torch.autograd.grad(log_base.sum(), leaf)
        y, ladj, score = self.bijection.forward_and_score(x, score)
        return y, log_base.detach() - ladj.detach(), score

    def log_prob(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Return ``log q(y)``, one inverse pass."""
        return self(context).log_prob(y)


def _find_dim(bijection: Bijection) -> int:
    for module in bijection.modules():
        if isinstance(getattr(module, "dim", None), int):
            return int(module.dim)  # type: ignore[arg-type]
    raise ValueError("dim: this bijection does not name its number of coordinates; pass dim=.")


def _finish(stack: list[Bijection], base: str, df: float, **settings: Any) -> Flow:
    flow = Flow(Chain(stack), base=base, df=df)
    flow.settings = {**settings, "base": base, "df": df}
    return flow


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

    For low dimensions and mild departures from a Gaussian; the only one of the builders that bends one dimension. The
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

    Reference: Rezende and Mohamed 2015.

    >>> import pyro_flows as pf
    >>> sum(p.numel() for p in pf.planar(2, layers=8).parameters())
    40
    """
    _checks.integer("layers", layers, 1)
    options: dict[str, Any] = {"context_dim": context_dim, "hidden": hidden, "activation": activation}
    stack: list[Bijection] = [Planar(dim, **options) for _ in range(layers)]
    return _finish(stack, base, df, builder="planar", dim=dim, layers=layers, **options)


def nice(
    dim: int,
    *,
    layers: int = 4,
    context_dim: int = 0,
    hidden: Sequence[int] = (32, 32),
    activation: str = "silu",
    base: str = "normal",
    df: float = 15.0,
    seed: int = 0,
) -> Flow:
    r"""NICE: ``layers`` additive couplings and a diagonal :math:`e^{s}` at the end.

    Volume-preserving up to its last scale: fast and stable, but it cannot widen one region and narrow another.
    The inverse costs as much as the forward pass.

    Args:
        dim: number of coordinates.
        layers: number of couplings; 2 at least to move every coordinate (1 does if ``dim`` is 1).
        context_dim: width of the context.
        hidden: widths of the couplings' hidden layers.
        activation: their activation.
        base: see :class:`Flow`.
        df: degrees of freedom of the Student-t base.
        seed: of the masks from the fifth coupling on.

    Raises:
        ValueError: for ``layers`` or ``dim`` below 1, an unknown base.

    Reference: Dinh, Krueger and Bengio 2015.

    >>> import torch, pyro_flows as pf
    >>> pf.nice(3, layers=4).rsample_and_log_prob((5,))[1].shape
    torch.Size([5])
    """
    options: dict[str, Any] = {"context_dim": context_dim, "hidden": hidden, "activation": activation}
    stack: list[Bijection] = [
        AdditiveCoupling(dim, mask=mask, **options) for mask in masks.sequence(dim, layers, seed=seed)
    ]
    stack.append(Rescale(dim, **options))
    return _finish(stack, base, df, builder="nice", dim=dim, layers=layers, seed=seed, **options)


def realnvp(
    dim: int,
    *,
    layers: int = 8,
    context_dim: int = 0,
    hidden: Sequence[int] = (32, 32),
    activation: str = "silu",
    log_scale_bound: float = 8.0,
    base: str = "normal",
    df: float = 15.0,
    seed: int = 0,
) -> Flow:
    r"""Real-NVP: ``layers`` affine couplings with alternating masks. The default choice.

    The inverse costs as much as the forward pass. In one dimension a coupling has nothing to condition on and the flow
    is affine: take :func:`planar` there.

    Args:
        dim: number of coordinates.
        layers: number of couplings; an even number moves all coordinates equally often.
        context_dim: width of the context.
        hidden: widths of the couplings' hidden layers.
        activation: their activation.
        log_scale_bound: smooth bound of one coupling's log scale, in nats.
        base: see :class:`Flow`.
        df: degrees of freedom of the Student-t base.
        seed: of the masks from the fifth coupling on.

    Raises:
        ValueError: for ``layers`` or ``dim`` below 1, an unknown base.

    Reference: Dinh, Sohl-Dickstein and Bengio 2017.

    >>> import torch, pyro_flows as pf
    >>> pf.realnvp(3, context_dim=2)(torch.zeros(7, 2)).batch_shape
    torch.Size([7])
    """
    options: dict[str, Any] = {"context_dim": context_dim, "hidden": hidden, "activation": activation}
    options["log_scale_bound"] = log_scale_bound
    stack: list[Bijection] = [
        AffineCoupling(dim, mask=mask, **options) for mask in masks.sequence(dim, layers, seed=seed)
    ]
    return _finish(stack, base, df, builder="realnvp", dim=dim, layers=layers, seed=seed, **options)


BUILDERS: dict[str, Callable[..., Flow]] = {"nice": nice, "planar": planar, "realnvp": realnvp}
