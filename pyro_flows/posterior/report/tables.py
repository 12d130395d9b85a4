"""Tables of a page, with the number that each cell sorts by, and the figures that a verdict rests on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyro_flows.inference.record import Record
from pyro_flows.inference.verdict.chains import McmcDiagnostics
from pyro_flows.inference.verdict.verdict import SHOWN
from pyro_flows.posterior.plots.parts import INTERVAL
from pyro_flows.support import thresholds as limits
from pyro_flows.support.files.bundles import Entries, plain
from pyro_flows.support.process.progress import UNTOLD

if TYPE_CHECKING:
    import pandas as pd

EXTREME = 0.01  # of p, either side
MEANINGS = {
    "mean": "mean of the draws to use",
    "sd": "standard deviation",
    "mcse_mean": "Monte Carlo standard error of the mean",
    "ess": "effective sample size",
    "ess_bulk": "effective sample size in the bulk",
    "ess_tail": "effective sample size in the tails",
    "r_hat": "R-hat: 1 where chains agree",
    "elpd": "expected log predictive density, nats",
    "se": "standard error of elpd",
    "p": "effective number of parameters",
    "elpd_diff": "elpd less that of the first row, nats",
    "diff_se": "standard error of the difference",
    "weight": "stacking weight",
    "log_evidence": "log evidence, nats",
    "evidence_se": "standard error of the log evidence",
    "log_bf": "log Bayes factor against the first row, nats",
    "bf_se": "standard error of the log Bayes factor",
    "high_k": "observations whose k-hat is too high",
}


@dataclass(frozen=True)
class Cell:
    """The text of a cell, and what it sorts by: a number, or nothing for text and NaN."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """A table that can be sorted."""

    name: str  # for identifiers
    caption: str  # what it holds
    first: str  # the heading of the names of the rows
    columns: tuple[tuple[str, str], ...]  # headings, with what each means
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]  # name and cells of each
    left_out: int = 0  # how many rows are not shown


def of_frame(frame: pd.DataFrame, name: str, caption: str, first: str) -> Table:
    """Return a data frame as a table, of a thousand rows at most."""
    columns = tuple((str(column), _meaning(str(column))) for column in frame.columns)
    shown = frame.head(1000)
    rows = tuple((str(label), tuple(map(_cell, row))) for label, row in zip(shown.index, shown.to_numpy(), strict=True))
    return Table(name, caption, first, columns, rows, len(frame) - len(shown))


def _meaning(column: str) -> str:
    kind, _, bound = column.rpartition("_")
    if bound in ("lb", "ub") and kind[:3] in ("hdi", "eti"):
        words = "highest density interval" if kind[:3] == "hdi" else "equal-tailed interval"
        return f"{'lower' if bound == 'lb' else 'upper'} bound of the {kind[3:]} % {words}"
    return MEANINGS.get(column, column)


def _cell(value: object) -> Cell:
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        number = float(value)
        text = f"{int(number)}" if number.is_integer() and abs(number) < 1e15 else f"{number:.6g}"
        return Cell(text, number) if math.isfinite(number) else Cell("–")
    return Cell(str(value))


def statistics(data: Mapping[str, np.ndarray], replicates: Mapping[str, np.ndarray]) -> Table:
    r"""Compare statistics of the data with those of replicates; p is the share of replicates with a larger one.

    .. math:: p = P(T(y^{rep}) > T(y)) + \tfrac 12 P(T(y^{rep}) = T(y))
    """
    functions: dict[str, Callable[..., np.ndarray]]
    functions = {"mean": np.nanmean, "sd": np.nanstd, "smallest": np.nanmin, "largest": np.nanmax}
    rows = []
    for name, values in data.items():
        for what, function in functions.items():
            own, others = float(function(values)), function(replicates[name], axis=1)
            if what == "sd" and len(values) == 1:
                continue
            share = float(np.mean(others > own) + 0.5 * np.mean(others == own))
            cells = (own, np.median(others), *np.quantile(others, INTERVAL), share)
            rows.append((f"{what} of {name}", tuple(Cell(f"{cell:.3g}", float(cell)) for cell in cells)))
    columns = (
        ("data", "of the data"),
        ("median", "median over replicates"),
        ("5.5 %", "5.5 % quantile over replicates"),
        ("94.5 %", "94.5 % quantile over replicates"),
        ("p", "share of replicates with a larger value: near 0 or 1, the model does not reproduce the data"),
    )
    return Table("statistics", "Statistics of data and replicates", "statistic", columns, tuple(rows))


def not_reproduced(table: Table) -> str:
    """Say which statistics of the data replicates do not reach; a statistic of p is in the last cell of a row."""
    shares = [(name, cells[-1].value) for name, cells in table.rows]
    extreme = [name for name, p in shares if p is not None and min(p, 1.0 - p) < EXTREME]
    if not extreme:
        all_ = f"all {len(shares)} statistics of the data"
        return f"The model reproduces {all_}: p is between {EXTREME} and {1 - EXTREME}."
    return f"The model does not reproduce the {', the '.join(extreme)}: p is below {EXTREME} or above {1 - EXTREME}."


def flat(values: Entries) -> list[tuple[str, str]]:
    """Return settings as names and texts, nested ones with points between the names."""
    found: list[tuple[str, str]] = []
    for name, value in plain(dict(values)).items():
        if isinstance(value, Mapping) and value:
            found += [(f"{name}.{inner}", text) for inner, text in flat(value)]
        else:
            found.append((str(name), _text(value)))
    return found


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "none" if value is None or value == {} or value == [] else str(value)
    return text if len(text) <= 200 else f"{text[:199]}…"


def stages(history: Sequence[Entries]) -> Table:
    """Return what happened during the fit, a row a stage."""
    names = ("run", "start", "elbo", "k_hat", "ess_ratio", "steps", "why")
    titles = ("run", "start", "ELBO (nats)", "k-hat", "ESS/S", "steps", "how it ended")
    rows = []
    for number, stage in enumerate(history, 1):
        cells = [_figure(stage.get(name)) for name in names]
        rows.append((f"{number}. {stage['stage']}", tuple(cells)))
    return Table("history", "What happened during the fit", "stage", tuple((t, t) for t in titles), tuple(rows))


def _figure(value: object) -> Cell:
    """Return a figure of a stage; nothing where there is none, or a few draws beyond all mass have made it."""
    if value is None or (isinstance(value, float) and abs(value) > UNTOLD):
        return Cell("–")
    return _cell(round(value, 3) if isinstance(value, float) and math.isfinite(value) else value)


# the figures of a verdict, each with its limit and what it means ------------------------------------------------------

TAIL = "Tail of the importance weights: the higher, the rarer and larger the weights that matter."
LEFT = "Share of the method's own draws that is left after weighting; 1 if they are the posterior's."
OF_MEANS = "Largest difference that weighting makes to a mean, in posterior standard deviations."
OF_SDS = "Largest absolute log ratio that weighting makes to a standard deviation."
CLOSE = "Close to the ELBO for a good approximation."


@dataclass(frozen=True)
class Figure:
    """A number with its name, its limit in words, and what it means."""

    name: str
    value: str
    limit: str
    meaning: str


def figures(posterior: Record) -> list[Figure]:
    """Return the figures of a verdict, of a guide's draws or of chains."""
    verdict = posterior.verdict
    if posterior._of_mcmc and verdict.chains is not None:
        return _of_mcmc(verdict.chains)
    found = _of_guide(posterior) if not math.isnan(verdict.k_hat) else []
    return [*(_of_chains(verdict.chains) if verdict.chains is not None else []), *found]


