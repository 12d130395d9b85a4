"""Figures of chains against those of arviz_stats, one coordinate after the other."""

import math

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats

from pyro_flows.support.numbers import mixing

REAL = torch.float64
AXES = {"chain_axis": 0, "draw_axis": 1}


def chains(count, draws, dim):
    """Autoregressions that now and then stay where they are, as chains do whose proposal is rejected."""
    x = torch.randn(count, draws, dim, dtype=REAL)
    persistence = torch.linspace(-0.5, 0.95, dim, dtype=REAL)
    for time_ in range(1, draws):
        x[:, time_] += persistence * x[:, time_ - 1]
        stays = torch.rand(count) < 0.2
        x[stays, time_] = x[stays, time_ - 1]
    x[..., 0] = x[..., 0].round()  # many ties
    x[: count // 2, :, 1] += 1.0  # chains that disagree
    return x


def expected(x, superchain):
    given = x.numpy()
    compared = given if len(given) > 1 else np.concatenate(np.split(given[:, : given.shape[1] // 2 * 2], 2, axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {
            "r_hat": array_stats.rhat(compared, **AXES),
            "ess_bulk": array_stats.ess(given, method="bulk", **AXES),
            "ess_tail": array_stats.ess(given, method="tail", prob=(0.05, 0.95), **AXES),
        }
        if superchain is not None:
            found["nested_r_hat"] = array_stats.rhat_nested(given, superchain_ids=superchain.numpy(), **AXES)
    return {name: torch.as_tensor(np.asarray(value, dtype=float)) for name, value in found.items()}


SIZES = [(64, 64), (64, 65), (16, 300), (8, 600), (4, 9), (1, 500), (2, 4), (2, 3)]


@pytest.mark.parametrize(("count", "draws"), SIZES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_figures_are_those_of_arviz(count, draws, monkeypatch):
    monkeypatch.setattr(mixing, "TOGETHER", 4 * count * draws)  # in several parts
    x = chains(count, draws, 7)
    superchain = torch.arange(count) // (count // 2) if count > 1 else None
    found = mixing.chain_diagnostics(x, superchain)
    for name, value in expected(x, superchain).items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, equal_nan=True, msg=name)
    if superchain is not None:
        torch.testing.assert_close(mixing.nested_r_hat(x, superchain), found["nested_r_hat"], equal_nan=True)
        torch.testing.assert_close(mixing.r_hat(x), found["r_hat"], equal_nan=True)


def test_superchains_are_told_apart_in_any_order():
    x = chains(32, 40, 3)
    superchain = torch.arange(32) % 4
    given = array_stats.rhat_nested(x.numpy(), superchain_ids=superchain.numpy(), **AXES)
    torch.testing.assert_close(mixing.nested_r_hat(x, superchain), torch.as_tensor(np.asarray(given, dtype=float)))
    with pytest.raises(ValueError, match="as many chains in each"):
        mixing.nested_r_hat(x, torch.arange(32).clamp_max(2))


def test_what_never_moves_and_what_is_not_finite():
    x = chains(16, 32, 3)
    x[..., 1], x[3, 5, 2] = 2.0, math.inf
    found = mixing.chain_diagnostics(x, torch.arange(16) // 4)
    assert found["ess_bulk"][1] == 512.0  # as ArviZ has it; R-hat speaks against it
    assert bool(found["r_hat"].isnan().tolist() == [False, True, True])
    assert all(bool(value[2].isnan()) for value in found.values())
