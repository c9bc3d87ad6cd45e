"""Hub ids without a network: told within seconds, and served from the caches."""

import shutil
import socket
import time
from pathlib import Path

import pytest

from loram_cli import hub
from loram_cli.checkpoint.sources import resolve_model
from loram_cli.errors import LoramError
from loram_cli.quiet import no_progress_bars
from loram_cli.training.data.documents import load_instructions

RECORDS = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(5)]


@pytest.fixture(autouse=True)
def no_switches(monkeypatch):
    for name in hub._OFFLINE_SWITCHES:
        monkeypatch.delenv(name, raising=False)
    hub._answers.cache_clear()


@pytest.fixture
def model_cache(monkeypatch, tmp_path) -> Path:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def data_cache(monkeypatch, tmp_path) -> Path:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path


def forbid_network(monkeypatch):
    def connect(*_):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


def cache_model(cache: Path) -> Path:
    root = cache / "models--owner--name"
    snapshot = root / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123abc")
    return snapshot


def cache_data(cache: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_list(RECORDS, split="train")
    with no_progress_bars("datasets"):
        dataset.save_to_disk(cache / "made")
    folder = cache / "owner___name" / "default" / "0.0.0" / "0123abc"
    folder.mkdir(parents=True)
    (arrow,) = (cache / "made").glob("*.arrow")
    # The cache holds streams of batches, as save_to_disk does.
    shutil.copyfile(arrow, folder / "name-train.arrow")
    info = dataset.info
    info.builder_name, info.dataset_name, info.config_name = "json", "name", "default"
    info.splits = datasets.SplitDict()
    info.splits.add(datasets.SplitInfo("train", num_examples=len(RECORDS), dataset_name="name"))
    info.write_to_directory(folder)


def test_an_address_that_never_answers_costs_seconds(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setattr(hub, "_PROBE_SECONDS", 0.3)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        started = time.monotonic()
        assert "cannot be reached" in hub.unreachable()
        assert time.monotonic() - started < 5


def test_a_slow_name_lookup_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(hub, "_PROBE_SECONDS", 0.2)
    monkeypatch.setattr(hub, "_ask", lambda _: time.sleep(3) or True)
    started = time.monotonic()
    assert not hub.hub_reachable()
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("switch", hub._OFFLINE_SWITCHES)
def test_the_switch_asks_nobody(monkeypatch, switch):
    forbid_network(monkeypatch)
    monkeypatch.setenv(switch, "1")
    assert hub.unreachable() == f"{switch} forbids to ask the hub"


def test_unknown_model_offline_is_one_line(monkeypatch, model_cache):
    monkeypatch.setattr(hub, "_ask", lambda _: False)
    forbid_network(monkeypatch)
    with pytest.raises(
        LoramError, match=r"not in the hub's cache, and the hub .* cannot"
    ) as caught:
        resolve_model("owner/name")
    assert "\n" not in caught.value.message


def test_cached_model_loads_offline(monkeypatch, model_cache):
    snapshot = cache_model(model_cache)
    forbid_network(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_model("owner/name") == snapshot


def test_cached_model_loads_when_the_hub_is_out_of_reach(monkeypatch, model_cache):
    snapshot = cache_model(model_cache)
    monkeypatch.setattr(hub, "_ask", lambda _: False)
    forbid_network(monkeypatch)
    assert resolve_model("owner/name") == snapshot


def test_unknown_data_offline_is_one_line(monkeypatch, data_cache):
    monkeypatch.setattr(hub, "_ask", lambda _: False)
    forbid_network(monkeypatch)
    with pytest.raises(
        LoramError, match=r"not in the hub's cache, and the hub .* cannot"
    ) as caught:
        load_instructions("owner/name")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("limit", [None, 3])
def test_cached_data_loads_offline(monkeypatch, data_cache, limit):
    cache_data(data_cache)
    forbid_network(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(load_instructions("owner/name", limit=limit)) == (limit or len(RECORDS))
