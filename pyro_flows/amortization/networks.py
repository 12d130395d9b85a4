"""Encoders of data sets, a bijection that is conditional on them, and the flow of one data set."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyro_flows.densities.standardizing import DEPENDENT
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.recipe import Recipe, set_df
from pyro_flows.inference.verdict.weighing import tempered
from pyro_flows.support.files.bundles import Entries
from pyro_flows.support.process.seeding import seeded
from pyro_flows.transforms import Bijection, Compose, DiagonalAffine, LowerTriangularAffine, SinhArcsinh
from pyro_flows.transforms.fixed import Preprocess
from pyro_flows.transforms.networks import Free, Network

Module = TypeVar("Module", bound=nn.Module)

WIDTH = 64  # numbers that an encoder makes of a data set
SIMULATIONS_EACH = 10  # for each principal component of the data, at least
HIDDEN = 128  # units of a hidden layer of an encoder
TRIANGULAR_UP_TO = 50  # dimensions in which the affine map of the data is triangular; diagonal above
FLOW: Entries = {"hidden": (64, 64), "activation": "relu", "network": "robust"}
BASE: Entries = {"base": "student_t", "df": 7.0}  # of the training
DF = 5.0  # of the draws: those of the training fit the bulk, and weights need tails that are a little heavier


def perceptron(entries: int, out: int = WIDTH) -> nn.Sequential:
    """Return a network of two hidden layers."""
    return nn.Sequential(
        nn.Linear(entries, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, out)
    )


class Sorted(nn.Module):
    """Rows of one number each in ascending order: the same for rows in any order."""

    def forward(self, features: Tensor) -> Tensor:
        return features.sort(-1).values


class Whitened(nn.Module):
    r"""Data u, and their principal components x, each on a scale of its own, as a direction and a log length.

    .. math:: x = \Lambda^{-1/2} V^\top (u - m), \qquad r = \|x\| / \sqrt{n}, \qquad (u, x / r, \log r)

    Most of the variance of simulated data is that of the signal, which the prior lets vary. The scale of the noise, and
    so the width of the posterior, shows in components of little variance, and takes values of several powers of ten.
    Components that are rounding error are 0, and so are those of least variance beyond one for each
    ``SIMULATIONS_EACH`` simulations, since their variance is not known.
    """

    loc: Tensor
    matrix: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        loc = features.mean(0)
        away = (features - loc).double()
        variance, vectors = torch.linalg.eigh(away.mT @ away / len(away))
        known = variance > DEPENDENT * variance.amax()
        known[: max(len(known) - len(features) // SIMULATIONS_EACH, 0)] = False  # variances ascend
        factor = torch.where(known, variance.abs().rsqrt(), 0.0)
        self.register_buffer("loc", loc)
        self.register_buffer("matrix", (vectors * factor).to(features))

    def forward(self, features: Tensor) -> Tensor:
        """Return (K, 2 n + 1) for K data sets (K, n)."""
        x = (features - self.loc) @ self.matrix
        r = x.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(x.dtype).eps)
        return torch.cat([features, x / r, r.log()], -1)


class Pooled(nn.Module):
    r"""An encoder of sets of ``rows`` rows: :math:`\rho(\frac1n \sum_i \phi(y_i))`, the same for rows in any order.

    Each site has ``sizes`` numbers of a row. Reference: Zaheer et al. 2017, *Deep Sets* (arXiv 1703.06114).
    """

    def __init__(self, rows: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.rows, self.sizes = rows, list(sizes)
        self.phi, self.rho = perceptron(sum(sizes)), perceptron(WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        """Return (K, WIDTH) for K sets, given as rows of their sites, one site after the other."""
        parts = features.split([self.rows * size for size in self.sizes], -1)
        sets = torch.cat([part.unflatten(-1, (self.rows, -1)) for part in parts], -1)
        return self.rho(self.phi(sets).mean(-2))


class Shaped(nn.Module):
    """An encoder of the caller's: it gets the data in the shape of their site, or a dict of these; 0 if missing."""

    def __init__(self, encoder: nn.Module, keep: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.encoder, self.keep = encoder, dict(keep)

    def forward(self, features: Tensor) -> Tensor:
        parts, sites = features.split([int(keep.sum()) for keep in self.keep.values()], -1), {}
        for part, (name, keep) in zip(parts, self.keep.items(), strict=True):
            sites[name] = features.new_zeros(len(features), *keep.shape)
            sites[name][:, keep] = part
        found = self.encoder(next(iter(sites.values())) if len(sites) == 1 else sites)
        if not torch.is_tensor(found) or found.dim() != 2 or len(found) != len(features):
            got = tuple(found.shape) if torch.is_tensor(found) else type(found).__name__
            raise ValueError(f"encoder: expected a tensor of shape ({len(features)}, width), got {got}.")
        return found


class Encoded(Bijection):
    """A conditional bijection whose context is what an encoder makes of the data."""

    def __init__(self, encoder: nn.Module, bijection: Bijection, entries: int) -> None:
        super().__init__()
        self.encoder, self.bijection, self.context_dim = encoder, bijection, entries
        self.event_dim = bijection.event_dim

    @property
    def event_shape(self) -> torch.Size | None:
        return self.bijection.event_shape

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert context is not None
        return self.bijection.forward_and_ladj(x, self.encoder(context))

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert context is not None
        return self.bijection.inverse_and_ladj(y, self.encoder(context))


class Conditional:
    r"""The flow to train, :math:`z = m + B u + S\,(b(h) + A(h)\, t(f(\epsilon; h)))`, and the flow of one data set.

    f are couplings, as a builder made them, whose context is h(u), what an encoder makes of the data u; t are tails of
    each coordinate; a network gives the affine map b, A of h. m, B and S, the linear regression of the latents on the
    data and what it leaves, are measured. For one data set this is an ordinary flow: the context enters the network of
    a coupling by one linear layer, so that it is part of the bias there, and all that depends on the data alone is a
    constant.
    """

    def __init__(self, inner: Flow, encoder: nn.Module, entries: int) -> None:
        dim, width = inner.dim, inner.context_dim
        self.affine = "tril" if dim <= TRIANGULAR_UP_TO else "diagonal"
        kind = LowerTriangularAffine if self.affine == "tril" else DiagonalAffine
        self.recipe: Recipe = inner.recipe
        stack = [inner.bijection, SinhArcsinh(dim), kind(dim, context_dim=width, hidden=FLOW["hidden"])]
        self.flow = Flow(Encoded(encoder, Compose(stack), entries), dim=dim, base=inner.base, df=inner.df)
        self._plain: Flow | None = None

    def trained(self, flow: Flow) -> None:
        """Take the trained flow, which ends in the map to the scale of the latents, and give its base heavier tails."""
        self.flow, self._plain = set_df(flow.eval().requires_grad_(False), DF), None
        self.recipe = self.recipe.with_df(DF)

    @torch.no_grad()
    def given(self, features: Tensor, dtype: torch.dtype) -> Flow:
        """Return the flow of one data set (n,), without a context."""
        encoded, scale = _layers(self.flow.bijection)
        features = features.to(scale.loc)
        context = encoded.encoder(features[None])[0]
        couplings, _, affine = _layers(encoded.bijection)
        found = _cloned(self._without_context())
        own_couplings, _, own_affine, own_scale = _layers(found.bijection)
        for layer, own in zip([*_layers(couplings), affine], [*_layers(own_couplings), own_affine], strict=True):
            _fold(layer.conditioner, own.conditioner, context)
        own_scale.loc = scale.loc + features @ scale.slope
        return found if scale.loc.dtype == dtype else found.to(dtype)

    def _without_context(self) -> Flow:
        """Return the flow at a context of zeros, to which that of a data set is added."""
        if self._plain is None:
            encoded, scale = _layers(self.flow.bijection)
            couplings, tails, _ = _layers(encoded.bijection)
            options = {**self.recipe.options, "context_dim": 0}
            around = (("affine", self.affine), ("preprocess", {"full": True, "context": False}))
            with seeded(0):
                plain = replace(self.recipe, options=options, around=around).build(self.flow.dim)
            plain = plain.to(scale.loc).requires_grad_(False)
            own_couplings, own_tails, _, own_scale = _layers(plain.bijection)
            for layer, own in zip(_layers(couplings), _layers(own_couplings), strict=True):
                state, first = layer.conditioner.state_dict(), "layers.0.weight"
                if isinstance(own.conditioner, Network):
                    state[first] = state[first][:, : _layers(own.conditioner)[0].in_features]
                    own.conditioner.load_state_dict(state)
            own_tails.load_state_dict(tails.state_dict())
            place(own_scale, scale.loc, scale.scale.diag())
            self._plain = plain
        return self._plain


def _fold(conditional: Free | Network, plain: Free | Network, context: Tensor) -> None:
    """Add what a context contributes to a network, of its first layer, to the bias there."""
    if isinstance(plain, Free):
        plain.values.copy_(conditional(None, context))
        return
    first, own = _layers(conditional)[0], _layers(plain)[0]
    own.bias.add_(first.weight[:, own.in_features :] @ context)


def place(last: Preprocess, loc: Tensor, scale: Tensor) -> None:
    """Give the last map of a flow another place (D,) and matrix (D, D)."""
    last.load_state_dict(Preprocess(loc, scale).state_dict())


@torch.no_grad()
def matched(flow: Flow, z: Tensor, log_weights: Tensor) -> Flow:
    r"""Return the base of a flow at the weighted mean and covariance of draws z (S, D), in the form of that flow.

    The weights are :math:`w^a`: a is 1, or as much less as leaves a tenth of the draws effective. The same flow comes
    back where no weight is finite, or where the covariance has no root.

    Reference: Cappé et al. 2008, "Adaptive importance sampling in general mixture classes" (arXiv 0710.4242), with one
    component.
    """
    usable = torch.isfinite(log_weights)
    if not bool(usable.any()):
        return flow
    z, log_weights = z[usable].double(), log_weights[usable]
    weights = torch.softmax(tempered(log_weights) * log_weights, 0)
    mean = weights @ z
    away, df = z - mean, float(flow.df)
    root, fault = torch.linalg.cholesky_ex((df - 2.0) / df * (weights[:, None] * away).mT @ away)
    if int(fault) or not bool(torch.isfinite(root).all()):
        return flow
    found = _cloned(flow)
    for parameter in found.parameters():
        parameter.zero_()  # all layers but the last are the identity then
    last = _layers(found.bijection)[-1]
    place(last, mean.to(last.loc), root.to(last.loc))
    return found


def _layers(module: Any) -> list[Any]:
    return list(module.layers)


def _cloned(module: Module) -> Module:
    """Return a copy of a module with tensors of its own; ``copy.deepcopy`` takes twenty times as long."""
    new = copy.copy(module)
    vars(new).update(  # what sets attributes of a module looks at each of them, which takes as long as all else
        _parameters={name: _own(value) for name, value in module._parameters.items()},
        _buffers={name: None if value is None else value.clone() for name, value in module._buffers.items()},
        _modules={name: None if child is None else _cloned(child) for name, child in module._modules.items()},
    )
    return new


def _own(value: nn.Parameter | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
