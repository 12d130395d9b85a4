"""A density as an estimator by scikit-learn's conventions, without a need of that package."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from torch import Tensor

from pyro_flows.densities.encoding import as_array, is_frame
from pyro_flows.densities.fit_density import fit_density
from pyro_flows.densities.fitted import DensityFit
from pyro_flows.support.process.seeding import derive


class DensityEstimator:
    r"""Fit a density by :func:`fit_density`, as an estimator of scikit-learn.

    ``fit(X)`` fits the density of rows, :math:`q(x)`, and ignores y, as ``sklearn.neighbors.KernelDensity`` does. With
    ``conditional=True``, ``fit(X, y)`` fits the density of the outputs given the rows, :math:`q(y \mid x)`. Constructor
    arguments are those of :func:`fit_density`.

    Args:
        flow: a builder's name, "auto", or a flow.
        conditional: whether the density is that of y given X.
        validation: share of the rows that is held out.
        batch: rows a step.
        learning_rate: of Adam.
        weight_decay: of AdamW.
        max_epochs: passes through the rows at most.
        max_seconds: seconds at most.
        random_state: a seed; or a ``numpy.random.RandomState`` that one is drawn from at each fit and each ``sample``;
            or ``None``, for numpy's global one.

    Attributes:
        fit_: the :class:`DensityFit`.
        n_features_in_: columns of X.
        feature_names_in_: their names, if X had any.

    Raises:
        ValueError: by ``fit``, for what :func:`fit_density` refuses, and for another ``random_state``.
        TypeError: for sparse matrices.

    Cost: that of :func:`fit_density`. Shapes: X is (N, columns), y is (N,) or (N, D); log densities (N,) are in nats.

    >>> import numpy as np, pyro_flows as pf
    >>> rows = np.random.default_rng(0).normal(size=(200, 2))
    >>> found = pf.DensityEstimator(max_epochs=1).fit(rows)
    >>> found.score_samples(rows).shape, found.get_params()["max_epochs"]
    ((200,), 1)
    """

    def __init__(
        self,
        flow: object = "auto",
        *,
        conditional: bool = False,
        validation: float = 0.1,
        batch: int | None = None,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        max_epochs: int | None = None,
        max_seconds: float | None = None,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.flow = flow
        self.conditional = conditional
        self.validation = validation
        self.batch = batch
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.max_epochs = max_epochs
        self.max_seconds = max_seconds
        self.random_state = random_state

    def get_params(self, deep: bool = True) -> dict[str, object]:
        """Return the arguments of the constructor."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: object) -> DensityEstimator:
        """Set arguments of the constructor. Returns the estimator.

        Raises:
            ValueError: for an unknown name.
        """
        for name, value in params.items():
            if name not in self._names():
                raise ValueError(f"Invalid parameter {name!r} for estimator {self}. Valid: {self._names()}.")
            setattr(self, name, value)
        return self

    @classmethod
    def _names(cls) -> list[str]:
        return sorted(name for name in inspect.signature(cls.__init__).parameters if name != "self")

    def __repr__(self) -> str:
        found, own = inspect.signature(type(self).__init__).parameters, self.get_params()
        changed = [f"{name}={value!r}" for name, value in own.items() if value != found[name].default]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import Tags, TargetTags

        kind = None if self.conditional else "density_estimator"
        return Tags(kind, TargetTags(required=self.conditional, multi_output=self.conditional))

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "fit_")

    def fit(self, X: object, y: object = None) -> DensityEstimator:
        """Fit the density of X, or of y given X. Returns the estimator.

        Raises:
            ValueError: for values that are missing, of another shape or too few, and by :func:`fit_density`.
            TypeError: for sparse matrices.
        """
        vars(self).pop("feature_names_in_", None)
        if (names := _names_of(X)) is not None:
            self.feature_names_in_ = names
        rows = self._read(X)
        if len(rows) < 2:
            raise ValueError(
                f"Found array with {len(rows)} sample(s); a minimum of 2 is required (1 sample is too few)."
            )
        self.n_features_in_ = rows.shape[1]
        options: dict[str, Any] = {**self.get_params(), "progress": False}
        flow, options["seed"] = options.pop("flow"), _seed(options.pop("random_state"))
        if not options.pop("conditional"):
            self.fit_: DensityFit = fit_density(flow, rows, **options)
        elif y is None:
            raise ValueError("y: requires y to be passed, but the target y is None.")
        else:
            self.fit_ = fit_density(flow, _table(y, column=True), context=rows, **options)
        return self

    def score_samples(self, X: object, y: object = None) -> np.ndarray:
        """Return the log density of each row, or of each output given its row, in nats, (N,).

        It is computed in double precision: in single precision, a row's value depends on how many are scored with it.

        Raises:
            ValueError: for other columns than those of the fit, or outputs that are missing.
        """
        rows = self._rows(X)
        fit = replace(self.fit_, flow=copy.deepcopy(self.fit_.flow).double())
        if not self.conditional:
            return _numpy(fit.log_prob(rows))
        if y is None:
            raise ValueError("y: expected the outputs whose density given X is asked for.")
        return _numpy(fit.log_prob(_table(y, column=True), rows))

    def score(self, X: object, y: object = None) -> float:
        """Return the mean log density, in nats. (``KernelDensity.score`` is the sum.)"""
        return float(self.score_samples(X, y).mean())

    def sample(
        self, n_samples: int = 1, X: object = None, random_state: int | np.random.RandomState | None = None
    ) -> np.ndarray:
        """Draw rows (n_samples, columns); of a conditional density, an output for each row of X, (N, D).

        More than one for each row are (n_samples, N, D). Without a ``random_state``, that of the constructor is taken.

        Raises:
            ValueError: for a conditional density without rows, or other columns than those of the fit.
        """
        seed = _seed(self.random_state if random_state is None else random_state)
        if not self.conditional:
            self._check_fitted()
            return _numpy(self.fit_.sample(n_samples, seed=seed))
        if X is None:
            raise ValueError("X: expected the rows that outputs are drawn given.")
        rows = self._rows(X)
        seeds = [seed, *(derive(seed, f"outputs {number}") for number in range(1, n_samples))]
        drawn = [_numpy(self.fit_.sample(len(rows), rows, seed=own)) for own in seeds]
        return drawn[0] if n_samples == 1 else np.stack(drawn)

    def predict_quantiles(self, X: object, levels: Sequence[float] = (0.1, 0.5, 0.9)) -> np.ndarray:
        """Return quantiles (N, levels) of the output given each row, (N, levels, D) of several outputs.

        Raises:
            ValueError: for a density that is not conditional, or other columns than those of the fit.
        """
        if not self.conditional:
            raise ValueError("conditional: quantiles are of y given X; pass conditional=True to the estimator.")
        found = _numpy(self.fit_.quantiles(levels, self._rows(X)))
        return found[..., 0] if found.shape[-1] == 1 else found

    def _read(self, X: object) -> np.ndarray:
        """Return rows as an array; a context stays a data frame."""
        if self.conditional and is_frame(X):
            return cast(np.ndarray, X)
        return _table(X, missing=self.conditional)

    def _rows(self, X: object) -> np.ndarray:
        """Check rows against those of the fit."""
        self._check_fitted()
        names, known = _names_of(X), getattr(self, "feature_names_in_", None)
        if known is not None and names is not None and list(names) != list(known):
            raise ValueError(_different(names, known))
        rows = self._read(X)
        if rows.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {rows.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} "
                "features as input."
            )
        return rows

    def _check_fitted(self) -> None:
        if hasattr(self, "fit_"):
            return
        message = f"This {type(self).__name__} instance is not fitted yet. Call 'fit' before."
        try:
            from sklearn.exceptions import NotFittedError
        except ImportError:
            raise AttributeError(message) from None
        raise NotFittedError(message)


