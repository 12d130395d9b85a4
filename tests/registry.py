"""Every public transform and flow, with random parameters: what the invariants run over.

A new transform gets a line in ``TRANSFORMS``, a new flow builder one in ``FLOWS``; a test fails if either is missing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, wraps

import pytest
import torch
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows import transforms
from pyro_flows.flows import flow as flows
from pyro_flows.flows.recipe import BUILDERS
from pyro_flows.model.graphs import interpreter_is_built, recorder
from pyro_flows.transforms import masks

# What tests in many places have to know of the inside.
BASES = flows.BASES
RECORDED_FROM = recorder.RECORDED_FROM

CONTEXT = 3
HIDDEN = (6,)
DIMS = (1, 2, 3, 7)
SEED = 20240229


needs_interpreter = pytest.mark.skipif(
    not interpreter_is_built(), reason="no interpreter: install gcc, then pyro_flows again"
)


def randomize(module: nn.Module, *, sd: float, seed: int = 0) -> nn.Module:
    """Add normal noise to every parameter, by a generator of its own: no map stays the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((sd * noise).to(parameter.dtype))
    return module


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers by a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def built(build: Callable[[], nn.Module], *, dtype: torch.dtype, sd: float, seed: int) -> nn.Module:
    """Build with a seeded start, without touching the global generator; randomized if ``sd`` is above 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build().to(dtype)
    return randomize(module, sd=sd, seed=seed + 1) if sd else module


@dataclass(frozen=True)
class Case:
    """One transform: how to build it, the shape of an event, the width of its context."""

    name: str
    build: Callable[[], pf.transforms.Bijection]
    shape: tuple[int, ...]
    context_dim: int
    sd: float = 0.3
    closed: bool = True  # the inverse is a closed form
    identity: bool = True  # the map starts as the identity
    unit: bool = False  # inputs come from the unit interval, so that both ways take them
    family: str = ""  # the transform, with all its options and shapes: the cases of one test item

    @property
    def tolerance(self) -> float:
        """What a float64 inverse must reach: rounding of a closed form, or of a numeric root."""
        return 1e-9 if self.closed else 1e-7

    def make(self, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> pf.transforms.Bijection:
        """The transform with random parameters; in many dimensions with less noise, to stay well conditioned."""
        sd = self.sd if math.prod(self.shape) < 50 else 0.2 * self.sd
        return built(self.build, dtype=dtype, sd=sd, seed=seed)

    def start(self, *, dtype: torch.dtype = torch.float64) -> pf.transforms.Bijection:
        """The transform as its class builds it."""
        return built(self.build, dtype=dtype, sd=0.0, seed=0)

    def inputs(self, *batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
        """Points of the given batch shape, with a context for each."""
        x = 1.5 * normal(*batch, *self.shape, seed=11, dtype=dtype)
        x = torch.sigmoid(x) if self.unit else x
        return x, normal(*batch, self.context_dim, seed=12, dtype=dtype) if self.context_dim else None


def _affine(dim: int, context_dim: int) -> pf.transforms.LowerTriangularAffine:
    below = normal(dim, dim, seed=1, dtype=torch.float32).tril(-1)
    tril = 0.5 * below / dim**0.5 + torch.linspace(0.5, 2.0, dim).diag()
    return pf.transforms.LowerTriangularAffine(
        dim, loc=torch.linspace(-1.0, 1.0, dim), scale_tril=tril, context_dim=context_dim, hidden=HIDDEN
    )


def _diagonal(dim: int, context_dim: int) -> pf.transforms.DiagonalAffine:
    return pf.transforms.DiagonalAffine(
        dim,
        loc=torch.linspace(-1.0, 1.0, dim),
        scale=torch.linspace(0.5, 2.0, dim),
        context_dim=context_dim,
        hidden=HIDDEN,
    )


def _correlated(dim: int, context_dim: int) -> pf.transforms.DiagonalAffine:
    full = _affine(dim, 0)
    return pf.transforms.DiagonalAffine(
        dim, loc=full.loc, scale=full.scale_tril, context_dim=context_dim, hidden=HIDDEN
    )


def _mixed(dim: int, context_dim: int) -> pf.transforms.Compose:
    """Plain and conditional layers of every family, with each kind of mask."""
    options = {"context_dim": context_dim, "hidden": HIDDEN}
    return pf.transforms.Compose(
        [
            pf.transforms.Planar(dim, **options),
            pf.transforms.AffineCoupling(dim, mask=masks.alternating(dim, flip=True), **options),
            pf.transforms.Permutation(dim, seed=3),
            pf.transforms.AdditiveCoupling(dim, hidden=HIDDEN),
            pf.transforms.Rescale(dim),
            pf.transforms.Inverse(pf.transforms.AffineCoupling(dim, **options)),
            _affine(dim, 0),
        ]
    )


def _coupling(
    kind: type, mask: Callable[[int], Tensor] | None = None, **more
) -> Callable[[int, int], pf.transforms.Bijection]:
    def build(dim: int, context_dim: int) -> pf.transforms.Bijection:
        chosen = None if mask is None else mask(dim)
        return kind(dim, mask=chosen, context_dim=context_dim, hidden=HIDDEN, **more)

    return build


def _batch_norm(dim: int | tuple[int, ...]) -> pf.transforms.BatchNorm:
    """In eval mode, with running averages of some batch."""
    layer = pf.transforms.BatchNorm(dim)
    shape = (dim,) if isinstance(dim, int) else dim
    layer.inverse_and_ladj(1.0 + 2.0 * normal(16, *shape, seed=1, dtype=torch.float32))
    return layer.eval()


def _act_norm(dim: int | tuple[int, ...]) -> pf.transforms.ActNorm:
    layer = pf.transforms.ActNorm(dim)
    shape = (dim,) if isinstance(dim, int) else dim
    layer.start_from(1.0 + 2.0 * normal(16, *shape, seed=1, dtype=torch.float32))
    return layer


# A factory of (dim, context_dim), and what differs from the defaults of ``Case``.
TRANSFORMS: dict[str, tuple[Callable[[int, int], pf.transforms.Bijection], dict]] = {
    "ActNorm": (lambda d, c: pf.transforms.ActNorm(d), {}),
    "ActNorm-started": (lambda d, c: _act_norm(d), {"identity": False}),
    "AdditiveCoupling": (_coupling(pf.transforms.AdditiveCoupling), {}),
    "AdditiveCoupling-alternating": (
        _coupling(pf.transforms.AdditiveCoupling, masks.alternating, activation="elu"),
        {},
    ),
    "AdditiveCoupling-flipped": (_coupling(pf.transforms.AdditiveCoupling, lambda d: masks.half(d, flip=True)), {}),
    "AffineCoupling": (_coupling(pf.transforms.AffineCoupling), {}),
    "AffineCoupling-alternating": (_coupling(pf.transforms.AffineCoupling, masks.alternating, activation="tanh"), {}),
    "AffineCoupling-flipped": (_coupling(pf.transforms.AffineCoupling, lambda d: masks.half(d, flip=True)), {}),
    "AffineCoupling-random": (_coupling(pf.transforms.AffineCoupling, lambda d: masks.random(d, seed=5)), {}),
    "AffineCoupling-all": (_coupling(pf.transforms.AffineCoupling, lambda d: torch.zeros(d), log_scale_bound=0.5), {}),
    "AffineCoupling-residual": (_coupling(pf.transforms.AffineCoupling, network="residual"), {}),
    "AffineCoupling-robust": (_coupling(pf.transforms.AffineCoupling, network="robust"), {}),
    "BatchNorm": (lambda d, c: pf.transforms.BatchNorm(d).eval(), {}),
    "BatchNorm-started": (lambda d, c: _batch_norm(d), {"identity": False}),
    "Compose": (_mixed, {"sd": 0.15, "closed": False, "identity": False}),
    "DiagonalAffine": (lambda d, c: pf.transforms.DiagonalAffine(d, context_dim=c, hidden=HIDDEN), {}),
    "DiagonalAffine-correlated": (_correlated, {"identity": False}),
    "DiagonalAffine-started": (_diagonal, {"identity": False}),
    "Inverse": (lambda d, c: pf.transforms.Inverse(pf.transforms.AffineCoupling(d, context_dim=c, hidden=HIDDEN)), {}),
    "Inverse-Compose": (
        lambda d, c: pf.transforms.Inverse(_mixed(d, c)),
        {"sd": 0.15, "closed": False, "identity": False},
    ),
    "Inverse-Planar": (
        lambda d, c: pf.transforms.Inverse(pf.transforms.Planar(d, context_dim=c, hidden=HIDDEN)),
        {"closed": False},
    ),
    "LULinear": (lambda d, c: pf.transforms.LULinear(d), {"sd": 0.15}),
    "LULinear-permuted": (lambda d, c: pf.transforms.LULinear(d, seed=d), {"sd": 0.15, "identity": False}),
    "Logit": (lambda d, c: pf.transforms.Logit(d), {"identity": False, "unit": True}),
    "LowerTriangularAffine": (
        lambda d, c: pf.transforms.LowerTriangularAffine(d, context_dim=c, hidden=HIDDEN),
        {"sd": 0.15},
    ),
    "LowerTriangularAffine-started": (_affine, {"sd": 0.15, "identity": False}),
    "Permutation": (lambda d, c: pf.transforms.Permutation(d, seed=d), {"identity": False}),
    "Planar": (lambda d, c: pf.transforms.Planar(d, context_dim=c, hidden=HIDDEN), {"sd": 0.5, "closed": False}),
    "SinhArcsinh": (lambda d, c: transforms.SinhArcsinh(d, context_dim=c, hidden=HIDDEN), {}),
    "SplineCoupling": (_coupling(pf.transforms.SplineCoupling, bins=5, bound=2.0), {}),
    "SplineCoupling-all": (_coupling(pf.transforms.SplineCoupling, lambda d: torch.zeros(d), bins=3), {}),
    "SplineCoupling-alternating": (_coupling(pf.transforms.SplineCoupling, masks.alternating, activation="tanh"), {}),
    "Rescale": (lambda d, c: pf.transforms.Rescale(d, context_dim=c, hidden=HIDDEN), {}),
}


def _image(kind: type, mask: Callable | None = None, **more) -> Callable[[tuple, int], pf.transforms.Bijection]:
    def build(shape: tuple[int, ...], context_dim: int) -> pf.transforms.Bijection:
        chosen = None if mask is None else mask(shape)
        return kind(shape, mask=chosen, context_dim=context_dim, hidden=HIDDEN, **more)

    return build


def _nested(shape: tuple[int, ...], context_dim: int) -> pf.transforms.MultiScale:
    half = (shape[0] // 2, *shape[1:])
    mask = masks.checkerboard(half)
    coarse = pf.transforms.AffineCoupling(half, mask=mask, context_dim=context_dim, hidden=HIDDEN)
    return pf.transforms.MultiScale(pf.transforms.Compose([coarse, _act_norm(half)]))


def _squeezed(shape: tuple[int, ...], context_dim: int) -> pf.transforms.Compose:
    """There and back, with a layer in between: the cases keep their shape. By itself it is tested elsewhere."""
    deep = (4 * shape[0], shape[1] // 2, shape[2] // 2)
    layer = pf.transforms.AffineCoupling(deep, context_dim=context_dim, hidden=HIDDEN)
    return pf.transforms.Compose(
        [pf.transforms.Squeeze(shape), layer, _act_norm(deep), pf.transforms.Squeeze(shape).inv]
    )


def _rows(shape: tuple[int, ...]) -> Tensor:
    """A mask that is neither a checkerboard nor one of channels."""
    return torch.arange(math.prod(shape)).reshape(shape) // 2 % 3 == 0


def _every_other_channel(shape: tuple[int, ...]) -> Tensor:
    return (torch.arange(shape[0]) % 2 == 0)[:, None, None].expand(shape)


# The same for maps of images: a factory of (shape, context_dim).
IMAGE_TRANSFORMS: dict[str, tuple[Callable[[tuple, int], pf.transforms.Bijection], dict]] = {
    "ActNorm": (lambda s, c: pf.transforms.ActNorm(s), {}),
    "ActNorm-started": (lambda s, c: _act_norm(s), {"identity": False}),
    "AdditiveCoupling": (_image(pf.transforms.AdditiveCoupling), {}),
    "AdditiveCoupling-checkerboard": (
        _image(pf.transforms.AdditiveCoupling, masks.checkerboard, activation="tanh"),
        {},
    ),
    "AffineCoupling": (_image(pf.transforms.AffineCoupling), {}),
    "AffineCoupling-flipped": (_image(pf.transforms.AffineCoupling, lambda s: masks.channels(s, flip=True)), {}),
    "AffineCoupling-checkerboard": (_image(pf.transforms.AffineCoupling, masks.checkerboard), {}),
    "AffineCoupling-residual": (_image(pf.transforms.AffineCoupling, masks.checkerboard, network="residual"), {}),
    "AffineCoupling-robust-image": (_image(pf.transforms.AffineCoupling, network="robust"), {}),
    "AffineCoupling-dense": (_image(pf.transforms.AffineCoupling, masks.checkerboard, network="dense"), {}),
    "AffineCoupling-every-other-channel": (_image(pf.transforms.AffineCoupling, _every_other_channel), {}),
    "AffineCoupling-rows": (_image(pf.transforms.AffineCoupling, _rows), {}),
    "BatchNorm-started": (lambda s, c: _batch_norm(s), {"identity": False}),
    "Conv1x1": (lambda s, c: pf.transforms.Conv1x1(s), {"sd": 0.15}),
    "Conv1x1-permuted": (lambda s, c: pf.transforms.Conv1x1(s, seed=3), {"sd": 0.15, "identity": False}),
    "Logit": (lambda s, c: pf.transforms.Logit(s, alpha=0.01), {"identity": False, "unit": True}),
    "MultiScale": (_nested, {"identity": False}),
    "SplineCoupling": (_image(pf.transforms.SplineCoupling, bins=3, bound=2.0), {"sd": 0.1}),
    "SplineCoupling-checkerboard": (
        _image(pf.transforms.SplineCoupling, masks.checkerboard, bins=3, bound=2.0),
        {"sd": 0.1},
    ),
    "Squeeze-between": (_squeezed, {"identity": False}),
}

# The same for maps of signals (C, T), with a context of three frames.
SIGNAL_TRANSFORMS: dict[str, tuple[Callable[[tuple, int], pf.transforms.Bijection], dict]] = {
    "ActNorm-started": (lambda s, c: _act_norm(s), {"identity": False}),
    "AdditiveCoupling": (_image(pf.transforms.AdditiveCoupling, frames=3), {}),
    "AffineCoupling": (_image(pf.transforms.AffineCoupling, frames=3), {}),
    "AffineCoupling-flipped": (
        _image(pf.transforms.AffineCoupling, lambda s: masks.channels(s, flip=True), frames=3),
        {},
    ),
    "AffineCoupling-rows": (_image(pf.transforms.AffineCoupling, _rows, frames=3), {}),
    "BatchNorm-started": (lambda s, c: _batch_norm(s), {"identity": False}),
    "Conv1x1-permuted": (lambda s, c: pf.transforms.Conv1x1(s, seed=3), {"sd": 0.15, "identity": False}),
    "Logit": (lambda s, c: pf.transforms.Logit(s, alpha=0.01), {"identity": False, "unit": True}),
    "SplineCoupling": (_image(pf.transforms.SplineCoupling, bins=3, bound=2.0), {"sd": 0.1}),
}

# Builders with the options that the cases use; as registered, they do not warn of what they cannot bend.
FLOWS: dict[str, tuple[Callable[..., pf.Flow], dict]] = {
    "nice": (BUILDERS["nice"], {"layers": 4, "hidden": HIDDEN}),
    "planar": (BUILDERS["planar"], {"layers": 4, "hidden": HIDDEN}),
    "realnvp": (BUILDERS["realnvp"], {"layers": 4, "hidden": HIDDEN}),
    "spline": (BUILDERS["spline"], {"layers": 2, "hidden": HIDDEN, "bins": 4}),
}
IMAGE_FLOWS: dict[str, tuple[Callable[..., pf.Flow], dict]] = {
    "glow": (pf.glow, {"levels": 2, "layers": 2, "hidden": HIDDEN}),
    "multiscale_realnvp": (pf.multiscale_realnvp, {"levels": 2, "layers": 1, "hidden": HIDDEN}),
}
SIGNAL_FLOWS: dict[str, tuple[Callable[..., pf.Flow], dict]] = {
    "waveglow": (pf.waveglow, {"group": 2, "levels": 2, "frames": 3, "hidden": (6, 6)}),
}
BARE = ("Logit", "Permutation")  # transforms without parameters
NUMERIC = {"planar"}  # flows without a closed inverse
# Transforms that take no context.
NO_CONTEXT = {"ActNorm", "BatchNorm", "Conv1x1", "LULinear", "Logit", "Permutation"}


def make_flow(
    name: str, dim: int | tuple, *, context_dim: int = 0, sd: float = 0.15, dtype: torch.dtype = torch.float64, **more
) -> pf.Flow:
    """A flow of the registry with random parameters (``sd=0``: as it starts)."""
    builder, options = {**FLOWS, **IMAGE_FLOWS, **SIGNAL_FLOWS}[name]
    options = {**options, "context_dim": context_dim, **more}
    return built(lambda: builder(dim, **options), dtype=dtype, sd=sd, seed=dim if isinstance(dim, int) else dim[0])


def _bijection_of(name: str, dim: int | tuple, context_dim: int) -> pf.transforms.Bijection:
    return make_flow(name, dim, context_dim=context_dim, sd=0.0, dtype=torch.float32).bijection


def _cases(dims: tuple[int, ...]) -> list[Case]:
    cases = []
    for dim, context_dim in itertools.product(dims, (0, CONTEXT)):
        end = f"-{dim}" + ("-context" if context_dim else "")
        for name, (factory, more) in TRANSFORMS.items():
            if not (context_dim and name.split("-")[0] in NO_CONTEXT):
                build = partial(factory, dim, context_dim)
                cases.append(Case(name + end, build, (dim,), context_dim, family=name.split("-")[0], **more))
        for name in FLOWS:
            build = partial(_bijection_of, name, dim, context_dim)
            closed = name not in NUMERIC
            cases.append(Case(name + end, build, (dim,), context_dim, sd=0.15, closed=closed, family=name))
    return cases


def _image_cases(shapes: tuple[tuple[int, ...], ...]) -> list[Case]:
    cases = []
    for shape, context_dim in itertools.product(shapes, (0, CONTEXT)):
        end = "-" + "x".join(map(str, shape)) + ("-context" if context_dim else "")
        of_images = IMAGE_TRANSFORMS, IMAGE_FLOWS, "images"
        maps, flows, kind = of_images if len(shape) == 3 else (SIGNAL_TRANSFORMS, SIGNAL_FLOWS, "signals")
        for name, (factory, more) in maps.items():
            if not (context_dim and name.split("-")[0] in NO_CONTEXT):
                build, family = partial(factory, shape, context_dim), name.split("-")[0]
                cases.append(Case(name + end, build, shape, context_dim, family=f"{family} of {kind}", **more))
        for name in flows if shape[1] % 4 == 0 else ():
            build = partial(_bijection_of, name, shape, context_dim)
            cases.append(Case(name + end, build, shape, context_dim, sd=0.1, identity=False, family=name))
    return cases


IMAGE = (2, 4, 4)
SIGNAL = (2, 12)
SMALL = _cases(DIMS) + _image_cases((IMAGE, (4, 2, 4), SIGNAL))
TYPICAL = [case for case in SMALL if case.shape in ((3,), IMAGE, SIGNAL)]
LARGE = [case for case in _cases((100,)) if not case.context_dim]


def in_two_dimensions(case: Case) -> bool:
    """Cases that are slow in most tests: three dimensions say as much."""
    return case.shape == (2,)


def is_not_typical(case: Case) -> bool:
    """Cases that are slow in tests of what does not depend on the number of coordinates."""
    return case not in TYPICAL


def each(cases: Iterable[Case], slow: Callable[[Case], bool] = in_two_dimensions) -> Callable:
    """Run a test on cases, one test item for all options and shapes of a transform; a failure names the case.

    The generator starts anew for each case, as it does for each test.
    """
    groups: dict[tuple[str, bool], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.family, slow(case)), []).append(case)

    def decorate(test: Callable) -> Callable:
        @wraps(test)
        def on_all(case: list[Case], **more) -> None:
            for one in case:
                torch.manual_seed(SEED)
                try:
                    test(case=one, **more)
                except BaseException as error:
                    error.add_note(f"in the case {one.name}")
                    raise

        marks = {True: pytest.mark.slow, False: ()}
        items = [
            pytest.param(group, id=name + "-slow" * dear, marks=marks[dear]) for (name, dear), group in groups.items()
        ]
        return pytest.mark.parametrize("case", items)(on_all)

    return decorate


def unregistered() -> set[str]:
    """Names of public transforms and of flow builders that no case covers."""
    public = {name for name in transforms.__all__ if _is_bijection(getattr(transforms, name))}
    covered = {type(case.start()).__name__ for case in SMALL} | {case.name.split("-")[0] for case in SMALL}
    return (public - covered) | (BUILDERS.keys() - FLOWS.keys() - IMAGE_FLOWS.keys() - SIGNAL_FLOWS.keys())


def _is_bijection(value: object) -> bool:
    return (
        isinstance(value, type) and issubclass(value, pf.transforms.Bijection) and value is not pf.transforms.Bijection
    )
