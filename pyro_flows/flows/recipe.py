"""What a flow is made of: a builder with its options, a base distribution, and the maps around the flow."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NotRequired, TypedDict, cast

import torch
from torch import Tensor

from pyro_flows.flows.bases import DefendedBase
from pyro_flows.flows.flow import BASES, MIXTURE, Flow
from pyro_flows.flows.mixture_base import MixtureBase
from pyro_flows.flows.unbent import warn_unbent
from pyro_flows.support import checks
from pyro_flows.support.process.threads import turn
from pyro_flows.transforms import Bijection, Compose, DiagonalAffine, LowerTriangularAffine, SinhArcsinh
from pyro_flows.transforms.fixed import Preprocess

AFFINES = ("auto", "diagonal", "none", "tril")
FULL_AFFINE_UP_TO = 200  # dimensions


class Networks(TypedDict):
    """Options that the layers of all flows have."""

    context_dim: int
    hidden: Sequence[int]
    activation: str


class Couplings(Networks):
    """Options that couplings have besides."""

    network: str
    log_scale_bound: float


AUTO = "auto"  # in the place of a builder: what a fit takes, if nothing is said
FlowLike = str | Flow | Bijection | Callable[[int], "Flow | Bijection"]

BUILDERS: dict[str, Callable[..., Flow]] = {}
VECTOR_BUILDERS: dict[str, Callable[..., Flow]] = {}
PARTS: dict[str, Callable[..., Flow]] = {}  # of mixtures: in files, and not to be asked for by name


def of_vectors(builder: Callable[..., Flow]) -> Callable[..., Flow]:
    """Register a builder of flows of vectors under its name. Returns what users call: it warns of unbent coordinates.

    The registered one does not: guides put tails around a flow, which bend all coordinates.
    """
    VECTOR_BUILDERS[builder.__name__] = builder
    of_images(builder)

    @functools.wraps(builder)
    def checked(*args: object, **kwargs: object) -> Flow:
        flow = builder(*args, **kwargs)
        if flow.dim == 1 or kwargs.get("layers") == 1:
            warn_unbent(flow, builder.__name__)
        return flow

    return checked


def of_images(builder: Callable[..., Flow]) -> Callable[..., Flow]:
    """Register a builder of flows of images under its name."""
    BUILDERS[builder.__name__] = builder
    return builder


def of_mixtures(builder: Callable[..., Flow]) -> Callable[..., Flow]:
    """Register a builder of parts of mixtures under its name."""
    PARTS[builder.__name__] = builder
    return builder


@dataclass(frozen=True)
class Recipe:
    """The make-up of a flow. Nothing else knows it: builders write it down, and guides, fits and files read it.

    Attributes:
        builder: a builder's name; or what a caller gave in its place, a flow, a bijection or a function of the
            dimension, which cannot be written into a file.
        options: of the builder.
        base: of the flow, see :class:`Flow`. A flow that was given brings its own.
        df: degrees of freedom of the base.
        around: the maps after the flow, from the inside out: ``("preprocess", {"full": ..., "context": ...})``, a map
            to the scale of data, or ``("affine", kind)``, tails and a trainable affine map, where ``kind`` is "tril",
            "diagonal", or "auto": triangular up to 200 dimensions, and above a diagonal on a start that may have
            correlations. Before them may stand ``("mixture", {"components": ..., "context_dim": ..., "hidden": ...,
            "fixed": ...})``, a mixture of Student t distributions in the place of the base.
    """

    builder: FlowLike
    options: Mapping[str, Any] = field(default_factory=dict)
    base: str = "normal"
    df: float = 15.0
    around: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in self.options.items()}
        object.__setattr__(self, "options", options)

    @property
    def named(self) -> bool:
        """Whether the builder is given by its name."""
        return isinstance(self.builder, str)

    def build(self, dim: int | tuple[int, ...]) -> Flow:
        """Return a new flow: at the identity, unless a trained one was given.

        Raises:
            ValueError: for an unknown builder or affine map, and wrong options.
        """
        made = self.builder
        if isinstance(made, str):
            builder = {**BUILDERS, **PARTS}[made if made in PARTS else checks.choice("builder", made, BUILDERS)]
            made = builder(dim, base=self.base, df=self.df, **self.options)
        elif not isinstance(made, (Flow, Bijection)):
            made = _called(made, cast("int", dim))
        flow = made if isinstance(made, Flow) else Flow(made, base=self.base, df=self.df)
        for kind, about in self.around:
            flow = _with(flow, kind, about)
        fixed = cast(_Mixture, dict(self.around).get(MIXTURE, {})).get("fixed", 0)
        return with_fixed(flow, MixtureBase(flow.dim, fixed), 0.5) if fixed else flow

    def build_for_latents(self, dim: int) -> Flow:
        """Return a new flow of ``dim`` unconstrained latents.

        Raises:
            ValueError: as :meth:`build` does, and for a flow of another dimension or with a context.
        """
        inner = replace(self, around=()).build(dim)
        got = inner.dim if len(inner.event_shape) == 1 else tuple(inner.event_shape)
        if got != dim or inner.context_dim:
            raise ValueError(
                f"flow: expected one of dim {dim} (the model's unconstrained latents) without context, "
                f"got dim {got}, context_dim {inner.context_dim}."
            )
        return replace(self, builder=inner, options={}).build(dim)

    def with_df(self, df: float) -> Recipe:
        """Return the recipe with other tails of the base."""
        return replace(self, df=df)

    def then(self, kind: str, about: object) -> Recipe:
        """Return the recipe with one more map after the flow."""
        return replace(self, around=(*self.around, (kind, about)))


def _called(function: Callable[[int], Flow | Bijection], dim: int) -> Flow | Bijection:
    """Return what a caller's function makes of a dimension; say what it has to take if it takes something else."""
    with suppress(ValueError):  # of what has no signature
        try:
            inspect.signature(function).bind(dim)
        except TypeError as error:
            expected = "flow: expected a function of one number, the dimension, that returns a flow"
            raise TypeError(f"{expected}, got one of other arguments ({error}).") from error
    return function(dim)


