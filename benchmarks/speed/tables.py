"""The tables of ``speed.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from benchmarks.records import Row
from benchmarks.speed import running as speed

GROWING = ("dim", "batch", "layers", "rows")


def section(rows: Sequence[Row], table: Callable[[Sequence[str], Sequence[Sequence[str]]], str]) -> str:
    """Return the section about speed; ``table`` makes Markdown of a header and lines."""
    parts = {name: [row for row in rows if row["part"] == name] for name in dict.fromkeys(row["part"] for row in rows)}
    writers = {
        "steps": _steps, "gradients": _gradients, "flows": _flows, "growth": _growth, "threads": _threads,
        "limit": _limit,
    }  # fmt: skip
    found = [writers[name](_cases(part), table) for name, part in parts.items()]
    shown = [row for part in parts.values() for case in _cases(part) for row in case]
    versions = " and ".join(dict.fromkeys(row["version"] for row in shown))
    machine, software = (" and ".join(dict.fromkeys(row[name] for row in rows)) for name in ("machine", "software"))
    about = (
        "Medians of turns that processes of one thread each take, so that a busy machine is busy for all; ratios are "
        f"medians within a round.\n\nMeasured on {machine}; {software}. pyro_flows {versions}."
    )
    return "\n\n".join([about, *found])


def _cases(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each case, of the version that was written last."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(speed.key(row)[:-1], []).append(row)
    return [[row for row in case if row["version"] == case[-1]["version"]] for case in cases.values()]


def _steps(cases: Sequence[Sequence[Row]], table: Callable[..., str]) -> str:
    text = (
        "One step of variational inference in milliseconds: draw, score, differentiate, update with Adam; couplings of "
        f"hidden layers (32, 32). *eager* and *recorded* are ours on {_layers(cases)} couplings alone, "
        "with the path gradient; *the guide of fit* has a Student-t base, tails and a trained triangular map on top of "
        "them. Pyro's `AutoNormalizingFlow` has its affine couplings with a flip between each two, NumPyro's jitted "
        "step inverse autoregressive flows of the same number and widths (refused where D is above the widths), "
        "both the plain gradient."
    )
    names = [name for name in speed.STEPS if any(name in speed.medians(case) for case in cases)]
    lines = []
    for case in cases:
        times, faster = speed.medians(case), speed.ratios(case, "Pyro")
        cells = [_cell(times.get(name), faster.get(name) if name != "Pyro" else None) for name in names]
        lines.append([case[0]["case"], case[0]["dim"], case[0]["batch"], *cells])
    return f"{text}\n\n{table(['model', 'D', 'particles', *names], lines)}\n\nIn brackets: times faster than Pyro."


def _layers(cases: Sequence[Sequence[Row]]) -> str:
    return " or ".join(dict.fromkeys(case[0]["layers"] for case in cases))


def _cell(time: float | None, faster: float | None) -> str:
    if time is None:
        return ""
    return f"{time:.2f}" + ("" if faster is None else f" ({faster:.1f})")


def _gradients(cases: Sequence[Sequence[Row]], table: Callable[..., str]) -> str:
    lines = []
    for case in cases:
        times, faster = speed.medians(case), speed.ratios(case, speed.PLAIN)
        cost = f"{1.0 / faster[speed.PATH]:.2f}"
        lines.append([case[0]["case"], f"{times[speed.PATH]:.2f}", f"{times[speed.PLAIN]:.2f}", cost])
    text = (
        f"The gradient alone, by autograd, of {_layers(cases)} layers and {cases[0][0]['batch']} particles on eight "
        "schools: the path gradient against the plain one."
    )
    return f"{text}\n\n{table(['flow', 'path, ms', 'plain, ms', 'ratio'], lines)}"


def _flows(cases: Sequence[Sequence[Row]], table: Callable[..., str]) -> str:
    names = [name for name in speed.FLOWS if any(name in speed.medians(case) for case in cases)]
    lines = []
    for case in cases:
        times = speed.medians(case)
        best = min((name for name in times if name in speed.PEERS), key=times.__getitem__)
        cells = [f"{times[name]:.2f}" if name in times else "" for name in names]
        lines.append([case[0]["case"], *cells, f"{speed.ratios(case, best)['ours']:.2f} ({best})"])
    first = cases[0][0]
    text = (
        f"Bare flows of {first['layers']} affine couplings with ReLU networks, D = {first['dim']}, {first['batch']} "
        "points, without gradients, in milliseconds."
    )
    return f"{text}\n\n{table(['', *names, 'ours: times faster than the fastest peer'], lines)}"


def _growth(cases: Sequence[Sequence[Row]], table: Callable[..., str]) -> str:
    lines = []
    for name in GROWING:
        varied = [case for case in cases if (name == "rows") == (case[0]["case"] == "regression")]
        others = [other for other in GROWING if other != name]
        common = max(
            ([case for case in varied if all(case[0][other] == base[0][other] for other in others)] for base in varied),
            key=len,
            default=[],
        )
        points = sorted((float(case[0][name]), speed.medians(case), float(case[-1]["megabytes"])) for case in common)
        if len(points) < 2:
            continue
        (low, first, _), (before, last_but, _), (high, last, peak) = points[0], points[-2], points[-1]
        at, ahead, end = (times[speed.RECORDED] for times in (first, last_but, last))
        slope = math.log(end / ahead) / math.log(high / before)
        whole = math.log(end / at) / math.log(high / low)
        words = {"dim": "D", "batch": "particles", "layers": "layers", "rows": "rows of data"}
        spans = f"{low:g} to {high:g}"
        lines.append([words[name], spans, f"{at:.2f}", f"{end:.2f}", f"{whole:.2f}", f"{slope:.2f}", f"{peak:.0f}"])
    header = ["", "from, to", "ms at first", "ms at last", "slope", "slope at the end", "MB at last"]
    text = "Growth of a recorded step, the others at D = 20, 64 particles, 8 layers; slopes are log-log."
    return f"{text}\n\n{table(header, lines)}"


def _threads(cases: Sequence[Sequence[Row]], table: Callable[..., str]) -> str:
    lines = []
    for case in cases:
        times = speed.medians(case)
        one, two = (times.get(name, math.nan) for name in speed.THREADS)
        lines.append([case[0]["rows"], f"{one:.2f}", f"{two:.2f}", f"{one / two:.2f}"])
    text = (
        "Threads, on a regression with 64 particles: `fit` takes one thread up to about 16 000 rows, where a "
        "second one begins to pay, and the caller's number above. From there on memory takes the time, which varied up "
        "to fourfold from run to run on virtual machines."
    )
    return f"{text}\n\n{table(['rows of data', '1 thread, ms', '2 threads, ms', 'times faster'], lines)}"


def _limit(cases: Sequence[Sequence[Row]], table: Callable[..., str]) -> str:
    lines = []
    for case in cases:
        times = speed.medians(case)
        recorded, products = times[speed.RECORDED], times[speed.PRODUCTS]
        lines.append([case[0]["batch"], f"{recorded:.2f}", f"{products:.2f}", f"{100.0 * products / recorded:.0f} %"])
    header = ["particles", "recorded, ms", "products alone, ms", "share"]
    text = "The distance to the limit: a step on eight schools, and its couplings' matrix products alone."
    return f"{text}\n\n{table(header, lines)}"


def summary(rows: Sequence[Row]) -> str:
    """Return how many times faster than Pyro and NumPyro the step on eight schools is."""
    cases = _cases([row for row in rows if row["part"] == "steps"])
    case = next((case for case in cases if case[0]["case"] == speed.SCHOOLS.case), [])
    ours = (speed.EAGER, speed.RECORDED)
    lines = []
    for other in ("Pyro", "NumPyro"):
        faster = speed.ratios(case, other)
        found = [f"{name} {faster[name]:.1f}" for name in ours if name in faster]
        if found:
            lines.append(f"Eight schools, times faster than {other}: {', '.join(found)}.")
    return "\n".join(lines)