def _of_guide(posterior: Record) -> list[Figure]:
    verdict = posterior.verdict
    at = f" at {verdict.where}" if verdict.mean_shift >= SHOWN else ""
    found = [
        ("k-hat", f"{verdict.k_hat:.2f}", f"below {verdict.k_threshold:.2f}", TAIL),
        ("ESS/S", f"{verdict.ess_ratio:.2f}", f"{limits.ESS_SHARE_LEAST} or more", LEFT),
        ("Change of a mean", f"{verdict.mean_shift:.2f} sd{at}", f"{limits.SHIFT_MOST} or less for ok", OF_MEANS),
        ("Change of an sd", f"{verdict.sd_shift:.2f}", f"{limits.SHIFT_MOST} or less for ok", OF_SDS),
    ]
    if verdict.supports_evidence and not posterior._by_chains:
        found.append(("ELBO", f"{posterior.elbo:.3f} nats", "", "Lower bound of the log evidence."))
    if verdict.supports_evidence:
        found.append(("Log evidence", f"{posterior.log_evidence:.3f} nats", "", CLOSE))
    return [Figure(*parts) for parts in found]


def _worth(chains: McmcDiagnostics, least: float) -> Figure:
    worth = f"{chains.ess_bulk:.0f} bulk, {chains.ess_tail:.0f} tail"
    meaning = f"Independent draws that the chains are worth, lowest at {chains.where}."
    return Figure("Effective draws", worth, f"{least:.0f} or more", meaning)


def _of_chains(chains: McmcDiagnostics) -> list[Figure]:
    nested, single = f"{limits.R_HAT_CONVERGED} or less", f"{limits.R_HAT_OF_SHORT_CHAINS} or less"
    return [
        Figure("Nested R-hat", f"{chains.nested_r_hat:.3f}", nested, "1 if chains from all starts agree."),
        Figure("R-hat", f"{chains.r_hat:.3f}", single, "1 if single chains agree."),
        _worth(chains, limits.ESS_OF_CHAINS),
        Figure("Divergences", f"{chains.divergences:.2%}", "hardly any", "Trajectories that went astray."),
        Figure("Acceptance", f"{chains.acceptance:.2f}", "", "Share of trajectories that were accepted."),
    ]


def _of_mcmc(chains: McmcDiagnostics) -> list[Figure]:
    diverged = "not known" if math.isnan(chains.divergences) else f"{chains.divergences:.2%}"
    most = f"at most {limits.DIVERGENT_SHARE_OF_MCMC:.1%}"
    return [
        Figure("R-hat", f"{chains.r_hat:.3f}", f"below {limits.R_HAT_CONVERGED}", "1 if the chains agree."),
        _worth(chains, limits.ESS_OF_MCMC),
        Figure("Divergences", diverged, most, "Transitions that went astray."),
    ]
