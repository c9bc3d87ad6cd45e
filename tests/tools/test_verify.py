import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_base
from safetensors.torch import load_file, save_file

from loram_cli.checkpoint.identity import chat_template_digest
from loram_cli.checkpoint.model import Model
from loram_cli.cli.app import run_command
from loram_cli.errors import LoramError
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import Manifest, sealed
from loram_cli.tools import verify

SILENT = NullReporter()


def problems(directory: Path, **options: bool) -> list[str]:
    spec = verify.VerifySpec(directory=directory, **options)
    return list(verify.run(spec, SILENT).problems)


def rewrite(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_whole_run_has_no_problems(finished_run: Path, base: Path):
    report = verify.run(verify.VerifySpec(directory=finished_run, values=True), SILENT)
    assert report.problems == ()
    assert report.notes == ()
    names = {path.name for path in report.directories}
    assert names == {"pruned", "aligned", "adapter", "recovered", "merged", "eval", base.name}


def test_ancestry_is_followed_and_can_be_left_out(finished_run: Path):
    spec = verify.VerifySpec(directory=finished_run / "recovered")
    names = [path.name for path in verify.run(spec, SILENT).directories]
    assert names[0] == "recovered"
    assert {"adapter", "aligned", "pruned"} < set(names)
    alone = verify.VerifySpec(directory=finished_run / "recovered", ancestry=False)
    assert len(verify.run(alone, SILENT).directories) == 1


def test_a_moved_run_is_found_beside(run_copy: Path, finished_run: Path):
    report = verify.run(verify.VerifySpec(directory=run_copy / "recovered"), SILENT)
    assert report.problems == ()
    # The recorded paths still exist here, so they are the ones that were followed.
    assert finished_run.resolve() / "adapter" in {p.resolve() for p in report.directories}


def test_every_recorded_file_is_compared(run_copy: Path):
    recorded = Manifest.read(run_copy / "pruned").outputs
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(recorded)
    (run_copy / "pruned" / "tokenizer.json").unlink()
    weights = run_copy / "pruned" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (run_copy / "pruned" / "model-extra.safetensors").write_bytes(weights.read_bytes())
    found = problems(run_copy / "pruned", ancestry=False)
    assert any("tokenizer.json: is missing" in line for line in found)
    assert any("model.safetensors: its bytes are not those" in line for line in found)
    assert any("model-extra.safetensors: was put here afterwards" in line for line in found)


def test_an_input_made_anew_is_named(run_copy: Path, base: Path):
    words = ["prune", "--run", run_copy, "--ratio", 0.25, "--keep-first", 1, "--keep-last", 1]
    assert run_command([*map(str, words), "--strategy", "rand", "--force"]) == 0
    aligned = Manifest.read(run_copy / "aligned")
    source = aligned.inputs["source"]
    assert source["key"] != Manifest.read(run_copy / "pruned").key
    about = list(verify._input_problems("about", run_copy / "pruned", source, is_first=True))
    assert any("made anew" in line for line in about)
    assert any("weights differ" in line for line in about)


def test_nan_is_found_only_when_asked_for(base: Path, tmp_path: Path):
    bad = Path(shutil.copytree(base, tmp_path / "bad"))

    def poison(tensors):
        tensors["model.norm.weight"][3] = float("nan")

    rewrite(bad / "model.safetensors", poison)
    assert problems(bad) == []
    (line,) = problems(bad, values=True)
    assert "model.norm.weight has 1 NaN or infinite values of 32" in line


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: edit_json(d / "config.json", intermediate_size=44), "config.json asks for"),
        (
            lambda d: edit_json(d / "config.json", vocab_size=100),
            "beyond the model's embedding of 100",
        ),
        (lambda d: edit_json(d / "config.json", model_type="transfo_x"), "not a known family"),
        (lambda d: edit_json(d / "config.json", num_hidden_layers="two"), "a whole number"),
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "not a tokenizer"),
        (lambda d: (d / "model.safetensors").write_bytes(b"short"), "model.safetensors"),
        (
            lambda d: rewrite(d / "model.safetensors", lambda t: t.pop("model.norm.weight")),
            "model.norm.weight is missing",
        ),
    ],
)
def test_a_plain_model_is_checked_too(base: Path, tmp_path: Path, damage, message):
    model = Path(shutil.copytree(base, tmp_path / "model"))
    assert problems(model) == []
    damage(model)
    assert any(message in line for line in problems(model)), problems(model)


def test_an_adapter_must_fit_its_config_its_base_and_its_keep_indices(run_copy: Path):
    adapter = run_copy / "recovered"
    keep = Manifest.read(adapter).keep["1"]["intermediate"]
    dropped = next(i for i in range(40) if i not in keep)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    def spill(tensors):
        tensors[name][dropped, 0] = 1.0

    rewrite(adapter / "adapter_model.safetensors", spill)
    edit_json(adapter / "adapter_config.json", target_modules=["q_proj"])
    found = problems(adapter, ancestry=False)
    assert any("lora_B is not zero outside the kept indices" in line for line in found)
    assert any("is not among the target_modules" in line for line in found)
    edit_json(adapter / "adapter_config.json", r=4)
    assert any("rank" in line and "4" in line for line in problems(adapter, ancestry=False))