def build(stack: list[Bijection], base: str, df: float, *, builder: str, dim: object, **options: object) -> Flow:
    """Compose the maps of a builder, and note what the flow is made of in :attr:`Flow.recipe`."""
    flow = Flow(Compose(stack), base=base, df=df)
    flow.recipe = Recipe(builder, options, base, flow.df)
    return flow


def latent_recipe(flow: FlowLike, options: Mapping[str, object], *, affine: str, base: str, df: float) -> Recipe:
    """Return the recipe of a flow over the latents of a model.

    Raises:
        ValueError: for an unknown builder, affine map or base, wrong options, and for what is no flow.
        TypeError: for options beside a flow that is already built, or options that the builder does not have.
    """
    around = () if checks.choice("affine", affine, AFFINES) == "none" else (("affine", affine),)
    checks.choice("base", base, BASES)
    checks.positive("df", df)
    found = Recipe(flow, dict(options), base, df, around)
    if isinstance(flow, str):
        if flow in BUILDERS and flow not in VECTOR_BUILDERS:
            raise ValueError(f"flow: {flow!r} makes flows of images; a guide's is of a vector, as 'realnvp' makes.")
        checks.choice("flow", flow, VECTOR_BUILDERS)
        if options:  # wrong ones fail here, not at the first step
            with turn(), torch.random.fork_rng(devices=[]):
                found.build(1)
    elif options:
        raise TypeError(f"options: {', '.join(options)} go with a flow's name; this flow is already built.")
    elif not isinstance(flow, (Flow, Bijection)) and not callable(flow):
        raise ValueError(f"flow: expected a name, a Flow, a Bijection or a function, got a {type(flow).__name__}.")
    return found


class _Mixture(TypedDict):
    components: int
    context_dim: int
    hidden: Sequence[int]
    fixed: NotRequired[int]


def _with(flow: Flow, kind: str, about: object) -> Flow:
    if kind == "affine":
        return with_affine(flow, about)
    if kind == MIXTURE:
        made = cast(_Mixture, about)
        return with_mixture(flow, components=made["components"], context_dim=made["context_dim"], hidden=made["hidden"])
    return with_preprocess(flow, blank(cast("Mapping[str, object]", about), flow))


