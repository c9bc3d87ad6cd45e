"""``loram eval``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loram_cli.cli import options
from loram_cli.errors import UsageError

NAME = "eval"
EPILOG = "Example: loram eval --tasks gsm8k,humaneval --task-data gsm8k=test.jsonl --limit 200"


def command(
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: gsm8k (8-shot CoT), mathqa, csr (six tasks), humaneval, "
            "perplexity, or any task of lm-eval (lm_eval:gsm8k for its own of that name)."
        ),
    ] = None,
    run: options.Run = None,
    model: options.Model = None,
    out: options.Out = None,
    rows: Annotated[
        str | None,
        typer.Option(help="Comma-separated: base, pruned, recovered, merged, full-lora. All."),
    ] = None,
    row: options.ModelRow = None,
    task_data: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE, local data of a task; NAME:train=FILE, its examples."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task at most.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompt.")] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(help="Documents per pass; by default as memory allows."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Generated tokens at most.")] = None,
    code_samples: Annotated[
        int | None,
        typer.Option(help="humaneval: completions per problem, 1 is greedy. (default: 10)"),
    ] = None,
    temperatures: Annotated[
        str | None,
        typer.Option(help="humaneval: the best counts. (default: 0,0.2,0.4,0.6,0.8)"),
    ] = None,
    allow_code_execution: Annotated[
        bool | None,
        typer.Option(
            "--allow-code-execution/--no-allow-code-execution",
            help="Run generated code in a sandbox (humaneval).",
        ),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="hf, or vllm (needs the vllm extra and a GPU). (default: hf)")
    ] = None,
    quantize: options.EvalQuantize = None,
    weights_memory: options.WeightsMemory = None,
    export: Annotated[
        Path | None, typer.Option(help="Also write the table here: .md, .csv, .json or .png.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Show saved outputs, rows side by side; run nothing.")
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="With --show: wrong, right, or differ (rows disagree).")
    ] = None,
    task: Annotated[str | None, typer.Option(help="With --show: one task.")] = None,
    count: Annotated[int, typer.Option("-n", help="With --show: documents at most.")] = 5,
    device: options.Device = None,
    seed: options.Seed = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json_output: options.Json = False,
) -> None:
    """Compare base, pruned and recovered models on the same held-out tasks."""
    from loram_cli.cli.draw.console import print_json, show_result
    from loram_cli.cli.draw.plans import show_plans
    from loram_cli.cli.draw.scores import show_scores
    from loram_cli.config import defaults as resolve
    from loram_cli.stages.evaluate import stage as evaluate

    chosen = options.comma_separated(rows)
    if show:
        directory = options.RunDirectory(run or options.settings().run or options.DEFAULT_RUN)
        _show(out or directory.output(NAME), chosen, task, only, count, json_output)
        return
    if only is not None or task is not None:
        raise UsageError("--only and --task go with --show", "to evaluate one task: --tasks NAME")
    values = options.layered(
        NAME,
        tasks=options.comma_separated(tasks),
        out=out,
        task_data=parse_task_data(task_data) if task_data else None,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=_number(batch_size),
        max_new_tokens=max_new_tokens,
        code_samples=code_samples,
        temperatures=parse_temperatures(temperatures) if temperatures is not None else None,
        allow_code_execution=allow_code_execution,
        backend=backend,
        quantize=quantize,
        weights_memory=weights_memory,
        device=device,
        seed=seed,
        force=force,
    )
    reporter = options.reporter_for(json_output)
    directory, name = options.settle(run, model, reporter, remember=False)
    options.tell_defaults(name, NAME, values, reporter)
    spec = resolve.eval_spec(directory, name, values, choose=chosen, more=parse_rows(row or []))
    if dry_run:
        show_plans([evaluate.plan(spec, reporter)], json_output)
        return
    result = evaluate.run(spec, reporter)
    if export is not None:
        evaluate.export_results(result, export)
    if json_output:
        print_json(result.to_mapping())
        return
    show_result(result, [], json_output)
    show_scores(result)


def _show(
    directory: Path,
    rows: tuple[str, ...] | None,
    task: str | None,
    only: Any,
    count: int,
    json_output: bool,
) -> None:
    from loram_cli.cli.draw.console import print_json
    from loram_cli.cli.draw.scores import documents_mapping, show_documents
    from loram_cli.evaluation.samples import load_documents

    if only not in (None, "wrong", "right", "differ"):
        raise UsageError(f"--only {only}: wrong, right or differ is wanted")
    if count < 1:
        raise UsageError("-n must be above 0")
    documents = load_documents(directory, rows=rows, task=task, only=only, limit=count)
    if json_output:
        print_json(documents_mapping(documents))
        return
    show_documents(documents)


def _number(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text


def parse_temperatures(text: str) -> tuple[float, ...]:
    """Numbers between commas.

    Raises:
        UsageError: One is none.
    """
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"--temperatures {text}: numbers are wanted, such as 0,0.2,0.8") from None


def parse_rows(entries: list[str]) -> dict[str, tuple[Path, ...]]:
    """``NAME=DIR`` or ``NAME=DIR+ADAPTER``.

    Raises:
        UsageError: One is not of that form, or a directory is not there.
    """
    rows = {}
    for entry in entries:
        name, _, place = entry.partition("=")
        if not name or not place:
            raise UsageError(f"--row {entry}: NAME=DIR or NAME=DIR+ADAPTER is wanted")
        parts = [Path(place)]
        if not parts[0].is_dir() and "+" in place:
            parts = [Path(part) for part in place.rsplit("+", 1)]
        for part, file in zip(parts, ("config.json", "adapter_config.json"), strict=False):
            if not (part / file).is_file():
                raise UsageError(f"--row {entry}: {part} has no {file}")
        rows[name] = tuple(parts)
    return rows


def parse_task_data(entries: list[str]) -> dict[str, Path]:
    """``NAME=FILE`` pairs.

    Raises:
        UsageError: One is not of that form.
    """
    pairs = {}
    for entry in entries:
        name, equals, file = entry.partition("=")
        if not equals or not name or not file:
            raise UsageError(
                f"--task-data {entry}: NAME=FILE is wanted", "for example gsm8k=test.jsonl"
            )
        pairs[name] = Path(file)
    return pairs
