"""The methods that make a result: their names, what their own draws are called, and the works that describe them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

TRAINED = "trained flow"
GAUSSIAN = "Gaussian"
GRID = "conditional Laplace grid"
CONDITIONALS = "Gaussian conditionals"
MIXTURE = "mixture"
INDEPENDENT = "independent coordinates"
TABULATED = "tabulated density"  # of a single coordinate
MCMC = "MCMC"
AMORTIZED = "amortized flow"  # trained on simulations, for all data sets of a form
GUIDE = "guide"  # of the caller's own, judged by ``diagnose``


class Method(NamedTuple):
    """What a method is in words, whose its draws are, and the keys of its references.

    Flows of its ``builder`` are its own: by this a sampler tells its method. It is empty where something else tells.
    """

    meaning: str
    owner: str
    cites: tuple[str, ...]
    builder: str = ""


METHODS = {
    TRAINED: Method(
        "a normalizing flow, trained on the ELBO",
        "the flow's",
        ("Agrawal2020", "Roeder2017", "Vaitl2024", "Kingma2015"),
    ),
    GAUSSIAN: Method(
        "a multivariate Student t, close to a Gaussian, centered at the best of several starting points",
        "the Gaussian's",
        ("Zhang2022",),
    ),
    GRID: Method(
        "a table of one latent's marginal, and a Gaussian for all others on a grid of its values",
        "the grid's",
        ("Rue2009",),
        builder="sliced",
    ),
    CONDITIONALS: Method(
        "a flow of a few latents, and the exact Gaussian of all others given these",
        "the conditionals'",
        ("Rue2009",),
        builder="nested",
    ),
    MIXTURE: Method("a mixture of Student-t distributions, or of flows, at several modes", "the mixture's", ()),
    INDEPENDENT: Method("a table of the density of each coordinate", "the tables'", (), builder="marginals"),
    TABULATED: Method("a table of the density of the only coordinate", "the table's", ()),
    AMORTIZED: Method(
        "a conditional flow for all data sets of a form, trained on the model's simulations",
        "the amortized flow's",
        ("Papamakarios2016", "Radev2022", "Li2024"),
    ),
    MCMC: Method("Markov chains that converged", "the chains'", ()),
    GUIDE: Method("a guide of your own", "the guide's", ()),
}


# references -----------------------------------------------------------------------------------------------------------

LATEX = str.maketrans(
    {"å": r"{\aa}", "é": r"{\'e}", "ö": r"{\"o}", "š": r"{\v{s}}", "ü": r"{\"u}"}
)  # BibTeX sorts ASCII only


Work = tuple[str, str, str, int, Mapping[str, str]]  # kind, authors, title, year, and where it appeared


def _read(text: str) -> dict[str, Work]:
    """Return the works by their keys; long lines go on indented."""
    works: dict[str, Work] = {}
    for block in text.strip().split("\n\n"):
        first, authors, title, where = block.replace("\n  ", " ").split("\n")
        kind, key = first.split()
        appeared = dict(entry.split(" = ") for entry in where.split("; "))
        works[key] = (kind, authors, title, int(key[-4:]), appeared)
    return works


WORKS = _read(r"""
inproceedings Agrawal2020
Agrawal, Abhinav and Sheldon, Daniel and Domke, Justin
Advances in Black-Box {VI}: Normalizing Flows, Importance Weighting, and Optimization
booktitle = Advances in Neural Information Processing Systems; volume = 33; eprint = 2006.10343

article Andrieu2009
Andrieu, Christophe and Roberts, Gareth O.
The Pseudo-Marginal Approach for Efficient {Monte Carlo} Computations
journal = Annals of Statistics; volume = 37; number = 2; pages = 697--725; doi = 10.1214/07-AOS574

article Bingham2019
Bingham, Eli and Chen, Jonathan P. and Jankowiak, Martin and Obermeyer, Fritz and Pradhan, Neeraj and Karaletsos,
  Theofanis and Singh, Rohit and Szerlip, Paul and Horsfall, Paul and Goodman, Noah D.
{Pyro}: Deep Universal Probabilistic Programming
journal = Journal of Machine Learning Research; volume = 20; number = 28; pages = 1--6; eprint = 1810.09538

