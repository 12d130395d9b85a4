"""More training data from a class-conditional flow: does it help a classifier that has seen few images?

scikit-learn's digits, 10 or 30 real images a class. A flow starts as the Gaussian of each class and is trained until
held-out images no longer gain. Its plain draws hurt; so a synthetic image, 100 a class, is a blend of four real ones of
its class in latent space, where latents stay typical. Accuracies are on 797 other images, whatever their sign.
"""

import argparse
import math

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch.nn.functional import one_hot

import pyro_flows as pf
from pyro_flows import datasets, plots

WANTED = torch.arange(10).repeat_interleave(100)
LOGISTIC = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
CLASSIFIERS = {"SVM": SVC(), "1-NN": KNeighborsClassifier(1), "logistic": LOGISTIC}


def draw_split(each, seed):
    """Return ``each`` real images a class with labels, and the last 797 of a shuffled thousand and more."""
    images, labels = datasets.digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], labels[order]
    chosen = torch.cat([(labels[:1000] == digit).nonzero().flatten()[:each] for digit in range(10)])
    return (images[chosen], labels[chosen]), (images[1000:], labels[1000:])


def blends(images, labels, max_epochs, seed):
    """Fit the flow, and blend real images in its latent space; rounded to the 17 levels that real ones have."""
    flow, context = pf.realnvp(64, layers=4, hidden=(32,), context_dim=10), one_hot(labels, 10).float()
    more = {"levels": 17, "preprocess": "whiten", "validation": 0.2, "learning_rate": 1e-3, "start": "identity"}
    fit = pf.fit_density(flow, images, context=context, max_epochs=max_epochs, seed=seed, progress=False, **more)
    generator, found = torch.Generator().manual_seed(seed), []
    z, _ = fit.flow.bijection.inverse_and_ladj((images + 0.5) / 17, context)
    for digit in WANTED:
        four = z[labels == digit][torch.randperm(int((labels == digit).sum()), generator=generator)[:4]]
        found.append(plots.blend(four, *(0.5 * math.pi * torch.rand(2, generator=generator))))
    draws, _ = fit.flow.bijection.forward_and_ladj(torch.stack(found), one_hot(WANTED, 10).float())
    return (draws.detach() * 17).floor().clamp(0, 16), WANTED


def gaussians(images, labels, seed):
    """Draw from a Gaussian of each class with a shrunk covariance, rounded too."""
    fits = [LedoitWolf().fit(images[labels == digit].double().numpy()) for digit in range(10)]
    normal = np.random.default_rng(seed).multivariate_normal
    draws = [normal(fit.location_, fit.covariance_, 100) for fit in fits]
    return torch.as_tensor(np.concatenate(draws)).round().clamp(0, 16), WANTED


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one seed, 10 images a class, a short training")
    smoke = parser.parse_args().smoke
    for each in (10,) if smoke else (10, 30):
        found = {name: [] for name in CLASSIFIERS}
        for seed in range(1 if smoke else 3):
            real, (unseen, truth) = draw_split(each, seed)
            fake = blends(*real, max_epochs=20 if smoke else 300, seed=seed)
            both = tuple(torch.cat(pair) for pair in zip(real, fake, strict=True))
            given = (real, both, fake, gaussians(*real, seed))
            for name, classifier in CLASSIFIERS.items():
                found[name].append([classifier.fit(*pair).score(unseen, truth) for pair in given])
        for name, rows in found.items():
            values = "real {:.1%}, with synthetic {:.1%}, only it {:.1%}, only Gaussian draws {:.1%}"
            print(f"{each} a class, {name}: {values.format(*torch.tensor(rows).mean(0).tolist())}")


if __name__ == "__main__":
    main()
