"""How much a run of a model does, and how many points its recorded graphs take at once for that."""

from __future__ import annotations

from pyro_flows._batches import ROWS_AT_LEAST
from pyro_flows._tensors import Args, Dispatch, Function, Kwargs, tensors_in

LONG = 2000  # operations from which one graph serves all batch sizes: recording takes seconds
AT_ONCE = 2**12  # numbers that one operation of a long graph handles in little more time than one number,
LONG_ROWS = 64  # and rows at most: the results of a long loop that its gradient needs should stay in a cache
LONG_VALUES, ROWS_OF_VALUES = 2**14, 1024  # the same for values alone, of which no results are kept


class Work(Dispatch):
    """Counts operations inside, the numbers that they write, and those of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.numbers = self.largest = 0

    def __torch_dispatch__(self, func: Function, types: object, args: Args = (), kwargs: Kwargs = None) -> object:
        result = func(*args, **(kwargs or {}))
        sizes = [part.numel() for part in tensors_in((result,))]
        self.operations += 1
        self.numbers += sum(sizes)
        self.largest = max(self.largest, *sizes, 0)
        return result

    def rows(self, batch: int) -> tuple[int, int] | tuple[None, None]:
        """Return how many rows pieces have, and larger ones of values alone, after a run with so many.

        Both are None where small batches may have graphs of their own.
        """
        if self.operations < LONG:
            return None, None
        apiece = max(1, self.numbers // (self.operations * batch))
        both = (AT_ONCE, LONG_ROWS), (LONG_VALUES, ROWS_OF_VALUES)
        unit, large = (min(most, 1 << ((at_once // apiece) | 1).bit_length() - 1) for at_once, most in both)
        return max(ROWS_AT_LEAST, unit), max(ROWS_AT_LEAST, large)
