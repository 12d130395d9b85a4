"""Each public name has all parts of a docstring: a sentence, errors, cost, a doctest.

An equation, a source, shapes and units stand where they are due. Exceptions are checked too: what needs no errors
raises none, and public methods say what they raise.
"""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pyro_flows as pf

# What raises nothing by itself, or only holds what others made.
NO_ERRORS = {
    *("Calibration", "McmcDiagnostics", "McmcDraws", "Comparison", "DensityFit", "Estimate", "Evidence", "FittedPrior"),
    *("Amortized", "Loo", "Posterior", "Sensitivity", "Verdict", "transforms.Bound", "transforms.Inverse"),
    *("NothingObservedWarning", "UnreliableWarning", "show_versions"),
    *("plots.nearest", "objectives.path", "objectives.pulled", "objectives.BasePoints", "objectives.elbo"),
    *("objectives.Loss", "datasets.Split"),
}
# Data of packages that the tests do without.
NO_DOCTEST = {
    *("datasets.digits", "datasets.mnist_small", "datasets.photographs", "datasets.photo_patches"),
    "datasets.gray_patches",
}
NO_COST = {"NothingObservedWarning", "UnreliableWarning", "datasets.Split", "objectives.Loss"}
FROM_A_PAPER = {
    *("transforms.ActNorm", "transforms.AdditiveCoupling", "transforms.AffineCoupling"),
    *("transforms.BatchNorm", "transforms.Conv1x1", "transforms.Dequantize", "transforms.LULinear"),
    *("transforms.Logit",),
    *("transforms.Planar", "transforms.SinhArcsinh", "transforms.SplineCoupling", "transforms.Squeeze"),
    *("transforms.MultiScale", "transforms.Rescale"),
    *("AutoNICE", "AutoPlanar", "AutoRealNVP", "glow", "multiscale_realnvp", "nice", "planar", "realnvp", "spline"),
    *("amortize", "fit", "diagnose", "from_mcmc", "sbc", "compare", "fit_density"),
    *("Calibration", "McmcDiagnostics", "Comparison", "Evidence", "Loo", "Posterior", "Sensitivity", "Verdict"),
    *("plots.blend", "plots.inpaint", "plots.scale_spectrum", "plots.plot_spectrum"),
    *("objectives.path", "objectives.importance_weighted", "objectives.BasePoints"),
    *("datasets.toy", "datasets.gray_patches", "plots.plot_weights", "plots.plot_predictive"),
}
WITH_AN_EQUATION = {
    *("transforms.ActNorm", "transforms.AdditiveCoupling", "transforms.AffineCoupling", "AutoFlow"),
    *("transforms.BatchNorm", "transforms.Bijection", "transforms.Compose", "transforms.Conv1x1"),
    *("transforms.Dequantize", "transforms.DiagonalAffine", "Flow", "transforms.Inverse"),
    *("transforms.LULinear", "LogDensity", "transforms.Logit", "transforms.LowerTriangularAffine"),
    *("transforms.Permutation", "transforms.Planar", "transforms.Rescale", "transforms.SinhArcsinh"),
    *("transforms.SplineCoupling", "transforms.Squeeze"),
    *("Calibration", "McmcDiagnostics", "Comparison", "DensityFit", "Estimate", "Evidence", "FittedPrior", "Loo"),
    *("Posterior", "Sensitivity", "Verdict", "AutoNICE", "AutoPlanar", "AutoRealNVP", "transforms.MultiScale"),
    *("glow", "multiscale_realnvp", "realnvp", "spline", "compare", "fit_density"),
    *(
        "Amortized",
        "amortize",
        "diagnose",
        "fit",
        "fit_many",
        "nice",
        "planar",
        "prior_from",
        "prior_predictive",
        "sbc",
    ),
    *("plots.blend", "plots.interpolate", "plots.to_normal", "plots.from_normal"),
    *("plots.inpaint", "plots.scale_spectrum", "plots.plot_spectrum", "plots.plot_weights"),
    *("objectives.path", "objectives.importance_weighted", "objectives.elbo", "objectives.BasePoints"),
}
# What gives a figure that is no pure number, or takes one.
WITH_UNITS = {
    *("transforms.AffineCoupling", "Comparison", "DensityFit", "Estimate", "Evidence", "FittedPrior", "Flow"),
    *("Amortized", "LogDensity", "Loo"),
    *("Posterior", "transforms.SplineCoupling", "Verdict", "compare", "diagnose", "fit", "fit_density"),
    *("glow", "multiscale_realnvp"),
    *("realnvp", "spline", "datasets.toy", "objectives.path", "objectives.Loss", "objectives.elbo"),
    *("objectives.importance_weighted", "plots.plot_losses", "plots.plot_elbo"),
}
LAYERS = {name: part for name, part in vars(pf.transforms).items() if inspect.isclass(part)}
WITH_SHAPES = {f"transforms.{name}" for name, part in LAYERS.items() if issubclass(part, pf.transforms.Bijection)}
WITH_SHAPES |= {"Flow", "LogDensity", "Posterior", "McmcDraws", "Loo", "Calibration", "DensityFit", "fit_density"}
WITH_SHAPES |= {"transforms.Dequantize"}

