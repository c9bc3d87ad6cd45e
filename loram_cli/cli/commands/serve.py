"""``loram serve``."""

import sys

from loram_cli.cli.commands.generate import TalkOptions, with_rows
from loram_cli.cli.options import Values, layered, reporter_for
from loram_cli.serving.spec import ServeSpec

NAME = "serve"
EPILOG = "Example: loram serve --rows base,recovered --port 8000"
SPEC, OPTIONS = ServeSpec, TalkOptions


def command(values: Values, options: TalkOptions) -> None:
    """Answer OpenAI's chat and completion requests, each row a model name; for trying.

    One answer is written at a time, on this machine only unless --host says otherwise, and nobody
    is asked for a key. For many users take vLLM or llama.cpp. Ctrl-C ends it.
    """
    from loram_cli.cli.draw.console import print_json, stdout_console
    from loram_cli.config.defaults import serve_spec
    from loram_cli.config.rows import served_rows
    from loram_cli.serving.engine import ServingEngine, opened_rows
    from loram_cli.serving.server import serve

    reporter = reporter_for(options.json_output)
    spec = serve_spec(*with_rows(options, layered(NAME, values), reporter, served_rows))
    if not spec.is_local:
        reporter.warn(f"--host {spec.host}: whoever reaches this machine can use the models")

    def tell(url: str) -> None:
        if options.json_output:
            print_json({"url": url, "models": list(spec.rows)})
        else:
            names = ", ".join(spec.rows)
            stdout_console().print(f"serving {names} at {url} (for trying; Ctrl-C ends it)")
        sys.stdout.flush()

    with opened_rows(spec, reporter) as rows:
        engine = ServingEngine(rows, queue=spec.queue, seconds=spec.request_seconds)
        serve(engine, spec, reporter, tell)
