"""What to evaluate, and what to ask: rows of models with their adapters."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loram_cli.errors import UsageError
from loram_cli.schema import Bytes, Spec, flag, setting
from loram_cli.stages.fit.spec import (
    DEVICE_FORM,
    DEVICE_HELP,
    HIGHEST_SEED,
    OUT_HELP,
    SEED_HELP,
    Quantization,
)
from loram_cli.training.data.layouts import Layout

AUTO = "auto"
Rows = dict[str, tuple[Path, ...]]
_LABEL = re.compile(r"[\w][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class RowsSpec(Spec):
    """Models to run, and how: what eval and generate share.

    Attributes:
        model: The original base.
        rows: Per row its model's directory and, if any, the adapter's.
    """

    model: Path = setting(
        help="The original base.", flag="", place=True, in_key=False, private=True
    )
    rows: Rows = setting(help="Models by name.", flag="", place=True, in_key=False)
    quantize: Quantization | None = setting(
        None, help="nf4: hold the decoder linears in 4 bits, which changes answers a little."
    )
    weights_memory: Bytes | None = setting(
        None,
        help="Memory for weights, such as 20GiB; more is read anew each pass.",
        default_text="most of what is free",
        at_least=1,
        in_key=False,
    )
    max_new_tokens: int | None = setting(None, help="Generated tokens at most.", at_least=1)
    device: str | None = setting(
        None, help=DEVICE_HELP, form=DEVICE_FORM, in_key=False, private=True
    )
    seed: int = setting(1234, help=SEED_HELP, at_least=0, at_most=HIGHEST_SEED)


@dataclass(frozen=True, kw_only=True)
class EvalSpec(RowsSpec):
    """What to evaluate."""

    out: Path = setting(help=OUT_HELP, place=True, in_key=False, private=True)
    tasks: tuple[str, ...] = setting(
        ("gsm8k", "perplexity"),
        help="Comma-separated: gsm8k (8-shot CoT), mathqa, csr (six tasks), humaneval, perplexity, "
        "or any task of lm-eval (lm_eval:gsm8k for its own of that name).",
    )
    task_data: dict[str, Path] = setting(
        factory=dict,
        help="NAME=FILE, local data of a task; NAME:train=FILE, its examples.",
        repeat=True,
        in_key=False,
    )
    demo_data: bool = setting(
        False,
        help="Use the demo's own held-out problems for gsm8k and perplexity.",
        flag="",
        place=True,
    )
    num_fewshot: int | None = setting(None, help="Examples in the prompt.", at_least=0)
    apply_chat_template: Literal["auto", "on", "off"] = setting(
        "auto",
        help="Ask questions as messages: auto (adapters trained on messages), on or off.",
        in_key="changed",
    )
    limit: int | None = setting(None, help="Documents per task at most.", at_least=1)
    batch_size: int | str = setting(
        AUTO,
        help="Documents per pass at most; auto grows while memory allows.",
        at_least=1,
        in_key=False,
    )
    code_samples: int | None = setting(
        None,
        help="humaneval: completions per problem and temperature, 1 is greedy.",
        default_text="10; 1 on the bundled sample",
        at_least=1,
    )
    temperatures: tuple[float, ...] | None = setting(
        None,
        help="humaneval: the best counts.",
        default_text="0,0.2,0.4,0.6,0.8; 0 for one sample",
        at_least=0,
    )
    allow_code_execution: bool = setting(False, help="Run generated code in a sandbox (humaneval).")
    backend: Literal["hf", "vllm"] = setting(
        "hf", help="hf, or vllm (needs the vllm extra and a GPU)."
    )
    replace: bool = setting(
        False,
        help="Replace results of other settings or inputs.",
        flag="",
        place=True,
        in_key=False,
    )
    force: bool = setting(
        False,
        help="Evaluate again, and forget kept answers.",
        place=True,
        switch=True,
        in_key=False,
        private=True,
    )

    def check(self) -> None:
        """Refuse settings that do not go together, and files that are not there.

        Raises:
            UsageError: See above.
        """
        if isinstance(self.batch_size, str) and self.batch_size != AUTO:
            raise UsageError(
                f"--batch-size {self.batch_size}: expected a number above 0, or {AUTO}"
            )
        for name in ("quantize", "weights_memory"):
            if self.backend != "hf" and getattr(self, name) is not None:
                raise UsageError(
                    f"{flag(self, name)} is for --backend hf", "vLLM has settings of its own"
                )
        if not self.tasks:
            raise UsageError("--tasks is empty", "for example --tasks gsm8k,humaneval,perplexity")
        for name, file in self.task_data.items():
            if not file.exists():
                raise UsageError(f"--task-data {name}={file}: no such file")
        for label in self.rows:
            if not _LABEL.fullmatch(label):
                raise UsageError(f"row '{label}': expected letters, digits, '.', '_' and '-'")


@dataclass(frozen=True, kw_only=True)
class AnswersSpec(RowsSpec):
    """How answers are asked for and drawn: what generate, chat and serve share."""

    layout: Layout | None = setting(
        None,
        help="question, instruction, messages, or prompt as it is.",
        default_text="as trained on",
    )
    max_new_tokens: int = setting(256, help="Tokens at most.", at_least=1)
    temperature: float = setting(0.0, help="0 takes the likeliest token.", at_least=0)
    top_p: float = setting(1.0, help="Share of probability to draw from.", above=0, at_most=1)
    stop: tuple[str, ...] = setting(
        (), help="Text that ends an answer; may be repeated.", repeat=True
    )

    def check(self) -> None:
        """Refuse settings that do not go together.

        Raises:
            UsageError: See above.
        """
        if not self.rows:
            raise UsageError("no model to ask", "pass --rows base")
        if self.top_p < 1 and not self.temperature:
            raise UsageError("--top-p is for drawn tokens", "pass --temperature as well")


@dataclass(frozen=True, kw_only=True)
class GenerateSpec(AnswersSpec):
    """What to ask, and whom."""

    prompts: tuple[str, ...] = setting(
        (),
        help="What to ask; quote each. Without one, what is piped in.",
        argument=True,
        place=True,
    )

    def check(self) -> None:
        """Refuse an empty prompt, and settings that do not go together.

        Raises:
            UsageError: See above.
        """
        super().check()
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise UsageError("the prompt is empty", "write it behind the command, or pipe it in")
        try:
            "".join(self.prompts).encode()
        except UnicodeEncodeError as error:
            raise UsageError("the prompt is not UTF-8", "convert it to UTF-8") from error
