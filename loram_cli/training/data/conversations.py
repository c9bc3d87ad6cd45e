"""Conversations as messages: ShareGPT's and OpenAI's forms as the one that templates take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loram_cli.errors import LoramError
from loram_cli.training.data.fields import Fields, as_text, without_nulls
from loram_cli.training.data.json_text import decoded
from loram_cli.training.data.tally import UnusableRecord

TrainOn = Literal["last", "all"]
Message = dict[str, Any]
CONVERSATION_KEYS = ("messages", "conversations", "conversation")
# Gemini's, Llama's, raw ShareGPT's and UltraChat's names, which others use for other things.
_FURTHER_KEYS = ("contents", "dialog", "dialogue", "items", "chat", "data")
# The last is Gemini's, as a record's fields are named here: in small letters.
SYSTEM_KEYS = ("system", "system_prompt", "systeminstruction")
_TOOL_KEYS = ("tools", "functions")
# Names in the wild, of ShareGPT's and OASST's dumps among them, as templates know them.
_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "developer": "system",
}
_CALL_ROLES = ("function_call", "tool_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
# OpenAI's and ShareGPT's, axolotl's and LLaMA-Factory's names for whether a turn is learnt.
_SWITCHES = ("weight", "train", "training", "train_on_turn", "loss_weight")
_OFF = (0, False, "0", "0.0", "false", "False")
# Axolotl's list of what is learnt of a message; its ends are of the last character.
_DETAIL = "train_detail"
_ASKED = ("human", "user", "input", "instruction", "question", "prompt", "query")
_ANSWERED = ("assistant", "gpt", "bot", "output", "response", "answer", "completion")
Span = tuple[int, int]


@dataclass(frozen=True)
class Conversation:
    """One conversation.

    Attributes:
        messages: With ``role``, ``content`` as text, and what else a template may use.
        learnt: Which messages are learnt, by index, in order; never empty.
        tools: JSON schemas of functions that the assistant may call; None for none.
        where: File and line.
        withheld: For each message that is learnt, ranges of characters of its content that are
            not, in order; empty where all are learnt whole.
    """

    messages: list[Message]
    learnt: tuple[int, ...]
    tools: list[Message] | None
    where: str
    withheld: tuple[tuple[Span, ...], ...] = ()


def conversation_key(fields: Mapping[str, Any]) -> str | None:
    """The field that holds a conversation by its name; None where there is none."""
    return next((key for key in CONVERSATION_KEYS if key in fields), None)


def further_conversation_key(fields: Mapping[str, Any]) -> str | None:
    """A field of another name that holds messages, or texts that alternate; None for none."""
    for key in _FURTHER_KEYS:
        turns = decoded(fields.get(key))
        texts = isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
        if turns and (are_turns(turns) or (texts and len(turns) > 1)):
            return key
    return None


def are_turns(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and {"role", "from"} & set(turn) for turn in value)
    )


def read_conversation(
    fields: Fields, turns: Sequence[Any], key: str, *, given: int = 0, train_on: TrainOn = "all"
) -> Conversation:
    """The messages of a record, and which of them are learnt.

    A turn of the assistant is learnt unless its ``weight`` is 0 or its ``train`` is false, or it
    is empty. What follows the last one that is learnt is left off.

    Raises:
        UnusableRecord: A message lacks role or content, or no turn is to be learnt.
        LoramError: A message has parts other than text.
    """
    if not isinstance(turns, list | tuple) or not turns:
        raise UnusableRecord(fields.where, f"field '{key}' must be a list of messages")
    messages: list[Message] = []
    learnt: list[int] = []
    off: dict[int, tuple[Span, ...]] = {}
    for number, turn in enumerate(_as_messages(turns), 1):
        message, teaches, ranges = _message(fields, turn, f"{fields.where}, message {number}", key)
        if teaches and number > given:
            off[len(messages)] = ranges
            learnt.append(len(messages))
        messages.append(message)
    if not learnt:
        if any(message["role"] == "assistant" for message in messages[given:]):
            raise UnusableRecord(fields.where, f"'{key}' has only turns that are not to be learnt")
        raise UnusableRecord(fields.where, f"'{key}' has no message of the assistant to learn from")
    if train_on == "last":
        learnt = learnt[-1:]
    messages = messages[: learnt[-1] + 1]
    withheld = tuple(off[i] for i in learnt) if any(off[i] for i in learnt) else ()
    system = fields.first_of(SYSTEM_KEYS)
    if system is not None and messages[0]["role"] != "system":
        value = fields.value(system)
        content, _ = _content(fields, value, f"{fields.where}, field '{system}'")
        if content.strip():
            messages.insert(0, {"role": "system", "content": content})
            learnt = [i + 1 for i in learnt]
    return Conversation(messages, tuple(learnt), _tools(fields), fields.where, withheld)


def _as_messages(turns: Sequence[Any]) -> list[Any]:
    """One entry for each message: texts alternate, and a pair is two."""
    if all(isinstance(turn, str) for turn in turns):
        # LIMA's and UltraChat's: the user begins.
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return [message for turn in turns for message in _pair(turn)]


def _pair(turn: Any) -> Sequence[Any]:
    """The two turns of ``{"human": .., "assistant": ..}`` or of a list; any other turn is one."""
    if isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
        asked, answered = turn
    elif isinstance(turn, Mapping) and len(turn) == 2:
        user, assistant = _first(turn, *_ASKED), _first(turn, *_ANSWERED)
        if user is None or assistant is None:
            return (turn,)
        asked, answered = user, assistant
    else:
        return (turn,)
    return ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})


def _message(
    fields: Fields, turn: Any, where: str, key: str
) -> tuple[Message, bool, tuple[Span, ...]]:
    """One message, whether it is to be learnt, and which ranges of its content are not."""
    given = without_nulls(turn) if isinstance(turn, Mapping) else {}
    role = _first(given, "role", "from")
    role = role.strip().lower() if isinstance(role, str) else role
    content = _first(given, "content", "value", "text", "parts")
    calls = _calls(given, role, content)
    if not isinstance(role, str) or (content is None and not calls):
        raise UnusableRecord(where, f"a message of '{key}' needs 'role' and 'content'")
    message: Message = {
        k: v
        for k, v in given.items()
        if k not in ("from", "value", "text", "parts", _DETAIL, *_SWITCHES)
    }
    if role in _CALL_ROLES:
        role = "assistant"
        content = None if calls else content
    message["role"] = _ROLES.get(role, role)
    message["content"], ranges = _content(fields, content, where)
    if _DETAIL in given:
        ranges = _withheld_by_detail(given[_DETAIL], len(message["content"]), where)
    if calls:
        message.pop("function_call", None)
        message["tool_calls"] = calls
    kept = _without(message["content"], ranges)
    says = bool(kept.strip() or calls)
    switched_off = any(given.get(switch) in _OFF for switch in _SWITCHES if switch in given)
    if message["role"] != "assistant":
        for switch in _SWITCHES:
            if switch in given and not switched_off:
                fields.tally.leave_unused(f"'{switch}' of a {message['role']} message", where)
        return message, False, ()
    for name in ("weight", "loss_weight"):
        if given.get(name) not in (None, 1, *_OFF):
            fields.tally.change(f"a message's '{name}' other than 0 counts as 1", where)
    return message, says and not switched_off, ranges


def _first(given: Mapping[str, Any], *keys: str) -> Any:
    return next((given[key] for key in keys if key in given), None)


def _content(fields: Fields, content: Any, where: str) -> tuple[str, tuple[Span, ...]]:
    """Text of a message, and which ranges of it are switched off.

    The text parts of a list are joined as they are; each may have a switch of its own (axolotl).

    Raises:
        LoramError: A part is no text.
    """
    if content is None:
        return "", ()
    if isinstance(content, Mapping):
        content = content.get("parts", [content])
    if not isinstance(content, list):
        return as_text(content, "a message's content", where, fields.tally), ()
    text = ""
    ranges: list[Span] = []
    for part in content:
        named = part if isinstance(part, Mapping) else {}
        kind = named.get("type", "text")
        said = _first(named, "text", "value", "content") if named else part
        if kind not in _TEXT_PARTS or not isinstance(said, str):
            raise LoramError(
                f"{where}: a part of type '{kind!s:.40}' in its content",
                "only text can be learnt; leave such records out",
            )
        if said and any(named[switch] in _OFF for switch in _SWITCHES if switch in named):
            ranges.append((len(text), len(text) + len(said)))
        text += said
    return text, tuple(ranges)


def _withheld_by_detail(detail: Any, length: int, where: str) -> tuple[Span, ...]:
    """What a ``train_detail`` leaves out of a content of so many characters.

    Raises:
        UnusableRecord: It is no list of ranges.
    """
    try:
        learnt = sorted(
            (max(0, int(part["begin_offset"])), min(length, int(part["end_offset"]) + 1))
            for part in decoded(detail)
            if part["train"] not in _OFF
        )
    except (TypeError, KeyError, ValueError):
        raise UnusableRecord(
            where, f"'{_DETAIL}' needs begin_offset, end_offset and train in each of its ranges"
        ) from None
    ranges: list[Span] = []
    begin = 0
    for start, end in learnt:
        if start > begin:
            ranges.append((begin, start))
        begin = max(begin, end)
    return (*ranges, (begin, length)) if begin < length else tuple(ranges)


def _without(text: str, ranges: Sequence[Span]) -> str:
    """A text without some ranges of it."""
    for begin, end in reversed(ranges):
        text = text[:begin] + text[end:]
    return text


def _calls(given: Mapping[str, Any], role: Any, content: Any) -> list[Message]:
    """The functions that a message calls, their arguments as objects."""
    calls = given.get("tool_calls") or (
        [given["function_call"]] if "function_call" in given else []
    )
    if role in _CALL_ROLES and not calls and isinstance(content, str):
        calls = decoded(content)
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, Mapping):
            return []
        function = call.get("function", call)
        if not isinstance(function, Mapping) or "name" not in function:
            return []
        # Templates write arguments as JSON; text would be quoted twice.
        arguments = decoded(function.get("arguments", {}))
        named = {"name": function["name"], "arguments": arguments}
        rest = {k: v for k, v in call.items() if k == "id"}
        found.append({"type": "function", **rest, "function": named})
    return found


def _tools(fields: Fields) -> list[Message] | None:
    key = fields.first_of(_TOOL_KEYS)
    if key is None:
        return None
    tools = without_nulls(decoded(fields.value(key)))
    if tools in ("", [], {}):
        return None
    tools = tools if isinstance(tools, list) else [tools]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise UnusableRecord(fields.where, f"field '{key}' must be a list of JSON schemas")
    return [
        dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
        for tool in tools
    ]
