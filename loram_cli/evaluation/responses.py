"""Answers of one model, kept on disk as they come, so that no question is asked twice."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loram_cli.errors import LoramError


class ResponseCache:
    """A file of JSON lines, the answers of a batch each, only ever appended to.

    A batch is kept whole or not at all: what a kill has torn is asked again in the same company,
    so that not even the last digit depends on the kill.

    Args:
        path: The file; it and its folder are created on the first answer. None keeps answers in
            memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._answers: dict[str, Any] = {}
        self._stream: Any = None
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
            # A kill may have torn the last line.
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                os.truncate(path, len(whole))
            for line in whole.splitlines():
                self._answers.update(json.loads(line))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise LoramError(
                f"{path}: not a file of kept answers ({error})", "delete it, or pass --force"
            ) from error

    def get(self, key: str) -> Any:
        """The kept answer, or None."""
        return self._answers.get(key)

    def put(self, answers: Mapping[str, Any]) -> None:
        """Keep a batch; a kill of this process from here on loses none of it."""
        self._answers.update(answers)
        if self._path is None:
            return
        if self._stream is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("a", encoding="utf-8")
        self._stream.write(json.dumps(answers) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def response_key(kind: str, *question: Any) -> str:
    """The key of a question: a digest over all that decides the answer, the model aside."""
    text = json.dumps([kind, *question], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
