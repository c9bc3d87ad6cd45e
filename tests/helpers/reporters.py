"""Reporters for tests: one that keeps warnings and notes, and one that ends the work in the middle."""

from contextlib import nullcontext

from loram_cli.reporting import NullReporter


class WarningRecorder(NullReporter):
    """Keeps the warnings and the notes it gets."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)

    def warn(self, line: str) -> None:
        self.warnings.append(line)


class ProgressRecorder(NullReporter):
    """Keeps the steps of its latest progress bar, and its total."""

    def progress(self, label, total, unit="it"):
        self.total, self.steps = total, []
        return nullcontext(self)

    def advance(self, steps: float = 1) -> None:
        self.steps.append(steps)

    def skip(self, steps: float) -> None:
        pass

    def detail(self, text: str) -> None:
        pass


class Interruption(Exception):
    """Raised by :class:`Interrupter`, and caught nowhere in the product."""


class Interrupter(NullReporter):
    """Raises :class:`Interruption` after so many steps of all progress bars together.

    The training ends there as by a kill between two steps.
    """

    def __init__(self, after: int) -> None:
        self._left = after

    def progress(self, label, total, unit="it"):
        return nullcontext(self)

    def advance(self, steps: float = 1) -> None:
        self._left -= steps
        if self._left <= 0:
            raise Interruption

    def skip(self, steps: float) -> None:
        pass

    def detail(self, text: str) -> None:
        pass
