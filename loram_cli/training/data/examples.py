"""One thing to learn, as text."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Example:
    """Given ``prompt``, write ``completion``.

    Attributes:
        prompt: Text that is given.
        completion: Text that is learnt; the end-of-sequence token follows it.
        special_tokens: Whether the tokenizer adds its own (bos); not after a chat template,
            which has written them already.
        given: Ranges of characters of the completion, in order, that are given as well: the
            user's later turns, and turns of the assistant that are not to be learnt.
    """

    prompt: str
    completion: str
    special_tokens: bool = True
    given: tuple[tuple[int, int], ...] = ()

    @property
    def text(self) -> str:
        """Prompt and completion."""
        return self.prompt + self.completion

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Ranges of characters of the text that are learnt, in order."""
        start, offset = 0, len(self.prompt)
        spans = []
        for begin, end in (*self.given, (len(self.completion),) * 2):
            if begin > start:
                spans.append((offset + start, offset + begin))
            start = end
        return tuple(spans)


def example_of_spans(
    text: str, spans: tuple[tuple[int, int], ...], *, special_tokens: bool
) -> Example:
    """The example that learns some parts of a text."""
    offset = spans[0][0]
    given = tuple(
        (end - offset, begin - offset)
        for (_, end), (begin, _) in zip(spans, [*spans[1:], (len(text), 0)], strict=True)
        if begin > end
    )
    return Example(text[:offset], text[offset:], special_tokens, given)


def single_turns(example: Example) -> list[Example]:
    """One example for each part that is learnt, with all that stands before it as its prompt."""
    if not example.given:
        return [example]
    text = example.text
    return [
        replace(example, prompt=text[:begin], completion=text[begin:end], given=())
        for begin, end in example.spans
    ]
