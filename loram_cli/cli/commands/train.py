"""``loram train``."""

from pathlib import Path
from typing import Annotated

import typer

from loram_cli.cli import options

NAME = "train"
EPILOG = "Example: loram train --data instructions.jsonl --quantize nf4"


def command(
    data: Annotated[
        str | None,
        typer.Option(
            help="Instructions, preferences or word problems: .jsonl file or data set id."
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="sft (given answers), dpo (one answer over another) or grpo (drawn answers, "
            "rewarded when right). (default: sft)",
            autocompletion=options.choices("train", "objective"),
        ),
    ] = None,
    from_adapter: Annotated[
        Path | None,
        typer.Option(
            help="Go on from an earlier adapter; it is the reference of dpo and grpo, which "
            "take the run's own unless given."
        ),
    ] = None,
    run: options.Run = None,
    source: Annotated[
        Path | None,
        typer.Option("--in", help="Model directory, not the run's aligned or pruned one."),
    ] = None,
    out: options.Out = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out data, like --data.")] = None,
    eval_examples: Annotated[
        int | None, typer.Option(help="How many to hold out. (default: 64)")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="nf4: hold the frozen model in 4 bits.",
            autocompletion=options.choices("train", "quantize"),
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. (default: 400)")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate. (default: 1e-5)")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Linear warm-up. (default: 100)")] = None,
    batch: Annotated[int | None, typer.Option(help="Examples per step. (default: 128)")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Examples per pass. (default: 4)")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens per example. (default: 512)")
    ] = None,
    rank: options.Rank = None,
    alpha: Annotated[int | None, typer.Option(help="LoRA alpha. (default: 16)")] = None,
    dropout: Annotated[
        float | None, typer.Option(help="LoRA dropout. (default: 0.05; sft alone)")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Modules, comma-separated. (default: all)")
    ] = None,
    loss_on: Annotated[
        str | None,
        typer.Option(
            help="answer or all. (default: answer)",
            autocompletion=options.choices("train", "loss_on"),
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(help="Weight of the reference. (default: 0.1 for dpo, 0 for grpo)"),
    ] = None,
    generations: Annotated[
        int | None, typer.Option(help="grpo: completions per question. (default: 8)")
    ] = None,
    max_completion_length: Annotated[
        int | None,
        typer.Option(help="grpo: tokens of a completion. (default: 256, half of --max-length)"),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="grpo: completions are drawn at it. (default: 1)")
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps per checkpoint. (default: 50)")
    ] = None,
    eval_steps: Annotated[
        int | None, typer.Option(help="Steps per evaluation. (default: 50)")
    ] = None,
    gradient_checkpointing: options.GradientCheckpointing = None,
    cross_entropy: options.CrossEntropy = None,
    attention: options.Attention = None,
    optimizer: options.Optimizer = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="auto, fp32 or bf16. (default: auto)",
            autocompletion=options.choices("train", "precision"),
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
    """Fit LoRA on the small model (QLoRAM with --quantize nf4), by SFT, DPO or GRPO."""
    from loram_cli.cli.draw.console import show_result, stage_lines
    from loram_cli.cli.draw.plans import show_plans
    from loram_cli.config import defaults as resolve
    from loram_cli.stages.train import stage as train

    values = options.layered(
        NAME,
        data=data,
        objective=objective,
        from_adapter=from_adapter,
        source=source,
        out=out,
        eval_data=eval_data,
        eval_examples=eval_examples,
        quantize=quantize,
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        batch=batch,
        micro_batch=micro_batch,
        max_length=max_length,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=options.comma_separated(targets),
        loss_on=loss_on,
        beta=beta,
        generations=generations,
        max_completion_length=max_completion_length,
        temperature=temperature,
        save_steps=save_steps,
        eval_steps=eval_steps,
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
    options.tell_defaults(name, NAME, values, reporter)
    spec = resolve.train_spec(directory, name, values)
    if dry_run:
        show_plans([train.plan(spec, reporter, count=True)], json_output)
        return
    result = train.run(spec, reporter)
    options.after_push(push, result, reporter)
    show_result(result, stage_lines(result), json_output)
