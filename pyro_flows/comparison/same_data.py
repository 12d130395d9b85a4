"""Whether models are of the same data, and of the same observations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from pyro_flows.comparison.working import Whole
from pyro_flows.results.arviz_groups import observed_group
from pyro_flows.results.record import Record

SAME = 1e-5  # relative: data in single precision and in double


def check_data(posteriors: Mapping[str, Record]) -> None:
    """Refuse posteriors whose models observe other values."""
    for posterior in posteriors.values():
        posterior._check_unchanged()
    data = {name: _data(posterior) for name, posterior in posteriors.items()}
    first = next(iter(data))
    for name, values in data.items():
        why = _differ(data[first], values)
        if why is not None:
            raise ValueError(
                f"posteriors: {first!r} and {name!r} are of different data, so neither elpd nor evidence can be "
                f"compared: {why}. A transformed outcome is other data too."
            )


def _data(posterior: Record) -> dict[str, np.ndarray]:
    """Return the observed values by site, those that masks leave out excepted."""
    group = posterior._stored[0].get("observed_data") if posterior._stored else observed_group(posterior._need_model())
    return {} if group is None else {str(name): values.to_numpy() for name, values in group.data_vars.items()}


def _differ(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> str | None:
    """Return in words how data differ; sites may have other names, if they come in the same order."""
    pairs = [(name, name) for name in one] if set(one) == set(other) else list(zip(one, other, strict=False))
    if len(one) != len(other):
        return f"sites {', '.join(one) or 'none'} and {', '.join(other) or 'none'}"
    for mine, theirs in pairs:
        a, b = one[mine], other[theirs]
        if a.size != b.size:
            return f"{a.size} values of {mine!r} and {b.size} of {theirs!r}"
        if not np.allclose(a.ravel().astype(float), b.ravel().astype(float), rtol=SAME, atol=0.0, equal_nan=True):
            return f"the values of {mine!r}" + ("" if mine == theirs else f" and {theirs!r}")
    return None


def check_observations(found: Mapping[str, Whole]) -> None:
    """Refuse models that group the data into other observations."""
    for one, other in itertools.pairwise(found):
        sizes = len(found[one].elpd), len(found[other].elpd)
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"posteriors: {one!r} takes the data for {sizes[0]} observations, {other!r} for {sizes[1]}; give the "
                "outcome the same event dimensions in both."
            )
