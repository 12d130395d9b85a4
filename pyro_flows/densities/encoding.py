"""Contexts of mixed kinds as numbers: categories become 0 or 1, missing values a mean and a column that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from pyro_flows.support.arguments import numbers, refused
from pyro_flows.support.files.untrusted import require

if TYPE_CHECKING:
    import pandas as pd

Level = str | float  # a number of Python, True and False among them
LEVELS_UP_TO = 20  # values of a column of whole numbers that are read as categories,
ROWS_A_LEVEL = 10  # if each is in so many rows: in a fold of five, one of fewer rows may be missing


@dataclass(frozen=True)
class Column:
    """One column of a context."""

    name: str  # or its place
    levels: tuple[Level, ...] = ()  # the categories, in order; none for a column of numbers
    fill: float = 0.0  # what takes the place of a missing number, the mean of the others
    missing: bool = False  # whether values were missing, so that a column of its own says where

    @property
    def width(self) -> int:
        """How many columns it becomes: two categories are one number."""
        return self.missing + (len(self.levels) if len(self.levels) > 2 else 1)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Return the numbers (N, width) for values (N,)."""
        gone = _missing(values)
        if bool(gone.any()) and not self.missing:
            raise ValueError(
                f"context: column {self.name} has missing values (row {int(gone.argmax())}), and had none in the fit."
            )
        found = self._of_levels(values, gone) if self.levels else self._of_numbers(values, gone)
        return np.concatenate([found, gone[:, None]], 1) if self.missing else found

    def _of_numbers(self, values: np.ndarray, gone: np.ndarray) -> np.ndarray:
        try:
            return np.where(gone, self.fill, values).astype(float)[:, None]
        except (TypeError, ValueError):
            raise ValueError(f"context: column {self.name} had numbers in the fit, and has other values now.") from None

    def _of_levels(self, values: np.ndarray, gone: np.ndarray) -> np.ndarray:
        place = {level: number for number, level in enumerate(self.levels)}
        pairs = zip(values, gone, strict=True)
        codes = np.array([-1 if lost else place.get(_plain(value), -2) for value, lost in pairs])
        if bool((codes == -2).any()):
            row = int((codes == -2).argmax())
            whole = (
                f" Whole numbers with at most {LEVELS_UP_TO} values, each in {ROWS_A_LEVEL} rows or more, are read as "
                "categories; pass floating-point numbers to the fit otherwise."
            )
            raise ValueError(
                f"context: {_plain(values[row])!r} in row {row} of column {self.name} is no category that the fit has "
                f"({', '.join(map(repr, self.levels[:5]))}{', ...' if len(self.levels) > 5 else ''})."
                f"{whole if type(self.levels[0]) is int else ''}"
            )
        found = (codes[:, None] == np.arange(len(self.levels))).astype(float)
        return found if len(self.levels) > 2 else found[:, -1:]


@dataclass(frozen=True)
class Encoding:
    """How a context becomes numbers, as read from the context of the training data.

    >>> import numpy as np
    >>> found = Encoding.of(np.array([["a", 1.5], ["b", np.nan], ["c", 2.5]], dtype=object))
    >>> found.encode([["b", np.nan]]).tolist()
    [[0.0, 1.0, 0.0, 2.0, 1.0]]
    """

    columns: tuple[Column, ...]

    @classmethod
    def of(cls, context: object) -> Encoding | None:
        """Read the columns of a context; None where its numbers stay as they are, and have no names.

        Categories are texts, booleans, pandas' categories, and whole numbers (by dtype) of at most 20 values, each in
        at least 10 rows.
        """
        if isinstance(context, np.memmap):
            return None
        found = cls(tuple(_read(*column) for column in _columns(context)))
        plain = all(not column.levels and not column.missing for column in found.columns)
        return None if plain and not is_frame(context) else found

    @property
    def width(self) -> int:
        return sum(column.width for column in self.columns)

    def encode(self, context: object) -> Tensor:
        """Return the numbers (N, width); refuse categories, columns and missing values that the fit did not see."""
        columns = _columns(context)
        if len(columns) != len(self.columns):
            raise ValueError(f"context: expected {len(self.columns)} columns, got {len(columns)}.")
        known, got = ([one.name for one in those] for those in (self.columns, columns))
        if is_frame(context) and self._named and got != known:
            raise ValueError(
                f"context: expected the columns {', '.join(known)}, got {', '.join(got)}. Pass them in the order of "
                "the fit."
            )
        pairs = zip(self.columns, columns, strict=True)
        return torch.from_numpy(np.concatenate([column.encode(given.values) for column, given in pairs], 1))

    @property
    def _named(self) -> bool:
        """Whether the fit had a data frame; else the names are places."""
        return any(column.name != str(at) for at, column in enumerate(self.columns))

    def to_json(self) -> list[dict[str, object]]:
        return [{**asdict(column), "levels": list(column.levels)} for column in self.columns]

    @classmethod
    def from_json(cls, text: object) -> Encoding:
        """Return what :meth:`to_json` wrote; anything else is :class:`Damaged`."""
        entries = text if isinstance(text, list) else []
        require(entries, "a context has no columns")
        for entry in entries:
            known = isinstance(entry, Mapping) and set(entry) == set(Column.__dataclass_fields__)
            require(known and isinstance(entry["levels"], list), "a column of the context lacks entries")
            plain = all(isinstance(level, (str, int, float)) for level in entry["levels"])
            require(plain and isinstance(entry["missing"], bool), "a column of the context has other entries")
        return cls(tuple(Column(**{**entry, "levels": tuple(entry["levels"])}) for entry in entries))