article Cappe2008
Cappé, Olivier and Douc, Randal and Guillin, Arnaud and Marin, Jean-Michel and Robert, Christian P.
Adaptive Importance Sampling in General Mixture Classes
journal = Statistics and Computing; volume = 18; number = 4; pages = 447--459; doi = 10.1007/s11222-008-9059-x;
  eprint = 0710.4242

inproceedings Dinh2015
Dinh, Laurent and Krueger, David and Bengio, Yoshua
{NICE}: Non-linear Independent Components Estimation
booktitle = International Conference on Learning Representations, Workshop; eprint = 1410.8516

inproceedings Dinh2017
Dinh, Laurent and Sohl-Dickstein, Jascha and Bengio, Samy
Density Estimation Using {Real NVP}
booktitle = International Conference on Learning Representations; eprint = 1605.08803

inproceedings Durkan2019
Durkan, Conor and Bekasov, Artur and Murray, Iain and Papamakarios, George
Neural Spline Flows
booktitle = Advances in Neural Information Processing Systems; volume = 32; eprint = 1906.04032

article Hoffman2014
Hoffman, Matthew D. and Gelman, Andrew
The {No-U-Turn} Sampler: Adaptively Setting Path Lengths in {Hamiltonian Monte Carlo}
journal = Journal of Machine Learning Research; volume = 15; number = 47; pages = 1593--1623; eprint = 1111.4246

misc Hoffman2019
Hoffman, Matthew and Sountsov, Pavel and Dillon, Joshua V. and Langmore, Ian and Tran, Dustin and Vasudevan, Srinivas
{NeuTra}-lizing Bad Geometry in {Hamiltonian Monte Carlo} Using Neural Transport
eprint = 1903.03704

inproceedings Kingma2015
Kingma, Diederik P. and Ba, Jimmy
{Adam}: A Method for Stochastic Optimization
booktitle = International Conference on Learning Representations; eprint = 1412.6980

article Kumar2019
Kumar, Ravin and Carroll, Colin and Hartikainen, Ari and Martin, Osvaldo
{ArviZ}: a Unified Library for Exploratory Analysis of {Bayesian} Models in {Python}
journal = Journal of Open Source Software; volume = 4; number = 33; pages = 1143; doi = 10.21105/joss.01143

misc Li2024
Li, Chengkun and Vehtari, Aki and Bürkner, Paul-Christian and Radev, Stefan T. and Acerbi, Luigi and Schmitt, Marvin
Amortized {Bayesian} Workflow
eprint = 2409.04332

article Margossian2024
Margossian, Charles C. and Hoffman, Matthew D. and Sountsov, Pavel and Riou-Durand, Lionel and Vehtari, Aki and
  Gelman, Andrew
Nested {$\widehat{R}$}: Assessing the Convergence of {Markov} Chain {Monte Carlo} When Running Many Short Chains
journal = Bayesian Analysis; eprint = 2110.13017

incollection Neal2011
Neal, Radford M.
{MCMC} Using {Hamiltonian} Dynamics
booktitle = Handbook of {Markov} Chain {Monte Carlo}; pages = 113--162; publisher = Chapman \& Hall/CRC;
  eprint = 1206.1901

inproceedings Papamakarios2016
Papamakarios, George and Murray, Iain
Fast {$\varepsilon$}-Free Inference of Simulation Models with {Bayesian} Conditional Density Estimation
booktitle = Advances in Neural Information Processing Systems; volume = 29; eprint = 1605.06376

inproceedings Paszke2019
Paszke, Adam and Gross, Sam and Massa, Francisco and others
{PyTorch}: An Imperative Style, High-Performance Deep Learning Library
booktitle = Advances in Neural Information Processing Systems; volume = 32; eprint = 1912.01703

article Radev2022
Radev, Stefan T. and Mertens, Ulf K. and Voss, Andreas and Ardizzone, Lynton and Köthe, Ullrich
{BayesFlow}: Learning Complex Stochastic Models with Invertible Neural Networks
journal = IEEE Transactions on Neural Networks and Learning Systems; volume = 33; number = 4; pages = 1452--1466;
  doi = 10.1109/TNNLS.2020.3042395; eprint = 2003.06281

