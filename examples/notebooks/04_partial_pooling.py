# %% [markdown]
# # Partial pooling: radon and sleep
#
# Groups of different sizes share information in a hierarchical model. Small groups borrow from the others, and large
# groups stand for themselves. This notebook fits two such models: radon in 85 counties, and reaction times of 18
# drivers with random slopes.
#
# The data are in the folder `examples/data` of the repository. Run the notebook from its own folder,
# `examples/notebooks`, or change the path in `read_csv`.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch

import pyro_flows as pf

plt.style.use("pyro_flows.style")

# %% [markdown]
# ## Radon in Minnesota
#
# Radon is a radioactive gas that comes from the soil. It was measured in 919 homes of 85 counties, in the basement
# (`floor` 0) or above (`floor` 1). The uranium in the soil of each county is known. Counties have between 1 and 116
# homes. (Price, Nero and Gelman 1996; Gelman and Hill 2007.)

# %%
radon = pd.read_csv("../data/radon.csv")
radon["county"] = radon["county"].str.title()
counties = radon.groupby("county", sort=True).agg(
    homes=("log_radon", "size"), mean=("log_radon", "mean"), uranium=("log_uranium", "first")
)
counties.sort_values("homes").iloc[[0, 1, 2, -3, -2, -1]].round(2)

# %%
log_radon = torch.tensor(radon["log_radon"].to_numpy(), dtype=torch.float32)
floor = torch.tensor(radon["floor"].to_numpy(), dtype=torch.float32)
county = torch.tensor(counties.index.get_indexer(radon["county"]))
uranium = torch.tensor(counties["uranium"].to_numpy(), dtype=torch.float32)

# %% [markdown]
# ## The model
#
# Each county has its own level. Levels vary around a line in uranium, with standard deviation `between`. Homes vary
# around the level of their county, with standard deviation `within`. The model is written as it is said: the level of a
# county is drawn around its expected value.


# %%
def radon_model(log_radon, floor, index, uranium):
    intercept = pyro.sample("intercept", dist.Normal(1.0, 1.0))
    slope = pyro.sample("slope of uranium", dist.Normal(0.0, 1.0))
    effect = pyro.sample("effect of floor", dist.Normal(0.0, 1.0))
    between = pyro.sample("between", dist.HalfNormal(1.0))
    within = pyro.sample("within", dist.HalfNormal(1.0))
    with pyro.plate("county", len(uranium)):
        level = pyro.sample("level", dist.Normal(intercept + slope * uranium, between))
    with pyro.plate("home", len(log_radon)):
        pyro.sample("log radon", dist.Normal(level[index] + effect * floor, within), obs=log_radon)


posterior = pf.fit(radon_model, log_radon, floor, county, uranium, progress=False)
posterior = posterior.assign_coords({"county": counties.index})
posterior.verdict

# %%
posterior.summary(["intercept", "slope of uranium", "effect of floor", "between", "within"])

# %% [markdown]
# With so many effects, Markov chains often cost less than training a flow. The verdict is then `refined`, by MCMC. The
# samples are chains that began at draws of a Gaussian, and converged. The table of chains has R-hat.
#
# On the log scale, 0.1 is about 10 %. Above the basement there is half as much radon, since exp(-0.66) is 0.52.
# Counties with more uranium have more radon. Homes of one county differ much more (`within`) than counties do
# (`between`).
#
# ## What pooling does
#
# The figure compares the mean of each county, adjusted for floors, with its level in the model. Bars are central 89 %
# intervals. The line is what uranium predicts. Levels of small counties lie close to the line. Levels of large counties
# lie close to their own mean.

# %%
samples = posterior.samples
adjusted = log_radon - samples["effect of floor"].mean() * floor
raw = np.array([float(adjusted[county == number].mean()) for number in range(len(counties))])
level = samples["level"]
low, high = level.quantile(torch.tensor([0.055, 0.945]), 0)
grid = torch.linspace(float(uranium.min()), float(uranium.max()), 2)
line = samples["intercept"].mean() + samples["slope of uranium"].mean() * grid

figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.8), sharey=True, layout="constrained")
for axes, chosen, title in zip(
    panels, (counties["homes"] <= 5, counties["homes"] > 15), ("5 homes or fewer", "more than 15 homes"), strict=True
):
    pick = np.flatnonzero(chosen)
    axes.plot(grid, line, color="#8A8A8A", label="predicted by uranium")
    axes.scatter(uranium[pick], raw[pick], s=14, facecolors="none", edgecolors="C1", label="mean of the county")
    axes.vlines(uranium[pick], low[pick], high[pick], color="C0", linewidth=0.8)
    axes.scatter(uranium[pick], level.mean(0)[pick], s=14, color="C0", label="level in the model")
    axes.set(title=f"{len(pick)} counties of {title}", xlabel="log uranium of the soil")
panels[0].set_ylabel("log radon (pCi/L) in a basement")
figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()

# %%
pf.plots.plot_forest(posterior, "level", coords={"county": ["Lac Qui Parle", "Wilkin", "Hennepin", "St Louis"]})

# %% [markdown]
# ## Centering by itself
#
# Pyro users know the choice: write `level ~ Normal(mu, between)`, or `level = mu + between * z`. With few data in a
# group, the first form makes a funnel. With many, the second one makes strong correlations. Here some counties have one
# home, and others have a hundred.
#
# `fit` learns the choice for each county, and the model stays as it is. It learns a precision, which stands for the
# information in the data. A county is the more centered, the larger this precision is.

