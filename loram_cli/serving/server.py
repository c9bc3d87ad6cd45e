"""OpenAI's protocol over HTTP, by the standard library: for trying, one answer at a time.

What is bounded: the size of a request, the time to send it and to take the answer, the requests
that wait, the time for one answer, and the connections. A page in a browser cannot use it: there
are no CORS headers, a body must be declared as JSON, and on the loopback the ``Host`` must be it.
"""

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from loram_cli.errors import LoramError, one_line
from loram_cli.evaluation.decode import Generation, stream_seed
from loram_cli.reporting import Reporter
from loram_cli.schema import unknown_name
from loram_cli.serving.deltas import Deltas
from loram_cli.serving.engine import (
    AnswerTimeoutError,
    EngineBusyError,
    EngineClosedError,
    PromptTooLongError,
    ServedRow,
    ServingEngine,
)
from loram_cli.serving.protocol import (
    ApiError,
    Ask,
    Reply,
    finish,
    model_entry,
    model_list,
    parse_chat,
    parse_completion,
)
from loram_cli.serving.spec import ServeSpec
from loram_cli.units import MIB, format_seconds

MOST_BODY_BYTES = MIB
_MOST_CONNECTIONS = 64
# To send a request, or to take a piece of an answer.
_SOCKET_SECONDS = 30.0
_POLL_SECONDS = 0.2
_Piece = Callable[[Any], None]


def serve(
    engine: ServingEngine, spec: ServeSpec, reporter: Reporter, on_ready: Callable[[str], None]
) -> None:
    """Answer requests until Ctrl-C or SIGTERM.

    Args:
        engine: The rows.
        spec: Where to listen, and what is taken unless a request says otherwise.
        reporter: A line for each answer.
        on_ready: Called with the base URL once connections are accepted.

    Raises:
        LoramError: The address is in use or not allowed.
    """
    try:
        server = _Server(engine, spec, reporter)
    except (OSError, UnicodeError, TypeError) as error:  # a type error for a null character
        reason = getattr(error, "strerror", None) or error
        raise LoramError(
            f"cannot listen on {spec.host} port {spec.port} ({reason})",
            "pass another --port (0 takes a free one) or --host",
        ) from error
    try:
        on_ready(server.url)
        server.serve_forever(_POLL_SECONDS)
    except KeyboardInterrupt:
        reporter.note("stopped")
    finally:
        engine.close()
        server.server_close()


