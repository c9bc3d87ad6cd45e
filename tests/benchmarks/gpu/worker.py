"""The process that measures: ``python -m gpu.worker [--fork]``, one job a line on stdin, as JSON."""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> int:
    """Import, then do what comes; a line on stdout says that it waits, another how it ended."""
    forks = "--fork" in sys.argv
    told = os.fdopen(os.dup(1), "w", buffering=1)
    # Nothing that a library prints may be taken for a line of ours.
    os.dup2(2, 1)
    _import_libraries()
    told.write("ready\n")
    for line in sys.stdin:
        job = json.loads(line)
        if not forks:
            told.write(f"done {_measured(job)}\n")
            return 0
        child = os.fork()
        if child == 0:
            os._exit(_measured(job))
        _, status = os.waitpid(child, 0)
        told.write(f"done {os.waitstatus_to_exitcode(status)}\nready\n")
    return 0


def _import_libraries() -> None:
    """What every row imports; nothing of it may touch the GPU, which another row has now."""
    import numpy  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401

    from gpu import work  # noqa: F401


def _measured(job: dict[str, Any]) -> int:
    from gpu import work
    from gpu.work import SkippedError

    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        found: dict[str, Any] = {"figures": work.KINDS[job["kind"]](**job["arguments"])}
    except SkippedError as error:
        found = {"skipped": str(error)}
    except BaseException as error:
        traceback.print_exc()
        found = {"why": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
    file = Path(job["result"])
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(file)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
