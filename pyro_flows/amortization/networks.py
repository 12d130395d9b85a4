"""Encoders of data sets, a bijection that is conditional on what they make of the data, and the flow of one data set."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.recipe import Recipe
from pyro_flows.transforms import Bijection
from pyro_flows.transforms.fixed import Preprocess
from pyro_flows.transforms.networks import Free, Network

WIDTH = 64  # numbers that an encoder makes of a data set
HIDDEN = 128  # units of a hidden layer of an encoder
FLOW: Mapping[str, Any] = {"hidden": (64, 64), "activation": "relu", "network": "robust", "base": "student_t"}


def perceptron(entries: int, out: int = WIDTH) -> nn.Sequential:
    """Return a network of two hidden layers."""
    return nn.Sequential(
        nn.Linear(entries, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, out)
    )


class Pooled(nn.Module):
    r"""An encoder of sets: :math:`\rho(\frac1n \sum_i \phi(y_i))`, the same for rows in any order.

    Args:
        rows: how many rows a set has.
        sizes: how many numbers of a row each site has.

    Reference: Zaheer et al. 2017, *Deep Sets* (arXiv 1703.06114).
    """

    def __init__(self, rows: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.rows, self.sizes = rows, list(sizes)
        self.phi, self.rho = perceptron(sum(sizes)), perceptron(WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        """Return (K, WIDTH) for K sets, given as rows of their sites, one site after the other."""
        parts = features.split([self.rows * size for size in self.sizes], -1)
        sets = torch.cat([part.unflatten(-1, (self.rows, -1)) for part in parts], -1)
        found: Tensor = self.rho(self.phi(sets).mean(-2))
        return found


class Shaped(nn.Module):
    """An encoder of the caller's: it gets the data in the shape of their site, or a dict of these; 0 if missing."""

    def __init__(self, encoder: nn.Module, keep: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.encoder, self.keep = encoder, dict(keep)

    def forward(self, features: Tensor) -> Tensor:
        """Return what the encoder makes of data sets (K, n)."""
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
    """The trained flow, and the flow of one data set, which is an ordinary one.

    The context of a coupling enters its network by one linear layer, so that for one data set it is part of the bias.

    Args:
        inner: the flow as its builder made it.
        encoder: what makes its context of the data.
    """

    def __init__(self, inner: Flow, encoder: nn.Module, entries: int) -> None:
        self.recipe: Recipe = inner.recipe
        self.flow = Flow(Encoded(encoder, inner.bijection, entries), dim=inner.dim, base=inner.base, df=inner.df)
        self._plain: Flow | None = None

    def trained(self, flow: Flow) -> None:
        """Take the trained flow: its encoder and couplings, and the map to the scale of the latents after them."""
        self.flow = flow.eval().requires_grad_(False)
        self._plain = None

    def _parts(self) -> tuple[Encoded, Preprocess]:
        encoded, preprocess = self.flow.bijection.layers  # type: ignore[union-attr]
        return encoded, preprocess  # type: ignore[return-value]

    @torch.no_grad()
    def given(self, features: Tensor, dtype: torch.dtype) -> Flow:
        """Return the flow of one data set (n,), without a context."""
        encoded, preprocess = self._parts()
        features = features.to(preprocess.loc)
        context = encoded.encoder(features[None])[0]
        if self._plain is None:
            options = {**self.recipe.options, "context_dim": 0}
            around = ("preprocess", {"full": preprocess.full, "context": False})
            self._plain = replace(self.recipe, options=options).then(*around).build(self.flow.dim)
            self._plain.requires_grad_(False)
        found = copy.deepcopy(self._plain)
        *couplings, last = found.bijection.layers  # type: ignore[union-attr]
        for layer, own in zip(couplings, encoded.bijection.layers, strict=True):  # type: ignore[arg-type]
            _fold(own.conditioner, layer.conditioner, context)  # type: ignore[arg-type]
        last.load_state_dict({name: value for name, value in preprocess.state_dict().items() if name != "slope"})
        if preprocess.slope is not None:
            last.loc.add_(features @ preprocess.slope)
        return found.to(dtype)


def _fold(conditional: Free | Network, plain: Free | Network, context: Tensor) -> None:
    """Give a network without a context the weights of one with a context, at one value of it."""
    if isinstance(plain, Free):
        plain.values.copy_(conditional(None, context))
        return
    state = conditional.state_dict()
    weight, kept = state["layers.0.weight"], plain.layers[0].weight.shape[1]
    state["layers.0.bias"] = state["layers.0.bias"] + weight[:, kept:] @ context
    state["layers.0.weight"] = weight[:, :kept]
    plain.load_state_dict(state)
