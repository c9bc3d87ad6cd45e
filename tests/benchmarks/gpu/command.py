"""Measure everything on the GPU at hand: ``python tests/benchmarks/gpu``, or ``make bench-gpu``.

Row by row, most valuable first, each in a process of its own with a time limit of its own. After
every row the results file (results-CARD-DATE.json) and the Markdown beside it are whole; a row that
fails says why, and the next one runs.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from . import tables
from .checkpoints import await_checkpoint
from .process import ROOT, Worker
from .results import Outcome, Results
from .rows import Row, card_rows, chosen, needed_checkpoints, rehearsal_rows

_LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "datasets", "lm-eval",
)  # fmt: skip
_NICE = 10
_PAGES = (ROOT / "loram_cli" / "docs" / "memory.md", ROOT / "README.md")
_REHEARSED_CARD = "cpu"


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; 1 where a row failed."""
    flags = _parser().parse_args(words)
    if flags.write_docs:
        return _write_docs(flags.write_docs)
    if flags.record_demo:
        return _record_demo(flags.record_demo)
    if not flags.cpu_rehearsal and not _has_gpu():
        sys.stderr.write(
            "error: no GPU here (nvidia-smi names none)\n"
            "pass --cpu-rehearsal to run the whole path at tiny shapes on the CPU\n"
        )
        return 2
    rows = rehearsal_rows() if flags.cpu_rehearsal else card_rows()
    try:
        rows = chosen(rows, flags.only)
    except ValueError as error:
        sys.stderr.write(f"error: --only: {error}\n")
        return 2
    flags.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="loram-bench-gpu-", dir=flags.work) as folder:
        results = _measure(rows, flags, Path(folder))
    failed = [row for row in results.rows.values() if row.status == "failed"]
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python tests/benchmarks/gpu", description="Measure everything on the GPU at hand."
    )
    parser.add_argument(
        "--budget-minutes",
        type=float,
        default=11.0,
        metavar="N",
        help="leave out rows that no longer fit (default: 11)",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="ROW",
        help="a letter (b) or a row (e2); may be repeated",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where the results go (default: here)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="disk for checkpoints, 48 GB (default: the system's temporary folder)",
    )
    parser.add_argument(
        "--cpu-rehearsal", action="store_true", help="the whole path at tiny shapes on the CPU"
    )
    parser.add_argument(
        "--process-per-row",
        action="store_true",
        help="in a rehearsal as well; else one process forks, to save imports",
    )
    parser.add_argument(
        "--write-docs",
        type=Path,
        metavar="FILE.json",
        help="write the tables of a results file into the documentation, and end",
    )
    parser.add_argument(
        "--record-demo",
        type=Path,
        metavar="RUN",
        help="keep the figures of a demo run on a CPU, to show beside row a",
    )
    return parser  # fmt: skip


def _measure(rows: list[Row], flags: argparse.Namespace, folder: Path) -> Results:
    begun = time.monotonic()
    results = _new_results(flags)
    file = flags.out / results.file_name
    results.take_rows_of(file)
    logs = file.with_suffix(".logs")
    logs.mkdir(exist_ok=True)
    making = _make_checkpoints(rows, folder, logs)
    forks = flags.cpu_rehearsal and not flags.process_per_row
    worker = Worker(forks, logs / "workers.log")
    try:
        for place, row in enumerate(rows):
            left = flags.budget_minutes * 60 - (time.monotonic() - begun)
            if left < row.seconds:
                why = f"{max(0, left):.0f} s left of the budget, takes about {row.seconds:.0f} s"
                _tell(results, Outcome(name=row.name, label=row.label, status="left out", why=why))
                results.write(flags.out)
                continue
            if not worker.serves_more and worker.used:
                worker = Worker(forks, logs / "workers.log")
            # The next one imports while this one measures.
            following = None
            if not forks and place + 1 < len(rows):
                following = Worker(False, logs / "workers.log")
            outcome = _measured(row, worker, folder, logs, min(row.limit_seconds, left))
            if not worker.serves_more:
                worker.end()
            worker = following or worker
            _tell(results, outcome)
            results.write(flags.out)
            file.with_suffix(".md").write_text(tables.markdown(results))
            if row.checkpoint not in {other.checkpoint for other in rows[place + 1 :]}:
                shutil.rmtree(folder / str(row.checkpoint), ignore_errors=True)
    finally:
        worker.end()
        if making is not None and making.poll() is None:
            os.killpg(making.pid, 9)
            making.wait()
    seconds = time.monotonic() - begun
    file.with_suffix(".md").write_text(tables.markdown(results))
    print(f"\n{tables.markdown(results)}\n{seconds:.0f} s; {file}, {file.with_suffix('.md')}")
    return results


