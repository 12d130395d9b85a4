r"""Latents whose data are in other plates, such as students and lecturers of ratings: one sparse normal distribution.

Write u for the unconstrained values of these latents, and :math:`\theta` for the other ones. Each term t of the log
density, a row of the data or of a prior, reads at most one row of each site: :math:`\ell_t(u_{s(t)}, u_{l(t)}, \dots)`.
Which row it is follows from two directional derivatives, along ones and along the rows' numbers. Their ratio is the
number of the row. Two more derivatives of a term, along shifts of whole sites, are then its gradient and its curvature.
They are added up over all rows of the data, by minibatches:

.. math:: \log p(u, y \mid \theta) \approx \text{const} + g^\top (u - u_0) - \tfrac12 (u - u_0)^\top H (u - u_0).

H couples no two rows of one site but through others. So the largest site is eliminated row by row, and what is left is
a dense matrix of the rows of the other sites. This is exact where all is normal, and Laplace's approximation elsewhere.

Where all is normal, second differences of the terms are their derivatives, and the density of the globals has a closed
form. Its gradient is that of the expected log joint density (Fisher's identity), with u's moments held fixed:

.. math:: \nabla_\theta \log p(\theta, y) = \nabla_\theta \Big[ \log p(u_0) + g^\top s
          - \tfrac12 \operatorname{tr} H (s s^\top + H_0^{-1}) \Big], \qquad s = H_0^{-1} g_0.

So it takes entries of the inverse where H has some, and no derivative of a factor. Elsewhere the density is estimated
by K draws of u, in pairs that mirror each other at the mode,

.. math:: \hat p(\theta) = \frac1K \sum_k p(\theta, u_k, y) / q(u_k \mid \theta),

whose noise depends on :math:`\theta` alone. Weights of :math:`\theta` have that noise, so their k-hat judges q too.

Sources: Rue, Martino and Chopin 2009, doi:10.1111/j.1467-9868.2008.00700.x; Papaspiliopoulos, Roberts and Zanella 2020
(doi:10.1093/biomet/asz058), for crossed designs; Andrieu and Roberts 2009, doi:10.1214/07-AOS574.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp
from torch.nn.functional import pad

from pyro_flows.guides.conditional import Conditional, Rows
from pyro_flows.guides.parts import parts_of
from pyro_flows.guides.runs import at_values, beginning, of_prior
from pyro_flows.guides.sparse_normal import Normal, Pattern
from pyro_flows.model.batching import batch, quiet
from pyro_flows.model.sites import Site, messages, vectorized
from pyro_flows.support.process.seeding import derive, seeded

MOST_DENSE = 3000  # rows of all sites but the largest: their matrix is factored for each value of the globals
AT_ONCE = 4_000_000  # numbers: derivatives of the terms at several points
FARTHEST = 3.0  # log factor of curvatures
DIGIT = 1024  # rows are numbered by digits, so that single precision tells them apart
JITTER = 0.3  # of the point at which it is found which rows are read
MOST_STEPS, NEAR = 40, 1e-3  # Newton steps; gain in nats at which they end
TRIES = 3  # prior draws from which second modes are sought, and by which it is found which rows are read
FAR = 3.0  # times as far from the start as these draws

Look = Callable[[], object]
_Derived = tuple[tuple[Tensor, ...], ...]  # values, slopes and bends of each term


class Term(NamedTuple):
    """The rows of one site of a run, and what they read."""

    subsampled: bool  # whether a run has a part of the rows
    reads: list[tuple[int, Tensor, Tensor]]  # for each number of a row, the places in u, and which rows read one


class Crossed:
    """The terms of a model by which its latents in plates depend on each other, as read at globals z (D,).

    Raises:
        ValueError: if latents are in subsampled plates, terms read several rows of a site, there are too many rows
            besides those of the largest site, or Newton steps from the start do not lead to a maximum.
        Exception: of any kind, from models that ``torch.func.vmap`` cannot batch.
    """

    quadratic = False  # until it is known

    def __init__(self, rows: Rows, z: Tensor, seed: int = 0) -> None:
        self.rows = rows
        at = rows.run(z, beginning, {})
        if at.given:
            raise ValueError(f"all rows of plate {next(iter(at.given))!r} are needed at first")
        self.sites = sorted(at.locals.values(), key=lambda site: -site.value.numel())
        for site in self.sites:
            if any(name in at.drawn for name in site.plates):
                raise ValueError(f"site {site.name!r} is in a subsampled plate")
        self.first = Conditional(self.sites, [], at)
        counts = [site.value.numel() for site in self.sites]
        self.size, self.head = sum(counts), counts[0]  # numbers of all sites, and of the one that is eliminated
        if self.size - self.head > MOST_DENSE:
            raise ValueError(f"{self.size - self.head} numbers besides those of the largest site, at most {MOST_DENSE}")
        sizes = [site.size for site in self.sites]
        places = zip(counts, sizes, range(len(sizes)), strict=True)
        owners = [torch.arange(count) % size + sum(sizes[:place]) for count, size, place in places]
        self.owner = torch.cat(owners).to(z.device)  # which number of a row each one is
        self.numbers = sum(sizes)
        self.mode = torch.cat([site.value.detach().flatten() for site in self.sites])
        parts = parts_of(self.first, seed, None)
        self._chosen = {name: torch.stack([part.chosen[name] for part in parts]) for name in at.drawn}
        fresh = {name: torch.stack([part.fresh[name] for part in parts]) for name in at.drawn}
        nodes = messages(at.trace)
        self._weights = {name: self._weight(nodes[name], fresh) for name in at.densities()}
        with quiet():
            self._read(z)
            if not bool(torch.isfinite(self.normal(z[None]).mean).all()):
                raise ValueError("no normal distribution is near: curvatures are not those of a maximum")

    # what is read ----------------------------------------------------------------------------------------------------

    def _weight(self, site: Site, fresh: Mapping[str, Tensor]) -> Tensor | None:
        """Return how often the rows of a site count in each part; None if all parts have the same rows."""
        drawn = [frame for frame in vectorized(site) if frame.name in fresh]
        if not drawn:
            return None
        if len(drawn) > 1:
            names = [frame.name for frame in drawn]
            raise ValueError(f"site {site['name']!r}: expected at most one subsampled plate, got {names}")
        (frame,) = drawn
        own = fresh[frame.name].reshape(-1, frame.size, *[1] * (-1 - frame.dim)).double()
        return own * (frame.size / frame.full_size)

    def split(self, u: Tensor) -> dict[str, Tensor]:
        """Return values (..., n) by site, each (..., *batch, *event)."""
        pairs = zip(self.sites, u.split([site.value.numel() for site in self.sites], -1), strict=True)
        return {site.name: part.reshape(*part.shape[:-1], *site.value.shape) for site, part in pairs}

    def _densities(self, z: Tensor, u: Tensor, *, kept: bool | None = None) -> tuple[Tensor, ...]:
        """Return the weighed log densities of each site at a point, each (rows,): minibatches are mapped.

        Without the terms that are ``kept``, one minibatch will do.
        """

        def part(chosen: dict[str, Tensor]) -> dict[str, Tensor]:
            return self.rows.run(z, at_values(self.split(u)), chosen, through=True).densities(exact=True)

        every = bool(self._chosen) and kept is not False
        first = {name: chosen[0] for name, chosen in self._chosen.items()}
        found = batch(part)(self._chosen) if every else part(first)
        terms = []
        for name, weight in self._weights.items():
            own = found[name]
            if weight is None:
                own = own[0] if every else own
            elif kept is not False:
                own = own * weight.reshape(len(weight), *[1] * (own.dim() - weight.dim()), *weight.shape[1:])
            terms.append(own.flatten())
        return tuple(terms)

    def _read(self, z: Tensor) -> None:
        """Find which rows each term reads, and the places of all pairs of numbers in H."""
        generator = torch.Generator().manual_seed(0)
        u = self.mode + JITTER * torch.randn(self.size, generator=generator).to(self.mode)
        far = [self.mode + FAR * (self._of_prior(z, number) - self.mode) for number in range(TRIES)]
        tangents, signs, offset = [], [], 0
        for site in self.sites:
            row = torch.arange(site.value.numel(), device=u.device) // site.size
            signs.append(2.0 * torch.randint(2, (int(row[-1]) + 1,), generator=generator).to(u) - 1.0)
            for own in (torch.ones_like(row), row // DIGIT, row % DIGIT, signs[-1][row]):
                tangents.append(pad(own.to(u), (offset, self.size - offset - len(row))))
            offset += len(row)
        self._terms = self._terms_of(z, u, torch.stack(tangents), signs)
        for at in far:  # a term may read a row on one side of a corner only
            self._terms = list(map(_together, self._terms, self._terms_of(z, at, torch.stack(tangents), signs)))
        keys = []  # of each term: the places in H, row times n plus column, of all pairs of numbers that it reads
        for term in self._terms:
            pairs = [(one, own[1]) for at, (_, one, _) in enumerate(term.reads) for own in term.reads[: at + 1]]
            found = [torch.minimum(*pair) * self.size + torch.maximum(*pair) for pair in pairs]
            keys.append(torch.cat([torch.zeros(0, dtype=torch.long, device=z.device), *found]))
        unique, inverse = torch.unique(torch.cat(keys), return_inverse=True)
        self._slots = inverse.split([len(own) for own in keys])
        self.pattern = Pattern(unique // self.size, unique % self.size, self.size, self.head, self.sites[0].size)
        self._reach = self._lengths(z, u)
        self.quadratic = self._is_quadratic(z, u, far)

    def _of_prior(self, z: Tensor, number: int, seed: int = 0) -> Tensor:
        """Return a draw of the prior (n,)."""
        with seeded(derive(seed, f"crossed modes {number}"), z.device):
            drawn = self.rows.run(z, of_prior, self.first.at.chosen).locals
        return torch.cat([drawn[site.name].value.detach().flatten() for site in self.sites])

    def _is_quadratic(self, z: Tensor, u: Tensor, far: Sequence[Tensor]) -> bool:
        """Whether curvature is the same farther out, and tells the gradient there and on the other side of the start.

        Each number is compared in its own unit: beside one with many rows, others would be lost. The gradient tells of
        densities with a corner, and of even ones, whose curvature is the same at points that mirror each other.
        """
        first, own = (part[0] for part in self.assemble(z[None], u[None])[1:])
        near, row, column = torch.finfo(u.dtype).eps ** 0.5, self.pattern.row, self.pattern.column
        alone = row == column
        unit = own.new_zeros(self.size).index_add(0, row[alone], own[alone].abs()).sqrt()

        def product(entries: Tensor, step: Tensor) -> Tensor:
            found = torch.zeros_like(step).index_add(0, row, entries * step[column])
            return found.index_add(0, column, torch.where(alone, 0.0, entries * step[row]))

        for at in (2.0 * u - self.mode, 2.0 * self.mode - u, *far):
            slope, entries = (part[0] for part in self.assemble(z[None], at[None])[1:])
            step = (at - u).double()
            bound = near * (product(own.abs(), step.abs()) + first.abs() + slope.abs())
            told = (slope - first + product(own, step)).abs() <= bound
            if not bool(told.all() & ((own - entries).abs() <= near * unit[row] * unit[column]).all()):
                return False
        return True

    def _lengths(self, z: Tensor, u: Tensor) -> Tensor:
        """Return by how much each number of a row has to move for a usual term to change by half a nat."""
        found: list[list[Tensor]] = [[] for _ in range(self.numbers)]
        for term, bend in zip(self._terms, self._derived(z[None], u[None], None)[2], strict=True):
            for k, _, read in term.reads:
                found[k].append(bend[0, k * (k + 3) // 2][read].abs())
        usual = torch.stack([torch.cat(own).median() if own else u.new_ones(()) for own in found])
        return torch.where(usual > 0.0, usual.rsqrt(), 1.0)

    def _terms_of(self, z: Tensor, u: Tensor, tangents: Tensor, signs: Sequence[Tensor]) -> list[Term]:
        """Return the terms with the rows that they read, from derivatives along tangents, four for each site."""

        def along(tangent: Tensor) -> tuple[Tensor, ...]:
            return jvp(lambda values: self._densities(z, values), (u,), (tangent,))[1]

        terms = [Term(weight is not None, []) for weight in self._weights.values()]
        for term, slopes in zip(terms, batch(along)(tangents), strict=True):
            offset = start = 0
            for site, sign, own in zip(self.sites, signs, slopes.double().split(4), strict=True):
                one, high, low, signed = own
                read = torch.isfinite(one) & ((one != 0.0) | (signed != 0.0))
                if bool(read.any()):
                    safe = torch.where(one != 0.0, one, 1.0)
                    row = torch.where(read, (DIGIT * (high / safe).round() + (low / safe).round()).long(), 0)
                    known = (row >= 0) & (row < len(sign))
                    expected = one * sign.double()[torch.where(known, row, 0)]
                    known &= (signed - expected).abs() <= 1e-3 * torch.maximum(one.abs(), signed.abs())
                    if not bool(known[read].all()):
                        raise ValueError(f"several rows of site {site.name!r} are read together")
                    term.reads.extend((start + k, offset + row * site.size + k, read) for k in range(site.size))
                offset, start = offset + site.value.numel(), start + site.size
        return terms

    # derivatives -----------------------------------------------------------------------------------------------------

    @property
    def written(self) -> int:
        """How many second derivatives of terms there are at a point."""
        rows = sum(len(term.reads[0][1]) if term.reads else 1 for term in self._terms)
        return self.numbers * (self.numbers + 1) // 2 * rows

    @property
    def at_once(self) -> int:
        """How many points are taken together."""
        return max(1, AT_ONCE // self.written)

    def assemble(
        self, z: Tensor, u: Tensor, *, kept: bool | None = None, look: Look = lambda: None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log density (S,), its gradient g (S, n), and the entries of H (S, entries) at z (S, D), u (S, n).

        They are those of terms in plates that are subsampled (``kept`` is True), of others (False), or of all (None).
        """
        look()
        height = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        first, second = [height.new_zeros(len(z), 0)], [height.new_zeros(len(z), 0)]  # no such term may read any
        places, slots = [self.owner[:0]], [self.owner[:0]]
        with quiet():
            derived = (self._differences if self.quadratic else self._derived)(z, u, kept)
        for term, own, value, slope, bend in zip(self._terms, self._slots, *derived, strict=True):
            if kept is not None and kept != term.subsampled:
                continue
            height = height + value.sum(1)
            for before, (k, where, read) in enumerate(term.reads):
                first.append(torch.where(read, slope[:, k], 0.0))
                places.append(where)
                for j, _, also in term.reads[: before + 1]:
                    second.append(torch.where(read & also, -bend[:, k * (k + 1) // 2 + j], 0.0))
            slots.append(own)
        gradient = height.new_zeros(len(z), self.size).index_add(1, torch.cat(places), torch.cat(first, 1))
        entries = height.new_zeros(len(z), len(self.pattern.row))
        return height, gradient, entries.index_add(1, torch.cat(slots), torch.cat(second, 1))

    def _derived(self, z: Tensor, u: Tensor, kept: bool | None) -> _Derived:
        """Return the terms, and their derivatives along shifts of whole sites: (S, rows), (S, numbers or pairs, rows).

        Pairs are those of a lower triangle.
        """
        unit = torch.eye(self.numbers, dtype=u.dtype, device=u.device)
        one, other = torch.tril_indices(self.numbers, self.numbers)

        def single(row: Tensor, base: Tensor) -> _Derived:
            def values(shift: Tensor) -> tuple[Tensor, ...]:
                return self._densities(row, base + shift[self.owner], kept=kept)

            def bent(along: Tensor, also: Tensor) -> _Derived:
                return jvp(lambda shift: _along(values, shift, along), (torch.zeros_like(along),), (also,))

            return values(torch.zeros_like(unit[0])), *batch(bent)(unit[one], unit[other])

        values, slopes, bends = batch(single)(z, u)
        alone = (one * (one + 1) // 2).unique()  # of the pairs, those with the first number
        found = values, [own[:, alone] for own in slopes], bends
        return tuple(tuple(part.double() for part in parts) for parts in found)

    def _differences(self, z: Tensor, u: Tensor, kept: bool | None) -> _Derived:
        """Return what :meth:`_derived` does, where terms are quadratic: from values at a few shifts, for a tenth."""
        reach = self._reach
        unit = torch.diag(reach)
        one, other = torch.tril_indices(self.numbers, self.numbers)
        shifts = torch.cat([torch.zeros_like(unit[:1]), unit, unit[one] + unit[other]])

        def single(row: Tensor, base: Tensor) -> tuple[Tensor, ...]:
            return batch(lambda shift: self._densities(row, base + shift[self.owner], kept=kept))(shifts)

        values, slopes, bends = [], [], []
        square = (reach[one] * reach[other])[:, None]
        for found in batch(single)(z, u):
            middle, once, twice = found.double().split([1, len(unit), len(one)], 1)
            bend = (twice - once[:, one] - once[:, other] + middle) / square
            values.append(middle[:, 0])
            slopes.append((once - middle) / reach[:, None] - 0.5 * reach[:, None] * bend[:, one == other])
            bends.append(bend)
        return tuple(values), tuple(slopes), tuple(bends)

    def heights(self, z: Tensor, u: Tensor, look: Look = lambda: None) -> Tensor:
        """Return the log joint density (S,) at points."""
        look()
        with quiet():
            values = batch(self._densities)(z, u)
        return torch.stack([own.double().sum(1) for own in values]).sum(0)

    def normal(self, z: Tensor, *, look: Look = lambda: None, start: Tensor | None = None) -> Normal:
        """Return the normal approximation at globals (S, D), differentiable in them."""
        u = self._near(z, look, start)
        return self.pattern.normal(u.double(), *self.assemble(z, u, look=look)[1:])

    def drawn(self, z: Tensor, noise: Tensor, *, look: Look = lambda: None) -> tuple[Tensor, Tensor]:
        """Return u (S, K, n) at globals (S, D) from standard normal noise, and its log densities, number by number.

        Few points are factored at once, since each has a dense matrix.
        """
        u = self._near(z, look)
        return self.pattern.drawn(u.double(), *self.assemble(z, u, look=look)[1:], noise)

    def _near(self, z: Tensor, look: Look, start: Tensor | None = None) -> Tensor:
        """Return points near modes; any point will do where all is normal."""
        u = (self.mode if start is None else start).expand(len(z), self.size)
        return u if self.quadratic else self._climbed(z.detach(), u, look)

    @torch.no_grad()
    def _climbed(self, z: Tensor, u: Tensor, look: Look) -> Tensor:
        """Take Newton steps, halved where the log density would fall, to a mode at each point."""
        for _ in range(MOST_STEPS):
            height, gradient, entries = self.assemble(z, u, look=look)
            step = (self.pattern.normal(u.double(), gradient, entries).mean - u).to(u)
            left = (step.double() * gradient).sum(1)
            share = torch.where(left.abs() > NEAR, 1.0, 0.0)
            for _ in range(10):
                there = self.heights(z, u + (share[:, None] * step).to(u), look)
                fine = (there >= height) | (share == 0.0)
                if bool(fine.all()):
                    break
                share = torch.where(fine, share, 0.5 * share)
            moved = fine & (share > 0.0)
            u = torch.where(moved[:, None], u + (share[:, None] * step).to(u), u)
            if not bool((moved & (there - height > NEAR)).any()):
                break
        return u


def _together(one: Term, other: Term) -> Term:
    """Return a term with what it reads at either of two points."""
    found = {k: (where, read) for k, where, read in one.reads}
    for k, where, read in other.reads:
        before, also = found.get(k, (where, torch.zeros_like(read)))
        if bool((also & read & (before != where)).any()):
            raise ValueError("several rows of a site are read, one or the other")
        found[k] = torch.where(read, where, before), read | also
    return Term(one.subsampled, [(k, *found[k]) for k in sorted(found)])


def _along(values: Callable[[Tensor], tuple[Tensor, ...]], at: Tensor, tangent: Tensor) -> tuple[Tensor, ...]:
    """Return the derivatives of values along a tangent, by two reverse passes.

    The pullback is linear in what it pulls back, so its derivative in that direction is the one sought. A forward pass
    inside of another one fails for some operations under ``vmap``, the likelihood of ``Bernoulli(logits=)`` among them.
    """
    made, pull = cast(tuple[tuple[Tensor, ...], Callable[..., tuple[Tensor]]], vjp(values, at))
    return grad(lambda pulled: pull(pulled)[0] @ tangent)(tuple(map(torch.zeros_like, made)))


class Expansion:
    """What the rows of subsampled plates say of u, near one value of the globals: so a minibatch need not know it.

    Curvatures are continued by the exponential of their relative slopes, gradients by their slopes.

    It is taken at globals z (D,), with difference quotients of some reach (D,).
    """

    @torch.no_grad()
    def __init__(self, system: Crossed, z: Tensor, reach: Tensor) -> None:
        self.system, self.z = system, z
        self.center = system.normal(z[None]).mean[0].to(z)
        points = torch.cat([z[None], z + torch.diag(reach), z - torch.diag(reach)])
        found = [
            system.assemble(piece, self.center.expand(len(piece), -1), kept=True)
            for piece in points.split(system.at_once)
        ]
        _, gradient, entries = (torch.cat(parts) for parts in zip(*found, strict=True))
        self.gradient, above, below = gradient.split([1, len(z), len(z)])
        self.slope = (above - below) / (2.0 * reach[:, None])
        self.entries, above, below = entries.split([1, len(z), len(z)])
        relative = (above - below) / (2.0 * reach[:, None] * self.entries)
        self.relative = torch.where(torch.isfinite(relative), relative, 0.0)

    def drawn(self, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return what :meth:`Crossed.drawn` returns; differentiable in the globals, priors are those of the model."""
        away = (z - self.z).double()
        center = self.center.expand(len(z), -1)
        _, gradient, entries = self.system.assemble(z, center, kept=False)
        gradient = gradient + self.gradient + away @ self.slope
        factor = (away @ self.relative).clamp(-FARTHEST, FARTHEST).exp()
        return self.system.pattern.drawn(center.double(), gradient, entries + self.entries * factor, noise)
