# %% [markdown]
# # A flow inside of Pyro: your own loop, minibatches, a VAE
#
# `fit` is one way to use a flow. Its guides are also ordinary Pyro autoguides, and its flows are ordinary Pyro
# distributions. This notebook trains them in Pyro's own SVI, in three ways.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.optim import ClippedAdam
from torch import nn

import pyro_flows as pf
from pyro_flows import datasets, plots

plt.style.use("pyro_flows.style")

# %% [markdown]
# ## Your own loop
#
# Two parameters `a` and `b`, of which the data see only $a + b^2$. The posterior lies along a parabola, which no
# Gaussian follows.


# %%
def parabola(y):
    a = pyro.sample("a", dist.Normal(0.0, 3.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("observation", 30):
        pyro.sample("y", dist.Normal(a + b**2, 1.0), obs=y)


pyro.set_rng_seed(0)
y = 1.0 + torch.randn(30)


def train(guide, steps=2000):
    optimizer = ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(parabola, guide, optimizer, Trace_ELBO(16, max_plate_nesting=1, vectorize_particles=True))
    for _ in range(steps):
        svi.step(y)
    return guide


# %% [markdown]
# `AutoRealNVP` takes the place of Pyro's guide; nothing else changes. Guides move by small steps, which gradients of
# single draws need. Here each gradient is averaged over 16 draws, so `cautious=False` trains faster.
#
# `diagnose` gives the verdict on any guide.

# %%
guides = {"flow": pf.AutoRealNVP(parabola, layers=6, cautious=False), "Gaussian": AutoMultivariateNormal(parabola)}
judged = {}
for name, guide in guides.items():
    judged[name] = pf.diagnose(parabola, train(guide), y)
    print(f"{name}: ELBO {judged[name].elbo:.2f} nats\n  {judged[name].verdict}")

# %%
pf.plots.plot_pairs(judged, "b", "a")

# %% [markdown]
# Pyro's tools take the guide, as `Predictive` for new data. Their mean and spread are close to those of the data:

# %%
new = Predictive(parabola, guide=guides["flow"], num_samples=500)(None)["y"]
print(f"new: {new.mean():.2f} ± {new.std():.2f}; data: {y.mean():.2f} ± {y.std():.2f}")

# %% [markdown]
# ## Minibatches: `AutoHierarchicalFlow`
#
# The data are seizures of 59 patients in four periods each. Each count has a rate of its own, a latent for each row.
# With many rows, one step takes only some of them. Then a flow over all latents is not possible, because the
# latents change from step to step.
#
# `AutoHierarchicalFlow` is a flow over the few global latents, times a conditional distribution for the latent of each
# row. The conditional distribution comes from the derivatives of the model's own log density.

# %%
epil = pd.read_csv("../data/epil.csv")
log_base = torch.tensor((epil["base"] / 4.0).to_numpy(), dtype=torch.float32).log()
covariates = torch.stack(
    [
        log_base - log_base.mean(),
        torch.tensor((epil["treatment"] == "progabide").to_numpy(), dtype=torch.float32),
        torch.tensor((epil["period"] == 4).to_numpy(), dtype=torch.float32),
    ],
    -1,
)
seizures = torch.tensor(epil["seizures"].to_numpy(), dtype=torch.float32)
rows = len(seizures)
names = ["log of base", "treatment", "period 4"]


def counts(covariates, seizures, index):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 3.0))
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("row", rows, subsample=index):
        mean = intercept + (covariates[index] * slope).sum(-1)  # which takes many draws at once, too
        log_rate = pyro.sample("log_rate", dist.Normal(mean, spread))
        pyro.sample("seizures", dist.Poisson(log_rate.exp()), obs=seizures[index])


# %%
pyro.clear_param_store()
pyro.set_rng_seed(0)
everything = torch.arange(rows)
guide = pf.AutoHierarchicalFlow(counts, layers=4).initialize(covariates, seizures, everything)
STEPS = 300
svi = SVI(counts, guide, ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / STEPS)}), Trace_ELBO())
losses = [svi.step(covariates, seizures, torch.randperm(rows)[:118]) for _ in range(STEPS)]

# %% [markdown]
# Is it right? `diagnose` judges the guide by all rows.

# %%
judged = pf.diagnose(counts, guide, covariates, seizures, everything, progress=False)
print(judged.verdict)

# %% [markdown]
# With 236 rows, `fit` can take all of them at once, and is the check.

# %%
whole = pf.fit(counts, covariates, seizures, everything, progress=False)
print(whole.verdict.status, whole.method)


def moments(slopes, spread):
    draws = torch.cat([slopes, spread[:, None]], -1)
    return {"mean": draws.mean(0).tolist(), "sd": draws.std(0).tolist()}


fits = {"minibatches": judged, "fit": whole}
both = {name: (fitted.samples["slope"], fitted.samples["spread"]) for name, fitted in fits.items()}
columns = {(name, what): values for name, draws in both.items() for what, values in moments(*draws).items()}
pd.DataFrame(columns, index=[*names, "spread"]).round(3)

