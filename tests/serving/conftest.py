import contextlib
import threading

import pytest

from loram_cli.reporting import NullReporter
from loram_cli.serving.engine import ServingEngine, opened_rows
from loram_cli.serving.spec import ServeSpec


@pytest.fixture(scope="session")
def spec_of(base, finished_run):
    def build(kind=ServeSpec, **changes):
        rows = {"recovered": (base, finished_run / "recovered"), "base": (base,)}
        settings = {"model": base, "rows": rows, "max_new_tokens": 8, "device": "cpu"}
        return kind(**{**settings, **changes})

    return build


@pytest.fixture(scope="session")
def rows(spec_of):
    """Both rows, loaded once for all tests."""
    with opened_rows(spec_of(), NullReporter()) as opened:
        yield opened


@pytest.fixture
def served(rows, spec_of):
    """A server in a thread; gives its engine and its URL."""
    from loram_cli.serving.server import _Server

    with contextlib.ExitStack() as stack:

        def start(**changes):
            spec = spec_of(port=0, **changes)
            engine = ServingEngine(rows, queue=spec.queue, seconds=spec.request_seconds)
            server = _Server(engine, spec, NullReporter())
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.server_close)
            stack.callback(engine.close)
            stack.callback(server.shutdown)
            return engine, server.url

        yield start