# %%
learned = posterior.settings["noncentered"]["level"]
precision = np.array(learned["precision"])
between = samples["between"].mean()
share = precision / (precision + float(between) ** -2)

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.scatter(counties["homes"], share, s=12)
axes.set(xscale="log", xlabel="homes in the county", ylabel="0: non-centered, 1: centered", ylim=(0, 1))
plt.show()

# %% [markdown]
# ## Random slopes: sleep
#
# Eighteen truck drivers slept three hours a night. Their reaction time was measured on ten days (Belenky et al. 2003).
# Each driver has an intercept and a slope, and these two may be correlated.

# %%
sleep = pd.read_csv("../data/sleepstudy.csv")
drivers = sleep["subject"].unique()
driver = torch.tensor(pd.Index(drivers).get_indexer(sleep["subject"]))
days = torch.tensor(sleep["days"].to_numpy(), dtype=torch.float32)
reaction = torch.tensor(sleep["reaction_ms"].to_numpy(), dtype=torch.float32)


# %% [markdown]
# The covariance of the two coefficients has a standard deviation for each, and a correlation matrix with an LKJ prior.
# `LKJCholesky` is the distribution of the Cholesky factor of that matrix.


# %%
def sleep_model(reaction, days, index):
    mean = pyro.sample("mean", dist.Normal(torch.tensor([250.0, 10.0]), torch.tensor([50.0, 10.0])).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(torch.tensor([50.0, 10.0])).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
    noise = pyro.sample("noise", dist.HalfNormal(50.0))
    with pyro.plate("driver", 18):
        line = pyro.sample("line", dist.MultivariateNormal(mean, scale_tril=spread[..., None] * factor))
    with pyro.plate("measurement", len(reaction)):
        expected = line[index, 0] + line[index, 1] * days
        pyro.sample("reaction", dist.Normal(expected, noise), obs=reaction)


of_line = {"driver": drivers, "coefficient": ["intercept", "slope"]}
dims = {"line": ["driver", "coefficient"], "mean": ["coefficient"], "spread": ["coefficient"]}
sleepers = pf.fit(sleep_model, reaction, days, driver, progress=False).assign_coords(of_line, dims=dims)
sleepers.verdict

# %%
sleepers.summary(["mean", "spread", "noise"])

# %% [markdown]
# Here `fit` needs no chains. Given the spreads, their correlation and the noise, all other latents are normal. So the
# method is Gaussian conditionals: a flow of these few latents, and the exact Gaussian of the others. The verdict is
# `ok`.
#
# Each day without enough sleep costs about ten milliseconds, but drivers differ. The correlation of intercept and slope
# is computed from the draws. The data say little about it:

# %%
factor = sleepers.samples["factor"]
correlation = (factor @ factor.mT)[:, 1, 0]
print(f"correlation: mean {correlation.mean():.2f}, sd {correlation.std():.2f}")

# %%
line = sleepers.samples["line"]
grid = torch.linspace(0, 9, 2)
figure, panels = plt.subplots(3, 6, figsize=(8.4, 5), sharex=True, sharey=True, layout="constrained")
for number, axes in enumerate(panels.flat):
    own = driver == number
    curves = line[:200, number, 0, None] + line[:200, number, 1, None] * grid
    axes.plot(grid, curves.T, color="C0", alpha=0.04)
    axes.plot(days[own], reaction[own], "o", color="#333333", markersize=2.5)
    axes.set_title(f"driver {drivers[number]}")
figure.supxlabel("days with three hours of sleep", fontsize=9)
figure.supylabel("reaction time (ms)", fontsize=9)
plt.show()

# %%
pf.plots.plot_pairs(sleepers, "spread[intercept]", "spread[slope]")

# %% [markdown]
# ## A new county, a new driver
#
# A new group has no data. Its coefficients come from the distribution of the groups. How large is the radon level in
# the basement of a county that was not measured, with average uranium?

# %%
torch.manual_seed(0)
mean = samples["intercept"] + samples["slope of uranium"] * uranium.mean()
new_county = torch.distributions.Normal(mean, samples["between"]).sample()
new_home = torch.distributions.Normal(new_county, samples["within"]).sample()
print(f"a new county: {new_county.mean():.2f}, sd {new_county.std():.2f}")
print(f"a home there: {new_home.mean():.2f}, sd {new_home.std():.2f}")
print(f"P(a home there is above 4 pCi/L) = {(new_home > np.log(4)).float().mean():.2f}")

# %% [markdown]
# ## When it goes wrong
#
# - **`unreliable`, and the worst coordinate is a scale such as `between`.** With few groups, its posterior reaches zero
#   and has a heavy tail. Give it a proper prior in the units of the data. Then call `refine()`.
# - **More than a few hundred groups.** The fit takes longer. Above 200 latents the flow's affine map is diagonal. Call
#   `refine()` if the verdict asks for it.
# - **You want to choose the coordinates yourself.** Use `pf.AutoRealNVP(model, noncentered=["level"])` in Pyro's SVI,
#   and `pf.diagnose` afterwards.
# - **Names of axes.** `assign_coords(coords, dims=...)` says which dimension it does not know, and which there are.
