# %% [markdown]
# # Time: a level shift, changing volatility, a Gaussian process
#
# Three series, three models. The first has a discrete latent, which is summed out. The second and the third have a
# latent value for each week, or a smooth function of time.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch

import pyro_flows as pf

plt.style.use("pyro_flows.style")


def band(axes, x, draws, color, label):
    """Draw the median and the central 89 % of draws (draws, times)."""
    low, middle, high = torch.quantile(draws, torch.tensor([0.055, 0.5, 0.945]), dim=0)
    axes.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
    axes.plot(x, middle, color=color, label=label)


# %% [markdown]
# ## A level shift: the Nile
#
# The data are the yearly flow of the Nile at Aswan, from 1871 to 1970. Did the flow drop at once, and when?
#
# The last year before the drop is a discrete latent. A flow needs continuous latents, so Pyro sums it out:
# `infer={"enumerate": "parallel"}` says so. Three continuous latents are left. We look at 50 years from 1880 on; the
# cost grows with their number.

# %%
nile = pd.read_csv("../data/nile.csv")
years = nile["year"].to_numpy()
flow = torch.tensor(nile["flow"].to_numpy() / 100.0, dtype=torch.float32)  # 10^10 m³ a year
index = torch.arange(len(flow))
candidates = torch.arange(9, 59)  # 1880 to 1929


