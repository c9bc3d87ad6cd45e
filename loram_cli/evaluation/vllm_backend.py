"""The optional backend: vLLM, through lm-eval's own wrapper, with the adapter as a LoRA request.

Not covered by the default tests beyond its translation of requests: it needs a GPU and the
``vllm`` extra.
"""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loram_cli.errors import LoramError, UsageError
from loram_cli.evaluation.decode import Generation
from loram_cli.evaluation.engine import Done
from loram_cli.evaluation.scoring import SpanScore, TokenSpan

# vLLM schedules within a call; what it has answered is kept after each.
_REQUESTS_PER_CALL = 256
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def check_available() -> None:
    """Refuse early where vLLM is not installed.

    Raises:
        UsageError: It is not.
    """
    if find_spec("vllm") is None:
        raise UsageError(
            "--backend vllm: vLLM is not installed here",
            "pip install 'loram[vllm]' (Linux with a GPU), or leave --backend out",
        )


def vllm_arguments(parts: Sequence[Path], context_tokens: int, seed: int) -> dict[str, Any]:
    """Arguments of lm-eval's ``VLLM`` for a row.

    Args:
        parts: The model's directory and, if any, the adapter's.
        context_tokens: The model's context.
        seed: Of the engine.

    Raises:
        LoramError: Layers of uneven width, which vLLM does not build.
    """
    model = parts[0]
    config = json.loads((model / "config.json").read_text("utf-8"))
    if config.get("per_layer_config"):
        raise LoramError(
            f"{model}: vLLM does not build layers of uneven width",
            "leave the row out (--rows), or evaluate it with --backend hf",
        )
    arguments: dict[str, Any] = {
        "pretrained": str(model),
        "max_model_len": context_tokens,
        "seed": seed,
        "batch_size": "auto",
    }
    if len(parts) > 1:
        adapter = json.loads((parts[1] / "adapter_config.json").read_text("utf-8"))
        rank = max([adapter["r"], *adapter.get("rank_pattern", {}).values()])
        arguments["lora_local_path"] = str(parts[1])
        arguments["max_lora_rank"] = next((r for r in _RANKS if r >= rank), rank)
    return arguments


class VllmBackend:
    """Generates and scores with vLLM.

    Args:
        language_model: lm-eval's ``VLLM``, or one that acts like it.
    """

    def __init__(self, language_model: Any) -> None:
        self._model = language_model

    @classmethod
    def open(cls, parts: Sequence[Path], context_tokens: int, seed: int) -> "VllmBackend":
        """Start the engine on a row's model and adapter.

        Raises:
            UsageError: vLLM is not installed.
            LoramError: It cannot run this model.
        """
        check_available()
        arguments = vllm_arguments(parts, context_tokens, seed)
        try:
            from lm_eval.models.vllm_causallms import VLLM

            return cls(VLLM(**arguments))
        except Exception as error:
            # vLLM raises a different class for each way to fail.
            reason = " ".join(str(error).split())[:160]
            raise LoramError(
                f"vLLM cannot run {' + '.join(map(str, parts))} ({type(error).__name__}: {reason})",
                "evaluate it with --backend hf",
            ) from error

    def generate(self, jobs: Sequence[Generation], done: Done) -> None:
        """Texts; a sampled one has its own seed."""
        requests = [_Request(job.prompt, _generation_arguments(job)) for job in jobs]
        self._call(self._model.generate_until, requests, done)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], done: Done) -> None:
        """Log-likelihoods of continuations."""
        requests = [_Request(*pair) for pair in pairs]
        self._call(
            self._model.loglikelihood,
            requests,
            lambda batch: done([(place, [a[0], bool(a[1])]) for place, a in batch]),
        )

    def rolling(self, texts: Sequence[str], done: Done) -> None:
        """Log-likelihoods of whole texts."""
        self._call(self._model.loglikelihood_rolling, [_Request(t) for t in texts], done)

    def score(self, spans: Sequence[TokenSpan], done: Done) -> None:
        """Log-likelihoods of token spans."""
        requests = [(None, list(s.ids[: s.start]), list(s.ids[s.start :])) for s in spans]

        def tell(batch: Sequence[tuple[int, Any]]) -> None:
            lengths = [len(spans[place].ids) - spans[place].start for place, _ in batch]
            done(
                [
                    (place, SpanScore(answer[0], length, bool(answer[1])))
                    for (place, answer), length in zip(batch, lengths, strict=True)
                ]
            )

        self._call(self._model._loglikelihood_tokens, requests, tell)

    @staticmethod
    def _call(method: Any, requests: Sequence[Any], done: Done) -> None:
        for first in range(0, len(requests), _REQUESTS_PER_CALL):
            answers = method(requests[first : first + _REQUESTS_PER_CALL], disable_tqdm=True)
            done(list(enumerate(answers, first)))


class _Request:
    """What lm-eval's model classes read of one of its requests."""

    task_name = None

    def __init__(self, *args: Any) -> None:
        self.args = args


def _generation_arguments(job: Generation) -> dict[str, Any]:
    arguments: dict[str, Any] = {"until": list(job.stops), "max_gen_toks": job.max_new_tokens}
    if job.temperature <= 0:
        return {**arguments, "do_sample": False, "temperature": 0.0}
    sampled = {"do_sample": True, "temperature": job.temperature, "top_p": job.top_p}
    if job.top_k > 0:
        sampled["top_k"] = job.top_k
    return {**arguments, **sampled, "seed": job.seed % 2**63}
