"""Prune, align, train, recover, merge on a tiny Llama, and what must hold between them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.reporters import Interrupter, Interruption, WarningRecorder
from helpers.tiny_models import make_base
from safetensors.torch import load_file

from loram_cli.errors import LoramError, UsageError
from loram_cli.modeling.load import load_causal_lm
from loram_cli.pruning.groups import LayerKeep
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.align import stage as align
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.recover import merge
from loram_cli.stages.recover import stage as recover
from loram_cli.stages.train import stage as train

pytestmark = pytest.mark.integration

SILENT = NullReporter()
IDS = torch.arange(2, 34).reshape(2, 16)


def prune_spec(base: Path, out: Path, **changes: object) -> prune.PruneSpec:
    settings = {"ratio": 0.5, "keep_first": 1, "keep_last": 1, "strategy": "rand"}
    return prune.PruneSpec(model=base, out=out, **{**settings, **changes})


def train_spec(source: Path, out: Path, data: Path, **changes: object) -> train.TrainSpec:
    settings = {"steps": 3, "batch": 4, "micro_batch": 2, "learning_rate": 1e-2, "warmup_steps": 0}
    settings |= {"max_length": 64, "eval_examples": 4, "eval_steps": 2}
    return train.TrainSpec(source=source, out=out, data=str(data), **{**settings, **changes})


@pytest.fixture(scope="module")
def chain(base: Path, text_file: Path, instructions: Path, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    prune.run(prune_spec(base, run / "pruned", strategy="stru", calibration=str(text_file)), SILENT)
    spec = align.AlignSpec(
        source=run / "pruned", out=run / "aligned", data=str(text_file), steps=2, batch=4,
        block_length=32, learning_rate=1e-3,
    )  # fmt: skip
    align.run(spec, SILENT)
    train.run(train_spec(run / "aligned", run / "adapter", instructions), SILENT)
    recovering = {"adapter": run / "adapter", "model": base, "out": run / "recovered"}
    recover.run(recover.RecoverSpec(**recovering), SILENT)
    merging = {"adapter": run / "recovered", "model": base, "out": run / "merged"}
    merge.run(merge.MergeSpec(**merging, max_shard_bytes=20_000), SILENT)
    return run


def keep_of(directory: Path) -> dict[int, LayerKeep]:
    return {int(i): LayerKeep.from_mapping(k) for i, k in Manifest.read(directory).keep.items()}


@pytest.mark.parametrize(
    "changes",
    [{"strategy": "rand"}, {"strategy": "stru", "importance": "l2"}, {"strategy": "stru"}],
    ids=["rand", "l2", "taylor"],
)
def test_pruned_model_is_the_base_with_groups_zeroed(base, text_file, tmp_path, changes):
    if changes == {"strategy": "stru"}:
        changes = {**changes, "calibration": str(text_file)}
    prune.run(prune_spec(base, tmp_path / "pruned", **changes), SILENT)
    narrow = load_causal_lm(tmp_path / "pruned")
    full = load_causal_lm(base)
    keep = keep_of(tmp_path / "pruned")
    assert set(keep) == {1, 2}
    for i, kept in keep.items():
        layer = full.model.layers[i]
        dropped_heads = set(range(4)) - set(kept.key_value_heads)
        for head in dropped_heads:
            # What a head or channel adds, it adds through these columns.
            layer.self_attn.o_proj.weight.data[:, head * 8 : head * 8 + 8] = 0
        dropped = sorted(set(range(40)) - set(kept.intermediate))
        layer.mlp.down_proj.weight.data[:, dropped] = 0
    with torch.no_grad():
        torch.testing.assert_close(narrow(IDS).logits, full(IDS).logits, rtol=1e-4, atol=1e-5)


def test_pruning_twice_gives_the_same_bytes(base: Path, text_file: Path, tmp_path: Path):
    for name in ("a", "b"):
        spec = prune_spec(base, tmp_path / name, strategy="stru", calibration=str(text_file))
        prune.run(spec, SILENT)
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("a", "b"))
    assert a == b


def test_output_is_written_in_shards(base: Path, tmp_path: Path):
    prune.run(prune_spec(base, tmp_path / "pruned", max_shard_bytes=20_000), SILENT)
    assert len(list((tmp_path / "pruned").glob("model-*.safetensors"))) > 2
    load_causal_lm(tmp_path / "pruned")


def test_peft_alone_loads_the_recovered_adapter(base: Path, chain: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(base)
    stock = PeftModel.from_pretrained(stock, chain / "recovered").eval()
    merged = AutoModelForCausalLM.from_pretrained(chain / "merged").eval()
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, stock(IDS).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plain(IDS).logits, stock(IDS).logits, atol=1e-3)


def test_delta_is_equal_where_kept_and_zero_elsewhere(chain: Path):
    small = load_file(chain / "adapter" / "adapter_model.safetensors")
    full = load_file(chain / "recovered" / "adapter_model.safetensors")
    kept = keep_of(chain / "adapter")[1]
    prefix = "base_model.model.model.layers.1.mlp.up_proj"

    def delta(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]

    rows = list(kept.intermediate)
    assert torch.equal(delta(full)[rows], delta(small))
    others = sorted(set(range(40)) - set(rows))
    assert torch.count_nonzero(delta(full)[others]) == 0
    assert torch.count_nonzero(delta(full)[rows]) > 0


def test_aligned_model_keeps_its_head_and_moves_the_rest(chain: Path):
    before = load_file(chain / "pruned" / "model.safetensors")
    after = load_file(chain / "aligned" / "model.safetensors")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(before[name], after[name])


def test_train_leaves_a_curve_and_no_checkpoints(chain: Path):
    names = {p.name for p in (chain / "adapter").iterdir()}
    assert {"loss.png", "loss.csv", "adapter_config.json", "loram.json"} <= names
    assert "checkpoints" not in names
    lines = (chain / "adapter" / "loss.csv").read_text().splitlines()
    assert lines[0] == "step,split,loss,learning_rate"
    assert {line.split(",")[1] for line in lines[1:]} == {"train", "eval"}


def test_another_base_is_refused(chain: Path, tmp_path: Path):
    other = make_base(tmp_path / "other", seed=5)
    with pytest.raises(LoramError, match="weights differ"):
        recover.run(
            recover.RecoverSpec(adapter=chain / "adapter", model=other, out=tmp_path / "x"), SILENT
        )
    assert not (tmp_path / "x").exists()


def test_another_tokenizer_is_refused(chain: Path, base: Path, tmp_path: Path):
    other = Path(shutil.copytree(base, tmp_path / "other"))
    with (other / "tokenizer.json").open("a") as stream:
        stream.write(" ")
    with pytest.raises(LoramError, match="tokenizer differ"):
        recover.run(
            recover.RecoverSpec(adapter=chain / "adapter", model=other, out=tmp_path / "x"), SILENT
        )


def test_tied_embeddings_go_through_and_merge(text_file, instructions, tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tied = make_base(tmp_path / "tied", tie_word_embeddings=True)
    prune.run(prune_spec(tied, tmp_path / "pruned"), SILENT)
    train.run(train_spec(tmp_path / "pruned", tmp_path / "adapter", instructions), SILENT)
    places = {"adapter": tmp_path / "adapter", "model": tied, "out": tmp_path / "recovered"}
    recover.run(recover.RecoverSpec(**places), SILENT)
    places = {"adapter": tmp_path / "recovered", "model": tied, "out": tmp_path / "merged"}
    merge.run(merge.MergeSpec(**places), SILENT)
    stock = AutoModelForCausalLM.from_pretrained(tied)
    stock = PeftModel.from_pretrained(stock, tmp_path / "recovered").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, stock(IDS).logits, rtol=1e-4, atol=1e-4)


def test_nf4_trains_and_recovers(chain: Path, base: Path, instructions: Path, tmp_path: Path):
    spec = train_spec(chain / "pruned", tmp_path / "adapter", instructions, quantize="nf4", steps=2)
    result = train.run(spec, SILENT)
    assert result.manifest.results["final_train_loss"] > 0
    places = {"adapter": tmp_path / "adapter", "model": base, "out": tmp_path / "recovered"}
    recover.run(recover.RecoverSpec(**places), SILENT)


def test_a_killed_training_goes_on_to_the_same_adapter(
    chain: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    changes = {"steps": 6, "save_steps": 2, "dropout": 0.1}
    whole = train_spec(chain / "pruned", tmp_path / "whole", instructions, **changes)
    train.run(whole, SILENT)
    cut = train_spec(chain / "pruned", tmp_path / "cut", instructions, **changes)

    with pytest.raises(Interruption):
        train.run(cut, Interrupter(5))
    assert not (tmp_path / "cut").exists()
    train.run(cut, SILENT)
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "cut"))
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-5, atol=1e-7)
    steps = [line.split(",")[0] for line in (tmp_path / "cut" / "loss.csv").read_text().split()[1:]]
    assert [int(s) for s in steps] == sorted(int(s) for s in steps)


def test_base_without_tokenizer(base: Path, tmp_path: Path):
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(LoramError, match="no tokenizer"):
        prune.run(prune_spec(bare, tmp_path / "out"), SILENT)


def test_unknown_family(base: Path, tmp_path: Path):
    odd = Path(shutil.copytree(base, tmp_path / "odd"))
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "model_type": "transfo_x"}))
    with pytest.raises(LoramError, match="'transfo_x' is not a known family"):
        prune.run(prune_spec(odd, tmp_path / "out"), SILENT)


def test_pruned_models_and_overlaps_are_refused(chain: Path, base: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="is pruned already"):
        prune.run(prune_spec(chain / "pruned", tmp_path / "out"), SILENT)
    with pytest.raises(UsageError, match="overlap"):
        prune.run(prune_spec(base, base), SILENT)


def test_steps_out_of_order(chain: Path, base: Path, tmp_path: Path, text_file: Path):
    with pytest.raises(LoramError, match="expected an output of 'prune'"):
        spec = align.AlignSpec(source=chain / "aligned", out=tmp_path / "x", data=str(text_file))
        align.run(spec, SILENT)
    with pytest.raises(LoramError, match="expected an output of 'train'"):
        places = {"adapter": chain / "pruned", "model": base, "out": tmp_path / "x"}
        recover.run(recover.RecoverSpec(**places), SILENT)


def test_diverging_training_says_so(chain: Path, instructions: Path, tmp_path: Path):
    spec = train_spec(
        chain / "pruned", tmp_path / "adapter", instructions, learning_rate=1e18, steps=4
    )
    with pytest.raises(LoramError, match="lower the learning rate"):
        train.run(spec, SILENT)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.slow
def test_a_training_that_memory_will_not_hold_is_told_at_its_start(
    chain: Path, instructions: Path, text_file: Path, tmp_path: Path, monkeypatch
):
    reporter = WarningRecorder()
    free = "loram_cli.stages.fit.run.free_memory_bytes"
    monkeypatch.setattr(free, lambda _: 10**6)
    spec = train_spec(chain / "pruned", tmp_path / "adapter", instructions, quantize="nf4")
    train.run(spec, reporter)
    [line] = reporter.warnings
    assert "by arithmetic this takes" in line and "cpu has 976.56 KiB free" in line
    assert "--gradient-checkpointing, --micro-batch 1 would make it less" in line
    assert "--quantize" not in line
    aligning = {"data": str(text_file), "steps": 1, "batch": 2, "micro_batch": 1}
    spec = align.AlignSpec(source=chain / "pruned", out=tmp_path / "aligned", **aligning)
    monkeypatch.setattr(free, lambda _: 1000)
    align.run(spec, reporter)
    assert "; --method reconstruct would make it less" in reporter.warnings[1]
    told = len(reporter.warnings)
    # What is done already takes nothing.
    monkeypatch.setattr(free, lambda _: 0)
    align.run(spec, reporter)
    assert len(reporter.warnings) == told
