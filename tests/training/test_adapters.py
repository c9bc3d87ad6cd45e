import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from loram_cli.arch.registry import family_for
from loram_cli.errors import LoramError, UsageError
from loram_cli.training.adapters import (
    attach_lora,
    continue_lora,
    load_adapter,
    lora_config,
    lora_targets,
    save_adapter,
)

LLAMA = family_for({"model_type": "llama"}, "test")
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_default_targets_are_all_linears_and_the_head(reporter):
    assert set(lora_targets(LLAMA, tied_embeddings=False, reporter=reporter)) == LINEARS | {
        "lm_head"
    }
    assert not reporter.notes


def test_tied_head_is_left_out_with_a_note(reporter):
    assert set(lora_targets(LLAMA, tied_embeddings=True, reporter=reporter)) == LINEARS
    assert "lm_head gets no LoRA" in reporter.notes[0]


@pytest.mark.parametrize(
    ("targets", "tied", "says"),
    [(["q_prj"], False, "q_proj"), (["lm_head"], True, "tied"), ([], False, "no LoRA targets")],
)
def test_targets_that_cannot_be(reporter, targets, tied, says):
    with pytest.raises(UsageError, match=says):
        lora_targets(LLAMA, tied_embeddings=tied, reporter=reporter, targets=targets)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_config_out_of_range(bad):
    with pytest.raises(UsageError, match="LoRA rank"):
        lora_config(["q_proj"], **bad)


def test_factors_follow_each_layers_width_and_start_at_zero(load, with_lora, tmp_path):
    base = load()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = base(ids).logits
        model = with_lora(base)
        assert torch.equal(model.eval()(ids).logits, before)
    save_adapter(model, tmp_path)
    factors = load_file(tmp_path / "adapter_model.safetensors")
    shape = {
        name.removeprefix("base_model.model.model.layers."): tuple(f.shape)
        for name, f in factors.items()
    }
    assert shape["0.self_attn.q_proj.lora_B.weight"] == (32, 8)
    assert shape["1.self_attn.q_proj.lora_B.weight"] == (16, 8)
    assert shape["1.self_attn.k_proj.lora_B.weight"] == (8, 8)
    assert shape["1.self_attn.o_proj.lora_A.weight"] == (8, 16)
    assert shape["1.mlp.down_proj.lora_A.weight"] == (8, 24)
    assert {f.dtype for f in factors.values()} == {torch.float32}


def test_saved_adapter_is_factors_alone_and_the_same_bytes(with_lora, tmp_path):
    for name in ("a", "b"):
        save_adapter(with_lora(), tmp_path / name)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    factors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in factors)
    assert sum("lm_head" in name for name in factors) == 2
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(LINEARS | {"lm_head"})
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_attaching_depends_on_its_seed_alone(load):
    def factors(seed):
        model = load()
        state = torch.get_rng_state()
        model = attach_lora(model, lora_config(["q_proj"]), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return [p.detach() for name, p in model.named_parameters() if "lora_A" in name]

    torch.manual_seed(5)
    first = factors(1)
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(first, factors(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, factors(2), strict=True))


def test_peft_alone_loads_what_was_saved(load, with_lora, tmp_path):
    from peft import PeftModel

    model = with_lora().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(load(), tmp_path).eval()
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (lambda name: name.replace("0.mlp", "9.mlp"), "the model has no module for its factor"),
        (
            lambda name: None if "1.mlp.up_proj" in name else name,
            r"targets: model.layers.1.mlp.up_proj.lora_A.weight and 1 more",
        ),
    ],
)
@pytest.mark.parametrize("attach", [load_adapter, partial(continue_lora, dropout=0.0)])
def test_factors_and_modules_are_one_to_one(load, with_lora, tmp_path, rename, said, attach):
    save_adapter(with_lora(load()), tmp_path)
    attach(load(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    factors = {rename(name): factor for name, factor in load_file(file).items()}
    factors.pop(None, None)
    save_file(factors, file)
    with pytest.raises(LoramError, match=said):
        attach(load(), tmp_path)
