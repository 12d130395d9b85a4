"""The sections about posteriors with reference draws, and about the automatic stop."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.markdown import about, number, plural, table
from benchmarks.posteriors import judging, rivals, stopping
from benchmarks.posteriors import running as posteriordb
from benchmarks.records import Row


def posteriordb_section(rows: Sequence[Row]) -> str:
    """Return the section about posteriordb: our fits by posterior, then all methods."""
    methods = judging.newest(rows)
    parts = []
    if ours := methods.get(posteriordb.OURS):
        parts += [_ours_text(ours), _ours_table(ours)]
    parts += [_methods_text(methods), _methods_table(methods)]
    return "\n\n".join(parts)


def _ours_text(rows: Sequence[Row]) -> str:
    found = judging.count(rows)
    return (
        f"`fit` as it comes, on {found.posteriors} posteriors of posteriordb with {plural(found.seeds, 'seed')} each; "
        "every figure is that of the worst seed.\n\nErrors are those of the worst unconstrained coordinate against "
        "the reference draws: of the mean, in reference standard deviations, and the absolute log ratio of standard "
        "deviations. They are given for the draws to use and for raw draws of the guide. The ELBO gap is to a log "
        f"evidence known to 0.02 nats. Seconds are of one thread.\n\n{about(rows)} "
        f"pyro_flows {', '.join(dict.fromkeys(row['version'] for row in rows))}."
    )


def _ours_table(rows: Sequence[Row]) -> str:
    header = ["posterior", "D", "mean", "sd", "raw mean", "raw sd", "k-hat", "ESS/S", "ELBO gap", "gradients"]
    body = []
    for name, group in judging.by_posterior(rows).items():
        errors = [judging.worst(group, f"{which}_{what}") for which in ("used", "raw") for what in ("mean", "sd")]
        statuses = ", ".join(sorted({row["status"] or "failed" for row in group}))
        body.append(
            [
                name,
                next((row["dim"] for row in group if row["dim"]), ""),
                *(number(error, 3) for error in errors),
                number(judging.worst(group, "k_hat"), 2),
                number(judging.worst(group, "ess_ratio", smallest=True), 2),
                number(judging.worst(group, "elbo_gap"), 3),
                number(judging.worst(group, "gradient_evaluations"), 0),
                number(judging.worst(group, "seconds"), 0),
                statuses,
            ]
        )
    return table([*header, "seconds", "verdicts"], body)


def _methods_text(methods: dict[str, list[Row]]) -> str:
    others = [name for name in methods if name != posteriordb.OURS]
    text = (
        f"A fit is right if no mean is off by more than {judging.MEAN} standard deviations and no standard "
        "deviation by more than 10 %, wrong if one is off by more than 0.25 standard deviations or 25 %. A posterior "
        "counts as right if all seeds are."
    )
    if not others:
        return text
    versions = ", ".join(dict.fromkeys(row["version"] for name in others for row in methods[name]))
    seeds = plural(max(len({row["seed"] for row in methods[name]}) for name in others), "seed")
    return (
        f"{text}\n\nPyro's guides are trained by Pyro's `SVI` with Adam and {rivals.PARTICLES} particles, for as many "
        f"gradient evaluations as our fit of the same posterior and seed took ({rivals.GRADIENTS_AT_MOST} at most), at "
        f"each of the learning rates {', '.join(f'{rate:g}' for rate in rivals.RATES)}. The one with the best ELBO "
        f"counts, and only its own gradients and seconds; with {seeds}. They get each posterior in unconstrained "
        "coordinates, since on the models as written they cannot start from improper priors. Their flows have "
        f"{rivals.COUPLINGS} affine couplings with flips, and {rivals.AUTOREGRESSIVE} autoregressive "
        f"transforms, of hidden layers {rivals.HIDDEN}. Verdicts, and the draws to use, are those of `diagnose`. "
        f"Versions: {versions}."
    )


def _methods_table(methods: dict[str, list[Row]]) -> str:
    gaps = [f"gap ≤ {limit:g}" for limit in judging.SMALL_GAPS]
    header = ["method", "right, to use", "right, raw", "k-hat < 0.7", "ESS/S ≥ 0.1", *gaps]
    header += ["wrong and ok", "right and unreliable", "gradients", "seconds"]
    body = []
    for name, rows in methods.items():
        found = judging.count(rows)
        total = f"of {found.posteriors}"
        counts = (found.right_used, found.right_raw, found.small_k, found.large_ess)
        body.append(
            [
                name,
                *(f"{number} {total}" for number in counts),
                *(f"{number} of {found.evidence_known}" for number in found.small_gap),
                f"{found.wrong_and_ok_fits} of {found.fits}",
                f"{found.right_and_unreliable_fits} of {found.right_fits}",
                number(found.gradients, 0),
                number(found.seconds, 1),
            ]
        )
    return table(header, body)


def stopping_section(rows: Sequence[Row]) -> str:
    """Return the section about the automatic stop."""
    rows = list({(row["posterior"], row["seed"]): row for row in rows}.values())
    longer = statistics.median(int(row["longer_steps"]) / int(row["steps"]) for row in rows)
    text = (
        f"The first round of a fit against one with the same seed that goes on {longer:.1f} times as long (a budget of "
        f"{stopping.LONGER} times the steps, less what its shorter cool-down leaves); ELBOs on {stopping.DRAWS} common "
        f"draws. {stopping.summary(rows)}\n\n{about(rows)} "
        f"pyro_flows {', '.join(dict.fromkeys(row['version'] for row in rows))}."
    )
    body = [
        [
            f"{row['posterior']}, seed {row['seed']}",
            row["steps"],
            row["longer_steps"],
            _lost(row),
            _lost(row, "error_of_"),
        ]
        for row in rows
    ]
    return f"{text}\n\n{table(['', 'steps', 'longer', 'nats lost', 'standard error'], body)}"


def _lost(row: Row, prefix: str = "") -> str:
    return f"{float(row[f'{prefix}lost']):.4f}"
