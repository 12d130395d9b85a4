"""The section on amortized posteriors of ``docs/evidence/accuracy.md``."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import records
from benchmarks.amortized.running import OURS
from benchmarks.markdown import about, table

HEADER = (
    *(
        "model",
        "simulations",
        "data sets",
        "usable and right",
        "wrong and usable",
        "verdicts",
        "ESS/S",
        "ms each, median (95 %)",
    ),
    *("training, CPU s", "p of ranks", "named: as predicted", "named: changed", "`ok`: changed"),
)
BESIDE = (
    *("model", "method", "usable and right", "wrong and usable", "largest error of a mean, sds", "of an sd"),
    *("ms each, median (95 %)", "training, CPU s"),
)
PEERS = (
    "Other packages, trained on the same simulations, with the same coordinates and scale of the data, for as many "
    "seconds. All else is their default: sbi's masked autoregressive flow and BayesFlow's affine couplings. They have "
    "no verdict, so that all of their answers count as usable. An answer is 4000 draws. The largest error is that of "
    "the worst coordinate; its median over usable answers is shown."
)


def section(rows: Sequence[records.Row]) -> str:
    """Return the text and the tables."""
    last = list({(row["model"], row["method"]): row for row in rows}.values())
    rows = [row for row in last if row["method"] == OURS]
    versions = ", ".join(dict.fromkeys(row["version"] for row in rows))
    where = f"{about(rows)} pyro_flows {versions}."
    parts = [_text(rows), where, table(HEADER, [_line(row) for row in rows])]
    if len(rows) < len(last):
        order = [row["model"] for row in rows]
        beside = sorted(last, key=lambda row: (order.index(row["model"]), row["method"] != OURS))
        parts += [PEERS, table(BESIDE, [_beside(row) for row in beside])]
    return "\n\n".join(parts)


def _beside(row: records.Row) -> list[str]:
    method = OURS if row["method"] == OURS else f"{row['method']} {row['version']}"
    right = f"{row['right']} of {row['data_sets']}"
    sd_off = f"{float(row['sd_off']):.0%}" if row["sd_off"] else "–"
    times = f"{row['ms_median']} ({row['ms_95']})"
    return [row["model"], method, right, row["lies"], row["mean_off"] or "–", sd_off, times, row["train_cpu_seconds"]]


def _line(row: records.Row) -> list[str]:
    times = f"{row['ms_median']} ({row['ms_95']})"
    first = [
        row["model"],
        f"{int(row['simulations']):,}",
        row["data_sets"],
        row["right"],
        row["lies"],
        row["verdicts"],
        row["ess_median"],
        times,
    ]
    named = [f"{row['false_alarms']} of {row['data_sets']}", f"{row['named']} of {row['changed']}", row["changed_ok"]]
    return [*first, row["train_cpu_seconds"], row["p_value"], *named]


def _text(rows: Sequence[records.Row]) -> str:
    """Say what the columns are."""
    agree, compared = (sum(int(row[name]) for row in rows) for name in ("agree_with_fit", "compared_with_fit"))
    return (
        "Each row is one flow, trained once, and new data sets from the model. Right is an answer whose means are "
        "within 0.1 standard deviations of the exact ones, and whose standard deviations are within 10 %. Seconds are "
        "processor time of one thread. Changed data sets have all values, one, or every other one a thousand robust "
        "standard deviations away, which the prior does not predict. "
        f"Compared with `pf.fit` too: {compared}, of which {agree} agree in this sense."
    )
