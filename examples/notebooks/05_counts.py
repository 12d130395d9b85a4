# %% [markdown]
# # Counts: seizures of epilepsy patients
#
# Counts often vary more than a Poisson distribution allows. This notebook builds a model step by step: Poisson,
# negative binomial, and both with patient effects. Predictive checks say what is missing. Leave-one-out says which
# model predicts better, and which observations it cannot judge.

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
# A trial of the drug progabide counted the seizures of 59 patients in four periods of two weeks (Thall and Vail 1990).
# `base` is the count in the eight weeks before. The last period is known to differ.

# %%
trial = pd.read_csv("../data/epil.csv")
trial.groupby(["treatment", "period"])["seizures"].agg(["mean", "var", "max"]).unstack("treatment").round(1)

# %% [markdown]
# Variances are many times larger than means. In a Poisson distribution they are equal. But patients differ, and
# predictors may explain a part of this. Logarithms of base count and age are centered.
#
# Predictors and counts become tensors in double precision. The fits are then in double precision too, and so are their
# draws.

# %%
columns = pd.DataFrame(
    {
        "log base": np.log(trial["base"]),
        "treated": 1.0 * (trial["treatment"] == "progabide"),
        "log age": np.log(trial["age"]),
        "last period": 1.0 * (trial["period"] == 4),
    }
)
columns[["log base", "log age"]] -= columns[["log base", "log age"]].mean()
columns["treated x log base"] = columns["treated"] * columns["log base"]
predictors = list(columns)
x = torch.tensor(columns.to_numpy().reshape(59, 4, 5), dtype=torch.float64)  # patient, period, predictor
seizures = torch.tensor(trial["seizures"].to_numpy().reshape(59, 4), dtype=torch.float64)


# %% [markdown]
# ## Four models in one
#
# Two switches make four models. `GammaPoisson` is the negative binomial distribution: a Poisson distribution whose rate
# varies. Its variance is $\mu + \delta \mu^2$, where $\delta$ is the overdispersion; $\delta = 0$ is Poisson. `keep`
# can leave out observations; it is used at the end.


# %%
everything = torch.ones(59, 4, dtype=torch.bool)


def counts(x, seizures, patients, dispersed, keep=everything):
    intercept = pyro.sample("intercept", dist.Normal(1.5, 1.0))
    with pyro.plate("predictor", len(predictors)):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    log_rate = intercept + x @ slope
    if patients:
        spread = pyro.sample("spread of patients", dist.HalfNormal(1.0))
    if dispersed:
        overdispersion = pyro.sample("overdispersion", dist.HalfNormal(1.0))
    with pyro.plate("patient", 59, dim=-2):
        if patients:
            log_rate = log_rate + pyro.sample("effect", dist.Normal(0.0, spread))
        with pyro.plate("period", 4, dim=-1), pyro.poutine.mask(mask=keep):
            rate = log_rate.exp()
            poisson = dist.Poisson(rate)
            observed = dist.GammaPoisson(1 / overdispersion, 1 / (overdispersion * rate)) if dispersed else poisson
            pyro.sample("seizures", observed, obs=seizures)


labels = {"predictor": predictors, "patient": list(range(1, 60)), "period": [1, 2, 3, 4]}
switches = {
    "Poisson": (False, False),
    "negative binomial": (False, True),
    "Poisson, patients": (True, False),
    "negative binomial, patients": (True, True),
}
models = {
    name: pf.fit(counts, x, seizures, *chosen, progress=False).assign_coords(labels)
    for name, chosen in switches.items()
}
for name, posterior in models.items():
    print(f"{name}: {posterior.verdict.status}, k-hat {posterior.verdict.k_hat:.2f}")

# %% [markdown]
# ## What do the models say about the drug?
#
# `treated` is the change of the log rate for a patient of average base count. Poisson claims to know it precisely. The
# other models do not.

# %%
pf.plots.plot_forest(models, "slope", coords={"predictor": ["treated", "treated x log base"]})

# %% [markdown]
# ## Predictive checks
#
# Which of them is to be believed? Draw new data from each model, and compare statistics that matter: the share of
# zeros, the largest count, and the variance of the four counts of a patient. A model fails if the data lie outside of
# what it predicts.

# %%
statistics = {
    "share of zeros": lambda counts: (counts == 0).double().mean((-1, -2)),
    "largest count": lambda counts: counts.amax((-1, -2)),
    "mean variance within patients": lambda counts: counts.double().var(-1).mean(-1),
}
replicates = {name: posterior.predictive(draws=1000)["seizures"] for name, posterior in models.items()}

