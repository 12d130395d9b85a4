"""Newton's method: what has converged is left out, and where a gradient is dear it begins where paths ended."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_flows.inference.starts import climb as laplace_module
from pyro_flows.inference.starts import portfolio as portfolio_module
from pyro_flows.inference.starts.climb import NEWTON, newton
from pyro_flows.inference.starts.portfolio import portfolio
from tests.inference.starts.test_pathfinder import WIDE, density_of, gaussian


def test_points_that_have_converged_are_left_out(monkeypatch):
    """A quartic takes a step for each third of the distance that is left; its top takes none."""
    density = density_of(lambda z: -(z**4 + z.square()).sum(-1), 3)
    points = torch.tensor([[0.0, 0.0, 0.0], [3.0, -2.0, 1.0], [0.01, 0.0, 0.0]], dtype=torch.float64)
    rows = []

    def counted(density, points):
        rows.append(len(points))
        return inverse_roots(density, points)

    inverse_roots = laplace_module.inverse_roots
    monkeypatch.setattr(laplace_module, "inverse_roots", counted)
    found = newton(density, points)
    assert float(found.abs().max()) < 1e-4
    assert rows[0] == 3
    assert rows[-1] == 1
    assert rows == sorted(rows, reverse=True)
    alone = torch.cat([newton(density, point[None]) for point in points])
    torch.testing.assert_close(found, alone, rtol=0.0, atol=1e-7)


def test_the_evidence_of_a_normal_is_exact():
    density = density_of(lambda z: 1.5 - 0.5 * (z / 3.0).square().sum(-1), 2)
    full, _ = laplace_module.laplace(density, torch.ones(1, 2, dtype=torch.float64))
    assert full.evidence == pytest.approx(1.5 + math.log(2.0 * math.pi * 9.0))


@pytest.mark.parametrize("dear", [False, True])
def test_where_a_gradient_handles_many_numbers_paths_come_first(dear, monkeypatch):
    density, loc, factor = gaussian(WIDE)
    most = density.dim * density.written
    monkeypatch.setattr(portfolio_module, "CHEAP_HESSIAN_WRITES", most - 1 if dear else most)
    asked = []

    def recorded(density, points, **options):
        asked.append((points, options))
        return laplace_module.laplace(density, points, **options)

    monkeypatch.setattr(portfolio_module, "laplace", recorded)
    found = portfolio(density, seed=0)
    ((points, options),) = asked
    assert options == ({"most": NEWTON} if dear else {})
    away = torch.linalg.solve_triangular(factor, (points - loc).mT, upper=False).norm(dim=0)
    assert (float(away.max()) < 0.1) == dear
    best = next(start for start in found if start.name == "laplace")
    torch.testing.assert_close(best.loc, loc, rtol=1e-6, atol=1e-6)
