# %% [markdown]
# # Priors: before, after, and from earlier data
#
# This notebook does four things with priors, on measurements of penguins. It draws data from priors before any fit. It
# measures how much a posterior depends on its prior. It takes yesterday's posterior as today's prior. And it uses a
# fitted flow as a prior, which no named distribution could replace.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch

import pyro_flows as pf

plt.style.use("pyro_flows.style")
penguins = pd.read_csv("../data/penguins.csv").dropna()
penguins.groupby(["species", "year"]).size().unstack()

# %% [markdown]
# ## What does the prior say?
#
# How heavy is a Gentoo penguin, given the length of its flipper? The model is a line. Flippers are measured from 215
# mm, so the intercept is the body mass of a penguin with that flipper. One set of priors is vague. The other one is
# what a person knows who has seen a penguin: it weighs some kilograms, and a longer flipper goes with more mass.


# %%
vague = {
    "intercept": dist.Normal(0.0, 10_000.0),
    "slope": dist.Normal(0.0, 1_000.0),
    "noise": dist.HalfNormal(10_000.0),
}
informed = {
    "intercept": dist.Normal(5_000.0, 1_000.0),
    "slope": dist.Normal(30.0, 30.0),
    "noise": dist.HalfNormal(500.0),
}


def line(flipper, mass, priors):
    intercept = pyro.sample("intercept", priors["intercept"])
    slope = pyro.sample("slope", priors["slope"])
    noise = pyro.sample("noise", priors["noise"])
    with pyro.plate("penguin", len(flipper)):
        pyro.sample("mass", dist.Normal(intercept + slope * (flipper - 215.0), noise), obs=mass)


grid = torch.linspace(200, 235, 15)
figure, panels = plt.subplots(1, 2, figsize=(8.4, 3), layout="constrained")
for axes, (title, priors) in zip(panels, {"vague": vague, "informed": informed}.items(), strict=True):
    drawn = pf.prior_predictive(line, grid, None, priors, draws=1000)
    axes.plot(grid, drawn["mass"][:40].T / 1000, color="C0", alpha=0.3, linewidth=0.8)
    share = ((drawn["mass"] < 0) | (drawn["mass"] > 20_000)).float().mean()
    axes.set(title=f"{title}: {share:.0%} below 0 or above 20 kg", xlabel="flipper length (mm)")
    axes.axhline(0, color="#8A8A8A", linewidth=1)
panels[0].set_ylabel("body mass (kg)")
plt.show()

# %% [markdown]
# The vague priors expect penguins of minus thirty kilograms. They are not "uninformative": they say that impossible
# penguins are likely. Take the informed priors.
#
# ## How much does the posterior depend on the prior?
#
# `sensitivity` raises the prior, and then the likelihood, to powers near 1. It measures how fast the posterior moves. A
# number of 0.05 or more is large. First ten penguins, then all of 2007:

# %%
gentoo = penguins[penguins["species"] == "Gentoo"]


def columns(table):
    return tuple(
        torch.tensor(table[name].to_numpy(), dtype=torch.float32) for name in ("flipper_length_mm", "body_mass_g")
    )


years = {year: columns(table) for year, table in gentoo.groupby("year")}
few = pf.fit(line, *(column[:10] for column in years[2007]), informed, progress=False)
few.sensitivity()

# %%
first = pf.fit(line, *years[2007], informed, progress=False)
first.sensitivity()

# %%
pf.plots.plot_prior_posterior(few)

# %% [markdown]
# Intercept and noise do not depend on their priors. The slope does, even with all penguins of 2007. Its prior expects
# 30 g/mm, and the data of 2007 alone say more than 60. If both numbers are large, prior and likelihood pull in
# different directions: the diagnosis calls it a conflict. This is no error. It asks you to look: is the prior wrong, or
# are these data unusual?
#
# ## Yesterday's posterior as today's prior
#
# Data came in three years. If data are independent given the parameters, the posterior of one year is the prior of the
# next. `prior_from` turns draws into a prior: a flow, with the correlations and tails of the draws. `prior.sample()`
# inside a model draws all its sites together.


