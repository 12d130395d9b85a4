"""The section about toy targets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.markdown import about, number, plural, range_text, table
from benchmarks.posteriors import judging
from benchmarks.records import Row
from benchmarks.toys import running as toys


def toys_section(rows: Sequence[Row]) -> str:
    """Return the section about toy targets."""
    cases = toys.newest(rows)
    kept = [row for group in cases.values() for row in group]
    seeds = max(len(group) for group in cases.values())
    text = (
        f"`fit` as it comes, on targets of known log normalizer and moments, with up to {plural(seeds, 'seed')} each. "
        "u1 to u4 are Rezende and Mohamed's potentials; the funnel is Neal's in 10 dimensions (best Gaussian: a gap of "
        "1.863), as a hierarchical model and as a mere density; many_well has 32 dimensions and 2 wells in each of 16 "
        "pairs; mixture is 40 Gaussians scattered over a square of side 80. Gaps are those of the ELBO to the log "
        "normalizer, in nats.\n\nA mode is found if draws of the "
        f"guide hold {toys.FOUND_SHARE:.0%} of its mass at least. A fit is wrong if it lacks a mode, or draws to use "
        "miss a mean by more than 0.25 standard deviations or a standard deviation by more than 25 %. Where a first "
        f"round did not suffice, the fit added layers. Each target was run last at its own version.\n\n{about(kept)} "
        f"pyro_flows {', '.join(dict.fromkeys(row['version'] for row in kept))}."
    )
    return f"{text}\n\n{_toys_table(cases)}"


def _toys_table(cases: dict[toys.Case, list[Row]]) -> str:
    header = ["target", "flow", "layers", "runs", "median gap", "worst gap", "k-hat", "ESS/S", "modes", "sd of x0"]
    header += ["wrong and ok", "gradients", "seconds", "verdicts", "version"]
    body = []
    for case, rows in cases.items():
        good = [row for row in rows if not row["error"]]
        gaps = [float(row["elbo_gap"]) for row in good]
        modes = sorted({int(row["modes"]) for row in good if row["of_modes"]})
        sds = [float(row["sd_x0"]) for row in good if row["sd_x0"]]
        body.append(
            [
                case.target,
                case.flow,
                str(case.layers),
                str(case.runs),
                number(statistics.median(gaps) if gaps else math.nan, 3),
                number(judging.worst(rows, "elbo_gap"), 3),
                number(judging.worst(rows, "k_hat"), 2),
                number(judging.worst(rows, "ess_ratio", smallest=True), 2),
                f"{range_text(modes, 0)} of {good[0]['of_modes']}" if modes else "",
                range_text(sds, 2),
                f"{sum(toys.wrong(row) and row['status'] == 'ok' for row in rows)} of {len(rows)}",
                number(judging.median(good, "gradient_evaluations"), 0),
                number(judging.median(good, "seconds"), 0),
                ", ".join(sorted({row["status"] or "failed" for row in rows})),
                rows[-1]["version"].rpartition("-")[-1],
            ]
        )
    return table(header, body)
