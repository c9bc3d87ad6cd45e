"""A process with all libraries imported, that forks a ``loram`` for every request.

One JSON object a line comes in: ``words``, ``cwd``, ``log``, ``watch`` (the directory whose file
operations are counted), and maybe ``fault``: the signal's number, or ``fill`` with the file that
takes all space that is left, and ``at_event``,
``at_path`` (the first operation on such a path) or ``at_seconds``. One goes out: ``code`` (negative for a signal), ``events``, ``seconds``, ``pid``.

An event is a file operation below ``watch``; a fault at an event comes before the operation is
done. A fault in seconds may fall anywhere, also between two operations.
"""

import contextlib
import importlib
import json
import os
import pkgutil
import signal
import sys
import threading
import time

COUNTED = {
    "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree",
    "shutil.copyfile", "os.listdir", "os.scandir",
}  # fmt: skip


def child(request: dict, counter: str) -> None:
    from loram_cli.cli import app

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(request["cwd"])
    count = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    fault = request.get("fault") or {}
    seen = 0
    filling = False

    # Several threads come here: a count that two of them take at once would pass the fault by. The
    # filling itself opens a file.
    lock = threading.RLock()

    def hook(event: str, args: tuple) -> None:
        nonlocal seen, filling
        if event not in COUNTED or request["watch"] not in str(args[0]):
            return
        with lock:
            if filling:
                return
            seen += 1
            os.pwrite(count, str(seen).encode(), 0)
            here = fault.get("at_path")
            if seen == fault.get("at_event") or (here and here in str(args[0])):
                fault.pop("at_path", None)
                if "fill" in fault:
                    filling = True
                    fill(fault["fill"])
                    filling = False
                else:
                    os.kill(os.getpid(), fault["signal"])

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["loram", *request["words"]]
    sys.addaudithook(hook)
    code = 0
    try:
        app.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fill(file: str) -> None:
    """Take all space of a disk, as another program would."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with contextlib.suppress(OSError):
        while True:
            os.write(descriptor, bytes(4096))
    os.close(descriptor)


def serve(request: dict) -> dict:
    counter = request["log"] + ".events"
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(request, counter)
    fault = request.get("fault") or {}
    stopped = False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if done and os.WIFSTOPPED(status):
            stopped = True
            break
        if done:
            break
        if time.monotonic() - began >= fault.get("at_seconds", float("inf")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, fault["signal"])
            fault = {}
        time.sleep(0.002)
    with open(counter) as file:
        events = int(file.read() or 0)
    code = None if stopped else os.waitstatus_to_exitcode(status)
    return {"code": code, "events": events, "seconds": time.monotonic() - began, "pid": pid}


def resume(pid: int) -> dict:
    os.kill(pid, signal.SIGCONT)
    _, status = os.waitpid(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "pid": pid}


def import_all(prefixes: list[str]) -> dict:
    """Import our modules below some packages, so that a forked command finds them at hand."""
    import loram_cli

    for module in pkgutil.walk_packages(loram_cli.__path__, "loram_cli."):
        if module.name.startswith(tuple(prefixes)) and not module.name.endswith("sandbox_child"):
            importlib.import_module(module.name)
    return {}


def main() -> None:
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import_all(["loram_cli.cli", "loram_cli.stages", "loram_cli.training", "loram_cli.modeling"])
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "resume" in request:
            answer = resume(request["resume"])
        elif "import" in request:
            answer = import_all(request["import"])
        else:
            answer = serve(request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
