"""A pruned model that is pushed once and trained on by its id."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from helpers.fake_hub import FakeHub
from helpers.tiny_models import make_base

from loram_cli.checkpoint import sources
from loram_cli.cli.app import run_command
from loram_cli.tools import push as push_module

pytestmark = pytest.mark.integration

PRUNED = "me/small"
FIT = ["--steps", "2", "--batch", "2", "--micro-batch", "2", "--device", "cpu"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    fake = FakeHub()

    def download(repository: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        assert not local_files_only
        return fake.snapshot(repository, tmp_path / "cache", allow_patterns)

    monkeypatch.setattr(push_module, "_api", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(push_module, "unreachable", lambda: None)
    monkeypatch.setattr(sources, "unreachable", lambda: None)
    return fake


@pytest.fixture
def pushed(hub: FakeHub, tmp_path: Path) -> Path:
    """The base that is kept at home; its pruned model is on the hub, and here no longer."""
    base = make_base(tmp_path / "base")
    words = ["prune", "--model", str(base), "--run", str(tmp_path / "first"), "--strategy", "rand",
             "--ratio", "0.5", "--keep-first", "0", "--keep-last", "0", "--push", PRUNED]  # fmt: skip
    assert run_command(words) == 0
    shutil.rmtree(tmp_path / "first")
    return base


def test_its_id_is_enough_to_align_train_and_recover(
    pushed: Path, text_file: Path, instructions: Path, tmp_path: Path, capsys
):
    run = ["--run", str(tmp_path / "run")]
    align = ["align", *run, "--in", PRUNED, "--data", str(text_file), "--block-length", "32", *FIT]
    assert run_command(align) == 0
    assert "me/small: every file is as it was recorded" in capsys.readouterr().err
    train = ["train", *run, "--in", PRUNED, "--data", str(instructions), "--max-length", "48", *FIT]
    assert run_command([*train, "--dry-run"]) == 0
    assert run_command(train) == 0
    recover = ["recover", *run, "--in", str(tmp_path / "run" / "adapter")]
    assert run_command([*recover, "--model", str(pushed)]) == 0
    snapshot = next((tmp_path / "cache").glob("models--me--small/snapshots/*"))
    assert run_command(["verify", str(snapshot)]) == 0


def test_an_adapter_by_another_trainer_is_recovered_by_the_id(pushed: Path, tmp_path: Path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    snapshot = sources.resolve_model(PRUNED)
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "foreign")
    words = ["recover", "--in", str(tmp_path / "foreign"), "--pruned", PRUNED, "--model",
             str(pushed), "--out", str(tmp_path / "recovered")]  # fmt: skip
    assert run_command(words) == 0
    assert (tmp_path / "recovered" / "adapter_model.safetensors").is_file()


def test_the_card_says_how_to_train_on_it(pushed: Path, hub: FakeHub):
    card = hub.files[f"{PRUNED}/README.md"].decode()
    assert 'AutoModelForCausalLM.from_pretrained("me/small")' in card
    assert "loram train --in me/small --data" in card
    assert "loram recover --in ADAPTER --pruned me/small --model base" in card
    assert "./pruned" not in card
    assert str(pushed.parent) not in card


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "loram.json"])
def test_a_file_that_was_changed_on_the_way_is_refused(
    name: str, pushed: Path, hub: FakeHub, instructions: Path, tmp_path: Path, capsys
):
    data = bytearray(hub.files[f"{PRUNED}/{name}"])
    if name == "loram.json":
        changed = json.loads(data)
        changed["keep"]["1"]["intermediate"][0] += 1
        hub.files[f"{PRUNED}/{name}"] = json.dumps(changed).encode()
    else:
        place = len(data) - 5 if name == "model.safetensors" else data.index(b"256")
        data[place] ^= 1
        hub.files[f"{PRUNED}/{name}"] = bytes(data)
    words = ["train", "--run", str(tmp_path / "run"), "--in", PRUNED, "--data", str(instructions)]
    assert run_command([*words, *FIT]) == 1
    err = capsys.readouterr().err
    expected = "was changed after it was written" if name == "loram.json" else (
        f"me/small: {name} is not the file that was recorded"
    )  # fmt: skip
    assert expected in err
    assert not (tmp_path / "run" / "adapter").exists()


def test_an_id_that_the_hub_does_not_have_is_one_line(hub: FakeHub, tmp_path: Path, capsys):
    words = ["train", "--run", str(tmp_path / "run"), "--in", "me/none", "--data", "x.jsonl"]
    assert run_command(words) == 1
    err = capsys.readouterr().err
    assert "me/none: not a local directory, and the hub did not give it (404" in err
