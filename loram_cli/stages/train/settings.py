"""What training may be told, whatever its objective."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loram_cli.memory.setup import Packing
from loram_cli.schema import redefined, setting
from loram_cli.stages.fit.spec import COMPILE_HELP, RANK_HELP, FitSpec, Quantization
from loram_cli.training.choices import Keep, Precision

# Where neither epochs nor steps are given.
EPOCHS = 3.0
SFT_RATE = 2e-4
# Ten times TRL's own of whole models, as LoRA's best rates are ("LoRA Without Regret").
POLICY_RATE = 1e-5


@dataclass(frozen=True, kw_only=True)
class TrainSettings(FitSpec):
    """The settings of train; where the defaults come from is said in ``docs/training.md``."""

    source: Path = redefined(
        FitSpec, "source", help="Model directory, not the run's aligned or pruned one."
    )
    data: str = redefined(
        FitSpec,
        "data",
        help="Instructions (sft), preferences (dpo, orpo), judged answers (kto) or prompts (grpo): "
        "a file, a folder or a data set id.",
    )
    objective: str = setting(
        "sft",
        help="sft (given answers), dpo or orpo (one answer over another), kto (good and bad ones) "
        "or grpo (drawn answers, rewarded).",
    )
    from_adapter: Path | None = setting(
        None,
        help="Resume from an earlier adapter of the same model. It is the reference of dpo, kto "
        "and grpo, which take the run's own unless told.",
        in_key=False,
        private=True,
    )
    eval_data: str | None = setting(None, help="Held-out data, like --data.")
    eval_examples: int = setting(64, help="Examples to hold out.", at_least=0)
    max_length: int = setting(512, help="Tokens per example.", at_least=1)
    loss_on: Literal["answer", "all"] = setting("answer", help="answer, or all tokens.")
    train_on: Literal["all", "last"] = setting(
        "all", help="Of a conversation: all answers, or the last (SFT only).", in_key="changed"
    )
    chat_template: str | None = setting(
        None,
        help="Template for messages: a Jinja file, or a name such as chatml or llama3.",
        default_text="the model's own",
        in_key="changed",
    )
    steps: int | None = setting(None, help="Optimizer steps, in place of --epochs.", at_least=1)
    epochs: float | None = setting(
        None, help="Passes over the data.", default_text=f"{EPOCHS:g}", above=0, in_key="changed"
    )
    learning_rate: float | None = setting(
        None,
        help="Peak of the schedule.",
        default_text=f"{SFT_RATE:.0e} for sft, {POLICY_RATE:.0e} for the others".replace(
            "e-0", "e-"
        ),
        above=0,
    )
    warmup_steps: int | None = setting(
        None, help="Steps of linear warm-up.", default_text="3% of the steps", at_least=0
    )
    batch: int = redefined(
        FitSpec,
        "batch",
        16,
        help="Examples per step; of grpo completions, by default eight questions of --generations.",
    )
    micro_batch: int = redefined(FitSpec, "micro_batch", 4, help="Examples per forward pass.")
    precision: Precision = redefined(
        FitSpec,
        "precision",
        help="auto (bf16 on a GPU that has it, and on AMX from 50M parameters), fp32 or bf16.",
    )
    compile: bool = setting(False, help=f"{COMPILE_HELP[:-1]} (SFT only).", in_key=False)
    packing: Packing = setting(
        "auto",
        help="auto (examples of like length share a pass, and rows where more than 5% would be "
        "padding), on (one row, no padding) or off. Examples never see each other.",
        in_key="changed",
    )
    early_stopping: int | None = setting(
        None,
        help="Stop after so many evaluations without a new best one.",
        at_least=1,
        in_key="changed",
    )
    keep: Keep = setting(
        "best",
        help="best (the checkpoint with the lowest held-out loss) or last.",
        in_key="changed",
    )
    keep_checkpoints: int = setting(
        10,
        help="Adapters of checkpoints to keep beside the best one, for recover --checkpoint.",
        at_least=0,
        in_key="changed",
    )
    score_recovered: bool = setting(
        False,
        help="Take every kept checkpoint's held-out loss on the full model too, and keep the best "
        "by it (SFT only).",
        in_key="changed",
    )
    rank: int = setting(8, help=RANK_HELP, at_least=1)
    alpha: int = setting(16, help="LoRA alpha: the update is scaled by alpha / r.", at_least=1)
    rslora: bool = setting(
        False,
        help="Scale the update by alpha / sqrt(r) (rank-stabilized LoRA).",
        in_key="changed",
    )
    dropout: float | None = setting(
        None, help="LoRA dropout (SFT only).", default_text="0.05", at_least=0, below=1
    )
    targets: tuple[str, ...] = setting(
        (),
        help="Modules that get factors, comma-separated; all-linear: all but the head.",
        default_text="all, an untied head included",
    )
    quantize: Quantization | None = setting(
        None, help="nf4: hold the frozen model in 4 bits (QLoRAM)."
    )
    stream: bool = setting(
        False,
        help="Bring the frozen layers one by one, twice a step: the same result, for a model that "
        "exceeds the memory (SFT only).",
        in_key=False,
    )
    offload_activations: bool = setting(
        False,
        help="With --stream: keep hidden states between layers off the GPU; on a CPU, in a file.",
        in_key=False,
    )
    beta: float | None = setting(
        None,
        help="Weight of the reference (dpo, kto, grpo) or of the odds ratio (orpo).",
        default_text="0.1; 0 for grpo",
        at_least=0,
    )
    generations: int | None = setting(
        None, help="grpo: completions per question.", default_text="8", at_least=2
    )
    max_completion_length: int | None = setting(
        None,
        help="grpo: tokens of a completion.",
        default_text="256, or half of --max-length",
        at_least=1,
    )
    reward: tuple[str, ...] = setting(
        (),
        help="grpo: FILE.py:FUNCTION, called as TRL calls one, or exact; may be repeated.",
        default_text="exact",
        repeat=True,
        in_key="changed",
    )
    reward_weights: tuple[float, ...] = setting(
        (),
        help="grpo: of each --reward in their sum; below 0 for a penalty.",
        default_text="1 each",
        at_least=-1000,
        at_most=1000,
        in_key="changed",
    )
    allow_code_execution: bool = setting(
        False, help="Run the Python files of --reward, with all of your rights.", in_key=False
    )
    temperature: float | None = setting(
        None, help="grpo: completions are drawn at it.", default_text="1", above=0
    )
