"""The section about densities of data: points in the plane, vectors, images, and planar flows layer by layer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from benchmarks.density import peers as density_peers
from benchmarks.density import running as density
from benchmarks.density.problems import PROBLEMS, TABLES
from benchmarks.records import Row

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
About = Callable[[Sequence[Row]], str]
Column = tuple[str, str]  # problem, seconds
CLUSTERED = {*TABLES, "digits"}


def section(rows: Sequence[Row], planar_rows: Sequence[Row], table: Table, about: About) -> str:
    """Return the section: a table for each sort of data that there is."""
    parts = [_head(rows, about)]
    dims = {row["problem"]: int(row["dim"]) for row in rows}
    for title, belongs, write in (
        ("Points in the plane", lambda name: dims[name] == 2, _nats),
        ("Vectors", lambda name: dims[name] > 2 and not PROBLEMS[name].images and name not in CLUSTERED, _nats),
        ("Tables, many of them with clusters", lambda name: name in CLUSTERED, _nats),
        ("Images, in bits a dimension, less is better", lambda name: bool(PROBLEMS[name].images), _bits),
    ):
        chosen = [row for row in rows if belongs(row["problem"])]
        if chosen:
            parts += [f"### {title}", table(*_body(chosen, dims, write))]
    rest = [row for row in rows if row["best"] and float(row["seconds"]) >= 100.0]
    if rest:
        falls = max(float(row["best"]) - float(row["last"]) for row in rest)
        parts.append(
            f"Where we had 100 s or more, the last check was at most {falls:.1f} nats below the best of a run."
        )
    if planar_rows:
        parts += ["### Planar flows", *_planar(planar_rows, table)]
    return "\n\n".join(parts)


def _head(rows: Sequence[Row], about: About) -> str:
    versions = ", ".join(dict.fromkeys(row["version"] for row in rows if row["version"]))
    return (
        "Mean log density of test points in nats, more is better: the mean over seeds, three where the worst is "
        "given in brackets, else one or two.\n\nAll methods get the same data, split, number of layers, widths, batch "
        "and CPU seconds of one thread, which the head names. Peers are trained by one plain recipe: standardized "
        f"data, Adam with {density_peers.LEARNING_RATE:g} along a cosine, the best of twenty checks. The mixture of "
        f"Gaussians has the number of components that held-out points prefer.\n\n{about(rows)} pyro_flows {versions}."
    )


def _body(
    rows: Sequence[Row], dims: dict[str, int], write: Callable[[float, int], str]
) -> tuple[list[str], list[list[str]]]:
    found = density.means(rows)
    columns: list[Column] = sorted(dict.fromkeys((name, seconds) for name, seconds, *_ in found), key=_place)
    methods = list(dict.fromkeys((method, kind) for *_, method, kind in found))
    body = []
    for method, kind in sorted(methods, key=lambda pair: pair[0] != density.OURS):
        cells = []
        for name, seconds in columns:
            cell = found.get((name, seconds, method, kind))
            cells.append("" if cell is None else _cell(*cell, lambda nats, dim=dims[name]: write(nats, dim)))
        body.append([f"{method} {kind}".strip(), *cells])
    entropies = [-PROBLEMS[name].entropy for name, _ in columns]
    if not all(map(math.isnan, entropies)):
        body.append(["no more is possible", *(write(value, 2) for value in entropies)])
    return ["", *(f"{name}, {float(seconds):g} s" for name, seconds in columns)], body


def _place(column: Column) -> tuple[int, float]:
    return list(PROBLEMS).index(column[0]), float(column[1])


def _cell(mean: float, worst: float, seeds: int, write: Callable[[float], str]) -> str:
    return write(mean) + (f" ({write(worst)})" if seeds > 2 else "")


def _nats(nats: float, dim: int) -> str:
    return "" if math.isnan(nats) else f"{nats:.3f}" if dim == 2 else f"{nats:.2f}" if dim < 20 else f"{nats:.1f}"


def _bits(nats: float, dim: int) -> str:
    """All images here have 256 levels."""
    return f"{(math.log(256.0) - nats / dim) / math.log(2.0):.2f}"


def _planar(rows: Sequence[Row], table: Table) -> list[str]:
    rows = [row for row in rows if row["version"] == rows[-1]["version"]]
    text = (
        "Planar layers bent onto Rezende and Mohamed's first potential, from a Gaussian and from a uniform square: "
        f"KL(q || p) in nats, mean over seeds and the worst one. pyro_flows {rows[-1]['version']}."
    )
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["base"], row["layers"]), []).append(float(row["gap"]))
    layers = sorted({layer for _, layer in groups}, key=int)
    body = []
    for base in dict.fromkeys(base for base, _ in groups):
        cells = [groups.get((base, layer), []) for layer in layers]
        body.append([base, *(f"{statistics.fmean(cell):.3f} ({max(cell):.3f})" if cell else "" for cell in cells)])
    return [text, table(["base", *(f"{layer} layers" if layer != "1" else "1 layer" for layer in layers)], body)]