SOURCE = re.compile(r"arXiv\s+(?:[a-z-]+/\d{7}|\d{4}\.\d{4,5})|doi:10\.\d+/\S+")
COST = re.compile(r"\b[Cc]osts?\b|O\([A-Z]")
SHAPES = re.compile(r"[Ss]hapes?\b|``?\((?:\.\.\.|[A-Zk]|draws|count|steps|simulations|N)\b|\([SNC](?:, \w+)*,?\)")
UNITS = re.compile(r"\b(?:nats?|bits?|seconds?|sds?|inches|pixels)\b|in units of")
SENTENCE = re.compile(r"[A-Z:`].*[.?]", flags=re.DOTALL)


def public() -> Iterator[tuple[str, Any]]:
    """The public names, those of public modules with the module's name, without constants."""
    for name in pf.__all__:
        thing = getattr(pf, name)
        if not isinstance(thing, ModuleType):
            yield name, thing
            continue
        parts = dict(vars(thing))
        if thing is pf.transforms:
            parts |= {f"masks.{inner}": part for inner, part in vars(thing.masks).items() if inner[0] != "_"}
        for inner, part in parts.items():
            own = getattr(part, "__module__", "").startswith(thing.__name__)
            if own and callable(part) and not inner.startswith("_"):
                yield f"{name}.{inner}", part


def lacking(name: str, thing: Any) -> list[str]:
    """The parts that the docstring of a public name lacks."""
    text = inspect.cleandoc(thing.__doc__ or "")
    first = text.split("\n\n")[0]
    examples = doctest.DocTestParser().get_examples(text)
    parts = {
        "a first sentence": bool(SENTENCE.fullmatch(first)) and len(first) < 250,
        "errors": name in NO_ERRORS or bool(re.search(r"^Raises:|\bErrors:", text, flags=re.MULTILINE)),
        "cost": name in NO_COST or bool(COST.search(text)),
        "a doctest with a result": name in NO_DOCTEST or any(example.want for example in examples),
        "a source with arXiv or DOI": name not in FROM_A_PAPER or bool(SOURCE.search(text)),
        "an equation": name not in WITH_AN_EQUATION or ":math:" in text or ".. math::" in text,
        "units": name not in WITH_UNITS or bool(UNITS.search(text)),
        "shapes": name not in WITH_SHAPES or bool(SHAPES.search(text)),
    }
    return [part for part, there in parts.items() if not there]


def test_docstrings_have_all_parts():
    assert not {name: lacking(name, thing) for name, thing in public() if lacking(name, thing)}


