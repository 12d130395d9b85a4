r"""Normal distributions whose precision matrix H couples no two rows of the largest site but through other sites.

The rows of that site are eliminated one by one. What is left is a dense matrix of the numbers of all other sites,
:math:`H_{22} - H_{21} H_{11}^{-1} H_{12}`, where :math:`H_{11}` has a block for each row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FACTORED = 4  # points that are factored at once
DENSE_PAIRS = 200  # times as long as the product of a pair of numbers takes each in a dense product


class Pattern:
    """Where H has entries, and how it is factored: the rows of the largest site one by one, and then what is left.

    Args:
        row, column: of the entries of the upper triangle of H.
        size: n.
        head: numbers that are eliminated, the first ones.
        width: numbers of one row of these.
        dense: whether links are multiplied as a dense matrix; by default, where this is faster.
    """

    def __init__(
        self, row: Tensor, column: Tensor, size: int, head: int, width: int, *, dense: bool | None = None
    ) -> None:
        self.row, self.column, self.size, self.head, self.width = row, column, size, head, width
        self.own = (column < head).nonzero()[:, 0]
        self.mixed = ((row < head) & (column >= head)).nonzero()[:, 0]
        self.rest = (row >= head).nonzero()[:, 0]
        tail = size - head
        of_row, of_tail = row[self.mixed] // width, column[self.mixed] - head
        links, self.link = torch.unique(of_row * max(tail, 1) + of_tail, return_inverse=True)
        self.link_row, self.link_tail = links // max(tail, 1), links % max(tail, 1)
        counts = torch.bincount(self.link_row, minlength=head // width)
        pairs = int(counts.square().sum())
        self.dense = head * tail**2 < DENSE_PAIRS * pairs * width if dense is None else dense
        if not self.dense:  # pairs of links of one row, each once
            starts = counts.cumsum(0) - counts
            of_link = counts[self.link_row]
            one = torch.arange(len(links), device=row.device).repeat_interleave(of_link)
            place = torch.arange(len(one), device=row.device) - (of_link.cumsum(0) - of_link).repeat_interleave(of_link)
            other = starts[self.link_row[one]] + place
            one, other = one[other <= one], other[other <= one]
            places = self.link_tail[one], self.link_tail[other]
            self.product, order = (torch.maximum(*places) * tail + torch.minimum(*places)).sort()  # memory in its order
            self.one, self.other = one[order], other[order]

    def drawn(self, center: Tensor, gradient: Tensor, entries: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return what standard normal noise (S, K, n) becomes, and its log densities, number by number."""
        found = []
        for piece in zip(*(part.split(FACTORED) for part in (center, gradient, entries, noise)), strict=True):
            own = self.normal(*piece[:3])
            density = -0.5 * piece[3].square() - 0.5 * math.log(2.0 * math.pi) - own.log_scales().unsqueeze(1)
            found.append((torch.stack([own.draw(one) for one in piece[3].unbind(1)], 1), density))
        return torch.cat([values for values, _ in found]), torch.cat([density for _, density in found])

    def normal(self, center: Tensor, gradient: Tensor, entries: Tensor) -> Normal:
        found = [self._factored(own) for own in entries]
        factors = Normal(self, center, *(torch.stack(parts) for parts in zip(*found, strict=True)))
        factors.mean = center + factors.solve(gradient)
        return factors

    def matrix(self, links: Tensor) -> Tensor:
        """Return links (links, width) as a dense matrix (head, tail)."""
        tail = self.size - self.head
        spread = links.new_zeros(self.head // self.width * tail, self.width)
        spread = spread.index_add(0, self.link_row * tail + self.link_tail, links).reshape(-1, tail, self.width)
        return spread.transpose(1, 2).reshape(-1, tail)

    def _factored(self, entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return inverse factors of the rows of the first site, links in their units, and the factor of the rest."""
        width, tail = self.width, self.size - self.head
        place = self.row[self.own] * width + self.column[self.own] % width
        upper = entries.new_zeros(self.head * width).index_add(0, place, entries[self.own]).reshape(-1, width, width)
        blocks = upper + upper.triu(1).mT
        place = self.link * width + self.row[self.mixed] % width
        links = entries.new_zeros(len(self.link_row) * width).index_add(0, place, entries[self.mixed])
        back = torch.linalg.solve_triangular(_root(blocks), torch.eye(width).to(blocks), upper=False)
        scaled = _times(back[self.link_row], links.reshape(-1, width))
        place = (self.column[self.rest] - self.head) * tail + self.row[self.rest] - self.head
        flat = entries.new_zeros(tail * tail).index_add(0, place, entries[self.rest])
        if self.dense:
            matrix = self.matrix(scaled)
            lower = flat.reshape(tail, tail) - (matrix.mT @ matrix).tril()
        else:
            products = sum(own[self.one] * own[self.other] for own in scaled.mT.contiguous())
            lower = flat.index_add(0, self.product, products, alpha=-1).reshape(tail, tail)
        return back, scaled, _root(lower + lower.tril(-1).mT if lower.requires_grad else lower)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices * vectors.unsqueeze(-2)).sum(-1)


def _root(matrices: Tensor) -> Tensor:
    """Return triangular factors, of which the lower triangle tells; NaN where there is none."""
    root, failed = torch.linalg.cholesky_ex(matrices)
    return torch.where((failed > 0)[..., None, None], torch.nan, root) if bool(failed.any()) else root


class Normal:
    """Normal distributions of u, one for each of S points, with means (S, n)."""

    def __init__(self, pattern: Pattern, center: Tensor, back: Tensor, links: Tensor, rest: Tensor) -> None:
        self.pattern, self.mean, self.back, self.links, self.rest = pattern, center, back, links, rest

    def solve(self, right: Tensor) -> Tensor:
        """Return the solutions of H x = right (S, n)."""
        head, tail = self._split(right)
        head = _times(self.back, head)
        tail = tail - self._to_tail(head)
        tail = torch.cholesky_solve(tail.unsqueeze(-1), self.rest)[..., 0]
        return self._joined(head - self._to_head(tail), tail)

    def draw(self, noise: Tensor) -> Tensor:
        """Return what standard normal noise (S, n) becomes."""
        head, tail = self._split(noise)
        tail = torch.linalg.solve_triangular(self.rest.mT, tail.unsqueeze(-1), upper=True)[..., 0]
        return self.mean + self._joined(head - self._to_head(tail), tail)

    def log_scales(self) -> Tensor:
        """Return the logarithms of the conditional standard deviations (S, n): their sum is half of -log det H."""
        head = self.back.diagonal(dim1=-2, dim2=-1).flatten(1)
        return torch.cat([head.log(), -self.rest.diagonal(dim1=-2, dim2=-1).log()], 1)

    def covariances(self) -> Tensor:
        """Return the covariances where H has entries (S, entries)."""
        return torch.stack([self._covariance(*parts) for parts in zip(self.back, self.links, self.rest, strict=True)])

    def _covariance(self, back: Tensor, links: Tensor, rest: Tensor) -> Tensor:
        pattern, tail = self.pattern, torch.cholesky_inverse(rest)
        if pattern.dense:
            whole = (pattern.matrix(links) @ tail).reshape(-1, pattern.width, len(tail))
            across = whole[pattern.link_row, :, pattern.link_tail]
        else:
            between = tail.reshape(-1)[pattern.product, None]
            twice = torch.where(pattern.one == pattern.other, 0.0, 1.0)[:, None] * between
            across = torch.zeros_like(links).index_add(0, pattern.one, links[pattern.other] * between)
            across = across.index_add(0, pattern.other, links[pattern.one] * twice)
        unit = torch.eye(pattern.width).to(back).expand_as(back)
        blocks = unit.index_add(0, pattern.link_row, across[:, :, None] * links[:, None])
        blocks = back.mT @ blocks @ back
        across = -_times(back.mT[pattern.link_row], across)
        row, column, found = pattern.row, pattern.column, rest.new_empty(len(pattern.row))
        own, mixed, left = pattern.own, pattern.mixed, pattern.rest
        found[own] = blocks[row[own] // pattern.width, row[own] % pattern.width, column[own] % pattern.width]
        found[mixed] = across[pattern.link, row[mixed] % pattern.width]
        found[left] = tail[column[left] - pattern.head, row[left] - pattern.head]
        return found

    def _split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        head, tail = values.split([self.pattern.head, self.pattern.size - self.pattern.head], 1)
        return head.reshape(len(values), -1, self.pattern.width), tail

    def _joined(self, head: Tensor, tail: Tensor) -> Tensor:
        """Return head, in units of its rows, and tail as one."""
        return torch.cat([_times(self.back.mT, head).flatten(1), tail], 1)

    def _to_tail(self, head: Tensor) -> Tensor:
        own = (self.links * head[:, self.pattern.link_row]).sum(-1)
        whole = own.new_zeros(len(own), self.pattern.size - self.pattern.head)
        return whole.index_add(1, self.pattern.link_tail, own)

    def _to_head(self, tail: Tensor) -> Tensor:
        own = self.links * tail[:, self.pattern.link_tail].unsqueeze(-1)
        whole = own.new_zeros(len(own), self.pattern.head // self.pattern.width, self.pattern.width)
        return whole.index_add(1, self.pattern.link_row, own)