# maps around a flow ---------------------------------------------------------------------------------------------------


def with_affine(flow: Flow, kind: object) -> Flow:
    """Return the flow followed by tails and an affine map of one of `AFFINES`; "none" adds neither."""
    kind = checks.choice("affine", kind, AFFINES)
    if kind == "none":
        return flow
    if kind == "auto" and flow.dim <= FULL_AFFINE_UP_TO:
        kind = "tril"
    map_ = LowerTriangularAffine(flow.dim) if kind == "tril" else DiagonalAffine(flow.dim)
    whole = Flow(Compose([flow.bijection, SinhArcsinh(flow.dim), map_]), dim=flow.dim, base=flow.base, df=flow.df)
    whole.recipe = None if flow.recipe is None else flow.recipe.then("affine", kind)
    return whole


def with_mixture(flow: Flow, *, components: int, context_dim: int = 0, hidden: Sequence[int] = (64, 64)) -> Flow:
    """Give the flow a mixture of Student t distributions as its base, all alike at first, and note it in the recipe.

    Raises:
        ValueError: for a flow of images.
    """
    if len(flow.base_shape) != 1:
        raise ValueError(f"flow: a mixture is a base of vectors, not of shape {tuple(flow.base_shape)}.")
    made = MixtureBase(flow.dim, components, context_dim=context_dim, hidden=hidden)
    flow.mixture, flow.base = made.to(next(flow.parameters(), flow._like)), MIXTURE
    about = {"components": components, "context_dim": context_dim, "hidden": tuple(hidden)}
    recipe = flow.recipe
    flow.recipe = None if recipe is None else replace(recipe, around=((MIXTURE, about), *recipe.around))
    return flow


def with_fixed(flow: Flow, fixed: MixtureBase, share: float) -> Flow:
    """Give a flow with a mixture a second one, of a share of the mass that is not moved, and note it in the recipe.

    Maps before that to the scale of data go into the base, so that neither they nor a context move it.
    """
    mixture = flow.mixture
    assert isinstance(mixture, MixtureBase)
    if ending(flow) is None:
        slope = torch.zeros(flow.context_dim, flow.dim) if flow.context_dim else None
        flow = with_preprocess(flow, Preprocess(torch.zeros(flow.dim), torch.ones(flow.dim), slope).to(fixed.loc))
    bijection = flow.bijection
    assert isinstance(bijection, Compose)
    *inner, last = bijection.layers
    flow.mixture = DefendedBase(_composed(bijection, inner), mixture, fixed, share)
    flow.bijection = _composed(bijection, [last])
    if flow.recipe is not None:
        (kind, about), *around = flow.recipe.around
        noted = (kind, {**cast(_Mixture, about), "fixed": fixed.components})
        flow.recipe = replace(flow.recipe, around=(noted, *around))
    return flow


def without_fixed(flow: Flow) -> None:
    """Take the second mixture from a flow: the reverse of :func:`with_fixed`."""
    base = flow.mixture
    assert isinstance(base, DefendedBase)
    layers = [*cast(Compose, base.bijection).layers, *cast(Compose, flow.bijection).layers]
    flow.mixture, flow.bijection = base.mixture, _composed(flow.bijection, layers)
    if flow.recipe is not None:
        (kind, about), *around = flow.recipe.around
        known = {name: value for name, value in cast(_Mixture, about).items() if name != "fixed"}
        flow.recipe = replace(flow.recipe, around=((kind, known), *around))


def affine_of(flow: Flow) -> LowerTriangularAffine | DiagonalAffine | None:
    """Return the affine map that :func:`with_affine` put after a flow, if the flow ends in one."""
    last = flow.bijection
    last = last.layers[-1] if isinstance(last, Compose) else last
    return last if isinstance(last, (LowerTriangularAffine, DiagonalAffine)) else None


def begin_at(flow: Flow, loc: Tensor, sds: Tensor) -> None:
    """Do as :func:`start_at`, with a scale in standard deviations: those of the base's draws are another number."""
    start_at(flow, loc, _unit(flow) * sds)


