"""Errors that a user can act on. The CLI prints them as they are and picks the exit code."""


class LoramError(Exception):
    """Something failed: what is wrong, where, and what to do, in one or two lines.

    Args:
        message: What is wrong and where (file, tensor, line number).
        hint: What to do about it; shown on a second line.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n{hint}")
        self.message = message
        self.hint = hint


class UsageError(LoramError):
    """The request itself is wrong (a flag, a recipe key, a missing argument)."""

    exit_code = 2
