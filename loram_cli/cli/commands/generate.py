"""``loram generate``."""

import sys
from typing import Annotated

import typer

from loram_cli.cli import options

NAME = "generate"
EPILOG = 'Example: loram generate --rows base,recovered "How many legs do 3 cats have?"'


def command(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(help="What to ask; quote each. Without one, what is piped in."),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: base, pruned, recovered, merged, full-lora. (default: recovered)"
        ),
    ] = None,
    row: options.ModelRow = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="question, instruction, messages, or prompt as it is. (default: as trained on)"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens at most. (default: 256)")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token. (default: 0)")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Share of probability to draw from. (default: 1)")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")
    ] = None,
    quantize: options.EvalQuantize = None,
    weights_memory: options.WeightsMemory = None,
    run: options.Run = None,
    model: options.Model = None,
    device: options.Device = None,
    seed: options.Seed = None,
    json_output: options.Json = False,
) -> None:
    """Ask the full model with the recovered adapter, whether or not the GPU holds it."""
    from loram_cli.cli.commands.evaluate import parse_rows
    from loram_cli.cli.draw.console import print_json, stdout_console
    from loram_cli.config import defaults as resolve
    from loram_cli.stages.evaluate import generate

    prompts = tuple(prompt or ())
    if not prompts and sys.stdin is not None and not sys.stdin.isatty():
        prompts = (sys.stdin.read().rstrip("\n"),)
    values = options.layered(
        NAME,
        prompts=prompts,
        layout=layout,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=tuple(stop) if stop else None,
        quantize=quantize,
        weights_memory=weights_memory,
        device=device,
        seed=seed,
    )
    reporter = options.reporter_for(json_output)
    directory, name = options.settle(run, model, reporter, remember=False)
    spec = resolve.generate_spec(
        directory, name, values, choose=options.comma_separated(rows), more=parse_rows(row or [])
    )
    answers = generate.run(spec, reporter)
    if json_output:
        print_json({"answers": [answer.to_mapping() for answer in answers]})
        return
    console = stdout_console()
    for answer in answers:
        if len(answers) > 1:
            heading = answer.row if len(spec.prompts) == 1 else f"{answer.row}: {answer.prompt}"
            console.rule(heading, align="left", style="dim")
        console.print(answer.text)
