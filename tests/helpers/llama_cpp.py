"""llama.cpp's own engine, through the package xllamacpp: greedy answers and log-probabilities."""

import json
from pathlib import Path


class Engine:
    """A GGUF model in llama.cpp on the processor, with or without a LoRA file."""

    def __init__(self, model: Path, lora: Path | None = None) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_gpu_layers = 0
        params.n_ctx = 1024
        params.n_parallel = 1
        params.warmup = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        # As exact as it computes, so that what is left is the weights' own error.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self._server = xllamacpp.Server(params)

    def answer(
        self, ids: list[int], count: int, top: int = 20
    ) -> tuple[list[int], dict[int, float]]:
        """The greedy next tokens, and the first one's likeliest tokens with log-probabilities."""
        told = self._server.handle_completions(
            {
                "prompt": ids,
                "n_predict": count,
                "temperature": 0.0,
                "n_probs": top,
                "cache_prompt": False,
            }
        )
        told = json.loads(told) if isinstance(told, str) else told
        steps = told["choices"][0]["logprobs"]["content"]
        likeliest = {entry["id"]: entry["logprob"] for entry in steps[0]["top_logprobs"]}
        return [step["id"] for step in steps], likeliest
