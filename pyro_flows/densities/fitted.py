"""A fitted density: the flow, how it was trained, how good it is; sampling, scoring, figures and files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_flows.densities import files
from pyro_flows.densities.encoding import Encoding
from pyro_flows.densities.points import CHUNK, Levels, Source, like, points_for
from pyro_flows.flows import bases
from pyro_flows.flows.flow import PIECE, Flow
from pyro_flows.flows.signals import at_length
from pyro_flows.posterior import plots
from pyro_flows.posterior.plots.densities import COLUMNS
from pyro_flows.support import checks
from pyro_flows.support.arguments import numbers
from pyro_flows.support.process.seeding import derive, seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@checks.methods
@dataclass(frozen=True)
class DensityFit:
    r"""A density fitted to data: the flow, how it was trained, and how good it is on points that it did not see.

    Attributes:
        flow: the trained flow, with the affine map to the scale of the data as its last layer.
        losses: negative mean log density of each minibatch, in nats; of the first of five flows.
        checks: ``(count, 2)``: steps done and mean log density of held-out points, of the averaged weights; of the
            first of five flows.
        validation: mean log density of all held-out points, in nats, under the flow that did not see them; NaN if there
            were none.
        levels: how the data are quantized, if they are.
        settings: what :func:`fit_density` was asked for and what it chose.
        why: what ended the training, in a sentence; of the first of five flows, or of one that was interrupted.
        encoding: how a context with categories or missing values becomes the numbers that the flow takes.

    Its density is that of the data as given, :math:`\log q(x) = \log q_0(f^{-1}(x)) - \log|J|`, in nats; after a fit
    with ``noise=``, of the data with that noise. Cost: a pass of the flow for each point that is drawn or scored.

    >>> import torch, pyro_flows as pf
    >>> data = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    >>> found = pf.fit_density(pf.realnvp(2, layers=2), data, max_epochs=1, learning_rate=0.01, progress=False)
    >>> found.sample(3).shape, found.log_prob(data).shape
    (torch.Size([3, 2]), torch.Size([200]))
    """

    flow: Flow
    losses: Tensor
    checks: Tensor
    validation: float
    levels: Levels | None
    settings: dict[str, Any] = field(repr=False)
    why: str
    encoding: Encoding | None = None

    @torch.no_grad()
    def log_prob(self, y: object, context: object = None) -> Tensor:
        """Return ``log q(y)`` for points ``(N, ...)``, in nats, ``(N,)``; with levels, of points in the unit cube.

        Raises:
            ValueError: for points of another shape, or values that are missing.
        """
        given = points_for(self.flow, "data", y, self._encoded(context))
        return torch.cat([self.flow.log_prob(batch, about) for batch, about in given.ordered(CHUNK)])

    @torch.no_grad()
    def sample(
        self, count: int, context: object = None, *, temperature: float = 1.0, seed: int | None = None
    ) -> Tensor:
        """Draw ``count`` points, ``(count, ...)``; with a context, one for each of its ``count`` rows.

        With a ``temperature`` other than 1, the base's draws are multiplied by it. Below 1, images look more regular
        and differ less; they are no draws of the density any more (Kingma and Dhariwal 2018).

        Raises:
            ValueError: for a count below 1, a temperature that is not positive, or a context that does not fit.
        """
        checks.positive("temperature", temperature)
        about = self._encoded(context)
        about = None if about is None else numbers("context", about).to(like(self.flow))
        if about is not None and about.dim() == self.flow.context_dim == 1:
            about = about[:, None]  # a number for each point, as the fit takes it
        checks.context("sample", about, self.flow.context_dim)
        if about is not None:
            if not about.dim() or about.shape[:-1] not in ((), (1,), (count,)):
                raise ValueError(f"context: expected one row or {count} rows, got shape {tuple(about.shape)}.")
            about = about.expand(count, -1)
        if temperature != 1.0 and self.flow.mixture is not None:
            raise ValueError("temperature: a mixture as base has no temperature; pass a flow of another base.")
        with nullcontext() if seed is None else seeded(seed, like(self.flow).device):
            return self._sampled(count, about, temperature)

    def _sampled(self, count: int, about: Tensor | None, temperature: float = 1.0) -> Tensor:
        base = self.flow.base_distribution(about)
        x = base.sample(torch.Size() if base.batch_shape else torch.Size((count,)))
        return self.flow.bijection.forward_and_ladj(temperature * x, about)[0]

    @property
    def noise(self) -> float:
        """The standard deviation of the normal noise that the data were given, 0 without."""
        return float(self.settings.get("noise") or 0.0)

    @torch.no_grad()
    def denoise(self, y: object, context: object = None) -> Tensor:
        r"""Return the mean of the data given noisy points, :math:`y + \sigma^2 \nabla_y \log q(y)`, ``(N, ...)``.

        This is Tweedie's formula for a density that was fitted with ``noise=`` :math:`\sigma`:
        ``fit.denoise(fit.sample(64))`` are images without noise. They are no draws of the density any more.

        Cost: a pass of the flow and its gradient.

        Raises:
            ValueError: for a density without noise, points of another shape, or values that are missing.

        Reference: Efron 2011, *Tweedie's formula and selection bias*, doi:10.1198/jasa.2011.tm11181; Zhai et al. 2024
        (arXiv 2412.06329).
        """
        if not self.noise:
            raise ValueError("denoise: this density was fitted without noise; pass noise= to fit_density.")
        found = []
        given = points_for(self.flow, "data", y, self._encoded(context))
        for points, about in given.ordered(max(1, PIECE // self.flow.dim)):
            with torch.enable_grad():
                leaf = points.requires_grad_()
                (score,) = torch.autograd.grad(self.flow.log_prob(leaf, about).sum(), leaf)
            found.append(leaf.detach() + self.noise**2 * score)
        return torch.cat(found)

    def at_length(self, length: int) -> DensityFit:
        """Return the same density for signals of another length T, of whole frames; the weights are the same.

        Raises:
            ValueError: for a flow of another kind than :func:`pyro_flows.waveglow`, or a length that does not divide.
        """
        return replace(self, flow=at_length(self.flow, length))

    @torch.no_grad()
    def quantiles(self, levels: object, context: object = None, *, draws: int = 1000, seed: int = 0) -> Tensor:
        """Return quantiles of each coordinate, (N, levels, D), one row for each context; (levels, D) without a context.

        Of one coordinate they are exact, :math:`f(F_0^{-1}(p))`, and never cross. Of several, they are those of
        ``draws`` draws from each row's density, with the Monte Carlo error of these. After a fit with ``levels=``, they
        are of points in the unit cube, as draws are.

        Raises:
            ValueError: for levels that are no numbers between 0 and 1, or a context that does not fit.
        """
        u = numbers("levels", levels).reshape(-1).to(like(self.flow))
        if not len(u) or not bool(((u > 0.0) & (u < 1.0)).all()):
            raise ValueError(f"levels: expected numbers between 0 and 1, got {u.tolist()}.")
        about = self._contexts(context)
        if self.flow.event_shape == (1,):
            found = torch.cat([self._inverted(u, rows) for rows in about.split(CHUNK // len(u) + 1)])
        else:
            found = torch.cat([torch.quantile(y, u, 0).movedim(0, 1) for y in self._drawn(about, draws, seed)])
        return found[0] if context is None else found

    @torch.no_grad()
    def pit(self, y: object, context: object = None, *, draws: int = 500, seed: int = 0) -> Tensor:
        r"""Return probability integral transforms :math:`F(y_d \mid c)` of each coordinate, (N, D).

        They are uniform on (0, 1) if the density is calibrated. Of several coordinates, each is the share of ``draws``
        draws from the row's density that are smaller. Rows are given as to :func:`fit_density`; with ``levels=`` or
        ``noise=``, they get the noise of the fit first.

        Reference: Gneiting, Balabdaoui and Raftery 2007, doi:10.1111/j.1467-9868.2007.00587.x.
        """
        given = self._as_fitted(y, context)
        with seeded(derive(seed, "pit"), like(self.flow).device):
            if self.flow.event_shape == (1,):
                return torch.cat([self._placed(*batch) for batch in given.ordered(CHUNK)])
            values = torch.cat([batch for batch, _ in given.ordered(CHUNK)])
        drawn = self._drawn(self._contexts(context).expand(len(values), -1), draws, seed)
        pairs = zip(drawn, values.split(rows_at_once(draws)), strict=True)
        return torch.cat([((y < own).double().sum(0) + 0.5) / (draws + 1.0) for y, own in pairs])

    def _as_fitted(self, data: object, context: object) -> Source:
        """Return data given as to :func:`fit_density`, with the noise that these had."""
        given = points_for(self.flow, "data", data, self._encoded(context))
        given = given if self.levels is None else given.quantized(self.levels.count, self.levels.step)
        return replace(given, noise=self.noise)

    def _contexts(self, context: object) -> Tensor:
        """Return rows of contexts as numbers, one row without any if there are none."""
        if context is None:
            checks.context("context", None, self.flow.context_dim)
        found = like(self.flow).new_zeros(1, 0) if context is None else numbers("context", self._encoded(context))
        found = found[:, None] if found.dim() == 1 else found
        if found.dim() != 2 or found.shape[1] != self.flow.context_dim:
            raise ValueError(
                f"context: expected rows of {self.flow.context_dim} numbers, got shape {tuple(found.shape)}."
            )
        return found.to(like(self.flow))

    def _drawn(self, about: Tensor, draws: int, seed: int) -> Iterator[Tensor]:
        """Return draws (draws, rows, D) for contexts, some rows at a time."""
        for number, rows in enumerate(about.split(rows_at_once(draws))):
            repeated = rows.repeat(draws, 1) if rows.shape[1] else None
            with seeded(derive(seed, f"draws {number}"), rows.device):
                y = self._sampled(draws * len(rows), repeated)
            yield y.unflatten(0, (draws, len(rows)))

    def _rising(self, about: Tensor | None, count: int) -> Tensor:
        """Return where one coordinate rises with the base's (count, 1)."""
        ends = like(self.flow).new_tensor([[-1.0], [1.0]])
        low, high = (self.flow.bijection.forward_and_ladj(end.expand(count, 1), about)[0] for end in ends)
        return high > low

    def _inverted(self, u: Tensor, rows: Tensor) -> Tensor:
        about = rows if rows.shape[1] else None
        u = torch.where(self._rising(about, len(rows)), u, 1.0 - u)
        about, flow = None if about is None else about[:, None], self.flow
        if flow.mixture is not None:
            x = flow.base_distribution(about).icdf(u)
        else:
            x = bases.icdf(flow.base, u, flow.df)[..., None]
        return flow.bijection.forward_and_ladj(x, about)[0]

    def _placed(self, y: Tensor, about: Tensor | None) -> Tensor:
        flow = self.flow
        x = flow.bijection.inverse_and_ladj(y, about)[0]
        if flow.mixture is not None:
            u = flow.base_distribution(about).cdf(x)[..., None]
        else:
            u = bases.cdf(flow.base, x, flow.df)
        return torch.where(self._rising(about, len(y)), u, 1.0 - u)

    def encode(self, context: object) -> Tensor:
        """Return the numbers (N, context_dim) that the flow takes for rows of the context: ``flow(encode(rows))``."""
        return self._contexts(context)

    def _encoded(self, context: object) -> object:
        return context if context is None or self.encoding is None else self.encoding.encode(context)

    def nats(self, data: object, context: object = None, *, seed: int = 0) -> float:
        """Return the mean log density of data given as to :func:`fit_density`; they get the noise of the fit first."""
        given = self._as_fitted(data, context)
        with seeded(derive(seed, "nats"), like(self.flow).device):
            return mean_log_prob(self.flow, given)

    def bits_per_dim(self, data: object, context: object = None, *, seed: int = 0) -> float:
        r"""Return bits a dimension, :math:`(\log L - \text{nats} / D) / \log 2` for L levels; smaller is better.

        For quantized data it is an upper bound on the bits that a code by this model needs. Without levels, L is 1.
        With ``noise=``, it is of the noisy data, and no bound on a code of the data themselves.
        """
        return bits_per_dim(self.nats(data, context, seed=seed), self.flow, self.levels)

    def summary(self) -> str:
        """Say in a few lines what was fitted, how long it took and how good it is."""
        about, last = self.settings, float(self.losses[-1]) if len(self.losses) else math.nan
        bits = bits_per_dim(self.validation, self.flow, self.levels)
        seen = f"with noise of {self.noise:g}" if self.noise else f"{bits:.4f} bits/dim"
        several = f"the mean of {about['flows']} densities, the first of them: " if "flows" in about else ""
        lines = [
            f"{several}{about['flow']} on {about['points']} points of shape {tuple(about['event_shape'])}, "
            f"preprocess {about['preprocess']!r}",
            f"{about['steps']} steps of {about['batch']} in {about['seconds']:.1f} s{' for all' if several else ''}, "
            f"step size {about['learning_rate']:g}: {self.why}",
            f"held out: {self.validation:.4f} nats, {seen}"
            if math.isfinite(self.validation)
            else f"nothing held out; last training loss {last:.4f} nats",
        ]
        share = about.get("share_of_mixture", about.get("share_without_context"))
        if share is not None:
            lines.append(f"a share of {share:.2g} of the density is a mixture that was not trained")
        if about["skipped"]:
            lines.append(f"{about['skipped']} steps were skipped, since their gradient was not finite")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def plot_losses(self) -> Figure:
        """Draw training and held-out nats over the steps."""
        return plots.plot_losses(self.losses, self.checks)

    def plot_samples(
        self, count: int = 64, *, image_shape: tuple[int, ...] | None = None, temperature: float = 1.0, seed: int = 0
    ) -> Figure:
        """Draw samples: a cloud in two dimensions, histograms in up to eight, else a grid of images.

        Flat images have an ``image_shape``, or are squares. Draws of a density that was fitted with noise are denoised.
        """
        shape = self.flow.event_shape
        flat = len(shape) == 1 and shape[0] <= COLUMNS and image_shape is None
        points = self.sample(2000 if flat else count, temperature=temperature, seed=seed)
        points = self.denoise(points) if self.noise else points
        return plots.plot_points(points) if flat else plots.plot_images(points, image_shape)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a directory of tensors and JSON.

        Raises:
            ValueError: if the flow was not made by a builder, or the path holds other files.
        """
        description: dict[str, Any] = {"settings": self.settings, "validation": self.validation, "why": self.why}
        description["context"] = None if self.encoding is None else self.encoding.to_json()
        files.write(path, self.flow, {"losses": self.losses, "checks": self.checks}, description, self.levels)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DensityFit:
        """Read what :meth:`save` wrote. No code is run: only tensors and JSON are read.

        Raises:
            ValueError: if the directory is not a saved density, of another format version, or by a release that makes
                flows otherwise.
        """
        return cls(**files.read(path))


def rows_at_once(draws: int) -> int:
    """Return for how many contexts draws are made together."""
    return CHUNK * 16 // draws + 1


@torch.no_grad()
def mean_log_prob(flow: Flow, given: Source) -> float:
    total, count = 0.0, 0
    for y, context in given.ordered(CHUNK):
        total += float(flow.log_prob(y, context).double().sum())
        count += len(y)
    return total / count


def bits_per_dim(nats: float, flow: Flow, levels: Levels | None) -> float:
    offset = 0.0 if levels is None else math.log(levels.count)
    return (offset - nats / math.prod(flow.event_shape)) / math.log(2.0)
