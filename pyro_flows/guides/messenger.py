"""A guide by effect handlers, in the place of Pyro's ``AutoNormalMessenger``: flows, conditional rows, and normals."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide.effect import AutoNormalMessenger
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn.module import PyroModule, pyro_method
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_plates
from torch import Tensor, nn
from torch.distributions import Transform
from torch.nn.functional import softplus

from pyro_flows.flows.recipe import FlowLike, Recipe
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.guides.conditional import Rows
from pyro_flows.guides.crossed import Crossed
from pyro_flows.guides.hierarchical import AutoHierarchicalFlow
from pyro_flows.guides.setup import AUTO, PRIOR
from pyro_flows.model.batching import apart
from pyro_flows.model.bijections import bijection, real_shape
from pyro_flows.model.handlers import within
from pyro_flows.model.reading import read_structure
from pyro_flows.model.sites import Keywords, Model, Positional, Site, messages
from pyro_flows.model.start import initial_value
from pyro_flows.support import checks
from pyro_flows.support.process.fallbacks import fallback
from pyro_flows.support.process.seeding import seeded
from pyro_flows.transforms.base import Bijection

CLIMBED_UP_TO = 30  # coordinates of the flows: a climb takes minutes for more, where the model takes no batches


class Blocks(Bijection):
    r"""Map sets of coordinates :math:`I_1, \dots, I_K` by maps of their own: :math:`y_{I_k} = T_k(x_{I_k})`.

    .. math:: \log|J| = \sum_k \log|J_k(x_{I_k})|

    Coordinates that are in no set stay as they are. Both ways cost what the maps cost.

    Args:
        dim: number of coordinates D.
        sets: the coordinates of each set; no coordinate is in two sets.
        maps: the map of each set, of as many coordinates.

    Raises:
        ValueError: for coordinates that are out of range or in two sets.

    >>> import torch, pyro_flows as pf
    >>> from pyro_flows.guides.messenger import Blocks
    >>> twice = pf.transforms.DiagonalAffine(2, scale=torch.full((2,), 2.0))
    >>> Blocks(3, [[0, 2]], [twice])(torch.ones(3)).tolist()
    [2.0, 1.0, 2.0]
    """

    def __init__(self, dim: int, sets: Sequence[Sequence[int]], maps: Sequence[Bijection]) -> None:
        super().__init__()
        self.dim = checks.integer("dim", dim, 1)
        together = [index for own in sets for index in own]
        if len(set(together)) < len(together) or not set(together) <= set(range(dim)):
            raise ValueError(f"sets: expected coordinates from 0 to {dim - 1}, each in one set, got {list(sets)}.")
        self.maps = cast("Sequence[Bijection]", nn.ModuleList(maps))
        for number, own in enumerate(sets):
            self.register_buffer(f"set_{number}", torch.tensor(list(own), dtype=torch.long))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._each(x, lambda map_, own: map_.forward_and_ladj(own))

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._each(y, lambda map_, own: map_.inverse_and_ladj(own))

    def _each(self, x: Tensor, way: Callable[[Bijection, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        checks.event("Blocks", x, self.dim)
        found, total = x, x.new_zeros(x.shape[:-1])
        for number, map_ in enumerate(self.maps):
            index = self.get_buffer(f"set_{number}")
            mapped, ladj = way(map_, x.index_select(-1, index))
            found, total = found.index_copy(-1, index, mapped), total + ladj
        return found, total


class AutoFlowMessenger(AutoHierarchicalFlow, AutoNormalMessenger):
    r"""Guide by effect handlers: flows over groups of sites, conditional distributions of rows, normals elsewhere.

    .. math:: q(\theta, y, w) = q_\text{flows}(\theta) \prod_s \mathcal N(w_s \mid m_s, s_s^2)
              \prod_i q(y_i \mid \theta, w, x_i)

    in unconstrained coordinates. It stands where Pyro's ``AutoNormalMessenger`` does, with the same options, and has
    one posterior for each site (``get_posterior``):

    - Sites outside of plates, :math:`\theta`: one flow, or with ``groups`` one for each group. Groups depend on each
      other through the triangular affine map after the flows, up to 200 coordinates. Sites outside of plates that are
      in no group have this map and tails only.
    - Sites in plates, y: conditional distributions from the model's own derivatives, as in
      :class:`AutoHierarchicalFlow`, without parameters for rows.
    - Sites in ``normal``, w, and those in plates for which there is no such conditional distribution (more than 64
      numbers in a row, rows of a subsample that depend on each other; the logger ``pyro_flows`` says so): normals with
      parameters a row, shared over ``amortized_plates``, or with ``encoder`` from the features of a row.

    A subclass gives a site a posterior of its own, as it does with Pyro's class: it overrides ``get_posterior``, and
    names the site in ``normal``. Conditional rows that the model draws after such a site are given its value; those
    before it are drawn as if it were at its median.

    Cost of a step: one run of the model, one more with a pass backward for each number of a conditional row.

    Args:
        model: a Pyro model with latents outside of plates, or with ``groups`` for some in plates.
        flow: of each group, see :class:`AutoFlow`.
        groups: names of the sites of each flow; sites in plates too, if the whole plate is seen at each step.
        normal: names of sites that get normals, or posteriors of a subclass.
        encoder: of the model's arguments to features (rows, H), with the axes of the plates of the sites in ``normal``
            in front; a module is trained with the guide. A linear map of the features gives mean and sd of a row.
        init_loc_fn: Pyro init function for the means of flows and normals; the prior's medians by default.
        init_scale: their sds at the start.
        amortized_plates: names of plates over which normals share their parameters.
        init: of the flows. ``"auto"``: as in :class:`AutoHierarchicalFlow` up to 30 coordinates, if no site is in
            ``normal``; ``"prior"``, and ``"auto"`` in other cases: by ``init_loc_fn`` and ``init_scale``.
        create_plates: taken, so that the guide can stand in the place of others; the model's plates are used.
        options: of :class:`AutoFlow`, such as ``layers=`` (4), ``affine=``, ``base=``. Far from a mode,
            ``cautious=False`` trains faster, and a step may then come to values at which the model raises.

    Attributes:
        local, sizes, subsampled, reason: as in :class:`AutoHierarchicalFlow`.
        normal: names of the sites with normals, or with posteriors of a subclass.

    Raises:
        ValueError: for a model that is not callable, a site in two groups, unknown sites; and when the model is first
            run, as :class:`AutoHierarchicalFlow` does; if a subclass has a posterior for a site that is not in
            ``normal``; for features of another number of rows.

    References: those of :class:`AutoHierarchicalFlow`; Kingma and Welling 2014 (arXiv 1312.6114), for encoders.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y, rows):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    ...     tau = pyro.sample("tau", dist.HalfNormal(2.0))
    ...     with pyro.plate("row", len(y), subsample=rows):
    ...         z = pyro.sample("z", dist.Normal(mu, tau))
    ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])
    >>> y = torch.linspace(-2.0, 2.0, 50)
    >>> guide = pf.AutoFlowMessenger(model, groups=[["mu", "tau"]], layers=2)
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.005}), pyro.infer.Trace_ELBO())
    >>> svi.step(y, torch.arange(10)) > 0
    True
    >>> guide.median(y, torch.arange(50))["z"].shape
    torch.Size([50])
    """

    _option = "groups"

    def __init__(
        self,
        model: Callable[..., object],
        flow: FlowLike = "realnvp",
        *,
        groups: Sequence[Sequence[str]] = (),
        normal: Sequence[str] = (),
        encoder: Callable[..., Tensor] | None = None,
        init_loc_fn: Callable[..., Any] | None = None,
        init_scale: float = 0.1,
        amortized_plates: Sequence[str] = (),
        init: str = AUTO,
        create_plates: Callable[..., object] | None = None,
        **options: Any,
    ) -> None:
        for name, value in (("groups", groups), ("normal", normal), ("amortized_plates", amortized_plates)):
            if isinstance(value, str) or any(isinstance(part, str) is (name == "groups") for part in value):
                raise ValueError(f"{name}: expected {_EXPECTED[name]}, got {value!r}.")
        named = [*normal, *(name for group in groups for name in group)]
        if len(set(named)) < len(named):
            raise ValueError(f"groups: expected each site in one group, and none of them in normal=, got {groups!r}.")
        super().__init__(model, flow, joint=named[len(normal) :], init=init, create_plates=create_plates, **options)
        self._groups = [list(group) for group in groups]
        self._own = list(normal)
        self.amortized_plates = tuple(amortized_plates)
        self.init_loc_fn = initial_value if init_loc_fn is None else init_loc_fn
        self._init_scale = checks.positive("init_scale", init_scale)
        self.encoder = encoder
        self._features: Tensor | None = None
        self._asked: set[str] = set()

    @property
    def normal(self) -> list[str]:
        """Names of the sites with normals, or with posteriors of a subclass."""
        return self._own

    # the structure ---------------------------------------------------------------------------------------------------

    def _read(self, args: Positional, kwargs: Keywords) -> None:
        super()._read(args, kwargs)
        with apart(inside=True), torch.no_grad():  # makes the parameters of normals
            self(*args, **kwargs)

    def _give_up(self, name: str, reason: str) -> None:
        fallback(f"site {name!r} gets a normal with parameters a row", ValueError(reason))
        self._own.append(name)

    def _solved(self, rows: Rows, z: Tensor) -> Crossed:
        raise ValueError("sites in crossed plates get normals")

    def _made(self, model: Model, args: Positional, kwargs: Keywords) -> AutoFlow:
        flow, options = self._of_globals
        options = {"init_loc_fn": self.init_loc_fn, **options}
        if not self._groups:
            return AutoFlow(model, flow, init=PRIOR, **options)
        recipe = AutoFlow(self.model, flow, **options)._recipe  # whose options are the builder's
        others = {name: value for name, value in options.items() if name not in recipe.options}
        latents = read_structure(model, args, kwargs, initial_value).latents
        places = {latent.name: range(latent.offset, latent.offset + latent.size) for latent in latents}
        sets = [[place for name in group for place in places[name]] for group in self._groups]
        return AutoFlow(model, partial(_in_blocks, recipe=recipe, sets=sets), init=PRIOR, **others)

    def _globals(self, args: Positional, kwargs: Keywords) -> AutoFlow:
        top = super()._globals(args, kwargs)
        if top.affine is not None:  # in A and not in L, in whose units the shift is trained: as far a step as Pyro's
            scales = top.affine.conditioner.get_parameter("values").detach()[top.latent_dim : 2 * top.latent_dim]
            scales.fill_(math.log(self._init_scale))
        return top

    def _begin(self, top: AutoFlow, z: Tensor, args: Positional, kwargs: Keywords) -> None:
        if not self._own and top.latent_dim <= CLIMBED_UP_TO:
            super()._begin(top, z, args, kwargs)

    def _rows(self, args: Positional, kwargs: Keywords) -> Rows:
        found = super()._rows(args, kwargs)
        return replace(found, model=within(self.model, lambda: _At(self))) if self._own else found

    def _middle(self, msg: Site) -> Tensor:
        """Return the value of a site that has no conditional distribution, where conditional rows need one."""
        if self._z is not None and msg["name"] in messages(self.trace):
            return messages(self.trace)[msg["name"]]["value"]
        with torch.no_grad(), seeded(0):
            start, shape = initial_value(msg), msg["fn"].shape()
        return start.expand(shape) if start.dim() < len(shape) else start

    # a run -----------------------------------------------------------------------------------------------------------

    @pyro_method
    def __call__(self, /, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        """Draw all latents, and run the model on them; return ``{site: value}``, observed sites too."""
        self.initialize(*args, **kwargs)
        self._outer_plates = tuple(frame.name for frame in get_plates())
        self._features, self._asked = None, set()
        try:
            found: dict[str, Tensor] = super().__call__(*args, **kwargs)
        finally:
            del self._outer_plates
            self._features = None
        missed = {*(latent.name for latent in self._latents), *self.local} - self._asked
        if missed and type(self).get_posterior is not AutoFlowMessenger.get_posterior:
            name = min(missed)
            raise ValueError(
                f"get_posterior: {type(self).__name__} has a posterior of its own for site {name!r}, which is drawn by "
                f"the flow or as a conditional row. Name it: normal=[{name!r}]."
            )
        return found

    def get_posterior(self, name: str, prior: Any) -> Any:
        """Return the posterior of a site, given what was drawn before it; subclasses override it for some sites."""
        self._asked.add(name)
        if name not in self._own:
            return super().get_posterior(name, prior)
        in_plates = any(frame.name not in self._outer_plates for frame in get_plates())
        if self.encoder is not None and in_plates:
            return self._encoded(name, prior)
        return AutoNormalMessenger.get_posterior(self, name, prior)

    def _encoded(self, name: str, prior: TorchDistribution) -> TorchDistribution:
        """Return a normal whose mean and sd are a linear map of a row's features."""
        if self._features is None and self.encoder is not None:
            args, kwargs = self.args_kwargs
            self._features = self.encoder(*args, **kwargs)
        assert self._features is not None
        features, transform = self._features, bijection(prior)
        shape = real_shape(transform, prior.shape())
        axes = transform.domain.event_dim
        batch, event = shape[: len(shape) - axes], shape[len(shape) - axes :]
        try:
            torch.broadcast_shapes(features.shape[:-1], batch)
        except RuntimeError:
            expected = (*batch, "H")
            raise ValueError(
                f"encoder: expected features of shape {expected} for site {name!r}, got {tuple(features.shape)}."
            ) from None
        loc, scale = self._head(name, prior, transform, features, event.numel())(features).chunk(2, -1)
        shapes = (*features.shape[:-1], *event)
        normal = dist.Normal(loc.reshape(shapes), softplus(scale).reshape(shapes)).to_event(axes)
        return dist.TransformedDistribution(normal, transform.with_cache())

    def _head(
        self, name: str, prior: TorchDistribution, transform: Transform, features: Tensor, size: int
    ) -> nn.Linear:
        """Return the linear map of a site, which begins at one normal for all rows."""
        with contextlib.suppress(AttributeError):
            return attrgetter(name)(self.heads)
        kind: Any = PyroModule[nn.Linear]
        head = kind(features.shape[-1], 2 * size).to(features)
        with torch.no_grad():
            start = transform.inv(self.init_loc_fn({"name": name, "fn": prior}))
            head.weight.zero_()
            head.bias[:size] = start.reshape(-1, size).mean(0)
            head.bias[size:] = torch.tensor(self._init_scale).expm1().log()
        deep_setattr(self, f"heads.{name}", head)
        return attrgetter(name)(self.heads)


_EXPECTED = {
    "groups": "lists of names of sites, one for each flow",
    "normal": "names of sites",
    "amortized_plates": "names of plates",
}


def _in_blocks(dim: int, *, recipe: Recipe, sets: Sequence[Sequence[int]]) -> Bijection:
    """Return a flow of its own for each set of coordinates."""
    bare = Recipe(recipe.builder, recipe.options)
    return Blocks(dim, sets, [bare.build(len(own)).bijection for own in sets])


class _At(Messenger):
    """Put the sites that have no conditional distribution at values."""

    def __init__(self, guide: AutoFlowMessenger) -> None:
        super().__init__()
        self.guide = guide

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.guide._own and not msg["is_observed"]:
            msg["value"], msg["is_observed"] = self.guide._middle(msg), True
