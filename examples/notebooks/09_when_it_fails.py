# %% [markdown]
# # When it fails: modes, labels, funnels
#
# A fit can be wrong without any sign in its own draws. So each fit comes with a verdict, which has one of four words.
# This notebook makes each of them happen, and shows what to do next.
#
# | word | what `samples` holds |
# |---|---|
# | `ok` | the method's own draws |
# | `corrected` | draws that were resampled by importance weights |
# | `refined` | Markov chains that started at the method's draws, and converged |
# | `unreliable` | the method's own draws; do not use them |

# %%
import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.optim import ClippedAdam

import pyro_flows as pf

plt.style.use("pyro_flows.style")
seen = {}

# %% [markdown]
# ## Two modes: how fast does the universe expand?
#
# Two teams have measured the Hubble constant, in km/s per megaparsec. The Planck satellite found 67.4 ± 0.5 (2020,
# arXiv:1807.06209). Distances to supernovae gave 73.0 ± 1.0 (2022, arXiv:2112.04510). They do not agree.
#
# Suppose that either team may be wrong by more than it says: errors have a Student t with two degrees of freedom.
# The posterior then has two modes. It has one dimension, so that a sum over a grid gives the exact answer.

# %%
measured, error = torch.tensor([67.4, 73.04]), torch.tensor([0.5, 1.04])


def hubble(measured, error):
    h0 = pyro.sample("h0", dist.Normal(70.0, 10.0))
    with pyro.plate("team", 2):
        pyro.sample("measured", dist.StudentT(2.0, h0, error), obs=measured)


both = pf.fit(hubble, measured, error, progress=False)
seen["two modes: fit"] = both
print(both.verdict)

# %%
grid = torch.linspace(60.0, 80.0, 2001)
exact = dist.Normal(70.0, 10.0).log_prob(grid) + dist.StudentT(2.0, grid[:, None], error).log_prob(measured).sum(-1)
exact = exact.exp() / torch.trapezoid(exact.exp(), grid)
share = torch.trapezoid(exact[grid > 70.5], grid[grid > 70.5])
found = (both.samples["h0"] > 70.5).float()
print(f"P(h0 > 70.5): exact {share:.3f}, fit {found.mean():.3f} ± {found.std() / len(found) ** 0.5:.3f}")

# %% [markdown]
# Now a guide that sees one mode only: a Gaussian, trained by Pyro's SVI. The best Gaussian is a narrow one at 67.7.


# %%
def train(model, guide, *data, steps=800, rate=0.03):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = Trace_ELBO(16, max_plate_nesting=1, vectorize_particles=True)
    svi = SVI(model, guide, ClippedAdam({"lr": rate, "lrd": 0.01 ** (1 / steps)}), elbo)
    for _ in range(steps):
        svi.step(*data)
    return guide


start = init_to_value(values={"h0": torch.tensor(67.4)})
one = train(hubble, AutoNormal(hubble, init_loc_fn=start, init_scale=0.5), measured, error)
half = pf.diagnose(hubble, one, measured, error)
seen["two modes: Gaussian"] = half
print(half.verdict)

# %%
figure, axes = plt.subplots(figsize=(6.0, 3.0))
axes.plot(grid, exact, color="0.4", label="exact")
bins = {"bins": 80, "range": (62.0, 79.0), "density": True}
axes.hist(both.samples["h0"].numpy(), alpha=0.5, label=f"fit: {both.verdict.status}", **bins)
line = {"histtype": "step", "linewidth": 1.5, "color": "C1"}
axes.hist(half.samples["h0"].numpy(), label=f"Gaussian: {half.verdict.status}", **line, **bins)
axes.set(xlim=(62.0, 79.0), xlabel="Hubble constant (km/s per megaparsec)", ylabel="density")
axes.legend()
plt.show()

# %% [markdown]
# A few of the Gaussian's draws come near to the second mode. Their weights are so large that k-hat is far above its
# threshold.
#
# The verdict names two next steps. Training longer does not help here, since one Gaussian cannot have two modes. So
# call `refine`. It runs 64 Markov chains. Half of them begin at draws of the guide that were resampled by their
# weights, and half begin farther out. The verdict is `refined` if the chains agree, have enough effective draws and
# rarely diverge.

# %%
chains = half.refine()
seen["two modes: Gaussian, then refine()"] = chains
print(chains.verdict)
print(f"P(h0 > 70.5) = {(chains.samples['h0'] > 70.5).float().mean():.3f}")

# %% [markdown]
# ## Label switching: galaxies
#
# The velocities of 82 galaxies lie in groups. A mixture of three normals describes them. The data do not say which
# component is the first: each of the 3! = 6 orders has the same density.

# %%
velocity = pd.read_csv("../data/galaxies.csv")["velocity"].replace(26690, 26960)  # a known error in R's copy
v = torch.tensor(velocity.to_numpy() / 1000.0, dtype=torch.float32)


def mixture(v):
    weights = pyro.sample("weight", dist.Dirichlet(torch.full((3,), 2.0)))
    with pyro.plate("group", 3):
        center = pyro.sample("center", dist.Normal(20.0, 8.0))
        width = pyro.sample("width", dist.LogNormal(0.5, 0.5))
    with pyro.plate("galaxy", len(v)):
        parts = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(center, width))
        pyro.sample("v", parts, obs=v)


single = pf.fit(mixture, v, escalate=False, refine=False, progress=False)
seen["labels free: one round"] = single
print(single.verdict)

