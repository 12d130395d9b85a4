"""Whether a candidate's draws are good enough."""

import pytest

from pyro_flows.inference.verdict.deciding import weights_correct


@pytest.mark.parametrize(
    ("ess_share", "k_hat", "accepted"),
    [(0.6, 0.4, True), (0.4, 0.1, False), (0.9, 0.6, False), (0.99999, 0.63, True), (0.99999, 0.71, False)],
)
def test_nearly_even_weights_are_held_to_the_threshold_of_the_verdict(ess_share, k_hat, accepted):
    """A table with weights that are even to .01 had a k-hat of .63: without it, runs were added for minutes."""
    assert weights_correct(ess_share, k_hat) is accepted
