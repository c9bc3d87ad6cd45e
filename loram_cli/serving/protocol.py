"""OpenAI's completion protocols as typed requests and responses; no sockets, no models here.

Source: the API reference of ``/v1/chat/completions`` and ``/v1/completions``, as the ``openai``
client sends and reads them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loram_cli.evaluation.decode import Decoded
from loram_cli.training.data.conversations import Message

MOST_CHOICES = 8
_MOST_STOPS = 4
_MOST_MESSAGES = 1000
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# What would change the answer and is not done, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "logprobs": (False, 0), "top_logprobs": (0,),
    "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,), "suffix": ("",),
    "echo": (False,), "best_of": (1,), "audio": (), "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}  # fmt: skip


class ApiError(Exception):
    """The error sent to a client, in OpenAI's shape.

    Attributes:
        status: Of HTTP.
        message: For people.
        kind: Such as ``invalid_request_error``.
        param: The parameter that is at fault.
        code: Such as ``model_not_found``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code = param, code

    def to_mapping(self) -> dict[str, Any]:
        """The body of the response."""
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}


@dataclass(frozen=True)
class Ask:
    """A request for answers.

    Attributes:
        model: The row's name.
        messages: The conversation; None for a plain completion.
        prompts: Texts to go on with; none for a conversation.
        choices: Answers to each.
        max_new_tokens: Tokens at most; None for the server's own setting.
        temperature: The same.
        top_p: The same.
        stops: Texts that end an answer; None for the server's own.
        seed: Of drawn tokens; None for the server's own.
        stream: Whether pieces are sent as they come.
        usage: Whether the last piece of a stream tells the numbers of tokens.
    """

    model: str
    messages: tuple[Message, ...] | None
    prompts: tuple[str, ...]
    choices: int = 1
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stops: tuple[str, ...] | None = None
    seed: int | None = None
    stream: bool = False
    usage: bool = False


def parse_chat(body: Any) -> Ask:
    """A body of ``/v1/chat/completions``.

    Raises:
        ApiError: It is not one, or asks for what is not supported.
    """
    data = _mapping(body)
    messages = data.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= _MOST_MESSAGES:
        raise _bad("messages", f"expected a list of 1 to {_MOST_MESSAGES} messages")
    turns = tuple(_message(message, i) for i, message in enumerate(messages))
    return _ask(data, turns, (), ("max_completion_tokens", "max_tokens"))


def parse_completion(body: Any) -> Ask:
    """A body of ``/v1/completions``.

    Raises:
        ApiError: It is not one, or asks for what is not supported.
    """
    data = _mapping(body)
    prompt = data.get("prompt")
    prompts = (prompt,) if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts:
        raise _bad("prompt", "expected a text or a list of texts")
    if not all(isinstance(text, str) for text in prompts):
        raise _bad("prompt", "expected texts; token ids are not supported")
    return _ask(data, None, tuple(_utf8(text, "prompt") for text in prompts), ("max_tokens",))


def _ask(
    data: Mapping[str, Any],
    messages: tuple[Message, ...] | None,
    prompts: tuple[str, ...],
    limits: Sequence[str],
) -> Ask:
    for name, nothing in _UNSUPPORTED.items():
        if data.get(name) is not None and data[name] not in nothing:
            raise _bad(name, "is not supported here", code="unsupported_parameter")
    model = data.get("model")
    if not isinstance(model, str) or not model:
        raise _bad("model", "expected the name of a model; GET /v1/models lists them")
    limit = next((name for name in limits if data.get(name) is not None), limits[0])
    choices = int(_number(data, "n", 1, MOST_CHOICES, whole=True) or 1)
    if choices * max(1, len(prompts)) > MOST_CHOICES:
        raise _bad("prompt", f"expected {MOST_CHOICES} answers at most in one request")
    options = data.get("stream_options")
    if options is not None and not isinstance(options, Mapping):
        raise _bad("stream_options", "expected a mapping")
    tokens, seed = _number(data, limit, 1, whole=True), _number(data, "seed", whole=True)
    return Ask(
        model=model,
        messages=messages,
        prompts=prompts,
        choices=choices,
        max_new_tokens=None if tokens is None else int(tokens),
        temperature=_number(data, "temperature", 0, 2),
        top_p=_number(data, "top_p", 0, 1, above=True),
        stops=_stops(data.get("stop")),
        seed=None if seed is None else int(seed),
        stream=_flag(data, "stream"),
        usage=bool(options) and _flag(options or {}, "include_usage"),
    )


