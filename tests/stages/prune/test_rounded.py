"""Weights of few bits: prune, align, train on what is packed, recover as it is; narrow ones too."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_base
from safetensors.torch import load_file

from loram_cli.checkpoint.low_bit import CONFIG_KEY, PackedEntry
from loram_cli.checkpoint.model import Model
from loram_cli.errors import UsageError
from loram_cli.memory.account import low_bit_weight_bytes
from loram_cli.modeling.load import load_causal_lm
from loram_cli.modeling.low_bit_linear import LowBitLinear
from loram_cli.modeling.skeleton import SkeletonModel, fill_whole
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.align import stage as align
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.recover import stage as recover
from loram_cli.stages.train import stage as train
from loram_cli.tools import memory_report

SILENT = NullReporter()


def prune_spec(base: Path, out: Path, text: Path | None = None, **changes: object):
    settings: dict[str, object] = {"strategy": "lowbit", "bits": 3, "group_size": 16}
    if text is not None:
        settings |= {"calibration": str(text), "calibration_samples": 12, "calibration_length": 32}
    return prune.PruneSpec(model=base, out=out, **{**settings, **changes})


def align_spec(source: Path, out: Path, text: Path, **changes: object) -> align.AlignSpec:
    settings = {
        "steps": 3, "batch": 4, "block_length": 32, "calibration_samples": 16, "block_steps": 8,
        "eval_rows": 4,
    }  # fmt: skip
    return align.AlignSpec(source=source, out=out, data=str(text), **{**settings, **changes})


def train_spec(source: Path, out: Path, data: Path, **changes: object) -> train.TrainSpec:
    settings = {
        "steps": 2, "batch": 4, "micro_batch": 2, "learning_rate": 1e-2, "warmup_steps": 0,
        "max_length": 64, "eval_examples": 4, "device": "cpu",
    }  # fmt: skip
    return train.TrainSpec(source=source, out=out, data=str(data), **{**settings, **changes})


def floating(directory: Path) -> dict[str, torch.Tensor]:
    model = load_causal_lm(directory, dtype=torch.float32, device="cpu")
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def chain(base: Path, text_file: Path, instructions: Path, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("lowbit")
    prune.run(prune_spec(base, run / "pruned", text_file), SILENT)
    spec = align_spec(run / "pruned", run / "aligned", text_file, method=("reconstruct", "distill"))
    align.run(spec, SILENT)
    train.run(train_spec(run / "aligned", run / "adapter", instructions), SILENT)
    recover.run(
        recover.RecoverSpec(model=base, adapter=run / "adapter", out=run / "recovered"), SILENT
    )
    return run


def test_norms_alone_are_trained_and_codes_stay(chain: Path, text_file: Path, tmp_path: Path):
    spec = align_spec(
        chain / "pruned", tmp_path / "out", text_file, method=("pretrain",), trained="norms"
    )
    align.run(spec, SILENT)
    before, after = (load_file(d / "model.safetensors") for d in (chain / "pruned", spec.out))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, tensor in before.items() if tensor.dim() == 1}
    with pytest.raises(UsageError, match="not merged into the few bits of"):
        align.plan(replace(spec, trained="lora"), SILENT)


@pytest.mark.slow
def test_codes_of_a_trellis_go_the_whole_way(
    base: Path, text_file: Path, instructions: Path, tmp_path: Path
):
    pruned, aligned = tmp_path / "pruned", tmp_path / "aligned"
    spec = prune_spec(base, pruned, text_file, codes="trellis", bits=2, importance="yaqa")
    prune.run(spec, SILENT)
    on_grid = prune_spec(base, tmp_path / "grid", text_file, bits=2, importance="yaqa")
    prune.run(on_grid, SILENT)
    result, other = (Manifest.read(d).results for d in (pruned, tmp_path / "grid"))
    assert result["codes"] == "trellis"
    assert result["linear_bytes"] == other["linear_bytes"]
    assert 0 < result["rounding_error"] < 1
    align.run(align_spec(pruned, aligned, text_file, method=("reconstruct", "distill")), SILENT)
    assert Model.open(aligned).config[CONFIG_KEY] == {
        "bits": 2, "group_size": 16, "codes": "trellis"
    }  # fmt: skip
    errors = Manifest.read(aligned).results["chain"][0]["layer_errors"]
    assert sum(e[1] for e in errors.values()) < sum(e[0] for e in errors.values())
    train.run(train_spec(aligned, tmp_path / "adapter", instructions), SILENT)
    streamed = train_spec(aligned, tmp_path / "streamed", instructions, stream=True)
    train.run(streamed, SILENT)
    mine, theirs = (
        load_file(tmp_path / d / "adapter_model.safetensors") for d in ("streamed", "adapter")
    )
    for name, factor in theirs.items():
        torch.testing.assert_close(mine[name], factor, rtol=1e-3, atol=1e-4)
    recover.run(
        recover.RecoverSpec(model=base, adapter=tmp_path / "adapter", out=tmp_path / "recovered"),
        SILENT,
    )
    assert Manifest.read(tmp_path / "recovered").results["small_params"] > 0


@pytest.mark.parametrize("stage", ["pruned", "aligned"])
def test_decoder_linears_are_rows_of_bytes(base: Path, chain: Path, stage: str):
    model, stored = Model.open(chain / stage), load_file(chain / stage / "model.safetensors")
    assert model.config[CONFIG_KEY] == {"bits": 3, "group_size": 16}
    whole = Model.open(base)
    assert list(model.shapes.items()) == list(whole.shapes.items())
    for name, tensor in stored.items():
        packed = name in model.linear_names
        assert (tensor.dtype == torch.uint8) == packed
        assert isinstance(model.index.tensors[name], PackedEntry) == packed
    expected = low_bit_weight_bytes(model.family, model.config, model.low_bit, 4)
    assert model.num_bytes == sum(t.nbytes for t in stored.values()) == expected


def test_the_result_says_what_is_held(base: Path, chain: Path):
    results = Manifest.read(chain / "pruned").results
    model = Model.open(chain / "pruned")
    held = sum(model.index.tensors[name].num_bytes for name in model.linear_names)
    params = sum(torch.Size(model.shapes[name]).numel() for name in model.linear_names)
    assert (results["bits"], results["group_size"]) == (3, 16)
    assert results["linear_bytes"] == held
    assert results["linear_share"] == pytest.approx(held / (2 * params), abs=1e-5)
    before, after = floating(base), floating(chain / "pruned")
    names = model.linear_names
    error = sum((after[n] - before[n]).square().sum() for n in names)
    norm = sum(before[n].square().sum() for n in names)
    assert results["rounding_error"] == pytest.approx(float(error / norm), rel=1e-3)
    assert 0 < results["rounding_error"] < 0.1


def test_what_is_no_decoder_linear_stays(base: Path, chain: Path):
    before, after = (load_file(d / "model.safetensors") for d in (base, chain / "pruned"))
    linears = Model.open(base).linear_names
    assert all(torch.equal(after[n], t) for n, t in before.items() if n not in linears)


def test_alignment_moves_codes_and_lowers_each_layers_error(chain: Path):
    before, after = (load_file(chain / d / "model.safetensors") for d in ("pruned", "aligned"))
    names = Model.open(chain / "pruned").linear_names
    assert all(not torch.equal(before[name], after[name]) for name in names)
    first, second = Manifest.read(chain / "aligned").results["chain"]
    assert second["method"] == "distill"
    errors = first["layer_errors"]
    assert len(errors) == 4
    assert sum(e[1] for e in errors.values()) < sum(e[0] for e in errors.values())


def test_packed_and_floating_models_compute_the_same(chain: Path):
    model = Model.open(chain / "aligned")
    skeleton = SkeletonModel(model, dtype=torch.float32, device="cpu")
    fill_whole(skeleton, SILENT)
    packed = skeleton.model
    kinds = [type(module) for module in packed.modules()]
    assert kinds.count(LowBitLinear) == len(model.linear_names)
    dense = load_causal_lm(model, dtype=torch.float32, device="cpu")
    ids = torch.arange(2, 34).reshape(2, 16)
    torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-6)


def test_recovery_is_the_identity(chain: Path):
    small, full = (
        load_file(chain / d / "adapter_model.safetensors") for d in ("adapter", "recovered")
    )
    assert small.keys() == full.keys()
    assert all(torch.equal(small[name], full[name]) for name in small)
    results = Manifest.read(chain / "recovered").results
    assert results["small_params"] == results["full_params"]


def test_streaming_trains_on_the_same_bytes(chain: Path, instructions: Path, tmp_path: Path):
    spec = train_spec(chain / "aligned", tmp_path / "streamed", instructions, stream=True)
    train.run(spec, SILENT)
    mine, theirs = (
        load_file(d / "adapter_model.safetensors")
        for d in (tmp_path / "streamed", chain / "adapter")
    )
    for name, factor in theirs.items():
        torch.testing.assert_close(mine[name], factor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_narrow_model_is_rounded_and_recovered_to_full_shapes(
    base: Path, text_file: Path, instructions: Path, tmp_path: Path
):
    narrow = prune_spec(
        base, tmp_path / "narrow", strategy="rand", ratio=0.5, keep_first=1, keep_last=1,
        bits=3, group_size=64,
    )  # fmt: skip
    prune.run(narrow, SILENT)
    small = prune_spec(
        base, tmp_path / "low", text_file, source=tmp_path / "narrow", bits=2, group_size=8
    )
    prune.run(small, SILENT)
    low, wide = Manifest.read(tmp_path / "low"), Manifest.read(tmp_path / "narrow")
    assert low.keep == wide.keep != {}
    assert low.base["weights"] == wide.base["weights"]
    train.run(train_spec(tmp_path / "low", tmp_path / "adapter", instructions), SILENT)
    recover.run(
        recover.RecoverSpec(model=base, adapter=tmp_path / "adapter", out=tmp_path / "recovered"),
        SILENT,
    )
    results = Manifest.read(tmp_path / "recovered").results
    assert results["small_params"] < results["full_params"]


def test_rounding_to_the_nearest_needs_no_text_and_is_repeatable(base: Path, tmp_path: Path):
    for name in ("one", "two"):
        prune.run(prune_spec(base, tmp_path / name, importance="nearest"), SILENT)
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratio": 0.5}, "--ratio does not go with --strategy lowbit"),
        ({"group_size": 12}, "--group-size 12 is no multiple of 8"),
        ({"scope": "global"}, "--scope global does not go with"),
        (
            {"strategy": "rand", "bits": 3, "group_size": 64, "codes": "trellis"},
            "--codes does not go with --strategy rand",
        ),
        ({"strategy": "rand", "bits": 2}, "--bits does not go with --strategy rand"),
        ({"importance": "taylor"}, "--importance taylor does not go with"),
        ({"strategy": "rand", "bits": 3, "group_size": 64, "source": Path("x")}, "--in x does not"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, changes, said: str):
    with pytest.raises(UsageError, match=said):
        prune_spec(tmp_path, tmp_path / "out", **{"importance": None, **changes}).settled()


def test_training_refuses_to_hold_it_in_nf4(chain: Path, instructions: Path, tmp_path: Path):
    spec = train_spec(chain / "pruned", tmp_path / "a", instructions, quantize="nf4")
    with pytest.raises(UsageError, match=r"--quantize nf4 does not go with .*held in 3 bits"):
        train.plan(spec, SILENT)


def test_a_model_of_few_bits_is_not_rounded_again(base: Path, chain: Path, tmp_path: Path):
    spec = prune_spec(base, tmp_path / "a", source=chain / "aligned", importance="nearest")
    with pytest.raises(UsageError, match="is of few bits already"):
        prune.plan(spec, SILENT)


def test_the_memory_report_counts_the_bytes(base: Path, chain: Path):
    spec = memory_report.MemoryReportSpec(model=base, pruned=chain / "pruned")
    rows = memory_report.run(spec, SILENT).rows
    assert [row.precision for row in rows] == ["bf16", "nf4", "3 bits"]
    assert rows[2].lora_params == rows[0].lora_params
    assert rows[2].weight_bytes < rows[0].weight_bytes
    report = memory_report.run(
        memory_report.MemoryReportSpec(preset="llama2-13b", strategy="lowbit"), SILENT
    )
    weights = [row.weight_bytes for row in report.rows if row.precision.endswith("bits")]
    assert len(weights) == 3
    assert weights == sorted(weights, reverse=True)


@pytest.mark.slow
def test_a_tied_head_with_odd_widths_goes_the_whole_way(
    text_file: Path, instructions: Path, tmp_path: Path
):
    base = make_base(tmp_path / "base", hidden_size=24, num_attention_heads=4,
                     num_key_value_heads=2, intermediate_size=37, tie_word_embeddings=True)  # fmt: skip
    prune.run(prune_spec(base, tmp_path / "pruned", text_file), SILENT)
    align.run(align_spec(tmp_path / "pruned", tmp_path / "aligned", text_file,
                         method=("distill",)), SILENT)  # fmt: skip
    train.run(train_spec(tmp_path / "aligned", tmp_path / "adapter", instructions), SILENT)
    config = json.loads((tmp_path / "aligned" / "config.json").read_text())
    assert config[CONFIG_KEY]["bits"] == 3


def test_yaqa_is_another_rounding_and_leaves_nothing_behind(base, text_file, tmp_path: Path):
    out, again, gptq = (tmp_path / name for name in ("yaqa", "again", "gptq"))
    spec = prune_spec(base, out, text_file, importance="yaqa", bits=2)
    needs = prune.plan(spec, SILENT).work.calibration
    assert (needs.gradients.samples, needs.gradients.length) == (12, 32)
    linears = Model.open(base).linear_names
    rows = [Model.open(base).shapes[name][0] for name in linears]
    assert needs.disk_bytes == 2 * sum(n * n for n in rows)
    prune.run(spec, SILENT)
    prune.run(replace(spec, out=again, calibration_memory=0), SILENT)
    prune.run(prune_spec(base, gptq, text_file, bits=2), SILENT)
    files = {path.name for path in gptq.iterdir()}
    assert {path.name for path in out.iterdir()} == files
    yaqa, same, other = (load_file(d / "model.safetensors") for d in (out, again, gptq))
    assert all(torch.equal(yaqa[name], same[name]) for name in yaqa)
    # Weights of one block of rows are rounded alike.
    assert any(not torch.equal(yaqa[name], other[name]) for name in linears)
    assert Manifest.read(out).results["rounding_error"] > 0