def _measured(row: Row, worker: Worker, folder: Path, logs: Path, limit: float) -> Outcome:
    begun = time.monotonic()
    arguments = dict(row.arguments)
    why = None
    if row.checkpoint is not None:
        why = await_checkpoint(row.checkpoint, folder, limit)
        arguments["checkpoint"] = str(folder / row.checkpoint)
    if row.kind in ("demo", "taylor", "reconstruct"):
        arguments["folder"] = str(folder)
    result = folder / f"{row.name}.json"
    result.unlink(missing_ok=True)
    job = {
        "kind": row.kind, "arguments": arguments, "result": str(result),
        "log": str(logs / f"{row.name}.log"),
    }  # fmt: skip
    if why is None:
        limit -= time.monotonic() - begun
        begun = time.monotonic()
        why = worker.run(job, max(1.0, limit))
    found: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {}
    why = found.get("why") or why or (None if found else "it left no result")
    status = "failed" if why else "skipped" if "skipped" in found else "measured"
    return Outcome(
        name=row.name,
        label=row.label,
        status=status,
        why=why or found.get("skipped"),
        figures=found.get("figures", {}),
        seconds=time.monotonic() - begun,
        arguments=row.arguments,
    )


def _tell(results: Results, outcome: Outcome) -> None:
    results.add(outcome)
    text = f"{outcome.name} {outcome.label}: {outcome.status}"
    text += f" in {outcome.seconds:.1f} s" if outcome.seconds else ""
    print(text + (f" ({outcome.why})" if outcome.why else ""), flush=True)


def _make_checkpoints(
    rows: list[Row], folder: Path, logs: Path
) -> "subprocess.Popen[bytes] | None":
    names = list(needed_checkpoints(rows))
    if not names:
        return None
    paths = f"{ROOT}:{ROOT / 'tests' / 'benchmarks'}"
    with (logs / "checkpoints.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "gpu.checkpoints", str(folder), *names],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: os.nice(_NICE),
        )


def _new_results(flags: argparse.Namespace) -> Results:
    card, driver, memory = _card() if not flags.cpu_rehearsal else (_REHEARSED_CARD, "none", "-")
    versions = {"Python": ".".join(map(str, sys.version_info[:3]))}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return Results(
        card=card,
        driver=driver,
        card_memory=memory,
        date=datetime.date.today().isoformat(),
        command=" ".join(["python tests/benchmarks/gpu", *sys.argv[1:]]),
        versions=versions,
    )


def _card() -> tuple[str, str, str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    card, driver, memory = (part.strip() for part in told.splitlines()[0].split(","))
    return card, driver, memory


def _has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return bool(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.strip())


def _write_docs(file: Path) -> int:
    results = Results.read(file)
    if results.card == _REHEARSED_CARD:
        sys.stderr.write(f"error: {file}: a rehearsal on the CPU says nothing about a GPU\n")
        return 2
    for page, text in zip(
        _PAGES, (tables.markdown(results), tables.headline(results)), strict=True
    ):
        done = tables.write_between(page, text)
        print(f"{page}: {'written' if done else 'has no markers, left as it is'}")
    return 0


def _record_demo(run: Path) -> int:
    from .work import demo_figures

    known = {"date": datetime.date.today().isoformat(), "figures": demo_figures(run)}
    tables.CPU_DEMO.write_text(json.dumps(known, indent=1) + "\n")
    print(f"wrote {tables.CPU_DEMO}")
    return 0
