"""Fits by several processes: rows of each, one gradient, one judge."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from torch import distributed

import pyro_flows as pf
from pyro_flows.fitting import fit as fitting  # the module
from pyro_flows.fitting import hierarchical, ranks
from pyro_flows.fitting.ranks import Followed, Ranks, RowsOfRank
from pyro_flows.support.process.seeding import seeded
from tests.guides.test_hierarchical import SCHOOLS, SIGMA, data, exact, normal_rows, schools

MODEL = """
import pyro, torch
import pyro.distributions as dist

def model(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(2.0, dtype=torch.float64)))
    with pyro.plate("row", len(x), subsample_size=50) as index:
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])
"""


def drawn(rank, size, rows, of, seed=0):
    with RowsOfRank(Ranks(rank, size), seed), pyro.plate("row", of, subsample_size=rows) as index:
        return index


def test_processes_draw_other_rows_of_one_order():
    parts = [drawn(rank, 3, 4, 12) for rank in range(3)]
    assert sorted(torch.cat(parts).tolist()) == list(range(12))
    assert torch.cat([drawn(rank, 3, 5, 12) for rank in range(3)]).unique().numel() == 12  # three come twice
    assert all(len(drawn(rank, 3, 5, 12).unique()) == 5 for rank in range(3))
    often = torch.stack([drawn(1, 2, 3, 6, seed).bincount(minlength=6) for seed in range(400)]).double().mean(0)
    assert torch.allclose(often, torch.full((6,), 0.5, dtype=torch.float64), atol=0.1)


def test_rows_that_are_given_or_all_are_left_alone():
    with RowsOfRank(Ranks(1, 2), 0):
        with pyro.plate("given", 10, subsample=torch.arange(3)) as index:
            assert index.tolist() == [0, 1, 2]
        with pyro.plate("whole", 4) as index:
            assert list(index) == [0, 1, 2, 3]


def trained(monkeypatch, averaged):
    """Twenty steps of the training of a fit; return losses and parameters."""
    monkeypatch.setattr(Ranks, "averaged", lambda self, module: averaged(module))
    x = data(40)
    clock, bar = SimpleNamespace(finite=False, over=False, look=lambda: None), SimpleNamespace(count=lambda *_: None)
    plan = SimpleNamespace(model=normal_rows, args=(x, 10), kwargs={}, seed=0, clock=clock, bar=bar)
    with seeded(0):
        guide = pf.AutoHierarchicalFlow(normal_rows, layers=2, init="prior").initialize(x, 10)
        losses: list[float] = []
        hierarchical._train(guide, plan, 20, losses)
    return torch.tensor(losses), torch.cat([part.detach().flatten() for part in guide.parameters()])


def test_one_process_of_a_group_trains_as_it_does_alone(tmp_path, monkeypatch):
    """Through DistributedDataParallel over gloo: the same steps, to rounding."""
    alone = trained(monkeypatch, lambda module: module)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/join", rank=0, world_size=1)
    try:
        group = trained(monkeypatch, torch.nn.parallel.DistributedDataParallel)
    finally:
        distributed.destroy_process_group()
    assert not torch.equal(alone[0], alone[0][:1].expand(20))
    assert all(torch.allclose(one, other) for one, other in zip(alone, group, strict=True))


@pytest.mark.falls_back
def test_a_model_without_minibatches_is_fitted_by_the_first_process(monkeypatch):
    monkeypatch.setattr(ranks, "ranks", lambda: Ranks(1, 2))
    with pytest.raises(Followed):
        pf.fit(schools, SCHOOLS, SIGMA, progress=False)


def test_several_processes_take_no_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setattr(fitting, "ranks", lambda: Ranks(0, 2))
    place = tmp_path / "kept"
    with pytest.raises(ValueError, match=r"^checkpoint: expected None for a fit by several processes"):
        pf.fit(normal_rows, data(40), 10, checkpoint=place, progress=False)
    assert not place.exists()


def test_without_torchrun_a_fit_is_one_of_this_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with ranks.joined() as found:
        assert found == Ranks(0, 1)
    assert not distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_torchrun(processes, tmp_path):
    """Two processes train, the first judges and writes, and the result is right."""
    x = data(1000, spread=1.5)
    (tmp_path / "model.py").write_text(MODEL)
    np.savez(tmp_path / "data.npz", x=x.numpy())
    # a free port is taken by itself: --standalone
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "pyro_flows", "fit", "model.py:model", "--data", "data.npz", "--out", "out", "--no-progress"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Wrote ") == 1
    summary = json.loads((tmp_path / "out" / "posterior.json").read_text())
    assert summary
    posterior = pf.load(tmp_path / "out")
    assert posterior.verdict.status in ("ok", "corrected")
    for name, (mean, sd) in exact(x).items():
        assert abs(float(posterior.samples[name].mean()) - mean) < 0.2 * sd
