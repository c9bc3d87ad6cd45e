"""The rows of a comparison: what identifies them, how they are opened and scored."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from loram_cli.checkpoint.index import read_json
from loram_cli.checkpoint.model import Model
from loram_cli.errors import UsageError
from loram_cli.evaluation.catalog import CODE_SAMPLES, TEMPERATURES
from loram_cli.evaluation.engine import Engine
from loram_cli.evaluation.harness import evaluate_model
from loram_cli.evaluation.hugging_face import HuggingFaceBackend
from loram_cli.evaluation.humaneval import CodeSettings
from loram_cli.evaluation.models import check_row, opened_model, precision, row_tokenizer
from loram_cli.evaluation.requests import TaskRequest
from loram_cli.evaluation.responses import ResponseCache
from loram_cli.evaluation.results import RowResult, TrainingCost
from loram_cli.evaluation.samples import samples_name
from loram_cli.evaluation.vllm_backend import VllmBackend
from loram_cli.lora.adapter import CONFIG_NAME, WEIGHTS_NAME
from loram_cli.reporting import Reporter
from loram_cli.runs.digests import file_digest
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.schema import digest_of
from loram_cli.stages.core.lineage import read_checked, trained_layout, warn_of_oddities
from loram_cli.stages.core.results import training_cost
from loram_cli.stages.evaluate.spec import EvalSpec, Rows, RowsSpec
from loram_cli.training.data.records import read_records


def checked_models(rows: Rows, reporter: Reporter) -> dict[Path, Model]:
    """The models of rows by directory, each checked once; see :func:`checked_row`."""
    models: dict[Path, Model] = {}
    for parts in rows.values():
        models[parts[0]] = checked_row(parts, reporter, models.get(parts[0]))
    return models


def checked_row(parts: Sequence[Path], reporter: Reporter, opened: Model | None = None) -> Model:
    """A row's model, once it and its adapters are whole, recorded and made for each other.

    Args:
        parts: The model's directory and, if any, the adapters'.
        reporter: Told what is odd about the model.
        opened: The model, where another row has checked it already.

    Raises:
        LoramError: See :func:`.evaluation.models.check_row`; or a file of one of loram's own
            outputs is not the one that was written.
    """
    for part in parts if opened is None else parts[1:]:
        if (part / MANIFEST_NAME).is_file():
            read_checked(part)
    model = check_row(parts, opened)
    if opened is None:
        warn_of_oddities(model, reporter)
    return model


def open_row(
    spec: RowsSpec, label: str, model: Model, reporter: Reporter
) -> AbstractContextManager[Any]:
    """A row's model with its adapters, loaded as the spec says; see :func:`opened_model`."""
    return opened_model(
        label,
        model,
        spec.rows[label][1:],
        reporter,
        device=spec.device,
        nf4=spec.quantize is not None,
        weights_memory=spec.weights_memory,
    )


