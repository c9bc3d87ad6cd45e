import json
import subprocess
import sys
from pathlib import Path

import pytest

from loram_cli.errors import LoramError, UsageError
from loram_cli.memory.presets import load_preset
from loram_cli.reporting import NullReporter
from loram_cli.schema import spec_from_mapping
from loram_cli.tools.memory_report import MemoryReportSpec, run
from loram_cli.units import GIB

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"

# Tables 4, 5 and 6 of the paper: preset, precision, ratio, original, pruned, reduction, HBM (GiB).
# The semi and unst rows of Table 4 are in tests/memory/test_account.py.
PAPER_ROWS = [
    ("llama2-13b", "bf16", 0.65, 13015864320, 6005662720, "2.17x", "11.19"),
    ("llama2-70b", "bf16", 0.65, 68976648192, 28099436544, "2.45x", "52.34"),
    ("llama2-70b", "bf16", 0.75, 68976648192, 21488738304, "3.21x", "40.03"),
    ("llama2-70b", "bf16", 0.85, 68976648192, 16272924672, "4.24x", "30.31"),
    ("llama2-70b", "bf16", 0.95, 68976648192, 9662226432, "7.14x", "18.00"),
    ("llama3.1-70b", "bf16", 0.85, 70553706496, 17849982976, "3.95x", "33.25"),
    ("llama2-70b", "nf4", 0.65, 68976648192, 7024859136, "9.82x", "13.08"),
    ("llama2-70b", "nf4", 0.75, 68976648192, 5372184576, "12.84x", "10.01"),
    ("llama2-70b", "nf4", 0.85, 68976648192, 4068231168, "16.95x", "7.58"),
    ("llama2-70b", "nf4", 0.95, 68976648192, 2415556608, "28.56x", "4.50"),
    ("llama3.1-70b", "nf4", 0.85, 70553706496, 4462495744, "15.81x", "8.31"),
]


def report(**fields):
    return run(MemoryReportSpec(**fields), NullReporter())


def find(result, precision, ratio):
    [row] = [r for r in result.rows if (r.precision, r.ratio) == (precision, ratio)]
    return row


def write_config(directory, config):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("strategy", ["rand", "stru"])
@pytest.mark.parametrize(
    ("preset", "precision", "ratio", "original", "pruned", "reduction", "hbm_gib"), PAPER_ROWS
)
def test_rows_of_tables_4_to_6(
    preset, precision, ratio, original, pruned, reduction, hbm_gib, strategy
):
    result = report(preset=preset, ratios=(ratio,), strategy=strategy)
    row = find(result, precision, ratio)
    assert result.rows[0].params == original
    assert row.paper_params == pruned
    assert f"{row.paper_reduction:.2f}x" == reduction
    assert f"{row.paper_weight_bytes / GIB:.2f}" == hbm_gib


def test_every_model_stands_in_bf16_and_nf4_and_the_base_first():
    rows = report(preset="llama2-70b").rows
    names = ["base", "stru 0.65", "stru 0.75", "stru 0.85", "stru 0.95"]
    assert [(r.name, r.precision) for r in rows] == [
        (name, precision) for name in names for precision in ("bf16", "nf4")
    ]


def test_share_removed_is_not_the_ratio():
    row = find(report(preset="llama2-70b", ratios=(0.85,)), "bf16", 0.85)
    assert row.removed_share == pytest.approx(1 - 16272924672 / 68976648192)
    assert row.removed_share < row.ratio


def test_rows_add_up():
    for row in report(preset="llama3.1-8b").rows:
        state_bytes = row.adapter_bytes + row.gradient_bytes + row.optimizer_bytes
        assert row.training_state_bytes == state_bytes == 16 * row.lora_params
        assert row.weight_reduction == 2 * 8030261248 / row.weight_bytes
        assert row.training_bytes_without_activations == row.weight_bytes + state_bytes
        if row.precision == "bf16":
            assert row.weight_bytes == row.paper_weight_bytes == 2 * row.params
        else:
            assert row.weight_bytes > row.paper_weight_bytes


def test_adapters_narrow_with_the_layers_and_scale_with_rank():
    whole, _, narrow, _ = report(preset="llama2-13b", ratios=(0.65,)).rows
    assert narrow.lora_params < whole.lora_params
    doubled = report(preset="llama2-13b", ratios=(0.65,), rank=16).rows[2]
    assert doubled.lora_params == 2 * narrow.lora_params
    queries = report(preset="llama2-13b", targets=("q_proj",)).rows[0]
    assert queries.lora_params == 40 * 8 * (5120 + 5120)


