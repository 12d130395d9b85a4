"""The guides in the training loops of single-cell packages: a copy of their steps, and, where installed, their own."""

import importlib.util
import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

import pyro_flows as pf

CELLS, GENES = 120, 4


class Counts(PyroModule):
    """Counts of genes in cells, which share a level and a spread; ``kl_weight`` scales the priors, as it does there."""

    def __init__(self, cells=CELLS):
        super().__init__()
        self.cells = cells

    def create_plates(self, x, index, kl_weight=1.0):
        return pyro.plate("cell", self.cells, dim=-1, subsample=index)

    def forward(self, x, index, kl_weight=1.0):
        with poutine.scale(scale=kl_weight):
            level = pyro.sample("level", dist.Normal(torch.zeros(GENES), 2.0).to_event(1))
            spread = pyro.sample("spread", dist.LogNormal(-1.0, 0.5))
        with self.create_plates(x, index):
            with poutine.scale(scale=kl_weight):
                size = pyro.sample("size", dist.Normal(0.0, spread))
            pyro.sample("x", dist.Poisson((level + size.unsqueeze(-1)).exp()).to_event(1), obs=x)


class WithoutCells(Counts):
    """The same without latents of cells, for guides that take all latents as one vector."""

    def forward(self, x, index, kl_weight=1.0):
        with poutine.scale(scale=kl_weight):
            level = pyro.sample("level", dist.Normal(torch.zeros(GENES), 2.0).to_event(1))
        with self.create_plates(x, index):
            pyro.sample("x", dist.Poisson(level.exp()).to_event(1), obs=x)


def simulated(cells=CELLS):
    generator = torch.Generator().manual_seed(0)
    size = 0.5 * torch.randn(cells, 1, generator=generator)
    return torch.poisson((torch.linspace(0.0, 2.0, GENES) + size).exp(), generator=generator)


class Module(nn.Module):
    """Model and guide in one module, as the packages hold them."""

    def __init__(self, model, guide):
        super().__init__()
        self.model, self.guide = model, guide


class Plan:
    """The steps of a training plan: a first run of the guide, epochs of minibatches with the rows' numbers, KL warm-up.

    ``way`` is "svi" (Pyro's optimizer) or "torch" (one of torch's over the module's parameters).
    """

    def __init__(self, module, way="svi", *, rate=0.01, scale=1.0, warmup=0, batch=40):
        self.module, self.way, self.warmup, self.batch, self.epoch = module, way, warmup, batch, 0
        self.scaled = (lambda part: poutine.scale(part, scale)) if scale != 1.0 else (lambda part: part)
        self.model, self.guide = self.scaled(module.model), self.scaled(module.guide)
        self.rate, self.loss = rate, Trace_ELBO()

    def fit(self, x, epochs):
        self.module.train()
        self.module.guide(x[:2], torch.arange(2))
        if self.way == "svi":
            svi = SVI(self.model, self.guide, pyro.optim.Adam({"lr": self.rate}), self.loss)
        else:
            optimizer = torch.optim.Adam(self.module.parameters(), lr=self.rate)
        losses = []
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(self.batch):
                weight = {"kl_weight": max(min(self.epoch / self.warmup, 1.0), 1e-6)} if self.warmup else {}
                if self.way == "svi":
                    losses.append(svi.step(x[rows], rows, **weight))
                else:
                    optimizer.zero_grad()
                    loss = self.loss.differentiable_loss(self.model, self.guide, x[rows], rows, **weight)
                    loss.backward()
                    optimizer.step()
                    losses.append(float(loss.detach()))
            self.epoch += 1
        self.module.eval()
        return losses


def elbo(model, guide, x, draws=8):
    rows = torch.arange(len(x))
    with torch.no_grad():
        return sum(-Trace_ELBO().loss(model, guide, x, rows) for _ in range(draws)) / draws


def away(guide, x):
    """How far the levels' medians are from those of the simulation."""
    middle = guide.median(x[:5], torch.arange(5))["level"]
    return float((middle - torch.linspace(0.0, 2.0, GENES)).abs().mean())


GUIDES = {
    "messenger": lambda model: pf.AutoFlowMessenger(model, layers=2, init="prior"),
    "messenger, normals": lambda model: pf.AutoFlowMessenger(model, layers=2, normal=["size"]),
    "hierarchical": lambda model: pf.AutoHierarchicalFlow(model, layers=2, init="prior"),
    "realnvp": lambda model: pf.AutoRealNVP(model, layers=2, init="prior"),
}


