import pytest

from loram_cli.evaluation.decode import Decoded
from loram_cli.serving.protocol import ApiError, Reply, parse_chat, parse_completion

HELLO = [{"role": "user", "content": "hello"}]


def test_a_conversation_is_read_as_the_client_sends_it():
    ask = parse_chat(
        {
            "model": "base", "messages": [{"role": "developer", "content": "be brief"}, *HELLO],
            "max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": "x", "seed": 3,
            "stream": True, "stream_options": {"include_usage": True}, "n": 2, "user": "me",
            "tools": None, "response_format": {"type": "text"}, "logprobs": False,
        }
    )  # fmt: skip
    assert ask.messages == ({"role": "system", "content": "be brief"}, *HELLO)
    assert (ask.max_new_tokens, ask.temperature, ask.top_p, ask.seed) == (7, 0.5, 0.9, 3)
    assert (ask.stops, ask.stream, ask.usage, ask.choices) == (("x",), True, True, 2)


def test_parts_of_text_are_joined():
    content = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    ask = parse_chat({"model": "base", "messages": [{"role": "user", "content": content}]})
    assert ask.messages == tuple(HELLO)


def test_prompts_are_one_or_several():
    assert parse_completion({"model": "base", "prompt": "a"}).prompts == ("a",)
    assert parse_completion({"model": "base", "prompt": ["a", "b"]}).prompts == ("a", "b")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": [], "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"model": None}, "model"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": "7"}, "max_completion_tokens"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"tools": [{}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes, param):
    with pytest.raises(ApiError) as caught:
        parse_chat({"model": "base", "messages": HELLO, **changes})
    assert caught.value.status == 400
    told = caught.value.to_mapping()["error"]
    assert told["param"] == param
    assert told["type"] == "invalid_request_error"
    assert told["message"].startswith(f"{param}: ")


@pytest.mark.parametrize("prompt", [None, "", [], [1, 2], {"a": 1}, ["a"] * 9])
def test_a_prompt_that_cannot_be_is_refused(prompt):
    if prompt == "":
        assert parse_completion({"model": "base", "prompt": prompt}).prompts == ("",)
        return
    with pytest.raises(ApiError, match="prompt: expected"):
        parse_completion({"model": "base", "prompt": prompt})


def test_a_body_that_is_no_object_is_refused():
    for body in ([], "a", 1, None):
        with pytest.raises(ApiError, match="no JSON object"):
            parse_chat(body)


def test_responses_count_tokens_and_say_why_they_ended():
    done = [Decoded("a", 3, cut=False), Decoded("b", 5, cut=True)]
    body = Reply("id", 1, "base", chat=True).whole(["a", "b"], done, 10)
    assert body["object"] == "chat.completion"
    assert [c["finish_reason"] for c in body["choices"]] == ["stop", "length"]
    assert body["choices"][1]["message"] == {"role": "assistant", "content": "b", "refusal": None}
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 8, "total_tokens": 18}
    text = Reply("id", 1, "base", chat=False)
    assert text.whole(["a"], done[:1], 1)["choices"][0]["text"] == "a"
    assert text.piece(0, "a")["choices"][0]["text"] == "a"
    assert Reply("id", 1, "base", chat=True).piece(0, "")["choices"][0]["delta"] == {}
