"""The deciding layer's tests bite: each deliberate bug, a change of one line of source, makes a named check fail."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from pyro_flows.fitting import combine as runs
from pyro_flows.fitting import fit, rounds
from pyro_flows.flows import recipe
from pyro_flows.inference.modes import climbs, missed_modes, missed_regions, symmetric_modes, symmetries, tempering
from pyro_flows.inference.starts import portfolio
from pyro_flows.inference.training import convergence
from pyro_flows.inference.verdict import deciding, weighing
from pyro_flows.model import charts, noncentered
from pyro_flows.posterior.export import arviz_groups
from tests.fitting import test_early_stop, test_rounds
from tests.inference.modes import test_symmetric_modes, test_symmetries, test_tempering
from tests.inference.starts import test_coordinates, test_matching
from tests.inference.verdict import test_own_values, test_verdict
from tests.inference.verdict.test_verdict import weighing as weighed
from tests.model import test_charts
from tests.posteriors import new_schools_posterior

pytestmark = pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")


def change(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, old: str, new: str) -> None:
    """Put a function with ``new`` in the place of ``old`` wherever the right one is known by its name."""
    right = vars(owner)[name]
    function = inspect.unwrap(right.fget if isinstance(right, property) else right)
    source = textwrap.dedent(inspect.getsource(function))
    assert old in source, f"{name} has no {old!r} any more: change the bug along with the code"
    space: dict[str, Any] = {}
    exec("from __future__ import annotations\n" + source.replace(old, new), function.__globals__, space)
    wrong = space[name]
    monkeypatch.setattr(owner, name, wrong)
    if inspect.isclass(owner):
        return
    for module in [m for key, m in sys.modules.items() if key.partition(".")[0] in ("pyro_flows", "tests")]:
        if vars(module).get(name) is right:
            monkeypatch.setattr(module, name, wrong)


# checks ---------------------------------------------------------------------------------------------------------------


def _exact_moves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("climbed", "surveyed", "under_covered_region"):
        monkeypatch.setattr(missed_modes, name, lambda *_, **__: [])


def each(check: Callable[..., None], cases: Iterable[Any]) -> Callable[..., None]:
    """A check of all cases of a parametrized test."""
    return lambda _: [check(*case) if isinstance(case, tuple) else check(case) for case in cases]


def conversion(_):
    """Draws are one chain, with the values and densities that the posterior has; resampled ones weigh nothing more."""
    posterior = new_schools_posterior("corrected", draws=200)
    data = arviz_groups.all_groups(posterior, posterior.density, predictive=False)
    for name, values in posterior.samples.items():
        assert dict(data["posterior"][name].sizes)["chain"] == 1
        np.testing.assert_array_equal(data["posterior"][name].values[0], values.numpy())
    stats = data["sample_stats"]
    np.testing.assert_allclose(stats["log_p"].values[0], posterior._used_log_p.numpy(), rtol=1e-5)
    ratios = (stats["log_p"] - stats["log_q"]).values
    np.testing.assert_allclose(ratios, ratios.mean(), atol=1e-4)
    raw = data["raw_sample_stats"]
    np.testing.assert_allclose(raw["log_q"].values[0], posterior.log_q.numpy(), rtol=1e-5)


verdicts, moves, moved = test_verdict, test_symmetries, test_symmetric_modes
CHECKS: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "the_table": lambda _: verdicts.check_table(),
    "what_a_fit_says": lambda _: verdicts.test_what_the_fit_says(),
    "weights": lambda _: verdicts.check_weigh(),
    "impossible_draws": lambda _: verdicts.test_impossible_draws_count_as_draws(),
    "quantiles": lambda _: verdicts.check_quantile_shifts(),
    "tails": lambda _: verdicts.test_heavy_tails_by_their_share_in_a_hundred_samples("cauchy", 1.0, 1.0),
    "normal_tails": lambda _: verdicts.test_heavy_tails_by_their_share_in_a_hundred_samples("normal", 0.0, 0.0),
    "resampled": lambda _: verdicts.check_resampled(),
    "second_pool": lambda _: verdicts.test_a_second_pool_has_to_be_no_worse(weighed(k_hat=0.75), "unreliable"),
    "own_values": lambda _: test_own_values.test_what_weighting_changes_besides_is_corrected(),
    "invalid_model": lambda _: verdicts.test_an_invalid_model_is_no_posterior(),
    "systematic": lambda _: verdicts.test_resampling_is_systematic(),
    "one_half": lambda patch: (_exact_moves_alone(patch), moves.check_half(20)),
    "both_halves": lambda patch: (_exact_moves_alone(patch), moves.check_whole(20)),
    "labels": lambda _: moves.test_components_of_a_mixture_change_places(),
    "told_from_draws": lambda _: moves.check_signed_permutation(),
    "groups": each(moves.check_group, moves.GROUPS),
    "shares": lambda _: moves.test_components_with_names_change_places_and_their_share_is_reflected((-2.0, 3.0)),
    "images": lambda _: moved.test_any_signed_permutation_between_two_tops_is_found(60),
    "valley": lambda _: moved.test_a_mode_within_a_wide_region_lies_apart(),
    "supports": each(moves.test_no_move_leaves_the_support, moves.SUPPORTS),
    "a_large_mode": lambda _: moves.test_unequal_modes(0.1, True),
    "a_small_mode": lambda _: moves.test_unequal_modes(0.01, False),
    "mass": lambda _: test_tempering.check_mass(),
    "wandering": lambda _: test_tempering.test_exact_draws_stay_exact_draws(False),
    "neck": lambda _: test_tempering.check_neck(),
    "enough": each(test_rounds.test_enough_from_both_sides, test_rounds.ENOUGH),
    "unseen": each(test_early_stop.test_invisible_from_both_sides, test_early_stop.INVISIBLE),
    "evenness": each(test_early_stop.test_even_weights_from_both_sides, test_early_stop.EVEN),
    "promising": lambda _: test_early_stop.test_what_promises_enough_from_both_sides(),
    "moments": lambda _: test_matching.test_the_moments_of_a_normal_distribution(),
    "begun": lambda _: test_rounds.check_begun(),
    "kept": test_rounds.check_kept,
    "agree": lambda _: test_rounds.test_runs_that_agree(),
    "disagree": each(test_rounds.test_runs_that_do_not_agree, test_rounds.OTHERS),
    "in_vain": each(test_rounds.test_runs_that_left_the_missed_mode_where_they_began, test_rounds.IN_VAIN),
    "elementwise": lambda _: test_coordinates.check_map(test_coordinates.FAMILIES["Normal"], test_coordinates.DATA),
    "matrices": lambda _: test_coordinates.check_map(
        test_coordinates.FAMILIES["MultivariateNormal"], test_coordinates.DATA
    ),
    "conjugate": each(
        test_coordinates.test_coordinates_are_standard_normal_given_the_prior_and_the_data,
        ("Normal", "MultivariateNormal"),
    ),
    "circle": lambda _: (test_charts.check_chart(test_charts.CIRCLE), test_charts.test_angles_stay_in_one_turn()),
    "heavy": lambda _: test_charts.check_chart(test_charts.HEAVY),
    "conversion": conversion,
}


# bugs -----------------------------------------------------------------------------------------------------------------

JUDGE, WEIGH, DECIDE = (deciding, "judge"), (weighing, "weigh"), (deciding, "decide")
MOVED, PAST = (deciding, "_moved"), (deciding, "_past_mending")
NORMAL = (noncentered, "_normal")

BUGS = [
    # the verdict: thresholds flipped, moved, forgotten
    (*MOVED, "if mean > SHIFT_MOST", "if mean > 2 * SHIFT_MOST", "the_table"),
    (*MOVED, "if mean > SHIFT_MOST", "if mean <= SHIFT_MOST", "the_table"),
    (*MOVED, "if sd > SHIFT_MOST", "if sd <= SHIFT_MOST", "the_table"),
    (*PAST, "math.isnan(mean) or math.isnan(sd)", "math.isnan(mean)", "the_table"),
    (*JUDGE, "ratio < ESS_SHARE_LEAST", "ratio > ESS_SHARE_LEAST", "the_table"),
    (*PAST, "weighing.widening > SD_WIDENING_MOST", "sd > SD_WIDENING_MOST", "the_table"),
    (*PAST, "not weighing.distance <= MEAN_SHIFT_MOST", "not mean <= MEAN_SHIFT_MOST", "the_table"),
    (*PAST, "if to_mend and not narrows and K_HAT_GOOD", "if not narrows and K_HAT_GOOD", "the_table"),
    (*PAST, " and not narrows", "", "the_table"),
    (*PAST, "max(weighing.widening, mean)", "weighing.widening", "the_table"),
    (*PAST, "max(weighing.widening, mean)", "mean", "the_table"),
    (*PAST, "K_HAT_GOOD <= weighing.k_hat", "K_HAT_GOOD < weighing.k_hat", "the_table"),
    (*JUDGE, "if weighing.broken:", "if False:", "the_table"),
    (*JUDGE, "if not weighing.k_hat < weighing.threshold", "if weighing.k_hat >= weighing.threshold", "the_table"),
    (*MOVED, "{names[sd_where]} {by_sd}", "{names[where]} {by_sd}", "the_table"),
    (weighing, "largest_k", "K_HAT_MOST)", "0.8)", "the_table"),
    (weighing, "largest_k", "min(1.0 - 1.0 / ", "max(1.0 - 1.0 / ", "the_table"),
    (*JUDGE, "if moved or warnings", "if moved", "what_a_fit_says"),
    (*JUDGE, "reasons = list(failures)", "reasons = list[str]()", "what_a_fit_says"),
    # weights that are not applied, or the other way round
    (
        *WEIGH,
        "log_weights, k_hat = psis(ratio)",
        "log_weights, k_hat = torch.log_softmax(0 * ratio, 0), 0.1",
        "weights",
    ),
    (*WEIGH, "(log_p - log_q)", "(log_q - log_p)", "weights"),
    (*WEIGH, "- math.log(len(ratio))", "- math.log(len(ratio) - broken - 5000)", "weights"),
    (*WEIGH, "1.0 / weights.square().sum()", "1.0 / weights.square().max()", "weights"),
    (*WEIGH, "math.log(len(ratio))", "math.log(len(ratio) - broken)", "impossible_draws"),
    (*WEIGH, "points[possible] if broken else points", "points", "impossible_draws"),
    (weighing, "weighted_quantiles", "weights[places]", "weights.expand(places.shape)", "quantiles"),
    (weighing, "_quantile_shifts", ".abs().argmax(0)", ".argmin(0)", "quantiles"),
    (weighing, "heavy_tails", "found > index", "found > 1.5", "tails"),
    (weighing, "heavy_tails", "found > index", "found > -0.5", "normal_tails"),
    # draws to use
    (*DECIDE, "used=pool[index]", "used=pool[:draws]", "resampled"),
    (*DECIDE, "used_log_q=pool_q[index]", "used_log_q=pool_q[:draws]", "resampled"),
    (*DECIDE, "used_log_p=pool_p[index]", "used_log_p=pool_p[:draws]", "resampled"),
    (*DECIDE, 'second.status == "unreliable"', "False", "second_pool"),
    (*DECIDE, "if (objection := complaint(pool[:CHECKED])) is not None", "if False", "invalid_model"),
    (*DECIDE, "changed(pool, weighing.log_weights)", "[]", "own_values"),
    (weighing, "resample", ".exp().cumsum", ".div(2.0).exp().cumsum", "systematic"),
    (weighing, "resample", "index[torch.randperm(draws, generator=generator)]", "index", "systematic"),
    # modes
    (missed_regions, "guide_at", "density(z) - log_q", "density(z)", "both_halves"),
    (missed_modes, "missed_modes", "lambda: mirrored(guide, *few)", "list", "one_half"),
    (symmetries, "images", "move(latents) for move", "latents for move", "one_half"),
    (missed_regions, "missed_regions_of", "> MISSED_MASS_SHARE", "> 1.0", "one_half"),
    (missed_regions.Guide, "is_under_covered", "- self.score(z[usable])", "+ self.score(z[usable])", "one_half"),
    (missed_regions.Guide, "is_under_covered", "> by", "< by", "both_halves"),
    (climbs, "_weighed", "> MISSED_MASS_SHARE", "> 10 * MISSED_MASS_SHARE", "a_large_mode"),
    (climbs, "_weighed", "> MISSED_MASS_SHARE", "> 0.1 * MISSED_MASS_SHARE", "a_small_mode"),
    (symmetries.Unit, "apply", "else -value", "else value", "one_half"),
    (symmetries, "_swapped", "order[first], order[second] = second, first", "pass", "labels"),
    (symmetries.Unit, "apply", "2.0 * middles", "0.0 * middles", "shares"),
    (symmetries.Unit, "apply", "self.other: value", "self.other: values[self.other]", "shares"),
    (symmetries, "_placed", "inside = inside & close", "close", "supports"),
    (symmetries, "signed_permutation", "for sign in (1.0, -1.0)", "for sign in (1.0, 1.0)", "told_from_draws"),
    (symmetries, "signed_permutation", "len({*order}) < len(order)", "False", "told_from_draws"),
    (symmetries, "product", "order[place] for place in places", "order[place] for place in order", "groups"),
    (symmetries, "product", "flip * signs[place]", "signs[place]", "groups"),
    (symmetric_modes, "_region_about", "image_of(z, symmetry)", "z[:, list(symmetry[0])]", "images"),
    (missed_regions, "are_separated", "- LEVEL", "+ 1e9", "valley"),
    (tempering._Walk, "heat", "(beta - self.beta)", "beta", "mass"),
    (tempering._Walk, "heat", "(self.log_p - self.log_g)", "self.log_p", "mass"),
    (tempering._Walk, "move", "torch.rand_like(chance) < chance", "chance == chance", "wandering"),
    (tempering._Walk, "_force", "self.beta * slope", "-self.beta * slope", "neck"),
    # rounds
    (deciding, "nothing_to_gain", "gap < acceptable_gap(len(weighing.mean_shift))", "True", "enough"),
    (rounds.Round, "enough", "self.training.converged", "True", "enough"),
    (deciding, "nothing_to_gain", "_is_good(share, weighing.k_hat)", "True", "enough"),
    (deciding, "acceptable_gap", "max(", "min(", "enough"),
    (deciding, "shift_is_noise", "shift < SHIFT_SEEN", "True", "unseen"),
    (deciding, "shift_is_noise", "float(weighing.sd_shift.max())", "0.0", "unseen"),
    (deciding, "shift_is_noise", "weighing.quantile_shift or 0.0", "0.0", "unseen"),
    (rounds.Round, "nearly_uniform", "weighing.share > ESS_SHARE_EVEN", "True", "evenness"),
    (convergence.Monitor, "promises", "self.gaps[-1] <= gap", "True", "promising"),
    (convergence.Monitor, "promises", "sum(after) - sum(before)", "0.0", "promising"),
    (portfolio, "moved", "start.loc + more @ (z - start.loc)", "start.loc", "moments"),
    (portfolio, "moved", "share * known + (more[:, None] * away).mT @ away", "known", "moments"),
    (recipe, "begin_at", "_unit(flow) * sds", "sds", "begun"),
    (recipe, "set_df", "flow.df = df", "pass", "begun"),
    (rounds, "_assessed", "copy.deepcopy(flow)", "flow", "kept"),
    (runs, "compare", "not spread <= EVIDENCE_GAP_OF_RUNS", "spread <= EVIDENCE_GAP_OF_RUNS", "agree"),
    (runs, "compare", "evidences.max() - evidences.min()", "evidences[0] - evidences[1]", "disagree"),
    (runs, "compare", "torch.nan_to_num(evidences, nan=-math.inf)", "-evidences", "disagree"),
    (fit, "_in_vain", "not state.added or state.disagreements", "state.disagreements", "in_vain"),
    (fit, "_in_vain", "or state.disagreements", "", "in_vain"),
    # coordinates
    (*NORMAL, "+ 0.5 * share.log()", "- 0.5 * share.log()", "elementwise"),
    (*NORMAL, "log_diagonal - inner", "log_diagonal + inner", "matrices"),
    (*NORMAL, "loc + scale * shift", "loc - scale * shift", "conjugate"),
    (*NORMAL, "data.precision * (data.center - loc)", "data.center - loc", "conjugate"),
    (*NORMAL, "(root, shift)", "(root, -shift)", "elementwise"),
    (*NORMAL, "(share, shift)", "(share.mT, shift)", "matrices"),
    (charts.Circle, "forward", "logsigmoid(u) + logsigmoid(-u)", "logsigmoid(u) - logsigmoid(-u)", "circle"),
    (charts.Circle, "inverse", "y - self.center + math.pi, 2.0 * math.pi", "y - self.center + math.pi, 1e9", "circle"),
    (charts.Heavy, "forward", "scale.log() + log_cosh", "log_cosh", "heavy"),
    # the conversion for ArviZ
    (arviz_groups, "_in_chains", "(chains, len(values) // chains,", "(len(values) // chains, chains,", "conversion"),
    (arviz_groups, "_stats", '"log_p": log_p', '"log_p": log_q', "conversion"),
    (
        arviz_groups,
        "_used_stats",
        "log_p.double() - posterior.log_evidence if",
        "log_q - posterior.log_evidence if",
        "conversion",
    ),
]


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_passes_what_is_right(check, monkeypatch):
    CHECKS[check](monkeypatch)


@pytest.mark.parametrize("bug", BUGS, ids=[f"{n}-{row[1]}-{row[-1]}" for n, row in enumerate(BUGS)])
def test_a_deliberate_bug_is_caught(bug, monkeypatch):
    *where, check = bug
    change(monkeypatch, *where)
    with pytest.raises((AssertionError, UserWarning)):  # ArviZ warns of chains that are longer than draws
        CHECKS[check](monkeypatch)
