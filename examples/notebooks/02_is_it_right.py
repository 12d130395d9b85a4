# %% [markdown]
# # Is it right?
#
# Variational inference always returns an answer. This notebook shows how to find out whether the answer is right. It
# compares `pf.fit`, a mean-field Gaussian, a full-rank Gaussian and NUTS, on two posteriors. One is easy, and one is
# not.

# %%
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_median
from pyro.infer.reparam import LocScaleReparam
from pyro.optim import ClippedAdam

import pyro_flows as pf

# %% [markdown]
# ## A regression with correlated predictors
#
# How does the fuel consumption of a car depend on its weight, its displacement and its horsepower? The data are 32 cars
# of 1973-74. Heavy cars have large and strong engines, so the predictors are correlated. Each is standardized.

# %%
cars = pd.read_csv("../data/cars.csv")
predictors = ["weight", "displacement", "horsepower"]
cars[predictors].corr().round(2)


# %%
def standardize(columns):
    return (columns - columns.mean(0)) / columns.std(0)


x = standardize(torch.tensor(cars[predictors].to_numpy(), dtype=torch.float32))
mpg = torch.tensor(cars["mpg"].to_numpy(), dtype=torch.float32)


def regression(x, mpg):
    intercept = pyro.sample("intercept", dist.Normal(20.0, 10.0))
    with pyro.plate("predictor", x.shape[1]):
        slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    with pyro.plate("car", len(x)):
        pyro.sample("mpg", dist.Normal(intercept + slope @ x.T, sigma), obs=mpg)


# %% [markdown]
# ## Three approximations
#
# `pf.fit` chooses its method. Given `sigma`, the other latents are normal here. So it takes a conditional Laplace grid:
# a table of the marginal of `sigma`, and a Gaussian of all others for each value on a grid. It trains no flow.
#
# The two Gaussian guides are Pyro's own. They are trained by Pyro's SVI, and `pf.diagnose` checks them in the same way
# as the grid. Learning rate and steps of SVI were chosen by hand: with half the learning rate, the second example below
# ends elsewhere.

# %%
labels = {"predictor": predictors}


def gaussian(kind, model, *args, steps=1500):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = kind(model, init_loc_fn=init_to_median)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.1, "lrd": 0.01 ** (1 / steps)}), elbo)
    for _ in range(steps):
        svi.step(*args)
    return pf.diagnose(model, guide, *args)


fits = {
    "fit": pf.fit(regression, x, mpg, progress=False),
    "mean field": gaussian(AutoNormal, regression, x, mpg),
    "full rank": gaussian(AutoMultivariateNormal, regression, x, mpg),
}
fits = {name: fit.assign_coords(labels) for name, fit in fits.items()}
pf.plots.plot_posterior(fits, "slope")

# %% [markdown]
# The mean-field guide is much too narrow. This is a property of mean field, not an accident of training. A slope that
# is correlated with others can vary much if the others vary along. Mean field has no such correlation. Its standard
# deviation is close to that of one slope when all others are fixed:

# %%
pd.DataFrame({name: fit.samples["slope"].std(0) for name, fit in fits.items()}, index=predictors).round(2)

# %%
pf.plots.plot_pairs(fits["fit"], "slope[weight]", "slope[displacement]", compare=fits["mean field"])

# %% [markdown]
# ## What the verdict says
#
# Each of the three has a verdict, which begins with its method. No reference is needed for it.

# %%
for name, fit in fits.items():
    print(f"{name}\n    {fit.verdict}\n")

# %% [markdown]
# The verdict rests on importance weights $w_s = p(z_s, y) / q(z_s)$ of draws $z_s$ from an approximation $q$, such as a
# guide. If $q$ is the posterior, all weights are equal. If $q$ is too narrow, a few draws in its tails have very large
# weights.
#
# - **k-hat** is the shape of the largest weights, which follow a generalized Pareto distribution. Below 0.5 their
#   variance is finite. Above 0.7 no number of draws in practice is enough.
# - **ESS/S** is the effective share of the draws. It is 1 if all weights are equal.
# - **Change by weighting**: if the weights change a mean or a standard deviation, then $q$ was wrong there.
#
# The next two figures show the weights of `pf.fit` and of the mean-field guide. Compare the axes.

# %%
pf.plots.plot_weights(fits["fit"])

# %%
pf.plots.plot_weights(fits["mean field"])