@pytest.mark.parametrize(("strategy", "nonzero"), [("semi", 6671979520), ("unst", 6037591040)])
def test_zeroed_weights_are_counted_but_still_stored(strategy, nonzero):
    base, base_nf4, sparse, sparse_nf4 = report(preset="llama2-13b", strategy=strategy).rows
    assert sparse.params == nonzero
    assert sparse.paper_weight_bytes == 2 * nonzero
    assert sparse.stored_params == base.params
    assert (sparse.weight_bytes, sparse_nf4.weight_bytes) == (
        base.weight_bytes,
        base_nf4.weight_bytes,
    )
    assert sparse.lora_params == base.lora_params


def test_erratum_is_named_where_it_belongs_and_only_there():
    [note] = [n for n in report(preset="llama2-13b", strategy="semi").notes if "Table 4" in n]
    assert "6738415616 (1.93x)" in note and "6671979520 (1.95x" in note
    for fields in ({"preset": "llama2-70b", "strategy": "semi"}, {"preset": "llama2-13b"}):
        assert not [n for n in report(**fields).notes if "Table 4" in n]


def test_pruned_directory_is_reported_as_its_config_says(tmp_path):
    config = load_preset("llama2-7b")
    base = write_config(tmp_path / "base", config)
    widths = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    layers = {str(i): {**widths, "intermediate_size": 100} for i in range(4, 30)}
    pruned = write_config(tmp_path / "pruned", {**config, "per_layer_config": layers})
    result = report(model=base, pruned=pruned)
    assert [row.name for row in result.rows] == ["base", "base", "pruned", "pruned"]
    gone = 26 * (4 * 24 * 128 * 4096 + 3 * (11008 - 100) * 4096)
    assert result.rows[2].params == 6738415616 - gone
    assert result.rows[2].ratio is None
    both = report(model=base, pruned=pruned, ratios=(0.5,))
    assert [row.name for row in both.rows[::2]] == ["base", "stru 0.5", "pruned"]


def test_directory_and_ratio_agree_on_what_the_plan_writes(tmp_path):
    from loram_cli.arch.spec import Geometry
    from loram_cli.pruning.plan import layer_widths, per_layer_config

    config = load_preset("llama2-13b")
    geometry = Geometry.from_config(config)
    layers = per_layer_config(geometry, layer_widths(geometry, 0.65))
    pruned = write_config(tmp_path / "pruned", {**config, "per_layer_config": layers})
    rows = report(preset="llama2-13b", ratios=(0.65,), pruned=pruned).rows
    assert rows[2].params == rows[4].params == 6005662720
    assert rows[3].weight_bytes == rows[5].weight_bytes
    assert rows[2].lora_params == rows[4].lora_params


def test_pruned_directory_in_the_place_of_the_base_stands_alone(tmp_path):
    layers = {"5": {"intermediate_size": 100}}
    config = {**load_preset("llama2-7b"), "per_layer_config": layers}
    directory = write_config(tmp_path / "pruned", config)
    result = report(model=directory)
    assert [row.params for row in result.rows] == 2 * [6738415616 - 3 * 10908 * 4096]
    assert [note for note in result.notes if "pruned already" in note]
    assert not [note for note in report(preset="llama2-7b").notes if "pruned already" in note]
    with pytest.raises(UsageError, match="is pruned already"):
        report(model=directory, ratios=(0.5,))


def test_config_file_alone_serves_as_model(tmp_path):
    directory = write_config(tmp_path / "m", load_preset("llama3.1-8b"))
    from_file = report(model=directory / "config.json")
    assert from_file.rows == report(model=directory).rows == report(preset="llama3.1-8b").rows


def test_pruned_directory_of_another_base_is_refused(tmp_path):
    pruned = write_config(tmp_path / "pruned", load_preset("llama2-7b"))
    with pytest.raises(LoramError, match=r"its hidden_size is 4096, the base's 5120"):
        report(preset="llama2-13b", pruned=pruned)


