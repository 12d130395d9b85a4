"""Flow guides for Pyro: subclasses of ``AutoContinuous`` that work in Pyro's own SVI and are what ``fit`` trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.distribution import Distribution
from torch import Tensor
from torch.distributions import register_kl

from pyro_flows.flows.flow import Flow
from pyro_flows.guides.recorded import RecordedBound
from pyro_flows.guides.setup import LatentGuide
from pyro_flows.guides.store import in_svi
from pyro_flows.model.batching import Rows, over_rows, quiet
from pyro_flows.model.handlers import flatten_all, place_all
from pyro_flows.model.sites import Keywords, Positional, Site, Structure, messages
from pyro_flows.support import checks
from pyro_flows.support.arguments import numbers
from pyro_flows.support.process.fallbacks import fallback
from pyro_flows.support.process.threads import turn
from pyro_flows.transforms import Bijection, Bound, Compose
from pyro_flows.transforms.base import hooked

QUANTILE_DRAWS = 4000


@checks.methods
@checks.constructor
class AutoFlow(LatentGuide):
    r"""Guide :math:`z = m + L(b + A\,t(f(\epsilon)))` over all continuous latents: any flow f, then tails, then affine.

    t is :class:`SinhArcsinh`, which gives each coordinate tails of its own; it and the affine map are trained with f.

    Works in Pyro's ``SVI`` with any ELBO, in ``Predictive``, ``AutoGuideList``, ``poutine.block``, ``NeuTraReparam``.
    Latents are mapped to real numbers by their supports' bijections (dependent supports and improper priors too);
    effects of groups have coordinates in which they are no funnel.
    Every guide owns its parameters: a second guide of the same name starts afresh and trains, and parameters that were
    loaded into Pyro's store are taken over. dtype and device follow the model's sites, or an earlier ``guide.to(...)``.

    One SVI step evaluates each layer's network once.

    Two limits of Pyro's: ``NeuTraReparam`` is wrong for models whose first latent sits in a plate (it counts the
    log-determinant once for each entry), ``RenyiELBO`` for models with all sites in one plate (it takes the entries for
    independent problems).

    Cost of a step: one pass of the flow and one gradient of the model a draw.

    Args:
        model: a Pyro model.
        flow: a builder's name (``"realnvp"``, ``"spline"``, ``"nice"``, ``"planar"``), a :class:`Flow` or
            :class:`Bijection` of the model's dimension, or a function of the dimension that returns one.
        affine: the trainable affine map after flow and tails: ``"tril"``, ``"diagonal"``, ``"none"`` (no tails
            either), or ``"auto"`` (triangular up to 200 dimensions; a trained diagonal above, on a start with
            correlations up to 1000).
        base: base distribution, see :class:`Flow`; ignored if ``flow`` is a :class:`Flow`, which brings its own.
        df: degrees of freedom of the Student-t base.
        init: ``"auto"``: m and L come from the best of the initial Gaussians of :func:`fit`, which takes some hundred
            gradients, a second or so, when the guide is first run; ``"prior"``: m is the prior median, which works for
            improper priors, and L the identity. Rows that the arguments give (``subsample=``) count for all. In a model
            that draws a subsample, ``"auto"`` is a mode and the curvature there, by up to 256 minibatches and some
            thousand runs. A part of an ``AutoGuideList``, and a guide of ``poutine.block(model)``, start by the model
            without the block. ``"prior"`` is taken where the log density is random or unknown. With ``affine="none"``
            the flow starts at its base.
        init_loc_fn: Pyro init function for m, in the place of ``init``.
        init_scale: L at the start, times the identity, in the place of ``init``.
        noncentered: coordinates of hierarchical sites, whose location or scale depends on other latents. ``"auto"``:
            those that :func:`fit` chooses, by the data of the first run, in a second or two, wherever the guide starts.
            Else as in :class:`LogDensity`: names, True for all, or ``()`` for none. Draws then run the model, so a
            pickled guide needs :meth:`attach`. A state and Pyro's store hold the coordinates, and a guide that loads
            them takes these, whatever it was given. (Older ones hold none: then it takes those it was given, ``()`` for
            ``"auto"``.) ``"auto"`` is none where ``init="auto"`` is ``"prior"``, which the logger ``pyro_flows`` tells
            at level DEBUG, and for a flow that is given as it is, with ``affine="none"``.
        cautious: train the flow by small steps (:meth:`Flow.slow`), which one draw a step and minibatches need. With
            ``"auto"``, :class:`PathELBO` learns how long steps are, and other losses take small ones. True: small ones
            with any loss; False: as long as the optimizer makes them.
        create_plates: Pyro's: a function of the model's arguments that returns a plate or several, in which the guide
            then works; for subsampling. In an ``AutoGuideList`` the list takes it.
        options: passed to the builder, e.g. ``layers=8``; only with a builder's name.

    Raises:
        ValueError: for a model or function that is not callable, an unknown flow, affine map or base; and when the
            model is first run, naming the site, for discrete latents, supports without a bijection, subsampled plates
            with local latents, NaN in the data.
        RuntimeError: if parameters are asked for before the guide has seen the model's arguments.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model():
    ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> guide = pf.AutoFlow(model, "nice", layers=2).initialize()
    >>> guide.sample_posterior(10)["x"].shape
    torch.Size([10, 3])
    """

    # Pyro's protocol -------------------------------------------------------------------------------------------------

    def get_base_dist(self) -> dist.TorchDistribution:
        return self._single.base_distribution()

    def get_transform(self, *args: object, **kwargs: object) -> Bound:
        """Return the map from the base to the unconstrained values of Pyro's bijections, centered ones."""
        flow, structure = self._single.bijection, self._built_structure
        if not structure.noncentered:
            return Bound(flow)
        return Bound(Compose([flow, _Centered(structure, self._run(args, kwargs))]))

    def get_posterior(self, *args: object, **kwargs: object) -> dist.TorchDistribution:
        """Return the distribution of the unconstrained vector, in the coordinates of the guide."""
        self._catch_up()
        return self._flow()

    def sample_latent(self, *args: object, **kwargs: object) -> Tensor:
        """Draw the unconstrained vector, as the auxiliary site of Pyro's guides."""
        flow, whole = self._flow, self._whole if torch.is_grad_enabled() and in_svi() else None
        if type(flow) is Flow and whole is not None and not hooked(flow):  # a flow of one's own may do another thing
            posterior = flow._through(RecordedBound(flow.bijection, whole, self._maps))
        else:
            posterior = flow()
        return pyro.sample(f"_{self._pyro_name}_latent", posterior, infer={"is_auxiliary": True})

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Site, Tensor]]:
        for site in self._built_structure.latents:
            yield messages(self.prototype_trace)[site.name], site.unconstrained(latent)

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._register()
        z, structure = finite_gradients(self.sample_latent(*args, **kwargs)), self._built_structure
        plates = self._create_plates(*args, **kwargs)
        placed = place_all(structure, z, lambda: self.model(*args, **kwargs))
        result = {}
        for latent in structure.latents:
            value, ladj, _ = placed[latent.name]
            density = 0.0 if poutine.get_mask() is False else -ladj
            with ExitStack() as stack:
                for frame in self._cond_indep_stacks[latent.name]:
                    stack.enter_context(plates[frame.name])
                delta = Known(value, log_density=density, event_dim=latent.event_dim)
                result[latent.name] = pyro.sample(latent.name, delta)
        return result

    # the posterior, constrained --------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_posterior(self, n: int, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Draw ``n`` times from the guide: ``{name: (n, *shape)}``, constrained; uses torch's global generator.

        Model arguments are needed only if the guide was loaded from a file, and supports depend on latents, or
        coordinates do.
        """
        self._catch_up()
        return self._constrain(self._flow().sample((n,)), *args, **kwargs)

    def _constrain(self, z: Tensor, *args: object, **kwargs: object) -> dict[str, Tensor]:
        structure, run = self._built_structure, self._run(args, kwargs)
        return _over_rows(lambda row: {name: site.value for name, site in place_all(structure, row, run).items()}, z)

    def _run(self, args: Positional, kwargs: Keywords) -> Callable[[], object]:
        """Return a run of the model, which is made only if supports or coordinates depend on latents."""
        args, kwargs = (args, kwargs) if args or kwargs else self._arguments
        model = self.model if self._built_structure.dependent else None  # else it may be missing
        return lambda: None if model is None else model(*args, **kwargs)

    def log_prob(self, values: Mapping[str, Tensor], *args: object, **kwargs: object) -> Tensor:
        r"""Return the guide's log density of constrained latents, :math:`\log q(z) - \log|d\theta/dz|`.

        Args:
            values: ``{name: (*batch, *shape)}``, one for each latent site, with one common batch shape.
            args: the model's arguments (as in :meth:`sample_posterior`).
            kwargs: its keyword arguments.

        Raises:
            ValueError: naming the site that is missing or has the wrong shape.
        """
        self._catch_up()
        structure, run = self._built_structure, self._run(args, kwargs)
        shapes = set()
        for latent in structure.latents:
            shape = torch.as_tensor(values[latent.name]).shape if latent.name in values else None
            cut = 0 if shape is None else len(shape) - len(latent.shape)
            if shape is None or cut < 0 or shape[cut:] != latent.shape:
                got = "nothing" if shape is None else f"shape {tuple(shape)}"
                expected = f"(*batch, *{tuple(latent.shape)})"
                raise ValueError(f"values[{latent.name!r}]: expected shape {expected}, got {got}.")
            shapes.add(shape[:cut])
        if len(shapes) > 1:
            raise ValueError(f"values: expected one batch shape for all sites, got {sorted(map(tuple, shapes))}.")
        batch = shapes.pop()
        rows = {site.name: torch.as_tensor(values[site.name]).reshape(-1, *site.shape) for site in structure.latents}

        def flat(row: dict[str, Tensor]) -> dict[str, Tensor]:
            z = flatten_all(structure, row, run)
            placed = place_all(structure, z, run)
            return {"z": z, "ladj": sum((site.ladj.sum() for site in placed.values()), z.new_zeros(()))}

        found = _over_rows(flat, rows)
        return (self._flow().log_prob(found["z"].to(self._like)) - found["ladj"]).reshape(batch)

    @torch.no_grad()
    def _draws(self) -> Tensor:
        """Draws for medians and quantiles, the same at each call."""
        self._catch_up()
        like = self._like
        with turn(), torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
            torch.manual_seed(0)
            return self._flow().sample((QUANTILE_DRAWS,))

    def _initialize_from_store(self, *args: object, **kwargs: object) -> None:
        """Make the parameters if need be, with the values that were loaded into Pyro's store, as a first run would."""
        if self.prototype_trace is None:
            self.initialize(*args, **kwargs)
            with self._pyro_context:  # from here on the parameters have names
                self._in_store = True

    @torch.no_grad()
    def median(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Return the marginal medians, taken over 4000 draws of the unconstrained vector and then constrained."""
        self._initialize_from_store(*args, **kwargs)
        draws, run = self._draws(), self._run(args, kwargs)
        centered = _Centered(self._built_structure, run)
        middle = centered(draws).median(0).values
        return {name: site.value for name, site in place_all(centered.bare, middle, run).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Return marginal quantiles over 4000 draws, constrained: ``{name: (len(quantiles), *shape)}``.

        Raises:
            ValueError: for quantiles that are no list of numbers between 0 and 1.
        """
        self._initialize_from_store(*args, **kwargs)
        levels = levels_of(quantiles)
        return quantiles_of(self._constrain(self._draws(), *args, **kwargs), levels)


class _Centered(Bijection):
    """From the coordinates of a guide to those of Pyro's bijections, in which each site stands for itself."""

    def __init__(self, structure: Structure, run: Callable[[], object]) -> None:
        super().__init__()
        self.structure, self.run, self.dim = structure, run, structure.dim
        self.bare = structure.noncenter(()) if structure.noncentered else structure

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.bare is self.structure:
            return x, x.new_zeros(x.shape[:-1])
        found = self._each(self._forward, x)
        return found["y"], found["ladj"]

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = y if self.bare is self.structure else self._each(self._inverse_of, y)["x"]
        return x, -self.forward_and_ladj(x)[1]

    def _each(self, function: Callable[[Tensor], dict[str, Tensor]], z: Tensor) -> dict[str, Tensor]:
        if z.dim() == 1:
            return function(z)
        found = _over_rows(function, z.reshape(-1, self.dim))
        return {name: part.reshape(*z.shape[:-1], *part.shape[1:]) for name, part in found.items()}

    def _forward(self, x: Tensor) -> dict[str, Tensor]:
        placed = place_all(self.structure, x, self.run)
        sites = [(latent, placed[latent.name]) for latent in self.bare.latents]
        y = torch.cat([latent.flatten(site.value, site.prior) for latent, site in sites])
        ladj = sum((site.ladj.sum() - own.place(y, site.prior).ladj.sum() for own, site in sites), x.new_zeros(()))
        return {"y": y, "ladj": ladj}

    def _inverse_of(self, y: Tensor) -> dict[str, Tensor]:
        values = {name: site.value for name, site in place_all(self.bare, y, self.run).items()}
        return {"x": flatten_all(self.structure, values, self.run)}


def _over_rows(function: Callable[[Rows], dict[str, Tensor]], rows: Rows) -> dict[str, Tensor]:
    with quiet():
        return over_rows(function, rows, otherwise=partial(fallback, "constrained one by one"))


def quantiles_of(draws: Mapping[str, Tensor], levels: Tensor) -> dict[str, Tensor]:
    """Return marginal quantiles of draws (S, *shape), (len(levels), *shape)."""
    return {name: torch.quantile(value, levels.to(value), dim=0) for name, value in draws.items()}


def levels_of(quantiles: Sequence[float] | Tensor) -> Tensor:
    """Return the levels of quantiles, or say that they are no list of numbers between 0 and 1."""
    levels = numbers("quantiles", quantiles)
    if levels.dim() != 1 or not bool(((levels >= 0) & (levels <= 1)).all()):
        raise ValueError(f"quantiles: expected a list of numbers between 0 and 1, got {quantiles!r}.")
    return levels


@checks.constructor
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
        self, model: Callable[..., object], layers: int = 4, *, hidden: Sequence[int] = (32, 32), **options: Any
    ) -> None:
        super().__init__(model, "realnvp", layers=layers, hidden=hidden, **options)


