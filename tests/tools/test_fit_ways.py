"""The ways that fit a memory, and the rows layer by layer, beside the arithmetic they come from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loram_cli.arch.registry import family_for
from loram_cli.memory.presets import load_preset
from loram_cli.memory.setup import TrainingSetup
from loram_cli.memory.streaming import step_traffic, streamed_training_memory
from loram_cli.memory.training import USABLE_SHARE, training_memory
from loram_cli.tools.fit_ways import Question, fitting_ways
from loram_cli.tools.stream_rows import Speeds, stream_rows
from loram_cli.units import GIB

MEASURED = Path(__file__).parents[1] / "benchmarks" / "gpu" / "measured"
CONFIG = load_preset("llama2-13b")
FAMILY = family_for(CONFIG, "13b")
SPEEDS = Speeds(bus=25e9, disk=3e9, flops=60e12, start_seconds=0.0)


def asked(gib, **changes):
    known = {
        "family": FAMILY, "config": CONFIG, "setup": TrainingSetup(), "batch": 32, "keeps": (4, 2),
        "multiple_of": 1, "fit_bytes": int(gib * GIB), "speeds": SPEEDS, **changes,
    }  # fmt: skip
    return Question(**known)


def ways(gib, **changes):
    return {way.name: way for way in fitting_ways(asked(gib, **changes))}


@pytest.mark.parametrize("gib", [8, 16, 24, 48])
def test_every_way_fits_and_they_come_fastest_first(gib):
    found = fitting_ways(asked(gib))
    assert found and all(w.training_bytes <= gib * GIB * USABLE_SHARE for w in found)
    assert [w.seconds for w in found] == sorted(w.seconds for w in found)
    for precision in ("bf16", "nf4"):
        kinds = {way.kind for way in found if way.precision == precision}
        # Held whole, or all that do without.
        assert kinds in ({"resident"}, {"streamed"}, {"pruned", "streamed"})


def test_a_hundredth_less_of_pruning_does_not_fit():
    from loram_cli.pruning.plan import layer_widths, pruned_config

    way = next(way for way in fitting_ways(asked(16)) if way.kind == "pruned")
    setup = TrainingSetup(
        quantize=None if way.precision == "bf16" else "nf4",
        micro_batch=way.micro_batch, gradient_checkpointing=way.gradient_checkpointing,
    )  # fmt: skip

    def memory(ratio):
        geometry = FAMILY.geometry(CONFIG)
        return training_memory(
            FAMILY, pruned_config(CONFIG, geometry, layer_widths(geometry, ratio, 4, 2, 1)), setup
        )

    assert memory(way.ratio).total == way.training_bytes
    assert not memory(round(way.ratio - 0.01, 2)).fits(16 * GIB)


def test_more_memory_takes_away_flags_and_then_streaming():
    at = {gib: ways(gib) for gib in (8, 16, 24, 80)}
    assert at[8]["stream QLoRA"].exact and at[8]["stream QLoRA"].disk_seconds > 0
    assert "QLoRA" not in at[8] and "QLoRA" in at[24]
    assert at[24]["QLoRA"].gradient_checkpointing
    assert not at[80]["QLoRA"].gradient_checkpointing
    assert at[80]["QLoRA"].seconds == pytest.approx(at[24]["QLoRA"].seconds * 2 / 3)
    assert list(at[80]) == ["LoRA", "QLoRA"]


@pytest.mark.parametrize(
    ("row", "preset", "ratio", "measured"),
    [
        ("b1", "llama2-7b", 0.0, {}),
        ("b2", "llama2-13b", 0.0, {}),
        ("b4", "llama2-13b", 0.65, {}),
        ("b5", "llama2-7b", 0.0, {"gradient_checkpointing": True}),
        ("b6", "llama2-13b", 0.0, {"gradient_checkpointing": True}),
        ("b8", "llama2-13b", 0.65, {"gradient_checkpointing": True}),
        ("c3", "llama3.1-70b", 0.57, {"gradient_checkpointing": True, "quantize": "nf4",
                                      "micro_batch": 1}),
    ],
)  # fmt: skip
def test_seconds_are_near_those_of_an_h100(row, preset, ratio, measured):
    from loram_cli.tools import fit_ways
    from loram_cli.tools.specs import BenchModel

    name = f"{preset}:{ratio:g}:x64" if ratio else preset
    config = BenchModel.parse(name).config()
    setup = TrainingSetup(**measured)
    h100 = Speeds(bus=54e9, disk=3e9, flops=400e12, start_seconds=6e-3)
    question = asked(80, family=family_for(config, name), config=config, setup=setup,
                     batch=setup.micro_batch, speeds=h100)  # fmt: skip
    memory = training_memory(question.family, config, setup)
    way = fit_ways._computed(question, config, setup, memory, "resident", 0.0)
    (file,) = MEASURED.glob("nvidia-h100*.json")
    figures = json.loads(file.read_text())["rows"][row]["figures"]
    assert way.seconds == pytest.approx(figures["seconds_per_step"], rel=0.3)


def test_layers_that_the_card_has_room_for_need_no_ram():
    small, large = ways(8, batch=4)["stream LoRA"], ways(24, batch=4)["stream LoRA"]
    assert large.host_bytes < small.host_bytes
    slow = Speeds(bus=1e9, disk=1e9, flops=1e18, start_seconds=0.0)
    small, large = (ways(gib, batch=4, speeds=slow)["stream LoRA"] for gib in (8, 24))
    assert large.seconds < small.seconds


def test_rows_are_the_account_and_its_traffic():
    setup = TrainingSetup(micro_batch=4)
    quick = replace(SPEEDS, flops=1e15)
    rows = list(stream_rows(FAMILY, CONFIG, setup, (2, 32), quick))
    assert [(row.precision, row.batch) for row in rows] == [
        ("bf16", 2), ("bf16", 32), ("nf4", 2), ("nf4", 32),
    ]  # fmt: skip
    few, many = rows[2:]
    memory = streamed_training_memory(
        FAMILY, CONFIG, replace(setup, quantize="nf4"), 8, host_copies=True
    )
    assert (many.training_bytes, many.host_bytes) == (memory.total, memory.host)
    traffic = step_traffic(FAMILY, CONFIG, replace(setup, quantize="nf4"), 8, host_copies=True)
    assert many.bus_bytes == traffic.device_bytes == few.bus_bytes
    assert many.bus_seconds == quick.seconds(traffic)
    assert many.disk_bytes > 3 * many.bus_bytes
    # Reading is paid once a step: tokens a second rise with the batch.
    assert many.tokens_per_second > few.tokens_per_second
    assert many.offloaded_training_bytes < many.training_bytes
    assert many.offloaded_host_bytes > many.host_bytes