def test_result_is_plain_json():
    mapping = report(preset="llama2-13b").to_mapping()
    assert json.loads(json.dumps(mapping)) == mapping
    assert mapping["rows"][2]["params"] == 6005662720
    assert mapping["targets"][-1] == "lm_head"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "--preset"),
        ({"preset": "llama2-7b", "model": Path("m")}, "not both"),
        ({"preset": "llama2-7b", "ratios": (0.5, 1.0)}, r"--ratio 1 is outside \(0, 1\)"),
        ({"preset": "llama2-7b", "ratios": (float("nan"),)}, "is not a finite number"),
        ({"preset": "llama2-7b", "strategy": "semi", "ratios": (0.6,)}, "two of every four"),
        ({"preset": "llama2-7b", "strategy": "unst", "multiple_of": 8}, "--multiple-of does not"),
        ({"preset": "llama2-7b", "multiple_of": 0}, "--multiple-of must be above 0"),
        ({"preset": "llama2-7b", "keep_first": -1}, "--keep-first cannot be negative"),
        ({"preset": "llama2-7b", "rank": 0}, "--rank must be above 0"),
        ({"preset": "llama2-7b", "keep_first": 30}, "lower --keep-first and --keep-last"),
        ({"preset": "lama2-7b"}, "did you mean 'llama2-7b'"),
        ({"preset": "llama2-7b", "targets": ("k_prj",)}, "did you mean 'k_proj'"),
    ],
)
def test_wrong_requests_are_usage_errors(fields, said):
    with pytest.raises(UsageError, match=said):
        report(**fields)


def test_unknown_strategy_is_refused_by_the_spec():
    with pytest.raises(UsageError, match="did you mean 'stru'"):
        spec_from_mapping(MemoryReportSpec, {"preset": "llama2-7b", "strategy": "strut"}, "flags")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "a whole number from 1"),
        ({"num_attention_heads": 0}, "a whole number from 1"),
        ({"num_hidden_layers": "32"}, "a whole number from 1"),
        ({"vocab_size": -5}, "a whole number from 1"),
        ({"intermediate_size": 1.5}, "a whole number from 1"),
        ({"per_layer_config": [1]}, "no mapping"),
        ({"model_type": "transfo_x"}, "not a known family"),
    ],
)
def test_unsound_config_is_one_clear_error(tmp_path, change, said):
    directory = write_config(tmp_path / "m", {**load_preset("llama2-7b"), **change})
    with pytest.raises(LoramError, match=said) as caught:
        report(model=directory)
    assert str(directory) in str(caught.value)


def test_missing_key_and_missing_file_are_named(tmp_path):
    config = load_preset("llama2-7b")
    del config["intermediate_size"]
    directory = write_config(tmp_path / "m", config)
    with pytest.raises(LoramError, match="no intermediate_size"):
        report(model=directory)
    with pytest.raises(LoramError, match="no such file"):
        report(model=tmp_path / "absent")


def test_a_preset_needs_no_torch():
    code = (
        "import sys\n"
        "from loram_cli.reporting import NullReporter\n"
        "from loram_cli.tools.memory_report import MemoryReportSpec, run\n"
        "assert run(MemoryReportSpec(preset='llama2-70b'), NullReporter()).rows\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(not STORIES.is_dir(), reason="shared reference inputs are absent")
def test_real_checkpoint_counts_as_its_file_does():
    from safetensors import safe_open

    with safe_open(STORIES / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    result = report(model=STORIES, ratios=(0.5,), keep_first=1, keep_last=1)
    assert result.rows[0].params == stored == 260032
    assert result.rows[2].params < stored
    with pytest.raises(UsageError, match="--keep-first"):
        report(model=STORIES)


@pytest.mark.parametrize("same", [True, False], ids=["equal", "other"])
def test_a_head_stored_beside_a_tied_embedding_is_counted(same, base, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    model = shutil.copytree(base, tmp_path / "tied")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(model / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    if same:
        tensors["lm_head.weight"] = embedding.clone()
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    held = sum(tensor.numel() for tensor in tensors.values())
    wide = {"strategy": "rand", "ratios": (0.5,), "keep_first": 1, "keep_last": 1}
    stored = report(model=model, **wide)
    assert find(stored, "bf16", None).params == held
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    tied = report(model=model, **wide)
    for precision in ("bf16", "nf4"):
        for ratio in (None, 0.5):
            more, less = find(stored, precision, ratio), find(tied, precision, ratio)
            assert more.stored_params - less.stored_params == embedding.numel()
            assert more.training_bytes - less.training_bytes == 2 * embedding.numel()
