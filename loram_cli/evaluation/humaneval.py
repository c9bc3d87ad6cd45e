"""HumanEval scored in the sandbox: functional correctness of generated functions.

Source: Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374.
"""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from loram_cli.errors import UsageError
from loram_cli.evaluation.catalog import TOP_P
from loram_cli.evaluation.sandbox import SandboxResult, run_program
from loram_cli.reporting import NullReporter, Reporter
from loram_cli.units import MIB

# Prompt, target and stops are those of lm-eval's stock task, which itself cannot be loaded
# offline: it fetches its metric from the hub while it is imported, and runs code in-process.
TASK_CONFIG: dict[str, Any] = {
    "task": "humaneval",
    "dataset_path": "openai/openai_humaneval",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{test}}\ncheck({{entry_point}})",
    "metric_list": [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}],
    "generation_kwargs": {
        "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
        "max_gen_toks": 1024,
        "do_sample": False,
    },
    "repeats": 1,
    "num_fewshot": 0,
    "metadata": {"version": 1.0},
}


def program_for(problem: Mapping[str, Any], completion: str) -> str:
    """The program that ends without error if the completion is right."""
    call = f"check({problem['entry_point']})"
    return f"{problem['prompt']}{completion}\n{problem['test']}\n{call}\n"


def check_completions(
    problems: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    *,
    timeout_seconds: float = 10.0,
    memory_bytes: int = 512 * MIB,
    reporter: Reporter | None = None,
) -> list[SandboxResult]:
    """Run every completion with its problem's tests, one sandbox each, one for each core."""
    programs = [
        program_for(problem, text) for problem, text in zip(problems, completions, strict=True)
    ]

    def run(source: str) -> SandboxResult:
        return run_program(source, timeout_seconds=timeout_seconds, memory_bytes=memory_bytes)

    results = []
    with (
        (reporter or NullReporter()).progress("sandbox", len(programs), "program") as progress,
        ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool,
    ):
        for result in pool.map(run, programs):
            results.append(result)
            progress.advance()
    return results


@dataclass(frozen=True)
class CodeSettings:
    """How HumanEval is sampled.

    Args:
        samples: Completions of each problem at every temperature above 0; at 0 there is one.
        temperatures: The best one is reported, as in arXiv 2502.13533.
        top_p: Of the sampling.
    """

    samples: int = 1
    temperatures: tuple[float, ...] = (0.0,)
    top_p: float = TOP_P

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError("--code-samples must be above 0")
        if not self.temperatures or any(not 0 <= t <= 5 for t in self.temperatures):
            raise UsageError("--temperatures: expected numbers from 0 on, such as 0,0.2,0.8")

    @property
    def tries(self) -> tuple[int, ...]:
        """The k of pass@k that so many completions can tell."""
        return tuple(k for k in (1, 10) if k <= self.samples)

    def repeats(self, temperature: float) -> int:
        """Completions to generate at a temperature."""
        return self.samples if temperature > 0 else 1


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of pass@k for one problem, ``1 - C(n-c, k) / C(n, k)``.

    Source: arXiv 2107.03374, equation 1.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {correct} correct among {samples} samples is not defined")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
