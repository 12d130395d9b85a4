"""An unreliable verdict goes with its draws: each door warns, once for each line, and what comes out shows it."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch

import pyro_flows as pf
from pyro_flows import cli, plots
from pyro_flows.posterior.export.arviz_groups import posterior_group
from pyro_flows.support.arviz import pack
from pyro_flows.support.numbers.arrays import relabel
from tests.posteriors import new_schools_posterior

DOORS = {
    "summary()": lambda posterior, path: posterior.summary(),
    "to_arviz()": lambda posterior, path: posterior.to_arviz(predictive=False),
    "predictive()": lambda posterior, path: posterior.predictive(draws=5),
    "resample()": lambda posterior, path: posterior.resample(5, force=True),
    "save()": lambda posterior, path: posterior.save(path / "new"),
    "load()": lambda posterior, path: pf.load(path / "saved"),
}


@pytest.fixture(scope="module")
def unreliable():
    return new_schools_posterior("unreliable", draws=500)


@pytest.fixture
def folder(unreliable, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pf.UnreliableWarning)
        unreliable.save(tmp_path / "saved")
    return tmp_path


def heard(caught):
    return [found for found in caught if issubclass(found.category, pf.UnreliableWarning)]


@pytest.mark.parametrize("door", DOORS)
def test_each_door_warns_at_the_callers_line_and_says_why(unreliable, folder, door):
    with pytest.warns(pf.UnreliableWarning) as caught:
        DOORS[door](unreliable, folder)
    (found,) = heard(caught)
    assert found.filename == __file__
    assert found.lineno == DOORS[door].__code__.co_firstlineno
    text = str(found.message)
    assert text.startswith(f"unreliable: {door} hands on draws that should not be used (k-hat ")
    assert all(reason in text for reason in unreliable.verdict.reasons)


@pytest.mark.slow
@pytest.mark.parametrize("status", ["ok", "corrected"])
def test_other_posteriors_go_out_silently(status, tmp_path):
    posterior = new_schools_posterior(status, draws=500)
    posterior.save(tmp_path / "saved")
    for use in DOORS.values():
        use(posterior, tmp_path)  # a warning would be an error


def test_once_for_each_posterior_and_line():
    first, second = (new_schools_posterior("unreliable", draws=200, seed=seed) for seed in (0, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            for posterior in (first, second):
                posterior.summary()
        first.summary()
    assert len(heard(caught)) == 3


def test_each_statement_that_is_typed_is_a_line_of_its_own():
    """A REPL calls all of them line 1 of the same file."""
    scope = {"posterior": new_schools_posterior("unreliable", draws=200)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for statement in ("a = posterior.summary()", "b = posterior.resample(5, force=True)"):
            exec(compile(statement, "<stdin>", "single"), scope)
    assert len(heard(caught)) == 2


def test_a_warning_that_is_an_error_comes_again(unreliable):
    for _ in range(2):
        with pytest.raises(pf.UnreliableWarning):
            unreliable.summary()


def test_what_shows_the_verdict_itself_does_not_warn(unreliable, tmp_path, capsys):
    assert "unreliable" in repr(unreliable)
    assert "unreliable</b>: guide (k-hat" in unreliable._repr_html_()
    plots.plot_posterior(unreliable)
    assert unreliable.samples["theta"].shape == (500, 8)
    fitted = type(unreliable)(**{**vars(unreliable), "losses": torch.tensor([3.0, 2.0])})
    cli._write(fitted, tmp_path / "out", cli.Ending())
    assert capsys.readouterr().out.startswith("unreliable: guide (k-hat")


# what comes out -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pyro_flows.UnreliableWarning")
@pytest.mark.parametrize("loaded", [False, True])
def test_the_arviz_object_shows_the_verdict(unreliable, folder, loaded):
    source = pf.load(folder / "saved") if loaded else unreliable
    tree = source.to_arviz(predictive=False)
    verdict = str(unreliable.verdict)
    for attrs in (tree.attrs, tree["posterior"].attrs):
        assert list(attrs)[:3] == ["status", "verdict", "method"]
        assert (attrs["status"], attrs["verdict"]) == ("unreliable", verdict)
    assert str(tree["fit"]["status"].values) == "unreliable"
    assert tree["fit"]["status"].shape == ()
    head = repr(tree)[:600]
    assert "unreliable: guide (k-hat" in head  # as much as xarray shows of an attribute
    page, tree_like = tree._repr_html_(), type(tree).__name__ == "DataTree"
    assert ("xr-obj-name'>&#x27;verdict: unreliable&#x27;" if tree_like else "unreliable</b>: guide (k-hat") in page


@pytest.mark.filterwarnings("ignore::pyro_flows.UnreliableWarning")
def test_arvizs_own_copies_and_files_keep_it(unreliable, tmp_path):
    tree = unreliable.to_arviz(predictive=False)
    chosen = tree.sel(school=[0, 1])
    for other in (copy.deepcopy(tree), pickle.loads(pickle.dumps(tree)), chosen):
        assert type(other) is type(tree)
        assert other.attrs["status"] == "unreliable"
        assert "unreliable: guide (k-hat" in repr(other)


def test_objects_without_a_verdict_still_print():
    groups = relabel({"posterior": posterior_group(new_schools_posterior("ok", draws=200))}, None, None)
    assert "posterior" in repr(pack(groups, {}))
    assert "posterior" in pack(groups, {})._repr_html_()


def test_dropped_posteriors_are_not_kept_alive():
    posterior = new_schools_posterior("unreliable", draws=200)
    with pytest.warns(pf.UnreliableWarning):
        posterior.summary()
    gone = weakref.ref(posterior)
    del posterior
    gc.collect()
    assert gone() is None
