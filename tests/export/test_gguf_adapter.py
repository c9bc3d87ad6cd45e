import json

import pytest
import torch
from gguf import GGUFReader
from helpers.gguf_files import gguf_weights, make_adapter, make_model, names_of, permuted
from safetensors.torch import load_file, save_file

from loram_cli.errors import LoramError, UsageError
from loram_cli.export.gguf_adapter import adapter_tensors, export_adapter
from loram_cli.lora.adapter import LoraAdapter


def made(tmp_path, model_type="llama", **config):
    model = make_model(tmp_path / "model", model_type)
    return model, make_adapter(model, tmp_path / "adapter", **config)


def applied(file, name):
    """What llama.cpp adds to a weight: alpha / rank * B @ A, the rank being B's."""
    tensors = {t.name: torch.tensor(t.data) for t in file.tensors}
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    assert a.shape[0] == b.shape[1]
    alpha = file.fields["adapter.lora.alpha"].contents()
    return alpha / b.shape[1] * b @ a


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {
            "rank_pattern": {"model.layers.0.mlp.down_proj": 3},
            "alpha_pattern": {"model.layers.1.self_attn.o_proj": 5},
        },
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_llama_cpp_adds_what_peft_adds(tmp_path, model_type, config):
    model, directory = made(tmp_path, model_type, **config)
    told = export_adapter(directory, model, tmp_path / "adapter.gguf")
    file, adapter, names = GGUFReader(told.path), LoraAdapter.read(directory), names_of(model)
    assert file.fields["general.type"].contents() == "adapter"
    assert file.fields["adapter.type"].contents() == "lora"
    assert file.fields["general.architecture"].contents() == told.architecture
    assert len(file.tensors) == 2 * len(adapter.pairs) == 2 * told.modules
    weights = gguf_weights(model)
    for module, pair in adapter.pairs.items():
        delta = adapter.scaling(module) * pair.lora_b @ pair.lora_a
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if module.endswith(part) and told.architecture == "llama":
                delta = permuted(delta, heads)
        name = names.tensor(module)
        assert delta.shape == weights[name].shape
        torch.testing.assert_close(applied(file, name), delta)


def test_alpha_zero_adds_nothing(tmp_path):
    model, directory = made(tmp_path, lora_alpha=0)
    alpha, tensors = adapter_tensors(LoraAdapter.read(directory), names_of(model))
    assert alpha == 1.0
    assert not any(t.any() for n, t in tensors.items() if n.endswith("lora_b"))
    assert all(t.any() for n, t in tensors.items() if n.endswith("lora_a"))


@pytest.mark.parametrize(("kind", "error"), [("f32", 0), ("f16", 2**-11), ("bf16", 2**-8)])
def test_factors_are_written_in_the_type_asked_for(tmp_path, kind, error):
    model, directory = made(tmp_path)
    told = export_adapter(directory, model, tmp_path / "adapter.gguf", kind=kind)
    by_name = {t.name: t for t in GGUFReader(told.path).tensors}
    tensor = by_name["blk.0.ffn_up.weight.lora_a"]
    assert tensor.tensor_type.name == kind.upper()
    from gguf.quants import dequantize

    want = LoraAdapter.read(directory).pairs["model.layers.0.mlp.up_proj"].lora_a
    back = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    torch.testing.assert_close(back, want, rtol=error, atol=1e-6 if error else 0)


def test_the_same_input_gives_the_same_bytes_and_force_replaces(tmp_path):
    model, directory = made(tmp_path)
    out = tmp_path / "adapter.gguf"
    first = export_adapter(directory, model, out)
    raw = out.read_bytes()
    assert first.num_bytes == len(raw)
    with pytest.raises(UsageError, match="exists"):
        export_adapter(directory, model, out)
    export_adapter(directory, model, out, force=True)
    assert out.read_bytes() == raw
    assert {p.name for p in tmp_path.iterdir()} == {"model", "adapter", "adapter.gguf"}
    out.write_text("years of work")
    with pytest.raises(UsageError, match="is not an output of loram"):
        export_adapter(directory, model, out, force=True)
    # What an earlier export left, or somebody's link: its target stays as it is.
    (tmp_path / ".b.gguf.partial").symlink_to(out)
    export_adapter(directory, model, tmp_path / "b.gguf")
    assert out.read_text() == "years of work"


def test_quantized_factors_are_refused(tmp_path):
    model, directory = made(tmp_path)
    with pytest.raises(UsageError, match="unknown GGUF type 'q8_0'"):
        export_adapter(directory, model, tmp_path / "a.gguf", kind="q8_0")


def test_another_base_is_refused(tmp_path):
    _, directory = made(tmp_path)
    other = make_model(tmp_path / "other", intermediate_size=128)
    with pytest.raises(LoramError, match=r"mlp\.down_proj is 64 x 96, the weight in .* 64 x 128"):
        export_adapter(directory, other, tmp_path / "a.gguf")
    shallow = make_model(tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(LoramError, match=r"module model\.layers\.1\.\S+: .* has no such weight"):
        export_adapter(directory, shallow, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_a_tied_head_is_refused(tmp_path):
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    directory = make_adapter(model, tmp_path / "adapter")
    with pytest.raises(LoramError, match="module lm_head") as error:
        export_adapter(directory, model, tmp_path / "a.gguf")
    assert "--merge-into" in error.value.hint


def test_nan_and_what_float16_cannot_hold_are_refused(tmp_path):
    model, directory = made(tmp_path)
    weights = directory / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(n for n in tensors if "mlp.up_proj.lora_B" in n)
    tensors[name][0, 0] = 1e6
    save_file(tensors, weights)
    with pytest.raises(LoramError, match=r"ffn_up.weight.lora_b: 1e\+06 is beyond"):
        export_adapter(directory, model, tmp_path / "a.gguf", kind="f16")
    export_adapter(directory, model, tmp_path / "wide.gguf", kind="bf16")
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(LoramError, match="NaN"):
        export_adapter(directory, model, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_an_unknown_family_is_refused(tmp_path):
    model, directory = made(tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(LoramError, match="mamba"):
        export_adapter(directory, model, tmp_path / "a.gguf")
