import json

import pytest
from gguf import GGMLQuantizationType as Type
from helpers.gguf_files import TOKENS, make_adapter, make_model, write_gguf

from loram_cli.cli.app import run_command
from loram_cli.export.gguf_file import GgufFile

pytestmark = pytest.mark.integration


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model(tmp_path / "model", vocab_size=len(TOKENS))
    make_adapter(model, tmp_path / "adapter", head=False)
    write_gguf(model, tmp_path / "base.gguf", Type.F16)
    return tmp_path


def told(capsys, words):
    capsys.readouterr()
    code = run_command(words.split())
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_an_adapter_is_exported(files, capsys):
    words = "export --to gguf --model model --in adapter --out a.gguf --type f16"
    code, out, _ = told(capsys, f"{words} --dry-run")
    assert code == 0
    assert out.startswith("would write a.gguf (14 modules)")
    assert not (files / "a.gguf").exists()
    code, out, _ = told(capsys, words)
    assert code == 0
    assert out.startswith("wrote a.gguf (14 modules, ")
    assert "llama-server -m BASE.gguf --lora a.gguf" in out
    assert GgufFile.open(files / "a.gguf").value("general.type") == "adapter"
    code, _, err = told(capsys, words)
    assert code == 2
    assert "a.gguf: exists" in err


def test_an_adapter_is_merged_into_a_gguf_model(files, capsys):
    words = "export --model model --in adapter --merge-into base.gguf --type q8_0 --json"
    code, out, _ = told(capsys, f"{words} --dry-run")
    assert code == 0
    assert json.loads(out)["dry_run"] is True
    code, out, _ = told(capsys, words)
    assert code == 0
    found = json.loads(out)
    assert 0.95 < found.pop("kept_share") < 1.05
    assert found == {
        "path": "loram-run/merged.gguf",
        "modelfile": "loram-run/merged.Modelfile",
        "modules": 14,
        "num_bytes": (files / "loram-run" / "merged.gguf").stat().st_size,
        "dry_run": False,
    }
    assert GgufFile.open(files / found["path"]).tensors["blk.0.attn_q.weight"].kind == Type.Q8_0


def test_without_a_recovered_adapter_the_command_that_makes_one_is_named(files, capsys):
    code, _, err = told(capsys, "export --model model")
    assert code == 1
    assert "loram recover" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("import .", ".: not a GGUF file"),
        ("import /", "/: not a GGUF file"),
        ("import gone.gguf", "gone.gguf: no such file"),
    ],
)
def test_what_is_no_gguf_file_is_named(words, message, files, capsys):
    code, _, err = told(capsys, words)
    assert (code, err) == (1, f"error: {message}\n")


def test_a_gguf_model_becomes_a_directory(files, capsys):
    code, out, _ = told(capsys, "import base.gguf")
    assert code == 0
    assert out == "wrote base (llama, float16)\nnext: loram prune --model base\n"
    assert (files / "base" / "model.safetensors").is_file()
    code, out, _ = told(capsys, "import base.gguf --out other --dtype float32 --json")
    assert json.loads(out) == {
        "path": "other", "family": "llama", "dtype": "float32", "quantized": {},
    }  # fmt: skip
