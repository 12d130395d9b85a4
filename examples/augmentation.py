"""More training data from a class-conditional flow: does it help a classifier that has seen few images?

scikit-learn's digits, 10 or 30 real images a class. A flow on white data, conditional on the class, starts as the
Gaussian of each class (own means, one covariance) and is trained until held-out images no longer gain. It adds 100
synthetic images a class. Accuracies are on 797 other images, whatever their sign.

    python examples/augmentation.py [--smoke]
"""

import argparse

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import pyro_flows as pf
from pyro_flows import datasets

SYNTHETIC = 100
CLASSIFIERS = {
    "SVM": lambda: SVC(),
    "1-NN": lambda: KNeighborsClassifier(1),
    "logistic": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
}


def draw_split(each, seed):
    """Return ``each`` real images a class with labels, and the last 797 of a shuffled thousand and more."""
    images, labels = datasets.digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], labels[order]
    pool, pooled = images[:1000], labels[:1000]
    chosen = torch.cat([(pooled == digit).nonzero().flatten()[:each] for digit in range(10)])
    return (pool[chosen], pooled[chosen]), (images[1000:], labels[1000:])


def synthesise(images, labels, max_epochs, seed):
    """Fit the flow and draw images of each class, rounded to the 17 levels that real ones have."""
    onehot = torch.nn.functional.one_hot(labels, 10).float()
    flow = pf.realnvp(64, layers=4, hidden=(32,), context_dim=10)
    fit = pf.fit_density(
        flow, images, context=onehot, levels=17, preprocess="whiten", validation=0.2, learning_rate=1e-3,
        start="identity", max_epochs=max_epochs, seed=seed, progress=False,
    )  # fmt: skip
    wanted = torch.arange(10).repeat_interleave(SYNTHETIC)
    draws = fit.sample(len(wanted), torch.nn.functional.one_hot(wanted, 10).float(), seed=seed)
    return (draws.clamp(0, 1) * 17).floor().clamp(max=16), wanted


def accuracy(make, train, test):
    """Return the share of test images that a classifier gets right, in percent."""
    (images, labels), (unseen, truth) = train, test
    return 100.0 * make().fit(images.float().numpy(), labels.numpy()).score(unseen.float().numpy(), truth.numpy())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one seed, 10 images a class, a short training")
    smoke = parser.parse_args().smoke
    for each in (10,) if smoke else (10, 30):
        found = {name: [] for name in CLASSIFIERS}
        for seed in range(1 if smoke else 3):
            real, test = draw_split(each, seed)
            fake = synthesise(*real, max_epochs=20 if smoke else 300, seed=seed)
            both = tuple(torch.cat(pair) for pair in zip(real, fake, strict=True))
            for name, make in CLASSIFIERS.items():
                found[name].append([accuracy(make, train, test) for train in (real, both, fake)])
        for name, rows in found.items():
            alone, added, synthetic = torch.tensor(rows).mean(0).tolist()
            print(
                f"{each} a class, {name}: real {alone:.1f} %, with synthetic {added:.1f} %, only it {synthetic:.1f} %"
            )


if __name__ == "__main__":
    main()
