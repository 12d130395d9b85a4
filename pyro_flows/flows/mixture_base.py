"""A mixture of Student t distributions as the base of a flow; all its parts may depend on a context."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_flows.support import checks
from pyro_flows.transforms.conditioners import bounded, conditioner
from pyro_flows.transforms.networks import State, adopt_context_scale, seen_of

NO_GRADIENT = (
    "rsample: draws of a mixture have no gradient in its parameters; take sample(), or a flow of another base, such as "
    "pf.spline(dim, base='normal')."
)
LOG_BOUND = 5.0  # of what a context multiplies scales and degrees of freedom by, as a logarithm
DF_LEAST = 1.0  # degrees of freedom are above it, so that there is a mean
DF, DF_A_DIM = 10.0, 10.0  # degrees of freedom at the start: nearly normal, whatever the number of coordinates
EVALUATIONS, NARROWED = 60, 2.0**-40  # of a distribution function for a quantile, and the share of an interval to reach


class MixtureBase(nn.Module):
    r"""A mixture of K multivariate Student t distributions: weights, places, scales and tails may depend on a context.

    .. math:: q_0(x \mid c) = \sum_k w_k(c)\, t_{\nu_k(c)}(z_k)\, |P_k| / |S_k(c)|, \qquad
              z_k = S_k(c)^{-1} P_k (x - m_k) - u_k(c)

    :math:`P_k` is lower triangular. Without a context, S = I and u = 0. With one, a network gives what is added to the
    logits of the weights, to the shifts u, and to the logs of the diagonal scales S and of the degrees of freedom.

    Args:
        dim: number of coordinates D.
        components: number of parts K.
        context_dim: width of the context; 0: none.
        hidden: widths of the network's hidden layers.

    Shapes: x is (..., D), the context (..., context_dim). Cost: :math:`O(K D^2)` a point.

    Reference: Bishop 1994, *Mixture density networks*; Peel and McLachlan 2000, doi:10.1023/A:1008981510081.
    """

    context_scale: Tensor | None
    context_knots: Tensor | None

    def __init__(self, dim: int, components: int, *, context_dim: int = 0, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        self.dim = checks.integer("dim", dim, 1)
        self.components = checks.integer("components", components, 1)
        self.context_dim = context_dim
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.zeros(components, dim))
        self.log_diagonal = nn.Parameter(torch.zeros(components, dim))
        self.below = nn.Parameter(torch.zeros(components, dim, dim))
        self.log_df = nn.Parameter(torch.full((components,), math.log(DF + DF_A_DIM * dim - DF_LEAST)))
        self._sizes = [components, components * dim, components * dim, components]
        out = sum(self._sizes)
        self.conditioner = conditioner(0, context_dim, out, hidden=hidden) if context_dim else None
        self.register_buffer("context_scale", None)
        self.register_buffer("context_knots", None)

    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: object, **kwargs: object) -> None:
        adopt_context_scale(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @torch.no_grad()
    def assign(self, log_weights: Tensor, loc: Tensor, factor: Tensor) -> MixtureBase:
        """Set weights (K,), means (K, D), and factors P (K, D, D) of precisions P'P. Returns the mixture."""
        df = DF_LEAST + self.log_df.exp()[:, None]
        self.logits.copy_(log_weights)
        self.loc.copy_(loc)
        scale = (df / (df - 2.0)).sqrt()
        self.log_diagonal.copy_((factor.diagonal(dim1=-2, dim2=-1) * scale).log())
        self.below.copy_(factor.tril(-1) * scale[..., None])
        return self

    def frozen(self) -> MixtureBase:
        """Let the tensors be buffers, so that no optimizer trains them and ``pyro.module`` says nothing of them."""
        for module in self.modules():
            for name, value in [*module.named_parameters(recurse=False)]:
                delattr(module, name)
                module.register_buffer(name, value.detach())
        return self

    def forward(self, context: Tensor | None = None) -> MixtureOfStudents:
        """Return the distribution, with the batch shape of the context."""
        checks.context("MixtureBase", context, self.context_dim)
        factor = self.below.tril(-1) + torch.diag_embed(self.log_diagonal.exp())
        if self.conditioner is None:
            return MixtureOfStudents(Parts(self.logits.log_softmax(-1), self.loc, factor, DF_LEAST + self.log_df.exp()))
        seen = seen_of(context, self.context_scale, self.context_knots)
        logits, shift, log_scale, log_df = self.conditioner(None, seen.bent).split(self._sizes, -1)
        shift, log_scale = (part.unflatten(-1, (self.components, self.dim)) for part in (shift, log_scale))
        df = DF_LEAST + torch.exp(self.log_df + bounded(log_df, LOG_BOUND))
        log_weights = (self.logits + logits).log_softmax(-1)
        return MixtureOfStudents(Parts(log_weights, self.loc, factor, df, shift, bounded(log_scale, LOG_BOUND)))


