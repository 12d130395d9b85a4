"""The account of a fit: seconds and gradients by part, regions that searches found, tests that were passed."""

import json
import time

import pyro
import pyro.distributions as dist
import torch

import pyro_flows as pf
from pyro_flows.support.process import ledger as _ledger
from pyro_flows.support.process.ledger import accepted, booked, counted, found, ledger, said


def test_each_second_and_gradient_counts_once_for_the_innermost_part():
    with ledger() as kept:
        booked(1)
        with counted("outer"):
            booked(2)
            with counted("inner"):
                booked(4)
                until = time.process_time() + 0.05
                while time.process_time() < until:
                    pass
    assert kept.gradients == {(): 1, ("outer",): 2, ("outer", "inner"): 4}
    assert kept.seconds["outer", "inner"] >= 0.05
    assert kept.seconds["outer",] < 0.05
    spent = json.loads(kept.as_json())["spent"]
    assert {part: gradients for part, (_, gradients) in spent.items()} == {"other": 1, "outer": 2, "inner": 4}


def test_what_was_found_and_accepted_is_kept_in_order_and_nothing_is_kept_outside():
    found("survey", 3)
    accepted("outside")
    booked(5)
    with ledger() as kept:
        found("survey", 2)
        found("survey", 1)
        found("paths", 0)
        accepted("first round")
        accepted("mixture")
        said(method="mixture")
    account = json.loads(kept.as_json())
    assert account["found"] == {"survey": 3}
    assert account["accepted"] == ["first round", "mixture"]
    assert account["method"] == "mixture"
    assert kept.gradients == {}


def test_a_ledger_ends_with_its_block_even_where_an_error_is_raised():
    try:
        with ledger(), counted("part"):
            raise ValueError("of the user's")
    except ValueError:
        pass
    assert _ledger._kept.get() is None


def test_the_account_of_a_fit_has_all_its_gradients_and_says_what_decided():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal(mu + slope * torch.arange(3.0), 1.0).to_event(1), obs=y)

    with ledger() as kept:
        posterior = pf.fit(model, torch.tensor([0.3, 1.1, 0.4]), progress=False)
    assert kept.said == {"method": posterior.method, "status": posterior.verdict.status, "steps": 0}
    assert kept.accepted
    assert sum(kept.gradients.values()) == posterior.settings["gradient_evaluations"] > 0
