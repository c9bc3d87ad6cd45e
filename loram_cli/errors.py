"""Errors that a user can act on. The CLI prints them as they are and picks the exit code."""


class LoramError(Exception):
    """Something failed: what is wrong, where, and what to do, in one or two lines.

    Args:
        message: What is wrong and where (file, tensor, line number).
        hint: What to do about it; shown on a second line.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = one_line(message)
        self.hint = None if hint is None else one_line(hint)
        super().__init__(self.message if hint is None else f"{self.message}\n{self.hint}")


def one_line(text: str) -> str:
    """The text with its line breaks and terminal codes spelt out.

    Messages quote names from files of strangers, and a tensor's name may be any text.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def reason_of(error: BaseException, *, most: int = 160) -> str:
    """Why a library failed, on one line; the error's kind where it does not say."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class UsageError(LoramError):
    """The request itself is wrong (a flag, a recipe key, a missing argument)."""

    exit_code = 2


# As torch, the system's calls, its loader, C++ and the starting of threads say it.
_MEMORY_WORDS = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "failed to map segment",
    "bad_alloc", "new thread",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether something failed for want of memory, on a GPU or on the processor."""
    # By name: torch need not be loaded to tell.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return any(words in text for words in _MEMORY_WORDS)