# %% [markdown]
# ## Correct a guide that is wrong
#
# `refine` starts Markov chains at the draws of a guide and around them, and runs them in the guide's own coordinates. A
# bad start needs longer chains, but if they converge, their draws can be used. The verdict is then `refined`.

# %%
refined = fits["mean field"].refine()
refined.verdict

# %%
pf.plots.plot_forest({"fit": fits["fit"], "mean field": refined}, "slope")

# %% [markdown]
# ## Eight schools, centered
#
# This posterior is a funnel: see notebook 1. The model is written with centered effects, as most people would.

# %%
effect = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
error = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(effect, error):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effect)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, error), obs=effect)


# %% [markdown]
# NUTS is the reference. It cannot sample from the centered model either, so it gets a non-centered one. `from_mcmc`
# then takes the draws of the sites of our model. (`fit` changes coordinates by itself.)

# %%
noncentered = pyro.poutine.reparam(eight_schools, config={"theta": LocScaleReparam(0.0)})
pyro.set_rng_seed(0)
mcmc = MCMC(NUTS(noncentered), num_samples=1500, warmup_steps=500, disable_progbar=True)
mcmc.run(effect, error)
draws = mcmc.get_samples(group_by_chain=True)
draws["theta"] = draws["mu"][..., None] + draws["tau"][..., None] * draws.pop("theta_decentered")

schools = {
    "fit": pf.fit(eight_schools, effect, error, progress=False),
    "NUTS": pf.from_mcmc(draws, eight_schools, effect, error),
    "mean field": gaussian(AutoNormal, eight_schools, effect, error),
    "full rank": gaussian(AutoMultivariateNormal, eight_schools, effect, error),
}
pf.plots.plot_posterior(schools, ["mu", "tau"])

# %% [markdown]
# `fit` and NUTS agree. Both Gaussian guides miss the small values of `tau`, and the large ones too. They claim that the
# schools surely differ. The data do not say that: `tau` can be close to zero.

# %%
pf.plots.plot_pairs(schools["NUTS"], "mu", "tau", compare=schools["mean field"], transform={"tau": torch.log})

# %%
table = pd.DataFrame(
    {
        name: {
            "verdict": fit.verdict.status,
            "k-hat": f"{fit.verdict.k_hat:.2f}",
            "P(tau < 1)": f"{(fit.samples['tau'] < 1).float().mean():.2f}",
            "sd of tau": f"{fit.samples['tau'].std():.2f}",
        }
        for name, fit in schools.items()
    }
).T
table

# %% [markdown]
# Chains have no importance weights, so NUTS has no k-hat (`nan`). Its verdict rests on R-hat, on effective sample sizes
# and on divergences.
#
# ## The four words
#
# | verdict | it comes if | here |
# |---|---|---|
# | `ok` | weights leave nothing to correct | `fit` on both; full rank on the regression |
# | `corrected` | weights change the results, and can be trusted | not seen here |
# | `refined` | Markov chains from the guide converged | mean field on the regression, after `refine` |
# | `unreliable` | none of these | mean field on both; full rank on the schools |
#
# ## Which leave-one-out?
#
# Leave-one-out cross-validation weights the draws again, and the right weights depend on where the draws come from.
# `posterior.loo()` knows this. Draws of an approximation are weighted by $p / q$ too, and draws of chains are not. It
# refuses draws that are unreliable. `az.loo` cannot: it looks at the draws only, and draws that are too narrow pass its
# checks.

# %%
for name, fit in schools.items():
    try:
        print(f"{name}: {fit.loo()}\n")
    except ValueError as refused:
        print(f"{name}: {str(refused)[:70]} ...\n")

# %% [markdown]
# `fit` and NUTS agree within a fraction of the standard error. The Monte Carlo error of NUTS is larger, because it has
# 1500 draws. `az.loo` may warn of a k-hat above 0.7 here. `posterior.loo()` moves draws to where the posterior without
# an observation lies, so its estimates do not depend on a few draws.
#
# ## When it goes wrong
#
# - **`unreliable` for a guide of your own.** Call `refine()` on what `diagnose` returned, or call `pf.fit`.
# - **`unreliable` from `pf.fit`.** Follow the next step in the verdict. Then see notebook 9.
# - **`ok`, and you doubt it.** Figures from draws cannot see a region without draws. Run `pf.fit(...,
#   runs=4)`, compare with NUTS as above, or check the calibration with `pf.sbc`.
# - **NUTS is `unreliable`.** Draw longer chains, raise `target_accept_prob`, or write the model with other parameters.
