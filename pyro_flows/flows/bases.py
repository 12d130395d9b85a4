"""Base distributions at location 0 and scale 1: log densities by coordinate, their derivatives, and finite draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyro_flows.flows.mixture_base import MixtureBase, MixtureOfStudents, OfParts, together
from pyro_flows.transforms import Bijection


def log_density(base: str, x: Tensor, df: float) -> Tensor:
    """Return the log density of each coordinate of ``x``: there is less to compute than in torch's distributions."""
    if base == "normal":
        return -0.5 * x.square() - 0.5 * math.log(2.0 * math.pi)
    if base == "logistic":
        return 2.0 * logsigmoid(x) - x
    if base != "student_t":
        raise ValueError(f"base: expected 'normal', 'logistic' or 'student_t', got {base!r}.")
    half = 0.5 * (df + 1.0)
    constant = math.lgamma(half) - math.lgamma(0.5 * df) - 0.5 * math.log(math.pi * df)
    return constant - half * torch.log1p(x.square() / df)


def score(base: str, x: Tensor, df: float) -> Tensor:
    """Return the derivative of the log density at each coordinate of ``x``."""
    if base == "normal":
        return -x
    if base == "logistic":
        return -torch.tanh(0.5 * x)
    return x * (-(df + 1.0)) / (x.square() + df)


def cdf(base: str, x: Tensor, df: float) -> Tensor:
    """Return the distribution function at each coordinate of ``x``."""
    if base == "normal":
        return torch.special.ndtr(x)
    if base == "logistic":
        return torch.sigmoid(x)
    if base == "uniform":
        return (0.5 * (x + 1.0)).clamp(0.0, 1.0)
    from scipy.special import stdtr

    return torch.as_tensor(stdtr(df, x.detach().cpu().double().numpy())).to(x)


def icdf(base: str, u: Tensor, df: float) -> Tensor:
    """Return quantiles for probabilities."""
    if base == "normal":
        return torch.special.ndtri(u)
    if base == "logistic":
        return torch.logit(u)
    if base == "uniform":
        return 2.0 * u - 1.0
    from scipy.special import stdtrit

    return torch.as_tensor(stdtrit(df, u.detach().cpu().double().numpy())).to(u)


class Logistic(dist.Logistic):
    """Pyro's logistic distribution, whose draws are finite: one of 16 million single-precision uniform draws is 0."""

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        u = self.loc.new_empty(shape).uniform_().clamp(min=0.25 * torch.finfo(self.loc.dtype).eps)
        found: Tensor = self.icdf(u)
        return found


# a base with a second mixture beside what a flow makes of the first ---------------------------------------------------


class DefendedBase(nn.Module):
    r"""Bijections T of a mixture q_0, conditional or not, and a mixture q_1 without a context:

    .. math:: q(u \mid c) = (1 - w)\, q_0(x \mid c) / |T'(x \mid c)| + w\, q_1(u), \qquad u = T(x \mid c)

    :math:`q \ge w q_1` in all contexts. So the density has a lower bound where the networks are wrong, as far from all
    contexts of their data. Without a context, parts of :math:`q_1` may be narrower than what can be trained well.
    :math:`q_1` is not trained: its tensors are buffers.

    Args:
        bijection: T, which rises if there is one coordinate.
        mixture: q_0.
        fixed: q_1.
        share: w.

    Shapes: u is (..., D), the context (..., context_dim), or None. Cost: that of T and of both mixtures.

    Reference: Hesterberg 1995, *Weighted average importance sampling and defensive mixture distributions*,
    doi:10.1080/00401706.1995.10484303.
    """

    share: Tensor

    def __init__(self, bijection: Bijection, mixture: MixtureBase, fixed: MixtureBase, share: float) -> None:
        super().__init__()
        self.bijection, self.mixture, self.fixed = bijection, mixture, fixed.frozen()
        self.context_dim = mixture.context_dim
        self.register_buffer("share", mixture.logits.new_tensor(share))

    def forward(self, context: Tensor | None = None) -> Defended:
        """Return the distribution, with the batch shape of the context."""
        return Defended(self, context, self.mixture(context), self.fixed())


class Defended(OfParts):
    """The distribution of a :class:`DefendedBase` in one context, or in each of a batch; event shape (D,)."""

    def __init__(
        self,
        base: DefendedBase,
        context: Tensor | None,
        moved: MixtureOfStudents,
        fixed: MixtureOfStudents,
        batch_shape: Sequence[int] | None = None,
    ) -> None:
        self.base, self.context, self.moved, self.fixed = base, context, moved, fixed
        batch = moved.batch_shape if batch_shape is None else torch.Size(batch_shape)
        super().__init__(batch, moved.event_shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> Defended:
        """Return independent copies."""
        return Defended(self.base, self.context, self.moved, self.fixed, batch_shape)

    def _in(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.base.bijection.inverse_and_ladj(*self._with_context(value))

    def _out(self, x: Tensor) -> Tensor:
        return self.base.bijection.forward_and_ladj(*self._with_context(x))[0]

    def _with_context(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        return (value, None) if self.context is None else together(value, self.context)

    def terms(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return both log densities, without their shares: what contexts move, and what they do not."""
        x, ladj = self._in(value)
        return self.moved.log_prob(x) + ladj, self.fixed.log_prob(value)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, of shape ``(*sample_shape, *batch_shape)``."""
        (moved, still), share = self.terms(value), self.base.share
        found = torch.logaddexp(moved + torch.log1p(-share), still + share.log())
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw ``(*sample_shape, *batch_shape, D)``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        moved = self._out(self.moved.expand(self.batch_shape).sample(sample_shape))
        chosen = torch.rand(shape, dtype=moved.dtype, device=moved.device) < self.base.share
        return torch.where(chosen[..., None], self.fixed.sample(shape), moved)

    # one coordinate ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def cdf(self, value: Tensor) -> Tensor:
        """Return the distribution function (...,) at points (..., 1) of one coordinate."""
        return torch.lerp(self.moved.cdf(self._in(value)[0]), self.fixed.cdf(value), self.base.share)

    @torch.no_grad()
    def around(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest quantile (..., 1) of all parts, for probabilities (...,)."""
        moved = (self._out(end) for end in self.moved.around(value))
        low, high = torch.stack(torch.broadcast_tensors(*moved, *self.fixed.around(value))).aminmax(dim=0)
        return low, high
