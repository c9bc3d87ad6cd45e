"""Every command's module by its name, loaded when the command is named."""

import importlib
from types import ModuleType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from loram_cli.cli.from_spec import command_of

# Name, module, and what the list of commands says: the first line of the command's own help.
COMMANDS = {
    "prune": (
        "prune",
        "Drop whole attention groups and MLP channels, or zero single weights, once, offline.",
    ),
    "align": (
        "align",
        "Bring the pruned model back towards the full one, so that its updates fit it.",
    ),
    "data": (
        "data",
        "Show what training would learn from a data set: rows, lengths, what is left out and why.",
    ),
    "train": (
        "train",
        "Fit LoRA on the small model (QLoRAM with --quantize nf4), by SFT, DPO, ORPO, KTO or GRPO.",
    ),
    "recover": (
        "recover",
        "Scatter the small LoRA factors back to the full model's shapes, and check them.",
    ),
    "polish": (
        "polish",
        "Go on from the recovered adapter for a few exact steps on the full model, layer by layer.",
    ),
    "eval": ("evaluate", "Compare base, pruned and recovered models on the same held-out tasks."),
    "generate": (
        "generate",
        "Ask the full model with the recovered adapter, whether or not the GPU holds it.",
    ),
    "chat": (
        "chat",
        "Talk to the models in the terminal, turn by turn; /row NAME has another one answer.",
    ),
    "serve": (
        "serve",
        "Answer OpenAI's chat and completion requests, each row a model name; for trying.",
    ),
    "export": (
        "export",
        "Write the recovered adapter as GGUF, for llama.cpp and Ollama: alone, or merged.",
    ),
    "memory-report": (
        "memory_report",
        "Tell what training base, pruned and NF4 models takes, without loading any.",
    ),
    "bench": (
        "bench",
        "Take real training steps on random weights of true shapes: peak memory and throughput.",
    ),
    "run": (
        "run",
        "Run the stages of a recipe: what is done is skipped, what was interrupted resumes.",
    ),
    "report": (
        "report",
        "Write a run as one HTML page: scores, loss curves, widths, specs; nothing to load.",
    ),
    "verify": (
        "verify",
        "Check files, shapes and ancestry of a directory against what was recorded.",
    ),
    "inspect": (
        "inspect",
        "Show what a directory is: stage, base, widths per layer, spec and results.",
    ),
    "import": (
        "import_gguf",
        "Turn a GGUF model into a directory that --model takes, through transformers' reader.",
    ),
}


def load(name: str) -> ModuleType:
    """The module of a command: ``NAME``, ``EPILOG``, ``SPEC``, ``OPTIONS`` and ``command``."""
    return importlib.import_module(f"loram_cli.cli.commands.{COMMANDS[name][0]}")


def build(name: str) -> TyperCommand:
    """A command with its flags."""
    module = load(name)
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    function = command_of(module.command, module.SPEC, module.OPTIONS)
    alone.command(name, epilog=module.EPILOG)(function)
    built = typer.main.get_command(alone)
    assert isinstance(built, TyperCommand)
    return built


class CommandGroup(TyperGroup):
    """Lists the commands from the table, and loads the one that is named."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, (_, summary) in COMMANDS.items():
            self.commands[name] = TyperCommand(name, help=summary)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that the words name, built now."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, build(name) if name in COMMANDS else command, rest