def shift(flow):
    last = candidates[pyro.sample("last", dist.Categorical(torch.ones(50)), infer={"enumerate": "parallel"})]
    with pyro.plate("period", 2):
        level = pyro.sample("level", dist.Normal(9.0, 3.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("year", len(flow)):
        mean = torch.where(index <= last, level[0], level[1])
        pyro.sample("flow", dist.Normal(mean, sigma), obs=flow)


drop = pf.fit(shift, flow, progress=False).assign_coords({"period": ["before", "after"]})
print(drop.verdict)
drop.summary()

# %% [markdown]
# Where is the discrete latent? Given a draw of the levels, each year has a probability that is proportional to the
# likelihood. Its average over draws is the posterior of the year.

# %%
level, sigma = drop.samples["level"], drop.samples["sigma"]
scores = dist.Normal(level[:, :, None], sigma[:, None, None]).log_prob(flow).double()  # (draws, periods, years)
before, after = scores.cumsum(-1)[:, 0], scores.flip(-1).cumsum(-1).flip(-1)[:, 1]
weights = torch.softmax(before[:, candidates] + after[:, candidates + 1], -1)
shares = zip(years[candidates], weights.mean(0).tolist(), strict=True)
for year, share in sorted(shares, key=lambda pair: -pair[1])[:4]:
    print(f"P({year} is the last year before the drop) = {share:.2f}")

# %% [markdown]
# The dam at Aswan was begun in 1899. Is a drop the right model? Two others: no change at all, and a level that walks at
# random from year to year.
#
# The walk has a level for each year. All is normal there, so we integrate the levels out. What is left is a normal
# distribution of 100 years, whose covariance of years $i$ and $j$ is $\tau^2 \min(i, j)$, and $\sigma^2$ more if they
# are the same. Its eigenvectors do not depend on $\tau$ and $\sigma$. In their basis, the 100 numbers are independent,
# and no matrix is factorized in a step.


# %%
def constant(flow):
    level = pyro.sample("level", dist.Normal(9.0, 3.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("year", len(flow)):
        pyro.sample("flow", dist.Normal(level, sigma), obs=flow)


shared = torch.minimum(index[:, None], index).double()  # steps that two years have in common
spectrum, basis = torch.linalg.eigh(shared)
spectrum, basis = spectrum.clamp(min=0.0).float(), basis.float()


def walk(flow):
    start = pyro.sample("start", dist.Normal(9.0, 3.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("direction", len(flow)):
        sd = (tau**2 * spectrum + sigma**2).sqrt()
        pyro.sample("flow", dist.Normal(start * basis.sum(0), sd), obs=flow @ basis)


walks = pf.fit(walk, flow, progress=False)
print(walks.verdict)

# %% [markdown]
# The log evidence $\log p(y)$ compares them. A difference of 3 nats is a factor of 20. `loo` cannot compare them: with
# a sum over years, or with levels integrated out, an observation has no likelihood of its own.

# %%
models = {"constant": pf.fit(constant, flow, progress=False), "drop": drop, "random walk": walks}
for name, posterior in models.items():
    value, error, _ = posterior.evidence()
    print(f"{name:12} log evidence {value:.2f} ± {error:.2f} ({posterior.verdict.status})")

# %%
chosen = torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(0))
levels = torch.where(index <= candidates[chosen], level[:, :1], level[:, 1:])

torch.manual_seed(0)  # levels of the walk, given the data and 500 draws of the rest
start, noise, tau = (walks.samples[name][:500, None, None].double() for name in ("start", "sigma", "tau"))
prior, eye = tau**2 * shared, torch.eye(len(flow))
gain = torch.linalg.solve(prior + noise**2 * eye, prior).mT
center = start[:, 0] + (gain @ (flow - start[:, 0]).unsqueeze(-1)).squeeze(-1)
walked = dist.MultivariateNormal(center, prior - gain @ prior + 1e-6 * eye).sample().float()

figure, axes = plt.subplots(figsize=(7.0, 3.2))
axes.plot(years, flow, "o", color="0.55", markersize=3, label="data")
band(axes, years, levels, "C0", "drop")
band(axes, years, walked, "C1", "random walk")
axes.set(xlabel="year", ylabel="flow at Aswan (10$^{10}$ m³ a year)")
axes.legend(ncols=3)
plt.show()

# %% [markdown]
# ## Changing volatility: the pound in dollars
#
# Weekly changes of the exchange rate, from January 1984 to June 1985. Large changes follow large changes. In a
# stochastic volatility model, the log of the standard deviation walks at random from week to week.
#
# The walk is a cumulative sum of independent steps. A loop over weeks would be slow.

# %%
rates = pd.read_csv("../data/pounds.csv")
rates["date"] = pd.to_datetime("19" + rates["date"].astype(str))
weekly = rates.set_index("date")["dollars_per_pound"]["1984-01":"1985-06"].resample("W-FRI").last()
change = 100.0 * np.log(weekly).diff().dropna()
returns = torch.tensor(change.to_numpy(), dtype=torch.float32)
print(len(returns), "weeks; sd", round(float(returns.std()), 2), "%")


def volatility(returns):
    start = pyro.sample("start", dist.Normal(0.5, 1.0))
    spread = pyro.sample("spread", dist.HalfNormal(0.3))
    with pyro.plate("step", len(returns) - 1):
        step = pyro.sample("step_size", dist.Normal(0.0, 1.0))
    walked = torch.cat([torch.zeros(1), step.cumsum(-1)])
    sd = pyro.deterministic("sd", (start + spread * walked).exp())
    with pyro.plate("week", len(returns)):
        pyro.sample("change", dist.Normal(0.0, sd), obs=returns)


volatile = pf.fit(volatility, returns, seed=1, progress=False)
print(volatile.verdict)
volatile.summary(["start", "spread"])

# %%
figure, axes = plt.subplots(figsize=(7.0, 3.2))
axes.vlines(change.index, 0, change.abs(), color="0.7", linewidth=1, label="size of the change")
band(axes, change.index, volatile.samples["sd"], "C0", "standard deviation")
axes.set(xlabel="week", ylabel="dollars per pound, weekly change (%)", xticks=change.index[::13])
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## A Gaussian process with counts: coal mines
#
# British coal mines had 191 explosions with ten deaths or more, from 1851 to 1962. We count them by year. The log rate
# is a Gaussian process: a smooth function with an amplitude and a length scale.
#
# A process over 112 years takes a Cholesky factor in each step. A sum of 20 sine functions is a good approximation, and
# costs a product of matrices. Their weights are the latents (Solin and Särkkä 2020, arXiv:1401.5508).

# %%
explosions = pd.read_csv("../data/coal.csv")["date"].astype(int)
calendar = np.arange(1851, 1963)
counts = torch.tensor(explosions.value_counts().reindex(calendar, fill_value=0).to_numpy(), dtype=torch.float32)
place = torch.linspace(-1.0, 1.0, len(counts))  # 1 is 56 years
EDGE, order = 1.5, torch.arange(1, 21)
frequency = order * torch.pi / (2.0 * EDGE)
sines = torch.sin(frequency * (place[:, None] + EDGE)) / EDGE**0.5


def smooth(counts):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    amplitude = pyro.sample("amplitude", dist.HalfNormal(1.0))
    scale = pyro.sample("length_scale", dist.LogNormal(-1.0, 0.5))
    with pyro.plate("sine", len(order)):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    density = amplitude * (scale * (2.0 * torch.pi) ** 0.5).sqrt() * torch.exp(-0.25 * (scale * frequency) ** 2)
    rate = pyro.deterministic("rate", torch.exp(mean + sines @ (density * weight)))
    with pyro.plate("year", len(counts)):
        pyro.sample("explosions", dist.Poisson(rate), obs=counts)


mines = pf.fit(smooth, counts, progress=False)
print(mines.verdict)
mines.summary(["mean", "amplitude", "length_scale"])

# %%
figure, axes = plt.subplots(figsize=(7.0, 3.2))
axes.bar(calendar, counts.numpy(), color="0.8", label="explosions")
band(axes, calendar, mines.samples["rate"], "C0", "rate")
axes.set(xlabel="year", ylabel="explosions a year")
axes.legend()
plt.show()

# %% [markdown]
# Could the model have made these counts? The line is the distribution of the data. It lies within the bands of
# replicates, or at their edges.

# %%
pf.plots.plot_predictive(mines)

# %%
mines.loo()

# %% [markdown]
# ## When it goes wrong
#
# - **A discrete latent is refused.** Mark it for enumeration, if it has few values, as `last` above. Otherwise replace
#   it by a continuous one.
# - **The fit takes long.** Time series with a loop over times are slow. Write the process as a matrix product, a
#   cumulative sum or a sum of few functions.
# - **`unreliable`, with a high k-hat.** The process is probably written so that neighbors depend strongly on each
#   other. Sample independent innovations, and compute the process from them, as above.
# - **Spread near zero.** If the data hardly say how much the process moves, the prior of the spread decides. Look at
#   `posterior.sensitivity()`.
# - **More than a few hundred times.** Aggregate, as weeks instead of days here, or use fewer functions. For a linear
#   model with normal errors, Pyro's `GaussianHMM` integrates out the states.
