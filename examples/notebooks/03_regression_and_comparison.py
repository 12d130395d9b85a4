# %% [markdown]
# # Regression and comparison: wells in Bangladesh
#
# Many wells in Bangladesh hold arsenic. Researchers labeled the wells of 3020 households as unsafe, and told each
# household how far the next safe well is. Years later they asked who had switched (Gelman and Hill 2007, chapter 5).
#
# Which model predicts the decision best? This notebook fits four logistic regressions. It compares them by
# leave-one-out cross-validation and by evidence, and checks them.

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
# ## Data
#
# Distance is counted in units of 100 m, and education in units of four years. Arsenic is in units of 100 µg/L, or on a
# log scale. All predictors are centered, so the intercept stands for an average household.

# %%
wells = pd.read_csv("../data/wells.csv")
columns = pd.DataFrame(
    {
        "distance (100 m)": wells["distance"] / 100,
        "arsenic": wells["arsenic"],
        "log arsenic": np.log(wells["arsenic"]),
        "education (4 years)": wells["education"] / 4,
        "member of a group": 1.0 * (wells["association"] == "yes"),
    }
)
columns -= columns.mean()
switched = torch.tensor((wells["switch"] == "yes").to_numpy(), dtype=torch.float32)
print(f"{len(wells)} households, {switched.mean():.0%} switched")


# %% [markdown]
# ## Model and fits
#
# One model serves all sets of predictors. The last argument is the scale of the priors of the slopes.


# %%
def logistic(x, switched, scale=2.5):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.5))
    with pyro.plate("predictor", x.shape[1]):
        slope = pyro.sample("slope", dist.Normal(0.0, scale))
    with pyro.plate("household", len(x)):
        pyro.sample("switched", dist.Bernoulli(logits=intercept + slope @ x.T), obs=switched)


def fit(names, *scale):
    x = torch.tensor(columns[names].to_numpy(), dtype=torch.float32)
    return pf.fit(logistic, x, switched, *scale, progress=False).assign_coords({"predictor": names})


all_four = ["distance (100 m)", "log arsenic", "education (4 years)", "member of a group"]
models = {
    "distance": fit(["distance (100 m)"]),
    "and arsenic": fit(["distance (100 m)", "arsenic"]),
    "and log arsenic": fit(["distance (100 m)", "log arsenic"]),
    "all": fit(all_four),
}
for name, posterior in models.items():
    print(f"{name}: {posterior.verdict.status}, k-hat {posterior.verdict.k_hat:.2f}")

# %%
models["all"].summary()

# %%
pf.plots.plot_forest(models["all"], "slope")

# %% [markdown]
# Households that are farther away switch less, and those with more arsenic switch more. A slope divided by four is the
# largest possible change of the probability. So 100 m more lower the probability by up to 25 percentage points.
#
# The draws give any curve with its uncertainty. Here is the probability of switching, for two levels of arsenic:

# %%
samples = models["all"].samples
meters = torch.linspace(0, 300, 61)
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for level, color in ((0.5, "C0"), (3.0, "C1")):
    x = torch.zeros(61, 4)
    x[:, 0] = meters / 100 - wells["distance"].mean() / 100
    x[:, 1] = np.log(level) - np.log(wells["arsenic"]).mean()
    curves = torch.sigmoid(samples["intercept"][:, None] + samples["slope"] @ x.T)
    low, middle, high = curves.quantile(torch.tensor([0.055, 0.5, 0.945]), 0)
    axes.fill_between(meters, low, high, color=color, alpha=0.2, linewidth=0)
    axes.plot(meters, middle, color=color, label=f"arsenic {100 * level:.0f} µg/L")
axes.set(xlabel="distance to the next safe well (m)", ylabel="probability of switching", ylim=(0, 1))
axes.legend()
plt.show()

# %% [markdown]
# ## Which model predicts best?
#
# `compare` estimates the expected log predictive density (elpd) of each model by leaving out one household at a time.
# It gives the standard error of the *difference* of two models, which is much smaller than the error of each. `weight`
# is the weight of a model in the best mixture of predictions (stacking).

# %%
comparison = pf.compare(models)
comparison.table[["elpd", "se", "elpd_diff", "diff_se", "weight", "verdict", "high_k"]].round(2)

