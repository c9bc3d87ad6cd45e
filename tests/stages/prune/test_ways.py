"""``--fit-memory`` alone takes the best measured way that fits, and says so."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from loram_cli.arch.registry import family_for
from loram_cli.checkpoint.index import read_config
from loram_cli.cli.app import run_command
from loram_cli.config.defaults import Place, prune_spec
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
# A 70B, as far as one layer and another are alike.
CONFIG = {**load_preset("llama2-70b"), "num_hidden_layers": 10}
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
        ("18GiB", {"strategy": "lowbit", "bits": 3}, "then train; a card of 17.33 GiB"),
        ("8.2GiB", {"bits": 3}, "then train --gradient-checkpointing; a card of 8.03 GiB"),
        ("7GiB", {"bits": 3}, "--gradient-checkpointing --micro-batch 1; a card of 6.75 GiB"),
        ("6.7GiB", {"bits": 2}, "then align --method distill, train --gradient-checkpointing"),
    ],
)
def test_a_card_gets_the_way_that_kept_most(memory, settings, then):
    spec = spec_for(memory).settled()
    assert spec.picks_way
    way = chosen_way(spec, CONFIG)
    assert way is not None
    chose, why = way.said
    assert then in chose
    assert "gain on SmolLM2, the most of what fits; the whole base kept 1.00" in why
    assert {name: getattr(way.spec, name) for name in settings} == settings
    assert not way.spec.picks_way
    assert way.card_bytes is not None
    assert way.card_bytes <= Bytes.parse(memory)
    assert foresee(spec, CONFIG)[1].card_bytes == way.card_bytes


def test_the_card_is_that_of_the_training_that_is_told():
    spec = spec_for("8GiB", rank=16, max_length=256)
    way = chosen_way(spec.settled(), CONFIG)
    assert way is not None
    assert "train --gradient-checkpointing --rank 16 --max-length 256" in way.said[0]
    trained = foresee(way.spec, CONFIG)[0]
    setup = replace(training_setup(spec, CONFIG), gradient_checkpointing=True)
    needed = training_memory(family_for(CONFIG, "test"), trained, setup)
    assert needed.fits(way.card_bytes) and not needed.fits(way.card_bytes - 2)


def test_weights_told_to_be_in_nf4_leave_the_rows_that_were():
    way = chosen_way(spec_for("7GiB", quantize="nf4").settled(), CONFIG)
    assert way is not None
    assert (way.spec.strategy, way.spec.ratio) == ("stru", 0.65)
    assert "then train --quantize nf4 --gradient-checkpointing --micro-batch 1" in way.said[0]


def test_where_nothing_measured_fits_as_little_is_dropped_as_can_be():
    spec = spec_for("5.5GiB")
    way = chosen_way(spec.settled(), CONFIG)
    assert way is not None
    assert "--strategy stru at the smallest ratio that fits, then train --quantize" in way.said[0]
    assert (way.spec.strategy, way.spec.quantize, way.card_bytes) == ("stru", "nf4", None)
    result = foresee(spec, CONFIG)[1]
    assert 0.5 < (result.ratio or 0) < 1
    assert 0.999 < (result.card_bytes or 0) / Bytes.parse("5.5GiB") <= 1


@pytest.mark.parametrize(
    ("memory", "told", "flags"),
    [
        ("20.5GiB", {}, "--gradient-checkpointing"),
        ("8.5GiB", {"quantize": "nf4"}, "--quantize nf4 --gradient-checkpointing"),
    ],
)
def test_a_base_that_fits_whole_is_not_made_small(memory, told, flags):
    with pytest.raises(UsageError, match="the whole base fits already") as refused:
        chosen_way(spec_for(memory, **told).settled(), CONFIG)
    assert f"'loram train --on full {flags}'" in (refused.value.hint or "")


@pytest.mark.parametrize(
    "told",
    [{"strategy": "stru"}, {"importance": "taylor"}, {"multiple_of": 64}, {"keep_first": 2},
     {"scope": "global"}, {"uniform": True}],
)  # fmt: skip
def test_whoever_says_how_gets_the_smallest_ratio(told):
    spec = spec_for("8GiB", quantize="nf4", gradient_checkpointing=True, **told).settled()
    assert not spec.picks_way
    assert spec.strategy == "stru"
    assert chosen_way(spec, CONFIG) is None
    assert foresee(spec, CONFIG)[1].ratio is not None


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
    sections = {"prune": {"fit_memory": "4GiB"}, "train": TRAIN}
    file.write_text(yaml.safe_dump({"model": "x/y", "preset": "llama2-7b", **sections}))
    assert run_command(["run", str(file), "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--fit-memory 4.00 GiB: --strategy lowbit --bits 2, then align" in out
    assert "why: it kept 0.70 of full LoRA's gain on SmolLM2" in out
    assert run_command(["run", str(file), "--dry-run", "--json"]) == 0
    pruned, trained = json.loads(capsys.readouterr().out)["plans"]
    assert pruned["figures"]["result"]["bits"] == 2
    assert trained["memory_bytes"] < 4 * 2**30
    figures = pruned["figures"]
    assert [line.partition(":")[0] for line in figures["way"]] == ["--fit-memory 4.00 GiB", "why"]


def test_the_demo_bases_own_strategy_is_no_choice_of_the_users(tmp_path):
    place = Place(RunDirectory(tmp_path / "run"), DEMO_MODEL)
    assert prune_spec(place, {"fit_memory": "1GiB"}).picks_way
    assert not prune_spec(place, {"fit_memory": "1GiB", "strategy": "rand"}).picks_way
    assert prune_spec(place, {}).strategy == "stru"