# %% [markdown]
# Both agree. A flow beside Pyro's `AutoNormal` for the rows would not. Its Gaussian for each row does not depend on the
# global latents. So the standard deviation of `spread` comes out too small.
#
# ## A variational autoencoder with two flows
#
# An image is made from 6 latent numbers by a network, the decoder. A second network, the encoder, describes the
# posterior of the latents of each image. Usually, the prior and this posterior are Gaussian. Here both may be flows:
#
# - the **posterior** is a Gaussian followed by planar layers whose parameters come from the encoder;
# - the **prior** is a Real-NVP, trained with the rest.
#
# A flow with a context is a conditional distribution, one for each image. `flow(context)` is a Pyro distribution.

# %%
LATENTS, WIDTH = 6, 64
images, labels = datasets.digits()
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
pixels = images[order].float()
train_set, test_set = pixels[:1500], pixels[1500:]


class Autoencoder(nn.Module):
    """Digits with 17 levels a pixel, which are binomial counts given the latents."""

    def __init__(self, planar_layers, flow_prior):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, WIDTH), nn.SiLU())
        self.decoder = nn.Sequential(nn.Linear(LATENTS, 128), nn.SiLU(), nn.Linear(128, 64))
        layers = [pf.transforms.DiagonalAffine(LATENTS, context_dim=WIDTH)]
        layers += [pf.transforms.Planar(LATENTS, context_dim=WIDTH) for _ in range(planar_layers)]
        self.posterior = pf.Flow(pf.transforms.Compose(layers))
        calm = {"network": "robust", "log_scale_bound": 2.0}  # test images lie where nothing was trained
        self.prior_flow = pf.realnvp(LATENTS, layers=6, **calm) if flow_prior else None

    def prior(self):
        return self.prior_flow() if self.prior_flow else dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1)

    def model(self, batch):
        pyro.module("autoencoder", self)
        with pyro.plate("image", len(batch)):
            z = pyro.sample("z", self.prior())
            pyro.sample("pixels", dist.Binomial(16, logits=self.decoder(z)).to_event(1), obs=batch)

    def guide(self, batch):
        pyro.module("autoencoder", self)
        with pyro.plate("image", len(batch)):
            pyro.sample("z", self.posterior(self.encoder(batch / 16.0)))


# %% [markdown]
# Two variants, with the same training. The figure of merit is the ELBO of new images, in nats an image: more is
# better.


# %%
def learn(vae, epochs=80, batch=100):
    svi = SVI(vae.model, vae.guide, ClippedAdam({"lr": 5e-3, "lrd": 0.1 ** (1 / (15 * epochs))}), Trace_ELBO())
    for _ in range(epochs):
        for part in train_set[torch.randperm(len(train_set))].split(batch):
            svi.step(part)
    return svi.evaluate_loss(test_set.repeat(10, 1)) / -len(test_set) / 10


variants = {
    "Gaussian posterior, Gaussian prior": (0, False),
    "planar posterior, Real-NVP prior": (6, True),
}
autoencoders = {}
for name, options in variants.items():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    autoencoders[name] = Autoencoder(*options)
    print(f"{name}: {learn(autoencoders[name]):.2f} nats an image")

# %% [markdown]
# Draws of the last one: latents from the Real-NVP, then the decoder's mean. Below, test images and what encoder and
# decoder make of them.

# %%
pyro.set_rng_seed(1)
vae = autoencoders["planar posterior, Real-NVP prior"]
with torch.no_grad():
    made = vae.decoder(vae.prior().sample((20,))).sigmoid()
    copied = vae.decoder(vae.posterior(vae.encoder(test_set[:10] / 16.0)).sample()).sigmoid()
plots.plot_images(torch.cat([made, test_set[:10] / 16.0, copied]), columns=10)

# %% [markdown]
# Where do images lie? The flow prior is shaped like the latents of real images.

# %%
with torch.no_grad():
    codes = vae.posterior(vae.encoder(train_set / 16.0)).sample()
    prior = vae.prior().sample((1500,))
figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.0), sharex=True, sharey=True, layout="constrained")
digit_of = labels[order][:1500]
axes[0].scatter(*codes[:, :2].T, s=4, color="0.8", linewidths=0)
for digit in (0, 1, 4, 6):
    axes[0].scatter(*codes[digit_of == digit, :2].T, s=6, linewidths=0, label=f"{digit}")
axes[0].legend(title="digit", markerscale=3)
axes[0].set(title="latents of images", xlabel="latent 1", ylabel="latent 2")
axes[1].scatter(prior[:, 0], prior[:, 1], s=4, color="0.4", linewidths=0)
axes[1].set(title="draws of the Real-NVP prior", xlabel="latent 1")
plt.show()

# %% [markdown]
# ## When it goes wrong
#
# - **The loss jumps.** Lower the learning rate, or draw more particles. With gradients of single draws, leave
#   `cautious=True`.
# - **`Parameters are made when the model first runs`.** Call `guide.initialize(*args)` before you create a torch
#   optimizer.
# - **A second guide starts from old values.** Call `pyro.clear_param_store()` first.
# - **A subsampled plate is refused.** A flow cannot hold the latents of a minibatch. Use `AutoHierarchicalFlow`, as
#   above.
# - **All latents of a VAE are unused.** The decoder ignores them, if it is too strong. Take a weaker decoder, or weight
#   the divergence less at first.
# - **You want a verdict.** Call `pf.diagnose(model, guide, *args)` with all data. It needs a guide with a density for a
#   fixed set of latents.
