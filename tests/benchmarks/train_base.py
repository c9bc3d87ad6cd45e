"""Train the demo base from nothing: ``python tests/benchmarks/train_base.py --out DIR``.

Takes about half an hour on two cores. The result that ships is ``loram_cli/demo/base``. With
``--mixture`` the same data make a mixture of experts, which ``experts.py`` measures; it does not
ship.
"""

import argparse
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loram_cli.demo.problems import corpus, problems

VOCAB_SIZE = 512
BLOCK_LENGTH = 192
SEED = 20
EOS, PAD = "<|endoftext|>", "<|pad|>"

CARD = """---
license: mit
language: en
pipeline_tag: text-generation
library_name: transformers
---
# The demo base of loram

{what}

    {command}

Seed {seed}, {steps} steps of {batch} blocks of {block} tokens. Held out, never seen in training:

| what | score |
| --- | --- |
| perplexity of the corpus, 200 new documents | {perplexity:.3f} |
| right final number in any style, 200 problems of one to three steps, greedy | {native:.1%} |
| the same problems, exact match of the marked answer `#### N` | {exact:.1%} |
"""

DENSE = """A Llama of {params:,} parameters, trained from nothing on English word problems that
`loram_cli/demo/problems.py` generates: 12 layers, hidden 128, 8 attention heads over 4 key/value
heads, intermediate 320, byte-level BPE of 512 tokens with single digits. It exists to show the
whole of loram in three minutes, and for nothing else."""

MIXTURE = """A Mixtral of {params:,} parameters, trained from nothing on English word problems that
`loram_cli/demo/problems.py` generates: 4 layers, hidden 128, 8 attention heads over 4 key/value
heads, 8 experts of intermediate 192 of which a token has 2, byte-level BPE of 512 tokens with
single digits. It exists to measure what dropping experts costs, and for nothing else."""


def build_tokenizer(texts: Iterator[str]) -> Any:
    """A byte-level BPE whose digits stay single; any text survives a round trip."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        bos_token=EOS,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any) -> Any:
    """The architecture, randomly initialised."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            use_cache=False,  # while training: the cache only costs time there
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_mixture(tokenizer: Any) -> Any:
    """A mixture of experts, randomly initialised; its loss keeps the experts' loads even."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=16,
            num_local_experts=8,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            max_position_embeddings=1024,
            sliding_window=None,
            tie_word_embeddings=False,
            use_cache=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pack(documents: list[str], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Blocks of equal length that each begin with a document."""
    blocks: list[dict[str, list[int]]] = []
    block: list[int] = []
    for ids in tokenizer(documents)["input_ids"]:
        block += [*ids, tokenizer.eos_token_id]
        if len(block) >= BLOCK_LENGTH:
            cut = block[:BLOCK_LENGTH]
            blocks.append({"input_ids": cut, "labels": cut})
            block = []
    return blocks


def generate(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    """Greedy answers."""
    import torch

    prompts = [f"Question: {question}\nAnswer:" for question in questions]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=110, do_sample=False)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def score(model: Any, tokenizer: Any) -> dict[str, float]:
    """Held-out perplexity and accuracies; see the card for what each one is."""
    import torch

    model.eval()
    rows = torch.tensor([b["input_ids"] for b in pack(corpus(600, seed=99), tokenizer)[:200]])
    with torch.no_grad():
        loss = model(input_ids=rows, labels=rows).loss
    records = problems("test", 200)
    answers = generate(model, tokenizer, [r["question"] for r in records])
    targets = [r["answer"].split("#### ")[1] for r in records]
    pairs = list(zip(targets, answers, strict=True))
    return {
        "perplexity": float(loss.exp()),
        "native": sum(target == _last(answer) for target, answer in pairs) / len(pairs),
        "exact": sum(target == _marked(answer) for target, answer in pairs) / len(pairs),
    }


def main(arguments: list[str]) -> None:
    """Train, score, save."""
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="default: 1600; 600 of a mixture")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--mixture", action="store_true", help="8 experts, of which a token has 2")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (600 if options.mixture else 1600)
    transformers.set_seed(SEED)
    random.seed(SEED)
    documents = corpus(int(options.steps * options.batch * 4.0), seed=0)
    tokenizer = build_tokenizer(iter(documents[:20000]))
    blocks = pack(documents, tokenizer)
    model = (build_mixture if options.mixture else build_model)(tokenizer)
    training = transformers.TrainingArguments(
        output_dir=str(options.out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=2.5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.05,
        adam_beta2=0.98,
        bf16=True,
        use_cpu=True,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        seed=SEED,
    )
    transformers.Trainer(model=model, args=training, train_dataset=blocks).train()
    model = model.to(torch.bfloat16)
    model.config.use_cache = True
    if options.mixture:
        model.config.output_router_logits = False
    # Taken from the config when the model was built; without it, decoding is 10x slower.
    model.generation_config.use_cache = True
    measured = score(model.float(), tokenizer)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    kind = " --mixture" if options.mixture else ""
    command = f"python tests/benchmarks/train_base.py --out {options.out.name}{kind}"
    what = (MIXTURE if options.mixture else DENSE).format(params=model.num_parameters())
    card = CARD.format(
        what=what, command=command, seed=SEED, steps=options.steps,
        batch=options.batch, block=BLOCK_LENGTH, **measured,
    )  # fmt: skip
    (options.out / "README.md").write_text(card)
    sys.stdout.write(card)


def _marked(answer: str) -> str | None:
    match = re.search(r"#### (-?\d+)", answer)
    return match[1] if match else None


def _last(answer: str) -> str | None:
    numbers = re.findall(r"-?\d+", answer)
    return numbers[-1] if numbers else None


if __name__ == "__main__":
    main(sys.argv[1:])
