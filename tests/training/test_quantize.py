import importlib.util
import subprocess
import sys

import pytest
import torch

from loram_cli.errors import LoramError
from loram_cli.modeling.quantize import keep_standard_layout, nf4_config, prepare_for_training
from loram_cli.reporting import NullReporter
from loram_cli.training.loop.loop import fit_lora
from loram_cli.training.loop.options import FitOptions

pytestmark = pytest.mark.integration

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@needs_bitsandbytes
def test_narrow_model_trains_in_nf4(load, with_lora, rows, tmp_path, capfd):
    import bitsandbytes

    base = load(quantization_config=nf4_config(torch.float32))
    linears = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    four_bit = {n for n, m in linears.items() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert linears.keys() - four_bit == {"lm_head"}
    assert linears["model.layers.1.mlp.down_proj"].weight.quant_state.nested
    assert linears["model.layers.1.mlp.down_proj"].weight.quant_state.quant_type == "nf4"
    prepare_for_training(base)
    model = with_lora(base)
    packed = {n: m.weight.detach().clone() for n, m in linears.items() if n in four_bit}
    options = FitOptions(
        learning_rate=5e-3, steps=4, batch=8, micro_batch=4, warmup_steps=0, checkpoint_steps=2
    )
    result = fit_lora(model, rows[:12], rows[12:], options, tmp_path, NullReporter())
    before, after = result.eval_losses()
    assert after < before
    for name, weight in packed.items():
        assert torch.equal(linears[name].weight, weight), name
    base = load(quantization_config=nf4_config(torch.float32))
    prepare_for_training(base)
    again = fit_lora(with_lora(base), rows[:12], rows[12:], options, tmp_path, NullReporter())
    assert again.resumed_from == 4
    assert capfd.readouterr() == ("", "")


@needs_bitsandbytes
def test_quantized_logits_stay_near(load):
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        exact = load()(ids).logits
        quantized = load(quantization_config=nf4_config(torch.float32))
        keep_standard_layout(quantized)
        near = quantized(ids).logits
        assert torch.equal(quantized(ids).logits, near)
    assert 0 < (near - exact).norm() / exact.norm() < 0.3


@needs_bitsandbytes
def test_preparing_freezes_and_raises_nothing(load):
    model = load(dtype=torch.bfloat16, quantization_config=nf4_config(torch.bfloat16))
    prepare_for_training(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_missing_bitsandbytes_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoramError, match="bitsandbytes, which is not installed"):
        nf4_config(torch.float32)


@needs_bitsandbytes
def test_training_imports_print_nothing():
    code = (
        "import torch; from loram_cli.modeling.quantize import nf4_config; "
        "nf4_config(torch.float32); import bitsandbytes; "
        "from loram_cli.training.adapters import lora_config; lora_config(['q_proj'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
