"""Digests of what a stage reads: data in the key, and an input against its own record."""

import json
import shutil
from pathlib import Path

import pytest

from loram_cli.cli.app import run_command
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.stages.core.data_digests import data_digest


def loram(*words: object) -> int:
    return run_command([str(word) for word in words])


def flip(file: Path, at: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_digest_follows_the_data(tmp_path: Path):
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_text("{}\n")
    two.write_text("[]\n")
    first = data_digest(str(one))
    assert data_digest(f"{one}:0.5,{two}:0.5") == data_digest(f"{one},{two}")
    assert (
        len({first, data_digest(str(two)), data_digest(str(tmp_path)), data_digest("demo:test")})
        == 4
    )
    one.write_text("{ }\n")
    assert data_digest(str(one)) != first
    one.write_text("{}\n")
    assert data_digest(str(one)) == first
    assert data_digest("owner/name") is None


@pytest.mark.parametrize("changed", ["data", "held-out"])
def test_other_data_is_another_training(changed, run_copy, instructions, tmp_path, capsys):
    files = {
        name: Path(shutil.copy(instructions, tmp_path / f"{name}.jsonl"))
        for name in ("data", "held-out")
    }
    words = ["train", "--run", run_copy, "--out", tmp_path / "out", "--data", files["data"]]
    words += ["--eval-data", files["held-out"], "--steps", 1, "--batch", 2, "--micro-batch", 2]
    words += ["--max-length", 64, "--eval-examples", 2]
    assert loram(*words) == 0
    assert set(Manifest.read(tmp_path / "out").inputs) == {"source", "data", "eval_data"}
    assert loram(*words) == 0
    assert "was done already" in capsys.readouterr().out
    assert loram("verify", tmp_path / "out") == 0
    files[changed].write_text(files[changed].read_text().replace("plus", "and"))
    assert loram("verify", tmp_path / "out") == 1
    assert "has changed since" in capsys.readouterr().out
    assert loram(*words) == 2
    assert "with other settings or inputs" in capsys.readouterr().err


def test_other_calibration_text_is_another_pruning(base, text_file, tmp_path, capsys):
    text = Path(shutil.copy(text_file, tmp_path / "text.txt"))
    words = ["prune", "--run", tmp_path / "run", "--model", base, "--ratio", 0.5, "--keep-first", 1]
    words += ["--keep-last", 1, "--calibration", text, "--calibration-length", 16]
    assert loram(*words) == 0
    text.write_text(text.read_text().replace("quick", "slow"))
    assert loram(*words) == 2
    assert "with other settings or inputs" in capsys.readouterr().err
    assert loram(*words, "--force") == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapter/adapter_model.safetensors", ["recover", "--out", "new"]),
        ("adapter/adapter_config.json", ["recover", "--out", "new"]),
        ("recovered/adapter_model.safetensors", ["recover", "--merge", "--merge-out", "new"]),
        ("pruned/model.safetensors", ["align", "--out", "new", "--data", "text.txt"]),
        ("pruned/tokenizer.json", ["align", "--out", "new", "--data", "text.txt"]),
        ("aligned/config.json", ["train", "--out", "new", "--data", "rows.jsonl"]),
        ("aligned/tokenizer_config.json", ["train", "--out", "new", "--data", "rows.jsonl"]),
    ],
)  # fmt: skip
def test_a_changed_input_is_refused(name, words, run_copy, text_file, instructions, capsys):
    shutil.copy(text_file, "text.txt")
    shutil.copy(instructions, "rows.jsonl")
    file = run_copy / name
    if file.suffix == ".safetensors":
        flip(file)
    else:
        file.write_text(file.read_text() + " ")  # sound JSON still
    assert loram(*words, "--run", run_copy) == 1
    err = capsys.readouterr().err
    assert f"{file}: is missing, or not the file that" in err
    assert not Path("new").exists()
    file.unlink()
    if file.suffix == ".safetensors":
        assert loram(*words, "--run", run_copy) == 1


def test_a_card_may_be_written_anew(run_copy: Path):
    (run_copy / "adapter" / "README.md").write_text("mine")
    assert loram("recover", "--run", run_copy, "--out", "new") == 0


def test_a_record_without_its_digest_is_refused(run_copy: Path, capsys):
    file = run_copy / "adapter" / MANIFEST_NAME
    data = json.loads(file.read_text())
    del data["digest"]
    data["keep"]["1"]["intermediate"][0] ^= 1
    file.write_text(json.dumps(data))
    assert loram("recover", "--run", run_copy, "--out", "new") == 1
    assert "its digest is missing" in capsys.readouterr().err
