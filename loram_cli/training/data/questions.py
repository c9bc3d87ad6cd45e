"""Questions with an answer that can be checked: what a policy is rewarded for."""

from collections.abc import Sequence
from dataclasses import dataclass

from loram_cli.errors import LoramError
from loram_cli.reporting import Reporter
from loram_cli.training.data.layouts import Chat, examples_of, text_field
from loram_cli.training.data.records import read_records

_MARK = "####"


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: As supervised tuning and ``eval`` render it.
        answer: The data set's own answer, ending in ``#### N``.
    """

    prompt: str
    answer: str


def load_questions(source: str, *, limit: int | None = None) -> list[Question]:
    """Word problems in GSM8K's layout.

    Args:
        source: As :func:`.data.load_instructions` takes it, such as ``demo:train``.
        limit: Read at most so many records.

    Raises:
        LoramError: Missing, unreadable, malformed or empty; names file and line.
    """
    questions = []
    for record in read_records(source, limit=limit):
        for name in ("question", "answer"):
            if record.fields.get(name) is None:
                raise LoramError(
                    f"{record.where}: field '{name}' is missing "
                    f"(fields: {', '.join(map(str, record.fields)) or 'none'})",
                    "grpo wants word problems: question, and answer ending in '#### N'",
                )
        answer = text_field(record, "answer")
        if not any(c.isdigit() for c in answer.rpartition(_MARK)[2]) or _MARK not in answer:
            raise LoramError(
                f"{record.where}: the answer does not end in '{_MARK} N', so that no number can "
                "be checked"
            )
        (example,) = examples_of(record, Chat(None))
        questions.append(Question(example.prompt, answer))
    if not questions:
        raise LoramError(f"{source}: no questions in it")
    return questions


def fitting_questions(
    questions: Sequence[Question],
    lengths: Sequence[int],
    most: int,
    reporter: Reporter,
) -> list[Question]:
    """Those whose prompt leaves room for a completion.

    Args:
        questions: All of them.
        lengths: Tokens of each prompt.
        most: Tokens that a prompt may have.
        reporter: Told how many are left out.

    Raises:
        LoramError: None is left.
    """
    kept = [q for q, length in zip(questions, lengths, strict=True) if length <= most]
    if len(kept) < len(questions):
        reporter.warn(
            f"{len(questions) - len(kept)} of {len(questions)} questions left out: longer than "
            f"{most} tokens, the part of --max-length that completions do not take"
        )
    if not kept:
        raise LoramError(
            f"no question is shorter than {most} tokens",
            "pass a longer --max-length, or a shorter --max-completion-length",
        )
    return kept
