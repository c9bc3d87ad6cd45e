"""Adapters by other trainers, on pruned directories that stock libraries load."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers.foreign import in_a_stock_process
from helpers.recovery_chain import SILENT, base_with_groups_zeroed, close, keep_of, logits
from helpers.slow import slow
from safetensors.torch import load_file, save_file

from loram_cli.cli.app import run_command
from loram_cli.errors import LoramError, UsageError
from loram_cli.lora.adapter import CONFIG_NAME, WEIGHTS_NAME
from loram_cli.stages.align import stage as align
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.recover import stage as recover

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def pruned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "pruned"
    spec = prune.PruneSpec(
        model=base, out=out, ratio=0.5, keep_first=0, keep_last=0, strategy="rand"
    )
    prune.run(spec, SILENT)
    assert "per_layer_config" not in json.loads((out / "config.json").read_text())
    return out


def by_peft(model: Path, out: Path, **settings: object) -> Path:
    """What any trainer with PEFT leaves; factors are random, since zeros would hide faults."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    how = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    stock = AutoModelForCausalLM.from_pretrained(model)
    model = get_peft_model(stock, LoraConfig(task_type="CAUSAL_LM", **how))
    with warnings.catch_warnings(action="ignore"):
        # That it copies the head and the embedding.
        model.save_pretrained(out)
    return out


def recovered(adapter: Path, pruned: Path | None, base: Path, out: Path) -> Path:
    spec = recover.RecoverSpec(adapter=adapter, pruned=pruned, model=base, out=out)
    recover.run(spec, SILENT)
    return out


def check_same_as_on_pruned(adapter: Path, pruned: Path, full: Path, base: Path) -> None:
    """On the base without the dropped groups, the recovered factors do what the small ones did."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    small = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pruned), adapter)
    there = PeftModel.from_pretrained(base_with_groups_zeroed(base, keep_of(pruned)), full)
    close(logits(small.eval()), logits(there.eval()))
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    before = logits(plain)
    assert (logits(PeftModel.from_pretrained(plain, full).eval()) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        slow({}),
        {"target_modules": r".*\.(q_proj|down_proj)", "use_rslora": True},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": None,
         "rank_pattern": {r"model\.layers\.1\..*q_proj": 2}, "alpha_pattern": {"lm_head": 3}},
        slow({"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1, 2]}),
    ],
    ids=["all-linear", "pattern", "ranks", "layers"],
)  # fmt: skip
def test_an_adapter_by_peft_is_recovered(settings: dict, pruned: Path, base: Path, tmp_path: Path):
    adapter = by_peft(pruned, tmp_path / "foreign", **settings)
    full = recovered(adapter, pruned, base, tmp_path / "recovered")
    check_same_as_on_pruned(adapter, pruned, full, base)
    assert run_command(["verify", str(full)]) == 0
    assert run_command(["inspect", str(full)]) == 0


def test_the_command_says_what_is_missing(pruned: Path, base: Path, tmp_path: Path, capsys):
    adapter = by_peft(pruned, tmp_path / "foreign")
    words = ["recover", "--model", str(base), "--in", str(adapter), "--run", str(tmp_path / "run")]
    assert run_command(words) == 1
    err = capsys.readouterr().err
    assert "no record of what it was trained on" in err
    assert f"--pruned {pruned}" in err
    assert run_command([*words, "--pruned", str(pruned), "--merge"]) == 0
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()


def test_factors_that_fit_nothing_and_modules_without_factors_are_refused(
    pruned: Path, base: Path, tmp_path: Path
):
    adapter = by_peft(pruned, tmp_path / "foreign")
    tensors = load_file(adapter / WEIGHTS_NAME)

    def refused(changed: dict, said: str) -> None:
        save_file(changed, adapter / WEIGHTS_NAME)
        with pytest.raises(LoramError, match=said):
            recovered(adapter, pruned, base, tmp_path / "recovered")
        assert not (tmp_path / "recovered").exists()

    half = {n: t for n, t in tensors.items() if "layers.2.mlp.up_proj" not in n}
    refused(half, r"no factors for model\.layers\.2\.mlp\.up_proj, which adapter_config")
    other = {n.replace("model.layers.", "model.language_model.layers."): t
             for n, t in tensors.items()}  # fmt: skip
    refused(other, r"has factors for model\.language_model\.layers\.0\S+ and 27 more, and .*pruned")
    short = {n: t[:, :4].contiguous() if "q_proj.lora_A" in n else t for n, t in tensors.items()}
    refused(short, r"q_proj is 16 x 4, what was kept of the base's weight 16 x 32")


def test_a_head_that_was_changed_is_refused(pruned: Path, base: Path, tmp_path: Path):
    adapter = by_peft(pruned, tmp_path / "foreign", target_modules=["lm_head"])
    tensors = load_file(adapter / WEIGHTS_NAME)
    tensors["base_model.model.lm_head.base_layer.weight"][3] += 1
    save_file(tensors, adapter / WEIGHTS_NAME)
    with pytest.raises(LoramError, match=r"is neither a LoRA factor nor a weight of .*pruned"):
        recovered(adapter, pruned, base, tmp_path / "recovered")


def test_an_adapter_of_the_base_or_of_another_model_is_refused(
    pruned: Path, base: Path, tmp_path: Path
):
    adapter = by_peft(base, tmp_path / "foreign")
    with pytest.raises(LoramError, match=r"what was kept of the base's weight"):
        recovered(adapter, pruned, base, tmp_path / "recovered")
    with pytest.raises(LoramError, match=r"loram\.json is absent"):
        recovered(adapter, base, pruned, tmp_path / "recovered")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_initialization_that_changes_the_model_is_refused(
    start: str, pruned: Path, base: Path, tmp_path: Path
):
    adapter = by_peft(pruned, tmp_path / "foreign", init_lora_weights=start)
    config = json.loads((adapter / CONFIG_NAME).read_text())
    (adapter / CONFIG_NAME).write_text(json.dumps({**config, "init_lora_weights": start}))
    with pytest.raises(LoramError, match=f"init_lora_weights is '{start}', which changes"):
        recovered(adapter, pruned, base, tmp_path / "recovered")


def test_an_adapter_of_ours_knows_what_it_was_trained_on(run_copy: Path, base: Path):
    with pytest.raises(UsageError, match="has its own record"):
        recovered(run_copy / "adapter", run_copy / "pruned", base, run_copy / "again")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prune", "align"])
def test_trl_trains_on_it_without_our_code(
    stage: str, pruned: Path, base: Path, text_file: Path, instructions: Path, tmp_path: Path
):
    from loram_cli.modeling.load import load_causal_lm

    small = pruned
    if stage == "align":
        small = tmp_path / "aligned"
        spec = align.AlignSpec(
            source=pruned, out=small, data=str(text_file), model=base, method=("reconstruct",),
            block_length=32, calibration_samples=16, device="cpu",
        )  # fmt: skip
        align.run(spec, SILENT)
    seen = json.loads(in_a_stock_process("load", small).splitlines()[-1])
    ours = logits(load_causal_lm(small, device="cpu"))[0, :, :4].flatten()
    close(torch.tensor(seen), ours)
    in_a_stock_process("sft", small, instructions, tmp_path / "foreign")
    full = recovered(tmp_path / "foreign", small, base, tmp_path / "recovered")
    assert run_command(["verify", str(full)]) == 0
    if stage == "prune":
        check_same_as_on_pruned(tmp_path / "foreign", small, full, base)
