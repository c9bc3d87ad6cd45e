"""Merging: the sum is rounded once, in pieces as in one, and agrees with PEFT's own."""

import pytest
import torch
from helpers.tiny_models import make_base
from safetensors.torch import load_file

from loram_cli.checkpoint import reader
from loram_cli.checkpoint.model import Model
from loram_cli.lora.adapter import LoraAdapter, LoraPair
from loram_cli.lora.scatter import add_update
from loram_cli.reporting import NullReporter
from loram_cli.stages.recover.merge import MergeSpec, merge_weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_sum_is_rounded_once(dtype):
    torch.manual_seed(0)
    weight = (torch.randn(64, 48) * 0.1).to(dtype)
    pair = LoraPair(torch.randn(4, 48), torch.randn(64, 4) * 0.01)
    exact = weight.double() + 0.5 * (pair.lora_b.double() @ pair.lora_a.double())
    merged = weight.clone()
    add_update(merged[:40], 0, pair, 0.5)
    add_update(merged[40:], 40, pair, 0.5)
    # Half a unit in the last place, and what float32 adds to that.
    half_unit = torch.finfo(dtype).eps / 2 * exact.abs()
    assert bool(((merged.double() - exact).abs() <= half_unit + 1e-7).all())
    assert not torch.equal(merged, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_checkpoint_agrees_with_peft(tmp_path, monkeypatch, dtype):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base")
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    stock.save_pretrained(base)
    targets = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "lm_head"]
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    adapted = get_peft_model(stock, config)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    monkeypatch.setattr(reader, "CHUNK_BYTES", 500)
    (tmp_path / "merged").mkdir()
    spec = MergeSpec(adapter=tmp_path / "adapter", model=base, out=tmp_path / "merged")
    adapter = LoraAdapter.read(tmp_path / "adapter")
    merge_weights(spec, adapter, Model.open(base), tmp_path / "merged", NullReporter())
    ours = load_file(tmp_path / "merged" / "model.safetensors")

    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    theirs = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().state_dict()
    before = load_file(base / "model.safetensors")
    eps = torch.finfo(dtype).eps
    for name, merged in ours.items():
        assert merged.dtype == dtype
        # PEFT rounds the update and then the sum: each half a unit in its last place, at most.
        largest = torch.maximum(merged.abs(), (theirs[name] - before[name]).abs()).float()
        difference = (merged.float() - theirs[name].float()).abs()
        assert bool((difference <= 1.5 * eps * largest + 1e-6).all()), name
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert len(changed) == 5 * 4 + 1
