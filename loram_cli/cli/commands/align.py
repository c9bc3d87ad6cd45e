"""``loram align``."""

from pathlib import Path
from typing import Annotated

import typer

from loram_cli.cli import options

NAME = "align"
EPILOG = "Example: loram align --data fineweb-sample.jsonl --steps 400"


def command(
    data: Annotated[
        str | None, typer.Option(help="Text: .txt, .jsonl, a folder, a data set id.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="reconstruct, distill, pretrain, or several by commas. (default: pretrain)"
        ),
    ] = None,
    run: options.Run = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            help="The full model, for reconstruct and distill; else where prune found it.",
        ),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--in", help="Pruned directory, not the run's.")
    ] = None,
    out: options.Out = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. (default: 400)")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate. (default: 5e-5)")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Linear warm-up. (default: 20)")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows per step. (default: 32)")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Rows per forward pass. (default: 4)")
    ] = None,
    block_length: Annotated[int | None, typer.Option(help="Tokens per row. (default: 512)")] = None,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps per checkpoint. (default: 50)")
    ] = None,
    eval_steps: Annotated[
        int | None, typer.Option(help="Steps per evaluation. (default: 50)")
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(help="reconstruct: windows of text. (default: 128)")
    ] = None,
    calibration_memory: Annotated[
        str | None,
        typer.Option(help="reconstruct: memory for activations, else disk. (default: 4GiB)"),
    ] = None,
    ridge: Annotated[
        float | None, typer.Option(help="reconstruct: pull of the old weights. (default: 0.01)")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="reconstruct: inputs of the full layers, full or local. (default: full)"),
    ] = None,
    block_steps: Annotated[
        int | None, typer.Option(help="reconstruct: gradient steps a layer. (default: 0)")
    ] = None,
    block_learning_rate: Annotated[
        float | None, typer.Option(help="reconstruct: their rate. (default: 1e-3)")
    ] = None,
    distill_temperature: Annotated[
        float | None, typer.Option(help="distill: softens both models. (default: 1)")
    ] = None,
    train_lm_head: Annotated[
        bool | None, typer.Option("--train-lm-head/--no-train-lm-head", help="Train the head too.")
    ] = None,
    gradient_checkpointing: options.GradientCheckpointing = None,
    cross_entropy: options.CrossEntropy = None,
    attention: options.Attention = None,
    optimizer: options.Optimizer = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="auto, fp32 or bf16. (default: auto)",
            autocompletion=options.choices("align", "precision"),
        ),
    ] = None,
    report_to: options.ReportTo = None,
    fsdp: options.Fsdp = None,
    device: options.Device = None,
    seed: options.Seed = None,
    push: options.Push = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json_output: options.Json = False,
) -> None:
    """Bring the pruned model back towards the full one, so that its updates fit it."""
    from loram_cli.cli.draw.console import show_result, stage_lines
    from loram_cli.cli.draw.plans import show_plans
    from loram_cli.config import defaults as resolve
    from loram_cli.stages.align import stage as align
    from loram_cli.units import parse_bytes

    values = options.layered(
        NAME,
        data=data,
        method=options.comma_separated(method),
        model=model,
        source=source,
        out=out,
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        batch=batch,
        micro_batch=micro_batch,
        block_length=block_length,
        save_steps=save_steps,
        eval_steps=eval_steps,
        calibration_samples=calibration_samples,
        calibration_memory_bytes=parse_bytes(calibration_memory) if calibration_memory else None,
        ridge=ridge,
        targets=targets,
        block_steps=block_steps,
        block_learning_rate=block_learning_rate,
        distill_temperature=distill_temperature,
        train_lm_head=train_lm_head,
        gradient_checkpointing=gradient_checkpointing,
        cross_entropy=cross_entropy,
        attention=attention,
        optimizer=optimizer,
        precision=precision,
        report_to=options.comma_separated(report_to),
        fsdp=fsdp,
        device=device,
        seed=seed,
        force=force,
    )
    reporter = options.reporter_for(json_output)
    options.before_push(push)
    directory, name = options.settle(run, None, reporter, remember=False)
    if "source" not in values:
        values["source"] = directory.require("prune")
    options.tell_defaults(name, NAME, values, reporter)
    spec = resolve.align_spec(directory, name, values)
    if dry_run:
        show_plans([align.plan(spec, reporter, count=True)], json_output)
        return
    result = align.run(spec, reporter)
    options.after_push(push, result, reporter)
    show_result(result, stage_lines(result), json_output)
