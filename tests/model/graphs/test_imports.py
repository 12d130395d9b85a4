"""What the first gradients and Hessians do not import: torch's compiler takes two seconds, and computer algebra one."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import pyro, torch
import pyro.distributions as dist
from pyro_flows import LogDensity
from pyro_flows.inference.starts.curvature import inverse_roots
from pyro_flows.inference.starts.prior import prior_draws

def model(group, y):  # absolute values in a binomial's logits, a flat prior between two bounds, one scale of many rows
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.sample("tau", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    pyro.sample("flat", dist.ImproperUniform(dist.constraints.interval(0.0, 2.0), (), (2,)))
    with pyro.plate("groups", 4):
        effect = pyro.sample("effect", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("count", dist.Binomial(20, logits=effect[group]), obs=y)
        pyro.sample("size", dist.Normal(effect[group], noise), obs=y.log())

y = torch.arange(12.0).repeat(5) + 3.0
density = LogDensity(model, (torch.arange(60) % 4, y), noncentered=True)
z = torch.randn(64, density.dim)
prior_draws(density, 3, seed=0)
for _ in range(5):
    value, slope = density.value_and_grad(z)
roots, units = inverse_roots(density, z[:2])
print(density.reason, bool(torch.isfinite(slope).all() and (roots != torch.eye(density.dim)).any()))
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""


def test_first_derivatives_import_no_compiler_and_no_algebra(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.stdout.split("\n")[:2] == ["None True", "[]"], done.stderr