def eval_inputs(
    rows: Rows, models: Mapping[Path, Model], requests: Sequence[TaskRequest]
) -> dict[str, Any]:
    """The manifest records of all models and documents, with their digests."""
    inputs: dict[str, Any] = {
        f"row {label}": _row_input(parts, models[parts[0]]) for label, parts in rows.items()
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


def _row_input(parts: tuple[Path, ...], model: Model) -> dict[str, Any]:
    record = {"path": " + ".join(map(str, parts)), **model.identity.to_mapping()}
    generation = parts[0] / "generation_config.json"
    if generation.is_file():
        # It names the tokens that end an answer.
        record["generation_config"] = file_digest(generation)
    for adapter in parts[1:]:
        record["adapter"] = file_digest(adapter / WEIGHTS_NAME)
        config = read_json(adapter / CONFIG_NAME)
        config.pop("base_model_name_or_path", None)
        record["adapter_config"] = digest_of(config)
    return record


def warn_of_tokenizers(inputs: Mapping[str, Any], reporter: Reporter) -> None:
    """Say so when the rows' figures per token cannot be compared."""
    found = {record["tokenizer"] for name, record in inputs.items() if name.startswith("row ")}
    if len(found) > 1:
        reporter.warn("rows differ in their tokenizers: their perplexities cannot be compared")


def score_row(
    spec: EvalSpec,
    label: str,
    model: Model,
    inputs: Mapping[str, Any],
    requests: Sequence[TaskRequest],
    answers: Path,
    path: Path,
    reporter: Reporter,
) -> RowResult:
    """Score one row; what was answered before is taken from ``answers``."""
    known = {k: v for k, v in inputs[f"row {label}"].items() if k not in ("path", "asked")}
    how = [known, spec.backend, precision(spec.device)]
    if spec.quantize is not None:
        how.append(spec.quantize)
    digest = digest_of(how).removeprefix("sha256:")[:16]
    cache = ResponseCache(answers / f"{digest}.jsonl")
    with ExitStack() as stack:
        stack.callback(cache.close)
        engine = _open_engine(spec, label, model, cache, reporter, stack)
        scores = evaluate_model(
            engine,
            list(requests),
            limit=spec.limit,
            allow_code_execution=spec.allow_code_execution,
            code=_code_settings(spec, requests),
            seed=spec.seed,
            max_new_tokens=spec.max_new_tokens,
            reporter=reporter,
            samples_path=path / samples_name(label),
        )
    chat = engine.chat and any(request.asks for request in requests)
    return RowResult(scores=tuple(scores), training=_training(spec.rows[label]), chat=chat)


def _open_engine(
    spec: EvalSpec,
    label: str,
    model: Model,
    cache: ResponseCache,
    reporter: Reporter,
    stack: ExitStack,
) -> Engine:
    parts = spec.rows[label]
    tokenizer = row_tokenizer(parts, spec.model)
    context_tokens = int(model.config.get("max_position_embeddings") or 2048)

    def open_backend() -> Any:
        reporter.note(f"evaluating {label}: {' + '.join(map(str, parts))}")
        if spec.backend == "vllm":
            return VllmBackend.open(parts, context_tokens, spec.seed)
        loaded = stack.enter_context(open_row(spec, label, model, reporter))
        rows = spec.batch_size if isinstance(spec.batch_size, int) else None
        return HuggingFaceBackend(loaded, tokenizer, rows)

    chat = _asked_as_chat(spec, label, tokenizer)
    return Engine(open_backend, tokenizer, context_tokens, cache, spec.seed, chat=chat)


def as_chat(spec: EvalSpec, parts: tuple[Path, ...]) -> bool:
    """Whether a row's tasks are to be asked as messages: as it was trained, unless told."""
    if spec.apply_chat_template == "auto":
        return trained_layout(parts[-1]) == "messages"
    return spec.apply_chat_template == "on"


def _asked_as_chat(spec: EvalSpec, label: str, tokenizer: Any) -> bool:
    """As :func:`as_chat`, once the tokenizer is known to have a template.

    Raises:
        UsageError: It has none, and one is asked for.
    """
    if getattr(tokenizer, "chat_template", None) is not None:
        return as_chat(spec, spec.rows[label])
    if spec.apply_chat_template == "on":
        raise UsageError(
            f"--apply-chat-template on: the tokenizer of row {label} has no chat template",
            "pass auto, or leave the row out",
        )
    return False


def _code_settings(spec: EvalSpec, requests: Sequence[TaskRequest]) -> CodeSettings:
    bundled = any(r.bundled for r in requests if r.name == "humaneval")
    samples = spec.code_samples or (1 if bundled else CODE_SAMPLES)
    default = TEMPERATURES if samples > 1 else (0.0,)
    return CodeSettings(samples, spec.temperatures or default)


def _training(parts: tuple[Path, ...]) -> TrainingCost | None:
    """What the row's adapter cost to train, from the manifests along its way."""
    if len(parts) < 2 or not (parts[1] / MANIFEST_NAME).is_file():
        return None
    return training_cost(Manifest.read(parts[1]))
