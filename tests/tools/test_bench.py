"""The bench on the CPU, its rows, and the random models behind it."""

import json
import subprocess

import pytest
import torch

from loram_cli.arch.registry import family_for
from loram_cli.cli.app import run_command
from loram_cli.cli.draw.bench import bench_table
from loram_cli.errors import UsageError
from loram_cli.memory.account import count_params
from loram_cli.modeling.random_model import random_causal_lm
from loram_cli.tools.bench import (
    PAPER_ROWS,
    REFUSED,
    BenchResult,
    BenchRow,
    with_speedups,
)
from loram_cli.tools.specs import TINY_CONFIG, BenchModel, BenchSpec

pytestmark = pytest.mark.integration


def test_rows_are_a_preset_a_ratio_and_a_precision():
    models = [BenchModel.parse(row) for row in PAPER_ROWS]
    assert [model.label for model in models] == [
        "llama2-7b LoRA", "llama2-13b LoRA", "llama2-13b LoRAM 0.65", "llama2-13b LoRAM 0.65 x64",
        "llama2-70b QLoRAM 0.85", "llama2-70b QLoRAM 0.95",
    ]  # fmt: skip
    counts = [
        count_params(family_for(config, "row"), config).total
        for config in (model.config() for model in models)
    ]
    # Tables 5 and 8 of the paper; x64 has 26 channels more in each of 34 layers.
    wider = 6005662720 + 34 * 26 * 3 * 5120
    assert counts == [6738415616, 13015864320, 6005662720, wider, 16272924672, 9662226432]
    models.append(BenchModel("llama2-7b", 0.00001))
    assert [BenchModel.parse(str(model)) for model in models] == models


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("llama2-13b:2", "the ratio 2 is outside"),
        ("llama2-13b:x", "PRESET.:RATIO"),
        ("llama2-13b:0.5:int8", "PRESET.:RATIO"),
        ("llama2-13b:0.5:x0", "PRESET.:RATIO"),
        ("llama2-13b:-1", "PRESET.:RATIO"),
        ("llama2-13b:0:x8", "x8 is for a ratio above 0"),
        ("llama2-1b", "unknown preset"),
    ],
)
def test_rows_that_cannot_be(row, reason):
    with pytest.raises(UsageError, match=f"--row {row}: .*{reason}"):
        BenchSpec(rows=(row,))


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["--dropout", "3"], 2, "--dropout 3 is outside"),
        (["--device", "abacus"], 2, "device abacus: unknown"),
        (["--device", "cpu", "--optimizer", "paged_adamw_8bit"], 2, "needs a GPU"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, code, reason, capsys):
    assert run_command(["bench", "train", "--row", "llama2-7b", *words]) == code
    assert reason in capsys.readouterr().err


def test_rows_are_compared_with_lora_on_the_whole_of_the_same_preset():
    speeds = {
        "llama2-7b": 9.0, "tiny:0:nf4": 5.0, "tiny:0.5": 6.0, "tiny": 4.0, "tiny:0.5:nf4:x8": None,
    }  # fmt: skip
    rows = [
        BenchRow(
            row=row, label=row, device="cpu", params=1, predicted_bytes=1, samples_per_second=speed
        )
        for row, speed in speeds.items()
    ]
    assert [row.speedup for row in with_speedups(rows)] == [1.0, 1.25, 1.5, 1.0, None]
    assert with_speedups(rows[1:3]) == tuple(rows[1:3])


def test_a_column_that_no_row_fills_is_left_out():
    def row(**known):
        return BenchRow(row="tiny", label="tiny", device="H", params=1, predicted_bytes=1, **known)

    def headers(*rows):
        return [column.header for column in bench_table(BenchResult(rows=rows, notes=())).columns]

    measured = {"measured_bytes": 2, "seconds_per_step": 0.5, "samples_per_second": 8.0}
    assert headers(row(**measured)) == [
        "model", "parameters", "predicted", "measured", "s/step", "samples/s",
    ]  # fmt: skip
    on_gpu = row(**measured, reserved_bytes=3, deviation=-0.02, speedup=1.4)
    table = bench_table(BenchResult(rows=(on_gpu, row(failure="out of memory")), notes=()))
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["off by"] == ["-2.0%", "-"] and cells["of LoRA"] == ["1.40x", "-"]
    assert cells["measured"] == ["2 B", "out of memory"]


def test_what_the_measuring_process_refuses_is_told_in_full(monkeypatch, capsys):
    def refused(*args, **kwargs):
        return subprocess.CompletedProcess(args, REFUSED, "", "flash is absent\npip install it\n")

    monkeypatch.setattr("loram_cli.tools.bench.subprocess.run", refused)
    assert run_command(["bench", "train", "--row", "llama2-7b", "--device", "cpu"]) == 1
    assert "error: tiny LoRA: flash is absent\npip install it" in capsys.readouterr().err


@pytest.mark.parametrize("nf4", [False, True])
def test_random_models_have_their_shapes_in_their_type(nf4):
    if nf4:
        bitsandbytes = pytest.importorskip("bitsandbytes")
    config = BenchModel.parse("tiny:0.5").config()
    family = family_for(config, "tiny")
    model = random_causal_lm(family, config, dtype=torch.bfloat16, device="cpu", nf4=nf4)
    linears = set(family.linear_names(config))
    shapes = {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        shapes[name] = tuple(state.shape) if nf4 and name in linears else tuple(parameter.shape)
        assert parameter.device.type == "cpu" and not parameter.requires_grad
        if nf4 and name in linears:
            assert isinstance(parameter, bitsandbytes.nn.Params4bit) and state.nested
        else:
            assert parameter.dtype == torch.bfloat16
    assert shapes == family.tensor_shapes(config)
    with torch.no_grad():
        assert model.float()(torch.arange(3, 40)[None]).logits.isfinite().all() if not nf4 else True


def test_tied_embeddings_stay_one_tensor():
    config = {**TINY_CONFIG, "tie_word_embeddings": True}
    model = random_causal_lm(family_for(config, "tiny"), config, dtype=torch.float32, device="cpu")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_on_a_cpu_a_tiny_model_is_measured_and_it_says_so(capsys):
    words = ["bench", "train", "--preset", "llama2-70b", "--ratio", "0.85", "--device", "cpu"]
    assert (
        run_command([*words, "--steps", "1", "--length", "32", "--micro-batch", "1", "--json"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    [row] = result["rows"]
    assert (row["label"], row["device"], row["failure"]) == ("tiny LoRAM 0.85", "cpu", None)
    assert row["measured_bytes"] > 0 and row["samples_per_second"] > 0
    assert row["predicted_bytes"] > 4 * row["params"]
    assert "no GPU here" in result["notes"][0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bench", "eval"], "only 'train'"),
        (["bench", "train"], "bench needs a model"),
        (["bench", "train", "--ratio", "0.5"], "are for --preset"),
        (["bench", "train", "--multiple-of", "64"], "are for --preset"),
        (["bench", "train", "--preset", "tiny", "--multiple-of", "8"], "for a ratio above 0"),
        (["bench", "train", "--preset", "tiny", "--multiple-of", "0"], "must be above 0"),
    ],
)
def test_requests_that_cannot_be(words, says, capsys):
    assert run_command(words) == 2
    assert says in capsys.readouterr().err
