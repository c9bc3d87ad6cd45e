"""Evaluate several models on the same tasks, into one table."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loram_cli.errors import UsageError
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.stages.common import StageResult, check_positive, stage_run

RESULTS_NAME = "results.json"


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """What to evaluate.

    Attributes:
        model: The original base.
        out: Where results and samples go.
        rows: Per row its model's directory and, if any, the adapter's.
        tasks: Task names.
        task_data: Local data by task name.
        demo_data: Use the demo's own held-out problems for gsm8k and perplexity.
        num_fewshot: Examples in the prompt; None for the task's own number.
        limit: Documents per task at most.
        batch_size: Documents per forward pass.
        max_new_tokens: Upper bound on generated tokens.
        allow_code_execution: Run generated code, in the sandbox.
        seed: Decides few-shot draws.
        device: Where to run; a GPU when there is one.
        force: Evaluate again even if the same results are there.
    """

    model: Path
    out: Path
    rows: dict[str, tuple[Path, ...]]
    tasks: tuple[str, ...] = ("gsm8k", "perplexity")
    task_data: dict[str, Path] = field(default_factory=dict)
    demo_data: bool = False
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    allow_code_execution: bool = False
    seed: int = 1234
    device: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "batch_size")
        if self.limit is not None and self.limit < 1:
            raise UsageError("--limit must be above 0")
        if not self.tasks:
            raise UsageError("--tasks is empty", "for example --tasks gsm8k,humaneval,perplexity")
        for name, file in self.task_data.items():
            if not file.exists():
                raise UsageError(f"--task-data {name}={file}: no such file")


def run(spec: EvalSpec, reporter: Reporter) -> StageResult:
    """Score every row on every task; a row that was scored before an interruption is not redone.

    Raises:
        LoramError: A task's data cannot be had, or a model cannot be loaded.
    """
    from loram_cli.checkpoint.identity import identify
    from loram_cli.runs.digests import file_digest

    # Most rows share the base, and its digests are read from all of its shards.
    models = {parts[0] for parts in spec.rows.values()}
    identities = {model: identify(model).to_mapping() for model in models}
    inputs: dict[str, Any] = {
        f"row {label}": _row_input(parts, identities[parts[0]])
        for label, parts in spec.rows.items()
    }
    for name, file in spec.task_data.items():
        inputs[f"task {name}"] = {"path": str(file), "bytes": file_digest(file)}
    with stage_run("eval", spec, inputs, spec.model, resumable=True) as stage:
        if stage.finished is not None:
            return stage.finished
        from loram_cli.evaluation.requests import resolve_tasks

        others = [task for task in spec.tasks if not (spec.demo_data and task in _DEMO_TASKS)]
        requests = (
            resolve_tasks(
                others,
                spec.task_data,
                prefer_bundled=spec.demo_data,
                num_fewshot=spec.num_fewshot,
                limit=spec.limit,
            )
            if others
            else []
        )
        if spec.demo_data:
            requests = [*_demo_requests(spec, stage.path), *requests]
        rows = {
            label: _score_row(spec, label, parts, requests, stage.path, reporter)
            for label, parts in spec.rows.items()
        }
        (stage.path / "demo-gsm8k.jsonl").unlink(missing_ok=True)
        results = {
            "bundled": any(s["bundled"] for r in rows.values() for s in r["scores"]),
            "rows": rows,
        }
        (stage.path / RESULTS_NAME).write_text(json.dumps(results, indent=1) + "\n")
        return stage.commit(results, base={}, keep={})


_DEMO_TASKS = ("gsm8k", "perplexity")


def _demo_requests(spec: EvalSpec, path: Path) -> list[Any]:
    from loram_cli.demo.problems import load_demo
    from loram_cli.evaluation.requests import TaskRequest
    from loram_cli.training.data import load_instructions

    records = load_demo("test")[: spec.limit]
    file = path / "demo-gsm8k.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    examples = load_instructions("demo:test", limit=spec.limit)
    requests = {
        "gsm8k": TaskRequest(
            "gsm8k", data_file=file, bundled=True, num_fewshot=spec.num_fewshot or 0
        ),
        "perplexity": TaskRequest(
            "perplexity", bundled=True, pairs=tuple((e.prompt, e.completion) for e in examples)
        ),
    }
    return [requests[task] for task in spec.tasks if task in requests]


def _row_input(parts: tuple[Path, ...], identity: dict[str, str]) -> dict[str, Any]:
    from loram_cli.checkpoint.adapter import WEIGHTS_NAME
    from loram_cli.runs.digests import file_digest

    record = {"path": " + ".join(map(str, parts)), **identity}
    for adapter in parts[1:]:
        record["adapter"] = file_digest(adapter / WEIGHTS_NAME)
    return record


def _score_row(
    spec: EvalSpec,
    label: str,
    parts: tuple[Path, ...],
    requests: list[Any],
    path: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    done = path / f"row-{label}.json"
    if done.is_file():
        return json.loads(done.read_text("utf-8"))
    from loram_cli.evaluation.harness import evaluate_model
    from loram_cli.modeling.narrow import load_causal_lm, load_tokenizer
    from loram_cli.training.adapters import load_adapter

    reporter.note(f"evaluating {label}: {' + '.join(map(str, parts))}")
    dtype = "float32" if not _has_gpu(spec.device) else "auto"
    model = load_causal_lm(parts[0], dtype=dtype, device=spec.device)
    for adapter in parts[1:]:
        model = load_adapter(model, adapter)
    scores = evaluate_model(
        model,
        load_tokenizer(spec.model),
        requests,
        batch_size=spec.batch_size,
        limit=spec.limit,
        allow_code_execution=spec.allow_code_execution,
        seed=spec.seed,
        max_new_tokens=spec.max_new_tokens,
        reporter=reporter,
        samples_path=path / f"samples-{label}.jsonl",
    )
    row = {"scores": [asdict(score) for score in scores], "training": _training_record(parts)}
    temporary = path / f".row-{label}.tmp"
    temporary.write_text(json.dumps(row, indent=1) + "\n", "utf-8")
    temporary.rename(done)
    return row


def _has_gpu(device: str | None) -> bool:
    from loram_cli.modeling.narrow import default_device

    return (device or default_device()).startswith("cuda")


def _training_record(parts: tuple[Path, ...]) -> dict[str, Any] | None:
    """What the row's adapter cost to train, from the manifests along its way."""
    if len(parts) < 2 or not (parts[1] / MANIFEST_NAME).is_file():
        return None
    manifest = Manifest.read(parts[1])
    if manifest.stage == "recover":
        return manifest.results.get("training")
    return training_record(manifest)


def training_record(manifest: Manifest) -> dict[str, Any]:
    """Parameters trained on, peak memory and time, from a ``train`` manifest."""
    return {
        "trained_on_params": manifest.results.get("trained_on_params"),
        "lora_params": manifest.results.get("lora_params"),
        "peak_memory_bytes": manifest.peak_memory_bytes,
        "peak_memory_increase_bytes": manifest.peak_memory_increase_bytes,
        "wall_seconds": manifest.wall_seconds,
    }
