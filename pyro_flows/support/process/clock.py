"""How long a call may go on: a bound in seconds, Ctrl-C, and what was cut by either."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from pyro_flows.support.numbers.tensors import Args, Dispatch, Function, Kwargs
from pyro_flows.support.process import journal
from pyro_flows.support.process.interrupts import STATE, undisturbed
from pyro_flows.support.process.ledger import counted

RESERVED_AT_MOST = 0.25  # of all seconds, for judging
AFTER_INTERRUPT = 10.0  # seconds that judging may take once somebody waits for it


class OutOfTime(BaseException):
    """The time is over: no ``Exception``, so that no fallback to a slower way takes it for a failure."""


class Clock:
    """What bounds a call. Each part of the work runs inside of :meth:`part`, and looks at the clock as it goes on.

    A part that is cut, by the bound or by Ctrl-C, ends as if it had returned early: the caller goes on with what there
    is. Once the call is cut, each further part ends at its first look. Then :meth:`judging` opens the last part, which
    has a bound of its own and can be ended by another Ctrl-C only. With ``raises``, Ctrl-C raises at once. ``watch`` is
    told the name of each part as it begins, and None at each look.
    """

    def __init__(
        self, seconds: float = math.inf, *, raises: bool = False, watch: Callable[[str | None], None] | None = None
    ) -> None:
        self.seconds, self.raises, self.watch = seconds, raises, watch
        self.asked = seconds  # by the caller, of whom this clock may have the rest only
        self.began = time.monotonic()
        self.end = self.began + seconds
        self.stop = self.end  # of the work, and of the part that is under way
        self.interrupted: str | None = None  # the part that Ctrl-C, SIGTERM or SIGHUP came in
        self.depth = 0  # of the parts that are open
        self.open = ""  # the innermost part
        self.cut: list[str] = []
        self.needed = 0.0  # seconds, about, for judging
        self.final = False

    @property
    def finite(self) -> bool:
        """Whether there is a bound."""
        return math.isfinite(self.seconds)

    @property
    def elapsed(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds left for the part that is under way."""
        return self.stop - time.monotonic()

    @property
    def over(self) -> bool:
        """Whether no more work is to be begun."""
        return (self.interrupted is not None and not self.final) or (self.finite and self.left <= 0.0)

    def look(self) -> None:
        """Say that the work goes on, or end it by OutOfTime."""
        if self.watch is not None:
            self.watch(None)
        if self.depth and STATE.pending:
            self.deliver_signal()
        if self.over and not self.final:
            raise OutOfTime

    def deliver_signal(self, name: str | None = None) -> None:
        """Ask whether a signal was held back; if so, it came in this part, or in the one that is open."""
        if STATE.take() and not self.interrupt(name or self.open):
            raise KeyboardInterrupt(STATE.name)

    def watching(self) -> AbstractContextManager[object]:
        """Look at the clock at each of torch's operations inside, if there is a bound: for what takes seconds."""
        return _Watch(self) if self.finite else nullcontext()

    @property
    def hurried(self) -> bool:
        """Whether there may be too little time to judge by all draws."""
        return (self.finite or self.interrupted is not None) and self.left < 2.0 * self.needed

    def reserve(self, seconds: float) -> None:
        """Keep the seconds that judging takes, a quarter of all at most."""
        self.needed = seconds
        if self.finite:
            self.stop = self.end - min(seconds, RESERVED_AT_MOST * self.seconds)

    def part(self, name: str, *, share: float = 1.0, noted: bool = True) -> Part:
        """Run a part of the work, which may take ``share`` of the time that is left; if it is cut, note its name.

        Parts stand inside of each other; the innermost one is the one that ends.
        """
        return Part(self, name, share, noted)

    def skip(self, name: str) -> None:
        """Note a part that is not begun, since the time is over."""
        if name not in self.cut:
            self.cut.append(name)

    def interrupt(self, name: str) -> bool:
        """Note that Ctrl-C came in this part; return False if it is to be raised: on request, or the second time."""
        if self.raises or self.interrupted is not None:
            return False
        self.interrupted = name
        self.cut = [name, *(other for other in self.cut if other != name)]
        if self.final:
            self.stop = min(self.end, time.monotonic() + AFTER_INTERRUPT)
        return True

    def judging(self) -> None:
        """Begin the last part, for which the whole time is open."""
        self.final = True
        self.stop = self.end if self.interrupted is None else min(self.end, time.monotonic() + AFTER_INTERRUPT)

    def reasons(self, *, short: bool = False) -> list[str]:
        """Why the work was ended; nothing if all was done. With ``short``, there were too few seconds for judging."""
        if self.interrupted is not None:
            return [f"interrupted ({STATE.name}) during: {self.interrupted}"]
        return [f"stopped at max_seconds={self.asked:g}"] if self.cut or short else []

    def notes(self) -> list[str]:
        """Which parts were cut, in words; that of Ctrl-C is in the reason."""
        rest = [name for name in self.cut if name != self.interrupted]
        return [f"skipped or cut short: {', '.join(rest)}"] if rest else []


class Part:
    """A part of the work as a context: it ends quietly where the time is over, or the first Ctrl-C comes."""

    def __init__(self, clock: Clock, name: str, share: float, noted: bool) -> None:
        self.clock, self.name, self.share, self.noted = clock, name, share, noted
        self.stop = clock.stop
        self._counted: AbstractContextManager[None] = nullcontext()
        self._around, self._held = clock.open, STATE.held

    @undisturbed
    def __enter__(self) -> None:
        clock = self.clock
        clock.deliver_signal(self.name)
        clock.open, clock.depth = self.name, clock.depth + 1
        self._counted = counted(self.name)
        self._counted.__enter__()
        if clock.finite and self.share < 1.0:
            clock.stop = min(self.stop, time.monotonic() + self.share * max(clock.left, 0.0))
        if clock.watch is not None and not clock.over:
            clock.watch(self.name)
        self._held = STATE.hold(False)

    @undisturbed
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        STATE.hold(self._held)
        self.clock.stop, self.clock.open, self.clock.depth = self.stop, self._around, self.clock.depth - 1
        self._counted.__exit__(None, None, None)
        if isinstance(error, (OutOfTime, KeyboardInterrupt)):
            journal.stop()
        if isinstance(error, OutOfTime):
            if self.noted:
                self.clock.skip(self.name)
            return True
        if isinstance(error, KeyboardInterrupt):
            return not self.clock.final and self.clock.interrupt(self.name)
        self.clock.deliver_signal(self.name)
        return False


class _Watch(Dispatch):
    """Looks at the clock at each operation, those that are being recorded too."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def __torch_dispatch__(self, func: Function, types: object, args: Args = (), kwargs: Kwargs = None) -> object:
        self.clock.look()
        return func(*args, **(kwargs or {}))


def unbounded() -> Clock:
    """Return a clock that never ends anything, and takes no Ctrl-C."""
    return Clock(raises=True)
