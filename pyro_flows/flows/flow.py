"""A flow: a bijection and a base distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, TransformedDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_flows.flows import bases
from pyro_flows.support import checks
from pyro_flows.transforms import Bijection, Bound, DiagonalAffine, LowerTriangularAffine, Planar, Rescale, SinhArcsinh
from pyro_flows.transforms.coupling import Coupling

AFFINE = (DiagonalAffine, LowerTriangularAffine)
ALONE = 4.0  # times larger gains where no affine map is trained with the flow
PIECE = 2**17  # numbers that are drawn together, so that what comes between fits a cache
WIDTH = 64  # numbers of a draw in a layer of a network, at least: tensors of a megabyte are mapped anew by each layer
MIXTURE = "mixture"  # the name of a base that is a mixture
BASES = ("logistic", "normal", "student_t", "uniform")


@checks.constructor
class Flow(nn.Module):
    r"""A base distribution pushed through a bijection: :math:`y = T(x)`, :math:`x \sim q_0`.

    ``flow()`` (or ``flow(context)``) is a Pyro ``TransformedDistribution`` with event shape ``(dim,)``, or (C, H, W)
    for a flow of images: a prior, a likelihood or a guide site. It is made anew by each call and costs nothing to make;
    sampling and then scoring the same draw costs one pass. Log densities are in nats.

    Args:
        bijection: the map T.
        dim: number of coordinates, or shape of an event of x; needed only if the bijection does not know it.
        base: ``"normal"``, ``"student_t"``, ``"logistic"`` (all with unit scale) or ``"uniform"`` on (-1, 1), each
            independent over coordinates; with the uniform base, draws fill the image of the cube and have density 0
            outside of it.
        df: degrees of freedom of the Student-t base.

    Raises:
        ValueError: for an unknown base (with a suggestion), a ``dim`` that is missing or does not fit the bijection, or
            a context of the wrong width.

    >>> import torch, pyro_flows as pf
    >>> flow = pf.realnvp(2, layers=4)
    >>> flow().event_shape, flow().sample((3,)).shape
    (torch.Size([2]), torch.Size([3, 2]))
    """

    _like: Tensor

    def __init__(
        self, bijection: Bijection, *, dim: int | Sequence[int] | None = None, base: str = "normal", df: float = 15.0
    ) -> None:
        super().__init__()
        if not isinstance(bijection, Bijection):
            raise ValueError(f"bijection: expected a Bijection, got a {type(bijection).__name__}.")
        self.bijection = bijection
        self.base_shape = _find_shape(bijection, dim)
        self.event_shape = torch.Size(bijection.forward_shape(self.base_shape))
        self.dim = math.prod(self.base_shape)
        self.base = checks.choice("base", base, BASES)
        self.df = checks.positive("df", df)
        self.mixture: Any = None  # a MixtureBase, DefendedBase or Ensemble in the place of the base, see `recipe`
        self.recipe: Any = None  # a Recipe, which builds flows and so stands above this file; builders write it
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    def __getstate__(self) -> dict[str, object]:
        for tensor in self.state_dict(keep_vars=True).values():
            tensor.__dict__.pop("unconstrained", None)  # Pyro's weak reference, which it sets anew at each run
        return self.__dict__.copy()

    @property
    def context_dim(self) -> int:
        """Width of the context, 0 for an unconditional flow."""
        return self.bijection.context_dim

    def slow(self) -> Flow:
        r"""Train by small steps: let a step of Adam move the flow about as far as an affine map. Returns the flow.

        Adam moves each of a network's weights by one step size, and hundreds of them move a point in the same
        direction. The noise of gradients of single draws then adds up, and far draws meet a map that nobody trained.
        So what each network returns is multiplied by a fixed gain, in a buffer: :math:`2 / K W` for K couplings whose
        networks end in W units, :math:`1 / K` for K planar maps, 0.1 for tails; knots of splines are slower by the
        width of what they bend. What each layer before a network's last one returns is multiplied by one over its
        width, since the weights after it grow as the gain is small. What triangular maps have below the diagonal is
        trained in units of the row's diagonal. The map stays as it is, at whatever parameters, and so does what it can
        become. A flow without an affine map, which has to come to its place and size by itself, gets four times the
        gains, at most 1. Training by large batches is faster without.

        >>> import torch, pyro_flows as pf
        >>> flow = pf.realnvp(2, layers=4, hidden=(8,)).slow()
        >>> flow.bijection.layers[0].conditioner.gain
        tensor(0.2500)
        """
        modules = [*self.bijection.modules()]
        alone = not any(isinstance(module, AFFINE) and not isinstance(module, Rescale) for module in modules)
        for kind in (Coupling, Planar, SinhArcsinh, LowerTriangularAffine):
            layers = [layer for layer in modules if isinstance(layer, kind)]
            for layer in layers:
                layer.slow(len(layers) / (ALONE if alone else 1.0))
        return self

    def base_distribution(self, context: Tensor | None = None) -> TorchDistribution:
        """Return :math:`q_0`, with event shape ``base_shape``, on the flow's device and of its dtype.

        Only a mixture may depend on the context; it then has the context's batch shape.
        """
        if self.mixture is not None:
            return self.mixture(context if self.mixture.context_dim else None)
        like = next(self.bijection.parameters(), self._like)
        zero, one = like.new_zeros(self.base_shape), like.new_ones(self.base_shape)
        if self.base == "normal":
            base = dist.Normal(zero, one, validate_args=False)
        elif self.base == "student_t":
            base = dist.StudentT(self.df * one, zero, one, validate_args=False)
        elif self.base == "logistic":
            base = bases.Logistic(zero, one, validate_args=False)
        else:
            base = dist.Uniform(-one, one, validate_args=False)
        return base.to_event(len(self.base_shape))

    def forward(self, context: Tensor | None = None) -> TransformedDistribution:
        """Return the distribution of the flow, with the batch shape of the context."""
        context = None if context is None else self._real("context", context)
        if context is None:
            return self._through(Bound(self.bijection))
        return TransformedDistribution(self.base_distribution(context), [Bound(self.bijection, context)])

    def _through(self, bound: Bound) -> TransformedDistribution:
        """Return the distribution of the flow without a context, its map done by ``bound``."""
        base = self.base_distribution()
        new: TransformedDistribution = TransformedDistribution.__new__(TransformedDistribution)
        new.base_dist, new.transforms = base, [bound]  # the shapes are known, and torch takes long to find them
        Distribution.__init__(new, base.batch_shape, self.event_shape)
        return new

    def rsample_and_log_prob(self, shape: Sequence[int] = (), context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw and score in one pass: ``(*shape, *batch, *event_shape)`` and ``(*shape, *batch)``, with gradients."""
        context = None if context is None else self._real("context", context)
        base = self.base_distribution(context)
        if context is not None:
            base = base.expand(context.shape[:-1])
        x = base.rsample(torch.Size(shape))
        y, ladj = self.bijection.forward_and_ladj(x, context)
        return y, base.log_prob(x) - ladj

    @torch.no_grad()
    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        r"""Return n draws, shaped (n, \*event_shape), and their log density (n,), without gradients."""
        base = self.base_distribution()
        found = []
        for x in base.sample(torch.Size((n,))).split(max(1, PIECE // max(self.dim, WIDTH))):
            y, ladj = self.bijection.forward_and_ladj(x)
            found.append((y, base.log_prob(x) - ladj))
        return found[0] if len(found) == 1 else (torch.cat([y for y, _ in found]), torch.cat([q for _, q in found]))

    def sample_with_score(
        self, shape: Sequence[int] = (), *, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Draw with a graph; return ``y``, ``log q(y)`` and the score :math:`\nabla_y \log q(y)` without one.

        This is what the path gradient needs, in one pass through the bijection. ``at`` gives base points
        ``(*shape, dim)`` to be used instead of draws of the base.

        Raises:
            ValueError: for the uniform base: its density has edges that move with the parameters, which a score cannot
                see.
        """
        if self.base in ("uniform", MIXTURE):
            raise ValueError(
                f"base: draws of the {self.base} base have no path gradient; take 'normal', 'student_t' or 'logistic'."
            )
        base = self.base_distribution()
        x = base.rsample(torch.Size(shape)) if at is None else self._real("at", at)
        with torch.no_grad():
            log_base, score = self._log_base(x), bases.score(self.base, x, self.df)
        y, ladj, score = self.bijection.forward_and_score(x, score)
        return y, log_base - ladj.detach(), score

    def log_prob(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Return ``log q(y)``, one inverse pass: what ``flow(context).log_prob(y)`` returns, without its detours.

        Raises:
            ValueError: for values outside of the support, NaN among them, unless Pyro's validation is switched off.
        """
        y, context = self._real("y", y), None if context is None else self._real("context", context)
        # a finite sum has no NaN in it, and any other number is real: one pass, where the check itself takes three
        support = self.bijection.codomain
        if Distribution._validate_args:
            real = getattr(support, "base_constraint", support) is constraints.real
            if not (real and bool(torch.isfinite(y.sum()))) and not bool(support.check(y).all()):
                inside = getattr(support, "base_constraint", support).check(y)
                got = f"{float(y[~inside][0]):g}" if inside.shape == y.shape else "others"
                raise ValueError(
                    f"y: expected values in the support of the flow, {support}, got {got}. Move them into it, or pass "
                    "levels= to fit_density if the values are quantized."
                )
        x, ladj = self.bijection.inverse_and_ladj(y, context)
        return self._log_base(x, context) + ladj

    def _real(self, name: str, value: Tensor) -> Tensor:
        """Whole numbers as numbers of the flow's dtype: products with its weights need one dtype."""
        return checks.floating(name, value, next(self.bijection.parameters(), self._like))

    def _log_base(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.base in ("uniform", MIXTURE):
            return self.base_distribution(context).log_prob(x)
        return bases.log_density(self.base, x, self.df).sum(tuple(range(-len(self.base_shape), 0)))


def _find_shape(bijection: Bijection, dim: int | Sequence[int] | None) -> torch.Size:
    """Return the shape of an event of x, from the bijection or from ``dim``."""
    known = bijection.event_shape
    if dim is None:
        if known is None:
            raise ValueError("dim: this bijection does not name its number of coordinates; pass dim=.")
        return known
    shape = checks.size("dim", dim)
    given = torch.Size((shape,) if isinstance(shape, int) else shape)
    if len(given) != bijection.event_dim or given != (known or given):
        expected = f"{bijection.event_dim} axes" if known is None else f"shape {tuple(known)}"
        raise ValueError(f"dim: expected an event of {expected}, as the bijection's, got {dim!r}.")
    return given
