"""A guide with a model's structure: a flow over global latents, and conditional distributions of those in plates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.nn.module import pyro_method
from pyro.poutine.runtime import Message
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch._C import _functorch

from pyro_flows.guides.autoflow import QUANTILE_DRAWS, Drawn, Known, finite_gradients, levels_of, quantiles_of
from pyro_flows.guides.crossed import Crossed, Expansion
from pyro_flows.guides.runs import Axes, Chosen
from pyro_flows.guides.structured import StructuredGuide
from pyro_flows.model.batching import apart
from pyro_flows.model.bijections import bijection
from pyro_flows.model.sites import Keywords, Positional, Site, by_event, is_open, is_subsample, messages
from pyro_flows.support import checks
from pyro_flows.support.process.fallbacks import fallback, first_line
from pyro_flows.transforms import Bijection

DRAWN_AT_ONCE = 4_000_000  # numbers of latents
SAME = 1e-3  # relative error of a site's log density, among other draws or alone
REACH = 0.3  # of difference quotients, in sds


@checks.constructor
class AutoHierarchicalFlow(StructuredGuide):  # type: ignore[metaclass]
    r"""Guide :math:`q(\theta, y) = q_\text{flow}(\theta) \prod_i q(y_i \mid \theta, x_i)`, for plates and minibatches.

    A flow is the distribution of the latents outside of plates, :math:`\theta`, as in :class:`AutoFlow`. A latent y in
    plates has a conditional distribution given :math:`\theta`, the latents of the plates around it, and its data. With
    gradient g and negative Hessian H of the model's own log density at a mode :math:`y_0` of the latents in plates,

    .. math:: y = y_0 + H^{-1} g + H^{-1/2} t(\epsilon), \qquad \epsilon \sim \mathcal N(0, I).

    t is a trained map of each number of a row, the same for all rows: an affine one and :class:`SinhArcsinh`. H is
    sparse, since rows are independent given what is outside of their plate, and is factored in time linear in the rows,
    from the innermost plates outwards. Where the latents in plates are normal with normal data, given
    :math:`\theta`, this is their exact conditional distribution. Elsewhere it is Laplace's approximation with trained
    tails.

    Latents whose data are in other plates, such as effects of students and lecturers on ratings, are drawn together, if
    they are too many for the flow: :math:`H` then couples all latents in plates, is added up over all rows of the data,
    and is factored with the largest site first (Papaspiliopoulos, Roberts and Zanella 2020,
    doi:10.1093/biomet/asz058). In a step of SVI with a minibatch, what the rows say of them is an expansion at the mode
    of the flow's latents. For this the first run needs all rows, and draws of these latents are given its data.

    Nothing is stored for a row but its last mode, from which the next Newton step begins. So the guide needs no
    parameters for rows and no encoder: it trains on minibatches (``subsample_size=`` or ``subsample=`` of
    ``pyro.plate``), and new rows take one pass.

    It is a ``GuideMessenger``: the model runs twice a step, and its own plates are the guide's. Use it in ``SVI`` with
    ``Trace_ELBO``, vectorized particles too; ``TraceEnum_ELBO`` and, with latents in plates, ``JitTrace_ELBO`` are
    refused. Minibatches add noise to gradients, so let the learning rate fall.

    Cost of a step: two runs of the model, and one pass backward for each number of a row. With crossed plates, a dense
    factor of the numbers of all sites but the largest one, at most 3000, in the place of the passes backward.

    Args:
        model: a Pyro model. Its plates may be nested. Latents are continuous. If all are in plates, the flow takes
            those that priors of other latents read, or that are read outside of their plates.
        flow: of the latents outside of plates, see :class:`AutoFlow`.
        joint: sites in plates whose latents the flow takes too. Sites whose rows depend on each other given all else,
            such as increments of a random walk or weights of a regression, are found, and are taken too, up to 200
            coordinates. So are sites on which priors of these depend, such as a scale of each weight.
        init: ``"auto"``: the flow starts at a mode of its latents, those in plates integrated out by importance
            sampling, and at the curvature there. Up to 256 minibatches are read. Without latents in plates, or without
            a mode, it starts as :class:`AutoFlow` does. ``"prior"``: at the prior's median.
        create_plates: taken, so that the guide can stand in the place of others; the model's plates are used.
        options: of :class:`AutoFlow`, such as ``layers=`` (4), ``affine=``, ``base=``. ``noncentered="auto"`` is none
            where latents in plates are left to conditional distributions, and with ``init="prior"``.

    Attributes:
        local: names of the sites in plates that have conditional distributions.
        sizes: numbers of each latent site of a run, unconstrained.
        subsampled: whether a run has a part of the rows of a plate.
        has_data: whether the first run had data.
        reason: what the guide cannot follow: pairs of sites in crossed plates that cannot be coupled, which it takes as
            independent given the flow's latents; or that it sees no data. None if there is nothing.

    Raises:
        ValueError: for a model that is not callable; and when the model is first run, for discrete latents, a model
            whose rows are independent of each other, more than 64 numbers in a row, latents of a subsampled plate that
            depend on each other, crossed plates of which a row of the data reads several rows, an index that was
            forgotten, a log density that is NaN.

    References: Tierney and Kadane 1986 (doi:10.1080/01621459.1986.10478240); Rue, Martino and Chopin 2009
    (doi:10.1111/j.1467-9868.2008.00700.x); Agrawal and Domke 2021 (arXiv 2111.03144), for the factorization.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    ...     tau = pyro.sample("tau", dist.HalfNormal(2.0))
    ...     with pyro.plate("row", len(y), subsample_size=10) as rows:
    ...         z = pyro.sample("z", dist.Normal(mu, tau))
    ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])
    >>> y = torch.linspace(-2.0, 2.0, 50)
    >>> guide = pf.AutoHierarchicalFlow(model, layers=2)
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.005}), pyro.infer.Trace_ELBO())
    >>> svi.step(y) > 0
    True
    >>> guide.local, guide.sample_posterior(100, y)["z"].shape
    (['z'], torch.Size([100, 10]))
    """

    _z: Tensor | None = None  # the globals of this run
    _run: _Run | None = None
    _expansion: Expansion | None = None

    # a run -----------------------------------------------------------------------------------------------------------

    @pyro_method
    def __call__(self, /, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        """Draw all latents, and run the model on them; return ``{site: value}``, observed sites too."""
        self.initialize(*args, **kwargs)
        if self.local and torch.jit.is_tracing():
            raise NotImplementedError(
                f"{type(self).__name__}: torch.jit records no second derivatives, by which rows of {self.local[0]!r} "
                "are drawn. Use Trace_ELBO in the place of JitTrace_ELBO."
            )
        self._begin_again(args, kwargs)
        self.args_kwargs = args, kwargs
        try:
            with self:
                self._top._register()
                self._z = finite_gradients(self.finite(self._top.sample_latent()))
                self.model(*args, **kwargs)
        except RuntimeError as error:
            self._explain_shared_plates(error)
            raise
        finally:
            self._z = self._run = None
            del self.args_kwargs
        model_trace, _ = self.get_traces()
        return {name: site["value"] for name, site in messages(model_trace).items() if site["type"] == "sample"}

    def _explain_shared_plates(self, error: Exception) -> None:
        """Raise an error with a remedy, if this one is about a plate that another part of the guide has made."""
        for name in self.modes.sizes:
            if f"Multiple sample sites named '{name}'" in first_line(error):
                raise ValueError(
                    f"plate {name!r}: expected it to be this guide's alone, got one that another part of the guide has "
                    "made (as AutoGuideList does), whose draws this guide would not see. For normals beside flows, use "
                    "one guide: AutoFlowMessenger(model, normal=[...]) with the names of their sites."
                ) from error

    def finite(self, z: Tensor) -> Tensor:
        """Return draws (*batch, D) of the flow.

        Raises:
            ValueError: if they are not finite, with the site, and the parameter of the flow that is not.
        """
        if _functorch.is_batchedtensor(z):  # none has a value there
            return z
        broken = ~torch.isfinite(z).reshape(-1, z.shape[-1]).all(0)
        if not bool(broken.any()):
            return z
        place = int(broken.nonzero()[0])
        site = next(latent.name for latent in reversed(self._latents) if latent.offset <= place)
        named = self._top._flow.named_parameters()
        lost = [name for name, parameter in named if not bool(torch.isfinite(parameter).all())]
        cause = f", since its parameter {lost[0]!r} is not finite" if lost else ""
        got = float(z[..., place].detach().flatten()[0])
        raise ValueError(
            f"site {site!r}: expected finite draws from the guide's flow, got {got}{cause}. "
            "Train a new guide with a lower learning rate, or with clipped gradients."
        )

    def _drawn(self, z: Tensor) -> _Run:
        """Return what this run draws of the latents in plates, for the rows that its plates have by now."""
        if self._run is None:
            sites = messages(self.trace).items()
            chosen = {name: site["value"] for name, site in sites if site["type"] == "sample" and is_subsample(site)}
            with apart(inside=True):
                self._run = self._locals(z, *self.args_kwargs, chosen=chosen)
        return self._run

    def _locals(
        self, z: Tensor, args: Positional, kwargs: Keywords, *, remember: bool = True, chosen: Chosen | None = None,
        axes: Axes | None = None,
    ) -> _Run:  # fmt: skip
        """Draw unconstrained values of the latents in plates, given the others; see :class:`Rows` for ``axes``."""
        if self._crossed is not None:
            return self._crossed_locals(self._crossed, z)
        graph = torch.is_grad_enabled()
        # with children, modes of particles are far apart
        rows = replace(self._rows(args, kwargs), children=(), axes=axes)
        now = rows.near_mode(z, self.modes.start, chosen or {}, graph=graph, patient=not graph)
        if remember:
            self.modes.remember(now)
        densities: list[Tensor] = []
        shapes = cast(Sequence[Bijection], self._top._flow.get_submodule("local"))

        def noise(index: int, shape: torch.Size) -> Tensor:
            eps = torch.randn(shape, dtype=z.dtype, device=z.device)
            shaped, ladj = shapes[index].forward_and_ladj(eps.unsqueeze(-1))
            densities.append(dist.Normal(0.0, 1.0).log_prob(eps) - ladj - now.numbers[index].sd.log())
            return shaped.squeeze(-1)

        drawn = now.moved(now.base, now.draw(noise))
        values = {name: finite_gradients(value.unsqueeze(-1)).squeeze(-1) for name, value in drawn.items()}
        by_site = {name: torch.stack(parts).sum(0) for name, parts in now.by_site(densities).items()}
        return _Run(values, by_site, now.at.chosen)

    def _crossed_locals(self, system: Crossed, z: Tensor) -> _Run:
        """Draw all latents in plates together, at points (*batch, D)."""
        flat = z.reshape(-1, z.shape[-1])
        noise = torch.randn(len(flat), 1, system.size, dtype=torch.float64, device=z.device)
        if system.first.at.drawn:
            if self._expansion is None:
                self._about = about, reach = self._about or (flat[0].detach(), torch.ones_like(flat[0]).detach())
                self._expansion = Expansion(system, about, REACH * reach)
            u, density = self._expansion.drawn(flat, noise)
        else:
            u, density = system.drawn(flat, noise)
        values, densities = system.split(u[:, 0].to(z)), system.split(density[:, 0].to(z))
        for site in system.sites:
            lead = [*z.shape[: max(z.dim() - 1 - self._nesting, 0)]]
            lead += [1] * (self._nesting - len(site.batch)) if z.dim() > 1 else []
            values[site.name] = values[site.name].reshape(*lead, *site.value.shape)
            densities[site.name] = densities[site.name].reshape(*lead, *site.batch, -1).sum(-1)
        return _Run(values, densities, {})

    def remembered(self) -> dict[str, object]:
        """Return what runs leave behind, besides parameters: modes of rows, and where the system was expanded."""
        return {"modes": self.modes.kept, "about": self._about}

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`remembered` returned."""
        self.modes.kept = {name: (values, seen) for name, (values, seen) in state["modes"].items()}
        self._about = state["about"] and (state["about"][0], state["about"][1])

    def _pyro_sample(self, message: Message) -> None:
        msg = cast(Site, message)
        if is_subsample(msg):
            if self._run is not None and is_open(msg) and msg["name"] in self._run.chosen:
                msg["value"] = self._run.chosen[msg["name"]]
            return
        if self._is_own(msg):
            return
        prior = msg["infer"]["prior"] = msg["fn"]
        if msg["is_observed"]:  # no part of the guide's density, for who traces the guide
            msg["fn"] = prior.mask(False)
            return
        posterior = self.get_posterior(msg["name"], prior)
        if isinstance(posterior, Tensor):
            posterior = dist.Delta(posterior, event_dim=prior.event_dim)
        batch = torch.broadcast_shapes(posterior.batch_shape, prior.batch_shape)  # outer plates come later
        msg["fn"] = posterior if batch == posterior.batch_shape else posterior.expand(batch)
        if msg["name"] not in (*self.local, *self._own):  # the flow's density has no power, whatever that of the prior
            msg["infer"]["power"], msg["scale"] = msg["scale"], 1.0

    def get_posterior(self, name: str, prior: TorchDistribution) -> TorchDistribution | Tensor:
        """Return a point mass at a site's value of this run, with the guide's log density.

        Raises:
            ValueError: for a site that was no latent in the first run, such as one whose data are left out.
        """
        assert self._z is not None
        if name not in self.local:
            latent = next((latent for latent in self._latents if latent.name == name), None)
            if latent is None:
                raise ValueError(
                    f"site {name!r}: expected the latents of the first run, got another one. If its data are left out "
                    "to predict them: rows are drawn given their data, so draw first, and predict by "
                    "Predictive(model, posterior_samples=guide.sample_posterior(n, *data))."
                )
            placed = latent.place(self._z, prior)
            return Known(placed.value, log_density=-placed.ladj, event_dim=prior.event_dim)
        run = self._drawn(self._z)
        transform, y, density = bijection(prior), run.values[name], run.densities[name]
        value = transform(y)
        density = density - by_event(transform.log_abs_det_jacobian(y, value), density.dim())
        return Drawn(value, log_density=density, event_dim=prior.event_dim)

    def get_traces(self) -> tuple[poutine.Trace, poutine.Trace]:
        """Return the traces of model and guide of the last run."""
        guide_trace = prune_subsample_sites(self.trace)
        model_trace = guide_trace.copy()
        for name, site in list(messages(guide_trace).items()):
            if site["type"] != "sample" or site["is_observed"]:
                del guide_trace.nodes[name]
            if site["type"] == "sample" and self._is_own(site):
                del model_trace.nodes[name]
            elif site["type"] == "sample":
                scale = site["scale"] * site["infer"].get("power", 1.0)
                messages(model_trace)[name] = {**site, "fn": site["infer"]["prior"], "scale": scale}
        return model_trace, guide_trace

    def _is_own(self, site: Site) -> bool:
        """Whether a site is a draw of the guide's own; factors and latents of a model may be marked alike."""
        auxiliary = site["infer"].get("is_auxiliary") and not site["is_observed"]
        return bool(auxiliary) and site["name"] not in self._axes

    # draws -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_posterior(self, n: int, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Draw ``n`` times from the guide: ``{name: (n, *shape)}``, constrained; uses torch's global generator.

        Latents of a subsampled plate are those of one subsample, the same for all draws.

        Args:
            n: how many draws.
            args: the model's arguments.
            kwargs: its keyword arguments.
        """
        checks.integer("n", n, 1)
        self.initialize(*args, **kwargs)
        with poutine.block():
            if not (self.local or self._own):  # the flow has all latents
                self(*args, **kwargs)  # takes over values that were loaded into Pyro's store
                return self._top.sample_posterior(n, *args, **kwargs)
            chosen = self._chosen(args, kwargs)
            rows = max(sum(value.numel() for value in self._run_once(args, kwargs, chosen).values()), 1)
            size = max(1, DRAWN_AT_ONCE // rows)
            parts = [min(size, n - first) for first in range(0, n, size)]
            try:
                found = [self._many(part, args, kwargs, chosen) for part in parts]
            except (RuntimeError, ValueError, IndexError) as error:  # a model that is not written for an outer plate
                fallback("draws are made one by one", error)
                singles = [self._run_once(args, kwargs, chosen) for _ in range(n)]
                found = [{name: torch.stack([one[name] for one in singles]) for name in singles[0]}]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _chosen(self, args: Positional, kwargs: Keywords) -> dict[str, Tensor]:
        """Return the rows of one run of the model, of plates that it draws."""
        at = self._rows(args, kwargs).run(self._top._init_loc().to(self._top._like), self.modes.start, {})
        return {name: at.chosen[name] for name in at.drawn}

    def _run_once(self, args: Positional, kwargs: Keywords, chosen: Chosen) -> dict[str, Tensor]:
        with poutine.condition(data=dict(chosen)) if chosen else nullcontext():
            found = self(*args, **kwargs)
        return {name: found[name] for name in self._axes}

    def _many(self, count: int, args: Positional, kwargs: Keywords, chosen: Chosen) -> dict[str, Tensor]:
        """Draw in an outer plate, and compare a draw with a run of its own."""
        with pyro.plate("_draws", count, dim=-1 - self._nesting):
            found = self._run_once(args, kwargs, chosen)
            together, _ = self.get_traces()
        draws = {}
        for name, (batch, event_dim) in self._axes.items():
            value, rank = found[name], 1 + self._nesting + event_dim
            value = value.reshape(*[1] * (rank - value.dim()), *value.shape)
            cut = 1 + self._nesting - batch
            draws[name] = value.expand(count, *value.shape[1:]).reshape(count, *value.shape[cut:])
        if self.local:
            of_rows = {name: rows.expand(count, -1) for name, rows in chosen.items()}
            self._check_draws(together, args, kwargs, {**draws, **of_rows})
        return draws

    def _check_draws(
        self, together: poutine.Trace, args: Positional, kwargs: Keywords, draws: Mapping[str, Tensor]
    ) -> None:
        """Raise an error unless the model, run on one draw, has the log densities that this draw has among others.

        In an outer plate, ``w.sum()`` adds up the draws too, and ``w[0]`` is one of them.
        """
        together.compute_log_prob()
        for place in {0, len(next(iter(draws.values()))) - 1}:
            given = {name: value[place] for name, value in draws.items()}
            alone = poutine.trace(poutine.condition(self.model, data=given)).get_trace(*args, **kwargs)
            alone.compute_log_prob()
            for name, site in messages(together).items():
                if "log_prob" not in site or is_subsample(site):
                    continue
                density = site["log_prob"]
                own = density[place] if density.dim() > self._nesting and len(density) > 1 else density
                one = float(messages(alone)[name]["log_prob"].sum())
                if not math.isclose(float(own.sum()), one, rel_tol=SAME, abs_tol=SAME):
                    raise ValueError(f"the model gives site {name!r} another log density among other draws than alone")

    def median(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Return the marginal medians of 4000 draws."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Return marginal quantiles over 4000 draws, constrained: ``{name: (len(quantiles), *shape)}``.

        Raises:
            ValueError: for quantiles that are no list of numbers between 0 and 1.
        """
        levels = levels_of(quantiles)
        self.initialize(*args, **kwargs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return quantiles_of(self.sample_posterior(QUANTILE_DRAWS, *args, **kwargs), levels)


class _Run(NamedTuple):
    """What one run of the guide has drawn."""

    values: dict[str, Tensor]  # of the sites in plates, unconstrained
    densities: dict[str, Tensor]  # their log densities, of each row
    chosen: Chosen  # rows of the plates
