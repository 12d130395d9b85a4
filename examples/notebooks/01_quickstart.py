# %% [markdown]
# # Quickstart: eight schools
#
# This notebook goes from a Pyro model to a report that you can send. It takes five minutes to read, and less to run.
# Install Jupyter in a copy of the repository. You need Python 3.11 or newer.
#
# ```sh
# pip install ".[notebooks]" jupyterlab
# ```
#
# Then run `jupyter lab examples/notebooks`, and open this notebook.

# %%
import pyro
import pyro.distributions as dist
import torch

import pyro_flows as pf

# %% [markdown]
# ## The question
#
# Eight schools coached their pupils for a test. Each school reports the estimated effect of coaching, in points, and
# its standard error (Rubin 1981). The estimates differ much, and their errors are large. What do we learn about each
# school?

# %%
schools = ["Choate", "Deerfield", "Andover", "Exeter", "Hotchkiss", "Lawrenceville", "St. Paul's", "Mt. Hermon"]
effect = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
error = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

# %% [markdown]
# ## The model
#
# Write any Pyro model with continuous latent variables. The true effects `theta` vary around a common mean `mu`, with
# standard deviation `tau`. The data and the known errors are arguments of the model. A plate stands for the schools.


# %%
def eight_schools(effect, error):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effect)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, error), obs=effect)


# %% [markdown]
# ## The fit
#
# One call fits the model. The arguments after the model are those of the model. There is nothing to tune: `fit` takes
# the cheapest method that passes its check. The same seed gives the same result.

# %%
posterior = pf.fit(eight_schools, effect, error, seed=1)

# %% [markdown]
# ## The verdict
#
# Read the verdict before anything else. It says whether the samples can be used. A notebook shows the last value of a
# cell. In a script, write `print(posterior.verdict)`.

# %%
posterior.verdict

# %% [markdown]
# The verdict starts with one of four words:
#
# | word | meaning |
# |---|---|
# | `ok` | the method's own draws can be used |
# | `corrected` | the draws were resampled with importance weights, and can be used |
# | `refined` | the draws are those of Markov chains that converged, and can be used |
# | `unreliable` | do not use the draws; the verdict names the next step |
#
# Then it names the method. Given `tau`, the other latents are approximately normal here. So `fit` took a grid of values
# of `tau` with a Gaussian for each, and trained no flow.
#
# ## The table
#
# Give the schools their names once. Tables, figures, ArviZ objects and reports then show them.

# %%
posterior = posterior.assign_coords({"school": schools})
posterior.summary()

# %% [markdown]
# The posterior draws all schools towards the mean. Choate reported 28 points, but its estimate is much smaller. `ess`
# says how many independent draws the samples are worth. `mcse_mean` is the numerical error of the mean.
#
# ## Figures
#
# The first figure shows the marginal distributions. Each function returns a matplotlib figure. In a script, save it:
# `pf.plots.plot_posterior(posterior).savefig("posterior.png")`.

# %%
pf.plots.plot_posterior(posterior, ["mu", "tau"])

# %%
pf.plots.plot_forest(posterior, "theta")

# %% [markdown]
# The next figure shows why this posterior is hard. If `tau` is small, the effects must be close to `mu`. A single
# Gaussian cannot have this shape. A Gaussian for each value of `tau` can, and so can a flow.

# %%
pf.plots.plot_pairs(posterior, "theta[Choate]", "tau", transform={"tau": torch.log})

# %% [markdown]
# ## Does the model fit the data?
#
# Draw new data from the posterior, and compare them with the observed data.

# %%
pf.plots.plot_predictive(posterior)

# %% [markdown]
# ## Your own quantities
#
# `posterior.samples` holds the draws as tensors, on the scale of the model. You can compute anything from them. What is
# the probability that coaching works in Choate? And in a ninth school, which is not in the data?

# %%
samples = posterior.samples
torch.manual_seed(0)
ninth = torch.distributions.Normal(samples["mu"], samples["tau"]).sample()
print(f"P(effect > 0) in Choate: {(samples['theta'][:, 0] > 0).float().mean():.2f}")
print(f"P(effect > 0) in a ninth school: {(ninth > 0).float().mean():.2f}")

# %% [markdown]
# ## ArviZ
#
# `to_arviz` returns the object that ArviZ reads: a `DataTree` with ArviZ 1.x, and an `InferenceData` with ArviZ 0.23.
# It holds the draws, the log likelihood, predictive draws and the data. ArviZ estimates the effective sample size from
# the order of the draws. These draws have no order, so its figures differ from `ess` above by chance.

# %%
import arviz as az

data = posterior.to_arviz()
az.ess(data, var_names=["mu", "tau"])

# %% [markdown]
# For leave-one-out cross-validation, use `posterior.loo()`. It knows which method made these draws.

# %%
posterior.loo()

# %% [markdown]
# ## Save, load, report
#
# A saved posterior is a directory. Loading it runs no code from it. With the model and its arguments, it can also
# predict.

# %%
posterior.save("results/eight-schools")
again = pf.load("results/eight-schools", eight_schools, effect, error)
again.verdict.status

# %% [markdown]
# The report is one HTML page with verdict, table, figures and settings. It needs no network. Send it to your
# colleagues.

# %%
path = posterior.report("results/eight-schools.html", title="Coaching in eight schools")
path

# %% [markdown]
# ## When it goes wrong
#
# - **The verdict is `unreliable`.** It names the next step. Often this is `posterior.refine()`, more runs (`runs=4`) or
#   more steps (`max_steps=20_000`). Notebook 9 shows examples.
# - **An error names a site.** Data outside of a support, or discrete latents, are refused. The error says what to
#   change.
# - **The fit takes too long.** `max_seconds=60` limits it. The verdict then says that it was stopped.
# - **You do not believe the verdict.** Compare with NUTS: notebook 2 shows how.
#
# Next: notebook 2 asks whether a posterior is right; notebook 4 fits larger hierarchical models.