@checks.constructor
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
        self, model: Callable[..., object], layers: int = 4, *, hidden: Sequence[int] = (32, 32), **options: Any
    ) -> None:
        super().__init__(model, "nice", layers=layers, hidden=hidden, **options)


@checks.constructor
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

    def __init__(self, model: Callable[..., object], layers: int = 16, **options: Any) -> None:
        super().__init__(model, "planar", layers=layers, **options)


# a value that a guide has drawn, with the guide's log density there, and what of its gradient counts ------------------


class Known(dist.Delta):
    """A point mass at a value, with the log density of the guide that drew it.

    Pyro's KL divergence of a ``Delta`` leaves out the log density, and what the model's handlers scale and mask.
    ``TraceMeanField_ELBO`` takes both from the traces where a divergence has no closed form, as that of this class.
    """


class Drawn(Known):
    """The same, where the log density is that of the value itself, and none of an auxiliary site's."""


@register_kl(Known, Distribution)
def _kl(q: Known, p: Distribution) -> Tensor:
    raise NotImplementedError(f"the divergence of one value from a {type(p).__name__}")


def finite_gradients(z: Tensor) -> Tensor:
    """Let draws (*batch, D) of a guide whose gradients are not finite have none: there, the model overflows."""
    if z.requires_grad:
        z.register_hook(lambda gradient: torch.where(gradient.isfinite().all(-1, keepdim=True), gradient, 0.0))
    return z
