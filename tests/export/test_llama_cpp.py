"""The exported files in llama.cpp's own engine, beside transformers and PEFT."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from helpers.llama_cpp import Engine
from helpers.smollm2 import gsm8k, smollm2

from loram_cli.export.gguf_adapter import export_adapter
from loram_cli.export.gguf_file import GgufFile, PlannedTensor, padding, write_header
from loram_cli.export.gguf_merge import merge, plan_merge
from loram_cli.export.gguf_types import decode, encode
from loram_cli.lora.adapter import LoraAdapter
from loram_cli.reporting import NullReporter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PROMPTS, TOKENS, TOP = 20, 24, 20


@dataclass
class World:
    """A real model in both formats, an adapter for it, and what transformers says.

    Attributes:
        folder: Of everything.
        gguf: The model in float16.
        prompts: Token ids.
        base: Log-probabilities of each prompt's first answer token without the adapter.
        adapted: The same with it.
        answers: Greedy answers with it.
        gaps: Per answer and step, how far the second choice is behind.
    """

    folder: Path
    model: Path
    gguf: Path
    prompts: list[list[int]]
    base: list[torch.Tensor]
    adapted: list[torch.Tensor]
    answers: list[list[int]]
    gaps: list[list[float]]


def all_as(source: Path, out: Path, kind: Type) -> Path:
    """A GGUF model with all its matrices in one type, rounded to bfloat16 as the directory is."""
    file = GgufFile.open(source)
    planned = [
        PlannedTensor(t.name, kind if len(t.shape) > 1 else t.kind, t.shape)
        for t in file.tensors.values()
    ]
    with out.open("wb") as to:
        write_header(to, file.version, file.metadata(), len(file.fields), planned, file.alignment)
        for tensor, plan in zip(file.tensors.values(), planned, strict=True):
            for _, rows in file.read_rows(tensor):
                weight = decode(rows, tensor.kind).bfloat16().float()
                to.write(encode(weight, plan.kind, tensor.name).tobytes())
            to.write(bytes(padding(plan.num_bytes, file.alignment)))
    return out


def trained_adapter(model, tokenizer, folder: Path) -> None:
    """A few steps of PEFT's LoRA on every linear module, at a rate that changes the answers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-3)
    for problem in gsm8k("train", 8):
        text = problem["question"] + "\n" + problem["answer"]
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=96)
        adapted(**ids, labels=ids["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder)


@torch.no_grad()
def greedy(model, ids: list[int], eos: int) -> tuple[list[int], list[float], torch.Tensor]:
    """Answer, how far each second choice is behind, and the first token's log-probabilities."""
    told = model.generate(
        torch.tensor([ids]),
        max_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=eos,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logprobs = [step[0].float().log_softmax(-1) for step in told.logits]
    best = [step.topk(2).values for step in logprobs]
    answer = told.sequences[0, len(ids) :].tolist()
    return answer, [(b[0] - b[1]).item() for b in best], logprobs[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    pytest.importorskip("xllamacpp", reason="llama.cpp is absent: pip install xllamacpp")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("llama_cpp")
    path, gguf = smollm2(folder)
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [p["question"] for p in gsm8k("test", PROMPTS)]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts
    ]
    load = {"dtype": torch.float32, "attn_implementation": "eager"}
    trained_adapter(
        AutoModelForCausalLM.from_pretrained(path, **load), tokenizer, folder / "adapter"
    )
    model = AutoModelForCausalLM.from_pretrained(path, **load).eval()
    with torch.no_grad():
        base = [model(torch.tensor([i])).logits[0, -1].log_softmax(-1) for i in prompts]
    model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    told = [greedy(model, ids, tokenizer.eos_token_id) for ids in prompts]
    answers, gaps, adapted = (list(part) for part in zip(*told, strict=True))
    f16 = all_as(gguf, folder / "f16.gguf", Type.F16)
    return World(folder, path, f16, prompts, base, adapted, answers, gaps)


@dataclass
class Comparison:
    """llama.cpp beside transformers.

    Attributes:
        same: How many answers are equal to the last token that was asked for.
        doubts: Where answers part, how far transformers' own second choice was behind.
        mean: Mean difference of the log-probabilities of the first token's likeliest 20.
        largest: The largest one.
    """

    same: int
    doubts: list[float]
    mean: float
    largest: float


def compare(
    world: World, wanted: list[torch.Tensor], model: Path, lora=None, tokens: int = 1
) -> Comparison:
    """Ask llama.cpp all prompts for some tokens; answers are compared with the adapted ones."""
    engine = Engine(model, lora)
    same, doubts, errors = 0, [], []
    for i, ids in enumerate(world.prompts):
        answer, likeliest = engine.answer(ids, tokens, TOP)
        errors += [abs(value - wanted[i][token].item()) for token, value in likeliest.items()]
        pairs = zip(answer, world.answers[i], strict=False)
        parted = next((k for k, (a, b) in enumerate(pairs) if a != b), None)
        same += parted is None
        if parted is not None:
            doubts.append(round(world.gaps[i][parted], 4))
    found = Comparison(same, doubts, sum(errors) / len(errors), max(errors))
    with (world.folder / "figures.jsonl").open("a") as file:
        names = {"model": model.name, "lora": lora and lora.name, "tokens": tokens}
        file.write(json.dumps({**names, **vars(found)}) + "\n")
    return found


@pytest.fixture(scope="module")
def adapter(world):
    return LoraAdapter.read(world.folder / "adapter")


@pytest.fixture(scope="module")
def plain(world):
    """What float16 and another engine cost without any adapter."""
    return compare(world, world.base, world.gguf)


def merged(world: World, adapter: LoraAdapter, name: str, base: Path, kind: str | None) -> Path:
    out = world.folder / f"{name}.gguf"
    merge(adapter, plan_merge(adapter, base, out, kind=kind), out, NullReporter())
    return out


def test_the_adapter_changes_what_the_model_says(world, plain):
    assert plain.mean < 0.02
    moved = [(a - b).abs().max().item() for a, b in zip(world.base, world.adapted, strict=True)]
    assert sum(moved) / len(moved) > 20 * plain.mean


@pytest.mark.parametrize(("kind", "tokens"), [("f32", TOKENS), ("f16", 1), ("bf16", 1)])
def test_llama_cpp_answers_with_the_adapter_as_peft_does(world, plain, kind, tokens):
    lora = world.folder / f"adapter-{kind}.gguf"
    export_adapter(world.folder / "adapter", world.model, lora, kind=kind)
    found = compare(world, world.adapted, world.gguf, lora, tokens)
    slack = 4 if kind == "bf16" else 2
    assert found.mean < slack * plain.mean, found
    assert found.largest < 2 * slack * plain.largest, found
    # Where answers part, transformers itself was undecided.
    assert all(gap < 4 * slack * plain.largest for gap in found.doubts), found
    assert found.same >= PROMPTS - 4, found


def test_the_merged_file_answers_as_peft_does(world, plain, adapter):
    out = merged(world, adapter, "merged", world.gguf, None)
    found = compare(world, world.adapted, out, tokens=TOKENS)
    assert found.mean < 2 * plain.mean, found
    assert found.largest < 4 * plain.largest, found
    assert all(gap < 8 * plain.largest for gap in found.doubts), found
    assert found.same >= PROMPTS - 4, found


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_quantized_merge_loses_what_quantizing_loses(world, adapter, kind):
    quantized = all_as(world.gguf, world.folder / f"base-{kind}.gguf", Type[kind.upper()])
    lora = world.folder / "beside.gguf"
    export_adapter(world.folder / "adapter", world.model, lora, force=True)
    beside = compare(world, world.adapted, quantized, lora)
    once = merged(world, adapter, f"once-{kind}", world.gguf, kind)
    assert compare(world, world.adapted, once).mean < 2 * beside.mean
    # Weights that were quantized before are rounded once more.
    twice = merged(world, adapter, f"twice-{kind}", quantized, None)
    assert compare(world, world.adapted, twice).mean < 4 * beside.mean


def test_factors_in_the_wrong_order_of_rows_would_show(world, plain, monkeypatch):
    monkeypatch.setattr(
        "loram_cli.export.gguf_names.rotary_order", lambda rows, heads: torch.arange(rows)
    )
    lora = world.folder / "wrong.gguf"
    export_adapter(world.folder / "adapter", world.model, lora)
    assert compare(world, world.adapted, world.gguf, lora).mean > 5 * plain.mean
