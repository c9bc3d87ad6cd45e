"""Conversations as text, and which parts of it are learnt."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loram_cli.reporting import Reporter
from loram_cli.training.data.conversations import Conversation, Message, Span
from loram_cli.training.data.examples import Example, example_of_spans
from loram_cli.training.data.tally import Tally, UnusableRecord
from loram_cli.training.data.templates import (
    TemplateRefusal,
    generation_spans,
    render,
    template_text,
)

_ROLE_NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
# Stands for a turn's content to find where a template puts it: no template trims or splits it.
_PROBE = "loramProbe7c1f"


class Chat:
    """Renders conversations, by the tokenizer's template where it has one.

    Args:
        tokenizer: May be None, or have no template: turns are then written ``User: ..``.

    Attributes:
        has_template: Whether the tokenizer has one.
        tally: What was changed, and what was not used.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self.has_template = getattr(tokenizer, "chat_template", None) is not None
        self.tally = Tally()
        self._used_fallback = False
        self._folds_system: bool | None = None

    def render(self, conversation: Conversation) -> list[Example]:
        """The conversation as one example that learns all its turns at once.

        A template that marks what the assistant writes says what is learnt. Of others, a turn is
        what a rendering with it has more than one that only opens it. Where a template writes
        earlier turns differently as a conversation grows, so that a turn cannot be found, the
        conversation gives one example for each of its turns.

        Raises:
            UnusableRecord: The template says that it does not take such a conversation.
            TemplateRefusal: The template fails on it.
        """
        try:
            return self._rendered(conversation)
        except TemplateRefusal as refusal:
            if not refusal.meant:
                raise
            # Of roles that do not alternate, for instance: the file's other records may do.
            reason = refusal.message.removeprefix(f"{conversation.where}: ")
            raise UnusableRecord(conversation.where, reason, refusal.hint) from refusal

    def _rendered(self, conversation: Conversation) -> list[Example]:
        if not self.has_template:
            self._used_fallback = True
            conversation = self._with_calls(conversation, "")
            self._tell_unused(conversation, "")
            return [self._plain(conversation)]
        template = template_text(self._tokenizer, conversation.tools)
        conversation = self._with_calls(conversation, template)
        self._tell_unused(conversation, template)
        conversation = self._with_system(conversation)
        text = self._applied(conversation)
        self._tell_hidden(conversation, text)
        spans = self._marked(conversation, text) or self._found(conversation, text)
        if spans is not None:
            kept = _kept(conversation, text, spans)
            return [example_of_spans(text, kept, special_tokens=False)]
        self.tally.change(
            "the chat template writes earlier turns differently later: one row for each turn",
            conversation.where,
        )
        return [self._turn(conversation, place) for place in range(len(conversation.learnt))]

    def opened(self, messages: Sequence[Message]) -> Example:
        """Messages that end with the user's, and the turn of the assistant begun by the template.

        Raises:
            TemplateRefusal: The template does not take the conversation.
        """
        prompt = render(self._tokenizer, messages, "the prompt", begun=True)
        return Example(prompt, "", special_tokens=False)

    def asked(self, messages: Sequence[Message], *, begun: bool = True) -> str:
        """A conversation that waits for the assistant, as the template writes it.

        Args:
            messages: Any number of turns; a system message that the template does not take is put
                before the first one of the user.
            begun: The assistant's turn is opened; else the last message is the beginning of it,
                and nothing is written behind its words.

        Raises:
            TemplateRefusal: The template does not take the conversation.
        """
        where = "a question of the task"
        whole = Conversation(list(messages), (), None, where)
        try:
            text = render(self._tokenizer, whole.messages, where, begun=begun)
        except TemplateRefusal:
            if whole.messages[0]["role"] != "system":
                raise
            whole = _fold(whole)
            text = render(self._tokenizer, whole.messages, where, begun=begun)
        if begun:
            return text
        words = whole.messages[-1]["content"]
        return text[: text.rindex(words) + len(words)] if words in text else text

    def warn_of_fallback(self, reporter: Reporter) -> None:
        """Tell of conversations that were rendered without a template."""
        if self._used_fallback:
            reporter.warn(
                "the tokenizer has no chat template: "
                "messages are rendered as 'User: .. Assistant: ..'"
            )

    def turn_end(self) -> str:
        """The end-of-sequence token as text, which ends turns where no template does."""
        return getattr(self._tokenizer, "eos_token", None) or ""

    def _applied(self, conversation: Conversation, count: int | None = None) -> str:
        messages = conversation.messages[:count]
        return render(self._tokenizer, messages, conversation.where, tools=conversation.tools)

    def _begun(self, conversation: Conversation, count: int) -> str:
        return render(
            self._tokenizer,
            conversation.messages[:count],
            conversation.where,
            tools=conversation.tools,
            begun=True,
        )

    def _turn(self, conversation: Conversation, place: int) -> Example:
        """One of the turns that are learnt, behind all that stands before it."""
        i = conversation.learnt[place]
        prompt = self._begun(conversation, i)
        whole = self._applied(conversation, i + 1)
        # Some templates write a turn that is asked for differently from one that is there.
        shared = shared_length(prompt, whole)
        only = replace(conversation, learnt=(i,), withheld=conversation.withheld[place : place + 1])
        kept = _kept(only, whole, [(shared, len(whole))])
        return example_of_spans(whole, kept, special_tokens=False)

    def _marked(self, conversation: Conversation, text: str) -> list[Span] | None:
        """Spans between the template's own marks; None where it has none for each turn."""
        marked = generation_spans(
            self._tokenizer, conversation.messages, conversation.where, conversation.tools
        )
        if marked is None or marked[0] != text:
            return None
        turns = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        if len(turns) != len(marked[1]):
            return None
        spans = [s for i, s in zip(turns, marked[1], strict=True) if i in conversation.learnt]
        return spans if all(begin < end for begin, end in spans) else None

    def _found(self, conversation: Conversation, text: str) -> list[Span] | None:
        """Spans of the turns to learn, by comparing renderings; None where one is not found."""
        spans: list[Span] = []
        last = len(conversation.messages) - 1
        for i in conversation.learnt:
            end = len(text)
            if i < last:
                upto = self._applied(conversation, i + 1)
                end = len(upto) if text.startswith(upto) else -1
            span = (self._start(conversation, i, text), end)
            if min(span) < 0:
                found = self._probed(conversation, i, text)
                if found is None:
                    return None
                span = found
            if span[0] < (spans[-1][1] if spans else 0) or span[0] >= span[1]:
                return None
            spans.append(span)
        return spans

    def _start(self, conversation: Conversation, i: int, text: str) -> int:
        """Where turn ``i`` begins behind the words that open it; -1 where that is not known."""
        try:
            begun = self._begun(conversation, i)
            shared = shared_length(begun, text)
            if shared == len(begun) or text.startswith(self._applied(conversation, i)):
                return shared
        except TemplateRefusal:
            # It takes whole conversations only.
            return -1
        # The only turn to learn is whatever stands behind the words that both share.
        only = conversation.learnt == (len(conversation.messages) - 1,)
        return shared if only else -1

    def _probed(self, conversation: Conversation, i: int, text: str) -> Span | None:
        """Where the content of turn ``i`` stands, with what the template writes to end a turn."""
        probed = list(conversation.messages)
        probed[i] = {**probed[i], "content": _PROBE}
        probing = replace(conversation, messages=probed)
        try:
            before, _, after = self._applied(probing).partition(_PROBE)
            _, _, tail = self._applied(probing, i + 1).partition(_PROBE)
        except TemplateRefusal:
            return None
        fits = len(before) + len(after) < len(text) and _PROBE not in after
        if not (after and fits and text.startswith(before) and text.endswith(after)):
            return None
        end = len(text) - len(after)
        return len(before), end + shared_length(tail, after)

    def _with_system(self, conversation: Conversation) -> Conversation:
        """Without a system message where the template refuses or ignores one."""
        if conversation.messages[0]["role"] != "system":
            return conversation
        folded = _fold(conversation)
        if self._folds_system is None:
            self._folds_system = self._refuses_system(conversation, folded)
        if not self._folds_system:
            return conversation
        self.tally.change(
            "the chat template takes no system message: put before the first user message",
            conversation.where,
        )
        return folded

    def _refuses_system(self, conversation: Conversation, folded: Conversation) -> bool:
        system = conversation.messages[0]["content"].strip()
        try:
            if system in self._applied(conversation):
                return False
        except TemplateRefusal as refusal:
            try:
                self._applied(folded)
            except TemplateRefusal:
                # It is something else that it refuses.
                raise refusal from None
            return True
        return system in self._applied(folded)

    def _with_calls(self, conversation: Conversation, template: str) -> Conversation:
        """With tool calls as text where the template has no name for them.

        A turn that only calls would else be learnt as one that says nothing.
        """
        if "tool_calls" in template:
            return conversation
        messages = [_calls_as_text(message) for message in conversation.messages]
        if messages == conversation.messages:
            return conversation
        self.tally.change(
            "the chat template takes no tool calls: written as <tool_call> and JSON",
            conversation.where,
        )
        return replace(conversation, messages=messages)

    def _tell_unused(self, conversation: Conversation, template: str) -> None:
        """Count what the template has no name for; names stand in its source."""
        if conversation.tools is not None and "tools" not in template:
            self.tally.leave_unused("'tools'", conversation.where)
        keys = {key for message in conversation.messages for key in message}
        for key in sorted(keys - {"role", "content"}):
            if key not in template:
                self.tally.leave_unused(f"'{key}' of a message", conversation.where)

    def _tell_hidden(self, conversation: Conversation, text: str) -> None:
        for message in conversation.messages:
            if message["role"] != "assistant" and message["content"].strip() not in text:
                self.tally.change(
                    f"the chat template changes or leaves out a message of role "
                    f"'{message['role']}'",
                    conversation.where,
                )

    def _plain(self, conversation: Conversation) -> Example:
        text = ""
        spans: list[Span] = []
        last = len(conversation.messages) - 1
        for i, message in enumerate(conversation.messages):
            text += f"{_ROLE_NAMES.get(message['role'], message['role'])}:"
            begin = len(text)
            text += f" {message['content']}"
            if i < last and message["role"] == "assistant":
                text += self.turn_end()
            if i in conversation.learnt:
                spans.append((begin, len(text)))
            if i < last:
                text += "\n"
        kept = _kept(conversation, text, spans)
        return example_of_spans(text, kept, special_tokens=True)