# %%
def update(flipper, mass, prior):
    values = prior.sample()
    expected = values["intercept"] + values["slope"] * (flipper - 215.0)
    with pyro.plate("penguin", len(flipper)):
        pyro.sample("mass", dist.Normal(expected, values["noise"]), obs=mass)


prior_2008 = pf.prior_from(first)
second = pf.fit(update, *years[2008], prior_2008, progress=False)
prior_2009 = pf.prior_from(second)
third = pf.fit(update, *years[2009], prior_2009, progress=False)
prior_2009

# %%
together = pf.fit(line, *columns(gentoo), informed, progress=False)
fits = {"2007": first, "and 2008": second, "and 2009": third, "all at once": together}
for name, fit in fits.items():
    slope = fit.samples["slope"]
    print(f"{name}: slope {slope.mean():.1f}, sd {slope.std():.1f} g/mm, {fit.verdict.status}")

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for (name, fit), style in zip(fits.items(), (":", "-.", "-", "--"), strict=True):
    heights, edges = np.histogram(fit.samples["slope"], bins=60, range=(20, 90), density=True)
    axes.stairs(heights, edges, label=name, linestyle=style)
axes.set(xlabel="slope (g of body mass per mm of flipper)", yticks=[])
axes.legend()
plt.show()

# %% [markdown]
# Three years one after the other give the same posterior as all years at once. The later years lie closer to what the
# prior expected than 2007 did. Each fit has a verdict of its own. A prior can be saved and loaded:
# `prior.save("prior")`, `pf.FittedPrior.load("prior")`.
#
# ## A flow as a prior
#
# Bill length and bill depth of all penguins have a distribution with three clusters, one for each species. Suppose that
# the species was not written down. `fit_density` fits a flow to the measurements. No normal distribution has this
# shape.

# %%
bills = torch.tensor(penguins[["bill_length_mm", "bill_depth_mm"]].to_numpy(), dtype=torch.float32)
density = pf.fit_density("spline", bills, max_epochs=150, progress=False)
normal = torch.distributions.MultivariateNormal(bills.mean(0), bills.T.cov())
print(density.summary())
print(f"a normal distribution: {normal.log_prob(bills).mean():.2f} nats a penguin, of its own data")

# %%
drawn = density.sample(333, seed=0)
figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.6), sharex=True, sharey=True, layout="constrained")
for axes, points, title in zip(panels, (bills, drawn), ("penguins", "draws of the flow"), strict=True):
    axes.plot(*points.T, "o", markersize=2.5, alpha=0.6)
    axes.set(title=title, xlabel="bill length (mm)")
panels[0].set_ylabel("bill depth (mm)")
plt.show()

# %% [markdown]
# Now a photograph shows a penguin from the side. The depth of its bill is measured with an error of 0.4 mm, and its
# length is hidden. The flow is the prior of both. What is the length?


# %%
def photograph(depth):
    bill = pyro.sample("bill", density.flow())
    pyro.sample("depth", dist.Normal(bill[..., 1], 0.4), obs=depth)


hidden = pf.fit(photograph, torch.tensor(18.5), seed=1, progress=False)
hidden = hidden.assign_coords({"bill_dim_0": ["length (mm)", "depth (mm)"]})
hidden.verdict

# %%
pf.plots.plot_posterior(hidden, "bill")

# %% [markdown]
# The length has two modes: an Adelie penguin with about 39 mm, or a Chinstrap penguin with about 50 mm. A mean would
# describe neither. `fit` trained a flow. If its draws pass the check, the verdict is `ok`. If they do not, Markov
# chains begin at these draws, and the verdict is `refined`.
#
# ## When it goes wrong
#
# - **"strong prior or weak likelihood".** The data do not tell. Say so, or collect more data.
# - **"prior and likelihood conflict".** Look at `plot_prior_posterior`. Is the prior wrong, or are the units?
# - **`prior_from` warns.** The flow is far from the draws. Fit with more draws (`draws=20_000`), or take fewer sites.
# - **A flow prior gives an `unreliable` verdict.** Its density has sharp edges or several modes. Try `runs=4`, then
#   `refine()`; a flow that was fitted with fewer layers is smoother.
# - **The data of two batches are not independent given the sites.** Then chaining is wrong. Group effects that both
#   batches share must be among the sites.
