"""The server over real sockets, on the loopback; every loop here is bounded."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from urllib.parse import urlsplit

import pytest

from loram_cli.errors import LoramError
from loram_cli.reporting import NullReporter
from loram_cli.serving import server as server_module
from loram_cli.serving.engine import ServingEngine
from loram_cli.serving.server import serve

pytestmark = pytest.mark.integration
HELLO = [{"role": "user", "content": "What is 2 plus 1?"}]
JSON = {"Content-Type": "application/json"}


def request(url, path, body=None, method=None, headers=JSON, raw=None):
    """A status, and the parsed body or the raw lines of a stream."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    data = raw if raw is not None else None if body is None else json.dumps(body)
    connection.request(method or ("GET" if data is None else "POST"), path, data, dict(headers))
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.getheader("Content-Type", "").startswith("text/event-stream"):
        return response.status, [line.removeprefix("data: ") for line in text.split("\n\n")[:-1]]
    return response.status, json.loads(text)


def test_rows_are_models(served):
    _, url = served()
    status, body = request(url, "/v1/models")
    assert status == 200
    assert [model["id"] for model in body["data"]] == ["recovered", "base"]
    assert request(url, "/v1/models/base")[1]["object"] == "model"
    assert request(url, "/health")[1]["status"] == "ok"


def test_a_stream_says_what_the_whole_answer_says(served):
    _, url = served()
    for path, ask in (
        ("/v1/chat/completions", {"model": "recovered", "messages": HELLO}),
        ("/v1/completions", {"model": "base", "prompt": "Line 1", "n": 2, "temperature": 1}),
    ):
        status, whole = request(url, path, ask)
        assert status == 200
        options = {"stream": True, "stream_options": {"include_usage": True}}
        status, events = request(url, path, {**ask, **options})
        assert events[-1] == "[DONE]"
        *parts, counted = [json.loads(event) for event in events[:-1]]
        assert counted["usage"] == whole["usage"]
        texts: dict[int, str] = {}
        for part in parts:
            [choice] = part["choices"]
            piece = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
        for choice in whole["choices"]:
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            assert texts[choice["index"]] == text
            assert choice["finish_reason"] in ("length", "stop")


@pytest.mark.parametrize(
    ("path", "options", "status", "code"),
    [
        ("/v1/chat/completions", {"body": {"model": "no", "messages": HELLO}}, 404, "model_not_found"),
        ("/v1/chat/completions", {"raw": "{"}, 400, None),
        ("/v1/chat/completions", {"raw": "[" * 9999}, 400, None),
        ("/v1/chat/completions", {"body": {}, "headers": {}}, 415, None),
        ("/v1/other", {"body": {}}, 404, "unknown_url"),
        ("/other", {}, 404, "unknown_url"),
        ("/v1/models/no", {}, 404, "model_not_found"),
        ("/v1/models", {"method": "DELETE"}, 501, None),
        ("/v1/models", {"headers": {"Host": "evil.example"}}, 403, "forbidden_host"),
        ("/v1/completions", {"raw": "", "headers": {**JSON, "Content-Length": "99999999"}}, 413, None),
        ("/v1/completions", {"raw": "", "headers": {**JSON, "Content-Length": "9" * 5000}}, 413, None),
        ("/v1/completions", {"raw": "", "headers": {**JSON, "Content-Length": "-1"}}, 411, None),
        ("/v1/models", {"headers": {"Host": "["}}, 403, "forbidden_host"),
        (
            "/v1/completions",
            {"body": {"model": "base", "prompt": "word " * 9000}},
            400,
            "context_length_exceeded",
        ),
    ],
)  # fmt: skip
def test_errors_have_openais_shape(served, path, options, status, code):
    _, url = served()
    found, body = request(url, path, **options)
    assert found == status
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert body["error"]["message"]


def test_a_busy_server_says_so(served):
    engine, url = served(queue=0)
    with engine._turn:
        engine._places.acquire()
        status, body = request(url, "/v1/completions", {"model": "base", "prompt": "a"})
        engine._places.release()
    assert (status, body["error"]["type"]) == (429, "rate_limit_error")


def test_an_answer_that_takes_too_long_is_ended(served):
    _, url = served(request_seconds=1e-9)
    status, body = request(url, "/v1/completions", {"model": "base", "prompt": "a"})
    assert (status, body["error"]["code"]) == (504, "timeout")


def test_a_fault_within_a_stream_is_its_last_event(served, monkeypatch):
    engine, url = served()

    def fail(label, prompts, jobs, on_text=None):
        on_text(0, "a")
        raise LoramError("the weights are gone")

    monkeypatch.setattr(engine, "answer", fail)
    _, events = request(url, "/v1/completions", {"model": "base", "prompt": "a", "stream": True})
    assert json.loads(events[-1])["error"]["message"] == "the weights are gone"


def test_a_client_that_goes_ends_its_answer_and_harms_no_other(served):
    _, url = served(max_new_tokens=400)
    parts = urlsplit(url)
    body = json.dumps({"model": "base", "prompt": "a", "stream": True, "max_tokens": 400})
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as client:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        )
        client.sendall((head + "Content-Type: application/json\r\n\r\n" + body).encode())
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert (
        request(url, "/v1/completions", {"model": "base", "prompt": "a", "max_tokens": 2})[0] == 200
    )


def test_requests_at_once_are_answered_one_after_another(served):
    _, url = served()
    found: list[tuple[str, str]] = []

    def ask(row):
        _, body = request(url, "/v1/chat/completions", {"model": row, "messages": HELLO})
        found.append((row, body["choices"][0]["message"]["content"]))

    threads = [threading.Thread(target=ask, args=(row,)) for row in ("base", "recovered") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 2


def test_more_connections_than_may_be_are_closed(served, monkeypatch):
    monkeypatch.setattr(server_module, "_MOST_CONNECTIONS", 1)
    _, url = served()
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as first:
        first.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n")
        with socket.create_connection((parts.hostname, parts.port), timeout=30) as second:
            assert second.recv(10) == b""


def test_an_address_that_is_taken_is_told(rows, spec_of):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LoramError, match=f"cannot listen on 127.0.0.1 port {port}"):
            serve(ServingEngine(rows), spec_of(port=port), NullReporter(), lambda url: None)


@pytest.mark.parametrize("host", ["\0", "é" * 70, "999.1.1.1"])
def test_a_host_that_is_none_is_told(host, rows, spec_of):
    with pytest.raises(LoramError, match="cannot listen on"):
        serve(ServingEngine(rows), spec_of(host=host), NullReporter(), lambda url: None)


def test_the_official_client_is_served(served):
    openai = pytest.importorskip("openai", reason="pip install openai")
    _, url = served()
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
    assert [model.id for model in client.models.list()] == ["recovered", "base"]
    ask = {"model": "recovered", "messages": HELLO}
    whole = client.chat.completions.create(**ask)
    stream = client.chat.completions.create(**ask, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in stream)
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens <= 8
    assert client.completions.create(model="base", prompt="a", max_tokens=2).choices[0].text
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**ask, temperature=9)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_while_it_answers(base, finished_run, number, code):
    words = ["serve", "--run", finished_run, "--model", base, "--port", 0, "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "loram_cli", *map(str, words), "--max-new-tokens", "400"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy(),
    )  # fmt: skip
    try:
        told = json.loads(process.stdout.readline())
        assert told["models"] == ["recovered", "base"]
        parts = urlsplit(told["url"])
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
        body = json.dumps({"model": "base", "prompt": "a", "stream": True})
        connection.request("POST", "/v1/completions", body, JSON)
        assert connection.getresponse().status == 200
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.wait()
