import json
from pathlib import Path

import huggingface_hub
import pytest
from helpers.fake_hub import FakeHub

from loram_cli.cli.app import run_command
from loram_cli.tools import push as push_module


@pytest.fixture
def hub(monkeypatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(push_module, "unreachable", lambda: None)
    return fake


def test_an_output_is_uploaded_without_local_paths(run_copy: Path, hub: FakeHub, capsys):
    words = ["recover", "--run", str(run_copy), "--force", "--push", "me/adapter"]
    assert run_command(words) == 0
    assert "pushed to https://hub/me/adapter" in capsys.readouterr().err
    assert hub.repositories == {"me/adapter": True}
    sent = {name.removeprefix("me/adapter/") for name in hub.files}
    assert sent == {file.name for file in (run_copy / "recovered").iterdir()}
    manifest = hub.files["me/adapter/loram.json"].decode()
    assert str(run_copy) not in manifest
    assert json.loads(manifest)["spec"]["adapter"] == "adapter"
    kept = (run_copy / "recovered" / "loram.json").read_text()
    assert str(run_copy) in kept, "the local record stays as it was"


def test_merged_weights_go_beside_the_adapter(run_copy: Path, hub: FakeHub):
    assert run_command(["recover", "--run", str(run_copy), "--merge", "--push", "me/x"]) == 0
    assert set(hub.repositories) == {"me/x", "me/x-merged"}
    assert "me/x-merged/model.safetensors" in hub.files


@pytest.mark.parametrize("name", ["adapter", "a/b/c", "me/", "me/a b", "-/-"])
def test_a_name_that_is_none_is_refused_before_the_work(
    run_copy: Path, hub: FakeHub, name: str, capsys
):
    words = ["recover", "--run", str(run_copy), "--force", f"--push={name}"]
    before = (run_copy / "recovered" / "loram.json").read_bytes()
    assert run_command(words) == 2
    assert "expected OWNER/NAME" in capsys.readouterr().err
    assert (run_copy / "recovered" / "loram.json").read_bytes() == before


def test_without_a_token_or_a_network_nothing_is_begun(
    run_copy: Path, hub: FakeHub, monkeypatch, capsys
):
    before = (run_copy / "recovered" / "loram.json").read_bytes()
    words = ["recover", "--run", str(run_copy), "--force", "--push", "me/adapter"]
    hub.fails = "token"
    assert run_command(words) == 1
    err = capsys.readouterr().err
    assert "Token is required" in err
    assert len(err.splitlines()) == 2
    monkeypatch.setattr(push_module, "unreachable", lambda: "the hub cannot be reached")
    assert run_command(words) == 1
    assert "the hub cannot be reached" in capsys.readouterr().err
    assert (run_copy / "recovered" / "loram.json").read_bytes() == before


def test_a_failed_upload_leaves_the_output_and_says_where(run_copy: Path, hub: FakeHub, capsys):
    hub.fails = "upload"
    assert run_command(["recover", "--run", str(run_copy), "--push", "me/adapter"]) == 1
    assert f"the output stays at {run_copy / 'recovered'}" in capsys.readouterr().err
