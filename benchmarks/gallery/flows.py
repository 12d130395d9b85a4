"""Which flow fits which posterior: one flow of each kind, without mixtures and without chains.

    python -m benchmarks.gallery.flows --posteriordb PATH

One row of the CSV file is one posterior and flow; a row of the same version is not done again. The table of
docs/howto/choose-a-flow.md is written from it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro_flows as pf
from benchmarks import records
from benchmarks.gallery.entries import ENTRIES, Entry
from benchmarks.markdown import about, table
from benchmarks.tables import replace

OUT = records.RESULTS / "flows.csv"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "choose-a-flow.md"
FLOWS = ("realnvp", "spline", "nice", "planar")
POSTERIORS = ("schools", "garch", "process", "seeds")
FIELDS = (
    *("posterior", "flow", "seed", "version", "dim", "status", "k_hat", "ess_ratio", "elbo", "mean_error", "sd_error"),
    *("steps", "seconds", "error", "machine", "software"),
)


def errors(entry: Entry, posterior: pf.Posterior) -> tuple[float, float]:
    """Largest difference of means in reference sds, and largest log ratio of sds; NaN without reference draws."""
    if entry.reference is None:
        return math.nan, math.nan
    shifts, ratios = [], []
    for name, draws in entry.reference.items():
        right, found = (values.double().reshape(len(values), -1) for values in (draws, posterior.samples[name]))
        shifts.append(((found.mean(0) - right.mean(0)) / right.std(0)).abs().max())
        ratios.append((found.std(0) / right.std(0)).log().abs().max())
    return float(max(shifts)), float(max(ratios))


def measure(name: str, flow: str, root: str | None, seed: int = 0) -> records.Row:
    """Return the row of one posterior and flow."""

    def fill(row: dict[str, Any]) -> None:
        entry = ENTRIES[name](root)
        began = time.process_time()
        posterior = pf.fit(entry.model, *entry.args, flow=flow, seed=seed, escalate=False, refine=False, progress=False)
        row["seconds"] = time.process_time() - began
        mean_error, sd_error = errors(entry, posterior)
        row.update(dim=posterior.z.shape[1], status=posterior.verdict.status, k_hat=posterior.verdict.k_hat)
        row.update(ess_ratio=posterior.verdict.ess_ratio, elbo=posterior.elbo, steps=len(posterior.losses))
        row.update(mean_error=mean_error, sd_error=sd_error)

    start: dict[str, Any] = {"posterior": name, "flow": flow, "seed": seed, "version": records.code_version()}
    found = records.attempt(start, fill)
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in found.items()}


def section(rows: Sequence[records.Row]) -> str:
    """Return the text and the table."""
    latest = {(row["posterior"], row["flow"]): row for row in rows if not row.get("error")}
    best = {name: max(float(row["elbo"]) for key, row in latest.items() if key[0] == name) for name, _ in latest}
    header = ("posterior", "D", "flow", "verdict", "k-hat", "ESS/S", "nats below the best", "mean", "sd", "CPU s")
    body = [_line(row, best[name]) for (name, _), row in latest.items()]
    versions = ", ".join(dict.fromkeys(row["version"] for row in latest.values()))
    text = (
        "One flow of each kind, with seed 0, and neither mixtures nor chains, which `fit` adds. Means are "
        "in reference standard deviations, sds are absolute log ratios, both of the worst coordinate; there are no "
        f"reference draws of seeds.\n\n{about(list(latest.values()))} pyro_flows {versions}."
    )
    return f"{text}\n\n{table(header, body)}"


def _line(row: records.Row, best: float) -> list[str]:
    errors = ["" if row[name] in ("", "nan") else f"{float(row[name]):.3f}" for name in ("mean_error", "sd_error")]
    figures = [f"{float(row['k_hat']):.2f}", f"{float(row['ess_ratio']):.2f}", f"{best - float(row['elbo']):.3f}"]
    return [row["posterior"], row["dim"], row["flow"], row["status"], *figures, *errors, f"{float(row['seconds']):.0f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gallery.flows",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--posteriordb", help="a checkout of posteriordb")
    parser.add_argument("--only", nargs="+", default=POSTERIORS, choices=list(ENTRIES), metavar="NAME")
    parser.add_argument("--flows", nargs="+", default=FLOWS, metavar="NAME")
    parser.add_argument("--out", type=Path, default=OUT, help="the CSV file")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page with the table")
    options = parser.parse_args(arguments)
    version = records.code_version()
    done = {(row["posterior"], row["flow"], row["version"]) for row in records.start(options.out, FIELDS)}
    for name in options.only:
        for flow in options.flows:
            if (name, flow, version) not in done:
                row = measure(name, flow, options.posteriordb)
                records.append(options.out, FIELDS, row)
                print(*(row.get(key, "") for key in ("posterior", "flow", "status", "k_hat", "seconds", "error")))
    text = options.page.read_text(encoding="utf-8")
    options.page.write_text(replace(text, "flows", section(records.read(options.out))), encoding="utf-8")


if __name__ == "__main__":
    main()
