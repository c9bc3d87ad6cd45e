"""The rows of a comparison: what identifies them, how they are opened and scored."""

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.schema import digest_of
from loram_cli.stages.evaluate.models import opened_model, precision, row_tokenizer

if TYPE_CHECKING:
    from loram_cli.evaluation.engine import Engine
    from loram_cli.evaluation.humaneval import CodeSettings
    from loram_cli.evaluation.requests import TaskRequest
    from loram_cli.stages.evaluate.stage import EvalSpec


def eval_inputs(rows: dict[str, tuple[Path, ...]], requests: "list[TaskRequest]") -> dict[str, Any]:
    """The manifest records of all models and documents, with their digests."""
    from loram_cli.checkpoint.model import Model
    from loram_cli.runs.digests import file_digest
    from loram_cli.training.data.records import read_records

    # Most rows share the base, and its digests are read from all of its shards.
    models = {parts[0] for parts in rows.values()}
    identities = {model: Model.open(model).identity.to_mapping() for model in models}
    inputs: dict[str, Any] = {
        f"row {label}": _row_input(parts, identities[parts[0]]) for label, parts in rows.items()
    }
    for request in requests:
        for suffix, file in (("", request.data_file), (":train", request.train_file)):
            if file is not None:
                record = {"path": str(file), "bytes": file_digest(file)}
                inputs[f"task {request.name}{suffix}"] = record
        if request.source:
            records = [dict(r.fields) for r in read_records(request.source)]
            inputs[f"task {request.name}"] = {"path": request.source, "bytes": digest_of(records)}
        if request.examples is not None:
            texts = [[e.prompt, e.completion] for e in request.examples]
            inputs[f"task {request.name}"] = {"path": "demo:test", "bytes": digest_of(texts)}
    return inputs


def _row_input(parts: tuple[Path, ...], identity: dict[str, str]) -> dict[str, Any]:
    from loram_cli.lora.adapter import WEIGHTS_NAME
    from loram_cli.runs.digests import file_digest

    record = {"path": " + ".join(map(str, parts)), **identity}
    generation = parts[0] / "generation_config.json"
    if generation.is_file():
        # It names the tokens that end an answer.
        record["generation_config"] = file_digest(generation)
    for adapter in parts[1:]:
        record["adapter"] = file_digest(adapter / WEIGHTS_NAME)
        config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
        config.pop("base_model_name_or_path", None)
        record["adapter_config"] = digest_of(config)
    return record


def warn_of_tokenizers(inputs: dict[str, Any], reporter: Reporter) -> None:
    """Say so when the rows' figures per token cannot be compared."""
    found = {record["tokenizer"] for name, record in inputs.items() if name.startswith("row ")}
    if len(found) > 1:
        reporter.warn("rows differ in their tokenizers: their perplexities cannot be compared")


def score_row(
    spec: "EvalSpec",
    label: str,
    inputs: dict[str, Any],
    requests: "list[TaskRequest]",
    answers: Path,
    path: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    """Score one row; what was answered before is taken from ``answers``.

    Args:
        spec: Of the evaluation.
        label: The row.
        inputs: From :func:`eval_inputs`.
        requests: Its tasks.
        answers: Folder of the kept answers.
        path: Where samples go.
        reporter: Told of progress.

    Returns:
        ``scores``, and ``training``: what the row cost to train, None where it was not trained.
    """
    from loram_cli.evaluation.harness import evaluate_model
    from loram_cli.evaluation.responses import ResponseCache
    from loram_cli.evaluation.samples import samples_name

    parts = spec.rows[label]
    known = {k: v for k, v in inputs[f"row {label}"].items() if k != "path"}
    how = [known, spec.backend, precision(spec.device)]
    if spec.quantize is not None:
        how.append(spec.quantize)
    digest = digest_of(how).removeprefix("sha256:")[:16]
    cache = ResponseCache(answers / f"{digest}.jsonl")
    with ExitStack() as stack:
        stack.callback(cache.close)
        engine = _open_engine(spec, label, cache, reporter, stack)
        scores = evaluate_model(
            engine,
            requests,
            limit=spec.limit,
            allow_code_execution=spec.allow_code_execution,
            code=_code_settings(spec, requests),
            seed=spec.seed,
            max_new_tokens=spec.max_new_tokens,
            reporter=reporter,
            samples_path=path / samples_name(label),
        )
    return {"scores": [asdict(score) for score in scores], "training": _training_record(parts)}


def _open_engine(
    spec: "EvalSpec", label: str, cache: Any, reporter: Reporter, stack: ExitStack
) -> "Engine":
    from loram_cli.checkpoint.index import read_config
    from loram_cli.evaluation.engine import Engine

    parts = spec.rows[label]
    tokenizer = row_tokenizer(spec, label)
    context_tokens = int(read_config(parts[0]).get("max_position_embeddings") or 2048)

    def open_backend() -> Any:
        reporter.note(f"evaluating {label}: {' + '.join(map(str, parts))}")
        if spec.backend == "vllm":
            from loram_cli.evaluation.vllm_backend import VllmBackend

            return VllmBackend.open(parts, context_tokens, spec.seed)
        from loram_cli.evaluation.hugging_face import HuggingFaceBackend

        model = stack.enter_context(opened_model(spec, label, reporter))
        rows = spec.batch_size if isinstance(spec.batch_size, int) else None
        return HuggingFaceBackend(model, tokenizer, rows)

    return Engine(open_backend, tokenizer, context_tokens, cache, spec.seed)


def _code_settings(spec: "EvalSpec", requests: "list[TaskRequest]") -> "CodeSettings":
    from loram_cli.evaluation.catalog import CODE_SAMPLES, TEMPERATURES
    from loram_cli.evaluation.humaneval import CodeSettings

    bundled = any(r.bundled for r in requests if r.name == "humaneval")
    samples = spec.code_samples or (1 if bundled else CODE_SAMPLES)
    default = TEMPERATURES if samples > 1 else (0.0,)
    return CodeSettings(samples, spec.temperatures or default)


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
        "layout": manifest.results.get("layout"),
        "peak_memory_bytes": manifest.peak_memory_bytes,
        "peak_memory_increase_bytes": manifest.peak_memory_increase_bytes,
        "wall_seconds": manifest.wall_seconds,
    }