@pytest.mark.parametrize("way", ["svi", pytest.param("torch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_trains_saves_and_loads(name, way, tmp_path):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x = simulated()
    model = WithoutCells() if name == "realnvp" else Counts()
    module = Module(model, GUIDES[name](model))
    losses = Plan(module, way, warmup=2, batch=60).fit(x, 2)
    before = away(module.guide, x)
    losses += Plan(module, way, scale=0.5, rate=0.02).fit(x, 5)
    assert all(loss == loss for loss in losses)
    assert away(module.guide, x) < before - 0.1
    rows = torch.arange(len(x))
    draws = Predictive(model, guide=module.guide, num_samples=5)(x, rows)
    middle = module.guide.median(x[:30], rows[:30])
    assert draws["level"].reshape(5, GENES).shape == (5, GENES)
    if name != "realnvp":
        assert middle["size"].shape == (30,)
        assert draws["size"].shape == (5, CELLS)
    torch.save(module.state_dict(), tmp_path / "module.pt")
    store = pyro.get_param_store().get_state()

    pyro.clear_param_store()  # as on loading: one run on a batch of two, then the state
    loaded = Module(model, GUIDES[name](model))
    Plan(loaded, way, rate=0.0, batch=60).fit(x[:2], 1)
    loaded.load_state_dict(torch.load(tmp_path / "module.pt", weights_only=True))
    if way == "svi":
        pyro.get_param_store().set_state(store)
    again = loaded.guide.median(x[:30], rows[:30])
    assert all(torch.allclose(again[key], middle[key], atol=1e-4) for key in middle)


def test_a_warm_up_of_the_divergence_ends_where_it_should():
    """A weight of next to nothing at first: conditional rows are then narrow, and wide again at its end."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x, model = simulated(), Counts()
    guide = pf.AutoFlowMessenger(model, layers=2, init="prior").initialize(x, torch.arange(CELLS))
    sds = []
    for weight in (1e-6, 1.0):
        with torch.no_grad():
            runs = [guide(x, torch.arange(CELLS), kl_weight=weight)["size"] for _ in range(20)]
        sds.append(float(torch.stack(runs).std(0).median()))
    assert 0.0 < sds[0] < 0.2 < sds[1]


# the package itself ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("scvi") is None, reason="scvi-tools is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["messenger", "hierarchical"])
def test_in_scvi_tools(name, tmp_path):
    """A model of scvi-tools with each guide: trained, saved, loaded, better than the usual guide after 50 epochs."""
    import anndata
    from scvi import REGISTRY_KEYS
    from scvi.data import AnnDataManager
    from scvi.data.fields import LayerField, NumericalObsField
    from scvi.model.base import BaseModelClass, PyroSampleMixin, PyroSviTrainMixin
    from scvi.module.base import PyroBaseModuleClass

    ours = {"messenger": pf.AutoFlowMessenger, "hierarchical": pf.AutoHierarchicalFlow}[name]

    class OneModule(PyroBaseModuleClass):
        def __init__(self, make):
            super().__init__(on_load_kwargs={"max_epochs": 1, "accelerator": "cpu"})
            self._model = Counts(600)
            self._guide = make(self._model)

        @property
        def model(self):
            return self._model

        @property
        def guide(self):
            return self._guide

        @staticmethod
        def _get_fn_args_from_batch(tensors):
            return (tensors[REGISTRY_KEYS.X_KEY], tensors[REGISTRY_KEYS.INDICES_KEY].squeeze().long()), {}

    class OneModel(PyroSviTrainMixin, PyroSampleMixin, BaseModelClass):
        def __init__(self, adata, make=ours):
            pyro.clear_param_store()
            super().__init__(adata)
            self.module = OneModule(make)
            self.init_params_ = self._get_init_params(locals())

        def get_latent(self, indices=None):
            return self.module.guide.median(simulated(600), torch.arange(600))

        @classmethod
        def setup_anndata(cls, adata, **kwargs):
            adata.obs["_indices"] = torch.arange(adata.n_obs).numpy()
            arguments = cls._get_setup_method_args(**locals())
            fields = [
                LayerField(REGISTRY_KEYS.X_KEY, None, is_count_data=True),
                NumericalObsField(REGISTRY_KEYS.INDICES_KEY, "_indices"),
            ]
            manager = AnnDataManager(fields=fields, setup_method_args=arguments)
            manager.register_fields(adata, **kwargs)
            cls.register_manager(manager)

    x = simulated(600)
    adata = anndata.AnnData(x.numpy())
    OneModel.setup_anndata(adata)
    found = {}
    options = {"batch_size": 100, "train_size": 1.0, "accelerator": "cpu", "lr": 0.01, "enable_progress_bar": False}
    usual = {"usual": lambda model: AutoNormal(model, create_plates=model.create_plates), "ours": ours}
    for key, make in usual.items():
        torch.manual_seed(0)
        trained = OneModel(adata, make)
        trained.train(max_epochs=50, **options)
        found[key] = elbo(trained.module.model, trained.module.guide, x)
    print(f"{name}: {found}")
    assert found["ours"] > found["usual"]
    latent = trained.get_latent()
    trained.save(tmp_path / "model", overwrite=True)
    assert inspect.signature(OneModel.load).parameters
    loaded = OneModel.load(tmp_path / "model", adata=adata, accelerator="cpu")
    again = loaded.get_latent()
    assert all(torch.allclose(again[key], latent[key], atol=1e-3) for key in latent)
