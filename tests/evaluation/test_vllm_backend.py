"""What can be tested without vLLM: how rows and requests are put to lm-eval's wrapper of it."""

import itertools
import json

import pytest

from loram_cli.errors import LoramError, UsageError
from loram_cli.evaluation import vllm_backend
from loram_cli.evaluation.decode import Generation
from loram_cli.evaluation.scoring import SpanScore, TokenSpan
from loram_cli.evaluation.vllm_backend import VllmBackend, vllm_arguments
from loram_cli.memory.presets import load_preset


@pytest.fixture
def places(tmp_path):
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    for folder, name, content in (
        (model, "config.json", load_preset("llama2-7b")),
        (adapter, "adapter_config.json", {"r": 12, "rank_pattern": {}}),
    ):
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
    return model, adapter


def test_an_adapter_becomes_a_lora_request(places):
    model, adapter = places
    plain = vllm_arguments([model], 512, 7)
    assert plain == {
        "pretrained": str(model),
        "max_model_len": 512,
        "seed": 7,
        "batch_size": "auto",
    }
    added = vllm_arguments(places, 512, 7)
    assert added == {**plain, "lora_local_path": str(adapter), "max_lora_rank": 16}


def test_uneven_layers_are_refused(places):
    model, _ = places
    (model / "config.json").write_text(json.dumps({"per_layer_config": {"1": {}}}))
    with pytest.raises(LoramError, match=r"does not build layers of uneven width\n.*--rows"):
        vllm_arguments([model], 512, 7)


def test_absence_is_told_with_the_way_to_install(places, monkeypatch):
    monkeypatch.setattr(vllm_backend, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"not installed here\npip install 'loram\[vllm\]'"):
        VllmBackend.open(places, 512, 7)


class Fake:
    def __init__(self):
        self.calls = []

    def generate_until(self, requests, disable_tqdm):
        self.calls.append([request.args for request in requests])
        return [request.args[0].upper() for request in requests]

    def loglikelihood(self, requests, disable_tqdm):
        return [(-1.5, 1) for _ in requests]

    def _loglikelihood_tokens(self, requests, disable_tqdm):
        return [(-float(len(continuation)), False) for _, _, continuation in requests]


def test_requests_and_answers_are_translated(monkeypatch):
    monkeypatch.setattr(vllm_backend, "_REQUESTS_PER_CALL", 2)
    fake = Fake()

    def answers_of(batches):
        return dict(itertools.chain.from_iterable(batches))

    backend = VllmBackend(fake)
    jobs = [Generation("a", ("\n",), 5), Generation("b", (), 6, 0.2, 0.95, 0, 11)]
    assert answers_of(backend.generate([*jobs, jobs[0]])) == {0: "A", 1: "B", 2: "A"}
    assert [len(call) for call in fake.calls] == [2, 1]
    greedy, sampled = (arguments for _, arguments in fake.calls[0])
    assert greedy == {"until": ["\n"], "max_gen_toks": 5, "do_sample": False, "temperature": 0.0}
    assert sampled == {
        "until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 0.2, "top_p": 0.95,
        "seed": 11,
    }  # fmt: skip
    assert answers_of(backend.loglikelihood([("a", "b")]))[0] == [-1.5, True]
    assert answers_of(backend.score([TokenSpan((1, 2, 3, 4), 1)]))[0] == SpanScore(-3.0, 3, False)