figure, panels = plt.subplots(1, 3, figsize=(8.4, 2.8), sharey=True, layout="constrained")
for axes, (title, statistic) in zip(panels, statistics.items(), strict=True):
    for row, drawn in enumerate(replicates.values()):
        low, middle, high = np.quantile(statistic(drawn), [0.055, 0.5, 0.945])
        axes.plot([low, high], [row, row], color="C0", linewidth=3)
        axes.plot(middle, row, "o", color="white", markeredgecolor="C0")
    axes.axvline(float(statistic(seizures)), color="#333333", linestyle="--")
    axes.set(title=title, yticks=range(4), yticklabels=list(models))
panels[0].invert_yaxis()
plt.show()

# %% [markdown]
# Dashed lines are the data, and bars hold 89 % of the replicates. Both Poisson models have too few zeros, too small a
# maximum, and far too little variance within patients. Patient effects do not mend this, because it lies within
# patients. Overdispersion does. Without patient effects, it must also stand for the differences between patients, so it
# is rather too large.

# %%
pf.plots.plot_predictive(models["negative binomial, patients"])

# %% [markdown]
# ## Leave-one-out, and high k
#
# `compare` puts the models in order by expected log predictive density. The first model is out already, so the other
# three are compared.

# %%
comparison = pf.compare({name: models[name] for name in list(models)[1:]})
comparison.table[["elpd", "elpd_diff", "diff_se", "p", "log_evidence", "verdict", "high_k"]].round(2)

# %% [markdown]
# Leave-one-out weights draws as if one observation had not been seen. A high k-hat says that the posterior without it
# is very different. Then `loo` moves draws to where that posterior lies, and weights them again. `high_k` counts the
# observations for which this does not help either. `leverage` lists the k-hats before draws were moved:

# %%
loo = comparison.loo["Poisson, patients"]
loo.leverage(6)

# %% [markdown]
# The index counts from 0: `seizures[24, 2]` is patient 25 in period 3, with 76 seizures. Such observations are worth a
# look: they are counts that the model finds surprising. If `high_k` is not zero, there are three ways on.
#
# 1. **Take a model that is not surprised.** The negative binomial with patient effects has lower k-hats.
# 2. **Fit without each of these observations.** This is exact. `fit_many` does all of these fits side by side.
# 3. **Leave out groups**, such as whole patients, if the question is about new patients.
#
# Here is the second way, in the best model. It also checks the estimates above. Each of the two observations with the
# highest k-hats is masked in a fit of its own. Its log score is then computed from the draws.

# %%
loo = comparison.loo["negative binomial, patients"]
worst = loo.k_hat.argsort(descending=True)[:2].tolist()
without = []
for number in worst:
    keep = everything.clone()
    keep.view(-1)[number] = False
    without.append((x, seizures, True, True, keep))
refits = pf.fit_many(counts, without, progress=False)

rows = {}
for number, refit in zip(worst, refits, strict=True):
    patient, period = divmod(number, 4)
    samples = refit.samples
    log_rate = samples["intercept"] + samples["slope"] @ x[patient, period] + samples["effect"][:, patient, 0]
    delta = samples["overdispersion"]
    score = dist.GammaPoisson(1 / delta, 1 / (delta * log_rate.exp())).log_prob(seizures[patient, period])
    rows[loo.labels[number]] = {
        "seizures": int(seizures[patient, period]),
        "k_hat": f"{loo.k_hat[number]:.2f}",
        "elpd by loo": f"{loo.pointwise[number]:.3f}",
        "elpd by a fit without it": f"{score.double().logsumexp(0) - np.log(len(score)):.3f}",
        "verdict": refit.verdict.status,
    }
pd.DataFrame(rows).T

# %% [markdown]
# `loo` and the fits without the observation differ by little more than a tenth of a nat. Models differ by much more, so
# their order stays as it is.
#
# ## The answer
#
# The drug multiplies the rate of seizures by the exponential of its slope. For a patient of average base count:

# %%
samples = models["negative binomial, patients"].samples
ratio = samples["slope"][:, predictors.index("treated")].exp()
low, high = ratio.quantile(torch.tensor([0.055, 0.945], dtype=ratio.dtype))
print(f"rate ratio {ratio.median():.2f}, 89 % interval {low:.2f} to {high:.2f}")
print(f"P(the drug lowers the rate) = {(ratio < 1).float().mean():.2f}")

# %% [markdown]
# ## When it goes wrong
#
# - **`unreliable` with patient effects.** Check the scale of the predictors first: center and scale them. Then call
#   `refine()`.
# - **Data are refused.** Counts must be whole numbers of 0 or more, and the error names the entries that are not.
# - **torch refuses tensors of two precisions.** `fit` computes in double precision where single precision loses digits
#   of the log density. Its draws are then in double precision too. Give data in double precision, as above.
# - **Many high k-hats.** One latent per observation always gives them. Leave out groups, or integrate the latent: the
#   negative binomial is a Poisson distribution with the latent integrated.
# - **Zeros that no model explains.** Write a mixture with `dist.ZeroInflatedPoisson` or
#   `dist.ZeroInflatedNegativeBinomial`.
