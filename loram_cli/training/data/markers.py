"""Turn markers of chat formats in training text, checked against the tokenizer at hand."""

from collections.abc import Iterable
from typing import Any

# Single tokens of the families that use them; elsewhere they fall into meaningless pieces.
_MARKERS = (
    "<|im_start|>",
    "<|start_header_id|>",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<|start_of_role|>",
    "<|user|>",
    "<|assistant|>",
)


def foreign_markers(texts: Iterable[str], tokenizer: Any) -> tuple[str, ...]:
    """Markers that stand in the texts and are not tokens of this tokenizer."""
    vocabulary = tokenizer.get_vocab()
    unknown = [marker for marker in _MARKERS if marker not in vocabulary]
    found: set[str] = set()
    for text in texts:
        # One cheap test spares the rest for ordinary text.
        if "<" in text:
            found.update(marker for marker in unknown if marker in text)
    return tuple(marker for marker in _MARKERS if marker in found)