inproceedings Rezende2015
Rezende, Danilo Jimenez and Mohamed, Shakir
Variational Inference with Normalizing Flows
booktitle = International Conference on Machine Learning; series = Proceedings of Machine Learning Research;
  volume = 37; pages = 1530--1538; eprint = 1505.05770

article Robnik2023
Robnik, Jakob and De Luca, G. Bruno and Silverstein, Eva and Seljak, Uroš
Microcanonical {Hamiltonian Monte Carlo}
journal = Journal of Machine Learning Research; volume = 24; number = 311; pages = 1--34; eprint = 2212.08549

misc Robnik2025
Robnik, Jakob and Cohn-Gordon, Reuben and Seljak, Uroš
Metropolis Adjusted Microcanonical {Hamiltonian Monte Carlo}
eprint = 2503.01707

inproceedings Roeder2017
Roeder, Geoffrey and Wu, Yuhuai and Duvenaud, David
Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference
booktitle = Advances in Neural Information Processing Systems; volume = 30; eprint = 1703.09194

article Rue2009
Rue, Håvard and Martino, Sara and Chopin, Nicolas
Approximate {Bayesian} Inference for Latent {Gaussian} Models by Using Integrated Nested {Laplace} Approximations
journal = Journal of the Royal Statistical Society Series B; volume = 71; number = 2; pages = 319--392;
  doi = 10.1111/j.1467-9868.2008.00700.x

inproceedings Vaitl2024
Vaitl, Lorenz and Winkler, Ludwig and Richter, Lorenz and Kessel, Pan
Fast and Unified Path Gradient Estimators for Normalizing Flows
booktitle = International Conference on Learning Representations; eprint = 2403.15881

article Vehtari2021
Vehtari, Aki and Gelman, Andrew and Simpson, Daniel and Carpenter, Bob and Bürkner, Paul-Christian
Rank-Normalization, Folding, and Localization: An Improved {$\widehat{R}$} for Assessing Convergence of {MCMC}
journal = Bayesian Analysis; volume = 16; number = 2; pages = 667--718; doi = 10.1214/20-BA1221; eprint = 1903.08008

article Vehtari2024
Vehtari, Aki and Simpson, Daniel and Gelman, Andrew and Yao, Yuling and Gabry, Jonah
{Pareto} Smoothed Importance Sampling
journal = Journal of Machine Learning Research; volume = 25; number = 72; pages = 1--58; eprint = 1507.02646

article Zhang2022
Zhang, Lu and Carpenter, Bob and Gelman, Andrew and Vehtari, Aki
{Pathfinder}: Parallel Quasi-{Newton} Variational Inference
journal = Journal of Machine Learning Research; volume = 23; number = 306; pages = 1--49; eprint = 2108.03782
""")


def named(key: str) -> str:
    """Return how a text names a work.

    >>> named("Rue2009"), named("Vaitl2024"), named("Hoffman2014")
    ('Rue et al. 2009', 'Vaitl et al. 2024', 'Hoffman and Gelman 2014')
    """
    _, authors, _, year, _ = WORKS[key]
    surnames = [author.partition(",")[0] for author in authors.split(" and ")]
    first = surnames[0] if len(surnames) > 2 else " and ".join(surnames)
    return f"{first} et al. {year}" if len(surnames) > 2 else f"{first} {year}"


def bibtex(keys: Iterable[str], version: str) -> str:
    """Return the entries of works, after that of the package in this version."""
    package = "@software{pyro_flows,\n  author = {{The pyro\\_flows developers}},\n"
    package += "  title = {pyro\\_flows: normalizing flows as guides and priors for {Pyro} models},\n"
    found = [f"{package}  version = {{{version}}}\n}}"]
    for key in keys:
        kind, authors, title, year, where = WORKS[key]
        entries = {"author": authors, "title": title, "year": str(year), **where}
        entries |= {"archiveprefix": "arXiv"} if "eprint" in where else {}
        lines = ",\n".join(f"  {name} = {{{value.translate(LATEX)}}}" for name, value in entries.items())
        found.append(f"@{kind}{{{key},\n{lines}\n}}")
    return "\n\n".join(found) + "\n"
