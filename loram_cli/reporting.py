"""How stages tell what they do. The CLI draws it; below the CLI nothing prints."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """One piece of long work under way."""

    def advance(self, steps: float = 1) -> None:
        """Count ``steps`` more units as done."""

    def skip(self, steps: float) -> None:
        """Count units that an earlier run has done: they say nothing of the rate."""

    def detail(self, text: str) -> None:
        """Replace the short text shown beside the bar, such as ``loss 2.31``."""


class Reporter(Protocol):
    """Receives notes, warnings and progress of a stage."""

    def note(self, line: str) -> None:
        """Tell one fact worth a line."""

    def warn(self, line: str) -> None:
        """Tell something that the user should look at."""

    def progress(
        self, label: str, total: float | None, unit: str = "it"
    ) -> AbstractContextManager[Progress]:
        """Open a progress bar of ``total`` units (unknown if None)."""


class _NullProgress:
    def advance(self, steps: float = 1) -> None:
        """Nothing to draw."""

    def skip(self, steps: float) -> None:
        """Nothing to draw."""

    def detail(self, text: str) -> None:
        """Nothing to draw."""


class NullReporter:
    """Says nothing: for use as a library and in tests."""

    def note(self, line: str) -> None:
        """Drop the note."""

    def warn(self, line: str) -> None:
        """Drop the warning."""

    @contextmanager
    def progress(self, label: str, total: float | None, unit: str = "it") -> Iterator[Progress]:
        """Yield a progress that draws nothing."""
        yield _NullProgress()
