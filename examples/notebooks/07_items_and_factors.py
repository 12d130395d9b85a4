# %% [markdown]
# # Items and factors: signs, modes, many latents
#
# Questionnaires have people and items. An item response model has one latent value for each person, so it has hundreds
# of latents. A factor model has loadings whose signs the data do not fix, so its posterior has several modes.
#
# This notebook fits both. It shows what the verdict says, and how to write a factor model whose posterior has one mode.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch

import pyro_flows as pf

plt.style.use("pyro_flows.style")

# %% [markdown]
# ## Many latents: verbal aggression
#
# 316 students read about four frustrating situations, such as a bus that does not stop. They said whether they would
# curse, scold or shout. Each behavior comes twice: *want to do* and *do*. This gives 24 items.
# "Yes" and "perhaps" count as 1 here, and "no" counts as 0. We take the first 150 students; all of them take longer.

# %%
answers = pd.read_csv("../data/verbagg.csv")
items = answers.drop_duplicates("item")
said = answers.assign(said=answers["answer"] != "no").pivot(index="person", columns="item", values="said")
said = said[items["item"]].head(150)
print(said.shape, "share of yes and perhaps:", round(float(said.to_numpy().mean()), 2))

# %% [markdown]
# The Rasch model adds a person's tendency and an item's easiness, on the scale of log odds. There are 150 tendencies,
# 24 easinesses and the spread $\sigma$ of tendencies: 175 latents.


# %%
def rasch(y):
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    persons, questions = pyro.plate("person", y.shape[0], dim=-2), pyro.plate("item", y.shape[1], dim=-1)
    with questions:
        easiness = pyro.sample("easiness", dist.Normal(0.0, 2.0))
    with persons:
        tendency = pyro.sample("tendency", dist.Normal(0.0, sigma))
    with persons, questions:
        pyro.sample("y", dist.Bernoulli(logits=tendency + easiness), obs=y)


y = torch.tensor(said.to_numpy(), dtype=torch.float32)
people = pf.fit(rasch, y, progress=False).assign_coords({"item": items["item"], "person": said.index})
print(people.verdict)

# %% [markdown]
# The verdict covers all 175 latents. It is `refined`: with so many, chains cost less than training a flow. R-hat and
# the number of effective draws are those of the worst latents.
#
# Above 200 latents, the guide's affine map is diagonal, because a triangular one would have too many parameters. The
# flow can still make latents depend on each other.

# %%
people.summary(["sigma", "easiness"]).head(8)

# %% [markdown]
# Which items are easy? The figure has one row for each situation and behavior. The situations: a bus does not stop, a
# clerk's error makes one miss a train, the grocer closes, the operator cuts the call. People *want* to curse and shout
# more than they do.

# %%
easiness = people.samples["easiness"]
low, middle, high = torch.quantile(easiness, torch.tensor([0.055, 0.5, 0.945]), dim=0)
place = {"S1": "bus", "S2": "train", "S3": "grocer", "S4": "operator"}
names = [f"{place[item[:2]]}: {behavior}" for item, behavior in zip(items["item"], items["behavior"], strict=True)]
rows = {name: row for row, name in enumerate(dict.fromkeys(names))}
figure, axes = plt.subplots(figsize=(5.4, 3.8))
for mode, color, shift in (("want", "C0", 0.12), ("do", "C1", -0.12)):
    chosen = [k for k, found in enumerate(items["mode"]) if found == mode]
    at = [rows[names[k]] + shift for k in chosen]
    axes.hlines(at, low[chosen], high[chosen], color=color)
    axes.plot(middle[chosen], at, "o", color=color, label=f"{mode} to" if mode == "want" else mode)
axes.set_yticks(list(rows.values()), list(rows))
axes.set_xlabel("easiness (log odds), median and central 89 %")
axes.legend()
plt.show()

# %% [markdown]
# Any function of the draws has a posterior too. Here is the difference between doing and wanting, averaged over
# situations, for each behavior:

# %%
do, behavior = (items["mode"] == "do").to_numpy(), items["behavior"].to_numpy()
for kind in ("curse", "scold", "shout"):
    of = behavior == kind
    gap = easiness[:, of & do].mean(1) - easiness[:, of & ~do].mean(1)
    print(f"{kind}: do - want = {gap.mean():.2f} ± {gap.std():.2f} log odds, P(< 0) = {(gap < 0).float().mean():.3f}")

# %% [markdown]
# ## Signs: a factor model
#
# 2,800 people answered items on neuroticism (N1 to N5) and extraversion (E1 to E5). We take the first 500 people
# without gaps, and standardize.
#
# Two factors explain the correlations. The factors themselves are integrated out: given loadings $\Lambda$ and standard
# deviations $\psi$ of what is left, a row of data is normal with covariance $\Lambda \Lambda^\top +
# \mathrm{diag}(\psi^2)$.

# %%
torch.set_default_dtype(torch.float64)  # covariances that are nearly singular need more digits than float32 has
columns = ["N1", "N2", "N3", "N4", "N5", "E1", "E2", "E3", "E4", "E5"]
table = pd.read_csv("../data/bfi.csv")[columns].dropna().head(500)
x = torch.tensor(((table - table.mean()) / table.std()).to_numpy())