def begun_at(flow: Flow) -> tuple[Tensor, Tensor]:
    """Return what :func:`begin_at` was given.

    Raises:
        ValueError: for a flow that does not end in an affine map.
    """
    affine = affine_of(flow)
    if affine is None:
        raise ValueError("flow: it does not end in an affine map.")
    scale = affine.scale_tril if isinstance(affine, LowerTriangularAffine) else affine.scale
    return affine.loc.clone(), scale / _unit(flow)


def _unit(flow: Flow) -> float:
    """Return the scale at which draws of the base have standard deviation 1."""
    return math.sqrt((flow.df - 2.0) / flow.df) if flow.base == "student_t" and flow.df > 2.0 else 1.0


@torch.no_grad()
def start_at(flow: Flow, loc: Tensor, scale: Tensor) -> None:
    """Set the fixed start m and L of the affine map (``scale``: (D,) or lower triangular (D, D)); b = 0, A = I."""
    affine = affine_of(flow)
    if affine is None:
        return
    checks.vector("loc", loc, affine.dim)
    if scale.shape not in ((affine.dim,), (affine.dim, affine.dim)):
        sizes = f"({affine.dim},) or ({affine.dim}, {affine.dim})"
        raise ValueError(f"scale: expected a tensor of shape {sizes}, got {tuple(scale.shape)}.")
    affine.loc.copy_(loc)
    if isinstance(affine, LowerTriangularAffine):
        affine.scale_tril.copy_(torch.diag(scale) if scale.dim() == 1 else scale)
    else:
        asked = flow.recipe is not None and ("affine", "diagonal") in flow.recipe.around
        affine.scale = (scale.diagonal() if asked and scale.dim() == 2 else scale).detach().to(affine.loc).clone()
    for parameter in affine.parameters():
        parameter.zero_()


def with_preprocess(flow: Flow, layer: Preprocess) -> Flow:
    """Make ``layer`` the last one of the flow, in the place of one of its kind, and note it in the flow's recipe."""
    about = ("preprocess", {"full": layer.full, "context": layer.slope is not None})
    recipe = flow.recipe
    if ending(flow) is not None:
        flow.bijection = _ending_replaced(flow.bijection, layer)
        flow.recipe = None if recipe is None else replace(recipe, around=(*recipe.around[:-1], about))
        return flow
    inner = flow.bijection
    flow.bijection = _composed(inner, [*(inner.layers if isinstance(inner, Compose) else [inner]), layer])
    flow.recipe = None if recipe is None else recipe.then(*about)
    return flow


def _ending_replaced(bijection: Bijection, layer: Preprocess) -> Bijection:
    if not isinstance(bijection, Compose):
        return layer
    stack = list(bijection.layers)
    return _composed(bijection, [*stack[:-1], _ending_replaced(stack[-1], layer)])


def _composed(before: Bijection, layers: list[Bijection]) -> Compose:
    """Compose layers, with the scale and the knots of the context that they had."""
    found = Compose(layers)
    if isinstance(before, Compose):
        found.context_scale, found.context_knots = before.context_scale, before.context_knots
    return found


def ending(flow: Flow) -> Preprocess | None:
    """Return the map to the scale of data that is the flow's last layer, if there is one."""
    last = flow.bijection
    while isinstance(last, Compose):
        last = last.layers[-1]
    return last if isinstance(last, Preprocess) else None


def blank(about: Mapping[str, object], flow: Flow) -> Preprocess:
    """Return a map to the scale of data that changes nothing: its numbers are read from a file."""
    loc = torch.zeros(flow.event_shape)
    scale = torch.eye(loc.numel()) if about["full"] else torch.ones_like(loc)
    return Preprocess(loc, scale, torch.zeros(flow.context_dim, loc.numel()) if about["context"] else None)


# changes of a flow ----------------------------------------------------------------------------------------------------


def set_df(flow: Flow, df: float) -> Flow:
    """Give the flow's base other tails, and note it in the recipe. Returns the flow."""
    flow.df = df
    flow.recipe = None if flow.recipe is None else flow.recipe.with_df(df)
    return flow
