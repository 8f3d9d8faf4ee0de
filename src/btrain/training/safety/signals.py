"""The handling of SIGTERM and SIGINT, which end a run at the next batch, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from btrain.errors import Interrupted
from btrain.processes.world import ALONE, World

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """The request to stop that signals have made so far.

    Attributes:
        number: of the signal; None before one.
    """

    def __init__(self, world: World = ALONE) -> None:
        self.number: int | None = None
        self._world = world
        self._waits = True

    def made(self) -> bool:
        return self.number is not None

    def agreed(self) -> bool:
        """Return whether all processes stop here: a signal to one of them is one to all.

        One that comes to a process after it was asked counts the next time.
        """
        if self._world.size == 1:
            return self.made()
        number = self._world.largest(self.number or 0)
        if number:
            self.number = number
        return number > 0

    def obey(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.number is not None:
            raise Interrupted(self.number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end work that can be repeated, such as evaluation, where it is.

        With several processes it ends all where they call `together` next.
        """
        try:
            if self._world.size == 1:
                self._waits = False
                self.obey()
            yield
        finally:
            self._waits = True

    def together(self) -> None:
        """End several processes at once here when one of them got a signal.

        Raises:
            Interrupted: one did.
        """
        if self._world.size > 1 and self.agreed():
            self.obey()

    def receive(self, number: int) -> None:
        """Note a signal."""
        self.number = number
        if not self._waits:
            self.obey()


@contextmanager
def stop_on_signals(world: World = ALONE) -> Iterator[StopRequest]:
    """Note the first SIGTERM or SIGINT; a second one does what it did before, at once.

    With several processes a second one does nothing: torchrun hands on what the terminal has sent
    already, and kills after half a minute.
    A signal that is ignored, as under nohup, stays so. In a thread, which gets no signals, nothing
    changes.
    """
    request = StopRequest(world)
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def handle(number: int, frame: FrameType | None) -> None:
        if world.size == 1:
            restore()
        request.receive(number)

    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handle)
    try:
        yield request
    finally:
        restore()