def misread(thing: Any) -> list[str]:
    """What Sphinx reads as something else: "S. Cost" as item S of a list, "a: b" of a property or result as a type."""
    text = inspect.cleandoc(thing.__doc__ or "")
    found = re.findall(r"^ +\w+: [A-Za-z]\.(?:$| .*)", text, flags=re.MULTILINE)
    found += re.findall(r"^Returns:\n +(?:[^:`\n]|\n(?!\n)|`[^`]*`|:\w+:)*:(?= ).*", text, flags=re.MULTILINE)
    properties = vars(thing) if inspect.isclass(thing) else {}
    for inner in properties.values():
        if isinstance(inner, property) and re.match(r"(?:[^:`\n]|`[^`]*`|:\w+:)*:(?= )", inner.__doc__ or ""):
            found.append(str(inner.__doc__))
        elif inspect.isfunction(inner) and inner.__doc__:
            found += misread(inner)
    return found


def test_no_part_is_read_as_something_else():
    assert not {name: misread(thing) for name, thing in public() if misread(thing)}


def test_the_check_of_what_is_misread_bites():
    class Bad:
        """A class.

        Args:
            count: S. Cost: much.
            flow: the flow q.
        """

        @property
        def one(self) -> int:
            """The number: it is one."""
            return 1

        def two(self) -> int:
            """Return two.

            Returns:
                A number: it is two.
            """
            return 2

    assert len(misread(Bad)) == 3


def test_the_lists_name_what_is_there():
    names = {name for name, _ in public()}
    for listed in (NO_ERRORS, NO_DOCTEST, NO_COST, FROM_A_PAPER, WITH_AN_EQUATION, WITH_SHAPES, WITH_UNITS):
        assert listed <= names, sorted(listed - names)


def test_no_exception_is_granted_in_vain():
    """A name that has the part needs no exception."""
    for name, thing in public():
        text = inspect.cleandoc(thing.__doc__ or "")
        assert not (name in NO_ERRORS and re.search(r"^Raises:", text, flags=re.MULTILINE)), name
        assert not (name in NO_DOCTEST and ">>>" in text), name


def raising(function: Any) -> bool:
    """Whether its own code has a ``raise`` that a caller can meet; an abstract method's is none."""
    return bool(
        re.search(r"^\s+raise (?!NotImplementedError)", inspect.getsource(inspect.unwrap(function)), re.MULTILINE)
    )


def methods(thing: type) -> Iterator[tuple[type, str, Any]]:
    """The public methods and properties of a class and of those of ours that it inherits from."""
    for owner in thing.__mro__:
        for name, part in vars(owner).items() if owner.__module__.startswith("pyro_flows") else ():
            found = part.fget if isinstance(part, property) else getattr(part, "__func__", part)
            found = getattr(found, "func", found)  # of a cached property
            if inspect.isfunction(found) and not name.startswith("_"):
                yield owner, name, found


def test_what_needs_no_errors_raises_none():
    for name, thing in public():
        if name in NO_ERRORS and not inspect.isclass(thing):
            assert not raising(thing), name


def test_public_methods_say_what_they_raise():
    """And those that override nothing have a docstring."""
    silent = set()
    for _, thing in public():
        for owner, name, found in methods(thing) if inspect.isclass(thing) else ():
            text = inspect.cleandoc(found.__doc__ or "")
            if raising(found) and not re.search(r"^Raises:|\bErrors:", text, flags=re.MULTILINE):
                silent.add(f"{owner.__name__}.{name} raises")
            if not text and not any(hasattr(base, name) for base in owner.__mro__[1:]):
                silent.add(f"{owner.__name__}.{name}")
    assert not silent


def test_all_references_have_an_identifier():
    """Where a docstring of a public name names its source, it can be looked up."""
    for name, thing in public():
        text = inspect.cleandoc(thing.__doc__ or "")
        if re.search(r"^References?:|^Sources?:", text, flags=re.MULTILINE):
            assert SOURCE.search(text), name


def test_the_test_bites():
    def bare() -> None:
        """Does a thing"""

    bare_parts = lacking("fit", bare)
    assert bare_parts == [
        *("a first sentence", "errors", "cost", "a doctest with a result", "a source with arXiv or DOI", "an equation"),
        "units",
    ]
    assert lacking("transforms.Planar", bare)[-1] == "shapes"
    assert "cost" not in lacking("UnreliableWarning", bare)
