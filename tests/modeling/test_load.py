import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.reporters import WarningRecorder

from loram_cli.errors import LoramError, UsageError
from loram_cli.modeling import load
from loram_cli.modeling.layerwise.stream import LayerStream
from loram_cli.modeling.load import load_causal_lm, load_tokenizer, loading, usable_device


@pytest.mark.parametrize("device", ["meta", "mps", "xpu", "cuda:99", "banana", "cpu:x", ""])
def test_devices_that_cannot_be_used(device, monkeypatch):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(UsageError, match=f"--device {device}"):
        usable_device(device)


@pytest.mark.parametrize(
    ("asked", "there", "usable", "warned"),
    [
        (None, True, False, 1),
        (None, False, False, 0),
        (None, True, True, 0),
        ("cpu", True, False, 0),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told(asked, there, usable, warned, monkeypatch, tmp_path):
    def too_old():
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found 11040). Please update"
        )

    monkeypatch.setattr(load, "_NVIDIA", tmp_path if there else tmp_path / "absent")
    monkeypatch.setattr("torch.cuda.is_available", lambda: usable)
    monkeypatch.setattr("torch.cuda.init", too_old)
    recorder = WarningRecorder()
    load.warn_of_unused_gpu(asked, recorder)
    assert len(recorder.warnings) == warned
    assert all("driver on your system is too old (found 11040)" in w for w in recorder.warnings)


def test_whatever_a_library_raises_names_the_file(tmp_path):
    class PanicException(BaseException):
        """As Rust's panics come out of tokenizers."""

    def endless():
        return endless()

    def panic():
        raise PanicException("index out of bounds")

    for work, said in (
        (endless, "RecursionError"),
        (panic, "index out of"),
        (lambda: 1 / 0, "Zero"),
    ):
        with pytest.raises(LoramError, match=said) as told, loading(tmp_path / "a.json"):
            work()
        assert str(tmp_path / "a.json") in told.value.message


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), LoramError("known")])
def test_what_is_not_the_files_fault_passes(error, tmp_path):
    with pytest.raises(type(error)) as raised, loading(tmp_path):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "nope"},
        {"hidden_act": 5},
        {"rms_norm_eps": "x"},
        {"rope_parameters": 7},
        {"dtype": "float99"},
        {"eos_token_id": {"a": 1}},
        {"max_position_embeddings": "many"},
    ],
)
def test_config_values_of_the_wrong_type_name_the_directory(base, tmp_path, change):
    broken = shutil.copytree(base, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(LoramError, match="broken"):
        load_causal_lm(broken, device="cpu")


def test_a_config_decides_neither_what_is_returned_nor_windows_of_no_width(base, tmp_path):
    model = Path(shutil.copytree(base, tmp_path / "model"))
    file = model / "config.json"
    stated = json.loads(file.read_text())
    file.write_text(json.dumps({**stated, "return_dict": False, "output_hidden_states": True}))
    loaded = load_causal_lm(model, device="cpu")
    out = loaded(input_ids=torch.tensor([[3, 4]]))
    assert out.logits.shape == (1, 2, 258) and out.hidden_states is None
    file.write_text(json.dumps({**stated, "layer_types": ["sliding_attention"] * 4}))
    for opened in (load_causal_lm, LayerStream):
        with pytest.raises(LoramError, match="sliding_attention, and sliding_window is absent"):
            opened(model, device="cpu")


def test_a_tokenizer_whose_template_cannot_be_used_loads(base, tmp_path):
    """The template is blamed where it is rendered, and generation by other layouts needs none."""
    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    assert load_tokenizer(broken).pad_token is not None


def damaged_tokenizer(model: Path, **changes: object) -> Path:
    file = model / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return file


PANIC = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<zz>", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


@pytest.mark.parametrize("changes", [{"normalizer": {"type": "Nope"}}, {"post_processor": PANIC}])
def test_the_damaged_file_of_a_tokenizer_is_named(changes, base, tmp_path, capfd):
    model = Path(shutil.copytree(base, tmp_path / "model"))
    file = damaged_tokenizer(model, **changes)
    with pytest.raises(LoramError, match=f"^{file}: transformers cannot use it"):
        load_tokenizer(model)
    assert capfd.readouterr().err == ""  # nor a word of Rust's


def test_settings_of_a_tokenizer_are_blamed_in_their_own_file(base, tmp_path):
    model = Path(shutil.copytree(base, tmp_path / "model"))
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": 3}))
    with pytest.raises(LoramError, match=f"^{file}: transformers cannot use it"):
        load_tokenizer(model)