def observe(x, loadings):
    with pyro.plate("item", 10):
        psi = pyro.sample("psi", dist.HalfNormal(1.0))
    covariance = loadings @ loadings.mT + torch.diag_embed(psi**2)
    with pyro.plate("person", len(x)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(10), covariance), obs=x)


# %% [markdown]
# **First try: all 20 loadings are free.** Then any rotation of the two factors gives the same covariance. The posterior
# has no separate modes: it has a ring. We train for a short time, without the attempts that would follow.


# %%
def free(x):
    loadings = pyro.sample("loading", dist.Normal(torch.zeros(10, 2), 1.0).to_event(2))
    observe(x, loadings)


ring = pf.fit(free, x, max_steps=400, escalate=False, refine=False, progress=False)
print(f"{ring.verdict.status}:", *ring.verdict.reasons, sep="\n- ")

# %% [markdown]
# The first reason names places on the ring that the guide did not reach. Each of them is as good as the others.
#
# **Second try: N1 does not load on factor 2.** This fixes the rotation. Signs are still free: both factors can be
# reversed, so there are four modes.


# %%
def rotated(x):
    with pyro.plate("each", 10):
        first = pyro.sample("first", dist.Normal(0.0, 1.0))
    with pyro.plate("other than N1", 9):
        second = pyro.sample("second", dist.Normal(0.0, 1.0))
    second = torch.cat([torch.zeros(1), second])
    observe(x, pyro.deterministic("loading", torch.stack([first, second], -1)))


signs = pf.fit(rotated, x, progress=False)
print(signs.verdict)

# %% [markdown]
# `fit` tried the signs of all sites on its draws, and found that the density is the same. So it fitted one mode, and
# put copies of it at the other three: the method is a mixture. The note counts points at which the covariance could not
# be factorized. Their density counts as zero. The draws are right, but a mean loading is near zero, and says nothing:

# %%
print(signs.samples["loading"].mean(0)[:6])

# %% [markdown]
# **Third try: two anchors are positive.** N1 loads positively on factor 1, and E2 ("find it difficult to approach
# others") on factor 2. So factor 2 is *introversion*. One mode is left.


# %%
def identified(x):
    anchors = pyro.sample("anchor", dist.HalfNormal(torch.ones(2)).to_event(1))
    first = pyro.sample("first", dist.Normal(torch.zeros(9), 1.0).to_event(1))
    second = pyro.sample("second", dist.Normal(torch.zeros(8), 1.0).to_event(1))
    one = torch.cat([anchors[:1], first])
    two = torch.cat([torch.zeros(1), second[:5], anchors[1:], second[5:]])
    observe(x, pyro.deterministic("loading", torch.stack([one, two], -1)))


factors = pf.fit(identified, x, progress=False)
print(factors.verdict)

# %% [markdown]
# One mode is nearly normal, so a Gaussian is enough: the verdict is `ok`.
#
# The figure shows the three posteriors of one item. Left, a ring, of which a short training caught a part. In the
# middle, four modes. Right, one of them.

# %%
figure, panels = plt.subplots(1, 3, figsize=(8.4, 3.0), sharex=True, sharey=True, layout="constrained")
titles = {"free": ring, "rotation fixed": signs, "signs fixed": factors}
for axes, (title, posterior) in zip(panels, titles.items(), strict=True):
    at = posterior.samples["loading"][:2000, columns.index("E2")]
    axes.scatter(at[:, 0], at[:, 1], s=3, alpha=0.4, linewidths=0)
    axes.set(title=f"{title}: {posterior.verdict.status}", xlabel="loading of E2 on factor 1", aspect="equal")
panels[0].set_ylabel("loading of E2 on factor 2")
plt.show()

# %%
labels = {"item_": columns, "factor": ["neuroticism", "introversion"]}
shown = factors.assign_coords(labels, dims={"loading": ["item_", "factor"]}).summary("loading")
shown[["mean", "sd"]]

# %% [markdown]
# Mean and signs of the second fit can be repaired afterwards too: multiply each draw of a factor by the sign of its
# anchor. The result agrees with the third fit.

# %%
draws = signs.samples["loading"]
flipped = draws * torch.stack([draws[:, 0, 0], draws[:, columns.index("E2"), 1]], -1).sign().unsqueeze(1)
difference = (flipped.mean(0) - factors.samples["loading"].mean(0)) / factors.samples["loading"].std(0).clamp(min=1e-9)
print(f"largest difference of a mean: {difference.abs().max():.2f} posterior sds")

# %% [markdown]
# ## When it goes wrong
#
# - **`corrected`, with symmetric modes.** Your model does not fix signs or labels. Fix them by anchors, as above, or
#   summarize only what does not depend on them, such as the covariance.
# - **`unreliable`, with a ridge or a ring.** A rotation or a shift is free. Count what the data cannot tell, and set as
#   many loadings to zero.
# - **A mode at tiny `psi`.** Look at the numbers: is a covariance nearly singular? `LowRankMultivariateNormal` loses
#   digits there and returns densities that are far too high. Take `MultivariateNormal` and float64, as above.
# - **An anchor that loads weakly.** Its sign is then uncertain, and both signs of the factor return. Choose an item
#   that loads strongly.
# - **A thousand latents or more.** `fit` gets slow, and k-hat rises with the dimension. Integrate out what you can, as
#   the factors here, or use mini-batches in Pyro's own SVI (notebook 11).