def test_a_plain_peft_adapter_is_compared_with_the_base_it_names(run_copy: Path, base: Path):
    adapter = run_copy / "recovered"
    (adapter / "loram.json").unlink()
    assert problems(adapter) == []

    def widen(tensors):
        name = "base_model.model.lm_head.lora_B.weight"
        tensors[name] = torch.zeros(tensors[name].shape[0] + 1, tensors[name].shape[1])

    rewrite(adapter / "adapter_model.safetensors", widen)
    (line,) = problems(adapter)
    assert "lm_head is 259 x 32" in line


def test_a_manifest_edited_by_hand_is_a_problem_and_is_refused(run_copy: Path, capsys):
    edit_json(run_copy / "adapter" / "loram.json", stage="train", keep={})
    (line,) = problems(run_copy / "adapter")
    assert "was changed after it was written" in line
    with pytest.raises(LoramError, match="was changed after"):
        Manifest.read(run_copy / "adapter")
    assert run_command(["verify", str(run_copy / "adapter")]) == 1
    assert "1 problem\n" in capsys.readouterr().out


def test_verify_says_what_cannot_be_verified(tmp_path: Path, capsys):
    assert run_command(["verify", str(tmp_path)]) == 1
    assert "neither an output of loram, nor a model" in capsys.readouterr().err
    assert run_command(["verify", str(tmp_path / "gone")]) == 1
    assert "no such directory" in capsys.readouterr().err


def test_json(finished_run: Path, capsys):
    assert run_command(["verify", str(finished_run / "merged"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["directories"][0].endswith("merged")


def test_a_chat_template_is_told_wherever_it_stands(base: Path, tmp_path: Path):
    model = Path(shutil.copytree(base, tmp_path / "model"))
    assert chat_template_digest(model) == "none"
    (model / "chat_template.jinja").write_text("{{ messages }}")
    in_file = chat_template_digest(model)
    (model / "chat_template.jinja").unlink()
    edit_json(model / "tokenizer_config.json", chat_template="{{ messages }}")
    assert chat_template_digest(model) == in_file != "none"
    (model / "tokenizer_config.json").write_bytes(b"\xff")
    with pytest.raises(LoramError, match=r"tokenizer_config\.json: not UTF-8"):
        chat_template_digest(model)


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja", "added_tokens.json", "pytorch_model.bin", "adapter_model.bin",
        "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json", "model.pt",
        "modeling.py", "special_tokens_map.json", "sub/config.json", "notes.txt",
        "model.safetensors.index.json",
    ],
)  # fmt: skip
def test_files_that_were_added_are_told(name, run_copy: Path):
    file = run_copy / "pruned" / name
    if name in Manifest.read(run_copy / "pruned").outputs:
        return
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    assert any(
        f"{name}: was put here afterwards" in line
        for line in problems(run_copy / "pruned", ancestry=False)
    )


def test_files_of_tools_are_no_problem(run_copy: Path):
    (run_copy / "pruned" / ".cache").mkdir()
    (run_copy / "pruned" / ".cache" / "x").write_text("")
    assert problems(run_copy / "pruned", ancestry=False) == []


def test_what_is_carried_along_is_compared_with_where_it_comes_from(run_copy: Path):
    file = run_copy / "adapter" / "loram.json"
    data = json.loads(file.read_text())
    data["inputs"]["source"]["path"] = str(run_copy / "aligned")
    file.write_text(sealed(data))
    assert problems(run_copy / "adapter") == []
    data["keep"]["1"]["intermediate"][-1] += 1
    file.write_text(sealed(data))
    assert any("keeps other heads or channels" in line for line in problems(run_copy / "adapter"))
    data["base"]["weights"] = "sha256:0"
    file.write_text(sealed(data))
    assert any(
        "another base than its record says (weights)" in line
        for line in problems(run_copy / "adapter")
    )


def pruned_by_command(base: Path, run: Path) -> Path:
    words = ["prune", "--run", run, "--model", base, "--strategy", "rand", "--ratio", 0.5]
    assert run_command([*map(str, words), "--keep-first", "1", "--keep-last", "1"]) == 0
    return run / "pruned"


def test_every_byte_of_the_base_is_compared_on_demand(tmp_path: Path, capsys):
    base = make_base(
        tmp_path / "base", hidden_size=512, num_attention_heads=8, num_key_value_heads=8
    )
    pruned = pruned_by_command(base, tmp_path / "run")
    assert problems(pruned, full=True) == []
    weights = base / "model.safetensors"
    entry = max(Model.open(base).index.tensors.values(), key=lambda entry: entry.num_bytes)
    data = bytearray(weights.read_bytes())
    data[entry.offset_bytes + 5000] ^= 1  # between the first two windows
    weights.write_bytes(data)
    assert problems(pruned) == []
    (line,) = problems(pruned, full=True)
    assert line.startswith(f"{weights.resolve()}: its bytes are not those of the base")


def test_a_changed_tokenizer_config_of_the_base_is_told(tmp_path: Path, base: Path):
    base = Path(shutil.copytree(base, tmp_path / "base"))
    pruned = pruned_by_command(base, tmp_path / "run")
    edit_json(base / "tokenizer_config.json", add_bos_token=True)
    (line,) = problems(pruned)
    assert "tokenizer_config.json differ" in line
    edit_json(base / "tokenizer_config.json", chat_template="{{ messages }}")
    assert any("chat template" in line for line in problems(pruned))
