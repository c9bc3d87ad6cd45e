"""Questions with an answer that can be checked: what a policy is rewarded for."""

from collections.abc import Sequence
from dataclasses import dataclass

from loram_cli.errors import LoramError
from loram_cli.reporting import NullReporter, Reporter
from loram_cli.training.choices import Exhausted
from loram_cli.training.data.chat import Chat
from loram_cli.training.data.fields import as_text, is_absent
from loram_cli.training.data.layouts import examples_of
from loram_cli.training.data.records import Record, read_records
from loram_cli.training.data.sources import load_sources
from loram_cli.training.data.tally import UnusableRecord

_MARK = "####"
_LAYOUT = "grpo takes word problems: question, and answer ending in '#### N'"


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: As supervised tuning and ``eval`` render it.
        answer: The data set's own answer, ending in ``#### N``.
    """

    prompt: str
    answer: str


def load_questions(
    source: str,
    *,
    limit: int | None = None,
    reporter: Reporter | None = None,
    seed: int = 0,
    exhausted: Exhausted = "stop",
) -> list[Question]:
    """Word problems in GSM8K's layout.

    ``source`` is as for :func:`.documents.load_instructions`.

    Raises:
        LoramError: Missing, unreadable, malformed or empty; names file and line.
    """

    def load(name: str) -> list[Question]:
        return _load(name, limit, reporter or NullReporter())

    return load_sources(source, load, limit=limit, seed=seed, exhausted=exhausted)


def _load(source: str, limit: int | None, reporter: Reporter) -> list[Question]:
    questions: list[Question] = []
    chat = Chat(None)
    for record in read_records(source, limit=limit):
        try:
            questions.append(_question(record, chat))
        except UnusableRecord as unusable:
            chat.tally.leave_out(unusable)
    if not questions:
        raise chat.tally.nothing_left(source, "questions", _LAYOUT)
    chat.tally.tell(source, reporter)
    return questions


def _question(record: Record, chat: Chat) -> Question:
    fields = record.fields
    for name in ("question", "answer"):
        if name not in fields:
            raise LoramError(
                f"{record.where}: field '{name}' is missing "
                f"(fields: {', '.join(map(str, fields)) or 'none'})",
                _LAYOUT,
            )
        if is_absent(fields[name]):
            raise UnusableRecord(record.where, f"'{name}' is null")
    answer = fields["answer"]
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        # The number alone is all that is compared.
        chat.tally.change("a numeric answer was read as '#### N'", record.where)
        answer = f"{_MARK} {answer:g}" if isinstance(answer, float) else f"{_MARK} {answer}"
    answer = as_text(answer, "field 'answer'", record.where, chat.tally)
    if not any(c.isdigit() for c in answer.rpartition(_MARK)[2]) or _MARK not in answer:
        raise LoramError(
            f"{record.where}: the answer does not end in '{_MARK} N', so that no number can "
            "be checked"
        )
    asked_for = {"question": fields["question"], "answer": answer}
    (example,) = examples_of(Record(asked_for, record.where), chat)
    return Question(example.prompt, answer)


def fitting_questions(
    questions: Sequence[Question],
    lengths: Sequence[int],
    most: int,
    reporter: Reporter,
) -> list[Question]:
    """Those whose prompt leaves room for a completion.

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