def _message(value: Any, place: int) -> Message:
    where = f"messages[{place}]"
    if not isinstance(value, Mapping):
        raise _bad(where, "expected a mapping with role and content")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _bad(f"{where}.role", f"expected one of {', '.join(_ROLES)}")
    content = value.get("content")
    if isinstance(content, list):
        parts = [part["text"] for part in content if _is_text(part)]
        content = "".join(parts) if len(parts) == len(content) else None
    if not isinstance(content, str):
        raise _bad(f"{where}.content", "expected a text; pictures and sound are not supported")
    return {"role": _ROLES[role], "content": _utf8(content, f"{where}.content")}


def _is_text(part: Any) -> bool:
    is_text = isinstance(part, Mapping) and part.get("type") == "text"
    return is_text and isinstance(part.get("text"), str)


def _stops(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise _bad("stop", "expected a text or a list of texts")
    if len(stops) > _MOST_STOPS:
        raise _bad("stop", f"expected {_MOST_STOPS} texts at most")
    return tuple(stops)


def _number(
    data: Mapping[str, Any],
    name: str,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    whole: bool = False,
    above: bool = False,
) -> float | None:
    value = data.get(name)
    if value is None:
        return None
    kind: Any = int if whole else int | float
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _bad(name, f"expected a {'whole ' if whole else ''}number")
    if not least <= value <= most or (above and value == least) or abs(value) >= 2**63:
        raise _bad(name, f"{value} is out of range")
    return value


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name)
    if value is not None and not isinstance(value, bool):
        raise _bad(name, "expected true or false")
    return bool(value)


def _mapping(body: Any) -> Mapping[str, Any]:
    if not isinstance(body, Mapping):
        raise ApiError(400, "the body is no JSON object")
    return body


def _utf8(text: str, param: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _bad(param, "half a character: a lone surrogate") from error
    return text


def _bad(param: str, said: str, *, code: str | None = None) -> ApiError:
    return ApiError(400, f"{param}: {said}", param=param, code=code)


@dataclass(frozen=True)
class Reply:
    """What all parts of one response share.

    Attributes:
        identity: Of the response.
        created: Seconds since 1970.
        model: The row's name.
        chat: Whether it answers a conversation.
    """

    identity: str
    created: int
    model: str
    chat: bool

    def whole(self, texts: Sequence[str], done: Sequence[Decoded], prompt_tokens: int) -> Any:
        """The body of a response that is not streamed."""
        choices = [
            {"index": i, **self._content(text), "logprobs": None, "finish_reason": finish(decoded)}
            for i, (text, decoded) in enumerate(zip(texts, done, strict=True))
        ]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage(done, prompt_tokens)}

    def piece(self, place: int, text: str, finish_reason: str | None = None) -> Any:
        """One event of a stream: the next part of one choice, or its end."""
        content: dict[str, Any] = {"text": text}
        if self.chat:
            content = {"delta": {"content": text} if text else {}}
        choice = {"index": place, **content, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head(self._piece_kind), "choices": [choice]}

    def begin(self, place: int) -> Any:
        """The event that opens a choice of a conversation."""
        choice = {
            "index": place, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
            "finish_reason": None,
        }  # fmt: skip
        return {**self._head(self._piece_kind), "choices": [choice]}

    def counted(self, done: Sequence[Decoded], prompt_tokens: int) -> Any:
        """The event that tells the numbers of tokens."""
        return {
            **self._head(self._piece_kind), "choices": [], "usage": usage(done, prompt_tokens)
        }  # fmt: skip

    @property
    def _piece_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.identity, "object": kind, "created": self.created, "model": self.model
        }  # fmt: skip

    def _content(self, text: str) -> dict[str, Any]:
        if not self.chat:
            return {"text": text}
        return {"message": {"role": "assistant", "content": text, "refusal": None}}


def finish(decoded: Decoded) -> str:
    """Why an answer ended."""
    return "length" if decoded.cut else "stop"


def usage(done: Sequence[Decoded], prompt_tokens: int) -> dict[str, int]:
    """Numbers of tokens."""
    written = sum(decoded.tokens for decoded in done)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }


def model_list(names: Sequence[str], created: int) -> Any:
    """The body of ``/v1/models``."""
    return {"object": "list", "data": [model_entry(name, created) for name in names]}


def model_entry(name: str, created: int) -> Any:
    """The body of ``/v1/models/NAME``."""
    return {"id": name, "object": "model", "created": created, "owned_by": "loram"}
