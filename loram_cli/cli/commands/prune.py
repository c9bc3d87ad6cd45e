"""``loram prune``."""

from pathlib import Path
from typing import Annotated

import typer

from loram_cli.cli import options

NAME = "prune"
EPILOG = "Example: loram prune --model ./Llama-2-13b-hf --ratio 0.65 --calibration text.jsonl"


def command(
    strategy: Annotated[
        str | None,
        typer.Option(
            help="rand: random groups; stru: ranked groups; unst: single weights; semi: 2:4.",
            autocompletion=options.choices("prune", "strategy"),
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of groups to drop a layer, or of weights to zero. (default: 0.65)"
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Instead of --ratio: a YAML or JSON file with ratios for layers."),
    ] = None,
    target_params: Annotated[
        str | None,
        typer.Option(help="Instead of --ratio: parameters to get down to, such as 6B."),
    ] = None,
    fit_memory: Annotated[
        str | None,
        typer.Option(help="Instead of --ratio: memory of the card to train on, such as 24GiB."),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="With --fit-memory: nf4 where training will hold the weights in 4 bits.",
            autocompletion=options.choices("prune", "quantize"),
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="With --fit-memory: LoRA rank. (default: 8)")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="With --fit-memory: examples per pass. (default: 4)")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="With --fit-memory: tokens per example. (default: 512)")
    ] = None,
    gradient_checkpointing: options.GradientCheckpointing = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="layer: an even share of each; global: groups of all layers ranked together.",
            autocompletion=options.choices("prune", "scope"),
        ),
    ] = None,
    multiple_of: options.MultipleOf = None,
    model: options.Model = None,
    run: options.Run = None,
    out: options.Out = None,
    keep_first: Annotated[
        int | None, typer.Option(help="First layers kept whole. (default: 4)")
    ] = None,
    keep_last: Annotated[
        int | None, typer.Option(help="Last layers kept whole. (default: 2)")
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(
            help="taylor (stru), sparsegpt (unst, semi), or l2 (no data).",
            autocompletion=options.choices("prune", "importance"),
        ),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text for taylor and sparsegpt: file, folder, data set id.")
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(help="Windows of text. (default: taylor 10, sparsegpt 128)")
    ] = None,
    calibration_length: Annotated[
        int | None, typer.Option(help="Tokens a window. (default: taylor 128, sparsegpt 2048)")
    ] = None,
    calibration_memory: Annotated[
        str | None,
        typer.Option(help="Memory for activations; the rest goes to disk. (default: 4GiB)"),
    ] = None,
    dampening: Annotated[
        float | None,
        typer.Option(help="sparsegpt: share of the Hessian's mean diagonal. (default: 0.01)"),
    ] = None,
    block_columns: Annotated[
        int | None, typer.Option(help="sparsegpt: columns per update. (default: 128)")
    ] = None,
    device: options.Device = None,
    seed: options.Seed = None,
    push: options.Push = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json_output: options.Json = False,
) -> None:
    """Drop whole attention groups and MLP channels, or zero single weights, once, offline."""
    from loram_cli.cli.draw.console import (
        print_json,
        prune_line,
        show_result,
        stage_lines,
        stdout_console,
    )
    from loram_cli.cli.draw.widths import widths_remarks, widths_table
    from loram_cli.config import defaults as resolve
    from loram_cli.stages.prune import stage as prune
    from loram_cli.units import format_bytes, format_params, parse_bytes

    values = options.layered(
        NAME,
        strategy=strategy,
        ratio=ratio,
        plan=plan,
        target_params=target_params,
        fit_memory=fit_memory,
        quantize=quantize,
        rank=rank,
        micro_batch=micro_batch,
        max_length=max_length,
        gradient_checkpointing=gradient_checkpointing,
        scope=scope,
        multiple_of=multiple_of,
        out=out,
        keep_first=keep_first,
        keep_last=keep_last,
        importance=importance,
        calibration=calibration,
        calibration_samples=calibration_samples,
        calibration_length=calibration_length,
        calibration_memory_bytes=parse_bytes(calibration_memory) if calibration_memory else None,
        dampening=dampening,
        block_columns=block_columns,
        device=device,
        seed=seed,
        force=force,
    )
    reporter = options.reporter_for(json_output)
    options.before_push(push)
    directory, name = options.settle(run, model, reporter, remember=False)
    options.tell_defaults(name, NAME, values, reporter)
    spec = resolve.prune_spec(directory, name, values)
    if dry_run:
        planned = prune.plan(spec).results()
        prune.check_output(spec)
        if json_output:
            print_json(planned)
            return
        console = stdout_console()
        console.print(
            f"would prune {spec.model} ({format_params(planned['base_params'])}) into {spec.out}: "
            + prune_line(planned)
        )
        if planned["calibration"]:
            c = planned["calibration"]
            hessians = c["hessian_memory_bytes"]
            console.print(
                f"calibration: {c['samples']} windows of {c['length']} tokens; one decoder layer "
                f"in memory, activations {format_bytes(c['activation_memory_bytes'])} in memory "
                f"and {format_bytes(c['activation_disk_bytes'])} on disk"
                + (f", Hessians {format_bytes(hessians)} at most" if hessians else "")
            )
        if planned["sparsity"]:
            return
        console.print(widths_table(planned))
        for remark in widths_remarks(planned):
            console.print(remark)
        return
    result = prune.run(spec, reporter)
    if out is None:
        directory.settle_model(name)
    options.after_push(push, result, reporter)
    show_result(result, stage_lines(result), json_output)
