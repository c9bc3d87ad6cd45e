"""A training that is stopped in the middle, as by a kill between two steps."""

from contextlib import nullcontext

from loram_cli.reporting import NullReporter


class Stop(Exception):
    """Raised by :class:`Stopping`, and caught by no code of ours."""


class Stopping(NullReporter):
    """Raises :class:`Stop` once so many steps, of all bars together, are done."""

    def __init__(self, after: int) -> None:
        self._left = after

    def progress(self, label, total, unit="it"):
        return nullcontext(self)

    def advance(self, steps: float = 1) -> None:
        self._left -= steps
        if self._left <= 0:
            raise Stop

    def skip(self, steps: float) -> None:
        pass

    def detail(self, text: str) -> None:
        pass
