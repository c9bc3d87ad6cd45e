"""Model cards: the README.md of an output, with the hub's front matter."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loram_cli.arch.spec import LOW_RANK
from loram_cli.checkpoint.low_bit import CONFIG_KEY as LOW_BIT
from loram_cli.checkpoint.sources import hub_id
from loram_cli.schema import plain, settings_of
from loram_cli.units import format_params

CARD_NAME = "README.md"

_LOAD_ADAPTER = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{this}")
```

vLLM serves it with `vllm serve {base} --enable-lora --lora-modules name={this}`.
"""
# What only loram's own loader reads, by its key in config.json.
_OWN_FORMATS = {
    "per_layer_config": "Its layers differ in width",
    LOW_BIT: "Its linears are rows of few bits, which loram's loader expands",
    LOW_RANK: "Its linears are products of two factors",
}
_LOAD_OWN = """\
{what} (`{key}` in `config.json`):

```python
from pathlib import Path

from loram_cli.modeling.load import load_causal_lm

model = load_causal_lm(Path("{this}"))
```
"""
_LOAD_PLAIN = """\
All its layers are alike, so that it loads everywhere:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{this}")
```
"""
_TRAIN_ON_IT = """
## Train on it, use the full model

```
loram train --in {this} --data instructions.jsonl
loram recover --model {base}
```

writes an ordinary PEFT adapter for {base}.{others}
"""
_BY_ANY_TRAINER = """ \
Any other trainer does as well, by plain LoRA with PEFT; its adapter is recovered with

```
loram recover --in ADAPTER --pruned {this} --model {base}
```
"""
_LOAD_SMALL_ADAPTER = """\
It fits the pruned model that it was trained on, not the base: `loram recover` brings it to the
base's shapes.
"""
_LOAD_MERGED = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{this}")
```
"""
# Per stage: what it is, the library that loads it, the hub's relation to the base, how to load.
_KINDS: dict[str, tuple[str, str, str, str]] = {
    "prune": ("pruned model", "transformers", "finetune", _LOAD_PLAIN),
    "align": ("pruned and aligned model", "transformers", "finetune", _LOAD_PLAIN),
    "train": ("LoRA adapter of the pruned model", "peft", "adapter", _LOAD_SMALL_ADAPTER),
    "recover": ("LoRA adapter", "peft", "adapter", _LOAD_ADAPTER),
    "merge": ("merged model", "transformers", "finetune", _LOAD_MERGED),
}


def model_card(
    stage: str,
    spec: Any,
    base: Mapping[str, Any],
    results: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
) -> str | None:
    """The card of a stage's output, without times or local paths; None for evaluations.

    Args:
        stage: Which wrote it.
        spec: The stage's spec.
        base: The manifest's record of the base.
        results: What the stage measured.
        config: The output's ``config.json``, where it is a model.
    """
    if stage not in _KINDS:
        return None
    path = Path(str(base.get("path", "")))
    # Trained on the base itself, an adapter is what recover makes of others.
    as_recovered = stage == "train" and spec.source.resolve() == path.resolve()
    kind, library, relation, usage = _KINDS["recover" if as_recovered else stage]
    if stage in ("prune", "align"):
        key = next((key for key in _OWN_FORMATS if key in (config or {})), None)
        if key is not None:
            usage = _LOAD_OWN.replace("{what}", _OWN_FORMATS[key]).replace("{key}", key)
        usage += _TRAIN_ON_IT.replace("{others}", "" if key else _BY_ANY_TRAINER)
    published = hub_id(path)
    name = published or path.name or "the base"
    this = f"./{spec.out.name}"
    shown = {
        f.name: plain(getattr(spec, f.name)) for f, told in settings_of(spec) if not told.private
    }
    lines = [
        _front_matter(library, published, relation),
        f"# {kind[0].upper()}{kind[1:]} of {name}",
        "",
        "Made by `loram`, which implements LoRAM, "
        "[Train Small, Infer Large](https://arxiv.org/abs/2502.13533).",
        "",
        usage.format(base=published or name, this=this).rstrip(),
        "",
        "## How it was made",
        "",
        *_table("setting", shown),
        *_table("result", results),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _front_matter(library: str, published: str | None, relation: str) -> str:
    from huggingface_hub import ModelCardData

    known: dict[str, Any] = (
        {"base_model": published, "base_model_relation": relation} if published else {}
    )
    data = ModelCardData(
        library_name=library,
        pipeline_tag="text-generation",
        tags=["loram", "lora"] if library == "peft" else ["loram"],
        **known,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _table(kind: str, values: Mapping[str, Any]) -> list[str]:
    rows = []
    for key, value in values.items():
        if value in (None, "", [], {}, ()) or isinstance(value, dict):
            continue
        rows.append(f"| {key} | {_cell(key, value)} |")
    return [f"| {kind} | value |", "| --- | --- |", *rows, ""] if rows else []


def _cell(key: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if key.endswith("_params"):
        return f"{value:,} ({format_params(value)})"
    # Data by its file name: a local path says too much.
    text = str(value)
    is_path = isinstance(value, str) and re.match(r"[./~]", text)
    return (Path(text).name if is_path else text).replace("|", "\\|")