# %% [markdown]
# With `escalate=False`, the fit trains one flow and does no more. It has found one order of the groups. K-hat is below
# its threshold and ESS/S is high, since no draw of the flow is near another order. Weights say nothing about a region
# without draws. The search for missed modes began elsewhere, and found some.
#
# By default, `fit` goes on, and adds what it missed. The method is then a mixture:

# %%
switching = pf.fit(mixture, v, progress=False)
seen["labels free: fit"] = switching
print(switching.verdict)
print("mean of each center:", switching.samples["center"].mean(0))

# %% [markdown]
# All three centers have nearly the same mean, since each is any of the groups. The draws are right; the summary asks a
# question that has no answer. Ask for the density of velocities instead, or fix the order: a center, and positive
# distances to the next ones.


# %%
def ordered(v):
    weights = pyro.sample("weight", dist.Dirichlet(torch.full((3,), 2.0)))
    slowest = pyro.sample("slowest", dist.Normal(12.0, 5.0))
    with pyro.plate("gap", 2):
        gap = pyro.sample("distance", dist.Gamma(3.0, 0.3))
    center = pyro.deterministic("center", slowest + torch.cat([torch.zeros(1), gap.cumsum(-1)]))
    with pyro.plate("group", 3):
        width = pyro.sample("width", dist.LogNormal(0.5, 0.5))
    with pyro.plate("galaxy", len(v)):
        parts = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(center, width))
        pyro.sample("v", parts, obs=v)


sorted_groups = pf.fit(ordered, v, progress=False)
seen["labels fixed: fit"] = sorted_groups
print(sorted_groups.verdict)
sorted_groups.summary(["center", "weight", "width"])

# %%
figure, axes = plt.subplots(1, 2, figsize=(8.0, 3.0), sharex=True, layout="constrained")
panels = {"labels free": switching, "order fixed": sorted_groups}
for panel, (title, posterior) in zip(axes, panels.items(), strict=True):
    for k in range(3):
        panel.hist(posterior.samples["center"][:, k].numpy(), bins=90, range=(5, 40), alpha=0.5, label=f"group {k + 1}")
    panel.set(title=f"{title}: {posterior.verdict.status}", xlabel="center (1000 km/s)", yticks=[])
axes[0].legend()
plt.show()

# %% [markdown]
# The labels are fixed now. The third center has a long tail towards the second one: there, the third group is wide.
# `fit` found several modes here too. The method is again a mixture of Student-t distributions, and importance weights
# correct its draws.
#
# ## A funnel: eight schools, centered
#
# The effects of coaching in eight schools are drawn towards a common mean. If their spread `tau` is small, all effects
# must be close to the mean. So the posterior is narrow at small `tau` and wide at large `tau`: a funnel. A Gaussian
# guide fits its wide part only.

# %%
effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
names = ["Choate", "Deerfield", "Andover", "Exeter", "Hotchkiss", "Lawrenceville", "St. Paul's", "Mt. Hermon"]
errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(effects, errors):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, errors), obs=effects)


guide = train(schools, AutoNormal(schools), effects, errors, steps=1500, rate=0.1)
gaussian = pf.diagnose(schools, guide, effects, errors).assign_coords({"school": names})
seen["funnel: Gaussian"] = gaussian
print(gaussian.verdict)

# %% [markdown]
# Markov chains have trouble in the neck of a funnel too. So `refine` can take long here, and can stay `unreliable`. The
# cure is to change the coordinates.
#
# `fit` does so by itself. It finds out that `theta` has a location and a scale that are latent, and works in
# coordinates in which the funnel is gone. There, a grid over `tau` with a Gaussian for each value is good enough.

# %%
direct = pf.fit(schools, effects, errors, progress=False).assign_coords({"school": names})
seen["funnel: fit"] = direct
print(direct.verdict)

# %%
compared = {"fit": direct, "Gaussian": gaussian}
pf.plots.plot_pairs(compared, "theta[Choate]", "tau", transform={"tau": torch.log})

# %% [markdown]
# Points are the fit's draws. Lines enclose half and nine tenths of the draws of each. Those of the Gaussian are dashed.
# They miss the funnel's neck.
#
# ## The four words once more

# %%
rows = [
    {"posterior": name, "verdict": one.verdict.status, "k-hat": one.verdict.k_hat, "ESS/S": one.verdict.ess_ratio}
    for name, one in seen.items()
]
pd.DataFrame(rows).round(2)

# %% [markdown]
# K-hat and ESS/S measure how well a guide covers the region that it samples. They say nothing about other regions: see
# `labels free: one round`.
#
# ## When it goes wrong
#
# An `unreliable` verdict names a reason and a next step. In this order:
#
# 1. **Read the reason.** A named coordinate often shows which part of the model is hard.
# 2. **Stopped early?** Give more `max_steps` or `max_seconds`.
# 3. **A missed mode?** Symmetric modes mean that signs or labels are free: fix them. For other modes, use `runs=4`.
# 4. **A high k-hat?** Call `posterior.refine()`. If the chains do not converge either, the model is the problem.
# 5. **Change the model's parameters.** Scale by the group's spread, fix an order, or integrate out latents.
#
# Two cases escape every check: a mode far away that is much narrower than the others, and a model that is wrong.
# Against the first, `runs=4` helps sometimes. Against the second, compare replicates with the data (notebook 5).
