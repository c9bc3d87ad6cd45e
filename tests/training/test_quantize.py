import importlib.util
import subprocess
import sys

import pytest
import torch
from helpers.nf4 import nf4_model, transformers_nf4

from loram_cli.errors import LoramError
from loram_cli.modeling.quantize import require_bitsandbytes
from loram_cli.reporting import NullReporter
from loram_cli.training.loop.loop import fit_lora
from loram_cli.training.loop.options import FitOptions

pytestmark = pytest.mark.integration

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@needs_bitsandbytes
def test_narrow_model_trains_in_nf4(narrow_dir, with_lora, rows, tmp_path, capfd):
    import bitsandbytes

    model = nf4_model(narrow_dir, with_lora)
    base = model.get_base_model()
    linears = {
        n.removesuffix(".base_layer"): m
        for n, m in base.named_modules()
        if isinstance(m, torch.nn.Linear) and "lora_" not in n
    }
    four_bit = {n for n, m in linears.items() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert linears.keys() - four_bit == {"lm_head"}
    state = linears["model.layers.1.mlp.down_proj"].quant_state
    assert state.nested
    assert state.quant_type == "nf4"
    packed = {n: m.weight.detach().clone() for n, m in linears.items() if n in four_bit}
    options = FitOptions(
        learning_rate=5e-3, steps=4, batch=8, micro_batch=4, warmup_steps=0, checkpoint_steps=2
    )
    result = fit_lora(model, rows[:12], rows[12:], options, tmp_path, NullReporter())
    before, after = result.eval_losses()
    assert after < before
    for name, weight in packed.items():
        assert torch.equal(linears[name].weight, weight), name
    again = fit_lora(
        nf4_model(narrow_dir, with_lora), rows[:12], rows[12:], options, tmp_path, NullReporter()
    )
    assert again.resumed_from == 4
    assert capfd.readouterr() == ("", "")


@needs_bitsandbytes
def test_quantized_logits_stay_near(narrow_dir, load):
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        exact = load()(ids).logits
        quantized = nf4_model(narrow_dir).eval()
        near = quantized(ids).logits
        assert torch.equal(quantized(ids).logits, near)
    assert 0 < (near - exact).norm() / exact.norm() < 0.3


@needs_bitsandbytes
def test_weights_are_what_transformers_quantizes_them_to(base):
    ids = torch.arange(3, 40)[None]
    mine, theirs = nf4_model(base).eval(), transformers_nf4(base)
    packed = dict(theirs.named_parameters())
    assert packed.keys() == dict(mine.named_parameters()).keys()
    assert all(torch.equal(weight, packed[name]) for name, weight in mine.named_parameters())
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, theirs(ids).logits)


@needs_bitsandbytes
def test_quantizing_freezes_and_raises_nothing(narrow_dir):
    model = nf4_model(narrow_dir, dtype=torch.bfloat16)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_missing_bitsandbytes_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoramError, match="bitsandbytes, which is not installed"):
        require_bitsandbytes()


@needs_bitsandbytes
def test_training_imports_print_nothing():
    code = (
        "from loram_cli.modeling.quantize import require_bitsandbytes; require_bitsandbytes(); "
        "from loram_cli.training.adapters import lora_config; lora_config(['q_proj'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