# %% [markdown]
# Log arsenic predicts better than arsenic, by 16 nats. `comparison.difference("and log arsenic", "and arsenic")` gives
# this difference with its standard error. Education and membership add less, about two standard errors. `high_k` counts
# the observations whose k-hat stays too high, even with draws that are moved for them. It is zero here, so
# leave-one-out can be trusted for all 3020 households.
#
# ## Why log arsenic?
#
# Look at residuals. The next figure shows the share that switched less the predicted share, for 30 groups of equal size
# by arsenic. Bars show two standard errors. With arsenic itself, the lowest groups switch less than predicted, and the
# middle groups more.

# %%
order = np.argsort(wells["arsenic"].to_numpy(), kind="stable")
groups = np.array_split(order, 30)
figure, panels = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
for axes, name in zip(panels, ["and arsenic", "and log arsenic"], strict=True):
    slope, intercept = models[name].samples["slope"], models[name].samples["intercept"]
    x = torch.tensor(columns[["distance (100 m)", name.removeprefix("and ")]].to_numpy(), dtype=torch.float32)
    probability = torch.sigmoid(intercept[:, None] + slope @ x.T).mean(0)
    residual = (switched - probability).numpy()
    error = (probability * (1 - probability)).numpy()
    axes.errorbar(
        [wells["arsenic"].to_numpy()[group].mean() for group in groups],
        [residual[group].mean() for group in groups],
        yerr=[2 * (error[group].mean() / len(group)) ** 0.5 for group in groups],
        fmt="o",
        markersize=3,
        linewidth=1,
    )
    axes.axhline(0, color="#8A8A8A", linewidth=1)
    axes.set(title=f"distance {name}", xlabel="arsenic (100 µg/L)")
panels[0].set_ylabel("switched less predicted")
plt.show()

# %% [markdown]
# ## Are the probabilities calibrated?
#
# The probability integral transform (PIT) of an observation is its rank in its own predictive distribution. If the
# predictions are right, PIT values are uniform. For leave-one-out, the prediction does not use the observation. A
# binary outcome has two possible values only, so a random number spreads each value over its interval.
#
# `loo().pointwise` has the log probability of each observed outcome. The figure shows the distribution function of the
# PIT values, less that of a uniform distribution. The band holds 95 % of the curves of right models.

# %%
chance = models["all"].loo().pointwise.exp()  # of what was observed
zero = torch.where(switched == 1, 1 - chance, chance)  # of not switching
uniform = torch.rand(len(zero), generator=torch.Generator().manual_seed(0), dtype=zero.dtype)
pit = torch.where(switched == 1, zero + uniform * (1 - zero), uniform * zero).sort().values
rank = (torch.arange(len(pit)) + 1) / len(pit)

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.axhspan(-1.358 / len(pit) ** 0.5, 1.358 / len(pit) ** 0.5, color="C0", alpha=0.15, linewidth=0)
axes.plot(pit, rank - pit, color="C0", linewidth=1)
axes.set(xlabel="PIT value", ylabel="share below, less that value", xlim=(0, 1))
plt.show()

# %% [markdown]
# The curve stays inside the band. This does not show that the model is right. It shows that its probabilities agree
# with the frequencies over all households. The residuals above asked more: they looked along one predictor.
#
# ## Evidence
#
# The evidence $p(y)$ is the probability of the data under a model and its priors. Its logarithm comes with an error,
# and so does the log Bayes factor `log_bf` against the first row.

# %%
comparison.table[["log_evidence", "evidence_se", "log_bf", "bf_se"]].round(4)

# %% [markdown]
# Evidence and elpd answer different questions. Elpd asks which model predicts new households better. The evidence asks
# how well the model, *priors included*, predicted all data. So it changes with priors that no prediction feels. Here
# the same model gets priors that are ten times wider:

# %%
wide = pf.compare({"scale 2.5": models["all"], "scale 25": fit(all_four, 25.0)})
wide.table[["elpd", "elpd_diff", "diff_se", "log_evidence", "log_bf"]].round(2)

# %% [markdown]
# The elpd is the same, but the log evidence falls by nine nats: the logarithm of ten for each of four slopes. State
# your priors whenever you report a Bayes factor.
#
# ## When it goes wrong
#
# - **`high_k` is not zero.** Leave-one-out is not known for these observations. `posterior.loo().high` names them. Fit
#   the model without each of them, or use groups of observations; see notebook 5.
# - **`compare` refuses.** The models must have the same data, and usable verdicts. A transformed outcome is other data.
# - **The difference is smaller than two of its standard errors.** The data cannot tell. Use stacking weights, or keep
#   the larger model with careful priors.
# - **The evidence is NaN.** Improper priors have no evidence. An `unreliable` posterior has no error of it.
# - **Separation.** If a predictor divides the outcomes completely, flat priors give infinite slopes. Keep proper
#   priors.
