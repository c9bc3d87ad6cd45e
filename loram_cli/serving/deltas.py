"""A growing text as the pieces that a client gets."""

from collections.abc import Sequence


class Deltas:
    """Turns texts so far into pieces that are final: together they are the whole answer.

    Held back until the next token decides: a character of which only some bytes are there, what
    may be the begin of a stop, and white space that may be the last.

    Args:
        stops: Texts that end the answer.
        strip: Whether white space around the whole answer is left out.
    """

    def __init__(self, stops: Sequence[str] = (), *, strip: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._strip = strip
        self._sent = 0

    def take(self, text: str) -> str:
        """The new final part of a text that may go on."""
        return self._piece(text[: len(text) - self._open(text)])

    def rest(self, text: str) -> str:
        """The new part of a text that has ended."""
        return self._piece(text)

    def _open(self, text: str) -> int:
        """How many characters at the end may still change."""
        most = len(text) - len(text.rstrip("\ufffd"))
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), most, -1):
                if text.endswith(stop[:length]):
                    most = length
                    break
        return most

    def _piece(self, text: str) -> str:
        whole = text.strip() if self._strip else text
        piece = whole[self._sent :]
        self._sent = max(self._sent, len(whole))
        return piece
