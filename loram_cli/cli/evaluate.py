"""``loram eval``."""

from pathlib import Path
from typing import Annotated

import typer

from loram_cli.cli import options
from loram_cli.errors import UsageError

NAME = "eval"
EPILOG = "Example: loram eval --tasks gsm8k,humaneval --task-data gsm8k=test.jsonl --limit 200"


def command(
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated: gsm8k, humaneval, perplexity, ...")
    ] = None,
    run: options.Run = None,
    model: options.Model = None,
    out: options.Out = None,
    task_data: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE, local data of a task.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task at most.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompt.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Documents per pass. [default: 16]")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Generated tokens at most.")] = None,
    allow_code_execution: Annotated[
        bool | None,
        typer.Option(
            "--allow-code-execution/--no-allow-code-execution",
            help="Run generated code in a sandbox (humaneval).",
        ),
    ] = None,
    device: options.Device = None,
    seed: options.Seed = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Compare base, pruned and recovered models on the same held-out tasks."""
    from loram_cli.cli.render import print_json, show_result, show_scores
    from loram_cli.stages import evaluate, resolve

    values = options.layered(
        NAME,
        tasks=tuple(t.strip() for t in tasks.split(",") if t.strip())
        if tasks is not None
        else None,
        out=out,
        task_data=parse_task_data(task_data) if task_data else None,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        allow_code_execution=allow_code_execution,
        device=device,
        seed=seed,
        force=out is None or force,
    )
    reporter = options.reporter_for(json_output)
    directory, name = options.settle(run, model, reporter, remember=False)
    options.tell_defaults(name, NAME, values, reporter)
    result = evaluate.run(resolve.eval_spec(directory, name, values), reporter)
    if json_output:
        print_json(result.to_mapping())
        return
    show_result(result, [], json_output)
    show_scores(result)


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
