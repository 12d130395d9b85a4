# %% [markdown]
# # How flows work
#
# For lecturers, and for anyone who wants to look inside. A normalizing flow is a density that one can both sample and
# evaluate. This notebook builds it up: one change of variables, planar layers, couplings, splines, and images.

# %%
import math

import matplotlib.pyplot as plt
import pandas as pd
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from torch.nn.functional import one_hot

import pyro_flows as pf
from pyro_flows import datasets, plots

plt.style.use("pyro_flows.style")

# %% [markdown]
# ## Change of variables
#
# Take a random number $x$ with density $q_0$, and an increasing map $y = T(x)$. Where $T$ stretches, draws thin out:
#
# $$\log q(y) = \log q_0(x) - \log |T'(x)|, \qquad x = T^{-1}(y).$$
#
# In several dimensions, $|T'|$ is the determinant of the Jacobian. So a flow needs maps with an easy inverse and an
# easy determinant. Here is one in one dimension: heavier tails than a Gaussian's, by $y = \sinh(k\,\mathrm{arcsinh}\,x)
# / k$.

# %%
stretch = pf.transforms.SinhArcsinh(1)
with torch.no_grad():
    next(stretch.parameters()).fill_(0.8)
flow = pf.Flow(stretch, base="normal")
torch.manual_seed(0)
x = flow.base_distribution().sample((4000,))
y, log_slope = stretch.forward_and_ladj(x)
back, _ = stretch.inverse_and_ladj(y)
line = torch.linspace(-40.0, 40.0, 8001)
mass = torch.trapezoid(flow.log_prob(line[:, None]).exp(), line)
print(f"inverse: largest error {(back - x).abs().max():.1e}; the density has mass {mass:.4f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.8), layout="constrained")
order = x.flatten().argsort()
axes[0].plot(x.flatten()[order], y.detach().flatten()[order])
axes[0].set(xlabel="x (standard normal)", ylabel="y = T(x)")
bins = torch.linspace(-6.0, 6.0, 61).numpy()
axes[1].hist(y.detach().flatten().numpy(), bins, density=True, color="0.8", label="draws of y")
axes[1].plot(line, flow.log_prob(line[:, None]).detach().exp(), label="q(y) by the formula")
axes[1].set(xlim=(-6, 6), ylim=(0.0, 0.5), xlabel="y", ylabel="density")
axes[1].legend(loc="upper right")
plt.show()

# %% [markdown]
# ## Planar flows, layer by layer
#
# A planar layer pushes points away from a plane, or towards it: $y = x + u \tanh(w^\top x + b)$. Its determinant is one
# scalar product, and its inverse is the root of one equation (Rezende and Mohamed 2015, arXiv:1505.05770).
#
# We bend a Gaussian, and then a square, to a density known up to a constant: two arcs of a ring. There are no data.
# The loss is the average of $\log q - \log p$ over draws of the flow, as in variational inference.


# %%
def arcs(z):
    """Return the log density of two arcs of a ring with radius 2, up to a constant."""
    ring = 0.5 * ((z.norm(dim=-1) - 2.0) / 0.4).square()
    sides = torch.stack([-0.5 * ((z[..., 0] - side) / 0.6).square() for side in (2.0, -2.0)])
    return torch.logsumexp(sides, 0) - ring


LOG_MASS = 1.8775  # log of the integral of exp(arcs), by a sum over a grid


def bend(flow, steps=2500, batch=256):
    """Train by Adam; the target is flat at first, and gets its shape in the first half of the steps."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    optimizer = torch.optim.Adam(flow.parameters())
    for step in range(steps):
        heat = min(1.0, 0.05 + 2.0 * step / steps)
        z, log_q = flow.rsample_and_log_prob((batch,))
        optimizer.zero_grad()
        (log_q - heat * arcs(z)).mean().backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        optimizer.step()
    return flow


def distance(flow):
    """Return the Kullback-Leibler divergence of the target from the flow, in nats."""
    with torch.no_grad():
        z, log_q = flow.rsample_and_log_prob((20_000,))
        return float((log_q - arcs(z)).mean()) + LOG_MASS


gaussian = bend(pf.planar(2, layers=10))
print(f"from a Gaussian: {distance(gaussian):.3f} nats")
plots.plot_layers(gaussian, count=700)

# %% [markdown]
# Points keep the color of their start. Each layer makes one fold. From a square it is harder: a planar layer cannot
# round an edge without bending the rest.

# %%
square = bend(pf.planar(2, layers=10, base="uniform"))
print(f"from a square: {distance(square):.3f} nats")
plots.plot_layers(square, count=700)

# %% [markdown]
# ## Couplings: NICE, Real-NVP, splines
#
# A coupling layer keeps one half of the coordinates, and uses a neural network of them to move the other half. The
# network is never inverted, so it may be anything. The Jacobian is triangular, so its determinant is a product.
#
# | flow | the other half becomes | volume |
# |---|---|---|
# | NICE (arXiv:1410.8516) | $x + t$ | is kept |
# | Real-NVP (arXiv:1605.08803) | $x\,e^{s} + t$ | changes by a factor |
# | spline (arXiv:1906.04032) | a spline of $x$ with 8 pieces | changes within a piece |
#
# Now there are data: 2,000 points of two moons. `fit_density` maximizes their likelihood, and stops by a part that it
# held out. No flow can have more than minus the entropy of the moons on new points: -1.008 nats.

# %%
points, fresh = datasets.toy("moons", 2000), datasets.toy("moons", 10_000, seed=1)
flows = {"NICE": pf.nice(2, layers=8), "Real-NVP": pf.realnvp(2, layers=8), "spline": pf.spline(2, layers=4)}
fits = {name: pf.fit_density(flow, points, max_epochs=150, progress=False) for name, flow in flows.items()}
for name, fit in fits.items():
    print(f"{name}: {fit.nats(fresh):.3f} nats on new points (the limit is {-datasets.ENTROPY['moons']:.3f})")

# %%
side = torch.linspace(-1.6, 2.6, 160), torch.linspace(-1.2, 1.7, 120)
cells = torch.cartesian_prod(*side)
figure, axes = plt.subplots(1, 4, figsize=(9.0, 2.2), sharex=True, sharey=True, layout="constrained")
axes[0].scatter(*points[:1500].T, s=2, linewidths=0, color="0.4")
axes[0].set(title="data", aspect="equal")
for panel, (name, fit) in zip(axes[1:], fits.items(), strict=True):
    density = fit.log_prob(cells).exp().reshape(160, 120).T
    panel.pcolormesh(*side, density, cmap="Blues", vmax=0.9, rasterized=True)
    panel.set(title=name, aspect="equal")

# %% [markdown]
# NICE keeps volumes up to one factor for each latent. So it cannot part one cloud in two without a thread between them.
# Couplings take turns, so that each half is moved. Layer by layer, the Real-NVP:

# %%
plots.plot_layers(fits["Real-NVP"].flow, count=700)

# %% [markdown]
# ## A walk between four images
#
# scikit-learn has 1,797 images of handwritten digits with 8 x 8 pixels. Pixels have 17 levels. Level $k$ becomes
# $(k + U) / 17$ with uniform noise $U$; otherwise, a density could be infinite at 17 values.

# %%
images, labels = datasets.digits()
shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
images, labels = images[shuffled], labels[shuffled]
digits = pf.fit_density(
    pf.realnvp(64, layers=6, hidden=(128,), network="robust", base="logistic"),
    images[:1500],
    levels=17,
    max_epochs=40,
    progress=False,
)
print(digits.summary())
print(f"new images: {digits.bits_per_dim(images[1500:]):.3f} bits a pixel; 17 equal levels take {math.log2(17):.2f}")

# %%
plots.plot_images(digits.sample(40, seed=0), columns=10)

# %% [markdown]
# The inverse of the flow turns an image into noise, its latent. A straight line between two latents passes too near to
# the center, where no noise lies. `interpolate` walks on a manifold that keeps norms typical (arXiv:1605.08803):
#
# $$z = \cos\phi\,(\cos\phi'\,z_1 + \sin\phi'\,z_2) + \sin\phi\,(\cos\phi'\,z_3 + \sin\phi'\,z_4).$$

# %%
test, digit_of = (images[1500:] + 0.5) / 17, labels[1500:]
corners = torch.stack([test[digit_of == digit][0] for digit in (0, 3, 6, 8)])
plots.plot_interpolation(digits.flow, corners, steps=9)

# %%
with torch.no_grad():
    walk = plots.interpolate(digits.flow, corners, steps=9)
print(f"corners come back with an error of {(walk[0, 0] - corners[0]).abs().max():.0e}")

# %% [markdown]
# ## Does synthetic data help a classifier?
#
# Suppose that only ten images of each digit have labels. A flow that knows the label makes 100 more of each. Two kinds:
# plain draws, and blends of four real images of a digit in latent space.


# %%
few = torch.cat([(labels[:1000] == digit).nonzero().flatten()[:10] for digit in range(10)])
real, label = images[few], labels[few]
conditional = pf.realnvp(64, layers=4, hidden=(32,), context_dim=10)
options = {"levels": 17, "preprocess": "whiten", "validation": 0.2, "learning_rate": 1e-3, "start": "identity"}
about = one_hot(label, 10).float()
small = pf.fit_density(conditional, real, context=about, max_epochs=100, progress=False, **options)
print(small.why)

wanted, generator = torch.arange(10).repeat_interleave(100), torch.Generator().manual_seed(0)
context = one_hot(wanted, 10).float()
draws = small.sample(1000, context, seed=0)
latents, _ = small.flow.bijection.inverse_and_ladj((real + 0.5) / 17, about)
blended = []
for digit in wanted:
    four = latents[label == digit][torch.randperm(10, generator=generator)[:4]]
    blended.append(plots.blend(four, *(0.5 * math.pi * torch.rand(2, generator=generator))))
blends, _ = small.flow.bijection.forward_and_ladj(torch.stack(blended), context)


def to_levels(made):
    return (made.detach() * 17).floor().clamp(0, 16)


# %%
sets = {
    "100 real images": (real, label),
    "and 1000 draws": (torch.cat([real, to_levels(draws)]), torch.cat([label, wanted])),
    "and 1000 blends": (torch.cat([real, to_levels(blends)]), torch.cat([label, wanted])),
}
classifiers = {"support vectors": SVC(), "nearest neighbor": KNeighborsClassifier(1)}
accuracy = {
    name: {kind: classifier.fit(*given).score(images[1000:], labels[1000:]) for kind, classifier in classifiers.items()}
    for name, given in sets.items()
}
pd.DataFrame(accuracy).T.round(3)

# %%
plots.plot_images(torch.cat([to_levels(draws)[::100], to_levels(blends)[::100]]), columns=10, levels=16)

# %% [markdown]
# The upper row has draws, and the lower one blends. Ten images of a digit are too few to train on: the start was kept.
# That is an affine map, so the draws are those of a Gaussian about the mean of each digit. They are poor, and lower the
# accuracy. Blends raise it. This is one split of the data. Over five splits, with 10 or 30 images of a digit, blends
# raised the mean accuracies of these two classifiers by 0.3 to 1.5 percentage points. They did not help a logistic
# regression (`python -m benchmarks.density.augmentation`).
#
# ## When it goes wrong
#
# - **Held-out nats rise and then fall.** The flow learns its data by heart. `fit_density` keeps the best step. More
#   data help, and so does a smaller flow.
# - **Two clouds are joined by a thread.** A continuous map cannot tear. Take more layers, or splines.
# - **Samples look worse than the nats suggest.** A high density is not a good picture. Try `temperature=0.7` in
#   `sample`, and say so.
# - **Nats are infinite or far too high.** Data with repeated values have no density. Give `levels=`, or add noise.
# - **The fit warns of skipped steps.** Look for outliers, and take `network="robust"` with `base="logistic"`.
