"""The optional backend: vLLM, through lm-eval's own wrapper, with the adapter as a LoRA request.

Not covered by the default tests beyond its translation of requests: it needs a GPU and the
``vllm`` extra.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loram_cli.checkpoint.index import read_json
from loram_cli.checkpoint.model import Model
from loram_cli.errors import LoramError, UsageError
from loram_cli.evaluation.decode import Generation
from loram_cli.evaluation.engine import Batches
from loram_cli.evaluation.scoring import SpanScore, TokenSpan
from loram_cli.lora.adapter import CONFIG_NAME

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

    Raises:
        LoramError: Layers of uneven width, which vLLM does not build.
    """
    model = parts[0]
    if Model.open(model).config.get("per_layer_config"):
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
        adapter = read_json(parts[1] / CONFIG_NAME)
        rank = max([adapter["r"], *adapter.get("rank_pattern", {}).values()])
        arguments["lora_local_path"] = str(parts[1])
        arguments["max_lora_rank"] = next((r for r in _RANKS if r >= rank), rank)
    return arguments


class VllmBackend:
    """Generates and scores with vLLM."""

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

    def generate(self, jobs: Sequence[Generation]) -> Batches:
        """Texts; a sampled one has its own seed."""
        requests = [_Request(job.prompt, _generation_arguments(job)) for job in jobs]
        return self._call(self._model.generate_until, requests)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> Batches:
        """Log-likelihoods of continuations."""
        for batch in self._call(self._model.loglikelihood, [_Request(*pair) for pair in pairs]):
            yield [(place, [answer[0], bool(answer[1])]) for place, answer in batch]

    def rolling(self, texts: Sequence[str]) -> Batches:
        """Log-likelihoods of whole texts."""
        return self._call(self._model.loglikelihood_rolling, [_Request(text) for text in texts])

    def score(self, spans: Sequence[TokenSpan]) -> Batches:
        """Log-likelihoods of token spans."""
        requests = [(None, list(s.ids[: s.start]), list(s.ids[s.start :])) for s in spans]
        for batch in self._call(self._model._loglikelihood_tokens, requests):
            yield [
                (place, SpanScore(answer[0], len(requests[place][2]), bool(answer[1])))
                for place, answer in batch
            ]

    @staticmethod
    def _call(method: Any, requests: Sequence[Any]) -> Batches:
        for first in range(0, len(requests), _REQUESTS_PER_CALL):
            asked = requests[first : first + _REQUESTS_PER_CALL]
            yield list(enumerate(method(asked, disable_tqdm=True), first))


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