class _Server(ThreadingHTTPServer):
    """Listens; a thread for each connection, and so many at most."""

    daemon_threads = True

    def __init__(self, engine: ServingEngine, spec: ServeSpec, reporter: Reporter) -> None:
        self.engine, self.spec, self.reporter = engine, spec, reporter
        self.created = int(time.time())
        self._slots = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        if ":" in spec.host:
            self.address_family = socket.AF_INET6
        super().__init__((spec.host, spec.port), _Handler)

    @property
    def url(self) -> str:
        """The base URL, as clients want it."""
        host = f"[{self.spec.host}]" if ":" in self.spec.host else self.spec.host
        return f"http://{host}:{self.server_address[1]}/v1"

    def server_bind(self) -> None:
        """Bind without asking a name server for our own name, as the base class does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.spec.host, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a thread for a connection, or close it where there are too many."""
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is the client's to know."""


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "loram"
    sys_version = ""
    timeout = _SOCKET_SECONDS
    server: _Server
    _POSTS: ClassVar = {
        "/v1/chat/completions": parse_chat,
        "/v1/completions": parse_completion,
    }

    def do_GET(self) -> None:
        """List models, or tell that the server is there."""
        self._answered(self._get)

    def do_POST(self) -> None:
        """Complete a text or a conversation."""
        self._answered(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the reporter reports answers."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Tell what the base class found wrong in the same shape."""
        status = HTTPStatus(code)
        self.close_connection = True
        self._send(status, ApiError(code, message or status.phrase).to_mapping())

    def _answered(self, work: Callable[[], None]) -> None:
        """Run a request's work; errors are sent in OpenAI's shape."""
        self._begun = False
        try:
            self._check_host()
            work()
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            told = _api_error(error)
            if told.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                self.server.reporter.warn(one_line(f"{self.path}: {told.message}"))
            self._tell(told)

    def _tell(self, told: ApiError) -> None:
        self.close_connection = True
        try:
            if self._begun:
                self._event(told.to_mapping())
            else:
                self._send(HTTPStatus(told.status), told.to_mapping())
        except OSError:
            return

    def _check_host(self) -> None:
        """Refuse names that a foreign page may have given to this address."""
        try:
            name = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        except ValueError:
            name = None
        if self.server.spec.is_local and name not in ("127.0.0.1", "localhost", "::1"):
            raise ApiError(403, f"Host {name!r} is not this server", code="forbidden_host")

    def _get(self) -> None:
        path = self._asked_path()
        names, created = list(self.server.engine.rows), self.server.created
        if path in ("/health", "/v1/health", ""):
            self._send(HTTPStatus.OK, {"status": "ok", "models": names})
        elif path == "/v1/models":
            self._send(HTTPStatus.OK, model_list(names, created))
        elif path.startswith("/v1/models/"):
            name = unquote(path.removeprefix("/v1/models/"))
            self._send(HTTPStatus.OK, model_entry(self._row(name).label, created))
        else:
            raise self._no_such_path(path)

    def _post(self) -> None:
        path = self._asked_path()
        body = self._body()
        if path not in self._POSTS:
            raise self._no_such_path(path)
        self._complete(self._POSTS[path](body))

    def _asked_path(self) -> str:
        try:
            return urlsplit(self.path).path.rstrip("/")
        except ValueError as error:
            raise ApiError(400, "the path cannot be read") from error

    def _no_such_path(self, path: str) -> ApiError:
        known = ", ".join(("/v1/models", *self._POSTS))
        return ApiError(404, f"no such path: {path[:80]} (known: {known})", code="unknown_url")

    def _body(self) -> Any:
        """The parsed body, read to its end unless it is refused."""
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise ApiError(411, "a request needs its Content-Length")
        # More than a few digits are too much in any case, and may be too many for a number.
        if len(length) > len(str(MOST_BODY_BYTES)) or int(length) > MOST_BODY_BYTES:
            raise ApiError(413, f"a request of {length[:20]} bytes; {MOST_BODY_BYTES} at most")
        raw = self.rfile.read(int(length))
        if self.headers.get_content_type() != "application/json":
            raise ApiError(415, "expected Content-Type: application/json")
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON ({str(error)[:80]})") from error

    def _row(self, name: str) -> ServedRow:
        rows = self.server.engine.rows
        if name not in rows:
            said = str(unknown_name("model", name, rows, "model"))
            raise ApiError(404, said, param="model", code="model_not_found")
        return rows[name]

    def _complete(self, ask: Ask) -> None:
        row, started = self._row(ask.model), time.monotonic()
        prompts, jobs = _jobs(row, ask, self.server.spec)
        reply = Reply(
            f"{'chatcmpl' if ask.messages else 'cmpl'}-{uuid.uuid4().hex}",
            int(time.time()),
            row.label,
            chat=ask.messages is not None,
        )
        counted = sum(map(len, prompts[:: ask.choices]))
        deltas = [Deltas(job.stops, strip=reply.chat) for job in jobs]
        send = _stream(reply, deltas, self._event) if ask.stream else None
        done = self.server.engine.answer(row.label, prompts, jobs, send)
        if ask.stream:
            for place, (delta, decoded) in enumerate(zip(deltas, done, strict=True)):
                if rest := delta.rest(decoded.text):
                    self._event(reply.piece(place, rest))
                self._event(reply.piece(place, "", finish(decoded)))
            if ask.usage:
                self._event(reply.counted(done, counted))
            self._event(None)
        else:
            texts = [delta.rest(d.text) for delta, d in zip(deltas, done, strict=True)]
            self._send(HTTPStatus.OK, reply.whole(texts, done, counted))
        took = format_seconds(time.monotonic() - started)
        written = sum(decoded.tokens for decoded in done)
        self.server.reporter.note(f"{row.label}: {counted} + {written} tokens, {took}")

    def _send(self, status: HTTPStatus, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _event(self, body: Any) -> None:
        """Send an event of a stream; None ends it."""
        if not self._begun:
            # Its length is not known: the connection's end is the answer's.
            self._begun = self.close_connection = True
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Cache-Control", "no-cache")
            self.send_header("Connection", "close")
            self.end_headers()
        text = "[DONE]" if body is None else json.dumps(body)
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()


def _stream(reply: Reply, deltas: Sequence[Deltas], send: _Piece) -> Callable[[int, str], None]:
    """What sends each choice's pieces as its text grows."""
    begun: set[int] = set()

    def on_text(place: int, text: str) -> None:
        if reply.chat and place not in begun:
            begun.add(place)
            send(reply.begin(place))
        if piece := deltas[place].take(text):
            send(reply.piece(place, piece))

    return on_text


def _jobs(row: ServedRow, ask: Ask, spec: ServeSpec) -> tuple[list[list[int]], list[Generation]]:
    """Token ids and jobs of all choices, those of one prompt together."""
    if ask.messages is not None:
        asked = [("", row.chat_ids(ask.messages))]
    else:
        asked = [(text, row.text_ids(text)) for text in ask.prompts]
    prompts, jobs = [], []
    most = spec.max_new_tokens if ask.max_new_tokens is None else ask.max_new_tokens
    temperature = spec.temperature if ask.temperature is None else ask.temperature
    seed = spec.seed if ask.seed is None else ask.seed
    for text, ids in asked:
        for choice in range(ask.choices):
            prompts.append(ids)
            jobs.append(
                Generation(
                    prompt=text,
                    stops=spec.stop if ask.stops is None else ask.stops,
                    max_new_tokens=min(most, row.context_tokens - len(ids)),
                    temperature=temperature,
                    top_p=spec.top_p if ask.top_p is None else ask.top_p,
                    seed=stream_seed(seed, str(ids), choice),
                )
            )
    return prompts, jobs


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineBusyError):
        return ApiError(429, str(error), kind="rate_limit_error", code="too_many_requests")
    if isinstance(error, AnswerTimeoutError):
        return ApiError(504, str(error), kind="timeout_error", code="timeout")
    if isinstance(error, EngineClosedError):
        return ApiError(503, str(error), kind="server_error", code="closing")
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, LoramError):
        return ApiError(400, str(error))
    reason = one_line(str(error).strip().partition("\n")[0])
    return ApiError(500, f"{type(error).__name__}: {reason}", kind="server_error")
