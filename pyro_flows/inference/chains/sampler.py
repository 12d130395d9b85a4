"""The sampler: many short chains as one batch, with warm-up and stopping rule; runs can be stopped and continued.

A sweep is an independent proposal or none, a change of part where there are several, and one microcanonical move (a
Hamiltonian one in one dimension). Warm-up goes in rounds, each with the kernel adapted across chains, until superchains
agree on the last round. Then the kernel is fixed, and draws are kept until they are enough by nested R-hat and
effective sample size; where they come to twice as many as are wanted, every other one goes. Each sweep has a seed of
its own, so that chains that were cut short and went on are those that went through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_flows.inference.chains.adaptation import Kernel, Metric, learned
from pyro_flows.inference.chains.hmc import (
    are_copies,
    exchange_of,
    exchanged,
    hamiltonian,
    independent,
    microcanonical,
    relabel,
    swapped,
)
from pyro_flows.inference.chains.latent import Latent, Points
from pyro_flows.inference.chains.stopping import examined, next_look, resolved_sds, slowest, sweeps_needed
from pyro_flows.inference.modes.propriety import COORDINATES_LOOKED_AT
from pyro_flows.inference.verdict.chains import McmcDiagnostics, McmcDraws, as_numbers, diverge, objections
from pyro_flows.support.numbers import mixing
from pyro_flows.support.process.journal import loop
from pyro_flows.support.process.seeding import derive
from pyro_flows.support.thresholds import (
    DIVERGENT_SHARE_OF_MCMC,
    R_HAT_OF_SHORT_CHAINS,
)

CHAINS = 64  # of a fit, and draws of each at least: R-hat splits them, and ArviZ takes the longer axis for theirs
SUBCHAINS = 8  # chains of a superchain, with one starting point
ROUND = 30  # sweeps of a round of warm-up
ROUNDS = 2, 12  # at least, at most
HALVINGS = 4  # of the step size, where trajectories diverge
HAMILTONIAN, MICROCANONICAL = "Hamiltonian", "microcanonical"  # moves; the latter take two dimensions
COUNTS = ("sweeps", "waiting", "checked", "halved")
STATS = (
    *("lp", "log_weight", "acceptance_rate", "diverging", "energy", "energy_error", "n_steps", "step_size"),
    *("proposed", "independent", "changes", "part"),
)


class Kept:
    """Draws z (C, D), one after the other, and numbers (C,) of each, from earlier ones (C, N, D) and (C, N) on."""

    def __init__(self, z: Tensor, stats: dict[str, Tensor]) -> None:
        self._like = z[:, :0]
        self._z = list(z.unbind(1))
        known = stats or dict.fromkeys(STATS, self._like[..., 0])
        self._stats = {name: list(known[name].unbind(1)) for name in STATS}

    def __len__(self) -> int:
        return len(self._z)

    def add(self, z: Tensor, numbers: dict[str, Tensor]) -> None:
        """Keep one more draw of each chain."""
        self._z.append(z)
        for name, value in numbers.items():
            self._stats[name].append(value)

    def choose(self, chosen: slice) -> None:
        self._z = self._z[chosen]
        self._stats = {name: values[chosen] for name, values in self._stats.items()}

    def total(self, name: str) -> float:
        return sum(float(one.sum()) for one in self._stats[name])

    def stacked(self) -> tuple[Tensor, dict[str, Tensor]]:
        if not self._z:
            return self._like, dict.fromkeys(STATS, self._like[..., 0])
        return torch.stack(self._z, 1), {name: torch.stack(values, 1) for name, values in self._stats.items()}


class Sampler:
    """Chains under way, from where others stand: ``kept`` to twice as many draws of each are kept."""

    def __init__(self, latent: Latent, names: Sequence[str], chains: McmcDraws, *, kept: int, seed: int) -> None:
        self.latent, self.names, self.kept, self.seed = latent, list(names), max(kept, CHAINS), seed
        state, numbers = chains.state, dict(chains.numbers)
        self.points = latent.look(state["x"], state["k"])
        self.superchain, self.began = state["superchain"], state["began"]
        self.metric = Metric(*(state[name] for name in Metric._fields))
        self.kernel = Kernel(**numbers.pop("kernel"))
        self.numbers: dict[str, Any] = numbers
        self.draws = Kept(chains.z, chains.stats)
        self.exchange = exchange_of(latent, self.points, numbers["exchange"])
        numbers["exchange"] = self.exchange is not None
        self.swaps = self.exchange is None and are_copies(latent)
        self.round = [tuple(of.unbind(0)) for of in state["round"].unbind(0)]
        self.found: McmcDiagnostics | None = None  # the figures of the last look in a run
        self.over = True  # no run is under way
        self.resolved = False  # whether the last look found enough draws, for all standard deviations too
        self.judged = None if chains.figures is None else (self._at(), chains.figures)

    @classmethod
    def begin(
        cls, latent: Latent, names: Sequence[str], z: Tensor, *, chains: int, kept: int, seed: int, independence: int,
        moves: str = MICROCANONICAL,
    ) -> Sampler:  # fmt: skip
        """Start superchains at points z (K, D), K = chains / 8."""
        torch.manual_seed(derive(seed, "labels of chains"))
        z = z.repeat_interleave(chains // len(z), 0)
        x, k = latent.place(z)
        state = {
            "x": x,
            "k": k,
            "began": k,
            "superchain": torch.arange(chains) // SUBCHAINS,
            **Metric.of(torch.ones_like(x[0]))._asdict(),
            "round": x.new_zeros(0, 3, *x.shape),
        }
        numbers: dict[str, Any] = dict.fromkeys(COUNTS, 0) | {"fixed_at": None, "thin": 1, "worst": None}
        numbers |= {"independence": independence, "moves": moves if x.shape[1] > 1 else HAMILTONIAN, "seed": seed}
        numbers |= {"kernel": Kernel.start(x.shape[1]).stored(), "exchange": None}
        return cls(latent, names, McmcDraws(z[:, None][:, :0], {}, state, numbers), kept=kept, seed=seed)

    def chains(self) -> McmcDraws:
        ring = [torch.stack(of) for of in self.round]
        state = {
            "x": self.points.x,
            "k": self.points.k,
            "began": self.began,
            "superchain": self.superchain,
            **self.metric._asdict(),
            "round": torch.stack(ring) if ring else self.points.x.new_zeros(0, 3, *self.points.x.shape),
        }
        z, stats = self.draws.stacked()
        known = self.judged[1] if self.judged is not None and self.judged[0] == self._at() else None
        return McmcDraws(z, stats, state, {**self.numbers, "kernel": self.kernel.stored()}, known)

    def _at(self) -> tuple[int, int]:
        """Return what the draws' figures depend on: sweeps done, and draws kept."""
        return self.numbers["sweeps"], len(self.draws)

    def run(
        self, sweeps: int, report: Callable[[str], None] = lambda text: None, *, gradients: float = math.inf,
        patient: bool = True, short_of: float = math.inf,
    ) -> McmcDiagnostics | None:  # fmt: skip
        """Go on until the draws are enough, or for ``sweeps`` in all or so many gradients; return the last figures.

        Chains are given up once they would need ``short_of`` times the gradients that are left.

        Unless ``patient``, the step size is halved as soon as ten times as many trajectories diverge as may, and chains
        are given up where the gradients would not do for that: each half begins the draws anew, at twice the cost.
        """
        end, self.found, self.over = self.latent.density.evaluations + gradients, None, False
        with loop("chains", self.points.x) as kept:
            kept.take(self._put_back)
            while not self.over:
                going = self.numbers["sweeps"] < sweeps and self.latent.density.evaluations < end
                self.over = not going or self._go_on(end, report, patient, short_of)
                kept.offer(self._state)
            kept.end(self._state)
        return self.found

    def _go_on(self, end: float, report: Callable[[str], None], patient: bool, short_of: float) -> bool:
        """Move once, and look at the draws when it is time to; return whether this is the end."""
        if self.numbers["fixed_at"] is None:
            report(f"warm-up, sweep {self.numbers['sweeps']}")
            self._warm_up()
            return not self.round and self.latent.density.evaluations + self._needed() > end
        report(f"sweep {self.numbers['sweeps']}")
        self._keep(self._sweep())
        share = self.draws.total("diverging") / (len(self.points.x) * self.kept)
        if not patient and share > DIVERGENT_SHARE_OF_MCMC:
            if self.numbers["halved"] >= HALVINGS or self.latent.density.evaluations + self._needed(0.5) > end:
                return True
            self._begin_halved()
        if len(self.draws) >= max(self.kept, self.numbers["checked"] + self.numbers.get("pause", self.kept // 2)):
            found = self.found = self._looked_at()
            left = max(end - self.latent.density.evaluations, 0.0)
            if self.resolved or self.gradients_needed(found) > short_of * left:
                return True
            if diverge(found) and self.numbers["halved"] < HALVINGS:
                self._begin_halved()
            else:
                self._make_room(found)
        return False

    def _state(self) -> dict[str, object]:
        """Return all that :meth:`run` changes."""
        z, stats = self.draws.stacked()
        figures = [as_numbers(self.found), self.judged and [self.judged[0], as_numbers(self.judged[1])]]
        flags = {"over": self.over, "resolved": self.resolved, "figures": figures, "kernel": self.kernel.stored()}
        tensors = {"points": self.points, "metric": self.metric, "z": z, "stats": stats, "round": self.round}
        return {**flags, **tensors, "numbers": self.numbers, "density": self.latent.density.state()}

    def _put_back(self, state: dict[str, Any]) -> None:
        found, judged = state["figures"]
        self.over, self.resolved, self.found = state["over"], state["resolved"], found and McmcDiagnostics.of(found)
        self.judged = judged and (tuple(judged[0]), McmcDiagnostics.of(judged[1]))
        self.points, self.metric = Points(*state["points"]), Metric(*state["metric"])
        self.kernel = Kernel(**state["kernel"])
        self.draws, self.round = Kept(state["z"], state["stats"]), [tuple(of) for of in state["round"]]
        self.numbers = state["numbers"]
        self.latent.density.put_back(state["density"])

    def _needed(self, step: float = 1.0) -> float:
        """Return how many gradients the draws to be kept take at least, by the kernel, or with a part of its step."""
        return self._gradients(max(ROUNDS[0] * ROUND - self.numbers["sweeps"], 0) + CHAINS, step)

    def gradients_needed(self, found: McmcDiagnostics) -> float:
        """Return how many gradients it takes until draws are enough; from anew where trajectories diverge."""
        done = self.numbers["sweeps"] - (self.numbers["fixed_at"] or 0)
        again = diverge(found) and found.sweeps <= done and self.numbers["halved"] < HALVINGS  # not of an earlier step
        return self._gradients(max(sweeps_needed(found) - (0 if again else done), 0.0), 0.5 if again else 1.0)

    def _gradients(self, sweeps: float, step: float = 1.0) -> float:
        leaps = min(self.kernel.length / (step * self.kernel.step), 0.5 * self.kernel.most_leaps / step)  # in the mean
        return sweeps * max(leaps, 1.0) * len(self.points.x)

    def more(self, draws: int) -> Tensor:
        """Return further draws (C, n, D) of each chain, spaced as those that are kept."""
        parts = []
        for _ in range(draws):
            for _ in range(self.numbers["thin"]):
                self._sweep()
            parts.append(self.points.z)
        return torch.stack(parts, 1)

    def figures(self) -> McmcDiagnostics:
        """Judge the draws so far by all coordinates, once."""
        if self.judged is None or self.judged[0] != self._at():
            self.judged = self._at(), self._figures(None)
        return self.judged[1]

    def _looked_at(self) -> McmcDiagnostics:
        """Judge the draws so far: by the worst coordinates of the last time, and by all if these and all sds suffice.

        A first half without which the errors of sds are clearly smaller is discarded as warm-up.
        """
        self.numbers["checked"] = len(self.draws)
        found = self._figures(self.numbers.get("worst") or slowest(self.judged_by()[0], COORDINATES_LOOKED_AT))
        self.resolved, error_ratio = False, 0.0
        if not objections(found):
            draws, gradients = self.judged_by()[0], self._gradients(found.sweeps)
            resolved, warm_up, error_ratio = resolved_sds(found, draws, gradients)
            if resolved:
                found = self.figures()  # the verdict's own: nothing is to spare
                self.resolved = not objections(found) and (
                    error_ratio <= 1.0 or resolved_sds(found, draws, gradients).resolved
                )
            if warm_up:
                self._choose(slice(len(self.draws) // 2, None))
        self.numbers["pause"] = next_look(found, thin=self.numbers["thin"], kept=self.kept, error_ratio=error_ratio)
        return found

    def _figures(self, watched: Sequence[int] | None) -> McmcDiagnostics:
        chains, stats = self.judged_by()
        sweeps = self.numbers["sweeps"] - (self.numbers["fixed_at"] or 0)
        known = {"superchain": self.superchain, "began": self.began}
        found, order = examined(chains, stats, self.names, **known, sweeps=sweeps, watched=watched)
        self.numbers["worst"] = order[:COORDINATES_LOOKED_AT]
        return found

    def judged_by(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the draws, without what exact symmetries do to them, which would hide how slow chains are."""
        z, stats = self.draws.stacked()
        return self.at_home(z, stats["part"].long()), stats

    def at_home(self, z: Tensor, k: Tensor) -> Tensor:
        """Return points z (..., D) of parts k (...) as they are before exact symmetries; see ``hmc.py``."""
        return z if self.exchange is None else self.exchange.home(z, k)

    def _sweep(self, *, adapt: bool = False) -> dict[str, Tensor]:
        """Move all chains once; return the numbers of this sweep, each (C,). Nothing has changed if it is cut."""
        number = self.numbers["sweeps"]
        torch.manual_seed(derive(self.seed, f"sweep {number}"))
        points, tried = self.points, self.numbers["independence"]
        taken = torch.zeros_like(points.log_pi)
        for _ in range(tried):
            points, hit = independent(self.latent, points)
            taken = taken + hit
        points = relabel(self.latent, points)
        if self.exchange is not None:
            points = exchanged(self.exchange, points)
        elif self.swaps:
            points = swapped(self.latent, points)
        changes = (points.k != self.points.k).to(taken)
        leaps, step = self.kernel.leaps(number), self.kernel.step
        if not adapt and number % 4 == 0:  # leaps of a quarter go into necks that the others overshoot
            step = 0.25 * step
        move = microcanonical if self.numbers["moves"] == MICROCANONICAL else hamiltonian
        moved = move(self.latent, points, step=step, leaps=leaps, metric=self.metric)
        if adapt:
            self.kernel.adapt(points, moved, self.metric, number)
        self.points = moved.points
        self.numbers["sweeps"] = number + 1
        like = moved.chance
        return {
            "lp": moved.points.log_p,
            "log_weight": moved.points.log_weight,
            "acceptance_rate": like,
            "diverging": moved.diverging,
            "energy": moved.energy,
            "energy_error": moved.error,
            "n_steps": torch.full_like(like, float(leaps)),
            "step_size": torch.full_like(like, step),
            "proposed": torch.full_like(like, float(tried)),
            "independent": taken,
            "changes": changes,
            "part": moved.points.k.to(like),
        }

    def _warm_up(self) -> None:
        """Adapt for one sweep; at the end of a round, set the units, and fix the kernel if superchains agree."""
        self._sweep(adapt=True)
        self.round.append((self.points.x, self.at_home(self.points.z, self.points.k), self.points.slope))
        if len(self.round) < ROUND:
            return
        rounds = self.numbers["sweeps"] // ROUND
        x, z, slope = (torch.stack(parts, 1) for parts in zip(*self.round[ROUND // 3 :], strict=True))
        nested = mixing.nested_r_hat(z, self.superchain).max()
        if rounds >= ROUNDS[1] or (rounds >= ROUNDS[0] and float(nested) <= R_HAT_OF_SHORT_CHAINS):
            self.kernel.freeze()
            self.numbers["fixed_at"] = self.numbers["sweeps"]
        else:
            self.metric = learned(x.flatten(0, 1), slope.flatten(0, 1))
            self.kernel.again()
        self.round = []

    def _keep(self, numbers: dict[str, Tensor]) -> None:
        self.numbers["waiting"] = (self.numbers["waiting"] + 1) % self.numbers["thin"]
        if not self.numbers["waiting"]:
            self.draws.add(self.points.z, numbers)

    def _begin_halved(self) -> None:
        """Begin anew with half of the step size, and trajectories as long as before."""
        self.kernel.halve()
        self.draws.choose(slice(0))
        halved = self.numbers["halved"] + 1
        self.numbers |= {"halved": halved, "fixed_at": self.numbers["sweeps"], "checked": 0, "thin": 1, "waiting": 0}

    def _make_room(self, found: McmcDiagnostics) -> None:
        """Drop the first half of draws that superchains still disagree on; else every other one, where all are full."""
        room = min(256, 2**20 // self.points.x.numel())  # draws of a chain: a million numbers in those of all
        if len(self.draws) >= max(2 * self.kept, room):
            rough = not found.nested_r_hat <= R_HAT_OF_SHORT_CHAINS
            self.numbers["thin"] *= 1 if rough else 2
            self._choose(slice(len(self.draws) // 2, None) if rough else slice(1, None, 2))

    def _choose(self, chosen: slice) -> None:
        self.draws.choose(chosen)
        self.numbers["checked"] = len(self.draws)
