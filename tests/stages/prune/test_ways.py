"""``--fit-memory`` alone takes the best measured way that fits, and says so."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from loram_cli import pipeline
from loram_cli.arch.registry import family_for
from loram_cli.checkpoint.index import read_config
from loram_cli.cli.app import run_command
from loram_cli.config.defaults import Place, prune_spec
from loram_cli.config.recipe import load_recipe
from loram_cli.errors import UsageError
from loram_cli.memory.presets import load_preset
from loram_cli.memory.training import training_memory
from loram_cli.pruning.frontier import Point
from loram_cli.reporting import NullReporter
from loram_cli.runs.rundir import DEMO_MODEL, RunDirectory
from loram_cli.schema import Bytes
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.prune import ways
from loram_cli.stages.prune.budgets import training_setup
from loram_cli.stages.prune.plan import chosen_way, foresee

SILENT = NullReporter()
NARROW = {"strategy": "stru", "ratio": 0.65, "importance": "obs"}
TRAIN = {"data": "mine.jsonl", "gradient_checkpointing": True, "micro_batch": 1}
POINTS = (
    Point(name="full", bytes=1.0, kept=1.0),
    Point(name="nf4", quantize="nf4", bytes=0.26, kept=0.9),
    Point(name="three", prune={"strategy": "lowbit", "bits": 3}, bytes=0.2, kept=0.92),
    Point(name="two", prune={"strategy": "lowbit", "bits": 2}, align="distill", bytes=0.14,
          kept=0.7),
    Point(name="narrow", prune=NARROW, align="reconstruct", bytes=0.54, kept=0.75),
    Point(name="narrow-nf4", prune=NARROW, quantize="nf4", bytes=0.14, kept=0.6),
)  # fmt: skip


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """A table of its own, which measuring anew does not change."""
    monkeypatch.setattr(ways, "measured", lambda: ("SmolLM2", POINTS))


def spec_for(memory: str, **changes: object) -> prune.PruneSpec:
    told = {"model": Path("x"), "out": Path("y"), "calibration": "text.txt", **changes}
    return prune.PruneSpec(fit_memory=Bytes.parse(memory), **told)


@pytest.mark.parametrize(
    ("memory", "settings", "then"),
    [
        ("80GiB", {"strategy": "lowbit", "bits": 3}, "then train --gradient-checkpointing; a card"),
        ("34GiB", {"strategy": "lowbit", "bits": 3}, "train --gradient-checkpointing --micro-batc"),
        ("24GiB", {"strategy": "lowbit", "bits": 2}, "then align --method distill, train --gra"),
        ("20GiB", {"strategy": "stru", "ratio": 0.65}, "--quantize nf4 --gradient-checkpointing"),
    ],
)
def test_a_70b_gets_the_way_that_keeps_most(memory, settings, then):
    config = load_preset("llama2-70b")
    spec = spec_for(memory).settled()
    assert spec.picks_way
    way = chosen_way(spec, config)
    assert way is not None
    chose, why = way.said
    assert then in chose
    assert "gain on SmolLM2, the most of what fits; the whole base kept 1.00" in why
    assert {name: getattr(way.spec, name) for name in settings} == settings
    assert not way.spec.picks_way
    assert way.card_bytes is not None
    assert way.card_bytes <= Bytes.parse(memory)
    assert foresee(spec, config)[1].card_bytes == way.card_bytes


def test_the_card_is_that_of_the_training_that_is_told():
    config = load_preset("llama2-70b")
    spec = spec_for("34GiB", rank=16, max_length=256)
    way = chosen_way(spec.settled(), config)
    assert way is not None
    assert (
        "train --gradient-checkpointing --rank 16 --micro-batch 1 --max-length 256" in way.said[0]
    )
    trained = foresee(way.spec, config)[0]
    lean = {"gradient_checkpointing": True, "micro_batch": 1}
    setup = replace(training_setup(spec, config), **lean)
    needed = training_memory(family_for(config, "test"), trained, setup)
    assert needed.fits(way.card_bytes) and not needed.fits(way.card_bytes - 2)


def test_where_nothing_measured_fits_as_little_is_dropped_as_can_be():
    config = load_preset("llama2-70b")
    way = chosen_way(spec_for("12GiB").settled(), config)
    assert way is not None
    assert "--strategy stru at the smallest ratio that fits, then train --quantize" in way.said[0]
    assert (way.spec.strategy, way.spec.quantize, way.card_bytes) == ("stru", "nf4", None)
    result = foresee(spec_for("12GiB"), config)[1]
    assert 0.8 < (result.ratio or 0) < 0.9
    assert 0.999 * 12 * 2**30 < (result.card_bytes or 0) <= 12 * 2**30


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "needs a card of"),
        ({"quantize": "nf4"}, "needs a card of"),
    ],
)
def test_a_base_that_fits_whole_is_not_made_small(changes, said):
    with pytest.raises(UsageError, match=said) as refused:
        chosen_way(spec_for("40GiB", **changes).settled(), load_preset("llama2-13b"))
    flags = "--quantize nf4" if changes else "--gradient-checkpointing"
    assert f"loram train --on full {flags}" in (refused.value.hint or "")


@pytest.mark.parametrize(
    "told",
    [{"strategy": "stru"}, {"importance": "taylor"}, {"multiple_of": 64}, {"keep_first": 2},
     {"scope": "global"}, {"uniform": True}],
)  # fmt: skip
def test_whoever_says_how_gets_the_smallest_ratio(told):
    spec = spec_for("24GiB", quantize="nf4", gradient_checkpointing=True, **told).settled()
    assert not spec.picks_way
    assert spec.strategy == "stru"
    assert chosen_way(spec, load_preset("llama2-70b")) is None
    assert foresee(spec, load_preset("llama2-70b"))[1].ratio is not None


def test_a_way_needs_text():
    with pytest.raises(UsageError, match="--fit-memory chooses among ways that read text"):
        spec_for("24GiB", calibration=None)


def test_pruning_says_what_it_chose_and_why(base, text_file, tmp_path, monkeypatch):
    config = read_config(base)
    told = spec_for("1KiB", model=base, out=tmp_path / "pruned", calibration=str(text_file))
    cards = {}
    for bits in (2, 3):
        by_hand = prune.PruneSpec(model=base, out=tmp_path, strategy="lowbit", bits=bits,
                                  group_size=16, importance="nearest")  # fmt: skip
        trained = foresee(by_hand, config)[0]
        setup = replace(training_setup(told, config), gradient_checkpointing=True, micro_batch=1)
        cards[bits] = ways.card_bytes(family_for(config, "test"), trained, setup)
    small = {"group_size": 16, "importance": "nearest"}
    points = tuple(
        replace(point, prune={**point.prune, **small})
        for point in POINTS
        if point.prune.get("strategy") == "lowbit"
    )
    monkeypatch.setattr(ways, "measured", lambda: ("SmolLM2", (POINTS[0], *points)))
    spec = replace(told, fit_memory=Bytes((cards[2] + cards[3]) // 2))
    lines = []
    monkeypatch.setattr(SILENT, "note", lines.append, raising=False)
    done = prune.run(spec, SILENT)
    assert [line.partition(" ")[0] for line in lines] == ["--fit-memory", "why:"]
    assert "--bits 2 --group-size 16" in lines[0]
    manifest = done.manifest
    assert (manifest.spec["strategy"], manifest.spec["bits"]) == ("lowbit", 2)
    assert manifest.results["card_bytes"] == cards[2]
    # The same command finds its output, and so does the command that it stands for.
    assert not prune.run(spec, SILENT).fresh
    by_hand = prune.PruneSpec(model=base, out=spec.out, strategy="lowbit", bits=2,
                              calibration=str(text_file), **small)  # fmt: skip
    assert not prune.run(by_hand, SILENT).fresh


def test_a_recipe_and_its_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.yaml"
    sections = {"prune": {"fit_memory": "24GiB"}, "train": TRAIN}
    file.write_text(yaml.safe_dump({"model": "x/y", "preset": "llama2-70b", **sections}))
    planned = pipeline.plan(load_recipe(file), RunDirectory(tmp_path / "run"), SILENT)
    assert planned[0].figures["result"].bits == 2
    assert planned[1].memory_bytes < 24 * 2**30
    assert run_command(["run", str(file), "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--fit-memory 24.00 GiB: --strategy lowbit --bits 2, then align" in out
    assert "why: it kept 0.70 of full LoRA's gain on SmolLM2" in out
    assert run_command(["run", str(file), "--dry-run", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["plans"][0]["figures"]
    assert [line.partition(":")[0] for line in figures["way"]] == ["--fit-memory 24.00 GiB", "why"]


def test_the_demo_bases_own_strategy_is_no_choice_of_the_users(tmp_path):
    place = Place(RunDirectory(tmp_path / "run"), DEMO_MODEL)
    assert prune_spec(place, {"fit_memory": "1GiB"}).picks_way
    assert not prune_spec(place, {"fit_memory": "1GiB", "strategy": "rand"}).picks_way
    assert prune_spec(place, {}).strategy == "stru"
