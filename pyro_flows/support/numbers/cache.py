"""What was made and is kept for the next time it is asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Cache(Generic[Key, Value]):
    """The ``size`` entries that were used last: to put one in or to look it up is to use it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[Key, Value] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._kept

    def __iter__(self) -> Iterator[Key]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, key: Key) -> Value:
        self._kept.move_to_end(key)
        return self._kept[key]

    def values(self) -> list[Value]:
        """Return what is kept, without using it."""
        return [*self._kept.values()]

    def put(self, key: Key, value: Value) -> list[Key]:
        """Put an entry in; return the keys of those that had to go."""
        self._kept[key] = value
        self._kept.move_to_end(key)
        return [self._kept.popitem(last=False)[0] for _ in range(len(self._kept) - self.size)]

    def of(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the entry, made and put in if it is not there."""
        if key not in self._kept:
            self.put(key, make())
        return self[key]

    def clear(self) -> None:
        """Drop all entries."""
        self._kept.clear()