def by_part(x: Tensor, loc: Tensor, factor: Tensor) -> Tensor:
    """Return P (x - m) (..., K, D) of points (..., D), for means (K, D) and factors (K, D, D): one matrix product."""
    found = (x @ factor.reshape(loc.numel(), loc.shape[1]).mT).unflatten(-1, loc.shape)
    return found - (factor @ loc[..., None])[..., 0]


def inverted(cdf: Callable[[Tensor], Tensor], value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return where a distribution function of one coordinate has values (...,), between low and high (..., 1).

    A parabola in the values of three points gives the next point where that is safe, else the interval is halved.

    Reference: Chandrupatla 1997, *A new hybrid quadratic/bisection algorithm for finding the zero of a nonlinear
    function without using derivatives*, doi:10.1016/S0965-9978(96)00051-8.
    """
    newest, other = low[..., 0], high[..., 0]
    eps, close = 4.0 * torch.finfo(newest.dtype).eps, NARROWED * (other - newest)
    off, off_other = (cdf(low) - value).clamp_max(-eps * eps), (cdf(high) - value).clamp_min(eps * eps)
    share = torch.full_like(newest, 0.5)
    for _ in range(EVALUATIONS):
        x = torch.lerp(newest, other, share)
        found = cdf(x[..., None]) - value
        same = (found > 0.0) == (off > 0.0)
        last, off_last = torch.where(same, newest, other), torch.where(same, off, off_other)
        other, off_other = torch.where(same, other, newest), torch.where(same, off_other, off)
        newest, off = x, found
        least = ((eps * x.abs() + close) / (other - newest).abs()).nan_to_num(1.0, 1.0)
        if bool(((least >= 0.5) | (off.abs() <= eps * value)).all()):
            break
        place, height = (newest - other) / (last - other), (off - off_other) / (off_last - off_other)
        safe = (height.square() < place) & ((1.0 - height).square() < 1.0 - place)
        curved = off / (off_other - off) * off_last / (off_other - off_last)
        curved = curved + (last - newest) / (other - newest) * off / (off_last - off) * off_other / (
            off_last - off_other
        )
        share = torch.where(safe, curved, 0.5)
        share = torch.where(least < 0.5, torch.maximum(torch.minimum(share, 1.0 - least), least), 0.5)
    return torch.where(off_other.abs() < off.abs(), other, newest)[..., None]


class Parts(NamedTuple):
    """The parts of a mixture in one context, or in each of a batch."""

    log_weights: Tensor  # (*batch, K)
    loc: Tensor  # (K, D)
    factor: Tensor  # (K, D, D)
    df: Tensor  # (*batch, K)
    shift: Tensor | None = None  # (*batch, K, D)
    log_scale: Tensor | None = None  # (*batch, K, D)


def together(value: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Give points (..., D) and contexts (..., H) one shape, but for the last axis."""
    shape = torch.broadcast_shapes(value.shape[:-1], context.shape[:-1])
    return value.expand(*shape, -1), context.expand(*shape, -1)


class OfParts(TorchDistribution):
    """A distribution of vectors of which each draw comes from one of several parts."""

    arg_constraints = {}  # noqa: RUF012
    has_rsample = False

    @property
    def support(self) -> constraints.Constraint:
        """All vectors."""
        return constraints.real_vector

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Refuse: the choice of a part has no gradient."""
        raise NotImplementedError(NO_GRADIENT)

    def around(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest quantile (..., 1) of the parts, for probabilities (...,)."""
        raise NotImplementedError

    @torch.no_grad()
    def icdf(self, value: Tensor) -> Tensor:
        """Return quantiles (..., 1) of one coordinate, for probabilities (...,), by a search in an interval."""
        return inverted(self.cdf, value, *self.around(value))


class MixtureOfStudents(OfParts):
    """The distribution of a :class:`MixtureBase` in one context, or in each of a batch; event shape (D,).

    Draws have no gradient in the parameters, since the choice of a part has none.
    """

    def __init__(self, parts: Parts, batch_shape: Sequence[int] | None = None) -> None:
        self.parts = parts
        batch = parts.log_weights.shape[:-1] if batch_shape is None else torch.Size(batch_shape)
        super().__init__(batch, parts.loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> MixtureOfStudents:
        """Return independent copies."""
        return MixtureOfStudents(self.parts, batch_shape)

    @property
    def mean(self) -> Tensor:
        """The mean, of shape ``(*batch_shape, D)``."""
        found = (self.parts.log_weights.exp()[..., None] * self._out(torch.zeros_like(self.parts.loc))).sum(-2)
        return found.expand(*self.batch_shape, -1)

    def _in(self, x: Tensor) -> Tensor:
        """Return what part k makes of points x (..., D): z (..., K, D)."""
        parts = self.parts
        found = by_part(x, parts.loc, parts.factor)
        if parts.log_scale is None or parts.shift is None:
            return found
        return torch.exp(-parts.log_scale) * found - parts.shift

    def _out(self, z: Tensor) -> Tensor:
        """Return the points x of z (..., K, D), each under its own part."""
        parts = self.parts
        if parts.log_scale is not None and parts.shift is not None:
            z = (z + parts.shift) * parts.log_scale.exp()
        return parts.loc + torch.linalg.solve_triangular(parts.factor, z[..., None], upper=False)[..., 0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, of shape ``(*sample_shape, *batch_shape)``."""
        parts, dim = self.parts, self.parts.loc.shape[-1]
        log_weights = parts.log_weights + parts.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if parts.log_scale is not None:
            log_weights = log_weights - parts.log_scale.sum(-1)
        half = 0.5 * (parts.df + dim)
        constant = torch.lgamma(half) - torch.lgamma(0.5 * parts.df) - 0.5 * dim * torch.log(math.pi * parts.df)
        terms = constant - half * torch.log1p(self._in(value).square().sum(-1) / parts.df)
        found = torch.logsumexp(log_weights + terms, -1)
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw ``(*sample_shape, *batch_shape, D)``."""
        parts, shape = self.parts, torch.Size(sample_shape) + self.batch_shape
        weights = parts.log_weights.exp().expand(*shape, -1)
        chosen = torch.multinomial(weights.reshape(-1, weights.shape[-1]), 1)[:, 0].reshape(shape)
        df = parts.df.expand(*shape, -1).gather(-1, chosen[..., None])
        z = torch.randn(*shape, self.event_shape[0], dtype=df.dtype, device=df.device)
        z = z * (0.5 * df / torch._standard_gamma(0.5 * df)).sqrt()
        if parts.log_scale is not None and parts.shift is not None:
            own = chosen[..., None, None].expand(*shape, 1, z.shape[-1])
            shift, log_scale = (
                of.expand(*shape, *of.shape[-2:]).gather(-2, own)[..., 0, :] for of in (parts.shift, parts.log_scale)
            )
            z = (z + shift) * log_scale.exp()
        return (
            parts.loc[chosen] + torch.linalg.solve_triangular(parts.factor[chosen], z[..., None], upper=False)[..., 0]
        )

    # one coordinate ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def cdf(self, value: Tensor) -> Tensor:
        """Return the distribution function (...,) at points (..., 1) of one coordinate."""
        return (self.parts.log_weights.exp() * self._of_students("stdtr", self._in(value)[..., 0])).sum(-1)

    @torch.no_grad()
    def around(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest quantile (..., 1) of the parts, for probabilities (...,)."""
        z = self._of_students("stdtrit", value[..., None].expand(*value.shape, len(self.parts.loc)))
        low, high = self._out(z[..., None])[..., 0].aminmax(dim=-1, keepdim=True)
        return low, high

    def _of_students(self, name: str, value: Tensor) -> Tensor:
        """Return a function of Student t distributions, of degrees of freedom and values, by its name in scipy."""
        from scipy import special

        df = self.parts.df.expand(value.shape)
        return torch.as_tensor(getattr(special, name)(*(part.double().cpu().numpy() for part in (df, value)))).to(value)