def _kept(conversation: Conversation, text: str, spans: Sequence[Span]) -> tuple[Span, ...]:
    """The spans of the turns to learn, without the parts of their contents that are not.

    Raises:
        UnusableRecord: A content of which only a part is learnt is not in the text as it is.
    """
    if not conversation.withheld:
        return tuple(spans)
    kept: list[Span] = []
    for i, (begin, end), ranges in zip(
        conversation.learnt, spans, conversation.withheld, strict=True
    ):
        content = conversation.messages[i]["content"]
        # Many templates trim what they are given.
        offset = text.find(content.strip(), begin, end) - len(content) + len(content.lstrip())
        if ranges and content.strip() not in text[begin:end]:
            raise UnusableRecord(
                conversation.where,
                "the chat template changes a message of which only a part is to be learnt",
            )
        for start, stop in ranges:
            if offset + start > begin:
                kept.append((begin, offset + start))
            begin = max(begin, offset + stop)
        if begin < end:
            kept.append((begin, end))
    return tuple(kept)


def _calls_as_text(message: Message) -> Message:
    """A message's tool calls behind its words, as Hermes and Qwen write them."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    written = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in calls
    ]
    words = [message["content"]] if message["content"].strip() else []
    rest = {k: v for k, v in message.items() if k != "tool_calls"}
    return {**rest, "content": "\n".join([*words, *written])}


def _fold(conversation: Conversation) -> Conversation:
    """The system message put before the first message of the user."""
    system, *rest = conversation.messages
    place = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if place != 0:
        # The assistant speaks first: the system's words are the user's message.
        messages: list[Message] = [{"role": "user", "content": system["content"]}, *rest]
        return replace(conversation, messages=messages)
    content = f"{system['content']}\n\n{rest[0]['content']}"
    return replace(
        conversation,
        messages=[{**rest[0], "content": content}, *rest[1:]],
        learnt=tuple(i - 1 for i in conversation.learnt),
    )


def shared_length(left: str, right: str) -> int:
    """Length of the common beginning."""
    if left == right[: len(left)]:
        return len(left)
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))
