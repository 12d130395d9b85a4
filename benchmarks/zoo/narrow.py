"""Two normal distributions, the second one up to fifty times narrower, with sums computed or written by hand."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.zoo.case import Case, Maker, number_text
from benchmarks.zoo.shapes import Mixture, Written, random_gaussian


def _stable(terms: Tensor) -> Tensor:
    top = terms.amax(-1, keepdim=True)
    return top[..., 0] + torch.log(torch.exp(terms - top).sum(-1))


def _pair(terms: Tensor) -> Tensor:
    first, second = terms.unbind(-1)
    top = torch.maximum(first, second)
    return top + torch.log(torch.exp(first - top) + torch.exp(second - top))


def _log1p(terms: Tensor) -> Tensor:
    first, second = terms.unbind(-1)
    return torch.maximum(first, second) + torch.log1p(torch.exp(-(first - second).abs()))


def _plain(terms: Tensor) -> Tensor:
    first, second = terms.unbind(-1)
    return (first.exp() + second.exp()).log()


BY_HAND = {"stable sum": _stable, "stable pair": _pair, "log1p": _log1p, "plain sum": _plain}


class ByHand(Mixture):
    """A mixture whose sum is written by hand."""

    how = "stable pair"

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density (...) at x (..., D)."""
        return BY_HAND[self.how](self.joint(x))


def _case(maker: Maker, mixture: type[Mixture]) -> Case:
    dim, scale = maker.size(1, 20, 60), maker.log_uniform(0.1, 10.0)
    width, distance, mass = maker.log_uniform(0.02, 1.0), maker.uniform(2.0, 10.0), maker.uniform(0.1, 0.9)
    direction = maker.rng.standard_normal(dim)
    centre = scale * distance * direction / np.linalg.norm(direction)
    condition = maker.log_uniform(1.0, 3.0)
    places = ((np.zeros(dim), scale), (centre, scale * width))
    shapes = [random_gaussian(maker, dim, mean, size, condition) for mean, size in places]
    found = mixture(np.array([1.0 - mass, mass]), shapes)
    if isinstance(found, ByHand):
        found.how = maker.choice(list(BY_HAND))
    how = found.how if isinstance(found, ByHand) else "logsumexp"
    written = Written(maker, found, scale * (1.0 + distance))
    about = f"width {number_text(width)}, mass {mass:.2f}, {number_text(distance)} sds away"
    return Case(
        f"narrow mode of {about}, {how}, D = {dim}, {written.style}",
        written.model,
        written.draw,
        log_evidence=0.0,
        regions=written.regions(found),
    )


def computed(maker: Maker) -> Case:
    """A sum by ``torch.logsumexp``."""
    return _case(maker, Mixture)


def by_hand(maker: Maker) -> Case:
    """A sum by hand, in one of several forms."""
    return _case(maker, ByHand)


VARIANTS = (by_hand, computed, by_hand)
