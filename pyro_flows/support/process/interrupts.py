"""Ctrl-C, SIGTERM and SIGHUP in long calls: the first one asks a call to end, a second one ends it at once."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import TypeVar

NAMES = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP"}

Function = TypeVar("Function", bound=Callable[..., object])
Handler = Callable[[int, FrameType | None], object] | int | None


@dataclass
class Interrupts:
    """What has come since the outermost call began."""

    calls: int = 0  # that are under way, each inside of the one before
    count: int = 0  # of signals
    name: str = "Ctrl-C"  # of the first one
    held: bool = False  # whether the first one is only noted, to be asked for later: where there is something to lose
    pending: bool = False  # whether it was noted, and nobody has asked yet
    caller: FrameType | None = None  # of the outermost call

    def came(self) -> bool:
        """Return whether any came."""
        return self.count > 0

    def take(self) -> bool:
        """Return whether one was noted that nobody has asked for; it is told once."""
        taken = self.pending and _is_main()
        self.pending = self.pending and not taken
        return taken

    def hold(self, held: bool) -> bool:
        """Let the first signal be noted only, or be raised; return what it was."""
        before = self.held
        if self.calls and _is_main():
            self.held = held
        return before


STATE = Interrupts()
_handlers: dict[int, Handler] = {}  # that were there before the outermost call
_leaving: set[CodeType] = {
    importlib._bootstrap._find_and_load.__code__,  # type: ignore[attr-defined]
    contextlib._GeneratorContextManager.__enter__.__code__,
    contextlib._GeneratorContextManager.__exit__.__code__,
}


def undisturbed(function: Function) -> Function:
    """Let the first signal wait while this function, or what it calls, runs: it puts back what a context changed."""
    _leaving.add(function.__code__)
    return function


@contextmanager
def interruptible() -> Iterator[Interrupts]:
    """Handle Ctrl-C, SIGTERM and SIGHUP inside, where nobody else does: only the main thread can.

    The first one raises ``KeyboardInterrupt``, or is noted where that is held back. Any further one raises it.
    """
    before, handlers = STATE.hold(False), dict[int, Handler]()
    if not _is_main():
        yield Interrupts()
        return
    if not STATE.calls:
        STATE.count, STATE.name, STATE.pending, STATE.held = 0, "Ctrl-C", False, False
        STATE.caller = sys._getframe(2)
    STATE.calls += 1
    try:
        for name in NAMES if STATE.calls == 1 else ():
            number = getattr(signal, name, None)
            default = (signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL,)
            if number is not None and signal.getsignal(number) in default:
                handlers[number] = signal.signal(number, _note)
        _handlers.update(handlers)
        yield STATE
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        STATE.calls = max(STATE.calls - 1, 0)
        STATE.held = before
        STATE.caller = STATE.caller if STATE.calls else None


def _note(number: int, frame: FrameType | None) -> None:
    STATE.count += 1
    if STATE.count == 1:
        STATE.name = NAMES[signal.Signals(number).name]
        if STATE.held or _is_leaving(frame):
            STATE.pending = True
            return
    raise KeyboardInterrupt(STATE.name)


def _renew() -> None:
    """Leave signals to a forked process as they were: the call under way is not its own."""
    for number, handler in _handlers.items() if STATE.calls else ():
        signal.signal(number, handler)
    STATE.calls, STATE.held = 0, False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def _is_leaving(frame: FrameType | None) -> bool:
    """Whether a context is left or a module is imported by the work; the call itself may be one in such a module."""
    while frame is not None and frame is not STATE.caller:
        if frame.f_code in _leaving:
            return True
        frame = frame.f_back
    return False


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


class Released:
    """A context in which the first signal raises, whatever is held around it."""

    def __init__(self) -> None:
        self._before = False

    @undisturbed
    def __enter__(self) -> None:
        self._before = STATE.hold(False)

    @undisturbed
    def __exit__(self, *error: object) -> None:
        STATE.hold(self._before)
