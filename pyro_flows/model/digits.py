"""Whether single precision has the digits of a log density that its figures need; double precision where not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_flows.model.batching import over_rows, quiet, where_possible
from pyro_flows.model.faults import passing_over
from pyro_flows.model.graphs import Recorder
from pyro_flows.model.precision import LostDigits, doubled, in_double, read_in_double
from pyro_flows.model.runs import Runs
from pyro_flows.model.sites import Keywords, Model, Noncentered, Positional, Structure
from pyro_flows.support.process.fallbacks import Tried, passed_over
from pyro_flows.support.process.seeding import seeded
from pyro_flows.support.process.threads import turn

FAR, FAR_SITES = (-20.0, -10.0, 10.0, 20.0), 16  # where all coordinates of a site are put, to compare precisions
LOST, LOST_SHARE = 1.0, 1e-4  # nats by which single precision may be off there, and as a share of the log density
ALLOWED = 0.01  # nats by which it may be off at draws of the posterior, however large the log density is
COMPARED, COMPARED_ONE_BY_ONE = 64, 8  # draws
PURE = 1e-6  # nats, up to which a model in double precision has nothing in single
NOISE = 0.2  # nats, beyond which no figure is to be trusted


class Digits(Runs):
    """Runs of a model that know what rounding does to its log density; see :class:`~pyro_flows.LogDensity`."""

    _has_double = True  # whether the model runs in double precision, as far as is known
    _off: float | None = None  # nats by which rounding changes the log density, where that was last looked at

    def __init__(
        self, model: Model, args: Positional = (), kwargs: Keywords | None = None, *, noncentered: Noncentered = ()
    ) -> None:
        super().__init__(model, args, kwargs, noncentered=noncentered)
        if self.dtype == torch.float32 and self._loses_digits_far_out():
            self._become_double()

    def _settle(self, structure: Structure, like: Runs | None = None) -> None:
        super()._settle(structure, like)
        self._doubles: Recorder | None = None  # the graph in double precision that many data sets share

    def _become_double(self) -> bool:
        """Run the model in double precision from now on; return whether it can. Its structure is read anew."""
        now = dict(vars(self))
        with Tried() as tried:
            with seeded(0):
                self._as_read = read_in_double(self.model, self.args, self.kwargs)
            self.model, self._double, self._off = doubled(self.model), True, None
            self._settle(self._as_read.noncenter(self.structure.noncentered))
            if self.dtype == torch.float64:
                return True
        if tried.error is not None:
            passed_over("not run in double precision", tried.error)
        vars(self).clear()
        vars(self).update(now, _has_double=False)
        return False

    def _doubly(self, z: Tensor) -> Tensor:
        """Return log densities (S,) in double precision, at some points that single precision rounds to ``z`` (S, D).

        Raises:
            Exception: what the model's own code raises in double precision.
        """
        with seeded(0, z.device):
            rounding = (torch.rand(z.shape, dtype=torch.float64, device=z.device) - 0.5) * torch.finfo(z.dtype).eps

        points = z.double() * (1.0 + rounding)
        if self._doubles is not None and not self._factorizes:
            with turn(), passing_over():
                return self._doubles(points)[0]
        return self._at(self.doubly, points)

    def doubly(self, z: Tensor) -> Tensor:
        """Return the log density of one point (D,) in double precision."""
        with in_double():
            return self.single(z)

    def _at(self, single: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """Return the values (S,) of a function of one point at ``z`` (S, D), NaN where the model raises an error.

        They are not recorded.
        """
        with quiet():
            return where_possible(
                lambda rows: (over_rows(single, rows, batched=self.batched, size=self._rows),),
                z,
                (),
                alone=lambda row: (single(row[0])[None],),
                halves=self.batched,
            )[0]

    @torch.no_grad()
    def _loses_digits_far_out(self) -> bool:
        """Whether the model has other values in double precision far out, where climbs come by.

        With a concentration of 1e8, a Beta density is a difference of numbers of which single precision has no digit in
        common with the truth: a mode that is none, thousands of nats high. Points that are lower than another one in
        either precision do not count: 1 - p of a probability p has few digits far out in most models.
        """
        if not self.batched:
            return False
        sites = [latent for latent in self.structure.latents if latent.size][:FAR_SITES]
        points = torch.zeros(len(sites), len(FAR), self.dim, dtype=self.dtype, device=self.device)
        for number, latent in enumerate(sites):
            points[number, :, latent.offset : latent.offset + latent.size] = points.new_tensor(FAR)[:, None]
        with Tried() as tried:
            z = torch.cat([points.flatten(0, 1), points.new_zeros(1, self.dim)])
            single, double = self._at(self.single, z).double(), self._doubly(z)
        if tried.error is not None:
            passed_over("precisions not compared far out", tried.error)
            return False
        there = torch.isfinite(single) & torch.isfinite(double)
        single, double = single[there], double[there]
        off = (single - double).abs() > LOST + LOST_SHARE * double.abs()
        return bool((torch.maximum(single, double)[off] >= double.max()).any()) if bool(off.any()) else False

    def rounding(self, z: Tensor, *, most: int = COMPARED_ONE_BY_ONE, log_p: Tensor | None = None) -> float:
        """Return by how many nats rounding changes the log density at draws ``z`` (S, D), as far as that can be told.

        At a few of them, the model as it is written is compared with itself in double precision: whole numbers and
        torch's defaults are in single where latents are in double. The points of the latter move by half a unit in
        the last place, so that it shows what double precision loses too. Of models that do not run in it, the last
        digit of the log density is what can be told. The result is kept. ``log_p`` (S,) are the log densities at ``z``,
        where they are known.

        Cost: 64 densities in either precision; 8, or ``most`` if that is less, where they are evaluated one by one.
        """
        few = COMPARED if self.batched else min(most, COMPARED_ONE_BY_ONE)
        there = torch.isfinite(z).all(1).nonzero()[:, 0]
        some = there[:: max(1, len(there) // few)][:few]
        self._off = self._off_by(z[some], None if log_p is None else log_p[some]) if len(some) else 0.0
        return self._off

    @torch.no_grad()
    def _off_by(self, z: Tensor, log_p: Tensor | None) -> float:
        log_p = self._at(self.single, z) if log_p is None else log_p
        if self._has_double:
            with Tried() as tried:
                single, double = log_p.double(), self._doubly(z)
                there = torch.isfinite(double)
                return float((single - double)[there].abs().nan_to_num(nan=torch.inf).amax()) if there.any() else 0.0
            if tried.error is not None:
                passed_over("precisions not compared", tried.error)
                self._has_double = False
        size = log_p.abs()
        return float(size[torch.isfinite(size)].median().nan_to_num(nan=0.0)) * torch.finfo(self.dtype).eps

    def known_rounding(self, z: Tensor) -> float:
        """Return :meth:`rounding` as it was found last, or at draws ``z`` (S, D)."""
        return self.rounding(z) if self._off is None else self._off

    def check_digits(self, z: Tensor) -> None:
        """Compare the model with itself in double precision at draws ``z`` (S, D) of where the posterior lies.

        A model that was in double precision at the first draws is so at all.

        Raises:
            LostDigits: if they differ by more than .01 nats.
        """
        pure = self.dtype == torch.float64 and self._off is not None and self._off < PURE
        if not (self._double or pure) and self.rounding(z) > ALLOWED and self._has_double:
            raise LostDigits

    def lost_digits(
        self, z: Tensor, *, most: int = COMPARED_ONE_BY_ONE, log_p: Tensor | None = None
    ) -> tuple[list[str], list[str]]:
        """Say what rounding does at draws ``z`` (S, D): what speaks against figures, and what is to be noted."""
        off = self.rounding(z, most=most, log_p=log_p)
        if off <= ALLOWED:
            return [], []
        other = ", in double precision too" if self._double else ""
        other = other if self._has_double else ": the model does not run in double precision throughout"
        said = f"rounding changes the log density by up to {off:.2g} nats{other}"
        return ([said], []) if off > NOISE else ([], [said])
