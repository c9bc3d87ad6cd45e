"""Multimodal models: the text part goes the whole way, all else is carried as it is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.recovery_chain import (
    IDS,
    SILENT,
    adapted,
    base_with_groups_zeroed,
    close,
    keep_of,
    logits,
    recovered_and_merged,
    rescales,
)
from helpers.wrapped import WRAPPED, Wrapped
from safetensors.torch import load_file

from loram_cli.arch.wrappers import wrapper_of
from loram_cli.cli.app import run_command
from loram_cli.modeling.load import load_causal_lm
from loram_cli.modeling.skeleton import SkeletonModel
from loram_cli.stages.align import stage as align
from loram_cli.stages.prune import stage as prune
from loram_cli.training.adapters import load_adapter

pytestmark = pytest.mark.integration

EVERY = pytest.mark.parametrize(
    "wrapped",
    [pytest.param(w, id=w.model_type, marks=() if w.model_type == "gemma3" else pytest.mark.slow)
     for w in WRAPPED],
)  # fmt: skip


def whole(directory: Path):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(directory).eval()


def pruned(base: Path, out: Path, strategy: str) -> None:
    how = {"importance": "l2"} if strategy == "stru" else {}
    spec = prune.PruneSpec(
        model=base, out=out, strategy=strategy, ratio=0.5, keep_first=0, keep_last=0, **how
    )
    prune.run(spec, SILENT)


def fitted(run: Path, base: Path, text: Path) -> None:
    spec = align.AlignSpec(
        source=run / "pruned", out=run / "aligned", data=str(text), model=base,
        method=("reconstruct",), block_length=32, calibration_samples=16, ridge=0.1, device="cpu",
    )  # fmt: skip
    errors = align.run(spec, SILENT).manifest.results["layer_errors"]
    assert all(after <= before for before, after in errors.values()), errors


@EVERY
@pytest.mark.parametrize("strategy", ["stru", pytest.param("rand", marks=pytest.mark.slow)])
def test_the_text_part_goes_the_whole_way(
    wrapped: Wrapped, strategy: str, text_file: Path, instructions: Path, tmp_path: Path
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run, base = tmp_path, wrapped.save(tmp_path / "base")
    plain = logits(whole(base))
    close(plain, logits(load_causal_lm(base, device="cpu")))
    pruned(base, run / "pruned", strategy)
    small = load_causal_lm(run / "pruned", device="cpu")
    close(logits(AutoModelForCausalLM.from_pretrained(run / "pruned").eval()), logits(small))
    if not rescales(base):
        close(logits(small), logits(base_with_groups_zeroed(base, keep_of(run / "pruned"))))
    fitted(run, base, text_file)
    adapted(run / "aligned", run / "adapter", instructions)
    recovered_and_merged(run, base)

    stock = logits(PeftModel.from_pretrained(whole(base), run / "recovered").eval())
    assert (stock - plain).abs().max() > 1e-3
    close(logits(whole(run / "merged")), stock)
    close(logits(load_adapter(load_causal_lm(base, device="cpu"), run / "recovered")), stock)

    before, after = (load_file(run / d / "model.safetensors") for d in ("base", "merged"))
    assert before.keys() == after.keys()
    text = wrapper_of(json.loads((base / "config.json").read_text()))
    assert text is not None
    others = [name for name in before if text.text_tensor(name) is None]
    assert len(others) > 5
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert any(not torch.equal(before[n], after[n]) for n in before if n not in others)
    assert run_command(["verify", str(run / "recovered")]) == 0
    assert run_command(["verify", str(run / "merged")]) == 0


@pytest.mark.slow
def test_peft_puts_factors_on_the_text_part_alone(instructions: Path, tmp_path: Path):
    """The vision tower has a q_proj too: stock PEFT must not target it."""
    from peft import PeftModel

    base = WRAPPED[0].save(tmp_path / "base")
    pruned(base, tmp_path / "pruned", "rand")
    adapted(tmp_path / "pruned", tmp_path / "adapter", instructions)
    recovered_and_merged(tmp_path, base)
    model = PeftModel.from_pretrained(whole(base), tmp_path / "recovered")
    targeted = {n.partition(".lora_A")[0] for n, _ in model.named_modules() if ".lora_A.def" in n}
    assert len(targeted) == 4 * 7
    assert all(n.startswith("base_model.model.model.language_model.layers.") for n in targeted)
    config = json.loads((tmp_path / "recovered" / "adapter_config.json").read_text())
    assert config["target_modules"].startswith(r"model\.language_model\.layers\.\d+\.(mlp")


def test_a_training_of_the_base_itself_is_an_adapter_of_the_whole(
    instructions: Path, tmp_path: Path
):
    from peft import PeftModel

    base = WRAPPED[0].save(tmp_path / "base")
    adapted(base, tmp_path / "adapter", instructions)
    stock = logits(PeftModel.from_pretrained(whole(base), tmp_path / "adapter").eval())
    close(logits(load_adapter(load_causal_lm(base, device="cpu"), tmp_path / "adapter")), stock)
    assert (stock - logits(whole(base))).abs().max() > 1e-3


@pytest.mark.slow
def test_commands_see_the_text_model(instructions: Path, tmp_path: Path, capsys):
    base = WRAPPED[0].save(tmp_path / "base")
    run = ["--run", str(tmp_path / "run"), "--model", str(base)]
    fit = ["--steps", "2", "--batch", "2", "--micro-batch", "2", "--max-length", "48",
           "--data", str(instructions), "--device", "cpu"]  # fmt: skip
    task = ["--tasks", "perplexity", "--task-data", f"perplexity={instructions}", "--limit", "2"]
    for words in (
        ["prune", *run, "--strategy", "rand", "--ratio", "0.5", "--keep-first", "1",
         "--keep-last", "1"],
        ["train", *run[:2], *fit],
        ["recover", *run[:2], "--merge"],
        ["eval", *run[:2], *task],
        ["memory-report", "--model", str(base), "--keep-first", "1", "--keep-last", "1"],
        ["inspect", str(base)],
        ["verify", str(tmp_path / "run")],
    ):  # fmt: skip
        assert run_command(words) == 0, (words, capsys.readouterr().err)
    results = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())
    assert {"base", "recovered"} <= results["rows"].keys()


def test_layers_that_are_read_one_by_one_are_the_text_models(tmp_path: Path):
    from loram_cli.modeling.offload import loaded_within

    base = WRAPPED[0].save(tmp_path / "base")
    skeleton = SkeletonModel(base, dtype=torch.float32, device="cpu")
    with loaded_within(skeleton, 1, SILENT), torch.no_grad():
        close(skeleton.model(input_ids=IDS).logits, logits(whole(base)))


def test_another_vision_tower_is_another_base(tmp_path: Path):
    from loram_cli.checkpoint.model import Model

    one = WRAPPED[0].save(tmp_path / "base")
    before = Model.open(one).identity
    weights = load_file(one / "model.safetensors")
    weights["vision_tower.post_layernorm.weight"][0] += 1
    from safetensors.torch import save_file

    save_file(weights, one / "model.safetensors", metadata={"format": "pt"})
    after = Model.open(one).identity
    assert before.weights != after.weights
    assert replace(after, weights=before.weights) == before
