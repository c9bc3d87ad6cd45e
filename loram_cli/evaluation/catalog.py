"""The paper's tasks by the names it uses: which of lm-eval's tasks they are, and how asked.

Source: arXiv 2502.13533, section 3 (downstream tasks): GSM8K with 8 chain-of-thought examples,
MathQA and six common-sense tasks with one, HumanEval over five temperatures.
"""

from dataclasses import dataclass
from pathlib import Path

_SAMPLES = Path(__file__).parent / "tasks"
OWN_PREFIX = "lm_eval:"


@dataclass(frozen=True)
class NamedTask:
    """A task under its short name.

    Attributes:
        members: lm-eval's tasks; several make a group with a mean.
        num_fewshot: Solved examples in the prompt; None leaves lm-eval's own number.
        variant: What a reader must know of how it is asked.
        hub_data: Data set of the hub, where a bundled sample may stand in for it.
        sample: The bundled sample, own-written.
        sample_task: lm-eval's task that the sample is asked as, without examples.
    """

    members: tuple[str, ...]
    num_fewshot: int | None = None
    variant: str = ""
    hub_data: str | None = None
    sample: Path | None = None
    sample_task: str | None = None


CSR = ("arc_challenge", "arc_easy", "piqa", "hellaswag", "winogrande", "openbookqa")
CATALOG: dict[str, NamedTask] = {
    "gsm8k": NamedTask(
        ("gsm8k_cot",),
        8,
        "CoT",
        hub_data="openai/gsm8k",
        sample=_SAMPLES / "gsm8k_sample.jsonl",
        # What gsm8k-style training data is rendered as, see training/data.py.
        sample_task="gsm8k",
    ),
    "mathqa": NamedTask(("mathqa",), 1),
    "csr": NamedTask(CSR, 1),
    "humaneval": NamedTask(
        ("humaneval",),
        0,
        hub_data="openai/openai_humaneval",
        sample=_SAMPLES / "humaneval_sample.jsonl",
        sample_task="humaneval",
    ),
    "perplexity": NamedTask(("perplexity",), sample=_SAMPLES / "gsm8k_sample.jsonl"),
}
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8)
TOP_P = 0.95
CODE_SAMPLES = 10


def named_task(name: str) -> NamedTask:
    """The entry of a name; any name that is not the catalogue's is lm-eval's own."""
    if name.startswith(OWN_PREFIX):
        return NamedTask((name.removeprefix(OWN_PREFIX),))
    return CATALOG.get(name) or NamedTask((name,))