def _seed(random_state: object) -> int:
    """Return a seed, as ``sklearn.utils.check_random_state`` reads what it is given."""
    if random_state is None:
        return int(np.random.randint(2**31))  # noqa: NPY002 (the convention)
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31))
    if isinstance(random_state, (int, np.integer)) and not isinstance(random_state, bool):
        return int(random_state)
    raise ValueError(
        "random_state: expected a whole number, a numpy.random.RandomState or None, got a "
        f"{type(random_state).__name__}. Of a Generator, pass int(generator.integers(2**31))."
    )


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()


def _names_of(X: object) -> np.ndarray | None:
    """Return the names of columns, if all of them are texts."""
    names = list(getattr(X, "columns", []))
    return np.array(names, dtype=object) if names and all(isinstance(name, str) for name in names) else None


def _different(names: Iterable[str], known: Iterable[str]) -> str:
    """Say which names differ, in scikit-learn's words."""
    lines = ["The feature names should match those that were passed during fit."]
    if unseen := sorted(set(names) - set(known)):
        lines += ["Feature names unseen at fit time:", *(f"- {name}" for name in unseen)]
    if lost := sorted(set(known) - set(names)):
        lines += ["Feature names seen at fit time, yet now missing:", *(f"- {name}" for name in lost)]
    same = ["Feature names must be in the same order as they were in fit."] if not unseen and not lost else []
    return "\n".join([*lines, *same, ""])


def _table(values: object, *, column: bool = False, missing: bool = False) -> np.ndarray:
    """Return finite numbers (N, columns) as floats, or refuse them in the words that scikit-learn's checks look for."""
    if hasattr(values, "toarray"):
        raise TypeError("Sparse data was passed, but dense data is required. Use '.toarray()' to convert it.")
    found = as_array(values) if missing else np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if np.iscomplexobj(found):
        raise ValueError("Complex data not supported.")
    if missing and found.dtype.kind not in "f":
        return _shaped(found, column)
    try:
        found = np.array(found, dtype=float)
    except TypeError as error:
        raise TypeError(f"argument must be a string or a real number: {error}") from None
    except ValueError as error:
        raise ValueError(
            f"{error}. A density is of numbers: encode categories. Only X of an estimator with conditional=True "
            "may have them as they are."
        ) from None
    found = _shaped(found, column)
    if np.isinf(found).any() or (not missing and np.isnan(found).any()):
        raise ValueError("Input contains NaN or infinity; a density of data needs finite numbers.")
    if not math.prod(found.shape):
        raise ValueError(f"Found array with 0 feature(s) (shape={found.shape}) while a minimum of 1 is required.")
    return found


def _shaped(found: np.ndarray, column: bool) -> np.ndarray:
    found = found[:, None] if column and found.ndim == 1 else found
    if found.ndim != 2:
        raise ValueError(f"Expected 2D array, got {found.ndim}D array instead. Reshape your data.")
    return found
