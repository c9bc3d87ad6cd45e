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
SYSTEM_KEYS = ("system", "system_prompt")
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
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "developer": "system",
}
_CALL_ROLES = ("function_call", "tool_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
# OpenAI's and ShareGPT's, axolotl's names for whether a turn is learnt.
_SWITCHES = ("weight", "train", "training", "train_on_turn")
_OFF = (0, False, "0", "0.0", "false", "False")


@dataclass(frozen=True)
class Conversation:
    """One conversation.

    Attributes:
        messages: With ``role``, ``content`` as text, and what else a template may use.
        learnt: Which messages are learnt, by index, in order; never empty.
        tools: JSON schemas of functions that the assistant may call; None for none.
        where: File and line.
    """

    messages: list[Message]
    learnt: tuple[int, ...]
    tools: list[Message] | None
    where: str


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
    turns = [turn for each in turns for turn in _pair(each)]
    for number, turn in enumerate(turns, 1):
        message, teaches = _message(fields, turn, f"{fields.where}, message {number}", key)
        if teaches and number > given:
            learnt.append(len(messages))
        messages.append(message)
    if not learnt:
        if any(message["role"] == "assistant" for message in messages[given:]):
            raise UnusableRecord(fields.where, f"'{key}' has only turns that are not to be learnt")
        raise UnusableRecord(fields.where, f"'{key}' has no message of the assistant to learn from")
    if train_on == "last":
        learnt = learnt[-1:]
    messages = messages[: learnt[-1] + 1]
    system = fields.first_of(SYSTEM_KEYS)
    if system is not None and messages[0]["role"] != "system":
        content = fields.text(system)
        if content.strip():
            messages.insert(0, {"role": "system", "content": content})
            learnt = [i + 1 for i in learnt]
    return Conversation(messages, tuple(learnt), _tools(fields), fields.where)


def _pair(turn: Any) -> Sequence[Any]:
    """The two turns of ``{"human": .., "assistant": ..}``; any other turn is one."""
    for user in ("human", "user"):
        for assistant in ("assistant", "gpt", "bot"):
            if isinstance(turn, Mapping) and set(turn) == {user, assistant}:
                asked, answered = turn[user], turn[assistant]
                return (
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": answered},
                )
    return (turn,)


def _message(fields: Fields, turn: Any, where: str, key: str) -> tuple[Message, bool]:
    """One message, and whether it is to be learnt."""
    given = without_nulls(turn) if isinstance(turn, Mapping) else {}
    role = _first(given, "role", "from")
    content = _first(given, "content", "value", "text")
    calls = _calls(given, role, content)
    if not isinstance(role, str) or (content is None and not calls):
        raise UnusableRecord(where, f"a message of '{key}' needs 'role' and 'content'")
    message: Message = {
        k: v for k, v in given.items() if k not in ("from", "value", "text", *_SWITCHES)
    }
    if role in _CALL_ROLES:
        role = "assistant"
        content = None if calls else content
    message["role"] = _ROLES.get(role, role)
    message["content"] = _content(fields, content, where)
    if calls:
        message.pop("function_call", None)
        message["tool_calls"] = calls
    says = bool(message["content"].strip() or calls)
    switched_off = any(given.get(switch) in _OFF for switch in _SWITCHES if switch in given)
    if message["role"] != "assistant":
        for switch in _SWITCHES:
            if switch in given and not switched_off:
                fields.tally.leave_unused(f"'{switch}' of a {message['role']} message", where)
        return message, False
    if given.get("weight") not in (None, 1, *_OFF):
        fields.tally.change("a message's 'weight' other than 0 counts as 1", where)
    return message, says and not switched_off


def _first(given: Mapping[str, Any], *keys: str) -> Any:
    return next((given[key] for key in keys if key in given), None)


def _content(fields: Fields, content: Any, where: str) -> str:
    """Text of a message; the text parts of a list are joined as they are.

    Raises:
        LoramError: A part is no text.
    """
    if content is None:
        return ""
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        return as_text(content, "a message's content", where, fields.tally)
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise LoramError(
                f"{where}: a part of type '{kind!s:.40}' in its content",
                "only text can be learnt; leave such records out",
            )
        texts.append(text)
    return "".join(texts)


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
