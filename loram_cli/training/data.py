"""Text and instruction data in the field's common layouts, as token rows."""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram_cli.errors import LoramError
from loram_cli.reporting import Reporter

IGNORED_LABEL = -100
DEMO_PREFIX = "demo:"
_ALPACA = "### Instruction:\n{instruction}\n\n{extra}### Response:\n"
_LAYOUTS = "prompt/completion, instruction/output, question/answer, or messages"

TokenRow = dict[str, list[int]]
"""``input_ids`` and ``labels``, of equal length; labels of -100 carry no loss."""


@dataclass(frozen=True)
class Example:
    """One thing to learn: what is given, and what is to be said."""

    prompt: str
    completion: str


def load_text(source: str) -> list[str]:
    """Documents of plain text.

    Args:
        source: A ``.txt`` file (documents are split at blank lines), a ``.jsonl`` or ``.json``
            file with ``text``, a folder of those, ``demo:NAME``, or a hub data set id.

    Raises:
        LoramError: Nothing there, or a record without text (with its line number).
    """
    path = Path(source).expanduser()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    texts: list[str] = []
    if path.exists():
        for file in files:
            if file.suffix == ".txt":
                texts += [part for part in _read(file).split("\n\n") if part.strip()]
            elif _is_json(file):
                texts += [_field(record, "text", where) for where, record in _json_records(file)]
    else:
        texts = [_field(record, "text", where) for where, record in _remote_records(source)]
    if not any(text.strip() for text in texts):
        raise LoramError(
            f"{source}: no text", "give .txt files, or .jsonl files with a 'text' field"
        )
    return texts


def load_instructions(source: str, tokenizer: Any, reporter: Reporter) -> list[Example]:
    """Instruction examples.

    Args:
        source: A ``.jsonl`` (may be gzipped) or ``.json`` file, ``demo:NAME``, or a data set id.
        tokenizer: Its chat template renders ``messages``.
        reporter: Warned where there is no template.

    Raises:
        LoramError: Nothing there, or a record in no known layout (with its line number).
    """
    path = Path(source).expanduser()
    records = _json_records(path) if path.exists() else _remote_records(source)
    render = _ChatRenderer(tokenizer, reporter)
    examples = [e for where, record in records for e in render_record(record, where, render)]
    if not examples:
        raise LoramError(f"{source}: no examples", f"records with {_LAYOUTS} are wanted")
    return examples


def render_record(
    record: Mapping[str, Any], where: str, render_chat: "_ChatRenderer | None" = None
) -> list[Example]:
    """Examples of one record; a chat gives one for each assistant turn.

    ``question``/``answer`` is rendered as lm-evaluation-harness asks its GSM8K questions, and
    ``instruction``/``output`` as Alpaca does.

    Raises:
        LoramError: The record is in no known layout, or a field is not text.
    """
    if "messages" in record and render_chat is not None:
        return render_chat.examples(record["messages"], where)
    if "prompt" in record and "completion" in record:
        prompt = _field(record, "prompt", where)
        example = Example(prompt, _field(record, "completion", where))
    elif "question" in record and "answer" in record:
        question, answer = _field(record, "question", where), _field(record, "answer", where)
        example = Example(f"Question: {question}\nAnswer:", f" {answer}")
    elif "instruction" in record and "output" in record:
        instruction, given = _field(record, "instruction", where), record.get("input") or ""
        extra = f"### Input:\n{given}\n\n" if given else ""
        prompt = _ALPACA.format(instruction=instruction, extra=extra)
        example = Example(prompt, _field(record, "output", where))
    else:
        fields = ", ".join(map(str, record)) or "none"
        raise LoramError(f"{where}: fields {fields}; {_LAYOUTS} are wanted")
    if not example.completion.strip():
        raise LoramError(f"{where}: the answer is empty")
    return [example]


def encode_examples(
    examples: Iterable[Example],
    tokenizer: Any,
    max_length: int,
    *,
    answer_only: bool,
    reporter: Reporter,
) -> list[TokenRow]:
    """Token rows with the end-of-sequence token appended.

    Args:
        examples: What to encode.
        tokenizer: A Hugging Face tokenizer.
        max_length: Tokens at most; longer rows are cut at their end.
        answer_only: Whether the prompt's labels are masked.
        reporter: Told how many rows were cut or dropped.

    Raises:
        LoramError: No example has an answer token left.
    """
    rows: list[TokenRow] = []
    cut = dropped = 0
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for example in examples:
        prompt_ids = tokenizer(example.prompt)["input_ids"]
        # Some tokenizers end every text with eos; between prompt and answer that would be wrong.
        if eos and len(prompt_ids) > 1 and prompt_ids[-1:] == eos:
            prompt_ids = prompt_ids[:-1]
        answer_ids = tokenizer(example.completion, add_special_tokens=False)["input_ids"] + eos
        ids = (prompt_ids + answer_ids)[:max_length]
        cut += len(prompt_ids) + len(answer_ids) > max_length
        if len(ids) <= len(prompt_ids):
            dropped += 1
            continue
        masked = len(prompt_ids) if answer_only else 0
        rows.append({"input_ids": ids, "labels": [IGNORED_LABEL] * masked + ids[masked:]})
    if not rows:
        raise LoramError(
            f"no example has an answer within {max_length} tokens", "raise --max-length"
        )
    if cut:
        reporter.warn(
            f"{cut} examples were longer than {max_length} tokens: {dropped} dropped, rest cut"
        )
    return rows


