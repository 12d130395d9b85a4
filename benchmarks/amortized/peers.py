"""Amortized posteriors of other packages: sbi's neural posterior estimation, and BayesFlow's.

Each gets the simulations, the unconstrained coordinates and the scale of the data that ``pf.amortize`` trains with, its
size of batches, and as much processor time. All else is the package's default.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from pyro_flows.amortization.amortize import BATCH

TIMED = 30  # steps that tell how many epochs there is time for

Answer = Callable[[Tensor, int], Tensor]  # features (n,) of a data set, and how many draws -> z (draws, D)


def sbi(z: Tensor, features: Tensor, seconds: float) -> tuple[Answer, float]:
    """Train sbi's NPE on parameters (N, D) and data (N, n), epoch by epoch while there is time for one more.

    Returns:
        The function that answers, and the seconds of the training.
    """
    from sbi.inference import NPE

    torch.manual_seed(0)
    trainer = NPE(show_progress_bars=False, tracker=MagicMock(log_dir=None))  # or it writes logs into this folder
    trainer.append_simulations(z, features)
    began, epochs, used = time.process_time(), 0, 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each call says that its epochs are not enough
        while not epochs or (used + used / epochs <= seconds and trainer.summary["epochs_trained"][-1] >= epochs):
            epochs += 1
            trainer.train(training_batch_size=BATCH, max_num_epochs=epochs, resume_training=epochs > 1)
            used = time.process_time() - began
        posterior = trainer.build_posterior()
    return lambda one, draws: posterior.sample((draws,), x=one[None], show_progress_bars=False), used


def bayesflow(z: Tensor, features: Tensor, seconds: float) -> tuple[Answer, float]:
    """Train BayesFlow's coupling flow on parameters (N, D) and data (N, n), as many epochs as there is time for.

    Returns:
        The function that answers, and the seconds of the training.
    """
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import bayesflow as package
    import keras

    torch.set_grad_enabled(True)  # which the import has switched off, for the process
    logging.getLogger("bayesflow").setLevel(logging.WARNING)

    def trained(count: int, epochs: int) -> tuple[Any, float]:
        keras.utils.set_random_seed(0)
        workflow = package.BasicWorkflow(inference_variables="z", inference_conditions="u")
        data = {"z": z[:count].numpy(), "u": features[:count].numpy()}
        began = time.process_time()
        workflow.fit_offline(data, epochs=epochs, batch_size=BATCH, verbose=0)
        return workflow, time.process_time() - began

    trained(BATCH, 1)  # which builds what is built once
    each = (trained(2 * TIMED * BATCH, 1)[1] - trained(TIMED * BATCH, 1)[1]) / TIMED
    workflow, used = trained(len(z), max(1, round(seconds / (each * len(z) / BATCH))))

    @torch.no_grad()
    def answer(one: Tensor, draws: int) -> Tensor:
        return torch.as_tensor(workflow.sample(num_samples=draws, conditions={"u": one[None].numpy()})["z"][0])

    return answer, used


PEERS = {"sbi": sbi, "bayesflow": bayesflow}  # by the names of their packages


def installed(names: Iterable[str]) -> list[str]:
    """Return those packages that are there, and say which are left out."""
    found = []
    for name in names:
        if importlib.util.find_spec(name):
            found.append(name)
        else:
            print(f"{name}: left out, since it is not installed.")
    return found