class _Given(NamedTuple):
    """One column as it is given."""

    name: str
    values: np.ndarray  # (N,)
    categories: bool  # whether pandas says that it holds categories


def _columns(context: object) -> list[_Given]:
    """Return the columns of a data frame, an array, a tensor, or lists."""
    if is_frame(context):
        if not context.shape[1]:  # type: ignore[attr-defined]
            raise ValueError("context: expected one or more columns, got none; leave it out.")
        columns = [(repr(str(name)), context.iloc[:, at]) for at, name in enumerate(context.columns)]  # type: ignore[attr-defined]
        return [_Given(name, as_array(values), _is_category(values)) for name, values in columns]
    values = as_array(context)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2:
        raise ValueError(f"context: expected a row for each point, (N, columns), got shape {values.shape}.")
    return [_Given(str(at), values[:, at], _is_category(context)) for at in range(values.shape[1])]


def is_frame(context: object) -> bool:
    return hasattr(context, "columns") and hasattr(context, "iloc")


def _is_category(values: object) -> bool:
    return str(getattr(values, "dtype", "")) == "category"


def as_array(values: object) -> np.ndarray:
    """Return values as an array: of objects for pandas' own kinds, with None for what is missing."""
    if isinstance(values, (Tensor, np.ma.MaskedArray)):
        tensor = numbers("context", values).detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    kind = getattr(values, "dtype", None)
    if kind is None or isinstance(kind, np.dtype):
        try:
            found = np.asarray(values)
        except ValueError:  # rows of several lengths
            raise refused("context", "rows of one length", values) from None
        texts = isinstance(values, (list, tuple)) and found.dtype.kind in "US"
        return np.array(values, dtype=object) if texts else found
    series = cast("pd.Series", values)  # pandas' categories, texts and nullable numbers
    gone = np.asarray(series.isna())
    if str(kind)[:1] not in "IUF":
        given = map(_plain, series) if _is_category(series) else series
        return np.array([None if lost else value for value, lost in zip(given, gone, strict=True)], dtype=object)
    if bool(gone.any()):
        return np.array([np.nan if lost else float(value) for value, lost in zip(series, gone, strict=True)])
    return np.array(list(series))  # whole numbers stay whole


def _read(name: str, values: np.ndarray, categories: bool) -> Column:
    gone = _missing(values)
    given = values[~gone]
    if not len(given):
        raise ValueError(f"context: column {name} has no values at all; leave it out.")
    other = [value for value in given if not (_is_number(value) or _is_text(value))] if given.dtype == object else []
    if other or given.dtype.kind in "mMc":
        kind = type(other[0]).__name__ if other else given.dtype
        raise ValueError(
            f"context: column {name} is of {kind}; expected numbers or categories. Pass times as numbers, such as days "
            "since the first, complex numbers as two columns, and others as floats or texts."
        )
    texts = given.dtype.kind in "bUS" or (given.dtype == object and not all(_is_number(value) for value in given))
    levels: Sequence[Level] = ()
    if categories or texts or given.dtype.kind in "iu":
        levels = sorted({_plain(value) for value in given}, key=lambda level: (str(type(level)), level))
        if not (categories or texts):
            few = len(levels) > LEVELS_UP_TO or np.unique(given, return_counts=True)[1].min() < ROWS_A_LEVEL
            levels = () if few else levels
    fill = 0.0 if levels else float(np.asarray(given, dtype=float).mean())
    return Column(name, tuple(levels), fill, bool(gone.any()))


def _missing(values: np.ndarray) -> np.ndarray:
    if values.dtype == object:
        import pandas

        return np.asarray(pandas.isna(values))
    return np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), dtype=bool)


def _is_text(value: object) -> bool:
    return isinstance(value, (str, bytes, bool, np.bool_))


def _is_number(value: object) -> bool:
    return isinstance(value, (float, int, np.floating, np.integer)) and not isinstance(value, (bool, np.bool_))


def _plain(value: object) -> Level:
    """Return a category as text, a number or a boolean of Python."""
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, (str, int, float)) else str(value)
