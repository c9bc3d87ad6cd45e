"""Layers that are all alike: a plain config, which stock libraries load."""

import json
from pathlib import Path

import pytest
import torch
from helpers.foreign import in_a_stock_process
from helpers.recovery_chain import SILENT, close, logits
from helpers.variants import VARIANTS, Variant, mostly_slow

from loram_cli.arch.registry import families, family_for
from loram_cli.checkpoint.index import read_config
from loram_cli.cli.app import run_command
from loram_cli.errors import UsageError
from loram_cli.memory.account import count_params
from loram_cli.memory.presets import load_preset
from loram_cli.modeling.load import load_causal_lm
from loram_cli.pruning.plan import layer_widths, pruned_config
from loram_cli.stages.prune import plan
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.prune.spec import PruneSpec

# Their heads stay, and they have no dense MLP: nothing is left to spread over all layers.
NOTHING_LEFT = ("olmoe", "flex_olmo")


def small_config(preset: str, **settings) -> dict:
    spec = PruneSpec(model=Path(), out=Path(), strategy="rand", **settings).settled()
    return dict(plan.foresee(spec, load_preset(preset))[0])


@pytest.mark.integration
@mostly_slow()
def test_stock_transformers_loads_what_is_pruned_uniformly(variant: Variant, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    base = variant.save(tmp_path / "base")
    spec = PruneSpec(
        model=base, out=tmp_path / "pruned", ratio=0.5, keep_first=1, keep_last=1,
        strategy="rand", uniform=True,
    )  # fmt: skip
    if variant.name in NOTHING_LEFT:
        with pytest.raises(UsageError, match="all layers alike"):
            prune.run(spec, SILENT)
        return
    prune.run(spec, SILENT)
    config = read_config(tmp_path / "pruned")
    assert "per_layer_config" not in config
    before, after = (family_for(c, "x").geometry(c) for c in (read_config(base), config))
    assert after.layers != before.layers
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    close(logits(stock), logits(load_causal_lm(tmp_path / "pruned", device="cpu")))


@pytest.mark.slow
@pytest.mark.integration
def test_a_process_without_this_package_loads_a_uniform_model_of_every_family(tmp_path: Path):
    ours = {}
    for variant in VARIANTS:
        if variant.name in NOTHING_LEFT or variant.stores_head:
            continue
        base = variant.save(tmp_path / variant.name / "base")
        out = tmp_path / variant.name / "pruned"
        how = {"ratio": 0.5, "keep_first": 1, "keep_last": 1, "strategy": "rand", "uniform": True}
        prune.run(PruneSpec(model=base, out=out, **how), SILENT)
        ours[out] = logits(load_causal_lm(out, device="cpu"))
    printed = in_a_stock_process("load", *ours).splitlines()
    for line, own in zip(printed, ours.values(), strict=True):
        close(torch.tensor(json.loads(line)), own[0, :, :4].flatten())


@pytest.mark.parametrize(
    "family", [f for f in families() if f.attributes is None], ids=lambda f: f.family
)
def test_head_counts_that_a_config_class_refuses_are_known(family):
    import transformers

    config = {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 96,
              "head_dim": 16}  # fmt: skip
    refused = False
    try:
        transformers.AutoConfig.for_model(family.model_types[0], **config)
    except Exception as error:
        refused = "attention heads" in str(error).replace("\n", " ")
    assert refused == family.heads_divide_hidden


@pytest.mark.parametrize("preset", ["llama2-13b", "llama3.1-70b", "gemma2-27b", "qwen3-14b"])
def test_the_same_budget_is_spread_over_all_layers(preset: str):
    base = load_preset(preset)
    family = family_for(base, preset)
    inner = pruned_config(base, family.geometry(base), layer_widths(family.geometry(base), 0.65))
    config = small_config(preset, ratio=0.65, uniform=True)
    assert "per_layer_config" in inner
    assert "per_layer_config" not in config
    wanted, found = (count_params(family, c).total for c in (inner, config))
    assert 0.999 * wanted < found <= wanted
    if family.heads_divide_hidden:
        assert base["hidden_size"] % config["num_attention_heads"] == 0


def test_a_budget_of_parameters_is_met_by_all_layers():
    config = small_config("llama2-13b", target_params=6_000_000_000, uniform=True)
    total = count_params(family_for(config, "x"), config).total
    assert 0.999 * 6e9 < total <= 6e9
    assert "per_layer_config" not in config


def test_a_family_that_derives_the_heads_width_keeps_its_heads():
    neox = {"model_type": "gpt_neox", "vocab_size": 50432, "hidden_size": 2560,
            "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240,
            "tie_word_embeddings": False}  # fmt: skip
    spec = PruneSpec(model=Path(), out=Path(), strategy="rand", ratio=0.3, uniform=True)
    config, result = plan.foresee(spec, neox)
    assert config["num_attention_heads"] == 32
    assert config["intermediate_size"] < 7000
    assert {widths[0] for widths in result.widths.values()} == {32}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"plan": Path("p.yaml")}, "--plan tells them apart"),
        ({"scope": "global", "strategy": "stru", "importance": "l2"}, "--scope global tells"),
        ({"strategy": "unst", "importance": "l2"}, "--uniform does not go with"),
    ],
)
def test_what_tells_layers_apart_is_refused(settings: dict, said: str):
    with pytest.raises(UsageError, match=said):
        PruneSpec(model=Path(), out=Path(), uniform=True, **{"strategy": "rand", **settings})


@pytest.mark.integration
def test_the_command_and_the_card(base: Path, tmp_path: Path):
    words = ["prune", "--model", str(base), "--run", str(tmp_path), "--strategy", "rand",
             "--ratio", "0.5", "--keep-first", "1", "--keep-last", "1", "--uniform"]  # fmt: skip
    assert run_command(words) == 0
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("./pruned")' in card
    assert "loram recover --in ADAPTER --pruned ./pruned" in card
    record = json.loads((tmp_path / "pruned" / "loram.json").read_text())
    assert record["spec"]["uniform"] is True
    assert set(record["keep"]) == {"0", "1", "2", "3"}
    assert run_command(["verify", str(tmp_path / "pruned")]) == 0