def pack_blocks(texts: Iterable[str], tokenizer: Any, block_length: int) -> list[TokenRow]:
    """Documents joined by the end-of-sequence token and cut into equal blocks.

    Raises:
        LoramError: There is less text than one block.
    """
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer(text)["input_ids"])
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
    starts = range(0, len(ids) - block_length + 1, block_length)
    if not starts:
        raise LoramError(f"the text has {len(ids)} tokens, less than one block of {block_length}")
    blocks = [ids[start : start + block_length] for start in starts]
    return [{"input_ids": block, "labels": list(block)} for block in blocks]


class _ChatRenderer:
    """Renders messages by the tokenizer's template, or plainly where it has none."""

    def __init__(self, tokenizer: Any, reporter: Reporter) -> None:
        self._tokenizer = tokenizer
        self._reporter = reporter
        self._warned = False

    def examples(self, messages: Any, where: str) -> list[Example]:
        if not isinstance(messages, list) or not all(
            isinstance(m, dict)
            and isinstance(m.get("content"), str)
            and isinstance(m.get("role"), str)
            for m in messages
        ):
            raise LoramError(f"{where}: 'messages' must be a list of role and content")
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > 0]
        if not turns:
            raise LoramError(f"{where}: 'messages' has no assistant turn to learn")
        return [Example(self._prompt(messages[:i]), messages[i]["content"]) for i in turns]

    def _prompt(self, messages: list[dict[str, str]]) -> str:
        if self._tokenizer.chat_template:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        if not self._warned:
            self._reporter.warn("the tokenizer has no chat template: turns are written 'User: ...'")
            self._warned = True
        lines = [f"{m['role'].capitalize()}: {m['content']}" for m in messages]
        return "\n".join([*lines, "Assistant: "])


def _is_json(file: Path) -> bool:
    return file.name.removesuffix(".gz").endswith((".jsonl", ".json"))


def _read(file: Path) -> str:
    opener = gzip.open if file.suffix == ".gz" else Path.open
    try:
        with opener(file, "rb") as stream:
            data = stream.read()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise LoramError(f"{file}, line {line}: not UTF-8 text") from error
    except OSError as error:
        raise LoramError(f"{file}: cannot be read ({error.strerror or error})") from error


def _json_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not file.is_file() or not _is_json(file):
        raise LoramError(f"{file}: not a .jsonl or .json file")
    text = _read(file)
    if file.name.removesuffix(".gz").endswith(".json"):
        try:
            records = json.loads(text)
        except ValueError as error:
            raise LoramError(f"{file}: not valid JSON ({error})") from error
        if not isinstance(records, list):
            raise LoramError(f"{file}: a list of records is wanted")
        numbered = [(f"{file}, record {i}", record) for i, record in enumerate(records, 1)]
    else:
        numbered = []
        for i, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    numbered.append((f"{file}, line {i}", json.loads(line)))
                except ValueError as error:
                    raise LoramError(f"{file}, line {i}: not valid JSON ({error})") from error
    for where, record in numbered:
        if not isinstance(record, dict):
            raise LoramError(f"{where}: a JSON object is wanted")
        yield where, record


def _remote_records(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if source.startswith(DEMO_PREFIX):
        from loram_cli.demo.problems import load_demo

        try:
            records = load_demo(source.removeprefix(DEMO_PREFIX))
        except ValueError as error:
            raise LoramError(str(error)) from error
    else:
        records = _hub_records(source)
    for i, record in enumerate(records, 1):
        yield f"{source}, record {i}", record


def _hub_records(source: str) -> Iterable[dict[str, Any]]:
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise LoramError(f"{source}: no such file or folder")
    import datasets

    try:
        return datasets.load_dataset(source, split="train")
    except Exception as error:
        # Each way to fail has its own class in the hub library; the answer is the same.
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else repr(error)
        raise LoramError(
            f"{source}: not a local file, and the hub did not give it ({reason})",
            "check the id and the network, or pass a local .jsonl file",
        ) from error


def _field(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise LoramError(f"{where}: field '{name}' must be text, not {type(value).__name__}")
    return value
